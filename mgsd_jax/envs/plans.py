r"""Reads the plan in an answer by the standard rules: one notation, nothing skipped or read twice.

A text is words and letters (`Right, Down`, `RRD`), or digits 0..3 alone (gymnasium's order), or
arrows alone. Separators mean nothing: white space, punctuation, brackets, quotes, markdown marks,
`\boxed{}` and `\text{}`. Beside words, `→ ⇒ ➜` only separate (`Right → Down`), and numbers that
count the items from the first one on (`1.`, `1)`, `Step 1:`) are skipped. Anything else is refused:
a digit or an arrow read as a move beside words would make another plan of a right one, and so would
the coordinates of cells, with brackets or without.

Each env has its own actions: `notation` puts their spellings beside the words for moves.
"""

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

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


class Notation(NamedTuple):
    """What stands for the actions of an env, each upper-case text -> action."""

    words: Mapping[str, str]
    letters: Mapping[str, str]  # those of one letter, which also stand in a run (`RRD`)
    digits: Mapping[str, str]
    arrows: Mapping[str, str]


def notation(actions: Mapping[str, str], words: Mapping[str, str]) -> Notation:
    """How plans of these actions (action -> spelling) are written, with more words for them.

    Moves have their usual words, digits and arrows too. A task that spells its actions as digits
    has no others.

    >>> notation({'left': 'L', 'wait': 'w'}, {}).letters
    {'L': 'left', 'W': 'wait'}
    """

    def has(signs: Mapping[str, str]) -> dict[str, str]:
        return {sign: action for sign, action in signs.items() if action in actions}

    own = {spelling.upper(): action for action, spelling in actions.items()}
    short = {spelling: action for spelling, action in own.items() if len(spelling) == 1}
    return Notation(
        {**has(MOVES), **own, **{word.upper(): action for word, action in words.items()}},
        has(_LETTERS) | {sign: action for sign, action in short.items() if sign.isalpha()},
        {sign: action for sign, action in short.items() if sign.isdecimal()} or has(_DIGITS),
        has(_ARROWS),
    )


def read_plan(text: str, known: Notation) -> tuple[Plan, str | None]:
    r"""The plan that a text states and None, or () and the first thing that is no part of a plan.

    >>> known = notation({'right': 'R', 'down': 'D'}, {})
    >>> read_plan('1. Right\n2. **Down**', known)
    (('right', 'down'), None)
    >>> read_plan('Right (0,1) Down', known)
    ((), '(0,1)')
    """
    found = ((match.lastgroup or "", match[0]) for match in _TOKEN.finditer(text))
    tokens = [token for token in found if token[0] != "mark"]
    kinds = {kind for kind, _ in tokens}
    if "word" in kinds:
        return _read_words([token for token in tokens if token[0] != "link"], known)
    bare = None if "cell" in kinds else _BARE_CELLS.match(text)
    if bare:
        return (), bare[1]
    has_digits = kinds & {"number", "cell", "digits"}
    return _read_signs(tokens, known.digits if has_digits else known.arrows)


def _read_words(tokens: Sequence[_Token], known: Notation) -> tuple[Plan, str | None]:
    plan: list[str] = []
    items = 0
    for place, (kind, token) in enumerate(tokens):
        if kind == "word":
            actions = _read_word(token, known)
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


def _read_word(token: str, known: Notation) -> Plan:
    """The actions of a word or of a run of letters, () where it is neither on this task."""
    word = " ".join(token.upper().split())
    if word in known.words:
        return (known.words[word],)
    is_run = set(word) <= known.letters.keys()
    return tuple(known.letters[letter] for letter in word) if is_run else ()


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
