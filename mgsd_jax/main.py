"""The program: flags pick one stage, a config file and a workdir; see command_line.py and --help.

python -m mgsd_jax.main --stage=grounding --config=configs/nano.py --workdir=runs/nano
"""

import errno
import functools
import gc
import os
import shlex
import signal
import sys
from collections.abc import Callable, Sequence

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and nothing is begun: Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from mgsd_jax import command_line

if __name__ == "__main__":
    CHECKED = command_line.answer_first(sys.argv)  # --help and its like, before imports of seconds
    gc.disable()  # what imports make is no garbage; looking for some is a sixth of their time
else:
    CHECKED = None

import jax
from absl import app, flags, logging

from mgsd_jax import config as config_lib
from mgsd_jax import preflight
from mgsd_jax.command_line import parse_flags
from mgsd_jax.parallel import processes
from mgsd_jax.stages import (
    ask,
    distillation,
    evaluate,
    export,
    generate,
    grounding,
    init,
    report,
    score,
)
from mgsd_jax.training import sessions
from mgsd_jax.workdir import compiled, log, paths

STAGES: dict[str, Callable[[config_lib.Config, str], None]] = {
    "init": init.run,
    "generate": generate.run,
    "grounding": grounding.run,
    "distillation": distillation.run,
    "evaluate": evaluate.run,
    "export": export.run,
    "report": report.run,
    "preflight": preflight.run,
}

# What comes after a stage; after the report there is a page to open.
NEXT = {
    "init": "generate",
    "generate": "grounding",
    "grounding": "distillation",
    "distillation": "evaluate",
    "evaluate": "export",
    "export": "report",
    "preflight": "generate",
}


def next_line(stage: str, words: Sequence[str]) -> str:
    """What to do after a stage that was started with these words."""
    if stage == "report":
        return "next: open this page in a browser"
    others, left = [f"--stage={NEXT[stage]}"], iter(words)
    for word in left:
        if word.lstrip("-") == "stage":
            next(left)
        elif not word.lstrip("-").startswith("stage="):
            others.append(word)
    return f"next: {command_line.program()} {shlex.join(others)}"


def main(argv: Sequence[str], config: config_lib.Config | None = None) -> int:
    """Runs one stage, by the config where the flags are checked already; returns the exit code.

    0 done, 2 a bad input (one line on stderr says which), 3 numbers that are not finite, 74 a full
    disk, 75 stopped by SIGTERM or Ctrl-C; 1 with a traceback for anything else. Ctrl-C where
    there is no step to finish ends the process (130).
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    log.set_up()
    stage, are_several = command_line.STAGE.value, False
    try:
        config = config or command_line.checked(argv)
        if stage == "score":
            return score.run(command_line.required(command_line.INPUT), command_line.OUTPUT.value)
        compile_cache = command_line.COMPILE_CACHE.value
        if stage == "ask":
            return _ask(config, compile_cache)
        assert stage is not None and config is not None
        workdir = command_line.required(command_line.WORKDIR)
        if stage in command_line.JOINT:
            given = (
                command_line.COORDINATOR.value,
                command_line.PROCESSES.value,
                command_line.PROCESS.value,
            )
            are_several = processes.join(*processes.settings(given, os.environ))
        compiled.keep(compile_cache, workdir, os.environ)
        with log.compilations_told():
            STAGES[stage](config, str(paths.absolute(workdir)))
        if not are_several or jax.process_index() == 0:
            logging.info("%s", next_line(stage, sys.argv[1:]))
        return 0
    except sessions.Stopped as stopped:  # all processes together
        logging.error("%s", stopped)
        return stopped.exit_code
    except KeyboardInterrupt:
        logging.error("%s: stopped by Ctrl-C; the same command goes on from here", stage)
        processes.leave_interrupted()
    except Exception as error:
        exit_code, line = explain(error, command_line.WORKDIR.value)
        if exit_code == 1 and not are_several:
            raise
        logging.error("%s", line, exc_info=exit_code == 1 or logging.vlog_is_on(1))
        if are_several:
            processes.leave(error, exit_code)
        if exit_code == 74:  # threads with something left to write would fail, and say so, again
            processes.end(exit_code)
        return exit_code


def _ask(config: config_lib.Config | None, compile_cache: str | None) -> int:
    """Asks a model about a picture, by the config of its training unless another one is given."""
    picture, workdir = command_line.required(command_line.INPUT), command_line.WORKDIR.value or ""
    if workdir:
        workdir = str(paths.absolute(workdir))
    if config is None:
        config = ask.find_config(command_line.assignments(), workdir)
    compiled.keep(compile_cache, workdir, os.environ)
    with log.compilations_told():
        ask.run(config, workdir, picture, command_line.OUTPUT.value)
    return 0


# Errors of the system about a path that trying again does not help, with what is wanted instead.
_PATHS = {
    errno.EACCES: "one that may be read, or written where it is an output",
    errno.EPERM: "one that may be changed",
    errno.EROFS: "one that can be written",
    errno.ENOENT: "one that exists",
    errno.EEXIST: "one that is free, or a folder",
    errno.ENOTDIR: "folders on the way to it",
    errno.EISDIR: "a file",
    errno.ENAMETOOLONG: "a shorter one",
    errno.ELOOP: "one whose links lead somewhere",
}
_FULL = (errno.ENOSPC, errno.EDQUOT)


def explain(error: Exception, workdir: str | None = None) -> tuple[int, str]:
    """The exit code of an error, and the line to log.

    2 for a bad input, 74 (EX_IOERR) for a full disk, 1 for anything else.
    """
    line = str(error)
    number, path = None, getattr(error, "filename", None)
    if isinstance(error, OSError):
        number = error.errno
    # Libraries in Rust and C++ raise other errors, with the system's words in them.
    if number in _FULL or any(os.strerror(full) in line for full in _FULL):
        if path is None:
            where = f" in {workdir}" if workdir else ""
            line = f"no space left{where}: {line}; the same command goes on when there is some"
        return 74, line
    if number in _PATHS and path is not None:
        said = os.strerror(number).lower()
        return 2, f"{path}: got {said!r} from the system, want {_PATHS[number]}"
    cause = error.__cause__ or error
    if isinstance(cause, ImportError) and cause.name == "gcsfs":
        return 2, "gs:// paths need the package gcsfs: pip install 'mgsd_jax[gcs]'"
    is_input = isinstance(error, ValueError) and not processes.is_runtime_error(error)
    return (2 if is_input else 1), line


def entry() -> None:
    """Runs the program. What the imports made is never looked through for garbage again."""
    gc.freeze()
    gc.enable()
    app.run(functools.partial(main, config=CHECKED), flags_parser=parse_flags)


if __name__ == "__main__":
    entry()
