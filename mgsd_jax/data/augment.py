"""Training pictures changed at random: a model shall learn what things are, not how they look.

The board stays true: nothing moves by more than 0.4 cells down or across, and what is light stays
lighter than what is dark, which tells the dots of a maze apart. What the teacher reads is the board
as it is. Evaluation and validation show pictures as they are.
"""

import io
import math
from collections.abc import Callable, Collection

import numpy as np
from PIL import Image, ImageFilter

# Luma and two axes of colour (NTSC): a turn about the first changes hues and keeps how light they
# are, so that the yellow dot of a maze stays the lighter of the two.
_TO_YIQ = np.array(
    [[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]], np.float32
)
_FROM_YIQ = np.linalg.inv(_TO_YIQ)
_NODES = 2  # of the net that bends a picture, in a cell


def augment(
    pixels: np.ndarray,
    level: int,
    rng: np.random.Generator,
    *,
    strength: float,
    kinds: Collection[str],
) -> np.ndarray:
    """A random variant of a picture of level x level cells, uint8 [H, W, 3] of the same shape.

    `strength` is 0 (none) to 1; it does not change how far `rng` advances.
    """
    for kind, change in CHANGES.items():
        if kind in kinds:
            pixels = change(pixels, level, rng, strength)
    return pixels


def _colours(
    pixels: np.ndarray, level: int, rng: np.random.Generator, strength: float
) -> np.ndarray:
    """Hues turned by up to half a circle, saturation, contrast and brightness changed."""
    turn = math.pi * strength * rng.uniform(-1, 1)
    saturation = 1 + 0.5 * strength * rng.uniform(-1, 1)
    contrast = 1 + 0.4 * strength * rng.uniform(-1, 1)
    brightness = 48 * strength * rng.uniform(-1, 1)
    cos, sin = saturation * math.cos(turn), saturation * math.sin(turn)
    turned = np.array([[1, 0, 0], [0, cos, -sin], [0, sin, cos]], np.float32)
    matrix = contrast * (_FROM_YIQ @ turned @ _TO_YIQ)
    changed = (pixels.astype(np.float32) - 127.5) @ matrix.T.astype(np.float32)
    return _as_bytes(changed + np.float32(127.5 + brightness))


def _place(pixels: np.ndarray, level: int, rng: np.random.Generator, strength: float) -> np.ndarray:
    """The board moved, scaled and turned, each by up to 0.1 cells down and across."""
    height, width = pixels.shape[:2]
    cell = width / level
    across, down = 0.1 * strength * cell * rng.uniform(-1, 1, 2)
    reach = 0.1 * strength * 2 / level
    scale = 1 + reach * rng.uniform(-1, 1)
    turn = reach * rng.uniform(-1, 1)
    cos, sin = math.cos(turn) / scale, math.sin(turn) / scale
    x, y = (width - 1) / 2, (height - 1) / 2
    back = (cos, sin, x - cos * (x + across) - sin * (y + down))
    back += (-sin, cos, y + sin * (x + across) - cos * (y + down))
    # Beyond its edge the board goes on as it ends.
    edge = math.ceil(cell)
    padded = Image.fromarray(np.pad(pixels, ((edge, edge), (edge, edge), (0, 0)), mode="edge"))
    a, b, c, d, e, f = back
    shifted = (a, b, c + edge, d, e, f + edge)
    moved = padded.transform(
        (width, height), Image.Transform.AFFINE, shifted, Image.Resampling.BILINEAR
    )
    return np.asarray(moved)


def _shapes(
    pixels: np.ndarray, level: int, rng: np.random.Generator, strength: float
) -> np.ndarray:
    """Things bent out of shape: a net of two meshes a cell, its nodes moved by up to 0.1 cells."""
    height, width = pixels.shape[:2]
    count = _NODES * level
    xs, ys = np.linspace(0, width, count + 1), np.linspace(0, height, count + 1)
    net = np.stack(np.meshgrid(xs, ys), axis=-1)  # [rows, columns, (x, y)]
    moves = 0.1 * strength * width / level * rng.uniform(-1, 1, net.shape)
    net += moves
    net[..., 0] = net[..., 0].clip(0, width)
    net[..., 1] = net[..., 1].clip(0, height)
    meshes = []
    edges_x, edges_y = np.rint(xs).astype(int), np.rint(ys).astype(int)
    for row in range(count):
        for column in range(count):
            box = (edges_x[column], edges_y[row], edges_x[column + 1], edges_y[row + 1])
            # PIL wants the corners from the upper left, counter-clockwise.
            corners = net[[row, row + 1, row + 1, row], [column, column, column + 1, column + 1]]
            meshes.append((tuple(map(int, box)), tuple(corners.ravel().tolist())))
    bent = Image.fromarray(pixels).transform(
        (width, height), Image.Transform.MESH, meshes, Image.Resampling.BILINEAR
    )
    return np.asarray(bent)


def _noise(pixels: np.ndarray, level: int, rng: np.random.Generator, strength: float) -> np.ndarray:
    """Blur, noise, and half of the time what JPEG does."""
    blur, deviation = 0.02 * pixels.shape[1] / level, 12.0
    blur, deviation = (most * strength * rng.random() for most in (blur, deviation))
    quality, is_jpeg = round(95 - 65 * strength * rng.random()), rng.random() < 0.5
    grain = rng.standard_normal(pixels.shape, np.float32)
    picture = Image.fromarray(pixels).filter(ImageFilter.GaussianBlur(blur))
    pixels = _as_bytes(np.asarray(picture) + np.float32(deviation) * grain)
    if not is_jpeg:
        return pixels
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=quality)
    return np.asarray(Image.open(file))


def _as_bytes(values: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(values), 0, 255).astype(np.uint8)


Change = Callable[[np.ndarray, int, np.random.Generator, float], np.ndarray]
# What `data.augment_kinds` names, in the order in which they are done.
CHANGES: dict[str, Change] = {
    "colours": _colours,
    "shapes": _shapes,
    "place": _place,
    "noise": _noise,
}
