"""The page that compares runs, and its markdown and JSON twins."""

import itertools
from collections.abc import Sequence
from html import escape
from typing import Any

from mgsd_jax.evaluation.measures import Measure
from mgsd_jax.report import boards, overlays, plots, tables
from mgsd_jax.report.compare import (
    Comparison,
    curve_of,
    differing_settings,
    disputed,
    ends,
    frequent_failures,
    pair_differences,
)
from mgsd_jax.report.page import OPEN_FOR_PRINT, PUBLISHED
from mgsd_jax.report.style import CSS
from mgsd_jax.report.tables import Cell, Table
from mgsd_jax.report.words import (
    DASH,
    ERRORS,
    MODES,
    TASKS,
    interval,
    model_label,
    p_value,
    percent,
    points,
    signed,
)

_CURVES = {
    "grounding": ("loss", "val/loss"),
    "distillation": (
        *("val/success", "val/state_exact", "loss", "rollout/success"),
        *("teacher_agreement", "student_entropy", "rollout/length", "rollout/truncated"),
    ),
}
_SEGMENTS = ("state", "sentence", "plan", "format")
_NOTE = (
    "Level-balanced success from the picture, with 95 % intervals. Differences are paired board by "
    "board and bootstrapped; their p-values are two-sided and not adjusted for the number of "
    "comparisons."
)


def made_tables(comparison: Comparison) -> dict[str, list[Table]]:
    """Return the tables of the page by section."""
    shown = {name: comparison.summary["models"][name] for name in comparison.shown}
    summary = {**comparison.summary, "models": shown}
    diagnostics = {name: comparison.summary["diagnostics"][name] for name in shown}
    tasks = [
        task
        for task in TASKS
        if any(task in modes.get("picture", {"tasks": {}})["tasks"] for modes in shown.values())
    ]
    made = [tables.rule_sets(summary), tables.passes(summary)]
    return {
        "results": [results_table(comparison)],
        "differences": [differences_table(comparison)],
        "levels": [tables.by_level(summary, task) for task in tasks],
        "rules": [table for table in made if table is not None],
        "reading": [tables.diagnostics({**summary, "diagnostics": diagnostics})],
        "failures": [failures_table(comparison), tables.errors(summary)],
        "settings": [settings_table(comparison)],
    }


def results_table(comparison: Comparison) -> Table:
    """A row for each model and what it reads; a column for each task, and their mean."""
    models = comparison.summary["models"]
    names = [*comparison.shown, *(name for name in models if name not in comparison.shown)]
    keys = [(n, m) for m in ("text", "picture") for n in names if m in models[n]]
    keys = [key for key in keys if key[1] == "picture" or key[0] in comparison.shown]
    tasks = [task for task in TASKS if any(task in models[n][m]["tasks"] for n, m in keys)]
    rows = []
    for name, mode in keys:
        part = models[name][mode]
        cells = [
            tables.measure_cell(
                part["tasks"][task]["level_mean"] if task in part["tasks"] else None
            )
            for task in tasks
        ]
        rows.append(
            (Cell(model_label(name)), Cell(MODES[mode]), *cells, tables.measure_cell(part["macro"]))
        )
    head = ("model", "reads", *(TASKS[task] for task in tasks), "macro")
    note = "Success: a task is the mean over its levels, macro the mean over tasks. " + PUBLISHED
    return Table("Results", tuple(map(Cell, head)), tuple(rows), note, labels=2)


def differences_table(comparison: Comparison) -> Table:
    """A row for every two runs, in points: all tasks, then task by task."""
    found = pair_differences(comparison)
    tasks = [task for task in TASKS if any(task in parts for *_, parts in found)]
    rows = [
        (
            Cell(f"{model_label(later)} − {model_label(earlier)}"),
            _difference_cell(whole),
            *(_difference_cell(parts.get(task)) for task in tasks),
            Cell(DASH if whole is None else str(whole["n"])),
        )
        for later, earlier, whole, parts in found
    ]
    head = ("compared", "macro", *(TASKS[task] for task in tasks), "boards in common")
    return Table("Paired differences", tuple(map(Cell, head)), tuple(rows), _NOTE)


def _difference_cell(measure: Measure | None) -> Cell:
    if measure is None or measure["value"] is None:
        return Cell(DASH, "no board in common")
    return Cell(points(measure["value"]), f"{signed(measure)}, {p_value(measure)}")


def failures_table(comparison: Comparison) -> Table:
    """The failures that are most frequent over all results, with each one's count."""
    rows = []
    totals = {
        name: comparison.summary["models"][name]["picture"]["n"] for name in comparison.results
    }
    for (task, error, reason), counts in frequent_failures(comparison):
        cells = [
            Cell(str(count), percent(count / totals[name]), count / totals[name])
            for name, count in zip(comparison.results, counts, strict=True)
        ]
        label = f"{ERRORS[error]}; {tables.reason_label(reason)}"
        rows.append((Cell(label, TASKS[task]), *cells))
    head = ("how it fails", *map(model_label, comparison.results))
    note = "Answers to pictures. What went wrong first, then what the simulator said."
    return Table("Most frequent failures", tuple(map(Cell, head)), tuple(rows), note)


def settings_table(comparison: Comparison) -> Table:
    """The settings in which the runs differ."""
    rows = tuple(
        (Cell(name), *(Cell(DASH if value is None else str(value)[:60]) for value in values))
        for name, values in differing_settings(comparison.runs).items()
    )
    head = ("setting", *(model_label(run.name) for run in comparison.runs))
    note = "Of the stages whose settings were found; folders are left out."
    if not rows:
        note = "No setting differs, or none was found. " + note
    return Table("Where the settings differ", tuple(map(Cell, head)), rows, note)


def headline(comparison: Comparison) -> str:
    """Return the runs from best to worst, as 'b > a ≈ c', by their paired intervals."""
    models, found = comparison.summary["models"], comparison.summary["differences"]
    order = sorted(comparison.results, key=lambda name: -models[name]["picture"]["macro"]["value"])
    text = model_label(order[0])
    for better, worse in itertools.pairwise(order):
        key, sign = f"{better} - {worse}", 1
        if key not in found:
            key, sign = f"{worse} - {better}", -1
        low, high = (found[key][end] for end in ("low", "high"))
        if low is None:
            mark = "?"
        else:
            low, high = sorted((sign * low, sign * high))
            mark = ">" if low > 0 else "<" if high < 0 else "≈"
        text += f" {mark} {model_label(worse)}"
    return text


def page(title: str, comparison: Comparison, commands: Sequence[str]) -> str:
    """Return the comparison as one HTML document that needs no other file."""
    made = made_tables(comparison)
    models = list(comparison.shown)
    summary = {
        **comparison.summary,
        "models": {name: comparison.summary["models"][name] for name in comparison.shown},
    }
    legend = overlays.legend(comparison.results, models)
    sections = {
        "Results": _html(made["results"]) + plots.dot_plot(summary),
        "Differences": _html(made["differences"]),
        "Learning curves": _curves(comparison, models, legend),
        "Student and teacher": _teacher(comparison, models, legend),
        "How answers end": plots.stacked_bars(summary) + _html(made["failures"]),
        "Boards where the runs differ": _gallery(comparison),
        "By level": _html(made["levels"]),
        "Reading and planning": _html(made["reading"]),
        "Rules and tries": _html(made["rules"]),
        "How this was made": _html(made["settings"]) + _making(comparison, commands),
    }
    sections = {heading: content for heading, content in sections.items() if content}
    ids = {heading: heading.lower().replace(" ", "-") for heading in sections}
    links = "".join(f'<a href="#{ids[heading]}">{heading}</a>' for heading in sections)
    body = "".join(
        f'<section id="{ids[heading]}"><h2>{heading}</h2>{content}</section>'
        for heading, content in sections.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="order">{escape(headline(comparison))}</p>'
        f"{_tiles(comparison, models)}"
        f'<p class="key">{_NOTE} &gt;: the interval of the difference leaves out 0; ≈: it does '
        f'not.</p><nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<script>{OPEN_FOR_PRINT}</script></body></html>\n"
    )


def markdown(title: str, comparison: Comparison, commands: Sequence[str]) -> str:
    """Return the headline, every table and the commands as GitHub markdown."""
    parts = [f"# {title}", "", f"**{headline(comparison)}**", ""]
    for made in made_tables(comparison).values():
        parts += map(tables.to_markdown, made)
    return "\n".join([*parts, "```sh", *commands, "```", ""])


def as_json(title: str, comparison: Comparison, commands: Sequence[str]) -> dict[str, Any]:
    """Return what the page shows as JSON values."""
    return {
        "title": title,
        "order": headline(comparison),
        "runs": {
            run.name: {
                "folder": run.folder,
                "model": run.result,
                "ends": {prefix: ends(run, prefix) for prefix in _PREFIXES},
            }
            for run in comparison.runs
        },
        "differences": [
            {"later": later, "earlier": earlier, "macro": whole, "tasks": parts}
            for later, earlier, whole, parts in pair_differences(comparison)
        ],
        "settings": differing_settings(comparison.runs),
        "summary": comparison.summary,
        "commands": list(commands),
    }


def _tiles(comparison: Comparison, models: Sequence[str]) -> str:
    tiles = []
    for name in comparison.shown:
        modes = comparison.summary["models"][name]
        if "picture" not in modes:
            continue
        macro = modes["picture"]["macro"]
        tiles.append(
            f'<div class="tile" style="--c:{plots.colour(name, models)}"><span class="who">'
            f"{plots.icon(name, 'picture', models)}{escape(model_label(name))}</span>"
            f"<b>{percent(macro['value'])}</b><span>{interval(macro)}</span></div>"
        )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _curves(comparison: Comparison, models: Sequence[str], legend: str) -> str:
    html = ""
    for stage, names in _CURVES.items():
        drawn = []
        for name in names:
            series = {run.name: curve_of(run, stage, name) for run in comparison.runs}
            there = {run: curve for run, curve in series.items() if curve is not None}
            if there:
                drawn.append(overlays.curves(name, there, comparison.results, models))
        if drawn:
            html += f'<h3>{stage.capitalize()}</h3><div class="panels">{"".join(drawn)}</div>'
    missing = [
        f"{run.name}: {stage.missing}"
        for run in comparison.runs
        for stage in run.stages
        if stage.missing
    ]
    notes = "".join(f'<p class="missing">No curve of {escape(words)}.</p>' for words in missing)
    return (legend + html if html else "") + notes


# Metrics of distillation by token group and by response position.
_PREFIXES = ("kl", "kl_pos", "agree", "agree_pos")


def _teacher(comparison: Comparison, models: Sequence[str], legend: str) -> str:
    drawn = []
    for prefix, title, joined in (
        ("kl_pos", "KL to the teacher by position (nats)", True),
        ("kl", "KL to the teacher by token group (nats)", False),
        ("agree_pos", "Same next token as the teacher, by position", True),
        ("agree", "Same next token as the teacher, by token group", False),
    ):
        series = {run.name: ends(run, prefix) for run in comparison.runs}
        series = {run: found for run, found in series.items() if found}
        names = {name for found in series.values() for name in found}
        order = (
            sorted(names, key=_first_position) if joined else [s for s in _SEGMENTS if s in names]
        )
        if order:
            drawn.append(
                overlays.categories(title, series, order, comparison.results, models, joined=joined)
            )
    if not drawn:
        return ""
    return (
        "<p>Over the student's own responses, mean over the last tenth of the steps of "
        f'distillation.</p>{legend}<div class="panels">{"".join(drawn)}</div>'
    )


def _first_position(name: str) -> int:
    """Where a range such as '16-63' or '256-' starts."""
    return int(name.replace("+", "-").split("-")[0])


def _gallery(comparison: Comparison) -> str:
    chosen = disputed(comparison)
    if not chosen:
        return '<p class="missing">No board is solved by some of the runs and not by others.</p>'
    cards = []
    for number, (board, rows) in enumerate(chosen):
        solved = [model_label(name) for name, row in rows.items() if row["outcome"]["success"]]
        failed = [model_label(name) for name, row in rows.items() if not row["outcome"]["success"]]
        why = f"solved by {', '.join(solved)}; not by {', '.join(failed)}"
        pick = boards.Pick("fixed", board, comparison.results[:2], rows)  # type: ignore[arg-type]
        cards.append(boards.card(pick, number, why))
    return (
        "<p>Of each task up to 4, evenly spread over levels and boards. A ring marks the start. A "
        "solid line is a plan that solves the board, a dashed one fails at its cross; P and D are "
        f'pick and drop.</p><div class="cards">{"".join(cards)}</div>'
    )


def _making(comparison: Comparison, commands: Sequence[str]) -> str:
    runs = "".join(
        f"<li>{escape(model_label(run.name))}: {escape(run.result)} of {escape(run.folder)}</li>"
        for run in comparison.runs
    )
    return f"<ul>{runs}</ul><pre>{escape(chr(10).join(commands))}</pre>"


def _html(made: Sequence[Table]) -> str:
    return "".join(map(tables.to_html, made))
