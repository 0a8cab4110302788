"""An env of one's own: what its plans may look like, and what is refused in one line."""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest

from mgsd_jax import command_line
from mgsd_jax import config as c
from mgsd_jax.data import prompts
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS, base, contract, search
from mgsd_jax.envs.sokoban import SokobanState
from mgsd_jax.evaluation import scoring
from mgsd_jax.report import boards
from mgsd_jax.stages import generate

MAZE, SOKOBAN = ENVS["maze"], ENVS["sokoban"]
MOVES = ("up", "down", "left", "right")


def spelled(actions: Mapping[str, str], words: Mapping[str, str] | None = None) -> base.Env[Any]:
    """The maze with other actions, which is enough of an env for what is read and written."""
    answer = next(iter(actions.values()))
    wording = dataclasses.replace(MAZE.wording, answer=answer)
    return dataclasses.replace(MAZE, actions=actions, words=words or {}, wording=wording)


@pytest.mark.parametrize(
    ("spellings", "written"),
    [
        ("U D L R", "UDLR"),
        ("n s w e", "nswe"),
        ("W S A D", "WSAD"),
        ("D U R L", "DURL"),  # its own letters before those of the moves
        ("1 2 3 4", "1234"),
        ("3 1 0 2", "3102"),
        ("↑ ↓ ← →", "↑↓←→"),
        ("north south west east", "north,south,west,east"),
        ("PA PB PC PD", "PA,PB,PC,PD"),
        ("U D L HOP", "U,D,L,HOP"),
        ("U P N UP", "U,P,N,UP"),
    ],
)
def test_plans_in_the_spellings_of_an_env_read_back(spellings: str, written: str) -> None:
    env = spelled(dict(zip(MOVES, spellings.split(), strict=True)))
    assert env.spell(MOVES) == written
    rng = np.random.default_rng(0)
    for length in range(1, 40):
        plan = tuple(rng.choice(MOVES, size=length).tolist())
        assert env.read(env.spell(plan)) == (plan, None)
        assert env.read(env.spell(plan).lower()) == (plan, None)
        assert env.read(", ".join(env.actions[action] for action in plan)) == (plan, None)


def test_a_run_of_letters_that_would_be_another_word_is_written_apart() -> None:
    env = spelled({"up": "U", "other": "P"})
    assert env.spell(("up", "other")) == "U,P"  # UP is up
    assert env.read("U,P") == (("up", "other"), None) and env.read("UP") == (("up",), None)
    assert spelled({"north": "U", "other": "P"}).spell(("north", "other")) == "UP"


def test_words_for_moves_are_those_of_envs_that_have_them() -> None:
    press = spelled({"press_a": "A", "press_b": "B"}, {"first": "press_a"})
    assert press.read("A, first, BA") == (("press_a", "press_a", "press_b", "press_a"), None)
    for text in ("up", "R", "0 1", "→"):
        assert press.read(text) == ((), text.split()[0])
    assert spelled({"right": "GO", "wait": "W"}).read("GO, R, W, right") == (
        ("right", "right", "wait", "right"),
        None,
    )


@pytest.mark.parametrize(
    ("actions", "words", "says"),
    [
        (
            {"a": "P1", "b": "P2"},
            {},
            r"actions: got 'P1' for \['a'\], which has 'P', which is no action",
        ),
        ({"a": "É"}, {}, r"actions: got 'É' for \['a'\], which has 'É', which is no action"),
        ({"a": "x", "b": "X"}, {}, r"actions: got 'x' for \['a'\], which reads as \['b'\]"),
        ({"a": "10", "b": "11"}, {}, "actions: got '10'"),
        (
            {"a": "A", "b": "1"},
            {},
            r"actions: got 'A1' for \['a', 'b'\], which has '1', which is no action",
        ),
        ({"a": "(0,1)"}, {}, r"actions: got '\(0,1\)'"),
        ({"a": "go on"}, {}, "actions: got 'go on'"),
        ({"a": ""}, {}, "actions: got ''"),
        (
            {"up": "U"},
            {"U1": "up"},
            r"words: got 'U1' for \['up'\], which has '1', which is no action",
        ),
        ({"up": "U", "dig": "D"}, {"u": "dig"}, r"actions: got 'U' for \['up'\], which reads as"),
        ({"up": "U"}, {"FLY": "fly"}, r"words: got actions \{'fly'\}, want"),
    ],
)
def test_spellings_that_do_not_read_back_are_refused(
    actions: dict[str, str], words: dict[str, str], says: str
) -> None:
    with pytest.raises(ValueError, match=f"^maze: {says}") as caught:
        spelled(actions, words)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("changed", "says"),
    [
        ({"route": "Along (0,0)"}, "wording.route: got 'Along"),
        ({"route": "I go through the lamps."}, "wording.route: got .* want it to name a cell"),
        ({"answer": "hop"}, "wording.answer: got 'hop', want a plan of"),
        ({"answer": ""}, "wording.answer: got '', want a plan of"),
    ],
)
def test_examples_that_cannot_be_read_are_refused(changed: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=f"^maze: {says}"):
        dataclasses.replace(MAZE, wording=dataclasses.replace(MAZE.wording, **changed))


def test_levels_are_sizes_of_boards() -> None:
    for levels in (range(0, 3), range(4, 4)):
        with pytest.raises(ValueError, match="maze: levels: got"):
            dataclasses.replace(MAZE, levels=levels)
    small, odd = (
        dataclasses.replace(MAZE, levels=levels) for levels in (range(2, 4), range(3, 9, 2))
    )
    assert [small.nearest_level(level) for level in (1, 2, 3, 4)] == [2, 2, 3, 3]
    assert odd.nearest_level(9) == 7
    # The tokenizer of a nano model is made from boards of this level: see BUILD.md on its bytes.
    usual = {name: ENVS[name].nearest_level(4) for name in ("frozenlake", "maze", "minibehaviour")}
    assert {*usual.values()} == {4} and ENVS["sokoban"].nearest_level(4) == 5


def test_kinds_of_cells_may_be_an_array_of_bools() -> None:
    sheets = np.stack([np.full((16, 16, 3), shade, np.uint8) for shade in (0, 200)])
    kinds = np.array([[True, False], [False, True]])
    want = base.paste_cells(sheets, [[1, 0], [0, 1]])
    assert (base.paste_cells(sheets, kinds) == want).all()
    assert (base.paste_cells(sheets, kinds.astype(np.int8)) == want).all()
    assert want[0, 0, 0] == 200 and want[0, 15, 0] == 0


# What the parts of an env have to agree on.


@pytest.mark.parametrize("task", ENVS)
def test_every_env_keeps_the_contract(task: str) -> None:
    levels = [*ENVS[task].levels]
    for level in dict.fromkeys((*levels[:3], ENVS[task].nearest_level(7), levels[-1])):
        for seed in range(3):
            contract.check(task, level, picture_size=16 * level, seed=seed)


def silent_from_facts(size: int, named: base.NamedCells) -> SokobanState:
    """A from_facts that is content without walls."""
    return SOKOBAN.from_facts(size, {"wall": (), **named})


def untrue(state: SokobanState) -> tuple[base.Question, ...]:
    size, player, *others = SOKOBAN.questions(state)
    return (size, dataclasses.replace(player, answer="(0,0)"), *others)


def without(*names: str) -> dict[str, str]:
    return {name: word for name, word in SOKOBAN.labels.items() if name not in names}


def wrong_paths(**changed: Any) -> Callable[[SokobanState], search.Paths]:
    return lambda state: SOKOBAN.paths(state)._replace(**changed)


def fail(*_: object, **__: object) -> Any:
    raise ValueError("could not broadcast\ninput array")


def other_board(*_: object, **__: object) -> SokobanState:
    return SOKOBAN.generate(np.random.default_rng(99), 5)


WRONG: list[tuple[dict[str, Any], str]] = [
    ({"labels": without("wall")}, r"from_facts: got KeyError \('wall'.*\['walls?'\]\)"),
    (
        {"labels": without("wall"), "from_facts": silent_from_facts},
        r"from_facts: got sokoban:.*of labels name \(questions also have \['wall'\]\)",
    ),
    ({"labels": {**SOKOBAN.labels, "lamp": "lamps"}}, r"labels: got no line about \['lamp'\]"),
    (
        {"questions": untrue},
        r"questions: got .* without \[\"\('player', .* and with \[\"\('player'",
    ),
    ({"labels": without("wall") | {"Walls": "Walls"}}, r"labels: got no line about \['Walls'\]"),
    ({"from_facts": other_board}, "from_facts: got sokoban:.*, want sokoban:"),
    ({"from_facts": fail}, r"from_facts: got ValueError \(could not broadcast input array"),
    ({"generate": fail}, "generate: got ValueError .* want a board of level 5"),
    ({"generate": lambda rng, level: SOKOBAN.generate(rng, 6)}, "generate: got size 6"),
    ({"key": lambda state: "a\nb"}, "key: got"),
    ({"count": lambda level: 1.5}, "count: got 1.5"),
    ({"paths": fail}, "paths: got ValueError"),
    ({"paths": wrong_paths(cells=[(0, 0)])}, r"paths: got successors, distances, cells of \[\d+"),
    (
        {"paths": lambda state: SOKOBAN.paths(state)._replace(distances=[1] * 10**4)},
        "paths: got successors, distances",
    ),
    (
        {
            "paths": lambda state: SOKOBAN.paths(state)._replace(
                distances=[d + (d > 1) for d in SOKOBAN.paths(state).distances]
            )
        },
        r"paths: got distance \d+ of node \d+, want \d+ by successors",
    ),
    ({"refuse": lambda state, node, action: (None, None)}, r"refuse: got \(None, None\) for"),
    ({"refuse": lambda state, node, action: (-1, None)}, r"refuse: got \(-1, None\) for"),
    ({"refuse": lambda state, node, action: (None, "bumped")}, "reasons: got .*'bumped' in words"),
    ({"reasons": {}}, "reasons: got .*in words"),
    ({"questions": fail}, "questions: got ValueError"),
    ({"route": lambda plan, cells: "Along (0,0)."}, "route: got 'Along"),
    ({"route": lambda plan, cells: "I go through (1,1).\nDone."}, "route: got 'I go"),
    ({"route": lambda plan, cells: "I go through (1,1). Player: (1,1)."}, "questions: got"),
    ({"disturb": other_board}, "disturb: got sokoban:"),
    ({"render": lambda state, size, sprites: np.zeros((size, size))}, "render: got float64"),
    ({"render": fail}, "render: got ValueError"),
    (
        {"file": dataclasses.replace(SOKOBAN.file, read=other_board)},
        "file: got (ValueError|sokoban)",
    ),
    ({"file": dataclasses.replace(SOKOBAN.file, keys=SOKOBAN.file.keys[1:])}, "file: got ValueE"),
    ({"file": dataclasses.replace(SOKOBAN.file, fields=fail)}, "file: got ValueError"),
]


@pytest.mark.parametrize(("changed", "says"), WRONG)
def test_an_env_that_contradicts_itself_is_refused_by_name(
    changed: dict[str, Any], says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVS, "sokoban", dataclasses.replace(SOKOBAN, **changed))
    with pytest.raises(ValueError, match=f"^sokoban: {says}") as caught:
        for seed in range(4):  # not every board has a wall
            contract.check("sokoban", 5, picture_size=80, seed=seed)
    assert "\n" not in str(caught.value) and ", want " in str(caught.value)


def test_a_wrong_env_writes_no_boards(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVS, "maze", dataclasses.replace(MAZE, reasons={"off_board": "left it"}))
    few = (c.LevelSet("maze", (3,), train=2, val=1, test=1),)
    nano = command_line.load_config("nano", [])
    config = dataclasses.replace(nano, data=dataclasses.replace(nano.data, boards=few))
    with pytest.raises(ValueError, match=r"maze: reasons: got .*'hit_wall' in words"):
        generate.run(config, str(tmp_path))
    assert not [*tmp_path.iterdir()]


def test_a_report_shows_actions_as_answers_spell_them(monkeypatch: pytest.MonkeyPatch) -> None:
    room = ENVS["minibehaviour"]
    wording = dataclasses.replace(room.wording, answer="U,PA,R,PUT")
    actions = {**base.MOVES, "pick": "PA", "drop": "PUT"}
    env = dataclasses.replace(room, actions=actions, words={}, wording=wording)
    monkeypatch.setitem(ENVS, "minibehaviour", env)
    state = env.generate(np.random.default_rng(0), 5)
    text = env.to_text(state, split="test", index=0, seed=0)
    board = Board("minibehaviour", 5, 0, state, text)
    response = prompts.response("minibehaviour", state, env.shortest_plan(state))
    row: Any = scoring.score_row(board, "picture", scoring.Answer(response, False, 1), model="base")
    assert row["outcome"]["optimal"]
    row["task_text"] = text
    shown = str(boards.card(boards.Pick(("minibehaviour", 5, 0), "", {"base": row}), 0))
    assert " PA " in shown and " PUT" in shown and "PICK" not in shown and "DROP" not in shown
    assert ">PA</text>" in shown and ">P</text>" in shown
