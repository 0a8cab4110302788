"""The stages' own programs compile for a slice, and what does not fit is said clearly."""

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from etils import epath
from helpers_model import tiny
from helpers_tiny import ROOT, tiny_config
from helpers_tpu import tpu_mesh
from jax.sharding import Mesh

from mgsd_jax import config as config_lib
from mgsd_jax import preflight
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data.batch import Inputs
from mgsd_jax.model import flops
from mgsd_jax.parallel.chips import CHIPS, Chip
from mgsd_jax.preflight import collectives, kept, lengths, roofline, targets
from mgsd_jax.preflight.lengths import Lengths
from mgsd_jax.preflight.programs import make_model, programs_of
from mgsd_jax.preflight.roofline import Decoding, Work, decoding
from mgsd_jax.preflight.table import Compiled, Result, render
from mgsd_jax.stages.distillation_step import DistillationBatch
from mgsd_jax.training.optimizer import TrainState
from mgsd_jax.weights import released, table

V5E = CHIPS["TPU v5 lite"]
NO_WORK = Work(0.0, 0.0, 0.0, 0)


@pytest.fixture
def config(tmp_path: pathlib.Path) -> Config:
    """A whole run of a tiny model, of which there is a config.json and nothing else, on 4 chips."""
    base = tiny_config(tmp_path)
    folder = pathlib.Path(base.model.path)
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny(hidden_size=128).to_hf()))
    return config_lib.override(
        base,
        [
            "mesh.tensor=2",
            "preflight.topology=v5e:2x2",
            "model.compute_dtype=bfloat16",
            "data.patch_buckets=(256,)",
            "distillation.optim.trainable='.*'",
        ],
    )


# ------------------------------------------------------------------------------ the released shapes


def test_the_8b_shapes_have_the_published_number_of_parameters() -> None:
    """8.77 billion, on https://lmstudio.ai/models/qwen/qwen3-vl-8b; an untied head included."""
    config = released.find_config("models/Qwen3-VL-8B-Instruct")
    leaves = jax.tree.leaves(table.abstract_params(config, "bfloat16"))
    assert round(sum(math.prod(leaf.shape) for leaf in leaves) / 1e9, 2) == 8.77


def test_a_folder_comes_before_its_name(tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "Qwen3-VL-4B-Instruct"
    assert released.find_config(str(folder)).text.hidden_size == 2560
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny().to_hf()))
    assert released.find_config(str(folder)) == tiny()
    with pytest.raises(ValueError, match=r"other: config.json not found, want .*Qwen3-VL-2B"):
        released.find_config(str(tmp_path / "other"))


# ------------------------------------------------------------------------------------ what is said


def result(name: str, peak: float | None = 9.0, error: str | None = None) -> Result:
    compiled = Compiled(
        compile_seconds=7.0,
        compile_cpu_seconds=6.0,
        arguments=4.0,
        temporaries=5.0,
        host=0.0,
        peak=peak,
        error=error,
    )
    work = Work(flops=98.5e12, memory=819e9, links=25e9, tokens=1000)
    return Result(name, resident=2.0, work=work, compiled=compiled)


def slice_of(config: Config) -> Mesh:
    tpu_mesh("v5e:2x2", fsdp=4)  # skips without libtpu
    return targets.target_mesh(config)


def page(results: list[Result], *changes: str, chip: Chip = V5E) -> str:
    config = load_config(str(ROOT / "configs" / "qwen3vl.py:8b"), list(changes))
    mesh = slice_of(config)
    return render(config, mesh, chip, results, (), "python -m x")


def test_what_fits_is_one_sentence() -> None:
    text = page([result("distillation/decode"), result("distillation/update")])
    assert "| distillation/update | 4.00 | 5.00 | 9.00 | 2.00 | 11.00 | fits |" in text
    assert "| distillation/update | 98.5 | 0.5 | 1 | 0.25 | 0 | 1 | 1,000 | 6 | 7 |" in text
    assert "samples 1,000 and reads 1,000 tokens; decode + update take at least 2 s" in text
    assert text.rstrip().endswith("Everything fits.")


def test_what_does_not_fit_says_what_to_change() -> None:
    text = page([result("distillation/update", peak=20.0)], "distillation.microbatches=2")
    assert "**does not fit**" in text
    assert "needs 6.25 GiB less a chip. In this order: distillation.microbatches=4" in text
    assert "mesh.tensor=8" in text and "a slice of more than 16 chips" in text
    text = page([result("distillation/decode", peak=20.0)], "mesh.tensor=8")
    assert "distillation.batch_size=16; a smaller distillation.sampling.max_new_tokens" in text
    assert "mesh.tensor" not in text.split("What to change")[1]


def test_less_memory_is_a_setting() -> None:
    one = result("grounding/update")
    assert one.fits(V5E) and not one.fits(dataclasses.replace(V5E, hbm_gib=10.0))


def test_a_fault_of_the_compiler_is_a_row() -> None:
    text = page([result("grounding/update", peak=None, error="INTERNAL: async-update")])
    assert "compiler fault: INTERNAL: async-update" in text


def test_too_large_for_the_compiler_is_a_number() -> None:
    """400 GiB on a chip of 15.75: libtpu refuses, and the table knows by how much."""
    mesh = tpu_mesh("v5e:2x2", fsdp=4)
    whole = jax.sharding.NamedSharding(mesh, jax.P())
    array = jax.ShapeDtypeStruct((100, 2**30), jnp.float32, sharding=whole)
    got = preflight.ask_compiler(jax.jit(lambda x: x + 1).lower(array), "a/b", mesh, V5E)
    assert got.error is None and got.peak is not None and got.peak >= 400
    assert not Result("a/b", 0.0, NO_WORK, got).fits(V5E)


def test_a_wrong_topology_is_named(config: Config) -> None:
    tpu_mesh("v5e:2x2", fsdp=4)  # skips without libtpu
    wrong = config_lib.override(config, ["preflight.topology=v5e-16"])
    with pytest.raises(ValueError, match=r"preflight.topology: got 'v5e-16', want a slice such as"):
        preflight.run(wrong, "unused")
    wrong = config_lib.override(config, ["grounding.batch_size=5"])
    with pytest.raises(ValueError, match=r"grounding.batch_size: got 5 rows, want a multiple of 2"):
        preflight.run(wrong, "unused")


def test_a_text_that_cannot_be_read_costs_an_update_nothing(config: Config) -> None:
    """libtpu 0.0.52 compiles this for tpu7x, and JAX 0.10.2 cannot read the compiled text."""
    config = config_lib.override(config, ["preflight.topology=tpu7x:2x2x1", "mesh.tensor=4"])
    mesh = slice_of(config)
    update = {program.name: program for program in programs_of(config, mesh)}["grounding/update"]
    chip = targets.find_chip(mesh)
    got = preflight.ask_compiler(update.lower(), update.name, mesh, chip)
    assert got.error is None and got.peak is not None and got.peak > 0


def test_one_gpu_is_a_target_where_its_compiler_is(config: Config) -> None:
    wanted = config_lib.override(
        config, ["preflight.topology=h100", "mesh.tensor=1", "preflight.stages=('grounding',)"]
    )
    try:
        mesh = targets.target_mesh(wanted)
    except ValueError as error:
        assert str(error) == (
            "preflight: package jax-cuda13-pjrt not found; install it: pip install 'jax[cuda13]'"
        )
        pytest.skip("compiles for GPUs: want jax[cuda13]")
    chip = targets.find_chip(mesh)
    assert (chip.name, mesh.size, collectives.sides(mesh)) == ("h100", 1, [1, 1, 1])
    (program,) = programs_of(wanted, mesh)
    got = preflight.ask_compiler(program.lower(), program.name, mesh, chip)
    assert got.error is None and got.peak is not None and got.peak > 0


# ----------------------------------------------------------------------------------- how fast it is


def test_hops_and_links_of_a_slice() -> None:
    """A side of 16 of v5e, or of 4 of v5p, is a ring: half as far, and two links a corner."""
    assert [V5E.hops(side) for side in (1, 2, 4, 16)] == [0, 1, 3, 8]
    assert [V5E.links(sides) for sides in ([1, 1], [4, 1], [4, 4], [16, 4])] == [0, 1, 2, 3]
    assert CHIPS["TPU v5"].hops(4) == 2 and CHIPS["TPU v5"].links([2, 2, 2]) == 3


COLLECTIVES = """
%add (a: bf16[], b: bf16[]) -> bf16[] {
  ROOT %c = bf16[] add(%a, %b)
}
%layer (x: bf16[8,64]) -> bf16[8,64] {
  %r = bf16[8,64]{1,0:T(8,128)} all-reduce(%x), replica_groups=GROUPS, to_apply=%add
  ROOT %s = (bf16[8,16], bf16[8,64]) all-gather-start(%r), replica_groups={{0,1},{2,3}}
}
%count (i: s32[]) -> pred[] {
  %end = s32[]{:T(128)} constant(5)
  ROOT %lt = pred[] compare(%i, %end), direction=LT
}
%speaks (i: s32[]) -> pred[] {
  %any = u32[] all-reduce(%i), replica_groups={}, to_apply=%add
  ROOT %ne = pred[] compare(%any, %zero), direction=NE
}
%token (x: bf16[8,64]) -> bf16[8,64] {
  ROOT %w = bf16[8,64] while(%x), condition=%count, body=%layer
}
%compact (x: bf16[8,64]) -> bf16[8,64] {
  ROOT %p = bf16[8,64] collective-permute(%x), source_target_pairs={{0,3},{3,0}}
}
%stage (x: bf16[8,64]) -> bf16[8,64] {
  %w = bf16[8,64] while(%x), condition=%speaks, body=%token
  ROOT %c = bf16[8,64] conditional(%p, %w, %w), branch_computations={%compact, %compact}
}
ENTRY %main (x: bf16[8,64]) -> bf16[8,64] {
  ROOT %w = bf16[8,64] while(%x), condition=%speaks, body=%stage
}
"""


@pytest.mark.parametrize(
    "groups", ["{{0,1},{2,3}}", "[2,2]<=[4]", "mesh['a'=2,'b'=2] {'b'}", "[2,2]<=[2,2]T(1,0)"]
)
def test_a_pass_waits_for_the_collectives_of_its_layers(groups: str) -> None:
    """Not for those outside the innermost loop whose end is not known. 2 x 2 chips of v5e."""
    mesh = tpu_mesh("v5e:2x2", fsdp=4)
    devices = [mesh.devices.flat[i] for i in (0, 1, 3, 2)]  # by rows: places 0 and 1 are neighbours
    mesh = jax.sharding.Mesh(devices, ("a",))
    waits = collectives.a_pass(COLLECTIVES.replace("GROUPS", groups), mesh, V5E)
    assert waits.collectives == 5 * 2 + 1
    # All-reduce there and back, all-gather once, and the whole slice asked whether a row speaks.
    assert waits.hops == 5 * (2 + 1) + 2 * 2
    carried = 5 * (1024 + 512) + 2 * 3 / 4 * 4 / 2
    assert waits.link_bytes == pytest.approx(carried)
    assert waits.seconds(V5E) == pytest.approx(carried / 50e9 + 19e-6)


def test_groups_of_an_unknown_form_are_named() -> None:
    mesh = tpu_mesh("v5e:2x2", fsdp=4)
    with pytest.raises(ValueError, match=r"got groups of an unknown form in \"%r = .*'a':\(1\)2"):
        collectives.a_pass(COLLECTIVES.replace("GROUPS", "mesh['a'=4] {'a':(1)2}"), mesh, V5E)


def test_passes_of_a_rollout() -> None:
    """By hand: a prompt of 100, caches of 356 and 612 slots (a limit of 512), one token a pass."""
    assert decoding(100, 512, 1, 200, 1.0) == Decoding(1, 199, 199 * 356, 0, 356)
    assert decoding(100, 512, 1, 300, 1.0) == Decoding(1, 299, 256 * 356 + 43 * 612, 356, 612)
    # Four tokens a pass, two of which stay: 64 passes fill the first 256 slots with 129 tokens;
    # what is left when they are compacted, 127 slots, is enough to go on.
    assert decoding(100, 480, 4, 129, 2.0) == Decoding(2, 64, 64 * 356, 0, 356)
    assert decoding(100, 480, 4, 130, 2.0) == Decoding(2, 65, 65 * 356, 356, 356)
    # Compacted again after 31 more, 65 slots are left, less than a quarter: the cache grows.
    assert decoding(100, 480, 4, 200, 2.0) == Decoding(2, 100, 95 * 356 + 5 * 612, 3 * 356, 612)
    # A pass keeps no more than its window; the first token takes none.
    assert decoding(100, 512, 1, 200, 5.0) == decoding(100, 512, 1, 200, 1.0)
    assert decoding(100, 512, 1, 1, 1.0).passes == 0


def test_a_typical_step_takes_the_smallest_buckets_that_hold_it() -> None:
    changes = [
        "data.prompt_buckets=(320,512)",
        "data.teacher_buckets=(512,576,1536)",
        "data.sequence_buckets=(512,)",
        "distillation.response_buckets=(256,512)",
    ]
    config = load_config(str(ROOT / "configs" / "qwen3vl.py:8b"), changes)
    found = lengths.typical(config, 2.0)
    assert found == Lengths(512, 320, 576, 512, longest=lengths.LONGEST_RESPONSE, kept=2.0)
    limit = config.distillation.sampling.max_new_tokens
    longest = config.evaluate.sampling.max_new_tokens
    assert lengths.most(config) == Lengths(512, 512, 1536, limit, longest=longest)


# ------------------------------------------------------------------------------------- what is run


def test_a_preflight_keeps_its_table(
    config: Config,
    tmp_path: pathlib.Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Two runs, a program each, of the same configuration: one table of both."""
    tpu_mesh("v5e:2x2", fsdp=4)
    for name in ("distillation/decode", "distillation/layout"):
        only = config_lib.override(config, [f"preflight.only=('{name}',)"])
        preflight.run(only, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "preflight.json").read_text())["results"]
    assert list(found) == ["distillation/layout", "distillation/decode"]
    assert found["distillation/decode"]["error"] is None
    assert 0 < found["distillation/decode"]["arguments"] <= found["distillation/decode"]["peak"]
    assert (tmp_path / "out" / "preflight.md").read_text() in capsys.readouterr().out
    # Three layers with two sums each, the embedding, the logits, tokens, their logprobs, and
    # whether a row still speaks.
    assert found["distillation/decode"]["collectives"] == 11
    other = config_lib.override(config, ["seed=1", "preflight.only=('distillation/layout',)"])
    preflight.run(other, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "preflight.json").read_text())["results"]
    assert list(found) == ["distillation/layout"]


def test_less_memory_is_said_and_what_to_change(config: Config, tmp_path: pathlib.Path) -> None:
    """`--set preflight.hbm_gib`: what fits a chip of v5e does not fit one of a tenth of a MiB."""
    tpu_mesh("v5e:2x2", fsdp=4)
    changes = ["preflight.only=('distillation/layout',)", "preflight.hbm_gib=0.0001"]
    preflight.run(config_lib.override(config, changes), str(tmp_path / "out"))
    text = (tmp_path / "out" / "preflight.md").read_text()
    assert "A chip has 0.0001 GiB for programs" in text
    assert "| **does not fit** |" in text and "Everything fits" not in text
    advice = text.split("What to change:")[1]
    assert "distillation/layout needs" in advice and "mesh.tensor=4" in advice
    preflight.run(config_lib.override(config, changes[:1]), str(tmp_path / "out"))
    assert "Everything else fits" in (tmp_path / "out" / "preflight.md").read_text()


def test_a_run_that_does_not_fit_ends_in_an_answer(
    config: Config, tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cache of half a million rows: the compiler refuses, and the page says what would help."""
    tpu_mesh("v5e:2x2", fsdp=4)
    changes = [
        "preflight.only=('distillation/decode',)",
        "distillation.batch_size=524288",
        "distillation.sampling.max_new_tokens=512",
    ]
    preflight.run(config_lib.override(config, changes), str(tmp_path / "out"))
    printed = capsys.readouterr().out
    row = json.loads((tmp_path / "out" / "preflight.json").read_text())["results"]
    assert row["distillation/decode"]["error"] is None
    assert row["distillation/decode"]["peak"] > V5E.hbm_gib
    assert "| distillation/decode | - | - |" in printed and "**does not fit**" in printed
    assert "mesh.tensor=4; distillation.batch_size=262144; a smaller" in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_every_program_of_a_run_compiles(config: Config, tmp_path: pathlib.Path) -> None:
    tpu_mesh("v5e:2x2", fsdp=4)
    every = config_lib.override(
        config, ["preflight.stages=('grounding', 'distillation', 'evaluate')"]
    )
    preflight.run(every, str(tmp_path / "out"))
    found = json.loads((tmp_path / "out" / "preflight.json").read_text())["results"]
    assert len(found) == 8
    assert all(one["error"] is None and one["peak"] is not None for one in found.values())


def test_the_update_holds_what_the_rollout_holds_besides(config: Config) -> None:
    """State, frozen part and teacher: arguments of the update, resident during the rollout."""
    mesh = tpu_mesh("v5e:2x2", fsdp=2, tensor=2)
    found = {program.name: program for program in programs_of(config, mesh)}
    assert found["distillation/update"].resident == 0
    held = found["distillation/decode"].resident
    params = table.abstract_params(released.find_config(config.model.path), "float32")
    once = roofline.total_bytes(params)
    # Master weights and two moments in float32, and the teacher in bfloat16, over four chips; what
    # is too small or too odd to be split is held whole.
    assert 3.5 * once / 4 < held < 3.5 * once / 2
    # A moving average of the student, in float32, takes the place of the teacher in bfloat16.
    averaged = config_lib.override(config, ["distillation.teacher_decay=0.99"])
    found = {program.name: program for program in programs_of(averaged, mesh)}
    assert 0.5 * once / 4 < found["distillation/decode"].resident - held < 0.5 * once / 2
    found["distillation/update"].lower()


def test_the_options_of_distillation_are_programs_too(config: Config) -> None:
    options = ("contrast_cap=4.0", "wrong_weight=0.3", "success_weight=0.1", "replay_steps=3")
    config = config_lib.override(config, [f"distillation.{option}" for option in options])
    mesh = tpu_mesh("v5e:2x2", fsdp=2, tensor=2)
    found = {program.name: program for program in programs_of(config, mesh)}
    state, *_, batch = found["distillation/update"].arguments
    assert isinstance(state, TrainState) and isinstance(batch, DistillationBatch)
    rows, width = config.distillation.batch_size, config.distillation.sampling.max_new_tokens
    assert state.memory.responses.shape == (4, rows // 2, width)
    asked = [a for a in found["distillation/prefill"].arguments if isinstance(a, Inputs)]
    assert [one.tokens.shape[0] for one in asked] == [rows // 2]
    assert batch.other is not None and batch.outcomes is not None
    found["distillation/update"].lower()


def test_arithmetic_is_that_of_the_stage(config: Config) -> None:
    """FLOPs of an update are those that the run reports, and a third more to recompute."""
    mesh = tpu_mesh("v5e:2x2", fsdp=2, tensor=2)
    full = config_lib.override(config, ["model.remat=full"])
    found = {p.name: p.work for p in programs_of(config, mesh)}["distillation/update"]
    more = {p.name: p.work for p in programs_of(full, mesh)}["distillation/update"]
    student = make_model(config, config.model.path, mesh)
    rows, width = config.distillation.batch_size, config.distillation.sampling.max_new_tokens
    pictured = flops.forward_flops(
        student.config,
        tokens=config_lib.sizes(config.data.prompt_buckets)[-1] + width,
        patches=config_lib.sizes(config.data.patch_buckets)[-1],
        predicted=width,
    )
    read = flops.forward_flops(
        student.config,
        tokens=config_lib.sizes(config.data.teacher_buckets)[-1] + width,
        patches=0,
        predicted=width,
    )
    assert found.flops == pytest.approx(rows * (3 * pictured + read) / mesh.size)
    assert more.flops == pytest.approx(rows * (4 * pictured + read) / mesh.size)
    named = config_lib.override(config, ["model.remat=save_names"])
    less = {p.name: p.work for p in programs_of(named, mesh)}["distillation/update"]
    assert found.flops < less.flops < more.flops


@pytest.mark.slow
@pytest.mark.parametrize("draft_tokens", [0, 7])
def test_the_decode_loop_of_4b_copies_nothing(draft_tokens: int) -> None:
    """Batch 64, cache 2,048, 16 v5e: no second cache, and no table gathered for every token."""
    changes = [
        "preflight.stages=('evaluate',)",
        "evaluate.batch_size=64",
        "data.prompt_buckets=(512,)",
        "evaluate.sampling.max_new_tokens=1536",
        f"evaluate.sampling.draft_tokens={draft_tokens}",
    ]
    config = load_config(str(ROOT / "configs" / "qwen3vl.py:4b"), changes)
    mesh = slice_of(config)
    decode = {program.name: program for program in programs_of(config, mesh)}["evaluate/decode"]
    program = decode.lower().compile()
    memory = program.memory_analysis()
    assert memory is not None and memory.temp_size_in_bytes <= 0.5 * 2**30
    assert "[151936,2560]" not in (program.as_text() or "")


def test_a_second_preflight_compiles_nothing(
    config: Config, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither in another workdir, nor what does not fit; a compiler fault is tried again."""
    monkeypatch.setattr(kept, "folder", lambda: epath.Path(tmp_path / "kept"))
    compiler = preflight._compile
    calls: list[int] = []

    def counting(lowered: jax.stages.Lowered, **target: Any) -> dict[str, float]:
        calls.append(1)
        return compiler(lowered, **target)

    monkeypatch.setattr(preflight, "_compile", counting)
    only = config_lib.override(config, ["preflight.only=('distillation/layout',)"])
    tables = []
    for workdir in ("a", "b"):
        preflight.run(only, str(tmp_path / workdir))
        tables.append(json.loads((tmp_path / workdir / "preflight.json").read_text())["results"])
        assert len(calls) == 1
    assert tables[0] == tables[1]
    preflight.run(config_lib.override(only, ["preflight.topology=v6e:2x2"]), str(tmp_path / "c"))
    assert len(calls) == 2

    def failing(lowered: jax.stages.Lowered, **target: Any) -> dict[str, float]:
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault")

    mesh = tpu_mesh("v5e:2x2", fsdp=4)
    array = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=jax.NamedSharding(mesh, jax.P()))
    lowered = jax.jit(lambda x: x + 1).lower(array)
    for asked, error in ((failing, "INTERNAL: a fault"), (compiler, None)):
        monkeypatch.setattr(preflight, "_compile", asked)
        assert preflight.ask_compiler(lowered, "a/b", mesh, V5E).error == error
