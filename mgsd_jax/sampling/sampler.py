"""Rollouts: one jitted prefill, then one jitted decode loop that stops when every row has ended.

Axes: B batch, T prompt tokens, R response tokens, S cache slots, D width, V vocabulary.
"""

import dataclasses
import functools
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.layout import Format, Layout
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.stages import Wrapped

from mgsd_jax.config import SamplingConfig
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.cache import KVCache
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.parallel import batches, sharding
from mgsd_jax.parallel.axes import BATCH, dividing, fit
from mgsd_jax.sampling.decoding import Choice, Rollout, Static, decode
from mgsd_jax.tree import PyTree, Tree

Variables = Tree  # {'params': ..., optionally 'adapters': ...}
Program = tuple[Wrapped, tuple[PyTree, ...]]  # a jitted function, and its arguments


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

        On a mesh `variables` lie as `sharding.make_layout` lays them, `rng` is a key of the model's
        mesh (`batches.make_key`), and the others are global arrays.
        """
        static, draft = self._static(draft)
        # Jax mixes no arrays of two meshes in a program, not even where they lie the same.
        inputs, row_ids, draft = batches.move((inputs, row_ids, draft), self.model.mesh)
        prefill, decode, grow = _compiled(_places(self.model, inputs.tokens.shape[0]))
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
        static, draft = self._static(draft)
        places = _places(self.model, inputs.tokens.shape[0])
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

    def _static(self, draft: PyTree) -> tuple[Static, PyTree]:
        """What selects the program, and the draft if it reads one."""
        sampling = self.sampling
        if not sampling.draft_tokens:
            draft = None
        static = Static(
            self.model,
            max_new_tokens=sampling.max_new_tokens,
            window=1 if draft is None else 1 + sampling.draft_tokens,
            greedy=sampling.temperature == 0,
            top_k=min(sampling.top_k, self.model.config.text.vocab_size),
            use_top_p=sampling.top_p < 1,
        )
        return static, draft

    @property
    def _choice(self) -> Choice:
        return Choice(
            eos_ids=np.asarray(self.eos_ids, np.int32),
            banned_ids=np.asarray(self.banned_ids, np.int32),
            pad_id=np.int32(self.pad_id),
            temperature=np.float32(self.sampling.temperature),
            top_p=np.float32(self.sampling.top_p),
        )


@functools.cache
def _compiled(places: PyTree) -> tuple[Wrapped, Wrapped, Wrapped]:
    """(prefill, decode, grow), jitted; the last hidden states and the cache lie as `places` say.

    The cache is returned, although nothing may read it: XLA refuses to reuse a donated buffer that
    has no output to go to, and would hold the cache twice.
    """
    return (
        jax.jit(_prefill, static_argnums=(0, 1), out_shardings=places),
        jax.jit(
            decode,
            static_argnums=(0, 1),
            donate_argnames="cache",
            out_shardings=None if places is None else (None, places[1]),
        ),
        jax.jit(_grow, static_argnums=1, out_shardings=None if places is None else places[1]),
    )


def _places(model: Qwen3VL, rows: int) -> PyTree:
    """Where the last hidden states and the cache lie between prefill and decode; None: anywhere.

    On a TPU the loop wants slots beside widths, [L, B, K, S, H] in memory: handed over in another
    layout, the cache would be copied on the way in and on the way out, and be there twice.
    """
    mesh, text = model.mesh, model.config.text
    if mesh is None:
        return None
    by_row = NamedSharding(mesh, P(dividing(mesh, BATCH, rows)))
    shape = (text.num_hidden_layers, rows, 1, text.num_key_value_heads, text.head_dim)
    place: PyTree = NamedSharding(mesh, fit(P(None, BATCH, None, "tensor"), shape, mesh))
    if model.kernel.name == "splash":
        place = Format(Layout((0, 1, 3, 2, 4)), place)
    fields: Tree = {"k": place, "v": place, "valid": by_row, "length": NamedSharding(mesh, P())}
    return by_row, KVCache(**fields)


def _prefill(
    static: Static, slots: int, variables: Variables, inputs: Inputs
) -> tuple[jax.Array, KVCache]:
    prefilled = static.model.apply(variables, inputs, slots, method="prefill")
    return cast(tuple[jax.Array, KVCache], prefilled)


def _grow(cache: KVCache, slots: int) -> KVCache:
    """The cache with empty slots behind its own."""
    more = ((0, 0), (0, slots - cache.valid.shape[1]))
    k, v = (jnp.pad(x, ((0, 0), *more, (0, 0), (0, 0))) for x in (cache.k, cache.v))
    return dataclasses.replace(cache, k=k, v=v, valid=jnp.pad(cache.valid, more))
