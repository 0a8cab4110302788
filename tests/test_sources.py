"""Loaders: resumable to the batch, the same whatever the threads, sharded without overlap."""

import dataclasses
import pathlib
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
import numpy as np
import pytest

import mgsd_jax
from mgsd_jax import config as c
from mgsd_jax.data import batching, loaders, splits
from mgsd_jax.data import records as records_lib
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.processor import Encoded, load_processor
from mgsd_jax.data.prompts import BUILT_IN
from mgsd_jax.data.segments import decode
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import rules

BASE = pathlib.Path(mgsd_jax.__file__).parent / "assets" / "nano_base"
DATA = c.DataConfig(
    boards=(),
    picture_size=0,
    cell_pixels=32,
    prompt_buckets=(44,),
    teacher_buckets=(44,),
    sequence_buckets=(98,),
    patch_buckets=(100,),
)
PROCESSOR = load_processor(BASE)
ENCODER = Encoder(PROCESSOR, BUILT_IN, DATA)
LEVELS = (("frozenlake", 3), ("maze", 3), ("minibehaviour", 5))
BOARDS = loaders.stream_boards(LEVELS, "train", seed=0, count=50)
MIXTURE: Any = (
    ("questions", 0.4),
    ("cells", 0.2),
    ("plan_from_text", 0.2),
    ("plan_from_picture", 0.2),
)


def same(a: Any, b: Any) -> bool:
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return all(np.array_equal(x, y) for x, y in pairs)


def records(
    mixture: Sequence[tuple[str, float]] = MIXTURE,
    batch_size: int = 4,
    seed: int = 0,
    **options: Any,
) -> loaders.Loader[tuple[Encoded, int], batching.GroundingBatch]:
    return loaders.grounding_loader(
        BOARDS, ENCODER, mixture=mixture, batch_size=batch_size, seed=seed, **options
    )


def prompts(
    batch_size: int,
    context: c.TeacherContext = "state",
    rollouts: int = 1,
    seed: int = 0,
    **options: Any,
) -> loaders.Loader[loaders.PromptExample, loaders.PromptRows]:
    return loaders.prompt_loader(
        BOARDS,
        ENCODER,
        context=context,
        batch_size=batch_size,
        rollouts=rollouts,
        seed=seed,
        **options,
    )


def test_the_stream_keeps_to_its_split_and_is_a_function_of_the_index() -> None:
    for i in (0, 1, 2, 17, 49):
        board = BOARDS[i]
        assert splits.split_of(ENVS[board.task].key(board.state)) == "train"
        assert board == BOARDS[i]
    assert [BOARDS[i].task for i in range(3)] == [task for task, _ in LEVELS]


def test_channels_change_the_colours_alone() -> None:
    data = dataclasses.replace(DATA, channels=(1, 2, 0))
    shown = dataclasses.replace(ENCODER, data=data).picture(BOARDS[0])
    assert np.array_equal(shown, ENCODER.picture(BOARDS[0])[..., [1, 2, 0]])
    assert not np.array_equal(shown, ENCODER.picture(BOARDS[0]))


@pytest.mark.parametrize("place", [0, 1, 2])
def test_other_sprites_change_things_and_leave_the_ground(place: int) -> None:
    other = dataclasses.replace(ENCODER, data=dataclasses.replace(DATA, sprites="other"))
    board = BOARDS[place]
    differ = (ENCODER.picture(board) != other.picture(board)).any(axis=-1)
    cells = np.argwhere(differ) // DATA.cell_pixels
    changed = {(int(row), int(column)) for row, column in cells}
    kinds = ("player", "agent", "printer", "hole", "goal")
    things = {fact[1] for fact in ENVS[board.task].facts(board.state) if fact[0] in kinds}
    assert changed, board.task
    assert changed <= things


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
        loaders.grounding_loader(BOARDS, many, mixture=MIXTURE, batch_size=4, seed=0),
    )
    assert all(same(next(one), next(four)) for _ in range(5))


def test_epochs_and_seeds_differ() -> None:
    loader = records(batch_size=50)
    assert not same(next(loader), next(loader))
    assert not same(next(records(seed=0)), next(records(seed=1)))


def test_a_batch_may_be_one_row() -> None:
    single, pair = records(batch_size=1), next(records(batch_size=2))
    for row in range(2):
        one, width = next(single), pair.inputs.tokens.shape[1]
        assert one.inputs.tokens.shape == (1, width)
        np.testing.assert_array_equal(one.inputs.tokens[0], pair.inputs.tokens[row])
    assert len(next(prompts(batch_size=1)).boards) == 1


@pytest.mark.parametrize("count", [2, 4])
def test_the_batch_of_all_processes_is_the_batch_of_one(count: int) -> None:
    """Rows in order, over two epochs; each process makes its own alone; any may resume as any."""

    def shares(loader: Callable[..., Any]) -> list[list[Any]]:
        loaders = [loader(process=(i, count)) for i in range(count)]
        return [[next(each) for _ in range(6)] for each in loaders]

    def records_of(**options: Any) -> Any:
        return records(batch_size=12, **options)

    def prompts_of(**options: Any) -> Any:
        return prompts(batch_size=12, rollouts=2, **options)

    one = records_of()
    for whole, *parts in zip([next(one) for _ in range(6)], *shares(records_of), strict=True):
        for name in ("targets", "loss_mask"):
            joined = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(joined, getattr(whole, name))
        joined = np.concatenate([part.inputs.pictures.patches for part in parts])
        np.testing.assert_array_equal(joined, whole.inputs.pictures.patches)
    one = prompts_of()
    for whole, *parts in zip([next(one) for _ in range(6)], *shares(prompts_of), strict=True):
        assert [b for part in parts for b in part.boards] == list(whole.boards)
        ids = np.concatenate([part.batch.row_ids for part in parts])
        np.testing.assert_array_equal(ids, whole.batch.row_ids)
    other = prompts_of(process=(0, count))
    other.set_state(one.get_state())
    assert next(other).boards == next(one).boards[: 24 // count]


def test_a_process_makes_its_own_rows_alone() -> None:
    asked: list[int] = []

    class Noted:
        def __len__(self) -> int:
            return len(BOARDS)

        def __getitem__(self, index: int) -> Any:
            asked.append(index)
            return BOARDS[index]

    one = dataclasses.replace(ENCODER, data=dataclasses.replace(DATA, workers=1))
    seen = []
    for process in ((0, 2), (1, 2)):
        asked.clear()
        loader = loaders.prompt_loader(
            cast(Any, Noted()),
            one,
            context="state",
            batch_size=20,
            rollouts=1,
            seed=0,
            process=process,
        )
        next(loader)
        seen.append(list(asked))
    assert set(seen[0][:10]).isdisjoint(seen[1][:10])
    assert len(set(seen[0][:10])) == len(seen[0][:10]) == 10


def test_processes_pad_to_the_largest_bucket_that_any_needs() -> None:
    """Each fits its own rows; what all agree on is what one process would have chosen."""
    data = dataclasses.replace(DATA, sequence_buckets=(30, 45, 60, 98), patch_buckets=(36, 64, 100))
    encoder = dataclasses.replace(ENCODER, data=data)

    def loader(process: tuple[int, int], agree: Any = tuple) -> Any:
        return loaders.grounding_loader(
            BOARDS, encoder, mixture=MIXTURE, batch_size=4, seed=3, process=process, agree=agree
        )

    whole, differ = loader((0, 1)), 0
    needs: list[list[tuple[int, ...]]] = [[], []]
    for i in (0, 1):
        loaded = loader((i, 2), lambda sizes, i=i: needs[i].append(sizes) or sizes)
        for _ in range(8):
            next(loaded)
    most = [tuple(map(max, *both)) for both in zip(*needs, strict=True)]
    for i in (0, 1):
        turn = iter(most)
        agreed = loader((i, 2), lambda sizes, turn=turn: next(turn))
        whole = loader((0, 1))
        for step in range(8):
            mine, all_rows = next(agreed), next(whole)
            differ += needs[i][step] != most[step]
            assert mine.targets.shape[1] == all_rows.targets.shape[1]
            np.testing.assert_array_equal(mine.targets, all_rows.targets[2 * i : 2 * i + 2])
            rows = jax.tree.map(lambda x, i=i: x[2 * i : 2 * i + 2], all_rows.inputs.pictures)
            assert same(mine.inputs.pictures, rows)
    assert differ > 2, "the rows of the two processes never needed different buckets"


def test_rollouts_stand_side_by_side_with_rows_of_their_own() -> None:
    rows = next(prompts(batch_size=6, rollouts=2, process=(1, 2)))
    assert rows.batch.row_ids.tolist() == [6, 7, 8, 9, 10, 11]
    assert rows.boards[0] == rows.boards[1] != rows.boards[2]
    assert rows.batch.teacher.pictures is None
    with pytest.raises(ValueError, match="batch_size: got 5, want a multiple of 2"):
        prompts(batch_size=5, process=(1, 2))


def test_references_are_right_responses_of_a_share_of_the_prompts() -> None:
    loader = prompts(batch_size=4, reference_share=0.5, response_length=64)
    given = 0
    for rows in (next(loader) for _ in range(4)):
        references = rows.batch.references
        assert references is not None
        for board, tokens, mask in zip(rows.boards, *references, strict=True):
            if not mask.any():
                continue
            given += 1
            answer = decode(PROCESSOR, tokens[mask])
            assert rules.judge(board.state, board.task, answer).optimal
            assert tokens[mask][-1] in PROCESSOR.eos_ids
    assert 3 <= given <= 13  # of 16; 2 in 1,000 coins fall outside
    assert next(prompts(batch_size=2)).batch.references is None
    short = prompts(batch_size=2, reference_share=1.0, response_length=3)
    with pytest.raises(ValueError, match=r"reference response of \d+ tokens, want at most 3"):
        next(short)


def test_the_teacher_may_be_told_wrong_facts_or_of_another_board() -> None:
    right = next(prompts(batch_size=6))
    for changed, loader in (
        ("noise", prompts(batch_size=6, noise=1.0)),
        ("teacher_board", prompts(batch_size=6, teacher_board="other")),
    ):
        wrong = next(loader)
        assert same(right.batch.student, wrong.batch.student)
        assert right.boards == wrong.boards
        differ = (right.batch.teacher.tokens != wrong.batch.teacher.tokens).any(axis=1)
        assert differ.all(), changed
    one = loaders.prompt_loader(
        [BOARDS[0], BOARDS[1]],  # of two tasks
        ENCODER,
        context="state",
        batch_size=2,
        rollouts=1,
        seed=0,
        teacher_board="other",
    )
    with pytest.raises(ValueError, match=r"no second board of (frozenlake|maze) level 3"):
        next(one)


def test_no_boards_are_refused() -> None:
    with pytest.raises(ValueError, match="boards: got none"):
        loaders.grounding_loader((), ENCODER, mixture=MIXTURE, batch_size=2, seed=0)


def test_a_record_is_one_entry(monkeypatch: pytest.MonkeyPatch) -> None:
    """A kind from outside the package is encoded, mixed in and padded as the built-in ones are."""
    mixture = (("size", 1.0),)
    with pytest.raises(ValueError, match=r"mixture: got 'size', want kinds among questions, cells"):
        records(mixture=mixture)

    def size(prompts: Any, board: Any, draw: Any, rng: Any) -> records_lib.Example:
        content = [{"type": "image", "image": draw(board)}, {"type": "text", "text": "Map size?"}]
        return [{"role": "user", "content": content}], f"{board.level}x{board.level}"

    monkeypatch.setitem(records_lib.RECORDS, "size", records_lib.Record(size, has_picture=True))
    batch = next(records(mixture=mixture))
    assert batch.inputs.pictures is not None and batch.inputs.pictures.valid.any(axis=(1, 2)).all()
    rows = zip(batch.targets, batch.loss_mask, strict=True)
    learned = [decode(PROCESSOR, row[mask > 0]) for row, mask in rows]
    assert set(learned) <= {"3x3", "5x5"} and len(learned) == 4


def test_a_mixture_without_pictures_has_none() -> None:
    assert next(records(mixture=(("plan_from_text", 1.0),))).inputs.pictures is None
    mixture = (("plan_from_text", 1.0), ("questions", 0.0))
    assert next(records(mixture=mixture)).inputs.pictures is None


def test_a_prompt_longer_than_the_limit_names_both() -> None:
    short = dataclasses.replace(ENCODER, data=dataclasses.replace(DATA, prompt_buckets=(8,)))
    loader = loaders.prompt_loader(BOARDS, short, context="state", batch_size=2, rollouts=1, seed=0)
    with pytest.raises(ValueError, match=r"got \d+, want at most 8"):
        next(loader)


def test_drafts_are_right_responses_and_change_nothing_else() -> None:
    plain = next(prompts(batch_size=6))
    drafted = next(prompts(batch_size=6, has_drafts=True, response_length=62))
    assert same(drafted.batch._replace(draft=None), plain.batch) and plain.batch.draft is None
    assert drafted.batch.draft is not None and drafted.batch.draft.shape == (6, 62)
    for board, draft in zip(drafted.boards, drafted.batch.draft, strict=True):
        text = decode(PROCESSOR, draft[draft >= 0])
        outcome = rules.judge(board.state, board.task, text)
        assert outcome.success and outcome.optimal
        assert draft[draft >= 0][-1] in PROCESSOR.eos_ids
    short = next(prompts(batch_size=6, has_drafts=True, response_length=5))
    assert short.batch.draft is not None
    np.testing.assert_array_equal(short.batch.draft, drafted.batch.draft[:, :5])


def test_every_second_row_is_one_of_the_steps_before() -> None:
    steps, size = 3, 2
    plain = prompts(batch_size=size)
    mixed = prompts(batch_size=2 * size, replay_steps=steps)
    seen, ages = [], set()
    for step in range(12):
        rows = next(mixed)
        seen.append(next(plain))
        assert rows.boards[0::2] == seen[-1].boards
        slots = rows.batch.slots
        assert slots is not None and set(slots[0::2]) == {step % (steps + 1)}
        for row, slot in enumerate(slots[1::2]):
            at = [s for s in range(max(0, step - steps), step or 1) if s % (steps + 1) == slot]
            assert len(at) == 1, (step, slot)  # 1 to 3 steps before, and the first repeats itself
            ages.add(step - at[0])
            assert rows.boards[2 * row + 1] == seen[at[0]].boards[row]
            want = seen[at[0]].batch.teacher.tokens[row]
            np.testing.assert_array_equal(rows.batch.teacher.tokens[2 * row + 1], want)
    assert ages == {0, 1, 2, 3}


def test_the_other_board_of_a_row_is_another_of_its_level() -> None:
    plain, both = (next(prompts(batch_size=4, has_others=one)) for one in (False, True))
    assert plain.batch.other is None and both.batch.other is not None
    assert plain.boards == both.boards
    np.testing.assert_array_equal(plain.batch.teacher.tokens, both.batch.teacher.tokens)
    differs = (both.batch.other.tokens != both.batch.teacher.tokens).any(1)
    assert differs.all()


def test_a_record_may_tell_the_plan_that_it_asks_for() -> None:
    """The base of the study's rows of plans learns to follow the plan in its prompt."""
    for board in (next(b for b in BOARDS if b.task == task) for task in ("maze", "minibehaviour")):
        rng = np.random.default_rng(0)
        messages, answer = records_lib.RECORDS["plan_from_text_and_plan"].make(
            ENCODER.prompts, board, ENCODER.picture, rng
        )
        env = ENVS[board.task]
        plan = env.spell(env.shortest_plan(board.state))
        assert messages[0]["content"].endswith(f"One shortest plan: {plan}")
        assert answer.endswith(f"<answer>{plan}</answer>")
