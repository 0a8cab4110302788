"""The weight files of a Hugging Face folder, opened once every tensor in them is right."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mgsd_jax.checks.fields import read_json
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.weights import files
from mgsd_jax.weights.table import EMBEDDING, LM_HEAD, leaves

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_FILES = "model-*-of-*.safetensors"
OTHER_FILES = ("*.bin", "*.pt", "*.pth", "*.gguf", "consolidated*", "adapter_model.*")
Handles = dict[str, Any]  # tensor name -> open safetensors file

_RENAME = "; rename them model.visual... and model.language_model...: nothing else differs"
_UNQUANTISED = "; take the release that is not quantised"
# What the name of one tensor gives away: of whatever fits, what it holds and what to do.
FOREIGN = (
    (r"\.(weight_scale_inv|weight_scale|input_scale)$", f"weights quantised to FP8{_UNQUANTISED}"),
    (r"\.(qweight|qzeros|g_idx)$", f"weights quantised by AWQ or GPTQ{_UNQUANTISED}"),
    (r"\.(absmax|quant_map|quant_state\.)", f"weights quantised by bitsandbytes{_UNQUANTISED}"),
    (r"\.(weight_packed|weight_shape)$", f"weights of compressed-tensors{_UNQUANTISED}"),
    (
        r"^base_model\.model\.|\.base_layer\.|\.lora_[AB]\.",
        "a model saved with its PEFT adapters around it; merge them (merge_and_unload) and save it",
    ),
    (r"^model\.(layers|embed_tokens|norm)\.", f"older names of a decoder{_RENAME}"),
    (r"^visual\.", f"older names of a vision tower{_RENAME}"),
    (r"\.experts\.|\.gate\.weight$", "a mixture of experts, which is another model"),
    (r"^(module|_orig_mod)\.", "a model saved inside a wrapper; save the model that it wraps"),
)


def open_checked(folder: Path, config: ModelConfig) -> Handles:
    """The open file of every tensor that the config wants, once all of them are right."""
    problems: list[str] = []
    found: Handles = {}
    for file, named in _weight_files(folder, problems).items():
        try:
            handle = files.open_tensors(folder / file)
        except ValueError as error:
            problems.append(str(error))
            found |= dict.fromkeys(named or (), None)  # reported once, not again for each tensor
            continue
        there = set(handle.keys())
        for name in sorted(there - named if named is not None else ()):
            problems.append(f"{file}: {name}: got a tensor that {INDEX_FILE} does not place there")
        for name in sorted(named - there if named is not None else ()):
            problems.append(f"{file}: {name}: not found, although {INDEX_FILE} places it there")
            found[name] = None
        found |= dict.fromkeys(there & named if named is not None else there, handle)
    _refuse_foreign(folder, found)
    problems += _tensor_problems(found, config)
    if problems:
        raise files.problem_list(f"weights in {folder} do not fit the config", problems)
    return found


def _refuse_foreign(folder: Path, found: Handles) -> None:
    """Raises ValueError with one line for weights of another kind, not one for each tensor."""
    for pattern, kind in FOREIGN:
        name = next((name for name in sorted(found) if re.search(pattern, name)), None)
        if name is not None:
            raise ValueError(f"{folder}: got the tensor {name}, which is of {kind}")
    for name, handle in found.items():
        if handle is not None and handle.get_slice(name).get_dtype().startswith("F8"):
            raise ValueError(f"{folder}: got {name} in FP8, want float weights{_UNQUANTISED}")


def _weight_files(folder: Path, problems: list[str]) -> dict[str, set[str] | None]:
    """Each weight file with the tensors that the index places there (None: no index)."""
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not (folder / INDEX_FILE).is_file():
        others = sorted(file.name for other in OTHER_FILES for file in folder.glob(other))
        beside = f" (but {', '.join(others[:3])}, which is not read)" if others else ""
        problems.append(
            f"{folder}: got neither {SINGLE_FILE} nor {INDEX_FILE}{beside}, want one of them"
        )
        return {}
    try:
        index = read_json(folder / INDEX_FILE)
    except ValueError as error:
        problems.append(str(error))
        return {}
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        problems.append(f"{folder / INDEX_FILE}: weight_map: got {weight_map!r}, want file names")
        return {}
    placed: dict[str, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            problems.append(
                f"{INDEX_FILE}: {name}: got {file!r}, want the name of a file beside it"
            )
            continue
        there = placed.setdefault(file, set())
        assert there is not None
        there.add(name)
    return placed


def _tensor_problems(found: Handles, config: ModelConfig) -> Iterator[str]:
    """Yields what is wrong with the tensors: missing, of another shape or type, or unknown.

    A tensor found as None is unreadable, which has been reported already.
    """
    if not found:
        return
    wanted = {name: leaf.hf_shape for leaf in leaves(config) for name in leaf.names}
    is_tied_head = config.tie_word_embeddings and LM_HEAD in found
    if is_tied_head:
        wanted[LM_HEAD] = wanted[EMBEDDING]
    sound = True
    for name, shape in wanted.items():
        if name not in found:
            yield f"{name}: not found, want float{list(shape)}"
            continue
        if found[name] is None:
            continue
        problem = files.tensor_problem(found[name], name, shape)
        if problem is not None:
            sound = sound and name not in (EMBEDDING, LM_HEAD)
            yield problem
    for name in sorted(set(found) - set(wanted)):
        yield f"{name}: got a tensor that the config has no place for, want it absent"
    if is_tied_head and sound and found[LM_HEAD] and found.get(EMBEDDING):
        yield from _tied_problems(found)


def _tied_problems(found: Handles) -> Iterator[str]:
    head, table = (found[name].get_slice(name) for name in (LM_HEAD, EMBEDDING))
    length = head.get_shape()[0]
    for start in range(0, length, 8192):  # a whole table would be the largest array in memory
        rows = slice(start, min(start + 8192, length))
        if not np.array_equal(head[rows], table[rows]):
            yield f"{LM_HEAD}: got other values than {EMBEDDING}, want equal ones: the config ties"
            return
