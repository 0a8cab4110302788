"""A board that an example is made from."""

from typing import Any, NamedTuple


class Board(NamedTuple):
    """One board of a split."""

    task: str
    level: int
    index: int  # within its split, task and level
    state: Any  # of the task's env
    picture_path: str | None  # where `generate` put its picture, None for a board never written
