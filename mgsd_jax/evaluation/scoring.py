"""The score of one answer: its plan, the state it describes, its answers to questions.

A score is part of a row, hence a typed dict; rows.py has the whole row.
"""

import dataclasses
from typing import NotRequired, TypedDict

from mgsd_jax.config import Mode
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS, facts
from mgsd_jax.evaluation import perception, rules


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model answered to one prompt."""

    text: str
    truncated: bool
    tokens: int | None  # None where an endpoint does not count them
    error: str | None = None  # why there is no answer
    ids: tuple[int, ...] = ()  # the tokens themselves, of a model at hand


class OutcomeRecord(TypedDict):
    """The fields of `envs.base.Outcome`."""

    success: bool
    optimal: bool
    parsed: bool
    legal: bool
    reason: str | None
    steps: int
    progress: float | int


class PlanScore(TypedDict):
    """The score of an answer that was asked for a plan."""

    outcome: OutcomeRecord
    plan: list[str]
    state_f1: float | int | None
    state_exact: bool | None
    # Of the facts of each kind ('hole', ...). Absent in older rows, as are the next two.
    state_f1_by_kind: NotRequired[dict[str, float | int] | None]
    contradicted: NotRequired[list[str]]
    plan_given_own_state: NotRequired[bool | None]  # success on the board that the answer describes


class PerceptionScore(TypedDict):
    """Which of a board's questions were answered right, by the name of the question."""

    perception: dict[str, bool]
    perception_strict: NotRequired[dict[str, bool]]  # in exactly the asked form; absent in old rows


def score_plan(board: Board, response: str) -> PlanScore:
    """Plays the plan of a response on its board, and compares the state that it describes."""
    stated = facts.read_facts(board.task, response)
    own_state = facts.state_from_facts(board.task, stated)
    parsed = rules.parse_plan(response, board.task)
    outcome = rules.play(board.state, board.task, parsed)
    return PlanScore(
        outcome=OutcomeRecord(**dataclasses.asdict(outcome)),
        plan=list(parsed.plan),
        **facts.measure(board.task, board.state, stated),
        plan_given_own_state=(
            own_state is not None and rules.play(own_state, board.task, parsed).success
        ),
    )


def score_perception(board: Board, response: str) -> PerceptionScore:
    """Compares the numbered answers of a response with the true answers."""
    questions = ENVS[board.task].questions(board.state)
    answers = perception.read_numbered(response, len(questions))
    given = [(q, answers.get(i, "")) for i, q in enumerate(questions, 1)]
    return PerceptionScore(
        perception={q.name: perception.is_right(q, answer) for q, answer in given},
        perception_strict={q.name: answer == q.answer.strip() for q, answer in given},
    )


def score_row(
    board: Board, mode: Mode, answer: Answer, *, model: str, attempt: int = 0
) -> dict[str, object]:
    """The line of `rows.jsonl` for one answer: `rows.read_rows` returns it typed."""
    score = score_perception if mode == "perception" else score_plan
    row: dict[str, object] = {
        "model": model,
        "attempt": attempt,
        "id": f"{board.task}/{board.level}/{board.index}/{mode}",
        "mode": mode,
        "task": board.task,
        "level": board.level,
        "index": board.index,
        "response": answer.text,
        **score(board, answer.text),
        "truncated": answer.truncated,
        "response_tokens": answer.tokens,
    }
    return row if answer.error is None else row | {"error": answer.error}
