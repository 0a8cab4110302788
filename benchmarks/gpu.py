"""A random Qwen3-VL on one GPU: each phase of a distillation step against the limit of the device.

    python benchmarks/gpu.py [--torch] [--out docs/results/gpu_h200.json]   # 4B, bfloat16
    python benchmarks/gpu.py --size nano                                    # seconds, on a CPU

Prefill and decode: tokens a second, and the share of what arithmetic and memory traffic allow at
the device's peaks (preflight/roofline.py). Update: time and MFU, which counts no recomputation; all
parameters are trained where the compiled program fits, else adapters (`trained` says which). Loss:
exact reverse KL, value and gradients, against its four head products alone, measured and at peak.
--torch adds the same phases in torch and transformers, each side in a process of its own. Weights
are random, so rollouts run to their full length. Prints one JSON line; times are medians. On a
device whose peaks are not in chips.py the limits are null.
"""

import argparse
import concurrent.futures
import dataclasses
import functools
import importlib.util
import json
import math
import multiprocessing
import os
import pathlib
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config, LoraConfig
from mgsd_jax.data import batching, positions
from mgsd_jax.data.processor import Encoded, PicturePatches
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import Qwen3VL, init_params
from mgsd_jax.parallel import sharding
from mgsd_jax.parallel.chips import CHIPS, GPUS, Chip
from mgsd_jax.preflight import programs
from mgsd_jax.sampling.sampler import Sampler
from mgsd_jax.stages import distillation
from mgsd_jax.training import losses, optimizer, sessions, trainable
from mgsd_jax.weights.released import find_config

ROOT = pathlib.Path(__file__).parents[1]
GIB = 2.0**30
# (config file, what is set in it): 4B at the lengths of the recipe's prompts, in one microbatch.
SIZES = {
    "4b": (
        "qwen3vl.py:4b",
        ("data.prompt_buckets=(384,)", "data.teacher_buckets=(512,)"),
    ),
    "nano": ("nano.py", ("distillation.optim.trainable=.*",)),
}
ROWS = {"4b": 32, "nano": 4}
RESPONSE = {"4b": 512, "nano": 62}


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--size", choices=tuple(SIZES), help="4b on a GPU, else nano")
    result.add_argument("--rows", type=int, help="prompts at once (4b: 32, nano: 4)")
    result.add_argument("--response", type=int, help="tokens sampled a row (4b: 512, nano: 62)")
    result.add_argument("--rounds", type=int, default=5)
    result.add_argument("--torch", action="store_true", help="the same in torch beside it")
    result.add_argument("--out", help="file for the JSON line")
    return result


def complete(options: argparse.Namespace) -> argparse.Namespace:
    """The options with their defaults for this device."""
    size = options.size or ("4b" if jax.default_backend() == "gpu" else "nano")
    defaults = {"size": size, "rows": ROWS[size], "response": RESPONSE[size]}
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**defaults | given)


def make_config(options: argparse.Namespace) -> Config:
    """The recipe of this size with the options in it."""
    name, settings = SIZES[options.size]
    settings = (
        *settings,
        f"distillation.batch_size={options.rows}",
        "distillation.rollouts=1",
        "distillation.microbatches=1",
        f"distillation.sampling.max_new_tokens={options.response}",
        "preflight.stages=('distillation',)",
    )
    return load_config(str(ROOT / "configs" / name), settings)


def make_prompts(config: Config, model: ModelConfig) -> batching.PromptBatch:
    """Prompts of random text that fill their buckets, the student's with a picture after it."""
    data, rng = config.data, np.random.default_rng(0)
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


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    """Of `rounds` calls, after one that compiles and warms up."""
    jax.block_until_ready(run())
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        jax.block_until_ready(run())
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def share(limit: float | None, seconds: float) -> float | None:
    return None if limit is None else limit / seconds


# --------------------------------------------------------------------------------------- our side


@dataclasses.dataclass(frozen=True)
class Case:
    """What is measured, on which device."""

    config: Config
    model: Qwen3VL
    chip: Chip | None  # None: its peaks are not known
    room: float  # bytes of its memory
    rounds: int

    @property
    def banned(self) -> tuple[int, int]:
        return self.model.config.image_token_id, self.model.config.video_token_id


def ours(options: argparse.Namespace) -> dict[str, Any]:
    """All phases in JAX, and what they were measured on."""
    # By default XLA takes three quarters of a GPU: 4B with its moments needs more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    options = complete(options)
    config = make_config(options)
    device = jax.devices()[0]
    model = programs.make_model(config, config.distillation.student, None)
    room = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    case = Case(config, model, (CHIPS | GPUS).get(device.device_kind), room, options.rounds)
    prompts = jax.device_put(make_prompts(config, model.config))
    make_params = jax.jit(functools.partial(init_params, model.config))
    params = make_params(jax.random.key(0))
    result = {
        "benchmark": "gpu",
        "device": device.device_kind,
        "jax": jax.__version__,
        "size": options.size,
        "rows": options.rows,
        "prompt": prompts.student.tokens.shape[1],
        "teacher_prompt": prompts.teacher.tokens.shape[1],
        "response": options.response,
        "rounds": options.rounds,
        "dtype": config.model.compute_dtype,
        **measure_rollout(case, params, prompts),
    }
    result["update"] = measure_update(case, params, prompts)
    jax.tree.map(lambda leaf: leaf.delete(), params)
    result["loss"] = measure_loss(case, options.rows * options.response)
    return result


def limits(case: Case) -> dict[str, float]:
    """Seconds that each program of a step takes at the least; {} where the chip is not known."""
    if case.chip is None:
        return {}
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    found = programs.programs_of(case.config, mesh)
    return {p.name.partition("/")[2]: max(p.work.seconds(case.chip).values()) for p in found}


def measure_rollout(case: Case, params: Any, prompts: batching.PromptBatch) -> dict[str, Any]:
    """A rollout of one token is the prefill; what a longer one takes more is the decode loop."""
    settings, inputs = case.config.distillation.sampling, prompts.student
    rows, length = inputs.tokens.shape
    width = settings.max_new_tokens

    def seconds(width: int) -> float:
        sampling = dataclasses.replace(settings, max_new_tokens=width)
        sampler = Sampler(case.model, sampling, eos_ids=(), banned_ids=case.banned, pad_id=0)
        key = jax.random.key(0)
        return median_seconds(
            lambda: sampler.rollout({"params": params}, inputs, key, prompts.row_ids), case.rounds
        )

    limit, first = limits(case), seconds(1)
    step = (seconds(width) - first) / (width - 1)
    least = limit["decode"] / width if limit else None
    return {
        "prefill": {
            "seconds": first,
            "tokens_per_s": rows * length / first,
            "limit_seconds": limit.get("prefill"),
            "of_limit": share(limit.get("prefill"), first),
        },
        "decode": {
            "step_seconds": step,
            "tokens_per_s": rows / step,
            "limit_step_seconds": least,
            "of_limit": share(least, step),
        },
    }


def measure_update(case: Case, params: Any, prompts: batching.PromptBatch) -> dict[str, Any]:
    settings, model = case.config.distillation, case.model
    tx = optimizer.make_optimizer(settings.optim, settings.steps)
    update = distillation.make_update(model, model, settings, tx, case.banned)
    shape = (settings.batch_size, settings.sampling.max_new_tokens)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, min(case.banned))
    batch = distillation.DistillationBatch(
        prompts.student, prompts.teacher, tokens, jnp.ones(shape, bool)
    )
    teacher = jax.jit(lambda p: sharding.cast(p, model.dtype))(params)

    def make_state(params: Any, lora: LoraConfig) -> tuple[optimizer.TrainState, Any]:
        trained, frozen = trainable.split(params, settings.optim, lora, jax.random.key(2))
        return optimizer.init(trained, tx), sharding.cast(frozen, model.dtype)

    # All parameters if that fits, else the adapters of the recipe's grounding.
    adapters = dataclasses.replace(case.config.grounding.lora, rank=8)
    for lora in (LoraConfig(), adapters):
        abstract = jax.eval_shape(functools.partial(make_state, lora=lora), params)
        program = update.lower(*abstract, teacher, batch).compile()
        memory = program.memory_analysis()
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        if lora.rank:  # the float32 parameters are the caller's, and stay beside the frozen ones
            needed += sum(leaf.nbytes for leaf in jax.tree.leaves(params))
        if needed < case.room:
            break
    else:
        return {"skipped": f"got {case.room / GIB:.3g} GiB, want {needed / GIB:.3g}"}
    state, frozen = make_state(params, lora)
    held = [state]  # donated: where all parameters are trained, `params` are gone from here on
    del state

    def step() -> Any:
        held[0], measured, _ = program(held[0], frozen, teacher, batch)
        return measured

    seconds = median_seconds(step, case.rounds)
    flops = distillation.update_flops(model, model, batch)
    return {
        "trained": f"adapters of rank {lora.rank}" if lora.rank else "all",
        "seconds": seconds,
        **sessions.speed(flops, 2 * math.prod(shape), seconds),
        "loss": float(step()["loss"].value),
        "needed_gib": needed / GIB,
    }


def measure_loss(case: Case, tokens: int) -> dict[str, Any]:
    """The fused divergence and its gradients, and the four products that it cannot do without."""
    text, chunk = case.model.config.text, min(case.config.distillation.token_chunk, tokens)
    tokens = -(-tokens // chunk) * chunk
    keys = jax.random.split(jax.random.key(3), 5)
    normal = functools.partial(jax.random.normal, dtype=case.model.dtype)
    shapes = ((tokens, text.hidden_size), (text.vocab_size, text.hidden_size))
    hidden, teacher_hidden = (normal(key, shapes[0]) for key in keys[:2])
    table, teacher_table = (normal(key, shapes[1]) * 0.02 for key in keys[2:4])
    targets = jax.random.randint(keys[4], (tokens,), 0, text.vocab_size)
    weights = jnp.full(tokens, 1.0 / tokens)
    settings = dataclasses.replace(case.config.distillation, token_chunk=chunk)

    # All arrays are arguments: the compiler would work out what it is given as constants.
    def loss(hidden: jax.Array, table: jax.Array, *teacher: jax.Array) -> jax.Array:
        return losses.distill(
            hidden, table, teacher[0], teacher[1], weights, settings=settings, targets=targets
        )[0]

    def products(hidden: jax.Array, table: jax.Array, *teacher: jax.Array) -> Any:
        product = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)

        def one(d_table: jax.Array, rows: Any) -> Any:
            mine, other = rows
            both = product("ND,VD->NV", mine, table) + product("ND,VD->NV", other, teacher[1])
            both = both.astype(mine.dtype)
            return d_table + product("NV,ND->VD", both, mine), product("NV,VD->ND", both, table)

        chunks = tuple(x.reshape(-1, chunk, x.shape[-1]) for x in (hidden, teacher[0]))
        return jax.lax.scan(one, jnp.zeros(table.shape, jnp.float32), chunks)

    fused, least = jax.jit(jax.value_and_grad(loss, argnums=(0, 1))), jax.jit(products)
    arrays = (hidden, table, teacher_hidden, teacher_table)
    seconds = median_seconds(lambda: fused(*arrays), case.rounds)
    alone = median_seconds(lambda: least(*arrays), case.rounds)
    bound = 8.0 * tokens * math.prod(shapes[1]) / case.chip.flops if case.chip else None
    return {
        "tokens": tokens,
        "seconds": seconds,
        "products_seconds": alone,
        "of_products": share(alone, seconds),
        "bound_seconds": bound,
        "of_bound": share(bound, seconds),
    }


# ------------------------------------------------------------------------------------- both sides


def theirs(options: argparse.Namespace) -> dict[str, Any]:
    """The phases in torch and transformers, or why they were left out."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return {"skipped": f"got no {' and no '.join(missing)}"}
    import gpu_torch  # optional, and slow to import

    config = make_config(options)
    return gpu_torch.measure(options, config, find_config(config.model.path))


def alone(function: Callable[..., dict[str, Any]], *arguments: Any) -> dict[str, Any]:
    """The function called in a process of its own, which gives all its memory back."""
    fresh = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=fresh) as pool:
        return pool.submit(function, *arguments).result()


def rounded(value: Any) -> Any:
    """Floats to four digits, through all dicts."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def main() -> None:
    options = parser().parse_args()
    result = alone(ours, options)
    if options.torch:
        chosen = {name: result[name] for name in ("size", "rows", "response")}
        result["torch"] = alone(theirs, argparse.Namespace(**vars(options) | chosen))
    line = json.dumps(rounded(result))
    print(line)
    if options.out:
        pathlib.Path(options.out).write_text(line + "\n")


if __name__ == "__main__":
    main()
