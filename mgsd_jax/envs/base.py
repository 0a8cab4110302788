"""What the three envs share: the protocol, one shortest-path search, play, and board files.

A board is a graph for planning: nodes are integers (a cell is `row * size + column`), and
`successors[node]` maps each legal action to the next node, in the order that breaks ties between
equally short plans. Cells are (row, column), 0-based, everywhere else.
"""

import dataclasses
import functools
import json
import random
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, TypeVar, get_args

import numpy as np

Cell = tuple[int, int]  # (row, column)
Plan = tuple[str, ...]  # actions: up down left right pick drop
Fact = tuple[Any, ...]  # ('size', 4), ('hole', (2, 2)), ('open', (0, 0), 'right'), ...
State = TypeVar("State")
Successors = Sequence[Mapping[str, int]]
Bucket = Literal["easy", "medium", "hard"]
QuestionKind = Literal["size", "coord", "cells", "directions", "open_directions"]

DELTAS: Mapping[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}

Sprites = Literal["usual", "other"]  # other: the same things drawn as no public board has them

Reason = Literal[
    "success",
    # no plan could be read; nothing was played
    "no_answer",
    "invalid_token",
    # played to the end without an illegal action
    "empty_plan",
    "not_reached",
    "fell_into_hole",
    # illegal actions; the plan ends there
    "off_board",
    "hit_wall",
    "entered_table",
    "entered_printer",
    "pick_while_carrying",
    "pick_not_adjacent",
    "drop_without_printer",
    "drop_not_adjacent",
]
_LEGAL_REASONS = frozenset({"success", "empty_plan", "not_reached", "fell_into_hole"})


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a plan. `legal` is False for an illegal action; a hole is legal but fails.

    `steps` counts the actions carried out, a failing one included. `progress` in [0, 1] is
    1 - (shortest distance left after the last legal action) / (the same at the start); it is 0 in
    a hole, from which no way leads on.
    """

    success: bool
    optimal: bool
    parsed: bool
    legal: bool
    reason: Reason
    steps: int
    progress: float


@dataclasses.dataclass(frozen=True)
class Question:
    """One grounding question; `answer` repeats the value text of the state lines."""

    name: str
    text: str
    answer: str
    kind: QuestionKind
    facts: frozenset[Fact]


class Env(Protocol):
    """What every env module offers. States are frozen, hashable dataclasses with `.size`.

    `generate` and `from_text` return solvable boards only; the others also take an unsolvable one
    (such as a model may describe), except the shortest plans, which raise ValueError.
    """

    NAME: str
    ACTIONS: tuple[str, ...]
    MIN_LEVEL: int
    MAX_LEVEL: int
    generate: Callable[..., Any]  # (rng, level, **options) -> State
    key: Callable[[Any], str]
    render: Callable[..., np.ndarray]  # (state, size=256, sprites=) -> uint8 [size, size, 3]
    describe: Callable[[Any], str]
    state_lines: Callable[[Any], tuple[str, ...]]
    facts: Callable[[Any], frozenset[Fact]]
    questions: Callable[[Any], tuple[Question, ...]]
    shortest_plan: Callable[[Any], Plan]
    shortest_plans: Callable[..., tuple[Plan, ...]]  # (state, limit=64)
    count_shortest_plans: Callable[[Any], int]
    random_shortest_plan: Callable[[Any, np.random.Generator], Plan]
    play: Callable[[Any, Plan], Outcome]
    trace: Callable[[Any, Plan], tuple[Cell, ...]]
    to_text: Callable[..., str]  # (state, *, split, index, seed, ...)
    from_text: Callable[..., Any]  # (text, *, source) -> State

    def count_states(self, level: int, /) -> int | None: ...


# Options.


def check_level(name: str, level: int, low: int, high: int) -> None:
    if not low <= level <= high:
        raise ValueError(f"{name} level: got {level}, want {low} to {high}")


def check_bucket(bucket: str | None) -> None:
    if bucket not in (None, *get_args(Bucket)):
        raise ValueError(f"bucket: got {bucket!r}, want None or one of {get_args(Bucket)}")


# Shortest paths.


@functools.cache
def grid_moves(size: int, order: tuple[str, ...]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """For each cell number of a size x size board, its (action, next cell number), in order."""
    moves = []
    for row in range(size):
        for column in range(size):
            steps = (
                (action, row + DELTAS[action][0], column + DELTAS[action][1]) for action in order
            )
            moves.append(
                tuple((a, r * size + c) for a, r, c in steps if 0 <= r < size and 0 <= c < size)
            )
    return tuple(moves)


def distances_to(successors: Successors, targets: Iterable[int]) -> tuple[int, ...]:
    """Fewest actions from each node to the nearest target, -1 where there is no way."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for node, steps in enumerate(successors):
        for following in steps.values():
            predecessors[following].append(node)
    distances = [-1] * len(successors)
    frontier = list(targets)
    for node in frontier:
        distances[node] = 0
    steps_left = 0
    while frontier:
        steps_left += 1
        reached = []
        for node in frontier:
            for previous in predecessors[node]:
                if distances[previous] < 0:
                    distances[previous] = steps_left
                    reached.append(previous)
        frontier = reached
    return tuple(distances)


class Paths(NamedTuple):
    """A board as a graph: from `start` to any node at distance 0."""

    successors: Successors
    distances: tuple[int, ...]
    start: int


def _choices(paths: Paths, node: int) -> list[tuple[str, int]]:
    """The first actions of the shortest ways from a node, with the nodes that they lead to."""
    left = paths.distances[node] - 1
    return [(a, n) for a, n in paths.successors[node].items() if paths.distances[n] == left]


def _check_solvable(paths: Paths) -> None:
    if paths.distances[paths.start] < 0:
        raise ValueError("got a board whose goal cannot be reached, want a solvable one")


def shortest_plan(paths: Paths, rng: np.random.Generator | None = None) -> Plan:
    """A shortest plan: the first in the order of the actions, or with `rng` a random one.

    The first one is also what breadth-first search from the start finds when it tries actions in
    that order. Random means uniform over the right actions at each step. Raises ValueError where
    the goal cannot be reached.
    """
    _check_solvable(paths)
    node, plan = paths.start, []
    while paths.distances[node]:
        choices = _choices(paths, node)
        action, node = choices[
            0 if rng is None or len(choices) == 1 else rng.integers(len(choices))
        ]
        plan.append(action)
    return tuple(plan)


def count_shortest_plans(paths: Paths) -> int:
    """How many shortest plans there are. Raises ValueError where the goal cannot be reached."""
    return _count_ways(paths)[paths.start]


def shortest_plans(paths: Paths, limit: int) -> tuple[Plan, ...]:
    """Every shortest plan, in the order of the actions; of more than `limit` so many of them.

    Those are a sample without repeats in which every plan is as likely as any other, and always the
    same for a board. Raises ValueError where the goal cannot be reached.
    """
    if limit < 1:
        raise ValueError(f"limit: got {limit}, want at least 1")
    ways = _count_ways(paths)
    total = ways[paths.start]
    if total <= limit:
        return tuple(_numbered_plan(paths, ways, number) for number in range(total))
    rng = random.Random(f"{paths.start} {paths.distances}")
    numbers: set[int] = set()
    while len(numbers) < limit:
        numbers.add(rng.randrange(total))
    return tuple(_numbered_plan(paths, ways, number) for number in sorted(numbers))


def _count_ways(paths: Paths) -> dict[int, int]:
    """The number of shortest ways on from every node that a shortest plan passes."""
    _check_solvable(paths)
    layers = [{paths.start}]  # all nodes of a layer are equally far from the goal
    for _ in range(paths.distances[paths.start]):
        layers.append({n for node in layers[-1] for _, n in _choices(paths, node)})
    ways = dict.fromkeys(layers.pop(), 1)
    for layer in reversed(layers):
        ways |= {node: sum(ways[n] for _, n in _choices(paths, node)) for node in layer}
    return ways


def _numbered_plan(paths: Paths, ways: Mapping[int, int], number: int) -> Plan:
    """The shortest plan that `number` others come before in the order of the actions."""
    node, plan = paths.start, []
    while paths.distances[node]:
        choices = iter(_choices(paths, node))
        action, node = next(choices)
        while number >= ways[node]:
            number -= ways[node]
            action, node = next(choices)
        plan.append(action)
    return tuple(plan)


# Play.


class Run(NamedTuple):
    """The nodes of a plan that was carried out, start first, up to the last legal step."""

    nodes: list[int]
    reason: Reason
    steps: int


def run(
    paths: Paths,
    plan: Plan,
    actions: Sequence[str],
    step: Callable[[int, str], tuple[int | None, Reason | None]],
) -> Run:
    """Carry out a plan until it succeeds or fails; what follows is ignored.

    `step(node, action)` returns the next node (None where the action is illegal) and the reason to
    stop there, if any. A plan with an action that is not one of the env's `actions` is not carried
    out at all: an invalid token makes the whole plan fail.
    """
    nodes = [paths.start]
    if any(action not in actions for action in plan):
        return Run(nodes, "invalid_token", 0)
    if paths.distances[paths.start] == 0:
        return Run(nodes, "success", 0)
    if not plan:
        return Run(nodes, "empty_plan", 0)
    for steps, action in enumerate(plan, start=1):
        node, reason = step(nodes[-1], action)
        if node is not None:
            nodes.append(node)
            if paths.distances[node] == 0:
                return Run(nodes, "success", steps)
        if reason is not None:
            return Run(nodes, reason, steps)
    return Run(nodes, "not_reached", len(plan))


def outcome(paths: Paths, result: Run) -> Outcome:
    """The measures of a plan that was carried out."""
    success = result.reason == "success"
    at_start, left = paths.distances[paths.start], paths.distances[result.nodes[-1]]
    if success:
        progress = 1.0
    else:
        progress = max(0.0, 1.0 - left / at_start) if at_start > 0 and left >= 0 else 0.0
    return Outcome(
        success=success,
        optimal=success and result.steps == at_start,
        parsed=result.reason != "invalid_token",
        legal=result.reason in _LEGAL_REASONS,
        reason=result.reason,
        steps=result.steps,
        progress=progress,
    )


# Words.

ASK_SIZE = "What is the map size (rows x columns)?"

# How an answer to a question of each kind is to be written: the form of `Question.answer`.
ANSWER_FORMS: Mapping[QuestionKind, str] = {
    "size": "Write it like 4x4.",
    "coord": "Write one cell.",
    "cells": "Write the cells with spaces between them, or none.",
    "directions": "Write those among up, down, left, right with commas, or none.",
    "open_directions": "Write a line for each cell, like (0,0): down, right.",
}


def show_cell(cell: Cell) -> str:
    return f"({cell[0]},{cell[1]})"


def show_cells(cells: Iterable[Cell]) -> str:
    return " ".join(map(show_cell, cells)) or "none"


def show_directions(directions: Iterable[str]) -> str:
    return ", ".join(directions) or "none"


# Drawing.


def cell_edges(level: int, size: int) -> list[int]:
    """Where each cell of a picture begins, in pixels, and where the last one ends."""
    if size < 8 * level:
        raise ValueError(f"picture size: got {size}, want at least {8 * level} (8 pixels a cell)")
    return [i * size // level for i in range(level + 1)]


def paste_cells(
    sheets: np.ndarray, edges: Sequence[int], kinds: Iterable[tuple[int, int, int]]
) -> np.ndarray:
    """A picture put together from whole-board pictures that each show one kind of cell everywhere.

    sheets: uint8 [kinds, size, size, 3]; kinds: (row, column, kind) of each cell that differs from
    kind 0. A cell takes its own square and nothing else, so it never depends on its neighbours.
    """
    picture = sheets[0].copy()
    for row, column, kind in kinds:
        square = (slice(edges[row], edges[row + 1]), slice(edges[column], edges[column + 1]))
        picture[square] = sheets[kind][square]
    return picture


# Board files.


class BoardText(NamedTuple):
    """A board file taken apart: the text after each key, and the lines of the block."""

    source: str
    fields: dict[str, str]
    block: str
    rows: list[str]


def bad_board(source: str, key: str, got: object, want: object) -> ValueError:
    shown = [text if len(text) <= 200 else text[:200] + "..." for text in (f"{got}", f"{want}")]
    return ValueError(f"{source}: {key}: got {shown[0]}, want {shown[1]}")


def read_board(text: str, source: str, keys: Sequence[str], block: str) -> BoardText:
    """Take a board file apart. Raises ValueError on a missing, unknown or repeated key."""
    head, rows = [], None
    for line in text.splitlines():
        if rows is not None:
            rows.append(line)
        elif line == f"{block}:":
            rows = []
        else:
            head.append(line)
    fields: dict[str, str] = {}
    for line in head:
        key, equals, value = line.partition("=")
        if not equals or key not in keys:
            raise bad_board(source, key, repr(line), f"one of the lines key=value of {keys}")
        if key in fields:
            raise bad_board(source, key, "the key twice", "it once")
        fields[key] = value
    for key in keys:
        if key not in fields:
            raise bad_board(source, key, "no such line", f"{key}=...")
    if rows is None:
        raise bad_board(source, block, "no such block", f"'{block}:' and the rows of the board")
    return BoardText(source, fields, block, rows)


def integer(board: BoardText, key: str) -> int:
    text = board.fields[key]
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise bad_board(board.source, key, repr(text), "an integer")
    return int(text)


def number(board: BoardText, key: str) -> float:
    try:
        return float(board.fields[key])
    except ValueError:
        raise bad_board(board.source, key, repr(board.fields[key]), "a number") from None


def json_value(board: BoardText, key: str) -> Any:
    try:
        return json.loads(board.fields[key])
    except ValueError:
        raise bad_board(board.source, key, repr(board.fields[key]), "JSON") from None


def json_text(value: object, *, compact: bool = False) -> str:
    return json.dumps(value, separators=(",", ":") if compact else (", ", ": "))


def check_task(board: BoardText, name: str, low: int, high: int) -> None:
    """Raise ValueError unless the task is `name`, the level in range, and one row a level."""
    if board.fields["task"] != name:
        raise bad_board(board.source, "task", board.fields["task"], name)
    level = integer(board, "level")
    if not low <= level <= high:
        raise bad_board(board.source, "level", level, f"{low} to {high}")
    if len(board.rows) != level:
        raise bad_board(board.source, board.block, f"{len(board.rows)} rows", f"{level} rows")


def read_draw(board: BoardText) -> tuple[str, int, int]:
    """How the board came about: split, index, seed."""
    return board.fields["split"], integer(board, "index"), integer(board, "seed")


def read_state(board: BoardText, make: Callable[[], State]) -> State:
    """`make()`, with the source of the board in front of what it raises."""
    try:
        return make()
    except ValueError as error:
        raise ValueError(f"{board.source}: {error}") from None


def write_board(fields: Mapping[str, str], block: str, rows: Iterable[str]) -> str:
    lines = [f"{key}={value}" for key, value in fields.items()]
    return "\n".join([*lines, f"{block}:", *rows]) + "\n"


def file_plan(board: BoardText, paths: Paths) -> Plan:
    """The first shortest plan. Raises ValueError, with source and block, if there is none."""
    if paths.distances[paths.start] < 0:
        got = "a board whose goal cannot be reached"
        raise bad_board(board.source, board.block, got, "a solvable one")
    return shortest_plan(paths)


def check_board(
    board: BoardText,
    want: Mapping[str, str],
    play: Callable[[Plan], Outcome],
    trajectory: Callable[[Plan], str],
) -> None:
    """Compare a board file, field by field, with what would be written for the board in it.

    The plan may be any shortest one. Raises ValueError naming the first key that differs; JSON
    may be spaced in another way.
    """
    for key, text in want.items():
        if key not in ("solution_actions", "trajectory_states"):
            _check_field(board, key, text)
    actions = json_value(board, "solution_actions")
    if not isinstance(actions, list) or not all(isinstance(action, str) for action in actions):
        raise bad_board(board.source, "solution_actions", actions, "a list of words")
    result = play(tuple(actions))
    if not result.optimal:
        got = f"{actions} ({result.reason} after {result.steps})"
        want_plan = f"a shortest plan such as {want['solution_actions']}"
        raise bad_board(board.source, "solution_actions", got, want_plan)
    _check_field(board, "trajectory_states", trajectory(tuple(actions)))


def _check_field(board: BoardText, key: str, text: str) -> None:
    got = board.fields[key]
    if got == text:
        return
    # Compared as text again, since Python takes true for 1 and 6.0 for 6.
    is_json = text[0] in "[{-0123456789"
    values = (json_value(board, key), json.loads(text)) if is_json else (got, text)
    if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
        raise bad_board(board.source, key, got, text)
