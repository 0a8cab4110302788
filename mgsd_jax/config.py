"""Typed, frozen settings of every stage, and overrides of them from the command line.

A config file defines `get_config() -> Config`, or `get_config(argument)`. Every stage reads the
sections it needs from one `Config`. Paths may hold `{workdir}` for the `--workdir` of the run,
`{model}` for `model.path` and `{assets}` for the models that are shipped with the package. The
annotation of a field says which values it takes; the tag `FREE` says that it changes no result, so
that a run may be resumed with another value (ranges.py).
"""

import dataclasses
import pathlib
from typing import Annotated, Any, Literal

from mgsd_jax.checks.ranges import (
    FREE,
    Between,
    Items,
    Place,
    Regex,
    Span,
    coerce,
)
from mgsd_jax.checks.sections import defaults as defaults
from mgsd_jax.checks.sections import override as override
from mgsd_jax.checks.sections import to_dict as to_dict
from mgsd_jax.checks.sections import to_text as to_text

ASSETS = str(pathlib.Path(__file__).resolve().parent / "assets")  # models shipped with the package
TeacherContext = Literal["state", "state_and_plan", "state_and_all_optimal_plans"]
StateText = Literal["cells", "rows"]
Segment = Literal["state", "sentence", "plan", "format"]  # parts of a response
Mode = Literal["picture", "text", "blind", "perception"]
# Sampling parameters that a request to an endpoint may have; servers differ in what they accept.
Parameter = Literal["max_tokens", "max_completion_tokens", "temperature", "top_p", "top_k", "seed"]
AUTO = "auto"
SENT: tuple[Parameter, ...] = ("max_tokens", "temperature", "top_p", "top_k", "seed")
Sink = Literal["tensorboard", "wandb", "trackio"]
Benchmark = Literal[
    "frozenlake_vsp",
    "frozenlake_visualplanning",
    "minibehaviour_visualplanning",
    "maze_visualplanning",
    "frozenlake_diffthinker_16",
    "frozenlake_diffthinker_32",
    "maze_diffthinker_8",
    "maze_diffthinker_16",
    "maze_diffthinker_32",
    "maze_held_out",  # mazes of a test split of ours, where the public file is not at hand
]

# The upper ends are more than any run could use; a slip of the pen would draw boards for years.
Count = Annotated[int, Between(1, 10**6)]
CountOrNone = Annotated[int, Between(0, 10**6)]
FreeCount = Annotated[int, Between(1, 10**6), FREE]
Steps = Annotated[int, Between(1, 10**9)]
Every = Annotated[int, Between(0, 10**9), FREE]  # steps; 0: at the end alone
Share = Annotated[float, Between(0, 1)]
Decay = Annotated[float, Between(0, 1, below=True)]
Amount = Annotated[float, Between(0, 10**9)]
Positive = Annotated[float, Between(0, 10**9, above=True)]
Name = Annotated[str, Items(1)]
Names = Annotated[tuple[Name, ...], Items()]
Path = Annotated[str, Items(1), Place()]
PathOrNone = Annotated[str, Place()]
Paths = Annotated[tuple[Path, ...], Items()]
Pattern = Annotated[str, Regex()]
# Sizes that a batch is padded to, each a program of its own; auto: see data/buckets.py.
Buckets = Annotated[tuple[Count, ...] | Literal["auto"], Items(1), FREE]
Devices = Annotated[int, Between(1, 10**6, also=-1)]
Pixels = Annotated[int, Between(8, 4096, also=0)]
Width = Annotated[int, Between(1, 10**5)]
Remat = Annotated[Literal["none", "full", "save_names", "offload"], FREE]


@dataclasses.dataclass(frozen=True)
class LevelSet:
    """Boards of one task: the levels, and how many of each in the train, val and test splits."""

    task: Name  # such as maze; what draws or reads boards knows the others
    # sizes of the boards; one that is listed twice is streamed twice as often
    levels: Annotated[tuple[Annotated[int, Between(2, 32)], ...], Items(1, repeated=True)]
    train: CountOrNone  # boards of each level to train on
    val: CountOrNone  # boards of each level that training validates on
    test: CountOrNone  # boards of each level that --stage=evaluate asks about


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Which weights to start from, and how to compute with them."""

    path: Path  # Hugging Face folder to start from; other paths call it '{model}'
    compute_dtype: Literal["float32", "bfloat16"] = "bfloat16"  # dtype of products and activations
    # dtype of parameters that are trained, and of their moments; others have compute_dtype
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    # what the backward pass computes again instead of keeping it; see model/remat.py
    remat: Remat = "full"


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """How the devices are laid out; a size of -1 takes the devices that the others leave.

    Where fsdp and tensor both are -1, tensor is 4, or 2 or 1 where the devices do not divide by 4.

    A run may be resumed with another mesh: what is computed does not depend on it.

    Decoding reads all weights for every token. Over more chips each of them reads less, and two
    sums a layer cross more of them: preflight's table says which wins. With fsdp=4 and tensor=4,
    rollout_tensor=0 (or 4) keeps four copies of the weights, and -1 (or 16) one.
    """

    data: Devices = 1  # copies of the parameters, each with a part of the batch: one a slice
    fsdp: Devices = -1  # splits parameters and batch
    tensor: Devices = 1  # splits the widths of the layers, and the heads
    # Over how many devices a rollout splits one copy of the weights, a divisor of fsdp * tensor.
    # 0: as many as tensor; -1: all of fsdp * tensor; -2: twice tensor where that leaves two copies
    # or more in fsdp * tensor, else tensor: fastest by preflight for 4B and 8B on 16 and 8 chips.
    rollout_tensor: Annotated[int, Between(-2, 10**6)] = 0


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Boards and how they become batches. Lengths are in tokens, pictures in pixels."""

    # tasks and levels, and how many boards of each; see docs/boards.md
    boards: Annotated[tuple[LevelSet, ...], Items(1)]
    folder: Path = "{workdir}/data"  # where the boards are; written by --stage=generate
    # folder: boards that generate wrote; stream: training draws them on the fly
    source: Literal["folder", "stream"] = "folder"
    picture_size: Pixels = 256  # side of a square picture; 0: cell_pixels * level
    cell_pixels: Pixels = 0  # side of a cell, where picture_size is 0
    # order of red, green and blue; any other than 0, 1, 2 gives colours that no board has
    channels: tuple[int, int, int] = (0, 1, 2)
    sprites: Literal["usual", "other"] = "usual"  # other: things drawn as no board has them
    # strength of the random changes of the pictures that a model is trained on; 0: none
    augment: Share = 0.0
    # kinds of these changes, see docs/boards.md; sprites: things drawn as no board has them
    augment_kinds: Annotated[
        tuple[Literal["colours", "shapes", "place", "noise", "sprites"], ...], Items(1)
    ] = ("colours", "shapes", "place", "noise")
    exclude: Paths = ()  # benchmark folders whose boards never enter a split
    prompts: PathOrNone = ""  # folder of text files that replace prompts; '': the built-in ones
    # how texts tell the open sides of a maze's cells: a line a cell, or a line a row, in an eighth
    # of the tokens; docs/prompts.md
    state_text: StateText = "cells"
    # lengths that student prompts are padded to, picture included; each is a program of its own,
    # and auto measures the run's own prompts
    prompt_buckets: Buckets = (512, 1024)
    teacher_buckets: Buckets = (512, 1024, 2048)  # lengths that prompts with the text are padded to
    sequence_buckets: Buckets = (1024, 2048)  # lengths of a grounding record, prompt and answer
    patch_buckets: Buckets = (256,)  # numbers of patches that a picture is padded to
    workers: Annotated[int, Between(1, 1024), FREE] = 1  # read-ahead threads of the loader


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters; rank 0 trains the parameters themselves."""

    rank: Annotated[int, Between(0, 10**5)] = 0  # of the adapters; 0: none
    alpha: Positive = 16.0  # an adapter's product is scaled by alpha / rank
    # regex over parameter paths: the kernels that get an adapter
    targets: Pattern = r"language/.*/(q|k|v|o|gate|up|down)_proj"


@dataclasses.dataclass(frozen=True)
class OptimConfig:
    """AdamW with a warm-up and a schedule."""

    lr: Amount  # the highest learning rate, after the warm-up
    schedule: Literal["constant", "cosine"] = "constant"  # what follows it; cosine falls to 0
    warmup: Decay = 0.0  # share of the steps over which the rate rises from 0
    b1: Decay = 0.9  # decay of AdamW's mean of the gradients
    b2: Decay = 0.999  # decay of AdamW's mean of their squares
    weight_decay: Amount = 0.0  # of AdamW, on all that is trained
    clip: Amount = 1.0  # norm that larger gradients are scaled down to; 0: off
    trainable: Pattern = ".*"  # regex over parameter paths; the rest stays frozen


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When to save and what to keep. Steps."""

    every: Every = 200  # steps between checkpoints; 0: at the end alone
    keep_last: FreeCount = 2  # how many of the newest checkpoints stay
    keep_best: Annotated[int, Between(0, 10**6), FREE] = 1  # how many of the best ones stay
    use: Literal["last", "best"] = "last"  # which checkpoint later stages load


@dataclasses.dataclass(frozen=True)
class GuardConfig:
    """When a training run stops, and above which measures of a step it warns.

    A run may be resumed with other values. The reference answers reach 0.61 repeated (Maze level
    6), healthy nano runs start at a first_kl of 2.1 nats; float32 keeps the logprob_gap below 1e-4.
    """

    skipped_in_a_row: Steps = 10  # updates whose loss or gradient is not finite before a run stops
    truncated: Share = 0.05  # highest share of rollouts without an end token
    repeated: Share = 0.7  # highest mean share of a response's 4-grams that stood in it before
    first_kl: Amount = 3.0  # highest divergence, nats, mean over the first four positions
    logprob_gap: Amount = 0.05  # highest mean |sampler's - training's logprob|, nats
    # Most nats a token between student and teacher at the first update. Above it the teacher also
    # reads the student's prompts, which tells whether prompts or readers are wrong.
    start_kl: Amount = 3.0
    blind_every: Every = 5  # every so many validations wrong pictures are shown as well; 0: never
    blind_same: Share = 0.5  # highest share of answers that wrong pictures leave as they were
    # Lowest State F1 of one kind of fact on validation boards, where that of another kind of the
    # task (sizes apart) is above one half; 0: none.
    least_kind_f1: Share = 0.05
    collapsed_in_a_row: Steps = 10  # steps below one of the next two before a run stops
    least_entropy: Amount = 1e-4  # lowest mean entropy of the student, nats a token
    least_length: Amount = 4.0  # lowest mean length of the rollouts, tokens
    kept_a_pass: Amount = 1.3  # fewest tokens kept a pass; below it drafted rollouts cost time


@dataclasses.dataclass(frozen=True)
class MetricsConfig:
    """Where the metrics of a run are shown. `metrics.jsonl` holds them in any case."""

    # where metrics are shown; wandb and trackio are extras of the package
    sinks: Annotated[tuple[Sink, ...], Items(), FREE] = ("tensorboard",)
    project: Annotated[str, Items(1), FREE] = "mgsd_jax"  # project of wandb and trackio
    name: Annotated[str, Items(), FREE] = ""  # name of the run there; '': folder/stage
    # Steps (of evaluate: batches) to trace, the last one included; '': none. docs/profiling.md
    profile: Annotated[str, Span(), FREE] = ""


@dataclasses.dataclass(frozen=True)
class SamplingConfig:
    """How responses are sampled."""

    max_new_tokens: Count = 2048  # the longest response
    temperature: Annotated[float, Between(0, 1000)] = 1.0  # 0: greedy
    # tokens are drawn from the likeliest ones that hold this share; 1: from all
    top_p: Annotated[float, Between(0, 1, above=True)] = 1.0
    top_k: CountOrNone = 0  # tokens are drawn from this many of the likeliest; 0: from all
    # Tokens of a draft (a right response of the board) that each pass of the model checks; 0: none.
    # What is sampled is the same but for rounding.
    draft_tokens: Annotated[int, Between(0, 64)] = 0


@dataclasses.dataclass(frozen=True)
class GroundingConfig:
    """Stage 1: supervised records."""

    optim: OptimConfig
    lora: LoraConfig = LoraConfig()
    # what learns: '{model}', a Hugging Face folder, or the folder of a training stage
    student: Path = "{model}"
    steps: Steps = 828  # updates in all
    batch_size: Count = 64  # records a step
    microbatches: FreeCount = 1  # parts of a batch, one after the other: memory for time
    token_chunk: FreeCount = 2048  # tokens whose logits are in memory at once
    # what the records are: (kind in data/records.py, share)
    mixture: Annotated[tuple[tuple[Name, Amount], ...], Items(1)] = (("questions", 1.0),)
    eval_every: Every = 100  # steps between validations of the loss; 0: at the end alone
    eval_batches: Count = 4  # batches of validation records that the loss is taken over


@dataclasses.dataclass(frozen=True)
class DistillationConfig:
    """Stage 2: on-policy distillation from the text-reading teacher."""

    optim: OptimConfig
    lora: LoraConfig = LoraConfig()
    student: Path = "{workdir}/grounding"  # what learns, as grounding.student
    teacher: Path = "{model}"  # what it learns from
    teacher_context: TeacherContext = "state_and_plan"  # what the teacher reads after the question
    # decay of the moving average of the student that is the teacher; 0: the teacher stays as it is
    teacher_decay: Share = 0.0
    teacher_noise: Share = 0.0  # share of the facts that are wrong in what the teacher reads
    # whose state the teacher reads; other: another board's, as a control
    teacher_board: Literal["same", "other"] = "same"
    objective: Name = "reverse_kl"  # the divergence, a name of training/divergences.py
    # weight of the teacher in the mixture of objective='jsd', which alone reads it
    jsd_teacher_weight: Annotated[float, Between(0, 1, above=True, below=True)] = 0.5
    forward_kl_mix: Decay = 0.0  # share of the forward KL that is mixed into the objective
    token_chunk: FreeCount = 2048  # tokens whose logits are in memory at once
    token_kl_cap: Amount = 0.0  # nats that a token's divergence is cut to; 0: off
    # Weights of the parts of a response in the loss; 1 for a part that is not listed.
    token_weights: Annotated[tuple[tuple[Segment, Amount], ...], Items()] = ()
    # share of the rows that get a right response in place of the student's own
    reference_share: Share = 0.0
    # Share of the rows that are questions about a picture, learned as in grounding, in place of
    # rollouts; their gradient has this share of the step. See optimizer.blend.
    grounding_share: Decay = 0.0
    # Above 0 a token weighs as much as another board would change the teacher's distribution over
    # it, divided by the mean of its response, and this at most. See lessons.contrast_weights.
    contrast_cap: Amount = 0.0
    # Weight of a response that neither states the board right nor solves it; below 1, a truncated
    # one has none.
    wrong_weight: Share = 1.0
    # success of a validation from which wrong_weight applies; above 0 a run resumes with the
    # eval_every that it began with
    wrong_weight_from: Share = 0.0
    # Above 0 a policy gradient of success is added to the divergence with this weight, its baseline
    # the running success of the same task and level.
    success_weight: Amount = 0.0
    # Above 0 every second row learns from a rollout of 1 to so many steps before, not a new one.
    replay_steps: CountOrNone = 0
    sampling: SamplingConfig = SamplingConfig()
    # Lengths that the responses of a step are cut to before the update, the smallest that holds all
    # of them; (): sampling.max_new_tokens. Each length is a program of its own.
    response_buckets: Annotated[tuple[Count, ...], Items(), FREE] = ()
    steps: Steps = 1400  # updates in all
    batch_size: Count = 32  # prompts a step
    rollouts: Count = 1  # responses sampled for each prompt
    microbatches: FreeCount = 1  # parts of a batch, one after the other: memory for time
    eval_every: Every = 20  # steps between validations of success; 0: at the end alone
    eval_boards: Count = 96  # boards of the validation split that are answered each time


@dataclasses.dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, on which boards, and who answers."""

    # who answers: (name, Hugging Face folder or folder of a training stage)
    models: Annotated[tuple[tuple[Name, Path], ...], Items(1)]
    # what they see: the picture, the board as text, another board's picture (blind), or the picture
    # with questions about it (perception)
    modes: Annotated[tuple[Mode, ...], Items(1)] = ("picture", "text", "blind", "perception")
    sampling: SamplingConfig = SamplingConfig(temperature=0.0)
    tries: Count = 1  # answers sampled for each board and mode, for pass@k
    batch_size: FreeCount = 32  # boards answered at once, also where training validates
    reference: str = "base"  # the model whose text planning is the upper bound
    reference_only: tuple[Mode, ...] = ()  # modes that only the reference answers
    # where rows and summary go; one evaluation each
    folder: Annotated[str, Items(1), Place(), FREE] = "{workdir}/evaluate"
    # public test sets, (name, folder); (): the test split of data
    benchmarks: Annotated[tuple[tuple[Benchmark, Path], ...], Items()] = ()
    endpoint: str = ""  # URL of an OpenAI-compatible API, which then answers instead of `models`
    endpoint_models: Names = ()  # names of the models to ask; (): the one that it serves
    # the environment variable that holds the key
    endpoint_key: Annotated[str, Items(1), FREE] = "OPENAI_API_KEY"
    endpoint_workers: Annotated[int, Between(1, 1024), FREE] = 8  # requests at once
    endpoint_retries: Annotated[int, Between(0, 1000), FREE] = 3  # of a request that failed
    # the sampling parameters that a request has
    endpoint_parameters: Annotated[tuple[Parameter, ...], Items()] = SENT
    # how long a request may take, its retries included
    endpoint_seconds: Annotated[float, Between(0, 10**6, above=True), FREE] = 120.0


@dataclasses.dataclass(frozen=True)
class ReportConfig:
    """What the report compares."""

    runs: Paths = ()  # what to compare: workdirs or evaluation folders; (): the workdir alone
    model: str = ""  # the model that represents its run; '': the last of base .. distilled


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """What to write out for transformers, vLLM and SGLang."""

    source: Path = "{workdir}/distillation"  # folder of the training stage
    folder: Path = "{workdir}/export"  # where the model is written
    dtype: Literal["bfloat16", "float32"] = "bfloat16"  # dtype of the written weights
    max_shard_gb: Positive = 5.0  # size of a file of weights at most, in 10^9 bytes
    adapters: bool = False  # write the adapters alone, as a PEFT folder
    check: bool = False  # do not write, compare the folder with transformers (needs torch)


@dataclasses.dataclass(frozen=True)
class AskConfig:
    """What --stage=ask asks, and whom, about the picture of --input."""

    model: Name = "{workdir}/distillation"  # folder of a stage or of a model, or URL of an endpoint
    task: str = ""  # such as maze: ask for the board and a plan
    question: str = ""  # ask this instead
    level: Annotated[int, Between(2, 32, also=0)] = 0  # of the board; 0: find it out
    max_new_tokens: Count = 1024  # longest answer


@dataclasses.dataclass(frozen=True)
class PreflightConfig:
    """Which programs --stage=preflight compiles, and for which TPU slice or GPU."""

    # The slice, as libtpu names it, or one GPU: h100, h200, a100-80g, a100-40g.
    topology: Name = "v5e:4x4"
    # whose programs
    stages: tuple[Literal["grounding", "distillation", "evaluate"], ...] = (
        "grounding",
        "distillation",
    )
    only: tuple[str, ...] = ()  # programs such as 'distillation/update'; (): all of the stages'
    hbm_gib: Amount = 0.0  # memory of a chip; 0: what is left to programs
    # Tokens of a drafted rollout kept a pass (rollout/kept_a_pass of a run), a row each in the
    # table of the typical step. 2.8: counted in rollouts of a nano student after grounding.
    kept_a_pass: Annotated[tuple[Annotated[float, Between(1, 65)], ...], Items(1)] = (1.0, 2.8, 5.0)


@dataclasses.dataclass(frozen=True)
class NanoConfig:
    """Shape of the nano model that --stage=init writes with random weights."""

    folder: Path  # where the model is written
    width: Width = 128  # width of the decoder
    layers: Annotated[int, Between(1, 1000)] = 4  # layers of the decoder
    heads: Width = 4  # query heads of the decoder
    kv_heads: Width = 2  # key and value heads of the decoder
    head_width: Width = 32  # width of a head of the decoder
    mlp: Width = 384  # width of the decoder's MLP
    vision_width: Width = 96  # width of the vision tower
    vision_layers: Annotated[int, Between(1, 1000)] = 3  # layers of the vision tower
    vision_heads: Width = 3  # heads of the vision tower
    vision_mlp: Width = 384  # width of the vision tower's MLP
    # layers of the vision tower whose output goes into the first layers of the decoder
    deepstack: Annotated[tuple[CountOrNone, ...], Items()] = (0, 1)
    patch: Annotated[int, Between(1, 1024)] = 16  # side of a patch in pixels
    max_level: Annotated[int, Between(2, 32)] = 8  # largest board whose cells are single tokens


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
    ask: AskConfig = AskConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    mesh: MeshConfig = MeshConfig()
    preflight: PreflightConfig = PreflightConfig()
    guards: GuardConfig = GuardConfig()
    metrics: MetricsConfig = MetricsConfig()
    nano: NanoConfig | None = None
    # seed of boards, order, noise and rollouts; 32 bits, of which loaders need one more value
    seed: Annotated[int, Between(0, 2**32 - 2)] = 0


def resolve(config: Config, workdir: str) -> Config:
    """The config with `{model}` and `{workdir}` filled in.

    A stage does this once. Only `folders.claimed` is given the config as it was, so that a workdir
    may be moved to another place and resumed there.
    """

    def fill(value: Any) -> Any:
        if isinstance(value, str):
            return located(value.replace("{model}", config.model.path), workdir)
        if isinstance(value, tuple):
            return tuple(map(fill, value))
        if dataclasses.is_dataclass(value):
            values = {f.name: fill(getattr(value, f.name)) for f in dataclasses.fields(value)}
            return type(value)(**values)
        return value

    return fill(config)


def portable(path: str, workdir: str) -> str:
    """An absolute path as it is noted: a place in the workdir or in the package stays one there."""
    for root, mark in ((workdir, "{workdir}"), (ASSETS, "{assets}")):
        if path.startswith(f"{root.rstrip('/')}/"):
            return mark + path[len(root.rstrip("/")) :]
    return path


def located(path: str, workdir: str) -> str:
    """The absolute path of one that `portable` has noted."""
    return path.replace("{workdir}", workdir).replace("{assets}", ASSETS)


def excluded_folders(config: Config) -> tuple[str, ...]:
    """The folders of benchmarks whose boards are never drawn: those named, and those evaluated."""
    evaluated = (folder for name, folder in config.evaluate.benchmarks if name != "maze_held_out")
    return tuple(dict.fromkeys((*config.data.exclude, *evaluated)))


def check(config: Config) -> Config:
    """Returns the config after checking every field against its annotation; raises ValueError."""
    config = coerce(config, Config, "config")
    data, evaluate = config.data, config.evaluate
    stage1, stage2 = config.grounding, config.distillation
    if (data.picture_size == 0) == (data.cell_pixels == 0):
        raise ValueError(
            f"data: got picture_size={data.picture_size}, cell_pixels={data.cell_pixels}, "
            "want just one > 0"
        )
    if sorted(data.channels) != [0, 1, 2]:
        raise ValueError(f"data.channels: got {data.channels}, want an order of (0, 1, 2)")
    if evaluate.tries > 1 and evaluate.sampling.temperature == 0:
        raise ValueError(
            f"evaluate.tries: got {evaluate.tries} at temperature 0, want 1, or a temperature "
            "above 0 (evaluate.sampling.temperature)"
        )
    if not any(share for _, share in stage1.mixture):
        raise ValueError(f"grounding.mixture: got {stage1.mixture}, want a share above 0")
    share, asked = stage2.grounding_share, record_prompts(stage2)
    if share and not 0 < asked < stage2.batch_size:
        raise ValueError(
            f"distillation.grounding_share: got {share}, which is {asked} of "
            f"{stage2.batch_size} prompts, want 1 to {stage2.batch_size - 1}"
        )
    _check_replay(stage2)
    if stage2.wrong_weight == 1 and stage2.wrong_weight_from > 0:
        raise ValueError(
            f"distillation.wrong_weight_from: got {stage2.wrong_weight_from} with wrong_weight=1, "
            "which weighs nothing less: want a wrong_weight below 1"
        )
    rows = {"grounding": [stage1.batch_size], "distillation": [*update_rows(stage2).values()]}
    for stage, settings in (("grounding", stage1), ("distillation", stage2)):
        parts = settings.microbatches
        if any(number % parts for number in rows[stage]):
            want = " and of ".join(map(str, rows[stage]))
            raise ValueError(f"{stage}.microbatches: got {parts}, want a divisor of {want}")
    return config


def _check_replay(settings: DistillationConfig) -> None:
    rows = settings.batch_size - record_prompts(settings)
    found = ""
    if settings.objective == "sampled_reverse_kl":
        found = "objective sampled_reverse_kl, want an exact divergence: old rollouts are not its"
    elif settings.rollouts > 1:
        found = f"{settings.rollouts} rollouts a prompt, want 1"
    elif rows % 2:
        found = f"{rows} prompts, want an even number"
    if settings.replay_steps and found:
        raise ValueError(f"distillation.replay_steps: got {settings.replay_steps} with {found}")


def record_prompts(settings: DistillationConfig) -> int:
    """The prompts of a step that records take the place of."""
    return round(settings.grounding_share * settings.batch_size)


def update_rows(settings: DistillationConfig) -> dict[str, int]:
    """{the field that says so: the rows of an update} of responses, and of records if any."""
    asked = record_prompts(settings)
    rows = {"distillation.batch_size": (settings.batch_size - asked) * settings.rollouts}
    if asked:
        rows["distillation.grounding_share"] = asked * settings.rollouts
    return rows


def sizes(buckets: tuple[int, ...] | Literal["auto"]) -> tuple[int, ...]:
    """The buckets as numbers. Raises ValueError for 'auto', which `buckets.fitted` replaces."""
    if isinstance(buckets, str):
        raise ValueError(f"buckets: got {buckets!r}, want numbers here")
    return buckets


def picture_size(data: DataConfig, level: int) -> int:
    """Side in pixels of the picture of a board of this level."""
    return data.picture_size or data.cell_pixels * level
