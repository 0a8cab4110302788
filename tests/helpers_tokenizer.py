"""A checkpoint's processor files in miniature: Qwen's special tokens, template and settings.

`write_processor_folder` makes a folder that transformers' AutoTokenizer and Qwen3VLProcessor load,
and so does `mgsd_jax.data.processor.load_processor`.
"""

import json
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CORPUS = (
    "You are looking at a grid world. Map size: 4x4 Player: (3,1) Goal: (1,2) Holes: (2,2) (2,3)",
    "The player can move up, down, left or right. Open directions: (0,0): down (0,1): right",
    "Agent: (3,0) Printer: (4,1) Table: (2,2) pick up the printer and drop it next to the table.",
    "State the map first, then one sentence of plan, then <answer>up right down left</answer>.",
    "system user assistant Next to printer: none. What is the position of the goal?",
)
# ChatML as Qwen3-VL writes it: contents verbatim, a picture as start, pad, end.
CHAT_TEMPLATE = """
{%- macro body(content) -%}
    {%- if content is string -%}
        {{- content -}}
    {%- else -%}
        {%- for part in content -%}
            {%- if part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- else -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
{%- endmacro -%}
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' + body(message.content) + '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def build_tokenizer(vocab_size: int = 512) -> Tokenizer:
    """A byte-level BPE of at most `vocab_size` tokens; the special tokens come last, as Qwen's."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in SPECIAL_TOKENS])
    return tokenizer


def write_processor_folder(
    folder: Path,
    *,
    vocab_size: int = 512,
    patch_size: int = 16,
    temporal_patch_size: int = 2,
    merge_size: int = 2,
    min_pixels: int = 1024,
    max_pixels: int = 1024 * 1024,
    image_mean: tuple[float, float, float] = (0.5, 0.5, 0.5),
    image_std: tuple[float, float, float] = (0.5, 0.5, 0.5),
    table_side: int = 8,
    chat_template: str = CHAT_TEMPLATE,
    config: dict[str, Any] | None = None,
) -> dict[str, int]:
    """Write tokenizer, template, preprocessor and generation files; the special tokens' ids.

    `config` is the content of config.json; None writes a stub that holds only what a processor
    reads (the side of the position table and the token ids), or nothing where one exists already.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = build_tokenizer(vocab_size)
    vocabulary = tokenizer.get_vocab()
    ids = {token: vocabulary[token] for token in SPECIAL_TOKENS}
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(chat_template)
    pixels = {
        "size": {"shortest_edge": min_pixels, "longest_edge": max_pixels},
        "patch_size": patch_size,
        "temporal_patch_size": temporal_patch_size,
        "merge_size": merge_size,
        "image_mean": list(image_mean),
        "image_std": list(image_std),
    }
    _write(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "bos_token": None,
            "unk_token": None,
            "clean_up_tokenization_spaces": False,
            "model_max_length": 262144,
            "extra_special_tokens": {
                "image_token": "<|image_pad|>",
                "video_token": "<|video_pad|>",
                "vision_bos_token": "<|vision_start|>",
                "vision_eos_token": "<|vision_end|>",
            },
        },
    )
    _write(
        folder / "preprocessor_config.json",
        {
            **pixels,
            "image_processor_type": "Qwen2VLImageProcessor",
            "processor_class": "Qwen3VLProcessor",
        },
    )
    _write(
        folder / "video_preprocessor_config.json",
        {
            **pixels,
            "video_processor_type": "Qwen3VLVideoProcessor",
            "processor_class": "Qwen3VLProcessor",
        },
    )
    _write(
        folder / "generation_config.json",
        {
            "eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]],
            "pad_token_id": ids["<|endoftext|>"],
        },
    )
    stub = {
        "model_type": "qwen3_vl",
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "vision_config": {
            "model_type": "qwen3_vl",
            "num_position_embeddings": table_side**2,
            "patch_size": patch_size,
            "temporal_patch_size": temporal_patch_size,
            "spatial_merge_size": merge_size,
        },
    }
    if config is not None or not (folder / "config.json").exists():
        _write(folder / "config.json", stub if config is None else config)
    return ids


def _write(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")
