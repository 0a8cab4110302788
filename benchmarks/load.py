"""Weights out to and in from a Hugging Face folder: GB/s, and host memory beyond the parameters.

    python benchmarks/load.py --workdir=FOLDER

prints one JSON line. The model has the shape of Qwen3-VL with fewer layers, 1 GB by default. Plain
reading, the same bytes into host memory by one `readinto` after another, and loading alternate;
each speed is the best of the rounds. `warm` is from the page cache, where the numbers are those of
the code; `cold` is after dropping the files from it, as a first load is, where they are also those
of the disk. Every kernel is transposed on the way, which reading plainly does not do. On a CPU the
parameters themselves are in host memory; `beyond` is what comes on top, measured in a process of
its own, `largest_tensor` what it is held against. Targets: loading at >= 0.7 times the speed of
plain reading, no more beyond the parameters than the largest tensor. Saving holds a shard (0.5 GB
here) and ends in an fsync: it is about as fast as the disk.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import multiprocessing
import os
import pathlib
import shutil
import threading
import time
from collections.abc import Generator

import jax
import numpy as np

from mgsd_jax import tree
from mgsd_jax.model.config import ModelConfig, TextConfig, VisionConfig
from mgsd_jax.weights import files, hf, table


@dataclasses.dataclass
class Measured:
    """Filled at the end of the block that it measures."""

    seconds: float = 0.0
    peak: int = 0  # bytes of anonymous memory


def anonymous_bytes() -> int:
    """Memory of this process that is not of mapped files, whose pages are a cache."""
    lines = pathlib.Path("/proc/self/status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


@contextlib.contextmanager
def measured() -> Generator[Measured]:
    result, stop = Measured(), threading.Event()

    def watch() -> None:
        while not stop.wait(0.01):
            result.peak = max(result.peak, anonymous_bytes())

    thread = threading.Thread(target=watch)
    thread.start()
    before = time.perf_counter()
    try:
        yield result
    finally:
        result.seconds = time.perf_counter() - before
        stop.set()
        thread.join()


def shape(layers: int) -> ModelConfig:
    """Widths of the 2B model, so that single tensors are of a real size."""
    text = TextConfig(32_768, 2048, 6144, layers, 16, 8, 128, 5e6)
    vision = VisionConfig(4, 1024, 4096, 16, 2048, (0, 1, 2))
    ids = (text.vocab_size - 4, text.vocab_size - 3, text.vocab_size - 2, text.vocab_size - 1)
    return ModelConfig(text, vision, True, *ids)


def read_plainly(folder: pathlib.Path) -> int:
    """Bytes of all weight files, read into arrays as they are."""
    count = 0
    for path in sorted(folder.glob("*.safetensors")):
        values = np.empty(path.stat().st_size, np.uint8)
        with path.open("rb", buffering=0) as file:
            view = values.data
            while len(view):
                view = view[file.readinto(view) :]
        count += values.nbytes
    return count


def forget(folder: pathlib.Path) -> None:
    """Drops the files' pages from the page cache, so that the next read is of the disk."""
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def memory_of_loading(folder: pathlib.Path, layers: int, dtype: files.FloatType) -> int:
    """Host bytes beyond the parameters, to be called in a process that has done nothing else."""
    config = shape(layers)
    jax.block_until_ready(jax.numpy.zeros(1))
    before = anonymous_bytes()
    with measured() as load:
        params = hf.load_params(folder, config, dtype=dtype)
    return load.peak - before - sum(leaf.nbytes for leaf in jax.tree.leaves(params))


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--workdir", required=True)
    parser.add_argument("--layers", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="bfloat16")
    args = parser.parse_args()

    config = shape(args.layers)
    jax.block_until_ready(jax.numpy.zeros(1))
    before_all = anonymous_bytes()
    rng = np.random.default_rng(0)
    params = tree.map_named(
        lambda _, leaf: jax.device_put(rng.random(leaf.shape, np.float32).astype(leaf.dtype)),
        table.abstract_params(config, args.dtype),
    )
    size = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    largest = max(math.prod(leaf.shape[leaf.is_stacked :]) for leaf in table.leaves(config))
    largest *= np.dtype(files.DTYPES[args.dtype]).itemsize
    folder = pathlib.Path(args.workdir) / "weights"
    occupied = before_all + size
    with measured() as save:
        hf.save_params(params, config, folder, dtype=args.dtype, max_shard_bytes=5e8)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    del params
    speeds: dict[str, dict[str, list[float]]] = {
        kind: {"read": [], "load": []} for kind in ("warm", "cold")
    }
    for _ in range(args.rounds):
        for kind, found in speeds.items():
            for name in found:
                if kind == "cold":
                    forget(folder)
                before = time.perf_counter()
                if name == "read":
                    read_plainly(folder)
                else:
                    params = hf.load_params(folder, config, dtype=args.dtype)
                    jax.tree.map(lambda leaf: leaf.delete(), jax.block_until_ready(params))
                found[name].append(size / 1e9 / (time.perf_counter() - before))
    fresh = multiprocessing.get_context("spawn")
    with fresh.Pool(1) as pool:
        beyond = pool.apply(memory_of_loading, (folder, args.layers, args.dtype))
    shutil.rmtree(folder)
    best = {
        f"{name}_{kind}_gb_per_s": round(max(found), 3)
        for kind, both in speeds.items()
        for name, found in both.items()
    }
    ratios = {
        f"load_over_read_{kind}": round(max(both["load"]) / max(both["read"]), 3)
        for kind, both in speeds.items()
    }
    print(
        json.dumps(
            {
                "gigabytes": round(size / 1e9, 3),
                "save_gb_per_s": round(size / 1e9 / save.seconds, 3),
                **best,
                **ratios,
                "save_beyond_gb": round((save.peak - occupied) / 1e9, 3),
                "load_beyond_gb": round(beyond / 1e9, 3),
                "largest_tensor_gb": round(largest / 1e9, 3),
            }
        )
    )


if __name__ == "__main__":
    main()
