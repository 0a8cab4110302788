"""Several runs made comparable: the same boards under the same numbers, one model for each run."""

import collections
import dataclasses
import itertools
from collections.abc import Sequence

from etils import epath

from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation.measures import Measure, difference, gap_by_task
from mgsd_jax.evaluation.rows import ROWS_FILE, BoardKey, PlanRow, Row, board_of, plans
from mgsd_jax.evaluation.summary import MODELS, Summary, error_of, summarize
from mgsd_jax.report import inputs, making
from mgsd_jax.report.boards import first_answers, main_models, spread
from mgsd_jax.report.inputs import STAGES, Curve, Evaluation, Stage
from mgsd_jax.report.making import Made
from mgsd_jax.workdir import paths

_LAST_SHARE = 0.1  # of the steps, what the end of a curve is the mean of
Failure = tuple[str, str, str]  # task, error, reason


@dataclasses.dataclass(frozen=True)
class Run:
    """One run: its evaluation, the curves of its stages, and which model stands for it."""

    name: str
    folder: str
    evaluation: Evaluation
    stages: tuple[Stage, ...]
    made: tuple[Made, ...]  # how each of its stages came about
    result: str  # a model of the evaluation

    @property
    def settings(self) -> dict[str, object]:
        """{'distillation.optim.lr': value}; the evaluation's where a stage's differ."""
        return {name: value for one in self.made for name, value in one.settings.items()}


@dataclasses.dataclass(frozen=True)
class Comparison:
    """The runs, their rows as one evaluation, and its summary.

    In `rows` a board has the same index in every run, and models have new names (`name_models`).
    `shown` is the summary of the results, and of the base if all runs share it.
    """

    runs: tuple[Run, ...]
    rows: tuple[Row, ...]
    summary: Summary

    @property
    def results(self) -> tuple[str, ...]:
        return tuple(run.name for run in self.runs)

    @property
    def shown(self) -> Summary:
        names = [name for name in ("base", *self.results) if name in self.summary["models"]]
        models, found = self.summary["models"], self.summary["diagnostics"]
        return {
            **self.summary,
            "models": {name: models[name] for name in names},
            "diagnostics": {name: found[name] for name in names},
        }


def compare(folders: Sequence[str], model: str = "") -> Comparison:
    """Read runs (workdirs, or evaluation folders) and put them side by side.

    `model` stands for each run; '' is the last of base, grounded, distilled, else of all by name.
    Raises ValueError for a run without results, one without `model`, or names given twice.
    """
    named = zip(folders, run_names(folders), strict=True)
    runs = tuple(read_run(folder, name, model) for folder, name in named)
    rows = tuple(_merge(runs))
    return Comparison(runs, rows, summarize(rows, source="report.runs"))


def run_names(folders: Sequence[str]) -> list[str]:
    """Return the shortest ends of the folders that tell them apart, without a last 'evaluate'."""
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
    """Return one run. Raises ValueError where it has no results, or none of the model."""
    root = epath.Path(folder)
    source = root if (root / ROWS_FILE).is_file() else root / "evaluate"
    if not source.is_dir():
        raise ValueError(
            f"{root}: no results found, want a workdir with evaluate/{ROWS_FILE} or an "
            "evaluation folder; run --stage=evaluate first"
        )
    evaluation = inputs.read_evaluation(source)
    models = [name for name, modes in evaluation.summary["models"].items() if "picture" in modes]
    if not models:
        raise ValueError(f"{source}: no answers to pictures found, want some to compare")
    if model and model not in models:
        raise ValueError(f"{source}: got models {models}, want {model!r} (report.model)")
    stages = tuple(inputs.read_stage(stage, source.parent / stage) for stage in STAGES)
    made = [making.read_made(stage.name, source.parent / stage.name, stage) for stage in stages]
    made.append(making.read_made("evaluate", source, tokens=inputs.count_tokens(evaluation.rows)))
    return Run(name, str(root), evaluation, stages, tuple(made), model or main_models(models)[-1])


def differing_settings(runs: Sequence[Run]) -> dict[str, list[object]]:
    """Return the settings that are not the same in all runs; absent ones are None."""
    names = sorted({name for run in runs for name in run.settings})
    values = {name: [run.settings.get(name) for run in runs] for name in names}
    return {
        name: found
        for name, found in values.items()
        if name.split(".")[-1] not in making.PLACES and any(value != found[0] for value in found)
    }


def number_boards(runs: Sequence[Run]) -> list[dict[BoardKey, tuple[int, int]]]:
    """Return for each run, by board: its index, and that of the first board of equal content.

    Equal boards of two runs get the same indices: a board keeps the index that it has in the first
    run that has it, or gets the next free one. A benchmark may hold a board twice: the first of one
    run is then the first of another.
    """
    contents: dict[str, tuple] = {}  # what a board is, by its text
    numbers: dict[tuple, int] = {}
    taken: set[BoardKey] = set()
    found = []
    for run in runs:
        texts = {board_of(row): row["task_text"] for row in run.evaluation.rows}
        counts: collections.Counter[tuple] = collections.Counter()
        indices = {}
        for (task, level, index), text in sorted(texts.items()):
            if text not in contents:
                source = f"{run.folder}, {task}, level {level}, index {index}"
                state = ENVS[task].from_text(text, source=source)
                contents[text] = (task, level, ENVS[task].key(state))
            content = contents[text]
            board = (*content, counts[content])
            counts[content] += 1
            if board not in numbers:
                free = (i for i in itertools.count(index) if (task, level, i) not in taken)
                numbers[board] = next(free)
                taken.add((task, level, numbers[board]))
            indices[task, level, index] = (numbers[board], numbers[*content, 0])
        found.append(indices)
    return found


def name_models(rows: Sequence[Sequence[Row]], runs: Sequence[Run]) -> list[dict[str, str]]:
    """Return for each run what its models are called in the comparison.

    The result of a run has the run's name, another model is 'run: model'. A base that is no result
    and answered alike in every run is called 'base' in the first and left out of the others.
    """
    answers = [
        {
            (board_of(row), row["mode"], row.get("attempt", 0)): row["response"]
            for row in some
            if row["model"] == "base"
        }
        for some in rows
    ]
    is_alike = bool(answers[0]) and all(found == answers[0] for found in answers)
    named = []
    for run in runs:
        names = {name: f"{run.name}: {name}" for name in run.evaluation.summary["models"]}
        names[run.result] = run.name
        if is_alike and all(run.result != "base" for run in runs):
            del names["base"]
            names |= {} if named else {"base": "base"}
        named.append(names)
    return named


def _merge(runs: Sequence[Run]) -> list[Row]:
    """The rows of all runs as of one evaluation."""
    texts: dict[BoardKey, str] = {}  # equal boards may be written in several ways
    renumbered: list[list[Row]] = []
    for run, indices in zip(runs, number_boards(runs), strict=True):
        renumbered.append([])
        for row in sorted(run.evaluation.rows, key=lambda row: (board_of(row), row["mode"])):
            index, same = indices[board_of(row)]
            text = texts.setdefault((row["task"], row["level"], index), row["task_text"])
            renumbered[-1].append({**row, "index": index, "same_as": same, "task_text": text})
    return [
        {**row, "model": names[row["model"]], "id": f"{run.name}/{row['id']}"}
        for run, rows, names in zip(runs, renumbered, name_models(renumbered, runs), strict=True)
        for row in rows
        if row["model"] in names
    ]


def pair_differences(
    comparison: Comparison,
) -> list[tuple[str, str, Measure | None, dict[str, Measure | None]]]:
    """Return (run, other run, difference, the same by task) of every two results, from pictures."""
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
    """Return boards that some results solve from the picture and some do not, spread by task.

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
            and len({rows[name]["outcome"]["success"] for name in names}) == 2
        ]
        planned = [each for each in found if all(row["plan"] for row in each[1].values())]
        chosen += spread(planned or found, a_task)
    return chosen


def frequent_failures(
    comparison: Comparison, count: int = 8
) -> dict[Failure, collections.Counter[str]]:
    """Return the most frequent failures from pictures, each with its count by result."""
    found: dict[Failure, collections.Counter[str]] = {}
    for row in plans(comparison.rows, "picture"):
        error = error_of(row)
        if row["model"] in comparison.results and error not in ("success", "not_optimal"):
            failure = (row["task"], error, row["outcome"]["reason"] or "")
            found.setdefault(failure, collections.Counter())[row["model"]] += 1
    ranked = sorted(found.items(), key=lambda item: (-item[1].total(), item[0]))
    return dict(ranked[:count])


def curves_of(run: Run, stage: str) -> dict[str, Curve]:
    """Return the curves of a stage that have values, by name."""
    (found,) = (part for part in run.stages if part.name == stage)
    return {curve.name: curve for curve in found.curves if curve.values}


def ends(run: Run, prefix: str) -> dict[str, float]:
    """Return the last values of distillation's metrics `prefix/...`: means over a tenth of steps.

    A range of positions that no response reached is 0 at every step and is left out.
    """
    found = {}
    for name, curve in curves_of(run, "distillation").items():
        group, _, key = name.partition("/")
        if group == prefix and any(curve.values):
            last = curve.values[-max(1, round(_LAST_SHARE * len(curve.values))) :]
            found[key] = sum(last) / len(last)
    return found
