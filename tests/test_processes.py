"""Several processes are one program: settings, agreement, equal results; no one waits in vain."""

import functools
import os
import pathlib
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

import helpers_children
import jax
import numpy as np
import pytest
from helpers_run import (
    ROOT,
    SLOWEST,
    Base,
    Running,
    differing,
    finish,
    log_of,
    make_base,
    records,
    start,
    wait_for_records,
    weights,
    write_config,
)

from mgsd_jax.parallel import means, processes
from mgsd_jax.parallel.means import Mean
from mgsd_jax.training import sessions as stage_lib

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
        (("a:1", 0, 0), {}, "--processes: got 0, want at least 1"),
        (("a:0", 2, 0), {}, "--coordinator: got 'a:0', want host:port"),
        (("a:65536", 2, 0), {}, "--coordinator: got 'a:65536', want host:port"),
        (("a:²", 2, 0), {}, "--coordinator: got 'a:²', want host:port"),
        ((":1", 2, 0), {}, "--coordinator: got ':1', want host:port"),
        (NONE, {ADDRESS: "a:1", COUNT: "²", INDEX: "0"}, f"{COUNT}: got '²', want a whole"),
        (NONE, {ADDRESS: "a:1", COUNT: "9" * 5000, INDEX: "0"}, f"{COUNT}: got '999"),
    ],
)
def test_settings_half_given_or_senseless_are_refused(
    given: processes.Settings, environ: dict[str, str], message: str
) -> None:
    with pytest.raises(ValueError) as raised:
        processes.settings(given, environ)
    assert message in str(raised.value)


def test_a_port_that_another_program_has_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """The words are those of JAX 0.10 where the port is taken."""

    def taken(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError("UNKNOWN: Failed to start RPC server")

    monkeypatch.setattr(jax.distributed, "initialize", taken)
    with pytest.raises(ValueError, match="localhost:1: got a port that cannot be opened here"):
        processes.join("localhost:1", 2, 0)


def test_means_of_all_processes_are_added_by_name() -> None:
    parts = [{"a": (1.0, 2.0), "b": (3.0, 1.0)}, {"a": (5.0, 1.0), "c": (0.0, 0.0)}]
    sums = means.add_means(parts)
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
    # Rows and tokens that weigh by what the rows of all processes came to.
    *("distillation.contrast_cap=4.0", "distillation.success_weight=0.1"),
)
# The program, which also writes the rows of every rollout: {workdir}/rows-{process}-{call}.npy
NOTING = """
import sys
import jax, numpy as np
from absl import app
from mgsd_jax import main
from mgsd_jax.training import lessons
workdir = next(a for a in sys.argv if a.startswith("--workdir=")).partition("=")[2]
judge, calls = lessons.judge, []
def noted(processor, boards, rollout):
    name = f"{workdir}/rows-{jax.process_index()}-{len(calls)}.npy"
    np.save(name, np.where(rollout.mask > 0, rollout.tokens, -1))
    calls.append(name)
    return judge(processor, boards, rollout)
lessons.judge = noted
sys.exit(app.run(main.main))
"""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Base:
    return make_base(tmp_path_factory.mktemp("base"))


def rollouts(folder: pathlib.Path, count: int, step: int) -> np.ndarray:
    return np.concatenate([np.load(folder / f"rows-{i}-{step}.npy") for i in range(count)])


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grounding", "distillation"])
def test_several_processes_train_to_the_parameters_of_one(
    base: Base, stage: str, tmp_path: pathlib.Path
) -> None:
    """The same rows in the same order, rollouts bit for bit, parameters within 1e-5; and a run may
    go on with another number of processes, on another mesh.
    """
    for count, devices in ((1, 1), (2, 2), (4, 1)):
        folder = tmp_path / str(count)
        program = ("-c", NOTING)
        noting = start(
            base,
            stage,
            folder,
            SETTINGS,
            processes=count,
            devices=devices,
            program=program,
            forked=True,
        )
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
    if stage == "distillation":
        lose_one_and_start_again(base, tmp_path / "lost")
        assert differing(weights(tmp_path / "lost", stage), weights(tmp_path / "2", stage)) == []
    # The last step of the four again, in two processes and with the widths split as well.
    shutil.rmtree(folder / stage / "checkpoints" / str(STEPS))
    split = (*SETTINGS, "mesh.tensor=2")
    finish(start(base, stage, folder, split, processes=2, devices=2, forked=True), folder)
    assert f"continues after step {STEPS - 1} of {STEPS}" in log_of(folder, characters=1 << 20)
    for name, leaf in weights(folder, stage).items():
        np.testing.assert_allclose(leaf, one[name], rtol=0, atol=1e-5, err_msg=name)


def lose_one_and_start_again(base: Base, folder: pathlib.Path) -> None:
    """Kills one of two processes of a distillation: the other ends, and both start again."""
    both = functools.partial(start, processes=2, devices=2, forked=True)
    running = both(base, "distillation", folder, SETTINGS)
    assert wait_for_records(folder, "distillation", 1, running), log_of(folder)
    running[1].send_signal(signal.SIGKILL)
    assert running[0].wait(timeout=60) == -signal.SIGABRT, log_of(folder)
    assert re.search(NAMED, log_of(folder, 0, 40_000)), log_of(folder, 0, 40_000)
    finish(both(base, "distillation", folder, SETTINGS), folder)


def raised_from(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


BROKEN = jax.errors.JaxRuntimeError("INTERNAL: Barrier failed because: task is set to ERROR")


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (BROKEN, True),
        (ValueError("UNAVAILABLE: Connection closed by peer"), True),  # on fetching an array
        (raised_from(TimeoutError("waiting for a barrier"), BROKEN), True),  # orbax, while saving
        (TimeoutError("an endpoint that does not answer"), False),
        (raised_from(ValueError("weights.safetensors: got nothing"), BROKEN), False),  # our words
        (ValueError("grounding.steps: got -1, want at least 1"), False),
    ],
)
def test_a_broken_collective_is_told_from_bad_input(error: Exception, expected: bool) -> None:
    assert processes.is_runtime_error(error) == expected


# ------------------------------------------------------------------------ a stage without a model

TOY = (str(pathlib.Path(__file__).with_name("toy_stage.py")),)
EVERY = ("checkpoint.every=2", "checkpoint.keep_last=2")
# How process 0 says that it lost process 1.
NAMED = r"Task 1 heartbeat timeout|unhealthy \(stopped sending heartbeats\):\s+1\b"


@pytest.fixture(scope="module")
def light(tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A base without boards and without a model."""
    return write_config(tmp_path_factory.mktemp("light"))


def start_toys(
    light: Base,
    folder: pathlib.Path,
    count: int = 2,
    environ: Mapping[str, str] | None = None,
    forked: bool = True,
) -> list[Running]:
    return start(
        light,
        "grounding",
        folder,
        EVERY,
        processes=count,
        environ=environ,
        program=TOY,
        forked=forked,
    )


def assert_whole(folder: pathlib.Path, count: int = 2) -> None:
    """As if nothing had happened: 1 + 2 + ... + 12 taken off, a line for every step."""
    (scale,) = weights(folder, "grounding").values()
    np.testing.assert_array_equal(scale, np.full(8, -78.0, np.float32))
    rows = records(folder, "grounding")
    assert [row["step"] for row in rows] == list(range(1, 13))
    assert rows[-1]["own"] == (count - 1) / 2


@pytest.mark.parametrize(("lost", "again"), [("1, in a save", 2), ("0", 3)])
def test_where_one_is_killed_the_other_ends_and_names_it_and_all_can_start_again(
    light: Base, tmp_path: pathlib.Path, lost: str, again: int
) -> None:
    is_first = lost == "0"
    running = start_toys(light, tmp_path, environ={} if is_first else {"TOY": "1:6:killed"})
    if is_first:
        assert wait_for_records(tmp_path, "grounding", 5, running), log_of(tmp_path)
        running[0].send_signal(signal.SIGKILL)
    assert running[not is_first].wait(timeout=SLOWEST) == -signal.SIGKILL
    began = time.monotonic()
    code = running[is_first].wait(timeout=60)
    print(f"the other process ended {time.monotonic() - began:.0f} s after process {lost}")
    said = log_of(tmp_path, int(is_first), 40_000)
    assert code == -signal.SIGABRT, said
    assert re.search("leader task was preempted/died" if is_first else NAMED, said), said
    # Nothing was taken from under orbax, which went on writing.
    assert "No such file" not in said and "Directory not empty" not in said, said
    finish(start_toys(light, tmp_path, again), tmp_path)
    assert_whole(tmp_path, again)


def test_where_one_fails_it_leaves_at_once_and_the_other_hears_of_it(
    light: Base, tmp_path: pathlib.Path
) -> None:
    running = start_toys(light, tmp_path, environ={"TOY": "1:5:the words of it"})
    assert running[1].wait(timeout=SLOWEST) == 1
    began = time.monotonic()
    assert running[0].wait(timeout=60) == -signal.SIGABRT
    print(f"process 0 ended {time.monotonic() - began:.0f} s after process 1")
    assert "RuntimeError: the words of it" in log_of(tmp_path, 1)
    assert re.search(NAMED, log_of(tmp_path, 0, 40_000)), log_of(tmp_path, 0, 40_000)


def test_sigterm_to_one_of_two_saves_and_ends_both(light: Base, tmp_path: pathlib.Path) -> None:
    running = start_toys(light, tmp_path, forked=False)
    assert wait_for_records(tmp_path, "grounding", 3, running), log_of(tmp_path)
    running[1].send_signal(signal.SIGTERM)
    finish(running, tmp_path, stage_lib.EXIT_STOPPED)
    done = records(tmp_path, "grounding")[-1]["step"]
    for process in (0, 1):
        assert f"stopped after step {done} of 12, asked by SIGTERM or Ctrl-C" in log_of(
            tmp_path, process
        )
    finish(start_toys(light, tmp_path, 1), tmp_path)
    assert_whole(tmp_path, 1)


def test_a_full_disk_is_one_line(light: Base, tmp_path: pathlib.Path) -> None:
    """However many threads of orbax, tensorstore and TensorBoard fail in it."""
    mount = f"mount -t tmpfs -o size=200k tmpfs {tmp_path}"
    if not shutil.which("unshare") or subprocess.run(["unshare", "-rm", *mount.split()]).returncode:
        pytest.skip("needs the right to mount a small tmpfs in a namespace of its own")
    command = f"{mount} && cd {ROOT} && exec {sys.executable} {TOY[0]} --stage=grounding"
    flags = f"--config={light.config} --workdir={tmp_path}/run --set={EVERY[0]}"
    done = subprocess.run(
        ["unshare", "-rm", "sh", "-c", f"{command} {flags} --set=checkpoint.keep_last=9"],
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": helpers_children.PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    said = [line for line in done.stderr.splitlines() if " error: " in line]
    assert done.returncode == 74 and len(said) == 1 and "o space left" in said[0], done.stderr
    assert "Traceback" not in done.stderr
