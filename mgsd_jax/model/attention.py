"""Attention behind one call, `attend`.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width.
"""

import jax
import jax.numpy as jnp


def attend(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    *,
    valid: jax.Array,  # [B, S] bool, keys that may be attended to
    causal: bool,  # True: query t sees keys 0..t only (T == S)
) -> jax.Array:
    """Softmax attention [B, T, N, H] of grouped queries, scaled by 1 / sqrt(H).

    Softmax in float32. A query that may see no key gets the mean of the values: finite, and with
    finite gradients, for no one to read.
    """
    mask = valid[:, None, :]
    if causal:
        length = q.shape[1]
        mask = mask & jnp.tri(length, dtype=bool)
    return _attend_xla(q, k, v, mask)


def _attend_xla(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """As `attend`, with a dense mask [B, 1 or T, S]."""
    batch, length, heads, width = q.shape
    grouped = q.reshape(batch, length, k.shape[2], heads // k.shape[2], width)
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", grouped, k, preferred_element_type=jnp.float32)
    # The most negative finite number, not -inf: a fully masked row must not become NaN.
    scores = jnp.where(mask[:, None, None], scores * width**-0.5, jnp.finfo(jnp.float32).min)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape)
