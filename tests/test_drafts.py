"""Drafted rollouts: the same tokens as without drafts, in fewer passes."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from helpers_model import random_rows, to_inputs
from jax.typing import ArrayLike
from test_sampler import BANNED, EOS, MODEL, PAD, ROW_IDS, VARIABLES, prompts

from mgsd_jax.config import GuardConfig, SamplingConfig
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.batching import NO_TOKEN
from mgsd_jax.model.qwen3vl import head, logits
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling import decoding, drafts, sampler
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import distillation_step
from mgsd_jax.training import guards, monitor

R = 24
NONE = np.full((4, R), NO_TOKEN, np.int32)
RIGHT = np.array([[5, 6, 7, 8, 9, NO_TOKEN]], np.int32)


# Where a draft is read


@pytest.mark.parametrize(
    ("said", "pointer", "want"),
    [
        ([5, 6], 2, 2),  # as drafted
        ([5, 90], 2, 2),  # a wrong token took the place of one
        ([5, 90, 91], 3, 3),
        ([6], 1, 2),  # one was left out
        ([5, 6, 7, 5, 6], 5, 2),  # said again: the longest run of last tokens counts
        ([90, 91, 92, 93], 4, 4),  # nothing known: where the pointer is
        ([9], 1, 5),
        ([], 0, 0),
    ],
)
def test_a_draft_goes_on_behind_the_last_tokens(said: list[int], pointer: int, want: int) -> None:
    tokens = np.array([said + [PAD] * (8 - len(said))], np.int32)
    recent = drafts.last_tokens(jnp.asarray(tokens), jnp.array([len(said)]))
    got = drafts.follow(jnp.asarray(RIGHT), jnp.array([pointer]), recent)
    assert got.tolist() == [want]


def test_of_equal_runs_the_nearest_counts() -> None:
    draft = jnp.array([[1, 2, 9, 1, 2, 8, 1, 2, 7]])
    recent = drafts.last_tokens(jnp.array([[1, 2]]), jnp.array([2]))
    for pointer, want in ((0, 2), (3, 2), (4, 5), (6, 5), (7, 8), (30, 8)):
        assert drafts.follow(draft, jnp.array([pointer]), recent).tolist() == [want]


def test_guesses_end_with_the_draft() -> None:
    got = drafts.guess(jnp.asarray(RIGHT), jnp.array([3]), 4)
    assert got.tolist() == [[8, 9, NO_TOKEN, NO_TOKEN]]
    assert drafts.guess(jnp.asarray(RIGHT), jnp.array([40]), 2).tolist() == [[NO_TOKEN] * 2]


@pytest.mark.parametrize(
    ("drawn", "guessed", "ends", "room", "want"),
    [
        ([1, 2, 3, 4], [1, 2, 3], [0, 0, 0, 0], 9, [1, 1, 1, 1]),
        ([1, 2, 3, 4], [1, 9, 3], [0, 0, 0, 0], 9, [1, 1, 0, 0]),
        ([1, 2, 3, 4], [9, 2, 3], [0, 0, 0, 0], 9, [1, 0, 0, 0]),
        ([1, 2, 3, 4], [1, 2, 3], [0, 1, 0, 0], 9, [1, 1, 0, 0]),
        ([1, 2, 3, 4], [1, 2, 3], [0, 0, 0, 0], 3, [1, 1, 1, 0]),
        ([1, 2, 3, 4], [1, 2, 3], [0, 0, 0, 0], 0, [0, 0, 0, 0]),
        ([1], [], [0], 9, [1]),
    ],
)
def test_what_a_pass_keeps(drawn: list, guessed: list, ends: list, room: int, want: list) -> None:
    arrays = (np.array([drawn]), np.array([guessed], int), np.array([ends], bool))
    got = drafts.kept(*(jnp.asarray(x) for x in arrays), room=jnp.array([room]))
    assert got.astype(int).tolist() == [want]


# Rollouts


def test_without_guesses_a_draft_is_not_carried() -> None:
    run = Sampler(MODEL, SamplingConfig(R), eos_ids=EOS, banned_ids=BANNED, pad_id=PAD)
    programs = run.programs(VARIABLES, prompts(), jax.random.key(0), ROW_IDS, NONE)
    arguments = programs["decode"][1]
    assert arguments[0].window == 1 and arguments[-1] is None


@functools.cache
def run(sampling: SamplingConfig, eos: tuple[int, ...] = EOS, seed: int = 0) -> Rollout:
    """Without a draft."""
    return rollout(sampling, None, eos=eos, seed=seed)


def rollout(
    sampling: SamplingConfig,
    draft: ArrayLike | None,
    *,
    eos: tuple[int, ...] = EOS,
    seed: int = 0,
) -> Rollout:
    sampler = Sampler(MODEL, sampling, eos_ids=eos, banned_ids=BANNED, pad_id=PAD)
    return jax.device_get(
        sampler.rollout(VARIABLES, prompts(), jax.random.key(seed), ROW_IDS, draft)
    )


def assert_same(got: Rollout, want: Rollout) -> None:
    for name in ("tokens", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name), err_msg=name)
    # The sums of a pass of several tokens have another order: a few roundings of float32.
    np.testing.assert_allclose(got.logprobs, want.logprobs, atol=1e-4)


def draft_like(kind: str, tokens: ArrayLike) -> np.ndarray:
    """Drafts [B, F] by what they have to do with the tokens [B, R] that are sampled."""
    rng, right = np.random.default_rng(0), np.asarray(tokens)
    vocabulary = MODEL.config.text.vocab_size
    spoilt = np.where(
        rng.random(right.shape) < 0.3, rng.integers(0, vocabulary, right.shape), right
    )
    return {
        "perfect": right,
        "random": rng.integers(0, vocabulary, right.shape),
        "spoilt": spoilt,
        "empty": NONE,
        "ends early": np.where(np.arange(R) < [[3], [9], [0], [20]], right, NO_TOKEN),
        "banned": np.full(right.shape, BANNED[0]),
        "shifted": np.roll(spoilt, 2, axis=1),
        "short": np.where(np.arange(R) < 2, right, NO_TOKEN),
    }[kind].astype(np.int32)


SAMPLINGS = {
    "greedy": SamplingConfig(R, 0.0),
    "warm": SamplingConfig(R, 0.6),
    "plain": SamplingConfig(R, 1.0),
    "top-k": SamplingConfig(R, 1.0, top_k=20),
    "top-p": SamplingConfig(R, 1.0, top_p=0.8),
}
DRAFTS = ("perfect", "random", "spoilt", "empty", "ends early", "banned", "shifted", "short")


@pytest.mark.compiles
@pytest.mark.parametrize("kind", DRAFTS)
@pytest.mark.parametrize("name", SAMPLINGS)
def test_any_draft_gives_the_tokens_of_none(name: str, kind: str) -> None:
    want = run(SAMPLINGS[name])
    sampling = dataclasses.replace(SAMPLINGS[name], draft_tokens=4)
    assert_same(rollout(sampling, draft_like(kind, want.tokens)), want)


@pytest.mark.compiles
@pytest.mark.parametrize("count", [1, 2, 7, 23, 32])
def test_any_number_of_guesses_gives_the_tokens_of_none(count: int) -> None:
    """Up to more than are left, with rows that end inside a pass."""
    free = run(SAMPLINGS["plain"], eos=())
    eos = (int(free.tokens[0, 9]), int(free.tokens[1, 14]))
    want = run(SAMPLINGS["plain"], eos=eos)
    assert want.truncated.any() and not want.truncated.all()
    sampling = dataclasses.replace(SAMPLINGS["plain"], draft_tokens=count)
    for kind in ("perfect", "spoilt"):
        assert_same(rollout(sampling, draft_like(kind, free.tokens), eos=eos), want)


@pytest.mark.compiles
def test_a_perfect_draft_costs_a_pass_for_every_window() -> None:
    want = run(SAMPLINGS["plain"], eos=())
    sampling = dataclasses.replace(SAMPLINGS["plain"], draft_tokens=5)
    out = rollout(sampling, want.tokens, eos=())
    # The first token comes from the prompt; then six a pass, the last of which is no guess.
    own = np.flatnonzero(~out.guessed[0])
    np.testing.assert_array_equal(own, [0, 6, 12, 18, 23])
    assert (out.guessed == out.guessed[0]).all()
    assert not rollout(sampling, NONE, eos=()).guessed.any()


@pytest.mark.usefixtures("full_compilation")
@pytest.mark.compiles
@pytest.mark.parametrize("draft_tokens", [0, 3])
def test_stages_of_the_cache_change_nothing(
    draft_tokens: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Holes are closed, and the cache grows, several times: the tokens are those of one stage."""
    want = run(SAMPLINGS["plain"])
    sampling = dataclasses.replace(SAMPLINGS["plain"], draft_tokens=draft_tokens)
    draft = draft_like("spoilt", want.tokens)
    monkeypatch.setattr(decoding, "STAGES", (4, 9))
    monkeypatch.setattr(decoding, "SPARE_PASSES", 1)
    assert_same(rollout(sampling, draft), want)


@pytest.mark.compiles
def test_a_short_rollout_never_has_the_large_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    want = run(SAMPLINGS["plain"], eos=())
    eos = tuple(int(i) for i in want.tokens[:, 3])
    monkeypatch.setattr(decoding, "STAGES", (6,))

    def refuse(*_: object) -> None:
        raise AssertionError("the cache grew")

    monkeypatch.setattr(sampler, "_grow", refuse)
    sampler._compiled.cache_clear()
    assert not rollout(SAMPLINGS["plain"], None, eos=eos).truncated.any()
    with pytest.raises(AssertionError, match="the cache grew"):
        rollout(SAMPLINGS["plain"], None, eos=())
    sampler._compiled.cache_clear()


# In bfloat16, where a pass of several tokens rounds otherwise, the law is the same


HALF = MODEL.clone(dtype=jnp.bfloat16)
FEW = (20, 40, 60, 80)  # all other tokens are banned: few enough responses to count each


def chi_square(one: np.ndarray, other: np.ndarray) -> tuple[float, float]:
    """Pearson's statistic of two samples of equal size, and what equal laws exceed once in 10^4.

    One and other are counts by cell. The statistic is the sum of (a - b)^2 / (a + b); it follows
    chi-square where cells have some five counts, so that the rarer ones are taken as one cell.
    """
    rare = one + other < 10
    a, b = (np.append(x[~rare], x[rare].sum()) for x in (one, other))
    a, b = a[a + b > 0], b[a + b > 0]
    statistic = ((a - b) ** 2 / (a + b)).sum()
    return float(statistic), float(scipy.special.chdtri(len(a) - 1, 1e-4))


def counted(temperature: float, draft_tokens: int, seed: int) -> np.ndarray:
    """How often each response of three of the FEW tokens is sampled in 4,096 rows of one prompt."""
    rows, width = 4096, 3
    banned = tuple(i for i in range(MODEL.config.text.vocab_size) if i not in FEW)
    sampling = SamplingConfig(width, temperature, draft_tokens=draft_tokens)
    run = Sampler(HALF, sampling, eos_ids=(), banned_ids=banned, pad_id=FEW[0])
    inputs = to_inputs(MODEL.config, random_rows(MODEL.config, [(7,)]) * rows, side="left")
    draft = np.random.default_rng(seed).choice(FEW, (rows, width)).astype(np.int32)
    out = jax.device_get(
        run.rollout(
            VARIABLES,
            inputs,
            jax.random.key(seed),
            np.arange(rows, dtype=np.int32),
            draft if draft_tokens else None,
        )
    )
    assert (out.guessed.any(axis=1).mean() > 0.1) == (draft_tokens > 0)
    places = np.searchsorted(FEW, out.tokens)
    cells = places @ len(FEW) ** np.arange(width)
    return np.bincount(cells, minlength=len(FEW) ** width)


@pytest.mark.compiles
def test_drafted_rollouts_follow_the_law_of_plain_ones() -> None:
    """Two samples with noise of their own; another temperature is another law."""
    drafted = counted(1.0, 2, seed=1)
    statistic, limit = chi_square(drafted, counted(1.0, 0, seed=2))
    assert statistic <= limit
    statistic, limit = chi_square(drafted, counted(2.0, 0, seed=2))
    assert statistic > limit


@pytest.mark.compiles
@pytest.mark.parametrize("kind", ["perfect", "spoilt"])
def test_sampler_and_training_agree_within_the_guard(kind: str) -> None:
    def logprobs(draft: ArrayLike | None, draft_tokens: int) -> tuple[Any, np.ndarray]:
        sampling = SamplingConfig(R, draft_tokens=draft_tokens)
        run = Sampler(HALF, sampling, eos_ids=EOS, banned_ids=BANNED, pad_id=PAD)
        sampled = run.rollout(VARIABLES, prompts(), jax.random.key(0), ROW_IDS, draft)
        out: Any = jax.device_get(sampled)
        return out, np.asarray(trained_logprobs(prompts(), out.tokens, out.mask))

    plain, _ = logprobs(None, 0)
    out, trained = logprobs(draft_like(kind, plain.tokens), 4)
    assert out.guessed.any()
    gap = guards.logprob_gap(out.logprobs, trained, out.mask)
    assert 0 < gap.value < GuardConfig().logprob_gap


@jax.jit
def trained_logprobs(inputs: Inputs, tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """[B, R]: what the forward pass of the update says of sampled tokens."""
    hidden = distillation_step.response_hidden(HALF, VARIABLES, inputs, tokens, mask)
    scores = logits(hidden, head(VARIABLES["params"])).at[:, list(BANNED)].set(-jnp.inf)
    taken = jnp.take_along_axis(jax.nn.log_softmax(scores), tokens.reshape(-1, 1), axis=1)
    return taken.reshape(tokens.shape)


def test_tokens_kept_a_pass_are_counted_by_part() -> None:
    """The first token comes from the prompt; a part without a pass of its own is left out."""
    groups = np.array([[0, 0, 0, 1, 1, 2, -1], [0, 2, 2, 2, -1, -1, -1]])
    guessed = np.array([[0, 1, 0, 1, 1, 0, 0], [0, 1, 1, 0, 0, 0, 0]], bool)
    got = monitor.draft_metrics(groups, groups >= 0, guessed)
    first, _, third, *_ = prompts_lib.SEGMENTS
    assert got == {
        "rollout/kept_a_pass": Mean(8.0, 3.0),
        f"rollout/kept_a_pass/{first}": Mean(2.0, 1.0),
        f"rollout/kept_a_pass/{third}": Mean(4.0, 2.0),
    }


@pytest.mark.parametrize(
    ("longest", "window", "want"),
    [
        (62, 1, (62,)),
        (300, 1, (300,)),
        (1024, 1, (256, 512, 1024)),
        (1024, 8, (256, 512, 1024 + 64)),
        (4096, 1, (256, 512, 1024, 2048, 4096)),
    ],
)
def test_a_stage_is_at_least_twice_the_one_before(longest: int, window: int, want: tuple) -> None:
    static = decoding.Static(MODEL, longest, window, greedy=True, top_k=0, use_top_p=False)
    assert static.stages(40) == tuple(40 + new for new in want)
