"""benchmarks/gpu.py at nano size on a CPU: every phase runs and measures what it says."""

import importlib
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import pytest

from mgsd_jax.model.flops import PEAK
from mgsd_jax.parallel import chips

BENCHMARKS = pathlib.Path(__file__).parents[1] / "benchmarks"
ROWS, RESPONSE, PROMPT = 2, 4, 44


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setenv("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.5")  # it sets a default of its own
    jax.config.update("jax_disable_most_optimizations", True)  # a third of the compilation
    yield importlib.import_module("gpu")
    jax.config.update("jax_disable_most_optimizations", False)


def options(gpu: Any, *more: str) -> Any:
    sizes = (f"--rows={ROWS}", f"--response={RESPONSE}", "--rounds=1")
    return gpu.parser().parse_args(["--size=nano", *sizes, *more])


def test_peaks_of_gpus_are_known_once() -> None:
    assert not chips.GPUS.keys() & chips.CHIPS.keys()
    for kind, chip in chips.GPUS.items():
        assert PEAK[kind] == chip.flops


def test_4b_is_measured_at_the_shapes_of_the_release(gpu: Any) -> None:
    config = gpu.make_config(gpu.complete(gpu.parser().parse_args(["--size=4b"])))
    model = gpu.programs.make_model(config, config.distillation.student, None)
    assert model.config.text.vocab_size == 151_936 and model.config.text.hidden_size == 2560
    assert config.model.compute_dtype == "bfloat16" and config.distillation.microbatches == 1
    prompts = gpu.make_prompts(config, model.config)
    assert prompts.student.tokens.shape == (32, 384) and prompts.student.valid.all()
    assert prompts.teacher.tokens.shape == (32, 512) and prompts.teacher.valid.all()
    assert prompts.student.pictures.patches.shape == (32, 1, 256, 3 * 2 * 16 * 16)
    is_picture = prompts.student.tokens == model.config.image_token_id
    assert (is_picture.sum(axis=1) == 64).all()
    assert ((prompts.student.pictures.slots >= 0) == is_picture).all()


@pytest.mark.slow
def test_all_phases_at_nano_size(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kind = jax.devices()[0].device_kind
    # Peaks so low that no machine is slower.
    monkeypatch.setitem(chips.GPUS, kind, chips.Chip("slow", 1e3, 1.0, 1e3, 1e3))
    result = gpu.rounded(gpu.ours(options(gpu)))
    assert (result["size"], result["prompt"], result["device"]) == ("nano", PROMPT, kind)
    prefill, decode, update, loss = (result[x] for x in ("prefill", "decode", "update", "loss"))
    assert prefill["tokens_per_s"] == pytest.approx(ROWS * PROMPT / prefill["seconds"], rel=1e-2)
    assert prefill["of_limit"] > 1
    assert decode["limit_step_seconds"] > 0
    assert update["trained"] == "all" and update["seconds"] > 0 and update["loss"] >= 0
    assert loss["tokens"] == ROWS * RESPONSE and loss["seconds"] > 0
    text = nano_case(gpu).model.config.text
    bound = 8 * loss["tokens"] * text.vocab_size * text.hidden_size / 1e3
    assert loss["bound_seconds"] == pytest.approx(bound, rel=1e-2)

    less = update["needed_gib"] * gpu.GIB * 0.99
    assert measure_update(gpu, less)["trained"] == "adapters of rank 8"


def nano_case(gpu: Any, room: float = 0.0) -> Any:
    config = gpu.make_config(gpu.complete(options(gpu)))
    model = gpu.programs.make_model(config, config.distillation.student, None)
    return gpu.Case(config, model, None, room, 1)


def measure_update(gpu: Any, room: float) -> dict[str, Any]:
    case = nano_case(gpu, room)
    params = gpu.init_params(case.model.config, jax.random.key(0))
    return gpu.measure_update(case, params, gpu.make_prompts(case.config, case.model.config))


@pytest.mark.slow
def test_torch_beside_it(gpu: Any) -> None:
    pytest.importorskip("torch")
    result = gpu.theirs(gpu.complete(options(gpu)))
    assert result["prefill"]["tokens_per_s"] > 0 and result["update"]["loss"] >= 0
    assert result["loss"]["tokens"] == ROWS * RESPONSE


def test_what_is_missing_is_said(gpu: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    find_spec = gpu.importlib.util.find_spec
    monkeypatch.setattr(
        gpu.importlib.util, "find_spec", lambda name: None if name == "torch" else find_spec(name)
    )
    assert gpu.theirs(options(gpu)) == {"skipped": "got no torch"}
