"""Reads sizes, cells and directions out of free text, in one pass whatever the text.

The spelling does not matter: `4x4`, `4 × 4` and `**4 by 4**` are the same size, `(3,0)` and
`[ 3, 0 ]` the same cell. An item that the text denies ("not up") does not count as said.
"""

import re
from collections.abc import Callable, Hashable, Sequence

from mgsd_jax.envs.base import Cell

_WIDE = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}  # full-width forms of ASCII
_SIGNS = {
    **{ord(sign): "x" for sign in "×✕✖⨯"},
    **{ord(sign): "-" for sign in "‐‑‒–—−•·‣▪◦●○"},
    **{ord(sign): "->" for sign in "→⇒➜"},
    **{ord(sign): " " for sign in "\t\u00a0\u2002\u2003\u2009\u202f\u3000"},
    **{ord(sign): None for sign in "\u200b\u200c\u200d\ufe0f\ufeff\"'“”‘’"},
    **{ord(sign): "✗" for sign in "✗✘❌"},
    ord("、"): ",",
    ord("。"): ".",
    ord("\r"): "\n",
}
# In this order. None of them can try one place in two ways, so each takes one pass. Groups have no
# possessive quantifier here or in plans.py and facts.py: Python before 3.11.5 matches those wrongly
# (https://github.com/python/cpython/issues/106052).
_MARKS = (
    (re.compile(r"<br ?/?>"), "\n"),
    (re.compile(r"\\(?:times|cdot)(?![a-z])"), "x"),
    (re.compile(r"\\[a-z]*+"), ""),
    (re.compile(r"\{ ?\}"), "[]"),
    (re.compile(r"(?<=[0-9]) ?\* ?(?=[0-9])"), "x"),
    (re.compile(r"[*`~#${}]"), ""),
    (re.compile(r"(?<=[a-z])-(?=[a-z])|[_ ]+"), " "),
    (
        re.compile(
            r"\(?row[ =:]{0,3}([0-9]++)[ ,;]{0,3}(?:and )?col(?:umn)?[ =:]{0,3}([0-9]++)\)?"
        ),
        r"(\1,\2)",
    ),
)
_SIZE = (
    r"(?<![0-9a-z.])([0-9]++)(?: rows?| cells| tiles)?[ -]?(?:x|by|and|,)[ -]?([0-9]++)"
    r"(?! ?x ?[0-9])"
)
CELL = r"[(\[] ?([0-9]++) ?, ?([0-9]++) ?[)\]]"
_BARE_CELL = re.compile(r"([0-9]++) ?, ?([0-9]++)")
_BARE_CELLS = re.compile(r"\A[ \n]*+(?:[0-9]{1,9}+ ?, ?[0-9]{1,9}+(?! ?,)[ ;\n]*+)+")
# Cells that a text begins with are all that it names: a sentence after them is about other things.
_LIST = re.compile(r"\A(?:[^a-z0-9]|(?<![a-z])(?:at|in)(?![a-z]))*")  # up to its first digit
_AFTER_LIST = re.compile(
    r"[.;!\n][ \n-]{0,8}+(?!(?:and|also|another|or|the other|cells?|holes?|tiles?|row)\b)[a-z]"
)
_WAY = (
    r"(?<!top )(?<!bottom )(?<!upper )(?<!lower )"
    r"\b(?:(up|down|left|right)(?:wards?)?|([udlr]{1,4}))\b"
    r"(?! corner| edge)"
)
_LETTERS = {"u": "up", "d": "down", "l": "left", "r": "right"}
_BLOCKED = r"\b(?:blocked|closed|walls?|walled|borders?|illegal|impossible|unavailable)\b"
_SIGNS_OF_SENSE = (
    r"|(?P<stop>[;.?!\n()]|\b(?:but|while|whereas|so|only|since|because|as)\b)"
    r"|(?P<comma>[,|])"
    r"|(?P<crossed>✗)"
    rf"|(?P<no>\b(?:not|no|never|without|neither|nor|cannot|cant|dont|isnt|arent)\b"
    rf"|{_BLOCKED}(?= ?[:=]))"
    rf"|(?P<blocked>{_BLOCKED})"
    r"|(?P<link>\b(?:is|are)\b|[:=])"
)
_SIZES = re.compile(rf"(?P<item>{_SIZE})" + _SIGNS_OF_SENSE)
_CELLS = re.compile(rf"(?P<item>{CELL})" + _SIGNS_OF_SENSE)
_WAYS = re.compile(rf"(?P<item>{_WAY})" + _SIGNS_OF_SENSE)
_NONE = re.compile(
    r"(?<!or )\bnone\b|\b(?:nothing|zero|nil|n/a|(?:arent|are not) any|not present)\b"
    r"|\bno\b(?= ?(?:[,.;)\n]|$)| (?:[a-z]{1,12} )?(?:holes?|cells?|moves?|directions?|sides?)\b)"
    r"|^[ .]*+(?:\[ ?\]|\( ?\)|-|0|∅|empty)[ .]*+$"
)


def plain(text: str) -> str:
    """`text` in lower case without marks of Markdown and LaTeX, full-width forms made ASCII.

    Superscripts and circled digits stay what they are: they are no digits of a number.
    """
    text = text.replace("\r\n", "\n").translate(_WIDE).translate(_SIGNS).lower()
    for pattern, written in _MARKS:
        text = pattern.sub(written, text)
    return text


def number(digits: str) -> int:
    """The value of ASCII digits; 10**9, which is on no board, stands for all longer ones."""
    return int(digits) if len(digits) < 10 else 10**9


def read_sizes(text: str) -> frozenset[tuple[int, int]] | None:
    """Every size (rows, columns) that a plain text names and does not deny, None without one."""
    return _said(text, _SIZES, _pair) or None


def read_cells(text: str) -> frozenset[Cell] | None:
    """The cells that a plain text names and does not deny; empty where it says none, else None."""
    bare = text.rpartition(":")[2]
    only = _BARE_CELLS.match(bare)
    if only and bare[only.end() :] in ("", ".", ". "):
        return frozenset((number(m[1]), number(m[2])) for m in _BARE_CELL.finditer(bare))
    lead = _LIST.match(text)
    is_list = lead is not None and text[lead.end() : lead.end() + 1] in tuple("0123456789")
    end = _AFTER_LIST.search(text) if is_list else None
    text = text[: end.start()] if end else text
    return _said(text, _CELLS, _pair)


def read_directions(text: str) -> frozenset[str] | None:
    """The directions that a plain text names, in words or letters; otherwise as `read_cells`.

    >>> sorted(read_directions("right and down are open, up is not"))
    ['down', 'right']
    """
    return _said(text, _WAYS, lambda m: [m[2]] if m[2] else [_LETTERS[c] for c in m[3]])


def _pair(match: re.Match[str]) -> list[tuple[int, int]]:
    return [(number(match[2]), number(match[3]))]


def _said(
    text: str, pattern: re.Pattern[str], items: Callable[[re.Match[str]], Sequence[Hashable]]
) -> frozenset | None:
    """The items that are named and not denied.

    The text is cut into pieces at every stop, and at a comma where the items before it already have
    their verb ("up is blocked, ..."). A word that denies counts for its whole piece; where it
    follows items directly ("right, not up"), it begins a new piece. A cross denies the item before
    it alone.
    """
    kept: set[Hashable] = set()
    piece: list[Hashable] = []
    is_denied = is_settled = False
    for match in pattern.finditer(text):
        kind = match.lastgroup
        if kind == "item":
            piece += items(match)
        elif kind == "crossed" and piece:
            piece.pop()
        elif kind == "link":
            is_settled = bool(piece)
        elif kind == "blocked":
            is_denied, is_settled = True, bool(piece)
        elif kind in ("no", "crossed") and (is_settled or not piece):
            is_denied = True
        elif kind != "comma" or is_settled:
            if not is_denied:
                kept.update(piece)
            piece.clear()
            is_denied, is_settled = kind == "no", False
    if not is_denied:
        kept.update(piece)
    return frozenset(kept) if kept or _NONE.search(text) else None
