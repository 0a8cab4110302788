"""Random parameters and ragged picture-and-text batches for model tests; no torch, no tokenizer."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mgsd_jax.data import positions as positions_lib
from mgsd_jax.data.batch import Inputs, Pictures
from mgsd_jax.model.config import ModelConfig, TextConfig, VisionConfig
from mgsd_jax.model.qwen3vl import init_params

Part = int | tuple[int, int]  # so many text tokens, or a picture of (rows, columns) patches


# Last-token logits of tiny() with random_params(tiny()) for left-padded random_rows of GOLDEN_ROWS.
GOLDEN_ROWS: list[tuple[Part, ...]] = [(2, (4, 4), 3, (6, 8), 4), (5, (2, 4), 2), (11,)]
GOLDEN_IDS = np.array([0, 1, 100, 255])
GOLDEN_LOGITS = np.array(
    [
        [-0.566773, -0.026072, -0.146802, -0.711069],
        [-0.455114, 0.336079, 0.580306, -0.8175],
        [-0.475345, 0.333677, 0.028753, -0.942311],
    ]
)


def tiny(
    *,
    vocab_size: int = 256,
    hidden_size: int = 32,
    num_hidden_layers: int = 3,
    num_attention_heads: int = 4,
    num_key_value_heads: int = 2,
    num_deepstack: int = 2,
    tie_word_embeddings: bool = True,
) -> ModelConfig:
    """Every part of the architecture in a few tens of thousands of parameters."""
    return ModelConfig(
        text=TextConfig(
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            intermediate_size=2 * hidden_size,
            num_hidden_layers=num_hidden_layers,
            num_attention_heads=num_attention_heads,
            num_key_value_heads=num_key_value_heads,
            head_dim=16,
            rope_theta=5_000_000.0,
            mrope_section=(4, 2, 2),
        ),
        vision=VisionConfig(
            depth=3,
            hidden_size=32,
            intermediate_size=48,
            num_heads=2,
            out_hidden_size=hidden_size,
            deepstack_visual_indexes=tuple(range(num_deepstack)),
            num_position_embeddings=64,
            patch_size=4,
        ),
        tie_word_embeddings=tie_word_embeddings,
        image_token_id=vocab_size - 4,
        video_token_id=vocab_size - 3,
        vision_start_token_id=vocab_size - 2,
        vision_end_token_id=vocab_size - 1,
    )


@dataclasses.dataclass(frozen=True)
class Row:
    """One unpadded sequence."""

    tokens: np.ndarray  # [T] int32
    is_visual: np.ndarray  # [T] bool
    grids: tuple[tuple[int, int, int], ...]
    patches: tuple[np.ndarray, ...]  # each [P, C] float32


def random_params(config: ModelConfig, seed: int = 0) -> dict:
    """Parameters drawn by numpy: kernels and tables of std 0.1, biases too, norm scales about 1.

    At transformers' own 0.02 every layer is nearly the identity and mistakes go unseen.
    """
    rng = np.random.default_rng(seed)
    shapes = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))

    def draw(path: tuple, leaf: jax.ShapeDtypeStruct) -> jax.Array:
        centre = 1.0 if path[-1].key == "scale" else 0.0
        return jnp.asarray(centre + 0.1 * rng.standard_normal(leaf.shape), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def random_row(config: ModelConfig, parts: tuple[Part, ...], rng: np.random.Generator) -> Row:
    """A sequence of text runs and pictures, a picture between its start and end tokens."""
    tokens, visual, grids, patches = [], [], [], []
    text_ids = min(config.image_token_id, config.vision_start_token_id)
    for part in parts:
        if isinstance(part, int):
            tokens += rng.integers(0, text_ids, part).tolist()
            visual += [False] * part
            continue
        height, width = part
        count = height * width // config.vision.merge_unit
        tokens += [config.vision_start_token_id, *[config.image_token_id] * count]
        tokens += [config.vision_end_token_id]
        visual += [False, *[True] * count, False]
        grids.append((1, height, width))
        shape = (height * width, config.vision.patch_channels)
        patches.append(rng.standard_normal(shape).astype(np.float32))
    return Row(np.array(tokens, np.int32), np.array(visual), tuple(grids), tuple(patches))


def random_rows(config: ModelConfig, rows: Sequence[tuple[Part, ...]], seed: int = 0) -> list[Row]:
    """One `random_row` for each entry."""
    rng = np.random.default_rng(seed)
    return [random_row(config, parts, rng) for parts in rows]


def to_inputs(
    config: ModelConfig,
    rows: list[Row],
    *,
    side: str,
    length: int | None = None,
    bucket: int | None = None,
    max_pictures: int | None = None,
) -> Inputs:
    """`rows` as one padded batch; `bucket` patches a picture, both at least what is needed."""
    batch, merge = len(rows), config.vision.spatial_merge_size
    length = length or max(len(row.tokens) for row in rows)
    tokens = np.zeros((batch, length), np.int32)
    positions = np.ones((3, batch, length), np.int32)
    valid = np.zeros((batch, length), bool)
    next_position = np.zeros(batch, np.int32)
    slots = np.full((batch, length), -1, np.int32)
    needed = max((len(p) for row in rows for p in row.patches), default=0)
    bucket = bucket or needed
    per_row = max_pictures or max(len(row.grids) for row in rows)
    lead = (batch, per_row, bucket)
    pictures = Pictures(
        patches=np.zeros((*lead, config.vision.patch_channels), np.float32),
        valid=np.zeros(lead, bool),
        interp_index=np.zeros((*lead, 4), np.int32),
        interp_weight=np.zeros((*lead, 4), np.float32),
        coords=np.zeros((*lead, 2), np.int32),
        slots=slots,
    )
    for b, row in enumerate(rows):
        count = len(row.tokens)
        span = slice(length - count, length) if side == "left" else slice(0, count)
        tokens[b, span], valid[b, span] = row.tokens, True
        counts = [positions_lib.token_count(grid, merge) for grid in row.grids]
        image_tokens = np.flatnonzero(np.asarray(row.tokens) == config.image_token_id)
        starts = image_tokens[np.cumsum([0, *counts])[:-1]].tolist()
        positions[:, b, span], next_position[b] = positions_lib.place_positions(
            count, starts, row.grids, merge
        )
        stands = []
        for m, (grid, patches) in enumerate(zip(row.grids, row.patches, strict=True)):
            size = len(patches)
            table = positions_lib.interpolation(
                grid, merge_size=merge, table_side=config.vision.grid_side
            )
            pictures.patches[b, m, :size], pictures.valid[b, m, :size] = patches, True
            pictures.interp_index[b, m, :size] = table.index
            pictures.interp_weight[b, m, :size] = table.weight
            pictures.coords[b, m, :size] = table.coords
            unit = config.vision.merge_unit
            stands += range(m * bucket // unit, m * bucket // unit + size // unit)
        if row.grids:
            slots[b, span][row.is_visual] = stands
    return Inputs(tokens, positions, valid, next_position, pictures if needed else None)
