"""The folder of a run: locked by one run at a time, bound to one config, with a record of starts.

`config.json` holds the part of the config that the run depends on, and `places.json` the identities
(contents.py) of the models and boards that it names by path, which may be moved. `runs.jsonl` has a
line for each start that took a step: command, commit, versions, devices. `ends.jsonl` has a line
for each of them that was not killed: what it spent. Nothing is decided by what the last two say,
but that the first line of `runs.jsonl` tells one training from another.
"""

import contextlib
import dataclasses
import functools
import importlib.metadata
import json
import os
import pathlib
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Collection, Generator, Mapping

import jax
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.checks import fields, ranges
from mgsd_jax.config import Config
from mgsd_jax.parallel import processes
from mgsd_jax.workdir import contents, locks, paths
from mgsd_jax.workdir.contents import RUNS_FILE

CONFIG_FILE = "config.json"
PLACES_FILE = "places.json"
ENDS_FILE = "ends.jsonl"
PACKAGES = (
    "mgsd_jax",
    "jax",
    "jaxlib",
    "flax",
    "optax",
    "orbax-checkpoint",
    "grain",
    "numpy",
    "transformers",
)


def write_run_info(workdir: epath.PathLike, config: Mapping[str, object]) -> None:
    """Write `config.json` and `places.json`, and this start with its devices into `runs.jsonl`.

    `config` holds JSON values. A resumed run adds a line, so that a change of code or versions in
    between can be seen.
    """
    folder = epath.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps(config, indent=2, sort_keys=True, allow_nan=False)
    paths.write_whole(folder / PLACES_FILE, json.dumps(_identities(config), indent=2) + "\n")
    paths.write_whole(folder / CONFIG_FILE, text + "\n")
    devices = {
        "platform": jax.default_backend(),
        "kind": jax.devices()[0].device_kind,
        "count": jax.device_count(),
        "processes": jax.process_count(),
    }
    write_start(folder, devices)


def write_start(folder: epath.PathLike, devices: Mapping[str, object] | None = None) -> None:
    """Add the command, commit and versions of this start to `runs.jsonl` of an existing folder."""
    commit, is_dirty = _git_commit()
    info = {
        "time": time.time(),
        "command": sys.orig_argv,
        "commit": commit,
        "is_dirty": is_dirty,
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cores": os.cpu_count(),
        "devices": devices,
        "versions": {package: _version(package) for package in PACKAGES},
    }
    _append(epath.Path(folder) / RUNS_FILE, info)


@contextlib.contextmanager
def spending(
    folder: epath.PathLike, is_recorded: Callable[[], bool] = lambda: True
) -> Generator[None]:
    """Adds what the block took to `ends.jsonl`, if its start `is_recorded` by then.

    Seconds by the clock, and seconds that all cores of this process worked.
    """
    began, worked = time.monotonic(), time.process_time()
    try:
        yield
    finally:
        if is_recorded():
            seconds = round(time.monotonic() - began, 3)
            cores = round(time.process_time() - worked, 3)
            end = {"time": time.time(), "seconds": seconds, "core_seconds": cores}
            # A full disk has its error already: the account of it is not worth another.
            with contextlib.suppress(OSError):
                _append(epath.Path(folder) / ENDS_FILE, end)


def read_starts(folder: epath.PathLike) -> list[fields.Json]:
    """The starts of `runs.jsonl`, oldest first, each with the "seconds" and "core_seconds" it took.

    These are None for one that was killed, or is still at work. Raises ValueError naming the file
    where a line of it is no record.
    """
    starts, ends = (_read(epath.Path(folder) / name) for name in (RUNS_FILE, ENDS_FILE))
    begun = [start["time"] for start in starts]
    spent: dict[int, fields.Json] = {}
    for end in ends:
        before = [i for i, time_ in enumerate(begun) if time_ <= end["time"]]
        if before:
            spent[before[-1]] = end
    return [
        {**start, **{key: spent.get(i, {}).get(key) for key in ("seconds", "core_seconds")}}
        for i, start in enumerate(starts)
    ]


def _append(path: epath.Path, record: Mapping[str, object]) -> None:
    """Adds a line to a file, which is replaced as a whole: there is never half a line."""
    before = path.read_text(encoding="utf-8") if path.exists() else ""
    paths.write_whole(path, before + json.dumps(record) + "\n")


def _read(path: epath.Path) -> list[fields.Json]:
    if not path.is_file():
        return []
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        source = f"{path}, line {number}"
        records.append(fields.read_line(line, source))
        fields.field(records[-1], "time", (int, float), source)
    return records


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
    folder's `config.json` has its value of `defaults` there. A path may have become another one
    where the same content is.
    """
    path = epath.Path(folder) / CONFIG_FILE
    if not path.exists():
        return
    ours = _by_field(to_json(config, "config"))
    newer = {name: value for name, value in _by_field(defaults or {}).items() if name in ours}
    theirs = newer | _by_field(fields.read_json(path))
    known = epath.Path(folder) / PLACES_FILE
    identities = fields.read_json(known) if known.exists() else {}
    places = {*ranges.places(Config)}
    differing = [
        f"{name}: got {_shown(ours, name)}, want {_shown(theirs, name)} (the run's)"
        for name in sorted(theirs.keys() | ours.keys())
        if (name in ours, ours.get(name)) != (name in theirs, theirs.get(name))
        and not (name in places and _is_moved(theirs.get(name), ours.get(name), identities))
        and not any(f"{name}.".startswith(f"{other}.") for other in ignore)
    ]
    if differing:
        raise ValueError(
            f"{path}: {'; '.join(differing)}; set that back, take another --workdir, or remove "
            f"{folder} to start anew"
        )


def _identities(config: Mapping[str, object]) -> dict[str, str]:
    """{path: identity} of what the config names; places in `{workdir}` move along anyway."""
    named = _by_field(to_json(config, "config"))
    found: dict[str, str] = {}
    for field in ranges.places(Config):
        for path in _paths_in(named.get(field)):
            what = None if not path or "{" in path else contents.identity(path)
            if what is not None:
                found[path] = what
    return found


def _paths_in(value: object) -> list[str]:
    """The paths in the value of a field: one, several, or the last of every (name, path)."""
    if isinstance(value, str):
        return [value]
    items = value if isinstance(value, list) else []
    return [item[-1] if isinstance(item, list) else item for item in items]


def _is_moved(theirs: object, ours: object, identities: Mapping[str, str]) -> bool:
    """Whether two values of a field of paths name the same content, `theirs` of `identities`."""
    if isinstance(theirs, list) and isinstance(ours, list):
        pairs = zip(theirs, ours, strict=False)
        return len(theirs) == len(ours) and all(_is_moved(a, b, identities) for a, b in pairs)
    if theirs == ours or not isinstance(theirs, str) or not isinstance(ours, str):
        return theirs == ours
    if theirs in identities:
        return identities[theirs] == contents.identity(ours)
    # An older version noted no identities. Models shipped with the package have their names.
    shipped = config_lib.portable(ours, "{workdir}").removeprefix("{assets}")
    return shipped != ours and theirs.endswith(f"/mgsd_jax/assets{shipped}")


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
def claimed(
    folder: epath.PathLike,
    config: Config,
    sections: Collection[str],
    bound: Collection[str] = (),
) -> Generator[Claim]:
    """Locks `folder` for this run, of however many processes.

    `sections` are the parts of the config that the stage depends on; `config` is not resolved yet.
    Raises ValueError that names the run that has the lock, or lists the fields in which the config
    that the folder is bound to differs. Fields that change no result may differ, all but those that
    are `bound` because they change one here.
    """
    values = {name: value for name, value in config_lib.to_dict(config).items() if name in sections}
    is_main = jax.process_index() == 0
    start = functools.partial(write_run_info, folder, values)
    notes: list[Callable[[], None]] = [start] if is_main else []
    with contextlib.ExitStack() as lock:
        problem = ""
        if is_main:
            try:
                lock.enter_context(locks.held(folder))
                ignore = {*ranges.free(Config)} - {*bound}
                defaults = config_lib.defaults(Config)
                check_config(folder, values, ignore=ignore, defaults=defaults)
            except ValueError as error:
                problem = str(error)
        problem = processes.gather(problem)[0]
        if problem:
            raise ValueError(problem)
        lock.enter_context(spending(folder, lambda: is_main and start not in notes))
        yield Claim(epath.Path(folder), notes)
