"""Kinds of supervised records: what a board becomes for grounding.

To add a kind, write a function like those below and add an entry to RECORDS; `grounding.mixture`
then takes its name.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mgsd_jax.checks.ranges import shown
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.data.prompts import Message, Prompts
from mgsd_jax.envs import ENVS

Draw = Callable[[Board], np.ndarray]  # the picture of a board, uint8 [H, W, 3]
Example = tuple[list[Message], str]  # the messages of a prompt, and the answer to learn


class Record(NamedTuple):
    """A kind of record: how one is made of a board, and whether its prompt shows a picture."""

    make: Callable[[Prompts, Board, Draw, np.random.Generator], Example]
    has_picture: bool


def _questions(prompts: Prompts, board: Board, draw: Draw, rng: np.random.Generator) -> Example:
    """Every question about the picture, answered."""
    return prompts_lib.grounding(prompts, board.task, board.state, draw(board))


def _cells(prompts: Prompts, board: Board, draw: Draw, rng: np.random.Generator) -> Example:
    """What every cell of the picture shows."""
    return prompts_lib.cells(board.task, board.state, draw(board))


def _plan_from_text(
    prompts: Prompts, board: Board, draw: Draw, rng: np.random.Generator
) -> Example:
    """The teacher's prompt and a right response to it."""
    messages = prompts_lib.teacher(prompts, board.task, board.state)
    return messages, right_response(prompts, board, rng)


def _plan_from_text_and_plan(
    prompts: Prompts, board: Board, draw: Draw, rng: np.random.Generator
) -> Example:
    """The prompt of a teacher that reads a plan beside the state, and the response by that plan."""
    messages = prompts_lib.teacher(prompts, board.task, board.state, "state_and_plan")
    plan = ENVS[board.task].shortest_plan(board.state)  # the one that the prompt tells
    return messages, prompts_lib.response(board.task, board.state, plan, prompts)


def _plan_from_picture(
    prompts: Prompts, board: Board, draw: Draw, rng: np.random.Generator
) -> Example:
    """The student's prompt and a right response to it."""
    messages = prompts_lib.student(prompts, board.task, draw(board))
    return messages, right_response(prompts, board, rng)


def right_response(prompts: Prompts, board: Board, rng: np.random.Generator) -> str:
    """A right response, its plan any of the shortest with equal chance."""
    plan = ENVS[board.task].random_shortest_plan(board.state, rng)
    return prompts_lib.response(board.task, board.state, plan, prompts)


def expected(prompts: Prompts, board: Board, *, is_perception: bool) -> str:
    """The response to guess when a model is asked about a board: all right, by the first plan."""
    if is_perception:
        return prompts_lib.right_answers(board.task, board.state, prompts)
    plan = ENVS[board.task].shortest_plan(board.state)
    return prompts_lib.response(board.task, board.state, plan, prompts)


RECORDS: dict[str, Record] = {
    "questions": Record(_questions, has_picture=True),
    "cells": Record(_cells, has_picture=True),
    "plan_from_text": Record(_plan_from_text, has_picture=False),
    "plan_from_text_and_plan": Record(_plan_from_text_and_plan, has_picture=False),
    "plan_from_picture": Record(_plan_from_picture, has_picture=True),
}


def check_kinds(mixture: Sequence[tuple[str, float]]) -> None:
    """Raises ValueError where a kind of `grounding.mixture` is not in RECORDS."""
    for kind, _ in mixture:
        if kind not in RECORDS:
            known = ", ".join(RECORDS)
            raise ValueError(f"grounding.mixture: got {shown(kind)}, want kinds among {known}")
