"""Benchmarks by name: their boards, names and pictures, and what is said where they are absent."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import pytest
from absl import logging
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.data import benchmarks, prompts
from mgsd_jax.data import boards as boards_lib
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.data.pictures import read_picture
from mgsd_jax.data.processor import load_processor
from mgsd_jax.data.segments import decode
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.scoring import score_plan
from mgsd_jax.sampling import answers
from mgsd_jax.stages import generate

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "benchmarks"
REFERENCE = ROOT.parent / "shared" / "reference" / "benchmarks"
VISUALPLANNING = str(DATA / "visualplanning")


def test_each_name_reads_its_boards_under_the_names_of_the_public_evaluator() -> None:
    boards, cases = benchmarks.read_testsets(
        [
            ("frozenlake_vsp", str(DATA / "vsp")),
            ("maze_visualplanning", VISUALPLANNING),
            ("minibehaviour_visualplanning", VISUALPLANNING),
        ]
    )
    assert cases == [
        "frozenlake_diffthinker_vsp_level3_0000",
        "frozenlake_diffthinker_vsp_level3_0010",
        "frozenlake_diffthinker_vsp_level4_0000",
        "maze_test_level3_0000",
        "maze_test_level4_0001",
        "minibehaviour_test_level5_0004",
        "minibehaviour_test_level6_0012",
    ]
    keys = [(board.task, board.level, board.index) for board in boards]
    assert len(set(keys)) == len(keys) and keys[1] == ("frozenlake", 3, 10)
    assert [board.picture_path is not None for board in boards] == [True] * 3 + [False] * 4
    boards, cases = benchmarks.read_testsets([("frozenlake_visualplanning", VISUALPLANNING)])
    assert {board.task for board in boards} == {"frozenlake"}


def test_a_benchmark_is_shown_in_its_own_pictures() -> None:
    boards, _ = benchmarks.read_testsets([("frozenlake_vsp", str(DATA / "vsp"))])
    data = load_config(str(ROOT / "configs" / "nano.py"), []).data
    data = dataclasses.replace(data, picture_size=256, cell_pixels=0)
    for board in boards:
        shown = answers.show(data, board)
        assert shown.shape == (256, 256, 3) and shown.dtype == np.uint8
        drawn = ENVS["frozenlake"].render(board.state, 256)
        assert 0 < np.abs(shown.astype(int) - drawn).mean() < 12, "the same board, other sprites"
        assert np.array_equal(answers.show(data, board._replace(picture_path=None)), drawn)


def test_our_held_out_mazes_are_the_mazes_of_a_test_split(tmp_path: pathlib.Path) -> None:
    config = load_config(str(ROOT / "configs" / "nano.py"), [])
    levels = (
        config_lib.LevelSet("frozenlake", (3,), train=2, val=1, test=2),
        config_lib.LevelSet("maze", (3, 4), train=2, val=1, test=3),
    )
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, boards=levels))
    generate.run(config, str(tmp_path))
    folder = str(tmp_path / "data")
    boards, cases = benchmarks.read_testsets([("maze_held_out", folder)])
    assert [(board.task, board.level) for board in boards] == [("maze", 3)] * 3 + [("maze", 4)] * 3
    assert cases[4] == "maze_test_level4_0001"
    file = next((tmp_path / "data" / "test").rglob("Maze/level4/text/0001.txt"))
    file.write_text(file.read_text().replace("target_row=", "target_row=9"))
    with pytest.raises(ValueError, match=r"level4/text/0001.txt: .*got"):
        benchmarks.read_testsets([("maze_held_out", folder)])


@pytest.mark.parametrize("name", ["frozenlake_vsp", "visualplanning", "diffthinker"])
def test_reference_samples(name: str) -> None:
    folder = REFERENCE / name
    if not folder.is_dir():
        pytest.skip(f"no sample of {name} beside the repository")
    named = [n for n in benchmarks.PUBLIC if name in n and n != "maze_visualplanning"]
    for one in named:
        boards, cases = benchmarks.read_testsets([(one, str(folder))])
        assert len(boards) == len(set(cases)) >= 5
        assert {board.task for board in boards} == {one.partition("_")[0]}


def test_large_public_boards_are_asked_about_and_scored() -> None:
    folder = REFERENCE / "diffthinker"
    if not folder.is_dir():
        pytest.skip("no sample of diffthinker beside the repository")
    config = load_config(str(ROOT / "configs" / "nano.py"), ["data.state_text=rows"])
    encoder = load_encoder(config.data, load_processor(config.model.path))
    named = [(name, str(folder)) for name in benchmarks.PUBLIC if "diffthinker" in name]
    assert len(named) == 5
    boards, _ = benchmarks.read_testsets(named)
    for board in {board[:2]: board for board in boards}.values():
        picture = answers.encode_prompt(encoder, board, "picture").pictures[0]
        assert len(picture.patches) == np.prod(picture.grid)
        text = answers.encode_prompt(encoder, board, "text").tokens
        assert encoder.prompts.env(board.task).describe(board.state) in decode(
            encoder.processor, text
        )
        plan = ENVS[board.task].shortest_plan(board.state)
        for words in (prompts.BUILT_IN, encoder.prompts):
            score = score_plan(board, prompts.response(board.task, board.state, plan, words))
            assert score["state_exact"] and score.get("plan_given_own_state")
            assert score["outcome"]["optimal"]


def test_an_absent_benchmark_says_where_to_get_it(tmp_path: pathlib.Path) -> None:
    sources: dict[config_lib.Benchmark, str] = {
        "frozenlake_vsp": "github.com/UCSB-NLP-Chang/Visual-Spatial-Planning",
        "frozenlake_visualplanning": "github.com/yix8/VisualPlanning",
        "minibehaviour_visualplanning": "github.com/yix8/VisualPlanning",
        "maze_visualplanning": "'maze_held_out'",
        "maze_diffthinker_8": "github.com/lcqysl/DiffThinker",
        "frozenlake_diffthinker_32": "github.com/lcqysl/DiffThinker",
        "maze_held_out": "want the folder of boards that --stage=generate",
    }
    for name, source in sources.items():
        for folder in (tmp_path, tmp_path / "absent"):
            with pytest.raises(ValueError, match=source) as error:
                benchmarks.read_testsets([(name, str(folder))])
            assert str(folder) in str(error.value)


def test_one_evaluation_holds_a_level_once() -> None:
    named: list[tuple[config_lib.Benchmark, str]] = [
        ("frozenlake_vsp", str(DATA / "vsp")),
        ("frozenlake_visualplanning", VISUALPLANNING),
    ]
    with pytest.raises(ValueError, match="got frozenlake level 3 in frozenlake_vsp and in frozen"):
        benchmarks.read_testsets(named)
    with pytest.raises(ValueError, match="got frozenlake_vsp twice"):
        benchmarks.read_testsets([named[0], named[0]])


def test_a_broken_picture_is_named(tmp_path: pathlib.Path) -> None:
    shutil.copytree(DATA / "vsp", tmp_path / "vsp")
    picture = tmp_path / "vsp" / "level3" / "img" / "10.png"
    picture.write_bytes(picture.read_bytes()[:100])
    boards, _ = benchmarks.read_testsets([("frozenlake_vsp", str(tmp_path / "vsp"))])
    with pytest.raises(ValueError, match=r"level3/img/10.png: got an unreadable picture"):
        read_picture(str(boards[1].picture_path), 256)
    Image.new("RGB", (8, 8)).save(picture)
    assert read_picture(str(picture), 16).shape == (16, 16, 3)


def write_maps(root: pathlib.Path, states: Sequence[Any]) -> None:
    """Level-3 states in the form of VSP's maps, without plans."""
    letters = {"S": "@", "G": "*", "H": "#", "F": "_"}
    for kind in ("img", "table"):
        (root / "level3" / kind).mkdir(parents=True)
    for i, state in enumerate(states):
        rows = [" | ".join(letters[tile] for tile in row) for row in state.rows]
        lines = ["| |", *(f"| Row {r} | {row} |" for r, row in enumerate(rows, 1))]
        (root / "level3" / "table" / f"{i}.txt").write_text("\n".join(lines))
        (root / "level3" / "img" / f"{i}.png").touch()


def write_stages(workdir: pathlib.Path, data: config_lib.DataConfig) -> None:
    """What count as a grounding and a distillation that started from it, without weights."""
    before = workdir / "base"
    for stage in ("grounding", "distillation"):
        folder = workdir / stage
        (folder / "model").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"data": config_lib.to_dict(data)}))
        (folder / "model" / "source.json").write_text(json.dumps({"weights": str(before)}))
        before = folder


@pytest.mark.parametrize("source", ["folder", "stream"])
def test_a_model_that_saw_boards_of_a_benchmark_is_named(
    tmp_path: pathlib.Path, source: Literal["folder", "stream"], caplog: pytest.LogCaptureFixture
) -> None:
    logging.set_verbosity(logging.INFO)
    config = load_config(str(ROOT / "configs" / "nano.py"), [])
    levels = (config_lib.LevelSet("frozenlake", (3,), train=12, val=3, test=2),)
    benchmark = tmp_path / "vsp"
    for run, exclude in (("leaky", ()), ("clean", (str(benchmark),))):
        data = dataclasses.replace(
            config.data, boards=levels, exclude=exclude, picture_size=24, cell_pixels=0
        )
        generate.run(dataclasses.replace(config, data=data), str(tmp_path / run))
        if run == "leaky":
            written = [
                *boards_lib.read_split(tmp_path / "leaky/data", "train")[:4],
                *boards_lib.read_split(tmp_path / "leaky/data", "val")[:2],
                *boards_lib.read_split(tmp_path / "leaky/data", "test")[:1],
            ]
            write_maps(benchmark, [board.state for board in written])
        write_stages(tmp_path / run, dataclasses.replace(data, source=source))
    boards, _ = benchmarks.read_testsets([("frozenlake_vsp", str(benchmark))])
    for folder, want in (("clean/distillation", 0), ("leaky/distillation", 6), ("leaky", 0)):
        caplog.clear()
        benchmarks.warn_of_seen("distilled", str(tmp_path / folder), boards)
        said = [record.getMessage().split(";")[0] for record in caplog.records]
        line = f"distilled: {want} of the 7 boards were in its training or validation"
        assert said == ([line] if want else [])
    # A grounding that saw them is enough.
    source_file = tmp_path / "clean" / "distillation" / "model" / "source.json"
    source_file.write_text(json.dumps({"weights": str(tmp_path / "leaky" / "grounding")}))
    benchmarks.warn_of_seen("distilled", str(tmp_path / "clean/distillation"), boards)
    assert "distilled: 6 of the 7" in caplog.records[-1].getMessage()
    if source == "folder":
        shutil.rmtree(tmp_path / "leaky" / "data")
        benchmarks.warn_of_seen("distilled", str(tmp_path / "leaky/distillation"), boards)
        assert "no boards in" in caplog.records[-1].getMessage()


def test_benchmarks_that_are_evaluated_are_excluded_from_boards() -> None:
    config = load_config(str(ROOT / "configs" / "nano.py"), [])
    named = (("frozenlake_vsp", "{workdir}/vsp"), ("maze_held_out", "own"))
    config = dataclasses.replace(
        config,
        data=dataclasses.replace(config.data, exclude=("w/vsp", "other")),
        evaluate=dataclasses.replace(config.evaluate, benchmarks=named),
    )
    for workdir, want in (("w", ("w/vsp", "other")), ("v", ("w/vsp", "other", "v/vsp"))):
        assert config_lib.excluded_folders(config_lib.resolve(config, workdir)) == want
