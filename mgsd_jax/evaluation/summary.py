"""The summary of an evaluation: rates, intervals, diagnostics and errors out of its rows.

A row is one answered prompt (`check_rows` names its keys); measures are those of measures.py.
`macro` and every measure of a model and mode is level-balanced, the mean over tasks of the mean
over levels; a measure of a task or a level is the plain rate with a Wilson interval. `n` of a part
counts its answers, and so do its `errors` and `reasons`. All of it is JSON: the levels are strings,
nothing is NaN.
"""

import collections
import statistics
from collections.abc import Iterable, Mapping, Sequence
from types import NoneType
from typing import Any

from mgsd_jax.checks.ranges import shown
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.measures import (
    Board,
    Getter,
    Measure,
    Row,
    balanced,
    board_of,
    by_level,
    by_task,
    difference,
    gap_by_task,
    gap_closed,
    pass_at_k,
    rate,
    rule_sets,
)

MODELS = ("base", "grounded", "distilled")  # the order of every listing; others follow
MODES = ("picture", "text", "blind", "perception")
# Every row of a planning mode is counted under exactly one, the first that holds.
ERRORS = (
    "success",
    "not_optimal",
    "request_failed",
    "truncated",
    "unparsed",
    "wrong_state",
    "illegal_plan",
    "not_successful",
)
_ROW_KEYS = ("id", "model", "mode", "task", "level", "index", "task_text", "response")
_PLAN_KINDS: Mapping[str, tuple[type, ...]] = {
    "outcome": (dict,),
    "plan": (list,),
    "truncated": (bool,),
    "response_tokens": (int, NoneType),
    "state_f1": (float, int, NoneType),
    "state_exact": (bool, NoneType),
}
_OUTCOME_KINDS: Mapping[str, tuple[type, ...]] = {
    **dict.fromkeys(("success", "optimal", "parsed", "legal"), (bool,)),
    "reason": (str, NoneType),
    "steps": (int,),
    "progress": (float, int),
}


def summarize(rows: Sequence[Row], *, source: str = "rows") -> dict[str, Any]:
    """Return all summary measures of `rows`, the content of `summary.json`.

    Keys: `models` {model: {mode: measures}}, `diagnostics` {model: ...} (State F1, state exact,
    plan on the true state = text mode, end to end = picture mode, plan given own state),
    `modality_gap` {model: text - picture}, the same by task, `differences` {"a - b": ...} in
    picture mode, `gap_closed` (of the distilled model), `gap_closed_by` {model: ...}. Differences
    are paired: they compare the same boards. Raises ValueError on rows that are empty or contradict
    each other.
    """
    check_rows(rows, source=source)
    groups: dict[str, dict[str, list[Row]]] = {}
    for row in rows:
        groups.setdefault(row["model"], {}).setdefault(row["mode"], []).append(row)
    models = {
        name: {
            mode: (_perception if mode == "perception" else _planning)(groups[name][mode])
            for mode in MODES
            if mode in groups[name]
        }
        for name in sort_models(groups)
    }
    closed = {name: gap_closed(groups, name) for name in models if name != "base"}
    return {
        "n": len(rows),
        "models": models,
        "diagnostics": {name: _diagnostics(modes) for name, modes in models.items()},
        "modality_gap": {
            name: difference(groups[name].get("text"), groups[name].get("picture"))
            for name in models
        },
        "modality_gap_by_task": {
            name: gap_by_task(groups[name].get("text"), groups[name].get("picture"))
            for name in models
        },
        "differences": {
            f"{later} - {earlier}": difference(
                groups[later].get("picture"), groups[earlier].get("picture")
            )
            for i, later in enumerate(models)
            for earlier in list(models)[:i]
        },
        "gap_closed": closed.get("distilled"),
        "gap_closed_by": closed,
    }


def sort_models(names: Iterable[str]) -> tuple[str, ...]:
    """Return the names as base, grounded, distilled, then the others by name."""
    return tuple(sorted(names, key=lambda name: (name not in MODELS, _rank(name), name)))


def error_of(row: Row) -> str:
    """Return the one of ERRORS that a planning row counts under.

    A row whose state was not measured (None) is judged by its plan alone.
    """
    outcome = row["outcome"]
    if outcome["success"]:
        return "success" if outcome["optimal"] else "not_optimal"
    if "error" in row:
        return "request_failed"
    if row["truncated"]:
        return "truncated"
    if not outcome["parsed"]:
        return "unparsed"
    if row["state_exact"] is False:
        return "wrong_state"
    return "not_successful" if outcome["legal"] else "illegal_plan"


def check_rows(rows: Sequence[Row], *, source: str) -> None:
    """Raise ValueError naming `source`, the row, got and want, unless `rows` are of one evaluation.

    Wanted: at least one row, every key of its mode, a known task and mode, one row for each model,
    mode, board and try (`attempt`, 0 where there is none), and one text for each board.
    """
    if not rows:
        raise ValueError(f"{source}: got no rows, want one for each answered prompt")
    seen: set[tuple[str, str, Board, int]] = set()
    texts: dict[Board, str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        _want_keys(row, _ROW_KEYS, where)
        where += f" ({row['id']})"
        if row["mode"] not in MODES:
            raise ValueError(f"{where}: got mode {row['mode']!r}, want one of {MODES}")
        if row["task"] not in ENVS:
            raise ValueError(f"{where}: got task {row['task']!r}, want one of {tuple(ENVS)}")
        if row["mode"] == "perception":
            _want_keys(row, ("perception",), where)
        else:
            _want_kinds(row, _PLAN_KINDS, where)
            _want_kinds(row["outcome"], _OUTCOME_KINDS, f"{where}, outcome")
        board = board_of(row)
        key = (row["model"], row["mode"], board, row.get("attempt", 0))
        if key in seen:
            raise ValueError(
                f"{where}: got {board} of {row['model']} {row['mode']} twice, want it once"
            )
        seen.add(key)
        if texts.setdefault(board, row["task_text"]) != row["task_text"]:
            raise ValueError(f"{where}: got two boards named {board}, want one text for each name")


def _rank(name: str) -> int:
    return MODELS.index(name) if name in MODELS else len(MODELS)


def _want_kinds(
    record: Mapping[str, Any], kinds: Mapping[str, tuple[type, ...]], where: str
) -> None:
    _want_keys(record, kinds, where)
    for key, kind in kinds.items():
        if type(record[key]) not in kind:
            names = " or ".join("null" if one is NoneType else one.__name__ for one in kind)
            raise ValueError(f"{where}, {key}: got {shown(record[key])}, want {names}")


def _want_keys(record: Mapping[str, Any], keys: Iterable[str], where: str) -> None:
    missing = [key for key in keys if key not in record]
    if missing:
        raise ValueError(f"{where}: got keys {sorted(record)}, want {missing} as well")


# Measures of one model in one mode.

_RATES: dict[str, Getter] = {
    "success": lambda row: row["outcome"]["success"],
    "optimal": lambda row: row["outcome"]["optimal"],
    "parsed": lambda row: row["outcome"]["parsed"],
    "legal": lambda row: row["outcome"]["legal"],
    "progress": lambda row: row["outcome"]["progress"],
    "truncated": lambda row: row["truncated"],
    "state_f1": lambda row: row["state_f1"],
    "state_exact": lambda row: row["state_exact"],
    # Rows of an older version do not say.
    "contradicted": lambda row: bool(row["contradicted"]) if "contradicted" in row else None,
    "plan_given_own_state": lambda row: row.get("plan_given_own_state"),
}


def _planning(rows: Sequence[Row]) -> dict[str, Any]:
    measures = {name: balanced(rows, get) for name, get in _RATES.items()}
    macro = measures.pop("success")
    tasks = {
        task: _planning_counts(part)
        | {"level_mean": balanced(part, _RATES["success"])}
        | {"levels": {str(level): _planning_counts(some) for level, some in by_level(part)}}
        for task, part in by_task(rows)
    }
    task_rates = [_success_rate(part) for _, part in by_task(rows)]
    return {
        "n": len(rows),
        "macro": macro,
        "macro_upstream": statistics.fmean(task_rates),
        **measures,
        **_counts(rows),
        "pass_at_k": pass_at_k(rows),
        "rules": rule_sets(rows),
        "tasks": tasks,
    }


def _success_rate(rows: Sequence[Row]) -> float:
    return statistics.fmean(row["outcome"]["success"] for row in rows)


def _planning_counts(rows: Sequence[Row]) -> dict[str, Any]:
    rates = {name: rate(rows, get) for name, get in _RATES.items()}
    return {"n": len(rows), **rates, **_counts(rows)}


def _counts(rows: Sequence[Row]) -> dict[str, Any]:
    # An endpoint need not count its tokens.
    lengths = [row["response_tokens"] for row in rows if row["response_tokens"] is not None]
    errors = collections.Counter(error_of(row) for row in rows)
    reasons = collections.Counter(row["outcome"]["reason"] for row in rows)
    return {
        "response_tokens": {
            "mean": statistics.fmean(lengths) if lengths else None,
            "median": float(statistics.median(lengths)) if lengths else None,
            "max": max(lengths, default=None),
        },
        "errors": {name: errors[name] for name in ERRORS},
        "reasons": dict(sorted(reasons.items())),
    }


def _perception(rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "n": len(rows),
        "macro": balanced(rows, _share_right),
        "all_right": balanced(rows, _all_right),
        "strict": balanced(rows, _share_strict),
        "tasks": {
            task: _questions(part)
            | {"levels": {str(level): _questions(some) for level, some in by_level(part)}}
            for task, part in by_task(rows)
        },
    }


def _questions(rows: Sequence[Row]) -> dict[str, Any]:
    names = dict.fromkeys(name for row in rows for name in row["perception"])
    return {
        "n": len(rows),
        "all_right": rate(rows, _all_right),
        "strict": rate(rows, _share_strict),
        "questions": {
            name: rate(rows, lambda row, name=name: row["perception"].get(name)) for name in names
        },
    }


def _share_right(row: Row) -> float | None:
    return _share(row["perception"])


def _share_strict(row: Row) -> float | None:
    """The share of answers in exactly the asked form; None for rows of an older version."""
    return _share(row.get("perception_strict", {}))


def _share(answers: Mapping[str, bool]) -> float | None:
    return sum(answers.values()) / len(answers) if answers else None


def _all_right(row: Row) -> bool:
    return all(row["perception"].values())


def _diagnostics(modes: Mapping[str, Any]) -> dict[str, Measure | None]:
    picture = modes.get("picture")
    return {
        "state_f1": picture and picture["state_f1"],
        "state_exact": picture and picture["state_exact"],
        "contradicted": picture and picture["contradicted"],
        "plan_on_gt": modes["text"]["macro"] if "text" in modes else None,
        "e2e": picture and picture["macro"],
        "plan_given_own_state": picture and picture["plan_given_own_state"],
    }
