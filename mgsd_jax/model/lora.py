"""Low-rank adapters (LoRA): which Linears get one, how they start, how they merge into kernels.

An adapter stands at the path of its Linear in the model's collection 'adapters':
`a` [L, in, rank], `b` [L, rank, out], `scale` [L] = alpha / rank; no L where nothing is stacked.
Only `a` and `b` are trained and checkpointed. `scale` follows from the configuration, and
`with_scale` adds it on the way into the model, so that no optimizer sees or decays it.
"""

import math
import re
import zlib
from collections.abc import Callable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mgsd_jax import tree
from mgsd_jax.config import LoraConfig
from mgsd_jax.tree import Tree

# Applied as a Linear here, but a convolution in transformers, which PEFT adapts in another way.
_NO_LINEAR = "visual/patch_embed"


def linear_paths(params: Tree) -> tuple[str, ...]:
    """The paths that can carry an adapter, such as 'language/layers/mlp/up_proj'."""
    names = (path for path, _ in tree.named_leaves(params))
    kernels = (path.removesuffix("/kernel") for path in names if path.endswith("/kernel"))
    return tuple(path for path in kernels if path != _NO_LINEAR)


def init_adapters(params: Tree, config: LoraConfig, rng: jax.Array) -> Tree:
    """Fresh float32 adapters for every Linear in whose path `config.targets` is found.

    `a` is uniform within 1 / sqrt(in) and `b` is zero, so that the model computes what it did
    before. The draw depends on the path and `rng` alone: further targets do not change it.
    `params` may be abstract. Source: PEFT `LoraLayer.reset_lora_parameters` (kaiming uniform with
    a = sqrt(5)). Raises ValueError, listing the candidates, if the regex is found in no path.
    """
    candidates = linear_paths(params)
    targets = [path for path in candidates if re.search(config.targets, path)]
    if not targets:
        listed = ", ".join(candidates)
        raise ValueError(
            f"lora targets: got {config.targets!r}, want a regex found in one of {listed}"
        )
    leaves: list[tuple[str, jax.Array]] = []
    for path in targets:
        *stack, inner, outer = tree.get(params, path)["kernel"].shape
        key = jax.random.fold_in(rng, zlib.crc32(path.encode()))
        bound = 1 / math.sqrt(inner)
        a = jax.random.uniform(key, (*stack, inner, config.rank), jnp.float32, -bound, bound)
        b = jnp.zeros((*stack, config.rank, outer), jnp.float32)
        leaves += [(f"{path}/a", a), (f"{path}/b", b)]
    return with_scale(tree.nest(leaves), config)


def with_scale(adapters: Tree, config: LoraConfig) -> Tree:
    """Trained adapters (`a` and `b`) with the scale alpha / rank beside each."""
    leaves = tree.named_leaves(adapters)
    scales = [
        (
            f"{path.removesuffix('/a')}/scale",
            jnp.full(a.shape[:-2], config.alpha / config.rank, jnp.float32),
        )
        for path, a in leaves
        if path.endswith("/a")
    ]
    return tree.nest([*leaves, *scales])


def merge(params: Tree, adapters: Tree) -> Tree:
    """Parameters with a @ b * scale added to the kernels, computed in float32, of the same dtype.

    Raises ValueError if an adapter has no kernel, or one of another shape.
    """
    for path, _ in named_adapters(adapters):
        tree.get(params, f"{path}/kernel")
    return tree.map_named(merger(adapters), params)


def merger(adapters: Tree) -> Callable[[str, jax.Array], jax.Array]:
    """A function of one parameter's path and value that returns what `merge` makes of it.

    Weights can so be merged one by one while they are read.
    """
    nodes = dict(named_adapters(adapters))

    def merged(path: str, leaf: jax.Array) -> jax.Array:
        node = nodes.get(path.removesuffix("/kernel")) if path.endswith("/kernel") else None
        if node is None:
            return leaf
        want = (*node["a"].shape[:-1], node["b"].shape[-1])
        if leaf.shape != want or node["a"].shape[-1] != node["b"].shape[-2]:
            shapes = {name: list(part.shape) for name, part in sorted(node.items())}
            raise ValueError(
                f"adapter {path.removesuffix('/kernel')}: got {shapes}, want to fit a kernel "
                f"{list(leaf.shape)}"
            )
        return _merge_kernel(leaf, node["a"], node["b"], node["scale"])

    return merged


@jax.jit
def _merge_kernel(kernel: jax.Array, a: jax.Array, b: jax.Array, scale: jax.Array) -> jax.Array:
    a, b = (x.astype(jnp.float32) for x in (a, b))
    delta = jnp.matmul(a, b, precision=jax.lax.Precision.HIGHEST) * scale[..., None, None]
    return (kernel.astype(jnp.float32) + delta).astype(kernel.dtype)


def join(parts: Sequence[Tree], size: LoraConfig) -> tuple[Tree, LoraConfig]:
    """One set of adapters that adds what all `parts` together add, and its configuration.

    The parts of a Linear stand side by side along the rank, filled with zeros up to the largest
    sum of ranks. All get the scale of `size`; the `b` of a part with another scale is multiplied
    by the ratio. The targets of the configuration are the paths of the Linears.
    """
    nodes: dict[str, list[Tree]] = {}
    for part in parts:
        for path, node in named_adapters(part):
            nodes.setdefault(path, []).append(node)
    rank = max(sum(node["a"].shape[-1] for node in group) for group in nodes.values())
    scale = np.float32(size.alpha / size.rank)
    leaves: list[tuple[str, jax.Array]] = []
    for path, group in nodes.items():
        ratios = [np.asarray(node["scale"] / scale)[..., None, None] for node in group]
        a = np.concatenate([node["a"] for node in group], -1)
        b = np.concatenate([node["b"] * r for node, r in zip(group, ratios, strict=True)], -2)
        leaves += [(f"{path}/a", _widen(a, -1, rank)), (f"{path}/b", _widen(b, -2, rank))]
    alpha = size.alpha if rank == size.rank else size.alpha * rank / size.rank
    targets = "|".join(re.escape(path) for path in sorted(nodes))
    config = LoraConfig(rank, alpha, f"^({targets})$")
    return with_scale(tree.nest(leaves), config), config


def _widen(values: np.ndarray, axis: int, size: int) -> jax.Array:
    """The values with zeros behind them, up to `size` along an axis."""
    pads = [(0, 0)] * values.ndim
    pads[axis] = (0, size - values.shape[axis])
    return jnp.asarray(np.pad(values, pads))


def named_adapters(adapters: Tree) -> Iterator[tuple[str, Tree]]:
    """Yields (path of the Linear, {'a', 'b', 'scale'}); ValueError if one of the three lacks."""
    nodes: dict[str, Tree] = {}
    for path, leaf in tree.named_leaves(adapters):
        linear, _, name = path.rpartition("/")
        nodes.setdefault(linear, {})[name] = leaf
    for path, node in nodes.items():
        if node.keys() != {"a", "b", "scale"}:
            raise ValueError(f"adapter {path}: got {sorted(node)}, want ['a', 'b', 'scale']")
        yield path, node
