"""The page about one evaluation and the stages behind it, with its markdown and JSON twins."""

import dataclasses
import functools
from collections.abc import Mapping, Sequence

from etils import epath
from markupsafe import Markup

from mgsd_jax.data.prompts import BUILT_IN, Prompts
from mgsd_jax.evaluation.summary import MODELS
from mgsd_jax.report import boards, curves, findings, inputs, making, plots, tables
from mgsd_jax.report.boards import Pick
from mgsd_jax.report.findings import Fall
from mgsd_jax.report.inputs import Curve, Evaluation, PathLike, Stage
from mgsd_jax.report.making import Made
from mgsd_jax.report.markup import write
from mgsd_jax.report.page import PUBLISHED, Section, gallery, missing, tables_html, write_page
from mgsd_jax.report.words import TASKS, metric, model_label, order, verdict

HEADINGS = {
    "examples": "One board of each task",
    "exchange": "What goes in, what comes out",
    "results": "Results",
    "worse": "What became worse",
    "levels": "By task and level",
    "diagnostics": "State or plan?",
    "errors": "How answers end",
    "perception": "Questions about the picture",
    "curves": "Learning curves",
    "boards": "More boards",
    "making": "How this was made",
}
_DRAWN = ("examples", "exchange", "boards")  # what the markdown twin leaves out
_KEY = (
    "Solved boards, mean over tasks and levels. Intervals hold 95 %: those of shares are Agresti "
    "and Coull's, with every level a stratum; those of differences are a bootstrap over the boards "
    "that both sides were asked. > and <: that of the difference leaves out 0; ≈: it does not."
)
_SHOWN_CURVES = 15
_CURVE_NOTE = (
    "The line is the mean of neighbouring steps, the band their lowest and highest value, the "
    "number the last value."
)


@dataclasses.dataclass(frozen=True)
class Report:
    """All that the page is made of."""

    title: str
    evaluation: Evaluation
    stages: Sequence[Stage]
    made: Sequence[Made]
    prompts: Prompts

    @functools.cached_property
    def falls(self) -> list[Fall]:
        """What the last model does worse than one before it."""
        return findings.falls(self.evaluation.rows)

    @property
    def verdict(self) -> list[str]:
        """What the numbers show, and what of them speaks against it."""
        summary = self.evaluation.summary
        known = [modes for name, modes in summary["models"].items() if name in MODELS]
        asked = sum("perception" in modes for modes in known)
        against = findings.sentence(self.falls, were_asked=asked > 1)
        return [verdict(summary), *([against] if len(known) > 1 else [])]


def build_report(
    evaluation_folder: PathLike,
    runs: Mapping[str, PathLike],
    out_path: PathLike,
    *,
    title: str,
    boards_folder: PathLike | None = None,
    prompts: Prompts = BUILT_IN,
) -> epath.Path:
    """Write the page `out_path` with its .md and .json twins beside it, and return its path.

    `evaluation_folder` holds `rows.jsonl` and `summary.json`; `runs` maps stages ('grounding',
    'distillation' or others) to their folders, and the page says which stages have no curves.
    `boards_folder` is what `generate` wrote, `prompts` what the models were asked with. Raises
    ValueError naming the file where results are absent, empty or contradict each other.
    """
    stages = [
        inputs.read_stage(name, runs.get(name)) for name in {**dict.fromkeys(inputs.STAGES), **runs}
    ]
    evaluation = inputs.read_evaluation(evaluation_folder)
    made = [making.read_made("generate", boards_folder)] if boards_folder else []
    made += [making.read_made(s.name, runs[s.name], s) for s in stages if s.name in runs]
    tokens = inputs.count_tokens(evaluation.rows)
    made.append(making.read_made("evaluate", evaluation_folder, tokens=tokens))
    report = Report(title, evaluation, stages, made, prompts)
    picks = boards.choose(evaluation.rows)
    record = {
        "title": title,
        "order": order(evaluation.summary),
        "verdict": report.verdict,
        "worse": [fall._asdict() for fall in report.falls],
        "summary": evaluation.summary,
        "stages": {
            stage.name: {
                "missing": stage.missing,
                "curves": {curve.name: _curve_values(curve) for curve in stage.curves},
            }
            for stage in stages
        },
        "gallery": [{"kind": pick.kind, "board": list(pick.board)} for pick in picks],
        "making": making.facts(made),
        "commands": making.commands(made),
    }
    sections = make_sections(report, picks)
    return write_page(out_path, evaluation.summary, sections, markdown(report), record, key=_KEY)


def tables_of(report: Report) -> dict[str, list[tables.Table]]:
    """Return every table of the report by section."""
    summary = report.evaluation.summary
    asked = inputs.tasks(summary, "perception")
    made = {
        "perception": [tables.perception(summary, task) for task in asked],
        "worse": [findings.table(report.falls)] if report.falls else [],
        "making": [making.costs(report.made)],
    }
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
        "diagnostics": [
            tables.diagnostics(summary),
            *tables.facts_by_kind(summary),
            *tables.gaps(summary),
        ],
        "errors": [tables.errors(summary), tables.reasons(summary)],
        **made,
    }


def make_sections(report: Report, picks: Sequence[Pick]) -> list[Section]:
    """Return the sections of HEADINGS; where there is nothing to show, they say so."""
    summary = report.evaluation.summary
    made = tables_html(tables_of(report))
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
        differences, *rest = made["results"]
        published = write("paragraph", PUBLISHED, "note")
        folded = {name: _folded(made[name]) for name in ("levels", "errors")}
        content |= {
            "results": [plots.dot_plot(summary), differences, published, _folded(rest)],
            "levels": [write("legend", marks), write("panels", levels), folded["levels"]],
            "diagnostics": made["diagnostics"],
            "errors": [plots.stacked_bars(summary), folded["errors"]],
        }
    intro = "Share of right answers to the grounding questions, picture in sight."
    asked = [write("paragraph", intro), write("wide", made["perception"])]
    curve_parts = [html for stage in report.stages for html in _stage(stage)]
    against = report.verdict[1:] or ["There is no model before the last to compare it with."]
    content |= {
        **_boards(report, picks),
        "worse": made["worse"] or [write("paragraph", part) for part in against],
        "perception": asked
        if made["perception"]
        else [missing("No model was asked the grounding questions in this evaluation.")],
        "curves": [write("paragraph", _CURVE_NOTE), *curve_parts],
        "making": _making(report, made["making"]),
    }
    return [Section(name, heading, content[name]) for name, heading in HEADINGS.items()]


def _folded(made: Sequence[Markup]) -> Markup:
    """Tables that repeat what a plot shows, with all their numbers."""
    return write("details", "The numbers", made) if made else Markup("")


def _boards(report: Report, picks: Sequence[Pick]) -> dict[str, list[Markup]]:
    """The sections that show boards: one of each task, one with all that was said, the others."""
    if not picks:
        nothing = [missing("No board was answered from the picture by every model.")]
        return dict.fromkeys(_DRAWN, nothing)
    shown = boards.examples(picks)
    more = [pick for pick in picks if pick not in shown]
    quota = ", ".join(f"{count} {kind}" for kind, count in boards.QUOTA.items())
    choice = (
        "The same boards for every model. The choice is by rule, not by eye: of each task up to "
        f"{quota}, evenly spread over levels and boards."
    )
    first = shown[0]
    task, level, index = first.board
    answers = [
        (model_label(name), boards.outcome_words(row), row) for name, row in first.rows.items()
    ]
    title = f"{TASKS[task]}, level {level}, board {index}: the first board above"
    prompt = report.prompts.template(task, "student")
    return {
        "examples": gallery(shown, "The first of the boards that the rule below chooses."),
        "exchange": [write("exchange", title, prompt, answers)],
        "boards": gallery(more, choice, len(shown)),
    }


def _making(report: Report, costs: Sequence[Markup]) -> list[Markup]:
    """Commands, settings, code and costs, as the folders of the stages have them."""
    counts = ", ".join(
        f"{model_label(model)} {sum(part['n'] for part in by_mode.values())}"
        for model, by_mode in report.evaluation.summary["models"].items()
    )
    said = "\n".join(making.commands(report.made)) or making.NO_COMMANDS
    facts = [*making.facts(report.made), f"Answered prompts: {counts}"]
    return [write("commands", said), write("list", facts), *costs]


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
    return sorted(found, key=lambda curve: (metric(curve.name).rank, curve.name))


def markdown(report: Report) -> str:
    """Return the verdict, every table, what is missing and the commands as GitHub markdown."""
    summary, made = report.evaluation.summary, tables_of(report)
    lines = [f"# {report.title}", "", f"**{order(summary)}.** {' '.join(report.verdict)}", ""]
    for name, heading in HEADINGS.items():
        if name == "curves":
            lines += [f"## {heading}", "", *map(_ends, report.stages), "", PUBLISHED, ""]
        elif made.get(name) and name != "making":
            lines += [f"## {heading}", "", *map(tables.to_markdown, made[name])]
    lines += [f"## {HEADINGS['making']}", "", *map(tables.to_markdown, made["making"])]
    lines += [f"- {fact}" for fact in making.facts(report.made)]
    return "\n".join([*lines, "", "```sh", *making.commands(report.made), "```", ""])


def _ends(stage: Stage) -> str:
    """How the curves of a stage begin and end."""
    ends = [
        f"{metric(curve.name).title} {curves.short(curve.values[0])} → "
        f"{curves.short(curve.values[-1])}"
        for curve in sort_curves(stage.curves)[:_SHOWN_CURVES]
        if curve.values
    ]
    return f"- {stage.name}: {stage.missing or '; '.join(ends)}"


def _curve_values(curve: Curve) -> dict[str, object]:
    """A curve as JSON, a long one by the means of its bins."""
    bins = curves.bin_curve(curve) if curve.values else []
    return {
        "steps": [step for step, *_ in bins],
        "means": [mean for _, mean, *_ in bins],
        "last": curve.values[-1] if curve.values else None,
        "not_finite": curve.not_finite,
    }
