"""Attention behind one call, `attend`; which kernel computes it is a value, `Kernel`.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width.

The kernel follows from the devices that a program is compiled for (`kernel_for`), not from the
host: the devices of a TPU topology say 'tpu' on a machine without one. `jax.lax.platform_dependent`
would decide later, but its branches share their residuals, and so the [T, S] weights of the XLA
form would be carried through the backward pass of the other ones.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mgsd_jax.parallel import axes

# Queries and keys that one step of the splash kernel works on. Its vectors are 128 lanes wide.
_BLOCKS = (512, 256, 128)
# Of the XLA form under a causal mask: queries of a block, and blocks, each of which is compiled.
_LEAST_BLOCK, _MOST_BLOCKS = 64, 4
# Finite, so that a row without keys does not become NaN, and so large that it drowns any score.
_MASKED = -1e30


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How attention is computed, and on which mesh: GSPMD cannot split a kernel, so we do."""

    name: Literal["xla", "splash", "cudnn"] = "xla"
    mesh: Mesh | None = None  # None: on one device
    interpret: bool = False  # splash on a CPU, slowly, for tests

    @property
    def is_plain(self) -> bool:
        """XLA's form on one device: where what helps a CPU may be done."""
        return self.name == "xla" and self.mesh is None


XLA = Kernel()


def kernel_for(mesh: Mesh | None) -> Kernel:
    """Splash on TPUs, cuDNN on GPUs, else XLA's form; `mesh` None: on the default device."""
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    if platform == "tpu":
        return Kernel("splash", mesh)
    return Kernel("cudnn" if platform in ("gpu", "cuda") else "xla", mesh)


def attend(
    q: jax.Array,  # [B, T, N, H]
    k: jax.Array,  # [B, S, K, H]
    v: jax.Array,  # [B, S, K, H]
    *,
    valid: jax.Array,  # [B, S] bool, keys that may be attended to
    causal: bool,  # True: the queries are the last T of S tokens, and see no later one
    kernel: Kernel = XLA,
) -> jax.Array:
    """Softmax attention [B, T, N, H] of grouped queries, scaled by 1 / sqrt(H).

    Softmax in float32. Queries at padding get something finite, with finite gradients, for no one
    to read; what it is depends on the kernel. Decoding (T != S) takes XLA's form on every device:
    it reads the cache once whatever computes it. So does cuDNN where its conditions (16-bit
    floats, H a multiple of 8 up to 128, even T) do not hold.
    """
    name = kernel.name if q.shape[1] == k.shape[1] else "xla"
    if name == "splash":
        run = functools.partial(_attend_splash, causal=causal, interpret=kernel.interpret)
        return _shard(kernel, run, q, k, v, valid)
    if name == "cudnn" and _fits_cudnn(q):
        return _shard(kernel, functools.partial(_attend_cudnn, causal=causal), q, k, v, valid)
    return checkpoint_name(_attend_xla(q, k, v, valid, causal=causal), "attention")


def _dense_mask(valid: jax.Array, q: jax.Array, causal: bool) -> jax.Array:
    """[B, 1 or T, S] bool."""
    mask = valid[:, None, :]
    return mask & jnp.tri(q.shape[1], dtype=bool) if causal else mask


def _shard(kernel: Kernel, run: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`run(q, k, v, valid)` on every device's own rows and heads, which need no others."""
    mesh = kernel.mesh
    if mesh is None:
        return run(*arrays)
    # As far as they divide: rows or heads that do not are computed everywhere.
    spec = axes.fit(P(axes.BATCH, None, "tensor"), arrays[1].shape, mesh)
    # The kernel's own loops say nothing of how their values vary over the mesh: not checked.
    sharded = jax.shard_map(
        run,
        mesh=mesh,
        in_specs=(spec, spec, spec, P(spec[0])),
        out_specs=spec,
        check_vma=False,
    )
    return sharded(*arrays)


def _attend_splash(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, *, causal: bool, interpret: bool
) -> jax.Array:
    """The Pallas kernel for TPUs: no [T, S] array outside the chip's vector memory.

    Padding is a segment of its own, so every query sees at least itself. T is padded to whole
    blocks; any H will do, the compiler fills its lanes.
    """
    length, heads, width = q.shape[1:]
    block, padded = _block(length)
    shape = (padded, padded)
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    run = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(**dict.fromkeys(_BLOCK_FIELDS, block)),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), *[(0, 0)] * (x.ndim - 2)))

    q, k, v = (pad(x).transpose(0, 2, 1, 3) for x in (q * width**-0.5, k, v))
    ids = pad(valid).astype(jnp.int32)
    out = cast(jax.Array, jax.vmap(run)(q, k, v, splash.SegmentIds(ids, ids)))
    return out.transpose(0, 2, 1, 3)[:, :length]


_BLOCK_FIELDS = (
    "block_q",
    "block_kv",
    "block_q_dkv",
    "block_kv_dkv",
    "block_q_dq",
    "block_kv_dq",
)


def _block(length: int) -> tuple[int, int]:
    """(block, length padded to blocks): the largest block that adds at most an eighth."""
    for block in _BLOCKS:
        padded = -(-length // block) * block
        if padded - length <= length // 8 or block == _BLOCKS[-1]:
            return block, padded
    raise AssertionError(length)


def _fits_cudnn(q: jax.Array) -> bool:
    return (
        q.dtype in (jnp.bfloat16, jnp.float16)
        and q.shape[3] % 8 == 0
        and q.shape[3] <= 128
        and q.shape[1] % 2 == 0
    )


def _attend_cudnn(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, *, causal: bool
) -> jax.Array:
    """cuDNN's flash attention; its mask is dense, [B, 1, T, S] bool, one for all heads."""
    mask = _dense_mask(valid, q, causal)[:, None]
    mask = jnp.broadcast_to(mask, (*mask.shape[:2], q.shape[1], k.shape[1]))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal, implementation="cudnn")
    return checkpoint_name(out, "attention")


def _attend_xla(
    q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array, *, causal: bool
) -> jax.Array:
    """Plain matmuls and a softmax. Under a causal mask queries go a block at a time, and a block
    looks at no key after its last query: five eighths of the work where there are four blocks.
    """
    batch, length, heads, width = q.shape
    groups, before = k.shape[2], k.shape[1] - q.shape[1]
    grouped = (q * width**-0.5).reshape(batch, length, groups, heads // groups, width)
    grouped = grouped.transpose(0, 2, 3, 1, 4)  # all queries of a key head side by side
    hidden = jnp.where(valid, 0.0, _MASKED)[:, None, None]

    def block(first: int, last: int, seen: int, mask: jax.Array) -> jax.Array:
        queries = grouped[:, :, :, first:last]
        merged = queries.reshape(batch, groups, -1, width)
        return _softmax_values(merged, k[:, :seen], v[:, :seen], mask).reshape(queries.shape)

    if not causal:
        out = block(0, length, k.shape[1], hidden)
    else:
        size = max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))
        blocks = []
        for first in range(0, length, size):
            last = min(first + size, length)
            seen = last + before
            later = np.triu(np.full((last - first, seen), _MASKED, np.float32), first + before + 1)
            blocks.append(block(first, last, seen, hidden[..., :seen] + later))
        out = jnp.concatenate(blocks, axis=3)
    return out.transpose(0, 3, 1, 2, 4).reshape(q.shape)


@jax.custom_vjp
def _softmax_values(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, K, G * T, H] of queries of that shape, with k and v [B, S, K, H] and a mask to add.

    The mask is [B, 1, T or 1, S]. Written for XLA's CPU compiler, which makes one fusion of it: a
    mask that is added, not selected by (twice the time), and the division by the softmax's sum left
    to the end, where it is H numbers a query instead of S. So is the backward pass: left to itself
    it divides and sums over S, and transposes both [G * T, S] arrays in memory.
    """
    return _softmax_values_forward(q, k, v, mask)[0]


def _softmax_values_forward(
    q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    scores = jnp.einsum("BKXH,BSKH->BKXS", q, k, preferred_element_type=jnp.float32)
    shape = scores.shape
    if mask.shape[2] == 1:
        scores += mask
    else:
        scores = scores.reshape(*shape[:2], -1, *mask.shape[2:]) + mask[:, :, None]
        scores = scores.reshape(shape)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    total = weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("BKXS,BSKH->BKXH", weights, v, preferred_element_type=jnp.float32)
    out = (out / total).astype(v.dtype)
    return out, (q, k, v, weights, total, out)


def _softmax_values_backward(
    residuals: tuple[jax.Array, ...], d_out: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, None]:
    q, k, v, weights, total, out = residuals
    d_out = d_out.astype(jnp.float32) / total
    mean = jnp.sum(d_out * out, axis=-1, keepdims=True)  # of the slopes, under the softmax
    d_out = d_out.astype(v.dtype)
    slopes = jnp.einsum("BKXH,BSKH->BKXS", d_out, v, preferred_element_type=jnp.float32)
    d_scores = (weights * (slopes - mean)).astype(q.dtype)
    d_q = jnp.einsum("BKXS,BSKH->BKXH", d_scores, k)
    d_k = jnp.einsum("BKXS,BKXH->BSKH", d_scores, q)
    d_v = jnp.einsum("BKXS,BKXH->BSKH", weights, d_out)
    return d_q, d_k, d_v, None


_softmax_values.defvjp(_softmax_values_forward, _softmax_values_backward)
