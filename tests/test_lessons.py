"""The options of distillation as pure functions, against numbers worked out by hand."""

import dataclasses
import types
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from test_sources import BOARDS, ENCODER

from mgsd_jax.command_line import load_config
from mgsd_jax.config import DistillationConfig, LevelSet, OptimConfig
from mgsd_jax.data import batching, loaders
from mgsd_jax.data.batching import NO_TOKEN
from mgsd_jax.data.boards import Board
from mgsd_jax.envs.base import Outcome
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling.sampler import Rollout
from mgsd_jax.stages import distillation_rollout
from mgsd_jax.training import lessons, monitor, optimizer

SETTINGS = DistillationConfig(OptimConfig(lr=0.0))
NANO = load_config("nano", [])
MAZES, LAKES = (
    LevelSet(task, levels, train=1, val=1, test=1)
    for task, levels in (("maze", (3, 4)), ("frozenlake", (3,)))
)


def test_prompts_hold_what_the_options_need() -> None:
    """Each option of the config reaches the loader; without any there is nothing but prompts."""
    plain: dict[str, Any] = {"grounding_share": 0.0, "batch_size": 8}

    def first(**options: Any) -> loaders.PromptRows:
        settings = dataclasses.replace(NANO.distillation, **(plain | options))
        config = dataclasses.replace(NANO, distillation=settings)
        return next(lessons.load_prompts(config, BOARDS, ENCODER, (0, 1)))

    def changed(rows: loaders.PromptRows) -> bool:
        return not np.array_equal(rows.batch.teacher.tokens, usual.batch.teacher.tokens)

    usual = first()
    assert usual.batch[3:] == (None,) * 4 and usual.records is None and len(usual.boards) == 8
    assert not changed(first(contrast_cap=4.0)) and first(contrast_cap=4.0).batch.other is not None
    assert changed(first(teacher_noise=1.0)) and changed(first(teacher_board="other"))
    references = first(reference_share=1.0).batch.references
    assert references is not None and references.mask[:, 0].all()
    slots = first(replay_steps=3).batch.slots
    assert slots is not None and slots.shape == (8,)
    assert first(rollouts=2).boards[0] == first(rollouts=2).boards[1]
    asked = first(grounding_share=0.25)
    assert asked.records is not None and len(asked.records.targets) == 2 and len(asked.boards) == 6
    assert asked.boards == usual.boards[:6]
    drafted = dataclasses.replace(NANO.distillation.sampling, draft_tokens=3)
    assert first(sampling=drafted).batch.draft is not None


def test_a_run_keeps_no_more_rollouts_than_it_has_steps() -> None:
    settings = dataclasses.replace(NANO.distillation, steps=5, replay_steps=10**6)
    config = dataclasses.replace(NANO, distillation=settings)
    memory = lessons.init_memory(config)
    assert memory is not None and memory.responses is not None
    assert memory.responses.shape == (5 + 1, 28, settings.sampling.max_new_tokens)
    loader = lessons.load_prompts(config, BOARDS, ENCODER, (0, 1))
    slots = [next(loader).batch.slots for _ in range(5)]
    assert [int(one[0]) for one in slots if one is not None] == [0, 1, 2, 3, 4]


def test_contrast_weights_have_the_mean_of_one_and_a_cap() -> None:
    kl = jnp.array([[0, 0, 1, 7], [2, 2, 2, 50], [0, 0, 0, 9], [1, 3, 0, 0]], jnp.float32)
    mask = jnp.array([[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 0], [0, 1, 1, 0]], bool)
    want = [[0, 0, 0.5, 3.5], [1, 1, 1, 0], [1, 1, 1, 0], [0, 2, 0, 0]]
    np.testing.assert_allclose(lessons.contrast_weights(kl, mask, 4.0), want, rtol=1e-6)
    np.testing.assert_allclose(lessons.contrast_weights(kl, mask, 3.0)[0], [0, 0, 0.5, 3])


def weigh(memory: lessons.Memory, success: Any, **options: Any) -> tuple[Any, Any, Any]:
    """Four rows of two tokens, the last of which is no rollout of this step."""
    found = lessons.Outcomes(
        weight=np.array([1, 0.25, 0, 1], np.float32),
        success=np.array(success, np.float32),
        cell=np.array([0, 0, 1, 1], np.int32),
        is_sampled=np.array([True, True, True, False]),
    )
    mask = np.array([[1, 1], [1, 0], [1, 1], [1, 1]], bool)
    settings = dataclasses.replace(SETTINGS, **options)
    return lessons.weigh(found, mask, None, memory, settings)


def test_the_baseline_is_the_running_success_of_the_task_and_level() -> None:
    nothing = jnp.zeros(2)
    memory = lessons.Memory(tried=nothing, solved=nothing)
    weights, policy, memory = weigh(memory, [1, 0, 1, 1], success_weight=2.0)
    np.testing.assert_array_equal(weights, [[1, 1], [1, 0], [1, 1], [1, 1]])
    np.testing.assert_array_equal(policy, np.zeros((4, 2)))  # nothing to compare with
    np.testing.assert_allclose(memory.tried, [2, 1])
    np.testing.assert_allclose(memory.solved, [1, 1])
    _, policy, memory = weigh(memory, [1, 1, 0, 1], success_weight=2.0)
    # Baselines of 1/2 and 1: advantages of 1/2, 1/2 and -1, twice each.
    np.testing.assert_allclose(policy, [[1, 1], [1, 0], [-2, -2], [0, 0]])
    np.testing.assert_allclose(memory.tried, [0.9 * 2 + 2, 0.9 + 1], rtol=1e-6)
    np.testing.assert_allclose(memory.solved, [0.9 + 2, 0.9], rtol=1e-6)


def test_success_weighs_the_same_beside_a_gate() -> None:
    """The update divides by the divergence's weights, of which a gate leaves less."""
    counts = jnp.array([2.0, 2.0])
    memory = lessons.Memory(jnp.bool_(True), tried=counts, solved=counts / 2)
    _, plain, _ = weigh(dataclasses.replace(memory, is_open=None), [1, 1, 0, 1], success_weight=2.0)
    weights, policy, _ = weigh(memory, [1, 1, 0, 1], success_weight=2.0, wrong_weight=0.25)
    assert weights.sum() == 2 + 0.25 + 0 + 2  # of seven tokens
    np.testing.assert_allclose(plain, [[1, 1], [1, 0], [-1, -1], [0, 0]])
    np.testing.assert_allclose(policy / weights.sum(), plain / 7, rtol=1e-6)


def judged(success: bool, state_exact: bool) -> monitor.Judged:
    outcome = Outcome(success, success, True, True, "", 1, float(success))
    return monitor.Judged(outcome, state_exact)


def test_a_row_weighs_by_state_or_plan_and_a_truncated_one_nothing() -> None:
    levels = [("maze", 3), ("frozenlake", 3), ("maze", 4), ("maze", 3), ("maze", 3), ("maze", 3)]
    data = dataclasses.replace(NANO.data, boards=(MAZES, LAKES))
    settings = dataclasses.replace(NANO.distillation, wrong_weight=0.25)
    config = dataclasses.replace(NANO, data=data, distillation=settings)
    answered = [judged(*one) for one in [(True, False), (False, True), *[(False, False)] * 4]]
    sampled = rollout([[1, 2], [1, 0], [1, 2], [1, 2], [1, 2], [1, 2]])
    # The fourth is truncated. The last two have a right response to learn from instead.
    sampled = dataclasses.replace(sampled, truncated=np.arange(6) == 3)
    given = batching.References(np.zeros((6, 2), np.int32), np.arange(6)[:, None] > [3, 4])
    nothing: Any = None
    batch = batching.PromptBatch(nothing, nothing, np.arange(6), given, slots=np.zeros(6, np.int32))
    boards = tuple(Board(task, level, 0, None, None) for task, level in levels)
    found = lessons.outcomes(answered, loaders.PromptRows(batch, boards), sampled, config)
    assert found is not None
    np.testing.assert_array_equal(found.weight, [1, 1, 0.25, 0, 1, 1])
    np.testing.assert_array_equal(found.success, [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(found.cell, [1, 0, 2, 1, 1, 1])
    np.testing.assert_array_equal(found.is_sampled, [True, False, True, False, False, False])
    assert lessons.outcomes(None, loaders.PromptRows(batch, boards), sampled, config) is None
    other = (Board("maze", 5, 0, None, None), *boards[1:])
    with pytest.raises(ValueError, match=r"data\.boards: got a board of maze level 5, want one of"):
        lessons.outcomes(answered, loaders.PromptRows(batch, other), sampled, config)


def test_what_is_told_of_rollouts_is_told_of_new_ones() -> None:
    nothing: Any = None
    replays = batching.PromptBatch(nothing, nothing, np.arange(4), slots=np.array([1, 0, 1, 0]))
    boards = tuple(Board("maze", level, 0, None, None) for level in (3, 4, 3, 4))
    sampled = rollout([[1, 2, 3], [1, 0, 0], [1, 2, 3], [1, 0, 0]])
    said: Any = types.SimpleNamespace(own=sampled, asked=replays)
    answered = [judged(success, False) for success in (True, False, True, False)]
    for batch, length, solved in ((replays, 3, 1), (replays._replace(slots=None), 2, 0.5)):
        told = distillation_rollout.rollout_metrics(
            said, loaders.PromptRows(batch, boards), np.zeros((4, 3)), answered
        )
        assert told["rollout/length"].value == length
        assert told["rollout/success"].value == solved


@pytest.mark.parametrize(("success", "is_open"), [(0.29, False), (0.3, True)])
def test_the_gate_opens_at_a_success_of_validation_and_stays_open(
    success: float, is_open: bool
) -> None:
    settings = dataclasses.replace(SETTINGS, wrong_weight=0.25, wrong_weight_from=0.3)
    memory = lessons.Memory(is_open=jnp.bool_(False))
    state = optimizer.TrainState(jnp.int32(0), {}, (), memory=memory)
    state = lessons.after_validation(state, Mean(success, 1.0), settings)
    later = lessons.after_validation(state, Mean(0.0, 1.0), settings)
    assert bool(state.memory.is_open) is bool(later.memory.is_open) is is_open
    weights, policy, _ = weigh(later.memory, [1, 0, 0, 1], wrong_weight=0.25)
    rows = [1, 0.25, 0, 1] if is_open else [1, 1, 1, 1]
    np.testing.assert_allclose(weights[:, 0], rows)
    assert policy is None


def rollout(tokens: Any) -> Rollout:
    tokens = jnp.array(tokens, jnp.int32)
    zeros = jnp.zeros(tokens.shape, jnp.float32)
    return Rollout(tokens, tokens > 0, zeros - 1, zeros[:, 0] > 0, zeros > 0)


def test_a_replayed_row_is_what_its_slot_holds() -> None:
    memory = lessons.Memory(responses=jnp.full((3, 2, 3), NO_TOKEN, jnp.int32))
    first, second = rollout([[5, 9, 0], [6, 7, 8]]), rollout([[1, 2, 9], [9, 0, 0]])
    options: dict[str, Any] = {"eos_ids": (9,), "pad_id": 0}
    memory, both = lessons.replay(memory, first, jnp.array([0, 0, 0, 0]), **options)
    np.testing.assert_array_equal(both.tokens, [[5, 9, 0], [5, 9, 0], [6, 7, 8], [6, 7, 8]])
    # The new rows go to slot 1; one old row is of slot 0, the other what was just written.
    _, both = lessons.replay(memory, second, jnp.array([1, 0, 1, 1]), **options)
    np.testing.assert_array_equal(both.tokens, [[1, 2, 9], [5, 9, 0], [9, 0, 0], [9, 0, 0]])
    np.testing.assert_array_equal(both.mask, both.tokens > 0)
    _, both = lessons.replay(memory, second, jnp.array([2, 0, 2, 0]), **options)
    np.testing.assert_array_equal(both.truncated, [False, False, False, True])  # 6 7 8 has no end
    np.testing.assert_array_equal(both.logprobs[:, 0], [-1, 0, -1, 0])
