"""Scores stored responses: `--stage=score --input rows.jsonl`.

A row is {rules, task, task_text, response} and, to compare, `expected`: some or all keys of the
score, or {exception, message} for a board that has to be refused. A response is text, a list of
parts of text, or null: no plan under all rules, counted in a line of its own.
"""

import errno
import json
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from absl import logging

from mgsd_jax.evaluation.rules import Rules, score_text
from mgsd_jax.sampling import endpoint
from mgsd_jax.workdir import paths

_TEXT_KEYS = ("rules", "task_text")


def run(input_path: str, output_path: str | None = None) -> int:
    """Scores every row, shows those that differ from what they expect; 1 if any does, else 0.

    The last line on stdout is `N rows, M mismatches`. A row that cannot be scored is a mismatch,
    unless it expects so. `output_path` gets the rows with `score` or `error`, and `match` (null
    where nothing was expected). Raises ValueError naming file and line of a row that is none, or
    an output that cannot be written.
    """
    scored: list[dict[str, Any]] = []
    mismatches = empty = 0
    for number, row in _read_rows(pathlib.Path(input_path)):
        got = _score(row)
        empty += row["response"] is None
        expected = row.get("expected")
        match = _matches(got, expected) if expected is not None else None
        if match is False or ("error" in got and not match):
            mismatches += 1
            want = "a score" if expected is None else json.dumps(expected, ensure_ascii=False)
            _say(f"row {number}: got {json.dumps(got, ensure_ascii=False)}, want {want}")
        scored.append({**row, **got, "match": match})
    if output_path is not None:
        _write_rows(pathlib.Path(output_path), scored)
    if empty:
        _say(f"{empty} rows have no response (null), which is no plan")
    _say(f"{len(scored)} rows, {mismatches} mismatches")
    return 1 if mismatches else 0


def _say(line: str) -> None:
    """One line for people (the log) and for programs (stdout)."""
    logging.info("%s", line)
    # A lone surrogate, or a character that a plain terminal lacks, is shown as its escape.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def _read_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON lines file with their line numbers from 1; blank lines are none."""
    try:
        lines = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: got {_why(error)}, want JSON lines") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _read_row(f"{path}, line {number}", line.strip())


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _read_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except (ValueError, RecursionError) as error:  # bad JSON or UTF-8, nested too deep
        raise ValueError(f"{where}: got {line[:60]!r}, want JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {line[:60]!r}, want a JSON object")
    for key in _TEXT_KEYS:
        if key not in row or not isinstance(row[key], str):
            got = repr(row[key]) if key in row else f"keys {sorted(row)}"
            raise ValueError(f"{where}: {key}: got {got}, want text")
    if "response" not in row or endpoint.text_of(row["response"]) is None:
        got = repr(row["response"])[:60] if "response" in row else f"keys {sorted(row)}"
        raise ValueError(f"{where}: response: got {got}, want text or null")
    if row["rules"] not in get_args(Rules):
        raise ValueError(f"{where}: rules: got {row['rules']!r}, want one of {get_args(Rules)}")
    if "task" in row and not isinstance(row["task"], str | None):
        raise ValueError(f"{where}: task: got {row['task']!r}, want text or null")
    if "expected" in row and not isinstance(row["expected"], dict | None):
        raise ValueError(f"{where}: expected: got {row['expected']!r}, want a JSON object")
    expected = row.get("expected") or {}
    if "exception" in expected and not isinstance(expected.get("message"), str):
        raise ValueError(f"{where}: expected: got {expected!r}, want a message with the exception")
    return row


def _score(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        response = endpoint.text_of(row["response"]) or ""
        return {"score": score_text(row["rules"], row.get("task"), row["task_text"], response)}
    except ValueError as error:
        return {"error": str(error)}


def _matches(got: Mapping[str, Any], expected: Mapping[str, Any]) -> bool:
    """Whether a score has all the expected values, or an error is about the expected key."""
    if "exception" in expected:
        # The public code's KeyError message is the key in quotes; other messages are its own.
        key = expected["message"].strip("'\"") if expected["exception"] == "KeyError" else ""
        return "error" in got and key in got["error"]
    if "error" in got:
        return False
    score = got["score"]
    return all(key in score and score[key] == value for key, value in expected.items())


def _write_rows(path: pathlib.Path, rows: list[dict[str, Any]]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate has no UTF-8; what takes its place is its escape in JSON.
        paths.write_whole(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        if error.errno == errno.ENOSPC:  # an exit code of its own
            error.filename = str(path)
            raise
        raise ValueError(
            f"--output {path}: got {_why(error)}, want a file that can be written"
        ) from None
