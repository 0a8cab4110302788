"""Warning signs: measures of a step that show a run going wrong, and the warning about each.

They watch for failures that others report of on-policy distillation: responses that grow longer and
repeat themselves (arXiv 2604.08527), teacher and student prompts with different chat templates
(tinker-cookbook issue 796), and a sampler that computes another model than the one in training
(arXiv 2512.23087). The thresholds are in `config.GuardConfig`.

Axes: B rollouts, R response tokens.
"""

import collections
import math
from collections.abc import Mapping, Sequence

import numpy as np

from mgsd_jax.config import GuardConfig, SamplingConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.boards import Board
from mgsd_jax.data.processor import Processor
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.parallel.means import Mean
from mgsd_jax.sampling.answers import Answerer
from mgsd_jax.tree import Tree

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
        "val/blind_same": (limits.blind_same, "the answers hardly depend on the picture"),
        "logprob_gap": (limits.logprob_gap, "sampler and loss compute different models"),
    }
    found = {
        metric: f"{metric} is {values[metric]:.3g}, above {limit:g}: {meaning}"
        for metric, (limit, meaning) in watched.items()
        if values.get(metric, 0.0) > limit
    }
    found |= _unread(values, limits)
    kept, least = values.get("rollout/kept_a_pass", math.inf), limits.kept_a_pass
    if kept < least:
        found["rollout/kept_a_pass"] = (
            f"rollout/kept_a_pass is {kept:.3g}, below {least:g}: drafts do not pay, "
            "set distillation.sampling.draft_tokens=0 or fewer"
        )
    return found


def _unread(values: Mapping[str, float], limits: GuardConfig) -> dict[str, str]:
    """The warning about each kind of fact that validation answers hardly ever state right.

    In the small study two seeds of three without grounding stated of every lake that it has no
    holes, and stayed so. Answers that state nothing else of a board either are left alone: their
    prompt may not ask for it. A size says nothing of that: it is soon named in passing.
    """
    tasks: dict[str, dict[str, float]] = collections.defaultdict(dict)
    for metric, f1 in values.items():
        if metric.startswith("val/state_f1/") and not metric.endswith("/size"):
            tasks[metric.rpartition("/")[0]][metric] = f1
    return {
        metric: f"{metric} is {f1:.3g}, below {limits.least_kind_f1:g}: hardly ever stated right; "
        "does the prompt ask for it? if so, and it lasts, ground the student longer first"
        for found in tasks.values()
        if max(found.values()) > 0.5
        for metric, f1 in found.items()
        if f1 < limits.least_kind_f1
    }


def collapse(values: Mapping[str, float], limits: GuardConfig) -> str:
    """What a step says of a run that is collapsing: its entropy or its responses; '' if nothing.

    On-policy distillation without a verifier has been seen to end so (arXiv 2606.04036).
    """
    least = {"student_entropy": limits.least_entropy, "rollout/length": limits.least_length}
    for metric, limit in least.items():
        if values.get(metric, math.inf) < limit:
            return f"{metric} is {values[metric]:.3g}, below {limit:g}"
    return ""


def misread(kl: float, own: float, limits: GuardConfig) -> str:
    """What is wrong where student and teacher lie `kl` nats a token apart before any training.

    `own` is their divergence where the teacher reads the student's prompt, picture and all.
    """
    found = f"the first update finds {kl:.3g} nats a token between student and teacher, above "
    found += f"{limits.start_kl:g}, and {own:.3g} where the teacher reads the student's prompt: "
    if own > limits.start_kl:
        return found + "do both read the same tokens, and is the teacher a relative of the student?"
    return found + "is the teacher's prompt about the same board, and does it end as the student's?"


def check_pictures(inputs: Inputs, processor: Processor) -> None:
    """Raises ValueError where a row's picture tokens are not its picture features, one for one.

    inputs are those of the host.
    """
    is_picture = np.asarray(inputs.tokens) == processor.image_token_id
    slots, features = np.zeros_like(is_picture), np.zeros(len(is_picture), int)
    if inputs.pictures is not None:
        slots = np.asarray(inputs.pictures.slots) >= 0
        features = np.asarray(inputs.pictures.valid).sum((1, 2)) // processor.pictures.merge_size**2
    is_wrong = (is_picture != slots).any(1) | (is_picture.sum(1) != features)
    if is_wrong.any():
        row = int(np.argmax(is_wrong))
        raise ValueError(
            f"batch: got {is_picture[row].sum()} picture tokens, {slots[row].sum()} slots and "
            f"{features[row]} features in row {row}, want one of each at the same places"
        )


def is_blind_due(step: int, eval_every: int, limits: GuardConfig) -> bool:
    """Whether the validation after `step` steps shows wrong pictures too: the first one does."""
    validation = math.ceil(step / eval_every) if eval_every else 1
    return limits.blind_every > 0 and (validation - 1) % limits.blind_every == 0


def blind_measure(
    answer: Answerer, variables: Tree, boards: Sequence[Board], seen: Sequence[Answer]
) -> dict[str, Mean]:
    """`val/blind_same`: the share of answers that another board's picture leaves as they are.

    Boards that are the only ones of their task and level have no weight.
    """
    levels = collections.Counter(board[:2] for board in boards)
    paired = [i for i, board in enumerate(boards) if levels[board[:2]] > 1]
    if not paired:
        return {}
    blind = answer(variables, [boards[i] for i in paired], "blind", row_ids=paired)
    same = sum(seen[i].text == other.text for i, other in zip(paired, blind, strict=True))
    return {"val/blind_same": Mean(float(same), float(len(paired)))}
