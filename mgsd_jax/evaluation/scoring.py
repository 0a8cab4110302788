"""The score of one answer: what was planned, what was seen, and what a row keeps of it."""

import dataclasses
from typing import Any

from mgsd_jax.config import Mode
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS, facts
from mgsd_jax.evaluation import perception, rules

Row = dict[str, Any]


def board_text(board: Board) -> str:
    """The board file of a board that is asked about."""
    return ENVS[board.task].to_text(board.state, split="test", index=board.index, seed=0)


def score_row(board: Board, mode: Mode, response: str) -> Row:
    """The row of a response, all that needs no model: plan, outcome, state facts, questions."""
    env = ENVS[board.task]
    row: Row = {
        "id": f"{board.task}/{board.level}/{board.index}/{mode}",
        "mode": mode,
        "task": board.task,
        "level": board.level,
        "index": board.index,
        "task_text": board_text(board),
        "response": response,
    }
    if mode == "perception":
        questions = env.questions(board.state)
        answers = perception.read_numbered(response, len(questions))
        given = [(q, answers.get(i, "")) for i, q in enumerate(questions, 1)]
        row["perception"] = {q.name: perception.is_right(q, answer) for q, answer in given}
        row["perception_strict"] = {q.name: answer == q.answer.strip() for q, answer in given}
        return row
    stated = facts.read_facts(board.task, response)
    own_state = facts.state_from_facts(board.task, stated)
    parsed = rules.parse_plan(response, board.task)
    row["outcome"] = dataclasses.asdict(rules.play(board.state, board.task, parsed))
    row["plan"] = list(parsed.plan)
    row |= facts.measure(board.task, board.state, stated)
    row["plan_given_own_state"] = (
        False if own_state is None else rules.play(own_state, board.task, parsed).success
    )
    return row
