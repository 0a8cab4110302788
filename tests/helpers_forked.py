"""Programs that begin with their imports done: forked from one process that has made them.

The imports are most of what a short run takes. Everything else is as in a new process: its own
environment, flags, devices, signals and exit code. No test of the command line itself uses these.
"""

import atexit
import gc
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

_SERVER = multiprocessing.get_context("forkserver")
_SERVER.set_forkserver_preload(["mgsd_jax.main"])


class Forked:
    """What tests use of a subprocess.Popen."""

    def __init__(self, argv: Sequence[str], environ: Mapping[str, str], log: Path) -> None:
        arguments = (tuple(argv), dict(environ), str(log))
        self._process = _SERVER.Process(target=_run, args=arguments, daemon=True)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self._process.exitcode is None:
            raise subprocess.TimeoutExpired("a forked program", timeout or 0)
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        if self._process.pid is not None and self._process.exitcode is None:
            os.kill(self._process.pid, number)

    def kill(self) -> None:
        self.send_signal(signal.SIGKILL)


def _run(argv: tuple[str, ...], environ: dict[str, str], log: str) -> None:
    """`python *argv` in this process: -m mgsd_jax.main, -c code, or a file."""
    import jax

    gc.freeze()  # as the program does after its imports
    with open(log, "ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.clear()
    os.environ.update(environ)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    first, *rest = argv
    try:
        if first == "-m":
            from mgsd_jax import main

            sys.argv = ["mgsd_jax", *rest[1:]]
            main.entry()
        elif first == "-c":
            sys.argv = ["-c", *rest[1:]]
            exec(rest[0], {"__name__": "__main__"})
        else:
            sys.argv = [first, *rest]
            sys.path.insert(0, str(Path(first).parent))
            runpy.run_path(first, run_name="__main__")
    finally:
        atexit._run_exitfuncs()
