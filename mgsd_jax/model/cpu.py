"""What makes programs fast that XLA compiles for one CPU; a TPU trains without any of it.

XLA's CPU compiler copies a scan's carries, weights and residuals into and out of their stacks
(a quarter of a training step), copies a layer's weights and cache out of their stacks before each
use (three quarters of a decode), computes cosines again wherever they are read, and writes the
weights of attention to memory several times. So here layers run one after another, their caches
are arrays of their own, the tables of RoPE are made once, and attention's softmax is written out.

The switch is `Kernel.is_plain`: attention by XLA's own operations, on one device. Two parts are
also used elsewhere: `attend` wherever no kernel fits, decoding on every device included, and
`split_layers` for models of few layers on any one device. `head_parts` asks JAX for its backend:
losses know of no kernel.

Axes: B batch, T queries, S keys or cache slots, N query heads, K key/value heads, G = N / K,
X = G * T, H head width, L layers, D width.
"""

import dataclasses
from collections.abc import Mapping
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from flax import struct
from jax.sharding import Mesh

from mgsd_jax.model.cache import KVCache, compacted
from mgsd_jax.model.remat import Remat
from mgsd_jax.model.rope import Tables, turn
from mgsd_jax.tree import Tree

Layers = tuple[Tree, ...]  # the variables of each layer
# Every layer is compiled for itself: with more of them compiling would take too long.
MOST_LAYERS = 8
# Of attention under a causal mask: queries of a block, and blocks, each of which is compiled.
_LEAST_BLOCK, _MOST_BLOCKS = 64, 4
# Finite, so that a row without keys does not become NaN, and so large that it drowns any score.
_MASKED = -1e30


# A product of [V, D] in the head's gradient would be written and read again before it is added; a
# part of it stays in the cache. Elsewhere matmuls want aligned, large operands, and 64 parts of
# Qwen3-VL's vocabulary are 2,374 words.
_HEAD_PARTS = 64


def head_parts(words: int) -> int:
    """In how many parts the gradient of a head [words, D] on one device is added up."""
    is_cpu = jax.default_backend() == "cpu"
    return _HEAD_PARTS if is_cpu and words % _HEAD_PARTS == 0 else 1


# ----------------------------------------------------------------------------------------- layers


def is_unrolled(is_plain: bool, remat: Remat, layers: int) -> bool:
    """Whether these layers run one after another; with `remat` they are always scanned."""
    return is_plain and remat == "none" and layers <= MOST_LAYERS


def unstack(variables: Mapping[str, Mapping[str, object]], *names: str) -> Layers:
    """The variables of each layer of the stacks `names`, in order; absent stacks have no layers.

    `variables` {'params': {name: stack}, 'adapters': ...} have a leading axis of layers.
    """
    layers: list[Tree] = []
    for name in names:
        if name not in variables["params"]:
            continue
        stack = {kind: modules[name] for kind, modules in variables.items() if name in modules}
        leaves, structure = jax.tree.flatten(stack)
        # Split, and not indexed: the gradient of a split is one concatenation, that of an index a
        # padded stack for every layer, all of which are added up.
        split = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves]
        layers += [
            structure.unflatten([part[0] for part in parts]) for parts in zip(*split, strict=True)
        ]
    return tuple(layers)


def run_decoder_layers(
    layer: nn.Module,
    layers: Layers,
    x: jax.Array,
    tables: Tables,
    valid: jax.Array,
    deep: jax.Array | None,
    cache: "Cache | None",
    *,
    decoding: bool,
    first: int,
) -> tuple[jax.Array, "Cache | None"]:
    """The layers of a decoder over x [B, T, D], deepstack features [n_ds, B, T, D] after the first.

    `layer` is a `DecoderLayer` without variables. The last layer answers for the tokens from
    `first` on: no one reads the others, and keys and values of the layers before are made already.
    """
    for index, variables in enumerate(layers):
        skipped = first if index == len(layers) - 1 else 0
        out = layer.apply(
            variables, x, tables, valid, cache, index, decoding=decoding, first=skipped
        )
        x, cache = cast("tuple[jax.Array, Cache | None]", out)
        if deep is not None and index < len(deep):
            x = x + deep[index][:, skipped:]
    return x, cache


def run_blocks(
    block: nn.Module, blocks: Layers, x: jax.Array, tables: Tables, valid: jax.Array
) -> list[jax.Array]:
    """The output of each block of a vision tower; `block` is a `VisionBlock` without variables."""
    outputs: list[jax.Array] = []
    for variables in blocks:
        x = cast(jax.Array, block.apply(variables, x, tables, valid))
        outputs.append(x)
    return outputs


def merge_taps(
    merger: nn.Module, mergers: Layers, taps: list[jax.Array], merged: jax.Array
) -> jax.Array:
    """Deepstack features [n_ds, ...]: each merger applied to its tap, in the shape of `merged`."""
    pairs = zip(mergers, taps, strict=True)
    deep = [cast(jax.Array, merger.apply(*pair)) for pair in pairs]
    stack = jnp.stack(deep) if deep else jnp.zeros((0, *merged.shape), merged.dtype)
    return stack.reshape(len(deep), *merged.shape)


def tables_in_memory(angles: jax.Array, dtype: jnp.dtype) -> Tables:
    """As `rope.turn`, as arrays in memory, which many layers read.

    Otherwise the compiler fuses the cosines into every reader, and computes them again for every
    head of every layer. Nothing is fused across the edge of a loop, which is why there is one.
    """
    return jax.lax.map(lambda row: turn(row, dtype), angles)


# -------------------------------------------------------------------------------------- the cache


@struct.dataclass
class SplitCache:
    """A KVCache whose layers are arrays of their own, laid out as a decode reads them."""

    k: tuple[jax.Array, ...]  # L of [B, K, S, H]
    v: tuple[jax.Array, ...]  # L of [B, K, S, H]
    valid: jax.Array  # [B, S] bool
    length: jax.Array  # [] int32

    def write(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "SplitCache":
        """As `KVCache.write`, for the number of a layer that is known when compiling."""
        assert isinstance(layer, int)

        def put(stack: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
            new = new.swapaxes(1, 2).astype(stack[layer].dtype)
            written = jax.lax.dynamic_update_slice(stack[layer], new, (0, 0, self.length, 0))
            return (*stack[:layer], written, *stack[layer + 1 :])

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def read(self, layer: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """As `KVCache.read`."""
        assert isinstance(layer, int)
        return self.k[layer].swapaxes(1, 2), self.v[layer].swapaxes(1, 2)

    def compact(self, keep: jax.Array) -> "SplitCache":
        """As `KVCache.compact`."""
        order, valid, length = compacted(self.valid, keep)
        index = order[:, None, :, None]
        k, v = (
            tuple(jnp.take_along_axis(layer, index, axis=2) for layer in stack)
            for stack in (self.k, self.v)
        )
        return SplitCache(k=k, v=v, valid=valid, length=length)


Cache = KVCache | SplitCache


def split_layers(
    decoder: Tree, stacks: tuple[str, ...], cache: KVCache, mesh: Mesh | None
) -> tuple[Layers | None, Cache]:
    """The layers of a decoder's variables and its cache for a loop of decodes, split once here.

    With many layers, or on several devices, the layers are None and the cache is returned as it is.
    """
    count = cache.k.shape[0]
    if count > MOST_LAYERS or (mesh is not None and mesh.size > 1):
        return None, cache
    layers = unstack(decoder, *stacks)
    assert len(layers) == count
    k, v = (tuple(x.swapaxes(2, 3)) for x in (cache.k, cache.v))
    return layers, SplitCache(k=k, v=v, valid=cache.valid, length=cache.length)


def join_layers(cache: Cache) -> KVCache:
    """The inverse of `split_layers`, for the cache that a loop ends with."""
    if isinstance(cache, KVCache):
        return cache
    k, v = (jnp.stack(x).swapaxes(2, 3) for x in (cache.k, cache.v))
    return KVCache(k=k, v=v, valid=cache.valid, length=cache.length)


# -------------------------------------------------------------------------------------- attention


def attend(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, *, causal: bool
) -> jax.Array:
    """As `attention.attend`, in plain matmuls and a softmax; `valid` may be [B, T, S] as well.

    Under a causal mask queries go a block at a time, and a block looks at no key after its last
    query. With four blocks that is 1/4 + 2/4 + 3/4 + 4/4 of 4/4 each, five eighths of the work:

        keys     0 1 2 3
        block 0  x
        block 1  x x
        block 2  x x x
        block 3  x x x x
    """
    batch, length, heads, width = q.shape
    groups, before = k.shape[2], k.shape[1] - q.shape[1]
    grouped = (q * width**-0.5).reshape(batch, length, groups, heads // groups, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # all queries of a key head side by side
    hidden = jnp.where(valid if valid.ndim == 3 else valid[:, None], 0.0, _MASKED)[:, None]

    def block(first: int, last: int, seen: int, mask: jax.Array) -> jax.Array:
        queries = grouped[:, :, :, first:last]
        merged = queries.reshape(batch, groups, -1, width)
        return _softmax_values(merged, k[:, :seen], v[:, :seen], mask).reshape(queries.shape)

    if not causal:
        out = block(0, length, k.shape[1], hidden)
    else:
        size = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
        blocks = []
        for first in range(0, length, size):
            last = min(first + size, length)
            seen = last + before
            later = np.triu(np.full((last - first, seen), _MASKED, np.float32), first + before + 1)
            blocks.append(block(first, last, seen, hidden[..., :seen] + later))
        out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


@jax.custom_vjp
def _softmax_values(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """softmax(q k^T + mask) v: [B, K, X, H] for q of that shape, k and v [B, S, K, H].

    The mask is [B, 1, T or 1, S]. Written so that the compiler makes one fusion of it: the mask is
    added, not selected by (twice the time), and the division by the softmax's sum comes last, where
    it is H numbers a query instead of S. The backward pass is written out for the same reason: left
    to itself the compiler divides and sums over S, and transposes both [X, S] arrays in memory.
    """
    return _softmax_values_forward(q, k, v, mask)[0]


def _softmax_values_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.einsum("BKXH,BSKH->BKXS", q, k, preferred_element_type=jnp.float32)
    shape = scores.shape
    if mask.shape[2] == 1:
        scores += mask
    else:
        scores = scores.reshape(*shape[:2], -1, *mask.shape[2:]) + mask[:, :, None]
        scores = scores.reshape(shape)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("BKXS,BSKH->BKXH", weights, v, preferred_element_type=jnp.float32)
    out = (out / total).astype(v.dtype)
    return out, (q, k, v, weights, total, out)


def _softmax_values_backward(
    residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    # With p = weights / total and s = v d_out^T: d_scores = p (s - sum_S p s), where the sum is
    # d_out . out. Here `weights` are not divided, so d_out is, once, before it is used.
    q, k, v, weights, total, out = residuals
    d_out = d_out.astype(jnp.float32) / total
    mean = jnp.sum(d_out * out, axis=-1, keepdims=True)
    d_out = d_out.astype(v.dtype)
    slopes = jnp.einsum("BKXH,BSKH->BKXS", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (slopes - mean)).astype(q.dtype)
    d_q = jnp.einsum("BKXS,BSKH->BKXH", d_scores, k)
    d_k = jnp.einsum("BKXS,BKXH->BSKH", d_scores, q)
    d_v = jnp.einsum("BKXS,BKXH->BSKH", weights, d_out)
    return d_q, d_k, d_v, None


_softmax_values.defvjp(_softmax_values_forward, _softmax_values_backward)
