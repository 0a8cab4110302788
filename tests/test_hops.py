"""A reader's way from the command line to the gradient, and to the formula of a divergence."""

import dataclasses
import pathlib
import traceback
from typing import Any, NoReturn

import jax.numpy as jnp
import pytest
from absl.testing import flagsaver
from helpers_tiny import tiny_config

from mgsd_jax import main
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import generate, init
from mgsd_jax.training import divergences

# Every function of ours on the way: `jax.value_and_grad` is called by the last of the first.
TO_THE_GRADIENT = [
    "main.main",
    "distillation.run",
    "distillation_step.update",
    "optimizer.accumulate",
]
TO_THE_FORMULA = [
    *TO_THE_GRADIENT,
    "distillation_step.loss_fn",
    "losses.distill",
    "fused_head._forward",
    "fused_head._run_part",
    "fused_head.body",
    "losses._divergence_chunk",
    "divergences.value_and_gradient",
]


class Reached(Exception):
    """The formula is reached."""


def test_build_lists_the_way() -> None:
    listed = (pathlib.Path(__file__).parents[1] / "BUILD.md").read_text()
    listed = " ".join(listed.split()).partition("**Hops.**")[2]
    places = [listed.find(f"`{step}`") for step in TO_THE_FORMULA]
    assert -1 not in places and places == sorted(places)


def test_the_way_from_the_command_line_to_the_formula(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path, layers=1)
    student = dataclasses.replace(config.distillation, student=config.model.path)
    config = dataclasses.replace(config, distillation=student)
    ways: list[list[str]] = []
    init.run(config, str(tmp_path))
    generate.run(config, str(tmp_path))

    def formula(p: Any, q: Any) -> NoReturn:
        frames = [(pathlib.Path(f.filename), f.name) for f in traceback.extract_stack()]
        package = pathlib.Path(main.__file__).parent
        ways.append([f"{file.stem}.{name}" for file, name in frames if package in file.parents])
        raise Reached

    def rollout(sampler: Sampler, _: Any, inputs: Any, *__: Any) -> Rollout:
        shape = (inputs.tokens.shape[0], sampler.sampling.max_new_tokens)
        zeros = jnp.zeros(shape, jnp.float32)
        return Rollout(jnp.zeros(shape, jnp.int32), zeros == 0, zeros, zeros[:, 0] > 0, zeros > 0)

    monkeypatch.setitem(divergences.DIVERGENCES, "reverse_kl", formula)
    monkeypatch.setattr(Sampler, "rollout", rollout)
    monkeypatch.setattr(main.command_line, "load_config", lambda *_: config)
    # Processes join before JAX is up, which it is here.
    monkeypatch.setattr(main.processes, "join", lambda *_: False)
    flags = ["--stage=distillation", "--config=tiny", f"--workdir={tmp_path}"]
    with flagsaver.flagsaver(), pytest.raises(Reached):
        main.main(main.parse_flags(["mgsd_jax", *flags]))
    assert ways == [TO_THE_FORMULA]
    # An arrow for each step: to value_and_grad, and to the formula.
    assert len(TO_THE_GRADIENT) <= 4
    assert len(TO_THE_FORMULA) <= 12
