"""The action parser, and the three rule sets that score a response on a board.

'standard' is ours and the only one that training, validation and evaluation use: parse the last
answer block, then `play` of the env. 'upstream_reward' and 'upstream_eval' reproduce the two
scorers of the public MGSD release (its training reward and its checkpoint evaluator), which
disagree with each other, so that published numbers can be compared. All three read actions with
`_read_actions`; what differs between them is the data of a `Dialect`.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any, Literal, get_args

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import Outcome, Plan
from mgsd_jax.envs.upstream import integer, read_board, read_fields, simulate

Rules = Literal["standard", "upstream_reward", "upstream_eval"]

_HANDS = frozenset({"pick", "drop"})
_LETTERS = {"L": "left", "R": "right", "U": "up", "D": "down"}
_DIGITS = {"0": "left", "1": "down", "2": "right", "3": "up"}  # gymnasium's order
_ARROWS = {"←": "left", "↓": "down", "→": "right", "↑": "up"}
_WORDS = {word.upper(): word for word in _LETTERS.values()}
_WARDS = {word + ending: move for word, move in _WORDS.items() for ending in ("WARD", "WARDS")}
_PICKS = dict.fromkeys(("PICK", "PICKUP", "PICK_UP", "PICK-UP", "PICK UP", "GRAB"), "pick")
_DROPS = dict.fromkeys(
    ("DROP", "PUT", "PLACE", "PUTDOWN", "PUT_DOWN", "PUT-DOWN", "PUT DOWN"), "drop"
)
_ALIASES = {**_LETTERS, **_DIGITS, **_ARROWS, **_WORDS, **_WARDS, **_PICKS, **_DROPS}


@dataclasses.dataclass(frozen=True)
class Dialect:
    """How one rule set reads a response.

    `words` finds what may be an action; text between its matches is skipped. A text that is all
    `compact` once what `squeeze` matches is gone is one action a character, except on the tasks
    `without_compact`.
    """

    block: re.Pattern[str]  # group 1: the text of a block
    which: Literal["first", "last"]
    words: re.Pattern[str]
    aliases: Mapping[str, str]  # upper-case word -> action
    compact: re.Pattern[str]
    squeeze: re.Pattern[str]
    without_compact: frozenset[str]
    compact_words: bool  # a word that is all `compact` is one action a character


# The tempered dot keeps a block from starting at a tag that is only talked about before it.
_INNER_BLOCK = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.I | re.S)
_OUTER_BLOCK = re.compile(r"<answer>(.*?)</answer>", re.I | re.S)
_SEPARATORS = r"\s,;|/.>\-_+()\[\]{}'\"`‘’“”"

DIALECTS: dict[Rules, Dialect] = {
    "standard": Dialect(
        block=_INNER_BLOCK,
        which="last",
        # The last alternative is what no rule knows: it is found so that it can be refused.
        words=re.compile(
            r"(?:(?i:PICK)(?:[_-]|[ \t]+)(?i:UP)|(?i:PUT)(?:[_-]|[ \t]+)(?i:DOWN))(?![A-Za-z])"
            rf"|[A-Za-z]+|[0-9]|[←↓→↑]|[^{_SEPARATORS}A-Za-z0-9←↓→↑]+"
        ),
        aliases=_ALIASES,
        compact=re.compile(r"[LRUD]+"),
        squeeze=re.compile(r"\s+"),
        without_compact=frozenset(ENVS),
        compact_words=True,
    ),
    "upstream_reward": Dialect(
        block=_OUTER_BLOCK,
        which="first",
        # PUT and -WARD are not words here.
        words=re.compile(
            r"\b(?:PICK[_-]?UP|PUT[_-]?DOWN|PICK|DROP|GRAB|LEFT|RIGHT|UP|DOWN|[LRUD0-3])\b|[←↓→↑]",
            re.I,
        ),
        aliases=_ALIASES,
        compact=re.compile(r"[LRUD0123←↓→↑]+"),
        squeeze=re.compile(r"\s+"),
        without_compact=frozenset(),
        compact_words=False,
    ),
    "upstream_eval": Dialect(
        block=_OUTER_BLOCK,
        which="last",
        # PICK_UP, PUT and arrows are not words here, so PUT-DOWN is a move down.
        words=re.compile(
            r"\b(?:PICK-UP|PICKUP|PICK|DROP|PLACE|GRAB|(?:LEFT|RIGHT|UP|DOWN)(?:WARDS?)?"
            r"|[LRUD0-5])\b",
            re.I,
        ),
        aliases={**_ALIASES, "4": "pick", "5": "drop"},
        compact=re.compile(r"[LRUD0123]+"),
        squeeze=re.compile(r"[\s,;|/>\-]+"),
        without_compact=frozenset({"minibehaviour"}),
        compact_words=False,
    ),
}


@dataclasses.dataclass(frozen=True)
class ParsedPlan:
    """The plan of a response, or why it has none (`plan` is then empty)."""

    plan: Plan
    parsed: bool
    reason: Literal["no_answer", "invalid_token"] | None
    invalid_token: str | None


def _plan_text(response: str, dialect: Dialect, *, bare: bool) -> str | None:
    """The text that should hold the plan; without a block the response if `bare`, else None."""
    blocks = dialect.block.findall(response)
    if blocks:
        return blocks[0 if dialect.which == "first" else -1].strip()
    return response.strip() if bare else None


def _read_actions(text: str, task: str, dialect: Dialect) -> tuple[list[str], list[str]]:
    """The actions of a plan text in order, and the words of it that are no action of this task."""
    squeezed = dialect.squeeze.sub("", text).upper()
    if task not in dialect.without_compact and dialect.compact.fullmatch(squeezed):
        return [dialect.aliases[character] for character in squeezed], []
    actions: list[str] = []
    invalid: list[str] = []
    for match in dialect.words.finditer(text):
        word = " ".join(match[0].upper().split())
        if word in dialect.aliases:
            action = dialect.aliases[word]
            if action in _HANDS and task != "minibehaviour":
                invalid.append(match[0])
            else:
                actions.append(action)
        elif dialect.compact_words and dialect.compact.fullmatch(word):
            actions.extend(dialect.aliases[character] for character in word)
        else:
            invalid.append(match[0])
    return actions, invalid


def answer_block(response: str) -> str | None:
    """The text of the last complete `<answer>...</answer>` block, stripped; None without one.

    A block starts at the last opening tag before its closing tag.
    """
    return _plan_text(response, DIALECTS["standard"], bare=False)


def parse_plan(response: str, task: str, *, lenient: bool = False) -> ParsedPlan:
    """The plan that a response states, by the standard rules.

    `lenient` reads the whole response where there is no block, for models that were never told of
    the tag. Raises ValueError for an unknown task only: no text is an error.

    >>> parse_plan('so <answer>U, up-RR</answer>', 'maze').plan
    ('up', 'up', 'right', 'right')
    """
    _check_task(task)
    dialect = DIALECTS["standard"]
    text = _plan_text(response, dialect, bare=lenient)
    if text is None:
        return ParsedPlan((), False, "no_answer", None)
    actions, invalid = _read_actions(text, task, dialect)
    if invalid:
        return ParsedPlan((), False, "invalid_token", invalid[0])
    return ParsedPlan(tuple(actions), True, None, None)


def judge(state: Any, task: str, response: str, *, lenient: bool = False) -> Outcome:
    """The outcome of a response on a board by the standard rules; see `parse_plan` and `play`."""
    parsed = parse_plan(response, task, lenient=lenient)
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

    'standard' returns the fields of `Outcome`; the public two return the keys of the public
    scorers. `task` may be in any case; None or '' takes the task of the text. Raises ValueError,
    naming the key, for a board that the rule set cannot play.
    """
    if rules not in get_args(Rules):
        raise ValueError(f"rules: got {rules!r}, want one of {get_args(Rules)}")
    fields, rows = read_fields(task_text)
    name = (task or fields.get("task") or "").lower()
    name = "minibehaviour" if name == "minibehavior" else name
    if rules == "upstream_reward":
        return _score_reward(name, fields, rows, response)
    _check_task(name)
    if rules == "upstream_eval":
        return _score_eval(name, fields, rows, response)
    state = ENVS[name].from_text(task_text, source="task_text")
    return dataclasses.asdict(judge(state, name, response))


def _score_reward(
    task: str, fields: Mapping[str, str], rows: tuple[str, ...] | None, response: str
) -> dict[str, Any]:
    dialect = DIALECTS["upstream_reward"]
    text = _plan_text(response, dialect, bare=False)
    actions = [] if text is None else _read_actions(text, task, dialect)[0]
    success, illegal = False, False
    if actions and (task not in ENVS or (task == "frozenlake" and not rows)):
        illegal = True
    elif actions:
        trace = simulate(read_board(task, fields, rows, as_record=False), actions, edge_stops=False)
        success = trace.success
        illegal = trace.reason not in (None, "fell_into_hole")
    return {
        "overall": float(success),
        "accuracy": float(success),
        "success": float(success),
        "format": float(text is not None),
        "parse_success": float(bool(actions)),
        "illegal_action": float(illegal),
    }


def _score_eval(
    task: str, fields: Mapping[str, str], rows: tuple[str, ...] | None, response: str
) -> dict[str, Any]:
    dialect = DIALECTS["upstream_eval"]
    text = _plan_text(response, dialect, bare=True)
    assert text is not None
    actions, invalid = _read_actions(text, task, dialect)
    board = read_board(task, fields, rows, as_record=True)
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
