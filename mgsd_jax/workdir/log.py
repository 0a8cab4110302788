"""What a run says: short lines with the time, above the progress bar, and none of libraries.

`--verbosity=1` has all: every line of every library, in absl's own form.
"""

import contextlib
import glob
import importlib.util
import logging as std_logging
import pathlib
import sys
import threading
import time
import types
from collections.abc import Generator, Mapping
from typing import Any

import jax
import tqdm
from absl import logging
from jax import monitoring

PACKAGE = str(pathlib.Path(__file__).parents[1])
# Where an accelerator shows itself: TPUs, NVIDIA's GPUs, AMD's, and GPUs seen from Windows' Linux.
_DEVICES = ("/dev/accel*", "/dev/vfio/[0-9]*", "/dev/nvidia*", "/dev/kfd", "/dev/dxg")
_VENDORS = "/sys/bus/pci/devices/*/vendor"
_COMPILE = "/jax/core/compile/backend_compile_duration"
_SLOW = 2.0  # seconds; a compilation that takes less is not told


class _Lines(std_logging.Formatter):
    """'13:51:56 warning: text'; a line of the usual level has no word for it."""

    def format(self, record: std_logging.LogRecord) -> str:
        at = time.strftime("%H:%M:%S", time.localtime(record.created))
        level = "" if record.levelno == std_logging.INFO else f"{record.levelname.lower()}: "
        return f"{at} {level}{super().format(record)}"


def set_up() -> None:
    """Makes the log of this process as the module says."""
    handler = logging.get_absl_handler()
    if is_shown not in handler.filters:
        handler.addFilter(is_shown)
    if not logging.vlog_is_on(1):
        handler.setFormatter(_Lines())
    to_stderr: Any = handler.python_handler
    if to_stderr.stream is sys.stderr:  # and not a file of --log_dir
        # tqdm takes the bar away, writes, and draws it again.
        to_stderr.stream = types.SimpleNamespace(
            write=lambda text: tqdm.tqdm.write(text, file=sys.stderr, end=""),
            flush=lambda: sys.stderr.flush(),
            close=lambda: None,
        )
    sys.unraisablehook = _hide_closed_loop
    jax.config.update("jax_platforms", platforms(jax.config.values["jax_platforms"]))


def platforms(given: str | None) -> str | None:
    """What JAX is to try: the CPU alone where libtpu is installed and there is no accelerator.

    libtpu would look for a TPU and complain that there is none. Else it is what was given; any
    PCI device of Google's counts as an accelerator.
    """
    has_device = any(glob.glob(device) for device in _DEVICES) or any(
        pathlib.Path(vendor).read_text().strip() == "0x1ae0" for vendor in glob.glob(_VENDORS)
    )
    return given if given or has_device or not importlib.util.find_spec("libtpu") else "cpu"


def is_shown(record: std_logging.LogRecord) -> bool:
    """Log filter: hides what libraries say, but for their warnings, unless --verbosity=1.

    Orbax is hidden whatever it says: it logs a traceback for every thread of a save that fails;
    `checkpoint` says what failed.
    """
    if logging.vlog_is_on(1):
        return True
    is_ours = record.pathname.startswith(PACKAGE) or "-packages" not in record.pathname
    return "orbax" not in record.pathname and (is_ours or record.levelno >= std_logging.WARNING)


def _hide_closed_loop(unraisable: Any) -> None:
    """Hides what tensorstore reports to orbax's closed event loop after a failed write."""
    if "Event loop is closed" not in str(unraisable.exc_value) or logging.vlog_is_on(1):
        sys.__unraisablehook__(unraisable)


def _plain(told: Mapping[str, str | int]) -> str:
    """The name of a program as the sources have it: 'prefill' for 'jit(_prefill)'."""
    return str(told.get("fun_name", "a program")).removeprefix("jit(").removesuffix(")").lstrip("_")


@contextlib.contextmanager
def compilations_told() -> Generator[None]:
    """Logs a line for each program that compiles for long, and one when it is compiled."""
    under_way: dict[int, tuple[threading.Timer, threading.Event]] = {}  # by thread

    def begin(event: str, value: float, **more: str | int) -> None:
        if event != _COMPILE:
            return
        told = threading.Event()

        def tell() -> None:
            told.set()
            logging.info("compiling %s ...", _plain(more))

        timer = threading.Timer(_SLOW, tell)
        timer.daemon = True
        timer.start()
        under_way[threading.get_ident()] = timer, told

    def end(event: str, duration_secs: float, **more: str | int) -> None:
        if event != _COMPILE or threading.get_ident() not in under_way:
            return
        timer, told = under_way.pop(threading.get_ident())
        timer.cancel()
        if told.is_set():
            logging.info("compiled %s in %.0f s", _plain(more), duration_secs)

    monitoring.register_scalar_listener(begin)
    monitoring.register_event_duration_secs_listener(end)
    try:
        yield
    finally:
        monitoring.unregister_scalar_listener(begin)
        monitoring.unregister_event_duration_listener(end)
