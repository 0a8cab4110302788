"""Writes fixed train, val and test boards with a manifest (data/boards.py reads them back).

{folder}/{split}/{title of the env}/level{L}/text/{index:04d}.txt
{folder}/{split}/{title of the env}/level{L}/image/{index:04d}.png
{folder}/settings.json    what the boards depend on; written first
{folder}/manifest.json    settings, counts and the hash of every file; written last
"""

import dataclasses
import importlib.metadata
import io
import json
from collections.abc import Mapping, Sequence

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.checks import fields
from mgsd_jax.config import Config, DataConfig
from mgsd_jax.data.benchmarks import benchmark_keys
from mgsd_jax.data.boards import (
    MANIFEST,
    SETTINGS,
    Group,
    board_paths,
    check_pictures,
    content_hash,
    read_groups,
)
from mgsd_jax.data.splits import SHARES, SPLITS, Split, unique_boards
from mgsd_jax.envs import ENVS, AnyState, contract
from mgsd_jax.workdir import folders, paths
from mgsd_jax.workdir.progress import Progress, open_progress

Settings = dict[str, object]  # what the boards of a folder depend on, as JSON values
States = Sequence[AnyState]  # of one task's env


def run(config: Config, workdir: str) -> None:
    """Writes the boards of `config.data` to its folder, or checks their pictures if complete.

    An interrupted run resumes where it stopped. Raises ValueError for a folder that holds boards
    of other settings (naming them) or other files, where a level has too few boards, and for an
    env that contradicts itself.
    """
    config = config_lib.resolve(config, workdir)
    data = config.data
    root = epath.Path(data.folder)
    keys = {folder: benchmark_keys([folder]) for folder in config_lib.excluded_folders(config)}
    exclude = frozenset[str]().union(*keys.values())
    named = [
        {"name": epath.Path(folder).name, "boards": len(found)} for folder, found in keys.items()
    ]
    settings = make_settings(data, config.seed, named, exclude)
    if is_complete(root, settings):
        check_pictures(root)
        logging.info("%s: boards are complete, nothing to do", root)
        return

    # Nothing is written by an env whose functions contradict each other.
    for levels in data.boards:
        for level in levels.levels:
            size = config_lib.picture_size(data, level)
            contract.check(levels.task, level, picture_size=size)

    # All draws come before the first file: a level with too few boards leaves no folder behind.
    logging.info("generate: draws the boards of %d levels", sum(len(b.levels) for b in data.boards))
    boards: dict[tuple[Split, str, int], States] = {
        (split, levels.task, level): unique_boards(
            levels.task, level, split, getattr(levels, split), seed=config.seed, exclude=exclude
        )
        for split in SPLITS
        for levels in data.boards
        for level in levels.levels
    }
    root.mkdir(parents=True, exist_ok=True)
    paths.write_whole(root / SETTINGS, _to_json(settings))
    folders.write_start(root)
    total = sum(map(len, boards.values()))
    with (
        folders.spending(root),
        open_progress("generate", total, is_main=True, unit="board") as progress,
    ):
        groups = [
            write_group(
                root,
                Group(f"{split}/{ENVS[task].title}/level{level}", split, task, level, len(states)),
                states,
                picture_size=config_lib.picture_size(data, level),
                seed=config.seed,
                progress=progress,
            )
            for (split, task, level), states in boards.items()
            if states
        ]
    # The manifest marks the folder as complete.
    listed = [dataclasses.asdict(group) for group in groups]
    manifest = {"version": _version(), "settings": settings, "groups": listed}
    paths.write_whole(root / MANIFEST, _to_json(manifest))
    counts = ", ".join(
        f"{sum(len(states) for (part, *_), states in boards.items() if part == split):,} {split}"
        for split in SPLITS
    )
    logging.info("%s: wrote %s boards (%s)", root, f"{total:,}", counts)


def make_settings(
    data: DataConfig, seed: int, excluded: Sequence[object], exclude: frozenset[str]
) -> Settings:
    """All that the boards of a folder depend on; `exclude` holds the keys of `excluded`."""
    counts: dict[str, dict[str, int]] = {}
    for levels in data.boards:
        for level in levels.levels:
            name = f"{levels.task}/level{level}"
            if name in counts:
                raise ValueError(f"data.boards: got {name} twice, want each level once")
            counts[name] = {split: getattr(levels, split) for split in SPLITS}
    tasks = {levels.task for levels in data.boards}
    levels_used = sorted({level for levels in data.boards for level in levels.levels})
    return {
        "seed": seed,
        "counts": counts,
        "picture_size": {str(n): config_lib.picture_size(data, n) for n in levels_used},
        "shares_percent": dict(SHARES),
        "options": {task: dict(env.options) for task, env in ENVS.items() if task in tasks},
        "excluded": {
            "boards": len(exclude),
            "folders": list(excluded),
            "hash": content_hash("\n".join(sorted(exclude)).encode()),
        },
    }


def is_complete(root: epath.Path, settings: Settings) -> bool:
    """Whether `root` holds all boards of these settings, rather than some or none.

    Raises ValueError where it holds anything else.
    """
    is_written = (root / MANIFEST).is_file()
    if is_written:
        read_groups(root)
    if (root / SETTINGS).is_file():
        differing = _differences(fields.read_json(root / SETTINGS), settings)
        if differing:
            raise ValueError(
                f"{root}: got a folder of other boards ({'; '.join(differing)}), "
                "want the same settings, or this folder removed, or another in data.folder"
            )
        return is_written
    # A kill may have left the first file half written.
    if root.exists() and {path.name for path in root.iterdir()} - {f"{SETTINGS}.partial"}:
        raise ValueError(f"{root}: got other files and no {SETTINGS}, want an empty folder")
    return False


def _differences(held: object, want: object, name: str = "") -> list[str]:
    """'field: got a, want b' for each leaf in which two JSON values differ."""
    if isinstance(held, dict) and isinstance(want, dict):
        # An older version also listed the options of tasks without boards.
        keys = want.keys() if name == "options" else held.keys() | want.keys()
        return [
            line
            for key in sorted(keys)
            for line in _differences(
                held.get(key, "nothing"), want.get(key, "nothing"), f"{name}.{key}".lstrip(".")
            )
        ]
    return [] if held == want else [f"{name}: got {held!r}, want {want!r}"]


def write_group(
    root: epath.Path,
    group: Group,
    states: States,
    *,
    picture_size: int,
    seed: int,
    progress: Progress,
) -> Group:
    """Writes the states of a group and returns it with their hashes.

    A file that already holds what would be written is left alone, a broken one is replaced.
    """
    folder, env = root / group.folder, ENVS[group.task]
    for kind in ("text", "image"):
        (folder / kind).mkdir(parents=True, exist_ok=True)
    hashes: list[tuple[str, str]] = []
    for index, state in enumerate(states):
        text = env.to_text(state, split=group.split, index=index, seed=seed).encode()
        picture = _png(env.render(state, picture_size))
        for path, content in zip(board_paths(folder, index), (text, picture), strict=True):
            if not (path.is_file() and path.read_bytes() == content):
                paths.write_whole(path, content, sync=False)
        hashes.append((content_hash(text), content_hash(picture)))
        progress.count()
    texts, images = zip(*hashes, strict=True)
    return dataclasses.replace(group, text=texts, image=images)


def _version() -> str | None:
    try:
        return importlib.metadata.version("mgsd_jax")
    except importlib.metadata.PackageNotFoundError:
        return None  # run from a source tree


def _png(picture: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 1: a third of the time of the default for a tenth more bytes.
    Image.fromarray(picture).save(buffer, format="png", compress_level=1)
    return buffer.getvalue()


def _to_json(value: Mapping[str, object]) -> bytes:
    return (json.dumps(value, indent=1) + "\n").encode()
