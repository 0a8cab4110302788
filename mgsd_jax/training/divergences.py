"""Divergences of a student p from a teacher q, token by token, with their gradient in the logits.

Axes: N tokens, V vocabulary, or the part of it that a device holds. Everything here is float32 and
sees one chunk of tokens at a time; `losses.py` does the matmuls, the chunking and the weighting.
All reductions over the vocabulary go through `Shard`, so the formulas are independent of sharding.

To add a divergence sum_v f(p_v, q_v), write one function of (p, q) that returns the terms
f(p_v, q_v) and their slopes u_v = df/dp_v, and enter it in `DIVERGENCES`. Its value and its
gradient in the student's logits, p (u - E_p[u]), are formed in `value_and_gradient`. A constant
added to u drops out. d = log p - log q below.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mgsd_jax.config import DistillationConfig

# A finite stand-in for -inf: exp() of it is 0 and 0 * MASKED_LOGIT is 0, where 0 * -inf is NaN.
MASKED_LOGIT = -1e30
# The least probability that a slope is divided by: 1 / _LEAST_PROB is still finite in float32.
_LEAST_PROB = 1e-35


class TokenStats(NamedTuple):
    """Statistics of every token of a distillation loss, in nats; 0 where it is not counted."""

    kl: jax.Array  # [N] exact KL(student || teacher), before any cap, whatever the objective
    student_entropy: jax.Array  # [N]
    teacher_entropy: jax.Array  # [N]
    student_logprob: jax.Array  # [N] of the target
    teacher_logprob: jax.Array  # [N] of the target
    top1_agree: jax.Array  # [N] 1 where both prefer the same token
    student_top1_prob: jax.Array  # [N] probability of the student's preferred token
    clipped: jax.Array  # [N] 1 where the cap changed the gradient


class TargetStats(NamedTuple):
    """Statistics of every target of a cross-entropy; 0 where the token is not counted."""

    logprob: jax.Array  # [N] nats
    is_top1: jax.Array  # [N] 1 where the target is the preferred token


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of the vocabulary that logits [N, V] cover; equal parts, in the order of `axes`."""

    axes: tuple[str, ...] = ()  # mesh axes that split the vocabulary; (): all of it is here

    def sum(self, values: jax.Array) -> jax.Array:
        """[N, V] to [N, 1], over the whole vocabulary."""
        return self._total(jnp.sum(values, axis=-1, keepdims=True))

    def max(self, values: jax.Array) -> jax.Array:
        """[N, V] to [N, 1], over the whole vocabulary."""
        top = jnp.max(values, axis=-1, keepdims=True)
        return jax.lax.pmax(top, self.axes) if self.axes else top

    def pick(self, values: jax.Array, targets: jax.Array) -> jax.Array:
        """The value [N] at each target, whichever part holds it."""
        if not self.axes:
            return jnp.take_along_axis(values, targets[:, None], axis=-1)[:, 0]
        index = self._local(values, targets)
        found = jnp.take_along_axis(values, jnp.maximum(index, 0)[:, None], axis=-1)[:, 0]
        return self._total(jnp.where(index >= 0, found, 0.0))

    def one_hot(self, values: jax.Array, targets: jax.Array) -> jax.Array:
        """[N, V], shaped as `values`: 1 at the target, all 0 where another part holds it."""
        return jax.nn.one_hot(self._local(values, targets), values.shape[-1], dtype=jnp.float32)

    def _total(self, values: jax.Array) -> jax.Array:
        return jax.lax.psum(values, self.axes) if self.axes else values

    def _local(self, values: jax.Array, targets: jax.Array) -> jax.Array:
        """Targets as columns of this part, -1 where another part holds them."""
        if not self.axes:
            return targets
        width = values.shape[-1]
        index = targets - jax.lax.axis_index(self.axes) * width
        return jnp.where((index >= 0) & (index < width), index, -1)


WHOLE = Shard()


class Distribution(NamedTuple):
    """A softmax over V, kept as logits and normaliser."""

    logits: jax.Array  # [N, V]
    top: jax.Array  # [N, 1] the largest logit
    log_norm: jax.Array  # [N, 1] log sum exp(logits - top)
    targets: jax.Array  # [N] int32 the tokens of the response
    shard: Shard

    @property
    def logprobs(self) -> jax.Array:
        # Subtracting the top first keeps what float32 can hold of a gap between logits of 1e4.
        return (self.logits - self.top) - self.log_norm

    @property
    def probs(self) -> jax.Array:
        return jnp.exp(self.logprobs)

    @property
    def divisors(self) -> jax.Array:
        """`probs`, large enough to divide by.

        A slope u = -q / p would overflow where p has underflowed, although p u = -q is harmless.
        """
        return jnp.maximum(self.probs, _LEAST_PROB)

    @property
    def target_logprob(self) -> jax.Array:
        """[N]"""
        picked = self.shard.pick(self.logits, self.targets)
        return (picked - self.top[:, 0]) - self.log_norm[:, 0]

    @property
    def target_one_hot(self) -> jax.Array:
        """[N, V]"""
        return self.shard.one_hot(self.logits, self.targets)


# (student p, teacher q) -> (terms [N, V], slopes u [N, V])
Divergence = Callable[[Distribution, Distribution], tuple[jax.Array, jax.Array]]


def distribution(
    logits: jax.Array,
    targets: jax.Array,
    vocab_mask: jax.Array | None = None,
    shard: Shard = WHOLE,
) -> Distribution:
    """The softmax of logits [N, V]; tokens outside vocab_mask [V] have probability 0."""
    if vocab_mask is not None:
        logits = jnp.where(vocab_mask, logits, MASKED_LOGIT)
    top = shard.max(logits)
    log_norm = jnp.log(shard.sum(jnp.exp(logits - top)))
    return Distribution(logits, top, log_norm, targets, shard)


def log_ratio(p: Distribution, q: Distribution) -> jax.Array:
    """d = log p - log q, [N, V]. Near-equal logits subtract without rounding, so it is exact."""
    return (p.logits - q.logits) - ((p.top - q.top) + (p.log_norm - q.log_norm))


def kl_terms(probs: jax.Array, other: jax.Array, ratio: jax.Array) -> jax.Array:
    """Terms that sum to KL(probs || other) over V, each of them >= 0, [N, V].

    They are probs * (ratio + expm1(-ratio)): the added terms sum to 0, and what is left does not
    cancel. A KL of 1e-6 is right to 1e-3 where sum(probs * ratio) has the wrong sign. The series
    serves ratios below 1/2 (what it leaves out is less than a rounding); elsewhere the plain form,
    which cannot overflow where expm1 does. Its terms are at least probs / 10 there, so that the
    rounding of probs counts tenfold at most; from 1/8 on it would count a hundredfold.
    """
    small = jnp.abs(ratio) < 0.5
    x = jnp.where(small, ratio, 0.0)
    series = 1 / 24 - x * (1 / 120 - x * (1 / 720 - x * (1 / 5040 - x / 40320)))
    series = x * x * (1 / 2 - x * (1 / 6 - x * series))
    return jnp.where(small, probs * series, (probs * ratio - probs) + other)


# ------------------------------------------------------------------------------------ divergences


def reverse_kl(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
    """KL(p || q): u = d.

    Less its mean, the value itself, which is there without another pass over the vocabulary: what
    `value_and_gradient` subtracts then is rounding alone.
    """
    ratio = log_ratio(p, q)
    terms = kl_terms(p.probs, q.probs, ratio)
    return terms, ratio - p.shard.sum(terms)


def forward_kl(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
    """KL(q || p): u = -q / p, so that the gradient is p - q."""
    terms = kl_terms(q.probs, p.probs, -log_ratio(p, q))
    return terms, -q.probs / p.divisors


def jsd(
    p: Distribution, q: Distribution, teacher_weight: float = 0.5
) -> tuple[jax.Array, jax.Array]:
    """Generalised Jensen-Shannon divergence (arXiv 2306.13649): u = (1 - beta) log(p / m).

    (1 - beta) KL(p || m) + beta KL(q || m) with m = (1 - beta) p + beta q, where beta in (0, 1) is
    `teacher_weight`, the teacher's share of m.
    """
    beta = teacher_weight
    p_probs, q_probs, ratio = p.probs, q.probs, log_ratio(p, q)
    mix = (1.0 - beta) * p_probs + beta * q_probs
    # log(p/m) and log(q/m) without m, which may underflow. Below -80 nats m is beta * q, expm1
    # would overflow, and q's ratio as a difference would drown in the rounding of p's.
    is_near = ratio > -80.0
    near = -jnp.log1p(beta * jnp.expm1(-jnp.maximum(ratio, -80.0)))
    p_ratio = jnp.where(is_near, near, ratio - math.log(beta))
    q_ratio = jnp.where(is_near, near - ratio, -math.log(beta))
    terms = (1.0 - beta) * kl_terms(p_probs, mix, p_ratio)
    terms += beta * kl_terms(q_probs, mix, q_ratio)
    return terms, (1.0 - beta) * p_ratio


def sampled_reverse_kl(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
    """d of the token y that was sampled: upstream's objective, a policy gradient.

    The gradient, d(y) (1_y - p), is that of the loss -A log p(y) with the advantage A = -d(y) held
    fixed; over y ~ p its expectation is the gradient of `reverse_kl`. Source: upstream
    `ray_trainer.py` (advantage) and `core_algos.py` compute_policy_loss at p = p_old.
    """
    sampled = p.target_one_hot * log_ratio(p, q)
    return sampled, sampled / p.divisors


DIVERGENCES: dict[str, Divergence] = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jsd": jsd,
    "sampled_reverse_kl": sampled_reverse_kl,
}


def named(settings: DistillationConfig) -> Divergence:
    """The divergence of `settings.objective`, with the parameters that it has in the config.

    Raises ValueError for an unknown name, and for parameters that the divergence does not have.
    """
    name, mix = settings.objective, settings.forward_kl_mix
    if name not in DIVERGENCES:
        raise ValueError(f"distillation.objective: got {name!r}, want one of {list(DIVERGENCES)}")
    if mix and name != "reverse_kl":
        raise ValueError(
            f"distillation.forward_kl_mix: got {mix} with objective {name}, want 0, or objective "
            "reverse_kl"
        )
    if settings.token_kl_cap and name == "sampled_reverse_kl":
        raise ValueError(
            f"distillation.token_kl_cap: got {settings.token_kl_cap} with objective {name}, want 0"
        )
    if name == "jsd":
        return functools.partial(jsd, teacher_weight=settings.jsd_teacher_weight)
    if not mix:
        return DIVERGENCES[name]

    def mixed(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
        reverse, forward = reverse_kl(p, q), forward_kl(p, q)
        terms, slopes = ((1 - mix) * a + mix * b for a, b in zip(reverse, forward, strict=True))
        return terms, slopes

    return mixed


def value_and_gradient(
    divergence: Divergence, p: Distribution, q: Distribution, cap: float = 0.0
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(divergence [N], gradient in p's logits [N, V], which tokens were capped [N]).

    A token whose divergence exceeds `cap` (nats; 0: no cap) counts as `cap`, and its gradient is
    scaled by the same factor.
    """
    terms, slopes = divergence(p, q)
    value, probs = p.shard.sum(terms)[:, 0], p.divisors
    gradient = probs * (slopes - p.shard.sum(probs * slopes))
    gradient = jnp.where(p.logits > MASKED_LOGIT, gradient, 0.0)
    if not cap:
        return value, gradient, jnp.zeros_like(value)
    is_over = value > cap
    scale = jnp.where(is_over, cap / jnp.where(is_over, value, 1.0), 1.0)
    return value * scale, gradient * scale[:, None], is_over.astype(jnp.float32)


# ------------------------------------------------------------------ statistics, and cross-entropy


def measure(p: Distribution, q: Distribution, clipped: jax.Array) -> TokenStats:
    """Statistics of one chunk."""
    p_probs, q_probs = p.probs, q.probs
    both_top = (p.logits == p.top) & (q.logits == q.top)
    return TokenStats(
        kl=p.shard.sum(kl_terms(p_probs, q_probs, log_ratio(p, q)))[:, 0],
        student_entropy=(p.log_norm - p.shard.sum(p_probs * (p.logits - p.top)))[:, 0],
        teacher_entropy=(q.log_norm - q.shard.sum(q_probs * (q.logits - q.top)))[:, 0],
        student_logprob=p.target_logprob,
        teacher_logprob=q.target_logprob,
        top1_agree=p.shard.max(both_top.astype(jnp.float32))[:, 0],
        student_top1_prob=jnp.exp(-p.log_norm)[:, 0],
        clipped=clipped,
    )


def cross_entropy(p: Distribution) -> tuple[jax.Array, TargetStats, jax.Array]:
    """(-log p(target) [N], its statistics, gradient in the logits [N, V])."""
    target_logit = p.shard.pick(p.logits, p.targets)
    logprob = (target_logit - p.top[:, 0]) - p.log_norm[:, 0]
    stats = TargetStats(logprob, (target_logit >= p.top[:, 0]).astype(jnp.float32))
    return -logprob, stats, p.probs - p.target_one_hot
