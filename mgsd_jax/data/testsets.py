"""Named benchmarks as boards to evaluate on: the public ones, and our held-out mazes."""

import dataclasses
import pathlib
from collections.abc import Sequence

import numpy as np
from absl import logging
from etils import epath
from PIL import Image

from mgsd_jax import config as config_lib
from mgsd_jax.checks.fields import field, read_json
from mgsd_jax.config import Benchmark, DataConfig
from mgsd_jax.data import benchmarks
from mgsd_jax.data.boards import MANIFEST, Board, read_levels, read_split
from mgsd_jax.data.pictures import open_picture
from mgsd_jax.data.splits import split_of
from mgsd_jax.envs import ENVS

_DIFFTHINKER_SOURCE = "github.com/lcqysl/DiffThinker"
_VSP_SOURCE = (
    "the maps of the VSP benchmark (github.com/UCSB-NLP-Chang/Visual-Spatial-Planning under "
    f"VSP-main/maze/task-main/maps, also in {_DIFFTHINKER_SOURCE} under FrozenLake/VSP/maps): "
    "level3 .. level8, each with img and table"
)
_VISUALPLANNING_SOURCE = "the data of VisualPlanning (github.com/yix8/VisualPlanning)"


@dataclasses.dataclass(frozen=True)
class Public:
    """A benchmark that results are quoted on, by name: what it holds and where to get it."""

    task: str
    boards: int  # in the public files
    place: str  # where it lies in its folder: a pattern of paths
    source: str
    level: int | None = None  # None: several


def _visualplanning(task: str, boards: int, note: str = "") -> Public:
    place = benchmarks.VISUALPLANNING.format(task=task)
    return Public(task, boards, place, _VISUALPLANNING_SOURCE + note)


PUBLIC = {
    "frozenlake_vsp": Public("frozenlake", 600, benchmarks.VSP, _VSP_SOURCE),
    "frozenlake_visualplanning": _visualplanning("frozenlake", 1000),
    "minibehaviour_visualplanning": _visualplanning("minibehaviour", 403),
    "maze_visualplanning": _visualplanning(
        "maze",
        1000,
        "; where its maze file is not at hand, 'maze_held_out' (a folder of --stage=generate) "
        "stands in for it",
    ),
    **{
        f"{task}_diffthinker_{level}": Public(task, 100, place, _DIFFTHINKER_SOURCE, level)
        for (task, level), place in benchmarks.DIFFTHINKER.items()
    },
}


def read_public(name: str, folder: str | pathlib.Path) -> tuple[benchmarks.Case, ...]:
    """The boards of the benchmark `name` of PUBLIC in `folder`.

    Raises ValueError that says where to get it where the folder does not hold it, else that names
    file, line and key of the first thing that is not as it should be.
    """
    named, root = PUBLIC[name], pathlib.Path(folder)
    if not any(root.glob(named.place)):
        raise ValueError(f"{root}: got no {named.place} there, want it of {named.source}")
    if named.level is not None:
        return benchmarks.read_diffthinker(root / named.place, named.task, named.level)
    if named.place == benchmarks.VSP:
        return benchmarks.read_vsp(root)
    return benchmarks.read_visualplanning(root / named.place, named.task)


def read_testsets(named: Sequence[tuple[Benchmark, str]]) -> tuple[list[Board], list[str]]:
    """The boards of (name, folder) benchmarks in order, and the name of each in its benchmark.

    `picture_path` of a board is the benchmark's own picture, None where it has none. Raises
    ValueError for a benchmark that is not there (saying where to get it) or is malformed, and for
    two of which one row's task, level and index would mean two boards.
    """
    boards: list[Board] = []
    cases: list[str] = []
    owner: dict[tuple[str, int], str] = {}
    names = [name for name, _ in named]
    for name, folder in named:
        if names.count(name) > 1:
            raise ValueError(f"evaluate.benchmarks: got {name} twice, want it once")
        found = _read(name, folder)
        for task, level in sorted({(board.task, board.level) for board, _ in found}):
            if owner.setdefault((task, level), name) != name:
                raise ValueError(
                    f"evaluate.benchmarks: got {task} level {level} in {owner[task, level]} and in "
                    f"{name}, want each level in one of them (another evaluate.folder for the rest)"
                )
        boards += [board for board, _ in found]
        cases += [case for _, case in found]
    return boards, cases


def _read(name: Benchmark, folder: str) -> list[tuple[Board, str]]:
    if name == "maze_held_out":
        return _held_out_mazes(folder)
    cases = read_public(name, folder)
    want = PUBLIC[name].boards
    if len(cases) != want:
        logging.warning("%s: %s has %d boards of %d", folder, name, len(cases), want)
    return [
        (Board(case.task, case.level, case.index, case.state, case.picture_path), case.id)
        for case in cases
    ]


def _held_out_mazes(folder: str) -> list[tuple[Board, str]]:
    if not (pathlib.Path(folder) / MANIFEST).is_file():
        raise ValueError(
            f"{folder}: got no {MANIFEST} there, want the folder of boards that --stage=generate "
            "wrote, with mazes in its test split"
        )
    mazes = [board for board in read_split(folder, "test") if board.task == "maze"]
    if not mazes:
        raise ValueError(f"{folder}: got no maze in the test split, want some")
    return [(board, case_name(board)) for board in mazes]


def warn_of_seen(name: str, source: epath.PathLike, boards: Sequence[Board]) -> None:
    """Warns where a model was trained, or chosen, on some of `boards`, and says on how many.

    `source` is the folder that a stage left; any other folder knows nothing of its boards. The
    stages that it started from count too.
    """
    keys = [ENVS[board.task].key(board.state) for board in boards]
    root, seen = epath.Path(source), set[str]()
    while (root / "model" / "source.json").is_file():
        file = root / "config.json"
        data = config_lib.coerce(read_json(file).get("data"), DataConfig, f"{file}: data")
        folder = data.folder.replace("{workdir}", str(root.parent))
        if data.source == "stream":
            seen |= _drawable(data, str(root.parent), boards)
        elif (epath.Path(folder) / MANIFEST).exists():
            levels = {(board.task, board.level) for board in boards}
            found = read_levels(folder, ("train", "val"), levels)
            seen |= {ENVS[board.task].key(board.state) for board in found}
        else:
            logging.warning("%s: got no boards in %s, so it may have seen the test's", name, folder)
        file = root / "model" / "source.json"
        root = epath.Path(field(read_json(file), "weights", str, file))
    count = sum(key in seen for key in keys)
    if count:
        logging.warning(
            "%s: %d of the %d boards were in its training or validation; for numbers to quote, "
            "train with the benchmark's folder in data.exclude",
            *(name, count, len(boards)),
        )


def _drawable(data: DataConfig, workdir: str, boards: Sequence[Board]) -> set[str]:
    """Keys of the boards that a run may have drawn that makes its boards on the fly."""
    folders = [folder.replace("{workdir}", workdir) for folder in data.exclude]
    excluded = benchmarks.benchmark_keys(f for f in folders if pathlib.Path(f).is_dir())
    drawn = {(kind.task, level) for kind in data.boards for level in kind.levels}
    keys = {ENVS[b.task].key(b.state) for b in boards if (b.task, b.level) in drawn}
    return {key for key in keys - excluded if split_of(key) != "test"}


def case_name(board: Board) -> str:
    """The name of a board of a test split, in the manner of the public evaluator."""
    return f"{board.task}_test_level{board.level}_{board.index:04d}"


def read_picture(path: str, size: int) -> np.ndarray:
    """A benchmark's picture, uint8 [size, size, 3]; resized as the public evaluator does.

    Raises ValueError naming the file where it is no picture.
    """
    picture = open_picture(path, path).convert("RGB")
    return np.asarray(picture.resize((size, size), Image.Resampling.LANCZOS))
