"""The folder of a run: locked by one run at a time, bound to one config, with a record of starts.

`config.json` holds the part of the config that the run depends on, `runs.jsonl` a line for each
start that took a step: commit and versions.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Collection, Iterator, Mapping

import jax
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.checks import fields, ranges
from mgsd_jax.config import Config
from mgsd_jax.parallel import processes
from mgsd_jax.workdir import locks, paths

CONFIG_FILE = "config.json"
RUNS_FILE = "runs.jsonl"
PACKAGES = ("mgsd_jax", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def write_run_info(workdir: epath.PathLike, config: Mapping[str, object]) -> None:
    """Write `config.json`, and add this start's commit and versions to `runs.jsonl`.

    `config` holds JSON values. A resumed run adds a line, so that a change of code or versions in
    between can be seen.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    paths.write_whole(folder / CONFIG_FILE, text + "\n")
    commit, is_dirty = _git_commit()
    info = {
        "time": time.time(),
        "commit": commit,
        "is_dirty": is_dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "versions": {package: _version(package) for package in PACKAGES},
    }
    runs = folder / RUNS_FILE
    before = runs.read_text(encoding="utf-8") if runs.exists() else ""
    paths.write_whole(runs, before + json.dumps(info) + "\n")


def _git_commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); None where this file is in no git tree."""
    file = pathlib.Path(__file__)

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(file.parent), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside an unrelated repository, whose commit says nothing.
        git("ls-files", "--error-unmatch", file.name)
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "-uno"))
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None, None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def check_config(
    folder: epath.PathLike,
    config: Mapping[str, object],
    *,
    ignore: Collection[str] = (),
    defaults: Mapping[str, object] | None = None,
) -> None:
    """Raise ValueError that lists what differs where `folder` is of a run with another config.

    Compares with the `config.json` that `write_run_info` left there, if any. `ignore` names
    fields ('optim.lr') or sections ('optim') that may differ. A field that is newer than the
    folder's `config.json` has its value of `defaults` there.
    """
    path = epath.Path(folder) / CONFIG_FILE
    if not path.exists():
        return
    ours = _by_field(to_json(config, "config"))
    newer = {name: value for name, value in _by_field(defaults or {}).items() if name in ours}
    theirs = newer | _by_field(fields.read_json(path))
    differing = [
        f"{name}: got {_shown(ours, name)}, want {_shown(theirs, name)}"
        for name in sorted(theirs.keys() | ours.keys())
        if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name))
        and not any(f"{name}.".startswith(f"{other}.") for other in ignore)
    ]
    if differing:
        raise ValueError(
            f"{path} is of a run with another config: {'; '.join(differing)}; set that back, "
            f"remove {folder} to start anew, or take another folder"
        )


def _by_field(config: Mapping[str, object]) -> dict[str, object]:
    """{'optim.lr': value}."""
    return {path.replace("/", "."): value for path, value in tree.named_leaves(dict(config))}


def _shown(values: Mapping[str, object], name: str) -> str:
    return repr(values[name]) if name in values else "nothing"


def to_json(value: Mapping[str, object], name: str) -> fields.Json:
    """The value as JSON gives it back (tuples as lists); ValueError for other objects."""
    try:
        return json.loads(json.dumps(dict(value)))
    except TypeError as error:
        raise ValueError(f"{name}: got {error}, want JSON values only") from error


@dataclasses.dataclass(frozen=True)
class Claim:
    """A folder that this run alone may write to; its first step binds the folder to its config."""

    folder: epath.Path
    notes: list[Callable[[], None]]  # what the first step writes

    def record(self) -> None:
        """Writes the notes, once. A run that fails before leaves the folder free for any other."""
        while self.notes:
            self.notes.pop(0)()


@contextlib.contextmanager
def claimed(folder: epath.PathLike, config: Config, sections: Collection[str]) -> Iterator[Claim]:
    """Locks `folder` for this run, of however many processes.

    `sections` are the parts of the config that the stage depends on; `config` is not resolved yet.
    Raises ValueError that names the run that has the lock, or lists the fields in which the config
    that the folder is bound to differs. Fields that change no result may differ.
    """
    values = {name: value for name, value in config_lib.to_dict(config).items() if name in sections}
    notes: list[Callable[[], None]] = []
    with contextlib.ExitStack() as lock:
        problem = ""
        if jax.process_index() == 0:
            notes.append(functools.partial(write_run_info, folder, values))
            try:
                lock.enter_context(locks.held(folder))
                ignore, defaults = tuple(ranges.free(Config)), config_lib.defaults(Config)
                check_config(folder, values, ignore=ignore, defaults=defaults)
            except ValueError as error:
                problem = str(error)
        problem = processes.gather(problem)[0]
        if problem:
            raise ValueError(problem)
        yield Claim(epath.Path(folder), notes)
