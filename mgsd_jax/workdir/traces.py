"""Traces of some steps of a stage by jax's profiler (`--profile=5:8`); docs/profiling.md reads one.

They lie in `{stage}/tensorboard/plugins/profile/steps_5-8/`, where TensorBoard's profile plugin
looks for them, two files for each process: `process_0.xplane.pb` for TensorBoard and xprof, and
`process_0.trace.json.gz` for Perfetto.
"""

import contextlib
import dataclasses
import pathlib
import tempfile
from collections.abc import Generator, Iterable, Iterator
from typing import TypeVar

import jax
from absl import logging
from etils import epath

from mgsd_jax.tree import PyTree
from mgsd_jax.workdir.sinks import TENSORBOARD_FOLDER

Part = TypeVar("Part")
ENDINGS = (".xplane.pb", ".trace.json.gz")


@dataclasses.dataclass
class Tracer:
    """Traces steps `first` to `last` of this process; see `open_tracer`."""

    folder: epath.Path  # of the stage
    first: int
    last: int
    trace: contextlib.ExitStack | None = None  # the trace being taken: closing it saves it
    mark: contextlib.ExitStack | None = None  # of the step under way
    done: int = 0  # parts that `each` has counted

    def begin(self, step: int) -> None:
        """Starts the trace where `step`, which is about to begin, is one to trace."""
        if not self.first <= step <= self.last or self.mark is not None:
            return
        if self.trace is None:
            self.trace = _start(self.folder, f"steps_{self.first}-{self.last}")
        self.mark = contextlib.ExitStack()
        self.mark.enter_context(jax.profiler.StepTraceAnnotation("step", step_num=step))

    def end(self, step: int, computed: PyTree = None) -> None:
        """Ends `step`, and the trace with the last one, once `computed` is there."""
        if self.mark is None:
            return
        if step == self.last:
            jax.block_until_ready(computed)
        self.mark.close()
        self.mark = None
        if step == self.last:
            self.close()

    def each(self, parts: Iterable[Part]) -> Iterator[Part]:
        """The parts, each of which counts as a step, together with those of earlier calls."""
        left = iter(parts)
        while True:
            self.begin(self.done + 1)
            try:
                part = next(left)
            except StopIteration:
                return
            self.done += 1
            self.end(self.done)
            yield part

    def close(self) -> None:
        """Saves what was traced, also where the run ends before the last step."""
        if self.trace is not None:
            self.trace.close()
            self.trace = None


def _start(folder: epath.Path, name: str) -> contextlib.ExitStack:
    """A trace that is being taken; closing it writes its files into the stage's folder."""
    options = jax.profiler.ProfileOptions()
    # Every call of Python would be a thousand times as much to look through; phases are marked.
    options.python_tracer_level = 0
    trace = contextlib.ExitStack()
    scratch = trace.enter_context(tempfile.TemporaryDirectory())
    trace.callback(_save, scratch, folder / TENSORBOARD_FOLDER / "plugins" / "profile" / name)
    jax.profiler.start_trace(scratch, profiler_options=options)
    trace.callback(jax.profiler.stop_trace)
    return trace


def _save(scratch: str, target: epath.Path) -> None:
    """Copies the files of a trace; jax names them after the host, which processes may share."""
    target.mkdir(parents=True, exist_ok=True)
    for file in sorted(pathlib.Path(scratch).rglob("*")):
        for ending in ENDINGS:
            if file.name.endswith(ending):
                copy = target / f"process_{jax.process_index()}{ending}"
                copy.write_bytes(file.read_bytes())
    logging.info("%s: traced; docs/profiling.md says how to read it", target)


@contextlib.contextmanager
def open_tracer(
    folder: epath.PathLike, span: str, *, start: int = 0, steps: int | None = None
) -> Generator[Tracer]:
    """A Tracer of the steps in `span` ('first:last', or '' for none) of a stage's folder.

    Warns where steps `start` + 1 to `steps`, if given, have none of them.
    """
    first, last = map(int, span.split(":")) if span else (0, 0)
    if steps is not None and span and (first > steps or last <= start):
        logging.warning(
            "--profile: got %s, want some of steps %d to %d, which are left; nothing is traced",
            *(span, start + 1, steps),
        )
    tracer = Tracer(epath.Path(folder), first, last)
    try:
        yield tracer
    finally:
        tracer.close()
