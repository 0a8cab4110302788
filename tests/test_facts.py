"""What a response states is read back exactly, and told apart from what is true."""

import numpy as np
import pytest

from mgsd_jax import prompts
from mgsd_jax.envs import ENVS, facts

BOARDS = [
    (task, level, seed)
    for task, level in (("frozenlake", 3), ("frozenlake", 8), ("maze", 4), ("minibehaviour", 5))
    for seed in range(20)
]


@pytest.mark.parametrize(("task", "level", "seed"), BOARDS)
def test_state_lines_are_read_back(task: str, level: int, seed: int) -> None:
    state = ENVS[task].generate(np.random.default_rng(seed), level)
    text = prompts.response(task, state, ENVS[task].shortest_plan(state))
    stated = facts.read_facts(task, text)
    assert stated == ENVS[task].facts(state)
    assert facts.state_f1(stated, ENVS[task].facts(state)) == 1.0
    own = facts.state_from_facts(task, stated)
    assert own is not None and ENVS[task].key(own) == ENVS[task].key(state)


def test_f1_counts_missing_and_invented_facts() -> None:
    true = frozenset({("size", 3), ("player", (0, 0)), ("goal", (2, 2)), ("hole", (1, 1))})
    text = "Map size: 3x3\nPlayer: (0,0)\nGoal: (2,1)\nHoles: (1,1) (0,2)"
    stated = facts.read_facts("frozenlake", text)
    # 3 right of 5 stated and of 4 true: precision 3/5, recall 3/4.
    assert facts.state_f1(stated, true) == pytest.approx(2 / (5 / 3 + 4 / 3))
    assert facts.state_f1(frozenset(), true) == 0.0


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("frozenlake", ""),
        ("frozenlake", "Map size: 3x3\nPlayer: (0,0)"),
        ("frozenlake", "Map size: 3x3\nPlayer: (0,0)\nGoal: (0,0)\nHoles: none"),
        ("frozenlake", "Map size: 3x3\nPlayer: (0,3)\nGoal: (0,0)\nHoles: none"),
        ("frozenlake", "Map size: 3x4\nPlayer: (0,1)\nGoal: (0,0)\nHoles: none"),
        ("maze", "Map size: 3x3\nPlayer: (0,1)\nGoal: (0,0)\nOpen directions:\n(7,7): up"),
        ("minibehaviour", "Map size: 5x5\nAgent: (0,1)\nPrinter: (0,0)\nTable: (1,1)"),
        ("minibehaviour", "Map size: 999x999\nAgent: (0,1)\nPrinter: (0,0)\nTable: (1,1)"),
    ],
)
def test_what_is_no_board_gives_none(task: str, text: str) -> None:
    assert facts.state_from_facts(task, facts.read_facts(task, text)) is None


def test_the_first_line_of_a_label_counts() -> None:
    text = "Map size: 3x3\nPlayer: (0,0)\nPlayer: (1,1)\nGoal: (2,2)\nHoles: none"
    assert ("player", (1, 1)) not in facts.read_facts("frozenlake", text)
