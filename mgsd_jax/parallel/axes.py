"""The axes of the mesh, and arrays held to them inside a program.

'data' copies the parameters and splits the batch: the axis across slices, which no layer crosses.
'fsdp' splits both. 'tensor' splits the widths of the layers and copies the batch. A mesh of None
stands for one device, where nothing here does anything.

Rollouts lie on the same devices under a mesh of another shape (`sharding.rollout_mesh`): 'data'
counts the copies of the weights, 'tensor' and 'fsdp' together split one copy by its widths. The
cache is split by rows over 'fsdp' and by heads over 'tensor'.
"""

import math

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # split the rows of a batch
MODEL = ("fsdp", "tensor")  # split the parameters
WIDTHS = ("tensor", "fsdp")  # of a rollout: split the widths of the decoder, whole heads first
Axes = str | tuple[str, ...] | None


def names(axes: Axes) -> tuple[str, ...]:
    """The axes of one dimension as a tuple: None -> (), 'a' -> ('a',)."""
    return (axes,) if isinstance(axes, str) else tuple(axes or ())


def parts(mesh: Mesh | None, axes: Axes) -> int:
    """In how many parts `axes` split a dimension."""
    return 1 if mesh is None else math.prod(mesh.shape[name] for name in names(axes))


def dividing(mesh: Mesh | None, axes: Axes, size: int) -> tuple[str, ...]:
    """The longest run of `axes`, from the first, that divides `size`; () splits nothing.

    On fsdp 4 x tensor 2: ('fsdp', 'tensor') divides 16 as it is, 12 as ('fsdp',), 6 as ().
    """
    kept = names(axes)
    while size % parts(mesh, kept):
        kept = kept[:-1]
    return kept


def fit(spec: P, shape: tuple[int, ...], mesh: Mesh) -> P:
    """`spec` for an array of this shape: a dimension keeps the axes that divide it (`dividing`).

    What they do not divide is copied: every mesh works, and what a copy costs is for the eye
    (preflight's table), not an error. Raises ValueError where spec has more dimensions than shape.
    """
    if len(spec) > len(shape):
        raise ValueError(f"got shape {list(shape)}, want one to fit {spec}")
    kept = [
        axes if dividing(mesh, axes, size) == names(axes) else dividing(mesh, axes, size) or None
        for axes, size in zip(spec, shape, strict=False)
    ]
    return P(*kept)


def constrain(x: jax.Array, mesh: Mesh | None, *spec: Axes) -> jax.Array:
    """`x`, which the compiler must lay out by `spec` here: axes a dimension, as far as they fit."""
    if mesh is None:
        return x
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, fit(P(*spec), x.shape, mesh)))
