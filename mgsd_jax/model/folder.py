"""The weight files of a Hugging Face folder, opened once every tensor in them is right."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from mgsd_jax.fields import read_json
from mgsd_jax.model import files
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.table import EMBEDDING, LM_HEAD, leaves

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
SHARD_FILES = "model-*-of-*.safetensors"
Handles = dict[str, Any]  # tensor name -> open safetensors file


def open_checked(folder: Path, config: ModelConfig) -> Handles:
    """Return the open file of every tensor that the config wants, once all of them are right."""
    problems: list[str] = []
    found: dict[str, Any] = {}
    for file, named in _weight_files(folder, problems).items():
        try:
            handle = files.open_tensors(folder / file)
        except ValueError as error:
            problems.append(str(error))
            found |= dict.fromkeys(named or (), None)  # told once, not once more for each tensor
            continue
        there = set(handle.keys())
        for name in sorted(there - named if named is not None else ()):
            problems.append(f"{file}: {name}: got a tensor that {INDEX_FILE} does not place there")
        for name in sorted(named - there if named is not None else ()):
            problems.append(f"{file}: {name}: got no such tensor, want it as {INDEX_FILE} says")
            found[name] = None
        found |= dict.fromkeys(there & named if named is not None else there, handle)
    problems += _tensor_problems(found, config)
    if problems:
        raise files.problem_list(f"weights in {folder} do not fit the config", problems)
    return found


def _weight_files(folder: Path, problems: list[str]) -> dict[str, set[str] | None]:
    """Return each weight file with the tensors that the index places there (None: no index)."""
    if (folder / SINGLE_FILE).is_file():
        return {SINGLE_FILE: None}
    if not (folder / INDEX_FILE).is_file():
        problems.append(f"{folder}: got neither {SINGLE_FILE} nor {INDEX_FILE}, want one of them")
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


def _tensor_problems(found: dict[str, Any], config: ModelConfig) -> Iterator[str]:
    """Yield what is wrong with the tensors: missing, of another shape or type, or unknown.

    A tensor found as None is known to be unreadable already.
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
            yield f"{name}: got no such tensor, want float{list(shape)}"
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
    for start in range(0, length, 8192):  # a whole table would be the largest thing in memory
        rows = slice(start, min(start + 8192, length))
        if not np.array_equal(head[rows], table[rows]):
            yield f"{LM_HEAD}: got other values than {EMBEDDING}, want equal ones: the config ties"
            return
