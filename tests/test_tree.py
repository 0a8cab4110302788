"""Properties of named leaves, ordered rules, and partition / combine."""

import re
from typing import Any

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mgsd_jax import tree as trees

KEYS = st.text("ab-_.0 ", min_size=1, max_size=3)
TREES = st.dictionaries(
    KEYS,
    st.recursive(
        st.integers(0, 99), lambda inner: st.dictionaries(KEYS, inner, max_size=3), max_leaves=8
    ),
    max_size=4,
)


def without_empty(tree: Any) -> Any:
    if not isinstance(tree, dict):
        return tree
    cleaned = {key: without_empty(value) for key, value in tree.items()}
    return {key: value for key, value in cleaned.items() if value != {}}


@settings(deadline=None)
@given(TREES)
def test_leaves_come_in_the_order_of_jax_and_get_finds_each(tree: dict[str, Any]) -> None:
    named = trees.named_leaves(tree)
    assert [leaf for _, leaf in named] == jax.tree.leaves(tree)
    assert len({path for path, _ in named}) == len(named)
    assert all(trees.get(tree, path) == leaf for path, leaf in named)
    assert trees.nest(named) == without_empty(tree)


def test_order_does_not_depend_on_insertion() -> None:
    assert trees.named_leaves({"b": {"d": 1, "c": 2}, "a": 3}) == [("a", 3), ("b/c", 2), ("b/d", 1)]


def test_lists_tuples_and_none_are_leaves() -> None:
    tree = {"a": (1, 2), "b": None, "c": [3]}
    assert trees.named_leaves(tree) == [("a", (1, 2)), ("b", None), ("c", [3])]


@pytest.mark.parametrize("tree", [{"a/b": 1}, {"a": {"": 1}}, {"a": {3: 1}}, [1], 7])
def test_what_has_no_name_is_refused(tree: Any) -> None:
    with pytest.raises(ValueError, match="got"):
        trees.named_leaves(tree)
    with pytest.raises(ValueError, match="got"):
        trees.map_named(lambda path, leaf: leaf, tree)


@settings(deadline=None)
@given(TREES)
def test_map_named_sees_every_leaf_by_its_name_and_keeps_the_structure(tree: dict) -> None:
    mapped = trees.map_named(lambda path, leaf: (path, leaf), tree)
    assert trees.named_leaves(mapped) == [(p, (p, leaf)) for p, leaf in trees.named_leaves(tree)]
    assert trees.map_named(lambda path, leaf: leaf, tree) == tree


@settings(deadline=None)
@given(TREES, st.integers(0, 99))
def test_combine_undoes_partition(tree: dict[str, Any], threshold: int) -> None:
    selected, rest = trees.partition(tree, lambda path, leaf: leaf < threshold)
    assert all(leaf < threshold for _, leaf in trees.named_leaves(selected))
    assert all(leaf >= threshold for _, leaf in trees.named_leaves(rest))
    assert selected == without_empty(selected) and rest == without_empty(rest)
    assert trees.combine(selected, rest) == without_empty(tree)
    assert trees.combine(rest, selected) == without_empty(tree)


def test_partition_leaves_its_argument_alone() -> None:
    tree = {"a": {"b": 1, "c": 2}}
    selected, _ = trees.partition(tree, lambda path, leaf: path == "a/b")
    selected["a"]["b"] = 5
    assert tree == {"a": {"b": 1, "c": 2}}


@pytest.mark.parametrize(
    ("a", "b", "names"),
    [
        ({"x": {"y": 1}}, {"x": {"y": 2}}, ["x/y"]),
        ({"x": 1}, {"x": {"y": 2}}, ["x", "x/y"]),
        ({"x": {"y": {"z": 2}}}, {"x": {"y": 1}}, ["x/y", "x/y/z"]),
    ],
)
def test_a_collision_names_both_sides(a: dict, b: dict, names: list[str]) -> None:
    with pytest.raises(ValueError) as raised:
        trees.combine(a, b)
    message = str(raised.value)
    assert all(f"'{name}'" in message for name in names)
    assert "first tree" in message and "second tree" in message


def test_a_collision_of_arrays_shows_their_shapes() -> None:
    with pytest.raises(ValueError, match=re.escape("float32[2, 3]")):
        trees.combine({"a": np.zeros((2, 3), np.float32)}, {"a": np.zeros(4)})


def test_the_first_rule_wins_and_anchors_are_the_patterns_own() -> None:
    rules = (("norm/scale$", 0), ("^language/", 1), ("", 2))
    assert trees.match(rules, "language/norm/scale") == 0
    assert trees.match(rules, "language/layers/norm/bias") == 1
    assert trees.match(rules, "visual/norm/bias") == 2
    assert trees.match((("q_proj", None), ("", 1)), "a/q_proj/kernel") is None


def test_no_match_names_the_path_and_lists_the_rules() -> None:
    with pytest.raises(ValueError) as raised:
        trees.match((("^visual/", 0), ("kernel$", 1)), "language/norm/scale")
    assert all(s in str(raised.value) for s in ("language/norm/scale", "^visual/", "kernel$"))


def test_get_says_what_is_there() -> None:
    tree = {"a": {"b": 1, "c": 2}}
    assert trees.get(tree, "a") == {"b": 1, "c": 2}
    with pytest.raises(ValueError, match=re.escape("['b', 'c']")):
        trees.get(tree, "a/d")
    with pytest.raises(ValueError, match="leaf"):
        trees.get(tree, "a/b/c")
