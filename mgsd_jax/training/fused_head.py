"""A per-token loss fused with the output head: values, statistics and gradients in one pass.

Axes: N tokens of all rows together, C tokens of a chunk, V vocabulary, D model width. Tokens that
are not counted are left out first, so padding costs no head matmul; the others are taken
`token_chunk` at a time, and their gradient is formed in the same pass as their loss: four head
matmuls instead of six, no logits kept for the backward pass, and no array of [N, V] at any time.

On a mesh the vocabulary is split over axes.MODEL and stays where it is; what moves is a chunk of
hidden states to all parts of the vocabulary, a handful of sums a token, and the chunk's gradient
back: 6 C D numbers, where gathering the head would move V D. The rows of 'data' meet only in the
head's gradient, once. Left to itself the compiler gathers [V, D] in every turn of the loop.
"""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.custom_derivatives import CustomVJPPrimal, SymbolicZero
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mgsd_jax.model import cpu
from mgsd_jax.parallel import axes
from mgsd_jax.training.divergences import Shard
from mgsd_jax.tree import PyTree

# (shard, logits [C, V], rows, shared) -> (loss [C], statistics of [C], gradient [C, V])
ChunkLoss = Callable[[Shard, jax.Array, PyTree, PyTree], tuple[jax.Array, PyTree, jax.Array]]


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def fused_loss(
    chunk_loss: ChunkLoss,
    token_chunk: int,
    mesh: Mesh | None,
    hidden: jax.Array,
    head: jax.Array,
    weights: jax.Array,
    counted: jax.Array,
    rows: PyTree,
    shared: PyTree,
) -> tuple[jax.Array, PyTree]:
    """(sum_t w_t L_t float32, statistics [N] of every token, 0 where it is not counted).

    At most token_chunk tokens' logits are held at once. hidden [N, D], head [V, D], weights [N],
    counted [N] bool (every token of weight != 0 is); rows, a pytree of [N, ...], and shared, a
    pytree of [V, ...], are what chunk_loss needs besides the logits. Gradients go to hidden and
    head, each formed only where it is asked for; statistics carry none.
    """
    arrays = (hidden, head, weights, counted, rows, shared)
    primals = jax.tree.map(lambda x: CustomVJPPrimal(x, False), arrays)
    return _forward(chunk_loss, token_chunk, mesh, *primals)[0]


def _forward(
    chunk_loss: ChunkLoss, token_chunk: int, mesh: Mesh | None, *primals: PyTree
) -> tuple[tuple[jax.Array, PyTree], tuple[jax.Array | None, jax.Array | None]]:
    """((loss, statistics), (gradient of hidden, gradient of head)), None where not wanted."""
    wanted = (primals[0].perturbed, primals[1].perturbed)
    hidden, head, weights, counted, rows, shared = jax.tree.map(
        lambda x: x.value, primals, is_leaf=lambda x: isinstance(x, CustomVJPPrimal)
    )
    run = partial(_run_part, chunk_loss, token_chunk, wanted)
    tokens = (hidden, weights.astype(jnp.float32), counted, rows)
    if mesh is None:
        loss, stats, gradients = run(_Split(), tokens, head, shared)
        return (loss, stats), gradients
    split = _Split(axes.BATCH, axes.dividing(mesh, axes.MODEL, head.shape[0]))
    total = hidden.shape[0]
    spare = -total % axes.parts(mesh, axes.BATCH)
    if spare:
        tokens = jax.tree.map(lambda x: jnp.pad(x, [(0, spare)] + [(0, 0)] * (x.ndim - 1)), tokens)
    by_token, by_word = P(split.tokens), P(split.vocabulary or None)
    loss, stats, (d_hidden, d_head) = jax.shard_map(
        partial(run, split),
        mesh=mesh,
        in_specs=(by_token, by_word, by_word),
        out_specs=(P(), by_token, (by_token, by_word)),
        check_vma=False,  # _Split says what varies over which axis, so not every zero has to
    )(tokens, head, shared)
    stats, d_hidden = jax.tree.map(lambda x: x[:total], (stats, d_hidden))
    return (loss, stats), (d_hidden, d_head)


def _backward(
    _: ChunkLoss, __: int, ___: Mesh | None, gradients: PyTree, cotangents: tuple[PyTree, PyTree]
) -> tuple[PyTree, ...]:
    scale = cotangents[0]  # the statistics carry no gradient
    if isinstance(scale, SymbolicZero):
        return (None,) * 6
    scaled = jax.tree.map(lambda g: (g * scale).astype(g.dtype), gradients)
    return (*scaled, None, None, None, None)


fused_loss.defvjp(_forward, _backward, symbolic_zeros=True)


def head_logits(hidden: jax.Array, head: jax.Array) -> jax.Array:
    """[N, V] float32: the accumulator itself, not rounded to the inputs' dtype."""
    return _matmul("ND,VD->NV", hidden, head)


@dataclasses.dataclass(frozen=True)
class _Split:
    """The mesh axes that split tokens, and those that split the vocabulary; () on one device."""

    tokens: tuple[str, ...] = ()
    vocabulary: tuple[str, ...] = ()

    @property
    def gathered(self) -> tuple[str, ...]:
        """Mesh axes that split tokens and vocabulary: each token meets all parts of it there."""
        return tuple(axis for axis in self.tokens if axis in self.vocabulary)

    @property
    def copies(self) -> tuple[str, ...]:
        """Mesh axes that split tokens but not the vocabulary: the head's gradient is summed."""
        return tuple(axis for axis in self.tokens if axis not in self.vocabulary)


def _run_part(
    chunk_loss: ChunkLoss,
    token_chunk: int,
    wanted: tuple[bool, bool],
    split: _Split,
    tokens: tuple[jax.Array, jax.Array, jax.Array, PyTree],
    head: jax.Array,
    shared: PyTree,
) -> tuple[jax.Array, PyTree, tuple[jax.Array | None, jax.Array | None]]:
    """(loss, statistics, gradients) of the tokens and the part of the head on one device."""
    hidden, weights, counted, rows = tokens
    kernel = head.astype(hidden.dtype)  # a float32 master head computes in the hidden's dtype
    packing, trips = _pack(counted, token_chunk, split)
    head_parts = 1 if split.tokens else cpu.head_parts(head.shape[0])

    def body(i: jax.Array, state: PyTree) -> PyTree:
        d_hidden, d_head, packed = state
        index, (chunk_hidden, chunk_weights, chunk_rows) = packing.pick(i, (hidden, weights, rows))
        logits = head_logits(chunk_hidden, kernel)
        loss, stats, d_logits = chunk_loss(Shard(split.vocabulary), logits, chunk_rows, shared)
        # Selects and not products: a row counted for its statistics alone may hold a NaN.
        live = (chunk_weights != 0)[:, None]
        loss = jnp.where(live[:, 0], loss * chunk_weights, 0.0)
        d_logits = jnp.where(live, d_logits * chunk_weights[:, None], 0.0).astype(hidden.dtype)
        if d_hidden is not None:
            part = _sum_over(_matmul("NV,VD->ND", d_logits, kernel), split.vocabulary)
            if split.vocabulary:  # or the compiler rounds before it sums
                part = jax.lax.optimization_barrier(part)
            # Straight to their rows: packed first, all of [N, D] would be held twice.
            d_hidden = d_hidden.at[index].set(part.astype(hidden.dtype), mode="drop")
        if d_head is not None:
            d_head = _add_product(d_head, d_logits, jnp.where(live, chunk_hidden, 0), head_parts)
        return d_hidden, d_head, packing.put(i, packed, (loss, stats))

    d_hidden = jnp.zeros_like(hidden) if wanted[0] else None
    d_head = jnp.zeros(head.shape, jnp.float32) if wanted[1] else None
    # Without an array to put them into, the body returns a chunk's outputs themselves.
    outputs = jax.eval_shape(body, jnp.int32(0), (d_hidden, d_head, None))[2]
    state = (d_hidden, d_head, packing.zeros(outputs))
    d_hidden, d_head, packed = jax.lax.fori_loop(0, trips, body, state)
    loss, stats = packing.unpack(packed)
    loss = _sum_over(jnp.sum(loss), split.tokens)
    if d_head is not None:
        d_head = _sum_over(d_head, split.copies).astype(head.dtype)
    return loss, stats, (d_hidden, d_head)


@dataclasses.dataclass(frozen=True)
class _Packing:
    """How the counted rows of all devices along `gathered` are taken `chunk` at a time.

    Counted rows are numbered (their rank) through these devices in order, and turn i of the loop
    takes the ranks i * chunk and following, wherever they are: the loop is as long as the number of
    counted rows, not N, asks for. Each device gives the rows it has and zeros for the others, the
    sum over devices is the chunk, and each takes back the outputs of its own rows. Rows that are
    not counted are never read.

    An example: 2 devices of 3 rows each, chunk 4, all counted but row 1 of the first (`own` is 3):

        device  first  rank_of_row  rows of ranks 0-3  rows of ranks 4-7
        0       0      0 none 1     0 2 none none      none none none none
        1       2      0 1 2        none none 0 1      2 none none none

    A device's window into its own ranks starts at i * chunk - first, here 0 and 4, -2 and 2: it may
    hang over on either side, so `row_of_rank` has room for a chunk before and after. There and
    where there is no row, it holds `own`, which is out of range: reads fill, writes are dropped.
    """

    chunk: int
    gathered: tuple[str, ...]
    first: jax.Array  # [] the number of counted rows on the devices before this one
    counted: jax.Array  # [own] bool
    rank_of_row: jax.Array  # [own] among the counted rows of this device; out of range elsewhere
    row_of_rank: jax.Array  # [chunk + own + chunk] its inverse; `own` where there is none

    def pick(self, i: jax.Array, rows: PyTree) -> tuple[jax.Array, PyTree]:
        """(this device's rows [C] of turn i, `own` where another has them; the chunk's values)."""
        index = jax.lax.dynamic_slice_in_dim(self.row_of_rank, self._start(i), self.chunk)
        mine = jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), rows)
        return index, jax.tree.map(lambda x: _sum_over(x, self.gathered), mine)

    def zeros(self, outputs: PyTree) -> PyTree:
        """Room for outputs, which are [C, ...] for every chunk, by rank as `row_of_rank`."""
        size = self.row_of_rank.size
        return jax.tree.map(lambda x: jnp.zeros((size, *x.shape[1:]), x.dtype), outputs)

    def put(self, i: jax.Array, packed: PyTree, outputs: PyTree) -> PyTree:
        """`packed` with the outputs of turn i; the outputs themselves where packed is None."""
        if packed is None:
            return outputs
        put = partial(jax.lax.dynamic_update_slice_in_dim, start_index=self._start(i), axis=0)
        return jax.tree.map(put, packed, outputs)

    def unpack(self, packed: PyTree) -> PyTree:
        """Outputs of this device's rows [own, ...], 0 where they are not counted."""
        index = jnp.where(self.counted, self.rank_of_row + self.chunk, self.row_of_rank.size)
        return jax.tree.map(lambda x: x.at[index].get(mode="fill", fill_value=0), packed)

    def _start(self, i: jax.Array) -> jax.Array:
        own = self.counted.size
        return jnp.clip(i * self.chunk - self.first, -self.chunk, own) + self.chunk


def _pack(counted: jax.Array, token_chunk: int, split: _Split) -> tuple[_Packing, jax.Array]:
    """The packing of counted rows [own], and the number of turns that their loop takes."""
    own, gathered = counted.size, split.gathered
    chunk = min(token_chunk, own * (jax.lax.axis_size(gathered) if gathered else 1))
    rank_of_row = jnp.where(counted, jnp.cumsum(counted) - 1, own + chunk)
    row_of_rank = jnp.full(own + 2 * chunk, own)
    row_of_rank = row_of_rank.at[rank_of_row + chunk].set(jnp.arange(own), mode="drop")
    first, total = jnp.int32(0), jnp.sum(counted)
    if gathered:
        counts = jax.lax.all_gather(total, gathered)
        is_before = jnp.arange(counts.size) < jax.lax.axis_index(gathered)
        first, total = jnp.sum(jnp.where(is_before, counts, 0)), jnp.sum(counts)
    trips = (total + chunk - 1) // chunk
    if split.copies:  # their loops hold no common sum, but one program runs them all
        trips = jax.lax.pmax(trips, split.copies)
    return _Packing(chunk, gathered, first, counted, rank_of_row, row_of_rank), trips


def _sum_over(x: jax.Array, names: tuple[str, ...]) -> jax.Array:
    return jax.lax.psum(x, names) if names else x


def _add_product(total: jax.Array, a: jax.Array, b: jax.Array, parts: int) -> jax.Array:
    """total [V, D] + a [C, V]^T b [C, D], a part of V at a time."""
    size = total.shape[0] // parts

    def add(i: jax.Array, total: jax.Array) -> jax.Array:
        columns = jax.lax.dynamic_slice_in_dim(a, i * size, size, axis=1)
        rows = jax.lax.dynamic_slice_in_dim(total, i * size, size)
        rows += _matmul("CV,CD->VD", columns, b)
        return jax.lax.dynamic_update_slice_in_dim(total, rows, i * size, axis=0)

    return jax.lax.fori_loop(0, parts, add, total) if parts > 1 else add(jnp.int32(0), total)


def _matmul(spec: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(spec, a, b, preferred_element_type=jnp.float32)
