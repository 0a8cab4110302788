"""The words and numbers of a report: labels, percentages with intervals, and the verdict."""

from collections.abc import Mapping
from typing import Any

from mgsd_jax.envs.base import Reason
from mgsd_jax.summary import MODELS, Measure

DASH = "–"
TASKS = {"frozenlake": "FrozenLake", "maze": "Maze", "minibehaviour": "MiniBehaviour"}
MODES = {
    "picture": "picture",
    "text": "text",
    "blind": "no picture",
    "perception": "questions",
}
# Best first: the order of the stacked bars.
ERRORS = {
    "success": "solved, shortest",
    "not_optimal": "solved, not shortest",
    "not_successful": "state right, plan legal, not solved",
    "illegal_plan": "state right, plan illegal",
    "wrong_state": "state read wrong",
    "truncated": "cut off at the token limit",
    "unparsed": "no readable plan",
}
REASONS: dict[Reason, str] = {
    "success": "solved",
    "no_answer": "no answer block",
    "invalid_token": "a word that is no action",
    "empty_plan": "an empty plan",
    "not_reached": "stopped short of the goal",
    "fell_into_hole": "fell into a hole",
    "off_board": "left the board",
    "hit_wall": "hit a wall",
    "entered_table": "ran into the table",
    "entered_printer": "ran into the printer",
    "pick_while_carrying": "picked with full hands",
    "pick_not_adjacent": "picked away from the printer",
    "drop_without_printer": "dropped without the printer",
    "drop_not_adjacent": "dropped away from the table",
}


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as '41.2 %', or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def interval(measure: Measure | None, digits: int = 1) -> str:
    """Return the interval of shares as '37.0–45.4', or nothing."""
    if measure is None or measure["low"] is None:
        return ""
    low, high = 100 * measure["low"], 100 * measure["high"]
    join = " to " if low < 0 else DASH
    return f"{low:.{digits}f}{join}{high:.{digits}f}"


def spelled(measure: Measure | None, digits: int = 1) -> str:
    """Return '41.2 % (37.0–45.4)', or a dash."""
    if measure is None or measure["value"] is None:
        return DASH
    text = percent(measure["value"], digits)
    return f"{text} ({interval(measure, digits)})" if measure["low"] is not None else text


def model_label(name: str) -> str:
    """Return the name of a model as it stands in running text and tables."""
    return name.replace("_", " ")


def order(summary: Mapping[str, Any]) -> str:
    """Return who beats whom from the picture, as 'distilled > grounded ≈ base'.

    '>' and '<' where the paired 95 % interval of the difference leaves out 0, else '≈'.
    """
    names = _ranked(summary)
    text = model_label(names[-1]) if names else "nothing evaluated from the picture"
    for later, earlier in zip(names[:0:-1], names[-2::-1], strict=True):
        text += f" {_sign(summary['differences'][f'{later} - {earlier}'])} {model_label(earlier)}"
    return text[:1].upper() + text[1:]


def verdict(summary: Mapping[str, Any]) -> str:
    """Return one sentence on what the evaluation shows, made from its numbers alone."""
    names = _ranked(summary)
    if not names:
        return "No model was evaluated from the picture, so there is nothing to compare."
    macros = {name: summary["models"][name]["picture"]["macro"] for name in names}
    last = names[-1]
    text = f"From the picture alone, the {last} model solves {percent(macros[last]['value'])}"
    text += f" of the boards ({interval(macros[last])})"
    others = names[-2::-1]
    if others:
        shares = [f"{percent(macros[name]['value'])} {name}" for name in others]
        text += f", against {_listed(shares)}: "
        text += _listed([_compared(summary, last, name, macros) for name in others])
    return f"{text}; {_closed(summary, last)}."


def _ranked(summary: Mapping[str, Any]) -> list[str]:
    models = summary["models"]
    return [name for name in MODELS if name in models and "picture" in models[name]]


def _sign(difference: Measure) -> str:
    if difference["low"] is None or difference["low"] <= 0 <= difference["high"]:
        return "≈"
    return ">" if difference["low"] > 0 else "<"


def _compared(
    summary: Mapping[str, Any], name: str, other: str, macros: Mapping[str, Measure]
) -> str:
    difference = summary["differences"][f"{name} - {other}"]
    if difference["value"] is None:
        return f"no board is shared with {other}"
    points = f"{100 * difference['value']:+.1f} points over {other}"
    points += f" (paired {interval(difference)}, "
    points += {">": "clearly better", "<": "clearly worse", "≈": "no clear difference"}[
        _sign(difference)
    ]
    mine, theirs = macros[name], macros[other]
    overlap = mine["low"] <= theirs["high"] and theirs["low"] <= mine["high"]
    return f"{points}; the two intervals {'overlap' if overlap else 'do not overlap'})"


def _closed(summary: Mapping[str, Any], name: str) -> str:
    gap = summary["modality_gap"].get("base")
    if gap is None:
        return "the gap to text input was not measured"
    if gap["value"] is None or gap["value"] <= 0:
        return "the base model does no better from text, so there is no gap to close"
    closed = summary["gap_closed_by"].get(name)
    if closed is None or closed["value"] is None:
        return f"the base model gains {100 * gap['value']:.1f} points from text input"
    limits = f" ({interval(closed, 0)})" if closed["low"] is not None else ""
    return (
        f"{percent(closed['value'], 0)}{limits} of the base model's gap to text input "
        f"({100 * gap['value']:.1f} points) is closed"
    )


def _listed(parts: list[str]) -> str:
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]
