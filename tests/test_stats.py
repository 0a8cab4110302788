"""Intervals cover what they claim to, in enumeration and simulation; closed forms are matched."""

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats as scipy_stats

from mgsd_jax.evaluation import stats

RATES = np.linspace(0.02, 0.98, 49)


def binary(successes: int, n: int) -> list[float]:
    return [1.0] * successes + [0.0] * (n - successes)


def coverage(counts: Sequence[tuple[int, ...]], intervals: np.ndarray, rates: Any, n: int) -> float:
    """Exact chance that the interval of the counts holds the mean of the strata's rates."""
    chances = np.ones(len(counts))
    for column, rate in zip(np.array(counts).T, rates, strict=True):
        chances *= scipy_stats.binom.pmf(column, n, rate)
    truth = np.mean(rates)
    return float(chances[(intervals[:, 0] <= truth) & (truth <= intervals[:, 1])].sum())


@pytest.fixture
def few_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """For simulations, which judge an interval by hundreds of samples."""
    monkeypatch.setattr(stats, "DRAWS", 500)


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from("abc"), st.dictionaries(
    st.integers(3, 8), st.lists(st.floats(0, 1), min_size=1, max_size=9), min_size=1, max_size=3,
), min_size=1))  # fmt: skip
def test_a_macro_mean_is_the_mean_over_tasks_of_the_mean_over_levels(strata: stats.Strata) -> None:
    want = np.mean([np.mean([np.mean(v) for v in levels.values()]) for levels in strata.values()])
    got = stats.macro_mean(strata)
    assert got.value == pytest.approx(want)
    assert 0.0 <= got.low <= got.value + 1e-12 and got.value - 1e-12 <= got.high <= 1.0
    assert got.high - got.low > 0.0
    assert got.n == sum(len(v) for levels in strata.values() for v in levels.values())


def test_one_stratum_is_agresti_and_coull() -> None:
    z2 = 1.959963984540054**2
    for successes in (0, 1, 13, 25, 50):
        got = stats.macro_mean({"a": {3: binary(successes, 50)}})
        p = (successes + z2 / 2) / (50 + z2)
        half = math.sqrt(z2 * p * (1 - p) / (50 + z2))
        want = (max(0.0, p - half), min(1.0, p + half))
        assert (got.low, got.high) == pytest.approx(want)


def test_one_stratum_covers_at_every_rate() -> None:
    """Exact, no simulation: all 51 outcomes of 50 boards."""
    counts = [(successes,) for successes in range(51)]
    intervals = np.array([stats.macro_mean({"a": {3: binary(x, 50)}})[1:3] for (x,) in counts])
    covered = [coverage(counts, intervals, (rate,), 50) for rate in RATES]
    assert min(covered) >= 0.93
    assert 0.94 <= np.mean(covered) <= 0.98


def test_two_strata_cover_at_every_pair_of_rates() -> None:
    """Exact: all 51 x 51 outcomes of 2 x 50 boards."""
    counts = list(itertools.product(range(51), repeat=2))
    intervals = np.array(
        [stats.macro_mean({"a": {3: binary(x, 50), 4: binary(y, 50)}})[1:3] for x, y in counts]
    )
    pairs = itertools.product(RATES[::4], repeat=2)
    covered = [coverage(counts, intervals, rates, 50) for rates in pairs]
    assert min(covered) >= 0.93
    assert 0.94 <= np.mean(covered) <= 0.98


LAYOUT = {"a": (3, 4, 5, 6, 7, 8), "b": (3, 4, 5, 6), "c": (5, 6)}
PROFILES = {
    "all low": lambda i: 0.02,
    "all high": lambda i: 0.98,
    "even": lambda i: 0.5,
    "both ends": lambda i: (0.02, 0.98)[i % 2],
    "falling": lambda i: 0.98 - 0.96 * i / 11,
}


@pytest.mark.parametrize("profile", PROFILES)
def test_twelve_strata_cover(profile: str) -> None:
    cells = [(task, level) for task, levels in LAYOUT.items() for level in levels]
    rates = {cell: PROFILES[profile](i) for i, cell in enumerate(cells)}
    truth = np.mean([np.mean([rates[t, level] for level in LAYOUT[t]]) for t in LAYOUT])
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(1000):
        strata = {
            t: {level: (rng.random(50) < rates[t, level]) for level in LAYOUT[t]} for t in LAYOUT
        }
        got = stats.macro_mean(strata)
        covered += got.low <= truth <= got.high
    assert covered >= 930


def test_extremes_have_an_interval_of_some_width() -> None:
    for rate in (0.0, 1.0):
        got = stats.macro_mean({"a": {3: [rate] * 50, 4: [rate] * 50}, "b": {3: [rate] * 50}})
        assert got.value == rate
        assert 0.01 < got.high - got.low < 0.05


def test_strata_narrow_the_interval_where_they_explain_the_spread() -> None:
    apart = stats.macro_mean({"a": {3: binary(48, 50), 4: binary(2, 50)}})
    mixed = stats.macro_mean({"a": {3: binary(25, 50), 4: binary(25, 50)}})
    assert apart.value == mixed.value == 0.5
    assert apart.high - apart.low < 0.6 * (mixed.high - mixed.low)


@pytest.mark.parametrize(
    ("strata", "words"),
    [
        ({}, "at least one"),
        ({"a": {3: []}}, "at least one"),
        ({"a": {3: [0.5, 1.5]}}, "a, level 3"),
        ({"a": {3: [math.nan]}}, "a, level 3"),
    ],
)
def test_bad_values_are_refused(strata: stats.Strata, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        stats.macro_mean(strata)


def paired(
    rng: np.random.Generator, rates: tuple[float, ...], better: float, worse: float, n: int
) -> tuple[dict, dict]:
    """Two models on the same boards; `better`, `worse`: chances that a board tells them apart."""
    theirs, ours = {}, {}
    for level, rate in enumerate(rates):
        right = rng.random(n) < rate
        flipped = rng.random(n) < np.where(right, worse, better)
        theirs[level], ours[level] = right.astype(float), (right ^ flipped).astype(float)
    return {"a": theirs}, {"a": ours}


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize(
    ("rates", "better", "worse"),
    [
        ((0.3, 0.5, 0.7), 0.4, 0.1),
        ((0.05, 0.5, 0.95), 0.1, 0.1),
        ((0.02, 0.02, 0.02), 0.02, 0.02),
        ((0.5,), 0.3, 0.05),
    ],
)
def test_paired_differences_cover(rates: tuple[float, ...], better: float, worse: float) -> None:
    truth = np.mean([(1 - rate) * better - rate * worse for rate in rates])
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        theirs, ours = paired(rng, rates, better, worse, 50)
        got = stats.paired_difference(ours, theirs)
        covered += got.low <= truth <= got.high
    assert covered >= 372  # 93 %


@pytest.mark.usefixtures("few_draws")
def test_p_values_are_small_as_often_as_they_should_be() -> None:
    rng = np.random.default_rng(1)
    null = []
    for _ in range(400):
        theirs, ours = paired(rng, (0.5, 0.5, 0.5), 0.2, 0.2, 50)
        null.append(stats.paired_difference(ours, theirs).p_value)
    assert np.mean(np.array(null) <= 0.05) <= 0.07
    assert np.mean(np.array(null) <= 0.5) <= 0.55


def test_the_p_value_of_a_clear_difference_is_small() -> None:
    theirs, ours = paired(np.random.default_rng(1), (0.5, 0.5, 0.5), 0.5, 0.05, 50)
    found = stats.paired_difference(ours, theirs)
    assert found.p_value < 0.001 and found.low > 0.0


def test_a_difference_is_signed_paired_and_repeatable() -> None:
    theirs, ours = paired(np.random.default_rng(2), (0.2, 0.8), 0.3, 0.1, 50)
    forth, back = stats.paired_difference(ours, theirs), stats.paired_difference(theirs, ours)
    assert forth.value == pytest.approx(-back.value)
    assert (forth.low, forth.high) == pytest.approx((-back.high, -back.low), abs=0.02)
    assert forth == stats.paired_difference(ours, theirs)
    assert forth.n == 100
    means = stats.macro_mean(ours).value - stats.macro_mean(theirs).value
    assert forth.value == pytest.approx(means)
    # The same two rates unpaired: a wider interval.
    mixed = {"a": {k: np.random.default_rng(k).permutation(v) for k, v in ours["a"].items()}}
    apart = stats.paired_difference(mixed, theirs)
    assert apart.high - apart.low > 1.2 * (forth.high - forth.low)


def test_no_difference_has_p_one_and_some_width() -> None:
    same = {"a": {3: binary(20, 50)}}
    got = stats.paired_difference(same, same)
    assert (got.value, got.p_value) == (0.0, 1.0)
    assert got.low < 0.0 < got.high


def test_boards_that_are_not_shared_are_refused() -> None:
    with pytest.raises(ValueError, match="other boards"):
        stats.paired_difference({"a": {3: [1.0]}}, {"a": {4: [1.0]}})
    with pytest.raises(ValueError, match="other boards"):
        stats.gap_closed({"a": {3: [1.0]}}, {"a": {3: [1.0]}}, {"a": {3: [1.0, 0.0]}})


def three(rng: np.random.Generator, n: int, base: float, ours: float, ceiling: float) -> list[dict]:
    """Nested successes: a board that a weaker model solves, the stronger ones solve, too."""
    parts: list[dict] = [{"a": {}, "b": {}} for _ in range(3)]
    for task, level in (("a", 3), ("a", 4), ("b", 3)):
        hardness = rng.random(n)
        for part, rate in zip(parts, (base, ceiling, ours), strict=True):
            part[task][level] = (hardness < rate).astype(float)
    return parts


def test_share_of_the_gap_closed() -> None:
    rng = np.random.default_rng(0)
    base, ceiling, ours = three(rng, 50, 0.2, 0.6, 0.8)
    assert stats.gap_closed(base, ceiling, base).value == 0.0
    assert stats.gap_closed(base, ceiling, ceiling).value == 1.0
    means = [stats.macro_mean(part).value for part in (base, ceiling, ours)]
    got = stats.gap_closed(base, ceiling, ours)
    assert got.value == pytest.approx((means[2] - means[0]) / (means[1] - means[0]))
    assert got.low < got.value < got.high and got.n == 150
    worse = stats.gap_closed(base, ceiling, {"a": {3: [0] * 50, 4: [0] * 50}, "b": {3: [0] * 50}})
    assert worse.high < 0.0


@pytest.mark.usefixtures("few_draws")
def test_share_of_the_gap_covers() -> None:
    rng = np.random.default_rng(0)
    covered = 0
    for _ in range(400):
        got = stats.gap_closed(*three(rng, 50, 0.2, 0.6, 0.8))
        covered += got.low <= (0.6 - 0.2) / (0.8 - 0.2) <= got.high
    assert covered >= 372


def test_without_a_gap_its_share_is_not_defined() -> None:
    low, high = {"a": {3: binary(10, 50)}}, {"a": {3: binary(11, 50)}}
    assert math.isnan(stats.gap_closed(high, low, high).value)
    assert math.isnan(stats.gap_closed(low, low, high).value)
    unsure = stats.gap_closed(low, high, high)
    assert unsure.value == 1.0 and math.isnan(unsure.low) and math.isnan(unsure.high)


def test_pass_at_k_is_the_share_of_subsets_with_a_success() -> None:
    for n in range(1, 7):
        for successes in range(n + 1):
            answers = [True] * successes + [False] * (n - successes)
            for k in range(1, n + 1):
                subsets = list(itertools.combinations(answers, k))
                want = sum(map(any, subsets)) / len(subsets)
                assert stats.pass_at_k(n, successes, k) == pytest.approx(want)


def test_pass_at_k_is_unbiased() -> None:
    n, rate = 8, 0.3
    for k in (1, 3, 8):
        chances = scipy_stats.binom.pmf(np.arange(n + 1), n, rate)
        mean = sum(p * stats.pass_at_k(n, c, k) for c, p in enumerate(chances))
        assert mean == pytest.approx(1 - (1 - rate) ** k)
    for n, successes, k in ((2, 3, 1), (2, 1, 3), (2, 1, 0)):
        with pytest.raises(ValueError, match="want"):
            stats.pass_at_k(n, successes, k)


def simulated_runs(
    rng: np.random.Generator, count: int, spread: float, rate: float = 0.6
) -> list[stats.Strata]:
    """Runs whose skill differs from seed to seed, on the same boards, easy and hard ones."""
    difficulty = rng.random((2, 60))
    runs: list[stats.Strata] = []
    for _ in range(count):
        skill = rate + spread * rng.standard_normal()
        runs.append(
            {
                task: {3: (rng.random(60) < np.clip(skill + 0.4 * (d - 0.5), 0, 1)).astype(float)}
                for task, d in zip("ab", difficulty, strict=True)
            }
        )
    return runs


@pytest.mark.usefixtures("few_draws")
@pytest.mark.parametrize("spread", [0.0, 0.05, 0.15])
def test_a_mean_over_runs_covers_the_mean_over_seeds_and_boards(spread: float) -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(300):
        found = stats.over_runs(simulated_runs(rng, 3, spread))
        held += found.low <= 0.6 <= found.high
    assert held / 300 > 0.93


@pytest.mark.usefixtures("few_draws")
def test_runs_that_differ_by_nothing_seldom_seem_to() -> None:
    rng = np.random.default_rng(1)
    found = [
        stats.runs_difference(simulated_runs(rng, 3, 0.1), simulated_runs(rng, 3, 0.1)).p_value
        for _ in range(300)
    ]
    assert np.mean(np.array(found) < 0.05) < 0.07
    better = stats.runs_difference(
        simulated_runs(rng, 3, 0.02, 0.9), simulated_runs(rng, 3, 0.02, 0.4)
    )
    assert better.low > 0.1
    assert better.p_value < 0.05
    with pytest.raises(ValueError, match="got 1 and 2 runs"):
        stats.runs_difference(simulated_runs(rng, 1, 0.0), simulated_runs(rng, 2, 0.0))


def test_one_run_has_the_interval_of_its_boards() -> None:
    (run,) = simulated_runs(np.random.default_rng(2), 1, 0.1)
    assert stats.over_runs([run]) == stats.macro_mean(run)
    other = simulated_runs(np.random.default_rng(3), 1, 0.1)
    assert stats.runs_difference([run], other) == stats.paired_difference(run, other[0])
