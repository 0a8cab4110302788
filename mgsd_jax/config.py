"""Typed, frozen settings of every stage, and overrides of them from the command line.

A config file defines `get_config() -> Config`. Every stage reads the sections it needs from one
`Config`. Paths may hold `{workdir}`, which stands for the `--workdir` of the run.
"""

import ast
import dataclasses
import json
import types
import typing
from collections.abc import Sequence
from typing import Any, Literal, get_args, get_origin

Task = Literal["frozenlake", "maze", "minibehaviour"]
Record = Literal["questions", "cells", "plan_from_text", "plan_from_picture"]
TeacherContext = Literal["state", "state_and_plan", "state_and_all_optimal_plans"]
Segment = Literal["state", "sentence", "plan", "format"]  # parts of a response
Mode = Literal["picture", "text", "blind", "perception"]
Benchmark = Literal[
    "frozenlake_vsp",
    "frozenlake_visualplanning",
    "minibehaviour_visualplanning",
    "maze_visualplanning",
    "maze_held_out",  # mazes of a test split of ours, in place of the file that is not public
]


@dataclasses.dataclass(frozen=True)
class LevelSet:
    """Boards of one task: the levels, and how many of each in the train, val and test splits."""

    task: Task
    levels: tuple[int, ...]
    train: int
    val: int
    test: int


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which weights to start from, and how to compute with them."""

    path: str  # Hugging Face folder
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    remat: Literal["none", "full", "save_names", "offload"] = "full"  # see model/remat.py


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out; a size of -1 takes what the others leave.

    A run may go on under another mesh: what is computed does not depend on it.
    """

    data: int = 1  # copies of the parameters, each with a part of the batch: one a slice
    fsdp: int = -1  # splits parameters and batch
    tensor: int = 1  # splits the widths of the layers, and the heads


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Boards and how they become batches. Lengths are in tokens, pictures in pixels."""

    boards: tuple[LevelSet, ...]
    folder: str = "{workdir}/data"  # written by --stage=generate
    source: Literal["folder", "stream"] = "folder"  # stream draws boards on the fly
    picture_size: int = 256  # side of a square picture; 0: cell_pixels * level
    cell_pixels: int = 0
    channels: tuple[int, int, int] = (0, 1, 2)  # any other order: colours as no board has them
    sprites: Literal["usual", "other"] = "usual"  # other: things drawn as no board has them
    exclude: tuple[str, ...] = ()  # benchmark folders whose boards never enter a split
    prompts: str = ""  # folder of text files that replace prompts; '' keeps the built-in ones
    prompt_buckets: tuple[int, ...] = (512, 1024)  # student prompt lengths, pictures included
    teacher_buckets: tuple[int, ...] = (512, 1024, 2048)
    sequence_buckets: tuple[int, ...] = (1024, 2048)  # grounding: prompt and answer
    patch_buckets: tuple[int, ...] = (256,)
    workers: int = 1  # read-ahead threads of the loader


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; rank 0 trains the parameters themselves."""

    rank: int = 0
    alpha: float = 16.0
    targets: str = r"language/.*/(q|k|v|o|gate|up|down)_proj"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up and a schedule."""

    lr: float
    schedule: Literal["constant", "cosine"] = "constant"
    warmup: float = 0.0  # share of the steps
    b1: float = 0.9
    b2: float = 0.999
    weight_decay: float = 0.0
    clip: float = 1.0
    trainable: str = ".*"  # regex over parameter paths; the rest stays frozen


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. Steps."""

    every: int = 200
    keep_last: int = 2
    keep_best: int = 1
    use: Literal["last", "best"] = "last"  # which one later stages load


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a training run stops, and above which measures of a step it warns.

    A run may go on under other values. The reference answers reach 0.61 repeated (Maze level 6),
    healthy nano runs start at a first_kl of 2.1 nats; float32 keeps the logprob_gap below 1e-4.
    """

    skipped_in_a_row: int = 10  # updates with a loss or gradient that is not finite, then it stops
    truncated: float = 0.05  # share of rollouts without an end token
    repeated: float = 0.7  # mean share of a response's 4-grams that stood in it before
    first_kl: float = 3.0  # nats, mean over the first four positions of the responses
    logprob_gap: float = 0.05  # nats, mean |sampler's - training's| of the sampled tokens


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    max_new_tokens: int = 2048
    temperature: float = 1.0  # 0: greedy
    top_p: float = 1.0
    top_k: int = 0  # 0: off


@dataclasses.dataclass(frozen=True)
class GroundingConfig:
    """Stage 1: supervised records."""

    optim: OptimConfig
    lora: LoraConfig = LoraConfig()
    student: str = "{model}"  # '{model}', a Hugging Face folder, or the workdir of a stage
    steps: int = 828
    batch_size: int = 64
    microbatches: int = 1
    token_chunk: int = 2048  # tokens whose logits are held at once
    mixture: tuple[tuple[Record, float], ...] = (("questions", 1.0),)
    eval_every: int = 100  # steps between validations of the loss
    eval_batches: int = 4


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Stage 2: on-policy distillation from the text-reading teacher."""

    optim: OptimConfig
    lora: LoraConfig = LoraConfig()
    student: str = "{workdir}/grounding"
    teacher: str = "{model}"
    teacher_context: TeacherContext = "state_and_plan"
    teacher_decay: float = 0.0  # above 0 the teacher is this moving average of the student instead
    teacher_noise: float = 0.0  # share of the facts that the teacher is told wrong
    teacher_board: Literal["same", "other"] = "same"  # other: a control, another board's state
    objective: Literal["reverse_kl", "forward_kl", "jsd", "sampled_reverse_kl"] = "reverse_kl"
    jsd_teacher_weight: float = 0.5  # read by objective='jsd' only
    forward_kl_mix: float = 0.0
    token_chunk: int = 2048
    token_kl_cap: float = 0.0  # nats, 0: off
    token_weights: tuple[tuple[Segment, float], ...] = ()  # of parts of a response; 1 unless told
    reference_share: float = 0.0  # of the rows: a right response in place of the student's own
    sampling: SamplingConfig = SamplingConfig()
    steps: int = 1400
    batch_size: int = 32  # prompts a step
    rollouts: int = 1  # per prompt
    microbatches: int = 1
    eval_every: int = 20
    eval_boards: int = 96  # boards of the validation split


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on which boards, and who answers."""

    models: tuple[tuple[str, str], ...]  # (name, Hugging Face folder or workdir of a stage)
    modes: tuple[Mode, ...] = ("picture", "text", "blind", "perception")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    tries: int = 1  # answers sampled for each board and mode, for pass@k
    batch_size: int = 32
    reference: str = "base"  # the model whose text planning is the upper bound
    reference_only: tuple[Mode, ...] = ()  # modes that only the reference answers
    folder: str = "{workdir}/evaluate"
    benchmarks: tuple[tuple[Benchmark, str], ...] = ()  # (name, folder); (): the test split of data
    endpoint: str = ""  # URL of an OpenAI-compatible API, which then answers instead of `models`
    endpoint_models: tuple[str, ...] = ()  # names it serves; () is its one model
    endpoint_key: str = "OPENAI_API_KEY"  # environment variable that holds the key
    endpoint_workers: int = 8  # requests at once
    endpoint_retries: int = 3
    endpoint_seconds: float = 120.0  # how long a request may take


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What the report compares."""

    runs: tuple[str, ...] = ()  # workdirs or evaluation folders; (): the workdir alone
    model: str = ""  # the model that stands for its run; '' is the last of base .. distilled


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to write out for transformers, vLLM and SGLang."""

    source: str = "{workdir}/distillation"
    folder: str = "{workdir}/export"
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    max_shard_gb: float = 5.0


@dataclasses.dataclass(frozen=True)
class PreflightConfig:
    """Which programs --stage=preflight compiles, and for which TPU slice."""

    topology: str = "v5e:4x4"  # as libtpu names it
    stages: tuple[Literal["grounding", "distillation", "evaluate"], ...] = (
        "grounding",
        "distillation",
    )
    only: tuple[str, ...] = ()  # programs such as 'distillation/update'; (): all of the stages'
    hbm_gib: float = 0.0  # memory of a chip; 0: what libtpu leaves to programs


@dataclasses.dataclass(frozen=True)
class NanoConfig:
    """Shape of the nano model that --stage=init writes with random weights."""

    folder: str
    width: int = 128
    layers: int = 4
    heads: int = 4
    kv_heads: int = 2
    head_width: int = 32
    mlp: int = 384
    vision_width: int = 96
    vision_layers: int = 3
    vision_heads: int = 3
    vision_mlp: int = 384
    deepstack: tuple[int, ...] = (0, 1)
    patch: int = 16
    max_level: int = 8  # largest board whose cells are single tokens


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that a run depends on."""

    model: ModelConfig
    data: DataConfig
    grounding: GroundingConfig
    distillation: DistillationConfig
    evaluate: EvaluateConfig
    export: ExportConfig = ExportConfig()
    report: ReportConfig = ReportConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    preflight: PreflightConfig = PreflightConfig()
    guards: GuardConfig = GuardConfig()
    nano: NanoConfig | None = None
    seed: int = 0


def resolve(path: str, config: Config, workdir: str) -> str:
    """The path with `{workdir}` and `{model}` filled in."""
    return path.replace("{model}", config.model.path).replace("{workdir}", workdir)


def override(config: Any, assignments: Sequence[str]) -> Any:
    """A copy of `config` with 'a.b=value' assignments applied, left to right.

    Values are Python literals (`1e-4`, `(3, 4)`, `None`) or bare strings, for a tuple of strings
    several with commas between them. Raises ValueError for an unknown field (listing the known
    ones) and for a value of the wrong type.

    >>> override(OptimConfig(lr=1.0), ['lr=1e-4']).lr
    0.0001
    """
    for assignment in assignments:
        name, separator, text = assignment.partition("=")
        if not separator:
            raise ValueError(f"--set: got {assignment!r}, want a.b=value")
        config = _replace(config, name.strip().split("."), text.strip(), name.strip())
    return config


def _replace(config: Any, path: list[str], text: str, full: str) -> Any:
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise ValueError(f"--set {full}: {type(config).__name__} has no field {path[0]!r}")
    hints = typing.get_type_hints(type(config))
    if path[0] not in hints:
        raise ValueError(f"--set {full}: no field {path[0]!r}, want one of {sorted(hints)}")
    if len(path) > 1:
        value = _replace(getattr(config, path[0]), path[1:], text, full)
    else:
        value = _parse(text, hints[path[0]], full)
    return dataclasses.replace(config, **{path[0]: value})


def _parse(text: str, kind: Any, full: str) -> Any:
    if kind is str:
        return text[1:-1] if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"" else text
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = {"true": True, "false": False}.get(text, text)
    if isinstance(value, str) and get_origin(kind) is tuple and get_args(kind) == (str, ...):
        value = tuple(part.strip() for part in value.split(",") if part.strip())
    return coerce(value, kind, f"--set {full}")


def coerce(value: Any, kind: Any, where: str) -> Any:
    """`value` as type `kind`, or a ValueError that names `where`, what was got and what wanted."""
    wrong = ValueError(f"{where}: got {value!r}, want {_spell(kind)}")
    origin = get_origin(kind)
    if origin is Literal:
        if value not in get_args(kind):
            raise wrong
        return value
    if origin in (types.UnionType, typing.Union):
        options = get_args(kind)
        if value is None and type(None) in options:
            return None
        return coerce(value, next(k for k in options if k is not type(None)), where)
    if origin is tuple:
        if not isinstance(value, list | tuple):
            raise wrong
        kinds = get_args(kind)
        if len(kinds) == 2 and kinds[1] is Ellipsis:
            return tuple(coerce(item, kinds[0], where) for item in value)
        if len(kinds) != len(value):
            raise wrong
        return tuple(coerce(item, k, where) for item, k in zip(value, kinds, strict=True))
    if dataclasses.is_dataclass(kind):
        return _build(value, kind, where, wrong)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise wrong
    return value


def _build(value: Any, kind: Any, where: str, wrong: ValueError) -> Any:
    if isinstance(value, kind):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(kind)}
    if not isinstance(value, dict):
        raise wrong
    hints = typing.get_type_hints(kind)
    unknown = sorted(set(value) - set(hints))
    if unknown:
        raise ValueError(f"{where}: no field {unknown}, want some of {sorted(hints)}")
    try:
        return kind(**{k: coerce(v, hints[k], f"{where}.{k}") for k, v in value.items()})
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from None


def _spell(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {get_args(kind)}"
    return getattr(kind, "__name__", str(kind)) if get_origin(kind) is None else str(kind)


def check(config: Config) -> Config:
    """The config itself, every field held against its annotation; raises ValueError."""
    config = coerce(config, Config, "config")
    if (config.data.picture_size == 0) == (config.data.cell_pixels == 0):
        raise ValueError(
            "data: got picture_size="
            f"{config.data.picture_size}, cell_pixels={config.data.cell_pixels}, want just one > 0"
        )
    if config.evaluate.tries < 1 or (
        config.evaluate.tries > 1 and config.evaluate.sampling.temperature == 0
    ):
        raise ValueError(
            f"evaluate.tries: got {config.evaluate.tries} at temperature "
            f"{config.evaluate.sampling.temperature}, want 1, or more above temperature 0"
        )
    _check_distillation(config.distillation)
    if sorted(config.data.channels) != [0, 1, 2]:
        raise ValueError(f"data.channels: got {config.data.channels}, want an order of (0, 1, 2)")
    for name, batch, parts in (
        ("grounding", config.grounding.batch_size, config.grounding.microbatches),
        (
            "distillation",
            config.distillation.batch_size * config.distillation.rollouts,
            config.distillation.microbatches,
        ),
    ):
        if parts < 1 or batch % parts:
            raise ValueError(f"{name}.microbatches: got {parts}, want a divisor of {batch}")
    return config


def _check_distillation(settings: DistillationConfig) -> None:
    for name, high in (("teacher_decay", 1.0), ("teacher_noise", 1.0), ("reference_share", 1.0)):
        value = getattr(settings, name)
        if not 0.0 <= value <= high:
            raise ValueError(f"distillation.{name}: got {value}, want 0 to {high:g}")
    weights = [weight for _, weight in settings.token_weights]
    names = {name for name, _ in settings.token_weights}
    if min(weights, default=0.0) < 0 or len(names) < len(weights):
        raise ValueError(
            f"distillation.token_weights: got {settings.token_weights}, want each part once, "
            "weights >= 0"
        )


def defaults(kind: Any) -> dict[str, Any]:
    """What each field of a section stands for where a saved config does not know it.

    Nested, plain JSON types; fields without a default are left out.
    """
    found: dict[str, Any] = {}
    for field in dataclasses.fields(kind):
        section = typing.get_type_hints(kind)[field.name]
        if dataclasses.is_dataclass(section):
            found[field.name] = defaults(section)
        elif field.default is not dataclasses.MISSING:
            found[field.name] = json.loads(json.dumps(field.default))
    return found


def to_dict(config: Any) -> Any:
    """The config as plain JSON types (tuples as lists)."""
    return json.loads(json.dumps(dataclasses.asdict(config)))


def picture_size(data: DataConfig, level: int) -> int:
    """Side in pixels of the picture of a board of this level."""
    return data.picture_size or data.cell_pixels * level
