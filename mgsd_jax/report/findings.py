"""What speaks against the headline: tasks and questions at which the last model became worse."""

import collections
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

from mgsd_jax.evaluation import stats
from mgsd_jax.evaluation.measures import Measure, by_board, group, measure, succeeds
from mgsd_jax.evaluation.rows import BoardKey, Row, is_perception, plans
from mgsd_jax.evaluation.summary import MODELS
from mgsd_jax.report.tables import Cell, Table, make_table, points_cell
from mgsd_jax.report.words import MODES, TASKS, model_label, percent, signed

Values = Mapping[BoardKey, float]  # how right a model is about each board
_NAMED = 3  # falls that the verdict names


class Fall(NamedTuple):
    """A thing that the last model does worse than an earlier one on the same boards."""

    what: str
    last: str
    earlier: str
    after: float
    before: float
    difference: Measure  # after - before; its interval lies below 0


def falls(rows: Sequence[Row]) -> list[Fall]:
    """Return what the last of MODELS does worse than one before it, the largest fall first.

    Looked at: planning by task, from pictures and from text, and every question about the picture.
    Each is held against the earlier model that does it best, and counts where the paired 95 %
    interval lies below 0.
    """
    by_model = group(rows, lambda row: row["model"])
    known = [name for name in MODELS if name in by_model]
    things: dict[str, dict[str, Values]] = collections.defaultdict(dict)
    for name in known:
        for what, values in _things(by_model[name]):
            things[what][name] = values
    found = []
    for what, values in things.items():
        ours = values.pop(known[-1], {})
        compared = [_compare(what, known[-1], ours, name, them) for name, them in values.items()]
        fall = max(filter(None, compared), key=lambda fall: fall.before, default=None)
        if fall is not None and fall.difference["high"] < 0:
            found.append(fall)
    return sorted(found, key=lambda fall: fall.difference["value"])


def _things(rows: Sequence[Row]) -> Iterator[tuple[str, Values]]:
    """What a model was asked to do, in words, with how right it is board by board."""
    for mode in ("picture", "text"):
        for task, some in group(plans(rows, mode), lambda row: row["task"]).items():
            means = {
                board: statistics.fmean(map(succeeds, answers))
                for board, answers in by_board(some).items()
            }
            yield f"planning {TASKS[task]} from the {MODES[mode]}", means
    asked: dict[str, dict[BoardKey, list[bool]]] = {}
    for board, answers in by_board([row for row in rows if is_perception(row)]).items():
        for row in answers:
            for name, is_right in row["perception"].items():
                what = f"{TASKS[board[0]]}'s question “{name.replace('_', ' ')}”"
                asked.setdefault(what, {}).setdefault(board, []).append(is_right)
    for what, found in asked.items():
        yield what, {board: statistics.fmean(rights) for board, rights in found.items()}


def _compare(what: str, last: str, ours: Values, earlier: str, theirs: Values) -> Fall | None:
    shared = sorted(ours.keys() & theirs.keys())
    if not shared:
        return None
    sides: list[dict[str, dict[int, list[float]]]] = []
    for values in (ours, theirs):
        sides.append({shared[0][0]: {}})
        for task, level, index in shared:
            sides[-1][task].setdefault(level, []).append(values[task, level, index])
    after, before = (stats.macro_mean(side).value for side in sides)
    return Fall(what, last, earlier, after, before, measure(stats.paired_difference(*sides)))


def sentence(found: Sequence[Fall], *, were_asked: bool) -> str:
    """Return what became worse, in words; `were_asked`: the models were asked questions too."""
    if not found:
        things = "No task and no question" if were_asked else "No task"
        return f"{things} became clearly worse."
    named = [
        f"{fall.what} at {percent(fall.after)}, where {model_label(fall.earlier)} reaches "
        f"{percent(fall.before)} (paired {signed(fall.difference)})"
        for fall in found[:_NAMED]
    ]
    more = f"; and {len(found) - _NAMED} more, listed below" if len(found) > _NAMED else ""
    return f"What became worse: {'; '.join(named)}{more}."


def table(found: Sequence[Fall]) -> Table:
    """Return every fall with its interval."""
    columns = {
        "before": [Cell(percent(fall.before), model_label(fall.earlier)) for fall in found],
        "after": [Cell(percent(fall.after), model_label(fall.last)) for fall in found],
        "points": [points_cell(fall.difference) for fall in found],
    }
    note = (
        "Tasks and questions whose paired 95 % interval lies below 0, against the earlier model "
        "that does them best. Some would be found by chance: nothing is adjusted for their number."
    )
    labels = [(fall.what,) for fall in found]
    return make_table("Tasks and questions", ("asked for",), labels, columns, note)
