"""File formats of public benchmarks: maps of VSP and DiffThinker, rows of VisualPlanning.

Every board is checked as it is read: a benchmark that differs from what it says of itself (shape,
neighbours, optimal length) would give numbers that cannot be compared. Every error is a ValueError
that names file, line and key.
"""

import pathlib
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from mgsd_jax.checks.fields import field, read_json, read_line
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS, AnyState
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState
from mgsd_jax.envs.search import Cell

_TILES = {"@": "S", "*": "G", "#": "H", "_": "F"}
_LETTERS = {"U": "up", "D": "down", "L": "left", "R": "right"}
_WALLS = {"north": 1, "south": 2, "west": 4, "east": 8}
Row = Mapping[str, object]  # a JSON object
Check = Callable[[pathlib.Path, str, AnyState], None]


class Case(NamedTuple):
    """One board of a benchmark, under its name in the public MGSD evaluator.

    By that name results can be joined row by row.
    """

    id: str
    board: Board


def _fail(where: object, got: object, want: str) -> ValueError:
    return ValueError(f"{where}: got {got!r}, want {want}")


def read_text(path: pathlib.Path) -> str:
    """The text of a file. Raises ValueError where it is missing or no UTF-8."""
    if not path.is_file():
        raise ValueError(f"{path}: not found")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error.reason} at byte {error.start}, want UTF-8") from None


def shortest_plan(where: object, task: str, state: AnyState) -> tuple[str, ...]:
    """A shortest plan. Raises ValueError where the board has none."""
    try:
        return ENVS[task].shortest_plan(state)
    except ValueError as error:
        raise ValueError(f"{where}: got a board without a plan ({error}), want one") from None


# ------------------------------------------------------------------------ maps, a file a board


class _Maps(NamedTuple):
    """How the maps of a task lie in their folder."""

    files: str  # pattern
    plans: str  # a file of reference plans, which may be absent
    key: str  # of a board's plan, with the stem of its file filled in
    read: Callable[[pathlib.Path, int], AnyState]


def read_vsp(table: pathlib.Path) -> list[Case]:
    """FrozenLake boards of one `level{L}/table`, whose pictures are in `level{L}/img`."""
    folder = table.parent
    level = int(_match(folder, r"level(\d+)")[1])
    maps = _MAPS["frozenlake"]
    check = _read_plans(folder, maps)
    cases: list[Case] = []
    for file, found in _named(table, "*.txt", r"(\d+)\.txt"):
        index = int(found[1])
        name = f"frozenlake_diffthinker_vsp_level{level}_{index:04d}"
        board = Board("frozenlake", level, index, None, str(folder / "img" / f"{index}.png"))
        cases.append(Case(name, _read_map(file, board, maps, check)))
    return _sorted(cases, table)


def read_diffthinker(folder: pathlib.Path, *, task: str, level: int) -> list[Case]:
    """Boards of one test set of DiffThinker, whose pictures are `{name}.png`."""
    maps = _MAPS[task]
    check = _read_plans(folder, maps)
    cases: list[Case] = []
    names = rf"{level}_(\d+)_(?:[\d.]+_)?(\d+)\.txt"
    for file, found in _named(folder, maps.files, names, f"{level}_17_001.txt"):
        index = int(found[1]) * 1000 + int(found[2])
        board = Board(task, level, index, None, str(folder / f"{file.stem}.png"))
        name = f"{task}_diffthinker_{file.stem}"
        cases.append(Case(name, _read_map(file, board, maps, check)))
    return _sorted(cases, folder)


def _named(
    folder: pathlib.Path, files: str, pattern: str, example: str = ""
) -> list[tuple[pathlib.Path, re.Match[str]]]:
    return [(file, _match(file, pattern, example)) for file in sorted(folder.glob(files))]


def _match(path: pathlib.Path, pattern: str, example: str = "") -> re.Match[str]:
    found = re.fullmatch(pattern, path.name)
    if found is None:
        raise _fail(path.parent, path.name, f"names like {example or pattern}")
    return found


def _sorted(cases: Sequence[Case], folder: pathlib.Path) -> list[Case]:
    if not cases:
        raise ValueError(f"{folder}: no boards found, want .txt files")
    return sorted(cases, key=lambda case: case.board.index)


def _read_plans(folder: pathlib.Path, maps: _Maps) -> Check:
    """A check of a board (its file and state) against the reference plans of its folder, if any."""
    path = folder / maps.plans
    plans = read_json(path) if path.is_file() else None

    def check(file: pathlib.Path, task: str, state: AnyState) -> None:
        shortest_plan(file, task, state)
        if plans is None:
            return
        key = maps.key.format(file.stem)
        letters = plans.get(key)
        if not isinstance(letters, str) or not letters or set(letters) - set(_LETTERS):
            raise _fail(f"{path}, {key}", letters, "a plan over U, D, L, R")
        outcome = ENVS[task].play(state, tuple(_LETTERS[letter] for letter in letters))
        if not outcome.optimal:
            got = f"{letters} ({outcome.reason})"
            raise _fail(f"{path}, {key}", got, "a shortest plan to the goal")

    return check


def _read_map(file: pathlib.Path, board: Board, maps: _Maps, check: Check) -> Board:
    """The board with its state, whose picture has to be there."""
    state = maps.read(file, board.level)
    check(file, board.task, state)
    if not pathlib.Path(str(board.picture_path)).is_file():
        raise ValueError(f"{board.picture_path}: not found, the picture of {file.name}")
    return board._replace(state=state)


def _read_table(path: pathlib.Path, level: int) -> FrozenLakeState:
    """A Markdown table: a header, then `| Row 1 | _ | * |` with a column more than the board."""
    rows: list[str] = []
    for number, line in enumerate(read_text(path).splitlines(), start=1):
        names = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if number == 1 or not line.strip():
            continue
        if names[0] != f"Row {len(rows) + 1}" or len(names) != level + 1:
            raise _fail(f"{path}, line {number}", line, f"'| Row {len(rows) + 1} |', {level} tiles")
        for column, tile in enumerate(names[1:], start=1):
            if tile not in _TILES:
                raise _fail(f"{path}, line {number}, Col {column}", tile, f"one of {[*_TILES]}")
        rows.append("".join(_TILES[tile] for tile in names[1:]))
    if len(rows) != level:
        raise _fail(path, f"{len(rows)} rows", f"{level} rows as its folder says")
    return _frozenlake(path, rows)


def _read_masks(path: pathlib.Path, level: int) -> MazeState:
    """A maze as lines of numbers: size, start, goal, rows of wall masks (N 1, S 2, W 4, E 8)."""
    lines = [line.split() for line in read_text(path).splitlines() if line.strip()]
    widths = [len(line) for line in lines]
    if widths != [1, 2, 2, *[level] * level]:
        raise _fail(path, f"lines of {widths} numbers", f"1, 2, 2 and {level} rows of {level}")
    for number, line in enumerate(lines, start=1):
        for text in line:
            if not re.fullmatch("[0-9]{1,2}", text) or int(text) >= (16 if number > 3 else 33):
                raise _fail(f"{path}, line {number}", text, "a size, a cell, or a mask of 0..15")
    (size,), start, target, *masks = [[int(text) for text in line] for line in lines]
    if size != level:
        raise _fail(f"{path}, line 1", size, f"{level} as its folder says")
    ends = (_cell(f"{path}, start", start, level), _cell(f"{path}, goal", target, level))
    return _maze(path, masks, *ends)


_MAPS = {
    "frozenlake": _Maps("table/*.txt", "metadata.json", "{}.png", _read_table),
    "maze": _Maps("*.txt", "path.json", "{}", _read_masks),
}


def _frozenlake(where: object, rows: Sequence[str]) -> FrozenLakeState:
    for tile in "SG":
        count = sum(row.count(tile) for row in rows)
        if count != 1:
            raise _fail(f"{where}, layout", f"{count} tiles {tile}", "just one")
    return FrozenLakeState(tuple(rows))


def _maze(where: object, masks: list[list[int]], start: Cell, target: Cell) -> MazeState:
    """The maze, whose cells must agree on the walls between them."""
    level = len(masks)
    for r in range(level):
        for c in range(level):
            east = c + 1 == level or bool(masks[r][c + 1] & _WALLS["west"])
            south = r + 1 == level or bool(masks[r + 1][c] & _WALLS["north"])
            for side, want in (("east", east), ("south", south)):
                if bool(masks[r][c] & _WALLS[side]) != want:
                    raise _fail(f"{where}[{r}][{c}].{side}", not want, "its neighbour's")
        if not (masks[r][0] & _WALLS["west"] and masks[0][r] & _WALLS["north"]):
            raise _fail(where, f"an open edge at {r}", "walls around the maze")
    return MazeState(walls=tuple(tuple(row) for row in masks), start=start, target=target)


# ------------------------------------------------------------ VisualPlanning, a JSON line a board


def read_visualplanning(file: pathlib.Path, *, task: str) -> list[Case]:
    """Boards of one VisualPlanning file, a JSON object a line."""
    reader, split = _ROWS[task], file.name.removesuffix("_dataset.jsonl")
    env = ENVS[task]
    cases: list[Case] = []
    for number, line in enumerate(read_text(file).splitlines()):
        where = f"{file}, line {number + 1}"
        row = read_line(line.encode(), where)
        meta = field(row, "meta", dict, where)
        level = field(meta, "level", int, where)
        if level not in env.levels:
            raise _fail(f"{where}, level", level, f"{env.levels[0]}..{env.levels[-1]}")
        state = reader.read(where, meta, level)
        actions = len(field(row, "input_state", list, where)) - 1
        shortest = len(shortest_plan(where, task, state))
        if actions != shortest:
            raise _fail(f"{where}, input_state", f"{actions} actions", f"{shortest}, the shortest")
        index = field(meta, "idx", int, where) if reader.has_ids and "idx" in meta else number
        name = f"{task}_{split}_level{level}_{index:04d}"
        cases.append(Case(name, Board(task, level, index, state, None)))
    if not cases:
        raise _fail(file, "an empty file", "a JSON object a line")
    return cases


def _read_frozenlake(where: str, meta: Row, level: int) -> FrozenLakeState:
    layout = _square(where, meta, level)
    for r, row in enumerate(layout):
        for c, tile in enumerate(row):
            if tile not in ("S", "F", "H", "G"):
                raise _fail(f"{where}, layout[{r}][{c}]", tile, "one of S, F, H, G")
    state = _frozenlake(where, ["".join(row) for row in layout])
    for key, tile in (("start_pos", "S"), ("target_pos", "G")):
        row, column = _position(where, meta, key, level)
        if state.rows[row][column] != tile:
            raise _fail(f"{where}, {key}", (row, column), f"the cell of {tile} in layout")
    return state


def _read_maze(where: str, meta: Row, level: int) -> MazeState:
    masks = [[0] * level for _ in range(level)]
    for r, row in enumerate(_square(where, meta, level)):
        for c, cell in enumerate(row):
            place = f"layout[{r}][{c}]"
            sides = field({place: cell}, place, dict, where)
            masks[r][c] = sum(
                mask * field(sides, side, bool, f"{where}, {place}")
                for side, mask in _WALLS.items()
            )
    start, target = (_position(where, meta, key, level) for key in ("start_pos", "target_pos"))
    return _maze(f"{where}, layout", masks, start, target)


def _read_minibehaviour(where: str, meta: Row, level: int) -> MiniBehaviourState:
    agent, printer = (
        _cell(f"{where}, {key}", field(meta, key, list, where), level)
        for key in ("start_pos", "printer_pos")
    )
    table = _cells(where, meta, "table_pos", level)
    rows, columns = ({cell[axis] for cell in table} for axis in (0, 1))
    spans = [max(numbers) - min(numbers) + 1 for numbers in (rows, columns) if numbers]
    if len(table) != 6 or sorted(spans) != [2, 3]:
        raise _fail(f"{where}, table_pos", sorted(table), "a block of 2 x 3 cells")
    if len({agent, printer} | table) != 8:
        raise _fail(f"{where}, start_pos", agent, f"a cell off printer {printer} and table")
    inside = {(r, c) for r in range(level) for c in range(level)}
    for key, cells in (("printer_neighbors", {printer}), ("table_neighbors", table)):
        # Public scoring reads these lists, ours the geometry: they have to agree.
        near = {
            (r, c)
            for r, c in inside - table
            if any(abs(r - row) + abs(c - column) == 1 for row, column in cells)
        }
        if _cells(where, meta, key, level) != near:
            raise _fail(f"{where}, {key}", meta[key], f"the free neighbours {sorted(near)}")
    return MiniBehaviourState(size=level, agent=agent, printer=printer, table=tuple(sorted(table)))


class _Rows(NamedTuple):
    """How the rows of a task are read."""

    read: Callable[[str, Row, int], AnyState]
    has_ids: bool = False  # a row carries its own number, as rows were dropped from the file


_ROWS = {
    "frozenlake": _Rows(_read_frozenlake),
    "maze": _Rows(_read_maze),
    "minibehaviour": _Rows(_read_minibehaviour, has_ids=True),
}


def _square(where: str, meta: Row, level: int) -> list[list[Any]]:
    layout = field(meta, "layout", list, where)
    widths = [len(row) if isinstance(row, list | str) else None for row in layout]
    if widths != [level] * level:
        raise _fail(f"{where}, layout", f"rows of {widths}", f"{level} rows of {level} cells")
    return [list(row) for row in layout]


def _position(where: str, meta: Row, key: str, level: int) -> Cell:
    number = field(meta, key, int, where)
    if not 0 <= number < level * level:
        raise _fail(f"{where}, {key}", number, f"row * {level} + column")
    return divmod(number, level)


def _cell(where: str, value: object, level: int) -> Cell:
    if isinstance(value, list) and [type(number) for number in value] == [int, int]:
        row, column = value
        if 0 <= row < level and 0 <= column < level:
            return row, column
    raise _fail(where, value, f"[row, column] within 0..{level - 1}")


def _cells(where: str, meta: Row, key: str, level: int) -> set[Cell]:
    return {_cell(f"{where}, {key}", value, level) for value in field(meta, key, list, where)}
