"""Batches on the mesh: rows split over its devices, and the way from the host and back.

Every process loads its own share of the rows. A mesh of None stands for one device, where a batch
stays as it is. Axes: B batch, T tokens.
"""

import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath

from mgsd_jax.parallel import axes
from mgsd_jax.parallel.axes import BATCH
from mgsd_jax.tree import PyTree

Batch = TypeVar("Batch")  # a pytree of arrays with a batch axis, and of scalars

# Batches have B first, except for these fields: M-RoPE positions are [3, B, T].
BATCH_AXES = {"positions": 1}


def check_batch(mesh: Mesh | None, name: str, rows: int, microbatches: int = 1) -> None:
    """Raises ValueError unless every microbatch of `rows` can be split over the mesh."""
    want = axes.parts(mesh, BATCH) * microbatches
    if rows % want:
        raise ValueError(
            f"{name}: got {rows} rows, want a multiple of {want}: {microbatches} microbatches of "
            f"rows split over {axes.parts(mesh, BATCH)} (data * fsdp)"
        )


def shardings(batch: PyTree, mesh: Mesh) -> PyTree:
    """A NamedSharding for each leaf: rows over 'data' and 'fsdp', scalars replicated."""

    def place(path: KeyPath, leaf: jax.Array) -> NamedSharding:
        return NamedSharding(mesh, _batch_spec(path, leaf))

    return jax.tree_util.tree_map_with_path(place, batch)


def constrain(batch: Batch, mesh: Mesh | None) -> Batch:
    """Inside a program: a batch, or a microbatch of one, held to `shardings`."""
    if mesh is None:
        return batch

    def hold(path: KeyPath, leaf: jax.Array) -> PyTree:
        return axes.constrain(jnp.asarray(leaf), mesh, *_batch_spec(path, leaf))

    return jax.tree_util.tree_map_with_path(hold, batch)


def to_global(batch: Batch, mesh: Mesh | None, *, is_whole: bool = False) -> Batch:
    """A host batch as global arrays whose batch axis is split over 'data' and 'fsdp'.

    Every process passes the rows of its `process_share`, or all rows where `is_whole`; scalars are
    replicated. Raises ValueError where the rows of all processes together do not divide.
    """
    if mesh is None:
        return batch
    parts, (share, count) = axes.parts(mesh, BATCH), process_share(mesh)

    def place(path: KeyPath, leaf: jax.Array) -> jax.Array:
        value = np.asarray(leaf)
        spec = _batch_spec(path, value)
        if value.ndim == 0:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), value)
        name, axis = _batch_axis(path)
        if is_whole:
            value = np.split(value, count, axis)[share]
        rows = value.shape[axis] * count
        if rows % parts:
            raise ValueError(
                f"batch {name}: got {rows} rows (shape {list(value.shape)} in each of "
                f"{count} shares), want a multiple of {parts} (data * fsdp)"
            )
        shape = (*value.shape[:axis], rows, *value.shape[axis + 1 :])
        return jax.make_array_from_process_local_data(NamedSharding(mesh, spec), value, shape)

    return jax.tree_util.tree_map_with_path(place, batch)


def move(batch: Batch, mesh: Mesh | None) -> Batch:
    """A global batch of another mesh over the same devices; what lies as here already stays."""
    return batch if mesh is None else jax.device_put(batch, shardings(batch, mesh))


def to_local(batch: PyTree) -> PyTree:
    """The rows of this process as numpy arrays, in their order: the inverse of `to_global`."""

    def fetch(path: KeyPath, leaf: jax.Array) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.ndim == 0:
            return np.asarray(leaf)
        axis = _batch_axis(path)[1]
        # Devices that hold the same rows (along 'tensor') count once.
        shards = {shard.index[axis].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)], axis)

    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(batch)):
        return jax.device_get(batch)
    return jax.tree_util.tree_map_with_path(fetch, batch)


def to_every(batch: PyTree, mesh: Mesh | None) -> PyTree:
    """All rows as numpy arrays, in every process."""
    return jax.device_get(batch if mesh is None else _copied(mesh)(batch))


def make_key(seed: int, mesh: Mesh | None) -> jax.Array:
    """`jax.random.key(seed)` as an array of all devices."""
    if mesh is None:
        return jax.random.key(seed)
    return jax.jit(lambda: jax.random.key(seed), out_shardings=NamedSharding(mesh, P()))()


@functools.cache
def _copied(mesh: Mesh) -> Callable[[PyTree], PyTree]:
    return jax.jit(lambda values: values, out_shardings=NamedSharding(mesh, P()))


def process_share(mesh: Mesh | None) -> tuple[int, int]:
    """(index of the share of a batch's rows that this process reads, number of shares).

    Processes whose devices differ only along 'tensor' read the same rows. Raises ValueError where
    the processes do not hold equal runs of rows.
    """
    if mesh is None:
        return 0, 1
    rows: dict[int, set[int]] = {}
    grid = mesh.devices.reshape(axes.parts(mesh, BATCH), -1)
    for row, devices in enumerate(grid):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    shares = sorted({tuple(sorted(found)) for found in rows.values()})
    width = len(shares[0])
    if shares != [tuple(range(i * width, (i + 1) * width)) for i in range(len(shares))]:
        raise ValueError(
            f"mesh {dict(mesh.shape)}: got processes with the row blocks {shares}, want equal runs "
            "without overlap; choose mesh.tensor so that it fits the devices of a process"
        )
    mine = rows.get(jax.process_index())
    return (0 if mine is None else shares.index(tuple(sorted(mine)))), len(shares)


def _batch_axis(path: KeyPath) -> tuple[str, int]:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name, BATCH_AXES.get(name, 0)


def _batch_spec(path: KeyPath, leaf: jax.Array | np.ndarray) -> P:
    return P() if np.ndim(leaf) == 0 else P(*[None] * _batch_axis(path)[1], BATCH)
