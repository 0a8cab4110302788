"""The rows of the nano study: what each one changes of configs/study/nano.py.

`{study}` is the study's folder and `{seed}` the seed of the run, in every setting.
"""

import dataclasses
from typing import Literal

Stage = Literal["grounding", "distillation", ""]
ONE_SEED, MAIN_SEEDS = (0,), (0, 1, 2)


@dataclasses.dataclass(frozen=True)
class Row:
    """One model of the study: a training stage with overrides; '' is the base as it is."""

    name: str
    title: str
    stage: Stage = ""
    settings: tuple[str, ...] = ()  # as after --set
    seeds: tuple[int, ...] = ONE_SEED
    needs: str = ""  # the row that it starts from: a base, or the result of the same seed
    base: str = ""  # launch/nano_base.sh makes it, of this variant, in {study}/{base}
    group: str = ""


def _method(name: str, title: str, *settings: str, seeds: tuple[int, ...] = ONE_SEED) -> Row:
    """The method of the main rows with something changed: 40 + 120 updates."""
    student = "distillation.student={study}/grounded/{seed}/grounding"
    return Row(name, title, "distillation", (student, *settings), seeds, needs="grounded")


def _jsd(name: str, title: str, *settings: str) -> Row:
    """The method by Jensen-Shannon's divergence, perhaps with an option, three times."""
    return _method(name, title, "distillation.objective=jsd", *settings, seeds=MAIN_SEEDS)


def _plans(name: str, title: str, *settings: str) -> Row:
    """Jensen-Shannon alone from the base that has seen plans, three times."""
    settings = (*_PLANS_BASE, *_ALONE, "distillation.objective=jsd", *settings)
    return Row(name, title, "distillation", settings, MAIN_SEEDS, needs="plans_base")


def _all(name: str, title: str, *settings: str) -> Row:
    """The same where every parameter is trained, in both stages."""
    student = "distillation.student={study}/grounded_all/{seed}/grounding"
    settings = (student, "distillation.optim.trainable=.*", *settings)
    return Row(name, title, "distillation", settings, needs="grounded_all")


_PLANS_BASE = ("model.path={study}/plans/export",)
_LONG_GROUNDING = ("grounding.steps=160",)
_ON_PLANS = (*_LONG_GROUNDING, "grounding.mixture=(('plan_from_picture',1.0),)")
_ALONE = ("distillation.student={model}", "distillation.steps=160")
_JSD = (*_ALONE, "distillation.objective=jsd")
_CONTEXT = "distillation.teacher_context="
_ONE_PLAN = "data.teacher_buckets=(44,64,128)"
_ALL_PLANS = "data.teacher_buckets=(44,128,512,1408)"  # a board may have dozens of shortest plans
_WEIGHTS = "distillation.token_weights="
_AUGMENT = "data.augment="
_VARIED = "distillation.student={study}/grounded_varied/{seed}/grounding"
_QUESTIONS = "distillation.grounding_share="
_BEST = (_QUESTIONS + "0.125", _AUGMENT + "0.5")
_GATE, _GATE_LATE = "distillation.wrong_weight=0.3", "distillation.wrong_weight_from=0.3"
_CONTRAST = "distillation.contrast_cap=4.0"
_REPLAY = "distillation.replay_steps=19"
_VERIFIER = "distillation.success_weight="
_ROLLOUTS_4 = ("distillation.batch_size=16", "distillation.rollouts=4")
_GROUNDED_TEACHER = "distillation.teacher={study}/grounded_all/{seed}/grounding"
# An update of distillation takes 1.45 times as long: 60 of one are 41 of the other.
_AFTER_100 = ("distillation.student={study}/grounded_100/{seed}/grounding", "distillation.steps=79")

GROUPS = {
    # 160 updates of 64 rows each, wherever they go.
    "main": (
        Row("base", "Base"),
        Row("sft", "Supervised on plans", "grounding", _ON_PLANS, MAIN_SEEDS),
        Row("grounded", "Grounding, 40 updates", "grounding", seeds=MAIN_SEEDS),
        Row("grounding_only", "Grounding alone", "grounding", _LONG_GROUNDING, MAIN_SEEDS),
        Row("distillation_only", "Distillation alone", "distillation", _ALONE, MAIN_SEEDS),
        _method("method", "Grounding, then distillation", seeds=MAIN_SEEDS),
        _jsd("jsd", "Grounding, then distillation, Jensen-Shannon"),
        Row("jsd_only", "Distillation alone, Jensen-Shannon", "distillation", _JSD, MAIN_SEEDS),
    ),
    "controls": (
        _method(
            "other_board",
            "Teacher reads another board",
            "distillation.teacher_board=other",
            seeds=MAIN_SEEDS,
        ),
    ),
    "teacher reads": (
        _method("one_plan", "State and one plan", _CONTEXT + "state_and_plan", _ONE_PLAN),
        _method(
            "all_plans",
            "State and all shortest plans",
            _CONTEXT + "state_and_all_optimal_plans",
            _ALL_PLANS,
        ),
    ),
    "noisy states": (
        _method("noise_5", "5 % of its facts wrong", "distillation.teacher_noise=0.05"),
        _method("noise_20", "20 % of its facts wrong", "distillation.teacher_noise=0.2"),
    ),
    "objective": (
        _method(
            "sampled",
            "Reverse KL, sampled",
            "distillation.objective=sampled_reverse_kl",
            seeds=MAIN_SEEDS,
        ),
        _method("forward", "Forward KL", "distillation.objective=forward_kl"),
        _method("rollouts_4", "16 prompts, 4 rollouts each", *_ROLLOUTS_4),
    ),
    # Which tokens count.
    "tokens": (
        _method(
            "state_only",
            "Tokens of the state alone",
            _WEIGHTS + "(('sentence',0.0),('plan',0.0),('format',0.0))",
        ),
        _method(
            "plan_only",
            "Tokens of sentence and plan alone",
            _WEIGHTS + "(('state',0.0),('format',0.0))",
        ),
        _method("plan_4", "Tokens of the plan four times", _WEIGHTS + "(('plan',4.0),)"),
    ),
    # What is trained, and by whom.
    "what is trained": (
        _method(
            "decoder",
            "Decoder alone (the tower frozen)",
            "distillation.optim.trainable=^language",
        ),
        Row(
            "grounded_all",
            "Grounding of all parameters, 40 updates",
            "grounding",
            ("grounding.optim.trainable=.*",),
        ),
        _all("all", "All parameters"),
        _all("teacher_grounded", "All; the teacher is the grounded student", _GROUNDED_TEACHER),
        _all(
            "teacher_average",
            "All; the teacher is a moving average of the student",
            "distillation.teacher_decay=0.98",
        ),
    ),
    # Beyond the paper.
    "beyond": (
        Row("grounded_100", "Grounding, 100 updates", "grounding", ("grounding.steps=100",)),
        Row(
            "more_grounding",
            "100 updates of grounding, 79 of distillation",
            "distillation",
            _AFTER_100,
            needs="grounded_100",
        ),
        _method(
            "reference_25",
            "A right response in a quarter of the rows",
            "distillation.reference_share=0.25",
        ),
        _method(
            "reference_50",
            "A right response in half of the rows",
            "distillation.reference_share=0.5",
        ),
    ),
    # One switch each from the row `jsd`; 40 + 120 updates of 64 rows.
    "options": (
        _jsd("augment_25", "Pictures vary by strength 0.25", _AUGMENT + "0.25"),
        _jsd("augment_50", "Pictures vary by strength 0.5", _AUGMENT + "0.5"),
        _jsd("augment_100", "Pictures vary by strength 1", _AUGMENT + "1.0"),
        Row(
            "grounded_varied",
            "Grounding, 40 updates, pictures vary by 0.5",
            "grounding",
            (_AUGMENT + "0.5",),
            MAIN_SEEDS,
        ),
        Row(
            "augment_both",
            "Pictures vary by strength 0.5 in both stages",
            "distillation",
            (_VARIED, "distillation.objective=jsd", _AUGMENT + "0.5"),
            MAIN_SEEDS,
            needs="grounded_varied",
        ),
        Row(
            "augment_only",
            "Distillation alone, pictures vary by 0.5",
            "distillation",
            (*_JSD, _AUGMENT + "0.5"),
            MAIN_SEEDS,
        ),
        Row(
            "sft_varied",
            "Supervised on plans, pictures vary by 0.5",
            "grounding",
            (*_ON_PLANS, _AUGMENT + "0.5"),
            MAIN_SEEDS,
        ),
        _jsd("questions_12", "An eighth of the rows are questions", _QUESTIONS + "0.125"),
        _jsd("questions_25", "A quarter of the rows are questions", _QUESTIONS + "0.25"),
        _jsd("best", "An eighth are questions, pictures vary by 0.5", *_BEST),
        _jsd("best_60", "The quickstart's recipe, 60 updates", *_BEST, "distillation.steps=60"),
        # The weight is the one of `verifier_50`, chosen by success on validation boards.
        _jsd(
            "best_60_verified",
            "The quickstart's recipe and a policy gradient of success, 0.5",
            *_BEST,
            _VERIFIER + "0.5",
            "distillation.steps=60",
        ),
        _jsd("gate", "Wrong responses weigh 0.3", _GATE),
        _jsd("gate_late", "The same from 30 % success on", _GATE, _GATE_LATE),
        _jsd("contrast", "Tokens weigh by what another board changes", _CONTRAST),
        # The update has as many rows; half of the decoding is saved.
        _jsd("replay", "Every second row is of the last 19 steps", _REPLAY),
        # With weight 1 its gradient is as large as the divergence's in the first updates.
        _jsd("verifier_10", "Policy gradient of success, weight 0.1", _VERIFIER + "0.1"),
        _jsd("verifier_50", "Policy gradient of success, weight 0.5", _VERIFIER + "0.5"),
        _jsd("verifier_100", "Policy gradient of success, weight 1", _VERIFIER + "1.0"),
    ),
    # A base of its own, distilled alone.
    "plans": (
        Row("plans_base", "Base that has seen plans", "", _PLANS_BASE, base="plans"),
        _plans("plans_state", "It reads the state", _CONTEXT + "state"),
        _plans(
            "plans_one", "It reads the state and one plan", _CONTEXT + "state_and_plan", _ONE_PLAN
        ),
    ),
}
ROWS = tuple(
    dataclasses.replace(row, group=group) for group, rows in GROUPS.items() for row in rows
)
