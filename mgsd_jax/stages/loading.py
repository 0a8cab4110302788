"""A model ready to use, from a Hugging Face folder or from what a stage left behind.

Weights that a stage has trained replace those of the model that it began with; its adapters are
merged into them. See workdir/stage_folder.py for the folder of a stage.
"""

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh

from mgsd_jax import tree
from mgsd_jax.config import Config, DistillationConfig, GroundingConfig, LoraConfig, MeshConfig
from mgsd_jax.data.processor import Processor, load_processor
from mgsd_jax.model import lora
from mgsd_jax.model.attention import kernel_for
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import sharding
from mgsd_jax.training import trainable
from mgsd_jax.tree import Tree
from mgsd_jax.weights import hf, table
from mgsd_jax.workdir import checkpoint, contents, paths, stage_folder
from mgsd_jax.workdir.stage_folder import Source

Finish = Callable[[str, jax.Array], jax.Array]  # (path, leaf) -> what becomes of the leaf


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its weights and its processor."""

    model: Qwen3VL
    params: Tree
    processor: Processor
    folder: str  # of the Hugging Face side files
    base: str | None  # identity of the folder whose weights `params` are; None: of a stage's


def load(path: str, config: Config, mesh: Mesh | None = None, *, is_frozen: bool = False) -> Loaded:
    """The model at `path`: a Hugging Face folder, or the folder of a stage.

    Weights go straight to where `sharding.TRAIN_RULES` lay them on the mesh, one by one as they are
    read. They get `config.model.param_dtype`, or where they will not learn (`is_frozen`) the dtype
    that the model reads them in. Raises ValueError where the path is neither.
    """
    root = epath.Path(path)
    is_stage = stage_folder.is_stage(root)
    folder = root / "model" if is_stage else root
    problem = stage_folder.unfinished(root)
    if problem and not (is_stage and contents.last_step(root)):
        raise ValueError(problem)
    if problem:
        logging.warning("%s", problem)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{root}: neither config.json nor model/source.json found, "
            "want a Hugging Face folder or the folder of a finished stage"
        )
    with paths.local_files(folder, stage_folder.is_side_file) as local:
        model_config, processor = hf.read_config(local), load_processor(local)
    model = Qwen3VL(
        model_config,
        dtype=jnp.dtype(config.model.compute_dtype),
        remat=config.model.remat,
        kernel=kernel_for(mesh),
    )
    largest = max(processor.tokenizer.get_vocab().values())
    if largest >= model_config.text.vocab_size:
        raise ValueError(
            f"{folder}: tokenizer: got ids up to {largest}, want them below the vocab_size of "
            f"config.json, {model_config.text.vocab_size}"
        )

    def finish(path: str, leaf: jax.Array) -> jax.Array:
        return sharding.cast_leaf(path, jnp.asarray(leaf), model.dtype) if is_frozen else leaf

    params = load_params(root, model_config, config, mesh, finish)
    base = None if is_stage else contents.identity(root)
    return Loaded(model, params, processor, str(folder), base)


def for_rollouts(model: Qwen3VL, config: MeshConfig) -> Qwen3VL:
    """The model on the mesh of rollouts, where `sharding.make_layout` lays its weights."""
    mesh = sharding.rollout_mesh(model.mesh, config.rollout_tensor)
    return model.clone(kernel=dataclasses.replace(model.kernel, mesh=mesh))


def load_student(
    settings: GroundingConfig | DistillationConfig,
    config: Config,
    folder: epath.Path,
    notes: list[Callable[[], None]],
    mesh: Mesh | None,
    *,
    metric: str,
) -> tuple[Loaded, Tree, Tree]:
    """(the student, its `params` empty; the parameters that learn; the frozen rest), on the mesh.

    Parameters that learn have `config.model.param_dtype`, the others the dtype that the model reads
    them in. Where the stage before has trained adapters of the same size, these are trained on, and
    the frozen rest is the model that they adapt. Appends to `notes` what makes the stage's `folder`
    loadable; its best checkpoint is the best by `metric`.
    """
    weights, adapters = settings.student, None
    root = epath.Path(weights)
    if settings.lora.rank and stage_folder.is_stage(root):
        before = stage_folder.read_source(root)
        if before.lora == settings.lora:
            weights = stage_folder.find_weights(root, [config.model.path])
            adapters = _load_trained(root, before, config)["adapters"]
            logging.info("%s: its adapters learn on, above %s", root, weights)
    stage_folder.check_source(folder, weights)
    student = load(weights, config, mesh, is_frozen=settings.lora.rank > 0)
    _check_trainable(student)
    trained, frozen = trainable.split(
        student.params, settings.optim, settings.lora, jax.random.key(config.seed), adapters
    )
    student = dataclasses.replace(student, params={})  # they live on in these two alone
    trained, frozen = sharding.place((trained, sharding.cast(frozen, student.model.dtype)), mesh)
    if jax.process_index() == 0:
        source = Source(weights, settings.lora, complete=not frozen, metric=metric)
        notes.append(functools.partial(stage_folder.write_source, folder, source, student.folder))
    return student, trained, frozen


def load_teacher(
    settings: DistillationConfig, config: Config, mesh: Mesh | None, student: Loaded
) -> Loaded:
    """The frozen teacher of a student that `load_student` has returned.

    Its `params` are empty where the student's arrays serve for both: the teacher is the average of
    the student (`teacher_decay`), or the student without its adapters. Raises ValueError where the
    teacher's vocabulary differs from the student's.
    """
    if settings.teacher_decay:
        return student
    if settings.lora.rank and student.base and student.base == contents.identity(settings.teacher):
        said = "%s: the teacher shares the student's weights, without its adapters"
        logging.info(said, settings.teacher)
        return student
    loaded = load(settings.teacher, config, mesh, is_frozen=True)
    _check_trainable(loaded)
    _check_vocabulary(student, loaded)
    return loaded


def _check_trainable(loaded: Loaded) -> None:
    """Raises ValueError for a Thinking checkpoint: what is learned would never be an answer."""
    if loaded.processor.opens_thought:
        raise ValueError(
            f"{loaded.folder}: chat template: got prompts that end inside <think>, want ones where "
            "an answer begins: training would put the answer inside a thought that never closes; "
            "train the Instruct release (evaluating this one works)"
        )


def _check_vocabulary(student: Loaded, teacher: Loaded) -> None:
    """Raises ValueError where the teacher would read the student's tokens as other text."""
    ours, theirs = (x.processor.tokenizer.get_vocab() for x in (student, teacher))
    different = sorted(ours.items() ^ theirs.items(), key=lambda item: item[1])
    sizes = [x.model.config.text.vocab_size for x in (student, teacher)]
    if different or sizes[0] != sizes[1]:
        example = f", such as {different[0][0]!r} of id {different[0][1]}" if different else ""
        raise ValueError(
            f"{teacher.folder}: tokenizer: got vocab_size {sizes[1]} and {len(different)} tokens "
            f"that only it or only the student's has{example}, want the vocabulary of "
            f"{student.folder}, vocab_size {sizes[0]}: the two are compared token by token"
        )


def load_params(
    root: epath.Path,
    model_config: ModelConfig,
    config: Config,
    mesh: Mesh | None = None,
    finish: Finish = lambda path, leaf: leaf,
) -> Tree:
    """The weights below `root`, trained parts taken from the checkpoint, adapters merged."""
    if not stage_folder.is_stage(root):
        return _load_weights(root, model_config, config, mesh, finish)
    source = stage_folder.read_source(root)
    trained = _load_trained(root, source, config, mesh)
    if source.complete:
        return tree.map_named(finish, trained["params"])
    weights = stage_folder.find_weights(root, [config.model.path])
    base = functools.partial(load_params, epath.Path(weights), model_config, config, mesh)
    if source.lora.rank:
        merged = lora.merger(lora.with_scale(trained["adapters"], source.lora))
        return base(lambda path, leaf: finish(path, merged(path, leaf)))
    learned = dict(tree.named_leaves(trained["params"]))
    _, rest = tree.partition(base(finish), lambda name, _: name in learned)
    return tree.combine(tree.map_named(finish, trained["params"]), rest)


def _load_weights(
    root: epath.Path, model_config: ModelConfig, config: Config, mesh: Mesh | None, finish: Finish
) -> Tree:
    """The weights of a Hugging Face folder."""
    if paths.is_remote(root):
        raise ValueError(
            f"{root}: got a remote folder of weights, want a local one: tensors are read from "
            "files mapped into memory; copy the folder to every host"
        )
    shardings = None
    if mesh is not None:
        shapes = table.abstract_params(model_config, config.model.param_dtype)
        shardings = sharding.state_shardings(shapes, mesh)
    dtype = jnp.dtype(config.model.param_dtype)
    return hf.load_params(str(root), model_config, dtype=dtype, shardings=shardings, finish=finish)


def _load_trained(
    root: epath.Path, source: Source, config: Config, mesh: Mesh | None = None
) -> Tree:
    """What the stage trained, on the mesh or on the host."""

    def place(shapes: Tree) -> Tree:
        if mesh is None:
            return shapes
        return sharding.abstract(shapes, sharding.state_shardings(shapes, mesh))

    return checkpoint.load_params(
        root / "checkpoints", place, which=config.checkpoint.use, metric=source.metric
    )


def load_adapters(path: str, config: Config) -> tuple[Tree, LoraConfig, str]:
    """The adapters of a stage and of those before it as one; the Hugging Face folder they adapt.

    Raises ValueError where one of these stages trained parameters.
    """
    root = epath.Path(path)
    parts, sizes = [], []
    while stage_folder.is_stage(root):
        source = stage_folder.read_source(root)
        if not source.lora.rank:
            raise ValueError(
                f"{root}: got a stage that trained parameters, want adapters; "
                "export the whole model (export.adapters=false)"
            )
        sizes.append(source.lora)
        parts.append(lora.with_scale(_load_trained(root, source, config)["adapters"], source.lora))
        root = epath.Path(stage_folder.find_weights(root, [config.model.path]))
    if not parts:
        raise ValueError(f"{root}: no model/source.json found, want a stage that trained adapters")
    return (*lora.join(parts, sizes[0]), str(root))
