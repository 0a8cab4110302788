"""The rows of an evaluation: scored, written as they come, read back whole, each counted once.

An evaluation folder holds `boards.jsonl`, a line for each board that is asked (task, level, index,
case, task_text), `models.json`, {model: its identity}, and `rows.jsonl`, a line for each answer,
appended. A kill may cut the last line short: it is dropped, and its answer is asked for again. A
failed request leaves a row with `error`, and a row of another program without a response is one;
the row of a later try stands after it and counts in its place. Where files cannot be appended to
(`gs://`), a batch of rows is a file `rows-N.jsonl` of its own until the evaluation is complete.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence

from absl import logging
from etils import epath

from mgsd_jax.checks import fields
from mgsd_jax.data.boards import Board
from mgsd_jax.evaluation.scoring import Row, board_text
from mgsd_jax.workdir import paths

Key = tuple[str, str, str, int, int, int]  # model, mode, task, level, index, attempt

ROWS_FILE = "rows.jsonl"
BOARDS_FILE = "boards.jsonl"
MODELS_FILE = "models.json"
PARTS = "rows-*.jsonl"
_BOARD_KEYS = {"task": str, "level": int, "index": int}


def key_of(row: Row) -> Key:
    """What a row is the answer to; no two rows of an evaluation share it."""
    board = (row["task"], row["level"], row["index"])
    return (row["model"], row["mode"], *board, row["attempt"])


def write_boards(folder: epath.PathLike, boards: Sequence[Board], cases: Sequence[str]) -> None:
    """Writes `boards.jsonl` in one piece; `cases` are the boards' names in their benchmark.

    Raises ValueError where the folder has rows about other boards.
    """
    lines = [
        {
            "task": board.task,
            "level": board.level,
            "index": board.index,
            "case": case,
            "task_text": board_text(board),
        }
        for board, case in zip(boards, cases, strict=True)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    path = epath.Path(folder) / BOARDS_FILE
    if not path.exists():
        paths.write_whole(path, text)
    elif path.read_text() != text:
        raise ValueError(
            f"{path}: got the boards of another evaluation, want those of this one; "
            "set evaluate.folder to a new folder"
        )


def check_models(folder: epath.PathLike, identities: Mapping[str, str]) -> None:
    """Raises ValueError where `models.json` has another identity of a model that has rows."""
    path = epath.Path(folder) / MODELS_FILE
    noted = fields.read_json(path) if path.is_file() else {}
    for name, identity in identities.items():
        if noted.get(name, identity) != identity:
            raise ValueError(
                f"{path}: {name}: got rows of another model than the one of that name now, want "
                f"those of one; remove {path.parent} to ask anew, or set evaluate.folder to a new "
                "folder"
            )


def add_model(folder: epath.PathLike, name: str, identity: str) -> None:
    """Notes in `models.json` whose the rows of a model are."""
    path = epath.Path(folder) / MODELS_FILE
    noted = fields.read_json(path) if path.is_file() else {}
    paths.write_whole(path, json.dumps(noted | {name: identity}, indent=2) + "\n")


def read_rows(folder: epath.PathLike) -> list[Row]:
    """The rows of an evaluation folder, in the order of their first tries, with `task_text`.

    Rows about a board that an earlier one equals also get `same_as`, the index of that one.
    Raises ValueError naming file, line, got and want where a line is no row or its board is
    unknown. A last line without its end is left out.
    """
    root = epath.Path(folder)
    boards = _read_boards(root / BOARDS_FILE)
    repeats = _repeats(boards)
    rows: dict[Key, Row] = {}
    for path in [root / ROWS_FILE, *sorted(root.glob(PARTS))]:
        for number, row in _read_lines(path):
            where = f"{path}, line {number}"
            rows_key = _checked_key(row, where)
            _add_board(row, boards, where)
            board = (row["task"], row["level"], row["index"])
            if board in repeats:
                row["same_as"] = repeats[board]
            # Only a failed request is asked again, so a later row is the better one.
            if rows_key not in rows or "error" in rows[rows_key]:
                rows[rows_key] = row
    return list(rows.values())


def append(folder: epath.PathLike, rows: Sequence[Row]) -> None:
    """Adds rows, without their `task_text`, and returns when they are on disk."""
    root = epath.Path(folder)
    text = "".join(json.dumps(_without_text(row)) + "\n" for row in rows)
    if paths.is_remote(root):
        names = sorted(path.name for path in root.glob(PARTS))
        number = int(names[-1].removeprefix("rows-").removesuffix(".jsonl")) + 1 if names else 0
        paths.write_whole(root / f"rows-{number:06d}.jsonl", text)
        return
    with open(root / ROWS_FILE, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def mend(folder: epath.PathLike) -> None:
    """Drops a last line that a kill cut short, so that the next row starts a line."""
    path = epath.Path(folder) / ROWS_FILE
    if not path.exists():
        return
    content = path.read_bytes()
    end = content.rfind(b"\n") + 1
    if end < len(content):
        logging.warning("%s: dropped a last line that was cut short", path)
        os.truncate(path, end)


def compact(folder: epath.PathLike, rows: Sequence[Row]) -> None:
    """Rewrites `rows.jsonl` as just these rows, in one atomic replacement, and drops the parts."""
    root = epath.Path(folder)
    paths.write_whole(
        root / ROWS_FILE, "".join(json.dumps(_without_text(row)) + "\n" for row in rows)
    )
    for path in root.glob(PARTS):
        path.unlink()


def _without_text(row: Row) -> Row:
    return {key: value for key, value in row.items() if key not in ("task_text", "same_as")}


def _read_boards(path: epath.Path) -> dict[tuple[str, int, int], str]:
    if not path.exists():
        return {}
    boards: dict[tuple[str, int, int], str] = {}
    for number, line in _read_lines(path):
        _want(line, {**_BOARD_KEYS, "task_text": str}, f"{path}, line {number}")
        boards[line["task"], line["level"], line["index"]] = line["task_text"]
    return boards


def _repeats(boards: Mapping[tuple[str, int, int], str]) -> dict[tuple[str, int, int], int]:
    """The boards that differ from an earlier one in their index alone, with the index of that."""
    first: dict[tuple[str, int, str], int] = {}
    found: dict[tuple[str, int, int], int] = {}
    for (task, level, index), text in boards.items():
        content = text.replace(f"\nindex={index}\n", "\n", 1)
        same = first.setdefault((task, level, content), index)
        if same != index:
            found[task, level, index] = same
    return found


def _add_board(row: Row, boards: dict[tuple[str, int, int], str], where: str) -> None:
    board = (row["task"], row["level"], row["index"])
    if board in boards:
        row["task_text"] = boards[board]
    elif "task_text" not in row:  # evaluations of an older version hold it in every row
        raise ValueError(f"{where}: got a row about {board}, want it in {BOARDS_FILE}")


def _checked_key(row: Row, where: str) -> Key:
    row.setdefault("attempt", 0)  # evaluations of an older version had one answer a board
    _want(row, {"model": str, "mode": str, **_BOARD_KEYS, "attempt": int}, where)
    response = row.get("response", "")
    if response is None:
        row.update(response="", error=row.get("error") or "no response")
    elif not isinstance(response, str):
        raise ValueError(f"{where}: response: got {str(response)[:60]!r}, want text or null")
    return key_of(row)


def _want(record: Row, kinds: dict[str, type], where: str) -> None:
    missing = [key for key in kinds if key not in record]
    if missing:
        raise ValueError(f"{where}: got keys {sorted(record)}, want {missing} as well")
    for key, kind in kinds.items():
        if not isinstance(record[key], kind):
            got = str(record[key])[:60]
            raise ValueError(f"{where}: {key}: got {got!r}, want it as {kind.__name__}")


def _read_lines(path: epath.Path) -> Iterable[tuple[int, Row]]:
    """(number from 1, object) of every whole line; blank ones are none."""
    if not path.exists():
        return
    *lines, _ = path.read_bytes().split(b"\n")
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, nested too deep
            raise ValueError(f"{where}: got {line[:80]!r}, want JSON ({error})") from None
        if not isinstance(row, dict):
            raise ValueError(f"{where}: got {line[:80]!r}, want a JSON object")
        yield number, row
