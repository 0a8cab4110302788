"""Whatever has become of a JSON file of ours, its reader ends with one line that names the file."""

import pathlib
import types
from collections.abc import Callable
from typing import Any, NotRequired, TypedDict
from unittest import mock

import pytest
from etils import epath
from helpers_tiny import tiny_config

from mgsd_jax import preflight
from mgsd_jax.checks import fields
from mgsd_jax.data import boards
from mgsd_jax.report import compare
from mgsd_jax.workdir import folders, stage_folder

BROKEN = (
    *(b"", b"{", b"\xff", b"null", b"7", b'"a"', b"[]", b"[" * 100_000, b"9" * 5000),
    *(b'{"a":' * 5000, b'{"a": 1,}', b"\x00", b"{'a': 1}"),
)
SOURCE = "grounding/model/source.json"


def finish(folder: pathlib.Path) -> None:
    (folder / SOURCE).parent.mkdir(exist_ok=True)
    (folder / SOURCE).touch()
    stage_folder.check_finished(str(folder / "grounding"))


def compare_settings(folder: pathlib.Path) -> None:
    (folder / "evaluate").mkdir(exist_ok=True)
    evaluation = types.SimpleNamespace(summary={"models": {"base": {"picture": {}}}})
    with mock.patch.object(compare.inputs, "read_evaluation", return_value=evaluation):
        compare.read_run(str(folder), "run")


READERS: dict[str, Callable[[pathlib.Path], Any]] = {
    "config.json": lambda folder: folders.check_config(folder, {}),
    "grounding/config.json": finish,
    "distillation/config.json": compare_settings,
    SOURCE: lambda folder: stage_folder.read_source(epath.Path(folder) / "grounding"),
    "manifest.json": lambda folder: boards.read_split(folder, "train"),
    "preflight.json": lambda folder: preflight._earlier(
        folder / "preflight.json", tiny_config(folder), "libtpu 0"
    ),
}


@pytest.mark.parametrize("name", READERS)
def test_a_broken_file_is_named(tmp_path: pathlib.Path, name: str) -> None:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    for content in BROKEN:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"(got|not found).*, want ") as raised:
            READERS[name](tmp_path)
        line = str(raised.value)
        assert line.startswith(f"{path}: ") and "\n" not in line and len(line) < 400, content


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ("{}", "weights: not found, want str"),
        ('{"weights": 3}', "weights: got 3, want str"),
        ('{"weights": "a", "lora": []}', "lora: got [], want dict"),
        ('{"weights": "a", "lora": {}, "complete": 1}', "complete: got 1, want bool"),
        (
            '{"weights": "a", "lora": {"rank": "two"}, "complete": true, "metric": "x"}',
            "lora.rank: got 'two', want int",
        ),
        (
            '{"weights": "a", "lora": {"ranks": 2}, "complete": true, "metric": "x"}',
            "lora: no field ['ranks'], want some of ['alpha', 'rank', 'targets']",
        ),
    ],
)
def test_a_field_of_a_source_is_named(tmp_path: pathlib.Path, content: str, line: str) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "source.json").write_text(content)
    with pytest.raises(ValueError) as raised:
        stage_folder.read_source(epath.Path(tmp_path))
    assert str(raised.value) == f"{tmp_path}/model/source.json: {line}"


def test_a_folder_in_place_of_a_file_is_none(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=f"{tmp_path}: not found, want a JSON object"):
        fields.read_json(tmp_path)


class Inner(TypedDict):
    count: int


class Outer(TypedDict):
    name: str | None
    parts: list[str]
    inner: Inner
    note: NotRequired[str]
    shares: NotRequired[dict[str, float | int] | None]
    rest: NotRequired[dict[str, Any]]


GOOD = {"name": None, "parts": [1], "inner": {"count": 1, "more": 2}, "rest": {"a": 5}, "else": 6}


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        ({}, ""),
        ({"name": "a"}, ""),
        ({"name": 1}, "name: got 1, want str or null"),
        ({"parts": ()}, "parts: got (), want list"),
        ({"inner": None}, "inner: got None, want dict"),
        ({"inner": {}}, "inner: got keys [], want ['count'] as well"),
        ({"inner": {"count": True}}, "inner: count: got True, want int"),
        ({"inner": {"count": 1.0}}, "inner: count: got 1.0, want int"),
        ({"note": "a", "shares": {"hole": 1, "goal": 0.5}}, ""),
        ({"shares": None}, ""),
        ({"note": 5}, "note: got 5, want str"),
        ({"shares": 3}, "shares: got 3, want dict or null"),
        ({"shares": {"hole": "x"}}, "shares: hole: got 'x', want float or int"),
        ({"shares": {"hole": True}}, "shares: hole: got True, want float or int"),
    ],
)
def test_a_record_has_keys_of_its_types(changes: dict[str, Any], line: str) -> None:
    """Keys without a type, and what is inside of a list, are not looked at."""
    if not line:
        assert fields.check_record(GOOD | changes, Outer, "x") == GOOD | changes
        return
    with pytest.raises(ValueError) as raised:
        fields.check_record(GOOD | changes, Outer, "x")
    assert str(raised.value) == f"x: {line}"


def test_all_absent_keys_of_a_record_are_named() -> None:
    with pytest.raises(ValueError, match=r"^x: got keys \['name'\], want \['parts', 'inner'\] as"):
        fields.check_record({"name": ""}, Outer, "x")
