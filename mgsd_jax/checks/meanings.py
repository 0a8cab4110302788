"""What the fields of a config mean, read off its source: the comment of each field.

    steps: Steps = 828  # updates in all

A comment stands beside the field, or in whole lines right above it.
"""

import ast
import dataclasses
import functools
import inspect
import io
import textwrap
import tokenize
from collections.abc import Iterator
from typing import NamedTuple, get_args, get_origin

from mgsd_jax.checks import ranges

WIDTH = 100


class Field(NamedTuple):
    """One field of a config, as `--help_config` shows it."""

    name: str  # 'data.workers'
    values: str  # which it takes
    default: str  # '' where it has none
    meaning: str
    is_free: bool  # it changes no result


@functools.cache
def comments(kind: type) -> dict[str, str]:
    """The comment of each field of a dataclass; '' where it has none."""
    source = textwrap.dedent(inspect.getsource(kind))
    said: dict[int, str] = {}  # line -> its comment
    alone: set[int] = set()  # lines that are nothing but a comment
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            said[token.start[0]] = token.string.lstrip("# ")
            if token.line.strip() == token.string:
                alone.add(token.start[0])
    (definition,) = ast.parse(source).body
    assert isinstance(definition, ast.ClassDef)
    found: dict[str, str] = {}
    for node in definition.body:
        if not (isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name)):
            continue
        first = node.lineno
        while first - 1 in alone:
            first -= 1
        lines = range(first, (node.end_lineno or node.lineno) + 1)
        found[node.target.id] = " ".join(said[line] for line in lines if line in said)
    return found


def fields(kind: type, default: object = None, prefix: str = "") -> Iterator[Field]:
    """Every field of a section and of the sections in it; `default` is a value of the section."""
    for field in dataclasses.fields(kind):
        hint, name = ranges.hints(kind)[field.name], prefix + field.name
        value = getattr(default, field.name, field.default)
        section = _section(hint)
        if section is not None:
            yield from fields(section, value, f"{name}.")
            continue
        tags = get_args(hint)[1:] if get_origin(hint) is not None else ()
        has_default = value is not dataclasses.MISSING
        shown = repr(value) if has_default else ""
        meaning = comments(kind)[field.name]
        yield Field(name, ranges.spell(hint), shown, meaning, ranges.FREE in tags)
        item = next((k for k in get_args(ranges.plain(hint)) if dataclasses.is_dataclass(k)), None)
        if isinstance(item, type):  # a tuple of sections
            yield from fields(item, None, f"{name}[].")


def _section(hint: ranges.Hint) -> type | None:
    """The dataclass of a field that is a section, or may be one."""
    for kind in (hint, *(() if get_origin(hint) is tuple else get_args(hint))):
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            return kind
    return None


def table(kind: type, only: str = "") -> str:
    """The text of `--help_config`: all fields, or those of one section. Raises ValueError."""
    lines: list[str] = []
    for section, hint in ranges.hints(kind).items():
        chosen = [f for f in fields(kind) if f"{f.name}.".startswith(f"{section}.")]
        chosen = [f for f in chosen if not only or f"{f.name}.".startswith(f"{only}.")]
        below = _section(hint)
        if chosen and below is not None:
            said = f"{section}: {' '.join((below.__doc__ or '').split())}"
            lines += textwrap.wrap(said, WIDTH, subsequent_indent="  ")
        for field in chosen:
            lines += _shown(field)
        lines += [""] if chosen else []
    if not lines:
        known = [*ranges.hints(kind)]
        raise ValueError(f"--help_config: got {only!r}, want a field or one of {known}")
    return "\n".join(lines[:-1])


def _shown(field: Field) -> list[str]:
    default = f" = {field.default}" if field.default else "  (no default)"
    free = " A run may go on with another value." if field.is_free else ""
    meaning = field.meaning[:1].upper() + field.meaning[1:].rstrip(".")
    said = f"{meaning}. Takes {field.values}.{free}"
    return [
        f"  {field.name}{default}",
        *textwrap.wrap(said, WIDTH, initial_indent=" " * 6, subsequent_indent=" " * 6),
    ]
