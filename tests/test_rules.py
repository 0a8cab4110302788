"""The action parser, the standard rules, and the two public scorers row by row."""

import dataclasses
import functools
import itertools
import json
import pathlib
import re
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgsd_jax.data import splits
from mgsd_jax.envs import ENVS
from mgsd_jax.envs.responses import answer_span
from mgsd_jax.envs.search import Plan
from mgsd_jax.evaluation import rules
from mgsd_jax.evaluation.upstream import TASKS
from mgsd_jax.evaluation.upstream_scores import answer_blocks

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "data" / "scoring_sample.jsonl"
REFERENCE = ROOT.parent / "shared" / "reference" / "scoring"
MOVES = ("up", "down", "left", "right")


def answer(text: str) -> str:
    return f"The route is clear.\n<answer>{text}</answer>"


def parse(text: str, task: str = "minibehaviour") -> tuple[str, ...] | None:
    """The plan of an answer block, None where it has none."""
    parsed = rules.parse_plan(answer(text), task)
    return parsed.plan if parsed.parsed else None


def read_rows(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_row(row: dict[str, Any]) -> None:
    arguments = (row["rules"], row["task"], row["task_text"], row["response"])
    if "exception" in row["expected"]:
        with pytest.raises(ValueError, match=row["expected"]["message"].strip("'")):
            rules.score_text(*arguments)
    else:
        assert rules.score_text(*arguments) == row["expected"]


@pytest.mark.parametrize("row", read_rows(SAMPLE))
def test_public_scorers_are_reproduced_on_the_sample(row: dict[str, Any]) -> None:
    check_row(row)


@pytest.mark.parametrize("name", ["upstream_reward", "upstream_eval"])
def test_public_scorers_are_reproduced_on_every_reference_row(name: str) -> None:
    path = REFERENCE / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {name}.jsonl beside the repository")
    rows = read_rows(path)
    assert len(rows) > 50
    for row in rows:
        check_row(row)


# The parser.


@pytest.mark.parametrize(
    ("action", "words"),
    [
        ("left", ["L", "LEFT", "left", "Leftward", "LEFTWARDS", "←", "0"]),
        ("down", ["D", "DOWN", "d", "downward", "DownWards", "↓", "1"]),
        ("right", ["R", "RIGHT", "r", "RIGHTWARD", "rightwards", "→", "2"]),
        ("up", ["U", "UP", "uP", "upward", "UPWARDS", "↑", "3"]),
        ("pick", ["PICK", "Pick", "PICKUP", "pick_up", "PICK-UP", "Pick  Up", "pick\tup", "GRAB"]),
        (
            "drop",
            ["DROP", "PUT", "place", "PUTDOWN", "PUT_DOWN", "Put-Down", "PUT DOWN", "put   down"],
        ),
    ],
)
def test_aliases_stand_for_one_action(action: str, words: list[str]) -> None:
    for word in words:
        assert parse(word) == (action,), word
        assert parse(f"{word}, {word}") == (action, action), word


@pytest.mark.parametrize(
    "separator",
    (
        *(" ", "\n", "\t", ",", ", ", ";", "|", "/", ".", ">", "->", " -> ", "-", "_", "+"),
        *("'", '", "', "`", "](", "}{", ")[", "\u00a0", "’ ‘", "“”"),
    ),
)
def test_separators_stand_for_nothing(separator: str) -> None:
    assert parse(separator.join("UDLR")) == MOVES
    assert parse(separator.join(MOVES)) == MOVES
    assert parse(f"{separator}U{separator}") == ("up",)


# The texts of answer blocks and the plan that they state, in letters (P is PICK, D! is DROP).
# Add a line for whatever a model writes.
READ = [
    ("UUR", ["UUR", "uuR", "UU,R", "U U R", "['U','U','R']", "`UUR`.", "U -> U -> R", "U→U→R"]),
    ("UUR", ["332", "3 3 2", "3, 3, 2", "[3, 3, 2]", "3->3->2", "(3, 3, 2)", "3. 3. 2."]),
    ("UUR", ["↑↑→", "↑ ↑ →", "↑, ↑, →", "[↑, ↑, →]", "**↑↑→**"]),
    (
        "RD",
        ["Right → Down", "Right ⇒ Down", "Right ➜ Down", "RIGHT->down", "→ Right → Down", "R→D"],
    ),
    (
        "RD",
        ["1. Right\n2. Down", "1) R\n2) D", "(1) R\n(2) D", "Step 1: R\nSTEP 2: D", "1: R\r\n2: D"],
    ),
    (
        "RD",
        ["1. Right 2. Down", "1.Right, 2.Down", "**1.** Right\n**2**. Down", "1. Right →\n2. Down"],
    ),
    ("RDDL", ["1. Right\n2. Down, Down\n3. Left", "- RDD\n- L", "* R\n* D\n* D\n* L"]),
    ("RRRRRRRRRRD", ["\n".join(f"{i}. {'D' if i == 11 else 'right'}" for i in range(1, 12))]),
    (
        "RD",
        [
            "**Right**, *Down*",
            "# R\n# D",
            "__R__ D",
            "```\nRD\n```",
            "```text\nR, D\n```",
            "`R` `D`",
        ],
    ),
    ("RD", [r"\boxed{RD}", r"\boxed{\text{Right, Down}}", r"\text{R}\text{ D}", r"\boxed {2 1}"]),
    ("UURRDD", ["3,3,2,2,1,1", "3, 3, 2,\n2, 1, 1", "3,3,2 2,1,1", "33 22 11", "3,3,2\n2,1,1"]),
    ("RD", ["R，D", "Right、Down。", "2，1", "R；D", "R．D", "[2, 1]", "[ 2,1 ]"]),
    ("", ["", " \n ", "**", "[]", r"\boxed{}", "...", "->"]),
    ("P U", ["PICK,UP", "PICK\nUP", "PICK UPWARD", "PICK-UP-U", "1. pick up\n2. up", "PICK ⇒ UP"]),
    ("D! D", ["PUT DOWNWARD", "put down, down", "DROP → D", "1. **Put down**\n2. Down"]),
    ("R P L L D!", ["R PICK UP LL PUT DOWN", "R,PICK,LL,DROP", "r → grab → ll → place"]),
]
# What makes a plan fail, and the first token that does.
REFUSED = [
    ("2", ["R2D2", "R2", "R 2", "Right 2", "U, 2, R"]),
    ("2.", ["Right 2. Down", "Right\n2. Down", "2. Right\n3. Down"]),
    ("1.", ["Right 1. Down 2.", "R\n1. R\n2. D", "1.\n2. Right"]),
    ("3.", ["1. Right\n3. Down", "1. Right\n2. Down\n3."]),
    ("4.", ["1. R\n2. D\n4. D\n3. D"]),
    ("1)", ["1. Right\n1) Down"]),
    ("12", ["R12", "Down 12"]),
    (
        "(0,1)",
        ["Right (0,1)", "Right (0,1) Down (1,1)", "(0,1)", "(0,1) (0,2) (1,2)", "((0,1), (1,1))"],
    ),
    ("(0, 0)", ["(0, 0), (0, 1)", "R (0, 0)", "(0, 0) -> (0, 1)"]),
    ("[0,0]", ["[0,0] [0,1]", "[[0,0],[0,1]]", "R [0,0]"]),
    ("0,0", ["0,0 0,1", "0,0 -> 0,1", "0,0\n0,1\n1,1\n", "- 0,0; 0,1", "0,0 (0,1", "0,0 | 0,4"]),
    ("3, 0", ["3, 0 -> 2, 0", "3, 0 2, 0. 1, 0.", "`3, 0` > `2, 0`"]),
    ("→", ["2 → 1", "2→1", "→2", "0 1 →"]),
    ("⇒", ["⇒", "→ ⇒ ↓", "2 ⇒ 1"]),
    ("↓", ["Right ↓ Down", "R↓", "1. R\n↓\n2. D"]),
    ("↑", ["U↑2", "U ↑"]),
    ("Step 1:", ["Step 1: →", "Step 1: 2", "Step 1: Step 2: Down"]),
    ("4", ["U, 4, R", "4", "2 4 1"]),
    ("²", ["²", "1. R ²", "2²"]),
    ("٣", ["٣", "R٣"]),
    ("①", ["① R", "R①"]),
    ("Plan", ["Plan: U", "Plan"]),
    ("STAY", ["U, STAY, R"]),
    (":", ["U: R"]),
    ("frac", [r"R frac{D}"]),
    ("\\", [r"\frac{R}{D}", r"\rightarrow", r"\boxed R", r"R \text"]),
    ("$", ["$R$", "R $ D"]),
    ("UURPICK", ["UURPICK"]),
    ("UPUP", ["UPUP"]),
    ("PICKED", ["U, PICKED"]),
    ("É", ["LÉFT"]),
    ("<", ["<b>U</b>"]),
    ("=", ["U = R", "R => D"]),
    ("…", ["R … D"]),
    ("no", ["no", "no-way"]),
]
LETTERS = {"U": "up", "D": "down", "L": "left", "R": "right", "P": "pick", "D!": "drop"}


@pytest.mark.parametrize(("plan", "text"), [(plan, text) for plan, texts in READ for text in texts])
def test_a_plan_is_read_however_it_is_written(plan: str, text: str) -> None:
    assert parse(text) == tuple(LETTERS[letter] for letter in re.findall(r"D!|\w", plan))


@pytest.mark.parametrize(
    ("token", "text"), [(token, text) for token, texts in REFUSED for text in texts]
)
def test_anything_else_makes_the_plan_fail(token: str, text: str) -> None:
    parsed = rules.parse_plan(answer(text), "minibehaviour")
    assert parsed == rules.ParsedPlan((), False, "invalid_token", token)


def numbered(form: str) -> Callable[[Plan], str]:
    return lambda plan: "\n".join(form.format(i, word.title()) for i, word in enumerate(plan, 1))


ORDER = ("left", "down", "right", "up")  # of the digits
STYLES: dict[str, Callable[[Plan], str]] = {
    "arrows between words": lambda plan: " → ".join(word.title() for word in plan),
    "double arrows between letters": lambda plan: " ⇒ ".join(word[0].upper() for word in plan),
    "numbered lines": numbered("{}. {}"),
    "numbered in brackets": numbered("({}) **{}**"),
    "steps": numbered("Step {}: {}"),
    "numbered in one line": lambda plan: numbered("{}. {}")(plan).replace("\n", ", "),
    "bullets": lambda plan: "".join(f"- {word}\n" for word in plan),
    "boxed": lambda plan: rf"\boxed{{\text{{{', '.join(plan)}}}}}",
    "digits": lambda plan: "".join(str(ORDER.index(word)) for word in plan),
    "arrows": lambda plan: " ".join("←↓→↑"[ORDER.index(word)] for word in plan),
}


@pytest.mark.parametrize("style", STYLES)
def test_a_shortest_plan_in_any_style_is_optimal(style: str) -> None:
    for index in range(40):
        state = splits.draw("frozenlake", 3 + index % 6, "train", seed=0, index=index)
        text = STYLES[style](ENVS["frozenlake"].shortest_plan(state))
        assert rules.judge(state, "frozenlake", answer(text)).optimal, text


@pytest.mark.parametrize("form", ["({},{})", "({}, {})", "[{}, {}]", "{},{}", "{}, {}"])
@pytest.mark.parametrize("task", ["frozenlake", "maze"])
def test_the_cells_of_the_way_are_no_plan(task: str, form: str) -> None:
    env = ENVS[task]
    for index in range(40):
        state = splits.draw(task, 4, "train", seed=0, index=index)
        plan = env.shortest_plan(state)
        cells = [form.format(*cell) for cell in env.trace(state, plan)]
        mixed = [f"{word} {cell}" for word, cell in zip(plan, cells[1:], strict=True)]
        # Without brackets a list with commas is a list of digits.
        lists = () if form[0] == "{" else (", ".join(cells), f"[{', '.join(cells)}]")
        for text in (
            " ".join(cells),
            " -> ".join(cells),
            "\n".join(cells),
            " ".join(mixed),
            *lists,
        ):
            outcome = rules.judge(state, task, answer(text))
            assert (outcome.success, outcome.reason) == (False, "invalid_token"), text


@pytest.mark.parametrize("task", ["frozenlake", "maze"])
def test_hands_are_invalid_tokens_where_there_is_nothing_to_pick(task: str) -> None:
    for word in ("PICK", "put down", "GRAB"):
        parsed = rules.parse_plan(answer(f"U, {word}, R"), task)
        assert parsed == rules.ParsedPlan((), False, "invalid_token", word)


@pytest.mark.parametrize(
    ("response", "block"),
    [
        ("<answer>U</answer> or <answer> L </answer>", "L"),
        ("<ANSWER>U</Answer>", "U"),
        ("<answer>U</answer> then <answer>L", "U"),
        ("<answer>U</answer></answer>", "U"),
        ("I use <answer> tags: <answer>U</answer>", "U"),
        ("<answer><answer>U</answer></answer>", "U"),
        ("<answer>\nU\nL\n</answer>", "U\nL"),
        ("<answer></answer>", ""),
        ("<answer>U", None),
        ("U</answer>", None),
        ("</answer>U<answer>", None),
        ("< answer>U</answer>", None),
        ("UUR", None),
        ("", None),
        ("<think><answer>L</answer></think><answer>U</answer>", "U"),
        ("<answer>U</answer><think>or <answer>L</answer>", "U"),
        ("<answer>L</answer></think>so <answer>U</answer>", "U"),
        ("<answer><think>L or U?</think>U</answer>", "U"),
        ("<think><answer>L</answer></think>", None),
    ],
)
def test_the_last_complete_block_outside_of_thoughts_counts(
    response: str, block: str | None
) -> None:
    parsed = rules.parse_plan(response, "maze")
    assert parsed == (
        rules.ParsedPlan((), False, "no_answer", None)
        if block is None
        else rules.parse_plan(answer(block), "maze")
    )


def test_a_lenient_reader_leaves_thoughts_out() -> None:
    assert rules.parse_plan("<think>LL</think>UR", "maze", lenient=True).plan == ("up", "right")


def test_no_block_is_no_plan_unless_lenient() -> None:
    assert rules.parse_plan("UUR", "maze") == rules.ParsedPlan((), False, "no_answer", None)
    assert rules.parse_plan("UUR", "maze", lenient=True).plan == ("up", "up", "right")
    assert rules.parse_plan("so UUR", "maze", lenient=True).invalid_token == "so"
    assert rules.parse_plan("so <answer>UR</answer>", "maze", lenient=True).plan == ("up", "right")


def test_an_unknown_task_is_refused() -> None:
    with pytest.raises(ValueError, match="task: got 'chess', want one of"):
        rules.parse_plan("U", "chess")


PIECES = st.sampled_from(
    [
        "<answer>",
        "</answer>",
        "<ANSWER>",
        "U",
        "R",
        "LEFT",
        "pick",
        " up",
        "->",
        ",",
        "4",
        "é",
        "\n",
    ]
)


@settings(max_examples=300, deadline=None)
@given(
    response=st.one_of(st.text(), st.lists(PIECES).map("".join)),
    task=st.sampled_from(TASKS),
    lenient=st.booleans(),
)
def test_no_text_makes_the_parser_or_a_scorer_raise(
    response: str, task: str, lenient: bool
) -> None:
    board, text = BOARDS[task]
    parsed = rules.parse_plan(response, task, lenient=lenient)
    outcome = rules.judge(board, task, response, lenient=lenient)
    assert set(parsed.plan) <= set(ENVS[task].actions)
    assert parsed.parsed == outcome.parsed == (parsed.reason is None)
    if parsed.parsed:
        assert outcome == ENVS[task].play(board, parsed.plan)
    else:
        assert parsed.plan == ()
        assert outcome.reason == parsed.reason
        assert not (outcome.success or outcome.optimal or outcome.legal)
        assert (outcome.steps, outcome.progress) == (0, 0.0)
    for name in ("upstream_reward", "upstream_eval"):
        score = rules.score_text(name, task, text, response)
        assert score["success"] in (0, 1)


WORDS = {
    "up": ["U", "up", "UPWARD"],
    "down": ["d", "Down", "downwards"],
    "left": ["L", "LEFT"],
    "right": ["r", "RIGHTWARDS"],
    "pick": ["PICK", "pick_up", "PICK-UP", "pick up", "GRAB"],
    "drop": ["DROP", "PUT", "place", "put-down", "PUT DOWN"],
}


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_plan_in_any_spelling_reads_back(data: st.DataObject) -> None:
    plan = data.draw(st.lists(st.sampled_from(sorted(WORDS))))
    words = [data.draw(st.sampled_from(WORDS[action])) for action in plan]
    # A blank or hyphen between PICK and UP would be the one action PICK UP.
    gaps = st.sampled_from([", ", "\n", ";", " | ", " -> ", "','", "/", " → ", "，", "**"])
    text = "".join(word + data.draw(gaps) for word in words)
    assert parse(text) == tuple(plan)


@given(st.text("LRUDlrud", min_size=1))
def test_a_run_of_letters_is_one_action_a_letter(text: str) -> None:
    letters = {"l": "left", "r": "right", "u": "up", "d": "down"}
    assert parse(text, "maze") == tuple(letters[letter] for letter in text.lower())


BLOCK_PIECES = ["<answer>", "</answer>", "<ANſWER>", "<", "/", "answer>", "\n", "U", " ", "<answer"]


@settings(max_examples=500, deadline=None)
@given(st.lists(st.sampled_from(BLOCK_PIECES)).map("".join))
def test_blocks_are_those_of_the_public_pattern(response: str) -> None:
    """The public scorers' pattern, which is quadratic, against the one pass."""
    want = re.findall(r"<answer>(.*?)</answer>", response, re.I | re.S)
    assert answer_blocks(response) == [block.strip() for block in want]
    inner = re.findall(r"<answer>((?:(?!<answer>).)*?)</answer>", response, re.I | re.S)
    span = answer_span(response)
    assert (None if span is None else response[slice(*span)]) == (inner[-1] if inner else None)


def seconds(call: Callable[[], object]) -> float:
    times = []
    for _ in range(3):
        started = time.process_time()
        call()
        times.append(time.process_time() - started)
    return min(times)


@pytest.mark.parametrize("name", ["standard", "upstream_reward", "upstream_eval"])
@pytest.mark.parametrize(
    "piece",
    [
        *(
            "<answer>",
            "</answer>",
            "<answer></answer>",
            "<think>",
            "</think>",
            "<",
            "(",
            "[",
            " ",
            "*",
            "1",
            "²",
        ),
        *(
            "PICK ",
            "PICK\t",
            "UP-",
            "step ",
            "1 ",
            "1.",
            "(1,",
            "(1 ",
            "\\text",
            "```",
            "→",
            "U",
            "LÉ",
        ),
    ],
)
def test_twice_the_text_takes_twice_the_time(name: str, piece: str) -> None:
    text = BOARDS["minibehaviour"][1]
    for before, after in (("<answer>", "</answer>"), ("<answer>1. U", ""), ("", "")):
        short, long = (before + piece * (n // len(piece)) + after for n in (30_000, 60_000))
        once, twice = (
            seconds(functools.partial(rules.score_text, name, "minibehaviour", text, response))
            for response in (short, long)
        )
        assert twice < 3 * once + 0.02, (once, twice)


# Scores.


def make_boards() -> dict[str, tuple[Any, str]]:
    boards = {}
    for task, env in ENVS.items():
        state = splits.draw(task, env.nearest_level(5), "train", seed=0, index=0)
        boards[task] = (state, env.to_text(state, split="train", index=0, seed=0))
    return boards


BOARDS = make_boards()


@pytest.mark.parametrize("task", sorted(ENVS))
def test_standard_scores_are_the_outcome(task: str) -> None:
    state, text = BOARDS[task]
    plan = ENVS[task].shortest_plan(state)
    spelled = [ENVS[task].actions[action] for action in plan]
    score = rules.score_text("standard", task, text, answer(", ".join(spelled)))
    assert score["success"] and score["optimal"] and score["reason"] == "success"
    assert score["steps"] == len(plan) and score["progress"] == 1.0
    for response in (answer("U,U"), answer("U x"), "U", answer(",".join(spelled[:-1]))):
        outcome = dataclasses.asdict(rules.judge(state, task, response))
        kinds = dict.fromkeys({fact[0] for fact in ENVS[task].facts(state)}, 0.0)
        states = {"state_f1": 0.0, "state_exact": False, "contradicted": []}
        score = rules.score_text("standard", task, text, response)
        assert score == outcome | states | {"state_f1_by_kind": kinds}


@pytest.mark.parametrize("name", ["standard", "upstream_reward", "upstream_eval"])
@pytest.mark.parametrize("task", TASKS)
def test_the_task_may_be_in_any_case_or_left_to_the_text(name: str, task: str) -> None:
    state, text = BOARDS[task]
    response = answer(",".join(ENVS[task].shortest_plan(state)))
    want = rules.score_text(name, task, text, response)
    assert want["success"]
    for spelled in (None, "", task.upper(), task.replace("viour", "vior").title()):
        assert rules.score_text(name, spelled, text, response) == want


def test_what_cannot_be_scored_is_refused_with_the_key() -> None:
    _, text = BOARDS["maze"]
    with pytest.raises(ValueError, match="rules: got 'ours', want one of"):
        rules.score_text("ours", "maze", text, "")
    for name in ("standard", "upstream_eval"):
        with pytest.raises(ValueError, match="task: got 'chess'"):
            rules.score_text(name, "chess", text, answer("U"))
        with pytest.raises(ValueError, match="task: got ''"):
            rules.score_text(name, None, "level=3\n", answer("U"))
    assert rules.score_text("upstream_reward", "chess", text, answer("U"))["illegal_action"] == 1
    without = "\n".join(line for line in text.splitlines() if not line.startswith("layout_json"))
    for name in ("standard", "upstream_reward", "upstream_eval"):
        with pytest.raises(ValueError, match="layout_json: got no such line"):
            rules.score_text(name, "maze", without, answer("U"))


@pytest.mark.parametrize(
    ("task", "line", "changed", "key"),
    [
        ("maze", "start_row=", "start_row=one", "start_row"),
        ("maze", "layout_json=", "layout_json=[[{}]]", "layout_json"),
        ("maze", "layout_json=", "layout_json=3", "layout_json"),
        ("maze", "layout_json=", "layout_json=[", "layout_json"),
        ("maze", "level=", "level=0", "level"),
        ("minibehaviour", "table_pos=", "table_pos=[1, 2]", "table_pos"),
        ("minibehaviour", "printer_col=", "printer=1", "printer_col"),
        ("frozenlake", "map:", "map:\nFFFFF", "map"),
    ],
)
def test_a_broken_board_names_its_key(task: str, line: str, changed: str, key: str) -> None:
    lines = BOARDS[task][1].splitlines()
    at = next(i for i, got in enumerate(lines) if got.startswith(line))
    text = "\n".join([*lines[:at], changed, *(lines[at + 1 :] if key != "map" else [])])
    with pytest.raises(ValueError, match=f"^{key}: got .*want"):
        rules.score_text("upstream_reward", task, text, answer("U,U,L,D,R"))


@pytest.mark.parametrize("task", TASKS)
def test_the_public_reward_and_ours_agree_where_the_rules_do(task: str) -> None:
    """Two simulators, one set of moves: on well-formed plans they must give the same result."""
    env = ENVS[task]
    rng = np.random.default_rng(0)
    seen = set()
    for index, _ in itertools.product(range(20), range(10)):
        state = splits.draw(task, 4 + index % 3, "train", seed=0, index=index)
        text = env.to_text(state, split="train", index=0, seed=0)
        plan = [str(action) for action in rng.choice([*env.actions], size=rng.integers(1, 9))]
        good = env.random_shortest_plan(state, rng)
        plan = [*good[: rng.integers(len(good) + 1)], *plan]
        ours = rules.judge(state, task, answer(",".join(plan)))
        reward = rules.score_text("upstream_reward", task, text, answer(",".join(plan)))
        assert reward["success"] == ours.success
        assert reward["illegal_action"] == (not ours.legal)
        evaluation = rules.score_text("upstream_eval", task, text, answer(",".join(plan)))
        if task != "frozenlake":  # where the evaluator fails a move off the board
            assert evaluation["success"] == ours.success
            assert evaluation["optimal_success"] == ours.optimal
            assert evaluation["steps_executed"] == ours.steps
        seen.add(ours.reason)
    assert len(seen) >= 3
