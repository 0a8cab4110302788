"""Losses of both stages, fused with the output head (`fused_head.py`): no [N, V] is ever held.

Axes: B batch, S sequence, R response tokens, N tokens of all rows together, C tokens of a chunk,
V vocabulary, D model width (`Dt` the teacher's).

`mesh` is where the arrays lie, None on one device: rows split over axes.BATCH, heads over the
vocabulary and axes.MODEL; `token_chunk` counts the tokens of all devices that share a head.

Gradients are formed with the losses. Hence `weights` must hold every factor that differs from
token to token; only one that is common to all, a normaliser, may also be applied to the result.
"""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from mgsd_jax.training import divergences
from mgsd_jax.training.divergences import Distribution, Shard, TargetStats, TokenStats
from mgsd_jax.training.fused_head import ChunkLoss, FusedLoss, fused_loss, head_logits


@dataclasses.dataclass(frozen=True)
class DistillLossConfig:
    """Which divergence of student p and teacher q is minimised, and how it is computed."""

    objective: Literal["reverse_kl", "forward_kl", "jsd"] = "reverse_kl"
    jsd_teacher_weight: float | None = None  # in (0, 1): the teacher's share of the mixture
    forward_kl_mix: float = 0.0  # in [0, 1): (1 - mix) reverse + mix forward
    loss_temperature: float = 1.0  # divides both logits; no factor of its square
    token_chunk: int = 1024  # tokens whose logits are held at once
    token_kl_cap: float | None = None  # nats; above it a token's gradient is scaled by cap / loss
    train_head: bool = True  # False: the student's head gets no gradient

    def __post_init__(self) -> None:
        if self.objective not in ("reverse_kl", "forward_kl", "jsd"):
            raise ValueError(f"objective: got {self.objective!r}, want reverse_kl|forward_kl|jsd")
        weight = self.jsd_teacher_weight
        if self.objective == "jsd" and (weight is None or not 0.0 < weight < 1.0):
            # The ends are no KL: the divergence vanishes there (so did TRL's and EasyDeL's betas).
            raise ValueError(f"jsd_teacher_weight: got {weight}, want inside (0, 1), ends excluded")
        if self.objective != "jsd" and weight is not None:
            raise ValueError(f"jsd_teacher_weight: got {weight}, want None for {self.objective}")
        if not 0.0 <= self.forward_kl_mix < 1.0:
            raise ValueError(f"forward_kl_mix: got {self.forward_kl_mix}, want inside [0, 1)")
        if self.forward_kl_mix > 0.0 and self.objective != "reverse_kl":
            raise ValueError(f"forward_kl_mix: got objective {self.objective}, want reverse_kl")
        if self.loss_temperature <= 0.0:
            raise ValueError(f"loss_temperature: got {self.loss_temperature}, want > 0")
        if self.token_chunk < 1:
            raise ValueError(f"token_chunk: got {self.token_chunk}, want >= 1")
        if self.token_kl_cap is not None and self.token_kl_cap <= 0.0:
            raise ValueError(f"token_kl_cap: got {self.token_kl_cap}, want None or > 0")


@dataclasses.dataclass(frozen=True)
class PolicyClip:
    """PPO's clip with a dual bound; defaults as upstream (`workers/actor/config.py`)."""

    low: float = 0.2
    high: float = 0.3
    dual: float = 3.0

    def __post_init__(self) -> None:
        if not (0.0 <= self.low < 1.0 and self.high >= 0.0 and self.dual > 1.0):
            raise ValueError(f"clip: got {self}, want 0 <= low < 1, high >= 0, dual > 1")


def token_cross_entropy(
    hidden: jax.Array,
    head: jax.Array,
    targets: jax.Array,
    weights: jax.Array,
    *,
    token_chunk: int,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, TargetStats]:
    """sum_t w_t * -log p(target_t) as a float32 scalar, and statistics [N] of every target.

    hidden [N, D], head [V, D], targets [N] int32, weights [N] float32. Gradients go to hidden and
    head only; the head's is skipped where it is not asked for. Rows of weight 0 are not read:
    their hidden may be NaN and their target anything. Raises ValueError where shapes disagree.
    """
    _check_rows(hidden.shape[0], targets=targets, weights=weights)
    _check_head("head", hidden, head)
    if token_chunk < 1:
        raise ValueError(f"token_chunk: got {token_chunk}, want >= 1")
    spec = FusedLoss(_cross_entropy_chunk, None, token_chunk, mesh=mesh)
    return fused_loss(spec, hidden, head, weights, weights != 0, targets, None)


def reverse_kl(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    weights: jax.Array,
    *,
    config: DistillLossConfig,
    targets: jax.Array,
    vocab_mask: jax.Array | None = None,
    valid: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, TokenStats]:
    """sum_t w_t L_t over the whole vocabulary (float32 scalar), and statistics [N] of every token.

    L_t is KL(student || teacher) or what `config.objective` names. student_hidden [N, D],
    student_head [V, D], teacher_hidden [N, Dt], teacher_head [V, Dt], weights [N] float32 with the
    global normaliser inside, targets [N] int32 (the sampled tokens, for statistics alone),
    vocab_mask [V] True where a token may be chosen at all (applied to both distributions), valid
    [N] True where statistics are wanted although the weight is 0 (default: weights != 0; other
    rows are not read, so they may be NaN, and report 0). Gradients go to the student only. Raises
    ValueError where shapes disagree, the two vocabularies' sizes above all.
    """
    return _distill(
        _divergence_chunk,
        config,
        config,
        (student_hidden, student_head, teacher_hidden, teacher_head, weights),
        {"targets": targets},
        vocab_mask,
        valid,
        mesh,
    )


def sampled_reverse_kl(
    student_hidden: jax.Array,
    student_head: jax.Array,
    teacher_hidden: jax.Array,
    teacher_head: jax.Array,
    weights: jax.Array,
    *,
    config: DistillLossConfig,
    targets: jax.Array,
    vocab_mask: jax.Array | None = None,
    valid: jax.Array | None = None,
    clip: PolicyClip | None = None,
    advantage_clip: float | None = None,
    old_logprobs: jax.Array | None = None,
    mesh: Mesh | None = None,
) -> tuple[jax.Array, TokenStats]:
    """Reverse KL of the sampled token alone, as a policy gradient: upstream's objective.

    With A = log q(y) - log p(y), not differentiated, the loss is -A * p(y)/p_old(y): its gradient
    at p = p_old is that of `reverse_kl` in expectation over y ~ p. advantage_clip bounds |A| in
    nats; clip bounds the ratio, and acts only where old_logprobs [N] (of the weights that sampled;
    default: the current ones) differ from the current. Source: upstream `core_algos.py`
    compute_policy_loss, `ray_trainer.py` advantage. Everything else is as in `reverse_kl`.
    """
    if config.objective != "reverse_kl" or config.forward_kl_mix or config.token_kl_cap is not None:
        raise ValueError(f"config: got {config}, want objective reverse_kl without mix or cap")
    if advantage_clip is not None and advantage_clip <= 0.0:
        raise ValueError(f"advantage_clip: got {advantage_clip}, want None or > 0")
    rows = {"targets": targets}
    if old_logprobs is not None:
        rows["old_logprobs"] = jax.lax.stop_gradient(old_logprobs)
    return _distill(
        _sampled_chunk,
        (config, clip, advantage_clip),
        config,
        (student_hidden, student_head, teacher_hidden, teacher_head, weights),
        rows,
        vocab_mask,
        valid,
        mesh,
    )


# ------------------------------------------------------------------------------- one chunk's loss


def _cross_entropy_chunk(
    _: None, shard: Shard, logits: jax.Array, targets: jax.Array, __: None
) -> tuple[jax.Array, TargetStats, jax.Array]:
    return divergences.cross_entropy_tokens(logits, targets, shard)


def _divergence_chunk(
    config: DistillLossConfig,
    shard: Shard,
    logits: jax.Array,
    rows: dict[str, jax.Array],
    shared: Any,
) -> tuple[jax.Array, TokenStats, jax.Array]:
    p, q = _distributions(config, shard, logits, rows, shared)
    stats = divergences.measure(p, q, rows["targets"])
    if config.objective == "jsd":
        assert config.jsd_teacher_weight is not None
        loss, gradient = divergences.jsd_tokens(p, q, config.jsd_teacher_weight)
    elif config.objective == "forward_kl":
        loss, gradient = divergences.forward_kl_tokens(p, q)
    else:
        loss, gradient = divergences.reverse_kl_tokens(p, q)
    if config.forward_kl_mix > 0.0:
        forward, forward_gradient = divergences.forward_kl_tokens(p, q)
        mix = config.forward_kl_mix
        loss = (1.0 - mix) * loss + mix * forward
        gradient = (1.0 - mix) * gradient + mix * forward_gradient
    if config.token_kl_cap is not None:
        over = loss > config.token_kl_cap
        scale = jnp.where(over, config.token_kl_cap / jnp.where(over, loss, 1.0), 1.0)
        loss, gradient = loss * scale, gradient * scale[:, None]
        stats = stats._replace(clipped=over.astype(jnp.float32))
    return loss, stats, gradient / config.loss_temperature


def _sampled_chunk(
    settings: tuple[DistillLossConfig, PolicyClip | None, float | None],
    shard: Shard,
    logits: jax.Array,
    rows: dict[str, jax.Array],
    shared: Any,
) -> tuple[jax.Array, TokenStats, jax.Array]:
    config, clip, advantage_clip = settings
    p, q = _distributions(config, shard, logits, rows, shared)
    stats = divergences.measure(p, q, rows["targets"])
    advantage = stats.teacher_logprob - stats.student_logprob
    clipped = jnp.zeros_like(advantage, dtype=bool)
    if advantage_clip is not None:
        clipped = jnp.abs(advantage) > advantage_clip
        advantage = jnp.clip(advantage, -advantage_clip, advantage_clip)
    ratio = jnp.ones_like(advantage)
    if "old_logprobs" in rows:
        ratio = jnp.exp(stats.student_logprob - rows["old_logprobs"])
    loss, slope = -advantage * ratio, -advantage * ratio  # slope: d loss / d log p(y)
    if clip is not None:
        bounded = -advantage * jnp.clip(ratio, 1.0 - clip.low, 1.0 + clip.high)
        stopped = bounded > loss
        loss = jnp.maximum(loss, bounded)
        ceiling = -advantage * clip.dual
        over = (advantage < 0.0) & (ceiling < loss)
        loss = jnp.where(over, ceiling, loss)
        slope = jnp.where(stopped | over, 0.0, slope)
        clipped = clipped | stopped | over
    gradient = slope[:, None] * divergences.logprob_gradient(p, rows["targets"])
    stats = stats._replace(clipped=clipped.astype(jnp.float32))
    return loss, stats, gradient / config.loss_temperature


def _distributions(
    config: DistillLossConfig,
    shard: Shard,
    logits: jax.Array,
    rows: dict[str, jax.Array],
    shared: Any,
) -> tuple[Distribution, Distribution]:
    teacher_head, vocab_mask = shared
    teacher_logits = head_logits(rows["teacher_hidden"], teacher_head)
    scale = 1.0 / config.loss_temperature
    p = divergences.distribution(logits * scale, vocab_mask, shard)
    return p, divergences.distribution(teacher_logits * scale, vocab_mask, shard)


# ------------------------------------------------------------------------------------- boundaries


def _distill(
    chunk_loss: ChunkLoss,
    settings: Any,
    config: DistillLossConfig,
    arrays: tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array],
    rows: dict[str, jax.Array],
    vocab_mask: jax.Array | None,
    valid: jax.Array | None,
    mesh: Mesh | None,
) -> tuple[jax.Array, TokenStats]:
    hidden, head, teacher_hidden, teacher_head, weights = arrays
    _check_rows(hidden.shape[0], teacher_hidden=teacher_hidden, weights=weights, **rows)
    _check_head("student_head", hidden, head)
    _check_head("teacher_head", teacher_hidden, teacher_head)
    if head.shape[0] != teacher_head.shape[0]:
        raise ValueError(
            f"vocabulary: got {head.shape[0]} student and {teacher_head.shape[0]} teacher tokens, "
            "want the same tokens in both heads"
        )
    if vocab_mask is not None and vocab_mask.shape != head.shape[:1]:
        raise ValueError(f"vocab_mask: got shape {vocab_mask.shape}, want {head.shape[:1]}")
    counted = weights != 0
    if valid is not None:
        _check_rows(hidden.shape[0], valid=valid)
        counted = counted | valid
    rows = {**rows, "teacher_hidden": jax.lax.stop_gradient(teacher_hidden)}
    teacher = jax.lax.stop_gradient(teacher_head).astype(teacher_hidden.dtype)
    spec = FusedLoss(chunk_loss, settings, config.token_chunk, config.train_head, mesh)
    return fused_loss(spec, hidden, head, weights, counted, rows, (teacher, vocab_mask))


def _check_rows(count: int, **rows: jax.Array) -> None:
    for name, values in rows.items():
        if values.shape[0] != count or count == 0:
            raise ValueError(f"{name}: got shape {values.shape}, want {count} >= 1 tokens first")


def _check_head(name: str, hidden: jax.Array, head: jax.Array) -> None:
    if hidden.ndim != 2 or head.ndim != 2 or hidden.shape[1] != head.shape[1]:
        raise ValueError(
            f"{name}: got hidden {hidden.shape} and head {head.shape}, want [N, D] and [V, D]"
        )
