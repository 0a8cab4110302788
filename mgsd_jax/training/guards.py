"""Warning signs: measures of a step that show a run going wrong, and the warning about each.

They watch for failures that others report of on-policy distillation: responses that grow longer and
repeat themselves (arXiv 2604.08527), teacher and student prompts with different chat templates
(tinker-cookbook issue 796), and a sampler that computes another model than the one in training
(arXiv 2512.23087). The thresholds are in `config.GuardConfig`.

Axes: B rollouts, R response tokens.
"""

import math
from collections.abc import Mapping

import numpy as np

from mgsd_jax.config import GuardConfig, SamplingConfig
from mgsd_jax.parallel.means import Mean

NGRAM = 4


def repeated_share(tokens: np.ndarray, mask: np.ndarray, n: int = NGRAM) -> Mean:
    """The share of a response's n-grams that occurred earlier in it, averaged over the responses.

    `tokens` [B, R] are ids; `mask` [B, R] is non-zero from the first token of a response to its
    last. Example: a b a b a b has five bigrams, of which three occurred before, so its share is
    3/5. Responses shorter than n tokens are left out.
    """
    shares = []
    for row, length in zip(tokens, np.count_nonzero(mask, axis=1), strict=True):
        if length >= n:
            grams = np.lib.stride_tricks.sliding_window_view(row[:length], n)
            shares.append(1.0 - len(np.unique(grams, axis=0)) / len(grams))
    return Mean(float(np.sum(shares)), float(len(shares)))


def logprob_gap(sampled: np.ndarray, trained: np.ndarray, mask: np.ndarray) -> Mean:
    """Mean absolute difference in nats of two logprobs [B, R] a token, over tokens in the mask."""
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
    """The metric `rollout/repeated`, and `logprob_gap` where that can be compared.

    `sampled` and `trained` [B, R] are the logprobs that sampler and update give the tokens. With
    top-k, top-p or a temperature other than 1 the sampler draws from another distribution than the
    update computes, and their difference would mean nothing. Greedy rollouts report logprobs at
    temperature 1.
    """
    measures = {"rollout/repeated": repeated_share(tokens, mask)}
    is_plain = sampling.top_p == 1 and sampling.top_k == 0 and sampling.temperature in (0, 1)
    if is_plain:
        measures["logprob_gap"] = logprob_gap(sampled, trained, mask)
    return measures


def warnings(values: Mapping[str, float], limits: GuardConfig) -> dict[str, str]:
    """The warnings about a step: {metric: text} for each metric beyond its threshold."""
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
