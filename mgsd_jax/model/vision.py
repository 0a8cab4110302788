"""The vision tower: patches to merged features and deepstack features, one scan over the blocks.

Axes: rows = one picture each, P patches, C patch channels, Q = P / merge^2 merged tokens,
D the decoder's width, n_ds deepstack taps.
"""

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from mgsd_jax.data.batch import Pictures
from mgsd_jax.model import cpu
from mgsd_jax.model.attention import Kernel, attend
from mgsd_jax.model.config import VisionConfig
from mgsd_jax.model.layers import Embedding, LayerNorm, Linear
from mgsd_jax.model.remat import STACKED, Remat, scan_layers
from mgsd_jax.model.rope import Tables, rotate, turn, vision_angles
from mgsd_jax.parallel.axes import BATCH, constrain


class VisionAttention(nn.Module):
    """Self-attention among the valid patches of one picture."""

    config: VisionConfig
    dtype: Dtype
    kernel: Kernel

    @nn.compact
    def __call__(self, x: jax.Array, tables: Tables, valid: jax.Array) -> jax.Array:
        rows, length, width = x.shape
        qkv = Linear(3 * width, use_bias=True, dtype=self.dtype, name="qkv")(x)
        qkv = qkv.reshape(rows, length, 3, self.config.num_heads, self.config.head_dim)
        q, k, v = (
            constrain(qkv[:, :, i], self.kernel.mesh, BATCH, None, "tensor") for i in range(3)
        )
        # HF turns vision queries and keys in float32, text ones in the compute dtype.
        q, k = (rotate(t.astype(jnp.float32), tables).astype(self.dtype) for t in (q, k))
        q, k, v = (checkpoint_name(t, "qkv") for t in (q, k, v))
        out = attend(q, k, v, valid=valid, causal=False, kernel=self.kernel)
        return Linear(width, use_bias=True, dtype=self.dtype, name="proj")(out.reshape(x.shape))


class VisionMLP(nn.Module):
    """fc2(gelu_tanh(fc1(x)))."""

    config: VisionConfig
    dtype: Dtype

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        features = self.config.intermediate_size
        x_wide = Linear(features, use_bias=True, dtype=self.dtype, name="linear_fc1")(x)
        x_wide = nn.gelu(x_wide, approximate=True)
        return Linear(x.shape[-1], use_bias=True, dtype=self.dtype, name="linear_fc2")(x_wide)


class VisionBlock(nn.Module):
    """A pre-norm transformer block."""

    config: VisionConfig
    dtype: Dtype
    kernel: Kernel

    def setup(self) -> None:
        self.norm1 = LayerNorm(self.config.layer_norm_eps)
        self.norm2 = LayerNorm(self.config.layer_norm_eps)
        self.attn = VisionAttention(self.config, self.dtype, self.kernel)
        self.mlp = VisionMLP(self.config, self.dtype)

    def __call__(self, x: jax.Array, tables: Tables, valid: jax.Array) -> jax.Array:
        x = constrain(x + self.attn(self.norm1(x), tables, valid), self.kernel.mesh, BATCH)
        return constrain(x + self.mlp(self.norm2(x)), self.kernel.mesh, BATCH)


class PatchMerger(nn.Module):
    """[rows, P, Dv] to [rows, Q, D]: merge^2 neighbours side by side, then a two-layer MLP."""

    config: VisionConfig
    dtype: Dtype
    norm_after_merge: bool  # the deepstack mergers norm the wide vector, the last one each patch

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        rows, length, width = x.shape
        unit = self.config.merge_unit
        norm = LayerNorm(self.config.layer_norm_eps, name="norm")
        if not self.norm_after_merge:
            x = norm(x)
        x = x.reshape(rows, length // unit, unit * width)
        if self.norm_after_merge:
            x = norm(x)
        x = Linear(unit * width, use_bias=True, dtype=self.dtype, name="linear_fc1")(x)
        x = nn.gelu(x, approximate=False)  # exact here, tanh in the blocks: HF uses both
        features = self.config.out_hidden_size
        return Linear(features, use_bias=True, dtype=self.dtype, name="linear_fc2")(x)


class VisionTower(nn.Module):
    """All pictures of a batch to the features that stand at their tokens."""

    config: VisionConfig
    dtype: Dtype
    remat: Remat = "none"
    kernel: Kernel = Kernel()

    def setup(self) -> None:
        config, dtype = self.config, self.dtype
        self.patch_embed = Linear(config.hidden_size, use_bias=True, dtype=dtype)
        self.pos_embed = Embedding(config.num_position_embeddings, config.hidden_size)
        self.blocks = VisionBlock(config, dtype, self.kernel)
        self.merger = PatchMerger(config, dtype, norm_after_merge=False)
        if config.deepstack_visual_indexes:
            self.deepstack_mergers = PatchMerger(config, dtype, norm_after_merge=True)

    def __call__(self, pictures: Pictures) -> tuple[jax.Array, jax.Array]:
        """Merged features [B, M * Q, D] and deepstack features [n_ds, B, M * Q, D]."""
        config = self.config
        flat, x = self._embed(pictures)
        tables = turn(self._angles(flat), jnp.dtype(jnp.float32))
        tapped = jnp.asarray(config.deepstack_visual_indexes, jnp.int32)

        def body(
            block: VisionBlock, carry: tuple[jax.Array, jax.Array], index: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, taps = carry
            x = block(x, tables, flat.valid)
            # A stack and a `where`, not a list: the blocks share one compiled scan body.
            return (x, jnp.where((tapped == index)[:, None, None, None], x, taps)), None

        x, taps = scan_layers(
            body,
            self.blocks,
            (x, jnp.zeros((tapped.shape[0], *x.shape), x.dtype)),
            jnp.arange(config.depth),
            length=config.depth,
            remat=self.remat,
        )
        merged = self._merge(x, pictures)
        if not config.deepstack_visual_indexes:
            return merged, jnp.zeros((0, *merged.shape), merged.dtype)
        merge_each = nn.vmap(
            lambda merger, tap: merger(tap), variable_axes=STACKED, split_rngs={"params": True}
        )
        deep = merge_each(self.deepstack_mergers, taps)
        return merged, deep.reshape(deep.shape[0], *merged.shape)

    def one_by_one(self, pictures: Pictures) -> tuple[jax.Array, jax.Array]:
        """As a call, without a scan."""
        config = self.config
        flat, x = self._embed(pictures)
        tables = cpu.tables_in_memory(self._angles(flat), jnp.dtype(jnp.float32))
        block = VisionBlock(config, self.dtype, self.kernel, parent=None)
        blocks = cpu.unstack(self.variables, "blocks")
        outputs = cpu.run_blocks(block, blocks, x, tables, flat.valid)
        merged = self._merge(outputs[-1], pictures)
        taps = [outputs[index] for index in config.deepstack_visual_indexes]
        merger = PatchMerger(config, self.dtype, norm_after_merge=True, parent=None)
        mergers = cpu.unstack(self.variables, "deepstack_mergers")
        return merged, cpu.merge_taps(merger, mergers, taps, merged)

    def _embed(self, pictures: Pictures) -> tuple[Pictures, jax.Array]:
        """Pictures as rows [B * M, P, ...], and their embedded patches with position [.., Dv]."""
        rows = pictures.patches.shape[0] * pictures.patches.shape[1]
        flat = jax.tree.map(lambda x: x.reshape(rows, *x.shape[2:]), pictures._replace(slots=None))
        x = self.patch_embed(flat.patches.astype(self.dtype))
        # The learned table is a square grid, read between its points: 4 corners a patch.
        corners = self.pos_embed(flat.interp_index)  # [rows, P, 4, Dv]
        x += jnp.einsum("BPID,BPI->BPD", corners, flat.interp_weight).astype(self.dtype)
        return flat, x

    def _angles(self, flat: Pictures) -> jax.Array:
        return vision_angles(
            flat.coords, head_dim=self.config.head_dim, theta=self.config.rope_theta
        )

    def _merge(self, x: jax.Array, pictures: Pictures) -> jax.Array:
        """The last block's output [B * M, P, Dv] to features [B, M * Q, D]."""
        batch = pictures.patches.shape[0]
        return self.merger(x).reshape(batch, -1, self.config.out_hidden_size)
