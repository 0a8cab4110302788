"""Board files: `key=value` lines and one block with a line for each row of the board.

Errors name the key, what was found and what was wanted; `Env.from_text` puts the file in front.
"""

import dataclasses
import json
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Generic, NamedTuple, TypeVar

from mgsd_jax.envs.search import Cell, Plan

State = TypeVar("State")


class BoardText(NamedTuple):
    """A board file taken apart: the text after each key, and the lines of the block."""

    fields: Mapping[str, str]
    rows: tuple[str, ...]


def trajectory_of_cells(plan: Plan, cells: Iterable[Cell]) -> str:
    """The cells that a plan visits, as JSON."""
    return json_text(tuple(cells))


@dataclasses.dataclass(frozen=True)
class FileFormat(Generic[State]):
    """How the board files of an env are laid out."""

    keys: tuple[str, ...]  # in the order in which they are written
    block: str  # the name of the block
    rows: Callable[[State], Iterable[str]]  # its lines
    read: Callable[[BoardText], State]  # raises ValueError that begins with the key or the block
    # The env's own keys: (state, a shortest plan, the file that is read or None) -> values.
    fields: Callable[[State, Plan, BoardText | None], Mapping[str, object]]
    # `trajectory_states`: (plan, cells that it visits) -> JSON
    trajectory: Callable[[Plan, Iterable[Cell]], str] = trajectory_of_cells


def bad_board(key: str, got: object, want: object) -> ValueError:
    """The error about a key, with long values cut."""
    shown = [text if len(text) <= 200 else text[:200] + "..." for text in (f"{got}", f"{want}")]
    return ValueError(f"{key}: got {shown[0]}, want {shown[1]}")


def take_apart(text: str, keys: tuple[str, ...], block: str) -> BoardText:
    """A board file taken apart. Raises ValueError on a missing, unknown or repeated key."""
    lines = text.splitlines()
    end = lines.index(f"{block}:") if f"{block}:" in lines else len(lines)
    fields: dict[str, str] = {}
    for line in lines[:end]:
        key, equals, value = line.partition("=")
        if not equals or key not in keys:
            raise bad_board(key, repr(line), f"one of the lines key=value of {keys}")
        if key in fields:
            raise bad_board(key, "the key twice", "it once")
        fields[key] = value
    for key in keys:
        if key not in fields:
            raise bad_board(key, "no such line", f"{key}=...")
    if end == len(lines):
        raise bad_board(block, "no such block", f"'{block}:' and the rows of the board")
    return BoardText(fields, tuple(lines[end + 1 :]))


def put_together(values: Mapping[str, object], file: FileFormat[State], state: State) -> str:
    """The text of a board file."""
    if values.keys() != set(file.keys):
        raise ValueError(f"keys: got {sorted(values)}, want {sorted(file.keys)}")
    lines = [f"{key}={values[key]}" for key in file.keys]
    return "\n".join([*lines, f"{file.block}:", *file.rows(state)]) + "\n"


def integer(board: BoardText, key: str) -> int:
    """The integer of a key."""
    text = board.fields[key]
    if not re.fullmatch(r"-?[0-9]{1,18}", text):
        raise bad_board(key, repr(text), "an integer")
    return int(text)


def number(board: BoardText, key: str) -> float:
    """The number of a key."""
    try:
        return float(board.fields[key])
    except ValueError:
        raise bad_board(key, repr(board.fields[key]), "a number") from None


def json_value(board: BoardText, key: str) -> object:
    """The JSON value of a key."""
    try:
        return json.loads(board.fields[key])
    except ValueError:
        raise bad_board(key, repr(board.fields[key]), "JSON") from None


def json_text(value: object, *, compact: bool = False) -> str:
    """A value as one line of JSON."""
    return json.dumps(value, separators=(",", ":") if compact else (", ", ": "))


def check_field(board: BoardText, key: str, want: object) -> None:
    """Raises ValueError unless a key has the text that would be written for it.

    JSON may be spaced in another way.
    """
    got, text = board.fields[key], f"{want}"
    if got == text:
        return
    # Compared as text again, since Python takes true for 1 and 6.0 for 6.
    is_json = text[:1] in [*"[{-0123456789"]
    values = (json_value(board, key), json.loads(text)) if is_json else (got, text)
    if len({json.dumps(value, sort_keys=True) for value in values}) > 1:
        raise bad_board(key, got, text)
