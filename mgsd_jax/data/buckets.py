"""Buckets that fit by themselves: what `data.prompt_buckets=auto` and its like become.

Every level of `data.boards` is measured in the run's own prompts, tokenizer and pictures. Nothing
depends on the process, so all processes get the same.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Literal, TypedDict, TypeVar

import numpy as np
from absl import logging

from mgsd_jax.config import AUTO, Config
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.loaders import stream_boards
from mgsd_jax.data.processor import Encoded, encode

SAMPLE = 32  # boards of each level
MARGIN = 0.5  # of the difference of the longest and the shortest of a level, on top of the longest
STEP = 0.75  # a bucket is at most this share of the next larger one: each is a program of its own
AnyEncoder = TypeVar("AnyEncoder", bound=Encoder)
Field = Literal["prompt_buckets", "teacher_buckets", "sequence_buckets", "patch_buckets"]


class Fitted(TypedDict, total=False):
    """Fields of the data section that were 'auto', with what they became."""

    prompt_buckets: tuple[int, ...]
    teacher_buckets: tuple[int, ...]
    sequence_buckets: tuple[int, ...]
    patch_buckets: tuple[int, ...]


def fitted(
    encoder: AnyEncoder, config: Config, boards: Sequence[Board] | None = None
) -> AnyEncoder:
    """The encoder with numbers in place of every 'auto' of its data section.

    Without `boards` it is for training: boards of the config's levels are drawn, and what they need
    gets a MARGIN. With them it asks about these boards alone, and what they need is exact.
    """
    needed = TRAINING if boards is None else ASKING
    became: Fitted = {}
    for name in (name for name in needed if getattr(encoder.data, name) == AUTO):
        needs: list[int] = []
        for group in _drawn(config) if boards is None else [boards]:
            kinds = zip(*(needed[name](encoder, config, board) for board in group), strict=True)
            for lengths in kinds:
                needs += [with_margin(lengths)] if boards is None else lengths
        if name != "patch_buckets":
            needs = [rounded(need) for need in needs]
        became[name] = found = spread(needs)
        logging.info("data.%s=auto is %s here", name, found)
    return dataclasses.replace(encoder, data=dataclasses.replace(encoder.data, **became))


def with_margin(lengths: Sequence[int]) -> int:
    """The longest, and MARGIN of what lies between it and the shortest: 10 and 14 need 16."""
    return max(lengths) + math.ceil(MARGIN * (max(lengths) - min(lengths)))


def rounded(length: int) -> int:
    """Up to a multiple of 64, of short ones to one of 8: 45 becomes 48, 300 becomes 320."""
    unit = 64 if length > 128 else 8
    return -(-length // unit) * unit


def spread(needs: Iterable[int]) -> tuple[int, ...]:
    """The largest need, and smaller ones that save much: 320, 300, 200 become 200, 320."""
    chosen: list[int] = []
    for need in sorted(set(needs), reverse=True):
        if not chosen or need <= STEP * chosen[-1]:
            chosen.append(need)
    return tuple(sorted(chosen))


def _drawn(config: Config) -> Iterator[list[Board]]:
    levels = {(levels.task, level) for levels in config.data.boards for level in levels.levels}
    for level in sorted(levels):
        yield list(stream_boards([level], "train", seed=config.seed, count=SAMPLE))


# ---------------------------------------------------------------- what a board needs, by field


def _prompts(encoder: Encoder, config: Config, board: Board) -> list[int]:
    rows = [encoder.student(board)]
    if "perception" in config.evaluate.modes:
        rows.append(_questions(encoder, board))
    return [len(row.tokens) for row in rows]


def _teachers(encoder: Encoder, config: Config, board: Board) -> list[int]:
    context = config.distillation.teacher_context
    return [*_texts(encoder, config, board), len(encoder.teacher(board, context).tokens)]


def _texts(encoder: Encoder, config: Config, board: Board) -> list[int]:
    return [len(encoder.teacher(board, "state").tokens)]


def _sequences(encoder: Encoder, config: Config, board: Board) -> list[int]:
    kinds = {kind for kind, share in config.grounding.mixture if share > 0}
    if config.distillation.grounding_share:
        kinds.add("questions")
    rng = np.random.default_rng(config.seed)
    return [len(encoder.record(board, kind, rng)[0].tokens) for kind in sorted(kinds)]


def _patches(encoder: Encoder, config: Config, board: Board) -> list[int]:
    return [len(picture.patches) for picture in encoder.student(board).pictures]


def _questions(encoder: Encoder, board: Board) -> Encoded:
    picture = encoder.picture(board)
    messages, _ = prompts_lib.grounding(encoder.prompts, board.task, board.state, picture)
    return encode(encoder.processor, messages, add_generation_prompt=True)


Need = Callable[[Encoder, Config, Board], list[int]]
TRAINING: dict[Field, Need] = {
    "prompt_buckets": _prompts,
    "teacher_buckets": _teachers,
    "sequence_buckets": _sequences,
    "patch_buckets": _patches,
}
ASKING: dict[Field, Need] = {
    "prompt_buckets": _prompts,
    "teacher_buckets": _texts,
    "patch_buckets": _patches,
}
