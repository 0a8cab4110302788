"""Exact reverse KL, value and gradients, fused against full logits: time and temporary memory.

    python benchmarks/loss.py

prints one JSON line. Runs alternate, so that a machine that slows down slows both; the ratios are
of medians. Sizes: N 2,048 tokens, D 512, V 32,768, float32. Targets: time ratio <= 0.85, memory
ratio <= 0.15.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import jax
import jax.numpy as jnp

from mgsd_jax.config import DistillationConfig, OptimConfig
from mgsd_jax.training import losses

Arrays = tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]


def full_logits(arrays: Arrays, targets: jax.Array) -> jax.Array:
    """The loss as one would write it: both [N, V] log-softmaxes held at once."""
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    logprobs = jax.nn.log_softmax(hidden @ head.T)
    teacher_logprobs = jax.lax.stop_gradient(jax.nn.log_softmax(teacher_hidden @ teacher_head.T))
    kl = jnp.sum(jnp.exp(logprobs) * (logprobs - teacher_logprobs), axis=-1)
    return jnp.sum(weights * kl)


def fused(arrays: Arrays, targets: jax.Array, token_chunk: int) -> jax.Array:
    settings = DistillationConfig(OptimConfig(lr=0.0), token_chunk=token_chunk)
    loss, _ = losses.distill(*arrays, settings=settings, targets=targets)
    return loss


def make_arrays(tokens: int, width: int, vocabulary: int) -> tuple[Arrays, jax.Array]:
    keys = jax.random.split(jax.random.key(0), 5)
    hidden = jax.random.normal(keys[0], (tokens, width))
    head = jax.random.normal(keys[1], (vocabulary, width)) * 3.0 / width**0.5
    teacher_hidden = hidden + 0.3 * jax.random.normal(keys[2], hidden.shape)
    teacher_head = head + 0.1 * jax.random.normal(keys[3], head.shape) / width**0.5
    targets = jax.random.randint(keys[4], (tokens,), 0, vocabulary)
    return (hidden, head, teacher_hidden, teacher_head, jnp.full(tokens, 1.0 / tokens)), targets


def compile_step(
    loss: Callable[..., jax.Array], arrays: Arrays, targets: jax.Array
) -> jax.stages.Compiled:
    def step(hidden: jax.Array, head: jax.Array, rest: tuple, targets: jax.Array) -> tuple:
        return jax.value_and_grad(lambda h, w: loss((h, w, *rest), targets), argnums=(0, 1))(
            hidden, head
        )

    return jax.jit(step).lower(arrays[0], arrays[1], arrays[2:], targets).compile()


def temporaries(step: jax.stages.Compiled) -> int:
    """Bytes that the compiler gives to the temporaries of a step."""
    memory = step.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--vocabulary", type=int, default=32768)
    parser.add_argument("--token-chunk", type=int, default=293)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()

    arrays, targets = make_arrays(options.tokens, options.width, options.vocabulary)
    steps = {
        "full": compile_step(full_logits, arrays, targets),
        "fused": compile_step(lambda a, t: fused(a, t, options.token_chunk), arrays, targets),
    }
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    values = {}
    for round_number in range(options.rounds + 1):
        for name, step in steps.items():
            start = time.perf_counter()
            values[name] = jax.block_until_ready(step(arrays[0], arrays[1], arrays[2:], targets))
            if round_number > 0:  # the first round warms the caches
                seconds[name].append(time.perf_counter() - start)
    median = {name: statistics.median(times) for name, times in seconds.items()}
    memory = {name: temporaries(step) for name, step in steps.items()}
    difference = [
        float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))
        for a, b in zip(values["fused"][1], values["full"][1], strict=True)
    ]
    print(
        json.dumps(
            {
                "benchmark": "loss",
                "device": jax.devices()[0].device_kind,
                **vars(options),
                "full_seconds": round(median["full"], 3),
                "fused_seconds": round(median["fused"], 3),
                "time_ratio": round(median["fused"] / median["full"], 3),
                "full_temp_mb": round(memory["full"] / 2**20, 1),
                "fused_temp_mb": round(memory["fused"] / 2**20, 1),
                "memory_ratio": round(memory["fused"] / memory["full"], 3),
                "gradient_difference": max(difference),
            }
        )
    )


if __name__ == "__main__":
    main()
