"""The least time that a program can take: arithmetic, memory traffic and links, each at its peak.

All of it is computed from the configuration: compilers count the body of a loop once and a kernel
not at all. Traffic is what cannot be avoided: weights are read once a pass, the cache once a token,
gathered parts once a microbatch and pass. Activations are left out, so a real step takes longer.
"""

import dataclasses
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config
from mgsd_jax.model.flops import block_weights, decode_flops, forward_flops, layer_weights
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import axes
from mgsd_jax.parallel.chips import Chip
from mgsd_jax.tree import Tree


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip has to do in one call of a program."""

    flops: float
    memory: float  # bytes to and from its memory
    links: float  # bytes that it receives from other chips
    tokens: int  # of the batch, over all chips; for a rollout those sampled

    def seconds(self, chip: Chip) -> dict[str, float]:
        """The time of each part at the chip's peak; the longest is the roofline."""
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.memory / chip.hbm_bytes_per_s,
            "links": self.links / chip.link_bytes_per_s,
        }


def total_bytes(values: object) -> int:
    """Bytes of arrays, one copy of each."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(values))


def chip_bytes(values: object) -> int:
    """Bytes that the shards of abstract arrays take on one chip."""
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(values)
    )


def layout_work(before: object, after: object) -> Work:
    """Parameters are read where training has them, and written, mostly received, for a rollout."""
    read, written = chip_bytes(before), chip_bytes(after)
    return Work(flops=0.0, memory=read + written, links=written, tokens=0)


def rollout_works(
    model: Qwen3VL, variables: Tree, rows: int, length: int, steps: int, patches: int
) -> dict[str, Work]:
    """The work of a prefill of `rows` prompts of `length` tokens, and of `steps` decode steps."""
    text, mesh = model.config.text, model.mesh
    assert mesh is not None
    local_rows = rows // axes.parts(mesh, axes.dividing(mesh, axes.BATCH, rows))
    tensor = axes.parts(mesh, axes.dividing(mesh, "tensor", text.num_key_value_heads))
    slots = length + steps
    weights, language = chip_bytes(variables), chip_bytes(variables["params"]["language"])
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim // tensor
    cache = local_rows * slot * jnp.dtype(model.dtype).itemsize  # bytes a slot
    reduced = _reduced_bytes(model, local_rows)
    prefill = forward_flops(model.config, tokens=length, patches=patches, predicted=1)
    decode = decode_flops(model.config, slots=slots)
    return {
        "prefill": Work(
            flops=rows * prefill / mesh.size,
            memory=weights + cache * length,
            links=length * reduced,
            tokens=rows * length,
        ),
        "decode": Work(
            flops=steps * rows * decode / mesh.size,
            memory=steps * (language + cache * slots),
            links=steps * reduced,
            tokens=rows * steps,
        ),
    }


def update_work(
    config: Config,
    mesh: Mesh,
    trained: object,
    readers: Sequence[tuple[Qwen3VL, int, int, bool]],
    rows: int,
    microbatches: int,
) -> Work:
    """The work of one update. A reader is (model, T, tokens at the head, whether it sees pictures).

    The first reader learns: it runs forward, forward again if `remat` recomputes, and backward at
    twice the cost. The others run forward only.
    """
    fsdp, tensor = axes.parts(mesh, axes.BATCH), mesh.shape["tensor"]
    recomputed = 0 if config.model.remat == "none" else 1
    flops, gathered, reduced = 0.0, 0.0, 0.0
    for place, (model, length, predicted, has_picture) in enumerate(readers):
        patches = config_lib.sizes(config.data.patch_buckets)[-1] if has_picture else 0
        forward = forward_flops(model.config, tokens=length, patches=patches, predicted=predicted)
        passes = 1 if place else 2 + recomputed
        flops += rows * forward * (1 if place else 3 + recomputed)
        gathered += passes * _weight_bytes(model) / tensor
        reduced += passes * length * _reduced_bytes(model, rows // fsdp)
    state = chip_bytes(trained)
    gradients = total_bytes(trained) / tensor
    # Master weights and both moments are read and written; gradients are added up and read.
    memory = 6 * state + microbatches * (gathered * 2 + 2 * state) + 2 * state
    links = (1 - 1 / mesh.shape["fsdp"]) * microbatches * (gathered + gradients) + reduced
    return Work(flops / mesh.size, memory, links, sum(rows * reader[1] for reader in readers))


def _weight_bytes(model: Qwen3VL) -> float:
    """Bytes of the decoder's and the tower's matrices, in the dtype that the model computes in."""
    config = model.config
    count = config.text.num_hidden_layers * layer_weights(config)
    count += config.vision.depth * block_weights(config)
    return count * jnp.dtype(model.dtype).itemsize


def _reduced_bytes(model: Qwen3VL, rows: int) -> float:
    """What a chip receives for one token of its rows: two sums over 'tensor' in every layer."""
    assert model.mesh is not None
    tensor, text = model.mesh.shape["tensor"], model.config.text
    size = rows * text.hidden_size * jnp.dtype(model.dtype).itemsize
    return 2 * text.num_hidden_layers * 2 * size * (tensor - 1) / tensor
