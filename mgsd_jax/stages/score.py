"""Scores stored responses: `--stage=score --input rows.jsonl`.

A row is {rules, task, task_text, response} and, to compare, `expected`: some or all keys of the
score, or {exception, message} for a board that has to be refused. A response is text, a list of
parts of text, or null, which is no plan under all rules and is counted in a line of its own.
"""

import errno
import json
import pathlib
import sys
from collections.abc import Iterator
from typing import NotRequired, TypedDict, cast, get_args

from absl import logging

from mgsd_jax.checks import fields
from mgsd_jax.checks.fields import Json
from mgsd_jax.evaluation.rules import Rules, score_text
from mgsd_jax.sampling import endpoint
from mgsd_jax.workdir import paths


class Row(TypedDict):
    """A line of the input."""

    rules: str
    task_text: str
    response: str | list[object] | None
    task: NotRequired[str | None]  # absent or null: that of the text
    expected: NotRequired[Json | None]


Result = Json  # {score} or {error}


def run(input_path: str, output_path: str | None = None) -> int:
    """Scores every row, shows those that differ from what they expect; 1 if any does, else 0.

    The last line on stdout is `N rows, M mismatches`. A row that cannot be scored is a mismatch,
    unless it expects that. `output_path` gets the rows with `score` or `error`, and `match` (null
    where nothing was expected). Raises ValueError with file and line if a line is not a valid row,
    or if the output cannot be written.
    """
    scored: list[Result] = []
    mismatches = empty = 0
    for number, row in _read_rows(pathlib.Path(input_path)):
        got = _score(row)
        empty += row["response"] is None
        expected = row.get("expected")
        match = None if expected is None else _matches(got, expected)
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
    """Writes a line for people (the log) and for programs (stdout)."""
    logging.info("%s", line)
    # A lone surrogate, or a character that a plain terminal lacks, is shown as its escape.
    encoding = sys.stdout.encoding or "utf-8"
    sys.stdout.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    sys.stdout.flush()


def _read_rows(path: pathlib.Path) -> Iterator[tuple[int, Row]]:
    """The rows of a JSON lines file with their line numbers from 1; blank lines are skipped."""
    try:
        lines = path.open("rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({_why(error)}), want JSON lines") from None
    with lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                where = f"{path}, line {number}"
                yield number, _checked(fields.read_line(line.strip(), where), where)


def _why(error: OSError) -> str:
    return (error.strerror or str(error)).lower()


def _checked(row: Json, where: str) -> Row:
    """The row. Raises ValueError if a key is absent or its value is of another kind."""

    def check(is_right: bool, key: str, want: str) -> None:
        if not is_right:
            got = repr(row[key])[:60] if key in row else f"keys {sorted(row)}"
            raise ValueError(f"{where}: {key}: got {got}, want {want}")

    for key in ("rules", "task_text"):
        check(isinstance(row.get(key), str), key, "text")
    has_response = "response" in row and endpoint.text_of(row["response"]) is not None
    check(has_response, "response", "text or null")
    check(row["rules"] in get_args(Rules), "rules", f"one of {get_args(Rules)}")
    check(isinstance(row.get("task"), str | None), "task", "text or null")
    check(isinstance(row.get("expected"), dict | None), "expected", "a JSON object")
    expected = row.get("expected") or {}
    has_message = isinstance(expected.get("message"), str) or "exception" not in expected
    check(has_message, "expected", "a message with the exception")
    return cast(Row, row)


def _score(row: Row) -> Result:
    try:
        response = endpoint.text_of(row["response"]) or ""
        return {"score": score_text(row["rules"], row.get("task"), row["task_text"], response)}
    except ValueError as error:
        return {"error": str(error)}


def _matches(got: Result, expected: Json) -> bool:
    """Whether a score has all the expected values, or an error is about the expected key."""
    if "exception" in expected:
        # The public code's KeyError message is the key in quotes; other messages are its own.
        key = expected["message"].strip("'\"") if expected["exception"] == "KeyError" else ""
        return "error" in got and key in got["error"]
    return "score" in got and expected.items() <= got["score"].items()


def _write_rows(path: pathlib.Path, rows: list[Result]) -> None:
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate has no UTF-8; what takes its place is its escape in JSON.
        paths.write_whole(path, text.encode("utf-8", "backslashreplace"))
    except OSError as error:
        if error.errno == errno.ENOSPC:  # an exit code of its own
            error.filename = str(path)
            raise
        raise ValueError(f"--output {path}: cannot be written ({_why(error)})") from None
