"""The one table between our parameters and the Hugging Face tensors of Qwen3-VL.

Read left to right it imports, right to left it exports.

Axes: V vocabulary, D text width, F text MLP width, Q = N * H query width, KV = K * H key/value
width, H head width; Dv vision width, Fv vision MLP width, Dm = Dv * merge^2 width of a merged
token, C = channels * temporal * patch * patch, n2 positions of the learned table, L layers.

Ours differ from Hugging Face's in two ways. Kernels are [in, out], theirs are [out, in]; layers
of one kind are stacked along a leading L, theirs are separate tensors. The names are those of
the checkpoints on the hub, which transformers 5 also writes.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import numpy as np

from mgsd_jax import tree
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.tree import Tree
from mgsd_jax.weights.files import DTYPES, FloatType

Layout = Literal["same", "transpose", "conv"]

LM_HEAD = "lm_head.weight"
EMBEDDING = "model.language_model.embed_tokens.weight"


class Row(NamedTuple):
    """One kind of tensor: `{i}` counts layers, `{stack}` is the stack that holds layer i."""

    hf: str
    path: str
    layout: Layout
    shape: str  # ours, without the leading L of a stack


def _norm(hf: str, path: str, width: str) -> tuple[Row, ...]:
    return (
        Row(f"{hf}.weight", f"{path}/scale", "same", width),
        Row(f"{hf}.bias", f"{path}/bias", "same", width),
    )


def _linear(hf: str, path: str, shape: str) -> tuple[Row, ...]:
    return (
        Row(f"{hf}.weight", f"{path}/kernel", "transpose", shape),
        Row(f"{hf}.bias", f"{path}/bias", "same", shape.split()[1]),
    )


_VISUAL, _BLOCK = "model.visual", "model.visual.blocks.{i}"
_TAP, _LAYER = "model.visual.deepstack_merger_list.{i}", "model.language_model.layers.{i}"

TABLE: tuple[Row, ...] = (
    Row(f"{_VISUAL}.patch_embed.proj.weight", "visual/patch_embed/kernel", "conv", "C Dv"),
    Row(f"{_VISUAL}.patch_embed.proj.bias", "visual/patch_embed/bias", "same", "Dv"),
    Row(f"{_VISUAL}.pos_embed.weight", "visual/pos_embed/embedding", "same", "n2 Dv"),
    *_norm(f"{_BLOCK}.norm1", "visual/{stack}/norm1", "Dv"),
    *_norm(f"{_BLOCK}.norm2", "visual/{stack}/norm2", "Dv"),
    *_linear(f"{_BLOCK}.attn.qkv", "visual/{stack}/attn/qkv", "Dv 3Dv"),
    *_linear(f"{_BLOCK}.attn.proj", "visual/{stack}/attn/proj", "Dv Dv"),
    *_linear(f"{_BLOCK}.mlp.linear_fc1", "visual/{stack}/mlp/linear_fc1", "Dv Fv"),
    *_linear(f"{_BLOCK}.mlp.linear_fc2", "visual/{stack}/mlp/linear_fc2", "Fv Dv"),
    *_norm(f"{_VISUAL}.merger.norm", "visual/merger/norm", "Dv"),
    *_linear(f"{_VISUAL}.merger.linear_fc1", "visual/merger/linear_fc1", "Dm Dm"),
    *_linear(f"{_VISUAL}.merger.linear_fc2", "visual/merger/linear_fc2", "Dm D"),
    *_norm(f"{_TAP}.norm", "visual/{stack}/norm", "Dm"),  # after the merge, unlike the merger's
    *_linear(f"{_TAP}.linear_fc1", "visual/{stack}/linear_fc1", "Dm Dm"),
    *_linear(f"{_TAP}.linear_fc2", "visual/{stack}/linear_fc2", "Dm D"),
    Row(EMBEDDING, "language/embed_tokens/embedding", "same", "V D"),
    Row(f"{_LAYER}.input_layernorm.weight", "language/{stack}/input_layernorm/scale", "same", "D"),
    Row(
        f"{_LAYER}.post_attention_layernorm.weight",
        "language/{stack}/post_attention_layernorm/scale",
        "same",
        "D",
    ),
    *(
        Row(
            f"{_LAYER}.{module}.{name}.weight",
            f"language/{{stack}}/{module}/{name}/kernel",
            "transpose",
            shape,
        )
        for module, name, shape in (
            ("self_attn", "q_proj", "D Q"),
            ("self_attn", "k_proj", "D KV"),
            ("self_attn", "v_proj", "D KV"),
            ("self_attn", "o_proj", "Q D"),
            ("mlp", "gate_proj", "D F"),
            ("mlp", "up_proj", "D F"),
            ("mlp", "down_proj", "F D"),
        )
    ),
    Row(
        f"{_LAYER}.self_attn.q_norm.weight", "language/{stack}/self_attn/q_norm/scale", "same", "H"
    ),
    Row(
        f"{_LAYER}.self_attn.k_norm.weight", "language/{stack}/self_attn/k_norm/scale", "same", "H"
    ),
    Row("model.language_model.norm.weight", "language/norm/scale", "same", "D"),
    Row(LM_HEAD, "lm_head/embedding", "same", "V D"),  # untied models only
)


@dataclass(frozen=True)
class Leaf:
    """One leaf of our tree and the tensors it is made of."""

    path: str
    names: tuple[str, ...]  # Hugging Face tensors, one a layer where the leaf is stacked
    layout: Layout
    is_stacked: bool
    shape: tuple[int, ...]  # ours, with the leading L where stacked
    hf_shape: tuple[int, ...]  # of each tensor


def leaves(config: ModelConfig) -> tuple[Leaf, ...]:
    """Every leaf of the parameters of `config`, in the order of the table."""
    text, vision = config.text, config.vision
    taps = len(vision.deepstack_visual_indexes)
    merged = vision.hidden_size * vision.spatial_merge_size**2
    conv = (vision.in_channels, vision.temporal_patch_size, vision.patch_size, vision.patch_size)
    sizes = {
        "V": text.vocab_size,
        "D": text.hidden_size,
        "F": text.intermediate_size,
        "Q": text.num_attention_heads * text.head_dim,
        "KV": text.num_key_value_heads * text.head_dim,
        "H": text.head_dim,
        "Dv": vision.hidden_size,
        "3Dv": 3 * vision.hidden_size,
        "Fv": vision.intermediate_size,
        "Dm": merged,
        "C": int(np.prod(conv)),
        "n2": vision.num_position_embeddings,
    }
    stacks = {
        _BLOCK: {"blocks": range(vision.depth)},
        _TAP: {"deepstack_mergers": range(taps)},
        _LAYER: {"layers_deepstack": range(taps), "layers": range(taps, text.num_hidden_layers)},
    }
    found: list[Leaf] = []
    for row in TABLE:
        if row.hf == LM_HEAD and config.tie_word_embeddings:
            continue
        shape = tuple(sizes[size] for size in row.shape.split())
        hf_shape = shape[::-1] if row.layout == "transpose" else shape
        if row.layout == "conv":
            hf_shape = (shape[1], *conv)
        if "{i}" not in row.hf:
            found.append(Leaf(row.path, (row.hf,), row.layout, False, shape, hf_shape))
            continue
        prefix, _, rest = row.hf.partition("{i}")
        for stack, layers in stacks[f"{prefix}{{i}}"].items():
            names = tuple(f"{prefix}{layer}{rest}" for layer in layers)
            if names:
                path = row.path.format(stack=stack)
                found.append(Leaf(path, names, row.layout, True, (len(names), *shape), hf_shape))
    return tuple(found)


def abstract_params(config: ModelConfig, dtype: FloatType) -> Tree:
    """The parameter tree of `config` as `jax.ShapeDtypeStruct`s, without any memory."""
    shapes = (jax.ShapeDtypeStruct(leaf.shape, DTYPES[dtype]) for leaf in leaves(config))
    return tree.nest(zip((leaf.path for leaf in leaves(config)), shapes, strict=True))
