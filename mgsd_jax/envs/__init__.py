"""The three planning tasks, by name. Each env is a plain module; `base.Env` says what it offers."""

from mgsd_jax.envs import frozenlake, maze, minibehaviour
from mgsd_jax.envs.base import Env

ENVS: dict[str, Env] = {
    "frozenlake": frozenlake,
    "maze": maze,
    "minibehaviour": minibehaviour,
}
