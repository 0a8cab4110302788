"""The results of a preflight as markdown: one row a program, then the step, then what to change."""

import dataclasses
from collections.abc import Sequence

from jax.sharding import Mesh

from mgsd_jax.config import Config
from mgsd_jax.parallel import axes
from mgsd_jax.parallel.chips import Chip


@dataclasses.dataclass(frozen=True)
class Result:
    """One program, compiled or not. Sizes in GiB a chip."""

    name: str  # 'distillation/update'
    compile_seconds: float
    compile_cpu_seconds: float  # of all threads of the compiler
    resident: float  # held meanwhile besides the program's own arguments
    flops: float  # of one chip in one call
    seconds: dict[str, float]  # arithmetic, memory, links, each at its peak
    tokens: int  # of the batch
    arguments: float | None = None  # None where the compiler gave up
    temporaries: float | None = None
    host: float | None = None  # in the host's memory, for one chip
    peak: float | None = None  # of the program, arguments included
    error: str | None = None  # the compiler's first words where it failed for another reason

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
    """The page. It says what fits, and where something does not, what to change."""
    sizes = " x ".join(f"{name} {size}" for name, size in mesh.shape.items())
    lines = [
        f"# Preflight: {config.model.path} on {config.preflight.topology}",
        "",
        f"`{command}`",
        "",
        f"{mesh.size} chips of {chip.name}, mesh {sizes}, remat {config.model.remat}, parameters "
        f"{config.model.param_dtype}. A chip has {chip.hbm_gib:g} GiB for programs. GiB a chip:",
        "",
        "| program | arguments | temporaries | peak | held besides | together | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    for result in results:
        numbers = (
            result.arguments,
            result.temporaries,
            result.peak,
            result.resident,
            result.total,
        )
        cells = ["-" if x is None else f"{x:.2f}" for x in numbers]
        lines.append(f"| {result.name} | {' | '.join(cells)} | {_verdict(result, chip)} |")
    lines += [
        "",
        "Least time of one call (arithmetic, memory traffic, links, each at its peak):",
        "",
    ]
    lines += [
        "| program | TFLOP a chip | arithmetic s | memory s | links s | roofline s | tokens "
        "| compile CPU s | compile wall s |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for result in results:
        parts = " | ".join(f"{result.seconds[k]:.3g}" for k in ("arithmetic", "memory", "links"))
        lines.append(
            f"| {result.name} | {result.flops / 1e12:.4g} | {parts} | {result.roofline:.3g} "
            f"| {result.tokens:,} | {result.compile_cpu_seconds:.0f} "
            f"| {result.compile_seconds:.0f} |"
        )
    lines += [
        "",
        "CPU time is that of all threads of the compiler; wall time also counts what else the "
        "machine did.",
        "",
    ]
    lines += [*_steps(config, results), "", *_advice(config, mesh, chip, results), ""]
    return "\n".join(lines)


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
    tensor = mesh.shape["tensor"]
    wider = [f"mesh.tensor={2 * tensor}"] if 2 * tensor <= min(8, mesh.size) else []
    more = [f"a slice of more than {mesh.size} chips"]
    if part != "update":
        settings = {"distillation": config.distillation, "evaluate": config.evaluate}[stage]
        rows, parts = settings.batch_size, axes.parts(mesh, axes.BATCH)
        fewer = [f"{stage}.batch_size={rows // 2}"] if rows % (2 * parts) == 0 else []
        shorter = [f"a smaller {stage}.sampling.max_new_tokens"]
        return [*wider, *fewer, *shorter, *more]
    if stage == "grounding":
        rows, now = config.grounding.batch_size, config.grounding.microbatches
    else:
        rows = config.distillation.batch_size * config.distillation.rollouts
        now = config.distillation.microbatches
    most = rows // axes.parts(mesh, axes.BATCH)
    finer = [k for k in range(now + 1, most + 1) if most % k == 0]
    changes = [f"{stage}.microbatches={finer[0]}"] if finer else []
    if config.model.remat != "full":
        changes.append("model.remat=full")
    changes += wider
    if config.model.param_dtype == "float32" and not getattr(config, stage).lora.rank:
        changes.append("model.param_dtype=bfloat16 (rounds stochastically)")
    return [*changes, *more]
