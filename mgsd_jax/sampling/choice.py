"""One token out of logits: bans, temperature, top-k, top-p, and a draw by one uniform number.

Axes: B rows, R response tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp


def uniforms(rng: jax.Array, row_ids: jax.Array, width: int) -> jax.Array:
    """[B, R] in [0, 1): one key a row, folded with the position in the response."""

    def draw(row_id: jax.Array) -> jax.Array:
        key = jax.random.fold_in(rng, row_id)
        return jax.vmap(lambda step: jax.random.uniform(jax.random.fold_in(key, step)))(
            jnp.arange(width)
        )

    return jax.vmap(draw)(row_ids)


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
