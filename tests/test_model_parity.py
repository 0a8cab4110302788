"""The model against transformers' Qwen3-VL on the same random float32 weights."""

import copy
import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import helpers_hf  # noqa: E402
from helpers_model import (  # noqa: E402
    GOLDEN_IDS,
    GOLDEN_LOGITS,
    GOLDEN_ROWS,
    Row,
    random_params,
    random_rows,
    tiny,
    to_inputs,
)

from mgsd_jax.config import SamplingConfig  # noqa: E402
from mgsd_jax.data.batch import Inputs  # noqa: E402
from mgsd_jax.model.config import ModelConfig  # noqa: E402
from mgsd_jax.model.qwen3vl import Qwen3VL, apply_hidden, head, logits  # noqa: E402
from mgsd_jax.sampling.sampler import Sampler  # noqa: E402

TOLERANCE = 1e-4
MODELS = {
    "tied_gqa": tiny(),
    "untied_mqa": tiny(num_key_value_heads=1, num_hidden_layers=4, tie_word_embeddings=False),
    "every_layer_deepstack": tiny(num_deepstack=3, num_key_value_heads=4),
}
BATCHES = {
    "pictures": [(2, (4, 4), 3, (6, 8), 1, (2, 4), 4), (5, (8, 4), 2), (11,)],
    "text_only": [(9,), (4,)],
}


@functools.cache
def build(name: str) -> tuple:
    """The torch model and our parameters of a configuration."""
    model = helpers_hf.make_model(MODELS[name])
    return model, helpers_hf.to_params(model, MODELS[name])


@functools.partial(jax.jit, static_argnums=0)
def our_logits(config: ModelConfig, params: dict, inputs: Inputs) -> jax.Array:
    hidden = apply_hidden(Qwen3VL(config), {"params": params}, inputs)
    return logits(hidden, head(params))


def hf_logits(model: Any, config: ModelConfig, rows: list[Row], side: str) -> np.ndarray:
    with torch.no_grad():
        return model(**helpers_hf.to_torch(config, rows, side=side)).logits.numpy()


def assert_same(got: np.ndarray, want: np.ndarray, valid: np.ndarray) -> None:
    got, want = np.asarray(got)[valid], want[valid]
    assert want.std() > 0.3  # random enough that agreement means something
    assert np.abs(got - want).max() <= TOLERANCE
    np.testing.assert_array_equal(got.argmax(-1), want.argmax(-1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_logits_equal_transformers(name: str, batch: str, side: str) -> None:
    config, (model, params) = MODELS[name], build(name)
    rows = random_rows(config, BATCHES[batch])
    inputs = to_inputs(config, rows, side=side)
    got = our_logits(config, params, inputs)
    assert_same(got, hf_logits(model, config, rows, side), inputs.valid)


def test_golden_numbers_are_those_of_transformers() -> None:
    """What test_model holds the model to where torch is absent."""
    config = tiny()
    model = helpers_hf.from_params(random_params(config), config)
    got = hf_logits(model, config, random_rows(config, GOLDEN_ROWS), "left")
    np.testing.assert_allclose(got[:, -1, GOLDEN_IDS], GOLDEN_LOGITS, atol=1e-5)


def without_deepstack(params: dict, inputs: Inputs) -> tuple[dict, Inputs]:
    last = params["visual"]["deepstack_mergers"]["linear_fc2"]
    silent = {name: np.zeros_like(value) for name, value in last.items()}
    mergers = params["visual"]["deepstack_mergers"] | {"linear_fc2": silent}
    return params | {"visual": params["visual"] | {"deepstack_mergers": mergers}}, inputs


def without_mrope(params: dict, inputs: Inputs) -> tuple[dict, Inputs]:
    counted = np.maximum(np.cumsum(inputs.valid, axis=1) - 1, 0).astype(np.int32)
    return params, inputs._replace(positions=np.broadcast_to(counted, inputs.positions.shape))


def without_vision_rope(params: dict, inputs: Inputs) -> tuple[dict, Inputs]:
    assert inputs.pictures is not None
    coords = np.zeros_like(inputs.pictures.coords)
    return params, inputs._replace(pictures=inputs.pictures._replace(coords=coords))


def without_interpolation(params: dict, inputs: Inputs) -> tuple[dict, Inputs]:
    assert inputs.pictures is not None
    weight = np.eye(4, dtype=np.float32)[np.argmax(inputs.pictures.interp_weight, axis=-1)]
    return params, inputs._replace(pictures=inputs.pictures._replace(interp_weight=weight))


@pytest.mark.parametrize(
    "ablate", [without_deepstack, without_mrope, without_vision_rope, without_interpolation]
)
def test_parity_fails_without_a_part_of_the_architecture(ablate: Callable) -> None:
    config, (model, params) = MODELS["tied_gqa"], build("tied_gqa")
    rows = random_rows(config, BATCHES["pictures"])
    params, inputs = ablate(params, to_inputs(config, rows, side="left"))
    got = np.asarray(our_logits(config, params, inputs))
    want = hf_logits(model, config, rows, "left")
    assert np.abs(got - want)[inputs.valid].max() > 100 * TOLERANCE


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("name", MODELS)
def test_prefill_and_decode_equal_transformers(name: str, batch: str) -> None:
    config, (model, params) = MODELS[name], build(name)
    prompts = random_rows(config, BATCHES[batch])
    responses = np.random.default_rng(1).integers(0, 200, (len(prompts), 5)).astype(np.int32)
    rows = [extend(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    got = decoded_logits(config, params, to_inputs(config, prompts, side="left"), responses)
    want = hf_logits(model, config, rows, "left")[:, -responses.shape[1] - 1 :]
    assert_same(got, want, np.ones(got.shape[:2], bool))


def extend(row: Row, response: np.ndarray) -> Row:
    return dataclasses.replace(
        row,
        tokens=np.concatenate([row.tokens, response]),
        is_visual=np.concatenate([row.is_visual, np.zeros(len(response), bool)]),
    )


@functools.partial(jax.jit, static_argnums=0)
def decoded_logits(
    config: ModelConfig, params: dict, prompts: Inputs, responses: jax.Array
) -> jax.Array:
    """[B, R + 1, V]: after the prompt, and after each response token, one token at a time."""
    model, variables = Qwen3VL(config), {"params": params}
    slots = (
        prompts.tokens.shape[1] + responses.shape[1] + 2
    )  # more than needed: unwritten slots stay unseen
    hidden, cache = model.apply(variables, prompts, slots, method="prefill")

    def step(carry: tuple, token: jax.Array) -> tuple:
        positions, cache = carry
        hidden, cache = model.apply(
            variables, token[:, None], positions[:, None], cache, method="decode"
        )
        return (positions + 1, cache), hidden[:, 0]

    _, rest = jax.lax.scan(step, (prompts.next_position, cache), responses.T)
    hidden = jnp.concatenate([hidden[None], rest]).swapaxes(0, 1)
    return logits(hidden, head(params))


def test_bfloat16_is_as_close_to_float32_as_transformers_is() -> None:
    """The casts stand where transformers has them: same weights, both in bfloat16."""
    # One short row: torch on a CPU takes long over bfloat16.
    config, (model, params) = MODELS["tied_gqa"], build("tied_gqa")
    rows = random_rows(config, [(3, (4, 4), 5)])
    inputs = to_inputs(config, rows, side="left")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), params)
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    want = np.asarray(our_logits(config, exact, inputs))[inputs.valid]
    apply = jax.jit(Qwen3VL(config, dtype=jnp.bfloat16).apply, static_argnames="method")
    hidden = apply({"params": half}, inputs, method="hidden")
    ours = np.asarray(logits(hidden, head(half)))[inputs.valid]
    batch = helpers_hf.to_torch(config, rows, side="left")
    with torch.no_grad():
        theirs = copy.deepcopy(model).bfloat16()(**batch).logits.float().numpy()[inputs.valid]
    assert np.abs(ours - want).mean() <= 1.1 * np.abs(theirs - want).mean()


def test_greedy_rollout_equals_generate_token_for_token() -> None:
    """Pictures of several sizes, ragged prompts, rows that end at different places or never."""
    config, (model, params) = MODELS["untied_mqa"], build("untied_mqa")
    rows = random_rows(config, BATCHES["pictures"], seed=3)
    inputs = to_inputs(config, rows, side="left")
    banned = (config.image_token_id, config.video_token_id)
    free = generate(model, config, rows, eos=(), banned=banned)
    assert len(np.unique(free)) > 12
    eos = (int(free[0, 7]), int(free[1, 2]))
    want = generate(model, config, rows, eos=eos, banned=banned)
    sampling = SamplingConfig(max_new_tokens=free.shape[1], temperature=0.0)
    sampler = Sampler(Qwen3VL(config), sampling, eos_ids=eos, banned_ids=banned, pad_id=PAD)
    got = sampler.rollout({"params": params}, inputs, jax.random.key(0), np.arange(len(rows)))
    np.testing.assert_array_equal(got.tokens, want)
    ends = [next((i + 1 for i, t in enumerate(r) if t in eos), len(r)) for r in free.tolist()]
    assert len(set(ends)) == len(rows) and max(ends) == free.shape[1]
    np.testing.assert_array_equal(got.mask.sum(axis=1), ends)
    np.testing.assert_array_equal(got.truncated, [not set(r) & set(eos) for r in free.tolist()])


PAD = 0


def generate(
    model: Any,
    config: ModelConfig,
    rows: list[Row],
    *,
    eos: tuple[int, ...],
    banned: tuple[int, ...],
) -> np.ndarray:
    """transformers' greedy responses [B, R], padded on the right to R = 24."""
    batch = helpers_hf.to_torch(config, rows, side="left")
    model.generation_config.eos_token_id = None
    tokens = model.generate(
        **batch,
        max_new_tokens=24,
        do_sample=False,
        eos_token_id=list(eos) or None,
        pad_token_id=PAD,
        suppress_tokens=list(banned),
    )
    tokens = tokens[:, batch["input_ids"].shape[1] :].numpy()
    return np.pad(tokens, ((0, 0), (0, 24 - tokens.shape[1])), constant_values=PAD)
