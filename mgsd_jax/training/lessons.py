"""What the rows of an update learn from, and what their tokens weigh.

Axes: B rollouts, R response tokens.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from mgsd_jax.config import DistillationConfig
from mgsd_jax.data import loaders
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.batching import References
from mgsd_jax.sampling.sampler import Rollout
from mgsd_jax.tree import PyTree


def with_references(sampled: Rollout, references: References | None) -> Rollout:
    """The responses to learn from: references where a row has one.

    Only their tokens and mask: logprobs and truncated stay those of what was sampled.
    """
    if references is None:
        return sampled
    has_one = references.mask[:, :1]
    return dataclasses.replace(
        sampled,
        tokens=jnp.where(has_one, references.tokens, sampled.tokens),
        mask=jnp.where(has_one, references.mask, sampled.mask),
    )


def token_weights(groups: np.ndarray, settings: DistillationConfig) -> np.ndarray | None:
    """Weights [B, R] of the tokens by the `segments.segments` that they are in; None: all 1."""
    if not settings.token_weights:
        return None
    table = dict.fromkeys(prompts_lib.SEGMENTS, 1.0) | dict(settings.token_weights)
    return np.array([*table.values(), 0.0], np.float32)[groups]  # group -1: no token


def response_bucket(longest: int, settings: DistillationConfig) -> int:
    """The smallest of `response_buckets` that holds responses of so many tokens, else R."""
    fitting = [size for size in settings.response_buckets if size >= longest]
    return min([*fitting, settings.sampling.max_new_tokens])


def first_tokens(rollout: PyTree, length: int) -> PyTree:
    """The Rollout cut to its first `length` places, which hold all of its tokens."""
    return jax.tree.map(lambda leaf: leaf[:, :length] if leaf.ndim == 2 else leaf, rollout)


def is_sampled(mask: np.ndarray, prompts: loaders.PromptRows) -> np.ndarray:
    """The mask without the rows that learn from a reference."""
    references = prompts.batch.references
    return mask if references is None else mask & ~references.mask[:, :1]
