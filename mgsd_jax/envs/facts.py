"""State facts read back out of a response, and the board that they describe.

A fact is stated after its label (those of `state_lines`), at the beginning of a line or after a
mark, in any spelling that `values.plain` makes the same: lists, Markdown, several facts a line.
Thoughts and answer blocks state nothing. This is how perception errors are told from planning
errors, and neither from a way of writing.
"""

import dataclasses
import itertools
import re
from collections.abc import Callable, Iterator
from typing import Any

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import Cell, Fact, show_cell
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState
from mgsd_jax.envs.responses import statements
from mgsd_jax.envs.values import CELL, number, plain, read_cells, read_directions, read_sizes

_WALLS = {"up": 1, "down": 2, "left": 4, "right": 8}  # the mask bit of each closed side
_LABELS: dict[str, tuple[str, ...]] = {
    "frozenlake": ("player", "goal", "hole"),
    "maze": ("player", "goal"),
    "minibehaviour": ("agent", "printer", "table"),
}
_FILLERS = re.compile(
    r"\b(?:the|a|is|are|at|positions?|locations?|cells?|coordinates?|tiles?|squares?|start|starting)"
    r"\b"
)
# A label of any statement, known or not: what it says ends where the next one begins.
_LABEL = (
    r"(?<![a-z])(?<![a-z] )(?!(?:up|down|left|right|none|x)\b|(?:at|cells?|position|tile) ?[(\[])"
    r"(?P<label>[a-z][a-z ]{0,40}?)(?: [0-9]{1,2})? ?(?:[(\[][^()\[\]]{0,40}[)\]])?"
    r" ?(?:[:=|]|-{1,3}>?(?= ?(?:[(\[]|[0-9]{1,9} ?x)))"
)
# The open sides of a cell. An arrow after a cell is a step of a route.
_OPEN = rf"{CELL} ?(?::|[=|-](?= ?(?:up|down|left|right|none)\b))"
_BEGINNINGS = {t: re.compile(f"{_OPEN}|{_LABEL}" if t == "maze" else _LABEL) for t in _LABELS}
_STEPS = re.compile(r"(?<!can )\b(?:move|moves|go|goes|step|then|take|walk|turn)\b")
_STEP_LINE = re.compile(r"\A[^a-z]*+step\b")
_ROUTE = re.compile(rf"{CELL} ?(?:->|to\b)|\bfrom ?{CELL}")
_BOARD = r"(?:board|map|grid|maze|lake|picture|image)"
_SIZE_LABEL = re.compile(rf"(?:{_BOARD} ?)?(?:size)?")
_NO_HOLES = re.compile(
    rf"(?:^|(?<=[-;.>)])) ?(?:there are |the {_BOARD} has )?no holes?"
    rf"(?: are)?(?: present| visible)?(?: (?:on|in) th(?:e|is) {_BOARD})? ?(?=[;.,|]|$)"
)
# What a sentence or a bare label states, as in "The player is at (3,0)": see `read_facts`.
_SENTENCE = re.compile(
    r"(?:^|[.;,:(>|-] ?)(?:there are |with |and |the ){0,3}+"
    r"(?P<name>player|goal|holes|agent|printer|table)(?: cells?| position)?"
    r" ?(?:(?:is|are|starts|covers|occupies) )?(?:located |positioned )?(?:at |in |on )?"
    rf"(?:cells? )?(?P<cells>{CELL}(?:(?:,? and |, ?| ){CELL})*+)"
    rf"|\b{_BOARD}(?: size)? (?:is )?(?:a )?(?P<size>[0-9]{{1,9}} ?x ?[0-9]{{1,9}}\b)"
    rf"|(?<![0-9x.])(?<!x )(?P<size2>[0-9]{{1,9}} ?x ?[0-9]{{1,9}}) {_BOARD}\b",
    re.M,
)
_FILLING = re.compile(
    rf"{CELL}|(?<![0-9])[0-9]++(?: ?(?:x|by) ?[0-9]++|[.)])|[-,;.|\[\] ]|and\b|none\b"
)


@dataclasses.dataclass(frozen=True)
class Stated:
    """What a response states. `labels` tells a statement of none from no statement.

    `contradicted` names the labels, `(row,column)` for the open sides of a cell, that were stated
    in two ways; the last way is the one in `facts`.
    """

    facts: frozenset[Fact]
    labels: frozenset[str]
    contradicted: tuple[str, ...]


def read_facts(task: str, text: str) -> Stated:
    """The facts that `text` states, in the terms of the env's `facts`; no text is an error.

    A sentence states only what nothing before it did: later ones tell how the plan goes on.
    """
    found: dict[str, frozenset[Fact]] = {}
    contradicted: dict[str, None] = {}
    text = plain(statements(text))
    for label, value in _statements(task, text):
        facts = _read_value(label.removeprefix("one "), value)
        if facts is None:
            continue
        if label == "one hole":  # several such lines add up
            found["hole"] = found.get("hole", frozenset()) | facts
            continue
        if found.setdefault(label, facts) != facts:
            contradicted[label] = None
        found[label] = facts
    for match in _SENTENCE.finditer(text):
        label = match["name"].removesuffix("s") if match["name"] else "size"
        facts = _read_value(label, match["cells"] or match["size"] or match["size2"])
        if facts and label in ("size", *_LABELS[task]):
            found.setdefault(label, facts)
    return Stated(frozenset().union(*found.values()), frozenset(found), tuple(contradicted))


def _statements(task: str, text: str) -> Iterator[tuple[str, str]]:
    """(label, value) of everything that looks like a statement about the state.

    A label with nothing after it takes the lines below that hold values and nothing else.
    """
    waiting: list[str] = []  # a label and what the lines below it hold
    for line in text.split("\n"):
        if task == "frozenlake":
            line = _NO_HOLES.sub(" holes: none", line)
        marks = list(_BEGINNINGS[task].finditer(line))
        if _STEP_LINE.match(line):  # a cell and a direction are a move there
            marks = [mark for mark in marks if mark["label"]]
        if waiting and not marks and not _FILLING.sub("", line):
            waiting.append(line)
            continue
        if waiting:
            yield waiting[0], " ".join(waiting[1:])
            waiting = []
        for mark, following in itertools.zip_longest(marks, marks[1:]):
            name = _name(task, mark)
            value = line[mark.end() : following.start() if following else len(line)]
            if name is not None and (value.strip() or following):
                yield name, value
            elif name is not None and line[mark.end() - 1] != "|":  # below a column is another row
                waiting = [name]
    if waiting:
        yield waiting[0], " ".join(waiting[1:])


def _name(task: str, mark: re.Match[str]) -> str | None:
    """What a statement is about: size, player, ... or a cell; None where that is no state."""
    if mark["label"] is None:
        return show_cell((number(mark[1]), number(mark[2])))
    words = " ".join(_FILLERS.sub("", mark["label"]).split())
    if words and _SIZE_LABEL.fullmatch(words):
        return "size"
    name = words.removesuffix("s")
    if name not in _LABELS[task]:
        return None
    return "one hole" if name == "hole" and not mark["label"].endswith("s") else name


def _read_value(label: str, value: str) -> frozenset[Fact] | None:
    """The facts of a statement, None where its value cannot be read: it then states nothing."""
    if label == "size":
        sizes = read_sizes(value)
        return sizes and frozenset(("size", rows) for rows, columns in sizes if rows == columns)
    if label.startswith("("):
        row, column = label[1:-1].split(",")
        ways = None if _STEPS.search(value) else read_directions(value)
        cell = (int(row), int(column))
        return None if ways is None else frozenset(("open", cell, way) for way in ways)
    cells = None if _ROUTE.search(value) else read_cells(value)
    return None if cells is None else frozenset((label, cell) for cell in cells)


def measure(task: str, state: Any, stated: Stated) -> dict[str, Any]:
    """`state_f1`, `state_exact` and `contradicted` of what a response states about a board."""
    return {
        "state_f1": state_f1(stated.facts, ENVS[task].facts(state)),
        "state_exact": is_exact(task, stated, ENVS[task].facts(state)),
        "contradicted": list(stated.contradicted),
    }


def state_f1(stated: frozenset[Fact], true: frozenset[Fact]) -> float:
    """F1 in [0, 1] between the facts stated and the true ones (never empty)."""
    return 2 * len(stated & true) / (len(stated) + len(true))


def is_exact(task: str, stated: Stated, true: frozenset[Fact]) -> bool:
    """Whether all true facts are stated and no others; where there are no holes, that too."""
    return stated.facts == true and _is_complete(task, stated)


def _is_complete(task: str, stated: Stated) -> bool:
    return {"size", *_LABELS[task]} <= stated.labels


def state_from_facts(task: str, stated: Stated) -> Any | None:
    """The board that a response describes, None where it describes none."""
    named: dict[str, list[Any]] = {}
    for name, *values in stated.facts:
        named.setdefault(name, []).append(values[0] if len(values) == 1 else tuple(values))
    sizes = named.pop("size", [])
    if not _is_complete(task, stated) or len(sizes) != 1 or not 0 < sizes[0] <= 64:
        return None
    return _BUILDERS[task](sizes[0], named)


def _frozenlake(size: int, named: dict[str, list[Any]]) -> FrozenLakeState | None:
    ends = [named.get(name, []) for name in ("player", "goal")]
    holes = set(named.get("hole", []))
    if any(len(cells) != 1 for cells in ends) or not _inside(size, [*holes, *ends[0], *ends[1]]):
        return None
    letters = {**dict.fromkeys(holes, "H"), ends[0][0]: "S", ends[1][0]: "G"}
    if len(letters) != len(holes) + 2:
        return None
    rows = ("".join(letters.get((r, c), "F") for c in range(size)) for r in range(size))
    return FrozenLakeState(tuple(rows))


def _maze(size: int, named: dict[str, list[Any]]) -> MazeState | None:
    ends = [named.get(name, []) for name in ("player", "goal")]
    if any(len(cells) != 1 for cells in ends) or not _inside(size, [*ends[0], *ends[1]]):
        return None
    walls = [[15] * size for _ in range(size)]
    for cell, direction in named.get("open", []):
        if not _inside(size, [cell]):
            return None
        walls[cell[0]][cell[1]] &= ~_WALLS[direction]
    return MazeState(tuple(map(tuple, walls)), start=ends[0][0], target=ends[1][0])


def _minibehaviour(size: int, named: dict[str, list[Any]]) -> MiniBehaviourState | None:
    agent, printer, table = (named.get(name, []) for name in ("agent", "printer", "table"))
    if len(agent) != 1 or len(printer) != 1 or len(table) != 6:
        return None
    cells = {*agent, *printer, *table}
    if len(cells) != 8 or not _inside(size, list(cells)):
        return None
    return MiniBehaviourState(size, agent[0], printer[0], tuple(sorted(table)))


def _inside(size: int, cells: list[Cell]) -> bool:
    return all(0 <= row < size and 0 <= column < size for row, column in cells)


_BUILDERS: dict[str, Callable[[int, dict[str, list[Any]]], Any | None]] = {
    "frozenlake": _frozenlake,
    "maze": _maze,
    "minibehaviour": _minibehaviour,
}
