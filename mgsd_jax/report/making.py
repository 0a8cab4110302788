"""How a result was made: what the stage folders say of commands, settings, versions and costs.

A folder of an older version says less; what it does not say is a dash.
"""

import dataclasses
import itertools
import pathlib
import shlex
from collections.abc import Mapping, Sequence

from etils import epath

from mgsd_jax import tree
from mgsd_jax.checks import fields
from mgsd_jax.report.inputs import PathLike, Stage
from mgsd_jax.report.tables import Cell, Table, make_table
from mgsd_jax.report.words import DASH
from mgsd_jax.workdir import folders

# Settings that say where things are and how fast they go.
PLACES = ("folder", "path", "models", "student", "teacher", "workers", "every", "runs", "prompts")
NO_COMMANDS = "(the folders of these stages do not name their commands)"
_TOLD = {
    "seed": "Seed",
    "distillation.teacher_context": "The teacher reads",
    "distillation.objective": "Divergence",
}
_NOTE = (
    "Time from the first file that is read to the last that is written, of starts that were not "
    "killed. Core hours are what the cores worked in it; chip hours are time times chips. Tokens "
    "are those that models said."
)


@dataclasses.dataclass(frozen=True)
class Made:
    """What the folder of a stage says of how it came about."""

    stage: str
    starts: tuple[fields.Json, ...]  # see `folders.read_starts`
    settings: Mapping[str, object]  # 'distillation.optim.lr' -> value
    steps: int | None = None
    tokens: int | None = None  # that models have said


def read_made(
    stage: str, folder: PathLike, curves: Stage | None = None, tokens: int | None = None
) -> Made:
    """Return what the folder of a stage says; `curves` are those of a stage that trains."""
    settings, steps = read_settings(folder), None
    if curves is not None and curves.curves:
        steps = max((curve.steps[-1] for curve in curves.curves if curve.steps), default=None)
        lengths = [curve.values for curve in curves.curves if curve.name == "rollout/length"]
        rows = _rollouts(settings, stage)
        tokens = round(sum(lengths[0]) * rows) if lengths and rows else None
    return Made(stage, tuple(folders.read_starts(folder)), settings, steps, tokens)


def _rollouts(settings: Mapping[str, object], stage: str) -> int:
    """The responses that are sampled in a step; 0 where the settings do not say."""
    names = ("batch_size", "rollouts", "grounding_share")
    prompts, each, share = (settings.get(f"{stage}.{name}") for name in names)
    if not isinstance(prompts, int) or not isinstance(each, int):
        return 0
    asked = round(share * prompts) if isinstance(share, float) else 0
    return (prompts - asked) * each


def read_settings(folder: PathLike) -> dict[str, object]:
    """Return the settings in the `config.json` of a stage by their names; {} without one."""
    path = epath.Path(folder) / folders.CONFIG_FILE
    if not path.is_file():
        return {}
    leaves = tree.named_leaves(fields.read_json(path))
    return {key.replace("/", "."): value for key, value in leaves}


def commands(made: Sequence[Made]) -> list[str]:
    """Return every command that made something, once each, in order."""
    found = (start.get("command") for one in made for start in one.starts)
    return list(dict.fromkeys(command_line(argv) for argv in found if argv))


def command_line(argv: Sequence[str]) -> str:
    """Return a command as one types it: without the folders that the programs lie in."""
    is_script = len(argv) > 1 and not argv[1].startswith("-") and not argv[1].endswith(".py")
    program, *rest = argv[1:] if is_script else argv
    return shlex.join([pathlib.PurePath(program).name, *rest])


def recipe(made: Sequence[Made]) -> tuple[str, list[str]]:
    """Return the configs that were named, and the fields that were set apart from them.

    Fields that say where things are are left out.
    """
    names: dict[str, None] = {}
    changes: dict[str, None] = {}
    for start in (start for one in made for start in one.starts):
        for flag, value in _flags(start.get("command") or ()):
            if flag == "config":
                names[value] = None
            elif flag == "set" and value.partition("=")[0].split(".")[-1] not in PLACES:
                changes[value] = None
    return ", ".join(map(_last_parts, names)), list(changes)


def _flags(argv: Sequence[str]) -> list[tuple[str, str]]:
    """(name, value) of the flags of a command, written as --name=value or --name value."""
    found = []
    for word, following in itertools.pairwise([*argv, ""]):
        name, is_joined, value = word.lstrip("-").partition("=")
        if word.startswith("-"):
            found.append((name, value if is_joined else following))
    return found


def _last_parts(path: str) -> str:
    """A path without what is of one machine alone."""
    is_absolute = pathlib.PurePath(path).is_absolute()
    return "/".join(pathlib.PurePath(path).parts[-2:]) if is_absolute else path


def facts(made: Sequence[Made]) -> list[str]:
    """Return a line each on recipe, seed, teacher, code and versions."""
    name, changes = recipe(made)
    lines = []
    if name:
        apart = f", with {', '.join(changes)}" if changes else ", as it is"
        lines.append(f"Recipe: {name}{apart}")
    for field, words in _TOLD.items():
        values = dict.fromkeys(str(one.settings[field]) for one in made if field in one.settings)
        lines += [f"{words}: {', '.join(values)}"] if values else []
    starts = [start for one in made for start in one.starts]
    codes = dict.fromkeys(_code(start) for start in starts)
    if any(codes):
        lines.append(f"Code: {', '.join(filter(None, codes))}")
    lines += [f"Versions: {words}" for words in dict.fromkeys(map(_versions, starts))]
    return lines


def _code(start: fields.Json) -> str:
    if not start.get("commit"):
        return ""  # installed, not a checkout
    changed = " with changes that are in no commit" if start.get("is_dirty") else ""
    return f"commit {start['commit'][:12]}{changed}"


def _versions(start: fields.Json) -> str:
    found = {"Python": start.get("python"), **start.get("versions", {})}
    return ", ".join(f"{name} {version}" for name, version in found.items() if version)


def costs(made: Sequence[Made]) -> Table:
    """Return a row for each stage: where it ran, how far, and what it took."""
    columns = {
        "ran on": [Cell(_device(one)) for one in made],
        "steps": [Cell(DASH if one.steps is None else f"{one.steps:,}") for one in made],
        "tokens": [Cell(DASH if one.tokens is None else f"{one.tokens:,}") for one in made],
        "time": [Cell(duration(_seconds(one))) for one in made],
        "cost": [Cell(_cost(one)) for one in made],
        "starts": [_starts(one) for one in made],
    }
    return make_table("What it took", ("stage",), [(one.stage,) for one in made], columns, _NOTE)


def _device(one: Made) -> str:
    found: dict[str, None] = {}
    for start in one.starts:
        devices = start.get("devices")
        if devices and devices["platform"] != "cpu":
            several = f", {devices['processes']} processes" if devices["processes"] > 1 else ""
            found[f"{devices['count']} × {devices['kind']}{several}"] = None
        elif start.get("cores"):
            found[f"{start['cores']} CPU cores"] = None
    return "; ".join(found) or DASH


def _seconds(one: Made) -> float | None:
    known = [start["seconds"] for start in one.starts if start["seconds"] is not None]
    return sum(known) if known else None


def duration(seconds: float | None) -> str:
    """Return '37 s', '2 min 31 s' or '3 h 5 min', or a dash."""
    if seconds is None:
        return DASH
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def _cost(one: Made) -> str:
    hours = {"core": 0.0, "chip": 0.0}
    for start in one.starts:
        devices = start.get("devices")
        if start["seconds"] is not None and devices and devices["platform"] != "cpu":
            hours["chip"] += start["seconds"] * devices["count"] / 3600
        elif start["core_seconds"] is not None:
            hours["core"] += start["core_seconds"] / 3600
    return ", ".join(f"{value:.2g} {unit} hours" for unit, value in hours.items() if value) or DASH


def _starts(one: Made) -> Cell:
    killed = sum(start["seconds"] is None for start in one.starts)
    has_ends = any(start["seconds"] is not None for start in one.starts)
    return Cell(str(len(one.starts)), f"{killed} killed" if killed and has_ends else "")
