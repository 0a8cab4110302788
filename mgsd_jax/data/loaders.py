"""Boards as Grain datasets: examples drawn, rendered, tokenised and batched ahead of the device.

A loader's `get_state` / `set_state` resume it at the very next batch. Every random choice (order,
kind of record, which optimal plan) is a function of (seed, position), so restarts and thread counts
change nothing. Nor does the number of processes: the batch of all is the batch of one, each process
makes its own run of the rows alone, and pads it to the largest bucket that any of them needs.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, NamedTuple, TypeVar

import grain
import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, TeacherContext
from mgsd_jax.data import batching
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.benchmarks import benchmark_keys
from mgsd_jax.data.boards import Board, LazyBoards, read_split
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.processor import Encoded
from mgsd_jax.data.records import RECORDS, check_kinds
from mgsd_jax.data.splits import Split, draw
from mgsd_jax.envs.noise import disturb

Batch = TypeVar("Batch")
Sizes = tuple[int, ...]  # padded sizes of a batch: tokens by side, patches
Agree = Callable[[Sizes], Sizes]  # each size's largest over the processes
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


class PromptExample(NamedTuple):
    """What one board becomes for distillation."""

    student: Encoded
    teacher: Encoded
    board: Board
    reference: np.ndarray | None  # [R] tokens of a right response


class PromptRows(NamedTuple):
    """A batch of prompts and the boards that they are about."""

    batch: batching.PromptBatch
    boards: tuple[Board, ...]


class Padded(NamedTuple, Generic[Batch]):
    """A batch, and how to pad its rows anew."""

    batch: Batch
    sizes: Sizes
    pad: Callable[[Sizes], Batch]


@dataclasses.dataclass(frozen=True)
class Loader(Generic[Batch]):
    """An endless iterator of the batches of one process, of the shapes that all agree on.

    With several processes `next` is a call of all of them, in the same order as what else they do
    together.
    """

    padded: grain.DatasetIterator  # of Padded[Batch]
    agree: Agree

    def __iter__(self) -> "Loader[Batch]":
        return self

    def __next__(self) -> Batch:
        batch, sizes, pad = next(self.padded)
        agreed = self.agree(sizes)
        return batch if agreed == sizes else pad(agreed)

    def get_state(self) -> dict[str, Any]:
        """The position, JSON values; the same on every process."""
        return self.padded.get_state()

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes on after the batch that `state` was taken at."""
        self.padded.set_state(state)


def grounding_loader(
    boards: Sequence[Board],
    encoder: Encoder,
    *,
    mixture: Sequence[tuple[str, float]],
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
    agree: Agree = tuple,
) -> Loader[batching.GroundingBatch]:
    """A loader of records of `mixture` by share, `batch_size` of them over all processes."""
    if not boards:
        raise ValueError("boards: got none, want at least one to train on")
    check_kinds(mixture)
    kinds = [kind for kind, _ in mixture]
    shares = np.array([share for _, share in mixture], np.float64)
    shares = shares / shares.sum()
    pictures = any(RECORDS[kind].has_picture for kind, share in mixture if share > 0)
    data = encoder.data

    def example(board: Board, rng: np.random.Generator) -> tuple[Encoded, int]:
        return encoder.record(board, kinds[rng.choice(len(kinds), p=shares)], rng)

    def pad(examples: Sequence[tuple[Encoded, int]], sizes: Sizes) -> batching.GroundingBatch:
        return batching.grounding_batch(
            examples,
            lengths=sizes[:1] or data.sequence_buckets,
            pad_id=encoder.processor.pad_id,
            patch_buckets=sizes[1:] or data.patch_buckets,
            max_pictures=1 if pictures else 0,
            patch_channels=encoder.processor.pictures.channels,
        )

    def collate(examples: Sequence[tuple[Encoded, int]]) -> Padded[batching.GroundingBatch]:
        batch = pad(examples, ())
        sizes = (batch.targets.shape[1], _patches(batch.inputs))
        return Padded(batch, sizes, functools.partial(pad, examples))

    examples = _shuffled(boards, seed).random_map(example)
    return _load(examples, batch_size, process, collate, encoder, agree)


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
    process: tuple[int, int] = (0, 1),
    agree: Agree = tuple,
) -> Loader[PromptRows]:
    """A loader of `batch_size` prompts over all processes; each stands `rollouts` times in a row.

    The teacher reads the board with a share `noise` of its facts wrong (envs/noise.py), or another
    board of the same task and level. A share of the prompts comes with a right response, padded to
    `response_length`. Row ids are those of the batch of all processes.
    """
    if not boards:
        raise ValueError("boards: got none, want at least one to train on")
    data = encoder.data

    def example(board: Board, rng: np.random.Generator) -> PromptExample:
        read = board if teacher_board == "same" else _another(boards, board, rng)
        read = read._replace(state=disturb(read.task, read.state, rng, noise))
        reference = encoder.reference(board, rng) if rng.random() < reference_share else None
        return PromptExample(
            encoder.student(board), encoder.teacher(read, context), board, reference
        )

    def pad(examples: Sequence[PromptExample], sizes: Sizes) -> PromptRows:
        rows = [row for row in examples for _ in range(rollouts)]
        batch = batching.prompt_batch(
            [row.student for row in rows],
            [row.teacher for row in rows],
            student_lengths=sizes[:1] or data.prompt_buckets,
            teacher_lengths=sizes[1:2] or data.teacher_buckets,
            pad_id=encoder.processor.pad_id,
            patch_buckets=sizes[2:] or data.patch_buckets,
            max_pictures=1,
            first_row=process[0] * len(rows),
        )
        if reference_share > 0:
            references = batching.references(
                [row.reference for row in rows],
                length=response_length,
                pad_id=encoder.processor.pad_id,
            )
            batch = batch._replace(references=references)
        return PromptRows(batch, tuple(row.board for row in rows))

    def collate(examples: Sequence[PromptExample]) -> Padded[PromptRows]:
        rows = pad(examples, ())
        student, teacher = rows.batch.student, rows.batch.teacher
        sizes = (student.tokens.shape[1], teacher.tokens.shape[1], _patches(student))
        return Padded(rows, sizes, functools.partial(pad, examples))

    examples = _shuffled(boards, seed).random_map(example)
    return _load(examples, batch_size, process, collate, encoder, agree)


def _another(boards: Sequence[Board], board: Board, rng: np.random.Generator) -> Board:
    """Another board of the same task and level. Raises ValueError where there seems to be none."""
    for _ in range(1000):
        other = boards[int(rng.integers(len(boards)))]
        if other[:2] == board[:2] and other.state != board.state:
            return other
    raise ValueError(
        f"distillation.teacher_board=other: got no second board of {board.task} level "
        f"{board.level}, want two or more"
    )


@dataclasses.dataclass(frozen=True)
class _Share:
    """The examples of one process: of every `batch_size` of them its own run of rows."""

    examples: grain.MapDataset
    batch_size: int
    process: tuple[int, int]

    def __len__(self) -> int:
        return len(self.examples) // self.process[1]

    def __getitem__(self, index: int) -> Any:
        process, count = self.process
        own = self.batch_size // count
        batch, row = divmod(index, own)
        return self.examples[batch * self.batch_size + process * own + row]


def _shuffled(boards: Any, seed: int) -> grain.MapDataset:
    return grain.MapDataset.source(boards).seed(seed).shuffle().repeat()


def _patches(inputs: Inputs) -> int:
    return 0 if inputs.pictures is None else inputs.pictures.patches.shape[2]


def _load(
    examples: grain.MapDataset,
    batch_size: int,
    process: tuple[int, int],
    collate: Any,
    encoder: Encoder,
    agree: Agree,
) -> Loader[Any]:
    count = process[1]
    if batch_size % count:
        raise ValueError(f"batch_size: got {batch_size}, want a multiple of {count} processes")
    if count > 1:
        examples = grain.MapDataset.source(_Share(examples, batch_size, process))
    workers = encoder.data.workers
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    batches = examples.batch(batch_size // count, batch_fn=collate).to_iter_dataset(options)
    return Loader(iter(batches), agree)
