"""The folder of a run: held by one run at a time, of one config, with a record of its starts."""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

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


def write_run_info(
    workdir: epath.PathLike, config: Mapping[str, Any], *, is_main: bool = True
) -> None:
    """Write `config.json`, and add this start's commit and versions to `runs.jsonl`.

    `config` is a dict of JSON values (`dataclasses.asdict` of a config). A resumed run adds a
    line, so that a change of code or versions in between can be seen.
    """
    if not is_main:
        return
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
    if paths.is_remote(folder):
        before = runs.read_text(encoding="utf-8") if runs.exists() else ""
        runs.write_text(before + json.dumps(info) + "\n")
        return
    with runs.open("a", encoding="utf-8") as file:
        file.write(json.dumps(info) + "\n")


def _git_commit() -> tuple[str | None, bool | None]:
    """(commit, whether tracked files differ from it); None where this file is in no git tree."""
    folder = pathlib.Path(__file__).parent

    def git(*arguments: str) -> str:
        command = ("git", "-C", str(folder), *arguments)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()

    try:
        # An installed copy may lie inside an unrelated repository, whose commit says nothing.
        git("ls-files", "--error-unmatch", pathlib.Path(__file__).name)
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
    config: Mapping[str, Any],
    *,
    ignore: Sequence[str] = (),
    defaults: Mapping[str, Any] | None = None,
) -> None:
    """Raise ValueError that lists what differs where `folder` is of a run with another config.

    Compares with the `config.json` that `write_run_info` left there, if any. `ignore`
    names fields ('optim.lr') or sections ('optim') that may differ. A field that the folder's
    config does not know (it is newer) has its value in `defaults` there.
    """
    path = epath.Path(folder) / CONFIG_FILE
    if not path.exists():
        return
    ours = dict(tree.named_leaves(to_json(config, "config")))
    unknown = {k: v for k, v in tree.named_leaves(dict(defaults or {})) if k in ours}
    theirs = unknown | dict(tree.named_leaves(fields.read_json(path)))
    absent = object()
    differing = []
    for name in sorted(theirs.keys() | ours.keys()):
        field = name.replace("/", ".")
        if any(field == other or field.startswith(f"{other}.") for other in ignore):
            continue
        got, want = ours.get(name, absent), theirs.get(name, absent)
        if got != want:
            shown = ["nothing" if value is absent else repr(value) for value in (got, want)]
            differing.append(f"{field}: got {shown[0]}, want {shown[1]}")
    if differing:
        raise ValueError(
            f"{path} is of a run with another config: {'; '.join(differing)}; set that back, "
            f"remove {folder} to start anew, or take another folder"
        )


def to_json(value: Mapping[str, Any], name: str) -> Any:
    try:
        return json.loads(json.dumps(dict(value)))
    except TypeError as error:
        raise ValueError(f"{name}: got {error}, want JSON values only") from error


@dataclasses.dataclass(frozen=True)
class Claim:
    """A folder that this run alone may write to; it becomes this config's with the first step."""

    folder: epath.Path
    notes: list[Callable[[], None]]  # what is written then

    def record(self) -> None:
        """Writes the notes, once. A run that fails before leaves the folder to any other."""
        while self.notes:
            self.notes.pop(0)()


@contextlib.contextmanager
def claimed(folder: epath.PathLike, config: Config, sections: Sequence[str]) -> Iterator[Claim]:
    """Holds `folder` for this run, of however many processes.

    `sections` are the parts of the config that the stage depends on. Raises ValueError that names
    the run that holds the folder, or lists the fields in which another config has used it; fields
    that change no result may differ.
    """
    values = {name: value for name, value in config_lib.to_dict(config).items() if name in sections}
    is_main = jax.process_index() == 0
    with contextlib.ExitStack() as lock:
        problem = ""
        if is_main:
            try:
                lock.enter_context(locks.held(folder))
                check_config(
                    folder,
                    values,
                    ignore=tuple(ranges.free(Config)),
                    defaults=config_lib.defaults(Config),
                )
            except ValueError as error:
                problem = str(error)
        problem = processes.gather(problem)[0]
        if problem:
            raise ValueError(problem)
        record = functools.partial(write_run_info, folder, values, is_main=is_main)
        yield Claim(epath.Path(folder), [record])
