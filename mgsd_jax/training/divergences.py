"""Per-token losses over the whole vocabulary, with their gradient in the logits.

Axes: N tokens, V vocabulary, or the part of it that a device holds. Everything here is float32 and
sees one chunk of tokens at a time; `losses.py` does the matmuls, the chunking and the weighting.
Whatever goes over the whole of V goes through `Shard`: the formulas know of no device.

Notation: p student, q teacher, d = log p - log q. For every divergence used here
dL/dlogits = p * (u - E_p[u]), with u = d (reverse KL), u = -q/p (forward KL, giving p - q) and
u = (1 - beta) log(p/m), m = (1 - beta) p + beta q (generalised Jensen-Shannon, arXiv 2306.13649).
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

# A finite stand-in for -inf: exp() of it is 0 and 0 * MASKED_LOGIT is 0, where 0 * -inf is NaN.
MASKED_LOGIT = -1e30


class TokenStats(NamedTuple):
    """What is known of every token after the loss, in nats; 0 where the token is not counted."""

    kl: jax.Array  # [N] exact KL(student || teacher), before any cap, whatever the objective
    student_entropy: jax.Array  # [N]
    teacher_entropy: jax.Array  # [N]
    student_logprob: jax.Array  # [N] of the target
    teacher_logprob: jax.Array  # [N] of the target
    top1_agree: jax.Array  # [N] 1 where both prefer the same token
    student_top1_prob: jax.Array  # [N] probability of the student's preferred token
    clipped: jax.Array  # [N] 1 where a cap or a clip changed the gradient


class TargetStats(NamedTuple):
    """What is known of every target after the cross-entropy; 0 where the token is not counted."""

    logprob: jax.Array  # [N] nats
    is_top1: jax.Array  # [N] 1 where the target is the preferred token


@dataclasses.dataclass(frozen=True)
class Shard:
    """The part of the vocabulary that logits [N, V] are of; equal parts, in the order of `axes`."""

    axes: tuple[str, ...] = ()  # mesh axes that split the vocabulary; (): all of it is here

    def sum(self, values: jax.Array) -> jax.Array:
        """[N, V] to [N, 1], over the whole vocabulary."""
        return self._total(jnp.sum(values, axis=-1, keepdims=True))

    def max(self, values: jax.Array) -> jax.Array:
        """[N, V] to [N, 1], over the whole vocabulary."""
        top = jnp.max(values, axis=-1, keepdims=True)
        return jax.lax.pmax(top, self.axes) if self.axes else top

    def pick(self, values: jax.Array, targets: jax.Array) -> jax.Array:
        """The value [N] at each target, wherever it is."""
        if not self.axes:
            return jnp.take_along_axis(values, targets[:, None], axis=-1)[:, 0]
        index = self._local(values, targets)
        found = jnp.take_along_axis(values, jnp.maximum(index, 0)[:, None], axis=-1)[:, 0]
        return self._total(jnp.where(index >= 0, found, 0.0))

    def one_hot(self, values: jax.Array, targets: jax.Array) -> jax.Array:
        """[N, V] as `values` is: 1 at the target, all 0 where another part has it."""
        return jax.nn.one_hot(self._local(values, targets), values.shape[-1], dtype=jnp.float32)

    def _total(self, values: jax.Array) -> jax.Array:
        return jax.lax.psum(values, self.axes) if self.axes else values

    def _local(self, values: jax.Array, targets: jax.Array) -> jax.Array:
        """Targets as columns of this part, -1 where another part has them."""
        if not self.axes:
            return targets
        width = values.shape[-1]
        index = targets - jax.lax.axis_index(self.axes) * width
        return jnp.where((index >= 0) & (index < width), index, -1)


WHOLE = Shard()


class Distribution(NamedTuple):
    """A softmax over V kept as logits and normaliser."""

    logits: jax.Array  # [N, V]
    top: jax.Array  # [N, 1] the largest logit
    log_norm: jax.Array  # [N, 1] log sum exp(logits - top)
    shard: Shard

    @property
    def logprobs(self) -> jax.Array:
        # Subtracting the top first keeps what float32 can hold of a gap between logits of 1e4.
        return (self.logits - self.top) - self.log_norm

    @property
    def probs(self) -> jax.Array:
        return jnp.exp(self.logprobs)


def distribution(
    logits: jax.Array, vocab_mask: jax.Array | None, shard: Shard = WHOLE
) -> Distribution:
    """The softmax of logits [N, V], tokens outside vocab_mask [V] having probability 0."""
    if vocab_mask is not None:
        logits = jnp.where(vocab_mask, logits, MASKED_LOGIT)
    top = shard.max(logits)
    return Distribution(logits, top, jnp.log(shard.sum(jnp.exp(logits - top))), shard)


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


def cross_entropy_tokens(
    logits: jax.Array, targets: jax.Array, shard: Shard = WHOLE
) -> tuple[jax.Array, TargetStats, jax.Array]:
    """(-log p(target) [N], its statistics, gradient in the logits [N, V])."""
    p = distribution(logits, None, shard)
    target_logit = shard.pick(p.logits, targets)
    logprob = (target_logit - p.top[:, 0]) - p.log_norm[:, 0]
    is_top1 = (target_logit >= p.top[:, 0]).astype(jnp.float32)
    return -logprob, TargetStats(logprob, is_top1), p.probs - shard.one_hot(logits, targets)


def measure(p: Distribution, q: Distribution, targets: jax.Array) -> TokenStats:
    """Statistics of one chunk, `clipped` 0 throughout."""
    p_probs, q_probs = p.probs, q.probs
    both_top = (p.logits == p.top) & (q.logits == q.top)
    return TokenStats(
        kl=p.shard.sum(kl_terms(p_probs, q_probs, log_ratio(p, q)))[:, 0],
        student_entropy=(p.log_norm - p.shard.sum(p_probs * (p.logits - p.top)))[:, 0],
        teacher_entropy=(q.log_norm - q.shard.sum(q_probs * (q.logits - q.top)))[:, 0],
        student_logprob=_target_logprob(p, targets),
        teacher_logprob=_target_logprob(q, targets),
        top1_agree=p.shard.max(both_top.astype(jnp.float32))[:, 0],
        student_top1_prob=jnp.exp(-p.log_norm)[:, 0],
        clipped=jnp.zeros_like(p.top[:, 0]),
    )


def reverse_kl_tokens(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
    """(KL(p || q) [N], gradient in p's logits [N, V])."""
    probs, ratio = p.probs, log_ratio(p, q)
    value = p.shard.sum(kl_terms(probs, q.probs, ratio))
    return value[:, 0], _centred(p, probs * (ratio - value))


def forward_kl_tokens(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
    """(KL(q || p) [N], gradient in p's logits [N, V])."""
    p_probs, q_probs = p.probs, q.probs
    value = p.shard.sum(kl_terms(q_probs, p_probs, -log_ratio(p, q)))
    return value[:, 0], _centred(p, p_probs - q_probs)


def jsd_tokens(p: Distribution, q: Distribution, beta: float) -> tuple[jax.Array, jax.Array]:
    """((1 - beta) KL(p || m) + beta KL(q || m) [N], gradient in p's logits [N, V]).

    beta in (0, 1) is the teacher's share of m = (1 - beta) p + beta q.
    """
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
    gradient = (1.0 - beta) * p_probs * (p_ratio - p.shard.sum(p_probs * p_ratio))
    return p.shard.sum(terms)[:, 0], gradient


def logprob_gradient(p: Distribution, targets: jax.Array) -> jax.Array:
    """Gradient of log p(target) in the logits, [N, V]."""
    return p.shard.one_hot(p.logits, targets) - p.probs


def _centred(p: Distribution, gradient: jax.Array) -> jax.Array:
    """A gradient in p's logits [N, V] less its sum, which rounding alone keeps from being 0.

    The rounding of both log_norms is one number all over a row, and goes out with the sum. Left in,
    it was ten times all the rest: 2.6e-6 of a gradient whose ratios are a quarter of a nat.
    """
    return gradient - p.probs * p.shard.sum(gradient)


def _target_logprob(p: Distribution, targets: jax.Array) -> jax.Array:
    return (p.shard.pick(p.logits, targets) - p.top[:, 0]) - p.log_norm[:, 0]
