"""What a report is made of: the rows and summary of an evaluation, the curves of the stages."""

import collections
import dataclasses
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import cast

from etils import epath

from mgsd_jax.checks import fields
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.rows import ROWS_FILE, Row, read_rows
from mgsd_jax.evaluation.summary import Part, Summary, check_rows
from mgsd_jax.workdir import metrics

SUMMARY_FILE = "summary.json"
_SUMMARY_KEYS = ("models", "diagnostics", "modality_gap", "differences", "gap_closed_by")
STAGES = ("grounding", "distillation")
PathLike = str | os.PathLike[str]


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """The rows and the summary of one evaluation folder, checked against each other."""

    rows: tuple[Row, ...]
    summary: Summary


@dataclasses.dataclass(frozen=True)
class Curve:
    """One metric over the steps of a stage; values that are not finite are only counted."""

    name: str
    steps: tuple[int, ...]
    values: tuple[float, ...]
    not_finite: int


@dataclasses.dataclass(frozen=True)
class Stage:
    """The curves of a stage, or why there are none."""

    name: str
    curves: tuple[Curve, ...]
    missing: str | None


def parts(summary: Summary, *modes: str) -> Iterator[tuple[str, str, Part]]:
    """Yield (model, mode, measures) of each model in these modes, by default in all that plan."""
    for model, by_mode in summary["models"].items():
        for mode in modes or ("picture", "text", "blind"):
            if mode in by_mode:
                yield model, mode, by_mode[mode]


def tasks(summary: Summary, *modes: str) -> list[str]:
    """Return the tasks that some model was asked about in these modes, as `parts` has them."""
    found = {task for *_, part in parts(summary, *modes) for task in part["tasks"]}
    return [task for task in ENVS if task in found]


def read_evaluation(folder: PathLike) -> Evaluation:
    """Return the rows and the summary of an evaluation folder.

    Raises ValueError naming the file where one is absent, empty or not JSON, or where the two
    differ in their models, modes or numbers of rows.
    """
    rows_path, summary_path = epath.Path(folder) / ROWS_FILE, epath.Path(folder) / SUMMARY_FILE
    _check_file(rows_path)
    rows = tuple(read_rows(folder))
    check_rows(rows, source=str(rows_path))
    _check_file(summary_path)
    summary = fields.read_json(summary_path)
    missing = [key for key in _SUMMARY_KEYS if key not in summary]
    if missing:
        raise ValueError(f"{summary_path}: got keys {sorted(summary)}, want {missing} as well")
    for key in _SUMMARY_KEYS:
        fields.field(summary, key, dict, summary_path)
    for row in rows:
        if row["model"] not in summary["models"]:
            raise ValueError(
                f"{rows_path}: got model {row['model']!r} (row {row['id']}), want one of "
                f"{sorted(summary['models'])}, the models of {summary_path}"
            )
    counts = dict(collections.Counter((row["model"], row["mode"]) for row in rows))
    stated = {
        (model, mode): part["n"]
        for model, by_mode in summary["models"].items()
        for mode, part in by_mode.items()
    }
    if stated != counts:
        raise ValueError(
            f"{summary_path}: got rows by model and mode {stated}, want {counts} as in {rows_path}"
        )
    return Evaluation(rows, cast(Summary, summary))


def count_tokens(rows: Sequence[Row]) -> int | None:
    """Return how many tokens the models said; None where none of them counted."""
    said = (row.get("response_tokens") for row in rows)
    return sum(count for count in said if isinstance(count, int)) or None


def read_stage(name: str, folder: PathLike | None) -> Stage:
    """Return the curves in the `metrics.jsonl` of a stage, or the reason why there are none.

    Raises ValueError naming file and line where a line is not a record of metrics.
    """
    if folder is None:
        return Stage(name, (), f"no {name} run was given to this report")
    path = epath.Path(folder) / metrics.METRICS_FILE
    if not path.is_file():
        return Stage(name, (), f"{path.parent.name}/{path.name} of the {name} run was not found")
    points: dict[str, dict[int, float]] = {}
    for record in metrics.read_metrics(path):
        for key, value in record.items():
            if key not in ("step", "time") and isinstance(value, int | float):
                points.setdefault(key, {})[record["step"]] = float(value)
    if not points:
        return Stage(name, (), f"{path.parent.name}/{path.name} of the {name} run holds no values")
    return Stage(name, tuple(_curve(key, points[key]) for key in sorted(points)), None)


def _curve(name: str, points: Mapping[int, float]) -> Curve:
    finite = sorted((step, value) for step, value in points.items() if math.isfinite(value))
    steps, values = zip(*finite, strict=True) if finite else ((), ())
    return Curve(name, steps, values, len(points) - len(finite))


def _check_file(path: epath.Path) -> None:
    if not path.is_file():
        raise ValueError(
            f"{path}: not found, want an evaluation folder with {ROWS_FILE} and {SUMMARY_FILE}; "
            "run --stage=evaluate to its end"
        )
