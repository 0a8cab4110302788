"""Nested dicts by path: every leaf has a name `a/b/c`, and ordered rules speak about names.

A tree is a dict whose values are trees or leaves; whatever is not a dict is a leaf (arrays,
tuples, None, specs). Keys are non-empty strings without `/`. Leaves come in the order of their
sorted keys at every level, which is the order of `jax.tree.leaves`.
"""

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from flax import traverse_util

PyTree = Any  # whatever jax.tree walks: containers of arrays, shapes or shardings
Leaf = Any
Tree = dict[str, Any]  # of trees and leaves
Value = TypeVar("Value")


def named_leaves(tree: Tree) -> list[tuple[str, Leaf]]:
    """Return [(path, leaf)] in sorted order; {'b': {'c': 1}, 'a': 2} -> [('a', 2), ('b/c', 1)].

    Raises ValueError where the tree is no dict or a key is no usable name.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"tree: got {type(tree).__name__}, want a dict of dicts and leaves")
    leaves = traverse_util.flatten_dict(tree)
    for path in leaves:
        for key in path:
            if not isinstance(key, str) or not key or "/" in key:
                raise ValueError(f"key in {path}: got {key!r}, want a non-empty string without '/'")
    return [("/".join(path), leaves[path]) for path in sorted(leaves)]


def nest(named: Iterable[tuple[str, Leaf]]) -> Tree:
    """Return the tree with these (path, leaf) pairs; the inverse of `named_leaves`."""
    return traverse_util.unflatten_dict(dict(named), sep="/")


def map_named(fn: Callable[[str, Leaf], Leaf], tree: Tree) -> Tree:
    """Return a tree of the same structure whose leaf at `path` is `fn(path, leaf)`.

    `fn` is called in the order of `named_leaves`; empty dicts stay.
    """
    mapped = {path: fn(path, leaf) for path, leaf in named_leaves(tree)}
    everything = traverse_util.flatten_dict(tree, keep_empty_nodes=True, sep="/")
    return traverse_util.unflatten_dict(everything | mapped, sep="/")


def match(rules: Sequence[tuple[str, Value]], path: str) -> Value:
    """Return the value of the first rule whose regex is found in `path`.

    Matching is `re.search`: a pattern may match anywhere in the path, and `^`, `$` and `/` anchor
    it. With rules (('norm/scale$', 0), ('^language/', 1), ('', 2)): 'language/norm/scale' -> 0,
    'language/layers/norm/bias' -> 1, 'visual/norm/bias' -> 2 (the empty pattern is a catch-all).
    Raises ValueError, with the path and all the rules, where none matches.
    Source: the ordered masks of google-research/big_vision `big_vision/optax.py`.
    """
    for pattern, value in rules:
        if re.search(pattern, path):
            return value
    listed = ", ".join(repr(pattern) for pattern, _ in rules) or "none at all"
    raise ValueError(f"no rule matches {path!r}; got the rules: {listed}; want one that does")


def partition(tree: Tree, predicate: Callable[[str, Leaf], bool]) -> tuple[Tree, Tree]:
    """Return (selected, rest): the leaves where `predicate(path, leaf)` holds, and the others.

    Both keep the nesting; dicts left without a leaf are dropped. `combine` undoes it.
    """
    named = named_leaves(tree)
    selected = {path: leaf for path, leaf in named if predicate(path, leaf)}
    return nest(selected.items()), nest(pair for pair in named if pair[0] not in selected)


def combine(a: Tree, b: Tree) -> Tree:
    """Return the tree with the leaves of both; the inverse of `partition`.

    Raises ValueError, naming both sides, where a path is in both or a leaf of one would lie
    below a leaf of the other. Dicts without a leaf are dropped.
    """
    first, second = dict(named_leaves(a)), dict(named_leaves(b))
    clashes = [(path, above) for path in first for above in _upwards(path) if above in second]
    clashes += [(above, path) for path in second for above in _upwards(path)[1:] if above in first]
    if clashes:
        shown = "; ".join(
            f"first tree's {ours!r} ({_summary(first[ours])}) and "
            f"second tree's {theirs!r} ({_summary(second[theirs])})"
            for ours, theirs in clashes
        )
        raise ValueError(f"trees collide, want disjoint leaves, got {shown}")
    return nest(sorted({**first, **second}.items()))


def get(tree: Tree, path: str) -> PyTree:
    """Return the leaf or subtree at `path`; raises ValueError with the keys that are there."""
    node: PyTree = tree
    for name in path.split("/"):
        if not isinstance(node, dict) or name not in node:
            there = sorted(node) if isinstance(node, dict) else f"a leaf ({_summary(node)})"
            raise ValueError(f"no {path!r} in the tree: got {there}, want {name!r}")
        node = node[name]
    return node


def _upwards(path: str) -> list[str]:
    """'a/b/c' -> 'a/b/c', 'a/b', 'a'."""
    names = path.split("/")
    return ["/".join(names[:depth]) for depth in range(len(names), 0, -1)]


def _summary(leaf: Leaf) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__
