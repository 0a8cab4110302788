"""The key/value cache of a decode.

Axes: L layers, B batch, T tokens, S cache slots, K key/value heads, H head width.
"""

import dataclasses

import jax
from flax import struct


@struct.dataclass
class KVCache:
    """Keys and values of every layer. One slot serves all rows, as prompts are left-padded."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    valid: jax.Array  # [B, S] bool, False at padding and at slots not yet written
    length: jax.Array  # [] int32, the next slot to write

    def write(self, layer: jax.typing.ArrayLike, k: jax.Array, v: jax.Array) -> "KVCache":
        """With k and v [B, T, K, H] of a layer in the slots from `length` on."""
        start = (layer, 0, self.length, 0, 0)
        k = jax.lax.dynamic_update_slice(self.k, k[None].astype(self.k.dtype), start)
        v = jax.lax.dynamic_update_slice(self.v, v[None].astype(self.v.dtype), start)
        return dataclasses.replace(self, k=k, v=v)

    def read(self, layer: jax.typing.ArrayLike) -> tuple[jax.Array, jax.Array]:
        """Keys and values [B, S, K, H] of a layer."""
        return self.k[layer], self.v[layer]
