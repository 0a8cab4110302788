"""Endless examples made ahead of the device by Grain, and the share of each process.

A loader's `get_state` / `set_state` resume it at the very next batch. Every random choice is a
function of (seed, position), so restarts and thread counts change nothing. Nor does the number of
processes: together they make the batch that one process would, each of them its own run of the
rows, padded to the largest bucket that any of them needs.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Generic, TypeVar, cast

import grain
import numpy as np

from mgsd_jax.checks.fields import Json
from mgsd_jax.data.boards import Board

Example = TypeVar("Example")
Batch = TypeVar("Batch")
Sizes = tuple[int, ...]  # buckets of a batch: its tokens (of each side), its patches
Agree = Callable[[Sizes], Sizes]  # the largest of each size over the processes


@dataclasses.dataclass(frozen=True)
class Loader(Generic[Example, Batch]):
    """An endless iterator of the batches of one process, in the shapes that all processes agree on.

    Grain makes the examples ahead, in threads. Only then are buckets chosen and rows padded, once:
    the bucket of a batch is known when every process has its examples. With several processes
    `next` is a collective call: all of them make it, in the same order as their other collectives.
    """

    examples: grain.DatasetIterator[list[Example]]
    measure: Callable[[Sequence[Example]], Sizes]  # the buckets that examples need
    pad: Callable[[Sequence[Example], Sizes], Batch]
    agree: Agree

    def __iter__(self) -> "Loader[Example, Batch]":
        return self

    def __next__(self) -> Batch:
        examples = next(self.examples)
        return self.pad(examples, self.agree(self.measure(examples)))

    def get_state(self) -> Json:
        """The position, as JSON values; the same on every process."""
        return self.examples.get_state()

    def set_state(self, state: Json) -> None:
        """Resumes after the batch that `state` was taken at."""
        self.examples.set_state(state)


@dataclasses.dataclass(frozen=True)
class _Share(Generic[Example]):
    """The examples of one process: its own run of rows out of every `batch_size`."""

    examples: Sequence[Example]
    batch_size: int
    process: tuple[int, int]

    def __len__(self) -> int:
        return len(self.examples) // self.process[1]

    def __getitem__(self, index: int) -> Example:
        process, count = self.process
        own = self.batch_size // count
        batch, row = divmod(index, own)
        return self.examples[batch * self.batch_size + process * own + row]


def make_examples(
    boards: Sequence[Board],
    example: Callable[[Board, np.random.Generator], Example],
    workers: int,
    batch_size: int,
    seed: int,
    process: tuple[int, int],
    arrange: Callable[[Sequence[Example]], Sequence[Example]] | None = None,
) -> grain.DatasetIterator[list[Example]]:
    """Lists of this process's examples of a batch, made ahead by `workers` threads.

    The boards are shuffled anew each epoch. `arrange` may give the endless examples another order.
    """
    count = process[1]
    if not boards:
        raise ValueError("boards: got none, want at least one to train on")
    if batch_size % count:
        raise ValueError(f"batch_size: got {batch_size}, want a multiple of {count} processes")
    # As good as endless; grain's own endless repetition is one too long for batches of one.
    epochs = (1 << 62) // len(boards)
    shuffled = grain.MapDataset.source(boards).seed(seed).shuffle().repeat(epochs)
    examples = shuffled.random_map(example)
    if arrange is not None:
        examples = grain.MapDataset.source(arrange(cast(Any, examples)))
    if count > 1:
        examples = grain.MapDataset.source(_Share(cast(Any, examples), batch_size, process))
    options = grain.ReadOptions(num_threads=workers, prefetch_buffer_size=2 * workers)
    return iter(examples.batch(batch_size // count, batch_fn=list).to_iter_dataset(options))
