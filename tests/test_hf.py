"""Weights in and out of Hugging Face folders: names, values, streaming, bad input."""

import json
import os
import re
import resource
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from helpers_model import tiny
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

from mgsd_jax import tree
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import init_params
from mgsd_jax.weights import files, hf, table
from mgsd_jax.weights.files import FloatType

torch = pytest.importorskip("torch")
import helpers_hf  # noqa: E402
import safetensors.torch  # noqa: E402
from transformers import Qwen3VLForConditionalGeneration  # noqa: E402

CONFIGS = {
    "tied": tiny(),
    "untied": tiny(num_hidden_layers=4, num_key_value_heads=1, tie_word_embeddings=False),
    "every_layer_deepstack": tiny(num_deepstack=3),
    "no_deepstack": tiny(num_deepstack=0),
}
GATE = "model.language_model.layers.0.mlp.gate_proj.weight"
SHARDS = 40_000  # bytes: a few files for a tiny model


def assert_same_tree(got: dict, want: dict) -> None:
    """Same paths, and equal in every bit."""
    got_leaves, want_leaves = dict(tree.named_leaves(got)), dict(tree.named_leaves(want))
    assert got_leaves.keys() == want_leaves.keys()
    for path, leaf in got_leaves.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(want_leaves[path]), path)


def tensors(folder: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    for file in sorted(folder.glob("*.safetensors")):
        loaded = load_file(file)
        assert not found.keys() & loaded.keys()
        found |= loaded
    return found


def random_params(config: ModelConfig, dtype: str = "float32", seed: int = 0) -> dict:
    rng = np.random.default_rng(seed)
    return tree.map_named(
        lambda _, leaf: jnp.asarray(rng.standard_normal(leaf.shape), dtype),
        table.abstract_params(config, "float32"),
    )


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of the tied tiny model in several shards."""
    folder = tmp_path_factory.mktemp("saved")
    hf.save_params(random_params(CONFIGS["tied"]), CONFIGS["tied"], folder, max_shard_bytes=SHARDS)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of `saved` to spoil."""
    return Path(shutil.copytree(saved, tmp_path / "weights"))


@pytest.mark.parametrize("name", CONFIGS)
def test_table_lists_every_parameter_of_the_model(name: str) -> None:
    config = CONFIGS[name]
    want = jax.eval_shape(lambda: init_params(config, jax.random.key(0)))
    got = table.abstract_params(config, "float32")
    assert tree.named_leaves(got) == tree.named_leaves(want)
    names = [name for leaf in table.leaves(config) for name in leaf.names]
    assert len(names) == len(set(names))


@pytest.mark.parametrize("max_shard_size", ["5GB", "60KB"])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_equals_a_second_mapping(name: str, max_shard_size: str, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = helpers_hf.make_model(config)
    model.save_pretrained(tmp_path, max_shard_size=max_shard_size)
    assert hf.read_config(tmp_path) == config
    got = hf.load_params(tmp_path, config, dtype="float32")
    assert_same_tree(got, helpers_hf.to_params(model, config))


@pytest.mark.parametrize("max_shard_bytes", [5e9, SHARDS])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", CONFIGS)
def test_import_of_export_is_identity(
    name: str, dtype: FloatType, max_shard_bytes: float, tmp_path: Path
) -> None:
    config, params = CONFIGS[name], random_params(CONFIGS[name], dtype)
    hf.save_params(params, config, tmp_path, dtype=dtype, max_shard_bytes=max_shard_bytes)
    back = hf.load_params(tmp_path, config, dtype=dtype)
    assert_same_tree(back, params)
    assert {leaf.dtype for leaf in jax.tree.leaves(back)} == {jnp.dtype(dtype)}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_export_of_import_is_identity(name: str, dtype: FloatType, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = helpers_hf.make_model(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    params = hf.load_params(tmp_path / "theirs", config, dtype=dtype)
    hf.save_params(params, config, tmp_path / "ours", dtype=dtype, max_shard_bytes=SHARDS)
    ours, theirs = tensors(tmp_path / "ours"), tensors(tmp_path / "theirs")
    assert ours.keys() == theirs.keys()
    for key, value in ours.items():
        assert value.dtype == theirs[key].dtype
        assert value.shape == theirs[key].shape
        assert value.tobytes() == theirs[key].tobytes()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["tied", "untied"])
def test_transformers_loads_the_export(name: str, dtype: FloatType, tmp_path: Path) -> None:
    config = CONFIGS[name]
    model = helpers_hf.make_model(config).to(getattr(torch, dtype))
    model.save_pretrained(tmp_path / "theirs")
    params = hf.load_params(tmp_path / "theirs", config, dtype=dtype)
    hf.save_params(params, config, tmp_path / "ours", dtype=dtype, max_shard_bytes=SHARDS)
    (tmp_path / "ours" / "config.json").write_text(json.dumps(config.to_hf()))
    loaded: Any = Qwen3VLForConditionalGeneration.from_pretrained(
        tmp_path / "ours", dtype=dtype, output_loading_info=True
    )
    again, info = loaded
    assert not any(info.values()), info
    # loaded like ours: `to` has also rounded the RoPE frequencies of `model`
    before = Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "theirs", dtype=dtype)
    tokens = torch.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(again(input_ids=tokens).logits, before(input_ids=tokens).logits)


def test_casts_round_to_nearest(tmp_path: Path) -> None:
    config, params = CONFIGS["tied"], random_params(CONFIGS["tied"])
    hf.save_params(params, config, tmp_path, dtype="float32")
    rounded = jax.tree.map(lambda leaf: np.asarray(leaf).astype(ml_dtypes.bfloat16), params)
    assert_same_tree(hf.load_params(tmp_path, config, dtype="bfloat16"), rounded)
    hf.save_params(params, config, tmp_path, dtype="bfloat16")
    wide = jax.tree.map(lambda leaf: leaf.astype(np.float32), rounded)
    assert_same_tree(hf.load_params(tmp_path, config, dtype="float32"), wide)


def test_shards_and_index(saved: Path) -> None:
    index = json.loads((saved / hf.INDEX_FILE).read_text())
    shards = sorted(file.name for file in saved.glob("*.safetensors"))
    count = len(shards)
    assert count > 2
    assert shards == [f"model-{i + 1:05d}-of-{count:05d}.safetensors" for i in range(count)]
    sizes = 0
    for shard in shards:
        with safe_open(saved / shard, framework="np") as file:
            assert file.metadata() == {"format": "pt"}
            assert set(file.keys()) == {k for k, v in index["weight_map"].items() if v == shard}
        loaded = load_file(saved / shard)
        size = sum(value.nbytes for value in loaded.values())
        assert size <= SHARDS or len(loaded) == 1
        sizes += size
    assert index["metadata"]["total_size"] == sizes
    assert "lm_head.weight" not in index["weight_map"]


@settings(max_examples=30, deadline=None)
@given(limit=st.integers(1, 300_000))
def test_every_tensor_is_in_one_shard_of_at_most_the_limit(limit: int) -> None:
    config = CONFIGS["untied"]
    shards = hf._plan_shards(config, "bfloat16", limit)
    planned = [tensor.name for shard in shards.values() for tensor in shard]
    assert planned == [name for leaf in table.leaves(config) for name in leaf.names]
    for shard in shards.values():
        assert len(shard) == 1 or sum(tensor.nbytes for tensor in shard) <= limit


def test_saving_again_replaces_the_weights(folder: Path) -> None:
    config, params = CONFIGS["tied"], random_params(CONFIGS["tied"], seed=1)
    hf.save_params(params, config, folder, dtype="float32")
    assert [file.name for file in folder.iterdir()] == [hf.SINGLE_FILE]
    assert_same_tree(hf.load_params(folder, config, dtype="float32"), params)


def test_writing_holds_one_shard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every shard is written before a tensor of the next one is fetched."""
    made, written = [], []
    make, write = hf._to_hf, files.write_tensors

    def counting_make(params: dict, tensor: hf.Tensor, dtype: files.FloatType) -> np.ndarray:
        made.append(tensor.name)
        return make(params, tensor, dtype)

    def checking_write(path: Path, tensors: dict[str, np.ndarray]) -> None:
        written.extend(tensors)
        assert made == written
        assert len(tensors) == 1 or sum(x.nbytes for x in tensors.values()) <= SHARDS
        write(path, tensors)

    monkeypatch.setattr(hf, "_to_hf", counting_make)
    monkeypatch.setattr(files, "write_tensors", checking_write)
    params = random_params(CONFIGS["tied"])
    hf.save_params(params, CONFIGS["tied"], tmp_path, max_shard_bytes=SHARDS)
    assert sorted(written) == sorted(tensors(tmp_path))


# Bad input: each of these spoils a good folder and names what the message must hold.


def rewrite(folder: Path, change: Callable[[dict[str, np.ndarray]], object]) -> str:
    """Change the file that holds GATE; returns its name."""
    index = json.loads((folder / hf.INDEX_FILE).read_text())
    name = index["weight_map"][GATE]
    loaded = load_file(folder / name)
    change(loaded)
    save_file(loaded, folder / name, metadata={"format": "pt"})
    return name


def drop_tensor(folder: Path) -> list[str]:
    name = rewrite(folder, lambda loaded: loaded.pop(GATE))
    return [name, GATE, "not found, although"]


def add_tensor(folder: Path) -> list[str]:
    name = rewrite(folder, lambda loaded: loaded.update(extra=np.zeros(2, np.float32)))
    return [name, "extra", "does not place there"]


def reshape_tensor(folder: Path) -> list[str]:
    rewrite(folder, lambda loaded: loaded.update({GATE: loaded[GATE].T.copy()}))
    return [GATE, "got BF16[32, 64], want", "[64, 32]"]


def integer_tensor(folder: Path) -> list[str]:
    rewrite(folder, lambda loaded: loaded.update({GATE: np.zeros((64, 32), np.int8)}))
    return [GATE, "got I8[64, 32], want F32|BF16"]


def truncate_file(folder: Path) -> list[str]:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(shard.read_bytes()[:-7])
    return [shard.name, "corrupt or truncated"]


def garble_header(folder: Path) -> list[str]:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(b"\xff" * 64 + shard.read_bytes()[64:])
    return [shard.name, "corrupt or truncated"]


def empty_file(folder: Path) -> list[str]:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.write_bytes(b"")
    return [shard.name, "of 0 bytes"]


def drop_file(folder: Path) -> list[str]:
    shard = sorted(folder.glob("*.safetensors"))[1]
    shard.unlink()
    return [shard.name, "not found"]


def drop_index(folder: Path) -> list[str]:
    (folder / hf.INDEX_FILE).unlink()
    return [str(folder), "got neither model.safetensors nor model.safetensors.index.json"]


def garble_index(folder: Path) -> list[str]:
    (folder / hf.INDEX_FILE).write_text("{")
    return [hf.INDEX_FILE, "got no valid JSON"]


def index_without_map(folder: Path) -> list[str]:
    (folder / hf.INDEX_FILE).write_text("{}")
    return [hf.INDEX_FILE, "weight_map: got None"]


def index_names_an_unknown_tensor(folder: Path) -> list[str]:
    index = json.loads((folder / hf.INDEX_FILE).read_text())
    index["weight_map"]["ghost"] = index["weight_map"][GATE]
    (folder / hf.INDEX_FILE).write_text(json.dumps(index))
    return [index["weight_map"][GATE], "ghost: not found, although"]


def index_leaves_the_folder(folder: Path) -> list[str]:
    index = json.loads((folder / hf.INDEX_FILE).read_text())
    index["weight_map"][GATE] = "../elsewhere.safetensors"
    (folder / hf.INDEX_FILE).write_text(json.dumps(index))
    return [GATE, "got '../elsewhere.safetensors', want the name of a file beside it"]


@pytest.mark.parametrize(
    "spoil",
    [
        drop_tensor,
        add_tensor,
        reshape_tensor,
        integer_tensor,
        truncate_file,
        garble_header,
        empty_file,
        drop_file,
        drop_index,
        garble_index,
        index_without_map,
        index_names_an_unknown_tensor,
        index_leaves_the_folder,
    ],
)
def test_one_message_for_each_bad_folder(spoil: Callable[[Path], list[str]], folder: Path) -> None:
    wanted = spoil(folder)
    with pytest.raises(ValueError, match="do not fit the config") as caught:
        hf.load_params(folder, CONFIGS["tied"], dtype="float32")
    message = str(caught.value)
    assert all(part in message for part in wanted), message
    # the cause alone, not once more for every tensor of a lost file
    assert re.search(r", [1-3] problems?:", message), message


def test_all_problems_are_in_one_message(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    hf.save_params(random_params(config), config, tmp_path)
    loaded = load_file(tmp_path / hf.SINGLE_FILE)
    del loaded["model.language_model.norm.weight"]
    loaded["model.visual.patch_embed.proj.weight"] = np.zeros((1, 2), np.float32)
    loaded[GATE] = np.zeros((64, 32), np.int32)
    loaded["surprise"] = np.zeros(1, np.float32)
    save_file(loaded, tmp_path / hf.SINGLE_FILE)
    with pytest.raises(ValueError, match="4 problems") as caught:
        hf.load_params(tmp_path, config, dtype="float32")
    for part in ("norm.weight: not found", "[1, 2], want", "I32[64, 32]", "surprise: got a tensor"):
        assert part in str(caught.value)


FOREIGN = {
    "fp8": (lambda name: name + "_scale_inv", "weights quantised to FP8; take the release"),
    "gptq": (lambda name: name.replace(".weight", ".qweight"), "quantised by AWQ or GPTQ"),
    "bitsandbytes": (lambda name: name + ".absmax", "quantised by bitsandbytes"),
    "bitsandbytes 4": (lambda name: name + ".quant_state.bitsandbytes__nf4", "by bitsandbytes"),
    "compressed": (lambda name: name + "_packed", "weights of compressed-tensors"),
    "peft": (lambda name: f"base_model.model.{name}", "its PEFT adapters around it; merge them"),
    "peft inside": (lambda name: name.replace(".weight", ".base_layer.weight"), "PEFT adapters"),
    "old decoder": (lambda name: name.replace("language_model.", ""), "older names of a decoder"),
    "old tower": (lambda _: "visual.blocks.0.norm1.weight", "older names of a vision tower"),
    "compiled": (lambda name: f"_orig_mod.{name}", "saved inside a wrapper"),
    "experts": (lambda name: name.replace("gate_proj", "experts.0.gate_proj"), "mixture of exp"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_weights_of_another_kind_are_one_line(name: str, tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    rename, wanted = FOREIGN[name]
    is_whole = name in ("peft", "compiled")  # every tensor is renamed, else some kernels
    hf.save_params(random_params(config), config, tmp_path)
    loaded = load_file(tmp_path / hf.SINGLE_FILE)
    for key in [key for key in loaded if is_whole or "gate_proj" in key]:
        loaded[rename(key)] = loaded.pop(key)
    save_file(loaded, tmp_path / hf.SINGLE_FILE)
    with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
        hf.load_params(tmp_path, config, dtype="float32")
    assert str(caught.value).startswith(f"{tmp_path}: got the tensor ")
    assert "\n" not in str(caught.value)


def test_fp8_without_scales_is_one_line(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    hf.save_params(random_params(config), config, tmp_path)
    with safe_open(tmp_path / hf.SINGLE_FILE, framework="pt") as file:
        loaded = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    loaded[GATE] = loaded[GATE].to(torch.float8_e4m3fn)
    safetensors.torch.save_file(loaded, tmp_path / hf.SINGLE_FILE)
    with pytest.raises(ValueError, match=r"gate_proj.weight in FP8, want float weights; take"):
        hf.load_params(tmp_path, config, dtype="float32")


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.gguf", "adapter_model.safetensors"])
def test_weights_in_other_files_are_named(name: str, tmp_path: Path) -> None:
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"\(but {name}, which is not read\), want one of them"):
        hf.load_params(tmp_path, CONFIGS["tied"], dtype="float32")


def test_problems_of_one_cause_are_cut_after_ten(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    hf.save_params(random_params(config), config, tmp_path)
    loaded = load_file(tmp_path / hf.SINGLE_FILE)
    layers = [key for key in loaded if ".layers." in key]
    for key in layers:
        del loaded[key]
    loaded |= {f"extra.{i}": np.zeros(2, np.float32) for i in range(11)}
    loaded["model.language_model.norm.weight"] = np.zeros(1, np.float32)
    save_file(loaded, tmp_path / hf.SINGLE_FILE)
    with pytest.raises(ValueError, match=f", {len(layers) + 12} problems:") as caught:
        hf.load_params(tmp_path, config, dtype="float32")
    lines = str(caught.value).splitlines()
    assert [line.strip() for line in lines if "more like" in line] == [
        f"... and {len(layers) - 10} more like the last one",
        "... and 1 more like the last one",
    ]
    assert len(lines) == 1 + (10 + 1) + 1 + (10 + 1)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("value", [np.nan, -np.nan, np.inf, -np.inf, 1e39])
def test_values_that_are_not_finite_are_refused_by_name(
    value: float, dtype: FloatType, tmp_path: Path
) -> None:
    config = CONFIGS["tied"]
    hf.save_params(random_params(config), config, tmp_path, dtype="float32")
    loaded = load_file(tmp_path / hf.SINGLE_FILE)
    wide = loaded[GATE].astype(np.float64)  # 1e39 is finite in the file, but not as read
    wide[-1, 3] = value
    save_file(loaded | {GATE: wide}, tmp_path / hf.SINGLE_FILE)
    with pytest.raises(ValueError, match=rf"^{GATE}: got NaN or infinite {dtype} values"):
        hf.load_params(tmp_path, config, dtype=dtype)


def test_the_largest_numbers_are_read(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    hf.save_params(random_params(config), config, tmp_path, dtype="float32")
    loaded = load_file(tmp_path / hf.SINGLE_FILE)
    loaded[GATE][0, :2] = [3.4e38, -3.4e38]
    loaded[GATE][0, 2:4] = [1e-45, -0.0]
    save_file(loaded, tmp_path / hf.SINGLE_FILE)
    hf.load_params(tmp_path, config, dtype="float32")


def test_another_config_is_a_list_of_mismatches(folder: Path) -> None:
    bigger = tiny(num_hidden_layers=4, hidden_size=48)
    with pytest.raises(ValueError, match=r"layers\.3") as caught:
        hf.load_params(folder, bigger, dtype="float32")
    assert "embed_tokens.weight: got BF16[256, 32], want F32|BF16|F16|F64[256, 48]" in str(
        caught.value
    )


@pytest.mark.parametrize("spoil", [False, True])
def test_a_tied_head_may_be_there_if_equal(spoil: bool, tmp_path: Path) -> None:
    config, params = CONFIGS["tied"], random_params(CONFIGS["tied"])
    hf.save_params(params, config, tmp_path, dtype="float32")
    loaded = load_file(tmp_path / hf.SINGLE_FILE)
    loaded["lm_head.weight"] = loaded[table.EMBEDDING].copy()
    loaded["lm_head.weight"][-1, -1] += spoil
    save_file(loaded, tmp_path / hf.SINGLE_FILE)
    if spoil:
        with pytest.raises(ValueError, match=r"lm_head\.weight: got other values"):
            hf.load_params(tmp_path, config, dtype="float32")
    else:
        assert_same_tree(hf.load_params(tmp_path, config, dtype="float32"), params)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        (None, "not found, want a JSON object"),
        ("", "got no valid JSON"),
        ("[]", "got list, want a JSON object"),
        ("\xff", "config.json"),
        ('{"model_type": "llama"}', "got 'llama', want 'qwen3_vl'"),
    ],
)
def test_bad_config_json(text: str | None, wanted: str, tmp_path: Path) -> None:
    if text is not None:
        (tmp_path / "config.json").write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=re.escape(wanted)) as caught:
        hf.read_config(tmp_path)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("dtype", ["float16", "int32", "nonsense", np.dtype(np.int8)])
def test_other_dtypes_are_refused(dtype: Any, folder: Path) -> None:
    with pytest.raises(ValueError, match="dtype of weights: got"):
        hf.load_params(folder, CONFIGS["tied"], dtype=dtype)


def test_wrong_parameters_are_listed(tmp_path: Path) -> None:
    config = CONFIGS["tied"]
    params = random_params(config)
    params["language"]["norm"] = {"scale": jnp.zeros(3), "bias": jnp.zeros(32)}
    params["visual"]["pos_embed"]["embedding"] = jnp.zeros((64, 32), jnp.int32)
    del params["visual"]["patch_embed"]["bias"]
    with pytest.raises(ValueError, match="4 problems") as caught:
        hf.save_params(params, config, tmp_path / "out")
    for part in (
        "language/norm/scale: got float32[3], want float[32]",
        "language/norm/bias: got a leaf that the config has no place for",
        "visual/pos_embed/embedding: got int32[64, 32]",
        "visual/patch_embed/bias: not found",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("limit", [0, -1, float("nan")])
def test_shard_limit_must_be_positive(limit: float, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="max_shard_bytes: got"):
        hf.save_params(
            random_params(CONFIGS["tied"]), CONFIGS["tied"], tmp_path, max_shard_bytes=limit
        )


class CrashError(Exception):
    """Stands for whatever ends a process in the middle of writing."""


def test_a_crash_keeps_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    write = files.write_tensors
    calls = iter(range(100))

    def crashing(*args: Any) -> None:
        if next(calls) == 2:
            raise CrashError
        write(*args)

    monkeypatch.setattr(files, "write_tensors", crashing)
    params = random_params(CONFIGS["tied"], seed=1)
    with pytest.raises(CrashError):
        hf.save_params(params, CONFIGS["tied"], folder, max_shard_bytes=SHARDS)
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before


def test_a_crash_while_moving_in_leaves_no_complete_folder(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    replace, calls = Path.replace, iter(range(100))

    def crashing(path: Path, target: Path) -> Path:
        if next(calls) == 2:
            raise CrashError
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", crashing)
    params = random_params(CONFIGS["tied"], seed=1)
    with pytest.raises(CrashError):
        hf.save_params(params, CONFIGS["tied"], folder, max_shard_bytes=SHARDS)
    with pytest.raises(ValueError, match="got neither"):
        hf.load_params(folder, CONFIGS["tied"], dtype="float32")


def test_no_space_is_told_before_writing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match=r"no space left for .*: got 1000 bytes free, want \d{6}"):
        hf.save_params(random_params(CONFIGS["tied"]), CONFIGS["tied"], tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_refusing_disk_is_told_with_the_file(tmp_path: Path) -> None:
    """A limit on the size of files stands for a disk that fills up while writing."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        with pytest.raises(OSError, match=r"cannot write .*model\.safetensors: File too large"):
            hf.save_params(random_params(CONFIGS["tied"]), CONFIGS["tied"], tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list(tmp_path.iterdir()) == []
    assert os.access(tmp_path, os.W_OK)
