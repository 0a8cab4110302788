"""The decoder: two scanned stacks, the first of which adds deepstack features after each layer.

Axes: B batch, T tokens, S cache slots, N query heads, K key/value heads, H head width, D width,
L layers, n_ds deepstack layers.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from mgsd_jax.axes import BATCH, constrain
from mgsd_jax.model.attention import Kernel, attend
from mgsd_jax.model.config import TextConfig
from mgsd_jax.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from mgsd_jax.model.remat import Remat, rematerialise
from mgsd_jax.model.rope import Tables, mrope_tables, rotate
from mgsd_jax.model.vision import STACKED


@struct.dataclass
class KVCache:
    """Keys and values of every layer. One slot serves all rows: prompts are left-padded."""

    k: jax.Array  # [L, B, S, K, H]
    v: jax.Array  # [L, B, S, K, H]
    valid: jax.Array  # [B, S] bool, False at padding and at slots not yet written
    length: jax.Array  # [] int32, the next slot to write


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
        cache: KVCache | None,
        layer: jax.Array,
        decoding: bool,
    ) -> tuple[jax.Array, KVCache | None]:
        """The output [B, T, D] and the cache with this layer's keys and values written.

        Queries see the keys just computed, causally, or where `decoding` the whole cache.
        """
        heads = (*x.shape[:2], -1, self.config.head_dim)
        q = rotate(self.q_norm(self.q_proj(x).reshape(heads)), tables)
        k = rotate(self.k_norm(self.k_proj(x).reshape(heads)), tables)
        v = self.v_proj(x).reshape(heads)
        q, k, v = (constrain(t, self.kernel.mesh, BATCH, None, "tensor") for t in (q, k, v))
        q, k, v = (checkpoint_name(t, "qkv") for t in (q, k, v))
        if cache is not None:
            # HF rotates before the cache write; so do we.
            start = (layer, 0, cache.length, 0, 0)
            cache = dataclasses.replace(
                cache,
                k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), start),
                v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), start),
            )
        if decoding:
            assert cache is not None
            k, v = cache.k[layer], cache.v[layer]
        out = attend(q, k, v, valid=valid, causal=not decoding, kernel=self.kernel)
        return self.o_proj(out.reshape(*x.shape[:2], -1)), cache


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
        self, x: jax.Array, cache: KVCache | None, *attention: Any
    ) -> tuple[jax.Array, KVCache | None]:
        tables, valid, layer, decoding = attention
        out, cache = self.self_attn(self.input_layernorm(x), tables, valid, cache, layer, decoding)
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
        cache: KVCache | None,
        *,
        decoding: bool = False,
    ) -> tuple[jax.Array, KVCache | None]:
        """Hidden states [B, T, D] after the final norm, and the cache with this call written."""
        config = self.config
        tables = mrope_tables(
            positions,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            section=config.mrope_section,
            dtype=jnp.dtype(self.dtype),
        )

        def body(
            layer: DecoderLayer,
            carry: tuple[jax.Array, KVCache | None],
            xs: tuple[jax.Array, jax.Array | None],
        ) -> tuple[tuple[jax.Array, KVCache | None], None]:
            x, cache = carry
            index, features = xs
            x, cache = layer(x, cache, tables, valid, index, decoding)
            return (x if features is None else x + features, cache), None

        body = rematerialise(body, self.remat)
        first, layers = self.num_deepstack, config.num_hidden_layers
        carry = (x, cache)
        if first:
            scan = nn.scan(body, variable_axes=STACKED, split_rngs={"params": True}, length=first)
            carry, _ = scan(self.layers_deepstack, carry, (jnp.arange(first), deep))
        if first < layers:
            scan = nn.scan(
                body, variable_axes=STACKED, split_rngs={"params": True}, length=layers - first
            )
            carry, _ = scan(self.layers, carry, (jnp.arange(first, layers), None))
        x, cache = carry
        return self.norm(x), cache
