"""Compiled programs are kept where they are said to be, and a second start compiles nothing."""

import json
import logging
import os
import pathlib
import subprocess
import sys
from collections.abc import Iterator

import helpers_children
import helpers_devices
import jax
import pytest
from helpers_run import Base, write_config
from helpers_tiny import tiny_config
from jax.experimental.compilation_cache import compilation_cache

from mgsd_jax.stages import generate, init
from mgsd_jax.workdir import compiled

SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


@pytest.fixture(autouse=True)
def restored() -> Iterator[None]:
    before = {name: getattr(jax.config, name) for name in SETTINGS}
    yield
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache.reset_cache()


def kept_in() -> str | None:
    return jax.config.values["jax_compilation_cache_dir"]


def test_a_run_keeps_its_programs_in_the_users_cache(tmp_path: pathlib.Path) -> None:
    compiled.keep(None, "runs/a", {"XDG_CACHE_HOME": str(tmp_path)})
    folder = tmp_path / "mgsd_jax" / "compiled"
    assert kept_in() == str(folder) and folder.stat().st_mode & 0o777 == 0o700
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == 0
    compilation_cache.reset_cache()
    jax.jit(lambda x: x * 3.25 + 1)(2.0)
    assert len(list(folder.glob("jit__lambda-*-cache"))) == 1


def test_a_remote_workdir_keeps_them_itself() -> None:
    """Hosts share it, and a machine that is new after a preemption finds it."""
    assert str(compiled.default_folder("gs://b/run", {})) == "gs://b/run/compiled"


def test_the_flag_comes_first_then_the_variable(tmp_path: pathlib.Path) -> None:
    before = kept_in()
    environ = {compiled.VARIABLE: "theirs", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "7"}
    seconds = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    compiled.keep(None, "runs/a", environ)
    assert kept_in() == before  # as JAX has read it
    assert jax.config.values["jax_persistent_cache_min_compile_time_secs"] == seconds
    compiled.keep(str(tmp_path / "mine"), "runs/a", environ)
    assert kept_in() == str(tmp_path / "mine")
    compiled.keep("off", "runs/a", environ)
    assert kept_in() is None


def test_a_place_that_cannot_be_written_is_one_warning(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        compiled.keep(str(tmp_path / "file" / "folder"), "runs/a", {})
    assert kept_in() is None
    (line,) = caplog.messages
    assert "compiled programs are not kept" in line and f"{tmp_path}/file" in line


def test_what_was_used_longest_ago_goes_first(tmp_path: pathlib.Path) -> None:
    for age, name in enumerate(("c-cache", "b-preflight.json", "a-cache", "theirs", "old-cache")):
        (tmp_path / name).write_bytes(bytes(10))
        os.utime(tmp_path / name, (1e9 - age, 1e9 - age))
    os.utime(tmp_path / "old-cache", (2e9, 1e8))  # made long ago, read last
    compiled.shrink(tmp_path, 29)
    assert {path.name for path in tmp_path.iterdir()} == {"c-cache", "theirs", "old-cache"}
    compiled.shrink(tmp_path, 20)
    assert len(list(tmp_path.iterdir())) == 3


STARTED = """
import collections, json, os, sys
import jax
from mgsd_jax import command_line, main
from mgsd_jax.workdir import compiled
counts = collections.Counter()
jax.monitoring.register_event_listener(lambda name, **_: counts.update([name.split("/")[-1]]))
_, config, workdir = sys.argv
compiled.keep(None, workdir, os.environ)
for stage in ("grounding", "distillation", "evaluate"):
    main.STAGES[stage](command_line.load_config(config, []), workdir)
print(json.dumps(counts))
"""


@pytest.mark.slow
def test_a_second_start_of_the_stages_compiles_nothing(tmp_path: pathlib.Path) -> None:
    config = tiny_config(tmp_path, layers=1)
    init.run(config, str(tmp_path))
    generate.run(config, str(tmp_path))
    base = write_config(tmp_path)
    counted(base, tmp_path / "a")
    again = counted(base, tmp_path / "b")
    assert again["cache_hits"] == again["compile_requests_use_cache"] > 10
    assert "cache_misses" not in again


def counted(base: Base, workdir: pathlib.Path) -> dict[str, int]:
    """How often the stages of a new process asked for programs, and found them."""
    kept = ("JAX_COMPILATION_CACHE_DIR", "JAX_PLATFORMS")
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("JAX_", "XLA_"))}
    environ |= {k: os.environ[k] for k in kept if k in os.environ}
    environ |= {"PYTHONPATH": helpers_children.PATH, "XLA_FLAGS": helpers_devices.quick_flags(1)}
    (workdir / "data").parent.mkdir()
    (workdir / "data").symlink_to(base.folder / "data")
    done = subprocess.run(
        [sys.executable, "-c", STARTED, str(base.config), str(workdir)],
        env=environ,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])
