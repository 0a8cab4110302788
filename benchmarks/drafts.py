"""What drafts are worth on rollouts of the nano recipe; called by `rollout.py --draft`.

Prompts, batch, weights and sampling are those of a distillation step (configs/nano.py), on boards
of the validation split. Runs with each number of guesses alternate with runs without; beside other
work only the ratio by CPU time (`ratio_cpu`) means something.
"""

import argparse
import itertools
import pathlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data import loaders, segments
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import loading
from mgsd_jax.stages.loading import Loaded
from mgsd_jax.training import monitor

NANO = pathlib.Path(__file__).parents[1] / "configs" / "nano.py"
Batch = loaders.PromptRows


def sources(config: Config, workdir: str | None) -> Iterator[tuple[str, str]]:
    """(name, folder) of the base that ships, and of the students that a run has left."""
    yield "base", config.model.path
    for name, stage in (("grounded", "grounding"), ("distilled", "distillation")):
        if workdir:
            yield name, str(pathlib.Path(workdir) / stage)


def make_batches(config: Config, loaded: Loaded, count: int) -> list[Batch]:
    """Training batches of the recipe, of boards that no student has learned from."""
    levels = [(some.task, level) for some in config.data.boards for level in some.levels]
    settings = config.distillation
    loader = loaders.prompt_loader(
        loaders.stream_boards(levels, "val", seed=0, count=1 << 12),
        load_encoder(config.data, loaded.processor),
        context=settings.teacher_context,
        batch_size=settings.batch_size,
        rollouts=settings.rollouts,
        seed=config.seed,
        response_length=settings.sampling.max_new_tokens,
        has_drafts=True,
    )
    return list(itertools.islice(loader, count))


def make_runner(
    loaded: Loaded, batches: Sequence[Batch], config: Config, guesses: int
) -> Callable[[], list[Rollout]]:
    """A call that samples a response to every prompt, of the same uniform numbers each time."""
    sampling = config_lib.override(
        config, [f"distillation.sampling.draft_tokens={guesses}"]
    ).distillation.sampling
    processor = loaded.processor
    sampler = Sampler(
        loaded.model,
        sampling,
        eos_ids=processor.eos_ids,
        banned_ids=processor.banned_ids,
        pad_id=processor.pad_id,
    )
    asked = [jax.device_put(rows.batch) for rows in batches]
    variables, rng = {"params": loaded.params}, jax.random.key(config.seed)

    def run() -> list[Rollout]:
        return jax.device_get(
            [
                sampler.rollout(
                    variables,
                    one.student,
                    jax.random.fold_in(rng, i),
                    one.row_ids,
                    one.draft if guesses else None,
                )
                for i, one in enumerate(asked)
            ]
        )

    return run


def equal_share(ours: Sequence[Rollout], plain: Sequence[Rollout]) -> float:
    """The share of places of either response that hold the same token in both."""
    same = used = 0
    for a, b in zip(ours, plain, strict=True):
        either = np.asarray(a.mask) | np.asarray(b.mask)
        same += int((either & (a.mask == b.mask) & (a.tokens == b.tokens)).sum())
        used += int(either.sum())
    return same / used


def kept_a_pass(loaded: Loaded, sampled: Sequence[Rollout]) -> dict[str, float]:
    """Tokens kept a pass, '' in all and by token group."""
    sums: dict[str, Mean] = {}
    for one in sampled:
        mask, guessed = np.asarray(one.mask), np.asarray(one.guessed)
        groups = segments.segments(loaded.processor, np.asarray(one.tokens), mask)
        for name, kept in monitor.draft_metrics(groups, mask, guessed).items():
            short = name.removeprefix("rollout/kept_a_pass").removeprefix("/") or "all"
            sums[short] = sums.get(short, Mean(0.0, 0.0)) + kept
    return {name: round(float(kept.value), 2) for name, kept in sums.items()}


def passes(sampled: Sequence[Rollout]) -> int:
    """Passes of the model behind the prompts: the row that needs most ends a batch."""
    own = [np.asarray(one.mask) & ~np.asarray(one.guessed) for one in sampled]
    return sum(int(rows.sum(axis=1).max()) - 1 for rows in own)


def measure(loaded: Loaded, config: Config, options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of plain rollouts; of drafted ones the ratio to them, and what was kept."""
    batches = make_batches(config, loaded, options.batches)
    runs = {k: make_runner(loaded, batches, config, k) for k in (0, *options.guesses)}
    sampled = {k: run() for k, run in runs.items()}  # also compiles
    times: dict[int, list[tuple[float, float]]] = {k: [] for k in runs}  # wall and CPU seconds
    for _ in range(options.rounds):
        for k, run in runs.items():
            start, worked = time.perf_counter(), time.process_time()
            run()
            times[k].append((time.perf_counter() - start, time.process_time() - worked))
    result: dict[str, Any] = {
        "rows": config.distillation.batch_size * len(batches),
        "plain_s": round(statistics.median(wall for wall, _ in times[0]), 3),
        "plain_passes": passes(sampled[0]),
    }
    for k in options.guesses:
        pairs = list(zip(times[k], times[0], strict=True))
        result[f"draft_{k}"] = {
            "equal_tokens": equal_share(sampled[k], sampled[0]),
            "kept_a_pass": kept_a_pass(loaded, sampled[k]),
            "passes": passes(sampled[k]),
            "seconds": round(statistics.median(wall for wall, _ in times[k]), 3),
            "ratio": round(statistics.median(a[0] / b[0] for a, b in pairs), 3),
            "ratio_cpu": round(statistics.median(a[1] / b[1] for a, b in pairs), 3),
        }
    return result


def lines(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One result a student."""
    config = load_config(str(NANO), [])
    for name, folder in sources(config, options.workdir):
        loaded = loading.load(folder, config, is_frozen=True)
        device = {"device": jax.devices()[0].device_kind, "rounds": options.rounds}
        yield {"student": name, **measure(loaded, config, options), **device}
