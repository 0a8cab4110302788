"""State facts read back out of a response, and the board that they describe.

A fact is stated after its label (those of `state_lines`), at the beginning of a line or after a
mark, in any spelling that `values.plain` makes the same: lists, Markdown, several facts a line.
Thoughts and answer blocks state nothing. This is how perception errors are told from planning
errors, and neither from a way of writing.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from mgsd_jax.checks.fields import Json
from mgsd_jax.envs import ENVS, AnyState
from mgsd_jax.envs.base import Fact, check_inside, show_cell
from mgsd_jax.envs.responses import statements
from mgsd_jax.envs.values import CELL, number, plain, read_cells, read_directions, read_sizes

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
# The open sides of a row of cells, as by_rows.py writes them; what says anything else is no row.
_WAYS = r"(?:none|[udlr]{1,4})"
_ROW = (
    r"(?<![a-z])(?<![a-z] )row (?P<row>[0-9]{1,2}) ?(?:[(\[][^()\[\]]{0,40}[)\]])? ?[:=|]"
    rf"[ |\[]{{0,4}}(?P<ways>{_WAYS}(?:[ ,|]{{1,4}}{_WAYS}){{0,63}})"
    r"(?=[ ,|\]]{0,4}(?:[.;]|$|row [0-9]))"
)
_STEPS = re.compile(r"(?<!can )\b(?:move|moves|go|goes|step|then|take|walk|turn)\b")
_STEP_LINE = re.compile(r"\A[^a-z]*+step\b")
_ROUTE = re.compile(rf"{CELL} ?(?:->|to\b)|\bfrom ?{CELL}")
_BOARD = r"(?:board|map|grid|maze|lake|picture|image)"
_SIZE_LABEL = re.compile(rf"(?:{_BOARD} ?)?(?:size)?")
_NO_HOLES = re.compile(
    rf"(?:^|(?<=[-;.>)])) ?(?:there are |the {_BOARD} has )?no holes?"
    rf"(?: are)?(?: present| visible)?(?: (?:on|in) th(?:e|is) {_BOARD})? ?(?=[;.,|]|$)"
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


class Vocabulary(NamedTuple):
    """What the state facts of a task are called, and where a text begins to state one."""

    labels: Mapping[str, str]  # as in `Env.labels`
    beginning: re.Pattern[str]
    sentence: re.Pattern[str]  # a sentence or a bare label, as in "The player is at (3,0)"
    has_sides: bool  # a text may state the open sides of cells, too


def vocabulary(labels: Mapping[str, str], *, has_sides: bool) -> Vocabulary:
    """How texts state facts of these labels, and the open sides of cells if they are facts too."""
    names = "|".join(labels.values())
    return Vocabulary(
        labels,
        re.compile(f"{_OPEN}|{_ROW}|{_LABEL}" if has_sides else _LABEL),
        re.compile(
            r"(?:^|[.;,:(>|-] ?)(?:there are |with |and |the ){0,3}"
            rf"(?P<name>{names})(?: cells?| position)?"
            r" ?(?:(?:is|are|starts|covers|occupies) )?(?:located |positioned )?(?:at |in |on )?"
            rf"(?:cells? )?(?P<cells>{CELL}(?:(?:,? and |, ?| ){CELL})*)"
            rf"|\b{_BOARD}(?: size)? (?:is )?(?:a )?(?P<size>[0-9]{{1,9}} ?x ?[0-9]{{1,9}}\b)"
            rf"|(?<![0-9x.])(?<!x )(?P<size2>[0-9]{{1,9}} ?x ?[0-9]{{1,9}}) {_BOARD}\b",
            re.M,
        ),
        has_sides,
    )


@functools.cache
def _vocabulary(task: str) -> Vocabulary:
    return vocabulary(ENVS[task].labels, has_sides=ENVS[task].has_sides)


def read_facts(task: str, text: str) -> Stated:
    """The facts that `text` states, in the terms of the env's `facts`; no text is an error."""
    return read_stated(_vocabulary(task), text)


def read_stated(words: Vocabulary, text: str) -> Stated:
    """The facts that `text` states in a vocabulary.

    A sentence states only what nothing before it did: later ones tell how the plan goes on.
    """
    found: dict[str, frozenset[Fact]] = {}
    contradicted: dict[str, None] = {}
    text = plain(statements(text))
    for label, value in _statements(words, text):
        name = label.removeprefix("one ")
        facts = _read_value(name, value)
        if facts is None:
            continue
        if name != label:  # several such lines add up
            found[name] = found.get(name, frozenset()) | facts
            continue
        if found.setdefault(label, facts) != facts:
            contradicted[label] = None
        found[label] = facts
    labels = {many: label for label, many in words.labels.items()}
    for match in words.sentence.finditer(text):
        label = labels[match["name"]] if match["name"] else "size"
        facts = _read_value(label, match["cells"] or match["size"] or match["size2"])
        if facts:
            found.setdefault(label, facts)
    return Stated(frozenset().union(*found.values()), frozenset(found), tuple(contradicted))


def _statements(words: Vocabulary, text: str) -> Iterator[tuple[str, str]]:
    """(label, value) of everything that looks like a statement about the state.

    A label with nothing after it takes the lines below that hold values and nothing else.
    """
    waiting: list[str] = []  # a label and what the lines below it hold
    for line in text.split("\n"):
        if "hole" in words.labels:
            line = _NO_HOLES.sub(" holes: none", line)
        marks = list(words.beginning.finditer(line))
        if _STEP_LINE.match(line):  # a cell and a direction are a move there
            marks = [mark for mark in marks if mark["label"]]
        if waiting and not marks and not _FILLING.sub("", line):
            waiting.append(line)
            continue
        if waiting:
            yield waiting[0], " ".join(waiting[1:])
            waiting = []
        for mark, following in itertools.zip_longest(marks, marks[1:]):
            name = _name(words.labels, mark)
            value = line[mark.end() : following.start() if following else len(line)]
            if words.has_sides and mark["row"]:
                for column, ways in enumerate(re.findall(_WAYS, mark["ways"])):
                    yield show_cell((number(mark["row"]), column)), ways
            elif name is not None and (value.strip() or following):
                yield name, value
            elif name is not None and line[mark.end() - 1] != "|":  # below a column is another row
                waiting = [name]
    if waiting:
        yield waiting[0], " ".join(waiting[1:])


def _name(labels: Mapping[str, str], mark: re.Match[str]) -> str | None:
    """What a statement is about: size, player, ... or a cell; None where that is no state."""
    if mark["label"] is None:
        return show_cell((number(mark[1]), number(mark[2]))) if mark[1] else None
    words = " ".join(_FILLERS.sub("", mark["label"]).split())
    if words and _SIZE_LABEL.fullmatch(words):
        return "size"
    for label, many in labels.items():
        if words in (label, f"{label}s", many):
            is_one_of_many = label != many and not mark["label"].endswith("s")
            return f"one {label}" if is_one_of_many else label
    return None


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


def measure(task: str, state: AnyState, stated: Stated) -> Json:
    """The fields of a score that say what a response states of a board: see `PlanScore`."""
    true = ENVS[task].facts(state)
    return {
        "state_f1": state_f1(stated.facts, true),
        "state_exact": is_exact(task, stated, true),
        "state_f1_by_kind": f1_by_kind(stated.facts, true),
        "contradicted": list(stated.contradicted),
    }


def state_f1(stated: frozenset[Fact], true: frozenset[Fact]) -> float:
    """F1 in [0, 1] between the facts stated and the true ones, which are not both empty."""
    return 2 * len(stated & true) / (len(stated) + len(true))


def f1_by_kind(stated: frozenset[Fact], true: frozenset[Fact]) -> dict[str, float]:
    """`state_f1` of the facts of each kind, such as 'hole', that are stated or true; by name."""

    def of(kind: str, some: frozenset[Fact]) -> frozenset[Fact]:
        return frozenset(fact for fact in some if fact[0] == kind)

    kinds = sorted({fact[0] for fact in stated | true})  # sets come in another order each run
    return {kind: state_f1(of(kind, stated), of(kind, true)) for kind in kinds}


def is_exact(task: str, stated: Stated, true: frozenset[Fact]) -> bool:
    """Whether all true facts are stated and no others; where there are no holes, that too."""
    return stated.facts == true and _is_complete(task, stated)


def _is_complete(task: str, stated: Stated) -> bool:
    return {"size", *ENVS[task].labels} <= stated.labels


def state_from_facts(task: str, stated: Stated) -> AnyState | None:
    """The board that a response describes, None where it describes none."""
    try:
        return stated_board(task, stated)
    except ValueError:
        return None


def stated_board(task: str, stated: Stated) -> AnyState:
    """The board that a response describes. Raises ValueError that says why it describes none."""
    named: dict[str, list[Any]] = {name: [] for name in ("size", "open", *ENVS[task].labels)}
    for name, *values in stated.facts:
        named[name].append(values[0] if len(values) == 1 else tuple(values))
    missing = [name for name in ("size", *ENVS[task].labels) if name not in stated.labels]
    if missing:
        raise ValueError(f"{' and '.join(missing)}: not stated")
    sizes = sorted(named["size"])
    if len(sizes) != 1 or not 0 < sizes[0] <= 64:
        raise ValueError(f"size: got {sizes}, want one of 1 to 64")
    for name in ENVS[task].labels:
        check_inside(sizes[0], name, named[name])
    check_inside(sizes[0], "open", (cell for cell, _ in named["open"]))
    return ENVS[task].from_facts(sizes[0], {name: tuple(v) for name, v in named.items()})
