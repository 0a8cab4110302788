"""Host batches as NamedTuples: pytrees that need no jax to be built.

Axes: B batch, M pictures a row, P patches a picture, C patch channels, Q = P / merge^2 merged
visual tokens a picture, T tokens.
"""

from typing import Any, NamedTuple

Array = Any  # np.ndarray on the host, jax.Array once on a device or under jit


class Pictures(NamedTuple):
    """The pictures of a batch, M a row, padded to one patch count."""

    patches: Array  # [B, M, P, C] float32, normalised pixels; a merged token's patches adjacent
    valid: Array  # [B, M, P] bool, False at padding
    interp_index: Array  # [B, M, P, 4] int32, rows of the learned position table
    interp_weight: Array  # [B, M, P, 4] float32, bilinear weights
    coords: Array  # [B, M, P, 2] int32, (row, column) of the patch for 2-D RoPE
    slots: Array  # [B, T] int32, merged feature (index into M * Q) at this token, -1 for text


class Inputs(NamedTuple):
    """What the model reads: tokens with their positions, and the pictures they point at."""

    tokens: Array  # [B, T] int32
    positions: Array  # [3, B, T] int32, M-RoPE (temporal, height, width)
    valid: Array  # [B, T] bool, False at padding
    next_position: Array  # [B] int32, M-RoPE position of the token after the last valid one
    pictures: Pictures | None  # None where no row has a picture
