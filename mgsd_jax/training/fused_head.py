"""A per-token loss fused with the output head: values, statistics and gradients in one pass.

Axes: N tokens of all rows together, C tokens of a chunk, V vocabulary, D model width. Tokens that
are not counted are left out first, so padding costs no head matmul; the others are taken
`token_chunk` at a time, and their gradient is formed in the same pass as their loss: four head
matmuls instead of six, no logits kept for the backward pass, and no array of [N, V] at any time.

On a mesh the vocabulary is split over axes.MODEL and stays where it is; what moves is a chunk of
hidden states to all parts of the vocabulary, a handful of sums a token, and the chunk's gradient
back: 6 C D numbers, where gathering the head would move V D. The rows of 'data' meet in the
head's gradient alone, once. Left to itself the compiler gathers [V, D] in every turn of the loop.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mgsd_jax.parallel import axes
from mgsd_jax.training.divergences import Shard

# (settings, shard, logits [C, V], rows, shared) -> (loss [C], statistics of [C], gradient [C, V])
ChunkLoss = Callable[[Any, Shard, jax.Array, Any, Any], tuple[jax.Array, Any, jax.Array]]


# On a CPU the head's gradient takes a chunk's product in parts that stay in the cache: a product of
# [V, D] would be written and read again before it is added. Elsewhere matmuls want aligned, large
# operands, and 64 parts of Qwen3-VL's vocabulary are 2,374 words.
_HEAD_PARTS = 64


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """The static half of a fused loss."""

    chunk_loss: ChunkLoss
    settings: Any  # handed to chunk_loss
    token_chunk: int  # tokens whose logits are held at once
    train_head: bool = True  # False: the head gets no gradient even where it is asked for
    mesh: Mesh | None = None  # None: on one device


def fused_loss(
    spec: FusedLoss,
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    counted: jax.Array,
    rows: Any,
    shared: Any,
) -> tuple[jax.Array, Any]:
    """(sum_t w_t L_t float32, statistics [N] of every token, 0 where it is not counted).

    hidden [N, D], head [V, D], weights [N], counted [N] bool (every token of weight != 0 is);
    rows, a pytree of [N, ...], and shared, a pytree of [V, ...], are what chunk_loss needs besides
    the logits. Gradients go to hidden and head, each formed only where it is asked for; without
    differentiation there is none to form.
    """
    result: Any = _fused(spec, hidden, head, weights, counted, rows, shared)
    loss, stats = result
    return loss, jax.tree.map(jax.lax.stop_gradient, stats)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fused(spec: FusedLoss, *arrays: Any) -> tuple[jax.Array, Any]:
    loss, stats, _ = _run(spec, (False, False), *arrays)
    return loss, stats


def _fused_forward(spec: FusedLoss, hidden: Any, head: Any, *others: Any) -> tuple[Any, Any]:
    wanted = (hidden.perturbed, head.perturbed and spec.train_head)
    others = jax.tree.map(lambda x: x.value, others, is_leaf=_is_primal)
    loss, stats, gradients = _run(spec, wanted, hidden.value, head.value, *others)
    return (loss, stats), gradients


def _is_primal(x: Any) -> bool:
    return isinstance(x, jax.custom_derivatives.CustomVJPPrimal)


def _fused_backward(_: FusedLoss, gradients: Any, cotangents: tuple[Any, Any]) -> tuple[Any, ...]:
    scale = cotangents[0]  # the statistics carry no gradient
    if isinstance(scale, jax.custom_derivatives.SymbolicZero):
        return (None,) * 6
    scaled = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    return (*scaled, None, None, None, None)


_fused.defvjp(_fused_forward, _fused_backward, symbolic_zeros=True)


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[N, V] float32: the accumulator itself, not rounded to the inputs' dtype."""
    return _matmul("ND,VD->NV", hidden, head)


def _run(
    spec: FusedLoss,
    wanted: tuple[bool, bool],
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    counted: jax.Array,
    rows: Any,
    shared: Any,
) -> tuple[jax.Array, Any, tuple[jax.Array | None, jax.Array | None]]:
    """(loss, statistics, gradients of hidden and head, None where not wanted)."""
    tokens = (hidden, weights.astype(jnp.float32), counted, rows)
    if spec.mesh is None:
        return _run_part(spec, wanted, _Split(), tokens, head, shared)
    mesh = spec.mesh
    split = _Split(axes.BATCH, axes.dividing(mesh, axes.MODEL, head.shape[0]))
    total = hidden.shape[0]
    spare = -total % axes.parts(mesh, axes.BATCH)
    if spare:
        tokens = jax.tree.map(lambda x: jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)), tokens)
    by_token, by_word = P(split.tokens), P(split.vocabulary or None)
    run = jax.shard_map(
        partial(_run_part, spec, wanted, split),
        mesh=mesh,
        in_specs=(by_token, by_word, by_word),
        out_specs=(P(), by_token, (by_token, by_word)),
        check_vma=False,  # what varies over which axis is told by _Split, not by every zero
    )
    loss, stats, (d_hidden, d_head) = run(tokens, head, shared)
    stats, d_hidden = jax.tree.map(lambda x: x[:total], (stats, d_hidden))
    return loss, stats, (d_hidden, d_head)


@dataclasses.dataclass(frozen=True)
class _Split:
    """The mesh axes that split tokens, and those that split the vocabulary; () on one device."""

    tokens: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    @property
    def gathered(self) -> tuple[str, ...]:
        """Axes along which tokens meet all parts of the vocabulary."""
        return tuple(axis for axis in self.tokens if axis in self.vocabulary)

    @property
    def copies(self) -> tuple[str, ...]:
        """Axes along which the same part of the vocabulary meets other tokens."""
        return tuple(axis for axis in self.tokens if axis not in self.vocabulary)


def _run_part(
    spec: FusedLoss,
    wanted: tuple[bool, bool],
    split: _Split,
    tokens: tuple[jax.Array, jax.Array, jax.Array, Any],
    head: jax.Array,
    shared: Any,
) -> tuple[jax.Array, Any, tuple[jax.Array | None, jax.Array | None]]:
    """`_run` for the tokens and the part of the head that one device holds."""
    train_hidden, train_head = wanted
    hidden, weights, counted, rows = tokens
    kernel = head.astype(hidden.dtype)  # a float32 master head computes in the hidden's dtype
    shard = Shard(split.vocabulary)
    in_parts = spec.mesh is None and jax.default_backend() == "cpu"
    head_parts = _HEAD_PARTS if in_parts and head.shape[0] % _HEAD_PARTS == 0 else 1

    def step(carry: Any, index: jax.Array, picked: Any) -> tuple[Any, Any]:
        d_hidden, d_head = carry
        chunk_hidden, chunk_weights, chunk_rows = picked
        logits = head_logits(chunk_hidden, kernel)
        loss, stats, d_logits = spec.chunk_loss(spec.settings, shard, logits, chunk_rows, shared)
        # Selects and not products: a row counted for its statistics alone may hold a NaN.
        live = (chunk_weights != 0)[:, None]
        loss = jnp.where(live[:, 0], loss * chunk_weights, 0.0)
        d_logits = jnp.where(live, d_logits * chunk_weights[:, None], 0.0).astype(hidden.dtype)
        if d_hidden is not None:
            part = _sum_over(_matmul("NV,VD->ND", d_logits, kernel), split.vocabulary)
            if split.vocabulary:  # or the compiler rounds before it sums
                part = jax.lax.optimization_barrier(part)
            # Straight to their rows: packed first, all of [N, D] would be held twice.
            d_hidden = d_hidden.at[index].set(part.astype(hidden.dtype), mode="drop")
        if d_head is not None:
            d_head = _add_product(d_head, d_logits, jnp.where(live, chunk_hidden, 0), head_parts)
        return (d_hidden, d_head), (loss, stats)

    carry = (
        jnp.zeros_like(hidden) if train_hidden else None,
        jnp.zeros(head.shape, jnp.float32) if train_head else None,
    )
    (d_hidden, d_head), (loss, stats) = _over_packed_chunks(
        step, carry, (hidden, weights, rows), counted, spec.token_chunk, split
    )
    loss = _sum_over(jnp.sum(loss), split.tokens)
    if d_head is not None:
        d_head = _sum_over(d_head, split.copies).astype(head.dtype)
    return loss, stats, (d_hidden, d_head)


def _over_packed_chunks(
    step: Callable[[Any, jax.Array, Any], tuple[Any, Any]],
    carry: Any,
    rows: Any,
    counted: jax.Array,
    token_chunk: int,
    split: _Split,
) -> tuple[Any, Any]:
    """Calls step(carry, index, rows) for chunks of the counted [N] rows; outputs are [N] again.

    Counted rows are numbered through all devices of `split.gathered`, and chunks are runs of these
    numbers: the loop is as long as their number, not N, asks for, however they are spread. Every
    device gives the rows it has, zeros for the others, and takes back the outputs that are its
    own; index [C] says which of its rows they are, out of range where another device has them. A
    row that is not counted is never read: step sees zeros past the last counted row, and outputs
    are 0 where nothing was counted.
    """
    own = counted.shape[0]
    chunk = min(token_chunk, own * _size(split.gathered))
    # The rank of each counted row here, and the row of each rank, `own` where there is none. Room
    # for a chunk on both sides: a window into the ranks may hang over or miss them altogether.
    place = jnp.where(counted, jnp.cumsum(counted) - 1, own + chunk)
    held = jnp.full(own + 2 * chunk, own).at[place + chunk].set(jnp.arange(own), mode="drop")
    first, total = _numbering(jnp.sum(counted), split.gathered)

    def window(i: jax.Array) -> jax.Array:
        return jnp.clip(i * chunk - first, -chunk, own) + chunk

    def pick(i: jax.Array) -> tuple[jax.Array, Any]:
        index = jax.lax.dynamic_slice_in_dim(held, window(i), chunk)
        mine = jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), rows)
        return index, jax.tree.map(lambda x: _sum_over(x, split.gathered), mine)

    def body(i: jax.Array, state: Any) -> Any:
        carry, packed = state
        carry, outputs = step(carry, *pick(i))
        update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=window(i), axis=0)
        return carry, jax.tree.map(update, packed, outputs)

    _, shapes = jax.eval_shape(lambda c: step(c, *pick(jnp.int32(0))), carry)
    packed = jax.tree.map(lambda s: jnp.zeros((held.size, *s.shape[1:]), s.dtype), shapes)
    trips = (total + chunk - 1) // chunk
    if split.copies:  # their loops hold no common sum, but one program runs them all
        trips = jax.lax.pmax(trips, split.copies)
    carry, packed = jax.lax.fori_loop(0, trips, body, (carry, packed))
    index = jnp.where(counted, place + chunk, held.size)
    return carry, jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), packed)


def _numbering(count: jax.Array, gathered: tuple[str, ...]) -> tuple[jax.Array, jax.Array]:
    """(the number of this device's first row, the number of all rows) along these axes."""
    if not gathered:
        return jnp.int32(0), count
    counts = jax.lax.all_gather(count, gathered)
    before = jnp.arange(counts.size) < jax.lax.axis_index(gathered)
    return jnp.sum(jnp.where(before, counts, 0)), jnp.sum(counts)


def _sum_over(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, names) if names else x


def _size(names: tuple[str, ...]) -> int:
    return jax.lax.axis_size(names) if names else 1


def _add_product(total: jax.Array, a: jax.Array, b: jax.Array, parts: int) -> jax.Array:
    """total [V, D] + a [C, V]^T b [C, D], a part of V at a time."""
    size = total.shape[0] // parts

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(a, i * size, size, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(total, i * size, size)
        rows += _matmul("CV,CD->VD", columns, b)
        return jax.lax.dynamic_update_slice_in_dim(total, rows, i * size, axis=0)

    return jax.lax.fori_loop(0, parts, add, total) if parts > 1 else add(jnp.int32(0), total)


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
