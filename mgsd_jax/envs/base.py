"""What an env is: a record of everything that the rest of the package asks about a planning task.

An env is one module that ends in `ENV = Env(...)`, and one line in `envs/__init__.py`. A part that
is left out is a type error, and a TypeError when the module is imported. Whatever follows from the
parts (plans, play, state lines, facts, board files) is a method here and is written once.

Cells are (row, column), counted from 0 at the top left corner.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Generic, Literal, Protocol, TypeVar, cast

import numpy as np

from mgsd_jax.envs import files, plans, search
from mgsd_jax.envs.files import FileFormat
from mgsd_jax.envs.search import Cell, Paths, Plan, Run, grid_cells

Fact = tuple[Any, ...]  # ('size', 4), ('hole', (2, 2)), ('open', (0, 0), 'right'), ...
QuestionKind = Literal["size", "coord", "cells", "directions", "open_directions", "open_rows"]
Sprites = Literal["usual", "other"]  # other: the same things drawn as no public board has them

MOVES = {"up": "U", "down": "D", "left": "L", "right": "R"}  # as answers spell them
ROUTE_START = "I go through"
CELLS_RULE = "A cell is written (row,column), counted from 0 at the top left corner."
# How the state lines end where facts name the open sides of cells; by_rows.py has the other form.
SIDES_FORM = (
    "Open directions:",
    "cell: its open sides among up, down, left, right (a line for every cell)",
)
MOVES_RULE = "The {} moves one cell at a time: up (U), down (D), left (L) or right (R)."
# Why a plan ended, in words, on any board. An env adds its own reasons.
REASONS: Mapping[str, str] = {
    "success": "solved",
    "no_answer": "no answer block",
    "invalid_token": "a word that is no action",
    "empty_plan": "an empty plan",
    "not_reached": "stopped short of the goal",
}


class Sized(Protocol):
    """A board of size x size cells."""

    @property
    def size(self) -> int: ...


State = TypeVar("State", bound=Sized)


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a plan. `legal` is False for an illegal action; a hole is legal but fails.

    `steps` counts the actions carried out, a failing one included. `progress` in [0, 1] is
    1 - (shortest distance left after the last legal action) / (the same at the start); it is 0
    where no way leads on, as in a hole.
    """

    success: bool
    optimal: bool
    parsed: bool
    legal: bool
    reason: str
    steps: int
    progress: float


@dataclasses.dataclass(frozen=True)
class Question:
    """One grounding question, and the line that states its answer where a response states it."""

    name: str
    text: str
    answer: str
    kind: QuestionKind
    facts: frozenset[Fact]
    label: str = ""  # of the state line; '': the answer is not part of the state


@dataclasses.dataclass(frozen=True)
class Wording:
    """What prompts say about a task, as lines of text; see data/prompts.py for the order."""

    rules: tuple[str, ...]
    legend: str  # how things look in the picture
    form: tuple[str, ...]  # of the state lines
    route: str  # an example of `Env.route`
    answer: str  # an example of what stands in the answer block


def cells_route(plan: Plan, cells: Sequence[Cell]) -> str:
    """A sentence with the cells that a plan visits."""
    return f"{ROUTE_START} {show_cells(cells)}."


@dataclasses.dataclass(frozen=True)
class Env(Generic[State]):
    """A planning task. States are frozen, hashable dataclasses with a `size`.

    `generate` and `from_text` return solvable boards only; everything else also takes an unsolvable
    one (such as a model may describe), except what asks for its shortest plans: a ValueError.
    """

    name: str  # in configs, rows and file names
    title: str  # in reports, and the name of its folder of boards
    levels: range  # sizes of its boards
    actions: Mapping[str, str]  # action -> how an answer spells it
    reasons: Mapping[str, str]  # why a plan may fail besides `REASONS`, in words
    # The facts that a response states about cells: the name of the fact -> the word that a text has
    # for all of them ({"goal": "goal", "hole": "holes"}).
    labels: Mapping[str, str]
    wording: Wording
    generate: Callable[..., State]  # (rng, level)
    count: Callable[[int], int | None]  # how many boards a level has, None: not counted
    key: Callable[[State], str]  # the board as one line, equal for equal boards only
    paths: Callable[[State], Paths]
    # (state, node, action that the graph lacks) -> next node and reason to stop: see `search.run`
    refuse: Callable[[State, int, str], tuple[int | None, str | None]]
    questions: Callable[[State], tuple[Question, ...]]
    # (size, cells by label) -> the board; raises ValueError where they make none
    from_facts: Callable[[int, "NamedCells"], State]
    disturb: Callable[[State, np.random.Generator, float], State]  # see envs/noise.py
    # (state, size=256, *, sprites='usual') -> uint8 [size, size, 3]; ValueError if it is too small
    render: Callable[..., np.ndarray]
    file: FileFormat[State]
    # What not every task has:
    has_sides: bool = False  # facts name the open sides of cells
    # More words for actions, such as 'GRAB'; letters of any case.
    words: Mapping[str, str] = dataclasses.field(default_factory=dict)
    route: Callable[[Plan, Sequence[Cell]], str] = cells_route  # of a legal plan and its cells
    map_lines: Callable[[State], tuple[str, ...]] = lambda state: ()  # end of the board as text
    even_options: Mapping[str, float] = dataclasses.field(default_factory=dict)  # see splits.py
    # Recorded in settings.json of a folder of boards, which no folder of other options may resume.
    options: Mapping[str, object] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        route, answer = self.wording.route, self.wording.answer
        if not self.levels or self.levels[0] < 1:
            raise ValueError(f"{self.name}: levels: got {self.levels}, want sizes from 1 up")
        if not route.startswith(ROUTE_START):
            raise ValueError(
                f"{self.name}: wording.route: got {route!r}, want it to begin {ROUTE_START!r}"
            )
        if not re.search(r"\(\d+,\d+\)", route):
            raise ValueError(
                f"{self.name}: wording.route: got {route!r}, want it to name a cell, as (0,1)"
            )
        unknown = set(self.words.values()) - self.actions.keys()
        if unknown:
            raise ValueError(f"{self.name}: words: got actions {unknown}, want {[*self.actions]}")
        for plan in (*((action,) for action in self.actions), (*self.actions,)):
            self._check_reads("actions", self.spell(plan), plan)
        for word, action in self.words.items():
            self._check_reads("words", word, (action,))
        if not self.read(answer)[0]:
            raise ValueError(
                f"{self.name}: wording.answer: got {answer!r}, want a plan of "
                f"{[*self.actions.values()]}"
            )

    def _check_reads(self, field: str, text: str, plan: Plan) -> None:
        """Raises ValueError unless a text in an answer block is read as this plan."""
        read, unread = self.read(text)
        if read != plan:
            got = f"reads as {[*read]}" if unread is None else f"has {unread!r}, which is no action"
            raise ValueError(
                f"{self.name}: {field}: got {text!r} for {[*plan]}, which {got}; want for each "
                "action a word of the letters A to Z, or a digit for every one, no two alike in "
                "any case"
            )

    def nearest_level(self, level: int) -> int:
        """The level that is nearest to one that the env may lack."""
        return min(self.levels, key=lambda other: abs(other - level))

    def check_level(self, level: int) -> None:
        """Raises ValueError for a level that the env does not have."""
        if level not in self.levels:
            low, high = self.levels[0], self.levels[-1]
            raise ValueError(f"{self.name} level: got {level}, want {low} to {high}")

    def count_states(self, level: int) -> int | None:
        """How many boards `generate` can return, None where they are not counted."""
        self.check_level(level)
        return self.count(level)

    # Plans.

    def shortest_plan(self, state: State) -> Plan:
        """The first shortest plan in the env's order of actions."""
        return search.shortest_plan(self.paths(state))

    def random_shortest_plan(self, state: State, rng: np.random.Generator) -> Plan:
        """A random shortest plan."""
        return search.shortest_plan(self.paths(state), rng)

    def shortest_plans(self, state: State, limit: int = 64) -> tuple[Plan, ...]:
        """All shortest plans, or a sample of `limit` of them."""
        return search.shortest_plans(self.paths(state), limit)

    def count_shortest_plans(self, state: State) -> int:
        """How many shortest plans there are."""
        return search.count_shortest_plans(self.paths(state))

    def _run(self, state: State, plan: Plan) -> Run:
        def refuse(node: int, action: str) -> tuple[int | None, str | None]:
            return self.refuse(state, node, action)

        return search.run(self.paths(state), plan, self.actions, refuse)

    def play(self, state: State, plan: Plan) -> Outcome:
        """The outcome of a plan."""
        distances, result = self.paths(state).distances, self._run(state, plan)
        success = result.reason == "success"
        if not success and result.reason not in {**REASONS, **self.reasons}:
            raise ValueError(f"{self.name}: reasons: got {result.reason!r}, want it in words")
        at_start, left = distances[result.nodes[0]], distances[result.nodes[-1]]
        gained = 1.0 - left / at_start if at_start > 0 and left >= 0 else 0.0
        return Outcome(
            success=success,
            optimal=success and result.steps == at_start,
            parsed=result.reason != "invalid_token",
            legal=result.is_legal,
            reason=result.reason,
            steps=result.steps,
            progress=1.0 if success else max(0.0, gained),
        )

    def trace(self, state: State, plan: Plan) -> tuple[Cell, ...]:
        """The cell of the agent at the start and after each legal action."""
        cells = self.paths(state).cells
        return tuple(cells[node] for node in self._run(state, plan).nodes)

    def spell(self, plan: Plan) -> str:
        """The plan as it stands in an answer block: `UUR`, or `U,PICK,R,DROP`."""
        return self._joint.join(self.actions[action] for action in plan)

    def read(self, text: str) -> tuple[Plan, str | None]:
        """The plan that a text states and None, or () and the first thing that is none of it."""
        return plans.read_plan(text, self._notation)

    @functools.cached_property
    def _notation(self) -> plans.Notation:
        return plans.notation(self.actions, self.words)

    @functools.cached_property
    def _joint(self) -> str:
        """What stands between two actions: nothing where a run of letters can be no other word."""
        letters = {spelling.upper() for spelling in self.actions.values()}
        is_word = any(len(word) > 1 and set(word) <= letters for word in self._notation.words)
        return "," if is_word or any(len(letter) > 1 for letter in letters) else ""

    # Words.

    def state_lines(self, state: State) -> tuple[str, ...]:
        """What a response states before its plan."""
        lines: list[str] = []
        for question in (question for question in self.questions(state) if question.label):
            space = "\n" if question.kind in ("open_directions", "open_rows") else " "
            lines += f"{question.label}:{space}{question.answer}".split("\n")
        return tuple(lines)

    def describe(self, state: State) -> str:
        """The board as text."""
        return "\n".join((*self.state_lines(state), *self.map_lines(state)))

    def facts(self, state: State) -> frozenset[Fact]:
        """What a response that states the board states; the rest of the answers follows from it."""
        asked, kinds = self.questions(state), self.kinds
        return frozenset(fact for question in asked for fact in question.facts if fact[0] in kinds)

    @functools.cached_property
    def kinds(self) -> Mapping[str, str]:
        """The kinds of state facts, with the word for all of a kind, such as 'holes' for 'hole'."""
        sides = {"open": "open sides"} if self.has_sides else {}
        return {"size": "size", **self.labels, **sides}

    # Board files.

    def to_text(
        self,
        state: State,
        *,
        split: str,
        index: int,
        seed: int,
        plan: Plan | None = None,
        **drawn: object,
    ) -> str:
        """The board as a board file; raises ValueError where it has no plan.

        `plan` is the shortest plan to record, by default the first one; `drawn` replaces values
        that say how the board was drawn, such as frozen_probability.
        """
        first = self.shortest_plan(state)
        plan = first if plan is None else plan
        if not self.play(state, plan).optimal:
            raise ValueError(f"plan: got {plan}, want a shortest one such as {first}")
        values = self._values(state, plan, None) | drawn
        values |= {"split": split, "index": index, "seed": seed}
        return files.put_together(values, self.file, state)

    def _values(self, state: State, plan: Plan, board: files.BoardText | None) -> dict[str, object]:
        """All values of a board file but those of the draw."""
        return {
            "task": self.name,
            "level": state.size,
            "path_length": len(plan),
            "solution_actions": files.json_text(plan),
            "trajectory_states": self.file.trajectory(plan, self.trace(state, plan)),
            **self.file.fields(state, plan, board),
        }

    def from_text(self, text: str, *, source: str) -> State:
        """The board in a board file. Raises ValueError with source, key, got and want."""
        try:
            return self._read(text)
        except ValueError as error:
            raise ValueError(f"{source}: {error}") from None

    def _read(self, text: str) -> State:
        block = self.file.block
        board = files.take_apart(text, self.file.keys, block)
        if board.fields["task"] != self.name:
            raise files.bad_board("task", board.fields["task"], self.name)
        level = files.integer(board, "level")
        if level not in self.levels:
            raise files.bad_board("level", level, f"{self.levels[0]} to {self.levels[-1]}")
        if len(board.rows) != level:
            raise files.bad_board(block, f"{len(board.rows)} rows", f"{level} rows")
        for key in ("index", "seed"):
            files.integer(board, key)
        state = self.file.read(board)
        paths = self.paths(state)
        if paths.distances[paths.start] < 0:
            got = "a board whose goal cannot be reached"
            raise files.bad_board(block, got, "a solvable one")
        self._check_file(board, state)
        return state

    def _check_file(self, board: files.BoardText, state: State) -> None:
        """Compares a file, key by key, with what would be written; any shortest plan will do."""
        want = self._values(state, self.shortest_plan(state), board)
        for key in (key for key in self.file.keys if key in want):
            if key not in ("solution_actions", "trajectory_states"):
                files.check_field(board, key, want[key])
        actions = files.json_value(board, "solution_actions")
        if not isinstance(actions, list) or not all(isinstance(word, str) for word in actions):
            raise files.bad_board("solution_actions", actions, "a list of words")
        plan = tuple(cast(list[str], actions))
        result = self.play(state, plan)
        if not result.optimal:
            got = f"{actions} ({result.reason} after {result.steps})"
            shortest = f"a shortest plan such as {want['solution_actions']}"
            raise files.bad_board("solution_actions", got, shortest)
        trajectory = self.file.trajectory(plan, self.trace(state, plan))
        files.check_field(board, "trajectory_states", trajectory)


# Questions, and how their answers are written.

# How an answer to a question of each kind is to be written: the form of `Question.answer`.
ANSWER_FORMS: Mapping[QuestionKind, str] = {
    "size": "Write it like 4x4.",
    "coord": "Write one cell.",
    "cells": "Write the cells with spaces between them, or none.",
    "directions": "Write those among up, down, left, right with commas, or none.",
    "open_directions": "Write a line for each cell, like (0,0): down, right.",
    "open_rows": "Write a line for each row, like Row 0: DR L none, with the letters of each "
    "cell's open sides among U, D, L, R.",
}


def ask_size(size: int) -> Question:
    """The question about the size of the board, the first of every task."""
    text = "What is the map size (rows x columns)?"
    return Question(
        "map_size", text, f"{size}x{size}", "size", frozenset({("size", size)}), "Map size"
    )


def ask_cell(fact: str, text: str, cell: Cell) -> Question:
    """The question about the cell of one thing."""
    return Question(
        fact, text, show_cell(cell), "coord", frozenset({(fact, cell)}), fact.capitalize()
    )


def ask_cells(fact: str, text: str, cells: Iterable[Cell], name: str = "") -> Question:
    """The question about several cells; `name` is its name where that is not the fact's."""
    cells, name = tuple(cells), name or fact
    label = name.replace("_", " ").capitalize()
    facts = frozenset((fact, cell) for cell in cells)
    return Question(name, text, show_cells(cells), "cells", facts, label)


def ask_moves(text: str, ways: Iterable[str]) -> Question:
    """The question about the legal first moves, which follow from the rest of the state."""
    ways = tuple(ways)
    facts = frozenset(("legal", way) for way in ways)
    return Question("legal_moves", text, show_directions(ways), "directions", facts)


def show_cell(cell: Cell) -> str:
    return f"({cell[0]},{cell[1]})"


def show_cells(cells: Iterable[Cell]) -> str:
    return " ".join(map(show_cell, cells)) or "none"


def show_directions(directions: Iterable[str]) -> str:
    return ", ".join(directions) or "none"


# Boards out of facts, and with wrong facts.

NamedCells = Mapping[str, tuple[Any, ...]]  # label -> cells, 'open' -> (cell, direction)


def only_cell(named: NamedCells, label: str) -> Cell:
    """The one cell of a label; raises ValueError where it has none or several."""
    if len(named[label]) != 1:
        raise ValueError(f"{label}: got {len(named[label])} cells, want 1")
    return named[label][0]


def check_inside(size: int, name: str, cells: Iterable[Cell]) -> None:
    """Raises ValueError that begins with `name` for a cell that is not on the board."""
    for cell in cells:
        if not (0 <= cell[0] < size and 0 <= cell[1] < size):
            raise ValueError(f"{name}: got {cell}, want a cell of a {size}x{size} board")


def misplace(
    cell: Cell, taken: Iterable[Cell], size: int, rng: np.random.Generator, share: float
) -> Cell:
    """The cell, or with chance `share` another one that is not taken."""
    if rng.random() >= share:
        return cell
    free = [other for other in grid_cells(size) if other != cell and other not in set(taken)]
    return free[rng.integers(len(free))] if free else cell


# Drawing.


def cell_edges(level: int, size: int) -> list[int]:
    """Where each cell of a picture begins, in pixels, and where the last one ends."""
    if size < 8 * level:
        raise ValueError(f"picture size: got {size}, want at least {8 * level} (8 pixels a cell)")
    return [i * size // level for i in range(level + 1)]


def paste_cells(sheets: np.ndarray, kinds: np.ndarray | Sequence[Sequence[int]]) -> np.ndarray:
    """A picture put together from whole-board pictures that each show one kind of cell everywhere.

    sheets: uint8 [kinds, size, size, 3]; kinds: the kind of each cell, integers or bools [level,
    level]. A cell takes its own square and nothing else, so it never depends on its neighbours.
    """
    picture, edges = sheets[0].copy(), cell_edges(len(kinds), sheets.shape[1])
    for r, row in enumerate(np.asarray(kinds, int).tolist()):  # a bool would be a mask below
        for c, kind in enumerate(row):
            if kind:
                square = (slice(edges[r], edges[r + 1]), slice(edges[c], edges[c + 1]))
                picture[square] = sheets[kind][square]
    return picture
