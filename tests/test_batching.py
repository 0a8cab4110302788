"""Batches: padding on both sides, slots, masks, buckets; positions against transformers."""

import functools
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_tokenizer import write_processor_folder

from mgsd_jax.data.batch import Inputs, Pictures
from mgsd_jax.data.batching import (
    Side,
    bucket,
    grounding_batch,
    pad_rows,
    prompt_batch,
    to_inputs,
    token_bucket,
)
from mgsd_jax.data.processor import Encoded, Processor, encode, encode_example, load_processor

BUCKETS = (16, 64, 256)
SIDES: tuple[Side, Side] = ("left", "right")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Processor:
    path: Path = tmp_path_factory.mktemp("processor")
    write_processor_folder(path)
    return load_processor(path)


def make_row(processor: Processor, *parts: str | tuple[int, int]) -> Encoded:
    """The prompt of texts and pictures of the given heights and widths."""
    rng = np.random.default_rng(len(parts))
    content = [
        {"type": "text", "text": part}
        if isinstance(part, str)
        else {"type": "image", "image": rng.integers(0, 256, (*part, 3), dtype=np.uint8)}
        for part in parts
    ]
    messages = [{"role": "user", "content": content}]
    return encode(processor, messages, add_generation_prompt=True)


@pytest.fixture(scope="module")
def mixed(processor: Processor) -> list[Encoded]:
    """One picture; two of different sizes; none; one at the very start of the message."""
    return [
        make_row(processor, "Map size: ", (128, 128)),
        make_row(processor, (64, 96), "and then", (32, 160), " plan"),
        make_row(processor, "Player: (3,1)"),
        make_row(processor, (64, 64), "What is the position of the goal? Open directions: "),
    ]


def pad(
    rows: list[Encoded], side: Side, *, length: int = 96, most: int = 2, channels: int | None = None
) -> Inputs:
    return to_inputs(
        rows,
        length=length,
        side=side,
        pad_id=9,
        patch_buckets=BUCKETS,
        max_pictures=most,
        patch_channels=channels,
    )


def pictures_of(inputs: Inputs) -> Pictures:
    assert inputs.pictures is not None
    return inputs.pictures


def span(row: Encoded, side: Side, length: int) -> slice:
    size = len(row.tokens)
    return slice(length - size, length) if side == "left" else slice(0, size)


@pytest.mark.parametrize("side", SIDES)
def test_shapes_dtypes_and_padding(mixed: list[Encoded], side: Side) -> None:
    inputs = pad(mixed, side)
    pictures = pictures_of(inputs)
    assert inputs.tokens.shape == inputs.valid.shape == pictures.slots.shape == (4, 96)
    assert inputs.positions.shape == (3, 4, 96)
    assert pictures.patches.shape == (4, 2, 64, 1536)
    assert pictures.valid.shape == (4, 2, 64)
    assert pictures.interp_index.shape == pictures.interp_weight.shape == (4, 2, 64, 4)
    assert pictures.coords.shape == (4, 2, 64, 2)
    assert {array.dtype for array in (inputs.valid, pictures.valid)} == {np.dtype(bool)}
    assert {array.dtype for array in (pictures.patches, pictures.interp_weight)} == {
        np.dtype(np.float32)
    }
    whole = (*inputs[:2], inputs.next_position, pictures.interp_index)
    whole += (pictures.coords, pictures.slots)
    assert {array.dtype for array in whole} == {np.dtype(np.int32)}
    for b, row in enumerate(mixed):
        where = np.zeros(96, bool)
        where[span(row, side, 96)] = True
        np.testing.assert_array_equal(inputs.valid[b], where)
        np.testing.assert_array_equal(inputs.tokens[b, where], row.tokens)
        assert (inputs.tokens[b, ~where] == 9).all()
        assert (inputs.positions[:, b, ~where] == 0).all()
        assert (pictures.slots[b, ~where] == -1).all()


@pytest.mark.parametrize("side", SIDES)
def test_positions_equal_get_rope_index(
    processor: Processor, mixed: list[Encoded], side: Side
) -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    inputs = pad(mixed, side)
    theirs: Any = Qwen3VLModel  # neither method reads a weight: a namespace stands for the model
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=2)),
        get_vision_position_ids=functools.partial(theirs.get_vision_position_ids, None),
    )
    positions, deltas = theirs.get_rope_index(
        model,
        torch.from_numpy(inputs.tokens.astype(np.int64)),
        torch.from_numpy((inputs.tokens == processor.image_token_id).astype(np.int64)),
        image_grid_thw=torch.tensor([p.grid for row in mixed for p in row.pictures]),
        attention_mask=torch.from_numpy(inputs.valid.astype(np.int64)),
    )
    np.testing.assert_array_equal(inputs.positions, positions.numpy())
    lengths = [len(row.tokens) for row in mixed]
    np.testing.assert_array_equal(inputs.next_position, lengths + deltas.numpy()[:, 0])


@pytest.mark.parametrize("side", SIDES)
def test_slots_lead_each_image_token_to_its_merged_patch(
    processor: Processor, mixed: list[Encoded], side: Side
) -> None:
    inputs = pad(mixed, side)
    pictures = pictures_of(inputs)
    unit, merged = 4, 64 // 4
    np.testing.assert_array_equal(
        pictures.slots >= 0, inputs.valid & (inputs.tokens == processor.image_token_id)
    )
    for b, row in enumerate(mixed):
        features = pictures.patches[b].reshape(2 * merged, unit, -1)
        taken = features[pictures.slots[b][pictures.slots[b] >= 0]]
        want = [p.patches.reshape(-1, unit, p.patches.shape[1]) for p in row.pictures]
        np.testing.assert_array_equal(taken, np.concatenate(want) if want else taken[:0])


def test_pictures_are_padded_with_zeros(mixed: list[Encoded]) -> None:
    pictures = pictures_of(pad(mixed, "left"))
    for b, row in enumerate(mixed):
        for m in range(2):
            count = len(row.pictures[m].patches) if m < len(row.pictures) else 0
            assert pictures.valid[b, m].sum() == count
            assert pictures.valid[b, m, :count].all()
            for array in (pictures.patches, pictures.interp_index, pictures.interp_weight):
                assert not array[b, m, count:].any()
            if count:
                where = row.pictures[m].where
                np.testing.assert_array_equal(pictures.interp_index[b, m, :count], where.index)
                np.testing.assert_array_equal(pictures.interp_weight[b, m, :count], where.weight)
                np.testing.assert_array_equal(pictures.coords[b, m, :count], where.coords)


def test_patch_bucket_follows_the_largest_picture(processor: Processor) -> None:
    small, large = make_row(processor, (64, 64)), make_row(processor, (128, 160))
    assert pictures_of(pad([small], "left")).patches.shape[2] == 16
    assert pictures_of(pad([small, large], "left", length=128)).patches.shape[2] == 256


def test_all_text_batches_have_no_pictures_unless_the_shape_is_to_stay(
    processor: Processor,
) -> None:
    text = make_row(processor, "Goal: (1,2)")
    assert pad([text, text], "left").pictures is None
    assert pad([text], "left", most=0, channels=1536).pictures is None
    kept = pictures_of(pad([text, text], "left", channels=1536))
    shown = pictures_of(pad([make_row(processor, (64, 64)), text], "left", channels=1536))
    assert [array.shape for array in kept] == [array.shape for array in shown]
    assert [array.dtype for array in kept] == [array.dtype for array in shown]
    assert not kept.valid.any()
    assert (kept.slots == -1).all()


def test_rows_that_do_not_fit_raise(processor: Processor, mixed: list[Encoded]) -> None:
    size = len(mixed[3].tokens)
    assert len(mixed[2].tokens) < size
    with pytest.raises(ValueError, match=f"row 1: got {size} tokens, want at most {size - 1}"):
        pad(mixed[2:], "left", length=size - 1)
    with pytest.raises(ValueError, match="pictures a row: got 2, want at most 1"):
        pad(mixed, "left", most=1)
    with pytest.raises(ValueError, match="patches of a picture: got 400, want at most 256"):
        pad([make_row(processor, (320, 320))], "left", length=512)
    with pytest.raises(ValueError, match=r"patch bucket: got 65, want a multiple of merge\^2 = 4"):
        to_inputs(mixed, length=96, side="left", pad_id=9, patch_buckets=(65,), max_pictures=2)


@pytest.mark.parametrize(("n", "want"), [(0, 8), (8, 8), (9, 32), (32, 32)])
def test_bucket_is_the_smallest_that_holds(n: int, want: int) -> None:
    assert bucket(n, (32, 8)) == want


def test_bucket_says_what_to_change() -> None:
    with pytest.raises(ValueError, match=r"prompt: got 33, want at most 32.*add a bucket of 33"):
        bucket(33, (8, 32), name="prompt")
    with pytest.raises(ValueError, match="got 1, want at most 0"):
        bucket(1, ())


def test_pad_rows_repeats_the_last() -> None:
    assert pad_rows(["a", "b"], 4) == ["a", "b", "b", "b"]
    assert pad_rows(("a",), 1) == ["a"]
    for rows in ([], ["a", "b", "c"]):
        with pytest.raises(ValueError, match=f"got {len(rows)}, want 1 to 2"):
            pad_rows(rows, 2)


def make_examples(processor: Processor) -> list[tuple[Encoded, int]]:
    pixels = np.zeros((64, 64, 3), np.uint8)
    shown = [{"type": "text", "text": "Plan. "}, {"type": "image", "image": pixels}]
    return [
        encode_example(processor, [{"role": "user", "content": shown}], "<answer>up</answer>"),
        encode_example(processor, [{"role": "user", "content": "Holes: "}], "none"),
    ]


def test_loss_mask_covers_the_answer_and_its_end_as_targets(processor: Processor) -> None:
    examples = make_examples(processor)
    length = token_bucket([row for row, _ in examples], (96, 48), name="an example")
    assert length == (48 if max(len(row.tokens) for row, _ in examples) <= 48 else 96)
    batch = grounding_batch(
        examples, length=length, pad_id=9, patch_buckets=BUCKETS, max_pictures=1
    )
    assert batch.inputs.tokens.shape == batch.targets.shape == batch.loss_mask.shape
    assert batch.targets.shape == (2, length)
    assert batch.targets.dtype == np.int32
    assert batch.loss_mask.dtype == np.float32
    for b, (row, prompt_length) in enumerate(examples):
        counted = batch.targets[b][batch.loss_mask[b] == 1]
        np.testing.assert_array_equal(counted, row.tokens[prompt_length:])
        assert counted[-1] in processor.eos_ids
        # The first counted target is predicted from the last token of the prompt.
        first = int(np.flatnonzero(batch.loss_mask[b])[0])
        assert first == prompt_length - 1
        np.testing.assert_array_equal(batch.targets[b, :-1], batch.inputs.tokens[b, 1:])
        assert batch.inputs.valid[b, : len(row.tokens)].all()
    assert set(np.unique(batch.loss_mask)) == {0, 1}


def test_grounding_batch_of_the_docstring() -> None:
    row = Encoded(np.arange(5, dtype=np.int32), ())
    batch = grounding_batch([(row, 3)], length=6, pad_id=9, patch_buckets=(), max_pictures=0)
    assert batch.loss_mask.tolist() == [[0, 0, 1, 1, 0, 0]]
    assert batch.targets.tolist() == [[1, 2, 3, 4, 9, 9]]


@pytest.mark.parametrize("prompt_length", [0, 5, 6])
def test_examples_without_prompt_or_answer_raise(prompt_length: int) -> None:
    row = Encoded(np.arange(5, dtype=np.int32), ())
    with pytest.raises(ValueError, match=f"prompt length: got {prompt_length}, want 1 to 4"):
        grounding_batch(
            [(row, prompt_length)], length=8, pad_id=9, patch_buckets=(), max_pictures=0
        )


def test_prompt_batch_pads_each_side_to_its_own_bucket(processor: Processor) -> None:
    student = [make_row(processor, "Plan. ", (64, 64)), make_row(processor, "Go. ", (64, 64))]
    teacher = [make_row(processor, "Map size: 4x4 " * n) for n in (4, 12)]
    batch = prompt_batch(
        student,
        teacher,
        student_length=token_bucket(student, (64, 128), name="a student prompt"),
        teacher_length=token_bucket(teacher, (16, 256), name="a teacher prompt"),
        pad_id=9,
        patch_buckets=BUCKETS,
        max_pictures=1,
        first_row=6,
    )
    assert batch.student.tokens.shape == (2, 64)
    assert batch.teacher.tokens.shape == (2, 256)
    assert batch.student.pictures is not None
    assert batch.teacher.pictures is None
    assert batch.row_ids.tolist() == [6, 7]
    for inputs in (batch.student, batch.teacher):
        assert inputs.valid[:, -1].all()
    with pytest.raises(ValueError, match=r"tokens of a teacher prompt: got \d+, want at most 32"):
        token_bucket(teacher, (32,), name="a teacher prompt")
    with pytest.raises(ValueError, match="got 2 student and 1 teacher"):
        prompt_batch(
            student,
            teacher[:1],
            student_length=64,
            teacher_length=256,
            pad_id=9,
            patch_buckets=BUCKETS,
            max_pictures=1,
        )


def test_encoding_leaves_cached_arrays_alone(processor: Processor, mixed: list[Encoded]) -> None:
    before = [p.where.index.copy() for row in mixed for p in row.pictures]
    pictures_of(pad(mixed, "left")).interp_index[:] = -5
    after = [p.where.index for row in mixed for p in row.pictures]
    for old, new in zip(before, after, strict=True):
        np.testing.assert_array_equal(old, new)
