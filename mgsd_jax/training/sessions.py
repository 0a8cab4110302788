"""What the two training stages share: an open run, and the end of every step."""

import contextlib
import dataclasses
import threading
import time
from collections.abc import Generator, Sequence
from typing import Literal, Protocol

import jax
from absl import logging
from etils import epath

from mgsd_jax.checks.fields import Json
from mgsd_jax.config import Config
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.flops import peak_flops
from mgsd_jax.parallel import means, processes
from mgsd_jax.parallel.means import Mean
from mgsd_jax.training import guards
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.tree import PyTree
from mgsd_jax.workdir import checkpoint, metrics, signals, traces
from mgsd_jax.workdir.folders import Claim
from mgsd_jax.workdir.progress import Progress, mean_cost, open_progress
from mgsd_jax.workdir.sinks import Picture

Measured = dict[str, Mean | means.Array]  # a scalar that is no Mean is not averaged

# M-RoPE positions are [3, B, T]; everything else has the batch first.
FIRST: PyTree = 0
INPUT_AXES = Inputs(tokens=0, positions=1, valid=0, next_position=0, pictures=FIRST)

# Exit codes of a training run, besides 0 (done), 1 (an error with a traceback) and 2 (bad input).
EXIT_NUMBERS = 3  # too many steps in a row not finite, or collapsing; starting again repeats them
EXIT_STOPPED = 75  # asked to stop and saved; the same command continues. EX_TEMPFAIL.


# What the bar and the log say of a step beside its number and times.
_TOLD = (
    ("loss", "loss {:.4g}"),
    ("kl", "kl {:.3g}"),
    ("val/loss", "val loss {:.4g}"),
    ("val/kl", "val kl {:.3g}"),
    ("val/success", "val success {:.1%}"),
    ("tokens_per_s/rollout", "rollout {:,.0f} tokens/s"),
    ("tokens_per_s/update", "update {:,.0f} tokens/s"),
)


class Resumable(Protocol):
    """A loader of either stage: checkpoints hold its position."""

    def get_state(self) -> Json:
        """The position, as JSON values."""
        ...

    def set_state(self, state: Json) -> None:
        """Goes on after the position."""
        ...


class Stopped(Exception):
    """A run that ends before its last step, with what to say and the exit code to end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something done every `every` steps, and at the end, is done after `step` steps."""
    return step == steps or (every > 0 and step % every == 0)


def times_due(step: int, every: int, steps: int) -> int:
    """How often something is still due after `step`: `times_due(4, 3, 10)` is 3 (6, 9, 10)."""
    if step >= steps:
        return 0
    return steps // every - step // every + (steps % every > 0) if every else 1


def speed(flops: float, tokens: int, seconds: float) -> dict[str, float]:
    """Tokens and model FLOPs a second of an update, and MFU where the device's peak is known."""
    measured = {"tokens_per_s/update": tokens / seconds, "tflops_per_s": flops / seconds / 1e12}
    peak = peak_flops()
    return measured if peak is None else measured | {"mfu": flops / seconds / peak}


@dataclasses.dataclass
class Session:
    """An opened training run: what every step reports to, and where the run stands."""

    claim: Claim
    state: TrainState  # as it was opened; the steps have their own
    start: int  # the steps before it are done
    steps: int
    eval_every: int  # steps between validations
    config: Config
    metric: str  # of the best checkpoint
    loader: Resumable
    checkpointer: checkpoint.Checkpointer
    writer: metrics.Writer | None  # on process 0
    progress: Progress
    tracer: traces.Tracer
    stop: threading.Event  # set by SIGTERM and Ctrl-C
    good_step: int  # the last step whose update was finite, or the one before `start`
    saved_step: int  # of the newest checkpoint, 0 without one
    step_ended: float  # time.perf_counter() at the end of the last step, or on opening
    timers: metrics.Timers = dataclasses.field(default_factory=metrics.Timers)
    warned: frozenset[str] = frozenset()  # metrics above their thresholds at the last step
    validated: dict[str, float] = dataclasses.field(default_factory=dict)  # by the last validation
    save_seconds: float = 0.0  # that the step under way began with
    collapsing: int = 0  # the last so many steps

    def finish_step(self, step: int, state: TrainState, measured: Measured) -> None:
        """Reports the metrics of update `step`, a Mean or a scalar each, and saves if it is due.

        Nothing is saved between an update that was not finite and the next one that is, so the
        newest checkpoint is always of a good step. Raises Stopped after saving where the run was
        asked to stop, and where `guards.skipped_in_a_row` updates in a row were not finite.
        """
        values, is_asked = self._gather_metrics(measured)
        self.tracer.end(step, state)
        is_last = step == self.steps
        is_good = values["skipped_update"] == 0
        if is_good or is_last:
            self.claim.record()
        self._report(step, values)
        if is_good:
            self.good_step = step
        elif not is_last:
            self._count_skipped(step)
        every = self.config.checkpoint.every
        if is_last or (is_good and (is_asked or is_due(step, every, self.steps))):
            self._save(step, state, values.get(self.metric))
        self._count_collapsing(step, values)
        if is_asked and not is_last:
            checkpoint.wait(self.checkpointer)
            raise Stopped(
                f"{self.checkpointer.folder}: stopped after step {step} of {self.steps}, asked by "
                "SIGTERM or Ctrl-C; the same command continues after step "
                f"{self.saved_step}",
                EXIT_STOPPED,
            )
        self.tracer.begin(step + 1)

    def show(self, step: int, pictures: Sequence[Picture]) -> None:
        """Shows pictures where the metrics of update `step` are shown."""
        if self.writer is not None:
            self.writer.show(step, pictures)

    def _gather_metrics(self, measured: Measured) -> tuple[dict[str, float], bool]:
        """The metrics as floats, and whether any process was asked to stop: the same everywhere.

        A Mean of device arrays is over all rows already. A Mean of host numbers is over the rows of
        this process and is added up; other host numbers (times) stay this process's own.
        """
        own = {
            name: (float(value.sum), float(value.weight))
            for name, value in measured.items()
            if isinstance(value, Mean) and not isinstance(value.sum, jax.Array)
        }
        everyone = processes.gather({"means": own, "stop": self.stop.is_set()})
        total = means.add_means([one["means"] for one in everyone])
        values = means.means_to_floats(jax.device_get(measured) | total)
        return values, any(one["stop"] for one in everyone)

    def _report(self, step: int, values: dict[str, float]) -> None:
        """Writes, shows and warns."""
        now = time.perf_counter()
        seconds, self.step_ended = now - self.step_ended, now
        values |= {"seconds": seconds, **self.timers.take()}
        if self.writer is not None:
            self.writer.write(step, values)
        self._show(step, values)
        found = guards.warnings(values, self.config.guards)
        for metric in sorted(found.keys() - self.warned):
            logging.warning("step %d: %s", step, found[metric])
        self.warned = frozenset(found)

    def _show(self, step: int, values: dict[str, float]) -> None:
        """Shows the step, and what is left: steps, validations and checkpoints."""
        progress, validation = self.progress, values.get("validation", 0.0)
        if validation:
            self.validated = {name: v for name, v in values.items() if name.startswith("val/")}
        # What compiles in a step that validates is taken to be the validation's: the step's own
        # programs were compiled in the first one.
        compiled = progress.take_compiled()
        of_validation = min(compiled, validation)
        if validation:
            progress.spend("validation", validation - of_validation)
        other = validation + self.save_seconds + compiled - of_validation
        progress.spend("step", values["seconds"] - other)
        self.save_seconds = 0.0
        todo = {
            "step": self.steps - step,
            "validation": times_due(step, self.eval_every, self.steps),
            "checkpoint": times_due(step, self.config.checkpoint.every, self.steps),
        }
        per_step = f"{mean_cost(progress.spent['step']):.3g} s/step"
        told = [text.format(v) for n, text in _TOLD if (v := (values | self.validated).get(n))]
        progress.update(step, todo, [per_step, *told], kept=validation > 0)

    def _count_skipped(self, step: int) -> None:
        logging.warning("step %d: loss or gradient is not finite, update skipped", step)
        if step - self.good_step < self.config.guards.skipped_in_a_row:
            return
        checkpoint.wait(self.checkpointer)
        saved = f"{self.checkpointer.folder}/{self.saved_step}"
        raise Stopped(
            f"step {step}: {step - self.good_step} updates in a row, all since step "
            f"{self.good_step}, had a loss or gradient that is not finite; last good checkpoint: "
            f"{saved if self.saved_step else 'none, the run starts over'}",
            EXIT_NUMBERS,
        )

    def _count_collapsing(self, step: int, values: dict[str, float]) -> None:
        limits = self.config.guards
        problem = guards.collapse(values, limits)
        self.collapsing = self.collapsing + 1 if problem else 0
        if self.collapsing < limits.collapsed_in_a_row or step == self.steps:
            return
        checkpoint.wait(self.checkpointer)
        raise Stopped(
            f"step {step}: {problem}, for {self.collapsing} steps in a row: a collapse; last "
            f"checkpoint: {self.saved_step or 'none'}; checkpoint.use=best takes the best one",
            EXIT_NUMBERS,
        )

    def _save(self, step: int, state: TrainState, score: float | None) -> None:
        if self.writer is not None:
            self.writer.flush()
        began = time.perf_counter()
        checkpoint.save(self.checkpointer, step, state, self.loader.get_state(), score)
        self.save_seconds = time.perf_counter() - began
        self.progress.spend("checkpoint", self.save_seconds)
        self.saved_step = step


@contextlib.contextmanager
def open_session(
    claim: Claim,
    config: Config,
    state: TrainState,
    loader: Resumable,
    *,
    metric: str,
    best_mode: Literal["max", "min"],
    steps: int,
    eval_every: int = 0,
) -> Generator[Session]:
    """A session that resumes from the last readable checkpoint of a folder, if there is one.

    The best checkpoint is kept by the validation's `metric`. On leaving, a save is waited for.
    """
    is_main, folder = jax.process_index() == 0, claim.folder
    with contextlib.ExitStack() as resources:
        stop = resources.enter_context(signals.asked_to_stop())
        checkpointer = checkpoint.open_checkpointer(
            folder / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            metric=metric,
            best_mode=best_mode,
        )
        resources.callback(checkpoint.close, checkpointer)
        start, state = _resume(folder, checkpointer, state, loader, steps)
        writer = None
        if is_main:
            opened = metrics.open_writer(folder, step=start, config=config)
            writer = resources.enter_context(opened)
        shown = open_progress(folder.name, steps, start=start, is_main=is_main)
        tracer = traces.open_tracer(folder, config.metrics.profile, steps=steps, start=start)
        session = Session(
            claim=claim,
            state=state,
            start=start,
            steps=steps,
            eval_every=eval_every,
            config=config,
            metric=metric,
            loader=loader,
            checkpointer=checkpointer,
            writer=writer,
            progress=resources.enter_context(shown),
            tracer=resources.enter_context(tracer),
            stop=stop,
            good_step=start,
            saved_step=start,
            step_ended=time.perf_counter(),
        )
        session.tracer.begin(start + 1)
        try:
            yield session
        except BaseException as error:
            if jax.process_count() > 1 and not isinstance(error, Stopped):
                # Closing waits for the other processes, which may be waiting for this one.
                resources.pop_all()
            raise


def _resume(
    folder: epath.Path,
    checkpointer: checkpoint.Checkpointer,
    state: TrainState,
    loader: Resumable,
    steps: int,
) -> tuple[int, TrainState]:
    """(the steps that are done, the state after them); the loader goes on where they ended."""
    restored, start = checkpoint.restore_latest(checkpointer, state), 0
    if restored is not None:
        start, state = restored.step, restored.state
        loader.set_state(restored.data_state)
        logging.info("%s: continues after step %d of %d", folder, start, steps)
    learning = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    name = folder.name
    logging.info("%s: %d steps, %s parameters learn, %s", name, steps, f"{learning:,}", devices)
    return start, state
