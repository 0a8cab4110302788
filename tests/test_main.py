"""The command line: every bad input is one line that says what was found and what was wanted."""

import errno
import importlib.util
import json
import os
import pathlib
import signal
import subprocess
import sys
from typing import Any

import helpers_children
import pytest
from absl import app, flags
from absl.testing import flagsaver

from mgsd_jax import command_line, main
from mgsd_jax.workdir import metrics

ROOT = pathlib.Path(__file__).parents[1]
NANO = str(ROOT / "configs" / "nano.py")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": helpers_children.PATH}
    return subprocess.run(
        [sys.executable, "-m", "mgsd_jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("stage", "words", "line"),
    [
        (
            "grounding",
            ["--stage=grounding", "--config=nano", "--workdir", "grounding", "--set", "a.b=(1, 2)"],
            "--stage=distillation --config=nano --workdir grounding --set 'a.b=(1, 2)'",
        ),
        ("export", ["--config=nano", "--stage", "export"], "--stage=report --config=nano"),
        (
            "generate",
            ["--stage=generate", "--config=my own.py:a b", "--workdir", "runs/it's mine"],
            "--stage=grounding '--config=my own.py:a b' --workdir 'runs/it'\"'\"'s mine'",
        ),
        ("preflight", ["-stage=preflight"], "--stage=generate"),
    ],
)
def test_a_stage_ends_with_the_next_command(stage: str, words: list[str], line: str) -> None:
    said = main.next_line(stage, words)
    assert said == f"next: {command_line.program()} {line}"


def test_after_the_report_there_is_a_page_to_open() -> None:
    assert main.next_line("report", []) == "next: open this page in a browser"
    assert {*main.NEXT, "report"} == {*main.STAGES}
    assert {*main.NEXT.values()} <= {*main.STAGES}


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a"), 2),
        (OSError(errno.ENOSPC, "full", "here"), 74),
        (OSError(errno.EDQUOT, "quota"), 74),
        (Exception("No space left on device (os error 28)"), 74),  # tokenizers, safetensors
        (ValueError("RESOURCE_EXHAUSTED: Failed to write: No space left on device [28]"), 74),
        (OSError(errno.EDQUOT, "full", "here"), 74),
        (OSError(errno.EACCES, "closed", "here"), 2),
        (OSError(errno.EACCES, "closed"), 1),  # not about a path: what is it about?
        (OSError(errno.EPIPE, "gone", "here"), 1),
        (RuntimeError("a"), 1),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), 1),
    ],
)
def test_errors_have_exit_codes(error: Exception, code: int) -> None:
    assert main.explain(error)[0] == code


def parse(*arguments: str) -> Any:
    """The exit code that the flags end with."""
    app.define_help_flags()
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as left:
        main.parse_flags(["mgsd_jax", *arguments])
    return left.value.code


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--stage=train",), "flag --stage=train: value should be one of <init|"),
        (("--stag=x",), "Unknown command line flag 'stag'"),
        (("--stage=report", "--sets", "a=1"), "Unknown command line flag 'sets'"),
        (("--set",), "Missing value for flag --set"),
        (("--stage",), "Missing value for flag --stage"),
        (("--processes=two",), "flag --processes=two: invalid literal for int()"),
        (("--processes=" + "9" * 5000,), "flag --processes=999"),
        (("--flagfile=/absent/flags",), "ERROR:: Unable to open flagfile"),
    ],
)
def test_wrong_flags_are_one_line_and_code_2(
    arguments: tuple[str, ...], line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert parse(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(line) and said.count("\n") == 1
    assert said.endswith("; see --help\n")


@pytest.mark.parametrize("flag", ["--help", "--helpshort", "--helpfull", "-?"])
def test_help_is_no_error(flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert parse(flag) == 0
    assert "--helpfull" in capsys.readouterr().out


def test_flags_of_libraries_wait_for_their_imports(capsys: pytest.CaptureFixture[str]) -> None:
    """They are known by how they begin: whatever else is unknown is refused before the imports."""
    before = signal.getsignal(signal.SIGPIPE)  # a process that ends has the system's
    known, libraries = flags.FLAGS, ("array_record", "etils", "flax", "grain", "jax", "orbax")
    theirs = [n for n in known if str(known.find_module_defining_flag(n)).startswith(libraries)]
    assert len(theirs) > 5
    for name in theirs:
        assert name.startswith(command_line._LATER), name
    with flagsaver.flagsaver():
        command_line.answer_first(["mgsd_jax", "--stage=grounding", "--nograin_of_later"])
        with pytest.raises(SystemExit) as left:
            command_line.answer_first(["mgsd_jax", "--stage=grounding", "--of_later"])
        known.mark_as_parsed()
    assert left.value.code == 2
    assert capsys.readouterr().err.startswith("Unknown command line flag 'of_later'")
    signal.signal(signal.SIGPIPE, before)


def test_every_stage_of_the_help_runs() -> None:
    assert [*main.STAGES, "ask", "score"] == [*command_line.STAGES]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("def get_config(:\n", "a.py, line 1: got SyntaxError: invalid syntax"),
        ("x = 1\ny = 1 / 0\n", "a.py, line 2: got ZeroDivisionError: division by zero, want a Con"),
        ("import sys\nsys.exit(0)\n", "a.py, line 2: got SystemExit: 0, want a Config"),
        ("def get_config():\n    raise OSError('a\\nb')", "a.py, line 2: got OSError: a b, want a"),
        ("def get_config(a):\n    return a\n", "a.py: got TypeError: get_config() missing 1 req"),
        ("get_config = 3", "a.py: got TypeError: 'int' object is not callable, want a Config"),
        ("import nothing_of_the_kind", "a.py, line 1: got ModuleNotFoundError: No module named"),
        ("from mgsd_jax.config import *\nOptimConfig()", "a.py, line 2: got TypeError: OptimConf"),
        ("x = '\\0" + "(" * 1000, "a.py, line 1: got SyntaxError"),
        ("\0", "source code string cannot contain null bytes"),
        ("def get_config():\n    return get_config()\n", "line 2: got RecursionError"),
        ("def get_config():\n    raise ValueError('size: got 9b')", "a.py, line 2: size: got 9b"),
    ],
)
def test_a_config_file_that_fails_is_named(text: str, line: str, tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.py").write_text(text)
    with pytest.raises(ValueError) as raised:
        command_line.load_config(str(tmp_path / "a.py"), [])
    assert line in str(raised.value) and "\n" not in str(raised.value)
    assert main.explain(raised.value)[0] == 2


@pytest.mark.parametrize(
    ("config", "line"),
    [
        ("qwen3vl.py:9b", ": size: got '9b', want 4b or 8b, perhaps with ',release'"),
        ("qwen3vl.py:4b,paper", ": size: got '4b,paper', want 4b or 8b, perhaps with ',release'"),
        ("qwen3vl.py:", "size: got '', want 4b or 8b"),
        ("gpu_4b.py:8b", "memory: got '8b', want 24gb or 80gb"),
        ("nano_base.py:all", "run: got 'all', want text, sight or finish, perhaps with one of"),
        ("study/small.py:all", "size: got 'all', want one of ['small'"),
        (
            "nano.py:4b",
            "nano.py:4b: got TypeError: get_config() takes 0 positional",
        ),
        ("qwen3vl.py:4b:8b", "qwen3vl.py:4b:8b', want an existing Python file"),
        ("qwen3vl:4b", "qwen3vl:4b', want an existing Python file"),
    ],
)
def test_a_wrong_argument_of_a_config_file_is_one_line(config: str, line: str) -> None:
    with pytest.raises(ValueError) as raised:
        command_line.load_config(str(ROOT / "configs" / config), [])
    assert line in str(raised.value) and "\n" not in str(raised.value)


def test_a_recipe_goes_by_its_name_with_an_argument_too() -> None:
    recipe = str(ROOT / "configs" / "qwen3vl.py")
    assert command_line.load_config("qwen3vl:8b", []) == command_line.load_config(
        f"{recipe}:8b", []
    )
    assert command_line.load_config("qwen3vl", []) == command_line.load_config(f"{recipe}:4b", [])
    with pytest.raises(ValueError, match=r"--config qwen3vl:9b, line .*: size: got '9b', want 4b"):
        command_line.load_config("qwen3vl:9b", [])


def test_a_file_whose_name_has_a_colon_is_a_file(tmp_path: pathlib.Path) -> None:
    (tmp_path / "a.py:8b").write_text(pathlib.Path(NANO).read_text())
    assert command_line.load_config(str(tmp_path / "a.py:8b"), []) == command_line.load_config(
        NANO, []
    )


def test_what_the_system_says_of_a_path_is_one_line(tmp_path: pathlib.Path) -> None:
    """A workdir that is a file, lies below one, is too long, is a circle of links."""
    (tmp_path / "file").write_text("")
    (tmp_path / "circle").symlink_to(tmp_path / "circle")
    for name, want in {
        "file": "want one that is free, or a folder",
        "file/run": "want folders on the way to it",
        "a" * 300: "want a shorter one",
        "circle/run": "want ",
    }.items():
        with pytest.raises(OSError) as raised, metrics.open_writer(tmp_path / name):
            pass
        line = main.explain(raised.value)[1]
        assert line.startswith(f"{tmp_path}/{name}"[:200]) and want in line and "\n" not in line
        assert main.explain(raised.value)[0] == 2


def test_a_bucket_without_its_package_is_one_line() -> None:
    if importlib.util.find_spec("gcsfs") is not None:
        pytest.skip("gcsfs is installed")
    with pytest.raises(ImportError) as raised, metrics.open_writer("gs://bucket/run"):
        pass
    assert main.explain(raised.value)[1].endswith("pip install 'mgsd_jax[gcs]'")
    assert main.explain(raised.value)[0] == 2


@pytest.mark.slow
def test_a_process_without_the_others_is_refused_in_one_line() -> None:
    done = call("--stage=grounding", f"--config={NANO}", "--workdir=x", "--process=1")
    assert done.returncode == 2
    assert "got --process 1 but no --coordinator, no --processes; want all three" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grounding", "distillation"])
def test_a_stage_without_boards_says_so_and_leaves_nothing(
    stage: str, tmp_path: pathlib.Path
) -> None:
    """And the config file, which may do anything, has run once."""
    runs, workdir = tmp_path / "runs", tmp_path / "workdir"
    workdir.mkdir()
    (tmp_path / "config.py").write_text(
        f"import runpy\nwith open({str(runs)!r}, 'a') as file:\n    file.write('once')\n"
        f"get_config = runpy.run_path({NANO!r})['get_config']\n"
    )
    done = call(f"--stage={stage}", f"--config={tmp_path}/config.py", f"--workdir={workdir}")
    assert done.returncode == 2
    assert "manifest.json: not found; run --stage=generate first" in done.stderr
    assert not list(workdir.iterdir())
    assert runs.read_text() == "once"


@pytest.mark.slow
def test_help_and_score(tmp_path: pathlib.Path) -> None:
    done = call("--help")
    for word in ("grounding", "distillation", "--config", "--workdir", "--set", "--input"):
        assert word in done.stdout
    sample = ROOT / "tests" / "data" / "scoring_sample.jsonl"
    done = call("--stage=score", f"--input={sample}")
    count = len(sample.read_text().splitlines())
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"{count} rows, 0 mismatches"
    rows = [json.loads(line) for line in sample.read_text().splitlines()]
    row = next(r for r in rows if "success" in r["expected"])
    row["expected"]["success"] = not row["expected"]["success"]
    wrong = tmp_path / "rows.jsonl"
    wrong.write_text("".join(json.dumps(r) + "\n" for r in rows))
    done = call("--stage=score", f"--input={wrong}")
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == f"{count} rows, 1 mismatches"


# Runs the program and says, at its end, which extras it imported and whether garbage is collected.
STARTED = """
import atexit, gc, runpy, sys
extras = ("openai", "wandb", "trackio", "gcsfs", "google.cloud.storage")
say = lambda: print([name for name in extras if name in sys.modules], gc.isenabled(), flush=True)
atexit.register(say)
sys.argv = ["mgsd_jax", "--stage=score", "--input=/nowhere/rows.jsonl"]
runpy.run_module("mgsd_jax.main", run_name="__main__", alter_sys=True)
"""


def test_a_start_imports_no_extra_and_collects_garbage_afterwards() -> None:
    """Each extra would take half a second or more of every start."""
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", STARTED]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 2 and "/nowhere/rows.jsonl" in done.stderr
    assert done.stdout == "[] True\n"


# Runs the program, and is interrupted in a stage or while it imports one.
INTERRUPTED = """
import os, runpy, signal, sys
if sys.argv.pop(1) == "imports":
    class Finder:
        def find_spec(name, path=None, target=None):
            if name == "mgsd_jax.stages.distillation":
                os.kill(os.getpid(), signal.SIGINT)
    sys.meta_path.insert(0, Finder)
    runpy.run_module("mgsd_jax.main", run_name="__main__")
from mgsd_jax import command_line, main
main.STAGES["generate"] = lambda config, workdir: os.kill(os.getpid(), signal.SIGINT)
main.entry()
"""


@pytest.mark.parametrize(
    ("moment", "said"),
    [
        ("imports", ""),
        ("stage", "error: generate: stopped by Ctrl-C; the same command goes on from here"),
    ],
)
def test_ctrl_c_is_one_line_and_ends_as_a_shell_wants_it(moment: str, said: str) -> None:
    done = subprocess.run(
        [
            *(sys.executable, "-c", INTERRUPTED, moment),
            *("--stage=generate", f"--config={NANO}", "--workdir=x"),
        ],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": helpers_children.PATH},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == -signal.SIGINT
    assert [line.partition(" ")[2] for line in done.stderr.splitlines()] == ([said] if said else [])
