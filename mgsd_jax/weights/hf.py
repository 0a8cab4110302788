"""Qwen3-VL weights from and to Hugging Face folders; names and shapes are in `table`.

Axes: L layers of a stack.
"""

import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from mgsd_jax import tree
from mgsd_jax.checks.fields import read_json
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.tree import Tree
from mgsd_jax.weights import files
from mgsd_jax.weights.files import DTYPES, FloatType
from mgsd_jax.weights.folder import INDEX_FILE, SHARD_FILES, SINGLE_FILE, Handles, open_checked
from mgsd_jax.weights.table import Layout, Leaf, leaves

STRIP = 32  # rows read at a time, so that they stay in the cache while they are transposed
THREADS = min(8, os.cpu_count() or 1)

Bounds = tuple[tuple[int, int], ...]


class Tensor(NamedTuple):
    """A tensor to export: its name, and the leaf and layer of our tree that it is."""

    name: str
    leaf: Leaf
    layer: int
    nbytes: int


def read_config(folder: str | Path) -> ModelConfig:
    """The `config.json` of a Hugging Face folder; ValueError if it is missing or malformed."""
    path = Path(folder) / "config.json"
    return ModelConfig.from_hf(read_json(path), source=str(path))


def load_params(
    folder: str | Path,
    config: ModelConfig,
    *,
    dtype: FloatType | np.dtype,
    shardings: Tree | None = None,
    finish: Callable[[str, jax.Array], jax.Array] = lambda path, leaf: leaf,
) -> Tree:
    """The parameters in `folder` as `dtype`, each read straight onto its sharding.

    `shardings` has the structure of the parameters and a `jax.sharding.Sharding` at each leaf;
    None puts all on the first device. Every process reads only the slices of its own devices, and
    the host holds about one leaf at a time. Each leaf is replaced by `finish(path, leaf)` before
    the next one is read. `model.safetensors` is preferred to an index, as in transformers. The
    `lm_head.weight` of a tied model may be there if it equals the embedding.

    Raises one ValueError that lists every missing, unknown, mis-shaped or wrongly typed tensor and
    every missing or corrupt file, or that names the first tensor with a value that is not finite.
    """
    kind = DTYPES[files.float_type(dtype)]
    handles = open_checked(Path(folder), config)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: list[tuple[str, jax.Array]] = []
    with ThreadPoolExecutor(THREADS) as pool:
        for leaf in leaves(config):
            there = device if shardings is None else tree.get(shardings, leaf.path)
            sharding = cast(jax.sharding.Sharding, there)
            array = _load_leaf(leaf, sharding, functools.partial(_read, leaf, handles, kind, pool))
            # Without the wait, copies of many leaves would queue up in host memory.
            params.append((leaf.path, jax.block_until_ready(finish(leaf.path, array))))
    return tree.nest(params)


def save_params(
    params: Tree,
    config: ModelConfig,
    folder: str | Path,
    *,
    dtype: FloatType | np.dtype = "bfloat16",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes the weights into `folder`, made if absent, in place of weights that are there.

    One file `model.safetensors` if it fits `max_shard_bytes`, else numbered shards and an index; a
    tensor above the limit gets a shard of its own. One shard at a time is in host memory. The files
    are moved into the folder once all are written, the index last: a crash leaves the old weights,
    or a folder that no reader takes for complete.

    Raises one ValueError that lists the parameters that do not fit the config, OSError naming the
    file if the disk is full.
    """
    folder = Path(folder)
    dtype = files.float_type(dtype)
    _check_params(params, config)
    shards = _plan_shards(config, dtype, max_shard_bytes)
    folder.mkdir(parents=True, exist_ok=True)
    size = sum(tensor.nbytes for tensor in _tensors(config, dtype))
    with files.scratch_folder(folder / ".weights.partial", nbytes=size) as scratch:
        for name, shard in shards.items():
            tensors = {tensor.name: _to_hf(params, tensor, dtype) for tensor in shard}
            files.write_tensors(scratch / name, tensors)
        written = list(shards)
        if len(shards) > 1:
            placed = {tensor.name: name for name, shard in shards.items() for tensor in shard}
            index = {"metadata": {"total_size": size}, "weight_map": placed}
            files.write_json(scratch / INDEX_FILE, index)
            written.append(INDEX_FILE)
        for old in (INDEX_FILE, SINGLE_FILE, *(f.name for f in folder.glob(SHARD_FILES))):
            (folder / old).unlink(missing_ok=True)
        for name in written:
            (scratch / name).replace(folder / name)


def _load_leaf(
    leaf: Leaf, sharding: jax.sharding.Sharding, read: Callable[[Bounds], np.ndarray]
) -> jax.Array:
    read = functools.cache(read)  # devices that hold the same part share one read

    def part(index: tuple[slice, ...] | None) -> np.ndarray:
        bounds = zip(index or (), leaf.shape, strict=True)
        return read(tuple(part.indices(size)[:2] for part, size in bounds))

    return jax.make_array_from_callback(leaf.shape, sharding, part)


def _read(
    leaf: Leaf, handles: Handles, dtype: np.dtype, pool: ThreadPoolExecutor, bounds: Bounds
) -> np.ndarray:
    """The part of a leaf within `bounds` (start and stop of each dimension), layer by layer."""
    first, last = bounds[0] if leaf.is_stacked else (0, 1)
    inner = bounds[1:] if leaf.is_stacked else bounds
    names = leaf.names[first:last]
    out = _empty((len(names), *(stop - start for start, stop in inner)), dtype)

    def fill(row: int) -> None:
        part = handles[names[row]].get_slice(names[row])
        index = tuple(slice(*bound) for bound in inner)
        _fill_block(out[row], part, leaf.layout, index, names[row])

    list(pool.map(fill, range(len(names))))  # list: raises what a thread has raised
    return out if leaf.is_stacked else out[0]


def _fill_block(
    out: np.ndarray, part: Any, layout: Layout, index: tuple[slice, ...], name: str
) -> None:
    """Copies the values at our `index` of one tensor into `out`, in our layout, strip by strip.

    Raises ValueError with the `name` if any of them is not finite as a number of `out`'s type.
    """
    # The first axis of the tensor in the file is the last of ours, unless nothing is transposed.
    rows, rest = (index[0], index[1:]) if layout == "same" else (index[-1], index[:-1])
    # Copied as integers, since numpy copies bfloat16 item by item and holds the interpreter's lock.
    bits = np.dtype(f"u{out.itemsize}")
    # NaN and infinities have all bits of the exponent set. Shifted by one bit, which drops the
    # sign, they are the numbers from infinity's on: 0x7f80 << 1 = 0xff00 for bfloat16.
    not_finite = np.array(np.inf, out.dtype).view(bits) << 1
    for start in range(rows.start, rows.stop, STRIP):
        stop = min(start + STRIP, rows.stop)
        if layout == "conv":  # [Dv, c, t, p, p]: its channels flatten in the order of the patches
            strip = part[start:stop].reshape(stop - start, -1)[:, rest[0]]
        else:
            strip = part[(slice(start, stop), *rest)]
        with np.errstate(over="ignore"):  # what is too large raises below
            strip = strip.astype(out.dtype, copy=False).view(bits)
        if (strip << 1).max(initial=0) >= not_finite:
            raise ValueError(f"{name}: got NaN or infinite {out.dtype} values, want finite ones")
        ours = slice(start - rows.start, stop - rows.start)
        if layout == "same":
            out[ours].view(bits)[...] = strip
        else:
            _transpose_into(out[:, ours].view(bits), strip)


def _transpose_into(out: np.ndarray, strip: np.ndarray) -> None:
    """`out` = `strip` transposed; both hold unsigned integers of 2 or 4 bytes.

    Rows that will be neighbours are first packed side by side into items of 8 bytes. A strided copy
    costs numpy the same whatever the size of an item, so this is 2.4 times as fast for bfloat16:

        strip  a b c    packed  ae bf cg    out  a e
               e f g                             b f   one copy of 3 items in place of 6
                                                 c g
    """
    pack = 8 // strip.itemsize
    if len(strip) % pack == 0:
        packed = np.empty((len(strip) // pack, strip.shape[1], pack), strip.dtype)
        for row in range(pack):
            packed[..., row] = strip[row::pack]
        out, strip = out.view(np.uint64), packed.view(np.uint64)[..., 0]
    out[...] = strip.T


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As np.empty, aligned to 64 bytes: jax uses such an array on a CPU without a copy."""
    size = math.prod(shape) * dtype.itemsize
    values = np.empty(size + 64, np.uint8)
    start = -values.ctypes.data % 64
    return values[start : start + size].view(dtype).reshape(shape)


def _check_params(params: Tree, config: ModelConfig) -> None:
    want = {leaf.path: leaf.shape for leaf in leaves(config)}
    got = dict(tree.named_leaves(params))
    problems = [f"{path}: not found, want float{list(want[path])}" for path in want.keys() - got]
    problems += [
        f"{path}: got a leaf that the config has no place for" for path in got.keys() - want
    ]
    problems += [
        f"{path}: got {got[path].dtype}{list(got[path].shape)}, want float{list(shape)}"
        for path, shape in want.items()
        if path in got
        and (got[path].shape != shape or not jnp.issubdtype(got[path].dtype, jnp.floating))
    ]
    if problems:
        raise files.problem_list("parameters do not fit the config", sorted(problems))


def _plan_shards(
    config: ModelConfig, dtype: FloatType, max_shard_bytes: float
) -> dict[str, list[Tensor]]:
    """The files to write, in order, with the tensors of each."""
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, want more than 0")
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in _tensors(config, dtype):
        if shards[-1] and size + tensor.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    names = (f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True))


def _tensors(config: ModelConfig, dtype: FloatType) -> Iterator[Tensor]:
    for leaf in leaves(config):
        nbytes = math.prod(leaf.hf_shape) * DTYPES[dtype].itemsize
        for layer, name in enumerate(leaf.names):
            yield Tensor(name, leaf, layer, nbytes)


def _to_hf(params: Tree, tensor: Tensor, dtype: FloatType) -> np.ndarray:
    """A tensor as Hugging Face has it."""
    leaf = tensor.leaf
    stack = cast(jax.Array, tree.get(params, leaf.path))
    values = np.asarray(stack[tensor.layer] if leaf.is_stacked else stack)
    return (
        (values if leaf.layout == "same" else values.T).reshape(leaf.hf_shape).astype(DTYPES[dtype])
    )
