"""Loaders: resumable to the batch, the same whatever the threads, sharded without overlap."""

import dataclasses
import pathlib

import jax
import numpy as np
import pytest

from mgsd_jax import config as c
from mgsd_jax import nano
from mgsd_jax.data import sources
from mgsd_jax.data.processor import load_processor
from mgsd_jax.envs import ENVS, splits
from mgsd_jax.prompts import BUILT_IN

BASE = pathlib.Path(nano.__file__).parent / "assets" / "nano_base"
DATA = c.DataConfig(
    boards=(),
    picture_size=0,
    cell_pixels=32,
    prompt_buckets=(44,),
    teacher_buckets=(44,),
    sequence_buckets=(98,),
    patch_buckets=(100,),
)
ENCODER = sources.Encoder(load_processor(BASE), BUILT_IN, DATA)
LEVELS = (("frozenlake", 3), ("maze", 3), ("minibehaviour", 5))
BOARDS = sources.StreamedBoards(LEVELS, "train", 0, frozenset(), 50)
MIXTURE = (("questions", 0.4), ("cells", 0.2), ("plan_from_text", 0.2), ("plan_from_picture", 0.2))


def same(a, b) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def records(**options):
    options = {"mixture": MIXTURE, "batch_size": 4, "seed": 0} | options
    return sources.grounding_loader(BOARDS, ENCODER, **options)


def test_the_stream_keeps_to_its_split_and_is_a_function_of_the_index() -> None:
    for i in (0, 1, 2, 17, 49):
        board = BOARDS[i]
        assert splits.split_of(ENVS[board.task].key(board.state)) == "train"
        assert board == BOARDS[i]
    assert [BOARDS[i].task for i in range(3)] == [task for task, _ in LEVELS]


@pytest.mark.parametrize("epoch", [0, 1])
def test_a_loader_resumes_at_the_next_batch(epoch: int) -> None:
    loader = records()
    for _ in range(3 + 13 * epoch):
        next(loader)
    held = loader.get_state()
    want = [next(loader) for _ in range(3)]
    again = records()
    again.set_state(held)
    assert all(same(next(again), batch) for batch in want)


def test_threads_change_nothing() -> None:
    many = dataclasses.replace(ENCODER, data=dataclasses.replace(DATA, workers=4))
    one, four = (
        records(),
        sources.grounding_loader(BOARDS, many, mixture=MIXTURE, batch_size=4, seed=0),
    )
    assert all(same(next(one), next(four)) for _ in range(5))


def test_epochs_and_seeds_differ() -> None:
    loader = records(batch_size=50)
    assert not same(next(loader), next(loader))
    assert not same(next(records(seed=0)), next(records(seed=1)))


def test_processes_share_an_epoch_without_overlap() -> None:
    def seen(process: tuple[int, int], batches: int) -> list[str]:
        loader = sources.prompt_loader(
            BOARDS, ENCODER, context="state", batch_size=5, rollouts=1, seed=0, process=process
        )
        rows = [next(loader) for _ in range(batches)]
        return [f"{b.task}{b.index}" for row in rows for b in row.boards]

    whole = seen((0, 1), 10)
    assert len(set(whole)) == 50
    assert set(seen((0, 2), 5)).isdisjoint(seen((1, 2), 5))
    assert set(seen((0, 2), 5)) | set(seen((1, 2), 5)) == set(whole)


def test_rollouts_stand_side_by_side_with_rows_of_their_own() -> None:
    loader = sources.prompt_loader(
        BOARDS, ENCODER, context="state", batch_size=3, rollouts=2, seed=0, process=(1, 2)
    )
    rows = next(loader)
    assert rows.batch.row_ids.tolist() == [6, 7, 8, 9, 10, 11]
    assert rows.boards[0] == rows.boards[1] != rows.boards[2]
    assert rows.batch.teacher.pictures is None


def test_bad_mixtures_and_no_boards_are_refused() -> None:
    with pytest.raises(ValueError, match="boards: got none"):
        sources.grounding_loader((), ENCODER, mixture=MIXTURE, batch_size=2, seed=0)
    for mixture in ((), (("questions", 0.0),), (("questions", 1.0), ("questions", 1.0))):
        with pytest.raises(ValueError, match="mixture"):
            records(mixture=mixture)


def test_a_prompt_longer_than_the_limit_names_both() -> None:
    short = dataclasses.replace(ENCODER, data=dataclasses.replace(DATA, prompt_buckets=(8,)))
    loader = sources.prompt_loader(BOARDS, short, context="state", batch_size=2, rollouts=1, seed=0)
    with pytest.raises(ValueError, match=r"got \d+, want at most 8"):
        next(loader)
