"""Scoring of answers, token groups, and the choice of boards."""

import json
import pathlib
import typing
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import mgsd_jax
from mgsd_jax.checks import fields
from mgsd_jax.config import Mode
from mgsd_jax.data import prompts, segments
from mgsd_jax.data.boards import Board
from mgsd_jax.data.processor import encode_answer, load_processor
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import rows, scoring
from mgsd_jax.evaluation.summary import summarize
from mgsd_jax.sampling import answers
from mgsd_jax.training import monitor

BASE = pathlib.Path(mgsd_jax.__file__).parent / "assets" / "nano_base"


def make_boards(count: int = 6) -> list[Board]:
    rng = np.random.default_rng(0)
    return [
        Board(task, level, i, ENVS[task].generate(rng, level), None)
        for task, level in (("frozenlake", 4), ("maze", 3), ("minibehaviour", 5))
        for i in range(count)
    ]


@pytest.mark.parametrize("board", make_boards(2), ids=lambda board: f"{board.task}{board.index}")
def test_a_right_answer_is_right_in_every_measure(board: Board) -> None:
    env = ENVS[board.task]
    text = prompts.response(board.task, board.state, env.shortest_plan(board.state))
    score = scoring.score_plan(board, text)
    assert score["outcome"]["success"] and score["outcome"]["optimal"]
    assert score["state_f1"] == 1.0 and score["state_exact"]
    assert score.get("plan_given_own_state") is True
    assert env.key(env.from_text(rows.board_text(board), source="row")) == env.key(board.state)
    picture = np.zeros((64, 64, 3), np.uint8)
    _, answer = prompts.grounding(prompts.BUILT_IN, board.task, board.state, picture)
    assert all(scoring.score_perception(board, answer)["perception"].values())


def test_another_boards_answer_is_wrong_but_true_to_itself() -> None:
    first, second = make_boards()[:2]
    text = prompts.response(
        second.task, second.state, ENVS[second.task].shortest_plan(second.state)
    )
    score = scoring.score_plan(first, text)
    assert not score["state_exact"] and 0.0 < (score["state_f1"] or 0.0) < 1.0
    assert score.get("plan_given_own_state")


def test_a_row_has_the_keys_of_its_type_and_the_answer_in_them() -> None:
    """What is written is what is read: the types of rows.py are checked against it."""
    board = make_boards(1)[0]
    kinds: dict[Mode, type] = {"picture": rows.PlanRow, "perception": rows.PerceptionRow}
    common = {"model": "base", "attempt": 2, "task": board.task, "level": 4, "index": 0}
    for answer in (
        scoring.Answer("<answer>U</answer>", True, None),
        scoring.Answer("", False, 3, "timeout"),
    ):
        for mode, kind in kinds.items():
            row = scoring.score_row(board, mode, answer, model="base", attempt=2)
            assert json.loads(json.dumps(row)) == row
            assert row.items() >= (common | {"mode": mode, "response": answer.text}).items()
            assert (row["truncated"], row["response_tokens"]) == (answer.truncated, answer.tokens)
            assert row.get("error") == answer.error
            fields.check_record(row | {"task_text": rows.board_text(board)}, kind, "row")
            assert set(row) <= {*typing.get_type_hints(kind), "truncated", "response_tokens"}


def test_a_blind_student_sees_another_board_of_its_level() -> None:
    boards = make_boards()
    others = answers.misleading(boards)
    assert sorted(map(id, others)) == sorted(map(id, boards))
    for board, other in zip(boards, others, strict=True):
        assert (board.task, board.level) == (other.task, other.level) and board is not other
    with pytest.raises(ValueError, match="got one board of frozenlake level 4"):
        answers.misleading(boards[:1])


def test_spread_takes_every_level_in_turn() -> None:
    chosen = monitor.spread(make_boards(), 7)
    assert [board.task for board in chosen[:3]] == ["frozenlake", "maze", "minibehaviour"]
    assert [board.index for board in chosen] == [0, 0, 0, 1, 1, 1, 2]


def test_token_groups_of_a_response() -> None:
    processor = load_processor(BASE)
    board = make_boards()[0]
    plan = ENVS[board.task].shortest_plan(board.state)
    tokens = encode_answer(processor, prompts.response(board.task, board.state, plan))
    padded = np.zeros((1, len(tokens) + 3), np.int32)
    padded[0, : len(tokens)] = tokens
    valid = np.arange(padded.shape[1])[None] < len(tokens)
    groups = segments.segments(processor, padded, valid)[0]
    names = [prompts.SEGMENTS[g] for g in groups[: len(tokens)]]
    assert (groups[len(tokens) :] == -1).all()
    assert names[0] == "state" and names[-1] == "format", "the end token is format"
    assert names.count("plan") == len(plan)
    assert names.count("sentence") >= len(plan) + 1
    order = [name for i, name in enumerate(names) if i == 0 or name != names[i - 1]]
    assert order[:2] == ["state", "sentence"]


def test_validation_is_the_measure_of_an_evaluation_in_all_and_by_task() -> None:
    """Two levels of a lake with unlike numbers of boards, and a maze."""
    small = ENVS["frozenlake"].generate(np.random.default_rng(1), 3)
    boards = [*make_boards(3)[:5], Board("frozenlake", 3, 0, small, None)]
    texts = [prompts.response(b.task, b.state, ENVS[b.task].shortest_plan(b.state)) for b in boards]
    given = [scoring.Answer(text, False, 1) for text in ["", *texts[1:4], "", ""]]
    asked = [
        scoring.score_row(board, "picture", answer, model="m")
        | {"task_text": rows.board_text(board)}
        for board, answer in zip(boards, given, strict=True)
    ]
    part = summarize(typing.cast(Any, asked))["models"]["m"]["picture"]
    measured = monitor.validation_metrics(boards, given)
    assert measured["val/success"].value == pytest.approx(part["macro"]["value"]) == 5 / 12
    assert measured["val/state_exact"].value == pytest.approx(part["state_exact"]["value"])
    for task in ("frozenlake", "maze"):
        mean = part["tasks"][task]["level_mean"]["value"]
        assert measured[f"val/success/{task}"].value == pytest.approx(mean)
    assert len(measured) == 6  # too few boards for a mean by kind of fact
    # Four times as many: each kind is the measure of the summary, whose boards must differ.
    measured = monitor.validation_metrics(boards * 4, given * 4)
    assert len(measured) == 6 + 4 + 4
    for task in ("frozenlake", "maze"):
        for kind, found in part["tasks"][task]["state_f1_by_kind"].items():
            assert measured[f"val/state_f1/{task}/{kind}"].value == pytest.approx(found["value"])


def test_token_metrics_add_up_over_groups_and_over_positions() -> None:
    """Every token counts in one group and one range of positions, with its own KL and agreement."""
    processor = load_processor(BASE)
    board = make_boards()[0]
    text = prompts.response(board.task, board.state, ENVS[board.task].shortest_plan(board.state))
    tokens = np.array([encode_answer(processor, text)] * 2, np.int32)
    mask = np.ones(tokens.shape, np.float32)
    mask[1, tokens.shape[1] // 2 :] = 0
    rng = np.random.default_rng(0)
    kl, agree = rng.random(tokens.shape), (rng.random(tokens.shape) < 0.5).astype(np.float32)
    zeros = np.zeros_like(kl)
    stats: Any = SimpleNamespace(
        kl=kl, top1_agree=agree, student_entropy=zeros, teacher_entropy=zeros, clipped=zeros
    )
    groups = segments.segments(processor, tokens, mask > 0)
    found = monitor.token_metrics(groups, stats)
    for values, name in ((kl, "kl"), (agree, "agree")):
        for kind in (f"{name}/", f"{name}_pos/"):
            parts = [mean for key, mean in found.items() if key.startswith(kind)]
            assert sum(part.weight for part in parts) == mask.sum()
            assert sum(part.sum for part in parts) == pytest.approx(float((values * mask).sum()))
    assert "kl_pos/256-" not in found, "what no token is in is no zero"
    assert found["kl_pos/0-3"].sum == pytest.approx(kl[:, :4].sum())
    assert found["teacher_agreement"].value == pytest.approx((agree * mask).sum() / mask.sum())
