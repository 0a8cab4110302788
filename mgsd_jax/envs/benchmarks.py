"""The two public benchmark formats as boards: FrozenLake maps of VSP, and VisualPlanning rows.

Case ids are those of the public MGSD evaluator, so that results can be joined row by row. Every
board is checked when it is read: a benchmark that differs from what it says of itself (shape,
neighbours, optimal length) would give numbers that cannot be compared.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mgsd_jax.envs import ENVS, frozenlake
from mgsd_jax.envs.base import Cell
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState

_TILES = {"@": "S", "*": "G", "#": "H", "_": "F"}
_LETTERS = {"U": "up", "D": "down", "L": "left", "R": "right"}
_WALLS = {"north": 1, "south": 2, "west": 4, "east": 8}
_ORIGIN = (
    "benchmark files are not part of this package: the FrozenLake maps (level3..level8 with img, "
    "table and metadata.json) come with the VSP benchmark, the dataset/<task>/tokenized_dataset "
    "files with VisualPlanning"
)


@dataclasses.dataclass(frozen=True)
class Case:
    """One board of a benchmark."""

    id: str
    task: str
    level: int
    state: Any
    optimal: int  # number of actions of a shortest plan
    picture_path: str | None  # the benchmark's own picture, None where it has none
    index: int  # the number in its id, unique within task and level


def read_benchmark(folder: str | pathlib.Path) -> tuple[Case, ...]:
    """All boards of a folder of either format, by level and number, or in the order of the files.

    Raises ValueError naming file, line and key of the first thing that is not as it should be.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: got no such folder, want a benchmark ({_ORIGIN})")
    if any(root.glob("level*/table")):
        return read_vsp(root)
    files = sorted(root.glob("dataset/*/tokenized_dataset/SFT/test_dataset.jsonl"))
    if not files:
        raise ValueError(
            f"{root}: got neither level*/table nor "
            f"dataset/*/tokenized_dataset/SFT/test_dataset.jsonl, want one of them ({_ORIGIN})"
        )
    return tuple(case for file in files for case in read_visualplanning(file, file.parts[-4]))


def benchmark_keys(folders: Iterable[str | pathlib.Path]) -> frozenset[str]:
    """Content keys of all boards of these benchmark folders, for `exclude` of a draw."""
    return frozenset(
        ENVS[case.task].key(case.state) for folder in folders for case in read_benchmark(folder)
    )


def _fail(where: str, got: Any, want: str) -> ValueError:
    return ValueError(f"{where}: got {got!r}, want {want}")


def read_vsp(folder: str | pathlib.Path) -> tuple[Case, ...]:
    """FrozenLake boards of `level{L}/{img,table,metadata.json}`, by level and number."""
    root = pathlib.Path(folder)
    cases: list[Case] = []
    for level, level_folder in sorted(_numbered(root, "level*", r"level(\d+)")):
        metadata_file = level_folder / "metadata.json"
        metadata = _object(metadata_file, _parse(str(metadata_file), _text(metadata_file)))
        for number, table in sorted(_numbered(level_folder / "table", "*.txt", r"(\d+)\.txt")):
            state = _read_table(table, level)
            plan = _field(str(metadata_file), metadata, f"{number}.png", str)
            optimal = _check_plan(f"{metadata_file}, {number}.png", state, plan)
            picture = level_folder / "img" / f"{number}.png"
            if not picture.is_file():
                raise ValueError(f"{picture}: got no such file, want the picture of {table.name}")
            name = f"frozenlake_diffthinker_vsp_level{level}_{number:04d}"
            cases.append(Case(name, "frozenlake", level, state, optimal, str(picture), number))
    if not cases:
        raise ValueError(f"{root}: got no level*/table/*.txt, want FrozenLake maps ({_ORIGIN})")
    return tuple(cases)


def _numbered(folder: pathlib.Path, pattern: str, name: str) -> Iterator[tuple[int, pathlib.Path]]:
    for path in folder.glob(pattern):
        match = re.fullmatch(name, path.name)
        if match is None:
            raise _fail(str(folder), path.name, f"names like {name}")
        yield int(match[1]), path


def _text(path: pathlib.Path) -> str:
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, want it ({_ORIGIN})")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error.reason} at byte {error.start}, want UTF-8") from None


def _read_table(path: pathlib.Path, level: int) -> FrozenLakeState:
    """A Markdown table: a header, then `| Row 1 | _ | * |` with a column more than the board."""
    rows: list[str] = []
    for number, line in enumerate(_text(path).splitlines(), start=1):
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
        raise _fail(str(path), f"{len(rows)} rows", f"{level} rows as its folder says")
    return _frozenlake(str(path), rows)


def _frozenlake(where: str, rows: list[str]) -> FrozenLakeState:
    for tile in "SG":
        count = sum(row.count(tile) for row in rows)
        if count != 1:
            raise _fail(f"{where}, layout", f"{count} tiles {tile}", "just one")
    return FrozenLakeState(tuple(rows))


def _check_plan(where: str, state: FrozenLakeState, letters: str) -> int:
    """The number of moves of a reference plan, which must reach the goal and be a shortest one."""
    if not letters or set(letters) - set(_LETTERS):
        raise _fail(where, letters, "a plan over U, D, L, R")
    outcome = frozenlake.play(state, tuple(_LETTERS[letter] for letter in letters))
    if not outcome.optimal:
        raise _fail(where, f"{letters} ({outcome.reason})", "a shortest plan to the goal")
    return outcome.steps


def read_visualplanning(file: str | pathlib.Path, task: str) -> tuple[Case, ...]:
    """Boards of one VisualPlanning file, a JSON object a line; `task` is its folder's name."""
    path = pathlib.Path(file)
    if task not in _READERS:
        raise _fail(f"{path}, task", task, f"one of {sorted(_READERS)}")
    cases: list[Case] = []
    for number, line in enumerate(_text(path).splitlines()):
        where = f"{path}, line {number + 1}"
        row = _object(where, _parse(where, line))
        meta = _field(where, row, "meta", dict)
        level = _field(where, meta, "level", int)
        env = ENVS[task]
        if not env.MIN_LEVEL <= level <= env.MAX_LEVEL:
            raise _fail(f"{where}, level", level, f"{env.MIN_LEVEL}..{env.MAX_LEVEL}")
        state = _READERS[task](where, meta, level)
        optimal = len(_field(where, row, "input_state", list)) - 1
        shortest = len(_shortest(where, task, state))
        if optimal != shortest:
            raise _fail(f"{where}, input_state", f"{optimal} actions", f"{shortest}, the shortest")
        # Row numbers of a minibehaviour file are not its ids: rows were dropped from it.
        index = (
            _field(where, meta, "idx", int) if task == "minibehaviour" and "idx" in meta else number
        )
        split = path.name.removesuffix("_dataset.jsonl")
        name = f"{task}_{split}_level{level}_{index:04d}"
        cases.append(Case(name, task, level, state, optimal, None, index))
    if not cases:
        raise _fail(str(path), "an empty file", "a JSON object a line")
    return tuple(cases)


def _shortest(where: str, task: str, state: Any) -> tuple[str, ...]:
    try:
        return ENVS[task].shortest_plan(state)
    except ValueError as error:
        raise ValueError(f"{where}: got a board without a plan ({error}), want one") from None


def _read_frozenlake(where: str, meta: Mapping[str, Any], level: int) -> FrozenLakeState:
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


def _read_maze(where: str, meta: Mapping[str, Any], level: int) -> MazeState:
    layout = _square(where, meta, level)
    masks = [[0] * level for _ in range(level)]
    for r, row in enumerate(layout):
        for c, cell in enumerate(row):
            place = f"{where}, layout[{r}][{c}]"
            sides = _object(place, cell)
            masks[r][c] = sum(_WALLS[side] * _field(place, sides, side, bool) for side in _WALLS)
    for r in range(level):
        for c in range(level):
            east = c + 1 == level or bool(masks[r][c + 1] & _WALLS["west"])
            south = r + 1 == level or bool(masks[r + 1][c] & _WALLS["north"])
            for side, want in (("east", east), ("south", south)):
                if bool(masks[r][c] & _WALLS[side]) != want:
                    raise _fail(f"{where}, layout[{r}][{c}].{side}", not want, "its neighbour's")
        if not (masks[r][0] & _WALLS["west"] and masks[0][r] & _WALLS["north"]):
            raise _fail(f"{where}, layout", f"an open edge at {r}", "walls around the maze")
    return MazeState(
        walls=tuple(tuple(row) for row in masks),
        start=_position(where, meta, "start_pos", level),
        target=_position(where, meta, "target_pos", level),
    )


def _read_minibehaviour(where: str, meta: Mapping[str, Any], level: int) -> MiniBehaviourState:
    agent = _cell(f"{where}, start_pos", _field(where, meta, "start_pos", list), level)
    printer = _cell(f"{where}, printer_pos", _field(where, meta, "printer_pos", list), level)
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
        near = {c for c in inside - table if any(_distance(c, other) == 1 for other in cells)}
        if _cells(where, meta, key, level) != near:
            raise _fail(f"{where}, {key}", meta[key], f"the free neighbours {sorted(near)}")
    return MiniBehaviourState(size=level, agent=agent, printer=printer, table=tuple(sorted(table)))


_READERS: dict[str, Callable[[str, Mapping[str, Any], int], Any]] = {
    "frozenlake": _read_frozenlake,
    "maze": _read_maze,
    "minibehaviour": _read_minibehaviour,
}


def _distance(a: Cell, b: Cell) -> int:
    return abs(a[0] - b[0]) + abs(a[1] - b[1])


def _parse(where: str, text: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise _fail(where, text[:60], f"JSON ({error.msg} at column {error.colno})") from None


def _object(where: str | pathlib.Path, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise _fail(str(where), value, "a JSON object")
    return value


_KINDS = {int: "an integer", bool: "true or false", str: "text", list: "a list", dict: "an object"}


def _field(where: str, record: Mapping[str, Any], key: str, kind: type) -> Any:
    if key not in record:
        raise _fail(f"{where}, {key}", f"only keys {sorted(record)}", _KINDS[kind])
    value = record[key]
    if type(value) is not kind:  # JSON makes just these types, and true is no integer
        raise _fail(f"{where}, {key}", value, _KINDS[kind])
    return value


def _square(where: str, meta: Mapping[str, Any], level: int) -> list[list[Any]]:
    layout = _field(where, meta, "layout", list)
    widths = [len(row) if isinstance(row, list | str) else None for row in layout]
    if widths != [level] * level:
        raise _fail(f"{where}, layout", f"rows of {widths}", f"{level} rows of {level} cells")
    return [list(row) for row in layout]


def _position(where: str, meta: Mapping[str, Any], key: str, level: int) -> Cell:
    number = _field(where, meta, key, int)
    if not 0 <= number < level * level:
        raise _fail(f"{where}, {key}", number, f"row * {level} + column")
    return divmod(number, level)


def _cell(where: str, value: Any, level: int) -> Cell:
    if (
        not isinstance(value, list)
        or [type(number) for number in value] != [int, int]
        or not all(0 <= number < level for number in value)
    ):
        raise _fail(where, value, f"[row, column] within 0..{level - 1}")
    return value[0], value[1]


def _cells(where: str, meta: Mapping[str, Any], key: str, level: int) -> set[Cell]:
    return {_cell(f"{where}, {key}", value, level) for value in _field(where, meta, key, list)}
