"""The plots of a report as inline SVG.

Written by hand rather than with a plotting library: the marks take their colours from the page, so
one file serves light, dark and print; the text stays text; and percentages for x let a plot become
narrow without its letters shrinking. A mark is told by its shape and its label, not by its colour.
"""

import math
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from mgsd_jax.evaluation.summary import MODELS, Measure
from mgsd_jax.report.inputs import Curve
from mgsd_jax.report.words import DASH, ERRORS, MODES, TASKS, interval, model_label, percent

_BINS = 150  # points drawn of a curve
_OTHER_COLOURS = 6
_SHAPES = {
    "base": '<circle r="5.5"/>',
    "grounded": '<rect x="-5" y="-5" width="10" height="10"/>',
    "distilled": '<path d="M0-7.5 7.5 0 0 7.5-7.5 0Z"/>',
}
_OTHER_SHAPES = (
    '<path d="M0-7 6.5 5-6.5 5Z"/>',
    '<circle r="5.5"/>',
    '<rect x="-5" y="-5" width="10" height="10"/>',
    '<path d="M0-7.5 7.5 0 0 7.5-7.5 0Z"/>',
    '<path d="M0 7 6.5-5-6.5-5Z"/>',
    '<path d="M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z"/>',
)
_CROSS = '<path d="M-5-5 5 5M5-5-5 5"/>'


def colour(model: str, models: Sequence[str]) -> str:
    """Return the CSS colour of a model; models beyond MODELS take turns over spare colours."""
    if model in MODELS:
        return f"var(--{model})"
    others = [name for name in models if name not in MODELS]
    return f"var(--other{others.index(model) % _OTHER_COLOURS})"


def mark(model: str, mode: str, models: Sequence[str]) -> str:
    """Return the mark of a model and mode round (0, 0): filled from the picture, hollow from text,
    a cross from the wrong picture."""
    style = {"picture": "full", "text": "hollow", "blind": "cross"}[mode]
    shape = _CROSS if mode == "blind" else _shape(model, models)
    return f'<g class="mark {style}" style="--c:{colour(model, models)}">{shape}</g>'


def _shape(model: str, models: Sequence[str]) -> str:
    if model in _SHAPES:
        return _SHAPES[model]
    others = [name for name in models if name not in MODELS]
    return _OTHER_SHAPES[others.index(model) % len(_OTHER_SHAPES)]


def icon(model: str, mode: str, models: Sequence[str]) -> str:
    """Return the mark as a picture of the height of a line of text."""
    place = '<g transform="translate(9 8)">'
    return (
        f'<svg class="icon" width="18" height="16" aria-hidden="true">{place}'
        f"{mark(model, mode, models)}</g></svg>"
    )


def dot_plot(summary: Mapping[str, Any]) -> str:
    """Return success with its interval for each model and mode: all tasks, then task by task."""
    models = summary["models"]
    keys = [(m, mode) for mode in ("blind", "picture", "text") for m in models if mode in models[m]]
    groups = [("All tasks", [(*key, models[key[0]][key[1]]["macro"]) for key in keys])]
    for task, label in TASKS.items():
        rows = [
            (m, mode, models[m][mode]["tasks"][task]["success"])
            for m, mode in keys
            if task in models[m][mode]["tasks"]
        ]
        groups += [(label, rows)] if rows else []
    html = "".join(_dot_group(*group, list(models)) for group in groups)
    return f'<div class="dots">{html}</div>'


def _dot_group(title: str, rows: list[tuple[str, str, Measure]], models: list[str]) -> str:
    lines = []
    for model, mode, measure in rows:
        value, low, high = (100 * measure[key] for key in ("value", "low", "high"))
        who = f"{model_label(model)}, {MODES[mode]}"
        words = f"{title}, {who}: {percent(measure['value'])}, 95 % interval {interval(measure)} %"
        lines.append(
            f'<div class="row"><span class="who">{escape(who)}</span>'
            f'<svg class="track" height="22" role="img" aria-label="{escape(words)}">{_grid(22)}'
            f'<line class="span" style="--c:{colour(model, models)}" x1="{low:.2f}%" '
            f'x2="{high:.2f}%" y1="11" y2="11"/>'
            f'<svg x="{value:.2f}%" y="11" overflow="visible">{mark(model, mode, models)}</svg>'
            f'</svg><span class="num">{percent(measure["value"])} '
            f"<small>{interval(measure)}</small></span></div>"
        )
    ticks = "".join(
        f'<text x="{at}%" y="11" text-anchor="{anchor}">{at}</text>'
        for at, anchor in ((0, "start"), (25, "middle"), (50, "middle"), (75, "middle"))
    )
    ticks += '<text x="100%" y="11" text-anchor="end">100 %</text>'
    axis = (
        '<div class="row axis"><span class="who"></span><svg class="track" height="14" '
        f'aria-hidden="true">{ticks}</svg><span class="num"></span></div>'
    )
    return f'<div class="dot-group"><h3>{escape(title)}</h3>{"".join(lines)}{axis}</div>'


def _grid(height: int) -> str:
    lines = "".join(
        f'<line x1="{at}%" x2="{at}%" y1="0" y2="{height}"/>' for at in (0, 25, 50, 75, 100)
    )
    return f'<g class="grid">{lines}</g>'


def level_plot(summary: Mapping[str, Any], task: str) -> str:
    """Return success over a task's levels: every model from the picture, the base from text."""
    models = list(summary["models"])
    keys = [("base", "text"), *((model, "picture") for model in models)]
    series = [
        (model, mode, summary["models"][model][mode]["tasks"][task]["levels"])
        for model, mode in keys
        if model in summary["models"]
        and mode in summary["models"][model]
        and task in summary["models"][model][mode]["tasks"]
    ]
    levels = sorted({int(level) for _, _, parts in series for level in parts})
    left, top, width, height = 34, 10, 276, 150
    step = width / max(1, len(levels))

    def y(share: float) -> float:
        return top + height * (1 - share)

    marks = "".join(
        f'<line x1="{left}" x2="{left + width}" y1="{y(at / 100)}" y2="{y(at / 100)}"/>'
        for at in (0, 25, 50, 75, 100)
    )
    marks = f'<g class="grid">{marks}</g>'
    marks += "".join(
        f'<text x="{left - 6}" y="{y(at / 100) + 4}" text-anchor="end">{at}</text>'
        for at in (0, 50, 100)
    )
    for i, level in enumerate(levels):
        x = left + step * (i + 0.5)
        marks += f'<text x="{x:.1f}" y="{top + height + 16}" text-anchor="middle">{level}</text>'
    words = []
    for i, (model, mode, parts) in enumerate(series):
        dodge = (i - (len(series) - 1) / 2) * min(9.0, 0.7 * step / len(series))
        points = [
            (left + step * (levels.index(int(level)) + 0.5) + dodge, part["success"])
            for level, part in parts.items()
        ]
        line = " ".join(f"{x:.1f},{y(measure['value']):.1f}" for x, measure in points)
        spans = "".join(
            f'<line class="span" x1="{x:.1f}" x2="{x:.1f}" y1="{y(measure["low"]):.1f}" '
            f'y2="{y(measure["high"]):.1f}"/><g transform="translate({x:.1f} '
            f'{y(measure["value"]):.1f}) scale(.75)">{mark(model, mode, models)}</g>'
            for x, measure in points
        )
        dash = ' stroke-dasharray="4 3"' if mode == "text" else ""
        marks += (
            f'<g style="--c:{colour(model, models)}"><polyline class="link" points="{line}"{dash}/>'
            f"{spans}</g>"
        )
        shares = ", ".join(f"{n} {percent(p['success']['value'])}" for n, p in parts.items())
        words.append(f"{model_label(model)} from {MODES[mode]}: level {shares}")
    alt = f"{TASKS[task]}, success over levels. {'; '.join(words)}."
    return (
        f'<figure class="panel"><figcaption>{TASKS[task]}</figcaption><svg viewBox="0 0 320 196" '
        f'role="img" aria-label="{escape(alt)}">{marks}<text x="{left + width / 2}" y="193" '
        f'text-anchor="middle" class="axis-name">level (side of the board)</text></svg></figure>'
    )


def legend(summary: Mapping[str, Any]) -> str:
    """Return the marks of the level plots with their names."""
    models = list(summary["models"])
    keys = [(m, "picture") for m in models if "picture" in summary["models"][m]]
    keys += [("base", "text")] if "text" in summary["models"].get("base", {}) else []
    items = "".join(
        f"<li>{icon(*key, models)}{escape(model_label(key[0]))}, {MODES[key[1]]}</li>"
        for key in keys
    )
    return f'<ul class="legend">{items}</ul>'


def stacked_bars(summary: Mapping[str, Any]) -> str:
    """Return how the answers of each model and mode end, one bar of 100 % each, with the legend."""
    items = "".join(
        f'<li><svg width="14" height="14" aria-hidden="true"><rect width="14" height="14" rx="2" '
        f'class="e-{name}"/></svg>{words}</li>'
        for name, words in ERRORS.items()
    )
    bars = []
    for model, modes in summary["models"].items():
        for mode in ("picture", "text", "blind"):
            if mode in modes:
                bars.append(_stacked_bar(f"{model_label(model)}, {MODES[mode]}", modes[mode]))
    return f'<ul class="legend">{items}</ul><div class="bars">{"".join(bars)}</div>'


def _stacked_bar(who: str, part: Mapping[str, Any]) -> str:
    at, rects, words = 0.0, [], []
    for name, label in ERRORS.items():
        count = part["errors"].get(name, 0)  # summaries of an older version lack some
        share = 100 * count / part["n"]
        if not share:
            continue
        text = f"{label}: {count} of {part['n']}, {share:.0f} %"
        words.append(text)
        rects.append(
            f'<g class="e-{name}"><title>{escape(text)}</title>'
            f'<rect x="{at:.2f}%" width="{share:.2f}%" height="30"/>'
        )
        if share >= 9:  # what two digits need on a narrow screen
            rects[-1] += (
                f'<text x="{at + share / 2:.2f}%" y="20" text-anchor="middle">{share:.0f}</text>'
            )
        rects[-1] += "</g>"
        at += share
    return (
        f'<div class="row"><span class="who">{escape(who)}</span><svg class="stack" height="30" '
        f'role="img" aria-label="{escape(who)}: {escape("; ".join(words))}">{"".join(rects)}</svg>'
        f'<span class="num"><small>n {part["n"]}</small></span></div>'
    )


def curve_plot(curve: Curve) -> str:
    """Return one metric over steps: the mean of each bin of steps, in the band of its extremes."""
    name = escape(curve.name)
    lost = f"; {curve.not_finite} not finite" if curve.not_finite else ""
    if not curve.values:
        head = f"<figcaption>{name}<b>{DASH}{lost}</b></figcaption>"
        return f'<figure class="panel curve">{head}</figure>'
    bins = bin_curve(curve)
    low, high = min(curve.values), max(curve.values)
    bottom, top_value = limits(low, high)
    ticks = nice_ticks(bottom, top_value)
    left, top, width, height = 46, 6, 268, 104
    first, last = curve.steps[0], curve.steps[-1]

    def x(step: float) -> float:
        return left + width * ((step - first) / (last - first) if last > first else 0.5)

    def y(value: float) -> float:
        return top + height * (1 - (value - bottom) / (top_value - bottom))

    grid = "".join(
        f'<line x1="{left}" x2="{left + width}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
        for tick in ticks
    )
    text = "".join(
        f'<text x="{left - 5}" y="{y(tick) + 4:.1f}" text-anchor="end">{short(tick)}</text>'
        for tick in ticks
    )
    band = [f"{x(s):.1f},{y(hi):.1f}" for s, _, _, hi in bins]
    band += [f"{x(s):.1f},{y(lo):.1f}" for s, _, lo, _ in reversed(bins)]
    line = " ".join(f"{x(s):.1f},{y(mean):.1f}" for s, mean, _, _ in bins)
    end = f'<circle cx="{x(bins[-1][0]):.1f}" cy="{y(bins[-1][1]):.1f}" r="3"/>'
    alt = (
        f"{curve.name}: from {short(curve.values[0])} at step {first} to {short(curve.values[-1])} "
        f"at step {last}, between {short(low)} and {short(high)}"
    )
    return (
        f'<figure class="panel curve"><figcaption>{name}<b>{short(curve.values[-1])}{lost}</b>'
        f'</figcaption><svg viewBox="0 0 320 132" role="img" aria-label="{escape(alt)}">'
        f'<g class="grid">{grid}</g>{text}<polygon points="{" ".join(band)}"/>'
        f'<polyline points="{line}"/>{end}<text x="{left}" y="127">{first}</text>'
        f'<text x="{left + width}" y="127" text-anchor="end">step {last}</text></svg></figure>'
    )


def bin_curve(curve: Curve, count: int = _BINS) -> list[tuple[float, float, float, float]]:
    """Return (mean step, mean, lowest, highest) of at most `count` runs of neighbouring points."""
    size = math.ceil(len(curve.values) / count)
    bins = []
    for start in range(0, len(curve.values), size):
        steps, values = curve.steps[start : start + size], curve.values[start : start + size]
        mean = sum(values) / len(values)
        bins.append((sum(steps) / len(steps), mean, min(values), max(values)))
    return bins


def limits(low: float, high: float) -> tuple[float, float]:
    """Return the y range of a curve: a little air, no negative side for what is never negative."""
    air = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return (max(0.0, low - air) if low >= 0 else low - air), high + air


def nice_ticks(low: float, high: float) -> list[float]:
    """Return the 2 to 5 round numbers that lie between `low` and `high` > `low`."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def short(value: float) -> str:
    """Return a number in few characters: '0.412', '1.4e-6', '12.3k'."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        digits, exponent = f"{value:.1e}".split("e")
        return f"{digits}e{int(exponent)}"
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if size >= 999.5 else f"{value:.3g}"
