"""The files of a checkpoint folder: which steps are complete, half-written or damaged.

Orbax writes a step under another name (on gs:// without a commit file) until it is complete. A
complete step holds `files.json`, written just before: {file: [bytes, crc32]}. The checksums are
ours because tensorstore keeps none of array data: a flipped bit would come back as a wrong number.
Works on local paths and on those of etils (gs://).
"""

import concurrent.futures
import json
import math
import re
import zlib
from collections.abc import Mapping

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
_TEMPORARY = ".orbax-checkpoint-tmp"
_STEP_FOLDER = re.compile(rf"(\d+)({re.escape(_TEMPORARY)}.*)?")


def scan(folder: epath.Path) -> dict[str, str]:
    """Return {name of a step's folder: what is wrong with it, '' if nothing}; {} without a folder.

    `HALF_WRITTEN` marks what a killed run left; anything else is damage to a complete step. The
    contents of large files are not read: there are several steps, and only one will be used.
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
            checksums = _checksums(found)
            noted = {name: [_size(file), checksums[name]] for name, file in found.items()}
            (path / FILE_LIST).write_text(json.dumps(noted))


def remove_half_written(folder: epath.Path) -> None:
    """Delete what unfinished saves left, which may be large.

    Not by orbax's own cleanup_tmp_directories: on gs:// that would take `unreadable/`, which has no
    commit file either.
    """
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

    Contents are compared of files of at most `up_to` bytes. With `share` (i, n) it is every n-th of
    these, from the i-th: the n processes of a run have a part each.
    """
    try:
        noted = {
            name: (size, checksum)
            for name, (size, checksum) in json.loads((step_folder / FILE_LIST).read_text()).items()
        }
    # No file, bad JSON or UTF-8, a deep nest; and JSON of another shape.
    except (FileNotFoundError, ValueError, RecursionError, TypeError, AttributeError):
        return f"{FILE_LIST} is missing or damaged"
    except OSError as error:
        return f"its files cannot be read: {error}"
    try:
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


def _data_files(folder: epath.Path, prefix: str = "") -> dict[str, epath.Path]:
    """{name below the step's folder: path}; a folder counts by the name that it has in the end."""
    found: dict[str, epath.Path] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            found |= _data_files(path, f"{prefix}{path.name.partition(_TEMPORARY)[0]}/")
        elif prefix + path.name not in _BOOKKEEPING:
            found[prefix + path.name] = path
    return found
