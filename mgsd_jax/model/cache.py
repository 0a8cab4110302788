"""The key/value cache of a decode.

Axes: L layers, B batch, T tokens, S cache slots, K key/value heads, H head width.
"""

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct


@struct.dataclass
class KVCache:
    """Keys and values of every layer. One slot serves all rows, as prompts are left-padded."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    valid: jax.Array  # [B, S] bool, False at padding and at slots not yet written
    length: jax.Array  # [] int32, the next slot to write; every pass moves it for all rows

    def write(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """With k and v [B, T, K, H] of a layer in the slots from `length` on."""
        start = (layer, 0, self.length, 0, 0)
        k = jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), start)
        v = jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), start)
        return dataclasses.replace(self, k=k, v=v)

    def read(self, layer: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of a layer."""
        return self.k[layer], self.v[layer]

    def compact(self, keep: jax.Array) -> "KVCache":
        """With the valid slots of each row moved to the front; rows [B] not to `keep` lose theirs.

        Attention does not care where a key lies, as positions are inside the keys; the slots that
        one row has free behind the others' last one stay invalid.
        """
        order, valid, length = compacted(self.valid, keep)
        index = order[:, :, None, None]

        def move(layer: jax.Array, stack: jax.Array) -> jax.Array:
            moved = jnp.take_along_axis(stack[layer], index, axis=1)
            return jax.lax.dynamic_update_index_in_dim(stack, moved, layer, axis=0)

        # A layer at a time, in place: there is no room for a second cache.
        k, v = (jax.lax.fori_loop(0, len(x), move, x) for x in (self.k, self.v))
        return KVCache(k=k, v=v, valid=valid, length=length)


def compacted(valid: jax.Array, keep: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Which slot [B, S] int32 moves to each place, which are valid then, and the next one to write.

    Rows [B] not to `keep` have no valid slot then.
    """
    valid = valid & keep[:, None]
    order = jnp.argsort(~valid, axis=1, stable=True).astype(jnp.int32)
    counts = valid.sum(axis=1, dtype=jnp.int32)
    return order, jnp.arange(valid.shape[1]) < counts[:, None], counts.max()
