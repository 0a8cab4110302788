"""What recipes and docs/preflight/README.md quote is what the saved pages of the compiler say."""

import json
import pathlib
import re
import runpy
import sys

import pytest
from helpers_tiny import ROOT

from mgsd_jax.command_line import load_config

PAGES = ROOT / "docs" / "preflight"
ROLLOUT = ("layout", "prefill", "decode")
PROGRAMS = {
    "distillation": {f"distillation/{part}" for part in (*ROLLOUT, "update")}
    | {"grounding/update"},
    "evaluate": {f"evaluate/{part}" for part in ROLLOUT},
}
RECIPE = ROOT / "configs" / "qwen3vl.py"
SAVED = sorted(page for page in PAGES.glob("*.md") if page.name != "README.md")


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


def most(page: pathlib.Path, stage: str = "") -> str:
    """The largest number of GiB a chip that a stage of a page holds at once, as it stands there."""
    sizes = [row["together"] for name, row in rows(page).items() if name.startswith(stage)]
    return max(sizes, key=float)


def least_seconds(page: pathlib.Path, stage: str) -> str:
    """The seconds of a step in the page's sentence on a stage."""
    sentence = re.search(rf"^- {stage}: .* at least (\S+) s\.$", page.read_text(), re.M)
    assert sentence, f"{page.name}: no sentence on {stage}"
    return sentence[1]


@pytest.mark.parametrize("page", SAVED, ids=lambda page: page.stem)
def test_a_page_holds_every_program_and_its_command(page: pathlib.Path) -> None:
    *before, size, slice_ = page.stem.split("_")
    text, found = page.read_text(), rows(page)
    assert set(found) == PROGRAMS[before[0] if before else "distillation"]
    assert f"--config=configs/qwen3vl.py:{size} --workdir=" in text
    assert ("preflight.stages=('evaluate',)" in text) == bool(before)
    assert f"--set preflight.topology={slice_.replace('-', ':', 1)}" in text
    for row in found.values():
        assert row["verdict"] == "fits"
        assert 0 < float(row["compile CPU s"]) < 6 * 60


@pytest.mark.parametrize("stage", ["grounding", "distillation", "evaluate"])
@pytest.mark.parametrize("size", ["4b", "8b"])
def test_the_recipe_quotes_its_pages(size: str, stage: str) -> None:
    page = PAGES / f"{'evaluate_' if stage == 'evaluate' else ''}{size}_v5e-4x4.md"
    gib, seconds = most(page, stage), least_seconds(page, stage)
    line = f"{size} {stage} {gib} GiB, {seconds} s (docs/preflight/{page.name})"
    assert line in [said.strip() for said in RECIPE.read_text().splitlines()]


def test_the_overview_quotes_the_pages() -> None:
    overview = (PAGES / "README.md").read_text()
    for page in SAVED:
        line = next(line for line in overview.splitlines() if f"({page.name})" in line)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        found = rows(page)
        stages = sorted({name.split("/")[0] for name in found}, reverse=True)
        assert cells[2].startswith(f"{most(page)} of "), page.name
        assert cells[3] == " and ".join(least_seconds(page, stage) for stage in stages)
        assert int(cells[-1]) == max(int(row["compile CPU s"]) for row in found.values())


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
    """Steps of both stages by the recipe, times the least seconds of a step, times chips."""
    recipe = load_config(str(RECIPE), [])
    steps = {"grounding": recipe.grounding.steps, "distillation": recipe.distillation.steps}
    text = (ROOT / "README.md").read_text()
    for slice_ in ("v5e-4x4", "v6e-2x4", "v5p-2x2x2"):
        hours = []
        for size in ("4b", "8b"):
            page = PAGES / f"{size}_{slice_}.md"
            chips = re.search(r"^(\d+) chips of ", page.read_text(), re.M)
            assert chips
            seconds = sum(n * float(least_seconds(page, stage)) for stage, n in steps.items())
            hours.append(f"{seconds * int(chips[1]) / 3600:.0f}")
        assert f"| {slice_.replace('-', ':', 1)} | {' | '.join(hours)} |" in text
    assert f"{steps['grounding']} steps of grounding" in text


@pytest.mark.parametrize("memory", ["80gb", "24gb"])
def test_a_recipe_for_one_gpu_holds_the_base_once(memory: str) -> None:
    config = load_config(str(ROOT / "configs" / f"gpu_4b.py:{memory}"), [])
    assert config.grounding.lora == config.distillation.lora and config.grounding.lora.rank
    assert config.distillation.teacher == config.grounding.student == "{model}"
    assert config.distillation.student == "{workdir}/grounding"
    assert config.mesh.tensor == 1
