"""Generated tokens a second of our rollout and of transformers' generate, on the same weights.

    python benchmarks/rollout.py --batch 8 --batch 32

A random 7 M Qwen3-VL, float32, one 256 x 256 picture a row (64 visual tokens), prompts of 114
tokens, greedy, no end token. Both encode the pictures, prefill and decode; runs alternate, so that
other load falls on both. Prints one JSON line a batch size: medians by wall and by CPU time, and
the median of the ratios of neighbouring runs. On a machine with other load only the ratio by CPU
time means something, and only on one core (`taskset -c 0 python ...`): torch's threads spin while
they wait for each other. Needs torch and transformers. Tokens are compared, not only timed.

    python benchmarks/rollout.py --draft --workdir runs/quickstart

With --draft, rollouts of the nano recipe with and without guesses of a right response
(`sampling.draft_tokens`), of the base that ships, and of both students that --workdir holds. One
JSON line a student: tokens kept a pass of the model by segment, passes, the share of equal tokens
(1.0 in float32), and the time against plain rollouts.
"""

import argparse
import json
import pathlib
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Any

import drafts
import jax
import numpy as np
import torch
from transformers import Qwen3VLForConditionalGeneration

from mgsd_jax.config import SamplingConfig
from mgsd_jax.data import positions as positions_lib
from mgsd_jax.data.batch import Inputs, Pictures
from mgsd_jax.model.config import ModelConfig, TextConfig, VisionConfig
from mgsd_jax.model.qwen3vl import Qwen3VL, init_params
from mgsd_jax.sampling.sampler import Sampler
from mgsd_jax.weights import hf

CONFIG = ModelConfig(
    text=TextConfig(
        vocab_size=2048,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        rope_theta=5_000_000.0,
        mrope_section=(12, 10, 10),
    ),
    vision=VisionConfig(
        depth=4,
        hidden_size=128,
        intermediate_size=512,
        num_heads=4,
        out_hidden_size=256,
        deepstack_visual_indexes=(0, 1, 2),
    ),
    tie_word_embeddings=True,
    image_token_id=2047,
    video_token_id=2046,
    vision_start_token_id=2045,
    vision_end_token_id=2044,
)
GRID = (1, 16, 16)
PAD = 0


def random_params(seed: int) -> dict[str, Any]:
    """Five times the usual spread, so that the greedy tokens differ from step to step."""
    params = init_params(CONFIG, jax.random.key(seed))
    return jax.tree.map(lambda leaf: leaf * 5 if leaf.std() > 0 else leaf, params)


def make_inputs(batch: int, rng: np.random.Generator) -> Inputs:
    """`batch` prompts of 16 text tokens, a picture, 32 text tokens."""
    vision, merge = CONFIG.vision, CONFIG.vision.spatial_merge_size
    count = positions_lib.token_count(GRID, merge)
    tokens = rng.integers(0, 2000, (batch, 16 + count + 2 + 32)).astype(np.int32)
    tokens[:, 16] = CONFIG.vision_start_token_id
    tokens[:, 17 : 17 + count] = CONFIG.image_token_id
    tokens[:, 17 + count] = CONFIG.vision_end_token_id
    positions, after = positions_lib.place_positions(tokens.shape[1], [17], [GRID], merge)
    table = positions_lib.interpolation(GRID, merge_size=merge, table_side=vision.grid_side)
    slots = np.full(tokens.shape, -1, np.int32)
    slots[:, 17 : 17 + count] = np.arange(count)
    patches = rng.standard_normal((batch, 1, GRID[1] * GRID[2], vision.patch_channels))

    def each_row(x: np.ndarray) -> np.ndarray:
        return np.broadcast_to(x, (batch, 1, *x.shape))

    return Inputs(
        tokens=tokens,
        positions=np.repeat(positions[:, None], batch, axis=1),
        valid=np.ones(tokens.shape, bool),
        next_position=np.full(batch, after, np.int32),
        pictures=Pictures(
            patches=patches.astype(np.float32),
            valid=np.ones(patches.shape[:3], bool),
            interp_index=each_row(table.index),
            interp_weight=each_row(table.weight),
            coords=each_row(table.coords),
            slots=slots,
        ),
    )


def our_runner(params: dict[str, Any], inputs: Inputs, width: int) -> Callable[[], np.ndarray]:
    sampler = Sampler(
        Qwen3VL(CONFIG),
        SamplingConfig(width, temperature=0.0),
        eos_ids=(),
        banned_ids=(CONFIG.image_token_id, CONFIG.video_token_id),
        pad_id=PAD,
    )
    inputs, row_ids = jax.device_put((inputs, np.arange(len(inputs.tokens))))
    key = jax.random.key(0)
    return lambda: np.asarray(sampler.rollout({"params": params}, inputs, key, row_ids).tokens)


def their_runner(model: Any, inputs: Inputs, width: int) -> Callable[[], np.ndarray]:
    assert inputs.pictures is not None
    batch, length = inputs.tokens.shape
    patches = inputs.pictures.patches.reshape(-1, CONFIG.vision.patch_channels)
    arguments = {
        "input_ids": torch.from_numpy(inputs.tokens.astype(np.int64)),
        "attention_mask": torch.ones(batch, length, dtype=torch.int64),
        "mm_token_type_ids": torch.from_numpy((inputs.pictures.slots >= 0).astype(np.int64)),
        "pixel_values": torch.from_numpy(patches),
        "image_grid_thw": torch.tensor([GRID] * batch),
    }
    options = {
        "max_new_tokens": width,
        "do_sample": False,
        "eos_token_id": None,
        "pad_token_id": PAD,
        "suppress_tokens": [CONFIG.image_token_id, CONFIG.video_token_id],
    }
    return lambda: model.generate(**arguments, **options)[:, length:].numpy()


def seconds(run: Callable[[], np.ndarray]) -> tuple[float, float]:
    """Wall seconds and CPU seconds of all threads of this process."""
    wall, cpu = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - wall, time.process_time() - cpu


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, action="append", help="prompts at once; repeatable")
    parser.add_argument("--new-tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--draft", action="store_true", help="drafts on the nano recipe instead")
    parser.add_argument("--workdir", help="--draft: a run of the nano recipe")
    parser.add_argument("--guesses", type=int, nargs="+", default=[3, 7, 15], help="--draft: K")
    parser.add_argument("--batches", type=int, default=2, help="--draft: of 64 prompts")
    arguments = parser.parse_args()
    if arguments.draft:
        for line in drafts.lines(arguments):
            print(json.dumps(line), flush=True)
        return
    if not arguments.batch:
        parser.error("--batch or --draft is required")
    params = random_params(0)
    with tempfile.TemporaryDirectory() as folder:
        hf.save_params(params, CONFIG, folder, dtype="float32")
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(CONFIG.to_hf()))
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    for batch in arguments.batch:
        inputs = make_inputs(batch, np.random.default_rng(0))
        ours = our_runner(params, inputs, arguments.new_tokens)
        theirs = their_runner(model, inputs, arguments.new_tokens)
        agree = float((ours() == theirs()).mean())  # also compiles and warms up
        times = [(seconds(ours), seconds(theirs)) for _ in range(arguments.rounds)]
        result = {
            "batch": batch,
            "new_tokens": arguments.new_tokens,
            "rounds": arguments.rounds,
            "equal_tokens": agree,
            "device": jax.devices()[0].device_kind,
        }
        for kind, name in enumerate(("tokens_per_s", "tokens_per_cpu_s")):
            pairs = [(a[kind], b[kind]) for a, b in times]
            for side, who in enumerate(("ours", "transformers")):
                middle = statistics.median(pair[side] for pair in pairs)
                result[f"{who}_{name}"] = round(batch * arguments.new_tokens / middle, 1)
            result[f"ratio_{name}"] = round(statistics.median(b / a for a, b in pairs), 3)
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
