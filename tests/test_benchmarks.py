"""Benchmark files: read whole, and refused with file, line and key where they are malformed."""

import copy
import json
import pathlib
import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from mgsd_jax.data import benchmarks, splits
from mgsd_jax.data.public_boards import Case, read_visualplanning
from mgsd_jax.envs import ENVS

ROOT = pathlib.Path(__file__).parents[1]
DATA = ROOT / "tests" / "data" / "benchmarks"
REFERENCE = ROOT.parent / "shared" / "reference" / "benchmarks"
DIFFTHINKER = {
    (name.split("_")[0], int(name.split("_")[2])): public.places[0]
    for name, public in benchmarks.PUBLIC.items()
    if "diffthinker" in name
}
FILE = "visualplanning/dataset/{}/tokenized_dataset/SFT/test_dataset.jsonl"


def check_case(case: Case) -> None:
    env = ENVS[case.board.task]
    assert case.board.state.size == case.board.level
    plan = env.shortest_plan(case.board.state)
    assert plan and env.play(case.board.state, plan).optimal
    assert env.render(case.board.state).shape == (256, 256, 3)


@pytest.mark.parametrize(
    ("name", "ids"),
    [
        (
            "vsp",
            [
                "frozenlake_diffthinker_vsp_level3_0000",
                "frozenlake_diffthinker_vsp_level3_0010",
                "frozenlake_diffthinker_vsp_level4_0000",
            ],
        ),
        (
            "visualplanning",
            [
                "frozenlake_test_level3_0000",
                "frozenlake_test_level4_0001",
                "maze_test_level3_0000",
                "maze_test_level4_0001",
                "minibehaviour_test_level5_0004",
                "minibehaviour_test_level6_0012",
            ],
        ),
    ],
)
def test_small_copies_of_both_formats(name: str, ids: list[str]) -> None:
    cases = benchmarks.read_benchmark(DATA / name)
    assert [case.id for case in cases] == ids
    for case in cases:
        check_case(case)
        assert (case.board.picture_path is not None) == (name == "vsp")


def test_files_say_what_the_states_say() -> None:
    case = benchmarks.read_benchmark(DATA / "vsp")[0]
    drawn = (DATA / "vsp/level3/table/0.txt").read_text().splitlines()[1:]
    letters = {"S": "@", "G": "*", "H": "#", "F": "_"}
    for number, (line, row) in enumerate(zip(drawn, case.board.state.rows, strict=True), start=1):
        assert line == f"| Row {number} | " + " | ".join(letters[tile] for tile in row) + " |"
    path = DATA / FILE.format("maze")
    meta = json.loads(path.read_text().splitlines()[1])["meta"]
    state = read_visualplanning(path, task="maze")[1].board.state
    for r, c in ((r, c) for r in range(4) for c in range(4)):
        sides = meta["layout"][r][c]
        assert state.walls[r][c] == (
            sides["north"] + 2 * sides["south"] + 4 * sides["west"] + 8 * sides["east"]
        )
    assert state.start == divmod(meta["start_pos"], 4)
    assert state.target == divmod(meta["target_pos"], 4)


@pytest.mark.parametrize("name", ["frozenlake_vsp", "visualplanning", "diffthinker"])
def test_reference_samples(name: str) -> None:
    folder = REFERENCE / name
    if not folder.is_dir():
        pytest.skip(f"no sample of {name} beside the repository")
    cases = benchmarks.read_benchmark(folder)
    assert len({case.id for case in cases}) == len(cases) >= 25
    counts = Counter((case.board.task, case.board.level) for case in cases)
    if name == "frozenlake_vsp":
        assert set(counts) == {("frozenlake", level) for level in range(3, 9)}
    elif name == "diffthinker":
        assert counts == dict.fromkeys(DIFFTHINKER, 5)
    else:
        assert {task for task, _ in counts} >= {"frozenlake", "minibehaviour"}
    for case in cases:
        check_case(case)


def test_keys_are_those_of_the_boards() -> None:
    folders = [DATA / "vsp", str(DATA / "visualplanning")]
    keys = benchmarks.benchmark_keys(folders)
    cases = [case for folder in folders for case in benchmarks.read_benchmark(folder)]
    assert keys == {ENVS[case.board.task].key(case.board.state) for case in cases}
    assert len(keys) == 7  # the FrozenLake rows repeat two boards of the maps
    assert benchmarks.benchmark_keys([]) == frozenset()


def test_excluded_boards_are_never_drawn() -> None:
    keys = benchmarks.benchmark_keys([DATA / "visualplanning"])
    with pytest.raises(ValueError, match="exactly") as without:
        splits.unique_boards("minibehaviour", 5, "test", 10_000, seed=0)
    with pytest.raises(ValueError, match="exactly") as excluded:
        splits.unique_boards("minibehaviour", 5, "test", 10_000, seed=0, exclude=keys)

    def count(error: Any) -> int:
        return int(str(error.value).split("exactly ")[1].split()[0])

    assert count(without) - count(excluded) == 1


def test_an_absent_or_foreign_folder_says_where_the_files_come_from(tmp_path: pathlib.Path) -> None:
    for folder in (tmp_path / "absent", tmp_path):
        with pytest.raises(ValueError, match=r"want .*VSP benchmark.*VisualPlanning"):
            benchmarks.read_benchmark(folder)
    with pytest.raises(ValueError, match=r"test_dataset\.jsonl: not found"):
        read_visualplanning(tmp_path / "test_dataset.jsonl", task="maze")
    file = tmp_path / FILE.format("chess")
    file.parent.mkdir(parents=True)
    file.touch()
    with pytest.raises(ValueError, match=r"chess/.*: got a benchmark of another task"):
        benchmarks.read_benchmark(tmp_path / "visualplanning")


def replaced(old: str, new: str) -> Callable[[str], str]:
    def change(text: str) -> str:
        assert old in text
        return text.replace(old, new, 1)

    return change


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("table/0.txt", replaced("_", "x"), r"table/0.txt, line \d, Col \d: got 'x', want one of"),
        ("table/0.txt", replaced("Row 2", "Row 3"), r"0.txt, line 3: got .*want '\| Row 2"),
        ("table/0.txt", replaced("| Row 2 |", "| Row 2 | _ |"), "line 3: got .* 3 tiles"),
        ("table/0.txt", lambda text: text.rsplit("|", 3)[0], "line 4: got"),
        ("table/0.txt", lambda text: text[: text.index("| Row 3")], "got '2 rows', want 3 rows"),
        ("table/0.txt", replaced("@", "_"), "layout: got '0 tiles S', want just one"),
        ("table/0.txt", replaced("*", "@"), "layout: got '2 tiles S'"),
        ("metadata.json", lambda text: text[:-4], "metadata.json: got no valid JSON"),
        ("metadata.json", lambda _: "[]", "metadata.json: got .*want a JSON object"),
        (
            "metadata.json",
            replaced('"0.png"', '"1.png"'),
            "0.png: got None, want a plan over",
        ),
        ("metadata.json", lambda _: '{"0.png": 3, "10.png": ""}', "0.png: got 3, want a plan over"),
        ("metadata.json", lambda _: '{"0.png": "X"}', "0.png: got 'X', want a plan over"),
        ("metadata.json", lambda _: '{"0.png": "UDUDUD"}', "0.png: got .*want a shortest plan"),
    ],
)
def test_malformed_maps_are_refused(
    tmp_path: pathlib.Path, file: str, change: Callable[[str], str], message: str
) -> None:
    shutil.copytree(DATA / "vsp" / "level3", tmp_path / "level3")
    path = tmp_path / "level3" / file
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        benchmarks.read_benchmark(tmp_path)


def test_maps_miss_no_file(tmp_path: pathlib.Path) -> None:
    shutil.copytree(DATA / "vsp", tmp_path, dirs_exist_ok=True)
    (tmp_path / "level3/img/10.png").unlink()
    with pytest.raises(ValueError, match=r"10.png: not found, the picture of 10.txt"):
        benchmarks.read_benchmark(tmp_path)
    (tmp_path / "level3/table/notes.txt").touch()
    with pytest.raises(ValueError, match=r"table: got 'notes.txt', want names like"):
        benchmarks.read_benchmark(tmp_path)


def test_maps_without_plans_are_solved(tmp_path: pathlib.Path) -> None:
    shutil.copytree(DATA / "vsp", tmp_path, dirs_exist_ok=True)
    want = benchmarks.read_benchmark(tmp_path)
    for file in tmp_path.glob("*/metadata.json"):
        file.unlink()
    assert benchmarks.read_benchmark(tmp_path) == want
    table = tmp_path / "level3/table/0.txt"
    table.write_text(
        HEADER + "| Row 1 | @ | # | * |\n| Row 2 | # | # | _ |\n| Row 3 | _ | _ | _ |\n"
    )
    with pytest.raises(ValueError, match=r"0.txt: got a board without a plan"):
        benchmarks.read_benchmark(tmp_path)


HEADER = "| | Col 1 | Col 2 | Col 3 |\n"


def write_diffthinker(root: pathlib.Path, boards: int = 3) -> dict[str, Any]:
    """A folder in DiffThinker's form with boards of ours; returns their states by name."""
    rng = np.random.default_rng(0)
    letters = {"S": "@", "G": "*", "H": "#", "F": "_"}
    states: dict[str, Any] = {}
    for (task, level), place in DIFFTHINKER.items():
        plans, folder = {}, root / place
        (folder / "table").mkdir(parents=True)
        for number in range(1, boards + 1):
            state = ENVS[task].generate(rng, level)
            name = f"{level}_9_{number:03d}" if task == "maze" else f"{level}_9_0.8_{number:03d}"
            plan = "".join(word[0].upper() for word in ENVS[task].shortest_plan(state))
            states[f"{task}_diffthinker_{name}"] = state
            (folder / f"{name}.png").write_bytes(b"")
            (folder / f"{name}_solution.png").write_bytes(b"")
            if task == "maze":
                plans[name] = plan
                numbers = ((level,), state.start, state.target, *state.walls)
                lines = [" ".join(map(str, line)) for line in numbers]
                (folder / f"{name}.txt").write_text("\n".join(lines) + "\n")
                continue
            plans[f"{name}.png"] = plan
            rows = [" | ".join(letters[tile] for tile in row) for row in state.rows]
            lines = [f"| Row {i} | {row} |" for i, row in enumerate(rows, 1)]
            (folder / "table" / f"{name}.txt").write_text("\n".join(["| |", *lines]))
        name = "path.json" if task == "maze" else "metadata.json"
        (folder / name).write_text(json.dumps(plans))
    return states


def test_diffthinker_boards_are_read_by_name(tmp_path: pathlib.Path) -> None:
    states = write_diffthinker(tmp_path)
    shutil.copytree(DATA / "vsp", tmp_path / "FrozenLake/VSP/maps")
    cases = benchmarks.read_benchmark(tmp_path)
    assert {case.id: case.board.state for case in cases if "_vsp_" not in case.id} == states
    assert sum("_vsp_" in case.id for case in cases) == 3
    assert [case.board.index for case in cases if case.board.level == 32] == [9001, 9002, 9003] * 2
    for case in cases:
        assert pathlib.Path(str(case.board.picture_path)).is_file()
    for file in tmp_path.rglob("*.json"):
        file.unlink()
    assert benchmarks.read_benchmark(tmp_path) == cases


@pytest.mark.parametrize(
    ("file", "change", "message"),
    [
        ("Maze/8_test/8_9_001.txt", lambda t: "9" + t[1:], "line 1: got 9, want 8 as its folder"),
        (
            "Maze/8_test/8_9_001.txt",
            lambda t: t.rsplit("\n", 2)[0],
            "lines of .*want 1, 2, 2 and 8",
        ),
        ("Maze/8_test/8_9_001.txt", lambda t: t[:-1] + " 3\n", "lines of"),
        ("Maze/8_test/8_9_001.txt", lambda t: t[:-3] + "16\n", r"line 11: got '16', want"),
        ("Maze/8_test/8_9_001.txt", lambda t: t[:-2] + "²\n", "line 11: got '.*²', want"),
        (
            "Maze/8_test/8_9_001.txt",
            lambda t: "8\n8 8\n" + t.split("\n", 2)[2],
            "start: got .8, 8.",
        ),
        ("Maze/8_test/8_9_001.txt", lambda t: t[:-3] + "15\n", r"got .*want its neighbour's"),
        ("Maze/8_test/path.json", lambda t: "{}", "path.json, 8_9_001: got"),
        (
            "Maze/8_test/path.json",
            lambda t: t.replace('": "', '": "X', 1),
            "got 'X.*want a plan over",
        ),
        ("FrozenLake/16_test/metadata.json", lambda t: "[]", "metadata.json: got .*JSON object"),
        ("FrozenLake/16_test/table/16_9_0.8_001.txt", lambda t: t + "\n| Row 17 |", "line 18: got"),
    ],
)
def test_malformed_diffthinker_boards_are_refused(
    tmp_path: pathlib.Path, file: str, change: Callable[[str], str], message: str
) -> None:
    write_diffthinker(tmp_path, boards=1)
    path = tmp_path / file
    path.write_text(change(path.read_text()))
    with pytest.raises(ValueError, match=message):
        benchmarks.read_benchmark(tmp_path)


def test_diffthinker_names_are_checked(tmp_path: pathlib.Path) -> None:
    write_diffthinker(tmp_path, boards=1)
    folder = tmp_path / "FrozenLake/16_test/table"
    shutil.copyfile(folder / "16_9_0.8_001.txt", folder / "16_9_0.9_001.txt")
    shutil.copyfile(folder.parent / "16_9_0.8_001.png", folder.parent / "16_9_0.9_001.png")
    (tmp_path / "FrozenLake/16_test/metadata.json").unlink()
    with pytest.raises(ValueError, match=r"got .*16_9_0.8_001 and .*16_9_0.9_001 of one number"):
        benchmarks.read_benchmark(tmp_path)
    (folder / "16_9_0.9_001.txt").rename(folder / "notes.txt")
    with pytest.raises(ValueError, match=r"got 'notes.txt', want names like 16_17_001.txt"):
        benchmarks.read_benchmark(tmp_path)
    (tmp_path / "Maze/32_test/32_9_001.txt").unlink()
    (folder / "notes.txt").unlink()
    with pytest.raises(ValueError, match=r"32_test: no boards found"):
        benchmarks.read_benchmark(tmp_path)


def setter(*path: str | int, value: Any) -> Callable[[dict[str, Any]], None]:
    """Changes one value deep in a row; `...` deletes its key."""

    def change(row: dict[str, Any]) -> None:
        inner: Any = row
        for step in path[:-1]:
            inner = inner[step]
        if value is ...:
            del inner[path[-1]]
        else:
            inner[path[-1]] = value

    return change


@pytest.mark.parametrize(
    ("task", "change", "message"),
    [
        *[
            (task, change, message)
            for task in ("frozenlake", "maze", "minibehaviour")
            for change, message in (
                (setter("meta", value=...), "meta: not found, want dict"),
                (setter("meta", value=[]), r"meta: got \[\], want dict"),
                (setter("meta", "level", value=...), "level: not found, want int"),
                (setter("meta", "level", value="3"), "level: got '3', want int"),
                (setter("meta", "level", value=True), "level: got True, want int"),
                (setter("meta", "level", value=99), "level: got 99, want"),
                (setter("meta", "start_pos", value=...), "start_pos: not found"),
                (setter("meta", "start_pos", value=-1), "start_pos: got -1, want"),
                (setter("meta", "start_pos", value=[0, 9]), "start_pos: got .*want"),
                (setter("input_state", value=...), "input_state: not found"),
                (setter("input_state", value=[0] * 40), "input_state: got '39 actions', want"),
            )
        ],
        *[
            (task, change, message)
            for task in ("frozenlake", "maze")
            for change, message in (
                (setter("meta", "layout", value="SFFG"), "layout: got 'SFFG', want list"),
                (setter("meta", "layout", 1, value=[]), "layout: got .*want 4 rows of 4 cells"),
                (setter("meta", "layout", 1, value=None), "layout: got .*want 4 rows"),
                (setter("meta", "target_pos", value=16), r"target_pos: got 16, want row \* 4"),
                (setter("meta", "layout", 1, 2, value="?"), r"layout\[1\]\[2\]: got '\?', want"),
            )
        ],
        ("frozenlake", setter("meta", "start_pos", value=9), "start_pos: got .*cell of S"),
        ("frozenlake", setter("meta", "layout", 0, value=list("SFFF")), "layout: got '2 tiles S'"),
        ("maze", setter("meta", "layout", 1, 1, "east", value=1), r"layout\[1\]\[1\]: east: got 1"),
        ("maze", setter("meta", "layout", 2, 0, "west", value=False), "want walls around"),
        ("maze", setter("meta", "layout", 0, 3, "north", value=False), "want walls around"),
        ("maze", setter("meta", "layout", 3, 0, "south", value=False), "want its neighbour's"),
        ("minibehaviour", setter("meta", "printer_pos", value=[0]), "printer_pos: got"),
        ("minibehaviour", setter("meta", "printer_pos", value=[5, 2]), "start_pos: got .*off"),
        ("minibehaviour", setter("meta", "start_pos", value=[5, 2]), "start_pos: got .*off"),
        ("minibehaviour", setter("meta", "table_pos", value=[]), "table_pos: got .*2 x 3"),
        ("minibehaviour", setter("meta", "table_pos", 0, value=[0, 0]), "table_pos: got .*2 x 3"),
        ("minibehaviour", setter("meta", "table_pos", 0, value=[0.0, 0]), "table_pos: got"),
        ("minibehaviour", setter("meta", "table_neighbors", value=[]), "table_neighbors: got"),
        ("minibehaviour", setter("meta", "printer_neighbors", 0, value=[0, 0]), "printer_neighb"),
        ("minibehaviour", setter("meta", "idx", value="7"), "idx: got '7', want int"),
    ],
)
def test_malformed_rows_are_refused(
    tmp_path: pathlib.Path, task: str, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    lines = (DATA / FILE.format(task)).read_text().splitlines()
    row = copy.deepcopy(json.loads(lines[1]))
    change(row)
    path = tmp_path / "test_dataset.jsonl"
    path.write_text(f"{lines[0]}\n{json.dumps(row)}\n")
    with pytest.raises(ValueError, match=f"test_dataset.jsonl, line 2.*{message}"):
        read_visualplanning(path, task=task)


def test_files_that_hold_no_rows_are_refused(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "test_dataset.jsonl"
    for content, message in (
        (b"", "got 'an empty file', want"),
        (b"{\n", "line 1: got .*want JSON"),
        (b"[1]\n", r"line 1: got b'\[1\]', want a JSON object"),
        (b"\xff\n", "got invalid start byte at byte 0, want UTF-8"),
    ):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            read_visualplanning(path, task="maze")
