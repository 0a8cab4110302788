"""The shipped nano base and its tokenizer: whole, small, and made for the prompts of today."""

import dataclasses
import json
import pathlib

import jax
import numpy as np
import pytest
from helpers_tiny import tiny_config

import mgsd_jax
from mgsd_jax import config as c
from mgsd_jax.data import prompts
from mgsd_jax.data.nano_tokenizer import write_tokenizer
from mgsd_jax.data.processor import encode_answer, encode_example, load_processor
from mgsd_jax.data.segments import decode
from mgsd_jax.envs import ENVS
from mgsd_jax.model.qwen3vl import Qwen3VL
from mgsd_jax.stages import init
from mgsd_jax.tree import named_leaves
from mgsd_jax.weights import hf

BASE = pathlib.Path(mgsd_jax.__file__).parent / "assets" / "nano_base"
SHAPE = c.NanoConfig(folder="", max_level=6)


def test_the_base_is_whole_and_small() -> None:
    params = hf.load_params(BASE, hf.read_config(BASE), dtype=np.dtype(np.float32))
    count = sum(leaf.size for _, leaf in named_leaves(params))
    assert 1e6 < count < 6e6
    assert sum(file.stat().st_size for file in BASE.iterdir()) < 12e6


def test_the_tokenizer_is_the_one_of_the_present_prompts(tmp_path: pathlib.Path) -> None:
    write_tokenizer(tmp_path, SHAPE, ["frozenlake", "maze", "minibehaviour"])
    written, shipped = (
        json.loads((folder / "tokenizer.json").read_text()) for folder in (tmp_path, BASE)
    )
    assert written == shipped
    # what transformers 4.57 needs and 5 reads as well
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    assert settings == json.loads((BASE / "tokenizer_config.json").read_text())
    assert settings["tokenizer_class"] == "PreTrainedTokenizerFast"
    assert settings["extra_special_tokens"]["image_token"] == "<|image_pad|>"
    text, tokens = (
        json.loads((BASE / name).read_text()) for name in ("config.json", "generation_config.json")
    )
    assert text["text_config"]["eos_token_id"] == tokens["eos_token_id"][0]


@pytest.mark.parametrize(("task", "level"), [("frozenlake", 4), ("maze", 4), ("minibehaviour", 5)])
def test_prompts_are_short_and_every_text_survives(task: str, level: int) -> None:
    processor = load_processor(BASE)
    env = ENVS[task]
    for seed in range(10):
        state = env.generate(np.random.default_rng(seed), level)
        answer = prompts.response(task, state, env.shortest_plan(state))
        example, length = encode_example(
            processor, prompts.teacher(prompts.BUILT_IN, task, state), answer
        )
        assert length < 60
        assert decode(processor, example.tokens[length:]) == answer
    for text in ("ünïcode, any text\n\n (9,9) <b>", "(0,0)(1,1) up,down", " 7x7"):
        assert decode(processor, encode_answer(processor, text)) == text


def test_a_tokenizer_for_mazes_by_rows_has_a_token_a_cell(tmp_path: pathlib.Path) -> None:
    rows = prompts.Prompts({}, "rows")
    tokenizer, env = write_tokenizer(tmp_path, SHAPE, ["maze"], rows), rows.env("maze")
    for level in (3, 6):
        text = env.describe(env.generate(np.random.default_rng(level), level))
        tokens = tokenizer.encode(text)
        # three labels with a value each and one without, then a token a row and a cell
        assert len(tokens) == 7 + level + level**2
        assert tokenizer.decode(tokens) == text
    for passage in prompts.passages(env).values():
        assert len(tokenizer.encode(passage)) == 1


def test_no_other_model_is_written_over(tmp_path: pathlib.Path) -> None:
    """A folder of weights that took days is not replaced by random ones; the same shape may be."""
    config, folder = tiny_config(tmp_path), tmp_path / "init"
    init.run(config, str(tmp_path))
    (folder / "notes.txt").touch()
    init.run(config, str(tmp_path))
    assert (folder / "notes.txt").is_file() and config.nano is not None
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    wider = dataclasses.replace(config.nano, width=config.nano.width * 2)
    with pytest.raises(ValueError, match=r"init: got an existing file or folder, want .*; remove"):
        init.run(dataclasses.replace(config, nano=wider), str(tmp_path))
    assert before == {file.name: file.read_bytes() for file in folder.iterdir()}


def test_the_vision_tower_starts_awake(tmp_path: pathlib.Path) -> None:
    config = c.Config(
        model=c.ModelConfig(path=str(tmp_path)),
        data=c.DataConfig(
            boards=(c.LevelSet("frozenlake", (3, 4), 0, 0, 0), c.LevelSet("maze", (3,), 0, 0, 0)),
            picture_size=0,
            cell_pixels=32,
        ),
        grounding=c.GroundingConfig(optim=c.OptimConfig(lr=1e-3)),
        distillation=c.DistillationConfig(optim=c.OptimConfig(lr=1e-3)),
        evaluate=c.EvaluateConfig(models=()),
        nano=c.NanoConfig(folder=str(tmp_path)),
    )
    init.run(config, str(tmp_path))
    loaded = hf.load_params(tmp_path, hf.read_config(tmp_path), dtype="float32")
    pictures = init.sample_pictures(load_processor(tmp_path), config)
    model = Qwen3VL(hf.read_config(tmp_path))
    look = jax.jit(lambda p, x: model.apply({"params": p}, x, method=lambda m, x: m.visual(x)))
    seen = [look(loaded, picture) for picture in pictures]
    for features, norm in ((0, 4), (1, 2)):
        x = np.concatenate([np.asarray(s[features]).reshape(-1, 128) for s in seen])
        assert np.sqrt((x**2).sum(axis=1).mean()) == pytest.approx(norm, rel=0.01)
        assert np.linalg.norm(x.mean(axis=0)) < 0.01 * norm
    params = dict(named_leaves(loaded))
    assert float(np.std(params["visual/pos_embed/embedding"])) == pytest.approx(1, rel=0.1)
    kernel = params["visual/merger/linear_fc1/kernel"]
    assert float(np.std(kernel)) == pytest.approx(kernel.shape[0] ** -0.5, rel=0.1)
    kernel = params["language/layers/mlp/up_proj/kernel"]
    assert float(np.std(kernel)) == pytest.approx(0.02, rel=0.1)
