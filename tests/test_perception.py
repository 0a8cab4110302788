"""Answers to questions are scored by what they say, and any text at all is scored.

To add a way of writing an answer: a row in ANSWERS. To add a text that is hard to read: a row in
HARD.
"""

import random
import re
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgsd_jax.data import prompts
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS, facts, plans, responses, values
from mgsd_jax.envs.base import Question
from mgsd_jax.evaluation import perception, scoring

CELLS = frozenset({("hole", (0, 1)), ("hole", (2, 2))})
WAYS = frozenset({("legal", "up"), ("legal", "left")})
OPEN = frozenset({("open", (0, 0), "right"), ("open", (0, 1), "left"), ("open", (0, 1), "down")})
QUESTIONS = {
    "size": Question("map_size", "?", "4x4", "size", frozenset({("size", 4)})),
    "cell": Question("player", "?", "(3,0)", "coord", frozenset({("player", (3, 0))})),
    "cells": Question("holes", "?", "(0,1) (2,2)", "cells", CELLS),
    "no cells": Question("holes", "?", "none", "cells", frozenset()),
    "ways": Question("legal_moves", "?", "up, left", "directions", WAYS),
    "no ways": Question("legal_moves", "?", "none", "directions", frozenset()),
    "open": Question("open", "?", "(0,0): right\n(0,1): down, left", "open_directions", OPEN),
}
ANSWERS = [
    *(("size", text, True) for text in ("4x4", "4 x 4", "4X4", "4×4", "4*4", "**4x4**", "`4x4`.")),
    *(
        ("size", text, True)
        for text in ("The map size is 4 by 4.", "4 rows and 4 columns", "(4, 4)")
    ),
    *(("size", text, True) for text in ("Map size: 4x4", "\\boxed{4 \\times 4}", "４×４")),
    *(("size", text, True) for text in ("4x4, not 5x5", "4x4 (16 cells)")),
    *(
        ("size", text, False)
        for text in (
            "not 4x4",
            "It is not a 4x4 grid",
            "",
            "4",
            "5x5",
            "14x4",
            "4x44",
            "4x5",
            "4²",
            "4x4 or 5x5",
        )
    ),
    *(("cell", text, True) for text in ("(3,0)", "(3, 0)", "( 3 , 0 )", "[3, 0]", "**(3,0)**")),
    *(("cell", text, True) for text in ("The player is at (3, 0).", "Player: (3,0)", "3, 0")),
    *(("cell", text, True) for text in ("row 3, column 0", "(3,0), not (0,3)", "（3，0）")),
    *(("cell", text, False) for text in ("", "(0,3)", "(3,0) or (0,3)", "not (3,0)", "none", "30")),
    *(("cells", text, True) for text in ("(2,2) (0,1)", "(0, 1), (2, 2)", "(0,1) and (2,2)")),
    *(("cells", text, True) for text in ("[(0,1), (2,2)]", "\n- (0,1)\n- (2,2)", "(0,1)(2,2).")),
    *(("cells", text, True) for text in ("(0,1) (2,2) (2,2)", "The holes are (0,1) and (2,2)")),
    *(("cells", text, True) for text in ("0,1 2,2", "0, 1; 2, 2", "\n0,1\n2,2", "{(0,1), (2,2)}")),
    *(
        ("cells", text, True)
        for text in (
            "(0,1) and (2,2); all other cells, such as (3,3), are safe.",
            "(0,1) (2,2)\n\nLet me know if you want more! The cell (3,3) is safe.",
            "(0,1). And (2,2).",
            "(0,1) is a hole. (2,2) is one too.",
        )
    ),
    *(("cells", text, False) for text in ("0,1,2,2", "(0,1) and (2,2) are not holes")),
    *(("cells", text, False) for text in ("none", "(0,1)", "(0,1) (2,2) (3,3)", "")),
    *(("no cells", text, True) for text in ("none", "None.", "No holes", "There are none.", "[]")),
    *(
        ("no cells", text, True)
        for text in ("There aren't any holes.", "N/A", "{}", "nil", "0", "No cells are holes.")
    ),
    *(("no cells", text, False) for text in ("I have no idea", "cells, or none", "no doubt: many")),
    *(("no cells", text, False) for text in ("", "(0,0)", "I cannot tell", "many")),
    *(
        ("ways", text, True)
        for text in ("up, left", "Left and Up", "left up", "U, L", "Upward/left")
    ),
    *(
        ("ways", text, True)
        for text in ("up, left, not right", "It can go up or left, but not down")
    ),
    *(
        ("ways", text, True)
        for text in ("up and left (right is blocked)", "up: yes, down: no, left")
    ),
    *(("ways", text, True) for text in ("right and down are blocked, up and left are open",)),
    *(
        ("ways", text, True)
        for text in ("UL", "LU.", "[U, L]", "It can't go down or right, so up, left")
    ),
    *(
        ("ways", text, True)
        for text in (
            "up and left, since there are walls below and to the right",
            "up ✅, left ✅, down ❌, right ❌",
            "Up ✓ | Down ✗ | Left ✓ | Right ✗",
            "up, left (the right side is the border)",
        )
    ),
    *(("ways", text, False) for text in ("up", "not up, left", "up, left, right", "none", "")),
    *(("ways", text, False) for text in ("neither up nor left", "up and left are not legal")),
    *(("no ways", text, True) for text in ("none", "None of them.", "no moves")),
    *(("no ways", text, False) for text in ("", "up", "not up")),
    ("open", "(0,0): right\n(0,1): down, left", True),
    ("open", "\n- **(0, 1)**: Left, Down\n- **(0, 0)**: Right", True),
    ("open", "(0,0): right; (0,1): left and down", True),
    ("open", "(0,0): right\n(0,1): down, left, not up", True),
    ("open", "From (0,0): right\nFrom (0,1): down, left", True),
    ("open", "(0,0) → right\n(0,1) -> down, left", True),
    ("open", "At (0,0): right only\nAt (0,1): you can go down or left", True),
    ("open", "From (0,0): not right\nFrom (0,1): down, left", False),
    ("open", "(0,0): right\n(0,1): down", False),
    ("open", "(0,0): right\n(0,1): down, left\n(1,0): up", False),
    ("open", "right\ndown, left", False),
]
# How the number of an answer may be written.
NUMBERS = ("1.", "1)", "(1)", "**1.**", "1:", "Question 1:", "**Question 1:**", "Q1.", "### 1.")
NUMBERS += ("Answer 1:", "- 1.", "1 -", "1\\.", "> 1.", "*1.*", "Question 1.", " 1 . ", "[1]")
NUMBERS += (
    "1．",
    "1：",
    "（1）",
    "1、",
    "### Question 1\n",
    "**Question 1**\n",
    "| 1 |",
    '"1":',
    "1\ufe0f\u20e3",
)


@pytest.mark.parametrize(("kind", "answer", "is_right"), ANSWERS)
def test_an_answer_is_scored_by_what_it_says(kind: str, answer: str, is_right: bool) -> None:
    assert perception.is_right(QUESTIONS[kind], answer) == is_right


@pytest.mark.parametrize("number", NUMBERS)
def test_numbers_in_any_writing(number: str) -> None:
    text = "\n".join(
        f"{number.replace('1', str(i))} {answer}" for i, answer in ((1, "4x4"), (2, "(3,0)"))
    )
    found = perception.read_numbered(text, 2)
    assert perception.is_right(QUESTIONS["size"], found[1])
    assert perception.is_right(QUESTIONS["cell"], found[2])


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("1. 4x4\n2. (3,0)\nand so on\n4.none", {1: "4x4", 2: "(3,0)\nand so on", 4: "none"}),
        ("1. a\r\n2. b\r\n", {1: "a", 2: "b"}),
        ("1. a\n1. b", {1: "a\n1. b"}),
        ("4. \n1. (0,1)\n2. (2,2)\n5. (3,3)", {4: "", 1: "(0,1)", 2: "(2,2)\n5. (3,3)"}),
        ("<think>1. b</think>1. a", {1: "a"}),
        ("1. b</think>\n1. a", {1: "a"}),
        ("no numbers", {}),
        ("①. 4x4", {}),
        ("². 4x4", {}),
        ("1². 4x4", {}),
        ("٣. 4x4", {}),
        ("(1,2): up\n1x1\n12345. 4x4\n0. a\n9. b", {}),
        ("9" * 5000 + ". 4x4", {}),
    ],
)
def test_answers_are_told_apart(text: str, found: dict[int, str]) -> None:
    assert perception.read_numbered(text, 4) == found


def strict(score: scoring.PerceptionScore) -> dict[str, bool]:
    """What a new row has and an old one lacks."""
    assert "perception_strict" in score
    return score["perception_strict"]


@pytest.mark.parametrize("task", ENVS)
def test_right_answers_are_strict_and_others_are_right(task: str) -> None:
    """The form that is asked for is right and strict; Markdown around it is right alone."""
    level = ENVS[task].nearest_level(5)
    state = ENVS[task].generate(np.random.default_rng(0), level)
    board = Board(task, level, 0, state, None)
    answer = prompts.grounding(prompts.BUILT_IN, task, state, np.zeros((8, 8, 3), np.uint8))[1]
    row = scoring.score_perception(board, answer)
    assert all(row["perception"].values()) and all(strict(row).values())
    loose = answer.replace("(", "( ").replace(",", " , ").replace("x", " x ")
    loose = re.sub(r"(?m)^(\d)\.", r"**\1)**", loose).replace("none", "None.")
    row = scoring.score_perception(board, loose)
    assert all(row["perception"].values()), row
    assert not any(strict(row).values())
    row = scoring.score_perception(board, "")
    assert not any((row["perception"] | strict(row)).values())


# Whatever text a model writes, scoring ends in a row.

HARD = [
    *("", "²", "². ²", "①. 4x4", "1. ²x²", "Map size: ²x²", "(²,²): up", "\ud800", "\0", "\u2028"),
    *("9" * 4301 + "x" + "9" * 4301, f"1. ({'9' * 5000},0)", f"Player: ({'9' * 4301},0)"),
    *(f"Map size: {'4' * 5000}x4", f"Map size:{'4' * 50_000}", f"({'4' * 50_000},0): up"),
    *("İ" * 3, "ſ: (0,0)", "<anſwer>R</anſwer>", "1" * 5000 + ". 4x4", "Holes: (1,1" * 50),
]
BOARDS = [
    Board(task, level, 0, env.generate(np.random.default_rng(1), level), None)
    for task, env in ENVS.items()
    for level in [env.nearest_level(5)]
]
RIGHT = [
    text
    for board in BOARDS
    for text in (
        prompts.response(board.task, board.state, ENVS[board.task].shortest_plan(board.state)),
        prompts.grounding(prompts.BUILT_IN, board.task, board.state, np.zeros((8, 8, 3), np.uint8))[
            1
        ],
    )
]
PIECES = (
    *("<think>", "</think>", "<answer>", "</answer>", "Player:", "Map size:", "Holes:", "(0,0)"),
    *(
        "(0,0):",
        "4x4",
        "²",
        "①",
        "9" * 4301,
        "**",
        "|",
        "\n",
        "\r\n",
        " ",
        "none",
        "not",
        "up",
        "(",
    ),
    *("row", "\\times", ".", "1.", "Question 1:", "I go through", "é", "\U0001f600", "-", "and"),
)


def read_everything(text: str) -> None:
    """Every reader of this file's subject, over one text."""
    assert len(responses.without_thoughts(text)) == len(text)
    assert len(prompts.character_segments(text)) == len(text)
    for board in BOARDS:
        for mode in ("picture", "perception"):
            row = scoring.score_row(board, mode, scoring.Answer(text, False, 1), model="base")
            assert row["response"] == text
        facts.state_from_facts(board.task, facts.read_facts(board.task, text))


@pytest.mark.parametrize("text", HARD)
def test_hard_texts_end_in_a_row(text: str) -> None:
    read_everything(text)


@settings(deadline=None, max_examples=40)
@given(st.text())
def test_any_text_ends_in_a_row(text: str) -> None:
    read_everything(text)


@settings(deadline=None, max_examples=40)
@given(st.lists(st.sampled_from(PIECES)).map("".join))
def test_any_pieces_end_in_a_row(text: str) -> None:
    read_everything(text)


@settings(deadline=None, max_examples=40)
@given(st.sampled_from(RIGHT), st.integers(0, 1 << 30))
def test_mutated_responses_end_in_a_row(text: str, seed: int) -> None:
    rng = random.Random(seed)
    characters = list(text)
    for _ in range(rng.randint(1, 20)):
        place = rng.randrange(len(characters) + 1)
        characters[place : place + rng.randint(0, 3)] = rng.choice(PIECES)
    read_everything("".join(characters))


# A second a megabyte at most: no pattern can try one place in two ways, and each starts but once in
# a run of characters that it reads.

MODULES = (facts, perception, responses, values)


def patterns() -> dict[str, re.Pattern[str]]:
    found: dict[str, re.Pattern[str]] = {}
    for module in MODULES:
        for name, value in vars(module).items():
            if isinstance(value, re.Pattern):
                found[name] = value
            elif name == "_BEGINNINGS":
                found |= {f"{name} {task}": pattern for task, pattern in value.items()}
            elif name == "_MARKS":
                found |= {f"{name} {i}": pattern for i, (pattern, _) in enumerate(value)}
    return found


PARSER: Any = re._parser  # pyrefly: ignore[missing-attribute]  # absent from the standard stubs


def branches(parsed: Any) -> Iterator[list[Any]]:
    """Every sequence of items in a parsed pattern."""
    yield list(parsed)
    for _, argument in parsed:
        for part in argument if isinstance(argument, tuple | list) else [argument]:
            for inner in part if isinstance(part, list) else [part]:
                if isinstance(inner, PARSER.SubPattern):
                    yield from branches(inner)


def backtracking(pattern: str) -> list[str]:
    """Repeats without a bound that could give back what they took, or start again inside of it."""
    problems = []
    for items in branches(PARSER.parse(pattern)):
        for place, (kind, argument) in enumerate(items):
            if "REPEAT" not in str(kind) or argument[1] < 1000:
                continue
            if str(kind) != "POSSESSIVE_REPEAT" and place < len(items) - 1:
                problems.append(f"{argument} gives back")
            if place == 0 and len(items) > 1:
                problems.append(f"{argument} starts again")
    return problems


@pytest.mark.parametrize("name", patterns())
def test_no_pattern_backtracks(name: str) -> None:
    assert backtracking(patterns()[name].pattern) == []


def test_the_rule_notices_what_backtracks() -> None:
    assert backtracking(r"x[0-9]+x") and backtracking(r"[0-9]++x") and backtracking(r"a(?:b|c+d)")
    assert not backtracking(r"x[0-9]++x") and not backtracking(r"(?<![0-9])[0-9]++x|[ab]+")


def possessive_groups(pattern: str) -> list[str]:
    """Possessive repeats of more than a character, which Python before 3.11.5 matches wrongly."""
    characters = ("IN", "LITERAL", "NOT_LITERAL", "ANY")
    return [
        str(argument)
        for items in branches(PARSER.parse(pattern))
        for kind, argument in items
        if str(kind) == "POSSESSIVE_REPEAT" and str(argument[2][0][0]) not in characters
    ]


@pytest.mark.parametrize("module", [*MODULES, plans], ids=lambda module: module.__name__)
def test_no_group_is_repeated_possessively(module: types.ModuleType) -> None:
    found = [value for value in vars(module).values() if isinstance(value, re.Pattern)]
    found += [part[0] for part in getattr(module, "_MARKS", ())]
    if module is facts:
        found += [facts._vocabulary(task).sentence for task in ENVS]
    assert [one.pattern for one in found if possessive_groups(one.pattern)] == []
    assert possessive_groups(r"(?:ab|c)*+d") and not possessive_groups(r"[ab]*+c++d{1,2}+")


@pytest.mark.parametrize(
    "unit",
    [
        *("(", "9", "²", "a", " ", "\n", "*", "\\", "-", "<answer>", "<think>", "</think>", "\r\n"),
        *("(0,0): ", "Player: (0,0)\n", "not ", "row ", "4x", "1. ", "Holes:\n(0,0)\n", "a("),
    ],
)
@pytest.mark.parametrize("start", ["", "Holes:\n"])
def test_long_texts_end(start: str, unit: str) -> None:
    """A reader that tries again from every place would take minutes over some of them."""
    text = start + unit * (50_000 // len(unit))
    assert len(prompts.character_segments(text)) == len(text)
    facts.read_facts("frozenlake", text)
    facts.read_facts("maze", text)
    perception.read_numbered(text, 5)
    for kind in ("size", "cells", "ways"):
        perception.is_right(QUESTIONS[kind], text)
