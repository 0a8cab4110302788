"""benchmarks/gpu.py at nano size on a CPU: every phase runs and measures what it says."""

import argparse
import dataclasses
import importlib
import json
import os
import pathlib
import time
from typing import Any

import jax
import pytest

from mgsd_jax.model.flops import PEAK
from mgsd_jax.parallel import chips
from mgsd_jax.weights.released import find_config

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
ROWS, RESPONSE, PROMPT = 2, 4, 44


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # it sets a default of its own
    return importlib.import_module("gpu")


def options(gpu: Any, *more: str) -> Any:
    sizes = (f"--rows={ROWS}", f"--response={RESPONSE}", "--rounds=1", "--guesses=2")
    return gpu.complete(gpu.parser().parse_args(["--size=nano", *sizes, *more]))


def test_peaks_of_gpus_are_known_once() -> None:
    assert not chips.GPUS.keys() & chips.CHIPS.keys()
    for kind, chip in chips.GPUS.items():
        assert PEAK[kind] == chip.flops


def test_4b_is_measured_at_the_shapes_of_the_release(gpu: Any) -> None:
    asked = gpu.complete(gpu.parser().parse_args(["--all"]), "gpu")
    assert (asked.size, asked.rounds, asked.budget) == ("4b", 2, 480)
    config = gpu.gpu_case.make_config(asked)
    model = find_config(config.model.path)
    assert model.text.vocab_size == 151_936 and model.text.hidden_size == 2560
    assert config.model.compute_dtype == "bfloat16" and config.distillation.microbatches == 1
    prompts = gpu.gpu_case.make_prompts(config)
    assert prompts.student.tokens.shape == (32, 384) and prompts.student.valid.all()
    assert prompts.teacher.tokens.shape == (32, 512) and prompts.teacher.valid.all()
    assert prompts.student.pictures.patches.shape == (32, 1, 256, 3 * 2 * 16 * 16)
    is_picture = prompts.student.tokens == model.image_token_id
    assert (is_picture.sum(axis=1) == 64).all()
    assert ((prompts.student.pictures.slots >= 0) == is_picture).all()


def test_the_most_important_phases_come_first(gpu: Any) -> None:
    every = list(gpu.phases(gpu.complete(gpu.parser().parse_args(["--all"]), "gpu")))
    assert every[:4] == ["rollout", "drafts", "update 512", "update 2048"]
    rest = ["loss", "torch loss", "torch rollout", "torch update", "update 256"]
    assert sorted(every[4:]) == rest
    few = gpu.complete(gpu.parser().parse_args(["--size=nano"]))
    assert list(gpu.phases(few)) == ["rollout", "update 62", "loss"] and few.budget is None


@pytest.mark.slow
def test_phases_at_nano_size(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = jax.devices()[0].device_kind
    # Peaks so low that no machine is slower.
    monkeypatch.setitem(chips.GPUS, kind, chips.Chip("slow", 1e3, 1.0, 1e3, 1e3))
    ours, asked = gpu.gpu_ours, options(gpu)
    result: dict[str, Any] = {}
    for phase in (ours.rollout, ours.drafts, ours.update, ours.loss):
        gpu.merge(result, phase(asked))
    prefill, decode, loss = (result[name] for name in ("prefill", "decode", "loss"))
    assert prefill["tokens_per_s"] == pytest.approx(ROWS * PROMPT / prefill["seconds"], rel=1e-2)
    assert prefill["of_limit"] > 1
    assert decode["limit_step_seconds"] > 0
    update = result["update"][str(RESPONSE)]
    assert update["trained"] == "all" and update["seconds"] > 0 and update["loss"] >= 0
    assert loss["tokens"] == ROWS * RESPONSE and loss["seconds"] > 0
    text = find_config(gpu.gpu_case.make_config(asked).model.path).text
    bound = 8 * loss["tokens"] * text.vocab_size * text.hidden_size / 1e3
    assert loss["bound_seconds"] == pytest.approx(bound, rel=1e-2)

    # Guessed by itself, a response of four tokens is the prompt's and one pass of three.
    drafts = result["drafts"]
    assert drafts["corrupted_0"]["passes"] == 1 and drafts["corrupted_0"]["kept_a_pass"] == 3
    assert all(drafts[f"corrupted_{percent}"]["equal_tokens"] == 1 for percent in (0, 10, 30))

    less = update["needed_gib"] * ours.GIB * 0.99
    case = dataclasses.replace(ours.make_case(asked), room=less)
    prompts = gpu.gpu_case.make_prompts(case.config)
    found = ours.measure_update(case, ours.make_params(case), prompts)
    assert found["trained"] == "adapters of rank 8"


@pytest.mark.slow
def test_torch_beside_it(gpu: Any) -> None:
    pytest.importorskip("torch")
    result: dict[str, Any] = {}
    for phase in ("rollout", "update", "loss"):
        gpu.merge(result, gpu.theirs(options(gpu), phase))
    found = result["torch"]
    assert found["prefill"]["tokens_per_s"] > 0 and found["update"]["loss"] >= 0
    assert found["loss"]["tokens"] == ROWS * RESPONSE


def test_what_is_missing_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    assert gpu.theirs(options(gpu), "loss") == {"skipped": "got no torch"}


# ------------------------------------------------------------------------------------- the budget


def test_a_result_is_there_after_every_phase_and_the_budget_ends_the_rest(
    gpu: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, clock = tmp_path / "out.json", [0.0]
    seen: list[tuple[float | None, dict[str, Any]]] = []

    def fake_alone(function: Any, options: Any, seconds: float | None) -> dict[str, Any]:
        if function is gpu.gpu_ours.describe:
            return {"backend": "cpu", "device": "x", "jax": "y"}
        seen.append((seconds, json.loads(out.read_text()) if out.exists() else {}))
        clock[0] += 100
        name = f"phase {len(seen)}"
        return {"skipped": "died"} if len(seen) == 2 else {"update": {name: {"seconds": 0.123456}}}

    monkeypatch.setattr(gpu, "alone", fake_alone)
    monkeypatch.setattr(gpu.time, "perf_counter", lambda: clock[0])
    asked = gpu.parser().parse_args(["--all", "--size=nano", "--budget=310", f"--out={out}"])
    result = gpu.measure(asked)
    assert [seconds for seconds, _ in seen] == [310, 210, 110]
    assert seen[1][1]["update"] == {"phase 1": {"seconds": 0.1235}}  # on disk before the second
    assert list(result["update"]) == ["phase 1", "phase 3"]
    assert result["skipped"].pop("drafts") == "died"
    assert set(result["skipped"].values()) == {"no time left of 310 s"}
    assert len(result["skipped"]) == 6
    assert json.loads(out.read_text())["skipped"] == {"drafts": "died", **result["skipped"]}


def test_a_large_model_is_not_tried_on_a_cpu(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "alone", lambda *_: {"backend": "cpu", "device": "x"})
    with pytest.raises(SystemExit, match="got 4b on a CPU, want nano"):
        gpu.measure(gpu.parser().parse_args(["--size=4b"]))


def dies(options: argparse.Namespace) -> dict[str, Any]:
    os._exit(9)


def sleeps(options: argparse.Namespace) -> dict[str, Any]:
    time.sleep(600)
    return {}


def fails(options: argparse.Namespace) -> dict[str, Any]:
    raise MemoryError("no room\nat all")


@pytest.mark.slow
def test_a_phase_that_ends_badly_is_named(gpu: Any) -> None:
    asked = argparse.Namespace()
    assert gpu.alone(dies, asked, None) == {"skipped": "ended with exit code 9"}
    assert gpu.alone(fails, asked, None) == {"skipped": "MemoryError: no room"}
    assert gpu.alone(sleeps, asked, 0.1)["skipped"].startswith("not done in the 0 s")
