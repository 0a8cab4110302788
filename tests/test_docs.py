"""What the pages say of the code is so: links, settings, flags, stages, modules, quoted numbers."""

import dataclasses
import itertools
import json
import re
import runpy
import shlex
import shutil
import subprocess
import tomllib
import typing
from collections.abc import Callable, Collection, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import test_layering
import yaml
from absl import flags
from absl.testing import flagsaver
from PIL import Image

from mgsd_jax import command_line
from mgsd_jax import config as config_lib
from mgsd_jax.data import prompts
from mgsd_jax.envs import ENVS, facts
from mgsd_jax.evaluation import reply as reply_lib
from mgsd_jax.evaluation import rules
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.report import answer as answer_lib
from mgsd_jax.stages import ask, export

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
        listed |= {f"{folder}/{name}" for name in re.findall(r"\w+\.(?:py|sh|yaml)", line)}
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


# ---------------------------------------------------------------- what stands between fences


class Snippet(NamedTuple):
    """A fenced block of a page."""

    page: Path
    line: int  # of its fence
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"


def snippets(page: Path) -> list[Snippet]:
    text = page.read_text()
    found = re.finditer(r"^( *)```(\w*)\n(.*?)^\1```$", text, re.M | re.S)
    return [Snippet(page, text.count("\n", 0, m.start()) + 1, m[2], m[3]) for m in found]


SNIPPETS = [snippet for page in PAGES for snippet in snippets(page)]
GUIDES = ("boards.md", "prompts.md")  # tests/test_guides.py runs their Python
PYTHON = [s for s in SNIPPETS if s.language == "python" and s.page.name not in GUIDES]
# Programs that no test starts, and why; what they start of ours is looked at.
OUTSIDE = {
    "hf": "downloads weights",
    "gcloud": "needs a Google Cloud project",
    "kubectl": "needs a cluster",
    "xpk": "needs a cluster",
    "docker": "needs a daemon",
    "srun": "needs a cluster",
    "scontrol": "needs a cluster",
    "ssh": "needs a host",
}
SHELL = {*("cd", "cp", "rm", "mkdir", "export", "exit", "break", "[", "test", "git", "echo", "set")}
SHELL |= {"source", "code", "seq"}
WORDS = {"do", "then", "else", "{", "!", "if", "while"}  # a command stands after them
ENDS = {"done", "fi", "}"}
# What stands for a value of the user's choice in a command.
STANDS_FOR = {"STAGE": "grounding", "CONFIG": "nano", "$stage": "grounding", "$s": "grounding"}
STANDS_FOR |= {"my_boards.py": "nano"}  # docs/boards.md writes it
STANDS_FOR |= {"$1": "grounding", "$i": "1", "'$STAGE'": "grounding"}


def simple_commands(text: str) -> Iterator[list[str]]:
    """The words of every simple command of a piece of shell, those inside $(...) first."""
    text = text.replace("\\\n", " ")
    while inner := re.search(r"\$\(([^()]*)\)", text):
        yield from simple_commands(inner[1])
        text = text.replace(inner[0], "printed")
    for line in text.splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.wordchars += "$@{}!,:[]%+^"
        words: list[str] = []
        for word in [*lexer, ";"]:
            if word in WORDS and not words:
                continue
            if set(word) <= set(";&|()"):
                if words and words[0] not in ENDS | {"for"}:
                    yield words
                words = []
            else:
                words.append(word)


def check_shell(text: str) -> None:
    """Raises AssertionError for shell that could not run: a command, flag, file or field."""
    checked = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert checked.returncode == 0, checked.stderr
    functions = {*re.findall(r"^(\w+)\(\)", text, re.M)}
    for words in simple_commands(text):
        check_command(words, functions)


def check_command(words: list[str], functions: Collection[str] = ()) -> None:
    while words and (re.fullmatch(r"\w+=.*", words[0]) or words[0] in ("env", "time")):
        words = words[1:]
    if not words:
        return
    name, rest = words[0].removeprefix(".venv/bin/"), words[1:]
    if name == "mgsd_jax":
        check_program(rest)
    elif name in ("python", "python3"):
        check_python(rest)
    elif name == "bash":
        check_script(rest)
    elif name == "pip":
        check_pip(rest)
    elif name in OUTSIDE:
        starts = [i for i, w in enumerate(rest) if w.removeprefix(".venv/bin/") == "python"]
        inner = [w.removeprefix("--command=") for w in rest if " " in w and "=${" not in w]
        for text in inner:
            check_shell(text)
        if starts:
            check_command(rest[starts[0] :])
    else:
        assert name in SHELL or name in functions, f"{name}: nothing here checks such a command"


def check_program(words: Sequence[str]) -> None:
    """The flags are parsed, the config is read, and its fields are set."""
    for placeholder, value in STANDS_FOR.items():
        words = [re.sub(rf"=({re.escape(placeholder)})$", f"={value}", word) for word in words]
    with flagsaver.flagsaver():
        assert not flags.FLAGS(["mgsd_jax", *words])[1:], words
        stage, config = command_line.STAGE.value, command_line.CONFIG.value
        if config:
            command_line.config()
        elif stage == "ask":
            ask.find_config(command_line.assignments())
        if stage in ("ask", "score"):
            assert command_line.INPUT.value, words
        elif stage:
            assert config and command_line.WORKDIR.value, words


def check_python(words: Sequence[str]) -> None:
    if words[:1] == ["-m"] and words[1] in ("mgsd_jax", "mgsd_jax.main"):
        return check_program(words[2:])
    if words[:1] == ["-m"]:
        assert words[1] in ("venv", "pytest"), words
        return None
    text = (ROOT / words[0]).read_text()
    for flag in (word.split("=")[0] for word in words if word.startswith("--")):
        assert f'"{flag}"' in text, (words[0], flag)
    return None


def check_script(words: Sequence[str]) -> None:
    text = (ROOT / words[0]).read_text()
    own = [*words[1:], "--"]
    cut = own.index("--")
    for flag in (word.split("=")[0] for word in own[:cut] if word.startswith("--")):
        assert re.search(rf"{flag}\b", text), (words[0], flag)
    for command in re.findall(r"^[a-z]+$", own[1] if own[0] == "tpu.sh" else "", re.M):
        assert command in text
    after = own[cut + 1 : -1]
    if {"run", "up"} & {*own[:cut]}:
        check_program(after)
    elif after:
        check_command(after)


def check_pip(words: Sequence[str]) -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for word in words:
        for named in re.findall(r"^(?:\.|mgsd_jax)\[([\w,]+)\]", word):
            assert {*named.split(",")} <= extras.keys(), word


def check_answer(text: str) -> None:
    """A right answer, as it stands in the page."""
    state = facts.state_from_facts("frozenlake", facts.read_facts("frozenlake", text))
    assert state is not None
    outcome = rules.judge(state, "frozenlake", text)
    plan = rules.parse_plan(text, "frozenlake").plan
    assert outcome.optimal and prompts.response("frozenlake", state, plan) == text.rstrip()


def check_asked(text: str) -> None:
    """What `--stage=ask` prints of a right answer about the board that stands in the page."""
    rows = re.findall(r"^ +\d \|.*$|^ +\+.*\+$", text, re.M)
    sides, things = maze_of(rows)
    plan = tuple(re.findall(r"^Plan: +(.*)$", text, re.M)[0].split())
    state = ENVS["maze"].from_facts(3, things | {"open": sides})
    answer = Answer(prompts.response("maze", state, plan), False, 1)
    pixels = ENVS["maze"].render(state, 96)
    reply = reply_lib.read("maze", answer, 96, pixels, lambda board, size: pixels)
    first, *said = text.rstrip().splitlines()
    assert said[1:-1] == answer_lib.lines(reply)
    assert first == "picture.png: 96x96 pixels, as in the training"
    assert said[-1] == "The picture with the route: picture.route.svg"


def maze_of(rows: Sequence[str]) -> tuple[tuple[Any, ...], dict[str, tuple[Any, ...]]]:
    """Open sides and things of a maze of 3x3 cells, out of its drawing."""
    grid = [row[6:].ljust(13) for row in rows]
    sides, things = [], {}
    for r, c in itertools.product(range(3), range(3)):
        line, column = 2 * r + 1, 4 * c
        around = {"up": grid[line - 1][column + 2], "down": grid[line + 1][column + 2]}
        around |= {"left": grid[line][column], "right": grid[line][column + 4]}
        sides += [((r, c), way) for way, mark in around.items() if mark == " "]
        letter = grid[line][column + 2]
        things |= {{"P": "player", "G": "goal"}[letter]: ((r, c),)} if letter != " " else {}
    return tuple(sides), things


def check_log(text: str) -> None:
    """A line that the program logs."""
    shape = re.search(r'"(data\.%s=auto is %s here)"', SOURCES["buckets"])
    assert shape and shape[1] % ("prompt_buckets", "(24, 32, 48)") == text.rstrip()


# By how it begins: what a block without a language is, and which test reads it.
TEXTS: dict[str, Callable[[str], object]] = {
    "Map size: ": check_answer,
    "picture.png: ": check_asked,
    "mgsd_jax/": lambda text: None,  # test_the_map_names_every_module
    "data.prompt_buckets=auto is": check_log,
}


def check_text(text: str) -> None:
    checks = [check for start, check in TEXTS.items() if text.startswith(start)]
    assert checks, "nothing here checks such a block"
    checks[0](text)


CHECKS: dict[str, Callable[[str], object]] = {
    "bash": check_shell,
    "python": lambda text: compile(text, "snippet", "exec"),  # run by test_python_runs
    "yaml": lambda text: [*yaml.safe_load_all(text)],
    "": check_text,
}


@pytest.mark.parametrize("snippet", SNIPPETS, ids=str)
def test_every_snippet_is_checked(snippet: Snippet, monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be run in a moment is run; of the rest every name is looked up where it is read."""
    monkeypatch.chdir(ROOT)
    CHECKS[snippet.language](snippet.text)


@pytest.mark.parametrize(
    "text",
    [
        "mgsd_jax --stage=train --config=nano --workdir=a",
        "mgsd_jax --stage=grounding --config=nano",
        "mgsd_jax --stage=grounding --config=absent --workdir=a",
        "mgsd_jax --stage=grounding --config=nano --workdir=a --set grounding.step=3",
        "mgsd_jax --stage=ask --set ask.task=maze",
        "python -m mgsd_jax.main --stag=report --config=nano --workdir=a",
        "python benchmarks/absent.py",
        "python benchmarks/gpu.py --colour=red",
        "bash launch/absent.sh",
        "bash launch/tpu.sh create --colour",
        "bash launch/tpu.sh run -- --stage=nothing --config=nano --workdir=a",
        "pip install -e .[colour]",
        "for i in 1 2; do unheard_of $i; done",
        "ssh host 'mgsd_jax --stage=nothing --config=nano --workdir=a'",
        "if true; then",
        "echo $(for i in $(unheard_of 3); do echo $i; done)",
    ],
)
def test_a_wrong_snippet_is_found(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    with pytest.raises((AssertionError, ValueError, OSError, flags.Error)):
        check_shell(text + "\n")


@pytest.mark.slow
@pytest.mark.parametrize("snippet", PYTHON, ids=str)
def test_python_runs(snippet: Snippet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside a run whose distilled model is the shipped base, and a picture."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mgsd_jax").symlink_to(PACKAGE)
    model = tmp_path / "runs" / "quickstart" / "distillation"
    shutil.copytree(PACKAGE / "assets" / "nano_base", model)
    trained = config_lib.to_dict(CONFIGS["nano"]())
    (model / export.RECORD).write_text(json.dumps({n: trained[n] for n in ("model", "data")}))
    state = ENVS["maze"].generate(np.random.default_rng(0), 3)
    Image.fromarray(ENVS["maze"].render(state, 256)).save("picture.png")
    exec(compile(snippet.text, str(snippet), "exec"), {})


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
    for number in ("238 s on two", "1.94 M parameters", "5.3 %", "600 held-out boards"):
        assert number in said
        assert number.removesuffix(" held-out boards") in " ".join(readme.split())


def test_the_project_and_the_readme_name_the_same_addresses() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    readme = (ROOT / "README.md").read_text()
    assert len(project["urls"]) >= 2
    for name, url in project["urls"].items():
        assert f"({url})" in readme, name


def test_the_readme_says_first_what_was_run() -> None:
    """What was measured and what never ran stands before all numbers; the page stays short."""
    lines = (ROOT / "README.md").read_text().splitlines()
    status = next(i for i, line in enumerate(lines) if "**Status**" in line)
    assert status < next(i for i, line in enumerate(lines) if line.startswith("|"))
    assert status < 10 and len(lines) < 300
