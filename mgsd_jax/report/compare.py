"""Several runs made comparable: the same boards under the same numbers, one model for each run."""

import collections
import dataclasses
import itertools
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from etils import epath

from mgsd_jax import tree
from mgsd_jax.checks import fields
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.measures import Measure, by_task, difference
from mgsd_jax.evaluation.rows import ROWS_FILE
from mgsd_jax.evaluation.summary import (
    MODELS,
    Board,
    Row,
    board_of,
    error_of,
    sort_models,
    summarize,
)
from mgsd_jax.report.inputs import STAGES, Curve, Evaluation, Stage, read_evaluation, read_stage
from mgsd_jax.workdir import paths
from mgsd_jax.workdir.folders import CONFIG_FILE

_LAST_SHARE = 0.1  # of the steps, what the end of a curve is the mean of
# Settings that say where things are and how fast they go.
_PLACES = ("folder", "path", "models", "student", "teacher", "workers", "every", "runs")


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its evaluation, the curves of its stages, and which model stands for it."""

    name: str
    folder: str
    evaluation: Evaluation
    stages: tuple[Stage, ...]
    settings: Mapping[str, Any]  # 'distillation.optim.lr' -> value
    result: str  # a model of the evaluation


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs, their rows as one evaluation, and its summary.

    In `rows` a board has the same index in every run, and models have new names: the result of a
    run has the run's, another one 'run: model'; a base that answered alike everywhere is 'base'.
    """

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    summary: dict[str, Any]

    @property
    def results(self) -> tuple[str, ...]:
        return tuple(run.name for run in self.runs)

    @property
    def shown(self) -> tuple[str, ...]:
        """The base that all share, if they do, and the results."""
        return (*(name for name in ("base",) if name in self.summary["models"]), *self.results)


def compare(folders: Sequence[str], model: str = "") -> Comparison:
    """Reads runs (workdirs, or evaluation folders) and puts them side by side.

    `model` stands for each run; '' is the last of base, grounded, distilled, else of all by name.
    Raises ValueError for a run without results, one without `model`, or names given twice.
    """
    runs = tuple(
        read_run(folder, name, model)
        for folder, name in zip(folders, run_names(folders), strict=True)
    )
    rows = tuple(_merge(runs))
    return Comparison(runs, rows, summarize(rows, source="report.runs"))


def run_names(folders: Sequence[str]) -> list[str]:
    """The shortest ends of the folders that tell them apart; 'evaluate' at the end is left out."""
    resolved = [paths.absolute(folder) for folder in folders]
    if len(set(resolved)) < len(folders) or not folders:
        raise ValueError(f"report.runs: got {tuple(folders)}, want different folders")
    parts = []
    for path in resolved:
        is_evaluation = path.name == "evaluate" and (path / ROWS_FILE).is_file()
        parts.append((path.parent if is_evaluation else path).parts)
    for length in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-length:]) for part in parts]
        if len(set(names)) == len(names) and not set(names) & set(MODELS):
            return names
    raise ValueError(f"report.runs: got {tuple(folders)}, want different runs")


def read_run(folder: str, name: str, model: str = "") -> Run:
    """One run; raises ValueError where it has no results or not the model."""
    root = epath.Path(folder)
    evaluation_folder = root if (root / ROWS_FILE).is_file() else root / "evaluate"
    if not evaluation_folder.is_dir():
        raise ValueError(
            f"{root}: got no results there, want a workdir with evaluate/{ROWS_FILE} or an "
            "evaluation folder; run --stage=evaluate first"
        )
    evaluation = read_evaluation(evaluation_folder)
    models = [name for name, modes in evaluation.summary["models"].items() if "picture" in modes]
    if not models:
        raise ValueError(f"{evaluation_folder}: got no answers to pictures, want some to compare")
    if model and model not in models:
        raise ValueError(f"{evaluation_folder}: got models {models}, want {model!r} (report.model)")
    known = [name for name in sort_models(models) if name in MODELS] or list(sort_models(models))
    workdir = evaluation_folder.parent
    stages = tuple(read_stage(stage, workdir / stage) for stage in STAGES)
    return Run(name, str(root), evaluation, stages, _settings(workdir), model or known[-1])


def _settings(workdir: epath.Path) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for stage in (*STAGES, "evaluate"):
        path = workdir / stage / CONFIG_FILE
        if path.is_file():
            leaves = tree.named_leaves(fields.read_json(path))
            found |= {key.replace("/", "."): value for key, value in leaves}
    return found


def differing_settings(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """The settings that are not the same in all runs, in order of name; absent ones are None."""
    names = sorted({name for run in runs for name in run.settings})
    values = {
        name: [run.settings.get(name) for run in runs]
        for name in names
        if name.split(".")[-1] not in _PLACES
    }
    return {
        name: found
        for name, found in values.items()
        if any(value != found[0] for value in found[1:])
    }


def _merge(runs: Sequence[Run]) -> Iterable[Row]:
    numbers: dict[tuple[Any, ...], int] = {}
    taken: set[Board] = set()
    texts: dict[tuple[str, int, int], str] = {}
    contents: dict[str, tuple[Any, ...]] = {}
    renumbered = []
    for run in runs:
        # A benchmark may hold a board twice: the first of one is paired with the first of another.
        places: dict[Board, tuple[Any, ...]] = {}
        counts: collections.Counter[tuple[Any, ...]] = collections.Counter()
        rows = []
        for row in sorted(run.evaluation.rows, key=lambda row: (board_of(row), row["mode"])):
            board, text = board_of(row), row["task_text"]
            if text not in contents:
                env = ENVS[row["task"]]
                state = env.from_text(text, source=f"{run.folder}, {row['id']}")
                contents[text] = (row["task"], row["level"], env.key(state))
            if board not in places:
                content = contents[text]
                places[board] = (*content, counts[content])
                counts[content] += 1
            if places[board] not in numbers:
                numbers[places[board]] = _free_index(board, taken)
            named = (board[0], board[1], index := numbers[places[board]])
            text = texts.setdefault(named, text)
            rows.append({**row, "index": index, "task_text": text})
        renumbered.append(rows)
    shares_base = _answers_alike(renumbered, "base") and all(run.result != "base" for run in runs)
    for i, (run, rows) in enumerate(zip(runs, renumbered, strict=True)):
        for row in rows:
            if row["model"] == run.result:
                name = run.name
            elif row["model"] == "base" and shares_base:
                if i:
                    continue
                name = "base"
            else:
                name = f"{run.name}: {row['model']}"
            yield {**row, "model": name, "id": f"{run.name}/{row['id']}"}


def _free_index(board: Board, taken: set[Board]) -> int:
    """The board's own index, or the next one that no other board of its level has; takes it."""
    task, level, index = board
    while (task, level, index) in taken:
        index += 1
    taken.add((task, level, index))
    return index


def _answers_alike(runs: Sequence[Sequence[Row]], model: str) -> bool:
    """Whether a model gave the same responses to the same questions in every run."""
    tables = [
        {
            (board_of(row), row["mode"], row.get("attempt", 0)): row["response"]
            for row in rows
            if row["model"] == model
        }
        for rows in runs
    ]
    return bool(tables[0]) and all(table == tables[0] for table in tables[1:])


def pair_differences(
    comparison: Comparison,
) -> list[tuple[str, str, Measure | None, dict[str, Measure | None]]]:
    """(run, other run, difference, the same by task) of every two results, from the picture."""
    rows = {
        name: [r for r in comparison.rows if (r["model"], r["mode"]) == (name, "picture")]
        for name in comparison.results
    }
    found = []
    for first, second in itertools.combinations(comparison.results, 2):
        mine, theirs = dict(by_task(rows[second])), dict(by_task(rows[first]))
        parts = {
            task: difference(mine[task], theirs[task])
            for task in ENVS
            if task in mine and task in theirs
        }
        found.append((second, first, difference(rows[second], rows[first]), parts))
    return found


def disputed(comparison: Comparison, a_task: int = 4) -> list[tuple[Board, dict[str, Row]]]:
    """Boards that some results solve from the picture and some do not, evenly spread in a task.

    Of a task that has boards with a plan of every result, only these.
    """
    answers: dict[Board, dict[str, Row]] = {}
    for row in comparison.rows:
        if row["mode"] == "picture" and row["model"] in comparison.results:
            answers.setdefault(board_of(row), {}).setdefault(row["model"], row)
    chosen = []
    for task in ENVS:
        found = [
            (board, {name: rows[name] for name in comparison.results})
            for board, rows in sorted(answers.items())
            if board[0] == task
            and len(rows) == len(comparison.results)
            and len({bool(row["outcome"]["success"]) for row in rows.values()}) == 2
        ]
        # Two routes say more than one.
        found = [each for each in found if all(row["plan"] for row in each[1].values())] or found
        step = max(1.0, len(found) / a_task)
        chosen += [found[int((i + 0.5) * step)] for i in range(min(a_task, len(found)))]
    return chosen


def frequent_failures(
    comparison: Comparison, count: int = 8
) -> list[tuple[tuple[str, str, str], list[int]]]:
    """((task, error, reason), how many answers of each result) of the most frequent failures."""
    counts: dict[tuple[str, str, str], collections.Counter[str]] = {}
    for row in comparison.rows:
        if row["mode"] == "picture" and row["model"] in comparison.results:
            error = error_of(row)
            if error not in ("success", "not_optimal"):
                key = (row["task"], error, row["outcome"]["reason"])
                counts.setdefault(key, collections.Counter())[row["model"]] += 1
    ranked = sorted(counts.items(), key=lambda item: (-item[1].total(), item[0]))
    return [(key, [found[name] for name in comparison.results]) for key, found in ranked[:count]]


def curve_of(run: Run, stage: str, name: str) -> Curve | None:
    """A curve of a stage of a run, None where there is none with values."""
    (found,) = (part for part in run.stages if part.name == stage)
    return next((curve for curve in found.curves if curve.name == name and curve.values), None)


def ends(run: Run, prefix: str) -> dict[str, float]:
    """The last values of distillation's metrics `prefix/...`: means over a tenth of the steps.

    A range of positions that no response reached is 0 at every step and is left out.
    """
    (stage,) = (part for part in run.stages if part.name == "distillation")
    found = {}
    for curve in stage.curves:
        group, _, name = curve.name.partition("/")
        if group == prefix and any(curve.values):
            last = curve.values[-max(1, round(_LAST_SHARE * len(curve.values))) :]
            found[name] = sum(last) / len(last)
    return found
