"""Scores stored responses: `--stage=score --input rows.jsonl`.

A row is {rules, task, task_text, response} and, to compare, `expected`: some or all keys of the
score, or {exception, message} for a board that has to be refused.
"""

import json
import os
import pathlib
import sys
from collections.abc import Iterator, Mapping
from typing import Any, get_args

from absl import logging

from mgsd_jax.envs.rules import Rules, score_text

_TEXT_KEYS = ("rules", "task_text", "response")


def run(input_path: str, output_path: str | None = None) -> int:
    """Scores every row, shows those that differ from what they expect; 1 if any does, else 0.

    The last line on stdout is `N rows, M mismatches`. A row that cannot be scored is a mismatch,
    unless it expects so. `output_path` gets the rows with `score` or `error`, and `match` (null
    where nothing was expected). Raises ValueError naming file and line of a row that is none.
    """
    scored: list[dict[str, Any]] = []
    mismatches = 0
    for number, row in _read_rows(pathlib.Path(input_path)):
        got = _score(row)
        expected = row.get("expected")
        match = _matches(got, expected) if expected is not None else None
        if match is False or ("error" in got and not match):
            mismatches += 1
            want = "a score" if expected is None else json.dumps(expected, ensure_ascii=False)
            _say(f"row {number}: got {json.dumps(got, ensure_ascii=False)}, want {want}")
        scored.append({**row, **got, "match": match})
    if output_path is not None:
        _write_rows(pathlib.Path(output_path), scored)
    _say(f"{len(scored)} rows, {mismatches} mismatches")
    return 1 if mismatches else 0


def _say(line: str) -> None:
    """One line for people (the log) and for programs (stdout)."""
    logging.info("%s", line)
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def _read_rows(path: pathlib.Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The rows of a JSON lines file with their line numbers from 1; blank lines are none."""
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, want JSON lines")
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if line.strip():
                yield number, _read_row(f"{path}, line {number}", line.strip())


def _read_row(where: str, line: bytes) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:  # bad JSON or bad UTF-8
        raise ValueError(f"{where}: got {line[:60]!r}, want JSON ({error})") from None
    if not isinstance(row, dict):
        raise ValueError(f"{where}: got {line[:60]!r}, want a JSON object")
    for key in _TEXT_KEYS:
        if key not in row or not isinstance(row[key], str):
            got = repr(row[key]) if key in row else f"keys {sorted(row)}"
            raise ValueError(f"{where}: {key}: got {got}, want text")
    if row["rules"] not in get_args(Rules):
        raise ValueError(f"{where}: rules: got {row['rules']!r}, want one of {get_args(Rules)}")
    if "task" in row and not isinstance(row["task"], str | None):
        raise ValueError(f"{where}: task: got {row['task']!r}, want text or null")
    if "expected" in row and not isinstance(row["expected"], dict | None):
        raise ValueError(f"{where}: expected: got {row['expected']!r}, want a JSON object")
    return row


def _score(row: Mapping[str, Any]) -> dict[str, Any]:
    try:
        score = score_text(row["rules"], row.get("task"), row["task_text"], row["response"])
        return {"score": score}
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
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    partial.write_text(text, encoding="utf-8")
    os.replace(partial, path)
