"""Sokoban: exact search, dead positions, words and files; and a task that is added from outside."""

import dataclasses
import itertools
import json
import pathlib
import runpy
from collections import Counter
from typing import Any

import numpy as np
import pytest

from mgsd_jax import config as c
from mgsd_jax.data import nano_tokenizer, prompts, splits
from mgsd_jax.data.boards import read_split
from mgsd_jax.data.processor import encode, load_processor
from mgsd_jax.envs import ENVS, base, facts, find, noise, search, sokoban
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.sokoban import SokobanState
from mgsd_jax.evaluation import scoring
from mgsd_jax.stages import distillation, evaluate, generate, grounding, init, report

ENV = sokoban.ENV
ROOT = pathlib.Path(__file__).parents[1]
DELTAS = {"up": (-1, 0), "down": (1, 0), "left": (0, -1), "right": (0, 1)}
HALL = SokobanState(5, (2, 1), ((2, 2),), ((1, 3),), ())
PAIR = SokobanState(6, (2, 1), ((2, 2), (2, 3)), ((1, 4), (4, 4)), ((4, 1),))


def boards(level: int, count: int) -> list[SokobanState]:
    rng = np.random.default_rng(level)
    return [ENV.generate(rng, level) for _ in range(count)]


# A second search, which shares nothing with the first: rows of text, plans tried by their length.


def push(rows: tuple[str, ...], action: str) -> tuple[str, ...] | None:
    """The rows after an action, None where it is refused."""
    grid = [list(row) for row in rows]
    [(r, col)] = [(i, j) for i, row in enumerate(grid) for j, x in enumerate(row) if x in "@+"]
    down, across = DELTAS[action]
    near, far = (r + down, col + across), (r + 2 * down, col + 2 * across)
    if grid[near[0]][near[1]] == "#":
        return None
    if grid[near[0]][near[1]] in "$*":
        if grid[far[0]][far[1]] in "#$*":
            return None
        grid[far[0]][far[1]] = "*" if grid[far[0]][far[1]] in ".+" else "$"
        grid[near[0]][near[1]] = "." if grid[near[0]][near[1]] == "*" else "-"
    grid[near[0]][near[1]] = "+" if grid[near[0]][near[1]] == "." else "@"
    grid[r][col] = "." if grid[r][col] == "+" else "-"
    return tuple(map("".join, grid))


def best_plans(rows: tuple[str, ...]) -> list[tuple[str, ...]]:
    """All shortest plans, [] where there is none."""
    layer: dict[tuple[str, ...], list[tuple[str, ...]]] = {rows: [()]}
    seen = set(layer)
    while layer:
        done = [plan for at, plans in layer.items() for plan in plans if "$" not in "".join(at)]
        if done:
            return done
        following: dict[tuple[str, ...], list[tuple[str, ...]]] = {}
        for at, plans in layer.items():
            for action in DELTAS:
                after = push(at, action)
                if after is not None and after not in seen:
                    following.setdefault(after, []).extend((*plan, action) for plan in plans)
        seen |= following.keys()
        layer = following
    return []


def text_rows(state: SokobanState) -> tuple[str, ...]:
    return tuple(ENV.file.rows(state))


@pytest.mark.parametrize(("level", "count"), [(5, 60), (6, 12)])
def test_the_shortest_plans_are_those_of_a_second_search(level: int, count: int) -> None:
    for state in boards(level, count):
        want = best_plans(text_rows(state))
        found = ENV.shortest_plans(state, limit=10_000)
        assert len(want[0]) >= 3 and set(found) == set(want) and len(found) == len(want)
        assert ENV.count_shortest_plans(state) == len(want)
        assert found[0] == ENV.shortest_plan(state)
        assert ENV.random_shortest_plan(state, np.random.default_rng(0)) in want


def test_the_count_of_level_5_is_the_number_of_boards() -> None:
    """One board of each eight that mirrors and turns make of it is solved."""
    cells, count = sokoban._inner_cells(5), 0
    turns = [
        lambda r, col: (r, col),
        *(
            lambda r, col: (4 - r, col),
            lambda r, col: (r, 4 - col),
            lambda r, col: (4 - r, 4 - col),
        ),
        *(lambda r, col: (col, r), lambda r, col: (4 - col, r)),
        *(lambda r, col: (col, 4 - r), lambda r, col: (4 - col, 4 - r)),
    ]
    for walls in itertools.chain.from_iterable(itertools.combinations(cells, k) for k in range(7)):
        orbit = {tuple(sorted(turn(*cell) for cell in walls)) for turn in turns}
        if walls != min(orbit):
            continue
        floor = [cell for cell in cells if cell not in walls]
        for player, box, target in itertools.permutations(floor, 3):
            rows = text_rows(SokobanState(5, player, (box,), (target,), walls))
            plans = best_plans(rows)
            count += len(orbit) * bool(plans and len(plans[0]) >= 3)
    assert ENV.count_states(5) == count
    assert ENV.count_states(6) is None


@pytest.mark.parametrize("level", [5, 6, 7, 8])
def test_generated_boards_are_solvable_and_of_all_kinds(level: int) -> None:
    kinds = Counter()
    for state in boards(level, 25):
        plan = ENV.shortest_plan(state)
        assert ENV.play(state, plan) == base.Outcome(
            True, True, True, True, "success", len(plan), 1.0
        )
        kinds[len(state.boxes)] += 1
    assert set(kinds) == ({1} if level == 5 else {1, 2})


def test_a_level_out_of_range_is_refused() -> None:
    for level in (4, 9):
        with pytest.raises(ValueError, match=f"sokoban level: got {level}, want 5 to 8"):
            ENV.generate(np.random.default_rng(0), level)


@pytest.mark.parametrize(
    ("state", "plan", "reason", "legal", "steps", "progress"),
    [
        (HALL, "right", "not_reached", True, 1, 0.25),
        (HALL, "left", "hit_wall", False, 1, 0.0),
        (HALL, "", "empty_plan", True, 0, 0.0),
        (HALL, "right right", "box_blocked", False, 2, 0.25),
        (HALL, "down right up", "not_reached", True, 3, 0.25),  # into the row of the target
        (HALL, "up right down up", "dead_position", True, 3, 0.0),  # into the opposite row
        (HALL, "right down right up", "success", True, 4, 1.0),
        (HALL, "right down right up left left", "success", True, 4, 1.0),
        (PAIR, "right", "box_blocked", False, 1, 0.0),
        (HALL, "pick", "invalid_token", False, 0, 0.0),
    ],
)
def test_play(
    state: SokobanState, plan: str, reason: str, legal: bool, steps: int, progress: float
) -> None:
    outcome = ENV.play(state, tuple(plan.split()))
    assert (outcome.reason, outcome.legal, outcome.steps) == (reason, legal, steps)
    assert outcome.progress == pytest.approx(progress)
    assert len(ENV.trace(state, tuple(plan.split()))) == steps + legal + (not legal and not steps)


def test_a_position_is_dead_exactly_where_no_solution_is_left() -> None:
    rng, reasons = np.random.default_rng(0), Counter()
    for state in boards(5, 30) + boards(6, 6):
        for _ in range(12):
            plan = tuple(rng.choice([*ENV.actions], size=8).tolist())
            outcome = ENV.play(state, plan)
            reasons[outcome.reason] += 1
            rows: tuple[str, ...] | None = text_rows(state)
            for action in plan[: outcome.steps]:
                rows = None if rows is None else push(rows, action)
            assert outcome.legal == (rows is not None)
            if rows is not None:
                assert (outcome.reason == "dead_position") == (not best_plans(rows))
    assert reasons["dead_position"] > 10 and len(reasons) >= 3


def test_a_box_in_a_corner_and_a_board_without_a_solution() -> None:
    lost = SokobanState(5, (2, 2), ((1, 1),), ((3, 3),), ())
    assert ENV.play(lost, ("up", "down")).reason == "not_reached"
    with pytest.raises(ValueError, match="goal cannot be reached"):
        ENV.shortest_plan(lost)


def test_words_pictures_and_facts() -> None:
    assert ENV.describe(PAIR) == (
        "Map size: 6x6\nPlayer: (2,1)\nBoxes: (2,2) (2,3)\nTargets: (1,4) (4,4)\nWalls: (4,1)"
    )
    assert ENV.state_lines(HALL)[-1] == "Walls: none"
    answers = {question.name: question.answer for question in ENV.questions(PAIR)}
    assert answers["boxes"] == "(2,2) (2,3)" and answers["walls"] == "(4,1)"
    assert answers["legal_moves"] == "up, down"  # right pushes a box against the other
    for state in boards(5, 5) + boards(7, 5):
        stated = facts.read_facts("sokoban", ENV.describe(state))
        assert stated.facts == ENV.facts(state) and not stated.contradicted
        assert facts.state_from_facts("sokoban", stated) == state
        legal = [action for action in DELTAS if ENV.play(state, (action,)).legal]
        assert ENV.questions(state)[-1].answer == ", ".join(legal)
        pictures = [ENV.render(state, 320, sprites=kind) for kind in ("usual", "other")]
        assert pictures[0].shape == (320, 320, 3) and (pictures[0] != pictures[1]).any()
    told = "Map size: 5x5\nPlayer: (2,1)\nBox 1: (2,2)\nTarget 1: (1,3)\nWalls: none"
    assert facts.state_from_facts("sokoban", facts.read_facts("sokoban", told)) == HALL
    for lost in ("Boxes: (2,2) (3,3)", "Boxes: (2,1)", "Boxes: (0,2)", "Boxes: none"):
        text = told.replace("Box 1: (2,2)", lost)
        assert facts.state_from_facts("sokoban", facts.read_facts("sokoban", text)) is None


@pytest.mark.parametrize("level", [5, 6])
def test_noise_moves_things_and_leaves_a_board(level: int) -> None:
    rng, lost, total = np.random.default_rng(0), 0, 0
    for state in boards(level, 40):
        wrong = noise.disturb("sokoban", state, rng, 0.2)
        assert ENV.shortest_plan(wrong) is not None
        true = ENV.facts(state)
        lost, total = lost + len(true - ENV.facts(wrong)), total + len(true) - 1
    assert 0.1 < lost / total < 0.28


def test_files_read_back_and_damaged_ones_are_refused() -> None:
    for state in boards(5, 5) + boards(8, 2):
        text = ENV.to_text(state, split="train", index=3, seed=7)
        assert ENV.from_text(text, source="file") == state
    text = ENV.to_text(HALL, split="train", index=0, seed=0)
    for old, new, says in (
        ("#@$-#", "#@$-", "board: got .* want a square over"),
        ("#@$-#", "#-$-#", "board: got .* want one player"),
        ("#@$-#", "-@$-#", "board: got .* walls all around"),
        ("#@$-#", "#@--#", "board: boxes: got"),
        ("#@$-#", "$@--#", "board: got .* walls all around"),
        ("box_pos=[[2, 2]]", "box_pos=[[2, 3]]", r"box_pos: got \[\[2, 3\]\], want"),
        ("path_length=4", "path_length=5", "path_length: got 5, want 4"),
        ("#---#\n#####", "#-#-#\n#$###", "board: got .* walls all around"),
    ):
        assert old in text
        with pytest.raises(ValueError, match=f"^file: {says}"):
            ENV.from_text(text.replace(old, new), source="file")


def test_splits_are_disjoint() -> None:
    owned = {
        split: {ENV.key(state) for state in splits.unique_boards("sokoban", 5, split, 30, seed=0)}
        for split in splits.SPLITS
    }
    assert all(len(keys) == 30 for keys in owned.values())
    assert len(set().union(*owned.values())) == 90


# A task that is defined outside of the package: a walk along a line, in either direction.


@dataclasses.dataclass(frozen=True)
class LineState:
    size: int
    player: int
    goal: int


def line_env() -> base.Env[LineState]:
    def generate_line(rng: np.random.Generator, level: int) -> LineState:
        player, goal = rng.permutation(level)[:2].tolist()
        return LineState(level, player, goal)

    def paths(state: LineState) -> search.Paths:
        cells = [(row, 0) for row in range(state.size)]
        moves = [
            {a: n for a, n in (("up", i - 1), ("down", i + 1)) if 0 <= n < state.size}
            for i in range(state.size)
        ]
        return search.Paths(moves, search.distances_to(moves, [state.goal]), state.player, cells)

    maze = ENVS["maze"]
    lines = base.Wording(
        rules=("Walk along the line.",),
        legend="The player is red, the goal is blue.",
        form=("Map size: NxN", "Player: cell", "Goal: cell"),
        route="I go through (0,0) (1,0).",
        answer="D",
    )

    def draw(state: LineState, size: int = 256, *, sprites: str = "usual") -> np.ndarray:
        picture = np.zeros((size, size, 3), np.uint8)
        for place, channel in ((state.player, 0), (state.goal, 2)):
            picture[place * size // state.size : (place + 1) * size // state.size, :, channel] = 255
        return picture

    return dataclasses.replace(
        maze,
        name="line",
        title="Line",
        levels=range(2, 9),
        reasons={"off_line": "left the line"},
        labels={"player": "player", "goal": "goal"},
        wording=lines,
        generate=generate_line,
        count=lambda level: level * (level - 1),
        key=lambda state: f"line:{state}",
        paths=paths,
        refuse=lambda state, node, action: (None, "off_line"),
        questions=lambda state: (
            base.ask_size(state.size),
            base.ask_cell("player", "Where is the player?", (state.player, 0)),
            base.ask_cell("goal", "Where is the goal?", (state.goal, 0)),
        ),
        from_facts=lambda size, named: LineState(
            size, base.only_cell(named, "player")[0], base.only_cell(named, "goal")[0]
        ),
        disturb=lambda state, rng, share: state,
        render=draw,
        file=dataclasses.replace(
            maze.file,
            keys=(
                *("task", "split", "level", "index", "seed"),
                *("path_length", "solution_actions", "trajectory_states"),
            ),
            block="line",
            rows=lambda state: (
                "P" if i == state.player else "G" if i == state.goal else "."
                for i in range(state.size)
            ),
            read=lambda board: LineState(
                len(board.rows), board.rows.index("P"), board.rows.index("G")
            ),
            fields=lambda state, plan, board: {},
        ),
        has_sides=False,
        options={},
    )


def test_a_task_from_outside_is_drawn_asked_about_and_scored(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(ENVS, "line", line_env())
    config = runpy.run_path(str(ROOT / "configs" / "sokoban.py"))["get_config"]()
    levels = (c.LevelSet("line", (8,), train=6, val=1, test=2),)
    data = dataclasses.replace(config.data, boards=levels)
    generate.run(dataclasses.replace(config, data=data), str(tmp_path))
    [board, _] = read_split(tmp_path / "data", "test")
    assert isinstance(board.state, LineState)
    env, plan = ENVS["line"], ENVS["line"].shortest_plan(board.state)
    [message] = prompts.teacher(prompts.BUILT_IN, "line", board.state, "state_and_plan")
    assert "Walk along the line." in message["content"] and env.spell(plan) in message["content"]
    right = prompts.response("line", board.state, plan)
    score = scoring.score_plan(board, right)
    assert (
        score["outcome"]["optimal"] and score["state_exact"] and score.get("plan_given_own_state")
    )
    wrong = scoring.score_plan(board, "<answer>L</answer>")
    assert wrong["outcome"]["reason"] == "off_line" and not wrong["outcome"]["legal"]
    numbered = prompts.grounding(prompts.BUILT_IN, "line", board.state, env.render(board.state))[1]
    assert all(scoring.score_perception(board, numbered)["perception"].values())
    texts = [*nano_tokenizer.state_tokens(["line"]), *nano_tokenizer.cell_tokens(["line"])]
    assert "\nPlayer:" in texts and " goal" in texts and "\nHoles:" not in texts


def test_an_env_that_is_not_whole_is_refused() -> None:
    with pytest.raises(TypeError, match="missing"):
        base.Env(name="line")  # pyrefly: ignore[missing-argument]  # as an author might
    silent = dataclasses.replace(ENVS["maze"], reasons={})
    with pytest.raises(ValueError, match="maze: reasons: got 'hit_wall', want it in words"):
        silent.play(MazeState(((15, 15), (15, 15)), (0, 0), (1, 1)), ("up",))
    with pytest.raises(ValueError, match="task: got 'chess', want one of"):
        find("chess")


# All stages.


def tiny(workdir: pathlib.Path) -> c.Config:
    """configs/sokoban.py with everything made small."""
    config: c.Config = runpy.run_path(str(ROOT / "configs" / "sokoban.py"))["get_config"]()
    replace = dataclasses.replace
    assert config.nano is not None
    nano = replace(config.nano, width=32, layers=1, heads=2, kv_heads=1, head_width=16, mlp=32)
    nano = replace(nano, vision_width=16, vision_layers=1, vision_heads=2, vision_mlp=16)
    levels = (c.LevelSet("sokoban", levels=(5,), train=8, val=2, test=2),)
    sampling = replace(config.evaluate.sampling, max_new_tokens=8)
    few: dict[str, Any] = {"steps": 1, "batch_size": 2, "microbatches": 1, "eval_every": 1}
    return replace(
        config,
        nano=replace(nano, deepstack=(0,)),
        data=replace(config.data, boards=levels, patch_buckets=(100,)),
        grounding=replace(config.grounding, **few, eval_batches=1),
        distillation=replace(
            config.distillation,
            **few,
            eval_boards=2,
            sampling=replace(config.distillation.sampling, max_new_tokens=8),
        ),
        evaluate=replace(config.evaluate, batch_size=2, sampling=sampling),
    )


@pytest.mark.slow
def test_all_stages_run_from_the_config_alone(tmp_path: pathlib.Path) -> None:
    config = tiny(tmp_path)
    for stage in (init, generate, grounding, distillation, evaluate, report):
        stage.run(config, str(tmp_path))
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    picture = summary["models"]["distilled"]["picture"]
    assert picture["n"] == 2 and picture["rules"] == {}
    page = next((tmp_path / "report").glob("*.md")).read_text()
    assert "Sokoban" in page


def test_the_tokenizer_knows_the_prompts_of_its_tasks(tmp_path: pathlib.Path) -> None:
    config = tiny(tmp_path)
    init.run(config, str(tmp_path))
    processor = load_processor(tmp_path / "init")
    state = ENV.generate(np.random.default_rng(0), 6)
    messages = prompts.teacher(prompts.BUILT_IN, "sokoban", state)
    assert len(encode(processor, messages, add_generation_prompt=True).tokens) < 50
