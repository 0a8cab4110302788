"""Updates against torch's AdamW, microbatches against none, and rounding against its mean."""

import dataclasses
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mgsd_jax.checks import ranges
from mgsd_jax.config import OptimConfig
from mgsd_jax.parallel.means import Mean
from mgsd_jax.training import optimizer

OPTIM = OptimConfig(lr=1e-2, b1=0.9, b2=0.99, weight_decay=0.1, clip=1.0)
ROWS = 8
AXES = {"x": 0, "positions": 1, "weights": 0, "pictures": 0}


def make_params(seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    kernel, scale = rng.normal(size=(3, 4)), rng.normal(size=4)
    return {
        "layer": {"kernel": jnp.float32(kernel), "bias": jnp.zeros(4)},
        "norm": {"scale": jnp.float32(scale)},
    }


def make_batch(seed: int = 1) -> dict[str, Any]:
    """Rows of very unequal weight, one array whose rows are not first, and one that is absent."""
    rng = np.random.default_rng(seed)
    return {
        "x": jnp.float32(rng.normal(size=(ROWS, 3))),
        "positions": jnp.float32(rng.normal(size=(3, ROWS, 2))),
        "weights": jnp.float32([5, 0, 0, 1, 0.5, 0, 2, 0]),
        "pictures": None,
    }


def loss_fn(params: Any, batch: Any) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    hidden = jnp.tanh(batch["x"] @ params["layer"]["kernel"] + params["layer"]["bias"])
    rows = ((hidden * params["norm"]["scale"]).sum(-1) + batch["positions"].sum((0, 2))) ** 2
    weights = batch["weights"]
    big = (rows > 1).astype(jnp.float32)
    aux = {"big": Mean((big * weights).sum(), weights.sum()), "rows": rows}
    return (rows * weights).sum(), (weights.sum(), aux)


def assert_close(got: Any, want: Any, rtol: float = 1e-5, atol: float = 1e-6) -> None:
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=rtol, atol=atol), got, want)


# ------------------------------------------------------------------------------ accumulate


@pytest.mark.parametrize("number", [2, 4, 8])
def test_microbatches_change_nothing_but_memory(number: int) -> None:
    params, batch = make_params(), make_batch()
    whole = optimizer.accumulate(loss_fn, params, batch, 1, AXES)
    parts = jax.jit(lambda p, b: optimizer.accumulate(loss_fn, p, b, number, AXES))(params, batch)
    assert_close(parts, whole)


def test_gradients_are_those_of_the_mean_loss() -> None:
    params, batch = make_params(), make_batch()
    grads, loss, aux = optimizer.accumulate(loss_fn, params, batch, 4, AXES)

    def mean(params: Any) -> jax.Array:
        total, (weight, _) = loss_fn(params, batch)
        return total / weight

    value, want = jax.value_and_grad(mean)(params)
    assert_close(grads, want)
    assert loss.value == pytest.approx(float(value), rel=1e-6)
    assert loss.weight == 8.5
    # Scalars of the auxiliaries are sums; rows come back in the order of the batch.
    expected = loss_fn(params, batch)[1][1]
    assert_close(aux, expected)


def test_a_batch_without_weight_gives_no_gradient() -> None:
    params = make_params()
    batch = make_batch() | {"weights": jnp.zeros(ROWS)}
    grads, loss, _ = optimizer.accumulate(loss_fn, params, batch, 2, AXES)
    assert_close(grads, jax.tree.map(jnp.zeros_like, params), atol=0)
    assert loss.value == 0


def test_rows_are_dealt_out_in_turn_so_that_shards_stay_in_place() -> None:
    split = optimizer.split_rows(make_batch() | {"x": jnp.arange(8)}, 2, AXES)
    np.testing.assert_array_equal(split["x"], [[0, 2, 4, 6], [1, 3, 5, 7]])
    np.testing.assert_array_equal(split["positions"][1], make_batch()["positions"][:, 1::2])
    assert split["pictures"] is None


def test_rows_that_do_not_divide_are_refused() -> None:
    with pytest.raises(ValueError, match="got 8 rows, want a multiple of 3"):
        optimizer.accumulate(loss_fn, make_params(), make_batch(), 3, AXES)


def test_gradients_of_bfloat16_parameters_add_up_in_float32() -> None:
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), make_params())
    grads, _, _ = optimizer.accumulate(loss_fn, params, make_batch(), 4, AXES)
    assert {leaf.dtype for leaf in jax.tree.leaves(grads)} == {jnp.dtype(jnp.float32)}


# -------------------------------------------------------------------------------- schedule


def test_constant_schedule_warms_up_and_stays() -> None:
    schedule = optimizer.make_schedule(OptimConfig(lr=2.0, warmup=0.4), 10)
    rates = [np.asarray(schedule(count)) for count in range(10)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 1.5, 2.0] + [2.0] * 6)


def test_cosine_schedule_falls_to_zero_after_the_last_update() -> None:
    optim = OptimConfig(lr=2.0, schedule="cosine", warmup=0.2)
    rates = [np.asarray(optimizer.make_schedule(optim, 10)(count)) for count in range(12)]
    np.testing.assert_allclose(rates[:3], [1.0, 2.0, 2.0])
    np.testing.assert_allclose(rates[6], 1.0, rtol=1e-6)  # half way from 2 to 10
    assert (np.diff(rates[2:11]) < 0).all()
    np.testing.assert_allclose(rates[10:], 0, atol=1e-6)


@pytest.mark.parametrize(
    "changes", [{"schedule": "linear"}, {"lr": -1.0}, {"clip": -1.0}, {"warmup": 1.0}]
)
def test_settings_that_say_nothing_sensible_are_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="got"):
        ranges.coerce(dataclasses.replace(OPTIM, **changes), OptimConfig, "optim")


# ---------------------------------------------------------------------------------- update


def test_updates_are_torchs_adamw_with_clipping() -> None:
    torch = pytest.importorskip("torch")
    params = make_params()
    tx = optimizer.make_optimizer(OPTIM, 10)
    state = optimizer.init(params, tx)
    theirs = [torch.nn.Parameter(torch.tensor(np.asarray(x))) for x in jax.tree.leaves(params)]
    adamw = torch.optim.AdamW(theirs, lr=1e-2, betas=(0.9, 0.99), weight_decay=0.1)
    for step in range(5):
        grads = jax.tree.map(lambda x, s=step: jnp.cos(x * (s + 1)) * (s + 0.2), params)
        state, metrics = optimizer.update(state, grads, tx)
        for parameter, grad in zip(theirs, jax.tree.leaves(grads), strict=True):
            parameter.grad = torch.tensor(np.asarray(grad))
        norm = torch.nn.utils.clip_grad_norm_(theirs, 1.0)
        adamw.step()
        assert metrics["grad_norm"] == pytest.approx(norm.item(), rel=1e-6)
    for parameter, leaf in zip(theirs, jax.tree.leaves(state.params), strict=True):
        np.testing.assert_allclose(leaf, parameter.detach().numpy(), rtol=1e-5, atol=1e-6)
    assert state.step == 5


def test_the_rate_told_is_the_one_that_moves_skipped_updates_aside() -> None:
    """Adam moves every parameter by the rate where all gradients have been the same."""
    optim = OptimConfig(lr=0.5, schedule="cosine", warmup=0.5, clip=0.0, b2=0.9)
    params = {"w": jnp.ones(3)}
    tx = optimizer.make_optimizer(optim, 4)
    state = optimizer.init(params, tx)
    for grad in (1.0, np.nan, 1.0, 1.0):
        rate = optimizer.learning_rate(state, optim, 4)
        before = state.params["w"]
        state, _ = optimizer.update(state, {"w": jnp.full(3, grad)}, tx)
        moved = 0.0 if np.isnan(grad) else float(rate)
        np.testing.assert_allclose(before - state.params["w"], moved, rtol=1e-5)
    assert optimizer.learning_rate(state, optim, 4) == optimizer.make_schedule(optim, 4)(3)


def test_norms_are_those_of_the_step() -> None:
    params = make_params()
    tx = optimizer.make_optimizer(OPTIM, 10)
    grads = jax.tree.map(lambda x: 100 * jnp.ones_like(x), params)
    state, metrics = optimizer.update(optimizer.init(params, tx), grads, tx)
    moved = jax.tree.map(jnp.subtract, state.params, params)
    assert metrics["grad_norm"] == pytest.approx(100 * 20**0.5)  # 20 numbers, before clipping
    assert metrics["update_norm"] == pytest.approx(float(optax.tree.norm(moved)), rel=1e-4)
    assert metrics["param_norm"] == pytest.approx(float(optax.tree.norm(state.params)))
    assert metrics["skipped_update"] == 0


def test_all_parameters_decay() -> None:
    params = make_params()
    tx = optimizer.make_optimizer(OPTIM, 10)
    grads = jax.tree.map(jnp.zeros_like, params)
    state, _ = optimizer.update(optimizer.init(params, tx), grads, tx)
    want = jax.tree.map(lambda x: x * (1 - 1e-3), params)
    assert_close(state.params, want, atol=0)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_gradient_that_is_not_finite_changes_the_step_alone(bad: float) -> None:
    params = make_params()
    tx = optimizer.make_optimizer(OPTIM, 10)
    step = jax.jit(lambda state, grads: optimizer.update(state, grads, tx))
    state, _ = step(optimizer.init(params, tx), params)
    grads = params | {"norm": {"scale": params["norm"]["scale"].at[1].set(bad)}}
    after, metrics = step(state, grads)
    assert_close((after.params, after.opt_state), (state.params, state.opt_state), rtol=0, atol=0)
    assert (after.step, metrics["skipped_update"], metrics["update_norm"]) == (2, 1, 0)


def test_in_place_copies_no_donated_array_and_computes_the_same() -> None:
    params, tx = make_params(), optimizer.make_optimizer(OPTIM, 10)
    states, copies = [], []
    for in_place in (False, True):
        step = jax.jit(
            lambda state, grads, in_place=in_place: optimizer.update(
                state, grads, tx, in_place=in_place
            ),
            donate_argnums=0,
        )
        state = optimizer.init(jax.tree.map(jnp.copy, params), tx)
        program = step.lower(state, make_params(2)).compile()
        copies.append(
            len(re.findall(r" copy\(%state_(?:params|opt_state_1__[mn]u)", program.as_text() or ""))
        )
        states.append(program(state, make_params(2)))
    assert_close(states[1], states[0], rtol=0, atol=0)
    assert copies[0] > copies[1] == 0


@pytest.mark.parametrize("loss", [jnp.nan, -jnp.inf])
def test_a_loss_that_is_not_finite_changes_the_step_alone(loss: float) -> None:
    tx = optimizer.make_optimizer(OPTIM, 10)
    step = jax.jit(lambda state, loss: optimizer.update(state, make_params(2), tx, loss=loss))
    state, metrics = step(optimizer.init(make_params(), tx), jnp.float32(1.5))
    assert metrics["skipped_update"] == 0
    after, metrics = step(state, jnp.float32(loss))
    assert_close((after.params, after.opt_state), (state.params, state.opt_state), rtol=0, atol=0)
    assert (after.step, metrics["skipped_update"]) == (2, 1)
    assert np.isfinite(metrics["grad_norm"])


def test_one_program_serves_every_step() -> None:
    tx = optimizer.make_optimizer(OPTIM, 10)
    step: Any = jax.jit(lambda state, grads: optimizer.update(state, grads, tx), donate_argnums=0)
    state = optimizer.init(make_params(), tx)
    for _ in range(3):
        state, _ = step(state, make_params(2))
    assert step._cache_size() == 1


# -------------------------------------------------------------------------------- bfloat16


def test_stochastic_rounding_takes_the_two_neighbours_and_keeps_the_mean() -> None:
    count = 1 << 16
    for value in (1.0 + 1e-3, -3.7, 1e-30, 6.1e4):
        rounded = optimizer.stochastic_bfloat16(jnp.full(count, value), jax.random.key(0))
        rounded = np.asarray(rounded, np.float64)
        below, above = np.unique(rounded)
        exact = float(np.float32(value))
        assert below < exact < above
        assert above - below <= abs(exact) * 2**-7
        deviation = (above - below) / 2 / count**0.5
        assert abs(rounded.mean() - exact) < 4 * deviation


def test_stochastic_rounding_keeps_what_bfloat16_can_hold() -> None:
    values = jnp.float32([0.0, -0.0, 1.0, -1.5, jnp.inf, -jnp.inf, jnp.nan])
    rounded = optimizer.stochastic_bfloat16(values, jax.random.key(0))
    np.testing.assert_array_equal(rounded.astype(jnp.float32), values)


def test_bfloat16_parameters_move_by_less_than_they_can_hold() -> None:
    """A step of 1e-4 on weights of 1: bfloat16 has nothing between 1 and 1 - 1/256."""
    params = {"kernel": jnp.ones(1 << 16, jnp.bfloat16)}
    tx = optimizer.make_optimizer(OptimConfig(lr=1e-4), 10)
    state, step = optimizer.init(params, tx), jax.jit(lambda s, g: optimizer.update(s, g, tx))
    assert {x.dtype for x in jax.tree.leaves(state.opt_state)} == {
        jnp.dtype(jnp.float32),
        jnp.dtype(jnp.int32),
    }
    grads = {"kernel": jnp.ones(1 << 16)}
    after, _ = step(state, grads)
    kernel = after.params["kernel"]
    assert kernel.dtype == jnp.bfloat16
    mean = float(kernel.astype(jnp.float32).mean())
    deviation = (0.0256 / (1 << 16)) ** 0.5 / 256  # a share of 256 * 1e-4 moves by 1 / 256
    assert mean == pytest.approx(1 - 1e-4, abs=4 * deviation)
    # The same state rounds the same way (a resumed run repeats it), the next step another.
    again, _ = step(state, grads)
    np.testing.assert_array_equal(kernel, again.params["kernel"])
    other, _ = step(dataclasses.replace(state, step=state.step + 1), grads)
    assert (other.params["kernel"] != kernel).any()


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_a_moving_average_moves_whatever_the_parameters_are_kept_in(dtype: Any) -> None:
    """5,000 steps at 0.999 from 1 to 1.25, 2 and -1; in bfloat16 it ended at 1, 1 and 0.953."""
    decay, steps = 0.999, 5000
    state = optimizer.init({"w": jnp.ones(3, dtype)}, optax.sgd(0.0), keeps_average=True)
    state = dataclasses.replace(state, params={"w": jnp.array([1.25, 2.0, -1.0], dtype)})

    @jax.jit
    def run(state: optimizer.TrainState) -> optimizer.TrainState:
        return jax.lax.fori_loop(
            0, steps, lambda _, state: optimizer.move_average(state, decay), state
        )

    average = run(state).average["w"]
    assert average.dtype == jnp.float32
    # Every step rounds by at most half a place of 2, and the average forgets 1 / (1 - decay) of
    # them: 2^-24 * 2 * 1000.
    np.testing.assert_allclose(average, [1.248, 1.993, -0.987], atol=5e-4 + 1.2e-4)
    goal = np.array([1.25, 2.0, -1.0])
    np.testing.assert_allclose(average, goal + (1 - goal) * decay**steps, atol=1.2e-4)


@pytest.mark.parametrize(("size", "want"), [(10.0, 0.75 * 3 + 0.25 * 10 * 5 / 10), (2.0, 2.75)])
def test_a_blend_scales_the_other_gradients_down_but_never_up(size: float, want: float) -> None:
    """Gradients of norm 5 with others of norm 10, which count as 5, and of norm 2, which stay."""
    grads = {"a": jnp.array([3.0]), "b": jnp.array([4.0])}
    others = {"a": jnp.array([size]), "b": jnp.zeros(1)}
    found = optimizer.blend(grads, others, 0.25)
    np.testing.assert_allclose(found["a"], [want], rtol=1e-6)
    np.testing.assert_allclose(found["b"], [3.0], rtol=1e-6)
    nothing = jax.tree.map(jnp.zeros_like, grads)
    np.testing.assert_allclose(optimizer.blend(grads, nothing, 0.25)["b"], [3.0], rtol=1e-6)
