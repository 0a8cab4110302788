"""From summed losses to an update: schedule, AdamW, microbatches, norms, and the train state.

Parameters may be float32 (the default: the model casts what it reads) or bfloat16. Moments,
gradients, norms and the moving average are float32 either way.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import TypeVar

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from mgsd_jax.config import OptimConfig
from mgsd_jax.parallel import sharding
from mgsd_jax.parallel.means import Mean
from mgsd_jax.tree import PyTree

Params = PyTree  # of arrays; nested dicts where paths matter
Batch = TypeVar("Batch")  # a pytree of arrays
# (params, microbatch) -> (summed loss, (its weight, auxiliaries))
LossFn = Callable[[Params, Batch], tuple[jax.Array, tuple[jax.Array, PyTree]]]


@flax.struct.dataclass
class TrainState:
    """All that a step changes, and all that a checkpoint needs besides the data's position."""

    step: jax.Array  # [] int32, updates asked for so far, skipped ones included
    params: Params  # trainable parameters only
    opt_state: optax.OptState
    average: Params = None  # a moving average of params in float32, where one is kept
    memory: PyTree = None  # what options of a stage keep from step to step, see lessons.Memory


def make_schedule(optim: OptimConfig, steps: int) -> optax.Schedule:
    """Learning rate by number of updates done: a linear warm-up, then constant or a half cosine.

    The warm-up takes `optim.warmup` of `steps`; its first update already moves (transformers' has
    rate 0) and its last has the full rate. The cosine would reach 0 right after the last update.
    """
    warmup = round(optim.warmup * steps)

    # optax's schedules round otherwise, and the recipes' numbers are kept to the last bit.
    def schedule(count: jax.typing.ArrayLike) -> jax.Array:
        count = jnp.asarray(count)
        rate = optim.lr * jnp.minimum(1.0, (count + 1) / max(warmup, 1))
        if optim.schedule == "cosine":
            done = jnp.clip((count - warmup) / max(steps - warmup, 1), 0.0, 1.0)
            rate = rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))
        return rate

    return schedule


def make_optimizer(optim: OptimConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with gradients clipped to a global norm first (`optim.clip` 0: not clipped).

    Weight decay applies to all parameters, norms and biases included, as upstream's does.
    """
    # No optax.identity() for a part that is off: a checkpoint holds a state for every part.
    parts = [optax.clip_by_global_norm(optim.clip)] if optim.clip else []
    parts.append(optax.scale_by_adam(b1=optim.b1, b2=optim.b2))
    if optim.weight_decay:
        parts.append(optax.add_decayed_weights(optim.weight_decay))
    parts.append(optax.scale_by_learning_rate(make_schedule(optim, steps)))
    return optax.chain(*parts)


def learning_rate(train_state: TrainState, optim: OptimConfig, steps: int) -> jax.Array:
    """The rate of the next update, [] float32, by the optimizer's own count of updates.

    It leaves out those that were skipped, which `TrainState.step` does not. An optimizer without a
    count has no schedule: then the step counts.
    """
    counts = optax.tree.get_all_with_path(train_state.opt_state, "count")
    count = counts[-1][1] if counts else train_state.step
    return jnp.float32(make_schedule(optim, steps)(count))


def init(
    params: Params,
    tx: optax.GradientTransformation,
    mesh: Mesh | None = None,
    *,
    keeps_average: bool = False,
) -> TrainState:
    """The state before the first step; moments and average are float32 whatever params are.

    On a mesh the moments are made where they will lie, each as its parameter does. Without one,
    arrays are committed to the default device, as the outputs of an update are; otherwise the
    second step would recompile.
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
    loss_fn: LossFn[Batch],
    params: Params,
    batch: Batch,
    num_microbatches: int = 1,
    batch_axes: PyTree = 0,
) -> tuple[Params, Mean, PyTree]:
    """(gradients of the batch's mean loss, the loss, auxiliaries); microbatches only save memory.

    loss_fn returns (summed loss, (its weight, auxiliaries)). Losses, weights and gradients are
    summed over the microbatches and divided once by the whole batch's weight, so their number
    changes nothing but rounding, however the weights are spread. Of the auxiliaries, scalars are
    sums and are added up; arrays have the microbatch's rows first and are put together again.
    batch_axes, a pytree prefix of batch, says where the rows of each leaf are. Gradients are
    float32. Raises ValueError where the rows do not divide.
    """
    value_and_grad = jax.value_and_grad(loss_fn, has_aux=True)
    if num_microbatches == 1:
        (loss, (weight, aux)), grads = value_and_grad(params, batch)
        loss, grads = Mean(loss, jnp.float32(weight)), _float32(grads)
    else:

        def add(sums: tuple[Params, Mean], microbatch: Batch) -> tuple[tuple[Params, Mean], PyTree]:
            (loss, (weight, aux)), grads = value_and_grad(params, microbatch)
            one = _float32(grads), Mean(loss, jnp.float32(weight))
            return jax.tree.map(jnp.add, sums, one), aux

        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), params)
        nothing = Mean(jnp.float32(0), jnp.float32(0))
        microbatches = split_rows(batch, num_microbatches, batch_axes)
        (grads, loss), aux = jax.lax.scan(add, (zeros, nothing), microbatches)
        aux = jax.tree.map(lambda a: a.sum(0) if a.ndim == 1 else _join(a), aux)
    scale = 1.0 / (loss.weight + (loss.weight == 0))
    return jax.tree.map(lambda g: g * scale, grads), loss, aux


def blend(grads: Params, others: Params, share: float) -> Params:
    """(1 - share) grads + share others, with the others first scaled down to the norm of grads.

    The share is then one of the step, whatever the units of the two losses: the cross-entropy of
    questions has thirty times the gradient of a Jensen-Shannon divergence (nano, first step). They
    are never scaled up, so that what has been learned does not come back as noise: in a step whose
    rollouts weigh nothing, questions teach nothing either.
    """
    norm, other = optax.tree.norm(grads), optax.tree.norm(others)
    scale = share * jnp.minimum(1.0, norm / jnp.where(other > 0, other, 1.0))
    return jax.tree.map(lambda a, b: (1.0 - share) * a + scale * b, grads, others)


def split_rows(batch: Batch, num_microbatches: int, batch_axes: PyTree = 0) -> Batch:
    """The batch with a leading axis of microbatches; microbatch j has the rows j, j + n, j + 2n...

    Neighbouring rows go to different microbatches so that rows sharded over devices stay where they
    are: a microbatch of neighbours would lie on a few devices only.
    """

    def split(axis: int, leaves: PyTree) -> PyTree:
        return jax.tree.map(lambda leaf: _split(leaf, num_microbatches, axis), leaves)

    return jax.tree.map(split, batch_axes, batch)


def update(
    train_state: TrainState,
    grads: Params,
    tx: optax.GradientTransformation,
    *,
    loss: jax.typing.ArrayLike = 0.0,
    in_place: bool = False,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """The next state, and grad_norm, update_norm, param_norm and skipped_update (0 or 1).

    grad_norm is before clipping. A gradient or a `loss` (of any shape) with an inf or a NaN leaves
    parameters and moments as they are. bfloat16 parameters are rounded stochastically, with a key
    made of the step: at a rate of 1e-6 rounding to the nearest would move 2 % of them. `in_place`
    makes the skipping depend on the update as well: all reads of the old state then come before
    any write of the new one, or else XLA's CPU compiler copies every donated array first.
    """
    params = _float32(train_state.params)
    grads = _float32(grads)
    grad_norm = optax.tree.norm(grads)
    updates, opt_state = tx.update(grads, train_state.opt_state, params)
    rng = jax.random.fold_in(jax.random.key(0), train_state.step)
    moved = round_like(optax.apply_updates(params, updates), train_state.params, rng)
    update_norm = optax.tree.norm(updates)
    is_finite = jnp.isfinite(grad_norm) & jnp.isfinite(loss).all()
    if in_place:
        is_finite &= jnp.isfinite(update_norm)
    skipped = ~is_finite

    def keep(old: jax.Array, new: jax.Array) -> jax.Array:
        return jnp.where(skipped, old, new)

    moved = jax.tree.map(keep, train_state.params, moved)
    opt_state = jax.tree.map(keep, train_state.opt_state, opt_state)
    metrics = {
        "grad_norm": grad_norm,
        "update_norm": jnp.where(skipped, 0.0, update_norm),
        "param_norm": optax.tree.norm(_float32(moved)),
        "skipped_update": skipped.astype(jnp.float32),
    }
    state = dataclasses.replace(
        train_state, step=train_state.step + 1, params=moved, opt_state=opt_state
    )
    return state, metrics


def move_average(state: TrainState, decay: float) -> TrainState:
    """The state with decay * average + (1 - decay) * params as its average, in float32.

    In bfloat16 it would stand still: at 0.999 a step is less than half of its last place.
    """
    average = optax.incremental_update(_float32(state.params), state.average, 1.0 - decay)
    return dataclasses.replace(state, average=average)


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
