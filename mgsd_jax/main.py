"""The program: flags pick one stage, a config file and a workdir.

  python -m mgsd_jax.main --stage=grounding --config=configs/nano.py --workdir=runs/nano \
      --set grounding.optim.lr=1e-3

`--config=configs/qwen3vl.py:8b` gives an argument, such as the size of a model, to the config file.
Stages, in the order of a whole run:
  init          write a nano model with random weights (config.nano)
  generate      draw boards, write the train, val and test splits with a manifest
  grounding     stage 1: learn to read the state of a board off its picture
  distillation  stage 2: learn to plan from pictures, from the text-reading teacher
  evaluate      answer the test boards with every model of config.evaluate
  export        write a Hugging Face folder that transformers loads
  report        one HTML page: curves, tables, boards with the planned routes
  preflight     compile every program for a TPU slice that is not here: what fits, how fast
  score         score the rows of --input (JSON lines: rules, task, task_text, response)

Several processes (hosts of a slice, or several on one machine) run one program: on Cloud TPU, GKE
and Slurm they find each other, elsewhere each gets --coordinator, --processes and --process, or
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID. Exit codes are listed in BUILD.md.
"""

import errno
import logging as std_logging
import os
import pathlib
import runpy
import signal
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    # The imports take seconds, and nothing is begun: Ctrl-C just ends the process.
    signal.signal(signal.SIGINT, signal.SIG_DFL)

from absl import app, flags, logging

from mgsd_jax import config as config_lib
from mgsd_jax import preflight
from mgsd_jax.checks import ranges
from mgsd_jax.parallel import processes
from mgsd_jax.stages import distillation, evaluate, export, generate, grounding, init, report, score
from mgsd_jax.training import sessions
from mgsd_jax.workdir import compiled, paths

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

# The stages whose processes work together; each process runs the others for itself.
JOINT = ("grounding", "distillation", "evaluate")

_STAGE = flags.DEFINE_enum("stage", None, [*STAGES, "score"], "What to do.")
_CONFIG = flags.DEFINE_string(
    "config",
    None,
    "File with a get_config(), or a recipe such as nano; qwen3vl:8b adds an argument.",
)
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything that it writes.")
_SET = flags.DEFINE_multi_string("set", [], "Override one field: --set a.b=value. Repeatable.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Folder of prompt files; same as data.prompts.")
_PROFILE = flags.DEFINE_string(
    "profile", None, "Steps to trace, such as 5:8 (docs/profiling.md); same as metrics.profile."
)
_INPUT = flags.DEFINE_string("input", None, "score: the JSON lines file to read.")
_OUTPUT = flags.DEFINE_string("output", None, "score: where to write the scored rows.")
_COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Folder (or gs://) of compiled programs, or off; else JAX_COMPILATION_CACHE_DIR, "
    "~/.cache/mgsd_jax/compiled, or the folder compiled of a workdir that is remote.",
)
_COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, of several.")
_PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
_PROCESS = flags.DEFINE_integer("process", None, "Which of them this one is, from 0.")


def find_config(name: str) -> str:
    """The path of a config: `name` itself, or the recipe of that name in ./configs.

    A wheel carries ./configs inside the package, where a checkout has it beside the package.
    """
    package = pathlib.Path(__file__).parent
    found = (folder / "configs" / f"{name}.py" for folder in (package, package.parent))
    is_name = not pathlib.Path(name).exists() and pathlib.PurePath(name).name == name
    return next((str(path) for path in found if is_name and path.is_file()), name)


def load_config(path: str, assignments: Sequence[str]) -> config_lib.Config:
    """The checked config of `CONFIG` or `CONFIG:ARGUMENT`, with `--set` assignments applied.

    Raises ValueError, also for whatever the file itself raises.
    """
    file, arguments = find_config(path), []
    if not pathlib.Path(file).is_file():
        name, _, argument = path.rpartition(":")
        file, arguments = find_config(name), [argument]
    if not pathlib.Path(file).is_file():
        raise ValueError(f"--config: got {path!r}, want an existing Python file")
    try:
        get_config = runpy.run_path(file).get("get_config")
        config = None if get_config is None else get_config(*arguments)
    except (Exception, SystemExit) as error:  # the user's file may do anything
        raise ValueError(_config_error(path, file, error)) from error
    if get_config is None:
        raise ValueError(f"--config {path}: no get_config() found, want a function of that name")
    if not isinstance(config, config_lib.Config):
        kind = type(config).__name__
        raise ValueError(f"--config {path}: got {kind} from get_config(), want a Config")
    return config_lib.check(config_lib.override(config, assignments))


def _config_error(path: str, file: str, error: BaseException) -> str:
    """What a config file has raised, and in which of its lines."""
    steps = traceback.extract_tb(error.__traceback__)
    lines = [step.lineno for step in steps if step.filename == file]
    if isinstance(error, SyntaxError) and error.filename == file:
        lines = [error.lineno]
    where = f"--config {path}, line {lines[-1]}" if lines else f"--config {path}"
    said = " ".join(str(error).split())
    if isinstance(error, ValueError):  # it says itself what was got and wanted
        return f"{where}: {said}"
    return f"{where}: got {type(error).__name__}: {said}, want a Config"


def is_shown(record: std_logging.LogRecord) -> bool:
    """Log filter: hides what orbax logs unless --verbosity=1.

    Orbax logs about a dozen lines for every save, and a traceback for every thread of a save that
    fails; `checkpoint` says what failed.
    """
    return "orbax" not in record.pathname or logging.vlog_is_on(1)


def _hide_closed_loop(unraisable: Any) -> None:
    """Hides what tensorstore reports to orbax's closed event loop after a failed write."""
    if "Event loop is closed" not in str(unraisable.exc_value) or logging.vlog_is_on(1):
        sys.__unraisablehook__(unraisable)


def _required(flag: flags.FlagHolder[str | None]) -> str:
    if not flag.value:
        raise ValueError(f"--{flag.name} is required for --stage={_STAGE.value}")
    return flag.value


def parse_flags(argv: Sequence[str]) -> list[str]:
    """Returns the arguments that are not flags; exits with 0 after --help, 2 for a wrong flag."""
    try:
        return flags.FLAGS(argv)
    except flags.Error as error:
        sys.stderr.write(" ".join(str(error).split()) + "; see --help\n")
        sys.exit(2)
    except SystemExit:  # the help is printed; absl would end with 1
        sys.exit(0)


def main(argv: Sequence[str]) -> int:
    """Runs one stage; returns the exit code.

    0 done, 2 a bad input (one line on stderr says which), 3 numbers that are not finite, 74 a full
    disk, 75 stopped by SIGTERM or Ctrl-C; 1 with a traceback for anything else. Ctrl-C where
    there is no step to finish ends the process (130).
    """
    if signal.getsignal(signal.SIGINT) is signal.SIG_DFL:  # see the imports
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().addFilter(is_shown)
    sys.unraisablehook = _hide_closed_loop
    are_several = False
    try:
        if len(argv) > 1:
            raise ValueError(f"got stray arguments {list(argv[1:])}, want flags only")
        if _STAGE.value is None:
            raise ValueError(f"--stage is required, one of {[*STAGES, 'score']}")
        if _STAGE.value == "score":
            return score.run(_required(_INPUT), _OUTPUT.value)
        path, workdir = _required(_CONFIG), _required(_WORKDIR)
        prompts = [] if _PROMPTS.value is None else [f"data.prompts={_PROMPTS.value}"]
        profile = [] if _PROFILE.value is None else [f"metrics.profile={_PROFILE.value}"]
        config = load_config(path, [*_SET.value, *prompts, *profile])
        if profile and _STAGE.value not in JOINT:
            raise ValueError(f"--profile: got --stage={_STAGE.value}, want one of {[*JOINT]}")
        ranges.coerce(workdir, config_lib.Path, "--workdir")
        if _COMPILE_CACHE.value is not None:
            ranges.coerce(_COMPILE_CACHE.value, config_lib.Path, "--compile_cache")
        if _STAGE.value in JOINT:
            given = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
            are_several = processes.join(*processes.settings(given, os.environ))
        compiled.keep(_COMPILE_CACHE.value, workdir, os.environ)
        STAGES[_STAGE.value](config, str(paths.absolute(workdir)))
        return 0
    except sessions.Stopped as stopped:  # all processes together
        logging.error("%s", stopped)
        return stopped.exit_code
    except KeyboardInterrupt:
        logging.error("%s: stopped by Ctrl-C; the same command goes on from here", _STAGE.value)
        processes.leave_interrupted()
    except Exception as error:
        exit_code, line = explain(error, _WORKDIR.value)
        if exit_code == 1 and not are_several:
            raise
        logging.error("%s", line, exc_info=exit_code == 1 or logging.vlog_is_on(1))
        if are_several:
            processes.leave(error, exit_code)
        if exit_code == 74:  # threads with something left to write would fail, and say so, again
            processes.end(exit_code)
        return exit_code


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
    """The console script. absl takes the help from the started file, which is not this one."""
    sys.modules["__main__"].__doc__ = __doc__
    for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__]):
        flags.FLAGS.register_key_flag_for_module(sys.argv[0], flag)
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    entry()
