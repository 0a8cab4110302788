"""Draws README's picture from a run: one board a task, the base's route and the distilled model's.

python launch/picture.py runs/quickstart docs/boards

writes docs/boards_light.svg and docs/boards_dark.svg. Of each task it shows a board that the base
fails, with a plan that can be drawn, and that the distilled model solves in the fewest actions: the
first of those that need the most actions.
"""

import pathlib
import sys
from collections.abc import Sequence

from markupsafe import Markup

from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.rows import PlanRow, Row, board_of, read_rows
from mgsd_jax.report.boards import SIDE, first_answers, png_uri, route
from mgsd_jax.report.markup import tag
from mgsd_jax.report.words import TASKS, model_label, reason_label

Pair = tuple[PlanRow, PlanRow]  # the answers of the two models to one board
MODELS = ("base", "distilled")
# Ink, muted ink, words about a plan that solves its board and about one that fails, frame.
THEMES = {
    "light": ("#1f2328", "#59636e", "#00704f", "#b83a00", "#d1d9e0"),
    "dark": ("#f0f6fc", "#9198a1", "#3fcb9f", "#ff8a5c", "#3d444d"),
}
BOARD, GAP, BETWEEN = 136, 8, 28  # pixels of a board, and between two of one task and of others
TOP, BOTTOM = 30, 46  # of the words above and below
SCALE = BOARD / SIDE


def choose(rows: Sequence[Row]) -> list[Pair]:
    """The answers of both models to a board of each task."""
    best: dict[str, Pair] = {}
    answers = first_answers(rows)
    for board in sorted(answers):
        before, after = (answers[board][model] for model in MODELS)
        is_drawn = before["outcome"]["parsed"] and before["plan"]
        if not is_drawn or before["outcome"]["success"] or not after["outcome"]["optimal"]:
            continue
        length = len(after["plan"])
        if board[0] not in best or length > len(best[board[0]][1]["plan"]):
            best[board[0]] = before, after
    return [best[task] for task in ENVS if task in best]


def draw(pairs: Sequence[Pair], theme: str) -> Markup:
    """The boards side by side, each with the name of the model and what came of its plan."""
    step = 2 * BOARD + GAP + BETWEEN
    width, height = len(pairs) * step - BETWEEN, TOP + BOARD + BOTTOM
    content = [
        tag("g", *_board(pair, theme), transform=f"translate({i * step} 0)")
        for i, pair in enumerate(pairs)
    ]
    return tag(
        *("svg", tag("title", "Boards with the routes of two models"), *content),
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width} {height}",
        width=width,
        height=height,
        style="font-family:system-ui,-apple-system,'Segoe UI',Helvetica,Arial,sans-serif",
    )


def _board(pair: Pair, theme: str) -> list[Markup]:
    ink, muted, good, bad, line = THEMES[theme]
    task, level, index = board_of(pair[0])
    state = ENVS[task].from_text(pair[0]["task_text"], source=f"{task} {level}, board {index}")
    picture = png_uri(ENVS[task].render(state, SIDE))
    image = tag("image", id=task, width=SIDE, height=SIDE, href=picture)
    frame = tag("rect", width=SIDE, height=SIDE, fill="none", stroke=line, stroke_width=3)
    parts = [_text(0, 16, f"{TASKS[task]}, {level}x{level}", ink, 15, 600)]
    for place, row in enumerate(pair):
        x, is_solved = place * (BOARD + GAP), row["outcome"]["success"]
        marks = route(task, state, tuple(row["plan"]), "good" if is_solved else "bad")
        shown = tag("use", href=f"#{task}") if place else image
        parts.append(
            tag("g", shown, frame, marks, transform=f"translate({x} {TOP}) scale({SCALE})")
        )
        parts.append(_text(x, TOP + BOARD + 18, model_label(row["model"]), muted, 13, 600))
        words = reason_label(row["outcome"]["reason"] or "")
        parts.append(_text(x, TOP + BOARD + 36, words, good if is_solved else bad, 13, 400))
    return parts


def _text(x: int, y: int, words: str, colour: str, size: int, weight: int) -> Markup:
    return tag("text", words, x=x, y=y, fill=colour, font_size=size, font_weight=weight)


def main(workdir: str, prefix: str) -> None:
    pairs = choose(read_rows(pathlib.Path(workdir) / "evaluate"))
    for theme in THEMES:
        path = pathlib.Path(f"{prefix}_{theme}.svg")
        path.write_text(draw(pairs, theme) + "\n")
        print(f"{path}: {path.stat().st_size} bytes")


if __name__ == "__main__":
    main(*sys.argv[1:])
