"""The program as its users start it: processes of the command line, on a tiny model."""

import dataclasses
import os
import pathlib
import re
import socket
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence

import helpers_children
import helpers_devices
import numpy as np
from helpers_forked import Forked
from helpers_tiny import tiny_config

from mgsd_jax import tree
from mgsd_jax.stages import generate, init
from mgsd_jax.workdir import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[1]
TIMED = ("time", "seconds", "data", "rollout", "update", "validation", "tflops_per_s", "mfu")
SLOWEST = 600  # seconds that anything here may take on a busy machine
Running = subprocess.Popen[bytes] | Forked


@dataclasses.dataclass(frozen=True)
class Base:
    """A folder with a random tiny model, its boards and compiled programs, and a config file."""

    folder: pathlib.Path
    config: pathlib.Path


def make_base(folder: pathlib.Path) -> Base:
    config = tiny_config(folder, layers=1)
    init.run(config, str(folder))
    generate.run(config, str(folder))
    return write_config(folder)


def write_config(folder: pathlib.Path) -> Base:
    """The config of `make_base` in a file, and no base."""
    # As a literal: helpers_tiny imports main, whose flags are there only once.
    text = (
        f"from mgsd_jax.config import *\n\nget_config = lambda: {tiny_config(folder, layers=1)!r}\n"
    )
    (folder / "tiny.py").write_text(text)
    return Base(folder, folder / "tiny.py")


def start(
    base: Base,
    stage: str,
    workdir: pathlib.Path,
    settings: Sequence[str] = (),
    *,
    processes: int = 1,
    devices: int = 1,
    environ: Mapping[str, str] | None = None,
    program: Sequence[str] = ("-m", "mgsd_jax.main"),
    forked: bool = False,
) -> list[Running]:
    """The processes of a stage, each with its own virtual devices; they write `log.{process}`.

    Programs are compiled once: they are kept where all tests keep theirs (conftest.py). `forked`
    ones begin with their imports done (helpers_forked.py).
    """
    workdir.mkdir(parents=True, exist_ok=True)
    arguments = [f"--stage={stage}", f"--config={base.config}", f"--workdir={workdir}"]
    changes = (f"data.folder={base.folder}/data", "distillation.student={model}", *settings)
    arguments += [f"--set={change}" for change in changes]
    environ = {
        **(environ or {}),
        **{k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))},
        "PYTHONPATH": helpers_children.PATH,
        "JAX_PLATFORMS": "cpu",
        "JAX_COMPILATION_CACHE_DIR": os.environ["JAX_COMPILATION_CACHE_DIR"],
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": helpers_devices.quick_flags(devices),
    }
    port = free_port()
    started: list[Running] = []
    for process in range(processes):
        joined = [f"--coordinator=localhost:{port}", f"--processes={processes}"]
        joined = [*joined, f"--process={process}"] if processes > 1 else []
        command, path = [*program, *arguments, *joined], workdir / f"log.{process}"
        if forked:
            started.append(Forked(command, environ, path))
            continue
        with path.open("ab") as log:
            command = [sys.executable, *command]
            started.append(subprocess.Popen(command, cwd=ROOT, env=environ, stdout=log, stderr=log))
    return started


def finish(running: Sequence[Running], workdir: pathlib.Path, want: int = 0) -> None:
    """Waits for the processes and asserts the exit code of each."""
    try:
        codes = [process.wait(timeout=SLOWEST) for process in running]
    finally:
        for process in running:
            process.kill()
            process.wait()
    assert codes == [want] * len(running), log_of(workdir)


def run(
    base: Base,
    stage: str,
    workdir: pathlib.Path,
    settings: Sequence[str] = (),
    *,
    forked: bool = False,
) -> None:
    finish(start(base, stage, workdir, settings, forked=forked), workdir)


def log_of(workdir: pathlib.Path, process: int = 0, characters: int = 4000) -> str:
    return (workdir / f"log.{process}").read_text(errors="replace")[-characters:]


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        return taken.getsockname()[1]


def wait_for_records(
    workdir: pathlib.Path, stage: str, count: int, running: Sequence[Running]
) -> bool:
    """Waits until a stage has written `count` metrics; False where a process ends before."""
    path, until = workdir / stage / "metrics.jsonl", time.monotonic() + SLOWEST
    while time.monotonic() < until:
        if path.exists() and path.read_bytes().count(b"\n") >= count:
            return True
        if any(process.poll() is not None for process in running):
            return False
        time.sleep(0.01)
    raise AssertionError(f"no {count} records in time: {log_of(workdir)}")


def weights(workdir: pathlib.Path, stage: str) -> dict[str, np.ndarray]:
    """The trained parameters in the newest checkpoint, by path."""
    return dict(tree.named_leaves(checkpoint.load_params(workdir / stage / "checkpoints")))


def differing(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> list[str]:
    """Paths of the leaves that are not the same bits."""
    assert a.keys() == b.keys()
    return [name for name in a if a[name].tobytes() != b[name].tobytes()]


def records(workdir: pathlib.Path, stage: str) -> list[dict[str, float]]:
    """The metrics of every step but for times and speeds."""
    return [
        {k: v for k, v in row.items() if k not in TIMED and not re.match("tokens_per_s", k)}
        for row in metrics.read_metrics(workdir / stage / "metrics.jsonl")
    ]
