"""Safetensors files read with checks and written as a stream, and folders that appear at once.

The writer puts the header first and then one tensor at a time, so that the host never holds more
than the tensor in hand; `safetensors.numpy.save_file` wants all of a file's tensors at once.
Format: https://huggingface.co/docs/safetensors, "Format": 8 bytes little-endian header length,
a JSON header padded with spaces to 8 bytes, then the tensors without holes.
"""

import contextlib
import errno
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

FloatType = Literal["float32", "bfloat16"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
READABLE = ("F32", "BF16", "F16", "F64")  # float8 would need scales that nothing here knows
METADATA = {"format": "pt"}  # transformers refuses a file that does not say so
MOST = 10  # problems of one cause that an error lists
SAFETENSORS_NAMES: dict[str, str] = {"float32": "F32", "bfloat16": "BF16"}


def float_type(dtype: FloatType | np.dtype) -> FloatType:
    """Return the name of a float type that weights are kept in; ValueError where it is another."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype of weights: got {name}, want one of {sorted(DTYPES)}")
    return name


@dataclass(frozen=True)
class TensorSpec:
    """A tensor of a safetensors file before its values are there."""

    name: str
    shape: tuple[int, ...]
    dtype: FloatType

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * DTYPES[self.dtype].itemsize


def problem_list(what: str, problems: Sequence[str]) -> ValueError:
    """Return the one ValueError that lists the problems, a line each, MOST of each cause."""
    causes: dict[str, list[str]] = {}
    for problem in problems:
        # what was found, without the names, shapes and numbers that differ
        cause = " ".join(re.findall(r"\b[a-z]+\b", problem.partition("got ")[2]))
        causes.setdefault(cause, []).append(problem)
    noun = "problem" if len(problems) == 1 else "problems"
    lines = [f"{what}, {len(problems)} {noun}:"]
    for listed in causes.values():
        lines += listed[:MOST]
        if len(listed) > MOST:
            lines.append(f"... and {len(listed) - MOST} more like the last one")
    return ValueError("\n  ".join(lines))


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, value: bytes) -> None:
    """Write a whole file; OSError naming it where the disk refuses."""
    _write(path, [value])


def open_tensors(path: Path) -> Any:
    """Return the open safetensors file (a lazy, memory-mapped `safe_open`).

    Raises ValueError where the file is missing, empty, truncated or has a corrupt header: the
    library checks that the header's offsets cover the file exactly.
    """
    if not path.is_file():
        raise ValueError(f"{path}: got no such file, want a safetensors file")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: got a corrupt or truncated file of {size} bytes ({error}), "
            "want a whole safetensors file"
        ) from error


def tensor_problem(handle: Any, name: str, shape: Sequence[int]) -> str | None:
    """Return what is wrong with a tensor's type and shape, None where nothing is."""
    part = handle.get_slice(name)
    if part.get_shape() == list(shape) and part.get_dtype() in READABLE:
        return None
    got = f"{part.get_dtype()}{part.get_shape()}"
    return f"{name}: got {got}, want {'|'.join(READABLE)}{list(shape)}"


def write_tensors(
    path: Path, specs: Sequence[TensorSpec], values: Iterable[np.ndarray], metadata: dict[str, str]
) -> None:
    """Write one safetensors file, `values` in the order of `specs`, one in memory at a time.

    Raises ValueError where a value is not what its spec says, OSError naming the file where the
    disk refuses. Half a file may then be left: write into a scratch folder.
    """
    header: dict[str, Any] = {"__metadata__": metadata}
    offset = 0
    for spec in specs:
        header[spec.name] = {
            "dtype": SAFETENSORS_NAMES[spec.dtype],
            "shape": list(spec.shape),
            "data_offsets": [offset, offset + spec.nbytes],
        }
        offset += spec.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    _write(path, _file_parts(len(text).to_bytes(8, "little") + text, specs, values))


@contextlib.contextmanager
def scratch_folder(folder: Path, *, nbytes: int = 0) -> Iterator[Path]:
    """Yield `folder`, new and empty, and remove it after the block; left-overs in it are cleared.

    Raises OSError where its disk has less than `nbytes` free.
    """
    shutil.rmtree(folder, ignore_errors=True)
    free = shutil.disk_usage(folder.parent).free
    if free < nbytes:
        raise OSError(
            errno.ENOSPC, f"no space left for {folder.parent}: got {free} bytes free, want {nbytes}"
        )
    folder.mkdir()
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def check_free(folder: Path) -> None:
    """Raise ValueError where something is at `folder` that is no empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder}: got an existing file or folder, want an absent or empty one; "
            "remove it, or name another"
        )


@contextlib.contextmanager
def new_folder(folder: Path, *, nbytes: int = 0, replaces: bool = False) -> Iterator[Path]:
    """Yield a folder to fill that becomes `folder` in one rename once the block has ended well.

    With `replaces`, what was there goes away after that. A crash leaves at most `.<name>.partial`
    and `.<name>.replaced` beside it, which the next call clears away.
    Raises ValueError where `folder` is there and not empty, OSError where its disk has less than
    `nbytes` free.
    """
    if not replaces:
        check_free(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    old = folder.parent / f".{folder.name}.replaced"
    with scratch_folder(folder.parent / f".{folder.name}.partial", nbytes=nbytes) as partial:
        yield partial
        shutil.rmtree(old, ignore_errors=True)
        if folder.exists():
            folder.replace(old)
        partial.replace(folder)
    shutil.rmtree(old, ignore_errors=True)


def _file_parts(
    header: bytes, specs: Sequence[TensorSpec], values: Iterable[np.ndarray]
) -> Iterator[bytes | memoryview]:
    yield header
    for spec, value in zip(specs, values, strict=True):
        if value.shape != spec.shape or value.dtype != DTYPES[spec.dtype]:
            raise ValueError(
                f"{spec.name}: got {value.dtype}{list(value.shape)}, "
                f"want {spec.dtype}{list(spec.shape)}"
            )
        # bfloat16 has no buffer protocol, its bytes have
        yield np.ascontiguousarray(value).reshape(-1).view(np.uint8).data


def _write(path: Path, parts: Iterable[bytes | memoryview]) -> None:
    try:
        with path.open("wb") as file:
            for part in parts:
                file.write(part)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
