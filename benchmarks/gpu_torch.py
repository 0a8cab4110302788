"""The phases of gpu.py in torch and transformers, as one would write them there.

Called by `gpu.py --torch` and `--all`. Rollouts are transformers' `generate`, 128 tokens at most;
the update is AdamW over float32 parameters under bfloat16 autocast, layers recomputed in the
backward pass, a few rows at a time so that their logits fit; the loss goes over chunks of tokens. A
phase that the GPU has no memory for says so. On a CPU (nano) all is float32.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from gpu_case import make_config, make_prompts
from transformers import Qwen3VLConfig, Qwen3VLForConditionalGeneration

from mgsd_jax.config import Config
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.weights.released import find_config

ROLLED = 128  # tokens of a rollout: what a token takes follows from them, and a call ends sooner
LOGIT_ROWS = 4  # rows of a microbatch: two float32 [rows, R, V] and their gradients are held


def measure(options: argparse.Namespace, phase: str) -> dict:
    """{'torch': {phase: measurements}}, with the keys of gpu.py, or {'skipped': why}."""
    if options.size != "nano" and not torch.cuda.is_available():
        return {"skipped": "torch has no CUDA"}
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = make_config(options)
    dtype = torch.bfloat16 if config.model.compute_dtype == "bfloat16" else torch.float32
    torch.manual_seed(0)
    try:
        found = PHASES[phase](options, config, device, dtype)
    except torch.cuda.OutOfMemoryError as error:
        return {"skipped": str(error).partition(". ")[0]}
    return {"torch": {"torch": torch.__version__, **found}}


def rollout(
    options: argparse.Namespace, config: Config, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    model_config = find_config(config.model.path)
    model = make_model(model_config, device, dtype).eval()
    inputs = to_torch(make_prompts(config).student, model_config, device)
    return measure_rollout(model, inputs, options)


def update(
    options: argparse.Namespace, config: Config, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    model_config, prompts = find_config(config.model.path), make_prompts(config)
    response = torch.randint(0, 100, (options.rows, options.response), device=device)
    readers = [
        to_torch(reader, model_config, device, response)
        for reader in (prompts.student, prompts.teacher)
    ]
    student = make_model(model_config, device, torch.float32)
    teacher = make_model(model_config, device, dtype).eval()
    optim = config.distillation.optim
    return {"update": measure_update(student, teacher, readers, optim, dtype, options)}


def loss(
    options: argparse.Namespace, config: Config, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    model_config, chunk = find_config(config.model.path), config.distillation.token_chunk
    return {"loss": measure_loss(model_config, chunk, device, dtype, options)}


PHASES = {"rollout": rollout, "update": update, "loss": loss}


def make_model(config: ModelConfig, device: torch.device, dtype: torch.dtype) -> Any:
    with device:
        return Qwen3VLForConditionalGeneration._from_config(
            Qwen3VLConfig(**config.to_hf()), dtype=dtype
        )


def median_seconds(run: Callable[[], Any], rounds: int) -> float:
    def finished() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    run()
    seconds = []
    for _ in range(rounds):
        start = finished()
        run()
        seconds.append(finished() - start)
    return statistics.median(seconds)


def to_torch(
    inputs: Inputs, config: ModelConfig, device: torch.device, response: Any = None
) -> dict[str, torch.Tensor]:
    """The arguments of transformers' forward and generate; prompts have no padding."""
    tokens = torch.from_numpy(inputs.tokens).long().to(device)
    if response is not None:
        tokens = torch.cat([tokens, response], 1)
    found = {"input_ids": tokens, "attention_mask": torch.ones_like(tokens)}
    if inputs.pictures is not None:
        patches = torch.from_numpy(inputs.pictures.patches).to(device)
        side = round(patches.shape[2] ** 0.5)
        found["pixel_values"] = patches.flatten(0, 2)
        found["image_grid_thw"] = torch.tensor([[1, side, side]] * len(tokens), device=device)
        found["mm_token_type_ids"] = (tokens == config.image_token_id).long()
    return found


def measure_rollout(
    model: Any,
    inputs: dict[str, torch.Tensor],
    options: argparse.Namespace,
) -> dict[str, Any]:
    def seconds(width: int) -> float:
        settings = {"max_new_tokens": width, "eos_token_id": None, "pad_token_id": 0}
        sampling = {"do_sample": True, "temperature": 1.0, "top_p": 1.0, "top_k": 0}
        return median_seconds(
            lambda: model.generate(**inputs, **settings, **sampling), options.rounds
        )

    rows, length = inputs["input_ids"].shape
    first = seconds(1)
    width = min(options.response, ROLLED)
    step = (seconds(width) - first) / (width - 1)
    return {
        "prefill": {"seconds": first, "tokens_per_s": rows * length / first},
        "decode": {"step_seconds": step, "tokens_per_s": rows / step},
    }


def measure_update(
    student: Any,
    teacher: Any,
    readers: list[dict[str, torch.Tensor]],
    optim: Any,
    dtype: torch.dtype,
    options: argparse.Namespace,
) -> dict[str, Any]:
    device = readers[0]["input_ids"].device
    student.train()
    student.gradient_checkpointing_enable({"use_reentrant": False})
    tx = torch.optim.AdamW(
        student.parameters(),
        lr=optim.lr,
        weight_decay=optim.weight_decay,
        fused=device.type == "cuda",
    )
    width = options.response

    def logprobs(model: Any, inputs: dict[str, torch.Tensor], rows: slice) -> torch.Tensor:
        part = {k: v[rows] for k, v in inputs.items() if k != "pixel_values"}
        if "pixel_values" in inputs:
            pixels = inputs["pixel_values"]
            part["pixel_values"] = pixels.view(options.rows, -1, pixels.shape[1])[rows].flatten(
                0, 1
            )
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            out = model(**part, logits_to_keep=width + 1, use_cache=False)
        return torch.log_softmax(out.logits[:, :-1].float(), -1)

    def step() -> float:
        total = 0.0
        for first in range(0, options.rows, LOGIT_ROWS):
            rows = slice(first, first + LOGIT_ROWS)
            with torch.no_grad():
                target = logprobs(teacher, readers[1], rows)
            mine = logprobs(student, readers[0], rows)
            loss = (mine.exp() * (mine - target)).sum() / (options.rows * width)
            loss.backward()
            total += loss.item()
        torch.nn.utils.clip_grad_norm_(student.parameters(), optim.clip)
        tx.step()
        tx.zero_grad(set_to_none=True)
        return total

    seconds = median_seconds(step, options.rounds)
    return {
        "trained": "all",
        "seconds": seconds,
        "tokens_per_s/update": 2 * options.rows * width / seconds,
        "loss": step(),
    }


def measure_loss(
    config: ModelConfig,
    token_chunk: int,
    device: torch.device,
    dtype: torch.dtype,
    options: argparse.Namespace,
) -> dict[str, Any]:
    tokens, text = options.rows * options.response, config.text

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=dtype)

    hidden, table = normal(tokens, text.hidden_size), normal(text.vocab_size, text.hidden_size)
    teacher_hidden, teacher_table = torch.randn_like(hidden), torch.randn_like(table) * 0.02
    hidden.requires_grad_()
    table = (table * 0.02).requires_grad_()

    def step() -> None:
        hidden.grad = table.grad = None
        for first in range(0, tokens, token_chunk):
            rows = slice(first, first + token_chunk)
            mine = torch.log_softmax((hidden[rows] @ table.T).float(), -1)
            with torch.no_grad():
                other = torch.log_softmax((teacher_hidden[rows] @ teacher_table.T).float(), -1)
            ((mine.exp() * (mine - other)).sum() / tokens).backward()

    return {"tokens": tokens, "seconds": median_seconds(step, options.rounds)}
