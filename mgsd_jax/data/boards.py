"""Boards, and the folders of boards that `--stage=generate` writes.

Folders may be local or on any file system that etils knows (gs://).
"""

import concurrent.futures
import dataclasses
import hashlib
import io
from collections.abc import Callable, Collection, Sequence
from typing import NamedTuple, overload

from etils import epath

from mgsd_jax.checks import fields
from mgsd_jax.checks.fields import Json
from mgsd_jax.data.pictures import open_picture
from mgsd_jax.data.splits import SPLITS, Split
from mgsd_jax.envs import ENVS, AnyState, find

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
_RESTORE = f"to restore it, delete {MANIFEST} and run --stage=generate again"
_READERS = 16  # files read at once: each file of a remote folder takes tens of milliseconds


class Board(NamedTuple):
    """One board of a split or of a benchmark."""

    task: str
    level: int
    index: int  # unique within its split or benchmark, task and level
    state: AnyState  # of the task's env
    picture_path: str | None  # a benchmark's own picture; None where we draw the board


@dataclasses.dataclass(frozen=True)
class LazyBoards(Sequence[Board]):
    """Boards that are made when they are asked for."""

    size: int
    make: Callable[[int], Board]  # by place, 0 to size - 1

    def __len__(self) -> int:
        return self.size

    @overload
    def __getitem__(self, index: int) -> Board: ...
    @overload
    def __getitem__(self, index: slice) -> list[Board]: ...

    def __getitem__(self, index: int | slice) -> Board | list[Board]:
        places = range(self.size)[index]
        return [self.make(i) for i in places] if isinstance(places, range) else self.make(places)


@dataclasses.dataclass(frozen=True)
class Group:
    """The boards of one split, task and level in a manifest."""

    folder: str  # within the root
    split: str
    task: str
    level: int
    count: int
    text: tuple[str, ...] = ()  # content hash of each board's text
    image: tuple[str, ...] = ()  # content hash of each board's picture


def read_split(
    root: epath.PathLike, split: Split, share: tuple[int, int] = (0, 1)
) -> Sequence[Board]:
    """The boards of one split, by task and level in the order of the manifest.

    With a `share` (i, n) only every n-th board from i on is read and checked now, the others when
    they are asked for: n processes with a share each check all. Raises ValueError naming the file
    where a text is missing, malformed or not what the manifest says. Pictures are not read.
    """
    root = epath.Path(root)
    entries = [entry for group in read_groups(root) if group.split == split for entry in _in(group)]
    if not entries:
        raise ValueError(f"{root / MANIFEST}: no boards of split {split!r}, want some")
    places = range(share[0], len(entries), share[1])
    known = dict(zip(places, _read_boards(root, [entries[i] for i in places]), strict=True))
    if share == (0, 1):
        return list(known.values())
    return LazyBoards(len(entries), lambda i: known.get(i) or _read_board(root, *entries[i]))


def read_levels(
    root: epath.PathLike, splits: Collection[Split], levels: Collection[tuple[str, int]]
) -> list[Board]:
    """The boards of these splits and (task, level) pairs, read and checked."""
    chosen = [g for g in read_groups(root) if g.split in splits and (g.task, g.level) in levels]
    return _read_boards(epath.Path(root), [entry for group in chosen for entry in _in(group)])


def check_pictures(root: epath.PathLike) -> None:
    """Raises ValueError naming the first picture that is missing, broken or not as written.

    No stage reads the pictures: they are for people, and for other programs.
    """
    root = epath.Path(root)
    entries = [entry for group in read_groups(root) for entry in _in(group)]

    def check(entry: tuple[Group, int]) -> None:
        group, index = entry
        path = board_paths(root / group.folder, index)[1]
        content = _read_listed(root, path)
        if content_hash(content) != group.image[index]:
            # Decoding every picture would take minutes; only a changed one can be a broken one.
            open_picture(io.BytesIO(content), path)
            _check_hash(path, content, group.image[index])

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        list(readers.map(check, entries))


def read_groups(root: epath.PathLike) -> list[Group]:
    """The groups that a manifest lists, which have to be just those of the folder's settings.

    Raises ValueError naming file and field where it is absent or not as `generate` wrote it.
    """
    path = epath.Path(root) / MANIFEST
    if not path.exists():
        raise ValueError(f"{path}: not found; run --stage=generate first")
    manifest, settings = fields.read_json(path), fields.read_json(path.parent / SETTINGS)
    if manifest.get("settings") != settings:
        raise ValueError(f"{path}: settings differ from those in {SETTINGS}; {_RESTORE}")
    listed = manifest.get("groups")
    if not isinstance(listed, list):
        raise ValueError(f"{path}: groups: got {listed!r}, want a list; {_RESTORE}")
    want = _wanted_groups(path.parent / SETTINGS, settings)
    if len(listed) != len(want):
        raise ValueError(f"{path}: groups: got {len(listed)}, want {len(want)}; {_RESTORE}")
    groups: list[Group] = []
    for place, (entry, head) in enumerate(zip(listed, want, strict=True)):
        got = entry if isinstance(entry, dict) else {}
        for key in ("folder", "split", "task", "level", "count"):
            _check_entry(path, f"groups[{place}].{key}", got.get(key), getattr(head, key))
        for kind in ("text", "image"):
            hashes = got.get(kind)
            number = len(hashes) if isinstance(hashes, list) else hashes
            _check_entry(path, f"number of groups[{place}].{kind}", number, head.count)
        text, image = tuple(got["text"]), tuple(got["image"])
        groups.append(dataclasses.replace(head, text=text, image=image))
    return groups


def _wanted_groups(path: epath.Path, settings: Json) -> list[Group]:
    """The groups that settings ask for, without hashes."""
    groups: list[Group] = []
    try:
        for split in SPLITS:
            for name, counts in settings["counts"].items():
                task, level = name.split("/level")
                count = counts[split]
                if type(count) is not int or count < 0:
                    raise ValueError
                if count:
                    folder = f"{split}/{find(task).title}/level{level}"
                    groups.append(Group(folder, split, task, int(level), count))
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(
            f"{path}: counts: want numbers of boards by task, level and split; to restore it, "
            "delete the folder and run --stage=generate again"
        ) from None
    return groups


def _check_entry(path: epath.Path, name: str, got: object, want: object) -> None:
    if type(got) is not type(want) or got != want:
        raise ValueError(f"{path}: {name}: got {got!r}, want {want!r}; {_RESTORE}")


def _in(group: Group) -> list[tuple[Group, int]]:
    return [(group, index) for index in range(group.count)]


def _read_boards(root: epath.Path, entries: Sequence[tuple[Group, int]]) -> list[Board]:
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(lambda entry: _read_board(root, *entry), entries))


def _read_board(root: epath.Path, group: Group, index: int) -> Board:
    path = board_paths(root / group.folder, index)[0]
    text = _read_listed(root, path)
    try:
        state = ENVS[group.task].from_text(text.decode(), source=str(path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: got {error.reason}, want UTF-8") from None
    _check_hash(path, text, group.text[index])
    return Board(group.task, group.level, index, state, None)


def _read_listed(root: epath.Path, path: epath.Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: not found, but {root / MANIFEST} lists it; {_RESTORE}") from None


def _check_hash(path: epath.Path, content: bytes, want: str) -> None:
    got = content_hash(content)
    if got != want:
        raise ValueError(f"{path}: got hash {got}, want {want} as in the manifest; {_RESTORE}")


def case_name(board: Board) -> str:
    """The name of a board of a test split, in the manner of the public evaluator."""
    return f"{board.task}_test_level{board.level}_{board.index:04d}"


def board_paths(folder: epath.Path, index: int) -> tuple[epath.Path, epath.Path]:
    """Where the text and the picture of a board are, in the folder of its group."""
    return folder / "text" / f"{index:04d}.txt", folder / "image" / f"{index:04d}.png"


def content_hash(content: bytes) -> str:
    """The hash of a file's content in a manifest."""
    return hashlib.blake2b(content, digest_size=16).hexdigest()
