"""From summed losses to an update: schedule, AdamW, microbatches, norms, and the train state.

Parameters may be float32 (the default: compute casts, the master copy does not) or bfloat16.
Moments, gradients, norms and a moving average are float32 either way.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mgsd_jax import tree
from mgsd_jax.config import OptimConfig
from mgsd_jax.parallel import sharding
from mgsd_jax.parallel.means import Mean

Params = Any  # a pytree of arrays, nested dicts where paths matter
# (params, microbatch) -> (summed loss, its weight, auxiliaries)
LossFn = Callable[[Params, Any], tuple[jax.Array, jax.Array, Any]]


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint needs besides the data's position."""

    step: jax.Array  # [] int32, updates asked for so far, skipped ones included
    params: Params  # trainable parameters only
    opt_state: optax.OptState
    average: Params = None  # a moving average of params in float32, where one is kept


def make_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of updates done: a linear warm-up, then constant or a half cosine.

    The warm-up takes `optim.warmup` of `steps`; its first update already moves (transformers' has
    rate 0) and its last has the full rate. The cosine would reach 0 right after the last update.
    """
    if steps < 1 or not 0.0 <= optim.warmup < 1.0:
        raise ValueError(f"got steps {steps}, warmup {optim.warmup}; want >= 1, inside [0, 1)")
    warmup = round(optim.warmup * steps)

    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        rate = optim.lr * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        if optim.schedule == "cosine":
            done = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return rate

    return schedule


def make_optimizer(
    optim: OptimConfig, steps: int, *, decayed: tuple[str, ...] = ("",)
) -> optax.GradientTransformation:
    """AdamW with gradients clipped to a global norm first (`optim.clip` 0: not clipped).

    Weight decay applies to the paths in which one of the regexes `decayed` is found; all of them
    by default, norms and biases included, as upstream's does.
    """
    if optim.schedule not in ("constant", "cosine"):
        raise ValueError(f"schedule: got {optim.schedule!r}, want constant|cosine")
    if optim.lr < 0.0 or optim.weight_decay < 0.0 or optim.clip < 0.0:
        raise ValueError(f"got {optim}, want lr, weight_decay and clip >= 0")

    def is_decayed(params: Params) -> Params:
        rules = (*((pattern, True) for pattern in decayed), ("", False))
        return tree.map_named(lambda path, _: tree.match(rules, path), params)

    parts = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
    parts.append(optax.scale_by_adam(b1=optim.b1, b2=optim.b2))
    if optim.weight_decay:
        parts.append(optax.add_decayed_weights(optim.weight_decay, mask=is_decayed))
    parts.append(optax.scale_by_learning_rate(make_schedule(optim, steps)))
    return optax.chain(*parts)


def init(
    params: Params,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    keeps_average: bool = False,
) -> TrainState:
    """The state before the first step; moments and average are float32 whatever params are.

    On a mesh the moments are made where they will lie, each as its parameter does. Off it all is
    committed to the device, as what an update returns: otherwise the second update would compile
    anew.
    """

    def rest(params: Params) -> tuple[jax.Array, optax.OptState]:
        # optax takes the second moment's dtype from the parameters.
        return jnp.int32(0), tx.init(_float32(params))

    if mesh is not None:
        places = sharding.state_shardings(jax.eval_shape(rest, params), mesh)
        rest = jax.jit(rest, out_shardings=places)
    step, opt_state = rest(params)
    # A copy, also of what is float32: params are donated to the first update.
    average = jax.tree.map(partial(jnp.array, dtype=jnp.float32), params) if keeps_average else None
    state = TrainState(step, params, opt_state, average)
    return state if mesh is not None else jax.device_put(state, jax.local_devices()[0])


def accumulate(
    loss_fn: LossFn,
    params: Params,
    batch: Any,
    num_microbatches: int = 1,
    batch_axes: Any = 0,
) -> tuple[Params, Mean, Any]:
    """(gradients of the batch's mean loss, the loss, auxiliaries); microbatches only save memory.

    loss_fn returns (summed loss, its weight, auxiliaries). Losses, weights and gradients are summed
    over the microbatches and divided once by the whole batch's weight, so their number changes
    nothing but rounding, however the weights are spread. Of the auxiliaries, scalars are sums and
    are added up; arrays have the microbatch's rows first and are put together again. batch_axes, a
    pytree prefix of batch, says where the rows of each leaf are. Gradients are float32. Raises
    ValueError where the rows do not divide.
    """

    def grad_fn(microbatch: Any) -> tuple[Params, Mean, Any]:
        def summed(params: Params) -> tuple[jax.Array, tuple[jax.Array, Any]]:
            loss, weight, aux = loss_fn(params, microbatch)
            return loss, (weight, aux)

        (loss, (weight, aux)), grads = jax.value_and_grad(summed, has_aux=True)(params)
        return _float32(grads), Mean(loss, jnp.float32(weight)), aux

    if num_microbatches == 1:
        grads, loss, aux = grad_fn(batch)
    else:
        grads, loss, aux = _scan_microbatches(
            grad_fn, split_rows(batch, num_microbatches, batch_axes)
        )
    scale = 1.0 / (loss.weight + (loss.weight == 0))
    return jax.tree.map(lambda g: g * scale, grads), loss, aux


def split_rows(batch: Any, num_microbatches: int, batch_axes: Any = 0) -> Any:
    """The batch with a leading axis of microbatches; microbatch j has the rows j, j + n, j + 2n...

    Neighbouring rows go to different microbatches so that rows sharded over devices stay where they
    are: a microbatch of neighbours would lie on a few devices only.
    """

    def split(axis: int, leaves: Any) -> Any:
        return jax.tree.map(lambda leaf: _split(leaf, num_microbatches, axis), leaves)

    return jax.tree.map(split, batch_axes, batch)


def update(
    train_state: TrainState,
    grads: Params,
    tx: optax.GradientTransformation,
    *,
    loss: jax.typing.ArrayLike = 0.0,
    skip_nonfinite: bool = True,
    rng: jax.Array | None = None,
    in_place: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state, and grad_norm, update_norm, param_norm and skipped_update (0 or 1).

    grad_norm is before clipping. A gradient or a `loss` (of any shape) with an inf or a NaN leaves
    parameters and moments as they are where skip_nonfinite. bfloat16 parameters are rounded
    stochastically with rng (default key 0) folded with the step: at a rate of 1e-6 rounding to the
    nearest would move 2 % of them. `in_place` makes the skipping depend on the update as well: all
    reads of the old state then come before any write of the new one, or else XLA's CPU compiler
    copies every donated array first.
    """
    params = _float32(train_state.params)
    grads = _float32(grads)
    grad_norm = optax.global_norm(grads)
    updates, opt_state = tx.update(grads, train_state.opt_state, params)
    rng = jax.random.fold_in(jax.random.key(0) if rng is None else rng, train_state.step)
    moved = round_like(optax.apply_updates(params, updates), train_state.params, rng)
    update_norm = optax.global_norm(updates)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss).all()
    if in_place:
        is_finite &= jnp.isfinite(update_norm)
    skipped = ~is_finite if skip_nonfinite else jnp.bool_(False)
    if skip_nonfinite:

        def keep(old: jax.Array, new: jax.Array) -> jax.Array:
            return jnp.where(skipped, old, new)

        moved = jax.tree.map(keep, train_state.params, moved)
        opt_state = jax.tree.map(keep, train_state.opt_state, opt_state)
    metrics = {
        "grad_norm": grad_norm,
        "update_norm": jnp.where(skipped, 0.0, update_norm),
        "param_norm": optax.global_norm(_float32(moved)),
        "skipped_update": skipped.astype(jnp.float32),
    }
    state = TrainState(train_state.step + 1, moved, opt_state, train_state.average)
    return state, metrics


def move_average(state: TrainState, decay: float) -> TrainState:
    """The state with decay * average + (1 - decay) * params as its average, in float32.

    In bfloat16 it would stand still: at 0.999 a step is less than half of its last place.
    """

    def move(average: jax.Array, new: jax.Array) -> jax.Array:
        return average + (1.0 - decay) * (new.astype(jnp.float32) - average)

    average = jax.tree.map(move, state.average, state.params)
    return TrainState(state.step, state.params, state.opt_state, average)


def round_like(values: Params, like: Params, rng: jax.Array) -> Params:
    """float32 values in the dtypes of `like`, stochastically where those are bfloat16."""
    leaves, structure = jax.tree.flatten(values)
    rounded = [
        stochastic_bfloat16(leaf, jax.random.fold_in(rng, index))
        if target.dtype == jnp.bfloat16
        else leaf.astype(target.dtype)
        for index, (leaf, target) in enumerate(zip(leaves, jax.tree.leaves(like), strict=True))
    ]
    return jax.tree.unflatten(structure, rounded)


def stochastic_bfloat16(values: jax.Array, rng: jax.Array) -> jax.Array:
    """float32 to bfloat16, up or down with the odds that make the mean exact."""
    # bfloat16 is the upper half of float32: noise below it carries with the odds of the lower half.
    noise = jax.random.bits(rng, values.shape, jnp.uint16).astype(jnp.uint32)
    bits = jax.lax.bitcast_convert_type(values, jnp.uint32) + noise
    rounded = jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)
    return jnp.where(jnp.isfinite(values), rounded, values.astype(jnp.bfloat16))


def _scan_microbatches(
    grad_fn: Callable[[Any], tuple[Params, Mean, Any]], microbatches: Any
) -> tuple[Params, Mean, Any]:
    def step(sums: Any, microbatch: Any) -> tuple[Any, Any]:
        *added, aux = grad_fn(microbatch)
        return jax.tree.map(jnp.add, sums, tuple(added)), aux

    *summed, _ = jax.eval_shape(grad_fn, jax.tree.map(lambda x: x[0], microbatches))
    sums = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), tuple(summed))
    (grads, loss), aux = jax.lax.scan(step, sums, microbatches)
    return grads, loss, jax.tree.map(lambda a: a.sum(0) if a.ndim == 1 else _join(a), aux)


def _split(leaf: jax.Array, number: int, axis: int) -> jax.Array:
    rows = leaf.shape[axis]
    if rows % number:
        raise ValueError(f"batch: got {rows} rows, want a multiple of {number} microbatches")
    shape = (*leaf.shape[:axis], rows // number, number, *leaf.shape[axis + 1 :])
    return jnp.moveaxis(leaf.reshape(shape), axis + 1, 0)


def _join(rows: jax.Array) -> jax.Array:
    """[n, B / n, ...] back to [B, ...] in the order that split_rows took them from."""
    return jnp.moveaxis(rows, 0, 1).reshape(-1, *rows.shape[2:])


def _float32(values: Params) -> Params:
    return jax.tree.map(lambda x: x.astype(jnp.float32), values)
