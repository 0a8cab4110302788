"""The mesh, where each parameter lies on it, and host batches made global.

Mesh axes: 'data' copies the parameters and splits the batch, 'fsdp' splits both, 'tensor' splits
the widths of the layers and copies the batch.
Parameter axes: L layers of a stack, in and out of a kernel, V vocabulary, D width.
"""

import math
from collections.abc import Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsd_jax import tree

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")
Batch = TypeVar("Batch")

# Batches have B first, but for the fields here: M-RoPE positions are [3, B, T].
BATCH_AXES = {"positions": 1}

# First match wins. The first kernel of a pair splits its outputs over 'tensor', the second one its
# inputs, so that a pair needs one reduction. Norms, biases and adapter scales are small: copied.
PARAM_RULES: tuple[tuple[str, P], ...] = (
    (r"/(scale|bias)$", P()),
    (r"(embed_tokens|lm_head)/embedding$", P(("fsdp", "tensor"))),  # [V, D]
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


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """Return the mesh ('data', 'fsdp', 'tensor') over `devices`, by default all there are.

    One size may be -1: whatever the others leave. The axes are Auto (`jax.make_mesh` alone would
    make them Explicit). Raises ValueError where the sizes do not multiply to the devices.
    """
    count = jax.device_count() if devices is None else len(devices)
    sizes = [data, fsdp, tensor]
    wrong = ValueError(
        f"mesh {dict(zip(AXES, sizes, strict=True))}: want sizes of at least 1 that multiply to "
        f"{count} devices, one of which may be -1"
    )
    if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
        raise wrong
    if -1 in sizes:
        sizes[sizes.index(-1)] = count // math.prod(size for size in sizes if size != -1)
    if math.prod(sizes) != count:
        raise wrong
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices)


def param_shardings(
    params: tree.Tree, mesh: Mesh, rules: Sequence[tuple[str, P]] = PARAM_RULES
) -> tree.Tree:
    """Return a NamedSharding for each leaf of parameters or adapters, which may be abstract.

    Raises ValueError for a path that no rule matches, and one that lists every dimension that its
    mesh axes do not divide: jax would split it unevenly or refuse much later.
    """
    problems: list[str] = []

    def place(path: str, leaf: Any) -> NamedSharding:
        spec = tree.match(rules, path)
        if len(spec) > len(leaf.shape):
            problems.append(f"{path}: got shape {list(leaf.shape)}, want one to fit {spec}")
            return NamedSharding(mesh, P())
        for axis, size in enumerate(leaf.shape[: len(spec)]):
            parts = _parts(mesh, spec[axis])
            if size % parts:
                problems.append(
                    f"{path}: axis {axis} of shape {list(leaf.shape)}: got {size}, "
                    f"want a multiple of {parts} ({spec[axis]})"
                )
        return NamedSharding(mesh, spec)

    shardings = tree.map_named(place, params)
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"parameters do not fit the mesh {dict(mesh.shape)}:\n  {listed}")
    return shardings


def to_global(batch: Batch, mesh: Mesh) -> Batch:
    """Return a host batch as global arrays whose batch axis is split over 'data' and 'fsdp'.

    Every process passes its own rows, in the order of the processes; scalars are copied. Raises
    ValueError where the rows of all processes together do not divide.
    """
    parts = _parts(mesh, BATCH)

    def place(path: tuple[Any, ...], leaf: Any) -> jax.Array:
        value = np.asarray(leaf)
        name = jax.tree_util.keystr(path[-1:], simple=True)
        if value.ndim == 0:
            return jax.make_array_from_process_local_data(NamedSharding(mesh, P()), value)
        axis = BATCH_AXES.get(name, 0)
        rows = value.shape[axis] * jax.process_count()
        if rows % parts:
            raise ValueError(
                f"batch {name}: got {rows} rows (shape {list(value.shape)} on each of "
                f"{jax.process_count()} processes), want a multiple of {parts} (data * fsdp)"
            )
        sharding = NamedSharding(mesh, P(*[None] * axis, BATCH))
        return jax.make_array_from_process_local_data(sharding, value)

    return jax.tree_util.tree_map_with_path(place, batch)


def _parts(mesh: Mesh, axes: str | tuple[str, ...] | None) -> int:
    names = (axes,) if isinstance(axes, str) else axes or ()
    return math.prod(mesh.shape[name] for name in names)
