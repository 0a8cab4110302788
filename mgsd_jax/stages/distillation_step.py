"""The update of distillation: student and teacher read their own prompts and the same response.

Axes: B rollouts, R response tokens, D width, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from absl import logging
from jax.sharding import Mesh

from mgsd_jax import tree
from mgsd_jax.config import DistillationConfig, GuardConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.batching import GroundingBatch
from mgsd_jax.model import qwen3vl
from mgsd_jax.model.flops import forward_flops
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import batches, processes, sharding
from mgsd_jax.parallel.means import Mean
from mgsd_jax.stages import grounding
from mgsd_jax.training import guards, lessons, losses, optimizer, sessions
from mgsd_jax.training.divergences import TokenStats
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.tree import PyTree, Tree

Metrics = dict[str, Mean | jax.Array | float]
Measure = Callable[..., tuple[Mean, Mean]]  # see `make_measure`


class DistillationBatch(NamedTuple):
    """Prompts of both readers, and the student's responses."""

    student: Inputs
    teacher: Inputs
    tokens: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R] bool, True through the first end token
    # [B, R] float32 of the tokens in the loss; None: the mask
    weights: jax.Array | np.ndarray | None = None
    other: Inputs | None = None  # what the teacher reads of another board, to weigh tokens by
    outcomes: lessons.Outcomes | None = None  # of the rows, where they weigh
    policy: jax.Array | None = None  # [B, R] float32 weights of -log p(token), see lessons.weigh


BATCH_AXES: PyTree = DistillationBatch(
    sessions.INPUT_AXES,
    sessions.INPUT_AXES,
    tokens=sessions.FIRST,
    mask=sessions.FIRST,
    weights=sessions.FIRST,
    policy=sessions.FIRST,
)


def response_hidden(
    model: Qwen3VL, variables: Tree, prompt: Inputs, tokens: jax.Array, mask: jax.Array
) -> jax.Array:
    """Hidden states [B * R, D] that predict each response token after this prompt."""
    inputs = qwen3vl.append_response(prompt, tokens, mask > 0)
    # The state at a token predicts the next one: the last prompt token's is the first, and the last
    # response token's is not needed.
    hidden = qwen3vl.apply_hidden(model, variables, inputs, prompt.tokens.shape[1] - 1)[:, :-1]
    return hidden.reshape(-1, hidden.shape[-1])


def loss_fn(
    trained: Tree,
    batch: DistillationBatch,
    frozen: Tree,
    teacher_variables: Tree,
    *,
    student: Qwen3VL,
    teacher: Qwen3VL,
    settings: DistillationConfig,
    vocab_mask: np.ndarray,
) -> tuple[jax.Array, tuple[jax.Array, TokenStats]]:
    """Weighted divergence over the response tokens in nats, (its weight, statistics [B, R])."""
    batch = batches.constrain(batch, student.mesh)
    variables = tree.combine(sharding.constrain_state(trained, student.mesh), frozen)
    students = response_hidden(student, variables, batch.student, batch.tokens, batch.mask)
    teachers = jax.lax.stop_gradient(
        response_hidden(teacher, teacher_variables, batch.teacher, batch.tokens, batch.mask)
    )
    valid = batch.mask.reshape(-1) > 0
    weights = (
        valid.astype(jnp.float32)
        if batch.weights is None
        else jnp.asarray(batch.weights).reshape(-1)
    )
    head, teacher_head = (qwen3vl.head(v["params"]) for v in (variables, teacher_variables))
    targets = batch.tokens.reshape(-1)
    if batch.other is not None:
        others = response_hidden(teacher, teacher_variables, batch.other, batch.tokens, batch.mask)
        weights *= _contrast(
            teachers, others, teacher_head, batch.mask, settings, vocab_mask, student.mesh
        )
    loss, stats = losses.distill(
        students,
        head,
        teachers,
        teacher_head,
        weights,
        settings=settings,
        targets=targets,
        vocab_mask=jnp.asarray(vocab_mask),
        valid=valid,
        mesh=student.mesh,
    )
    if batch.policy is not None:
        loss += losses.token_cross_entropy(
            students,
            head,
            targets,
            batch.policy.reshape(-1),
            token_chunk=settings.token_chunk,
            vocab_mask=jnp.asarray(vocab_mask),
            mesh=student.mesh,
        )[0]
    return loss, (weights.sum(), jax.tree.map(lambda x: x.reshape(batch.mask.shape), stats))


def _contrast(
    teachers: jax.Array,
    others: jax.Array,
    head: jax.Array,
    mask: jax.Array,
    settings: DistillationConfig,
    vocab_mask: np.ndarray,
    mesh: Mesh | None,
) -> jax.Array:
    """Weights [B * R] of the tokens by what another board changes: `lessons.contrast_weights`.

    teachers and others [B * R, D] are what the teacher's `head` reads of this board and of another.
    """
    changed = losses.token_kl(
        teachers,
        others,
        head,
        mask.reshape(-1) > 0,
        token_chunk=settings.token_chunk,
        vocab_mask=jnp.asarray(vocab_mask),
        mesh=mesh,
    )
    changed = changed.reshape(mask.shape)
    return lessons.contrast_weights(changed, mask, settings.contrast_cap).reshape(-1)


def vocab_mask(student: Qwen3VL, banned_ids: tuple[int, ...]) -> np.ndarray:
    """[V] True where a token can be sampled."""
    return ~np.isin(np.arange(student.config.text.vocab_size), banned_ids)


def make_update(
    student: Qwen3VL,
    teacher: Qwen3VL,
    settings: DistillationConfig,
    tx: optax.GradientTransformation,
    banned_ids: tuple[int, ...],
) -> Callable[..., tuple[TrainState, Metrics, TokenStats]]:
    """One jitted program: teacher forward, student forward and backward, optimiser.

    update(state, frozen, teacher_params, batch, records=None) -> (state, metrics, statistics
    [B, R]); the state is donated. Records are a GroundingBatch, whose cross-entropy the step
    learns from as well, for `settings.grounding_share` of it. Without teacher_params ({}) the
    student holds the teacher: with `settings.teacher_decay` it is the state's average, else the
    student without its adapters. `banned_ids` can be sampled by neither reader.
    """
    loss_of = _loss_of(student, teacher, settings, banned_ids)

    def update(
        state: TrainState,
        frozen: Tree,
        teacher_params: Tree,
        batch: DistillationBatch,
        records: GroundingBatch | None = None,
    ) -> tuple[TrainState, Metrics, TokenStats]:
        teacher_variables = _teacher_variables(state, frozen, teacher_params, settings)
        if batch.outcomes is not None:
            weights, policy, memory = lessons.weigh(
                batch.outcomes, batch.mask, batch.weights, state.memory, settings
            )
            batch = batch._replace(weights=weights, policy=policy, outcomes=None)
            state = dataclasses.replace(state, memory=memory)
        grads, loss, stats = optimizer.accumulate(
            functools.partial(loss_of, frozen=frozen, teacher_variables=teacher_variables),
            state.params,
            batch,
            settings.microbatches,
            BATCH_AXES._replace(other=None if batch.other is None else sessions.INPUT_AXES),
        )
        rate = optimizer.learning_rate(state, settings.optim, settings.steps)
        measured: Metrics = {"loss": loss, "lr": rate}
        if records is not None:
            others, asked = grounding.gradients(student, settings, state.params, frozen, records)
            grads = optimizer.blend(grads, others, settings.grounding_share)
            measured |= {f"questions/{name}": value for name, value in asked.items()}
        state, norms = optimizer.update(
            state, grads, tx, loss=loss.sum, in_place=student.kernel.is_plain
        )
        if settings.teacher_decay:
            state = optimizer.move_average(state, settings.teacher_decay)
        state = sharding.constrain_state(state, student.mesh)
        return state, measured | norms, batches.constrain(stats, student.mesh)

    return jax.jit(update, donate_argnums=0)


def make_measure(
    student: Qwen3VL,
    teacher: Qwen3VL,
    settings: DistillationConfig,
    banned_ids: tuple[int, ...],
) -> Measure:
    """One jitted program without a gradient: how far the readers of an update are apart.

    measure(state, frozen, teacher_params, batch) -> (the divergence of the objective, KL(student to
    teacher)), means over the response tokens in nats. The arguments are those of the update
    (`make_update`), and the numbers its loss and its statistic where no option weighs tokens.
    """
    # Layers that are scanned compile sooner, and without a gradient they run no slower.
    student, teacher = (model.clone(remat="full") for model in (student, teacher))
    loss_of = _loss_of(student, teacher, settings, banned_ids)

    def measure(
        state: TrainState, frozen: Tree, teacher_params: Tree, batch: DistillationBatch
    ) -> tuple[Mean, Mean]:
        variables = _teacher_variables(state, frozen, teacher_params, settings)
        loss, (weight, stats) = loss_of(state.params, batch, frozen, variables)
        return Mean(loss, weight), Mean(stats.kl.sum(), weight)

    return jax.jit(measure)


def _loss_of(
    student: Qwen3VL, teacher: Qwen3VL, settings: DistillationConfig, banned_ids: tuple[int, ...]
) -> functools.partial[tuple[jax.Array, tuple[jax.Array, TokenStats]]]:
    """`loss_fn` of these readers, without parameters and batch."""
    return functools.partial(
        loss_fn,
        student=student,
        teacher=teacher,
        settings=settings,
        vocab_mask=vocab_mask(student, banned_ids),
    )


def _teacher_variables(
    state: TrainState, frozen: Tree, teacher_params: Tree, settings: DistillationConfig
) -> Tree:
    if settings.teacher_decay:
        return tree.combine(state.average, frozen)
    return {"params": teacher_params or frozen["params"]}


def check_start(
    limits: GuardConfig,
    microbatches: int,
    measure: Measure,
    state: TrainState,
    frozen: Tree,
    teacher_params: Tree,
    batch: DistillationBatch,
    stats: TokenStats,
) -> None:
    """Warns where the first update finds student and teacher too far apart, and says where.

    `stats` are those of this process. Only then is a program compiled in which the teacher reads
    the student's prompts, a microbatch of them.
    """
    valid = batches.to_local(batch.mask) > 0
    found = processes.gather([float(stats.kl[valid].sum()), float(valid.sum())])
    kl = sum(total for total, _ in found) / max(sum(count for _, count in found), 1.0)
    if kl <= limits.start_kl:
        return
    plain = DistillationBatch(batch.student, batch.student, batch.tokens, batch.mask)
    axes = BATCH_AXES._replace(teacher=sessions.INPUT_AXES)
    part = jax.tree.map(lambda leaf: leaf[0], optimizer.split_rows(plain, microbatches, axes))
    own = float(measure(state, frozen, teacher_params, part)[1].value)
    logging.warning("%s", guards.misread(kl, own, limits))


def update_flops(student: Qwen3VL, teacher: Qwen3VL, batch: DistillationBatch) -> float:
    """FLOPs of an update: the teacher's forwards, and three times the student's."""
    rows, predicted = batch.tokens.shape
    pictures = batch.student.pictures
    patches = 0 if pictures is None else pictures.patches.shape[1] * pictures.patches.shape[2]
    lengths = (x.tokens.shape[1] + predicted for x in (batch.student, batch.teacher))
    students, teachers = (
        forward_flops(model.config, tokens=length, patches=p, predicted=predicted)
        for model, length, p in zip((student, teacher), lengths, (patches, 0), strict=True)
    )
    return rows * (3 * students + teachers * (1 if batch.other is None else 2))
