"""Rotary position embedding (RoPE): interleaved M-RoPE for text, 2-D RoPE for the vision tower.

Axes: B batch, T tokens, P patches, H head width. Angles are float32 throughout.
"""

import jax
import jax.numpy as jnp
import numpy as np

Tables = tuple[jax.Array, jax.Array]  # cos and sin


def mrope_angles(
    positions: jax.Array,  # [3, B, T] int32: temporal, height, width
    *,
    head_dim: int,
    theta: float,
    section: tuple[int, int, int],
) -> jax.Array:
    """Angles [B, T, 1, H] of Qwen3-VL's interleaved M-RoPE.

    Frequency i turns with the height where i % 3 == 1 and i < 3 * section[1], with the width where
    i % 3 == 2 and i < 3 * section[2], with time otherwise (HF Qwen3VLTextRotaryEmbedding). With
    H = 16 and section (4, 2, 2) the eight frequencies turn with T H W T H W T T. A text token has
    three equal positions, and so turns as in plain RoPE.
    """
    frequency = np.arange(head_dim // 2)
    height = (frequency % 3 == 1) & (frequency < 3 * section[1])
    width = (frequency % 3 == 2) & (frequency < 3 * section[2])
    t, h, w = (axis[..., None] for axis in positions.astype(jnp.float32))
    turns = jnp.where(height, h, jnp.where(width, w, t))
    return _both_halves(turns * _inverse_frequencies(head_dim, theta))


def vision_angles(coords: jax.Array, *, head_dim: int, theta: float) -> jax.Array:
    """Angles [B, P, 1, H] of 2-D RoPE for `coords` [B, P, 2] (row, column).

    The first quarter of the head turns with the row, the second with the column; the other half
    has the same angles.
    """
    inverse = _inverse_frequencies(head_dim // 2, theta)
    angles = coords.astype(jnp.float32)[..., None] * inverse  # [B, P, 2, H / 4]
    return _both_halves(angles.reshape(*coords.shape[:-1], head_dim // 2))


def turn(angles: jax.Array, dtype: jnp.dtype) -> Tables:
    """cos and sin of the angles, computed in float32 and cast to `dtype`, as in HF."""
    return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)


def rotate(x: jax.Array, tables: Tables) -> jax.Array:
    """`x` [B, T, heads, H] turned by its tables, in the wider of the two dtypes."""
    half = x.shape[-1] // 2
    cos, sin = (table[..., :half] for table in tables)  # their halves are the same
    first, second = x[..., :half], x[..., half:]
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _inverse_frequencies(width: int, theta: float) -> np.ndarray:
    exponent = np.arange(0, width, 2, dtype=np.float32) / np.float32(width)
    return (1.0 / np.float32(theta) ** exponent).astype(np.float32)


def _both_halves(angles: jax.Array) -> jax.Array:
    """Angles [..., H / 2] for both halves of a head, the same for all heads: [..., 1, H]."""
    return jnp.concatenate([angles, angles], axis=-1)[..., None, :]
