"""Losses split over the vocabulary on eight devices are those of one device."""

import functools
from typing import Any

import helpers_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_hlo import collectives_in_loops
from jax.sharding import Mesh
from test_losses import OBJECTIVES, Case, make_case

from mgsd_jax.parallel import axes, sharding
from mgsd_jax.training import losses

MESHES = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 2, 2), (8, 1, 1)]  # data, fsdp, tensor
eight = pytest.mark.usefixtures("eight_devices")


@pytest.fixture
def eight_devices() -> None:
    helpers_devices.skip_without_devices()


def test_everything_here_with_eight_devices() -> None:
    helpers_devices.run_again(__file__, quick=True)


def mesh_of(sizes: tuple[int, int, int]) -> Mesh:
    return sharding.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


def loss_fn(kind: str, case: Case, mesh: Mesh | None) -> Any:
    """A function of (hidden, head) -> (loss, statistics)."""
    _, _, teacher_hidden, teacher_head, weights, targets = case
    if kind == "cross_entropy":
        return lambda hidden, head: losses.token_cross_entropy(
            hidden, head, targets, weights, token_chunk=8, mesh=mesh
        )
    return lambda hidden, head: losses.distill(
        hidden,
        head,
        teacher_hidden,
        teacher_head,
        weights,
        settings=OBJECTIVES[kind],  # chunks of 8 tokens
        targets=targets,
        vocab_mask=jnp.arange(head.shape[0]) % 7 != 3,
        mesh=mesh,
    )


@functools.cache
def program(kind: str, sizes: tuple[int, int, int] | None) -> Any:
    mesh = None if sizes is None else mesh_of(sizes)

    def run(case: Case) -> Any:
        value = jax.value_and_grad(loss_fn(kind, case, mesh), argnums=(0, 1), has_aux=True)
        return value(case.hidden, case.head)

    return jax.jit(run)


def assert_same(got: Any, want: Any) -> None:
    """Statistics within 1e-5 nats, loss and gradients within 1e-5 of their largest number."""
    ((loss, stats), gradients), (want_value, want_gradients) = got, want
    for g, w in zip(jax.tree.leaves(stats), jax.tree.leaves(want_value[1]), strict=True):
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5)
    pairs = zip((loss, *gradients), (want_value[0], *want_gradients), strict=True)
    for g, w in pairs:
        np.testing.assert_allclose(g, w, rtol=0, atol=1e-5 * np.abs(w).max())


@eight
@pytest.mark.parametrize("sizes", MESHES)
@pytest.mark.parametrize("kind", ["reverse", "sampled", "cross_entropy"])
def test_value_statistics_and_gradients(kind: str, sizes: tuple[int, int, int]) -> None:
    """45 tokens do not divide by the devices, and chunks of 8 do not divide the counted ones."""
    case = make_case(tokens=45, vocabulary=96, top=8.0)
    assert_same(program(kind, sizes)(case), program(kind, None)(case))


@eight
@pytest.mark.parametrize("vocabulary", [20, 97])
def test_a_vocabulary_that_does_not_divide(vocabulary: int) -> None:
    """20 words split over fsdp alone, 97 over nothing: more work, the same numbers."""
    case = make_case(tokens=45, vocabulary=vocabulary, top=8.0)
    sizes = (1, 4, 2)
    split = axes.dividing(mesh_of(sizes), axes.MODEL, vocabulary)
    assert split == {20: ("fsdp",), 97: ()}[vocabulary]
    assert_same(program("reverse", sizes)(case), program("reverse", None)(case))


@eight
@pytest.mark.parametrize("rows", [slice(0, 5), slice(40, 45), slice(3, 42), slice(0, 0)])
def test_counted_tokens_may_lie_on_few_devices(rows: slice) -> None:
    """And what is not counted is not read: here it is NaN."""
    full = make_case(tokens=45, vocabulary=96, top=8.0)
    counted = np.zeros(45, bool)
    counted[rows] = True
    mask = jnp.asarray(counted)
    case = full._replace(
        weights=jnp.where(mask, full.weights + 0.1, 0.0),
        hidden=jnp.where(mask[:, None], full.hidden, jnp.nan),
        teacher_hidden=jnp.where(mask[:, None], full.teacher_hidden, jnp.inf),
    )
    got = program("reverse", (1, 4, 2))(case)
    assert_same(got, program("reverse", None)(case))
    (loss, _), (d_hidden, _) = got
    assert np.isfinite(loss) and not np.asarray(d_hidden)[~counted].any()


@eight
@pytest.mark.parametrize("sizes", [(1, 8, 1), (2, 2, 2)])
def test_no_head_moves_inside_the_loop(sizes: tuple[int, int, int]) -> None:
    """What crosses devices in a turn of the loop is a chunk of tokens, not a part of a head."""
    case = make_case(tokens=64, width=16, vocabulary=4096)
    largest = max(collectives_in_loops(program("reverse", sizes).lower(case).compile().as_text()))
    assert 0 < largest <= 8 * 32  # chunk x the wider hidden states
