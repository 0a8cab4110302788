"""Messages to model inputs, by a checkpoint's own tokenizer, chat template and picture settings.

Axes: T tokens, R tokens of an answer, P patches, C patch channels.
Token ids and patches equal those of transformers' Qwen3VLProcessor with its PIL picture processor,
bit for bit; the tests compare them.
"""

import codecs
import dataclasses
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, NamedTuple

import numpy as np
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mgsd_jax.checks.fields import LARGEST, Kind, expect, field, optional, read_json, whole
from mgsd_jax.checks.ranges import shown
from mgsd_jax.data import template as template_lib
from mgsd_jax.data.pictures import PictureSettings, cut_patches, load_picture_settings
from mgsd_jax.data.positions import Grid, Interpolation, find_pictures, interpolation, token_count

# What of tokenizer_config.json has to be of a kind before transformers is let at it.
TOKENIZER_FIELDS: dict[str, Kind] = {
    "tokenizer_class": (str, NoneType),
    "added_tokens_decoder": dict,
    "additional_special_tokens": list,
    "chat_template": (str, list, dict, NoneType),
    "extra_special_tokens": (list, dict),
    "model_max_length": (int, float, NoneType),
    **dict.fromkeys(("bos_token", "eos_token", "pad_token", "unk_token"), (str, dict, NoneType)),
    **dict.fromkeys(("add_bos_token", "add_prefix_space", "clean_up_tokenization_spaces"), bool),
}

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
    """Everything between messages and model inputs that belongs to a checkpoint."""

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
    """Read a checkpoint folder's tokenizer, template, picture settings and token ids.

    Raises ValueError naming the file and field, got and want, where one is missing or broken.
    """
    folder = Path(folder)
    config = read_json(folder / "config.json")
    tokenizer = _load_tokenizer(folder)
    template = template_lib.load_template(folder, tokenizer)
    eos_ids = _load_eos_ids(folder, config, tokenizer)
    return Processor(
        tokenizer=tokenizer,
        chat_template=template,
        pictures=load_picture_settings(folder, config),
        table_side=_load_table_side(folder, config),
        eos_ids=eos_ids,
        pad_id=_load_pad_id(folder, tokenizer),
        end_of_turn=_find_end_of_turn(tokenizer, template, eos_ids, folder),
        opens_thought=template_lib.opens_thought(tokenizer, template),
        **{
            name: _load_token_id(folder, config, tokenizer, name, text)
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
    where the rendered text has an image or video token that no picture of the messages stands for.
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

    # The template writes one image token a picture; the model reads one a merged patch.
    settings = processor.pictures
    cut = [cut_patches(array, settings) for array in arrays]
    grids = [grid for _, grid in cut]
    repeats = np.ones(len(tokens), np.int64)
    repeats[where] = [token_count(grid, settings.merge_size) for grid in grids]
    tokens = np.repeat(tokens, repeats)
    starts = find_pictures(
        tokens, grids, image_token_id=processor.image_token_id, merge_size=settings.merge_size
    )
    return Encoded(
        tokens,
        tuple(
            PicturePatches(
                patches,
                grid,
                start,
                settings.merge_size,
                interpolation(
                    grid, merge_size=settings.merge_size, table_side=processor.table_side
                ),
            )
            for (patches, grid), start in zip(cut, starts, strict=True)
        ),
    )


def encode_answer(processor: Processor, answer: str) -> np.ndarray:
    """Tokens [R] int32 of an answer and the end of its turn, as a model would sample them."""
    return _tokenise(processor, answer + processor.end_of_turn)


def encode_example(
    processor: Processor, prompt_messages: Sequence[Message], answer: str
) -> tuple[Encoded, int]:
    """A prompt with its generation prefix and then the answer's tokens; and the prompt's length.

    The answer is tokenised by itself, so it cannot merge with the prefix: a rollout could not.
    """
    prompt = encode(processor, prompt_messages, add_generation_prompt=True)
    tokens = np.concatenate([prompt.tokens, encode_answer(processor, answer)])
    return Encoded(tokens, prompt.pictures), len(prompt.tokens)


def decode(processor: Processor, tokens: Sequence[int] | np.ndarray) -> str:
    """The text of tokens, without special ones; ids beyond the tokenizer's own are left out."""
    return processor.tokenizer.backend_tokenizer.decode(
        np.asarray(tokens).tolist(), skip_special_tokens=True
    )


def spell(
    processor: Processor, rows: Sequence[np.ndarray]
) -> list[tuple[str, list[tuple[int, int]]]]:
    """(text, [(first character, end) of each token]) of each row of tokens.

    The text is that of `decode`. A token that holds a part of a character's bytes touches that
    character; special tokens and ids beyond the tokenizer's own touch none. Tokens are looked up
    once, however many rows they are in, and each row is read in one pass.
    """
    backend = processor.tokenizer.backend_tokenizer
    special = {i for i, token in backend.get_added_tokens_decoder().items() if token.special}
    pieces: dict[int, bytes] = {}
    for token in {int(token) for row in rows for token in row}:
        text = None if token in special else backend.id_to_token(token)
        pieces[token] = b"" if text is None else _token_bytes(text)
    return [_join([pieces[int(token)] for token in row]) for row in rows]


def _join(pieces: Sequence[bytes]) -> tuple[str, list[tuple[int, int]]]:
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    texts: list[str] = []
    spans: list[tuple[int, int]] = []
    done = 0  # characters that are complete
    for piece in pieces:
        start = done
        texts.append(decoder.decode(piece))
        done += len(texts[-1])
        begins_another = bool(piece) and bool(decoder.getstate()[0])
        spans.append((start, done + begins_another))
    texts.append(decoder.decode(b"", final=True))
    return "".join(texts), spans


def _byte_letters() -> dict[str, int]:
    """The byte of each character of a byte-level vocabulary; printable ones are themselves."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


_BYTES = _byte_letters()


def _token_bytes(token: str) -> bytes:
    """The bytes of a vocabulary entry; an added token with other characters is its own text."""
    if all(letter in _BYTES for letter in token):
        return bytes(_BYTES[letter] for letter in token)
    return token.encode()


def _tokenise(processor: Processor, text: str) -> np.ndarray:
    backend = processor.tokenizer.backend_tokenizer
    return np.array(backend.encode(text, add_special_tokens=False).ids, dtype=np.int32)


def _without_pixels(
    messages: Sequence[Message],
) -> tuple[list[dict[str, Any]], list[np.ndarray]]:
    """The messages as a template reads them, and the pictures taken out of them in order."""
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


def _load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    path = folder / "tokenizer_config.json"
    settings = read_json(path)
    for name, kind in TOKENIZER_FIELDS.items():
        if name in settings:
            field(settings, name, kind, path)
    expect(settings, "split_special_tokens", [False], path)
    added = _added_tokens(settings, path)
    if (folder / "tokenizer.json").exists() or not (folder / "vocab.json").exists():
        field(read_json(folder / "tokenizer.json"), "model", dict, folder / "tokenizer.json")
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(folder), local_files_only=True, trust_remote_code=False
        )
    except Exception as error:  # tokenizers, written in Rust, raises no narrower one
        said = " ".join(str(error).split())[:200]
        raise ValueError(
            f"{folder}: tokenizer: got {type(error).__name__} ({said}) from tokenizer_config.json "
            "and the files beside it, want those of a tokenizer"
        ) from None
    if not isinstance(tokenizer, PreTrainedTokenizerFast):
        raise ValueError(f"{folder}: tokenizer: got {type(tokenizer).__name__}, want a fast one")
    for name, text in added.items():
        found = tokenizer.convert_ids_to_tokens(int(name))
        if found != text:
            raise ValueError(
                f"{path}: added_tokens_decoder: {name}: got {shown(text)}, want "
                f"{shown(found)} as in the tokenizer's own file"
            )
    # A saved file may ask for either, and then long prompts would lose tokens in silence.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _added_tokens(settings: Mapping[str, Any], path: Path) -> dict[str, str]:
    """The tokens of tokenizer_config.json by their ids, each of them and its switches checked."""
    tokens = {}
    for name, token in settings.get("added_tokens_decoder", {}).items():
        source = f"{path}: added_tokens_decoder: {name}"
        if not isinstance(token, dict) or not name.isdecimal() or int(name) > LARGEST:
            raise ValueError(
                f"{source}: got {shown(token)}, want an object with the token of an id"
            )
        for switch in ("lstrip", "normalized", "rstrip", "single_word", "special"):
            if switch in token:
                field(token, switch, bool, source)
        tokens[name] = field(token, "content", str, source)
    for name in ("additional_special_tokens", "extra_special_tokens"):
        listed = settings.get(name, [])
        for key, text in listed.items() if isinstance(listed, dict) else enumerate(listed):
            if not isinstance(text, str | dict):
                raise ValueError(f"{path}: {name}: {key}: got {shown(text)}, want a token")
    return tokens


def _load_eos_ids(
    folder: Path, config: Mapping[str, Any], tokenizer: PreTrainedTokenizerFast
) -> tuple[int, ...]:
    """Ids that end a response: the generation file's, else the config's, else the tokenizer's."""
    path = folder / "generation_config.json"
    generation = read_json(path) if path.exists() else {}
    text_config = optional(config, "text_config", dict, folder / "config.json") or {}
    for source in (generation, config, text_config):
        if source.get("eos_token_id") is not None:
            found = source["eos_token_id"]
            break
    else:
        found = tokenizer.eos_token_id
    listed = found if isinstance(found, list) else [found]
    ids = tuple(i for i in listed if type(i) is int and 0 <= i < len(tokenizer))
    if not ids or len(ids) != len(listed):
        raise ValueError(
            f"{path}: eos_token_id: got {shown(found)}, want the id of a token or a list of them"
        )
    return ids


def _load_pad_id(folder: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    if not isinstance(tokenizer.pad_token_id, int):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: pad_token: got {tokenizer.pad_token!r}, "
            "want a token of the vocabulary"
        )
    return tokenizer.pad_token_id


def _find_end_of_turn(
    tokenizer: PreTrainedTokenizerFast, template: str, eos_ids: tuple[int, ...], folder: Path
) -> str:
    """The token that the template writes right after an assistant's answer."""
    answer = "An answer of the assistant"
    chat = [{"role": "user", "content": "A question"}, {"role": "assistant", "content": answer}]
    text = template_lib.render(tokenizer, template, chat, is_prompt=False)
    after = text.rpartition(answer)[2][:80]
    ids = tokenizer.backend_tokenizer.encode(after, add_special_tokens=False).ids
    if not ids or ids[0] not in eos_ids:
        raise ValueError(
            f"{folder}: chat template: got {after!r} after an answer, "
            f"want it to begin with a token that ends a response, one of {eos_ids}"
        )
    return str(tokenizer.convert_ids_to_tokens(ids[0]))


def _load_table_side(folder: Path, config: Mapping[str, Any]) -> int:
    path, name = folder / "config.json", "vision_config.num_position_embeddings"
    rows = whole(config, name, path)
    side = math.isqrt(rows)
    if side**2 != rows:
        raise ValueError(f"{path}: {name}: got {rows}, want a positive square")
    return side


def _load_token_id(
    folder: Path,
    config: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    text: str,
) -> int:
    # Twice in a row, since image tokens are repeated after tokenising rather than before.
    ids = tokenizer.backend_tokenizer.encode(text + text, add_special_tokens=False).ids
    if len(ids) != 2 or ids[0] != ids[1]:
        raise ValueError(f"{folder}: tokenizer: {text}: got ids {ids} for two, want one id twice")
    if name in config and config[name] != ids[0]:
        raise ValueError(
            f"{folder / 'config.json'}: {name}: got {config[name]}, want the tokenizer's {ids[0]}"
        )
    return ids[0]
