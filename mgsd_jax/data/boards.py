"""Boards as examples are made from them, and the folders of boards that `generate` writes."""

import hashlib
import io
import json
import pathlib
from typing import Any, NamedTuple

from PIL import Image, UnidentifiedImageError

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.splits import Split

MANIFEST = "manifest.json"
Group = dict[str, Any]  # one folder of boards in the manifest
_RESTORE = f"to restore it, delete {MANIFEST} and run --stage=generate again"


class Board(NamedTuple):
    """One board of a split."""

    task: str
    level: int
    index: int  # within its split, task and level
    state: Any  # of the task's env
    picture_path: str | None  # where `generate` put its picture, None for a board never written


def read_split(root: str | pathlib.Path, split: Split) -> list[Board]:
    """The boards of one split, by task and level in the order of the manifest.

    Raises ValueError naming the file where anything is missing, malformed or not what the manifest
    says (a hash differs).
    """
    manifest_path = pathlib.Path(root) / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{manifest_path}: got no such file, want one; run --stage=generate first")
    manifest = read_json(manifest_path)
    groups = [group for group in manifest["groups"] if group["split"] == split]
    if not groups:
        raise ValueError(f"{manifest_path}: got no boards of split {split!r}, want some")
    return [
        _read_board(pathlib.Path(root), manifest_path, group, index)
        for group in groups
        for index in range(group["count"])
    ]


def _read_board(root: pathlib.Path, manifest_path: pathlib.Path, group: Group, index: int) -> Board:
    text_path, picture_path = board_paths(root / group["folder"], index)
    for path in (text_path, picture_path):
        if not path.is_file():
            raise ValueError(f"{path}: got no such file, want it as in {manifest_path}; {_RESTORE}")
    text = text_path.read_bytes()
    try:
        state = ENVS[group["task"]].from_text(text.decode(), source=str(text_path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_path}: got {error.reason}, want UTF-8") from None
    _check_hash(text_path, text, group["text"][index])
    picture = picture_path.read_bytes()
    if content_hash(picture) != group["image"][index]:
        # Decoding every picture would take minutes; only a changed one can be a broken one.
        _decode(picture_path, picture)
        _check_hash(picture_path, picture, group["image"][index])
    return Board(group["task"], group["level"], index, state, str(picture_path))


def _check_hash(path: pathlib.Path, content: bytes, want: str) -> None:
    if content_hash(content) != want:
        raise ValueError(
            f"{path}: got hash {content_hash(content)}, want {want} as in the manifest; {_RESTORE}"
        )


def _decode(path: pathlib.Path, content: bytes) -> None:
    try:
        Image.open(io.BytesIO(content)).load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: got an unreadable picture ({error}), want a PNG") from None


def board_paths(folder: pathlib.Path, index: int) -> tuple[pathlib.Path, pathlib.Path]:
    return folder / "text" / f"{index:04d}.txt", folder / "image" / f"{index:04d}.png"


def content_hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: got no JSON ({error}), want what --stage=generate wrote"
        ) from None
