"""Measures over rows: rates with intervals, balanced means, paired comparisons of success.

A board that was answered several times counts once, with the mean of its answers. So do boards of
equal content: they are no further evidence. Intervals are at 95 %.
"""

import math
import statistics
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NotRequired, TypedDict, TypeVar

from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import stats
from mgsd_jax.evaluation.rows import BoardKey, PlanRow, Row, board_of
from mgsd_jax.evaluation.rules import scorer
from mgsd_jax.evaluation.upstream import TASKS as PUBLIC_TASKS

R = TypeVar("R", bound=Row)
K = TypeVar("K", bound=Hashable)
Strata = dict[str, dict[int, list[float]]]  # {task: {level: a value for each board}}
# A getter returns None for a row that it does not apply to.
Getter = Callable[[R], float | bool | None]
# For each rule set, the key of its scores that each measure is the mean of.
_RULE_KEYS: dict[str, dict[str, str]] = {
    "standard": {"success": "success", "optimal": "optimal", "parsed": "parsed"},
    "upstream_reward": {"success": "success", "parsed": "parse_success"},
    "upstream_eval": {
        "success": "success",
        "optimal": "optimal_success",
        "parsed": "parse_success",
    },
}


class Measure(TypedDict):
    """A mean, or a difference of means, with its interval over n boards."""

    value: Any  # float, or None if it is not defined; so are the limits
    low: Any
    high: Any
    p_value: NotRequired[Any]  # of a difference that is defined
    n: int


class RuleSet(TypedDict):
    """What a rule set says of the answers."""

    success: Measure
    parsed: Measure
    optimal: NotRequired[Measure]
    macro_upstream: float  # what the public evaluator calls its macro average
    tasks: dict[str, float]
    otherwise: int  # answers that succeed under these rules or ours, and not under both


def group(rows: Iterable[R], key: Callable[[R], K]) -> dict[K, list[R]]:
    """The rows of each key, in the order in which the keys first appear."""
    groups: dict[K, list[R]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups


def by_task(rows: Sequence[R]) -> list[tuple[str, list[R]]]:
    """The rows of each task that has some, in the order of ENVS."""
    groups = group(rows, lambda row: row["task"])
    return [(task, groups[task]) for task in ENVS if task in groups]


def by_level(rows: Sequence[R]) -> list[tuple[int, list[R]]]:
    """The rows of each level that has some, lowest first."""
    return sorted(group(rows, lambda row: row["level"]).items())


def by_board(rows: Sequence[R]) -> dict[BoardKey, list[R]]:
    """The rows of each board; boards with the same content (`same_as`) are one board."""

    def shared_key(row: Row) -> BoardKey:
        return row["task"], row["level"], row.get("same_as", row["index"])

    return group(rows, shared_key)


def strata(rows: Sequence[R], values: Callable[[list[R]], list[float]]) -> Strata:
    """What `values` makes of the rows of each task and level."""
    return {
        task: {level: values(some) for level, some in by_level(part)}
        for task, part in by_task(rows)
    }


def rate(rows: Sequence[R], get: Getter[R]) -> Measure:
    """The plain mean over boards, with the interval of `balanced` for one level."""
    return balanced_values({"": {0: board_values(rows, get)}})


def balanced(rows: Sequence[R], get: Getter[R]) -> Measure:
    """The mean over tasks of the mean over levels, with the interval of `stats.macro_mean`."""
    return balanced_values(strata(rows, lambda some: board_values(some, get)))


def balanced_values(values: Strata) -> Measure:
    """As `balanced`, for values by task and level; a task or level without any is left out."""
    kept = {
        task: {level: some for level, some in levels.items() if some}
        for task, levels in values.items()
        if any(levels.values())
    }
    return measure(stats.macro_mean(kept) if kept else None)


def board_values(rows: Sequence[R], get: Getter[R]) -> list[float]:
    """One value for each board: the mean over its answers that the getter applies to."""
    found = (
        [float(value) for value in map(get, answers) if value is not None]
        for answers in by_board(rows).values()
    )
    return [statistics.fmean(values) for values in found if values]


def measure(estimate: stats.Estimate | stats.Difference | None) -> Measure:
    """An estimate as JSON, where None stands for NaN."""
    if estimate is None:
        return {"value": None, "low": None, "high": None, "n": 0}
    numbers = estimate._asdict()
    n = numbers.pop("n")
    return Measure(**{k: None if math.isnan(v) else v for k, v in numbers.items()}, n=n)


def succeeds(row: PlanRow) -> bool:
    return row["outcome"]["success"]


def success_rate(rows: Sequence[PlanRow]) -> float:
    """The share of answers that succeed."""
    return statistics.fmean(map(succeeds, rows))


def difference(rows: Sequence[PlanRow] | None, others: Sequence[PlanRow] | None) -> Measure | None:
    """Balanced success of `rows` minus that of `others`, on the boards that both were asked."""
    if rows is None or others is None:
        return None
    mine, theirs = paired(rows, others)
    return measure(stats.paired_difference(mine, theirs) if mine else None)


def gap_by_task(
    text: Sequence[PlanRow] | None, picture: Sequence[PlanRow] | None
) -> dict[str, Measure | None]:
    """Success with text minus success with pictures, for each task that was asked in both modes."""
    read, seen = dict(by_task(text or ())), dict(by_task(picture or ()))
    return {task: difference(read[task], seen[task]) for task in read if task in seen}


def gap_closed(
    base: Mapping[str, Sequence[PlanRow]], model: Mapping[str, Sequence[PlanRow]]
) -> Measure | None:
    """(model - base) / (text - base): base with text; base and model with pictures.

    The arguments hold the rows of a model by mode. None if one of the three was not asked.
    """
    picture, text, ours = base.get("picture"), base.get("text"), model.get("picture")
    if picture is None or text is None or ours is None:
        return None
    before, ceiling, after = paired(picture, text, ours)
    return measure(stats.gap_closed(before, ceiling, after) if before else None)


def paired(*sides: Sequence[PlanRow]) -> list[Strata]:
    """Success by task and level of each side, on the boards that all share, in one order."""
    tables = [
        {board: success_rate(answers) for board, answers in by_board(rows).items()}
        for rows in sides
    ]
    shared = sorted(set.intersection(*map(set, tables)))
    found: list[Strata] = []
    for table in tables:
        values: Strata = {}
        for board in shared:
            task, level, _ = board
            values.setdefault(task, {}).setdefault(level, []).append(table[board])
        found.append(values)
    return found


def pass_at_k(rows: Sequence[PlanRow]) -> dict[str, Measure]:
    """Balanced pass@k for k = 1, 2, 4, ... and the number of tries; {} for one try a board."""
    tries = min(len(answers) for answers in by_board(rows).values())
    if tries < 2:
        return {}

    def passes(some: Sequence[PlanRow], k: int) -> list[float]:
        return [
            stats.pass_at_k(len(answers), sum(map(succeeds, answers)), k)
            for answers in by_board(some).values()
        ]

    numbers = sorted({1 << i for i in range(tries.bit_length())} | {tries})
    return {
        str(k): balanced_values(strata(rows, lambda some, k=k: passes(some, k))) for k in numbers
    }


def rule_sets(rows: Sequence[PlanRow]) -> dict[str, RuleSet]:
    """Success under our rules and under the two public ones, on the tasks that those know.

    Empty where no row is of such a task.
    """
    rows = [row for row in rows if row["task"] in PUBLIC_TASKS]
    if not rows:
        return {}
    return {rules: _rule_set(rows, rules, keys) for rules, keys in _RULE_KEYS.items()}


def task_means(rows: Sequence[PlanRow], get: Callable[[PlanRow], Any]) -> dict[str, float]:
    """{task: mean over its rows}, as the public evaluator counts: levels weigh by their boards."""
    return {task: statistics.fmean(float(get(row)) for row in part) for task, part in by_task(rows)}


def _rule_set(rows: Sequence[PlanRow], rules: str, keys: Mapping[str, str]) -> RuleSet:
    scores: dict[int, Mapping[str, Any]] = {id(row): row["outcome"] for row in rows}
    if rules != "standard":
        for answers in group(rows, board_of).values():
            score = scorer(rules, answers[0]["task"], answers[0]["task_text"])
            scores |= {id(row): score(row["response"]) for row in answers}
    measured = {
        name: balanced(rows, lambda row, key=key: scores[id(row)][key])
        for name, key in keys.items()
    }
    tasks = task_means(rows, lambda row: scores[id(row)]["success"])
    return RuleSet(
        **measured,
        macro_upstream=statistics.fmean(tasks.values()),
        tasks=tasks,
        otherwise=sum(bool(scores[id(row)]["success"]) != succeeds(row) for row in rows),
    )
