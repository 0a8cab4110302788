"""Picture files that are broken, hostile or no pictures: one line with the file's name."""

import io
import random
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from mgsd_jax.data.pictures import MOST_PIXELS, open_picture


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def png(*chunks: bytes, width: int = 4, height: int = 4, pixels: bytes | None = None) -> bytes:
    """A black-and-white PNG with more chunks before its pixels."""
    rows = b"\0" * height * (1 + (width + 7) // 8) if pixels is None else pixels
    size = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    body = chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + size + b"".join(chunks) + body


def saved(kind: str) -> bytes:
    pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


BROKEN = {
    "no picture": b"no picture",
    "empty": b"",
    "half": saved("PNG")[:400],
    "no pixels": png(pixels=b""),
    "other format": saved("GIF"),
    # 400 million pixels in 50 KB, 100 million (Pillow only warns), 67 million and one row
    "bomb": png(width=20_000, height=20_000, pixels=b""),
    "small bomb": png(width=10_000, height=10_000, pixels=b""),
    "just too large": png(width=8192, height=8193, pixels=b""),
    "text bomb": png(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 10_000_000))),
    "international text bomb": png(
        chunk(b"iTXt", b"a\0\1\0\0\0" + zlib.compress(b"x" * 10_000_000))
    ),
    "many texts": png(*[chunk(b"zTXt", b"a\0\0" + zlib.compress(b"x" * 2**20))] * 70),
    "broken text": png(chunk(b"zTXt", b"a\0\7" + b"x" * 20)),
    "broken colours": png(chunk(b"pHYs", b"")),
}


@pytest.mark.parametrize("name", BROKEN)
def test_other_files_are_named(name: str, recwarn: pytest.WarningsRecorder) -> None:
    with pytest.raises(ValueError, match=r"^some/file\.png: got an unreadable") as caught:
        open_picture(io.BytesIO(BROKEN[name]), "some/file.png")
    assert "\n" not in str(caught.value) and not recwarn.list


def test_good_files_are_read() -> None:
    for content in (png(), png(chunk(b"tEXt", b"a\0text")), *map(saved, ("PNG", "JPEG", "WEBP"))):
        assert open_picture(io.BytesIO(content), "x").convert("RGB").size in ((4, 4), (16, 16))
    assert PngImagePlugin.MAX_TEXT_CHUNK < 10_000_000 and MOST_PIXELS == 8192 * 8192


def test_flipped_bytes_give_a_picture_or_the_line() -> None:
    rng = random.Random(0)
    samples = [png(chunk(b"zTXt", b"a\0\0" + zlib.compress(b"text"))), *map(saved, ("PNG", "JPEG"))]
    refused = 0
    for _ in range(1500):
        content = bytearray(rng.choice(samples))
        for _ in range(rng.randint(1, 6)):
            content[rng.randrange(len(content))] = rng.randrange(256)
        try:
            open_picture(io.BytesIO(bytes(content)), "file.png")
        except ValueError as error:
            assert str(error).startswith("file.png: got an unreadable picture (")
            refused += 1
    assert refused > 100
