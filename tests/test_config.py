"""Overrides change one field and nothing else; whatever is wrong is named."""

import ast
import dataclasses
import pathlib
import re
from typing import Any

import pytest

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config, OptimConfig

ROOT = pathlib.Path(__file__).parents[1]
TABLES = ("rows.py",)  # settings of many runs, no config
CONFIGS = sorted(p for p in (ROOT / "configs").rglob("*.py") if p.name not in TABLES)
ARGUMENTS = {
    "qwen3vl": ("4b", "8b"),
    "gpu_4b": ("80gb", "24gb"),
    "nano_base": ("text", "sight", "finish", "text,plans", "finish,plans", "sight,small"),
    "small": ("small", "gpu", "toy"),
}


@pytest.fixture
def config() -> Config:
    return load_config(str(ROOT / "configs" / "nano.py"), [])


def test_override_changes_just_the_named_field(config: Config) -> None:
    changed = config_lib.override(config, ["grounding.optim.lr=1e-4", "data.patch_buckets=(4, 8)"])
    assert changed.grounding.optim.lr == 1e-4
    assert changed.data.patch_buckets == (4, 8)
    back = config_lib.override(changed, [f"grounding.optim.lr={config.grounding.optim.lr}"])
    back = config_lib.override(back, [f"data.patch_buckets={config.data.patch_buckets}"])
    assert back == config


def test_later_override_wins_and_ints_become_floats() -> None:
    optim = config_lib.override(OptimConfig(lr=1.0), ["lr=2", "lr=3"])
    assert optim.lr == 3.0 and isinstance(optim.lr, float)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("grounding.optim.rate=1", r"grounding.optim.rate: no field 'rate', want one of \['b1'"),
        ("nothing=1", r"no field 'nothing'"),
        ("seed.a=1", r"int has no field 'a'"),
        ("seed=1.5", r"seed: got 1.5, want int"),
        ("seed=True", r"seed: got True, want int"),
        ("grounding.optim.lr=fast", r"got 'fast', want float"),
        ("data.source=disk", r"got 'disk', want one of \('folder', 'stream'\)"),
        ("data.patch_buckets=4", r"got 4, want tuple\[int, ...\]"),
        ("data.patch_buckets=(4, 'a')", r"got 'a', want int"),
        ("grounding.mixture=(('questions',),)", r"want tuple"),
        ("seed", r"got 'seed', want a.b=value"),
    ],
)
def test_wrong_override_is_named(config: Config, assignment: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config_lib.override(config, [assignment])


def test_check_finds_wrong_types_in_a_config_file(config: Config) -> None:
    wrong: Any = "two"
    data = dataclasses.replace(config.data, workers=wrong)
    with pytest.raises(ValueError, match=r"config.data.workers: got 'two', want int"):
        config_lib.check(dataclasses.replace(config, data=data))
    with pytest.raises(ValueError, match="cell_pixels"):
        config_lib.check(config_lib.override(config, ["data.picture_size=256"]))
    with pytest.raises(ValueError, match=r"data.channels: got \(0, 0, 1\), want an order"):
        config_lib.check(config_lib.override(config, ["data.channels=(0, 0, 1)"]))
    with pytest.raises(ValueError, match=r"grounding.microbatches: got 5, want a divisor of 48"):
        config_lib.check(config_lib.override(config, ["grounding.microbatches=5"]))


def test_json_round_trip(config: Config) -> None:
    assert config_lib.coerce(config_lib.to_dict(config), Config, "config") == config


def test_defaults_are_those_of_the_sections(config: Config) -> None:
    found = config_lib.defaults(Config)
    assert found["checkpoint"] == config_lib.to_dict(config_lib.CheckpointConfig())
    assert found["distillation"]["sampling"]["temperature"] == 1.0
    assert found["data"]["prompt_buckets"] == [512, 1024]
    assert "lr" not in found["distillation"]["optim"]  # it has none


def test_bad_config_files_are_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"absent.py.*want an existing"):
        load_config(str(tmp_path / "absent.py"), [])
    file = tmp_path / "a.py"
    file.write_text("x = 1\n")
    with pytest.raises(ValueError, match=r"a.py: no get_config"):
        load_config(str(file), [])
    file.write_text("def get_config():\n    return 1\n")
    with pytest.raises(ValueError, match="got int from get_config"):
        load_config(str(file), [])


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_every_config_file_loads_and_says_how_to_run(path: pathlib.Path) -> None:
    default = load_config(str(path), [])
    configs = [load_config(f"{path}:{argument}", []) for argument in ARGUMENTS.get(path.stem, ())]
    assert configs[:1] in ([], [default]) and len(set(configs)) == len(configs)
    text = ast.get_docstring(ast.parse(path.read_text()))
    assert text is not None
    for word in ("Command:", "Hardware:", "Expected:"):
        assert word in text, f"{path.name}: docstring lacks {word}"


def test_every_field_is_read_somewhere() -> None:
    sources = (
        "\n".join(
            path.read_text()
            for path in (ROOT / "mgsd_jax").rglob("*.py")
            if path.name != "config.py"
        )
        + (ROOT / "mgsd_jax" / "config.py").read_text().split("def resolve")[1]
    )
    kinds = [
        kind
        for kind in vars(config_lib).values()
        if dataclasses.is_dataclass(kind) and isinstance(kind, type)
    ]
    unread = [
        f"{kind.__name__}.{field.name}"
        for kind in kinds
        for field in dataclasses.fields(kind)
        if not re.search(rf"\.{field.name}\b", sources)
        # Read as a whole (keyword arguments of its twin), and by the name of the split.
        and kind.__name__ not in ("SamplingConfig", "LevelSet")
    ]
    assert unread == []


def test_resolve_fills_in_every_path_and_nothing_else(config: Config) -> None:
    changes = [
        "model.path={workdir}/init",
        "distillation.student=gs://b/other",
        "data.exclude={workdir}/vsp, other",
        "evaluate.benchmarks=(('frozenlake_vsp', '{workdir}/vsp'),)",
    ]
    config = config_lib.override(config, changes)
    resolved = config_lib.resolve(config, "runs/a")
    assert resolved.model.path == resolved.distillation.teacher == "runs/a/init"
    assert resolved.evaluate.models[0] == ("base", "runs/a/init")
    assert resolved.data.folder == "runs/a/data" and resolved.data.exclude == (
        "runs/a/vsp",
        "other",
    )
    assert resolved.evaluate.benchmarks == (("frozenlake_vsp", "runs/a/vsp"),)
    assert resolved.distillation.student == "gs://b/other"
    back = str(config_lib.to_dict(resolved)).replace("runs/a/init", "{model}")
    want = str(config_lib.to_dict(config)).replace("{workdir}/init", "{model}")
    assert back.replace("runs/a", "{workdir}") == want
