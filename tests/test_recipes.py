"""What recipes and docs/preflight/README.md quote is what the saved pages of the compiler say."""

import dataclasses
import itertools
import json
import pathlib
import re
import runpy
import shlex
import sys

import pytest
from helpers_tiny import ROOT

from mgsd_jax.command_line import load_config

PAGES = ROOT / "docs" / "preflight"
ROLLOUT = ("layout", "prefill", "decode")
PARTS = {"grounding": ("update",), "distillation": (*ROLLOUT, "update"), "evaluate": ROLLOUT}
TYPICAL = "## The typical step"
KEPT = ("1", "2.8", "5")
RECIPE = ROOT / "configs" / "qwen3vl.py"
ALL = sorted(page for page in PAGES.glob("*.md") if page.name != "README.md")
SAVED = [page for page in ALL if TYPICAL in page.read_text()]
EARLIER = [page for page in ALL if page not in SAVED]  # of the recipe before drafts


def rows(page: pathlib.Path) -> dict[str, dict[str, str]]:
    """{program: {column: cell}} of both tables of a page."""
    found: dict[str, dict[str, str]] = {}
    columns: list[str] = []
    for line in page.read_text().splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("| program"):
            columns = cells
        elif line.startswith("|") and "/" in cells[0]:
            found.setdefault(cells[0], {}).update(zip(columns, cells, strict=True))
    return found


def compiled(page: pathlib.Path) -> dict[str, dict[str, str]]:
    """The rows of programs that the compiler was asked about."""
    return {name: row for name, row in rows(page).items() if row["compile CPU s"] != "-"}


def most(page: pathlib.Path, stage: str = "") -> str:
    """The largest number of GiB a chip that a stage of a page holds at once, as it stands there."""
    sizes = [row["together"] for name, row in compiled(page).items() if name.startswith(stage)]
    return max(sizes, key=float)


def longest_step(page: pathlib.Path, stage: str) -> str:
    """The seconds of a step in the page's sentence on a stage."""
    return sentence(page.read_text().split(TYPICAL)[0], stage)


def typical_step(page: pathlib.Path, stage: str, kept: str = "2.8") -> str:
    """The seconds of a typical step of a stage, where `kept` tokens stay a pass."""
    text = page.read_text().split(TYPICAL)[1]
    if stage == "grounding":
        return sentence(text, stage)
    table = re.search(rf"^- {stage}: .*\n\n((?:\|.*\n)+)", text, re.M)
    assert table, f"{page.name}: no table of {stage}"
    found = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table[1].splitlines()]
    return next(cells[-1] for cells in found if cells[0] == kept)


def sentence(text: str, stage: str) -> str:
    found = re.search(rf"^- {stage}: .* at least (\S+) s\.$", text, re.M)
    assert found, f"no sentence on {stage}"
    return found[1]


@pytest.mark.parametrize("page", SAVED, ids=lambda page: page.stem)
def test_a_page_holds_every_program_and_its_command(page: pathlib.Path) -> None:
    """The command writes into a folder of the page's name, and for the slice that ends it."""
    command = re.search(r"^`python -m mgsd_jax.main (.*)`$", page.read_text(), re.M)
    assert command
    words = shlex.split(command[1])
    flags = dict(word.split("=", 1) for word in words if word.startswith("--") and "=" in word)
    changes = [after for word, after in itertools.pairwise(words) if word == "--set"]
    assert flags["--workdir"] == f"runs/preflight/{page.stem}"
    config = load_config(str(ROOT / flags["--config"]), changes)
    assert page.stem.endswith(config.preflight.topology.replace(":", "-"))
    found = rows(page)
    parts = dict(PARTS)
    if config.preflight.topology == "h100":  # one chip decodes from the weights as they lie
        parts = {stage: [part for part in parts[stage] if part != "layout"] for stage in parts}
    assert set(found) == {f"{s}/{part}" for s in config.preflight.stages for part in parts[s]}
    for name, row in found.items():
        assert row["verdict"] == ("fits" if name in compiled(page) else "not compiled")


@pytest.mark.parametrize("stage", ["grounding", "distillation", "evaluate"])
@pytest.mark.parametrize("size", ["4b", "8b", "80gb", "24gb"])
def test_the_recipe_quotes_its_pages(size: str, stage: str) -> None:
    gpus = {"80gb": "gpu_4b_h100", "24gb": "gpu_4b_24gb_h100"}
    slices = f"{'evaluate_' if stage == 'evaluate' else ''}{size}_v5e-4x4"
    page = PAGES / f"{gpus.get(size, slices)}.md"
    recipe = ROOT / "configs" / "gpu_4b.py" if size in gpus else RECIPE
    missing = [name for name in rows(page) if name.startswith(stage) and name not in compiled(page)]
    held = "memory not compiled" if missing else f"{most(page, stage)} GiB"
    seconds = f"{typical_step(page, stage)} and {longest_step(page, stage)} s"
    line = f"{size} {stage} {held}, {seconds} (docs/preflight/{page.name})"
    assert line in [said.strip() for said in recipe.read_text().splitlines()]


def test_the_overview_quotes_the_pages() -> None:
    overview = (PAGES / "README.md").read_text()
    for page in SAVED:
        line = next(line for line in overview.splitlines() if f"({page.name})" in line)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = rows(page)
        stages = list(dict.fromkeys(name.split("/")[0] for name in found))
        assert cells[2].startswith(f"{most(page)} of "), page.name
        for place, stage in enumerate(stages):
            times = [typical_step(page, stage, kept) for kept in KEPT]
            if stage == "grounding":
                times = times[:1]
            assert cells[3].split("; ")[place] == f"{stage} {' / '.join(times)}"
            assert cells[4].split("; ")[place] == longest_step(page, stage)
        missing = [name for name in found if name not in compiled(page)]
        assert cells[5] == (f"not compiled: {', '.join(missing)}" if missing else "everything")
        seconds = [int(row["compile CPU s"]) for row in compiled(page).values()]
        assert int(cells[-1]) == max(seconds)


@pytest.mark.parametrize("page", EARLIER, ids=lambda page: page.stem)
def test_the_overview_quotes_the_pages_of_the_recipe_before(page: pathlib.Path) -> None:
    overview = (PAGES / "README.md").read_text()
    assert f"| [{page.stem}]({page.name}) | {most(page)} |" in overview
    assert {row["verdict"] for row in rows(page).values()} == {"fits"}


def test_the_readme_quotes_the_memory_of_one_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    """The table is what benchmarks/memory.py prints, and the recipes fit their cards by it."""
    memory = runpy.run_path(str(ROOT / "benchmarks" / "memory.py"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["memory.py"])
        memory["main"]()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])["found"]
    gb = {(one["size"], one["mode"]): one["gb"] for one in found}
    text = (ROOT / "README.md").read_text()
    for size in memory["SIZES"]:
        cells = [f"{gb[size, mode]} GB" for mode in memory["MODES"]]
        assert f"| {size} | {' | '.join(cells)} |" in text
    assert gb["4B", "adapters"] < 0.9 * 24 and gb["8B", "adapters"] < 0.9 * 80


def test_the_readme_quotes_the_chip_hours_of_the_pages() -> None:
    """Steps of both stages by the recipe, times the seconds of a typical step, times chips."""
    recipe = load_config(str(RECIPE), [])
    steps = {"grounding": recipe.grounding.steps, "distillation": recipe.distillation.steps}
    hours = []
    for size in ("4b", "8b"):
        page = PAGES / f"{size}_v5e-4x4.md"
        seconds = sum(n * float(typical_step(page, stage)) for stage, n in steps.items())
        hours.append(f"{seconds * 16 / 3600:.0f}")
    text = (ROOT / "README.md").read_text()
    said = f"on v5e:4x4 | {hours[0]} (4B), {hours[1]} (8B): {steps['grounding']} steps of grounding"
    assert said in text


@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_published_settings_differ_in_distillation_alone(size: str) -> None:
    ours, theirs = (load_config(f"{RECIPE}:{size}{variant}", []) for variant in ("", ",release"))
    told, published = ours.distillation, theirs.distillation
    assert (told.teacher_context, told.objective) == ("state", "jsd")
    assert (published.teacher_context, published.objective) == ("state_and_plan", "reverse_kl")
    assert told.teacher == published.teacher == "{model}" and told.teacher_decay == 0
    alike = dataclasses.replace(
        published, teacher_context=told.teacher_context, objective=told.objective
    )
    assert dataclasses.replace(theirs, distillation=alike, data=ours.data) == ours


@pytest.mark.parametrize("memory", ["80gb", "24gb"])
def test_a_recipe_for_one_gpu_holds_the_base_once(memory: str) -> None:
    config = load_config(str(ROOT / "configs" / f"gpu_4b.py:{memory}"), [])
    assert config.grounding.lora == config.distillation.lora and config.grounding.lora.rank
    assert config.distillation.teacher == config.grounding.student == "{model}"
    assert config.distillation.student == "{workdir}/grounding"
    assert config.mesh.tensor == 1
