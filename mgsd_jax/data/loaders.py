"""Batches for training: what a batch of each stage holds, drawn, rendered and tokenised.

Every random choice (order, kind of record, which optimal plan) is a function of (seed, position).
See examples.py for how batches are made ahead, resumed and shared by processes.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.checks.fields import Json
from mgsd_jax.config import Config, DataConfig, TeacherContext, sizes
from mgsd_jax.data import batching
from mgsd_jax.data.benchmarks import benchmark_keys
from mgsd_jax.data.boards import Board, LazyBoards, read_split
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.examples import Agree, Loader, Sizes, make_examples
from mgsd_jax.data.processor import Encoded
from mgsd_jax.data.records import RECORDS, check_kinds
from mgsd_jax.data.splits import Split, draw
from mgsd_jax.envs.noise import disturb

STREAM_LENGTH = 1 << 24  # boards in one pass over a stream


def stream_boards(
    levels: Sequence[tuple[str, int]],
    split: Split,
    *,
    seed: int,
    exclude: frozenset[str] = frozenset(),
    count: int = STREAM_LENGTH,
) -> LazyBoards:
    """Boards of one split drawn on demand, the (task, level) pairs in turn; nothing on disk.

    `exclude` holds the content keys of boards that must not appear.
    """

    def make(place: int) -> Board:
        (task, level), turn = levels[place % len(levels)], place // len(levels)
        state = draw(task, level, split, seed=seed, index=turn, exclude=exclude)
        return Board(task, level, turn, state, None)

    return LazyBoards(count, make)


def load_boards(config: Config, split: Split, share: tuple[int, int] = (0, 1)) -> Sequence[Board]:
    """The boards of a split: read from `data.folder`, or drawn on the fly.

    With a `share` (i, n), process i of n checks its part of a folder and reads the rest on demand.
    """
    data = config.data
    if data.source == "folder":
        return read_split(data.folder, split, share)
    excluded = benchmark_keys(config_lib.excluded_folders(config))
    levels = tuple((kind.task, level) for kind in data.boards for level in kind.levels)
    return stream_boards(levels, split, seed=config.seed, exclude=excluded)


def grounding_loader(
    boards: Sequence[Board],
    encoder: Encoder,
    *,
    mixture: Sequence[tuple[str, float]],
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    agree: Agree = tuple,
) -> Loader[tuple[Encoded, int], batching.GroundingBatch]:
    """Records of `mixture` by share, `batch_size` of them over all processes."""
    check_kinds(mixture)
    kinds = [kind for kind, _ in mixture]
    shares = np.array([share for _, share in mixture], np.float64)
    shares = shares / shares.sum()
    # A batch without pictures has the shapes of the others, unless no batch ever has one.
    pictures = any(RECORDS[kind].has_picture for kind, share in mixture if share > 0)
    data, processor = encoder.data, encoder.processor

    def example(board: Board, rng: np.random.Generator) -> tuple[Encoded, int]:
        return encoder.record(board, kinds[rng.choice(len(kinds), p=shares)], rng)

    def measure(examples: Sequence[tuple[Encoded, int]]) -> Sizes:
        rows = [row for row, _ in examples]
        tokens = batching.token_bucket(rows, sizes(data.sequence_buckets), name="an example")
        return tokens, batching.patch_bucket(rows, sizes(data.patch_buckets)) if pictures else 0

    def pad(examples: Sequence[tuple[Encoded, int]], shape: Sizes) -> batching.GroundingBatch:
        length, patches = shape
        return batching.grounding_batch(
            examples,
            length=length,
            pad_id=processor.pad_id,
            patch_buckets=(patches,),
            max_pictures=1 if pictures else 0,
            patch_channels=processor.pictures.channels,
        )

    examples = make_examples(boards, example, data.workers, batch_size, seed, process)
    return Loader(examples, measure, pad, agree)


class PromptExample(NamedTuple):
    """What one board becomes for distillation."""

    student: Encoded
    teacher: Encoded
    board: Board
    reference: np.ndarray | None  # [R] tokens of a right response
    draft: np.ndarray | None  # [R] tokens that the response is guessed to be
    other: Encoded | None = None  # what the teacher reads of another board
    slot: int = 0  # where its rollout is kept


class PromptRows(NamedTuple):
    """A batch of prompts and the boards that they are about."""

    batch: batching.PromptBatch
    boards: tuple[Board, ...]
    records: batching.GroundingBatch | None = None  # that the same update learns from


def prompt_loader(
    boards: Sequence[Board],
    encoder: Encoder,
    *,
    context: TeacherContext,
    batch_size: int,
    rollouts: int,
    seed: int,
    noise: float = 0.0,
    teacher_board: Literal["same", "other"] = "same",
    reference_share: float = 0.0,
    response_length: int = 0,
    has_drafts: bool = False,
    has_others: bool = False,
    replay_steps: int = 0,
    process: tuple[int, int] = (0, 1),
    agree: Agree = tuple,
) -> Loader[PromptExample, PromptRows]:
    """`batch_size` prompts over all processes, each of them `rollouts` times in a row.

    The teacher reads the board with a share `noise` of its facts wrong, or another board of the
    same task and level. A share of the prompts comes with a right response, padded to
    `response_length`, with `has_drafts` each with a guess of its response, and with `has_others`
    with the teacher's prompt about another board. With `replay_steps` every second row is one of
    such a number of batches before (`Interleaved`), and rows say where their rollouts lie. Row ids
    are those of the batch of all processes.
    """

    def example(board: Board, rng: np.random.Generator) -> PromptExample:
        read = board if teacher_board == "same" else _another(boards, board, rng)
        read = read._replace(state=disturb(read.task, read.state, rng, noise))
        reference = encoder.reference(board, rng) if rng.random() < reference_share else None
        return PromptExample(
            encoder.student(board, rng),
            encoder.teacher(read, context),
            board,
            reference,
            encoder.draft(board) if has_drafts else None,
            encoder.teacher(_another(boards, board, rng), context) if has_others else None,
        )

    def pad(examples: Sequence[PromptExample], shape: Sizes) -> PromptRows:
        rows = [row for row in examples for _ in range(rollouts)]
        batch = _pad_prompts(rows, shape, pad_id, first_row=process[0] * len(rows))
        batch = _with_responses(batch, rows, response_length, pad_id, is_given=reference_share > 0)
        if replay_steps:
            batch = batch._replace(slots=np.array([row.slot for row in rows], np.int32))
        return PromptRows(batch, tuple(row.board for row in rows))

    def earlier(examples: Sequence[PromptExample]) -> Sequence[PromptExample]:
        return Interleaved(examples, batch_size // 2, replay_steps, seed)

    data, pad_id = encoder.data, encoder.processor.pad_id
    arrange = earlier if replay_steps else None
    found = make_examples(boards, example, data.workers, batch_size, seed, process, arrange)
    return Loader(found, functools.partial(_measure_prompts, data), pad, agree)


def _measure_prompts(data: DataConfig, examples: Sequence[PromptExample]) -> Sizes:
    """The buckets of both readers' prompts, and of the pictures."""
    students = [example.student for example in examples]
    teachers = [example.teacher for example in examples]
    teachers += [example.other for example in examples if example.other is not None]
    return (
        batching.token_bucket(students, sizes(data.prompt_buckets), name="a student prompt"),
        batching.token_bucket(teachers, sizes(data.teacher_buckets), name="a teacher prompt"),
        batching.patch_bucket(students, sizes(data.patch_buckets)),
    )


def _pad_prompts(
    rows: Sequence[PromptExample], shape: Sizes, pad_id: int, *, first_row: int
) -> batching.PromptBatch:
    """The prompts that student and teacher read."""
    student_length, teacher_length, patches = shape
    batch = batching.prompt_batch(
        [row.student for row in rows],
        [row.teacher for row in rows],
        student_length=student_length,
        teacher_length=teacher_length,
        pad_id=pad_id,
        patch_buckets=(patches,),
        max_pictures=1,
        first_row=first_row,
    )
    others = [row.other for row in rows if row.other is not None]
    if not others:
        return batch
    read = batching.text_inputs(others, length=teacher_length, pad_id=pad_id)
    return batch._replace(other=read)


def _with_responses(
    batch: batching.PromptBatch,
    rows: Sequence[PromptExample],
    length: int,
    pad_id: int,
    *,
    is_given: bool,
) -> batching.PromptBatch:
    """The batch with what rows have of responses: right ones where they are given, and guesses."""
    if is_given:
        responses = [row.reference for row in rows]
        held = batching.references(responses, length=length, pad_id=pad_id)
        batch = batch._replace(references=held)
    drafts = [row.draft for row in rows if row.draft is not None]
    return batch._replace(draft=batching.pad_drafts(drafts, length)) if drafts else batch


@dataclasses.dataclass(frozen=True)
class Interleaved(Sequence[PromptExample]):
    """Each example of a batch, followed by one that a batch of 1 to `steps` before had in its row.

    Which one is a function of (seed, step, row), so a resumed run replays the same. The first
    batch, which has none before it, repeats itself. Rollouts are kept in `steps` + 1 slots, in
    turn: the one that a step fills is none that it reads.
    """

    examples: Sequence[PromptExample]
    batch_size: int  # without the repeated ones
    steps: int
    seed: int

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, index: Any) -> Any:  # a Sequence's takes slices too, this one does not
        place, is_earlier = divmod(index, 2)
        step, row = divmod(place, self.batch_size)
        if is_earlier and step:
            rng = np.random.default_rng((self.seed, step, row))
            step -= 1 + int(rng.integers(min(self.steps, step)))
        example = self.examples[step * self.batch_size + row]
        return example._replace(slot=step % (self.steps + 1))


@dataclasses.dataclass(frozen=True)
class WithRecords:
    """A loader of prompts with records beside them, from a loader of their own."""

    prompts: Loader[PromptExample, PromptRows]
    records: Loader[tuple[Encoded, int], batching.GroundingBatch]

    def __next__(self) -> PromptRows:
        return next(self.prompts)._replace(records=next(self.records))

    def get_state(self) -> Json:
        """The positions of both, as JSON values."""
        return {"prompts": self.prompts.get_state(), "records": self.records.get_state()}

    def set_state(self, state: Json) -> None:
        """Resumes after the batches that `state` was taken at."""
        self.prompts.set_state(state["prompts"])
        self.records.set_state(state["records"])


PromptLoader = Loader[PromptExample, PromptRows] | WithRecords


def _another(boards: Sequence[Board], board: Board, rng: np.random.Generator) -> Board:
    """Another board of the same task and level. Raises ValueError where there seems to be none."""
    for _ in range(1000):
        other = boards[int(rng.integers(len(boards)))]
        if other[:2] == board[:2] and other.state != board.state:
            return other
    raise ValueError(
        f"data.boards: found no second board of {board.task} level {board.level}, want two or "
        "more, as distillation.teacher_board=other and distillation.contrast_cap read another"
    )
