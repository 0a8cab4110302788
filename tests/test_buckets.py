"""`auto` buckets hold what the run makes of its boards, and are the same in every process."""

import dataclasses
import pathlib

import numpy as np
import pytest
from PIL import Image

from mgsd_jax import config as c
from mgsd_jax import preflight
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data import buckets, loaders
from mgsd_jax.data.encoder import Encoder, load_encoder
from mgsd_jax.data.processor import load_processor
from mgsd_jax.sampling import answers

BUCKETS = ("prompt_buckets", "teacher_buckets", "sequence_buckets", "patch_buckets")
NANO = load_config("nano", [f"data.{name}=auto" for name in BUCKETS])


def encoder_of(config: Config) -> Encoder:
    return load_encoder(config.data, load_processor(config.model.path))


@pytest.fixture(scope="module")
def fitted() -> Encoder:
    return buckets.fitted(encoder_of(NANO), NANO)


def test_the_rules() -> None:
    assert buckets.with_margin([10, 14, 12]) == 16 and buckets.with_margin([9, 9]) == 9
    assert [buckets.rounded(n) for n in (1, 8, 45, 128, 129, 300)] == [8, 8, 48, 128, 192, 320]
    assert buckets.spread([320, 300, 200, 320]) == (200, 320)
    assert buckets.spread([100, 75, 56, 40]) == (40, 56, 75, 100)


def test_every_batch_of_training_fits(fitted: Encoder) -> None:
    """Hundreds of examples of each stage, from other boards than were measured."""
    levels = tuple((kind.task, level) for kind in NANO.data.boards for level in kind.levels)
    boards = loaders.stream_boards(levels, "val", seed=5, count=320)
    records = loaders.grounding_loader(
        boards, fitted, mixture=NANO.grounding.mixture, batch_size=160, seed=0
    )
    prompts = loaders.prompt_loader(
        boards, fitted, context="state", batch_size=160, rollouts=1, seed=0
    )
    for _ in range(2):
        next(records)
        next(prompts)
    # Those of the recipe, rounded, and smaller ones.
    assert fitted.data.prompt_buckets == (24, 32, 48)
    assert fitted.data.patch_buckets == (36, 64, 100)


def test_what_is_made_is_the_same_in_every_process(fitted: Encoder) -> None:
    np.random.seed(7)
    assert buckets.fitted(encoder_of(NANO), NANO).data == fitted.data


def test_numbers_stay_as_they_are() -> None:
    config = load_config("nano", ["data.teacher_buckets=auto"])
    data = buckets.fitted(encoder_of(config), config).data
    assert dataclasses.replace(data, teacher_buckets=c.AUTO) == config.data


def test_larger_boards_get_larger_buckets(fitted: Encoder) -> None:
    boards = (c.LevelSet("maze", levels=(3, 7), train=1, val=0, test=0),)
    config = dataclasses.replace(NANO, data=dataclasses.replace(NANO.data, boards=boards))
    data = buckets.fitted(encoder_of(config), config).data
    assert data.patch_buckets == (36, 196)
    for name in ("prompt_buckets", "sequence_buckets"):
        assert max(c.sizes(getattr(data, name))) > max(c.sizes(getattr(fitted.data, name)))
        assert len(getattr(data, name)) == 2  # one for the small boards, too


def test_an_evaluation_measures_its_own_boards_exactly() -> None:
    boards = list(loaders.stream_boards([("frozenlake", 6)], "test", seed=0, count=5))
    encoder = encoder_of(NANO)
    data = buckets.fitted(encoder, NANO, boards).data
    longest = max(len(encoder.teacher(board, "state").tokens) for board in boards)
    assert max(c.sizes(data.teacher_buckets)) == buckets.rounded(longest)
    assert data.patch_buckets == (144,) and data.sequence_buckets == c.AUTO


def test_the_pictures_of_a_benchmark_are_measured(tmp_path: pathlib.Path) -> None:
    """Its own, and drawn ones where it has none: what `--stage=evaluate` pads."""
    (drawn,) = loaders.stream_boards([("frozenlake", 6)], "test", seed=0, count=1)
    Image.new("RGB", (64, 64)).save(tmp_path / "own.png")
    own = drawn._replace(level=3, picture_path=str(tmp_path / "own.png"))
    base = encoder_of(NANO)
    encoder = answers.BenchmarkEncoder(base.processor, base.prompts, base.data)
    assert buckets.fitted(encoder, NANO, [drawn]).data.patch_buckets == (144,)
    assert buckets.fitted(encoder, NANO, [own, drawn]).data.patch_buckets == (36, 144)


def test_preflight_measures_too_and_says_where_the_tokenizer_is_missing(fitted: Encoder) -> None:
    assert preflight._fitted(NANO).data == fitted.data
    config = c.override(NANO, ["model.path=/nowhere"])
    with pytest.raises(ValueError, match=r"/nowhere/config\.json: not found"):
        preflight._fitted(config)


def test_the_log_says_what_auto_became(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level("INFO", logger="absl"):
        buckets.fitted(encoder_of(NANO), NANO)
    assert "data.prompt_buckets=auto is (24, 32, 48) here" in caplog.messages
    assert len(caplog.messages) == 4


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("data.prompt_buckets=automatic", "got 'automatic', want tuple[int, ...] or 'auto'"),
        ("data.prompt_buckets=()", "got (), want 1 or more"),
        ("data.prompt_buckets=(0,)", "got 0, want 1 to 1,000,000"),
        ("data.prompt_buckets=44", "got 44, want tuple[int, ...] or 'auto'"),
    ],
)
def test_a_wrong_value_is_one_line(text: str, line: str) -> None:
    with pytest.raises(ValueError) as raised:
        load_config("nano", [text])
    assert line in str(raised.value)


def test_what_was_not_fitted_is_said() -> None:
    with pytest.raises(ValueError, match="got 'auto', want numbers here"):
        c.sizes(c.AUTO)
    assert c.sizes((3, 4)) == (3, 4)
