"""Metrics of a run: phase timers, and the writer of metrics.jsonl and of the sinks.

A run directory holds `metrics.jsonl` (one line for each write) and the files of its sinks
(sinks.py), such as `tensorboard/`. Where it is remote (gs://), they are kept on this machine and
copied there by `Writer.flush`.
"""

import contextlib
import dataclasses
import json
import math
import pathlib
import tempfile
import time
from collections.abc import Generator, Mapping, Sequence
from typing import TextIO

import jax
from absl import logging
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.checks.fields import Json
from mgsd_jax.config import Config, MetricsConfig
from mgsd_jax.parallel.means import Array, Mean, means_to_floats
from mgsd_jax.workdir import paths
from mgsd_jax.workdir import sinks as sinks_lib
from mgsd_jax.workdir.sinks import Picture, Sink

METRICS_FILE = "metrics.jsonl"


@dataclasses.dataclass(frozen=True)
class Timers:
    """Wall seconds by phase since the last `take`.

    jax returns before its work is done: a phase that should include the device time of its calls
    has to wait for it (`jax.block_until_ready`) before it ends.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Generator[None]:
        """Add the wall seconds of the `with` block to `name`, also where the block raises."""
        start = time.perf_counter()
        try:
            with jax.profiler.TraceAnnotation(name):  # its name in a trace (traces.py)
                yield
        finally:
            self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - start

    def take(self) -> dict[str, float]:
        """Return {phase: seconds} and start the next step at zero."""
        taken = dict(self.seconds)
        self.seconds.clear()
        return taken


@dataclasses.dataclass(frozen=True)
class Writer:
    """Writes the metrics of a step as a JSON line and to the sinks; see `open_writer`."""

    target: epath.Path
    folder: pathlib.Path  # of this machine: the target, or what is copied there
    lines: TextIO
    sinks: list[Sink]  # a tracker that fails leaves it

    def write(self, step: int, metrics: Mapping[str, Mean | Array]) -> None:
        """Write one record; train and evaluation metrics of a step may come in two writes."""
        values = means_to_floats(metrics)
        record = {"step": step, "time": time.time()}
        taken = sorted(record.keys() & values.keys())
        if taken:
            raise ValueError(f"metric names: got {taken}, want others than the record's own")
        # JSON has no non-finite numbers: they become 'nan', 'inf' and '-inf', as float() reads.
        finite = {name: v if math.isfinite(v) else str(v) for name, v in values.items()}
        self.lines.write(json.dumps(record | finite, allow_nan=False) + "\n")
        sinks_lib.tell(self.sinks, lambda sink: sink.numbers(step, values))

    def show(self, step: int, pictures: Sequence[Picture]) -> None:
        """Shows pictures in the sinks; a name that was shown before goes on at this step."""
        sinks_lib.tell(self.sinks, lambda sink: sink.pictures(step, pictures))

    def flush(self) -> None:
        """Returns when what was written so far outlives this machine; call it before each save."""
        if not paths.is_remote(self.target):
            return
        for file in sorted(self.folder.rglob("*")):
            if file.is_file():
                copied = self.target / file.relative_to(self.folder).as_posix()
                copied.parent.mkdir(parents=True, exist_ok=True)
                copied.write_bytes(file.read_bytes())


@contextlib.contextmanager
def open_writer(
    workdir: epath.PathLike, *, step: int = 0, config: Config | None = None
) -> Generator[Writer]:
    """A Writer of `metrics.jsonl` and of the sinks of a stage's folder, for one process.

    A run restored at `step` repeats the steps after it: their lines go first, in one atomic
    replacement. At step 0 the run starts over and every old line goes. Without a `config` there is
    TensorBoard alone.
    """
    target = epath.Path(workdir)
    target.mkdir(parents=True, exist_ok=True)
    _drop_lines_after(target / METRICS_FILE, step if step > 0 else -1)
    settings = MetricsConfig() if config is None else config.metrics
    with contextlib.ExitStack() as resources:
        folder = pathlib.Path(workdir)
        if paths.is_remote(workdir):
            folder = pathlib.Path(resources.enter_context(tempfile.TemporaryDirectory()))
            if (target / METRICS_FILE).exists():
                (folder / METRICS_FILE).write_bytes((target / METRICS_FILE).read_bytes())
        lines = (folder / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
        run = sinks_lib.Run(
            folder,
            step,
            project=settings.project,
            name=settings.name or f"{target.parent.name}/{target.name}",
            id=sinks_lib.run_id(target, step, settings.sinks),
            config={} if config is None else config_lib.to_dict(config),
        )
        writer = Writer(target, folder, lines, sinks_lib.open_sinks(settings, run))
        # In reverse order: the files are closed, copied, and deleted where they are temporary.
        resources.callback(writer.flush)
        resources.callback(lines.close)
        resources.callback(sinks_lib.tell, writer.sinks, sinks_lib.close)
        yield writer


def read_metrics(path: epath.PathLike) -> list[Json]:
    """Return the records of a `metrics.jsonl`, non-finite values as floats again.

    A last line without its newline (the process was killed while writing) is left out; any other
    line that is not a record raises ValueError naming file and line.
    """
    *lines, _ = epath.Path(path).read_bytes().split(b"\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            step = record["step"]
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise ValueError(f"{path}, line {number}: got {line[:80]!r}, want a record") from error
        if not isinstance(step, int) or isinstance(step, bool):
            raise ValueError(f"{path}, line {number}: got step {step!r}, want an integer")
        records.append(
            {k: float(v) if v in ("nan", "inf", "-inf") else v for k, v in record.items()}
        )
    return records


def _drop_lines_after(path: epath.Path, step: int) -> None:
    if not path.exists():
        return
    records = read_metrics(path)
    lines = path.read_bytes().split(b"\n")
    kept = [line for line, record in zip(lines, records, strict=False) if record["step"] <= step]
    dropped = len(records) - len(kept)
    if dropped or lines[-1]:
        logging.info("%s: dropped %d records after step %d", path, dropped, step)
        paths.write_whole(path, b"".join(line + b"\n" for line in kept))
