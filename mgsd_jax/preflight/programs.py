"""Every program of a run, to be lowered from abstract arguments: shapes and layouts, no weights.

These are the programs that the stages call, made by the same functions, for full batches of one
picture a prompt. Those of validations are left out: they decode as an evaluation does, and read
rows of an update without a gradient.
Axes: B batch, T tokens, R response tokens, M pictures a row, P patches, C patch channels.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.config import Config, LoraConfig, OptimConfig, SamplingConfig
from mgsd_jax.data.batch import Inputs, Pictures
from mgsd_jax.data.batching import GroundingBatch
from mgsd_jax.model.attention import kernel_for
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import batches, sharding
from mgsd_jax.preflight import roofline
from mgsd_jax.preflight.lengths import Lengths, most
from mgsd_jax.preflight.roofline import Work
from mgsd_jax.sampling.sampler import Sampler
from mgsd_jax.stages import distillation_step, grounding, loading
from mgsd_jax.stages.distillation_step import DistillationBatch
from mgsd_jax.training import lessons, optimizer, trainable
from mgsd_jax.tree import PyTree, Tree
from mgsd_jax.weights import table
from mgsd_jax.weights.released import find_config

Batch = TypeVar("Batch")


@dataclasses.dataclass(frozen=True)
class Program:
    """One jitted function of a stage."""

    name: str  # 'distillation/update'
    jitted: Any  # what jax.jit made
    arguments: tuple[object, ...]  # ShapeDtypeStructs, and what else it takes
    resident: int  # bytes on a chip of arrays that are held meanwhile, but are not its arguments
    work: Work

    def lower(self) -> jax.stages.Lowered:
        """The program as the compiler gets it."""
        return self.jitted.lower(*self.arguments)


def programs_of(config: Config, mesh: Mesh, lengths: Lengths | None = None) -> Iterator[Program]:
    """The programs of `config.preflight.stages`, in the order in which a run comes to them.

    Their shapes are those of `lengths`, by default the largest that the config allows.
    """
    make = {"grounding": _grounding, "distillation": _distillation, "evaluate": _evaluate}
    for stage in config.preflight.stages:
        for program in make[stage](config, mesh, lengths or most(config)):
            yield dataclasses.replace(program, name=f"{stage}/{program.name}")


def make_model(config: Config, path: str, mesh: Mesh | None) -> Qwen3VL:
    """The model of `path` as `loading.load` would make it; what a stage leaves has its base's."""
    path = config.model.path if "{workdir}" in path else path.replace("{model}", config.model.path)
    return Qwen3VL(
        find_config(path),
        dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        kernel=kernel_for(mesh),
    )


# ----------------------------------------------------------------------------------------- stages


def _grounding(config: Config, mesh: Mesh, lengths: Lengths) -> Iterator[Program]:
    settings = config.grounding
    model = make_model(config, settings.student, mesh)
    tx = optimizer.make_optimizer(settings.optim, settings.steps)
    state, frozen = _state(config, model, settings.optim, settings.lora, tx)
    rows, length = settings.batch_size, lengths.record
    batch = _records(config, model, rows, length)
    update, _ = grounding.make_update(model, settings, tx)
    work = roofline.update_work(
        config, mesh, state.params, [(model, length, length, True)], rows, settings.microbatches
    )
    yield Program("update", update, (state, frozen, _placed(batch, mesh)), 0, work)


def _distillation(config: Config, mesh: Mesh, lengths: Lengths) -> Iterator[Program]:
    settings = config.distillation
    student = make_model(config, settings.student, mesh)
    teacher = make_model(config, settings.teacher, mesh)
    tx = optimizer.make_optimizer(settings.optim, settings.steps)
    averages = settings.teacher_decay > 0
    state, frozen = _state(
        config, student, settings.optim, settings.lora, tx, keeps_average=averages
    )
    memory = jax.eval_shape(lambda: lessons.init_memory(config))
    memory = sharding.abstract(memory, sharding.state_shardings(memory, mesh))
    state = dataclasses.replace(state, memory=memory)
    is_held_once = averages or _is_student_without_adapters(config)
    teacher_params = {} if is_held_once else _read_only(_params(config, teacher), teacher)
    held = (state, frozen, teacher_params)
    variables = tree.combine(state.params, frozen)

    rows, *asked = config_lib.update_rows(settings).values()
    drawn = rows // 2 if settings.replay_steps else rows
    yield from _rollout(config, student, variables, drawn, settings.sampling, lengths, held)
    prompt, context, width = lengths.prompt, lengths.teacher, lengths.response
    batch = DistillationBatch(
        student=_inputs(config, student, rows, prompt, has_picture=True),
        teacher=_inputs(config, teacher, rows, context, has_picture=False),
        tokens=_array((rows, width), jnp.int32),
        mask=_array((rows, width), jnp.bool_),
        weights=_array((rows, width), jnp.float32) if settings.token_weights else None,
    )
    readers = [(student, prompt + width, width, True), (teacher, context + width, width, False)]
    if settings.contrast_cap:
        batch = batch._replace(other=batch.teacher)
        readers.append(readers[1])
    if lessons.needs_outcomes(settings):
        one = _array((rows,), jnp.float32)
        outcomes = lessons.Outcomes(one, one, _array((rows,), jnp.int32), one)
        batch = batch._replace(outcomes=outcomes)
    banned = (student.config.image_token_id, student.config.video_token_id)
    update = distillation_step.make_update(student, teacher, settings, tx, banned)
    work = roofline.update_work(
        config,
        mesh,
        state.params,
        readers,
        rows,
        settings.microbatches,
    )
    records = [_placed(_records(config, student, number, lengths.record), mesh) for number in asked]
    yield Program("update", update, (*held, _placed(batch, mesh), *records), 0, work)


def _is_student_without_adapters(config: Config) -> bool:
    """Whether `loading.load_teacher` will find the teacher in the student, both stages done."""
    settings = config.distillation
    base = settings.student
    if base == "{workdir}/grounding" and config.grounding.lora == settings.lora:
        base = config.grounding.student
    return settings.lora.rank > 0 and base == settings.teacher


def _evaluate(config: Config, mesh: Mesh, lengths: Lengths) -> Iterator[Program]:
    settings = config.evaluate
    model = make_model(config, settings.models[0][1], mesh)
    variables = {"params": _read_only(_params(config, model), model)}
    rows = settings.batch_size
    yield from _rollout(config, model, variables, rows, settings.sampling, lengths, variables)


def _rollout(
    config: Config,
    model: Qwen3VL,
    variables: Tree,
    rows: int,
    sampling: SamplingConfig,
    lengths: Lengths,
    held: object,
) -> Iterator[Program]:
    """The change of layout, the prefill and the decode loop, while `held` stays where it is.

    One chip decodes from the weights as they lie.
    """
    model = loading.for_rollouts(model, config.mesh)
    mesh = model.mesh
    assert mesh is not None
    kept, laid_out = roofline.chip_bytes(held), variables
    if mesh.size == 1:
        kept -= roofline.chip_bytes(variables)
    else:
        lay_out = sharding.make_layout(mesh, model.dtype)
        laid_out = jax.eval_shape(lay_out, variables)
        laid_out = sharding.abstract(
            laid_out, sharding.state_shardings(laid_out, mesh, sharding.ROLLOUT_RULES)
        )
        yield Program(
            "layout",
            lay_out,
            (variables,),
            kept - roofline.chip_bytes(variables),
            roofline.layout_work(variables, laid_out),
        )
    length, limit = lengths.prompt, sampling.max_new_tokens
    inputs = _placed(_inputs(config, model, rows, length, has_picture=True), mesh)
    # How many ids end a row shapes the program, which ones does not.
    banned = (model.config.image_token_id, model.config.video_token_id)
    sampler = Sampler(model, sampling, eos_ids=(0, 1), banned_ids=banned, pad_id=0)
    row_ids = _placed(_array((rows,), jnp.int32), mesh)
    draft = None
    if sampling.draft_tokens:
        draft = _placed(_array((rows, limit), jnp.int32), mesh)
    programs = sampler.programs(laid_out, inputs, _key(mesh), row_ids, draft)
    window, longest = 1 + sampling.draft_tokens, min(lengths.longest, limit)
    loop = roofline.decoding(length, limit, window, longest, lengths.kept)
    works = {
        "prefill": roofline.prefill_work(model, laid_out, rows, length, _patches(config)),
        "decode": roofline.decode_work(model, laid_out, rows, window, loop, longest),
    }
    for name, (jitted, arguments) in programs.items():
        yield Program(name, jitted, arguments, kept, works[name])


# --------------------------------------------------------------------------------------- arguments


def _params(config: Config, model: Qwen3VL) -> Tree:
    params = table.abstract_params(model.config, config.model.param_dtype)
    return sharding.abstract(params, sharding.state_shardings(params, _mesh(model)))


def _read_only(params: Tree, model: Qwen3VL) -> Tree:
    """Parameters that do not learn: in the dtype that the model computes in."""
    shapes = jax.eval_shape(lambda p: sharding.cast(p, model.dtype), params)
    return sharding.abstract(shapes, sharding.state_shardings(shapes, _mesh(model)))


def _state(
    config: Config,
    model: Qwen3VL,
    optim: OptimConfig,
    lora: LoraConfig,
    tx: optax.GradientTransformation,
    *,
    keeps_average: bool = False,
) -> tuple[optimizer.TrainState, Tree]:
    """The train state and the frozen part of the variables."""
    key = jax.eval_shape(lambda: jax.random.key(0))
    trained, frozen = jax.eval_shape(
        lambda params, key: trainable.split(params, optim, lora, key), _params(config, model), key
    )
    state = jax.eval_shape(
        lambda trained: optimizer.init(trained, tx, keeps_average=keeps_average), trained
    )
    state = sharding.abstract(state, sharding.state_shardings(state, _mesh(model)))
    return state, _read_only(frozen, model)


def _inputs(config: Config, model: Qwen3VL, rows: int, length: int, *, has_picture: bool) -> Inputs:
    shape, vision = (rows, length), model.config.vision
    lead = (rows, 1, _patches(config))
    pictures = Pictures(
        patches=_array((*lead, vision.patch_channels), jnp.float32),
        valid=_array(lead, jnp.bool_),
        interp_index=_array((*lead, 4), jnp.int32),
        interp_weight=_array((*lead, 4), jnp.float32),
        coords=_array((*lead, 2), jnp.int32),
        slots=_array(shape, jnp.int32),
    )
    return Inputs(
        tokens=_array(shape, jnp.int32),
        positions=_array((3, *shape), jnp.int32),
        valid=_array(shape, jnp.bool_),
        next_position=_array((rows,), jnp.int32),
        pictures=pictures if has_picture else None,
    )


def _records(config: Config, model: Qwen3VL, rows: int, length: int) -> GroundingBatch:
    return GroundingBatch(
        _inputs(config, model, rows, length, has_picture=True),
        targets=_array((rows, length), jnp.int32),
        loss_mask=_array((rows, length), jnp.float32),
    )


def _patches(config: Config) -> int:
    return config_lib.sizes(config.data.patch_buckets)[-1]


def _array(shape: tuple[int, ...], dtype: DTypeLike) -> PyTree:  # stands for a jax.Array
    return jax.ShapeDtypeStruct(shape, dtype)


def _placed(batch: Batch, mesh: Mesh) -> Batch:
    """Abstract batches, laid out as `batches.to_global` lays them."""
    return sharding.abstract(batch, batches.shardings(batch, mesh))


def _key(mesh: Mesh) -> jax.ShapeDtypeStruct:
    key = jax.eval_shape(lambda: jax.random.key(0))
    return jax.ShapeDtypeStruct(key.shape, key.dtype, sharding=NamedSharding(mesh, P()))


def _mesh(model: Qwen3VL) -> Mesh:
    assert model.mesh is not None
    return model.mesh
