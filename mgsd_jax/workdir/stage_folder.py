"""The folder that a training stage leaves, which is loaded as a model is.

It holds `checkpoints/` and `model/`: config, tokenizer and processor files of the model that was
trained, and `source.json`, which says what the checkpoints are to be joined with: weights of an
identity (contents.py), and where they were.
"""

import dataclasses
import json
from collections.abc import Collection

from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.checks import fields
from mgsd_jax.config import LoraConfig
from mgsd_jax.workdir import contents, folders, paths

STAGES = ("grounding", "distillation")
SOURCE = "source.json"


@dataclasses.dataclass(frozen=True)
class Source:
    """What `source.json` says."""

    weights: str  # folder of the weights that the stage did not train, when it was written
    lora: LoraConfig
    complete: bool  # the checkpoints hold every parameter
    metric: str  # of the best checkpoint
    identity: str | None = None  # of `weights` when the stage began


def is_stage(root: epath.Path) -> bool:
    """Whether a training stage left this folder, or is at work in it."""
    return (root / "model" / SOURCE).is_file()


def is_side_file(name: str) -> bool:
    """Whether a file of a model's folder goes along with its weights: config, tokenizer, ..."""
    return not name.startswith(("model", SOURCE, "."))


def read_source(root: epath.Path) -> Source:
    """What `write_source` wrote, places filled in. Raises ValueError naming the field."""
    file = root / "model" / SOURCE
    content = fields.read_json(file)
    kinds = {"weights": str, "lora": dict, "complete": bool, "metric": str}
    found = {name: fields.field(content, name, kind, file) for name, kind in kinds.items()}
    found["lora"] = config_lib.coerce(found["lora"], LoraConfig, f"{file}: lora")
    found["weights"] = config_lib.located(found["weights"], str(root.parent))
    return Source(**found, identity=fields.optional(content, "identity", str, file))


def write_source(root: epath.Path, source: Source, side_files: epath.PathLike) -> None:
    """Makes a stage folder loadable: the side files of the source model, and `source.json`.

    Weights in the workdir, or shipped with the package, are noted as such, without an absolute
    path.
    """
    folder = root / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(epath.Path(side_files).iterdir()):
        if file.is_file() and is_side_file(file.name):
            paths.write_whole(folder / file.name, file.read_bytes())
    weights = str(paths.absolute(source.weights))
    content = dataclasses.asdict(source) | {
        "weights": config_lib.portable(weights, str(paths.absolute(root.parent))),
        "identity": contents.identity(weights),
    }
    paths.write_whole(folder / SOURCE, json.dumps(content, indent=2) + "\n")


def find_weights(root: epath.Path, elsewhere: Collection[str] = ()) -> str:
    """The folder of the weights that those of the stage at `root` are joined with.

    That is the one where they were, or else one that holds the same: the folder of the same name
    beside the stage or among the shipped models (an older version noted absolute paths), or one of
    `elsewhere`. Raises ValueError where none does.
    """
    source = read_source(root)
    name = epath.Path(source.weights).name
    beside, shipped = str(root.parent / name), f"{config_lib.ASSETS}/{name}"
    for weights in (source.weights, beside, shipped, *elsewhere):
        if source.identity in (None, contents.identity(weights)):
            return weights
    raise _other_weights(root, source.weights)


def check_source(root: epath.Path, weights: str) -> None:
    """Raises ValueError where the stage at `root` began with other weights than `weights` now."""
    if is_stage(root) and read_source(root).identity not in (None, contents.identity(weights)):
        raise _other_weights(root, weights)


def _other_weights(root: epath.Path, weights: str) -> ValueError:
    found = "nothing" if contents.identity(weights) is None else "another model"
    return ValueError(
        f"{root / 'model' / SOURCE}: weights: got {found} at {weights}, want the model that "
        f"{root.name} began with there (or as model.path), or {root} removed and trained anew"
    )


def check_finished(folder: epath.PathLike) -> None:
    """Raises ValueError where the folder is of a stage that has not finished."""
    problem = unfinished(epath.Path(folder))
    if problem:
        raise ValueError(problem)


def unfinished(root: epath.Path) -> str:
    """What a stage whose folder this is has yet to do; '' for a finished one, and for a model."""
    if not is_stage(root):
        is_model = root.name not in STAGES or any(root.glob("*.safetensors*"))
        name = root.name
        return "" if is_model else f"{root}: {name} has not finished; run --stage={name} first"
    settings = root / folders.CONFIG_FILE
    if not settings.is_file():
        return ""  # made by hand
    content = fields.read_json(settings)
    name = next((name for name in STAGES if name in content), root.name)
    last, steps = contents.last_step(root), fields.whole(content, f"{name}.steps", settings)
    if last >= steps:
        return ""
    return f"{root}: {name} has not finished (step {last} of {steps}); run --stage={name} first"
