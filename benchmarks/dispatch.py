"""What calling each jitted program of a run costs the host, apart from what the program computes.

    python benchmarks/dispatch.py

The programs of the 4B recipe (configs/qwen3vl.py:4b: the same functions, trees and numbers of
arrays, the state donated) with every width made tiny, so that little is computed; each is called on
zeros, `--calls` times. `ms` is the median, `least_ms` the least: the computation starts while the
call still wraps its results, and on a machine of few cores takes the core away from it. The host's
caches are then as they are where a device does the computing. Where the CPU is the device they hold
what was computed last: `after_compute_ms` is the median right after two matrices of 256 MiB were
added. Prints one JSON line. Target: 1 ms each.
"""

import argparse
import dataclasses
import json
import pathlib
import runpy
import statistics
import tempfile
import time
from typing import Any

import jax
import jax.numpy as jnp

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.parallel import sharding
from mgsd_jax.preflight.programs import Program, programs_of
from mgsd_jax.weights.released import RELEASED

RECIPE = pathlib.Path(__file__).parent.parent / "configs" / "qwen3vl.py"
TINY = (
    "data.prompt_buckets=(16,)",
    "data.teacher_buckets=(16,)",
    "data.sequence_buckets=(16,)",
    "data.patch_buckets=(16,)",
    "grounding.batch_size=1",
    "grounding.microbatches=1",
    "distillation.batch_size=1",
    "distillation.microbatches=1",
    "distillation.sampling.max_new_tokens=4",
)


def tiny(model: ModelConfig) -> ModelConfig:
    """The same layers and arrays, a few numbers wide."""
    text = dataclasses.replace(
        model.text,
        vocab_size=64,
        hidden_size=8,
        intermediate_size=8,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=8,
        mrope_section=(2, 1, 1),
    )
    vision = dataclasses.replace(
        model.vision, hidden_size=8, intermediate_size=8, num_heads=1, out_hidden_size=8
    )
    return dataclasses.replace(
        model,
        text=text,
        vision=vision,
        image_token_id=60,
        video_token_id=61,
        vision_start_token_id=62,
        vision_end_token_id=63,
    )


def fill(argument: Any) -> Any:
    """Zeros where an argument is a shape, and what it is where it is not."""
    if not isinstance(argument, jax.ShapeDtypeStruct):
        return argument
    if jnp.issubdtype(argument.dtype, jax.dtypes.prng_key):
        return jax.device_put(jax.random.key(0), argument.sharding)
    return jax.device_put(jnp.zeros(argument.shape, argument.dtype), argument.sharding)


def measure(program: Program, calls: int) -> dict[str, Any]:
    """Arrays in and out of one program, and the medians of its calls."""
    matrices = jnp.ones((2, 8192, 8192))
    add = jax.jit(lambda pair: pair[0] + pair[1])

    def call(*, computes: bool) -> float:
        arguments = jax.block_until_ready(jax.tree.map(fill, program.arguments))
        if computes:
            jax.block_until_ready(add(matrices))
        start = time.perf_counter()
        out = program.jitted(*arguments)
        taken = time.perf_counter() - start
        jax.block_until_ready(out)
        return 1e3 * taken

    call(computes=True)  # compiles
    lowered = program.lower()
    times = [call(computes=False) for _ in range(calls)]
    return {
        "arrays_in": len(jax.tree.leaves(lowered.args_info)),
        "arrays_out": len(jax.tree.leaves(lowered.out_info)),
        "ms": round(statistics.median(times), 3),
        "least_ms": round(min(times), 3),
        "after_compute_ms": round(statistics.median(call(computes=True) for _ in range(calls)), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=30)
    options = parser.parse_args()
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder:
        model = tiny(RELEASED["Qwen3-VL-4B-Instruct"])
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(model.to_hf()))
        recipe: Config = runpy.run_path(str(RECIPE))["get_config"]()
        config = config_lib.override(recipe, [f"model.path={folder}", *TINY])
        found = {p.name: measure(p, options.calls) for p in programs_of(config, mesh)}
    print(
        json.dumps(
            {
                "worst_ms": max(program["ms"] for program in found.values()),
                "programs": found,
                "device": jax.devices()[0].device_kind,
            }
        )
    )


if __name__ == "__main__":
    main()
