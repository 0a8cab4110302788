"""No field takes a value that no run could use: every field gets values of every wrong kind.

What is wrong follows from the annotation, so a new field is tested as soon as it is there; where
nothing (0, '', ()) is a value with a meaning, the field is listed here.
"""

import dataclasses
import math
import pathlib
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest

from mgsd_jax import config as config_lib
from mgsd_jax.checks import ranges
from mgsd_jax.checks.ranges import Between, Items, coerce
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config, NanoConfig

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = dataclasses.replace(
    load_config(str(ROOT / "configs" / "nano.py"), []), nano=NanoConfig(folder="a")
)
ZERO_IS_FINE = {
    "data.augment",
    *("seed", "mesh.rollout_tensor"),
    *("data.boards.train", "data.boards.val", "data.boards.test"),
    *("data.picture_size", "data.cell_pixels"),
    *("checkpoint.every", "checkpoint.keep_best"),
    *("grounding.eval_every", "distillation.eval_every"),
    *("grounding.lora.rank", "distillation.lora.rank"),
    *("distillation.sampling.top_k", "evaluate.sampling.top_k"),
    *("distillation.sampling.draft_tokens", "evaluate.sampling.draft_tokens", "guards.kept_a_pass"),
    *("grounding.optim." + name for name in ("lr", "warmup", "b1", "b2", "weight_decay", "clip")),
    *("distillation.optim." + n for n in ("lr", "warmup", "b1", "b2", "weight_decay", "clip")),
    *("distillation.sampling.temperature", "evaluate.sampling.temperature"),
    *("distillation.teacher_decay", "distillation.teacher_noise", "distillation.reference_share"),
    *("distillation.forward_kl_mix", "distillation.token_kl_cap", "distillation.grounding_share"),
    *("distillation." + n for n in ("contrast_cap", "wrong_weight", "wrong_weight_from")),
    *("distillation.success_weight", "distillation.replay_steps"),
    *("guards.truncated", "guards.repeated", "guards.first_kl", "guards.logprob_gap"),
    *("guards.start_kl", "guards.blind_every", "guards.blind_same"),
    *("guards.least_entropy", "guards.least_length", "guards.least_kind_f1"),
    *("evaluate.endpoint_retries", "preflight.hbm_gib", "ask.level"),
}
NOTHING_IS_FINE = {
    *("data.prompts", "data.exclude", "report.runs", "report.model", "preflight.only"),
    *("preflight.stages", "nano.deepstack", "distillation.token_weights"),
    "distillation.response_buckets",
    *("metrics.sinks", "metrics.name", "metrics.profile"),
    *("evaluate.reference", "evaluate.reference_only", "evaluate.benchmarks"),
    *("evaluate.endpoint", "evaluate.endpoint_models", "evaluate.endpoint_parameters"),
    *("ask.task", "ask.question"),
    *("grounding.lora.targets", "distillation.lora.targets"),
    *("grounding.optim.trainable", "distillation.optim.trainable"),
}
NUMBERS = (math.nan, math.inf, -math.inf, -1e-9, -3, -(10**12), 1e300, 10**12, 10**5000)
WRONG: dict[Any, tuple[Any, ...]] = {
    int: ("two", None, True, 1.5, (), [1], {}, *NUMBERS),
    float: ("fast", None, True, (), [1.0], {}, *NUMBERS),
    bool: (None, 0, 1, 1.0, "yes", [True]),
    str: (None, 3, b"a", ("a",), {}, "a\0b"),
    Union: (None, 3, 1.5, "some text", {}, (None,), ((),), (object(),)),
    tuple: (None, 3, "some text", {}, (None,), ((),), (object(),)),
    Literal: (None, 0, "", "neither", ["a"], math.nan),
}
TEXTS: dict[Any, tuple[str, ...]] = {
    int: ("two", "", "None", "1.5", "-3", "1000000000000"),
    float: ("fast", "", "None", "-3", "1e300", "1e999"),
    bool: ("yes", "", "1", "None"),
    tuple: ("3", "None", "(None,)"),
    Union: ("3", "None", "(None,)", "automatic"),
    Literal: ("neither", ""),
}


def fields(kind: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(name, annotation) of every field that is no section."""
    for name, hint in ranges.hints(kind).items():
        section = next((k for k in (hint, *get_args(hint)) if dataclasses.is_dataclass(k)), None)
        if section is not None and get_origin(hint) is not Annotated:
            yield from fields(section, f"{prefix}{name}.")
        elif name == "boards":
            yield from fields(config_lib.LevelSet, f"{prefix}{name}.")
        else:
            yield prefix + name, hint


def replaced(section: Any, name: str, value: Any) -> Any:
    """The section with a field replaced; of a tuple of sections the first one is."""
    if isinstance(section, tuple):
        return (replaced(section[0], name, value), *section[1:])
    first, _, rest = name.partition(".")
    if rest:
        value = replaced(getattr(section, first), rest, value)
    return dataclasses.replace(section, **{first: value})


FIELDS = dict(fields(Config))


def wrong_values(name: str) -> list[Any]:
    hint = ranges.plain(FIELDS[name])
    wrong = list(WRONG[get_origin(hint) or hint])
    nothing = {int: 0, float: 0.0, str: ""}.get(hint, ())
    if get_origin(hint) is not Literal and name not in ZERO_IS_FINE | NOTHING_IS_FINE:
        wrong.append(nothing)
    tags = get_args(FIELDS[name])[1:] if get_origin(FIELDS[name]) is Annotated else ()
    if any(isinstance(tag, ranges.Place) for tag in tags):
        wrong += ["s3://a/b", "http://a/b"]
    if any(isinstance(tag, ranges.Regex) for tag in tags):
        wrong += ["(", "a{99999999999999}", "(?P<a>x)(?P<a>x)"]
    return wrong


def test_the_fields_are_all_there() -> None:
    assert len(FIELDS) > 120
    assert FIELDS.keys() >= ZERO_IS_FINE | NOTHING_IS_FINE


@pytest.mark.parametrize("name", FIELDS)
def test_wrong_values_are_refused_in_one_line_with_the_field(name: str) -> None:
    for value in wrong_values(name):
        with pytest.raises(ValueError) as raised:
            config_lib.check(replaced(CONFIG, name, value))
        line = str(raised.value)
        assert name in line and "got" in line and "want" in line, (value, line)
        assert "\n" not in line and len(line) < 500, (value, line)
    hint = ranges.plain(FIELDS[name])
    for text in () if "data.boards." in name else TEXTS.get(get_origin(hint) or hint, ()):
        with pytest.raises(ValueError, match=f"--set {name}: got .*, want"):
            config_lib.override(CONFIG, [f"{name}={text}"])


@pytest.mark.parametrize("name", sorted(ZERO_IS_FINE | NOTHING_IS_FINE))
def test_nothing_is_a_value_where_it_means_something(name: str) -> None:
    hint = ranges.plain(FIELDS[name])
    nothing = {int: 0, float: 0.0, str: ""}.get(hint, ())
    assert coerce(nothing, FIELDS[name], name) == nothing


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("grounding.optim.lr=1e999", "got inf, want 0 to 1,000,000,000"),
        ("grounding.steps=0", "got 0, want 1 to 1,000,000,000"),
        ("grounding.batch_size=-1", "got -1, want 1 to 1,000,000"),
        ("distillation.rollouts=0", "got 0, want 1 to 1,000,000"),
        ("grounding.lora.rank=1000000000000", "got 1000000000000, want 0 to 100,000"),
        ("grounding.optim.trainable=(", "got '(', want a regex (missing ), unterminated"),
        ("seed=-1", "got -1, want 0 to 4,294,967,294"),
        ("seed=4294967295", "got 4294967295, want 0 to 4,294,967,294"),
        ("mesh.tensor=0", "got 0, want -1 or 1 to 1,000,000"),
        ("mesh.tensor=-2", "got -2, want -1 or 1 to 1,000,000"),
        ("distillation.sampling.top_p=0", "got 0.0, want more than 0 and at most 1"),
        ("distillation.forward_kl_mix=1", "got 1.0, want at least 0 and less than 1"),
        ("distillation.jsd_teacher_weight=1", "got 1.0, want more than 0 and less than 1"),
        ("evaluate.models=(('a', 'x'), ('a', 'y'))", "(('a', 'x'), ('a', 'y')), want 'a' once"),
        ("evaluate.models=(('', 'x'),)", "got '', want some text"),
        ("evaluate.modes=()", "got (), want 1 or more"),
        ("evaluate.modes=('text', 'text')", "got ('text', 'text'), want 'text' once"),
        ("data.prompt_buckets=(512, 0)", "got 0, want 1 to 1,000,000"),
        ("data.folder=s3://a/b", "got 's3://a/b', want a local path or gs://bucket/folder"),
        ("seed=" + "9" * 5000, "got '99999"),
        ("seed=" + "(" * 100_000, "got '((((("),
        ("seed={[]: 1}", "got '{[]: 1}', want int"),
        ("seed=" + "-" * 100_000 + "1", "got '-----"),
    ],
)
def test_what_is_wanted_is_said(text: str, line: str) -> None:
    with pytest.raises(ValueError) as raised:
        config_lib.override(CONFIG, [text])
    name = text.partition("=")[0]
    assert str(raised.value).startswith(f"--set {name}: ") and line in str(raised.value)
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    ("changes", "line"),
    [
        (["evaluate.tries=2"], "evaluate.tries: got 2 at temperature 0, want 1, or a temperature"),
        (["grounding.mixture=(('questions', 0),)"], "grounding.mixture: got (('questions', 0.0),)"),
        (["data.channels=(0, 0, 1)"], "data.channels: got (0, 0, 1), want an order of (0, 1, 2)"),
        (["data.picture_size=256"], "data: got picture_size=256, cell_pixels=32, want just one"),
        (
            ["distillation.grounding_share=0.001"],
            "distillation.grounding_share: got 0.001, which is 0 of 64 prompts, want 1 to 63",
        ),
        (
            ["distillation.grounding_share=0.1"],
            "distillation.microbatches: got 8, want a divisor of 58 and of 6",
        ),
        (
            ["distillation.wrong_weight_from=0.3"],
            "distillation.wrong_weight_from: got 0.3 with wrong_weight=1, which weighs nothing",
        ),
        (
            ["distillation.replay_steps=3", "distillation.rollouts=2"],
            "distillation.replay_steps: got 3 with 2 rollouts a prompt, want 1",
        ),
        (
            ["distillation.replay_steps=3", "distillation.batch_size=65"],
            "distillation.replay_steps: got 3 with 57 prompts, want an even number",
        ),
        (
            ["distillation.replay_steps=3", "distillation.objective=sampled_reverse_kl"],
            "distillation.replay_steps: got 3 with objective sampled_reverse_kl, want an exact",
        ),
        (["grounding.microbatches=5"], "grounding.microbatches: got 5, want a divisor of 48"),
    ],
)
def test_fields_that_do_not_go_together_are_named(changes: list[str], line: str) -> None:
    with pytest.raises(ValueError) as raised:
        config_lib.check(config_lib.override(CONFIG, changes))
    assert line in str(raised.value)


def test_ranges_know_their_ends() -> None:
    table = [
        (Between(0, 1), {0: True, 1: True, 1.5: False}),
        (Between(0, 1, above=True), {0: False, 1: True}),
        (Between(0, 1, below=True), {0: True, 1: False}),
        (Between(8, 9, also=0), {0: True, 7: False, 8: True, 9: True, 10: False}),
    ]
    for tag, values in table:
        assert {value: not tag.wanted(value) for value in values} == values
        assert tag.wanted(math.nan)
    assert not Items(1, repeated=True).wanted((3, 3)) and Items().wanted((3, 3)) == "3 once"


def test_settings_that_change_no_result_are_free() -> None:
    free = set(ranges.free(Config))
    assert {"evaluate.batch_size", "data.prompt_buckets", "data.workers", "model.remat"} <= free
    assert {"grounding.microbatches", "checkpoint.every", "evaluate.endpoint_workers"} <= free
    changing = {"grounding.batch_size", "grounding.steps", "seed", "model.path", "checkpoint.use"}
    assert not free & changing
