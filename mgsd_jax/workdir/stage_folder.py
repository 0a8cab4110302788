"""The folder that a training stage leaves, which is loaded as a model is.

It holds `checkpoints/` and `model/`: config, tokenizer and processor files of the model that was
trained, and `source.json`, which says what the checkpoints are to be joined with.
"""

import dataclasses
import json
import zlib

from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.checks import fields
from mgsd_jax.config import LoraConfig
from mgsd_jax.workdir import checkpoint_files, folders, paths

STAGES = ("grounding", "distillation")
SOURCE = "source.json"
_SAMPLES = 256  # of every weight file
_SAMPLE_BYTES = 4096


@dataclasses.dataclass(frozen=True)
class Source:
    """What `source.json` says."""

    weights: str  # folder of the weights that the stage did not train
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
    """What `write_source` wrote. Raises ValueError naming the field."""
    file = root / "model" / SOURCE
    content = fields.read_json(file)
    kinds = {"weights": str, "lora": dict, "complete": bool, "metric": str}
    found = {name: fields.field(content, name, kind, file) for name, kind in kinds.items()}
    found["lora"] = config_lib.coerce(found["lora"], LoraConfig, f"{file}: lora")
    return Source(**found, identity=fields.optional(content, "identity", str, file))


def write_source(root: epath.Path, source: Source, side_files: epath.PathLike) -> None:
    """Makes a stage folder loadable: the side files of the source model, and `source.json`."""
    folder = root / "model"
    folder.mkdir(parents=True, exist_ok=True)
    for file in sorted(epath.Path(side_files).iterdir()):
        if file.is_file() and is_side_file(file.name):
            paths.write_whole(folder / file.name, file.read_bytes())
    content = dataclasses.asdict(source) | {
        "weights": str(paths.absolute(source.weights)),
        "identity": identity(source.weights),
    }
    paths.write_whole(folder / SOURCE, json.dumps(content, indent=2) + "\n")


def check_source(root: epath.Path, weights: str) -> None:
    """Raises ValueError where the stage at `root` began with other weights than `weights` now."""
    if is_stage(root) and read_source(root).identity not in (None, identity(weights)):
        raise ValueError(
            f"{root / 'model' / SOURCE}: weights: got another model at {weights} than {root.name} "
            f"began with, want that one back, or {root} removed and trained anew"
        )


def identity(folder: epath.PathLike) -> str:
    """What distinguishes a model or a stage from others that have been, or will be, in its folder.

    For a stage: when its training first began, and its newest step. For a model: a checksum over
    samples of its weights. A copy has the same identity.
    """
    root = epath.Path(folder)
    runs = root / folders.RUNS_FILE
    if runs.is_file():
        first = runs.read_text(encoding="utf-8").partition("\n")[0]
        return f"{zlib.crc32(first.encode()):08x}, step {last_step(root)}"
    checksum = 0
    for file in sorted(root.glob("*.safetensors")):
        size = file.stat().length
        with file.open("rb") as weights:
            for i in range(_SAMPLES):
                weights.seek(size * i // _SAMPLES)
                checksum = zlib.crc32(weights.read(_SAMPLE_BYTES), checksum)
    return f"{checksum:08x}"


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
    last, steps = last_step(root), fields.whole(content, f"{name}.steps", settings)
    if last >= steps:
        return ""
    return f"{root}: {name} has not finished (step {last} of {steps}); run --stage={name} first"


def last_step(root: epath.Path) -> int:
    """The step of a stage's newest checkpoint, 0 without one."""
    found = checkpoint_files.scan(root / "checkpoints")
    return max((int(n) for n, p in found.items() if p != checkpoint_files.HALF_WRITTEN), default=0)
