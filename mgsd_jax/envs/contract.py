"""Whether the functions of an env fit each other: all of them, on a board that it draws.

A part that is wrong would else show late or not at all: plans that no answer can state score 0, and
facts that `labels` leaves out make every reading of a board a right one.
"""

from collections.abc import Callable
from typing import TypeVar, get_args

import numpy as np

from mgsd_jax.envs import BY_ROWS, AnyState, facts, find
from mgsd_jax.envs.base import REASONS, ROUTE_START, Env, Sprites, check_inside
from mgsd_jax.envs.search import Paths, distances_to

T = TypeVar("T")
AnyEnv = Env[AnyState]
_NODES = 200  # from which every action is tried
# What a mistake in the functions of an env raises.
_MISTAKES = (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, AssertionError)


def check(task: str, level: int, *, picture_size: int, seed: int = 0) -> None:
    """Raises ValueError where an env's functions contradict each other on a board of a level.

    The one line names the env, the function, what was got and what was wanted.
    """
    env = find(task)
    state = _draw(env, level, seed)
    paths = _check_paths(env, state)
    _check_refusals(env, state, paths)
    for worded in (env, *([BY_ROWS[task]] if task in BY_ROWS else [])):
        _check_words(worded, state)
    _check_file(env, state)
    _check_pictures(env, state, picture_size)
    _check_noise(env, state)


def _wrong(env: AnyEnv, function: str, got: object, want: object) -> ValueError:
    return ValueError(" ".join(f"{env.name}: {function}: got {got}, want {want}".split()))


def _call(env: AnyEnv, function: str, call: Callable[[], T], want: str = "no error") -> T:
    """What a call into an env returns; the error of a mistake in there names the function."""
    try:
        return call()
    except _MISTAKES as error:
        got = f"{type(error).__name__} ({error}; --verbosity=1 shows where)"
        raise _wrong(env, function, got, want) from error


def _draw(env: AnyEnv, level: int, seed: int) -> AnyState:
    """A board of a level, drawn twice from equal random states."""
    env.check_level(level)
    want = f"a board of level {level}"
    state, again = (
        _call(env, "generate", lambda: env.generate(np.random.default_rng(seed), level), want)
        for _ in range(2)
    )
    _call(env, "generate", lambda: hash(state), "a state that can be hashed")
    if state != again:
        raise _wrong(env, "generate", f"{state} and {again} of one seed", "one board")
    if state.size != level:
        raise _wrong(env, "generate", f"size {state.size}", f"{want}, whose size is {level}")
    keys = [_call(env, "key", lambda state=state: env.key(state)) for state in (state, again)]
    if not isinstance(keys[0], str) or "\n" in keys[0] or keys[0] != keys[1]:
        raise _wrong(env, "key", f"{keys[0]!r} and {keys[1]!r}", "one line, the same for one board")
    count = _call(env, "count", lambda: env.count_states(level))
    if count is not None and (type(count) is not int or count < 1):
        raise _wrong(env, "count", repr(count), "how many boards there are, or None")
    return state


def _check_paths(env: AnyEnv, state: AnyState) -> Paths:
    """The graph of a board, which has to be one, with the distances that follow from it."""
    paths, key = _call(env, "paths", lambda: env.paths(state)), env.key(state)
    lengths = [len(part) for part in (paths.successors, paths.distances, paths.cells)]
    if len(set(lengths)) != 1:
        raise _wrong(env, "paths", f"successors, distances, cells of {lengths} nodes", "as many")
    actions = {action for steps in paths.successors for action in steps}
    if not actions <= env.actions.keys():
        raise _wrong(env, "paths", sorted(actions - env.actions.keys()), [*env.actions])
    goals = [node for node, distance in enumerate(paths.distances) if distance == 0]
    fewest = _call(env, "paths", lambda: distances_to(paths.successors, goals))
    for node, (got, want) in enumerate(zip(paths.distances, fewest, strict=True)):
        if got != want:
            raise _wrong(env, "paths", f"distance {got} of node {node}", f"{want} by successors")
    _call(env, "paths", lambda: check_inside(state.size, "cells", paths.cells))
    if paths.distances[paths.start] < 0:
        raise _wrong(env, "generate", f"{key}, which no plan solves", "a board that can be solved")
    plan = _call(env, "paths", lambda: env.shortest_plan(state))
    if env.read(env.spell(plan)) != (plan, None):
        raise _wrong(
            env, "actions", f"{env.spell(plan)!r}, read as {env.read(env.spell(plan))}", plan
        )
    return paths


def _check_refusals(env: AnyEnv, state: AnyState, paths: Paths) -> None:
    """What becomes of the actions that the graph lacks, from the first nodes that are reached."""
    reached = [paths.start]
    for node in reached:  # grows while it is gone through
        new = {*paths.successors[node].values()}.difference(reached)
        reached += sorted(new)[: max(0, _NODES - len(reached))]
    for node in (node for node in reached if paths.distances[node] != 0):
        for action in env.actions.keys() - paths.successors[node].keys():
            result = _call(env, "refuse", lambda n=node, a=action: env.refuse(state, n, a))
            case = f"{result!r} for {action!r} at node {node}"
            if not isinstance(result, tuple) or len(result) != 2 or result == (None, None):
                raise _wrong(env, "refuse", case, "(next node, reason), at most one of them None")
            following, reason = result
            if following is not None and not 0 <= following < len(paths.successors):
                raise _wrong(env, "refuse", case, f"a node below {len(paths.successors)}")
            if reason is not None and reason not in {**REASONS, **env.reasons}:
                raise _wrong(env, "reasons", case, f"{reason!r} in words")


def _check_words(env: AnyEnv, state: AnyState) -> None:
    """What a right response states, which has to read back, down to the board."""
    key, plan = env.key(state), env.shortest_plan(state)
    lines = _call(env, "questions", lambda: env.state_lines(state))
    route = _call(env, "route", lambda: env.route(plan, env.trace(state, plan)))
    if not route.startswith(ROUTE_START) or "\n" in route or "<" in route:
        raise _wrong(env, "route", repr(route), f"one line that begins {ROUTE_START!r}")
    true = _call(env, "questions", lambda: env.facts(state))
    words = facts.vocabulary(env.labels, has_sides=env.has_sides)
    stated = facts.read_stated(words, "\n".join((*lines, route)))
    silent = {"size", *env.labels} - stated.labels
    if silent:
        want = f"a line for each of {['size', *env.labels]}, which begins with its word"
        raise _wrong(env, "labels", f"no line about {sorted(silent)} in {[*lines]}", want)
    lost, made = (sorted(map(str, some)) for some in (true - stated.facts, stated.facts - true))
    if lost or made or stated.contradicted:
        got = f"{[*lines, route]}, which read back without {lost[:3]} and with {made[:3]}"
        raise _wrong(env, "questions", got, "lines that state the facts of the board, each once")
    asked = [question for question in env.questions(state) if question.kind in ("coord", "cells")]
    kinds = {kind for q in asked for kind in {fact[0] for fact in q.facts} or {q.name}}
    left = sorted(kinds.difference(env.labels, env.labels.values()))
    want = f"{key} of the facts that {[*env.labels]} of labels name"
    want += f" (questions also have {left})" if left else ""
    own = _call(env, "from_facts", lambda: facts.stated_board(env.name, stated), want)
    if own != state:
        raise _wrong(env, "from_facts", f"{env.key(own)}", want)


def _check_file(env: AnyEnv, state: AnyState) -> None:
    text = _call(env, "file", lambda: env.to_text(state, split="train", index=0, seed=0))
    own = _call(env, "file", lambda: env.from_text(text, source="what was written"))
    if own != state:
        raise _wrong(env, "file", f"{env.key(own)} read back", env.key(state))


def _check_pictures(env: AnyEnv, state: AnyState, size: int) -> None:
    for sprites in get_args(Sprites):
        picture = _call(env, "render", lambda s=sprites: env.render(state, size, sprites=s))
        want = (size, size, 3)
        if (
            not isinstance(picture, np.ndarray)
            or picture.shape != want
            or picture.dtype != np.uint8
        ):
            got = getattr(picture, "dtype", type(picture)), getattr(picture, "shape", "no shape")
            raise _wrong(env, "render", f"{got[0]} {got[1]}", f"uint8 {want}")


def _check_noise(env: AnyEnv, state: AnyState) -> None:
    rng = np.random.default_rng(0)
    for share in (0.0, 0.5):
        wrong = _call(env, "disturb", lambda s=share: env.disturb(state, rng, s))
        if wrong.size != state.size or (share == 0.0 and wrong != state):
            want = "a board of the same size, at share 0 the same board"
            raise _wrong(env, "disturb", f"{env.key(wrong)} of {env.key(state)}", want)
        _call(env, "paths", lambda s=wrong: env.paths(s))
