"""What a field of a config may hold, said in its annotation, and values held against it.

steps: Annotated[int, Between(1, 10**9)]
workers: Annotated[int, Between(1, 1000), FREE]
"""

import dataclasses
import functools
import re
import types
import typing
from collections.abc import Iterator
from typing import Annotated, Any, Literal, get_args, get_origin

FREE = "free"  # tag of a field that changes no result: a run may go on under another value


@dataclasses.dataclass(frozen=True)
class Between:
    """A number in a range, its ends included unless said otherwise. NaN is in none."""

    low: float
    high: float
    above: bool = False  # `low` itself is excluded
    below: bool = False  # `high` itself is
    also: int | None = None  # a value outside of the range that has a meaning of its own

    def wanted(self, value: float) -> str:
        """What is wanted in place of the value, '' if nothing is."""
        is_high = value > self.low if self.above else value >= self.low
        is_low = value < self.high if self.below else value <= self.high
        if (is_high and is_low) or value == self.also:
            return ""
        other = "" if self.also is None else f"{self.also} or "
        if not self.above and not self.below:
            return f"{other}{self.low:,} to {self.high:,}"
        low, high = (
            "more than" if self.above else "at least",
            "less than" if self.below else "at most",
        )
        return f"{other}{low} {self.low:,} and {high} {self.high:,}"


@dataclasses.dataclass(frozen=True)
class Items:
    """Text or a tuple of some length; no item stands there twice, nor the first part of a pair."""

    least: int = 0
    repeated: bool = False  # they may

    def wanted(self, value: str | tuple[Any, ...]) -> str:
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
    """A path of this machine, or a URL of the one kind that is read and written."""

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


def shown(value: Any) -> str:
    """The value as an error message shows it, on one line and of bounded length."""
    try:
        text = repr(value)
    except (ValueError, RecursionError):  # an integer of more digits than Python prints
        return f"{type(value).__name__} too large to show"
    return text if len(text) <= 160 else text[:157] + "..."


def plain(kind: Any) -> Any:
    """The type without its tags."""
    return get_args(kind)[0] if get_origin(kind) is Annotated else kind


@functools.cache
def hints(kind: Any) -> dict[str, Any]:
    """The annotations of a dataclass, tags included."""
    return typing.get_type_hints(kind, include_extras=True)


def free(kind: Any, prefix: str = "") -> Iterator[str]:
    """The fields tagged FREE, in a section and those below it: 'data.workers'."""
    for name, hint in hints(kind).items():
        if get_origin(hint) is Annotated and FREE in get_args(hint):
            yield prefix + name
        elif dataclasses.is_dataclass(hint):
            yield from free(hint, f"{prefix}{name}.")


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as type `kind`, or a ValueError that names `where`, what was got and what wanted."""
    wrong = ValueError(f"{where}: got {shown(value)}, want {_spell(kind)}")
    origin = get_origin(kind)
    if origin is Annotated:
        value = coerce(value, get_args(kind)[0], where)
        for tag in get_args(kind)[1:]:
            want = "" if tag == FREE else tag.wanted(value)
            if want:
                raise ValueError(f"{where}: got {shown(value)}, want {want}")
        return value
    if origin is Literal:
        if not isinstance(value, str) or value not in get_args(kind):
            raise wrong
        return value
    if origin in (types.UnionType, typing.Union):
        options = get_args(kind)
        if value is None and type(None) in options:
            return None
        return coerce(value, next(k for k in options if k is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        kinds = get_args(kind)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return tuple(coerce(item, kinds[0], where) for item in value)
        if len(kinds) != len(value):
            raise wrong
        return tuple(coerce(item, k, where) for item, k in zip(value, kinds, strict=True))
    if dataclasses.is_dataclass(kind):
        return _build(value, kind, where, wrong)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:
            raise wrong from None
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    if isinstance(value, str) and "\0" in value:  # no path, no name and no regex that makes sense
        raise wrong
    return value


def _build(value: Any, kind: Any, where: str, wrong: ValueError) -> Any:
    if isinstance(value, kind):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise wrong
    known = hints(kind)
    unknown = sorted(set(value) - set(known))
    if unknown:
        raise ValueError(f"{where}: no field {unknown}, want some of {sorted(known)}")
    try:
        return kind(**{k: coerce(v, known[k], f"{where}.{k}") for k, v in value.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _spell(kind: Any) -> str:
    origin, kinds = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _spell(kinds[0])
    if origin is Literal:
        return f"one of {kinds}"
    if origin is tuple:
        inner = ["..." if k is Ellipsis else _spell(k) for k in kinds]
        return f"tuple[{', '.join(inner)}]"
    return kind.__name__ if origin is None else str(kind)
