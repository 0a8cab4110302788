"""The validation of distillation: how the student answers boards that it does not learn from, and
how far it is from the teacher there.
"""

import dataclasses
import functools
from collections.abc import Sequence

import jax

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, DistillationConfig, EvaluateConfig, sizes
from mgsd_jax.data import batching
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.parallel import batches
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling import answers
from mgsd_jax.sampling.answers import Answerer
from mgsd_jax.stages.distillation_rollout import Speaker
from mgsd_jax.stages.distillation_step import DistillationBatch, Measure
from mgsd_jax.training import guards, monitor
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.training.sessions import Session
from mgsd_jax.tree import PyTree, Tree


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """What a validation works with."""

    boards: Sequence[Board]
    encoder: Encoder
    answer: Answerer
    measure: Measure


def how_to_ask(config: Config) -> EvaluateConfig:
    """As an evaluation asks, with responses no longer than those of training.

    Longer ones would need a larger cache beside the train state than the rollouts of a step.
    """
    sampling = config.evaluate.sampling
    longest = min(sampling.max_new_tokens, config.distillation.sampling.max_new_tokens)
    sampling = dataclasses.replace(sampling, max_new_tokens=longest)
    return dataclasses.replace(config.evaluate, sampling=sampling)


def validate(
    held_out: HeldOut,
    speaker: Speaker,
    state: TrainState,
    teacher_params: Tree,
    session: Session,
    step: int,
) -> dict[str, Mean]:
    """How the student as it stands answers the boards; shows some of its answers.

    Every so many times wrong pictures are shown too, which tells whether it looks at them.
    """
    boards, variables = held_out.boards, speaker.weights(state)
    given = held_out.answer(variables, boards, "picture")
    measured = monitor.validation_metrics(boards, given)
    session.show(step, monitor.shown_answers(boards, given, held_out.encoder.picture))
    if guards.is_blind_due(step, session.eval_every, session.config.guards):
        measured |= guards.blind_measure(held_out.answer, variables, boards, given)
    del variables  # an update does without this copy, and so has the memory for it
    return measured | distance(held_out, speaker, state, teacher_params, given)


def distance(
    held_out: HeldOut,
    speaker: Speaker,
    state: TrainState,
    teacher_params: Tree,
    given: Sequence[Answer],
) -> dict[str, Mean]:
    """`val/divergence` and `val/kl` over the tokens of the answers to all boards.

    The student reads the pictures as they are, the teacher each board's own text: what
    `distillation.teacher_noise` and `teacher_board` do to training is left out. Rows are those of a
    microbatch, and lengths the largest that an update may have, so there is one program, and it
    needs no more memory than the update.
    """
    settings, boards, found = speaker.settings, held_out.boards, []
    rows = config_lib.update_rows(settings)["distillation.batch_size"] // settings.microbatches
    for start in range(0, len(boards), rows):
        chosen = slice(start, start + rows)
        batch = _batch(held_out.encoder, settings, boards[chosen], given[chosen], rows)
        batch = batches.to_global(batch, speaker.mesh, is_whole=True)
        found.append(held_out.measure(state, speaker.frozen, teacher_params, batch))
    found = jax.block_until_ready(found)
    divergence, kl = (functools.reduce(Mean.__add__, one) for one in zip(*found, strict=True))
    return {"val/divergence": divergence, "val/kl": kl}


def _batch(
    encoder: Encoder,
    settings: DistillationConfig,
    boards: Sequence[Board],
    given: Sequence[Answer],
    rows: int,
) -> DistillationBatch:
    """What both readers read of so many boards; rows that only fill it up have no response."""
    data, pad_id = encoder.data, encoder.processor.pad_id
    asked = batching.pad_rows([answers.encode_prompt(encoder, b, "picture") for b in boards], rows)
    taught = [encoder.teacher(board, settings.teacher_context) for board in boards]
    taught = batching.pad_rows(taught, rows)
    prompt, context, patches = (
        (max(sizes(buckets)),)
        for buckets in (data.prompt_buckets, data.teacher_buckets, data.patch_buckets)
    )
    prompts = batching.prompt_batch(
        asked,
        taught,
        student_length=batching.token_bucket(asked, prompt, name="a student prompt"),
        teacher_length=batching.token_bucket(taught, context, name="a teacher prompt"),
        pad_id=pad_id,
        patch_buckets=patches,
        max_pictures=1,
    )
    given_ids = [answer.ids for answer in given] + [None] * (rows - len(given))
    length = settings.sampling.max_new_tokens
    said: PyTree = batching.references(given_ids, length=length, pad_id=pad_id)
    return DistillationBatch(prompts.student, prompts.teacher, said.tokens, said.mask)
