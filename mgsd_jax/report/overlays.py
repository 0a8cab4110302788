"""Plots that lay several runs over each other, as inline SVG in the manner of plots.py."""

from collections.abc import Mapping, Sequence
from html import escape

from mgsd_jax.report import plots
from mgsd_jax.report.inputs import Curve
from mgsd_jax.report.words import model_label

_LEFT, _TOP, _WIDTH, _HEIGHT = 46, 8, 264, 132
_DASHES = ("", "6 3", "2 3", "9 3 2 3")


def legend(runs: Sequence[str], models: Sequence[str]) -> str:
    """Return the marks and lines of the runs with their names."""
    items = "".join(
        f'<li><svg class="icon" width="40" height="16" aria-hidden="true"><line x1="0" x2="40" '
        f'y1="8" y2="8" class="over" {_line(run, runs, models)}/>'
        f'<g transform="translate(20 8)">{plots.mark(run, "picture", models)}</g></svg>'
        f"{escape(model_label(run))}</li>"
        for run in runs
    )
    return f'<ul class="legend">{items}</ul>'


def curves(
    title: str, series: Mapping[str, Curve], runs: Sequence[str], models: Sequence[str]
) -> str:
    """Return one metric of several runs over steps, the mean of each bin of steps."""
    binned = {run: plots.bin_curve(curve, 60) for run, curve in series.items()}
    points = {run: [(step, mean) for step, mean, _, _ in bins] for run, bins in binned.items()}
    first = min(curve.steps[0] for curve in series.values())
    last = max(curve.steps[-1] for curve in series.values())
    ends = ((0.0, str(first), "start"), (1.0, f"step {last}", "end"))
    placed = {
        run: [((x - first) / (last - first) if last > first else 0.5, y) for x, y in found]
        for run, found in points.items()
    }
    return _figure(title, placed, runs, models, ends, marked=False)


def categories(
    title: str,
    series: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    runs: Sequence[str],
    models: Sequence[str],
    *,
    joined: bool,
) -> str:
    """Return a value for each name and run; `joined` by lines where the names have an order."""
    step = 1 / len(names)
    ticks = [((i + 0.5) * step, name, "middle") for i, name in enumerate(names)]
    placed = {}
    for i, run in enumerate(runs):
        if run in series:
            dodge = 0.0 if joined else (i - (len(runs) - 1) / 2) * min(0.06, 0.6 * step / len(runs))
            placed[run] = [
                ((k + 0.5) * step + dodge, series[run][name])
                for k, name in enumerate(names)
                if name in series[run]
            ]
    return _figure(title, placed, runs, models, ticks, marked=True, joined=joined)


def _figure(
    title: str,
    series: Mapping[str, Sequence[tuple[float, float]]],
    runs: Sequence[str],
    models: Sequence[str],
    ticks: Sequence[tuple[float, str, str]],
    *,
    marked: bool,
    joined: bool = True,
) -> str:
    """A plot of (x in 0..1, y) points by run."""
    values = [value for found in series.values() for _, value in found]
    bottom, top = plots.limits(min(values), max(values))

    def at(x: float, y: float) -> tuple[float, float]:
        return _LEFT + _WIDTH * x, _TOP + _HEIGHT * (1 - (y - bottom) / (top - bottom))

    marks = '<g class="grid">'
    levels = [(tick, at(0, tick)[1]) for tick in plots.nice_ticks(bottom, top)]
    marks += "".join(
        f'<line x1="{_LEFT}" x2="{_LEFT + _WIDTH}" y1="{y:.1f}" y2="{y:.1f}"/>' for _, y in levels
    )
    marks += "</g>" + "".join(
        f'<text x="{_LEFT - 5}" y="{y + 4:.1f}" text-anchor="end">{plots.short(tick)}</text>'
        for tick, y in levels
    )
    marks += "".join(
        f'<text x="{at(x, bottom)[0]:.1f}" y="{_TOP + _HEIGHT + 16}" text-anchor="{anchor}">'
        f"{escape(text)}</text>"
        for x, text, anchor in ticks
    )
    words = []
    for run, found in series.items():
        if not found:
            continue
        placed = [at(*point) for point in found]
        if joined:
            line = " ".join(f"{x:.1f},{y:.1f}" for x, y in placed)
            marks += f'<polyline class="over" {_line(run, runs, models)} points="{line}"/>'
        for x, y in placed if marked else placed[-1:]:
            marks += (
                f'<g transform="translate({x:.1f} {y:.1f}) scale(.7)">'
                f"{plots.mark(run, 'picture', models)}</g>"
            )
        words.append(f"{model_label(run)} {', '.join(plots.short(y) for _, y in found[-6:])}")
    alt = f"{title}. {'; '.join(words)}"
    return (
        f'<figure class="panel"><figcaption>{escape(title)}</figcaption>'
        f'<svg viewBox="0 0 320 162" role="img" aria-label="{escape(alt)}">{marks}</svg></figure>'
    )


def _line(run: str, runs: Sequence[str], models: Sequence[str]) -> str:
    dash = _DASHES[runs.index(run) % len(_DASHES)]
    dashes = f' stroke-dasharray="{dash}"' if dash else ""
    return f'style="--c:{plots.colour(run, models)}"{dashes}'
