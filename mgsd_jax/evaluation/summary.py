"""The summary of an evaluation: rates, intervals, diagnostics and errors, computed from its rows.

`macro` and every other measure of a model and mode is level-balanced: the mean over tasks of the
mean over levels. A measure of one task or level is the plain rate over its boards. `n`,
`errors` and `reasons` of a part count its answers. The summary is JSON: levels are strings, and no
value is NaN.
"""

import collections
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TypedDict

from mgsd_jax.checks import fields
from mgsd_jax.checks.fields import Json
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.measures import (
    Getter,
    Measure,
    R,
    balanced,
    by_level,
    by_task,
    difference,
    gap_by_task,
    gap_closed,
    group,
    pass_at_k,
    rate,
    rule_sets,
    succeeds,
    task_means,
)
from mgsd_jax.evaluation.rows import (
    BoardKey,
    Key,
    PerceptionRow,
    PlanRow,
    Row,
    board_of,
    is_perception,
    key_of,
    plans,
)

MODELS = ("base", "grounded", "distilled")  # listed first, in this order
MODES = ("picture", "text", "blind", "perception")
# Every row of a planning mode counts under exactly one of these, the first that holds.
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

Part = Json  # the measures of one model in one mode, of a task or of a level


class Summary(TypedDict):
    """The content of `summary.json`. Differences are paired: they compare the same boards."""

    n: int  # rows
    models: dict[str, dict[str, Part]]  # by model and mode
    diagnostics: dict[str, dict[str, Measure | None]]  # by model; see `_diagnostics`
    modality_gap: dict[str, Measure | None]  # by model: text - picture
    modality_gap_by_task: dict[str, dict[str, Measure | None]]
    differences: dict[str, Measure | None]  # {"a - b": ...}, with pictures
    gap_closed: Measure | None  # of the distilled model
    gap_closed_by: dict[str, Measure | None]  # by model


def summarize(rows: Sequence[Row], *, source: str = "rows") -> Summary:
    """All measures of the rows of an evaluation.

    Raises ValueError, naming `source`, if there are no rows or they contradict each other.
    """
    check_rows(rows, source=source)
    planned: dict[str, dict[str, list[PlanRow]]] = {}  # by model and mode
    models: dict[str, dict[str, Part]] = {}
    asked = group(rows, lambda row: row["model"])
    for name in sort_models(asked):
        found = {mode: plans(asked[name], mode) for mode in MODES}
        planned[name] = {mode: some for mode, some in found.items() if some}
        models[name] = {mode: _planning(some) for mode, some in planned[name].items()}
        answers = [row for row in asked[name] if is_perception(row)]
        if answers:
            models[name]["perception"] = _perception(answers)
    names = list(models)
    pictures, texts = ({n: planned[n].get(mode) for n in names} for mode in ("picture", "text"))
    closed = {n: gap_closed(planned.get("base", {}), planned[n]) for n in names if n != "base"}
    return {
        "n": len(rows),
        "models": models,
        "diagnostics": {name: _diagnostics(modes) for name, modes in models.items()},
        "modality_gap": {name: difference(texts[name], pictures[name]) for name in names},
        "modality_gap_by_task": {name: gap_by_task(texts[name], pictures[name]) for name in names},
        "differences": {
            f"{later} - {earlier}": difference(pictures[later], pictures[earlier])
            for i, later in enumerate(names)
            for earlier in names[:i]
        },
        "gap_closed": closed.get("distilled"),
        "gap_closed_by": closed,
    }


def sort_models(names: Iterable[str]) -> tuple[str, ...]:
    """The names of MODELS in their order, then the others by name."""
    ranks = {name: rank for rank, name in enumerate(MODELS)}
    return tuple(sorted(names, key=lambda name: (ranks.get(name, len(MODELS)), name)))


def error_of(row: PlanRow) -> str:
    """The one of ERRORS that a row counts under.

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
    """Raises ValueError, naming `source` and the row, unless `rows` are those of one evaluation.

    Wanted: at least one row, every key of its mode, a known task and mode, one row for each model,
    mode, board and attempt, and one text for each board.
    """
    if not rows:
        raise ValueError(f"{source}: got no rows, want one for each answered prompt")
    seen: set[Key] = set()
    texts: dict[BoardKey, str] = {}
    for number, row in enumerate(rows, start=1):
        where = f"{source}, row {number}"
        fields.check_record(row, Row, where)
        where += f" ({row['id']})"
        if row["mode"] not in MODES:
            raise ValueError(f"{where}: got mode {row['mode']!r}, want one of {MODES}")
        if row["task"] not in ENVS:
            raise ValueError(f"{where}: got task {row['task']!r}, want one of {tuple(ENVS)}")
        fields.check_record(row, PerceptionRow if is_perception(row) else PlanRow, where)
        key, board = key_of(row), board_of(row)
        if key in seen:
            raise ValueError(
                f"{where}: got {board} of {row['model']} {row['mode']} twice, want it once"
            )
        seen.add(key)
        if texts.setdefault(board, row["task_text"]) != row["task_text"]:
            raise ValueError(f"{where}: got two boards named {board}, want one text for each name")


# Measures of one model in one mode.

_RATES: dict[str, Getter[PlanRow]] = {
    "success": succeeds,
    "optimal": lambda row: row["outcome"]["optimal"],
    "parsed": lambda row: row["outcome"]["parsed"],
    "legal": lambda row: row["outcome"]["legal"],
    "progress": lambda row: row["outcome"]["progress"],
    "truncated": lambda row: row["truncated"],
    "state_f1": lambda row: row["state_f1"],
    "state_exact": lambda row: row["state_exact"],
    # Older rows do not say.
    "contradicted": lambda row: bool(row["contradicted"]) if "contradicted" in row else None,
    "plan_given_own_state": lambda row: row.get("plan_given_own_state"),
}


def _planning(rows: Sequence[PlanRow]) -> Part:
    measures = {name: balanced(rows, get) for name, get in _RATES.items()}
    return {
        "n": len(rows),
        "macro": measures.pop("success"),
        "macro_upstream": statistics.fmean(task_means(rows, succeeds).values()),
        **measures,
        **_counts(rows),
        "pass_at_k": pass_at_k(rows),
        "rules": rule_sets(rows),
        "tasks": {
            task: _planning_counts(part)
            | {"level_mean": balanced(part, succeeds), "state_f1_by_kind": _by_kind(part)}
            | _levels(part, _planning_counts)
            for task, part in by_task(rows)
        },
    }


def _by_kind(rows: Sequence[PlanRow]) -> dict[str, Measure]:
    """State F1 by kind of fact, over the boards that have or are said to have such facts."""
    found = {id(row): row.get("state_f1_by_kind") or {} for row in rows}  # not in older rows
    return {
        kind: rate(rows, lambda row, kind=kind: found[id(row)].get(kind))
        for kind in sorted({kind for some in found.values() for kind in some})
    }


def _levels(rows: Sequence[R], measure: Callable[[Sequence[R]], Part]) -> Part:
    return {"levels": {str(level): measure(some) for level, some in by_level(rows)}}


def _planning_counts(rows: Sequence[PlanRow]) -> Part:
    rates = {name: rate(rows, get) for name, get in _RATES.items()}
    return {"n": len(rows), **rates, **_counts(rows)}


def _counts(rows: Sequence[PlanRow]) -> Part:
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


def _perception(rows: Sequence[PerceptionRow]) -> Part:
    return {
        "n": len(rows),
        "macro": balanced(rows, _share_right),
        "all_right": balanced(rows, _all_right),
        "strict": balanced(rows, _share_strict),
        "tasks": {
            task: _questions(part) | _levels(part, _questions) for task, part in by_task(rows)
        },
    }


def _questions(rows: Sequence[PerceptionRow]) -> Part:
    names = dict.fromkeys(name for row in rows for name in row["perception"])
    return {
        "n": len(rows),
        "all_right": rate(rows, _all_right),
        "strict": rate(rows, _share_strict),
        "questions": {
            name: rate(rows, lambda row, name=name: row["perception"].get(name)) for name in names
        },
    }


def _share_right(row: PerceptionRow) -> float | None:
    return _share(row["perception"])


def _share_strict(row: PerceptionRow) -> float | None:
    """The share of answers in exactly the asked form; None in older rows."""
    return _share(row.get("perception_strict", {}))


def _share(answers: Mapping[str, bool]) -> float | None:
    return sum(answers.values()) / len(answers) if answers else None


def _all_right(row: PerceptionRow) -> bool:
    return all(row["perception"].values())


def _diagnostics(modes: Mapping[str, Part]) -> dict[str, Measure | None]:
    """How well the state was read, and plans on the true state and from the picture alone."""
    picture, text = modes.get("picture", {}), modes.get("text", {})
    return {
        "state_f1": picture.get("state_f1"),
        "state_exact": picture.get("state_exact"),
        "contradicted": picture.get("contradicted"),
        "plan_on_gt": text.get("macro"),
        "e2e": picture.get("macro"),
        "plan_given_own_state": picture.get("plan_given_own_state"),
    }
