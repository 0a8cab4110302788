"""The rows of an evaluation: their form, and their files.

An evaluation folder holds `boards.jsonl`, one line for each board (task, level, index, case,
task_text), `models.json`, {model: its identity}, and `rows.jsonl`, one line for each answer,
appended. If a kill cuts the last line short, that line is dropped and its answer is asked for
again. A failed request leaves a row with `error`, and a row of another program without a response
counts as one; the row of a later try stands below it and replaces it. Where files cannot be
appended to (`gs://`), each batch of rows is a file `rows-N.jsonl` until the evaluation is complete.

Rows are typed dicts, not dataclasses: they are JSON that other programs write too, and rewriting
the file must neither drop a key that we do not know nor add one that an older row does not have.
"""

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NotRequired, TypedDict, TypeGuard, cast

from absl import logging
from etils import epath

from mgsd_jax.checks import fields
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.scoring import PerceptionScore, PlanScore
from mgsd_jax.workdir import paths

ROWS_FILE = "rows.jsonl"
BOARDS_FILE = "boards.jsonl"
MODELS_FILE = "models.json"
PARTS = "rows-*.jsonl"

BoardKey = tuple[str, int, int]  # task, level, index: what pairs the rows of two models
Key = tuple[str, str, BoardKey, int]  # model, mode, board, attempt


class BoardFields(TypedDict):
    """What names a board."""

    task: str
    level: int
    index: int


class BoardLine(BoardFields):
    """A line of `boards.jsonl`."""

    task_text: str  # the board file
    case: NotRequired[str]  # the board's name in its benchmark


class KeyFields(BoardFields):
    """What a row is the answer to; no two rows of an evaluation share all of it."""

    model: str
    mode: str
    attempt: int


class Row(KeyFields):
    """One answered prompt."""

    id: str
    response: str
    task_text: str  # from `boards.jsonl`; evaluations of an older version hold it in every row
    same_as: NotRequired[int]  # the index of an earlier board with the same content
    error: NotRequired[str]  # why the request failed


class PlanRow(Row, PlanScore):
    """The row of an answer that was asked for a plan."""

    truncated: bool
    response_tokens: int | None


class PerceptionRow(Row, PerceptionScore):
    """The row of an answer to the questions about a picture."""


def plans(rows: Iterable[Row], mode: str) -> list[PlanRow]:
    """The rows of a mode that asks for a plan."""
    return [cast(PlanRow, row) for row in rows if row["mode"] == mode and not is_perception(row)]


def is_perception(row: Row) -> TypeGuard[PerceptionRow]:
    return row["mode"] == "perception"


def board_of(row: BoardFields) -> BoardKey:
    """What names the board of a row, the same for every model and mode."""
    return row["task"], row["level"], row["index"]


def key_of(row: KeyFields) -> Key:
    """What a row is the answer to, to look it up by."""
    return row["model"], row["mode"], board_of(row), row["attempt"]


def board_text(board: Board) -> str:
    """The board file of a board that is asked about."""
    return ENVS[board.task].to_text(board.state, split="test", index=board.index, seed=0)


def write_boards(folder: epath.PathLike, boards: Sequence[Board], cases: Sequence[str]) -> None:
    """Writes `boards.jsonl` in one piece; `cases` are the boards' names in their benchmark.

    Raises ValueError if the folder has rows about other boards.
    """
    text = "".join(
        _line(
            {
                "task": board.task,
                "level": board.level,
                "index": board.index,
                "case": case,
                "task_text": board_text(board),
            }
        )
        for board, case in zip(boards, cases, strict=True)
    )
    path = epath.Path(folder) / BOARDS_FILE
    if not path.exists():
        paths.write_whole(path, text)
    elif path.read_text() != text:
        raise ValueError(
            f"{path}: got the boards of another evaluation, want those of this one; "
            "set evaluate.folder to a new folder"
        )


def check_models(folder: epath.PathLike, identities: Mapping[str, str]) -> None:
    """Raises ValueError if `models.json` has another identity for one of these models."""
    path, noted = _models(folder)
    for name, identity in identities.items():
        if noted.get(name, identity) != identity:
            raise ValueError(
                f"{path}: {name}: got rows of another model than the one that has this name now, "
                f"want rows of one model; remove {path.parent} to ask again, or set "
                "evaluate.folder to a new folder"
            )


def add_model(folder: epath.PathLike, name: str, identity: str) -> None:
    """Records in `models.json` which model gave the rows of a name."""
    path, noted = _models(folder)
    paths.write_whole(path, json.dumps(noted | {name: identity}, indent=2) + "\n")


def _models(folder: epath.PathLike) -> tuple[epath.Path, dict[str, object]]:
    path = epath.Path(folder) / MODELS_FILE
    return path, fields.read_json(path) if path.is_file() else {}


def read_rows(folder: epath.PathLike) -> list[Row]:
    """The rows of an evaluation folder, in the order of their first tries, with `task_text`.

    Rows about a board that repeats an earlier one also get `same_as`. Only the keys that tell rows
    apart are checked here; `summary.check_rows` checks the rest. Raises ValueError with file and
    line if a line is no row, or its board is unknown. A last line without its end is left out.
    """
    root = epath.Path(folder)
    boards = _read_boards(root / BOARDS_FILE)
    repeats = _repeats(boards)
    rows: dict[Key, Row] = {}
    for path in [root / ROWS_FILE, *sorted(root.glob(PARTS))]:
        for where, line in _read_lines(path):
            row = _read_row(line, where, boards)
            if board_of(row) in repeats:
                row["same_as"] = repeats[board_of(row)]
            # Only a failed request is asked again, so a later row is the better one.
            key = key_of(row)
            if key not in rows or "error" in rows[key]:
                rows[key] = row
    return list(rows.values())


def append(folder: epath.PathLike, rows: Sequence[Mapping[str, object]]) -> None:
    """Adds rows as `scoring.score_row` makes them, and returns when they are on disk."""
    root = epath.Path(folder)
    text = "".join(map(_line, rows))
    if paths.is_remote(root):
        names = sorted(path.name for path in root.glob(PARTS))
        number = int(names[-1].removeprefix("rows-").removesuffix(".jsonl")) + 1 if names else 0
        paths.write_whole(root / f"rows-{number:06d}.jsonl", text)
        return
    with open(root / ROWS_FILE, "a", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def drop_cut_line(folder: epath.PathLike) -> None:
    """Drops a last line that a kill cut short, so that the next row starts on a line of its own."""
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
    read = ("task_text", "same_as")  # what `read_rows` has added
    kept = [{key: value for key, value in row.items() if key not in read} for row in rows]
    paths.write_whole(root / ROWS_FILE, "".join(map(_line, kept)))
    for path in root.glob(PARTS):
        path.unlink()


def _line(record: Mapping[str, object]) -> str:
    return json.dumps(record) + "\n"


def _read_boards(path: epath.Path) -> dict[BoardKey, str]:
    boards: dict[BoardKey, str] = {}
    for where, line in _read_lines(path):
        board = fields.check_record(line, BoardLine, where)
        boards[board_of(board)] = board["task_text"]
    return boards


def _repeats(boards: Mapping[BoardKey, str]) -> dict[BoardKey, int]:
    """The boards that differ from an earlier one in their index alone, with the index of that."""
    first: dict[tuple[str, int, str], int] = {}
    found: dict[BoardKey, int] = {}
    for (task, level, index), text in boards.items():
        content = text.replace(f"\nindex={index}\n", "\n", 1)
        same = first.setdefault((task, level, content), index)
        if same != index:
            found[task, level, index] = same
    return found


def _read_row(line: dict[str, object], where: str, boards: Mapping[BoardKey, str]) -> Row:
    line.setdefault("attempt", 0)  # older evaluations had one answer a board
    board = board_of(fields.check_record(line, KeyFields, where))
    response = line.get("response", "")
    if response is None:
        line |= {"response": "", "error": line.get("error") or "no response"}
    elif not isinstance(response, str):
        raise ValueError(f"{where}: response: got {str(response)[:60]!r}, want text or null")
    if board in boards:
        line["task_text"] = boards[board]
    elif "task_text" not in line:
        raise ValueError(f"{where}: got a row about {board}, want it in {BOARDS_FILE}")
    return cast(Row, line)  # `summary.check_rows` checks the other keys


def _read_lines(path: epath.Path) -> Iterator[tuple[str, dict[str, object]]]:
    """(where it stands, object) of every complete line; blank ones are skipped."""
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    for number, line in enumerate(lines, start=1):
        if line.strip():
            where = f"{path}, line {number}"
            yield where, fields.read_line(line, where)
