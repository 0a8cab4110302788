"""The simulator of the public scorers, on the boards where they differ from us and each other."""

import pytest

from mgsd_jax.evaluation.rules import score_text
from mgsd_jax.evaluation.upstream import Board, Trace, read_board, read_fields, simulate

OPEN = {"north": False, "south": False, "east": False, "west": False}
MAZE = "level=2\nlayout_json=[[{0}, {0}], [{0}, {0}]]\nstart_row=0\nstart_col=0\n".replace(
    "{0}", '{"north": false, "south": false, "east": false, "west": false}'
)


def lake(*rows: str) -> Board:
    return read_board("frozenlake", {}, rows, as_record=False)


def test_the_edge_of_the_lake_stops_the_evaluator_alone() -> None:
    board = lake("SF", "HG")
    assert simulate(board, ["up", "left"], edge_stops=False) == Trace(False, None, 2)
    assert simulate(board, ["up", "left"], edge_stops=True) == Trace(False, "out_of_bounds:up", 1)


def test_what_follows_success_or_failure_is_ignored() -> None:
    board = lake("SF", "HG")
    assert simulate(board, ["right", "down", "left"], edge_stops=True) == Trace(True, None, 2)
    hole = Trace(False, "fell_into_hole", 1)
    assert simulate(board, ["down", "right"], edge_stops=False) == hole


def test_walls_come_before_the_edge() -> None:
    layout = [[{**OPEN, "west": True}, OPEN]]
    board = Board((1, 2), (0, 0), frozenset({(0, 1)}), walls=layout)
    assert simulate(board, ["left"], edge_stops=False).reason == "wall_blocked:left"
    assert simulate(board, ["up"], edge_stops=False).reason == "out_of_bounds:up"


def test_a_start_on_the_target_counts_for_the_evaluator_without_a_step() -> None:
    reward = MAZE + "target_row=0\ntarget_col=0\n"
    record = MAZE + "start_pos=0\ntarget_pos=0\npath_length=0\n"
    there_and_back = "<answer>RL</answer>"
    assert score_text("upstream_reward", "maze", reward, "<answer></answer>")["success"] == 0
    assert score_text("upstream_reward", "maze", reward, there_and_back)["success"] == 1
    score = score_text("upstream_eval", "maze", record, "<answer></answer>")
    assert score["success"] and score["optimal_success"] and not score["parse_success"]
    assert not score_text("upstream_eval", "maze", record, "<answer>R</answer>")["success"]
    assert score_text("upstream_eval", "maze", record, there_and_back)["success"]


def test_a_record_without_a_length_has_no_optimal_plan() -> None:
    record = MAZE + "start_pos=0\ntarget_pos=1\n"
    score = score_text("upstream_eval", "maze", record, "R")
    assert score["success"] and not score["optimal_success"]


def test_hands() -> None:
    board = Board(
        (2, 2),
        (0, 0),
        printer=(0, 1),
        table=frozenset({(1, 1)}),
        pick_cells=frozenset({(0, 0)}),
        drop_cells=frozenset({(0, 1)}),
    )
    for actions, want in (
        (["right"], "entered_printer"),
        (["pick", "pick"], "pick_while_carrying"),
        (["down", "pick"], "pick_not_adjacent_to_printer"),
        (["drop"], "drop_without_printer"),
        (["pick", "drop"], "drop_not_adjacent_to_table"),
        (["down", "right"], "entered_table"),
    ):
        trace = simulate(board, actions, edge_stops=False)
        assert trace == Trace(False, want, len(actions))
    assert simulate(board, ["pick", "right", "drop", "up"], edge_stops=False) == Trace(
        True, None, 3
    )


def test_files_are_read_as_forgivingly_as_the_public_scorers_do() -> None:
    text = " level = 2 \r\nnoise\n map: \r\nSF\n\n  FG\nlevel=3\n"
    assert read_fields(text) == ({"level": "2"}, ("SF", "FG", "level=3"))
    assert read_fields("MAP:\nSF\n") == ({}, None)
    assert read_fields("layout:\n5 3\nmap:\nSF\n") == ({}, None)


def test_a_gap_in_a_board_matters_only_where_the_plan_gets_there() -> None:
    board = lake("SFG", "F")
    assert simulate(board, ["right", "right"], edge_stops=False).success
    with pytest.raises(ValueError, match=r"map: no tile found at \(1, 1\), want"):
        simulate(board, ["down", "right"], edge_stops=False)
    maze = Board((2, 2), (0, 0), frozenset({(0, 1)}), walls=[[OPEN]])
    assert simulate(maze, ["right"], edge_stops=False).success
    with pytest.raises(ValueError, match=r"layout_json: got no 'east' of cell \(1, 0\)"):
        simulate(maze, ["down", "right"], edge_stops=False)
