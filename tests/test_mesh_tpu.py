"""Losses and rollouts of 4B and 8B as the TPU compiler makes them: what they hold and send."""

import re
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from helpers_hlo import collectives_in_loops
from helpers_tpu import tpu_mesh
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsd_jax import config as c
from mgsd_jax.command_line import load_config
from mgsd_jax.parallel import axes
from mgsd_jax.preflight import programs
from mgsd_jax.training import losses

VOCABULARY, CHUNK = 151_936, 2048
TOKENS = 16_384  # a chip
WIDTHS = {"4b": 2560, "8b": 4096}
MESHES = {"fsdp": {"fsdp": 16}, "recipe": {"fsdp": 4, "tensor": 4}}
pytestmark = pytest.mark.slow


def compiled(width: int, mesh: Mesh) -> Any:
    """Reverse KL and both gradients: float32 student head, bfloat16 teacher and hidden states."""

    def shaped(shape: tuple[int, ...], dtype: Any, *spec: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, P(*spec)))

    tokens = TOKENS * mesh.size
    hidden = shaped((tokens, width), jnp.bfloat16, axes.BATCH)
    student_head = shaped((VOCABULARY, width), jnp.float32, axes.MODEL)
    teacher_head = shaped((VOCABULARY, width), jnp.bfloat16, axes.MODEL)
    weights = shaped((tokens,), jnp.float32, axes.BATCH)
    targets = shaped((tokens,), jnp.int32, axes.BATCH)
    settings = c.DistillationConfig(c.OptimConfig(lr=0.0), token_chunk=CHUNK)

    def loss(student: Any, head: Any, teacher: Any, teacher_head: Any, *rest: Any) -> Any:
        weights, targets, vocab_mask = rest
        return losses.distill(
            student,
            head,
            teacher,
            teacher_head,
            weights,
            settings=settings,
            targets=targets,
            vocab_mask=vocab_mask,
            mesh=mesh,
        )

    program = jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))
    mask = shaped((VOCABULARY,), jnp.bool_)
    arguments = (hidden, student_head, hidden, teacher_head, weights, targets, mask)
    return program.lower(*arguments).compile()


@pytest.mark.parametrize("mesh", MESHES)
@pytest.mark.parametrize("model", WIDTHS)
def test_reverse_kl_on_sixteen_chips(model: str, mesh: str) -> None:
    width = WIDTHS[model]
    program = compiled(width, tpu_mesh("v5e:4x4", **MESHES[mesh]))
    # a chunk of hidden states and sums a token: not a part of a head, [V / 16, D], let alone all
    assert 0 < max(collectives_in_loops(program.as_text())) <= CHUNK * width
    assert program.memory_analysis().temp_size_in_bytes <= 0.25e9


def test_a_rollout_over_sixteen_chips_moves_no_weight_and_no_cache() -> None:
    """A layer of a pass: two sums over all chips, and rows of heads that change places, twice."""
    rows, responses = 32, 1024
    config = load_config(
        "configs/qwen3vl.py:4b",
        (
            "mesh.rollout_tensor=-1",
            "preflight.stages=('distillation',)",
            "data.prompt_buckets=(384,)",
            "distillation.sampling.draft_tokens=0",
            f"distillation.sampling.max_new_tokens={responses}",
        ),
    )
    mesh = tpu_mesh("v5e:4x4", **MESHES["recipe"])
    found = {p.name: p for p in programs.programs_of(config, mesh)}
    hlo = found["distillation/decode"].lower().compile().as_text() or ""
    # all rows' part of the logits: less than a layer's keys of one chip, or a gathered kernel
    assert 0 < max(collectives_in_loops(hlo)) <= rows * VOCABULARY // 16 < 2560 * 4096 // 4
    layers = re.findall(
        r"^.* (all-[\w-]+)\(.*/self_attn/.*$|^.* (all-[\w-]+)\(.*/mlp/.*$", hlo, re.M
    )
    assert sorted(map("".join, layers)) == ["all-reduce"] * 4 + ["all-to-all"] * 4  # of two stacks


@pytest.mark.parametrize("how", ["gathered", "reduced"])
def test_a_head_that_travels_in_a_loop_is_seen(how: str) -> None:
    """The guard above, on loops that do what it forbids."""
    mesh, width = tpu_mesh("v5e:4x4", fsdp=16), 2560

    def turn(_: Any, state: Any) -> Any:
        hidden, head = state  # [C, D], [V / 16, D]
        if how == "gathered":
            whole = jax.lax.all_gather(head, "fsdp", tiled=True)
            return jnp.tanh(hidden @ whole.T) @ whole, head
        logits = jnp.tanh(hidden @ head.T)
        return hidden + logits @ head, head + jax.lax.psum(logits.T @ hidden, "fsdp")

    def loop(hidden: Any, head: Any) -> Any:
        return jax.lax.fori_loop(0, 4, turn, (hidden, head))

    by_row = P("fsdp")
    split = jax.shard_map(
        loop, mesh=mesh, in_specs=(by_row, by_row), out_specs=by_row, check_vma=False
    )
    shapes = (CHUNK * mesh.size, width), (VOCABULARY, width)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=NamedSharding(mesh, by_row))
        for shape in shapes
    ]
    program = jax.jit(split).lower(*arguments).compile()
    least = VOCABULARY * width // (1 if how == "gathered" else mesh.size)
    assert max(collectives_in_loops(program.as_text() or "")) >= least > CHUNK * width
