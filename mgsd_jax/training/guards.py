"""Measures of a step that tell a run going wrong, and what is said when one passes its threshold.

The measures and the thresholds that have a source are those of the failures reported for on-policy
distillation: length inflation and repetition (arXiv 2604.08527), prompts whose templates differ
(tinker-cookbook issue 796), a sampler that is not the model trained (arXiv 2512.23087).

Axes: B rollouts, R response tokens.
"""

import math
from collections.abc import Mapping

import numpy as np

from mgsd_jax.config import GuardConfig, SamplingConfig
from mgsd_jax.parallel.means import Mean

NGRAM = 4


def repeated_share(tokens: np.ndarray, mask: np.ndarray, n: int = NGRAM) -> Mean:
    """The share of a response's n-grams that stood in it before, its mean over the responses.

    tokens [B, R] int, mask [B, R] non-zero through the end of each response. a b a b a b has three
    bigrams that repeat one of its two: 3/5. Responses shorter than n have no weight.
    """
    shares = []
    for row, length in zip(tokens, np.count_nonzero(mask, axis=1), strict=True):
        if length >= n:
            grams = np.lib.stride_tricks.sliding_window_view(row[:length], n)
            shares.append(1.0 - len(np.unique(grams, axis=0)) / len(grams))
    return Mean(float(np.sum(shares)), float(len(shares)))


def logprob_gap(sampled: np.ndarray, trained: np.ndarray, mask: np.ndarray) -> Mean:
    """Mean |difference| in nats of two logprobs [B, R] of the same tokens, over those in mask."""
    valid = mask > 0
    gaps = np.abs(sampled.astype(np.float64) - trained)[valid]
    return Mean(float(gaps.sum()), float(valid.sum()))


def rollout_measures(
    tokens: np.ndarray,
    mask: np.ndarray,
    sampled: np.ndarray,
    trained: np.ndarray,
    sampling: SamplingConfig,
) -> dict[str, Mean]:
    """`rollout/repeated`, and `logprob_gap` where sampler and loss mean the same distribution.

    A temperature, top-k or top-p changes what is sampled from, so that the gap would say nothing.
    """
    measures = {"rollout/repeated": repeated_share(tokens, mask)}
    is_plain = sampling.top_p == 1 and sampling.top_k == 0 and sampling.temperature in (0, 1)
    if is_plain:
        measures["logprob_gap"] = logprob_gap(sampled, trained, mask)
    return measures


def warnings(values: Mapping[str, float], limits: GuardConfig) -> dict[str, str]:
    """{metric: what to say} of the metrics of a step that passed their thresholds."""
    watched = {
        "rollout/truncated": (limits.truncated, "responses grow too long or no longer end"),
        "rollout/repeated": (limits.repeated, "responses run in circles"),
        "kl_pos/0-3": (limits.first_kl, "do the two prompts end in the same way?"),
        "logprob_gap": (limits.logprob_gap, "sampler and loss compute different models"),
    }
    found = {
        metric: f"{metric} is {values[metric]:.3g}, above {limit:g}: {meaning}"
        for metric, (limit, meaning) in watched.items()
        if values.get(metric, 0.0) > limit
    }
    kept, least = values.get("rollout/kept_a_pass", math.inf), limits.kept_a_pass
    if kept < least:
        found["rollout/kept_a_pass"] = (
            f"rollout/kept_a_pass is {kept:.3g}, below {least:g}: drafts do not pay, "
            "set distillation.sampling.draft_tokens=0 or fewer"
        )
    return found
