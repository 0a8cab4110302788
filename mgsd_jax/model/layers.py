"""The small layers: Linear (with an optional low-rank adapter), norms, SwiGLU, Embedding.

Parameters may be stored in any float dtype; every layer casts them to its compute `dtype`.
Norms work in float32 and cast where transformers does, so that bfloat16 runs agree with it.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.sharding import Mesh

from mgsd_jax.parallel.axes import BATCH, MODEL, constrain

INIT = nn.initializers.normal(0.02)  # transformers' initializer_range


class Linear(nn.Module):
    """x @ kernel (+ bias) (+ (x @ a) @ b * scale where collection 'adapters' has this path)."""

    features: int
    use_bias: bool = False
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        kernel = self.param("kernel", INIT, (x.shape[-1], self.features))
        # Rows as one axis, so that the kernel's gradient is one plain matmul. Over two axes XLA's
        # CPU compiler would transpose both of its operands in memory first.
        rows = x.reshape(-1, x.shape[-1])
        y = (rows @ kernel.astype(self.dtype)).reshape(*x.shape[:-1], self.features)
        if self.use_bias:
            y += self.param("bias", nn.initializers.zeros, (self.features,)).astype(self.dtype)
        if self.has_variable("adapters", "a"):
            a, b, scale = (self.get_variable("adapters", name) for name in ("a", "b", "scale"))
            added = x @ a.astype(self.dtype) @ b.astype(self.dtype)
            y += (added.astype(jnp.float32) * scale).astype(self.dtype)  # bfloat16 has no 1 / 3
        return y


class Embedding(nn.Module):
    """A table [rows, features]; a call looks rows up in it."""

    rows: int
    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, index: jax.Array) -> jax.Array:
        table = self.param("embedding", INIT, (self.rows, self.features))
        return table[index].astype(self.dtype)

    def by_width(self, index: jax.Array, mesh: Mesh | None) -> jax.Array:
        """As a call, for index [B, T] and a table that is sharded over its rows, as in training.

        Every device looks all tokens up in its own columns. The parts of the table and the rows
        found move once each; left to itself the compiler would gather the whole table.
        """
        table: jax.Array = self.get_variable("params", "embedding")
        table = constrain(table, mesh, None, MODEL)
        found = table[constrain(index, mesh, "data")].astype(self.dtype)
        # One axis at a time. For both at once the compiler would replicate the whole array first.
        for where in (("data", None, MODEL), ("data", None, "fsdp"), (BATCH,)):
            found = constrain(found, mesh, *where)
        return found


class RMSNorm(nn.Module):
    """x / rms(x) * scale; the scale multiplies after the cast back to x's dtype, as in HF."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return scale.astype(x.dtype) * wide.astype(x.dtype)


class LayerNorm(nn.Module):
    """Mean and variance over the last axis in float32, as torch's layer_norm; affine."""

    eps: float

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        scale = self.param("scale", nn.initializers.ones, (x.shape[-1],))
        bias = self.param("bias", nn.initializers.zeros, (x.shape[-1],))
        wide = x.astype(jnp.float32)
        wide -= jnp.mean(wide, axis=-1, keepdims=True)
        wide *= jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + self.eps)
        return (wide * scale.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


class SwiGLU(nn.Module):
    """down(silu(gate(x)) * up(x))."""

    features: int
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        gate = Linear(self.features, dtype=self.dtype, name="gate_proj")(x)
        up = Linear(self.features, dtype=self.dtype, name="up_proj")(x)
        return Linear(x.shape[-1], dtype=self.dtype, name="down_proj")(nn.silu(gate) * up)
