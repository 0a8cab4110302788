"""Where parameters and optimiser state lie on the mesh, and the change between two layouts.

Two tables decide, one for training and one for rollouts, which have a mesh of their own over the
same devices (`rollout_mesh`). `axes.py` describes the axes, `batches.py` places batches. A mesh of
None stands for one device, where everything stays where it is.
Parameter axes: L layers of a stack, in and out of a kernel, V vocabulary, D width.
"""

import math
from collections.abc import Callable, Sequence

import jax
from absl import logging
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.tree_util import KeyPath
from jax.typing import DTypeLike

from mgsd_jax import tree
from mgsd_jax.config import MeshConfig
from mgsd_jax.parallel import axes
from mgsd_jax.parallel.axes import AXES
from mgsd_jax.tree import PyTree

Rules = Sequence[tuple[str, P]]

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

# On the mesh of a rollout. Decoding reads every weight for every token, so each is split where its
# products are: no weight is gathered, and a pair of kernels needs one sum over 'tensor' and 'fsdp'.
# Prefill gathers over 'fsdp', once. The vision tower is read by prefill alone.
ROLLOUT_RULES: Rules = (
    (r"/(scale|bias|a|b)$", P()),
    (r"(embed_tokens|lm_head)/embedding$", P(axes.WIDTHS)),
    (r"\bvisual/(pos_embed/embedding|patch_embed/kernel)$", P()),
    (r"\bvisual/merger/linear_fc1/kernel$", P(None, "tensor")),
    (r"\bvisual/merger/linear_fc2/kernel$", P("tensor")),
    (r"\bvisual/.*/(qkv|linear_fc1)/kernel$", P(None, None, "tensor")),
    (r"\bvisual/.*/(proj|linear_fc2)/kernel$", P(None, "tensor")),
    # Small, and copied over 'fsdp': a device makes the keys of the rows whose cache it holds.
    (r"/(k_proj|v_proj)/kernel$", P(None, None, "tensor")),
    (r"/(q_proj|gate_proj|up_proj)/kernel$", P(None, None, axes.WIDTHS)),
    (r"/(o_proj|down_proj)/kernel$", P(None, axes.WIDTHS)),
)

# Where fsdp and tensor are both left open, this many chips share the weights for decoding.
_USUAL_TENSOR = 4

# The model reads these in float32, whatever it computes in, and casts all others where it reads
# them.
_READ_IN_FLOAT32 = ((r"\bvisual/(.*norm\d?/(scale|bias)|pos_embed/embedding)$", True), ("", False))


def make_mesh(
    *, data: int = 1, fsdp: int = -1, tensor: int = 1, devices: Sequence[object] | None = None
) -> Mesh:
    """The mesh ('data', 'fsdp', 'tensor') over `devices`, by default all of them.

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


def open_mesh(config: MeshConfig, devices: Sequence[object] | None = None) -> Mesh | None:
    """The mesh of a run, or None where it has one device.

    Raises as `make_mesh` and `rollout_mesh` do.
    """
    mesh = make_mesh(data=config.data, fsdp=config.fsdp, tensor=config.tensor, devices=devices)
    if config.tensor == -1:
        shape = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
        logging.info("mesh: %s for %d devices (mesh.tensor=-1 fits itself)", shape, mesh.size)
    rollout_mesh(mesh, config.rollout_tensor)
    return None if mesh.size == 1 else mesh


def rollout_mesh(mesh: Mesh | None, rollout_tensor: int) -> Mesh | None:
    """The mesh of rollouts: the devices of `mesh` in their order, in another shape.

    `rollout_tensor` is the field of `MeshConfig`: how many devices split one copy of the weights.
    On data 1 x fsdp 4 x tensor 4:

        0 or 4    data 4 x fsdp 1 x tensor 4     four copies, a quarter of the rows each
        8         data 2 x fsdp 2 x tensor 4     two copies
        -1 or 16  data 1 x fsdp 4 x tensor 4     one copy; cache by rows over 4, by heads over 4
        -2        as 8, because that leaves at least two copies; on fsdp 2 x tensor 4 as 4,
                  whatever 'data' is

    Raises ValueError where it does not divide fsdp * tensor: no copy crosses 'data'.
    """
    shape = dict.fromkeys(AXES, 1) if mesh is None else mesh.shape
    most = shape["fsdp"] * shape["tensor"]
    has_two = shape["fsdp"] > 2 and shape["fsdp"] % 2 == 0
    usual = shape["tensor"] * (2 if has_two else 1)
    count = {0: shape["tensor"], -1: most, -2: usual}.get(rollout_tensor, rollout_tensor)
    if most % count:
        raise ValueError(
            f"mesh.rollout_tensor: got {rollout_tensor}, want 0, -1, -2 or a divisor of {most} "
            "(mesh.fsdp * mesh.tensor)"
        )
    if mesh is None:
        return None
    tensor = math.gcd(count, shape["tensor"])
    devices = mesh.devices.reshape(-1, count // tensor, tensor)
    return Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))


# ------------------------------------------------------------------------------------- parameters


def state_shardings(state: PyTree, mesh: Mesh, rules: Rules = TRAIN_RULES) -> PyTree:
    """A NamedSharding for each leaf of parameters, adapters or a train state, perhaps abstract.

    Leaves below a dict are parameters, or moments, which lie as their parameters do, and are named
    by its keys; counters are replicated. Over mesh axes that do not divide a dimension it is
    replicated (`axes.fit`). Raises ValueError for a path that no rule matches, and one that lists
    every leaf of fewer dimensions than its rule.
    """
    problems: list[str] = []

    def place(path: KeyPath, leaf: jax.Array) -> NamedSharding:
        keys = [entry.key for entry in path if isinstance(entry, jax.tree_util.DictKey)]
        name = "/".join(keys)
        rule = tree.match(rules, name) if keys else P()
        try:
            return NamedSharding(mesh, axes.fit(rule, leaf.shape, mesh))
        except ValueError as error:
            problems.append(f"{name}: {error}")
            return NamedSharding(mesh, P())

    shardings = jax.tree_util.tree_map_with_path(place, state)
    if problems:
        listed = "\n  ".join(problems)
        raise ValueError(f"parameters do not fit the rules:\n  {listed}")
    return shardings


def constrain_state(state: PyTree, mesh: Mesh | None) -> PyTree:
    """Inside a program: `state` (or parameters, or gradients) held to `state_shardings`.

    The cotangents of what it returns are held to them too, which is what scatters gradients.
    """
    if mesh is None:
        return state
    return jax.tree.map(jax.lax.with_sharding_constraint, state, state_shardings(state, mesh))


def place(variables: PyTree, mesh: Mesh | None) -> PyTree:
    """Trees of variables, moved to where training has them; what lies there already stays."""
    if mesh is None:
        return variables
    return jax.device_put(variables, state_shardings(variables, mesh))


def make_layout(mesh: Mesh | None, dtype: DTypeLike) -> Callable[[PyTree], PyTree]:
    """A function `variables -> variables` laid out on the mesh of rollouts, and cast to `dtype`.

    It is one jitted identity: all weights move in one program, once a step. On one device it
    returns its argument (the sampler casts by itself).
    """
    if mesh is None:
        return lambda variables: variables

    # XLA's CPU backend runs independent loops at the same time, and their collectives would mix up
    # each other's data.
    is_cpu = mesh.devices.flat[0].platform == "cpu"
    hold = jax.lax.with_sharding_constraint if is_cpu else _hold_by_layer

    def lay_out(variables: PyTree) -> PyTree:
        shardings = state_shardings(variables, mesh, ROLLOUT_RULES)
        return jax.tree.map(hold, cast(variables, dtype), shardings)

    return jax.jit(lay_out)


def _hold_by_layer(leaf: jax.Array, sharding: NamedSharding) -> jax.Array:
    """`leaf` held to a sharding, a stack of kernels a layer at a time.

    All at once, the whole stack would be gathered beside its destination: 2.6 GiB more a chip for
    8B on 16 chips.
    """
    if leaf.ndim < 3:
        return jax.lax.with_sharding_constraint(leaf, sharding)
    layer = NamedSharding(sharding.mesh, P(*sharding.spec[1:]))

    def step(_: None, kernel: jax.Array) -> tuple[None, jax.Array]:
        return None, jax.lax.with_sharding_constraint(kernel, layer)

    return jax.lax.with_sharding_constraint(jax.lax.scan(step, None, leaf)[1], sharding)


def cast(params: tree.Tree, dtype: DTypeLike) -> tree.Tree:
    """Frozen parameters in the dtype that the model computes in, as it would cast them itself.

    The results are the same to the last bit, and they take half the memory of float32.
    """
    return tree.map_named(lambda path, leaf: cast_leaf(path, leaf, dtype), params)


def cast_leaf(path: str, leaf: jax.Array, dtype: DTypeLike) -> jax.Array:
    """`cast` of one leaf."""
    return leaf if tree.match(_READ_IN_FLOAT32, path) else leaf.astype(dtype)


def abstract(values: PyTree, shardings: PyTree) -> PyTree:
    """ShapeDtypeStructs of `values` with these shardings: arguments to compile a program with."""

    def one(leaf: jax.Array, sharding: NamedSharding) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)

    return jax.tree.map(one, values, shardings)
