"""A trained model as a Hugging Face folder, and its adapters alone as a PEFT folder."""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path

import jax
import jax.numpy as jnp
from absl import logging
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.checks.fields import Json, read_json
from mgsd_jax.config import Config
from mgsd_jax.data.tokenizer import for_all_readers
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.stages import card, loading, parity
from mgsd_jax.tree import Tree
from mgsd_jax.weights import files, hf, peft
from mgsd_jax.weights.files import FloatType
from mgsd_jax.workdir import contents, paths, stage_folder

TOKENIZER = "tokenizer_config.json"
# Tokenizer, processor and generation files as transformers 4.57 and 5 name them, which are copied.
# At least one file of every set in WANTED must be there for a reader to work.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    TOKENIZER,
    "vocab.json",
    "merges.txt",
    "added_tokens.json",
    "special_tokens_map.json",
    "chat_template.json",
    "chat_template.jinja",
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
RECORD = "export.json"  # what the export was made from
WANTED = (
    ("tokenizer.json", "vocab.json"),
    (TOKENIZER,),
    ("preprocessor_config.json", "processor_config.json"),
)


def run(config: Config, workdir: str) -> None:
    """Writes the model at `config.export.source`, or its adapters, to `config.export.folder`.

    An earlier export of the same source is replaced; any other folder there is refused. With
    `config.export.check` nothing is written, and the folder is compared with transformers.
    """
    given, config = config, config_lib.resolve(config, workdir)
    settings = config.export
    folder = paths.local(settings.folder, "export.folder")
    if settings.check:
        parity.check(folder, config.data)
        return
    source = paths.absolute(settings.source)
    made_from = {
        "source": config_lib.portable(str(source), workdir),
        "run": contents.run_of(source) or contents.identity(source),
    }
    is_own = (folder / RECORD).is_file() and _is_of(folder, made_from, workdir)
    with files.new_folder(folder, replaces=is_own) as partial:
        write = _write_adapters if settings.adapters else _write_model
        measured = write(config, partial)
        card.write(config, partial)
        files.write_json(partial / parity.FILE, measured)
        # Asking the model shows it pictures as the data section says (stages/ask.py).
        trained = {name: config_lib.to_dict(getattr(given, name)) for name in ("model", "data")}
        files.write_json(partial / RECORD, {**made_from, **trained})
    logging.info("%s: exported from %s", folder, settings.source)


def _is_of(folder: Path, made_from: Mapping[str, str | None], workdir: str) -> bool:
    """Whether the export in a folder was made from this source, wherever that was then."""
    record = read_json(folder / RECORD)
    noted, source = record.get("source"), made_from["source"]
    # An older version noted an absolute path.
    is_named = noted in (source, config_lib.located(source or "", workdir))
    return is_named or (made_from["run"] is not None and record.get("run") == made_from["run"])


def _write_model(config: Config, folder: Path) -> dict[str, object]:
    """Writes the whole model; returns its parity file's content."""
    settings = config.export
    loaded = loading.load(settings.source, config)
    dtype = jnp.dtype(settings.dtype)
    params = jax.tree.map(lambda leaf: leaf.astype(dtype), loaded.params)
    loaded = dataclasses.replace(loaded, params={})  # held once
    source = epath.Path(settings.source)
    base = find_base(source, config.model.path) if stage_folder.is_stage(source) else None
    if base is not None:
        check_moved(params, base, config)
    size = settings.max_shard_gb * 1e9
    write_folder(
        params,
        loaded.model.config,
        loaded.folder,
        folder,
        dtype=settings.dtype,
        max_shard_bytes=size,
    )
    return parity.measure(loaded.model, {"params": params}, loaded.processor, config.data)


def find_base(source: epath.Path, model: str) -> str | None:
    """What the stage at `source` started from, `model` where that was moved there.

    None where it is another by now, such as a stage trained anew, and the checkpoints of `source`
    hold every parameter. Raises ValueError where they do not.
    """
    try:
        return stage_folder.find_weights(source, [model])
    except ValueError as error:
        if not stage_folder.read_source(source).complete:
            raise
        logging.warning("%s: not held against what it started from: %s", source, error)
        return None


def check_moved(params: Tree, base: str, config: Config) -> None:
    """Raises ValueError where a model, in the dtype of the export, is its base to the bit.

    So it is where nothing was learned, where adapters were left out, and where all that was learned
    is less than bfloat16 can tell.
    """
    settings = config.export
    before = loading.load(base, config, is_frozen=True).params
    dtype = jnp.dtype(settings.dtype)
    same = jax.tree.map(lambda new, old: bool((new == old.astype(dtype)).all()), params, before)
    if jax.tree.all(same):
        raise ValueError(
            f"{settings.source}: got the weights of {base} in {settings.dtype}, bit for bit, want "
            "others: was anything learned, and does export.dtype=float32 keep it?"
        )


def check_adapters(adapters: Tree, source: str) -> None:
    """Raises ValueError where adapters add nothing to their base, as before their first update."""
    learned = (leaf for path, leaf in tree.named_leaves(adapters) if path.endswith("/b"))
    if not any(bool((leaf != 0).any()) for leaf in learned):
        raise ValueError(
            f"{source}: got adapters that add nothing, every b is 0, want others: was anything "
            "learned?"
        )


def _write_adapters(config: Config, folder: Path) -> dict[str, object]:
    """Writes the adapters alone; returns the parity file's content of base and adapters."""
    adapters, size, base = loading.load_adapters(config.export.source, config)
    check_adapters(adapters, config.export.source)
    loaded = loading.load(base, config)
    peft.save(adapters, size, loaded.model.config, folder, base_model=base)
    variables = {"params": loaded.params, "adapters": adapters}
    return parity.measure(loaded.model, variables, loaded.processor, config.data)


def write_folder(
    params: Tree,
    config: ModelConfig,
    source_folder: str | Path,
    folder: Path,
    *,
    dtype: FloatType = "bfloat16",
    max_shard_bytes: float = 5e9,
) -> None:
    """Writes a model into a folder as transformers, vLLM and SGLang load it.

    Tokenizer, processor and generation files come from `source_folder`, and so do settings of its
    config.json that we do not read.

    Raises ValueError if the source lacks such a file (all of them listed) or the parameters do
    not fit the config; OSError naming the file if the disk is full.
    """
    side_files = _side_files(Path(source_folder))
    hf.save_params(params, config, folder, dtype=dtype, max_shard_bytes=max_shard_bytes)
    for name, content in side_files.items():
        files.write_bytes(folder / name, content)
    settings = read_json(Path(source_folder) / "config.json")
    files.write_json(folder / "config.json", _hf_config(settings, config, dtype))


def _hf_config(source: Json, config: ModelConfig, dtype: FloatType) -> Json:
    """The source's config.json (its eos_token_id and the like) with our part of it written anew."""
    written = source | config.to_hf()
    for section in ("text_config", "vision_config"):
        written[section] = source.get(section, {}) | written[section]
    for part in (written, written["text_config"], written["vision_config"]):
        part.pop("torch_dtype", None)  # the same under its older name
        part["dtype"] = dtype
    return written


def _side_files(source: Path) -> dict[str, bytes]:
    there = {n: (source / n).read_bytes() for n in SIDE_FILES if (source / n).is_file()}
    problems = [
        f"{' or '.join(any_of)}: not found" for any_of in WANTED if not there.keys() & set(any_of)
    ]
    if problems:
        raise files.problem_list(f"{source}: want the side files of a model", problems)
    settings = read_json(source / TOKENIZER)
    readable = for_all_readers(settings)
    if readable != settings:
        there[TOKENIZER] = (json.dumps(readable, indent=2, ensure_ascii=False) + "\n").encode()
    return there
