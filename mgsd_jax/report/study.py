"""The tables of a study: rows trained with several seeds, on the same test boards, as markdown.

A study is a folder `{row}/{seed}` of workdirs; configs/study/rows.py says what the rows are.
"""

import dataclasses
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from mgsd_jax.evaluation import stats
from mgsd_jax.evaluation.measures import by_board, by_level, by_task
from mgsd_jax.evaluation.rows import ROWS_FILE, read_rows
from mgsd_jax.evaluation.stats import Strata
from mgsd_jax.report.words import DASH, percent
from mgsd_jax.workdir.metrics import read_metrics

Row = Mapping[str, Any]
Getter = Callable[[Row], float | None]
_STAGES = ("distillation", "grounding")


@dataclasses.dataclass(frozen=True)
class Run:
    """One row of the study with one seed."""

    seed: int
    rows: tuple[Row, ...]  # of its evaluation
    curve: tuple[Mapping[str, float], ...]  # metrics of every update of its stage


@dataclasses.dataclass(frozen=True)
class Model:
    """One row of the study: its runs that have an evaluation, by seed."""

    name: str
    title: str
    group: str
    runs: tuple[Run, ...]


def read_study(
    study: pathlib.Path, rows: Sequence[Any], evaluation: str = "evaluate"
) -> tuple[Model, ...]:
    """The models of a study, those without an evaluation of this name left out.

    Raises ValueError where none has one, or two evaluations are of different boards.
    """
    models = []
    for row in rows:
        runs = []
        for seed in row.seeds:
            folder = study / row.name / str(seed)
            if (folder / evaluation / "summary.json").is_file():
                found = tuple(read_rows(folder / evaluation))
                runs.append(Run(seed, found, _curve(folder)))
        if runs:
            models.append(Model(row.name, row.title, row.group, tuple(runs)))
    if not models:
        raise ValueError(
            f"{study}: got no {evaluation}/{ROWS_FILE}, want at least one; train first"
        )
    boards = {frozenset(by_board(run.rows)) for model in models for run in model.runs}
    if len(boards) > 1:
        raise ValueError(f"{study}: got {len(boards)} different sets of boards, want one for all")
    return tuple(models)


def _curve(folder: pathlib.Path) -> tuple[Mapping[str, float], ...]:
    for stage in _STAGES:
        path = folder / stage / "metrics.jsonl"
        if path.is_file():
            return tuple(read_metrics(path))
    return ()


def success(row: Row) -> float:
    return float(row["outcome"]["success"])


def answered_right(row: Row) -> float:
    """The share of a board's questions that were answered right."""
    return sum(row["perception"].values()) / len(row["perception"])


def strata(run: Run, mode: str, get: Getter) -> Strata:
    """The values of a measure in a mode, by task and level, in the order of the boards."""
    rows = sorted(
        (row for row in run.rows if row["mode"] == mode),
        key=lambda row: (row["task"], row["level"], row["index"]),
    )
    return {
        task: {level: [float(get(row) or 0.0) for row in some] for level, some in by_level(part)}
        for task, part in by_task(rows)
    }


def estimate(model: Model, mode: str, get: Getter = success) -> stats.Estimate:
    """A macro mean over the runs, with its interval over seeds and boards."""
    return stats.over_runs([strata(run, mode, get) for run in model.runs])


def difference(ours: Model, theirs: Model, mode: str = "picture") -> stats.Difference:
    """ours - theirs in macro success, over the seeds that both have."""
    seeds = [run.seed for run in ours.runs if run.seed in {other.seed for other in theirs.runs}]
    if not seeds:
        raise ValueError(f"{ours.name}, {theirs.name}: got no seed in common, want one or more")

    def of(model: Model) -> list[Strata]:
        return [strata(run, mode, success) for run in model.runs if run.seed in seeds]

    return stats.runs_difference(of(ours), of(theirs))


def gap_share(model: Model, base: Model, mode: str = "picture") -> float:
    """(model - base) / (base from text - base) of mean macro success."""
    low, high = estimate(base, "picture").value, estimate(base, "text").value
    return (estimate(model, mode).value - low) / (high - low)


def updates_to(run: Run, level: float) -> int | None:
    """The first validation at which macro success from pictures reached `level`, in updates."""
    reached = [int(m["step"]) for m in run.curve if m.get("val/success", -1.0) >= level]
    return reached[0] if reached else None


def seconds_an_update(run: Run) -> float | None:
    """Median wall seconds of rollout and update; None where the stage has no rollouts."""
    spent = sorted(m["rollout"] + m["update"] for m in run.curve if "rollout" in m)
    return spent[len(spent) // 2] if spent else None


# Markdown.


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _spelled(found: stats.Estimate) -> str:
    return f"{percent(found.value)} ({100 * found.low:.1f}–{100 * found.high:.1f})"


def _tasks(model: Model) -> list[str]:
    return [task for task, _ in by_task(model.runs[0].rows)]


def _of_task(model: Model, task: str, mode: str = "picture") -> str:
    values = []
    for run in model.runs:
        part = strata(run, mode, success)[task]
        levels = [sum(values) / len(values) for values in part.values()]
        values.append(sum(levels) / len(levels))
    return percent(sum(values) / len(values))


def main_table(models: Sequence[Model], base: Model) -> str:
    """Success by task, the share of the gap closed, and what lies behind it."""
    head = [
        "model",
        "seeds",
        "macro, picture",
        *_tasks(base),
        "gap closed",
        "State F1",
        "states exact",
    ]
    head += ["questions", "macro, text", "blind"]
    rows = []
    for model in models:
        rows.append(
            [
                model.title,
                str(len(model.runs)),
                _spelled(estimate(model, "picture")),
                *(_of_task(model, task) for task in _tasks(base)),
                percent(gap_share(model, base)),
                percent(estimate(model, "picture", lambda row: row["state_f1"]).value),
                percent(estimate(model, "picture", lambda row: row["state_exact"]).value),
                percent(estimate(model, "perception", answered_right).value),
                percent(estimate(model, "text").value),
                percent(estimate(model, "blind").value),
            ]
        )
    text = [
        "base, from text",
        str(len(base.runs)),
        _spelled(estimate(base, "text")),
        *(_of_task(base, task, "text") for task in _tasks(base)),
        percent(1.0),
        *[DASH] * 5,
    ]
    return _table(head, [*rows, text])


def ablation_table(models: Sequence[Model], reference: Model) -> str:
    """Each model against the reference on the seeds that both have; means over a model's seeds.

    The reference is there with its first seed, and with all where a model has more than one.
    """
    head = [
        "changed",
        "seeds",
        "macro, picture",
        "minus the method",
        "p",
        *_tasks(reference),
        "states exact",
    ]
    head += ["macro, text", "half way after", "s an update"]
    rows = []
    references = [dataclasses.replace(reference, runs=reference.runs[:1])]
    if any(len(model.runs) > 1 for model in models):
        references.append(reference)
    for model in (*references, *models):
        against = None if model.name == reference.name else difference(model, reference)
        half, spent = updates_to(model.runs[0], 0.5), seconds_an_update(model.runs[0])
        rows.append(
            [
                model.title,
                str(len(model.runs)),
                _spelled(estimate(model, "picture")),
                DASH if against is None else _points(against),
                DASH if against is None else _p(against),
                *(_of_task(model, task) for task in _tasks(reference)),
                percent(estimate(model, "picture", lambda row: row["state_exact"]).value),
                percent(estimate(model, "text").value),
                DASH if half is None else str(half),
                DASH if spent is None else f"{spent:.2f}",
            ]
        )
    return _table(head, rows)


def _points(found: stats.Difference) -> str:
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _p(found: stats.Difference) -> str:
    return "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"


def claims(models: Mapping[str, Model], pairs: Sequence[tuple[str, str]]) -> str:
    """A line a pair (ours, theirs): the difference over seeds and boards."""
    rows = []
    for ours, theirs in pairs:
        if ours in models and theirs in models:
            found = difference(models[ours], models[theirs])
            name = f"{models[ours].title} − {models[theirs].title}"
            rows.append([name, _points(found), _p(found)])
    return _table(["difference in macro success, picture", "points", "p"], rows)


_COLOURS = ("#0b6e4f", "#c8553d", "#3d5a98", "#8a6d1f", "#7a3b8f")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 640, 320, 48, 16, 190, 36


def curves_svg(models: Sequence[Model]) -> str:
    """Success on the validation boards by update: a line a seed, the mean of a model bold."""
    curves = {
        model.title: [
            {int(m["step"]): m["val/success"] for m in run.curve if "val/success" in m}
            for run in model.runs
        ]
        for model in models
    }
    curves = {title: found for title, found in curves.items() if all(found)}
    last = max((max(curve) for found in curves.values() for curve in found), default=1)

    def points(curve: Mapping[int, float]) -> str:
        return " ".join(
            f"{_LEFT + (_WIDTH - _LEFT - _RIGHT) * step / last:.1f},"
            f"{_HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * value:.1f}"
            for step, value in sorted(curve.items())
        )

    lines = []
    for tenth in range(0, 11, 2):
        (start, end) = (points({step: tenth / 10}) for step in (0, last))
        y = start.split(",")[1]
        lines.append(f'<polyline points="{start} {end}" stroke="#ccc"/>')
        lines.append(
            f'<text x="{_LEFT - 8}" y="{y}" text-anchor="end" dy="4">{10 * tenth} %</text>'
        )
    for step in (0, last // 2, last):
        x = points({step: 0.0}).split(",")[0]
        lines.append(f'<text x="{x}" y="{_HEIGHT - 16}" text-anchor="middle">{step}</text>')
    lines.append(f'<text x="{_LEFT}" y="{_HEIGHT - 2}">updates of distillation</text>')
    for number, (title, found) in enumerate(curves.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        shared = set.intersection(*(set(curve) for curve in found))
        mean = {step: sum(curve[step] for curve in found) / len(found) for step in shared}
        lines += [
            f'<polyline points="{points(c)}" stroke="{colour}" opacity=".35"/>' for c in found
        ]
        lines.append(f'<polyline points="{points(mean)}" stroke="{colour}" stroke-width="3"/>')
        where = f'x="{_WIDTH - _RIGHT + 10}" y="{_TOP + 16 + 18 * number}"'
        lines.append(f'<text {where} style="fill:{colour}">{title}</text>')
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" fill="none" '
        'font-family="sans-serif" font-size="12"><style>text{fill:#333}</style>'
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="#fff"/>{"".join(lines)}</svg>\n'
    )


def write_tables(study: pathlib.Path, rows: Sequence[Any], elsewhere: Sequence[str]) -> str:
    """All tables of a study that can be made from what has been run."""
    models = {model.name: model for model in read_study(study, rows)}
    base = models["base"]
    parts = ["## Main rows\n", main_table([m for m in models.values() if m.group == "main"], base)]
    pairs = (
        ("method", "base"),
        ("method", "grounded"),
        ("grounded", "base"),
        ("method", "distillation_only"),
        ("method", "grounding_only"),
        ("method", "sft"),
        ("distillation_only", "base"),
        ("distillation_only", "sft"),
        ("distillation_only", "grounding_only"),
    )
    parts += ["\n## Differences\n", claims(_with_seeds(models), pairs)]
    groups = dict.fromkeys(m.group for m in models.values() if m.group != "main")
    for group in groups:
        some = [m for m in models.values() if m.group == group]
        parts += [f"\n## {group[0].upper()}{group[1:]}\n", ablation_table(some, models["method"])]
    for name in elsewhere:
        try:
            there = {m.name: m for m in read_study(study, rows, name)}
        except ValueError:
            continue
        parts += [f"\n## Elsewhere: {name}\n", main_table(list(there.values()), there["base"])]
    return "\n".join(parts)


def _with_seeds(models: Mapping[str, Model]) -> dict[str, Model]:
    """The base under every seed: it has none of its own."""
    runs = models["base"].runs
    base = dataclasses.replace(
        models["base"],
        runs=tuple(
            dataclasses.replace(runs[0], seed=run.seed)
            for run in models.get("method", models["base"]).runs
        ),
    )
    return {**models, "base": base}
