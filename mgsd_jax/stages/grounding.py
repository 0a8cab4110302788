"""Stage 1, grounding: supervised records teach the model to read a board off its picture.

Axes: B batch, T tokens, D width.
"""

import contextlib
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import optax
from etils import epath
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.config import Config, DistillationConfig, GroundingConfig
from mgsd_jax.data import buckets, loaders
from mgsd_jax.data.batching import GroundingBatch
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.data.examples import Loader
from mgsd_jax.data.processor import Encoded, Processor
from mgsd_jax.data.records import check_kinds
from mgsd_jax.model import qwen3vl
from mgsd_jax.model.flops import forward_flops
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import batches, processes, sharding
from mgsd_jax.parallel.means import Mean
from mgsd_jax.stages import loading
from mgsd_jax.training import guards, losses, optimizer, sessions
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.tree import PyTree, Tree
from mgsd_jax.workdir import folders, sinks, stage_folder

Metrics = dict[str, Mean | jax.Array | float]
# (trained, batch, frozen) -> (summed loss, (its weight, metrics))
Validate = Callable[
    [Tree, GroundingBatch, Tree], tuple[jax.Array, tuple[jax.Array, dict[str, Mean]]]
]
RecordLoader = Loader[tuple[Encoded, int], GroundingBatch]
BATCH_AXES: PyTree = GroundingBatch(
    sessions.INPUT_AXES, targets=sessions.FIRST, loss_mask=sessions.FIRST
)


def loss_fn(
    trained: Tree, batch: GroundingBatch, frozen: Tree, *, model: Qwen3VL, token_chunk: int
) -> tuple[jax.Array, tuple[jax.Array, dict[str, Mean]]]:
    """Summed cross-entropy of the answers' tokens in nats, (their number, summed metrics)."""
    batch = batches.constrain(batch, model.mesh)
    variables = tree.combine(sharding.constrain_state(trained, model.mesh), frozen)
    hidden = qwen3vl.apply_hidden(model, variables, batch.inputs)
    weights = jnp.asarray(batch.loss_mask).reshape(-1)
    loss, stats = losses.token_cross_entropy(
        hidden.reshape(-1, hidden.shape[-1]),
        qwen3vl.head(variables["params"]),
        jnp.asarray(batch.targets).reshape(-1),
        weights,
        token_chunk=token_chunk,
        mesh=model.mesh,
    )
    count = weights.sum()
    return loss, (count, {"token_accuracy": Mean((stats.is_top1 * weights).sum(), count)})


def gradients(
    model: Qwen3VL,
    settings: GroundingConfig | DistillationConfig,
    trained: Tree,
    frozen: Tree,
    batch: GroundingBatch,
) -> tuple[Tree, dict[str, Mean]]:
    """(gradients of the mean cross-entropy over the answers' tokens, loss and token_accuracy)."""
    grads, loss, sums = optimizer.accumulate(
        functools.partial(loss_fn, frozen=frozen, model=model, token_chunk=settings.token_chunk),
        trained,
        batch,
        settings.microbatches,
        BATCH_AXES,
    )
    return grads, {"loss": loss, **sums}


def make_update(
    model: Qwen3VL, settings: GroundingConfig, tx: optax.GradientTransformation
) -> tuple[Callable[[TrainState, Tree, GroundingBatch], tuple[TrainState, Metrics]], Validate]:
    """The jitted update, its state donated, and the jitted loss on held-out batches.

    update(state, frozen, batch) -> (state, metrics); validate(trained, batch, frozen) -> what
    `loss_fn` returns.
    """
    loss_of = functools.partial(loss_fn, model=model, token_chunk=settings.token_chunk)

    def update(
        state: TrainState, frozen: Tree, batch: GroundingBatch
    ) -> tuple[TrainState, Metrics]:
        grads, sums = gradients(model, settings, state.params, frozen, batch)
        measured: Metrics = {**sums}
        measured["lr"] = optimizer.learning_rate(state, settings.optim, settings.steps)
        state, norms = optimizer.update(
            state, grads, tx, loss=sums["loss"].sum, in_place=model.kernel.is_plain
        )
        state = sharding.constrain_state(state, model.mesh)
        return state, measured | norms

    return jax.jit(update, donate_argnums=0), jax.jit(loss_of)


def update_flops(model: Qwen3VL, batch: GroundingBatch) -> float:
    """FLOPs of an update: a forward pass and a backward pass of twice as many."""
    rows, length = batch.targets.shape
    pictures = batch.inputs.pictures
    patches = 0 if pictures is None else pictures.patches.shape[1] * pictures.patches.shape[2]
    predicted = round(float(batch.loss_mask.sum()) / rows)
    flops = forward_flops(model.config, tokens=length, patches=patches, predicted=predicted)
    return 3 * rows * flops


def run(config: Config, workdir: str) -> None:
    """Trains `{workdir}/grounding` to `config.grounding.steps`, from its last checkpoint if any."""
    given, config = config, config_lib.resolve(config, workdir)
    settings = config.grounding
    check_kinds(settings.mixture)
    sinks.check(config.metrics)
    training = loaders.load_boards(config, "train", (jax.process_index(), jax.process_count()))
    validation = loaders.load_boards(config, "val")
    stage_folder.check_finished(settings.student)
    with contextlib.ExitStack() as held:
        folder = epath.Path(workdir) / "grounding"
        sections = ("model", "data", "grounding", "checkpoint", "seed")
        claim = held.enter_context(folders.claimed(folder, given, sections))
        mesh = sharding.open_mesh(config.mesh)
        rows, parts = settings.batch_size, settings.microbatches
        batches.check_batch(mesh, "grounding.batch_size", rows, parts)

        # The model, and which part of it learns.
        student, trained, frozen = loading.load_student(
            settings, config, claim.folder, claim.notes, mesh, metric="val/loss"
        )

        # Records from the training boards, and fixed ones from the validation boards.
        loader, fixed = make_loaders(config, training, validation, student.processor, mesh)
        held_out = [batches.to_global(next(fixed), mesh) for _ in range(settings.eval_batches)]

        # One jitted update, its state donated.
        tx = optimizer.make_optimizer(settings.optim, settings.steps)
        update, validate = make_update(student.model, settings, tx)
        state = optimizer.init(trained, tx, mesh)

        opened = sessions.open_session(
            claim,
            config,
            state,
            loader,
            metric="val/loss",
            best_mode="min",
            steps=settings.steps,
            eval_every=settings.eval_every,
        )
        session = held.enter_context(opened)
        state = session.state
        for step in range(session.start, settings.steps):
            with session.timers.phase("data"):
                rows = next(loader)
                guards.check_pictures(rows.inputs, student.processor)
                batch = batches.to_global(rows, mesh)
            started = time.perf_counter()
            state, measured = jax.block_until_ready(update(state, frozen, batch))
            seconds = time.perf_counter() - started
            flops = update_flops(student.model, batch)
            measured |= sessions.speed(flops, batch.targets.size, seconds)
            if sessions.is_due(step + 1, settings.eval_every, settings.steps):
                with session.timers.phase("validation"):
                    measured["val/loss"] = _mean_loss(validate, state.params, frozen, held_out)
            session.finish_step(step + 1, state, measured)


def make_loaders(
    config: Config,
    training: Sequence[Board],
    validation: Sequence[Board],
    processor: Processor,
    mesh: Mesh | None,
) -> tuple[RecordLoader, RecordLoader]:
    """(records to learn from, records to validate with, whose pictures do not vary)."""
    encoder = buckets.fitted(load_encoder(config.data, processor), config)
    make = functools.partial(
        loaders.grounding_loader,
        mixture=config.grounding.mixture,
        batch_size=config.grounding.batch_size,
        process=batches.process_share(mesh),
        agree=processes.largest,
    )
    plain = dataclasses.replace(encoder, data=dataclasses.replace(encoder.data, augment=0.0))
    return make(training, encoder, seed=config.seed), make(validation, plain, seed=config.seed + 1)


def _mean_loss(
    validate: Validate, trained: Tree, frozen: Tree, held_out: Sequence[GroundingBatch]
) -> Mean:
    """The mean cross-entropy over held-out batches, once the device is done with them."""
    sums = jax.block_until_ready([validate(trained, batch, frozen) for batch in held_out])
    return Mean(sum(loss for loss, _ in sums), sum(weight for _, (weight, _) in sums))
