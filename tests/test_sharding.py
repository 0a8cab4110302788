"""Meshes, parameter rules and global batches, on one device and on eight virtual ones."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import helpers_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers_model import tiny
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from mgsd_jax import tree
from mgsd_jax.config import LoraConfig, MeshConfig
from mgsd_jax.data.batch import Inputs, Pictures
from mgsd_jax.model import lora
from mgsd_jax.model.config import ModelConfig, TextConfig, VisionConfig
from mgsd_jax.parallel import axes, batches, sharding
from mgsd_jax.training import optimizer
from mgsd_jax.weights import files, hf, table

CONFIG = tiny(num_hidden_layers=4, tie_word_embeddings=False)
MESHES = [
    {"data": 1, "fsdp": -1, "tensor": 1},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"data": -1, "fsdp": 1, "tensor": 1},
    {"data": 1, "fsdp": 2, "tensor": 4},
]
eight = pytest.mark.usefixtures("eight_devices")


@pytest.fixture
def eight_devices() -> None:
    helpers_devices.skip_without_devices()


def abstract_mesh(*sizes: int) -> Any:
    """A mesh of devices that are not here: the rules read its sizes alone."""
    return jax.sharding.AbstractMesh(sizes, axes.AXES)


def released(
    hidden: int, mlp: int, layers: int, heads: int, vision: tuple[int, int, int]
) -> ModelConfig:
    """A released size; `vision` is depth, width and MLP width. All share the vocabulary."""
    text = TextConfig(151_936, hidden, mlp, layers, heads, 8, 128, 5e6)
    depth, width, vision_mlp = vision
    tower = VisionConfig(depth, width, vision_mlp, 16, hidden, (5, 11, 17))
    return ModelConfig(text, tower, tie_word_embeddings=False)


RELEASED = {
    "2b": released(2048, 6144, 28, 16, (24, 1024, 4096)),
    "4b": released(2560, 9728, 36, 32, (24, 1024, 4096)),
    "8b": released(4096, 12_288, 36, 32, (27, 1152, 4304)),
    "32b": released(5120, 25_600, 64, 64, (27, 1152, 4304)),
}


def random_params(seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return tree.map_named(
        lambda _, leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32),
        table.abstract_params(CONFIG, "float32"),
    )


def batch(rows: int) -> Inputs:
    lead = (rows, 2, 8)
    rng = np.random.default_rng(0)
    pictures = Pictures(
        patches=rng.random((*lead, 12), np.float32),
        valid=np.ones(lead, bool),
        interp_index=np.zeros((*lead, 4), np.int32),
        interp_weight=np.zeros((*lead, 4), np.float32),
        coords=np.zeros((*lead, 2), np.int32),
        slots=np.full((rows, 5), -1, np.int32),
    )
    tokens = np.arange(rows * 5, dtype=np.int32).reshape(rows, 5)
    positions = np.stack([tokens, tokens + 1, tokens + 2])
    return Inputs(tokens, positions, tokens > 3, np.arange(rows, dtype=np.int32), pictures)


def test_everything_here_with_eight_devices() -> None:
    helpers_devices.run_again(__file__, quick=True)


def test_mesh_over_all_devices() -> None:
    mesh = sharding.make_mesh()
    assert mesh.axis_names == ("data", "fsdp", "tensor")
    assert mesh.axis_types == (AxisType.Auto,) * 3
    assert dict(mesh.shape) == {"data": 1, "fsdp": jax.device_count(), "tensor": 1}
    assert dict(sharding.make_mesh(devices=jax.devices()[:1]).shape)["fsdp"] == 1


@eight
@pytest.mark.parametrize("sizes", MESHES)
def test_mesh_sizes(sizes: dict[str, Any]) -> None:
    shape = dict(sharding.make_mesh(**sizes).shape)
    assert np.prod(list(shape.values())) == 8
    assert all(shape[name] == size for name, size in sizes.items() if size != -1)


@pytest.mark.parametrize(
    "sizes",
    [
        {"fsdp": 3},
        {"data": -1, "fsdp": -1},
        {"data": 0},
        {"tensor": 16},
        {"data": -2},
        {"data": 3, "fsdp": -1},
    ],
)
def test_bad_mesh_sizes(sizes: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"mesh .*: want sizes of at least 1 that multiply to"):
        sharding.make_mesh(**sizes)


@pytest.mark.parametrize(
    ("count", "data", "want"),
    [
        (1, 1, (1, 1)),
        (2, 1, (1, 2)),
        (4, 1, (1, 4)),
        (6, 1, (3, 2)),
        (8, 1, (2, 4)),
        (8, 4, (1, 2)),
    ],
)
def test_sizes_that_fit_themselves(
    count: int, data: int, want: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where fsdp and tensor both are -1, tensor is 4, or 2 or 1 where 4 does not divide."""
    made: list[tuple[int, ...]] = []
    monkeypatch.setattr(jax, "make_mesh", lambda sizes, *_, **__: made.append(tuple(sizes)))
    sharding.make_mesh(data=data, fsdp=-1, tensor=-1, devices=[None] * count)
    assert made == [(data, *want)]


@pytest.mark.parametrize("name", RELEASED)
def test_rules_cover_the_released_models(name: str) -> None:
    """Every leaf has a rule, every kernel and table is split, and all sizes divide on 64 chips."""
    mesh = abstract_mesh(2, 8, 4)
    params = table.abstract_params(RELEASED[name], "float32")
    placed = dict(tree.named_leaves(sharding.state_shardings(params, mesh)))
    for path, leaf in tree.named_leaves(params):
        is_large = leaf.size > 1_000_000
        is_split = "fsdp" in str(placed[path].spec)
        assert is_split or not is_large, path
    spec = LoraConfig(16, 16.0, "")
    adapters = jax.eval_shape(lambda: lora.init_adapters(params, spec, jax.random.key(0)))
    sharding.state_shardings(adapters, mesh)


def test_rules_split_the_right_axes() -> None:
    mesh = sharding.make_mesh()
    params = table.abstract_params(CONFIG, "float32")
    spec = LoraConfig(4, 8.0, "")
    adapters = jax.eval_shape(lambda: lora.init_adapters(params, spec, jax.random.key(0)))
    # trainers keep both under one roof: the rules hold below a prefix too
    placed = dict(
        tree.named_leaves(sharding.state_shardings({"params": params, "adapters": adapters}, mesh))
    )
    for path, want in {
        "params/language/embed_tokens/embedding": P(("fsdp", "tensor")),
        "params/lm_head/embedding": P(("fsdp", "tensor")),
        "params/language/layers/self_attn/q_proj/kernel": P(None, "fsdp", "tensor"),
        "params/language/layers_deepstack/self_attn/o_proj/kernel": P(None, "tensor", "fsdp"),
        "params/language/layers/mlp/down_proj/kernel": P(None, "tensor", "fsdp"),
        "params/visual/blocks/attn/qkv/kernel": P(None, "fsdp", "tensor"),
        "params/visual/blocks/attn/proj/kernel": P(None, "tensor", "fsdp"),
        "params/visual/merger/linear_fc1/kernel": P("fsdp", "tensor"),
        "params/visual/deepstack_mergers/linear_fc2/kernel": P(None, "tensor", "fsdp"),
        "params/visual/patch_embed/kernel": P(None, "fsdp"),
        "params/language/norm/scale": P(),
        "adapters/language/layers/self_attn/q_proj/a": P(None, "fsdp"),
        "adapters/language/layers/self_attn/q_proj/b": P(None, None, "fsdp"),
        "adapters/language/layers/self_attn/q_proj/scale": P(),
        "adapters/visual/merger/linear_fc1/a": P(),
    }.items():
        assert placed[path].spec == want, path


def test_a_parameter_without_a_rule_is_an_error() -> None:
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match="no rule matches 'visual/novelty/kernel'"):
        sharding.state_shardings({"visual": {"novelty": {"kernel": jnp.ones((2, 2))}}}, mesh)


def test_sizes_that_do_not_divide_are_copied() -> None:
    """A dimension keeps the first of its axes as long as they divide it, and the others go."""
    mesh = abstract_mesh(1, 4, 2)
    params = {
        "lm_head": {"embedding": jax.ShapeDtypeStruct((12, 8), jnp.float32)},
        "visual": {"patch_embed": {"kernel": jax.ShapeDtypeStruct((8, 9), jnp.float32)}},
        "language": {"layers": {"q_proj": {"kernel": jax.ShapeDtypeStruct((2, 6, 4), "float32")}}},
    }
    placed = dict(tree.named_leaves(sharding.state_shardings(params, mesh)))
    assert placed["lm_head/embedding"].spec == P(("fsdp",))
    assert placed["visual/patch_embed/kernel"].spec == P(None, None)
    assert placed["language/layers/q_proj/kernel"].spec == P(None, None, "tensor")
    one = abstract_mesh(1, 1, 1)
    want = sharding.state_shardings(params, one)["lm_head"]["embedding"]
    assert want.spec == P(axes.MODEL)


def test_too_few_dimensions_are_all_listed() -> None:
    mesh = abstract_mesh(1, 8, 1)
    flat = jax.ShapeDtypeStruct((8,), jnp.float32)
    params = {name: {"q_proj": {"kernel": flat}} for name in ("one", "two")}
    with pytest.raises(ValueError, match="do not fit the rules") as caught:
        sharding.state_shardings(params, mesh)
    for name in params:
        assert f"{name}/q_proj/kernel: got shape [8], want one to fit" in str(caught.value)


@eight
def test_the_mesh_of_rollouts_has_the_same_devices_in_their_order() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    for rollout_tensor, sizes in {0: (4, 1, 2), 1: (8, 1, 1), 2: (4, 1, 2), -1: (2, 2, 2)}.items():
        found = sharding.rollout_mesh(mesh, rollout_tensor)
        assert found is not None and found.devices.shape == sizes
        assert found.axis_names == mesh.axis_names and found.axis_types == mesh.axis_types
        assert found.devices.ravel().tolist() == mesh.devices.ravel().tolist()
    for sizes, usual in {(1, 2, 4): (2, 1, 4), (1, 4, 2): (2, 2, 2), (2, 4, 1): (4, 2, 1)}.items():
        data, fsdp, tensor = sizes
        of = sharding.make_mesh(data=data, fsdp=fsdp, tensor=tensor)
        found = sharding.rollout_mesh(of, -2)
        assert found is not None and found.devices.shape == usual
    six = sharding.make_mesh(tensor=1, devices=jax.devices()[:6])
    found = sharding.rollout_mesh(six, -2)
    assert found is not None and found.devices.shape == (3, 2, 1)
    for rollout_tensor in (3, 8):  # 8 devices, but a copy would lie across 'data'
        with pytest.raises(
            ValueError, match=rf"rollout_tensor: got {rollout_tensor}, want .* of 4"
        ):
            sharding.rollout_mesh(mesh, rollout_tensor)
        with pytest.raises(ValueError, match="rollout_tensor"):
            sharding.open_mesh(MeshConfig(2, 2, 2, rollout_tensor))
    rows = np.arange(8, dtype=np.int32)
    finer = batches.to_global(rows, sharding.rollout_mesh(mesh, 1))
    moved: Any = batches.move(finer, mesh)
    there: Any = batches.to_global(rows, mesh)
    assert moved.sharding.is_equivalent_to(there.sharding, 1)
    np.testing.assert_array_equal(moved, rows)


def test_rollouts_copy_the_tower_and_the_keys_alone_over_fsdp() -> None:
    """Every parameter and adapter has a rule, and no weight would be gathered for each token."""
    mesh = abstract_mesh(2, 8, 4)
    for config in RELEASED.values():
        params = table.abstract_params(config, "bfloat16")
        spec = LoraConfig(16, 16.0, "")
        adapters = jax.eval_shape(
            lambda p=params, s=spec: lora.init_adapters(p, s, jax.random.key(0))
        )
        variables = {"params": params, "adapters": adapters}
        placed = tree.named_leaves(
            sharding.state_shardings(variables, mesh, sharding.ROLLOUT_RULES)
        )
        for path, where in placed:
            assert "data" not in str(where.spec), path
            is_split = re.search(r"language/.*kernel|embedding$", path) and "visual" not in path
            if is_split:
                assert "tensor" in str(where.spec), path
            is_copied = not is_split or re.search("/[kv]_proj/", path)
            assert ("fsdp" in str(where.spec)) == (not is_copied), path


def test_one_device_needs_no_mesh() -> None:
    one = jax.devices()[:1]
    assert sharding.open_mesh(MeshConfig(), one) is None
    for every in (-1, -2):
        assert sharding.open_mesh(MeshConfig(rollout_tensor=every), one) is None
    assert sharding.rollout_mesh(None, 0) is sharding.rollout_mesh(None, 1) is None
    with pytest.raises(ValueError, match=r"mesh\.rollout_tensor: got 2, want .*divisor of 1"):
        sharding.open_mesh(MeshConfig(rollout_tensor=2), one)
    with pytest.raises(ValueError, match=r"mesh .*want sizes"):
        sharding.open_mesh(MeshConfig(tensor=2), one)
    host = batch(3)
    assert batches.to_global(host, None) is host
    variables = {"params": random_params()}
    assert sharding.make_layout(None, jnp.bfloat16)(variables) is variables
    assert batches.process_share(None) == (0, 1)


def test_a_batch_that_does_not_split_is_refused() -> None:
    mesh = abstract_mesh(2, 4, 1)
    batches.check_batch(mesh, "x", 32, 4)
    batches.check_batch(None, "x", 7)
    with pytest.raises(
        ValueError, match=r"grounding\.batch_size: got 24 rows, want a multiple of 16"
    ):
        batches.check_batch(mesh, "grounding.batch_size", 24, 2)


@eight
def test_rollout_layout_casts_and_keeps_what_is_read_in_float32() -> None:
    mesh = sharding.make_mesh(data=1, fsdp=4, tensor=2)
    params = sharding.place(random_params(), mesh)
    laid = sharding.make_layout(mesh, jnp.bfloat16)({"params": params})
    want = sharding.state_shardings({"params": params}, mesh, sharding.ROLLOUT_RULES)
    wide = []
    for path, leaf in tree.named_leaves(laid):
        assert leaf.sharding.is_equivalent_to(tree.get(want, path), leaf.ndim), path
        given = tree.get({"params": params}, path)
        np.testing.assert_array_equal(leaf, given.astype(leaf.dtype))
        wide += [path] if leaf.dtype == jnp.float32 else []
    assert wide and all("norm" in path or "pos_embed" in path for path in wide)
    assert all(path.startswith("params/visual/") for path in wide)


@eight
def test_moments_lie_as_their_parameters_do() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    trained = sharding.place({"params": random_params()}, mesh)
    state = optimizer.init(trained, optax.adamw(1e-3), mesh)
    adam: Any = state.opt_state
    moments = adam[0]
    for path, leaf in tree.named_leaves(trained):
        for moment in (moments.mu, moments.nu):
            same = tree.get(moment, path)
            assert same.sharding.is_equivalent_to(leaf.sharding, leaf.ndim), path
    assert state.step.sharding.is_fully_replicated
    assert jax.tree.map(jnp.shape, state) == jax.tree.map(
        jnp.shape, optimizer.init(random_params_under("params"), optax.adamw(1e-3))
    )


def random_params_under(name: str) -> dict:
    return {name: random_params()}


@eight
@pytest.mark.parametrize("sizes", MESHES)
def test_local_rows_come_back(sizes: dict[str, Any]) -> None:
    mesh = sharding.make_mesh(**sizes)
    host = batch(8)
    placed = batches.to_global(host, mesh)
    for got in (batches.to_local(placed), batches.to_every(placed, mesh)):
        jax.tree.map(np.testing.assert_array_equal, got, host)
    whole = batches.to_global(host, mesh, is_whole=True)
    jax.tree.map(np.testing.assert_array_equal, whole, host)


class FakeDevice(NamedTuple):
    process_index: int


@pytest.mark.parametrize(
    ("shape", "processes", "want"),
    [
        ((1, 8, 1), [0] * 8, 1),
        ((1, 8, 1), [0, 0, 0, 0, 1, 1, 1, 1], 2),
        ((1, 4, 2), [0, 0, 1, 1, 2, 2, 3, 3], 4),
        # a row of 'tensor' over two processes: both read the same rows of the batch
        ((1, 4, 2), [0, 1, 0, 1, 2, 3, 2, 3], 2),
        ((2, 2, 2), [0, 0, 0, 0, 1, 1, 1, 1], 2),
        ((1, 1, 8), [0, 0, 0, 0, 1, 1, 1, 1], 1),
    ],
)
def test_shares_of_processes(shape: tuple[int, ...], processes: list[int], want: int) -> None:
    devices = np.empty(len(processes), object)
    devices[:] = [FakeDevice(index) for index in processes]
    mesh: Any = SimpleNamespace(
        devices=devices.reshape(shape), shape=dict(zip(axes.AXES, shape, strict=True))
    )
    assert batches.process_share(mesh) == (0, want)


def test_processes_whose_rows_overlap_are_refused() -> None:
    devices = np.empty(8, object)
    devices[:] = [FakeDevice(index) for index in (0, 0, 0, 1, 1, 1, 2, 2)]
    mesh: Any = SimpleNamespace(
        devices=devices.reshape(1, 4, 2), shape={"data": 1, "fsdp": 4, "tensor": 2}
    )
    with pytest.raises(ValueError, match="want equal runs"):
        batches.process_share(mesh)


def test_global_batches_keep_their_values() -> None:
    mesh = sharding.make_mesh()
    host = batch(8)
    got = batches.to_global(host, mesh)
    assert isinstance(got, Inputs)
    jax.tree.map(np.testing.assert_array_equal, got, host)
    assert [x.dtype for x in jax.tree.leaves(got)] == [x.dtype for x in jax.tree.leaves(host)]
    assert batches.to_global(host._replace(pictures=None), mesh).pictures is None
    assert batches.to_global({"count": np.int32(3)}, mesh)["count"] == 3


@eight
@pytest.mark.parametrize("sizes", MESHES)
def test_global_batches_split_their_rows(sizes: dict[str, Any]) -> None:
    mesh = sharding.make_mesh(**sizes)
    parts = mesh.shape["data"] * mesh.shape["fsdp"]
    host = batch(8)
    got = batches.to_global(host, mesh)
    assert got.pictures is not None
    jax.tree.map(np.testing.assert_array_equal, got, host)
    for value, axis in ((got.tokens, 0), (got.positions, 1), (got.pictures.patches, 0)):
        want = list(value.shape)
        want[axis] //= parts
        assert {shard.data.shape for shard in value.addressable_shards} == {tuple(want)}


@eight
def test_rows_that_do_not_divide() -> None:
    mesh = sharding.make_mesh()
    with pytest.raises(ValueError, match=r"batch tokens: got 6 rows .* want a multiple of 8"):
        batches.to_global(batch(6), mesh)


class Recorder:
    """A safetensors file that counts the bytes that are read from it."""

    def __init__(self, handle: Any, log: dict[str, int]) -> None:
        self.handle, self.log = handle, log

    def keys(self) -> Any:
        return self.handle.keys()

    def get_slice(self, name: str) -> Any:
        part, log = self.handle.get_slice(name), self.log

        class Slice:
            get_shape, get_dtype = part.get_shape, part.get_dtype

            def __getitem__(self, index: Any) -> np.ndarray:
                value = part[index]
                log[name] = log.get(name, 0) + value.nbytes
                return value

        return Slice()


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    hf.save_params(random_params(), CONFIG, tmp_path, dtype="float32", max_shard_bytes=50_000)
    return tmp_path


@eight
@pytest.mark.parametrize("sizes", MESHES)
def test_loading_reads_each_byte_once_onto_its_shard(
    sizes: dict[str, Any], saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log: dict[str, int] = {}
    open_tensors = files.open_tensors
    monkeypatch.setattr(files, "open_tensors", lambda path: Recorder(open_tensors(path), log))
    mesh = sharding.make_mesh(**sizes)
    placed = sharding.state_shardings(table.abstract_params(CONFIG, "float32"), mesh)
    params = hf.load_params(saved, CONFIG, dtype="float32", shardings=placed)
    jax.tree.map(np.testing.assert_array_equal, params, random_params())
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == placed
    total = sum(leaf.nbytes for leaf in jax.tree.leaves(params))
    convolution = 4 * 96 * 32
    # the flattened channels of the convolution cannot be sliced in the file
    assert total <= sum(log.values()) <= total + 7 * convolution


@eight
@pytest.mark.parametrize("sizes", MESHES[:2])
def test_saving_sharded_parameters(sizes: dict[str, Any], saved: Path, tmp_path: Path) -> None:
    mesh = sharding.make_mesh(**sizes)
    placed = sharding.state_shardings(table.abstract_params(CONFIG, "float32"), mesh)
    params = jax.device_put(random_params(), placed)
    hf.save_params(params, CONFIG, tmp_path / "out", dtype="float32", max_shard_bytes=50_000)
    for file in sorted((tmp_path / "out").iterdir()):
        assert file.read_bytes() == (saved / file.name).read_bytes()


@eight
def test_merging_keeps_the_sharding() -> None:
    mesh = sharding.make_mesh(data=2, fsdp=2, tensor=2)
    params, spec = random_params(), LoraConfig(4, 8.0, "")
    adapters = tree.map_named(
        lambda _, leaf: leaf + 0.1, lora.init_adapters(params, spec, jax.random.key(0))
    )
    want = lora.merge(params, adapters)
    placed = sharding.state_shardings(params, mesh)
    got = lora.merge(
        jax.device_put(params, placed),
        jax.device_put(adapters, sharding.state_shardings(adapters, mesh)),
    )
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), got, want)
    for path, leaf in tree.named_leaves(got):
        sharded = tree.get(placed, path)
        assert isinstance(leaf.sharding, NamedSharding)
        assert leaf.sharding.is_equivalent_to(sharded, leaf.ndim), path


TWO_PROCESSES = """
import sys
import jax
jax.distributed.initialize(sys.argv[2], num_processes=2, process_id=int(sys.argv[1]))
import numpy as np
from test_sharding import CONFIG, Recorder, batch, random_params
from mgsd_jax.parallel import batches, sharding
from mgsd_jax.weights import files, hf, table
folder = sys.argv[3]
mesh = sharding.make_mesh()
assert mesh.devices.size == 4 and jax.local_device_count() == 2
placed = sharding.state_shardings(table.abstract_params(CONFIG, "float32"), mesh)
log, open_tensors = {}, files.open_tensors
files.open_tensors = lambda path: Recorder(open_tensors(path), log)
params = hf.load_params(folder, CONFIG, dtype="float32", shardings=placed)
files.open_tensors = open_tensors
own = sum(
    sum({str(shard.index): shard.data.nbytes for shard in leaf.addressable_shards}.values())
    for leaf in jax.tree.leaves(params)
)
convolution = 4 * 96 * 32  # whole for each of the two devices: its channels cannot be sliced
assert own <= sum(log.values()) <= own + 2 * convolution, (own, log)
assert own < 0.6 * sum(leaf.nbytes for leaf in jax.tree.leaves(params)), own
for ours, want in zip(jax.tree.leaves(params), jax.tree.leaves(random_params()), strict=True):
    for shard in ours.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index])
rank, host = jax.process_index(), batch(8)
rows = slice(4 * rank, 4 * rank + 4)
mine = (host.tokens[rows], {"positions": host.positions[:, rows]})
tokens, positions = batches.to_global(mine, mesh)
assert tokens.shape == (8, 5) and positions["positions"].shape == (3, 8, 5)
for value, want in ((tokens, host.tokens), (positions["positions"], host.positions)):
    for shard in value.addressable_shards:
        np.testing.assert_array_equal(shard.data, want[shard.index])
"""


@pytest.mark.slow
def test_two_processes_share_one_model(saved: Path) -> None:
    """Each reads the bytes of its own slices."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    tests = Path(__file__).parent
    env = os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": helpers_devices.flags(2),
        "PYTHONPATH": f"{tests.parent}{os.pathsep}{tests}",
    }
    started = [
        subprocess.Popen(
            [sys.executable, "-c", TWO_PROCESSES, str(rank), address, str(saved)],
            env=env,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    errors = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], "".join(errors)[-4000:]
