"""How much arithmetic the model asks for, from its configuration: what MFU is measured against.

Matrix products only, a multiply and an add counted as two. Attention is counted in full, not
halved for causality, as kernels without block skipping do it. Compilers' own counts are of no use
here: they count the body of a loop once and a custom kernel not at all.
"""

import jax

from mgsd_jax.model.config import ModelConfig
from mgsd_jax.parallel.chips import CHIPS, GPUS

# Dense bfloat16 peak of one device, FLOP/s, by `jax.Device.device_kind`. Source: makers' sheets.
PEAK = {kind: chip.flops for kind, chip in (CHIPS | GPUS).items()} | {"TPU v4": 275e12}


def forward_flops(config: ModelConfig, *, tokens: int, patches: int, predicted: int) -> float:
    """FLOPs of one row's forward pass: T text tokens, P patches, `predicted` tokens at the head."""
    text, vision = config.text, config.vision
    width, heads = text.hidden_size, text.num_attention_heads * text.head_dim
    kv = text.num_key_value_heads * text.head_dim
    layer = width * (2 * heads + 2 * kv) + 3 * width * text.intermediate_size
    flops = 2.0 * tokens * text.num_hidden_layers * layer
    flops += 4.0 * tokens**2 * heads * text.num_hidden_layers
    flops += 2.0 * predicted * text.vocab_size * width
    if patches:
        eyes = vision.hidden_size
        block = 4 * eyes**2 + 2 * eyes * vision.intermediate_size
        flops += 2.0 * patches * (vision.depth * block + vision.patch_channels * eyes)
        flops += 4.0 * patches**2 * eyes * vision.depth
        merged = eyes * vision.merge_unit
        merger = merged * (merged + vision.out_hidden_size)
        flops += 2.0 * patches / vision.merge_unit * merger * (1 + config.num_deepstack)
    return flops


def decode_flops(config: ModelConfig, *, slots: int) -> float:
    """FLOPs of one more token of one row, over a cache of S slots that is read in full."""
    text = config.text
    attention = 4.0 * slots * text.num_attention_heads * text.head_dim * text.num_hidden_layers
    return forward_flops(config, tokens=1, patches=0, predicted=1) + attention


def peak_flops() -> float | None:
    """The peak of all devices together, None where their kind is not in `PEAK`."""
    kind = jax.devices()[0].device_kind
    return PEAK[kind] * jax.device_count() if kind in PEAK else None
