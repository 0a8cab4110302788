"""Folders with wrong settings: they load as if these were right, or end in one line about them."""

import dataclasses
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_model import tiny
from helpers_tokenizer import CHAT_TEMPLATE, SPECIAL_TOKENS, write_processor_folder

from mgsd_jax.data.processor import encode, encode_answer, load_processor
from mgsd_jax.weights import hf

FILES = (
    "config.json",
    "preprocessor_config.json",
    "generation_config.json",
    "tokenizer_config.json",
    "chat_template.json",
)
Path_ = tuple[Any, ...]  # keys and indices that lead to a value of a JSON file


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Every settings file of a tiny model, as the releases have them; no weights."""
    ids = write_processor_folder(tmp_path, patch_size=4)
    config = dataclasses.replace(
        tiny(vocab_size=512),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    settings = config.to_hf()
    for part in ("text_config", "vision_config"):  # transformers 4.57 wrote none
        del settings[part]["rope_parameters"]
    write(tmp_path / "config.json", settings)
    (tmp_path / "chat_template.jinja").unlink()
    write(tmp_path / "chat_template.json", {"chat_template": CHAT_TEMPLATE})
    switches = dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
    added = {str(ids[t]): {"content": t, "special": True, **switches} for t in SPECIAL_TOKENS}
    more = {"added_tokens_decoder": added, "split_special_tokens": False, "add_bos_token": False}
    write(tmp_path / "tokenizer_config.json", read(tmp_path / "tokenizer_config.json") | more)
    return tmp_path


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def load(folder: Path) -> tuple[Any, ...]:
    """All that the settings of a folder lead to."""
    config, processor = hf.read_config(folder), load_processor(folder)
    pixels = np.arange(64 * 64 * 3, dtype=np.uint8).reshape(64, 64, 3)
    parts = [{"type": "text", "text": "up <|im_end|>"}, {"type": "image", "image": pixels}]
    encoded = encode(processor, [{"role": "user", "content": parts}], add_generation_prompt=True)
    return (
        config,
        vars(processor) | {"tokenizer": None},
        encoded.tokens.tolist(),
        encoded.pictures[0].patches.tobytes(),
        encode_answer(processor, "up").tolist(),
    )


def change(path: Path, keys: Path_, value: Any) -> None:
    content = read(path)
    node = content
    for key in keys[:-1]:
        node = node[key]
    node[keys[-1]] = value
    write(path, content)


def places(node: Any, above: Path_ = ()) -> Iterator[tuple[Path_, Any]]:
    """Every value of a JSON file, with the keys that lead to it; one element of each list."""
    items = node.items() if isinstance(node, dict) else enumerate(node[:1])
    for key, value in items:
        yield (*above, key), value
        if isinstance(value, dict | list):
            yield from places(value, (*above, key))


def wrong_kinds(keys: Path_, value: Any) -> list[Any]:
    found: list[Any] = [True, "2", 1.5, math.nan, -(10**30), [], {}, {"a": 1}, ["a"], [[1]]]
    if keys[0] == "extra_special_tokens":  # transformers 5 also writes a list of them
        found.remove(["a"])
    if type(value) is int:
        found += [-1, 10**30]
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return [
        wrong
        for wrong in found
        if type(wrong) is not type(value) and not (is_number and wrong == 1.5)
    ]


def outcome(folder: Path) -> tuple[Any, ...] | str:
    """What the folder loads as, or the error."""
    try:
        return load(folder)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("file", FILES)
def test_a_value_of_the_wrong_kind_changes_nothing_or_is_named(folder: Path, file: str) -> None:
    want, content = load(folder), read(folder / file)
    # One added token stands for all of them.
    others = list(content.get("added_tokens_decoder", {}))[1:]
    named = 0
    for keys, value in places(content):
        if keys[1:] and keys[1] in others:
            continue
        for wrong in wrong_kinds(keys, value):
            write(folder / file, content)
            change(folder / file, keys, wrong)
            got = outcome(folder)
            if isinstance(got, str):
                named += 1
                key = [key for key in keys if isinstance(key, str)][-1]
                assert "\n" not in got and len(got) < 700, (keys, wrong, got)
                assert (file in got and key in got) or "chat template" in got, (keys, wrong, got)
            else:
                assert got == want, (keys, wrong)
    assert named > 5


@pytest.mark.parametrize("file", FILES)
def test_null_is_as_absent_or_is_named(folder: Path, file: str) -> None:
    content = read(folder / file)
    for key in content:
        write(folder / file, {k: v for k, v in content.items() if k != key})
        want = outcome(folder)
        write(folder / file, content | {key: None})
        got = outcome(folder)
        assert got == want or (isinstance(got, str) and key in got), (key, got)


# What was met in folders, and more of its kind: file, keys, value, what the line says of it.
TEXT, VISION = ("text_config",), ("vision_config",)
SCALING = (*TEXT, "rope_scaling")
WRONG: list[tuple[str, Path_, Any, str]] = [
    ("config", (*SCALING, "mrope_section"), [24, 20], "mrope_section: got (24, 20), want three"),
    (
        "config",
        (*SCALING, "mrope_section"),
        ["a", 2, 2],
        "got ['a', 2, 2], want a list",
    ),
    ("config", (*SCALING, "mrope_section"), "4,2,2", "mrope_section: got '4,2,2', want list"),
    ("config", (*SCALING, "mrope_section"), [-4, 8, 4], "mrope_section: got [-4, 8, 4], want"),
    ("config", SCALING, "default", "rope_scaling: got 'default', want dict"),
    ("config", (*SCALING, "rope_type"), "yarn", "rope_type: got 'yarn', want 'default'"),
    ("config", (*SCALING, "type"), "linear", "type: got 'linear', want 'default'"),
    ("config", (*TEXT, "rope_theta"), 0, "rope_theta: got 0.0, want a number above 0"),
    ("config", (*TEXT, "rope_theta"), 10**400, "rope_theta: got 1000"),
    ("config", (*TEXT, "rms_norm_eps"), -1e-6, "rms_norm_eps: got -1e-06, want"),
    ("config", (*TEXT, "num_attention_heads"), 0, "num_attention_heads: got 0, want"),
    ("config", (*TEXT, "num_key_value_heads"), 0, "num_key_value_heads: got 0, want"),
    ("config", (*TEXT, "num_key_value_heads"), 3, "num_attention_heads: got 4, want a multiple"),
    ("config", (*TEXT, "num_hidden_layers"), 10**9, "num_hidden_layers: got 1000000000, want"),
    ("config", (*TEXT, "vocab_size"), 100, "image_token_id: got 426, want less than vocab_size"),
    ("config", (*TEXT, "tie_word_embeddings"), False, "tie_word_embeddings: got False, want True"),
    (
        "config",
        (*TEXT, "rope_parameters"),
        {"rope_theta": 10_000.0},
        "rope_parameters: rope_theta: got 10000.0, want 5000000.0 as in rope_scaling",
    ),
    (
        "config",
        (*TEXT, "rope_parameters"),
        {"mrope_section": [2, 2, 4]},
        "rope_parameters: mrope_section: got [2, 2, 4], want [4, 2, 2] as in rope_scaling",
    ),
    (
        "config",
        (*SCALING, "rope_theta"),
        1.0,
        "rope_theta: rope_theta: got 5000000.0, want 1.0 as in rope_scaling",
    ),
    ("config", (*VISION, "num_heads"), 0, "num_heads: got 0, want a number from 1"),
    ("config", (*VISION, "num_heads"), 3, "vision head width: got hidden_size 32 / num_heads 3"),
    ("config", (*VISION, "depth"), -1, "depth: got -1, want a number from 1 to 1000"),
    ("config", (*VISION, "in_channels"), 4, "in_channels: got 4, want 3"),
    ("config", (*VISION, "num_position_embeddings"), -64, "embeddings: got -64, want a number"),
    (
        "config",
        (*VISION, "num_position_embeddings"),
        60,
        "embeddings: got 60, want a square",
    ),
    ("config", (*VISION, "deepstack_visual_indexes"), ["a"], "visual_indexes: got ['a'], want"),
    (
        "config",
        (*VISION, "deepstack_visual_indexes"),
        [1, 0],
        "indexes: got (1, 0), want rising",
    ),
    ("config", (*VISION, "deepstack_visual_indexes"), [3], "visual_indexes: got (3,), want rising"),
    ("config", (*VISION, "rope_theta"), "10000", "rope_theta: got '10000', want float"),
    ("config", (*VISION, "patch_size"), [4, 4], "patch_size: got [4, 4], want int"),
    ("config", ("model_type",), "qwen3_vl_moe", "model_type: got 'qwen3_vl_moe', want 'qwen3_vl'"),
    ("config", ("image_token_id",), -1, "image_token_id: got -1, want"),
    ("config", ("text_config",), [], "text_config: got [], want dict"),
    (
        "config",
        ("quantization_config",),
        {"quant_method": "fp8"},
        "quantization_config: got weights quantised by 'fp8', want float ones",
    ),
    ("config", (*TEXT, "quantization_config"), {}, "quantised by 'an unnamed method'"),
    ("preprocessor_config", ("resample",), "bicubic", "resample: got 'bicubic', want int"),
    ("preprocessor_config", ("resample",), 6, "resample: got 6, want a number from 0 to 5"),
    (
        "preprocessor_config",
        ("rescale_factor",),
        "1/255",
        "got '1/255', want float",
    ),
    ("preprocessor_config", ("image_std",), [0.5, 0, 0.5], "image_std: got [0.5, 0, 0.5], want"),
    (
        "preprocessor_config",
        ("merge_size",),
        1,
        "got 1, want 2, the spatial_merge_size",
    ),
    ("preprocessor_config", ("patch_size",), 14, "patch_size: got 14, want 4, the patch_size"),
    ("preprocessor_config", ("temporal_patch_size",), 1, "temporal_patch_size: got 1, want 2"),
    ("preprocessor_config", ("min_pixels",), 10**12, "min_pixels: got 1000000000000, want"),
    ("preprocessor_config", ("max_pixels",), 16, "min_pixels (size.shortest_edge): got 1024, want"),
    (
        "preprocessor_config",
        ("image_processor_type",),
        "SiglipImageProcessor",
        "image_processor_type: got 'SiglipImageProcessor', want 'Qwen2VLImageProcessor' or",
    ),
    ("generation_config", ("eos_token_id",), [], "eos_token_id: got [], want the id of a token"),
    ("generation_config", ("eos_token_id",), True, "eos_token_id: got True, want the id"),
    ("generation_config", ("eos_token_id",), -1, "eos_token_id: got -1, want the id"),
    ("generation_config", ("eos_token_id",), 10**6, "eos_token_id: got 1000000, want the id"),
    ("tokenizer_config", ("tokenizer_class",), 3, "tokenizer_class: got 3, want str or null"),
    ("tokenizer_config", ("split_special_tokens",), True, "split_special_tokens: got True, want F"),
    ("tokenizer_config", ("added_tokens_decoder",), {"x": {}}, "added_tokens_decoder: x: got {},"),
    (
        "tokenizer_config",
        ("added_tokens_decoder",),
        {"0": {"content": "a"}},
        "got 'a', want '!'",
    ),
]


@pytest.mark.parametrize(("file", "keys", "value", "line"), WRONG)
def test_wrong_values_end_in_one_line(
    folder: Path, file: str, keys: Path_, value: Any, line: str
) -> None:
    change(folder / f"{file}.json", keys, value)
    got = outcome(folder)
    assert isinstance(got, str) and got.startswith(f"{folder}/{file}.json: "), got
    assert line in got and "\n" not in got, got


@pytest.mark.parametrize("file", FILES)
def test_json_nested_a_thousand_deep_is_named(folder: Path, file: str) -> None:
    (folder / file).write_text('{"a":' * 100_000 + "1" + "}" * 100_000)
    got = outcome(folder)
    assert got == f"{folder / file}: got JSON nested too deep, want a JSON object"


TEMPLATES = {
    "{% for %}": "TemplateSyntaxError (Expected an expression",
    "{{ raise_exception('no pictures') }}": "TemplateError (no pictures)",
    "{{ messages[5].content }}": "UndefinedError",
    "{{ 1 / 0 }}": "ZeroDivisionError",
    "{{ 'x' + 1 }}": "TypeError",
    "{{ messages.__class__.__mro__ }}": "SecurityError",
    "{{ 'x' * 10**10 }}": "MemoryError",
    "{{ 'x' | center(10000000000) }}": "MemoryError",
    "{{ '%10000000000d' % 1 }}": "MemoryError",
    "{{ 'x' * 10**7 }}": "10000000 characters for a conversation, want at most 1000000",
    "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}": "RecursionError",
    "{% if 1 %}" * 200 + "x" + "{% endif %}" * 200: "",
    "x" * 1_000_001: "1000001 characters, want at most 1000000",
}


@pytest.mark.parametrize("template", TEMPLATES, ids=lambda text: text[:40])
def test_templates_that_fail_or_are_huge_end_in_one_line(folder: Path, template: str) -> None:
    write(folder / "chat_template.json", {"chat_template": template})
    got = outcome(folder)
    assert isinstance(got, str) and got.startswith(f"{folder}: chat template: got "), got
    assert TEMPLATES[template] in got and "\n" not in got and len(got) < 500, got


def test_a_template_that_fails_later_is_one_line_too(folder: Path) -> None:
    template = CHAT_TEMPLATE + "{% if messages[0].content == 'x' %}{{ 1 / 0 }}{% endif %}"
    write(folder / "chat_template.json", {"chat_template": template})
    processor = load_processor(folder)
    with pytest.raises(ValueError, match=r"chat template: got ZeroDivisionError"):
        encode(processor, [{"role": "user", "content": "x"}], add_generation_prompt=True)


ROPES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "4.57": ({}, {}),
    "vision theta alone": ({}, {"rope_theta": 500.0}),
    "vision scaling": ({}, {"rope_scaling": {"rope_theta": 500.0}}),
    "vision parameters": ({}, {"rope_parameters": {"rope_type": "axial", "rope_theta": 500}}),
    "vision default type": ({}, {"rope_parameters": {"rope_type": "default", "rope_theta": 500}}),
    "same in both": ({"rope_parameters": {"rope_theta": 5_000_000}}, {}),
    "theta inside": (
        {
            "rope_theta": None,
            "rope_scaling": None,
            "rope_parameters": {"rope_theta": 7.0, "mrope_section": [4, 2, 2]},
        },
        {},
    ),
    "empty scaling": (
        {"rope_scaling": {}, "rope_parameters": {"type": "default", "mrope_section": [4, 2, 2]}},
        {},
    ),
}


@pytest.mark.parametrize("name", ROPES)
def test_rope_is_read_as_transformers_reads_it(folder: Path, name: str) -> None:
    from transformers import Qwen3VLConfig

    content = read(folder / "config.json")
    for part, changes in zip(("text_config", "vision_config"), ROPES[name], strict=True):
        whole = content[part] | changes
        content[part] = {k: v for k, v in whole.items() if v is not None}
    write(folder / "config.json", content)
    ours, theirs = hf.read_config(folder), Qwen3VLConfig(**content).to_dict()
    text, vision = (theirs[part]["rope_parameters"] for part in ("text_config", "vision_config"))
    assert ours.text.rope_theta == text["rope_theta"]
    assert list(ours.text.mrope_section) == text["mrope_section"]
    assert ours.vision.rope_theta == vision["rope_theta"]
