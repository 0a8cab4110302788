"""Compiles every program of a run for a machine that is not here: does it fit, how fast is it?

  python -m mgsd_jax.main --stage=preflight --config=configs/qwen3vl.py:8b --workdir=DIR \
      --set preflight.topology=v5e:4x4

libtpu compiles for a slice without a TPU, and JAX's plugin for CUDA for a GPU
(`preflight.topology=h100`). No weights are made or read. `preflight.json` and
`preflight.md` in the workdir hold the tables; they are rewritten after every program.
"""

import dataclasses
import functools
import json
import pathlib
import re
import shlex
import sys
import time

import jax
from absl import logging
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax.checks import fields
from mgsd_jax.config import Config
from mgsd_jax.data import buckets
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.data.processor import load_processor
from mgsd_jax.parallel import batches
from mgsd_jax.parallel.chips import Chip
from mgsd_jax.preflight import collectives, kept, targets
from mgsd_jax.preflight.lengths import typical
from mgsd_jax.preflight.programs import programs_of
from mgsd_jax.preflight.table import Compiled, Result, Typical, render

GIB = 2.0**30
# How libtpu 0.0.52 says that a program needs more memory than there is, in two wordings.
_TOO_LARGE = re.compile(
    r"memory required[^(]*\(([\d.]+)([KMGT])\) exceeds|Used ([\d.]+)([KMGT]) of [\d.]+\w hbm"
)
_UNITS = {"K": 2.0**-20, "M": 2.0**-10, "G": 1.0, "T": 2.0**10}


def run(config: Config, workdir: str) -> None:
    """Compiles the programs of `config.preflight.stages`; prints and saves the table.

    Raises ValueError for a topology that is not known, or a batch that does not split over
    the mesh. A program that does not fit, or on which the compiler fails, is a row of the table.
    """
    jax.config.update("jax_platforms", "cpu")  # leaves the TPU of this machine, if any, alone
    mesh = targets.target_mesh(config)
    chip = targets.find_chip(mesh)
    if config.preflight.hbm_gib:
        chip = dataclasses.replace(chip, hbm_gib=config.preflight.hbm_gib)
    check_batches(config, mesh)
    config = _fitted(config)

    folder = pathlib.Path(workdir)
    folder.mkdir(parents=True, exist_ok=True)
    version = " ".join(targets.compiler(mesh))
    compiled = _earlier(folder / "preflight.json", config, version)
    programs, steps = list(programs_of(config, mesh)), typical_steps(config, mesh)
    for program in programs:
        if config.preflight.only and program.name not in config.preflight.only:
            continue
        logging.info("preflight: compiles %s", program.name)
        decodes = program.work.loop is not None
        compiled[program.name] = ask_compiler(
            program.lower(), program.name, mesh, chip, decodes=decodes
        )
        results = [
            Result(one.name, one.resident / GIB, one.work, compiled.get(one.name, Compiled()))
            for one in programs
        ]
        content = {
            "config": config_lib.to_dict(config),
            "chip": dataclasses.asdict(chip),
            "mesh": dict(mesh.shape),
            "compiler": version,
            "results": {r.name: r.to_json(mesh, chip) for r in results if r.name in compiled},
        }
        (folder / "preflight.json").write_text(json.dumps(content, indent=1) + "\n")
        text = render(config, mesh, chip, results, steps, _command())
        (folder / "preflight.md").write_text(text)
    print((folder / "preflight.md").read_text())


def _fitted(config: Config) -> Config:
    """The config with numbers in place of 'auto', which need the tokenizer of `model.path`."""
    data = config.data
    given = (data.prompt_buckets, data.teacher_buckets, data.sequence_buckets, data.patch_buckets)
    if config_lib.AUTO not in given:
        return config
    encoder = load_encoder(data, load_processor(config.model.path))
    return dataclasses.replace(config, data=buckets.fitted(encoder, config).data)


def typical_steps(config: Config, mesh: Mesh) -> list[Typical]:
    """What every program has to do in the typical step, for each number of tokens kept a pass."""
    found = []
    for count in config.preflight.kept_a_pass:
        lengths = typical(config, count)
        works = {program.name: program.work for program in programs_of(config, mesh, lengths)}
        found.append(Typical(lengths, works))
    return found


def _command() -> str:
    """The command line without `preflight.only`: the table holds all programs in the end."""
    words: list[str] = []
    for word in sys.argv[1:]:
        if not re.match(r"(--set=)?\s*preflight\.only\s*=", word):
            words.append(word)
        elif words and words[-1] == "--set":
            words.pop()
    return "python -m mgsd_jax.main " + " ".join(map(shlex.quote, words))


def _earlier(file: pathlib.Path, config: Config, version: str) -> dict[str, Compiled]:
    """What this compiler said in an earlier run with this config, `preflight.only` aside."""
    if not file.is_file():
        return {}
    found, mine = fields.read_json(file), config_lib.to_dict(config)
    theirs, results = (fields.field(found, name, dict, file) for name in ("config", "results"))
    for values in (mine["preflight"], fields.field(theirs, "preflight", dict, file)):
        values.pop("only", None)
    if theirs != mine or found.get("compiler") != version:
        return {}
    names = {field.name for field in dataclasses.fields(Compiled)}
    if any(not isinstance(values, dict) or not names <= set(values) for values in results.values()):
        return {}  # of another version of this program
    return {name: Compiled(**{key: of[key] for key in names}) for name, of in results.items()}


def check_batches(config: Config, mesh: Mesh) -> None:
    """Raises ValueError if a training batch, or a microbatch, does not split over the mesh."""
    for stage in config.preflight.stages:
        if stage == "grounding":
            rows, parts = config.grounding.batch_size, config.grounding.microbatches
        elif stage == "distillation":
            settings = config.distillation
            rows, parts = settings.batch_size * settings.rollouts, settings.microbatches
        else:
            continue
        batches.check_batch(mesh, f"{stage}.batch_size", rows, parts)


def ask_compiler(
    lowered: jax.stages.Lowered, name: str, mesh: Mesh, chip: Chip, *, decodes: bool = False
) -> Compiled:
    """What the compiler reports about a program, now or before; its failure is a result too."""
    started, worked = time.perf_counter(), time.process_time()
    # The program itself does not name the chips that it is compiled for.
    parts = ", ".join(field.name for field in dataclasses.fields(Compiled))
    devices = f"{chip.name}, sides {collectives.sides(mesh)}; {parts}"
    package, _ = targets.compiler(mesh)
    compiler = functools.partial(_compile, mesh=mesh, chip=chip, decodes=decodes)
    try:
        return Compiled(error=None, **kept.ask(lowered, name, devices, package, compiler))
    except jax.errors.JaxRuntimeError as problem:
        error = str(problem).splitlines()[0]
        return Compiled(error=error, **_seconds_since(started, worked))


def _compile(
    lowered: jax.stages.Lowered, mesh: Mesh, chip: Chip, *, decodes: bool
) -> dict[str, float]:
    """The numbers of a `Compiled`; of a program that is too large, its peak.

    Only a program that decodes is asked for its text: of some others, for v6e, v5p and tpu7x,
    libtpu 0.0.52 gives one that JAX 0.10.2 cannot read.
    """
    started, worked = time.perf_counter(), time.process_time()
    try:
        compiled = lowered.compile()
        memory = compiled.memory_analysis()
        assert memory is not None
        said = {
            "arguments": memory.argument_size_in_bytes / GIB,
            "temporaries": memory.temp_size_in_bytes / GIB,
            "host": memory.host_temp_size_in_bytes / GIB,
            "peak": memory.peak_memory_in_bytes / GIB,
        }
        if decodes:
            text = compiled.as_text() or ""
            said |= dataclasses.asdict(collectives.a_pass(text, mesh, chip))
    except jax.errors.JaxRuntimeError as problem:
        found = _TOO_LARGE.search(str(problem))
        if found is None:
            raise
        number, unit = [group for group in found.groups() if group is not None]
        said = {"peak": float(number) * _UNITS[unit]}
    return said | _seconds_since(started, worked)


def _seconds_since(started: float, worked: float) -> dict[str, float]:
    return {
        "compile_seconds": time.perf_counter() - started,
        "compile_cpu_seconds": time.process_time() - worked,
    }
