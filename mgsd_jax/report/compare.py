"""Several runs made comparable: the same boards under the same numbers, one model for each run."""

import collections
import dataclasses
import itertools
from collections.abc import Hashable, Iterator, Mapping, Sequence

from etils import epath

from mgsd_jax import tree
from mgsd_jax.checks import fields
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.measures import Measure, difference, gap_by_task
from mgsd_jax.evaluation.rows import ROWS_FILE, BoardKey, PlanRow, Row, board_of, plans
from mgsd_jax.evaluation.summary import MODELS, error_of, sort_models, summarize
from mgsd_jax.report.boards import first_answers, spread
from mgsd_jax.report.inputs import (
    STAGES,
    Curve,
    Evaluation,
    Stage,
    Summary,
    read_evaluation,
    read_stage,
)
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
    settings: Mapping[str, object]  # 'distillation.optim.lr' -> value
    result: str  # a model of the evaluation


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs, their rows as one evaluation, and its summary.

    In `rows` a board has the same index in every run, and models have new names: the result of a
    run has the run's, another one 'run: model'; a base that answered alike everywhere is 'base'.
    """

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    summary: Summary

    @property
    def results(self) -> tuple[str, ...]:
        return tuple(run.name for run in self.runs)

    @property
    def shown(self) -> tuple[str, ...]:
        """The base that all share, if they do, and the results."""
        return (*(name for name in ("base",) if name in self.summary["models"]), *self.results)

    @property
    def shown_summary(self) -> Summary:
        """The summary without the models that are not shown."""
        changed = {
            key: {name: self.summary[key][name] for name in self.shown}
            for key in ("models", "diagnostics")
        }
        return {**self.summary, **changed}


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


def _settings(workdir: epath.Path) -> dict[str, object]:
    found: dict[str, object] = {}
    for stage in (*STAGES, "evaluate"):
        path = workdir / stage / CONFIG_FILE
        if path.is_file():
            leaves = tree.named_leaves(fields.read_json(path))
            found |= {key.replace("/", "."): value for key, value in leaves}
    return found


def differing_settings(runs: Sequence[Run]) -> dict[str, list[object]]:
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


def number_boards(runs: Sequence[Run]) -> list[dict[BoardKey, int]]:
    """Return for each run the indices of its boards such that equal boards have the same one.

    A board keeps the index that it has in the first run that has it, or gets the next free one. A
    benchmark may hold a board twice: the first of one run is then the first of another.
    """
    contents: dict[str, tuple[str, int, Hashable]] = {}
    numbers: dict[tuple[tuple[str, int, Hashable], int], int] = {}
    taken: set[BoardKey] = set()
    found = []
    for run in runs:
        texts = {board_of(row): row["task_text"] for row in run.evaluation.rows}
        counts: collections.Counter[tuple[str, int, Hashable]] = collections.Counter()
        indices: dict[BoardKey, int] = {}
        for (task, level, index), text in sorted(texts.items()):
            if text not in contents:
                source = f"{run.folder}, {task}, level {level}, index {index}"
                state = ENVS[task].from_text(text, source=source)
                contents[text] = (task, level, ENVS[task].key(state))
            board = (contents[text], counts[contents[text]])
            counts[contents[text]] += 1
            if board not in numbers:
                numbers[board] = index
                while (task, level, numbers[board]) in taken:
                    numbers[board] += 1
                taken.add((task, level, numbers[board]))
            indices[task, level, index] = numbers[board]
        found.append(indices)
    return found


def name_models(
    runs: Sequence[Run], numbers: Sequence[Mapping[BoardKey, int]]
) -> list[dict[str, str | None]]:
    """Return for each run the names of its models in the comparison, None for one left out.

    The result of a run has the run's name, another model 'run: model'. A base that is no result and
    answered alike in every run is there once, as 'base'.
    """
    shares_base = _answer_alike("base", runs, numbers) and all(run.result != "base" for run in runs)
    named = []
    for i, run in enumerate(runs):
        models = run.evaluation.summary["models"]
        names: dict[str, str | None] = {name: f"{run.name}: {name}" for name in models}
        names[run.result] = run.name
        if shares_base:
            names["base"] = None if i else "base"
        named.append(names)
    return named


def _answer_alike(
    model: str, runs: Sequence[Run], numbers: Sequence[Mapping[BoardKey, int]]
) -> bool:
    """Whether a model gave the same responses to the same questions in every run."""
    answers = [
        {
            (*board_of(row)[:2], indices[board_of(row)], row["mode"], row.get("attempt", 0)): row[
                "response"
            ]
            for row in run.evaluation.rows
            if row["model"] == model
        }
        for run, indices in zip(runs, numbers, strict=True)
    ]
    return bool(answers[0]) and all(each == answers[0] for each in answers[1:])


def _merge(runs: Sequence[Run]) -> Iterator[Row]:
    """The rows of all runs as of one evaluation."""
    numbers = number_boards(runs)
    texts: dict[BoardKey, str] = {}  # equal boards may be written in several ways
    for run, indices, names in zip(runs, numbers, name_models(runs, numbers), strict=True):
        for row in sorted(run.evaluation.rows, key=lambda row: (board_of(row), row["mode"])):
            name = names[row["model"]]
            if name is None:
                continue
            task, level, index = board_of(row)
            index, same = indices[task, level, index], row.get("same_as", index)
            yield {
                **row,
                "model": name,
                "id": f"{run.name}/{row['id']}",
                "index": index,
                "same_as": indices.get((task, level, same), index),
                "task_text": texts.setdefault((task, level, index), row["task_text"]),
            }


def pair_differences(
    comparison: Comparison,
) -> list[tuple[str, str, Measure | None, dict[str, Measure | None]]]:
    """(run, other run, difference, the same by task) of every two results, from the picture."""
    rows = {
        name: [row for row in plans(comparison.rows, "picture") if row["model"] == name]
        for name in comparison.results
    }
    found = []
    for first, second in itertools.combinations(comparison.results, 2):
        parts = gap_by_task(rows[second], rows[first])
        found.append((second, first, difference(rows[second], rows[first]), parts))
    return found


def disputed(comparison: Comparison, a_task: int = 4) -> list[tuple[BoardKey, dict[str, PlanRow]]]:
    """Boards that some results solve from the picture and some do not, evenly spread in a task.

    Of a task that has boards with a plan of every result, only these: two routes say more than one.
    """
    names, answers = comparison.results, first_answers(comparison.rows)
    chosen = []
    for task in ENVS:
        found = [
            (board, {name: rows[name] for name in names})
            for board, rows in sorted(answers.items())
            if board[0] == task
            and rows.keys() >= set(names)
            and len({bool(rows[name]["outcome"]["success"]) for name in names}) == 2
        ]
        planned = [each for each in found if all(row["plan"] for row in each[1].values())]
        chosen += spread(planned or found, a_task)
    return chosen


def frequent_failures(
    comparison: Comparison, count: int = 8
) -> dict[tuple[str, str, str], collections.Counter[str]]:
    """The most frequent failures, (task, error, reason), each with its count by result."""
    found: dict[tuple[str, str, str], collections.Counter[str]] = {}
    for row in plans(comparison.rows, "picture"):
        if row["model"] in comparison.results:
            error = error_of(row)
            if error not in ("success", "not_optimal"):
                key = (row["task"], error, row["outcome"]["reason"] or "")
                found.setdefault(key, collections.Counter())[row["model"]] += 1
    ranked = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    return dict(ranked[:count])


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
