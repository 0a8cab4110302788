"""The help says all that there is, and what is printed instead of a run can be read again."""

import dataclasses
import json
import pathlib
import subprocess
import sys
from typing import Annotated

import pytest
from absl.testing import flagsaver

from mgsd_jax import command_line, config
from mgsd_jax.checks import meanings
from mgsd_jax.checks.ranges import FREE, Between, Items
from mgsd_jax.config import Config

ROOT = pathlib.Path(__file__).parents[1]
RECIPES = sorted(command_line.recipes())


def said(capsys: pytest.CaptureFixture[str], *words: str, code: int = 0) -> str:
    """What the program prints for these flags before anything is imported."""
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as left:
        command_line.parse_flags(["mgsd_jax", *words], known_only=True)
    assert left.value.code == code
    printed = capsys.readouterr()
    return printed.err if code else printed.out


def test_the_help_names_every_stage_flag_and_recipe_on_one_screen(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "--help")
    for stage in command_line.STAGES:
        assert f"\n  {stage} " in text
    for flag in command_line.own_flags():
        assert f"\n  --{flag.name} " in text
    for recipe in RECIPES:
        assert recipe in text
    assert max(map(len, text.splitlines())) <= 100 and text.count("\n") < 60
    assert "repeat this option" not in text and "logtostderr" not in text


def test_every_field_has_a_meaning() -> None:
    missing = [field.name for field in meanings.fields(Config) if not field.meaning]
    assert missing == []


def test_the_help_of_a_field_is_what_its_source_says() -> None:
    @dataclasses.dataclass(frozen=True)
    class Part:
        folder: Annotated[str, Items(1)]
        # above it,
        # in two lines
        steps: Annotated[int, Between(1, 9), FREE] = 3  # and beside

        # of nothing

        pair: tuple[int, float] = (
            1,  # inside
            2.0,
        )

    assert meanings.comments(Part) == {
        "folder": "",
        "steps": "above it, in two lines and beside",
        "pair": "inside",
    }


def test_the_help_of_the_config_shows_type_default_and_meaning(
    capsys: pytest.CaptureFixture[str],
) -> None:
    text = said(capsys, "--help_config")
    for field in meanings.fields(Config):
        assert f"  {field.name}" in text
    assert "  data.boards[].levels  (no default)\n      Sizes of the boards; " in text
    section = said(capsys, "--help_config=distillation")
    assert section.startswith("distillation: Stage 2: on-policy distillation")
    assert (
        "  distillation.rollouts = 1\n      Responses sampled for each prompt. Takes a " in section
    )
    assert "whole number, 1 to 1,000,000." in section and "grounding.steps" not in section
    part = said(capsys, "--help_config=evaluate.sampling")
    assert "  evaluate.sampling.temperature = 0.0\n" in part and "evaluate.tries" not in part
    wrong = said(capsys, "--help_config=distil", code=2)
    assert wrong.startswith("--help_config: got 'distil', want a field or one of ['model', 'data'")
    assert wrong.count("\n") == 1


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_printed_config_is_read_back_the_same(
    recipe: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = {"nano_base": ":text"}
    given = command_line.load_config(recipe + arguments.get(recipe, ""), [])
    text = said(capsys, "--print_config", f"--config={recipe}{arguments.get(recipe, '')}")
    changed = config.override(given, ["seed=7", "data.exclude=a,b", "grounding.steps=3"])
    assignments = text.replace("\n    ", "    ").replace("\n)", ")").splitlines()
    assert len(assignments) > 100
    assert config.check(config.override(changed, assignments)) == given


def test_a_printed_config_has_what_set_and_prompts_changed(
    capsys: pytest.CaptureFixture[str],
) -> None:
    before = said(capsys, "--print_config", "--config=nano").splitlines()
    changes = ("--set", "grounding.steps=7", "--prompts=words")
    after = said(capsys, "--config=nano", "--print_config", *changes).splitlines()
    differing = [line for line in after if line not in before]
    assert differing == ["data.prompts=words", "grounding.steps=7"]
    for words, line in {
        ("--print_config",): "--config is required here",
        ("--print_config", "--config=nan"): "--config: got 'nan', want an existing Python file or ",
        ("--print_config", "--config=nano", "--set", "a=1"): "--set a: no field 'a', want one of",
    }.items():
        wrong = said(capsys, *words, code=2)
        assert wrong.startswith(line) and wrong.count("\n") == 1


def test_the_versions_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    names = [line.split()[0] for line in said(capsys, "--version").splitlines()]
    assert names == ["mgsd_jax", "Python", "jax", "jaxlib", "flax", "transformers"]


RUN = ("--stage=grounding", "--config=nano", "--workdir=x")
# Flags -> the one line that the program ends with, and 2.
WRONG = {
    ("--stag=x",): "Unknown command line flag 'stag'. Did you mean: stage ?; see --help",
    ("--stage=report", "--sets", "a=1"): "Unknown command line flag 'sets'.",
    ("--verbosity=1", "--stage=train"): "flag --stage=train: value should be one of <init|",
    ("--config=a",): "--stage is required, one of ['init'",
    ("--stage=grounding", "--workdir=x"): "--config is required for --stage=grounding",
    ("--stage=grounding", "--config=nano"): "--workdir is required for --stage=grounding",
    ("--stage=score",): "--input is required for --stage=score",
    ("--stage=ask", "--config=nano"): "--input is required for --stage=ask",
    (*RUN, "stray"): "got stray arguments ['stray'], want flags only",
    (*RUN, "--set", "data.a=1"): "--set data.a: no field 'a', want one of [",
    (*RUN, "--set", "seed"): "--set: got 'seed', want a.b=value",
    (*RUN, "--config=absent.py"): "--config: got 'absent.py', want an existing Python file or one",
    (*RUN, "--compile_cache=s3://a"): "--compile_cache: got 's3://a', want a local path or gs://",
    (*RUN, "--workdir=s3://a"): "--workdir: got 's3://a', want a local path or gs://",
    (*RUN, "--stage=generate", "--profile=5:8"): "--profile: got --stage=generate, want one of [",
}
WITHOUT_JAX = """
import contextlib, io, json, runpy, sys
ends = []
for words in json.loads(sys.argv[1]):
    sys.argv, out, err, code = ["mgsd_jax", *words], io.StringIO(), io.StringIO(), None
    for name in [name for name in sys.modules if name.startswith("mgsd_jax")]:
        del sys.modules[name]
    from absl import flags
    for name in [n for n in flags.FLAGS if "mgsd_jax" in flags.FLAGS.find_module_defining_flag(n)]:
        delattr(flags.FLAGS, name)
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            runpy.run_module("mgsd_jax", run_name="__main__")
        except SystemExit as left:
            code = left.code
    ends.append((code, out.getvalue(), err.getvalue()))
    assert not {"jax", "numpy"} & {*sys.modules}, words
print(json.dumps(ends))
"""


def test_answers_and_wrong_flags_import_no_jax() -> None:
    answers = [("--help",), ("--print_config", "--config=nano")]
    asked = json.dumps([*answers, *WRONG])
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_JAX, asked], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    ends = json.loads(done.stdout)
    for code, out, err in ends[: len(answers)]:
        assert code == 0 and "grounding" in out and not err
    for line, (code, out, err) in zip(WRONG.values(), ends[len(answers) :], strict=True):
        assert err.startswith(line) and err.count("\n") == 1 and not out and code == 2


def test_boards_of_the_wrong_form_show_the_right_one() -> None:
    nano = command_line.load_config("nano", [])
    for text in ("maze", "('maze',)", "({'task': 'maze'},)", "{'task': 'maze'}"):
        with pytest.raises(ValueError, match=r"^--set data.boards: ") as raised:
            config.override(nano, [f"data.boards={text}"])
        form = "{'task': str, 'levels': tuple[int, ...], 'train': int, 'val': int, 'test': int}"
        line = str(raised.value)
        assert form in line or "levels is required" in line
    boards = "({'task': 'maze', 'levels': (3, 4), 'train': 8, 'val': 4, 'test': 6},)"
    changed = config.override(nano, [f"data.boards={boards}"]).data.boards
    assert changed == (config.LevelSet("maze", (3, 4), 8, 4, 6),)
