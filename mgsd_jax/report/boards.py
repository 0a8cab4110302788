"""The gallery of a report: boards with the route of each model's plan drawn over them."""

import base64
import dataclasses
import io
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

from PIL import Image

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import DELTAS, Cell, Plan
from mgsd_jax.report.tables import reason_label
from mgsd_jax.report.words import TASKS, model_label
from mgsd_jax.summary import Board, Row, board_of, sort_models

Point = tuple[float, float]  # x, y in pixels of the picture
Kind = Literal["fixed", "broken", "failed", "solved"]
SIDE = 256  # pixels of a board picture
RESPONSE_LIMIT = 1200  # characters of a response that are shown
# How many boards of each kind the gallery takes from each task.
QUOTA: Mapping[Kind, int] = {"fixed": 2, "broken": 1, "failed": 1, "solved": 1}
_LANE = 0.11  # of a cell: routes keep to the right, so that a way back does not hide the way there
_ARROWS = {"up": "↑", "down": "↓", "left": "←", "right": "→", "pick": "PICK", "drop": "DROP"}


@dataclasses.dataclass(frozen=True)
class Pick:
    """A board of the gallery, why it is there, and its picture row of each model."""

    kind: Kind
    board: Board
    rows: Mapping[str, Row]


def choose(rows: Sequence[Row]) -> tuple[Pick, ...]:
    """Return the boards to show: of each task and kind evenly spread ones by level and index.

    The kind compares the first model in the order base, grounded, distilled with the last: fixed
    or broken on the way, failed by the last as by the first, or solved by both. No row is looked
    at for how it reads, so the same rows always give the same gallery.
    """
    answers: dict[Board, dict[str, Row]] = {}
    for row in rows:
        if row["mode"] == "picture":
            answers.setdefault(board_of(row), {})[row["model"]] = row
    names = sort_models({name for by_model in answers.values() for name in by_model})
    picks = []
    for task in ENVS:
        found: dict[Kind, list[Pick]] = {kind: [] for kind in QUOTA}
        for board in sorted(board for board in answers if board[0] == task):
            by_model = answers[board]
            if len(by_model) == len(names):
                ordered = {name: by_model[name] for name in names}
                kind = _kind(ordered[names[0]], ordered[names[-1]])
                found[kind].append(Pick(kind, board, ordered))
        for kind, count in QUOTA.items():
            picks += _spread(found[kind], count)
    return tuple(picks)


def _kind(first: Row, last: Row) -> Kind:
    before, after = first["outcome"]["success"], last["outcome"]["success"]
    if before:
        return "solved" if after else "broken"
    return "fixed" if after else "failed"


def _spread(picks: Sequence[Pick], count: int) -> list[Pick]:
    if len(picks) <= count:
        return list(picks)
    return [picks[int((i + 0.5) * len(picks) / count)] for i in range(count)]


def card(pick: Pick, number: int) -> str:
    """Return one board as HTML: a shortest route, then the route of every model beside it."""
    task, level, index = pick.board
    env = ENVS[task]
    source = f"{task}, level {level}, index {index}"
    state = env.from_text(next(iter(pick.rows.values()))["task_text"], source=source)
    names = [model_label(name) for name in pick.rows]
    first, last = names[0], names[-1]
    why = {
        "fixed": f"{first} fails, {last} solves it",
        "broken": f"{first} solves it, {last} fails",
        "failed": f"{last} fails" if first == last else f"{first} and {last} both fail",
        "solved": f"{last} solves it" if first == last else f"{first} and {last} both solve it",
    }[pick.kind]
    picture = png_uri(env.render(state, SIDE))
    image = f'<image id="board{number}" width="{SIDE}" height="{SIDE}" href="{picture}"/>'
    shortest = env.shortest_plan(state)
    title = f"{TASKS[task]}, level {level}, board {index}"
    panels = [
        _panel(
            "shortest",
            _drawing(image, task, state, shortest, "hint", f"{title}: a shortest route"),
            f'<p class="outcome">{len(shortest)} actions</p>{_plan(shortest)}',
        )
    ]
    use = f'<use href="#board{number}"/>'
    for name, row in pick.rows.items():
        words, is_good = outcome_words(row), row["outcome"]["success"]
        alt = f"{title}, plan of {model_label(name)}: {words}"
        style = "good" if is_good else "bad"
        drawing = _drawing(use, task, state, tuple(row["plan"]), style, alt)
        sign = "✓" if is_good else "✗"
        text = f'<p class="outcome {style}"><b>{sign}</b> {escape(words)}</p>'
        text += _plan(tuple(row["plan"])) + _state_words(row) + _response(row)
        panels.append(_panel(model_label(name), drawing, text))
    return (
        f'<article class="card"><h3>{escape(title)} <small>{escape(why)}</small></h3>'
        f'<div class="boards">{"".join(panels)}</div></article>'
    )


def outcome_words(row: Row) -> str:
    """Return what came of a row's plan in one phrase, with the action at which it failed."""
    outcome = row["outcome"]
    if outcome["success"]:
        kind = "the shortest way" if outcome["optimal"] else "not the shortest way"
        return f"solved in {outcome['steps']} actions, {kind}"
    words = "cut off at the token limit, " if row["truncated"] else ""
    words += reason_label(outcome["reason"])
    if not outcome["parsed"] or not outcome["steps"]:
        return words
    return f"{words}, action {outcome['steps']} of {len(row['plan'])}"


def png_uri(picture: Any) -> str:
    """Return a uint8 [height, width, 3] picture as a data URI: a PNG of at most 64 colours."""
    image = Image.fromarray(picture).quantize(64, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _panel(name: str, drawing: str, text: str) -> str:
    return f'<figure><figcaption>{escape(name)}</figcaption>{drawing}{text}</figure>'


def _plan(plan: Plan) -> str:
    words = " ".join(_ARROWS[action] for action in plan) if plan else "no plan"
    return f'<p class="plan">{words}</p>'


def _state_words(row: Row) -> str:
    if row["state_f1"] is None:
        return ""
    read = "exactly" if row["state_exact"] else f"F1 {row['state_f1']:.2f}"
    return f'<p class="state">state read: {read}</p>'


def _response(row: Row) -> str:
    text = row["response"]
    cut = f"\n[{len(text) - RESPONSE_LIMIT} more characters]" if len(text) > RESPONSE_LIMIT else ""
    shown = escape(text[:RESPONSE_LIMIT] + cut) or "(nothing)"
    return f"<details><summary>response</summary><pre>{shown}</pre></details>"


def _drawing(image: str, task: str, state: Any, plan: Plan, style: str, alt: str) -> str:
    env = ENVS[task]
    marks = ""
    if plan and all(action in env.ACTIONS for action in plan):
        outcome = env.play(state, plan)
        # The action that was refused leaves no cell in the trace: it is drawn as a stub.
        refused = plan[outcome.steps - 1] if outcome.steps and not outcome.legal else None
        unit = SIDE / state.size
        ends, hands = _lanes(plan, env.trace(state, plan), refused, unit)
        marks = _route(ends, hands, outcome.success, 0.12 * unit)
        marks = f'<g class="route {style}" style="--w:{0.09 * unit:.1f}px;stroke-width:var(--w)">{marks}</g>'
    return (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(alt)}">'
        f"{image}{marks}</svg>"
    )


def _lanes(
    plan: Plan, cells: Sequence[Cell], refused: str | None, unit: float
) -> tuple[list[Point], list[tuple[Point, str]]]:
    """The corners of a route, and where its hands did what (P or D), both in pixels."""
    corners, hands = [_centre(cells[0], unit)], []
    for action, here, there in zip(plan, cells, cells[1:], strict=False):
        if action not in DELTAS:
            hands.append((_centre(here, unit), action[0].upper()))
        elif here != there:
            corners += [_right_of(action, cell, unit) for cell in (here, there)]
    if refused in DELTAS:
        x, y = _right_of(refused, cells[-1], unit)
        down, across = DELTAS[refused]
        corners += [(x, y), (x + 0.5 * across * unit, y + 0.5 * down * unit)]
    return corners, hands


def _route(
    corners: Sequence[Point], hands: Sequence[tuple[Point, str]], is_solved: bool, size: float
) -> str:
    """A ring at the start, the line, letters at pick and drop, and a disc or a cross at the end."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    end = f'<circle r="{1.2 * size:.1f}"/>'
    if not is_solved:
        arms = f"M{-size:.1f} {-size:.1f} {size:.1f} {size:.1f}"
        arms += f"M{size:.1f} {-size:.1f} {-size:.1f} {size:.1f}"
        end = f'<path class="casing" d="{arms}"/><path d="{arms}"/>'
    marks = [(corners[0], f'<circle class="start" r="{1.3 * size:.1f}"/>')]
    marks.append((corners[-1], f'<g class="end">{end}</g>'))
    for place, letter in hands:
        letter = (
            f'<g class="hand"><circle r="{1.7 * size:.1f}"/><text y="{0.85 * size:.1f}" '
            f'font-size="{2.4 * size:.1f}">{letter}</text></g>'
        )
        marks.append((place, letter))
    text = f'<polyline class="casing" points="{line}"/><polyline points="{line}"/>'
    return text + "".join(
        f'<g transform="translate({x:.1f} {y:.1f})">{mark}</g>' for (x, y), mark in marks
    )


def _centre(cell: Cell, unit: float) -> Point:
    return (cell[1] + 0.5) * unit, (cell[0] + 0.5) * unit


def _right_of(action: str, cell: Cell, unit: float) -> Point:
    """The middle of a cell, moved into the lane on the right hand of one who goes this way."""
    (x, y), (down, across) = _centre(cell, unit), DELTAS[action]
    return x - _LANE * unit * down, y + _LANE * unit * across
