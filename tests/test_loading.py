"""Models that load for some uses and not for others, and stages that have not finished."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from etils import epath
from helpers_model import random_params, tiny
from helpers_tiny import tiny_config
from helpers_tokenizer import CHAT_TEMPLATE, write_processor_folder

from mgsd_jax.config import Config
from mgsd_jax.stages import distillation, loading
from mgsd_jax.weights import hf
from mgsd_jax.workdir import contents, stage_folder

THINKING = CHAT_TEMPLATE.replace("assistant\\n'", "assistant\\n<think>\\n'")


def write_model(folder: Path, vocab_size: int = 512, **options: Any) -> str:
    """A tiny model with random weights and all side files; its path."""
    ids = write_processor_folder(folder, patch_size=4, **options)
    config = dataclasses.replace(
        tiny(vocab_size=vocab_size),
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
    )
    (folder / "config.json").write_text(json.dumps(config.to_hf()))
    hf.save_params(random_params(config), config, folder)
    return str(folder)


def load_student(config: Config, workdir: Path, path: str) -> loading.Loaded:
    settings = dataclasses.replace(config.distillation, student=path)
    folder = epath.Path(workdir) / "distillation"
    return loading.load_student(settings, config, folder, [], None, metric="x")[0]


def load_teacher(config: Config, path: str, student: loading.Loaded) -> loading.Loaded:
    settings = dataclasses.replace(config.distillation, teacher=path)
    return loading.load_teacher(settings, config, None, student)


def test_a_thinking_checkpoint_can_be_read_and_not_trained(tmp_path: Path) -> None:
    student = write_model(tmp_path / "student")
    thinking = write_model(tmp_path / "thinking", chat_template=THINKING)
    config = tiny_config(tmp_path)
    assert loading.load(thinking, config).processor.opens_thought
    line = rf"^{thinking}: chat template: got prompts that end inside <think>, want .*Instruct"
    with pytest.raises(ValueError, match=line):
        load_student(config, tmp_path, thinking)
    loaded = load_student(config, tmp_path, student)
    with pytest.raises(ValueError, match=line):
        load_teacher(config, thinking, loaded)


def test_a_teacher_reads_the_students_tokens(tmp_path: Path) -> None:
    student = write_model(tmp_path / "student")
    other = write_model(tmp_path / "other")
    larger = write_model(tmp_path / "larger", vocab_size=544)
    # As many tokens, two of them in each other's place.
    file = tmp_path / "other" / "tokenizer.json"
    content = json.loads(file.read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    file.write_text(json.dumps(content))
    config = tiny_config(tmp_path)
    loaded = loading.load(student, config)
    assert load_teacher(config, student, loaded).folder == student
    want = (
        rf"^{other}: tokenizer: got vocab_size 512 and 4 tokens .* such as '[ab]' of id \d+, want"
    )
    with pytest.raises(ValueError, match=want):
        load_teacher(config, other, loaded)
    with pytest.raises(ValueError, match=r"got vocab_size 544 and 0 tokens .* vocab_size 512"):
        load_teacher(config, larger, loaded)


def test_a_tokenizer_larger_than_the_model_is_refused(tmp_path: Path) -> None:
    folder = write_model(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    more = {"additional_special_tokens": [f"<|{i}|>" for i in range(100)]}
    file.write_text(json.dumps(json.loads(file.read_text()) | more))
    with pytest.raises(ValueError, match=r"tokenizer: got ids up to 5\d\d, want them below"):
        loading.load(folder, tiny_config(tmp_path))


@pytest.mark.parametrize(
    ("steps", "saved", "said"),
    [
        (None, (), "grounding has not finished; run --stage=grounding first"),
        (4, (), r"grounding has not finished \(step 0 of 4\); run --stage=grounding first"),
        (4, (2, 3), r"grounding has not finished \(step 3 of 4\); run --stage=grounding first"),
        (4, (2, 4), None),
    ],
)
def test_a_stage_is_finished_when_its_last_step_is_saved(
    tmp_path: Path, steps: int | None, saved: tuple[int, ...], said: str | None
) -> None:
    """Half-written steps are none."""
    folder = tmp_path / "grounding"
    if steps is not None:
        (folder / "model").mkdir(parents=True)
        (folder / "model" / "source.json").touch()
        (folder / "config.json").write_text(json.dumps({"grounding": {"steps": steps}}))
    for step in saved:
        (folder / "checkpoints" / str(step)).mkdir(parents=True)
    (folder / "checkpoints" / "4.orbax-checkpoint-tmp-1").mkdir(parents=True)
    if said is None:
        stage_folder.check_finished(str(folder))
        return
    with pytest.raises(ValueError, match=f"{folder}: {said}"):
        stage_folder.check_finished(str(folder))


def test_a_stage_without_a_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    """The one line says what is left to do, not that no checkpoint was readable."""
    folder = tmp_path / "grounding"
    (folder / "model").mkdir(parents=True)
    (folder / "model" / "source.json").touch()
    (folder / "config.json").write_text(json.dumps({"grounding": {"steps": 4}}))
    with pytest.raises(ValueError, match=r"grounding has not finished \(step 0 of 4\); run"):
        loading.load(str(folder), tiny_config(tmp_path))


def test_a_models_identity_is_that_of_its_copies_alone(tmp_path: Path) -> None:
    stage, weights = tmp_path / "stage", tmp_path / "weights"
    found = []
    for step, runs in ((2, "first\n"), (4, "first\nresumed\n"), (4, "anew\n")):
        (stage / "checkpoints" / str(step)).mkdir(parents=True, exist_ok=True)
        (stage / "runs.jsonl").write_text(runs)
        found.append(contents.identity(stage))
    (stage / "runs.jsonl").write_text("anew\nresumed\n")
    assert found[-1] == contents.identity(stage)
    weights.mkdir()
    content = bytearray(100_000)
    for place in (0, 50_000, 99_999):
        content[place] = 1
        (weights / "model.safetensors").write_bytes(content)
        found.append(contents.identity(weights))
    shutil.copytree(weights, tmp_path / "copy")
    assert found[-1] == contents.identity(tmp_path / "copy")
    assert len(set(found)) == 6


def test_a_stage_is_not_put_above_weights_that_it_was_not_trained_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Grounding was trained anew after distillation, whose frozen part would be another."""
    config, base = tiny_config(tmp_path), write_model(tmp_path / "base")
    loaded = loading.load(base, config)
    folder = epath.Path(tmp_path) / "distillation"
    lora_config = dataclasses.replace(config.distillation.lora, rank=0)
    source = stage_folder.Source(base, lora_config, complete=False, metric="")
    stage_folder.write_source(folder, source, loaded.folder)
    monkeypatch.setattr(loading.checkpoint, "load_params", lambda *_, **__: {"params": {}})
    again = loading.load(str(folder), config)
    assert again.params.keys() == loaded.params.keys()
    weights = tmp_path / "base" / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    line = r"source.json: weights: got another model at .*base, want the model that distill"
    with pytest.raises(ValueError, match=line):
        loading.load(str(folder), config)
    with pytest.raises(ValueError, match=line):
        load_student(config, tmp_path, base)


@pytest.mark.parametrize("name", ["absent", "exported", "grounding"])
def test_a_folder_of_weights_is_no_stage(tmp_path: Path, name: str) -> None:
    """Also one of a stage's name, and one that is not there: loading it says what it lacks."""
    if name != "absent":
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").touch()
    stage_folder.check_finished(str(tmp_path / name))


def test_distillation_without_grounding_says_so_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distillation.loaders, "load_boards", lambda *_: [])
    monkeypatch.setattr(distillation.monitor, "spread", lambda *_: [])
    with pytest.raises(ValueError, match="grounding has not finished; run --stage=grounding first"):
        distillation.run(tiny_config(tmp_path), str(tmp_path))
    assert not (epath.Path(tmp_path) / "distillation").exists()
