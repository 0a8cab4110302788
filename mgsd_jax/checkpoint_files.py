"""The files of a checkpoint folder: what is complete, what is half-written, what is damaged.

Orbax writes a step under another name (on gs:// without a commit file) until it is complete. A
complete step holds `files.json`, written just before: {file: [bytes, crc32 of its two ends]}.
Works on local paths and on those of etils (gs://).
"""

import json
import re
import zlib
from collections.abc import Iterator

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

FILE_LIST = "files.json"
UNREADABLE = "unreadable"  # sub-folder for damaged steps, so that their numbers are free again
HALF_WRITTEN = "half-written"
CHECKED_BYTES = 1 << 20  # at either end of a file: a lost tail or header shows, and it is quick

# orbax rewrites these while it commits; they hold no data.
_BOOKKEEPING = frozenset({FILE_LIST, "_CHECKPOINT_METADATA", "commit_success.txt"})
_STEP_FOLDER = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*)?")


def scan(folder: epath.Path) -> dict[str, str]:
    """Return {name of a step's folder: what is wrong with it, '' if nothing}, {} without folder.

    `HALF_WRITTEN` marks what a killed run left; anything else is damage to a complete step.
    """
    if not folder.exists():
        return {}
    return {
        path.name: _damage(path) if ocp.utils.is_checkpoint_finalized(path) else HALF_WRITTEN
        for path in sorted(folder.iterdir())
        if _STEP_FOLDER.fullmatch(path.name)
    }


def write_file_list(folder: epath.Path, step: int) -> None:
    """Write the file list of `step`, whether it is renamed already or not."""
    for path in folder.iterdir():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and int(match[1]) == step:
            files = {name: _ends(file) for name, file in _files(path) if _is_data(file)}
            (path / FILE_LIST).write_text(json.dumps(files))


def remove_half_written(folder: epath.Path) -> None:
    """Delete what unfinished saves left, which may be large."""
    for name, problem in scan(folder).items():
        if problem == HALF_WRITTEN:
            (folder / name).rmtree()


def set_aside(folder: epath.Path, name: str) -> None:
    """Move a step's folder to `unreadable/`: kept for a look, out of the way of a new one."""
    (folder / UNREADABLE).mkdir(parents=True, exist_ok=True)
    taken = {path.name for path in (folder / UNREADABLE).iterdir()}
    number = next(n for n in range(len(taken) + 1) if f"{name}-{n}" not in taken)
    (folder / name).rename(folder / UNREADABLE / f"{name}-{number}")
    logging.warning("%s: moved checkpoint %s to %s/", folder, name, UNREADABLE)


def _damage(step_folder: epath.Path) -> str:
    """What is missing or changed since the step was written; '' too if it has no file list."""
    if not (step_folder / FILE_LIST).exists():
        return ""
    try:
        noted = json.loads((step_folder / FILE_LIST).read_text())
    except ValueError:  # bad JSON or bad UTF-8
        return f"{FILE_LIST} is damaged"
    found = dict(_files(step_folder))
    missing = sorted(noted.keys() - found.keys())
    if missing:
        return f"{missing[0]} is missing"
    for name, (size, checksum) in noted.items():
        got_size, got_checksum = _ends(found[name])
        if got_size != size:
            return f"{name} has {got_size} bytes, want {size}"
        if got_checksum != checksum:
            return f"{name} has other contents than were written"
    return ""


def _ends(path: epath.Path) -> list[int]:
    """[bytes, crc32 of the first and the last `CHECKED_BYTES`]."""
    size = path.stat().length
    with path.open("rb") as file:
        checksum = zlib.crc32(file.read(CHECKED_BYTES))
        if size > CHECKED_BYTES:
            file.seek(max(CHECKED_BYTES, size - CHECKED_BYTES))
            checksum = zlib.crc32(file.read(CHECKED_BYTES), checksum)
    return [size, checksum]


def _is_data(path: epath.Path) -> bool:
    return path.name not in _BOOKKEEPING


def _files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            # A folder that is renamed on commit is listed by its final name.
            name = path.name.partition(".orbax-checkpoint-tmp")[0]
            yield from _files(path, f"{prefix}{name}/")
        else:
            yield f"{prefix}{path.name}", path
