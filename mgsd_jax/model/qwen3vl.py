"""Qwen3-VL: pictures and tokens to hidden states; prefill and decode over a key/value cache.

Axes: B batch, T tokens, S cache slots, R response tokens, D width, V vocabulary, M pictures a row,
Q merged visual tokens a picture.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype
from jax.sharding import Mesh

from mgsd_jax.data.batch import Inputs, Pictures
from mgsd_jax.model import cpu
from mgsd_jax.model.attention import Kernel
from mgsd_jax.model.cache import KVCache
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.cpu import Cache, Layers
from mgsd_jax.model.layers import Embedding
from mgsd_jax.model.remat import Remat
from mgsd_jax.model.text import STACKS, Decoder
from mgsd_jax.model.vision import VisionTower
from mgsd_jax.parallel.axes import BATCH, constrain
from mgsd_jax.tree import Tree as Params


class Qwen3VL(nn.Module):
    """The model, called inside jit: `model.apply({'params': p}, inputs, method='hidden')`.

    `dtype` is what it computes in, whatever the parameters are stored in. A low-rank adapter is
    read from the optional collection 'adapters'. `kernel` computes attention, on the mesh that it
    names: a program for another mesh takes `model.clone(kernel=kernel_for(mesh))`.
    """

    config: ModelConfig
    dtype: Dtype = jnp.float32
    remat: Remat = "none"
    kernel: Kernel = Kernel()

    def setup(self) -> None:
        config = self.config
        self.visual = VisionTower(config.vision, self.dtype, self.remat, self.kernel)
        self.language = Decoder(
            config.text, config.num_deepstack, self.dtype, self.remat, self.kernel
        )
        if not config.tie_word_embeddings:
            self.lm_head = Embedding(config.text.vocab_size, config.text.hidden_size, self.dtype)

    @property
    def mesh(self) -> Mesh | None:
        """The mesh that it computes on, None on one device."""
        return self.kernel.mesh

    def hidden(self, inputs: Inputs, first: int = 0) -> jax.Array:
        """Hidden states [B, T - first, D] after the final norm, of the tokens from `first` on.

        Padding may be on either side. On a mesh, parameters lie as `sharding.TRAIN_RULES` say; for
        `prefill` and `decode` it is the mesh of rollouts, and `sharding.ROLLOUT_RULES` hold.
        """
        x, deep = self._embed(inputs)
        is_unrolled = self._is_unrolled(self.config.text.num_hidden_layers)
        decoder = self.language.one_by_one if is_unrolled else self.language
        return decoder(x, inputs.positions, inputs.valid, deep, None, first=first)[0]

    def prefill(self, inputs: Inputs, cache_length: int) -> tuple[jax.Array, KVCache]:
        """The last hidden state [B, D] of left-padded prompts, and a cache of `cache_length` slots.

        Slot t holds token t; the slots from T on are for `decode`.
        """
        batch, length = inputs.tokens.shape
        if cache_length < length:
            raise ValueError(f"cache_length: got {cache_length}, want at least {length} (T)")
        text = self.config.text
        shape = (
            text.num_hidden_layers,
            batch,
            cache_length,
            text.num_key_value_heads,
            text.head_dim,
        )
        cache: Cache | None = KVCache(
            k=self._place_cache(jnp.zeros(shape, self.dtype)),
            v=self._place_cache(jnp.zeros(shape, self.dtype)),
            valid=jnp.pad(inputs.valid, ((0, 0), (0, cache_length - length))),
            length=jnp.int32(0),
        )
        x, deep = self._embed(inputs, is_rollout=True)
        x, cache = self.language(x, inputs.positions, inputs.valid, deep, cache)
        assert isinstance(cache, KVCache)
        return x[:, -1], dataclasses.replace(cache, length=jnp.int32(length))

    def decode(
        self,
        tokens: jax.Array,
        positions: jax.Array,
        cache: Cache,
        layers: Layers | None = None,
    ) -> tuple[jax.Array, Cache]:
        """The hidden states [B, W, D] of W more tokens a row, at M-RoPE `positions` [B, W].

        Each sees the valid slots of the cache, and the new tokens up to itself; their slots are
        valid then. A loop may take `cache` and `layers` from `split_cache`.
        """
        slots = jnp.arange(cache.valid.shape[1]) - cache.length
        seen = (slots >= 0) & (slots <= jnp.arange(tokens.shape[1])[:, None])  # [W, S]
        x = self.language.embed(tokens, is_rollout=True)
        decoder = self.language
        if layers is not None:
            decoder = functools.partial(decoder.one_by_one, layers=layers)
        x, after = decoder(
            x,
            constrain(jnp.broadcast_to(positions, (3, *positions.shape)), self.mesh, None, BATCH),
            constrain(cache.valid[:, None] | seen, self.mesh, BATCH),
            None,
            cache,
            decoding=True,
        )
        assert after is not None
        return x, dataclasses.replace(
            after, valid=cache.valid | seen[-1], length=after.length + tokens.shape[1]
        )

    def see(self, pictures: Pictures) -> tuple[jax.Array, jax.Array]:
        """Visual features [B, M * Q, D] and deepstack features [n_ds, B, M * Q, D]."""
        is_unrolled = self._is_unrolled(self.config.vision.depth)
        return (self.visual.one_by_one if is_unrolled else self.visual)(pictures)

    def touch(self, inputs: Inputs) -> None:
        """Visits every parameter once, for initialisation."""
        self.hidden(inputs)
        if not self.config.tie_word_embeddings:
            self.lm_head(inputs.tokens)

    def _is_unrolled(self, layers: int) -> bool:
        """Whether layers run one by one, on a CPU; the variables of a scan are made in a scan."""
        is_plain = self.kernel.is_plain and not self.is_initializing()
        return cpu.is_unrolled(is_plain, self.remat, layers)

    def _place_cache(self, values: jax.Array) -> jax.Array:
        """[L, B, S, K, H] with its rows over 'data' and 'fsdp', its heads over 'tensor'."""
        return constrain(values, self.mesh, None, BATCH, None, "tensor")

    def _embed(
        self, inputs: Inputs, *, is_rollout: bool = False
    ) -> tuple[jax.Array, jax.Array | None]:
        """Embeddings [B, T, D] with visual features in place; deepstack features [n_ds, B, T, D].

        A batch without pictures has no deepstack features: None, and nothing is added.
        """
        x = self.language.embed(inputs.tokens, is_rollout=is_rollout)
        if inputs.pictures is None:
            return x, None
        merged, deep = self.see(inputs.pictures)
        slots = inputs.pictures.slots
        visual = (slots >= 0)[..., None]
        index = jnp.maximum(slots, 0)[..., None]
        merged = constrain(merged, self.mesh, BATCH)
        deep = constrain(deep, self.mesh, None, BATCH)
        x = jnp.where(visual, jnp.take_along_axis(merged, index, axis=1), x)
        return x, jnp.where(visual, jnp.take_along_axis(deep, index[None], axis=2), 0)


def split_cache(model: Qwen3VL, variables: Params, cache: KVCache) -> tuple[Layers | None, Cache]:
    """`layers` and `cache` for a loop of `decode`s; `cpu.join_layers` makes a KVCache again."""
    language = {kind: part.get("language", {}) for kind, part in variables.items()}
    return cpu.split_layers(language, STACKS, cache, model.mesh)


def apply_hidden(model: Qwen3VL, variables: Params, inputs: Inputs, first: int = 0) -> jax.Array:
    """`hidden` of a model under its variables ({'params': ..., 'adapters': ...})."""
    return cast(jax.Array, model.apply(variables, inputs, first, method="hidden"))


def head(params: Params) -> jax.Array:
    """The output table [V, D]: `lm_head`, or the input embedding of a model that ties the two."""
    module = params["lm_head"] if "lm_head" in params else params["language"]["embed_tokens"]
    return module["embedding"]


def logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """Logits [..., V] float32 of `hidden` [..., D] under `head` [V, D]."""
    return jnp.einsum(
        "...D,VD->...V", hidden, head.astype(hidden.dtype), preferred_element_type=jnp.float32
    )


def append_response(inputs: Inputs, response: jax.Array, response_valid: jax.Array) -> Inputs:
    """Left-padded prompts [B, T] with responses [B, R] after them: Inputs of T + R tokens.

    A response continues at the prompt's `next_position`; its tokens are text, whatever their ids.
    `response_valid` [B, R] must be a run of True from the left.
    """
    width = response.shape[1]
    steps = jnp.arange(width, dtype=jnp.int32)
    positions = jnp.broadcast_to(inputs.next_position[:, None] + steps, (3, *response.shape))
    valid = response_valid.astype(bool)
    pictures = inputs.pictures
    if pictures is not None:
        slots = jnp.pad(pictures.slots, ((0, 0), (0, width)), constant_values=-1)
        pictures = pictures._replace(slots=slots)
    return Inputs(
        tokens=jnp.concatenate([inputs.tokens, response.astype(inputs.tokens.dtype)], axis=1),
        positions=jnp.concatenate([inputs.positions, positions], axis=2),
        valid=jnp.concatenate([inputs.valid, valid], axis=1),
        next_position=inputs.next_position + valid.sum(axis=1, dtype=jnp.int32),
        pictures=pictures,
    )


def init_params(config: ModelConfig, rng: jax.Array, dtype: Dtype = jnp.float32) -> Params:
    """Random parameters as a nested dict (normal 0.02, norms 1, biases 0).

    Call under jit with out_shardings to make them where they will live.
    """
    params = Qwen3VL(config).init(rng, _smallest_inputs(config), method="touch")["params"]
    return jax.tree.map(lambda leaf: leaf.astype(dtype), params)


def _smallest_inputs(config: ModelConfig) -> Inputs:
    """One token, which is the one visual token of one picture: enough to shape every parameter."""
    patches = config.vision.merge_unit
    lead = (1, 1, patches)
    token = jnp.zeros((1, 1), jnp.int32)
    return Inputs(
        tokens=token,
        positions=jnp.zeros((3, 1, 1), jnp.int32),
        valid=jnp.ones((1, 1), bool),
        next_position=jnp.ones((1,), jnp.int32),
        pictures=Pictures(
            patches=jnp.zeros((*lead, config.vision.patch_channels)),
            valid=jnp.ones(lead, bool),
            interp_index=jnp.zeros((*lead, 4), jnp.int32),
            interp_weight=jnp.zeros((*lead, 4)),
            coords=jnp.zeros((*lead, 2), jnp.int32),
            slots=token,
        ),
    )
