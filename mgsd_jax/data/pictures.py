"""Pictures to patches, with the picture settings of a checkpoint.

Axes: P patches, C = 3 * temporal_patch_size * patch_size^2 patch channels.
"""

import dataclasses
import functools
import io
import math
import warnings
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from mgsd_jax.checks.fields import expect, field, optional, positive, read_json, whole
from mgsd_jax.checks.ranges import shown
from mgsd_jax.data.positions import Grid

# Defaults of transformers' Qwen2VLImageProcessor.
DEFAULT_RESCALE = 1 / 255
DEFAULT_RESAMPLE = Image.Resampling.BICUBIC
MOST_PIXELS = 2**26  # no model reads more; a larger picture is a mistake or a decompression bomb
PROCESSOR_TYPES = tuple(f"Qwen2VLImageProcessor{kind}" for kind in ("", "Fast", "Pil"))
# Names of the same sizes in the picture settings and in the model's `vision_config`.
MODEL_SIZES = {
    "patch_size": "patch_size",
    "temporal_patch_size": "temporal_patch_size",
    "merge_size": "spatial_merge_size",
}
FORMATS = ("PNG", "JPEG", "WEBP")  # of picture files, whatever their names say
_WANTED = f"a picture file, {' or '.join(FORMATS)}"


@dataclasses.dataclass(frozen=True)
class PictureSettings:
    """How pictures become patches (preprocessor_config.json)."""

    patch_size: int
    temporal_patch_size: int
    merge_size: int
    min_pixels: int
    max_pixels: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    rescale: float
    resample: int  # a PIL.Image.Resampling

    @property
    def channels(self) -> int:
        """C, the numbers in a patch."""
        return 3 * self.temporal_patch_size * self.patch_size**2


def smart_resize(
    height: int, width: int, *, factor: int, min_pixels: int, max_pixels: int
) -> tuple[int, int]:
    """The size nearest to a picture's with sides of a multiple of `factor` and pixels in range.

    Raises ValueError for a picture more than 200 times as long as wide. Source: transformers
    `smart_resize`; the range is tested on the rounded sides, scaled from the exact ones.
    """
    if min(height, width) < 1 or max(height, width) > 200 * min(height, width):
        raise ValueError(f"picture: got {height}x{width}, want an aspect ratio of at most 200")
    rows, columns = (round(side / factor) * factor for side in (height, width))
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows, columns = (
            max(factor, math.floor(side / shrink / factor) * factor) for side in (height, width)
        )
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows, columns = (math.ceil(side * grow / factor) * factor for side in (height, width))
    return rows, columns


def cut_patches(pixels: np.ndarray, settings: PictureSettings) -> tuple[np.ndarray, Grid]:
    """Patches [P, C] float32 of a picture, uint8 [height, width, 3], and its grid.

    C runs over (colour, frame, row, column); the one frame of a picture is repeated in time.
    Raises ValueError for any other array. Equal to transformers' Qwen2VLImageProcessorPil bit for
    bit.
    """
    if pixels.dtype != np.uint8 or pixels.ndim != 3 or pixels.shape[2] != 3:
        raise ValueError(f"picture: got {pixels.dtype} {pixels.shape}, want uint8 [H, W, 3]")
    size, merge = settings.patch_size, settings.merge_size
    height, width = smart_resize(
        pixels.shape[0],
        pixels.shape[1],
        factor=size * merge,
        min_pixels=settings.min_pixels,
        max_pixels=settings.max_pixels,
    )
    if (height, width) != pixels.shape[:2]:
        picture = Image.fromarray(pixels)
        pixels = np.asarray(picture.resize((width, height), Image.Resampling(settings.resample)))
    rows, columns = height // size, width // size
    # Bytes are rearranged before they become floats four times as large, and normalised by a table
    # of the 256 possible values.
    cells = pixels.reshape(rows // merge, merge, size, columns // merge, merge, size, 3)
    cells = np.ascontiguousarray(cells.transpose(6, 0, 3, 1, 4, 2, 5)).reshape(3, -1, size * size)
    patches = np.empty((rows * columns, 3, settings.temporal_patch_size, size * size), np.float32)
    table = _pixel_table(settings)
    for colour in range(3):
        values = np.take(table[colour], cells[colour], mode="clip")
        for frame in range(settings.temporal_patch_size):
            patches[:, colour, frame] = values
    return patches.reshape(rows * columns, -1), (1, rows, columns)


def open_picture(file: str | io.BytesIO, name: object) -> Image.Image:
    """The picture in a file, decoded.

    Raises ValueError with the file's `name` where it holds none, or one of too many pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = Image.open(file, formats=FORMATS)
        if picture.width * picture.height > MOST_PIXELS:
            raise ValueError(f"{picture.width}x{picture.height}, over {MOST_PIXELS} pixels")
        picture.load()
    except FileNotFoundError:
        raise ValueError(f"{name}: not found, want {_WANTED}") from None
    # Pillow has no error of its own: broken text chunks are ValueErrors, headers SyntaxErrors.
    except (
        *(OSError, SyntaxError, ValueError),
        *(Image.DecompressionBombError, Image.DecompressionBombWarning),
    ) as error:
        raise ValueError(f"{name}: got an unreadable picture ({error}), want {_WANTED}") from None
    return picture


def read_picture(path: str, size: int) -> np.ndarray:
    """A benchmark's picture, uint8 [size, size, 3]; resized as the public evaluator does.

    Raises ValueError naming the file where it is no picture.
    """
    picture = open_picture(path, path).convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))


def load_picture_settings(folder: Path, config: Mapping[str, object]) -> PictureSettings:
    """Settings of a checkpoint folder, whose config.json holds `config`.

    Raises ValueError naming file and field, also where the patches are not of the model's size.
    """
    # transformers 5 saves a processor as one nested file, and prefers it where both exist.
    path, settings = folder / "processor_config.json", None
    if path.exists():
        settings = optional(read_json(path), "image_processor", dict, path)
    if settings is None:
        path = folder / "preprocessor_config.json"
        settings = read_json(path)
    expect(settings, "image_processor_type", PROCESSOR_TYPES, path)
    for switch in ("do_resize", "do_rescale", "do_normalize", "do_convert_rgb"):
        expect(settings, switch, [True], path)
    limits = {}
    for ours, edge in (("min_pixels", "shortest_edge"), ("max_pixels", "longest_edge")):
        # A bare min_pixels or max_pixels overrides the size, as in transformers.
        bare = settings.get(ours) is not None
        limits[ours] = whole(settings, ours if bare else f"size.{edge}", path)
    if limits["min_pixels"] > min(limits["max_pixels"], MOST_PIXELS):
        raise ValueError(
            f"{path}: min_pixels (size.shortest_edge): got {limits['min_pixels']}, want at most "
            f"{MOST_PIXELS} and max_pixels (size.longest_edge), which is {limits['max_pixels']}"
        )
    sizes = {}
    for ours, theirs in MODEL_SIZES.items():
        sizes[ours] = whole(settings, ours, path)
        want = whole(config, f"vision_config.{theirs}", folder / "config.json")
        if sizes[ours] != want:
            raise ValueError(
                f"{path}: {ours}: got {sizes[ours]}, want {want}, the {theirs} of vision_config "
                "in config.json"
            )
    resample = settings.get("resample") is not None
    rescale = settings.get("rescale_factor") is not None
    return PictureSettings(
        **sizes,
        **limits,
        mean=_three(settings, "image_mean", path),
        std=_three(settings, "image_std", path, is_positive=True),
        rescale=positive(settings, "rescale_factor", path) if rescale else DEFAULT_RESCALE,
        resample=whole(settings, "resample", path, low=0, high=5) if resample else DEFAULT_RESAMPLE,
    )


@functools.lru_cache(maxsize=8)
def _pixel_table(settings: PictureSettings) -> np.ndarray:
    """[3, 256] float32, the normalised value of each byte of each colour."""
    # The roundings of transformers: product in float64, then float32 for mean and deviation.
    values = (np.arange(256, dtype=np.float64) * settings.rescale).astype(np.float32)
    mean, std = (np.array(x, np.float32)[:, None] for x in (settings.mean, settings.std))
    return (values - mean) / std


def _three(
    settings: Mapping[str, object], name: str, path: Path, *, is_positive: bool = False
) -> tuple[float, float, float]:
    values = field(settings, name, list, path)
    if (
        len(values) != 3
        or not all(type(x) in (int, float) and abs(x) <= 1e6 for x in values)  # NaN is not
        or (is_positive and min(values) <= 0)
    ):
        wanted = "three numbers" + (" above 0" if is_positive else "")
        raise ValueError(f"{path}: {name}: got {shown(values)}, want {wanted}")
    red, green, blue = (float(x) for x in values)
    return red, green, blue
