"""How much arithmetic the model needs, from its configuration: what MFU is measured against.

Counted are matrix products only, a multiply and an add as two. Attention is counted in full, not
halved for causality, as kernels that do not skip blocks compute it. Compilers' own counts are of no
use here: they count the body of a loop once and a custom kernel not at all.
"""

import jax

from mgsd_jax.model.config import ModelConfig
from mgsd_jax.parallel.chips import CHIPS, GPUS

# Dense bfloat16 peak of one device, FLOP/s, by `jax.Device.device_kind`. Source: makers' sheets.
PEAK = {kind: chip.flops for kind, chip in (CHIPS | GPUS).items()} | {"TPU v4": 275e12}


def layer_weights(config: ModelConfig) -> int:
    """The number of weights in the matrices of one layer of the decoder."""
    text = config.text
    heads, kv = (n * text.head_dim for n in (text.num_attention_heads, text.num_key_value_heads))
    return text.hidden_size * (2 * heads + 2 * kv + 3 * text.intermediate_size)


def block_weights(config: ModelConfig) -> int:
    """The number of weights in the matrices of one block of the vision tower."""
    vision = config.vision
    return vision.hidden_size * (4 * vision.hidden_size + 2 * vision.intermediate_size)


def forward_flops(config: ModelConfig, *, tokens: int, patches: int, predicted: int) -> float:
    """FLOPs of one row's forward pass: T text tokens, P patches, `predicted` tokens at the head."""
    text, vision = config.text, config.vision
    flops = 2.0 * tokens * text.num_hidden_layers * layer_weights(config)
    flops += tokens * attention_flops(config, tokens)
    flops += 2.0 * predicted * text.vocab_size * text.hidden_size
    if patches:
        eyes = vision.hidden_size
        weights = vision.depth * block_weights(config) + vision.patch_channels * eyes
        flops += 2.0 * patches * weights
        flops += 4.0 * patches**2 * eyes * vision.depth
        merged = eyes * vision.merge_unit
        merger = merged * (merged + vision.out_hidden_size)
        flops += 2.0 * patches / vision.merge_unit * merger * (1 + config.num_deepstack)
    return flops


def named_flops(config: ModelConfig, tokens: int) -> float:
    """FLOPs of what `remat.SAVED` names in a row's forward pass: q, k, v and attention."""
    text = config.text
    heads = (text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    projections = 2.0 * text.num_hidden_layers * text.hidden_size * heads
    return tokens * (projections + attention_flops(config, tokens))


def attention_flops(config: ModelConfig, keys: int) -> float:
    """FLOPs of one token's attention over S keys in all layers of the decoder."""
    text = config.text
    return 4.0 * keys * text.num_attention_heads * text.head_dim * text.num_hidden_layers


def peak_flops() -> float | None:
    """The peak of all devices together, None if their kind is not in `PEAK`."""
    kind = jax.devices()[0].device_kind
    return PEAK[kind] * jax.device_count() if kind in PEAK else None
