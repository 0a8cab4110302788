"""Which boards belong to which split: decided by the content of the board, never by the draw.

A board's split is a stable hash of its content key, so train, val and test cannot share a board
whatever the seeds, counts or options of the draws were; benchmark boards are left out by key.
"""

import hashlib
from typing import Any, Literal, get_args

import numpy as np

from mgsd_jax.envs import ENVS

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES: dict[Split, int] = {"train": 80, "val": 10, "test": 10}  # percent of all boards

# A 10 % split with half of its boards excluded still fails within this bound with chance 1e-220.
_MAX_REDRAWS = 10_000
# Give up on new boards after this many repeats in a row, or ten times the boards found so far:
# where boards are equally likely, the last one is then missed with chance exp(-10).
_MIN_REPEATS = 2_000


def _stable_int(text: str, bytes_: int = 4) -> int:
    """Hash of `text` that is the same in every process and version (unlike `hash`)."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=bytes_).digest(), "big")


def split_of(key: str) -> Split:
    """The split that owns the board with this content key: 80 % train, 10 % val, 10 % test."""
    bucket = _stable_int(key, 8) % 100
    if bucket < SHARES["train"]:
        return "train"
    return "val" if bucket < SHARES["train"] + SHARES["val"] else "test"


def _rng(seed: int, split: str, task: str, level: int, index: int) -> np.random.Generator:
    entropy = (seed, _stable_int(split), _stable_int(task), level, index)
    return np.random.default_rng(np.random.SeedSequence(entropy))


def _check(task: str, split: str, seed: int, index: int = 0) -> None:
    if task not in ENVS:
        raise ValueError(f"task: got {task!r}, want one of {sorted(ENVS)}")
    if split not in SPLITS:
        raise ValueError(f"split: got {split!r}, want one of {SPLITS}")
    if seed < 0 or index < 0:
        raise ValueError(f"got seed {seed} and index {index}, want both at least 0")


def draw(
    task: str,
    level: int,
    split: Split,
    *,
    seed: int,
    index: int,
    exclude: frozenset[str] = frozenset(),
    **options: Any,
) -> Any:
    """The board number `index` of an endless stream: the same arguments give the same board.

    Boards of other splits and boards whose key is in `exclude` are drawn again. Boards repeat
    from index to index where a level has few of them; `unique_boards` gives distinct ones.
    `options` go to the env's `generate`. Raises ValueError on a name, level, seed or index out of
    range, and where no board can be found.
    """
    _check(task, split, seed, index)
    env = ENVS[task]
    rng = _rng(seed, split, task, level, index)
    for _ in range(_MAX_REDRAWS):
        state = env.generate(rng, level, **options)
        key = env.key(state)
        if split_of(key) == split and key not in exclude:
            return state
    raise ValueError(
        f"{task} level {level} {split}: got no board in {_MAX_REDRAWS} draws with "
        f"{len(exclude)} boards excluded, want one outside the exclusions"
    )


def unique_boards(
    task: str,
    level: int,
    split: Split,
    count: int,
    *,
    seed: int,
    exclude: frozenset[str] = frozenset(),
    **options: Any,
) -> list[Any]:
    """`count` distinct boards of one split, none of them in `exclude`, deterministic in `seed`.

    A smaller count gives a prefix of a larger one. Raises ValueError where the level has fewer
    boards: exactly how many where they can be counted, else how many were found.
    """
    _check(task, split, seed)
    if count < 0:
        raise ValueError(f"count: got {count}, want at least 0")
    env = ENVS[task]
    rng = _rng(seed, split, task, level, 0)
    # With options (fixed corners, say) fewer boards exist than the env counts.
    total = None if options else env.count_states(level)
    seen: set[str] = set()  # keys of every split: how much of the whole level was met
    found: list[Any] = []
    repeats = 0
    while len(found) < count:
        if len(seen) == total or repeats > max(_MIN_REPEATS, 10 * len(seen)):
            raise ValueError(_shortage(task, level, split, count, found, seen, total, exclude))
        state = env.generate(rng, level, **options)
        key = env.key(state)
        if key in seen:
            repeats += 1
            continue
        repeats = 0
        seen.add(key)
        if split_of(key) == split and key not in exclude:
            found.append(state)
    return found


def _shortage(
    task: str,
    level: int,
    split: Split,
    count: int,
    found: list[Any],
    seen: set[str],
    total: int | None,
    exclude: frozenset[str],
) -> str:
    """Says how many boards a split of a level has: exactly where all of them were met."""
    left_out = sum(1 for key in seen & exclude if split_of(key) == split)
    how = "exactly" if len(seen) == total else "no more than about"
    of_all = f"{len(seen)} of {total}" if total is not None else f"{len(seen)}"
    return (
        f"{task} level {level} {split}: got {how} {len(found)} distinct boards "
        f"({left_out} more are excluded; {of_all} boards of the level were met), want {count}; "
        f"ask for fewer boards or for a higher level"
    )
