"""Measures of runs that go wrong, against responses counted by hand, and what is said of them."""

import dataclasses

import numpy as np
import pytest

from mgsd_jax.config import GuardConfig, SamplingConfig
from mgsd_jax.training import guards

LIMITS = GuardConfig()


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
    ("changes", "is_measured"),
    [
        ({}, True),
        ({"temperature": 0.0}, True),
        ({"temperature": 0.6}, False),
        ({"top_p": 0.9}, False),
    ],
)
def test_the_gap_is_measured_where_both_mean_the_same(
    changes: dict[str, float], is_measured: bool
) -> None:
    sampling = dataclasses.replace(SamplingConfig(), **changes)
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
