"""Writes fixed train, val and test boards with a manifest, and reads them back.

{folder}/{split}/{FrozenLake|Maze|MiniBehaviour}/level{L}/text/{index:04d}.txt
{folder}/{split}/{FrozenLake|Maze|MiniBehaviour}/level{L}/image/{index:04d}.png
{folder}/settings.json    what the boards depend on; written first
{folder}/manifest.json    settings, counts and the hash of every file; written last
"""

import hashlib
import importlib.metadata
import inspect
import io
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm
from absl import logging
from PIL import Image, UnidentifiedImageError

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, DataConfig
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS
from mgsd_jax.envs.benchmarks import read_benchmark
from mgsd_jax.envs.splits import SHARES, SPLITS, Split, unique_boards

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
FOLDERS = {"frozenlake": "FrozenLake", "maze": "Maze", "minibehaviour": "MiniBehaviour"}

LevelKey = tuple[str, int]  # (task, level)
Group = dict[str, Any]  # one folder of boards in the manifest


def run(config: Config, workdir: str) -> None:
    """Writes the boards of `config.data` to its folder; does nothing where they are complete.

    An interrupted run goes on where it stopped. Raises ValueError for a folder that holds boards
    of other settings (naming them) or other files, and where a level has too few boards.
    """
    data = config.data
    root = pathlib.Path(config_lib.resolve(data.folder, config, workdir))
    keys = {folder: _benchmark_keys(folder) for folder in data.exclude}
    exclude = frozenset[str]().union(*keys.values())
    settings = make_settings(data, config.seed, {f: len(k) for f, k in keys.items()}, exclude)
    if claim(root, settings):
        logging.info("%s: complete, nothing to do", root)
        return
    groups: list[Group] = []
    for split in SPLITS:
        boards = {
            (levels.task, level): unique_boards(
                levels.task, level, split, getattr(levels, split), seed=config.seed, exclude=exclude
            )
            for levels in data.boards
            for level in levels.levels
        }
        groups += write_split(
            root,
            split,
            boards,
            picture_size=lambda level: config_lib.picture_size(data, level),
            seed=config.seed,
        )
    write_manifest(root, settings, groups)
    logging.info("%s: wrote %d boards", root, sum(group["count"] for group in groups))


def _benchmark_keys(folder: str) -> frozenset[str]:
    return frozenset(ENVS[case.task].key(case.state) for case in read_benchmark(folder))


def make_settings(
    data: DataConfig, seed: int, excluded: Mapping[str, int], exclude: frozenset[str]
) -> dict[str, Any]:
    """All that the boards of a folder depend on, as JSON values.

    `excluded`: benchmark folder -> number of distinct boards; folders are kept by name alone.
    """
    counts: dict[str, dict[str, int]] = {}
    for levels in data.boards:
        for level in levels.levels:
            name = f"{levels.task}/level{level}"
            if name in counts:
                raise ValueError(f"data.boards: got {name} twice, want each level once")
            counts[name] = {split: getattr(levels, split) for split in SPLITS}
    levels_used = sorted({level for levels in data.boards for level in levels.levels})
    return {
        "seed": seed,
        "counts": counts,
        "picture_size": {str(n): config_lib.picture_size(data, n) for n in levels_used},
        "shares_percent": dict(SHARES),
        "options": {task: _options(ENVS[task].generate) for task in ENVS},
        "excluded": {
            "boards": len(exclude),
            "by_folder": {pathlib.Path(f).name: count for f, count in excluded.items()},
            "hash": _hash("\n".join(sorted(exclude)).encode()),
        },
    }


def _options(generate: Callable[..., Any]) -> dict[str, Any]:
    """The keyword options of an env's `generate` with the defaults that apply."""
    parameters = inspect.signature(generate).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def claim(root: pathlib.Path, settings: Mapping[str, Any]) -> bool:
    """Makes `root` the folder of these settings; returns whether its boards are complete."""
    for name in (MANIFEST, SETTINGS):
        if (root / name).is_file():
            held = _read_json(root / name)
            held = held["settings"] if name == MANIFEST else held
            differing = _differences(held, settings)
            if differing:
                raise ValueError(
                    f"{root}: got a folder of other boards ({'; '.join(differing)}), "
                    "want the same settings or an empty folder"
                )
            return name == MANIFEST
    if root.exists() and any(root.iterdir()):
        raise ValueError(f"{root}: got other files and no {SETTINGS}, want an empty folder")
    root.mkdir(parents=True, exist_ok=True)
    _write(root / SETTINGS, _to_json(settings))
    return False


def _differences(held: Any, want: Any, name: str = "") -> list[str]:
    """'field: got a, want b' for each leaf in which two JSON values differ."""
    if isinstance(held, dict) and isinstance(want, Mapping):
        keys = sorted(held.keys() | want.keys())
        absent = "nothing"
        return [
            line
            for key in keys
            for line in _differences(
                held[key] if key in held else absent,
                want[key] if key in want else absent,
                f"{name}.{key}" if name else key,
            )
        ]
    return [] if held == want else [f"{name}: got {held!r}, want {want!r}"]


def write_split(
    root: str | pathlib.Path,
    split: Split,
    boards: Mapping[LevelKey, Sequence[Any]],
    *,
    picture_size: Callable[[int], int],
    seed: int,
) -> list[Group]:
    """Writes the states of one split and returns their manifest entries.

    Files that are there with the right text are kept, so that an interrupted run can go on.
    """
    groups: list[Group] = []
    total = sum(map(len, boards.values()))
    with tqdm.tqdm(
        total=total, desc=split, unit="board", file=sys.stderr, disable=not sys.stderr.isatty()
    ) as progress:
        for (task, level), states in boards.items():
            if not states:
                continue
            name = f"{split}/{FOLDERS[task]}/level{level}"
            for kind in ("text", "image"):
                (pathlib.Path(root) / name / kind).mkdir(parents=True, exist_ok=True)
            group: Group = {"folder": name, "split": split, "task": task, "level": level}
            group |= {"count": len(states), "text": [], "image": []}
            for index, state in enumerate(states):
                text = ENVS[task].to_text(state, split=split, index=index, seed=seed).encode()
                text_path, picture_path = _paths(pathlib.Path(root) / name, index)
                if not (picture_path.is_file() and _holds(text_path, text)):
                    _write(picture_path, _png(ENVS[task].render(state, picture_size(level))))
                    _write(text_path, text)
                group["text"].append(_hash(text))
                group["image"].append(_hash(picture_path.read_bytes()))
                progress.update()
            groups.append(group)
    return groups


def write_manifest(
    root: str | pathlib.Path, settings: Mapping[str, Any], groups: Sequence[Group]
) -> None:
    """Writes the manifest, which marks the folder as complete."""
    manifest = {"version": _version(), "settings": settings, "groups": list(groups)}
    _write(pathlib.Path(root) / MANIFEST, _to_json(manifest))


def _version() -> str | None:
    try:
        return importlib.metadata.version("mgsd_jax")
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a source tree


def read_split(root: str | pathlib.Path, split: Split) -> list[Board]:
    """The boards of one split, by task and level in the order of the manifest.

    Raises ValueError naming the file where anything is missing, malformed or not what the manifest
    says (a hash differs).
    """
    manifest_path = pathlib.Path(root) / MANIFEST
    if not manifest_path.is_file():
        raise ValueError(f"{manifest_path}: got no such file, want one; run --stage=generate first")
    manifest = _read_json(manifest_path)
    groups = [group for group in manifest["groups"] if group["split"] == split]
    if not groups:
        raise ValueError(f"{manifest_path}: got no boards of split {split!r}, want some")
    return [
        _read_board(pathlib.Path(root), manifest_path, group, index)
        for group in groups
        for index in range(group["count"])
    ]


def _read_board(root: pathlib.Path, manifest_path: pathlib.Path, group: Group, index: int) -> Board:
    text_path, picture_path = _paths(root / group["folder"], index)
    for path in (text_path, picture_path):
        if not path.is_file():
            raise ValueError(f"{path}: got no such file, want it: {manifest_path} lists it")
    text = text_path.read_bytes()
    try:
        state = ENVS[group["task"]].from_text(text.decode(), source=str(text_path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_path}: got {error.reason}, want UTF-8") from None
    _check_hash(text_path, text, group["text"][index])
    picture = picture_path.read_bytes()
    if _hash(picture) != group["image"][index]:
        # Decoding every picture would take minutes; only a changed one can be a broken one.
        _decode(picture_path, picture)
        _check_hash(picture_path, picture, group["image"][index])
    return Board(group["task"], group["level"], index, state, str(picture_path))


def _check_hash(path: pathlib.Path, content: bytes, want: str) -> None:
    if _hash(content) != want:
        raise ValueError(f"{path}: got hash {_hash(content)}, want {want} as in the manifest")


def _decode(path: pathlib.Path, content: bytes) -> None:
    try:
        Image.open(io.BytesIO(content)).load()
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise ValueError(f"{path}: got an unreadable picture ({error}), want a PNG") from None


def _paths(folder: pathlib.Path, index: int) -> tuple[pathlib.Path, pathlib.Path]:
    return folder / "text" / f"{index:04d}.txt", folder / "image" / f"{index:04d}.png"


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    # Level 1: a third of the time of the default for a tenth more bytes.
    Image.fromarray(picture).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()


def _holds(path: pathlib.Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() == content


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()


def _read_json(path: pathlib.Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise ValueError(
            f"{path}: got no JSON ({error}), want what --stage=generate wrote"
        ) from None


def _write(path: pathlib.Path, content: bytes) -> None:
    """Writes such that a reader, or a kill, sees no part of a file."""
    partial = path.with_name(path.name + ".partial")
    partial.write_bytes(content)
    os.replace(partial, path)
