"""Rows on disk: cut anywhere and resumed, no row is lost and none counts twice."""

import contextlib
import dataclasses
import json
import pathlib
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data import benchmarks
from mgsd_jax.data.boards import Board, case_name
from mgsd_jax.envs import ENVS, base
from mgsd_jax.evaluation import measures, rows, scoring, summary
from mgsd_jax.stages import evaluate
from mgsd_jax.workdir import folders

ROOT = pathlib.Path(__file__).parents[1]
BOARDS = [
    Board("maze", 3, i, ENVS["maze"].generate(np.random.default_rng(i), 3), None) for i in range(2)
]
CASES = [case_name(board) for board in BOARDS]
Batches = Iterator[list[tuple[int, scoring.Answer]]]


def make_config(**changes: Any) -> Config:
    config = load_config(str(ROOT / "configs" / "nano.py"), [])
    settings = dataclasses.replace(
        config.evaluate,
        models=(("base", "there"), ("other", "there")),
        modes=("picture", "perception"),
        batch_size=1,
    )
    return dataclasses.replace(config, evaluate=dataclasses.replace(settings, **changes))


class Model:
    """Answers as a function of board, mode and try; remembers what it was asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, batch: int = 1) -> None:
        self.asked: list[tuple[str, int, int]] = []
        self.failing = False
        self.batch = batch
        monkeypatch.setattr(evaluate, "_test_boards", lambda *_: (BOARDS, CASES))
        monkeypatch.setattr(evaluate, "_local_asker", lambda *_: self.ask)

    def ask(self, job: evaluate.Job) -> Batches:
        for start in range(0, len(job.places), self.batch):
            yield [(i, self.answer(job, i)) for i in job.places[start : start + self.batch]]

    def answer(self, job: evaluate.Job, place: int) -> scoring.Answer:
        self.asked.append((job.mode, job.attempt, place))
        return scoring.Answer(f"→ {place}", False, 1, "timeout" if self.failing else None)


def make_row(board: Board) -> dict[str, Any]:
    """The row of an answer without a word."""
    return scoring.score_row(board, "picture", scoring.Answer("", False, 1), model="base")


def lines(folder: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]


def test_boards_are_written_once_and_rows_are_small(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model(monkeypatch)
    evaluate.run(make_config(), str(tmp_path))
    folder = tmp_path / "evaluate"
    found = lines(folder)
    assert len(found) == 2 * 2 * 2 and not any("task_text" in row for row in found)
    boards = [json.loads(line) for line in (folder / "boards.jsonl").read_text().splitlines()]
    assert [board["case"] for board in boards] == ["maze_test_level3_0000", "maze_test_level3_0001"]
    for row in rows.read_rows(folder):
        assert row["task_text"] == rows.board_text(BOARDS[row["index"]])


def test_a_board_file_is_made_once_for_all_answers(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model(monkeypatch)
    made: list[Board] = []
    monkeypatch.setattr(rows, "board_text", lambda board: made.append(board) or "")
    monkeypatch.setattr(evaluate, "_summarize", lambda _: None)
    evaluate.run(make_config(), str(tmp_path))
    assert made == BOARDS and len(lines(tmp_path / "evaluate")) == 4 * len(BOARDS)


def test_cut_at_every_byte_and_resumed_it_is_the_whole_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever a kill leaves of rows.jsonl: whole lines are kept, and only the rest is asked."""
    model = Model(monkeypatch)
    config, folder = make_config(models=(("base", "there"),)), tmp_path / "evaluate"
    # What takes long and does not bear on it.
    monkeypatch.setattr(evaluate, "_summarize", lambda _: None)
    unclaimed = folders.Claim(epath.Path(folder), [])
    folder.mkdir()
    monkeypatch.setattr(folders, "claimed", lambda *_: contextlib.nullcontext(unclaimed))
    monkeypatch.setattr(rows.os, "fsync", lambda _: None)
    text = {board: rows.board_text(board) for board in BOARDS}
    monkeypatch.setattr(rows, "board_text", text.__getitem__)
    evaluate.run(config, str(tmp_path))
    whole = (folder / "rows.jsonl").read_bytes()
    assert len(whole) < 3000 and whole.count(b"\n") == 4
    for cut in range(len(whole) + 1):
        (folder / "rows.jsonl").write_bytes(whole[:cut])
        model.asked.clear()
        evaluate.run(config, str(tmp_path))
        assert (folder / "rows.jsonl").read_bytes() == whole, cut
        assert len(model.asked) == 4 - whole[:cut].count(b"\n"), cut


def test_a_kill_between_batches_loses_nothing(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(monkeypatch)

    def killed_after(folder: pathlib.Path, count: int) -> Any:
        def asker(job: evaluate.Job) -> Batches:
            for batch in Model.ask(model, job):
                if len(lines(folder)) == count:
                    raise KeyboardInterrupt
                yield batch

        return asker

    for survived in range(8):
        workdir = tmp_path / str(survived)
        folder = workdir / "evaluate"
        folder.mkdir(parents=True)
        (folder / "rows.jsonl").touch()
        killed = killed_after(folder, survived)
        monkeypatch.setattr(evaluate, "_local_asker", lambda *_, killed=killed: killed)
        with pytest.raises(KeyboardInterrupt):
            evaluate.run(make_config(), str(workdir))
        assert len(lines(folder)) == survived, "every row is on disk before the next batch"
        monkeypatch.setattr(evaluate, "_local_asker", lambda *_: model.ask)
        model.asked.clear()
        evaluate.run(make_config(), str(workdir))
        assert len(model.asked) == 8 - survived
        keys = [rows.key_of(row) for row in rows.read_rows(folder)]
        assert len(keys) == len(set(keys)) == 8


def test_failed_requests_count_as_failures_and_are_asked_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(monkeypatch)
    config = make_config(models=(("base", "there"),), modes=("picture",))
    model.failing = True
    evaluate.run(config, str(tmp_path))
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    part = summary["models"]["base"]["picture"]
    assert part["n"] == 2 and part["errors"]["request_failed"] == 2
    assert part["macro"] == part["macro"] | {"value": 0.0, "n": 2}
    model.failing = False
    evaluate.run(config, str(tmp_path))
    assert len(model.asked) == 4
    found = lines(tmp_path / "evaluate")
    assert len(found) == 2 and not any("error" in row for row in found)
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert summary["models"]["base"]["picture"]["errors"]["request_failed"] == 0
    evaluate.run(config, str(tmp_path))
    assert len(model.asked) == 4, "nothing is left to ask"


def test_an_evaluation_that_fails_first_leaves_its_folder_to_any_other(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A model that does not load, and an endpoint that never answers, claim nothing."""
    model, folder = Model(monkeypatch), tmp_path / "evaluate"

    def absent(*_: Any) -> Any:
        raise ValueError("there: got no config.json")

    monkeypatch.setattr(evaluate, "_local_asker", absent)
    with pytest.raises(ValueError, match="got no config"):
        evaluate.run(make_config(), str(tmp_path))
    assert not list(folder.iterdir())

    def down(job: evaluate.Job) -> Batches:
        model.failing = True
        yield [(0, model.answer(job, 0))]
        raise ValueError("got failed requests in a row")

    monkeypatch.setattr(evaluate, "_local_asker", lambda *_: down)
    with pytest.raises(ValueError, match="in a row"):
        evaluate.run(make_config(), str(tmp_path))
    assert not list(folder.iterdir())

    model.failing = False
    monkeypatch.setattr(evaluate, "_local_asker", lambda *_: model.ask)
    other = make_config(models=(("base", "elsewhere"),))
    evaluate.run(other, str(tmp_path))
    free = {"batch_size": 7, "endpoint_workers": 3, "endpoint_seconds": 1.0}
    evaluate.run(make_config(models=(("base", "elsewhere"),), **free), str(tmp_path))
    with pytest.raises(ValueError, match=r"got .*; set that back, .*remove .*/evaluate to s"):
        evaluate.run(make_config(), str(tmp_path))


def test_rows_of_another_model_do_not_stand_for_the_one_that_is_there_now(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A corrected model.path, a stage that was trained anew or went on after it was evaluated."""
    model, weights = Model(monkeypatch), tmp_path / "there" / "model.safetensors"
    weights.parent.mkdir()
    weights.write_bytes(b"one")
    config = make_config(models=(("base", str(weights.parent)),))
    evaluate.run(config, str(tmp_path))
    asked, folder = len(model.asked), tmp_path / "evaluate"
    evaluate.run(config, str(tmp_path))
    weights.write_bytes(b"two")
    with pytest.raises(ValueError, match=r"^.*/models\.json: base: got rows of another .*; remove"):
        evaluate.run(config, str(tmp_path))
    assert len(model.asked) == asked and len(lines(folder)) == asked
    (folder / "models.json").unlink()  # as an older version left it
    evaluate.run(config, str(tmp_path))
    shutil.rmtree(folder)
    evaluate.run(config, str(tmp_path))
    assert len(model.asked) == 2 * asked


def test_every_try_is_asked_once_and_under_its_own_number(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(monkeypatch, batch=2)
    evaluate.run(make_config(tries=3, models=(("base", "there"),)), str(tmp_path))
    assert sorted(set(model.asked)) == sorted(model.asked)
    assert len(model.asked) == 2 * 3 * 2
    assert {row["attempt"] for row in lines(tmp_path / "evaluate")} == {0, 1, 2}
    summary = json.loads((tmp_path / "evaluate" / "summary.json").read_text())
    assert list(summary["models"]["base"]["picture"]["pass_at_k"]) == ["1", "2", "3"]


def test_rows_of_an_older_version_are_read(tmp_path: pathlib.Path) -> None:
    """They hold their board's file, and no number of a try."""
    row = make_row(BOARDS[0]) | {"task_text": rows.board_text(BOARDS[0])}
    del row["attempt"]
    (tmp_path / "rows.jsonl").write_text(json.dumps(row) + "\n")
    assert rows.read_rows(tmp_path) == [row | {"attempt": 0}]


def test_a_row_without_a_response_failed_and_is_asked_again(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(monkeypatch)
    config = make_config(models=(("base", "there"),), modes=("picture",))
    evaluate.run(config, str(tmp_path))
    folder = tmp_path / "evaluate"
    first, second = lines(folder)
    text = json.dumps(first | {"response": None}) + "\n" + json.dumps(second) + "\n"
    (folder / "rows.jsonl").write_text(text)
    found = rows.read_rows(folder)
    assert found[0]["response"] == "" and found[0].get("error") == "no response"
    assert summary.summarize(found)["models"]["base"]["picture"]["errors"]["request_failed"] == 1
    model.asked.clear()
    evaluate.run(config, str(tmp_path))
    assert model.asked == [("picture", 0, 0)]
    assert not any("error" in row for row in rows.read_rows(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"models": (("a", "x"), ("b", "y"), ("a", "z"))}, "models: got .*, want 'a' once"),
        ({"models": (("", "x"),)}, "models: got '', want some text"),
        ({"models": ((" ", "x"),)}, "models: got ' ', want some text"),
        ({"models": (("a", "x"), ("a ", "y"))}, "models: got 'a ', want some text"),
        ({"modes": ("text", "picture", "text")}, "modes: got .*, want 'text' once"),
        ({"endpoint_models": ("m", "m")}, "endpoint_models: got .*, want 'm' once"),
        ({"endpoint_models": ("",)}, "endpoint_models: got '', want some text"),
        (
            {"endpoint_parameters": ("seed", "seed")},
            "endpoint_parameters: got .*, want 'seed' once",
        ),
        ({"endpoint_parameters": ("top",)}, "endpoint_parameters: got 'top', want one of"),
        ({"benchmarks": (("frozenlake_vsp", "a"), ("frozenlake_vsp", "b"))}, "benchmarks: got"),
    ],
)
def test_two_of_a_name_and_none_are_refused(settings: dict[str, Any], message: str) -> None:
    """Their rows would be taken for each other's: the second one's were dropped."""
    with pytest.raises(ValueError, match=rf"evaluate\.{message}"):
        config_lib.check(make_config(**settings))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{]\n", r"rows.jsonl, line 1: got .*want JSON"),
        ("\n[1]\n", r"rows.jsonl, line 2: got .*want a JSON object"),
        ("\xff\n", r"rows.jsonl, line 1: got .*want JSON"),
        ("[" * 100_000 + "\n", r"rows.jsonl, line 1: got .*want JSON"),
        ("9" * 5000 + "\n", r"rows.jsonl, line 1: got .*want JSON"),
        ('{"model": "a"}\n', r"line 1: got keys .*want \['task', 'level', 'index', 'mode'\]"),
        ("[" * 100_000 + "\n", r"line 1: got .*want JSON"),
        (
            '{"model": "a", "mode": "text", "task": "maze", "level": [], "index": 0}\n',
            r"line 1: level: got \[\], want int",
        ),
        (
            '{"model": "a", "mode": "text", "task": "maze", "level": 3, "index":0, "response":5}\n',
            r"line 1: response: got '5', want text or null",
        ),
        (
            '{"model": "a", "mode": "text", "task": "maze", "level": 3, "index": 9}\n',
            r"line 1: got a row about \('maze', 3, 9\), want it in boards.jsonl",
        ),
    ],
)
def test_a_broken_line_is_named(tmp_path: pathlib.Path, text: str, message: str) -> None:
    rows.write_boards(tmp_path, BOARDS, CASES)
    (tmp_path / "rows.jsonl").write_bytes(text.encode("latin-1"))
    with pytest.raises(ValueError, match=message):
        rows.read_rows(tmp_path)


def test_a_folder_about_other_boards_is_refused(tmp_path: pathlib.Path) -> None:
    rows.write_boards(tmp_path, BOARDS, CASES)
    rows.write_boards(tmp_path, BOARDS, CASES)
    with pytest.raises(ValueError, match=r"boards.jsonl: got the boards of another evaluation"):
        rows.write_boards(tmp_path, BOARDS[:1], CASES[:1])


def test_where_nothing_can_be_appended_each_batch_is_a_file(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Object stores have no append: rows are parts until the evaluation is complete."""
    monkeypatch.setattr(rows.paths, "is_remote", lambda _: True)
    found = [make_row(board) for board in BOARDS]
    want = [row | {"task_text": rows.board_text(b)} for row, b in zip(found, BOARDS, strict=True)]
    rows.write_boards(tmp_path, BOARDS, CASES)
    for row in found:
        rows.append(tmp_path, [row])
    assert len(list(tmp_path.glob(rows.PARTS))) == 2 and not (tmp_path / "rows.jsonl").exists()
    assert rows.read_rows(tmp_path) == want
    rows.compact(tmp_path, rows.read_rows(tmp_path))
    assert not list(tmp_path.glob(rows.PARTS)) and rows.read_rows(tmp_path) == want


def test_boards_of_equal_content_are_one_board_of_a_measure(tmp_path: pathlib.Path) -> None:
    """Two maps of VSP that are the same: two rows, one piece of evidence."""
    boards = [BOARDS[0], BOARDS[1], BOARDS[0]._replace(index=7)]
    rows.write_boards(tmp_path, boards, ["a", "b", "c"])
    for board, value in zip(boards, ("1", "0", "0"), strict=True):
        rows.append(tmp_path, [make_row(board) | {"response": value}])
    found = rows.read_rows(tmp_path)
    assert [row.get("same_as") for row in found] == [None, None, BOARDS[0].index]
    rate = measures.rate(found, lambda row: float(row["response"]))
    assert (rate["value"], rate["n"]) == (0.25, 2)
    assert measures.balanced(found, lambda row: float(row["response"]))["n"] == 2
    rows.compact(tmp_path, found)
    assert "same_as" not in (tmp_path / rows.ROWS_FILE).read_text()
    assert rows.read_rows(tmp_path) == found


def test_every_model_of_a_benchmark_is_asked_what_it_saw(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    Model(monkeypatch)
    told: list[tuple[Any, ...]] = []
    monkeypatch.setattr(benchmarks, "warn_of_seen", lambda *arguments: told.append(arguments))
    models = (("base", "there"), ("distilled", "{workdir}/distillation"))
    evaluate.run(make_config(models=models, folder="{workdir}/own"), str(tmp_path))
    assert told == []
    evaluate.run(make_config(models=models, benchmarks=(("maze_held_out", "x"),)), str(tmp_path))
    want = (("base", "there", BOARDS), ("distilled", f"{tmp_path}/distillation", BOARDS))
    assert told == [*want]


@pytest.mark.parametrize("task", ["frozenlake", "maze", "minibehaviour", "sokoban"])
def test_no_board_file_is_made_for_a_row(task: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A board file has all shortest plans in it: too much to make and throw away an answer."""
    env = ENVS[task]
    level = env.levels[0]
    board = Board(task, level, 0, env.generate(np.random.default_rng(0), level), None)
    monkeypatch.setattr(base.Env, "to_text", None)
    for mode in ("picture", "perception"):
        row = scoring.score_row(board, mode, scoring.Answer("", False, 1), model="m")
        assert row["task"] == task
