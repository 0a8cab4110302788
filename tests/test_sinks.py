"""Sinks: what a tracker is told, that its failure ends nothing, and that a resumed run goes on."""

import json
import pathlib
import sys
import threading
import types
from typing import Any

import helpers_tiny
import numpy as np
import pytest

from mgsd_jax import config as c
from mgsd_jax.data import loaders, prompts
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import routes
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.training import monitor
from mgsd_jax.workdir import metrics, sinks
from mgsd_jax.workdir.sinks import Picture

BOARD = Picture("boards/maze", np.zeros((4, 4, 3), np.uint8), "success: UU")


class Tracked:
    """A stand-in for the module of a tracker and for its run: notes every call."""

    def __init__(self, failing: str = "") -> None:
        self.calls: list[tuple[str, Any, dict[str, Any]]] = []
        self.failing = failing
        self.finish: Any = lambda: self.note("finish")
        self.Image = lambda pixels, caption: ("image", pixels.shape, caption)

    def note(self, name: str, /, *args: Any, **options: Any) -> "Tracked":
        if name == self.failing:
            raise ConnectionError("no route\nto host")
        self.calls.append((name, args, options))
        return self

    def __getattr__(self, name: str) -> Any:
        return lambda *args, **options: self.note(name, *args, **options)

    def of(self, name: str) -> list[Any]:
        return [(args, options) for called, args, options in self.calls if called == name]


def config_with(*names: c.Sink, folder: pathlib.Path) -> c.Config:
    config = helpers_tiny.tiny_config(folder)
    assignments = [f"metrics.sinks={','.join(names)}", "metrics.project=mazes"]
    return c.override(config, assignments)


def write(folder: pathlib.Path, config: c.Config, *steps: int, after: int = 0) -> None:
    with metrics.open_writer(folder, step=after, config=config) as writer:
        for step in steps:
            writer.write(step, {"loss": step / 2})
            writer.show(step, [BOARD])


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_tracker_gets_numbers_boards_and_config_and_a_resumed_run_goes_on(
    name: Any, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker = Tracked()
    monkeypatch.setattr(sinks, name, tracker)
    folder, config = tmp_path / "mine" / "grounding", config_with(name, folder=tmp_path)
    write(folder, config, 1, 2)
    write(folder, config, 2, after=1)
    (_, first), (_, second) = tracker.of("init")
    assert first["config"] == c.to_dict(config) and first["project"] == "mazes"
    assert first["resume"] == second["resume"] == "allow"
    identifiers = [tuple(one.get(key) for key in ("id", "name")) for one in (first, second)]
    assert identifiers[0] == identifiers[1] and "mine/grounding" in identifiers[0][1]
    logged = [args[0] | options for args, options in tracker.of("log")]
    assert [(one["step"], one["loss"]) for one in logged if "loss" in one] == [
        (1, 0.5),
        (2, 1.0),
        (2, 1.0),
    ]
    shown = [one["boards/maze"] for one in logged if "boards/maze" in one]
    assert shown == [("image", (4, 4, 3), "success: UU")] * 3
    assert len(tracker.of("finish")) == 2
    assert not (folder / "tensorboard").exists()
    # At step 0 the run starts over, and so it does at the tracker.
    write(folder, config, 1)
    assert tuple(tracker.of("init")[2][1].get(key) for key in ("id", "name")) != identifiers[0]


@pytest.mark.parametrize("failing", ["init", "log", "finish"])
def test_a_tracker_that_fails_is_one_warning(
    failing: str,
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(sinks, "wandb", Tracked(failing))
    with caplog.at_level("WARNING", logger="absl"):
        write(tmp_path, config_with("wandb", "tensorboard", folder=tmp_path), 1, 2)
    said = "metrics.sinks: wandb: no route to host; the run goes on without it"
    assert caplog.messages == [said]
    assert [record["loss"] for record in metrics.read_metrics(tmp_path / "metrics.jsonl")] == [
        0.5,
        1.0,
    ]
    (events,) = (tmp_path / "tensorboard").glob("events.*")
    content = events.read_bytes()
    assert b"boards/maze" in content and b"success: UU" in content and b"max_new_tokens" in content


def test_a_tracker_that_never_ends_is_left_behind(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    tracker, held = Tracked(), threading.Event()
    monkeypatch.setattr(sinks, "wandb", tracker)
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.01)
    tracker.finish = held.wait
    with caplog.at_level("WARNING", logger="absl"):
        write(tmp_path, config_with("wandb", folder=tmp_path), 1)
    held.set()
    (said,) = caplog.messages
    assert "wandb: not all was sent within 0.01 s of the end; the run goes on" in said


def test_a_package_that_is_not_there_is_a_line_that_says_what_to_install(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Absent(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            raise ModuleNotFoundError(f"No module named {self.__name__}")

    monkeypatch.setattr(sinks, "trackio", Absent("trackio"))
    sinks.check(c.MetricsConfig())
    with pytest.raises(ValueError, match=r"trackio not found; pip install 'mgsd_jax\[trackio\]'"):
        sinks.check(c.MetricsConfig(sinks=("trackio",)))


def test_validated_boards_are_shown_with_their_routes() -> None:
    boards = list(loaders.stream_boards((("maze", 3), ("frozenlake", 3)), "val", seed=0, count=9))
    plans = [ENVS[b.task].shortest_plan(b.state) for b in boards]
    texts = [prompts.response(b.task, b.state, p) for b, p in zip(boards, plans, strict=True)]
    answers = [Answer(text, False, 1) for text in [*texts[:7], "I do not know", "last"]]

    def picture(board: Board) -> np.ndarray:
        return ENVS[board.task].render(board.state, 96)

    shown = monitor.shown_answers(boards, answers, picture)
    assert [one.name for one in shown[:2]] == ["boards/maze_3_0000", "boards/frozenlake_3_0000"]
    assert len(shown) == monitor.SHOWN == 8
    assert shown[0].caption == f"success\n{texts[0]}"
    assert shown[7].caption == "no success: no_answer\nI do not know"
    assert np.array_equal(shown[7].pixels, picture(boards[7]))
    for board, plan, one in zip(boards[:7], plans[:7], shown[:7], strict=True):
        changed = (one.pixels != picture(board)).any(-1)
        assert (one.pixels[changed] == routes.RIGHT).all(-1).any()
        for row, column in ENVS[board.task].trace(board.state, plan):
            middle = changed[row * 32 + 12 : row * 32 + 20, column * 32 + 12 : column * 32 + 20]
            assert middle.any(), (board.task, row, column)
    board, plan = max(zip(boards, plans, strict=True), key=lambda pair: len(pair[1]))
    wrong = routes.draw_route(picture(board), board.task, board.state, plan[:-1])
    assert (wrong == routes.WRONG).all(-1).any() and not (wrong == routes.RIGHT).all(-1).any()


def test_wandb_itself_offline(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    folder, config = tmp_path / "mine" / "grounding", config_with("wandb", folder=tmp_path)
    write(folder, config, 1, 2)
    write(folder, config, 2, 3, after=1)
    identifier = json.loads((folder / "tracked.json").read_text())["id"]
    runs = sorted((folder / "wandb").glob("offline-run-*"))
    assert len(runs) == 2 and all(run.name.endswith(identifier) for run in runs)
    (board,) = (runs[0] / "files" / "media" / "images" / "boards").glob("maze_*1_*.png")
    assert board.stat().st_size > 0


def test_trackio_itself(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trackio = pytest.importorskip("trackio")
    sqlite_storage = pytest.importorskip("trackio.sqlite_storage")
    for module in [m for name, m in sys.modules.items() if name.startswith("trackio")]:
        for name in {"TRACKIO_DIR", "MEDIA_DIR"} & vars(module).keys():
            monkeypatch.setattr(module, name, tmp_path / name)
    folder, config = tmp_path / "mine" / "grounding", config_with("trackio", folder=tmp_path)
    write(folder, config, 1, 2)
    write(folder, config, 2, 3, after=1)
    (run,) = trackio.Api().runs("mazes")
    assert run.name.startswith("mine/grounding-") and run.config["seed"] == config.seed
    logged = sqlite_storage.SQLiteStorage.get_logs("mazes", run.name)
    assert {(one["step"], one["loss"]) for one in logged if "loss" in one} == {
        (1, 0.5),
        (2, 1.0),
        (3, 1.5),
    }
    boards = [one["boards/maze"] for one in logged if "boards/maze" in one]
    assert len(boards) == 4 and {board["caption"] for board in boards} == {"success: UU"}
