"""The vision tower: patches to merged features and deepstack features, one scan over the blocks.

Axes: rows = one picture each, P patches, C patch channels, Q = P / merge^2 merged tokens,
D the decoder's width, n_ds deepstack taps.
"""

from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.ad_checkpoint import checkpoint_name

from mgsd_jax.data.batch import Pictures
from mgsd_jax.model.attention import Kernel, attend
from mgsd_jax.model.config import VisionConfig
from mgsd_jax.model.layers import Embedding, LayerNorm, Linear
from mgsd_jax.model.remat import Remat, rematerialise
from mgsd_jax.model.rope import Tables, rotate, vision_tables
from mgsd_jax.model.unrolled import is_unrolled, unstack
from mgsd_jax.parallel.axes import BATCH, constrain

# Collections that carry a leading layer axis in a stack.
STACKED: dict[Any, Any] = {"params": 0, "adapters": 0}


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
        batch, per_row, length, _ = pictures.patches.shape
        flat = jax.tree.map(
            lambda x: x.reshape(batch * per_row, length, *x.shape[3:]),
            pictures._replace(slots=None),
        )
        x = self.patch_embed(flat.patches.astype(self.dtype))
        table_rows = self.pos_embed(flat.interp_index)  # [rows, P, 4, Dv]
        x += jnp.einsum("BPID,BPI->BPD", table_rows, flat.interp_weight).astype(self.dtype)
        one_by_one = not self.is_initializing() and is_unrolled(
            self.kernel, self.remat, config.depth
        )
        run = self._run_each_block if one_by_one else self._run_blocks
        x, taps = run(x, flat)
        merged = self.merger(x).reshape(batch, -1, config.out_hidden_size)
        if not config.deepstack_visual_indexes:
            return merged, jnp.zeros((0, *merged.shape), merged.dtype)
        if one_by_one:
            merger = PatchMerger(config, self.dtype, norm_after_merge=True, parent=None)
            mergers = unstack(self.variables, "deepstack_mergers")
            each = [merger.apply(*pair) for pair in zip(mergers, taps, strict=True)]
            deep = jnp.stack(cast(list[jax.Array], each))
        else:
            merge_each = nn.vmap(
                lambda merger, tap: merger(tap), variable_axes=STACKED, split_rngs={"params": True}
            )
            deep = merge_each(self.deepstack_mergers, taps)
        return merged, deep.reshape(deep.shape[0], *merged.shape)

    def _run_each_block(self, x: jax.Array, flat: Pictures) -> tuple[jax.Array, list[jax.Array]]:
        """As `_run_blocks`, the tapped outputs in a list."""
        config = self.config
        tables = vision_tables(
            flat.coords, head_dim=config.head_dim, theta=config.rope_theta, kept=True
        )
        block = VisionBlock(config, self.dtype, self.kernel, parent=None)
        outputs = []
        for variables in unstack(self.variables, "blocks"):
            x = cast(jax.Array, block.apply(variables, x, tables, flat.valid))
            outputs.append(x)
        return x, [outputs[index] for index in config.deepstack_visual_indexes]

    def _run_blocks(self, x: jax.Array, flat: Pictures) -> tuple[jax.Array, jax.Array]:
        """The last block's output, and the outputs of the tapped blocks [n_ds, rows, P, Dv]."""
        config = self.config
        tables = vision_tables(flat.coords, head_dim=config.head_dim, theta=config.rope_theta)
        tapped = jnp.asarray(config.deepstack_visual_indexes, jnp.int32)

        def body(
            block: VisionBlock, carry: tuple[jax.Array, jax.Array], index: jax.Array
        ) -> tuple[tuple[jax.Array, jax.Array], None]:
            x, taps = carry
            x = block(x, tables, flat.valid)
            # A stack and a `where`, not a list: the blocks share one compiled scan body.
            taps = jnp.where((tapped == index)[:, None, None, None], x, taps)
            return (x, taps), None

        scan = nn.scan(
            rematerialise(body, self.remat),
            variable_axes=STACKED,
            split_rngs={"params": True},
            length=config.depth,
        )
        taps = jnp.zeros((tapped.shape[0], *x.shape), x.dtype)
        (x, taps), _ = scan(self.blocks, (x, taps), jnp.arange(config.depth))
        return x, taps
