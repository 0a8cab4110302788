"""Augmented pictures: the board stays true, nothing else of a batch changes, resumable."""

import dataclasses
from typing import Any, get_args

import numpy as np
import pytest
from test_sources import BOARDS, DATA, ENCODER, PROCESSOR, prompts, records, same

from mgsd_jax import config as config_lib
from mgsd_jax.checks import ranges
from mgsd_jax.command_line import load_config
from mgsd_jax.config import DataConfig
from mgsd_jax.data import augment as augment_lib
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.envs import ENVS
from mgsd_jax.stages import grounding

NANO = load_config("nano", [])
CELL = 32
KINDS: Any = (*augment_lib.CHANGES, "sprites")


def variant(
    pixels: np.ndarray, level: int, seed: int, *kinds: str, strength: float = 1.0
) -> np.ndarray:
    return augment_lib.augment(
        pixels,
        level,
        np.random.default_rng(seed),
        strength=strength,
        kinds=kinds or tuple(augment_lib.CHANGES),
    )


def augmented(**changes: Any) -> Encoder:
    data = dataclasses.replace(DATA, augment=0.5)
    return dataclasses.replace(ENCODER, data=dataclasses.replace(data, **changes))


class Ends:
    """Draws the ends of every range, where a change is largest."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng

    def uniform(self, low: float, high: float, size: Any = None) -> Any:
        return self.rng.choice([low, high], size)


@pytest.mark.parametrize("level", [3, 4, 6])
def test_nothing_moves_by_more_than_two_fifths_of_a_cell(level: int) -> None:
    # Every pixel tells where it was; the net and the affine map both resample between pixels.
    side, steepness = CELL * level, 255 / (CELL * level)
    ramp = np.rint(np.arange(side) * steepness).astype(np.uint8)
    pixels = np.zeros((side, side, 3), np.uint8)
    pixels[..., 0], pixels[..., 1] = ramp[None], ramp[:, None]
    farthest = 0.0
    for seed in range(50):
        drawn: Any = Ends(np.random.default_rng(seed))
        moved = augment_lib.augment(
            pixels, level, drawn, strength=1.0, kinds=("shapes", "place")
        ).astype(float)
        moved -= pixels
        farthest = max(farthest, float(np.abs(moved[..., :2]).max() / steepness / CELL))
    pixel_and_rounding = (1 + 1.5 / steepness) / CELL
    assert 0.3 < farthest <= 0.4 + pixel_and_rounding


def test_light_stays_lighter_than_dark() -> None:
    # Start and goal of a maze are two dots, which the eye tells apart by their colours alone.
    env, luma = ENVS["maze"], np.array([0.299, 0.587, 0.114])
    hues = set()
    for seed in range(100):
        state: Any = env.generate(np.random.default_rng(seed), 3)
        if state.start == state.target:
            continue
        shown = variant(env.render(state, 3 * CELL), 3, seed, "colours")
        dots = [
            shown[CELL * row + CELL // 2, CELL * column + CELL // 2].astype(float)
            for row, column in (state.start, state.target)
        ]
        assert dots[0] @ luma > dots[1] @ luma + 20, seed
        hues.add(int(np.argmax(dots[1] - dots[1].mean())))
    assert hues == {0, 1, 2}, "the blue dot became red, green or blue"


def test_a_maze_keeps_its_start_up_to_a_strength_of_four_fifths() -> None:
    """Where a picture turns bright, the yellow dot is the first thing to fade: into the white."""
    dot_on_white = np.array([[[255, 255, 0], [255, 255, 255]]], np.uint8)

    def difference(seed: int, strength: float) -> int:
        shown = variant(dot_on_white, 3, seed, "colours", strength=strength)[0].astype(int)
        return int(np.abs(shown[0] - shown[1]).max())

    # In deviations of the noise that a pixel may have: three, and one of a dot of many pixels.
    assert min(difference(seed, 0.5) for seed in range(2000)) > 3 * 12
    assert min(difference(seed, 0.8) for seed in range(2000)) > 12


@pytest.mark.parametrize("kind", augment_lib.CHANGES)
def test_each_kind_changes_a_picture_by_its_strength(kind: str) -> None:
    pixels = ENCODER.picture(BOARDS[0])

    def change(strength: float) -> float:
        shown = [variant(pixels, 3, seed, kind, strength=strength) for seed in range(8)]
        assert all(one.shape == pixels.shape and one.dtype == np.uint8 for one in shown)
        return float(np.mean([np.abs(one.astype(int) - pixels).mean() for one in shown]))

    assert 0 < change(0.25) < change(1.0)
    assert np.array_equal(variant(pixels, 3, 7, kind), variant(pixels, 3, 7, kind))


def test_the_config_names_every_kind() -> None:
    hint = ranges.plain(ranges.hints(DataConfig)["augment_kinds"])
    assert get_args(get_args(hint)[0]) == KINDS


def test_no_strength_leaves_a_picture_as_it_is() -> None:
    pixels = ENCODER.picture(BOARDS[1])
    unchanged = variant(pixels, 3, 0, "colours", "shapes", "place", strength=0.0)
    # float32 products of the two matrices of colour, each a byte at most
    assert np.abs(unchanged.astype(int) - pixels).max() <= 1


def test_sprites_are_the_other_ones_in_half_of_the_pictures() -> None:
    encoder, rng = augmented(augment=1.0, augment_kinds=("sprites",)), np.random.default_rng(0)
    usual = ENCODER.picture(BOARDS[0])
    drawn = [encoder.picture(BOARDS[0], rng) for _ in range(200)]
    other = sum(not np.array_equal(one, usual) for one in drawn)
    # five deviations of 200 throws of a coin
    assert abs(other - 100) < 5 * np.sqrt(200 / 4)


def test_students_see_augmented_pictures_and_nothing_else_changes(monkeypatch: Any) -> None:
    plain = next(prompts(batch_size=4))
    monkeypatch.setattr("test_sources.ENCODER", augmented(augment_kinds=KINDS))
    loader = prompts(batch_size=4)
    state = loader.get_state()
    shown, following = next(loader), next(loader)
    assert not same(shown.batch.student.pictures, plain.batch.student.pictures)
    hidden = shown.batch.student._replace(pictures=plain.batch.student.pictures)
    assert same(shown.batch._replace(student=hidden), plain.batch)
    assert shown.boards == plain.boards
    again = prompts(batch_size=4)
    again.set_state(state)
    assert same(next(again).batch, shown.batch), "a resumed loader shows the same pictures"
    assert same(next(again).batch, following.batch)


def test_records_are_augmented_and_their_words_are_not(monkeypatch: Any) -> None:
    mixture = (("questions", 1.0),)
    plain = next(records(mixture=mixture))
    monkeypatch.setattr("test_sources.ENCODER", augmented())
    shown = next(records(mixture=mixture))
    assert np.array_equal(shown.inputs.tokens, plain.inputs.tokens)
    assert not same(shown.inputs.pictures, plain.inputs.pictures)


def test_grounding_learns_from_augmented_pictures_and_validates_on_others() -> None:
    plain, varied = (
        grounding.make_loaders(
            config_lib.override(NANO, [f"data.augment={strength}"]),
            BOARDS,
            BOARDS,
            PROCESSOR,
            None,
        )
        for strength in (0.0, 0.5)
    )
    assert not same(next(plain[0]).inputs.pictures, next(varied[0]).inputs.pictures)
    assert same(next(plain[1]), next(varied[1]))


def test_evaluation_shows_pictures_as_they_are() -> None:
    assert np.array_equal(augmented().picture(BOARDS[0]), ENCODER.picture(BOARDS[0]))
    [shown] = augmented().student(BOARDS[0]).pictures
    [plain] = ENCODER.student(BOARDS[0]).pictures
    assert np.array_equal(shown.patches, plain.patches)
