"""The tables of a report, made once and written as HTML and as markdown."""

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from typing import Any

from mgsd_jax.evaluation.summary import Measure
from mgsd_jax.report.words import (
    DASH,
    ERRORS,
    MODES,
    REASONS,
    RULES,
    TASKS,
    interval,
    model_label,
    p_value,
    percent,
    points,
    signed,
)

_PLANNING = ("picture", "text", "blind")


@dataclasses.dataclass(frozen=True)
class Cell:
    """A number, its interval below it, and the share that its data bar shows."""

    text: str
    detail: str = ""
    share: float | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    """A titled table; the first `labels` columns of `head` name the row, `rows` start with them."""

    title: str
    head: tuple[Cell, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""
    labels: int = 1


def overall(summary: Mapping[str, Any]) -> Table:
    """Success, and what lies behind it, of each model and mode over all tasks."""
    rows = []
    for model, mode, part in _parts(summary):
        lengths = part["response_tokens"]
        rows.append(
            (
                *_names(model, mode),
                measure_cell(part["macro"]),
                Cell(percent(part["macro_upstream"])),
                *(measure_cell(part[name]) for name in ("optimal", "parsed", "legal", "progress")),
                measure_cell(part["truncated"]),
                _lengths(lengths),
                Cell(str(part["n"])),
            )
        )
    head = ("model", "reads", "success", "success, unbalanced", "shortest", "parsed", "legal")
    return Table(
        "All tasks",
        _head(*head, "progress", "truncated", "tokens", "n"),
        tuple(rows),
        "Success is the mean over tasks of the mean over levels; 'unbalanced' is the mean over "
        "tasks of all their boards, as the public scorer has it. Progress is the share of the "
        "shortest way that was covered. Wrong picture: asked with the picture of another board of "
        "the same task and level, which measures guessing. Intervals: 95 %.",
        labels=2,
    )


def by_level(summary: Mapping[str, Any], task: str) -> Table:
    """Success of each model and mode on each level of one task."""
    parts = [(m, mode, p["tasks"][task]) for m, mode, p in _parts(summary) if task in p["tasks"]]
    levels = sorted({int(level) for _, _, part in parts for level in part["levels"]})
    names = [_names(model, mode) for model, mode, _ in parts]
    columns = [
        ("success", [part["success"] for _, _, part in parts]),
        ("shortest", [part["optimal"] for _, _, part in parts]),
    ]
    for level in levels:
        found = [part["levels"].get(str(level)) for _, _, part in parts]
        columns.append((f"level {level}", [part and part["success"] for part in found]))
    return _measured(TASKS[task], ("model", "reads"), names, columns, "Wilson 95 % intervals.")


def diagnostics(summary: Mapping[str, Any]) -> Table:
    """Where a model fails: reading the state or planning over it."""
    parts = summary["diagnostics"]
    return _measured(
        "Reading the state, and planning over it",
        ("model",),
        [(Cell(model_label(model)),) for model in parts],
        [
            (label, [part.get(name) for part in parts.values()])  # an older one has not all
            for name, label in (
                ("state_f1", "State F1"),
                ("state_exact", "state exact"),
                ("contradicted", "says two things"),
                ("plan_on_gt", "Plan on GT"),
                ("e2e", "E2E"),
                ("plan_given_own_state", "plan given own state"),
            )
        ],
        "State F1: the state facts that a response to the picture states, in whatever way of "
        "writing, against the true ones. Says two things: a fact is stated in two ways, of which "
        "the last counts. "
        "Plan on GT: success when the true state is given as text. E2E: success from the picture. "
        "Plan given own state: success on the board that the response itself describes.",
    )


def comparisons(summary: Mapping[str, Any]) -> Table:
    """Paired differences between models, the gap to text input and how much of it is closed."""
    rows = []
    for name, measure in summary["differences"].items():
        label = " − ".join(model_label(part) for part in name.split(" - "))
        rows.append((Cell(f"{label}, picture"), *_points(measure)))
    for name, measure in summary["modality_gap"].items():
        rows.append((Cell(f"{model_label(name)}: text − picture"), *_points(measure)))
    for name, measure in summary["gap_closed_by"].items():
        label = Cell(f"base model's gap closed by {model_label(name)}")
        value = Cell(DASH if measure is None else percent(measure["value"]), interval(measure))
        rows.append((label, value, Cell(_count(measure))))
    return Table(
        "Differences on the same boards",
        _head("compared", "points", "boards"),
        tuple(rows),
        "In points of the level-balanced success, with 95 % intervals; the two sides are paired "
        "board by board. "
        "Gap closed: (model from picture − base from picture) / (base from text − base from "
        "picture).",
    )


def errors(summary: Mapping[str, Any]) -> Table:
    """How the answers of each model and mode ended; every row adds up to its n."""
    rows = []
    for model, mode, part in _parts(summary):
        counts = error_counts(part)
        cells = [
            Cell(str(counts[name]), percent(counts[name] / part["n"]), counts[name] / part["n"])
            for name in ERRORS
        ]
        rows.append((*_names(model, mode), *cells, Cell(str(part["n"]))))
    return Table(
        "How answers end",
        _head("model", "reads", *ERRORS.values(), "n"),
        tuple(rows),
        "Each answer counts once, under the first that holds: solved, request failed, cut off, no "
        "readable plan, state read wrong. The rest have the state right, or none was measured, and "
        "fail by their plan.",
        labels=2,
    )


def error_counts(part: Mapping[str, Any]) -> dict[str, int]:
    """The counts of `errors` by every name; what a summary of an older version lacks is 0."""
    return {name: part["errors"].get(name, 0) for name in ERRORS}


def rule_sets(summary: Mapping[str, Any]) -> Table | None:
    """Success of each model and mode under our rules and both public ones; None without them."""
    parts = [
        (model, mode, part["rules"]) for model, mode, part in _parts(summary) if "rules" in part
    ]
    if not parts:
        return None
    rows = []
    for model, mode, rules in parts:
        cells = [measure_cell(rules[name]["success"]) for name in RULES]
        cells += [Cell(percent(rules["upstream_eval"]["macro_upstream"]))]
        cells += [Cell(str(rules[name]["otherwise"])) for name in RULES if name != "standard"]
        rows.append((*_names(model, mode), *cells))
    return Table(
        "Under three sets of rules",
        _head(
            *("model", "reads", *RULES.values(), "public evaluation, unbalanced"),
            *("otherwise than the reward", "otherwise than the evaluation"),
        ),
        tuple(rows),
        "Success, level-balanced, of the same answers. The public reward reads the first answer "
        "block, the public evaluation the last or else the whole response, and takes a step off a "
        "lake for a failure; 'unbalanced' is the average that public results quote. Otherwise: "
        "answers that succeed under our rules or the public ones, and not under both.",
        labels=2,
    )


def passes(summary: Mapping[str, Any]) -> Table | None:
    """pass@k of each model and mode; None where every board was answered once."""
    parts = [(m, mode, p["pass_at_k"]) for m, mode, p in _parts(summary) if p.get("pass_at_k")]
    if not parts:
        return None
    numbers = sorted({int(k) for _, _, measures in parts for k in measures})
    return _measured(
        "Several tries",
        ("model", "reads"),
        [_names(model, mode) for model, mode, _ in parts],
        [(f"pass@{k}", [measures.get(str(k)) for _, _, measures in parts]) for k in numbers],
        "The chance that one of k sampled answers solves the board (unbiased estimator), "
        "level-balanced.",
    )


def gaps(summary: Mapping[str, Any]) -> Table | None:
    """Text minus picture by model and task; None where no model was asked in both ways."""
    rows = []
    for model, by_task in summary.get("modality_gap_by_task", {}).items():
        for task, measure in by_task.items():
            rows.append((Cell(model_label(model)), Cell(TASKS[task]), *_points(measure)))
    note = "Paired board by board, with 95 % intervals."
    head = _head("model", "task", "points", "boards")
    return Table("Text minus picture, by task", head, tuple(rows), note, 2) if rows else None


def reasons(summary: Mapping[str, Any]) -> Table:
    """Why the simulator stopped, by model and mode."""
    parts = list(_parts(summary))
    found = {reason for _, _, part in parts for reason in part["reasons"]}
    names = [name for name in REASONS if name in found] + sorted(found - REASONS.keys())
    rows = []
    for model, mode, part in parts:
        counts = [part["reasons"].get(name, 0) for name in names]
        cells = [Cell(str(count), "", count / part["n"]) for count in counts]
        rows.append((*_names(model, mode), *cells))
    head = _head("model", "reads", *(reason_label(name) for name in names))
    return Table("What the simulator said", head, tuple(rows), labels=2)


def perception(summary: Mapping[str, Any], task: str) -> Table:
    """Share of right answers to each question about the picture, by model."""
    parts = {
        model: modes["perception"]["tasks"][task]
        for model, modes in summary["models"].items()
        if "perception" in modes and task in modes["perception"]["tasks"]
    }
    names = dict.fromkeys(name for part in parts.values() for name in part["questions"])
    columns = []
    for model, part in parts.items():
        asked = part["questions"]
        found = [asked.get(name) for name in names]
        columns.append((model_label(model), [*found, part["all_right"], part.get("strict")]))
    rows = (*names, "all of them", "in the asked form")
    labels = [(Cell(name.replace("_", " ")),) for name in rows]
    note = "An answer is right whatever its form; the last row is the share that has the asked one."
    return _measured(TASKS[task], ("question",), labels, columns, note)


def reason_label(reason: str) -> str:
    """Return a reason of `Outcome` in words."""
    return REASONS[reason] if reason in REASONS else reason.replace("_", " ")


def to_html(table: Table) -> str:
    """Return the table as HTML that scrolls sideways on its own where the screen is narrow."""
    labels = table.labels
    head = "".join(
        f'<th scope="col"{" class=left" if i < labels else ""}>{_html_text(cell)}</th>'
        for i, cell in enumerate(table.head)
    )
    body, last = [], ""
    for row in table.rows:
        name = row[0].text
        group = ' class="group"' if labels > 1 and last not in ("", name) else ""
        cells = "".join(_html_cell(cell, i < labels) for i, cell in enumerate(row))
        body.append(f"<tr{group}>{cells}</tr>")
        last = name
    note = f'<p class="note">{escape(table.note)}</p>' if table.note else ""
    title = escape(table.title)
    return (
        f'<div class="table"><h3>{title}</h3><div class="scroll" role="region" tabindex="0" '
        f'aria-label="Table: {title}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(body)}</tbody></table></div></div>{note}"
    )


def to_markdown(table: Table) -> str:
    """Return the table as GitHub markdown."""
    lines = [f"### {table.title}", "", _line(map(_plain, table.head))]
    lines.append(_line(["---"] * table.labels + ["---:"] * (len(table.head) - table.labels)))
    for row in table.rows:
        lines.append(_line(map(_plain, row)))
    return "\n".join([*lines, "", *([table.note, ""] if table.note else [])])


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _plain(cell: Cell) -> str:
    return f"{cell.text} ({cell.detail})" if cell.detail else cell.text


def _html_text(cell: Cell) -> str:
    return escape(cell.text) + (f"<small>{escape(cell.detail)}</small>" if cell.detail else "")


def _html_cell(cell: Cell, is_label: bool) -> str:
    text = _html_text(cell)
    if is_label:
        return f'<th scope="row">{text}</th>'
    if cell.share is None:
        return f"<td>{text}</td>"
    return f'<td class="bar" style="--share:{100 * cell.share:.1f}%">{text}</td>'


def _parts(summary: Mapping[str, Any]) -> Iterable[tuple[str, str, Mapping[str, Any]]]:
    for model, modes in summary["models"].items():
        for mode in _PLANNING:
            if mode in modes:
                yield model, mode, modes[mode]


def _names(model: str, mode: str) -> tuple[Cell, Cell]:
    return Cell(model_label(model)), Cell(MODES[mode])


def _head(*words: str) -> tuple[Cell, ...]:
    return tuple(Cell(text) for text in words)


def _measured(
    title: str,
    head: Sequence[str],
    labels: Sequence[tuple[Cell, ...]],
    columns: Sequence[tuple[str, Sequence[Measure | None]]],
    note: str,
) -> Table:
    """A table of measures by column; an n that a whole column shares stands in its head."""
    heads, cells = list(_head(*head)), []
    for name, measures in columns:
        counts = {m["n"] for m in measures if m is not None and m["value"] is not None}
        shared = len(counts) == 1
        heads.append(Cell(name, f"n {counts.pop()}" if shared else ""))
        cells.append([measure_cell(measure, count=not shared) for measure in measures])
    rows = [(*label, *row) for label, row in zip(labels, zip(*cells, strict=True), strict=True)]
    return Table(title, tuple(heads), tuple(rows), note, labels=len(head))


def measure_cell(measure: Measure | None, *, count: bool = False) -> Cell:
    """Return a share with its interval, and its n if `count`; a dash where it was not measured."""
    if measure is None or measure["value"] is None:
        return Cell(DASH)
    detail = interval(measure) + (f", n {measure['n']}" if count else "")
    return Cell(percent(measure["value"]), detail, min(1.0, max(0.0, measure["value"])))


def _points(measure: Measure | None) -> tuple[Cell, Cell]:
    if measure is None or measure["value"] is None:
        return Cell(DASH, "not measured"), Cell(_count(measure))
    detail = signed(measure) + (f", {p_value(measure)}" if "p_value" in measure else "")
    return Cell(points(measure["value"]), detail), Cell(_count(measure))


def _lengths(lengths: Mapping[str, float | None]) -> Cell:
    mean, median = lengths["mean"], lengths["median"]
    if mean is None or median is None:  # an endpoint that does not count its tokens
        return Cell(DASH)
    return Cell(f"{mean:.0f}", f"median {median:.0f}")


def _count(measure: Measure | None) -> str:
    return DASH if measure is None else str(measure["n"])
