"""Several processes as one program: how they join, and the little that they tell each other.

Arrays cross between processes inside jitted programs. Here is what the hosts themselves have to
agree on: shapes, metrics, and whether to stop. All of them call these functions in the same order.
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

LOST_AFTER = 30  # seconds without a word from a process, after which the others end
START_TIMEOUT = 300  # seconds that the first process waits for the last to come up
_FLAGS = ("--coordinator", "--processes", "--process")
_VARIABLES = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
# How the messages of the runtime begin; ours name a field or a file.
_STATUS = re.compile(r"(UNKNOWN|INTERNAL|UNAVAILABLE|ABORTED|CANCELLED|DEADLINE_EXCEEDED): ")
_NUMBER = re.compile("[0-9]{1,6}")
Settings = tuple[str | None, int | None, int | None]  # coordinator, processes, process


def settings(given: Settings, environ: Mapping[str, str]) -> Settings:
    """What the flags give, else the environment: (coordinator, processes, process), or all None.

    The address alone in the environment is jax's own setting, and is left to it. Raises ValueError
    for settings that are half given or make no sense.
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
    """Joins the processes of a run and returns whether there are several.

    With None jax asks the cluster (Cloud TPU, GKE, Slurm), and where there is none the process is
    on its own. Comes before anything touches a device.
    """
    # SIGTERM is ours (`signals.asked_to_stop`); jax's own service would take the signal.
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
    """The JSON value of every process, in the order of the processes; a barrier, too."""
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = np.ravel(multihost_utils.process_allgather(np.int32(text.size)))
    # A power of two: another size would be another program to compile.
    padded = np.zeros(1 << int(sizes.max()).bit_length(), np.uint8)
    padded[: text.size] = text
    rows = np.asarray(multihost_utils.process_allgather(padded))
    return [json.loads(bytes(row[:size])) for row, size in zip(rows, sizes, strict=True)]


def largest(numbers: Sequence[int]) -> tuple[int, ...]:
    """Each number's largest value over the processes, which hold as many each."""
    if jax.process_count() == 1:
        return tuple(numbers)
    rows = np.asarray(multihost_utils.process_allgather(np.asarray(numbers, np.int32)))
    return tuple(int(number) for number in rows.max(axis=0))


def is_runtime_error(error: BaseException) -> bool:
    """Whether the runtime failed (a collective broke), rather than our code or its input.

    Where an array is fetched that a broken collective should have made, jax raises a ValueError;
    where a checkpoint waits for a lost process, orbax raises a TimeoutError from the runtime's.
    """
    if isinstance(error, jax.errors.JaxRuntimeError) or _STATUS.match(str(error)):
        return True
    return (
        isinstance(error, TimeoutError)
        and error.__cause__ is not None
        and is_runtime_error(error.__cause__)
    )


def leave(error: BaseException, exit_code: int) -> NoReturn:
    """Ends this process of several after an error, such that no other waits for it in vain.

    The normal way out waits for all processes, and those are waiting for this one. Where another
    process was lost first, a collective fails here; then the service of process 0 (or, where that
    one is lost, the link to it) says so within LOST_AFTER seconds and ends this process, SIGABRT.
    """
    where = f"process {jax.process_index()} of {jax.process_count()}"
    if is_runtime_error(error):
        logging.error("%s: %s", where, str(error).partition("\n")[0])
        logging.error("%s: waiting to hear which process (task) was lost", where)
        time.sleep(LOST_AFTER + 5)
    logging.error("%s: leaves with exit code %d", where, exit_code)
    end(exit_code)


def end(exit_code: int) -> NoReturn:
    """Ends this process now: no thread is waited for, and none gets to say more."""
    _flush()
    os._exit(exit_code)


def leave_interrupted() -> NoReturn:
    """Ends this process by SIGINT, as a shell wants to see it (130), and waits for no thread."""
    _flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    signal.raise_signal(signal.SIGINT)
    os._exit(128 + signal.SIGINT)


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError):  # into a file on a full disk, say
            stream.flush()
