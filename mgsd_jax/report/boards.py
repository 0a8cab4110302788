"""The gallery of a report: boards with the route of each model's plan drawn over them."""

import base64
import dataclasses
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, TypeVar

import numpy as np
from markupsafe import Markup
from PIL import Image

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import Sized
from mgsd_jax.envs.search import DELTAS, Cell, Plan
from mgsd_jax.evaluation.rows import BoardKey, PlanRow, Row, board_of, plans
from mgsd_jax.evaluation.summary import MODELS, sort_models
from mgsd_jax.report.markup import tag, write
from mgsd_jax.report.words import TASKS, model_label, reason_label

T = TypeVar("T")
Point = tuple[float, float]  # x, y in pixels of the picture
Kind = Literal["fixed", "broken", "failed", "solved"]
SIDE = 256  # pixels of a board picture
RESPONSE_LIMIT = 1200  # characters of a response that are shown
# How many boards of each kind the gallery takes from each task.
QUOTA: Mapping[Kind, int] = {"fixed": 2, "broken": 1, "failed": 1, "solved": 1}
# By whether the first and the last model solve a board.
_KINDS: Mapping[tuple[bool, bool], tuple[Kind, str]] = {
    (False, True): ("fixed", "{0} fails, {1} solves it"),
    (True, False): ("broken", "{0} solves it, {1} fails"),
    (False, False): ("failed", "{0} and {1} both fail"),
    (True, True): ("solved", "{0} and {1} both solve it"),
}
# In cells: how far a route keeps to the right, so that a way back does not hide the way there, and
# how far a refused move is drawn.
_LANE, _STUB = 0.11, 0.4
_ARROWS = {"up": "↑", "down": "↓", "left": "←", "right": "→"}
# Of routes: they lie on pictures of boards, which are the same on a light and on a dark page.
_COLOURS = {"good": "#19d3a2", "bad": "#ff7a2f", "hint": "#c9d3dd"}
_INK = "#10151b"


@dataclasses.dataclass(frozen=True)
class Pick:
    """A board of the gallery, why it is there, and what each model answered to its picture."""

    board: BoardKey
    why: str
    rows: Mapping[str, PlanRow]
    kind: Kind = "fixed"


def choose(rows: Sequence[Row]) -> tuple[Pick, ...]:
    """Return the boards to show: of each task and kind some, evenly spread by level and index.

    The kind compares the first and the last of base, grounded and distilled (of all models, where
    none of these is there): fixed or broken on the way, failed by both, or solved by both. The
    same rows always give the same gallery.
    """
    answers = first_answers(rows)
    names = sort_models({name for by_model in answers.values() for name in by_model})
    known = main_models(names)
    picks = []
    for task in ENVS:
        found: dict[Kind, list[Pick]] = {kind: [] for kind in QUOTA}
        for board in sorted(board for board in answers if board[0] == task):
            if len(answers[board]) == len(names):
                pick = _pick(board, {name: answers[board][name] for name in names}, known)
                found[pick.kind].append(pick)
        for kind, count in QUOTA.items():
            picks += spread(found[kind], count)
    return tuple(picks)


def examples(picks: Sequence[Pick]) -> list[Pick]:
    """Return the first board of each task."""
    return list({pick.board[0]: pick for pick in reversed(picks)}.values())[::-1]


def first_answers(rows: Sequence[Row]) -> dict[BoardKey, dict[str, PlanRow]]:
    """Return the first answer of each model to each picture."""
    answers: dict[BoardKey, dict[str, PlanRow]] = {}
    for row in plans(rows, "picture"):
        answers.setdefault(board_of(row), {}).setdefault(row["model"], row)
    return answers


def main_models(names: Iterable[str]) -> Sequence[str]:
    """Return base, grounded and distilled, as far as they are there; else all names in order."""
    ordered = sort_models(names)
    return [name for name in ordered if name in MODELS] or ordered


def spread(found: Sequence[T], count: int) -> list[T]:
    """Return `count` of what was found, evenly spread; all of it where there is no more."""
    if len(found) <= count:
        return list(found)
    return [found[int((i + 0.5) * len(found) / count)] for i in range(count)]


def _pick(board: BoardKey, rows: Mapping[str, PlanRow], known: Sequence[str]) -> Pick:
    first, last = known[0], known[-1]
    before, after = (rows[name]["outcome"]["success"] for name in (first, last))
    kind, words = _KINDS[before, after]
    if first == last:
        words = "{1} solves it" if after else "{1} fails"
    return Pick(board, words.format(model_label(first), model_label(last)), rows, kind)


def card(pick: Pick, number: int) -> Markup:
    """Return one board as HTML: a shortest route, then the route of every model beside it.

    The picture is there once and referred to by its `number`.
    """
    task, level, index = pick.board
    text = next(iter(pick.rows.values()))["task_text"]
    state = ENVS[task].from_text(text, source=f"{task}, level {level}, index {index}")
    picture = png_uri(ENVS[task].render(state, SIDE))
    image = tag("image", id=f"board{number}", width=SIDE, height=SIDE, href=picture)
    title = f"{TASKS[task]}, level {level}, board {index}"
    plan = ENVS[task].shortest_plan(state)
    drawing = _drawing(image, task, state, plan, "hint", f"{title}: a shortest route")
    panels: list[tuple[object, ...]] = [
        ("shortest", drawing, _actions(len(plan)), _arrows(task, plan), None, 0)
    ]
    use = tag("use", href=f"#board{number}")
    for model, row in pick.rows.items():
        words, plan, name = outcome_words(row), tuple(row["plan"]), model_label(model)
        style = "good" if row["outcome"]["success"] else "bad"
        drawing = _drawing(use, task, state, plan, style, f"{title}, plan of {name}: {words}")
        panels.append((name, drawing, words, _arrows(task, plan), row, RESPONSE_LIMIT))
    return write("card", title, pick.why, panels)


def outcome_words(row: PlanRow) -> str:
    """Return what came of a row's plan in one phrase, with the action at which it failed."""
    outcome = row["outcome"]
    if outcome["success"]:
        kind = "the shortest way" if outcome["optimal"] else "not the shortest way"
        return f"solved in {_actions(outcome['steps'])}, {kind}"
    if "error" in row:
        return "the request failed"
    words = "cut off at the token limit, " if row["truncated"] else ""
    words += reason_label(outcome["reason"] or "")
    if not outcome["parsed"] or not outcome["steps"]:
        return words
    if outcome["reason"] == "not_reached":
        return f"{words} after {_actions(outcome['steps'])}"
    return f"{words} at action {outcome['steps']} of {len(row['plan'])}"


def png_uri(picture: np.ndarray) -> str:
    """Return a uint8 [height, width, 3] picture as a data URI: a PNG of at most 256 colours."""
    image = Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _actions(count: int) -> str:
    return f"{count} action{'' if count == 1 else 's'}"


def _arrows(task: str, plan: Plan) -> str:
    """The plan with an arrow for a move, and any other action as an answer spells it."""
    signs = {**ENVS[task].actions, **_ARROWS}
    return " ".join(signs.get(action, action.upper()) for action in plan) if plan else "no plan"


def _drawing(image: Markup, task: str, state: Sized, plan: Plan, style: str, alt: str) -> Markup:
    box = f"0 0 {SIDE} {SIDE}"
    marks = route(task, state, plan, style)
    return tag("svg", image, marks, viewBox=box, role="img", aria_label=alt)


def route(task: str, state: Sized, plan: Plan, style: str) -> Markup:
    """Return the route of a plan as SVG over a board's picture of SIDE x SIDE, needing no CSS.

    It is empty for a plan without actions, or with words that are none.
    """
    env = ENVS[task]
    if not plan or not all(action in env.actions for action in plan):
        return Markup("")
    outcome, cells, unit = env.play(state, plan), env.trace(state, plan), SIDE / state.size
    moves, hands = [], []
    for action, here, there in zip(plan, cells, cells[1:], strict=False):
        if action not in DELTAS:
            word = env.actions[action]
            hands.append((_centre(here, unit), word if len(word) < 3 else word[0]))
        elif here != there:
            moves.append((action, _centre(there, unit)))
    # The action that was refused leaves no cell in the trace: it is drawn as a stub.
    refused = plan[outcome.steps - 1] if outcome.steps and not outcome.legal else None
    start, (x, y) = _centre(cells[0], unit), _centre(cells[-1], unit)
    if refused is not None and refused in DELTAS:
        down, across = DELTAS[refused]
        moves.append((refused, (x + _STUB * across * unit, y + _STUB * down * unit)))
    corners = _lane(start, moves, _LANE * unit)
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    width, colour = 0.09 * unit, _COLOURS[style]
    dashes = {"stroke_dasharray": f"{2.2 * width:.1f} {1.8 * width:.1f}", "stroke_linecap": "butt"}
    content = [
        tag("polyline", points=line, stroke=_INK, stroke_width=1.9 * width),
        tag("polyline", points=line, **(dashes if style == "bad" else {})),
        *_ends(start, corners[-1], hands, outcome.success, 0.12 * unit, width, colour),
    ]
    joins = {"stroke_linecap": "round", "stroke_linejoin": "round", "fill": "none"}
    return tag("g", *content, class_=f"route {style}", stroke=colour, stroke_width=width, **joins)


def _centre(cell: Cell, unit: float) -> Point:
    return (cell[1] + 0.5) * unit, (cell[0] + 0.5) * unit


def _lane(start: Point, moves: Sequence[tuple[str, Point]], width: float) -> list[Point]:
    """The corners of a route that keeps `width` to the right of the middle of its cells.

    `moves` are actions and where they end. Where the route turns by a right angle, the corner is
    moved to the right of both ways; where it turns back, it crosses over.
    """
    if not moves:
        return [start]
    corners = [_right_of(start, moves[0][0], width)]
    for (action, end), (following, _) in itertools.pairwise(moves):
        near = _right_of(end, action, width)
        if action == following:
            continue
        if DELTAS[action][0] * DELTAS[following][0] + DELTAS[action][1] * DELTAS[following][1]:
            corners += [near, _right_of(end, following, width)]
        else:
            corners.append(_right_of(near, following, width))
    return [*corners, _right_of(moves[-1][1], moves[-1][0], width)]


def _right_of(point: Point, action: str, width: float) -> Point:
    """The point, moved by `width` to the right of the direction of travel."""
    down, across = DELTAS[action]
    return point[0] - width * down, point[1] + width * across


def _ends(
    start: Point,
    end: Point,
    hands: Sequence[tuple[Point, str]],
    is_solved: bool,
    size: float,
    width: float,
    colour: str,
) -> list[Markup]:
    """A ring at the start, letters at what is no move, and a disc or a cross at the end."""
    last = [tag("circle", r=size, fill=colour, stroke=_INK, stroke_width=1.5)]
    if not is_solved:
        arms = f"M{-size:.1f} {-size:.1f} {size:.1f} {size:.1f}"
        arms += f"M{size:.1f} {-size:.1f} {-size:.1f} {size:.1f}"
        last = [tag("path", d=arms, stroke=_INK, stroke_width=1.9 * width), tag("path", d=arms)]
    marks = [(start, tag("circle", r=2.6 * size, stroke_width=2.5)), (end, tag("g", *last))]
    for i, ((x, y), letter) in enumerate(hands):
        # Beside those that are done at the same place.
        x += 3.6 * size * sum(place == (x, y) for place, _ in hands[:i])
        font = (
            f"font:700 {2.4 * size:.1f}px sans-serif;fill:{_INK}"  # over what a page says of text
        )
        text = tag("text", letter, y=0.85 * size, text_anchor="middle", stroke="none", style=font)
        disc = tag("circle", r=1.7 * size, fill="#fff", stroke_width=2)
        marks.append(((x, y), tag("g", disc, text)))
    return [tag("g", mark, transform=f"translate({x:.1f} {y:.1f})") for (x, y), mark in marks]
