"""Shortest plans on a board that is a graph: one search, and one way to count, list and play plans.

Nodes are integers. `successors[node]` maps each legal action to the next node, in the order that
breaks ties between equally short plans.
"""

import functools
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Cell = tuple[int, int]  # (row, column), 0-based
Plan = tuple[str, ...]  # actions
Successors = Sequence[Mapping[str, int]]

DELTAS: Mapping[str, Cell] = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}


class Paths(NamedTuple):
    """A board as a graph. A plan leads from `start` to any node at distance 0."""

    successors: Successors
    distances: Sequence[int]  # fewest actions to the goal by node, -1 where there is no way
    start: int
    cells: Sequence[Cell]  # where the agent stands at each node


@functools.cache
def grid_cells(size: int) -> tuple[Cell, ...]:
    """The cells of a board, row by row: the cell of node `row * size + column`."""
    return tuple((row, column) for row in range(size) for column in range(size))


@functools.cache
def grid_moves(size: int, order: tuple[str, ...]) -> tuple[tuple[tuple[str, int], ...], ...]:
    """By cell, the moves that stay on the board: (action, node of the next cell), in order."""
    moves = []
    for row, column in grid_cells(size):
        steps = ((a, row + DELTAS[a][0], column + DELTAS[a][1]) for a in order)
        inside = ((a, r, c) for a, r, c in steps if 0 <= r < size and 0 <= c < size)
        moves.append(tuple((a, r * size + c) for a, r, c in inside))
    return tuple(moves)


def floor_moves(size: int, order: tuple[str, ...], floor: Iterable[int]) -> list[dict[str, int]]:
    """The successors of every cell where only the cells of `floor` can be walked on."""
    free = set(floor)
    return [
        {a: n for a, n in moves if n in free} if node in free else {}
        for node, moves in enumerate(grid_moves(size, order))
    ]


def distances_to(successors: Successors, targets: Iterable[int]) -> tuple[int, ...]:
    """Fewest actions from each node to the nearest target, -1 where there is no way."""
    predecessors: list[list[int]] = [[] for _ in successors]
    for node, steps in enumerate(successors):
        for following in steps.values():
            predecessors[following].append(node)
    distances = [-1] * len(successors)
    frontier = list(targets)
    for node in frontier:
        distances[node] = 0
    steps_left = 0
    while frontier:
        steps_left += 1
        reached = []
        for node in frontier:
            for previous in predecessors[node]:
                if distances[previous] < 0:
                    distances[previous] = steps_left
                    reached.append(previous)
        frontier = reached
    return tuple(distances)


def _choices(paths: Paths, node: int) -> list[tuple[str, int]]:
    """The first actions of the shortest ways from a node, with the nodes that they lead to."""
    left = paths.distances[node] - 1
    return [(a, n) for a, n in paths.successors[node].items() if paths.distances[n] == left]


def _check_solvable(paths: Paths) -> None:
    if paths.distances[paths.start] < 0:
        raise ValueError("got a board whose goal cannot be reached, want a solvable one")


def shortest_plan(paths: Paths, rng: np.random.Generator | None = None) -> Plan:
    """A shortest plan: the first in the order of the actions, or with `rng` a random one.

    The first one is also what breadth-first search from the start finds when it tries actions in
    that order. Random means uniform over the right actions at each step. Raises ValueError where
    the goal cannot be reached.
    """
    _check_solvable(paths)
    node, plan = paths.start, []
    while paths.distances[node]:
        choices = _choices(paths, node)
        # One choice takes no random number, so that a seed gives the plans that it always gave.
        number = 0 if rng is None or len(choices) == 1 else rng.integers(len(choices))
        action, node = choices[number]
        plan.append(action)
    return tuple(plan)


def count_shortest_plans(paths: Paths) -> int:
    """How many shortest plans there are. Raises ValueError where the goal cannot be reached."""
    return _count_ways(paths)[paths.start]


def shortest_plans(paths: Paths, limit: int) -> tuple[Plan, ...]:
    """All shortest plans in the order of the actions, or a sample of `limit` if there are more.

    In the sample no plan repeats and every plan is equally likely; a board always gives the same
    sample. Raises ValueError where the goal cannot be reached.
    """
    if limit < 1:
        raise ValueError(f"limit: got {limit}, want at least 1")
    ways = _count_ways(paths)
    total = ways[paths.start]
    if total <= limit:
        return tuple(_numbered_plan(paths, ways, number) for number in range(total))
    rng = random.Random(f"{paths.start} {paths.distances}")
    numbers: set[int] = set()
    while len(numbers) < limit:
        numbers.add(rng.randrange(total))
    return tuple(_numbered_plan(paths, ways, number) for number in sorted(numbers))


def _count_ways(paths: Paths) -> dict[int, int]:
    """The number of shortest ways on from every node that a shortest plan passes."""
    _check_solvable(paths)
    layers = [{paths.start}]  # all nodes of a layer are equally far from the goal
    for _ in range(paths.distances[paths.start]):
        layers.append({n for node in layers[-1] for _, n in _choices(paths, node)})
    ways = dict.fromkeys(layers.pop(), 1)
    for layer in reversed(layers):
        ways |= {node: sum(ways[n] for _, n in _choices(paths, node)) for node in layer}
    return ways


def _numbered_plan(paths: Paths, ways: Mapping[int, int], number: int) -> Plan:
    """The shortest plan that has `number` others before it in the order of the actions."""
    node, plan = paths.start, []
    while paths.distances[node]:
        choices = iter(_choices(paths, node))
        action, node = next(choices)
        while number >= ways[node]:
            number -= ways[node]
            action, node = next(choices)
        plan.append(action)
    return tuple(plan)


class Run(NamedTuple):
    """A plan carried out: the nodes from the start to the last legal step, and why it ended."""

    nodes: list[int]
    reason: str
    steps: int  # actions carried out, a failing one included

    @property
    def is_legal(self) -> bool:
        """Whether every action carried out led to a node."""
        return self.reason != "invalid_token" and len(self.nodes) == self.steps + 1


def run(
    paths: Paths,
    plan: Plan,
    actions: Iterable[str],
    refuse: Callable[[int, str], tuple[int | None, str | None]],
) -> Run:
    """Carries out a plan until it succeeds or fails; the actions after that are ignored.

    `refuse(node, action)` is asked about an action that the graph does not have: the next node
    (None: the action is illegal) and the reason to stop there (None: go on). A plan with an action
    that is not in `actions` is not carried out at all.
    """
    nodes = [paths.start]
    if not set(plan) <= set(actions):
        return Run(nodes, "invalid_token", 0)
    if paths.distances[paths.start] == 0:
        return Run(nodes, "success", 0)
    if not plan:
        return Run(nodes, "empty_plan", 0)
    for steps, action in enumerate(plan, start=1):
        moves, reason = paths.successors[nodes[-1]], None
        node = moves.get(action)
        if node is None:
            node, reason = refuse(nodes[-1], action)
        if node is not None:
            nodes.append(node)
            if paths.distances[node] == 0:
                return Run(nodes, "success", steps)
        if reason is not None:
            return Run(nodes, reason, steps)
    return Run(nodes, "not_reached", len(plan))
