"""Exported folders: complete, read alike by old and new readers, merged, all or nothing."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from helpers_model import Row, random_params

from mgsd_jax import export, tree
from mgsd_jax.data.processor import encode, load_processor
from mgsd_jax.model import files, hf, lora
from mgsd_jax.model.config import ModelConfig, tiny

CONFIG = tiny()
SPEC = lora.LoraSpec(2, 4.0, r"language/.*/(q|v|down)_proj")


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(CONFIG)


@pytest.fixture(scope="module")
def adapters(params: dict) -> dict:
    fresh = lora.init_adapters(params, SPEC, jax.random.key(0))
    return tree.map_named(lambda path, leaf: leaf + 0.1 * path.endswith("/b"), fresh)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The side files of a model, with contents that only a copy can have."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in export.SIDE_FILES:
        (folder / name).write_text(f'{{"file": "{name}"}}')
    for name in ("config.json", "model.safetensors", "training_args.bin", "README.md"):
        (folder / name).write_text("not to be copied")
    return folder


def assert_same_tree(got: dict, want: dict) -> None:
    assert [path for path, _ in tree.named_leaves(got)] == [p for p, _ in tree.named_leaves(want)]
    jax.tree.map(np.testing.assert_array_equal, got, want)


@pytest.mark.parametrize("limit", [5e9, 40_000])
def test_folder_holds_weights_config_and_side_files(
    limit: float, params: dict, source: Path, tmp_path: Path
) -> None:
    out = tmp_path / "deep" / "out"
    export.export_folder(params, CONFIG, source, out, dtype="float32", max_shard_bytes=limit)
    names = {file.name for file in out.iterdir()}
    weights = {name for name in names if name.startswith("model")}
    assert names - weights == {"config.json", *export.SIDE_FILES}
    assert (hf.INDEX_FILE in weights) == (len(weights) > 1) == (limit < 5e9)
    for name in export.SIDE_FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert hf.read_config(out) == CONFIG
    assert_same_tree(hf.load_params(out, CONFIG, dtype="float32"), params)
    assert list(out.parent.iterdir()) == [out]


def test_old_and_new_readers_of_the_config_agree(
    params: dict, source: Path, tmp_path: Path
) -> None:
    export.export_folder(params, CONFIG, source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    text = written["text_config"]
    assert written["dtype"] == "bfloat16"
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == CONFIG.text.rope_theta
    for rope in (text["rope_scaling"], text["rope_parameters"]):
        assert rope["mrope_section"] == list(CONFIG.text.mrope_section)
        assert rope["mrope_interleaved"] is True
    old, new = json.loads(json.dumps(written)), json.loads(json.dumps(written))
    del old["text_config"]["rope_parameters"]
    del new["text_config"]["rope_theta"], new["text_config"]["rope_scaling"]
    for reader in (written, old, new):
        assert ModelConfig.from_hf(reader, source="test") == CONFIG


def test_adapters_are_merged(params: dict, adapters: dict, source: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export.export_folder(params, CONFIG, source, out, dtype="float32", adapters=adapters)
    merged = hf.load_params(out, CONFIG, dtype="float32")
    assert_same_tree(merged, lora.merge(params, adapters))
    path = "language/layers/mlp/down_proj/kernel"
    assert np.abs(tree.get(merged, path) - tree.get(params, path)).max() > 1e-3


def test_adapters_alone(params: dict, adapters: dict, source: Path, tmp_path: Path) -> None:
    export.export_adapters(adapters, SPEC, CONFIG, source, tmp_path / "out")
    assert {file.name for file in (tmp_path / "out").iterdir()} == {
        lora.PEFT_CONFIG,
        lora.PEFT_WEIGHTS,
    }
    back, _ = lora.load_peft(tmp_path / "out", CONFIG)
    assert_same_tree(back, adapters)
    settings = json.loads((tmp_path / "out" / lora.PEFT_CONFIG).read_text())
    assert settings["base_model_name_or_path"] == str(source)


def test_missing_side_files_are_all_listed(params: dict, source: Path, tmp_path: Path) -> None:
    for name in export.SIDE_FILES:
        (source / name).unlink()
    with pytest.raises(ValueError, match="4 problems") as caught:
        export.export_folder(params, CONFIG, source, tmp_path / "out")
    for part in (
        str(source),
        "got no generation_config.json",
        "got no tokenizer.json or vocab.json",
        "got no preprocessor_config.json or processor_config.json",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_an_existing_folder_is_left_alone(params: dict, source: Path, tmp_path: Path) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    with pytest.raises(ValueError, match=r"source: got an existing .* want an absent or empty one"):
        export.export_folder(params, CONFIG, source, source)
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    (tmp_path / "empty").mkdir()
    export.export_folder(params, CONFIG, source, tmp_path / "empty")
    assert hf.read_config(tmp_path / "empty") == CONFIG


class CrashError(Exception):
    """Stands for whatever ends a process in the middle of writing."""


def crash_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    def crash(*args: object, **kwargs: object) -> None:
        raise CrashError

    monkeypatch.setattr(owner, name, crash)


@pytest.mark.parametrize("name", ["write_tensors", "write_bytes", "write_json"])
def test_a_crash_leaves_nothing(
    name: str, params: dict, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())
    with monkeypatch.context() as patch:
        crash_at(patch, files, name)
        with pytest.raises(CrashError):
            export.export_folder(params, CONFIG, source, tmp_path / "out")
    assert set(tmp_path.iterdir()) == before


def test_left_overs_of_a_killed_process_are_cleared(
    params: dict, source: Path, tmp_path: Path
) -> None:
    partial = tmp_path / ".out.partial"
    partial.mkdir()
    (partial / "model-00009-of-00009.safetensors").write_text("half")
    export.export_folder(params, CONFIG, source, tmp_path / "out")
    assert not partial.exists()
    assert "model-00009-of-00009.safetensors" not in {f.name for f in (tmp_path / "out").iterdir()}


def test_a_full_disk_is_told(
    params: dict, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="no space left for"):
        export.export_folder(params, CONFIG, source, tmp_path / "out")
    assert not (tmp_path / "out").exists()


# transformers on a whole folder


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model with a tokenizer and a processor, as `--stage=init` writes it."""
    nano = pytest.importorskip("mgsd_jax.nano")
    from mgsd_jax.config import NanoConfig

    folder = tmp_path_factory.mktemp("nano")
    settings = NanoConfig(str(folder), width=32, layers=3, mlp=48, vision_width=48, vision_mlp=48)
    tokenizer = nano.write_tokenizer(folder, settings)
    written = nano.hf_config(settings, tokenizer)
    config = ModelConfig.from_hf(written, source="nano")
    (folder / "config.json").write_text(json.dumps(written))
    hf.save_params(random_params(config), config, folder, dtype="float32")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_transformers_reads_the_whole_folder(dtype: Any, nano_folder: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import helpers_hf
    from transformers import AutoTokenizer, Qwen3VLForConditionalGeneration

    config = hf.read_config(nano_folder)
    params = hf.load_params(nano_folder, config, dtype=dtype)
    out = tmp_path / "out"
    export.export_folder(params, config, nano_folder, out, dtype=dtype, max_shard_bytes=100_000)
    load: Callable = Qwen3VLForConditionalGeneration.from_pretrained
    exported, info = load(out, output_loading_info=True, dtype="auto")
    assert not any(info.values()), info
    assert exported.dtype == getattr(torch, dtype)
    original = load(nano_folder, dtype=dtype)
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "Player:"}]
    messages = [{"role": "user", "content": content}]
    encoded = encode(load_processor(out), messages, add_generation_prompt=True)
    row = Row(
        encoded.tokens,
        encoded.tokens == config.image_token_id,
        tuple(part.grid for part in encoded.pictures),
        tuple(part.patches for part in encoded.pictures),
    )
    assert row.is_visual.any()
    batch = helpers_hf.to_torch(config, [row], side="left")
    with torch.no_grad():
        assert torch.equal(exported(**batch).logits, original(**batch).logits)
    theirs, before = (AutoTokenizer.from_pretrained(folder) for folder in (out, nano_folder))
    assert theirs.get_vocab() == before.get_vocab()
    assert theirs.chat_template == before.chat_template
