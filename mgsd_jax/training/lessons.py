"""What the rows of an update learn from, and what their tokens weigh: the options of distillation.

Axes: B rollouts, R response tokens, N steps that rollouts are kept for.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, DataConfig, DistillationConfig
from mgsd_jax.data import loaders, segments
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.batch import Array
from mgsd_jax.data.batching import NO_TOKEN, PromptBatch, References
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.processor import Processor
from mgsd_jax.parallel import processes, sharding
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling.sampler import Rollout
from mgsd_jax.training import monitor, optimizer, sessions
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.tree import PyTree

# Of the counts that a baseline is made of, what is left a step later: a memory of ten steps.
_KEPT = 0.9


@flax.struct.dataclass
class Memory:
    """What the options carry from step to step; None for one that is off."""

    is_open: jax.Array | None = None  # [] bool, whether wrong responses weigh less by now
    tried: jax.Array | None = None  # [cells] float32, rollouts of a task and level so far, fading
    solved: jax.Array | None = None  # [cells] float32, those of them that succeeded
    responses: jax.Array | None = None  # [N + 1, B / 2, R] int32 tokens; NO_TOKEN after an end


class Outcomes(NamedTuple):
    """How the responses of a batch ended."""

    weight: Array  # [B] float32, of the row once wrong responses weigh less
    success: Array  # [B] float32
    cell: Array  # [B] int32, task and level of its board in `cells`
    is_sampled: Array  # [B] bool, False for a reference and for an earlier rollout


def with_references(sampled: Rollout, references: References | None) -> Rollout:
    """The responses to learn from: references where a row has one.

    Only their tokens and mask: logprobs and truncated stay those of what was sampled.
    """
    if references is None:
        return sampled
    has_one = references.mask[:, :1]
    return dataclasses.replace(
        sampled,
        tokens=jnp.where(has_one, references.tokens, sampled.tokens),
        mask=jnp.where(has_one, references.mask, sampled.mask),
    )


def token_weights(groups: np.ndarray, settings: DistillationConfig) -> np.ndarray | None:
    """Weights [B, R] of the tokens by the `segments.segments` that they are in; None: all 1."""
    if not settings.token_weights:
        return None
    table = dict.fromkeys(prompts_lib.SEGMENTS, 1.0) | dict(settings.token_weights)
    return np.array([*table.values(), 0.0], np.float32)[groups]  # group -1: no token


def response_bucket(longest: int, settings: DistillationConfig) -> int:
    """The smallest of `response_buckets` that holds responses of so many tokens, else R."""
    fitting = [size for size in settings.response_buckets if size >= longest]
    return min([*fitting, settings.sampling.max_new_tokens])


def first_tokens(rollout: PyTree, length: int) -> PyTree:
    """The Rollout cut to its first `length` places, which hold all of its tokens."""
    return jax.tree.map(lambda leaf: leaf[:, :length] if leaf.ndim == 2 else leaf, rollout)


def is_sampled(mask: np.ndarray, prompts: PromptBatch) -> np.ndarray:
    """The mask [B, R] without the rows that learn from a reference or an earlier rollout."""
    if prompts.references is not None:
        mask = mask & ~prompts.references.mask[:, :1]
    if prompts.slots is not None:
        mask = mask & (np.arange(len(mask)) % 2 == 0)[:, None]
    return mask


def drawn(prompts: PromptBatch) -> slice:
    """The rows that have a rollout of their own."""
    return slice(None, None, 1 if prompts.slots is None else 2)


def init_memory(config: Config) -> Memory | None:
    """The memory before the first step; None where no option needs one."""
    settings = config.distillation
    rows = config_lib.update_rows(settings)["distillation.batch_size"]
    counts, kept = None, None
    if settings.success_weight:
        counts = jnp.zeros(len(cells(config.data)), jnp.float32)
    if settings.replay_steps:
        shape = (_replayed(settings) + 1, rows // 2, settings.sampling.max_new_tokens)
        kept = jnp.full(shape, NO_TOKEN, jnp.int32)
    is_open = jnp.bool_(settings.wrong_weight_from == 0) if settings.wrong_weight < 1 else None
    # Two arrays of the same counts: what is donated may not be one array twice.
    memory = Memory(is_open, counts, None if counts is None else counts.copy(), kept)
    return memory if jax.tree.leaves(memory) else None


def with_memory(state: TrainState, config: Config, mesh: Mesh | None) -> TrainState:
    """The state before the first step, with the memory that the options need."""
    memory = init_memory(config)
    # Committed, as the outputs of an update are, or the second one would compile anew.
    if mesh is None:
        memory = jax.device_put(memory, jax.local_devices()[0])
    return dataclasses.replace(state, memory=sharding.place(memory, mesh))


# ----------------------------------------------------------------------- what the board changes


def contrast_weights(kl: jax.Array, mask: jax.Array, cap: float) -> jax.Array:
    """[B, R] min(cap, kl / the mean kl of the response), 0 where the mask [B, R] is.

    kl [B, R] is the teacher's own divergence between this board and another one. A response over
    which the board changes nothing has weights of 1. With cap 4, kl of 0 0 1 7 has the mean 2 and
    the weights 0 0 0.5 3.5.
    """
    valid = (mask > 0).astype(jnp.float32)
    mean = (kl * valid).sum(1, keepdims=True) / jnp.maximum(valid.sum(1, keepdims=True), 1.0)
    scaled = jnp.where(mean > 0, kl / jnp.where(mean > 0, mean, 1.0), 1.0)
    return jnp.minimum(scaled, cap) * valid


# ---------------------------------------------------------------------------- outcomes and success


def cells(data: DataConfig) -> dict[tuple[str, int], int]:
    """{(task, level): its number} of the boards of a config."""
    pairs = {(kind.task, level) for kind in data.boards for level in kind.levels}
    return {pair: number for number, pair in enumerate(sorted(pairs))}


def needs_outcomes(settings: DistillationConfig) -> bool:
    """Whether the responses are judged before the update, and not while it runs."""
    return settings.wrong_weight < 1 or settings.success_weight > 0


def judge(processor: Processor, boards: Sequence[Board], rollout: Rollout) -> list[monitor.Judged]:
    """What the rows of this process came to."""
    tokens, mask = (np.asarray(x) for x in (rollout.tokens, rollout.mask))
    responses = segments.decode_rows(processor, tokens, mask)
    return monitor.judge_rollouts(boards, responses)


def outcomes(
    judged: Sequence[monitor.Judged] | None,
    prompts: loaders.PromptRows,
    rollout: Rollout,
    config: Config,
) -> Outcomes | None:
    """The outcomes of the rows of this process, None where they were not judged.

    A row weighs 1 where the state or the plan is right, as in a reference, `wrong_weight` where
    neither is, and 0 where it was truncated. Raises ValueError for a board of a level that is not
    in `data.boards`.
    """
    if judged is None:
        return None
    numbers = cells(config.data)
    for board in prompts.boards:
        if board[:2] not in numbers:
            raise ValueError(
                f"data.boards: got a board of {board.task} level {board.level}, want one of "
                f"{sorted(numbers)}"
            )
    is_right = np.array([one.outcome.success or one.state_exact for one in judged])
    weight = np.where(is_right, 1.0, config.distillation.wrong_weight)
    weight = np.where(rollout.truncated, 0.0, weight)
    if prompts.batch.references is not None:
        weight = np.where(prompts.batch.references.mask[:, 0], 1.0, weight)
    return Outcomes(
        weight.astype(np.float32),
        np.array([one.outcome.success for one in judged], np.float32),
        np.array([numbers[board[:2]] for board in prompts.boards], np.int32),
        is_sampled(np.asarray(rollout.mask), prompts.batch)[:, 0],
    )


def weigh(
    found: Outcomes,
    mask: jax.Array | np.ndarray,
    weights: jax.Array | np.ndarray | None,
    memory: Memory,
    settings: DistillationConfig,
) -> tuple[jax.Array, jax.Array | None, Memory]:
    """(weights [B, R] of the divergence, of -log p(token) or None, the memory after this step).

    The weight of -log p is success_weight times the advantage: success less the running success of
    the task and level before this step, 0 while there is none. Its mean has the gradient that
    success would have, so no other rollout of the prompt is needed. The update divides by the sum
    of the divergence's weights; where these are not 1, the policy's are scaled so that its mean is
    still over all tokens.
    """
    valid = (jnp.asarray(mask) > 0).astype(jnp.float32)
    weights = valid if weights is None else jnp.asarray(weights)
    if memory.is_open is not None:
        weights *= jnp.where(memory.is_open, jnp.asarray(found.weight), 1.0)[:, None]
    if memory.tried is None or memory.solved is None:
        return weights, None, memory
    tried, solved = memory.tried[found.cell], memory.solved[found.cell]
    own = jnp.asarray(found.is_sampled).astype(jnp.float32)
    advantage = jnp.where(tried > 0, found.success - solved / jnp.where(tried > 0, tried, 1.0), 0.0)
    policy = settings.success_weight * (own * advantage)[:, None] * valid
    policy *= weights.sum() / jnp.maximum(valid.sum(), 1.0)
    memory = dataclasses.replace(
        memory,
        tried=(_KEPT * memory.tried).at[found.cell].add(own),
        solved=(_KEPT * memory.solved).at[found.cell].add(own * found.success),
    )
    return weights, policy, memory


def after_validation(state: TrainState, success: Mean, settings: DistillationConfig) -> TrainState:
    """The state, with wrong responses weighing less from now on if validation says so."""
    if settings.wrong_weight == 1 or success.value < settings.wrong_weight_from:
        return state
    is_open = state.memory.is_open | True  # lies where it lay, or the update would compile anew
    return dataclasses.replace(state, memory=dataclasses.replace(state.memory, is_open=is_open))


# ------------------------------------------------------------------------------------------ replay


def new_rows(asked: PromptBatch) -> PromptBatch:
    """The rows of a batch that get a rollout of their own: every second one where there is replay.

    Only what a rollout needs is kept of them.
    """
    if asked.slots is None:
        return asked
    axes = (sessions.INPUT_AXES, sessions.FIRST, sessions.FIRST)
    needed = (asked.student, asked.row_ids, asked.draft)
    student, row_ids, draft = jax.tree.map(
        lambda leaf: leaf[0], optimizer.split_rows(needed, 2, axes)
    )
    return asked._replace(student=student, row_ids=row_ids, draft=draft)


def _replayed(settings: DistillationConfig) -> int:
    """How many steps rollouts are kept for: no run looks back further than it is long."""
    return min(settings.replay_steps, settings.steps)


def replay(
    memory: Memory, sampled: Rollout, slots: jax.Array, eos_ids: tuple[int, ...], pad_id: int
) -> tuple[Memory, Rollout]:
    """(the memory with new rollouts in it, a Rollout [B] with an earlier one after each of them).

    sampled [B / 2, R] goes to the slots [B] of the even rows; the odd rows say where theirs lie.
    """
    rows = jnp.arange(slots.shape[0] // 2)
    assert memory.responses is not None
    new = jnp.where(sampled.mask, sampled.tokens, NO_TOKEN)
    responses = memory.responses.at[slots[0::2], rows].set(new)
    old = responses[slots[1::2], rows]
    mask = old != NO_TOKEN
    is_cut = mask[:, -1] & ~jnp.isin(old[:, -1], jnp.array(eos_ids))
    unknown = jnp.zeros_like(sampled.logprobs)
    earlier = Rollout(
        jnp.where(mask, old, pad_id), mask, unknown, is_cut, jnp.zeros_like(sampled.guessed)
    )
    both = jax.tree.map(
        lambda a, b: jnp.stack([a, b], 1).reshape(-1, *a.shape[1:]), sampled, earlier
    )
    return dataclasses.replace(memory, responses=responses), both


# ----------------------------------------------------------------------------------------- prompts


def load_prompts(
    config: Config, training: Sequence[Board], encoder: Encoder, share: tuple[int, int]
) -> loaders.PromptLoader:
    """Prompts of the training boards, for both readers, and records where the config wants some."""
    settings = config.distillation
    asked = config_lib.record_prompts(settings)
    prompts = loaders.prompt_loader(
        training,
        encoder,
        context=settings.teacher_context,
        batch_size=settings.batch_size - asked,
        rollouts=settings.rollouts,
        seed=config.seed,
        noise=settings.teacher_noise,
        teacher_board=settings.teacher_board,
        reference_share=settings.reference_share,
        response_length=settings.sampling.max_new_tokens,
        has_drafts=settings.sampling.draft_tokens > 0,
        has_others=settings.contrast_cap > 0,
        replay_steps=_replayed(settings),
        process=share,
        agree=processes.largest,
    )
    if not asked:
        return prompts
    records = loaders.grounding_loader(
        training,
        encoder,
        mixture=(("questions", 1.0),),
        batch_size=asked * settings.rollouts,
        seed=config.seed + 1,  # another order, or a board's records would follow its prompts
        process=share,
        agree=processes.largest,
    )
    return loaders.WithRecords(prompts, records)
