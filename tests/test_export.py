"""Exported folders: complete, read alike by old and new readers, all or nothing, checked."""

import contextlib
import dataclasses
import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath
from helpers_auto import make_loadable, run_snippet
from helpers_kills import Killer
from helpers_model import Row, random_params, tiny
from helpers_tiny import tiny_config
from PIL import Image
from safetensors.numpy import load_file, save_file

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.config import Config, ExportConfig, LoraConfig, NanoConfig
from mgsd_jax.data import prompts
from mgsd_jax.data.nano_tokenizer import write_tokenizer
from mgsd_jax.data.processor import encode, load_processor
from mgsd_jax.data.tokenizer import for_all_readers
from mgsd_jax.model import lora
from mgsd_jax.model.config import ModelConfig
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.stages import card, export, init, loading, parity
from mgsd_jax.weights import files, hf, peft
from mgsd_jax.workdir import checkpoint, stage_folder

CONFIG = tiny()
SIDE: dict[str, Any] = {
    "transformers_version": "4.57.0",
    "dtype": "float16",
    "text_config": {"eos_token_id": 5, "bos_token_id": 3, "torch_dtype": "float16"},
}


@pytest.fixture(scope="module")
def params() -> dict:
    return random_params(CONFIG)


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """The side files of a model, with contents that only a copy can have."""
    folder = tmp_path / "source"
    folder.mkdir()
    for name in export.SIDE_FILES:
        (folder / name).write_text(f'{{"file": "{name}"}}')
    (folder / "config.json").write_text(json.dumps(CONFIG.to_hf() | SIDE))
    for name in ("model.safetensors", "training_args.bin", "README.md"):
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
    export.write_folder(params, CONFIG, source, out, dtype="float32", max_shard_bytes=limit)
    names = {file.name for file in out.iterdir()}
    weights = {name for name in names if name.startswith("model")}
    assert names - weights == {"config.json", *export.SIDE_FILES}
    assert (hf.INDEX_FILE in weights) == (len(weights) > 1) == (limit < 5e9)
    for name in export.SIDE_FILES:
        assert (out / name).read_bytes() == (source / name).read_bytes()
    assert hf.read_config(out) == CONFIG
    assert_same_tree(hf.load_params(out, CONFIG, dtype="float32"), params)


def test_old_and_new_readers_of_the_config_agree(
    params: dict, source: Path, tmp_path: Path
) -> None:
    export.write_folder(params, CONFIG, source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    text = written["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == CONFIG.text.rope_theta
    for rope in (text["rope_scaling"], text["rope_parameters"]):
        assert rope["mrope_section"] == list(CONFIG.text.mrope_section)
        assert rope["mrope_interleaved"] is True
    old, new = json.loads(json.dumps(written)), json.loads(json.dumps(written))
    del old["text_config"]["rope_parameters"]
    del new["text_config"]["rope_theta"], new["text_config"]["rope_scaling"]
    for reader in (written, old, new):
        assert ModelConfig.from_hf(reader, source="test") == CONFIG


def test_settings_that_we_do_not_read_are_kept(params: dict, source: Path, tmp_path: Path) -> None:
    export.write_folder(params, CONFIG, source, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    text = written["text_config"]
    assert (text["eos_token_id"], text["bos_token_id"]) == (5, 3)
    assert written["transformers_version"] == "4.57.0"
    for part in (written, text, written["vision_config"]):
        assert part["dtype"] == "bfloat16"
        assert "torch_dtype" not in part


V5 = {"tokenizer_class": "TokenizersBackend", "eos_token": "<e>", "image_token": "<i>"}
FAST = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "eos_token": "<e>",
    "model_input_names": ["input_ids", "attention_mask"],
}
QWEN = {"tokenizer_class": "Qwen2Tokenizer", "bos_token": None}


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        # as transformers 5 saves a tokenizer without a class of its own: 4.57 knows no such class
        (
            V5 | {"extra_special_tokens": []},
            FAST | {"extra_special_tokens": {"image_token": "<i>"}},
        ),
        # Qwen's own, saved by 5: 4.57 asks the list for its keys
        (
            QWEN | {"extra_special_tokens": ["<a>"]},
            QWEN | {"extra_special_tokens": {}, "additional_special_tokens": ["<a>"]},
        ),
        ({"extra_special_tokens": None}, {"extra_special_tokens": {}}),
        # what 4.57 saved
        *(
            (same, same)
            for same in (
                QWEN | {"additional_special_tokens": ["<a>"]},
                {"extra_special_tokens": {"image_token": "<i>"}, "video_token": "<v>"},
            )
        ),
    ],
)
def test_tokenizer_settings_that_both_readers_take(settings: dict, wanted: dict) -> None:
    assert for_all_readers(settings) == wanted
    assert for_all_readers(wanted) == wanted


def test_missing_side_files_are_all_listed(params: dict, source: Path, tmp_path: Path) -> None:
    for name in export.SIDE_FILES:
        (source / name).unlink()
    with pytest.raises(ValueError, match="3 problems") as caught:
        export.write_folder(params, CONFIG, source, tmp_path / "out")
    for part in (
        str(source),
        "tokenizer.json or vocab.json: not found",
        "tokenizer_config.json: not found",
        "preprocessor_config.json or processor_config.json: not found",
    ):
        assert part in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_generation_settings_may_be_absent(params: dict, source: Path, tmp_path: Path) -> None:
    (source / "generation_config.json").unlink()
    export.write_folder(params, CONFIG, source, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()


# The stage: all of a folder or nothing of it


@pytest.fixture
def config(params: dict, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """An export of `source` to `out`, without a model that has to be compiled."""
    absent: Any = None
    small = loading.Loaded(Qwen3VL(CONFIG), params, absent, str(source), "")
    monkeypatch.setattr(loading, "load", lambda *_: small)
    monkeypatch.setattr(parity, "measure", lambda *_: {"prompts": []})
    settings = ExportConfig(source=str(source), folder=str(tmp_path / "out"))
    made = dataclasses.replace(tiny_config(tmp_path), export=settings)
    return dataclasses.replace(
        made, data=dataclasses.replace(made.data, boards=made.data.boards[:1])
    )


WHOLE = {
    *("model.safetensors", "config.json", parity.FILE, export.RECORD, *export.SIDE_FILES),
    *(card.FILE, card.PROMPTS, card.SAMPLE),
}


def test_an_earlier_export_of_the_same_source_alone_is_replaced(
    config: Config, source: Path, tmp_path: Path
) -> None:
    before = {file.name: file.read_bytes() for file in source.iterdir()}
    inside = dataclasses.replace(
        config, export=dataclasses.replace(config.export, folder=str(source))
    )
    with pytest.raises(ValueError, match=r"source: got an existing .* want an absent or empty one"):
        export.run(inside, str(tmp_path))
    assert {file.name: file.read_bytes() for file in source.iterdir()} == before
    (tmp_path / "out").mkdir()
    for _ in range(2):
        export.run(config, str(tmp_path))
        assert {file.name for file in (tmp_path / "out").iterdir()} == WHOLE
        record = json.loads((tmp_path / "out" / export.RECORD).read_text())
        assert record["source"] == "{workdir}/source"
        given = config_lib.to_dict(config)
        assert (record["model"], record["data"]) == (given["model"], given["data"])
        (tmp_path / "out" / "stale").touch()
    other = dataclasses.replace(config, export=dataclasses.replace(config.export, source="other"))
    with pytest.raises(ValueError, match="out: got an existing"):
        export.run(other, str(tmp_path))


@pytest.fixture(scope="module")
def killer() -> Killer:
    return Killer()


@pytest.mark.slow
@pytest.mark.parametrize("is_there", [False, True], ids=["first export", "earlier one there"])
def test_a_kill_at_any_operation_leaves_a_state_to_go_on_from(
    is_there: bool, config: Config, killer: Killer, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    workdir = set(tmp_path.iterdir())

    def run() -> None:
        export.run(config, str(tmp_path))

    states = set()
    for operations in range(200):
        if is_there:
            run()
            (out / "stale").touch()
        done = killer.run(run, tmp_path, operations)
        left = sorted(f"{file.name}" for file in tmp_path.iterdir() if file not in workdir)
        states.add(tuple(left))
        # What bears the name of the export is whole, old or new.
        assert not out.exists() or {file.name for file in out.iterdir()} - {"stale"} == WHOLE
        run()
        assert {file.name for file in out.iterdir()} == WHOLE
        assert set(tmp_path.iterdir()) == workdir | {out}
        if done:
            break
        shutil.rmtree(out)
    assert done
    assert operations > 15
    assert len(states) == (4 if is_there else 3)


@pytest.mark.parametrize("name", ["write_tensors", "write_bytes", "write_json"])
def test_a_crash_leaves_nothing(
    name: str, config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = set(tmp_path.iterdir())

    def crash(*args: object, **kwargs: object) -> None:
        raise RuntimeError("a crash")

    monkeypatch.setattr(files, name, crash)
    with pytest.raises(RuntimeError):
        export.run(config, str(tmp_path))
    assert set(tmp_path.iterdir()) == before


def test_a_full_disk_is_told(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    with pytest.raises(OSError, match="no space left for"):
        export.run(config, str(tmp_path))
    assert not (tmp_path / "out").exists()


# transformers on a whole folder


@pytest.fixture(scope="module")
def nano_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nano model with a tokenizer and a processor, as `--stage=init` writes it."""
    folder = tmp_path_factory.mktemp("nano")
    settings = NanoConfig(str(folder), width=32, layers=3, mlp=48, vision_width=48, vision_mlp=48)
    tokenizer = write_tokenizer(folder, settings, ["frozenlake"])
    written = init.hf_config(settings, tokenizer)
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
    export.write_folder(params, config, nano_folder, out, dtype=dtype, max_shard_bytes=100_000)
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
    assert theirs is not None and before is not None
    assert theirs.get_vocab() == before.get_vocab()
    assert theirs.chat_template == before.chat_template


# The parity file


@dataclasses.dataclass(frozen=True)
class Exported:
    """Exports of a nano model: the whole of it in bfloat16, and adapters of two stages on it."""

    config: Config
    whole: Path
    adapters: Path

    def check(self, folder: Path) -> None:
        settings = ExportConfig(folder=str(folder), check=True)
        export.run(dataclasses.replace(self.config, export=settings), "unused")


@pytest.fixture(scope="module")
def exported(nano_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Exported]:
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(workdir)
    config = dataclasses.replace(
        config, model=dataclasses.replace(config.model, path=str(nano_folder))
    )
    loaded = loading.load(config.model.path, config)
    specs = [LoraConfig(2, 5.0, "q_proj"), LoraConfig(3, 4.0, "(q|down)_proj")]
    trained = {}
    for i, (name, spec) in enumerate(zip(("grounding", "distillation"), specs, strict=True)):
        fresh = lora.init_adapters(loaded.params, spec, jax.random.key(i))
        draw = np.random.default_rng(i).standard_normal
        trained[name] = tree.map_named(
            lambda path, leaf, draw=draw: 0.1 * draw(leaf.shape).astype(np.float32),
            tree.partition(fresh, lambda path, _: not path.endswith("/scale"))[0],
        )
        weights = str(workdir / "grounding" if i else nano_folder)
        source = stage_folder.Source(weights, spec, complete=False, metric="")
        stage_folder.write_source(epath.Path(workdir) / name, source, loaded.folder)
    read = checkpoint.load_params
    checkpoint.load_params = lambda folder, *_, **__: {
        "adapters": trained[Path(folder).parent.name]
    }
    for name, source, adapters in (("whole", "{model}", False), ("adapters", "distillation", True)):
        settings = ExportConfig(
            source=source.replace("dist", f"{workdir}/dist"),
            folder=str(workdir / name),
            adapters=adapters,
        )
        export.run(dataclasses.replace(config, export=settings), str(workdir))
    checkpoint.load_params = read
    yield Exported(config, workdir / "whole", workdir / "adapters")


def test_parity_file_is_small_and_names_tokens_and_logits(exported: Exported) -> None:
    file = exported.whole / parity.FILE
    assert file.stat().st_size < 100_000
    asked = json.loads(file.read_text())["prompts"]
    assert len(asked) == 20
    assert sum('"image"' in json.dumps(prompt["messages"]) for prompt in asked) == 15
    for prompt in asked:
        assert 1 <= len(prompt["tokens"]) == len(prompt["logits"]) <= 8
    assert len({json.dumps(prompt["logits"]) for prompt in asked}) > 10


@pytest.mark.parametrize("name", ["whole", "adapters"])
def test_an_export_is_held_against_transformers(
    name: str, exported: Exported, tmp_path: Path
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("peft")
    folder = tmp_path / name
    shutil.copytree(getattr(exported, name), folder)
    exported.check(folder)
    # other weights are noticed
    weights = next(folder.glob("*model.safetensors"))
    tensors = load_file(weights)
    key = next(k for k in sorted(tensors) if "q_proj" in k and "lora_A" not in k)
    save_file(tensors | {key: tensors[key][::-1].copy()}, weights, files.METADATA)
    with pytest.raises(ValueError, match=f"{name}: largest difference of a logit from transform"):
        exported.check(folder)


def test_what_a_check_needs_is_said(
    exported: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ValueError, match=r"parity.json: not found; run --stage"):
        exported.check(tmp_path)
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"export.check: torch is required: .* pip install"):
        exported.check(exported.whole)


def test_adapters_of_a_chain_are_one_peft_folder(exported: Exported) -> None:
    settings = json.loads((exported.adapters / peft.CONFIG_FILE).read_text())
    assert settings["base_model_name_or_path"] == exported.config.model.path
    assert (settings["r"], settings["lora_alpha"]) == (5, pytest.approx(20 / 3))
    names = {file.name for file in exported.adapters.iterdir()}
    ours = {parity.FILE, export.RECORD, card.FILE, card.PROMPTS, card.SAMPLE}
    assert names == {peft.CONFIG_FILE, peft.WEIGHTS_FILE, *ours}


@pytest.mark.parametrize("name", ["whole", "adapters"])
def test_the_snippet_of_the_card_asks_as_training_did(
    name: str,
    exported: Exported,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The README's own code runs in the folder: tokens and pixels are those of a prompt of ours."""
    pytest.importorskip("torch")
    kept = make_loadable(monkeypatch)  # before peft, which would load torchvision by itself
    pytest.importorskip("peft")
    folder, config = getattr(exported, name), exported.config
    found = run_snippet(folder, monkeypatch)
    picture = np.asarray(Image.open(folder / "sample" / "board.png"))
    messages = prompts.student(prompts.BUILT_IN, config.data.boards[0].task, picture)
    want = encode(load_processor(exported.whole), messages, add_generation_prompt=True)
    assert found["inputs"]["input_ids"][0].tolist() == want.tokens.tolist()
    np.testing.assert_allclose(
        found["inputs"]["pixel_values"].numpy(), want.pictures[0].patches, atol=2.0**-22
    )
    assert 1 <= len(found["said"]) <= config.evaluate.sampling.max_new_tokens
    assert capsys.readouterr().out.strip()
    del kept


def test_a_model_without_adapters_has_none_to_export(exported: Exported, tmp_path: Path) -> None:
    settings = ExportConfig(source="{model}", folder=str(tmp_path / "out"), adapters=True)
    with pytest.raises(ValueError, match=r"no model/source.json found, want a stage that trained"):
        export.run(dataclasses.replace(exported.config, export=settings), str(tmp_path))


@pytest.mark.parametrize(
    ("change", "dtype", "is_told"),
    [
        (0.0, "float32", True),
        (1e-6, "bfloat16", True),  # less than bfloat16 can tell
        (1e-6, "float32", False),
        (1e-2, "bfloat16", False),
    ],
)
def test_a_model_that_is_its_base_is_not_exported(
    change: float, dtype: Any, is_told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = {"a": {"kernel": jnp.ones(3)}, "b": jnp.zeros(2)}
    absent: Any = None
    loaded = loading.Loaded(Qwen3VL(CONFIG), base, absent, "", "")
    monkeypatch.setattr(loading, "load", lambda *_, **__: loaded)
    moved = {"a": {"kernel": jnp.ones(3) + change}, "b": jnp.zeros(2)}
    moved = jax.tree.map(lambda leaf: leaf.astype(dtype), moved)
    settings = ExportConfig(source="trained", dtype=dtype)
    config = dataclasses.replace(tiny_config(tmp_path), export=settings)
    with contextlib.ExitStack() as told:
        if is_told:
            told.enter_context(pytest.raises(ValueError, match="trained: got the weights of hub"))
        export.check_moved(moved, "hub", config)


@pytest.mark.parametrize("is_whole", [True, False])
def test_whatever_a_stage_trained_is_held_against_what_it_started_from(
    is_whole: bool, nano_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage, config = tmp_path / "distillation", tiny_config(tmp_path)
    source = stage_folder.Source(str(nano_folder), LoraConfig(), complete=is_whole, metric="")
    stage_folder.write_source(epath.Path(stage), source, nano_folder)
    settings = ExportConfig(source=str(stage), folder=str(tmp_path / "out"), dtype="float32")
    config = dataclasses.replace(config, export=settings)
    params = loading.load(str(nano_folder), config).params
    monkeypatch.setattr(checkpoint, "load_params", lambda *_, **__: {"params": params})
    with pytest.raises(ValueError, match=r"distillation: got the weights of .* in float32"):
        export.run(config, str(tmp_path))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("is_whole", [True, False])
def test_a_stage_that_trained_all_does_without_what_it_started_from(
    is_whole: bool, nano_folder: Path, tmp_path: Path
) -> None:
    base, stage = tmp_path / "base", epath.Path(tmp_path) / "distillation"
    shutil.copytree(nano_folder, base)
    source = stage_folder.Source(str(base), LoraConfig(), complete=is_whole, metric="")
    stage_folder.write_source(stage, source, base)
    assert export.find_base(stage, "absent") == str(base)
    shutil.rmtree(base)
    if is_whole:
        assert export.find_base(stage, "absent") is None
    else:
        with pytest.raises(ValueError, match=r"source\.json: weights: got nothing at .*base"):
            export.find_base(stage, "absent")


def test_adapters_that_add_nothing_are_not_exported() -> None:
    adapters = {"q_proj": {"a": jnp.ones((1, 3, 2)), "b": jnp.zeros((1, 2, 3))}}
    with pytest.raises(ValueError, match="trained: got adapters that add nothing"):
        export.check_adapters(adapters, "trained")
    export.check_adapters(adapters | {"k_proj": {"b": jnp.ones((1, 2, 3))}}, "trained")
