"""MiniBehaviour: walk to the printer, pick it up, carry it to the table, drop it there.

The agent stands next to a thing to handle it. The table is never walked on; the printer's cell is
floor once the printer is in hand.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from mgsd_jax.envs import base
from mgsd_jax.envs.base import Bucket, Cell, Fact, Outcome, Paths, Plan, Question, Reason, Sprites

NAME: str = "minibehaviour"
ACTIONS: tuple[str, ...] = ("up", "down", "left", "right", "pick", "drop")
MIN_LEVEL: int = 4
MAX_LEVEL: int = 32

_MOVES = ("up", "down", "left", "right")  # breaks ties between plans, as the public solver does
_TABLE_ROWS, _TABLE_COLUMNS = 2, 3
_DRAWS = 4096
_KINDS = ".TPA"
_KEYS = (
    *("task", "split", "level", "grid_rows", "grid_cols", "outer_ring", "index", "seed"),
    *("difficulty_bucket", "start_row", "start_col", "start_dir", "printer_row", "printer_col"),
    *("printer_traversable_after_pick", "table_pos", "printer_neighbors", "table_neighbors"),
    *("best_paths", "path_length", "solution_actions", "trajectory_states"),
    *("distance_map_to_printer", "distance_map_to_table"),
)


@dataclasses.dataclass(frozen=True)
class MiniBehaviourState:
    """Where the agent, the printer and the table stand; table cells sorted row-major."""

    size: int
    agent: Cell
    printer: Cell
    table: tuple[Cell, ...]

    def __post_init__(self) -> None:
        cells = (self.agent, self.printer, *self.table)
        for cell in cells:
            if not (0 <= cell[0] < self.size and 0 <= cell[1] < self.size):
                raise ValueError(
                    f"grid: got {cell}, want a cell of a {self.size}x{self.size} board"
                )
        if len(set(cells)) != len(cells) or not self.table:
            raise ValueError(f"grid: got {cells}, want an agent, a printer and a table apart")
        if list(self.table) != sorted(self.table):
            raise ValueError(f"table: got {self.table}, want it sorted by row, then column")

    @property
    def level(self) -> int:
        return self.size


def _neighbours(state: MiniBehaviourState, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The cells next to some cells, on the board and not of the table, row-major."""
    moves = base.grid_moves(state.size, _MOVES)
    near = {divmod(n, state.size) for r, c in cells for _, n in moves[r * state.size + c]}
    return tuple(sorted(near - set(state.table) - set(cells)))


@functools.lru_cache(maxsize=1024)
def _paths(state: MiniBehaviourState) -> Paths:
    """Nodes: the cells with empty hands, then with the printer in hand, then after the drop."""
    count = state.size**2
    number = {divmod(node, state.size): node for node in range(count)}
    table = {number[cell] for cell in state.table}
    empty, carrying = [], []
    for node, moves in enumerate(base.grid_moves(state.size, _MOVES)):
        free = {} if node in table else {a: n for a, n in moves if n not in table}
        empty.append({a: n for a, n in free.items() if n != number[state.printer]})
        carrying.append({a: n + count for a, n in free.items()})
    empty[number[state.printer]] = {}
    for cell in _neighbours(state, (state.printer,)):
        empty[number[cell]]["pick"] = number[cell] + count
    for cell in _neighbours(state, state.table):
        carrying[number[cell]]["drop"] = number[cell] + 2 * count
    successors = empty + carrying + [{} for _ in range(count)]
    distances = base.distances_to(successors, range(2 * count, 3 * count))
    return Paths(successors, distances, number[state.agent])


def _bucket(length: int, level: int) -> Bucket:
    if length <= level - 1:
        return "easy"
    return "medium" if length <= level + 1 else "hard"


def generate(
    rng: np.random.Generator, level: int, *, bucket: Bucket | None = None
) -> MiniBehaviourState:
    """A random board: the 2x3 table anywhere, then printer and agent on any free cells.

    Every such board is solvable: the floor around a table is connected. `bucket` redraws until
    the length of the plan is easy (up to level - 1), medium (up to level + 1) or hard. Raises
    ValueError for a level out of range or a bucket that no draw met.
    """
    base.check_level(NAME, level, MIN_LEVEL, MAX_LEVEL)
    base.check_bucket(bucket)
    for _ in range(_DRAWS):
        top = int(rng.integers(level - _TABLE_ROWS + 1))
        left = int(rng.integers(level - _TABLE_COLUMNS + 1))
        table = _table_at(top, left)
        floor = [cell for cell in _cells(level) if cell not in table]
        printer = floor.pop(rng.integers(len(floor)))
        agent = floor[rng.integers(len(floor))]
        state = MiniBehaviourState(level, agent, printer, table)
        if bucket is None or bucket == _bucket(len(shortest_plan(state)), level):
            return state
    raise ValueError(f"bucket: got {bucket!r}, which none of {_DRAWS} draws met at level {level}")


def _table_at(top: int, left: int) -> tuple[Cell, ...]:
    return tuple((top + r, left + c) for r in range(_TABLE_ROWS) for c in range(_TABLE_COLUMNS))


def _cells(size: int) -> list[Cell]:
    return [(row, column) for row in range(size) for column in range(size)]


def count_states(level: int) -> int | None:
    """How many boards `generate` can return: tables, then printers, then agents."""
    base.check_level(NAME, level, MIN_LEVEL, MAX_LEVEL)
    tables = (level - _TABLE_ROWS + 1) * (level - _TABLE_COLUMNS + 1)
    floor = level * level - _TABLE_ROWS * _TABLE_COLUMNS
    return tables * floor * (floor - 1)


def key(state: MiniBehaviourState) -> str:
    """The board as one line, equal only for equal boards."""
    return f"{NAME}:{'/'.join(_rows(state))}"


# Drawing.


def _draw_printer(
    draw: ImageDraw.ImageDraw, top: float, left: float, cell: float, sprites: Sprites
) -> None:
    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        if sprites == "other":  # lying on its side
            x0, y0, x1, y1 = y0, x0, y1, x1
        return (
            *(int(left + x0 * cell), int(top + y0 * cell)),
            *(int(left + x1 * cell), int(top + y1 * cell)),
        )

    white, black = (255, 255, 255), (0, 0, 0)
    draw.rectangle(box(0.32, 0.235, 0.665, 0.77), white)  # paper above the body and below it
    draw.rounded_rectangle(box(0.21, 0.38, 0.80, 0.61), max(1, int(0.04 * cell)), white)
    draw.rectangle(box(0.36, 0.475, 0.72, 0.53), black)
    draw.ellipse(box(0.265, 0.41, 0.345, 0.49), black)


@functools.lru_cache(maxsize=32)
def _sheets(level: int, size: int, sprites: Sprites) -> np.ndarray:
    """Whole boards with one kind of thing in every cell, uint8 [len(_KINDS), size, size, 3]."""
    edges, cell = base.cell_edges(level, size), size / level
    sheets = []
    for kind in _KINDS:
        picture = Image.new("RGB", (size, size))
        draw = ImageDraw.Draw(picture)
        for row, column in _cells(level):
            top, left = row * cell, column * cell
            if kind == "T":
                corners = (
                    edges[column] + 1,
                    edges[row] + 1,
                    edges[column + 1] - 1,
                    edges[row + 1] - 1,
                )
                draw.rectangle(corners, (181, 143, 96))
            elif kind == "P":
                _draw_printer(draw, top, left, cell, sprites)
            elif kind == "A":
                corners = ((0.22, 0.2), (0.22, 0.8), (0.78, 0.5))
                if sprites == "other":  # it faces down
                    corners = tuple((y, x) for x, y in corners)
                points = [(int(left + x * cell), int(top + y * cell)) for x, y in corners]
                draw.polygon(points, (255, 24, 16))
        for edge in edges[:-1]:
            draw.line((edge, 0, edge, size), (60, 60, 60))
            draw.line((0, edge, size, edge), (60, 60, 60))
        sheets.append(np.asarray(picture))
    return np.stack(sheets)


def render(state: MiniBehaviourState, size: int = 256, *, sprites: Sprites = "usual") -> np.ndarray:
    """Brown table, white printer and red agent on black with grid lines, uint8 [size, size, 3].

    With the other sprites the agent faces down and the printer lies on its side.
    Raises ValueError below 8 pixels a cell.
    """
    kinds = (
        *((row, column, _KINDS.index("T")) for row, column in state.table),
        (*state.printer, _KINDS.index("P")),
        (*state.agent, _KINDS.index("A")),
    )
    edges = base.cell_edges(state.size, size)
    return base.paste_cells(_sheets(state.size, size, sprites), edges, kinds)


# Words.


def state_lines(state: MiniBehaviourState) -> tuple[str, ...]:
    """What a response states before its plan."""
    return (
        f"Map size: {state.size}x{state.size}",
        f"Agent: {base.show_cell(state.agent)}",
        f"Printer: {base.show_cell(state.printer)}",
        f"Table: {base.show_cells(state.table)}",
        f"Next to printer: {base.show_cells(_neighbours(state, (state.printer,)))}",
        f"Next to table: {base.show_cells(_neighbours(state, state.table))}",
    )


def describe(state: MiniBehaviourState) -> str:
    """The state lines."""
    return "\n".join(state_lines(state))


def facts(state: MiniBehaviourState) -> frozenset[Fact]:
    """Map size, agent, printer and table cells (what lies next to them follows)."""
    return frozenset().union(*(question.facts for question in questions(state)[:4]))


def questions(state: MiniBehaviourState) -> tuple[Question, ...]:
    """Map size, agent, printer, table, the cells next to the last two, and the agent's moves."""
    size, *values = (line.split(": ", 1)[1] for line in state_lines(state))
    near_printer, near_table = (
        _neighbours(state, cells) for cells in ((state.printer,), state.table)
    )
    node = state.agent[0] * state.size + state.agent[1]
    legal = tuple(action for action in _paths(state).successors[node] if action in _MOVES)
    asked = (
        ("agent", "At which (row,column) is the agent, the red triangle?", (state.agent,)),
        ("printer", "At which (row,column) is the printer?", (state.printer,)),
        ("table", "Which cells does the brown table cover?", state.table),
        ("next_to_printer", "Which cells next to the printer are not table?", near_printer),
        ("next_to_table", "Which cells are next to the table?", near_table),
    )
    return (
        Question("map_size", base.ASK_SIZE, size, "size", frozenset({("size", state.size)})),
        *(
            Question(
                name,
                text,
                value,
                "coord" if name in ("agent", "printer") else "cells",
                frozenset((name, cell) for cell in cells),
            )
            for (name, text, cells), value in zip(asked, values, strict=True)
        ),
        Question(
            "legal_moves",
            "Which moves are legal for the agent?",
            base.show_directions(legal),
            "directions",
            frozenset(("legal", way) for way in legal),
        ),
    )


# Plans.


def shortest_plan(state: MiniBehaviourState) -> Plan:
    """A shortest plan, by the base module's tie order. Raises ValueError if there is none."""
    return base.shortest_plan(_paths(state))


def shortest_plans(state: MiniBehaviourState, limit: int = 64) -> tuple[Plan, ...]:
    return base.shortest_plans(_paths(state), limit)


def count_shortest_plans(state: MiniBehaviourState) -> int:
    return base.count_shortest_plans(_paths(state))


def random_shortest_plan(state: MiniBehaviourState, rng: np.random.Generator) -> Plan:
    return base.shortest_plan(_paths(state), rng)


def _run(state: MiniBehaviourState, plan: Plan) -> base.Run:
    paths, count = _paths(state), state.size**2

    def step(node: int, action: str) -> tuple[int | None, Reason | None]:
        if action in paths.successors[node]:
            return paths.successors[node][action], None
        carrying, place = divmod(node, count)
        if action == "pick":
            return None, "pick_while_carrying" if carrying else "pick_not_adjacent"
        if action == "drop":
            return None, "drop_not_adjacent" if carrying else "drop_without_printer"
        row, column = (
            a + b for a, b in zip(divmod(place, state.size), base.DELTAS[action], strict=True)
        )
        if (row, column) in state.table:
            return None, "entered_table"
        return None, "entered_printer" if (row, column) == state.printer else "off_board"

    return base.run(paths, plan, ACTIONS, step)


def play(state: MiniBehaviourState, plan: Plan) -> Outcome:
    """The outcome of a plan: an action that cannot be done fails, the drop ends in success."""
    return base.outcome(_paths(state), _run(state, plan))


def trace(state: MiniBehaviourState, plan: Plan) -> tuple[Cell, ...]:
    """The cell at the start and after each legal action (the same again after pick and drop)."""
    return tuple(divmod(n % state.size**2, state.size) for n in _run(state, plan).nodes)


# Board files.


def _rows(state: MiniBehaviourState) -> list[str]:
    letters = {state.agent: "A", state.printer: "P", **dict.fromkeys(state.table, "T")}
    return [
        "".join(letters.get((row, column), ".") for column in range(state.size))
        for row in range(state.size)
    ]


def _distance_maps(
    state: MiniBehaviourState, goals: tuple[Cell, ...], blocked: tuple[Cell, ...]
) -> dict[Cell, dict[Cell, int]]:
    """For each goal: the moves from each cell that can reach it around the blocked ones."""
    closed = {r * state.size + c for r, c in blocked}
    successors = [
        {} if node in closed else {a: n for a, n in moves if n not in closed}
        for node, moves in enumerate(base.grid_moves(state.size, _MOVES))
    ]
    maps = {}
    for goal in goals:
        distances = base.distances_to(successors, [goal[0] * state.size + goal[1]])
        maps[goal] = {divmod(n, state.size): d for n, d in enumerate(distances) if d >= 0}
    return maps


def _maps_json(maps: dict[Cell, dict[Cell, int]]) -> str:
    def name(cell: Cell) -> str:
        return f"({cell[0]}, {cell[1]})"

    named = {
        name(goal): dict(sorted((name(cell), d) for cell, d in distances.items()))
        for goal, distances in maps.items()
    }
    return base.json_text(dict(sorted(named.items())), compact=True)


def _trajectory(state: MiniBehaviourState, plan: Plan) -> str:
    carrying = ["pick" in plan[:i] and "drop" not in plan[:i] for i in range(len(plan) + 1)]
    steps = zip(trace(state, plan), carrying, strict=True)
    return base.json_text([{"coord": cell, "carrying": held} for cell, held in steps], compact=True)


def _fields(
    state: MiniBehaviourState, plan: Plan, split: str, index: int, seed: int
) -> dict[str, str]:
    near_printer = _neighbours(state, (state.printer,))
    near_table = _neighbours(state, state.table)
    to_printer = _distance_maps(state, near_printer, (*state.table, state.printer))
    to_table = _distance_maps(state, near_table, state.table)
    lengths = {
        (pick, drop): to_printer[pick][state.agent] + to_table[drop][pick] + 2
        for pick in near_printer
        for drop in near_table
        if state.agent in to_printer[pick] and pick in to_table[drop]
    }
    best = [pair for pair, length in lengths.items() if length == len(plan)]
    values = (
        *(NAME, split, state.level, state.size, state.size, "false", index, seed),
        *(_bucket(len(plan), state.level), *state.agent, 0, *state.printer, "true"),
        *map(base.json_text, (state.table, near_printer, near_table, best)),
        *(len(plan), base.json_text(plan), _trajectory(state, plan)),
        *map(_maps_json, (to_printer, to_table)),
    )
    return dict(zip(_KEYS, map(str, values), strict=True))


def to_text(
    state: MiniBehaviourState, *, split: str, index: int, seed: int, plan: Plan | None = None
) -> str:
    """The board as a board file; raises ValueError where it has no plan.

    `plan` is the shortest plan to record; the public generator takes one at random.
    """
    shortest = shortest_plan(state) if plan is None else plan
    if not play(state, shortest).optimal:
        raise ValueError(
            f"plan: got {shortest}, want a shortest one such as {shortest_plan(state)}"
        )
    return base.write_board(_fields(state, shortest, split, index, seed), "grid", _rows(state))


def from_text(text: str, *, source: str) -> MiniBehaviourState:
    """The board in a board file. Raises ValueError with source, key, got and want."""
    board = base.read_board(text, source, _KEYS, "grid")
    base.check_task(board, NAME, MIN_LEVEL, MAX_LEVEL)
    size = len(board.rows)
    letters = "".join(board.rows)
    if {len(row) for row in board.rows} != {size} or set(letters) - set("APT."):
        raise base.bad_board(source, "grid", board.rows, "a square over A P T .")
    for letter in "AP":
        if letters.count(letter) != 1:
            raise base.bad_board(source, "grid", f"{letters.count(letter)} letters {letter}", "1")
    table = tuple(cell for cell in _cells(size) if board.rows[cell[0]][cell[1]] == "T")
    if not table or table != _table_at(*table[0]):
        want = f"{_TABLE_ROWS} rows and {_TABLE_COLUMNS} columns of T"
        raise base.bad_board(source, "grid", f"table cells {table}", want)
    agent, printer = (divmod(letters.index(letter), size) for letter in "AP")
    state = base.read_state(board, lambda: MiniBehaviourState(size, agent, printer, table))
    plan = base.file_plan(board, _paths(state))
    want = _fields(state, plan, *base.read_draw(board))
    base.check_board(
        board, want, functools.partial(play, state), functools.partial(_trajectory, state)
    )
    return state
