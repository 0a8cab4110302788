"""The three rule sets that score a response on a board.

'standard' is ours and the only one that training, validation and evaluation use: it reads the last
answer block (`Env.read`), then plays the plan (`Env.play`). 'upstream_reward' and
'upstream_eval' reproduce the two scorers of the public MGSD release; see upstream_scores.py.
"""

import dataclasses
from collections.abc import Callable
from typing import Literal, get_args

from mgsd_jax.envs import ENVS, AnyState, facts, find
from mgsd_jax.envs.base import Outcome
from mgsd_jax.envs.responses import answer_span, without_thoughts
from mgsd_jax.envs.search import Plan
from mgsd_jax.evaluation.upstream import read_fields
from mgsd_jax.evaluation.upstream_scores import Score, eval_scorer, reward_scorer

Rules = Literal["standard", "upstream_reward", "upstream_eval"]


@dataclasses.dataclass(frozen=True)
class ParsedPlan:
    """The plan of a response, or why it has none (`plan` is then empty)."""

    plan: Plan
    parsed: bool
    reason: Literal["no_answer", "invalid_token"] | None
    invalid_token: str | None


def parse_plan(response: str, task: str, *, lenient: bool = False) -> ParsedPlan:
    """The plan that a response states, by the standard rules.

    `lenient` reads the whole response where there is no block, for models that were never told of
    the tag. Raises ValueError for an unknown task only: no text is an error.

    >>> parse_plan('so <answer>U, up-RR</answer>', 'maze').plan
    ('up', 'up', 'right', 'right')
    """
    env = find(task)
    span = answer_span(response)
    if span is None and not lenient:
        return ParsedPlan((), False, "no_answer", None)
    text = without_thoughts(response)[slice(*(span or (None,)))]
    plan, invalid = env.read(text)
    return ParsedPlan(plan, invalid is None, None if invalid is None else "invalid_token", invalid)


def judge(state: AnyState, task: str, response: str, *, lenient: bool = False) -> Outcome:
    """The outcome of a response on a board by the standard rules; see `parse_plan` and `play`."""
    return play(state, task, parse_plan(response, task, lenient=lenient))


def play(state: AnyState, task: str, parsed: ParsedPlan) -> Outcome:
    """The outcome of what `parse_plan` made of a response, on a board."""
    if parsed.reason is not None:
        return Outcome(False, False, False, False, parsed.reason, steps=0, progress=0.0)
    return ENVS[task].play(state, parsed.plan)


def score_text(rules: str, task: str | None, task_text: str, response: str) -> Score:
    """The score of a response on the board of a board file, under one of the three rule sets.

    'standard' returns the fields of `Outcome` and of `facts.measure`; the public two return the
    keys of the public scorers. `task` may be in any case; None or '' takes the task of the text.
    Raises ValueError, naming the key, for a board that the rule set cannot play.
    """
    return scorer(rules, task, task_text)(response)


def scorer(rules: str, task: str | None, task_text: str) -> Callable[[str], Score]:
    """`score_text` for many responses on one board, which is read once."""
    if rules not in get_args(Rules):
        raise ValueError(f"rules: got {rules!r}, want one of {get_args(Rules)}")
    fields, rows = read_fields(task_text)
    name = (task or fields.get("task") or "").lower()
    name = "minibehaviour" if name == "minibehavior" else name
    if rules == "upstream_reward":
        return reward_scorer(name, fields, rows)
    if rules == "upstream_eval":
        return eval_scorer(name, fields, rows)
    state = find(name).from_text(task_text, source="task_text")

    def score(response: str) -> Score:
        outcome = dataclasses.asdict(judge(state, name, response))
        return outcome | facts.measure(name, state, facts.read_facts(name, response))

    return score
