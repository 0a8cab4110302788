"""Properties of the model that need no reference implementation, and golden numbers from one."""

import dataclasses
from typing import cast

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_model import (
    GOLDEN_IDS,
    GOLDEN_LOGITS,
    GOLDEN_ROWS,
    Row,
    random_params,
    random_rows,
    tiny,
    to_inputs,
)

from mgsd_jax.config import LoraConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model import lora, qwen3vl
from mgsd_jax.model.attention import attend
from mgsd_jax.model.config import ModelConfig, TextConfig, VisionConfig
from mgsd_jax.model.qwen3vl import Qwen3VL, append_response, head, init_params, logits
from mgsd_jax.model.remat import Remat
from mgsd_jax.model.rope import mrope_angles, rotate, turn, vision_angles

CONFIG = tiny()
PARAMS = random_params(CONFIG)
ROWS = random_rows(CONFIG, GOLDEN_ROWS)
apply_hidden = jax.jit(
    lambda params, inputs: Qwen3VL(CONFIG).apply({"params": params}, inputs, method="hidden")
)


def hidden_of(inputs: Inputs) -> list[np.ndarray]:
    """Hidden states of the valid tokens, row by row."""
    out = np.asarray(apply_hidden(PARAMS, inputs))
    return [row[valid] for row, valid in zip(out, inputs.valid, strict=True)]


def assert_rows_close(got: list[np.ndarray], want: list[np.ndarray], atol: float = 2e-5) -> None:
    for a, b in zip(got, want, strict=True):
        np.testing.assert_allclose(a, b, atol=atol)


# The forward pass


@pytest.mark.usefixtures("full_compilation")
def test_golden_numbers() -> None:
    """Last-token logits that test_model_parity holds transformers to as well."""
    inputs = to_inputs(CONFIG, ROWS, side="left")
    out = logits(apply_hidden(PARAMS, inputs), head(PARAMS))
    np.testing.assert_allclose(out[:, -1, GOLDEN_IDS], GOLDEN_LOGITS, atol=1e-4)


def test_padding_changes_nothing() -> None:
    """Left or right, more tokens, more patches a picture, more (empty) pictures a row."""
    want = [hidden_of(to_inputs(CONFIG, [row], side="left"))[0] for row in ROWS]
    assert_rows_close(hidden_of(to_inputs(CONFIG, ROWS, side="left")), want)
    assert_rows_close(hidden_of(to_inputs(CONFIG, ROWS, side="right")), want)
    roomy = to_inputs(CONFIG, ROWS, side="left", length=40, bucket=64, max_pictures=3)
    assert_rows_close(hidden_of(roomy), want)


def test_what_stands_at_padding_is_not_read() -> None:
    inputs = to_inputs(CONFIG, ROWS, side="left", bucket=64)
    noise = np.random.default_rng(0)
    pictures = inputs.pictures
    assert pictures is not None
    junk = noise.standard_normal(pictures.patches.shape).astype(np.float32)
    patches = np.where(pictures.valid[..., None], pictures.patches, 100 * junk)
    tokens = np.where(inputs.valid, inputs.tokens, noise.integers(0, 200, inputs.tokens.shape))
    positions = np.where(inputs.valid, inputs.positions, 77)
    other = inputs._replace(
        tokens=tokens, positions=positions, pictures=pictures._replace(patches=patches)
    )
    assert_rows_close(hidden_of(other), hidden_of(inputs))


def test_rows_and_pictures_of_a_row_are_independent_but_for_their_order() -> None:
    want = hidden_of(to_inputs(CONFIG, ROWS, side="left"))
    got = hidden_of(to_inputs(CONFIG, ROWS[::-1], side="left"))
    assert_rows_close(got[::-1], want)


def test_batch_without_pictures_equals_one_with_an_unused_picture() -> None:
    text = [ROWS[2]]
    bare = to_inputs(CONFIG, text, side="left")
    assert bare.pictures is None
    padded = to_inputs(CONFIG, [*text, ROWS[0]], side="left", length=50)
    assert_rows_close(hidden_of(padded)[:1], hidden_of(bare))


def test_later_tokens_do_not_change_earlier_ones() -> None:
    inputs = to_inputs(CONFIG, ROWS, side="right")
    tokens = inputs.tokens.copy()
    tokens[0, len(ROWS[0].tokens) - 1] += 1
    before, after = hidden_of(inputs)[0], hidden_of(inputs._replace(tokens=tokens))[0]
    np.testing.assert_array_equal(before[:-1], after[:-1])
    assert np.abs(before[-1] - after[-1]).max() > 1e-2


def test_gradients_are_finite_with_empty_rows_and_pictures() -> None:
    inputs = to_inputs(CONFIG, ROWS, side="left", max_pictures=3)
    valid = inputs.valid.copy()
    valid[1] = False  # a row of padding only: every query fully masked

    def loss(params: dict) -> jax.Array:
        out = qwen3vl.apply_hidden(
            Qwen3VL(CONFIG), {"params": params}, inputs._replace(valid=valid)
        )
        return jnp.square(logits(out, head(params))).mean()

    value, gradients = jax.jit(jax.value_and_grad(loss))(PARAMS)
    assert jnp.isfinite(value)
    chex.assert_tree_all_finite(gradients)
    quiet = [path for path, g in jax.tree_util.tree_leaves_with_path(gradients) if not g.any()]
    assert not quiet  # every parameter takes part


def test_remat_changes_neither_values_nor_gradients() -> None:
    inputs = to_inputs(CONFIG, ROWS, side="left")

    def gradients(remat: Remat) -> dict:
        model = Qwen3VL(CONFIG, remat=remat)
        return jax.jit(
            jax.grad(lambda p: qwen3vl.apply_hidden(model, {"params": p}, inputs).var())
        )(PARAMS)

    chex.assert_trees_all_close(gradients("full"), gradients("none"), atol=1e-6)


@pytest.mark.parametrize("remat", ["none", "full"])  # one by one, in a scan
def test_hidden_of_the_last_tokens_is_the_end_of_the_whole(remat: Remat) -> None:
    inputs = to_inputs(CONFIG, ROWS, side="left")
    model = Qwen3VL(CONFIG, remat=remat)

    @jax.jit
    def both(params: dict) -> tuple[tuple[jax.Array, dict], tuple[jax.Array, dict]]:
        def last(params: dict, first: int) -> jax.Array:
            hidden = model.apply({"params": params}, inputs, first, method="hidden")
            return jnp.square(cast(jax.Array, hidden)[:, -4:]).mean()

        grad = jax.value_and_grad(last)
        return grad(params, inputs.tokens.shape[1] - 4), grad(params, 0)

    got, want = both(PARAMS)
    chex.assert_trees_all_close(got, want, atol=1e-6)


def test_bfloat16_computes_in_bfloat16_and_returns_float32_logits() -> None:
    inputs = to_inputs(CONFIG, ROWS, side="left")
    half = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), PARAMS)
    model = Qwen3VL(CONFIG, dtype=jnp.bfloat16)
    out = jax.jit(lambda p: model.apply({"params": p}, inputs, method="hidden"))(half)
    scores = logits(out, head(half))
    assert out.dtype == jnp.bfloat16 and scores.dtype == jnp.float32
    want = logits(apply_hidden(PARAMS, inputs), head(PARAMS))
    error = np.asarray(scores - want)[inputs.valid]
    assert 1e-4 < np.abs(error).mean() < 0.03 * np.asarray(want).std() + 0.01


@pytest.mark.parametrize("num_deepstack", [0, 3])
def test_deepstack_on_no_layer_and_on_every_layer(num_deepstack: int) -> None:
    config = tiny(num_deepstack=num_deepstack)
    params = jax.jit(lambda: init_params(config, jax.random.key(0)))()
    stacks = {"layers_deepstack", "layers"} & params["language"].keys()
    assert stacks == ({"layers"} if num_deepstack == 0 else {"layers_deepstack"})
    inputs = to_inputs(config, ROWS, side="left")
    out = jax.jit(lambda p: Qwen3VL(config).apply({"params": p}, inputs, method="hidden"))(params)
    assert np.isfinite(out).all()


# The cache


@pytest.mark.usefixtures("full_compilation")
def test_prefill_and_decode_equal_the_full_forward() -> None:
    prompts = to_inputs(CONFIG, ROWS, side="left")
    response = np.random.default_rng(2).integers(0, 250, (3, 4)).astype(np.int32)
    model, variables = Qwen3VL(CONFIG), {"params": PARAMS}
    decode = jax.jit(lambda *a: model.apply(variables, *a, method="decode"))
    prefill = jax.jit(
        lambda p: model.apply(variables, p, prompts.tokens.shape[1] + 9, method="prefill")
    )
    out, cache = prefill(prompts)
    steps = [out]
    for r in range(4):
        out, cache = decode(response[:, r, None], prompts.next_position[:, None] + r, cache)
        steps.append(out[:, 0])
    assert int(cache.length) == prompts.tokens.shape[1] + 4
    whole = append_response(prompts, jnp.asarray(response), jnp.ones((3, 4), bool))
    want = apply_hidden(PARAMS, whole)[:, -5:]
    np.testing.assert_allclose(jnp.stack(steps, axis=1), want, atol=2e-5)


def test_decoding_several_tokens_at_once_equals_one_at_a_time() -> None:
    """Also over slots that a row has given up, and after the rest moved to the front."""
    prompts = to_inputs(CONFIG, ROWS, side="left")
    response = np.random.default_rng(2).integers(0, 250, (3, 6)).astype(np.int32)
    model, variables = Qwen3VL(CONFIG), {"params": PARAMS}
    _, cache = model.apply(variables, prompts, prompts.tokens.shape[1] + 9, method="prefill")
    decode = jax.jit(lambda *a: model.apply(variables, *a, method="decode"))
    length = prompts.tokens.shape[1]
    positions = prompts.next_position[:, None] + np.arange(6)
    # Of three tokens the rows keep 2, 1 and 2.
    wrong = np.where(np.arange(3) < [[2], [1], [2]], response[:, :3], 5)
    _, cache = decode(wrong, positions[:, :3], cache)
    lost = (np.arange(length + 9) - length) >= np.array([[2], [1], [2]])
    cache = dataclasses.replace(cache, valid=cache.valid & ~lost)
    keep = np.array([True, True, True])
    small = jax.jit(lambda c: c.compact(keep))(cache)
    assert int(small.length) == int(np.asarray(cache.valid).sum(1).max()) < int(cache.length)
    rest = np.stack([row[n : n + 3] for row, n in zip(response, (2, 1, 2), strict=True)])
    places = np.stack([row[n : n + 3] for row, n in zip(positions, (2, 1, 2), strict=True)])
    whole = append_response(prompts, jnp.asarray(response), jnp.ones((3, 6), bool))
    want = apply_hidden(PARAMS, whole)[:, -6:]
    want = np.stack([row[n : n + 3] for row, n in zip(want, (2, 1, 2), strict=True)])
    for which in (cache, small):
        np.testing.assert_allclose(decode(rest, places, which)[0], want, atol=2e-5)


def test_append_response_continues_each_row() -> None:
    """The same as writing prompt and response as one sequence, unpadded."""
    response = np.arange(8, dtype=np.int32).reshape(2, 4)
    mask = np.array([[True] * 4, [True, True, False, False]])
    prompts = to_inputs(CONFIG, ROWS[:2], side="left")
    whole = jax.jit(append_response)(prompts, response, mask)
    together = [
        Row(
            np.concatenate([row.tokens, tail[keep]]),
            np.concatenate([row.is_visual, np.zeros(keep.sum(), bool)]),
            row.grids,
            row.patches,
        )
        for row, tail, keep in zip(ROWS, response, mask, strict=False)
    ]
    want = to_inputs(CONFIG, together, side="right")
    np.testing.assert_array_equal(whole.next_position, want.next_position)
    assert_rows_close(hidden_of(jax.device_get(whole)), hidden_of(want))


def test_cache_shorter_than_the_prompt_is_refused() -> None:
    prompts = to_inputs(CONFIG, ROWS, side="left")
    with pytest.raises(ValueError, match=r"cache_length: got 3, want"):
        Qwen3VL(CONFIG).apply({"params": PARAMS}, prompts, 3, method="prefill")


# Adapters


def test_adapters_add_what_merging_them_would() -> None:
    spec = LoraConfig(rank=2, alpha=6.0, targets=r"q_proj|down_proj|visual/.*linear_fc1")
    inputs = to_inputs(CONFIG, ROWS, side="left")
    adapters = lora.init_adapters(PARAMS, spec, jax.random.key(0))

    @jax.jit
    def apply(params: dict, adapters: dict) -> jax.Array:
        variables = {"params": params, "adapters": adapters}
        return qwen3vl.apply_hidden(Qwen3VL(CONFIG), variables, inputs)

    plain = apply_hidden(PARAMS, inputs)
    np.testing.assert_array_equal(apply(PARAMS, adapters), plain)
    drawn = jax.tree.map(lambda leaf: leaf + 0.1 if leaf.ndim > 1 else leaf, adapters)
    got, merged = apply(PARAMS, drawn), apply_hidden(lora.merge(PARAMS, drawn), inputs)
    np.testing.assert_allclose(got, merged, atol=5e-5)
    assert np.abs(got - plain).max() > 0.1


# Attention and rotary tables


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (4, 1)])
def test_attend_is_softmax_attention(heads: tuple[int, int], causal: bool) -> None:
    rng = np.random.default_rng(0)
    (n, k_heads), length, width = heads, 7, 8
    q = rng.standard_normal((2, length, n, width)).astype(np.float32)
    k, v = rng.standard_normal((2, 2, length, k_heads, width)).astype(np.float32)
    valid = np.array([[True] * 7, [False, False, True, True, True, False, True]])
    got = np.asarray(attend(*map(jnp.asarray, (q, k, v)), valid=jnp.asarray(valid), causal=causal))
    for b in range(2):
        for t in range(length):
            seen = valid[b] & (np.arange(length) <= t if causal else True)
            if not seen.any():
                assert np.isfinite(got[b, t]).all()
                continue
            for i in range(n):
                keys, values = (x[b, seen, i // (n // k_heads)] for x in (k, v))
                weights = np.exp(keys @ q[b, t, i] / np.sqrt(width))
                want = weights @ values / weights.sum()
                np.testing.assert_allclose(got[b, t, i], want, atol=1e-5)


def test_attention_to_nothing_has_finite_gradients() -> None:
    x = jnp.ones((1, 3, 2, 4))
    nothing = jnp.zeros((1, 3), bool)
    gradient = jax.grad(lambda x: attend(x, x, x, valid=nothing, causal=True).sum())(x)
    assert jnp.isfinite(gradient).all()


def test_mrope_takes_each_frequency_from_its_axis() -> None:
    """Width 16: frequencies 0..7 turn with t h w t h w t t for section (4, 2, 2)."""
    positions = jnp.array([[[5]], [[11]], [[23]]])
    turned = mrope_angles(positions, head_dim=16, theta=100.0, section=(4, 2, 2))
    cos, sin = turn(turned, jnp.dtype("float32"))
    axis = np.array([5, 11, 23, 5, 11, 23, 5, 5])
    angles = np.tile(axis * 100.0 ** (-np.arange(8) / 8), 2)
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), atol=1e-5)
    np.testing.assert_allclose(sin[0, 0, 0], np.sin(angles), atol=1e-5)


def test_vision_rope_turns_the_first_quarter_by_row_and_the_second_by_column() -> None:
    turned = vision_angles(jnp.array([[[3, 9]]]), head_dim=8, theta=10_000.0)
    cos, _ = turn(turned, jnp.dtype("float32"))
    angles = np.tile([3, 3 * 0.01, 9, 9 * 0.01], 2)
    np.testing.assert_allclose(cos[0, 0, 0], np.cos(angles), atol=1e-6)


def test_rotation_makes_scores_depend_on_distance_only() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 1, 1, 16)).astype(np.float32)

    def score(at: int, other: int) -> float:
        def rotated(x: np.ndarray, position: int) -> jax.Array:
            places = jnp.full((3, 1, 1), position)
            angles = mrope_angles(places, head_dim=16, theta=1e4, section=(4, 2, 2))
            return rotate(jnp.asarray(x), turn(angles, jnp.dtype("float32")))

        return float((rotated(q, at) * rotated(k, other)).sum())

    assert score(3, 8) == pytest.approx(score(40, 45), abs=1e-4)
    assert score(3, 8) != pytest.approx(score(3, 9), abs=1e-2)


# Configuration


@pytest.mark.parametrize("config", [tiny(), tiny(tie_word_embeddings=False, num_deepstack=0)])
def test_configuration_survives_a_round_trip(config: ModelConfig) -> None:
    assert ModelConfig.from_hf(config.to_hf()) == config


@pytest.mark.parametrize("dropped", ["rope_parameters", "rope_scaling"])
def test_either_way_of_writing_rope_is_read(dropped: str) -> None:
    """transformers 4.57 knows rope_theta and rope_scaling, transformers 5 rope_parameters only."""
    written = CONFIG.to_hf()
    for part in ("text_config", "vision_config"):
        written[part].pop(dropped, None)
    if dropped == "rope_scaling":
        del written["text_config"]["rope_theta"]
    assert ModelConfig.from_hf(written) == CONFIG


@pytest.mark.parametrize(
    ("part", "key", "value"),
    [
        (None, "model_type", "qwen2_5_vl"),
        ("text_config", "hidden_act", "gelu"),
        ("text_config", "attention_bias", True),
        ("text_config", "vocab_size", "many"),
        ("text_config", "rope_scaling", {"rope_type": "yarn", "mrope_section": [4, 2, 2]}),
        ("text_config", "num_key_value_heads", 3),
        ("vision_config", "hidden_act", "gelu"),
        ("vision_config", "deepstack_visual_indexes", [2, 0]),
        ("vision_config", "out_hidden_size", 31),
    ],
)
def test_configuration_we_cannot_run_is_refused(part: str | None, key: str, value: object) -> None:
    written = CONFIG.to_hf()
    target = written[part] if part else written
    target[key] = value
    if key == "rope_scaling":
        del target["rope_parameters"]
    with pytest.raises(ValueError, match=r"got .*want"):
        ModelConfig.from_hf(written)


@pytest.mark.parametrize("part", ["text_config", "vision_config"])
def test_missing_key_is_named(part: str) -> None:
    for key in ("hidden_size", "rms_norm_eps" if part == "text_config" else "depth"):
        written = CONFIG.to_hf()
        del written[part][key]
        with pytest.raises(ValueError, match=rf"folder: {part}: {key}: not found"):
            ModelConfig.from_hf(written, source="folder")


def test_released_shapes_have_the_released_sizes() -> None:
    """Qwen3-VL 4B and 8B from their public config.json; parameters counted without making them."""
    common = {
        "vocab_size": 151_936,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "rope_theta": 5e6,
    }
    small = ModelConfig(
        TextConfig(hidden_size=2560, intermediate_size=9728, **common),
        VisionConfig(24, 1024, 4096, 16, 2560, (5, 11, 17)),
        tie_word_embeddings=True,
    )
    large = ModelConfig(
        TextConfig(hidden_size=4096, intermediate_size=12_288, **common),
        VisionConfig(27, 1152, 4304, 16, 4096, (8, 16, 24)),
        tie_word_embeddings=False,
    )
    for config, want in ((small, 4_437_815_808), (large, 8_767_123_696)):
        shapes = jax.eval_shape(lambda config=config: init_params(config, jax.random.key(0)))
        assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == want
