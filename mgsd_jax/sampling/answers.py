"""A model answers boards: prompts of every mode, jitted sampling.

Axes: B batch, R response tokens.
"""

import collections
import dataclasses
from collections.abc import Callable, Sequence

import jax
import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.config import DataConfig, EvaluateConfig, Mode, SamplingConfig
from mgsd_jax.data import batching
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder, draw_picture
from mgsd_jax.data.pictures import read_picture
from mgsd_jax.data.processor import Encoded, Processor, encode
from mgsd_jax.data.prompts import Message, Prompts
from mgsd_jax.data.segments import decode_rows
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import axes, batches
from mgsd_jax.sampling.sampler import Sampler
from mgsd_jax.tree import Tree

Answerer = Callable[..., list[Answer]]
Responder = Callable[..., list[Answer]]


def make_responder(
    model: Qwen3VL, processor: Processor, settings: SamplingConfig, seed: int = 0
) -> Responder:
    """A function (variables, inputs, row_ids) -> the answers to a batch of prompts, row by row.

    It may also be given drafts, and the number of the try. The rows have to split over the mesh.
    """
    sampler = Sampler(
        model,
        settings,
        eos_ids=processor.eos_ids,
        banned_ids=processor.banned_ids,
        pad_id=processor.pad_id,
    )
    mesh = model.mesh
    first_rng = batches.make_key(seed, mesh)

    def respond(
        variables: Tree,
        inputs: Inputs,
        row_ids: np.ndarray,
        *,
        draft: np.ndarray | None = None,
        attempt: int = 0,
    ) -> list[Answer]:
        rng = jax.random.fold_in(first_rng, attempt) if attempt else first_rng
        asked = batches.to_global((inputs, row_ids, draft), mesh, is_whole=True)
        sampled = sampler.rollout(variables, asked[0], rng, asked[1], asked[2])
        sampled = batches.to_every(sampled, mesh)
        texts = decode_rows(processor, sampled.tokens, sampled.mask)
        return [
            Answer(text, bool(truncated), len(ids := tokens[mask > 0]), ids=tuple(ids.tolist()))
            for text, truncated, tokens, mask in zip(
                texts, sampled.truncated, sampled.tokens, sampled.mask, strict=True
            )
        ]

    return respond


def make_answerer(
    model: Qwen3VL, encoder: Encoder, settings: EvaluateConfig, seed: int = 0
) -> Answerer:
    """A function (variables, boards, mode) -> answers in the boards' order.

    It may also be told which rows of a longer list these are (`row_ids`), what to show in place of
    the boards (`shown`) and the number of the try (`attempt`): a sampled response depends on the
    seed, its row and its try alone. The mesh of the model is that of rollouts
    (`sharding.rollout_mesh`), where `sharding.make_layout` lays the variables; every process asks
    about all boards, and gets all answers.
    """
    respond = make_responder(model, encoder.processor, settings.sampling, seed)
    # The rows of a full batch, which has to split over the mesh.
    size = settings.batch_size + -settings.batch_size % axes.parts(model.mesh, axes.BATCH)

    def answer(
        variables: Tree,
        boards: Sequence[Board],
        mode: Mode,
        *,
        row_ids: Sequence[int] | None = None,
        shown: Sequence[Board] | None = None,
        attempt: int = 0,
    ) -> list[Answer]:
        shown = shown_boards(boards, mode) if shown is None else shown
        row_ids = range(len(boards)) if row_ids is None else row_ids
        answers: list[Answer] = []
        for start in range(0, len(boards), settings.batch_size):
            chosen = slice(start, start + settings.batch_size)
            padded = batching.pad_rows(shown[chosen], size)
            inputs = _inputs(encoder, [encode_prompt(encoder, b, mode) for b in padded], mode)
            # Rows that only fill the batch are thrown away: any id will do for them.
            ids = np.zeros(size, np.int32)
            ids[: len(row_ids[chosen])] = row_ids[chosen]
            draft = None
            if settings.sampling.draft_tokens:
                guesses = [encoder.draft(b, is_perception=mode == "perception") for b in padded]
                draft = batching.pad_drafts(guesses, settings.sampling.max_new_tokens)
            given = respond(variables, inputs, ids, draft=draft, attempt=attempt)
            answers += given[: len(boards[chosen])]
        return answers

    return answer


def _inputs(encoder: Encoder, encoded: Sequence[Encoded], mode: Mode) -> Inputs:
    buckets = encoder.data.teacher_buckets if mode == "text" else encoder.data.prompt_buckets
    return batching.to_inputs(
        encoded,
        length=batching.token_bucket(encoded, config_lib.sizes(buckets), name=f"a {mode} prompt"),
        side="left",
        pad_id=encoder.processor.pad_id,
        patch_buckets=config_lib.sizes(encoder.data.patch_buckets),
        max_pictures=1,
    )


def encode_prompt(encoder: Encoder, board: Board, mode: Mode) -> Encoded:
    """The prompt that asks about a board in a mode."""
    messages = ask(encoder.prompts, encoder.picture, board, mode)
    return encode(encoder.processor, messages, add_generation_prompt=True)


def ask(
    prompts: Prompts, picture: Callable[[Board], np.ndarray], board: Board, mode: Mode
) -> list[Message]:
    """The messages that ask about a board in a mode; a text prompt draws no picture."""
    if mode == "text":
        return prompts_lib.teacher(prompts, board.task, board.state, "state")
    if mode == "perception":
        return prompts_lib.grounding(prompts, board.task, board.state, picture(board))[0]
    return prompts_lib.student(prompts, board.task, picture(board))


def show(data: DataConfig, board: Board) -> np.ndarray:
    """The picture of a board of a test set: the benchmark's own, or drawn; uint8 [H, W, 3]."""
    if board.picture_path is None:
        return draw_picture(data, board)
    return read_picture(board.picture_path, config_lib.picture_size(data, board.level))


@dataclasses.dataclass(frozen=True)
class BenchmarkEncoder(Encoder):
    """An encoder that shows the boards of a benchmark in its own pictures."""

    def picture(self, board: Board, rng: np.random.Generator | None = None) -> np.ndarray:
        """What `show` returns: nothing is trained on these boards, so `rng` changes nothing."""
        return show(self.data, board)


def shown_boards(boards: Sequence[Board], mode: Mode) -> Sequence[Board]:
    """What each question shows: its board, or to a blind student another one's picture."""
    return misleading(boards) if mode == "blind" else boards


def misleading(boards: Sequence[Board]) -> list[Board]:
    """For every board another one of its task and level: the next, the last one's is the first."""
    groups: dict[tuple[str, int], list[int]] = collections.defaultdict(list)
    for i, board in enumerate(boards):
        groups[board.task, board.level].append(i)
    others = list(boards)
    for (task, level), group in groups.items():
        if len(group) < 2:
            raise ValueError(f"blind: got one board of {task} level {level}, want two or more")
        for i, other in zip(group, [*group[1:], group[0]], strict=True):
            others[i] = boards[other]
    return others
