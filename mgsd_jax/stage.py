"""What the two training stages share: their boards, their folder, and the end of every step."""

import contextlib
import dataclasses
import pathlib
import time
from collections import deque
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast

import grain
import jax
from absl import logging

from mgsd_jax import checkpoint, metrics
from mgsd_jax import config as config_lib
from mgsd_jax import prompts as prompts_lib
from mgsd_jax.batch import Inputs
from mgsd_jax.config import CheckpointConfig, Config
from mgsd_jax.data.boards import Board, read_split
from mgsd_jax.data.processor import Processor
from mgsd_jax.data.sources import Encoder, StreamedBoards
from mgsd_jax.envs.benchmarks import benchmark_keys
from mgsd_jax.envs.splits import Split
from mgsd_jax.model.flops import peak_flops
from mgsd_jax.optimizer import TrainState

# M-RoPE positions are [3, B, T]; everything else has the batch first.
FIRST: Any = 0
INPUT_AXES = Inputs(tokens=0, positions=1, valid=0, next_position=0, pictures=FIRST)
_STREAM_LENGTH = 1 << 24  # boards in one pass over a stream


def boards(config: Config, workdir: str, split: Split) -> Sequence[Board]:
    """The boards of a split: read from `data.folder`, or drawn on the fly."""
    data = config.data
    if data.source == "folder":
        return read_split(config_lib.resolve(data.folder, config, workdir), split)
    excluded = benchmark_keys([config_lib.resolve(f, config, workdir) for f in data.exclude])
    levels = tuple((kind.task, level) for kind in data.boards for level in kind.levels)
    return cast(
        Sequence[Board], StreamedBoards(levels, split, config.seed, excluded, _STREAM_LENGTH)
    )


def encoder(config: Config, processor: Processor) -> Encoder:
    """How this run turns boards into tokens."""
    prompts = prompts_lib.load(config.data.prompts)
    return Encoder(processor, prompts, config.data)


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something done every `every` steps, and at the end, is done after `step` steps."""
    return step == steps or (every > 0 and step % every == 0)


def claim(folder: pathlib.Path, config: Config, sections: Sequence[str]) -> None:
    """Makes `folder` this run's: refuses one that another config has used.

    `sections` are the parts of the config that the stage depends on. Raises ValueError that lists
    the differing fields.
    """
    values = {name: value for name, value in config_lib.to_dict(config).items() if name in sections}
    checkpoint.check_config(folder, values)
    metrics.write_run_info(folder, values, is_main=jax.process_index() == 0)


def speed(flops: float, tokens: int, seconds: float) -> dict[str, float]:
    """Tokens and model FLOPs a second of an update, and MFU where the device's peak is known."""
    measured = {"tokens_per_s/update": tokens / seconds, "tflops_per_s": flops / seconds / 1e12}
    peak = peak_flops()
    return measured if peak is None else measured | {"mfu": flops / seconds / peak}


@dataclasses.dataclass(frozen=True)
class Session:
    """An opened training run: where it stands, and what every step reports to."""

    state: TrainState
    start: int
    steps: int
    settings: CheckpointConfig
    metric: str
    timers: metrics.Timers
    loader: grain.DatasetIterator
    checkpointer: checkpoint.Checkpointer
    writer: metrics.Writer
    progress: metrics.Progress
    last: deque[tuple[float, dict[str, float]]]  # (when the last step ended, its metrics)

    def finish_step(self, step: int, state: TrainState, measured: dict[str, Any]) -> None:
        """Reports the metrics of update `step`, a Mean or a scalar each, and saves if it is due."""
        values = metrics.means_to_floats(jax.device_get(measured))
        now = time.perf_counter()
        seconds = now - self.last[0][0]
        self.last.append((now, values))
        values |= {"seconds": seconds, **self.timers.take()}
        self.writer.write(step, values)
        self.progress.update(step, values["loss"], seconds)
        if is_due(step, self.settings.every, self.steps):
            checkpoint.save(
                self.checkpointer,
                step,
                state,
                data_state=self.loader.get_state(),
                meta={"metric": self.metric},
                metrics={self.metric: values[self.metric]} if self.metric in values else None,
            )


@contextlib.contextmanager
def opened(
    folder: pathlib.Path,
    config: Config,
    state: TrainState,
    loader: grain.DatasetIterator,
    *,
    metric: str,
    best_mode: Literal["max", "min"],
    steps: int,
) -> Iterator[Session]:
    """A session that continues from the last readable checkpoint of `folder`, if there is one.

    `metric` is the validation metric that the best checkpoint is kept by. On leaving, a save under
    way is waited for.
    """
    is_main = jax.process_index() == 0
    checkpointer = checkpoint.open_checkpointer(
        folder / "checkpoints",
        keep_last=config.checkpoint.keep_last,
        keep_best=config.checkpoint.keep_best,
        metric=metric,
        best_mode=best_mode,
    )
    start = 0
    restored = checkpoint.restore_latest(checkpointer, state)
    if restored is not None:
        start, state = restored.step, restored.state
        loader.set_state(restored.data_state)
        logging.info("%s: continues after step %d of %d", folder, start, steps)
    writer = metrics.open_writer(folder, step=start, is_main=is_main)
    progress = metrics.open_progress(steps, start=start, is_main=is_main)
    last = deque([(time.perf_counter(), {})], maxlen=1)
    try:
        yield Session(
            state,
            start,
            steps,
            config.checkpoint,
            metric,
            metrics.Timers({}),
            loader,
            checkpointer,
            writer,
            progress,
            last,
        )
    finally:
        progress.close()
        writer.close()
        checkpoint.close(checkpointer)
