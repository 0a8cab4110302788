"""Positions against transformers' own functions, and against torch's interpolation."""

import functools
import types
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgsd_jax.data.positions import (
    Grid,
    interpolation,
    place_positions,
    token_count,
)

IMAGE = 7
TEXT = 3
MERGE = 2
GRIDS: list[Grid] = [(1, 2, 2), (1, 8, 8), (1, 2, 10), (1, 12, 4), (1, 16, 16), (1, 26, 34)]
even = st.integers(1, 6).map(lambda n: 2 * n)
# A sequence: text, then (picture, text) any number of times; text between pictures is never empty.
sequences = st.tuples(
    st.integers(0, 9), st.lists(st.tuples(even, even, st.integers(1, 9)), max_size=4)
).filter(lambda s: s[0] + len(s[1]) > 0)


def build(first: int, rest: list[tuple[int, int, int]]) -> tuple[np.ndarray, list[Grid]]:
    """Tokens and grids of `first` text tokens and then (rows, columns, text tokens after it)."""
    tokens, grids = [TEXT] * first, []
    for rows, columns, text in rest:
        grids.append((1, rows, columns))
        tokens += [IMAGE] * token_count(grids[-1], MERGE) + [TEXT] * text
    return np.array(tokens, np.int32), grids


def mrope_positions(tokens: np.ndarray, grids: list[Grid], merge: int) -> tuple[np.ndarray, int]:
    """Our positions of a sequence whose image tokens are those of the grids, in order."""
    counts = [token_count(grid, merge) for grid in grids]
    starts = np.flatnonzero(tokens == IMAGE)[np.cumsum([0, *counts])[:-1]]
    return place_positions(len(tokens), [int(start) for start in starts], grids, merge)


def rope_index(
    tokens: np.ndarray, mask: np.ndarray, grids: list[Grid], merge: int = MERGE
) -> tuple[np.ndarray, np.ndarray]:
    """transformers' positions [3, B, T] and deltas [B] of a padded batch."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLModel

    theirs: Any = Qwen3VLModel  # neither method reads a weight: a namespace stands for the model
    model = types.SimpleNamespace(
        config=types.SimpleNamespace(vision_config=types.SimpleNamespace(spatial_merge_size=merge)),
        get_vision_position_ids=functools.partial(theirs.get_vision_position_ids, None),
    )
    positions, deltas = theirs.get_rope_index(
        model,
        torch.from_numpy(tokens.astype(np.int64)),
        torch.from_numpy((tokens == IMAGE).astype(np.int64)),
        image_grid_thw=torch.tensor(grids) if grids else None,
        attention_mask=torch.from_numpy(mask.astype(np.int64)),
    )
    return positions.numpy(), deltas.numpy()[:, 0]


@settings(max_examples=150, deadline=None)
@given(sequences)
def test_mrope_equals_get_rope_index(sequence: tuple[int, list[tuple[int, int, int]]]) -> None:
    tokens, grids = build(*sequence)
    positions, after = mrope_positions(tokens, grids, MERGE)
    want, deltas = rope_index(tokens[None], np.ones((1, len(tokens))), grids)
    np.testing.assert_array_equal(positions, want[:, 0])
    assert positions.dtype == np.int32
    assert after == len(tokens) + deltas[0]


def test_mrope_of_the_docstring() -> None:
    tokens, grids = build(1, [(4, 6, 1)])
    positions, after = mrope_positions(tokens, grids, MERGE)
    np.testing.assert_array_equal(
        positions, [[0, 1, 1, 1, 1, 1, 1, 4], [0, 1, 1, 1, 2, 2, 2, 4], [0, 1, 2, 3, 1, 2, 3, 4]]
    )
    assert after == 5


@pytest.mark.parametrize("merge", [1, 2, 3])
def test_mrope_with_other_merge_sizes(merge: int) -> None:
    grids: list[Grid] = [(1, 6, 12), (1, 12, 6)]
    counts = [token_count(grid, merge) for grid in grids]
    tokens = np.array([TEXT] + [IMAGE] * counts[0] + [TEXT] + [IMAGE] * counts[1], np.int32)
    positions, after = mrope_positions(tokens, grids, merge)
    want, deltas = rope_index(tokens[None], np.ones((1, len(tokens))), grids, merge)
    np.testing.assert_array_equal(positions, want[:, 0])
    assert after == len(tokens) + deltas[0]


def test_text_alone_counts_from_zero() -> None:
    positions, after = place_positions(5, [], [], MERGE)
    np.testing.assert_array_equal(positions, np.tile(np.arange(5), (3, 1)))
    assert after == 5


@pytest.mark.parametrize("side", [2, 8, 48])
@pytest.mark.parametrize("grid", GRIDS)
def test_interpolation_equals_transformers(grid: Grid, side: int) -> None:
    torch = pytest.importorskip("torch")
    from transformers import vision_utils

    ours = interpolation(grid, merge_size=MERGE, table_side=side)
    grids = torch.tensor([grid])
    index, weight = vision_utils.get_vision_interpolation_indices_and_weights(
        grids, side, "bilinear", align_corners=True, spatial_merge_size=MERGE
    )
    np.testing.assert_array_equal(ours.index, index.numpy())
    np.testing.assert_array_equal(ours.weight, weight.numpy())
    coords = vision_utils.get_vision_position_ids(grids, MERGE)
    np.testing.assert_array_equal(ours.coords, coords.numpy())
    assert [array.dtype for array in ours] == [np.int32, np.float32, np.int32]


@pytest.mark.parametrize("merge", [1, 2])
@pytest.mark.parametrize("grid", GRIDS)
def test_weighted_gather_is_torchs_bilinear_resize_in_block_order(grid: Grid, merge: int) -> None:
    torch = pytest.importorskip("torch")
    side, width = 12, 5
    table = np.random.default_rng(0).normal(size=(side * side, width)).astype(np.float32)
    ours = interpolation(grid, merge_size=merge, table_side=side)
    gathered = (table[ours.index] * ours.weight[..., None]).sum(1)

    resized = torch.nn.functional.interpolate(
        torch.from_numpy(np.float64(table).reshape(side, side, width)).permute(2, 0, 1)[None],
        size=grid[1:],
        mode="bilinear",
        align_corners=True,
    )[0].permute(1, 2, 0)
    blocks = resized.reshape(grid[1] // merge, merge, grid[2] // merge, merge, width)
    want = blocks.permute(0, 2, 1, 3, 4).reshape(-1, width).numpy()
    # In float64, so that torch's kernels do not count. Ours: the place in the table is rounded once
    # along either axis, and a place that is off moves the embedding by as much of the difference of
    # two cells; six roundings more are the products of weights and values and their sum.
    bound = (2 * (side - 1) + 6) * 2.0**-24 * float(np.ptp(table))
    np.testing.assert_allclose(gathered, want, rtol=0, atol=bound)
    rows = resized.numpy()[ours.coords[:, 0], ours.coords[:, 1]]
    np.testing.assert_array_equal(rows, want)


def test_vision_model_gets_the_same_embeddings_and_rotations() -> None:
    """The whole path in transformers' tower: positions added to patches, and cos and sin."""
    torch = pytest.importorskip("torch")
    from transformers.models.qwen3_vl.configuration_qwen3_vl import Qwen3VLVisionConfig
    from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel

    torch.manual_seed(0)
    config = Qwen3VLVisionConfig(
        depth=1,
        hidden_size=32,
        intermediate_size=32,
        num_heads=2,
        patch_size=4,
        out_hidden_size=16,
        num_position_embeddings=64,
        deepstack_visual_indexes=[],
    )
    tower = Qwen3VLVisionModel(config).eval()
    seen = {}
    tower.blocks[0].register_forward_pre_hook(
        lambda _, args, kwargs: seen.update(hidden=args[0], rope=kwargs["position_embeddings"]),
        with_kwargs=True,
    )
    grids: list[Grid] = [(1, 4, 6), (1, 8, 2)]
    count = sum(rows * columns for _, rows, columns in grids)
    with torch.no_grad():
        patches = torch.zeros(count, 3 * 2 * 4 * 4)
        tower(patches, grid_thw=torch.tensor(grids))
        bias = tower.patch_embed(patches)
    parts = [interpolation(grid, merge_size=2, table_side=8) for grid in grids]
    index, weight, coords = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
    table = tower.pos_embed.weight.detach().numpy()
    embedded = (table[index] * weight[..., None]).sum(1)
    np.testing.assert_allclose((seen["hidden"] - bias).numpy(), embedded, atol=1e-6)
    cos, sin = tower.rotary_pos_emb(patches, torch.from_numpy(coords.astype(np.int64)))
    np.testing.assert_array_equal(seen["rope"][0].numpy(), cos.numpy())
    np.testing.assert_array_equal(seen["rope"][1].numpy(), sin.numpy())


@settings(max_examples=60, deadline=None)
@given(even, even, st.integers(1, 50))
def test_interpolation_weights_are_convex_and_rows_exist(
    rows: int, columns: int, side: int
) -> None:
    ours = interpolation((1, rows, columns), merge_size=MERGE, table_side=side)
    np.testing.assert_allclose(ours.weight.sum(1), 1, atol=1e-6)
    assert ours.weight.min() >= 0
    assert ours.index.min() >= 0
    assert ours.index.max() < side * side
    assert {tuple(cell) for cell in ours.coords.tolist()} == set(np.ndindex(rows, columns))


def test_a_grid_of_the_tables_size_reads_the_table_itself() -> None:
    ours = interpolation((1, 8, 8), merge_size=MERGE, table_side=8)
    table = np.arange(64, dtype=np.float32)
    want = ours.coords[:, 0] * 8 + ours.coords[:, 1]
    np.testing.assert_array_equal((table[ours.index] * ours.weight).sum(1), want)


def test_frames_repeat_the_picture() -> None:
    one = interpolation((1, 4, 6), merge_size=MERGE, table_side=8)
    two = interpolation((2, 4, 6), merge_size=MERGE, table_side=8)
    for single, double in zip(one, two, strict=True):
        np.testing.assert_array_equal(double, np.concatenate([single, single]))


def test_interpolation_is_shared_and_read_only() -> None:
    ours = interpolation((1, 4, 4), merge_size=MERGE, table_side=8)
    assert interpolation((1, 4, 4), merge_size=MERGE, table_side=8) is ours
    with pytest.raises(ValueError, match="read-only"):
        ours.index[0] = 1


@pytest.mark.parametrize("grid", [(1, 3, 4), (1, 4, 5), (1, 0, 4)])
def test_grids_that_do_not_merge_raise(grid: Grid) -> None:
    with pytest.raises(ValueError, match="want sides of a multiple of merge_size 2"):
        interpolation(grid, merge_size=MERGE, table_side=8)
