"""What a model says of one picture, in words for a terminal and as the picture with its route."""

import numpy as np
from markupsafe import Markup

from mgsd_jax.envs import ENVS, AnyState
from mgsd_jax.envs.base import show_cells
from mgsd_jax.envs.responses import answer_span, without_thoughts
from mgsd_jax.envs.search import DELTAS, Cell
from mgsd_jax.evaluation.reply import Reply
from mgsd_jax.evaluation.rules import parse_plan
from mgsd_jax.report.boards import SIDE, outcome_words, png_uri, route
from mgsd_jax.report.markup import tag
from mgsd_jax.report.words import TASKS

_RESPONSE_LIMIT = 2000  # characters of a response that are shown
_PLAN_LIMIT = 80  # characters of a plan that cannot be read
_CELL_LIMIT = 12  # cells that are listed


def lines(reply: Reply) -> list[str]:
    """The board, the route and the plan of a reply, with warnings where they are needed."""
    if not reply.task:
        return [_cut(reply.answer.text) or "(no words)", *_warnings(reply)]
    parsed = parse_plan(reply.answer.text, reply.task)
    env, plan, words = ENVS[reply.task], parsed.plan, " ".join(parsed.plan) or "none"
    if not parsed.parsed:
        words = f"cannot be read: {_unread(reply.answer.text)}"
    if reply.board is None or reply.row is None:
        said = _cut(reply.answer.text).splitlines() or ["(nothing)"]
        return ["It answers:", *(f"  {line}" for line in said), *_warnings(reply)]
    state = reply.board.state
    found = [f"It sees, in {TASKS[reply.task]} of {state.size}x{state.size} cells:", ""]
    found += [*(f"  {line}" for line in board_lines(reply.task, state)), ""]
    if plan:
        cells = env.trace(state, plan)
        is_legal = reply.row["outcome"]["legal"]
        found.append(f"Route: {env.route(plan, cells) if is_legal else show_cells(cells)}")
    found.append(f"Plan:  {words}")
    found.append(f"       on the board that it sees: {outcome_words(reply.row)}")
    return [*found, *_warnings(reply)]


def _cut(text: str, limit: int = _RESPONSE_LIMIT) -> str:
    return text if len(text) <= limit else text[:limit] + " ..."


def _unread(text: str) -> str:
    """What stands in place of a plan: the answer block, or the last line of an answer without."""
    span = answer_span(text)
    said = text[slice(*span)] if span else (without_thoughts(text).strip().splitlines() or [""])[-1]
    return _cut(" ".join(said.split()), _PLAN_LIMIT) or "(nothing)"


def _warnings(reply: Reply) -> list[str]:
    """What stands against believing the reply."""
    found = []
    if reply.answer.truncated:
        found.append("the answer was cut off at the token limit (ask.max_new_tokens)")
    if reply.problem:
        found.append(f"what it states makes no board, so there is no route ({reply.problem})")
    if reply.board is not None and reply.unlike:
        count, total = len(reply.unlike), reply.board.level**2
        cells = show_cells(reply.unlike[:_CELL_LIMIT]) + (" ..." if count > _CELL_LIMIT else "")
        where = f"{count} of {total} cells: {cells}" if count < total else f"all {total} cells"
        text = f"drawn anew, this board differs from the picture in {where}"
        if reply.is_doubtful:
            text += f"; is it a picture of {TASKS[reply.task]}, drawn as in the training?"
        found.append(text)
    if reply.board is not None:
        paths = ENVS[reply.task].paths(reply.board.state)
        if paths.distances[paths.start] < 0:
            found.append("the board that it sees has no solution")
    return [f"Warning: {text}" for text in found]


def board_lines(task: str, state: AnyState) -> list[str]:
    """A board as a drawing in letters, with walls where the task has them.

    Where two cells do not agree on whether the side between them is open, the wall is dotted.
    """
    env, size = ENVS[task], state.size
    facts = env.facts(state)
    letters: dict[str, str] = {}
    for label in env.labels:
        letters[label] = next(x for x in label.upper() if x not in letters.values())
    things: dict[Cell, str] = {}
    for label, letter in letters.items():
        for cell in (fact[1] for fact in facts if fact[0] == label):
            things[cell] = things.get(cell, "") + letter
    opened = {(fact[1], fact[2]) for fact in facts if fact[0] == "open"}
    head = "".join(f"{column:^4}" for column in range(size))
    found = [", ".join(f"{letter} {label}" for label, letter in letters.items())]
    found.append(f"    {head}".rstrip())
    for row in range(size + 1):
        if env.has_sides:
            above = [_wall(opened, (row, c), "up", size, "---") for c in range(size)]
            found.append(f"    +{'+'.join(above)}+")
        if row == size:
            break
        sides = [_wall(opened, (row, c), "left", size, "|") for c in range(size + 1)]
        ends = sides if env.has_sides else [" "] * len(sides)
        empty = " " if env.has_sides else "."
        cells = [f"{things.get((row, c), empty):^3}" for c in range(size)]
        inside = "".join(end + cell for end, cell in zip(ends, cells, strict=False))
        found.append(f"{row:>3} {inside}{ends[-1]}".rstrip())
    return found


def _wall(opened: set[tuple[Cell, str]], cell: Cell, way: str, size: int, closed: str) -> str:
    """What stands between a cell and the one above or to the left; either may be off the board."""
    (down, across), back = DELTAS[way], {"up": "down", "left": "right"}[way]
    sides = [(cell, way), ((cell[0] + down, cell[1] + across), back)]
    claims = [side in opened for side in sides if max(side[0]) < size and min(side[0]) >= 0]
    if any(claims):
        return f"{' ' if all(claims) else ':':^{len(closed)}}"
    return closed


def picture(reply: Reply, pixels: np.ndarray) -> str:
    """A picture, uint8 [H, W, 3], as an SVG file with the route of the reply over it.

    The board fills the picture, so a side of the picture is a side of the board.
    """
    image = tag("image", width=SIDE, height=SIDE, href=png_uri(pixels))
    marks = Markup("")
    if reply.board is not None and reply.row is not None:
        style = "good" if reply.row["outcome"]["success"] else "bad"
        marks = route(reply.task, reply.board.state, tuple(reply.row["plan"]), style)
    box = {"viewBox": f"0 0 {SIDE} {SIDE}", "width": 2 * SIDE, "height": 2 * SIDE}
    return tag("svg", image, marks, xmlns="http://www.w3.org/2000/svg", **box) + "\n"
