"""The results of a preflight as markdown: a row for each program, the steps, and what to change."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from mgsd_jax.config import Config, DistillationConfig, EvaluateConfig
from mgsd_jax.parallel import axes
from mgsd_jax.parallel.chips import Chip


@dataclasses.dataclass(frozen=True)
class Result:
    """One program, compiled or not. Sizes in GiB a chip."""

    name: str  # 'distillation/update'
    compile_seconds: float
    compile_cpu_seconds: float  # of all threads of the compiler
    resident: float  # of arrays that are held meanwhile but are not its arguments
    flops: float  # of one chip in one call
    seconds: dict[str, float]  # arithmetic, memory, links, each at its peak
    tokens: int  # of the batch
    arguments: float | None = None  # None if the compiler gave up
    temporaries: float | None = None
    host: float | None = None  # in the host's memory, for one chip
    peak: float | None = None  # of the program, arguments included
    error: str | None = None  # the compiler's first line if it failed for another reason

    @property
    def total(self) -> float | None:
        """The most that a chip holds while the program runs."""
        return None if self.peak is None else self.peak + self.resident

    @property
    def roofline(self) -> float:
        """Seconds, at least."""
        return max(self.seconds.values())

    def fits(self, chip: Chip) -> bool:
        return self.total is not None and self.total <= chip.hbm_gib

    def verdict(self, chip: Chip) -> str:
        if self.error is not None:
            return "compiler fault"
        return f"{'fits' if self.fits(chip) else 'does not fit'} ({self.total:.2f} GiB)"


def render(config: Config, mesh: Mesh, chip: Chip, results: Sequence[Result], command: str) -> str:
    """The page: what fits, how long it takes at least, and what to change if something does not."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"# Preflight: {config.model.path} on {config.preflight.topology}",
        "",
        f"`{command}`",
        "",
        f"{mesh.size} chips of {chip.name}, mesh {sizes}, remat {config.model.remat}, parameters "
        f"{config.model.param_dtype}. A chip has {chip.hbm_gib:g} GiB for programs. GiB a chip:",
        "",
        *_table(
            "program, arguments, temporaries, peak, held besides, together, verdict",
            [(r.name, *_sizes(r), _verdict(r, chip)) for r in results],
        ),
        "",
        "Least time of one call (arithmetic, memory traffic, links, each at its peak):",
        "",
        *_table(
            "program, TFLOP a chip, arithmetic s, memory s, links s, roofline s, tokens, "
            "compile CPU s, compile wall s",
            [(r.name, *_times(r)) for r in results],
        ),
        "",
        "CPU time is that of all threads of the compiler; wall time also counts what else the "
        "machine did.",
        "",
        *_steps(config, results),
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
    found = (result.arguments, result.temporaries, result.peak, result.resident, result.total)
    return ["-" if size is None else f"{size:.2f}" for size in found]


def _times(result: Result) -> list[str]:
    return [
        f"{result.flops / 1e12:.4g}",
        *(f"{result.seconds[part]:.3g}" for part in ("arithmetic", "memory", "links")),
        f"{result.roofline:.3g}",
        f"{result.tokens:,}",
        f"{result.compile_cpu_seconds:.0f}",
        f"{result.compile_seconds:.0f}",
    ]


def _verdict(result: Result, chip: Chip) -> str:
    if result.error is not None:
        return f"compiler fault: {result.error}"
    return "fits" if result.fits(chip) else "**does not fit**"


def _steps(config: Config, results: Sequence[Result]) -> list[str]:
    """A sentence for each stage: the tokens of a step (or batch), and its programs' rooflines."""
    lines = []
    for stage in config.preflight.stages:
        mine = {r.name.split("/")[1]: r for r in results if r.name.startswith(f"{stage}/")}
        seconds = sum(result.roofline for result in mine.values())
        done = {"decode": "samples", "update": "reads"}
        tokens = [f"{done[part]} {mine[part].tokens:,}" for part in done if part in mine]
        if tokens:
            lines.append(
                f"- {stage}: {' and '.join(tokens)} tokens; {' + '.join(mine)} take at least "
                f"{seconds:.3g} s."
            )
    return lines


def _advice(config: Config, mesh: Mesh, chip: Chip, results: Sequence[Result]) -> list[str]:
    bad = [result for result in results if not result.fits(chip)]
    if not bad:
        return ["Everything fits."]
    lines = ["What to change:", ""]
    for result in bad:
        if result.error is not None:
            lines.append(f"- {result.name}: the compiler failed, {result.error}")
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
    more = [f"a slice of more than {mesh.size} chips"]
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
