"""Per-token losses over the whole vocabulary, with their gradient in the logits.

Axes: N tokens, V vocabulary. Everything here is float32 and sees one chunk of tokens at a time;
`losses.py` does the matmuls, the chunking and the weighting. Sums and maxima over V go through
`_sum` and `_max` alone, so that a vocabulary sharded over devices needs a change there only.

Notation: p student, q teacher, d = log p - log q. For every divergence used here
dL/dlogits = p * (u - E_p[u]), with u = d (reverse KL), u = -q/p (forward KL, giving p - q) and
u = (1 - beta) log(p/m), m = (1 - beta) p + beta q (generalised Jensen-Shannon, arXiv 2306.13649).
"""

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


class Distribution(NamedTuple):
    """A softmax over V kept as logits and normaliser."""

    logits: jax.Array  # [N, V]
    top: jax.Array  # [N, 1] the largest logit
    log_norm: jax.Array  # [N, 1] log sum exp(logits - top)

    @property
    def logprobs(self) -> jax.Array:
        # Subtracting the top first keeps what float32 can hold of a gap between logits of 1e4.
        return (self.logits - self.top) - self.log_norm

    @property
    def probs(self) -> jax.Array:
        return jnp.exp(self.logprobs)


def distribution(logits: jax.Array, vocab_mask: jax.Array | None) -> Distribution:
    """The softmax of logits [N, V], tokens outside vocab_mask [V] having probability 0."""
    if vocab_mask is not None:
        logits = jnp.where(vocab_mask, logits, MASKED_LOGIT)
    top = _max(logits)
    return Distribution(logits, top, jnp.log(_sum(jnp.exp(logits - top))))


def log_ratio(p: Distribution, q: Distribution) -> jax.Array:
    """d = log p - log q, [N, V]. Near-equal logits subtract without rounding, so it is exact."""
    return (p.logits - q.logits) - ((p.top - q.top) + (p.log_norm - q.log_norm))


def kl_terms(probs: jax.Array, other: jax.Array, ratio: jax.Array) -> jax.Array:
    """Terms that sum to KL(probs || other) over V, each of them >= 0, [N, V].

    They are probs * (ratio + expm1(-ratio)): the added terms sum to 0, and what is left does not
    cancel. A KL of 1e-6 is right to 1e-3 where sum(probs * ratio) has the wrong sign. The series
    serves small ratios; elsewhere the plain form, which cannot overflow where expm1 does.
    """
    small = jnp.abs(ratio) < 0.125
    x = jnp.where(small, ratio, 0.0)
    series = x * x * (1 / 2 - x * (1 / 6 - x * (1 / 24 - x * (1 / 120 - x / 720))))
    return jnp.where(small, probs * series, (probs * ratio - probs) + other)


def cross_entropy_tokens(
    logits: jax.Array, targets: jax.Array
) -> tuple[jax.Array, TargetStats, jax.Array]:
    """(-log p(target) [N], its statistics, gradient in the logits [N, V])."""
    p = distribution(logits, None)
    target_logit = _pick(p.logits, targets)
    logprob = (target_logit - p.top[:, 0]) - p.log_norm[:, 0]
    is_top1 = (target_logit >= p.top[:, 0]).astype(jnp.float32)
    return -logprob, TargetStats(logprob, is_top1), p.probs - _one_hot(targets, logits.shape[-1])


def measure(p: Distribution, q: Distribution, targets: jax.Array) -> TokenStats:
    """Statistics of one chunk, `clipped` 0 throughout."""
    p_probs, q_probs = p.probs, q.probs
    both_top = (p.logits == p.top) & (q.logits == q.top)
    return TokenStats(
        kl=_sum(kl_terms(p_probs, q_probs, log_ratio(p, q)))[:, 0],
        student_entropy=(p.log_norm - _sum(p_probs * (p.logits - p.top)))[:, 0],
        teacher_entropy=(q.log_norm - _sum(q_probs * (q.logits - q.top)))[:, 0],
        student_logprob=_target_logprob(p, targets),
        teacher_logprob=_target_logprob(q, targets),
        top1_agree=_max(both_top.astype(jnp.float32))[:, 0],
        student_top1_prob=jnp.exp(-p.log_norm)[:, 0],
        clipped=jnp.zeros_like(p.top[:, 0]),
    )


def reverse_kl_tokens(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
    """(KL(p || q) [N], gradient in p's logits [N, V])."""
    probs, ratio = p.probs, log_ratio(p, q)
    value = _sum(kl_terms(probs, q.probs, ratio))
    # The gradient takes the mean of the ratio itself, not the value: its terms then sum to 0.
    return value[:, 0], probs * (ratio - _sum(probs * ratio))


def forward_kl_tokens(p: Distribution, q: Distribution) -> tuple[jax.Array, jax.Array]:
    """(KL(q || p) [N], gradient in p's logits [N, V])."""
    p_probs, q_probs = p.probs, q.probs
    return _sum(kl_terms(q_probs, p_probs, -log_ratio(p, q)))[:, 0], p_probs - q_probs


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
    gradient = (1.0 - beta) * p_probs * (p_ratio - _sum(p_probs * p_ratio))
    return _sum(terms)[:, 0], gradient


def logprob_gradient(p: Distribution, targets: jax.Array) -> jax.Array:
    """Gradient of log p(target) in the logits, [N, V]."""
    return _one_hot(targets, p.logits.shape[-1]) - p.probs


def _target_logprob(p: Distribution, targets: jax.Array) -> jax.Array:
    return (_pick(p.logits, targets) - p.top[:, 0]) - p.log_norm[:, 0]


def _pick(logits: jax.Array, targets: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits, targets[:, None], axis=-1)[:, 0]


def _one_hot(targets: jax.Array, vocabulary: int) -> jax.Array:
    return jax.nn.one_hot(targets, vocabulary, dtype=jnp.float32)


def _sum(values: jax.Array) -> jax.Array:
    return jnp.sum(values, axis=-1, keepdims=True)


def _max(values: jax.Array) -> jax.Array:
    return jnp.max(values, axis=-1, keepdims=True)
