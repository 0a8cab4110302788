"""Response tokens as text, and the part of a response that each belongs to.

Axes: B batch, R response tokens.
"""

import codecs
from collections.abc import Sequence

import numpy as np

from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.processor import Processor

Span = tuple[int, int]  # first character, end


def decode(processor: Processor, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of tokens, without special ones; ids beyond the tokenizer's own are left out."""
    return processor.tokenizer.backend_tokenizer.decode(
        np.asarray(tokens).tolist(), skip_special_tokens=True
    )


def spell(processor: Processor, rows: Sequence[np.ndarray]) -> list[tuple[str, list[Span]]]:
    """(text, [(first character, end) of each token]) of each row of tokens.

    The text is that of `decode`. A token that holds a part of a character's bytes touches that
    character; special tokens and ids beyond the tokenizer's own touch none. Tokens are looked up
    once, however many rows they are in, and each row is read in one pass.
    """
    backend = processor.tokenizer.backend_tokenizer
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    pieces: dict[int, bytes] = {}
    for token in {int(token) for row in rows for token in row}:
        text = None if token in special else backend.id_to_token(token)
        pieces[token] = b"" if text is None else _token_bytes(text)
    return [_join([pieces[int(token)] for token in row]) for row in rows]


def _join(pieces: Sequence[bytes]) -> tuple[str, list[Span]]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    spans: list[Span] = []
    done = 0  # number of complete characters so far
    for piece in pieces:
        start = done
        texts.append(decoder.decode(piece))
        done += len(texts[-1])
        begins_another = bool(piece) and bool(decoder.getstate()[0])
        spans.append((start, done + begins_another))
    texts.append(decoder.decode(b"", final=True))
    return "".join(texts), spans


def _byte_letters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary; printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_letters()


def _token_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry; an added token with other characters is its own text."""
    if all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return token.encode()


def decode_rows(processor: Processor, tokens: np.ndarray, mask: np.ndarray) -> list[str]:
    """The text of each response [B, R], up to and without its end token."""
    return [decode(processor, row[m > 0]) for row, m in zip(tokens, mask, strict=True)]


def segments(processor: Processor, tokens: np.ndarray, valid: np.ndarray) -> np.ndarray:
    """The index in `prompts.SEGMENTS` of every response token [B, R], -1 where not valid.

    A token that touches several parts belongs to the first of them in SEGMENTS. An end token has no
    text: it counts as format.
    """
    groups = np.full(tokens.shape, -1, np.int32)
    empty = len(prompts_lib.SEGMENTS) - 1
    rows = [row[: int(length)] for row, length in zip(tokens, valid.sum(1), strict=True)]
    for b, (text, spans) in enumerate(spell(processor, rows)):
        parts = prompts_lib.character_segments(text)
        groups[b, : len(spans)] = [min(parts[s:e], default=empty) for s, e in spans]
    return groups
