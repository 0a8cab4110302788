"""The page that compares runs, with its markdown and JSON twins."""

from collections.abc import Sequence

from etils import epath
from markupsafe import Markup

from mgsd_jax.report import boards, curves, plots, tables
from mgsd_jax.report.compare import (
    Comparison,
    compare,
    curve_of,
    differing_settings,
    disputed,
    ends,
    frequent_failures,
    pair_differences,
)
from mgsd_jax.report.inputs import PathLike, parts
from mgsd_jax.report.markup import write
from mgsd_jax.report.page import (
    HOW_TO_READ_ROUTES,
    PUBLISHED,
    Page,
    Section,
    check_path,
    html,
    missing,
    paragraph,
    tile,
    write_page,
)
from mgsd_jax.report.tables import Cell, Table, make_table, measure_cell, points_cell
from mgsd_jax.report.words import (
    DASH,
    ERRORS,
    MODES,
    TASKS,
    compared,
    model_label,
    reason_label,
)

_CURVES = {
    "grounding": ("loss", "val/loss"),
    "distillation": (
        *("val/success", "val/state_exact", "loss", "rollout/success"),
        *("teacher_agreement", "student_entropy", "rollout/length", "rollout/truncated"),
    ),
}
# Metrics of distillation by token group and by response position.
_PREFIXES = ("kl", "kl_pos", "agree", "agree_pos")
_SEGMENTS = ("state", "sentence", "plan", "format")
_NOTE = (
    "Level-balanced success from the picture, with 95 % intervals. Differences are paired board by "
    "board and bootstrapped; their p-values are two-sided and not adjusted for the number of "
    "comparisons."
)


def build_comparison(folders: Sequence[str], out_path: PathLike, *, model: str = "") -> epath.Path:
    """Write the page that compares runs with its .md and .json twins, and return its path.

    `folders` are workdirs or evaluation folders; `model` stands for each run, by default its last
    one. Raises ValueError naming the folder where a run has no results.
    """
    out = check_path(out_path)
    comparison = compare(folders, model)
    title = f"Comparison of {' and '.join(comparison.results)}"
    commands = (
        f"python -m mgsd_jax.main --stage=report --config=... --workdir=... "
        f"--set report.runs={','.join(folders)}",
    )
    page = make_page(title, comparison, commands)
    markdown = [f"# {title}", "", f"**{headline(comparison)}**", ""]
    for made in tables_of(comparison).values():
        markdown += map(tables.to_markdown, made)
    markdown += ["```sh", *commands, "```", ""]
    write_page(out, page, "\n".join(markdown), as_json(title, comparison, commands))
    return out


def tables_of(comparison: Comparison) -> dict[str, list[Table]]:
    """Return every table of the page by section."""
    summary = comparison.shown_summary
    tasks = {task for *_, part in parts(summary, "picture") for task in part["tasks"]}
    return {
        "results": [results_table(comparison)],
        "differences": [differences_table(comparison)],
        "levels": [tables.by_level(summary, task) for task in TASKS if task in tasks],
        "rules": [*tables.rule_sets(summary), *tables.passes(summary)],
        "reading": [tables.diagnostics(summary)],
        "failures": [failures_table(comparison), tables.errors(summary)],
        "settings": [settings_table(comparison)],
    }


def results_table(comparison: Comparison) -> Table:
    """A row for each model and what it reads; a column for each task, and their mean."""
    models = comparison.summary["models"]
    names = [*comparison.shown, *(name for name in models if name not in comparison.shown)]
    keys = [(name, "text") for name in comparison.shown] + [(name, "picture") for name in names]
    found = {key: models[key[0]][key[1]] for key in keys if key[1] in models[key[0]]}
    columns = {
        title: [
            measure_cell(part["tasks"][task]["level_mean"] if task in part["tasks"] else None)
            for part in found.values()
        ]
        for task, title in TASKS.items()
        if any(task in part["tasks"] for part in found.values())
    }
    columns["macro"] = [measure_cell(part["macro"]) for part in found.values()]
    labels = [(model_label(name), MODES[mode]) for name, mode in found]
    note = "Success: a task is the mean over its levels, macro the mean over tasks. " + PUBLISHED
    return make_table("Results", ("model", "reads"), labels, columns, note)


def differences_table(comparison: Comparison) -> Table:
    """A row for every two runs, in points: all tasks, then task by task."""
    found = pair_differences(comparison)
    missing = "no board in common"
    columns = {"macro": [points_cell(whole, missing) for *_, whole, _ in found]}
    for task, title in TASKS.items():
        if any(task in by_task for *_, by_task in found):
            columns[title] = [points_cell(by_task.get(task), missing) for *_, by_task in found]
    columns["boards in common"] = [tables.count_cell(whole) for *_, whole, _ in found]
    labels = [(f"{model_label(later)} − {model_label(earlier)}",) for later, earlier, *_ in found]
    return make_table("Paired differences", ("compared",), labels, columns, _NOTE)


def failures_table(comparison: Comparison) -> Table:
    """The failures that are most frequent over all results, with each one's count."""
    models, found = comparison.summary["models"], frequent_failures(comparison)
    columns = {
        model_label(name): [
            tables.share_cell(counts[name], models[name]["picture"]["n"])
            for counts in found.values()
        ]
        for name in comparison.results
    }
    labels = [
        (Cell(f"{ERRORS[error]}; {reason_label(reason)}", TASKS[task]),)
        for task, error, reason in found
    ]
    note = "Answers to pictures. What went wrong first, then what the simulator said."
    return make_table("Most frequent failures", ("how it fails",), labels, columns, note)


def settings_table(comparison: Comparison) -> Table:
    """The settings in which the runs differ."""
    found = differing_settings(comparison.runs)
    columns = {
        model_label(run.name): [
            Cell(DASH if values[i] is None else str(values[i])[:60]) for values in found.values()
        ]
        for i, run in enumerate(comparison.runs)
    }
    note = "Of the stages whose settings were found; folders are left out."
    if not found:
        note = "No setting differs, or none was found. " + note
    labels = [(name,) for name in found]
    return make_table("Where the settings differ", ("setting",), labels, columns, note)


def headline(comparison: Comparison) -> str:
    """Return the runs from best to worst, as 'b > a ≈ c', by their paired intervals."""
    models = comparison.summary["models"]
    order = sorted(comparison.results, key=lambda name: -models[name]["picture"]["macro"]["value"])
    return compared(order, comparison.summary)


def make_page(title: str, comparison: Comparison, commands: Sequence[str]) -> Page:
    """Return the page; a section with nothing in it is left out."""
    summary, models = comparison.shown_summary, list(comparison.shown)
    made = {name: html(some) for name, some in tables_of(comparison).items()}
    sources = [f"{model_label(run.name)}: {run.result} of {run.folder}" for run in comparison.runs]
    making = [write("list", sources), write("commands", "\n".join(commands))]
    content = {
        "Results": [*made["results"], plots.dot_plot(summary)],
        "Differences": made["differences"],
        "Learning curves": _curves(comparison),
        "Student and teacher": _teacher(comparison),
        "How answers end": [plots.stacked_bars(summary), *made["failures"]],
        "Boards where the runs differ": _gallery(comparison),
        "By level": made["levels"],
        "Reading and planning": made["reading"],
        "Rules and tries": made["rules"],
        "How this was made": [*made["settings"], *making],
    }
    return Page(
        title=title,
        order=headline(comparison),
        verdict="",
        tiles=[
            tile(name, "picture", model_label(name), summary, models)
            for name, *_ in parts(summary, "picture")
        ],
        key=_NOTE + " >: the interval of the difference leaves out 0; ≈: it does not.",
        sections=[
            Section(heading.lower().replace(" ", "-"), heading, found)
            for heading, found in content.items()
            if found
        ],
    )


def _curves(comparison: Comparison) -> list[Markup]:
    content = []
    for stage, names in _CURVES.items():
        drawn = []
        for name in names:
            series = {run.name: curve_of(run, stage, name) for run in comparison.runs}
            there = {run: curve for run, curve in series.items() if curve is not None}
            if there:
                drawn.append(curves.overlay(name, there, comparison.results))
        if drawn:
            content += [write("heading", stage.capitalize()), write("panels", drawn)]
    if content:
        content.insert(0, curves.legend(comparison.results))
    return content + [
        missing(f"No curve of {run.name}: {stage.missing}.")
        for run in comparison.runs
        for stage in run.stages
        if stage.missing
    ]


def _teacher(comparison: Comparison) -> list[Markup]:
    drawn = []
    for prefix, title in (
        ("kl_pos", "KL to the teacher by position (nats)"),
        ("kl", "KL to the teacher by token group (nats)"),
        ("agree_pos", "Same next token as the teacher, by position"),
        ("agree", "Same next token as the teacher, by token group"),
    ):
        series = {run.name: ends(run, prefix) for run in comparison.runs}
        series = {run: found for run, found in series.items() if found}
        names = {name for found in series.values() for name in found}
        ordered = [name for name in _SEGMENTS if name in names]
        if prefix.endswith("_pos"):
            ordered = sorted(names, key=_first_position)
        if ordered:
            joined = prefix.endswith("_pos")
            drawn.append(
                curves.categories(title, series, ordered, comparison.results, joined=joined)
            )
    if not drawn:
        return []
    intro = (
        "Over the student's own responses, mean over the last tenth of the steps of distillation."
    )
    return [paragraph(intro), curves.legend(comparison.results), write("panels", drawn)]


def _first_position(name: str) -> int:
    """Where a range such as '16-63' or '256-' starts."""
    return int(name.replace("+", "-").split("-")[0])


def _gallery(comparison: Comparison) -> list[Markup]:
    picks = []
    for board, rows in disputed(comparison):
        solved = [model_label(name) for name, row in rows.items() if row["outcome"]["success"]]
        failed = [model_label(name) for name, row in rows.items() if not row["outcome"]["success"]]
        why = f"solved by {', '.join(solved)}; not by {', '.join(failed)}"
        picks.append(boards.Pick(board, why, rows))
    if not picks:
        return [missing("No board is solved by some of the runs and not by others.")]
    intro = "Of each task up to 4, evenly spread over levels and boards. "
    return [paragraph(intro + HOW_TO_READ_ROUTES), boards.gallery(picks)]


def as_json(title: str, comparison: Comparison, commands: Sequence[str]) -> dict[str, object]:
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
            {"later": later, "earlier": earlier, "macro": whole, "tasks": by_task}
            for later, earlier, whole, by_task in pair_differences(comparison)
        ],
        "settings": differing_settings(comparison.runs),
        "summary": comparison.summary,
        "commands": list(commands),
    }
