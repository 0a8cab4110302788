"""Maze: walk through a perfect maze from the start to the target; a wall or the edge ends it.

Mazes are carved by a recursive backtracker from a random cell, as the public ones are: long
corridors, few branches. That makes depth-first trees of the grid, fewer than its spanning trees.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from mgsd_jax.envs import base, files, search
from mgsd_jax.envs.base import Question, Sprites
from mgsd_jax.envs.search import Cell, Paths, Plan

WALLS = {"up": 1, "down": 2, "left": 4, "right": 8}  # the bit of each closed side in a mask

_ORDER = ("up", "right", "down", "left")  # breaks ties between plans, as the public solver does
_SIDES = {"north": "up", "south": "down", "east": "right", "west": "left"}
_OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}
_WHITE, _LINE, _START, _TARGET = (255, 255, 255), (224, 224, 224), (255, 255, 0), (0, 0, 255)
# Depth-first trees, counted by growing them all as tests/test_envs.py does, times pairs of cells.
_COUNTS = {2: 4 * 4 * 3, 3: 88 * 9 * 8, 4: 3820 * 16 * 15}


@dataclasses.dataclass(frozen=True)
class MazeState:
    """A square of wall masks (north 1, south 2, west 4, east 8), a start and a target."""

    walls: tuple[tuple[int, ...], ...]
    start: Cell
    target: Cell

    def __post_init__(self) -> None:
        size = len(self.walls)
        if not size or {len(row) for row in self.walls} != {size}:
            raise ValueError(f"layout: got rows {self.walls}, want a square")
        if min(map(min, self.walls)) < 0 or max(map(max, self.walls)) > 15:
            raise ValueError(f"layout: got masks {self.walls}, want 0 to 15")
        base.check_inside(size, "start", [self.start])
        base.check_inside(size, "target", [self.target])

    @property
    def size(self) -> int:
        return len(self.walls)


@functools.lru_cache(maxsize=1024)
def _paths(state: MazeState) -> Paths:
    masks = [mask for row in state.walls for mask in row]
    successors = [
        {action: n for action, n in moves if not masks[node] & WALLS[action]}
        for node, moves in enumerate(search.grid_moves(state.size, _ORDER))
    ]
    start, target = (r * state.size + c for r, c in (state.start, state.target))
    distances = search.distances_to(successors, [target])
    return Paths(successors, distances, start, search.grid_cells(state.size))


def _refuse(state: MazeState, node: int, action: str) -> tuple[int | None, str | None]:
    row, column = divmod(node, state.size)
    return None, "hit_wall" if state.walls[row][column] & WALLS[action] else "off_board"


def _carve(rng: np.random.Generator, level: int) -> tuple[tuple[int, ...], ...]:
    """The wall masks of a random perfect maze."""
    moves = search.grid_moves(level, _ORDER)
    masks = [15] * (level * level)
    draws = iter(rng.random(level * level).tolist())
    node = int(next(draws) * level * level)
    stack, seen = [node], {node}
    while stack:
        node = stack[-1]
        options = [(action, n) for action, n in moves[node] if n not in seen]
        if not options:
            stack.pop()
            continue
        action, following = options[int(next(draws) * len(options))]
        masks[node] &= ~WALLS[action]
        masks[following] &= ~WALLS[_OPPOSITE[action]]
        seen.add(following)
        stack.append(following)
    return tuple(tuple(masks[i : i + level]) for i in range(0, level * level, level))


def _bucket(length: int, level: int) -> str:
    if length <= max(1, level // 2):
        return "easy"
    return "medium" if length <= level else "hard"


def generate(rng: np.random.Generator, level: int) -> MazeState:
    """A random maze with two different random cells as start and target."""
    ENV.check_level(level)
    walls = _carve(rng, level)
    start, target = rng.integers(level * level), rng.integers(level * level - 1)
    target += target >= start  # uniform over the pairs of different cells
    return MazeState(walls, divmod(int(start), level), divmod(int(target), level))


def _key(state: MazeState) -> str:
    walls = "/".join("".join(f"{mask:x}" for mask in row) for row in state.walls)
    return f"{ENV.name}:{walls}:{base.show_cell(state.start)}:{base.show_cell(state.target)}"


# Drawing.


def _spans(level: int, size: int, wall: int) -> list[tuple[int, int, int, int]]:
    """For each row (or column): where its cells begin, their corridor begins and ends, they end.

    A wall takes half of its width on either side of a boundary.
    """
    edges = base.cell_edges(level, size)
    double = 2 * level  # halves of a wall stay exact
    return [
        (
            edges[i],
            (2 * i * size + wall * level) // double,
            # The public rectangle is inclusive; below 12 pixels a cell that would hide the wall.
            min((2 * (i + 1) * size - wall * level) // double + 1, edges[i + 1] - 1),
            edges[i + 1],
        )
        for i in range(level)
    ]


def _draw_cell(
    picture: np.ndarray, mask: int, rows: tuple[int, ...], columns: tuple[int, ...], line: int
) -> None:
    """The corridor of one cell, out to its own edge on the open sides, with lines on those."""
    (top, in_top, in_bottom, bottom), (left, in_left, in_right, right) = rows, columns
    up, down, west, east = (not mask & WALLS[action] for action in base.MOVES)
    before = (line - 1) // 2  # pixels of a line before the boundary that it marks
    high, wide = slice(in_top, in_bottom), slice(in_left, in_right)
    picture[top if up else in_top : bottom if down else in_bottom, wide] = _WHITE
    picture[high, left if west else in_left : right if east else in_right] = _WHITE
    if up:
        picture[top : top - before + line, wide] = _LINE
    if down:
        picture[bottom - before : bottom, wide] = _LINE
    if west:
        picture[high, left : left - before + line] = _LINE
    if east:
        picture[high, right - before : right] = _LINE


@functools.lru_cache(maxsize=16)
def _sheets(level: int, size: int) -> np.ndarray:
    """Whole boards whose cells all have one mask, uint8 [16, size, size, 3], indexed by the mask.

    A wall is a quarter of a cell wide, a line a sixteenth, as in the public pictures.
    """
    wall, line = max(2, int(size / level / 4)), max(1, int(size / level / 16))
    spans = _spans(level, size, wall)
    sheets = np.zeros((16, size, size, 3), np.uint8)
    for mask in range(16):
        for rows in spans:
            for columns in spans:
                _draw_cell(sheets[mask], mask, rows, columns, line)
    return sheets


@functools.lru_cache(maxsize=64)
def _dot(radius: int, sprites: Sprites) -> np.ndarray:
    """A disc, or a square of its width; bool [2 * radius + 1, 2 * radius + 1]."""
    dot = Image.new("1", (2 * radius + 1, 2 * radius + 1))
    shape = ImageDraw.Draw(dot)
    (shape.ellipse if sprites == "usual" else shape.rectangle)((0, 0, 2 * radius, 2 * radius), 1)
    return np.asarray(dot)


def _draw_dot(
    picture: np.ndarray,
    cell: Cell,
    level: int,
    radius: int,
    colour: tuple[int, int, int],
    sprites: Sprites,
) -> None:
    size = len(picture)
    row, column = ((2 * i + 1) * size // (2 * level) for i in cell)
    square = picture[row - radius : row + radius + 1, column - radius : column + radius + 1]
    square[_dot(radius, sprites)] = colour


def render(state: MazeState, size: int = 256, *, sprites: Sprites = "usual") -> np.ndarray:
    """White corridors on black, a yellow dot at the start and a blue one at the target.

    uint8 [size, size, 3]. With the other sprites the dots are squares. Where both are one cell,
    the start is a smaller dot on the target.
    Raises ValueError below 8 pixels a cell.
    """
    level = state.size
    picture = base.paste_cells(_sheets(level, size), state.walls)
    corridor = size / level - max(2, int(size / level / 4))
    # Below 9 pixels a cell the public radius would cover the walls of the cell.
    radius = min(max(3, int(corridor * 0.25)), int(corridor - 1) // 2)
    _draw_dot(picture, state.target, level, radius, _TARGET, sprites)
    both = state.start == state.target
    _draw_dot(picture, state.start, level, radius // 2 if both else radius, _START, sprites)
    return picture


# Words.


def _open_directions(state: MazeState, cell: Cell) -> tuple[str, ...]:
    mask = state.walls[cell[0]][cell[1]]
    return tuple(action for action in base.MOVES if not mask & WALLS[action])


def _questions(state: MazeState) -> tuple[Question, ...]:
    opened = {cell: _open_directions(state, cell) for cell in search.grid_cells(state.size)}
    lines = (f"{base.show_cell(c)}: {base.show_directions(ways)}" for c, ways in opened.items())
    return (
        base.ask_size(state.size),
        base.ask_cell(
            "player", "At which (row,column) is the player, the yellow dot?", state.start
        ),
        base.ask_cell("goal", "At which (row,column) is the goal, the blue dot?", state.target),
        Question(
            "open_directions",
            "Which directions are open from each cell?",
            "\n".join(lines),
            "open_directions",
            frozenset(("open", cell, way) for cell, ways in opened.items() for way in ways),
            "Open directions",
        ),
        base.ask_moves("Which moves are legal from the player?", opened[state.start]),
    )


def _from_facts(size: int, named: base.NamedCells) -> MazeState:
    walls = [[15] * size for _ in range(size)]
    for (row, column), direction in named["open"]:
        walls[row][column] &= ~WALLS[direction]
    ends = base.only_cell(named, "player"), base.only_cell(named, "goal")
    return MazeState(tuple(map(tuple, walls)), *ends)


def _disturb(state: MazeState, rng: np.random.Generator, share: float) -> MazeState:
    """Walls come and go between two cells, for both of them; the ends move."""
    walls, size = np.array(state.walls), state.size
    below, right = rng.random((size - 1, size)) < share, rng.random((size, size - 1)) < share
    walls[:-1] ^= WALLS["down"] * below
    walls[1:] ^= WALLS["up"] * below
    walls[:, :-1] ^= WALLS["right"] * right
    walls[:, 1:] ^= WALLS["left"] * right
    start = base.misplace(state.start, [state.target], size, rng, share)
    target = base.misplace(state.target, [start], size, rng, share)
    return MazeState(tuple(tuple(map(int, row)) for row in walls), start, target)


# Board files.


def _fields(state: MazeState, plan: Plan, board: files.BoardText | None) -> dict[str, object]:
    del board  # everything follows from the state
    numbers = sorted((str(node), d) for node, d in enumerate(_paths(state).distances) if d >= 0)
    layout = [
        [{side: bool(mask & WALLS[action]) for side, action in _SIDES.items()} for mask in row]
        for row in state.walls
    ]
    places = {}
    for name, (row, column) in (("start", state.start), ("target", state.target)):
        places[f"{name}_row"], places[f"{name}_col"] = row, column
        places[f"{name}_pos"] = row * state.size + column
    return {
        **places,
        "difficulty_bucket": _bucket(len(plan), state.size),
        "layout_json": files.json_text(layout, compact=True),
        "distance_map": files.json_text(dict(numbers), compact=True),
    }


def check_walls(state: MazeState) -> None:
    """Raises ValueError unless both sides of each boundary agree and the edge is closed."""
    masks = [mask for row in state.walls for mask in row]
    for node, moves in enumerate(search.grid_moves(state.size, tuple(base.MOVES))):
        inside = dict(moves)
        for action in (action for action in base.MOVES if not masks[node] & WALLS[action]):
            if action not in inside or masks[inside[action]] & WALLS[_OPPOSITE[action]]:
                got = f"{action} of {divmod(node, state.size)} open, and closed from the other side"
                raise files.bad_board("layout", got, "one answer from both sides")


def _read(board: files.BoardText) -> MazeState:
    for row in board.rows:
        if not all(mask.isdecimal() and len(mask) < 3 for mask in row.split()):
            raise files.bad_board("layout", repr(row), "masks 0 to 15")
    start, target = (
        (files.integer(board, f"{name}_row"), files.integer(board, f"{name}_col"))
        for name in ("start", "target")
    )
    state = MazeState(tuple(tuple(map(int, row.split())) for row in board.rows), start, target)
    check_walls(state)
    return state


ENV: base.Env[MazeState] = base.Env(
    name="maze",
    title="Maze",
    levels=range(2, 33),
    actions=base.MOVES,
    reasons={"off_board": "left the board", "hit_wall": "hit a wall"},
    labels={"player": "player", "goal": "goal"},
    wording=base.Wording(
        rules=(
            "Find a way through the maze for the player.",
            base.CELLS_RULE,
            base.MOVES_RULE.format("player"),
            "Only open sides of a cell can be crossed; running into a wall ends the walk in "
            "failure.",
            "Reach the goal in as few moves as possible.",
        ),
        legend="Walls are black; the player is the yellow dot, the goal is the blue dot.",
        form=(
            *("Map size: NxN", "Player: cell", "Goal: cell"),
            *base.SIDES_FORM,
        ),
        route="I go through (2,0) (1,0) (1,1).",
        answer="UR",
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
            *("task", "split", "level", "index", "seed", "difficulty_bucket"),
            *("start_row", "start_col", "target_row", "target_col", "start_pos", "target_pos"),
            *("path_length", "solution_actions", "trajectory_states"),
            *("layout_json", "distance_map"),
        ),
        block="layout",
        rows=lambda state: (" ".join(map(str, row)) for row in state.walls),
        read=_read,
        fields=_fields,
    ),
    has_sides=True,
    options={"bucket": None},
)
