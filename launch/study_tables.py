"""The tables and curves of a study: rows trained with several seeds, on the same test boards.

A study is a folder `{row}/{seed}` of workdirs; configs/study/rows.py says what the rows are.
"""

import dataclasses
import pathlib
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from typing import Any, ClassVar, Protocol

from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import stats
from mgsd_jax.evaluation.measures import by_board, by_level, by_task, rate
from mgsd_jax.evaluation.rows import (
    ROWS_FILE,
    BoardKey,
    PerceptionRow,
    PlanRow,
    Row,
    plans,
    read_rows,
)
from mgsd_jax.evaluation.stats import Strata
from mgsd_jax.report.curves import Frame
from mgsd_jax.report.markup import tag
from mgsd_jax.report.tables import Cell, grid, make_table
from mgsd_jax.report.words import DASH, FACTS, TASKS, percent
from mgsd_jax.workdir.metrics import METRICS_FILE, read_metrics

Getter = Callable[[Any], float | None]
_STAGES = ("distillation", "grounding")
_PAIRS = (
    ("method", "base"),
    ("method", "grounded"),
    ("grounded", "base"),
    ("method", "distillation_only"),
    ("method", "grounding_only"),
    ("method", "sft"),
    ("jsd", "base"),
    ("jsd", "grounded"),
    ("jsd", "method"),
    ("jsd", "jsd_only"),
    ("jsd", "grounding_only"),
    ("jsd", "sft"),
    ("jsd_only", "base"),
    ("best_60", "base"),
    ("best_60", "jsd"),
    ("best_60_verified", "best_60"),
    ("augment_both", "sft_varied"),
    ("best_60", "sft_varied"),
    ("jsd_only", "distillation_only"),
    ("distillation_only", "base"),
    ("distillation_only", "sft"),
    ("distillation_only", "grounding_only"),
)
# Of other boards, where every option stands beside the recipe in a table of its own.
_PAIRS_ELSEWHERE = (
    ("jsd", "base"),
    ("jsd", "method"),
    ("jsd", "jsd_only"),
    ("jsd", "sft"),
    ("jsd", "grounding_only"),
    ("best_60", "base"),
    ("best_60", "sft"),
    ("best_60", "sft_varied"),
    ("best_60_verified", "best_60"),
    ("augment_both", "sft_varied"),
    ("sft_varied", "base"),
)
# What is left to the base's own answers from text.
_FROM_TEXT = ("sft", "method", "jsd_only", "jsd", "best_60")
# State F1 of these is told by kind of fact.
_BY_KIND = ("base", "sft", "grounded", "grounding_only", "jsd", "jsd_only", "augment_50", "best_60")
# From the base that has seen plans.
_PAIRS_OF_PLANS = (
    ("plans_one", "plans_state"),
    ("plans_state", "plans_base"),
    ("plans_one", "plans_base"),
    ("plans_state", "jsd_only"),
)
CURVES = ("distillation_only", "method", "jsd", "jsd_only", "verifier_50", "best_60")
_COLOURS = ("#0b6e4f", "#c8553d", "#3d5a98", "#8a6d1f", "#7a3b8f", "#5b5b5b")


class StudyRow(Protocol):
    """What a row of configs/study/rows.py, a dataclass, says of itself."""

    __dataclass_fields__: ClassVar[dict[str, Any]]
    name: str
    title: str
    group: str
    stage: str
    settings: tuple[str, ...]
    seeds: tuple[int, ...]
    needs: str
    base: str


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
    study: pathlib.Path,
    rows: Sequence[StudyRow],
    evaluation: str = "evaluate",
    without: AbstractSet[BoardKey] = frozenset(),
) -> dict[str, Model]:
    """Return the models of a study by name, those without an evaluation of this name left out.

    Answers about the boards in `without` are left out.
    Raises ValueError where two evaluations are of different boards, or a file cannot be read.
    """
    models = {}
    for row in rows:
        folders = {seed: study / row.name / str(seed) for seed in row.seeds}
        runs = tuple(
            Run(seed, tuple(_rows_but(folder / evaluation, without)), _curve(folder))
            for seed, folder in folders.items()
            if (folder / evaluation / "summary.json").is_file()
        )
        if runs:
            models[row.name] = Model(row.name, row.title, row.group, runs)
    boards = {frozenset(by_board(run.rows)) for model in models.values() for run in model.runs}
    if len(boards) > 1:
        raise ValueError(
            f"{study}: {evaluation}: got {len(boards)} different sets of boards, want one for all"
        )
    return models


def _rows_but(folder: pathlib.Path, without: AbstractSet[BoardKey]) -> list[Row]:
    boards = by_board(read_rows(folder))
    if not boards:
        raise ValueError(f"{folder / ROWS_FILE}: got no answers, want one or more")
    return [row for board, some in boards.items() if board not in without for row in some]


def _curve(folder: pathlib.Path) -> tuple[Mapping[str, float], ...]:
    paths = [folder / stage / METRICS_FILE for stage in _STAGES]
    return next((tuple(read_metrics(path)) for path in paths if path.is_file()), ())


# Measures.


def success(row: PlanRow) -> float:
    return float(row["outcome"]["success"])


def state_right(row: PlanRow) -> float:
    return float(row["state_exact"] or False)


def answered_right(row: PerceptionRow) -> float:
    """Return the share of a board's questions that were answered right."""
    return sum(row["perception"].values()) / len(row["perception"])


def strata(run: Run, mode: str, get: Getter) -> Strata:
    """Return the values of a measure in a mode, by task and level, in the order of the boards."""
    rows = sorted(
        (row for row in run.rows if row["mode"] == mode),
        key=lambda row: (row["task"], row["level"], row["index"]),
    )
    return {
        task: {level: [float(get(row) or 0.0) for row in some] for level, some in by_level(part)}
        for task, part in by_task(rows)
    }


def estimate(model: Model, mode: str, get: Getter = success) -> stats.Estimate:
    """Return a macro mean over the runs, with its interval over seeds and boards."""
    return stats.over_runs([strata(run, mode, get) for run in model.runs])


def difference(
    ours: Model,
    theirs: Model,
    mode: str = "picture",
    get: Getter = success,
    their_mode: str = "",
) -> stats.Difference:
    """Return ours - theirs in the macro mean of a measure, over the seeds that both have.

    `their_mode`: what they read, where it is something else.
    """
    seeds = {run.seed for run in ours.runs} & {run.seed for run in theirs.runs}
    if not seeds:
        raise ValueError(f"{ours.name}, {theirs.name}: got no seed in common, want one or more")
    mine, others = (
        [strata(run, read, get) for run in model.runs if run.seed in seeds]
        for model, read in ((ours, mode), (theirs, their_mode or mode))
    )
    return stats.runs_difference(mine, others)


def gap_share(model: Model, base: Model | None, mode: str = "picture") -> float | None:
    """Return (model - base) / (base from text - base) of mean macro success, None without a gap."""
    if base is None:
        return None
    low, high = estimate(base, "picture").value, estimate(base, "text").value
    return (estimate(model, mode).value - low) / (high - low) if high != low else None


def validations(run: Run) -> dict[int, float]:
    """Return macro success from pictures on the validation boards, by update."""
    return {int(m["step"]): m["val/success"] for m in run.curve if "val/success" in m}


def updates_to(run: Run, level: float) -> int | None:
    """Return the first validated update with macro success from pictures of `level` or more."""
    return next((step for step, found in validations(run).items() if found >= level), None)


def seconds_an_update(run: Run) -> float | None:
    """Return the median wall seconds of rollout and update; None for a stage without rollouts."""
    spent = [m["rollout"] + m["update"] for m in run.curve if "rollout" in m]
    return statistics.median_high(spent) if spent else None


# Tables, as markdown.


def _table(label: str, names: Iterable[str], columns: Mapping[str, Iterable[str]]) -> str:
    cells = {name: [Cell(text) for text in column] for name, column in columns.items()}
    table = make_table("", (label,), [(name,) for name in names], cells)
    return "\n".join(grid(table)) + "\n"


def _shared_columns(shown: Sequence[tuple[Model, str]]) -> dict[str, list[str]]:
    """What each (model, mode) has in every table: seeds, macro success, and success by task."""
    found = [(len(model.runs), estimate(model, mode)) for model, mode in shown]
    columns = {
        "seeds": [str(count) for count, _ in found],
        "macro, picture": [
            f"{percent(e.value)} ({100 * e.low:.1f}–{100 * e.high:.1f})" for _, e in found
        ],
    }
    for task, _ in by_task(shown[0][0].runs[0].rows):
        columns[ENVS[task].title] = [percent(_of_task(model, task, mode)) for model, mode in shown]
    return columns


def _of_task(model: Model, task: str, mode: str) -> float:
    levels = [strata(run, mode, success)[task].values() for run in model.runs]
    return statistics.fmean(statistics.fmean(map(statistics.fmean, run)) for run in levels)


def _means(models: Sequence[Model], mode: str, get: Getter = success) -> list[str]:
    """The macro means of a measure, a dash where a model was not asked in this mode."""
    return [
        percent(estimate(model, mode, get).value)
        if any(row["mode"] == mode for row in model.runs[0].rows)
        else DASH
        for model in models
    ]


def main_table(models: Sequence[Model], base: Model | None) -> str:
    """Success by task, the share of the gap closed where a base is, and what lies behind it."""
    bounds = [] if base is None else [(base, "text")]
    shown = [*((model, "picture") for model in models), *bounds]
    columns = _shared_columns(shown)
    columns["gap closed"] = [percent(gap_share(model, base, mode)) for model, mode in shown]
    columns |= {
        name: [*found, *(DASH for _ in bounds)]
        for name, found in {
            "State F1": _means(models, "picture", lambda row: row["state_f1"]),
            "states exact": _means(models, "picture", state_right),
            "questions": _means(models, "perception", answered_right),
            "macro, text": _means(models, "text"),
            "blind": _means(models, "blind"),
        }.items()
    }
    names = [*(model.title for model in models), *("base, from text" for _ in bounds)]
    return _table("model", names, columns)


def kinds_table(models: Sequence[Model]) -> str:
    """State F1 by kind of fact, from pictures, over all runs.

    Empty where no answer says: rows of an older version do not.
    """
    found = {
        f"{TASKS[task]}: {label}": [_of_kind(model, task, kind) for model in models]
        for task, kinds in FACTS.items()
        for kind, label in kinds.items()
    }
    columns = {
        name: [*map(percent, column)]
        for name, column in found.items()
        if any(f1 is not None for f1 in column)
    }
    return _table("model", [model.title for model in models], columns) if columns else ""


def _of_kind(model: Model, task: str, kind: str) -> float | None:
    rows = [row for run in model.runs for row in plans(run.rows, "picture") if row["task"] == task]
    return rate(rows, lambda row: (row.get("state_f1_by_kind") or {}).get(kind))["value"]


def ablation_table(models: Sequence[Model], reference: Model) -> str:
    """Each model against the reference on the seeds that both have; means over a model's seeds.

    The reference is there with its first seed, and with all where a model has more than one.
    """
    references = [dataclasses.replace(reference, runs=reference.runs[:1])]
    if any(len(model.runs) > 1 for model in models):
        references.append(reference)
    shown = [*references, *models]
    against = [
        None if model.name == reference.name else difference(model, reference) for model in shown
    ]
    half = [updates_to(model.runs[0], 0.5) for model in shown]
    spent = [seconds_an_update(model.runs[0]) for model in shown]
    columns = _shared_columns([(model, "picture") for model in shown])
    columns = {
        "seeds": columns.pop("seeds"),
        "macro, picture": columns.pop("macro, picture"),
        "minus the method": [DASH if found is None else _points(found) for found in against],
        "p": [DASH if found is None else _p(found) for found in against],
        **columns,
        "states exact": _means(shown, "picture", state_right),
        "macro, text": _means(shown, "text"),
        "half way after": [DASH if step is None else str(step) for step in half],
        "s an update": [DASH if seconds is None else f"{seconds:.2f}" for seconds in spent],
    }
    return _table("changed", [model.title for model in shown], columns)


def options_table(
    models: Sequence[Model], reference: Model, elsewhere: Mapping[str, Mapping[str, Model]]
) -> str:
    """Each option and the recipe that it is a switch of, on every kind of boards, with its gain.

    `elsewhere` holds the models by name for each kind of other boards.
    """
    shown = [reference, *models]

    def gains(
        found: Sequence[Model | None], mode: str = "picture", get: Getter = success
    ) -> list[str]:
        cells = []
        for model in found:
            if model is None or found[0] is None:
                cells.append(DASH)
                continue
            value = percent(estimate(model, mode, get).value)
            gain = (
                "" if model is found[0] else f" {_points(difference(model, found[0], mode, get))}"
            )
            cells.append(value + gain)
        return cells

    columns = {
        "seeds": [str(len(model.runs)) for model in shown],
        "validation": [_validated(model) for model in shown],
        "test": gains(shown),
    }
    for name, there in elsewhere.items():
        columns[name] = gains([there.get(model.name) for model in shown])
    columns["questions"] = gains(shown, "perception", answered_right)
    columns["text"] = gains(shown, "text")
    return _table("option", [model.title for model in shown], columns)


def _validated(model: Model) -> str:
    """Success on validation boards at the end."""
    last = [[*found.values()][-1] for found in map(validations, model.runs) if found]
    return percent(statistics.fmean(last)) if last else DASH


def unseen_table(models: Mapping[str, Model]) -> str:
    """Success from pictures by task, and each model minus the recipe on the seeds of both."""
    shown = list(models.values())
    reference = models.get("jsd")
    against = [
        _points(difference(model, reference))
        if reference is not None and model.name not in ("base", "jsd")
        else DASH
        for model in shown
    ]
    columns = {**_shared_columns([(m, "picture") for m in shown]), "minus the recipe": against}
    return _table("model", [model.title for model in shown], columns)


def _points(found: stats.Difference) -> str:
    return f"{100 * found.value:+.1f} ({100 * found.low:+.1f} to {100 * found.high:+.1f})"


def _p(found: stats.Difference) -> str:
    return "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}"


def claims(
    models: Mapping[str, Model],
    pairs: Iterable[tuple[str, str]],
    from_text: Iterable[str] = (),
) -> str:
    """A line for each pair (ours, theirs): the difference over seeds and boards.

    `from_text` names models that also stand against what the base answers to text.
    """
    there = [(models[a], models[b]) for a, b in pairs if a in models and b in models]
    found = {f"{ours.title} − {theirs.title}": difference(ours, theirs) for ours, theirs in there}
    states = [_points(difference(ours, theirs, get=state_right)) for ours, theirs in there]
    for name in from_text if "base" in models else ():
        if name in models:
            title = f"{models[name].title} − base, from text"
            found[title] = difference(models[name], models["base"], their_mode="text")
            states.append(DASH)  # the text says the state
    columns = {
        "points": map(_points, found.values()),
        "p": map(_p, found.values()),
        "points of states exact": states,
    }
    return _table("difference in macro success, picture", found, columns)


def validation_table(models: Sequence[Model]) -> str:
    """Success on validation boards by update of the stage, in %, a number for each seed."""
    curves = [[validations(run) for run in model.runs] for model in models]
    steps = sorted({step for found in curves for curve in found for step in curve})
    columns = {
        str(step): [
            " / ".join(f"{100 * curve[step]:.0f}" for curve in found if step in curve) or DASH
            for found in curves
        ]
        for step in steps
    }
    seeds = [
        ", ".join(str(run.seed) for run, curve in zip(model.runs, found, strict=True) if curve)
        for model, found in zip(models, curves, strict=True)
    ]
    return _table("model", [model.title for model in models], {"seeds": seeds, **columns})


def write_tables(
    study: pathlib.Path,
    rows: Sequence[StudyRow],
    elsewhere: Sequence[str],
    unseen: Sequence[str] = (),
) -> str:
    """Return all tables of a study that can be made from what has been run.

    `unseen` names evaluations of more boards of the usual draws, of which the main rows' boards are
    the first: those are left out.
    """
    models = read_study(study, rows)
    if not models:
        raise ValueError(f"{study}: ROW/SEED/evaluate/summary.json not found; run some rows first")
    base = models.get("base")
    main = [m for m in models.values() if m.group == "main"]
    parts = ["## Main rows\n", main_table(main, base)] if main else []
    if by_kind := kinds_table([m for m in models.values() if m.name in _BY_KIND]):
        parts += ["\n## State F1 by kind of fact\n", by_kind]
    if any(a in models and b in models for a, b in _PAIRS):
        found = claims(_base_of_every_seed(models), _PAIRS, _FROM_TEXT)
        parts += ["\n## Differences\n", found]
    if validated := [
        m for m in models.values() if m.name in CURVES and any(map(validations, m.runs))
    ]:
        parts += ["\n## Validation boards by update\n", validation_table(validated)]
    found_there = {name: read_study(study, rows, name) for name in elsewhere}
    found_there = {name: there for name, there in found_there.items() if there}
    for group in dict.fromkeys(m.group for m in models.values() if m.group != "main"):
        some = [m for m in models.values() if m.group == group]
        if group == "plans":
            found = claims(_base_of_every_seed(models, "plans_base"), _PAIRS_OF_PLANS)
            parts += ["\n## Plans\n", main_table(some, models.get("plans_base")), "\n", found]
            continue
        reference = models.get("jsd" if group == "options" else "method")
        if reference is None:  # not run yet
            continue
        if group == "options":
            table = options_table(some, reference, found_there)
        else:
            table = ablation_table(some, reference)
        parts += [f"\n## {group[0].upper()}{group[1:]}\n", table]
    for name, there in found_there.items():
        of_plans = [m for m in there.values() if m.group == "plans"]  # of another base
        others = [m for m in there.values() if m.group != "plans"]
        parts.append(f"\n## Elsewhere: {name}\n")
        parts += [main_table(others, there.get("base"))] if others else []
        if by_kind := kinds_table([m for m in others if m.name in _BY_KIND]):
            parts += ["\n", by_kind]
        parts += ["\n", main_table(of_plans, None)] if of_plans else []
        if any(a in there and b in there for a, b in _PAIRS_ELSEWHERE):
            parts += ["\n", claims(_base_of_every_seed(there), _PAIRS_ELSEWHERE)]
    known = frozenset(by_board(next(iter(models.values())).runs[0].rows))
    for name in unseen:
        if there := read_study(study, rows, name, known):
            parts += [f"\n## Boards without a part in any choice: {name}\n", unseen_table(there)]
    return "\n".join(parts)


def _base_of_every_seed(models: Mapping[str, Model], name: str = "base") -> dict[str, Model]:
    """The models; the base, which has one run, stands with it beside every seed of the others."""
    if name not in models:
        return dict(models)
    base = models[name]
    seeds = sorted({run.seed for model in models.values() for run in model.runs})
    runs = tuple(dataclasses.replace(base.runs[0], seed=seed) for seed in seeds)
    return {**models, name: dataclasses.replace(base, runs=runs)}


def curves_svg(models: Iterable[Model]) -> str:
    """Return success on the validation boards by update, as an SVG file of its own.

    There is a thin line for each seed, and the mean of each model as a thick one.
    """
    curves = {m.title: [found for run in m.runs if (found := validations(run))] for m in models}
    curves = {title: found for title, found in curves.items() if found}
    last = max((max(curve) for found in curves.values() for curve in found), default=1)
    frame = Frame(48, 16, 402, 268, x=(0, last))
    drawn = [
        tag("style", "text{fill:#333}.grid line{stroke:#ccc}"),
        tag("rect", width=800, height=320, fill="#fff"),
        frame.axes(
            [(step, str(step), "middle") for step in (0, last // 2, last)],
            [(tenth / 10, f"{10 * tenth} %") for tenth in range(0, 11, 2)],
        ),
        tag("text", "updates of distillation", x=frame.left, y=318),
    ]
    for i, (title, found) in enumerate(curves.items()):
        colour = _COLOURS[i % len(_COLOURS)]
        shared = sorted(set.intersection(*map(set, found)))
        mean = [(step, statistics.fmean(curve[step] for curve in found)) for step in shared]
        seeds = [
            frame.line(sorted(curve.items()), stroke=colour, opacity="0.35") for curve in found
        ]
        drawn += [*seeds, frame.line(mean, stroke=colour, stroke_width=3)]
        drawn.append(tag("text", title, x=460, y=32 + 18 * i, style=f"fill:{colour}"))
    namespace = {"xmlns": "http://www.w3.org/2000/svg", "viewBox": "0 0 800 320", "fill": "none"}
    return tag("svg", *drawn, **namespace, font_family="sans-serif", font_size="12") + "\n"
