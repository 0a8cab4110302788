"""What a response states is read back exactly, however it is written, and told from what is true.

To add a way of writing: a row in STYLES (all three tasks), or in SAME, OTHER (one board each).
"""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mgsd_jax.data import prompts
from mgsd_jax.envs import BY_ROWS, ENVS, facts
from mgsd_jax.envs.frozenlake import FrozenLakeState
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.minibehaviour import MiniBehaviourState

GENERATED = [
    (task, level, seed)
    for task, level in (("frozenlake", 3), ("frozenlake", 8), ("maze", 4), ("minibehaviour", 5))
    for seed in range(20)
]
TABLE = tuple((row, column) for row in (1, 2) for column in (0, 1, 2))
BOARDS: dict[str, tuple[str, Any]] = {
    "lake": ("frozenlake", FrozenLakeState(("FFFG", "FHFF", "FFHF", "SFFF"))),
    "ice": ("frozenlake", FrozenLakeState(("FFFG", "FFFF", "FFFF", "SFFF"))),
    "maze": ("maze", MazeState(((7, 9), (7, 10)), start=(0, 0), target=(0, 1))),
    "office": ("minibehaviour", MiniBehaviourState(5, (4, 4), (0, 4), TABLE)),
}


def spaced(value: str) -> str:
    return re.sub(r"([(),x])", r" \1 ", value)


def listed(value: str) -> str:
    return value.replace(") (", ") and (").replace(", ", " and ")


# (label, value) of a state line -> the line in another way of writing.
STYLES: dict[str, Callable[[str, str], str]] = {
    "as asked": lambda label, value: f"{label}: {value}",
    "bullet -": lambda label, value: f"- {label}: {value}",
    "bullet *": lambda label, value: f"* {label}: {value}",
    "bullet •": lambda label, value: f"  • {label}: {value}",
    "number 1.": lambda label, value: f"1. {label}: {value}",
    "number 2)": lambda label, value: f"2) {label}: {value}",
    "bold label": lambda label, value: f"**{label}**: {value}",
    "bold label and colon": lambda label, value: f"- **{label}:** {value}",
    "bold all": lambda label, value: f"**{label}: {value}**",
    "bold value": lambda label, value: f"{label}: **{value}**",
    "italics": lambda label, value: f"_{label}_: *{value}*",
    "backticks": lambda label, value: f"`{label}`: `{value}`",
    "heading": lambda label, value: f"### {label}: {value}",
    "quote": lambda label, value: f"> {label}: {value}",
    "upper case": lambda label, value: f"{label}: {value}".upper(),
    "lower case": lambda label, value: f"{label}: {value}".lower(),
    "title": lambda label, value: f"{label}: {value}".title(),
    "space before the colon": lambda label, value: f"{label} : {value}",
    "no space after it": lambda label, value: f"{label}:{value}",
    "full-width colon": lambda label, value: f"{label}：{value}",
    "full-width": lambda label, value: f"{label}：{value}".replace("(", "（").replace(")", "）"),
    "equals": lambda label, value: f"{label} = {value}",
    "trailing stop": lambda label, value: f"{label}: {value}.",
    "indented": lambda label, value: f"\t  {label}: {value}  ",
    "windows": lambda label, value: f"{label}: {value}\r",
    "a row of a table": lambda label, value: f"| {label} | {value} |",
    "spaces": lambda label, value: f"{label}: {spaced(value)}",
    "square brackets": lambda label, value: f"{label}: {value.replace('(', '[').replace(')', ']')}",
    "sizes with ×": lambda label, value: f"{label}: {value.replace('x', '×')}",
    "sizes with X": lambda label, value: f"{label}: {value.replace('x', ' X ')}",
    "sizes with *": lambda label, value: f"{label}: {value.replace('x', '*')}",
    "lists with commas": lambda label, value: f"{label}: {value.replace(') (', '), (')}",
    "a list in brackets": lambda label, value: f"{label}: [{value.replace(') (', '), (')}]",
    "directions without commas": lambda label, value: f"{label}: {value.replace(', ', ' ')}",
    "lists with and": lambda label, value: f"{label}: {listed(value)}",
}

# Texts that state just what is true of a board.
SAME = [
    ("lake", "Map size: 4x4; Player: (3,0); Goal: (0,3); Holes: (1,1), (2,2)"),
    ("lake", "Map size: 4x4. Player: (3,0). Goal: (0,3). Holes: (1,1) and (2,2)."),
    ("lake", "Map size: 4x4, Player: (3,0), Goal: (0,3), Holes: (1,1), (2,2)"),
    ("lake", "Map size: 4x4 Player: (3,0) Goal: (0,3) Holes: (1,1) (2,2)"),
    ("lake", "```text\nMap size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (2,2) (1,1)\n```"),
    ("lake", "Map size: 4 by 4\nplayer position: (3,0)\nThe goal: (0,3)\nHole cells: (1,1),(2,2)"),
    ("lake", "Map size (rows x columns): 4x4\nPlayer (elf): (3,0)\nGoal: (0,3)\nHoles: (1,1)(2,2)"),
    ("lake", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles:\n- (1,1)\n- (2,2)\nI go on."),
    ("lake", "Map size:\n4x4\nPlayer:\n(3,0)\nGoal:\n(0,3)\n\nHoles:\n\n1. (1,1)\n2. (2,2)"),
    ("lake", "Map size: $4 \\times 4$\nPlayer: $(3, 0)$\nGoal: \\((0,3)\\)\nHoles: (1,1) (2,2)"),
    ("lake", "Map size: 4x4\nPlayer: row 3, column 0\nGoal: 0, 3\nHoles: (1,1) (2,2), not (3,3)"),
    ("lake", "Holes: (1,1) (2,2)\nGoal: (0,3)\nPlayer: (3,0)\nMap size: 4x4"),
    ("lake", "Map size: 4x4<br>Player: (3,0)<br>Goal: (0,3)<br>Holes: (1,1) (2,2)"),
    (
        "lake",
        "<think>Player: (0,0)\nHoles: none</think>Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\n"
        "Holes: (1,1) (2,2)\n<answer>Goal: (1,0)</answer><think>Goal: (2,0)",
    ),
    (
        "lake",
        "Player: (0,0)\n</think>\nMap size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)",
    ),
    (
        "lake",  # a plan in words states nothing
        "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)\nI go through (3,0) (2,0).\n"
        "Path to goal: (2,0) (1,0)\nNext to player: (2,0)\nThe player is now at (1,0).\nHoles: far",
    ),
    ("lake", "Map size -> 4x4\nPlayer → (3,0)\nGoal - (0,3)\nHoles – (1,1), (2,2)"),
    ("lake", "Grid: 4x4\nPlayer's position: (3,0)\nGoal: (0,3)\nHoles (2): (1,1) (2,2)"),
    ("lake", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHole 1: (1,1)\nHole 2: (2,2)"),
    ("lake", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\n- Hole: (1,1)\n- Hole: (2,2)"),
    (
        "lake",  # sentences, and what later ones tell
        "The map size is 4x4. The player is at (3, 0). The goal is at (0, 3).\nThe holes are at "
        "(1, 1) and (2, 2).\nI go up. The player is at (2,0). Then the goal is at (0,0).",
    ),
    ("lake", "State: a 4x4 grid, player at (3,0), goal at (0,3), holes at (1,1) and (2,2)."),
    ("lake", "Map size 4x4\nPlayer (3,0)\nGoal (0,3)\nHoles (1,1), (2,2)"),
    (
        "lake",  # what follows a list is about other cells
        "Map size: 4x4\nPlayer: (3,0). Moving up leads to (2,0).\nGoal: (0,3). Next is (0,2)!\n"
        "Holes: (1,1), (2,2). The rest of the cells, such as (0,0), are safe.\n"
        "**Goal**: find the shortest path from (3,0) to (0,3).\n- Player: (3,0) -> (2,0)",
    ),
    (
        "lake",  # a table by columns is not read, and so not misread
        "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)\n"
        "| Player | Goal | Holes |\n|---|---|---|\n| (3,0) | (0,3) | (1,1), (2,2) |",
    ),
    *(
        ("ice", f"Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\n{text}")
        for text in (
            *(
                "Holes: {}",
                "Holes: N/A",
                "Holes: nil",
                "Holes: there are none",
                "No holes present.",
            ),
            *("There are no holes on this map.", "The map has no holes.", "No holes are visible"),
        )
    ),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: none"),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: None."),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: no holes"),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: []"),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nno holes"),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\n- There are no holes on the board."),
    ("ice", "Map size: 4x4; Player: (3,0); Goal: (0,3); no holes"),
    (
        "maze",
        "Map size: 2x2\nPlayer: (0,0)\nGoal: (0,1)\nOpen directions:\n"
        "- **(0,0)**: Right\n- (0, 1) : Down and Left\n- [1,0]: right only\n- Cell (1,1): UP, left",
    ),
    (
        "maze",
        "Map size: 2x2. Player: (0,0). Goal: (0,1). (0,0): right; (0,1): left down; (1,0): right; "
        "(1,1): left, up (not right)",
    ),
    (
        "maze",
        "Map size: 2x2\nPlayer: (0,0)\nGoal: (0,1)\n| cell | open |\n|---|---|\n| (0,0) | right |\n"
        "| (0,1) | down, left |\n| (1,0) | right |\n| (1,1) | up, left |\n"
        "1. (0,0): move down\n(0,0) -> down -> (1,0)",
    ),
    (
        "maze",
        "Map size: 2x2\nPlayer: (0,0)\nGoal: (0,1)\n(0,0): up: no, down: no, left: no, right: yes\n"
        "(0,1): down and left are open, up is blocked\n(1,0): right, not up\n(1,1): up and left",
    ),
    *(
        ("maze", f"Map size: 2x2\nPlayer: (0,0)\nGoal: (0,1)\n{text}")
        for text in (
            "(0,0): R\n(0,1): DL\n(1,0): r\n(1,1): U, L",
            "(0,0): you can go right\n(0,1): can move down or left\n(1,0): R\n(1,1): UL",
            "At (0,0): right\nPosition (0,1): down, left\nTile (1,0): right\nCell (1,1): up, left",
            "(0,0): up ✗, down ✗, left ✗, right ✓\n(0,1): up ❌ | down ✅ | left ✅ | right ❌\n"
            "(1,0): ✗ up; ✗ down; right\n(1,1): up ✓ down ✘ left ✓ right ✘",
            "(0,0): right\n(0,1): down, left\n(1,0): right\n(1,1): up, left\n"
            "Step 1: (0,0): right -> (0,1)\n- **Step 2:** (0,1): down -> (1,1)",
        )
    ),
    (
        "office",
        "The room is a 5x5 grid. The agent is at (4,4). The printer is at (0,4). The table covers "
        "(1,0), (1,1), (1,2), (2,0), (2,1), and (2,2).\nThe agent picks up the printer: (1,4).",
    ),
    (
        "office",
        "Map size: 5x5\nAgent: (4,4)\nPrinter: (0,4)\nTable cells: (1,0), (1,1), (1,2), (2,0), "
        "(2,1), and (2,2)\nNext to printer: (0,3) (1,4)\nNext to table: (0,0)",
    ),
    (
        "office",
        "Next-to-table cells: (0,0); Table-adjacent cells: (0,1)\nMap size: 5x5\nAgent: (4,4)\n"
        "Printer: (0,4)\nTable: (1,0) (1,1) (1,2) (2,0) (2,1) (2,2) Next to table: (3,0) (3,1)",
    ),
]

# Texts that state something else or too little, with F1 in parts and what they contradict.
OTHER = [
    ("lake", "", 0.0, []),
    ("lake", "Map size: 14x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)", 8 / 9, []),
    ("lake", "Map size: 4x44\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)", 8 / 9, []),
    ("lake", "Map size: 4x4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)", 8 / 9, []),
    ("lake", "Map size: 4²\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)", 8 / 9, []),
    ("lake", "Map size: 5x5\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)", 8 / 10, []),
    ("lake", "<think>Map size: 4x4\nPlayer: (3,0)", 0.0, []),
    ("lake", "Map size: 4x4\nPlayer: (3,0)</think>", 0.0, []),
    ("lake", "<answer>Map size: 4x4\nPlayer: (3,0)</answer>", 0.0, []),
    ("lake", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: none", 6 / 8, []),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)", 1.0, []),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles:", 1.0, []),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nThere are no holes on my way.", 1.0, []),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (0,123456789012)", 6 / 7, []),
    ("ice", "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: no idea", 1.0, []),
    ("ice", "Map size: NxN\nPlayer: cell\nGoal: cell\nHoles: cells, or none", 0.0, []),
    ("lake", "Map size: not 4x4\nPlayer: not (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)", 6 / 8, []),
    ("lake", "After a step the player is at (3,0)\nMy goal (0,3) is far\na 14x4 grid", 0.0, []),
    ("lake", "| Player | Holes |\n|---|---|\n| (3,0) | (1,1), (2,2) |", 0.0, []),
    (
        "lake",  # the first hole was taken back
        "Map size: 4x4\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)\nWait. Holes: (2,2)",
        8 / 9,
        ["hole"],
    ),
    (
        "lake",
        "Map size: 4x4\nPlayer: (0,0)\nPlayer: (3,0)\nGoal: (0,3)\nHoles: (1,1) (2,2)\nGoal: (0,3)",
        1.0,
        ["player"],
    ),
    ("maze", "(0,0): down, right\n(0,0): right", 2 / 10, ["(0,0)"]),
]


def measured(board: str, text: str) -> dict[str, Any]:
    task, state = BOARDS[board]
    return facts.measure(task, state, facts.read_facts(task, text))


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize(
    ("board", "envs"), [*((board, ENVS) for board in BOARDS), ("maze", BY_ROWS)]
)
def test_a_way_of_writing_changes_nothing(board: str, envs: dict[str, Any], style: str) -> None:
    task, state = BOARDS[board]
    lines = [line.partition(":") for line in envs[task].state_lines(state)]
    text = "\n".join(STYLES[style](label, value.strip()) for label, _, value in lines)
    found = measured(board, text)
    assert {*found.pop("state_f1_by_kind").values()} == {1.0}
    assert found == {"state_f1": 1.0, "state_exact": True, "contradicted": []}
    assert facts.state_from_facts(task, facts.read_facts(task, text)) == state


@pytest.mark.parametrize(("board", "text"), SAME)
def test_the_same_facts_in_other_texts(board: str, text: str) -> None:
    assert measured(board, text)["state_f1"] == 1.0
    assert measured(board, text)["state_exact"]


@pytest.mark.parametrize(("board", "text", "f1", "contradicted"), OTHER)
def test_what_is_not_forgiven(board: str, text: str, f1: float, contradicted: list[str]) -> None:
    found = measured(board, text)
    assert found["state_f1"] == pytest.approx(f1)
    assert found["contradicted"] == contradicted
    assert found["state_exact"] == (contradicted == ["player"])


def test_f1_is_told_by_kind_of_fact() -> None:
    """One hole of two and two wrong ones, nothing of the goal; in one order in every process."""
    text = "Map size: 4x4\nPlayer: (3,0)\nHoles: (1,1) (0,0) (3,3)"
    found = measured("lake", text)["state_f1_by_kind"]
    assert found == pytest.approx({"size": 1.0, "player": 1.0, "goal": 0.0, "hole": 2 / 5})
    assert [*found] == sorted(found)
    ice = {"size": 0.0, "player": 0.0, "goal": 0.0}  # no holes to read
    assert measured("ice", "Holes: none")["state_f1_by_kind"] == ice
    assert measured("ice", "Holes: (1,1)")["state_f1_by_kind"] == ice | {"hole": 0.0}
    ends = "Map size: 2x2\nPlayer: (0,0)\nTarget: (0,1)\n(0,0): right, down"
    task, state = BOARDS["maze"]
    true = {fact for fact in ENVS[task].facts(state) if fact[0] == "open"}
    stated = {("open", (0, 0), "right"), ("open", (0, 0), "down")}
    f1 = 2 * len(true & stated) / (len(true) + len(stated))
    assert measured("maze", ends)["state_f1_by_kind"]["open"] == pytest.approx(f1) and 0 < f1 < 1


@pytest.mark.parametrize(("task", "level", "seed"), GENERATED)
def test_state_lines_are_read_back(task: str, level: int, seed: int) -> None:
    state = ENVS[task].generate(np.random.default_rng(seed), level)
    text = prompts.response(task, state, ENVS[task].shortest_plan(state))
    stated = facts.read_facts(task, text)
    assert stated.facts == ENVS[task].facts(state) and not stated.contradicted
    assert facts.is_exact(task, stated, ENVS[task].facts(state))
    own = facts.state_from_facts(task, stated)
    assert own is not None and ENVS[task].key(own) == ENVS[task].key(state)


def test_f1_counts_missing_and_invented_facts() -> None:
    true = frozenset({("size", 3), ("player", (0, 0)), ("goal", (2, 2)), ("hole", (1, 1))})
    text = "Map size: 3x3\nPlayer: (0,0)\nGoal: (2,1)\nHoles: (1,1) (0,2)"
    stated = facts.read_facts("frozenlake", text).facts
    # 3 right of 5 stated and of 4 true: precision 3/5, recall 3/4.
    assert facts.state_f1(stated, true) == pytest.approx(2 / (5 / 3 + 4 / 3))
    assert facts.state_f1(frozenset(), true) == 0.0


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("frozenlake", ""),
        ("frozenlake", "Map size: 3x3\nPlayer: (0,0)"),
        ("frozenlake", "Map size: 3x3\nPlayer: (0,0)\nGoal: (2,2)"),
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
