"""Scans over layers, and what their backward pass keeps of the forward pass, by name.

`none` keeps everything. `full` keeps the layer's input and computes the rest again. `save_names`
also keeps the arrays named here: no attention and no q, k, v projection is computed twice, for
4 N H bytes a token and layer and a little more. `offload` keeps the same arrays in the host's
memory and fetches them back: the arithmetic of `save_names` in the memory of `full`.
"""

from collections.abc import Callable
from typing import Any, Literal, TypeVar

import jax
from flax import linen as nn
from jax.extend.core import Primitive

Remat = Literal["none", "full", "save_names", "offload"]
Carry = TypeVar("Carry")
# Given by `checkpoint_name` where they are made: rotated q, k and v; the output of attention, and
# what its kernel keeps for its own backward pass.
SAVED = ("qkv", "attention")
# Collections that have a leading layer axis in a stack.
STACKED: dict[Any, Any] = {"params": 0, "adapters": 0}


def scan_layers(
    body: Callable[..., tuple[Carry, None]],
    stack: nn.Module,
    carry: Carry,
    xs: object,
    *,
    length: int,
    remat: Remat,
) -> Carry:
    """What `carry` has become after body(layer, carry, x) for each layer of a stack and x of `xs`.

    The layers share one compiled body, so that compiling takes as long for 36 layers as for one.
    """
    if remat != "none":
        policy = {"full": None, "save_names": _SAVE, "offload": _offload}[remat]
        # A scan's body is compiled once, so nothing can be merged with the first computation.
        body = nn.remat(body, prevent_cse=False, policy=policy)
    scan = nn.scan(body, variable_axes=STACKED, split_rngs={"params": True}, length=length)
    return scan(stack, carry, xs)[0]


_SAVE = jax.checkpoint_policies.save_only_these_names(*SAVED)
_OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(SAVED),
    offload_src="device",
    offload_dst="pinned_host",
)


def _offload(primitive: Primitive, *arrays: jax.ShapeDtypeStruct, **params: object) -> Any:
    # The log-sums of a kernel, [B, N, T], are 1/H of its output: not worth a transfer, and libtpu
    # 0.0.52 ends in a fault (a bitcast between unequal sizes) when they are sent.
    policy = _OFFLOAD if all(len(x.shape) > 3 for x in arrays) else _SAVE
    return policy(primitive, *arrays, **params)
