"""A wheel has what the package needs, and works where there is no checkout."""

import configparser
import os
import pathlib
import shutil
import subprocess
import sys
import tomllib
from email.parser import Parser

import helpers_children
import pytest
import test_metric_names

from mgsd_jax import command_line
from mgsd_jax.workdir import metrics

ROOT = pathlib.Path(__file__).parents[1]
FILES = ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE")
# The quickstart's stages with a step each, on a few boards of one task.
FEW = (
    "data.boards=({'task':'frozenlake','levels':(3,),'train':8,'val':4,'test':2},)",
    *("grounding.steps=1", "grounding.batch_size=2", "grounding.microbatches=1"),
    *("distillation.steps=1", "distillation.batch_size=2", "distillation.microbatches=1"),
    "distillation.grounding_share=0",
    *("distillation.eval_boards=1", "distillation.sampling.max_new_tokens=4"),
    *("evaluate.batch_size=2", "evaluate.sampling.max_new_tokens=4", "evaluate.modes=('picture',)"),
)


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


@pytest.mark.slow
def test_the_stages_of_the_quickstart_run_away_from_the_checkout(
    installed: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    command = installed / "bin" / "mgsd_jax"
    environ = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": path_of(installed),
    }

    def call(*arguments: str) -> str:
        done = subprocess.run(
            [command, *arguments],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    helped = call("--help")
    assert "--workdir" in helped and "in the order of a whole run" in helped
    changes = [f"--set={change}" for change in FEW]
    for stage in ("generate", "grounding", "distillation", "evaluate", "export", "report"):
        call(f"--stage={stage}", "--config=nano", "--workdir=run", *changes)
    for stage in ("grounding", "distillation"):
        for record in metrics.read_metrics(tmp_path / "run" / stage / "metrics.jsonl"):
            assert test_metric_names.unlisted(record) == set()
    assert (tmp_path / "run" / "report" / "index.html").is_file()
    assert (tmp_path / "run" / "export" / "model.safetensors").is_file()
