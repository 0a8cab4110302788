"""Rollouts: one jitted prefill, then one jitted decode loop that stops when every row has ended.

Axes: B batch, T prompt tokens, R response tokens, S cache slots, D width, V vocabulary.
"""

import dataclasses
import functools
from typing import NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from mgsd_jax.config import SamplingConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.cache import KVCache
from mgsd_jax.model.cpu import Cache, join_layers
from mgsd_jax.model.qwen3vl import Qwen3VL, head, logits, split_cache
from mgsd_jax.parallel import batches, sharding
from mgsd_jax.parallel.axes import BATCH, constrain, dividing, fit, parts
from mgsd_jax.sampling import choice as choices
from mgsd_jax.sampling import drafts
from mgsd_jax.tree import PyTree, Tree

Variables = Tree  # {'params': ..., optionally 'adapters': ...}
Program = tuple[Wrapped, tuple[PyTree, ...]]  # a jitted function, and its arguments
_STAGES = (256, 512, 1024)  # slots behind the prompt; then all of them
_SPARE_PASSES = 8  # passes between two compactions of a full cache, at least
_SUBLANES = 8  # rows of a TPU's tile; with fewer the default layout pads less


@struct.dataclass
class Rollout:
    """Responses, padded to R with the pad id."""

    tokens: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R] bool, True through the first end token
    logprobs: jax.Array  # [B, R] float32, of the distribution sampled from; 0 where mask is False
    truncated: jax.Array  # [B] bool, True where R tokens went by without an end token
    guessed: jax.Array  # [B, R] bool, tokens that a draft held: they cost no pass of the model


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Samples one response to each prompt.

    `banned_ids` (picture pads) have probability 0; `eos_ids` end a row and belong to it; after that
    it emits `pad_id`. Samplers that differ only in ids, in a temperature above 0 or in a top_p
    below 1 share one compiled program. Raises ValueError for ids outside the vocabulary, or both
    banned and ending.
    """

    model: Qwen3VL
    sampling: SamplingConfig
    _: dataclasses.KW_ONLY
    eos_ids: tuple[int, ...]
    banned_ids: tuple[int, ...]
    pad_id: int

    def __post_init__(self) -> None:
        vocabulary = self.model.config.text.vocab_size
        for name, ids in (
            ("eos_ids", self.eos_ids),
            ("banned_ids", self.banned_ids),
            ("pad_id", (self.pad_id,)),
        ):
            if any(not 0 <= i < vocabulary for i in ids):
                raise ValueError(f"{name}: got {ids}, want ids in [0, {vocabulary})")
        if set(self.eos_ids) & set(self.banned_ids):
            raise ValueError(f"banned_ids: got {self.banned_ids}, want none of {self.eos_ids}")

    def rollout(
        self,
        variables: Variables,
        inputs: Inputs,
        rng: jax.Array,
        row_ids: jax.typing.ArrayLike,
        draft: jax.typing.ArrayLike | None = None,
    ) -> Rollout:
        """One response a row. Between stages of the cache the host looks whether all have ended.

        Prompts are left-padded. A row's response depends on `rng`, its own `row_ids` [B] entry and
        its own prompt, not on its neighbours or its place in the batch, nor (but for rounding) on
        its `draft` [B, F], a guess of the response, padded with NO_TOKEN, of which
        `sampling.draft_tokens` are tried a pass. `logprobs` are float32, after bans, temperature,
        top-k and top-p; those of greedy rollouts are the model's at temperature 1.
        """
        static = self._static(draft is not None)
        prefill, decode, grow = _compiled(
            _places(self.model, inputs.tokens.shape[0], static.window)
        )
        first, *later = static.stages(inputs.tokens.shape[1])
        hidden, cache = prefill(static, first, variables, inputs)
        rest = (inputs.next_position, rng, row_ids, draft)
        state, cache = decode(static, not later, self._choice, variables, hidden, cache, *rest)
        for i, slots in enumerate(later, 1):
            if state.is_over:  # a look from the host
                break
            cache = grow(cache, slots)
            is_last = i == len(later)
            state, cache = decode(static, is_last, self._choice, variables, state, cache, *rest)
        return state.out

    def programs(
        self,
        variables: Variables,
        inputs: Inputs,
        rng: PyTree,
        row_ids: PyTree,
        draft: PyTree = None,
    ) -> dict[str, Program]:
        """'prefill' and 'decode' of `rollout`, to be lowered with their arguments; runs nothing.

        They are those of the last, largest stage of the cache. The arguments are
        ShapeDtypeStructs that lie on the model's mesh.
        """
        static = self._static(draft is not None)
        places = _places(self.model, inputs.tokens.shape[0], static.window)
        prefill, decode, _ = _compiled(places)
        slots = static.stages(inputs.tokens.shape[1])[-1]
        prefilled = jax.eval_shape(functools.partial(_prefill, static, slots), variables, inputs)
        if places is not None:
            prefilled = sharding.abstract(prefilled, places)
        rest = (*prefilled, inputs.next_position, rng, row_ids, draft)
        return {
            "prefill": (prefill, (static, slots, variables, inputs)),
            "decode": (decode, (static, True, self._choice, variables, *rest)),
        }

    def _static(self, has_draft: bool) -> "_Static":
        sampling = self.sampling
        return _Static(
            self.model,
            max_new_tokens=sampling.max_new_tokens,
            window=1 + (sampling.draft_tokens if has_draft else 0),
            greedy=sampling.temperature == 0,
            top_k=min(sampling.top_k, self.model.config.text.vocab_size),
            use_top_p=sampling.top_p < 1,
        )

    @property
    def _choice(self) -> "_Choice":
        return _Choice(
            eos_ids=np.asarray(self.eos_ids, np.int32),
            banned_ids=np.asarray(self.banned_ids, np.int32),
            pad_id=np.int32(self.pad_id),
            temperature=np.float32(self.sampling.temperature),
            top_p=np.float32(self.sampling.top_p),
        )


class _Static(NamedTuple):
    """What selects a compiled program, besides shapes."""

    model: Qwen3VL
    max_new_tokens: int
    window: int  # tokens of a pass, W: one, and the guesses
    greedy: bool
    top_k: int
    use_top_p: bool

    def stages(self, prompt: int) -> tuple[int, ...]:
        """Slots of the cache in each stage, after a prompt of T tokens; attention reads them all.

        Without drafts the last stage holds every token. With them it has room for some passes
        more, as a pass leaves holes behind guesses that were wrong.
        """
        holes = 0 if self.window == 1 else _SPARE_PASSES * self.window
        last = self.max_new_tokens + holes
        return tuple(prompt + new for new in (*(s for s in _STAGES if s < last), last))


class _Choice(NamedTuple):
    """What a compiled program takes as arguments."""

    eos_ids: np.ndarray  # [number of end tokens] int32
    banned_ids: np.ndarray  # [number of banned tokens] int32
    pad_id: np.int32
    temperature: np.float32
    top_p: np.float32


@functools.cache
def _compiled(places: PyTree) -> tuple[Wrapped, Wrapped, Wrapped]:
    """(prefill, decode, grow), jitted; the last hidden states and the cache lie as `places` say.

    The cache is returned, although nothing may read it: XLA refuses to reuse a donated buffer that
    has no output to go to, and would hold the cache twice.
    """
    return (
        jax.jit(_prefill, static_argnums=(0, 1), out_shardings=places),
        jax.jit(
            _decode,
            static_argnums=(0, 1),
            donate_argnames="cache",
            out_shardings=None if places is None else (None, places[1]),
        ),
        jax.jit(_grow, static_argnums=1, out_shardings=None if places is None else places[1]),
    )


def _places(model: Qwen3VL, rows: int, window: int) -> PyTree:
    """Where the last hidden states and the cache lie between prefill and decode; None: anywhere.

    On a TPU the loop wants rows beside widths, [L, S, K, B, H] in memory, and with several queries
    a row slots beside them, [L, B, K, S, H]: handed over in another layout, the cache would be
    copied on the way in and on the way out, and be there twice.
    """
    mesh, text = model.mesh, model.config.text
    if mesh is None:
        return None
    by_row = NamedSharding(mesh, P(dividing(mesh, BATCH, rows)))
    shape = (text.num_hidden_layers, rows, 1, text.num_key_value_heads, text.head_dim)
    place: PyTree = NamedSharding(mesh, fit(P(None, BATCH, None, "tensor"), shape, mesh))
    if model.kernel.name == "splash" and window > 1:
        place = Format(Layout((0, 1, 3, 2, 4)), place)
    elif model.kernel.name == "splash" and rows // parts(mesh, by_row.spec[0]) >= _SUBLANES:
        place = Format(Layout((0, 2, 3, 1, 4)), place)
    fields: Tree = {"k": place, "v": place, "valid": by_row, "length": NamedSharding(mesh, P())}
    return by_row, KVCache(**fields)


def _prefill(
    static: _Static, slots: int, variables: Variables, inputs: Inputs
) -> tuple[jax.Array, KVCache]:
    prefilled = static.model.apply(variables, inputs, slots, method="prefill")
    return cast(tuple[jax.Array, KVCache], prefilled)


def _grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with empty slots behind its own."""
    more = ((0, 0), (0, slots - cache.valid.shape[1]))
    k, v = (jnp.pad(x, ((0, 0), *more, (0, 0), (0, 0))) for x in (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v, valid=jnp.pad(cache.valid, more))


@struct.dataclass
class _State:
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


def _decode(
    static: _Static,
    is_last: bool,
    choice: _Choice,
    variables: Variables,
    begun: jax.Array | _State,
    cache: KVCache,
    next_position: jax.Array,
    rng: jax.Array,
    row_ids: jax.Array,
    draft: jax.Array | None,
) -> tuple[_State, KVCache]:
    """Decodes until all rows have ended, or the slots are full and more are to come.

    `begun` are the prompts' last hidden states [B, D], or the state that the stage before left.
    """
    width, window = static.max_new_tokens, static.window
    # Cast once, outside the loop, or every token would read the weights in their wider type.
    variables = jax.tree.map(lambda leaf: leaf.astype(static.model.dtype), variables)
    layers, split = split_cache(static.model, variables, cache)
    table = head(variables["params"])
    banned = jnp.zeros(table.shape[0], bool).at[choice.banned_ids].set(True)
    uniforms = choices.uniforms(rng, row_ids, width)

    def draw(scores: jax.Array, places: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Each row's logits meet on its device: from there on sampling is one device's.
        scores = constrain(scores, static.model.mesh, BATCH)
        scores = _restrict(jnp.where(banned, -jnp.inf, scores), static, choice)
        if static.greedy:
            tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            # The likeliest token's logit is the largest: its logprob needs no [B, V] of logprobs.
            return tokens, scores.max(axis=-1) - jax.nn.logsumexp(scores, axis=-1)
        logprobs = jax.nn.log_softmax(scores, axis=-1)
        drawn = jnp.take_along_axis(uniforms, places[:, None], axis=1)[:, 0]
        tokens = choices.invert_cdf(logprobs, drawn)
        return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]

    def choose(hidden: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Tokens and logprobs [B, W] drawn from hidden states [B, W, D], at places from `count`."""
        places = jnp.minimum(count + jnp.arange(hidden.shape[1])[:, None], width - 1)
        # Split where they are made, or the compiler gathers the table instead, 0.7 GiB a token for
        # 4B. It is read once for all of a pass; one place at a time has whole rows of logits.
        if hidden.shape[1] == 1:
            scores = constrain(logits(hidden[:, 0], table), static.model.mesh, BATCH, "tensor")
            tokens, chances = draw(scores, places[0])
            return tokens[:, None], chances[:, None]
        scores = logits(hidden.swapaxes(0, 1), table)
        scores = constrain(scores, static.model.mesh, None, BATCH, "tensor")
        tokens, chances = jax.lax.map(lambda one: draw(*one), (scores, places))
        return tokens.T, chances.T

    def extend(state: _State, hidden: jax.Array, guessed: jax.Array) -> tuple[_State, jax.Array]:
        """The state with the tokens of a pass, and how many [B] they are."""
        tokens, logprobs = choose(hidden, state.count)
        ends = (tokens[..., None] == choice.eos_ids).any(axis=-1)
        room = jnp.where(state.speaks, width - state.count, 0)
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
        state = _State(
            out=out,
            count=state.count + taken,
            last=jnp.where(taken > 0, last, choice.pad_id),
            pointer=state.pointer + taken,
            is_over=state.is_over,
        )
        if draft is not None:
            recent = drafts.last_tokens(out.tokens, state.count)
            state = dataclasses.replace(state, pointer=drafts.follow(draft, state.pointer, recent))
        return state, taken

    def decode_window(carried: tuple[_State, Cache]) -> tuple[_State, Cache]:
        state, cache = carried
        guessed = jnp.zeros((state.last.shape[0], 0), jnp.int32)
        if draft is not None:
            guessed = drafts.guess(draft, state.pointer, window - 1)
        tokens = jnp.concatenate([state.last[:, None], jnp.maximum(guessed, 0)], axis=1)
        positions = (next_position + state.count - 1)[:, None] + jnp.arange(window)
        passed = static.model.apply(variables, tokens, positions, cache, layers, method="decode")
        hidden, cache = cast(tuple[jax.Array, Cache], passed)
        state, taken = extend(state, hidden, guessed)
        # Of a pass's slots those of the last token and of right guesses stay.
        slots = jnp.arange(cache.valid.shape[1]) - (cache.length - window)
        return state, dataclasses.replace(
            cache, valid=cache.valid & (slots < jnp.maximum(taken, 1)[:, None])
        )

    def has_room(carried: tuple[_State, Cache], slots: int) -> jax.Array:
        state, cache = carried
        return state.speaks.any() & (cache.length + slots <= cache.valid.shape[1])

    def fill(carried: tuple[_State, Cache]) -> tuple[_State, Cache]:
        return jax.lax.while_loop(lambda c: has_room(c, window), decode_window, carried)

    def fill_and_compact(carried: tuple[_State, Cache]) -> tuple[_State, Cache]:
        state, cache = fill(carried)
        compact = functools.partial(type(cache).compact, keep=state.speaks)
        # Not at the end: whoever has ended needs no room.
        return state, jax.lax.cond(state.speaks.any(), compact, lambda cache: cache, cache)

    if isinstance(begun, _State):
        state = begun
    else:
        state = _begin(begun.shape[0], width, choice)
        state, _ = extend(state, begun[:, None], jnp.zeros((begun.shape[0], 0), jnp.int32))
    if window == 1:
        state, split = fill((state, split))
    else:
        # Compacted, the cache is good for some passes more, or for a larger stage.
        least = window if is_last else max(window, (cache.valid.shape[1]) // 4)
        state, split = jax.lax.while_loop(
            lambda c: has_room(c, least), fill_and_compact, (state, split)
        )
    state = dataclasses.replace(state, is_over=~state.speaks.any())
    state = dataclasses.replace(state, out=batches.constrain(state.out, static.model.mesh))
    return state, join_layers(split)


def _begin(rows: int, width: int, choice: _Choice) -> _State:
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
    return _State(out, count=zero, last=zero, pointer=zero, is_over=jnp.bool_(False))


def _restrict(scores: jax.Array, static: _Static, choice: _Choice) -> jax.Array:
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
