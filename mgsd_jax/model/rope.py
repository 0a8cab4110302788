"""Rotary position tables: interleaved M-RoPE for text, 2-D RoPE for the vision tower.

Axes: B batch, T tokens, P patches, H head width. Angles are float32 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np

Tables = tuple[jax.Array, jax.Array]


def mrope_tables(
    positions: jax.Array,  # [3, B, T] int32: temporal, height, width
    *,
    head_dim: int,
    theta: float,
    section: tuple[int, int, int],
    dtype: jnp.dtype,
    kept: bool = False,
) -> Tables:
    """cos and sin [B, T, 1, H] of Qwen3-VL's interleaved M-RoPE, cast to `dtype` as in HF.

    Frequency i turns with the height where i % 3 == 1 and i < 3 * section[1], with the width where
    i % 3 == 2 and i < 3 * section[2], with time otherwise (HF Qwen3VLTextRotaryEmbedding).
    `kept` as in `_tables`.
    """
    frequency = np.arange(head_dim // 2)
    height = (frequency % 3 == 1) & (frequency < 3 * section[1])
    width = (frequency % 3 == 2) & (frequency < 3 * section[2])
    t, h, w = (axis[..., None] for axis in positions.astype(jnp.float32))
    turns = jnp.where(height, h, jnp.where(width, w, t))
    return _tables(turns * _inverse_frequencies(head_dim, theta), dtype, kept)


def vision_tables(coords: jax.Array, *, head_dim: int, theta: float, kept: bool = False) -> Tables:
    """cos and sin [B, P, 1, H] float32 of 2-D RoPE for `coords` [B, P, 2] (row, column)."""
    inverse = _inverse_frequencies(head_dim // 2, theta)
    angles = coords.astype(jnp.float32)[..., None] * inverse  # [B, P, 2, H / 4]
    angles = angles.reshape(*coords.shape[:-1], head_dim // 2)
    return _tables(angles, jnp.dtype(jnp.float32), kept)


def rotate(x: jax.Array, tables: Tables) -> jax.Array:
    """`x` [B, T, heads, H] turned by its tables, in the wider of the two dtypes."""
    half = x.shape[-1] // 2
    cos, sin = (table[..., :half] for table in tables)  # their halves are the same
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _inverse_frequencies(width: int, theta: float) -> np.ndarray:
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def _tables(angles: jax.Array, dtype: jnp.dtype, kept: bool) -> Tables:
    """`kept` makes the tables arrays in memory, to be read by many layers outside a scan.

    Else XLA's CPU compiler computes cosines again for every head of every layer; nothing is fused
    across the edge of a loop, which is why there is one.
    """
    angles = jnp.concatenate([angles, angles], axis=-1)[..., None, :]

    def turn(angles: jax.Array) -> Tables:
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    return jax.lax.map(turn, angles) if kept else turn(angles)
