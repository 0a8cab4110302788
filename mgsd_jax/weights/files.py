"""Files of weights read with checks and written whole, and folders that appear at once."""

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Generator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

FloatType = Literal["float32", "bfloat16"]
DTYPES: dict[str, np.dtype] = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
}
READABLE = ("F32", "BF16", "F16", "F64")  # float8 would need scales that nothing here knows
METADATA = {"format": "pt"}  # transformers refuses files without it
MOST = 10  # problems of one cause that an error lists


def float_type(dtype: FloatType | np.dtype) -> FloatType:
    """The name of a float type that weights may have; ValueError for any other."""
    name = dtype if isinstance(dtype, str) else np.dtype(dtype).name
    if name not in ("float32", "bfloat16"):
        raise ValueError(f"dtype of weights: got {name}, want one of {sorted(DTYPES)}")
    return name


def problem_list(what: str, problems: Sequence[str]) -> ValueError:
    """One ValueError that lists the problems, a line each, at most MOST of one cause."""
    causes: dict[str, list[str]] = {}
    for problem in problems:
        # The words of what was found, without the names, shapes and numbers that differ.
        cause = " ".join(re.findall(r"\b[a-z]+\b", problem.partition("got ")[2]))
        causes.setdefault(cause, []).append(problem)
    noun = "problem" if len(problems) == 1 else "problems"
    lines = [f"{what}, {len(problems)} {noun}:"]
    for listed in causes.values():
        lines += listed[:MOST]
        if len(listed) > MOST:
            lines.append(f"... and {len(listed) - MOST} more like the last one")
    return ValueError("\n  ".join(lines))


def write_json(path: Path, value: Mapping[str, object]) -> None:
    """Write `value` as indented JSON with a final newline."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False) + "\n").encode())


def write_bytes(path: Path, value: bytes) -> None:
    """Write a whole file; OSError naming it if the disk refuses."""
    with _named_errors(path):
        path.write_bytes(value)
        _sync(path)


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Write one safetensors file; OSError naming it if the disk refuses.

    Half a file may then be left: write into a scratch folder.
    """
    whole = {name: np.ascontiguousarray(value) for name, value in tensors.items()}
    with _named_errors(path):
        save_file(whole, path, METADATA)
        _sync(path)


def open_tensors(path: Path) -> Any:
    """The open safetensors file (a lazy, memory-mapped `safe_open`).

    Raises ValueError if the file is missing, empty, truncated or has a corrupt header: the library
    checks that the offsets in the header cover the file exactly.
    """
    if not path.is_file():
        raise ValueError(f"{path}: not found, want a safetensors file")
    try:
        return safe_open(path, framework="np")
    except (SafetensorError, OSError) as error:
        size = path.stat().st_size
        raise ValueError(
            f"{path}: got a corrupt or truncated file of {size} bytes ({error}), "
            "want a whole safetensors file"
        ) from error


def tensor_problem(handle: Any, name: str, shape: Sequence[int]) -> str | None:
    """What is wrong with the type or shape of a tensor of an open file; None if nothing is."""
    part = handle.get_slice(name)
    if part.get_shape() == list(shape) and part.get_dtype() in READABLE:
        return None
    got = f"{part.get_dtype()}{part.get_shape()}"
    return f"{name}: got {got}, want {'|'.join(READABLE)}{list(shape)}"


@contextlib.contextmanager
def scratch_folder(folder: Path, *, nbytes: int = 0) -> Generator[Path]:
    """Yields `folder`, new and empty, and removes it after the block.

    An older folder of that name is deleted first. Raises OSError if less than `nbytes` are free.
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
    """Raises ValueError unless `folder` is absent or an empty folder."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ValueError(
            f"{folder}: got an existing file or folder, want an absent or empty one; "
            "remove it, or name another"
        )


@contextlib.contextmanager
def new_folder(folder: Path, *, nbytes: int = 0, replaces: bool = False) -> Generator[Path]:
    """Yields a folder to fill, which is renamed to `folder` if the block ends without an error.

    With `replaces`, the folder of that name is deleted after that. A crash leaves at most
    `.<name>.partial` and `.<name>.replaced` beside it, which the next call deletes.
    Raises ValueError if `folder` exists and is not empty, OSError if less than `nbytes` are free.
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


@contextlib.contextmanager
def _named_errors(path: Path) -> Generator[None]:
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, f"cannot write {path}: {error.strerror or error}") from error
    except SafetensorError as error:  # the library says the system's error in words
        found = re.search(r"\(os error (\d+)\)", str(error))
        number = int(found[1]) if found else errno.EIO
        reason = os.strerror(number) if found else error
        raise OSError(number, f"cannot write {path}: {reason}") from error


def _sync(path: Path) -> None:
    """Waits until the disk has the file: a rename that follows must not overtake its content."""
    with path.open("rb") as file:
        os.fsync(file.fileno())
