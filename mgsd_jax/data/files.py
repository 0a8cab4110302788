"""JSON settings of a checkpoint folder, read with checks."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file. Raises ValueError where it is missing, broken or no object."""
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, want a JSON object")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:  # broken JSON and broken UTF-8 are both ValueErrors
        raise ValueError(f"{path}: got broken JSON ({error}), want a JSON object") from error
    if not isinstance(content, dict):
        raise ValueError(f"{path}: got {type(content).__name__}, want a JSON object")
    return content


def field(content: Mapping[str, Any], name: str, kind: type, path: Path) -> Any:
    """The value at `a.b` of a file's object. Raises ValueError unless it is there, of that type."""
    value: Any = content
    for key in name.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"{path}: {name}: got nothing, want {kind.__name__}")
        value = value[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        raise ValueError(f"{path}: {name}: got {value!r}, want {kind.__name__}")
    return value
