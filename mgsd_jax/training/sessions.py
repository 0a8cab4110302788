"""What the two training stages share: an open run, and the end of every step."""

import contextlib
import dataclasses
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax
from absl import logging

from mgsd_jax.config import Config
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.loaders import Loader
from mgsd_jax.model.flops import peak_flops
from mgsd_jax.parallel import means, processes
from mgsd_jax.parallel.means import Mean
from mgsd_jax.training import guards
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.workdir import checkpoint, metrics
from mgsd_jax.workdir.folders import Claim

# M-RoPE positions are [3, B, T]; everything else has the batch first.
FIRST: Any = 0
INPUT_AXES = Inputs(tokens=0, positions=1, valid=0, next_position=0, pictures=FIRST)

# Exit codes of a training run, besides 0 (done), 1 (an error with a traceback) and 2 (bad input).
EXIT_NUMBERS = 3  # too many updates in a row were not finite; starting again repeats them
EXIT_STOPPED = 75  # asked to stop and saved; the same command continues. EX_TEMPFAIL.
_ASKING = (signal.SIGTERM, signal.SIGINT)  # the second one is Ctrl-C


class Stopped(Exception):
    """A run that ends before its last step, with what to say and the exit code to end with."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something done every `every` steps, and at the end, is done after `step` steps."""
    return step == steps or (every > 0 and step % every == 0)


def speed(flops: float, tokens: int, seconds: float) -> dict[str, float]:
    """Tokens and model FLOPs a second of an update, and MFU where the device's peak is known."""
    measured = {"tokens_per_s/update": tokens / seconds, "tflops_per_s": flops / seconds / 1e12}
    peak = peak_flops()
    return measured if peak is None else measured | {"mfu": flops / seconds / peak}


@dataclasses.dataclass
class Standing:
    """What a session remembers from one step to the next."""

    ended: float  # when the last step did, or the session began: time.perf_counter()
    good_step: int  # the last step whose update was finite, or where the session began
    saved_step: int  # of the newest checkpoint, 0 without one
    warned: frozenset[str] = frozenset()  # metrics above their thresholds at the last step


@dataclasses.dataclass(frozen=True)
class Session:
    """An opened training run: where it stands, and what every step reports to."""

    claim: Claim
    state: TrainState
    start: int
    steps: int
    config: Config
    metric: str
    timers: metrics.Timers
    loader: Loader[Any, Any]
    checkpointer: checkpoint.Checkpointer
    writer: metrics.Writer
    progress: metrics.Progress
    stop: threading.Event  # set by SIGTERM and Ctrl-C
    standing: Standing

    def finish_step(self, step: int, state: TrainState, measured: dict[str, Any]) -> None:
        """Reports the metrics of update `step`, a Mean or a scalar each, and saves if it is due.

        Nothing is saved between an update that was not finite and the next one that is, so the
        newest checkpoint is always of a good step. Raises Stopped where it was asked to, the step
        saved, and where `guards.skipped_in_a_row` updates in a row were not finite.
        """
        values, is_asked = self._tell(measured)
        is_last = step == self.steps
        is_good = values["skipped_update"] == 0
        if is_good or is_last:
            self.claim.record()
        now = time.perf_counter()
        seconds = now - self.standing.ended
        self.standing.ended = now
        values |= {"seconds": seconds, **self.timers.take()}
        self.writer.write(step, values)
        self.progress.update(step, seconds, values["loss"])
        self._warn(step, values)
        if is_good:
            self.standing.good_step = step
        elif not is_last:
            self._stop_if_hopeless(step)
        every = self.config.checkpoint.every
        if is_last or (is_good and (is_asked or is_due(step, every, self.steps))):
            self._save(step, state, values)
        if is_asked and not is_last:
            checkpoint.wait(self.checkpointer)
            raise Stopped(
                f"{self.checkpointer.folder}: stopped after step {step} of {self.steps}, asked by "
                "SIGTERM or Ctrl-C; the same command continues after step "
                f"{self.standing.saved_step}",
                EXIT_STOPPED,
            )

    def _tell(self, measured: dict[str, Any]) -> tuple[dict[str, float], bool]:
        """The metrics as floats, and whether any process was asked to stop: the same everywhere.

        A Mean in device arrays is of all rows already. One in host numbers is of this process's
        rows and is added up; other host numbers (times) are this process's own.
        """
        own = {
            name: (float(value.sum), float(value.weight))
            for name, value in measured.items()
            if isinstance(value, Mean) and not isinstance(value.sum, jax.Array)
        }
        told = processes.gather({"means": own, "stop": self.stop.is_set()})
        everyone = means.add_means([one["means"] for one in told])
        values = means.means_to_floats(jax.device_get(measured) | everyone)
        return values, any(one["stop"] for one in told)

    def _warn(self, step: int, values: dict[str, float]) -> None:
        found = guards.warnings(values, self.config.guards)
        for metric in sorted(found.keys() - self.standing.warned):
            logging.warning("step %d: %s", step, found[metric])
        self.standing.warned = frozenset(found)

    def _stop_if_hopeless(self, step: int) -> None:
        good, saved = self.standing.good_step, self.standing.saved_step
        logging.warning("step %d: loss or gradient is not finite, update skipped", step)
        if step - good < self.config.guards.skipped_in_a_row:
            return
        checkpoint.wait(self.checkpointer)
        there = f"{self.checkpointer.folder}/{saved}" if saved else "none, the run starts over"
        raise Stopped(
            f"step {step}: {step - good} updates in a row, all since step {good}, had a loss or "
            f"gradient that is not finite; last good checkpoint: {there}",
            EXIT_NUMBERS,
        )

    def _save(self, step: int, state: TrainState, values: dict[str, float]) -> None:
        self.writer.flush()
        checkpoint.save(
            self.checkpointer,
            step,
            state,
            data_state=self.loader.get_state(),
            meta={"metric": self.metric},
            metrics={self.metric: values[self.metric]} if self.metric in values else None,
        )
        self.standing.saved_step = step


@contextlib.contextmanager
def asked_to_stop() -> Iterator[threading.Event]:
    """An event that SIGTERM or Ctrl-C sets instead of ending the process; a second one ends it.

    At once, with 143 or 130: the main thread may be compiling for minutes, and would hear of a
    signal after that. The number of every signal goes through a pipe to a thread that waits for it.
    """
    event = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield event  # Python takes signals in the main thread only
        return
    # One that is ignored (Ctrl-C by a job of the background) stays so.
    asking = [one for one in _ASKING if signal.getsignal(one) is not signal.SIG_IGN]
    # None: a handler that Python knows nothing of, which cannot be set again.
    before = {one: signal.signal(one, lambda *_: event.set()) or signal.SIG_DFL for one in asking}
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    pipe_before = signal.set_wakeup_fd(writer)
    listener = threading.Thread(target=_listen, args=(reader, asking), daemon=True)
    listener.start()
    try:
        yield event
    finally:
        signal.set_wakeup_fd(pipe_before)
        for one, handler in before.items():
            signal.signal(one, handler)
        os.close(writer)
        listener.join()
        os.close(reader)


def _listen(reader: int, asking: Sequence[int]) -> None:
    """Says that the first of the signals was heard, and ends the process at the second."""
    is_asked = False
    while number := os.read(reader, 1):
        if number[0] not in asking:
            continue
        if is_asked:
            os._exit(128 + number[0])
        is_asked = True
        os.write(2, b"\nasked to stop: this step is finished and saved; once more ends at once\n")


@contextlib.contextmanager
def opened(
    claim: Claim,
    config: Config,
    state: TrainState,
    loader: Loader[Any, Any],
    *,
    metric: str,
    best_mode: Literal["max", "min"],
    steps: int,
) -> Iterator[Session]:
    """A session that continues from the last readable checkpoint of a folder, if there is one.

    `metric` is the validation metric that the best checkpoint is kept by. On leaving, a save under
    way is waited for.
    """
    is_main, folder = jax.process_index() == 0, claim.folder
    with contextlib.ExitStack() as resources:
        stop = resources.enter_context(asked_to_stop())
        checkpointer = checkpoint.open_checkpointer(
            folder / "checkpoints",
            keep_last=config.checkpoint.keep_last,
            keep_best=config.checkpoint.keep_best,
            metric=metric,
            best_mode=best_mode,
        )
        resources.callback(checkpoint.close, checkpointer)
        start = 0
        restored = checkpoint.restore_latest(checkpointer, state)
        if restored is not None:
            start, state = restored.step, restored.state
            loader.set_state(restored.data_state)
            logging.info("%s: continues after step %d of %d", folder, start, steps)
        writer = metrics.open_writer(folder, step=start, is_main=is_main)
        resources.callback(writer.close)
        progress = metrics.open_progress(steps, start=start, is_main=is_main)
        resources.callback(progress.close)
        session = Session(
            claim,
            state,
            start,
            steps,
            config,
            metric,
            metrics.Timers({}),
            loader,
            checkpointer,
            writer,
            progress,
            stop,
            Standing(time.perf_counter(), good_step=start, saved_step=start),
        )
        try:
            yield session
        except BaseException as error:
            if jax.process_count() > 1 and not isinstance(error, Stopped):
                # Closing waits for the other processes, which may be waiting for this one.
                resources.pop_all()
            raise
