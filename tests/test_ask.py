"""Asking a model about one picture: what it states is drawn, judged and doubted."""

import dataclasses
import json
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import test_endpoint
from absl.testing import flagsaver
from PIL import Image

import mgsd_jax
from mgsd_jax import command_line, main
from mgsd_jax import config as config_lib
from mgsd_jax.data import prompts
from mgsd_jax.data.prompts import Message
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import reply as reply_lib
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.report import answer as answer_lib
from mgsd_jax.stages import ask, export
from mgsd_jax.workdir import stage_folder

ROOT = pathlib.Path(__file__).parents[1]
BASE = pathlib.Path(mgsd_jax.__file__).parent / "assets" / "nano_base"
NANO = command_line.load_config(str(ROOT / "configs" / "nano.py"), [])
LEVELS = {task: env.nearest_level(6) for task, env in ENVS.items()}
LEVELS |= {"frozenlake": 4, "maze": 3, "minibehaviour": 5}
every_task = pytest.mark.parametrize("task", ENVS)


def board(task: str, seed: int = 0) -> Any:
    return ENVS[task].generate(np.random.default_rng(seed), LEVELS[task])


def right_answer(task: str, state: Any) -> str:
    return prompts.response(task, state, ENVS[task].shortest_plan(state))


def save(folder: pathlib.Path, pixels: np.ndarray, name: str = "board.png") -> str:
    Image.fromarray(pixels).save(folder / name)
    return str(folder / name)


def recorded(*texts: str, config: config_lib.Config = NANO) -> ask.Model:
    """A model that gives these answers, the last one over and over."""

    def respond(asked: Sequence[list[Message]]) -> list[Answer]:
        given = [*texts, *[texts[-1]] * len(asked)]
        return [Answer(text, False, 1) for text in given[: len(asked)]]

    return ask.Model(config, respond)


def nano_for(task: str) -> config_lib.Config:
    boards = (config_lib.LevelSet(task, (LEVELS[task],), 0, 0, 0),)
    return dataclasses.replace(NANO, data=dataclasses.replace(NANO.data, boards=boards))


@every_task
@pytest.mark.parametrize("size", [None, 256, 500])
def test_a_right_answer_is_drawn_and_not_doubted(
    task: str, size: int | None, tmp_path: pathlib.Path
) -> None:
    state, env = board(task), ENVS[task]
    pixels = env.render(state, size or 32 * state.size)
    model = recorded(right_answer(task, state), config=nano_for(task))
    reply = ask.ask(model, save(tmp_path, pixels), task=task)
    assert reply.board is not None and reply.board.state == state
    said = "\n".join(answer_lib.lines(reply))
    assert "Warning" not in said and "the shortest way" in said
    assert env.route(env.shortest_plan(state), env.trace(state, env.shortest_plan(state))) in said
    drawn = answer_lib.picture(reply, pixels)
    assert drawn.count("<svg") == drawn.count("</svg>") == 1
    assert 'class="route good"' in drawn and "var(" not in drawn and "http" in drawn


@pytest.mark.parametrize("task", ["frozenlake", "sokoban"])
def test_the_cells_that_were_misread_are_named(task: str, tmp_path: pathlib.Path) -> None:
    """The picture and another board differ in just the cells whose things differ."""
    shown, stated = board(task, 1), board(task, 2)

    def things(state: Any) -> dict[Any, set[str]]:
        found: dict[Any, set[str]] = {}
        for label, *rest in ENVS[task].facts(state):
            if label != "size":
                found.setdefault(rest[0], set()).add(label)
        return found

    first, second = things(shown), things(stated)
    want = {cell for cell in first | second if first.get(cell) != second.get(cell)}
    picture = save(tmp_path, ENVS[task].render(shown, 300))
    reply = ask.ask(recorded(right_answer(task, stated), config=nano_for(task)), picture, task=task)
    assert set(reply.unlike) == want and want
    (warning,) = [line for line in answer_lib.lines(reply) if line.startswith("Warning")]
    assert f"differs from the picture in {len(want)} of {stated.size**2} cells: (" in warning
    assert ("is it a picture of" in warning) == reply.is_doubtful


@pytest.mark.parametrize("size", [96, 256, 1000])
def test_one_wall_more_or_less_is_seen(size: int) -> None:
    state = board("maze")
    walls = [list(row) for row in state.walls]
    cells = next(
        ((r, c), (r, c + 1)) for r in range(3) for c in range(2) if not state.walls[r][c] & 8
    )
    for (row, column), side in zip(cells, (8, 4), strict=True):
        walls[row][column] |= side
    other = dataclasses.replace(state, walls=tuple(map(tuple, walls)))
    render = ENVS["maze"].render
    assert reply_lib.differing(render(state, size), [render(state, size)], 3) == ()
    assert reply_lib.differing(render(state, size), [render(other, size)], 3) == cells


def pictures_of_nothing() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    slope = np.linspace(0, 255, 320).astype(np.uint8)
    return {
        "noise": rng.integers(0, 256, (200, 300, 3), dtype=np.uint8),
        "blank": np.full((1, 1, 3), 255, np.uint8),
        "photo": np.stack(np.broadcast_arrays(slope[:, None], slope[None], slope[:, None]), -1),
        "strip": np.zeros((3, 4000, 3), np.uint8),
    }


@pytest.mark.parametrize("name", pictures_of_nothing())
@every_task
def test_a_picture_of_no_board_is_doubted(task: str, name: str, tmp_path: pathlib.Path) -> None:
    picture = save(tmp_path, pictures_of_nothing()[name])
    said = right_answer(task, board(task))
    reply = ask.ask(recorded(said, config=nano_for(task)), picture, task=task)
    assert reply.is_doubtful
    assert "is it a picture of" in answer_lib.lines(reply)[-1]


@pytest.mark.parametrize(
    ("text", "warning"),
    [
        ("", "size and player and goal: not stated"),
        ("I see a dog.", "size and player and goal: not stated"),
        ("Map size: 3x3\nPlayer: (0,0)", "goal: not stated"),
        ("Map size: 3x4\nPlayer: (0,0)\nGoal: (1,1)", "size: got [], want one of 1 to 64"),
        ("Map size: 99x99\nPlayer: (0,0)\nGoal: (1,1)", "size: got [99], want one of 1 to 64"),
        ("Map size: 3x3\nPlayer: (0,7)\nGoal: (1,1)", "player: got (0, 7), want a cell of a 3x3"),
        ("Map size: 3x3\nPlayer: (0,0) (1,1)\nGoal: (1,1)", "player: got 2 cells, want 1"),
        ("Map size: 3x3\nPlayer: (0,0)\nGoal: (1,1)", "the board that it sees has no solution"),
        ("Map size: 64x64\nPlayer: (0,0)\nGoal: (1,1)", "has no solution"),
    ],
)
@pytest.mark.parametrize("answer", ["", "<answer>U</answer>", "<answer>jump</answer>"])
def test_any_text_is_an_answer(
    text: str, warning: str, answer: str, tmp_path: pathlib.Path
) -> None:
    picture = save(tmp_path, ENVS["maze"].render(board("maze"), 96))
    reply = ask.ask(recorded(f"{text}\n{answer}"), picture, task="maze")
    said = answer_lib.lines(reply)
    assert warning in "\n".join(line for line in said if line.startswith("Warning"))
    drawn = answer_lib.picture(reply, np.zeros((8, 8, 3), np.uint8))
    assert ('class="route bad"' in drawn) == (reply.board is not None and "U" in answer)


def test_the_size_is_found_whose_answer_fits(tmp_path: pathlib.Path) -> None:
    """A lake of the nano run may have 3 or 4 cells a side: the picture is shown in both sizes."""
    env, asked = ENVS["frozenlake"], []
    small, large = (env.generate(np.random.default_rng(0), level) for level in (3, 4))
    answers = {96: right_answer("frozenlake", small), 128: right_answer("frozenlake", large)}

    def respond(messages: Sequence[list[Message]]) -> list[Answer]:
        sizes = [len(m[0]["content"][-1]["image"]) for m in messages]
        asked.append(sizes)
        return [Answer(answers[size], False, 1) for size in sizes]

    model = ask.Model(NANO, respond)
    for state, size in ((small, 96), (large, 128)):
        picture = save(tmp_path, env.render(state, 300))
        reply = ask.ask(model, picture, task="frozenlake")
        assert (reply.size, reply.unlike) == (size, ()) and reply.board is not None
        assert reply.board.state == state
        assert ask.ask(model, picture, task="frozenlake", level=4).size == 128
    assert asked == [[96, 128], [128], [96, 128], [128]]


def test_a_free_question_is_asked_as_it_is(tmp_path: pathlib.Path) -> None:
    picture = save(tmp_path, ENVS["maze"].render(board("maze"), 96))
    asked: list[list[Message]] = []

    def respond(messages: Sequence[list[Message]]) -> list[Answer]:
        asked.extend(messages)
        return [Answer("It is <picture> red.", False, 3)] * len(messages)

    reply = ask.ask(ask.Model(NANO, respond), picture, question="What <picture> is red?")
    assert answer_lib.lines(reply) == ["It is <picture> red."]
    (message,) = asked[0]
    assert [part["type"] for part in message["content"]] == ["image", "text"]
    assert message["content"][1]["text"] == "What <picture> is red?"


# ------------------------------------------------------------------------------------- the config


def record(folder: pathlib.Path, kind: str, config: config_lib.Config) -> str:
    """A folder with what a stage or an export of this config says of it."""
    content: dict[str, Any] = config_lib.to_dict(config)
    content = {name: content[name] for name in ("model", "data")}
    (folder / "model").mkdir(parents=True)
    if kind == "stage":
        (folder / "model" / stage_folder.SOURCE).write_text("{}")
        (folder / "config.json").write_text(json.dumps(content))
    else:
        (folder / export.RECORD).write_text(json.dumps({"source": "a", **content}))
    return str(folder)


@pytest.mark.parametrize("kind", ["stage", "export"])
def test_a_folder_says_how_it_was_trained(kind: str, tmp_path: pathlib.Path) -> None:
    """Also from another place: what lay in the workdir is looked for beside the folder."""
    words = dataclasses.replace(NANO.data, prompts="{workdir}/words")
    folder = tmp_path / "run" / "distillation"
    record(folder, kind, dataclasses.replace(NANO, data=words))
    found = ask.find_config([f"ask.model={folder}", "data.workers=3"])
    beside = {"folder": f"{tmp_path}/run/data", "prompts": f"{tmp_path}/run/words"}
    assert found.data == dataclasses.replace(NANO.data, workers=3, **beside)
    assert found.model == NANO.model
    below = ask.find_config(["ask.task=maze"], str(tmp_path / "run"))
    assert below.data == dataclasses.replace(NANO.data, **beside) and below.ask.task == "maze"
    (folder / "prompts").mkdir()
    own = ask.find_config([f"ask.model={folder}"]).data.prompts
    assert own == (f"{folder}/prompts" if kind == "export" else beside["prompts"])


def test_a_folder_that_says_nothing_is_shown_public_pictures(
    tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = ask.find_config([f"ask.model={tmp_path}"])
    assert ask.shown_sizes(found.data, "maze") == ask.shown_sizes(found.data, "") == [256]
    assert "no record of its training found" in caplog.text
    with pytest.raises(ValueError, match=r"^ask.model: required, or --workdir"):
        ask.find_config(["ask.task=maze"])


def test_a_prompt_gets_the_bucket_of_the_training_or_one_of_its_own() -> None:
    assert [ask._room(n, (44, 100)) for n in (3, 44, 45, 101)] == [44, 44, 100, 128]
    assert ask._room(129, "auto") == 256


def test_an_unknown_task_needs_its_level() -> None:
    assert ask.shown_sizes(NANO.data, "") == [96, 128, 160]
    assert ask.shown_sizes(NANO.data, "sokoban", level=6) == [192]
    with pytest.raises(ValueError, match=r"ask.task: got 'sokoban', want one that .* \(ask.level"):
        ask.shown_sizes(NANO.data, "sokoban")


# ------------------------------------------------------------------------------- the command line


def call(*flags: str) -> int:
    with flagsaver.flagsaver():
        return main.main(command_line.parse_flags(["mgsd_jax", "--stage=ask", *flags]))


@pytest.mark.parametrize(
    ("picture", "settings", "line"),
    [
        ("", ["model=MODEL", "task=maze"], "--input is required for --stage=ask"),
        ("PNG", ["task=maze"], "ask.model: required, or --workdir"),
        ("PNG", ["model=MODEL"], "ask.task: got '', want one of ['frozenlake'"),
        ("PNG", ["model=MODEL", "task=go"], "ask.task: got 'go', want one of ['frozenlake'"),
        ("PNG", ["model=s3://a", "task=maze"], "ask.model: got 's3://a', want a local path or gs"),
        ("PNG", ["model=/absent", "task=maze"], "ask.model: /absent not found, want the folder of"),
        ("PNG", ["model=FOLDER", "task=maze"], ": neither config.json nor"),
        ("/absent.png", ["model=MODEL", "task=maze"], "/absent.png: not found"),
        ("TEXT", ["model=MODEL", "task=maze"], "a.txt: got an unreadable picture"),
        ("CUT", ["model=MODEL", "task=maze"], "b.png: got an unreadable picture"),
        ("FOLDER", ["model=MODEL", "task=maze"], "got an unreadable picture"),
        ("PNG --output=PNG", ["model=MODEL", "task=maze"], "want another file, that ends in"),
        ("PNG --output=/absent/a.svg", ["model=MODEL", "task=maze"], "folder /absent not found"),
        ("PNG --output=a.gif", ["model=MODEL", "task=maze"], "--output: got a.gif, want another"),
    ],
)
def test_what_cannot_be_asked_is_one_line(
    picture: str,
    settings: Sequence[str],
    line: str,
    tmp_path: pathlib.Path,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    names = {"PNG": save(tmp_path, np.zeros((96, 96, 3), np.uint8)), "FOLDER": str(tmp_path)}
    names |= {"TEXT": str(tmp_path / "a.txt"), "CUT": str(tmp_path / "b.png"), "MODEL": str(BASE)}
    (tmp_path / "a.txt").write_text("no picture")
    (tmp_path / "b.png").write_bytes(pathlib.Path(names["PNG"]).read_bytes()[:60])
    flags = [*f"--input={picture}".split(), *(f"--set=ask.{setting}" for setting in settings)]
    assert call(*(re.sub(r"\b[A-Z]{3,}\b", lambda m: names[m[0]], flag) for flag in flags)) == 2
    errors = [one for one in caplog.records if one.levelname == "ERROR"]
    assert len(errors) == 1 and line in errors[0].getMessage()
    assert "\n" not in errors[0].getMessage() and not capsys.readouterr().out


def test_an_endpoint_is_asked(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    server = test_endpoint.Server()
    state = board("maze")
    server.reply = lambda request, before: test_endpoint.completion(right_answer("maze", state))
    picture = save(tmp_path, ENVS["maze"].render(state, 256))
    flags = (f"--input={picture}", "--set=ask.task=maze", f"--set=ask.model={server.url}")
    try:
        assert call(*flags) == 0
        assert call(*flags, f"--output={tmp_path / 'drawn.png'}") == 0
        server.reply = lambda request, before: (400, "text/plain", b"no room")
        assert call(*flags, "--set=evaluate.endpoint_retries=0") == 2
    finally:
        server.http.shutdown()
        server.http.server_close()
    assert server.requests[0]["temperature"] == 0 and server.requests[0]["max_tokens"] == 1024
    said = capsys.readouterr().out
    assert "the shortest way" in said and "Warning" not in said
    with Image.open(tmp_path / "drawn.png") as drawn:
        assert (drawn.format, drawn.size) == ("PNG", (512, 512))
    drawn = (tmp_path / "board.route.svg").read_text()
    assert 'class="route good"' in drawn and str(tmp_path / "board.route.svg") in said


@pytest.mark.slow
def test_the_shipped_base_is_asked(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One real run: a model's answer to a picture, and what the program says of it."""
    picture = save(tmp_path, ENVS["minibehaviour"].render(board("minibehaviour"), 256))
    output = tmp_path / "drawn.svg"
    flags = [f"--input={picture}", f"--output={output}", "--config=nano"]
    settings = (f"model={BASE}", "task=minibehaviour", "max_new_tokens=62")
    assert call(*flags, *(f"--set=ask.{setting}" for setting in settings)) == 0
    said = capsys.readouterr().out
    assert f"{picture}: 256x256 pixels, resized to 160x160, as in the training" in said
    assert ("It sees, in MiniBehaviour of" in said) or ("makes no board" in said)
    assert output.exists() == (f"The picture with the route: {output}" in said)


def test_a_board_that_is_solved_before_the_first_action_is_none() -> None:
    """A model that sees player and goal in one cell has seen no board of a maze."""
    text = right_answer("maze", board("maze"))
    lines = [line for line in text.splitlines() if not line.startswith(("Player", "Goal"))]
    answer = Answer("\n".join(["Player: (1,1)", "Goal: (1,1)", *lines]), False, 1)
    pixels = np.zeros((96, 96, 3), np.uint8)
    reply = reply_lib.read("maze", answer, 96, pixels, lambda *_: pixels)
    assert reply.board is None and "solved before the first action" in reply.problem
    assert reply.is_doubtful


@pytest.mark.parametrize(
    ("said", "shown"),
    [
        ("<answer>UP, (0,1),\n north</answer>", "Plan:  cannot be read: UP, (0,1), north"),
        ("<answer></answer>", "Plan:  none"),
        (
            "<answer>" + "go on " * 50 + "</answer>",
            "Plan:  cannot be read: " + "go on " * 13 + "go",
        ),
        ("<think>R</think>I go right.\n", "Plan:  cannot be read: I go right."),
    ],
)
def test_a_plan_that_cannot_be_read_is_shown(said: str, shown: str, tmp_path: pathlib.Path) -> None:
    state = board("maze")
    stated = right_answer("maze", state).partition("\nI go through")[0]
    picture = save(tmp_path, ENVS["maze"].render(state, 96))
    reply = ask.ask(recorded(f"{stated}\n{said}", config=nano_for("maze")), picture, task="maze")
    (line,) = [line for line in answer_lib.lines(reply) if line.startswith("Plan: ")]
    assert line == shown + (" ..." if len(said) > 100 else "")
