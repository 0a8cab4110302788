"""Killed at any moment and started again, a run ends with the bits of one that never was."""

import os
import pathlib
import random
import shutil
import signal
import time

import pytest
from helpers_run import (
    Base,
    differing,
    finish,
    log_of,
    make_base,
    records,
    run,
    start,
    wait_for_records,
    weights,
)

from mgsd_jax.training import sessions as stage_lib

pytestmark = pytest.mark.slow

MOMENTS = 10  # kills of each stage
STEPS = 6
# A save after every step: one is under way nearly all the time.
SETTINGS = (
    *("checkpoint.every=1", "checkpoint.keep_last=2", "checkpoint.keep_best=1"),
    *(f"grounding.steps={STEPS}", f"distillation.steps={STEPS}"),
    "distillation.sampling.max_new_tokens=6",
)
SEED = int(os.environ.get("KILL_SEED", random.SystemRandom().randrange(1 << 32)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module", params=["grounding", "distillation"])
def whole(
    request: pytest.FixtureRequest, base: Base, tmp_path_factory: pytest.TempPathFactory
) -> tuple[str, pathlib.Path]:
    """A stage, and the folder of a run of it that nobody disturbed."""
    folder = tmp_path_factory.mktemp(f"whole_{request.param}")
    run(base, request.param, folder, SETTINGS, forked=True)
    assert [row["step"] for row in records(folder, request.param)] == list(range(1, STEPS + 1))
    return request.param, folder


def assert_same(stage: str, got: pathlib.Path, want: pathlib.Path, how: object) -> None:
    assert differing(weights(got, stage), weights(want, stage)) == [], how
    assert records(got, stage) == records(want, stage), how


def test_kills_at_random_moments_leave_no_trace(
    base: Base, whole: tuple[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    stage, undisturbed = whole
    rng = random.Random(f"{SEED} {stage}")
    folder, kills = tmp_path / "run", []
    while len(kills) < MOMENTS:
        began = time.monotonic()
        running = start(base, stage, folder, SETTINGS, forked=True)
        # Some steps on, or on the way to the first, and then some part of a step.
        path = folder / stage / "metrics.jsonl"
        there = path.read_bytes().count(b"\n") if path.exists() else 0
        steps = rng.randrange(4)
        is_running = wait_for_records(folder, stage, there + steps if steps else 0, running)
        delay = rng.uniform(0, 0.3) if steps else rng.uniform(0, 5)
        time.sleep(delay)
        if is_running and running[0].poll() is None:
            running[0].send_signal(signal.SIGKILL)
            assert running[0].wait() == -signal.SIGKILL
            kills.append((steps, round(delay, 3), round(time.monotonic() - began, 1)))
            continue
        finish(running, folder)
        assert_same(stage, folder, undisturbed, f"KILL_SEED={SEED}: {kills}")
        shutil.rmtree(folder)
    run(base, stage, folder, SETTINGS, forked=True)
    assert_same(stage, folder, undisturbed, f"KILL_SEED={SEED}: {kills}")
    print(f"seed {SEED}, {stage}: (steps, delay, age) of the kills: {kills}")


def test_sigterm_saves_leaves_with_its_code_and_the_same_command_continues(
    base: Base, whole: tuple[str, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    stage, undisturbed = whole
    settings = (*SETTINGS, "checkpoint.every=100")  # it is SIGTERM that makes it save
    running = start(base, stage, tmp_path, settings)
    assert wait_for_records(tmp_path, stage, 2, running), log_of(tmp_path)
    running[0].send_signal(signal.SIGTERM)
    finish(running, tmp_path, stage_lib.EXIT_STOPPED)
    done = records(tmp_path, stage)[-1]["step"]
    assert 2 <= done < STEPS
    message = f"stopped after step {done} of {STEPS}, asked by SIGTERM or Ctrl-C; the same command"
    assert message in log_of(tmp_path)
    assert os.listdir(tmp_path / stage / "checkpoints") == [str(done)]
    run(base, stage, tmp_path, settings, forked=True)
    assert_same(stage, tmp_path, undisturbed, "after SIGTERM")
