"""A nano Qwen3-VL with its own small tokenizer: a Hugging Face folder with random weights.

`run` is `--stage=init`, the first step of making the nano base.
"""

import json
import pathlib
from collections.abc import Iterable, Iterator
from typing import cast

import jax
import numpy as np
from absl import logging
from transformers import PreTrainedTokenizerFast

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.checks import fields
from mgsd_jax.config import Config, NanoConfig
from mgsd_jax.data import batching
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.batch import Pictures
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.nano_tokenizer import write_tokenizer
from mgsd_jax.data.processor import Processor, load_processor
from mgsd_jax.envs import ENVS, find
from mgsd_jax.model.config import ModelConfig, TextConfig, VisionConfig
from mgsd_jax.model.qwen3vl import Qwen3VL, init_params
from mgsd_jax.tree import Tree
from mgsd_jax.weights import files, hf
from mgsd_jax.workdir import paths

_SAMPLES = 48  # boards of a level that the fresh tower is whitened over
_SHRINKAGE = 0.03
_FEATURE_NORM = 4.0


def run(config: Config, workdir: str) -> None:
    """Writes the nano folder `config.nano.folder`, with random weights drawn from `config.seed`.

    Raises ValueError if the folder holds anything but an earlier model of that shape.
    """
    config = config_lib.resolve(config, workdir)
    if config.nano is None:
        raise ValueError("config.nano: required, the shape of the model to write")
    folder = paths.local(config.nano.folder, "nano.folder")
    if _is_of_shape(folder, config.nano):
        _write(config, config.nano, folder)
    else:
        with files.new_folder(folder) as partial:
            _write(config, config.nano, partial)
    logging.info("%s: written", folder)


def _is_of_shape(folder: pathlib.Path, nano: NanoConfig) -> bool:
    """Whether the folder holds what an earlier `run` wrote, which may be overwritten."""
    file = folder / "config.json"
    shape = fields.read_json(file).get("text_config") if file.is_file() else None
    wanted = {"hidden_size": nano.width, "num_hidden_layers": nano.layers}
    return isinstance(shape, dict) and shape | wanted == shape


def _write(config: Config, nano: NanoConfig, folder: pathlib.Path) -> None:
    drawn = {find(levels.task).name for levels in config.data.boards}
    tasks = [task for task in ENVS if task in drawn]
    words = prompts_lib.load("", config.data.state_text)
    tokenizer = write_tokenizer(folder, nano, tasks, words)
    written = hf_config(nano, tokenizer)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    model_config = ModelConfig.from_hf(written, source=str(folder / "config.json"))
    params = widen_vision(init_params(model_config, jax.random.key(config.seed)))
    samples = sample_pictures(load_processor(folder), config)
    params = whiten_vision(params, Qwen3VL(model_config), samples)
    hf.save_params(params, model_config, folder, dtype="float32")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    logging.info("%d parameters, %d tokens", count, len(tokenizer))


def widen_vision(params: Tree) -> Tree:
    """The parameters with a vision tower that starts at full signal strength.

    The usual deviation of 0.02 suits widths in the thousands; at a width of 96 it nearly silences
    every layer and the position table. Here kernels get 1 / sqrt(inputs), and the table gets 1, as
    embedded patches have. The branches of the blocks start at a tenth of that, so that a picture
    first passes through them unmixed.
    """

    def scaled(path: str, leaf: jax.Array) -> jax.Array:
        if path == "visual/pos_embed/embedding":
            return leaf / 0.02
        if not (path.startswith("visual/") and path.endswith("/kernel")):
            return leaf
        is_branch = path.startswith("visual/blocks/") and ("proj" in path or "linear_fc2" in path)
        return leaf * (leaf.shape[-2] ** -0.5 / 0.02) * (0.1 if is_branch else 1.0)

    return tree.map_named(scaled, params)


def sample_pictures(processor: Processor, config: Config) -> Iterator[Pictures]:
    """Pictures of `_SAMPLES` boards of each task and level of the config, one batch a level."""
    rng = np.random.default_rng(config.seed)
    levels = [(boards.task, level) for boards in config.data.boards for level in boards.levels]
    if not levels:
        raise ValueError("data.boards: got none, want the levels whose pictures are to be seen")
    encoder = Encoder(processor, prompts_lib.BUILT_IN, config.data)
    for task, level in dict.fromkeys(levels):
        states = (find(task).generate(rng, level) for _ in range(_SAMPLES))
        rows = [encoder.student(Board(task, level, 0, state, None)) for state in states]
        inputs = batching.smallest_inputs(rows, processor.pad_id)
        assert inputs.pictures is not None
        yield inputs.pictures


def whiten_vision(params: Tree, model: Qwen3VL, samples: Iterable[Pictures]) -> Tree:
    """The parameters with mergers whose features are centred and uncorrelated over `samples`.

    Most of a fresh tower's output is the same for every cell, and what differs lies in a few
    directions, so that rare things (an agent on a dark floor) hardly stand out. So y becomes
    (y - mean) W, where W is the inverse square root of the covariance, with `_SHRINKAGE` of its
    mean eigenvalue added against noise. The last layer of each merger, y = x kernel + bias, absorbs
    it: kernel W and (bias - mean) W. Features get a norm of `_FEATURE_NORM`, deepstack features
    half of it.
    """

    @jax.jit
    def look(pictures: Pictures) -> tuple[jax.Array, jax.Array]:
        seen = model.apply({"params": params}, pictures, method="see")
        return cast(tuple[jax.Array, jax.Array], seen)

    seen = [jax.device_get(look(pictures)) for pictures in samples]
    merged = np.concatenate([m.reshape(-1, m.shape[-1]) for m, _ in seen])  # [samples, D]
    deep = np.concatenate([d.reshape(len(d), -1, d.shape[-1]) for _, d in seen], axis=1)

    def absorb(layer: Tree, features: np.ndarray, norm: float) -> Tree:
        x = features.astype(np.float64)
        mean = x.mean(axis=0)
        values, vectors = np.linalg.eigh(np.cov(x.T))
        white = vectors / np.sqrt(values + _SHRINKAGE * values.mean()) @ vectors.T
        white *= norm / np.sqrt((((x - mean) @ white) ** 2).sum(axis=1).mean())
        kernel, bias = (np.asarray(layer[name], np.float64) for name in ("kernel", "bias"))
        return {
            "kernel": (kernel @ white).astype(np.float32),
            "bias": ((bias - mean) @ white).astype(np.float32),
        }

    visual = params["visual"]
    last = {"merger": absorb(visual["merger"]["linear_fc2"], merged, _FEATURE_NORM)}
    if len(deep):
        stacked = visual["deepstack_mergers"]["linear_fc2"]
        layers = [
            absorb(jax.tree.map(lambda leaf, i=i: leaf[i], stacked), x, _FEATURE_NORM / 2)
            for i, x in enumerate(deep)
        ]
        last["deepstack_mergers"] = jax.tree.map(lambda *leaves: np.stack(leaves), *layers)
    folded = {name: {**visual[name], "linear_fc2": layer} for name, layer in last.items()}
    return {**params, "visual": {**visual, **folded}}


def hf_config(nano: NanoConfig, tokenizer: PreTrainedTokenizerFast) -> Tree:
    """The config.json of the nano model, in the terms of transformers' Qwen3-VL."""

    def token(name: str) -> int:
        return cast(int, tokenizer.convert_tokens_to_ids(f"<|{name}|>"))

    height = width = nano.head_width // 2 // 6 * 2
    written = ModelConfig(
        text=TextConfig(
            vocab_size=-(-len(tokenizer) // 32) * 32,
            hidden_size=nano.width,
            intermediate_size=nano.mlp,
            num_hidden_layers=nano.layers,
            num_attention_heads=nano.heads,
            num_key_value_heads=nano.kv_heads,
            head_dim=nano.head_width,
            rope_theta=10_000.0,
            mrope_section=(nano.head_width // 2 - height - width, height, width),
            max_position_embeddings=4096,
        ),
        vision=VisionConfig(
            depth=nano.vision_layers,
            hidden_size=nano.vision_width,
            intermediate_size=nano.vision_mlp,
            num_heads=nano.vision_heads,
            out_hidden_size=nano.width,
            deepstack_visual_indexes=nano.deepstack,
            num_position_embeddings=(2 * nano.max_level) ** 2,
            patch_size=nano.patch,
        ),
        tie_word_embeddings=True,
        image_token_id=token("image_pad"),
        video_token_id=token("video_pad"),
        vision_start_token_id=token("vision_start"),
        vision_end_token_id=token("vision_end"),
    ).to_hf()
    end, pad = token("im_end"), token("endoftext")
    written["text_config"] |= {"eos_token_id": end, "bos_token_id": pad, "pad_token_id": pad}
    return written | {"dtype": "bfloat16"}
