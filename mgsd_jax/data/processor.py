"""Messages to token ids and patches, with the settings of a checkpoint.

Axes: T tokens, R tokens of an answer, P patches, C patch channels.
Ids and patches equal those of transformers' Qwen3VLProcessor with its PIL picture processor bit for
bit; the tests compare them.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerFast

from mgsd_jax.checks.fields import read_json, whole
from mgsd_jax.data import template as template_lib
from mgsd_jax.data import tokenizer as tokenizer_lib
from mgsd_jax.data.pictures import PictureSettings, cut_patches, load_picture_settings
from mgsd_jax.data.positions import Grid, Interpolation, interpolation, token_count

Message = Mapping[str, Any]  # {'role': str, 'content': str | list of parts}, as chat templates read


class PicturePatches(NamedTuple):
    """One picture of a sequence, cut into patches."""

    patches: np.ndarray  # [P, C] float32, normalised pixels, merge-block order
    grid: Grid  # (1, rows, columns) in patches
    start: int  # index of its first image token in the sequence
    merge_size: int
    where: Interpolation  # of each patch


class Encoded(NamedTuple):
    """One unpadded sequence and its pictures, in order."""

    tokens: np.ndarray  # [T] int32
    pictures: tuple[PicturePatches, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """The part of a checkpoint that turns messages into model inputs."""

    tokenizer: PreTrainedTokenizerFast
    chat_template: str
    pictures: PictureSettings
    table_side: int  # the learned position table is table_side x table_side
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    eos_ids: tuple[int, ...]  # any of them ends a response
    pad_id: int
    end_of_turn: str  # what the template writes after an answer, one token, e.g. <|im_end|>
    opens_thought: bool  # a prompt ends inside <think>, as that of a Thinking checkpoint does

    @property
    def banned_ids(self) -> tuple[int, int]:
        """Placeholders of pictures and videos, which must not be sampled in a response."""
        return self.image_token_id, self.video_token_id


def load_processor(folder: str | Path) -> Processor:
    """Reads tokenizer, chat template, picture settings and token ids of a checkpoint folder.

    Raises ValueError naming file and field where one is missing or wrong.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    tokenizer = tokenizer_lib.load_tokenizer(folder)
    template = template_lib.load_template(folder, tokenizer)
    eos_ids = tokenizer_lib.load_eos_ids(folder, config, tokenizer)
    return Processor(
        tokenizer=tokenizer,
        chat_template=template,
        pictures=load_picture_settings(folder, config),
        table_side=_load_table_side(folder, config),
        eos_ids=eos_ids,
        pad_id=tokenizer_lib.load_pad_id(folder, tokenizer),
        end_of_turn=tokenizer_lib.find_end_of_turn(tokenizer, template, eos_ids, folder),
        opens_thought=template_lib.opens_thought(tokenizer, template),
        **{
            name: tokenizer_lib.load_token_id(folder, config, tokenizer, name, text)
            for name, text in (
                ("image_token_id", "<|image_pad|>"),
                ("video_token_id", "<|video_pad|>"),
                ("vision_start_token_id", "<|vision_start|>"),
                ("vision_end_token_id", "<|vision_end|>"),
            )
        },
    )


def encode(
    processor: Processor, messages: Sequence[Message], *, add_generation_prompt: bool
) -> Encoded:
    """Tokens of a conversation under the checkpoint's chat template, and its pictures.

    A message's content is a string or a list of {'type': 'text', 'text': str} and
    {'type': 'image', 'image': uint8 [height, width, 3]}. Raises ValueError for any other part, and
    where the text of a message contains image or video tokens of its own.
    """
    rendered, arrays = _without_pixels(messages)
    text = template_lib.render(
        processor.tokenizer, processor.chat_template, rendered, is_prompt=add_generation_prompt
    )
    tokens = _tokenise(processor, text)
    if (tokens == processor.video_token_id).any():
        raise ValueError("messages: got a video token, want text and pictures only")
    where = np.flatnonzero(tokens == processor.image_token_id)
    if len(where) != len(arrays):
        raise ValueError(f"rendered messages: got {len(where)} image tokens, want {len(arrays)}")
    if not arrays:
        return Encoded(tokens, ())

    # The template writes one image token per picture; the model reads one per merged patch.
    settings = processor.pictures
    cut = [cut_patches(array, settings) for array in arrays]
    counts = [token_count(grid, settings.merge_size) for _, grid in cut]
    repeats = np.ones(len(tokens), np.int64)
    repeats[where] = counts
    # A picture starts where its one token was, moved by the tokens that the earlier ones gained.
    starts = where + np.cumsum([0, *counts[:-1]]) - np.arange(len(where))
    pictures = tuple(
        PicturePatches(
            patches,
            grid,
            int(start),
            settings.merge_size,
            interpolation(grid, merge_size=settings.merge_size, table_side=processor.table_side),
        )
        for (patches, grid), start in zip(cut, starts, strict=True)
    )
    return Encoded(np.repeat(tokens, repeats), pictures)


def encode_answer(processor: Processor, answer: str) -> np.ndarray:
    """Tokens [R] int32 of an answer and the end of its turn, as a model would sample them."""
    return _tokenise(processor, answer + processor.end_of_turn)


def encode_example(
    processor: Processor, prompt_messages: Sequence[Message], answer: str
) -> tuple[Encoded, int]:
    """The tokens of a prompt and of an answer to it, and the length of the prompt.

    The answer is tokenised by itself: a sampled one could not merge with the prefix either.
    """
    prompt = encode(processor, prompt_messages, add_generation_prompt=True)
    tokens = np.concatenate([prompt.tokens, encode_answer(processor, answer)])
    return Encoded(tokens, prompt.pictures), len(prompt.tokens)


def _tokenise(processor: Processor, text: str) -> np.ndarray:
    backend = processor.tokenizer.backend_tokenizer
    return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def _without_pixels(
    messages: Sequence[Message],
) -> tuple[list[Message], list[np.ndarray]]:
    """The messages without pixels, as a template reads them, and their pictures in order."""
    rendered, arrays = [], []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            parts = []
            for part in content:
                if part["type"] == "image":
                    arrays.append(part["image"])
                    parts.append({"type": "image"})
                elif part["type"] == "text":
                    parts.append({"type": "text", "text": part["text"]})
                else:
                    raise ValueError(f"content part: got type {part['type']!r}, want text or image")
            content = parts
        rendered.append({"role": message["role"], "content": content})
    return rendered, arrays


def _load_table_side(folder: Path, config: Mapping[str, object]) -> int:
    path, name = folder / "config.json", "vision_config.num_position_embeddings"
    rows = whole(config, name, path)
    side = math.isqrt(rows)
    if side**2 != rows:
        raise ValueError(f"{path}: {name}: got {rows}, want a positive square")
    return side
