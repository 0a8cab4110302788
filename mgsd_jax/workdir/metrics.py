"""Metrics of a run: weighted means, phase timers, the writer, the progress bar, the run's record.

A run directory holds `config.json` (the config), `runs.jsonl` (one line for each start that took a
step: commit and versions), `metrics.jsonl` (one line for each write) and `tensorboard/` (event
files). Where it is remote (gs://), the last two are kept here and copied there by `Writer.flush`.
Needs the packages `tensorboardX` (event files without TensorFlow) and `tqdm`.
"""

import collections
import contextlib
import dataclasses
import functools
import json
import math
import pathlib
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TextIO

import tensorboardX
import tqdm
from absl import logging
from etils import epath

from mgsd_jax.parallel.means import Mean, means_to_floats
from mgsd_jax.workdir import paths

Array = Any  # a float, np.ndarray or jax.Array
Sink = Callable[[int, Mapping[str, float]], None]  # (step, values)

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"
_RECENT_STEPS = 20  # as many tell the time that is left


@dataclasses.dataclass(frozen=True)
class Timers:
    """Wall seconds by phase since the last `take`.

    jax returns before its work is done: a phase that should own the device time of its call has
    to wait for it (`jax.block_until_ready`) before it ends.
    """

    seconds: dict[str, float] = dataclasses.field(default_factory=dict)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the wall seconds of the `with` block to `name`, also where the block raises."""
        start = time.perf_counter()
        try:
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
    """Writes the metrics of a step to every sink; has none on processes other than 0."""

    sinks: tuple[Sink, ...]
    resources: contextlib.ExitStack
    copy: Callable[[], None] = lambda: None  # to a remote folder

    def write(self, step: int, metrics: Mapping[str, Mean | Array]) -> None:
        """Write one record; train and evaluation metrics of a step may come in two writes."""
        if not self.sinks:
            return
        values = means_to_floats(metrics)
        for sink in self.sinks:
            sink(step, values)

    def flush(self) -> None:
        """Returns when what was written so far outlives this machine; call it before each save."""
        self.copy()

    def close(self) -> None:
        """Flush and close the files."""
        self.resources.close()


def open_writer(
    workdir: epath.PathLike,
    *,
    is_main: bool,
    step: int = 0,
    tensorboard: bool = True,
    extra_sinks: tuple[Sink, ...] = (),
) -> Writer:
    """Return a Writer of `metrics.jsonl` and TensorBoard events under `workdir`.

    A run restored at `step` repeats the steps after it: their lines go first, in one atomic
    replacement. At step 0 the run starts over and every old line goes.
    """
    resources = contextlib.ExitStack()
    if not is_main:
        return Writer((), resources)
    target = epath.Path(workdir)
    target.mkdir(parents=True, exist_ok=True)
    keep_until = step if step > 0 else -1
    _drop_lines_after(target / METRICS_FILE, keep_until)
    copy = Writer((), resources).copy
    folder = pathlib.Path(workdir)
    if paths.is_remote(workdir):
        folder = pathlib.Path(resources.enter_context(tempfile.TemporaryDirectory()))
        if (target / METRICS_FILE).exists():
            (folder / METRICS_FILE).write_bytes((target / METRICS_FILE).read_bytes())
        copy = functools.partial(_copy_files, folder, target)
        resources.callback(copy)  # after the files are closed, before they are deleted
    lines = (folder / METRICS_FILE).open("a", encoding="utf-8", buffering=1)
    resources.callback(lines.close)
    sinks: list[Sink] = [_jsonl_sink(lines)]
    if tensorboard:
        events = tensorboardX.SummaryWriter(
            str(folder / TENSORBOARD_FOLDER), purge_step=keep_until + 1
        )
        resources.callback(events.close)
        sinks.append(_tensorboard_sink(events))
    return Writer((*sinks, *extra_sinks), resources, copy)


def _copy_files(folder: pathlib.Path, target: epath.Path) -> None:
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            copied = target / file.relative_to(folder).as_posix()
            copied.parent.mkdir(parents=True, exist_ok=True)
            copied.write_bytes(file.read_bytes())


def read_metrics(path: epath.PathLike) -> list[dict[str, Any]]:
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
        records.append({name: _from_json(value) for name, value in record.items()})
    return records


@dataclasses.dataclass(frozen=True)
class Progress:
    """Shows step, total, loss, step time and ETA on process 0.

    A bar where `stream` is a terminal, else a log line every `every` steps, whose times are means:
    no single step that validates or saves upsets them. The oldest of `recent` is left out, which
    keeps the first step of all, the one that compiles, out of every mean but its own.
    """

    total: int
    every: int
    is_main: bool
    bar: tqdm.tqdm | None
    recent: collections.deque[float]  # seconds of the last steps
    unit: str

    def update(self, step: int, step_seconds: float, loss: float | None = None) -> None:
        """Report that `step` steps of `total` are done, the last one in `step_seconds`."""
        if not self.is_main:
            return
        self.recent.append(step_seconds)
        shown = [] if loss is None else [f"loss {loss:.4g}"]
        if self.bar is not None:
            times = f"{step_seconds:.3g} s/{self.unit}"
            self.bar.set_postfix_str(", ".join([*shown, times]), refresh=False)
            self.bar.update(step - self.bar.n)
        elif step % self.every == 0 or step == self.total:
            times = list(self.recent)[1:] or self.recent
            mean = sum(times) / len(times)
            left = tqdm.tqdm.format_interval((self.total - step) * mean)
            counted = f"{self.unit} {step}/{self.total}"
            spent = (f"{mean:.3g} s/{self.unit}", f"{left} left")
            logging.info("%s", "  ".join([counted, *shown, *spent]))

    def close(self) -> None:
        """End the bar, so that later lines start on their own line."""
        if self.bar is not None:
            self.bar.close()


def open_progress(
    total: int,
    *,
    start: int = 0,
    is_main: bool,
    every: int = 10,
    stream: TextIO | None = None,
    unit: str = "step",
) -> Progress:
    """Return a Progress over `total` steps of which `start` are done; `stream` is sys.stderr."""
    if every < 1:
        raise ValueError(f"every: got {every}, want at least 1")
    target = sys.stderr if stream is None else stream
    bar = None
    if is_main and target.isatty():
        bar = tqdm.tqdm(total=total, initial=start, file=target, unit=unit, dynamic_ncols=True)
    recent = collections.deque[float](maxlen=_RECENT_STEPS + 1)
    return Progress(total, every, is_main, bar, recent, unit)


def _jsonl_sink(lines: TextIO) -> Sink:
    def write(step: int, values: Mapping[str, float]) -> None:
        record = {"step": step, "time": time.time()}
        taken = sorted(record.keys() & values.keys())
        if taken:
            raise ValueError(f"metric names: got {taken}, want others than the record's own")
        record |= {name: _to_json(value) for name, value in values.items()}
        lines.write(json.dumps(record, allow_nan=False) + "\n")

    return write


def _tensorboard_sink(events: tensorboardX.SummaryWriter) -> Sink:
    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            events.add_scalar(name, value, step)

    return write


def _to_json(value: float) -> float | str:
    """JSON has no non-finite numbers: they become 'nan', 'inf' and '-inf', which float() reads."""
    return value if math.isfinite(value) else str(value)


def _from_json(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


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
