"""A per-token loss fused with the output head: values, statistics and gradients in one pass.

Axes: N tokens of all rows together, C tokens of a chunk, V vocabulary, D model width. Tokens that
are not counted are left out first, so padding costs no head matmul; the others are taken
`token_chunk` at a time, and their gradient is formed in the same pass as their loss: four head
matmuls instead of six, no logits kept for the backward pass, and no array of [N, V] at any time.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

# (settings, logits [C, V], rows, shared) -> (loss [C], statistics of [C], gradient [C, V])
ChunkLoss = Callable[[Any, jax.Array, Any, Any], tuple[jax.Array, Any, jax.Array]]


@dataclasses.dataclass(frozen=True)
class FusedLoss:
    """The static half of a fused loss."""

    chunk_loss: ChunkLoss
    settings: Any  # handed to chunk_loss
    token_chunk: int  # tokens whose logits are held at once
    train_head: bool = True  # False: the head gets no gradient even where it is asked for


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
    rows, a pytree of [N, ...], and shared, any pytree, are what chunk_loss needs besides the
    logits. Gradients go to hidden and head, each formed only where it is asked for; without
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
    train_hidden, train_head = wanted
    kernel = head.astype(hidden.dtype)  # a float32 master head computes in the hidden's dtype

    def step(d_head: jax.Array | None, picked: Any) -> tuple[jax.Array | None, Any]:
        chunk_hidden, chunk_weights, chunk_rows = picked
        logits = head_logits(chunk_hidden, kernel)
        loss, stats, d_logits = spec.chunk_loss(spec.settings, logits, chunk_rows, shared)
        # Selects and not products: a row counted for its statistics alone may hold a NaN.
        live = (chunk_weights != 0)[:, None]
        loss = jnp.where(live[:, 0], loss * chunk_weights, 0.0)
        d_logits = jnp.where(live, d_logits * chunk_weights[:, None], 0.0).astype(hidden.dtype)
        d_hidden = None
        if train_hidden:
            d_hidden = _matmul("NV,VD->ND", d_logits, kernel).astype(hidden.dtype)
        if d_head is not None:
            d_head += _matmul("NV,ND->VD", d_logits, jnp.where(live, chunk_hidden, 0))
        return d_head, (loss, stats, d_hidden)

    d_head = jnp.zeros(head.shape, jnp.float32) if train_head else None
    inputs = (hidden, weights.astype(jnp.float32), rows)
    d_head, outputs = _over_packed_chunks(step, d_head, inputs, counted, spec.token_chunk)
    loss, stats, d_hidden = outputs
    d_head = None if d_head is None else d_head.astype(head.dtype)
    return jnp.sum(loss), stats, (d_hidden, d_head)


def _over_packed_chunks(
    step: Callable[[Any, Any], tuple[Any, Any]],
    carry: Any,
    rows: Any,
    counted: jax.Array,
    token_chunk: int,
) -> tuple[Any, Any]:
    """Calls step(carry, chunk of rows) for the counted [N] rows alone; outputs are [N] again.

    Rows are gathered by the index of the counted ones, so the loop is as short as their number,
    not N, asks for, and a row that is not counted is never read: step sees zeros past the last
    counted row, and outputs are 0 where nothing was counted.
    """
    total = counted.shape[0]
    chunk = min(token_chunk, total)
    slots = -(-total // chunk) * chunk
    # Where each row goes, and, of each slot, which row it holds; out of range where none.
    place = jnp.where(counted, jnp.cumsum(counted) - 1, slots)
    held = jnp.full(slots, total).at[place].set(jnp.arange(total), mode="drop")

    def pick(start: jax.Array) -> Any:
        index = jax.lax.dynamic_slice_in_dim(held, start, chunk)
        return jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), rows)

    def body(i: jax.Array, state: Any) -> Any:
        carry, packed = state
        carry, outputs = step(carry, pick(i * chunk))
        update = partial(jax.lax.dynamic_update_slice_in_dim, start_index=i * chunk, axis=0)
        return carry, jax.tree.map(update, packed, outputs)

    _, shapes = jax.eval_shape(lambda c: step(c, pick(jnp.int32(0))), carry)
    packed = jax.tree.map(lambda s: jnp.zeros((slots, *s.shape[1:]), s.dtype), shapes)
    trips = (jnp.sum(counted) + chunk - 1) // chunk
    carry, packed = jax.lax.fori_loop(0, trips, body, (carry, packed))
    return carry, jax.tree.map(lambda x: x.at[place].get(mode="fill", fill_value=0), packed)


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
