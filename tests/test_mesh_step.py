"""A whole step on a mesh is the step of one device: rollouts, losses, gradients, parameters."""

import dataclasses
from typing import Any

import helpers_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_hlo import collectives_in_loops
from helpers_model import random_params, random_rows, tiny, to_inputs
from jax.sharding import Mesh

from mgsd_jax import config as c
from mgsd_jax.data.batch import Inputs
from mgsd_jax.data.batching import GroundingBatch
from mgsd_jax.model.attention import kernel_for
from mgsd_jax.model.qwen3vl import Qwen3VL, apply_hidden
from mgsd_jax.parallel import batches, sharding
from mgsd_jax.sampling import decoding
from mgsd_jax.sampling.sampler import Rollout, Sampler
from mgsd_jax.stages import distillation_step, grounding, loading
from mgsd_jax.training import lessons, optimizer
from mgsd_jax.weights import table

MESHES = [(1, 8, 1), (1, 4, 2), (1, 2, 4), (2, 2, 2)]  # data, fsdp, tensor
# One layer of either stack; 2 key/value heads, which 4 parts of 'tensor' do not divide.
TOWER = dataclasses.replace(tiny().vision, depth=2, deepstack_visual_indexes=(1,))
CONFIG = dataclasses.replace(tiny(num_hidden_layers=2, num_deepstack=1), vision=TOWER)
BANNED = (CONFIG.image_token_id, CONFIG.video_token_id)
PICTURES = [(2, (4, 4), 3), (5, (2, 4), 2), (4, (2, 2), 6), (3, (4, 2), 1)] * 2
STUDENT = to_inputs(CONFIG, random_rows(CONFIG, PICTURES), side="left", bucket=16)
TEACHER = to_inputs(CONFIG, random_rows(CONFIG, [(7,), (9,), (11,), (5,)] * 2, 1), side="left")
SETTINGS = c.DistillationConfig(optim=c.OptimConfig(lr=1e-3), token_chunk=16)
pytestmark = pytest.mark.slow
eight = pytest.mark.usefixtures("eight_devices")


@pytest.fixture
def eight_devices() -> None:
    helpers_devices.skip_without_devices()


def test_everything_here_with_eight_devices() -> None:
    helpers_devices.run_again(__file__, quick=True)


def parameters(mesh: Mesh | None, seed: int) -> Any:
    host = jax.tree.map(np.asarray, random_params(CONFIG, seed))
    return sharding.place(host, mesh) if mesh else jax.tree.map(jnp.asarray, host)


def mesh_of(sizes: tuple[int, int, int] | None) -> Mesh | None:
    if sizes is None:
        return None
    return sharding.make_mesh(data=sizes[0], fsdp=sizes[1], tensor=sizes[2])


def sample(
    model: Qwen3VL, params: Any, prompts: Inputs, row_ids: Any, draft: Any = None
) -> Rollout:
    """Greedy rollouts of six tokens at most; with a draft, three of its tokens are tried a pass."""
    sampler = Sampler(
        model,
        c.SamplingConfig(6, temperature=0.0, draft_tokens=3),
        eos_ids=(5,),
        banned_ids=BANNED,
        pad_id=0,
    )
    laid = sharding.make_layout(model.mesh, jnp.float32)({"params": params})
    return sampler.rollout(laid, prompts, batches.make_key(0, model.mesh), row_ids, draft)


def distil(
    sizes: tuple[int, int, int] | None,
    microbatches: int = 1,
    rollout_tensor: int = 0,
    *,
    has_options: bool = False,
) -> Any:
    """(greedy rollout, parameters minus their gradient, metrics, statistics) of one step."""
    mesh = mesh_of(sizes)
    model = Qwen3VL(CONFIG, kernel=kernel_for(mesh))
    params, teacher = parameters(mesh, 0), parameters(mesh, 1)
    prompts, row_ids = batches.to_global((STUDENT, np.arange(8, dtype=np.int32)), mesh)
    speaker = loading.for_rollouts(model, c.MeshConfig(rollout_tensor=rollout_tensor))
    sampled = batches.move(sample(speaker, params, prompts, row_ids), mesh)
    batch = distillation_step.DistillationBatch(
        prompts, batches.to_global(TEACHER, mesh), sampled.tokens, sampled.mask
    )
    tx = optax.sgd(1.0)
    state = optimizer.init({"params": params}, tx, mesh)
    settings = dataclasses.replace(SETTINGS, microbatches=microbatches)
    if has_options:  # weights by another board and by outcome, and a reward of success
        settings = dataclasses.replace(
            settings, contrast_cap=2.0, wrong_weight=0.5, success_weight=0.1
        )
        halves = np.arange(8, dtype=np.float32) / 8
        is_sampled, cells = halves > 0.1, np.arange(8, dtype=np.int32) % 2
        found = lessons.Outcomes(halves, np.float32(halves > 0.4), cells, is_sampled)
        other = TEACHER._replace(tokens=TEACHER.tokens[::-1].copy())
        other, found = batches.to_global((other, found), mesh)
        batch = batch._replace(other=other, outcomes=found)
        memory = lessons.Memory(jnp.bool_(True), jnp.ones(2), jnp.ones(2) / 4)
        state = dataclasses.replace(state, memory=sharding.place(memory, mesh))
    update = distillation_step.make_update(model, model, settings, tx, BANNED)
    state, metrics, stats = update(state, {}, teacher, batch)
    return batches.to_every((sampled, state.params, metrics, stats, state.memory), mesh)


def ground(sizes: tuple[int, int, int] | None, microbatches: int) -> Any:
    """(parameters, moments, metrics) after two steps of AdamW."""
    mesh = mesh_of(sizes)
    model = Qwen3VL(CONFIG, kernel=kernel_for(mesh))
    state = optimizer.init({"params": parameters(mesh, 0)}, optax.adamw(1e-4, eps=1e-4), mesh)
    settings = c.GroundingConfig(
        optim=c.OptimConfig(lr=1e-4), token_chunk=32, microbatches=microbatches
    )
    update, validate = grounding.make_update(model, settings, optax.adamw(1e-4, eps=1e-4))
    targets = np.roll(STUDENT.tokens, -1, axis=1)
    batch = batches.to_global(
        GroundingBatch(STUDENT, targets, (targets % 3 > 0).astype(np.float32)), mesh
    )
    for _ in range(2):
        state, metrics = update(state, {}, batch)
    loss = validate(state.params, batch, {})[0]
    return batches.to_every((state, metrics, loss), mesh)


def assert_same(got: Any, want: Any) -> None:
    """Every array within 1e-5 of the largest number in it."""
    for (path, g), w in zip(
        jax.tree_util.tree_leaves_with_path(got), jax.tree.leaves(want), strict=True
    ):
        limit = 1e-5 * max(np.abs(w).max(), 1e-3)
        np.testing.assert_allclose(g, w, rtol=0, atol=limit, err_msg=jax.tree_util.keystr(path))


@pytest.fixture(scope="module")
def one_device() -> Any:
    helpers_devices.skip_without_devices()  # before it compiles for nothing
    return distil(None)


@eight
@pytest.mark.parametrize(("sizes", "rollout_tensor"), [*zip(MESHES, (4, 8, 8, 0), strict=True)])
def test_a_distillation_step(
    sizes: tuple[int, int, int], rollout_tensor: int, one_device: Any
) -> None:
    got = distil(sizes, 2 if sizes == (2, 2, 2) else 1, rollout_tensor)
    np.testing.assert_array_equal(got[0].tokens, one_device[0].tokens)
    assert one_device[0].mask.sum() > 8  # rollouts of more than a token each
    assert_same(got, one_device)


# With the steps above, which have plain rollouts, every layout of 1, 2, 4 and 8 devices a copy.
LAYOUTS = [
    *[((1, 8, 1), count, True) for count in (1, 2, 8)],
    *[(sizes, count, True) for sizes in ((1, 4, 2), (1, 2, 4)) for count in (2, 4, 8)],
    *[(sizes, 1, False) for sizes in ((1, 4, 2), (1, 2, 4))],
]


@eight
@pytest.mark.slow
def test_a_distillation_step_with_options() -> None:
    got, want = (distil(*at, has_options=True) for at in (((2, 2, 2), 2), (None, 1)))
    assert_same(got, want)
    np.testing.assert_allclose(want[4].tried, [0.9 + 3, 0.9 + 4], rtol=1e-6)


@eight
@pytest.mark.parametrize(("sizes", "rollout_tensor", "drafted"), LAYOUTS)
def test_rollouts_in_every_layout(
    sizes: tuple[int, int, int],
    rollout_tensor: int,
    drafted: bool,
    one_device: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Every other row has a right draft, the rest a wrong one; the cache is compacted."""
    want = one_device[0]
    monkeypatch.setattr(decoding, "SPARE_PASSES", 1)
    right = want.mask & (np.arange(8)[:, None] % 2 == 0)
    draft = np.where(right, want.tokens, 7).astype(np.int32) if drafted else None
    mesh = mesh_of(sizes)
    asked = batches.to_global((STUDENT, np.arange(8, dtype=np.int32), draft), mesh)
    model = Qwen3VL(CONFIG, kernel=kernel_for(mesh))
    speaker = loading.for_rollouts(model, c.MeshConfig(rollout_tensor=rollout_tensor))
    got = batches.to_every(sample(speaker, parameters(mesh, 0), *asked), mesh)
    assert got.guessed[::2].any() == drafted and not want.guessed.any()
    for name in ("tokens", "mask", "truncated"):
        np.testing.assert_array_equal(getattr(got, name), getattr(want, name))
    assert_same(got.logprobs, want.logprobs)


@eight
def test_two_grounding_steps() -> None:
    assert_same(ground((2, 2, 2), 2), ground(None, 1))


@eight
def test_weights_travel_and_activations_do_not() -> None:
    """Over fsdp alone, what a turn of the layers' loop moves is a kernel, never rows of tokens."""
    mesh = sharding.make_mesh(fsdp=8)
    config = tiny(hidden_size=64, num_hidden_layers=4, num_deepstack=0)
    model = Qwen3VL(config, remat="full", kernel=kernel_for(mesh))
    params = table.abstract_params(config, "float32")
    params = sharding.abstract(params, sharding.state_shardings(params, mesh))
    rows, length = 8, 512
    inputs = Inputs(
        tokens=jax.ShapeDtypeStruct((rows, length), jnp.int32),
        positions=jax.ShapeDtypeStruct((3, rows, length), jnp.int32),
        valid=jax.ShapeDtypeStruct((rows, length), jnp.bool_),
        next_position=jax.ShapeDtypeStruct((rows,), jnp.int32),
        pictures=None,
    )
    inputs = sharding.abstract(inputs, batches.shardings(inputs, mesh))

    def loss(params: Any, inputs: Inputs) -> jax.Array:
        params = sharding.constrain_state(params, mesh)
        return jnp.square(apply_hidden(model, {"params": params}, inputs)).mean()

    program = jax.jit(jax.grad(loss)).lower(params, inputs).compile()
    mlp = 64 * config.text.intermediate_size
    assert mlp < length * 64  # the kernel is smaller than one row of activations
    assert 0 < max(collectives_in_loops(program.as_text() or "")) <= mlp
