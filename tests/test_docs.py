"""What the pages say of the code is so: links, settings, flags, stages, modules, quoted numbers."""

import dataclasses
import itertools
import re
import runpy
import shlex
import typing
from collections.abc import Iterator
from pathlib import Path

import pytest
import test_layering

from mgsd_jax import command_line
from mgsd_jax import config as config_lib

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "mgsd_jax"
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
CONFIGS = {
    name: runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]
    for name in ("nano", "qwen3vl", "gpu_4b")
}
SECTIONS = [field.name for field in dataclasses.fields(config_lib.Config)]
MODULES = sorted(PACKAGE.rglob("*.py"))
SOURCES = {stem: "" for stem in (path.stem for path in MODULES)}
for path in MODULES:  # a few modules of different packages share a name
    SOURCES[path.stem] += path.read_text()
ENDINGS = (".py", ".json", ".jsonl", ".md", ".txt", ".html", ".css")
FLAGS = {*(flag.name for flag in command_line.own_flags()), "help", "helpfull", "verbosity"}
STAGES = {*command_line.STAGES}

every_page = pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))


def blocks(text: str) -> list[str]:
    """The fenced blocks without their fences; lines that continue are joined."""
    found = re.findall(r"^```\w*\n(.*?)^```", text, re.M | re.S)
    return [block.replace("\\\n", " ") for block in found]


def spans(text: str) -> list[str]:
    """The code in the running text; tables escape its bars."""
    running = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [" ".join(s.replace("\\|", "|").split()) for s in re.findall(r"`([^`]+)`", running)]


def words_of(code: str) -> list[str]:
    """The words of a piece of shell; what a quotation around the whole leaves open is cut off."""
    try:
        return shlex.split(code, comments=True)
    except ValueError:
        return code.rstrip("\"'").split()


def commands(text: str) -> Iterator[list[str]]:
    """The words after the program's name, or from a flag on, in every line of code."""
    lines = [line for block in blocks(text) for line in block.splitlines()]
    for line in (*lines, *spans(text)):
        found = re.search(r"(mgsd_jax(\.main)?|(tpu|host)\.sh run .*--) (--.*)|^(--set .*)", line)
        if found:
            yield words_of(found[4] or found[5])


def is_field(name: str) -> bool:
    """Whether 'a.b' is a field, or a section, of the config."""
    kind: object = config_lib.Config
    for part in name.split("."):
        kind = next((one for one in typing.get_args(kind) if dataclasses.is_dataclass(one)), kind)
        if not dataclasses.is_dataclass(kind):
            return False
        hints = typing.get_type_hints(kind)
        if part not in hints:
            return False
        kind = hints[part]
    return True


def is_defined(module: str, name: str) -> bool:
    """Whether a module of the package has a function, class, constant or method of this name."""
    last = re.escape(name.split(".")[-1])
    pattern = rf"^ *((async )?def|class) {last}\b|^{last}\b.*=|import .*\b{last}\b"
    return bool(re.search(pattern, SOURCES.get(module, ""), re.M))


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


@every_page
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        assert file.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", file.read_text(), re.M)
            assert anchor in map(slug, headings), target


@every_page
def test_settings_are_taken(page: Path) -> None:
    for words in commands(page.read_text()):
        for flag, assignment in itertools.pairwise(words):
            if flag == "--set" and not set("[]…") & set(assignment) and assignment != "a.b=c":
                config_lib.override(CONFIGS["nano"](), [assignment])


@every_page
def test_names_in_the_text_exist(page: Path) -> None:
    """`section.field`, with a value or without, and `module.name`."""
    for word in (word for span in spans(page.read_text()) for word in words_of(span)):
        name, equals, value = word.strip(",").partition("=")
        first, _, rest = name.partition(".")
        if not re.fullmatch(r"[a-z]\w*(\.\w+)+", name) or name.endswith(ENDINGS):
            continue
        if equals and first in SECTIONS:
            config_lib.override(CONFIGS["nano"](), [f"{name}={value}"])
        elif first in SECTIONS or first in SOURCES:
            assert is_field(name) or is_defined(first, rest), name


@every_page
def test_flags_and_stages_exist(page: Path) -> None:
    for words in commands(page.read_text()):
        for word in words:
            flag, _, value = word.removeprefix("--").partition("=")
            if word.startswith("--"):
                assert flag in FLAGS, word
            if flag == "stage" and re.fullmatch(r"[a-z]+", value):
                assert value in STAGES, word


@every_page
def test_files_in_commands_exist(page: Path) -> None:
    text = page.read_text()
    code = "\n".join([*blocks(text), *spans(text)])
    for file in re.findall(r"(?<![\w./])\w+(?:/\w+)+\.(?:py|sh)\b", code):
        assert (ROOT / file).is_file() or (PACKAGE / file).is_file(), file
    for name, argument in re.findall(r"configs/(\w+)\.py:(\w+)", code):
        if name in CONFIGS:
            CONFIGS[name](argument)


def test_the_map_names_every_module() -> None:
    """BUILD.md has each module under its package, and none that is not there."""
    block = blocks((ROOT / "BUILD.md").read_text())[0]
    folder, listed = "", set[str]()
    for line in block.splitlines():
        begins = re.match(r"( {2})?(\w+)/", line)
        if begins:
            folder = f"mgsd_jax/{begins[2]}" if begins[1] else begins[2]
            line = line[begins.end() :]
        elif re.match(r"  \w+\.py", line):
            folder = "mgsd_jax"
        listed |= {f"{folder}/{name}" for name in re.findall(r"\w+\.(?:py|sh)", line)}
    for name in listed:
        assert (ROOT / name).is_file(), name
    wanted = {str(path.relative_to(ROOT)) for path in MODULES}
    wanted |= {f"launch/{path.name}" for path in (ROOT / "launch").glob("*.*")}
    wanted |= {f"configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert {name for name in wanted - listed if not name.endswith("__init__.py")} == set()


def test_the_layers_are_those_of_the_layering_test() -> None:
    order = reversed(test_layering.ORDER)
    said = "; ".join(", ".join(f"`{unit}`" for unit in units) for units in order)
    assert said in " ".join((ROOT / "BUILD.md").read_text().split())


@every_page
def test_python_imports_what_exists(page: Path) -> None:
    for block in re.findall(r"^```python\n(.*?)^```", page.read_text(), re.M | re.S):
        for module, names in re.findall(r"^from mgsd_jax\.?([\w.]*) import (.+)$", block, re.M):
            folder = PACKAGE.joinpath(*module.split("."))
            for name in (name.partition(" as ")[0] for name in names.split(", ")):
                is_module = (folder / f"{name}.py").is_file() or (folder / name).is_dir()
                package = folder / "__init__.py"
                is_module = is_module or (package.is_file() and name in package.read_text())
                assert is_module or is_defined(folder.name, name), name


def test_the_readme_quotes_the_nano_run() -> None:
    """The first row of numbers in README.md is that of docs/nano.md, and so are those around it."""
    readme = (ROOT / "README.md").read_text().replace("**", "")
    quoted = re.search(r"^\|((?: [\d.]+ % \([\d.–]+\) \|){4})$", readme, re.M)
    assert quoted, "no row of four numbers with intervals"
    nano = [line.split(" | ") for line in (ROOT / "docs" / "nano.md").read_text().splitlines()]
    macro = {tuple(cells[:2]): cells[2] for cells in nano if len(cells) > 3}
    models = ("| base", "| grounded", "| distilled")
    wanted = [macro[model, "picture"] for model in models]
    wanted.append(macro["| base", "text (upper bound)"])
    assert [cell.strip() for cell in quoted[1].strip("|").split("|")] == wanted
    said = " ".join((ROOT / "docs" / "nano.md").read_text().split())
    for number in ("257 s on two", "1.94 M parameters", "5.7 %", "600 held-out boards"):
        assert number in said
        assert number.removesuffix(" held-out boards") in " ".join(readme.split())
