"""Sokoban: walk into boxes to push them onto the targets; nothing is ever pulled.

A wall runs around every board. Boards have one or two boxes and as many targets. A push cannot be
undone, so that a plan may lose: the first push after which no solution is left ends it.
"""

import dataclasses
import functools
from collections.abc import Iterable

import numpy as np
from PIL import Image, ImageDraw

from mgsd_jax.envs import base, files, search
from mgsd_jax.envs.base import Question, Sprites
from mgsd_jax.envs.search import Cell, Paths, Plan

_ORDER = ("up", "down", "left", "right")  # breaks ties between plans
_SHORTEST = 3  # actions of the shortest plan of a generated board, at least
_WALLS = 0.15  # of the inner cells
_DRAWS = 10_000
_KINDS = "-#@$.*+"  # floor, wall, player, box, target; box and player on a target
# Boards of level 5, counted by solving all of them, as tests/test_sokoban.py does.
_COUNTS = {5: 932}

_Node = tuple[int, tuple[int, ...]]  # cell numbers of the player and of the boxes, sorted


@dataclasses.dataclass(frozen=True)
class SokobanState:
    """A square board of side 5 to 8; `walls` are those inside of the outer wall. Cells sorted."""

    size: int
    player: Cell
    boxes: tuple[Cell, ...]
    targets: tuple[Cell, ...]
    walls: tuple[Cell, ...]

    def __post_init__(self) -> None:
        if self.size not in ENV.levels:
            raise ValueError(f"size: got {self.size}, want 5 to 8")
        if len(self.boxes) not in (1, 2) or len(self.targets) != len(self.boxes):
            raise ValueError(f"boxes: got {self.boxes} for targets {self.targets}, want 1 or 2")
        for cells in (self.boxes, self.targets, self.walls):
            if list(cells) != sorted(set(cells)):
                raise ValueError(f"cells: got {cells}, want them sorted, none twice")
        things, solid = (self.player, *self.boxes), {*self.boxes, *self.walls}
        if not {*things, *self.targets, *self.walls} <= {*_inner_cells(self.size)}:
            raise ValueError(f"cells: got {self}, want cells inside of the outer wall")
        if self.player in solid or {*self.boxes, *self.targets} & {*self.walls}:
            raise ValueError(f"cells: got {self}, want walls, boxes and the player apart")


@functools.cache
def _inner_cells(size: int) -> tuple[Cell, ...]:
    return tuple((row, column) for row in range(1, size - 1) for column in range(1, size - 1))


# The search. A node is where the player and the boxes are.


def _number(size: int, cell: Cell) -> int:
    return cell[0] * size + cell[1]


@functools.lru_cache(maxsize=1024)
def _moves(size: int, walls: tuple[Cell, ...]) -> tuple[dict[str, int], ...]:
    """By cell: the moves between cells without walls."""
    floor = (_number(size, cell) for cell in _inner_cells(size) if cell not in walls)
    return tuple(search.floor_moves(size, _ORDER, floor))


def _first_node(state: SokobanState) -> _Node:
    boxes = tuple(_number(state.size, cell) for cell in state.boxes)
    return _number(state.size, state.player), boxes


def _step(moves: tuple[dict[str, int], ...], node: _Node, action: str) -> _Node | str:
    """The node after a step or a push, or the reason why there is none."""
    player, boxes = node
    cell = moves[player].get(action)
    if cell is None:
        return "hit_wall"
    if cell not in boxes:
        return cell, boxes
    beyond = moves[cell].get(action)
    if beyond is None or beyond in boxes:
        return "box_blocked"
    return cell, tuple(sorted(beyond if box == cell else box for box in boxes))


@functools.lru_cache(maxsize=16)  # a board of level 8 has up to 21,420 nodes
def _graph(state: SokobanState) -> tuple[Paths, list[_Node], dict[_Node, int]]:
    """Everything that can be reached from the start: the paths, the nodes, and their numbers.

    A push after which no solution is left is not among the successors: see `_refuse`.
    """
    moves, first = _moves(state.size, state.walls), _first_node(state)
    numbers, nodes = {first: 0}, [first]
    successors: list[dict[str, int]] = []
    for node in nodes:  # grows while it is gone through
        steps = {}
        for action in _ORDER:
            following = _step(moves, node, action)
            if isinstance(following, str):
                continue
            if following not in numbers:
                numbers[following] = len(nodes)
                nodes.append(following)
            steps[action] = numbers[following]
        successors.append(steps)
    targets = tuple(_number(state.size, cell) for cell in state.targets)
    goals = (number for number, (_, boxes) in enumerate(nodes) if boxes == targets)
    distances = search.distances_to(successors, goals)
    for number, steps in enumerate(successors):
        if distances[number] >= 0:
            successors[number] = {a: n for a, n in steps.items() if distances[n] >= 0}
    cells = [divmod(player, state.size) for player, _ in nodes]
    return Paths(successors, distances, 0, cells), nodes, numbers


def _paths(state: SokobanState) -> Paths:
    return _graph(state)[0]


def _refuse(state: SokobanState, number: int, action: str) -> tuple[int | None, str | None]:
    """A push that leaves no solution is legal and ends the plan."""
    _, nodes, numbers = _graph(state)
    following = _step(_moves(state.size, state.walls), nodes[number], action)
    if isinstance(following, str):
        return None, following
    return numbers[following], "dead_position"


# Boards.


def generate(
    rng: np.random.Generator, level: int, *, wall_probability: float = _WALLS
) -> SokobanState:
    """A random solvable board whose shortest plan has at least three actions.

    Level 5 has one box, a larger board one or two. All things stand on cells of their own. Raises
    ValueError for a level out of range, and where no draw can be solved.
    """
    ENV.check_level(level)
    for _ in range(_DRAWS):
        cells = _inner_cells(level)
        is_wall = rng.random(len(cells)) < wall_probability
        walls = tuple(cell for cell, closed in zip(cells, is_wall.tolist(), strict=True) if closed)
        count = 1 if level == 5 else int(rng.integers(1, 3))
        floor = [cell for cell in cells if cell not in walls]
        if len(floor) < 2 * count + 1:
            continue
        chosen = [floor[i] for i in rng.permutation(len(floor))[: 2 * count + 1]]
        state = _state(level, chosen[0], chosen[1 : count + 1], chosen[count + 1 :], walls)
        if not _has_dead_box(state) and _paths(state).distances[0] >= _SHORTEST:
            return state
    raise ValueError(
        f"wall_probability: got {wall_probability}, which gave no solvable board in {_DRAWS} draws "
        f"of level {level}, want less"
    )


def _state(
    size: int, player: Cell, boxes: Iterable[Cell], targets: Iterable[Cell], walls: Iterable[Cell]
) -> SokobanState:
    things = (tuple(sorted(cells)) for cells in (boxes, targets, walls))
    return SokobanState(size, player, *things)


def _has_dead_box(state: SokobanState) -> bool:
    """Whether a box stands where no push can bring it to a target, even if it were alone.

    Quick: most boards that cannot be solved need no search of all positions.
    """
    moves = _moves(state.size, state.walls)
    alive = {_number(state.size, cell) for cell in state.targets}
    frontier = list(alive)
    while frontier:
        cell = frontier.pop()
        for action, source in moves[cell].items():
            # A box is pushed from `source` to `cell` by a player on the far side of `source`.
            if source not in alive and action in moves[source]:
                alive.add(source)
                frontier.append(source)
    return any(_number(state.size, cell) not in alive for cell in state.boxes)


def _rows(state: SokobanState) -> list[str]:
    letters = {cell: "-" for cell in _inner_cells(state.size)}
    letters |= dict.fromkeys(state.walls, "#") | dict.fromkeys(state.targets, ".")
    for cell in state.boxes:
        letters[cell] = "*" if cell in state.targets else "$"
    letters[state.player] = "+" if state.player in state.targets else "@"
    cells = search.grid_cells(state.size)
    text = "".join(letters.get(cell, "#") for cell in cells)
    return [text[i : i + state.size] for i in range(0, len(text), state.size)]


def _key(state: SokobanState) -> str:
    return f"{ENV.name}:{'/'.join(_rows(state))}"


# Drawing: own sprites, in tenths of a cell.


def _tile(kind: str, sprites: Sprites) -> Image.Image:
    """One cell, 64 x 64 pixels."""
    tile = Image.new("RGB", (64, 64), (222, 210, 184))
    draw = ImageDraw.Draw(tile)

    def box(x0: float, y0: float, x1: float, y1: float) -> tuple[int, int, int, int]:
        return int(6.4 * x0), int(6.4 * y0), int(6.4 * x1) - 1, int(6.4 * y1) - 1

    is_usual = sprites == "usual"
    if kind == "#":
        draw.rectangle(box(0, 0, 10, 10), (120, 50, 40))
        for row in range(4):  # bricks, or planks
            for column in range(-1, 3):
                left = 5.0 * column + (2.5 if row % 2 and is_usual else 0)
                bricks = box(left + 0.3, 2.5 * row + 0.3, left + 4.8, 2.5 * row + 2.3)
                draw.rectangle(bricks, (176, 84, 66))
    if kind in ".*+":
        shape = draw.ellipse if is_usual else draw.rectangle
        shape(box(1, 1, 9, 9), None, (20, 150, 70), 6)
    if kind in "$*":
        draw.rectangle(box(2, 2, 8, 8), (196, 132, 58), (96, 58, 20), 4)
        ends = ((2.8, 2.8, 7.2, 7.2), (7.2, 2.8, 2.8, 7.2))
        for x0, y0, x1, y1 in ends if is_usual else ((5, 2.8, 5, 7.2),):
            draw.line((6.4 * x0, 6.4 * y0, 6.4 * x1, 6.4 * y1), (96, 58, 20), 4)
    if kind in "@+":
        draw.ellipse(box(3.4, 2, 6.6, 5.2), (30, 60, 200))
        shape = draw.pieslice if is_usual else draw.rectangle
        body = ((2.6, 4.6, 7.4, 11), 180, 360) if is_usual else ((3.4, 5.2, 6.6, 8),)
        shape(box(*body[0]), *body[1:], fill=(30, 60, 200))
    return tile


@functools.lru_cache(maxsize=32)
def _sheets(level: int, size: int, sprites: Sprites) -> np.ndarray:
    """Whole boards with one kind of thing in every cell, uint8 [len(_KINDS), size, size, 3]."""
    edges, sheets = base.cell_edges(level, size), []
    for kind in _KINDS:
        tile, picture = _tile(kind, sprites), Image.new("RGB", (size, size))
        for row, column in search.grid_cells(level):
            corner = (edges[column], edges[row])
            sides = (edges[column + 1] - corner[0], edges[row + 1] - corner[1])
            picture.paste(tile.resize(sides, Image.Resampling.LANCZOS), corner)
        sheets.append(np.asarray(picture))
    return np.stack(sheets)


def render(state: SokobanState, size: int = 256, *, sprites: Sprites = "usual") -> np.ndarray:
    """Brick walls, wooden boxes, green rings for targets, a blue player; uint8 [size, size, 3].

    With the other sprites walls are planks, targets squares, boxes barred once and the player a
    post. Raises ValueError below 8 pixels a cell.
    """
    kinds = [[_KINDS.index(letter) for letter in row] for row in _rows(state)]
    return base.paste_cells(_sheets(state.size, size, sprites), kinds)


# Words.


def _questions(state: SokobanState) -> tuple[Question, ...]:
    moves, first = _moves(state.size, state.walls), _first_node(state)
    legal = (action for action in base.MOVES if not isinstance(_step(moves, first, action), str))
    walls = "Which cells inside of the outer wall are walls?"
    return (
        base.ask_size(state.size),
        base.ask_cell("player", "At which (row,column) is the player?", state.player),
        base.ask_cells("box", "Which cells hold a box?", state.boxes, "boxes"),
        base.ask_cells("target", "Which cells are targets?", state.targets, "targets"),
        base.ask_cells("wall", walls, state.walls, "walls"),
        base.ask_moves("Which moves are legal for the player, pushes among them?", legal),
    )


def _from_facts(size: int, named: base.NamedCells) -> SokobanState:
    player = base.only_cell(named, "player")
    outer = {*search.grid_cells(size)} - {*_inner_cells(size)}  # may be told as well
    walls = {*named["wall"]} - outer
    return _state(size, player, named["box"], named["target"], walls)


def _disturb(state: SokobanState, rng: np.random.Generator, share: float) -> SokobanState:
    """Every wall, target and box, and the player, moves to a free cell with chance `share`."""
    outer = {*search.grid_cells(state.size)} - {*_inner_cells(state.size)}
    things = [*state.walls, *state.targets, *state.boxes, state.player]
    for i, cell in enumerate(things):
        things[i] = base.misplace(cell, outer.union(things), state.size, rng, share)
    ends = np.cumsum([len(state.walls), len(state.targets)]).tolist()
    walls, targets, boxes = things[: ends[0]], things[ends[0] : ends[1]], things[ends[1] : -1]
    return _state(state.size, things[-1], boxes, targets, walls)


# Board files.


def _fields(state: SokobanState, plan: Plan, board: files.BoardText | None) -> dict[str, object]:
    del plan, board  # everything follows from the state
    return {
        **{"player_row": state.player[0], "player_col": state.player[1]},
        "box_pos": files.json_text(state.boxes),
        "target_pos": files.json_text(state.targets),
    }


def _read(board: files.BoardText) -> SokobanState:
    size, text = len(board.rows), "".join(board.rows)
    if {len(row) for row in board.rows} != {size} or set(text) - set(_KINDS):
        raise files.bad_board("board", board.rows, f"a square over {' '.join(_KINDS)}")

    def cells(letters: str) -> list[Cell]:
        return [divmod(i, size) for i, letter in enumerate(text) if letter in letters]

    inner = {*_inner_cells(size)}
    if len(cells("@+")) != 1 or len(set(cells("#")) - inner) != 4 * size - 4:
        raise files.bad_board("board", board.rows, "one player, and walls all around")
    walls = [cell for cell in cells("#") if cell in inner]
    try:
        return _state(size, cells("@+")[0], cells("$*"), cells(".*+"), walls)
    except ValueError as error:
        raise ValueError(f"board: {error}") from None


ENV: base.Env[SokobanState] = base.Env(
    name="sokoban",
    title="Sokoban",
    levels=range(5, 9),
    actions=base.MOVES,
    reasons={
        "hit_wall": "hit a wall",
        "box_blocked": "pushed a box that cannot move",
        "dead_position": "pushed a box to where no solution is left",
    },
    labels={"player": "player", "box": "boxes", "target": "targets", "wall": "walls"},
    wording=base.Wording(
        rules=(
            "Let the player push every box onto a target.",
            base.CELLS_RULE,
            base.MOVES_RULE.format("player"),
            "Walking into a box pushes it to the next cell, if that is free; no box can be pulled.",
            "A wall runs around the board. A step into a wall, or against a box that cannot move, "
            "ends in failure.",
            "Solve the board in as few moves as possible.",
        ),
        legend="The player is blue, boxes are brown with a cross, targets are green rings, walls "
        "are red bricks.",
        form=(
            *("Map size: NxN", "Player: cell", "Boxes: cells", "Targets: cells"),
            "Walls: cells inside of the outer wall, or none",
        ),
        route="I go through (2,1) (2,2) (1,2).",
        answer="RU",
    ),
    generate=generate,
    count=_COUNTS.get,
    key=_key,
    paths=_paths,
    refuse=_refuse,
    questions=_questions,
    from_facts=_from_facts,
    disturb=_disturb,
    render=render,
    file=files.FileFormat(
        keys=(
            *("task", "split", "level", "index", "seed"),
            *("player_row", "player_col", "box_pos", "target_pos"),
            *("path_length", "solution_actions", "trajectory_states"),
        ),
        block="board",
        rows=_rows,
        read=_read,
        fields=_fields,
    ),
    even_options={"wall_probability": 0.3},
    options={"wall_probability": _WALLS},
)
