"""Stage 2, distillation: the student answers from the picture, and moves to what the teacher, who
reads the same board as text, would have said at every one of the student's own tokens.

`run` is the loop of steps; distillation_rollout.py has their rollouts, distillation_step.py their
update, distillation_validation.py the validations between them.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
from etils import epath
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config
from mgsd_jax.data import buckets, loaders, segments
from mgsd_jax.data.batching import GroundingBatch
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder, load_encoder
from mgsd_jax.parallel import batches, sharding
from mgsd_jax.sampling import answers
from mgsd_jax.stages import distillation_rollout as rollouts
from mgsd_jax.stages import distillation_step, grounding, loading
from mgsd_jax.stages import distillation_validation as validation
from mgsd_jax.stages.distillation_rollout import Speaker
from mgsd_jax.stages.distillation_step import DistillationBatch, Metrics
from mgsd_jax.stages.distillation_validation import HeldOut
from mgsd_jax.stages.loading import Loaded
from mgsd_jax.training import divergences, guards, lessons, monitor, optimizer, sessions
from mgsd_jax.training.divergences import TokenStats
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.tree import Tree
from mgsd_jax.workdir import folders, sinks, stage_folder


@dataclasses.dataclass(frozen=True)
class Parts:
    """What the steps of a run work with: models, data and programs."""

    student: Loaded  # its parameters are in the train state and in `frozen`
    teacher: Loaded
    frozen: Tree  # the student's parameters that do not learn
    encoder: Encoder
    loader: loaders.PromptLoader
    speaker: Speaker
    update: Callable[..., tuple[TrainState, Metrics, TokenStats]]
    check_start: Callable[..., None]
    held_out: HeldOut


def run(config: Config, workdir: str) -> None:
    """Trains `{workdir}/distillation` to its last step, from its last checkpoint if any."""
    given, config = config, config_lib.resolve(config, workdir)
    settings = config.distillation
    training, held_out = _load_boards(config)
    with contextlib.ExitStack() as held:
        folder = epath.Path(workdir) / "distillation"
        sections = ("model", "data", "distillation", "checkpoint", "seed")
        # A gate that a validation opens depends on when there is one.
        bound = ("distillation.eval_every",) if settings.wrong_weight_from else ()
        claim = held.enter_context(folders.claimed(folder, given, sections, bound))
        mesh = sharding.open_mesh(config.mesh)
        _check_rows(config, mesh)
        parts, state = _prepare(config, training, held_out, claim, mesh)
        processor, frozen, teacher = parts.encoder.processor, parts.frozen, parts.teacher.params
        opened = sessions.open_session(
            claim,
            config,
            state,
            parts.loader,
            metric="val/success",
            best_mode="max",
            steps=settings.steps,
            eval_every=settings.eval_every,
        )
        session = held.enter_context(opened)
        state, spent = session.state, session.timers.seconds
        for step in range(session.start, settings.steps):
            with session.timers.phase("data"):
                prompts = next(parts.loader)
                guards.check_pictures(prompts.batch.student, processor)
                if prompts.records is not None:
                    guards.check_pictures(prompts.records.inputs, processor)
            with session.timers.phase("rollout"):
                state, said = rollouts.sample(parts.speaker, state, prompts.batch, step)
            groups = segments.segments(processor, said.own_learned.tokens, said.own_learned.mask)
            # Rows are judged before the update only where they weigh by what they came to.
            judge = functools.partial(lessons.judge, processor, prompts.boards, said.own)
            judged = judge() if lessons.needs_outcomes(settings) else None
            batch = rollouts.make_batch(said, prompts, groups, judged, config, mesh)
            started = time.perf_counter()
            records = batches.to_global(prompts.records, mesh)
            state, measured, stats = parts.update(state, frozen, teacher, batch, records)
            # The host scores the rollouts while the device works on the update.
            measured |= rollouts.rollout_metrics(said, prompts, groups, judged or judge())
            stats = batches.to_local(stats)
            if step == 0:
                parts.check_start(state, frozen, teacher, batch, stats)
            spent["update"] = time.perf_counter() - started
            measured |= rollouts.update_metrics(said, prompts, groups, stats, settings)
            measured |= rollouts.rollout_speed(said, prompts, spent["rollout"])
            flops = _update_flops(parts, batch, records)
            measured |= sessions.speed(flops, 2 * said.own.mask.size, spent["update"])
            if sessions.is_due(step + 1, settings.eval_every, settings.steps):
                with session.timers.phase("validation"):
                    validated = validation.validate(
                        parts.held_out, parts.speaker, state, teacher, session, step + 1
                    )
                measured |= validated
                state = lessons.after_validation(state, validated["val/success"], settings)
            session.finish_step(step + 1, state, measured)


def _load_boards(config: Config) -> tuple[Sequence[Board], list[Board]]:
    """(the boards to train on, those of validation), once all that needs no model is checked."""
    settings = config.distillation
    divergences.named(settings)  # a wrong name ends the run here
    sinks.check(config.metrics)  # and so does a package that is not there
    share = (jax.process_index(), jax.process_count())
    training = loaders.load_boards(config, "train", share)
    held_out = monitor.spread(loaders.load_boards(config, "val"), settings.eval_boards)
    stage_folder.check_finished(settings.student)
    stage_folder.check_finished(settings.teacher)
    return training, held_out


def _check_rows(config: Config, mesh: Mesh | None) -> None:
    """Raises ValueError unless the rows of updates and rollouts split over their meshes."""
    settings = config.distillation
    rows = config_lib.update_rows(settings)
    for name, number in rows.items():
        batches.check_batch(mesh, name, number, settings.microbatches)
    half, divisor = ("half of ", 2) if settings.replay_steps else ("", 1)
    sampled = rows["distillation.batch_size"] // divisor
    name = f"mesh.rollout_tensor={config.mesh.rollout_tensor}: {half}distillation.batch_size"
    rollout_mesh = sharding.rollout_mesh(mesh, config.mesh.rollout_tensor)
    batches.check_batch(rollout_mesh, name, sampled)


def _prepare(
    config: Config,
    training: Sequence[Board],
    validated: Sequence[Board],
    claim: folders.Claim,
    mesh: Mesh | None,
) -> tuple[Parts, TrainState]:
    """(what the steps work with, the state before the first of them)."""
    settings = config.distillation
    # The student, the part of it that learns, and the frozen teacher.
    student, trained, frozen = loading.load_student(
        settings, config, claim.folder, claim.notes, mesh, metric="val/success"
    )
    teacher = loading.load_teacher(settings, config, mesh, student)
    encoder = buckets.fitted(load_encoder(config.data, student.processor), config)
    loader = lessons.load_prompts(config, training, encoder, batches.process_share(mesh))

    # Three programs a step: lay the weights out for decoding; sample; then teacher, student,
    # gradient and update in one.
    speaker = rollouts.make_speaker(student, frozen, config)
    tx = optimizer.make_optimizer(settings.optim, settings.steps)
    readers, banned = (student.model, teacher.model, settings), student.processor.banned_ids
    update = distillation_step.make_update(*readers, tx, banned)
    measure = distillation_step.make_measure(*readers, banned)
    check = functools.partial(
        distillation_step.check_start, config.guards, settings.microbatches, measure
    )
    asking = validation.how_to_ask(config)
    answer = answers.make_answerer(speaker.sampler.model, encoder, asking)
    held_out = HeldOut(validated, encoder, answer, measure)
    state = optimizer.init(trained, tx, mesh, keeps_average=settings.teacher_decay > 0)
    state = lessons.with_memory(state, config, mesh)
    parts = Parts(student, teacher, frozen, encoder, loader, speaker, update, check, held_out)
    return parts, state


def _update_flops(parts: Parts, batch: DistillationBatch, records: GroundingBatch | None) -> float:
    """FLOPs of an update over both readers, and over records if it has any."""
    student, teacher = parts.student.model, parts.teacher.model
    flops = distillation_step.update_flops(student, teacher, batch)
    return flops if records is None else flops + grounding.update_flops(student, records)
