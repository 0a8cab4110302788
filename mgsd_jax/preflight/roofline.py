"""The least time that a program can take: arithmetic, memory traffic and links, each at its peak.

All of it is computed from the configuration: compilers count the body of a loop once and a kernel
not at all. Traffic is what cannot be avoided: weights and cache are read once a pass of decoding,
gathered parts once a microbatch and pass. Activations are left out, so a real step takes longer.
Decoding waits besides for the collectives of every pass (`collectives.py`).
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config
from mgsd_jax.model.flops import (
    attention_flops,
    block_weights,
    forward_flops,
    layer_weights,
    named_flops,
)
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import axes
from mgsd_jax.parallel.chips import Chip
from mgsd_jax.sampling.decoding import cache_stages, least_room
from mgsd_jax.tree import Tree


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What a decode loop does until its longest response has ended."""

    kept: float  # tokens of a pass that stay
    passes: int
    read: int  # slots of the cache that attention reads, over all passes
    moved: int  # slots that are read and written when the cache is compacted, or grows
    slots: int  # of the cache in the end


@dataclasses.dataclass(frozen=True)
class Work:
    """What one chip has to do in one call of a program."""

    flops: float
    memory: float  # bytes to and from its memory
    links: float  # bytes that it receives from other chips while it computes
    tokens: int  # of the batch, over all chips; for a rollout those sampled
    loop: Decoding | None = None  # in which nothing is computed while links carry

    def seconds(self, chip: Chip, sides: Sequence[int], wait: float = 0.0) -> dict[str, float]:
        """The time of each part at the peak of a chip in a slice with these sides.

        A pass of decoding waits `wait` seconds.
        """
        speed = chip.link_bytes_per_s * max(1, chip.links(sides))
        return {
            "arithmetic": self.flops / chip.flops,
            "memory": self.memory / chip.hbm_bytes_per_s,
            "links": self.links / speed,
            "waits": 0.0 if self.loop is None else self.loop.passes * wait,
        }


def roofline(seconds: Mapping[str, float]) -> float:
    """The least time of a program whose parts take so long."""
    return max(seconds[part] for part in ("arithmetic", "memory", "links")) + seconds["waits"]


def decoding(prompt: int, limit: int, window: int, longest: int, kept: float) -> Decoding:
    """The passes of a rollout after prompts of T tokens whose longest response has `longest`.

    A pass runs `window` tokens a row, and `kept` of them stay, if there are as many; at most
    `limit` are sampled. The first token comes from the prefill. The cache grows as
    `decoding.decode` lets it grow.
    """
    kept = min(kept, window)
    stages = cache_stages(prompt, limit, window)
    passes = read = moved = 0
    length, said = prompt, 1.0
    for slots in stages:
        least = window
        while said < longest and length + least <= slots:
            turns = min((slots - length) // window, math.ceil((longest - said) / kept))
            passes, read = passes + turns, read + turns * slots
            length, said = length + turns * window, said + turns * kept
            if window > 1 and said < longest:
                moved, length = moved + slots, prompt + math.ceil(said)
                least = least_room(slots, window, is_last=slots == stages[-1])
        if said >= longest:
            return Decoding(kept, passes, read, moved, slots)
        moved += slots
    return Decoding(kept, passes, read, moved, stages[-1])


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


def prefill_work(model: Qwen3VL, variables: Tree, rows: int, length: int, patches: int) -> Work:
    """The work of a prefill of `rows` prompts of `length` tokens."""
    local_rows = rows // axes.parts(model.mesh, axes.dividing(model.mesh, axes.BATCH, rows))
    flops = forward_flops(model.config, tokens=length, patches=patches, predicted=1)
    return Work(
        flops=rows * flops / _chips(model),
        memory=chip_bytes(variables) + length * _slot_bytes(model, rows),
        links=length * _reduced_bytes(model, local_rows),
        tokens=rows * length,
    )


def decode_work(
    model: Qwen3VL, variables: Tree, rows: int, window: int, loop: Decoding, tokens: int
) -> Work:
    """The work of a decode loop that samples so many tokens a row.

    A pass runs a `window` of tokens a row, and reads the weights once for all of them.
    """
    token = forward_flops(model.config, tokens=1, patches=0, predicted=1)
    flops = loop.passes * token + attention_flops(model.config, loop.read)
    slots = loop.read + 2 * loop.moved
    language = chip_bytes(variables["params"]["language"])
    return Work(
        flops=rows * window * flops / _chips(model),
        memory=loop.passes * language + slots * _slot_bytes(model, rows),
        links=0.0,
        tokens=rows * tokens,
        loop=loop,
    )


def _chips(model: Qwen3VL) -> int:
    assert model.mesh is not None
    return model.mesh.size


def _slot_bytes(model: Qwen3VL, rows: int) -> float:
    """Bytes of one slot of the cache on one chip."""
    text, mesh = model.config.text, model.mesh
    split = axes.parts(mesh, axes.dividing(mesh, axes.BATCH, rows))
    split *= axes.parts(mesh, axes.dividing(mesh, "tensor", text.num_key_value_heads))
    numbers = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return rows * numbers * jnp.dtype(model.dtype).itemsize / split


def update_work(
    config: Config,
    mesh: Mesh,
    trained: object,
    readers: Sequence[tuple[Qwen3VL, int, int, bool]],
    rows: int,
    microbatches: int,
) -> Work:
    """The work of one update. A reader is (model, T, tokens at the head, whether it sees pictures).

    The first reader learns: it runs forward, forward again as far as `remat` did not keep what it
    computed, and backward at twice the cost. The others run forward only.
    """
    fsdp, tensor = axes.parts(mesh, axes.BATCH), mesh.shape["tensor"]
    remat = config.model.remat
    flops, gathered, reduced = 0.0, 0.0, 0.0
    for place, (model, length, predicted, has_picture) in enumerate(readers):
        patches = config_lib.sizes(config.data.patch_buckets)[-1] if has_picture else 0
        forward = forward_flops(model.config, tokens=length, patches=patches, predicted=predicted)
        passes, again = 1, 0.0
        if place == 0:
            passes = 2 if remat == "none" else 3
            again = 2 * forward
            if remat != "none":
                again += forward
            if remat in ("save_names", "offload"):
                again -= named_flops(model.config, length)
        flops += rows * (forward + again)
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
