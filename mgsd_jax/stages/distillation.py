"""Stage 2, distillation: the student answers from the picture, and moves to what the teacher, who
reads the same board as text, would have said at every one of the student's own tokens.

Axes: B rollouts, R response tokens, D width, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.config import Config, DistillationConfig, EvaluateConfig
from mgsd_jax.data import buckets, loaders, segments
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.batching import GroundingBatch
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.model import qwen3vl
from mgsd_jax.model.flops import forward_flops
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import batches, processes, sharding
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling import answers
from mgsd_jax.sampling.sampler import Sampler
from mgsd_jax.stages import grounding, loading
from mgsd_jax.training import (
    divergences,
    guards,
    lessons,
    losses,
    monitor,
    optimizer,
    sessions,
)
from mgsd_jax.training.divergences import TokenStats
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.tree import PyTree, Tree
from mgsd_jax.workdir import folders, sinks, stage_folder

Metrics = dict[str, Mean | jax.Array | float]


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
        changed = losses.token_kl(
            teachers,
            others,
            teacher_head,
            valid,
            token_chunk=settings.token_chunk,
            vocab_mask=jnp.asarray(vocab_mask),
            mesh=student.mesh,
        )
        changed = changed.reshape(batch.mask.shape)
        changed = lessons.contrast_weights(changed, batch.mask, settings.contrast_cap)
        weights *= changed.reshape(-1)
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
    vocab_mask = ~np.isin(np.arange(student.config.text.vocab_size), banned_ids)
    loss_of = functools.partial(
        loss_fn, student=student, teacher=teacher, settings=settings, vocab_mask=vocab_mask
    )

    def update(
        state: TrainState,
        frozen: Tree,
        teacher_params: Tree,
        batch: DistillationBatch,
        records: GroundingBatch | None = None,
    ) -> tuple[TrainState, Metrics, TokenStats]:
        if settings.teacher_decay:
            teacher_variables = tree.combine(state.average, frozen)
        else:
            teacher_variables = {"params": teacher_params or frozen["params"]}

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


def validation(config: Config) -> EvaluateConfig:
    """How validation asks: as an evaluation does, its responses no longer than those of training.

    Longer ones would need a larger cache beside the train state than the rollouts of a step.
    """
    sampling = config.evaluate.sampling
    longest = min(sampling.max_new_tokens, config.distillation.sampling.max_new_tokens)
    sampling = dataclasses.replace(sampling, max_new_tokens=longest)
    return dataclasses.replace(config.evaluate, sampling=sampling)


def run(config: Config, workdir: str) -> None:
    """Trains `{workdir}/distillation` to its last step, from its last checkpoint if any."""
    given, config = config, config_lib.resolve(config, workdir)
    settings = config.distillation
    divergences.named(settings)  # a wrong name ends the run here
    sinks.check(config.metrics)  # and so does a package that is not there
    share = (jax.process_index(), jax.process_count())
    training = loaders.load_boards(config, "train", share)
    held_out = monitor.spread(loaders.load_boards(config, "val"), settings.eval_boards)
    stage_folder.check_finished(settings.student)
    stage_folder.check_finished(settings.teacher)
    with contextlib.ExitStack() as held:
        folder = epath.Path(workdir) / "distillation"
        sections = ("model", "data", "distillation", "checkpoint", "seed")
        claim = held.enter_context(folders.claimed(folder, given, sections))
        mesh = sharding.open_mesh(config.mesh)
        for name, rows in config_lib.update_rows(settings).items():
            batches.check_batch(mesh, name, rows, settings.microbatches)
        sampled_rows = config_lib.update_rows(settings)["distillation.batch_size"]
        batches.check_batch(
            sharding.rollout_mesh(mesh, config.mesh.rollout_tensor),
            f"mesh.rollout_tensor={config.mesh.rollout_tensor}: distillation.batch_size",
            sampled_rows,
        )

        # The student, the part of it that learns, and the frozen teacher.
        student, trained, frozen = loading.load_student(
            settings, config, claim.folder, claim.notes, mesh, metric="val/success"
        )
        teacher = loading.load_teacher(settings, config, mesh, student)
        processor = student.processor
        encoder = buckets.fitted(load_encoder(config.data, processor), config)
        loader = lessons.load_prompts(config, training, encoder, batches.process_share(mesh))

        # Three programs a step: lay the weights out for decoding; sample; then teacher, student,
        # gradient and update in one.
        speaker = loading.for_rollouts(student.model, config.mesh)
        lay_out = sharding.make_layout(speaker.mesh, speaker.dtype)
        sampler = Sampler(
            speaker,
            settings.sampling,
            eos_ids=processor.eos_ids,
            banned_ids=processor.banned_ids,
            pad_id=processor.pad_id,
        )
        tx = optimizer.make_optimizer(settings.optim, settings.steps)
        update = make_update(student.model, teacher.model, settings, tx, processor.banned_ids)
        answer = answers.make_answerer(speaker, encoder, validation(config))
        rng = batches.make_key(config.seed, speaker.mesh)
        choose, take_new = jax.jit(lessons.with_references), jax.jit(lessons.new_rows)
        replay = jax.jit(
            functools.partial(lessons.replay, eos_ids=processor.eos_ids, pad_id=processor.pad_id)
        )
        cut = jax.jit(lessons.first_tokens, static_argnums=1)

        state = optimizer.init(trained, tx, mesh, keeps_average=settings.teacher_decay > 0)
        state = dataclasses.replace(state, memory=lessons.init_memory(config, mesh))
        opened = sessions.open_session(
            claim,
            config,
            state,
            loader,
            metric="val/success",
            best_mode="max",
            steps=settings.steps,
            eval_every=settings.eval_every,
        )
        session = held.enter_context(opened)
        state, spent = session.state, session.timers.seconds
        for step in range(session.start, settings.steps):
            with session.timers.phase("data"):
                prompts = next(loader)
            with session.timers.phase("rollout"):
                asked = batches.to_global(prompts.batch, mesh)
                new = asked if asked.slots is None else take_new(asked)
                sampled = sampler.rollout(
                    lay_out(tree.combine(state.params, frozen)),
                    new.student,
                    jax.random.fold_in(rng, step),
                    new.row_ids,
                    new.draft,
                )
                sampled = batches.move(sampled, mesh)
                if asked.slots is not None:
                    memory, sampled = replay(state.memory, sampled, asked.slots)
                    state = dataclasses.replace(state, memory=memory)
                learned = choose(sampled, asked.references)
                # The rows of this process: what it sampled, and what it learns from.
                own = own_learned = batches.to_local(sampled)
                if asked.references is not None:
                    own_learned = batches.to_local(learned)
                if settings.response_buckets:
                    longest = max(int(one.mask.sum(1).max()) for one in (own, own_learned))
                    length = lessons.response_bucket(processes.largest([longest])[0], settings)
                    learned = cut(learned, length)
                    own, own_learned = (
                        lessons.first_tokens(one, length) for one in (own, own_learned)
                    )
            groups = segments.segments(processor, own_learned.tokens, own_learned.mask)
            weights = batches.to_global(lessons.token_weights(groups, settings), mesh)
            # Rows are judged before the update only where they weigh by what they came to.
            judge = functools.partial(lessons.judge, processor, prompts.boards, own)
            judged = judge() if lessons.needs_outcomes(settings) else None
            batch = DistillationBatch(
                asked.student,
                asked.teacher,
                learned.tokens,
                learned.mask,
                weights,
                asked.other,
                batches.to_global(lessons.outcomes(judged, prompts, own, config), mesh),
            )
            started = time.perf_counter()
            records = batches.to_global(prompts.records, mesh)
            state, measured, stats = update(state, frozen, teacher.params, batch, records)
            # The host scores the rollouts while the device works on the update.
            drawn = lessons.drawn(prompts.batch)
            measured |= monitor.rollout_metrics(
                prompts.boards[drawn],
                (judged or judge())[drawn],
                own.truncated[drawn],
                own.mask[drawn],
            )
            if asked.draft is not None:
                measured |= monitor.draft_metrics(
                    groups, lessons.is_sampled(own.mask, prompts.batch), own.guessed
                )
            stats = batches.to_local(stats)
            spent["update"] = time.perf_counter() - started
            measured |= monitor.token_metrics(groups, stats)
            measured |= guards.rollout_measures(
                own_learned.tokens,
                lessons.is_sampled(own_learned.mask, prompts.batch),
                own.logprobs,
                stats.student_logprob,
                settings.sampling,
            )
            measured["tokens_per_s/rollout"] = own.mask[drawn].sum() / spent["rollout"]
            flops = update_flops(student.model, teacher.model, batch)
            if records is not None:
                flops += grounding.update_flops(student.model, records)
            measured |= sessions.speed(flops, 2 * own.mask.size, spent["update"])
            if sessions.is_due(step + 1, settings.eval_every, settings.steps):
                with session.timers.phase("validation"):
                    given = answer(lay_out(tree.combine(state.params, frozen)), held_out, "picture")
                    measured |= monitor.validation_metrics(held_out, given)
                    session.show(step + 1, monitor.shown_answers(held_out, given, encoder.picture))
                state = lessons.after_validation(state, measured["val/success"], settings)
            session.finish_step(step + 1, state, measured)
