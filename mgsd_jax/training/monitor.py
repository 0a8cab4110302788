"""Metrics of a training run's rollouts: how they score, and how student and teacher differ.

Axes: B batch, R response tokens.
"""

import collections
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.envs import ENVS, facts
from mgsd_jax.envs.base import Outcome
from mgsd_jax.evaluation import rules, scoring
from mgsd_jax.evaluation.routes import draw_route
from mgsd_jax.parallel.means import Mean
from mgsd_jax.training.divergences import TokenStats
from mgsd_jax.workdir.sinks import Picture

FEWEST = 8  # boards of which a mean by kind of fact is told: one of three says nothing
SHOWN = 8  # boards of a validation, the same ones every time


class Judged(NamedTuple):
    """What a rollout came to."""

    outcome: Outcome
    state_exact: bool


def judge_rollouts(boards: Sequence[Board], responses: Sequence[str]) -> list[Judged]:
    """What each response came to on its board."""
    judged = []
    for board, response in zip(boards, responses, strict=True):
        outcome = rules.judge(board.state, board.task, response)
        stated = facts.read_facts(board.task, response)
        true = ENVS[board.task].facts(board.state)
        judged.append(Judged(outcome, facts.is_exact(board.task, stated, true)))
    return judged


def rollout_metrics(
    boards: Sequence[Board], judged: Sequence[Judged], truncated: np.ndarray, mask: np.ndarray
) -> dict[str, Mean]:
    """Scores of rollouts, named `rollout/...`.

    The shares that could be parsed, are legal, reach the goal and are shortest, in all and by task;
    the share that describes the state without error; the mean length in tokens; the share that was
    cut off at the longest length (`truncated` [B]).
    """
    sums: dict[str, Mean] = collections.defaultdict(lambda: Mean(0.0, 0.0))
    for board, (outcome, exact) in zip(boards, judged, strict=True):
        for name in ("parsed", "legal", "success", "optimal"):
            one = Mean(float(getattr(outcome, name)), 1.0)
            sums[f"rollout/{name}"] += one
            sums[f"rollout/{name}/{board.task}"] += one
        sums["rollout/state_exact"] += Mean(float(exact), 1.0)
    sums["rollout/length"] = Mean(float(mask.sum()), float(len(boards)))
    sums["rollout/truncated"] = Mean(float(np.sum(truncated)), float(len(boards)))
    return dict(sums)


def token_metrics(groups: np.ndarray, stats: TokenStats) -> dict[str, Mean]:
    """KL and agreement between student and teacher, by token group and by position; entropies.

    `groups` [B, R] are the parts that tokens belong to, from `segments.segments`. Agreement is the
    share of tokens for which student and teacher find the same token likeliest. A group, or a range
    of positions, without tokens has no metric.
    """
    kl, agree, valid = np.asarray(stats.kl), np.asarray(stats.top1_agree), groups >= 0
    count = float(valid.sum())
    measured: dict[str, Mean] = {}

    def add(name: str, position: str, inside: np.ndarray) -> None:
        weight = float(inside.sum())
        if weight:
            measured[f"kl{name}/{position}"] = Mean(float(kl[inside].sum()), weight)
            measured[f"agree{name}/{position}"] = Mean(float(agree[inside].sum()), weight)

    for i, group in enumerate(prompts_lib.SEGMENTS):
        add("", group, groups == i)
    position = np.broadcast_to(np.arange(kl.shape[1]), kl.shape)
    for low, high in ((0, 4), (4, 16), (16, 64), (64, 256), (256, 1 << 30)):
        inside = valid & (position >= low) & (position < high)
        add("_pos", f"{low}-{high - 1}" if high < 1 << 30 else f"{low}-", inside)
    for name, values in (
        ("kl", stats.kl),
        ("student_entropy", stats.student_entropy),
        ("teacher_entropy", stats.teacher_entropy),
        ("teacher_agreement", stats.top1_agree),
        ("kl_cap_share", stats.clipped),
    ):
        measured[name] = Mean(float(np.asarray(values)[valid].sum()), count)
    return measured


def draft_metrics(groups: np.ndarray, mask: np.ndarray, guessed: np.ndarray) -> dict[str, Mean]:
    """Tokens that drafted rollouts gained in each pass of the model, in all and by token group.

    `guessed` [B, R] marks the tokens that a draft had right: all others cost a pass each. The first
    token of a response is not counted, because prefill makes it. A group whose tokens were all
    guessed has no pass of its own, and no metric.
    """
    later = (mask > 0) & (np.arange(mask.shape[1]) > 0)
    passes = later & ~(guessed > 0)
    inside = {"": later} | {f"/{g}": groups == i for i, g in enumerate(prompts_lib.SEGMENTS)}
    counts = {name: ((later & here).sum(), (passes & here).sum()) for name, here in inside.items()}
    return {
        f"rollout/kept_a_pass{name}": Mean(float(tokens), float(own))
        for name, (tokens, own) in counts.items()
        if own
    }


def validation_metrics(
    boards: Sequence[Board], answers: Sequence[scoring.Answer]
) -> dict[str, Mean]:
    """Success and exact states over the validation boards, also by task, as an evaluation has them.

    A task is the mean over its levels, the whole the mean over tasks. State F1 by kind of fact is
    a mean over the boards that it is measured on, where these are `FEWEST` or more.
    """
    cells: dict[str, dict[int, list[tuple[bool, bool]]]] = {}
    kinds: dict[str, Mean] = collections.defaultdict(lambda: Mean(0.0, 0.0))
    for board, answer in zip(boards, answers, strict=True):
        score = scoring.score_plan(board, answer.text)
        for kind, f1 in (score.get("state_f1_by_kind") or {}).items():
            kinds[f"val/state_f1/{board.task}/{kind}"] += Mean(f1, 1.0)
        result = (score["outcome"]["success"], bool(score["state_exact"]))
        cells.setdefault(board.task, {}).setdefault(board.level, []).append(result)
    tasks = {
        f"/{task}": np.mean([np.mean(cell, axis=0) for cell in levels.values()], axis=0)
        for task, levels in cells.items()
    }
    return {
        f"val/{name}{task}": Mean(float(mean[i]), 1.0)
        for task, mean in {"": np.mean(list(tasks.values()), axis=0), **tasks}.items()
        for i, name in enumerate(("success", "state_exact"))
    } | {name: mean for name, mean in kinds.items() if mean.weight >= FEWEST}


def shown_answers(
    boards: Sequence[Board],
    answers: Sequence[scoring.Answer],
    picture: Callable[[Board], np.ndarray],
) -> list[Picture]:
    """The first `SHOWN` boards with the routes of their answers; the caption is the answer."""
    shown = []
    for board, answer in zip(boards[:SHOWN], answers, strict=False):
        parsed = rules.parse_plan(answer.text, board.task)
        outcome = rules.play(board.state, board.task, parsed)
        drawn = draw_route(picture(board), board.task, board.state, parsed.plan)
        said = "success" if outcome.success else f"no success: {outcome.reason}"
        name = f"boards/{board.task}_{board.level}_{board.index:04d}"
        shown.append(Picture(name, drawn, f"{said}\n{answer.text}"))
    return shown


def spread(boards: Sequence[Board], count: int) -> list[Board]:
    """`count` of the boards, dealt evenly: one of each task and level, then the next of each."""
    cells: dict[tuple[str, int], list[Board]] = collections.defaultdict(list)
    for i in range(min(len(boards), 1 << 14)):
        cells[boards[i].task, boards[i].level].append(boards[i])
    chosen: list[Board] = []
    for turn in range(max((len(cell) for cell in cells.values()), default=0)):
        chosen += [cell[turn] for cell in cells.values() if turn < len(cell)]
    return chosen[:count]
