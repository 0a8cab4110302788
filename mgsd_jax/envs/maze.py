"""Maze: walk through a perfect maze from the start to the target; a wall or the edge ends it.

Mazes are carved by a recursive backtracker from a random cell, as the public ones are: long
corridors, few branches. That makes depth-first trees of the grid, fewer than its spanning trees.
"""

import dataclasses
import functools

import numpy as np

from mgsd_jax.envs import base
from mgsd_jax.envs.base import Bucket, Cell, Fact, Outcome, Paths, Plan, Question, Reason

NAME = "maze"
ACTIONS = ("up", "down", "left", "right")
MIN_LEVEL, MAX_LEVEL = 2, 32

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


@functools.lru_cache(maxsize=16)
def _sheets(level: int, size: int) -> np.ndarray:
    """Whole boards whose cells all have one mask, uint8 [16, size, size, 3], indexed by the mask.

    Lengths are the public ones at 256 pixels: a wall is a quarter of a cell, half of it on either
    side of the boundary; an open boundary is a thin line across the corridor.
    """
    wall, line = max(2, int(size / level / 4)), max(1, int(size / level / 16))
    edges = base.cell_edges(level, size)
    # Twice the coordinate keeps halves of a wall exact; PIL's rectangles include the last pixel.
    inner = [
        ((2 * i * size + wall * level) // (2 * level), (2 * (i + 1) * size - wall * level) // (2 * level) + 1)
        for i in range(level)
    ]
    sheets = np.zeros((16, size, size, 3), np.uint8)
    for mask in range(16):
        for index in range(level):
            _draw_corridors(sheets[mask], mask, index, edges, inner, line)
    return sheets
