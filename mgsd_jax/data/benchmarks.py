"""Public benchmarks as boards: FrozenLake maps of VSP, rows of VisualPlanning, DiffThinker's tests.

Case ids of the first two are those of the public MGSD evaluator, so that results can be joined row
by row. Every board is checked when it is read: a benchmark that differs from what it says of itself
(shape, neighbours, optimal length) would give numbers that cannot be compared.
"""

import dataclasses
import json
import pathlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState
from mgsd_jax.envs.search import Cell

_TILES = {"@": "S", "*": "G", "#": "H", "_": "F"}
_LETTERS = {"U": "up", "D": "down", "L": "left", "R": "right"}
_WALLS = {"north": 1, "south": 2, "west": 4, "east": 8}
_ORIGIN = (
    "benchmark files are not part of this package: the FrozenLake maps (level3..level8 with img "
    "and table) come with the VSP benchmark, the dataset/<task>/tokenized_dataset files with "
    "VisualPlanning, FrozenLake/16_test .. Maze/32_test with DiffThinker"
)
# Where a benchmark of each format lies in its folder.
VSP = "level*/table"
VISUALPLANNING = "dataset/{task}/tokenized_dataset/SFT/test_dataset.jsonl"
DIFFTHINKER: dict[tuple[str, int], str] = {
    ("frozenlake", 16): "FrozenLake/16_test",
    ("frozenlake", 32): "FrozenLake/32_test",
    ("maze", 8): "Maze/8_test",
    ("maze", 16): "Maze/16_test",
    ("maze", 32): "Maze/32_test",
}


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
    """All boards of a folder, of whatever formats it holds, in the order of their files.

    Raises ValueError naming file, line and key of the first thing that is not as it should be.
    """
    root = pathlib.Path(folder)
    if not root.is_dir():
        raise ValueError(f"{root}: got no such folder, want a benchmark ({_ORIGIN})")
    cases: list[Case] = []
    # DiffThinker's repository holds the maps of VSP as well.
    for maps in (root, root / "FrozenLake" / "VSP" / "maps"):
        cases += read_vsp(maps) if any(maps.glob(VSP)) else ()
    for file in sorted(root.glob(VISUALPLANNING.format(task="*"))):
        cases += read_visualplanning(file, file.parts[-4])
    for (task, level), place in DIFFTHINKER.items():
        cases += read_diffthinker(root / place, task, level) if (root / place).is_dir() else ()
    if not cases:
        places = [VSP, VISUALPLANNING.format(task="<task>"), *DIFFTHINKER.values()]
        raise ValueError(f"{root}: got none of {', '.join(places)}, want one of them ({_ORIGIN})")
    return tuple(cases)


def benchmark_keys(folders: Iterable[str | pathlib.Path]) -> frozenset[str]:
    """Content keys of all boards of these benchmark folders, for `exclude` of a draw."""
    return frozenset(
        ENVS[case.task].key(case.state) for folder in folders for case in read_benchmark(folder)
    )


def _fail(where: str, got: Any, want: str) -> ValueError:
    return ValueError(f"{where}: got {got!r}, want {want}")


def read_vsp(folder: str | pathlib.Path) -> tuple[Case, ...]:
    """FrozenLake boards of `level{L}/{img,table}`, by level and number.

    `level{L}/metadata.json` holds a plan of each; where it is absent they are solved here.
    """
    root = pathlib.Path(folder)
    cases: list[Case] = []
    for level, level_folder in sorted(_numbered(root, "level*", r"level(\d+)")):
        plans = _read_plans(level_folder / "metadata.json")
        for number, table in sorted(_numbered(level_folder / "table", "*.txt", r"(\d+)\.txt")):
            picture = level_folder / "img" / f"{number}.png"
            name = f"diffthinker_vsp_level{level}_{number:04d}"
            state = _read_table(table, level)
            _check_plan(plans, f"{number}.png", "frozenlake", state)
            cases.append(_case("frozenlake", level, number, name, state, picture))
    if not cases:
        raise ValueError(f"{root}: got no level*/table/*.txt, want FrozenLake maps ({_ORIGIN})")
    return tuple(cases)


def read_diffthinker(folder: str | pathlib.Path, task: str, level: int) -> tuple[Case, ...]:
    """Boards of one test set of DiffThinker, by name.

    FrozenLake has `table/{name}.txt` as VSP has, Maze `{name}.txt`; pictures are `{name}.png`.
    `metadata.json`, or `path.json`, holds plans; where it is absent the boards are solved here.
    """
    root = pathlib.Path(folder)
    is_lake = task == "frozenlake"
    plans = _read_plans(root / ("metadata.json" if is_lake else "path.json"))
    cases: dict[int, Case] = {}
    for file in sorted((root / "table" if is_lake else root).glob("*.txt")):
        name = re.fullmatch(rf"{level}_(\d+)_(?:[\d.]+_)?(\d+)", file.stem)
        if name is None:
            raise _fail(str(root), file.name, f"names like {level}_17_001.txt")
        index = int(name[1]) * 1000 + int(name[2])
        if index in cases:
            raise _fail(str(root), f"{file.name} after {cases[index].id}", "numbers that differ")
        state = _read_table(file, level) if is_lake else _read_masks(file, level)
        _check_plan(plans, f"{file.stem}.png" if is_lake else file.stem, task, state)
        picture = root / f"{file.stem}.png"
        cases[index] = _case(task, level, index, f"diffthinker_{file.stem}", state, picture)
    if not cases:
        raise ValueError(f"{root}: got no boards, want those of DiffThinker ({_ORIGIN})")
    return tuple(cases[index] for index in sorted(cases))


def _case(task: str, level: int, index: int, name: str, state: Any, picture: pathlib.Path) -> Case:
    if not picture.is_file():
        raise ValueError(f"{picture}: got no such file, want the picture of {picture.stem}.txt")
    optimal = len(_shortest(str(picture.with_suffix(".txt")), task, state))
    return Case(f"{task}_{name}", task, level, state, optimal, str(picture), index)


_Plans = tuple[str, dict[str, Any]] | None  # of a file: its name, the letters of plans by board


def _read_plans(path: pathlib.Path) -> _Plans:
    if not path.is_file():
        return None
    return str(path), _object(path, _parse(str(path), _text(path)))


def _check_plan(plans: _Plans, key: str, task: str, state: Any) -> None:
    """Raises ValueError unless the reference plan, if there is one, is a shortest one."""
    if plans is None:
        return
    letters = _field(plans[0], plans[1], key, str)
    if not letters or set(letters) - set(_LETTERS):
        raise _fail(f"{plans[0]}, {key}", letters, "a plan over U, D, L, R")
    outcome = ENVS[task].play(state, tuple(_LETTERS[letter] for letter in letters))
    if not outcome.optimal:
        got = f"{letters} ({outcome.reason})"
        raise _fail(f"{plans[0]}, {key}", got, "a shortest plan to the goal")


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


def _read_masks(path: pathlib.Path, level: int) -> MazeState:
    """A maze as lines of numbers: size, start, goal, rows of wall masks (N 1, S 2, W 4, E 8)."""
    lines = [line.split() for line in _text(path).splitlines() if line.strip()]
    widths = [len(line) for line in lines]
    if widths != [1, 2, 2, *[level] * level]:
        raise _fail(str(path), f"lines of {widths} numbers", f"1, 2, 2 and {level} rows of {level}")
    for number, line in enumerate(lines, start=1):
        for text in line:
            if not re.fullmatch("[0-9]{1,2}", text) or int(text) >= (16 if number > 3 else 33):
                raise _fail(f"{path}, line {number}", text, "a size, a cell, or a mask of 0..15")
    (size,), start, target, *masks = [[int(text) for text in line] for line in lines]
    if size != level:
        raise _fail(f"{path}, line 1", size, f"{level} as its folder says")
    return _maze(
        str(path),
        masks,
        _cell(f"{path}, start", start, level),
        _cell(f"{path}, goal", target, level),
    )


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
        if level not in env.levels:
            raise _fail(f"{where}, level", level, f"{env.levels[0]}..{env.levels[-1]}")
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
    start, target = (_position(where, meta, key, level) for key in ("start_pos", "target_pos"))
    return _maze(f"{where}, layout", masks, start, target)


def _maze(where: str, masks: list[list[int]], start: Cell, target: Cell) -> MazeState:
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
