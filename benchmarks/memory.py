"""What a run holds in the memory of one GPU, by arithmetic: a line a model size and mode.

  python benchmarks/memory.py [--rows 16] [--tokens 1024]

Weights, adapters, moments and gradients are counted from the shapes of the programs' own arrays,
the cache of a rollout from `rows` prompts of the recipe and `tokens` new tokens each. An update
adds the inputs of every layer for one row (what `remat=full` keeps), one layer computed again, and
six arrays of logits a chunk. Nothing is measured; what the allocator and the kernels' own scratch
take comes on top, so a tenth is to be left free.
"""

import argparse
import json
import math
import pathlib
import runpy
from typing import Any

import jax
import jax.numpy as jnp

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, LoraConfig, OptimConfig
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.parallel import sharding
from mgsd_jax.training import optimizer, trainable
from mgsd_jax.weights import table
from mgsd_jax.weights.released import RELEASED

ROOT = pathlib.Path(__file__).parents[1]
SIZES = ("2B", "4B", "8B", "32B")
MODES = {
    "evaluate": "evaluate, bfloat16",
    "adapters": "both stages with adapters, base bfloat16, held once",
    "full": "distillation of all parameters, float32, beside a bfloat16 teacher",
}
LOGITS = 6  # both readers' logits, their distributions, and the gradients of the student's


def held(values: Any) -> int:
    """Bytes of arrays, abstract ones too."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(values))


def states(
    model: ModelConfig, lora: LoraConfig, optim: OptimConfig, mode: str
) -> tuple[int, int, int]:
    """Bytes of (weights that no step changes, train state, gradients)."""
    params = table.abstract_params(model, "float32")
    read = jax.eval_shape(lambda p: sharding.cast(p, jnp.bfloat16), params)
    if mode == "evaluate":
        return held(read), 0, 0
    lora = lora if mode == "adapters" else LoraConfig()
    tx = optimizer.make_optimizer(optim, 100)
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, _ = jax.eval_shape(lambda p, k: trainable.split(p, optim, lora, k), params, key)
    state = jax.eval_shape(lambda t: optimizer.init(t, tx), trained)
    return held(read), held(state), held(trained)


def rollout(model: ModelConfig, rows: int, slots: int) -> int:
    """Bytes of the cache of `rows` rows, bfloat16."""
    text = model.text
    slot = 2 * text.num_hidden_layers * text.num_key_value_heads * text.head_dim
    return rows * slots * slot * 2


def update(model: ModelConfig, tokens: int, chunk: int) -> int:
    """Bytes of the activations of one row of `tokens` tokens, and of a chunk of logits."""
    text = model.text
    inputs = text.num_hidden_layers * tokens * text.hidden_size
    heads = (2 * text.num_attention_heads + 2 * text.num_key_value_heads) * text.head_dim
    layer = tokens * (4 * text.hidden_size + 2 * heads + 4 * text.intermediate_size)
    return 2 * (inputs + layer) + 4 * LOGITS * chunk * text.vocab_size


def main() -> None:
    """Prints the table, then one JSON line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=16, help="rows of a rollout")
    parser.add_argument("--tokens", type=int, default=1024, help="new tokens of a row")
    parser.add_argument("--chunk", type=int, default=512, help="tokens whose logits are held")
    arguments = parser.parse_args()
    recipe: Config = runpy.run_path(str(ROOT / "configs" / "gpu_4b.py"))["get_config"]()
    prompt = config_lib.sizes(recipe.data.prompt_buckets)[-1]
    context = config_lib.sizes(recipe.data.teacher_buckets)[-1]
    longest = max(prompt, context) + arguments.tokens
    settings = recipe.distillation
    found = []
    print("| model | mode | weights | state and gradients | rollout or update | GB together |")
    print("|---|---|--:|--:|--:|--:|")
    for size in SIZES:
        model = RELEASED[f"Qwen3-VL-{size}-Instruct"]
        for mode, words in MODES.items():
            frozen, state, gradients = states(model, settings.lora, settings.optim, mode)
            working = rollout(model, arguments.rows, prompt + arguments.tokens)
            if mode != "evaluate":
                working = max(working, update(model, longest, arguments.chunk))
            parts = [part / 1e9 for part in (frozen, state + gradients, working)]
            found.append({"size": size, "mode": mode, "gb": round(sum(parts), 1)})
            cells = " | ".join(f"{part:.1f}" for part in (*parts, sum(parts)))
            print(f"| {size} | {words} | {cells} |")
    print(json.dumps({"benchmark": "memory", **vars(arguments), "found": found}))


if __name__ == "__main__":
    main()
