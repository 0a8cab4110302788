"""docs/metrics.md has every metric that is written, and none that is not."""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import optax
from test_summary import asked, series

from mgsd_jax.config import SamplingConfig
from mgsd_jax.data import prompts
from mgsd_jax.data.loaders import stream_boards
from mgsd_jax.envs import ENVS
from mgsd_jax.evaluation import summary
from mgsd_jax.evaluation.scoring import Answer
from mgsd_jax.report import words
from mgsd_jax.training import guards, monitor, optimizer, sessions
from mgsd_jax.training.divergences import TokenStats

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "metrics.md").read_text()
STEPS, SUMMARY = PAGE.split("## summary.json")
KINDS = {kind for env in ENVS.values() for kind in env.kinds}
PARTS = {"kind": [*KINDS], "task": [*ENVS], "part": [*prompts.SEGMENTS], "range": [r"\d+-\d*"]}
MEASURE = {"value", "low", "high", "n", "p_value"}


def rows(text: str) -> list[str]:
    """The names of the first column of the tables."""
    return re.findall(r"^\| `([^`]+)` \|", text, re.M)


def pattern(name: str) -> str:
    for place, values in PARTS.items():
        name = name.replace(f"{{{place}}}", f"({'|'.join(values)})")
    return name


def unlisted(names: Iterable[str]) -> set[str]:
    """Names of metrics of steps that the page does not have."""
    known = [pattern(name) for name in rows(STEPS)]
    return {name for name in names if not any(re.fullmatch(one, name) for one in known)}


def written() -> set[str]:
    """The names that the stages write, from the functions that make them."""
    board = stream_boards([("frozenlake", 3)], "val", seed=0, count=1)[0]
    ones = np.ones((1, 400))
    groups = (np.arange(400) % len(prompts.SEGMENTS))[None]
    each: Any = ones
    stats = TokenStats(*(each for _ in TokenStats._fields))
    found: set[str] = {"step", "time", "seconds", "loss", "token_accuracy"}
    judged = monitor.judge_rollouts([board], [""])
    found |= monitor.rollout_metrics([board], judged, np.zeros(1), ones).keys()
    found |= monitor.token_metrics(groups, stats).keys()
    found |= monitor.draft_metrics(groups, ones, np.zeros_like(ones)).keys()
    found |= monitor.validation_metrics([board] * 8, [Answer("", False, 0)] * 8).keys()
    found |= guards.blind_measure(
        lambda *_, **__: [Answer("", False, 0)] * 2, {}, [board] * 2, [Answer("", False, 0)] * 2
    ).keys()
    found |= guards.rollout_measures(ones, ones, ones, ones, SamplingConfig()).keys()
    with mock.patch.object(sessions, "peak_flops", lambda: 1.0):
        found |= sessions.speed(1.0, 1, 1.0).keys()
    tx = optax.sgd(1.0)
    state = optimizer.init({"w": jnp.ones(2)}, tx, None)
    found |= jax.eval_shape(lambda s: optimizer.update(s, s.params, tx)[1], state).keys()
    parts = ("", "_rollout", "_step", "_validation")
    for stage in ("grounding", *(f"distillation{part}" for part in parts)):
        source = (ROOT / "mgsd_jax" / "stages" / f"{stage}.py").read_text()
        found |= {*re.findall(r'"(val/\w+)": ', source)}
        found |= {*re.findall(r'\.phase\("(\w+)"\)', source)}
        found |= {*re.findall(r'return \{"(\w+/[\w/]+)": ', source)}
        found |= {*re.findall(r'\b(?:measured|spent)\["([\w/]+)"\]', source)}
        if 'f"questions/{name}"' in source:
            found |= {"questions/loss", "questions/token_accuracy"}
    return found


def test_the_page_has_the_metrics_of_every_step_and_no_others() -> None:
    names = written()
    assert len(names) > 45 and unlisted(names) == set()
    for name in rows(STEPS):
        assert any(re.fullmatch(pattern(name), one) for one in names), name


def test_the_report_has_words_and_a_unit_for_every_name_of_the_page() -> None:
    for name in {*rows(STEPS)} - {"step", "time"}:
        assert words.metric(name).unit != "value", name


def test_the_page_has_the_measures_of_a_summary_and_no_others() -> None:
    plans = [
        row
        for model in ("base", "distilled")
        for mode in ("picture", "text", "blind")
        for task in ("maze", "frozenlake")
        for row in series(model, mode, [True, False], task=task)
    ]
    again: list[Any] = [{**row, "attempt": 1, "id": f"{row['id']}/1"} for row in plans]
    made: Any = summary.summarize([*plans, *again, asked(0, {"where": True})])
    named = {*ENVS, *summary.MODES, *summary.ERRORS, "base", "distilled", "mean", "median", "max"}
    named |= {"standard", "upstream_reward", "upstream_eval", "not_reached", "where", *MEASURE}
    found = {name for name in keys(made) if not name.isdigit() and " - " not in name}
    listed = {*rows(SUMMARY)}
    assert found - named - listed == set()
    assert listed - found == set()
    for name in named & found - {*ENVS, "base", "distilled", "not_reached", "where"}:
        assert f"`{name}`" in SUMMARY or name in ("text", "picture", "blind"), name


def keys(value: Any) -> set[str]:
    if not isinstance(value, dict):
        return set()
    return set(value).union(*map(keys, value.values()))
