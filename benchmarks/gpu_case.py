"""What gpu.py measures: sizes, the recipe with the options in it, prompts of random text."""

import argparse
import math
import pathlib

import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data import batching, positions
from mgsd_jax.data.processor import Encoded, PicturePatches
from mgsd_jax.weights.released import find_config

ROOT = pathlib.Path(__file__).parents[1]
# (config file, what is set in it): 4B at the lengths of the recipe's prompts, in one microbatch.
SIZES = {
    "4b": (
        "qwen3vl.py:4b",
        (
            "data.prompt_buckets=(384,)",
            "data.teacher_buckets=(512,)",
            "data.patch_buckets=(256,)",
        ),
    ),
    "nano": (
        "nano.py",
        (
            "data.prompt_buckets=(44,)",
            "data.teacher_buckets=(44,)",
            "data.patch_buckets=(100,)",
            "distillation.optim.trainable=.*",
        ),
    ),
}
ROWS = {"4b": 32, "nano": 4}
# Response tokens: of rollouts and the loss, and of the updates of --all.
RESPONSE = {"4b": 512, "nano": 62}
UPDATES = {"4b": (512, 2048, 256), "nano": (62, 124, 31)}


def make_config(options: argparse.Namespace) -> Config:
    """The recipe of this size with the options in it."""
    name, settings = SIZES[options.size]
    settings = (
        *settings,
        f"distillation.batch_size={options.rows}",
        "distillation.rollouts=1",
        "distillation.grounding_share=0",
        "distillation.microbatches=1",
        "distillation.response_buckets=()",
        f"distillation.sampling.max_new_tokens={options.response}",
        "preflight.stages=('distillation',)",
    )
    return load_config(str(ROOT / "configs" / name), settings)


def make_prompts(config: Config) -> batching.PromptBatch:
    """Prompts of random text that fill their buckets, the student's with a picture after it."""
    data, rng = config.data, np.random.default_rng(0)
    model = find_config(config.model.path)
    side = math.isqrt(config_lib.sizes(data.patch_buckets)[-1])
    grid, merge = (1, side, side), model.vision.spatial_merge_size
    where = positions.interpolation(grid, merge_size=merge, table_side=model.vision.grid_side)
    count = positions.token_count(grid, merge)
    ids = (model.image_token_id, model.video_token_id, model.vision_start_token_id)

    def text(length: int) -> np.ndarray:
        return rng.integers(0, min(ids), length).astype(np.int32)

    def student() -> Encoded:
        tokens = text(config_lib.sizes(data.prompt_buckets)[-1])
        start = len(tokens) - count - 8  # what the chat template writes after the picture
        tokens[start - 1], tokens[start + count] = ids[2], model.vision_end_token_id
        tokens[start : start + count] = model.image_token_id
        patches = rng.standard_normal((side * side, model.vision.patch_channels), np.float32)
        return Encoded(tokens, (PicturePatches(patches, grid, start, merge, where),))

    rows = range(config.distillation.batch_size)
    return batching.prompt_batch(
        [student() for _ in rows],
        [Encoded(text(config_lib.sizes(data.teacher_buckets)[-1]), ()) for _ in rows],
        student_length=config_lib.sizes(data.prompt_buckets)[-1],
        teacher_length=config_lib.sizes(data.teacher_buckets)[-1],
        pad_id=0,
        patch_buckets=config_lib.sizes(data.patch_buckets),
        max_pictures=1,
    )
