"""The decoder: two scanned stacks, the first of which adds deepstack features after each layer.

Axes: B batch, T tokens, S cache slots, N query heads, K key/value heads, H head width, D width,
L layers, n_ds deepstack layers.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from mgsd_jax.model import cpu
from mgsd_jax.model.attention import Kernel, attend
from mgsd_jax.model.config import TextConfig
from mgsd_jax.model.cpu import Cache, Layers
from mgsd_jax.model.layers import Embedding, Linear, RMSNorm, SwiGLU
from mgsd_jax.model.remat import Remat, scan_layers
from mgsd_jax.model.rope import Tables, mrope_angles, rotate, turn
from mgsd_jax.parallel.axes import BATCH, WIDTHS, constrain, dividing

STACKS = ("layers_deepstack", "layers")  # of the decoder's layers, in their order


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
        layer: jax.typing.ArrayLike,
        *,
        decoding: bool,
        first: int,
    ) -> tuple[jax.Array, Cache | None]:
        """The output [B, T - first, D], and the cache with keys and values of this layer written.

        Queries are those of the tokens from `first` on. They attend to the keys of this call,
        causally, or with `decoding` to the whole cache.
        """
        asking = x[:, first:]
        wide = self.q_proj(asking)
        if decoding:
            wide = constrain(wide, self.kernel.mesh, "data", None, WIDTHS)
        q = self.q_norm(self._heads(wide, decoding=decoding))
        q = rotate(q, (tables[0][:, first:], tables[1][:, first:]))
        k = rotate(self.k_norm(self._heads(self.k_proj(x), decoding=decoding)), tables)
        v = self._heads(self.v_proj(x), decoding=decoding)
        q, k, v = (constrain(t, self.kernel.mesh, BATCH, None, "tensor") for t in (q, k, v))
        q, k, v = (checkpoint_name(t, "qkv") for t in (q, k, v))
        if cache is not None:
            # HF rotates before the cache write; so do we.
            cache = cache.write(layer, k, v)
        if decoding:
            assert cache is not None
            k, v = cache.read(layer)
        out = attend(q, k, v, valid=valid, causal=not decoding, kernel=self.kernel)
        out = out.reshape(*asking.shape[:2], -1)
        if decoding:
            out = constrain(out, self.kernel.mesh, BATCH, None, "tensor")
            out = constrain(out, self.kernel.mesh, "data", None, WIDTHS)
        return self.o_proj(out), cache

    def _heads(self, x: jax.Array, *, decoding: bool) -> jax.Array:
        """[B, T, heads * H] as [B, T, heads, H]."""
        count, mesh = x.shape[-1] // self.config.head_dim, self.kernel.mesh
        if decoding:
            x = constrain(x, mesh, BATCH, None, dividing(mesh, "tensor", count))
        return x.reshape(*x.shape[:2], count, self.config.head_dim)


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
        self,
        x: jax.Array,
        tables: Tables,
        valid: jax.Array,
        cache: Cache | None,
        layer: jax.typing.ArrayLike,
        *,
        decoding: bool,
        first: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """[B, T - first, D], the tokens from `first` on, and the cache; arguments as above."""
        # Weights are smaller than the activations of whole sequences, and travel to them; those of
        # a few tokens are smaller than the weights, and are the same on all devices of a copy.
        mesh, rows = self.kernel.mesh, "data" if decoding else BATCH
        normed = self.input_layernorm(x)
        if decoding:
            normed = constrain(normed, mesh, rows)
        out, cache = self.self_attn(
            normed, tables, valid, cache, layer, decoding=decoding, first=first
        )
        x = constrain(x[:, first:] + out, mesh, rows)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return constrain(x, mesh, rows), cache


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
        """[B, T] ids to [B, T, D]. The table is sharded as for training, or as for rollouts."""
        mesh = self.kernel.mesh
        if mesh is not None and not is_rollout:
            return self.embed_tokens.by_width(tokens, mesh)
        return constrain(self.embed_tokens(constrain(tokens, mesh, "data")), mesh, "data")

    def __call__(
        self,
        x: jax.Array,  # [B, T, D] embeddings, visual features in place
        positions: jax.Array,  # [3, B, T]
        valid: jax.Array,  # [B, T], or [B, T, S] where decoding
        deep: jax.Array | None,  # [n_ds, B, T, D], zero at text
        cache: Cache | None,
        *,
        decoding: bool = False,
        first: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """Hidden states [B, T - first, D] after the final norm, of the tokens from `first` on, and
        the cache with keys and values of this call written.
        """
        tables = turn(self._angles(positions), jnp.dtype(self.dtype))

        def body(
            layer: DecoderLayer,
            carry: tuple[jax.Array, Cache | None],
            xs: tuple[jax.Array, jax.Array | None],
        ) -> tuple[tuple[jax.Array, Cache | None], None]:
            x, cache = carry
            index, features = xs
            x, cache = layer(x, tables, valid, cache, index, decoding=decoding)
            return (x if features is None else x + features, cache), None

        carry = (x, cache)
        taps, count = self.num_deepstack, self.config.num_hidden_layers
        if taps:
            xs = (jnp.arange(taps), deep)
            stack = self.layers_deepstack
            carry = scan_layers(body, stack, carry, xs, length=taps, remat=self.remat)
        if taps < count:
            xs = (jnp.arange(taps, count), None)
            carry = scan_layers(body, self.layers, carry, xs, length=count - taps, remat=self.remat)
        x, cache = carry
        return self.norm(x[:, first:]), cache

    def one_by_one(
        self,
        x: jax.Array,
        positions: jax.Array,
        valid: jax.Array,
        deep: jax.Array | None,
        cache: Cache | None,
        *,
        layers: Layers | None = None,
        decoding: bool = False,
        first: int = 0,
    ) -> tuple[jax.Array, Cache | None]:
        """As a call, without a scan; `layers` are given where `cpu.split_layers` has split them."""
        layer = DecoderLayer(self.config, self.dtype, self.kernel, parent=None)
        make_tables = turn if decoding else cpu.tables_in_memory
        x, cache = cpu.run_decoder_layers(
            layer,
            cpu.unstack(self.variables, *STACKS) if layers is None else layers,
            x,
            make_tables(self._angles(positions), jnp.dtype(self.dtype)),
            valid,
            deep,
            cache,
            decoding=decoding,
            first=first,
        )
        return self.norm(x), cache

    def _angles(self, positions: jax.Array) -> jax.Array:
        config = self.config
        return mrope_angles(
            positions,
            head_dim=config.head_dim,
            theta=config.rope_theta,
            section=config.mrope_section,
        )
