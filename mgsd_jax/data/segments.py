"""Response tokens as text, and the part of a response that each belongs to.

Axes: B batch, R response tokens.
"""

import numpy as np

from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.processor import Processor, decode, spell


def decode_rows(processor: Processor, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each response [B, R], up to and without its end token."""
    return [decode(processor, row[m > 0]) for row, m in zip(tokens, mask, strict=True)]


def segments(processor: Processor, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The index in `prompts.SEGMENTS` of every response token [B, R], -1 where not valid.

    A token belongs to the most telling part that it touches. An end token has no text of its own:
    it is format wherever it stands.
    """
    groups = np.full(tokens.shape, -1, np.int32)
    empty = len(prompts_lib.SEGMENTS) - 1
    rows = [row[: int(length)] for row, length in zip(tokens, valid.sum(1), strict=True)]
    for b, (text, spans) in enumerate(spell(processor, rows)):
        parts = prompts_lib.character_segments(text)
        groups[b, : len(spans)] = [min(parts[s:e], default=empty) for s, e in spans]
    return groups
