"""Adapters as a folder that PEFT, vLLM and SGLang load."""

from collections.abc import Sequence
from pathlib import Path

import jax
import numpy as np

from mgsd_jax.config import LoraConfig
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.lora import named_adapters
from mgsd_jax.tree import Tree
from mgsd_jax.weights import files
from mgsd_jax.weights.table import Leaf, leaves

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
_PREFIX = "base_model.model."
# PEFT's defaults, written out: a reader of another version may have others.
_SETTINGS: dict[str, object] = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "inference_mode": True,
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "lora_bias": False,
    "use_rslora": False,
    "lora_dropout": 0.0,
    "modules_to_save": None,
    "layer_replication": None,
    "alora_invocation_tokens": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


def save(
    adapters: Tree, lora: LoraConfig, config: ModelConfig, folder: Path, *, base_model: str
) -> None:
    """Writes adapters, as `lora` describes them, into `folder`, which is made if absent.

    `base_model` is what the folder names as the model that it adapts. Raises ValueError for an
    adapter that is not of a Linear of the model.
    """
    tensors: dict[str, np.ndarray] = {}
    modules: list[str] = []
    for path, node in named_adapters(adapters):
        leaf = _kernel_leaf(config, path)
        names = [name.removesuffix(".weight") for name in leaf.names]
        modules += names
        for name, part in (("lora_A", node["a"]), ("lora_B", node["b"])):
            stack = jax.device_get(part if leaf.is_stacked else part[None])
            for module, value in zip(names, stack, strict=True):
                tensors[f"{_PREFIX}{module}.{name}.weight"] = value.T.astype(np.float32)
    settings = {
        **_SETTINGS,
        "base_model_name_or_path": base_model,
        "r": lora.rank,
        "lora_alpha": int(lora.alpha) if lora.alpha == int(lora.alpha) else lora.alpha,
        "target_modules": _target_modules(modules, config),
    }
    folder.mkdir(parents=True, exist_ok=True)
    files.write_tensors(folder / WEIGHTS_FILE, tensors)
    files.write_json(folder / CONFIG_FILE, settings)


def _kernel_leaf(config: ModelConfig, path: str) -> Leaf:
    for leaf in leaves(config):
        if leaf.path == f"{path}/kernel" and leaf.layout == "transpose":
            return leaf
    raise ValueError(f"adapter {path}: got a path that is not one of a Linear of the config")


def _target_modules(modules: Sequence[str], config: ModelConfig) -> list[str]:
    """The adapted modules as PEFT finds them: by last name if no other module has that name."""
    weights = [name for leaf in leaves(config) for name in leaf.names if name.endswith(".weight")]
    others = {
        name.removesuffix(".weight").rpartition(".")[2]
        for name in weights
        if name.removesuffix(".weight") not in set(modules)
    }
    last_names = ((module, module.rpartition(".")[2]) for module in modules)
    return sorted({module if last in others else last for module, last in last_names})
