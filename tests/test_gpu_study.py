"""launch/gpu_study.py: its parts are those of the small study; a toy runs through and resumes."""

import collections
import json
import os
import pathlib
import re
import subprocess
import sys
from collections.abc import Sequence

import gpu_study
import jax
import pytest
import study as studies

from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data.nano_tokenizer import write_tokenizer
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import init_params
from mgsd_jax.stages import init

ROOT = pathlib.Path(__file__).parents[1]
STUDY = pathlib.Path("/study")


def test_the_base_is_made_as_the_script_makes_it() -> None:
    """The same stages with the same configs, folders and settings as launch/nano_base.sh."""
    script = (ROOT / "launch" / "nano_base.sh").read_text().replace("\\\n", "")
    found = []
    for line in re.findall(r"^run (.*)$", script, re.M):
        name, *words = line.replace('"', "").replace("$WORKDIR", "/study/model").split()
        found.append([f"{ROOT}/configs/nano_base.py:{name},gpu", *sorted(words)])
    ours = []
    for part in gpu_study.base_commands("gpu", STUDY / "model"):
        stage, config, *words = part.argv[3:]
        ours.append([config.removeprefix("--config="), *sorted([stage, *words])])
    assert ours == found and len(found) == 5


def config_of(argv: Sequence[str]) -> Config:
    """The config of a command of the program."""
    settings = [word for word in argv[6:] if word != "--set"]
    return load_config(argv[4].removeprefix("--config="), settings)


@pytest.mark.parametrize("size", ["gpu", "toy"])
def test_lanes_hold_every_part_of_the_study_once(size: str) -> None:
    of = studies.small_study(size)
    lanes = gpu_study.lanes(of, STUDY)
    assert [*lanes] == ["first", "base", "method", "jsd_only", "jsd", "best_60"]
    names = [part.name for parts in lanes.values() for part in parts]
    assert len(set(names)) == len(names)
    wanted = [argv for row in of.rows for argv in studies.commands(of, row, 0, STUDY)]
    every = [part.argv for parts in lanes.values() for part in parts]
    assert all(argv in every for argv in wanted)
    assert len(every) == len(wanted) + 5 + 2  # the base's, and the boards of two folders
    assert lanes["first"][-1].name == "grounded: grounding"  # what rows of other lanes start from
    for argv in wanted:
        is_asked = "--stage=evaluate" in argv
        assert config_of(argv).data.source == ("folder" if is_asked else "stream")
    before, after = studies.SMALL["SIZES"][size].steps
    wanted_steps = {
        "method": after,
        "jsd_only": before + after,
        "jsd": after,
        "best_60": after // 2,
    }
    for name, steps in wanted_steps.items():
        assert config_of(lanes[name][0].argv).distillation.steps == steps, name


def test_the_model_of_a_gpu_has_10_to_30_million_parameters(tmp_path: pathlib.Path) -> None:
    size = studies.SMALL["SIZES"]["gpu"]
    tokenizer = write_tokenizer(tmp_path, size.shape, [*size.trained])
    config = ModelConfig.from_hf(init.hf_config(size.shape, tokenizer), source="config.json")
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    assert 10e6 < sum(leaf.size for leaf in jax.tree.leaves(shapes)) < 30e6


def test_a_part_that_was_stopped_is_timed_as_a_whole(tmp_path: pathlib.Path) -> None:
    note = {"part": "base: text", "device": "NVIDIA H200", "compiling": 20.0}
    lines = [note | {"seconds": 60.0, "done": False}, note | {"seconds": 40.0, "done": True}]
    gpu_study.times_file(tmp_path).write_text("".join(json.dumps(line) + "\n" for line in lines))
    spent = gpu_study.times(gpu_study.notes(tmp_path))
    assert spent == {"base: text": {"seconds": 100.0, "compiling": 40.0, "done": True}}
    found = gpu_study.result(studies.small_study("gpu"), tmp_path, [90.0, 30.4])
    assert found["device"] == "NVIDIA H200" and found["success"] == {}
    assert "base: text" not in found["left"] and "base: sight" in found["left"]
    text = "\n".join(gpu_study.table(found))
    assert "NVIDIA H200, 0 parameters, 90 + 30 s in all" in text
    assert "| base: text | 100.0 | 40.0 |" in text and "the same command goes on" in text


@pytest.mark.skipif(
    "REHEARSE" not in os.environ,
    reason="ten minutes beside other tests; REHEARSE=1 runs it, after changes of gpu_study.py",
)
def test_a_toy_is_stopped_runs_through_and_is_then_done(tmp_path: pathlib.Path) -> None:
    """The rehearsal of a run on a GPU."""
    program = [sys.executable, str(ROOT / "launch" / "gpu_study.py"), str(tmp_path), "--size=toy"]

    def run(*more: str) -> tuple[int, str]:
        done = subprocess.run([*program, *more], capture_output=True, text=True)
        return done.returncode, done.stdout + done.stderr

    code, said = run("--budget=45")
    assert code == gpu_study.STOPPED and "the same command goes on" in said, said
    code, said = run("--budget=3000")
    assert code == 0, said
    found = json.loads((tmp_path / "gpu_study.json").read_text())
    assert found["left"] == [] and len(found["wall_seconds"]) == 2
    rows = ["base", "grounded", "method", "jsd_only", "jsd", "best_60"]
    assert sorted(found["success"]) == sorted(rows)
    assert all(sorted(kinds) == ["held_out", "trained"] for kinds in found["success"].values())
    assert "## Main rows" in said and "## Elsewhere: held_out" in said
    times = gpu_study.times_file(tmp_path).read_text()
    done = collections.Counter(note["part"] for note in gpu_study.notes(tmp_path) if note["done"])
    assert set(done.values()) == {1}
    assert run()[0] == 0 and gpu_study.times_file(tmp_path).read_text() == times
