"""The three envs: boards, plans, play, words and pictures."""

import dataclasses
import functools
import hashlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from mgsd_jax.envs import ENVS, base, search
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState

TASKS = ("frozenlake", "maze", "minibehaviour")
frozenlake, maze, minibehaviour = (ENVS[task] for task in TASKS)
LAKE = FrozenLakeState(("SFF", "FHF", "FFG"))
ROOM = MiniBehaviourState(5, (3, 0), (4, 1), ((2, 2), (2, 3), (2, 4), (3, 2), (3, 3), (3, 4)))
# S and T mark the ends: a corridor (0,0)-(0,1)-(1,1)-(1,0), closed between (0,0) and (1,0).
CORRIDOR = MazeState(((7, 9), (7, 10)), start=(0, 0), target=(1, 0))


@functools.cache
def boards(task: str, level: int, count: int = 20) -> tuple[Any, ...]:
    rng = np.random.default_rng(level)
    return tuple(ENVS[task].generate(rng, level) for _ in range(count))


def small_boards(task: str) -> Iterator[Any]:
    for level in range(ENVS[task].levels[0], 8):
        yield from boards(task, level)


# Boards.


@pytest.mark.parametrize("task", TASKS)
def test_the_same_rng_state_gives_the_same_board_and_no_global_state_is_used(task: str) -> None:
    np.random.seed(0)
    before = str(np.random.get_state())
    draws = [ENVS[task].generate(np.random.default_rng(seed), 6) for seed in (5, 5, 6)]
    assert draws[0] == draws[1] != draws[2]
    assert hash(draws[0]) == hash(draws[1])
    assert str(np.random.get_state()) == before


@pytest.mark.parametrize("task", TASKS)
def test_a_level_out_of_range_is_refused(task: str) -> None:
    env, rng = ENVS[task], np.random.default_rng(0)
    for level in (env.levels[0] - 1, env.levels[-1] + 1):
        want = f"got {level}, want {env.levels[0]} to {env.levels[-1]}"
        with pytest.raises(ValueError, match=want):
            env.generate(rng, level)
        with pytest.raises(ValueError, match=want):
            env.count_states(level)


@pytest.mark.parametrize("task", TASKS)
def test_every_level_plays_its_own_shortest_plan(task: str) -> None:
    env, rng = ENVS[task], np.random.default_rng(1)
    for level in range(env.levels[0], env.levels[-1] + 1):
        state = env.generate(rng, level)
        assert state.size == level
        for plan in (env.shortest_plan(state), env.random_shortest_plan(state, rng)):
            outcome = env.play(state, plan)
            assert outcome == base.Outcome(True, True, True, True, "success", len(plan), 1.0)
            assert len(env.trace(state, plan)) == len(plan) + 1


@pytest.mark.parametrize("task", TASKS)
def test_keys_are_equal_for_equal_boards_only(task: str) -> None:
    states = list(small_boards(task))
    assert len({ENVS[task].key(state) for state in states}) == len(set(states))


def test_frozen_lake_options() -> None:
    rng = np.random.default_rng(0)
    assert frozenlake.generate(rng, 4, frozen_probability=1.0).holes == ()
    hole_share = np.mean([len(state.holes) / 64 for state in boards("frozenlake", 8, 400)])
    assert 0.085 < hole_share < 0.1  # a little under a tenth: unconnected maps are drawn again
    assert min(len(frozenlake.shortest_plan(s)) for s in boards("frozenlake", 4, 400)) == 2
    with pytest.raises(ValueError, match=r"got 0\.05, which connected the corners in none of"):
        frozenlake.generate(rng, 32, frozen_probability=0.05)
    for probability in (0.0, 1.1, math.nan):
        with pytest.raises(ValueError, match="frozen_probability: got"):
            frozenlake.generate(rng, 4, frozen_probability=probability)


@pytest.mark.parametrize("level", [4, 6])
@pytest.mark.parametrize(
    ("task", "bounds"),
    [("maze", lambda n: (n // 2, n)), ("minibehaviour", lambda n: (n - 1, n + 1))],
)
def test_buckets_bound_the_length_of_the_plan(task: str, bounds: Any, level: int) -> None:
    env, (easy, medium), seen = ENVS[task], bounds(level), Counter()
    for state in boards(task, level, 200):
        length = len(env.shortest_plan(state))
        bucket = "easy" if length <= easy else "medium" if length <= medium else "hard"
        seen[bucket] += 1
        text = env.to_text(state, split="train", index=0, seed=0)
        assert f"\ndifficulty_bucket={bucket}\n" in text
    assert min(seen[bucket] for bucket in ("easy", "medium", "hard")) >= 10


@pytest.mark.parametrize("level", [2, 3, 6])
def test_mazes_are_perfect(level: int) -> None:
    for state in boards("maze", level):
        opened = sum(bin(15 - mask).count("1") for row in state.walls for mask in row)
        assert opened == 2 * (level * level - 1)  # a spanning tree, each edge from both sides
        targets = (MazeState(state.walls, state.start, (r, c)) for r, c in np.ndindex(level, level))
        assert all(maze.shortest_plans(target) for target in targets)  # all connected
        assert state.start != state.target


# Counts.


def open_neighbours(tiles: dict[search.Cell, bool], cell: search.Cell) -> list[search.Cell]:
    near = [(cell[0] + r, cell[1] + c) for r, c in ((0, 1), (1, 0), (0, -1), (-1, 0))]
    return [other for other in near if tiles.get(other, False)]


def reachable(tiles: dict[search.Cell, bool], cell: search.Cell) -> set[search.Cell]:
    found, frontier = {cell}, [cell]
    while frontier:
        for other in open_neighbours(tiles, frontier.pop()):
            if other not in found:
                found.add(other)
                frontier.append(other)
    return found


@pytest.mark.parametrize("level", [2, 3, 4])
def test_frozen_lake_count_is_the_number_of_boards(level: int) -> None:
    cells = list(np.ndindex(level, level))
    count = 0
    for inner in itertools.product((True, False), repeat=len(cells) - 2):
        tiles = dict(zip(cells, (True, *inner, True), strict=True))
        if cells[-1] in reachable(tiles, cells[0]):
            for start in (cell for cell in cells if tiles[cell]):
                count += len(reachable(tiles, start)) - 1 - len(open_neighbours(tiles, start))
    assert frozenlake.count_states(level) == count
    if level < 4:
        rng = np.random.default_rng(0)
        draws = range(15 * count)
        drawn = {frozenlake.generate(rng, level, frozen_probability=0.6) for _ in draws}
        assert len(drawn) == count


def grid_edges(level: int) -> list[frozenset[search.Cell]]:
    everywhere = dict.fromkeys(np.ndindex(level, level), True)
    return [
        frozenset(e)
        for e in {frozenset((c, o)) for c in everywhere for o in open_neighbours(everywhere, c)}
    ]


def is_depth_first_tree(
    tree: dict[search.Cell, list[search.Cell]], root: search.Cell, level: int
) -> bool:
    """Whether each edge of the grid joins an ancestor and a descendant."""
    above: dict[search.Cell, frozenset[search.Cell]] = {root: frozenset()}
    frontier = [root]
    while frontier:
        cell = frontier.pop()
        for child in tree[cell]:
            if child not in above:
                above[child] = above[cell] | {cell}
                frontier.append(child)
    pairs = (tuple(edge) for edge in grid_edges(level))
    return len(above) == level * level and all(a in above[b] or b in above[a] for a, b in pairs)


@pytest.mark.parametrize(("level", "spanning_trees"), [(2, 4), (3, 192)])
def test_maze_count_is_the_number_of_depth_first_trees(level: int, spanning_trees: int) -> None:
    cells = list(np.ndindex(level, level))
    edges = grid_edges(level)
    laplacian = np.zeros((len(cells), len(cells)))
    for a, b in edges:
        i, j = cells.index(a), cells.index(b)
        laplacian[[i, j], [j, i]] -= 1
        laplacian[[i, j], [i, j]] += 1
    # Kirchhoff's theorem counts all perfect mazes; a backtracker reaches only some of them.
    assert round(np.linalg.det(laplacian[1:, 1:])) == spanning_trees
    found = 0
    for chosen in itertools.combinations(edges, len(cells) - 1):
        tree: dict[search.Cell, list[search.Cell]] = {cell: [] for cell in cells}
        for a, b in chosen:
            tree[a].append(b)
            tree[b].append(a)
        found += any(is_depth_first_tree(tree, root, level) for root in cells)
    assert maze.count_states(level) == found * len(cells) * (len(cells) - 1)
    rng = np.random.default_rng(0)
    assert len({maze.generate(rng, level).walls for _ in range(60 * found)}) == found


def depth_first_trees(level: int) -> set[frozenset[tuple[int, int]]]:
    """All mazes of a level, each as its open boundaries.

    A backtracker at a cell walks each connected part of what is left exactly once, entering it
    through one neighbour, so the trees of a part are the union over its entrances. Sets of cells
    are bit masks.
    """
    moves = [[n for _, n in steps] for steps in search.grid_moves(level, tuple(base.MOVES))]

    def part_of(node: int, left: int) -> int:
        part, frontier = 1 << node, [node]
        while frontier:
            for n in moves[frontier.pop()]:
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
                for n in moves[node]
                if part >> n & 1
                for tree in trees(n, part)
            }
            found = {tree | branch for tree in found for branch in branches}
            left &= ~part
        return frozenset(found)

    cells = level * level
    return set().union(*(trees(node, (1 << cells) - 1) for node in range(cells)))


def test_counts_at_the_largest_levels_that_have_one() -> None:
    assert frozenlake.count_states(4) == 296_554
    for level in (2, 3, 4):  # 3,820 of the 100,352 spanning trees of level 4
        ends = level**2 * (level**2 - 1)
        assert maze.count_states(level) == len(depth_first_trees(level)) * ends
    assert frozenlake.count_states(5) is maze.count_states(5) is None


def all_rooms(level: int) -> Iterator[MiniBehaviourState]:
    cells = list(np.ndindex(level, level))
    for top, left in np.ndindex(level - 1, level - 2):
        table = tuple((top + r, left + c) for r in range(2) for c in range(3))
        floor = [cell for cell in cells if cell not in table]
        for agent, printer in itertools.permutations(floor, 2):
            yield MiniBehaviourState(level, agent, printer, table)


def test_mini_behaviour_count_is_the_number_of_boards() -> None:
    rng = np.random.default_rng(0)
    drawn = {minibehaviour.generate(rng, 4) for _ in range(8000)}
    assert drawn == set(all_rooms(4))
    assert minibehaviour.count_states(4) == len(drawn) == 540
    assert minibehaviour.count_states(5) == sum(1 for _ in all_rooms(5)) == 4104


@pytest.mark.parametrize("level", [4, 5])
def test_every_mini_behaviour_board_is_solvable(level: int) -> None:
    for state in all_rooms(level):
        assert minibehaviour.shortest_plan(state)


# Plans.


@pytest.mark.parametrize(("task", "level"), [("frozenlake", 3), ("maze", 3), ("minibehaviour", 4)])
def test_shortest_plans_are_all_plans_that_no_shorter_one_beats(task: str, level: int) -> None:
    env, checked = ENVS[task], 0
    for state in boards(task, level, 40):
        best = len(env.shortest_plan(state))
        if best > 5:
            continue
        checked += 1
        for length in range(best):
            plans = itertools.product(env.actions, repeat=length)
            assert not any(env.play(state, plan).success for plan in plans)
        winners = {
            plan
            for plan in itertools.product(env.actions, repeat=best)
            if env.play(state, plan).success
        }
        found = env.shortest_plans(state, limit=1000)
        assert set(found) == winners and len(found) == len(winners)
        assert found[0] == env.shortest_plan(state)
        assert env.count_shortest_plans(state) == len(found)
        assert set(env.shortest_plans(state, limit=1)) <= winners
    assert checked >= 10


@pytest.mark.parametrize("task", TASKS)
def test_a_random_shortest_plan_is_one_of_them_and_reaches_every_one(task: str) -> None:
    env, rng, several = ENVS[task], np.random.default_rng(0), 0
    for state in boards(task, 5):
        plans = env.shortest_plans(state, limit=10_000)
        assert all(env.play(state, plan).optimal for plan in plans)
        assert len(set(plans)) == len(plans)
        drawn = {env.random_shortest_plan(state, rng) for _ in range(300 if len(plans) < 9 else 20)}
        assert drawn <= set(plans)
        if len(plans) < 9:
            assert drawn == set(plans)
            several += len(plans) > 1
    assert several or task == "maze"  # a perfect maze has one plan


@pytest.mark.parametrize(("task", "level"), [("frozenlake", 8), ("minibehaviour", 6)])
def test_many_shortest_plans_are_shown_evenly(task: str, level: int) -> None:
    env, places = ENVS[task], []
    for state in boards(task, level, 300):
        total = env.count_shortest_plans(state)
        if not 64 < total < 1000:
            continue
        every = {plan: i for i, plan in enumerate(env.shortest_plans(state, limit=1000))}
        shown = env.shortest_plans(state)
        assert len(every) == total and len(set(shown)) == len(shown) == 64
        assert shown == env.shortest_plans(dataclasses.replace(state))
        places += [every[plan] / total for plan in shown]
    assert len(places) >= 5 * 64
    counts, _ = np.histogram(places, bins=5, range=(0, 1))
    # Five standard deviations of a fifth of independent draws.
    assert np.abs(counts - len(places) / 5).max() < 5 * np.sqrt(len(places) * 0.2 * 0.8)


def test_shortest_plans_are_counted_on_the_largest_boards() -> None:
    """A product of choices that no list could hold: the ways through an open board."""
    size = 32
    floor = "F" * size
    state = FrozenLakeState(("S" + floor[1:], *[floor] * (size - 2), floor[1:] + "G"))
    assert frozenlake.count_shortest_plans(state) == math.comb(62, 31)
    shown = frozenlake.shortest_plans(state)
    assert len(set(shown)) == 64
    assert all(frozenlake.play(state, plan).optimal for plan in shown)
    # The same in every process.
    assert "".join(word[0] for word in shown[0][:12]) == "ddddddrrdddd"
    assert "".join(word[0] for word in shown[1][:12]) == "dddddrdrrdrr"


def test_plans_of_an_unsolvable_board() -> None:
    state = FrozenLakeState(("SH", "HG"))
    for solve in (
        frozenlake.shortest_plan,
        frozenlake.shortest_plans,
        frozenlake.count_shortest_plans,
    ):
        with pytest.raises(ValueError, match="goal cannot be reached"):
            solve(state)
    outcome = frozenlake.play(state, ("up", "up"))
    assert (outcome.reason, outcome.progress, outcome.optimal) == ("not_reached", 0.0, False)
    with pytest.raises(ValueError, match="limit: got 0"):
        frozenlake.shortest_plans(LAKE, limit=0)


# Play.


@pytest.mark.parametrize(
    ("plan", "reason", "legal", "steps", "progress", "cells"),
    [
        ("right right down down", "success", True, 4, 1.0, 5),
        ("right right down down left left", "success", True, 4, 1.0, 5),
        ("up right right down down", "success", True, 5, 1.0, 6),
        ("", "empty_plan", True, 0, 0.0, 1),
        ("right right", "not_reached", True, 2, 0.5, 3),
        ("up left up", "not_reached", True, 3, 0.0, 4),
        ("right down right", "fell_into_hole", True, 2, 0.0, 3),
        ("right pick", "invalid_token", False, 0, 0.0, 1),
    ],
)
def test_frozen_lake_play(
    plan: str, reason: str, legal: bool, steps: int, progress: float, cells: int
) -> None:
    words = tuple(plan.split())
    success, optimal = reason == "success", reason == "success" and steps == 4
    parsed = reason != "invalid_token"
    want = base.Outcome(success, optimal, parsed, legal, reason, steps, progress)
    assert frozenlake.play(LAKE, words) == want
    assert len(frozenlake.trace(LAKE, words)) == cells


def test_frozen_lake_stays_put_off_the_board_and_stops_in_a_hole() -> None:
    assert frozenlake.trace(LAKE, ("up", "right", "down", "down")) == (
        (0, 0),
        (0, 0),
        (0, 1),
        (1, 1),
    )


@pytest.mark.parametrize(
    ("plan", "reason", "legal", "steps", "progress"),
    [
        ("right down left", "success", True, 3, 1.0),
        ("right left right down left", "success", True, 5, 1.0),
        ("right down", "not_reached", True, 2, 2 / 3),
        ("", "empty_plan", True, 0, 0.0),
        ("down", "hit_wall", False, 1, 0.0),
        ("right right", "hit_wall", False, 2, 1 / 3),
        ("drop", "invalid_token", False, 0, 0.0),
    ],
)
def test_maze_play(plan: str, reason: str, legal: bool, steps: int, progress: float) -> None:
    outcome = maze.play(CORRIDOR, tuple(plan.split()))
    assert (outcome.reason, outcome.legal, outcome.steps) == (reason, legal, steps)
    assert outcome.success == (reason == "success")
    assert outcome.optimal == (outcome.success and steps == 3)
    assert outcome.progress == pytest.approx(progress)


def test_maze_play_at_the_edges_of_the_rules() -> None:
    there = MazeState(CORRIDOR.walls, (0, 0), (0, 0))
    for plan in ((), ("down",)):  # the agent is there already: the rest is ignored
        assert maze.play(there, plan) == base.Outcome(True, True, True, True, "success", 0, 1.0)
    doors = MazeState(((0, 0), (0, 0)), (0, 0), (1, 1))
    assert maze.play(doors, ("up",)).reason == "off_board"
    assert maze.trace(CORRIDOR, ("right", "down", "down", "left")) == ((0, 0), (0, 1), (1, 1))


@pytest.mark.parametrize(
    ("plan", "reason", "steps", "progress"),
    [
        ("right pick drop", "success", 3, 1.0),
        ("right pick drop up up", "success", 3, 1.0),
        ("down pick up right drop", "success", 5, 1.0),
        ("right pick down up drop", "success", 5, 1.0),
        ("right pick", "not_reached", 2, 2 / 3),
        ("", "empty_plan", 0, 0.0),
        ("left", "off_board", 1, 0.0),
        ("right right", "entered_table", 2, 1 / 3),
        ("right down", "entered_printer", 2, 1 / 3),
        ("pick", "pick_not_adjacent", 1, 0.0),
        ("right pick pick", "pick_while_carrying", 3, 2 / 3),
        ("right drop", "drop_without_printer", 2, 1 / 3),
        ("right pick left drop", "drop_not_adjacent", 4, 1 / 3),
        ("jump", "invalid_token", 0, 0.0),
    ],
)
def test_mini_behaviour_play(plan: str, reason: str, steps: int, progress: float) -> None:
    outcome = minibehaviour.play(ROOM, tuple(plan.split()))
    assert (outcome.reason, outcome.steps) == (reason, steps)
    assert outcome.legal == (reason in ("success", "empty_plan", "not_reached"))
    assert outcome.optimal == (outcome.success and steps == 3)
    assert outcome.progress == pytest.approx(progress)


def test_mini_behaviour_may_drop_from_the_cell_where_the_printer_stood() -> None:
    state = MiniBehaviourState(5, (4, 0), (4, 2), ROOM.table)
    plan = ("right", "pick", "right", "drop")
    assert minibehaviour.play(state, plan).success
    assert minibehaviour.trace(state, plan) == ((4, 0), (4, 1), (4, 1), (4, 2), (4, 2))


@pytest.mark.parametrize("task", TASKS)
def test_progress_is_the_share_of_the_way_and_only_success_is_optimal(task: str) -> None:
    env, rng, reasons = ENVS[task], np.random.default_rng(0), Counter()
    for state in boards(task, 5):
        best = env.shortest_plan(state)
        for cut in range(1, len(best)):
            assert env.play(state, best[:cut]).progress == pytest.approx(cut / len(best))
        for _ in range(30):
            plan = tuple(rng.choice([*env.actions], size=rng.integers(1, 12)).tolist())
            outcome = env.play(state, plan)
            reasons[outcome.reason] += 1
            assert 0.0 <= outcome.progress <= 1.0 and outcome.steps <= len(plan)
            assert outcome.success == (outcome.reason == "success") <= (outcome.progress == 1.0)
            moves = len(env.trace(state, plan)) - 1
            assert moves == outcome.steps - (not outcome.legal)
    assert len(reasons) >= 3


# Words.


def test_descriptions() -> None:
    lake = FrozenLakeState(("FFFF", "FFGF", "FFHH", "FSFF"))
    assert frozenlake.describe(lake) == (
        "Map size: 4x4\nPlayer: (3,1)\nGoal: (1,2)\nHoles: (2,2) (2,3)\n"
        "Map:\nFFFF\nFFGF\nFFHH\nFSFF"
    )
    assert frozenlake.state_lines(FrozenLakeState(("SF", "FG")))[-1] == "Holes: none"
    assert maze.describe(CORRIDOR) == (
        "Map size: 2x2\nPlayer: (0,0)\nGoal: (1,0)\nOpen directions:\n"
        "(0,0): right\n(0,1): down, left\n(1,0): right\n(1,1): up, left"
    )
    assert maze.state_lines(MazeState(((15,),), (0, 0), (0, 0)))[-1] == "(0,0): none"
    assert minibehaviour.describe(ROOM) == (
        "Map size: 5x5\nAgent: (3,0)\nPrinter: (4,1)\n"
        "Table: (2,2) (2,3) (2,4) (3,2) (3,3) (3,4)\nNext to printer: (3,1) (4,0) (4,2)\n"
        "Next to table: (1,2) (1,3) (1,4) (2,1) (3,1) (4,2) (4,3) (4,4)"
    )
    printer_by_table = MiniBehaviourState(5, (0, 0), (2, 1), ROOM.table)
    near_printer, near_table = minibehaviour.state_lines(printer_by_table)[-2:]
    assert near_printer == "Next to printer: (1,1) (2,0) (3,1)"
    assert "(2,1)" in near_table


@pytest.mark.parametrize("task", TASKS)
def test_answers_repeat_the_state_lines(task: str) -> None:
    names = {
        "frozenlake": ["map_size", "player", "goal", "holes"],
        "maze": ["map_size", "player", "goal", "open_directions", "legal_moves"],
        "minibehaviour": [
            *("map_size", "agent", "printer", "table", "next_to_printer", "next_to_table"),
            "legal_moves",
        ],
    }
    for state in small_boards(task):
        asked = ENVS[task].questions(state)
        assert [question.name for question in asked] == names[task]
        text = "\n".join(ENVS[task].state_lines(state))
        for question in asked:
            assert "\n" not in question.text
            if question.name != "legal_moves":
                assert f": {question.answer}\n" in f"{text}\n" or question.answer in text.split(
                    ":\n"
                )


@pytest.mark.parametrize("task", TASKS)
def test_legal_moves_are_those_that_play_allows(task: str) -> None:
    for state in small_boards(task):
        question = ENVS[task].questions(state)[-1]
        if question.kind != "directions":
            continue
        moves = ("up", "down", "left", "right")
        legal = [action for action in moves if ENVS[task].play(state, (action,)).legal]
        assert question.answer == (", ".join(legal) or "none")
        assert question.facts == {("legal", action) for action in legal}


def test_facts() -> None:
    assert frozenlake.facts(LAKE) == {
        ("size", 3),
        ("player", (0, 0)),
        ("goal", (2, 2)),
        ("hole", (1, 1)),
    }
    assert maze.facts(CORRIDOR) == {
        *(("size", 2), ("player", (0, 0)), ("goal", (1, 0))),
        *(("open", (0, 0), "right"), ("open", (0, 1), "left"), ("open", (0, 1), "down")),
        *(("open", (1, 1), "up"), ("open", (1, 1), "left"), ("open", (1, 0), "right")),
    }
    assert minibehaviour.facts(ROOM) == {
        *(("size", 5), ("agent", (3, 0)), ("printer", (4, 1))),
        *(("table", cell) for cell in ROOM.table),
    }


# Pictures.


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("size", [96, 128, 256, 300])
def test_pictures_have_the_size_asked_for_and_tell_boards_apart(task: str, size: int) -> None:
    states = boards(task, 5)
    pictures = [ENVS[task].render(state, size) for state in states]
    for picture in pictures:
        assert picture.shape == (size, size, 3) and picture.dtype == np.uint8
    digests = {hashlib.blake2b(picture.tobytes()).digest() for picture in pictures}
    assert len(digests) == len(set(states))
    again = ENVS[task].render(states[0], size)
    again[:] = 0  # a picture is its caller's own: the cache behind it is not touched
    assert (ENVS[task].render(states[0], size) == pictures[0]).all()


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("level", [4, 7, 32])
def test_a_cell_shows_in_its_own_square_only(task: str, level: int) -> None:
    """At 32 pixels a cell, what stands in a cell never touches another cell's square."""
    first, second = boards(task, level, 2)[:2]
    pictures = [ENVS[task].render(state, 32 * level).astype(int) for state in (first, second)]
    differs = np.abs(pictures[0] - pictures[1]).max(-1).reshape(level, 32, level, 32).any((1, 3))
    contents = [content_by_cell(state) for state in (first, second)]
    assert (differs == (contents[0] != contents[1])).all()


def content_by_cell(state: Any) -> np.ndarray:
    """What stands in each cell, as text [size, size]."""
    if isinstance(state, FrozenLakeState):
        return np.array([list(row) for row in state.rows])
    if isinstance(state, MazeState):
        content = np.array(state.walls).astype("U8")
        content[state.start] += "S"
        content[state.target] += "T"
        return content
    content = np.full((state.size, state.size), ".")
    for cells, letter in (([state.agent], "A"), ([state.printer], "P"), (state.table, "T")):
        for cell in cells:
            content[cell] = letter
    return content


@pytest.mark.parametrize("pixels", [8, 11, 16, 32])
def test_every_wall_and_opening_shows_inside_its_own_cell(pixels: int) -> None:
    for state in boards("maze", 6):
        picture = maze.render(state, 6 * pixels)
        for row, column in np.ndindex(6, 6):
            square = picture[row * pixels :, column * pixels :][:pixels, :pixels]
            middle = pixels // 2
            sides = (square[0, middle], square[-1, middle], square[middle, 0], square[middle, -1])
            for bit, side in zip((1, 2, 4, 8), sides, strict=True):
                assert (side.max() == 0) == bool(state.walls[row][column] & bit)


def test_maze_dots() -> None:
    picture = maze.render(CORRIDOR, 64)
    assert picture[16, 16].tolist() == [255, 255, 0] and picture[48, 16].tolist() == [0, 0, 255]
    both = maze.render(MazeState(CORRIDOR.walls, (0, 0), (0, 0)), 64)
    colours = set(map(tuple, both[:32, :32].reshape(-1, 3).tolist()))
    assert {(255, 255, 0), (0, 0, 255)} <= colours


@pytest.mark.parametrize("task", TASKS)
def test_too_small_a_picture_is_refused(task: str) -> None:
    with pytest.raises(ValueError, match="picture size: got 63, want at least 64"):
        ENVS[task].render(boards(task, 8)[0], 63)
