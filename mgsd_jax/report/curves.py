"""Plots with axes: success over levels, metrics over steps, and runs drawn over each other."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from mgsd_jax.evaluation.summary import Summary
from mgsd_jax.report import plots, words
from mgsd_jax.report.inputs import Curve
from mgsd_jax.report.markup import tag, write
from mgsd_jax.report.words import MODES, TASKS, model_label, percent

Point = tuple[float, float]
_BINS = 150  # points drawn of a curve
_DASHES = ("", "6 3", "2 3", "9 3 2 3")


@dataclasses.dataclass(frozen=True)
class Frame:
    """The rectangle of a plot in its picture, and the ranges of x and y that it spans."""

    left: float
    top: float
    width: float
    height: float
    x: tuple[float, float] = (0.0, 1.0)
    y: tuple[float, float] = (0.0, 1.0)

    def at(self, point: Point) -> Point:
        """Return the place of a point in the picture."""
        (first, last), (low, high) = self.x, self.y
        share = (point[0] - first) / (last - first) if last > first else 0.5
        down = (high - point[1]) / (high - low)
        return self.left + self.width * share, self.top + self.height * down

    def line(
        self, points: Iterable[Point], shape: str = "polyline", **attributes: object
    ) -> Markup:
        """Return a line (or another `shape`) through the points."""
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self.at, points))
        return tag(shape, points=corners, **attributes)

    def marks(self, points: Iterable[Point], shape: Markup, scale: float) -> list[Markup]:
        """Return the `shape`, made smaller, at every point."""
        moves = [f"translate({x:.1f} {y:.1f}) scale({scale})" for x, y in map(self.at, points)]
        return [tag("g", shape, transform=move) for move in moves]

    def axes(
        self, x_ticks: Iterable[tuple[float, str, str]], y_ticks: Iterable[tuple[float, str]]
    ) -> Markup:
        """Return lines across the plot with their numbers, and (x, words, anchor) below it."""
        right, below = self.left + self.width, self.top + self.height + 16
        levels = [(self.at((0, y))[1], words) for y, words in y_ticks]
        lines = [tag("line", x1=self.left, x2=right, y1=y, y2=y) for y, _ in levels]
        numbers = [
            tag("text", words, x=self.left - 5, y=y + 4, text_anchor="end") for y, words in levels
        ]
        names = [
            tag("text", words, x=self.at((x, 0))[0], y=below, text_anchor=anchor)
            for x, words, anchor in x_ticks
        ]
        return Markup("").join([tag("g", *lines, class_="grid"), *numbers, *names])


def _of_values(
    values: Sequence[float], unit: str, top: int, height: int, x: tuple[float, float]
) -> tuple[Frame, list[tuple[float, str]]]:
    """A frame that holds these values, and the numbers beside it, for which it leaves room."""
    low, high = limits(min(values), max(values))
    y = (low, min(high, 1.0) if unit == words.SHARE else high)
    ticks = nice_ticks(*y)
    labels = tick_labels(ticks)
    left = max(30.0, 8 + 6.3 * max(map(len, labels)))
    frame = Frame(left, top, 314 - left, height, x=x, y=y)
    return frame, list(zip(ticks, labels, strict=True))


def _step_axis(frame: Frame, first: float, last: float) -> list[tuple[float, str, str]]:
    """The first and the last step below a plot, and what they are."""
    ends = [(first, f"{first:,}", "start"), (last, f"{last:,}", "end")]
    return [ends[0], ((first + last) / 2, "step", "middle"), ends[1]] if first < last else ends[:1]


def _panel(
    title: str, drawn: Sequence[Markup], height: int, alt: str, last: str | None = None
) -> Markup:
    svg = tag("svg", *drawn, viewBox=f"0 0 320 {height}", role="img", aria_label=alt)
    return write("panel", title, last, svg if drawn else "")


def _dodge(number: int, count: int, width: float) -> float:
    """How far to shift one of `count` series sideways, so that their marks do not overlap."""
    return (number - (count - 1) / 2) * width


def level_plot(summary: Summary, task: str) -> Markup:
    """Return success over the levels of a task: every model from pictures, the base from text."""
    series = [
        (model, mode, part["tasks"][task]["levels"])
        for model, mode, part in plots.featured(summary, "text", "picture")
        if task in part["tasks"]
    ]
    models = list(summary["models"])
    levels = sorted({int(level) for *_, found in series for level in found})
    frame = Frame(34, 20, 276, 140, x=(0, len(levels)))
    width = min(0.7 / len(series), 9 * len(levels) / frame.width)
    names = [(i + 0.5, str(level), "middle") for i, level in enumerate(levels)]
    ticks = [(at / 100, str(at)) for at in (0, 25, 50, 75, 100)]
    drawn = [_unit("% solved"), frame.axes(names, ticks)]
    heard = []
    for i, (model, mode, found) in enumerate(series):
        shift = 0.5 + _dodge(i, len(series), width)
        measures = [(levels.index(int(n)) + shift, part["success"]) for n, part in found.items()]
        points = [(x, measure["value"]) for x, measure in measures]
        spans = [
            frame.line([(x, measure["low"]), (x, measure["high"])], class_="span")
            for x, measure in measures
        ]
        dash = {"stroke_dasharray": "4 3"} if mode == "text" else {}
        line = frame.line(points, class_="link", **dash)
        marks = frame.marks(points, plots.mark(model, mode, models), 0.75)
        style = f"--c:{plots.colour(model, models)}"
        drawn.append(tag("g", line, *spans, *marks, style=style))
        shares = ", ".join(f"{n} {percent(part['success']['value'])}" for n, part in found.items())
        heard.append(f"{model_label(model)} from {MODES[mode]}: level {shares}")
    axis = {"x": 172, "y": 193, "text_anchor": "middle", "class_": "axis-name"}
    drawn.append(tag("text", "level (side of the board)", **axis))
    title = TASKS[task]
    return _panel(title, drawn, 196, f"{title}, success over levels. {'; '.join(heard)}.")


def curve_plot(curve: Curve) -> Markup:
    """Return a metric over steps: the mean of each bin of steps, and a band from low to high."""
    name, unit, _ = words.metric(curve.name)
    lost = f"; {curve.not_finite} not finite" if curve.not_finite else ""
    if not curve.values:
        return _panel(name, [], 0, "", last="no value" + lost)
    bins = bin_curve(curve)
    first, last = curve.steps[0], curve.steps[-1]
    frame, y_ticks = _of_values(curve.values, unit, 20, 104, (first, last))
    band = [(step, high) for step, _, _, high in bins]
    band += [(step, low) for step, _, low, _ in reversed(bins)]
    line = [(step, mean) for step, mean, _, _ in bins]
    disc = frame.marks(line[-1:], tag("circle", r=3), 1)
    axes = frame.axes(_step_axis(frame, first, last), y_ticks)
    drawn = [_unit(unit), axes, frame.line(band, "polygon"), frame.line(line), *disc]
    values = curve.values
    begin, end, low, high = map(short, (values[0], values[-1], min(values), max(values)))
    alt = (
        f"{name} ({unit}): from {begin} at step {first} to {end} at step {last}, "
        f"between {low} and {high}"
    )
    return _panel(name, drawn, 146, alt, last=end + lost)


def _unit(unit: str) -> Markup:
    """The name of the y axis, above it."""
    return tag("text", unit, x=2, y=11, class_="axis-name")


# Several runs in one plot.


def legend(runs: Sequence[str]) -> Markup:
    """Return the marks and lines of the runs with their names."""
    lines = {run: tag("line", x1=0, x2=40, y1=8, y2=8, **_stroke(run, runs)) for run in runs}
    icons = [plots.icon(run, "picture", runs, line) for run, line in lines.items()]
    return write("legend", list(zip(icons, map(model_label, runs), strict=True)))


def overlay(metric: str, curves: Mapping[str, Curve], runs: Sequence[str]) -> Markup:
    """Return one `metric` of several of the `runs` over steps, the mean of each bin of steps."""
    series = {
        run: [(step, mean) for step, mean, _, _ in bin_curve(curve, 60)]
        for run, curve in curves.items()
    }
    first = min(curve.steps[0] for curve in curves.values())
    last = max(curve.steps[-1] for curve in curves.values())
    title, unit, _ = words.metric(metric)
    return _overlay(title, unit, series, runs, (first, last), marked=slice(-1, None))


def categories(
    title: str,
    unit: str,
    series: Mapping[str, Mapping[str, float]],
    names: Sequence[str],
    runs: Sequence[str],
    *,
    joined: bool,
) -> Markup:
    """Return a value for each name and run, `joined` by lines where the names have an order."""
    ticks = [(i + 0.5, name, "middle") for i, name in enumerate(names)]
    width = 0.0 if joined else min(0.06 * len(names), 0.6 / len(runs))
    points = {}
    for run, found in series.items():
        shift = 0.5 + _dodge(runs.index(run), len(runs), width)
        points[run] = [(i + shift, found[name]) for i, name in enumerate(names) if name in found]
    whole = slice(None)
    return _overlay(title, unit, points, runs, (0, len(names)), ticks, marked=whole, joined=joined)


def _overlay(
    title: str,
    unit: str,
    series: Mapping[str, Sequence[Point]],
    runs: Sequence[str],
    x: tuple[float, float],
    x_ticks: Iterable[tuple[float, str, str]] | None = None,
    *,
    marked: slice,
    joined: bool = True,
) -> Markup:
    values = [value for points in series.values() for _, value in points]
    frame, y_ticks = _of_values(values, unit, 20, 132, x)
    below = _step_axis(frame, *x) if x_ticks is None else x_ticks
    drawn, heard = [_unit(unit), frame.axes(below, y_ticks)], []
    for run, points in series.items():
        drawn += [frame.line(points, **_stroke(run, runs))] if joined else []
        drawn += frame.marks(points[marked], plots.mark(run, "picture", runs), 0.7)
        heard.append(f"{model_label(run)} {', '.join(short(y) for _, y in points[-6:])}")
    return _panel(title, drawn, 174, f"{title} ({unit}). {'; '.join(heard)}")


def _stroke(run: str, runs: Sequence[str]) -> dict[str, str]:
    style = {"class_": "over", "style": f"--c:{plots.colour(run, runs)}"}
    dash = _DASHES[runs.index(run) % len(_DASHES)]
    return style | ({"stroke_dasharray": dash} if dash else {})


# Numbers of an axis.


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
    """Return the range of y: some air around the values, but never below 0 unless they are."""
    air = 0.06 * (high - low) or 0.5 * abs(high) or 0.5
    return (max(0.0, low - air) if low >= 0 else low - air), high + air


def nice_ticks(low: float, high: float) -> list[float]:
    """Return the 2 to 5 round numbers that lie between `low` and `high` > `low`."""
    raw = (high - low) / 4
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(unit * k for k in (1, 2, 2.5, 5, 10) if unit * k >= raw)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_labels(ticks: Sequence[float]) -> list[str]:
    """Return the numbers of an axis, with as many digits as they have: no two read alike."""
    kind = "f" if 1e-3 <= max(map(abs, ticks)) < 1e6 else "e"
    most = 1e-3 * (ticks[1] - ticks[0])

    def is_exact(digits: int) -> bool:
        return all(abs(float(f"{tick:.{digits}{kind}}") - tick) < most for tick in ticks)

    digits = next(filter(is_exact, itertools.count()))
    return [_short_exponent(f"{tick:.{digits}{kind}}") for tick in ticks]


def short(value: float) -> str:
    """Return a number in few characters: '0.412', '1.4e-6', '12.3k'."""
    size = abs(value)
    if size >= 1e6 or 0 < size < 1e-3:
        return _short_exponent(f"{value:.1e}")
    if size >= 1e4:
        return f"{value / 1e3:.3g}k"
    return f"{value:.0f}" if size >= 999.5 else f"{value:.3g}"


def _short_exponent(text: str) -> str:
    """'1.4e-6' of '1.4e-06'."""
    digits, mark, exponent = text.partition("e")
    return f"{digits}e{int(exponent)}" if mark else text
