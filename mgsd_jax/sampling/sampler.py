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
from mgsd_jax.model.cpu import join_layers
from mgsd_jax.model.qwen3vl import Qwen3VL, head, logits, split_cache
from mgsd_jax.parallel import batches, sharding
from mgsd_jax.parallel.axes import BATCH, constrain, dividing, fit, parts
from mgsd_jax.tree import PyTree, Tree

Variables = Tree  # {'params': ..., optionally 'adapters': ...}
Program = tuple[Wrapped, tuple[PyTree, ...]]  # a jitted function, and its arguments
_SUBLANES = 8  # rows of a TPU's tile; with fewer the default layout pads less


@struct.dataclass
class Rollout:
    """Responses, padded to R with the pad id."""

    tokens: jax.Array  # [B, R] int32
    mask: jax.Array  # [B, R] bool, True through the first end token
    logprobs: jax.Array  # [B, R] float32, of the distribution sampled from; 0 where mask is False
    truncated: jax.Array  # [B] bool, True where R tokens went by without an end token


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
        self, variables: Variables, inputs: Inputs, rng: jax.Array, row_ids: jax.typing.ArrayLike
    ) -> Rollout:
        """One response a row, without reading anything back to the host.

        Prompts are left-padded. A row's response depends on `rng`, its own `row_ids` [B] entry and
        its own prompt, not on its neighbours or its place in the batch. `logprobs` are float32,
        after bans, temperature, top-k and top-p; those of greedy rollouts are the model's at
        temperature 1.
        """
        prefill, decode = _compiled(_places(self.model, inputs.tokens.shape[0]))
        hidden, cache = prefill(self._static, variables, inputs)
        rest = (hidden, cache, inputs.next_position, rng, row_ids)
        return decode(self._static, self._choice, variables, *rest)[0]

    def programs(
        self, variables: Variables, inputs: Inputs, rng: PyTree, row_ids: PyTree
    ) -> dict[str, Program]:
        """'prefill' and 'decode' of `rollout`, to be lowered with their arguments; runs nothing.

        The arguments are ShapeDtypeStructs that lie on the model's mesh.
        """
        places = _places(self.model, inputs.tokens.shape[0])
        prefill, decode = _compiled(places)
        prefilled = jax.eval_shape(functools.partial(_prefill, self._static), variables, inputs)
        if places is not None:
            prefilled = sharding.abstract(prefilled, places)
        rest = (*prefilled, inputs.next_position, rng, row_ids)
        return {
            "prefill": (prefill, (self._static, variables, inputs)),
            "decode": (decode, (self._static, self._choice, variables, *rest)),
        }

    @property
    def _static(self) -> "_Static":
        sampling = self.sampling
        return _Static(
            self.model,
            max_new_tokens=sampling.max_new_tokens,
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
    greedy: bool
    top_k: int
    use_top_p: bool


class _Choice(NamedTuple):
    """What a compiled program takes as arguments."""

    eos_ids: np.ndarray  # [number of end tokens] int32
    banned_ids: np.ndarray  # [number of banned tokens] int32
    pad_id: np.int32
    temperature: np.float32
    top_p: np.float32


@functools.cache
def _compiled(places: PyTree) -> tuple[Wrapped, Wrapped]:
    """(prefill, decode), jitted; the last hidden states and the cache lie as `places` say.

    The cache is returned, although nothing reads it: XLA refuses to reuse a donated buffer that has
    no output to go to, and would hold the cache twice.
    """
    return (
        jax.jit(_prefill, static_argnums=0, out_shardings=places),
        jax.jit(
            _decode,
            static_argnums=0,
            donate_argnames="cache",
            out_shardings=None if places is None else (None, places[1]),
        ),
    )


def _places(model: Qwen3VL, rows: int) -> PyTree:
    """Where the last hidden states and the cache lie between prefill and decode; None: anywhere.

    On a TPU the loop wants rows beside widths, [L, S, K, B, H] in memory: handed over in the
    default layout, the cache would be copied on the way in and on the way out, and be there twice.
    """
    mesh, text = model.mesh, model.config.text
    if mesh is None:
        return None
    by_row = NamedSharding(mesh, P(dividing(mesh, BATCH, rows)))
    shape = (text.num_hidden_layers, rows, 1, text.num_key_value_heads, text.head_dim)
    place: PyTree = NamedSharding(mesh, fit(P(None, BATCH, None, "tensor"), shape, mesh))
    if model.kernel.name == "splash" and rows // parts(mesh, by_row.spec[0]) >= _SUBLANES:
        place = Format(Layout((0, 2, 3, 1, 4)), place)
    fields: Tree = {"k": place, "v": place, "valid": by_row, "length": NamedSharding(mesh, P())}
    return by_row, KVCache(**fields)


def _prefill(static: _Static, variables: Variables, inputs: Inputs) -> tuple[jax.Array, KVCache]:
    slots = inputs.tokens.shape[1] + static.max_new_tokens
    prefilled = static.model.apply(variables, inputs, slots, method="prefill")
    return cast(tuple[jax.Array, KVCache], prefilled)


def _decode(
    static: _Static,
    choice: _Choice,
    variables: Variables,
    hidden: jax.Array,
    cache: KVCache,
    next_position: jax.Array,
    rng: jax.Array,
    row_ids: jax.Array,
) -> tuple[Rollout, KVCache]:
    """Samples from the prompts' last hidden states [B, D], then decodes until all rows end."""
    width = static.max_new_tokens
    # Cast once, outside the loop, or every token would read the weights in their wider type.
    variables = jax.tree.map(lambda leaf: leaf.astype(static.model.dtype), variables)
    layers, split = split_cache(static.model, variables, cache)
    table = head(variables["params"])
    banned = jnp.zeros(table.shape[0], bool).at[choice.banned_ids].set(True)
    uniforms = _uniforms(rng, row_ids, width)

    def choose(hidden: jax.Array, step: jax.Array) -> tuple[jax.Array, jax.Array]:
        # Each row's logits meet on its device: from there on sampling is one device's. First where
        # they are made, or the compiler gathers the table instead, 0.7 GiB a token for 4B.
        scores = constrain(logits(hidden, table), static.model.mesh, BATCH, "tensor")
        scores = constrain(scores, static.model.mesh, BATCH)
        scores = _restrict(jnp.where(banned, -jnp.inf, scores), static, choice)
        if static.greedy:
            tokens = jnp.argmax(scores, axis=-1).astype(jnp.int32)
            # The likeliest token's logit is the largest: its logprob needs no [B, V] of logprobs.
            return tokens, scores.max(axis=-1) - jax.nn.logsumexp(scores, axis=-1)
        logprobs = jax.nn.log_softmax(scores, axis=-1)
        tokens = invert_cdf(logprobs, uniforms[:, step])
        return tokens, jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]

    def write(
        out: Rollout, done: jax.Array, step: jax.Array, hidden: jax.Array
    ) -> tuple[Rollout, jax.Array, jax.Array]:
        tokens, logprobs = choose(hidden, step)
        tokens = jnp.where(done, choice.pad_id, tokens)
        out = dataclasses.replace(
            out,
            tokens=out.tokens.at[:, step].set(tokens),
            mask=out.mask.at[:, step].set(~done),
            logprobs=out.logprobs.at[:, step].set(jnp.where(done, 0.0, logprobs)),
        )
        return out, done | (tokens[:, None] == choice.eos_ids).any(axis=-1), tokens

    def body(state: tuple) -> tuple:
        step, out, done, tokens, cache = state
        hidden, cache = static.model.apply(
            variables, tokens, next_position + step - 1, cache, layers, method="decode"
        )
        out, done, tokens = write(out, done, step, hidden)
        return step + 1, out, done, tokens, cache

    batch = hidden.shape[0]
    empty = Rollout(
        tokens=jnp.full((batch, width), choice.pad_id, jnp.int32),
        mask=jnp.zeros((batch, width), bool),
        logprobs=jnp.zeros((batch, width), jnp.float32),
        truncated=jnp.zeros(batch, bool),
    )
    out, done, tokens = write(empty, empty.truncated, jnp.int32(0), hidden)
    state = (jnp.int32(1), out, done, tokens, split)
    state = jax.lax.while_loop(lambda state: (state[0] < width) & ~state[2].all(), body, state)
    _, out, done, _, split = state
    out = dataclasses.replace(out, truncated=~done)
    return batches.constrain(out, static.model.mesh), join_layers(split)


def _uniforms(rng: jax.Array, row_ids: jax.Array, width: int) -> jax.Array:
    """[B, R] in [0, 1): one key a row, folded with the position in the response."""

    def draw(row_id: jax.Array) -> jax.Array:
        key = jax.random.fold_in(rng, row_id)
        return jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(key, step)))(
            jnp.arange(width)
        )

    return jax.vmap(draw)(row_ids)


def _restrict(scores: jax.Array, static: _Static, choice: _Choice) -> jax.Array:
    """Logits [B, V] with temperature, top-k and top-p applied, in transformers' order."""
    if static.greedy:
        return scores
    scores = scores / choice.temperature
    if static.top_k:
        least = jax.lax.top_k(scores, static.top_k)[0][:, -1:]
        scores = jnp.where(scores >= least, scores, -jnp.inf)
    if static.use_top_p:
        scores = keep_nucleus(scores, choice.top_p)
    return scores


def keep_nucleus(scores: jax.Array, top_p: jax.typing.ArrayLike) -> jax.Array:
    """Logits [B, V] with -inf outside the smallest set of tokens whose mass reaches `top_p`.

    Tokens as probable as the least of the set are in it too. The least probability is found by
    bisection over the bit patterns of the floats in [0, 1], which order as the floats do: 30
    passes of compare-and-add instead of a sort of the vocabulary, and exact.
    """
    probabilities = jax.nn.softmax(scores, axis=-1)

    def halve(_: int, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds  # the mass at or above `low` reaches top_p, that above `high` does not
        middle = low + (high - low) // 2
        least = jax.lax.bitcast_convert_type(middle, jnp.float32)
        mass = jnp.sum(jnp.where(probabilities >= least, probabilities, 0.0), -1, keepdims=True)
        enough = mass >= top_p
        return jnp.where(enough, middle, low), jnp.where(enough, high, middle)

    rows = (*scores.shape[:-1], 1)
    above_one = jax.lax.bitcast_convert_type(jnp.float32(1.0), jnp.int32) + 1
    bounds = (jnp.zeros(rows, jnp.int32), jnp.full(rows, above_one))
    low, _ = jax.lax.fori_loop(0, 30, halve, bounds)
    least = jax.lax.bitcast_convert_type(low, jnp.float32)
    return jnp.where(probabilities >= least, scores, -jnp.inf)


def invert_cdf(logprobs: jax.Array, uniforms: jax.Array) -> jax.Array:
    """Tokens [B] int32 drawn from normalised `logprobs` [B, V] with one uniform [B] a row.

    In two levels, blocks and tokens of a block: a cumulative sum over the whole vocabulary, or a
    Gumbel number for every token of it, costs several times as much.
    """
    block = 128
    batch, vocabulary = logprobs.shape
    probabilities = jnp.pad(jnp.exp(logprobs), ((0, 0), (0, -vocabulary % block)))
    probabilities = probabilities.reshape(batch, -1, block)
    blocks = jnp.cumsum(probabilities.sum(axis=-1), axis=-1)
    target = uniforms * blocks[:, -1]
    chosen = jnp.sum(blocks <= target[:, None], axis=-1)
    chosen = jnp.minimum(chosen, blocks.shape[1] - 1)[:, None]
    before = jnp.where(chosen > 0, jnp.take_along_axis(blocks, chosen - 1, axis=1), 0.0)
    inside = jnp.take_along_axis(probabilities, chosen[..., None], axis=1)[:, 0]
    offset = jnp.sum(jnp.cumsum(inside, axis=-1) <= target[:, None] - before, axis=-1)
    tokens = (chosen[:, 0] * block + offset).astype(jnp.int32)
    # Rounding may step past a block's end, or onto a token of probability 0 (once in some 10^6):
    # take the likeliest token then, never a banned one.
    tokens = jnp.minimum(tokens, vocabulary - 1)
    landed = jnp.take_along_axis(logprobs, tokens[:, None], axis=-1)[:, 0]
    fine = (offset < block) & (landed > -jnp.inf)
    return jnp.where(fine, tokens, jnp.argmax(logprobs, axis=-1).astype(jnp.int32))
