"""The words and numbers of a report: labels, percentages with intervals, and the verdict."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

from mgsd_jax.envs import ENVS, base
from mgsd_jax.evaluation.measures import Measure
from mgsd_jax.evaluation.summary import MODELS, Summary

DASH = "–"
TASKS = {task: env.title for task, env in ENVS.items()}
FACTS = {task: env.kinds for task, env in ENVS.items()}
MODES = {
    "picture": "picture",
    "text": "text",
    "blind": "wrong picture",
    "perception": "questions",
}
# Best first: the order of the stacked bars.
ERRORS = {
    "success": "solved, shortest",
    "not_optimal": "solved, not shortest",
    "not_successful": "plan legal, not solved",
    "illegal_plan": "plan illegal",
    "wrong_state": "state read wrong",
    "truncated": "cut off at the token limit",
    "unparsed": "no readable plan",
    "request_failed": "request failed",
}
RULES = {
    "standard": "ours",
    "upstream_reward": "public reward",
    "upstream_eval": "public evaluation",
}
# What a metric of training measures, and in what unit, in the order of their curves; of 'a/b' the
# words for 'a', and b after them.
SHARE, _NATS = "share", "nats a token"
METRICS = {
    "loss": ("Loss", _NATS),
    "val/loss": ("Loss, validation", _NATS),
    "val/kl": ("KL to the teacher, validation", _NATS),
    "val/success": ("Solved boards, validation", SHARE),
    "kl": ("KL to the teacher", _NATS),
    "val/divergence": ("Divergence to the teacher, validation", _NATS),
    "val/state_exact": ("States read exactly, validation", SHARE),
    "val/blind_same": ("Same answer to another picture, validation", SHARE),
    "rollout/success": ("Solved boards, training", SHARE),
    "token_accuracy": ("Answer tokens right", SHARE),
    "questions/loss": ("Loss, questions", _NATS),
    "questions/token_accuracy": ("Answer tokens right, questions", SHARE),
    "rollout/state_exact": ("States read exactly, training", SHARE),
    "rollout/optimal": ("Solved the shortest way, training", SHARE),
    "teacher_agreement": ("Same next token as the teacher", SHARE),
    "student_entropy": ("Entropy of the student", _NATS),
    "teacher_entropy": ("Entropy of the teacher", _NATS),
    "agree": ("Same next token as the teacher", SHARE),
    "grad_norm": ("Norm of the gradient", "norm"),
    "update_norm": ("Norm of the update", "norm"),
    "param_norm": ("Norm of what is trained", "norm"),
    "skipped_update": ("Updates skipped", "skipped"),
    "rollout/length": ("Length of a response", "tokens"),
    "rollout/truncated": ("Cut off at the token limit", SHARE),
    "rollout/parsed": ("Readable plans, training", SHARE),
    "rollout/legal": ("Legal plans, training", SHARE),
    "rollout/repeated": ("Repeated four-token pieces", SHARE),
    "rollout/kept_a_pass": ("Tokens kept a pass", "tokens"),
    "val/state_f1": ("State F1, validation", "F1"),
    "kl_pos": ("KL to the teacher, token", _NATS),
    "agree_pos": ("Same next token as the teacher, token", SHARE),
    "kl_cap_share": ("Tokens at the cap of the KL", SHARE),
    "logprob_gap": ("Sampler against trainer", _NATS),
    "seconds": ("Time of a step", "seconds"),
    "rollout": ("Time of the rollout", "seconds"),
    "update": ("Time of the update", "seconds"),
    "validation": ("Time of the validation", "seconds"),
    "checkpoint": ("Time of saving", "seconds"),
    "data": ("Waiting for data", "seconds"),
    "tflops_per_s": ("Speed of the update", "TFLOP/s"),
    "tokens_per_s": ("Speed", "tokens/s"),
    "mfu": ("Share of the device's peak", SHARE),
    "lr": ("Learning rate", "rate"),
}
REASONS = {
    **base.REASONS,
    **{reason: words for env in ENVS.values() for reason, words in env.reasons.items()},
}


class Metric(NamedTuple):
    """A metric of training as a reader meets it."""

    title: str
    unit: str  # the name of its y axis
    rank: int  # of its curve among the others


def metric(name: str) -> Metric:
    """Return the words for a metric of training.

    >>> metric("rollout/success/maze").title
    'Solved boards, training, Maze'
    """
    rest: list[str] = []
    known = name
    while known not in METRICS and "/" in known:
        known, _, part = known.rpartition("/")
        kind = FACTS.get(known.rpartition("/")[2], {}).get(part)
        rest.insert(0, kind or TASKS.get(part, part.replace("_", " ")))
    title, unit = METRICS.get(known, (known.replace("_", " ").capitalize(), "value"))
    rank = list(METRICS).index(known) if known in METRICS else len(METRICS)
    return Metric(", ".join([title, *rest]), unit, rank)


def percent(value: float | None, digits: int = 1) -> str:
    """Return a share as '41.2 %', or a dash."""
    return DASH if value is None else f"{100 * value:.{digits}f} %"


def interval(measure: Measure | None, digits: int = 1) -> str:
    """Return the interval of shares as '37.0–45.4', or nothing."""
    if measure is None or measure["low"] is None:
        return ""
    limits = [f"{100 * measure[key]:.{digits}f}".replace("-", "−") for key in ("low", "high")]
    return (" to " if measure["low"] < 0 else "–").join(limits)


def spelled(measure: Measure | None, digits: int = 1) -> str:
    """Return '41.2 % (37.0–45.4)', or a dash."""
    if measure is None or measure["value"] is None:
        return DASH
    text = percent(measure["value"], digits)
    return f"{text} ({interval(measure, digits)})" if measure["low"] is not None else text


def signed(measure: Measure) -> str:
    """Return the interval of a difference as '-1.2 to +4.0'."""
    return f"{points(measure['low'])} to {points(measure['high'])}"


def p_value(measure: Measure) -> str:
    """Return the p-value of a difference as 'p 0.032' or 'p < 0.001'."""
    assert "p_value" in measure
    value = measure["p_value"]
    return "p < 0.001" if value < 0.001 else f"p {value:.3f}"


def points(value: float) -> str:
    """Return a difference of shares in points, as '+4.0' or '−1.2'; '−0.03' rather than '−0.0'."""
    size = round(100 * value, 2) + 0.0  # no -0.0
    return f"{size:+.{2 if 0 < abs(size) < 0.05 else 1}f}".replace("-", "−")


def model_label(name: str) -> str:
    """Return the name of a model as it stands in running text and tables."""
    return name.replace("_", " ")


def reason_label(reason: str) -> str:
    """Return a reason of `Outcome` in words."""
    return REASONS[reason] if reason in REASONS else reason.replace("_", " ")


def compared(names: Sequence[str], summary: Summary) -> str:
    """Return the models in this order, joined by what their paired differences say: 'b > a ≈ c'.

    '>' and '<' where the 95 % interval of the difference leaves out 0, '≈' where it does not, '?'
    where the two have no board in common.
    """
    text = model_label(names[0])
    for name, other in itertools.pairwise(names):
        text += f" {_sign(name, other, summary)} {model_label(other)}"
    return text


def _sign(name: str, other: str, summary: Summary) -> str:
    differences = summary["differences"]
    is_mirrored = f"{name} - {other}" not in differences
    found = differences[f"{other} - {name}" if is_mirrored else f"{name} - {other}"]
    if found is None or found["low"] is None:
        return "?"
    if found["low"] <= 0 <= found["high"]:
        return "≈"
    return ">" if (found["low"] > 0) != is_mirrored else "<"


def order(summary: Summary) -> str:
    """Return who beats whom from pictures, the last model first: 'Distilled > grounded ≈ base'."""
    names = _known(summary)
    text = compared(names, summary) if names else "nothing evaluated from the picture"
    return text[:1].upper() + text[1:]


def verdict(summary: Summary) -> str:
    """Return one sentence on what the evaluation shows, made from its numbers alone."""
    names = _known(summary)
    if not names:
        return "No model was evaluated from the picture, so there is nothing to compare."
    last, *others = names
    macro = _macro(last, summary)
    text = f"From the picture alone, the {last} model solves {spelled(macro)} of the boards"
    against = [_against(last, other, summary) for other in others]
    return "; ".join([", ".join([text, *against]), _closed(last, summary)]) + "."


def _known(summary: Summary) -> list[str]:
    """Those of MODELS that were asked from pictures, the last first."""
    models = summary["models"]
    return [name for name in reversed(MODELS) if "picture" in models.get(name, ())]


def _macro(name: str, summary: Summary) -> Measure:
    return summary["models"][name]["picture"]["macro"]


def _against(name: str, other: str, summary: Summary) -> str:
    difference = summary["differences"][f"{name} - {other}"]
    if difference is None or difference["value"] is None:
        return f"on no board that {other} was asked too"
    size = f"{100 * abs(difference['value']):.1f} points"
    side = {
        ">": f"{size} more than {other}",
        "<": f"{size} fewer than {other}",
        "≈": f"not clearly different from {other}",
    }[_sign(name, other, summary)]
    mine, theirs = _macro(name, summary), _macro(other, summary)
    overlap = mine["low"] <= theirs["high"] and theirs["low"] <= mine["high"]
    return (
        f"{side} at {percent(theirs['value'])} (paired {signed(difference)}; their own intervals "
        f"{'overlap' if overlap else 'do not overlap'})"
    )


def _closed(name: str, summary: Summary) -> str:
    gap = summary["modality_gap"].get("base")
    if gap is None:
        return "the gap to text input was not measured"
    if gap["value"] is None or gap["value"] <= 0:
        return "the base model does no better from text, so there is no gap to close"
    size = f"{100 * gap['value']:.1f} points"
    closed = summary["gap_closed_by"].get(name)
    if closed is None or closed["value"] is None:
        return f"the base model gains {size} from text input"
    limits = f" ({interval(closed, 0)})" if closed["low"] is not None else ""
    share = percent(closed["value"], 0)
    return f"{share}{limits} of the base model's gap to text input ({size}) is closed"
