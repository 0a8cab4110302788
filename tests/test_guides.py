"""The snippets of docs/boards.md and docs/prompts.md run, and do what the pages say."""

import dataclasses
import pathlib
import re

import pytest

from mgsd_jax import config as c
from mgsd_jax.command_line import load_config
from mgsd_jax.data import loaders, prompts
from mgsd_jax.envs import ENVS
from mgsd_jax.stages import generate

DOCS = pathlib.Path(__file__).parents[1] / "docs"


def snippets(page: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S)


def test_a_config_of_own_boards_and_the_length_of_their_responses(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    own, longest = snippets("boards.md")
    (tmp_path / "my_boards.py").write_text(own)
    config = load_config("my_boards.py", [])
    nano = load_config("nano", [])
    assert {kind.task for kind in config.data.boards} == {"maze", "frozenlake"}
    assert config.grounding == nano.grounding and config.data.patch_buckets == c.AUTO
    exec(longest, {})
    printed = int(capsys.readouterr().out)
    # It does not fit into the recipe's, which is what the page warns of.
    assert printed > nano.distillation.sampling.max_new_tokens


def test_training_with_another_seed_reads_the_same_boards(tmp_path: pathlib.Path) -> None:
    boards = (c.LevelSet("frozenlake", levels=(3,), train=6, val=2, test=2),)
    nano = load_config("nano", [])
    first = dataclasses.replace(nano, data=dataclasses.replace(nano.data, boards=boards))
    generate.run(first, str(tmp_path / "seed1"))
    folder = tmp_path / "seed1" / "data"
    other = c.override(first, ["seed=2", f"data.folder={folder}"])
    resolved = c.resolve(first, str(tmp_path / "seed1"))
    for split in ("train", "val", "test"):
        read = [board.state for board in loaders.load_boards(other, split)]
        assert read == [board.state for board in loaders.load_boards(resolved, split)]
        assert read


def test_the_built_in_prompts_are_written_and_read_back(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (write,) = snippets("prompts.md")
    exec(write, {})
    own = prompts.load("words", "cells")
    assert len(own.replaced) == 3 * len(ENVS)
    for task in ENVS:
        for kind in ("student", "teacher", "grounding"):
            text = prompts.BUILT_IN.template(task, kind)
            assert own.template(task, kind) == text.strip("\n")
