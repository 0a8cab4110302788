"""Boards as Grain datasets: examples drawn, rendered, tokenised and batched ahead of the device.

A loader is a Grain iterator whose `get_state` / `set_state` resume it at the very next batch. Every
random choice (order, kind of record, which optimal plan) is a function of (seed, position), so
restarts and thread counts change nothing.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import grain
import numpy as np

from mgsd_jax import config as config_lib
from mgsd_jax import prompts as prompts_lib
from mgsd_jax.config import DataConfig, Record, TeacherContext
from mgsd_jax.data import batching
from mgsd_jax.data.boards import Board
from mgsd_jax.data.processor import Encoded, Processor, encode, encode_example
from mgsd_jax.envs import ENVS
from mgsd_jax.envs.splits import Split, draw
from mgsd_jax.prompts import Prompts


@dataclasses.dataclass(frozen=True)
class StreamedBoards:
    """An endless supply of boards of one split, the tasks and levels in turn; nothing on disk."""

    levels: tuple[tuple[str, int], ...]  # (task, level)
    split: Split
    seed: int
    exclude: frozenset[str]  # content keys of boards that must not appear
    count: int

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Board:
        task, level = self.levels[index % len(self.levels)]
        turn = index // len(self.levels)
        state = draw(task, level, self.split, seed=self.seed, index=turn, exclude=self.exclude)
        return Board(task, level, turn, state, None)


@dataclasses.dataclass(frozen=True)
class Encoder:
    """How a board becomes token ids and patches."""

    processor: Processor
    prompts: Prompts
    data: DataConfig

    def picture(self, board: Board) -> np.ndarray:
        """The board drawn at the configured size, uint8 [H, W, 3]."""
        size = config_lib.picture_size(self.data, board.level)
        return ENVS[board.task].render(board.state, size)

    def student(self, board: Board) -> Encoded:
        """The student's prompt: instructions and the picture."""
        messages = prompts_lib.student(self.prompts, board.task, self.picture(board))
        return encode(self.processor, messages, add_generation_prompt=True)

    def teacher(self, board: Board, context: TeacherContext) -> Encoded:
        """The teacher's prompt: instructions and the board as text."""
        messages = prompts_lib.teacher(self.prompts, board.task, board.state, context)
        return encode(self.processor, messages, add_generation_prompt=True)

    def record(self, board: Board, kind: Record, rng: np.random.Generator) -> tuple[Encoded, int]:
        """A supervised record and the length of its prompt."""
        if kind == "questions":
            messages, answer = prompts_lib.grounding(
                self.prompts, board.task, board.state, self.picture(board)
            )
        elif kind == "cells":
            messages, answer = prompts_lib.cells(board.task, board.state, self.picture(board))
        else:
            plan = ENVS[board.task].random_shortest_plan(board.state, rng)
            answer = prompts_lib.response(board.task, board.state, plan)
            if kind == "plan_from_text":
                messages = prompts_lib.teacher(self.prompts, board.task, board.state)
            else:
                messages = prompts_lib.student(self.prompts, board.task, self.picture(board))
        return encode_example(self.processor, messages, answer)


class PromptRows(NamedTuple):
    """A batch of prompts and the boards that they are about."""

    batch: batching.PromptBatch
    boards: tuple[Board, ...]


def grounding_loader(
    boards: Sequence[Board],
    encoder: Encoder,
    *,
    mixture: tuple[tuple[Record, float], ...],
    batch_size: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """An endless iterator of `GroundingBatch`, records of `mixture` by share."""
    if not boards:
        raise ValueError("boards: got none, want at least one to train on")
    kinds: list[Record] = [kind for kind, _ in mixture]
    shares = np.array([share for _, share in mixture], np.float64)
    if len(set(kinds)) != len(kinds) or shares.min(initial=0) < 0 or not shares.sum() > 0:
        raise ValueError(f"mixture: got {mixture}, want distinct kinds with shares >= 0, sum > 0")
    shares = shares / shares.sum()
    pictures = any(kind != "plan_from_text" for kind, share in mixture if share > 0)

    def example(board: Board, rng: np.random.Generator) -> tuple[Encoded, int]:
        return encoder.record(board, kinds[rng.choice(len(kinds), p=shares)], rng)

    def collate(examples: Sequence[tuple[Encoded, int]]) -> batching.GroundingBatch:
        return batching.grounding_batch(
            examples,
            lengths=encoder.data.sequence_buckets,
            pad_id=encoder.processor.pad_id,
            patch_buckets=encoder.data.patch_buckets,
            max_pictures=1 if pictures else 0,
            patch_channels=patch_channels(encoder.processor),
        )

    examples = _shuffled(boards, seed, process).random_map(example)
    return _iterate(examples, batch_size, collate, encoder)


def prompt_loader(
    boards: Sequence[Board],
    encoder: Encoder,
    *,
    context: TeacherContext,
    batch_size: int,
    rollouts: int,
    seed: int,
    process: tuple[int, int] = (0, 1),
) -> grain.DatasetIterator:
    """An endless iterator of `PromptRows`; each prompt stands `rollouts` times, side by side."""
    if not boards:
        raise ValueError("boards: got none, want at least one to train on")

    def example(board: Board) -> tuple[Encoded, Encoded, Board]:
        return encoder.student(board), encoder.teacher(board, context), board

    def collate(examples: Sequence[tuple[Encoded, Encoded, Board]]) -> PromptRows:
        rows = [row for row in examples for _ in range(rollouts)]
        batch = batching.prompt_batch(
            [row[0] for row in rows],
            [row[1] for row in rows],
            student_lengths=encoder.data.prompt_buckets,
            teacher_lengths=encoder.data.teacher_buckets,
            pad_id=encoder.processor.pad_id,
            patch_buckets=encoder.data.patch_buckets,
            max_pictures=1,
            first_row=process[0] * len(rows),
        )
        return PromptRows(batch, tuple(row[2] for row in rows))

    examples = _shuffled(boards, seed, process).map(example)
    return _iterate(examples, batch_size, collate, encoder)


def fit(rows: Sequence[Encoded], buckets: tuple[int, ...], name: str) -> int:
    """The smallest bucket that holds the longest of the rows; ValueError where none does."""
    return batching.bucket(max(len(row.tokens) for row in rows), buckets, name=name)


def patch_channels(processor: Processor) -> int:
    """C: the values of one patch."""
    pictures = processor.pictures
    return 3 * pictures.temporal_patch_size * pictures.patch_size**2


def _shuffled(boards: Any, seed: int, process: tuple[int, int]) -> grain.MapDataset:
    dataset = grain.MapDataset.source(boards).seed(seed).shuffle().repeat()
    return dataset[process[0] :: process[1]]


def _iterate(
    dataset: grain.MapDataset, batch_size: int, collate: Any, encoder: Encoder
) -> grain.DatasetIterator:
    workers = encoder.data.workers
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(dataset.batch(batch_size, batch_fn=collate).to_iter_dataset(options))
