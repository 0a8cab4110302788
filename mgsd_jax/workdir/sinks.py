"""Where the metrics of a run are shown: TensorBoard, Weights & Biases, Trackio (`metrics.sinks`).

A sink gets numbers, pictures and the config. `metrics.jsonl` holds every number whatever the sinks
do, so a tracker that fails is let go with a warning and does not end the run. Trackers are extras
(`pip install 'mgsd_jax[wandb]'`); they read their keys and modes (`WANDB_MODE=offline`) from the
environment as they do elsewhere.
"""

import concurrent.futures
import dataclasses
import json
import pathlib
import threading
import uuid
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
import tensorboardX
from absl import logging
from etils import epath, epy

from mgsd_jax.checks import fields
from mgsd_jax.checks.fields import Json
from mgsd_jax.config import MetricsConfig
from mgsd_jax.workdir import paths

with epy.lazy_imports():  # each takes a second or more, and is used by few runs
    import trackio
    import wandb

TENSORBOARD_FOLDER = "tensorboard"
TRACKERS = ("wandb", "trackio")
CLOSE_SECONDS = 60.0
RUN_FILE = "tracked.json"  # {"id": ...}: a run that is resumed goes on in the same tracked run


class Picture(NamedTuple):
    """A picture to show, in the place of the one that had its name at an earlier step."""

    name: str
    pixels: np.ndarray  # [H, W, 3] uint8
    caption: str


@dataclasses.dataclass(frozen=True)
class Run:
    """The run that a sink shows."""

    folder: pathlib.Path  # on this machine
    step: int  # the steps after it are written
    project: str
    name: str
    id: str
    config: Json


@dataclasses.dataclass(frozen=True)
class Sink:
    """An opened sink."""

    name: str
    numbers: Callable[[int, Mapping[str, float]], None]
    pictures: Callable[[int, Sequence[Picture]], None]
    close: Callable[[], None]


def check(settings: MetricsConfig) -> None:
    """Raises ValueError where the package of a sink is not installed."""
    for name, module in (("wandb", wandb), ("trackio", trackio)):
        if name not in settings.sinks:
            continue
        try:
            _ = module.init
        except ImportError:
            raise ValueError(
                f"metrics.sinks: package {name} not found; pip install 'mgsd_jax[{name}]'"
            ) from None


def open_sinks(settings: MetricsConfig, run: Run) -> list[Sink]:
    """The sinks of `metrics.sinks`, but for trackers that cannot be opened now."""
    opened: list[Sink] = []
    for name in settings.sinks:
        try:
            opened.append(OPENERS[name](run))
        except Exception as error:  # of a tracker's own kinds; see `tell`
            if name == "tensorboard":
                raise
            _warn(name, error)
    return opened


def tell(sinks: list[Sink], action: Callable[[Sink], None]) -> None:
    """Does something with every sink; a tracker that fails is dropped from `sinks`."""
    for sink in list(sinks):
        try:
            action(sink)
        except Exception as error:  # a network, a full quota: nothing that a run should end by
            if sink.name == "tensorboard":
                raise
            sinks.remove(sink)
            _warn(sink.name, error)


def close(sink: Sink) -> None:
    """Closes a sink; a tracker gets `CLOSE_SECONDS` to send what it still has.

    Raises what closing raised, and TimeoutError.
    """
    if sink.name == "tensorboard":
        sink.close()
        return
    closing = concurrent.futures.Future[None]()

    def work() -> None:
        try:
            closing.set_result(sink.close())
        except Exception as error:
            closing.set_exception(error)

    # A daemon: an upload that never ends must not keep the process.
    threading.Thread(target=work, daemon=True).start()
    try:
        closing.result(CLOSE_SECONDS)
    except TimeoutError:
        raise TimeoutError(f"not all was sent within {CLOSE_SECONDS:g} s of the end") from None


def _warn(name: str, error: Exception) -> None:
    said = " ".join(str(error).split()).rstrip(".") or type(error).__name__
    logging.warning("metrics.sinks: %s: %s; the run goes on without it", name, said)


def run_id(folder: epath.PathLike, step: int, sinks: Sequence[str]) -> str:
    """The name of the run at a tracker: a new one at step 0, afterwards the one in `RUN_FILE`.

    Without a tracker among the sinks there is no name, and no file.
    """
    if not {*TRACKERS} & {*sinks}:
        return ""
    path = epath.Path(folder) / RUN_FILE
    if step > 0 and path.is_file():
        return fields.field(fields.read_json(path), "id", str, path)
    name = uuid.uuid4().hex[:8]
    paths.write_whole(path, json.dumps({"id": name}) + "\n")
    return name


def _tensorboard(run: Run) -> Sink:
    """Event files. They also get the config, and the caption of a picture, as text."""
    events = tensorboardX.SummaryWriter(
        str(run.folder / TENSORBOARD_FOLDER), purge_step=run.step + 1 if run.step > 0 else 0
    )
    if run.config:
        events.add_text("config", f"```\n{json.dumps(run.config, indent=2)}\n```", run.step)

    def numbers(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            events.add_scalar(name, value, step)

    def pictures(step: int, shown: Sequence[Picture]) -> None:
        for picture in shown:
            events.add_image(picture.name, picture.pixels, step, dataformats="HWC")
            events.add_text(picture.name, f"```\n{picture.caption}\n```", step)

    return Sink("tensorboard", numbers, pictures, events.close)


def _wandb(run: Run) -> Sink:
    """Weights & Biases; its files lie in `wandb/` of the stage's folder."""
    opened = wandb.init(
        project=run.project,
        name=run.name,
        id=run.id,
        resume="allow",
        config=run.config,
        dir=str(run.folder),
        settings=wandb.Settings(quiet=True),  # no table of all metrics on the terminal at the end
    )
    # Its own count of steps cannot go back, and a resumed run repeats the steps since its last
    # checkpoint: they land on the same places of this axis, with the same values.
    opened.define_metric("*", step_metric="step")

    def pictures(step: int, shown: Sequence[Picture]) -> None:
        images = {one.name: wandb.Image(one.pixels, caption=one.caption) for one in shown}
        opened.log({"step": step, **images})

    return Sink(
        "wandb",
        lambda step, values: opened.log({"step": step, **values}),
        pictures,
        opened.finish,
    )


def _trackio(run: Run) -> Sink:
    """Trackio; it resumes by the name of a run."""
    opened = trackio.init(
        project=run.project,
        name=f"{run.name}-{run.id}",
        config=run.config,
        resume="allow",
        embed=False,
    )

    def pictures(step: int, shown: Sequence[Picture]) -> None:
        images = {one.name: trackio.Image(one.pixels, caption=one.caption) for one in shown}
        opened.log(images, step=step)

    return Sink(
        "trackio", lambda step, values: opened.log(dict(values), step=step), pictures, opened.finish
    )


OPENERS: dict[str, Callable[[Run], Sink]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "trackio": _trackio,
}
