"""The whole pipeline on a tiny model: it runs, resumes bit for bit, and exports what it trained."""

import dataclasses
import json
import pathlib
import shutil
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from helpers_tiny import tiny_config

from mgsd_jax import config as config_lib
from mgsd_jax import tree
from mgsd_jax.config import Config
from mgsd_jax.data import loaders
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.sampling import answers
from mgsd_jax.stages import (
    distillation,
    evaluate,
    export,
    generate,
    grounding,
    init,
    loading,
    report,
)
from mgsd_jax.training import optimizer
from mgsd_jax.workdir import checkpoint, contents

RUN: dict[str, Callable[[Config, str], None]] = {
    "grounding": grounding.run,
    "distillation": distillation.run,
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, pathlib.Path]:
    """A folder with a random tiny model and its boards, and the config of it."""
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config(workdir)
    init.run(config, str(workdir))
    generate.run(config, str(workdir))
    return config, workdir


@pytest.fixture(scope="module")
def trained(base: tuple[Config, pathlib.Path]) -> tuple[Config, pathlib.Path]:
    config, workdir = base
    traced = config_lib.override(config, ["metrics.profile=3:3"])
    grounding.run(traced, str(workdir))
    distillation.run(traced, str(workdir))
    return config, workdir


def weights(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return dict(tree.named_leaves(checkpoint.load_params(folder / "checkpoints")))


def assert_same(a: dict[str, np.ndarray], b: dict[str, np.ndarray]) -> None:
    assert a.keys() == b.keys()
    different = [name for name in a if not np.array_equal(a[name], b[name])]
    assert different == []


def records(folder: pathlib.Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def without_times(rows: list[dict]) -> list[dict]:
    timed = ("time", "seconds", "data", "rollout", "update", "validation", "tflops_per_s", "mfu")
    return [
        {k: v for k, v in row.items() if k not in timed and not k.startswith("tokens_per_s")}
        for row in rows
    ]


def test_both_stages_move_the_weights_and_report(trained: tuple[Config, pathlib.Path]) -> None:
    config, workdir = trained
    start = dict(tree.named_leaves({"params": loading.load(config.model.path, config).params}))
    grounded, distilled = weights(workdir / "grounding"), weights(workdir / "distillation")
    assert start.keys() == grounded.keys() == distilled.keys()
    for before, after in ((start, grounded), (grounded, distilled)):
        moved = [name for name in before if not np.array_equal(before[name], after[name])]
        assert len(moved) > 0.9 * len(before)
    steps = records(workdir / "distillation")
    assert [row["step"] for row in steps] == [1, 2, 3, 4]
    for name in (
        *("loss", "kl/state", "student_entropy", "teacher_agreement"),
        *("rollout/length", "rollout/truncated", "rollout/parsed", "rollout/legal"),
        *("rollout/success", "rollout/optimal/maze", "grad_norm", "seconds", "rollout"),
    ):
        assert name in steps[-1], name
    # A model of random weights writes no answer block, and what no token is of has no measure.
    assert not {"kl/plan", "agree/plan"} & steps[-1].keys()
    for name in ("val/success", "val/kl", "val/divergence"):
        assert name in steps[1] and name not in steps[0]
    assert 0 < steps[1]["val/kl"] == pytest.approx(steps[1]["val/divergence"])  # reverse KL
    for row in steps:
        assert 0 <= row["rollout/repeated"] < 1 and row["skipped_update"] == 0
        assert row["logprob_gap"] < 1e-4, "sampler and loss compute the same model, in float32"


def test_both_stages_tell_the_rate_and_trace_a_step_and_one_shows_boards(
    trained: tuple[Config, pathlib.Path],
) -> None:
    config, workdir = trained
    for stage, optim in (
        ("grounding", config.grounding.optim),
        ("distillation", config.distillation.optim),
    ):
        rate = optimizer.make_schedule(optim, 4)
        rates = [row["lr"] for row in records(workdir / stage)]
        want = [float(jnp.asarray(rate(count))) for count in range(4)]
        assert rates == pytest.approx(want, rel=1e-6)
        shown = workdir / stage / "tensorboard"
        (trace,) = (shown / "plugins" / "profile" / "steps_3-3").glob("*.xplane.pb")
        assert trace.name == "process_0.xplane.pb" and b"jit_update" in trace.read_bytes()
        events = b"".join(file.read_bytes() for file in shown.glob("events.*"))
        assert (b"boards/maze_3_0000" in events) == (stage == "distillation")


@pytest.mark.parametrize("stage", ["grounding", "distillation"])
def test_stopping_and_resuming_changes_nothing(
    trained: tuple[Config, pathlib.Path], stage: str, tmp_path: pathlib.Path
) -> None:
    """A run stopped in the middle of step 4 (the last save is of step 2) ends bit for bit alike."""
    config, workdir = trained
    stopped = shutil.copytree(workdir, tmp_path / "stopped")
    # What a kill after the save of step 2 leaves: later checkpoints are not there.
    shutil.rmtree(stopped / stage / "checkpoints" / "4")
    assert [path.name for path in (stopped / stage / "checkpoints").iterdir()] == ["2"]
    RUN[stage](config, str(stopped))
    assert_same(*(weights(folder / stage) for folder in (workdir, stopped)))
    whole, again = (records(folder / stage) for folder in (workdir, stopped))
    assert without_times(whole) == without_times(again)
    assert [row["time"] for row in whole[:2]] == [row["time"] for row in again[:2]]
    assert whole[2]["time"] < again[2]["time"]  # the other two steps were done once more


@pytest.mark.parametrize("stage", ["grounding", "distillation"])
def test_microbatches_change_nothing_but_rounding(
    trained: tuple[Config, pathlib.Path], stage: str, tmp_path: pathlib.Path
) -> None:
    config, workdir = trained
    changes = [
        f"data.folder={workdir}/data",
        f"distillation.student={workdir}/grounding",
        f"{stage}.steps=1",
        f"{stage}.microbatches=2",
    ]
    RUN[stage](config_lib.override(config, changes), str(tmp_path))
    one, two = (records(folder / stage)[0] for folder in (workdir, tmp_path))
    assert one["loss"] == pytest.approx(two["loss"], rel=1e-5)
    assert one["grad_norm"] == pytest.approx(two["grad_norm"], rel=1e-4)


def test_lora_trains_adapters_only_and_the_next_stage_merges_them(
    trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    config, workdir = trained
    config = config_lib.override(
        config, [f"data.folder={workdir}/data", "grounding.lora.rank=2", "grounding.optim.lr=0.1"]
    )
    grounding.run(config, str(tmp_path))
    names = set(weights(tmp_path / "grounding"))
    assert names and all(name.startswith("adapters/language/") for name in names)
    base = loading.load(config.model.path, config).params
    merged = loading.load(str(tmp_path / "grounding"), config).params
    moved = {
        name
        for (name, a), (_, b) in zip(
            tree.named_leaves(base), tree.named_leaves(merged), strict=True
        )
        if not np.array_equal(a, b)
    }
    assert moved == {n.removeprefix("adapters/")[:-2] + "/kernel" for n in names}

    # Distillation goes on with the same adapters, above the same base, which is the teacher too.
    config = config_lib.override(
        config,
        ["distillation.lora.rank=2", "distillation.steps=1", "checkpoint.every=1"],
    )
    student = str(tmp_path / "grounding")
    # The same tensors in another file: a copy of the file would be known for the same model.
    copied = shutil.copytree(config.model.path, tmp_path / "copied_base")
    tensors = safetensors.numpy.load_file(copied / "model.safetensors")
    safetensors.numpy.save_file(tensors, copied / "model.safetensors", {"format": "np"})
    assert contents.identity(copied) != contents.identity(config.model.path)
    for name, teacher in (("once", config.model.path), ("twice", str(copied))):
        again = config_lib.override(
            config, [f"distillation.student={student}", f"distillation.teacher={teacher}"]
        )
        distillation.run(again, str(tmp_path / name))
    once, twice = (weights(tmp_path / name / "distillation") for name in ("once", "twice"))
    assert once.keys() == names
    for name, leaf in once.items():
        assert np.array_equal(leaf, twice[name]), name
    source = json.loads((tmp_path / "once" / "distillation" / "model" / "source.json").read_text())
    assert source["weights"] == str(pathlib.Path(config.model.path).resolve())  # not in the workdir
    # One step of the stage moves them a little from where grounding left them.
    before = weights(tmp_path / "grounding")
    rate = config.distillation.optim.lr
    for name, leaf in once.items():
        assert 0 < np.abs(leaf - before[name]).max() < 3 * rate, name


def test_part_of_the_parameters_can_be_frozen(
    trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    config, workdir = trained
    config = config_lib.override(
        config, [f"data.folder={workdir}/data", "grounding.optim.trainable=^language/"]
    )
    grounding.run(config, str(tmp_path))
    base = dict(tree.named_leaves(loading.load(config.model.path, config).params))
    after = dict(tree.named_leaves(loading.load(str(tmp_path / "grounding"), config).params))
    assert base.keys() == after.keys()
    for name, leaf in base.items():
        if name.startswith("visual/"):
            assert np.array_equal(leaf, after[name]), name


def test_a_workdir_of_another_config_is_refused(trained: tuple[Config, pathlib.Path]) -> None:
    config, workdir = trained
    other = config_lib.override(config, ["grounding.optim.lr=0.5"])
    with pytest.raises(ValueError, match=r"grounding.optim.lr: got 0.5, want 0.001"):
        grounding.run(other, str(workdir))


def test_evaluate_export_and_report(trained: tuple[Config, pathlib.Path]) -> None:
    config, workdir = trained
    evaluate.run(config, str(workdir))
    rows = [json.loads(x) for x in (workdir / "evaluate" / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 3 * 4 * 6, "3 models, 4 modes, 6 boards"
    assert len({(row["model"], row["id"]) for row in rows}) == len(rows)

    # A kill in the middle of a row: what is whole stays, what is missing is asked again.
    path = workdir / "evaluate" / "rows.jsonl"
    text = path.read_text()
    path.write_text(text[: len(text) * 2 // 3])
    evaluate.run(config, str(workdir))
    again = [json.loads(x) for x in path.read_text().splitlines()]
    key = lambda row: (row["model"], row["id"])  # noqa: E731
    assert sorted(again, key=key) == sorted(rows, key=key)

    export.run(config, str(workdir))
    exported = loading.load(str(workdir / "export"), config).params
    trained_params = loading.load(str(workdir / "distillation"), config).params
    for (name, a), (_, b) in zip(
        tree.named_leaves(exported), tree.named_leaves(trained_params), strict=True
    ):
        want = np.asarray(b).astype(jax.numpy.bfloat16).astype(np.float32)
        assert np.array_equal(np.asarray(a), want), name

    report.run(config, str(workdir))
    page = (workdir / "report" / "index.html").read_text()
    assert "distilled" in page and "http://" not in page.replace("http://www.w3.org", "")


@pytest.mark.usefixtures("full_compilation")
def test_transformers_answers_the_same_with_the_export(
    trained: tuple[Config, pathlib.Path], tmp_path: pathlib.Path
) -> None:
    """Greedy responses of the exported float32 model, token for token."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, workdir = trained
    config = config_lib.override(config, [f"export.folder={tmp_path}/hf", "export.dtype=float32"])
    export.run(config, str(workdir))
    model = transformers.Qwen3VLForConditionalGeneration.from_pretrained(tmp_path / "hf").eval()
    loaded = loading.load(str(tmp_path / "hf"), config)
    encoder = load_encoder(config.data, loaded.processor)
    settings = dataclasses.replace(config.evaluate, batch_size=6)
    boards = loaders.load_boards(config_lib.resolve(config, str(workdir)), "test")
    given = answers.make_answerer(loaded.model, encoder, settings)(
        {"params": loaded.params}, boards, "picture"
    )
    for board, answer in zip(boards, given, strict=True):
        encoded = answers.encode_prompt(encoder, board, "picture")
        picture = encoded.pictures[0]
        tokens = torch.tensor(encoded.tokens)[None].long()
        with torch.no_grad():
            out = model.generate(
                input_ids=tokens,
                attention_mask=torch.ones_like(tokens),
                mm_token_type_ids=(tokens == loaded.processor.image_token_id).int(),
                pixel_values=torch.tensor(picture.patches),
                image_grid_thw=torch.tensor([picture.grid]),
                do_sample=False,
                max_new_tokens=settings.sampling.max_new_tokens,
            )
        text = loaded.processor.tokenizer.decode(
            out[0, tokens.shape[1] :], skip_special_tokens=True
        )
        assert text == answer.text
        assert out[0, tokens.shape[1] :].tolist() == [*answer.ids]


def test_an_evaluation_with_drafts_writes_the_rows_of_one_without(
    base: tuple[Config, pathlib.Path],
) -> None:
    config, workdir = base
    written = []
    for count in (0, 5):
        folder = workdir / f"drafted-{count}"
        changes = [
            f"evaluate.sampling.draft_tokens={count}",
            f"evaluate.folder={folder}",
            'evaluate.models=[["base", "{model}"]]',
        ]
        evaluate.run(config_lib.override(config, changes), str(workdir))
        written.append([(folder / name).read_bytes() for name in ("rows.jsonl", "summary.json")])
    drafted, plain = (
        rows.replace(b"drafted-5", b"drafted-0") for rows in (written[1][1], written[0][1])
    )
    assert written[0][0] == written[1][0] and drafted == plain
