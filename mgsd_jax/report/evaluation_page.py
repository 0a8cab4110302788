"""The page about one evaluation and the stages behind it, with its markdown and JSON twins."""

import re
from collections.abc import Mapping, Sequence

from etils import epath
from markupsafe import Markup

from mgsd_jax.evaluation.summary import Summary
from mgsd_jax.report import boards, curves, inputs, plots, tables
from mgsd_jax.report.inputs import Curve, PathLike, Stage
from mgsd_jax.report.markup import write
from mgsd_jax.report.page import PUBLISHED, Section, gallery, missing, tables_html, write_page
from mgsd_jax.report.words import model_label, order, verdict

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
_SHOWN_CURVES = 12
# The first pattern that a name matches is its rank; ties are in order of name, the rest comes last.
_CURVE_ORDER = (
    *(r"loss$", r"^val/success$", r"^val/", r"^(rollout/)?success$", r"^kl(/|$)"),
    *(r"accuracy|exact", r"optimal$", r"entropy|agree", r"grad_norm", r"length$", r"truncated"),
    *(r"(parsed|legal)$", r"^rollout/", r"^kl", r"seconds"),
)
_CURVE_NOTE = (
    "The line is the mean of neighbouring steps, the band their lowest and highest value, the "
    "number the last value."
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
    evaluation = inputs.read_evaluation(evaluation_folder)
    summary = evaluation.summary
    stages = [
        inputs.read_stage(name, runs.get(name)) for name in {**dict.fromkeys(inputs.STAGES), **runs}
    ]
    picks = boards.choose(evaluation.rows)
    record = {
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
    return write_page(
        out_path,
        summary,
        make_sections(summary, stages, picks, commands),
        markdown(title, summary, stages, commands),
        record,
        key="Solved boards, mean over tasks and levels, with 95 % intervals. > and <: the paired "
        "95 % interval of the difference leaves out 0; ≈: it does not.",
    )


def tables_of(summary: Summary) -> dict[str, list[tables.Table]]:
    """Return every table of the report by section."""
    asked = inputs.tasks(summary, "perception")
    made = {"perception": [tables.perception(summary, task) for task in asked]}
    planned = inputs.tasks(summary)
    if not planned:
        return made
    return {
        "results": [
            tables.comparisons(summary),
            tables.overall(summary),
            *tables.passes(summary),
            *tables.rule_sets(summary),
        ],
        "levels": [tables.by_level(summary, task) for task in planned],
        "diagnostics": [tables.diagnostics(summary), *tables.gaps(summary)],
        "errors": [tables.errors(summary), tables.reasons(summary)],
        **made,
    }


def make_sections(
    summary: Summary,
    stages: Sequence[Stage],
    picks: Sequence[boards.Pick],
    commands: Sequence[str],
) -> list[Section]:
    """Return the sections of HEADINGS; where there is nothing to show, they say so."""
    made = tables_html(tables_of(summary))
    content = {
        name: [missing("No model was asked for a plan in this evaluation.")] for name in HEADINGS
    }
    if "results" in made:
        models = list(summary["models"])
        marks = [
            (plots.icon(model, mode, models), plots.who(model, mode))
            for model, mode, _ in plots.featured(summary, "picture", "text")
        ]
        levels = [curves.level_plot(summary, task) for task in inputs.tasks(summary)]
        published = write("paragraph", PUBLISHED, "note")
        numbers = "The numbers, and what the simulator said"
        content |= {
            "results": [plots.dot_plot(summary), *made["results"], published],
            "levels": [write("legend", marks), write("panels", levels), *made["levels"]],
            "diagnostics": made["diagnostics"],
            "errors": [plots.stacked_bars(summary), write("details", numbers, made["errors"])],
        }
    intro = "Share of right answers to the grounding questions, picture in sight."
    asked = [write("paragraph", intro), write("wide", made["perception"])]
    quota = ", ".join(f"{count} {kind}" for kind, count in boards.QUOTA.items())
    choice = (
        "The same boards for every model. The choice is by rule, not by eye: of each task up to "
        f"{quota}, evenly spread over levels and boards."
    )
    counts = ", ".join(
        f"{model_label(model)} {sum(part['n'] for part in by_mode.values())}"
        for model, by_mode in summary["models"].items()
    )
    lines = "\n".join(commands) or "(no commands were given)"
    content |= {
        "perception": asked
        if made["perception"]
        else [missing("No model was asked the grounding questions in this evaluation.")],
        "curves": [write("paragraph", _CURVE_NOTE), *(html for s in stages for html in _stage(s))],
        "boards": gallery(picks, choice)
        if picks
        else [missing("No board was answered from the picture by every model.")],
        "making": [write("paragraph", f"Answered prompts: {counts}."), write("commands", lines)],
    }
    return [Section(name, heading, content[name]) for name, heading in HEADINGS.items()]


def _stage(stage: Stage) -> list[Markup]:
    heading = write("heading", stage.name.capitalize())
    if stage.missing:
        return [heading, missing(f"No learning curve: {stage.missing}.")]
    drawn = [curves.curve_plot(curve) for curve in sort_curves(stage.curves)]
    shown, rest = drawn[:_SHOWN_CURVES], drawn[_SHOWN_CURVES:]
    content = [heading, write("panels", shown, stage.name)]
    if rest:
        words = f"{len(rest)} more curves of {stage.name}"
        content.append(write("details", words, [write("panels", rest, stage.name)]))
    return content


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
    for stage in stages:
        ends = [
            f"{curve.name} {curves.short(curve.values[0])} → {curves.short(curve.values[-1])}"
            for curve in sort_curves(stage.curves)[:_SHOWN_CURVES]
            if curve.values
        ]
        lines.append(f"- {stage.name}: {stage.missing or '; '.join(ends)}")
    lines += ["", PUBLISHED, ""]
    if commands:
        lines += [f"## {HEADINGS['making']}", "", "```sh", *commands, "```", ""]
    return "\n".join(lines)


def _curve_values(curve: Curve) -> dict[str, object]:
    """A curve as JSON, a long one by the means of its bins."""
    bins = curves.bin_curve(curve) if curve.values else []
    return {
        "steps": [step for step, *_ in bins],
        "means": [mean for _, mean, *_ in bins],
        "last": curve.values[-1] if curve.values else None,
        "not_finite": curve.not_finite,
    }
