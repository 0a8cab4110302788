"""FrozenLake: walk over the ice from S to G around the holes H.

Boards are drawn as gymnasium's `generate_random_map` draws them (each tile frozen with a fixed
probability, kept if the corners are connected), then start and goal are two random open cells.
Moving off the board leaves the agent where it is.
"""

import dataclasses
import functools
import pathlib

import gymnasium
import numpy as np
from gymnasium.envs import toy_text
from PIL import Image, ImageDraw

from mgsd_jax.envs import base
from mgsd_jax.envs.base import Cell, Fact, Outcome, Paths, Plan, Question, Reason, Sprites

NAME: str = "frozenlake"
ACTIONS: tuple[str, ...] = ("up", "down", "left", "right")
MIN_LEVEL: int = 2
MAX_LEVEL: int = 32

_ORDER = ("left", "down", "right", "up")  # breaks ties between plans, as the public solver does
_SHORTEST = 2  # actions: start and goal are never next to each other
_MAP_DRAWS, _PAIR_DRAWS = 1000, 64
_OUTLINE = (180, 200, 230)
_KINDS = "FHSG"
_KEYS = (
    *("task", "split", "level", "index", "seed", "frozen_probability", "is_slippery"),
    *("start_row", "start_col", "goal_row", "goal_col"),
    *("path_length", "solution_actions", "trajectory_states"),
)


@dataclasses.dataclass(frozen=True)
class FrozenLakeState:
    """A square map over S F H G with one S and one G."""

    rows: tuple[str, ...]

    def __post_init__(self) -> None:
        tiles = "".join(self.rows)
        if not self.rows or {len(row) for row in self.rows} != {len(self.rows)}:
            raise ValueError(f"map: got rows {self.rows}, want a square")
        if set(tiles) - set("SFHG"):
            raise ValueError(f"map: got tiles {sorted(set(tiles))}, want only S F H G")
        for letter in "SG":
            if tiles.count(letter) != 1:
                raise ValueError(f"map: got {tiles.count(letter)} tiles {letter}, want 1")

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def level(self) -> int:
        return self.size

    @property
    def start(self) -> Cell:
        return divmod("".join(self.rows).index("S"), self.size)

    @property
    def goal(self) -> Cell:
        return divmod("".join(self.rows).index("G"), self.size)

    @property
    def holes(self) -> tuple[Cell, ...]:
        tiles = "".join(self.rows)
        return tuple(divmod(i, self.size) for i, tile in enumerate(tiles) if tile == "H")


def _successors(tiles: str, size: int) -> list[dict[str, int]]:
    moves = base.grid_moves(size, _ORDER)
    return [
        {} if tile == "H" else {action: n for action, n in moves[node] if tiles[n] != "H"}
        for node, tile in enumerate(tiles)
    ]


@functools.lru_cache(maxsize=1024)
def _paths(state: FrozenLakeState) -> Paths:
    tiles = "".join(state.rows)
    successors = _successors(tiles, state.size)
    distances = base.distances_to(successors, [tiles.index("G")])
    return Paths(successors, distances, tiles.index("S"))


def generate(
    rng: np.random.Generator,
    level: int,
    *,
    frozen_probability: float = 0.9,
    fixed_corners: bool = False,
) -> FrozenLakeState:
    """A random solvable board; its shortest plan has at least two actions.

    `fixed_corners` puts the start at the top left and the goal at the bottom right, as gymnasium
    does. Raises ValueError for a level or probability out of range, and where so few tiles are
    frozen that no draw connects the corners (gymnasium's own loop would not end).
    """
    base.check_level(NAME, level, MIN_LEVEL, MAX_LEVEL)
    if not 0.0 < frozen_probability <= 1.0:
        raise ValueError(f"frozen_probability: got {frozen_probability}, want above 0, at most 1")
    last = level * level - 1
    for _ in range(_MAP_DRAWS):
        frozen = rng.random(level * level) < frozen_probability
        frozen[[0, last]] = True
        tiles = "".join("FH"[not is_frozen] for is_frozen in frozen.tolist())
        successors = _successors(tiles, level)
        if base.distances_to(successors, [last])[0] < 0:
            continue
        ends = (0, last) if fixed_corners else _draw_ends(rng, tiles, successors)
        if ends is not None:
            letters = list(tiles)
            letters[ends[0]], letters[ends[1]] = "S", "G"
            joined = "".join(letters)
            return FrozenLakeState(tuple(joined[i : i + level] for i in range(0, last, level)))
    raise ValueError(
        f"frozen_probability: got {frozen_probability}, which connected the corners in none of "
        f"{_MAP_DRAWS} draws at level {level}, want more"
    )


def _draw_ends(
    rng: np.random.Generator, tiles: str, successors: list[dict[str, int]]
) -> tuple[int, int] | None:
    """Two open cells at least `_SHORTEST` apart, uniform over such pairs; None if unlucky."""
    cells = [node for node, tile in enumerate(tiles) if tile == "F"]
    for _ in range(_PAIR_DRAWS):
        start, goal = cells[rng.integers(len(cells))], cells[rng.integers(len(cells))]
        if start == goal or goal in successors[start].values():
            continue
        if base.distances_to(successors, [goal])[start] >= _SHORTEST:
            return start, goal
    return None


@functools.cache
def count_states(level: int) -> int | None:
    """How many boards `generate` can return by default, by enumeration up to level 4; else None.

    All sets of holes at once: bit i of a map says that cell i is open, and floods spread over the
    maps in parallel.
    """
    base.check_level(NAME, level, MIN_LEVEL, MAX_LEVEL)
    if level > 4:
        return None
    cells = level * level
    inner = np.arange(1 << (cells - 2), dtype=np.uint32)
    opened = (inner << 1) | np.uint32(1) | np.uint32(1 << (cells - 1))
    not_first = np.uint32(sum(1 << i for i in range(cells) if i % level))
    not_last = np.uint32(sum(1 << i for i in range(cells) if (i + 1) % level))
    width = np.uint32(level)

    def spread(bits: np.ndarray) -> np.ndarray:
        sides = ((bits & not_last) << 1) | ((bits & not_first) >> 1)
        return (sides | (bits << width) | (bits >> width)) & opened

    pairs = np.zeros_like(opened)
    valid = np.zeros(opened.shape, bool)
    for cell in range(cells):
        here = opened & np.uint32(1 << cell)
        near = spread(here)
        reached, grown = here, here | near
        while (grown != reached).any():
            reached, grown = grown, grown | spread(grown)
        pairs += np.bitwise_count(reached & ~(here | near))
        if cell == 0:
            valid = (reached >> np.uint32(cells - 1)) & 1 == 1
    return int(pairs[valid].sum())


def key(state: FrozenLakeState) -> str:
    """The board as one line, equal only for equal boards."""
    return f"{NAME}:{'/'.join(state.rows)}"


# Drawing.


def _sprite(name: str) -> Image.Image:
    folder = pathlib.Path(toy_text.__path__[0]) / "img"
    path = folder / f"{name}.png"
    if not path.exists():
        raise ValueError(
            f"gymnasium {gymnasium.__version__}: got no sprite {name}.png, want gymnasium < 1.4 "
            "(1.4 redrew FrozenLake; the public boards and benchmarks show the older sprites)"
        )
    return Image.open(path).convert("RGBA")


_LAYERS: dict[Sprites, dict[str, tuple[str, ...]]] = {
    "usual": {"F": (), "H": ("hole",), "G": ("goal",), "S": ("stool", "elf_down")},
    "other": {"F": (), "H": ("cracked_hole",), "G": ("goal",), "S": ("elf_left",)},
}


def _tile(letter: str, pixels: int, sprites: Sprites) -> Image.Image:
    tile = Image.new("RGBA", (pixels, pixels))
    layers = _LAYERS[sprites][letter]
    for name in ("ice", *layers):
        sprite = _sprite(name).resize((pixels, pixels), Image.Resampling.LANCZOS)
        tile.alpha_composite(sprite)
    ImageDraw.Draw(tile).rectangle((0, 0, pixels - 1, pixels - 1), outline=_OUTLINE)
    return tile.convert("RGB")


@functools.lru_cache(maxsize=32)
def _sheets(level: int, size: int, sprites: Sprites) -> np.ndarray:
    """Whole boards of one kind of tile each, uint8 [len(_KINDS), size, size, 3].

    Tiles are at most 64 pixels and are drawn larger than shown, then the whole board is reduced,
    as in the public pictures; a tile that already has the size shown is not resampled again.
    """
    pixels = min(64, max(512 // level, -(-size // level)))
    sheets = []
    for letter in _KINDS:
        tiles = np.tile(np.asarray(_tile(letter, pixels, sprites)), (level, level, 1))
        board = Image.fromarray(tiles).resize((size, size), Image.Resampling.LANCZOS)
        sheets.append(np.asarray(board))
    return np.stack(sheets)


def render(state: FrozenLakeState, size: int = 256, *, sprites: Sprites = "usual") -> np.ndarray:
    """The board drawn with gymnasium's sprites, uint8 [size, size, 3].

    The other sprites are its cracked hole and its elf seen from the side, without the stool.
    Raises ValueError below 8 pixels a cell.
    """
    edges = base.cell_edges(state.size, size)
    kinds = (
        (r, c, _KINDS.index(tile))
        for r, row in enumerate(state.rows)
        for c, tile in enumerate(row)
        if tile != "F"
    )
    return base.paste_cells(_sheets(state.size, size, sprites), edges, kinds)


# Words.


def state_lines(state: FrozenLakeState) -> tuple[str, ...]:
    """What a response states before its plan."""
    return (
        f"Map size: {state.size}x{state.size}",
        f"Player: {base.show_cell(state.start)}",
        f"Goal: {base.show_cell(state.goal)}",
        f"Holes: {base.show_cells(state.holes)}",
    )


def describe(state: FrozenLakeState) -> str:
    """The state lines and the map."""
    return "\n".join((*state_lines(state), "Map:", *state.rows))


def facts(state: FrozenLakeState) -> frozenset[Fact]:
    return frozenset().union(*(question.facts for question in questions(state)))


def questions(state: FrozenLakeState) -> tuple[Question, ...]:
    """Map size, player, goal and holes, each with its answer and the facts in it."""
    holes = frozenset(("hole", cell) for cell in state.holes)
    size, player, goal, hole_cells = (line.split(": ", 1)[1] for line in state_lines(state))
    return (
        Question("map_size", base.ASK_SIZE, size, "size", frozenset({("size", state.size)})),
        Question(
            "player",
            "At which (row,column) is the player?",
            player,
            "coord",
            frozenset({("player", state.start)}),
        ),
        Question(
            "goal",
            "At which (row,column) is the goal?",
            goal,
            "coord",
            frozenset({("goal", state.goal)}),
        ),
        Question("holes", "Which cells are holes?", hole_cells, "cells", holes),
    )


# Plans.


def shortest_plan(state: FrozenLakeState) -> Plan:
    """A shortest plan, by the base module's tie order. Raises ValueError if there is none."""
    return base.shortest_plan(_paths(state))


def shortest_plans(state: FrozenLakeState, limit: int = 64) -> tuple[Plan, ...]:
    return base.shortest_plans(_paths(state), limit)


def count_shortest_plans(state: FrozenLakeState) -> int:
    return base.count_shortest_plans(_paths(state))


def random_shortest_plan(state: FrozenLakeState, rng: np.random.Generator) -> Plan:
    return base.shortest_plan(_paths(state), rng)


def _run(state: FrozenLakeState, plan: Plan) -> base.Run:
    def step(node: int, action: str) -> tuple[int | None, Reason | None]:
        row, column = divmod(node, state.size)
        row, column = row + base.DELTAS[action][0], column + base.DELTAS[action][1]
        if not (0 <= row < state.size and 0 <= column < state.size):
            return node, None
        is_hole = state.rows[row][column] == "H"
        return row * state.size + column, "fell_into_hole" if is_hole else None

    return base.run(_paths(state), plan, ACTIONS, step)


def play(state: FrozenLakeState, plan: Plan) -> Outcome:
    """The outcome of a plan: off the board stays put, a hole fails, the goal ends in success."""
    return base.outcome(_paths(state), _run(state, plan))


def trace(state: FrozenLakeState, plan: Plan) -> tuple[Cell, ...]:
    """The cell at the start and after each action carried out, the hole included."""
    return tuple(divmod(node, state.size) for node in _run(state, plan).nodes)


# Board files.


def _trajectory(state: FrozenLakeState, plan: Plan) -> str:
    return base.json_text(trace(state, plan))


def _fields(
    state: FrozenLakeState, plan: Plan, split: str, index: int, seed: int, frozen_probability: float
) -> dict[str, str]:
    (start_row, start_col), (goal_row, goal_col) = state.start, state.goal
    values = (
        *(NAME, split, state.level, index, seed, frozen_probability, "false"),
        *(start_row, start_col, goal_row, goal_col),
        *(len(plan), base.json_text(plan), _trajectory(state, plan)),
    )
    return dict(zip(_KEYS, map(str, values), strict=True))


def to_text(
    state: FrozenLakeState, *, split: str, index: int, seed: int, frozen_probability: float = 0.9
) -> str:
    """The board as a board file; raises ValueError where it has no plan."""
    fields = _fields(state, shortest_plan(state), split, index, seed, frozen_probability)
    return base.write_board(fields, "map", state.rows)


def from_text(text: str, *, source: str) -> FrozenLakeState:
    """The board in a board file. Raises ValueError with source, key, got and want."""
    board = base.read_board(text, source, _KEYS, "map")
    base.check_task(board, NAME, MIN_LEVEL, MAX_LEVEL)
    probability = base.number(board, "frozen_probability")
    if not 0.0 < probability <= 1.0:
        raise base.bad_board(source, "frozen_probability", probability, "above 0, at most 1")
    state = base.read_state(board, lambda: FrozenLakeState(tuple(board.rows)))
    plan = base.file_plan(board, _paths(state))
    want = _fields(state, plan, *base.read_draw(board), probability)
    base.check_board(
        board, want, functools.partial(play, state), functools.partial(_trajectory, state)
    )
    return state
