"""Open sides of cells told by rows: a line a row of the board, in an eighth of the tokens.

    (0,0): down, right
    (0,1): left                 Row 0: DR L
    (1,0): up, right     ->     Row 1: UR L
    (1,1): left

The facts are the same, and facts.py reads both forms in any answer.
"""

import dataclasses
from typing import TypeVar

from mgsd_jax.envs import base
from mgsd_jax.envs.base import Env, Question, Sized
from mgsd_jax.envs.search import Cell

State = TypeVar("State", bound=Sized)

_FORM = (
    base.SIDES_FORM[0],
    "Row number: the open sides of its cells from left to right, each as letters among U, D, L, R "
    "or none, with spaces between cells (a line for every row, like Row 0: DR L none)",
)


def by_rows(env: Env[State]) -> Env[State]:
    """The env with words for its boards that tell open sides by rows, and all else as it was.

    Raises ValueError where the form of its state lines does not end as `base.SIDES_FORM` says.
    """
    form, count = env.wording.form, len(base.SIDES_FORM)
    if form[-count:] != base.SIDES_FORM:
        raise ValueError(f"{env.name}: form: got {form}, want it to end with {base.SIDES_FORM}")

    def questions(state: State) -> tuple[Question, ...]:
        return tuple(_by_rows(question, state.size) for question in env.questions(state))

    wording = dataclasses.replace(env.wording, form=(*form[:-count], *_FORM))
    return dataclasses.replace(env, wording=wording, questions=questions)


def _by_rows(question: Question, size: int) -> Question:
    """The question, which is answered by rows if it is the one about open sides."""
    if question.kind != "open_directions":
        return question
    opened = {(cell, way) for _, cell, way in question.facts}

    def letters(cell: Cell) -> str:
        return "".join(base.MOVES[way] for way in base.MOVES if (cell, way) in opened) or "none"

    lines = (
        f"Row {row}: {' '.join(letters((row, column)) for column in range(size))}"
        for row in range(size)
    )
    return dataclasses.replace(question, kind="open_rows", answer="\n".join(lines))
