"""Paths of a run, local or of any file system that etils knows (gs://).

What differs between the two: a remote file cannot be appended to, and appears whole or not at all;
a local one is replaced by a whole one under another name.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Iterator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL such as gs://bucket/run."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The path from the root, which checkpoints need; a URL as it is."""
    return epath.Path(path) if is_remote(path) else epath.Path(pathlib.Path(path).resolve())


def local(path: epath.PathLike, name: str) -> pathlib.Path:
    """The path, which has to be local; ValueError with the `name` of what it is else."""
    if is_remote(path):
        raise ValueError(f"{name}: got {os.fspath(path)}, want a local folder; copy it there after")
    return pathlib.Path(path)


def write_whole(path: epath.PathLike, content: str | bytes, *, sync: bool = True) -> None:
    """Writes a file such that a reader, or a kill, sees the old or the new one whole.

    Without `sync`, which takes milliseconds, a machine that loses power may lose the file. A device
    or a pipe, such as /dev/stdout, is written to as it is: nothing must take its place.
    """
    content = content.encode() if isinstance(content, str) else content
    target = epath.Path(path) if is_remote(path) else pathlib.Path(path)
    if is_remote(path) or (target.exists() and not target.is_file()):
        target.write_bytes(content)
        return
    partial = pathlib.Path(path).with_name(target.name + ".partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def local_files(
    folder: epath.PathLike, wanted: Callable[[str], bool] = lambda name: True
) -> Iterator[pathlib.Path]:
    """The folder as a local one, for libraries that read local files only.

    A remote folder's files whose names are `wanted` are copied for as long as the `with` lasts.
    """
    if not is_remote(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in epath.Path(folder).iterdir():
            if wanted(file.name) and not file.is_dir():
                (pathlib.Path(copy) / file.name).write_bytes(file.read_bytes())
        yield pathlib.Path(copy)
