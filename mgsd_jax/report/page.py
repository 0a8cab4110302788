"""The page of a report, section by section, and its markdown and JSON twins."""

import re
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mgsd_jax.report import boards, plots, tables
from mgsd_jax.report.inputs import Curve, Evaluation, Stage
from mgsd_jax.report.style import CSS
from mgsd_jax.report.words import MODES, TASKS, interval, model_label, order, percent, verdict

# Macro averages of the paper (arXiv 2606.06076), from the picture; other boards than ours.
PUBLISHED = (
    "Published macro averages, on other boards and models of other sizes: Qwen3-VL-4B "
    "11.2 → 30.5 %, Qwen3-VL-8B 17.2 → 35.6 %, GPT-5 41.3 %, Gemini-3-Flash 67.0 %."
)
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
# First match first; what matches nothing comes last. Ties are in order of name.
_CURVE_ORDER = (
    r"loss$",
    r"^val/success$",
    r"^val/",
    r"^(rollout/)?success$",
    r"^kl(/|$)",
    r"accuracy|exact",
    r"optimal$",
    r"entropy|agree",
    r"grad_norm",
    r"length$",
    r"truncated",
    r"(parsed|legal)$",
    r"^rollout/",
    r"^kl",
    r"seconds",
)
_CURVE_NOTE = (
    "<p>The line is the mean of neighbouring steps, the band their lowest and highest value, the "
    "number the last value.</p>"
)
_NO_PLANS = "No model was asked for a plan in this evaluation."
OPEN_FOR_PRINT = (
    "addEventListener('beforeprint',()=>document.querySelectorAll('main>section>details')"
    ".forEach(d=>d.open=true))"
)


def tables_of(summary: Mapping[str, Any]) -> dict[str, list[tables.Table]]:
    """Return every table of the report by section, the ones that markdown has too."""
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for modes in summary["models"].values():
        for mode, part in modes.items():
            found[mode == "perception"] |= part["tasks"].keys()
    asked, planned = found[True], found[False]
    has_plans = bool(planned)
    return {
        "results": _there(
            tables.comparisons(summary),
            tables.overall(summary),
            tables.passes(summary),
            tables.rule_sets(summary),
        )
        if has_plans
        else [],
        "levels": [tables.by_level(summary, task) for task in TASKS if task in planned],
        "diagnostics": _there(tables.diagnostics(summary), tables.gaps(summary))
        if has_plans
        else [],
        "errors": [tables.errors(summary), tables.reasons(summary)] if has_plans else [],
        "perception": [tables.perception(summary, task) for task in TASKS if task in asked],
    }


def _there(*made: tables.Table | None) -> list[tables.Table]:
    return [table for table in made if table is not None]


def page(
    title: str,
    evaluation: Evaluation,
    stages: Sequence[Stage],
    picks: Sequence[boards.Pick],
    commands: Sequence[str],
) -> str:
    """Return the whole report as one HTML document that needs no other file and no script."""
    summary = evaluation.summary
    made = tables_of(summary)
    sections = {
        "results": _results(summary, made["results"]),
        "levels": _levels(summary, made["levels"]),
        "diagnostics": _html(made["diagnostics"]) or _missing(_NO_PLANS),
        "errors": _errors(summary, made["errors"]),
        "perception": _perception(made["perception"]),
        "curves": _CURVE_NOTE + "".join(_stage(stage) for stage in stages),
        "boards": _gallery(picks),
        "making": _making(commands, summary),
    }
    links = "".join(f'<a href="#{name}">{heading}</a>' for name, heading in HEADINGS.items())
    body = "".join(
        f'<section id="{name}"><h2>{HEADINGS[name]}</h2>{content}</section>'
        for name, content in sections.items()
    )
    return (
        '<!DOCTYPE html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        '<meta name="color-scheme" content="light dark">'
        f"<title>{escape(title)}</title><style>{CSS}</style></head><body>"
        f'<header><h1>{escape(title)}</h1><p class="order">{escape(order(summary))}</p>'
        f'<p class="verdict">{escape(verdict(summary))}</p>{_tiles(summary)}'
        f'<p class="key">Solved boards, mean over tasks and levels, with 95 % intervals. '
        f"&gt; and &lt;: the paired 95 % interval of the difference leaves out 0; ≈: it does not."
        f'</p><nav aria-label="Sections">{links}</nav></header><main>{body}</main>'
        f"<script>{OPEN_FOR_PRINT}</script></body></html>\n"
    )


def markdown(
    title: str, summary: Mapping[str, Any], stages: Sequence[Stage], commands: Sequence[str]
) -> str:
    """Return the verdict, every table, what is missing and the commands as GitHub markdown."""
    parts = [f"# {title}", "", f"**{order(summary)}.** {verdict(summary)}", ""]
    for name, made in tables_of(summary).items():
        if made:
            parts += [f"## {HEADINGS[name]}", "", *map(tables.to_markdown, made)]
    parts += [f"## {HEADINGS['curves']}", ""]
    parts += [f"- {stage.name}: {stage.missing or _curve_words(stage)}" for stage in stages]
    parts += ["", PUBLISHED, ""]
    if commands:
        parts += [f"## {HEADINGS['making']}", "", "```sh", *commands, "```", ""]
    return "\n".join(parts)


def as_json(
    title: str,
    summary: Mapping[str, Any],
    stages: Sequence[Stage],
    picks: Sequence[boards.Pick],
    commands: Sequence[str],
) -> dict[str, Any]:
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


def sort_curves(curves: Sequence[Curve]) -> list[Curve]:
    """Return the curves in the order in which a reader wants them."""

    def rank(curve: Curve) -> tuple[int, str]:
        found = (i for i, rule in enumerate(_CURVE_ORDER) if re.search(rule, curve.name))
        return next(found, len(_CURVE_ORDER)), curve.name

    return sorted(curves, key=rank)


def _tiles(summary: Mapping[str, Any]) -> str:
    models = summary["models"]
    keys = [(name, "picture") for name in models] + [("base", "text")]
    tiles = []
    for name, mode in keys:
        if name in models and mode in models[name]:
            macro = models[name][mode]["macro"]
            tiles.append(
                f'<div class="tile" style="--c:{plots.colour(name, list(models))}">'
                f'<span class="who">{plots.icon(name, mode, list(models))}'
                f"{escape(model_label(name))}, {MODES[mode]}</span>"
                f"<b>{percent(macro['value'])}</b><span>{interval(macro)}</span></div>"
            )
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _results(summary: Mapping[str, Any], made: Sequence[tables.Table]) -> str:
    if not made:
        return _missing(_NO_PLANS)
    return f'{plots.dot_plot(summary)}{_html(made)}<p class="note">{PUBLISHED}</p>'


def _levels(summary: Mapping[str, Any], made: Sequence[tables.Table]) -> str:
    if not made:
        return _missing(_NO_PLANS)
    tasks = [task for task, label in TASKS.items() if label in {table.title for table in made}]
    panels = "".join(plots.level_plot(summary, task) for task in tasks)
    return f'{plots.legend(summary)}<div class="panels">{panels}</div>{_html(made)}'


def _errors(summary: Mapping[str, Any], made: Sequence[tables.Table]) -> str:
    if not made:
        return _missing(_NO_PLANS)
    return (
        f"{plots.stacked_bars(summary)}<details><summary>The numbers, and what the simulator said"
        f"</summary>{_html(made)}</details>"
    )


def _perception(made: Sequence[tables.Table]) -> str:
    if not made:
        return _missing("No model was asked the grounding questions in this evaluation.")
    intro = "<p>Share of right answers to the grounding questions, picture in sight.</p>"
    cells = "".join(f"<div>{tables.to_html(table)}</div>" for table in made)
    return f'{intro}<div class="panels wide">{cells}</div>'


def _stage(stage: Stage) -> str:
    heading = f"<h3>{escape(stage.name.capitalize())}</h3>"
    if stage.missing:
        return heading + _missing(f"No learning curve: {stage.missing}.")
    curves = [plots.curve_plot(curve) for curve in sort_curves(stage.curves)]
    html = (
        f'{heading}<div class="panels {escape(stage.name)}">{"".join(curves[:_SHOWN_CURVES])}</div>'
    )
    if len(curves) > _SHOWN_CURVES:
        rest = curves[_SHOWN_CURVES:]
        html += (
            f"<details><summary>{len(rest)} more curves of {escape(stage.name)}</summary>"
            f'<div class="panels {escape(stage.name)}">{"".join(rest)}</div></details>'
        )
    return html


def _gallery(picks: Sequence[boards.Pick]) -> str:
    if not picks:
        return _missing("No board was answered from the picture by every model.")
    quota = ", ".join(f"{count} {kind}" for kind, count in boards.QUOTA.items())
    cards = "".join(boards.card(pick, number) for number, pick in enumerate(picks))
    return (
        "<p>The same boards for every model. The choice is by rule, not by eye: of each task up "
        f"to {quota}, evenly spread over levels and boards. A ring marks the start. A solid line "
        "is a plan that solves the board, a dashed one fails at its cross; P and D are pick and "
        "drop.</p>"
        f'<div class="cards">{cards}</div>'
    )


def _making(commands: Sequence[str], summary: Mapping[str, Any]) -> str:
    counts = ", ".join(
        f"{model_label(model)} {sum(part['n'] for part in modes.values())}"
        for model, modes in summary["models"].items()
    )
    lines = escape("\n".join(commands)) if commands else "(no commands were given)"
    return f"<p>Answered prompts: {escape(counts)}.</p><pre>{lines}</pre>"


def _html(made: Sequence[tables.Table]) -> str:
    return "".join(tables.to_html(table) for table in made)


def _missing(words: str) -> str:
    return f'<p class="missing">{escape(words)}</p>'


def _curve_words(stage: Stage) -> str:
    return "; ".join(
        f"{curve.name} {plots.short(curve.values[0])} → {plots.short(curve.values[-1])}"
        for curve in sort_curves(stage.curves)[:_SHOWN_CURVES]
        if curve.values
    )


def _curve_values(curve: Curve) -> dict[str, Any]:
    bins = plots.bin_curve(curve) if curve.values else []
    return {
        "steps": [step for step, *_ in bins],
        "means": [mean for _, mean, *_ in bins],
        "last": curve.values[-1] if curve.values else None,
        "not_finite": curve.not_finite,
    }
