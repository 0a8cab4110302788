"""Tokenizers of checkpoints: read and checked, with the ids that matter; settings to write out."""

from collections.abc import Mapping
from pathlib import Path
from types import NoneType

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from mgsd_jax.checks.fields import LARGEST, Json, Kind, expect, field, optional, read_json
from mgsd_jax.checks.ranges import shown
from mgsd_jax.data import template as template_lib

# Types of fields in tokenizer_config.json; transformers fails on other types in many ways.
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


def load_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a checkpoint folder, which neither truncates nor pads.

    Raises ValueError naming the file, and the field where it is known, unless transformers can
    read it as a fast tokenizer whose added tokens are those that tokenizer_config.json lists.
    """
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
        raise ValueError(
            f"{folder}: tokenizer: got {type(tokenizer).__name__}, want a fast tokenizer"
        )
    for name, text in added.items():
        found = tokenizer.convert_ids_to_tokens(int(name))
        if found != text:
            raise ValueError(
                f"{path}: added_tokens_decoder: {name}: got {shown(text)}, want "
                f"{shown(found)} as in the tokenizer's own file"
            )
    # A saved file may ask for either; long prompts would then silently lose tokens.
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    return tokenizer


def _added_tokens(settings: Json, path: Path) -> dict[str, str]:
    """The added tokens of tokenizer_config.json by id; checks each of them and its switches."""
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


def load_eos_ids(
    folder: Path, config: Mapping[str, object], tokenizer: PreTrainedTokenizerFast
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


def load_pad_id(folder: Path, tokenizer: PreTrainedTokenizerFast) -> int:
    """The id that fills padded positions. Raises ValueError where the tokenizer names none."""
    if not isinstance(tokenizer.pad_token_id, int):
        raise ValueError(
            f"{folder / 'tokenizer_config.json'}: pad_token: got {tokenizer.pad_token!r}, "
            "want a token of the vocabulary"
        )
    return tokenizer.pad_token_id


def find_end_of_turn(
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


def load_token_id(
    folder: Path,
    config: Mapping[str, object],
    tokenizer: PreTrainedTokenizerFast,
    name: str,
    text: str,
) -> int:
    """The id of a special token, which has to be the one under `name` in config.json, if any."""
    # Two in a row must stay two ids: `encode` repeats image tokens after tokenising, where
    # transformers repeats their text before it.
    ids = tokenizer.backend_tokenizer.encode(text + text, add_special_tokens=False).ids
    if len(ids) != 2 or ids[0] != ids[1]:
        raise ValueError(f"{folder}: tokenizer: {text}: got ids {ids} for two, want one id twice")
    if name in config and config[name] != ids[0]:
        raise ValueError(
            f"{folder / 'config.json'}: {name}: got {config[name]}, want the tokenizer's {ids[0]}"
        )
    return ids[0]


_PLAIN = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def for_all_readers(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings of a tokenizer_config.json in a form that transformers 4.57 and 5 read alike.

    Version 5 saves a class that 4.57 does not have, and lists extra special tokens that 4.57 looks
    up by name. All other settings stay as they are.
    """
    changed = dict(settings)
    extra = settings.get("extra_special_tokens", {})
    if not isinstance(extra, dict):
        named = [
            key
            for key, value in settings.items()
            if key.endswith("_token") and isinstance(value, str) and key not in _PLAIN
        ]
        changed["extra_special_tokens"] = {key: changed.pop(key) for key in named}
        if extra:
            changed["additional_special_tokens"] = extra
    if settings.get("tokenizer_class") == "TokenizersBackend":
        changed["tokenizer_class"] = "PreTrainedTokenizerFast"
        # Otherwise that class would also make token types, which Qwen3-VL does not take.
        changed["model_input_names"] = ["input_ids", "attention_mask"]
    return changed
