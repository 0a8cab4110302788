"""Stage 2, distillation: the student answers from the picture, and moves to what the teacher, who
reads the same board as text, would have said at every one of the student's own tokens.

Axes: B rollouts, R response tokens, D width, V vocabulary.
"""

import contextlib
import dataclasses
import functools
import time

import jax
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.config import Config, EvaluateConfig
from mgsd_jax.data import buckets, loaders, segments
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.parallel import batches, processes, sharding
from mgsd_jax.sampling import answers
from mgsd_jax.sampling.sampler import Sampler
from mgsd_jax.stages import distillation_step, grounding, loading
from mgsd_jax.training import (
    divergences,
    guards,
    lessons,
    monitor,
    optimizer,
    sessions,
)
from mgsd_jax.workdir import folders, sinks, stage_folder


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
        if settings.replay_steps:
            sampled_rows //= 2
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
        readers = (student.model, teacher.model, settings)
        update = distillation_step.make_update(*readers, tx, processor.banned_ids)
        check_start = functools.partial(
            distillation_step.check_start, config.guards, *readers, processor.banned_ids
        )
        answer = answers.make_answerer(speaker, encoder, validation(config))
        rng = batches.make_key(config.seed, speaker.mesh)
        choose, take_new = jax.jit(lessons.with_references), jax.jit(lessons.new_rows)
        replay = jax.jit(
            functools.partial(lessons.replay, eos_ids=processor.eos_ids, pad_id=processor.pad_id)
        )
        cut = jax.jit(lessons.first_tokens, static_argnums=1)

        state = optimizer.init(trained, tx, mesh, keeps_average=settings.teacher_decay > 0)
        state = lessons.with_memory(state, config, mesh)
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
                guards.check_pictures(prompts.batch.student, processor)
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
            batch = distillation_step.DistillationBatch(
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
            if step == 0:
                check_start(state, frozen, teacher.params, batch, stats)
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
            flops = distillation_step.update_flops(student.model, teacher.model, batch)
            if records is not None:
                flops += grounding.update_flops(student.model, records)
            measured |= sessions.speed(flops, 2 * own.mask.size, spent["update"])
            if sessions.is_due(step + 1, settings.eval_every, settings.steps):
                with session.timers.phase("validation"):
                    laid_out = lay_out(tree.combine(state.params, frozen))
                    given = answer(laid_out, held_out, "picture")
                    validated = monitor.validation_metrics(held_out, given)
                    measured |= validated
                    session.show(step + 1, monitor.shown_answers(held_out, given, encoder.picture))
                    if guards.is_blind_due(step + 1, settings.eval_every, config.guards):
                        measured |= guards.blind_measure(answer, laid_out, held_out, given)
                state = lessons.after_validation(state, validated["val/success"], settings)
            session.finish_step(step + 1, state, measured)
