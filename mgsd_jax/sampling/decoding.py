"""The decode loop: passes of the model over the last tokens of all rows, until every row has ended.

Axes: B rows, W tokens of a pass, R response tokens, S cache slots, D width, V vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from mgsd_jax.model.cache import KVCache
from mgsd_jax.model.cpu import Cache, Layers, join_layers
from mgsd_jax.model.qwen3vl import Qwen3VL, head, logits, split_cache
from mgsd_jax.parallel import batches
from mgsd_jax.parallel.axes import BATCH, WIDTHS, constrain
from mgsd_jax.sampling import choice as choices
from mgsd_jax.sampling import drafts
from mgsd_jax.tree import Tree

STAGES = (256, 512, 1024, 2048)  # slots of the cache behind the prompt; then all of them
SPARE_PASSES = 8  # passes between two compactions of a full cache, at least


@struct.dataclass
class Rollout:
    """Responses, padded to R with the pad id."""

    tokens: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R] bool, True through the first end token
    logprobs: jax.Array  # [B, R] float32, of the distribution sampled from; 0 where mask is False
    truncated: jax.Array  # [B] bool, True where R tokens went by without an end token
    guessed: jax.Array  # [B, R] bool, tokens that a draft held: they cost no pass of the model


def cache_stages(prompt: int, max_new_tokens: int, window: int) -> tuple[int, ...]:
    """Slots of the cache in each stage, after a prompt of T tokens; attention reads them all.

    Without drafts (a window of 1) the last stage holds every token. With them it has room for some
    passes more, as a pass leaves holes behind guesses that were wrong. It is at least twice as
    large as the stage before: to grow by less is not worth a program.
    """
    last = max_new_tokens + (0 if window == 1 else SPARE_PASSES * window)
    return tuple(prompt + new for new in (*(s for s in STAGES if 2 * s <= last), last))


def least_room(slots: int, window: int, *, is_last: bool) -> int:
    """Slots that have to be free in a compacted cache of a drafted rollout, or it ends or grows."""
    return window if is_last else max(window, slots // 4)


class Static(NamedTuple):
    """What selects a compiled program, besides shapes."""

    model: Qwen3VL
    max_new_tokens: int
    window: int  # tokens of a pass, W: one, and the guesses
    greedy: bool
    top_k: int
    use_top_p: bool

    def stages(self, prompt: int) -> tuple[int, ...]:
        """The `cache_stages` after a prompt of T tokens."""
        return cache_stages(prompt, self.max_new_tokens, self.window)


class Choice(NamedTuple):
    """What a compiled program takes as arguments."""

    eos_ids: np.ndarray  # [number of end tokens] int32
    banned_ids: np.ndarray  # [number of banned tokens] int32
    pad_id: np.int32
    temperature: np.float32
    top_p: np.float32


@struct.dataclass
class State:
    """How far the rows have got."""

    out: Rollout
    count: jax.Array  # [B] int32, tokens of the response so far
    last: jax.Array  # [B] int32, the last of them, whose keys are not in the cache yet
    pointer: jax.Array  # [B] int32, where in its draft a row goes on
    is_over: jax.Array  # [] bool, every row has ended

    @property
    def speaks(self) -> jax.Array:
        """[B] bool, rows that have not ended."""
        return self.out.truncated & (self.count < self.out.tokens.shape[1])


def decode(
    static: Static,
    is_last: bool,
    choice: Choice,
    variables: Tree,
    begun: jax.Array | State,
    cache: KVCache,
    next_position: jax.Array,
    rng: jax.Array,
    row_ids: jax.Array,
    draft: jax.Array | None,
) -> tuple[State, KVCache]:
    """Decodes until all rows have ended, or the slots are full and more are to come.

    `begun` are the prompts' last hidden states [B, D], or the state that the stage before left.
    """
    # Cast once, outside the loop, or every token would read the weights in their wider type.
    variables = jax.tree.map(lambda leaf: leaf.astype(static.model.dtype), variables)
    layers, split = split_cache(static.model, variables, cache)
    table = head(variables["params"])
    loop = _Loop(
        static,
        choice,
        variables,
        layers,
        next_position,
        draft,
        table,
        banned=jnp.zeros(table.shape[0], bool).at[choice.banned_ids].set(True),
        uniforms=choices.uniforms(rng, row_ids, static.max_new_tokens),
    )

    def has_room(carried: tuple[State, Cache], slots: int) -> jax.Array:
        state, cache = carried
        return state.speaks.any() & (cache.length + slots <= cache.valid.shape[1])

    def fill(carried: tuple[State, Cache]) -> tuple[State, Cache]:
        return jax.lax.while_loop(lambda c: has_room(c, static.window), loop.decode_window, carried)

    def fill_and_compact(carried: tuple[State, Cache]) -> tuple[State, Cache]:
        state, cache = fill(carried)
        compact = functools.partial(type(cache).compact, keep=state.speaks)
        # Not at the end: whoever has ended needs no room.
        return state, jax.lax.cond(state.speaks.any(), compact, lambda cache: cache, cache)

    if isinstance(begun, State):
        state = begun
    else:
        state = _begin(begun.shape[0], static.max_new_tokens, choice)
        state, _ = loop.extend(state, begun[:, None], jnp.zeros((begun.shape[0], 0), jnp.int32))
    if static.window == 1:
        state, split = fill((state, split))
    else:
        # Compacted, the cache is good for some passes more, or for a larger stage.
        least = least_room(cache.valid.shape[1], static.window, is_last=is_last)
        state, split = jax.lax.while_loop(
            lambda c: has_room(c, least), fill_and_compact, (state, split)
        )
    state = dataclasses.replace(state, is_over=~state.speaks.any())
    state = dataclasses.replace(state, out=batches.constrain(state.out, static.model.mesh))
    return state, join_layers(split)


@dataclasses.dataclass(frozen=True)
class _Loop:
    """What no pass of a decode loop changes."""

    static: Static
    choice: Choice
    variables: Tree
    layers: Layers | None  # of the decoder, where they are split once for the whole loop
    next_position: jax.Array  # [B] int32 of the first token of a response
    draft: jax.Array | None  # [B, F] int32
    table: jax.Array  # [V, D] the head
    banned: jax.Array  # [V] bool
    uniforms: jax.Array  # [B, R] float32, one for every place of a response

    def choose(self, hidden: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens and logprobs [B, W] drawn from hidden states [B, W, D], at places from `count`."""
        mesh, shape = self.static.model.mesh, hidden.shape[:2]
        places = jnp.minimum(count[:, None] + jnp.arange(shape[1]), self.static.max_new_tokens - 1)
        scores = logits(hidden.reshape(-1, hidden.shape[-1]), self.table)  # [B * W, V]
        # Split where they are made, or the compiler gathers the table instead, 0.7 GiB a pass for
        # 4B. Then each row's logits meet on one device: from there on sampling is one device's. One
        # axis at a time, or all rows would be gathered on every device.
        for where in (("data", WIDTHS), (BATCH, "tensor"), ((*BATCH, "tensor"),)):
            scores = constrain(scores, mesh, *where)
        scores = _restrict(jnp.where(self.banned, -jnp.inf, scores), self.static, self.choice)
        if self.static.greedy:
            tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            # The likeliest token's logit is the largest: its logprob needs no [B, V] of logprobs.
            chances = scores.max(axis=-1) - jax.nn.logsumexp(scores, axis=-1)
        else:
            logprobs = jax.nn.log_softmax(scores, axis=-1)
            drawn = constrain(jnp.take_along_axis(self.uniforms, places, axis=1), mesh, BATCH)
            tokens = choices.invert_cdf(logprobs, drawn.reshape(-1))
            chances = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
        tokens, chances = (constrain(x.reshape(shape), mesh, BATCH) for x in (tokens, chances))
        return tokens, chances

    def extend(
        self, state: State, hidden: jax.Array, guessed: jax.Array
    ) -> tuple[State, jax.Array]:
        """The state with the tokens of a pass, and how many [B] they are."""
        tokens, logprobs = self.choose(hidden, state.count)
        ends = (tokens[..., None] == self.choice.eos_ids).any(axis=-1)
        room = jnp.where(state.speaks, self.static.max_new_tokens - state.count, 0)
        keep = drafts.kept(tokens, guessed, ends, room)
        taken = keep.sum(axis=1, dtype=jnp.int32)
        own = jnp.arange(tokens.shape[1]) == taken[:, None] - 1  # the last one is no guess
        put = functools.partial(drafts.put, count=state.count, taken=taken)
        last = jnp.take_along_axis(tokens, jnp.maximum(taken - 1, 0)[:, None], axis=1)[:, 0]
        out = Rollout(
            tokens=put(state.out.tokens, tokens),
            mask=put(state.out.mask, keep),
            logprobs=put(state.out.logprobs, logprobs),
            truncated=state.out.truncated & ~(keep & ends).any(axis=1),
            guessed=put(state.out.guessed, ~own),
        )
        state = State(
            out=out,
            count=state.count + taken,
            last=jnp.where(taken > 0, last, self.choice.pad_id),
            pointer=state.pointer + taken,
            is_over=state.is_over,
        )
        if self.draft is not None:
            recent = drafts.last_tokens(out.tokens, state.count)
            state = dataclasses.replace(
                state, pointer=drafts.follow(self.draft, state.pointer, recent)
            )
        return state, taken

    def decode_window(self, carried: tuple[State, Cache]) -> tuple[State, Cache]:
        state, cache = carried
        window = self.static.window
        guessed = jnp.zeros((state.last.shape[0], 0), jnp.int32)
        if self.draft is not None:
            guessed = drafts.guess(self.draft, state.pointer, window - 1)
        tokens = jnp.concatenate([state.last[:, None], jnp.maximum(guessed, 0)], axis=1)
        positions = (self.next_position + state.count - 1)[:, None] + jnp.arange(window)
        passed = self.static.model.apply(
            self.variables, tokens, positions, cache, self.layers, method="decode"
        )
        hidden, cache = cast(tuple[jax.Array, Cache], passed)
        state, taken = self.extend(state, hidden, guessed)
        # Of a pass's slots those of the last token and of right guesses stay.
        slots = jnp.arange(cache.valid.shape[1]) - (cache.length - window)
        valid = cache.valid & (slots < jnp.maximum(taken, 1)[:, None])
        valid = constrain(valid, self.static.model.mesh, BATCH)
        return batches.constrain(state, self.static.model.mesh), dataclasses.replace(
            cache, valid=valid
        )


def _begin(rows: int, width: int, choice: Choice) -> State:
    """The state before the first token."""
    none = jnp.zeros((rows, width), bool)
    zero = jnp.zeros(rows, jnp.int32)
    out = Rollout(
        tokens=jnp.full((rows, width), choice.pad_id, jnp.int32),
        mask=none,
        logprobs=jnp.zeros((rows, width), jnp.float32),
        truncated=jnp.ones(rows, bool),
        guessed=none,
    )
    return State(out, count=zero, last=zero, pointer=zero, is_over=jnp.bool_(False))


def _restrict(scores: jax.Array, static: Static, choice: Choice) -> jax.Array:
    """Logits [B, V] with temperature, top-k and top-p applied, in transformers' order."""
    if static.greedy:
        return scores
    scores = scores / choice.temperature
    if static.top_k:
        least = jax.lax.top_k(scores, static.top_k)[0][:, -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    if static.use_top_p:
        scores = choices.keep_nucleus(scores, choice.top_p)
    return scores
