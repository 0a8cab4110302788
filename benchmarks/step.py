"""Time of one distillation update against the same in torch, on the same weights and batch.

    python benchmarks/step.py

Teacher forward (text), student forward and backward (picture), exact reverse KL over the whole
vocabulary, AdamW; float32, the random 7 M Qwen3-VL of benchmarks/rollout.py. Both sides take the
rows in `--microbatches` parts, whose memory stays in the cache and need not be fetched from the
system anew; torch takes them all at once as well, and its better time counts. Runs alternate.
Prints one JSON line: median times, the median ratio of neighbouring runs (ours / torch), the losses
of the first updates (the program ends where they differ), the pages of memory that an update of
ours asks of the system, what calling our jitted update costs right after another one
(benchmarks/dispatch.py: on caches that no computation has emptied), and what benchmarks/waiting.py
measures on the nano recipe. Targets: ratio 0.8, waiting_share 0.03.

    python benchmarks/step.py --quarter

With --quarter, no torch: the update of responses padded to 512 tokens against that of the same
responses cut to a bucket of 128 (`distillation.response_buckets`). One JSON line: the loss of both,
equal to rounding, and the ratios of their times (alternating runs) and of the compiler's
temporaries.
"""

import argparse
import dataclasses
import functools
import json
import resource
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import torch
import waiting
from rollout import CONFIG, GRID, make_inputs, random_params
from transformers import Qwen3VLForConditionalGeneration

from mgsd_jax.config import DistillationConfig, OptimConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel.means import Mean
from mgsd_jax.stages import distillation_step
from mgsd_jax.training import lessons, optimizer
from mgsd_jax.weights import hf

BANNED = (CONFIG.image_token_id, CONFIG.video_token_id)
OPTIM = OptimConfig(lr=1e-6, weight_decay=0.01)


def text_inputs(batch: int, length: int, rng: np.random.Generator) -> Inputs:
    """Prompts of random text tokens."""
    steps = np.broadcast_to(np.arange(length, dtype=np.int32), (3, batch, length))
    return Inputs(
        tokens=rng.integers(0, 2000, (batch, length)).astype(np.int32),
        positions=np.ascontiguousarray(steps),
        valid=np.ones((batch, length), bool),
        next_position=np.full(batch, length, np.int32),
        pictures=None,
    )


def count_faults(run: Callable[[], float]) -> int:
    """Pages of memory that one run has to be given by the system."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    run()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@dataclasses.dataclass(frozen=True)
class Ours:
    """An update of ours, to be called again and again."""

    step: Callable[[], float]  # a whole update, its loss returned
    dispatch: Callable[[], float]  # seconds that calling one takes
    temporaries: Callable[[], int]  # bytes that the compiler gives to its temporaries


def our_update(
    params: dict,
    teacher_params: dict,
    batch: distillation_step.DistillationBatch,
    microbatches: int,
) -> Ours:
    model = Qwen3VL(CONFIG)
    tx = optimizer.make_optimizer(OPTIM, 1000)
    settings = DistillationConfig(optim=OPTIM, microbatches=microbatches)
    update = distillation_step.make_update(model, model, settings, tx, BANNED)
    assert isinstance(update, jax.stages.Wrapped)
    held = [optimizer.init({"params": jax.tree.map(np.array, params)}, tx)]
    batch = jax.device_put(batch)

    def step() -> float:
        held[0], measured, _ = update(held[0], {}, teacher_params, batch)
        loss = measured["loss"]
        assert isinstance(loss, Mean)
        return float(loss.value)

    def dispatch() -> float:
        jax.block_until_ready(held[0])
        start = time.perf_counter()
        held[0], *rest = update(held[0], {}, teacher_params, batch)
        taken = time.perf_counter() - start
        jax.block_until_ready(rest)
        return taken

    def temporaries() -> int:
        memory = update.lower(held[0], {}, teacher_params, batch).compile().memory_analysis()
        assert memory is not None
        return memory.temp_size_in_bytes

    return Ours(step, dispatch, temporaries)


def alternate(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each run, `rounds` times, one after the other."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    return times


def quarter(options: argparse.Namespace) -> dict[str, Any]:
    """An update over a whole response limit, and one over the quarter that the responses fill."""
    whole = 512
    batch = make_batch(options.batch, whole, said=whole // 4)
    cut = lessons.first_tokens(batch.tokens, whole // 4)
    short = batch._replace(tokens=cut, mask=lessons.first_tokens(batch.mask, whole // 4))
    ours = {
        name: our_update(random_params(0), random_params(1), one, options.microbatches)
        for name, one in (("whole", batch), ("quarter", short))
    }
    losses = {name: one.step() for name, one in ours.items()}
    times = alternate({name: one.step for name, one in ours.items()}, options.rounds)
    sizes = {name: one.temporaries() for name, one in ours.items()}
    ratios = [a / b for a, b in zip(times["quarter"], times["whole"], strict=True)]
    return {
        "batch": options.batch,
        "responses": [whole, whole // 4],
        "microbatches": options.microbatches,
        **{f"{name}_s": round(statistics.median(taken), 3) for name, taken in times.items()},
        "time_ratio": round(statistics.median(ratios), 3),
        **{f"{name}_temporaries_mib": round(size / 2**20, 1) for name, size in sizes.items()},
        "temporaries_ratio": round(sizes["quarter"] / sizes["whole"], 3),
        **{f"loss_{name}": round(loss, 6) for name, loss in losses.items()},
        "device": jax.devices()[0].device_kind,
    }


def make_batch(rows: int, response: int, said: int) -> distillation_step.DistillationBatch:
    """Prompts and random responses of `said` tokens, padded to `response`."""
    rng = np.random.default_rng(0)
    tokens: Any = rng.integers(0, 2000, (rows, response)).astype(np.int32)
    mask: Any = np.broadcast_to(np.arange(response) < said, tokens.shape).astype(np.float32)
    student = make_inputs(rows, rng)
    return distillation_step.DistillationBatch(student, text_inputs(rows, 200, rng), tokens, mask)


def their_step(
    folder: str, teacher_folder: str, batch: distillation_step.DistillationBatch
) -> Callable[[int], float]:
    """An update with the rows in as many parts as it is told; the loss is returned."""
    load = Qwen3VLForConditionalGeneration.from_pretrained
    student = load(folder, dtype=torch.float32)
    teacher = load(teacher_folder, dtype=torch.float32).eval()
    tx = torch.optim.AdamW(student.parameters(), lr=OPTIM.lr, weight_decay=OPTIM.weight_decay)
    response = torch.from_numpy(np.array(batch.tokens)).long()

    def arguments(inputs: Inputs, rows: slice) -> dict:
        prompts = torch.from_numpy(np.array(inputs.tokens[rows])).long()
        tokens = torch.cat([prompts, response[rows]], 1)
        found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
        if inputs.pictures is not None:
            patches = np.array(inputs.pictures.patches[rows])
            patches = patches.reshape(-1, CONFIG.vision.patch_channels)
            found["pixel_values"] = torch.from_numpy(patches)
            found["image_grid_thw"] = torch.tensor([GRID] * len(tokens))
            found["mm_token_type_ids"] = (tokens == CONFIG.image_token_id).long()
        return found

    count, width = response.shape

    @functools.cache  # made before anything is timed
    def parts(microbatches: int) -> list[tuple[dict, dict]]:
        """(inputs of the teacher, of the student) of each part."""
        size = count // microbatches
        slices = [slice(first, first + size) for first in range(0, count, size)]
        return [(arguments(batch.teacher, s), arguments(batch.student, s)) for s in slices]

    def logprobs(model: Qwen3VLForConditionalGeneration, inputs: dict) -> torch.Tensor:
        # The last `width` positions and the one before the response, as a trainer would ask.
        logits = model(**inputs, logits_to_keep=width + 1, use_cache=False).logits[:, :-1]
        logits[..., list(BANNED)] = -1e30
        return torch.log_softmax(logits, -1)

    def step(microbatches: int) -> float:
        tx.zero_grad()
        total = 0.0
        for teachers, students in parts(microbatches):
            with torch.no_grad():
                target = logprobs(teacher, teachers)
            ours = logprobs(student, students)
            loss = (ours.exp() * (ours - target)).sum(-1).mean() / microbatches
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), OPTIM.clip)
        tx.step()
        return total

    return step


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--response", type=int, default=128)
    parser.add_argument("--microbatches", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--nano-steps", type=int, default=10, help="0: no waiting_share")
    parser.add_argument("--quarter", action="store_true", help="response buckets instead")
    options = parser.parse_args()
    if options.quarter:
        print(json.dumps(quarter(options)))
        return
    params, teacher_params = random_params(0), random_params(1)
    batch = make_batch(options.batch, options.response, said=options.response)
    with tempfile.TemporaryDirectory() as root:
        student, teacher = (str(Path(root) / name) for name in ("student", "teacher"))
        for folder, weights in ((student, params), (teacher, teacher_params)):
            hf.save_params(weights, CONFIG, folder, dtype="float32")
            (Path(folder) / "config.json").write_text(json.dumps(CONFIG.to_hf()))
        theirs = their_step(student, teacher, batch)
    ours = our_update(params, teacher_params, batch, options.microbatches)
    runs = {"ours": ours.step, "torch": lambda: theirs(1)}
    if options.microbatches > 1:
        runs["torch_in_parts"] = lambda: theirs(options.microbatches)
    losses = {name: run() for name, run in runs.items()}  # each compiles, or makes its inputs
    if abs(losses["ours"] - losses["torch"]) > 1e-4:
        raise SystemExit(f"not the same computation: the losses of the first updates are {losses}")
    times = alternate(runs, options.rounds)
    medians = {name: statistics.median(taken) for name, taken in times.items()}
    best = min(list(runs)[1:], key=lambda name: medians[name])
    ratios = [a / b for a, b in zip(times["ours"], times[best], strict=True)]
    result = {
        "batch": options.batch,
        "response": options.response,
        "microbatches": options.microbatches,
        **{f"{name}_s": round(median, 3) for name, median in medians.items()},
        "ratio": round(statistics.median(ratios), 3),
        "loss_ours": round(losses["ours"], 6),
        "loss_torch": round(losses["torch"], 6),
        "page_faults": count_faults(ours.step),
        "dispatch_ms": round(1e3 * statistics.median(ours.dispatch() for _ in range(9)), 3),
        "device": jax.devices()[0].device_kind,
    }
    if options.nano_steps:
        result |= waiting.measure(options.nano_steps)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
