"""The train state as orbax items: arrays by path, read back whole or in part.

States are saved as nested dicts of arrays whatever their classes are, so that a reader needs no
optimizer to get at the parameters.
"""

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import orbax.checkpoint as ocp

from mgsd_jax import tree

PyTree = Any
Leaf = Any  # an array, or a jax.ShapeDtypeStruct: shape, dtype, and perhaps sharding


class Unreadable(ValueError):
    """A complete checkpoint that orbax cannot read."""


def handlers() -> dict[str, Any]:
    """The orbax handlers of a checkpoint's three items."""
    return {
        "state": ocp.PyTreeCheckpointHandler(),
        "data_state": ocp.JsonCheckpointHandler(),
        "meta": ocp.JsonCheckpointHandler(),
    }


def named_arrays(state: PyTree) -> list[tuple[str, Leaf]]:
    """[(path, leaf)] in the order of `jax.tree.leaves`, over dicts, tuples and dataclasses.

    Raises ValueError that lists the leaves that are no arrays.
    """
    named = [
        (jax.tree_util.keystr(path, simple=True, separator="/"), leaf)
        for path, leaf in jax.tree_util.tree_flatten_with_path(state)[0]
    ]
    bad = [f"{path} ({type(leaf).__name__})" for path, leaf in named if not hasattr(leaf, "dtype")]
    if bad:
        raise ValueError(f"state: got {', '.join(bad)}, want arrays only")
    return named


@contextlib.contextmanager
def _reading() -> Iterator[None]:
    """Tells damage from misuse: wraps what orbax and tensorstore raise on unreadable files."""
    try:
        yield
    except (ValueError, KeyError, OSError) as error:
        reason = str(error).partition("\n")[0][:300]
        raise Unreadable(f"{type(error).__name__}: {reason}") from error


def _saved_leaves(manager: ocp.CheckpointManager, step: int) -> dict[str, jax.ShapeDtypeStruct]:
    """{path: shape and dtype} of a saved state."""
    with _reading():
        metadata = manager.item_metadata(step)["state"]
        if metadata is None:
            raise FileNotFoundError("the state's metadata is missing")
        return {
            path: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
            for path, leaf in tree.named_leaves(metadata.tree)
        }


def read_items(
    manager: ocp.CheckpointManager, step: int, wanted: dict[str, Leaf], json_items: Sequence[str]
) -> Any:
    """Return a step's items by name: `state` as nested dicts of arrays, `json_items` as saved.

    `wanted` is {path: leaf} of the whole state. Raises Unreadable, or ValueError that lists the
    differences where the saved state has other paths, shapes or dtypes.
    """
    where = f"{manager.directory}, step {step}"
    _check_same(_saved_leaves(manager, step), wanted, where)
    return _restore(manager, step, wanted, json_items)


def read_field(
    manager: ocp.CheckpointManager, step: int, abstract: PyTree | None, field: str
) -> PyTree:
    """Return one field of a step's state, like `abstract` or as nested dicts of np.ndarray.

    `abstract` may be a function of the field's own shapes, nested dicts that it gives shardings.
    Raises Unreadable, or ValueError where there is no such field or it differs from `abstract`.
    """
    where = f"{manager.directory}, step {step}"
    leaves = _saved_leaves(manager, step)
    saved = {path: leaf for path, leaf in leaves.items() if f"{path}/".startswith(f"{field}/")}
    if not saved:
        there = sorted({path.partition("/")[0] for path in leaves})
        raise ValueError(f"{where}: got the fields {there}, want {field!r}")
    if abstract is None:
        return _restore(manager, step, saved, ())["state"][field]
    if callable(abstract):
        abstract = abstract(tree.get(tree.nest(saved.items()), field))
    wanted = [(f"{field}/{path}".rstrip("/"), leaf) for path, leaf in named_arrays(abstract)]
    _check_same(saved, dict(wanted), where)
    arrays = dict(tree.named_leaves(_restore(manager, step, dict(wanted), ())["state"]))
    return jax.tree.unflatten(jax.tree.structure(abstract), [arrays[path] for path, _ in wanted])


def _restore(
    manager: ocp.CheckpointManager, step: int, wanted: dict[str, Leaf], json_items: Sequence[str]
) -> Any:
    target = tree.nest(wanted.items())
    state = ocp.args.PyTreeRestore(
        target,
        restore_args=ocp.checkpoint_utils.construct_restore_args(target),
        partial_restore=True,
    )
    items = {name: ocp.args.JsonRestore() for name in json_items}
    with _reading():
        return manager.restore(step, args=ocp.args.Composite(state=state, **items))


def _check_same(saved: Mapping[str, Leaf], wanted: Mapping[str, Leaf], where: str) -> None:
    def shown(leaf: Leaf | None) -> str:
        return "nothing" if leaf is None else f"{leaf.dtype}{list(leaf.shape)}"

    differing = [
        f"{path}: got {shown(saved.get(path))}, want {shown(wanted.get(path))}"
        for path in sorted(saved.keys() | wanted.keys())
        if shown(saved.get(path)) != shown(wanted.get(path))
    ]
    if differing:
        raise ValueError(f"{where}: the checkpoint is of another state: {'; '.join(differing)}")
