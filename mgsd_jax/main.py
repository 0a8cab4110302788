"""The program: flags pick one stage, a config file and a workdir.

  python -m mgsd_jax.main --stage=grounding --config=configs/nano.py --workdir=runs/nano \
      --set grounding.optim.lr=1e-3

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
from mgsd_jax import preflight, report
from mgsd_jax.checks import ranges
from mgsd_jax.parallel import processes
from mgsd_jax.stages import distillation, evaluate, export, generate, grounding, init, score
from mgsd_jax.training import sessions
from mgsd_jax.workdir import paths

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
_CONFIG = flags.DEFINE_string("config", None, "File with a get_config(), or a recipe such as nano.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything that it writes.")
_SET = flags.DEFINE_multi_string("set", [], "Override one field: --set a.b=value. Repeatable.")
_PROMPTS = flags.DEFINE_string("prompts", None, "Folder of prompt files; same as data.prompts.")
_INPUT = flags.DEFINE_string("input", None, "score: the JSON lines file to read.")
_OUTPUT = flags.DEFINE_string("output", None, "score: where to write the scored rows.")
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
    """The checked config of a file, with `--set` assignments applied; raises ValueError."""
    path = find_config(path)
    if not pathlib.Path(path).is_file():
        raise ValueError(f"--config: got {path!r}, want an existing Python file")
    try:
        get_config = runpy.run_path(path).get("get_config")
        config = None if get_config is None else get_config()
    # A file of the user's: it may do anything, and whatever it does is the file's.
    except (Exception, SystemExit) as error:
        steps = traceback.extract_tb(error.__traceback__)
        lines = [step.lineno for step in steps if step.filename == path]
        if isinstance(error, SyntaxError) and error.filename == path:
            lines = [error.lineno]
        line = f", line {lines[-1]}" if lines else ""
        found = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"--config {path}{line}: got {found}, want a Config") from error
    if get_config is None:
        raise ValueError(f"--config {path}: got no get_config(), want a function of that name")
    if not isinstance(config, config_lib.Config):
        raise ValueError(
            f"--config {path}: got {type(config).__name__} from get_config(), want a Config"
        )
    return config_lib.check(config_lib.override(config, assignments))


def is_shown(record: std_logging.LogRecord) -> bool:
    """Whether the log has this line. Those of orbax are for --verbosity=1.

    It tells a dozen of every save, and of one that fails a traceback a thread; `checkpoint` says
    what failed.
    """
    return "orbax" not in record.pathname or logging.vlog_is_on(1)


def _hear_unraisable(unraisable: Any) -> None:
    """After a failed write tensorstore tells of the others to a loop that orbax has closed."""
    if "Event loop is closed" not in str(unraisable.exc_value) or logging.vlog_is_on(1):
        sys.__unraisablehook__(unraisable)


def _wanted(name: str, value: str | None) -> str:
    if not value:
        raise ValueError(f"--{name}: got nothing, want it for --stage={_STAGE.value}")
    return value


def parse_flags(argv: Sequence[str]) -> list[str]:
    """The arguments that are no flags. Help ends with 0, a wrong flag with 2 and one line."""
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
    sys.unraisablehook = _hear_unraisable
    are_several = False
    try:
        if len(argv) > 1:
            raise ValueError(f"got stray arguments {list(argv[1:])}, want flags only")
        if _STAGE.value is None:
            raise ValueError(f"--stage: got nothing, want one of {[*STAGES, 'score']}")
        if _STAGE.value == "score":
            if not _INPUT.value:
                raise ValueError("--input: got nothing, want a JSON lines file to score")
            return score.run(_INPUT.value, _OUTPUT.value)
        path, workdir = (_wanted(flag.name, flag.value) for flag in (_CONFIG, _WORKDIR))
        prompts = [] if _PROMPTS.value is None else [f"data.prompts={_PROMPTS.value}"]
        config = load_config(path, [*_SET.value, *prompts])
        ranges.coerce(workdir, config_lib.Path, "--workdir")
        if _STAGE.value in JOINT:
            given = (_COORDINATOR.value, _PROCESSES.value, _PROCESS.value)
            are_several = processes.join(*processes.settings(given, os.environ))
        STAGES[_STAGE.value](config, str(paths.absolute(workdir)))
        return 0
    except sessions.Stopped as stopped:  # all processes together
        logging.error("%s", stopped)
        return stopped.exit_code
    except KeyboardInterrupt:
        logging.error("%s: stopped by Ctrl-C; the same command goes on from here", _STAGE.value)
        processes.leave_interrupted()
    except Exception as error:
        exit_code = _exit_code(error)
        if exit_code == 1 and not are_several:
            raise
        logging.error("%s", _line(error), exc_info=exit_code == 1 or logging.vlog_is_on(1))
        if are_several:
            processes.leave(error, exit_code)
        if exit_code == 74:  # whoever has something left to write would fail again, and say so
            processes.end(exit_code)
        return exit_code


# What the system says of a path that no other try would mend, and what is wanted instead.
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
_SAID_FULL = tuple(os.strerror(number) for number in _FULL)  # by what is no OSError: Rust, C++


def _is_full(error: BaseException) -> bool:
    if isinstance(error, OSError) and error.errno in _FULL:
        return True
    return any(said in str(error) for said in _SAID_FULL)


def _is_about_a_path(error: BaseException) -> bool:
    return isinstance(error, OSError) and error.errno in _PATHS and error.filename is not None


def _lacks_gcsfs(error: BaseException) -> bool:
    cause = error.__cause__ or error
    return isinstance(cause, ImportError) and cause.name == "gcsfs"


def _line(error: Exception) -> str:
    """What an error says; where it is the system's about a path, in the words of our own."""
    if isinstance(error, OSError) and _is_about_a_path(error):
        said = str(error.strerror).lower()
        return f"{error.filename}: got {said!r} from the system, want {_PATHS[error.errno or 0]}"
    if _lacks_gcsfs(error):
        return "got a gs:// path and no package gcsfs, want it: pip install 'mgsd_jax[gcs]'"
    if _is_full(error) and getattr(error, "filename", None) is None:
        where = f" in {_WORKDIR.value}" if _WORKDIR.value else ""
        return f"no space left{where}: {error}; the same command goes on when there is some"
    return str(error)


def _exit_code(error: Exception) -> int:
    """2 for a bad input, 74 (EX_IOERR) for a full disk, 1 for what has to be looked into."""
    if _is_full(error):
        return 74
    if _is_about_a_path(error) or _lacks_gcsfs(error):
        return 2
    return 2 if isinstance(error, ValueError) and not processes.is_runtime_error(error) else 1


def entry() -> None:
    """The console script."""
    app.run(main, flags_parser=parse_flags)


if __name__ == "__main__":
    entry()
