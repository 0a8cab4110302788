"""How far a stage is: a bar in a terminal, else lines in the log, with one time that is left.

What is left is told from what each kind of work has taken so far (a step, a validation, a save), so
that a step that validates does not upset it. Needs the package `tqdm`.
"""

import collections
import contextlib
import dataclasses
import sys
import time
from collections.abc import Generator, Iterable, Mapping, Sequence

import tqdm
from absl import logging
from jax import monitoring

_RECENT = 20  # what a kind of work takes is a mean over so many
_COMPILING = (
    "/jax/core/compile/jaxpr_to_mlir_module_duration",
    "/jax/core/compile/backend_compile_duration",
)


def mean_cost(seconds: Iterable[float]) -> float:
    """The mean without the largest, where there are two or more: the first one warms up."""
    usual = sorted(seconds)
    usual = usual[:-1] if len(usual) > 1 else usual
    return sum(usual) / len(usual)


def time_left(spent: Mapping[str, Sequence[float]], todo: Mapping[str, float]) -> str:
    """What `todo`, how many of each kind of work, will take; `spent` has seconds of one each.

    Work of a kind that was not done yet is not counted, and the answer says so: "more than 02:10".
    """
    known = {kind: mean_cost(seconds) for kind, seconds in spent.items() if seconds}
    seconds = sum(count * known.get(kind, 0.0) for kind, count in todo.items())
    is_all = all(kind in known for kind, count in todo.items() if count)
    return ("" if is_all else "more than ") + tqdm.tqdm.format_interval(seconds)


@dataclasses.dataclass
class Progress:
    """Shows how far a stage is, on process 0; see `open_progress`."""

    name: str  # of the stage
    total: int
    unit: str
    is_main: bool
    bar: tqdm.tqdm | None
    compiled: list[float]  # seconds of every compilation since the last `take_compiled`
    began: float  # time.perf_counter()
    shown: float  # when a line or the bar was last shown
    done: int = 0  # what `count` has counted
    spent: dict[str, collections.deque[float]] = dataclasses.field(default_factory=dict)

    def spend(self, kind: str, seconds: float, count: float = 1) -> None:
        """Notes that `count` of a kind of work have taken so long."""
        recent = self.spent.setdefault(kind, collections.deque(maxlen=_RECENT))
        recent.append(max(seconds, 0.0) / count)

    def take_compiled(self) -> float:
        """Seconds that compilations took since the last call: they do not come again."""
        seconds = sum(self.compiled)
        self.compiled.clear()
        return seconds

    def update(
        self,
        done: int,
        todo: Mapping[str, float],
        told: Sequence[str] = (),
        *,
        kept: bool = False,
    ) -> None:
        """Says that `done` of `total` are done and how many of each kind of work are left.

        A line that is `kept` is one to read later (a validation): it is logged beside a bar, too.
        """
        now = time.perf_counter()
        if not self.is_main:
            return
        is_last = done == self.total
        # Without a terminal a line every ten seconds, in a long run every minute.
        pause = min(max((now - self.began) / 10, 10.0), 60.0) if self.bar is None else 0.1
        if not (kept or is_last or now - self.shown >= pause):
            return
        self.shown = now
        left = "done" if is_last else f"{time_left(self.spent, todo)} left"
        line = "  ".join([f"{self.name} {done}/{self.total} {self.unit}s", left, *told])
        if self.bar is not None:
            self.bar.set_description_str(line, refresh=False)
            self.bar.n = done
            self.bar.refresh()
        if kept or is_last or self.bar is None:
            logging.info("%s", line)

    def count(self) -> None:
        """Says that one more is done, where every one takes as long."""
        self.done += 1
        seconds = (time.perf_counter() - self.began) / self.done
        self.spent[self.unit] = collections.deque([seconds])
        self.update(self.done, {self.unit: self.total - self.done})

    def close(self) -> None:
        """Ends the bar."""
        if self.bar is not None:
            self.bar.close()


@contextlib.contextmanager
def open_progress(
    name: str, total: int, *, is_main: bool, start: int = 0, unit: str = "step"
) -> Generator[Progress]:
    """A Progress over `total` of which `start` are done."""
    compiled: list[float] = []

    def note(event: str, duration_secs: float, **_: str | int) -> None:
        if event in _COMPILING:
            compiled.append(duration_secs)

    bar = None
    if is_main and sys.stderr.isatty():
        bar = tqdm.tqdm(
            total=total,
            initial=start,
            file=sys.stderr,
            desc=f"{name} {start}/{total} {unit}s",
            bar_format="{percentage:3.0f}%|{bar:10}| {desc}",
            dynamic_ncols=True,
            leave=False,  # its last line is in the log
        )
    now = time.perf_counter()
    monitoring.register_event_duration_secs_listener(note)
    progress = Progress(name, total, unit, is_main, bar, compiled, now, now)
    try:
        yield progress
    finally:
        monitoring.unregister_event_duration_listener(note)
        progress.close()
