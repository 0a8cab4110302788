"""The phases of gpu.py in JAX: each is called in a process of its own, which gives all memory back.

A phase is a function of the completed options of gpu.py; it returns its part of the result.
"""

import argparse
import dataclasses
import functools
import math
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from gpu_case import make_config, make_prompts

from mgsd_jax.config import Config, LoraConfig, SamplingConfig
from mgsd_jax.data import batching
from mgsd_jax.model.qwen3vl import Qwen3VL, init_params
from mgsd_jax.parallel import sharding
from mgsd_jax.parallel.chips import CHIPS, GPUS, Chip
from mgsd_jax.preflight import programs, roofline
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import distillation_step
from mgsd_jax.training import losses, optimizer, sessions, trainable
from mgsd_jax.workdir import compiled

GIB = 2.0**30


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


def describe(options: argparse.Namespace) -> dict[str, Any]:
    """The device, and the size of the model for it where none is given."""
    return {
        "backend": jax.default_backend(),
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
    }


def make_case(options: argparse.Namespace) -> Case:
    # By default XLA takes three quarters of a GPU: 4B with its moments needs more.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.95")
    compiled.keep(None, ".", os.environ)  # a phase finds what the one before has compiled
    config = make_config(options)
    device = jax.devices()[0]
    room = (device.memory_stats() or {}).get("bytes_limit", math.inf)
    chip = (CHIPS | GPUS).get(device.device_kind)
    model = programs.make_model(config, config.distillation.student, None)
    return Case(config, model, chip, room, options.rounds)


def make_params(case: Case) -> Any:
    """Random parameters, float32."""
    return jax.jit(functools.partial(init_params, case.model.config))(jax.random.key(0))


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


def limits(case: Case) -> dict[str, float]:
    """Seconds that each program of a step takes at the least; {} where the chip is not known."""
    if case.chip is None:
        return {}
    mesh = sharding.make_mesh(data=1, fsdp=1, tensor=1, devices=jax.devices()[:1])
    found = programs.programs_of(case.config, mesh)
    alone = [(p.name, p.work.seconds(case.chip, ())) for p in found]
    return {name.partition("/")[2]: roofline.roofline(parts) for name, parts in alone}


# ----------------------------------------------------------------------------------------- phases


def rollout(options: argparse.Namespace) -> dict[str, Any]:
    """A rollout of one token is the prefill; what a longer one takes more is the decode loop."""
    case = make_case(options)
    params, prompts = make_params(case), jax.device_put(make_prompts(case.config))
    settings = case.config.distillation.sampling
    rows, length = prompts.student.tokens.shape
    width = settings.max_new_tokens

    def seconds(width: int) -> float:
        run = runner(case, params, prompts, dataclasses.replace(settings, max_new_tokens=width))
        return median_seconds(run, case.rounds)

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


def runner(
    case: Case, params: Any, prompts: batching.PromptBatch, sampling: SamplingConfig
) -> Callable[..., Rollout]:
    """A call, of a draft or none, that samples responses without an end."""
    sampler = Sampler(case.model, sampling, eos_ids=(), banned_ids=case.banned, pad_id=0)
    key = jax.random.key(0)
    return lambda draft=None: sampler.rollout(
        {"params": params}, prompts.student, key, prompts.row_ids, draft
    )


def drafts(options: argparse.Namespace) -> dict[str, Any]:
    """Greedy rollouts, guessed by their own responses with a share of the tokens replaced."""
    case = make_case(options)
    params, prompts = make_params(case), jax.device_put(make_prompts(case.config))
    greedy = dataclasses.replace(case.config.distillation.sampling, temperature=0.0)
    plain = runner(case, params, prompts, greedy)
    guessing = dataclasses.replace(greedy, draft_tokens=options.guesses)
    drafted = runner(case, params, prompts, guessing)
    response = np.asarray(plain().tokens)
    plain_seconds = median_seconds(plain, case.rounds)
    limit, rng = limits(case), np.random.default_rng(0)
    result: dict[str, Any] = {"guesses": options.guesses, "plain_seconds": plain_seconds}
    for percent in (0, 10, 30):
        wrong = rng.random(response.shape) < percent / 100
        others = rng.integers(0, min(case.banned), response.shape)
        draft = jnp.asarray(np.where(wrong, others, response).astype(np.int32))
        seconds = median_seconds(functools.partial(drafted, draft), case.rounds)
        sampled = drafted(draft)
        own = (~np.asarray(sampled.guessed)).sum(axis=1) - 1  # the first is the prompt's
        passes = int(own.max())
        least = None
        if limit:
            least = limit["prefill"] + passes * limit["decode"] / response.shape[1]
        result[f"corrupted_{percent}"] = {
            "seconds": seconds,
            "speedup": plain_seconds / seconds,
            "kept_a_pass": float((response.shape[1] - 1) / own.mean()),
            "passes": passes,
            "equal_tokens": float((np.asarray(sampled.tokens) == response).mean()),
            "of_limit": share(least, seconds),
        }
    return {"drafts": result}


def update(options: argparse.Namespace) -> dict[str, Any]:
    case = make_case(options)
    found = measure_update(case, make_params(case), make_prompts(case.config))
    return {"update": {str(options.response): found}}


def measure_update(case: Case, params: Any, prompts: batching.PromptBatch) -> dict[str, Any]:
    """All parameters are trained if that fits, else the adapters of the recipe's grounding."""
    settings, model = case.config.distillation, case.model
    tx = optimizer.make_optimizer(settings.optim, settings.steps)
    update = distillation_step.make_update(model, model, settings, tx, case.banned)
    assert isinstance(update, jax.stages.Wrapped)
    shape = (settings.batch_size, settings.sampling.max_new_tokens)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, min(case.banned))
    batch = distillation_step.DistillationBatch(
        jax.device_put(prompts.student),
        jax.device_put(prompts.teacher),
        tokens,
        jnp.ones(shape, bool),
    )
    teacher = jax.jit(lambda p: sharding.cast(p, model.dtype))(params)

    def make_state(params: Any, lora: LoraConfig) -> tuple[optimizer.TrainState, Any]:
        trained, frozen = trainable.split(params, settings.optim, lora, jax.random.key(2))
        return optimizer.init(trained, tx), sharding.cast(frozen, model.dtype)

    adapters = dataclasses.replace(case.config.grounding.lora, rank=8)
    for lora in (LoraConfig(), adapters):
        abstract = jax.eval_shape(functools.partial(make_state, lora=lora), params)
        # The gradients come beside the arguments: what they alone rule out is not compiled.
        needed = roofline.total_bytes((abstract, teacher, abstract[0].params))
        if needed > case.room:
            continue
        program = update.lower(*abstract, teacher, batch).compile()
        memory = program.memory_analysis()
        assert memory is not None
        needed = memory.argument_size_in_bytes + memory.temp_size_in_bytes
        needed += memory.output_size_in_bytes - memory.alias_size_in_bytes
        if lora.rank:  # the float32 parameters are the caller's, and stay beside the frozen ones
            needed += roofline.total_bytes(params)
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
    flops = distillation_step.update_flops(model, model, batch)
    least = flops / case.chip.flops if case.chip else None
    return {
        "trained": f"adapters of rank {lora.rank}" if lora.rank else "all",
        "seconds": seconds,
        **sessions.speed(flops, 2 * math.prod(shape), seconds),
        "limit_seconds": least,
        "of_limit": share(least, seconds),
        "loss": float(step()["loss"].value),
        "temporaries_gib": memory.temp_size_in_bytes / GIB,
        "needed_gib": needed / GIB,
    }


def loss(options: argparse.Namespace) -> dict[str, Any]:
    """The fused divergence and its gradients, and the four products that it cannot do without."""
    case, tokens = make_case(options), options.rows * options.response
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
    def divergence(hidden: jax.Array, table: jax.Array, *teacher: jax.Array) -> jax.Array:
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

    fused, least = jax.jit(jax.value_and_grad(divergence, argnums=(0, 1))), jax.jit(products)
    arrays = (hidden, table, teacher_hidden, teacher_table)
    seconds = median_seconds(lambda: fused(*arrays), case.rounds)
    alone = median_seconds(lambda: least(*arrays), case.rounds)
    bound = 8.0 * tokens * math.prod(shapes[1]) / case.chip.flops if case.chip else None
    found = {
        "tokens": tokens,
        "seconds": seconds,
        "products_seconds": alone,
        "of_products": share(alone, seconds),
        "bound_seconds": bound,
        "of_bound": share(bound, seconds),
    }
    return {"loss": found}
