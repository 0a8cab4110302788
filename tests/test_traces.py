"""Traces of steps: which of them, where they lie, and one for each process."""

import gzip
import json
import pathlib

import jax
import jax.numpy as jnp
import pytest

from mgsd_jax.workdir import metrics, traces


def steps(folder: pathlib.Path, span: str, start: int, last: int) -> None:
    """A stage that is resumed at `start` and ends after step `last` of 9."""
    double = jax.jit(lambda x: 2 * x)
    with traces.open_tracer(folder, span, start=start, steps=9) as tracer:
        tracer.begin(start + 1)
        for step in range(start + 1, last + 1):
            with metrics.Timers().phase("rollout"):
                computed = double(jnp.ones(3))
            tracer.end(step, computed)
            tracer.begin(step + 1)


@pytest.mark.parametrize(
    ("start", "last", "wanted"),
    [(0, 9, [2, 3, 4]), (2, 9, [3, 4]), (0, 3, [2, 3]), (0, 1, None), (4, 9, None)],
)
def test_the_steps_of_the_span_that_are_run_are_traced(
    start: int,
    last: int,
    wanted: list[int] | None,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 3)
    with caplog.at_level("WARNING", logger="absl"):
        steps(tmp_path, "2:4", start, last)
    folder = tmp_path / "tensorboard" / "plugins" / "profile" / "steps_2-4"
    if wanted is None:
        # Step 2 had begun where the run ended after step 1; nothing was left of it after step 4.
        assert folder.exists() == (start == 0)
        assert len(caplog.messages) == (start > 0)
        return
    names = {"process_3.xplane.pb", "process_3.trace.json.gz"}
    assert {file.name for file in folder.iterdir()} == names
    with gzip.open(folder / "process_3.trace.json.gz") as file:
        events = json.load(file)["traceEvents"]
    marked = [e["args"]["step_num"] for e in events if e.get("name") == "step" and "args" in e]
    assert sorted(int(number) for number in marked) == wanted
    assert sum(event.get("name") == "rollout" for event in events) == len(wanted)
    assert not caplog.messages


def test_the_batches_of_an_evaluation_are_steps(tmp_path: pathlib.Path) -> None:
    with traces.open_tracer(tmp_path, "2:2") as tracer:
        assert list(tracer.each("ab")) == ["a", "b"]
        assert list(tracer.each("c")) == ["c"]
    assert len(list(tmp_path.rglob("*.xplane.pb"))) == 1


def test_without_a_span_nothing_is_traced(tmp_path: pathlib.Path) -> None:
    steps(tmp_path, "", 0, 3)
    assert not list(tmp_path.iterdir())
