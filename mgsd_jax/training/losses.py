"""Losses of both stages, fused with the output head (`fused_head.py`): no [N, V] is ever held.

Axes: B batch, S sequence, R response tokens, N tokens of all rows together, C tokens of a chunk,
V vocabulary, D model width (`Dt` the teacher's).

`mesh` is where the arrays lie, None on one device: rows split over axes.BATCH, heads over the
vocabulary and axes.MODEL; `token_chunk` counts the tokens of all devices that share a head.

Gradients are formed with the losses. Hence `weights` must hold every factor that differs from
token to token; only one that is common to all, a normaliser, may also be applied to the result.
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mgsd_jax.config import DistillationConfig
from mgsd_jax.training import divergences
from mgsd_jax.training.divergences import Divergence, Shard, TargetStats, TokenStats
from mgsd_jax.training.fused_head import fused_loss, head_logits


def token_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    token_chunk: int,
    vocab_mask: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, TargetStats]:
    """sum_t w_t * -log p(target_t) as a float32 scalar, and statistics [N] of every target.

    hidden [N, D], head [V, D], targets [N] int32, weights [N] float32 of either sign, vocab_mask
    [V] True where a token may be chosen at all (None: everywhere). Gradients go to hidden and
    head only; the head's is skipped where it is not asked for. Rows of weight 0 are not read:
    their hidden may be NaN and their target anything. Raises ValueError where shapes disagree.
    """
    _check_rows(hidden.shape[0], targets=targets, weights=weights)
    _check_head("head", hidden, head)
    counted = weights != 0
    return fused_loss(
        *(_cross_entropy_chunk, token_chunk, mesh),
        *(hidden, head, weights, counted, targets, vocab_mask),
    )


def token_kl(
    p_hidden: jax.Array,
    q_hidden: jax.Array,
    head: jax.Array,
    counted: jax.Array,
    *,
    token_chunk: int,
    vocab_mask: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> jax.Array:
    """KL(p || q) [N] in nats of two readings by one model, 0 where not counted; no gradient.

    p_hidden and q_hidden [N, D], head [V, D], counted [N] bool, vocab_mask as in `distill`.
    """
    _check_rows(p_hidden.shape[0], q_hidden=q_hidden, counted=counted)
    p_hidden, q_hidden, head = jax.lax.stop_gradient((p_hidden, q_hidden, head))
    head = head.astype(p_hidden.dtype)
    weights = jnp.zeros(counted.shape, jnp.float32)
    shared = (head, vocab_mask)
    found = fused_loss(
        *(_kl_chunk, token_chunk, mesh, p_hidden, head, weights, counted, q_hidden, shared)
    )
    return cast(tuple[jax.Array, jax.Array], found)[1]


def distill(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    weights: jax.Array,
    *,
    settings: DistillationConfig,
    targets: jax.Array,
    vocab_mask: jax.Array | None = None,
    valid: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, TokenStats]:
    """sum_t w_t L_t over the whole vocabulary (float32 scalar), and statistics [N] of every token.

    L_t is the divergence that `settings.objective` names. student_hidden [N, D], student_head
    [V, D], teacher_hidden [N, Dt], teacher_head [V, Dt], weights [N] float32 with the global
    normaliser inside, targets [N] int32 (the sampled tokens), vocab_mask [V] True where a token
    may be chosen at all (applied to both distributions), valid [N] True where statistics are
    wanted although the weight is 0 (default: weights != 0; other rows are not read, so they may be
    NaN, and report 0). Gradients go to the student only. Raises ValueError where shapes disagree,
    the two vocabularies' sizes above all, and as `divergences.named` does.
    """
    count, vocabulary = student_hidden.shape[0], student_head.shape[0]
    _check_rows(count, teacher_hidden=teacher_hidden, weights=weights, targets=targets)
    _check_head("student_head", student_hidden, student_head)
    _check_head("teacher_head", teacher_hidden, teacher_head)
    if vocabulary != teacher_head.shape[0]:
        raise ValueError(
            f"vocabulary: got {vocabulary} student and {teacher_head.shape[0]} teacher tokens, "
            "want the same tokens in both heads"
        )
    if vocab_mask is not None and vocab_mask.shape != (vocabulary,):
        raise ValueError(f"vocab_mask: got shape {vocab_mask.shape}, want ({vocabulary},)")
    counted = weights != 0
    if valid is not None:
        _check_rows(count, valid=valid)
        counted = counted | valid
    chunk_loss = partial(_divergence_chunk, divergences.named(settings), settings.token_kl_cap)
    # The teacher is data here, not a function's input: no gradient is to be looked for.
    rows = (jax.lax.stop_gradient(teacher_hidden), targets)
    teacher_head = jax.lax.stop_gradient(teacher_head).astype(teacher_hidden.dtype)
    return fused_loss(
        chunk_loss,
        settings.token_chunk,
        mesh,
        student_hidden,
        student_head,
        weights,
        counted,
        rows,
        (teacher_head, vocab_mask),
    )


def _cross_entropy_chunk(
    shard: Shard, logits: jax.Array, targets: jax.Array, vocab_mask: jax.Array | None
) -> tuple[jax.Array, TargetStats, jax.Array]:
    p = divergences.distribution(logits, targets, vocab_mask, shard)
    return divergences.cross_entropy(p)


def _kl_chunk(
    shard: Shard,
    logits: jax.Array,
    q_hidden: jax.Array,
    shared: tuple[jax.Array, jax.Array | None],
) -> tuple[jax.Array, jax.Array, jax.Array]:
    head, vocab_mask = shared
    targets = jnp.zeros(logits.shape[0], jnp.int32)  # of no meaning here
    p, q = (
        divergences.distribution(one, targets, vocab_mask, shard)
        for one in (logits, head_logits(q_hidden, head))
    )
    ratio = divergences.log_ratio(p, q)
    kl = shard.sum(divergences.kl_terms(p.probs, q.probs, ratio))[:, 0]
    return kl, kl, jnp.zeros_like(logits)


def _divergence_chunk(
    divergence: Divergence,
    cap: float,
    shard: Shard,
    logits: jax.Array,
    rows: tuple[jax.Array, jax.Array],
    shared: tuple[jax.Array, jax.Array | None],
) -> tuple[jax.Array, TokenStats, jax.Array]:
    (teacher_hidden, targets), (teacher_head, vocab_mask) = rows, shared
    teacher_logits = head_logits(teacher_hidden, teacher_head)
    p = divergences.distribution(logits, targets, vocab_mask, shard)
    q = divergences.distribution(teacher_logits, targets, vocab_mask, shard)
    loss, gradient, clipped = divergences.value_and_gradient(divergence, p, q, cap)
    return loss, divergences.measure(p, q, clipped), gradient


def _check_rows(count: int, **rows: jax.Array) -> None:
    for name, values in rows.items():
        if values.shape[0] != count or count == 0:
            raise ValueError(f"{name}: got shape {values.shape}, want {count} >= 1 tokens first")


def _check_head(name: str, hidden: jax.Array, head: jax.Array) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{name}: got hidden {hidden.shape} and head {head.shape}, want [N, D] and [V, D]"
        )
