"""The command line: flags, the help, and what is answered without running a stage.

Nothing here imports jax: `--help`, `--help_config`, `--print_config` and `--version` take a moment,
where the stages take seconds to import.
"""

import importlib.metadata
import itertools
import pathlib
import platform
import runpy
import signal
import sys
import textwrap
import traceback
from collections.abc import Sequence

from absl import app, flags, logging  # noqa: F401  (app and logging have flags, too)

from mgsd_jax import config as config_lib
from mgsd_jax.checks import meanings, ranges

# Every stage and what it does, in the order of a whole run.
STAGES = {
    "init": "write a nano model with random weights (config.nano)",
    "generate": "draw boards, write the train, val and test splits with a manifest",
    "grounding": "stage 1: learn to read the state of a board off its picture",
    "distillation": "stage 2: learn to plan from pictures, from the text-reading teacher",
    "evaluate": "answer the test boards with every model of config.evaluate",
    "export": "write a Hugging Face folder that transformers loads",
    "report": "one HTML page: curves, tables, boards with the planned routes",
    "preflight": "compile every program for a TPU slice or a GPU that is not here: what fits",
    "ask": "show the picture of --input to a model: its board, route and plan, or any answer",
    "score": "score the rows of --input (JSON lines: rules, task, task_text, response)",
}

# The stages whose processes work together; each process runs the others for itself.
JOINT = ("grounding", "distillation", "evaluate")

STAGE = flags.DEFINE_enum("stage", None, [*STAGES], "What to do: one of the stages above.")
CONFIG = flags.DEFINE_string(
    "config",
    None,
    "A recipe such as nano, or a file with a get_config(). NAME:ARGUMENT gives it an argument, as "
    "in qwen3vl:8b.",
)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run keeps everything that it writes.")
SET = flags.DEFINE_multi_string("set", [], "Override one field: --set a.b=value. Repeatable.")
PROMPTS = flags.DEFINE_string("prompts", None, "Folder of prompt files; same as data.prompts.")
PROFILE = flags.DEFINE_string(
    "profile", None, "Steps to trace, such as 5:8 (docs/profiling.md); same as metrics.profile."
)
INPUT = flags.DEFINE_string("input", None, "ask: the picture; score: the JSON lines file to read.")
OUTPUT = flags.DEFINE_string("output", None, "Where ask draws the route; where score writes rows.")
COMPILE_CACHE = flags.DEFINE_string(
    "compile_cache",
    None,
    "Folder (or gs://) of compiled programs, or off; else JAX_COMPILATION_CACHE_DIR, "
    "~/.cache/mgsd_jax/compiled, or the folder compiled of a workdir that is remote.",
)
COORDINATOR = flags.DEFINE_string("coordinator", None, "host:port of process 0, of several.")
PROCESSES = flags.DEFINE_integer("processes", None, "How many processes there are.")
PROCESS = flags.DEFINE_integer("process", None, "Which of them this one is, from 0.")
PRINT_CONFIG = flags.DEFINE_boolean(
    "print_config", False, "Print the config that would run, a field a line, and stop."
)
HELP_CONFIG = flags.DEFINE_string(
    "help_config",
    None,
    "Print every field with its type, default and meaning, or those of a section: "
    "--help_config=distillation.",
)
VERSION = flags.DEFINE_boolean("version", False, "Print the versions of this and of JAX.")

# How flags begin that are known only after the imports: of grain, of orbax, and absl's long help.
_LATER = ("array_record_", "grain_", "experimental_", "helpfull", "helpxml")
_HELP = {"--help", "-help", "-h", "-?", "--helpshort", "-helpshort"}
_AFTER_FLAGS = """
  --verbosity      1 logs everything, also what libraries say; -1 warnings and errors alone.
  --helpfull       The flags of every library too.

Several processes (hosts of a slice, or several on one machine) run one program: on Cloud TPU, GKE
and Slurm they find each other, elsewhere each gets --coordinator, --processes and --process, or
JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID.

Exit codes: 0 done, 2 a bad input (one line says which), 3 numbers that are not finite, 74 a full
disk, 75 stopped when asked (the same command goes on), 130 Ctrl-C, 1 anything else, with a
traceback.
"""


def program() -> str:
    """The program as it was started: 'mgsd_jax', or 'python -m mgsd_jax.main'."""
    for flag, module in itertools.pairwise(sys.orig_argv):
        if flag == "-m" and module.startswith("mgsd_jax"):
            return f"python -m {module}"
    return "mgsd_jax"


def own_flags() -> list[flags.Flag]:
    """The flags of this program, without those of libraries."""
    return flags.FLAGS.get_flags_for_module(sys.modules[__name__])


def usage() -> str:
    """The text of --help."""
    name = program()
    lines = [
        f"{name} --stage=STAGE --config=CONFIG --workdir=FOLDER [--set a.b=value ...]",
        "",
        "Trains Qwen3-VL to plan from pictures. The stages, in the order of a whole run:",
        *(f"  {stage:15}  {what}" for stage, what in STAGES.items()),
        "",
        f"Recipes: {', '.join(recipes())}. A first run:",
        f"  {name} --stage=generate --config=nano --workdir=runs/nano",
        "",
        "Flags:",
    ]
    for flag in own_flags():
        # absl puts the values of an enum before the help, and a remark on repetition after it
        said = flag.help.split(">: ")[-1].split(";\n")[0]
        column = f"  --{flag.name:14} "
        lines += textwrap.wrap(said, 100, initial_indent=column, subsequent_indent=" " * 19)
    return "\n".join(lines) + _AFTER_FLAGS


def versions() -> str:
    """The versions that a report of a bug should have."""
    lines = [f"Python {platform.python_version()}"]
    for package in ("jax", "jaxlib", "flax", "transformers"):
        lines.append(f"{package} {importlib.metadata.version(package)}")
    try:
        own = importlib.metadata.version("mgsd_jax")
    except importlib.metadata.PackageNotFoundError:
        own = "(not installed: run from its sources)"
    return "\n".join([f"mgsd_jax {own}", *lines])


def parse_flags(argv: Sequence[str], *, known_only: bool = False) -> list[str]:
    """Returns the arguments that are not flags.

    Ends the process with 0 where the flags ask for an answer instead of a stage, 2 for a wrong one.
    """
    if _HELP & {*argv}:
        sys.stdout.write(usage())
        sys.exit(0)
    # Given alone it takes no value; absl would take the next word for one.
    words = [f"{word}=" if word.lstrip("-") == "help_config" else word for word in argv]
    try:
        rest = flags.FLAGS(words, known_only)
        said = answer()
    except flags.Error as error:
        sys.stderr.write(" ".join(str(error).split()) + "; see --help\n")
        sys.exit(2)
    except ValueError as error:
        sys.stderr.write(f"{error}\n")
        sys.exit(2)
    except SystemExit:  # the help is printed; absl would end with 1
        sys.exit(0)
    if said:
        print(said)
        sys.exit(0)
    return rest


def answer_first(argv: Sequence[str]) -> config_lib.Config | None:
    """Ends the process where no stage is asked for, or none can be: its imports take seconds.

    Returns the config of the stage, so that its file runs once; None where that is not known yet.
    """
    before = signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # `--help | head` ends in silence
    names = [word.lstrip("-") for word in argv if word.startswith("-")]
    are_known = not any(name.removeprefix("no").startswith(_LATER) for name in names)
    rest, found = parse_flags(argv, known_only=not are_known), None
    if are_known:
        try:
            found = checked(rest)
        except ValueError as error:
            sys.stderr.write(f"{error}\n")
            sys.exit(2)
    flags.FLAGS.unparse_flags()
    signal.signal(signal.SIGPIPE, before)
    return found


def checked(rest: Sequence[str]) -> config_lib.Config | None:
    """The config of the stage, None where it has none or finds it itself.

    `rest` are the arguments that are not flags. Raises ValueError for whatever is wrong with the
    flags and can be told before the imports of a stage.
    """
    stage = STAGE.value
    if len(rest) > 1:
        raise ValueError(f"got stray arguments {list(rest[1:])}, want flags only")
    if stage is None:
        raise ValueError(f"--stage is required, one of {[*STAGES]}; see --help")
    if stage in ("ask", "score"):
        required(INPUT)
    if PROFILE.value is not None and stage not in JOINT:
        raise ValueError(f"--profile: got --stage={stage}, want one of {[*JOINT]}")
    for flag in (COMPILE_CACHE, WORKDIR):
        if flag.value is not None:
            ranges.coerce(flag.value, config_lib.Path, f"--{flag.name}")
    if stage == "score" or (stage == "ask" and not CONFIG.value):
        return None
    found = config()
    if stage != "ask":
        required(WORKDIR)
    return found


def answer() -> str:
    """What the flags ask to be told, '' where they ask for a stage. Raises ValueError."""
    if VERSION.value:
        return versions()
    if HELP_CONFIG.value is not None:
        return meanings.table(config_lib.Config, HELP_CONFIG.value)
    return config_lib.to_text(config()) if PRINT_CONFIG.value else ""


def required(flag: flags.FlagHolder[str | None]) -> str:
    """The value of a flag that must be given. Raises ValueError."""
    if not flag.value:
        stage = f"for --stage={STAGE.value}" if STAGE.value else "here"
        raise ValueError(f"--{flag.name} is required {stage}")
    return flag.value


def config() -> config_lib.Config:
    """The config that the flags name, checked. Raises ValueError."""
    return load_config(required(CONFIG), assignments())


def assignments() -> list[str]:
    """What the flags set, as 'a.b=value'."""
    same = {"data.prompts": PROMPTS.value, "metrics.profile": PROFILE.value}
    return [*SET.value, *(f"{field}={value}" for field, value in same.items() if value is not None)]


def find_config(name: str) -> str:
    """The path of a config: `name` itself, or the recipe of that name.

    A wheel carries ./configs inside the package, where a checkout has it beside the package.
    """
    is_name = not pathlib.Path(name).exists() and pathlib.PurePath(name).name == name
    return recipes().get(name, name) if is_name else name


def recipes() -> dict[str, str]:
    """The shipped configs: {name: path}."""
    package = pathlib.Path(__file__).parent
    folder = package / "configs"
    files = (folder if folder.is_dir() else package.parent / "configs").glob("*.py")
    return {path.stem: str(path) for path in sorted(files)}


def load_config(path: str, assignments: Sequence[str]) -> config_lib.Config:
    """The checked config of `CONFIG` or `CONFIG:ARGUMENT`, with `--set` assignments applied.

    Raises ValueError, also for whatever the file itself raises.
    """
    file, arguments = find_config(path), []
    if not pathlib.Path(file).is_file():
        name, _, argument = path.rpartition(":")
        file, arguments = find_config(name), [argument]
    if not pathlib.Path(file).is_file():
        names = ", ".join(recipes())
        raise ValueError(f"--config: got {path!r}, want an existing Python file or one of {names}")
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
