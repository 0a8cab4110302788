"""Sections of a config, dataclasses of one another, as text and as JSON."""

import dataclasses
import json
import typing
from collections.abc import Iterator, Sequence
from typing import Any, TypeVar

from mgsd_jax.checks.fields import Json
from mgsd_jax.checks.ranges import replace_field

Section = TypeVar("Section")  # a dataclass whose fields are annotated as ranges.py says


def override(config: Section, assignments: Sequence[str]) -> Section:
    """A copy of `config` with 'a.b=value' assignments applied, left to right.

    Values are Python literals (`1e-4`, `(3, 4)`, `None`) or bare strings, for a tuple of strings
    several with commas between them. Raises ValueError for an unknown field (listing the known
    ones) and for a value of the wrong type.

    With ['optim.lr=1e-4'] the section `optim` has a copy too, whose `lr` is 0.0001.
    """
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set: got {assignment!r}, want a.b=value")
        path = name.strip()
        config = replace_field(config, path.split("."), text.strip(), f"--set {path}")
    return config


def defaults(kind: type) -> Json:
    """The default of each field of a section and of the sections in it, as plain JSON types.

    Fields without a default are left out.
    """
    found: Json = {}
    for field in dataclasses.fields(kind):
        section = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(section):
            found[field.name] = defaults(typing.cast(type, section))
        elif field.default is not dataclasses.MISSING:
            found[field.name] = json.loads(json.dumps(field.default))
    return found


def to_dict(config: Any) -> Json:
    """The config as plain JSON types (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def to_text(config: Any) -> str:
    """The config as lines 'a.b=value', each of which --set takes; long tuples have more lines."""
    return "\n".join(_lines(config, ""))


def _lines(section: Any, prefix: str) -> Iterator[str]:
    for field in dataclasses.fields(section):
        value = getattr(section, field.name)
        if dataclasses.is_dataclass(value):
            yield from _lines(value, f"{prefix}{field.name}.")
            continue
        if isinstance(value, tuple):
            value = tuple(_plain(item) for item in value)
        text = value if isinstance(value, str) else repr(value)
        line = f"{prefix}{field.name}={text}"
        if len(line) > 100 and isinstance(value, tuple):
            items = "".join(f"    {item!r},\n" for item in value)
            line = f"{prefix}{field.name}=(\n{items})"
        yield line


def _plain(item: object) -> object:
    """An item of a tuple, as a dict where it is a section."""
    if dataclasses.is_dataclass(item) and not isinstance(item, type):
        return dataclasses.asdict(item)
    return item
