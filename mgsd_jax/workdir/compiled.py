"""Where compiled programs are kept, so that the same run, started again, compiles nothing.

JAX's own cache does the work: a program's key holds its text, the versions, the flags of the
compiler, and what the devices can do, so folders may be shared between machines. Who can write to
the folder can make its readers run any code.
"""

import os
import pathlib
import uuid
from collections.abc import Mapping

import jax
from absl import logging
from etils import epath

from mgsd_jax.workdir import paths

VARIABLE = "JAX_COMPILATION_CACHE_DIR"
OFF = "off"
LIMIT = 8 << 30  # bytes of a local folder, at a start
_KEPT = ("*-cache", "*-preflight.json")  # JAX's files, and those of `preflight/kept.py`


def default_folder(workdir: epath.PathLike, environ: Mapping[str, str]) -> epath.Path:
    """A folder of the user's cache; of a remote workdir, one in it, which all hosts can read.

    Of the processes of a run, JAX lets only the first write: on disks of their own the others would
    find nothing.
    """
    if paths.is_remote(workdir):
        return epath.Path(workdir) / "compiled"
    home = environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return epath.Path(home) / "mgsd_jax" / "compiled"


def keep(given: str | None, workdir: epath.PathLike, environ: Mapping[str, str]) -> None:
    """Lets JAX keep every program in `given`, else in its own variable's folder, else the default.

    'off' keeps none. A folder that cannot be written to is one warning, and the run goes on. Comes
    before the first program is compiled, and after `processes.join`.
    """
    if given == OFF or not jax.config.values["jax_enable_compilation_cache"]:
        jax.config.update("jax_compilation_cache_dir", None)
        return
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    if given is None and environ.get(VARIABLE):
        return  # JAX has read it, and the folder is not ours to clean
    folder = default_folder(workdir, environ) if given is None else paths.absolute(given)
    try:
        _try_writing(folder)
    except Exception as error:  # a client of a cloud may raise anything
        said = " ".join(str(error).split())
        logging.warning("compiled programs are not kept (%s); see --compile_cache", said)
        jax.config.update("jax_compilation_cache_dir", None)
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(folder))
    if paths.is_remote(folder):
        # XLA's own cache, of tuned kernels of GPUs, takes local folders only.
        jax.config.update("jax_persistent_cache_enable_xla_caches", "none")
    elif "JAX_COMPILATION_CACHE_MAX_SIZE" not in environ:
        shrink(pathlib.Path(folder), LIMIT)


def _try_writing(folder: epath.Path) -> None:
    if paths.is_remote(folder):
        folder.mkdir(parents=True, exist_ok=True)
    else:
        pathlib.Path(folder).mkdir(mode=0o700, parents=True, exist_ok=True)
    probe = folder / f"{uuid.uuid4().hex}.probe"
    probe.write_bytes(b"")
    probe.unlink()


def shrink(folder: pathlib.Path, limit: int) -> None:
    """Removes the programs that were used longest ago, until the others take `limit` bytes.

    JAX's own bound reads every entry's time at every write, and locks the folder for every reading.
    A program that another process is reading stays readable; one that it asks for next is compiled.
    """
    files = []
    for file in (file for kind in _KEPT for file in folder.glob(kind)):
        try:
            status = file.stat()
        except FileNotFoundError:  # another run shrinks the folder too
            continue
        files.append((max(status.st_atime, status.st_mtime), status.st_size, file))
    total = sum(size for _, size, _ in files)
    for _, size, file in sorted(files):
        if total <= limit:
            break
        file.unlink(missing_ok=True)
        total -= size
