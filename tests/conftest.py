"""What all tests share: kept programs, quick compilation, and which files begin first.

Compiled programs are kept for every process of a run and for the next: the settings are made before
jax is imported, and child processes inherit them. A cache of another place is left as it is.
"""

import os
import pathlib
import signal
from collections.abc import Iterator

import pytest

_KEPT = pathlib.Path(__file__).parents[1] / ".pytest_cache" / "compiled"

os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_KEPT))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

# A run in the background of a script begins with SIGINT ignored, and so would all its children.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# Files of minutes, the longest first: workers take files in this order, so that none is left alone
# with a long one at the end. What traces steps comes before them: JAX's profiler crashes in a
# process that has loaded libtpu without a TPU, as the files that compile for TPUs do.
LONGEST = (
    *("traces", "end_to_end"),
    *("processes", "killed", "moving", "distillation", "mesh_step", "real_tokenizer", "compiled"),
    *("preflight", "killed_anywhere", "compiled_once", "export", "sampler", "model", "wheel"),
    *("gpu_benchmark", "attention", "losses", "mesh_tpu", "mesh", "sharding", "nano"),
)
# What compiles for long or starts processes, besides the tests that are marked slow where they
# stand: whole files, and whatever asks for one of these fixtures. `launch/test.sh --quick` leaves
# both out.
COMPILING = {
    *("attention", "end_to_end", "killed_anywhere", "launch", "losses", "mesh", "model"),
    *("model_parity", "nano", "preflight", "sampler", "sharding", "wheel"),
}
COMPILED = {"setup", "exported", "nano_folder", "trained"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {f"test_{name}": place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: order.get(item.path.stem, len(order)))  # files stay whole
    for item in items:
        asked = set(getattr(item, "fixturenames", ()))
        if item.path.stem.removeprefix("test_") in COMPILING or asked & COMPILED:
            item.add_marker("compiles")


def _compile_quickly() -> Iterator[None]:
    """Programs are compiled twice as fast and run slower: for tests that compare runs of ours."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture
def quick_compilation() -> Iterator[None]:
    yield from _compile_quickly()


@pytest.fixture(scope="module")
def quick_compilation_here() -> Iterator[None]:
    """For all tests of a file, and for the fixtures that they share."""
    yield from _compile_quickly()
