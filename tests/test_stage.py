"""The end of a step: what is saved, what is warned of, and how a run is stopped."""

import dataclasses
import json
import os
import pathlib
import signal
import subprocess
import sys
import textwrap
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from etils import epath
from helpers_tiny import tiny_config

from mgsd_jax.config import Config, override
from mgsd_jax.parallel.means import Mean
from mgsd_jax.training import optimizer, sessions
from mgsd_jax.workdir import checkpoint, folders, metrics, paths, signals


class Counter:
    """A loader whose batches are numbers."""

    def __init__(self) -> None:
        self.next = 0

    def get_state(self) -> dict[str, int]:
        return {"next": self.next}

    def set_state(self, state: dict[str, int]) -> None:
        self.next = state["next"]


@pytest.fixture
def config(tmp_path: pathlib.Path) -> Config:
    config = tiny_config(tmp_path)
    guards = dataclasses.replace(config.guards, skipped_in_a_row=3)
    return dataclasses.replace(config, guards=guards)


def run(
    folder: pathlib.Path,
    config: Config,
    losses: dict[int, float],
    signal_at: int = 0,
    number: int = signal.SIGTERM,
    notes: Sequence[Callable[[], None]] = (),
) -> optimizer.TrainState:
    """A stage of 12 steps that subtracts the step from a weight; losses are 1 but for `losses`."""
    tx = optax.sgd(1.0)
    state = optimizer.init({"a": jnp.zeros(2)}, tx)
    loader: Any = Counter()
    claim = folders.Claim(epath.Path(folder), [*notes])
    opened = sessions.open_session(
        claim, config, state, loader, metric="m", best_mode="max", steps=12
    )
    with opened as session:
        state = session.state
        for step in range(session.start + 1, 13):
            loader.next += 1
            assert loader.next == step
            loss = jnp.float32(losses.get(step, 1.0))
            state, measured = optimizer.update(state, {"a": jnp.full(2, step)}, tx, loss=loss)
            if step == signal_at:
                os.kill(os.getpid(), number)
            session.finish_step(step, state, {"loss": loss, **measured})
    return state


def steps_in(folder: pathlib.Path) -> list[int]:
    return sorted(int(p.name) for p in (folder / "checkpoints").iterdir() if p.name.isdigit())


@pytest.fixture(autouse=True)
def signals_are_as_before() -> Iterator[None]:
    logging.set_verbosity(logging.WARNING)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before
    assert signal.set_wakeup_fd(-1) == -1


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_the_step_it_is_in_and_the_run_continues_there(
    tmp_path: pathlib.Path, config: Config, number: int
) -> None:
    with pytest.raises(
        sessions.Stopped, match=r"after step 5 of 12.*continues after step 5"
    ) as raised:
        run(tmp_path, config, {}, signal_at=5, number=number)
    assert raised.value.exit_code == sessions.EXIT_STOPPED == 75
    assert steps_in(tmp_path) == [2, 4, 5]
    state = run(tmp_path, config, {})
    np.testing.assert_array_equal(state.params["a"], [-78, -78])  # 1 + 2 + ... + 12
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_a_run_whose_newest_checkpoint_is_damaged_says_so_and_goes_on_from_the_one_before(
    tmp_path: pathlib.Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(sessions.Stopped):
        run(tmp_path, config, {}, signal_at=5)
    damaged = tmp_path / "checkpoints" / "5" / "state" / "manifest.ocdbt"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    with caplog.at_level("INFO", logger="absl"):
        state = run(tmp_path, config, {})
    said = "\n".join(caplog.messages)
    assert "5: state/manifest.ocdbt" in said and "continues after step 4 of 12" in said
    np.testing.assert_array_equal(state.params["a"], [-78, -78])
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows] == list(range(1, 13))


def test_sigterm_in_the_last_step_is_the_end_of_the_run(
    tmp_path: pathlib.Path, config: Config
) -> None:
    run(tmp_path, config, {}, signal_at=12)
    assert steps_in(tmp_path)[-1] == 12


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_the_process_at_once(number: int) -> None:
    """Also where the main thread is deep in a computation, as it is while a program compiles."""
    code = """
        import hashlib
        from mgsd_jax.workdir import signals
        with signals.asked_to_stop():
            print("begins", flush=True)
            hashlib.pbkdf2_hmac("sha256", b"", b"", 1 << 30)
    """
    command = [sys.executable, "-c", textwrap.dedent(code)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as running:
        assert running.stdout is not None and running.stderr is not None
        assert running.stdout.readline() == b"begins\n"
        running.send_signal(number)
        while b"once more ends at once" not in running.stderr.readline():
            assert running.poll() is None
        running.send_signal(number)
        assert running.wait(timeout=60) == 128 + number


def test_an_ignored_ctrl_c_stays_ignored() -> None:
    """As in a job that a script has sent to the background."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with signals.asked_to_stop() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert not stop.is_set()
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_updates_that_are_not_finite_are_counted_and_not_saved_after(
    tmp_path: pathlib.Path, config: Config
) -> None:
    """Steps 3, 4 (a save would be due) and 12 are skipped; two in a row are no reason to stop."""
    bad = {3: np.nan, 4: np.inf, 12: np.nan}
    state = run(tmp_path, config, bad)
    np.testing.assert_array_equal(state.params["a"], [-78 + 19] * 2)
    rows = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert [row["step"] for row in rows if row["skipped_update"]] == [3, 4, 12]
    assert steps_in(tmp_path) == [8, 10, 12]  # the last three; there was no save at 4
    assert np.isnan(rows[2]["loss"]) and np.isinf(rows[3]["loss"])


@pytest.mark.parametrize("first", [2, 8])
def test_enough_of_them_in_a_row_stop_the_run_and_name_the_last_good_checkpoint(
    tmp_path: pathlib.Path, config: Config, first: int
) -> None:
    bad = {step: np.nan for step in range(first, first + 3)}
    good = f"{tmp_path}/checkpoints/6" if first == 8 else "none, the run starts over"
    for _ in range(2):  # starting again repeats it, to the same end
        with pytest.raises(sessions.Stopped) as raised:
            run(tmp_path, config, bad)
        assert raised.value.exit_code == sessions.EXIT_NUMBERS == 3
        assert str(raised.value) == (
            f"step {first + 2}: 3 updates in a row, all since step {first - 1}, had a loss or "
            f"gradient that is not finite; last good checkpoint: {good}"
        )
    assert steps_in(tmp_path) == ([2, 4, 6] if first == 8 else [])
    if first == 8:
        state = checkpoint.load_params(tmp_path / "checkpoints")
        np.testing.assert_array_equal(state["a"], [-21, -21])


def test_a_threshold_is_warned_of_when_it_is_passed(
    tmp_path: pathlib.Path, config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    shares = iter([0.0, 0.5, 0.5, 0.0, 0.5, *[0.0] * 7])
    tx = optax.sgd(1.0)
    state = optimizer.init({"a": jnp.zeros(2)}, tx)
    loader: Any = Counter()
    with (
        caplog.at_level("WARNING", logger="absl"),
        sessions.open_session(
            folders.Claim(epath.Path(tmp_path), []),
            config,
            state,
            loader,
            metric="m",
            best_mode="max",
            steps=12,
        ) as session,
    ):
        for step in range(1, 13):
            measured = {"loss": jnp.float32(1), "skipped_update": jnp.float32(0)}
            measured["rollout/truncated"] = Mean(next(shares), 1.0)
            session.finish_step(step, session.state, measured)
    said = [message for message in caplog.messages if "rollout/truncated is 0.5" in message]
    assert [message.partition(":")[0] for message in said] == ["step 2", "step 5"]


def test_a_collapse_stops_the_run_after_some_steps_in_a_row(
    tmp_path: pathlib.Path, config: Config
) -> None:
    lengths = [9.0, 3.0, 3.0, 9.0, 3.0, 3.0, 3.0, 9.0, 9.0, 9.0, 9.0, 9.0]
    loader: Any = Counter()
    limits = dataclasses.replace(config.guards, collapsed_in_a_row=3)
    with (
        pytest.raises(sessions.Stopped) as raised,
        sessions.open_session(
            folders.Claim(epath.Path(tmp_path), []),
            dataclasses.replace(config, guards=limits),
            optimizer.init({"a": jnp.zeros(2)}, optax.sgd(1.0)),
            loader,
            metric="m",
            best_mode="max",
            steps=12,
        ) as session,
    ):
        for step, length in enumerate(lengths, 1):
            measured = {"loss": jnp.float32(1), "skipped_update": jnp.float32(0)}
            session.finish_step(
                step, session.state, measured | {"rollout/length": Mean(length, 1.0)}
            )
    assert str(raised.value).startswith(
        "step 7: rollout/length is 3, below 4, for 3 steps in a row: a collapse; last checkpoint: 6"
    )
    assert raised.value.exit_code == sessions.EXIT_NUMBERS


SECTIONS = ("model", "data", "grounding", "checkpoint", "seed")


def claim(folder: pathlib.Path, config: Config, *changes: str) -> None:
    """A run that takes a step."""
    with folders.claimed(folder, override(config, changes), SECTIONS) as claim:
        claim.record()


def test_a_run_that_fails_before_its_first_step_leaves_the_folder_to_any_other(
    tmp_path: pathlib.Path, config: Config
) -> None:
    wrong = override(config, ["model.path=/absent"])
    with (
        pytest.raises(ValueError, match="got no config"),
        folders.claimed(tmp_path, wrong, SECTIONS) as failed,
    ):
        failed.notes.append(lambda: pytest.fail("nothing is noted"))
        raise ValueError("/absent: got no config.json")
    assert not list(tmp_path.iterdir())
    claim(tmp_path, config)
    assert [path.name for path in sorted(tmp_path.iterdir())] == [
        *("config.json", "ends.jsonl", "places.json", "runs.jsonl"),
    ]


def test_a_start_tells_its_command_devices_and_what_it_spent(
    tmp_path: pathlib.Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert folders.read_starts(tmp_path) == []
    monkeypatch.setattr(sys, "orig_argv", ["python", "-m", "mgsd_jax.main", "--set", "a=b c"])
    claim(tmp_path, config)
    with pytest.raises(RuntimeError), folders.claimed(tmp_path, config, SECTIONS) as second:
        second.record()
        raise RuntimeError("an error")
    with folders.claimed(tmp_path, config, SECTIONS):
        pass  # nothing was left to do
    folders.write_start(tmp_path, {"count": jax.device_count()})  # one that was killed
    claim(tmp_path, config)
    starts = folders.read_starts(tmp_path)
    assert [start["seconds"] is None for start in starts] == [False, False, True, False]
    for start in starts:
        assert start["command"] == ["python", "-m", "mgsd_jax.main", "--set", "a=b c"]
        assert start["devices"]["count"] == jax.device_count() and start["cores"] >= 1
    assert 0 <= starts[0]["seconds"] < 60 and starts[0]["core_seconds"] >= 0
    (tmp_path / folders.ENDS_FILE).write_text('{"seconds": 1}\n')
    with pytest.raises(ValueError, match=r"ends\.jsonl, line 1: time: not found"):
        folders.read_starts(tmp_path)


def test_no_account_is_worth_an_error(
    tmp_path: pathlib.Path, config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = paths.write_whole

    def full(path: Any, content: str) -> None:
        if str(path).endswith(folders.ENDS_FILE):
            raise OSError(28, "No space left on device")
        write(path, content)

    monkeypatch.setattr(paths, "write_whole", full)
    claim(tmp_path, config)
    assert [start["seconds"] for start in folders.read_starts(tmp_path)] == [None]


def test_a_folder_is_claimed_by_what_changes_results_alone(
    tmp_path: pathlib.Path, config: Config
) -> None:
    claim(tmp_path, config)
    # The advice of other errors, memory that ran out, another machine.
    free = (
        *("data.prompt_buckets=(44, 60)", "data.patch_buckets=(36, 64)", "data.workers=3"),
        *("data.teacher_buckets=(60,)", "data.sequence_buckets=(120,)", "model.remat=full"),
        *("grounding.microbatches=2", "grounding.token_chunk=7", "grounding.eval_every=3"),
        *("checkpoint.every=7", "checkpoint.keep_last=9", "checkpoint.keep_best=0"),
    )
    claim(tmp_path, config, *free, "mesh.tensor=2", "guards.skipped_in_a_row=5")
    claim(tmp_path, config, "evaluate.batch_size=9", "distillation.steps=3")  # not read here
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    for change in ("grounding.batch_size=8", "grounding.steps=5", "seed=3", "checkpoint.use=best"):
        name = change.partition("=")[0]
        with pytest.raises(ValueError) as raised:
            claim(tmp_path, config, *free, change)
        line = str(raised.value)
        assert f"{name}: got " in line and "\n" not in line and "buckets" not in line
        assert line.endswith(
            f"set that back, take another --workdir, or remove {tmp_path} to start anew"
        )
    assert len((tmp_path / "runs.jsonl").read_text().splitlines()) == 3
    bound, other = ("grounding.eval_every",), override(config, ["grounding.eval_every=9"])
    with (
        pytest.raises(ValueError, match=r"grounding\.eval_every: got 9, want 2"),
        folders.claimed(tmp_path, other, SECTIONS, bound),
    ):
        pass


def test_a_folder_of_an_older_version_that_noted_every_field_is_read(
    tmp_path: pathlib.Path, config: Config
) -> None:
    claim(tmp_path, config)
    noted = json.loads((tmp_path / "config.json").read_text())
    del noted["checkpoint"], noted["data"]["sprites"]
    (tmp_path / "config.json").write_text(json.dumps(noted))
    claim(tmp_path, config, "data.workers=2")


def test_two_runs_of_one_folder_are_one_too_many(tmp_path: pathlib.Path, config: Config) -> None:
    with (
        folders.claimed(tmp_path, config, SECTIONS),
        pytest.raises(ValueError, match=rf"{tmp_path}: got a run of process {os.getpid()} on "),
        folders.claimed(tmp_path, config, SECTIONS),
    ):
        pass


@pytest.mark.parametrize(("losses", "first"), [({}, 1), ({1: np.nan, 2: np.inf}, 3)])
def test_the_claim_comes_with_the_first_update_that_is_finite(
    tmp_path: pathlib.Path, config: Config, losses: dict[int, float], first: int
) -> None:
    def note() -> None:
        noted.append(len(metrics.read_metrics(tmp_path / "metrics.jsonl")) + 1)

    noted: list[int] = []
    run(tmp_path, config, losses, notes=[note])
    assert noted == [first]
    noted.clear()
    with pytest.raises(sessions.Stopped):
        run(tmp_path / "never", config, dict.fromkeys(range(1, 13), np.nan), notes=[note])
    assert noted == []
