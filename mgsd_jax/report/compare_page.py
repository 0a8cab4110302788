"""The page that compares runs, with its markdown and JSON twins."""

from collections.abc import Sequence

from etils import epath
from markupsafe import Markup

from mgsd_jax.report import boards, curves, inputs, making, plots, tables
from mgsd_jax.report import compare as runs_lib
from mgsd_jax.report.compare import Comparison, Run
from mgsd_jax.report.inputs import PathLike, parts
from mgsd_jax.report.markup import write
from mgsd_jax.report.page import PUBLISHED, Section, gallery, missing, tables_html, write_page
from mgsd_jax.report.tables import Cell, Table, make_table, points_cell
from mgsd_jax.report.words import DASH, ERRORS, TASKS, compared, model_label, reason_label

_CURVES = {
    "grounding": ("loss", "val/loss"),
    "distillation": (
        *("val/success", "val/kl", "val/state_exact", "loss", "rollout/success"),
        *("teacher_agreement", "student_entropy", "rollout/length", "rollout/truncated"),
    ),
}
# Metrics of distillation by response position and by token group.
_TEACHER = {
    "kl_pos": ("KL to the teacher by position", "nats a token"),
    "kl": ("KL to the teacher by part of the response", "nats a token"),
    "agree_pos": ("Same next token as the teacher, by position", "share of tokens"),
    "agree": ("Same next token as the teacher, by part of the response", "share of tokens"),
}
_PREFIXES = ("kl", "kl_pos", "agree", "agree_pos")
_SEGMENTS = ("state", "sentence", "plan", "format")
_NOTE = (
    "Level-balanced success from the picture, with Agresti and Coull's 95 % intervals (every level "
    "a stratum). Differences are paired board by board and bootstrapped; their p-values are "
    "two-sided and not adjusted for the number of comparisons."
)


def build_comparison(folders: Sequence[str], out_path: PathLike, *, model: str = "") -> epath.Path:
    """Write the page that compares runs with its .md and .json twins, and return its path.

    `folders` are workdirs or evaluation folders; `model` stands for each run, by default its last
    one. Raises ValueError naming the folder where a run has no results.
    """
    comparison = runs_lib.compare(folders, model)
    title = f"Comparison of {' and '.join(comparison.results)}"
    record = {
        "title": title,
        "order": headline(comparison),
        "runs": {
            run.name: {
                "folder": run.folder,
                "model": run.result,
                "ends": {prefix: runs_lib.ends(run, prefix) for prefix in _PREFIXES},
            }
            for run in comparison.runs
        },
        "differences": [
            {"later": later, "earlier": earlier, "macro": whole, "tasks": by_task}
            for later, earlier, whole, by_task in runs_lib.pair_differences(comparison)
        ],
        "settings": runs_lib.differing_settings(comparison.runs),
        "summary": comparison.summary,
        "commands": {run.name: making.commands(run.made) for run in comparison.runs},
    }
    lines = [f"# {title}", "", f"**{headline(comparison)}**", ""]
    lines += [
        tables.to_markdown(table) for made in tables_of(comparison).values() for table in made
    ]
    return write_page(
        out_path,
        comparison.shown,
        make_sections(comparison),
        "\n".join([*lines, *(f"- {run.name}: {line}" for run, line in _facts(comparison)), ""]),
        record,
        key=_NOTE + " >: the interval of the difference leaves out 0; ≈: it does not.",
    )


def headline(comparison: Comparison) -> str:
    """Return the runs from best to worst, as 'b > a ≈ c', by their paired intervals."""
    models = comparison.summary["models"]
    order = sorted(comparison.results, key=lambda name: -models[name]["picture"]["macro"]["value"])
    return compared(order, comparison.summary)


def tables_of(comparison: Comparison) -> dict[str, list[Table]]:
    """Return every table of the page by section."""
    summary = comparison.shown
    tasks = inputs.tasks(summary, "picture")
    return {
        "results": [results_table(comparison)],
        "differences": [differences_table(comparison)],
        "levels": [tables.by_level(summary, task) for task in tasks],
        "rules": [*tables.rule_sets(summary), *tables.passes(summary)],
        "reading": [tables.diagnostics(summary), *tables.facts_by_kind(summary)],
        "failures": [failures_table(comparison), tables.errors(summary)],
        "settings": [settings_table(comparison)],
    }


def results_table(comparison: Comparison) -> Table:
    """Every model from text and from pictures."""
    shown = [*parts(comparison.shown, "text"), *parts(comparison.shown, "picture")]
    known = comparison.shown["models"]
    shown += [part for part in parts(comparison.summary, "picture") if part[0] not in known]
    note = "Success: a task is the mean over its levels, macro the mean over tasks. " + PUBLISHED
    return tables.results("Results", shown, note)


def differences_table(comparison: Comparison) -> Table:
    """A row for every two runs, in points: all tasks, then task by task."""
    found = runs_lib.pair_differences(comparison)
    none = "no board in common"
    columns = {"macro": [points_cell(whole, none) for *_, whole, _ in found]}
    for task, title in TASKS.items():
        if any(task in by_task for *_, by_task in found):
            columns[title] = [points_cell(by_task.get(task), none) for *_, by_task in found]
    columns["boards in common"] = [tables.count_cell(whole) for *_, whole, _ in found]
    labels = [(f"{model_label(later)} − {model_label(earlier)}",) for later, earlier, *_ in found]
    return make_table("Paired differences", ("compared",), labels, columns, _NOTE)


def failures_table(comparison: Comparison) -> Table:
    """The failures that are most frequent over all results, with each one's count."""
    found = runs_lib.frequent_failures(comparison)
    columns = {}
    for name in comparison.results:
        n = comparison.summary["models"][name]["picture"]["n"]
        columns[name] = [tables.share_cell(count[name], n) for count in found.values()]
    labels = [
        (Cell(f"{ERRORS[error]}; {reason_label(reason)}", TASKS[task]),)
        for task, error, reason in found
    ]
    note = "Answers to pictures. What went wrong first, then what the simulator said."
    return make_table("Most frequent failures", ("how it fails",), labels, columns, note)


def settings_table(comparison: Comparison) -> Table:
    """The settings in which the runs differ."""
    found = runs_lib.differing_settings(comparison.runs)
    texts = [[DASH if v is None else str(v)[:60] for v in values] for values in found.values()]
    columns = {run.name: [Cell(row[i]) for row in texts] for i, run in enumerate(comparison.runs)}
    note = "Of the stages whose settings were found; folders are left out."
    if not found:
        note = "No setting differs, or none was found. " + note
    labels = [(name,) for name in found]
    return make_table("Where the settings differ", ("setting",), labels, columns, note)


def _facts(comparison: Comparison) -> list[tuple[Run, str]]:
    """What the folders of each run say of how it was made."""
    return [(run, line) for run in comparison.runs for line in making.facts(run.made)]


def make_sections(comparison: Comparison) -> list[Section]:
    """Return the sections of the page; one with nothing in it is left out."""
    made = tables_html(tables_of(comparison))
    sources = [f"{model_label(run.name)}: {run.result} of {run.folder}" for run in comparison.runs]
    content = {
        "Results": [*made["results"], plots.dot_plot(comparison.shown)],
        "Differences": made["differences"],
        "Learning curves": _curves(comparison),
        "Student and teacher": _teacher(comparison),
        "How answers end": [plots.stacked_bars(comparison.shown), *made["failures"]],
        "Boards where the runs differ": _gallery(comparison),
        "By level": made["levels"],
        "Reading and planning": made["reading"],
        "Rules and tries": made["rules"],
        "How this was made": [
            *made["settings"],
            write("list", sources),
            *(write("details", model_label(run.name), _made(run)) for run in comparison.runs),
        ],
    }
    return [
        Section(heading.lower().replace(" ", "-"), heading, found)
        for heading, found in content.items()
        if found
    ]


def _made(run: Run) -> list[Markup]:
    """Commands, facts and costs of one run."""
    commands = "\n".join(making.commands(run.made)) or making.NO_COMMANDS
    costs = write("table", making.costs(run.made))
    return [write("commands", commands), write("list", making.facts(run.made)), costs]


def _curves(comparison: Comparison) -> list[Markup]:
    content = []
    for stage, names in _CURVES.items():
        found = {run.name: runs_lib.curves_of(run, stage) for run in comparison.runs}
        drawn = [
            curves.overlay(name, there, comparison.results)
            for name in names
            if (there := {run: some[name] for run, some in found.items() if name in some})
        ]
        if drawn:
            content += [write("heading", stage.capitalize()), write("panels", drawn)]
    legend = [curves.legend(comparison.results)] if content else []
    absent = [
        missing(f"No curve of {run.name}: {stage.missing}.")
        for run in comparison.runs
        for stage in run.stages
        if stage.missing
    ]
    return legend + content + absent


def _teacher(comparison: Comparison) -> list[Markup]:
    drawn = []
    for prefix, (title, unit) in _TEACHER.items():
        series = {run.name: runs_lib.ends(run, prefix) for run in comparison.runs}
        series = {run: found for run, found in series.items() if found}
        names = {name for found in series.values() for name in found}
        joined = prefix.endswith("_pos")
        order = sorted(names, key=_start) if joined else [s for s in _SEGMENTS if s in names]
        if order:
            runs = comparison.results
            drawn.append(curves.categories(title, unit, series, order, runs, joined=joined))
    if not drawn:
        return []
    intro = (
        "Over the student's own responses, mean over the last tenth of the steps of distillation."
    )
    legend = curves.legend(comparison.results)
    return [write("paragraph", intro), legend, write("panels", drawn)]


def _start(name: str) -> int:
    """Where a range of positions starts: '16-63', '256-', or '256+' of older versions."""
    return int(name.replace("+", "-").split("-")[0])


def _gallery(comparison: Comparison) -> list[Markup]:
    picks = []
    for board, rows in runs_lib.disputed(comparison):
        names: dict[bool, list[str]] = {True: [], False: []}
        for name, row in rows.items():
            names[row["outcome"]["success"]].append(model_label(name))
        why = f"solved by {', '.join(names[True])}; not by {', '.join(names[False])}"
        picks.append(boards.Pick(board, why, rows))
    if not picks:
        return [missing("No board is solved by some of the runs and not by others.")]
    return gallery(picks, "Of each task up to 4, evenly spread over levels and boards.")
