"""States with wrong facts in them, for asking what becomes of a reader who is told them.

A fact is the place of a thing (player, goal, agent, printer, table, each hole) or, in a maze,
whether two neighbouring cells are connected. A thing that is misplaced stands on free floor.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import numpy as np

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import Cell
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState

_DRAWS = 1000
_EAST, _WEST, _SOUTH, _NORTH = 8, 4, 2, 1  # walls of a maze's cells


def disturb(task: str, state: Any, rng: np.random.Generator, share: float) -> Any:
    """The state with each of its facts wrong with chance `share`, drawn anew until it is solvable.

    Nothing is drawn at share 0. Raises ValueError where none of a thousand draws can be solved.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: got {share}, want 0 to 1")
    if share == 0.0:
        return state
    for _ in range(_DRAWS):
        wrong = _DISTURBED[task](state, rng, share)
        try:
            ENVS[task].shortest_plan(wrong)
        except ValueError:
            continue  # no way to the goal
        return wrong
    raise ValueError(f"share: got {share}, which left none of {_DRAWS} draws of {task} solvable")


def _frozenlake(state: FrozenLakeState, rng: np.random.Generator, share: float) -> FrozenLakeState:
    tiles = list("".join(state.rows))
    for place, tile in enumerate("".join(state.rows)):
        if tile != "F" and rng.random() < share:
            floor = [i for i, other in enumerate(tiles) if other == "F"]
            if floor:
                tiles[place], tiles[floor[rng.integers(len(floor))]] = "F", tile
    size = state.size
    return FrozenLakeState(tuple("".join(tiles[i : i + size]) for i in range(0, size * size, size)))


def _maze(state: MazeState, rng: np.random.Generator, share: float) -> MazeState:
    walls = np.array(state.walls)
    below, right = (
        rng.random((state.size - 1, state.size)),
        rng.random((state.size, state.size - 1)),
    )
    below, right = below < share, right < share
    walls[:-1] ^= _SOUTH * below
    walls[1:] ^= _NORTH * below
    walls[:, :-1] ^= _EAST * right
    walls[:, 1:] ^= _WEST * right
    start = _move(state.start, [state.target], state.size, rng, share)
    target = _move(state.target, [start], state.size, rng, share)
    return MazeState(tuple(tuple(map(int, row)) for row in walls), start, target)


def _minibehaviour(
    state: MiniBehaviourState, rng: np.random.Generator, share: float
) -> MiniBehaviourState:
    table = state.table
    if rng.random() < share:
        (top, left), (bottom, right) = table[0], table[-1]
        height, width = bottom - top + 1, right - left + 1
        corners = [
            (row, column)
            for row in range(state.size - height + 1)
            for column in range(state.size - width + 1)
            if (row, column) != (top, left)
        ]
        if corners:
            row, column = corners[rng.integers(len(corners))]
            table = tuple((r - top + row, c - left + column) for r, c in table)
    # What stands where the table is now has to move.
    agent, printer = (
        _move(cell, [*table, other], state.size, rng, 1.0 if cell in table else share)
        for cell, other in ((state.agent, state.printer), (state.printer, state.agent))
    )
    if agent == printer:
        printer = _move(printer, [*table, agent], state.size, rng, 1.0)
    return dataclasses.replace(state, agent=agent, printer=printer, table=table)


def _move(cell: Cell, taken: list[Cell], size: int, rng: np.random.Generator, share: float) -> Cell:
    """The cell, or with chance `share` another one that is not taken."""
    if rng.random() >= share:
        return cell
    cells = [(row, column) for row in range(size) for column in range(size)]
    free = [other for other in cells if other != cell and other not in taken]
    return free[rng.integers(len(free))] if free else cell


_DISTURBED: dict[str, Callable[..., Any]] = {
    "frozenlake": _frozenlake,
    "maze": _maze,
    "minibehaviour": _minibehaviour,
}
