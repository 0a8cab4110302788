"""Paths of a run: local ones, and those of any file system that etils knows (gs://).

A remote file cannot be appended to, and appears as a whole or not at all. A local file is written
under another name and renamed.
"""

import contextlib
import os
import pathlib
import tempfile
from collections.abc import Callable, Generator

from etils import epath


def is_remote(path: epath.PathLike) -> bool:
    """Whether a path is a URL such as gs://bucket/run."""
    return "://" in os.fspath(path)


def absolute(path: epath.PathLike) -> epath.Path:
    """The absolute path, which orbax needs; a URL as it is."""
    return epath.Path(path) if is_remote(path) else epath.Path(pathlib.Path(path).resolve())


def local(path: epath.PathLike, name: str) -> pathlib.Path:
    """Returns the path as a pathlib.Path. Raises ValueError, mentioning `name`, if it is remote."""
    if is_remote(path):
        raise ValueError(f"{name}: got {os.fspath(path)}, want a local folder; copy it there after")
    return pathlib.Path(path)


def write_whole(path: epath.PathLike, content: str | bytes, *, sync: bool = True) -> None:
    """Writes a file atomically: a reader sees the old content or the new one, also after a kill.

    Without `sync`, which takes milliseconds, the file may be lost when the machine loses power. A
    device or a pipe, such as /dev/stdout, is written to directly and not replaced.
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
) -> Generator[pathlib.Path]:
    """A local folder with the same files, for libraries that read local files only.

    A local folder is itself. Of a remote folder, the files whose names are `wanted` are copied into
    a temporary one for the duration of the `with` block.
    """
    if not is_remote(folder):
        yield pathlib.Path(folder)
        return
    with tempfile.TemporaryDirectory() as copy:
        for file in epath.Path(folder).iterdir():
            if wanted(file.name) and not file.is_dir():
                (pathlib.Path(copy) / file.name).write_bytes(file.read_bytes())
        yield pathlib.Path(copy)
