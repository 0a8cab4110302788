"""A wheel has what the package needs and works without a checkout; its runs can be moved."""

import configparser
import json
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Sequence
from email.parser import Parser

import helpers_children
import helpers_devices
import numpy as np
import pytest
import test_metric_names

from mgsd_jax import command_line, tree
from mgsd_jax.workdir import checkpoint, metrics

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")
# The quickstart's stages with a step or two each, on a few boards of one task.
FEW = (
    "data.boards=({'task':'frozenlake','levels':(3,),'train':12,'val':4,'test':4},)",
    *("data.patch_buckets=(36,)", "checkpoint.every=1", "checkpoint.keep_last=9"),
    *(f"{stage}.batch_size=4" for stage in ("grounding", "distillation")),
    *(f"{stage}.microbatches=1" for stage in ("grounding", "distillation")),
    *("grounding.steps=1", "grounding.eval_batches=1", "distillation.steps=2"),
    "distillation.grounding_share=0",
    *("distillation.eval_boards=4", "distillation.sampling.max_new_tokens=8"),
    *("evaluate.sampling.max_new_tokens=8", "evaluate.modes=('picture',)"),
    "evaluate.batch_size=2",
)
STAGES = ("generate", "grounding", "distillation", "evaluate", "export", "report")
# The stages after the program's name and workdir, in one process of any clone.
PROGRAM = """
import sys
from mgsd_jax import command_line, main
workdir, stages, *settings = sys.argv[1:]
config = command_line.load_config("nano", settings)
for stage in stages.split(","):
    main.STAGES[stage](config, workdir)
"""


def path_of(installed: pathlib.Path) -> str:
    return os.pathsep.join((str(installed), helpers_children.WITHOUT_TORCH))


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """A folder with an installed wheel and nothing else of this checkout."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("installed")
    for name in ("mgsd_jax", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in FILES:
        shutil.copy(ROOT / name, source)
    pip = (sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation")
    done = subprocess.run(
        [*pip, "--no-index", "--no-compile", "--target", target, source],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return target


def test_a_wheel_has_every_file_of_the_package_and_the_configs(installed: pathlib.Path) -> None:
    for folder, kept in ((ROOT / "mgsd_jax", "mgsd_jax"), (ROOT / "configs", "mgsd_jax/configs")):
        for file in folder.rglob("*"):
            if file.is_file() and file.parent.name != "__pycache__":
                copy = installed / kept / file.relative_to(folder)
                assert copy.is_file() and copy.read_bytes() == file.read_bytes(), file
    others = {path.name for path in installed.iterdir()} - {"mgsd_jax", "bin"}
    assert len(others) == 1 and others.pop().startswith("mgsd_jax-")


def test_its_metadata_say_whose_it_is_and_what_it_needs(installed: pathlib.Path) -> None:
    (info,) = installed.glob("mgsd_jax-*.dist-info")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    said = Parser().parsestr((info / "METADATA").read_text())
    assert (said["Name"], said["Version"]) == ("mgsd_jax", project["version"])
    assert said["License-Expression"] == "Apache-2.0"
    assert {file.name for file in (info / "licenses").iterdir()} == {"LICENSE", "NOTICE"}
    needed = [line for line in said.get_all("Requires-Dist", []) if "extra ==" not in line]
    assert len(needed) == len(project["dependencies"])
    commands = configparser.ConfigParser()
    commands.read(info / "entry_points.txt")
    assert dict(commands["console_scripts"]) == {"mgsd_jax": "mgsd_jax.__main__:run"}


def test_a_recipe_is_found_by_its_name(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = str(ROOT / "configs" / "nano.py")
    assert command_line.load_config("nano", []) == command_line.load_config(recipe, [])
    with pytest.raises(
        ValueError, match=r"--config: got 'no_such_recipe', want an .* one of gpu_4b, "
    ):
        command_line.load_config("no_such_recipe", [])
    monkeypatch.chdir(tmp_path)
    assert command_line.find_config("a/nano") == "a/nano"
    (tmp_path / "nano").touch()  # a file of the user's comes first
    assert command_line.find_config("nano") == "nano"


def test_the_command_answers_away_from_the_checkout(
    installed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for words, said in {
        ("--help",): "in the order of a whole run",
        ("--config=nano", "--print_config"): "\ngrounding.steps=40\n",
        ("--help_config=seed",): "seed = 0\n",
    }.items():
        done = subprocess.run(
            [installed / "bin" / "mgsd_jax", *words],
            cwd=tmp_path,
            env={**os.environ, "PYTHONPATH": path_of(installed)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and said in done.stdout, done.stderr


def run(argv: Sequence[object], cwd: pathlib.Path, package: pathlib.Path) -> None:
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path_of(package),
        "XLA_FLAGS": helpers_devices.quick_flags(1),
    }
    done = subprocess.run(
        list(map(str, argv)), cwd=cwd, env=environ, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]


@pytest.fixture(scope="module")
def workdir(installed: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """All stages of the quickstart, by the command of the installed wheel."""
    folder = tmp_path_factory.mktemp("here")
    changes = [f"--set={change}" for change in FEW]
    for stage in STAGES:
        command = [installed / "bin" / "mgsd_jax", f"--stage={stage}", "--config=nano"]
        run([*command, "--workdir=run", *changes], folder, installed)
    return folder / "run"


@pytest.mark.slow
def test_the_stages_of_the_quickstart_run_away_from_the_checkout(workdir: pathlib.Path) -> None:
    for stage in ("grounding", "distillation"):
        found = metrics.read_metrics(workdir / stage / "metrics.jsonl")
        assert found
        for record in found:
            assert test_metric_names.unlisted(record) == set()
    assert (workdir / "report" / "index.html").is_file()
    assert (workdir / "export" / "model.safetensors").is_file()


def make_clone(place: pathlib.Path) -> pathlib.Path:
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "mgsd_jax", place / "mgsd_jax", ignore=ignored)
    shutil.copytree(ROOT / "configs", place / "configs", ignore=ignored)
    return place


def results(workdir: pathlib.Path) -> dict[str, bytes]:
    """Trained weights, answers and the export, which have to be the same to the last bit."""
    trained = checkpoint.load_params(workdir / "distillation" / "checkpoints")
    found = {name: np.asarray(leaf).tobytes() for name, leaf in tree.named_leaves(trained)}
    for file in ("evaluate/rows.jsonl", "export/model.safetensors", "export/config.json"):
        found[file] = (workdir / file).read_bytes()
    return found


@pytest.mark.slow
def test_a_moved_workdir_goes_on_from_a_clone(
    workdir: pathlib.Path, installed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    """Stopped halfway in distillation and in evaluation; the first place and package are gone."""
    want = results(workdir)
    there = tmp_path / "there" / "renamed"
    shutil.copytree(workdir, there)
    gone = {place: place.with_name(f"{place.name}_gone") for place in (workdir, installed)}
    for place, elsewhere in gone.items():
        place.rename(elsewhere)
    shutil.rmtree(there / "export")
    shutil.rmtree(there / "distillation" / "checkpoints" / "2")
    rows = (there / "evaluate" / "rows.jsonl").read_bytes().splitlines(keepends=True)
    assert len(rows) == 3 * 4  # models, boards
    (there / "evaluate" / "rows.jsonl").write_bytes(b"".join(rows[:10]))
    (there / "evaluate" / "summary.json").unlink()
    # What an older version left.
    source = there / "grounding" / "model" / "source.json"
    old = json.loads(source.read_text()) | {"weights": f"{installed}/mgsd_jax/assets/nano_base"}
    source.write_text(json.dumps(old))
    (there / "distillation" / "places.json").unlink()
    clone = make_clone(tmp_path / "clone")
    command = [sys.executable, "-c", PROGRAM, there, "distillation,evaluate,export", *FEW]
    try:
        run(command, tmp_path, clone)  # the working directory says nothing
    finally:
        for place, elsewhere in gone.items():
            elsewhere.rename(place)
    got = results(there)
    assert got.keys() == want.keys()
    assert [name for name in want if got[name] != want[name]] == []
    # Files that are read again do not name the old places.
    places = (str(workdir).encode(), str(installed).encode())
    read = [file for part in ("*", "model/*") for file in (there / "distillation").glob(part)]
    read = [*read, *(there / "export").glob("*"), *(there / "evaluate").glob("*")]
    named = {f.name for f in read if f.is_file() and any(p in f.read_bytes() for p in places)}
    assert named <= {"runs.jsonl"}
