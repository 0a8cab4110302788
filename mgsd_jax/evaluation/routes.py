"""A plan drawn as a route over the picture of its board, as pixels."""

from collections.abc import Sequence

import numpy as np
from PIL import Image, ImageDraw

from mgsd_jax.envs import ENVS, AnyState

RIGHT, WRONG, INK = (34, 160, 84), (214, 57, 57), (20, 20, 20)


def draw_route(picture: np.ndarray, task: str, state: AnyState, plan: Sequence[str]) -> np.ndarray:
    """A copy of the picture, uint8 [S, S, 3], with the cells that the plan goes through joined.

    The line is green where the plan succeeds and red where not; it begins with a ring and ends with
    a dot. A plan without actions, or with words that are none, leaves the picture as it is.
    """
    env = ENVS[task]
    plan = tuple(plan)
    if not plan or not all(action in env.actions for action in plan):
        return picture.copy()
    unit = len(picture) / state.size
    points = [((c + 0.5) * unit, (r + 0.5) * unit) for r, c in env.trace(state, plan)]
    colour = RIGHT if env.play(state, plan).success else WRONG
    width = max(2, round(unit / 10))
    image = Image.fromarray(picture)
    draw = ImageDraw.Draw(image)
    for ink, extra in ((INK, max(1, width // 3) * 2), (colour, 0)):
        if len(points) > 1:
            draw.line(points, fill=ink, width=width + extra, joint="curve")
        for (x, y), radius in ((points[0], width), (points[-1], 1.5 * width)):
            size = radius + extra / 2
            draw.ellipse((x - size, y - size, x + size, y + size), fill=ink)
    (x, y), hole = points[0], width / 2
    draw.ellipse((x - hole, y - hole, x + hole, y + hole), fill=(255, 255, 255))
    return np.asarray(image)
