"""The results of a preflight as markdown: a row for each program, the steps, and what to change."""

import dataclasses
from collections.abc import Mapping, Sequence

from jax.sharding import Mesh

from mgsd_jax.config import Config, DistillationConfig, EvaluateConfig
from mgsd_jax.parallel import axes
from mgsd_jax.parallel.chips import Chip
from mgsd_jax.preflight import lengths
from mgsd_jax.preflight.collectives import Waits, sides
from mgsd_jax.preflight.lengths import Lengths
from mgsd_jax.preflight.roofline import Work, roofline


@dataclasses.dataclass(frozen=True)
class Compiled:
    """What the compiler said of a program, if it was asked. GiB a chip; None if it gave up."""

    compile_seconds: float = 0.0
    compile_cpu_seconds: float = 0.0  # of all threads of the compiler
    arguments: float | None = None
    temporaries: float | None = None
    host: float | None = None  # in the host's memory, for one chip
    peak: float | None = None  # of the program, arguments included
    error: str | None = None  # the compiler's first line if it failed for another reason
    # The `Waits` of a pass of a decode loop.
    collectives: float = 0.0
    hops: float = 0.0
    link_bytes: float = 0.0

    @property
    def waits(self) -> Waits:
        return Waits(self.collectives, self.hops, self.link_bytes)


@dataclasses.dataclass(frozen=True)
class Result:
    """One program, compiled or not."""

    name: str  # 'distillation/update'
    resident: float  # GiB of arrays that are held meanwhile but are not its arguments
    work: Work  # of one chip in one call, in the longest step
    compiled: Compiled

    @property
    def total(self) -> float | None:
        """The most GiB that a chip holds while the program runs."""
        return None if self.compiled.peak is None else self.compiled.peak + self.resident

    def seconds(self, mesh: Mesh, chip: Chip) -> dict[str, float]:
        """As `Work.seconds`, in the longest step."""
        return self.work.seconds(chip, sides(mesh), self.compiled.waits.seconds(chip))

    def to_json(self, mesh: Mesh, chip: Chip) -> dict[str, object]:
        """All numbers of a program, flat."""
        return {
            "resident": self.resident,
            "flops": self.work.flops,
            "tokens": self.work.tokens,
            "seconds": self.seconds(mesh, chip),
            **dataclasses.asdict(self.compiled),
        }

    @property
    def is_compiled(self) -> bool:
        return self.total is not None or self.compiled.error is not None

    @property
    def waits_unseen(self) -> bool:
        """Whether it decodes, and no compiled program says what it waits for."""
        return self.work.loop is not None and self.compiled.temporaries is None

    def fits(self, chip: Chip) -> bool:
        return self.total is not None and self.total <= chip.hbm_gib


@dataclasses.dataclass(frozen=True)
class Typical:
    """A typical step: its lengths, and what each program has to do in it."""

    lengths: Lengths
    works: Mapping[str, Work]  # by the name of the program


def render(
    config: Config,
    mesh: Mesh,
    chip: Chip,
    results: Sequence[Result],
    typical: Sequence[Typical],
    command: str,
) -> str:
    """The page: what fits, how long it takes at least, and what to change if something does not."""
    shape = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    chips = "1 chip" if mesh.size == 1 else f"{mesh.size} chips"
    lines = [
        f"# Preflight: {config.model.path} on {config.preflight.topology}",
        "",
        f"`{command}`",
        "",
        f"{chips} of {chip.name}, mesh {shape}, remat {config.model.remat}, parameters "
        f"{config.model.param_dtype}. A chip has {chip.hbm_gib:g} GiB for programs. GiB a chip:",
        "",
        *_table(
            "program, arguments, temporaries, peak, held besides, together, verdict",
            [(r.name, *_sizes(r), _verdict(r, chip)) for r in results],
        ),
        "",
        "## The longest step",
        "",
        "The longest buckets, and every response as long as it may be, one token a pass. Least "
        "time of one call: the longest of arithmetic, memory traffic and links, each at its peak, "
        "and what passes of decoding wait for collectives:",
        "",
        *_table(
            "program, TFLOP a chip, arithmetic s, memory s, links s, waits s, roofline s, tokens, "
            "compile CPU s, compile wall s",
            [(r.name, *_times(r, mesh, chip)) for r in results],
        ),
        "",
        "CPU time is that of all threads of the compiler; wall time also counts what else the "
        "machine did.",
        "",
        *_steps(config, mesh, chip, results),
        "",
        *typical_step(config, mesh, chip, results, typical),
        "",
        *_advice(config, mesh, chip, results),
        "",
    ]
    return "\n".join(lines)


def _table(head: str, rows: Sequence[Sequence[str]]) -> list[str]:
    """The lines of a markdown table; `head` holds the names of the columns."""
    columns = head.split(", ")
    lines = ["| " + " | ".join(cells) + " |" for cells in (columns, *rows)]
    return [lines[0], "|" + "---|" * len(columns), *lines[1:]]


def _sizes(result: Result) -> list[str]:
    made = result.compiled
    found = (made.arguments, made.temporaries, made.peak, result.resident, result.total)
    return ["-" if size is None else f"{size:.2f}" for size in found]


def _times(result: Result, mesh: Mesh, chip: Chip) -> list[str]:
    seconds = result.seconds(mesh, chip)
    taken = (result.compiled.compile_cpu_seconds, result.compiled.compile_seconds)
    return [
        f"{result.work.flops / 1e12:.4g}",
        *(f"{seconds[part]:.3g}" for part in ("arithmetic", "memory", "links")),
        "-" if result.waits_unseen else f"{seconds['waits']:.3g}",
        f"{roofline(seconds):.3g}",
        f"{result.work.tokens:,}",
        *(f"{time:.0f}" if result.is_compiled else "-" for time in taken),
    ]


def _verdict(result: Result, chip: Chip) -> str:
    if result.compiled.error is not None:
        return f"compiler fault: {result.compiled.error}"
    if not result.is_compiled:
        return "not compiled"
    return "fits" if result.fits(chip) else "**does not fit**"


def _steps(config: Config, mesh: Mesh, chip: Chip, results: Sequence[Result]) -> list[str]:
    """A sentence for each stage: the tokens of a step (or batch), and its programs' rooflines."""
    lines = []
    for stage in config.preflight.stages:
        mine = {r.name.split("/")[1]: r for r in results if r.name.startswith(f"{stage}/")}
        seconds = sum(roofline(result.seconds(mesh, chip)) for result in mine.values())
        done = {"decode": "samples", "update": "reads"}
        tokens = [f"{done[part]} {mine[part].work.tokens:,}" for part in done if part in mine]
        if tokens:
            lines.append(
                f"- {stage}: {' and '.join(tokens)} tokens; {' + '.join(mine)} take at least "
                f"{seconds:.3g} s."
            )
    return lines


def typical_step(
    config: Config,
    mesh: Mesh,
    chip: Chip,
    results: Sequence[Result],
    typical: Sequence[Typical],
) -> list[str]:
    """The second part of the page: the programs' rooflines in a step of typical lengths."""
    lines = [
        "## The typical step",
        "",
        f"{lengths.ROWS} boards of configs/qwen3vl.py and right responses to them, in the tokens "
        f"of Qwen3-VL (`benchmarks/tokens.py`): a response has {lengths.RESPONSE} tokens, the "
        f"longest of the batch {lengths.LONGEST_RESPONSE}. Least times as above, of the programs "
        "for the buckets that this takes.",
        "",
    ]
    made = {result.name: result for result in results}
    for stage in config.preflight.stages:
        rows = [_row(stage, step, made, mesh, chip) for step in typical]
        if not rows or not all(rows):
            lines.append(f"- {stage}: its decode is not compiled.")
        elif stage == "grounding":
            size, seconds = typical[0].lengths.record, rows[0][-1]
            lines.append(f"- {stage}: records of {size} tokens; update takes at least {seconds} s.")
        else:
            waits = made[f"{stage}/decode"].compiled.waits
            lines += [
                f"- {stage}: {_buckets(stage, typical[0].lengths)}. A pass of decoding waits for "
                f"{waits.collectives:g} collectives over {waits.hops:g} hops between chips, "
                f"{waits.seconds(chip) * 1e3:.3g} ms.",
                "",
                *_table(
                    "tokens kept a pass, passes, slots of the cache, "
                    + "".join(f"{name.split('/')[1]} s, " for name in _mine(stage, typical[0]))
                    + "together s",
                    list(dict.fromkeys(map(tuple, rows))),  # without drafts all are the same
                ),
                "",
            ]
    return lines


def _mine(stage: str, step: Typical) -> list[str]:
    return [name for name in step.works if name.startswith(f"{stage}/")]


def _buckets(stage: str, size: Lengths) -> str:
    said = f"prompts of {size.prompt} tokens"
    if stage == "evaluate":
        return said
    return f"{said}, the teacher's of {size.teacher}, responses cut to {size.response}"


def _row(
    stage: str, step: Typical, made: Mapping[str, Result], mesh: Mesh, chip: Chip
) -> list[str]:
    """The cells of a step of a stage; none if what its passes wait for is not known."""
    cells, together = [], 0.0
    for name in _mine(stage, step):
        if made[name].waits_unseen:
            return []
        work = step.works[name]
        wait = made[name].compiled.waits.seconds(chip)
        least = roofline(work.seconds(chip, sides(mesh), wait))
        together += least
        cells.append(f"{least:.3g}")
        if work.loop is not None:
            loop = [f"{work.loop.kept:g}", f"{work.loop.passes:,}", f"{work.loop.slots:,}"]
            cells = [*loop, *cells]
    return [*cells, f"{together:.3g}"]


def _advice(config: Config, mesh: Mesh, chip: Chip, results: Sequence[Result]) -> list[str]:
    missing = [result.name for result in results if not result.is_compiled]
    bad = [result for result in results if result.is_compiled and not result.fits(chip)]
    if missing and not bad:
        return [f"Not compiled: {', '.join(missing)}. Everything else fits."]
    if not bad:
        return ["Everything fits."]
    lines = ["What to change:", ""]
    for result in bad:
        if result.compiled.error is not None:
            lines.append(f"- {result.name}: the compiler failed, {result.compiled.error}")
            continue
        assert result.total is not None
        stage, part = result.name.split("/")
        lines.append(
            f"- {result.name} needs {result.total - chip.hbm_gib:.2f} GiB less a chip. In this "
            f"order: {'; '.join(_changes(config, mesh, stage, part))}."
        )
    return lines


def _changes(config: Config, mesh: Mesh, stage: str, part: str) -> list[str]:
    """Settings that make a program smaller, the cheapest first."""
    tensor, parts = mesh.shape["tensor"], axes.parts(mesh, axes.BATCH)
    wider = [f"mesh.tensor={2 * tensor}"] if 2 * tensor <= min(8, mesh.size) else []
    is_gpu = mesh.devices.flat[0].platform == "gpu"
    more = ["a larger GPU" if is_gpu else f"a slice of more than {mesh.size} chips"]
    settings = {
        "grounding": config.grounding,
        "distillation": config.distillation,
        "evaluate": config.evaluate,
    }[stage]
    rows = settings.batch_size
    if isinstance(settings, EvaluateConfig) or part != "update":
        fewer = [f"{stage}.batch_size={rows // 2}"] if rows % (2 * parts) == 0 else []
        return [*wider, *fewer, f"a smaller {stage}.sampling.max_new_tokens", *more]
    if isinstance(settings, DistillationConfig):
        rows *= settings.rollouts
    finer = [
        k for k in range(settings.microbatches + 1, rows // parts + 1) if rows // parts % k == 0
    ]
    changes = [f"{stage}.microbatches={finer[0]}"] if finer else []
    if config.model.remat != "full":
        changes.append("model.remat=full")
    changes += wider
    if config.model.param_dtype == "float32" and not settings.lora.rank:
        changes.append("model.param_dtype=bfloat16 (rounds stochastically)")
    return [*changes, *more]
