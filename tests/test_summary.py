"""The summary's numbers, each against a second way to the same number."""

import itertools
import json
from typing import Any, cast

import numpy as np
import pytest

from mgsd_jax.evaluation import summary, upstream, upstream_scores
from mgsd_jax.evaluation.measures import Measure
from mgsd_jax.evaluation.rows import PerceptionRow, PlanRow

# As much of a board file as the public scorers read.
TEXTS = {
    "maze": "task=maze\nlevel=2\npath_length=1\nstart_row=0\nstart_col=0\ntarget_row=1\n"
    "target_col=0\nstart_pos=0\ntarget_pos=2\nlayout_json="
    + json.dumps([[dict.fromkeys(("north", "south", "east", "west"), False)] * 2] * 2),
    "frozenlake": "task=frozenlake\nlevel=2\npath_length=1\nmap:\nSF\nGF",
}


def make_row(
    model: str = "base",
    mode: str = "picture",
    task: str = "maze",
    level: int = 3,
    index: int = 0,
    success: bool = False,
    **changes: Any,
) -> PlanRow:
    """One fabricated row; `changes` go to the outcome where it has the key, else to the row."""
    outcome: dict[str, Any] = {
        "success": success,
        "optimal": success,
        "parsed": True,
        "legal": True,
        "reason": "success" if success else "not_reached",
        "steps": 3,
        "progress": float(success),
    }
    row: dict[str, Any] = {
        "id": f"{model}/{mode}/{task}/{level}/{index}",
        "model": model,
        "mode": mode,
        "task": task,
        "level": level,
        "index": index,
        "attempt": 0,
        "task_text": f"index={index}\n{TEXTS[task]}\n",
        "response": "",
        "outcome": outcome,
        "plan": ["up"],
        "truncated": False,
        "response_tokens": 10,
        "state_f1": 1.0,
        "state_exact": True,
        "plan_given_own_state": success,
    }
    for key, value in changes.items():
        (outcome if key in outcome else row)[key] = value
    return cast(PlanRow, row)


def series(model: str, mode: str, successes: list[bool], **where: Any) -> list[PlanRow]:
    """Rows of one model, mode, task and level, one a board."""
    return [make_row(model, mode, index=i, success=s, **where) for i, s in enumerate(successes)]


def asked(index: int, answers: dict[str, bool], **changes: Any) -> PerceptionRow:
    """The row of answers to the questions about a picture."""
    row = dict(make_row("base", "perception", index=index), perception=answers, **changes)
    del row["outcome"]
    return cast(PerceptionRow, row)


def known(measure: Measure | None) -> Measure:
    """A measure that a summary must have."""
    assert measure is not None
    return measure


def p_of(measure: Measure | None) -> float:
    """The p-value that a difference must have."""
    assert measure is not None and "p_value" in measure
    return measure["p_value"]


def test_macro_balances_levels_and_tasks_and_upstream_does_not() -> None:
    rows = series("base", "picture", [True] * 2, task="maze", level=3)
    rows += series("base", "picture", [False] * 8, task="maze", level=4)
    rows += series("base", "picture", [True, False], task="frozenlake", level=5)
    part = summary.summarize(rows)["models"]["base"]["picture"]
    assert part["macro"]["value"] == pytest.approx(((1 + 0) / 2 + 0.5) / 2)
    assert part["macro_upstream"] == pytest.approx((2 / 10 + 1 / 2) / 2)
    assert part["tasks"]["maze"]["success"]["value"] == pytest.approx(0.2)
    assert part["tasks"]["maze"]["level_mean"]["value"] == pytest.approx(0.5)
    assert part["tasks"]["maze"]["levels"]["4"]["n"] == part["macro"]["n"] - 4 == 8


def test_the_interval_of_a_level_is_agresti_and_coulls() -> None:
    rows = series("base", "picture", [True] * 2 + [False] * 8)
    level = summary.summarize(rows)["models"]["base"]["picture"]["tasks"]["maze"]["levels"]["3"]
    z2 = 1.959964**2
    centre = (2 + z2 / 2) / (10 + z2)
    half = np.sqrt(z2 * centre * (1 - centre) / (10 + z2))
    assert level["success"]["low"] == pytest.approx(centre - half, abs=1e-6)
    assert level["success"]["high"] == pytest.approx(centre + half, abs=1e-6)


def test_intervals_hold_their_value_and_stay_open_at_0_and_1() -> None:
    for successes in ([False] * 20, [True] * 20, [True, False] * 10):
        macro = summary.summarize(series("base", "picture", successes))["models"]["base"]
        measure = macro["picture"]["macro"]
        assert 0 <= measure["low"] <= measure["value"] <= measure["high"] <= 1
        assert measure["high"] - measure["low"] > 0.1


def test_every_answer_counts_under_one_error_and_they_add_up() -> None:
    flags = (True, False)
    rows = []
    for success, optimal, parsed, legal, truncated in itertools.product(flags, repeat=5):
        for exact in (True, False, None):
            rows.append(
                make_row(
                    index=len(rows),
                    success=success,
                    optimal=optimal,
                    parsed=parsed,
                    legal=legal,
                    truncated=truncated,
                    state_exact=exact,
                )
            )
    rows.append(make_row(index=len(rows), parsed=False, error="timeout"))
    part = summary.summarize(rows)["models"]["base"]["picture"]
    assert sum(part["errors"].values()) == part["n"] == len(rows)
    assert set(part["errors"]) == set(summary.ERRORS)
    assert all(part["errors"].values())
    assert sum(part["reasons"].values()) == len(rows)


@pytest.mark.parametrize(
    ("changes", "want"),
    [
        ({"success": True}, "success"),
        ({"success": True, "optimal": False}, "not_optimal"),
        ({"truncated": True, "parsed": False}, "truncated"),
        ({"parsed": False, "state_exact": False}, "unparsed"),
        ({"state_exact": False, "legal": False}, "wrong_state"),
        ({"legal": False}, "illegal_plan"),
        ({}, "not_successful"),
        ({"state_exact": None, "legal": False}, "illegal_plan"),
        ({"error": "timeout", "parsed": False, "truncated": True}, "request_failed"),
    ],
)
def test_error_of(changes: dict[str, Any], want: str) -> None:
    assert summary.error_of(make_row(**changes)) == want


def test_diagnostics_come_from_their_modes() -> None:
    rows = series("base", "picture", [True, False, False, False])
    rows[0]["state_f1"], rows[1]["state_f1"] = 0.5, None
    rows[3]["plan_given_own_state"] = None
    rows += series("base", "text", [True, True, True, False])
    measures = summary.summarize(rows)["diagnostics"]["base"]
    found = {name: known(measure) for name, measure in measures.items() if name != "contradicted"}
    assert found["e2e"]["value"] == pytest.approx(0.25)
    assert found["plan_on_gt"]["value"] == pytest.approx(0.75)
    assert (found["state_f1"]["value"], found["state_f1"]["n"]) == (pytest.approx(2.5 / 3), 3)
    assert found["plan_given_own_state"]["value"] == pytest.approx(1 / 3)


def test_contradictions_and_the_asked_form_are_measured_where_rows_say_so() -> None:
    rows = series("base", "picture", [True] * 4)
    rows[0]["contradicted"], rows[1]["contradicted"] = ["player"], []
    right = {"player": True, "goal": True}
    answers = [asked(0, right, perception_strict=right | {"goal": False}), asked(1, right)]
    found = summary.summarize([*rows, *answers])
    contradicted = known(found["diagnostics"]["base"]["contradicted"])
    assert (contradicted["value"], contradicted["n"]) == (0.5, 2)
    strict = found["models"]["base"]["perception"]["strict"]
    assert (strict["value"], strict["n"]) == (0.5, 1)
    assert found["models"]["base"]["perception"]["macro"]["value"] == 1.0


def test_f1_by_kind_is_over_the_boards_where_it_is_measured() -> None:
    rows = series("base", "picture", [True] * 4)
    rows[0]["state_f1_by_kind"], rows[1]["state_f1_by_kind"] = (
        {"hole": 0.5, "goal": 1.0},
        {"goal": 0.0},
    )
    rows[2]["state_f1_by_kind"] = {"hole": 0.0, "goal": 1.0}  # the last row is of an older version
    (tasks,) = summary.summarize(rows)["models"]["base"]["picture"]["tasks"].values()
    found = {kind: (known(m)["value"], m["n"]) for kind, m in tasks["state_f1_by_kind"].items()}
    assert found == {"goal": (pytest.approx(2 / 3), 3), "hole": (0.25, 2)}
    older = summary.summarize(series("base", "picture", [True] * 4))
    (tasks,) = older["models"]["base"]["picture"]["tasks"].values()
    assert tasks["state_f1_by_kind"] == {}


def test_gap_and_how_much_of_it_is_closed() -> None:
    rows = series("base", "text", [True] * 80 + [False] * 20)
    rows += series("base", "picture", [True] * 20 + [False] * 80)
    rows += series("distilled", "picture", [True] * 50 + [False] * 50)
    found = summary.summarize(rows)
    assert known(found["modality_gap"]["base"])["value"] == pytest.approx(0.6)
    assert found["modality_gap"]["distilled"] is None
    closed = known(found["gap_closed"])
    assert closed["value"] == pytest.approx(0.5)
    assert 0.3 < closed["low"] < 0.5 < closed["high"] < 0.7
    difference = known(found["differences"]["distilled - base"])
    assert difference["value"] == pytest.approx(0.3) and difference["low"] > 0


def test_a_paired_difference_is_tighter_than_an_unpaired_one() -> None:
    base = [True] * 50 + [False] * 50
    better = [True] * 60 + [False] * 40
    worse_pairing = [False] * 40 + [True] * 60
    widths = []
    for successes in (better, worse_pairing):
        rows = series("base", "picture", base) + series("distilled", "picture", successes)
        found = known(summary.summarize(rows)["differences"]["distilled - base"])
        assert found["value"] == pytest.approx(0.1)
        widths.append(found["high"] - found["low"])
    assert widths[0] < widths[1] / 2


def test_no_gap_has_no_share_closed() -> None:
    rows = series("base", "text", [True, False] * 10) + series(
        "base", "picture", [True, False] * 10
    )
    rows += series("distilled", "picture", [True] * 20)
    assert known(summary.summarize(rows)["gap_closed"])["value"] is None


def test_perception_by_question() -> None:
    given = [(True, True), (True, False), (False, False)]
    rows = [asked(i, {"size": size, "player": player}) for i, (size, player) in enumerate(given)]
    part = summary.summarize(rows)["models"]["base"]["perception"]
    questions = part["tasks"]["maze"]["questions"]
    assert questions["size"]["value"] == pytest.approx(2 / 3)
    assert questions["player"]["value"] == pytest.approx(1 / 3)
    assert part["macro"]["value"] == pytest.approx(0.5)
    assert part["all_right"]["value"] == pytest.approx(1 / 3)


def test_the_summary_is_plain_json_and_independent_of_the_order_of_rows() -> None:
    rng = np.random.default_rng(0)
    rows = []
    for model, mode in itertools.product(("distilled", "base", "extra"), ("picture", "text")):
        for task, level in itertools.product(("maze", "frozenlake"), (3, 10)):
            found = [bool(s) for s in rng.random(12) < 0.5]
            rows += series(model, mode, found, task=task, level=level)
    made = summary.summarize(rows)
    assert list(made["models"]) == ["base", "distilled", "extra"]
    assert list(made["models"]["base"]["text"]["tasks"]["maze"]["levels"]) == ["3", "10"]
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    shuffled = summary.summarize([rows[i] for i in rng.permutation(len(rows))])
    assert json.dumps(shuffled) == json.dumps(made)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda rows: rows.clear(), "rows.jsonl: got no rows, want"),
        (lambda rows: rows[1].pop("plan"), r"row 2 \(base.*want \['plan'\]"),
        (lambda rows: rows[1]["outcome"].pop("legal"), r"row 2 .*outcome.*want \['legal'\]"),
        (lambda rows: rows[0].update(outcome=None), "row 1 .*: outcome: got None, want dict"),
        (lambda rows: rows[0].update(truncated="no"), "truncated: got 'no', want bool"),
        (lambda rows: rows[0].update(response_tokens="9"), "got '9', want int or null"),
        (lambda rows: rows[0].update(state_f1=True), "state_f1: got True, want float or int or nu"),
        (
            lambda rows: rows[0]["outcome"].update(progress=[1]),
            r"outcome: progress: got \[1\], wan",
        ),
        (lambda rows: rows[0]["outcome"].update(success=1), "outcome: success: got 1, want bool"),
        (lambda rows: rows[0].update(mode="sound"), "got mode 'sound', want one of"),
        (lambda rows: rows[0].update(task="chess"), "got task 'chess', want one of"),
        (lambda rows: rows.append(rows[0]), "row 3 .* twice, want it once"),
        (lambda rows: rows.append(make_row("grounded", task_text="?")), "two boards named"),
        (lambda rows: rows[0].update(mode="perception"), r"want \['perception'\]"),
    ],
)
def test_bad_rows_raise_with_file_got_and_want(spoil: Any, message: str) -> None:
    rows = series("base", "picture", [True, False])
    spoil(rows)
    with pytest.raises(ValueError, match=message):
        summary.summarize(rows, source="rows.jsonl")


def test_several_answers_of_a_board_count_as_one_board() -> None:
    rows = [
        make_row(index=board, success=success, attempt=attempt)
        for board, tries in enumerate([(True, True, False, False), (False,) * 4])
        for attempt, success in enumerate(tries)
    ]
    part = summary.summarize(rows)["models"]["base"]["picture"]
    assert part["n"] == sum(part["errors"].values()) == 8, "answers"
    assert part["macro"]["n"] == part["tasks"]["maze"]["success"]["n"] == 2, "boards"
    assert part["macro"]["value"] == pytest.approx(0.25)
    once = [make_row(index=board, success=False) for board in range(2)]
    spread = part["macro"]["high"] - part["macro"]["low"]
    assert spread > 0.5, "the interval is that of two boards, not of eight"
    # Two of four right: one of two is right but with 1 - (2 choose 2) / (4 choose 2).
    assert {k: m["value"] for k, m in part["pass_at_k"].items()} == pytest.approx(
        {"1": 0.25, "2": (1 - 1 / 6) / 2, "4": 0.5}
    )
    assert summary.summarize(once)["models"]["base"]["picture"]["pass_at_k"] == {}


def test_pass_at_k_is_what_drawing_k_answers_gives() -> None:
    rng = np.random.default_rng(0)
    answers = rng.random((3, 6)) < 0.4
    rows = [
        make_row(index=b, success=bool(answers[b, t]), attempt=t)
        for b in range(3)
        for t in range(6)
    ]
    found = summary.summarize(rows)["models"]["base"]["picture"]["pass_at_k"]
    assert list(found) == ["1", "2", "4", "6"]
    for k in (1, 2, 4, 6):
        subsets = list(itertools.combinations(range(6), k))
        want = np.mean([[answers[b, list(s)].any() for s in subsets] for b in range(3)])
        assert found[str(k)]["value"] == pytest.approx(want)


def test_the_three_rule_sets_stand_side_by_side() -> None:
    """Read first block or last, tagged or not: each answer once where the rules part ways."""
    responses = {
        "<answer>D</answer>": (True, True, True),
        "<answer>U</answer> no: <answer>D</answer>": (True, False, True),
        "<answer>D</answer> no: <answer>U</answer>": (False, True, False),
        "down": (False, False, True),
        "<answer>D, then rest</answer>": (False, True, True),
    }
    rows = [
        make_row(index=i, success=ours, response=response)
        for i, (response, (ours, _, _)) in enumerate(responses.items())
    ]
    rules = summary.summarize(rows)["models"]["base"]["picture"]["rules"]
    for place, name in enumerate(("standard", "upstream_reward", "upstream_eval")):
        want = [flags[place] for flags in responses.values()]
        assert rules[name]["success"]["value"] == pytest.approx(np.mean(want)), name
        assert rules[name]["macro_upstream"] == pytest.approx(np.mean(want))
        assert rules[name]["tasks"] == {"maze": pytest.approx(np.mean(want))}
        ours = [flags[0] for flags in responses.values()]
        assert rules[name]["otherwise"] == sum(a != b for a, b in zip(want, ours, strict=True))


def test_the_public_rule_sets_read_a_board_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not once an answer; and the reward only where a response has a plan."""
    read: list[bool] = []

    def noted(*arguments: Any, as_record: bool) -> Any:
        read.append(as_record)
        return upstream.read_board(*arguments, as_record=as_record)

    monkeypatch.setattr(upstream_scores, "read_board", noted)
    rows = [
        make_row(index=board, attempt=attempt, response="<answer>D</answer>" if board else "")
        for board in range(2)
        for attempt in range(3)
    ]
    summary.summarize(rows)
    assert sorted(read) == [False, True, True]


def test_the_modality_gap_has_an_interval_a_p_value_and_parts() -> None:
    rows = []
    for task, seen in (("maze", 4), ("frozenlake", 10)):
        rows += series("base", "text", [True] * 14 + [False] * 6, task=task)
        rows += series("base", "picture", [True] * seen + [False] * (20 - seen), task=task)
    found = summary.summarize(rows)
    gap = known(found["modality_gap"]["base"])
    parts = {task: known(part) for task, part in found["modality_gap_by_task"]["base"].items()}
    assert gap["value"] == pytest.approx(np.mean([part["value"] for part in parts.values()]))
    assert (parts["maze"]["value"], parts["frozenlake"]["value"]) == pytest.approx((0.5, 0.2))
    assert gap["low"] < gap["value"] < gap["high"] and p_of(gap) < 0.01
    assert 0.02 < p_of(parts["frozenlake"]) < 0.3


def test_a_gap_of_no_size_is_covered_as_often_as_it_says() -> None:
    """In simulation: the paired 95 % interval holds the true difference, p < 0.05 is rare."""
    rng = np.random.default_rng(0)
    covered = significant = 0
    for _ in range(150):
        board = rng.random(40)  # how hard a board is counts for both sides
        picture, text = (rng.random(40) < board, rng.random(40) < board)
        rows = series("base", "picture", picture.tolist()) + series("base", "text", text.tolist())
        gap = summary.difference(
            [row for row in rows if row["mode"] == "text"],
            [row for row in rows if row["mode"] == "picture"],
        )
        assert gap is not None
        covered += gap["low"] <= 0 <= gap["high"]
        significant += p_of(gap) < 0.05
    assert covered >= 0.92 * 150
    assert significant <= 0.08 * 150


def test_a_server_that_counts_no_tokens_leaves_the_length_open() -> None:
    rows = series("base", "picture", [True, False])
    for row in rows:
        row["response_tokens"] = None
    part = summary.summarize(rows)["models"]["base"]["picture"]
    assert part["response_tokens"] == {"mean": None, "median": None, "max": None}
