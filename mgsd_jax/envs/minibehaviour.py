"""MiniBehaviour: walk to the printer, pick it up, carry it to the table, drop it there.

The agent stands next to a thing to handle it. The table is never walked on; the printer's cell is
floor once the printer is in hand.
"""

import dataclasses
import functools
from collections.abc import Iterable, Sequence

import numpy as np
from PIL import Image, ImageDraw

from mgsd_jax.envs import base, files, search
from mgsd_jax.envs.base import Question, Sprites
from mgsd_jax.envs.search import Cell, Paths, Plan

_MOVES = ("up", "down", "left", "right")  # breaks ties between plans, as the public solver does
_TABLE_ROWS, _TABLE_COLUMNS = 2, 3
_KINDS = ".TPA"
HANDS = {
    **dict.fromkeys(("PICK", "PICKUP", "PICK_UP", "PICK-UP", "PICK UP", "GRAB"), "pick"),
    **dict.fromkeys(("DROP", "PUT", "PLACE"), "drop"),
    **dict.fromkeys(("PUTDOWN", "PUT_DOWN", "PUT-DOWN", "PUT DOWN"), "drop"),
}


@dataclasses.dataclass(frozen=True)
class MiniBehaviourState:
    """Where the agent, the printer and the table stand; table cells sorted row-major."""

    size: int
    agent: Cell
    printer: Cell
    table: tuple[Cell, ...]

    def __post_init__(self) -> None:
        cells = (self.agent, self.printer, *self.table)
        base.check_inside(self.size, "grid", cells)
        if len(set(cells)) != len(cells) or not self.table:
            raise ValueError(f"grid: got {cells}, want an agent, a printer and a table apart")
        if list(self.table) != sorted(self.table):
            raise ValueError(f"table: got {self.table}, want it sorted by row, then column")


def _node(state: MiniBehaviourState, cell: Cell) -> int:
    return cell[0] * state.size + cell[1]


def _neighbours(state: MiniBehaviourState, cells: tuple[Cell, ...]) -> tuple[Cell, ...]:
    """The cells next to some cells, on the board and not of the table, row-major."""
    moves = search.grid_moves(state.size, _MOVES)
    near = {divmod(n, state.size) for cell in cells for _, n in moves[_node(state, cell)]}
    return tuple(sorted(near - set(state.table) - set(cells)))


def _floor_moves(state: MiniBehaviourState, blocked: Iterable[Cell]) -> list[dict[str, int]]:
    floor = set(range(state.size**2)) - {_node(state, cell) for cell in blocked}
    return search.floor_moves(state.size, _MOVES, floor)


@functools.lru_cache(maxsize=1024)
def _paths(state: MiniBehaviourState) -> Paths:
    """Nodes: the cells with empty hands, then with the printer in hand, then after the drop."""
    count = state.size**2
    empty = _floor_moves(state, (*state.table, state.printer))
    carrying = [
        {a: n + count for a, n in moves.items()} for moves in _floor_moves(state, state.table)
    ]
    for cell in _neighbours(state, (state.printer,)):
        empty[_node(state, cell)]["pick"] = _node(state, cell) + count
    for cell in _neighbours(state, state.table):
        carrying[_node(state, cell)]["drop"] = _node(state, cell) + 2 * count
    successors = empty + carrying + [{} for _ in range(count)]
    distances = search.distances_to(successors, range(2 * count, 3 * count))
    cells = search.grid_cells(state.size) * 3
    return Paths(successors, distances, _node(state, state.agent), cells)


def _refuse(state: MiniBehaviourState, node: int, action: str) -> tuple[int | None, str | None]:
    carrying, place = divmod(node, state.size**2)
    if action == "pick":
        return None, "pick_while_carrying" if carrying else "pick_not_adjacent"
    if action == "drop":
        return None, "drop_not_adjacent" if carrying else "drop_without_printer"
    (row, column), (down, across) = divmod(place, state.size), search.DELTAS[action]
    if (row + down, column + across) in state.table:
        return None, "entered_table"
    is_printer = (row + down, column + across) == state.printer
    return None, "entered_printer" if is_printer else "off_board"


def _bucket(length: int, level: int) -> str:
    if length <= level - 1:
        return "easy"
    return "medium" if length <= level + 1 else "hard"


def generate(rng: np.random.Generator, level: int) -> MiniBehaviourState:
    """A random board: the 2x3 table anywhere, then printer and agent on any free cells.

    Every such board is solvable: the floor around a table is connected.
    """
    ENV.check_level(level)
    top = int(rng.integers(level - _TABLE_ROWS + 1))
    left = int(rng.integers(level - _TABLE_COLUMNS + 1))
    table = _table_at(top, left)
    floor = [cell for cell in search.grid_cells(level) if cell not in table]
    printer = floor.pop(rng.integers(len(floor)))
    agent = floor[rng.integers(len(floor))]
    return MiniBehaviourState(level, agent, printer, table)


def _table_at(top: int, left: int) -> tuple[Cell, ...]:
    return tuple((top + r, left + c) for r in range(_TABLE_ROWS) for c in range(_TABLE_COLUMNS))


def _count(level: int) -> int:
    """Tables, then printers, then agents."""
    tables = (level - _TABLE_ROWS + 1) * (level - _TABLE_COLUMNS + 1)
    floor = level * level - _TABLE_ROWS * _TABLE_COLUMNS
    return tables * floor * (floor - 1)


def _key(state: MiniBehaviourState) -> str:
    return f"{ENV.name}:{'/'.join(_rows(state))}"


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
        for row, column in search.grid_cells(level):
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
    base.cell_edges(state.size, size)
    kinds = [[_KINDS.index(letter) for letter in row] for row in _rows(state)]
    return base.paste_cells(_sheets(state.size, size, sprites), kinds)


# Words.


def _questions(state: MiniBehaviourState) -> tuple[Question, ...]:
    near_printer = _neighbours(state, (state.printer,))
    moves = _paths(state).successors[_node(state, state.agent)]
    return (
        base.ask_size(state.size),
        base.ask_cell(
            "agent", "At which (row,column) is the agent, the red triangle?", state.agent
        ),
        base.ask_cell("printer", "At which (row,column) is the printer?", state.printer),
        base.ask_cells("table", "Which cells does the brown table cover?", state.table),
        base.ask_cells(
            "next_to_printer", "Which cells next to the printer are not table?", near_printer
        ),
        base.ask_cells(
            "next_to_table",
            "Which cells are next to the table?",
            _neighbours(state, state.table),
        ),
        base.ask_moves("Which moves are legal for the agent?", (a for a in moves if a in _MOVES)),
    )


def _route(plan: Plan, cells: Sequence[Cell]) -> str:
    """Picking does not move the agent: its cell ends the first half and starts the second."""
    moves = plan.index("pick")
    there = [c for i, c in enumerate(cells) if i >= moves and (i == moves or c != cells[i - 1])]
    here = base.show_cells(cells[: moves + 1])
    return f"{base.ROUTE_START} {here}, pick up, go through {base.show_cells(there)}, and drop."


def _from_facts(size: int, named: base.NamedCells) -> MiniBehaviourState:
    if len(named["table"]) != _TABLE_ROWS * _TABLE_COLUMNS:
        raise ValueError(f"table: got {len(named['table'])} cells, want 6")
    agent, printer = base.only_cell(named, "agent"), base.only_cell(named, "printer")
    return MiniBehaviourState(size, agent, printer, tuple(sorted(named["table"])))


def _disturb(
    state: MiniBehaviourState, rng: np.random.Generator, share: float
) -> MiniBehaviourState:
    table = state.table
    if rng.random() < share:
        (top, left), (bottom, right) = table[0], table[-1]
        height, width = bottom - top + 1, right - left + 1
        corners = [
            (row, column)
            for row in range(state.size - height + 1)
            for column in range(state.size - width + 1)
            if (row, column) != (top, left)
        ]
        if corners:
            row, column = corners[rng.integers(len(corners))]
            table = tuple((r - top + row, c - left + column) for r, c in table)
    # What stands where the table is now has to move.
    agent, printer = (
        base.misplace(cell, [*table, other], state.size, rng, 1.0 if cell in table else share)
        for cell, other in ((state.agent, state.printer), (state.printer, state.agent))
    )
    if agent == printer:
        printer = base.misplace(printer, [*table, agent], state.size, rng, 1.0)
    return dataclasses.replace(state, agent=agent, printer=printer, table=table)


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
    successors = _floor_moves(state, blocked)
    maps = {}
    for goal in goals:
        distances = search.distances_to(successors, [_node(state, goal)])
        maps[goal] = {divmod(n, state.size): d for n, d in enumerate(distances) if d >= 0}
    return maps


def _maps_json(maps: dict[Cell, dict[Cell, int]]) -> str:
    named = {
        str(goal): dict(sorted((str(cell), d) for cell, d in distances.items()))
        for goal, distances in maps.items()
    }
    return files.json_text(dict(sorted(named.items())), compact=True)


def _trajectory(plan: Plan, cells: Iterable[Cell]) -> str:
    carrying = ["pick" in plan[:i] and "drop" not in plan[:i] for i in range(len(plan) + 1)]
    steps = [{"coord": c, "carrying": held} for c, held in zip(cells, carrying, strict=True)]
    return files.json_text(steps, compact=True)


def _fields(
    state: MiniBehaviourState, plan: Plan, board: files.BoardText | None
) -> dict[str, object]:
    del board  # everything follows from the state
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
    return {
        **{"grid_rows": state.size, "grid_cols": state.size, "outer_ring": "false"},
        **{"start_row": state.agent[0], "start_col": state.agent[1], "start_dir": 0},
        **{"printer_row": state.printer[0], "printer_col": state.printer[1]},
        "difficulty_bucket": _bucket(len(plan), state.size),
        "printer_traversable_after_pick": "true",
        "table_pos": files.json_text(state.table),
        "printer_neighbors": files.json_text(near_printer),
        "table_neighbors": files.json_text(near_table),
        "best_paths": files.json_text(best),
        "distance_map_to_printer": _maps_json(to_printer),
        "distance_map_to_table": _maps_json(to_table),
    }


def _read(board: files.BoardText) -> MiniBehaviourState:
    size, letters = len(board.rows), "".join(board.rows)
    if {len(row) for row in board.rows} != {size} or set(letters) - set("APT."):
        raise files.bad_board("grid", board.rows, "a square over A P T .")
    for letter in "AP":
        if letters.count(letter) != 1:
            raise files.bad_board("grid", f"{letters.count(letter)} letters {letter}", "1")
    table = tuple(divmod(i, size) for i, letter in enumerate(letters) if letter == "T")
    if not table or table != _table_at(*table[0]):
        want = f"{_TABLE_ROWS} rows and {_TABLE_COLUMNS} columns of T"
        raise files.bad_board("grid", f"table cells {table}", want)
    agent, printer = (divmod(letters.index(letter), size) for letter in "AP")
    return MiniBehaviourState(size, agent, printer, table)


ENV: base.Env[MiniBehaviourState] = base.Env(
    name="minibehaviour",
    title="MiniBehaviour",
    levels=range(4, 33),
    actions={**base.MOVES, "pick": "PICK", "drop": "DROP"},
    words=HANDS,
    reasons={
        "off_board": "left the board",
        "entered_table": "ran into the table",
        "entered_printer": "ran into the printer",
        "pick_while_carrying": "picked with full hands",
        "pick_not_adjacent": "picked away from the printer",
        "drop_without_printer": "dropped without the printer",
        "drop_not_adjacent": "dropped away from the table",
    },
    labels={"agent": "agent", "printer": "printer", "table": "table"},
    wording=base.Wording(
        rules=(
            "Let the agent carry the printer to the table.",
            base.CELLS_RULE,
            base.MOVES_RULE.format("agent"),
            "PICK takes the printer from a neighbouring cell; DROP puts it on a neighbouring "
            "table.",
            "The table blocks the way, and so does the printer until it is taken.",
            "Finish with DROP in as few actions as possible.",
        ),
        legend="The agent is the red triangle, the printer is white, table cells are brown.",
        form=(
            *("Map size: NxN", "Agent: cell", "Printer: cell", "Table: cells"),
            *("Next to printer: cells", "Next to table: cells"),
        ),
        route="I go through (2,0) (1,0), pick up, go through (1,0) (1,1), and drop.",
        answer="U,PICK,R,DROP",
    ),
    generate=generate,
    count=_count,
    key=_key,
    paths=_paths,
    refuse=_refuse,
    questions=_questions,
    from_facts=_from_facts,
    disturb=_disturb,
    render=render,
    file=files.FileFormat(
        keys=(
            *("task", "split", "level", "grid_rows", "grid_cols", "outer_ring", "index", "seed"),
            *("difficulty_bucket", "start_row", "start_col", "start_dir"),
            *("printer_row", "printer_col", "printer_traversable_after_pick", "table_pos"),
            *("printer_neighbors", "table_neighbors", "best_paths"),
            *("path_length", "solution_actions", "trajectory_states"),
            *("distance_map_to_printer", "distance_map_to_table"),
        ),
        block="grid",
        rows=_rows,
        read=_read,
        fields=_fields,
        trajectory=_trajectory,
    ),
    route=_route,
    options={"bucket": None},
)
