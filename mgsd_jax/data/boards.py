"""Boards as examples are made from them, and the folders of boards that `generate` writes.

Folders may be local or of any file system that etils knows (gs://).
"""

import bisect
import concurrent.futures
import dataclasses
import hashlib
import io
import itertools
from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple, overload

from etils import epath

from mgsd_jax.checks import fields
from mgsd_jax.data.pictures import open_picture
from mgsd_jax.data.splits import SPLITS, Split
from mgsd_jax.envs import ENVS

MANIFEST = "manifest.json"
SETTINGS = "settings.json"
FOLDERS = {"frozenlake": "FrozenLake", "maze": "Maze", "minibehaviour": "MiniBehaviour"}
Group = dict[str, Any]  # one folder of boards in the manifest
_RESTORE = f"to restore it, delete {MANIFEST} and run --stage=generate again"
_READERS = 16  # files read at once: of a remote folder each takes tens of milliseconds


class Board(NamedTuple):
    """One board of a split."""

    task: str
    level: int
    index: int  # within its split, task and level
    state: Any  # of the task's env
    picture_path: str | None  # where `generate` put its picture, None for a board never written


@dataclasses.dataclass(frozen=True)
class FolderBoards(Sequence[Board]):
    """The boards of one split, those not in `known` read when they are asked for."""

    root: epath.Path
    groups: tuple[Group, ...]
    known: Mapping[int, Board]  # by place in the split

    def __len__(self) -> int:
        return sum(group["count"] for group in self.groups)

    @overload
    def __getitem__(self, index: int) -> Board: ...
    @overload
    def __getitem__(self, index: slice) -> list[Board]: ...

    def __getitem__(self, index: int | slice) -> Board | list[Board]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        board = self.known.get(place)
        return board or _read_board(self.root, *_find(self.groups, place), with_picture=False)


def read_split(
    root: epath.PathLike, split: Split, share: tuple[int, int] = (0, 1)
) -> Sequence[Board]:
    """The boards of one split, by task and level in the order of the manifest.

    With a `share` (i, of n) only every n-th board is read and checked now, the others when they are
    asked for: n processes with a share each check all. Raises ValueError naming the file where
    anything is missing, malformed or not what the manifest says (a hash differs).
    """
    root = epath.Path(root)
    manifest = read_manifest(root)
    groups = tuple(group for group in manifest["groups"] if group["split"] == split)
    if not groups:
        raise ValueError(f"{root / MANIFEST}: got no boards of split {split!r}, want some")
    unread = FolderBoards(root, groups, {})
    places = range(share[0], len(unread), share[1])

    def read(place: int) -> Board:
        return _read_board(root, *_find(groups, place))

    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        boards = list(readers.map(read, places))
    if share == (0, 1):
        return boards
    return dataclasses.replace(unread, known=dict(zip(places, boards, strict=True)))


def read_levels(
    root: epath.PathLike, splits: Collection[Split], levels: Collection[tuple[str, int]]
) -> list[Board]:
    """The boards of these splits and (task, level), read and checked without their pictures."""
    root = epath.Path(root)
    places = [
        (group, index)
        for group in read_manifest(root)["groups"]
        if group["split"] in splits and (group["task"], group["level"]) in levels
        for index in range(group["count"])
    ]
    with concurrent.futures.ThreadPoolExecutor(_READERS) as readers:
        return list(readers.map(lambda p: _read_board(root, *p, with_picture=False), places))


def read_manifest(root: epath.PathLike) -> dict[str, Any]:
    """The manifest of a folder of boards: `settings`, and `groups` that are just those of them.

    Raises ValueError naming file and field where it is absent or not as `generate` wrote it.
    """
    path = epath.Path(root) / MANIFEST
    if not path.exists():
        raise ValueError(f"{path}: got no such file, want one; run --stage=generate first")
    manifest, settings = fields.read_json(path), fields.read_json(path.parent / SETTINGS)
    if manifest.get("settings") != settings:
        raise ValueError(
            f"{path}: got settings other than in {SETTINGS}, want the same; {_RESTORE}"
        )
    groups = manifest.get("groups")
    if not isinstance(groups, list):
        raise ValueError(f"{path}: groups: got {groups!r}, want a list; {_RESTORE}")
    want = _wanted_groups(path.parent / SETTINGS, settings)
    if len(groups) != len(want):
        raise ValueError(f"{path}: groups: got {len(groups)}, want {len(want)}; {_RESTORE}")
    for place, (group, head) in enumerate(zip(groups, want, strict=True)):
        got = group if isinstance(group, dict) else {}
        for key, value in head.items():
            _check_entry(path, f"groups[{place}].{key}", got.get(key), value)
        for kind in ("text", "image"):
            hashes = got.get(kind)
            number = len(hashes) if isinstance(hashes, list) else hashes
            _check_entry(path, f"number of groups[{place}].{kind}", number, head["count"])
    return manifest


def _wanted_groups(path: epath.Path, settings: Any) -> list[Group]:
    """What settings say of the groups, all but the hashes."""
    groups: list[Group] = []
    try:
        for split in SPLITS:
            for name, counts in settings["counts"].items():
                task, level = name.split("/level")
                head: Group = {"folder": f"{split}/{FOLDERS[task]}/level{level}", "split": split}
                head |= {"task": task, "level": int(level), "count": counts[split]}
                if type(counts[split]) is not int or counts[split] < 0:
                    raise ValueError
                groups += [head] if counts[split] else []
    except (KeyError, TypeError, AttributeError, ValueError):
        raise ValueError(
            f"{path}: counts: got no numbers of boards by task, level and split, want them; to "
            "restore it, delete the folder and run --stage=generate again"
        ) from None
    return groups


def _check_entry(path: epath.Path, name: str, got: object, want: object) -> None:
    if type(got) is not type(want) or got != want:
        raise ValueError(f"{path}: {name}: got {got!r}, want {want!r}; {_RESTORE}")


def _find(groups: Sequence[Group], place: int) -> tuple[Group, int]:
    """The group of the board at a place in the split, and its index in the group."""
    ends = list(itertools.accumulate(group["count"] for group in groups))
    number = bisect.bisect_right(ends, place)
    return groups[number], place - (ends[number] - groups[number]["count"])


def _read_board(root: epath.Path, group: Group, index: int, *, with_picture: bool = True) -> Board:
    text_path, picture_path = board_paths(root / group["folder"], index)
    for path in (text_path, picture_path) if with_picture else (text_path,):
        if not path.exists():
            raise ValueError(
                f"{path}: got no such file, want it as in {root / MANIFEST}; {_RESTORE}"
            )
    text = text_path.read_bytes()
    try:
        state = ENVS[group["task"]].from_text(text.decode(), source=str(text_path))
    except UnicodeDecodeError as error:
        raise ValueError(f"{text_path}: got {error.reason}, want UTF-8") from None
    _check_hash(text_path, text, group["text"][index])
    if with_picture:
        picture = picture_path.read_bytes()
        if content_hash(picture) != group["image"][index]:
            # Decoding every picture would take minutes; only a changed one can be a broken one.
            open_picture(io.BytesIO(picture), picture_path)
            _check_hash(picture_path, picture, group["image"][index])
    return Board(group["task"], group["level"], index, state, str(picture_path))


def _check_hash(path: epath.Path, content: bytes, want: str) -> None:
    if content_hash(content) != want:
        raise ValueError(
            f"{path}: got hash {content_hash(content)}, want {want} as in the manifest; {_RESTORE}"
        )


def board_paths(folder: epath.Path, index: int) -> tuple[epath.Path, epath.Path]:
    return folder / "text" / f"{index:04d}.txt", folder / "image" / f"{index:04d}.png"


def content_hash(content: bytes) -> str:
    return hashlib.blake2b(content, digest_size=16).hexdigest()
