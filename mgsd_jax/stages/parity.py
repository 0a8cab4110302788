"""What an exported model answers, recorded beside it: other programs must answer the same.

Axes: T tokens, R response tokens, V vocabulary.
"""

import dataclasses
import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import transformers
from absl import logging

from mgsd_jax import config as config_lib
from mgsd_jax.checks.fields import read_json
from mgsd_jax.config import DataConfig, SamplingConfig
from mgsd_jax.data import batching
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import draw_picture
from mgsd_jax.data.processor import Message, Processor, encode, load_processor
from mgsd_jax.envs import ENVS, find
from mgsd_jax.model import qwen3vl
from mgsd_jax.model.attention import Kernel
from mgsd_jax.model.qwen3vl import Params, Qwen3VL
from mgsd_jax.sampling.sampler import Sampler
from mgsd_jax.weights import peft

FILE = "parity.json"
_PROMPTS, _WITH_PICTURE, _TOKENS = 20, 15, 8
_PICTURE = ("picture_size", "cell_pixels", "channels", "sprites")  # what draws a board
# Of the largest logit: float32 sums in another order differ by some 1e-5, another RoPE, a lost
# weight or a picture cut another way by 1e-1.
_TOLERANCE = 1e-3


def measure(
    model: Qwen3VL, variables: Params, processor: Processor, data: DataConfig
) -> dict[str, object]:
    """The content of a parity file: prompts, their first greedy tokens and these tokens' logits.

    Computed in float32 with `variables` as they are. Boards have the levels of `data.boards`;
    pictures can be redrawn from what is stored of them.
    """
    asked = _ask(data)
    encoded = [
        encode(processor, _with_picture(messages, data, board), add_generation_prompt=True)
        for board, messages in asked
    ]
    inputs = batching.smallest_inputs(encoded, processor.pad_id)
    model = model.clone(dtype=jnp.float32, remat="none", kernel=Kernel())
    sampler = Sampler(
        model,
        SamplingConfig(_TOKENS, temperature=0.0),
        eos_ids=processor.eos_ids,
        banned_ids=processor.banned_ids,
        pad_id=processor.pad_id,
    )

    @jax.jit
    def score(variables: Params, tokens: jax.Array, mask: jax.Array) -> jax.Array:
        whole = qwen3vl.append_response(inputs, tokens, mask)
        hidden = qwen3vl.apply_hidden(model, variables, whole, inputs.tokens.shape[1] - 1)[:, :-1]
        scores = qwen3vl.logits(hidden, qwen3vl.head(variables["params"]))
        return jnp.take_along_axis(scores, tokens[..., None], axis=-1)[..., 0]  # [B, R]

    with jax.default_matmul_precision("highest"):
        found = sampler.rollout(
            variables, inputs, jax.random.key(0), np.arange(_PROMPTS, dtype=np.int32)
        )
        logits = score(variables, found.tokens, found.mask)
    tokens, mask, logits = (np.asarray(x) for x in (found.tokens, found.mask, logits))
    return {
        "computed_in": "float32",
        "picture": {name: getattr(data, name) for name in _PICTURE},
        "prompts": [
            {
                "task": board.task,
                "board": ENVS[board.task].to_text(
                    board.state, split="parity", index=board.index, seed=0
                ),
                "messages": messages,
                "tokens": tokens[i, mask[i]].tolist(),
                "logits": [round(x, 6) for x in logits[i, mask[i]].tolist()],
            }
            for i, (board, messages) in enumerate(asked)
        ],
    }


def check(folder: Path, data: DataConfig) -> None:
    """Compares an export with its parity file in transformers; logs the largest difference.

    transformers runs the prompts of the file in float32. The recorded tokens must get the recorded
    logits, and no other token a larger one. Raises ValueError if they differ, or if the parity
    file, torch or (for adapters) PEFT is missing.
    """
    path = folder / FILE
    if not path.is_file():
        raise ValueError(f"{path}: not found; run --stage=export without export.check first")
    base = _base_folder(folder)
    recorded = read_json(path)
    drawn = dataclasses.replace(data, **recorded["picture"])
    data = config_lib.coerce(drawn, DataConfig, f"{path}: picture")
    processor = load_processor(base)
    kind: Any = transformers.Qwen3VLForConditionalGeneration
    model = kind.from_pretrained(str(folder), dtype="float32").eval().requires_grad_(False)
    largest, scale = 0.0, 0.0
    for prompt in recorded["prompts"]:
        state = ENVS[prompt["task"]].from_text(prompt["board"], source=str(path))
        board = Board(prompt["task"], state.size, 0, state, None)
        messages = _with_picture(prompt["messages"], data, board)
        tokens, want = np.array(prompt["tokens"]), np.array(prompt["logits"])
        scores = _their_logits(model, processor, messages, tokens)
        scores[:, list(processor.banned_ids)] = -np.inf
        found = np.stack([scores[np.arange(len(tokens)), tokens], scores.max(-1)])
        largest = max(largest, float(np.abs(found - want).max()))
        scale = max(scale, float(np.abs(want).max()))
    line = (
        f"{folder}: largest difference of a logit from transformers {transformers.__version__}: "
        f"{largest:.2g}, the largest logit {scale:.2g}"
    )
    if not largest <= _TOLERANCE * scale:
        raise ValueError(f"{line}; want at most {_TOLERANCE:g} of it")
    logging.info("%s", line)


def _ask(data: DataConfig) -> list[tuple[Board, list[Message]]]:
    """Boards and messages about them, without the pictures: first of pictures, then of texts."""
    levels = list(dict.fromkeys((s.task, level) for s in data.boards for level in s.levels))
    rng = np.random.default_rng(0)
    words = prompts_lib.load(data.prompts, data.state_text)
    nothing = np.zeros((1, 1, 3), np.uint8)
    asked = []
    for i in range(_PROMPTS):
        task, level = levels[i % len(levels)]
        state = find(task).generate(rng, level)
        if i < _WITH_PICTURE:
            messages = prompts_lib.student(words, task, nothing)
        else:
            messages = prompts_lib.teacher(words, task, state)
        asked.append((Board(task, level, i, state, None), [_without_picture(m) for m in messages]))
    return asked


def _without_picture(message: Message) -> Message:
    content = message["content"]
    if not isinstance(content, str):
        content = [{k: v for k, v in part.items() if k != "image"} for part in content]
    return {**message, "content": content}


def _with_picture(messages: Sequence[Message], data: DataConfig, board: Board) -> list[Message]:
    """The messages with the board drawn wherever a picture belongs."""

    def filled(content: Any) -> Any:
        if isinstance(content, str):
            return content
        return [
            {**part, "image": draw_picture(data, board)} if part["type"] == "image" else part
            for part in content
        ]

    return [{**message, "content": filled(message["content"])} for message in messages]


def _base_folder(folder: Path) -> Path:
    """The folder of the whole model; ValueError if a package is missing that runs it."""
    packages = ["torch"]
    settings = folder / peft.CONFIG_FILE
    if settings.is_file():
        packages.append("peft")
        folder = Path(read_json(settings)["base_model_name_or_path"])
    for name in packages:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"export.check: {name} is required: transformers runs the model with it; "
                f"pip install {name}"
            )
    return folder


def _their_logits(
    model: Any, processor: Processor, messages: Sequence[Message], tokens: np.ndarray
) -> np.ndarray:
    """Logits [R, V] by transformers that predict each token of a response."""
    prompt = encode(processor, messages, add_generation_prompt=True)
    sequence = np.concatenate([prompt.tokens, tokens[:-1]])[None].astype(np.int64)
    inputs = {
        "input_ids": sequence,
        "attention_mask": np.ones_like(sequence),
        "mm_token_type_ids": (sequence == processor.image_token_id).astype(np.int64),
    }
    if prompt.pictures:
        inputs["pixel_values"] = np.concatenate([p.patches for p in prompt.pictures])
        inputs["image_grid_thw"] = np.array([p.grid for p in prompt.pictures], np.int64)
    tensors = transformers.BatchFeature(inputs, tensor_type="pt")
    return model(**tensors).logits[0, len(prompt.tokens) - 1 :].numpy(force=True)
