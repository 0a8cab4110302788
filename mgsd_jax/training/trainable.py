"""Which part of a model is trained: adapters, or the parameters that a regex picks."""

import re

import jax
import jax.numpy as jnp

from mgsd_jax import tree
from mgsd_jax.config import LoraConfig, OptimConfig
from mgsd_jax.model import lora
from mgsd_jax.tree import Tree


def _is_adapter(path: str) -> bool:
    return path.startswith("adapters/") and path.endswith(("/a", "/b"))


def split(
    params: Tree,
    optim: OptimConfig,
    lora_config: LoraConfig,
    rng: jax.Array,
    adapters: Tree | None = None,
) -> tuple[Tree, Tree]:
    """(trainable, frozen) parts of the model's variables, which `tree.combine` joins again.

    With a LoRA rank the adapters are trained, fresh ones where none are given, and every parameter
    is frozen; otherwise the parameters whose path `optim.trainable` matches are trained. Raises
    ValueError where that would be none.
    """
    if lora_config.rank:
        if adapters is None:
            scaled = lora.init_adapters(params, lora_config, rng)
        else:
            scaled = lora.with_scale(jax.tree.map(jnp.asarray, adapters), lora_config)
        variables = {"params": params, "adapters": scaled}
        return tree.partition(variables, lambda path, _: _is_adapter(path))
    pattern = re.compile(optim.trainable)
    trainable, frozen = tree.partition(
        {"params": params}, lambda name, _: bool(pattern.search(name.removeprefix("params/")))
    )
    if not trainable:
        raise ValueError(f"optim.trainable: got {optim.trainable!r}, want a regex of some path")
    return trainable, frozen
