"""Splits: disjoint by content, deterministic, never endless."""

import dataclasses
import subprocess
import sys
from collections import Counter
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mgsd_jax.data import splits
from mgsd_jax.envs import ENVS

SMALL = [("frozenlake", 4), ("maze", 3), ("minibehaviour", 5)]


def every_board(task: str, level: int) -> dict[str, Any]:
    """The boards of a level that is small enough to list, by key."""
    found = splits._every_board(task, level)
    assert found is not None
    return found


def keys(task: str, boards: list[Any]) -> list[str]:
    return [ENVS[task].key(board) for board in boards]


@given(st.text())
def test_every_key_belongs_to_just_one_split(key: str) -> None:
    assert splits.split_of(key) in splits.SPLITS


def test_shares_are_80_10_10() -> None:
    counts = Counter(splits.split_of(f"board {i}") for i in range(20_000))
    for split, percent in splits.SHARES.items():
        assert abs(counts[split] / 200 - percent) < 1.0  # four standard deviations are 1.1 and 0.8


def test_split_is_the_same_in_another_process_with_another_hash_seed() -> None:
    code = "from mgsd_jax.data.splits import split_of; print([split_of(str(i)) for i in range(50)])"
    run = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONHASHSEED": "123", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert run.stdout.strip() == str([splits.split_of(str(i)) for i in range(50)])


@pytest.mark.parametrize(("task", "level"), SMALL)
def test_draw_is_a_function_of_its_arguments(task: str, level: int) -> None:
    def draws(level: int = level, split: splits.Split = "train", seed: int = 1) -> list[Any]:
        return [splits.draw(task, level, split, seed=seed, index=i) for i in range(8)]

    first = draws()
    assert first == draws()
    assert len(set(first)) > 4
    assert first != draws(seed=2)
    assert first != draws(level=level + 1)
    assert first[::-1] == [
        splits.draw(task, level, "train", seed=1, index=i) for i in reversed(range(8))
    ]


@pytest.mark.parametrize(("task", "level"), SMALL)
def test_draws_fall_in_their_split_and_obey_exclusions(task: str, level: int) -> None:
    for split in splits.SPLITS:
        drawn = keys(task, [splits.draw(task, level, split, seed=0, index=i) for i in range(10)])
        assert {splits.split_of(key) for key in drawn} == {split}
        exclude = frozenset(drawn)
        again = keys(
            task,
            [splits.draw(task, level, split, seed=0, index=i, exclude=exclude) for i in range(10)],
        )
        assert not exclude & set(again)


def test_draw_gives_up_where_everything_is_excluded() -> None:
    every = every_board("frozenlake", 2)
    with pytest.raises(ValueError, match=r"frozenlake level 2 val: got no board in .* draws"):
        splits.draw("frozenlake", 2, "val", seed=0, index=0, exclude=frozenset(every))


@pytest.mark.parametrize(("task", "level"), SMALL)
def test_unique_boards_are_distinct_disjoint_and_a_prefix_of_more(task: str, level: int) -> None:
    owned = {}
    for split in splits.SPLITS:
        boards = splits.unique_boards(task, level, split, 40, seed=3)
        owned[split] = set(keys(task, boards))
        assert len(owned[split]) == 40
        assert {splits.split_of(key) for key in owned[split]} == {split}
        assert splits.unique_boards(task, level, split, 15, seed=3) == boards[:15]
        other = splits.unique_boards(task, level, split, 40, seed=4)
        assert other != boards
        for elsewhere in set(splits.SPLITS) - {split}:
            assert not owned[split] & set(
                keys(task, splits.unique_boards(task, level, elsewhere, 40, seed=9))
            )


def test_unique_boards_leave_out_exclusions() -> None:
    boards = splits.unique_boards("maze", 3, "test", 30, seed=0)
    exclude = frozenset(keys("maze", boards[::2]))
    rest = splits.unique_boards("maze", 3, "test", 15, seed=0, exclude=exclude)
    assert rest == boards[1::2]


def test_the_last_board_of_a_level_is_found() -> None:
    """FrozenLake level 3 has boards of nearly all holes, one in a million draws."""
    total = ENVS["frozenlake"].count_states(3)
    every = every_board("frozenlake", 3)
    assert len(every) == total
    counts = Counter(map(splits.split_of, every))
    assert sum(counts.values()) == total
    boards = splits.unique_boards("frozenlake", 3, "test", counts["test"], seed=0)
    assert set(keys("frozenlake", boards)) == {k for k in every if splits.split_of(k) == "test"}


def test_a_level_with_too_few_boards_says_exactly_how_many() -> None:
    every = every_board("minibehaviour", 4)
    ours = [key for key in every if splits.split_of(key) == "val"]
    message = rf"minibehaviour level 4 val: got exactly {len(ours)} boards .*want {len(ours) + 1}"
    with pytest.raises(ValueError, match=message):
        splits.unique_boards("minibehaviour", 4, "val", len(ours) + 1, seed=0)
    exclude = frozenset(ours[:5])
    with pytest.raises(ValueError, match=f"got exactly {len(ours) - 5} boards"):
        splits.unique_boards("minibehaviour", 4, "val", len(ours), seed=0, exclude=exclude)


def test_a_level_of_unknown_size_says_how_many_were_found(monkeypatch: pytest.MonkeyPatch) -> None:
    uncounted = dataclasses.replace(ENVS["minibehaviour"], count=lambda level: None)
    monkeypatch.setitem(ENVS, "minibehaviour", uncounted)
    splits._every_board.cache_clear()
    with pytest.raises(ValueError, match=r"got only \d+ boards .*were found"):
        splits.unique_boards("minibehaviour", 4, "val", 500, seed=0)
    splits._every_board.cache_clear()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("chess", 4, "train"), "task: got 'chess', want one of"),
        (("maze", 4, "dev"), "split: got 'dev', want one of"),
        (("maze", 1, "train"), "maze level: got 1, want"),
    ],
)
def test_what_is_out_of_range_is_refused(arguments: tuple[str, int, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        splits.draw(*arguments, seed=0, index=0)
    with pytest.raises(ValueError, match=message):
        splits.unique_boards(*arguments, 3, seed=0)


def test_negative_numbers_are_refused() -> None:
    with pytest.raises(ValueError, match="seed -1"):
        splits.draw("maze", 4, "train", seed=-1, index=0)
    with pytest.raises(ValueError, match="index -2"):
        splits.draw("maze", 4, "train", seed=0, index=-2)
    with pytest.raises(ValueError, match="count: got -1"):
        splits.unique_boards("maze", 4, "train", -1, seed=0)
