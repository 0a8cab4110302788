"""JSON settings of the folders of models and runs, read whole and field by field, with checks.

Every error is a ValueError of one line: file, field, what was found, what was wanted.
"""

import functools
import json
import math
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, TypeVar, get_args, get_origin

from etils import epath

from mgsd_jax.checks.ranges import Hint, shown

Json = dict[str, Any]  # an object as json.loads gives it back
Kind = type | tuple[type, ...]
Record = TypeVar("Record")  # a TypedDict
LARGEST = 2**31 - 1  # more than any size that a model has


def read_json(path: Path | epath.Path) -> Json:
    """The object in a JSON file. Raises ValueError where it is missing, broken or no object."""
    if not path.is_file():
        raise ValueError(f"{path}: not found, want a JSON object")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except RecursionError:
        raise ValueError(f"{path}: got JSON nested too deep, want a JSON object") from None
    except ValueError as error:  # broken JSON and broken UTF-8 are both ValueErrors
        raise ValueError(f"{path}: got no valid JSON ({error}), want a JSON object") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, want a JSON object")
    return content


def read_line(line: bytes, source: str) -> Json:
    """The object in one line of a JSON lines file. Raises ValueError if there is none."""
    try:
        content = json.loads(line)
    except (ValueError, RecursionError) as error:  # broken JSON or UTF-8, nested too deep
        raise ValueError(f"{source}: got {line[:80]!r}, want JSON ({error})") from None
    if not isinstance(content, dict):
        raise ValueError(f"{source}: got {line[:80]!r}, want a JSON object")
    return content


def check_record(record: Mapping[str, object], kind: type[Record], source: str) -> Record:
    """The object as a TypedDict.

    Raises ValueError if a required key is absent, or a key that is there of another type. Only the
    outermost type of a value is checked, and those of what a TypedDict or a dict inside holds.
    """
    required = kind.__required_keys__  # pyrefly: ignore[missing-attribute]  # a TypedDict's
    hints = _hints(kind)
    missing = [name for name in hints if name in required and name not in record]
    if missing:
        raise ValueError(f"{source}: got keys {sorted(record)}, want {missing} as well")
    for name, hint in hints.items():
        if name in record:
            _check_value(record[name], hint, f"{source}: {name}")
    return typing.cast(Record, record)


@functools.cache
def _hints(kind: type) -> dict[str, Hint]:
    """The types of a TypedDict's keys, which take longer to look up than a row to check."""
    return typing.get_type_hints(kind)


def _check_value(value: object, hint: Hint, source: str) -> None:
    if hint is Any:
        return
    kinds = _json_types(hint)
    if type(value) not in kinds:
        raise ValueError(f"{source}: got {shown(value)}, want {_kind_name(kinds)}")
    if not isinstance(value, dict):
        return
    if typing.is_typeddict(hint):
        check_record(value, hint, source)
        return
    (held,) = [of for of in (hint, *get_args(hint)) if get_origin(of) is dict]
    for key, inside in value.items():
        _check_value(inside, get_args(held)[1], f"{source}: {key}")


def _json_types(hint: Hint) -> tuple[type, ...]:
    """What json.loads makes of a value so annotated: list[str] | None -> (list, NoneType)."""
    if get_origin(hint) in (types.UnionType, typing.Union):
        return tuple(kind for part in get_args(hint) for kind in _json_types(part))
    return (dict,) if typing.is_typeddict(hint) else (get_origin(hint) or hint,)


def field(content: Mapping[str, object], name: str, kind: Kind, source: object) -> Any:
    """The value at `a.b` of a file's object. Raises ValueError unless it is there, of that kind.

    true and false are no numbers; a float may be written as a whole number, and has to be finite.
    """
    value: object = content
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{source}: {name}: not found, want {_kind_name(kind)}")
        value = value[key]
    if kind is float and type(value) is int and abs(value) <= LARGEST:
        value = float(value)
    is_wrong = not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool)
    if is_wrong or (isinstance(value, float) and not math.isfinite(value)):
        raise ValueError(f"{source}: {name}: got {shown(value)}, want {_kind_name(kind)}")
    return value


def optional(content: Mapping[str, object], name: str, kind: Kind, source: object) -> Any:
    """As `field`, but None where the value is absent or null."""
    return None if content.get(name) is None else field(content, name, kind, source)


def whole(
    content: Mapping[str, object], name: str, source: object, *, low: int = 1, high: int = LARGEST
) -> int:
    """The whole number at `a.b`. Raises ValueError unless it is from `low` to `high`."""
    value = field(content, name, int, source)
    if not low <= value <= high:
        raise ValueError(
            f"{source}: {name}: got {shown(value)}, want a number from {low} to {high}"
        )
    return value


def positive(content: Mapping[str, object], name: str, source: object) -> float:
    """The number at `a.b`. Raises ValueError unless it is finite and above 0."""
    value = field(content, name, float, source)
    if value <= 0:
        raise ValueError(f"{source}: {name}: got {value}, want a number above 0")
    return value


def expect(
    content: Mapping[str, object], name: str, wanted: Sequence[object], source: object
) -> None:
    """Raises ValueError where the field is there with a value that is not one of `wanted`."""
    if name in content and not any(
        type(content[name]) is type(want) and content[name] == want for want in wanted
    ):
        listed = " or ".join(shown(want) for want in wanted)
        raise ValueError(f"{source}: {name}: got {shown(content[name])}, want {listed}")


def _kind_name(kind: Kind) -> str:
    kinds = kind if isinstance(kind, tuple) else (kind,)
    return " or ".join("null" if one is NoneType else one.__name__ for one in kinds)
