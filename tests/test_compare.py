"""The comparison of runs: paired by content, counted right, drawn whole; refusals are clear."""

import json
import pathlib
import re
import shutil
from typing import Any

import numpy as np
import pytest
from test_report import LETTERS, LEVELS, Tags

from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import rows, scoring
from mgsd_jax.evaluation.summary import error_of, summarize
from mgsd_jax.report import compare, compare_page
from mgsd_jax.stages import report
from mgsd_jax.workdir import metrics

ROOT = pathlib.Path(__file__).parents[1]
BOARDS = 8  # a task and level


def make_boards() -> list[Board]:
    rng = np.random.default_rng(0)
    return [
        Board(task, level, i, ENVS[task].generate(rng, level), None)
        for task, levels in LEVELS.items()
        for level in levels
        for i in range(BOARDS)
    ]


ALL = make_boards()


def answer(board: Board, solved: bool) -> str:
    plan = ENVS[board.task].shortest_plan(board.state)
    plan = plan if solved else plan[:-1]
    return f"<answer>{' '.join(LETTERS[action] for action in plan)}</answer>"


def write_run(
    folder: pathlib.Path, solved: dict[str, int], *, shift: int = 0, lr: float = 0.1
) -> pathlib.Path:
    """A workdir where each model solves the first so many boards of each level, and curves.

    `shift` renames the boards: index i is another board, as in an evaluation in another order.
    """
    boards = [board._replace(index=(board.index + shift) % BOARDS) for board in ALL]
    cases = [str(i) for i in range(len(boards))]
    evaluation = folder / "evaluate"
    evaluation.mkdir(parents=True)
    rows.write_boards(evaluation, boards, cases)
    found = []
    for model, count in solved.items():
        for board, original in zip(boards, ALL, strict=True):
            response = answer(board, original.index < count)
            given = scoring.Answer(response, False, 3)
            found.append(scoring.score_row(board, "picture", given, model=model))
    rows.append(evaluation, found)
    summary = summarize(rows.read_rows(evaluation))
    (evaluation / "summary.json").write_text(json.dumps(summary))
    with metrics.open_writer(folder / "distillation") as writer:
        for step in range(1, 21):
            kl = {"kl/state": 2.0 if step <= 18 else lr, "kl_pos/0-3": 1.0, "kl_pos/256-": 0.0}
            writer.write(step, {"loss": 1 / step, "agree/plan": 0.5, **kl})
    config = {"distillation": {"optim": {"lr": lr}, "steps": 20, "student": str(folder)}}
    (folder / "distillation" / "config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    root = tmp_path_factory.mktemp("runs")
    return [
        str(write_run(root / "weak", {"base": 1, "distilled": 3})),
        str(write_run(root / "strong", {"base": 1, "distilled": 7}, shift=3, lr=0.2)),
    ]


@pytest.fixture(scope="module")
def comparison(runs: list[str]) -> compare.Comparison:
    return compare.compare(runs)


def test_boards_are_paired_by_what_they_are_and_not_by_their_number(
    comparison: compare.Comparison,
) -> None:
    """The second run numbers them otherwise: paired by number the interval would be wide."""
    ((later, earlier, whole, parts),) = compare.pair_differences(comparison)
    assert (later, earlier) == ("strong", "weak") and whole is not None
    assert whole["n"] == len(ALL) and whole["value"] == pytest.approx(4 / 8)
    assert set(parts) == set(LEVELS)
    texts: dict[tuple[Any, ...], set[str]] = {}
    for row in comparison.rows:
        env = ENVS[row["task"]]
        key = env.key(env.from_text(row["task_text"], source="row"))
        texts.setdefault((row["task"], row["level"], row["index"]), set()).add(key)
    assert all(len(keys) == 1 for keys in texts.values()) and len(texts) == len(ALL)
    # What the weak run solves the strong one solves: the pairs never go the other way.
    solved = {
        name: {
            (r["task"], r["level"], r["index"])
            for r in rows.plans(comparison.rows, "picture")
            if r["model"] == name and r["outcome"]["success"]
        }
        for name in comparison.results
    }
    assert solved["weak"] < solved["strong"]


def test_models_are_told_apart_and_a_base_that_answered_alike_is_one(
    runs: list[str], tmp_path: pathlib.Path, comparison: compare.Comparison
) -> None:
    assert set(comparison.summary["models"]) == {"base", "weak", "strong"}
    other = write_run(tmp_path / "other", {"base": 2, "grounded": 3, "distilled": 4})
    found = compare.compare([runs[0], str(other)])
    assert set(found.summary["models"]) == {
        *("weak", "weak: base", "other", "other: base", "other: grounded"),
    }
    grounded = compare.compare([str(other), runs[0] + "/evaluate"], "base")
    assert grounded.results == ("other", "weak")
    assert grounded.summary["models"]["other"]["picture"]["macro"]["value"] == pytest.approx(2 / 8)


def test_the_page_says_it_all_and_loads_nothing(runs: list[str], tmp_path: pathlib.Path) -> None:
    path = compare_page.build_comparison(runs, tmp_path / "comparison.html")
    text = path.read_text(encoding="utf-8")
    assert len(text) < 1_000_000
    tags = Tags(text)
    assert tags.stack == [] and not tags.of("link") and not tags.of("img")
    assert not re.findall(r"https?://|@import|url\(", text)
    ids = {attrs["id"] for _, attrs in tags.tags if "id" in attrs}
    assert {str(attrs["href"])[1:] for attrs in tags.of("a") + tags.of("use")} <= ids
    assert "strong &gt; weak" in text
    markdown = path.with_suffix(".md").read_text()
    assert "| strong | picture | 87.5 %" in markdown and "| strong − weak | +50.0 (" in markdown
    assert "p < 0.001" in markdown
    assert "| distillation.optim.lr | 0.1 | 0.2 |" in markdown
    assert "distillation.steps" not in markdown and "distillation.student" not in markdown
    record = json.loads(path.with_suffix(".json").read_text())
    ends = record["runs"]["strong"]["ends"]
    assert ends["kl"] == {"state": pytest.approx(0.2)}, "the mean of the last tenth"
    assert ends["kl_pos"] == {"0-3": 1.0}, "no response reaches position 256"
    assert (
        compare_page.build_comparison(runs, tmp_path / "b.html").read_bytes() == path.read_bytes()
    )


def contents(comparison: compare.Comparison) -> str:
    """All that is on the page below its head."""
    sections = compare_page.make_sections(comparison)
    return "".join(html for section in sections for html in section.content)


def test_boards_in_dispute_are_solved_by_one_and_not_by_the_other(
    comparison: compare.Comparison,
) -> None:
    chosen = compare.disputed(comparison, a_task=2)
    assert [board[0] for board, _ in chosen] == [
        task for task in ("frozenlake", "maze", "minibehaviour") for _ in range(2)
    ]
    for _, answers in chosen:
        assert not answers["weak"]["outcome"]["success"] and answers["strong"]["outcome"]["success"]
        assert all(row["plan"] for row in answers.values())
    page = contents(comparison)
    drawn = len(compare.disputed(comparison))
    assert page.count('class="route good"') == page.count('class="route bad"') == drawn > 6


def test_a_board_that_stands_twice_in_a_benchmark_stays_one_under_its_new_number(
    tmp_path: pathlib.Path,
) -> None:
    """`same_as` of a row is an index: it has to follow the boards where they are renumbered."""
    twice = [ALL[0], ALL[1], ALL[0]._replace(index=2)]
    folders = []
    for name, order in (("a", (0, 1, 2)), ("b", (1, 2, 0))):
        folder = tmp_path / name / "evaluate"
        folder.mkdir(parents=True)
        boards = [board._replace(index=order[board.index]) for board in twice]
        rows.write_boards(folder, boards, ["0", "1", "2"])
        scored = [
            scoring.score_row(
                board, "picture", scoring.Answer(answer(board, True), False, 3), model="distilled"
            )
            for board in boards
        ]
        rows.append(folder, scored)
        (folder / "summary.json").write_text(json.dumps(summarize(rows.read_rows(folder))))
        folders.append(str(tmp_path / name))
    comparison = compare.compare(folders)
    same = {(row["model"], row["index"]): row.get("same_as") for row in comparison.rows}
    assert same == {(name, index): index % 2 for name in "ab" for index in (0, 1, 2)}
    ((_, _, whole, _),) = compare.pair_differences(comparison)
    assert whole is not None and whole["n"] == 2


def test_failures_are_counted_whole(comparison: compare.Comparison) -> None:
    found = compare.frequent_failures(comparison, count=1000)
    for name in comparison.results:
        failed = [
            row
            for row in rows.plans(comparison.rows, "picture")
            if row["model"] == name and error_of(row) not in ("success", "not_optimal")
        ]
        assert sum(counts[name] for counts in found.values()) == len(failed)
    totals = [counts.total() for counts in found.values()]
    assert totals == sorted(totals, reverse=True)
    assert compare.frequent_failures(comparison, count=1) == dict(list(found.items())[:1])


def test_runs_without_a_board_in_common_are_not_compared(
    runs: list[str], tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = np.random.default_rng(1)
    others = [
        board._replace(state=ENVS["minibehaviour"].generate(rng, 5))
        for board in ALL
        if board.task == "minibehaviour"
    ]
    monkeypatch.setitem(globals(), "ALL", others)
    other = write_run(tmp_path / "other", {"distilled": 2})
    found = compare.compare([runs[0], str(other)])
    ((_, _, whole, parts),) = compare.pair_differences(found)
    assert whole is not None and whole["value"] is None and whole["n"] == 0
    assert parts["minibehaviour"] == whole
    assert "no board in common" in contents(found)
    assert "weak ? other" in compare_page.headline(found)


def make_config(*assignments: str) -> Config:
    return load_config(str(ROOT / "configs" / "nano.py"), list(assignments))


def test_the_report_compares_the_runs_that_it_is_given(
    runs: list[str], tmp_path: pathlib.Path
) -> None:
    report.run(make_config(f"report.runs={','.join(runs)}"), str(tmp_path))
    assert (tmp_path / "report" / "comparison.html").is_file()
    with pytest.raises(ValueError, match=r"got models \['base', 'distilled'\], want 'grounded'"):
        report.run(
            make_config(f"report.runs={','.join(runs)}", "report.model=grounded"), str(tmp_path)
        )


def test_what_cannot_be_compared_is_said(runs: list[str], tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"absent: no results found, want a workdir with"):
        compare.compare([runs[0], str(tmp_path / "absent")])
    with pytest.raises(ValueError, match=r"report.runs: got .* want different folders"):
        compare.compare([runs[0], runs[0] + "/../weak"])
    half = tmp_path / "half"
    shutil.copytree(runs[0], half)
    (half / "evaluate" / "summary.json").unlink()
    with pytest.raises(ValueError, match=r"summary.json: not found.*to its end"):
        compare.compare([runs[0], str(half)])
    text = (half / "evaluate" / "rows.jsonl").read_text()
    (half / "evaluate" / "rows.jsonl").write_text(text.replace('{"model"', '{"model', 1))
    with pytest.raises(ValueError, match=r"rows.jsonl, line 1: got .*want JSON"):
        compare.compare([runs[0], str(half)])


def test_names_are_as_short_as_they_can_be(tmp_path: pathlib.Path) -> None:
    for name in ("a/x", "b/x", "c/y", "distilled"):
        (tmp_path / name).mkdir(parents=True)
    folder = str(tmp_path)
    assert compare.run_names([f"{folder}/a/x", f"{folder}/c/y"]) == ["x", "y"]
    assert compare.run_names([f"{folder}/a/x", f"{folder}/b/x"]) == ["a/x", "b/x"]
    (name,) = compare.run_names([f"{folder}/distilled"])
    assert name.endswith("/distilled"), "a run is not mistaken for the model"
