"""Mazes told by rows say what mazes told by cells say, to every reader, in fewer tokens."""

import dataclasses
import pathlib

import numpy as np
import pytest

from mgsd_jax.command_line import load_config
from mgsd_jax.config import StateText
from mgsd_jax.data import prompts
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder, load_encoder
from mgsd_jax.data.processor import load_processor
from mgsd_jax.data.prompts import BUILT_IN, Prompts
from mgsd_jax.data.records import RECORDS
from mgsd_jax.data.segments import decode
from mgsd_jax.envs import BY_ROWS, ENVS, facts
from mgsd_jax.envs.by_rows import by_rows
from mgsd_jax.envs.maze import MazeState
from mgsd_jax.envs.noise import disturb
from mgsd_jax.evaluation import perception
from mgsd_jax.evaluation.scoring import score_plan
from mgsd_jax.sampling import answers

ROOT = pathlib.Path(__file__).parents[1]
MAZE = ENVS["maze"]
ROWS = Prompts({}, "rows")
# (0,0) opens to the right, (0,1) down and left, (1,0) right, (1,1) up and left.
BOARD = Board("maze", 2, 0, MazeState(((7, 9), (7, 10)), start=(0, 0), target=(0, 1)), None)
ENDS = "Map size: 2x2\nPlayer: (0,0)\nGoal: (0,1)\nOpen directions:\n"
ASKED = f"{ENDS}Row 0: R DL\nRow 1: R UL"


def maze(level: int, seed: int = 0) -> MazeState:
    return MAZE.generate(np.random.default_rng(seed), level)


def test_the_text_of_a_board() -> None:
    assert BY_ROWS["maze"].describe(BOARD.state) == ASKED
    closed = dataclasses.replace(BOARD.state, walls=((15, 13), (15, 14)))
    assert BY_ROWS["maze"].describe(closed) == f"{ENDS}Row 0: none D\nRow 1: none U"


@pytest.mark.parametrize("level", MAZE.levels)
def test_a_board_comes_back_out_of_its_text(level: int) -> None:
    for seed in range(3):
        state = maze(level, seed)
        stated = facts.read_facts("maze", BY_ROWS["maze"].describe(state))
        assert stated == facts.read_facts("maze", MAZE.describe(state))
        assert stated.facts == MAZE.facts(state) and not stated.contradicted
        assert facts.stated_board("maze", stated) == state


@pytest.mark.parametrize("share", [0.0, 0.2])
@pytest.mark.parametrize("level", [3, 5, 8])
def test_both_forms_of_an_answer_score_the_same(level: int, share: float) -> None:
    for seed in range(10):
        board = Board("maze", level, 0, maze(level, seed), None)
        seen = disturb("maze", board.state, np.random.default_rng(seed), share)
        plan = MAZE.shortest_plan(seen)
        long, short = (prompts.response("maze", seen, plan, words) for words in (BUILT_IN, ROWS))
        assert len(short) < len(long) and "Row 0: " in short and "Row 0: " not in long
        assert score_plan(board, short) == score_plan(board, long)
        assert score_plan(board, short).get("plan_given_own_state") is True
        assert share or score_plan(board, short)["state_exact"]


# What follows the ends -> what is stated besides them, what is contradicted.
RIGHT, DOWN, LEFT = ("open", (0, 0), "right"), ("open", (0, 1), "down"), ("open", (0, 1), "left")
SECOND = (("open", (1, 0), "right"), ("open", (1, 1), "up"), ("open", (1, 1), "left"))
ALL = {RIGHT, DOWN, LEFT, *SECOND}
STATED = [
    ("Row 0: R DL\nRow 1: R UL", ALL, ()),
    ("Row 1: R UL\nRow 0: R LD", ALL, ()),
    ("Row 0: R DL; Row 1: R UL", ALL, ()),
    ("- **Row 0:** r, dl\n- **Row 1:** r, lu", ALL, ()),
    ("| Row 0 | R DL |\n| Row 1 | R UL |", ALL, ()),
    ("Row 0 (top): R DL.\nRow 1 = [R UL]", ALL, ()),
    ("Row 0: R DL\n(1,0): right\n(1,1): up, left", ALL, ()),
    ("Row 0: R DL\nRow 1: R UL\n(0,1): left, down\nRow 1: R LU", ALL, ()),
    ("Row 0: R DL", {RIGHT, DOWN, LEFT}, ()),  # a missing row
    ("Row 0: R\nRow 1: R UL", {RIGHT, *SECOND}, ()),  # missing cells
    ("Row 0: none DL\nRow 1: R UL", ALL - {RIGHT}, ()),
    ("Row 0: R DL\nRow 0: R L\nRow 1: R UL", ALL - {DOWN}, ("(0,1)",)),
    ("Row 0: R DL\nRow 1: R UL\n(0,1): left", ALL - {DOWN}, ("(0,1)",)),
    ("(0,1): left\nRow 0: R DL\nRow 1: R UL", ALL, ("(0,1)",)),
    ("Row 0: R DL U\nRow 1: R UL", {*ALL, ("open", (0, 2), "up")}, ()),  # a cell too many
    ("Row 0: R DL\nRow 1: R UL\nRow 2: none U", {*ALL, ("open", (2, 1), "up")}, ()),
    ("Row 0: R DL\nRow 99: R", {RIGHT, DOWN, LEFT, ("open", (99, 0), "right")}, ()),
]
NOTHING = (
    *("Row 0: (0,0) (0,1)", "Row 0: S . # G", "Row 0: right, down left", "Row 0: R or DL"),
    *("Row 0:", "Row: R DL", "Row 0: R DX", "Rows 0: R DL", "Row 0: I go R", "Row 100: R"),
    *("The player leaves row 0: R", "Column 0: R DL", "Row 0: RDLUR", "Row 0: R -> DL"),
    prompts.passages(BY_ROWS["maze"])["format"].partition("\n")[2],
)


@pytest.mark.parametrize(("text", "stated", "contradicted"), STATED)
def test_what_rows_state(text: str, stated: set[facts.Fact], contradicted: tuple[str, ...]) -> None:
    found = facts.read_facts("maze", ENDS + text)
    ends = {("size", 2), ("player", (0, 0)), ("goal", (0, 1))}
    assert found.facts == ends | stated and found.contradicted == contradicted
    score = score_plan(BOARD, ENDS + text)
    assert score["state_f1"] == pytest.approx(
        2 * len(ends | stated & ALL) / (len(ends | stated) + len(ends | ALL))
    )
    assert score["state_exact"] == (stated == ALL)


@pytest.mark.parametrize("text", NOTHING)
def test_what_is_no_row_of_cells_states_nothing(text: str) -> None:
    stated = facts.read_facts("maze", text).facts
    assert not {fact for fact in stated if fact[0] == "open"}


def test_cells_beyond_the_board_make_no_board() -> None:
    for text, cell in (("Row 0: R DL U", (0, 2)), ("Row 2: R", (2, 0)), ("Row 99: R", (99, 0))):
        line = rf"open: got \({cell[0]}, {cell[1]}\), want a cell of a 2x2 board"
        with pytest.raises(ValueError, match=line):
            facts.stated_board("maze", facts.read_facts("maze", ENDS + text))


def test_rows_are_read_where_a_task_has_sides() -> None:
    lake = "Map size: 2x2\nPlayer: (0,0)\nGoal: (0,1)\nHoles: none"
    stated = facts.read_facts("frozenlake", lake)
    assert facts.read_facts("frozenlake", f"{lake}\nRow 0: R DL\nRow 1: D") == stated


def test_long_texts_of_rows_end() -> None:
    """No row makes the reader try again from each of its cells; a board has 64 cells a row."""
    for unit in ("UDLR ", "Row 0: ", "Row 0: R ", "Row 0: R\n", "Row 0: U, D and "):
        facts.read_facts("maze", "Row 0: " + unit * (200_000 // len(unit)))
    assert len(facts.read_facts("maze", "Row 0: " + "UDLR " * 64).facts) == 4 * 64
    assert not facts.read_facts("maze", "Row 0: " + "UDLR " * 65).facts


def test_the_question_about_open_sides_follows() -> None:
    (asked,) = (q for q in BY_ROWS["maze"].questions(BOARD.state) if q.kind == "open_rows")
    (long,) = (q for q in MAZE.questions(BOARD.state) if q.kind == "open_directions")
    assert asked.name == long.name and asked.facts == long.facts
    assert "Write a line for each row" in prompts.ask(4, asked)
    for question in (asked, long):
        assert perception.is_right(question, asked.answer)
        assert perception.is_right(question, long.answer)
        assert not perception.is_right(question, asked.answer.replace("UL", "L"))
    messages, answer = prompts.grounding(ROWS, "maze", BOARD.state, np.zeros((8, 8, 3), np.uint8))
    assert "like Row 0: DR L none" in messages[0]["content"][-1]["text"]
    assert answer == prompts.right_answers("maze", BOARD.state, ROWS)
    given = perception.read_numbered(answer, 5)
    assert given[4] == asked.answer


@pytest.fixture(scope="module")
def encoders() -> dict[StateText, Encoder]:
    config = load_config(str(ROOT / "configs" / "nano.py"), [])
    processor = load_processor(config.model.path)
    forms: tuple[StateText, ...] = ("cells", "rows")
    return {
        form: load_encoder(dataclasses.replace(config.data, state_text=form), processor)
        for form in forms
    }


@pytest.mark.parametrize("task", ["frozenlake", "maze"])
def test_everything_that_is_made_of_a_board_has_the_form(
    task: str, encoders: dict[StateText, Encoder]
) -> None:
    state = ENVS[task].generate(np.random.default_rng(3), 5)
    board, made = Board(task, 5, 0, state, None), {}
    for form, encoder in encoders.items():
        tokens = {
            "student": encoder.student(board).tokens,
            "teacher": encoder.teacher(board, "state_and_plan").tokens,
            "reference": encoder.reference(board, np.random.default_rng(0)),
            "draft": encoder.draft(board),
            "draft of questions": encoder.draft(board, is_perception=True),
        }
        for kind in RECORDS:
            tokens[kind] = encoder.record(board, kind, np.random.default_rng(0))[0].tokens
        for mode in ("picture", "text", "blind", "perception"):
            tokens[mode] = answers.encode_prompt(encoder, board, mode).tokens
        made[form] = {kind: decode(encoder.processor, ids) for kind, ids in tokens.items()}
    if task == "frozenlake":
        assert made["rows"] == made["cells"]
        return
    for kind in made["cells"].keys() - {"cells"}:  # the record that names what each cell shows
        assert "Row " in made["rows"][kind] and "Row " not in made["cells"][kind], kind
        assert "(0,0): " not in made["rows"][kind], kind


def test_student_and_teacher_are_asked_for_one_form() -> None:
    form = prompts.passages(ROWS.env("maze"))["format"]
    assert form in ROWS.template("maze", "student") and form in ROWS.template("maze", "teacher")
    assert form != prompts.passages(MAZE)["format"]
    (message,) = prompts.teacher(ROWS, "maze", BOARD.state)
    assert message["content"] == ROWS.template("maze", "teacher").replace("<state>", ASKED)


def test_prompts_of_a_folder_read_the_form(tmp_path: pathlib.Path) -> None:
    (tmp_path / "maze.teacher.txt").write_text("Solve it. <state>")
    (message,) = prompts.teacher(prompts.load(str(tmp_path), "rows"), "maze", BOARD.state)
    assert message["content"] == f"Solve it. {ASKED}"
    assert prompts.load("", "rows") == ROWS and prompts.load("", "cells") == BUILT_IN


def test_an_env_whose_form_ends_otherwise_is_refused() -> None:
    wording = dataclasses.replace(MAZE.wording, form=("Map size: NxN", "Sides: what is open"))
    with pytest.raises(ValueError, match=r"maze: form: got .*, want it to end with"):
        by_rows(dataclasses.replace(MAZE, wording=wording))
