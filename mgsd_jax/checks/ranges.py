"""The values that a field of a config may have: stated in its annotation, checked and parsed here.

steps: Annotated[int, Between(1, 10**9)]
workers: Annotated[int, Between(1, 1000), FREE]
"""

import ast
import contextlib
import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

Hint = Any  # an annotation: a type, Annotated[...], Literal[...], tuple[...], X | None
_UNIONS = (types.UnionType, typing.Union)
FREE = "free"  # tag of a field that changes no result: a run may be resumed with another value


@dataclasses.dataclass(frozen=True)
class Between:
    """A number in a range, which includes its ends unless `above` or `below` is set; never NaN."""

    low: float
    high: float
    above: bool = False  # `low` itself is excluded
    below: bool = False  # `high` itself is
    also: int | None = None  # a value outside of the range that has a meaning of its own

    def wanted(self, value: float) -> str:
        """What is wanted in place of the value, '' if nothing is."""
        is_in = self.low <= value <= self.high
        is_end = (self.above and value == self.low) or (self.below and value == self.high)
        return "" if (is_in and not is_end) or value == self.also else self.spelled()

    def spelled(self) -> str:
        """The range in words."""
        other = "" if self.also is None else f"{self.also} or "
        if not self.above and not self.below:
            return f"{other}{self.low:,} to {self.high:,}"
        low = "more than" if self.above else "at least"
        high = "less than" if self.below else "at most"
        return f"{other}{low} {self.low:,} and {high} {self.high:,}"


@dataclasses.dataclass(frozen=True)
class Items:
    """Text or a tuple of some least length; no item, nor first part of a pair, is repeated."""

    least: int = 0
    repeated: bool = False  # allows repeated items

    def wanted(self, value: str | tuple[object, ...]) -> str:
        """As `Between.wanted`."""
        if isinstance(value, str):
            is_text = len(value) >= self.least and value == value.strip()
            return "" if is_text else "some text, without spaces around it"
        if len(value) < self.least:
            return f"{self.least} or more"
        if self.repeated:
            return ""
        names = [item[0] if isinstance(item, tuple) else item for item in value]
        twice = [name for i, name in enumerate(names) if name in names[:i]]
        return f"{shown(twice[0])} once" if twice else ""


@dataclasses.dataclass(frozen=True)
class Place:
    """A local path, or a URL of a kind that can be read and written."""

    def wanted(self, value: str) -> str:
        """As `Between.wanted`."""
        is_other = "://" in value and not value.startswith("gs://")
        return "a local path or gs://bucket/folder" if is_other else ""


@dataclasses.dataclass(frozen=True)
class Regex:
    """A regular expression."""

    def wanted(self, value: str) -> str:
        """As `Between.wanted`."""
        try:
            re.compile(value)
        except (re.error, OverflowError, RecursionError) as error:
            return f"a regex ({error})"
        return ""


@dataclasses.dataclass(frozen=True)
class Span:
    """A run of steps as `first:last`, both included and counted from 1; '' is none."""

    def wanted(self, value: str) -> str:
        """As `Between.wanted`."""
        found = re.fullmatch(r"([1-9]\d{0,8}):([1-9]\d{0,8})", value, re.ASCII)
        if not value or (found and int(found[1]) <= int(found[2])):
            return ""
        return "the first step and the last, such as 5:8"


def shown(value: object) -> str:
    """The value as an error message shows it, on one line and of bounded length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= 160 else text[:157] + "..."


def plain(kind: Hint) -> Hint:
    """The type without its tags."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


@functools.cache
def hints(kind: Hint) -> dict[str, Hint]:
    """The annotations of a dataclass, tags included."""
    return typing.get_type_hints(kind, include_extras=True)


def free(kind: Hint, prefix: str = "") -> Iterator[str]:
    """The fields tagged FREE, in a section and those below it: 'data.workers'."""
    for name, hint in hints(kind).items():
        if get_origin(hint) is Annotated and FREE in get_args(hint):
            yield prefix + name
        elif dataclasses.is_dataclass(hint):
            yield from free(hint, f"{prefix}{name}.")


def places(kind: Hint, prefix: str = "") -> Iterator[str]:
    """The fields that hold a path, or several, as `free` names them."""
    for name, hint in hints(kind).items():
        if dataclasses.is_dataclass(hint):
            yield from places(hint, f"{prefix}{name}.")
        elif _holds_place(hint):
            yield prefix + name


def _holds_place(hint: Hint) -> bool:
    return isinstance(hint, Place) or any(map(_holds_place, get_args(hint)))


def coerce(value: object, kind: Hint, where: str) -> Any:
    """`value` as type `kind`, or a ValueError that names `where`, what was got and what wanted."""
    wrong = ValueError(f"{where}: got {shown(value)}, want {_spell(kind)}")
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Annotated:
        value = coerce(value, kinds[0], where)
        for tag in kinds[1:]:
            want = "" if tag == FREE else tag.wanted(value)
            if want:
                raise ValueError(f"{where}: got {shown(value)}, want {want}")
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in kinds:
            raise wrong
        return value
    if origin in _UNIONS:  # X | None, X | Literal
        if value is None and type(None) in kinds:
            return None
        if isinstance(value, str) and get_origin(kinds[1]) is Literal:
            if value not in get_args(kinds[1]):
                raise wrong
            return value
        if get_origin(kinds[0]) is tuple and not isinstance(value, list | tuple):
            raise wrong
        return coerce(value, kinds[0], where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        if kinds[1:] == (Ellipsis,):
            kinds = kinds[:1] * len(value)
        if len(kinds) != len(value):
            raise wrong
        return tuple(coerce(item, k, where) for item, k in zip(value, kinds, strict=True))
    if dataclasses.is_dataclass(kind):
        return _build(value, kind, where, wrong)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    if isinstance(value, str) and "\0" in value:  # no path, no name and no regex that makes sense
        raise wrong
    return value


def _build(value: object, kind: Hint, where: str, wrong: ValueError) -> object:
    """The section from a dict, or from a section whose values may be of the wrong kind."""
    if isinstance(value, kind):
        value = vars(value)
    if not isinstance(value, dict):
        raise wrong
    known = hints(kind)
    unknown = sorted(value.keys() - known.keys())
    if unknown:
        raise ValueError(f"{where}: no field {unknown}, want some of {sorted(known)}")
    for field in dataclasses.fields(kind):
        if field.default is dataclasses.MISSING and field.name not in value:
            raise ValueError(f"{where}: {field.name} is required")
    return kind(**{k: coerce(v, known[k], f"{where}.{k}") for k, v in value.items()})


def replace_field(section: Any, path: list[str], text: str, where: str) -> Any:
    """The section with the field at `path` parsed from `text`. Raises ValueError."""
    name, *rest = path
    if not dataclasses.is_dataclass(section) or isinstance(section, type):
        raise ValueError(f"{where}: {type(section).__name__} has no field {name!r}")
    known = hints(type(section))
    if name not in known:
        raise ValueError(f"{where}: no field {name!r}, want one of {sorted(known)}")
    if rest:
        value = replace_field(getattr(section, name), rest, text, where)
    else:
        value = coerce(_parse(text, plain(known[name])), known[name], where)
    return dataclasses.replace(section, **{name: value})


def _parse(text: str, kind: Hint) -> object:
    """The text as a Python literal if it is one, else as it is."""
    if kind is str:
        is_quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        return text[1:-1] if is_quoted else text
    value: object = {"true": True, "false": False}.get(text, text)
    # The parser also raises TypeError for an unhashable key, the rest for nesting too deep.
    with contextlib.suppress(ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        value = ast.literal_eval(text)
    items = get_args(kind)
    if isinstance(value, str) and items[1:] == (Ellipsis,) and _is_text(plain(items[0])):
        return tuple(part.strip() for part in value.split(",") if part.strip())
    return value


def _is_text(kind: Hint) -> bool:
    return kind is str or get_origin(kind) is Literal


def spell(kind: Hint) -> str:
    """What a field of this type takes, in words."""
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Annotated:
        tags = [tag for tag in kinds[1:] if tag != FREE]
        if any(isinstance(tag, Place) for tag in tags):
            may_be_empty = not any(isinstance(tag, Items) for tag in tags)
            return "a path" + (" or nothing" if may_be_empty else "")
        if any(isinstance(tag, Regex) for tag in tags):
            return "a regular expression"
        if any(isinstance(tag, Span) for tag in tags):
            return "first:last, or nothing"
        ranges = [tag.spelled() for tag in tags if isinstance(tag, Between)]
        return ", ".join([spell(kinds[0]), *ranges])
    if origin is Literal:
        return " or ".join(kinds)
    if origin is tuple:
        if kinds[1:] == (Ellipsis,):
            return f"a tuple, each item {spell(kinds[0])}"
        return f"({'; '.join(map(spell, kinds))})"
    if origin in _UNIONS:
        return " or ".join(map(spell, kinds))
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    return words.get(kind) or str(getattr(kind, "__name__", kind))


def _is_item(kind: Hint) -> bool:
    """Whether values of the kind are items of a tuple, written as a dict of all their fields."""
    return dataclasses.is_dataclass(kind) and all(
        field.default is dataclasses.MISSING for field in dataclasses.fields(kind)
    )


def _spell(kind: Hint) -> str:
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _spell(kinds[0])
    if origin is Literal:
        return repr(kinds[0]) if len(kinds) == 1 else f"one of {kinds}"
    if origin in _UNIONS:
        return " or ".join(map(_spell, kinds))
    if origin is tuple:
        inner = ["..." if k is Ellipsis else _spell(k) for k in kinds]
        return f"tuple[{', '.join(inner)}]"
    if _is_item(kind):
        return f"{{{', '.join(f'{name!r}: {_spell(hint)}' for name, hint in hints(kind).items())}}}"
    return kind.__name__ if origin is None else str(kind)
