"""launch/quickstart.sh with a Python that stands in for the environment's: what it passes on, what
it refuses, and how it ends.
"""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "quickstart.sh"
# Says its arguments; as an interpreter it is the Python that runs the tests.
PYTHON = f"""#!{sys.executable}
import os, signal, sys, time
words = sys.argv[1:]
if words[0] in ("-c", "--version"):
    os.execv(sys.executable, [sys.executable, *words])
if "END" in os.environ:
    signal.signal(signal.SIGINT, lambda *_: sys.exit(int(os.environ["END"])))
    print("begins", flush=True)
    time.sleep(60)
if sys.dont_write_bytecode:
    print("compiles every module anew at each start")
print("ran", *words, sep="|", flush=True)
"""


@pytest.fixture
def venv(tmp_path: pathlib.Path) -> pathlib.Path:
    """An environment that is installed already."""
    python = tmp_path / "venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(PYTHON)
    python.chmod(0o755)
    (tmp_path / "venv" / ".installed").write_text("")
    return tmp_path / "venv"


def run(
    venv: pathlib.Path, *words: str, cwd: pathlib.Path = ROOT, **environ: str
) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "EXTRAS")}
    return subprocess.run(
        ["bash", str(SCRIPT), *words],
        cwd=cwd,
        env={**kept, "VENV": str(venv), **environ},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_every_stage_gets_the_folder_and_the_settings(
    venv: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    words = ("my run", "--set", "grounding.steps=7", "--set=data.exclude=('a b',)")
    done = run(venv, *words, cwd=tmp_path, PYTHONDONTWRITEBYTECODE="1")  # as containers have it
    assert done.returncode == 0, done.stderr
    assert "anew" not in done.stdout
    lines = done.stdout.splitlines()
    version = ".".join(map(str, sys.version_info[:3]))
    assert lines[0] == f"quickstart: Python {version}, {venv}/bin/python"
    ran = [line.split("|")[1:] for line in lines if line.startswith("ran")]
    stages = ("generate", "grounding", "distillation", "evaluate", "export", "report")
    assert [words[2] for words in ran] == [f"--stage={stage}" for stage in stages]
    for words in ran:
        assert words[:2] == ["-m", "mgsd_jax.main"]
        assert words[3:] == [
            *("--config=configs/nano.py", f"--workdir={tmp_path}/my run"),
            *("--set", "grounding.steps=7", "--set", "data.exclude=('a b',)"),
        ]
    assert lines[-1].startswith(f"quickstart: open {tmp_path}/my run/report/index.html")


def test_its_help_is_printed_and_nothing_done(tmp_path: pathlib.Path) -> None:
    done = run(tmp_path / "none", "--help")
    assert done.returncode == 0 and not (tmp_path / "none").exists()
    for word in ("[WORKDIR]", "--set a.b=value", "PYTHON=", "VENV=", "EXTRAS="):
        assert word in done.stdout
    assert "#" not in done.stdout and "set -e" not in done.stdout


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("--sets", "a=1"), "quickstart: got --sets, want --set, --help or a folder; see --help"),
        (("--set",), "quickstart: --set: a value is required, such as grounding.steps=80; see "),
        (("a", "b"), "quickstart: got a second folder b, want one; see --help"),
        (("",), "quickstart: got an empty name of a folder; see --help"),
    ],
)
def test_wrong_words_are_one_line(venv: pathlib.Path, words: tuple[str, ...], line: str) -> None:
    done = run(venv, *words)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.startswith(line) and done.stderr.count("\n") == 1


def fake(path: pathlib.Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def test_a_python_that_cannot_be_used_is_refused(
    venv: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    broken = fake(tmp_path / "broken", "exit 1")
    old = fake(tmp_path / "old", "echo 3.9 /usr")
    other = fake(tmp_path / "other", "echo 3.12 /opt/other")
    for python, line in {
        "/nowhere/python": "which does not run, want a Python 3.11 to 3.13",
        broken: "which does not run, want a Python 3.11 to 3.13",
        old: "Python 3.9, want 3.11 to 3.13",
        other: f"and {venv} was made by another Python ({sys.version_info[0]}.",
    }.items():
        done = run(venv, PYTHON=python)
        assert done.returncode == 2 and done.stdout == ""
        assert done.stderr.startswith(f"setup: PYTHON: got {python}, ") and line in done.stderr
        assert done.stderr.count("\n") == 1
    assert run(venv, PYTHON=sys.executable).returncode == 0


@pytest.mark.parametrize("code", [0, 75])  # of the stage: its last step, and any other
def test_it_ends_at_ctrl_c_however_its_stage_does(
    code: int, venv: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    running = subprocess.Popen(
        ["bash", str(SCRIPT), str(tmp_path / "run")],
        env={**os.environ, "VENV": str(venv), "END": str(code)},
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert running.stdout is not None
    assert running.stdout.readline().startswith("quickstart: Python ")
    assert "generate" in running.stdout.readline() and running.stdout.readline() == "begins\n"
    os.killpg(running.pid, signal.SIGINT)  # as a terminal does
    said = running.communicate(timeout=60)[0]
    assert said == "quickstart: stopped by Ctrl-C; the same command goes on from here\n"
    assert running.returncode == 130
