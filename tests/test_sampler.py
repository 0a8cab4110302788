"""Rollouts: what they draw from, when they stop, and that rows do not disturb each other."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_model import random_params, random_rows, tiny, to_inputs
from jax.typing import ArrayLike

from mgsd_jax.checks import ranges
from mgsd_jax.config import SamplingConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.qwen3vl import Qwen3VL, append_response, apply_hidden, head, logits
from mgsd_jax.sampling import sampler
from mgsd_jax.sampling.choice import invert_cdf, keep_nucleus
from mgsd_jax.sampling.sampler import Rollout, Sampler

CONFIG = tiny()
MODEL = Qwen3VL(CONFIG)
VARIABLES = {"params": random_params(CONFIG)}
BANNED = (CONFIG.image_token_id, CONFIG.video_token_id, 7)
EOS = (11, 12)
PAD = 3
R = 12
# [B] prompts: pictures of several sizes, no picture, ragged lengths
PROMPTS = [(3, (4, 4), 5), (2, (4, 8), 1, (2, 2), 2), (9,), (4,)]
ROW_IDS = np.array([50, 7, 1000, 0], np.int32)


def prompts(order: tuple[int, ...] = (0, 1, 2, 3)) -> Inputs:
    rows = random_rows(CONFIG, PROMPTS)
    return to_inputs(
        CONFIG, [rows[i] for i in order], side="left", length=24, bucket=32, max_pictures=2
    )


def rollout(
    sampling: SamplingConfig,
    inputs: Inputs | None = None,
    *,
    seed: int = 0,
    row_ids: np.ndarray = ROW_IDS,
    eos: tuple[int, ...] = EOS,
    pad: int = PAD,
) -> Rollout:
    run = Sampler(MODEL, sampling, eos_ids=eos, banned_ids=BANNED, pad_id=pad).rollout
    inputs = prompts() if inputs is None else inputs
    return jax.device_get(run(VARIABLES, inputs, jax.random.key(seed), row_ids))


@jax.jit
def forward_logprobs(
    inputs: Inputs, response: jax.Array, mask: jax.Array, temperature: float
) -> jax.Array:
    """[B, R, V]: what the training forward says about each response position."""
    width = response.shape[1]
    whole = append_response(inputs, response, mask)
    hidden = apply_hidden(MODEL, VARIABLES, whole)[:, -width - 1 : -1]
    scores = logits(hidden, head(VARIABLES["params"]))
    return jax.nn.log_softmax(scores.at[..., list(BANNED)].set(-jnp.inf) / temperature, axis=-1)


def taken(logprobs: ArrayLike, tokens: ArrayLike) -> np.ndarray:
    return np.take_along_axis(np.asarray(logprobs), np.asarray(tokens)[..., None], axis=-1)[..., 0]


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_logprobs_are_those_of_the_training_forward(temperature: float) -> None:
    out = rollout(SamplingConfig(R, temperature))
    want = taken(forward_logprobs(prompts(), out.tokens, out.mask, temperature), out.tokens)
    assert np.abs(out.logprobs - want)[out.mask].max() <= 1e-4
    np.testing.assert_array_equal(out.logprobs[~out.mask], 0)


def test_greedy_takes_the_likeliest_token_and_reports_its_logprob() -> None:
    out = rollout(SamplingConfig(R, 0.0))
    expected = np.asarray(forward_logprobs(prompts(), out.tokens, out.mask, 1.0))
    np.testing.assert_array_equal(out.tokens[out.mask], expected.argmax(-1)[out.mask])
    assert np.abs(out.logprobs - taken(expected, out.tokens))[out.mask].max() <= 1e-4


def test_mask_runs_through_the_first_end_token_then_pads() -> None:
    free = rollout(SamplingConfig(R), eos=())
    assert free.mask.all() and free.truncated.all()
    eos = (int(free.tokens[0, 5]), int(free.tokens[2, 0]))
    out = rollout(SamplingConfig(R), eos=eos)
    for got, mask, truncated, want in zip(
        out.tokens, out.mask, out.truncated, free.tokens, strict=True
    ):
        ends = np.flatnonzero(np.isin(want, eos))
        length = ends[0] + 1 if len(ends) else R
        np.testing.assert_array_equal(got[:length], want[:length])
        np.testing.assert_array_equal(got[length:], PAD)
        np.testing.assert_array_equal(mask, np.arange(R) < length)
        assert truncated == (len(ends) == 0)
    assert out.mask[2].sum() == 1 and out.truncated.any()


def test_end_token_at_the_last_position_is_not_truncated() -> None:
    free = rollout(SamplingConfig(R), eos=())
    last = int(free.tokens[0, -1])
    assert last not in free.tokens[0, :-1]
    out = rollout(SamplingConfig(R), eos=(last, last))
    assert out.mask[0].all() and not out.truncated[0]


def test_pad_id_may_be_sampled_and_counts_until_the_row_ends() -> None:
    """Whether a token counts is never read off its id."""
    free = rollout(SamplingConfig(R), eos=())
    out = rollout(SamplingConfig(R), eos=(), pad=int(free.tokens[1, 2]))
    assert out.mask.all()
    np.testing.assert_array_equal(out.tokens, free.tokens)


def test_a_row_does_not_depend_on_its_neighbours_or_its_place() -> None:
    want = rollout(SamplingConfig(R))
    order = (2, 0, 3, 1)
    got = rollout(SamplingConfig(R), prompts(order), row_ids=ROW_IDS[list(order)])
    np.testing.assert_array_equal(got.tokens, want.tokens[list(order)])
    alone = rollout(SamplingConfig(R), prompts((1,)), row_ids=ROW_IDS[1:2])
    np.testing.assert_array_equal(alone.tokens[0], want.tokens[1])
    np.testing.assert_allclose(alone.logprobs[0], want.logprobs[1], atol=1e-5)


def test_other_row_ids_and_other_seeds_draw_otherwise() -> None:
    same = prompts((0, 0, 0, 0))
    out = rollout(SamplingConfig(R), same)
    assert len({tuple(row) for row in out.tokens}) == 4
    again = rollout(SamplingConfig(R), same, seed=1)
    assert all((a != b).any() for a, b in zip(out.tokens, again.tokens, strict=True))


def test_a_shorter_rollout_is_the_start_of_a_longer_one() -> None:
    short, long = rollout(SamplingConfig(5), eos=()), rollout(SamplingConfig(R), eos=())
    np.testing.assert_array_equal(short.tokens, long.tokens[:, :5])


def test_first_tokens_follow_the_model_distribution() -> None:
    """Chi-square of 4096 draws of one token against the forward's probabilities."""
    inputs = prompts((2,) * 512)
    one = SamplingConfig(1, 0.5)
    run = Sampler(MODEL, one, eos_ids=(), banned_ids=BANNED, pad_id=PAD).rollout
    ids = np.arange(512)
    drawn = [run(VARIABLES, inputs, jax.random.key(s), ids).tokens[:, 0] for s in range(8)]
    counts = np.bincount(np.concatenate(drawn), minlength=CONFIG.text.vocab_size)
    assert counts[list(BANNED)].sum() == 0
    one = np.zeros((1, 1), np.int32)
    expected = np.exp(forward_logprobs(prompts((2,)), one, one, 0.5))[0, 0] * counts.sum()
    kept = expected > 5
    chi_square = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
    assert abs(chi_square - kept.sum()) < 4 * np.sqrt(2 * kept.sum())


def test_the_loop_stops_when_all_rows_have_ended() -> None:
    free = rollout(SamplingConfig(R), eos=())
    eos = (int(free.tokens[0, 2]), int(free.tokens[1, 1]))
    keep = (0, 1, 0, 1)  # four rows, to share the program of the other tests
    out = rollout(SamplingConfig(R), prompts(keep), row_ids=ROW_IDS[list(keep)], eos=eos)
    _, cache = decode(prompts(keep), ROW_IDS[list(keep)], eos)
    longest = out.mask.sum(axis=1).max()
    assert longest <= 3 and int(cache.length) == prompts().tokens.shape[1] + longest - 1


def decode(
    inputs: Inputs, row_ids: np.ndarray, eos: tuple[int, ...], *, lower: bool = False
) -> Any:
    """The inner program of a rollout, for what a rollout does not show: the cache it leaves."""
    run = Sampler(MODEL, SamplingConfig(R), eos_ids=eos, banned_ids=BANNED, pad_id=PAD)
    programs = run.programs(VARIABLES, inputs, jax.random.key(0), row_ids)
    prefill, arguments = programs["prefill"]
    prefilled = prefill(*arguments)
    decode, (static, is_last, choice, variables, _, _, *rest) = programs["decode"]
    call = decode.lower if lower else decode
    return call(static, is_last, choice, variables, *prefilled, *rest)


def test_temperature_and_top_p_share_a_program() -> None:
    rollout(SamplingConfig(R, 0.9, top_p=0.9))
    decode: Any = sampler._compiled(None)[1]
    before = decode._cache_size()
    hot, cold = (
        rollout(SamplingConfig(R, 2.0, top_p=0.8)),
        rollout(SamplingConfig(R, 0.2, top_p=0.5)),
    )
    assert decode._cache_size() == before
    assert hot.logprobs.sum() < cold.logprobs.sum()


def test_donated_cache_is_used_in_place() -> None:
    inputs = prompts()
    cache = decode(inputs, ROW_IDS, EOS)[1]
    program = decode(inputs, ROW_IDS, EOS, lower=True).compile()
    assert program.memory_analysis().alias_size_in_bytes >= cache.k.nbytes + cache.v.nbytes


@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.9, 0.999])
def test_nucleus_is_the_smallest_set_that_reaches_top_p(top_p: float) -> None:
    scores = 3 * np.random.default_rng(0).standard_normal((6, 300)).astype(np.float32)
    scores[0, :100] = -np.inf
    kept = np.isfinite(np.asarray(keep_nucleus(jnp.asarray(scores), jnp.float32(top_p))))
    for row, got in zip(scores.astype(np.float64), kept, strict=True):
        probabilities = np.exp(row) / np.exp(row).sum()
        order = np.argsort(-probabilities)
        size = int((np.cumsum(probabilities[order]) < top_p).sum()) + 1
        np.testing.assert_array_equal(np.flatnonzero(got), np.sort(order[:size]))


@pytest.mark.parametrize("sampling", [SamplingConfig(R, top_k=4), SamplingConfig(R, top_p=0.4)])
def test_truncated_sampling_stays_inside_and_renormalises(sampling: SamplingConfig) -> None:
    out = rollout(sampling)
    full = np.asarray(forward_logprobs(prompts(), out.tokens, out.mask, 1.0))
    if sampling.top_k:
        least = np.sort(full, axis=-1)[..., -sampling.top_k, None]
        inside = np.where(full >= least, full, -np.inf)
    else:
        inside = np.stack([keep_nucleus(jnp.asarray(row), jnp.float32(0.4)) for row in full])
    want = taken(jax.nn.log_softmax(inside, axis=-1), out.tokens)
    assert np.abs(out.logprobs - want)[out.mask].max() <= 1e-4


def test_inverse_cdf_gives_every_token_its_share_of_the_unit_interval() -> None:
    rng = np.random.default_rng(0)
    scores = 2 * rng.standard_normal(300).astype(np.float32)
    scores[[0, 128, 255, 299]] = -np.inf
    logprobs = jax.nn.log_softmax(scores)
    count = 20_000
    uniforms = (jnp.arange(count, dtype=jnp.float32) + 0.5) / count
    tokens = invert_cdf(jnp.broadcast_to(logprobs, (count, 300)), uniforms)
    counts = np.bincount(tokens, minlength=300)
    assert np.abs(counts - count * np.exp(logprobs)).max() <= 2
    assert (np.diff(tokens) >= 0).all()


def test_inverse_cdf_never_lands_on_an_impossible_token() -> None:
    """The largest and smallest uniforms, with impossible tokens at every edge of a block."""
    scores = np.full((3, 384), -np.inf, np.float32)
    scores[0, 5:100] = 0.1
    scores[1, 130:250] = np.linspace(-20, 3, 120)
    scores[2, 300] = 1.0
    logprobs = jax.nn.log_softmax(jnp.asarray(scores), axis=-1)
    for uniform in (0.0, 1e-7, 0.5, 1 - 2**-24):
        tokens = invert_cdf(logprobs, jnp.full(3, uniform, jnp.float32))
        assert np.isfinite(taken(logprobs, np.asarray(tokens))).all()


@pytest.mark.parametrize(
    "wrong",
    [
        {"max_new_tokens": 0},
        {"temperature": -0.1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"top_k": -1},
    ],
)
def test_sampling_refuses_values_out_of_range(wrong: dict) -> None:
    with pytest.raises(ValueError, match=r"got .*want"):
        ranges.coerce(SamplingConfig(**{"max_new_tokens": 4, **wrong}), SamplingConfig, "sampling")


@pytest.mark.parametrize("wrong", [{"eos_ids": (256,)}, {"pad_id": -1}, {"banned_ids": (11,)}])
def test_make_rollout_refuses_ids_that_cannot_be(wrong: dict) -> None:
    ids: dict[str, Any] = {"eos_ids": EOS, "banned_ids": BANNED, "pad_id": PAD, **wrong}
    with pytest.raises(ValueError, match=r"got .*want"):
        Sampler(MODEL, SamplingConfig(4), **ids)
