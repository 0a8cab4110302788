"""The tokenizer of a nano model: whatever our prompts repeat is one token.

Every constant passage of the prompts, every cell and every list of directions is one token, so that
a prompt has some forty; any other text is spelled in bytes.
"""

import itertools
import json
import pathlib
import re
from collections.abc import Iterator, Sequence

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mgsd_jax.config import NanoConfig
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.prompts import BUILT_IN, Prompts
from mgsd_jax.data.tokenizer import for_all_readers
from mgsd_jax.envs import ENVS
from mgsd_jax.envs.base import MOVES, ROUTE_START

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


def write_tokenizer(
    folder: pathlib.Path, nano: NanoConfig, tasks: Sequence[str], words: Prompts = BUILT_IN
) -> PreTrainedTokenizerFast:
    """Writes tokenizer, chat template, processor and generation files; returns the tokenizer.

    `tasks`: those whose words become tokens. Another task then changes no model of these. `words`
    says in which form; what replaces a prompt becomes no token.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in SPECIAL])
    known = (*state_tokens(tasks, words), *board_tokens(nano.max_level))
    pieces = dict.fromkeys((*known, *constant_text(tasks, words), *cell_tokens(tasks)))
    if words.state_text == "rows":
        pieces |= dict.fromkeys(row_tokens(nano.max_level))
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
    end, pad = (tokenizer.convert_tokens_to_ids(name) for name in ("<|im_end|>", "<|endoftext|>"))
    generation = {"eos_token_id": [end, pad], "pad_token_id": pad}
    video = {**picture, "video_processor_type": "Qwen3VLVideoProcessor"}
    for name, value in (
        ("preprocessor_config.json", picture),
        ("video_preprocessor_config.json", video),
        ("generation_config.json", generation),
    ):
        (folder / name).write_text(json.dumps(value, indent=2) + "\n")
    return tokenizer


def state_tokens(tasks: Sequence[str], words: Prompts = BUILT_IN) -> list[str]:
    """The labels of the lines that describe a board, and what stands around the plan."""
    rng = np.random.default_rng(0)
    labels: dict[str, None] = {}
    joints: dict[str, None] = {}  # what stands between the cells of a route
    ends: dict[str, None] = {}
    actions: dict[str, None] = {}
    for env in map(words.env, tasks):
        state = env.generate(rng, env.nearest_level(4))
        for number, line in enumerate(env.describe(state).split("\n")):
            label, colon, value = line.partition(":")
            if colon and label[:1].isalpha():  # not a line about a cell
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


def constant_text(tasks: Sequence[str], words: Prompts = BUILT_IN) -> list[str]:
    """The passages of the built-in prompts and the questions: whatever no board changes."""
    rng = np.random.default_rng(0)
    pieces: dict[str, None] = {}
    for env in map(words.env, tasks):
        pieces.update(dict.fromkeys(prompts_lib.passages(env).values()))
        state = env.generate(rng, env.nearest_level(4))
        for i, question in enumerate(env.questions(state), 1):
            asked = prompts_lib.ask(i, question)
            pieces[asked + "\n"] = None
            pieces[asked] = None
    return list(pieces)


def cell_tokens(tasks: Sequence[str]) -> Iterator[str]:
    """What `prompts.cells` asks and answers with."""
    yield from (prompts_lib.ask_cells(task) for task in tasks)
    for word in dict.fromkeys([*(name for task in tasks for name in ENVS[task].labels), "floor"]):
        yield from (f" {word}", f" {word}\n")


def row_tokens(max_level: int) -> Iterator[str]:
    """What a text has that tells a maze by rows: the numbers of rows and a cell's open sides."""
    for row in range(max_level):
        yield from (f"Row {row}:", f"\nRow {row}:")
    for count in range(1, len(MOVES) + 1):
        yield from (" " + "".join(ways) for ways in itertools.combinations(MOVES.values(), count))


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
