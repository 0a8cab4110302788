"""A lock on a folder, so that one run at a time writes there; a dead process holds none.

On this machine's file systems, and on NFS with its lock service, the kernel keeps the lock (flock)
and releases it when the process ends, however it ends. Elsewhere (gs://) the owner rewrites the
lock file every `BEAT` seconds. A file that has not changed for `STALE` seconds, by the clock of the
process that waits for it, belongs to a dead run.
"""

import contextlib
import datetime
import errno
import fcntl
import functools
import json
import os
import pathlib
import socket
import sys
import threading
import time
import uuid
from collections.abc import Generator
from typing import TextIO

from absl import logging
from etils import epath

from mgsd_jax.workdir import paths

LOCK_FILE = "lock"
BEAT = 15.0  # seconds
STALE = 60.0
SETTLE = 2.0  # of two runs that start at once, each sees after so many seconds who wrote last
_NO_FLOCK = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def held(folder: epath.PathLike) -> Generator[None]:
    """Locks a folder against other runs, and creates it if needed; readers may read.

    Raises ValueError that names the run that holds the lock.
    """
    path = epath.Path(folder) / LOCK_FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    file = None if paths.is_remote(path) else _flock(pathlib.Path(path))
    if file is None:
        with _heart(path):
            yield
        return
    # A forked child that outlives this process must not keep the lock; exec closes the file.
    os.register_at_fork(after_in_child=file.close)
    try:
        file.truncate(0)
        file.write(_owner())
        file.flush()
        yield
    finally:
        try:
            pathlib.Path(path).unlink(missing_ok=True)
        finally:
            file.close()


def _owner(**more: str | int) -> str:
    since = datetime.datetime.now().astimezone().isoformat(sep=" ", timespec="seconds")
    return json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "since": since, **more})


def _taken(path: epath.PathLike, text: str) -> ValueError:
    try:
        owner = json.loads(text)
        who = f"process {owner['pid']} on {owner['host']} since {owner['since']}"
    except (ValueError, TypeError, KeyError):  # its owner is about to write its name
        who = "another process"
    folder = epath.Path(path).parent
    return ValueError(
        f"{folder}: got a run of {who} there, want one at a time; "
        "stop it, wait for its end, or take another folder"
    )


def _flock(path: pathlib.Path) -> TextIO | None:
    """The locked file; None if its file system has no such locks."""
    while True:
        file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            file.seek(0)
            text = file.read()
            file.close()
            if isinstance(error, BlockingIOError):
                raise _taken(path, text) from None
            if error.errno in _NO_FLOCK:
                return None
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                return file
        file.close()  # its last owner deleted it after we had opened it


@contextlib.contextmanager
def _heart(path: epath.Path) -> Generator[None]:
    """Holds the lock as a file that changes for as long as its owner lives."""
    _wait_for_death(path)
    write = functools.partial(paths.write_whole, path, sync=False)
    name = uuid.uuid4().hex
    write(_owner(id=name, beat=0))
    time.sleep(SETTLE)
    if name not in _read(path):
        raise _taken(path, _read(path))
    stop = threading.Event()

    def beat() -> None:
        number = 0
        while not stop.wait(BEAT):
            found = _read(path)
            if found and name not in found:
                # This process was suspended for too long and another took over: two would write.
                logging.error("%s", _taken(path, found))
                sys.stderr.flush()
                os._exit(2)
            number += 1
            write(_owner(id=name, beat=number))

    thread = threading.Thread(target=beat, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        path.unlink(missing_ok=True)


def _wait_for_death(path: epath.Path) -> None:
    """Returns once the file is gone or unchanged for `STALE` seconds; raises if it changes."""
    seen, until = _read(path), time.monotonic() + STALE
    if seen:
        logging.info("%s exists; waiting %g s to see whether its run is alive", path, STALE)
    while seen and time.monotonic() < until:
        time.sleep(min(SETTLE, STALE / 10))
        found = _read(path)
        if not found:
            return
        if found != seen:
            raise _taken(path, found)


def _read(path: epath.Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return ""
