"""A train state as orbax writes it: arrays by path, read back as a whole or in part.

States are saved as nested dicts of arrays whatever their classes are, so that a reader needs no
optimizer to get at the parameters.
"""

import contextlib
from collections.abc import Generator, Mapping

import jax
import orbax.checkpoint as ocp

from mgsd_jax import tree
from mgsd_jax.checks.fields import Json
from mgsd_jax.tree import Leaf, PyTree, Tree


class Unreadable(ValueError):
    """A complete checkpoint that orbax cannot read."""


def handlers() -> dict[str, ocp.CheckpointHandler]:
    """The orbax handlers of a checkpoint's two items."""
    return {"state": ocp.PyTreeCheckpointHandler(), "data_state": ocp.JsonCheckpointHandler()}


def named_arrays(state: PyTree) -> dict[str, Leaf]:
    """{path: leaf} in the order of `jax.tree.leaves`.

    Raises ValueError that lists the leaves that are no arrays.
    """
    named = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(state)
    }
    bad = [f"{path} ({type(x).__name__})" for path, x in named.items() if not hasattr(x, "dtype")]
    if bad:
        raise ValueError(f"state: got {', '.join(bad)}, want arrays only")
    return named


@contextlib.contextmanager
def _reading() -> Generator[None]:
    """Tells damage from misuse: wraps what orbax and tensorstore raise on unreadable files."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise Unreadable(f"{type(error).__name__}: {reason}") from error


def saved_shapes(manager: ocp.CheckpointManager, step: int) -> Tree:
    """The saved state as nested dicts of jax.ShapeDtypeStruct."""
    with _reading():
        metadata = manager.item_metadata(step)["state"]
        if metadata is None:
            raise FileNotFoundError("the state's metadata is missing")
        return tree.map_named(
            lambda _, leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), metadata.tree
        )


def restore(
    manager: ocp.CheckpointManager, step: int, target: Tree, *, with_data_state: bool = False
) -> tuple[Tree, Json]:
    """(the leaves of `target` with the saved arrays in them, the saved data state or {}).

    Arrays get the shardings of `target`; those without one come back as np.ndarray.
    """
    state = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    items = {"data_state": ocp.args.JsonRestore()} if with_data_state else {}
    with _reading():
        read = manager.restore(step, args=ocp.args.Composite(state=state, **items))
    return read["state"], read["data_state"] if with_data_state else {}


def check_same(saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf], where: str) -> None:
    """Raises ValueError that lists all paths whose shapes or dtypes differ."""

    def shown(leaf: Leaf | None) -> str:
        return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    differing = [
        f"{path}: got {shown(saved.get(path))}, want {shown(wanted.get(path))}"
        for path in sorted(saved.keys() | wanted.keys())
        if shown(saved.get(path)) != shown(wanted.get(path))
    ]
    if differing:
        raise ValueError(f"{where}: the checkpoint is of another state: {'; '.join(differing)}")
