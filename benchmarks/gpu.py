"""A random Qwen3-VL on one GPU: each phase of a distillation step against the limit of the device.

    python benchmarks/gpu.py --all --out docs/results/gpu_h100.json   # 4B, at most 8 minutes
    python benchmarks/gpu.py --all --size nano                        # the same on a CPU

Prefill and decode: tokens a second, and the share of what arithmetic and memory traffic allow at
the device's peaks (preflight/roofline.py). Update: time and MFU, which counts no recomputation; all
parameters are trained where the compiled program fits, else adapters (`trained` says which). Loss:
exact reverse KL, value and gradients, against its four head products alone, measured and at peak.
--all adds rollouts whose drafts are their own greedy responses with 0, 10 and 30 % of the tokens
replaced, updates of other response lengths, and the phases in torch and transformers; --torch the
latter alone. Weights are random, so rollouts run to their full length.

A phase runs in a process of its own. --out is written anew after each, so a kill loses the one that
is under way. The most important come first; what --budget leaves no time for is named in `skipped`.
Prints one JSON line; times are medians. On a device whose peaks are not in chips.py the limits are
null.
"""

import argparse
import functools
import importlib.util
import json
import multiprocessing
import pathlib
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from typing import Any

import gpu_case
import gpu_ours

from mgsd_jax import config as config_lib
from mgsd_jax.workdir import paths

Result = dict[str, Any]
Phase = Callable[[argparse.Namespace], Result]
ALL_BUDGET = 480.0  # seconds
STARTING = 20.0  # seconds in which no phase is begun and done


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    result.add_argument("--size", choices=tuple(gpu_case.SIZES), help="4b on a GPU, else nano")
    result.add_argument("--rows", type=int, help="prompts at once (4b: 32, nano: 4)")
    result.add_argument("--response", type=int, help="tokens sampled a row (4b: 512, nano: 62)")
    result.add_argument("--rounds", type=int, help="calls of each (--all: 2, else 5)")
    result.add_argument("--guesses", type=int, default=7, help="--all: sampling.draft_tokens")
    result.add_argument("--torch", action="store_true", help="the same in torch beside it")
    result.add_argument("--all", action="store_true", help="every phase, within the budget")
    result.add_argument("--budget", type=float, help="seconds in all (--all: 480, else no end)")
    result.add_argument("--out", help="file for the JSON line")
    return result


def complete(options: argparse.Namespace, backend: str = "cpu") -> argparse.Namespace:
    """The options with their defaults for this backend."""
    size = options.size or ("4b" if backend == "gpu" else "nano")
    defaults: Result = {
        "size": size,
        "rows": gpu_case.ROWS[size],
        "response": gpu_case.RESPONSE[size],
        "rounds": 2 if options.all else 5,
        "budget": ALL_BUDGET if options.all else None,
    }
    given = {name: value for name, value in vars(options).items() if value is not None}
    return argparse.Namespace(**defaults | given)


def phases(options: argparse.Namespace) -> dict[str, Phase]:
    """What is measured, the most important first."""
    every: dict[str, Phase] = {"rollout": gpu_ours.rollout, "drafts": gpu_ours.drafts}
    first, *others = gpu_case.UPDATES[options.size] if options.all else [options.response]
    for length in (first, *others):
        every[f"update {length}"] = functools.partial(_update, response=length)
    every["loss"] = gpu_ours.loss
    for name in ("rollout", "update", "loss"):
        every[f"torch {name}"] = functools.partial(theirs, phase=name)
    if options.all:
        last = [f"update {length}" for length in others]
        order = ["rollout", "drafts", f"update {first}", last[0], "torch rollout", *last[1:]]
        return {name: every[name] for name in (*order, "torch update", "loss", "torch loss")}
    chosen = ["rollout", f"update {first}", "loss"]
    chosen += [f"torch {name}" for name in ("rollout", "update", "loss") if options.torch]
    return {name: every[name] for name in chosen}


def _update(options: argparse.Namespace, response: int) -> Result:
    return gpu_ours.update(argparse.Namespace(**vars(options) | {"response": response}))


def theirs(options: argparse.Namespace, phase: str) -> Result:
    """A phase in torch and transformers, or why it was left out."""
    missing = [name for name in ("torch", "transformers") if not importlib.util.find_spec(name)]
    if missing:
        return {"skipped": f"got no {' and no '.join(missing)}"}
    import gpu_torch  # optional, and slow to import

    return gpu_torch.measure(options, phase)


def alone(function: Phase, options: argparse.Namespace, seconds: float | None) -> Result:
    """The function in a process of its own; {'skipped': why} where it dies or is too slow."""
    fresh = multiprocessing.get_context("spawn")
    mine, yours = fresh.Pipe(duplex=False)
    process = fresh.Process(target=_send, args=(yours, function, options), daemon=True)
    process.start()
    yours.close()
    try:
        if not mine.poll(seconds):
            return {"skipped": f"not done in the {seconds:.0f} s that were left"}
        return mine.recv()
    except EOFError:
        process.join()
        return {"skipped": f"ended with exit code {process.exitcode}"}
    finally:
        process.kill()
        process.join()


def _send(pipe: Connection, function: Phase, options: argparse.Namespace) -> None:
    try:
        result = function(options)
    except Exception as error:  # the next phase is to run all the same
        traceback.print_exc()
        result = {"skipped": f"{type(error).__name__}: {str(error).partition(chr(10))[0][:300]}"}
    pipe.send(result)


def merge(result: Result, more: Result) -> None:
    """Adds `more` to `result`, dict by dict."""
    for name, value in more.items():
        if isinstance(value, dict) and isinstance(result.get(name), dict):
            merge(result[name], value)
        else:
            result[name] = value


def rounded(value: Any) -> Any:
    """Floats to four digits, through all dicts."""
    if isinstance(value, dict):
        return {name: rounded(item) for name, item in value.items()}
    return float(f"{value:.4g}") if isinstance(value, float) else value


def measure(options: argparse.Namespace) -> Result:
    """All phases, each in its process, `options.out` written after each."""
    begun = time.perf_counter()
    result: Result = {"benchmark": "gpu", **alone(gpu_ours.describe, options, None)}
    if "skipped" in result:
        raise SystemExit(f"no device: {result['skipped']}")
    options = complete(options, result["backend"])
    if options.size == "4b" and result["backend"] == "cpu":
        raise SystemExit("--size: got 4b on a CPU, want nano; JAX found no GPU (jax[cuda12]?)")
    config = gpu_case.make_config(options)
    result |= {name: getattr(options, name) for name in ("size", "rows", "response", "rounds")}
    result |= {
        "prompt": config_lib.sizes(config.data.prompt_buckets)[-1],
        "teacher_prompt": config_lib.sizes(config.data.teacher_buckets)[-1],
        "dtype": config.model.compute_dtype,
        "phase_seconds": {},
        "skipped": {},
    }
    for name, phase in phases(options).items():
        started = time.perf_counter()
        left = None if options.budget is None else options.budget - (started - begun)
        if left is not None and left < STARTING:
            found: Result = {"skipped": f"no time left of {options.budget:.0f} s"}
        else:
            found = alone(phase, options, left)
        if isinstance(found.get("skipped"), str):
            result["skipped"][name] = found["skipped"]
        else:
            merge(result, found)
        result["phase_seconds"][name] = time.perf_counter() - started
        print(name, json.dumps(rounded(found)), file=sys.stderr, flush=True)
        if options.out:
            paths.write_whole(pathlib.Path(options.out), json.dumps(rounded(result)) + "\n")
    return rounded(result)


if __name__ == "__main__":
    print(json.dumps(measure(parser().parse_args())))
