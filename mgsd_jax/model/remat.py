"""What the backward pass of a layer keeps of its forward pass, by name.

`none` keeps everything. `full` keeps the layer's input and computes the rest again. `save_names`
keeps the arrays named here as well: no attention and no q, k, v projection is computed twice, for
4 N H bytes a token and layer and a little more. `offload` keeps the same arrays in the host's
memory and fetches them back: the arithmetic of `save_names` in the memory of `full`.
"""

from collections.abc import Callable
from typing import Any, Literal

import jax
from flax import linen as nn

Remat = Literal["none", "full", "save_names", "offload"]
# Given by `checkpoint_name` where they are made: rotated q, k and v; the output of attention, and
# what its kernel keeps for its own backward pass.
SAVED = ("qkv", "attention")


def rematerialise(body: Callable[..., Any], remat: Remat) -> Callable[..., Any]:
    """The body of a scan over layers, computed again in the backward pass as `remat` says."""
    if remat == "none":
        return body
    policy = {"full": None, "save_names": _SAVE, "offload": _offload}[remat]
    # A scan's body is compiled once, so nothing can be merged with the first computation.
    return nn.remat(body, prevent_cse=False, policy=policy)


_SAVE = jax.checkpoint_policies.save_only_these_names(*SAVED)
_OFFLOAD = jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=list(SAVED),
    offload_src="device",
    offload_dst="pinned_host",
)


def _offload(primitive: Any, *arrays: Any, **params: Any) -> Any:
    # The log-sums of a kernel, [B, N, T], are 1/H of its output: not worth a transfer, and libtpu
    # 0.0.52 ends in a fault (a bitcast between unequal sizes) when they are sent.
    policy = _OFFLOAD if all(len(x.shape) > 3 for x in arrays) else _SAVE
    return policy(primitive, *arrays, **params)
