"""The command line: every bad input is one line that says what was found and what was wanted."""

import errno
import json
import logging
import os
import pathlib
import subprocess
import sys

import pytest

from mgsd_jax import main

ROOT = pathlib.Path(__file__).parents[1]
NANO = str(ROOT / "configs" / "nano.py")


def call(*arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [sys.executable, "-m", "mgsd_jax.main", *arguments],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.parametrize(
    ("path", "level", "shown"),
    [
        ("/site/orbax/checkpoint/manager.py", logging.INFO, False),
        ("/site/orbax/checkpoint/manager.py", logging.WARNING, True),
        ("/here/mgsd_jax/metrics.py", logging.INFO, True),
    ],
)
def test_the_log_leaves_out_the_details_of_every_save(path: str, level: int, shown: bool) -> None:
    record = logging.LogRecord("absl", level, path, 1, "a line", None, None)
    assert main.is_shown(record) == shown


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (ValueError("a"), 2),
        (OSError(errno.ENOSPC, "full", "here"), 74),
        (OSError(errno.EACCES, "closed", "here"), 1),
        (RuntimeError("a"), 1),
        (ValueError("UNKNOWN: Gloo AllGather failed: Connection closed by peer"), 1),
    ],
)
def test_errors_have_exit_codes(error: Exception, code: int) -> None:
    assert main._exit_code(error) == code


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--stage=grounding", "--workdir=x"), "--config: got nothing"),
        (("--stage=grounding", f"--config={NANO}"), "--workdir: got nothing"),
        (("--stage=score",), "--input: got nothing"),
        (
            ("--stage=grounding", f"--config={NANO}", "--workdir=x", "--process=1"),
            "got --process 1 but no --coordinator, no --processes; want all three",
        ),
        (
            ("--stage=generate", f"--config={NANO}", "--workdir=x", "--set", "data.a=1"),
            "--set data.a: no field 'a'",
        ),
    ],
)
def test_one_line_errors(arguments: tuple[str, ...], message: str) -> None:
    done = call(*arguments)
    assert done.returncode == 2
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["grounding", "distillation"])
def test_a_stage_without_boards_says_so_and_leaves_nothing(
    stage: str, tmp_path: pathlib.Path
) -> None:
    done = call(f"--stage={stage}", f"--config={NANO}", f"--workdir={tmp_path}")
    assert done.returncode == 2
    assert "manifest.json: got no such file, want one; run --stage=generate first" in done.stderr
    assert not list(tmp_path.iterdir())


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
