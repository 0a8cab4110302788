"""Measures over rows: rates with intervals, balanced means, paired comparisons of success.

A measure is {"value", "low", "high", "n"}: a mean with its 95 % interval over n boards, values None
where n is 0; a difference also has its "p_value". A board that was answered several times counts
once, with the mean of its answers; so do boards of equal content, which are no further evidence.
"""

import collections
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import stats
from mgsd_jax.evaluation.rules import score_text

Row = Mapping[str, Any]
Measure = dict[str, Any]  # value, low, high: float | None; n: int
Board = tuple[str, int, int]  # task, level, index: what pairs the rows of two models
# A getter returns None for a row that it does not apply to.
Getter = Callable[[Row], float | bool | None]
# The measures of each rule set, and the key of its scores that each one is the mean of.
_RULE_KEYS: dict[str, dict[str, str]] = {
    "standard": {"success": "success", "optimal": "optimal", "parsed": "parsed"},
    "upstream_reward": {"success": "success", "parsed": "parse_success"},
    "upstream_eval": {
        "success": "success",
        "optimal": "optimal_success",
        "parsed": "parse_success",
    },
}


def board_of(row: Row) -> Board:
    """Return what names the board of a row, the same for every model and mode."""
    return row["task"], row["level"], row["index"]


def by_task(rows: Sequence[Row]) -> list[tuple[str, list[Row]]]:
    """The rows of each task that has some, in the order of ENVS."""
    parts = {task: [row for row in rows if row["task"] == task] for task in ENVS}
    return [(task, part) for task, part in parts.items() if part]


def by_level(rows: Sequence[Row]) -> list[tuple[int, list[Row]]]:
    """The rows of each level that has some, lowest first."""
    levels = sorted({row["level"] for row in rows})
    return [(level, [row for row in rows if row["level"] == level]) for level in levels]


def by_board(rows: Sequence[Row]) -> dict[Board, list[Row]]:
    """The rows of each board, in the order in which the boards first appear.

    Boards of equal content (`same_as` of a row, see rows.py) are one board.
    """
    boards: dict[Board, list[Row]] = collections.defaultdict(list)
    for row in rows:
        boards[row["task"], row["level"], row.get("same_as", row["index"])].append(row)
    return boards


def rate(rows: Sequence[Row], get: Getter) -> Measure:
    """The plain mean over boards with a Wilson interval."""
    values = board_values(rows, get)
    if not values:
        return measure(None)
    low, high = stats.wilson(sum(values), len(values))
    return {"value": statistics.fmean(values), "low": low, "high": high, "n": len(values)}


def balanced(rows: Sequence[Row], get: Getter) -> Measure:
    """The mean over tasks of the mean over levels, with the interval of `stats.macro_mean`."""
    strata = {
        task: {level: board_values(some, get) for level, some in by_level(part)}
        for task, part in by_task(rows)
    }
    return balanced_values(strata)


def balanced_values(strata: Mapping[str, Mapping[int, list[float]]]) -> Measure:
    """As `balanced`, of values by task and level; what has none is left out."""
    kept = {
        task: {level: values for level, values in levels.items() if values}
        for task, levels in strata.items()
        if any(levels.values())
    }
    return measure(stats.macro_mean(kept)) if kept else measure(None)


def board_values(rows: Sequence[Row], get: Getter) -> list[float]:
    """One value a board: the mean over its answers that the getter applies to."""
    found = (
        [float(value) for value in map(get, answers) if value is not None]
        for answers in by_board(rows).values()
    )
    return [statistics.fmean(values) for values in found if values]


def measure(estimate: stats.Estimate | stats.Difference | None) -> Measure:
    """An estimate as JSON: what is not defined is None, not NaN."""
    if estimate is None:
        return {"value": None, "low": None, "high": None, "n": 0}
    keys = ("value", "low", "high", "p_value")
    values = {key: getattr(estimate, key) for key in keys if hasattr(estimate, key)}
    return {k: None if math.isnan(v) else v for k, v in values.items()} | {"n": estimate.n}


def difference(rows: Sequence[Row] | None, others: Sequence[Row] | None) -> Measure | None:
    """Balanced success of `rows` minus that of `others`, on the boards that both were asked."""
    if rows is None or others is None:
        return None
    mine, theirs = paired(rows, others)
    return measure(stats.paired_difference(mine, theirs) if mine else None)


def gap_closed(groups: Mapping[str, Mapping[str, Sequence[Row]]], name: str) -> Measure | None:
    """(model - base) / (text - base), of base from text, base and model from the picture.

    `groups` holds rows by model and mode. None where one of the three was not asked.
    """
    if "base" not in groups or not {"text", "picture"} <= groups["base"].keys():
        return None
    if "picture" not in groups[name]:
        return None
    sides = (groups["base"]["picture"], groups["base"]["text"], groups[name]["picture"])
    base, text, model = paired(*sides)
    return measure(stats.gap_closed(base, text, model) if base else None)


def paired(*sides: Sequence[Row]) -> list[dict[str, dict[int, list[float]]]]:
    """Success by task and level of each side, on the boards that all share, in one order."""
    tables = [
        {
            board: statistics.fmean(row["outcome"]["success"] for row in answers)
            for board, answers in by_board(rows).items()
        }
        for rows in sides
    ]
    shared = sorted(set.intersection(*(set(table) for table in tables)))
    strata_of_sides = []
    for table in tables:
        strata: dict[str, dict[int, list[float]]] = {}
        for task, level, index in shared:
            values = strata.setdefault(task, {}).setdefault(level, [])
            values.append(table[task, level, index])
        strata_of_sides.append(strata)
    return strata_of_sides


def pass_at_k(rows: Sequence[Row]) -> dict[str, Measure]:
    """Balanced pass@k for k = 1, 2, 4, ... and the number of tries; {} for one try a board."""
    tries = min(len(answers) for answers in by_board(rows).values())
    if tries < 2:
        return {}
    numbers = sorted({1 << i for i in range(tries.bit_length()) if 1 << i <= tries} | {tries})
    return {
        str(k): balanced_values(
            {
                task: {
                    level: [_pass(answers, k) for answers in by_board(some).values()]
                    for level, some in by_level(part)
                }
                for task, part in by_task(rows)
            }
        )
        for k in numbers
    }


def _pass(answers: Sequence[Row], k: int) -> float:
    right = sum(row["outcome"]["success"] for row in answers)
    return stats.pass_at_k(len(answers), right, k)


def rule_sets(rows: Sequence[Row]) -> dict[str, Any]:
    """Success under our rules and under the two public ones, with what they say otherwise.

    `macro_upstream` is what the public evaluator calls its macro average; `otherwise` counts the
    answers that succeed under these rules or ours, and not under both.
    """
    found = {}
    for rules, keys in _RULE_KEYS.items():
        scores = {
            id(row): row["outcome"]
            if rules == "standard"
            else score_text(rules, row["task"], row["task_text"], row["response"])
            for row in rows
        }
        measured: dict[str, Any] = {
            name: balanced(rows, lambda row, key=key, scores=scores: scores[id(row)][key])
            for name, key in keys.items()
        }
        parts = [
            (task, [float(scores[id(row)]["success"]) for row in part])
            for task, part in by_task(rows)
        ]
        measured["macro_upstream"] = statistics.fmean(statistics.fmean(v) for _, v in parts)
        measured["tasks"] = {task: statistics.fmean(values) for task, values in parts}
        measured["otherwise"] = sum(
            bool(scores[id(row)]["success"]) != bool(row["outcome"]["success"]) for row in rows
        )
        found[rules] = measured
    return found


def gap_by_task(
    text: Sequence[Row] | None, picture: Sequence[Row] | None
) -> dict[str, Measure | None]:
    """Text minus picture of each task that was asked in both ways."""
    if text is None or picture is None:
        return {}
    read, seen = dict(by_task(text)), dict(by_task(picture))
    return {task: difference(read[task], seen[task]) for task in read if task in seen}
