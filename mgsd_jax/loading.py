"""A model ready to use, from a Hugging Face folder or from what a stage left behind.

A stage folder holds `model/` (config, tokenizer and processor files of its source, and
`source.json`: where the untrained weights come from and which part was trained) and
`checkpoints/`. Trained weights replace those of the source; adapters are merged.
"""

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import jax.numpy as jnp

from mgsd_jax import checkpoint, tree
from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, LoraConfig
from mgsd_jax.data.processor import Processor, load_processor
from mgsd_jax.model import hf, lora
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


def load(path: str, config: Config, workdir: str) -> Loaded:
    """The model at `path`: a Hugging Face folder, or the folder of a stage (see above).

    `path` may hold `{workdir}` and `{model}`. Weights get `config.model.param_dtype`. Raises
    ValueError where the path is neither.
    """
    root = pathlib.Path(config_lib.resolve(path, config, workdir))
    folder = root / "model" if (root / "model" / "source.json").is_file() else root
    if not (folder / "config.json").is_file():
        raise ValueError(
            f"{root}: got no config.json and no model/source.json, "
            "want a Hugging Face folder or the folder of a finished stage"
        )
    model_config = hf.read_config(folder)
    model = Qwen3VL(
        model_config, dtype=jnp.dtype(config.model.compute_dtype), remat=config.model.remat
    )
    params = load_params(root, model_config, config, workdir)
    return Loaded(model, params, load_processor(folder), str(folder))


def load_params(
    root: pathlib.Path, model_config: ModelConfig, config: Config, workdir: str
) -> Params:
    """The weights below `root`, trained parts taken from the checkpoint, adapters merged."""
    dtype = jnp.dtype(config.model.param_dtype)
    source_file = root / "model" / "source.json"
    if not source_file.is_file():
        return hf.load_params(root, model_config, dtype=dtype)
    source = json.loads(source_file.read_text())
    adapters_spec = LoraConfig(**source["lora"])
    trained = checkpoint.load_params(
        root / "checkpoints", which=config.checkpoint.use, metric=source["metric"]
    )
    if source["complete"]:
        return trained["params"]
    base = load_params(pathlib.Path(source["weights"]), model_config, config, workdir)
    if adapters_spec.rank:
        spec = lora.LoraSpec(adapters_spec.rank, adapters_spec.alpha, adapters_spec.targets)
        return lora.merge(base, lora.with_scale(trained["adapters"], spec))
    names = {name for name, _ in tree.named_leaves(trained["params"])}
    _, rest = tree.partition(base, lambda name, _: name in names)
    return tree.combine(trained["params"], rest)


def write_source(
    stage_folder: pathlib.Path,
    loaded: Loaded,
    *,
    weights: str,
    lora_config: LoraConfig,
    is_complete: bool,
    metric: str,
) -> None:
    """Makes a stage folder loadable: side files of the source model, and `source.json`."""
    folder = stage_folder / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(pathlib.Path(loaded.folder).iterdir()):
        if file.is_file() and not file.name.startswith(("model", "source.json", ".")):
            shutil.copyfile(file, folder / file.name)
    source = {
        "weights": str(pathlib.Path(weights).resolve()),
        "lora": dataclasses.asdict(lora_config),
        "complete": is_complete,
        "metric": metric,
    }
    (folder / "source.json").write_text(json.dumps(source, indent=2) + "\n")
