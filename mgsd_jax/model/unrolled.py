"""Layers one after another instead of in a scan, where that is faster: few, on one CPU device.

XLA's CPU compiler copies a scan's carries, weights and residuals in and out of their stacks, and
takes a quarter of a training step for it. Compiling takes longer with every layer, hence few.
"""

from typing import Any

import jax

from mgsd_jax.model.attention import Kernel
from mgsd_jax.model.remat import Remat

Layers = tuple[dict[str, Any], ...]  # the variables of each layer
MOST_LAYERS = 8


def is_unrolled(kernel: Kernel, remat: Remat, layers: int) -> bool:
    """Whether a training step calls these layers one by one; with `remat` it scans them."""
    return kernel.is_plain and remat == "none" and layers <= MOST_LAYERS


def unstack(variables: Any, *names: str) -> Layers:
    """The variables of each layer of the modules `names`, in their order.

    `variables` {'params': {name: stack}, 'adapters': ...} hold stacks: a leading axis of layers.
    Names that are not there have no layers.
    """
    layers: list[dict[str, Any]] = []
    for name in names:
        if name not in variables["params"]:
            continue
        stack = {kind: modules[name] for kind, modules in variables.items() if name in modules}
        leaves, structure = jax.tree.flatten(stack)
        # Split, and not indexed: the gradient of a split is one concatenation, that of an index a
        # padded stack for every layer, all of which are added up.
        split = [jax.lax.split(leaf, (1,) * len(leaf)) for leaf in leaves]
        layers += [
            structure.unflatten([part[0] for part in parts]) for parts in zip(*split, strict=True)
        ]
    return tuple(layers)
