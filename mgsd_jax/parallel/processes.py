"""Several processes that run as one program: how they start, agree on values, and end.

Arrays travel between processes inside jitted programs. The functions here exchange the small things
that the hosts must agree on: shapes, metrics, and whether to stop. Every process must call them in
the same order, or it waits for the others forever.
"""

import contextlib
import json
import os
import re
import signal
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import jax
import numpy as np
from absl import logging
from jax.experimental import multihost_utils

LOST_AFTER: int = 30  # seconds without a heartbeat after which a process counts as lost
START_TIMEOUT = 300  # seconds that processes wait for all others to start
_FLAGS = ("--coordinator", "--processes", "--process")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# The runtime's messages begin like this. Ours never do: they begin with a field or a file.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_NUMBER = re.compile("[0-9]{1,6}")
Settings = tuple[str | None, int | None, int | None]  # coordinator, processes, process


def settings(given: Settings, environ: Mapping[str, str]) -> Settings:
    """(coordinator, number of processes, index of this one), or three times None.

    `given` are the values of the flags; without any, the variables of the environment count. Where
    the environment holds the address alone, jax reads it by itself, and None is returned. Raises
    ValueError where some of the three are missing, or a value is impossible.
    """
    names: Sequence[str] = _FLAGS
    values: list[Any] = list(given)
    if given == (None, None, None):
        names = _VARIABLES
        values = [environ.get(name) for name in names]
        if values[1:] == [None, None]:
            return None, None, None
    missing = [name for name, value in zip(names, values, strict=True) if value is None]
    if missing:
        got = [f"{n} {v}" for n, v in zip(names, values, strict=True) if v is not None]
        raise ValueError(f"got {' and '.join(got)} but no {', no '.join(missing)}; want all three")
    for i in (1, 2):
        if not _NUMBER.fullmatch(str(values[i])):
            raise ValueError(f"{names[i]}: got {values[i]!r}, want a whole number")
    coordinator, count, index = str(values[0]), int(values[1]), int(values[2])
    host, _, port = coordinator.rpartition(":")
    if not host or not _NUMBER.fullmatch(port) or not 0 < int(port) < 1 << 16:
        raise ValueError(f"{names[0]}: got {coordinator!r}, want host:port of process 0")
    if count < 1:
        raise ValueError(f"{names[1]}: got {count}, want at least 1")
    if index >= count:
        raise ValueError(f"{names[2]}: got {index} of {count} processes, want 0 to {count - 1}")
    return coordinator, count, index


def join(coordinator: str | None, count: int | None, index: int | None) -> bool:
    """Connects this process with the others of the run; returns whether there are others.

    Where the arguments are None, jax asks the cluster (Cloud TPU, GKE, Slurm); without a cluster
    the process runs alone. Call this before anything uses a device.
    """
    # We handle SIGTERM ourselves (`signals.asked_to_stop`); jax's service would take it from us.
    jax.config.update("jax_enable_preemption_service", False)
    try:
        jax.distributed.initialize(
            coordinator,
            count,
            index,
            cluster_detection_method=None if coordinator is None else "deactivate",
            initialization_timeout=START_TIMEOUT,
            heartbeat_timeout_seconds=LOST_AFTER,
            shutdown_timeout_seconds=LOST_AFTER,
        )
    except ValueError as error:
        if coordinator is None and "coordinator_address" in str(error):
            return False
        raise
    except jax.errors.JaxRuntimeError as error:
        if "RPC server" not in str(error):
            raise
        raise ValueError(
            f"{coordinator}: got a port that cannot be opened here, want a free one of this host "
            "(another run may have it)"
        ) from error
    logging.info("process %d of %d", jax.process_index(), jax.process_count())
    return jax.process_count() > 1


def gather(value: Any) -> list[Any]:
    """The values of all processes, in their order; a value is anything that JSON can hold.

    It returns when all processes have called it, so it also serves as a barrier.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    # Padded to a power of two, because each size is a program of its own to compile.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def largest(numbers: Sequence[int]) -> tuple[int, ...]:
    """For each place in `numbers`, the largest number that any process has there.

    All processes pass the same count of numbers.
    """
    if jax.process_count() == 1:
        return tuple(numbers)
    rows = np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32)))
    return tuple(int(number) for number in rows.max(axis=0))


def is_runtime_error(error: BaseException) -> bool:
    """Whether jax's runtime failed, as when a collective breaks, and not our code or its input.

    The type of the error alone does not tell: fetching the result of a broken collective raises a
    ValueError, and a checkpoint that waited for a lost process raises orbax's TimeoutError, caused
    by the runtime's.
    """
    if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
        return True
    return (
        isinstance(error, TimeoutError)
        and error.__cause__ is not None
        and is_runtime_error(error.__cause__)
    )


def leave(error: BaseException, exit_code: int) -> NoReturn:
    """Ends this process of several after an error, without waiting for the others.

    A normal exit would wait for all processes, while they wait for this one. If the error is a
    failed collective, another process was probably lost first. Then we wait: within LOST_AFTER
    seconds jax's service in process 0 names the lost process and ends this one with SIGABRT. If
    process 0 itself is lost, the broken connection to it does the same.
    """
    where = f"process {jax.process_index()} of {jax.process_count()}"
    if is_runtime_error(error):
        logging.error("%s: %s", where, str(error).partition("\n")[0])
        logging.error("%s: waiting to hear which process (task) was lost", where)
        time.sleep(LOST_AFTER + 5)
    logging.error("%s: leaves with exit code %d", where, exit_code)
    end(exit_code)


def end(exit_code: int) -> NoReturn:
    """Ends this process at once; threads that still run are cut off."""
    _flush()
    os._exit(exit_code)


def leave_interrupted() -> NoReturn:
    """Ends this process at once by SIGINT, for which a shell reports exit code 130."""
    _flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    os._exit(128 + signal.SIGINT)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # for example a log file on a full disk
            stream.flush()
