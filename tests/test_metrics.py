"""Weighted means add up exactly; the writer's file survives kills, resumes and NaN."""

import contextlib
import json
import math
import operator
import pathlib
import struct
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgsd_jax.parallel import means
from mgsd_jax.parallel.means import Mean
from mgsd_jax.workdir import folders, metrics, paths


@settings(deadline=None)
@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(0, 5)), min_size=1, max_size=9))
def test_means_of_parts_add_up_to_the_mean_of_the_whole(rows: list[tuple[int, int]]) -> None:
    total = Mean(0.0, 0.0)
    for value, weight in rows:
        total = total + Mean(value * weight, weight)
    weights = [weight for _, weight in rows]
    want = np.average([value for value, _ in rows], weights=weights) if any(weights) else 0.0
    assert total.value == pytest.approx(want)


def test_an_empty_mean_is_zero_under_jit_and_so_is_its_gradient() -> None:
    def masked_mean(values: jax.Array, mask: jax.Array) -> jax.Array:
        return Mean(jnp.sum(values * mask), jnp.sum(mask)).value

    value, gradient = jax.jit(jax.value_and_grad(masked_mean))(jnp.arange(3.0), jnp.zeros(3))
    assert value == 0.0
    np.testing.assert_array_equal(gradient, np.zeros(3))
    assert Mean(0, 0).value == 0


def test_a_mean_is_a_pytree_and_adds_nothing_but_means() -> None:
    doubled = jax.tree.map(lambda leaf: 2 * leaf, {"loss": Mean(1.0, 2.0)})
    assert doubled == {"loss": Mean(2.0, 4.0)}
    other: Any = (1.0, 2.0)
    with pytest.raises(TypeError):
        operator.add(Mean(1.0, 2.0), other)


def test_means_to_floats() -> None:
    got = means.means_to_floats(
        {"a": Mean(jnp.float32(3), jnp.float32(2)), "b": np.float32(0.5), "c": 4, "d": np.ones(1)}
    )
    assert got == {"a": 1.5, "b": 0.5, "c": 4.0, "d": 1.0}
    assert all(type(value) is float for value in got.values())
    with pytest.raises(ValueError, match="'bad'"):
        means.means_to_floats({"bad": np.zeros(2)})


def test_timers_accumulate_by_phase_and_start_again(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter([0.0, 1.0, 10.0, 12.0, 20.0, 25.0])
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: next(clock))
    timers = metrics.Timers()
    with timers.phase("rollout"):
        pass
    with timers.phase("update"):
        pass
    with contextlib.suppress(KeyError), timers.phase("rollout"):
        raise KeyError
    assert timers.take() == {"rollout": 6.0, "update": 2.0}
    assert timers.take() == {}


def write_steps(folder: pathlib.Path, steps: range, **options: Any) -> None:
    with metrics.open_writer(folder, **options) as writer:
        for step in steps:
            writer.write(step, {"loss": Mean(float(step), 2.0)})


def steps_of(folder: pathlib.Path) -> list[int]:
    return [record["step"] for record in metrics.read_metrics(folder / "metrics.jsonl")]


def test_a_line_has_step_time_and_values(tmp_path: pathlib.Path) -> None:
    write_steps(tmp_path, range(1, 3))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    assert [(r["step"], r["loss"]) for r in records] == [(1, 0.5), (2, 1.0)]
    assert records[0]["time"] <= records[1]["time"]
    assert records == metrics.read_metrics(tmp_path / "metrics.jsonl")


def test_non_finite_values_leave_the_json_valid_and_come_back(tmp_path: pathlib.Path) -> None:
    values = {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 1e-300}
    with metrics.open_writer(tmp_path) as writer:
        writer.write(1, {**values, "e": jnp.float32(jnp.nan)})

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    line = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert (line["a"], line["b"], line["c"], line["e"]) == ("nan", "inf", "-inf", "nan")
    (record,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(record["a"]) and record["b"] == math.inf and record["c"] == -math.inf
    assert record["d"] == 1e-300


def test_resume_drops_the_steps_that_will_be_repeated(tmp_path: pathlib.Path) -> None:
    write_steps(tmp_path, range(0, 8))
    write_steps(tmp_path, range(5, 10), step=4)
    assert steps_of(tmp_path) == list(range(10))
    write_steps(tmp_path, range(0, 2), step=0)
    assert steps_of(tmp_path) == [0, 1]


def test_a_half_written_last_line_is_dropped_on_resume(tmp_path: pathlib.Path) -> None:
    write_steps(tmp_path, range(0, 3))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    assert steps_of(tmp_path) == [0, 1, 2]
    write_steps(tmp_path, range(3, 5), step=3)
    assert steps_of(tmp_path) == [0, 1, 2, 3, 4]


def test_a_kill_while_dropping_leaves_the_old_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_steps(tmp_path, range(0, 4))

    def killed(*paths: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(paths.os, "replace", killed)
    with pytest.raises(KeyboardInterrupt), metrics.open_writer(tmp_path, step=1):
        pass
    assert steps_of(tmp_path) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        *("{'step': 1}", '{"loss": 1}', "[1]", '{"step": "2"}', "", '{"step": true}', "\xff"),
        *("[" * 100_000, '{"step": ' + "9" * 5000 + "}"),
    ],
)
def test_a_damaged_line_is_an_error_with_file_and_number(tmp_path: pathlib.Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1}}\n{line}\n{{"step": 3}}\n'.encode("latin-1"))
    for read in (metrics.read_metrics, lambda _: write_steps(tmp_path, range(0))):
        with pytest.raises(ValueError, match=r"metrics\.jsonl, line 2") as raised:
            read(path)
        assert len(str(raised.value)) < 300 and "\n" not in str(raised.value)


def test_a_metric_cannot_overwrite_the_step(tmp_path: pathlib.Path) -> None:
    with metrics.open_writer(tmp_path) as writer, pytest.raises(ValueError, match="step"):
        writer.write(1, {"step": 2.0})


def test_tensorboard_gets_the_same_values(tmp_path: pathlib.Path) -> None:
    with metrics.open_writer(tmp_path) as writer:
        writer.write(3, {"kl/state": Mean(3.0, 4.0)})
    (record,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert record["kl/state"] == 0.75
    (events,) = (tmp_path / "tensorboard").glob("events.out.tfevents.*")
    content = events.read_bytes()
    assert b"kl/state" in content and struct.pack("<f", 0.75) in content


def test_run_info_keeps_the_config_and_one_line_a_start(tmp_path: pathlib.Path) -> None:
    folders.write_run_info(tmp_path, {"optim": {"lr": 1e-4}, "levels": (3, 4)})
    folders.write_run_info(tmp_path, {"optim": {"lr": 1e-4}, "levels": (3, 4)})
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "optim": {"lr": 1e-4},
        "levels": [3, 4],
    }
    starts = [json.loads(line) for line in (tmp_path / "runs.jsonl").read_text().splitlines()]
    assert len(starts) == 2
    assert starts[0]["versions"]["jax"] == jax.__version__
    commit = starts[0]["commit"]
    assert commit is None or len(commit) == 40


def test_a_config_that_is_no_json_is_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError):
        folders.write_run_info(tmp_path, {"lr": math.nan})
    assert not (tmp_path / "config.json").exists()
