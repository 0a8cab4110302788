"""The two scorers of the public MGSD release: its training reward and its checkpoint evaluator.

They disagree with each other. What differs in how they read a response is the data of a `Dialect`;
the boards and the simulator are in upstream.py.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any

from mgsd_jax.envs.minibehaviour import HANDS
from mgsd_jax.envs.plans import MOVES
from mgsd_jax.evaluation.upstream import TASKS, integer, read_board, simulate

_WORDS = MOVES | HANDS
_TAG = re.compile(r"<(/?)answer>", re.I)
Rows = tuple[str, ...] | None  # of a FrozenLake map
Score = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a public scorer reads a response.

    `words` finds what may be an action; text between its matches is skipped. A text that is all
    `compact` once what `squeeze` matches is gone is one action a character, except on the tasks
    `without_compact`.
    """

    block: int  # which of the answer blocks counts
    words: re.Pattern[str]
    actions: Mapping[str, str]  # upper-case word -> action, for all that `words` matches
    compact: re.Pattern[str]
    squeeze: re.Pattern[str]
    without_compact: frozenset[str] = frozenset()


REWARD = Dialect(
    block=0,
    # PUT and -WARD are not words here.
    words=re.compile(
        r"\b(?:PICK[_-]?UP|PUT[_-]?DOWN|PICK|DROP|GRAB|LEFT|RIGHT|UP|DOWN|[LRUD0-3])\b|[←↓→↑]", re.I
    ),
    actions=_WORDS,
    compact=re.compile(r"[LRUD0123←↓→↑]+"),
    squeeze=re.compile(r"\s+"),
)
EVALUATION = Dialect(
    block=-1,
    # PICK_UP, PUT and arrows are not words here, so PUT-DOWN is a move down.
    words=re.compile(
        r"\b(?:PICK-UP|PICKUP|PICK|DROP|PLACE|GRAB|(?:LEFT|RIGHT|UP|DOWN)(?:WARDS?)?|[LRUD0-5])\b",
        re.I,
    ),
    actions={**_WORDS, "4": "pick", "5": "drop"},
    compact=re.compile(r"[LRUD0123]+"),
    squeeze=re.compile(r"[\s,;|/>\-]+"),
    without_compact=frozenset({"minibehaviour"}),
)


def answer_blocks(response: str) -> list[str]:
    """The texts of `<answer>...</answer>`, each from its first opening tag, in one pass."""
    blocks: list[str] = []
    start = None
    for tag in _TAG.finditer(response):
        if not tag[1]:
            start = tag.end() if start is None else start
        elif start is not None:
            blocks.append(response[start : tag.start()].strip())
            start = None
    return blocks


def _read_actions(text: str, task: str, dialect: Dialect) -> tuple[list[str], bool]:
    """The actions of a plan text in order, and whether all of its words are actions of the task."""
    squeezed = dialect.squeeze.sub("", text).upper()
    if task not in dialect.without_compact and dialect.compact.fullmatch(squeezed):
        return [dialect.actions[character] for character in squeezed], True
    actions = [dialect.actions[match[0].upper()] for match in dialect.words.finditer(text)]
    known = [a for a in actions if a not in ("pick", "drop") or task == "minibehaviour"]
    return known, known == actions


def reward_scorer(task: str, fields: Mapping[str, str], rows: Rows) -> Callable[[str], Score]:
    """The training reward of responses on one board. A plan on an unknown task is illegal."""
    # It reads the board only for a response with a plan.
    read = functools.cache(lambda: read_board(task, fields, rows, as_record=False))
    is_known = task in TASKS and (task != "frozenlake" or bool(rows))

    def score(response: str) -> Score:
        blocks = answer_blocks(response)
        actions = _read_actions(blocks[REWARD.block], task, REWARD)[0] if blocks else []
        success, illegal = False, bool(actions)
        if actions and is_known:
            trace = simulate(read(), actions, edge_stops=False)
            success = trace.success
            illegal = trace.reason not in (None, "fell_into_hole")
        return {
            "overall": float(success),
            "accuracy": float(success),
            "success": float(success),
            "format": float(bool(blocks)),
            "parse_success": float(bool(actions)),
            "illegal_action": float(illegal),
        }

    return score


def eval_scorer(task: str, fields: Mapping[str, str], rows: Rows) -> Callable[[str], Score]:
    """The checkpoint evaluator on one board. Raises ValueError for an unknown task."""
    if task not in TASKS:
        raise ValueError(f"task: got {task!r}, want one of {TASKS}")
    board = read_board(task, fields, rows, as_record=True)

    def score(response: str) -> Score:
        blocks = answer_blocks(response)
        text = blocks[EVALUATION.block] if blocks else response.strip()
        actions, all_known = _read_actions(text, task, EVALUATION)
        trace = simulate(board, actions, edge_stops=True)
        # It asks where the agent stands at the end, which without a step is the start.
        success = trace.success or (trace.steps == 0 and board.start in board.goals)
        optimal = integer(fields, "path_length") if "path_length" in fields else None
        return {
            "success": success,
            "optimal_success": success and trace.steps == optimal,
            "parse_success": bool(actions) and all_known,
            "steps_executed": trace.steps,
            "invalid_reason": trace.reason,
            "actions": actions,
        }

    return score
