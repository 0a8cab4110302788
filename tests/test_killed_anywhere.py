"""A stage that is killed before any one of its changes to files ends as an undisturbed one does.

Training is killed for real in test_killed.py, export in test_export.py.
"""

import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from helpers_kills import Killer
from helpers_tiny import tiny_config

from mgsd_jax import config as c
from mgsd_jax.data import prompts
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import scoring
from mgsd_jax.stages import evaluate, generate, init, report, score
from mgsd_jax.workdir import folders

TIMED = ("run.json", "runs.jsonl", "config.json")  # hold when a folder was begun


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder by its path, those that hold times without their content.

    A start that was killed has no account of its end.
    """
    return {
        str(file.relative_to(folder)): b"" if file.name in TIMED else file.read_bytes()
        for file in sorted(folder.rglob("*"))
        if file.is_file() and not file.name.startswith(folders.ENDS_FILE)
    }


def check(killer: Killer, stage: Callable[[Path], object], work: Path, setup: Path) -> int:
    """Kills `stage(folder)`, in a copy of `setup`, at every operation; how many there are."""
    stage(shutil.copytree(setup, work / "undisturbed"))
    want = contents(work / "undisturbed")
    folder = work / "killed"
    for operations in range(400):
        shutil.copytree(setup, folder)
        done = killer.run(lambda: stage(folder), folder, operations)
        stage(folder)
        found = contents(folder)
        assert found.keys() == want.keys(), operations
        assert [name for name in want if found[name] != want[name]] == [], operations
        shutil.rmtree(folder)
        if done:
            return operations
    raise AssertionError("no end to the operations")


@pytest.fixture(scope="module")
def config() -> c.Config:
    """Two levels with two boards a split; folders by `{workdir}`."""
    made = tiny_config(Path("{workdir}"))
    boards = (
        c.LevelSet("frozenlake", (3,), train=1, val=1, test=2),
        c.LevelSet("maze", (3,), train=1, val=1, test=2),
    )
    return dataclasses.replace(
        made,
        data=dataclasses.replace(made.data, boards=boards),
        evaluate=dataclasses.replace(made.evaluate, models=(("base", "{model}"),), batch_size=2),
    )


@pytest.fixture(scope="module")
def drawn(config: c.Config, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("drawn")
    generate.run(config, str(folder))
    return folder


def right_answers(source: str, config: c.Config, boards: Sequence[Board]) -> Any:
    """What `evaluate._local_asker` returns, of a model that answers all boards right."""

    def asker(job: evaluate.Job) -> Iterator[list[tuple[int, scoring.Answer]]]:
        for place in job.places:
            board = boards[place]
            plan = ENVS[board.task].shortest_plan(board.state)
            text = prompts.response(board.task, board.state, plan)
            yield [(place, scoring.Answer(text, False, 9))]

    return asker


def test_generate(killer: Killer, config: c.Config, tmp_path: Path) -> None:
    setup = tmp_path / "setup"
    setup.mkdir()
    assert check(killer, lambda f: generate.run(config, str(f)), tmp_path, setup) > 40


def test_init(
    killer: Killer, config: c.Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[Any] = []  # weights are made once: what is written is what counts

    def whiten(params: Any, *_: object) -> Any:
        made.append(params)
        monkeypatch.setattr(init, "init_params", lambda *_: made[0])
        monkeypatch.setattr(init, "widen_vision", lambda params: params)
        return made[0]

    monkeypatch.setattr(init, "whiten_vision", whiten)
    setup = tmp_path / "setup"
    setup.mkdir()
    assert check(killer, lambda f: init.run(config, str(f)), tmp_path, setup) > 8


def test_evaluate_and_report(
    killer: Killer,
    config: c.Config,
    drawn: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(evaluate, "_local_asker", right_answers)

    def both(folder: Path) -> None:
        evaluate.run(config, str(folder))
        report.run(config, str(folder))
        # Paths and times of a run are its own.
        shutil.rmtree(folder / "report")

    assert check(killer, both, tmp_path, drawn) > 20


def test_score(killer: Killer, drawn: Path, tmp_path: Path) -> None:
    text = next(drawn.rglob("test/*/level3/text/*.txt")).read_text()
    row = {"rules": "standard", "task_text": text, "response": "<answer>U</answer>"}
    setup = tmp_path / "setup"
    setup.mkdir()
    (setup / "in.jsonl").write_text(json.dumps(row) + "\n")

    def stage(folder: Path) -> None:
        score.run(str(folder / "in.jsonl"), str(folder / "out.jsonl"))

    assert check(killer, stage, tmp_path, setup) >= 2
