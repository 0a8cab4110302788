"""The planning tasks, by name. To add one, write its module and put it in the list below."""

from typing import Any

from mgsd_jax.envs import frozenlake, maze, minibehaviour, sokoban
from mgsd_jax.envs.base import Env
from mgsd_jax.envs.by_rows import by_rows

# Each env has a state of its own type, which only its own functions look into.
AnyState = Any
ENVS: dict[str, Env[AnyState]] = {
    env.name: env
    for env in (
        frozenlake.ENV,
        maze.ENV,
        minibehaviour.ENV,
        sokoban.ENV,
    )
}
# The envs with open sides, in the words of data.state_text=rows; the others have one form.
BY_ROWS = {name: by_rows(env) for name, env in ENVS.items() if env.has_sides}


def find(task: str) -> Env[AnyState]:
    """The env of a task; raises ValueError for a task that is not known."""
    if task not in ENVS:
        raise ValueError(f"task: got {task!r}, want one of {sorted(ENVS)}")
    return ENVS[task]
