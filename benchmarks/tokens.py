"""The lengths of prompts, records and answers of the recipes' levels, in a checkpoint's own tokens.

    python benchmarks/tokens.py --folder models/Qwen3-VL-4B-Instruct

Needs the folder's tokenizer and settings, no weights. Prints one JSON line: the most tokens by
level and kind (a prompt of a mode, a teacher's by context, a grounding record, a right response),
the largest bucket of configs/qwen3vl.py that has to hold each of them, and by kind what a typical
batch of 32 boards has: the median over batches of its mean, and of its longest, and the share of
the batches whose longest fits into each of some buckets.
"""

import argparse
import json
import pathlib
import runpy
from collections.abc import Iterator
from typing import get_args

import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.loaders import stream_boards
from mgsd_jax.data.processor import load_processor
from mgsd_jax.data.prompts import BUILT_IN
from mgsd_jax.data.records import RECORDS
from mgsd_jax.sampling import answers

ROOT = pathlib.Path(__file__).parents[1]
ROWS = 32  # of a batch
SIZES = (320, 384, 512, 576)  # of buckets


def lengths(encoder: Encoder, board: Board, rng: np.random.Generator) -> Iterator[tuple[str, int]]:
    """(kind, tokens) of everything that is made of a board."""
    for mode in get_args(config_lib.Mode):
        yield mode, len(answers.encode_prompt(encoder, board, mode).tokens)
    for context in get_args(config_lib.TeacherContext):
        yield context, len(encoder.teacher(board, context).tokens)
    for kind in RECORDS:
        yield kind, len(encoder.record(board, kind, rng)[0].tokens)
    yield "response", len(encoder.reference(board, rng))


def typical(
    pool: dict[str, list[tuple[float, int]]], rows: int = ROWS, batches: int = 2000
) -> dict[str, dict[str, float]]:
    """Of batches of `rows` boards, drawn by their weights: what the usual one holds, by kind.

    `pool` has (weight, tokens) of some boards of every level.
    """
    found = {}
    for kind, drawn in pool.items():
        weights, tokens = (np.array(values) for values in zip(*drawn, strict=True))
        rng = np.random.default_rng(0)
        rows_of = rng.choice(tokens, (batches, rows), p=weights / weights.sum())
        longest = rows_of.max(axis=1)
        found[kind] = {
            "mean": round(float(np.median(rows_of.mean(axis=1))), 1),
            "longest": int(np.median(longest)),
            **{f"within_{size}": round(float((longest <= size).mean()), 3) for size in SIZES},
        }
    return found


def rooms(config: config_lib.Config) -> dict[str, int]:
    """The most tokens that a recipe has room for, by kind."""
    data = config.data
    prompt, teacher, record = map(
        lambda buckets: max(config_lib.sizes(buckets)),
        (data.prompt_buckets, data.teacher_buckets, data.sequence_buckets),
    )
    return {
        **dict.fromkeys(get_args(config_lib.Mode), prompt),
        **dict.fromkeys(("text", *get_args(config_lib.TeacherContext)), teacher),
        **dict.fromkeys(RECORDS, record),
        "response": config.distillation.sampling.max_new_tokens,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", required=True)
    parser.add_argument("--boards", type=int, default=30, help="of each level")
    arguments = parser.parse_args()
    config = runpy.run_path(str(ROOT / "configs" / "qwen3vl.py"))["get_config"]()
    encoder = Encoder(load_processor(arguments.folder), BUILT_IN, config.data)
    longest: dict[str, dict[str, int]] = {}
    pool: dict[str, list[tuple[float, int]]] = {}
    for levels in config.data.boards:
        for level in levels.levels:
            name, rng = f"{levels.task} {level}", np.random.default_rng(0)
            drawn = stream_boards([(levels.task, level)], "train", seed=0, count=arguments.boards)
            for board in drawn:
                for kind, count in lengths(encoder, board, rng):
                    kinds = longest.setdefault(name, {})
                    kinds[kind] = max(kinds.get(kind, 0), count)
                    pool.setdefault(kind, []).append((levels.train, count))
    print(json.dumps({"room": rooms(config), "longest": longest, "batch": typical(pool)}))


if __name__ == "__main__":
    main()
