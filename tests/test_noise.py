"""States with wrong facts: as many of them as asked for, and boards all the same."""

import numpy as np
import pytest

from mgsd_jax.envs import ENVS
from mgsd_jax.envs.noise import disturb

LEVELS = (("frozenlake", 4), ("maze", 4), ("minibehaviour", 6))


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_nothing_is_wrong_at_share_0_and_draws_repeat(task: str, level: int) -> None:
    state = ENVS[task].generate(np.random.default_rng(0), level)
    assert disturb(task, state, np.random.default_rng(1), 0.0) is state
    wrong, again = (disturb(task, state, np.random.default_rng(2), 0.5) for _ in range(2))
    assert wrong == again
    assert ENVS[task].shortest_plan(wrong)


@pytest.mark.parametrize(("task", "level"), LEVELS)
@pytest.mark.parametrize("share", [0.05, 0.2])
def test_about_the_share_of_the_facts_is_wrong(task: str, level: int, share: float) -> None:
    rng = np.random.default_rng(0)
    lost = total = 0
    for _ in range(400):
        state = ENVS[task].generate(rng, level)
        wrong = disturb(task, state, rng, share)
        assert ENVS[task].shortest_plan(wrong)
        facts = {f for f in ENVS[task].facts(state) if f[0] in KINDS[task]}
        lost += len(facts - ENVS[task].facts(wrong))
        total += len(facts)
    # Below the share: draws without a way to the goal are drawn again.
    assert 0.5 * share < lost / total < 1.4 * share


KINDS = {
    "frozenlake": ("player", "goal", "hole"),
    "maze": ("open", "player", "goal"),
    "minibehaviour": ("agent", "printer"),
}


def test_walls_of_a_maze_stay_the_same_from_both_sides() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        state = ENVS["maze"].generate(rng, 4)
        walls = np.array(disturb("maze", state, rng, 0.3).walls)
        assert ((walls[:-1] & 2 > 0) == (walls[1:] & 1 > 0)).all()
        assert ((walls[:, :-1] & 8 > 0) == (walls[:, 1:] & 4 > 0)).all()


def test_a_share_out_of_range_is_refused() -> None:
    state = ENVS["maze"].generate(np.random.default_rng(0), 3)
    for share in (-0.1, 1.5):
        with pytest.raises(ValueError, match="share: got"):
            disturb("maze", state, np.random.default_rng(0), share)
