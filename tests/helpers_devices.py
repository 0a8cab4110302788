"""Tests that want several devices run themselves again in a process that has them."""

import os
import subprocess
import sys
from pathlib import Path

import helpers_children
import jax
import pytest

COUNT = 8


def skip_without_devices() -> None:
    """Skips a test where this is not the process with the devices."""
    if jax.device_count() != COUNT:
        pytest.skip("runs in the test with eight devices")


def flags(count: int) -> str:
    """XLA_FLAGS for a process of so many devices, beside those that this one was given."""
    given = os.environ.get("XLA_FLAGS", "")
    return f"{given} --xla_force_host_platform_device_count={count}".strip()


# Of two ways of JAX 0.10 to make code for fused operations, the older, which compiles sooner.
OLDER = "--xla_cpu_use_fusion_emitters=false" if jax.__version_info__ < (0, 11) else ""


def quick_flags(count: int) -> str:
    """The same for a process whose programs are compiled as fast as possible, and run slower.

    For tests that hold runs against each other, or ask only that a program runs.
    """
    return f"{flags(count)} --xla_backend_optimization_level=0 {OLDER}".strip()


def run_again(file: str, *options: str, quick: bool = False) -> None:
    """Runs the tests of `file` with eight devices; in that process it skips the calling test."""
    if jax.device_count() == COUNT:
        pytest.skip("this is the run with eight devices")
    env = os.environ | {
        "PYTHONPATH": helpers_children.PATH,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": (quick_flags if quick else flags)(COUNT),
    }
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options, file]
    done = subprocess.run(
        run, env=env, cwd=Path(file).parent.parent, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert "1 skipped" in done.stdout  # the calling test: nothing else was
