"""The three rule sets that score a response on a board.

'standard' is ours and the only one that training, validation and evaluation use: read the last
answer block (`plans.read_plan`), then `play` of the env. 'upstream_reward' and 'upstream_eval'
reproduce the two scorers of the public MGSD release (its training reward and its checkpoint
evaluator), which disagree with each other, so that published numbers can be compared. What differs
between those two is the data of a `Dialect`.
"""

import dataclasses
import functools
import re
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

from mgsd_jax.envs import ENVS, facts
from mgsd_jax.envs.base import Outcome, Plan
from mgsd_jax.envs.plans import ALIASES, HANDS, read_plan
from mgsd_jax.envs.responses import answer_span, without_thoughts
from mgsd_jax.evaluation.upstream import Board, integer, read_board, read_fields, simulate

Rules = Literal["standard", "upstream_reward", "upstream_eval"]


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How a public rule set reads a response.

    `words` finds what may be an action; text between its matches is skipped. A text that is all
    `compact` once what `squeeze` matches is gone is one action a character, except on the tasks
    `without_compact`.
    """

    block: int  # which of the answer blocks counts
    words: re.Pattern[str]
    aliases: Mapping[str, str]  # upper-case word -> action
    compact: re.Pattern[str]
    squeeze: re.Pattern[str]
    without_compact: frozenset[str]


_TAG = re.compile(r"<(/?)answer>", re.I)
DIALECTS: dict[Rules, Dialect] = {
    "upstream_reward": Dialect(
        block=0,
        # PUT and -WARD are not words here.
        words=re.compile(
            r"\b(?:PICK[_-]?UP|PUT[_-]?DOWN|PICK|DROP|GRAB|LEFT|RIGHT|UP|DOWN|[LRUD0-3])\b|[←↓→↑]",
            re.I,
        ),
        aliases=ALIASES,
        compact=re.compile(r"[LRUD0123←↓→↑]+"),
        squeeze=re.compile(r"\s+"),
        without_compact=frozenset(),
    ),
    "upstream_eval": Dialect(
        block=-1,
        # PICK_UP, PUT and arrows are not words here, so PUT-DOWN is a move down.
        words=re.compile(
            r"\b(?:PICK-UP|PICKUP|PICK|DROP|PLACE|GRAB|(?:LEFT|RIGHT|UP|DOWN)(?:WARDS?)?"
            r"|[LRUD0-5])\b",
            re.I,
        ),
        aliases={**ALIASES, "4": "pick", "5": "drop"},
        compact=re.compile(r"[LRUD0123]+"),
        squeeze=re.compile(r"[\s,;|/>\-]+"),
        without_compact=frozenset({"minibehaviour"}),
    ),
}


@dataclasses.dataclass(frozen=True)
class ParsedPlan:
    """The plan of a response, or why it has none (`plan` is then empty)."""

    plan: Plan
    parsed: bool
    reason: Literal["no_answer", "invalid_token"] | None
    invalid_token: str | None


def _blocks(response: str) -> list[str]:
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


def _read_actions(text: str, task: str, dialect: Dialect) -> tuple[list[str], list[str]]:
    """The actions of a plan text in order, and the words of it that are no action of this task."""
    squeezed = dialect.squeeze.sub("", text).upper()
    if task not in dialect.without_compact and dialect.compact.fullmatch(squeezed):
        return [dialect.aliases[character] for character in squeezed], []
    actions: list[str] = []
    invalid: list[str] = []
    for match in dialect.words.finditer(text):
        word = match[0].upper()
        if word in dialect.aliases:
            action = dialect.aliases[word]
            if action in HANDS and task != "minibehaviour":
                invalid.append(match[0])
            else:
                actions.append(action)
        else:
            invalid.append(match[0])
    return actions, invalid


def parse_plan(response: str, task: str, *, lenient: bool = False) -> ParsedPlan:
    """The plan that a response states, by the standard rules.

    `lenient` reads the whole response where there is no block, for models that were never told of
    the tag. Raises ValueError for an unknown task only: no text is an error.

    >>> parse_plan('so <answer>U, up-RR</answer>', 'maze').plan
    ('up', 'up', 'right', 'right')
    """
    _check_task(task)
    span = answer_span(response)
    if span is None and not lenient:
        return ParsedPlan((), False, "no_answer", None)
    plan, invalid = read_plan(without_thoughts(response)[slice(*(span or (None,)))], task)
    return ParsedPlan(plan, invalid is None, None if invalid is None else "invalid_token", invalid)


def judge(state: Any, task: str, response: str, *, lenient: bool = False) -> Outcome:
    """The outcome of a response on a board by the standard rules; see `parse_plan` and `play`."""
    return play(state, task, parse_plan(response, task, lenient=lenient))


def play(state: Any, task: str, parsed: ParsedPlan) -> Outcome:
    """The outcome of what `parse_plan` made of a response, on a board."""
    if parsed.reason is not None:
        return Outcome(
            success=False,
            optimal=False,
            parsed=False,
            legal=False,
            reason=parsed.reason,
            steps=0,
            progress=0.0,
        )
    return ENVS[task].play(state, parsed.plan)


def _check_task(task: str) -> None:
    if task not in ENVS:
        raise ValueError(f"task: got {task!r}, want one of {sorted(ENVS)}")


def score_text(rules: str, task: str | None, task_text: str, response: str) -> dict[str, Any]:
    """The score of a response on the board of a board file, under one of the three rule sets.

    'standard' returns the fields of `Outcome` and of `facts.measure`; the public two return the
    keys of the public scorers. `task` may be in any case; None or '' takes the task of the text.
    Raises ValueError, naming the key, for a board that the rule set cannot play.
    """
    return scorer(rules, task, task_text)(response)


def scorer(rules: str, task: str | None, task_text: str) -> Callable[[str], dict[str, Any]]:
    """`score_text` for many responses on one board, which is read once."""
    if rules not in get_args(Rules):
        raise ValueError(f"rules: got {rules!r}, want one of {get_args(Rules)}")
    fields, rows = read_fields(task_text)
    name = (task or fields.get("task") or "").lower()
    name = "minibehaviour" if name == "minibehavior" else name
    if rules == "upstream_reward":
        # This rule set reads the board only for a response with a plan.
        board = functools.cache(lambda: read_board(name, fields, rows, as_record=False))
        is_known = name in ENVS and (name != "frozenlake" or bool(rows))
        return lambda response: _score_reward(name, board if is_known else None, response)
    _check_task(name)
    if rules == "upstream_eval":
        record = read_board(name, fields, rows, as_record=True)
        return lambda response: _score_eval(name, record, fields, response)
    state = ENVS[name].from_text(task_text, source="task_text")

    def score(response: str) -> dict[str, Any]:
        outcome = dataclasses.asdict(judge(state, name, response))
        return outcome | facts.measure(name, state, facts.read_facts(name, response))

    return score


def _score_reward(task: str, read: Callable[[], Board] | None, response: str) -> dict[str, Any]:
    """`read` reads the board; it is None if there is no board of a known task."""
    dialect = DIALECTS["upstream_reward"]
    blocks = _blocks(response)
    actions = _read_actions(blocks[dialect.block], task, dialect)[0] if blocks else []
    success, illegal = False, bool(actions)
    if actions and read is not None:
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


def _score_eval(
    task: str, board: Board, fields: Mapping[str, str], response: str
) -> dict[str, Any]:
    dialect = DIALECTS["upstream_eval"]
    blocks = _blocks(response)
    text = blocks[dialect.block] if blocks else response.strip()
    actions, invalid = _read_actions(text, task, dialect)
    trace = simulate(board, actions, edge_stops=True)
    # It asks where the agent stands at the end, which without a step is the start.
    success = trace.success or (trace.steps == 0 and board.start in board.goals)
    optimal = integer(fields, "path_length") if "path_length" in fields else None
    return {
        "success": success,
        "optimal_success": success and trace.steps == optimal,
        "parse_success": bool(actions) and not invalid,
        "steps_executed": trace.steps,
        "invalid_reason": trace.reason,
        "actions": actions,
    }
