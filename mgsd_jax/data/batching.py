"""Unpadded sequences to host batches of static shape: padding, masks, targets.

Axes: B batch, M pictures a row, P patches a picture, C patch channels, Q = P / merge^2 merged
tokens a picture, T tokens, R response tokens. Sequences are padded here alone, and never cut.
"""

from collections.abc import Sequence
from typing import Literal, NamedTuple, TypeVar

import numpy as np

from mgsd_jax.data.batch import Inputs, Pictures
from mgsd_jax.data.positions import place_positions
from mgsd_jax.data.processor import Encoded

Side = Literal["left", "right"]
Row = TypeVar("Row")


class GroundingBatch(NamedTuple):
    """Prompts with their answers, for next-token training."""

    inputs: Inputs  # right-padded
    targets: np.ndarray  # [B, T] int32, the next token; pad_id after the last one
    loss_mask: np.ndarray  # [B, T] float32, 1 where the target is of the answer, end included


class References(NamedTuple):
    """Right responses for some rows of a batch, padded to R tokens."""

    tokens: np.ndarray  # [B, R] int32
    mask: np.ndarray  # [B, R] bool, True up to the end token; all False in a row without one


NO_TOKEN = -1  # equal to no token


class PromptBatch(NamedTuple):
    """Prompts of the student and of the teacher about the same states, row by row."""

    student: Inputs  # left-padded
    teacher: Inputs  # left-padded
    row_ids: np.ndarray  # [B] int32, the row's number in the batch of all processes
    references: References | None = None  # responses that stand in for the student's own
    draft: np.ndarray | None = None  # [B, R] int32 guesses of the student's own; NO_TOKEN: none
    other: Inputs | None = None  # what the teacher reads of another board of the same level
    slots: np.ndarray | None = None  # [B] int32 where a row's rollout is kept for replay


def bucket(n: int, buckets: Sequence[int], *, name: str = "length") -> int:
    """The smallest of `buckets` that holds n. Raises ValueError where none does."""
    fitting = [size for size in buckets if size >= n]
    if not fitting:
        raise ValueError(
            f"{name}: got {n}, want at most {max(buckets, default=0)}, the largest bucket; "
            f"add a bucket of {n} or more: nothing is cut off to fit"
        )
    return min(fitting)


def token_bucket(rows: Sequence[Encoded], lengths: Sequence[int], *, name: str) -> int:
    """T: the smallest of `lengths` that holds every row. Raises ValueError where none does."""
    longest = max((len(row.tokens) for row in rows), default=0)
    return bucket(longest, lengths, name=f"tokens of {name}")


def patch_bucket(rows: Sequence[Encoded], buckets: Sequence[int]) -> int:
    """P: the smallest of `buckets` that holds every picture. Raises ValueError where none does."""
    largest = max((len(picture.patches) for row in rows for picture in row.pictures), default=0)
    return bucket(largest, buckets, name="patches of a picture")


def pad_rows(rows: Sequence[Row], n: int) -> list[Row]:
    """The rows, the last one repeated up to n: pad_rows([a, b], 4) is [a, b, b, b]."""
    if not 0 < len(rows) <= n:
        raise ValueError(f"rows: got {len(rows)}, want 1 to {n}")
    return [*rows, *[rows[-1]] * (n - len(rows))]


def to_inputs(
    rows: Sequence[Encoded],
    *,
    length: int,
    side: Side,
    pad_id: int,
    patch_buckets: Sequence[int],
    max_pictures: int,
    patch_channels: int | None = None,
) -> Inputs:
    """Sequences padded to T = `length` on one side, and their pictures to M = `max_pictures` a row.

    P is the smallest of `patch_buckets` that holds the largest picture. Rows with fewer pictures
    get zeros. A batch without pictures has `pictures=None`; where `patch_channels` (C) is given and
    `max_pictures` is not 0 it has zeros instead, so that batches with and without pictures have one
    shape. Positions are 0 at padding. Raises ValueError for a row or a picture that does not fit.
    """
    tokens = np.full((len(rows), length), pad_id, np.int32)
    positions = np.zeros((3, len(rows), length), np.int32)
    valid = np.zeros((len(rows), length), bool)
    next_position = np.empty(len(rows), np.int32)
    offsets = np.empty(len(rows), np.int64)  # of each row's first token
    for b, row in enumerate(rows):
        size = len(row.tokens)
        if size > length:
            raise ValueError(
                f"row {b}: got {size} tokens, want at most {length}; "
                "raise the length: nothing is cut off to fit"
            )
        offsets[b] = length - size if side == "left" else 0
        span = slice(offsets[b], offsets[b] + size)
        tokens[b, span] = row.tokens
        valid[b, span] = True
        positions[:, b, span], next_position[b] = _positions(row)
    pictures = _stack_pictures(rows, offsets, length, patch_buckets, max_pictures, patch_channels)
    return Inputs(tokens, positions, valid, next_position, pictures)


def smallest_inputs(rows: Sequence[Encoded], pad_id: int) -> Inputs:
    """Left-padded rows, each of one picture or none, of no fixed shape: as small as holds them."""
    return to_inputs(
        rows,
        length=max(len(row.tokens) for row in rows),
        side="left",
        pad_id=pad_id,
        patch_buckets=(max(len(picture.patches) for row in rows for picture in row.pictures),),
        max_pictures=1,
    )


def grounding_batch(
    examples: Sequence[tuple[Encoded, int]],
    *,
    length: int,
    pad_id: int,
    patch_buckets: Sequence[int],
    max_pictures: int,
    patch_channels: int | None = None,
) -> GroundingBatch:
    """Examples (sequence, length of its prompt), as `encode_example` makes them, right-padded.

    Pictures are as in `to_inputs`. Targets are shifted by one: a prompt of 3 tokens and an answer
    of 2, padded to 6, has loss_mask 0 0 1 1 0 0.
    """
    inputs = to_inputs(
        [row for row, _ in examples],
        length=length,
        side="right",
        pad_id=pad_id,
        patch_buckets=patch_buckets,
        max_pictures=max_pictures,
        patch_channels=patch_channels,
    )
    targets = np.full_like(inputs.tokens, pad_id)
    targets[:, :-1] = inputs.tokens[:, 1:]
    loss_mask = np.zeros(targets.shape, np.float32)
    for b, (row, prompt_length) in enumerate(examples):
        if not 0 < prompt_length < len(row.tokens):
            raise ValueError(
                f"row {b}: prompt length: got {prompt_length}, want 1 to {len(row.tokens) - 1}"
            )
        loss_mask[b, prompt_length - 1 : len(row.tokens) - 1] = 1
    return GroundingBatch(inputs, targets, loss_mask)


def prompt_batch(
    student: Sequence[Encoded],
    teacher: Sequence[Encoded],
    *,
    student_length: int,
    teacher_length: int,
    pad_id: int,
    patch_buckets: Sequence[int],
    max_pictures: int,
    first_row: int = 0,
) -> PromptBatch:
    """Left-padded student and teacher prompts of the same states, row by row.

    Row ids count up from `first_row`: they are unique over the batches of all processes where each
    process starts after the rows of those before it.
    """
    if len(student) != len(teacher):
        raise ValueError(
            f"rows: got {len(student)} student and {len(teacher)} teacher prompts, want as many"
        )
    asked = to_inputs(
        student,
        length=student_length,
        side="left",
        pad_id=pad_id,
        patch_buckets=patch_buckets,
        max_pictures=max_pictures,
    )
    taught = text_inputs(teacher, length=teacher_length, pad_id=pad_id)
    row_ids = np.arange(first_row, first_row + len(student), dtype=np.int32)
    return PromptBatch(asked, taught, row_ids)


def text_inputs(rows: Sequence[Encoded], *, length: int, pad_id: int) -> Inputs:
    """Left-padded prompts without pictures."""
    return to_inputs(
        rows, length=length, side="left", pad_id=pad_id, patch_buckets=(), max_pictures=0
    )


def references(
    responses: Sequence[Sequence[int] | np.ndarray | None], *, length: int, pad_id: int
) -> References:
    """Responses [<= R] padded on the right to R = `length`; None leaves its row without one.

    Raises ValueError for a response that is longer.
    """
    tokens = np.full((len(responses), length), pad_id, np.int32)
    mask = np.zeros((len(responses), length), bool)
    for b, response in enumerate(responses):
        if response is None:
            continue
        if len(response) > length:
            raise ValueError(
                f"row {b}: got a reference response of {len(response)} tokens, want at most "
                f"{length} (distillation.sampling.max_new_tokens)"
            )
        tokens[b, : len(response)] = response
        mask[b, : len(response)] = True
    return References(tokens, mask)


def pad_drafts(responses: Sequence[np.ndarray], length: int) -> np.ndarray:
    """Guesses of responses, cut or padded to R = `length` with NO_TOKEN: [B, R] int32."""
    drafts = np.full((len(responses), length), NO_TOKEN, np.int32)
    for draft, response in zip(drafts, responses, strict=True):
        draft[: len(response)] = response[:length]
    return drafts


def _positions(row: Encoded) -> tuple[np.ndarray, int]:
    if not row.pictures:
        return np.arange(len(row.tokens), dtype=np.int32), len(row.tokens)
    starts = [picture.start for picture in row.pictures]
    grids = [picture.grid for picture in row.pictures]
    return place_positions(len(row.tokens), starts, grids, row.pictures[0].merge_size)


def _stack_pictures(
    rows: Sequence[Encoded],
    offsets: np.ndarray,
    length: int,
    patch_buckets: Sequence[int],
    max_pictures: int,
    patch_channels: int | None,
) -> Pictures | None:
    """Pictures [B, M, P, ...] and slots [B, T] of a batch; None, or zeros, where it has none."""
    every = [picture for row in rows for picture in row.pictures]
    most = max((len(row.pictures) for row in rows), default=0)
    if most > max_pictures:
        raise ValueError(f"pictures a row: got {most}, want at most {max_pictures}; raise it")
    channels = every[0].patches.shape[1] if every else patch_channels
    if not max_pictures or channels is None:
        return None
    size = patch_bucket(rows, patch_buckets)
    shape = (len(rows), max_pictures, size)
    pictures = Pictures(
        patches=np.zeros((*shape, channels), np.float32),
        valid=np.zeros(shape, bool),
        interp_index=np.zeros((*shape, 4), np.int32),
        interp_weight=np.zeros((*shape, 4), np.float32),
        coords=np.zeros((*shape, 2), np.int32),
        slots=np.full((len(rows), length), -1, np.int32),
    )
    for b, row in enumerate(rows):
        for m, picture in enumerate(row.pictures):
            count, unit = len(picture.patches), picture.merge_size**2
            if size % unit:
                raise ValueError(f"patch bucket: got {size}, want a multiple of merge^2 = {unit}")
            pictures.patches[b, m, :count] = picture.patches
            pictures.valid[b, m, :count] = True
            pictures.interp_index[b, m, :count] = picture.where.index
            pictures.interp_weight[b, m, :count] = picture.where.weight
            pictures.coords[b, m, :count] = picture.where.coords
            merged, start = count // unit, offsets[b] + picture.start
            first = m * (size // unit)
            pictures.slots[b, start : start + merged] = np.arange(first, first + merged)
    return pictures
