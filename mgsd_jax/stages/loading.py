"""A model ready to use, from a Hugging Face folder or from what a stage left behind.

A stage folder holds `model/` (config, tokenizer and processor files of its source, and
`source.json`: where the untrained weights come from, which they were, and what was trained) and
`checkpoints/`. Trained weights replace those of the source; adapters are merged.
"""

import dataclasses
import functools
import json
import zlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.checks import fields
from mgsd_jax.config import Config, DistillationConfig, GroundingConfig, LoraConfig
from mgsd_jax.data.processor import Processor, load_processor
from mgsd_jax.model import lora
from mgsd_jax.model.attention import kernel_for
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import sharding
from mgsd_jax.training import trainable
from mgsd_jax.weights import hf, table
from mgsd_jax.workdir import checkpoint, checkpoint_files, folders, paths

Params = dict[str, Any]
_STAGES = ("grounding", "distillation")
_SAMPLES = 256  # of every weight file
_SAMPLE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its weights and its processor.

    `folder` holds the Hugging Face side files, `base` is the folder whose weights `params` are,
    '' where a stage has changed them.
    """

    model: Qwen3VL
    params: Params
    processor: Processor
    folder: str
    base: str


def load(path: str, config: Config, mesh: Mesh | None = None, *, is_frozen: bool = False) -> Loaded:
    """The model at `path`: a Hugging Face folder, or the folder of a stage (see above).

    Weights get `config.model.param_dtype`, or where they
    will not learn (`is_frozen`) what the model reads them in, one by one as they are read, and go
    straight to where `sharding.TRAIN_RULES` lay them on the mesh. Raises ValueError where the path
    is neither.
    """
    root = epath.Path(path)
    folder = root / "model" if (root / "model" / "source.json").is_file() else root
    problem = _unfinished(root)
    if problem and (folder == root or not _last_step(root)):
        raise ValueError(problem)
    if problem:
        logging.warning("%s", problem)
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{root}: got no config.json and no model/source.json, "
            "want a Hugging Face folder or the folder of a finished stage"
        )
    with paths.local_files(folder, _is_side_file) as local:
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

    def read(path: str, leaf: jax.Array) -> jax.Array:
        return sharding.cast_leaf(path, jnp.asarray(leaf), model.dtype) if is_frozen else leaf

    params = load_params(root, model_config, config, mesh, read)
    base = "" if folder != root else str(paths.absolute(root))
    return Loaded(model, params, processor, str(folder), base)


def load_student(
    settings: GroundingConfig | DistillationConfig,
    config: Config,
    folder: epath.Path,
    notes: list[Callable[[], None]],
    mesh: Mesh | None,
    *,
    metric: str,
) -> tuple[Loaded, Params, Params]:
    """(the student of a stage, `params` empty; what learns; the frozen rest), laid out on the mesh.

    What learns has `config.model.param_dtype`, the rest what the model reads. Adapters of the size
    that the stage before has trained are that stage's, which learn on; the frozen rest is then the
    model that they were made for. To `notes` comes what the stage's `folder` will say: where the
    weights come from, and by which `metric` a checkpoint is the best.
    """
    weights = settings.student
    adapters = None
    if settings.lora.rank:
        adapters, weights = _adapters_of(epath.Path(weights), settings.lora, weights, config)
    _check_source(folder / "model" / "source.json", weights)
    student = load(weights, config, mesh, is_frozen=settings.lora.rank > 0)
    _check_trainable(student)
    trained, frozen = trainable.split(
        student.params, settings.optim, settings.lora, jax.random.key(config.seed), adapters
    )
    student = dataclasses.replace(student, params={})  # they live on in these two alone
    trained, frozen = sharding.place((trained, sharding.cast(frozen, student.model.dtype)), mesh)
    notes.append(
        functools.partial(
            write_source,
            folder,
            student,
            weights=weights,
            lora_config=settings.lora,
            is_complete=not frozen,
            metric=metric,
        )
    )
    return student, trained, frozen


def load_teacher(
    settings: DistillationConfig, config: Config, mesh: Mesh | None, student: Loaded
) -> Loaded:
    """The frozen teacher, beside the student as `load_student` returns it.

    Its `params` are empty where the student holds them: the teacher is the average of the student
    (`teacher_decay`), or the student without its adapters. Raises ValueError for one that would
    read the student's tokens as other text.
    """
    if settings.teacher_decay:
        return student
    teacher = paths.absolute(settings.teacher)
    if settings.lora.rank and student.base == str(teacher):
        logging.info("%s: the teacher is the student without its adapters, held once", teacher)
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


def _adapters_of(
    root: epath.Path, wanted: LoraConfig, weights: str, config: Config
) -> tuple[Params | None, str]:
    """(adapters to go on with, the folder that they adapt), or (None, `weights`) without any."""
    file = root / "model" / "source.json"
    if not file.is_file():
        return None, weights
    source = _read_source(file)
    if source["lora"] != wanted:
        return None, weights
    trained: Params = checkpoint.load_params(
        root / "checkpoints", which=config.checkpoint.use, metric=source["metric"]
    )
    logging.info("%s: its adapters learn on, above %s", root, source["weights"])
    return trained["adapters"], source["weights"]


def check_finished(path: str) -> None:
    """Raises ValueError where `path`, as `load` takes it, is of a stage that has not finished."""
    problem = _unfinished(epath.Path(path))
    if problem:
        raise ValueError(problem)


def _unfinished(root: epath.Path) -> str:
    """What a stage whose folder this is has yet to do; '' for a finished one, and for a model's."""
    is_stage = (root / "model" / "source.json").is_file()
    if not is_stage and (root.name not in _STAGES or any(root.glob("*.safetensors*"))):
        return ""
    settings = root / folders.CONFIG_FILE
    if is_stage and not settings.is_file():
        return ""  # made by hand
    stages = fields.read_json(settings) if is_stage else {root.name: {}}
    name = next((name for name in _STAGES if name in stages), root.name)
    last = _last_step(root)
    steps = fields.whole(stages, f"{name}.steps", settings) if is_stage else None
    if steps is not None and last >= steps:
        return ""
    done = "" if steps is None else f" (step {last} of {steps})"
    return f"{root}: {name} has not finished{done}; run --stage={name} first"


def _last_step(root: epath.Path) -> int:
    """The step of a stage's newest checkpoint, 0 without one."""
    found = checkpoint_files.scan(root / "checkpoints")
    return max((int(n) for n, p in found.items() if p != checkpoint_files.HALF_WRITTEN), default=0)


def identity(path: str) -> str:
    """What tells the model at `path`, as `load` takes it, from others that were there or will be.

    Of a stage it is when its training first began and its newest step, of a model's folder a sample
    of its weights: a copy has the same.
    """
    return _identity(epath.Path(path))


def _identity(root: epath.Path) -> str:
    runs = root / folders.RUNS_FILE
    if runs.is_file():
        first = runs.read_text(encoding="utf-8").partition("\n")[0]
        return f"{zlib.crc32(first.encode()):08x}, step {_last_step(root)}"
    checksum = 0
    for file in sorted(root.glob("*.safetensors")):
        size = file.stat().length
        with file.open("rb") as weights:
            for i in range(_SAMPLES):
                weights.seek(size * i // _SAMPLES)
                checksum = zlib.crc32(weights.read(_SAMPLE_BYTES), checksum)
    return f"{checksum:08x}"


def load_params(
    root: epath.Path,
    model_config: ModelConfig,
    config: Config,
    mesh: Mesh | None = None,
    finish: Callable[[str, jax.Array], jax.Array] = lambda path, leaf: leaf,
) -> Params:
    """The weights below `root`, trained parts taken from the checkpoint, adapters merged.

    `finish(path, leaf)` is what becomes of each of them in the end.
    """
    dtype = jnp.dtype(config.model.param_dtype)
    source_file = root / "model" / "source.json"
    if not source_file.is_file():
        if paths.is_remote(root):
            raise ValueError(
                f"{root}: got a remote folder of weights, want a local one: tensors are read from "
                "files mapped into memory; copy the folder to every host"
            )
        shardings = None
        if mesh is not None:
            shapes = table.abstract_params(model_config, config.model.param_dtype)
            shardings = sharding.param_shardings(shapes, mesh)
        return hf.load_params(
            str(root), model_config, dtype=dtype, shardings=shardings, finish=finish
        )
    source, trained = _read_stage(root, config, mesh)
    if source["complete"]:
        return tree.map_named(finish, trained["params"])
    _check_source(source_file, source["weights"])
    base = functools.partial(load_params, epath.Path(source["weights"]), model_config, config, mesh)
    if source["lora"].rank:
        merged = lora.merger(lora.with_scale(trained["adapters"], source["lora"]))
        return base(lambda path, leaf: finish(path, merged(path, leaf)))
    names = {name for name, _ in tree.named_leaves(trained["params"])}
    _, rest = tree.partition(base(finish), lambda name, _: name in names)
    return tree.combine(tree.map_named(finish, trained["params"]), rest)


def load_adapters(path: str, config: Config) -> tuple[Params, LoraConfig, str]:
    """The adapters of a stage and of those before it as one; the Hugging Face folder they adapt.

    Raises ValueError where a stage of them trained parameters.
    """
    root = epath.Path(path)
    parts, sizes = [], []
    while (root / "model" / "source.json").is_file():
        source, trained = _read_stage(root, config, None)
        if not source["lora"].rank:
            raise ValueError(
                f"{root}: got a stage that trained parameters, want adapters; "
                "export the whole model (export.adapters=false)"
            )
        sizes.append(source["lora"])
        parts.append(lora.with_scale(trained["adapters"], source["lora"]))
        _check_source(root / "model" / "source.json", source["weights"])
        root = epath.Path(source["weights"])
    if not parts:
        raise ValueError(f"{root}: got no model/source.json, want a stage that trained adapters")
    return (*lora.join(parts, sizes[0]), str(root))


def _read_stage(
    root: epath.Path, config: Config, mesh: Mesh | None
) -> tuple[dict[str, Any], Params]:
    """The `source.json` of a stage folder, and what the stage trained."""
    source = _read_source(root / "model" / "source.json")
    trained = checkpoint.load_params(
        root / "checkpoints",
        None if mesh is None else functools.partial(_placed, mesh=mesh),
        which=config.checkpoint.use,
        metric=source["metric"],
    )
    return source, trained


def _read_source(file: epath.Path) -> dict[str, Any]:
    """What `write_source` wrote, `lora` as a LoraConfig. Raises ValueError naming the field."""
    source = fields.read_json(file)
    kinds = {"weights": str, "lora": dict, "complete": bool, "metric": str}
    source = {name: fields.field(source, name, kind, file) for name, kind in kinds.items()}
    return source | {"lora": config_lib.coerce(source["lora"], LoraConfig, f"{file}: lora")}


def _check_source(file: epath.Path, weights: str) -> None:
    """Raises ValueError where a stage's `source.json` is there and `weights` are others by now."""
    noted = fields.read_json(file).get("identity") if file.is_file() else None
    if noted is not None and noted != _identity(epath.Path(weights)):
        stage_folder = file.parent.parent
        raise ValueError(
            f"{file}: weights: got another model at {weights} than {stage_folder.name} began with, "
            f"want that one back, or {stage_folder} removed and trained anew"
        )


def _placed(shapes: Params, mesh: Mesh) -> Params:
    return sharding.abstract(shapes, sharding.param_shardings(shapes, mesh))


def write_source(
    stage_folder: epath.Path,
    loaded: Loaded,
    *,
    weights: str,
    lora_config: LoraConfig,
    is_complete: bool,
    metric: str,
) -> None:
    """Makes a stage folder loadable: side files of the source model, and `source.json`.

    Process 0 writes them.
    """
    if jax.process_index() != 0:
        return
    folder = stage_folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(epath.Path(loaded.folder).iterdir()):
        if file.is_file() and _is_side_file(file.name):
            paths.write_whole(folder / file.name, file.read_bytes())
    source = {
        "weights": str(paths.absolute(weights)),
        "identity": _identity(epath.Path(weights)),
        "lora": dataclasses.asdict(lora_config),
        "complete": is_complete,
        "metric": metric,
    }
    paths.write_whole(folder / "source.json", json.dumps(source, indent=2) + "\n")


def _is_side_file(name: str) -> bool:
    return not name.startswith(("model", "source.json", "."))
