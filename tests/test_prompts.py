"""Prompts agree with the parser, the renderer and each other."""

import pathlib
from typing import Any

import numpy as np
import pytest

from mgsd_jax.data import prompts
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import rules

TASKS = tuple(ENVS)


def board(task: str, seed: int = 0, level: int = 5) -> Any:
    env = ENVS[task]
    return env.generate(np.random.default_rng(seed), env.nearest_level(level))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("seed", range(10))
def test_the_right_response_scores(task: str, seed: int) -> None:
    state = board(task, seed)
    for plan in ENVS[task].shortest_plans(state):
        outcome = rules.judge(state, task, prompts.response(task, state, plan))
        assert outcome.success and outcome.optimal


@pytest.mark.parametrize("task", TASKS)
def test_the_worked_example_of_the_format_parses(task: str) -> None:
    plan = rules.parse_plan(prompts.BUILT_IN.template(task, "student"), task)
    assert plan.parsed and len(plan.plan) >= 2


@pytest.mark.parametrize("task", TASKS)
def test_student_and_teacher_share_rules_and_format(task: str) -> None:
    parts = prompts.passages(ENVS[task])
    for shared in ("rules", "format"):
        assert parts[shared] in prompts.BUILT_IN.template(task, "student")
        assert parts[shared] in prompts.BUILT_IN.template(task, "teacher")
    state = board(task)
    [message] = prompts.teacher(prompts.BUILT_IN, task, state)
    assert isinstance(message["content"], str), "the teacher sees no picture"
    assert ENVS[task].describe(state) in message["content"]
    [message] = prompts.student(prompts.BUILT_IN, task, ENVS[task].render(state, 256))
    texts = [part["text"] for part in message["content"] if part["type"] == "text"]
    assert [part["type"] for part in message["content"]].count("image") == 1
    for line in (line for line in ENVS[task].state_lines(state) if "(" in line):
        assert all(line not in text for text in texts), "the student is told the state"


@pytest.mark.parametrize("task", TASKS)
def test_teacher_context_adds_the_plans_asked_for(task: str) -> None:
    state = board(task, 3)
    plain = prompts.teacher(prompts.BUILT_IN, task, state)[0]["content"]
    one = prompts.teacher(prompts.BUILT_IN, task, state, "state_and_plan")[0]["content"]
    every = prompts.teacher(prompts.BUILT_IN, task, state, "state_and_all_optimal_plans")[0]
    spelled = ENVS[task].spell(ENVS[task].shortest_plan(state))
    assert one == f"{plain}\nOne shortest plan: {spelled}"
    for plan in ENVS[task].shortest_plans(state):
        assert ENVS[task].spell(plan) in every["content"]


def test_what_the_teacher_is_told_of_all_plans_is_true() -> None:
    seen = set()
    for seed in range(60):
        state = board("frozenlake", seed, 7)
        message = prompts.teacher(
            prompts.BUILT_IN, "frozenlake", state, "state_and_all_optimal_plans"
        )
        head, _, spelled = message[0]["content"].rpartition("\n")[2].partition(": ")
        plans, total = spelled.split(" or "), ENVS["frozenlake"].count_shortest_plans(state)
        assert len(set(plans)) == len(plans) == min(total, 64)
        some = f"Some shortest plans (64 of {total})"
        assert head == ("All shortest plans" if total <= 64 else some)
        seen.add(head[:4])
    assert seen == {"All ", "Some"}


# The legend's words against the renderer's pixels: the colour that a thing is said to have must
# be what its cell shows, and no other cell may show more of it.
LEGEND = {
    "maze": (("yellow dot", (255, 255, 0), "start"), ("blue dot", (0, 0, 255), "target")),
    "minibehaviour": (
        ("red triangle", (255, 24, 16), "agent"),
        ("white", (255, 255, 255), "printer"),
    ),
}


@pytest.mark.parametrize("task", LEGEND)
@pytest.mark.parametrize("seed", range(5))
def test_legend_names_the_colours_that_are_drawn(task: str, seed: int) -> None:
    state = board(task, seed)
    picture = ENVS[task].render(state, 256).astype(int)
    cells = np.array_split(np.arange(256), state.size)
    for words, colour, name in LEGEND[task]:
        assert words in prompts.passages(ENVS[task])["picture"]
        close = (np.abs(picture - np.array(colour)).sum(-1) < 60).astype(float)
        if colour == (255, 255, 255):
            share = {
                (r, c): close[np.ix_(cells[r], cells[c])].mean()
                for r in range(state.size)
                for c in range(state.size)
            }
            assert max(share, key=lambda cell: share[cell]) == getattr(state, name)
            continue
        rows, columns = np.nonzero(close)
        where = {
            (int(r) * state.size // 256, int(c) * state.size // 256)
            for r, c in zip(rows, columns, strict=True)
        }
        assert where == {getattr(state, name)}, words


@pytest.mark.parametrize("seed", range(5))
def test_brown_cells_are_the_table(seed: int) -> None:
    state = board("minibehaviour", seed)
    picture = ENVS["minibehaviour"].render(state, 256).astype(int)
    assert "table cells are brown" in prompts.passages(ENVS["minibehaviour"])["picture"]
    for row in range(5):
        for column in range(5):
            centre = picture[int((row + 0.2) * 51.2), int((column + 0.2) * 51.2)]
            is_brown = np.abs(centre - (181, 143, 96)).sum() < 30
            assert is_brown == ((row, column) in state.table)


def test_holes_are_the_darkest_and_bluest_frozenlake_cells() -> None:
    state = board("frozenlake", 2)
    picture = ENVS["frozenlake"].render(state, 320).astype(float)
    cells = {
        (r, c): picture[r * 64 : r * 64 + 64, c * 64 : c * 64 + 64].mean((0, 1))
        for r in range(5)
        for c in range(5)
    }
    holes = {cell for cell in cells if state.rows[cell[0]][cell[1]] == "H"}
    floor = {cell for cell in cells if state.rows[cell[0]][cell[1]] == "F"}
    assert holes and max(cells[c].sum() for c in holes) < min(cells[c].sum() for c in floor)
    assert all(cells[c][2] > cells[c][0] for c in holes)


def test_prompts_from_a_folder(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match="no prompt file"):
        prompts.load(str(tmp_path), "cells")
    (tmp_path / "maze.student.txt").write_text("Solve it: <picture>\n")
    loaded = prompts.load(str(tmp_path), "cells")
    assert loaded.template("maze", "student") == "Solve it: <picture>"
    built_in: tuple[tuple[str, prompts.Kind], ...] = (
        *(("maze", "teacher"), ("frozenlake", "student"), ("maze", "grounding")),
    )
    for task, kind in built_in:
        assert loaded.template(task, kind) == prompts.BUILT_IN.template(task, kind)
    (tmp_path / "maze.teacher.txt").write_text("no mark")
    with pytest.raises(ValueError, match=r"maze.teacher.txt: got 0 marks <state>"):
        prompts.load(str(tmp_path), "cells")
    (tmp_path / "maze.teacher.txt").unlink()
    (tmp_path / "maize.txt").write_text("x")
    with pytest.raises(ValueError, match=r"maize.txt: got an unknown prompt name"):
        prompts.load(str(tmp_path), "cells")
