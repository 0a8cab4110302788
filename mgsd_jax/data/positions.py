"""Positions of tokens and patches: M-RoPE, table interpolation, 2-D RoPE coordinates.

Axes: T tokens, P patches. A grid is (frames, rows, columns) in patches; a picture has one frame.
Patches come in merge-block order: the merge^2 patches of one merged token are adjacent, blocks and
patches inside a block run row by row. Results are cached per grid and read-only, as grids repeat.

Source of the numbers: transformers `Qwen3VLModel.get_rope_index` and `vision_utils`
(`get_vision_position_ids`, `get_vision_interpolation_indices_and_weights`, aligned corners).
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

Grid = tuple[int, int, int]


class Interpolation(NamedTuple):
    """How the patches of a picture read the learned position table, and their coordinates."""

    index: np.ndarray  # [P, 4] int32, rows of the table (top-left, top-right, bottom-left, -right)
    weight: np.ndarray  # [P, 4] float32, bilinear weights, each row sums to 1
    coords: np.ndarray  # [P, 2] int32, (row, column) of the patch


def token_count(grid: Grid, merge_size: int) -> int:
    """The number of merged tokens that a picture of this grid takes in the sequence."""
    frames, rows, columns = grid
    return frames * (rows // merge_size) * (columns // merge_size)


def place_positions(
    length: int, starts: Sequence[int], grids: Sequence[Grid], merge_size: int
) -> tuple[np.ndarray, int]:
    """M-RoPE positions [3, T] int32 of an unpadded sequence, and the position after it.

    The sequence has T = `length` tokens; `starts` are the indices of the pictures' first tokens.
    Text advances all three axes by one. A picture keeps its temporal position and counts merged
    rows and columns from where it starts; what follows starts after its longer side:
    text, a 2x3 picture, text -> temporal 0 1111111 4, height 0 111222 4, width 0 123123 4.
    """
    positions = np.empty((3, length), np.int32)
    done, position = 0, 0  # tokens written; position of the next one
    for start, grid in zip(starts, grids, strict=True):
        positions[:, done:start] = np.arange(position, position + start - done, dtype=np.int32)
        position += start - done
        offsets = _picture_offsets(grid, merge_size)
        done = start + offsets.shape[1]
        np.add(offsets, position, out=positions[:, start:done])
        position += max(grid[1], grid[2]) // merge_size
    positions[:, done:] = np.arange(position, position + length - done, dtype=np.int32)
    return positions, position + length - done


@functools.lru_cache(maxsize=1024)
def _picture_offsets(grid: Grid, merge_size: int) -> np.ndarray:
    """[3, merged tokens] int32: (frame, merged row, merged column), row by row."""
    frames, rows, columns = grid
    shape = (frames, rows // merge_size, columns // merge_size)
    return _frozen(np.indices(shape, dtype=np.int32).reshape(3, -1))


@functools.lru_cache(maxsize=1024)
def interpolation(grid: Grid, *, merge_size: int, table_side: int) -> Interpolation:
    """Position-table rows, weights and coordinates of a picture's patches, in merge-block order.

    The table is `table_side` x `table_side`, row-major; its corners and the picture's coincide.
    Raises ValueError if the grid's rows or columns are no multiple of `merge_size`.
    """
    frames, rows, columns = grid
    if rows % merge_size or columns % merge_size or min(grid) < 1:
        raise ValueError(f"grid: got {grid}, want sides of a multiple of merge_size {merge_size}")
    blocks = (rows // merge_size, merge_size, columns // merge_size, merge_size)
    row, column = (
        axis.reshape(blocks).transpose(0, 2, 1, 3).reshape(-1)
        for axis in np.indices((rows, columns), dtype=np.int32)
    )
    top, bottom, row_weight = _taps(row, rows, table_side)
    left, right, column_weight = _taps(column, columns, table_side)
    lines = np.stack([top, bottom], axis=-1) * table_side
    index = (lines[:, :, None] + np.stack([left, right], axis=-1)[:, None, :]).reshape(-1, 4)
    weight = (row_weight[:, :, None] * column_weight[:, None, :]).reshape(-1, 4)
    coords = np.stack([row, column], axis=-1)
    return Interpolation(
        *(_frozen(np.tile(array, (frames, 1))) for array in (index, weight, coords))
    )


def _taps(at: np.ndarray, size: int, side: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The two table lines around each patch line `at` [P] of `size`, and their weights [P, 2]."""
    # float32 throughout, multiplied before divided: the same roundings as transformers'.
    source = at.astype(np.float32) * np.float32(side - 1) / np.float32(max(size - 1, 1))
    low = np.floor(source)
    near = 1 - (source - low)
    line = low.astype(np.int32)
    return line, np.minimum(line + 1, side - 1), np.stack([near, 1 - near], axis=-1)


def _frozen(array: np.ndarray) -> np.ndarray:
    array.flags.writeable = False
    return array
