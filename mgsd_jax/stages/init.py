"""A nano Qwen3-VL with its own small tokenizer: a Hugging Face folder with random weights.

The tokenizer knows every constant passage of our prompts, every cell and every list of directions
as one token each, so that a prompt is some forty tokens; any other text falls to bytes.
`run` is `--stage=init`, the first step of making the nano base.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, cast

import jax
import numpy as np
from absl import logging
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
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
from mgsd_jax.data.processor import Processor, load_processor
from mgsd_jax.data.tokenizer import for_all_readers
from mgsd_jax.envs import ENVS, find
from mgsd_jax.envs.base import ROUTE_START
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import Qwen3VL, init_params
from mgsd_jax.weights import files, hf
from mgsd_jax.workdir import paths

SPECIAL = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{{- '<|im_start|>' + message.role + '\\n' -}}"
    "{%- if message.content is string -%}{{- message.content -}}"
    "{%- else -%}{%- for part in message.content -%}"
    "{%- if part.type == 'image' -%}{{- '<|vision_start|><|image_pad|><|vision_end|>' -}}"
    "{%- elif part.type == 'video' -%}{{- '<|vision_start|><|video_pad|><|vision_end|>' -}}"
    "{%- else -%}{{- part.text -}}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{{- '<|im_end|>\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\\n' -}}{%- endif -%}"
)
_SAMPLES = 48  # boards of a level that the fresh tower is whitened over
_SHRINKAGE = 0.03
_FEATURE_NORM = 4.0


def run(config: Config, workdir: str) -> None:
    """Writes the nano folder named by `config.nano.folder`; the weights come from `config.seed`.

    Raises ValueError where the folder holds anything but a model of that shape.
    """
    config = config_lib.resolve(config, workdir)
    if config.nano is None:
        raise ValueError("config.nano: got None, want the shape of the model to write")
    folder = paths.local(config.nano.folder, "nano.folder")
    if _is_of_shape(folder, config.nano):
        _write(config, config.nano, folder)
    else:
        with files.new_folder(folder) as partial:
            _write(config, config.nano, partial)
    logging.info("%s: written", folder)


def _is_of_shape(folder: pathlib.Path, nano: NanoConfig) -> bool:
    """Whether the folder holds what an earlier `run` wrote, which may be written again."""
    file = folder / "config.json"
    shape = fields.read_json(file).get("text_config") if file.is_file() else None
    wanted = {"hidden_size": nano.width, "num_hidden_layers": nano.layers}
    return isinstance(shape, dict) and shape | wanted == shape


def _write(config: Config, nano: NanoConfig, folder: pathlib.Path) -> None:
    drawn = {find(levels.task).name for levels in config.data.boards}
    tokenizer = write_tokenizer(folder, nano, [task for task in ENVS if task in drawn])
    written = hf_config(nano, tokenizer)
    (folder / "config.json").write_text(json.dumps(written, indent=2) + "\n")
    model_config = ModelConfig.from_hf(written, source=str(folder / "config.json"))
    params = widen_vision(init_params(model_config, jax.random.key(config.seed)))
    samples = sample_pictures(load_processor(folder), config)
    params = whiten_vision(params, Qwen3VL(model_config), samples)
    hf.save_params(params, model_config, folder, dtype="float32")
    count = sum(leaf.size for leaf in jax.tree.leaves(params))
    logging.info("%d parameters, %d tokens", count, len(tokenizer))


def widen_vision(params: dict[str, Any]) -> dict[str, Any]:
    """The parameters with a vision tower that starts at full signal strength.

    A deviation of 0.02 suits widths in the thousands. At a width of 96 it nearly silences every
    layer and the position table: kernels get 1 / sqrt(inputs) instead, the table 1, which is what
    patches come out at. The blocks start at a tenth of that, so that a picture first passes
    through unmixed.
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
        inputs = batching.to_inputs(
            rows,
            length=max(len(row.tokens) for row in rows),
            side="left",
            pad_id=processor.pad_id,
            patch_buckets=(max(len(picture.patches) for row in rows for picture in row.pictures),),
            max_pictures=1,
        )
        assert inputs.pictures is not None
        yield inputs.pictures


def whiten_vision(
    params: dict[str, Any], model: Qwen3VL, samples: Iterable[Pictures]
) -> dict[str, Any]:
    """The parameters with mergers whose features are centred and uncorrelated over `samples`.

    Most of a fresh tower's output is the same for every cell, and a few directions hold the rest,
    so that rare things (an agent on a dark floor) hardly stand out. The last layer of every merger
    absorbs (y - mean) W, W the inverse square root of the covariance with a little of its mean
    added; features get a norm of `_FEATURE_NORM`, deepstack features half of it.
    """

    @jax.jit
    def look(pictures: Pictures) -> tuple[jax.Array, jax.Array]:
        seen = model.apply({"params": params}, pictures, method="see")
        return cast(tuple[jax.Array, jax.Array], seen)

    seen = [jax.device_get(look(pictures)) for pictures in samples]
    merged = np.concatenate([m.reshape(-1, m.shape[-1]) for m, _ in seen])  # [samples, D]
    deep = np.concatenate([d.reshape(len(d), -1, d.shape[-1]) for _, d in seen], axis=1)

    def absorb(layer: dict[str, Any], features: np.ndarray, norm: float) -> dict[str, Any]:
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


def state_tokens(tasks: Sequence[str]) -> list[str]:
    """The labels of the lines that describe a board, and what stands around the plan."""
    rng = np.random.default_rng(0)
    labels: dict[str, None] = {}
    joints: dict[str, None] = {}  # what stands between the cells of a route
    ends: dict[str, None] = {}
    actions: dict[str, None] = {}
    for env in (ENVS[task] for task in tasks):
        state = env.generate(rng, max(4, env.levels[0]))
        for number, line in enumerate(env.describe(state).split("\n")):
            label, colon, value = line.partition(":")
            if colon and label[0].isalpha():  # not a line about a cell
                labels[("\n" if number else "") + label + (":" if value else ":\n")] = None
        _, *between, end = re.split(r" ?(?:\(\d+,\d+\) ?)+", env.wording.route)
        joints.update(dict.fromkeys(between))
        ends[f"{end}\n<answer>"] = None
        actions.update(dict.fromkeys(word for word in env.actions.values() if len(word) > 1))
    return [
        *labels,
        *(" none", " none\n", ROUTE_START, f"\n{ROUTE_START}", *joints, *ends),
        *("<answer>", "</answer>", *actions),
        *("One shortest plan: ", "All shortest plans: ", " or ", "user\n", "assistant\n"),
    ]


def constant_text(tasks: Sequence[str]) -> list[str]:
    """The passages of the built-in prompts and the questions: whatever no board changes."""
    rng = np.random.default_rng(0)
    pieces: dict[str, None] = {}
    for task in tasks:
        pieces.update(dict.fromkeys(prompts_lib.passages(task).values()))
        state = ENVS[task].generate(rng, max(4, ENVS[task].levels[0]))
        for i, question in enumerate(ENVS[task].questions(state), 1):
            asked = prompts_lib.ask(i, question)
            pieces[asked + "\n"] = None
            pieces[asked] = None
    return list(pieces)


def cell_tokens(tasks: Sequence[str]) -> Iterator[str]:
    """What `prompts.cells` asks and answers with."""
    yield from (prompts_lib.ask_cells(task) for task in tasks)
    for word in dict.fromkeys([*(name for task in tasks for name in ENVS[task].labels), "floor"]):
        yield from (f" {word}", f" {word}\n")


def board_tokens(max_level: int) -> Iterator[str]:
    """Cells, sizes, numbers of answers and lists of directions up to a board size."""
    for row, column in itertools.product(range(max_level), repeat=2):
        cell = f"({row},{column})"
        yield from (cell, " " + cell, cell + ":")
    for size in range(2, max_level + 1):
        yield f" {size}x{size}"
    for number in range(1, 10):
        yield from (f"{number}.", f"\n{number}.")
    words = ("up", "down", "left", "right")
    for count in range(1, 5):
        for chosen in itertools.combinations(words, count):
            listed = " " + ", ".join(chosen)
            yield from (listed, listed + "\n")


def write_tokenizer(
    folder: pathlib.Path, nano: NanoConfig, tasks: Sequence[str]
) -> PreTrainedTokenizerFast:
    """Writes tokenizer, chat template, processor and generation files; returns the tokenizer.

    `tasks`: those whose words become tokens. Another task then changes no model of these.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    known = (*state_tokens(tasks), *board_tokens(nano.max_level))
    pieces = dict.fromkeys((*known, *constant_text(tasks), *cell_tokens(tasks)))
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in pieces])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=4096,
        extra_special_tokens={
            "image_token": "<|image_pad|>",
            "video_token": "<|video_pad|>",
            "vision_start_token": "<|vision_start|>",
            "vision_end_token": "<|vision_end|>",
        },
    )
    tokenizer.save_pretrained(folder)
    settings = folder / "tokenizer_config.json"
    readable = for_all_readers(json.loads(settings.read_text()))
    settings.write_text(json.dumps(readable, indent=2) + "\n")
    side = nano.patch * 2
    picture = {
        "size": {"shortest_edge": 4 * side * side, "longest_edge": 64 * 64 * side},
        "patch_size": nano.patch,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen3VLProcessor",
    }
    ids = tokenizer.convert_tokens_to_ids
    generation: dict[str, Any] = {"eos_token_id": [ids("<|im_end|>"), ids("<|endoftext|>")]}
    generation["pad_token_id"] = ids("<|endoftext|>")
    for name, value in (
        ("preprocessor_config.json", picture),
        ("video_preprocessor_config.json", {**picture, "video_processor_type": _VIDEO}),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    return tokenizer


_VIDEO = "Qwen3VLVideoProcessor"


def hf_config(nano: NanoConfig, tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """The config.json of the nano model, in the terms of transformers' Qwen3-VL."""
    ids = tokenizer.convert_tokens_to_ids
    sixth = nano.head_width // 2 // 6
    height = width = 2 * sixth
    rope = {
        "rope_type": "default",
        "mrope_section": [nano.head_width // 2 - height - width, height, width],
        "mrope_interleaved": True,
    }
    text = {
        "model_type": "qwen3_vl_text",
        "vocab_size": -(-len(tokenizer) // 32) * 32,
        "hidden_size": nano.width,
        "intermediate_size": nano.mlp,
        "num_hidden_layers": nano.layers,
        "num_attention_heads": nano.heads,
        "num_key_value_heads": nano.kv_heads,
        "head_dim": nano.head_width,
        "hidden_act": "silu",
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": rope,
        "attention_bias": False,
        "attention_dropout": 0.0,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        "eos_token_id": ids("<|im_end|>"),
        "bos_token_id": ids("<|endoftext|>"),
        "pad_token_id": ids("<|endoftext|>"),
    }
    vision = {
        "model_type": "qwen3_vl",
        "depth": nano.vision_layers,
        "hidden_size": nano.vision_width,
        "intermediate_size": nano.vision_mlp,
        "num_heads": nano.vision_heads,
        "in_channels": 3,
        "patch_size": nano.patch,
        "spatial_merge_size": 2,
        "temporal_patch_size": 2,
        "out_hidden_size": nano.width,
        "num_position_embeddings": (2 * nano.max_level) ** 2,
        "deepstack_visual_indexes": list(nano.deepstack),
        "hidden_act": "gelu_pytorch_tanh",
        "initializer_range": 0.02,
    }
    return {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text,
        "vision_config": vision,
        "image_token_id": ids("<|image_pad|>"),
        "video_token_id": ids("<|video_pad|>"),
        "vision_start_token_id": ids("<|vision_start|>"),
        "vision_end_token_id": ids("<|vision_end|>"),
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }
