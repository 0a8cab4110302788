"""Drafted decoding: guess the next tokens of a row, check all of them in one pass of the model.

A pass runs W = K + 1 tokens a row: the last one, and K guesses of those to come. The uniform number
of every place in a response is drawn before the loop, so the token that the model draws at a place
is known as soon as the tokens before it are right: what is kept is what plain decoding draws,
whatever was guessed. A guess costs nothing but arithmetic, and a right one saves a pass.

Worked example, K = 3, `a b c d` guessed after `x`, of which the model draws `a b q`:

    window          x  a  b  c        (the keys of all four are written)
    drawn           a  b  q  .        (each after the tokens to its left)
    kept            a  b  q           (a and b as guessed; q is the model's own next token)
    slots kept      x  a  b           (q's own key is written by the next pass, as x's was here)

The guesses are read off a draft of the whole response, a text that is likely to be near it.

Axes: B rows, W tokens of a pass, K = W - 1 guesses, F tokens of a draft, R response tokens.
"""

import jax
import jax.numpy as jnp

from mgsd_jax.data.batching import NO_TOKEN

_SUFFIX = 4  # as many of the last tokens are looked for in the draft


def guess(draft: jax.Array, pointer: jax.Array, count: int) -> jax.Array:
    """The next `count` tokens [B, K] of each draft [B, F], from `pointer` [B] on."""
    places = pointer[:, None] + jnp.arange(count)
    length = draft.shape[1]
    tokens = jnp.take_along_axis(draft, jnp.clip(places, 0, length - 1), axis=1)
    return jnp.where(places < length, tokens, NO_TOKEN)


def follow(draft: jax.Array, pointer: jax.Array, recent: jax.Array) -> jax.Array:
    """Where in the draft [B] a response goes on whose last tokens are `recent` [B, _SUFFIX].

    Behind the longest run of these last tokens in the draft, of equal ones the nearest to
    `pointer`, where they would end if each had taken the place of one in the draft; there, if the
    draft does not hold even the last one. So one wrong token costs one guess, and a response that
    leaves something out, or goes another way round, is found again. `recent` has the last token
    first, and NO_TOKEN - 1 before the response's beginning.
    """
    length = draft.shape[1]
    padded = jnp.pad(draft, ((0, 0), (_SUFFIX, 0)), constant_values=NO_TOKEN)
    runs = jnp.zeros((draft.shape[0], length + 1), jnp.int32)
    is_run = jnp.ones(runs.shape, bool)
    for i in range(_SUFFIX):
        # Place p goes on behind the draft's tokens p - 1, p - 2, ...
        before = padded[:, _SUFFIX - 1 - i : _SUFFIX + length - i]
        is_run &= before == recent[:, i, None]
        runs += is_run
    far = jnp.abs(jnp.arange(length + 1) - jnp.minimum(pointer, length)[:, None])
    best = jnp.argmax(runs * (length + 1) - far, axis=1)
    return jnp.where(runs.max(axis=1) > 0, best.astype(jnp.int32), pointer)


def last_tokens(tokens: jax.Array, count: jax.Array) -> jax.Array:
    """The last of the `count` [B] tokens of responses [B, R], the very last first: [B, _SUFFIX]."""
    places = count[:, None] - 1 - jnp.arange(_SUFFIX)
    found = jnp.take_along_axis(tokens, jnp.maximum(places, 0), axis=1)
    return jnp.where(places >= 0, found, NO_TOKEN - 1)


def kept(drawn: jax.Array, guessed: jax.Array, ends: jax.Array, room: jax.Array) -> jax.Array:
    """Which of the drawn tokens [B, W] are the row's next ones: a run from the left, bool [B, W].

    Token j is the model's own if the j tokens before it are as guessed [B, K]. Nothing follows a
    token that `ends` [B, W] a row, and `room` [B] tokens fit: 0 for a row that has ended.
    """
    right = jnp.pad(drawn[:, :-1] == guessed, ((0, 0), (1, 0)), constant_values=True)
    goes_on = jnp.pad(~ends[:, :-1], ((0, 0), (1, 0)), constant_values=True)
    is_next = jnp.cumprod((right & goes_on).astype(jnp.int32), axis=1) > 0
    return is_next & (jnp.arange(drawn.shape[1]) < room[:, None])


def put(whole: jax.Array, part: jax.Array, count: jax.Array, taken: jax.Array) -> jax.Array:
    """`whole` [B, R] with the first `taken` [B] of `part` [B, W] from place `count` [B] on."""
    index = jnp.arange(whole.shape[1]) - count[:, None]
    values = jnp.take_along_axis(part, jnp.clip(index, 0, part.shape[1] - 1), axis=1)
    return jnp.where((index >= 0) & (index < taken[:, None]), values, whole)
