"""The tables of a report. Each is made once and written as HTML (page.html) and as markdown."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence

from mgsd_jax.evaluation.measures import Measure
from mgsd_jax.evaluation.summary import MODELS, Part, Summary
from mgsd_jax.report import words
from mgsd_jax.report.inputs import parts


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number, the detail below it, the share that its data bar shows, and its n."""

    text: str
    detail: str = ""
    share: float | None = None
    n: int | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table; the first `labels` cells of its head and of each row name the row."""

    title: str
    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    labels: int = 1


def make_table(
    title: str,
    head: Sequence[str],
    labels: Iterable[Sequence[str | Cell]],
    columns: Mapping[str, Sequence[Cell]],
    note: str = "",
) -> Table:
    """Return a table of columns, its rows named by `labels` under the first words of the head.

    The name of a column may be that of a model. An n that all cells of a column share is written
    in its head, any other in the cells.
    """
    heads, made = list(map(Cell, head)), []
    for name, column in columns.items():
        counts = {cell.n for cell in column if cell.n is not None}
        shared = f"n {min(counts)}" if len(counts) == 1 else ""
        heads.append(Cell(words.model_label(name), shared))
        made.append(column if shared else list(map(_with_count, column)))
    rows = []
    for label, *cells in zip(labels, *made, strict=True):
        named = [Cell(name) if isinstance(name, str) else name for name in label]
        rows.append((*named, *cells))
    return Table(title, tuple(heads), tuple(rows), note, len(head))


def _with_count(cell: Cell) -> Cell:
    if cell.n is None:
        return cell
    return dataclasses.replace(cell, detail=f"{cell.detail}, n {cell.n}")


def to_markdown(table: Table) -> str:
    """Return the table with its title and note as GitHub markdown."""
    note = [table.note, ""] if table.note else []
    return "\n".join([f"### {table.title}", "", *grid(table), "", *note])


def grid(table: Table) -> list[str]:
    """Return the lines of the table in GitHub markdown."""
    rule = ["---"] * table.labels + ["---:"] * (len(table.head) - table.labels)
    rows = [[_plain(cell) for cell in row] for row in (table.head, *table.rows)]
    return ["| " + " | ".join(line) + " |" for line in (rows[0], rule, *rows[1:])]


def _plain(cell: Cell) -> str:
    text = f"{cell.text} ({cell.detail})" if cell.detail else cell.text
    return text.replace("|", "\\|")


def measure_cell(measure: Measure | None) -> Cell:
    """Return a share with its interval; a dash where it was not measured."""
    if measure is None or measure["value"] is None:
        return Cell(words.DASH)
    share = min(1.0, max(0.0, measure["value"]))
    return Cell(words.percent(measure["value"]), words.interval(measure), share)


def _counted(measure: Measure | None) -> Cell:
    """The same with its n."""
    cell = measure_cell(measure)
    if measure is None or measure["value"] is None:
        return cell
    return dataclasses.replace(cell, n=measure["n"])


def points_cell(measure: Measure | None, missing: str = "not measured") -> Cell:
    """Return a difference in points with its interval and p-value, or a dash and why."""
    if measure is None or measure["value"] is None:
        return Cell(words.DASH, missing)
    p = f", {words.p_value(measure)}" if "p_value" in measure else ""
    return Cell(words.points(measure["value"]), words.signed(measure) + p)


def count_cell(measure: Measure | None) -> Cell:
    """Return the n of a measure."""
    return Cell(words.DASH if measure is None else str(measure["n"]))


# Tables of a summary. Those that may be absent are lists of one table or none.

_Shown = Sequence[tuple[str, str, Part]]  # model, mode, what was measured


def results(title: str, shown: _Shown, note: str) -> Table:
    """A row for each model and what it reads; a column for each task, and their mean."""
    columns = {}
    for task, name in words.TASKS.items():
        found = [part["tasks"].get(task) for *_, part in shown]
        if any(found):
            columns[name] = [measure_cell(part and part["level_mean"]) for part in found]
    columns["macro"] = [measure_cell(part["macro"]) for *_, part in shown]
    return _by_mode(title, shown, columns, note)


def _by_mode(title: str, shown: _Shown, columns: Mapping[str, Sequence[Cell]], note: str) -> Table:
    labels = [(words.model_label(model), words.MODES[mode]) for model, mode, _ in shown]
    return make_table(title, ("model", "reads"), labels, columns, note)


def overall(summary: Summary) -> Table:
    """Success, and what lies behind it, of each model and mode over all tasks."""
    shown = list(parts(summary))
    found = [part for *_, part in shown]
    keys = {"shortest": "optimal", "parsed": "parsed", "legal": "legal", "progress": "progress"}
    columns = {
        "success": [measure_cell(part["macro"]) for part in found],
        "success, unbalanced": [Cell(words.percent(part["macro_upstream"])) for part in found],
        **{name: [measure_cell(part[key]) for part in found] for name, key in keys.items()},
        "truncated": [measure_cell(part["truncated"]) for part in found],
        "tokens": [_lengths(part["response_tokens"]) for part in found],
        "n": [Cell(str(part["n"])) for part in found],
    }
    note = (
        "Success is the mean over tasks of the mean over levels; 'unbalanced' is the mean over "
        "tasks of all their boards, as the public scorer has it. Progress is the share of the "
        "shortest way that was covered. Wrong picture: asked with the picture of another board of "
        "the same task and level, which measures guessing. Intervals: 95 %."
    )
    return _by_mode("All tasks", shown, columns, note)


def _lengths(lengths: Mapping[str, float | None]) -> Cell:
    mean, median = lengths["mean"], lengths["median"]
    if mean is None or median is None:  # an endpoint that does not count its tokens
        return Cell(words.DASH)
    return Cell(f"{mean:.0f}", f"median {median:.0f}")


def by_level(summary: Summary, task: str) -> Table:
    """Success of each model and mode on each level of one task."""
    shown = [(m, mode, p["tasks"][task]) for m, mode, p in parts(summary) if task in p["tasks"]]
    columns = {
        "success": [_counted(part["success"]) for *_, part in shown],
        "shortest": [_counted(part["optimal"]) for *_, part in shown],
    }
    for level in sorted({int(level) for *_, part in shown for level in part["levels"]}):
        found = [part["levels"].get(str(level)) for *_, part in shown]
        columns[f"level {level}"] = [_counted(part and part["success"]) for part in found]
    return _by_mode(words.TASKS[task], shown, columns, "")


def passes(summary: Summary) -> list[Table]:
    """pass@k of each model and mode, where boards were answered several times."""
    shown = [(m, mode, p["pass_at_k"]) for m, mode, p in parts(summary) if p.get("pass_at_k")]
    numbers = sorted({int(k) for *_, found in shown for k in found})
    columns = {f"pass@{k}": [_counted(found.get(str(k))) for *_, found in shown] for k in numbers}
    note = (
        "The chance that one of k sampled answers solves the board (unbiased estimator), "
        "level-balanced."
    )
    return [_by_mode("Several tries", shown, columns, note)] if shown else []


def errors(summary: Summary) -> Table:
    """How the answers of each model and mode ended; every row adds up to its n."""
    shown = list(parts(summary))
    # Summaries of older versions lack some kinds.
    columns = {
        label: [share_cell(part["errors"].get(name, 0), part["n"]) for *_, part in shown]
        for name, label in words.ERRORS.items()
    }
    columns["n"] = [Cell(str(part["n"])) for *_, part in shown]
    note = (
        "Each answer counts once, under the first that holds: solved, request failed, cut off, no "
        "readable plan, state read wrong. The rest have the state right, or none was measured, and "
        "fail by their plan."
    )
    return _by_mode("How answers end", shown, columns, note)


def share_cell(count: int, n: int) -> Cell:
    return Cell(str(count), words.percent(count / n), count / n)


def reasons(summary: Summary) -> Table:
    """Why the simulator stopped, by model and mode."""
    shown = list(parts(summary))
    found = {reason for *_, part in shown for reason in part["reasons"]}
    names = [name for name in words.REASONS if name in found] + sorted(found - words.REASONS.keys())
    columns = {}
    for name in names:
        counts = [(part["reasons"].get(name, 0), part["n"]) for *_, part in shown]
        columns[words.reason_label(name)] = [Cell(str(count), "", count / n) for count, n in counts]
    return _by_mode("What the simulator said", shown, columns, "")


def rule_sets(summary: Summary) -> list[Table]:
    """Success of each model and mode under our rules and both public ones, where measured."""
    shown = [(model, mode, p["rules"]) for model, mode, p in parts(summary) if p.get("rules")]
    reward = [rules["upstream_reward"] for *_, rules in shown]
    evaluation = [rules["upstream_eval"] for *_, rules in shown]
    columns = {
        **{
            label: [measure_cell(rules[name]["success"]) for *_, rules in shown]
            for name, label in words.RULES.items()
        },
        "public evaluation, unbalanced": [
            Cell(words.percent(r["macro_upstream"])) for r in evaluation
        ],
        "otherwise than the reward": [Cell(str(rules["otherwise"])) for rules in reward],
        "otherwise than the evaluation": [Cell(str(rules["otherwise"])) for rules in evaluation],
    }
    note = (
        "Success, level-balanced, of the same answers. The public reward reads the first answer "
        "block, the public evaluation the last or else the whole response, and takes a step off a "
        "lake for a failure; 'unbalanced' is the average that public results quote. Otherwise: "
        "answers that succeed under our rules or the public ones, and not under both."
    )
    return [_by_mode("Under three sets of rules", shown, columns, note)] if shown else []


def diagnostics(summary: Summary) -> Table:
    """Where a model fails: reading the state or planning over it."""
    found = summary["diagnostics"]
    names = {
        "State F1": "state_f1",
        "state exact": "state_exact",
        "says two things": "contradicted",
        "Plan on GT": "plan_on_gt",
        "E2E": "e2e",
        "plan given own state": "plan_given_own_state",
    }
    # Summaries of older versions lack some.
    columns = {
        label: [_counted(part.get(key)) for part in found.values()] for label, key in names.items()
    }
    note = (
        "State F1: the state facts that a response to the picture states, in whatever way of "
        "writing, against the true ones. Says two things: a fact is stated in two ways, of which "
        "the last counts. "
        "Plan on GT: success when the true state is given as text. E2E: success from the picture. "
        "Plan given own state: success on the board that the response itself describes."
    )
    labels = [(words.model_label(model),) for model in found]
    return make_table("Reading the state, and planning over it", ("model",), labels, columns, note)


def facts_by_kind(summary: Summary) -> list[Table]:
    """State F1 by kind of fact, from pictures; of the last model also from others and from text."""
    shown = list(parts(summary, "picture"))
    trained = [model for model, *_ in shown if model in MODELS] or [model for model, *_ in shown]
    last = trained[-1] if trained else ""
    shown += [part for part in parts(summary, "blind", "text") if part[0] == last]
    found = {
        (model, mode): {
            (task, kind): measure
            for task, measured in part["tasks"].items()
            for kind, measure in measured.get("state_f1_by_kind", {}).items()  # not in older ones
        }
        for model, mode, part in shown
    }
    known = [(task, kind) for task, kinds in words.FACTS.items() for kind in kinds]
    measured = dict.fromkeys(of for by_kind in found.values() for of in by_kind)
    rows = [of for of in known if of in measured] + [of for of in measured if of not in known]
    columns = {
        model if mode == "picture" else f"{model}, {words.MODES[mode]}": [
            _counted(by_kind.get(of)) for of in rows
        ]
        for (model, mode), by_kind in found.items()
    }
    labels = [(words.TASKS[task], words.FACTS[task].get(kind, kind)) for task, kind in rows]
    note = (
        "F1 of the facts of one kind that a response states against the true ones, the mean over "
        "boards where there are such facts or are said to be. A wrong picture shows what guessing "
        "reaches, text what the model states of a board that it is told."
    )
    title, head = "State F1 by kind of fact", ("task", "facts")
    return [make_table(title, head, labels, columns, note)] if rows else []


def perception(summary: Summary, task: str) -> Table:
    """Share of right answers to each question about the picture, by model."""
    asked = {
        model: part["tasks"][task]
        for model, _, part in parts(summary, "perception")
        if task in part["tasks"]
    }
    names = dict.fromkeys(name for part in asked.values() for name in part["questions"])
    columns = {}
    for model, part in asked.items():
        measures = [*map(part["questions"].get, names), part["all_right"], part.get("strict")]
        columns[model] = list(map(_counted, measures))
    questions = [*(name.replace("_", " ") for name in names), "all of them", "in the asked form"]
    labels = [(question,) for question in questions]
    note = "An answer is right whatever its form; the last row is the share that has the asked one."
    return make_table(words.TASKS[task], ("question",), labels, columns, note)


def comparisons(summary: Summary) -> Table:
    """Paired differences between models, the gap to text input and how much of it is closed."""
    differences = [
        (" − ".join(map(words.model_label, name.split(" - "))) + ", picture", measure)
        for name, measure in summary["differences"].items()
    ]
    differences += [
        (f"{words.model_label(name)}: text − picture", measure)
        for name, measure in summary["modality_gap"].items()
    ]
    closed = summary["gap_closed_by"]
    labels = [(label,) for label, _ in differences]
    labels += [(f"base model's gap closed by {words.model_label(name)}",) for name in closed]
    points = [points_cell(measure) for _, measure in differences]
    points += [Cell(words.percent(m and m["value"]), words.interval(m)) for m in closed.values()]
    boards = [count_cell(measure) for _, measure in differences]
    columns = {"points": points, "boards": boards + list(map(count_cell, closed.values()))}
    note = (
        "In points of the level-balanced success, with 95 % intervals; the two sides are paired "
        "board by board. "
        "Gap closed: (model from picture − base from picture) / (base from text − base from "
        "picture)."
    )
    return make_table("Differences on the same boards", ("compared",), labels, columns, note)


def gaps(summary: Summary) -> list[Table]:
    """Text minus picture by model and task, of the models that were asked in both ways."""
    found = [
        (words.model_label(model), words.TASKS[task], measure)
        for model, by_task in summary.get("modality_gap_by_task", {}).items()
        for task, measure in by_task.items()
    ]
    columns = {
        "points": [points_cell(measure) for *_, measure in found],
        "boards": [count_cell(measure) for *_, measure in found],
    }
    note = "Paired board by board, with 95 % intervals."
    title, labels = "Text minus picture, by task", [names for *names, _ in found]
    return [make_table(title, ("model", "task"), labels, columns, note)] if found else []
