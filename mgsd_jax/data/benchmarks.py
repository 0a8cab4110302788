"""Public benchmarks by name: where they lie, what to evaluate on them, what not to train on."""

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Iterable, Sequence

from absl import logging
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.checks.fields import field, read_json
from mgsd_jax.config import Benchmark, DataConfig
from mgsd_jax.data.boards import MANIFEST, Board, case_name, read_levels, read_split
from mgsd_jax.data.public_boards import Case, read_diffthinker, read_visualplanning, read_vsp
from mgsd_jax.data.splits import split_of
from mgsd_jax.envs import ENVS


@dataclasses.dataclass(frozen=True)
class Public:
    """A benchmark that results are quoted on: what it holds, where it lies, where to get it."""

    boards: int  # in the public files
    places: tuple[str, ...]  # patterns of paths in its folder
    read: Callable[[pathlib.Path], list[Case]]  # of a path that matches
    source: str


_DIFFTHINKER_SOURCE = "github.com/lcqysl/DiffThinker"
_VSP_SOURCE = (
    "the maps of the VSP benchmark (github.com/UCSB-NLP-Chang/Visual-Spatial-Planning under "
    f"VSP-main/maze/task-main/maps, also in {_DIFFTHINKER_SOURCE} under FrozenLake/VSP/maps): "
    "level3 .. level8, each with img and table"
)
_VISUALPLANNING_SOURCE = "the data of VisualPlanning (github.com/yix8/VisualPlanning)"
_VISUALPLANNING = "dataset/{}/tokenized_dataset/SFT/test_dataset.jsonl"


def _visualplanning(task: str, boards: int, note: str = "") -> Public:
    read = functools.partial(read_visualplanning, task=task)
    return Public(boards, (_VISUALPLANNING.format(task),), read, _VISUALPLANNING_SOURCE + note)


def _diffthinker(task: str, level: int, place: str) -> Public:
    read = functools.partial(read_diffthinker, task=task, level=level)
    return Public(100, (place,), read, _DIFFTHINKER_SOURCE)


PUBLIC: dict[Benchmark, Public] = {
    "frozenlake_vsp": Public(
        600, ("level*/table", "FrozenLake/VSP/maps/level*/table"), read_vsp, _VSP_SOURCE
    ),
    "frozenlake_visualplanning": _visualplanning("frozenlake", 1000),
    "maze_visualplanning": _visualplanning(
        "maze",
        1000,
        "; where its maze file is not at hand, 'maze_held_out' (a folder of --stage=generate) "
        "stands in for it",
    ),
    "minibehaviour_visualplanning": _visualplanning("minibehaviour", 403),
    "frozenlake_diffthinker_16": _diffthinker("frozenlake", 16, "FrozenLake/16_test"),
    "frozenlake_diffthinker_32": _diffthinker("frozenlake", 32, "FrozenLake/32_test"),
    "maze_diffthinker_8": _diffthinker("maze", 8, "Maze/8_test"),
    "maze_diffthinker_16": _diffthinker("maze", 16, "Maze/16_test"),
    "maze_diffthinker_32": _diffthinker("maze", 32, "Maze/32_test"),
}


def read_public(name: Benchmark, folder: str | pathlib.Path) -> list[Case]:
    """The boards of the benchmark `name` in `folder`, in the order of its files.

    Raises ValueError that says where to get it where the folder does not hold it, else that names
    file, line and key of the first thing that is not as it should be.
    """
    public, root = PUBLIC[name], pathlib.Path(folder)
    found = _find(public, root)
    if not found:
        raise ValueError(f"{root}: {public.places[0]} not found; it is part of {public.source}")
    cases = [case for path in found for case in public.read(path)]
    names: dict[tuple[object, ...], str] = {}
    for case in cases:
        if names.setdefault(case.board[:3], case.id) != case.id:
            raise ValueError(
                f"{root}: got {names[case.board[:3]]} and {case.id} of one number, want numbers "
                "that differ"
            )
    return cases


def _find(public: Public, root: pathlib.Path) -> list[pathlib.Path]:
    return [path for pattern in public.places for path in sorted(root.glob(pattern))]


def read_benchmark(folder: str | pathlib.Path) -> list[Case]:
    """The boards of every public benchmark in a folder. Raises ValueError where it holds none."""
    root = pathlib.Path(folder)
    found = [name for name, public in PUBLIC.items() if _find(public, root)]
    known = {_VISUALPLANNING.format(task) for task in ENVS}
    for file in root.glob(_VISUALPLANNING.format("*")):
        if str(file.relative_to(root)) not in known:
            raise ValueError(f"{file}: got a benchmark of another task, want one of {[*ENVS]}")
    if not found:
        sources = {public.source: public.places[0] for public in PUBLIC.values()}
        listed = "; ".join(f"{place} of {source}" for source, place in sources.items())
        raise ValueError(f"{root}: no public benchmark found, want one of these: {listed}")
    return [case for name in found for case in read_public(name, root)]


def benchmark_keys(folders: Iterable[str | pathlib.Path]) -> frozenset[str]:
    """Content keys of all boards of these benchmark folders, for `exclude` of a draw."""
    return frozenset(_key(case.board) for folder in folders for case in read_benchmark(folder))


def _key(board: Board) -> str:
    return ENVS[board.task].key(board.state)


def read_testsets(named: Sequence[tuple[Benchmark, str]]) -> tuple[list[Board], list[str]]:
    """The boards of (name, folder) benchmarks in order, and the name of each in its benchmark.

    Raises ValueError for a benchmark that is not there (saying where to get it) or is malformed,
    and for two of which one row's task, level and index would mean two boards.
    """
    cases: list[Case] = []
    owner: dict[tuple[str, int], str] = {}
    names = [name for name, _ in named]
    for name, folder in named:
        if names.count(name) > 1:
            raise ValueError(f"evaluate.benchmarks: got {name} twice, want it once")
        found = _read_testset(name, folder)
        for task, level in sorted({case.board[:2] for case in found}):
            if owner.setdefault((task, level), name) != name:
                raise ValueError(
                    f"evaluate.benchmarks: got {task} level {level} in {owner[task, level]} and in "
                    f"{name}, want each level in one of them (another evaluate.folder for the rest)"
                )
        cases += found
    return [case.board for case in cases], [case.id for case in cases]


def _read_testset(name: Benchmark, folder: str) -> list[Case]:
    if name == "maze_held_out":
        return _held_out_mazes(folder)
    cases, want = read_public(name, folder), PUBLIC[name].boards
    if len(cases) != want:
        logging.warning("%s: %s has %d boards of %d", folder, name, len(cases), want)
    return cases


def _held_out_mazes(folder: str) -> list[Case]:
    if not (pathlib.Path(folder) / MANIFEST).is_file():
        raise ValueError(
            f"{folder}: {MANIFEST} not found, want the folder of boards that --stage=generate "
            "wrote, with mazes in its test split"
        )
    boards = read_split(folder, "test")
    mazes = [Case(case_name(board), board) for board in boards if board.task == "maze"]
    if not mazes:
        raise ValueError(f"{folder}: no maze in the test split, want some")
    return mazes


def warn_of_seen(name: str, source: epath.PathLike, boards: Sequence[Board]) -> None:
    """Warns where a model was trained or validated on some of `boards`, and says on how many.

    `source` is the folder that a stage left; any other folder does not know its boards. The stages
    that it started from count too.
    """
    keys = [_key(board) for board in boards]
    root, seen = epath.Path(source), set[str]()
    while (root / "model" / "source.json").is_file():
        file = root / "config.json"
        data = config_lib.coerce(read_json(file).get("data"), DataConfig, f"{file}: data")
        folder = config_lib.located(data.folder, str(root.parent))
        if data.source == "stream":
            seen |= _drawable(data, str(root.parent), boards)
        elif (epath.Path(folder) / MANIFEST).exists():
            levels = {(board.task, board.level) for board in boards}
            seen |= {_key(board) for board in read_levels(folder, ("train", "val"), levels)}
        else:
            logging.warning("%s: no boards in %s, so it may have seen the test's", name, folder)
        file = root / "model" / "source.json"
        weights = field(read_json(file), "weights", str, file)
        root = epath.Path(config_lib.located(weights, str(root.parent)))
    count = sum(key in seen for key in keys)
    if count:
        logging.warning(
            "%s: %d of the %d boards were in its training or validation; for numbers to quote, "
            "train with the benchmark's folder in data.exclude",
            *(name, count, len(boards)),
        )


def _drawable(data: DataConfig, workdir: str, boards: Sequence[Board]) -> set[str]:
    """Keys of those boards that a run which draws its boards on the fly may have drawn."""
    folders = [config_lib.located(folder, workdir) for folder in data.exclude]
    excluded = benchmark_keys(f for f in folders if pathlib.Path(f).is_dir())
    drawn = {(kind.task, level) for kind in data.boards for level in kind.levels}
    keys = {_key(board) for board in boards if board[:2] in drawn}
    return {key for key in keys - excluded if split_of(key) != "test"}
