"""Losses against float64 formulas, and the properties that hold whatever the numbers are."""

import dataclasses
import functools
import os
import platform
import re
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mgsd_jax import config as c
from mgsd_jax.checks import ranges
from mgsd_jax.training import divergences, fused_head, losses

U32, U16 = 2.0**-24, 2.0**-9  # what one operation in float32, or a cast to bfloat16, rounds at most
SAMPLED = "sampled_reverse_kl"


def settings(**options: Any) -> c.DistillationConfig:
    """What a run would set of the loss; chunks of 8 tokens."""
    plain = c.DistillationConfig(c.OptimConfig(lr=0.0), token_chunk=8)
    return dataclasses.replace(plain, **options)


OBJECTIVES = {
    "reverse": settings(),
    "forward": settings(objective="forward_kl"),
    "jsd": settings(objective="jsd", jsd_teacher_weight=0.3),
    "mixed": settings(forward_kl_mix=0.25),
    "capped": settings(token_kl_cap=0.4),
    "sampled": settings(objective=SAMPLED),
}
REVERSE = OBJECTIVES["reverse"]


class Case(NamedTuple):
    """Inputs of a distillation loss."""

    hidden: Any  # [N, D]
    head: Any  # [V, D]
    teacher_hidden: Any  # [N, Dt]
    teacher_head: Any  # [V, Dt]
    weights: Any  # [N]
    targets: Any  # [N]


def make_case(
    tokens: int = 21, width: int = 16, vocabulary: int = 97, top: float = 25.0, seed: int = 0
) -> Case:
    """Logits of largest size `top`, a teacher near the student, every third token left out.

    Every logit is exact in float32, in whatever order a processor adds its products: all inputs are
    multiples of 2^-7, so partial sums are multiples of 2^-14, and below 2^10 those have 24 bits.
    """
    rng = np.random.default_rng(seed)
    hidden, head = rng.normal(size=(tokens, width)), rng.normal(size=(vocabulary, width))
    head *= top / np.abs(hidden @ head.T).max()
    noise = 0.05 * rng.normal(size=hidden.shape)
    hidden, noise, head = (
        np.round(a * grid) / grid for a, grid in ((hidden, 128), (noise, 128), (head, 64))
    )
    assert ((np.abs(hidden) + np.abs(noise)) @ np.abs(head).T).max() < 2**10
    teacher_hidden = np.concatenate([hidden + noise] * 2, axis=1)
    teacher_head = np.concatenate([head / 2, head / 2], axis=1)
    weights = np.where(np.arange(tokens) % 3 == 1, 0.0, rng.uniform(0.5, 1.5, tokens) / tokens)
    targets = rng.integers(0, vocabulary, tokens).astype(np.int32)
    arrays = (hidden, head, teacher_hidden, teacher_head, weights)
    return Case._make((*(jnp.asarray(a, jnp.float32) for a in arrays), jnp.asarray(targets)))


def logits_case(student: Any, teacher: Any, targets: Any = 0, weights: Any = 1.0) -> Case:
    """The case whose logits are these [N, V]: the heads are identities.

    It is filled up to 5 tokens of weight 0 and 32 words of no probability, so that most cases are
    one shape and need compiling once.
    """
    student, teacher = np.atleast_2d(student), np.atleast_2d(teacher)
    tokens, vocabulary = student.shape
    widths = [(0, max(5 - tokens, 0)), (0, max(32 - vocabulary, 0))]

    def fill(values: Any, value: float) -> Any:
        return np.pad(np.broadcast_to(values, tokens), widths[0], constant_values=value)

    logits = [jnp.float32(np.pad(z, widths, constant_values=-2e4)) for z in (student, teacher)]
    head = jnp.eye(logits[0].shape[1])
    return Case(
        logits[0], head, logits[1], head, jnp.float32(fill(weights, 0)), jnp.int32(fill(targets, 0))
    )


@functools.cache
def compiled(config: c.DistillationConfig) -> Any:
    """Value and gradients as one program for each set of settings: compiling is what takes time."""

    def run(case: Case, arrays: dict[str, Any]) -> Any:
        options = {"targets": case.targets} | arrays

        def value(hidden: Any, head: Any) -> Any:
            return losses.distill(hidden, head, *case[2:5], settings=config, **options)

        return jax.value_and_grad(value, argnums=(0, 1), has_aux=True)(case.hidden, case.head)

    return jax.jit(run)


def compute(
    case: Case, config: c.DistillationConfig, **arrays: jax.Array
) -> tuple[Any, Any, Any, Any]:
    """(value, statistics, gradient of hidden, gradient of head)."""
    (value, stats), gradients = compiled(config)(case, arrays)
    return value, stats, *gradients


def float64(values: Any) -> np.ndarray:
    return np.asarray(values, np.float64)


def log_softmax64(logits: np.ndarray) -> np.ndarray:
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def reference(case: Case, config: c.DistillationConfig) -> tuple[float, np.ndarray, np.ndarray]:
    """(value, gradient of hidden, gradient of head) in float64, gradients by the chain rule.

    Every divergence is sum_v f(p_v, q_v); dL/dlogits = p * (f' - E_p[f']) with f' = df/dp.
    """
    hidden, head, teacher_hidden, teacher_head, weights = (
        np.asarray(a.astype(jnp.float32), np.float64) for a in case[:5]
    )
    log_p = log_softmax64(hidden @ head.T)
    log_q = log_softmax64(teacher_hidden @ teacher_head.T)
    p, q = np.exp(log_p), np.exp(log_q)
    if config.objective == SAMPLED:
        taken = np.eye(len(head))[np.asarray(case.targets) % len(head)]
        # Its gradient is d(y) (1_y - p), which a slope of 1_y d(y) / p gives.
        loss = taken * (log_p - log_q)
        with np.errstate(divide="ignore"):
            slope = loss / p
    elif config.objective == "jsd":
        beta = config.jsd_teacher_weight
        log_m = np.logaddexp(np.log1p(-beta) + log_p, np.log(beta) + log_q)
        loss = (1 - beta) * p * (log_p - log_m) + beta * q * (log_q - log_m)
        slope = (1 - beta) * (log_p - log_m)
    else:
        mix = 1.0 if config.objective == "forward_kl" else config.forward_kl_mix
        loss = (1 - mix) * p * (log_p - log_q) + mix * q * (log_q - log_p)
        slope = (1 - mix) * (log_p - log_q) - mix * q / p
    loss = loss.sum(-1)
    cap = config.token_kl_cap
    scale = np.ones_like(loss) if cap == 0 else np.minimum(1.0, cap / np.maximum(loss, 1e-30))
    d_logits = p * (slope - (p * slope).sum(-1, keepdims=True)) * (weights * scale)[:, None]
    return float((weights * scale * loss).sum()), d_logits @ head, d_logits.T @ hidden


def relative(got: Any, want: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(got, np.float64) - want) / np.linalg.norm(want))


def rounding(case: Case) -> float:
    """The relative (Frobenius) error that float32 may leave in a loss and its gradients.

    Logits are exact (`make_case`), and so are their differences. A sum over V words in whatever
    order is off by sqrt(V) roundings: their signs are random (Higham and Mary 2019). Every term of
    it went through z - top - log_norm (log V nats for the words that count: up to 12 roundings of
    what is one nat), exp (2), the difference of two ratios (2), products (4); a KL's plain terms
    hold a probability's rounding ten times (`divergences.kl_terms`). Thirty covers either.
    """
    return (np.sqrt(len(case.head)) + 30) * U32


def assert_matches(case: Case, config: c.DistillationConfig) -> None:
    value, _, d_hidden, d_head = compute(case, config)
    want, bound = reference(case, config), rounding(case)
    assert value == pytest.approx(want[0], rel=bound)
    if case.hidden.dtype == jnp.bfloat16:  # words' slopes are cast before the matmul, its sum after
        bound += 2 * U16
    assert relative(d_hidden, want[1]) < bound
    assert relative(d_head, want[2]) < bound


# ------------------------------------------------------------------------- against float64


@pytest.mark.parametrize("name", OBJECTIVES)
def test_value_and_gradients_match_float64(name: str) -> None:
    assert_matches(make_case(), OBJECTIVES[name])


@pytest.mark.skipif(platform.machine() not in ("x86_64", "AMD64"), reason="instructions of x86")
@pytest.mark.parametrize("isa", ["AVX2", "SSE4_2"])
def test_float64_is_matched_with_fewer_instructions(isa: str) -> None:
    """Another instruction set adds and rounds in another order; the flag is read once a process."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_cpu_max_isa={isa}"
    run = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", "0", __file__]
    done = subprocess.run(
        [*run, "-k", test_value_and_gradients_match_float64.__name__],
        env=os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags},
        cwd=Path(__file__).parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert f"{len(OBJECTIVES)} passed" in done.stdout


@pytest.mark.parametrize("name", ["reverse", "jsd"])
def test_bfloat16_inputs_match_float64_on_the_same_inputs(name: str) -> None:
    case = make_case(tokens=64, width=64, vocabulary=512, top=12.0)
    case = Case._make((*(a.astype(jnp.bfloat16) for a in case[:4]), *case[4:]))
    assert_matches(case, OBJECTIVES[name])


def test_matches_float64_over_the_vocabulary_of_the_real_model() -> None:
    case = make_case(tokens=6, width=32, vocabulary=151_936)
    assert_matches(case, settings(token_chunk=4))


def hellinger(p: Any, q: Any) -> tuple[jax.Array, jax.Array]:
    """Squared Hellinger distance, as anyone may add it: (sqrt p - sqrt q)^2 and its slope."""
    root = jnp.exp(-divergences.log_ratio(p, q) / 2)  # sqrt(q / p)
    return p.probs * (1 - root) ** 2, 1 - root


def test_a_divergence_from_outside_is_one_function(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its value and its gradients are those of float64's automatic differentiation."""
    monkeypatch.setitem(divergences.DIVERGENCES, "hellinger", hellinger)
    case = make_case()
    value, _, *gradients = compute(case, settings(objective="hellinger"))

    with jax.enable_x64(True):

        def loss(hidden: jax.Array, head: jax.Array) -> jax.Array:
            p = jax.nn.softmax(hidden @ head.T)
            q = jax.nn.softmax(arrays[2] @ arrays[3].T)
            return (arrays[4] * ((jnp.sqrt(p) - jnp.sqrt(q)) ** 2).sum(-1)).sum()

        arrays = [jnp.asarray(float64(a)) for a in case[:5]]
        want, want_gradients = jax.value_and_grad(loss, argnums=(0, 1))(*arrays[:2])
    assert value == pytest.approx(float(want), rel=rounding(case))
    for got, exact in zip(gradients, want_gradients, strict=True):
        assert relative(got, np.asarray(exact)) < rounding(case)


def test_logits_are_the_sum_of_their_products_to_float32() -> None:
    """Of inputs that do not add up exactly, each logit is off by a rounding a term at most."""
    rng = np.random.default_rng(0)
    hidden, head = (rng.normal(size=(n, 64)).astype(np.float32) for n in (21, 97))
    got = float64(fused_head.head_logits(jnp.asarray(hidden), jnp.asarray(head)))
    hidden, head = float64(hidden), float64(head)
    assert (np.abs(got - hidden @ head.T) <= 64 * U32 * (np.abs(hidden) @ np.abs(head).T)).all()


def test_a_tiny_divergence_is_positive_and_right() -> None:
    """Summing p * (log p - log q) in float32 gets the sign of a KL of 1e-6 wrong."""
    rng = np.random.default_rng(0)
    student = rng.normal(size=(16, 20_000)).astype(np.float32) * 5
    teacher = student + 1.5e-3 * rng.normal(size=student.shape).astype(np.float32)
    nowhere = jnp.zeros(16, jnp.int32)
    p, q = (divergences.distribution(jnp.asarray(z), nowhere) for z in (student, teacher))
    value = divergences.value_and_gradient(divergences.reverse_kl, p, q)[0]
    log_p, log_q = (log_softmax64(z.astype(np.float64)) for z in (student, teacher))
    want = (np.exp(log_p) * (log_p - log_q)).sum(-1)
    assert want.max() < 2e-6
    assert value.min() >= 0
    np.testing.assert_allclose(value, want, rtol=1e-3)


def test_statistics_match_float64() -> None:
    case = make_case()
    _, stats, _, _ = compute(case, REVERSE)
    log_p = log_softmax64(float64(case.hidden) @ float64(case.head).T)
    log_q = log_softmax64(float64(case.teacher_hidden) @ float64(case.teacher_head).T)
    rows, targets = np.arange(len(log_p)), np.asarray(case.targets)
    want = dict(
        kl=(np.exp(log_p) * (log_p - log_q)).sum(-1),
        student_entropy=-(np.exp(log_p) * log_p).sum(-1),
        teacher_entropy=-(np.exp(log_q) * log_q).sum(-1),
        student_logprob=log_p[rows, targets],
        teacher_logprob=log_q[rows, targets],
        top1_agree=(log_p.argmax(-1) == log_q.argmax(-1)).astype(float),
        student_top1_prob=np.exp(log_p.max(-1)),
        clipped=np.zeros(len(log_p)),
    )
    assert 0 < want["top1_agree"].mean() <= 1
    assert set(want) == set(stats._fields)
    for name, got in stats._asdict().items():
        expected = np.where(case.weights == 0, 0.0, want[name])
        np.testing.assert_allclose(got, expected, rtol=2e-5, atol=2e-5, err_msg=name)


def test_cross_entropy_matches_float64() -> None:
    case = make_case()

    def value(hidden: Any, head: Any) -> Any:
        return losses.token_cross_entropy(hidden, head, case.targets, case.weights, token_chunk=8)

    (loss, stats), (d_hidden, d_head) = jax.value_and_grad(value, (0, 1), has_aux=True)(
        case.hidden, case.head
    )
    hidden, head = float64(case.hidden), float64(case.head)
    log_p = log_softmax64(hidden @ head.T)
    rows, weights = np.arange(len(log_p)), float64(case.weights)
    picked = log_p[rows, case.targets]
    d_logits = np.exp(log_p)
    d_logits[rows, case.targets] -= 1
    d_logits *= weights[:, None]
    assert loss == pytest.approx(-(weights * picked).sum(), rel=rounding(case))
    assert relative(d_hidden, d_logits @ head) < rounding(case)
    assert relative(d_head, d_logits.T @ hidden) < rounding(case)
    counted = weights != 0
    np.testing.assert_allclose(stats.logprob, np.where(counted, picked, 0), rtol=1e-5)
    best = losses.token_cross_entropy(
        case.hidden, case.head, jnp.int32(log_p.argmax(-1)), case.weights, token_chunk=8
    )[1]
    np.testing.assert_array_equal(best.is_top1, counted)
    np.testing.assert_array_equal(stats.is_top1, counted & (log_p.argmax(-1) == case.targets))


# -------------------------------------------------------------------------------- identities


@pytest.mark.parametrize("name", OBJECTIVES)
def test_a_student_equal_to_its_teacher_has_no_loss_and_no_gradient(name: str) -> None:
    case = make_case()
    case = case._replace(teacher_hidden=case.hidden, teacher_head=case.head)
    value, stats, d_hidden, d_head = compute(case, OBJECTIVES[name])
    assert 0 <= value < 1e-6
    # Forward KL's gradient is p - q, each within a rounding error of the other.
    np.testing.assert_allclose(d_hidden, 0, atol=1e-6)
    np.testing.assert_allclose(d_head, 0, atol=1e-6)
    np.testing.assert_array_equal(stats.top1_agree, case.weights != 0)


def test_a_constant_added_to_all_logits_changes_nothing() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 32)).astype(np.float32) * 4
    plain = compute(logits_case(student, teacher), REVERSE)
    shifted = compute(logits_case(student + 16.0, teacher - 8.0), REVERSE)
    np.testing.assert_allclose(plain[0], shifted[0], rtol=1e-5)
    np.testing.assert_allclose(plain[2], shifted[2], atol=1e-5)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_gradients_in_the_logits_sum_to_zero(name: str) -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 32)) * 4
    case = logits_case(student, teacher)
    _, stats, d_logits, _ = compute(case, OBJECTIVES[name])
    # What float32 leaves is the rounding of the mean log-ratio, as large as the divergence.
    unit = np.abs(d_logits).sum(-1) + stats.kl
    assert (np.abs(float64(d_logits).sum(-1)) < rounding(case) * unit).all()


def test_the_sampled_gradient_is_the_exact_one_in_expectation() -> None:
    """Every token of the vocabulary as the sample, weighted with its probability."""
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 32)).astype(np.float32) * 2
    exact = compute(logits_case(student, teacher), REVERSE)
    copies = logits_case(
        np.tile(student, (32, 1)),
        np.tile(teacher, (32, 1)),
        targets=np.arange(32),
        weights=np.exp(log_softmax64(float64(student))),
    )
    sampled = compute(copies, OBJECTIVES["sampled"])
    assert sampled[0] == pytest.approx(float(exact[0]), rel=1e-5)
    np.testing.assert_allclose(sampled[2].sum(0), exact[2][0], atol=1e-6)


def test_the_mean_of_many_samples_points_where_the_exact_gradient_does() -> None:
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 32)).astype(np.float32)
    number = 4096
    probs = np.exp(log_softmax64(float64(student)))
    copies = logits_case(
        np.tile(student, (number, 1)),
        np.tile(teacher, (number, 1)),
        targets=rng.choice(32, number, p=probs / probs.sum()),
        weights=np.full(number, 1 / number),
    )
    mean = compute(copies, settings(objective=SAMPLED, token_chunk=1024))[2].sum(0)
    exact = compute(logits_case(student, teacher), REVERSE)[2][0]
    assert mean @ exact / (jnp.linalg.norm(mean) * jnp.linalg.norm(exact)) > 0.99


# --------------------------------------------------------------------------------- direction


def test_reverse_forward_and_jsd_are_the_right_way_round() -> None:
    """Student (0.9, 0.1), teacher (0.5, 0.5), by hand."""
    case = logits_case(np.log([0.9, 0.1]), np.log([0.5, 0.5]))
    assert compute(case, REVERSE)[0] == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))
    forward = 0.5 * np.log(0.5 / 0.9) + 0.5 * np.log(0.5 / 0.1)
    assert compute(case, OBJECTIVES["forward"])[0] == pytest.approx(forward, rel=1e-6)
    # Teacher weight 0.3: the mixture is 0.7 * student + 0.3 * teacher = (0.78, 0.22).
    student = 0.9 * np.log(0.9 / 0.78) + 0.1 * np.log(0.1 / 0.22)
    teacher = 0.5 * np.log(0.5 / 0.78) + 0.5 * np.log(0.5 / 0.22)
    want = 0.7 * student + 0.3 * teacher
    assert compute(case, OBJECTIVES["jsd"])[0] == pytest.approx(want, rel=1e-5)


def test_reverse_kl_is_torchs_kl_div_of_the_student_from_the_teacher() -> None:
    """TRL's distillation at beta 1 is kl_div(teacher_logprobs, student_logprobs)."""
    torch = pytest.importorskip("torch")
    case = make_case()._replace(weights=jnp.ones(21))
    logprobs = [
        torch.log_softmax(torch.tensor(float64(h) @ float64(w).T), -1)
        for h, w in ((case.hidden, case.head), (case.teacher_hidden, case.teacher_head))
    ]
    want = torch.nn.functional.kl_div(
        logprobs[1], logprobs[0], reduction="sum", log_target=True
    ).item()
    assert compute(case, REVERSE)[0] == pytest.approx(want, rel=rounding(case))


def test_both_objectives_report_the_same_statistics() -> None:
    case = make_case()
    exact, sampled = compute(case, REVERSE), compute(case, OBJECTIVES["sampled"])
    assert_close(exact[1], sampled[1])


# ------------------------------------------------------------------------------- invariances


@pytest.mark.parametrize("name", ["reverse", "sampled"])
@pytest.mark.parametrize("token_chunk", [1, 8])
def test_the_chunk_changes_nothing(name: str, token_chunk: int) -> None:
    case = make_case()
    objective = OBJECTIVES[name].objective
    want = compute(case, settings(objective=objective, token_chunk=21))
    got = compute(case, settings(objective=objective, token_chunk=token_chunk))
    assert_close(got, want)


def test_the_order_of_tokens_changes_nothing() -> None:
    case = make_case()
    order = np.random.default_rng(0).permutation(21)
    shuffled = Case(*(a if i in (1, 3) else a[order] for i, a in enumerate(case)))
    value, stats, d_hidden, d_head = compute(case, REVERSE)
    back = compute(shuffled, REVERSE)
    want = (value, jax.tree.map(lambda x: x[order], stats), d_hidden[order], d_head)
    assert_close(back, want)


def test_padding_changes_nothing() -> None:
    case = make_case()
    padded = pad(case, 37, fill=np.nan)
    value, stats, d_hidden, d_head = compute(padded, REVERSE)
    got = (value, jax.tree.map(lambda x: x[:21], stats), d_hidden[:21], d_head)
    assert_close(got, compute(case, REVERSE))
    np.testing.assert_array_equal(d_hidden[21:], 0)


def test_parts_of_a_batch_add_up_to_the_whole() -> None:
    case = make_case()
    parts = [
        compute(Case(*(a if i in (1, 3) else a[s : s + 7] for i, a in enumerate(case))), REVERSE)
        for s in range(0, 21, 7)
    ]
    value, _, d_hidden, d_head = compute(case, REVERSE)
    np.testing.assert_allclose(sum(p[0] for p in parts), value, rtol=1e-5)
    np.testing.assert_allclose(np.concatenate([p[2] for p in parts]), d_hidden, atol=1e-7)
    np.testing.assert_allclose(sum(p[3] for p in parts), d_head, rtol=1e-5, atol=1e-7)


def test_value_is_the_same_without_differentiation() -> None:
    case = make_case()
    value, stats = losses.distill(*case[:5], settings=REVERSE, targets=case.targets)
    want = compute(case, REVERSE)
    assert value == pytest.approx(float(want[0]), rel=1e-6)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), stats, want[1]
    )


def pad(case: Case, tokens: int, fill: float) -> Case:
    extra = tokens - len(case.weights)

    def widen(a: Any, value: Any) -> Any:
        widths = [(0, extra)] + [(0, 0)] * (a.ndim - 1)
        return jnp.pad(a, widths, constant_values=value)

    return case._replace(
        hidden=widen(case.hidden, fill),
        teacher_hidden=widen(case.teacher_hidden, fill),
        weights=widen(case.weights, 0.0),
        targets=widen(case.targets, -100),
    )


def assert_close(got: Any, want: Any) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), got, want)


# ------------------------------------------------------------------------------------- masks


@pytest.mark.parametrize("name", ["reverse", "sampled"])
def test_an_all_masked_batch_has_no_loss_and_zero_gradients(name: str) -> None:
    case = make_case()._replace(weights=jnp.zeros(21))
    for part in jax.tree.leaves(compute(case, OBJECTIVES[name])):
        np.testing.assert_array_equal(part, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_masked_row_may_hold_anything(bad: float) -> None:
    case = make_case()
    masked = (case.weights == 0)[:, None]
    spoiled = case._replace(
        hidden=jnp.where(masked, bad, case.hidden),
        teacher_hidden=jnp.where(masked, bad, case.teacher_hidden),
        targets=jnp.where(masked[:, 0], -100, case.targets),
    )
    got, want = compute(spoiled, REVERSE), compute(case, REVERSE)
    jax.tree.map(np.testing.assert_array_equal, got, want)
    np.testing.assert_array_equal(got[2][masked[:, 0]], 0)
    value, stats = losses.token_cross_entropy(
        spoiled.hidden, case.head, spoiled.targets, case.weights, token_chunk=8
    )
    assert np.isfinite(value) and np.isfinite(stats.logprob).all()


def test_valid_rows_of_weight_zero_are_measured_but_not_trained() -> None:
    case = make_case()
    everywhere = compute(case._replace(weights=jnp.ones(21)), REVERSE)[1]
    value, stats, d_hidden, d_head = compute(case, REVERSE, valid=jnp.ones(21, bool))
    assert_close(stats, everywhere)
    want = compute(case, REVERSE)
    assert_close((value, d_hidden, d_head), (want[0], want[2], want[3]))
    bad = case._replace(hidden=case.hidden.at[1].set(jnp.nan))
    assert case.weights[1] == 0
    value, _, d_hidden, d_head = compute(bad, REVERSE, valid=jnp.ones(21, bool))
    assert_close((value, d_hidden, d_head), (want[0], want[2], want[3]))


@pytest.mark.parametrize("name", ["reverse", "sampled"])
def test_a_vocab_mask_is_a_smaller_vocabulary(name: str) -> None:
    case = make_case()
    allowed = np.arange(97) % 5 != 0
    smaller = case._replace(head=case.head[allowed], teacher_head=case.teacher_head[allowed])
    places = np.cumsum(allowed) - 1
    targets = jnp.where(allowed[case.targets], case.targets, 1)
    smaller = smaller._replace(targets=jnp.int32(places[targets]))
    value, stats, d_hidden, d_head = compute(
        case._replace(targets=targets), OBJECTIVES[name], vocab_mask=jnp.asarray(allowed)
    )
    want = compute(smaller, OBJECTIVES[name])
    assert_close((value, stats, d_hidden, d_head[allowed]), want)
    np.testing.assert_array_equal(d_head[~allowed], 0)


# ---------------------------------------------------------------------------------- extremes


@pytest.mark.parametrize("name", OBJECTIVES)
def test_extreme_logits_stay_exact(name: str) -> None:
    student = [
        [1e4, -1e4, 0.0],
        [200.0, 0.0, 0.0],  # one-hot p
        [0.0, 0.0, 0.0],
        [0.0, 0.0, -150.0],  # log p - log q = -150: expm1(150) would overflow
        [300.0, 0.0, -300.0],
    ]
    teacher = [
        [-1e4, 1e4, 0.0],
        [0.0, 0.0, 0.0],
        [0.0, 0.0, -150.0],  # q underflows where p does not
        [0.0, 0.0, 0.0],
        [-300.0, 0.0, 300.0],
    ]
    for row in range(5):
        case = logits_case(student, teacher, weights=np.arange(5) == row)
        value, stats, d_logits, _ = compute(case, OBJECTIVES[name])
        with np.errstate(divide="ignore", invalid="ignore"):
            single = logits_case(student[row], teacher[row])
            want, d_want, _ = reference(single, OBJECTIVES[name])
        assert all(np.isfinite(x).all() for x in stats)
        assert value == pytest.approx(want, rel=1e-5, abs=1e-6)
        # The float64 formula itself has q / p with p = 0 here and there.
        d_want = np.where(np.isfinite(d_want[0]), d_want[0], d_logits[row])
        np.testing.assert_allclose(d_logits[row], d_want, rtol=1e-5, atol=1e-6)
        assert np.isfinite(d_logits).all()


# ---------------------------------------------------------------------------------- contract


def test_only_the_student_learns() -> None:
    case = make_case()

    def value(hidden: Any, head: Any, teacher_hidden: Any, teacher_head: Any, weights: Any) -> Any:
        arrays = (hidden, head, teacher_hidden, teacher_head, weights)
        return losses.distill(*arrays, settings=REVERSE, targets=case.targets)[0]

    gradients = jax.grad(value, argnums=(0, 1, 2, 3, 4))(*case[:5])
    assert all(np.abs(g).max() > 0 for g in gradients[:2])
    assert all(np.abs(g).max() == 0 for g in gradients[2:])


def test_statistics_carry_no_gradient() -> None:
    case = make_case()

    def value(hidden: Any) -> Any:
        return losses.distill(hidden, *case[1:5], settings=REVERSE, targets=case.targets)[
            1
        ].kl.sum()

    np.testing.assert_array_equal(jax.grad(value)(case.hidden), 0)


def test_a_factor_on_the_result_scales_the_gradient() -> None:
    case = make_case()

    def value(hidden: Any, head: Any) -> Any:
        arrays = (hidden, head, *case[2:5])
        return 3.0 * losses.distill(*arrays, settings=REVERSE, targets=case.targets)[0]

    gradients = jax.grad(value, argnums=(0, 1))(case.hidden, case.head)
    want = compute(case, REVERSE)[2:]
    assert_close(gradients, jax.tree.map(lambda g: 3.0 * g, want))


def test_a_float32_head_keeps_its_gradient_in_float32_under_bfloat16_compute() -> None:
    case = make_case()
    mixed = case._replace(
        hidden=case.hidden.astype(jnp.bfloat16),
        teacher_hidden=case.teacher_hidden.astype(jnp.bfloat16),
    )
    rounded = mixed._replace(
        head=case.head.astype(jnp.bfloat16), teacher_head=case.teacher_head.astype(jnp.bfloat16)
    )
    _, _, d_hidden, d_head = compute(mixed, REVERSE)
    assert (d_hidden.dtype, d_head.dtype) == (jnp.bfloat16, jnp.float32)
    assert relative(d_head, reference(rounded, REVERSE)[2]) < 2 * U16


def test_matmuls_are_those_that_the_gradient_needs() -> None:
    """Head matmuls: 2 to measure, 3 with a frozen head, 4 with both gradients."""
    case = make_case()

    def value(hidden: Any, head: Any) -> Any:
        return losses.distill(hidden, head, *case[2:5], settings=REVERSE, targets=case.targets)[0]

    def count(fn: Any) -> int:
        return jax.jit(fn).lower(case.hidden, case.head).as_text().count("dot_general")

    assert count(value) == 2
    assert count(jax.grad(value)) == 3
    assert count(jax.grad(value, argnums=(0, 1))) == 4


def test_no_array_of_all_logits_is_held() -> None:
    tokens, vocabulary = 512, 1024
    case = make_case(tokens=tokens, vocabulary=vocabulary)

    def value(hidden: Any, head: Any) -> Any:
        loss = settings(token_chunk=16)
        return losses.distill(hidden, head, *case[2:5], settings=loss, targets=case.targets)[0]

    compiled = jax.jit(jax.grad(value, argnums=(0, 1))).lower(case.hidden, case.head).compile()
    text, memory = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and memory is not None
    assert f"[{tokens},{vocabulary}]" not in text
    assert memory.temp_size_in_bytes < tokens * vocabulary * 4 / 2


def test_shapes_that_disagree_are_refused() -> None:
    case = make_case()

    def call(**changes: Any) -> Any:
        changed = case._replace(**changes)
        return losses.distill(*changed[:5], settings=REVERSE, targets=changed.targets)

    with pytest.raises(ValueError, match="got 97 student and 96 teacher tokens"):
        call(teacher_head=case.teacher_head[:96])
    with pytest.raises(ValueError, match="teacher_hidden"):
        call(teacher_hidden=case.teacher_hidden[:3])
    with pytest.raises(ValueError, match="targets"):
        call(targets=case.targets[:3])
    with pytest.raises(ValueError, match="student_head"):
        call(head=case.head[:, :4])
    with pytest.raises(ValueError, match="vocab_mask"):
        compute(case, REVERSE, vocab_mask=jnp.ones(5, bool))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "jsd", "jsd_teacher_weight": 0.0}, "jsd_teacher_weight: got"),
        ({"objective": "jsd", "jsd_teacher_weight": 1.0}, "jsd_teacher_weight: got"),
        ({"forward_kl_mix": 1.0}, "forward_kl_mix: got"),
        ({"token_chunk": 0}, "token_chunk: got"),
        ({"token_kl_cap": -1.0}, "token_kl_cap: got"),
    ],
)
def test_settings_out_of_range_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ranges.coerce(settings(**options), c.DistillationConfig, "distillation")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"objective": "kl"},
            "distillation.objective: got 'kl', want one of "
            "['reverse_kl', 'forward_kl', 'jsd', 'sampled_reverse_kl']",
        ),
        ({"objective": "forward_kl", "forward_kl_mix": 0.5}, "forward_kl_mix: got 0.5 with"),
        ({"objective": SAMPLED, "forward_kl_mix": 0.5}, "forward_kl_mix: got 0.5 with"),
        ({"objective": SAMPLED, "token_kl_cap": 1.0}, "token_kl_cap: got 1.0 with"),
    ],
)
def test_an_unknown_divergence_or_a_parameter_that_it_has_not_is_refused(
    options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        compute(make_case(), settings(**options))


def test_signed_weights_and_a_vocab_mask_of_cross_entropy_match_float64() -> None:
    rng = np.random.default_rng(3)
    hidden, head = rng.normal(size=(6, 8)), rng.normal(size=(12, 8))
    targets, weights = rng.integers(0, 9, 6), np.array([1.0, -2.0, 0.5, 0.0, 3.0, -1.0])
    mask = np.arange(12) < 9
    scores = np.where(mask, hidden @ head.T, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    d_scores = weights[:, None] * (p - np.eye(12)[targets])

    def loss(hidden: Any, head: Any) -> Any:
        return losses.token_cross_entropy(
            hidden,
            head,
            jnp.int32(targets),
            jnp.float32(weights),
            token_chunk=4,
            vocab_mask=jnp.asarray(mask),
        )[0]

    arrays = jnp.float32(hidden), jnp.float32(head)
    value, found = jax.value_and_grad(loss, argnums=(0, 1))(*arrays)
    want = -(weights * np.log(p[np.arange(6), targets])).sum()
    np.testing.assert_allclose(value, want, rtol=1e-5)
    np.testing.assert_allclose(found[0], d_scores @ head, atol=1e-5)
    np.testing.assert_allclose(found[1], d_scores.T @ hidden, atol=1e-5)


def test_the_divergence_of_two_readings_matches_float64_and_teaches_nothing() -> None:
    rng = np.random.default_rng(4)
    one, two, head = rng.normal(size=(5, 8)), rng.normal(size=(5, 8)), rng.normal(size=(12, 8))
    counted, mask = np.array([1, 1, 0, 1, 1], bool), np.arange(12) != 3
    one[2] = np.nan  # is not read

    def kl(one: Any, two: Any, head: Any) -> Any:
        options: Any = {"token_chunk": 2, "vocab_mask": jnp.asarray(mask)}
        return losses.token_kl(one, two, head, jnp.asarray(counted), **options)

    p, q = (np.where(mask, x @ head.T, -1e30) for x in (one, two))
    p, q = (x - np.log(np.exp(x).sum(-1, keepdims=True)) for x in (p, q))
    want = np.where(counted, (np.exp(p) * (p - q)).sum(-1), 0.0)
    arrays = jnp.float32(one), jnp.float32(two), jnp.float32(head)
    np.testing.assert_allclose(kl(*arrays), want, rtol=1e-4, atol=1e-6)
    for gradient in jax.grad(lambda *a: kl(*a).sum(), argnums=(0, 1, 2))(*arrays):
        assert not np.asarray(gradient).any()
