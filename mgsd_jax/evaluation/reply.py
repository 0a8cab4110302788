"""What an answer says of a picture whose board nobody knows, and how far it can be believed."""

import dataclasses
from collections.abc import Callable, Iterable
from typing import cast

import numpy as np
from PIL import Image

from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS, facts
from mgsd_jax.envs.search import Cell, grid_cells
from mgsd_jax.evaluation.rows import PlanRow
from mgsd_jax.evaluation.scoring import Answer, score_row

# Mean difference of the pixels of a cell, of 255, above which two pictures show different things.
# One wall of a maze more or less makes 9.7. Pictures that show the same differ by 0, by up to 8
# where one of them was resized.
SAME = 9.0
_PIXELS = 4  # a side of a cell when it is compared, so that edges need not meet to the pixel
_USUAL = 256  # pixels a side of public boards


@dataclasses.dataclass(frozen=True)
class Reply:
    """An answer about a picture. Without a task it answers a free question and states no board."""

    task: str
    answer: Answer
    size: int  # of the square that the model saw, in pixels
    board: Board | None = None  # that the answer states
    row: PlanRow | None = None  # the answer's score on this board
    problem: str = ""  # why there is no board
    unlike: tuple[Cell, ...] = ()  # cells of the board that look otherwise in the picture

    @property
    def is_doubtful(self) -> bool:
        """Whether the picture shows less than half of the board, or none of its things."""
        if self.board is None:
            return True
        env, state = ENVS[self.task], self.board.state
        things = {fact[1] for fact in env.facts(state) if fact[0] in env.labels}
        return things <= set(self.unlike) or 2 * len(self.unlike) > state.size**2


def read(
    task: str,
    answer: Answer,
    size: int,
    picture: np.ndarray,
    draw: Callable[[Board, int], np.ndarray],
) -> Reply:
    """The reply that an answer makes about a picture, uint8 [S, S, 3], shown with `size` pixels.

    `draw` draws a board with so many pixels a side.
    """
    try:
        state = facts.stated_board(task, facts.read_facts(task, answer.text))
    except ValueError as error:
        return Reply(task, answer, size, problem=str(error))
    if ENVS[task].play(state, ()).success:
        return Reply(task, answer, size, problem="it is solved before the first action")
    board = Board(task, state.size, 0, state, None)
    row = cast(PlanRow, score_row(board, "picture", answer, model=""))
    least = 8 * board.level  # below it no board is drawn
    sizes = {max(side, least) for side in (len(picture), size, _USUAL)}
    drawn = [draw(board, side) for side in sizes]
    return Reply(task, answer, size, board, row, unlike=differing(picture, drawn, board.level))


def differing(picture: np.ndarray, drawn: Iterable[np.ndarray], level: int) -> tuple[Cell, ...]:
    """The cells in which a picture of a board differs from all others, each uint8 [S, S, 3]."""

    def small(pixels: np.ndarray) -> np.ndarray:
        side = level * _PIXELS
        resized = Image.fromarray(pixels).resize((side, side), Image.Resampling.BOX)
        return np.asarray(resized).astype(np.int16)

    seen = small(picture)
    gaps = np.min([np.abs(seen - small(other)).mean(-1) for other in drawn], axis=0)
    gaps = gaps.reshape(level, _PIXELS, level, _PIXELS).mean((1, 3))
    return tuple(cell for cell in grid_cells(level) if gaps[cell] > SAME)


def most_likely(replies: Iterable[Reply]) -> Reply:
    """The reply whose board the picture shows in the largest share of its cells."""

    def likeness(reply: Reply) -> tuple[float, bool]:
        if reply.board is None or reply.row is None:
            return -1.0, False
        share = 1 - len(reply.unlike) / reply.board.level**2
        return share, reply.row["outcome"]["success"]

    return max(replies, key=likeness)
