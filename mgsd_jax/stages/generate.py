"""Writes fixed train, val and test boards with a manifest (data/boards.py reads them back).

{folder}/{split}/{FrozenLake|Maze|MiniBehaviour}/level{L}/text/{index:04d}.txt
{folder}/{split}/{FrozenLake|Maze|MiniBehaviour}/level{L}/image/{index:04d}.png
{folder}/settings.json    what the boards depend on; written first
{folder}/manifest.json    settings, counts and the hash of every file; written last
"""

import importlib.metadata
import inspect
import io
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import tqdm
from absl import logging
from etils import epath
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.checks import fields
from mgsd_jax.config import Config, DataConfig
from mgsd_jax.data.benchmarks import benchmark_keys
from mgsd_jax.data.boards import (
    FOLDERS,
    MANIFEST,
    SETTINGS,
    Group,
    board_paths,
    content_hash,
    read_manifest,
)
from mgsd_jax.data.splits import SHARES, SPLITS, Split, unique_boards
from mgsd_jax.envs import ENVS
from mgsd_jax.workdir import paths

LevelKey = tuple[str, int]  # (task, level)


def run(config: Config, workdir: str) -> None:
    """Writes the boards of `config.data` to its folder; does nothing where they are complete.

    An interrupted run goes on where it stopped. Raises ValueError for a folder that holds boards
    of other settings (naming them) or other files, and where a level has too few boards.
    """
    config = config_lib.resolve(config, workdir)
    data = config.data
    root = epath.Path(data.folder)
    folders = config_lib.excluded_folders(config)
    keys = [(epath.Path(folder).name, benchmark_keys([folder])) for folder in folders]
    exclude = frozenset[str]().union(*(of_folder for _, of_folder in keys))
    settings = make_settings(data, config.seed, [(n, len(k)) for n, k in keys], exclude)
    if is_complete(root, settings):
        logging.info("%s: boards are complete, nothing to do", root)
        return

    # All draws come before the first file: a level with too few boards leaves no folder behind.
    boards: dict[Split, dict[LevelKey, list[Any]]] = {
        split: {
            (levels.task, level): unique_boards(
                levels.task, level, split, getattr(levels, split), seed=config.seed, exclude=exclude
            )
            for levels in data.boards
            for level in levels.levels
        }
        for split in SPLITS
    }
    root.mkdir(parents=True, exist_ok=True)
    paths.write_whole(root / SETTINGS, _to_json(settings))
    groups: list[Group] = []
    for split in SPLITS:
        groups += write_split(
            root,
            split,
            boards[split],
            picture_size=lambda level: config_lib.picture_size(data, level),
            seed=config.seed,
        )
    write_manifest(root, settings, groups)
    logging.info("%s: wrote %d boards", root, sum(group["count"] for group in groups))


def make_settings(
    data: DataConfig, seed: int, excluded: Sequence[tuple[str, int]], exclude: frozenset[str]
) -> dict[str, Any]:
    """All that the boards of a folder depend on, as JSON values.

    `excluded`: the name of each benchmark folder and its number of distinct boards.
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
            "folders": [{"name": name, "boards": count} for name, count in excluded],
            "hash": content_hash("\n".join(sorted(exclude)).encode()),
        },
    }


def _options(generate: Callable[..., Any]) -> dict[str, Any]:
    """The keyword options of an env's `generate` with the defaults that apply."""
    parameters = inspect.signature(generate).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY}


def is_complete(root: epath.Path, settings: Mapping[str, Any]) -> bool:
    """Whether `root` holds all boards of these settings, rather than some or none.

    Raises ValueError where it holds anything else.
    """
    for name in (MANIFEST, SETTINGS):
        if (root / name).is_file():
            held = (
                read_manifest(root)["settings"]
                if name == MANIFEST
                else fields.read_json(root / name)
            )
            differing = _differences(held, settings)
            if differing:
                raise ValueError(
                    f"{root}: got a folder of other boards ({'; '.join(differing)}), "
                    "want the same settings, or this folder removed, or another in data.folder"
                )
            return name == MANIFEST
    # A kill may have left the first file half written.
    if root.exists() and {path.name for path in root.iterdir()} - {f"{SETTINGS}.partial"}:
        raise ValueError(f"{root}: got other files and no {SETTINGS}, want an empty folder")
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
                held.get(key, absent),
                want.get(key, absent),
                f"{name}.{key}" if name else key,
            )
        ]
    return [] if held == want else [f"{name}: got {held!r}, want {want!r}"]


def write_split(
    root: epath.PathLike,
    split: Split,
    boards: Mapping[LevelKey, Sequence[Any]],
    *,
    picture_size: Callable[[int], int],
    seed: int,
) -> list[Group]:
    """Writes the states of one split and returns their manifest entries.

    A file that already holds what would be written is left alone, a broken one is replaced.
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
                (epath.Path(root) / name / kind).mkdir(parents=True, exist_ok=True)
            group: Group = {"folder": name, "split": split, "task": task, "level": level}
            group |= {"count": len(states), "text": [], "image": []}
            for index, state in enumerate(states):
                text = ENVS[task].to_text(state, split=split, index=index, seed=seed).encode()
                text_path, picture_path = board_paths(epath.Path(root) / name, index)
                picture = _png(ENVS[task].render(state, picture_size(level)))
                for path, content in ((text_path, text), (picture_path, picture)):
                    if not (path.is_file() and path.read_bytes() == content):
                        paths.write_whole(path, content, sync=False)
                group["text"].append(content_hash(text))
                group["image"].append(content_hash(picture))
                progress.update()
            groups.append(group)
    return groups


def write_manifest(
    root: epath.PathLike, settings: Mapping[str, Any], groups: Sequence[Group]
) -> None:
    """Writes the manifest, which marks the folder as complete."""
    manifest = {"version": _version(), "settings": settings, "groups": list(groups)}
    paths.write_whole(epath.Path(root) / MANIFEST, _to_json(manifest))


def _version() -> str | None:
    try:
        return importlib.metadata.version("mgsd_jax")
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a source tree


def _png(picture: Any) -> bytes:
    buffer = io.BytesIO()
    # Level 1: a third of the time of the default for a tenth more bytes.
    Image.fromarray(picture).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _to_json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
