"""A trained model as a Hugging Face folder, and its adapters alone as a PEFT folder."""

import json
import shutil
from pathlib import Path

import jax
from absl import logging

from mgsd_jax import config as config_lib
from mgsd_jax import loading, paths
from mgsd_jax.config import Config
from mgsd_jax.model import files, hf, lora
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.files import FloatType
from mgsd_jax.model.table import Tree

# Tokenizer, processor and generation files as transformers 4.57 and 5 name them: copied as they
# are. At least one file of every set in WANTED must be there for a reader to work.
SIDE_FILES = (
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
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
    ("generation_config.json",),
    ("tokenizer.json", "vocab.json"),
    ("tokenizer_config.json",),
    ("preprocessor_config.json", "processor_config.json"),
)


def run(config: Config, workdir: str) -> None:
    """Writes the model at `config.export.source` to `config.export.folder`.

    An earlier export of the same source is replaced; any other folder there is refused.
    """
    settings = config.export
    loaded = loading.load(settings.source, config, workdir)
    folder = paths.local(config_lib.resolve(settings.folder, config, workdir), "export.folder")
    record = {"source": config_lib.resolve(settings.source, config, workdir)}
    if (folder / RECORD).is_file() and json.loads((folder / RECORD).read_text()) == record:
        shutil.rmtree(folder)
    export_folder(
        loaded.params,
        loaded.model.config,
        loaded.folder,
        folder,
        dtype=settings.dtype,
        max_shard_bytes=settings.max_shard_gb * 1e9,
    )
    files.write_json(folder / RECORD, record)
    logging.info("%s: exported from %s", folder, record["source"])


def export_folder(
    params: Tree,
    config: ModelConfig,
    source_folder: str | Path,
    out_folder: str | Path,
    *,
    dtype: FloatType = "bfloat16",
    max_shard_bytes: float = 5e9,
    adapters: Tree | None = None,
) -> None:
    """Write a new folder that transformers, vLLM and SGLang load, all of it or nothing.

    `adapters` are merged into the weights. Tokenizer, processor and generation files come from
    `source_folder`. All processes take part, the first one writes.

    Raises ValueError where the source lacks such a file (all of them listed), the folder is there
    already or the parameters do not fit the config; OSError naming the file where the disk is
    full.
    """
    source, out = Path(source_folder), Path(out_folder)
    side_files = _side_files(source)
    if adapters is not None:
        params = lora.merge(params, adapters)
    if jax.process_index() != 0:
        hf.save_params(params, config, out, dtype=dtype, max_shard_bytes=max_shard_bytes)
        return
    with files.new_folder(out) as partial:
        hf.save_params(params, config, partial, dtype=dtype, max_shard_bytes=max_shard_bytes)
        for file in side_files:
            files.write_bytes(partial / file.name, file.read_bytes())
        files.write_json(partial / "config.json", config.to_hf() | {"dtype": dtype})


def export_adapters(
    adapters: Tree,
    spec: lora.LoraSpec,
    config: ModelConfig,
    source_folder: str | Path,
    out_folder: str | Path,
) -> None:
    """Write the adapters alone as a new PEFT folder on top of the model in `source_folder`."""
    lora.save_peft(adapters, spec, config, out_folder, base_model=str(source_folder))


def _side_files(source: Path) -> list[Path]:
    there = [source / name for name in SIDE_FILES if (source / name).is_file()]
    names = {file.name for file in there}
    problems = [f"got no {' or '.join(any_of)}" for any_of in WANTED if not names & set(any_of)]
    if problems:
        raise files.problem_list(f"{source}: want the side files of a model", problems)
    return there
