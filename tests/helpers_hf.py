"""The same weights and batches for transformers: random Qwen3-VL models in torch, float32."""

import re
from typing import Any

import numpy as np
import torch
from helpers_model import Row
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mgsd_jax.model.config import ModelConfig


def make_model(config: ModelConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A torch model with every weight, bias and norm scale random (std 0.1; scales about 1)."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config.to_hf()))
    for name, weight in model.named_parameters():
        is_scale = re.search(r"norm\d?\.weight$", name) is not None
        weight.data = torch.randn_like(weight) * 0.1 + (1.0 if is_scale else 0.0)
    return model.eval()


def to_params(model: Qwen3VLForConditionalGeneration, config: ModelConfig) -> dict[str, Any]:
    """Our parameter tree of a torch model's weights."""
    weights = {name: w.detach().numpy() for name, w in model.state_dict().items()}
    tree: dict[str, Any] = {}

    def put(path: str, value: np.ndarray) -> None:
        *folders, leaf = path.split("/")
        node = tree
        for folder in folders:
            node = node.setdefault(folder, {})
        node[leaf] = value

    def take(name: str) -> tuple[str, np.ndarray]:
        module, kind = name.rsplit(".", 1)
        value = weights[name]
        if kind == "bias":
            return f"{module.replace('.', '/')}/bias", value
        if value.ndim == 1:
            return f"{module.replace('.', '/')}/scale", value
        if "embed" in module.rsplit(".", 1)[-1]:
            return f"{module.replace('.', '/')}/embedding", value
        return f"{module.replace('.', '/')}/kernel", value.T

    stacks: dict[str, dict[int, np.ndarray]] = {}
    for name in weights:
        if name == "lm_head.weight":
            if not config.tie_word_embeddings:
                put("lm_head/embedding", weights[name])
            continue
        path, value = take(name)
        path = path.removeprefix("model/").replace("language_model", "language")
        path = path.replace("deepstack_merger_list", "deepstack_mergers")
        if "patch_embed/proj" in path:
            path = path.replace("patch_embed/proj", "patch_embed")
            value = weights[name]
            value = value.reshape(len(value), -1).T if value.ndim > 1 else value
        parts = path.split("/")
        number = next((i for i, part in enumerate(parts) if part.isdigit()), None)
        if number is None:
            put(path, value)
            continue
        index = int(parts.pop(number))
        if parts[number - 1] == "layers" and index < config.num_deepstack:
            parts[number - 1] = "layers_deepstack"
        elif parts[number - 1] == "layers":
            index -= config.num_deepstack
        stacks.setdefault("/".join(parts), {})[index] = value
    for path, layers in stacks.items():
        put(path, np.stack([layers[i] for i in range(len(layers))]))
    return tree


def to_torch(config: ModelConfig, rows: list[Row], *, side: str) -> dict[str, torch.Tensor]:
    """`rows` as the keyword arguments transformers' forward and generate take."""
    length = max(len(row.tokens) for row in rows)
    shape = (len(rows), length)
    tokens, mask, kinds = (np.zeros(shape, np.int64) for _ in range(3))
    for b, row in enumerate(rows):
        count = len(row.tokens)
        span = slice(length - count, length) if side == "left" else slice(0, count)
        tokens[b, span], mask[b, span], kinds[b, span] = row.tokens, 1, row.is_visual
    batch = {"input_ids": tokens, "attention_mask": mask, "mm_token_type_ids": kinds}
    patches = [p for row in rows for p in row.patches]
    if patches:
        batch["pixel_values"] = np.concatenate(patches)
        batch["image_grid_thw"] = np.array([g for row in rows for g in row.grids], np.int64)
    return {name: torch.from_numpy(value) for name, value in batch.items()}
