"""The real tokenizer, template and settings of Qwen3-VL-4B-Instruct, with a tiny model behind them.

They stand in ../shared, beside the repository, and these tests skip where they do not. The picture
processor of transformers that the folder names wants torchvision: where that is not installed, ids
and pixels are held against the parts that do without.
"""

import dataclasses
import json
import runpy
import shutil
from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from helpers_auto import HAS_TORCHVISION, load_torchvision, make_loadable, run_snippet
from helpers_model import random_params, tiny
from helpers_tiny import tiny_config
from PIL import Image

from mgsd_jax import config as c
from mgsd_jax import main
from mgsd_jax.command_line import load_config
from mgsd_jax.data.encoder import Encoder
from mgsd_jax.data.loaders import load_boards, stream_boards
from mgsd_jax.data.processor import Processor, encode, encode_answer, load_processor
from mgsd_jax.data.prompts import BUILT_IN
from mgsd_jax.data.segments import decode
from mgsd_jax.sampling import answers
from mgsd_jax.weights import hf

ROOT = Path(__file__).parents[1]
REAL = ROOT.parent / "shared" / "reference" / "qwen3vl_4b"
RECIPE, RELEASE, ON_A_GPU = (
    load_config(str(ROOT / "configs" / name), [])
    for name in ("qwen3vl.py", "qwen3vl.py:4b,release", "gpu_4b.py")
)

pytestmark = pytest.mark.skipif(
    not REAL.is_dir(), reason=f"{REAL}: no side files of Qwen3-VL-4B-Instruct"
)


@pytest.fixture(scope="module")
def processor() -> Processor:
    return load_processor(REAL)


@pytest.fixture(scope="module")
def encoder(processor: Processor) -> Encoder:
    return Encoder(processor, BUILT_IN, RECIPE.data)


def boards(task: str, level: int, count: int) -> list[Any]:
    stream = stream_boards([(task, level)], "train", seed=0, count=count)
    return [stream[i] for i in range(count)]


@pytest.fixture(scope="module")
def theirs() -> Any:
    """transformers' processor of the folder."""
    with pytest.MonkeyPatch.context() as patch:
        kept = make_loadable(patch)
        from transformers import AutoProcessor

        yield AutoProcessor.from_pretrained(REAL)
        del kept


def test_ids_and_end_of_turn(processor: Processor) -> None:
    assert processor.eos_ids == (151_645, 151_643)
    assert processor.pad_id == 151_643 and processor.banned_ids == (151_655, 151_656)
    assert processor.end_of_turn == "<|im_end|>" and not processor.opens_thought
    assert processor.table_side == 48
    for answer in ("<answer>D</answer>", "", " (3,0)\n", "näïve 图 \U0001f600"):
        tokens = encode_answer(processor, answer)
        assert tokens[-1] == 151_645 and not set(tokens[:-1]) & set(processor.eos_ids)
        assert decode(processor, tokens) == answer
    # Rows of the table beyond the tokenizer's own are sampled by an untrained model.
    assert decode(processor, [151_935, *encode_answer(processor, "up")]) == "up"


@pytest.mark.parametrize("task", ["frozenlake", "maze", "minibehaviour"])
def test_ids_grids_and_pixels_equal_transformers(encoder: Encoder, theirs: Any, task: str) -> None:
    from mgsd_jax.data import prompts

    (board,) = boards(task, 5, 1)
    picture = encoder.picture(board)
    conversations = [
        prompts.student(BUILT_IN, task, picture),
        prompts.teacher(BUILT_IN, task, board.state, "state_and_plan"),
        prompts.grounding(BUILT_IN, task, board.state, picture)[0],
        [
            {"role": "system", "content": "näïve 图 \U0001f600 e\u0301\t\r\n"},
            {"role": "user", "content": [{"type": "image", "image": picture[:96, :224]}]},
            {"role": "assistant", "content": "<think>\n\n</think>\n\n<answer>D</answer>"},
            {"role": "user", "content": "And now? <|im_end|>"},
        ],
    ]
    for messages in conversations:
        for is_prompt in (True, False):
            got = encode(encoder.processor, messages, add_generation_prompt=is_prompt)
            pil = [
                message
                if isinstance(message["content"], str)
                else message
                | {
                    "content": [
                        part | {"image": Image.fromarray(part["image"])}
                        if "image" in part
                        else part
                        for part in message["content"]
                    ]
                }
                for message in map(dict, messages)
            ]
            want = theirs.apply_chat_template(
                pil, add_generation_prompt=is_prompt, tokenize=True, return_dict=True
            )
            assert got.tokens.tolist() == want["input_ids"][0]
            grids = [tuple(map(int, grid)) for grid in want.get("image_grid_thw", [])]
            assert [picture.grid for picture in got.pictures] == grids
            if grids:
                patches = np.concatenate([picture.patches for picture in got.pictures])
                pixels = np.asarray(want["pixel_values"])
                # The processor with torchvision rounds once where that without rounds twice, to
                # half a unit of float32 at 1 each; resized bytes may differ by one, 2 / 255 here.
                one_byte = 2 / 255 if messages is conversations[-1] else 0.0
                room = HAS_TORCHVISION * (2.0**-22 + one_byte)
                np.testing.assert_allclose(patches, pixels, rtol=0, atol=room)


LEVELS = [(each.task, level) for each in RECIPE.data.boards for level in each.levels]


@pytest.mark.parametrize(("task", "level"), LEVELS)
def test_every_prompt_fits_the_buckets_of_the_recipes(
    encoder: Encoder, task: str, level: int
) -> None:
    tokens = runpy.run_path(str(ROOT / "benchmarks" / "tokens.py"))
    # The release has room for every kind of teacher's prompt, the others for that which they read.
    room, rng = tokens["rooms"](RELEASE), np.random.default_rng(0)
    for board in boards(task, level, 8):
        patches = len(encoder.student(board).pictures[0].patches)
        assert patches <= max(c.sizes(RECIPE.data.patch_buckets))
        found = dict(tokens["lengths"](encoder, board, rng))
        assert found.keys() == room.keys()
        assert {kind: count for kind, count in found.items() if count > room[kind]} == {}
        for recipe in (RECIPE, RELEASE, ON_A_GPU):
            own = tokens["rooms"](recipe)
            read = {"text", recipe.distillation.teacher_context}
            assert all(found[kind] <= own[kind] for kind in read)
            first = first_room(recipe)
            assert {kind: found[kind] for kind in first if found[kind] > first[kind]} == {}


def first_room(recipe: c.Config) -> dict[str, int]:
    """The smallest bucket of what a run by the recipe is made of: almost all batches take it."""
    data, settings = recipe.data, recipe.distillation
    return {
        **dict.fromkeys(("picture", "blind", "perception"), c.sizes(data.prompt_buckets)[0]),
        **dict.fromkeys(("text", "state", "state_and_plan"), c.sizes(data.teacher_buckets)[0]),
        **{kind: c.sizes(data.sequence_buckets)[0] for kind, _ in recipe.grounding.mixture},
        # Some right responses of Maze 6 are longer than the first bucket, but none of 900 by much.
        "response": settings.response_buckets[0] + 32,
    }


def run_config(folder: Path) -> c.Config:
    """One step of everything, on two tasks, with the recipe's pictures and buckets."""
    config = tiny_config(folder)
    sampling = dataclasses.replace(config.evaluate.sampling, max_new_tokens=8)
    recipe = RECIPE.data
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, path=str(folder / "model")),
        data=dataclasses.replace(
            config.data,
            boards=(c.LevelSet("frozenlake", (3,), train=4, val=1, test=2),),
            picture_size=recipe.picture_size,
            cell_pixels=recipe.cell_pixels,
            prompt_buckets=recipe.prompt_buckets,
            teacher_buckets=recipe.teacher_buckets,
            sequence_buckets=recipe.sequence_buckets,
            patch_buckets=recipe.patch_buckets,
        ),
        grounding=dataclasses.replace(config.grounding, steps=1, batch_size=2),
        distillation=dataclasses.replace(
            config.distillation, steps=1, batch_size=2, eval_boards=1, sampling=sampling
        ),
        evaluate=dataclasses.replace(
            config.evaluate,
            models=(("base", "{workdir}/distillation"),),
            modes=("picture",),
            sampling=sampling,
            batch_size=2,
        ),
        export=dataclasses.replace(config.export, dtype="float32"),
    )


@pytest.mark.parametrize("level", [3, 8])
def test_the_table_of_mazes_is_what_the_benchmark_prints(processor: Processor, level: int) -> None:
    tokens = runpy.run_path(str(ROOT / "benchmarks" / "tokens.py"))
    tokens["maze_table"].__globals__["MAZES"] = (level,)
    head, line = tokens["maze_table"](processor, RECIPE.data, 30)
    page = (ROOT / "docs" / "prompts.md").read_text()
    assert f"\n{head}\n" in page and f"\n{line}\n" in page


def run_stage(name: str, folder: Path) -> int:
    # Processes join before JAX is up, which it is here.
    with flagsaver.flagsaver(), mock.patch.object(main.processes, "join", return_value=False):
        flags = [f"--stage={name}", f"--config={folder}/config.py", f"--workdir={folder}/run"]
        return main.main(main.parse_flags(["mgsd_jax", *flags]))


@pytest.fixture(scope="session")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the `model`, and the `run` that the command line made of it."""
    folder = tmp_path_factory.mktemp("real")
    shutil.copytree(REAL, folder / "model")
    real = hf.read_config(REAL)
    small = tiny(vocab_size=real.text.vocab_size)
    small = dataclasses.replace(
        real, text=small.text, vision=dataclasses.replace(small.vision, patch_size=16)
    )
    (folder / "model" / "config.json").write_text(json.dumps(small.to_hf()))
    hf.save_params(random_params(small), small, folder / "model", dtype="float32")
    text = f"from mgsd_jax.config import *\n\nget_config = lambda: {run_config(folder)!r}\n"
    (folder / "config.py").write_text(text)
    for name in ("generate", "grounding", "distillation", "evaluate", "export", "report"):
        # What trains the model is of no account; what answers is held against transformers.
        jax.config.update("jax_disable_most_optimizations", name != "evaluate")
        assert run_stage(name, folder) == 0, name
    jax.config.update("jax_disable_most_optimizations", False)
    return folder


@pytest.mark.slow
def test_all_stages_run_by_the_command_line(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "run/evaluate/rows.jsonl").read_text().splitlines()]
    assert len(rows) == 2 and all(0 < row["response_tokens"] <= 8 for row in rows)
    assert any(row["response"] for row in rows)
    assert (run / "run/report/index.html").is_file()
    for name in ("grounding", "distillation"):
        (step,) = (run / "run" / name / "metrics.jsonl").read_text().splitlines()
        assert np.isfinite(json.loads(step)["loss"])


@pytest.mark.slow
def test_the_export_answers_the_same_in_transformers(run: Path) -> None:
    torch = pytest.importorskip("torch")
    if HAS_TORCHVISION:
        kept = load_torchvision()  # noqa: F841
    import transformers

    config, folder = c.resolve(run_config(run), str(run / "run")), run / "run" / "export"
    for file in REAL.glob("*.json"):  # all but the config, which is the tiny model's
        copied = folder / file.name
        if file.name != "config.json" and copied.exists():
            assert copied.read_bytes() == file.read_bytes(), file.name
    model: Any = transformers.Qwen3VLForConditionalGeneration.from_pretrained(folder).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    encoder = Encoder(load_processor(folder), BUILT_IN, config.data)
    rows = [json.loads(line) for line in (run / "run/evaluate/rows.jsonl").read_text().splitlines()]
    for board, row in zip(load_boards(config, "test"), rows, strict=True):
        encoded = answers.encode_prompt(encoder, board, "picture")
        tokens = torch.tensor(encoded.tokens)[None].long()
        picture = encoded.pictures[0]
        with torch.no_grad():
            out = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                mm_token_type_ids=(tokens == encoder.processor.image_token_id).int(),
                pixel_values=torch.tensor(picture.patches),
                image_grid_thw=torch.tensor([picture.grid]),
                do_sample=False,
                max_new_tokens=8,
            )
        assert tokenizer is not None
        text = tokenizer.decode(out[0, tokens.shape[1] :], skip_special_tokens=True)
        assert text == row["response"]


@pytest.mark.slow
def test_the_snippet_of_the_card_runs(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    kept = make_loadable(monkeypatch)
    config, folder = c.resolve(run_config(run), str(run / "run")), run / "run" / "export"
    found = run_snippet(folder, monkeypatch)
    assert found["said"].shape[0] <= config.evaluate.sampling.max_new_tokens
    assert (
        capsys.readouterr().out.strip()
        == found["processor"].tokenizer.decode(found["said"], skip_special_tokens=True).strip()
    )
    del kept
