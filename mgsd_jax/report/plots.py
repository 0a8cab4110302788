"""The marks of models, and the plots of success and of how answers end.

Plots are written by hand as inline SVG: their colours come from the page, so that one file serves
light, dark and print, and their text stays text. Marks differ in shape, not in colour alone.
"""

from collections.abc import Sequence

from markupsafe import Markup

from mgsd_jax.evaluation.summary import MODELS, Part, Summary
from mgsd_jax.report.inputs import parts
from mgsd_jax.report.markup import tag, write
from mgsd_jax.report.words import ERRORS, MODES, TASKS, model_label

_OTHER_COLOURS = 6
_SHAPES = {
    "base": Markup('<circle r="5.5"/>'),
    "grounded": Markup('<rect x="-5" y="-5" width="10" height="10"/>'),
    "distilled": Markup('<path d="M0-7.5 7.5 0 0 7.5-7.5 0Z"/>'),
}
_OTHER_SHAPES = (
    Markup('<path d="M0-7 6.5 5-6.5 5Z"/>'),
    *_SHAPES.values(),
    Markup('<path d="M0 7 6.5-5-6.5-5Z"/>'),
    Markup('<path d="M-2-6H2V-2H6V2H2V6H-2V2H-6V-2H-2Z"/>'),
)
_CROSS = Markup('<path d="M-5-5 5 5M5-5-5 5"/>')
_STYLES = {"picture": "full", "text": "hollow", "blind": "cross"}
_MIN_SHARE = 9  # percent of a bar that two digits need on a narrow screen


def colour(model: str, models: Sequence[str]) -> str:
    """Return the CSS colour of one of `models`; those beyond MODELS take turns."""
    if model in MODELS:
        return f"var(--{model})"
    return f"var(--other{_place(model, models) % _OTHER_COLOURS})"


def mark(model: str, mode: str, models: Sequence[str]) -> Markup:
    """Return the mark of one of `models` around (0, 0).

    It is filled where the model read the picture, hollow where it read text, and a cross where it
    was shown the wrong picture.
    """
    if mode == "blind":
        shape = _CROSS
    elif model in _SHAPES:
        shape = _SHAPES[model]
    else:
        shape = _OTHER_SHAPES[_place(model, models) % len(_OTHER_SHAPES)]
    return tag("g", shape, class_=f"mark {_STYLES[mode]}", style=f"--c:{colour(model, models)}")


def _place(model: str, models: Sequence[str]) -> int:
    return [name for name in models if name not in MODELS].index(model)


def icon(model: str, mode: str, models: Sequence[str], line: str = "") -> Markup:
    """Return the mark, drawn over a `line` if given, at the height of a line of text."""
    width = 40 if line else 18
    drawn = tag("g", mark(model, mode, models), transform=f"translate({width // 2} 8)")
    return tag("svg", line, drawn, class_="icon", width=width, height=16, aria_hidden="true")


def who(model: str, mode: str) -> str:
    """Return a model and what it reads, as 'base, wrong picture'."""
    return f"{model_label(model)}, {MODES[mode]}"


def featured(summary: Summary, *modes: str) -> list[tuple[str, str, Part]]:
    """Return what `parts` yields in these modes, of the base alone where it is not pictures."""
    found = [part for mode in modes for part in parts(summary, mode)]
    return [part for part in found if part[1] == "picture" or part[0] == "base"]


def dot_plot(summary: Summary) -> Markup:
    """Return success with its interval by model and mode: all tasks, then task by task."""
    shown = [part for mode in ("blind", "picture", "text") for part in parts(summary, mode)]
    models = list(summary["models"])
    measures = {"All tasks": [part["macro"] for *_, part in shown]}
    for task, title in TASKS.items():
        tasks = [part["tasks"].get(task) for *_, part in shown]
        measures[title] = [part and part["success"] for part in tasks]
    groups = {
        title: [
            (who(model, mode), colour(model, models), mark(model, mode, models), measure)
            for (model, mode, _), measure in zip(shown, found, strict=True)
            if measure
        ]
        for title, found in measures.items()
        if any(found)
    }
    return write("dot_plot", groups)


def stacked_bars(summary: Summary) -> Markup:
    """Return how the answers of each model and mode end, one bar of 100 % each, with a legend."""
    bars = [(who(model, mode), _pieces(part), part["n"]) for model, mode, part in parts(summary)]
    return write("bars", ERRORS, bars)


def _pieces(part: Part) -> list[dict[str, str]]:
    start, found = 0.0, []
    for kind, label in ERRORS.items():
        count = part["errors"].get(kind, 0)  # summaries of older versions lack some kinds
        share = 100 * count / part["n"]
        if count:
            words = f"{label}: {count} of {part['n']}, {share:.0f} %"
            number = f"{share:.0f}" if share >= _MIN_SHARE else ""
            place = {"start": start, "width": share, "middle": start + share / 2}
            percents = {key: f"{value:.2f}%" for key, value in place.items()}
            found.append({"kind": kind, "words": words, "number": number, **percents})
        start += share
    return found
