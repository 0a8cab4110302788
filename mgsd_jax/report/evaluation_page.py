"""The page about one evaluation and the stages behind it, with its markdown and JSON twins."""

import re
from collections.abc import Mapping, Sequence

from etils import epath
from markupsafe import Markup

from mgsd_jax.report import boards, curves, plots, tables
from mgsd_jax.report.inputs import (
    STAGES,
    Curve,
    PathLike,
    Stage,
    Summary,
    parts,
    read_evaluation,
    read_stage,
)
from mgsd_jax.report.markup import join, write
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
from mgsd_jax.report.words import TASKS, model_label, order, verdict

HEADINGS = {
    "results": "Results",
    "levels": "By task and level",
    "diagnostics": "State or plan?",
    "errors": "How answers end",
    "perception": "Questions about the picture",
    "curves": "Learning curves",
    "boards": "Boards",
    "making": "How this was made",
}
_NO_PLANS = "No model was asked for a plan in this evaluation."
_SHOWN_CURVES = 12
# The first pattern that a name matches is its rank; ties are in order of name, the rest comes last.
_CURVE_ORDER = (
    *(r"loss$", r"^val/success$", r"^val/", r"^(rollout/)?success$", r"^kl(/|$)"),
    *(r"accuracy|exact", r"optimal$", r"entropy|agree", r"grad_norm", r"length$", r"truncated"),
    *(r"(parsed|legal)$", r"^rollout/", r"^kl", r"seconds"),
)


def build_report(
    evaluation_folder: PathLike,
    runs: Mapping[str, PathLike],
    out_path: PathLike,
    *,
    title: str,
    commands: Sequence[str] = (),
) -> epath.Path:
    """Write the page `out_path` with its .md and .json twins beside it, and return its path.

    `evaluation_folder` holds `rows.jsonl` and `summary.json`; `runs` maps stages ('grounding',
    'distillation' or others) to their folders, and the page says which stages have no curves.
    `commands` are the command lines that made the results. Raises ValueError naming the file where
    results are absent, empty or contradict each other.
    """
    out = check_path(out_path)
    evaluation = read_evaluation(evaluation_folder)
    names = [*STAGES, *(name for name in runs if name not in STAGES)]
    stages = [read_stage(name, runs.get(name)) for name in names]
    picks = boards.choose(evaluation.rows)
    summary = evaluation.summary
    models = list(summary["models"])
    tiles = [
        tile(model, mode, plots.who(model, mode), summary, models)
        for model, mode, _ in (*parts(summary, "picture"), *parts(summary, "text"))
        if mode == "picture" or model == "base"
    ]
    key = (
        "Solved boards, mean over tasks and levels, with 95 % intervals. > and <: the paired 95 % "
        "interval of the difference leaves out 0; ≈: it does not."
    )
    sections = make_sections(summary, stages, picks, commands)
    page = Page(title, order(summary), verdict(summary), tiles, key, sections)
    record = as_json(title, summary, stages, picks, commands)
    write_page(out, page, markdown(title, summary, stages, commands), record)
    return out


def tables_of(summary: Summary) -> dict[str, list[tables.Table]]:
    """Return every table of the report by section."""
    asked = {task for *_, part in parts(summary, "perception") for task in part["tasks"]}
    questions = [tables.perception(summary, task) for task in TASKS if task in asked]
    planned = {task for *_, part in parts(summary) for task in part["tasks"]}
    if not planned:
        return {"perception": questions}
    return {
        "results": [
            tables.comparisons(summary),
            tables.overall(summary),
            *tables.passes(summary),
            *tables.rule_sets(summary),
        ],
        "levels": [tables.by_level(summary, task) for task in TASKS if task in planned],
        "diagnostics": [tables.diagnostics(summary), *tables.gaps(summary)],
        "errors": [tables.errors(summary), tables.reasons(summary)],
        "perception": questions,
    }


def make_sections(
    summary: Summary,
    stages: Sequence[Stage],
    picks: Sequence[boards.Pick],
    commands: Sequence[str],
) -> list[Section]:
    """Return the sections of HEADINGS; what there is nothing for says so."""
    made = {name: html(some) for name, some in tables_of(summary).items()}
    content = {name: [missing(_NO_PLANS)] for name in HEADINGS}
    if "results" in made:
        planned = [task for task in TASKS if any(task in p["tasks"] for *_, p in parts(summary))]
        levels = [curves.level_plot(summary, task) for task in planned]
        numbers = "The numbers, and what the simulator said"
        content |= {
            "results": [
                plots.dot_plot(summary),
                *made["results"],
                paragraph(PUBLISHED, "note"),
            ],
            "levels": [plots.legend(summary), write("panels", levels), *made["levels"]],
            "diagnostics": made["diagnostics"],
            "errors": [
                plots.stacked_bars(summary),
                write("details", numbers, join(made["errors"])),
            ],
        }
    counts = ", ".join(
        f"{model_label(model)} {sum(part['n'] for part in by_mode.values())}"
        for model, by_mode in summary["models"].items()
    )
    lines = "\n".join(commands) or "(no commands were given)"
    content |= {
        "perception": _perception(made["perception"]),
        "curves": _curves(stages),
        "boards": _gallery(picks),
        "making": [paragraph(f"Answered prompts: {counts}."), write("commands", lines)],
    }
    return [Section(name, heading, content[name]) for name, heading in HEADINGS.items()]


def _perception(made: Sequence[Markup]) -> list[Markup]:
    if not made:
        return [missing("No model was asked the grounding questions in this evaluation.")]
    intro = paragraph("Share of right answers to the grounding questions, picture in sight.")
    return [intro, write("wide", made)]


def _curves(stages: Sequence[Stage]) -> list[Markup]:
    content = [
        paragraph(
            "The line is the mean of neighbouring steps, the band their lowest and highest value, "
            "the number the last value."
        )
    ]
    for stage in stages:
        content.append(write("heading", stage.name.capitalize()))
        if stage.missing:
            content.append(missing(f"No learning curve: {stage.missing}."))
            continue
        drawn = [curves.curve_plot(curve) for curve in sort_curves(stage.curves)]
        content.append(write("panels", drawn[:_SHOWN_CURVES], stage.name))
        if rest := drawn[_SHOWN_CURVES:]:
            words = f"{len(rest)} more curves of {stage.name}"
            content.append(write("details", words, write("panels", rest, stage.name)))
    return content


def _gallery(picks: Sequence[boards.Pick]) -> list[Markup]:
    if not picks:
        return [missing("No board was answered from the picture by every model.")]
    quota = ", ".join(f"{count} {kind}" for kind, count in boards.QUOTA.items())
    intro = (
        "The same boards for every model. The choice is by rule, not by eye: of each task up to "
        f"{quota}, evenly spread over levels and boards. "
    )
    return [paragraph(intro + HOW_TO_READ_ROUTES), boards.gallery(picks)]


def sort_curves(found: Sequence[Curve]) -> list[Curve]:
    """Return the curves in the order in which a reader wants them."""

    def rank(curve: Curve) -> tuple[int, str]:
        ranks = (i for i, rule in enumerate(_CURVE_ORDER) if re.search(rule, curve.name))
        return next(ranks, len(_CURVE_ORDER)), curve.name

    return sorted(found, key=rank)


def markdown(title: str, summary: Summary, stages: Sequence[Stage], commands: Sequence[str]) -> str:
    """Return the verdict, every table, what is missing and the commands as GitHub markdown."""
    lines = [f"# {title}", "", f"**{order(summary)}.** {verdict(summary)}", ""]
    for name, made in tables_of(summary).items():
        if made:
            lines += [f"## {HEADINGS[name]}", "", *map(tables.to_markdown, made)]
    lines += [f"## {HEADINGS['curves']}", ""]
    lines += [f"- {stage.name}: {stage.missing or _curve_words(stage)}" for stage in stages]
    lines += ["", PUBLISHED, ""]
    if commands:
        lines += [f"## {HEADINGS['making']}", "", "```sh", *commands, "```", ""]
    return "\n".join(lines)


def _curve_words(stage: Stage) -> str:
    return "; ".join(
        f"{curve.name} {curves.short(curve.values[0])} → {curves.short(curve.values[-1])}"
        for curve in sort_curves(stage.curves)[:_SHOWN_CURVES]
        if curve.values
    )


def as_json(
    title: str,
    summary: Summary,
    stages: Sequence[Stage],
    picks: Sequence[boards.Pick],
    commands: Sequence[str],
) -> dict[str, object]:
    """Return what the page shows as JSON values; long curves as their bins."""
    return {
        "title": title,
        "order": order(summary),
        "verdict": verdict(summary),
        "summary": summary,
        "stages": {
            stage.name: {
                "missing": stage.missing,
                "curves": {curve.name: _curve_values(curve) for curve in stage.curves},
            }
            for stage in stages
        },
        "gallery": [{"kind": pick.kind, "board": list(pick.board)} for pick in picks],
        "commands": list(commands),
    }


def _curve_values(curve: Curve) -> dict[str, object]:
    bins = curves.bin_curve(curve) if curve.values else []
    return {
        "steps": [step for step, *_ in bins],
        "means": [mean for _, mean, *_ in bins],
        "last": curve.values[-1] if curve.values else None,
        "not_finite": curve.not_finite,
    }
