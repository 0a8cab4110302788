"""Maze: walk through a perfect maze from the start to the target; a wall or the edge ends it.

Mazes are carved by a recursive backtracker from a random cell, as the public ones are: long
corridors, few branches. That makes depth-first trees of the grid, fewer than its spanning trees.
"""

import dataclasses
import functools

import numpy as np
from PIL import Image, ImageDraw

from mgsd_jax.envs import base
from mgsd_jax.envs.base import Bucket, Cell, Fact, Outcome, Paths, Plan, Question, Reason, Sprites

NAME: str = "maze"
ACTIONS: tuple[str, ...] = ("up", "down", "left", "right")
MIN_LEVEL: int = 2
MAX_LEVEL: int = 32

_ORDER = ("up", "right", "down", "left")  # breaks ties between plans, as the public solver does
_WALLS = {"up": 1, "down": 2, "left": 4, "right": 8}
_SIDES = {"north": "up", "south": "down", "east": "right", "west": "left"}
_OPPOSITE = {"up": "down", "down": "up", "left": "right", "right": "left"}
_DRAWS = 4096
_WHITE, _LINE, _START, _TARGET = (255, 255, 255), (224, 224, 224), (255, 255, 0), (0, 0, 255)
_KEYS = (
    *("task", "split", "level", "index", "seed", "difficulty_bucket"),
    *("start_row", "start_col", "target_row", "target_col", "start_pos", "target_pos"),
    *("path_length", "solution_actions", "trajectory_states", "layout_json", "distance_map"),
)


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
        for name, cell in (("start", self.start), ("target", self.target)):
            if not (0 <= cell[0] < size and 0 <= cell[1] < size):
                raise ValueError(f"{name}: got {cell}, want a cell of a {size}x{size} board")

    @property
    def size(self) -> int:
        return len(self.walls)

    @property
    def level(self) -> int:
        return self.size


@functools.lru_cache(maxsize=1024)
def _paths(state: MazeState) -> Paths:
    masks = [mask for row in state.walls for mask in row]
    successors = [
        {action: n for action, n in moves if not masks[node] & _WALLS[action]}
        for node, moves in enumerate(base.grid_moves(state.size, _ORDER))
    ]
    start, target = (r * state.size + c for r, c in (state.start, state.target))
    return Paths(successors, base.distances_to(successors, [target]), start)


def _carve(rng: np.random.Generator, level: int) -> tuple[tuple[int, ...], ...]:
    """The wall masks of a random perfect maze."""
    moves = base.grid_moves(level, _ORDER)
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
        masks[node] &= ~_WALLS[action]
        masks[following] &= ~_WALLS[_OPPOSITE[action]]
        seen.add(following)
        stack.append(following)
    return tuple(tuple(masks[i : i + level]) for i in range(0, level * level, level))


def _bucket(length: int, level: int) -> Bucket:
    if length <= max(1, level // 2):
        return "easy"
    return "medium" if length <= level else "hard"


def generate(rng: np.random.Generator, level: int, *, bucket: Bucket | None = None) -> MazeState:
    """A random maze with two different random cells as start and target.

    `bucket` redraws until the length of the plan is easy (up to level // 2), medium (up to level)
    or hard. Raises ValueError for a level out of range or a bucket that no draw met.
    """
    base.check_level(NAME, level, MIN_LEVEL, MAX_LEVEL)
    base.check_bucket(bucket)
    for _ in range(_DRAWS):
        walls = _carve(rng, level)
        start, target = rng.integers(level * level), rng.integers(level * level - 1)
        target += target >= start  # uniform over the pairs of different cells
        state = MazeState(walls, divmod(int(start), level), divmod(int(target), level))
        if bucket is None or bucket == _bucket(len(shortest_plan(state)), level):
            return state
    raise ValueError(f"bucket: got {bucket!r}, which none of {_DRAWS} draws met at level {level}")


@functools.cache
def count_states(level: int) -> int | None:
    """How many boards `generate` can return by default, by enumeration up to level 4; else None.

    A backtracker at a cell walks each connected part of what is left exactly once, entering it
    through one neighbour, so the trees of a part are the union over its entrances.
    """
    base.check_level(NAME, level, MIN_LEVEL, MAX_LEVEL)
    if level > 4:
        return None
    moves = base.grid_moves(level, _ORDER)

    def part_of(node: int, left: int) -> int:
        part, frontier = 1 << node, [node]
        while frontier:
            for _, n in moves[frontier.pop()]:
                if left >> n & 1 and not part >> n & 1:
                    part |= 1 << n
                    frontier.append(n)
        return part

    @functools.cache
    def trees(node: int, region: int) -> frozenset[frozenset[tuple[int, int]]]:
        left = region & ~(1 << node)
        found = {frozenset[tuple[int, int]]()}
        while left:
            part = part_of(left.bit_length() - 1, left)
            branches = {
                tree | {(min(node, n), max(node, n))}
                for _, n in moves[node]
                if part >> n & 1
                for tree in trees(n, part)
            }
            found = {tree | branch for tree in found for branch in branches}
            left &= ~part
        return frozenset(found)

    cells = level * level
    mazes = set().union(*(trees(node, (1 << cells) - 1) for node in range(cells)))
    return len(mazes) * cells * (cells - 1)


def key(state: MazeState) -> str:
    """The board as one line, equal only for equal boards."""
    walls = "/".join("".join(f"{mask:x}" for mask in row) for row in state.walls)
    return f"{NAME}:{walls}:{base.show_cell(state.start)}:{base.show_cell(state.target)}"


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
    up, down, west, east = (not mask & _WALLS[action] for action in ACTIONS)
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
    level, edges = state.size, base.cell_edges(state.size, size)
    kinds = ((r, c, mask) for r, row in enumerate(state.walls) for c, mask in enumerate(row))
    picture = base.paste_cells(_sheets(level, size), edges, kinds)
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
    return tuple(action for action in ACTIONS if not mask & _WALLS[action])


def _cells(state: MazeState) -> list[Cell]:
    return [(row, column) for row in range(state.size) for column in range(state.size)]


def state_lines(state: MazeState) -> tuple[str, ...]:
    """What a response states before its plan."""
    return (
        f"Map size: {state.size}x{state.size}",
        f"Player: {base.show_cell(state.start)}",
        f"Goal: {base.show_cell(state.target)}",
        "Open directions:",
        *(
            f"{base.show_cell(cell)}: {base.show_directions(_open_directions(state, cell))}"
            for cell in _cells(state)
        ),
    )


def describe(state: MazeState) -> str:
    """The state lines."""
    return "\n".join(state_lines(state))


def facts(state: MazeState) -> frozenset[Fact]:
    """Map size, player, goal and the open directions."""
    return frozenset().union(*(question.facts for question in questions(state)[:-1]))


def questions(state: MazeState) -> tuple[Question, ...]:
    """Map size, player, goal, open directions of every cell, and legal moves from the start."""
    size, player, goal = (line.split(": ", 1)[1] for line in state_lines(state)[:3])
    opened = {cell: _open_directions(state, cell) for cell in _cells(state)}
    open_facts = frozenset(("open", cell, way) for cell, ways in opened.items() for way in ways)
    legal = opened[state.start]
    return (
        Question("map_size", base.ASK_SIZE, size, "size", frozenset({("size", state.size)})),
        Question(
            "player",
            "At which (row,column) is the player, the yellow dot?",
            player,
            "coord",
            frozenset({("player", state.start)}),
        ),
        Question(
            "goal",
            "At which (row,column) is the goal, the blue dot?",
            goal,
            "coord",
            frozenset({("goal", state.target)}),
        ),
        Question(
            "open_directions",
            "Which directions are open from each cell?",
            "\n".join(state_lines(state)[4:]),
            "open_directions",
            open_facts,
        ),
        Question(
            "legal_moves",
            "Which moves are legal from the player?",
            base.show_directions(legal),
            "directions",
            frozenset(("legal", way) for way in legal),
        ),
    )


# Plans.


def shortest_plan(state: MazeState) -> Plan:
    """A shortest plan, by the base module's tie order. Raises ValueError if there is none."""
    return base.shortest_plan(_paths(state))


def shortest_plans(state: MazeState, limit: int = 64) -> tuple[Plan, ...]:
    return base.shortest_plans(_paths(state), limit)


def count_shortest_plans(state: MazeState) -> int:
    return base.count_shortest_plans(_paths(state))


def random_shortest_plan(state: MazeState, rng: np.random.Generator) -> Plan:
    return base.shortest_plan(_paths(state), rng)


def _run(state: MazeState, plan: Plan) -> base.Run:
    paths = _paths(state)

    def step(node: int, action: str) -> tuple[int | None, Reason | None]:
        if action in paths.successors[node]:
            return paths.successors[node][action], None
        row, column = divmod(node, state.size)
        is_wall = state.walls[row][column] & _WALLS[action]
        return None, "hit_wall" if is_wall else "off_board"

    return base.run(paths, plan, ACTIONS, step)


def play(state: MazeState, plan: Plan) -> Outcome:
    """The outcome of a plan: a wall or the edge fails, the target ends in success."""
    return base.outcome(_paths(state), _run(state, plan))


def trace(state: MazeState, plan: Plan) -> tuple[Cell, ...]:
    """The cell at the start and after each legal action."""
    return tuple(divmod(node, state.size) for node in _run(state, plan).nodes)


# Board files.


def _trajectory(state: MazeState, plan: Plan) -> str:
    return base.json_text(trace(state, plan))


def _layout_json(state: MazeState) -> str:
    layout = [
        [{side: bool(mask & _WALLS[action]) for side, action in _SIDES.items()} for mask in row]
        for row in state.walls
    ]
    return base.json_text(layout, compact=True)


def _fields(state: MazeState, plan: Plan, split: str, index: int, seed: int) -> dict[str, str]:
    numbers = sorted((str(node), d) for node, d in enumerate(_paths(state).distances) if d >= 0)
    values = (
        *(NAME, split, state.level, index, seed, _bucket(len(plan), state.level)),
        *(*state.start, *state.target),
        *(r * state.level + c for r, c in (state.start, state.target)),
        *(len(plan), base.json_text(plan), _trajectory(state, plan)),
        *(_layout_json(state), base.json_text(dict(numbers), compact=True)),
    )
    return dict(zip(_KEYS, map(str, values), strict=True))


def to_text(state: MazeState, *, split: str, index: int, seed: int) -> str:
    """The board as a board file; raises ValueError where it has no plan."""
    rows = (" ".join(map(str, row)) for row in state.walls)
    return base.write_board(
        _fields(state, shortest_plan(state), split, index, seed), "layout", rows
    )


def _check_walls(state: MazeState, source: str) -> None:
    """Raise ValueError unless both sides of each boundary agree and the edge is closed."""
    masks = [mask for row in state.walls for mask in row]
    for node, moves in enumerate(base.grid_moves(state.size, ACTIONS)):
        inside = dict(moves)
        for action in (action for action in ACTIONS if not masks[node] & _WALLS[action]):
            if action not in inside or masks[inside[action]] & _WALLS[_OPPOSITE[action]]:
                got = f"{action} of {divmod(node, state.size)} open, and closed from the other side"
                raise base.bad_board(source, "layout", got, "one answer from both sides")


def from_text(text: str, *, source: str) -> MazeState:
    """The board in a board file. Raises ValueError with source, key, got and want."""
    board = base.read_board(text, source, _KEYS, "layout")
    base.check_task(board, NAME, MIN_LEVEL, MAX_LEVEL)
    for row in board.rows:
        if not all(mask.isdecimal() and len(mask) < 3 for mask in row.split()):
            raise base.bad_board(source, "layout", repr(row), "masks 0 to 15")
    walls = tuple(tuple(map(int, row.split())) for row in board.rows)
    start, target = (
        (base.integer(board, f"{name}_row"), base.integer(board, f"{name}_col"))
        for name in ("start", "target")
    )
    state = base.read_state(board, lambda: MazeState(walls, start, target))
    _check_walls(state, source)
    plan = base.file_plan(board, _paths(state))
    want = _fields(state, plan, *base.read_draw(board))
    base.check_board(
        board, want, functools.partial(play, state), functools.partial(_trajectory, state)
    )
    return state
