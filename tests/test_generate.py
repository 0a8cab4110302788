"""The generate stage: what it writes reads back, starts again where it stopped, and is checked."""

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.data import boards as boards_lib
from mgsd_jax.data import splits
from mgsd_jax.data.benchmarks import benchmark_keys
from mgsd_jax.envs import ENVS
from mgsd_jax.stages import generate
from mgsd_jax.workdir import folders
from mgsd_jax.workdir.contents import identity

ROOT = pathlib.Path(__file__).parents[1]
BENCHMARKS = ROOT / "tests" / "data" / "benchmarks"
LEVELS = (
    config_lib.LevelSet("frozenlake", (3, 4), 6, 2, 3),
    config_lib.LevelSet("maze", (3,), 4, 0, 2),
    config_lib.LevelSet("minibehaviour", (5,), 3, 2, 2),
)


def make_config(**data: Any) -> config_lib.Config:
    """A config whose boards are `LEVELS`; stages other than generate read nothing of it here."""
    optim = config_lib.OptimConfig(lr=1.0)
    return config_lib.Config(
        model=config_lib.ModelConfig(path=""),
        data=dataclasses.replace(config_lib.DataConfig(boards=LEVELS, picture_size=64), **data),
        grounding=config_lib.GroundingConfig(optim=optim),
        distillation=config_lib.DistillationConfig(optim=optim),
        evaluate=config_lib.EvaluateConfig(models=()),
    )


def contents(folder: pathlib.Path) -> dict[str, bytes]:
    """Every file but those that say when they were written, and by what command."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    files = [path for path in files if path.name not in (folders.RUNS_FILE, folders.ENDS_FILE)]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


@pytest.fixture
def written(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of boards."""
    generate.run(make_config(), str(tmp_path))
    return tmp_path / "data"


def test_layout_and_pictures(written: pathlib.Path) -> None:
    names = set(contents(written))
    assert {"manifest.json", "settings.json"} <= names
    for name in (
        *("train/FrozenLake/level3/text/0005.txt", "train/FrozenLake/level3/image/0005.png"),
        *("val/FrozenLake/level4/text/0001.txt", "test/Maze/level3/image/0001.png"),
        "train/MiniBehaviour/level5/text/0002.txt",
    ):
        assert name in names
    assert not any(name.startswith("val/Maze") or name.endswith(".partial") for name in names)
    boards = 12 + 4 + 3 + 4 + 0 + 2 + 6 + 2 + 2
    assert len(names) == 2 + 2 * boards
    for split in splits.SPLITS:
        for board in boards_lib.read_split(written, split):
            folder = written / split / ENVS[board.task].title / f"level{board.level}"
            with Image.open(folder / "image" / f"{board.index:04d}.png") as picture:
                assert picture.mode == "RGB"
                drawn = ENVS[board.task].render(board.state, 64)
                np.testing.assert_array_equal(np.asarray(picture), drawn)


def test_boards_read_back_in_order_and_belong_to_their_split(written: pathlib.Path) -> None:
    every: dict[str, str] = {}
    for split in splits.SPLITS:
        boards = boards_lib.read_split(written, split)
        want = [
            (levels.task, level, index)
            for levels in LEVELS
            for level in levels.levels
            for index in range(getattr(levels, split))
        ]
        assert [(board.task, board.level, board.index) for board in boards] == want
        for board in boards:
            key = ENVS[board.task].key(board.state)
            assert board.state.size == board.level
            assert splits.split_of(key) == split
            assert every.setdefault(key, split) == split
    assert len(every) == 35


def test_boards_are_read_without_their_pictures(written: pathlib.Path) -> None:
    """A run draws what it shows from the states: it reads no picture at its start."""
    before = [list(boards_lib.read_split(written, split)) for split in splits.SPLITS]
    pictures = [path for path in written.rglob("*") if path.suffix == ".png"]
    assert pictures
    for path in pictures:
        path.unlink()
    assert [list(boards_lib.read_split(written, split)) for split in splits.SPLITS] == before


def test_the_manifest_says_what_is_there(written: pathlib.Path) -> None:
    manifest = json.loads((written / "manifest.json").read_text())
    settings = manifest["settings"]
    assert settings == json.loads((written / "settings.json").read_text())
    assert settings["seed"] == 0
    assert settings["counts"]["maze/level3"] == {"train": 4, "val": 0, "test": 2}
    assert settings["shares_percent"] == {"train": 80, "val": 10, "test": 10}
    assert settings["options"]["frozenlake"]["frozen_probability"] == 0.9
    assert settings["excluded"]["boards"] == 0
    listed = {
        f"{group['folder']}/{kind}/{index:04d}.{ending}": group[kind][index]
        for group in manifest["groups"]
        for kind, ending in (("text", "txt"), ("image", "png"))
        for index in range(group["count"])
    }
    files = contents(written)
    assert listed.keys() == files.keys() - {"manifest.json", "settings.json"}
    for name, digest in listed.items():
        assert boards_lib.content_hash(files[name]) == digest
    assert "version" in manifest
    assert str(written) not in (written / "manifest.json").read_text()


def test_the_same_settings_write_the_same_bytes(written: pathlib.Path) -> None:
    other = written.parent / "other"
    generate.run(make_config(folder=str(other)), "")
    assert contents(written) == contents(other)
    assert identity(written) == identity(other), "who drew them, and when, tells nothing apart"
    generate.run(dataclasses.replace(make_config(folder=str(other / "x")), seed=1), "")
    assert contents(written).keys() == contents(other / "x").keys()
    assert contents(written) != contents(other / "x")


def test_a_complete_folder_is_left_alone(written: pathlib.Path) -> None:
    stamps = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    generate.run(make_config(), str(written.parent))
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == stamps


def test_options_of_tasks_without_boards_do_not_matter(tmp_path: pathlib.Path) -> None:
    """An older version listed every task's; a folder outlives a task that is added."""
    config = make_config(boards=(config_lib.LevelSet("maze", (3,), 2, 0, 0),))
    generate.run(config, str(tmp_path))
    for name, path in (("manifest.json", ("settings",)), ("settings.json", ())):
        value = whole = json.loads((tmp_path / "data" / name).read_text())
        for key in path:
            value = value[key]
        assert value["options"].keys() == {"maze"}
        value["options"]["frozenlake"] = {"frozen_probability": 0.8}
        (tmp_path / "data" / name).write_text(json.dumps(whole))
    before = contents(tmp_path / "data")
    generate.run(config, str(tmp_path))
    assert contents(tmp_path / "data") == before


def test_an_interrupted_run_goes_on(written: pathlib.Path) -> None:
    before = contents(written)
    (written / "manifest.json").unlink()
    (written / "test/Maze/level3/text/0001.txt").unlink()
    (written / "val/FrozenLake/level3/image/0000.png").write_bytes(b"half a picture")
    (written / "test/Maze/level3/text/0001.txt.partial").write_bytes(b"half")
    kept = written / "train/Maze/level3/image/0000.png"
    stamp = kept.stat().st_mtime_ns
    generate.run(make_config(), str(written.parent))
    assert contents(written) == before
    assert kept.stat().st_mtime_ns == stamp


@pytest.mark.parametrize("is_complete", [True, False])
def test_a_folder_of_other_settings_is_refused(written: pathlib.Path, is_complete: bool) -> None:
    if not is_complete:
        (written / "manifest.json").unlink()
    before = contents(written)
    config = dataclasses.replace(make_config(picture_size=96), seed=5)
    message = r"other boards \(picture_size.3: got 64, want 96; .*seed: got 0, want 5"
    with pytest.raises(ValueError, match=message):
        generate.run(config, str(written.parent))
    fewer = make_config(boards=(*LEVELS[:2], config_lib.LevelSet("minibehaviour", (6,), 3, 2, 2)))
    message = r"counts.minibehaviour/level5: got \{.*want 'nothing'; counts.minibehaviour/level6"
    with pytest.raises(ValueError, match=message):
        generate.run(fewer, str(written.parent))
    excluding = make_config(exclude=(str(BENCHMARKS / "vsp"),))
    with pytest.raises(ValueError, match=r"excluded\.boards: got 0, want 3"):
        generate.run(excluding, str(written.parent))
    assert contents(written) == before


def test_a_folder_of_other_files_is_refused(tmp_path: pathlib.Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "notes.txt").touch()
    with pytest.raises(ValueError, match=r"data: got other files and no settings\.json"):
        generate.run(make_config(), str(tmp_path))
    assert [path.name for path in (tmp_path / "data").iterdir()] == ["notes.txt"]


def test_a_level_may_be_asked_for_once(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"data\.boards: got maze/level3 twice"):
        generate.run(make_config(boards=(*LEVELS, LEVELS[1])), str(tmp_path))


def test_too_many_boards_are_refused_before_anything_is_written(tmp_path: pathlib.Path) -> None:
    boards = (config_lib.LevelSet("minibehaviour", (4,), 4, 4, 4000),)
    with pytest.raises(ValueError, match=r"minibehaviour level 4 test: got exactly \d+ boards"):
        generate.run(make_config(boards=boards), str(tmp_path))
    assert not (tmp_path / "data").exists()


def test_benchmark_boards_are_excluded(tmp_path: pathlib.Path) -> None:
    folders = [BENCHMARKS / "vsp", BENCHMARKS / "visualplanning"]
    keys = benchmark_keys(folders)
    every = splits._every_board("frozenlake", 3)
    assert every is not None
    ours = [key for key in every if splits.split_of(key) == "test"]
    assert set(ours) & keys
    count = len(set(ours) - keys)
    boards = (config_lib.LevelSet("frozenlake", (3,), 0, 0, count),)
    generate.run(make_config(boards=boards, exclude=tuple(map(str, folders))), str(tmp_path))
    got = {
        ENVS[board.task].key(board.state)
        for board in boards_lib.read_split(tmp_path / "data", "test")
    }
    assert got == set(ours) - keys
    excluded = json.loads((tmp_path / "data/settings.json").read_text())["excluded"]
    assert excluded["boards"] == len(keys)
    assert excluded["folders"] == [
        {"name": "vsp", "boards": 3},
        {"name": "visualplanning", "boards": 6},
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("train/Maze/level3/text/0000.txt", None, "not found, but .*manifest.json lists it"),
        ("train/Maze/level3/image/0002.png", None, "not found, but .*manifest.json lists it"),
        ("train/Maze/level3/text/0000.txt", b"\xff", "want UTF-8"),
        ("train/Maze/level3/text/0000.txt", ("level=3\n", ""), "level: got no such line"),
        ("train/Maze/level3/text/0000.txt", ("index=0\n", "index=9\n"), "got hash .*want"),
        ("train/FrozenLake/level3/text/0001.txt", ("map:\n", "map:\nFF\n"), "map: got 4 rows"),
        ("train/Maze/level3/image/0002.png", b"no picture", "unreadable picture"),
        ("train/Maze/level3/image/0002.png", b"", "unreadable picture"),
    ],
)
def test_changed_files_are_named(
    written: pathlib.Path, name: str, content: bytes | tuple[str, str] | None, message: str
) -> None:
    path = written / name
    if content is None:
        path.unlink()
    elif isinstance(content, bytes):
        path.write_bytes(content)
    else:
        text = path.read_text()
        assert content[0] in text
        path.write_text(text.replace(*content, 1))
    with pytest.raises(ValueError, match=f"{name}.*{message}"):
        if name.endswith(".png"):
            generate.run(make_config(), str(written.parent))
        boards_lib.read_split(written, "train")
    assert boards_lib.read_split(written, "test")


def test_another_picture_and_half_a_picture_are_named(written: pathlib.Path) -> None:
    """By the stage that wrote them: no other one reads them."""
    folder = written / "train/Maze/level3/image"
    whole = (folder / "0001.png").read_bytes()
    for content, message in (
        ((folder / "0000.png").read_bytes(), "got hash"),
        (whole[: len(whole) // 2], "unreadable picture"),
    ):
        (folder / "0001.png").write_bytes(content)
        with pytest.raises(ValueError, match=rf"0001\.png: .*{message}"):
            generate.run(make_config(), str(written.parent))
        assert boards_lib.read_split(written, "train")


def test_what_is_no_manifest_is_named(written: pathlib.Path) -> None:
    boards = (config_lib.LevelSet("maze", (3,), 2, 0, 0),)
    generate.run(make_config(boards=boards, folder=str(written / "few")), "")
    with pytest.raises(ValueError, match=r"manifest\.json: no boards of split 'val'"):
        boards_lib.read_split(written / "few", "val")
    (written / "manifest.json").write_text("{")
    with pytest.raises(ValueError, match=r"manifest\.json: got no valid JSON"):
        boards_lib.read_split(written, "train")
    (written / "manifest.json").unlink()
    with pytest.raises(ValueError, match=r"manifest\.json: not found"):
        boards_lib.read_split(written, "train")


def edit(path: pathlib.Path, change: Callable[[Any], Any]) -> None:
    value = json.loads(path.read_text())
    path.write_text(json.dumps(change(value) or value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m: m["groups"][0].update(count=2), r"groups\[0\].count: got 2, want 6"),
        (lambda m: m["groups"][0].update(count=-1), r"groups\[0\].count: got -1, want 6"),
        (lambda m: m["groups"][0].update(count=6.0), r"groups\[0\].count: got 6.0, want 6"),
        (lambda m: m["groups"][0].update(level=4), r"groups\[0\].level: got 4, want 3"),
        (lambda m: m["groups"][2].update(task="frozenlake"), r"groups\[2\].task: got 'froz"),
        (lambda m: m["groups"][0].update(split="test"), r"groups\[0\].split: got 'test', want 'tr"),
        (
            lambda m: m["groups"][0].update(folder="x"),
            r"groups\[0\].folder: got 'x', want 'train/F",
        ),
        (lambda m: m["groups"][0].pop("level") and None, r"groups\[0\].level: got None, want 3"),
        (lambda m: m["groups"].pop() and None, r"groups: got 10, want 11"),
        (lambda m: m["groups"].append(m["groups"][0]), r"groups: got 12, want 11"),
        (lambda m: m["groups"].reverse(), r"groups\[0\].folder: got 'test"),
        (lambda m: m["groups"].insert(0, m["groups"].pop(1)), r"groups\[0\].folder: got"),
        (lambda m: m["groups"].__setitem__(1, []), r"groups\[1\].folder: got None"),
        (lambda m: m["groups"][1]["text"].pop() and None, r"number of groups\[1\].text: got 5"),
        (lambda m: m["groups"][1].update(image=None), r"number of groups\[1\].image: got None"),
        (lambda m: m.update(groups={}), r"groups: got \{\}, want a list"),
        (lambda m: m["settings"]["counts"].pop("maze/level3") and None, "settings differ from"),
        (lambda m: m["settings"].update(seed=1), "settings differ from those in settings.json"),
    ],
)
@pytest.mark.parametrize("stage", ["read", "generate"])
def test_an_edited_manifest_loses_no_boards(
    written: pathlib.Path, change: Callable[[Any], Any], message: str, stage: str
) -> None:
    edit(written / "manifest.json", change)
    with pytest.raises(ValueError, match=rf"manifest\.json: {message}.*; to restore it, delete"):
        if stage == "read":
            boards_lib.read_split(written, "test")
        else:
            generate.run(make_config(), str(written.parent))


@pytest.mark.parametrize("count", [-1, "6", None, 1.5])
def test_settings_that_count_nothing_are_named(written: pathlib.Path, count: Any) -> None:
    for name, path in (("manifest.json", ("settings",)), ("settings.json", ())):

        def change(value: Any, path: tuple[str, ...] = path) -> None:
            for key in path:
                value = value[key]
            value["counts"]["maze/level3"]["train"] = count

        edit(written / name, change)
    with pytest.raises(ValueError, match=r"settings\.json: counts: want numbers of boards"):
        boards_lib.read_split(written, "train")
    (written / "settings.json").unlink()
    with pytest.raises(ValueError, match=r"settings\.json: not found"):
        boards_lib.read_split(written, "train")
