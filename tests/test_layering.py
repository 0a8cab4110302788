"""Imports only point down: every unit (a top module or a package) has a rank, read off the source.

The rules are functions of the sources, so that the tests at the end can hold them against sources
that break each of them.
"""

import ast
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = "mgsd_jax"

# From the bottom up. A unit may import the units of the lines above its own, and nothing else.
ORDER = (
    ("checks", "tree"),
    ("config", "envs"),
    ("parallel", "data", "command_line"),
    ("workdir", "model"),
    ("evaluation", "weights"),
    ("sampling",),
    ("training",),
    ("report",),
    ("stages",),
    ("preflight",),
    ("main", "__main__"),
)
RANKS = {unit: rank for rank, units in enumerate(ORDER) for unit in units}
# These run in loader processes, without jax.
HOST_ONLY = ("checks", "config", "envs", "data", "command_line")
JAX = ("jax", "jaxlib", "flax", "optax", "orbax", "chex")
# Functions that import a module by its name.
BY_STRING = ("__import__", "import_module", "run_module", "resolve_name")
TORCH = ("torch", "torchvision", "torchaudio", "peft", "accelerate")

Sources = Mapping[str, str]  # dotted module name -> source


def read_sources(folder: Path) -> dict[str, str]:
    found: dict[str, str] = {}
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder.parent).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found[name] = file.read_text(encoding="utf-8")
    return found


@functools.cache
def imports(source: str) -> tuple[tuple[int, str], ...]:
    """(line, dotted name) of every import, those inside functions too.

    `from a.b import c` gives 'a.b.c': c may be a module. Relative imports start with a dot.
    """
    return tuple(_imports(source))


def _imports(source: str) -> Iterator[tuple[int, str]]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            yield from ((node.lineno, f"{start}.{alias.name}") for alias in node.names)


def unit(name: str) -> str:
    """'mgsd_jax.data.batching' -> 'data'; '' for the package itself."""
    return [*name.split("."), ""][1]


def layer_problems(sources: Sources, ranks: Mapping[str, int] = RANKS) -> list[str]:
    """Unknown units, imports that do not point down, relative ones."""
    problems: list[str] = []
    for name, source in sources.items():
        here = unit(name)
        if here and here not in ranks:
            problems.append(f"{name}: got a unit without a rank, want it in RANKS")
            continue
        for line, target in imports(source):
            there = unit(target)
            where = f"{name}:{line}: imports {target}"
            if target.startswith("."):
                problems.append(f"{where}: got a relative import, want {PACKAGE}.…")
            elif target.partition(".")[0] != PACKAGE or (there == here and here):
                continue
            elif not here:
                problems.append(f"{where}: want nothing imported by the package itself")
            elif there not in ranks:
                problems.append(f"{where}: got a unit without a rank, want it in RANKS")
            elif ranks[there] >= ranks[here]:
                problems.append(f"{where}: got rank {ranks[there]}, want less than {ranks[here]}")
    return problems


def host_problems(sources: Sources, units: tuple[str, ...] = HOST_ONLY) -> list[str]:
    """Ways from a unit that must do without jax to an import of jax, through our own modules."""
    problems: list[str] = []
    for start in (name for name in sources if unit(name) in units):
        ways: list[tuple[str, ...]] = [(start,)]
        seen = {start}
        while ways:
            way = ways.pop()
            for line, target in imports(sources[way[-1]]):
                if target.partition(".")[0] in JAX:
                    problems.append(f"{' -> '.join(way)}:{line}: imports {target}")
                module = our_module(target, sources)
                if module is not None and module not in seen:
                    seen.add(module)
                    ways.append((*way, module))
    return problems


def our_module(target: str, sources: Sources) -> str | None:
    """The module that an import of `target` runs, None where it is not ours."""
    while target and target not in sources:
        target = target.rpartition(".")[0]
    return target or None


def cycles(sources: Sources) -> list[str]:
    """Circles of imports, which a package could have inside its one rank."""
    targets = {
        name: {our_module(target, sources) for _, target in imports(source)} - {name, None, PACKAGE}
        for name, source in sources.items()
    }
    while True:
        # One that imports none of those left is in no circle, nor one that none of them imports.
        wanted = {target for some in targets.values() for target in some}
        held = {n: some & targets.keys() for n, some in targets.items()}
        held = {name: some for name, some in held.items() if some and name in wanted}
        if held == targets:
            return sorted(targets)
        targets = held


def forbidden(sources: Sources, packages: tuple[str, ...]) -> list[str]:
    return [
        f"{name}:{line}: imports {target}"
        for name, source in sources.items()
        for line, target in imports(source)
        if target.partition(".")[0] in packages
    ]


def hidden_imports(sources: Sources) -> list[str]:
    """Imports below the top of a file, or by string."""
    problems: list[str] = []
    for name, source in sources.items():
        for node in ast.walk(ast.parse(source)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                inner = [n for n in ast.walk(node) if isinstance(n, ast.Import | ast.ImportFrom)]
                problems += [f"{name}:{n.lineno}: imports inside {node.name}" for n in inner]
            called = node.func if isinstance(node, ast.Call) else None
            word = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            if isinstance(node, ast.Call) and word in BY_STRING and not name.endswith("__main__"):
                problems.append(f"{name}:{node.lineno}: imports by string")
    return problems


@pytest.fixture(scope="module")
def sources() -> dict[str, str]:
    return read_sources(ROOT / PACKAGE)


def test_imports_point_down(sources: dict[str, str]) -> None:
    assert layer_problems(sources) == []


def test_every_rank_has_its_unit(sources: dict[str, str]) -> None:
    assert set(RANKS) - {unit(name) for name in sources} == set()


def test_host_code_does_without_jax(sources: dict[str, str]) -> None:
    assert host_problems(sources) == []


def test_no_circles(sources: dict[str, str]) -> None:
    assert cycles(sources) == []


def test_no_torch(sources: dict[str, str]) -> None:
    assert forbidden(sources, TORCH) == []
    assert forbidden(read_sources(ROOT / "configs"), TORCH) == []


def test_imports_are_at_the_top(sources: dict[str, str]) -> None:
    assert hidden_imports(sources) == []


def test_config_files_need_the_config_alone() -> None:
    """A config file can be read anywhere: it imports nothing of ours that needs an accelerator."""
    for name, source in read_sources(ROOT / "configs").items():
        ours = {t for _, t in imports(source) if t.partition(".")[0] == PACKAGE}
        assert {unit(target) for target in ours} <= {"config"}, name


# The rules notice what they are for.


@pytest.mark.parametrize(
    ("name", "source", "wanted"),
    [
        ("mgsd_jax.novelty", "", "mgsd_jax.novelty: got a unit without a rank"),
        ("mgsd_jax.main", "import mgsd_jax.novelty", "mgsd_jax.novelty: got a unit without"),
        (
            "mgsd_jax.envs.maze",
            "from mgsd_jax.training import losses",
            "got rank 6, want less than 1",
        ),
        (
            "mgsd_jax.data.x",
            "from mgsd_jax.weights.hf import TABLE",
            "got rank 4, want less than 2",
        ),
        ("mgsd_jax.model.x", "import mgsd_jax.workdir.paths", "got rank 3, want less than 3"),
        ("mgsd_jax.config", "def f():\n  from mgsd_jax import envs", ":2: imports mgsd_jax.envs"),
        ("mgsd_jax.training.losses", "from . import tree", "got a relative import"),
        ("mgsd_jax.training.losses", "from .tree import match", "got a relative import"),
        ("mgsd_jax", "from mgsd_jax import config", "want nothing imported by the package"),
        ("mgsd_jax.tree", "from mgsd_jax import checks as c", "got rank 0, want less than 0"),
    ],
)
def test_layer_rule_notices(name: str, source: str, wanted: str) -> None:
    (problem,) = layer_problems({name: source})
    assert wanted in problem


def test_layer_rule_lets_pass() -> None:
    assert not layer_problems(
        {
            "mgsd_jax": "",
            "mgsd_jax.main": "import os\nfrom mgsd_jax import config, envs",
            "mgsd_jax.weights.hf": "from mgsd_jax.model import table\nfrom mgsd_jax import tree",
            "mgsd_jax.envs": "from mgsd_jax.envs import maze",
        }
    )


def test_host_rule_notices_the_way_round() -> None:
    direct = {"mgsd_jax.data.batch": "import jax.numpy as jnp"}
    assert host_problems(direct) == ["mgsd_jax.data.batch:1: imports jax.numpy"]
    round_about = {
        "mgsd_jax.data.x": "from mgsd_jax.tree import match",
        "mgsd_jax.tree": "def f():\n  from flax import linen",
    }
    assert host_problems(round_about) == ["mgsd_jax.data.x -> mgsd_jax.tree:2: imports flax.linen"]
    assert not host_problems({"mgsd_jax.model.x": "import jax", "mgsd_jax.data.x": "import grain"})


def test_circle_rule_notices() -> None:
    circle = {"mgsd_jax.model.a": "import mgsd_jax.model.b", "mgsd_jax.model.c": "import os"}
    assert not cycles(circle | {"mgsd_jax.model.b": "import os"})
    closed = circle | {
        "mgsd_jax.model.b": "from mgsd_jax.model.a import x",
        "mgsd_jax.model.d": "import mgsd_jax.model.a",  # it imports the circle, and is not of it
    }
    assert cycles(closed) == ["mgsd_jax.model.a", "mgsd_jax.model.b"]


@pytest.mark.parametrize(
    "source", ["import torch", "from torch.nn import functional", "import peft"]
)
def test_torch_rule_notices(source: str) -> None:
    assert len(forbidden({"mgsd_jax.training.losses": source}, TORCH)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "def f():\n  import os",
        "import importlib\nimportlib.import_module('os')",
        "from importlib import import_module\nimport_module('os')",
        "import runpy\nrunpy.run_module('os')",
        "import pkgutil\npkgutil.resolve_name('os')",
        "__import__('os')",
    ],
)
def test_hidden_imports_are_noticed(source: str) -> None:
    assert len(hidden_imports({"mgsd_jax.training.losses": source})) == 1
