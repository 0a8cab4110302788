"""Settings of a tokenizer as every version of transformers reads them."""

from collections.abc import Mapping
from typing import Any

_PLAIN = [f"{kind}_token" for kind in ("bos", "eos", "unk", "sep", "pad", "cls", "mask")]


def for_all_readers(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a tokenizer_config.json such that transformers 4.57 and 5 read it alike.

    5 saves a class that 4.57 does not have, extra special tokens as a list where 4.57 wants them by
    name, and the named ones elsewhere. What is not of that kind stays as it is.
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
        # that class would else make token types, which Qwen3-VL does not take
        changed["model_input_names"] = ["input_ids", "attention_mask"]
    return changed
