"""The simulator of the two public MGSD scorers, for `rules.score_text` alone.

They play boards that no generator of ours would make (ragged, without a table, the start on the
target), so they read board files themselves instead of through an env. Everything of ours plays
by `play` of the env.
"""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

from mgsd_jax.envs.search import Cell

TASKS = ("frozenlake", "maze", "minibehaviour")  # that the public release knows
_MOVES = {"left": (0, -1), "right": (0, 1), "up": (-1, 0), "down": (1, 0)}
_SIDES = {"left": "west", "right": "east", "up": "north", "down": "south"}
_TILES = "a block of rows over S, F, H, G"


@dataclasses.dataclass(frozen=True)
class Board:
    """What the public scorers use of a board file; what a task lacks stays empty."""

    shape: tuple[int, int]
    start: Cell
    goals: frozenset[Cell] = frozenset()
    tiles: Mapping[Cell, str] | None = None  # FrozenLake
    walls: Any = None  # Maze, as in the file: [row][column]{north, south, east, west}
    table: frozenset[Cell] = frozenset()
    printer: Cell | None = None
    pick_cells: frozenset[Cell] = frozenset()
    drop_cells: frozenset[Cell] = frozenset()


@dataclasses.dataclass(frozen=True)
class Trace:
    """How a plan went: `steps` counts the action that failed, `reason` says why it did."""

    success: bool
    reason: str | None
    steps: int


def simulate(board: Board, actions: Sequence[str], *, edge_stops: bool) -> Trace:
    """Plays lower-case action words until success, a failure, or their end.

    `edge_stops`: a FrozenLake move off the board is a failure (else it changes nothing). Walls
    come before the edge of the board, as in the public scorers. Raises ValueError where the plan
    reaches a cell that the board file does not describe.
    """
    cell, carrying = board.start, False
    for steps, action in enumerate(actions, start=1):
        if action == "pick":
            reason = _refused_pick(board, cell, carrying)
            carrying = True
        elif action == "drop":
            reason = _refused_drop(board, cell, carrying)
            if reason is None:
                return Trace(True, None, steps)
        else:
            reason = _refused_move(board, cell, action, carrying)
            if reason is None:
                cell = _moved(cell, action)
            elif reason.startswith("out_of_bounds") and board.tiles is not None and not edge_stops:
                continue
        if reason is None and board.tiles is not None and _tile(board, cell) == "H":
            reason = "fell_into_hole"
        if reason is not None:
            return Trace(False, reason, steps)
        if cell in board.goals and action in _MOVES:
            return Trace(True, None, steps)
    return Trace(False, None, len(actions))


def _moved(cell: Cell, action: str) -> Cell:
    return cell[0] + _MOVES[action][0], cell[1] + _MOVES[action][1]


def _refused_pick(board: Board, cell: Cell, carrying: bool) -> str | None:
    if carrying:
        return "pick_while_carrying"
    return None if cell in board.pick_cells else "pick_not_adjacent_to_printer"


def _refused_drop(board: Board, cell: Cell, carrying: bool) -> str | None:
    if not carrying:
        return "drop_without_printer"
    return None if cell in board.drop_cells else "drop_not_adjacent_to_table"


def _refused_move(board: Board, cell: Cell, action: str, carrying: bool) -> str | None:
    if board.walls is not None and _is_wall(board, cell, action):
        return f"wall_blocked:{action}"
    row, column = _moved(cell, action)
    if not (0 <= row < board.shape[0] and 0 <= column < board.shape[1]):
        return f"out_of_bounds:{action}"
    if (row, column) in board.table:
        return "entered_table"
    if (row, column) == board.printer and not carrying:
        return "entered_printer"
    return None


def _is_wall(board: Board, cell: Cell, action: str) -> bool:
    try:
        return bool(board.walls[cell[0]][cell[1]][_SIDES[action]])
    except (LookupError, TypeError):
        raise ValueError(
            f"layout_json: got no {_SIDES[action]!r} of cell {cell}, "
            "want [row][column]{north, south, east, west}"
        ) from None


def _tile(board: Board, cell: Cell) -> str:
    assert board.tiles is not None
    if cell not in board.tiles:
        raise ValueError(f"map: no tile found at {cell}, want {board.shape} tiles")
    return board.tiles[cell]


def read_fields(text: str) -> tuple[dict[str, str], tuple[str, ...] | None]:
    """The `key=value` lines and the rows of the FrozenLake map, None without a `map:` line.

    As forgiving as the public scorers: blanks around lines and blank rows do not count, and
    whatever follows the first block line belongs to the block.
    """
    fields: dict[str, str] = {}
    lines = [line.strip() for line in text.splitlines()]
    for number, line in enumerate(lines):
        if line in ("map:", "layout:", "grid:"):
            rows = tuple(row for row in lines[number + 1 :] if row)
            return fields, rows if line == "map:" else None
        if "=" in line:
            key, value = line.split("=", 1)
            fields[key.strip()] = value.strip()
    return fields, None


def read_board(
    task: str, fields: Mapping[str, str], rows: tuple[str, ...] | None, *, as_record: bool
) -> Board:
    """The board of a file's `fields` and map `rows`; raises ValueError naming the bad key.

    `as_record` takes size, positions and neighbour cells from the keys that the public evaluator
    reads (`level`, `start_pos`, `printer_neighbors`, ...), else from those of the public reward.
    """
    if task == "frozenlake":
        return _read_frozenlake(fields, rows, as_record)
    level = integer(fields, "level")
    if level < 1:
        raise ValueError(f"level: got {level}, want at least 1")
    if task == "maze":
        walls = _json(fields, "layout_json")
        if as_record:
            start = divmod(integer(fields, "start_pos"), level)
            target = divmod(integer(fields, "target_pos"), level)
        else:
            start, target = _cell(fields, "start"), _cell(fields, "target")
        return Board((level, level), start, frozenset({target}), walls=walls)
    printer, table = _cell(fields, "printer"), _cells(fields, "table_pos")
    pick_cells, drop_cells = _around(frozenset({printer})), _around(table)
    if as_record:
        # An empty list is no list: every board has such cells.
        pick_cells = _cells(fields, "printer_neighbors") or pick_cells
        drop_cells = _cells(fields, "table_neighbors") or drop_cells
    return Board(
        (level, level),
        _cell(fields, "start"),
        table=table,
        printer=printer,
        pick_cells=pick_cells,
        drop_cells=drop_cells,
    )


def _read_frozenlake(
    fields: Mapping[str, str], rows: tuple[str, ...] | None, as_record: bool
) -> Board:
    if not rows:
        raise ValueError(f"map: no rows found, want {_TILES}")
    tiles = {(r, c): tile for r, row in enumerate(rows) for c, tile in enumerate(row)}
    starts = [cell for cell, tile in tiles.items() if tile == "S"]
    if not starts:
        raise ValueError(f"map: got {rows} without a start, want {_TILES}")
    goals = frozenset(cell for cell, tile in tiles.items() if tile == "G")
    level = integer(fields, "level") if as_record else 0
    # The reward takes the width of the first row, however ragged the rest.
    shape = (level, level) if as_record else (len(rows), len(rows[0]))
    return Board(shape, starts[0], goals, tiles)


def _around(cells: frozenset[Cell]) -> frozenset[Cell]:
    return frozenset(_moved(cell, move) for cell in cells for move in _MOVES)


def _field(fields: Mapping[str, str], key: str) -> str:
    if key not in fields:
        raise ValueError(f"{key}: got no such line, want {key}=...")
    return fields[key]


def integer(fields: Mapping[str, str], key: str) -> int:
    """The integer of a key; raises ValueError naming the key."""
    text = _field(fields, key)
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{key}: got {text!r}, want an integer") from None


def _cell(fields: Mapping[str, str], name: str) -> Cell:
    return integer(fields, f"{name}_row"), integer(fields, f"{name}_col")


def _json(fields: Mapping[str, str], key: str) -> Any:
    text = _field(fields, key)
    try:
        return json.loads(text)
    except ValueError:
        raise ValueError(f"{key}: got {text[:80]!r}, want JSON") from None


def _cells(fields: Mapping[str, str], key: str) -> frozenset[Cell]:
    value = _json(fields, key)
    try:
        return frozenset((int(row), int(column)) for row, column in value)
    except (TypeError, ValueError):
        raise ValueError(f"{key}: got {value!r}, want a list of [row, column]") from None
