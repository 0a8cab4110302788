"""Every kernel computes what XLA's form does, forward and backward, also over a mesh."""

import functools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import helpers_devices
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers_model import GOLDEN_ROWS, random_params, random_rows, tiny, to_inputs
from helpers_tpu import tpu_mesh

from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.attention import Kernel, attend, kernel_for
from mgsd_jax.model.qwen3vl import Qwen3VL, apply_hidden
from mgsd_jax.model.remat import Remat
from mgsd_jax.parallel import sharding

TESTS = Path(__file__).parent
SPLASH = Kernel("splash", interpret=True)
# Query heads, key/value heads, head width, tokens, causal: the vision towers of 4B and 8B, the
# decoder. 300 tokens are three blocks, 100 are less than one.
SHAPES = {
    "vision_64": (2, 2, 64, 100, False),
    "vision_72": (2, 2, 72, 300, False),
    "text_128": (4, 2, 128, 300, True),
}


def arrays(
    heads: int, groups: int, width: int, length: int, rows: int = 2
) -> tuple[jax.Array, jax.Array, jax.Array, np.ndarray]:
    """Random q, k, v, and which tokens are valid: padding on the left, on the right, on both."""
    rng = np.random.default_rng(0)
    q, k, v = (
        jnp.asarray(rng.standard_normal((rows, length, n, width)), jnp.float32)
        for n in (heads, groups, groups)
    )
    valid = np.ones((rows, length), bool)
    valid[0, : length // 2] = False
    valid[1:, -9:] = False
    valid[2:, :5] = False
    return q, k, v, valid


def output_and_gradients(
    kernel: Kernel, q: jax.Array, k: jax.Array, v: jax.Array, valid: np.ndarray, causal: bool
) -> tuple[jax.Array, ...]:
    """The outputs at valid queries, and the gradients of a random function of them."""
    cotangent = np.random.default_rng(1).standard_normal(q.shape).astype(np.float32)
    cotangent *= valid[:, :, None, None]

    @jax.jit
    def run(*qkv: jax.Array) -> tuple[jax.Array, ...]:
        out, pull = jax.vjp(
            lambda q, k, v: attend(q, k, v, valid=jnp.asarray(valid), causal=causal, kernel=kernel),
            *qkv,
        )
        return (jnp.where(valid[:, :, None, None], out, 0), *pull(cotangent.astype(out.dtype)))

    return run(q, k, v)


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_splash_equals_xla(shape: tuple[int, int, int, int, bool]) -> None:
    """Outputs and the three gradients, within float32 rounding; the kernel runs interpreted.

    A sum of n terms is off by sqrt(n) roundings of 2^-24, in whatever order; n is at most the
    queries that share a key. Ten more are the scores' and their exp's. Both sides round.
    """
    *sizes, causal = shape
    terms = sizes[3] * sizes[0] // sizes[1]
    inputs = arrays(*sizes)
    got = output_and_gradients(SPLASH, *inputs, causal)
    want = output_and_gradients(Kernel(), *inputs, causal)
    for a, b in zip(got, want, strict=True):
        bound = 2 * (np.sqrt(terms) + 10) * 2.0**-24 * np.abs(b).max()
        np.testing.assert_allclose(a, b, rtol=0, atol=bound)


def test_splash_is_finite_where_nothing_is_valid() -> None:
    q, k, v, valid = arrays(2, 2, 64, 128)
    out = attend(q, k, v, valid=jnp.zeros_like(valid), causal=True, kernel=SPLASH)
    assert np.isfinite(out).all()


@pytest.mark.parametrize("causal", [False, True])
def test_cudnn_gets_the_mask_that_xla_has(causal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU: the same call, answered by jax's XLA implementation. In bfloat16."""
    calls = []
    reference = jax.nn.dot_product_attention

    def answer(*args: jax.Array, implementation: str, **options: Any) -> jax.Array:
        calls.append(implementation)
        return reference(*args, implementation="xla", **options)

    monkeypatch.setattr(jax.nn, "dot_product_attention", answer)
    *qkv, valid = arrays(4, 2, 64, 100)
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv)
    kernel = Kernel("cudnn")
    got = output_and_gradients(kernel, q, k, v, valid, causal)
    want = output_and_gradients(Kernel(), q, k, v, valid, causal)
    assert calls == ["cudnn"]
    for a, b in zip(got, want, strict=True):
        a, b = (np.asarray(x, np.float32) for x in (a, b))
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())


def test_cudnn_is_not_asked_for_what_it_cannot_do(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither float32, nor odd lengths, nor head widths that 8 does not divide, nor decoding."""
    monkeypatch.setattr(jax.nn, "dot_product_attention", None)
    *qkv, valid = map(jnp.asarray, arrays(2, 2, 64, 100))
    q, k, v = (x.astype(jnp.bfloat16) for x in qkv)
    kernel = Kernel("cudnn")
    run = functools.partial(attend, causal=False, kernel=kernel)
    run(*qkv, valid=valid)
    run(q[:, 1:], k[:, 1:], v[:, 1:], valid=valid[:, 1:])
    run(q[..., :60], k[..., :60], v[..., :60], valid=valid)
    run(q[:, -1:], k, v, valid=valid)
    with pytest.raises(TypeError):
        run(q, k, v, valid=valid)


def test_kernel_follows_the_devices() -> None:
    assert kernel_for(None) == Kernel("xla")
    mesh = sharding.make_mesh(devices=jax.devices()[:1])
    assert kernel_for(mesh) == Kernel("xla", mesh)
    topology = tpu_mesh("v5e:2x2", fsdp=2, tensor=2)
    assert kernel_for(topology) == Kernel("splash", topology)


ON_EIGHT_DEVICES = """
import jax, numpy as np, test_attention as t
from mgsd_jax.parallel import sharding
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model.attention import Kernel, attend
q, k, v, valid = t.arrays(4, 2, 64, 128, rows=4)
want = t.output_and_gradients(Kernel(), q, k, v, valid, True)
kernel = Kernel("splash", sharding.make_mesh(data=2, fsdp=2, tensor=2), interpret=True)
for a, b in zip(t.output_and_gradients(kernel, q, k, v, valid, True), want, strict=True):
    np.testing.assert_allclose(a, b, atol=1e-5)
# Three rows and one head divide nothing, and are right all the same.
q, k, v, valid = q[:3, :, :1], k[:3, :, :1], v[:3, :, :1], valid[:3]
got = jax.jit(lambda *x: attend(*x, valid=valid, causal=True, kernel=kernel))(q, k, v)
want = attend(q, k, v, valid=valid, causal=True)
np.testing.assert_allclose(got[valid], want[valid], atol=1e-5)
print("equal on", jax.device_count())
"""


def test_splash_equals_xla_over_a_mesh() -> None:
    """Rows over data x fsdp, heads over tensor, on the eight virtual devices of a process."""
    flags = {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": helpers_devices.flags(8)}
    run = subprocess.run(
        [sys.executable, "-c", ON_EIGHT_DEVICES],
        env=os.environ | flags | {"PYTHONPATH": f"{TESTS.parent}:{TESTS}"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert run.stdout == "equal on 8\n", run.stderr


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_splash_compiles_for_a_tpu(shape: tuple[int, int, int, int, bool]) -> None:
    """Forward and backward kernels stand in the program of a v5e, and no [T, S] array does."""
    mesh = tpu_mesh("v5e:2x2", fsdp=2, tensor=2)
    heads, groups, width, _, causal = shape
    length = 1024
    spec = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp"), None, "tensor"))
    rows = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))

    def loss(q: jax.Array, k: jax.Array, v: jax.Array, valid: jax.Array) -> jax.Array:
        out = attend(q, k, v, valid=valid, causal=causal, kernel=kernel_for(mesh))
        return out.astype(jnp.float32).sum()

    shapes = [
        jax.ShapeDtypeStruct((4, length, n, width), jnp.bfloat16, sharding=spec)
        for n in (heads, groups, groups)
    ]
    valid = jax.ShapeDtypeStruct((4, length), bool, sharding=rows)
    program = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(*shapes, valid).compile().as_text()
    assert program is not None and program.count("tpu_custom_call") >= 3  # forward, dq, dk and dv
    assert f"{length},{length}]" not in program


@functools.cache
def remat_gradients(remat: Remat) -> tuple[dict, int]:
    """Gradients of a tiny model, text and vision, and the bytes its program needs for them."""
    config = tiny()
    inputs = to_inputs(config, random_rows(config, GOLDEN_ROWS), side="left")
    model = Qwen3VL(config, remat=remat)

    def loss(params: dict) -> jax.Array:
        return jnp.square(apply_hidden(model, {"params": params}, inputs)).mean()

    program = jax.jit(jax.grad(loss)).lower(random_params(config))
    options: Any = {"xla_backend_optimization_level": 0}  # which plans memory alike
    program = program.compile(options)
    memory = program.memory_analysis()
    assert memory is not None
    return program(random_params(config)), memory.temp_size_in_bytes


@pytest.mark.parametrize("remat", ["full", "save_names", "offload"])
def test_remat_changes_memory_alone(remat: Remat) -> None:
    want, most = remat_gradients("none")
    got, used = remat_gradients(remat)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), got, want)
    assert used < 0.5 * most


def test_saved_names_cost_memory() -> None:
    assert remat_gradients("full")[1] < remat_gradients("save_names")[1]


def test_offloaded_names_lie_in_the_memory_of_the_host() -> None:
    """On a v5e: the scanned layers send what they would save to the host, all but log-sums."""
    mesh = tpu_mesh("v5e:2x2", fsdp=4, tensor=1)
    config = tiny(hidden_size=128, num_hidden_layers=8)
    inputs = to_inputs(config, random_rows(config, [(1000,)] * 4), side="left")
    rows = jax.sharding.NamedSharding(mesh, jax.P(("data", "fsdp")))
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=whole),
        (random_params(config), inputs),
    )
    model = Qwen3VL(config, jnp.bfloat16, "offload", kernel_for(mesh))

    def loss(params: dict, inputs: Inputs) -> jax.Array:
        hidden = model.apply({"params": params}, inputs, method="hidden")
        hidden = jax.lax.with_sharding_constraint(hidden, rows)
        return jnp.square(hidden).mean()

    memory = jax.jit(jax.grad(loss)).lower(*arguments).compile().memory_analysis()
    text = config.text
    heads = 2 * text.num_attention_heads + 2 * text.num_key_value_heads  # q, k, v, output
    sent = text.num_hidden_layers * inputs.tokens.shape[1] * heads * text.head_dim * 2
    assert memory is not None and memory.host_temp_size_in_bytes >= sent
