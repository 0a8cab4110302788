"""The card of an export: what it says of the model, and the files that it names."""

import dataclasses
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from etils import epath
from helpers_tiny import tiny_config
from huggingface_hub import ModelCard
from PIL import Image

from mgsd_jax.config import Config, ExportConfig, LoraConfig
from mgsd_jax.data import prompts, splits
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import rows, rules, scoring, summary
from mgsd_jax.stages import card
from mgsd_jax.workdir import folders, stage_folder


@pytest.fixture
def base(tmp_path: Path) -> Path:
    folder = tmp_path / "Qwen3-VL-4B-Instruct"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    return folder


@pytest.fixture
def config(base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """An export of a distillation that continued the adapters of a grounding."""
    argv = ["/usr/bin/python3", "-m", "mgsd_jax.main", "--config=/home/me/configs/qwen3vl.py:4b"]
    changes = ["--set", "distillation.steps=7", "--set", "model.path=/home/me/models"]
    monkeypatch.setattr(sys, "orig_argv", [*argv, *changes])
    lora = LoraConfig(rank=2)
    for stage in stage_folder.STAGES:
        source = stage_folder.Source(str(base), lora, complete=False, metric="")
        stage_folder.write_source(epath.Path(tmp_path) / stage, source, base)
        settings = {stage: {"steps": 7, "student": "{workdir}/grounding"}, "seed": 3}
        with folders.spending(tmp_path / stage):
            folders.write_run_info(tmp_path / stage, settings)
    made = tiny_config(tmp_path)
    source = str(tmp_path / "distillation")
    return dataclasses.replace(
        made,
        export=ExportConfig(source=source, folder=str(tmp_path / "run" / "export")),
        evaluate=dataclasses.replace(
            made.evaluate,
            models=(("base", str(base)), ("distilled", source)),
            folder=str(tmp_path / "evaluate"),
        ),
    )


def write_card(config: Config, tmp_path: Path) -> tuple[Path, str]:
    folder = tmp_path / "out"
    folder.mkdir()
    card.write(config, folder)
    return folder, (folder / "README.md").read_text()


def test_the_header_is_that_of_the_hub(config: Config, tmp_path: Path) -> None:
    for is_adapter, relation, library in (
        (False, "finetune", "transformers"),
        (True, "adapter", "peft"),
    ):
        settings = dataclasses.replace(config.export, adapters=is_adapter)
        folder = tmp_path / library
        folder.mkdir()
        _, text = write_card(dataclasses.replace(config, export=settings), folder)
        header = ModelCard(text).data.to_dict()
        assert header["license"] == "apache-2.0"
        assert header["base_model"] == "Qwen/Qwen3-VL-4B-Instruct"
        assert header["base_model_relation"] == relation
        assert header["pipeline_tag"] == "image-text-to-text"
        assert header["library_name"] == library
        assert "mgsd_jax" in header["tags"]
        assert "torchvision" in text and "hf upload you/run . --exclude export.json" in text


def test_the_card_says_how_the_model_was_made(config: Config, tmp_path: Path) -> None:
    _, text = write_card(config, tmp_path)
    assert "Grounding, then distillation." in text
    assert "- Recipe: configs/qwen3vl.py:4b, with distillation.steps=7" in text
    assert "- Seed: 3" in text
    assert "jax" in text.partition("Versions: ")[2]
    assert "/home/me" not in text, "paths of a machine are nobody's business"
    assert "Not measured" in text


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("models/Qwen3-VL-8B-Instruct", "Qwen/Qwen3-VL-8B-Instruct"),
        ("/hub/models--someone--a-model/snapshots/0ab", "someone/a-model"),
        ("runs/mine/init", None),
    ],
)
def test_the_name_of_a_base_on_the_hub(path: str, name: str | None) -> None:
    assert card.hub_name(path) == name


def test_a_licence_is_the_bases_own(base: Path, tmp_path: Path) -> None:
    assert card.license_of(str(base)) == "apache-2.0"
    (base / "README.md").write_text("---\ntags:\n- a\nlicense: mit\n---\n# A model\n")
    assert card.license_of(str(base)) == "mit"
    assert card.license_of(str(tmp_path)) is None


def test_prompts_and_sample_are_those_of_the_run(config: Config, tmp_path: Path) -> None:
    folder, text = write_card(config, tmp_path)
    given = prompts.load(str(folder / "prompts"), "cells")
    for task in ("frozenlake", "maze"):
        for kind in ("student", "teacher", "grounding"):
            assert given.template(task, kind) == prompts.BUILT_IN.template(task, kind)
        assert prompts.BUILT_IN.template(task, "student") in text
    (state,) = splits.unique_boards("frozenlake", 3, "test", 1, seed=config.seed)
    answer = (folder / "sample" / "answer.txt").read_text()
    assert rules.judge(state, "frozenlake", answer).optimal
    assert (folder / "sample" / "board.txt").read_text() == ENVS["frozenlake"].describe(
        state
    ) + "\n"
    picture = np.asarray(Image.open(folder / "sample" / "board.png"))
    np.testing.assert_array_equal(picture, ENVS["frozenlake"].render(state, 96))


def test_a_config_that_draws_no_test_boards_has_a_sample_too(config: Config) -> None:
    levels = dataclasses.replace(config.data.boards[1], test=0, val=0)
    data = dataclasses.replace(config.data, boards=(levels,))
    assert card._sample(dataclasses.replace(config, data=data)).task == "maze"


def test_results_are_those_of_the_model_as_it_is(config: Config, tmp_path: Path) -> None:
    folder = Path(config.evaluate.folder)
    folder.mkdir()
    (state,) = splits.unique_boards("frozenlake", 3, "test", 1, seed=0)
    board = Board("frozenlake", 3, 0, state, None)
    right = prompts.response("frozenlake", state, ENVS["frozenlake"].shortest_plan(state))
    rows.write_boards(epath.Path(folder), [board], ["a"])
    scored: list[Any] = [
        scoring.score_row(board, "picture", scoring.Answer(text, False, 1), model=model)
        for model, text in (("base", ""), ("distilled", right))
    ]
    rows.append(epath.Path(folder), scored)
    result = summary.summarize(rows.read_rows(folder))
    (folder / "summary.json").write_text(json.dumps(result))
    _, text = write_card(config, tmp_path)
    assert "| distilled | picture | 100.0 %" in text and "| base | picture | 0.0 %" in text
    assert "Boards that were not trained on: 1 of FrozenLake." in text
    rows.add_model(epath.Path(folder), "distilled", "of another one")
    other = tmp_path / "other"
    other.mkdir()
    _, text = write_card(config, other)
    assert "Not measured" in text
