"""Examples a second and core: draw a board, render it, word it, tokenise it, cut it into patches.

    python benchmarks/data.py

Student prompts of the nano model (one 128 x 128 picture at level 4), and of a 4B-like folder with
256 x 256 pictures where --folder names one. Single-threaded. Prints one JSON line.
"""

import argparse
import json
import pathlib
import time

from mgsd_jax import config as config_lib
from mgsd_jax.data.batching import to_inputs
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.loaders import stream_boards
from mgsd_jax.data.processor import load_processor
from mgsd_jax.data.prompts import BUILT_IN

ROOT = pathlib.Path(__file__).parents[1]
LEVELS = (("frozenlake", 4), ("maze", 4), ("minibehaviour", 5))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=str(ROOT / "mgsd_jax" / "assets" / "nano_base"))
    parser.add_argument("--cell-pixels", type=int, default=32, help="0: 256 x 256 pictures")
    parser.add_argument("--examples", type=int, default=960)
    arguments = parser.parse_args()
    size = 0 if arguments.cell_pixels else 256
    data = config_lib.DataConfig(
        boards=(), picture_size=size, cell_pixels=arguments.cell_pixels, prompt_buckets=(1024,)
    )
    encoder = Encoder(load_processor(arguments.folder), BUILT_IN, data)
    seconds = {}
    for task, level in LEVELS:
        boards = stream_boards([(task, level)], "train", seed=0)
        encoder.student(boards[0])  # sprites and tables are made once
        start = time.process_time()
        for first in range(0, arguments.examples // len(LEVELS), 32):
            rows = [encoder.student(boards[first + i]) for i in range(32)]
            to_inputs(
                rows,
                length=max(len(row.tokens) for row in rows),
                side="left",
                pad_id=encoder.processor.pad_id,
                patch_buckets=(256,),
                max_pictures=1,
            )
        seconds[task] = (time.process_time() - start) / (arguments.examples // len(LEVELS))
    mean = sum(seconds.values()) / len(seconds)
    result = {"examples_per_s_per_core": round(1 / mean, 1)}
    result |= {f"{task}_per_s": round(1 / each, 1) for task, each in seconds.items()}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
