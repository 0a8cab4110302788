"""Nested dicts by path: every leaf has a name `a/b/c`, and ordered rules speak about names.

A tree is a dict whose values are trees or leaves; whatever is not a dict is a leaf (arrays,
tuples, None, specs). Keys are non-empty strings without `/`. Leaves come in the order of their
sorted keys at every level, which is the order of `jax.tree.leaves`.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeVar

Tree = dict[str, Any]
Value = TypeVar("Value")


def named_leaves(tree: Tree) -> list[tuple[str, Any]]:
    """Return [(path, leaf)] in sorted order; {'b': {'c': 1}, 'a': 2} -> [('a', 2), ('b/c', 1)].

    Raises ValueError where the tree is no dict or a key is no usable name.
    """
    if not isinstance(tree, dict):
        raise ValueError(f"tree: got {type(tree).__name__}, want a dict of dicts and leaves")
    return list(_walk(tree, ""))


def nest(named: Iterable[tuple[str, Any]]) -> Tree:
    """Return the tree with these (path, leaf) pairs; the inverse of `named_leaves`."""
    tree: Tree = {}
    for path, leaf in named:
        _insert(tree, path, leaf)
    return tree


def map_named(fn: Callable[[str, Any], Any], tree: Tree) -> Tree:
    """Return a tree of the same structure whose leaf at `path` is `fn(path, leaf)`.

    `fn` is called in the order of `named_leaves`; empty dicts stay.
    """
    named_leaves(tree)  # names are checked once for the whole tree, before `fn` sees any of it
    return _map(fn, tree, "")


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


def partition(tree: Tree, predicate: Callable[[str, Any], bool]) -> tuple[Tree, Tree]:
    """Return (selected, rest): the leaves where `predicate(path, leaf)` holds, and the others.

    Both keep the nesting; dicts left without a leaf are dropped. `combine` undoes it.
    """
    selected: Tree = {}
    rest: Tree = {}
    for path, leaf in named_leaves(tree):
        _insert(selected if predicate(path, leaf) else rest, path, leaf)
    return selected, rest


def combine(a: Tree, b: Tree) -> Tree:
    """Return the tree with the leaves of both; the inverse of `partition`.

    Raises ValueError, naming both sides, where a path is in both or a leaf of one would lie
    below a leaf of the other. Dicts without a leaf are dropped.
    """
    leaves_a, leaves_b = dict(named_leaves(a)), dict(named_leaves(b))
    collisions = [
        f"{side}{path!r} ({_summary(leaf)}) and {other}{above!r} ({_summary(theirs[above])})"
        for mine, theirs, side, other in (
            (leaves_a, leaves_b, "first tree's ", "second tree's "),
            (leaves_b, leaves_a, "second tree's ", "first tree's "),
        )
        for path, leaf in mine.items()
        for above in _prefixes(path)
        if above in theirs and (above != path or mine is leaves_a)
    ]
    if collisions:
        raise ValueError(f"trees collide, want disjoint leaves, got {'; '.join(collisions)}")
    return nest(sorted({**leaves_a, **leaves_b}.items()))


def get(tree: Tree, path: str) -> Any:
    """Return the leaf or subtree at `path`; raises ValueError with the keys that are there."""
    node: Any = tree
    names = path.split("/")
    for depth, name in enumerate(names):
        if not isinstance(node, dict) or name not in node:
            where = "/".join(names[:depth]) or "the root"
            there = sorted(node) if isinstance(node, dict) else f"a leaf ({_summary(node)})"
            raise ValueError(f"no {path!r} in the tree: got {there} at {where}, want {name!r}")
        node = node[name]
    return node


def _walk(tree: Tree, prefix: str) -> Iterator[tuple[str, Any]]:
    for key in tree:
        if not isinstance(key, str) or not key or "/" in key:
            where = prefix or "the root"
            raise ValueError(f"key at {where}: got {key!r}, want a non-empty string without '/'")
    for key in sorted(tree):
        if isinstance(tree[key], dict):
            yield from _walk(tree[key], f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", tree[key]


def _map(fn: Callable[[str, Any], Any], tree: Tree, prefix: str) -> Tree:
    return {
        key: _map(fn, tree[key], f"{prefix}{key}/")
        if isinstance(tree[key], dict)
        else fn(f"{prefix}{key}", tree[key])
        for key in sorted(tree)
    }


def _insert(tree: Tree, path: str, leaf: Any) -> None:
    *parents, name = path.split("/")
    for parent in parents:
        tree = tree.setdefault(parent, {})
    tree[name] = leaf


def _prefixes(path: str) -> Iterator[str]:
    """'a/b/c' -> 'a', 'a/b', 'a/b/c'."""
    names = path.split("/")
    for depth in range(1, len(names) + 1):
        yield "/".join(names[:depth])


def _summary(leaf: Any) -> str:
    if hasattr(leaf, "shape") and hasattr(leaf, "dtype"):
        return f"{leaf.dtype}{list(leaf.shape)}"
    return type(leaf).__name__
