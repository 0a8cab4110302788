"""Several processes are one program: settings, agreement, equal results; no one waits in vain."""

import pathlib
import signal
import time

import numpy as np
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

from mgsd_jax import processes
from mgsd_jax.metrics import Mean

NONE = (None, None, None)
ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"


def test_flags_come_before_the_environment_and_nothing_means_ask_the_cluster() -> None:
    flags = ("localhost:1234", 4, 3)
    environ = {ADDRESS: "10.0.0.1:80", COUNT: "2", INDEX: "1"}
    assert processes.settings(flags, environ) == flags
    assert processes.settings(NONE, environ) == ("10.0.0.1:80", 2, 1)
    assert processes.settings(NONE, {}) == NONE
    assert processes.settings(NONE, {ADDRESS: "10.0.0.1:80"}) == NONE  # jax reads it by itself


@pytest.mark.parametrize(
    ("given", "environ", "message"),
    [
        (("a:1", None, None), {}, "got --coordinator a:1 but no --processes, no --process; want"),
        ((None, 2, 0), {}, "got --processes 2 and --process 0 but no --coordinator; want all"),
        (("a:1", None, 0), {COUNT: "2"}, "but no --processes; want"),  # the two do not mix
        (NONE, {COUNT: "2", INDEX: "0"}, f"but no {ADDRESS}; want"),
        (NONE, {ADDRESS: "a:1", COUNT: "two", INDEX: "0"}, f"{COUNT}: got 'two', want a whole"),
        (("a", 2, 0), {}, "--coordinator: got 'a', want host:port"),
        (("a:b", 2, 0), {}, "--coordinator: got 'a:b', want host:port"),
        (("a:1", 2, 2), {}, "--process: got 2 of 2 processes, want 0 to 1"),
        (("a:1", 2, -1), {}, "--process: got -1, want a whole number"),
    ],
)
def test_settings_half_given_or_senseless_are_refused(
    given: processes.Settings, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        processes.settings(given, environ)
    assert message in str(raised.value)


def test_means_of_all_processes_are_added_by_name() -> None:
    parts = [{"a": (1.0, 2.0), "b": (3.0, 1.0)}, {"a": (5.0, 1.0), "c": (0.0, 0.0)}]
    sums = processes.add_means(parts)
    assert sums == {"a": Mean(6.0, 3.0), "b": Mean(3.0, 1.0), "c": Mean(0.0, 0.0)}


def test_one_process_agrees_with_itself() -> None:
    assert processes.gather({"a": (1, 2)}) == [{"a": (1, 2)}]
    assert processes.largest((3, 1)) == (3, 1)


# ------------------------------------------------------------------------- several real processes

STEPS = 3
SETTINGS = (
    *("checkpoint.every=1", "checkpoint.keep_last=9"),
    *(f"grounding.steps={STEPS}", f"distillation.steps={STEPS}"),
    "distillation.sampling.max_new_tokens=6",
)
# The program, which also writes the rows of every rollout: {workdir}/rows-{process}-{call}.npy
NOTING = """
import sys
import jax, numpy as np
from absl import app
from mgsd_jax import evaluate, main, monitor
workdir = next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2]
decode_rows, calls = monitor.decode_rows, []
def noted(processor, tokens, mask):
    name = f"{workdir}/rows-{jax.process_index()}-{len(calls)}.npy"
    np.save(name, np.where(mask > 0, tokens, -1))
    calls.append(name)
    return decode_rows(processor, tokens, mask)
evaluate.decode_rows = monitor.decode_rows = noted
sys.exit(app.run(main.main))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("base"))


@pytest.fixture(scope="module")
def pair(base: Base, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a grounding run of two processes that nobody disturbed."""
    folder = tmp_path_factory.mktemp("pair")
    run(base, "grounding", folder, SETTINGS, processes=2, devices=2)
    return folder


def rollouts(folder: pathlib.Path, count: int, step: int) -> np.ndarray:
    return np.concatenate([np.load(folder / f"rows-{i}-{step}.npy") for i in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grounding", "distillation"])
def test_several_processes_train_to_the_parameters_of_one(
    base: Base, stage: str, tmp_path: pathlib.Path
) -> None:
    """The same rows in the same order, rollouts bit for bit, parameters within 1e-5."""
    for count, devices in ((1, 1), (2, 2), (4, 1)):
        folder = tmp_path / str(count)
        options = {"processes": count, "devices": devices}
        noting = start(base, stage, folder, SETTINGS, program=("-c", NOTING), **options)
        finish(noting, folder)
    one = weights(tmp_path / "1", stage)
    for count in (2, 4):
        folder = tmp_path / str(count)
        if stage == "distillation":
            for step in range(STEPS):
                want = rollouts(tmp_path / "1", 1, step)
                np.testing.assert_array_equal(rollouts(folder, count, step), want)
        several = weights(folder, stage)
        assert one.keys() == several.keys()
        for name, leaf in one.items():
            np.testing.assert_allclose(several[name], leaf, rtol=0, atol=1e-5, err_msg=name)
        for mine, theirs in zip(
            records(folder, stage), records(tmp_path / "1", stage), strict=True
        ):
            assert mine == pytest.approx(theirs, rel=1e-4, abs=1e-5)
        # Process 0 alone writes what is not the checkpoint's.
        assert len((folder / stage / "runs.jsonl").read_text().splitlines()) == 1


@pytest.mark.slow
@pytest.mark.parametrize(("lost", "again"), [(1, 2), (0, 1)])
def test_where_one_is_killed_the_others_end_and_name_it_and_all_can_start_again(
    base: Base, pair: pathlib.Path, tmp_path: pathlib.Path, lost: int, again: int
) -> None:
    running = start(base, "grounding", tmp_path, SETTINGS, processes=2, devices=2)
    assert wait_for_records(tmp_path, "grounding", 1, running), log_of(tmp_path)
    running[lost].send_signal(signal.SIGKILL)
    began = time.monotonic()
    code = running[1 - lost].wait(timeout=60)
    assert code == -signal.SIGABRT, log_of(tmp_path, 1 - lost)
    print(f"process {1 - lost} ended {time.monotonic() - began:.0f} s after process {lost}")
    said = log_of(tmp_path, 1 - lost, 20_000)
    names = "Task 1 heartbeat timeout" if lost == 1 else "leader task was preempted/died"
    assert names in said, said
    # As many processes: the very bits. One: the same but for the order of sums.
    finish(
        start(base, "grounding", tmp_path, SETTINGS, processes=again, devices=4 // again), tmp_path
    )
    if again == 2:
        assert differing(weights(tmp_path, "grounding"), weights(pair, "grounding")) == []
        assert records(tmp_path, "grounding") == records(pair, "grounding")
    want = weights(pair, "grounding")
    for name, leaf in weights(tmp_path, "grounding").items():
        np.testing.assert_allclose(leaf, want[name], rtol=0, atol=1e-5, err_msg=name)


@pytest.mark.slow
def test_where_one_refuses_its_settings_the_other_does_not_wait(
    base: Base, tmp_path: pathlib.Path
) -> None:
    own = {1: ("data.folder=nowhere",)}
    running = start(base, "grounding", tmp_path, SETTINGS, processes=2, own=own)
    assert running[1].wait(timeout=300) == 2
    assert "nowhere/manifest.json: got no such file" in log_of(tmp_path, 1)
    assert running[0].wait(timeout=60) == -signal.SIGABRT
    assert "Task 1 heartbeat timeout" in log_of(tmp_path, 0, 20_000)


@pytest.mark.slow
def test_sigterm_to_one_of_two_saves_and_ends_both(
    base: Base, pair: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    running = start(base, "grounding", tmp_path, SETTINGS, processes=2, devices=2)
    assert wait_for_records(tmp_path, "grounding", 1, running), log_of(tmp_path)
    running[1].send_signal(signal.SIGTERM)
    finish(running, tmp_path, 75)
    run(base, "grounding", tmp_path, SETTINGS, processes=2, devices=2)
    assert differing(weights(tmp_path, "grounding"), weights(pair, "grounding")) == []
