"""One time that is left, which no validation upsets; a bar in a terminal, else few lines."""

import io
import sys
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import pytest

from mgsd_jax.training import sessions
from mgsd_jax.workdir import progress as progress_lib
from mgsd_jax.workdir.progress import mean_cost, open_progress, time_left


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[float]]:
    """The time, in seconds, as progress sees it."""
    now = [0.0]
    monkeypatch.setattr(progress_lib.time, "perf_counter", lambda: now[0])
    yield now


def test_one_hiccup_does_not_count() -> None:
    assert mean_cost([3.0]) == 3.0
    assert mean_cost([3.0, 1.0]) == 1.0
    assert mean_cost([2.0, 1.0, 60.0, 3.0]) == 2.0


def test_what_is_left_counts_every_kind_of_work() -> None:
    spent = {"step": [1.0, 1.0], "validation": [30.0]}
    assert time_left(spent, {"step": 100, "validation": 5}) == "04:10"
    assert time_left(spent, {"step": 100, "validation": 0, "checkpoint": 0}) == "01:40"
    # A checkpoint has not been seen yet.
    assert time_left(spent, {"step": 100, "checkpoint": 2}) == "more than 01:40"


@pytest.mark.parametrize("every", [0, 1, 3, 7, 10, 20])
def test_times_due_counts_what_is_due(every: int) -> None:
    for steps in (1, 7, 10):
        for step in range(steps + 1):
            due = [s for s in range(step + 1, steps + 1) if sessions.is_due(s, every, steps)]
            assert sessions.times_due(step, every, steps) == len(due)


def test_in_a_terminal_there_is_a_bar_and_a_line_for_what_is_kept(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with (
        caplog.at_level("INFO", logger="absl"),
        open_progress("grounding", 50, start=10, is_main=True) as progress,
    ):
        for step in range(11, 51):
            clock[0] += 1.0
            progress.spend("step", 1.0)
            progress.update(step, {"step": 50 - step}, ["loss 1.25"], kept=step == 30)
    shown = stream.getvalue().split("\r")
    assert " 20%|##        | grounding 10/50 steps" in shown
    assert " 24%|##4       | grounding 12/50 steps  00:38 left  loss 1.25" in shown
    assert caplog.messages == [
        "grounding 30/50 steps  00:20 left  loss 1.25",
        "grounding 50/50 steps  done  loss 1.25",
    ]


def test_without_a_terminal_there_is_a_line_every_ten_seconds_and_later_every_minute(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, clock: list[float]
) -> None:
    stream = io.StringIO()
    monkeypatch.setattr(sys, "stderr", stream)
    with (
        caplog.at_level("INFO", logger="absl"),
        open_progress("evaluate", 7200, is_main=True, unit="row") as progress,
    ):
        for row in range(1, 7201):
            clock[0] += 1.0
            progress.spend("row", 1.0)
            progress.update(row, {"row": 7200 - row})
    assert stream.getvalue() == ""
    rows = [int(message.split()[1].partition("/")[0]) for message in caplog.messages]
    assert rows[:3] == [10, 20, 30] and rows[-1] == 7200
    assert rows[-3] - rows[-4] == 60
    assert "evaluate 10/7200 rows  1:59:50 left" in caplog.messages


def test_a_count_shows_itself(caplog: pytest.LogCaptureFixture, clock: list[float]) -> None:
    with (
        caplog.at_level("INFO", logger="absl"),
        open_progress("generate", 20, is_main=True, unit="board") as progress,
    ):
        for _ in range(20):
            clock[0] += 2.0
            progress.count()
    assert caplog.messages[0] == "generate 5/20 boards  00:30 left"
    assert caplog.messages[-1] == "generate 20/20 boards  done"


def test_other_processes_show_nothing(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    stream = Terminal()
    monkeypatch.setattr(sys, "stderr", stream)
    with (
        caplog.at_level("INFO", logger="absl"),
        open_progress("grounding", 10, is_main=False) as progress,
    ):
        progress.update(1, {"step": 9}, kept=True)
    assert stream.getvalue() == "" and not caplog.messages


def test_compilations_are_taken_once() -> None:
    with open_progress("grounding", 10, is_main=True) as progress:
        jax.block_until_ready(jax.jit(lambda x: x * 3.25)(jnp.ones(3)))
        assert progress.take_compiled() > 0 and progress.take_compiled() == 0
    jax.block_until_ready(jax.jit(lambda x: x * 4.25)(jnp.ones(3)))
    assert progress.compiled == []
