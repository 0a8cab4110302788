"""Measures of runs that go wrong, against responses counted by hand, and what is said of them."""

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

import mgsd_jax
from mgsd_jax.command_line import load_config
from mgsd_jax.config import GuardConfig, SamplingConfig
from mgsd_jax.data import batching, loaders
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.processor import load_processor
from mgsd_jax.data.prompts import BUILT_IN
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.sampling import answers
from mgsd_jax.training import guards

LIMITS = GuardConfig()
BASE = pathlib.Path(mgsd_jax.__file__).parent / "assets" / "nano_base"
NANO = pathlib.Path(__file__).parents[1] / "configs" / "nano.py"


def test_a_repeated_ngram_is_one_that_stood_in_the_response_before() -> None:
    tokens = np.array([[1, 2, 1, 2, 1, 2, 9, 9], [1, 2, 3, 4, 5, 6, 7, 8], [7] * 8])
    mask = np.ones((3, 8), np.float32)
    mask[0, 6:] = 0
    # ab ba ab ba ab: three of five; none of seven; six of seven.
    want = (3 / 5 + 0 + 6 / 7, 3)
    assert guards.repeated_share(tokens, mask, 2) == pytest.approx(want)
    mask[1] = 0
    mask[1, 0] = 1  # too short to have one
    assert guards.repeated_share(tokens, mask, 2) == pytest.approx((3 / 5 + 6 / 7, 2))
    assert guards.repeated_share(tokens, np.zeros((3, 8)), 2).value == 0


def test_a_loop_passes_the_threshold_and_a_list_of_cells_does_not() -> None:
    loop = np.array([[*range(20), *[3, 4, 5, 6, 7] * 46]])
    answer = np.array([[t for row in range(25) for t in (1, row + 50, 2, row + 90, 3, 4)]])
    for tokens, is_wrong in ((loop, True), (answer, False)):
        share = guards.repeated_share(tokens, np.ones(tokens.shape)).value
        assert ("rollout/repeated" in guards.warnings({"rollout/repeated": share}, LIMITS)) is (
            is_wrong
        )


def test_the_gap_is_over_the_sampled_tokens_alone() -> None:
    sampled = np.array([[-1.0, -2.0, 50.0]], np.float32)
    trained = np.array([[-1.5, -1.9, np.nan]], np.float32)
    gap = guards.logprob_gap(sampled, trained, np.array([[1, 1, 0]]))
    assert gap == pytest.approx((0.6, 2), rel=1e-6)


@pytest.mark.parametrize(
    ("sampling", "is_measured"),
    [
        (SamplingConfig(), True),
        (SamplingConfig(temperature=0.0), True),
        (SamplingConfig(temperature=0.6), False),
        (SamplingConfig(top_p=0.9), False),
    ],
)
def test_the_gap_is_measured_where_both_mean_the_same(
    sampling: SamplingConfig, is_measured: bool
) -> None:
    ones = np.ones((2, 6), np.float32)
    measures = guards.rollout_measures(ones.astype(int), ones, -ones, -ones, sampling)
    assert ("logprob_gap" in measures) is is_measured
    assert measures["rollout/repeated"].value == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("metric", "limit"),
    [
        ("rollout/truncated", LIMITS.truncated),
        ("rollout/repeated", LIMITS.repeated),
        ("kl_pos/0-3", LIMITS.first_kl),
        ("val/blind_same", LIMITS.blind_same),
        ("logprob_gap", LIMITS.logprob_gap),
    ],
)
def test_above_its_threshold_a_metric_is_named_with_both_numbers(metric: str, limit: float) -> None:
    assert guards.warnings({metric: limit, "loss": 1e9}, LIMITS) == {}
    (message,) = guards.warnings({metric: limit * 1.5}, LIMITS).values()
    assert f"{metric} is {limit * 1.5:.3g}, above {limit:g}" in message


def test_drafts_that_do_not_pay_are_named_with_what_to_do() -> None:
    name, limit = "rollout/kept_a_pass", LIMITS.kept_a_pass
    assert guards.warnings({name: limit}, LIMITS) == {}
    (message,) = guards.warnings({name: limit / 1.2}, LIMITS).values()
    assert f"below {limit:g}" in message and "draft_tokens=0" in message


def test_a_kind_of_fact_that_is_never_stated_is_named_where_others_are() -> None:
    limits, lake = GuardConfig(least_kind_f1=0.2), "val/state_f1/frozenlake/"
    values = {f"{lake}{kind}": f1 for kind, f1 in (("goal", 0.6), ("hole", 0.1), ("player", 0.2))}
    ((name, message),) = guards.warnings(values, limits).items()
    assert name == f"{lake}hole" and f"{name} is 0.1, below 0.2: " in message
    assert guards.warnings(values, GuardConfig(least_kind_f1=0.0)) == {}
    # Where nothing but the size is stated, the prompt may not ask; each task stands for itself.
    nothing = {f"{lake}goal": 0.5, f"{lake}size": 1.0, "val/state_f1/maze/open": 1.0}
    assert guards.warnings(values | nothing, limits) == {}


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"student_entropy": 2e-4, "rollout/length": 4.0}, ""),
        ({}, ""),
        ({"student_entropy": 5e-5}, "student_entropy is 5e-05, below 0.0001"),
        ({"student_entropy": 1.0, "rollout/length": 3.5}, "rollout/length is 3.5, below 4"),
    ],
)
def test_a_collapse_shows_in_entropy_or_length(values: dict[str, float], problem: str) -> None:
    assert guards.collapse(values, LIMITS) == problem


def test_a_distant_teacher_is_asked_about_the_students_prompt() -> None:
    apart = guards.misread(9.0, 0.02, LIMITS)
    assert "9 nats" in apart and "0.02 where the teacher reads" in apart and "same board" in apart
    assert "relative of the student" in guards.misread(9.0, 8.0, LIMITS)


@pytest.mark.parametrize(
    ("every", "eval_every", "due"),
    [(2, 10, {10, 30, 45}), (1, 20, {20, 40, 45}), (0, 10, set()), (5, 0, {45})],
)
def test_the_first_validation_and_every_so_many_show_wrong_pictures(
    every: int, eval_every: int, due: set[int]
) -> None:
    limits = dataclasses.replace(LIMITS, blind_every=every)
    steps = [s for s in range(1, 46) if s == 45 or (eval_every and s % eval_every == 0)]
    assert {s for s in steps if guards.is_blind_due(s, eval_every, limits)} == due


BOARDS = loaders.stream_boards([("frozenlake", 3), ("maze", 3)], "val", seed=0, count=6)


@pytest.mark.parametrize(("looks", "same"), [(True, 0.0), (False, 1.0)])
def test_a_model_that_does_not_look_says_the_same_of_every_picture(
    looks: bool, same: float
) -> None:
    def answer(_: Any, boards: Any, mode: Any, **options: Any) -> list[Answer]:
        shown = answers.shown_boards(boards, mode) if looks else boards
        return [Answer(f"{board.task} {board.state}", False, 1) for board in shown]

    boards = [BOARDS[i] for i in range(5)]  # three of one task, two of the other
    seen = answer(None, boards, "picture")
    assert guards.blind_measure(answer, {}, boards, seen) == {
        "val/blind_same": pytest.approx((5 * same, 5.0))
    }
    assert guards.blind_measure(answer, {}, boards[:2], seen[:2]) == {}  # one board of each


def test_picture_tokens_have_to_be_the_features_one_for_one() -> None:
    processor = load_processor(BASE)
    prompt = Encoder(processor, BUILT_IN, load_config(str(NANO), []).data).student(BOARDS[0])
    inputs = batching.smallest_inputs([prompt, prompt], processor.pad_id)
    guards.check_pictures(inputs, processor)
    pictures = inputs.pictures
    assert pictures is not None
    missing, moved, lost = inputs.tokens.copy(), pictures.slots.copy(), pictures.valid.copy()
    missing[1, np.flatnonzero(pictures.slots[1] >= 0)[0]] = processor.pad_id
    moved[1] = np.roll(moved[1], 1)
    lost[1, 0, -4:] = False
    for wrong in (
        inputs._replace(tokens=missing),
        inputs._replace(pictures=pictures._replace(slots=moved)),
        inputs._replace(pictures=pictures._replace(valid=lost)),
        inputs._replace(pictures=None),
    ):
        with pytest.raises(ValueError, match=r"batch: got .* picture tokens.* in row [01], want"):
            guards.check_pictures(wrong, processor)
