"""A folder has one run: a second one is told whose it is, and no dead one keeps it."""

import os
import pathlib
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
from etils import epath

from mgsd_jax.workdir import locks

ROOT = pathlib.Path(__file__).parents[1]
# Holds a folder until it is killed; a forked child and a started one outlive it.
HOLDER = """
import os, subprocess, sys, time
from mgsd_jax.workdir import locks
with locks.held(sys.argv[1]):
    begun, begins = os.pipe()
    if not os.fork():
        os.write(begins, b".")
        time.sleep(600)
        os._exit(0)
    os.read(begun, 1)  # a child that has not had its turn yet still holds what its parent held
    subprocess.Popen(["sleep", "600"])
    print("held", flush=True)
    time.sleep(600)
"""


def test_a_run_holds_its_folder_until_it_is_killed_whatever_its_children_do(
    tmp_path: pathlib.Path,
) -> None:
    command = [sys.executable, "-c", HOLDER, str(tmp_path / "run")]
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    with subprocess.Popen(
        command, env=environ, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as running:
        try:
            assert running.stdout is not None and running.stdout.readline() == "held\n"
            owner = f"{tmp_path}/run: got a run of process {running.pid} on .* since .*, want one"
            with pytest.raises(ValueError, match=owner), locks.held(tmp_path / "run"):
                pass
            assert list((tmp_path / "run").iterdir()) == [tmp_path / "run" / "lock"]
            running.kill()
            running.wait()
            with locks.held(tmp_path / "run"):  # at once
                pass
        finally:
            os.killpg(running.pid, signal.SIGKILL)


def test_two_of_one_process_exclude_each_other_and_nothing_is_left(tmp_path: pathlib.Path) -> None:
    for _ in range(2):
        with (
            locks.held(tmp_path),
            pytest.raises(ValueError, match=f"process {os.getpid()} on "),
            locks.held(tmp_path),
        ):
            pass
        assert not list(tmp_path.iterdir())
    with locks.held(tmp_path / "a"), locks.held(tmp_path / "b"):
        pass


def test_of_many_that_begin_at_once_one_holds_at_a_time(tmp_path: pathlib.Path) -> None:
    """Also where a holder deletes the file while another one opens it."""
    inside, most, entered = 0, 0, 0
    guard = threading.Lock()

    def run() -> None:
        nonlocal inside, most, entered
        for _ in range(100):
            try:
                with locks.held(tmp_path):
                    with guard:
                        inside, entered = inside + 1, entered + 1
                        most = max(most, inside)
                    time.sleep(0)
                    with guard:
                        inside -= 1
            except ValueError:
                continue

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == 1 and entered > 0


@pytest.mark.parametrize("text", ["", "{", "[]", '{"pid": 3}'])
def test_an_owner_without_a_name_is_another_process(tmp_path: pathlib.Path, text: str) -> None:
    with locks.held(tmp_path):
        (tmp_path / "lock").write_text(text)
        with pytest.raises(ValueError, match="got a run of another process there"):
            locks._flock(tmp_path / "lock")


@pytest.fixture
def no_flock(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Files without locks of the kernel, and a heart that beats fast."""
    monkeypatch.setattr(locks, "_flock", lambda path: None)
    monkeypatch.setattr(locks, "BEAT", 0.05)
    monkeypatch.setattr(locks, "SETTLE", 0.02)
    monkeypatch.setattr(locks, "STALE", 2.0)
    yield


@pytest.mark.usefixtures("no_flock")
def test_a_heart_that_beats_keeps_others_out(tmp_path: pathlib.Path) -> None:
    with (
        locks.held(tmp_path),
        pytest.raises(ValueError, match=f"process {os.getpid()} on "),
        locks.held(tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_flock")
def test_a_heart_that_stands_still_is_a_dead_runs(tmp_path: pathlib.Path) -> None:
    (tmp_path / "lock").write_text(locks._owner(id="x", beat=7))
    started = time.monotonic()
    with locks.held(tmp_path):
        assert time.monotonic() - started >= locks.STALE
        assert '"id": "x"' not in (tmp_path / "lock").read_text()
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("no_flock")
def test_of_two_that_begin_at_once_the_last_to_write_goes_on(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = locks._owner(id="y", beat=0)
    monkeypatch.setattr(locks.time, "sleep", lambda _: (tmp_path / "lock").write_text(other))
    with pytest.raises(ValueError, match="want one at a time"), locks.held(tmp_path):
        pass
    assert (tmp_path / "lock").read_text() == other


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
@pytest.mark.usefixtures("no_flock")
def test_a_run_whose_folder_was_taken_over_ends(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    codes: list[int] = []
    left = threading.Event()

    def leave(code: int) -> None:
        codes.append(code)
        left.set()
        raise SystemExit  # ends the thread

    monkeypatch.setattr(locks.os, "_exit", leave)
    with locks.held(epath.Path(tmp_path)):
        (tmp_path / "lock").write_text(locks._owner(id="z", beat=0))
        assert left.wait(10)
    assert codes == [2]
