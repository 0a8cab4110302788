"""Qwen3-VL weights streamed from and to Hugging Face folders; names and shapes are in `table`."""

import collections
import functools
import math
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mgsd_jax import tree
from mgsd_jax.checks.fields import read_json
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.weights import files
from mgsd_jax.weights.files import DTYPES, FloatType, TensorSpec
from mgsd_jax.weights.folder import INDEX_FILE, SHARD_FILES, SINGLE_FILE, Handles, open_checked
from mgsd_jax.weights.table import Layout, Leaf, Tree, leaves, put

STRIP = 32  # rows read at a time: they stay in cache on the way to their transposed place
THREADS = min(8, os.cpu_count() or 1)

Bounds = tuple[tuple[int, int], ...]


class Tensor(NamedTuple):
    """A tensor to export, and where it is in our tree."""

    spec: TensorSpec
    leaf: Leaf
    layer: int


def read_config(folder: str | Path) -> ModelConfig:
    """Return the `config.json` of a Hugging Face folder; ValueError where missing or malformed."""
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
    """Return the parameters in `folder` as `dtype`, each read straight onto its sharding.

    `shardings` has the structure of the parameters and a `jax.sharding.Sharding` at each leaf;
    None puts all on the first device. Every process reads only the slices of its own devices,
    and the host holds about the largest leaf at a time. `finish(path, leaf)` is what becomes of a
    leaf before the next one is read. `model.safetensors` goes before an index, as in transformers.
    A tied model's `lm_head.weight` may be there if it equals the embedding.

    Raises one ValueError that lists every missing, unknown, mis-shaped or wrongly typed tensor
    and every missing or corrupt file, or names the first tensor with a value that is not finite.
    """
    kind = DTYPES[files.float_type(dtype)]
    handles = open_checked(Path(folder), config)
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    params: Tree = {}
    with ThreadPoolExecutor(THREADS) as pool:
        for leaf in leaves(config):
            sharding = device if shardings is None else tree.get(shardings, leaf.path)
            # cached: devices that hold the same part share one read
            read = functools.cache(functools.partial(_read, leaf, handles, kind, pool))
            array = jax.make_array_from_callback(
                leaf.shape,
                sharding,
                lambda index, read=read, shape=leaf.shape: read(_bounds(index or (), shape)),
            )
            # without the wait, copies of many leaves would queue up in host memory
            put(params, leaf.path, jax.block_until_ready(finish(leaf.path, array)))
    return params


def save_params(
    params: Tree,
    config: ModelConfig,
    folder: str | Path,
    *,
    dtype: FloatType | np.dtype = "bfloat16",
    max_shard_bytes: float = 5e9,
) -> None:
    """Write the weights into `folder`, made if absent, in place of weights that are there.

    One file `model.safetensors` where it fits `max_shard_bytes`, else numbered shards and an
    index; a tensor above the limit gets a shard of its own. One tensor at a time is in host
    memory. The files move in once all are written, the index last: a crash leaves the old
    weights or a folder that no reader takes for complete. All processes take part, the first
    one writes.

    Raises one ValueError that lists the parameters that do not fit the config, OSError naming the
    file where the disk is full.
    """
    folder = Path(folder)
    dtype = files.float_type(dtype)
    _check_params(params, config)
    shards = _plan_shards(config, dtype, max_shard_bytes)
    if jax.process_index() != 0:
        for shard in shards.values():
            collections.deque(_hf_values(params, shard), maxlen=0)
        return
    folder.mkdir(parents=True, exist_ok=True)
    size = weight_bytes(config, dtype)
    with files.scratch_folder(folder / ".weights.partial", nbytes=size) as scratch:
        for name, shard in shards.items():
            specs = [tensor.spec for tensor in shard]
            values = _hf_values(params, shard)
            files.write_tensors(scratch / name, specs, values, files.METADATA)
        written = list(shards)
        if len(shards) > 1:
            placed = {tensor.spec.name: name for name, shard in shards.items() for tensor in shard}
            index = {"metadata": {"total_size": size}, "weight_map": placed}
            files.write_json(scratch / INDEX_FILE, index)
            written.append(INDEX_FILE)
        for old in (INDEX_FILE, SINGLE_FILE, *(f.name for f in folder.glob(SHARD_FILES))):
            (folder / old).unlink(missing_ok=True)
        for name in written:
            (scratch / name).replace(folder / name)


def weight_bytes(config: ModelConfig, dtype: FloatType) -> int:
    """Return the bytes of all weights of `config` stored as `dtype`."""
    return sum(tensor.spec.nbytes for tensor in _tensors(config, dtype))


def _bounds(index: tuple[slice, ...], shape: tuple[int, ...]) -> Bounds:
    return tuple(part.indices(size)[:2] for part, size in zip(index, shape, strict=True))


def _read(
    leaf: Leaf, handles: Handles, dtype: np.dtype, pool: ThreadPoolExecutor, bounds: Bounds
) -> np.ndarray:
    """Return the part of a leaf within `bounds` (start, stop a dimension), layer by layer."""
    first, last = bounds[0] if leaf.is_stacked else (0, 1)
    inner = bounds[1:] if leaf.is_stacked else bounds
    names = leaf.names[first:last]
    out = _empty((len(names), *(stop - start for start, stop in inner)), dtype)

    def fill(row: int) -> None:
        part = handles[names[row]].get_slice(names[row])
        index = tuple(slice(*bound) for bound in inner)
        _fill_block(out[row], part, leaf.layout, index, names[row])

    list(pool.map(fill, range(len(names))))  # list: an exception in a thread is raised here
    return out if leaf.is_stacked else out[0]


def _fill_block(
    out: np.ndarray, part: Any, layout: Layout, index: tuple[slice, ...], name: str
) -> None:
    """Copy the values at our `index` of one tensor into `out`, in our layout, strip by strip.

    Raises ValueError with its `name` where any of them is not finite as a number of `out`'s type.
    """
    # the first axis of the tensor in the file is the last of ours, unless nothing is transposed
    rows, rest = (index[0], index[1:]) if layout == "same" else (index[-1], index[:-1])
    # numpy copies bfloat16 element by element under the interpreter's lock, but integers not
    bits = np.dtype(f"u{out.itemsize}")
    # NaN and infinities have all bits of the exponent set; shifted by one, the sign is gone
    not_finite = np.array(np.inf, out.dtype).view(bits) << 1
    for start in range(rows.start, rows.stop, STRIP):
        stop = min(start + STRIP, rows.stop)
        if layout == "conv":  # [Dv, c, t, p, p]: its channels flatten in the order of the patches
            strip = part[start:stop].reshape(stop - start, -1)[:, rest[0]]
        else:
            strip = part[(slice(start, stop), *rest)]
        with np.errstate(over="ignore"):  # what is too large is told below
            strip = strip.astype(out.dtype, copy=False).view(bits)
        if (strip << 1).max(initial=0) >= not_finite:
            raise ValueError(f"{name}: got NaN or infinite {out.dtype} values, want finite ones")
        ours = slice(start - rows.start, stop - rows.start)
        if layout == "same":
            out[ours].view(bits)[...] = strip
        else:
            _transpose_into(out[:, ours].view(bits), strip)


def _transpose_into(out: np.ndarray, strip: np.ndarray) -> None:
    """`out` = `strip` transposed, unsigned integers of 2 or 4 bytes both.

    Rows that will be neighbours are first packed side by side into items of 8 bytes: strides cost
    numpy the same whatever is copied, and so it is 2.4 times as fast for bfloat16.
    """
    pack = 8 // strip.itemsize
    if len(strip) % pack == 0:
        packed = np.empty((len(strip) // pack, strip.shape[1], pack), strip.dtype)
        for row in range(pack):
            packed[..., row] = strip[row::pack]
        out, strip = out.view(np.uint64), packed.view(np.uint64)[..., 0]
    out[...] = strip.T


def _empty(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """As np.empty, on a 64-byte boundary: jax takes such an array for a CPU's without a copy."""
    size = math.prod(shape) * dtype.itemsize
    values = np.empty(size + 64, np.uint8)
    start = -values.ctypes.data % 64
    return values[start : start + size].view(dtype).reshape(shape)


def _check_params(params: Tree, config: ModelConfig) -> None:
    want = {leaf.path: leaf.shape for leaf in leaves(config)}
    got = dict(tree.named_leaves(params))
    problems = [
        f"{path}: got no such leaf, want float{list(want[path])}" for path in want.keys() - got
    ]
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
    """Return the files to write, in order, and what goes into each."""
    if not max_shard_bytes > 0:
        raise ValueError(f"max_shard_bytes: got {max_shard_bytes}, want more than 0")
    shards: list[list[Tensor]] = [[]]
    size = 0
    for tensor in _tensors(config, dtype):
        if shards[-1] and size + tensor.spec.nbytes > max_shard_bytes:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size += tensor.spec.nbytes
    if len(shards) == 1:
        return {SINGLE_FILE: shards[0]}
    names = (f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True))


def _tensors(config: ModelConfig, dtype: FloatType) -> Iterator[Tensor]:
    for leaf in leaves(config):
        for layer, name in enumerate(leaf.names):
            yield Tensor(TensorSpec(name, leaf.hf_shape, dtype), leaf, layer)


def _hf_values(params: Tree, tensors: list[Tensor]) -> Iterator[np.ndarray]:
    """Yield the tensors as Hugging Face has them, the next one on its way meanwhile."""
    ready: jax.Array | None = None
    for spec, leaf, layer in tensors:
        values = jnp.asarray(tree.get(params, leaf.path))
        sharding = values.sharding
        if isinstance(sharding, jax.sharding.NamedSharding):
            # every process gets the whole tensor: another's shards cannot be fetched
            sharding = jax.sharding.NamedSharding(sharding.mesh, jax.sharding.PartitionSpec())
        value = _to_hf(
            values,
            layer,
            is_stacked=leaf.is_stacked,
            layout=leaf.layout,
            hf_shape=leaf.hf_shape,
            dtype=spec.dtype,
            sharding=sharding,
        )
        value.copy_to_host_async()
        if ready is not None:
            yield np.asarray(ready)
        ready = value
    if ready is not None:
        yield np.asarray(ready)


@functools.partial(
    jax.jit, static_argnames=("is_stacked", "layout", "hf_shape", "dtype", "sharding")
)
def _to_hf(
    values: jax.Array,
    layer: jax.Array | int,
    *,
    is_stacked: bool,
    layout: Layout,
    hf_shape: tuple[int, ...],
    dtype: FloatType,
    sharding: jax.sharding.Sharding,
) -> jax.Array:
    if is_stacked:
        values = jax.lax.dynamic_index_in_dim(values, layer, keepdims=False)
    if layout != "same":
        values = values.T
    values = values.reshape(hf_shape).astype(DTYPES[dtype])
    return jax.lax.with_sharding_constraint(values, sharding)
