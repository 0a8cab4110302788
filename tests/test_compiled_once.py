"""A program is compiled once a bucket, whatever the mixture, and a rollout reads nothing back."""

import collections
import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from helpers_tiny import tiny_config

from mgsd_jax import config as c
from mgsd_jax.data import segments
from mgsd_jax.data.batch import Inputs
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import distillation, distillation_step, generate, grounding, init

COMPILED = "/jax/core/compile/backend_compile_duration"
BOARDS = (
    c.LevelSet("frozenlake", (3, 4), train=6, val=1, test=1),
    c.LevelSet("maze", (3, 5), train=6, val=1, test=1),
    c.LevelSet("minibehaviour", (5,), train=6, val=1, test=1),
)
EPOCH = 30 // 2  # batches of two
Shape = tuple[int, ...]
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[c.Config, pathlib.Path]:
    """Boards of three tasks with pictures of 36, 64 and 100 patches, and two buckets for each.

    A model of one layer: how often it is compiled does not depend on how many there are.
    """
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(workdir, layers=1)
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(
            config.data,
            boards=BOARDS,
            prompt_buckets=(20, 36),  # 20, 27 and 36 tokens
            teacher_buckets=(36, 70),  # 29 to 66
            sequence_buckets=(52, 110),  # 31 to 100
            patch_buckets=(36, 100),
        ),
        grounding=dataclasses.replace(
            config.grounding, steps=2 * EPOCH, batch_size=2, eval_every=0, eval_batches=1
        ),
        distillation=dataclasses.replace(
            config.distillation,
            student="{model}",
            # A width of its own: no program of another test is found in jax's caches.
            sampling=c.SamplingConfig(max_new_tokens=5),
            steps=2 * EPOCH,
            batch_size=2,
            eval_every=0,
            eval_boards=3,
        ),
        evaluate=dataclasses.replace(
            config.evaluate, sampling=c.SamplingConfig(max_new_tokens=6, temperature=0.0)
        ),
        checkpoint=c.CheckpointConfig(every=0),
    )
    init.run(config, str(workdir))
    generate.run(config, str(workdir))
    return config, workdir


@pytest.fixture
def compiled() -> Iterator[list[str]]:
    """The name of every program that is compiled from here on, such as 'jit(update)'."""
    names: list[str] = []

    def note(event: str, duration_secs: float, **kwargs: Any) -> None:
        if event == COMPILED:
            names.append(kwargs["fun_name"])

    jax.monitoring.register_event_duration_secs_listener(note)
    yield names
    jax.monitoring.unregister_event_duration_listener(note)


def shape_of(inputs: Inputs) -> Shape:
    """(B, T, P) of a batch with pictures."""
    assert inputs.pictures is not None
    return (*inputs.tokens.shape, inputs.pictures.patches.shape[2])


def test_distillation_compiles_once_a_bucket_and_its_rollouts_read_nothing_back(
    base: tuple[c.Config, pathlib.Path], compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = base
    prefills: set[Shape] = set()
    decodes: set[Shape] = set()
    updates: collections.Counter[Shape] = collections.Counter()
    rollout, make_update = Sampler.rollout, distillation_step.make_update

    def noting_rollout(self: Sampler, variables: Any, inputs: Inputs, *rest: Any) -> Rollout:
        if self.sampling.temperature == 0:  # validation's
            return rollout(self, variables, inputs, *rest)
        if shape_of(inputs) not in prefills:
            # Traced whole: what asked for a value of an array on the way would fail here.
            jax.eval_shape(functools.partial(rollout, self), variables, inputs, *rest)
        prefills.add(shape_of(inputs))
        decodes.add(inputs.tokens.shape)
        return rollout(self, variables, inputs, *rest)

    def noting_updates(*arguments: Any) -> Callable[..., Any]:
        update = make_update(*arguments)

        def noted(state: Any, frozen: Any, teacher: Any, batch: Any, records: Any) -> Any:
            updates[(*shape_of(batch.student), batch.teacher.tokens.shape[1])] += 1
            return update(state, frozen, teacher, batch, records)

        return noted

    def noting_segments(*arguments: Any) -> np.ndarray:
        spelled.append(1)
        return find_segments(*arguments)

    spelled: list[int] = []
    find_segments = segments.segments
    monkeypatch.setattr(segments, "segments", noting_segments)
    monkeypatch.setattr(Sampler, "rollout", noting_rollout)
    monkeypatch.setattr(distillation_step, "make_update", noting_updates)
    distillation.run(config, str(workdir))
    assert updates.total() == 2 * EPOCH == len(spelled)  # responses are taken apart once a step
    assert {shape[1:3] for shape in updates} == {(20, 36), (36, 100)}
    assert {shape[3] for shape in updates} == {36, 70}
    assert compiled.count("jit(update)") == len(updates)
    # Validation has a rollout of its own, greedy, and reads in one shape, two boards at a time.
    assert compiled.count("jit(measure)") == 1
    assert compiled.count("jit(_prefill)") == len(prefills) + 1 == 3
    assert compiled.count("jit(decode)") == len(decodes) + 1 == 3


def test_grounding_compiles_once_a_bucket(
    base: tuple[c.Config, pathlib.Path], compiled: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    config, workdir = base
    updates: collections.Counter[Shape] = collections.Counter()
    make_update = grounding.make_update

    def noting_updates(*arguments: Any) -> tuple[Callable[..., Any], Callable[..., Any]]:
        update, validate = make_update(*arguments)

        def noted(state: Any, frozen: Any, batch: Any) -> Any:
            updates[shape_of(batch.inputs)] += 1
            return update(state, frozen, batch)

        return noted, validate

    monkeypatch.setattr(grounding, "make_update", noting_updates)
    grounding.run(config, str(workdir))
    assert updates.total() == 2 * EPOCH and len(updates) > 1
    assert compiled.count("jit(update)") == len(updates)


def test_a_value_read_back_on_the_way_would_be_noticed() -> None:
    with pytest.raises(jax.errors.ConcretizationTypeError):
        jax.eval_shape(lambda x: x * float(x.sum()), np.ones(3))
    with pytest.raises(jax.errors.TracerArrayConversionError):
        jax.eval_shape(lambda x: np.asarray(x), np.ones(3))
