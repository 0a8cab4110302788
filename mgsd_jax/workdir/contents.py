"""What a folder holds, whatever its place: so that runs, models and boards can be moved.

A copy has the same identity. Nothing here depends on names of folders above it, or on dates.
"""

import concurrent.futures
import json
import zlib

from etils import epath

from mgsd_jax.checks import fields
from mgsd_jax.data.boards import MANIFEST
from mgsd_jax.workdir import checkpoint_files

RUNS_FILE = "runs.jsonl"  # of a run; its first line says when it began
_SAMPLES = 256  # of every weight file
_SAMPLE_BYTES = 4096
_READERS = 16  # files read at once: each file of a remote folder takes tens of milliseconds


def identity(path: epath.PathLike) -> str | None:
    """What distinguishes a model or a stage from others that have been, or will be, in its folder.

    For a stage: when its training first began, and its newest step. For a model: a checksum over
    samples of its weights. For boards of `generate`: a checksum of their manifest, which has the
    hash of every file. For anything else: a checksum of all names and files. None where there is
    nothing.
    """
    root = epath.Path(path)
    # Boards and exports have a record of who made them, too: it is not what they are.
    if (root / MANIFEST).is_file():
        boards = fields.read_json(root / MANIFEST) | {"version": None}  # of the package that drew
        return f"{zlib.crc32(json.dumps(boards, sort_keys=True).encode()):08x}"
    weights = sorted(root.glob("*.safetensors")) if root.is_dir() else []
    if weights:
        checksum = 0
        for file in weights:
            checksum = _sampled(file, checksum)
        return f"{checksum:08x}"
    if (root / RUNS_FILE).is_file():
        return f"{run_of(root)}, step {last_step(root)}"
    return _all_files(root)


def run_of(root: epath.Path) -> str | None:
    """Which training a stage's folder is of, whatever its step; None for a folder of no run."""
    runs = root / RUNS_FILE
    if not runs.is_file():
        return None
    first = runs.read_text(encoding="utf-8").partition("\n")[0]
    return f"{zlib.crc32(first.encode()):08x}"


def last_step(root: epath.Path) -> int:
    """The step of a stage's newest checkpoint, 0 without one."""
    found = checkpoint_files.scan(root / "checkpoints")
    return max((int(n) for n, p in found.items() if p != checkpoint_files.HALF_WRITTEN), default=0)


def _sampled(file: epath.Path, checksum: int) -> int:
    size = file.stat().length
    with file.open("rb") as content:
        for i in range(_SAMPLES):
            content.seek(size * i // _SAMPLES)
            checksum = zlib.crc32(content.read(_SAMPLE_BYTES), checksum)
    return checksum


def _all_files(root: epath.Path) -> str | None:
    """The checksum of a file, or of all files in a folder with their names below it."""
    if root.is_file():
        return f"{zlib.crc32(root.read_bytes()):08x}"
    files = _files_below(root) if root.is_dir() else []
    if not files:
        return None
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        sums = list(readers.map(lambda file: zlib.crc32(file.read_bytes()), files))
    names = [file.relative_to(root).as_posix() for file in files]
    listed = "".join(f"{name} {one}\n" for name, one in zip(names, sums, strict=True))
    return f"{zlib.crc32(listed.encode()):08x}"


def _files_below(root: epath.Path) -> list[epath.Path]:
    found: list[epath.Path] = []
    for path in sorted(root.iterdir()):
        found += _files_below(path) if path.is_dir() else [path]
    return found
