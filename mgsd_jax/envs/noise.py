"""States with wrong facts in them, for asking what becomes of a reader who is told them.

A fact is the place of a thing (player, goal, agent, printer, table, each hole) or, in a maze,
whether two neighbouring cells are connected. A thing that is misplaced stands on free floor.
"""

from typing import TypeVar

import numpy as np

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import Sized

State = TypeVar("State", bound=Sized)
_DRAWS = 1000


def disturb(task: str, state: State, rng: np.random.Generator, share: float) -> State:
    """The state with each fact wrong with chance `share`, drawn again until it is solvable.

    Nothing is drawn at share 0. Raises ValueError where none of a thousand draws can be solved.
    """
    if not 0.0 <= share <= 1.0:
        raise ValueError(f"share: got {share}, want 0 to 1")
    if share == 0.0:
        return state
    env = ENVS[task]
    for _ in range(_DRAWS):
        wrong = env.disturb(state, rng, share)
        paths = env.paths(wrong)
        if paths.distances[paths.start] >= 0:
            return wrong
    raise ValueError(f"share: got {share}, which left none of {_DRAWS} draws of {task} solvable")
