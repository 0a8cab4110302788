"""What all tests share: kept programs, quick compilation, and which files begin first.

Compiled programs are kept for every process of a run and for the next: the settings are made before
jax is imported, and child processes inherit them. A cache of another place is left as it is.
"""

import gc
import importlib.metadata
import os
import pathlib
import signal
from collections.abc import Iterator

import pytest
from jaxlib import xla_client

# What the imports make stays: looking through it for garbage is a sixth of their time.
gc.disable()
# Threads of torch spin while they wait for work, and workers share the cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")

_KEPT = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_KEPT))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
# The machine code of a small program is made in one piece: in 32, a sixth of its compilation more.
_FLAGS = os.environ.get("XLA_FLAGS", "")
os.environ["XLA_FLAGS"] = f"--xla_cpu_parallel_codegen_split_count=1 {_FLAGS}".strip()

# JAX 0.10 can make the code of fused operations in an older way as well: the tiny model compiles in
# 4.4 s for 6.8, and quickly in 0.7 for 3.3. JAX 0.11 has the newer alone. jaxlib reads the flag
# here, and libtpu, which does not know it, finds it no more.
if importlib.metadata.version("jax").startswith("0.10."):
    _GIVEN = os.environ["XLA_FLAGS"]
    os.environ["XLA_FLAGS"] = f"--xla_cpu_use_fusion_emitters=false {_GIVEN}"
    xla_client.CompileOptions().executable_build_options.debug_options  # noqa: B018
    os.environ["XLA_FLAGS"] = _GIVEN

# A run in the background of a script begins with SIGINT ignored, and so would all its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of minutes, the longest first: workers take files in this order, so that none is left alone
# with a long one at the end. What traces steps comes before them: JAX's profiler crashes in a
# process that has loaded libtpu without a TPU, as the files that compile for TPUs do.
LONGEST = (
    *("traces", "end_to_end"),
    *("processes", "mesh_step", "killed", "distillation", "drafts", "model", "wheel"),
    *("real_tokenizer", "preflight", "mesh_tpu", "compiled_once", "export", "attention"),
    *("model_parity", "sharding", "sokoban", "compiled", "sampler", "nano", "mesh"),
    *("gpu_benchmark", "losses", "killed_anywhere", "launch"),
)
# What compiles for long or starts processes, besides the tests that are marked slow where they
# stand: whole files, and whatever asks for one of these fixtures. `launch/test.sh --quick` leaves
# both out.
COMPILING = {
    *("attention", "end_to_end", "killed_anywhere", "launch", "losses", "mesh", "model"),
    *("model_parity", "nano", "preflight", "sampler", "sharding", "wheel"),
}
# Files that hold runs of ours against each other, or ask only that a program runs: theirs are
# compiled in half the time, and run slower. The passes over a program's operations are the same.
QUICKLY = {
    *("ask", "compiled_once", "distillation", "docs", "drafts", "end_to_end", "gpu_benchmark"),
    *("model", "nano", "sampler", "sokoban", "walkthrough", "wheel"),
}
COMPILED = {"setup", "exported", "light", "nano_folder", "trained"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # files stay whole
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        if item.path.stem.removeprefix("test_") in COMPILING or asked & COMPILED:
            item.add_marker("compiles")


def pytest_collection_finish() -> None:
    """Every module is imported: from here on only what tests make is looked through."""
    gc.freeze()
    gc.enable()


def _set_quick(is_quick: bool) -> None:
    """How programs are compiled from now on, here and in child processes, which read the variable.

    JAX takes a program that it holds however that was compiled, so it is to hold none.
    """
    name, value = "JAX_DISABLE_MOST_OPTIMIZATIONS", str(int(is_quick))
    if os.environ.get(name, "0") == value:
        return
    import jax

    os.environ[name] = value
    jax.config.update(name.lower(), is_quick)
    jax.clear_caches()


@pytest.fixture(scope="module", autouse=True)
def _compilation(request: pytest.FixtureRequest) -> None:
    _set_quick(request.path.stem.removeprefix("test_") in QUICKLY)


@pytest.fixture
def full_compilation() -> Iterator[None]:
    """For what is held against another library, or two programs, in a file of `QUICKLY`."""
    _set_quick(False)
    yield
    _set_quick(True)
