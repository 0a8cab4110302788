"""State facts read back out of a response, and the board that they describe.

The labels are those of `state_lines`; a response that states something else, or nothing, has
other facts or none. This is how perception errors are told from planning errors.
"""

import re
from collections.abc import Callable
from typing import Any

from mgsd_jax.envs.base import Cell, Fact
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState

_CELL = re.compile(r"\((\d+),\s*(\d+)\)")
_SIZE = re.compile(r"(\d+)\s*x\s*\1(?!\d)")
_OPEN = re.compile(r"^\((\d+),\s*(\d+)\):(.*)$")
_WALLS = {"up": 1, "down": 2, "left": 4, "right": 8}  # the mask bit of each closed side
_LABELS: dict[str, dict[str, str]] = {
    "frozenlake": {"Player": "player", "Goal": "goal", "Holes": "hole"},
    "maze": {"Player": "player", "Goal": "goal"},
    "minibehaviour": {"Agent": "agent", "Printer": "printer", "Table": "table"},
}


def read_facts(task: str, text: str) -> frozenset[Fact]:
    """The facts that `text` states, in the terms of the env's `facts`.

    Only lines with a known label count, the first of each label; the answer block does not.
    """
    facts: set[Fact] = set()
    seen: set[str] = set()
    for line in text.split("\n"):
        opened = _OPEN.match(line.strip())
        if opened and task == "maze":
            cell = (int(opened[1]), int(opened[2]))
            if f"{cell}" not in seen:
                seen.add(f"{cell}")
                words = {word.strip() for word in opened[3].split(",")}
                facts.update(("open", cell, word) for word in _WALLS if word in words)
            continue
        label, separator, value = line.strip().partition(":")
        if not separator or label in seen:
            continue
        size = _SIZE.search(value)
        if label == "Map size" and size:
            facts.add(("size", int(size[1])))
        elif label in _LABELS[task]:
            name = _LABELS[task][label]
            facts.update((name, (int(r), int(c))) for r, c in _CELL.findall(value))
        else:
            continue
        seen.add(label)
    return frozenset(facts)


def state_f1(stated: frozenset[Fact], true: frozenset[Fact]) -> float:
    """F1 in [0, 1] between the facts stated and the true ones (never empty)."""
    return 2 * len(stated & true) / (len(stated) + len(true))


def state_from_facts(task: str, facts: frozenset[Fact]) -> Any | None:
    """The board that the facts describe, None where they describe none."""
    named: dict[str, list[Any]] = {}
    for name, *values in facts:
        named.setdefault(name, []).append(values[0] if len(values) == 1 else tuple(values))
    sizes = named.pop("size", [])
    if len(sizes) != 1 or not 0 < sizes[0] <= 64:
        return None
    return _BUILDERS[task](sizes[0], named)


def _frozenlake(size: int, named: dict[str, list[Any]]) -> FrozenLakeState | None:
    ends = [named.get(name, []) for name in ("player", "goal")]
    holes = set(named.get("hole", []))
    if any(len(cells) != 1 for cells in ends) or not _inside(size, [*holes, *ends[0], *ends[1]]):
        return None
    letters = {**dict.fromkeys(holes, "H"), ends[0][0]: "S", ends[1][0]: "G"}
    if len(letters) != len(holes) + 2:
        return None
    rows = ("".join(letters.get((r, c), "F") for c in range(size)) for r in range(size))
    return FrozenLakeState(tuple(rows))


def _maze(size: int, named: dict[str, list[Any]]) -> MazeState | None:
    ends = [named.get(name, []) for name in ("player", "goal")]
    if any(len(cells) != 1 for cells in ends) or not _inside(size, [*ends[0], *ends[1]]):
        return None
    walls = [[15] * size for _ in range(size)]
    for cell, direction in named.get("open", []):
        if not _inside(size, [cell]):
            return None
        walls[cell[0]][cell[1]] &= ~_WALLS[direction]
    return MazeState(tuple(map(tuple, walls)), start=ends[0][0], target=ends[1][0])


def _minibehaviour(size: int, named: dict[str, list[Any]]) -> MiniBehaviourState | None:
    agent, printer, table = (named.get(name, []) for name in ("agent", "printer", "table"))
    if len(agent) != 1 or len(printer) != 1 or len(table) != 6:
        return None
    cells = {*agent, *printer, *table}
    if len(cells) != 8 or not _inside(size, list(cells)):
        return None
    return MiniBehaviourState(size, agent[0], printer[0], tuple(sorted(table)))


def _inside(size: int, cells: list[Cell]) -> bool:
    return all(0 <= row < size and 0 <= column < size for row, column in cells)


_BUILDERS: dict[str, Callable[[int, dict[str, list[Any]]], Any | None]] = {
    "frozenlake": _frozenlake,
    "maze": _maze,
    "minibehaviour": _minibehaviour,
}
