"""Board files and pictures: ours against those that the public generators drew."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.maze import MazeState

ROOT = pathlib.Path(__file__).parents[1]
KEPT = ROOT / "tests" / "data" / "boards"  # one public board of each task
REFERENCE = ROOT.parent / "shared" / "reference" / "boards"
TASKS = ("frozenlake", "maze", "minibehaviour")


def public_boards() -> list[Any]:
    """All board files at hand, with the reason to skip where the larger set is absent."""
    files: list[Any] = sorted(KEPT.glob("*/*/text/*.txt"))
    if not REFERENCE.is_dir():
        reason = "../shared/reference/boards is not here"
        return [*files, pytest.param(REFERENCE, marks=pytest.mark.skip(reason=reason))]
    return files + sorted(REFERENCE.glob("*/*/text/*.txt"))


def read(path: pathlib.Path) -> tuple[Any, Any, dict[str, str], str]:
    text = path.read_text()
    fields = dict(line.split("=", 1) for line in text.splitlines() if "=" in line)
    env = ENVS[fields["task"]]
    return env, env.from_text(text, source=path.name), fields, text


def kept(task: str) -> str:
    return next((KEPT / task).glob("*/text/*.txt")).read_text()


def test_a_board_of_each_task_is_kept() -> None:
    assert {path.parents[2].name for path in KEPT.glob("*/*/text/*.txt")} == set(TASKS)


@pytest.mark.parametrize("path", public_boards(), ids=str)
def test_a_public_board_is_written_back_byte_for_byte(path: pathlib.Path) -> None:
    env, state, fields, text = read(path)
    options: dict[str, Any] = {}
    if env.name == "frozenlake":
        options["frozen_probability"] = float(fields["frozen_probability"])
    if env.name == "minibehaviour":  # the public plan is one of the best at random
        options["plan"] = tuple(json.loads(fields["solution_actions"]))
    index, seed = int(fields["index"]), int(fields["seed"])
    assert env.to_text(state, split=fields["split"], index=index, seed=seed, **options) == text


@pytest.mark.parametrize("path", public_boards(), ids=str)
def test_a_public_plan_is_the_shortest(path: pathlib.Path) -> None:
    env, state, fields, _ = read(path)
    plan = tuple(json.loads(fields["solution_actions"]))
    assert env.play(state, plan).optimal
    assert len(env.shortest_plan(state)) == int(fields["path_length"])
    if env.name != "minibehaviour":
        assert env.shortest_plan(state) == plan  # ties are broken in the same order


@pytest.mark.parametrize("path", public_boards(), ids=str)
def test_a_picture_matches_the_public_one(path: pathlib.Path) -> None:
    env, state, _, _ = read(path)
    image = path.parents[1] / "image" / path.with_suffix(".png").name
    public = np.asarray(Image.open(image).convert("RGB")).astype(int)
    difference = np.abs(env.render(state, 256).astype(int) - public).mean()
    assert difference <= {"frozenlake": 0.05, "maze": 0.0, "minibehaviour": 0.5}[env.name]


@pytest.mark.parametrize("task", TASKS)
def test_writing_and_reading_gives_the_board_back(task: str) -> None:
    env, rng = ENVS[task], np.random.default_rng(0)
    for level in (*range(env.levels[0], 9), 16, 32):
        for index in range(5 if level < 9 else 1):
            state = env.generate(rng, level)
            text = env.to_text(state, split="train", index=index, seed=7)
            assert env.from_text(text, source="text") == state
            assert text.endswith("\n")


@pytest.mark.parametrize("task", TASKS)
def test_json_may_be_spaced_in_another_way_and_any_shortest_plan_will_do(task: str) -> None:
    env = ENVS[task]
    text = kept(task)
    lines = [line.partition("=") for line in text.splitlines()]
    loose = "\n".join(
        f"{key}={json.dumps(json.loads(value), separators=(' , ', ' : '))}"
        if value.startswith(("[", "{"))
        else key + equals + value
        for key, equals, value in lines
    )
    assert loose != text
    assert env.from_text(loose, source="text") == env.from_text(text, source="text")
    rng = np.random.default_rng(0)
    minibehaviour = ENVS["minibehaviour"]
    states = (minibehaviour.generate(rng, 6) for _ in range(100))
    state = max(states, key=minibehaviour.count_shortest_plans)
    for plan in minibehaviour.shortest_plans(state):
        written = minibehaviour.to_text(state, split="train", index=0, seed=0, plan=plan)
        assert minibehaviour.from_text(written, source="text") == state
    with pytest.raises(ValueError, match="want a shortest one such as"):
        minibehaviour.to_text(state, split="train", index=0, seed=0, plan=("pick",))


# Refusals: each change of a good file, the key that the error must name, and what it must say.
COMMON = (
    ("task=", "task=other", "task", "got other"),
    ("level=", "level=five", "level", "want an integer"),
    ("level=", "level=33", "level", "got 33, want"),
    ("index=", "index=1.5", "index", "got '1.5', want an integer"),
    ("seed=", "seed=", "seed", "want an integer"),
    ("split=", "split=train\nsplit=train", "split", "got the key twice"),
    ("split=", "split=train\ncolour=red", "colour", "got 'colour=red'"),
    ("split=", "split=train\nhello", "hello", "got 'hello'"),
    ("path_length=", "path_length=99", "path_length", "got 99, want"),
    ("path_length=", "path_length=3.0", "path_length", "got 3.0, want"),
    ("solution_actions=", 'solution_actions=["up"]', "solution_actions", "want a shortest plan"),
    ("solution_actions=", "solution_actions=[3]", "solution_actions", "want a list of words"),
    ("solution_actions=", "solution_actions=up", "solution_actions", "want JSON"),
    ("trajectory_states=", "trajectory_states=[]", "trajectory_states", r"got \[\], want \["),
)
CHANGES: dict[str, tuple[tuple[str, str, str, str], ...]] = {
    "frozenlake": (
        ("frozen_probability=", "frozen_probability=often", "frozen_probability", "a number"),
        ("frozen_probability=", "frozen_probability=nan", "frozen_probability", "got nan"),
        ("frozen_probability=", "frozen_probability=1.5", "frozen_probability", "at most 1"),
        ("is_slippery=", "is_slippery=true", "is_slippery", "got true, want false"),
        ("start_row=", "start_row=0", "start_row", "got 0, want 3"),
        ("goal_col=", "goal_col=x", "goal_col", "want JSON"),
        ("map:", "map", "map", "got 'map'"),
        ("FFFF", "FFFFF", "map", "want a square"),
        ("FFFF", "FXFF", "map", "only S F H G"),
        ("FFFF", "SFFF", "map", "got 2 tiles S, want 1"),
        ("FFGF", "FFFF", "map", "got 0 tiles G, want 1"),
        ("FSFF", "FSFF\nFFFF", "map", "got 5 rows, want 4 rows"),
        ("FFGF", "FHGH\nHFHH\nFSFF", "map", "got 6 rows, want 4 rows"),
        ("FFFF", "FFFF\nFHFF", "map", "got 5 rows, want 4 rows"),
    ),
    "maze": (
        ("difficulty_bucket=", "difficulty_bucket=hard", "difficulty_bucket", "want easy"),
        ("start_row=", "start_row=7", "start", "want a cell of a 3x3 board"),
        ("start_pos=", "start_pos=0", "start_pos", "got 0, want 5"),
        ("distance_map=", 'distance_map={"0":2}', "distance_map", "want {"),
        ("layout_json=", "layout_json=[]", "layout_json", r"got \[\]"),
        ("13 7 9", "13 7", "layout", "want a square"),
        ("13 7 9", "13 7 19", "layout", "want 0 to 15"),
        ("13 7 9", "13 7 a", "layout", "want masks 0 to 15"),
        ("13 7 9", "13 7 -1", "layout", "want masks 0 to 15"),
        ("13 7 9", "13 7 8", "layout", r"up of \(0, 2\) open"),
        ("13 7 9", "5 7 9", "layout", r"right of \(0, 0\) open"),
    ),
    "minibehaviour": (
        ("grid_rows=", "grid_rows=6", "grid_rows", "got 6, want 5"),
        ("outer_ring=", "outer_ring=true", "outer_ring", "want false"),
        ("start_dir=", "start_dir=1", "start_dir", "got 1, want 0"),
        ("printer_col=", "printer_col=2", "printer_col", "got 2, want 1"),
        ("table_neighbors=", "table_neighbors=[]", "table_neighbors", r"want \[\["),
        ("best_paths=", "best_paths=[[[4, 0], [3, 1]]]", "best_paths", "got"),
        ("A.TTT", "A.TT", "grid", "want a square over A P T ."),
        ("A.TTT", "A.TTX", "grid", "want a square over A P T ."),
        ("A.TTT", "AATTT", "grid", "got 2 letters A, want 1"),
        (".P...", ".....", "grid", "got 0 letters P, want 1"),
        ("A.TTT", "A.TT.", "grid", "want 2 rows and 3 columns"),
    ),
}


@pytest.mark.parametrize(
    ("task", "line", "new", "key", "says"),
    [(task, *change) for task in TASKS for change in (*COMMON, *CHANGES[task])],
)
def test_a_damaged_board_is_refused_with_its_key(
    task: str, line: str, new: str, key: str, says: str
) -> None:
    lines = kept(task).splitlines()
    first = next(i for i, old in enumerate(lines) if old.startswith(line))
    text = "\n".join([*lines[:first], new, *lines[first + 1 :]]) + "\n"
    with pytest.raises(ValueError, match=says) as error:
        ENVS[task].from_text(text, source="some/file.txt")
    assert str(error.value).startswith(f"some/file.txt: {key}: got ")
    assert ", want " in str(error.value)


@pytest.mark.parametrize("task", TASKS)
def test_every_key_is_needed(task: str) -> None:
    lines = kept(task).splitlines()
    for line in (line for line in lines if "=" in line or line.endswith(":")):
        text = "\n".join(other for other in lines if other != line)
        key = line.partition("=")[0].rstrip(":")
        with pytest.raises(ValueError, match=r"^board\.txt: ") as error:
            ENVS[task].from_text(text, source="board.txt")
        if "=" in line:
            assert str(error.value) == f"board.txt: {key}: got no such line, want {key}=..."
    with pytest.raises(ValueError, match=r"^board\.txt: task: got no such line"):
        ENVS[task].from_text("", source="board.txt")


def test_an_unsolvable_board_is_refused_and_cannot_be_written() -> None:
    text = kept("frozenlake").replace("FFHH", "HHHH")
    with pytest.raises(
        ValueError, match=r"board\.txt: map: got a board whose goal cannot be reached, want"
    ):
        ENVS["frozenlake"].from_text(text, source="board.txt")
    apart = MazeState(((15, 15), (15, 15)), (0, 0), (1, 1))
    with pytest.raises(ValueError, match="goal cannot be reached"):
        ENVS["maze"].to_text(apart, split="train", index=0, seed=0)
