"""FrozenLake: walk over the ice from S to G around the holes H.

Boards are drawn as gymnasium's `generate_random_map` draws them (each tile frozen with a fixed
probability, kept if the corners are connected), then start and goal are two random open cells.
Moving off the board leaves the agent where it is.
"""

import dataclasses
import functools
import pathlib
from collections.abc import Iterable

import gymnasium
import numpy as np
from gymnasium.envs import toy_text
from PIL import Image, ImageDraw

from mgsd_jax.envs import base, files, search
from mgsd_jax.envs.base import Question, Sprites
from mgsd_jax.envs.search import Cell, Paths, Plan

_ORDER = ("left", "down", "right", "up")  # breaks ties between plans, as the public solver does
_SHORTEST = 2  # actions: start and goal are never next to each other
_MAP_DRAWS, _PAIR_DRAWS = 1000, 64
_PROBABILITY = 0.9
_OUTLINE = (180, 200, 230)
_KINDS = "FHSG"
# Counted by going through all sets of holes, as tests/test_envs.py does.
_COUNTS = {2: 8, 3: 1218, 4: 296_554}


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
    def start(self) -> Cell:
        return self.cells("S")[0]

    @property
    def goal(self) -> Cell:
        return self.cells("G")[0]

    @property
    def holes(self) -> tuple[Cell, ...]:
        return self.cells("H")

    def cells(self, letter: str) -> tuple[Cell, ...]:
        """The cells of a tile, row by row."""
        tiles = "".join(self.rows)
        return tuple(divmod(i, self.size) for i, tile in enumerate(tiles) if tile == letter)


def _from_tiles(tiles: Iterable[str], size: int) -> FrozenLakeState:
    joined = "".join(tiles)
    return FrozenLakeState(tuple(joined[i : i + size] for i in range(0, size * size, size)))


def _successors(tiles: str, size: int) -> list[dict[str, int]]:
    return search.floor_moves(size, _ORDER, (i for i, tile in enumerate(tiles) if tile != "H"))


@functools.lru_cache(maxsize=1024)
def _paths(state: FrozenLakeState) -> Paths:
    tiles = "".join(state.rows)
    successors = _successors(tiles, state.size)
    distances = search.distances_to(successors, [tiles.index("G")])
    return Paths(successors, distances, tiles.index("S"), search.grid_cells(state.size))


def _refuse(state: FrozenLakeState, node: int, action: str) -> tuple[int | None, str | None]:
    """A hole ends the walk; a move off the board does nothing."""
    hole = dict(search.grid_moves(state.size, _ORDER)[node]).get(action)
    return (node, None) if hole is None else (hole, "fell_into_hole")


def generate(
    rng: np.random.Generator, level: int, *, frozen_probability: float = _PROBABILITY
) -> FrozenLakeState:
    """A random solvable board; its shortest plan has at least two actions.

    Raises ValueError for a level or probability out of range, and where so few tiles are frozen
    that no draw connects the corners (gymnasium's own loop would not end).
    """
    ENV.check_level(level)
    if not 0.0 < frozen_probability <= 1.0:
        raise ValueError(f"frozen_probability: got {frozen_probability}, want above 0, at most 1")
    last = level * level - 1
    for _ in range(_MAP_DRAWS):
        frozen = rng.random(level * level) < frozen_probability
        frozen[[0, last]] = True
        tiles = "".join("FH"[not is_frozen] for is_frozen in frozen.tolist())
        successors = _successors(tiles, level)
        if search.distances_to(successors, [last])[0] < 0:
            continue
        ends = _draw_ends(rng, tiles, successors)
        if ends is not None:
            letters = list(tiles)
            letters[ends[0]], letters[ends[1]] = "S", "G"
            return _from_tiles(letters, level)
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
        if search.distances_to(successors, [goal])[start] >= _SHORTEST:
            return start, goal
    return None


def _key(state: FrozenLakeState) -> str:
    return f"{ENV.name}:{'/'.join(state.rows)}"


# Drawing.


def _sprite(name: str) -> Image.Image:
    folder = pathlib.Path(toy_text.__path__[0]) / "img"
    path = folder / f"{name}.png"
    if not path.exists():
        raise ValueError(
            f"gymnasium {gymnasium.__version__}: no sprite {name}.png found, want gymnasium < 1.4 "
            "(1.4 redrew FrozenLake; the public boards and benchmarks show the older sprites)"
        )
    return Image.open(path).convert("RGBA")


_LAYERS: dict[Sprites, dict[str, tuple[str, ...]]] = {
    "usual": {"F": (), "H": ("hole",), "G": ("goal",), "S": ("stool", "elf_down")},
    "other": {"F": (), "H": ("cracked_hole",), "G": ("goal",), "S": ("elf_left",)},
}


def _tile(letter: str, pixels: int, sprites: Sprites) -> Image.Image:
    tile = Image.new("RGBA", (pixels, pixels))
    for name in ("ice", *_LAYERS[sprites][letter]):
        tile.alpha_composite(_sprite(name).resize((pixels, pixels), Image.Resampling.LANCZOS))
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
    base.cell_edges(state.size, size)
    kinds = [[_KINDS.index(tile) for tile in row] for row in state.rows]
    return base.paste_cells(_sheets(state.size, size, sprites), kinds)


# Words.


def _questions(state: FrozenLakeState) -> tuple[Question, ...]:
    return (
        base.ask_size(state.size),
        base.ask_cell("player", "At which (row,column) is the player?", state.start),
        base.ask_cell("goal", "At which (row,column) is the goal?", state.goal),
        base.ask_cells("hole", "Which cells are holes?", state.holes, "holes"),
    )


def _from_facts(size: int, named: base.NamedCells) -> FrozenLakeState:
    ends = {base.only_cell(named, "player"): "S", base.only_cell(named, "goal"): "G"}
    if ends.keys() & set(named["hole"]):
        raise ValueError("holes: got a hole at an end of the way, want it elsewhere")
    letters = dict.fromkeys(named["hole"], "H") | ends
    return _from_tiles([letters.get(cell, "F") for cell in search.grid_cells(size)], size)


def _disturb(state: FrozenLakeState, rng: np.random.Generator, share: float) -> FrozenLakeState:
    tiles = list("".join(state.rows))
    for place, tile in enumerate("".join(state.rows)):
        if tile != "F" and rng.random() < share:
            floor = [i for i, other in enumerate(tiles) if other == "F"]
            if floor:
                tiles[place], tiles[floor[rng.integers(len(floor))]] = "F", tile
    return _from_tiles(tiles, state.size)


# Board files.


def _fields(state: FrozenLakeState, plan: Plan, board: files.BoardText | None) -> dict[str, object]:
    probability = _PROBABILITY if board is None else files.number(board, "frozen_probability")
    if not 0.0 < probability <= 1.0:
        raise files.bad_board("frozen_probability", probability, "above 0, at most 1")
    (start_row, start_col), (goal_row, goal_col) = state.start, state.goal
    return {
        **{"frozen_probability": probability, "is_slippery": "false"},
        **{"start_row": start_row, "start_col": start_col},
        **{"goal_row": goal_row, "goal_col": goal_col},
    }


ENV: base.Env[FrozenLakeState] = base.Env(
    name="frozenlake",
    title="FrozenLake",
    levels=range(2, 33),
    actions=base.MOVES,
    reasons={"fell_into_hole": "fell into a hole"},
    labels={"player": "player", "goal": "goal", "hole": "holes"},
    wording=base.Wording(
        rules=(
            "Find a way over the frozen lake for the player.",
            base.CELLS_RULE,
            base.MOVES_RULE.format("player"),
            "A move off the board leaves the player in place; a hole ends the walk in failure.",
            "Reach the goal in as few moves as possible.",
        ),
        legend="The player wears green, the goal is a gift box, holes are blue pools.",
        form=("Map size: NxN", "Player: cell", "Goal: cell", "Holes: cells, or none"),
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
            *("task", "split", "level", "index", "seed", "frozen_probability", "is_slippery"),
            *("start_row", "start_col", "goal_row", "goal_col"),
            *("path_length", "solution_actions", "trajectory_states"),
        ),
        block="map",
        rows=lambda state: state.rows,
        read=lambda board: FrozenLakeState(board.rows),
        fields=_fields,
    ),
    map_lines=lambda state: ("Map:", *state.rows),
    even_options={"frozen_probability": 0.5},
    options={"frozen_probability": _PROBABILITY, "fixed_corners": False},
)
