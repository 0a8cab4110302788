r"""Reads the plan in an answer by the standard rules: one notation, nothing skipped or read twice.

A text is words and letters (`Right, Down`, `RRD`), or digits 0..3 alone (gymnasium's order), or
arrows alone. Separators mean nothing: white space, punctuation, brackets, quotes, markdown marks,
`\boxed{}` and `\text{}`. Beside words, `→ ⇒ ➜` only separate (`Right → Down`), and numbers that
count the items from the first one on (`1.`, `1)`, `Step 1:`) are skipped. Anything else is refused:
a digit or an arrow read as a move beside words would make another plan of a right one, and so would
the coordinates of cells, with brackets or without.
"""

import re
from collections.abc import Mapping, Sequence

from mgsd_jax.envs.search import Plan

_LETTERS = {"L": "left", "R": "right", "U": "up", "D": "down"}
_DIGITS = {"0": "left", "1": "down", "2": "right", "3": "up"}  # gymnasium's order
_ARROWS = {"←": "left", "↓": "down", "→": "right", "↑": "up"}
_WORDS = {word.upper(): word for word in _LETTERS.values()}
_WARDS = {word + ending: move for word, move in _WORDS.items() for ending in ("WARD", "WARDS")}
MOVES = {**_LETTERS, **_DIGITS, **_ARROWS, **_WORDS, **_WARDS}  # upper-case word -> action

_SEPARATORS = r"\s,;|/.>\-_+()\[\]{}'\"`‘’“”*#，、。．；"
_SEPARATOR = re.compile(f"[{_SEPARATORS}]")
# Whatever is no separator is one of these, the first that fits. No alternative can match a text in
# two ways, so the time is linear in the text.
_TOKEN = re.compile(
    r"(?P<mark>\\(?:boxed|text)(?=\s*\{)|```(?:text|plaintext|txt|markdown|json|python)(?!\S))"
    r"|(?<![A-Za-z0-9])(?P<number>(?:(?i:step)[ \t]*)?[0-9]+[*_ \t]*[.):])"
    r"|(?P<word>(?:(?i:PICK)(?:[_-]|[ \t]+)(?i:UP)|(?i:PUT)(?:[_-]|[ \t]+)(?i:DOWN))(?![A-Za-z])"
    r"|[A-Za-z]+)"
    r"|(?P<cell>[(\[{]\s*[0-9]+\s*,\s*[0-9]+\s*[)\]}])"
    r"|(?P<digits>[0-9]+)"
    r"|(?P<link>[→⇒➜])"
    rf"|(?P<other>[←↓↑]|[^{_SEPARATORS}A-Za-z0-9←↓→↑⇒➜]+)"
)
# Pairs of numbers with something else than commas between them are cells without their brackets.
_BARE_CELLS = re.compile(
    r"\A[^0-9]*+([0-9]++[ \t]*+[,，][ \t]*+[0-9]++)"
    r"(?:[^0-9,，]++[0-9]++[ \t]*+[,，][ \t]*+[0-9]++)+[^0-9,，]*+\Z"
)
_Token = tuple[str, str]  # kind, text


def read_plan(text: str, words: Mapping[str, str]) -> tuple[Plan, str | None]:
    r"""The plan that a text states and None, or () and the first thing that is no part of a plan.

    `words`: what the task has besides moves, upper-case word -> action.

    >>> read_plan('1. Right\n2. **Down**', {})
    (('right', 'down'), None)
    >>> read_plan('Right (0,1) Down', {})
    ((), '(0,1)')
    """
    found = ((match.lastgroup or "", match[0]) for match in _TOKEN.finditer(text))
    tokens = [token for token in found if token[0] != "mark"]
    kinds = {kind for kind, _ in tokens}
    if "word" in kinds:
        return _read_words([token for token in tokens if token[0] != "link"], {**MOVES, **words})
    bare = None if "cell" in kinds else _BARE_CELLS.match(text)
    if bare:
        return (), bare[1]
    return _read_signs(tokens, _DIGITS if kinds & {"number", "cell", "digits"} else _ARROWS)


def _read_words(tokens: Sequence[_Token], words: Mapping[str, str]) -> tuple[Plan, str | None]:
    plan: list[str] = []
    items = 0
    for place, (kind, token) in enumerate(tokens):
        if kind == "word":
            actions = _read_word(token, words)
            if not actions:
                return (), token
            plan += actions
            continue
        # An item without a word would hide that its number is something else, such as a count.
        is_item = (
            kind == "number"
            and re.sub(r"[^0-9]", "", token) == f"{items + 1}"
            and (items > 0 or place == 0)
            and [kind for kind, _ in tokens[place + 1 : place + 2]] == ["word"]
        )
        if not is_item:
            return (), token
        items += 1
    return tuple(plan), None


def _read_word(token: str, words: Mapping[str, str]) -> Plan:
    """The actions of a word or of a run of letters, () where it is neither on this task."""
    word = " ".join(token.upper().split())
    if word in words:
        return (words[word],)
    return tuple(_LETTERS[letter] for letter in word) if set(word) <= _LETTERS.keys() else ()


def _read_signs(tokens: Sequence[_Token], moves: Mapping[str, str]) -> tuple[Plan, str | None]:
    """The plan of digits alone, or of arrows alone."""
    plan: list[str] = []
    for kind, token in tokens:
        signs = _SEPARATOR.sub("", token)
        # A list of two digits is a plan where nothing else is there.
        is_cell = kind == "cell" and (len(tokens) > 1 or token[0] != "[")
        if is_cell or not set(signs) <= moves.keys():
            return (), token
        plan += (moves[sign] for sign in signs)
    return tuple(plan), None
