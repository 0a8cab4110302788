"""The same weights and batches for transformers: random Qwen3-VL models in torch, float32."""

import json
import pathlib
import re
import tempfile
from typing import Any

import numpy as np
import torch
from helpers_model import Row
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mgsd_jax.model.config import ModelConfig
from mgsd_jax.weights import hf


def make_model(config: ModelConfig, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """A torch model with every weight, bias and norm scale random (std 0.1; scales about 1)."""
    torch.manual_seed(seed)
    model = Qwen3VLForConditionalGeneration(Qwen3VLConfig(**config.to_hf()))
    for name, weight in model.named_parameters():
        is_scale = re.search(r"norm\d?\.weight$", name) is not None
        weight.data = torch.randn_like(weight) * 0.1 + (1.0 if is_scale else 0.0)
    return model.eval()


def to_params(model: Qwen3VLForConditionalGeneration, config: ModelConfig) -> dict[str, Any]:
    """Our parameters, float32, of a torch model's weights: by way of the folder it saves."""
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert hf.read_config(folder) == config
        return hf.load_params(folder, config, dtype="float32")


def from_params(params: dict[str, Any], config: ModelConfig) -> Qwen3VLForConditionalGeneration:
    """The torch model with our parameters, by way of a folder we save."""
    with tempfile.TemporaryDirectory() as folder:
        hf.save_params(params, config, folder, dtype="float32")
        (pathlib.Path(folder) / "config.json").write_text(json.dumps(config.to_hf()))
        model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32)
    return model.eval()


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
