"""What the compiler said of a program, kept where runs keep their compiled programs.

JAX's own cache is of no use here: a program for a topology can be written, and no device is there
to read it back.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import os
from collections.abc import Callable, Generator

import jax
from absl import logging
from etils import epath

from mgsd_jax.checks import fields
from mgsd_jax.workdir import paths

Said = dict[str, float]  # sizes in GiB, seconds of compilation
_FLAGS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")


def folder() -> epath.Path | None:
    """The folder of compiled programs (`workdir/compiled.py`); None: nothing is kept."""
    found = jax.config.values["jax_compilation_cache_dir"]
    return epath.Path(found) if found else None


def key_of(lowered: jax.stages.Lowered, devices: str, package: str) -> str:
    """A hash of all that the compiler's answer depends on."""
    packages = ("jax", "jaxlib", package)
    versions = [f"{name} {importlib.metadata.version(name)}" for name in packages]
    flags = [f"{name}={os.environ.get(name, '')}" for name in _FLAGS]
    known = "\n".join([devices, *versions, *flags, lowered.as_text()])
    return hashlib.sha256(known.encode()).hexdigest()


def ask(
    lowered: jax.stages.Lowered,
    name: str,
    devices: str,
    package: str,
    compiler: Callable[[jax.stages.Lowered], Said],
) -> Said:
    """What `compiler`, of a package, says of a program, or said before; errors are not kept."""
    kept = folder()
    if kept is None:
        return compiler(lowered)
    file = kept / f"{name.replace('/', '_')}-{key_of(lowered, devices, package)}-preflight.json"
    if file.exists():
        return {part: float(number) for part, number in fields.read_json(file).items()}
    with _unwritten():
        said = compiler(lowered)
    try:
        kept.mkdir(parents=True, exist_ok=True)
        paths.write_whole(file, json.dumps(said))
    except OSError as error:
        logging.warning("preflight: %s is not kept: %s", name, error)
    return said


@contextlib.contextmanager
def _unwritten() -> Generator[None]:
    """JAX's own cache keeps nothing meanwhile: it would complain where it reads it."""
    before = jax.config.values["jax_persistent_cache_min_compile_time_secs"]
    jax.config.update("jax_persistent_cache_min_compile_time_secs", math.inf)
    try:
        yield
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", before)
