"""Which boards belong to which split: decided by the content of the board, never by the draw.

A board's split is a stable hash of its content key, so train, val and test cannot share a board
whatever the seeds, counts or options of the draws were; benchmark boards are left out by key.
"""

import functools
import hashlib
from typing import Literal, get_args

import numpy as np

from mgsd_jax.envs import ENVS, AnyState, find

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
SHARES: dict[Split, int] = {"train": 80, "val": 10, "test": 10}  # percent of all boards

# A 10 % split with half of its boards excluded still fails within this bound with chance 1e-220.
_MAX_REDRAWS = 10_000
# Drawing has stalled after this many repeats in a row, or three times the boards met so far.
_MIN_REPEATS = 2_000
_STALLED = "drawing gave repeats alone"
# Levels with at most this many boards are listed in full where drawing stalls.
_LISTABLE = 20_000


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
    find(task)
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
) -> AnyState:
    """The board number `index` of an endless stream: the same arguments give the same board.

    Boards of other splits and boards whose key is in `exclude` are drawn again. Boards repeat
    from index to index where a level has few of them; `unique_boards` gives distinct ones.
    Raises ValueError on a name, level, seed or index out of range, and where no board is found.
    """
    _check(task, split, seed, index)
    env = ENVS[task]
    rng = _rng(seed, split, task, level, index)
    for _ in range(_MAX_REDRAWS):
        state = env.generate(rng, level)
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
) -> list[AnyState]:
    """`count` distinct boards of one split, none of them in `exclude`, deterministic in `seed`.

    A smaller count gives a prefix of a larger one. Raises ValueError where the level has fewer
    boards: exactly how many where they can be listed, else how many were found.
    """
    _check(task, split, seed)
    if count < 0:
        raise ValueError(f"count: got {count}, want at least 0")
    env = ENVS[task]
    rng = _rng(seed, split, task, level, 0)
    seen: set[str] = set()  # keys of every split
    found: list[AnyState] = []
    repeats = 0
    while len(found) < count:
        if repeats > max(_MIN_REPEATS, 3 * len(seen)):
            rest, has = _unseen(task, level, split, seen, exclude)
            if len(found) + len(rest) < count:
                got = f"{'exactly' if has else 'only'} {len(found) + len(rest)}"
                total = (
                    f"the level has {has}" if has else f"{len(seen)} were found until {_STALLED}"
                )
                raise ValueError(
                    f"{task} level {level} {split}: got {got} boards that belong to the split and "
                    f"are not excluded ({total}), want {count}; ask for fewer or for a higher level"
                )
            return found + rest[: count - len(found)]
        state = env.generate(rng, level)
        key = env.key(state)
        repeats += 1
        if key not in seen:
            repeats = 0
            seen.add(key)
            if split_of(key) == split and key not in exclude:
                found.append(state)
    return found


def _unseen(
    task: str, level: int, split: Split, seen: set[str], exclude: frozenset[str]
) -> tuple[list[AnyState], int | None]:
    """The boards of a split that drawing has not met, and the number of boards of the level.

    [] and None where a level has no list of all boards.
    """
    every = _every_board(task, level)
    if every is None:
        return [], None
    left = [key for key in every if key not in seen and key not in exclude]
    return [every[key] for key in left if split_of(key) == split], len(every)


@functools.cache
def _every_board(task: str, level: int) -> dict[str, AnyState] | None:
    """All boards of a level by key; None where they are too many, or cannot be counted."""
    env = ENVS[task]
    total = env.count_states(level)
    if total is None or total > _LISTABLE:
        return None
    rng = np.random.default_rng(0)
    boards: dict[str, AnyState] = {}
    # Equally likely boards take about total * log(total) draws, ten times total here.
    for _ in range(200 * total):
        state = env.generate(rng, level, **env.even_options)
        boards.setdefault(env.key(state), state)
        if len(boards) == total:
            return boards
    return None
