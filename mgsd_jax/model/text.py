"""The decoder: two scanned stacks, the first of which adds deepstack features after each layer.

Axes: B batch, T tokens, S cache slots, N query heads, K key/value heads, H head width, D width,
L layers, n_ds deepstack layers.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from mgsd_jax.model.attention import Kernel, attend
from mgsd_jax.model.config import TextConfig
from mgsd_jax.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from mgsd_jax.model.remat import Remat, rematerialise
from mgsd_jax.model.rope import Tables, mrope_tables, rotate
from mgsd_jax.model.unrolled import MOST_LAYERS, Layers, is_unrolled, unstack
from mgsd_jax.model.vision import STACKED
from mgsd_jax.parallel.axes import BATCH, constrain


@struct.dataclass
class KVCache:
    """Keys and values of every layer. One slot serves all rows: prompts are left-padded."""

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


@struct.dataclass
class SplitCache:
    """A KVCache whose layers are arrays of their own, laid out as a decode reads them.

    XLA's CPU compiler copies a layer out of a stack, weights and cache alike, before each use, and
    transposes keys and values: three quarters of the time of a decode. Only for models of few
    layers, see `split_layers`.
    """

    k: tuple[jax.Array, ...]  # L of [B, K, S, H]
    v: tuple[jax.Array, ...]  # L of [B, K, S, H]
    valid: jax.Array  # [B, S] bool
    length: jax.Array  # [] int32

    def write(self, layer: int, k: jax.Array, v: jax.Array) -> "SplitCache":
        """As `KVCache.write`."""
        start = (0, 0, self.length, 0)

        def put(stack: tuple[jax.Array, ...], new: jax.Array) -> tuple[jax.Array, ...]:
            new = new.swapaxes(1, 2).astype(stack[layer].dtype)
            written = jax.lax.dynamic_update_slice(stack[layer], new, start)
            return (*stack[:layer], written, *stack[layer + 1 :])

        return dataclasses.replace(self, k=put(self.k, k), v=put(self.v, v))

    def read(self, layer: int) -> tuple[jax.Array, jax.Array]:
        """As `KVCache.read`."""
        return self.k[layer].swapaxes(1, 2), self.v[layer].swapaxes(1, 2)


Cache = KVCache | SplitCache
# The stacks of the decoder's layers, in their order.
_STACKS = ("layers_deepstack", "layers")


def split_layers(
    variables: dict[str, Any], cache: KVCache, mesh: Mesh | None
) -> tuple[Layers | None, Cache]:
    """What `Decoder` takes as `layers`, and the cache to go with it: for a loop of decodes.

    On one device and with few layers these are arrays of their own, made here once; else None and
    the cache as it is. `variables` are the decoder's: {'params': {...}, 'adapters': {...}}.
    """
    count = cache.k.shape[0]
    if count > MOST_LAYERS or (mesh is not None and mesh.size > 1):
        return None, cache
    layers = unstack(variables, *_STACKS)
    assert len(layers) == count
    k, v = (tuple(x.swapaxes(2, 3)) for x in (cache.k, cache.v))
    return layers, SplitCache(k=k, v=v, valid=cache.valid, length=cache.length)


def join_layers(cache: Cache) -> KVCache:
    """The cache that `split_layers` was given, as it has become."""
    if isinstance(cache, KVCache):
        return cache
    k, v = (jnp.stack(x).swapaxes(2, 3) for x in (cache.k, cache.v))
    return KVCache(k=k, v=v, valid=cache.valid, length=cache.length)


class Attention(nn.Module):
    """Grouped-query self-attention with normed heads and M-RoPE."""

    config: TextConfig
    dtype: Dtype
    kernel: Kernel

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        width = config.head_dim
        self.q_proj = Linear(config.num_attention_heads * width, dtype=dtype)
        self.k_proj = Linear(config.num_key_value_heads * width, dtype=dtype)
        self.v_proj = Linear(config.num_key_value_heads * width, dtype=dtype)
        self.o_proj = Linear(config.hidden_size, dtype=dtype)
        self.q_norm = RMSNorm(config.rms_norm_eps)
        self.k_norm = RMSNorm(config.rms_norm_eps)

    def __call__(
        self,
        x: jax.Array,
        tables: Tables,
        valid: jax.Array,
        cache: Cache | None,
        layer: Any,
        decoding: bool,
        first: int,
    ) -> tuple[jax.Array, Cache | None]:
        """The output [B, T - first, D] and the cache with this layer's keys and values written.

        Queries, those of the tokens from `first` on, see the keys just computed, causally, or where
        `decoding` the whole cache.
        """
        heads = (*x.shape[:2], -1, self.config.head_dim)
        asking = x[:, first:]
        q = self.q_norm(self.q_proj(asking).reshape(*asking.shape[:2], *heads[2:]))
        q = rotate(q, cast(Tables, tuple(table[:, first:] for table in tables)))
        k = rotate(self.k_norm(self.k_proj(x).reshape(heads)), tables)
        v = self.v_proj(x).reshape(heads)
        q, k, v = (constrain(t, self.kernel.mesh, BATCH, None, "tensor") for t in (q, k, v))
        q, k, v = (checkpoint_name(t, "qkv") for t in (q, k, v))
        if cache is not None:
            # HF rotates before the cache write; so do we.
            cache = cache.write(layer, k, v)
        if decoding:
            assert cache is not None
            k, v = cache.read(layer)
        out = attend(q, k, v, valid=valid, causal=not decoding, kernel=self.kernel)
        return self.o_proj(out.reshape(*asking.shape[:2], -1)), cache


class DecoderLayer(nn.Module):
    """A pre-norm transformer layer."""

    config: TextConfig
    dtype: Dtype
    kernel: Kernel

    def setup(self) -> None:
        config = self.config
        self.input_layernorm = RMSNorm(config.rms_norm_eps)
        self.self_attn = Attention(config, self.dtype, self.kernel)
        self.post_attention_layernorm = RMSNorm(config.rms_norm_eps)
        self.mlp = SwiGLU(config.intermediate_size, self.dtype)

    def __call__(
        self, x: jax.Array, cache: Cache | None, *attention: Any, first: int = 0
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T - first, D], the tokens from `first` on, and the cache."""
        tables, valid, layer, decoding = attention
        out, cache = self.self_attn(
            self.input_layernorm(x), tables, valid, cache, layer, decoding, first
        )
        x = x[:, first:]
        x = constrain(x + out, self.kernel.mesh, BATCH)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, self.kernel.mesh, BATCH), cache


class Decoder(nn.Module):
    """Embeddings to final-norm hidden states."""

    config: TextConfig
    num_deepstack: int
    dtype: Dtype
    remat: Remat = "none"
    kernel: Kernel = Kernel()

    def setup(self) -> None:
        config = self.config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size, self.dtype)
        if self.num_deepstack:
            self.layers_deepstack = DecoderLayer(config, self.dtype, self.kernel)
        if self.num_deepstack < config.num_hidden_layers:
            self.layers = DecoderLayer(config, self.dtype, self.kernel)
        self.norm = RMSNorm(config.rms_norm_eps)

    def embed(self, tokens: jax.Array, *, is_rollout: bool = False) -> jax.Array:
        """[B, T] ids to [B, T, D]; the table lies as for training, or as for rollouts."""
        if self.kernel.mesh is None or is_rollout:
            return self.embed_tokens(tokens)
        return self.embed_tokens.by_width(tokens, self.kernel.mesh)

    def __call__(
        self,
        x: jax.Array,  # [B, T, D] embeddings, visual features in place
        positions: jax.Array,  # [3, B, T]
        valid: jax.Array,  # [B, T], or [B, S] where decoding
        deep: jax.Array | None,  # [n_ds, B, T, D], zero at text
        cache: Cache | None,
        *,
        decoding: bool = False,
        layers: Layers | None = None,
        first: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T - first, D] after the final norm, of the tokens from `first` on, and
        the cache with this call written.

        `layers`, of `split_layers`, take the place of the stacked variables of the layers.
        """
        config = self.config
        is_training = layers is None and cache is None and not self.is_initializing()
        if is_training and is_unrolled(self.kernel, self.remat, config.num_hidden_layers):
            layers = unstack(self.variables, *_STACKS)
        tables = mrope_tables(
            positions,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            section=config.mrope_section,
            dtype=jnp.dtype(self.dtype),
            kept=layers is not None and not decoding,
        )

        if layers is not None:
            layer = DecoderLayer(config, self.dtype, self.kernel, parent=None)
            for index, variables in enumerate(layers):
                # The last layer need not answer for the tokens that no one asks for.
                skipped = first if index == len(layers) - 1 else 0
                out = layer.apply(
                    variables, x, cache, tables, valid, index, decoding, first=skipped
                )
                x, cache = cast(tuple[jax.Array, Cache | None], out)
                if deep is not None and index < self.num_deepstack:
                    x = x + deep[index][:, skipped:]
            return self.norm(x), cache

        def body(
            layer: DecoderLayer,
            carry: tuple[jax.Array, Cache | None],
            xs: tuple[jax.Array, jax.Array | None],
        ) -> tuple[tuple[jax.Array, Cache | None], None]:
            x, cache = carry
            index, features = xs
            x, cache = layer(x, cache, tables, valid, index, decoding)
            return (x if features is None else x + features, cache), None

        body = rematerialise(body, self.remat)
        taps, count = self.num_deepstack, config.num_hidden_layers
        carry = (x, cache)
        if taps:
            scan = nn.scan(body, variable_axes=STACKED, split_rngs={"params": True}, length=taps)
            carry, _ = scan(self.layers_deepstack, carry, (jnp.arange(taps), deep))
        if taps < count:
            scan = nn.scan(
                body, variable_axes=STACKED, split_rngs={"params": True}, length=count - taps
            )
            carry, _ = scan(self.layers, carry, (jnp.arange(taps, count), None))
        x, cache = carry
        return self.norm(x[:, first:]), cache
