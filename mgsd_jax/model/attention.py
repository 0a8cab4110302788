"""Attention behind one call, `attend`; which kernel computes it is a value, `Kernel`.

Axes: B batch, T queries, S keys, N query heads, K key/value heads, G = N / K, H head width.

The kernel follows from the devices that a program is compiled for (`kernel_for`), not from the
host: a program for a TPU topology gets splash on a machine without a TPU. The branches of
`jax.lax.platform_dependent` would share their residuals, so that the [T, S] weights of plain
attention would be carried through the backward pass of the kernels.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Literal, cast

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.pallas.ops.tpu import splash_attention as splash
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mgsd_jax.model import cpu
from mgsd_jax.parallel import axes

# Queries and keys that one step of the splash kernel works on. Its vectors are 128 lanes wide.
_BLOCKS = (512, 256, 128)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """How attention is computed, and on which mesh: GSPMD cannot split a kernel, so we do."""

    name: Literal["xla", "splash", "cudnn"] = "xla"
    mesh: Mesh | None = None  # None: on one device
    interpret: bool = False  # splash on a CPU, slowly, for tests

    @property
    def is_plain(self) -> bool:
        """Whether XLA's own operations compute attention, on one device: the switch of `cpu.py`."""
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
    valid: jax.Array,  # [B, S] bool, keys that may be attended to; where T != S also [B, T, S]
    causal: bool,  # True: the queries are the last T of S tokens, and see no later one
    kernel: Kernel = XLA,
) -> jax.Array:
    """Softmax attention [B, T, N, H] of grouped queries, scaled by 1 / sqrt(H).

    Softmax in float32. Outputs at padded query positions and their gradients are finite but
    meaningless (and kernel-dependent); do not use them. Decoding (T != S) uses `cpu.attend` on
    every device, as it reads the cache once whatever computes it. So do GPUs where the conditions
    of cuDNN (16-bit floats, H a multiple of 8 up to 128, even T) do not hold.
    """
    name = kernel.name if valid.ndim == 2 and q.shape[1] == k.shape[1] else "xla"
    if name == "splash":
        run = functools.partial(_attend_splash, causal=causal, interpret=kernel.interpret)
        return _shard(kernel, run, q, k, v, valid)
    if name == "cudnn" and _fits_cudnn(q):
        return _shard(kernel, functools.partial(_attend_cudnn, causal=causal), q, k, v, valid)
    return checkpoint_name(cpu.attend(q, k, v, valid, causal=causal), "attention")


def _dense_mask(valid: jax.Array, q: jax.Array, causal: bool) -> jax.Array:
    """[B, 1 or T, S] bool."""
    mask = valid[:, None, :]
    return mask & jnp.tri(q.shape[1], dtype=bool) if causal else mask


def _shard(kernel: Kernel, run: Callable[..., jax.Array], *arrays: jax.Array) -> jax.Array:
    """`run(q, k, v, valid)` on each device for its own rows and heads."""
    mesh = kernel.mesh
    if mesh is None:
        return run(*arrays)
    # Rows or heads that the axes do not divide are computed on every device.
    spec = axes.fit(P(axes.BATCH, None, "tensor"), arrays[1].shape, mesh)
    # Not checked: the loops of a kernel do not declare how their values vary over the mesh.
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

    Padding is a segment of its own, so that every query attends at least to itself. T is padded to
    whole blocks. H may be any width: the compiler pads it to the lanes of a vector.
    """
    length, heads, width = q.shape[1:]
    block, padded = _block(length)
    shape = (padded, padded)
    mask = splash.CausalMask(shape) if causal else splash.FullMask(shape)
    run = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([mask] * heads),
        block_sizes=splash.BlockSizes(
            block_q=block,
            block_kv=block,
            block_q_dkv=block,
            block_kv_dkv=block,
            block_q_dq=block,
            block_kv_dq=block,
        ),
        residual_checkpoint_name="attention",
        interpret=interpret,
    )

    def pad(x: jax.Array) -> jax.Array:
        return jnp.pad(x, ((0, 0), (0, padded - length), *[(0, 0)] * (x.ndim - 2)))

    q, k, v = (pad(x).transpose(0, 2, 1, 3) for x in (q * width**-0.5, k, v))
    ids = pad(valid).astype(jnp.int32)
    out = cast(jax.Array, jax.vmap(run)(q, k, v, splash.SegmentIds(ids, ids)))
    return out.transpose(0, 2, 1, 3)[:, :length]


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
