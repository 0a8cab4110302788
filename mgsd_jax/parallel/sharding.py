"""Where parameters, optimiser state and batches lie on the mesh, and the change between layouts.

Two tables say it all: training splits parameters over 'fsdp' and 'tensor', rollouts over 'tensor'
alone. The axes themselves are described in `axes.py`. Every function takes a mesh of None for one
device and then leaves everything where it is.
Parameter axes: L layers of a stack, in and out of a kernel, V vocabulary, D width.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsd_jax import tree
from mgsd_jax.config import MeshConfig
from mgsd_jax.parallel import axes
from mgsd_jax.parallel.axes import AXES, BATCH

Batch = TypeVar("Batch")
Rules = Sequence[tuple[str, P]]

# Batches have B first, but for the fields here: M-RoPE positions are [3, B, T].
BATCH_AXES = {"positions": 1}

# First match wins. The first kernel of a pair splits its outputs over 'tensor', the second one its
# inputs, so that a pair needs one reduction. Norms, biases and adapter scales are small: copied.
# Tables are split over the vocabulary, which is how the fused losses read them (`fused_head.py`).
TRAIN_RULES: Rules = (
    (r"/(scale|bias)$", P()),
    (r"(embed_tokens|lm_head)/embedding$", P(axes.MODEL)),  # [V, D]
    (r"\bvisual/(pos_embed/embedding|patch_embed/kernel)$", P(None, "fsdp")),
    (r"\bvisual/merger/linear_fc1/kernel$", P("fsdp", "tensor")),  # [in, out]: not stacked
    (r"\bvisual/merger/linear_fc2/kernel$", P("tensor", "fsdp")),
    (r"\bvisual/merger/\w+/[ab]$", P()),
    (
        r"/(q_proj|k_proj|v_proj|gate_proj|up_proj|qkv|linear_fc1)/kernel$",
        P(None, "fsdp", "tensor"),
    ),
    (r"/(o_proj|down_proj|proj|linear_fc2)/kernel$", P(None, "tensor", "fsdp")),  # [L, in, out]
    (r"/a$", P(None, "fsdp")),  # [L, in, rank]
    (r"/b$", P(None, None, "fsdp")),  # [L, rank, out]
)

# Decoding reads every weight for every token, so nothing is split over 'fsdp': a weight would have
# to be gathered each time. 'data' and 'fsdp' hold other rows of the batch, and of the cache.
ROLLOUT_RULES: Rules = (
    (r"/(scale|bias|a|b)$", P()),
    (r"(embed_tokens|lm_head)/embedding$", P("tensor")),
    (r"\bvisual/(pos_embed/embedding|patch_embed/kernel)$", P()),
    (r"\bvisual/merger/linear_fc1/kernel$", P(None, "tensor")),
    (r"\bvisual/merger/linear_fc2/kernel$", P("tensor")),
    (r"/(q_proj|k_proj|v_proj|gate_proj|up_proj|qkv|linear_fc1)/kernel$", P(None, None, "tensor")),
    (r"/(o_proj|down_proj|proj|linear_fc2)/kernel$", P(None, "tensor")),
)

# As many chips hold the weights of one copy for decoding, where nothing else is asked for.
_USUAL_TENSOR = 4

# Read in float32 whatever the model computes in; all else is cast where it is read.
_READ_IN_FLOAT32 = ((r"\bvisual/(.*norm\d?/(scale|bias)|pos_embed/embedding)$", True), ("", False))


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return the mesh ('data', 'fsdp', 'tensor') over `devices`, by default all there are.

    A size of -1 is whatever the others leave. Where 'fsdp' and 'tensor' both are -1, 'tensor' is
    the greatest common divisor of that and `_USUAL_TENSOR`, 'fsdp' the rest. The axes are Auto
    (`jax.make_mesh` alone would make them Explicit). Raises ValueError where the sizes do not
    multiply to the devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = [data, fsdp, tensor]
    wrong = ValueError(
        f"mesh {dict(zip(AXES, sizes, strict=True))}: want sizes of at least 1 that multiply to "
        f"{count} devices; fsdp=-1 and tensor=-1 fit themselves to the devices"
    )
    if fsdp == tensor == -1 and data > 0:
        sizes[2] = tensor = math.gcd(count // data, _USUAL_TENSOR)
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise wrong
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != count:
        raise wrong
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def open_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh | None:
    """The mesh of a run, or None where it has one device; raises as `make_mesh` does."""
    mesh = make_mesh(data=config.data, fsdp=config.fsdp, tensor=config.tensor, devices=devices)
    if config.tensor == -1:
        shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        logging.info("mesh: %s for %d devices (mesh.tensor=-1 fits itself)", shape, mesh.size)
    return None if mesh.size == 1 else mesh


def check_batch(mesh: Mesh | None, name: str, rows: int, microbatches: int = 1) -> None:
    """Raise ValueError where `rows` cannot be split over the mesh, each microbatch of them."""
    want = axes.parts(mesh, BATCH) * microbatches
    if rows % want:
        raise ValueError(
            f"{name}: got {rows} rows, want a multiple of {want}: {microbatches} microbatches of "
            f"rows split over {axes.parts(mesh, BATCH)} (mesh.data * mesh.fsdp)"
        )


# ------------------------------------------------------------------------------------- parameters


def param_shardings(params: tree.Tree, mesh: Mesh, rules: Rules = TRAIN_RULES) -> tree.Tree:
    """Return a NamedSharding for each leaf of parameters or adapters, which may be abstract.

    A dimension that its mesh axes do not divide keeps those that do (`axes.fit`) and is copied
    over the others. Raises ValueError for a path that no rule matches, and one that lists every
    leaf of fewer dimensions than its rule.
    """
    problems: list[str] = []

    def place(path: str, leaf: Any) -> NamedSharding:
        try:
            return NamedSharding(mesh, axes.fit(tree.match(rules, path), leaf.shape, mesh))
        except ValueError as error:
            if "no rule matches" in str(error):
                raise
            problems.append(f"{path}: {error}")
            return NamedSharding(mesh, P())

    shardings = tree.map_named(place, params)
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"parameters do not fit the rules:\n  {listed}")
    return shardings


def state_shardings(state: Any, mesh: Mesh, rules: Rules = TRAIN_RULES) -> Any:
    """Return a NamedSharding for each leaf of a train state: moments lie as their parameters do.

    Leaves below a dict are parameters or moments and are named by its keys; counters are copied.
    """

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        if not keys:
            return NamedSharding(mesh, P())
        name = "/".join(keys)
        return NamedSharding(mesh, axes.fit(tree.match(rules, name), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(place, state)


def constrain_state(state: Any, mesh: Mesh | None, rules: Rules = TRAIN_RULES) -> Any:
    """Inside a program: `state` (or parameters, or gradients) held to `state_shardings`.

    The cotangents of what it returns are held to them too, which is what scatters gradients.
    """
    if mesh is None:
        return state
    shardings = state_shardings(state, mesh, rules)
    return jax.tree.map(jax.lax.with_sharding_constraint, state, shardings)


def place(variables: Any, mesh: Mesh | None, rules: Rules = TRAIN_RULES) -> Any:
    """Trees of variables where `rules` lay them on the mesh; what lies there already stays."""
    if mesh is None:
        return variables
    return jax.device_put(variables, state_shardings(variables, mesh, rules))


def make_layout(mesh: Mesh | None, dtype: Any) -> Callable[[Any], Any]:
    """A function `variables -> variables` laid out for rollouts, and cast to `dtype`.

    One jitted identity: all weights move in one program, once a step. On one device it returns
    what it gets (the sampler casts by itself).
    """
    if mesh is None:
        return lambda variables: variables

    # XLA's CPU runs loops that do not depend on each other at once, and their collectives would
    # meet each other's data.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    hold = jax.lax.with_sharding_constraint if is_cpu else _hold_by_layer

    def lay_out(variables: Any) -> Any:
        shardings = param_shardings(variables, mesh, ROLLOUT_RULES)
        return jax.tree.map(hold, cast(variables, dtype), shardings)

    return jax.jit(lay_out)


def _hold_by_layer(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`leaf` held to a sharding, a stack of kernels a layer at a time.

    All at once, a stack is gathered beside the place that it goes to: 8B on 16 chips would hold
    2.6 GiB more a chip.
    """
    if leaf.ndim < 3:
        return jax.lax.with_sharding_constraint(leaf, sharding)
    layer = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))

    def step(_: None, kernel: jax.Array) -> tuple[None, jax.Array]:
        return None, jax.lax.with_sharding_constraint(kernel, layer)

    return jax.lax.with_sharding_constraint(jax.lax.scan(step, None, leaf)[1], sharding)


def cast(params: tree.Tree, dtype: Any) -> tree.Tree:
    """Parameters that do not learn, as the model reads them: in the dtype that it computes in.

    What it computes stays the same to the last bit, and the memory is half of float32's.
    """
    return tree.map_named(lambda path, leaf: cast_leaf(path, leaf, dtype), params)


def cast_leaf(path: str, leaf: jax.Array, dtype: Any) -> jax.Array:
    """One leaf of `cast`."""
    return leaf if tree.match(_READ_IN_FLOAT32, path) else leaf.astype(dtype)


def abstract(values: Any, shardings: Any, dtype: Any = None) -> Any:
    """ShapeDtypeStructs of `values` with these shardings: arguments to compile a program with."""

    def one(leaf: Any, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, dtype or leaf.dtype, sharding=sharding)

    return jax.tree.map(one, values, shardings)


# ---------------------------------------------------------------------------------------- batches


def batch_shardings(batch: Any, mesh: Mesh) -> Any:
    """A NamedSharding for each leaf: rows over 'data' and 'fsdp', scalars copied."""

    def place(path: tuple[Any, ...], leaf: Any) -> NamedSharding:
        return NamedSharding(mesh, _batch_spec(path, leaf))

    return jax.tree_util.tree_map_with_path(place, batch)


def constrain_batch(batch: Batch, mesh: Mesh | None) -> Batch:
    """Inside a program: a batch, or a microbatch of one, held to `batch_shardings`."""
    if mesh is None:
        return batch

    def hold(path: tuple[Any, ...], leaf: Any) -> Any:
        return axes.constrain(jnp.asarray(leaf), mesh, *_batch_spec(path, leaf))

    return jax.tree_util.tree_map_with_path(hold, batch)


def to_global(batch: Batch, mesh: Mesh | None, *, is_whole: bool = False) -> Batch:
    """Return a host batch as global arrays whose batch axis is split over 'data' and 'fsdp'.

    Every process passes the rows of its `process_share`, or all rows where `is_whole`; scalars are
    copied. Raises ValueError where the rows of all processes together do not divide.
    """
    if mesh is None:
        return batch
    parts, (share, count) = axes.parts(mesh, BATCH), process_share(mesh)

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
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


def to_local(batch: Any) -> Any:
    """The rows of this process as numpy arrays, in their order: the inverse of `to_global`."""

    def fetch(path: tuple[Any, ...], leaf: Any) -> np.ndarray:
        if leaf.is_fully_addressable or leaf.ndim == 0:
            return np.asarray(leaf)
        axis = _batch_axis(path)[1]
        # devices that hold the same rows (along 'tensor') count once
        shards = {shard.index[axis].start or 0: shard.data for shard in leaf.addressable_shards}
        return np.concatenate([np.asarray(shards[start]) for start in sorted(shards)], axis)

    if all(leaf.is_fully_addressable for leaf in jax.tree.leaves(batch)):
        return jax.device_get(batch)
    return jax.tree_util.tree_map_with_path(fetch, batch)


def to_every(batch: Any, mesh: Mesh | None) -> Any:
    """All rows as numpy arrays, in every process."""
    return jax.device_get(batch if mesh is None else _copied(mesh)(batch))


def make_key(seed: int, mesh: Mesh | None) -> jax.Array:
    """`jax.random.key(seed)` as an array of all devices."""
    if mesh is None:
        return jax.random.key(seed)
    return jax.jit(lambda: jax.random.key(seed), out_shardings=NamedSharding(mesh, P()))()


@functools.cache
def _copied(mesh: Mesh) -> Callable[[Any], Any]:
    return jax.jit(lambda values: values, out_shardings=NamedSharding(mesh, P()))


def process_share(mesh: Mesh | None) -> tuple[int, int]:
    """(which share of a batch's rows this process reads, of how many shares).

    Processes whose devices differ along 'tensor' alone read the same rows. Raises ValueError where
    the processes cannot be told apart into equal runs of rows.
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


def _batch_axis(path: tuple[Any, ...]) -> tuple[str, int]:
    name = jax.tree_util.keystr(path[-1:], simple=True)
    return name, BATCH_AXES.get(name, 0)


def _batch_spec(path: tuple[Any, ...], leaf: Any) -> P:
    return P() if np.ndim(leaf) == 0 else P(*[None] * _batch_axis(path)[1], BATCH)
