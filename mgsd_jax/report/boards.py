"""The gallery of a report: boards with the route of each model's plan drawn over them."""

import base64
import dataclasses
import io
import itertools
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any, Literal

from PIL import Image

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import DELTAS, Cell, Plan
from mgsd_jax.evaluation.summary import MODELS, Board, Row, board_of, sort_models
from mgsd_jax.report.tables import reason_label
from mgsd_jax.report.words import TASKS, model_label

Point = tuple[float, float]  # x, y in pixels of the picture
Kind = Literal["fixed", "broken", "failed", "solved"]
SIDE = 256  # pixels of a board picture
RESPONSE_LIMIT = 1200  # characters of a response that are shown
# How many boards of each kind the gallery takes from each task.
QUOTA: Mapping[Kind, int] = {"fixed": 2, "broken": 1, "failed": 1, "solved": 1}
# Of a cell: how far routes keep to the right, so that a way back does not hide the way there, and
# how far a refused move is drawn.
_LANE, _STUB = 0.11, 0.4
_ARROWS = {"up": "↑", "down": "↓", "left": "←", "right": "→", "pick": "PICK", "drop": "DROP"}


@dataclasses.dataclass(frozen=True)
class Pick:
    """A board of the gallery, why it is there, and its picture row of each model."""

    kind: Kind
    board: Board
    compared: tuple[str, str]  # models
    rows: Mapping[str, Row]


def choose(rows: Sequence[Row]) -> tuple[Pick, ...]:
    """Return the boards to show: of each task and kind evenly spread ones by level and index.

    The kind compares the first and the last of base, grounded and distilled (of all models, where
    none of these is there): fixed or broken on the way, failed by both, or solved by both. The
    same rows always give the same gallery.
    """
    answers: dict[Board, dict[str, Row]] = {}
    for row in rows:
        if row["mode"] == "picture":
            # Of several tries the first one is shown.
            answers.setdefault(board_of(row), {}).setdefault(row["model"], row)
    names = sort_models({name for by_model in answers.values() for name in by_model})
    known = [name for name in names if name in MODELS] or names
    picks = []
    for task in ENVS:
        found: dict[Kind, list[Pick]] = {kind: [] for kind in QUOTA}
        for board in sorted(board for board in answers if board[0] == task):
            by_model = answers[board]
            if len(by_model) == len(names):
                ordered = {name: by_model[name] for name in names}
                kind = _kind(ordered[known[0]], ordered[known[-1]])
                found[kind].append(Pick(kind, board, (known[0], known[-1]), ordered))
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


def card(pick: Pick, number: int, why: str = "") -> str:
    """Return one board as HTML: a shortest route, then the route of every model beside it.

    `why` it is shown follows from its kind unless it is given.
    """
    task, level, index = pick.board
    env = ENVS[task]
    source = f"{task}, level {level}, index {index}"
    state = env.from_text(next(iter(pick.rows.values()))["task_text"], source=source)
    first, last = map(model_label, pick.compared)
    why = (
        why
        or {
            "fixed": f"{first} fails, {last} solves it",
            "broken": f"{first} solves it, {last} fails",
            "failed": f"{last} fails" if first == last else f"{first} and {last} both fail",
            "solved": f"{last} solves it" if first == last else f"{first} and {last} both solve it",
        }[pick.kind]
    )
    picture = png_uri(env.render(state, SIDE))
    image = f'<image id="board{number}" width="{SIDE}" height="{SIDE}" href="{picture}"/>'
    shortest = env.shortest_plan(state)
    title = f"{TASKS[task]}, level {level}, board {index}"
    panels = [
        _panel(
            "shortest",
            _drawing(image, task, state, shortest, "hint", f"{title}: a shortest route"),
            f'<p class="outcome">{_actions(len(shortest))}</p>{_plan(shortest)}',
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
        return f"solved in {_actions(outcome['steps'])}, {kind}"
    if "error" in row:
        return "the request failed"
    words = "cut off at the token limit, " if row["truncated"] else ""
    words += reason_label(outcome["reason"])
    if not outcome["parsed"] or not outcome["steps"]:
        return words
    if outcome["reason"] == "not_reached":
        return f"{words} after {_actions(outcome['steps'])}"
    return f"{words} at action {outcome['steps']} of {len(row['plan'])}"


def png_uri(picture: Any) -> str:
    """Return a uint8 [height, width, 3] picture as a data URI: a PNG of at most 256 colours."""
    image = Image.fromarray(picture).quantize(256, dither=Image.Dither.NONE)
    buffer = io.BytesIO()
    image.save(buffer, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")


def _actions(count: int) -> str:
    return f"{count} action{'' if count == 1 else 's'}"


def _panel(name: str, drawing: str, text: str) -> str:
    return f"<figure><figcaption>{escape(name)}</figcaption>{drawing}<div>{text}</div></figure>"


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
        outcome, cells, unit = env.play(state, plan), env.trace(state, plan), SIDE / state.size
        moves, hands = [], []
        for action, here, there in zip(plan, cells, cells[1:], strict=False):
            if action not in DELTAS:
                hands.append((_centre(here, unit), action[0].upper()))
            elif here != there:
                moves.append((action, _centre(there, unit)))
        # The action that was refused leaves no cell in the trace: it is drawn as a stub.
        refused = plan[outcome.steps - 1] if outcome.steps and not outcome.legal else None
        start, (x, y) = _centre(cells[0], unit), _centre(cells[-1], unit)
        if refused is not None and refused in DELTAS:
            down, across = DELTAS[refused]
            moves.append((refused, (x + _STUB * across * unit, y + _STUB * down * unit)))
        corners = _lane(start, moves, _LANE * unit)
        marks = _route(start, corners, hands, outcome.success, 0.12 * unit)
        marks = f'<g class="route {style}" style="--w:{0.09 * unit:.1f}px">{marks}</g>'
    return (
        f'<svg viewBox="0 0 {SIDE} {SIDE}" role="img" aria-label="{escape(alt)}">'
        f"{image}{marks}</svg>"
    )


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
    """The point that lies `width` to the right hand of one who goes this way."""
    down, across = DELTAS[action]
    return point[0] - width * down, point[1] + width * across


def _route(
    start: Point,
    corners: Sequence[Point],
    hands: Sequence[tuple[Point, str]],
    is_solved: bool,
    size: float,
) -> str:
    """A ring at the start, the line, letters at pick and drop, and a disc or a cross at the end."""
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    end = f'<circle r="{size:.1f}"/>'
    if not is_solved:
        arms = f"M{-size:.1f} {-size:.1f} {size:.1f} {size:.1f}"
        arms += f"M{size:.1f} {-size:.1f} {-size:.1f} {size:.1f}"
        end = f'<path class="casing" d="{arms}"/><path d="{arms}"/>'
    marks = [(start, f'<circle class="start" r="{2.6 * size:.1f}"/>')]
    marks.append((corners[-1], f'<g class="end">{end}</g>'))
    for i, ((x, y), letter) in enumerate(hands):
        x += 3.6 * size * sum(place == (x, y) for place, _ in hands[:i])
        letter = (
            f'<g class="hand"><circle r="{1.7 * size:.1f}"/><text y="{0.85 * size:.1f}" '
            f'font-size="{2.4 * size:.1f}">{letter}</text></g>'
        )
        marks.append(((x, y), letter))
    text = f'<polyline class="casing" points="{line}"/><polyline points="{line}"/>'
    return text + "".join(
        f'<g transform="translate({x:.1f} {y:.1f})">{mark}</g>' for (x, y), mark in marks
    )
