"""Workdirs, models and the package itself can be moved: what is there decides, not where it is."""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import pytest
from etils import epath
from helpers_tiny import tiny_config

from mgsd_jax import config as config_lib
from mgsd_jax.config import ASSETS, Config, LoraConfig
from mgsd_jax.stages import export, loading
from mgsd_jax.workdir import contents, folders, stage_folder

SECTIONS = ("model", "data", "distillation", "seed")


def write_model(folder: pathlib.Path, content: bytes = b"weights") -> str:
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(content)
    (folder / "config.json").write_text("{}")
    return str(folder)


def claim(folder: pathlib.Path, config: Config, *changes: str) -> None:
    with folders.claimed(folder, config_lib.override(config, changes), SECTIONS) as held:
        held.record()


def test_places_are_noted_within_the_workdir_and_the_package() -> None:
    for path, noted in (
        ("/runs/a/grounding", "{workdir}/grounding"),
        (f"{ASSETS}/nano_base", "{assets}/nano_base"),
        ("/runs/ab/grounding", "/runs/ab/grounding"),
        ("/runs/a", "/runs/a"),
        ("gs://b/run", "gs://b/run"),
    ):
        assert config_lib.portable(path, "/runs/a") == noted
        assert config_lib.located(noted, "/runs/a") == path
    assert config_lib.portable("gs://b/run/grounding", "gs://b/run") == "{workdir}/grounding"


def test_a_run_goes_on_with_its_model_boards_and_prompts_in_another_place(
    tmp_path: pathlib.Path,
) -> None:
    def settings(place: pathlib.Path) -> tuple[str, ...]:
        return (
            *(f"model.path={place}/base", f"data.prompts={place}/prompts"),
            *(f"data.folder={place}/boards", f"data.exclude={place}/sets"),
            f"distillation.student={place}/base",
        )

    here, there = tmp_path / "here", tmp_path / "there"
    write_model(here / "base")
    for name, file in (("prompts", "a.txt"), ("boards", "manifest.json"), ("sets", "x/1.txt")):
        (here / name / file).parent.mkdir(parents=True)
        (here / name / file).write_text('{"version": "1", "groups": []}')
    for folder in ("base", "boards"):  # made by a stage, which says when
        (here / folder / "runs.jsonl").write_text("then")
    config = tiny_config(tmp_path)
    claim(tmp_path / "run", config, *settings(here))
    shutil.copytree(here, there)
    shutil.rmtree(here)
    for folder in ("base", "boards"):
        (there / folder / "runs.jsonl").write_text("made again elsewhere")
    (there / "boards" / "manifest.json").write_text('{"version": "2", "groups": []}')
    claim(tmp_path / "run", config, *settings(there))
    for name, file in (
        ("model.path", "base/model.safetensors"),
        ("data.prompts", "prompts/a.txt"),
        ("data.folder", "boards/manifest.json"),
        ("data.exclude", "sets/x/1.txt"),
    ):
        other = shutil.copytree(there, tmp_path / "other")
        (other / file).write_text('{"groups": ["others"]}')
        with pytest.raises(ValueError, match=f"{name}: got ") as raised:
            claim(tmp_path / "run", config, *settings(other))
        assert "data.folder" in name or "data.folder" not in str(raised.value)
        shutil.rmtree(other)
    with pytest.raises(ValueError, match=r"model\.path: got "):
        claim(tmp_path / "run", config, *settings(here))  # nothing there


def test_a_folder_of_an_older_version_knows_the_shipped_models_of_another_clone(
    tmp_path: pathlib.Path,
) -> None:
    config = tiny_config(tmp_path)
    claim(tmp_path / "run", config, f"model.path={ASSETS}/nano_base")
    (tmp_path / "run" / "places.json").unlink()
    file = tmp_path / "run" / "config.json"
    file.write_text(file.read_text().replace(ASSETS, "/gone/mgsd_jax/assets"))
    claim(tmp_path / "run", config, f"model.path={ASSETS}/nano_base")
    (tmp_path / "run" / "places.json").unlink()
    with pytest.raises(ValueError, match=r"model\.path: got "):
        claim(tmp_path / "run", config, f"model.path={ASSETS}/other_base")


def test_an_evaluation_may_lie_anywhere(tmp_path: pathlib.Path) -> None:
    config = tiny_config(tmp_path)
    for place in ("a", "b"):
        chosen = config_lib.override(config, [f"evaluate.folder={tmp_path / place}"])
        with folders.claimed(tmp_path / "held", chosen, ("evaluate",)) as held:
            held.record()


def make_stage(root: pathlib.Path, model: str, noted: str = "") -> epath.Path:
    """A stage above a model, whose place is `noted` otherwise than it would be."""
    source = stage_folder.Source(model, LoraConfig(), complete=False, metric="x")
    folder = epath.Path(root)
    stage_folder.write_source(folder, source, model)
    if noted:
        file = folder / "model" / "source.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"weights": noted}))
    return folder


def test_weights_are_found_where_they_are_now(tmp_path: pathlib.Path) -> None:
    model = write_model(tmp_path / "run" / "base")
    stage = make_stage(tmp_path / "run" / "grounding", model)
    assert json.loads((stage / "model" / "source.json").read_text())["weights"] == "{workdir}/base"
    assert stage_folder.find_weights(stage) == model
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "run")
    moved = epath.Path(tmp_path) / "moved" / "grounding"
    assert stage_folder.find_weights(moved) == str(tmp_path / "moved" / "base")
    # An older version noted where it was.
    old = make_stage(tmp_path / "moved" / "old", str(tmp_path / "moved" / "base"), model)
    assert stage_folder.find_weights(old) == str(tmp_path / "moved" / "base")
    # The stage alone was copied: the model of the config has the weights, or nothing has.
    shutil.copytree(moved, tmp_path / "alone" / "mine")
    alone = epath.Path(tmp_path) / "alone" / "mine"
    base = str(tmp_path / "moved" / "base")
    assert stage_folder.find_weights(alone, [base]) == base
    other = write_model(tmp_path / "other", b"other weights")
    with pytest.raises(ValueError, match=r"got nothing at .*alone/base, want the model that mine"):
        stage_folder.find_weights(alone, [other])
    write_model(tmp_path / "alone" / "base", b"yet others")
    with pytest.raises(ValueError, match=r"weights: got another model at .*alone/base"):
        stage_folder.find_weights(alone)


def test_shipped_weights_are_those_of_the_package_that_runs(tmp_path: pathlib.Path) -> None:
    stage = make_stage(tmp_path / "grounding", f"{ASSETS}/nano_base")
    noted = json.loads((stage / "model" / "source.json").read_text())["weights"]
    assert noted == "{assets}/nano_base"
    assert stage_folder.find_weights(stage) == f"{ASSETS}/nano_base"
    gone = make_stage(tmp_path / "old", f"{ASSETS}/nano_base", "/gone/mgsd_jax/assets/nano_base")
    assert stage_folder.find_weights(gone) == f"{ASSETS}/nano_base"


def test_a_teacher_in_another_place_is_known_for_the_students_base(tmp_path: pathlib.Path) -> None:
    config = config_lib.override(tiny_config(tmp_path), ["distillation.lora.rank=2"])
    model, copy = write_model(tmp_path / "base"), write_model(tmp_path / "copy")
    absent: Any = None
    student = loading.Loaded(absent, {}, absent, model, contents.identity(model))
    settings = dataclasses.replace(config.distillation, teacher=copy)
    assert loading.load_teacher(settings, config, None, student) is student


def test_an_export_that_moved_along_is_replaced(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(export, "_write_model", lambda config, folder: {})
    stage = tmp_path / "run" / "distillation"
    stage.mkdir(parents=True)
    (stage / "runs.jsonl").write_text("began\n")
    for name, folder in (("run", "{workdir}/export"), ("run", f"{tmp_path}/elsewhere")):
        config = config_lib.override(tiny_config(tmp_path), [f"export.folder={folder}"])
        export.run(config, str(tmp_path / name))
    shutil.copytree(tmp_path / "run", tmp_path / "moved")
    shutil.rmtree(tmp_path / "run")
    for folder in ("{workdir}/export", f"{tmp_path}/elsewhere"):
        config = config_lib.override(tiny_config(tmp_path), [f"export.folder={folder}"])
        export.run(config, str(tmp_path / "moved"))
        (tmp_path / "moved" / "distillation" / "runs.jsonl").write_text("began\nwent on\n")
    (tmp_path / "moved" / "export" / "export.json").write_text(
        json.dumps({"source": "{workdir}/grounding", "run": "another"})
    )
    with pytest.raises(ValueError, match="want an absent or empty"):
        config = config_lib.override(tiny_config(tmp_path), ["export.folder={workdir}/export"])
        export.run(config, str(tmp_path / "moved"))
