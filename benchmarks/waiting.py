"""Share of a distillation step that the device spends waiting for the host.

    python benchmarks/waiting.py

The nano recipe as it is (configs/nano.py: its base model, loader, batch of 64, rollouts, update,
scoring, metrics), on boards drawn anew. A program counts as running from its call until its results
are there; what is left of the time between the first watched rollout and the end of the last
watched update is waiting: for prompts that are not rendered and tokenised yet, for answers that are
not scored, for metrics that are not written. Validation and checkpoints are not in it. On a CPU the
host's work also slows the device's down, which this does not show. Target: at most 0.03.
"""

import argparse
import contextlib
import dataclasses
import itertools
import json
import pathlib
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from typing import Any
from unittest import mock

import jax

from mgsd_jax import command_line
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import distillation, distillation_step, generate

CONFIG = pathlib.Path(__file__).parent.parent / "configs" / "nano.py"
WARM_UP = 3  # steps: two compilations, and a loader that gets ahead
NO_END = 1_000_000  # steps: neither validation nor a last checkpoint comes in between


class Enough(Exception):
    """Ends the run."""


@dataclasses.dataclass
class Program:
    """One kind of program of the step, and when it ran."""

    spans: list[tuple[float, float]]  # from call to results, in seconds
    most: int  # calls
    threads: list[threading.Thread]

    def watch(self, program: Callable[..., Any], results: Callable[[Any], Any]) -> Callable:
        """`program`, each call noted; `results` picks outputs that no one donates."""

        def call(*arguments: Any) -> Any:
            if len(self.threads) == self.most:
                raise Enough
            start = time.perf_counter()
            out = program(*arguments)

            def wait() -> None:
                jax.block_until_ready(results(out))
                self.spans.append((start, time.perf_counter()))

            self.threads.append(threading.Thread(target=wait))
            self.threads[-1].start()
            return out

        return call


def run_steps(steps: int, workdir: str) -> tuple[Program, Program]:
    """The rollouts and the updates of `steps` steps after the first few."""
    sets = {"steps": NO_END, "eval_every": 0, "student": "{model}"}
    assignments = [f"distillation.{name}={value}" for name, value in sets.items()]
    config = command_line.load_config(str(CONFIG), [*assignments, "checkpoint.every=0"])
    boards = tuple(dataclasses.replace(b, train=200, val=2, test=2) for b in config.data.boards)
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, boards=boards))
    generate.run(config, workdir)
    rollouts, updates = (Program([], WARM_UP + steps, []) for _ in range(2))
    rollout, make_update = Sampler.rollout, distillation_step.make_update
    watched = rollouts.watch(rollout, lambda out: out)

    def watched_rollout(sampler: Sampler, *arguments: Any) -> Rollout:
        # Validation's are greedy, and not looked at.
        return (watched if sampler.sampling.temperature else rollout)(sampler, *arguments)

    def watched_update(*arguments: Any, **options: Any) -> Callable:
        return updates.watch(make_update(*arguments, **options), lambda out: out[1:])

    with (
        mock.patch.object(Sampler, "rollout", watched_rollout),
        mock.patch.object(distillation_step, "make_update", watched_update),
        contextlib.suppress(Enough),
    ):
        distillation.run(config, workdir)
    for program in (rollouts, updates):
        for thread in program.threads:
            thread.join()
    return rollouts, updates


def measure(steps: int) -> dict[str, float]:
    """`waiting_share`, and the median seconds of a step and of its two programs."""
    with tempfile.TemporaryDirectory() as workdir:
        rollouts, updates = (sorted(p.spans)[WARM_UP:] for p in run_steps(steps, workdir))
    spans = sorted(rollouts + updates)
    idle, end = 0.0, spans[0][0]
    for start, stop in spans:
        idle += max(0.0, start - end)
        end = max(end, stop)
    between = [later[0] - earlier[0] for earlier, later in itertools.pairwise(rollouts)]
    return {
        "waiting_share": round(idle / (end - spans[0][0]), 4),
        "nano_step_s": round(statistics.median(between), 3),
        "nano_rollout_s": round(statistics.median(b - a for a, b in rollouts), 3),
        "nano_update_s": round(statistics.median(b - a for a, b in updates), 3),
    }


def run() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=10)
    print(json.dumps(measure(parser.parse_args().steps)))


if __name__ == "__main__":
    run()
