"""The processor against transformers' Qwen3VLProcessor: same ids, same patches, bit for bit."""

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_auto import without_videos
from helpers_tokenizer import CHAT_TEMPLATE, write_processor_folder
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mgsd_jax.data.pictures import PictureSettings, cut_patches, smart_resize
from mgsd_jax.data.processor import (
    Encoded,
    Processor,
    encode,
    encode_answer,
    encode_example,
    load_processor,
)
from mgsd_jax.data.segments import decode

# A template that thinks before it answers, trims, and reads a system message of its own.
THINKING_TEMPLATE = (
    CHAT_TEMPLATE.replace("{{- part.text -}}", "{{- part.text | trim -}}").replace(
        "assistant\\n'", "assistant\\n<think>\\n'"
    )
    + "{#- end -#}"
)
FOLDERS: dict[str, dict[str, Any]] = {
    "plain": {},
    "real_limits": {"min_pixels": 65536, "max_pixels": 262144},
    "shrinking": {"min_pixels": 256, "max_pixels": 4096, "image_mean": (0.48, 0.46, 0.41)},
    "other_patches": {
        "patch_size": 14,
        "temporal_patch_size": 1,
        "image_mean": (0.48145466, 0.4578275, 0.40821073),
        "image_std": (0.26862954, 0.26130258, 0.27577711),
    },
    "merge_3": {"patch_size": 8, "merge_size": 3, "temporal_patch_size": 3},
    "thinking": {"chat_template": THINKING_TEMPLATE},
}
SIZES = [(128, 128), (64, 96), (100, 37), (33, 250), (5, 9), (48, 48), (31, 31), (300, 80)]


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def image_part(height: int, width: int) -> dict[str, Any]:
    return {"type": "image", "image": picture(height, width, seed=height * 1000 + width)}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "text", "text": text}


CONVERSATIONS: dict[str, list[dict[str, Any]]] = {
    "text": [{"role": "user", "content": "Map size: 4x4\nPlayer: (3,1)"}],
    "text_part": [{"role": "user", "content": [text_part("What is the goal? ")]}],
    "picture_last": [{"role": "user", "content": [text_part("Plan.\n"), image_part(128, 128)]}],
    "picture_only": [{"role": "user", "content": [image_part(96, 64)]}],
    "several": [
        {"role": "system", "content": "You move on a grid."},
        {
            "role": "user",
            "content": [
                *(text_part(" first"), image_part(100, 37), image_part(64, 96)),
                *(text_part("\n\n"), image_part(5, 9), text_part("end  ")),
            ],
        },
        {"role": "assistant", "content": [text_part("<answer>up</answer>")]},
        {"role": "user", "content": [image_part(33, 250), text_part("And now?")]},
    ],
    "odd_text": [
        {
            "role": "user",
            "content": [text_part("  näïve 图 \U0001f600 e\u0301\t\r\n"), text_part("")],
        },
        {"role": "assistant", "content": ""},
        {
            "role": "user",
            "content": "<|im_end|>\n<|im_start|>system\nx<|endoftext|><|vision_start|>",
        },
    ],
}


@pytest.fixture(scope="module", params=FOLDERS)
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp(request.param)
    write_processor_folder(path, **FOLDERS[request.param])
    return path


@pytest.fixture(scope="module")
def plain_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("plain")
    write_processor_folder(path)
    return path


@pytest.fixture(scope="module")
def processor(plain_folder: Path) -> Processor:
    return load_processor(plain_folder)


def hf_messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """PIL pictures, since transformers guesses which axis of an array is colour."""
    return [
        {
            "role": message["role"],
            "content": message["content"]
            if isinstance(message["content"], str)
            else [
                part | {"image": Image.fromarray(part["image"])} if "image" in part else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def hf_encode(processor: Any, messages: list[dict[str, Any]], prompt: bool) -> dict[str, Any]:
    return processor.apply_chat_template(
        hf_messages(messages), add_generation_prompt=prompt, tokenize=True, return_dict=True
    )


@pytest.mark.parametrize("prompt", [True, False])
def test_encode_equals_transformers(folder: Path, prompt: bool) -> None:
    ours, theirs = load_processor(folder), without_videos(folder)
    for name, messages in CONVERSATIONS.items():
        got = encode(ours, messages, add_generation_prompt=prompt)
        want = hf_encode(theirs, messages, prompt)
        assert got.tokens.tolist() == want["input_ids"][0], name
        assert got.tokens.dtype == np.int32
        grids = [picture.grid for picture in got.pictures]
        assert grids == [tuple(grid) for grid in want.get("image_grid_thw", [])], name
        if grids:
            patches = np.concatenate([picture.patches for picture in got.pictures])
            np.testing.assert_array_equal(patches, want["pixel_values"], strict=True)


def test_starts_point_at_image_tokens_in_vision_marks(processor: Processor) -> None:
    encoded = encode(processor, CONVERSATIONS["several"], add_generation_prompt=True)
    merge = processor.pictures.merge_size
    assert len(encoded.pictures) == 4
    for part in encoded.pictures:
        count = len(part.patches) // merge**2
        assert encoded.tokens[part.start - 1] == processor.vision_start_token_id
        run = encoded.tokens[part.start : part.start + count]
        assert (run == processor.image_token_id).all()
        assert encoded.tokens[part.start + count] == processor.vision_end_token_id
        assert part.patches.shape[1] == processor.pictures.channels
        assert len(part.where.index) == len(part.patches)


@pytest.mark.parametrize("size", SIZES)
def test_patches_equal_transformers(folder: Path, size: tuple[int, int]) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    pixels = picture(*size)
    patches, grid = cut_patches(pixels, load_processor(folder).pictures)
    want = Qwen2VLImageProcessorPil.from_pretrained(folder)(Image.fromarray(pixels))
    np.testing.assert_array_equal(patches, want["pixel_values"], strict=True)
    assert grid == tuple(want["image_grid_thw"][0])


def test_every_byte_is_normalised_as_in_transformers(folder: Path) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    theirs = Qwen2VLImageProcessorPil.from_pretrained(folder)
    side = (
        theirs.patch_size * theirs.merge_size * -(-100 // (theirs.patch_size * theirs.merge_size))
    )
    pixels = np.resize(np.arange(256, dtype=np.uint8), (side, side, 3)).copy()
    pixels[..., 1] = 255 - pixels[..., 0]
    patches, _ = cut_patches(pixels, load_processor(folder).pictures)
    want = theirs(Image.fromarray(pixels))["pixel_values"]
    np.testing.assert_array_equal(patches, want)


@settings(max_examples=40, deadline=None)
@given(
    st.tuples(st.integers(1, 200), st.integers(1, 200)),
    st.sampled_from([(256, 4096), (1024, 65536), (4096, 10**6), (65536, 262144)]),
    st.sampled_from([(4, 2), (7, 1), (16, 2)]),
)
def test_patches_equal_transformers_at_any_size(
    size: tuple[int, int], limits: tuple[int, int], cut: tuple[int, int]
) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    options: dict[str, Any] = {"patch_size": cut[0], "merge_size": cut[1], "temporal_patch_size": 2}
    colours: dict[str, Any] = {"image_mean": [0.5, 0.4, 0.3], "image_std": [0.2, 0.3, 0.5]}
    limit = {"shortest_edge": limits[0], "longest_edge": limits[1]}
    theirs = Qwen2VLImageProcessorPil(size=limit, **options, **colours)
    ours = PictureSettings(
        **options,
        min_pixels=limits[0],
        max_pixels=limits[1],
        mean=(0.5, 0.4, 0.3),
        std=(0.2, 0.3, 0.5),
        rescale=1 / 255,
        resample=Image.Resampling.BICUBIC,
    )
    pixels = picture(*size, seed=size[0])
    patches, grid = cut_patches(pixels, ours)
    want = theirs(Image.fromarray(pixels))
    np.testing.assert_array_equal(patches, want["pixel_values"], strict=True)
    assert grid == tuple(want["image_grid_thw"][0])


def test_smart_resize_equals_transformers() -> None:
    from transformers.models.qwen2_vl import image_processing_pil_qwen2_vl as theirs

    rng = np.random.default_rng(0)
    for height, width in rng.integers(1, 3000, (3000, 2)).tolist():
        if max(height, width) > 200 * min(height, width):
            continue
        for limits in ((1024, 10**6), (65536, 262144), (65536, 16777216)):
            options = {"factor": 32, "min_pixels": limits[0], "max_pixels": limits[1]}
            want = theirs.smart_resize(height, width, **options)
            assert smart_resize(height, width, **options) == want


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (np.zeros((64, 64, 3), np.float32), r"got float32 \(64, 64, 3\), want uint8 \[H, W, 3\]"),
        (np.zeros((64, 64, 4), np.uint8), r"got uint8 \(64, 64, 4\)"),
        (np.zeros((64, 64), np.uint8), r"got uint8 \(64, 64\)"),
        (np.zeros((2, 402, 3), np.uint8), "got 2x402, want an aspect ratio of at most 200"),
        (np.zeros((0, 4, 3), np.uint8), "got 0x4"),
    ],
)
def test_other_pictures_raise(processor: Processor, pixels: np.ndarray, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        cut_patches(pixels, processor.pictures)


def test_messages_are_left_as_they_were(processor: Processor) -> None:
    messages = [{"role": "user", "content": [text_part("a"), image_part(64, 64)]}]
    pixels = messages[0]["content"][1]["image"].copy()
    encode(processor, messages, add_generation_prompt=True)
    assert messages[0]["content"][0] == text_part("a")
    np.testing.assert_array_equal(messages[0]["content"][1]["image"], pixels)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "video", "video": "x"}], "got type 'video', want text or image"),
        ("look: <|image_pad|>", "got 1 image tokens, want 0"),
        ([text_part("<|image_pad|>"), image_part(64, 64)], "got 2 image tokens, want 1"),
        ("look: <|video_pad|>", "got a video token"),
    ],
)
def test_messages_that_cannot_be_encoded_raise(
    processor: Processor, content: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        encode(processor, [{"role": "user", "content": content}], add_generation_prompt=True)


@pytest.mark.parametrize("answer", ["<answer>up</answer>", "", "\n\n two lines\n", " up", "图"])
def test_example_is_the_prompt_and_then_the_answers_own_tokens(folder: Path, answer: str) -> None:
    processor = load_processor(folder)
    alone = encode_answer(processor, answer)
    assert alone[-1] in processor.eos_ids
    assert decode(processor, alone) == answer
    tokenizer = processor.tokenizer
    assert alone.tolist() == tokenizer(answer + "<|im_end|>", add_special_tokens=False)["input_ids"]
    for name in ("text", "picture_last", "several"):
        prompt = encode(processor, CONVERSATIONS[name], add_generation_prompt=True)
        example, length = encode_example(processor, CONVERSATIONS[name], answer)
        assert length == len(prompt.tokens)
        assert example.tokens[:length].tolist() == prompt.tokens.tolist()
        assert example.tokens[length:].tolist() == alone.tolist()
        assert len(example.pictures) == len(prompt.pictures)


def test_thinking_prefix_is_part_of_the_prompt(tmp_path: Path) -> None:
    write_processor_folder(tmp_path, chat_template=THINKING_TEMPLATE)
    processor = load_processor(tmp_path)
    example, length = encode_example(processor, CONVERSATIONS["text"], "up")
    assert decode(processor, example.tokens[:length]).endswith("assistant\n<think>\n")


@pytest.mark.parametrize(
    ("start", "is_open"),
    [
        ("assistant\\n", False),
        ("assistant\\n<think>\\n", True),
        ("assistant\\n<think>\\n\\n</think>\\n\\n", False),
        ("assistant\\n<think></think><think>", True),
    ],
)
def test_a_prompt_that_ends_inside_a_thought_is_known(
    tmp_path: Path, start: str, is_open: bool
) -> None:
    template = CHAT_TEMPLATE.replace("assistant\\n'", f"{start}'")
    write_processor_folder(tmp_path, chat_template=template)
    assert load_processor(tmp_path).opens_thought == is_open


def test_decode_drops_special_and_unknown_tokens(processor: Processor) -> None:
    tokens = encode_answer(processor, "up, down")
    beyond = len(processor.tokenizer) + 100
    noisy = np.concatenate([[processor.pad_id], tokens, [beyond, processor.pad_id]])
    assert decode(processor, noisy) == "up, down"
    assert decode(processor, tokens.tolist()) == "up, down"
    assert decode(processor, []) == ""


def test_ids(plain_folder: Path, processor: Processor) -> None:
    vocabulary = processor.tokenizer.get_vocab()
    assert processor.image_token_id == vocabulary["<|image_pad|>"]
    assert processor.banned_ids == (vocabulary["<|image_pad|>"], vocabulary["<|video_pad|>"])
    assert processor.eos_ids == (vocabulary["<|im_end|>"], vocabulary["<|endoftext|>"])
    assert processor.pad_id == vocabulary["<|endoftext|>"]
    assert processor.end_of_turn == "<|im_end|>"
    assert processor.table_side == 8


def test_processor_survives_pickling(processor: Processor) -> None:
    again = pickle.loads(pickle.dumps(processor))
    messages = CONVERSATIONS["several"]
    assert_same(
        encode(again, messages, add_generation_prompt=True),
        encode(processor, messages, add_generation_prompt=True),
    )


def assert_same(got: Encoded, want: Encoded) -> None:
    np.testing.assert_array_equal(got.tokens, want.tokens)
    for ours, theirs in zip(got.pictures, want.pictures, strict=True):
        np.testing.assert_array_equal(ours.patches, theirs.patches)
        assert (ours.grid, ours.start) == (theirs.grid, theirs.start)


# --- where the settings come from ---


def edit(path: Path, **changes: Any) -> None:
    """Set top-level fields of a JSON file; a value of None takes the field out."""
    content = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in content.items() if value is not None}))


@pytest.mark.parametrize("place", ["chat_template.json", "tokenizer_config.json"])
def test_template_places(tmp_path: Path, place: str) -> None:
    write_processor_folder(tmp_path)
    if place == "tokenizer_config.json":
        (tmp_path / "chat_template.jinja").unlink()
        edit(tmp_path / place, chat_template=THINKING_TEMPLATE)
    else:  # beside the .jinja: transformers' processor prefers the older file
        (tmp_path / place).write_text(json.dumps({"chat_template": THINKING_TEMPLATE}))
    assert load_processor(tmp_path).chat_template == THINKING_TEMPLATE


def test_nested_processor_file_wins(tmp_path: Path) -> None:
    write_processor_folder(tmp_path)
    nested = json.loads((tmp_path / "preprocessor_config.json").read_text()) | {"resample": 2}
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": nested}))
    assert load_processor(tmp_path).pictures.resample == Image.Resampling.BILINEAR
    (tmp_path / "processor_config.json").write_text(json.dumps({"processor_class": "x"}))
    assert load_processor(tmp_path).pictures.resample == Image.Resampling.BICUBIC
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": "x"}))
    with pytest.raises(ValueError, match=r"processor_config.json: image_processor: got 'x'"):
        load_processor(tmp_path)


def test_bare_pixel_limits_override_the_size(tmp_path: Path) -> None:
    write_processor_folder(tmp_path)
    edit(tmp_path / "preprocessor_config.json", min_pixels=2048, max_pixels=4096)
    ours = load_processor(tmp_path).pictures
    assert (ours.min_pixels, ours.max_pixels) == (2048, 4096)
    theirs = without_videos(tmp_path).image_processor.size
    assert (theirs["shortest_edge"], theirs["longest_edge"]) == (2048, 4096)


def test_rescale_and_resample_of_the_file_are_followed(tmp_path: Path) -> None:
    write_processor_folder(tmp_path)
    edit(tmp_path / "preprocessor_config.json", rescale_factor=1 / 128, resample=2)
    pixels = picture(50, 90)
    patches, _ = cut_patches(pixels, load_processor(tmp_path).pictures)
    want = without_videos(tmp_path).image_processor(Image.fromarray(pixels))["pixel_values"]
    np.testing.assert_array_equal(patches, want)


def test_end_tokens_come_from_generation_config_then_config_then_tokenizer(tmp_path: Path) -> None:
    ids = write_processor_folder(tmp_path)
    end, text_end = ids["<|im_end|>"], ids["<|endoftext|>"]
    edit(tmp_path / "generation_config.json", eos_token_id=end)
    assert load_processor(tmp_path).eos_ids == (end,)
    (tmp_path / "generation_config.json").unlink()
    edit(tmp_path / "config.json", text_config={"eos_token_id": [text_end, end]})
    assert load_processor(tmp_path).eos_ids == (text_end, end)
    edit(tmp_path / "config.json", text_config=None)
    assert load_processor(tmp_path).eos_ids == (end,)


def test_a_prompt_is_never_truncated_even_where_the_file_asks_for_it(
    tmp_path: Path, processor: Processor
) -> None:
    write_processor_folder(tmp_path)
    content = json.loads((tmp_path / "tokenizer.json").read_text())
    limit = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
    (tmp_path / "tokenizer.json").write_text(json.dumps(content | {"truncation": limit}))
    got = encode(load_processor(tmp_path), CONVERSATIONS["text"], add_generation_prompt=True)
    assert_same(got, encode(processor, CONVERSATIONS["text"], add_generation_prompt=True))


def test_a_plain_fast_tokenizer_will_do(tmp_path: Path) -> None:
    write_processor_folder(tmp_path)
    edit(tmp_path / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
    processor = load_processor(tmp_path)
    tokens = encode(processor, CONVERSATIONS["picture_last"], add_generation_prompt=True).tokens
    want = hf_encode(without_videos(tmp_path), CONVERSATIONS["picture_last"], True)["input_ids"][0]
    assert tokens.tolist() == want


@pytest.mark.parametrize(
    "name",
    ["config.json", "tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"],
)
@pytest.mark.parametrize("state", ["missing", "broken", "no object"])
def test_missing_and_broken_files_raise(tmp_path: Path, name: str, state: str) -> None:
    write_processor_folder(tmp_path)
    if state == "missing":
        (tmp_path / name).unlink()
    else:
        (tmp_path / name).write_text('{"model":' if state == "broken" else "[1]")
    with pytest.raises(ValueError, match=rf"{name}.*(got|not found).* want"):
        load_processor(tmp_path)


@pytest.mark.parametrize(
    ("name", "changes", "message"),
    [
        ("preprocessor_config.json", {"patch_size": None}, "patch_size: not found, want int"),
        ("preprocessor_config.json", {"merge_size": "2"}, "merge_size: got '2', want int"),
        ("preprocessor_config.json", {"merge_size": 0}, "merge_size: got 0, want a number from 1"),
        ("preprocessor_config.json", {"size": {"height": 3}}, "size.shortest_edge: not found"),
        ("preprocessor_config.json", {"image_mean": [0.5]}, "image_mean: got .0.5., want three"),
        ("preprocessor_config.json", {"do_resize": False}, "do_resize: got False, want True"),
        (
            "config.json",
            {"vision_config": {}},
            "vision_config.patch_size: not found",
        ),
        ("config.json", {"image_token_id": 5}, "image_token_id: got 5, want the tokenizer's"),
        ("generation_config.json", {"eos_token_id": "<|im_end|>"}, "eos_token_id: got '<"),
        ("generation_config.json", {"eos_token_id": 0}, "want it to begin with a token that ends"),
        ("tokenizer_config.json", {"pad_token": None}, None),
    ],
)
def test_wrong_fields_raise(
    tmp_path: Path, name: str, changes: dict[str, Any], message: str | None
) -> None:
    write_processor_folder(tmp_path)
    edit(tmp_path / name, **changes)
    if message is None:  # this tokenizer class has a pad token of its own
        assert load_processor(tmp_path).pad_id == load_processor(tmp_path).eos_ids[1]
        return
    with pytest.raises(ValueError, match=message):
        load_processor(tmp_path)


def test_no_template_raises(tmp_path: Path) -> None:
    write_processor_folder(tmp_path)
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"chat template: not found, want chat_template\.jinja"):
        load_processor(tmp_path)


def test_a_tokenizer_without_the_image_token_raises(tmp_path: Path) -> None:
    write_processor_folder(tmp_path)
    content = (tmp_path / "tokenizer.json").read_text()
    (tmp_path / "tokenizer.json").write_text(content.replace("<|image_pad|>", "<|image|>"))
    edit(tmp_path / "tokenizer_config.json", extra_special_tokens=None)
    with pytest.raises(ValueError, match=r"<\|image_pad\|>: got ids .* want one id twice"):
        load_processor(tmp_path)
