"""A model ready to use, from a Hugging Face folder or from what a stage left behind.

A stage folder holds `model/` (config, tokenizer and processor files of its source, and
`source.json`: where the untrained weights come from and which part was trained) and
`checkpoints/`. Trained weights replace those of the source; adapters are merged.
"""

import dataclasses
import functools
import json
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from jax.sharding import Mesh

from mgsd_jax import checkpoint, paths, sharding, trainable, tree
from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, DistillationConfig, GroundingConfig, LoraConfig
from mgsd_jax.data.processor import Processor, load_processor
from mgsd_jax.model import hf, lora, table
from mgsd_jax.model.attention import kernel_for
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import Qwen3VL

Params = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with its weights and its processor; `folder` holds the Hugging Face side files."""

    model: Qwen3VL
    params: Params
    processor: Processor
    folder: str


def load(
    path: str,
    config: Config,
    workdir: str,
    mesh: Mesh | None = None,
    *,
    is_frozen: bool = False,
) -> Loaded:
    """The model at `path`: a Hugging Face folder, or the folder of a stage (see above).

    `path` may hold `{workdir}` and `{model}`. Weights get `config.model.param_dtype`, or where they
    will not learn (`is_frozen`) what the model reads them in, and go straight to where
    `sharding.TRAIN_RULES` lay them on the mesh. Raises ValueError where the path is neither.
    """
    root = epath.Path(config_lib.resolve(path, config, workdir))
    folder = root / "model" if (root / "model" / "source.json").is_file() else root
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
    params = load_params(root, model_config, config, workdir, mesh)
    if is_frozen:
        params = sharding.cast(params, model.dtype)
    return Loaded(model, params, processor, str(folder))


def load_student(
    settings: GroundingConfig | DistillationConfig,
    config: Config,
    workdir: str,
    folder: epath.Path,
    mesh: Mesh | None,
    *,
    metric: str,
) -> tuple[Loaded, Params, Params]:
    """(the student of a stage, `params` empty; what learns; the frozen rest), laid out on the mesh.

    What learns has `config.model.param_dtype`, the rest what the model reads. The stage's `folder`
    notes where the weights come from, and by which `metric` a checkpoint is the best.
    """
    student = load(settings.student, config, workdir, mesh)
    trained, frozen = trainable.split(
        student.params, settings.optim, settings.lora, jax.random.key(config.seed)
    )
    student = dataclasses.replace(student, params={})  # they live on in these two alone
    trained, frozen = sharding.place((trained, sharding.cast(frozen, student.model.dtype)), mesh)
    write_source(
        folder,
        student,
        weights=config_lib.resolve(settings.student, config, workdir),
        lora_config=settings.lora,
        is_complete=not frozen,
        metric=metric,
    )
    return student, trained, frozen


def load_params(
    root: epath.Path,
    model_config: ModelConfig,
    config: Config,
    workdir: str,
    mesh: Mesh | None = None,
) -> Params:
    """The weights below `root`, trained parts taken from the checkpoint, adapters merged."""
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
        return hf.load_params(str(root), model_config, dtype=dtype, shardings=shardings)
    source = json.loads(source_file.read_text())
    adapters_spec = LoraConfig(**source["lora"])
    trained = checkpoint.load_params(
        root / "checkpoints",
        None if mesh is None else functools.partial(_placed, mesh=mesh),
        which=config.checkpoint.use,
        metric=source["metric"],
    )
    if source["complete"]:
        return trained["params"]
    base = load_params(epath.Path(source["weights"]), model_config, config, workdir, mesh)
    if adapters_spec.rank:
        spec = lora.LoraSpec(adapters_spec.rank, adapters_spec.alpha, adapters_spec.targets)
        return lora.merge(base, lora.with_scale(trained["adapters"], spec))
    names = {name for name, _ in tree.named_leaves(trained["params"])}
    _, rest = tree.partition(base, lambda name, _: name in names)
    return tree.combine(trained["params"], rest)


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
        "lora": dataclasses.asdict(lora_config),
        "complete": is_complete,
        "metric": metric,
    }
    paths.write_whole(folder / "source.json", json.dumps(source, indent=2) + "\n")


def _is_side_file(name: str) -> bool:
    return not name.startswith(("model", "source.json", "."))
