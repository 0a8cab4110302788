"""The rollouts of distillation: what a step samples, what its rows learn from, and what it tells.

Axes: B rollouts, R response tokens.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np
from jax.sharding import Mesh

from mgsd_jax import tree
from mgsd_jax.config import Config, DistillationConfig
from mgsd_jax.data.batching import PromptBatch
from mgsd_jax.data.loaders import PromptRows
from mgsd_jax.data.processor import Processor
from mgsd_jax.parallel import batches, processes, sharding
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import loading
from mgsd_jax.stages.distillation_step import DistillationBatch
from mgsd_jax.stages.loading import Loaded
from mgsd_jax.training import guards, lessons, monitor
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.tree import PyTree, Tree

# Small programs around those of the sampler.
_with_references = jax.jit(lessons.with_references)
_new_rows = jax.jit(lessons.new_rows)
_replay = jax.jit(lessons.replay, static_argnames=("eos_ids", "pad_id"))
_first_tokens = jax.jit(lessons.first_tokens, static_argnums=1)


@dataclasses.dataclass(frozen=True)
class Speaker:
    """What samples the responses of a run: programs, and what no step changes."""

    sampler: Sampler
    lay_out: Callable[[Tree], Tree]  # the weights as decoding wants them
    frozen: Tree  # the student's parameters that do not learn
    rng: jax.Array  # of the mesh of rollouts
    mesh: Mesh | None  # of the update
    processor: Processor
    settings: DistillationConfig

    def weights(self, state: TrainState) -> Tree:
        """The student as it stands, laid out for decoding."""
        return self.lay_out(tree.combine(state.params, self.frozen))


@dataclasses.dataclass(frozen=True)
class Responses:
    """What the student said in a step, and what its rows learn from."""

    asked: PromptBatch  # the prompts of all rows, on the mesh of the update
    learned: Rollout  # of all rows there: where a row has a reference or replays, not its own
    # Rollouts of numpy arrays, the rows of this process: what they said, and what they learn from.
    own: PyTree
    own_learned: PyTree


def make_speaker(student: Loaded, frozen: Tree, config: Config) -> Speaker:
    """The speaker of a run, on the mesh that the config has for rollouts."""
    settings, processor = config.distillation, student.processor
    model = loading.for_rollouts(student.model, config.mesh)
    sampler = Sampler(
        model,
        settings.sampling,
        eos_ids=processor.eos_ids,
        banned_ids=processor.banned_ids,
        pad_id=processor.pad_id,
    )
    return Speaker(
        sampler,
        sharding.make_layout(model.mesh, model.dtype),
        frozen,
        batches.make_key(config.seed, model.mesh),
        student.model.mesh,
        processor,
        settings,
    )


def sample(
    speaker: Speaker, state: TrainState, prompts: PromptBatch, step: int
) -> tuple[TrainState, Responses]:
    """(the state, which remembers what replay needs; a response to each prompt of this process)."""
    asked = batches.to_global(prompts, speaker.mesh)
    new = asked if asked.slots is None else _new_rows(asked)
    sampled = speaker.sampler.rollout(
        speaker.weights(state),
        new.student,
        jax.random.fold_in(speaker.rng, step),
        new.row_ids,
        new.draft,
    )
    sampled = batches.move(sampled, speaker.mesh)
    if asked.slots is not None:
        ends, pad = speaker.processor.eos_ids, speaker.processor.pad_id
        memory, sampled = _replay(state.memory, sampled, asked.slots, eos_ids=ends, pad_id=pad)
        state = dataclasses.replace(state, memory=memory)
    learned = _with_references(sampled, asked.references)
    own = own_learned = batches.to_local(sampled)
    if asked.references is not None:
        own_learned = batches.to_local(learned)
    found = Responses(asked, learned, own, own_learned)
    return state, _cut(found, speaker.settings) if speaker.settings.response_buckets else found


def _cut(found: Responses, settings: DistillationConfig) -> Responses:
    """The responses cut to the bucket that holds those of all processes."""
    longest = max(int(one.mask.sum(1).max()) for one in (found.own, found.own_learned))
    length = lessons.response_bucket(processes.largest([longest])[0], settings)
    own, own_learned = (lessons.first_tokens(one, length) for one in (found.own, found.own_learned))
    return Responses(found.asked, _first_tokens(found.learned, length), own, own_learned)


def make_batch(
    said: Responses,
    prompts: PromptRows,
    groups: np.ndarray,
    judged: Sequence[monitor.Judged] | None,
    config: Config,
    mesh: Mesh | None,
) -> DistillationBatch:
    """What the update learns from. `groups` [B, R] are the segments of `said.own_learned`."""
    weights = lessons.token_weights(groups, config.distillation)
    outcomes = lessons.outcomes(judged, prompts, said.own, config)
    return DistillationBatch(
        said.asked.student,
        said.asked.teacher,
        said.learned.tokens,
        said.learned.mask,
        batches.to_global(weights, mesh),
        said.asked.other,
        batches.to_global(outcomes, mesh),
    )


def rollout_metrics(
    said: Responses, prompts: PromptRows, groups: np.ndarray, judged: Sequence[monitor.Judged]
) -> dict[str, Mean]:
    """What the rollouts came to, and what drafts gained."""
    own, drawn = said.own, lessons.drawn(prompts.batch)
    measured = monitor.rollout_metrics(
        prompts.boards[drawn], judged[drawn], own.truncated[drawn], own.mask[drawn]
    )
    if said.asked.draft is not None:
        is_sampled = lessons.is_sampled(own.mask, prompts.batch)
        measured |= monitor.draft_metrics(groups, is_sampled, own.guessed)
    return measured


def update_metrics(
    said: Responses,
    prompts: PromptRows,
    groups: np.ndarray,
    stats: PyTree,
    settings: DistillationConfig,
) -> dict[str, Mean]:
    """How student and teacher differ over the responses, and signs of rollouts going wrong.

    `stats` are TokenStats of numpy arrays, of the rows of this process.
    """
    learned = said.own_learned
    return monitor.token_metrics(groups, stats) | guards.rollout_measures(
        learned.tokens,
        lessons.is_sampled(learned.mask, prompts.batch),
        said.own.logprobs,
        stats.student_logprob,
        settings.sampling,
    )


def rollout_speed(said: Responses, prompts: PromptRows, seconds: float) -> dict[str, float]:
    """Tokens a second of rollouts that took so many seconds."""
    drawn = lessons.drawn(prompts.batch)
    return {"tokens_per_s/rollout": said.own.mask[drawn].sum() / seconds}
