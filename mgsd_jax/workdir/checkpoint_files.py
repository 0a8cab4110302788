"""The files of a checkpoint folder: what is complete, what is half-written, what is damaged.

Orbax writes a step under another name (on gs:// without a commit file) until it is complete. A
complete step holds `files.json`, written just before: {file: [bytes, crc32]}.
Works on local paths and on those of etils (gs://).
"""

import concurrent.futures
import json
import math
import re
import zlib
from collections.abc import Iterator, Mapping

import orbax.checkpoint as ocp
from absl import logging
from etils import epath

FILE_LIST = "files.json"
UNREADABLE = "unreadable"  # sub-folder for damaged steps, so that their numbers are free again
HALF_WRITTEN = "half-written"
SMALL_BYTES = 1 << 20  # files up to this size are compared in every step when a folder is opened
_READ_BYTES = 1 << 22
_READERS = 16

# orbax writes these after the file list, and reads no arrays by them.
_BOOKKEEPING = frozenset({FILE_LIST, "_CHECKPOINT_METADATA", "commit_success.txt"})
_STEP_FOLDER = re.compile(r"(\d+)(\.orbax-checkpoint-tmp.*)?")


def scan(folder: epath.Path) -> dict[str, str]:
    """Return {name of a step's folder: what is wrong with it, '' if nothing}, {} without folder.

    `HALF_WRITTEN` marks what a killed run left; anything else is damage to a complete step. The
    contents of large files are not read: there are several steps, and one of them will be used.
    """
    if not folder.exists():
        return {}
    return {
        path.name: damage(path, up_to=SMALL_BYTES)
        if ocp.utils.is_checkpoint_finalized(path)
        else HALF_WRITTEN
        for path in sorted(folder.iterdir())
        if _STEP_FOLDER.fullmatch(path.name)
    }


def write_file_list(folder: epath.Path, step: int) -> None:
    """Write the file list of `step`, whether it is renamed already or not."""
    for path in folder.iterdir():
        match = _STEP_FOLDER.fullmatch(path.name)
        if match and int(match[1]) == step:
            found = _data_files(path)
            noted = {name: [_size(found[name]), crc] for name, crc in _checksums(found).items()}
            (path / FILE_LIST).write_text(json.dumps(noted))


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


def damage(
    step_folder: epath.Path, *, up_to: float = math.inf, share: tuple[int, int] = (0, 1)
) -> str:
    """What is missing, extra or changed since the step was written; '' if nothing.

    Contents are compared of files up to `up_to` bytes, and of these the i-th of every n where
    `share` is (i, n): the n processes of a run have a part each.
    """
    try:
        noted = _read_list(step_folder / FILE_LIST)
        if noted is None:
            return f"{FILE_LIST} is missing or damaged"
        found = _data_files(step_folder)
        for name in sorted(noted.keys() ^ found.keys()):
            return f"{name} is missing" if name in noted else f"{name} was not written with it"
        for name, file in found.items():
            if _size(file) != noted[name][0]:
                return f"{name} has {_size(file)} bytes, want {noted[name][0]}"
        names = [name for name in found if noted[name][0] <= up_to][share[0] :: share[1]]
        for name, checksum in _checksums({name: found[name] for name in names}).items():
            if checksum != noted[name][1]:
                return f"{name} has other contents than were written"
    except OSError as error:
        return f"its files cannot be read: {error}"
    return ""


def _read_list(path: epath.Path) -> dict[str, list[int]] | None:
    """{file: [bytes, crc32]}, None where it is absent or anything else."""
    try:
        noted = json.loads(path.read_text())
    except (FileNotFoundError, ValueError, RecursionError):  # bad JSON, bad UTF-8, a deep nest
        return None
    if not isinstance(noted, dict) or not noted:
        return None
    is_listed = all(
        isinstance(entry, list) and [type(number) for number in entry] == [int, int]
        for entry in noted.values()
    )
    return noted if is_listed else None


def _checksums(files: Mapping[str, epath.Path]) -> dict[str, int]:
    """{name: crc32 of the whole file}; many are read at once."""
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return dict(zip(files, readers.map(_crc32, files.values()), strict=True))


def _crc32(path: epath.Path) -> int:
    checksum = 0
    with path.open("rb") as file:
        while part := file.read(_READ_BYTES):
            checksum = zlib.crc32(part, checksum)
    return checksum


def _size(path: epath.Path) -> int:
    return path.stat().length


def _data_files(step_folder: epath.Path) -> dict[str, epath.Path]:
    return {n: p for n, p in _files(step_folder) if n not in _BOOKKEEPING}


def _files(folder: epath.Path, prefix: str = "") -> Iterator[tuple[str, epath.Path]]:
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            # A folder that is renamed on commit is listed by its final name.
            name = path.name.partition(".orbax-checkpoint-tmp")[0]
            yield from _files(path, f"{prefix}{name}/")
        else:
            yield f"{prefix}{path.name}", path
