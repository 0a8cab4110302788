"""The rows of the nano study: what each one changes of configs/study/nano.py.

`{study}` is the study's folder and `{seed}` the seed of the run, in every setting.
"""

import dataclasses
from typing import Literal

Stage = Literal["grounding", "distillation", ""]
MAIN_SEEDS = (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of the study: a training stage with overrides; '' is the base as it is."""

    name: str
    title: str
    group: str
    stage: Stage
    settings: tuple[str, ...] = ()  # as after --set
    seeds: tuple[int, ...] = (0,)
    needs: str = ""  # the row whose result of the same seed it starts from


def _method(
    name: str, title: str, group: str, *settings: str, seeds: tuple[int, ...] = (0,)
) -> Row:
    """The method of the main rows with something changed: 40 + 120 updates."""
    student = "distillation.student={study}/grounded/{seed}/grounding"
    return Row(name, title, group, "distillation", (student, *settings), seeds, needs="grounded")


def _all_parameters(name: str, title: str, *settings: str) -> Row:
    """The same where every parameter is trained, in both stages."""
    student = "distillation.student={study}/grounded_all/{seed}/grounding"
    settings = (student, "distillation.optim.trainable=.*", *settings)
    return Row(name, title, "what is trained", "distillation", settings, needs="grounded_all")


_ONE_PLAN = "data.teacher_buckets=(44,64,128)"
_ALL_PLANS = "data.teacher_buckets=(44,128,512,1408)"  # a board may have dozens of shortest plans

ROWS = (
    # Main rows: 160 updates of 64 rows each, wherever they go.
    Row("base", "Base", "main", ""),
    Row(
        "sft",
        "Supervised on plans",
        "main",
        "grounding",
        ("grounding.steps=160", "grounding.mixture=(('plan_from_picture',1.0),)"),
        MAIN_SEEDS,
    ),
    Row("grounded", "Grounding, 40 updates", "main", "grounding", seeds=MAIN_SEEDS),
    Row(
        "grounding_only",
        "Grounding alone",
        "main",
        "grounding",
        ("grounding.steps=160",),
        MAIN_SEEDS,
    ),
    Row(
        "distillation_only",
        "Distillation alone",
        "main",
        "distillation",
        ("distillation.student={model}", "distillation.steps=160"),
        MAIN_SEEDS,
    ),
    _method("method", "Grounding, then distillation", "main", seeds=MAIN_SEEDS),
    # Controls.
    _method(
        "other_board",
        "Teacher reads another board",
        "controls",
        "distillation.teacher_board=other",
    ),
    # What the teacher knows.
    _method(
        "one_plan",
        "State and one plan",
        "teacher reads",
        "distillation.teacher_context=state_and_plan",
        _ONE_PLAN,
    ),
    _method(
        "all_plans",
        "State and all shortest plans",
        "teacher reads",
        "distillation.teacher_context=state_and_all_optimal_plans",
        _ALL_PLANS,
    ),
    _method("noise_5", "5 % of its facts wrong", "noisy states", "distillation.teacher_noise=0.05"),
    _method(
        "noise_20", "20 % of its facts wrong", "noisy states", "distillation.teacher_noise=0.2"
    ),
    # The objective.
    _method(
        "sampled",
        "Reverse KL, sampled",
        "objective",
        "distillation.objective=sampled_reverse_kl",
        seeds=MAIN_SEEDS,
    ),
    _method("forward", "Forward KL", "objective", "distillation.objective=forward_kl"),
    _method(
        "jsd",
        "Jensen-Shannon, half and half",
        "objective",
        "distillation.objective=jsd",
        seeds=MAIN_SEEDS,
    ),
    _method(
        "rollouts_4",
        "16 prompts, 4 rollouts each",
        "objective",
        "distillation.batch_size=16",
        "distillation.rollouts=4",
    ),
    # Which tokens count.
    _method(
        "state_only",
        "Tokens of the state alone",
        "tokens",
        "distillation.token_weights=(('sentence',0.0),('plan',0.0),('format',0.0))",
    ),
    _method(
        "plan_only",
        "Tokens of sentence and plan alone",
        "tokens",
        "distillation.token_weights=(('state',0.0),('format',0.0))",
    ),
    _method(
        "plan_4",
        "Tokens of the plan four times",
        "tokens",
        "distillation.token_weights=(('plan',4.0),)",
    ),
    # What is trained, and by whom.
    _method(
        "decoder",
        "Decoder alone (the tower frozen)",
        "what is trained",
        "distillation.optim.trainable=^language",
    ),
    Row(
        "grounded_all",
        "Grounding of all parameters, 40 updates",
        "what is trained",
        "grounding",
        ("grounding.optim.trainable=.*",),
    ),
    _all_parameters("all", "All parameters"),
    _all_parameters(
        "teacher_grounded",
        "All; the teacher is the grounded student",
        "distillation.teacher={study}/grounded_all/{seed}/grounding",
    ),
    _all_parameters(
        "teacher_average",
        "All; the teacher is a moving average of the student",
        "distillation.teacher_decay=0.98",
    ),
    # Beyond the paper.
    Row(
        "grounded_100",
        "Grounding, 100 updates",
        "beyond",
        "grounding",
        ("grounding.steps=100",),
    ),
    # An update of distillation takes 1.45 times as long: 60 of one are 41 of the other.
    Row(
        "more_grounding",
        "100 updates of grounding, 79 of distillation",
        "beyond",
        "distillation",
        (
            "distillation.student={study}/grounded_100/{seed}/grounding",
            "distillation.steps=79",
        ),
        needs="grounded_100",
    ),
    _method(
        "reference_25",
        "A right response in a quarter of the rows",
        "beyond",
        "distillation.reference_share=0.25",
    ),
    _method(
        "reference_50",
        "A right response in half of the rows",
        "beyond",
        "distillation.reference_share=0.5",
    ),
)
