"""Checkpoints come back bit for bit, or not at all and with words; nothing half is restored."""

import concurrent.futures
import dataclasses
import json
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import textwrap
from collections.abc import Callable
from typing import Any

import flax.struct
import helpers_devices
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from etils import epath

from mgsd_jax.workdir import checkpoint, checkpoint_files, folders

ROOT = pathlib.Path(__file__).parents[1]
DEVICE = jax.sharding.SingleDeviceSharding(jax.devices()[0])


@pytest.fixture(autouse=True)
def quiet() -> None:
    logging.set_verbosity(logging.WARNING)


@flax.struct.dataclass
class State:
    step: jax.Array
    params: Any
    opt_state: Any


def make_state(seed: int = 0) -> State:
    rng = np.random.default_rng(seed)
    weird = np.array([0x7FC12345, 0x80000000, 0x00000001, 0xFF800000], np.uint32).view(np.float32)
    params = {
        "layers": {"kernel": jnp.asarray(rng.normal(size=(3, 8, 4)), jnp.float32)},
        "half": jnp.asarray(rng.normal(size=(5, 2)), jnp.bfloat16),
        "weird": jnp.asarray(weird),  # a NaN with a payload, -0, a subnormal, -inf
        "key": jax.random.key_data(jax.random.key(seed)),
        "flags": jnp.asarray(rng.integers(0, 2, 7), bool),
        "small": jnp.asarray(rng.integers(-9, 9, (2, 2)), jnp.int8),
    }
    floats = {"layers": params["layers"], "half": params["half"]}
    return State(jnp.int32(seed), params, optax.adamw(1e-3).init(floats))


def abstract(state: Any, sharding: jax.sharding.Sharding = DEVICE) -> Any:
    return jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), state
    )


def assert_same_bits(got: Any, want: Any) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(want)
    for mine, theirs in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        assert mine.dtype == theirs.dtype and mine.shape == theirs.shape
        assert np.asarray(mine).tobytes() == np.asarray(theirs).tobytes()


def write(folder: pathlib.Path, steps: range) -> None:
    """Save `make_state(step)` at every step."""
    checkpointer = checkpoint.open_checkpointer(folder, keep_last=9)
    for step in steps:
        checkpoint.save(checkpointer, step, make_state(step), {"next": step})
    checkpoint.close(checkpointer)


def read(folder: pathlib.Path) -> checkpoint.Restored | None:
    checkpointer = checkpoint.open_checkpointer(folder, keep_last=9)
    restored = checkpoint.restore_latest(checkpointer, abstract(make_state()))
    checkpoint.close(checkpointer)
    return restored


def steps_in(folder: pathlib.Path) -> list[int]:
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def test_restore_gives_back_every_bit_on_its_device(tmp_path: pathlib.Path) -> None:
    data_state = {"shards": [{"index": 3, "name": "a/b"}], "epoch": 2**60, "none": None}
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1)
    assert checkpoint.restore_latest(checkpointer, abstract(make_state())) is None
    checkpoint.save(checkpointer, 5, make_state(3), data_state)
    checkpoint.close(checkpointer)

    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1)
    restored = checkpoint.restore_latest(checkpointer, abstract(make_state(0)))
    checkpoint.close(checkpointer)
    assert restored is not None
    assert_same_bits(restored.state, make_state(3))
    assert isinstance(restored.state, State)
    assert all(leaf.sharding == DEVICE for leaf in jax.tree.leaves(restored.state))
    assert (restored.step, restored.data_state, restored.skipped) == (5, data_state, ())


def test_a_state_of_real_arrays_serves_as_the_abstract_one(tmp_path: pathlib.Path) -> None:
    write(tmp_path, range(1, 2))
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1)
    restored = checkpoint.restore_latest(checkpointer, make_state(0))
    checkpoint.close(checkpointer)
    assert restored is not None
    assert_same_bits(restored.state, make_state(1))


def test_leaves_without_a_sharding_come_back_on_the_host(tmp_path: pathlib.Path) -> None:
    write(tmp_path, range(1, 2))
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1)
    restored = checkpoint.restore_latest(checkpointer, jax.eval_shape(lambda: make_state(0)))
    checkpoint.close(checkpointer)
    assert restored is not None
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(restored.state))
    assert_same_bits(restored.state, make_state(1))


@pytest.mark.parametrize("as_path", [str, pathlib.Path, epath.Path])
def test_folders_may_be_strings_or_paths_relative_or_not(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    as_path: Callable[[Any], Any],
) -> None:
    """And what is read is read without a warning."""
    monkeypatch.chdir(tmp_path)
    write(as_path("run/checkpoints"), range(1, 2))
    caplog.clear()
    assert checkpoint.load_params(as_path(tmp_path / "run" / "checkpoints"))["small"].shape == (
        2,
        2,
    )
    assert not [one for one in caplog.records if one.levelname == "WARNING"]


def test_what_is_saved_is_the_state_at_the_call(tmp_path: pathlib.Path) -> None:
    """Donation and in-place changes right after `save` do not reach the file."""
    size = 300_000
    step = jax.jit(lambda x: x * 2 + 1, donate_argnums=0)
    on_device, on_host = jnp.arange(size, dtype=jnp.float32), np.arange(size)
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1)
    checkpoint.save(checkpointer, 1, {"d": on_device, "h": on_host}, {})
    for _ in range(20):
        on_device = step(on_device)
        on_host += 1
    jax.block_until_ready(on_device)
    checkpoint.wait(checkpointer)
    want = {"d": jnp.arange(size, dtype=jnp.float32), "h": np.arange(size)}
    restored = checkpoint.restore_latest(checkpointer, want)
    checkpoint.close(checkpointer)
    assert restored is not None
    assert_same_bits(restored.state, want)


@pytest.mark.parametrize("best_mode", ["max", "min"])
def test_the_last_k_and_the_best_n_are_kept(tmp_path: pathlib.Path, best_mode: Any) -> None:
    keep_last, keep_best = 2, 2
    rng = np.random.default_rng(0)
    values: list[float | None] = [*rng.integers(0, 5, 6).tolist(), float("nan"), None, 9, 0, 2, 2]
    worst = float("-inf")

    def rank(step: int) -> tuple[float, int]:
        value = values[step]
        assert value is not None
        signed = value if best_mode == "max" else -value
        return (worst if np.isnan(signed) else signed, step)

    state = {"a": jnp.zeros(2)}
    kept: set[int] = set()
    for start in (0, 7):  # in two runs: ranks are read back from the folder
        checkpointer = checkpoint.open_checkpointer(
            tmp_path,
            keep_last=keep_last,
            keep_best=keep_best,
            metric="success",
            best_mode=best_mode,
        )
        for step in range(start, 7 if start == 0 else len(values)):
            checkpoint.save(checkpointer, step, state, {}, values[step])
            checkpoint.wait(checkpointer)
            kept.add(step)
            ranked = sorted((s for s in kept if values[s] is not None), key=rank)
            kept = set(sorted(kept)[-keep_last:]) | set(ranked[-keep_best:])
            assert steps_in(tmp_path) == sorted(kept)
        checkpoint.close(checkpointer)


def test_a_step_is_saved_once_and_in_order(tmp_path: pathlib.Path) -> None:
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=2)
    state = {"a": jnp.zeros(2)}
    checkpoint.save(checkpointer, 3, state, {})
    for step in (2, 3):
        with pytest.raises(ValueError, match=f"got step {step}, want one after 3"):
            checkpoint.save(checkpointer, step, state, {})
    checkpoint.close(checkpointer)


def test_what_cannot_be_saved_is_refused_at_once(tmp_path: pathlib.Path) -> None:
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1, keep_best=1, metric="m")
    state = {"a": jnp.zeros(2)}
    with pytest.raises(ValueError, match="data_state"):
        checkpoint.save(checkpointer, 1, state, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="data_state"):
        checkpoint.save(checkpointer, 1, state, {"a": b"x"})
    with pytest.raises(ValueError, match=r"a/b .*float"):
        checkpoint.save(checkpointer, 1, {"a": {"b": 1.0}}, {})
    checkpoint.save(checkpointer, 1, state, {})
    checkpoint.close(checkpointer)
    for keep_last, keep_best in ((0, 0), (1, 1)):
        with pytest.raises(ValueError, match="keep_"):
            checkpoint.open_checkpointer(tmp_path, keep_last=keep_last, keep_best=keep_best)


def delete(path: pathlib.Path) -> None:
    path.unlink()


def truncate(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def grow(path: pathlib.Path) -> None:
    path.write_bytes(path.read_bytes() + b" ")


def flip(path: pathlib.Path) -> None:
    """One bit anywhere, another one in every run of the test."""
    content = bytearray(path.read_bytes())
    place = random.randrange(8 * len(content))
    content[place // 8] ^= 1 << place % 8
    path.write_bytes(bytes(content))


def add_one_beside(path: pathlib.Path) -> None:
    path.with_name("another").write_bytes(path.read_bytes())


def damage_unlisted(folder: pathlib.Path, step: str, name: str) -> None:
    """Takes a file away such that the file list knows nothing of it."""
    delete(folder / step / name)
    checkpoint_files.write_file_list(epath.Path(folder), int(step))


@pytest.fixture(scope="module")
def two_steps(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("two_steps")
    write(folder, range(1, 3))
    return folder


@pytest.mark.parametrize("damage", [delete, truncate, grow, flip, add_one_beside])
def test_damage_to_any_file_is_seen_or_does_not_matter(
    two_steps: pathlib.Path, tmp_path: pathlib.Path, damage: Callable[[pathlib.Path], None]
) -> None:
    names = [path.relative_to(two_steps) for path in (two_steps / "2").rglob("*") if path.is_file()]
    assert len(names) > 10
    unseen = set()
    for number, name in enumerate(names):
        folder = tmp_path / str(number)
        shutil.copytree(two_steps, folder)
        damage(folder / name)
        before = files_of(folder)
        loaded = checkpoint.load_params(folder)
        assert files_of(folder) == before
        restored = read(folder)
        assert restored is not None
        assert_same_bits(restored.state, make_state(restored.step))
        assert_same_bits(loaded, make_state(restored.step).params)
        if restored.step == 2:
            assert restored.skipped == ()
            unseen.add(name.as_posix())
            continue
        (reason,) = restored.skipped
        assert reason.startswith("2: ")
        assert (folder / "unreadable" / "2-0").is_dir() and steps_in(folder) == [1]
    # Written by orbax after the file list, and no array is read by them; a space ends the list.
    harmless = {"2/files.json"} if damage is grow else set()
    assert unseen <= {"2/_CHECKPOINT_METADATA", "2/commit_success.txt"} | harmless


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"\xff", b"null", b"[]", b"{}", b"7", b'"a"', b"[" * 100_000, b"9" * 5000),
        *(
            b'{"data_state/metadata": 2}',
            b'{"data_state/metadata": [2]}',
            b'{"data_state/metadata": [2, "a"]}',
        ),
        *(
            b'{"data_state/metadata": [2, 1.5]}',
            b'{"data_state/metadata": [true, 1]}',
            b'{"a": [1, 2]}',
        ),
        *(b'{"data_state/metadata": {"0": 2, "1": 1}}', b'{"data_state/metadata": null}'),
    ],
)
def test_a_file_list_of_another_shape_falls_back(
    two_steps: pathlib.Path, tmp_path: pathlib.Path, content: bytes
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    (folder / "2" / "files.json").write_bytes(content)
    assert_same_bits(checkpoint.load_params(folder), make_state(1).params)
    restored = read(folder)
    assert restored is not None and restored.step == 1
    assert restored.skipped[0].startswith("2: ")


def test_a_large_file_is_compared_whole_by_who_reads_it(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The folder opens quickly; the step that is about to be used is read to its last bit."""
    monkeypatch.setattr(checkpoint_files, "SMALL_BYTES", 1000)
    monkeypatch.setattr(checkpoint_files, "_READ_BYTES", 512)
    noise = np.random.default_rng(0).integers(0, 256, (3, 4000), np.uint8)
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=2, keep_best=1, metric="m")
    for step, score in ((0, 0.0), (1, 2.0), (2, 1.0)):
        checkpoint.save(checkpointer, step, {"params": {"a": noise[step]}}, {}, score)
    checkpoint.close(checkpointer)
    (large,) = [p for p in (tmp_path / "2").rglob("*") if p.stat().st_size >= 4000 and p.is_file()]
    content = large.read_bytes()
    for place in (0, 511, 512, 2100, len(content) - 1):
        large.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert list(checkpoint_files.scan(epath.Path(tmp_path)).values()) == ["", ""]
        name = large.relative_to(tmp_path / "2").as_posix()
        problem = checkpoint_files.damage(epath.Path(tmp_path / "2"))
        assert problem == f"{name} has other contents than were written"
        np.testing.assert_array_equal(checkpoint.load_params(tmp_path)["a"], noise[1])
    shares = [checkpoint_files.damage(epath.Path(tmp_path / "2"), share=(i, 3)) for i in range(3)]
    assert sorted(shares) == ["", "", problem]  # each process reads its part, and all are told
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=2)
    restored = checkpoint.restore_latest(checkpointer, {"params": {"a": noise[0]}})
    checkpoint.close(checkpointer)
    assert restored is not None and restored.step == 1
    assert restored.skipped == (f"2: {problem}",) and steps_in(tmp_path) == [1]


def test_damage_that_only_orbax_finds_falls_back_too(
    two_steps: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    damage_unlisted(folder, "2", "state/manifest.ocdbt")
    restored = read(folder)
    assert restored is not None and restored.step == 1
    assert len(restored.skipped) == 1 and "ValueError" in restored.skipped[0]
    assert steps_in(folder) == [1] and (folder / "unreadable" / "2-0").is_dir()
    # The number is free again, in the folder and aside.
    write(folder, range(2, 3))
    again = read(folder)
    assert again is not None and again.step == 2 and again.skipped == ()
    delete(folder / "2" / "state" / "manifest.ocdbt")
    again = read(folder)
    assert again is not None and again.step == 1
    assert sorted(path.name for path in (folder / "unreadable").iterdir()) == ["2-0", "2-1"]


def test_fallback_goes_over_several(two_steps: pathlib.Path, tmp_path: pathlib.Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    write(folder, range(3, 6))
    truncate(folder / "5" / "state" / "_METADATA")
    shutil.rmtree(folder / "4" / "state" / "ocdbt.process_0" / "d")
    damage_unlisted(folder, "3", "data_state/metadata")
    restored = read(folder)
    assert restored is not None and restored.step == 2
    assert sorted(reason[0] for reason in restored.skipped) == ["3", "4", "5"]
    assert steps_in(folder) == [1, 2]


@pytest.mark.parametrize("with_list", [True, False])
def test_none_readable_is_an_error_that_touches_nothing(
    two_steps: pathlib.Path, tmp_path: pathlib.Path, with_list: bool
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    for step in ("1", "2"):
        if with_list:
            delete(folder / step / "state" / "manifest.ocdbt")
        else:
            damage_unlisted(folder, step, "state/manifest.ocdbt")
    with pytest.raises(ValueError) as raised:
        read(folder)
    assert all(part in str(raised.value) for part in (str(folder), "1: ", "2: "))
    assert steps_in(folder) == [1, 2] and not (folder / "unreadable").exists()


def test_a_half_written_checkpoint_is_dropped_and_counted(
    two_steps: pathlib.Path, tmp_path: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    shutil.move(folder / "2", folder / "2.orbax-checkpoint-tmp")
    with caplog.at_level("WARNING", logger="absl"):
        restored = read(folder)
    assert restored is not None and restored.step == 1
    assert restored.skipped == ("2.orbax-checkpoint-tmp: half-written",)
    assert any("2.orbax-checkpoint-tmp: half-written" in message for message in caplog.messages)
    assert [path.name for path in folder.iterdir()] == ["1"]


def test_a_run_killed_in_its_first_save_starts_over(
    two_steps: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    shutil.copytree(two_steps / "1", folder / "1.orbax-checkpoint-tmp")
    assert read(folder) is None
    assert list(folder.iterdir()) == []


def test_differences_are_listed_together_and_nothing_is_moved(
    two_steps: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    state = make_state()
    params = dict(state.params)
    params["layers"] = {"kernel": jnp.zeros((3, 8, 5))}
    params["half"] = params["half"].astype(jnp.float32)
    params["added"] = params.pop("flags")
    changed = dataclasses.replace(state, params=params)
    checkpointer = checkpoint.open_checkpointer(folder, keep_last=2)
    with pytest.raises(ValueError) as raised:
        checkpoint.restore_latest(checkpointer, abstract(changed))
    checkpoint.close(checkpointer)
    for part in (
        "step 2",
        "params/layers/kernel: got float32[3, 8, 4], want float32[3, 8, 5]",
        "params/half: got bfloat16[5, 2], want float32[5, 2]",
        "params/added: got nothing, want bool[7]",
        "params/flags: got bool[7], want nothing",
    ):
        assert part in str(raised.value)
    assert "opt_state" not in str(raised.value)
    assert steps_in(folder) == [1, 2]


def files_of(folder: pathlib.Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_load_params_reads_the_parameters_of_the_last_or_the_best(tmp_path: pathlib.Path) -> None:
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1, keep_best=2, metric="m")
    for step, value in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None)):
        checkpoint.save(checkpointer, step, make_state(step), {}, value)
    checkpoint.close(checkpointer)
    before = files_of(tmp_path)
    for which, step in (("last", 4), ("best", 2)):
        loaded = checkpoint.load_params(tmp_path, which=which)
        assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(loaded))
        assert_same_bits(loaded, make_state(step).params)
    placed = checkpoint.load_params(tmp_path, abstract, which="best", metric="m")
    assert all(leaf.sharding == DEVICE for leaf in jax.tree.leaves(placed))
    assert_same_bits(placed, make_state(2).params)
    with pytest.raises(ValueError, match="want by 'n'"):
        checkpoint.load_params(tmp_path, which="best", metric="n")
    assert files_of(tmp_path) == before


def test_load_params_passes_over_what_is_damaged_and_moves_nothing(
    two_steps: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(two_steps, folder)
    delete(folder / "2" / "state" / "manifest.ocdbt")
    shutil.copytree(folder / "1", folder / "3.orbax-checkpoint-tmp")
    before = files_of(folder)
    assert_same_bits(checkpoint.load_params(folder), make_state(1).params)
    assert files_of(folder) == before
    with pytest.raises(ValueError, match=r"'best'.*2: "):
        checkpoint.load_params(folder, which="best")  # no checkpoint has a rank
    with pytest.raises(ValueError, match="none there"):
        checkpoint.load_params(tmp_path / "elsewhere")


def test_a_field_newer_than_the_run_has_its_default_there(tmp_path: pathlib.Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"optim": {"lr": 1.0}}))
    newer = {"optim": {"lr": 1.0, "clip": 2.0}}
    folders.check_config(tmp_path, newer, defaults={"optim": {"clip": 2.0, "lr": 5.0}, "x": 1})
    with pytest.raises(ValueError, match=r"optim\.clip: got 2\.0, want 3\.0"):
        folders.check_config(tmp_path, newer, defaults={"optim": {"clip": 3.0}})
    with pytest.raises(ValueError, match=r"optim\.clip: got 2\.0, want nothing"):
        folders.check_config(tmp_path, newer)


def test_check_config_lists_the_fields_that_differ(tmp_path: pathlib.Path) -> None:
    theirs = {"optim": {"lr": 1e-4, "steps": 5}, "levels": (3, 4), "name": "a", "log": {"every": 1}}
    folders.check_config(tmp_path, theirs)  # an unused folder is anyone's
    folders.write_run_info(tmp_path, theirs)
    folders.check_config(tmp_path, theirs)
    ours = {"optim": {"lr": 1e-3, "steps": 5}, "levels": (3, 5), "new": 1, "log": {"every": 2}}
    with pytest.raises(ValueError) as raised:
        folders.check_config(tmp_path, ours, ignore=("log", "optim.step"))
    message = str(raised.value)
    for part in (
        str(tmp_path),
        "optim.lr: got 0.001, want 0.0001",
        "levels: got [3, 5], want [3, 4]",
        "name: got nothing, want 'a'",
        "new: got 1, want nothing",
    ):
        assert part in message
    assert "log" not in message and "steps" not in message
    folders.check_config(tmp_path, ours, ignore=("log", "optim", "levels", "name", "new"))


def test_a_data_state_for_every_process_as_version_0_2_wrote_it(tmp_path: pathlib.Path) -> None:
    write(tmp_path, range(1, 2))
    path = tmp_path / "1" / "data_state" / "metadata"
    assert json.loads(path.read_text()) == {"processes": [{"next": 1}]}
    path.write_text(json.dumps({"processes": [{"next": 4}, {"next": 4}]}))
    checkpoint_files.write_file_list(epath.Path(tmp_path), 1)
    restored = read(tmp_path)
    assert restored is not None and restored.data_state == {"next": 4}


def run_python(
    code: str, *arguments: object, before: tuple[str, ...] = (), returns: int = 0, **env: str
) -> None:
    """Run `code` in a fresh interpreter, which has to return `returns`."""
    result = subprocess.run(
        [*before, sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        cwd=ROOT,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT), **env},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert result.returncode == returns, result.stderr[-4000:]


def test_a_kill_during_a_save_leaves_the_one_before(tmp_path: pathlib.Path) -> None:
    code = """
        import os, signal, sys
        import numpy as np
        from mgsd_jax.workdir import checkpoint, checkpoint_files
        checkpointer = checkpoint.open_checkpointer(sys.argv[1], keep_last=1)
        checkpoint.save(checkpointer, 1, {"a": np.arange(1000)}, {"next": 1})
        checkpoint.wait(checkpointer)
        kill = lambda *arguments: os.kill(os.getpid(), signal.SIGKILL)
        checkpoint_files.write_file_list = kill  # all arrays are written, the rename is not done
        checkpoint.save(checkpointer, 2, {"a": np.arange(1000) + 1}, {"next": 2})
        checkpoint.wait(checkpointer)
    """
    run_python(code, tmp_path, returns=-signal.SIGKILL)
    assert (tmp_path / "2.orbax-checkpoint-tmp").is_dir()
    checkpointer = checkpoint.open_checkpointer(tmp_path, keep_last=1)
    restored = checkpoint.restore_latest(checkpointer, {"a": np.zeros(1000, int)})
    checkpoint.close(checkpointer)
    assert restored is not None and restored.step == 1 and restored.data_state == {"next": 1}
    assert_same_bits(restored.state, {"a": np.arange(1000)})
    assert restored.skipped == ("2.orbax-checkpoint-tmp: half-written",)


def can_mount() -> bool:
    command = ["unshare", "-rm", "sh", "-c", "mount -t tmpfs tmpfs /mnt"]
    return bool(shutil.which("unshare")) and not subprocess.run(command, check=False).returncode


def test_a_full_disk_is_an_error_in_words_and_loses_nothing(tmp_path: pathlib.Path) -> None:
    if not can_mount():
        pytest.skip("needs the right to mount a small tmpfs in a namespace of its own")
    code = """
        import errno, os, shutil, sys
        import numpy as np
        from mgsd_jax.workdir import checkpoint
        def make(step):
            return {"params": {"a": np.random.default_rng(step).normal(size=60_000)}}
        for attempt in range(2):
            folder = f"{sys.argv[1]}/{attempt}"
            checkpointer = checkpoint.open_checkpointer(folder, keep_last=1)
            for step in (1, 2):
                checkpoint.save(checkpointer, step, make(step), {"next": step})
                checkpoint.wait(checkpointer)
            with open(f"{folder}/filler", "wb") as filler:
                filler.write(bytes(400_000))
            try:
                checkpoint.save(checkpointer, 3, make(3), {"next": 3})
                checkpoint.wait(checkpointer)
            except OSError as error:
                assert error.errno == errno.ENOSPC and folder in str(error), error
                assert "checkpoint 3" in str(error) and "480000 bytes" in str(error), error
            else:
                raise AssertionError("the disk was not full")
            restored = checkpoint.restore_latest(checkpointer, make(2))
            assert restored.step == 2
            np.testing.assert_array_equal(restored.state["params"]["a"], make(2)["params"]["a"])
            os.remove(f"{folder}/filler")
            checkpoint.save(checkpointer, 4, make(4), {"next": 4})
            checkpoint.close(checkpointer)
            assert os.listdir(folder) == ["4"], os.listdir(folder)
            restored = checkpoint.load_params(folder)["a"]
            np.testing.assert_array_equal(restored, make(4)["params"]["a"])
            shutil.rmtree(folder)
    """
    mounted = f'mount -t tmpfs -o size=1200k tmpfs {tmp_path}; "$0" "$@"'
    run_python(code, tmp_path, before=("unshare", "-rm", "sh", "-c", mounted))


@pytest.mark.slow
def test_restores_onto_another_sharding(tmp_path: pathlib.Path) -> None:
    code = """
        import sys
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        from mgsd_jax.workdir import checkpoint
        assert jax.device_count() == 8
        devices = np.array(jax.devices())
        def shardings(shape, *specs):
            mesh = Mesh(devices[: np.prod(shape)].reshape(shape), ("a", "b"))
            return {n: NamedSharding(mesh, spec) for n, spec in zip("xyz", specs)}
        rng = np.random.default_rng(0)
        host = {"x": rng.normal(size=(16, 8)).astype("float32"),
                "y": rng.integers(0, 2**32, (8,), np.uint32), "z": np.float32(3)}
        layouts = [shardings((4, 2), P("a", "b"), P("b"), P()),
                   shardings((2, 4), P("b", "a"), P(("a", "b")), P()),
                   shardings((1, 1), P(), P(), P()),
                   shardings((8, 1), P(None, "a"), P(), P())]
        for step, layout in enumerate(layouts):
            state = {"params": jax.device_put(host, layout)}
            checkpointer = checkpoint.open_checkpointer(sys.argv[1], keep_last=1)
            checkpoint.save(checkpointer, step, state, {})
            checkpoint.wait(checkpointer)
            for other in layouts:
                one = lambda n: jax.ShapeDtypeStruct(
                    host[n].shape, host[n].dtype, sharding=other[n])
                shapes = {"params": {n: one(n) for n in host}}
                restored = checkpoint.restore_latest(checkpointer, shapes)
                params = checkpoint.load_params(sys.argv[1], lambda saved: shapes["params"])
                for got in (restored.state["params"], params):
                    for n in host:
                        assert np.asarray(got[n]).tobytes() == host[n].tobytes()
                        assert got[n].dtype == host[n].dtype and got[n].sharding == other[n]
            checkpoint.close(checkpointer)
    """
    run_python(code, tmp_path, XLA_FLAGS=helpers_devices.flags(8))


@pytest.mark.slow
def test_two_processes_save_and_restore_together(tmp_path: pathlib.Path) -> None:
    """Both fall back to the same checkpoint, and each has its part of the arrays back."""
    code = """
        import os, pathlib, sys
        import jax, numpy as np
        from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
        folder, port, process = sys.argv[1], sys.argv[2], int(sys.argv[3])
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        jax.distributed.initialize(f"localhost:{port}", 2, process)
        from jax.experimental import multihost_utils
        from mgsd_jax.workdir import checkpoint
        mesh = Mesh(np.array(jax.devices()), ("data",))
        sharding = NamedSharding(mesh, P("data"))
        host = np.arange(8, dtype=np.float32)
        def make(step):
            whole = host + step
            array = jax.make_array_from_callback((8,), sharding, lambda index: whole[index])
            return {"params": {"a": array}}
        checkpointer = checkpoint.open_checkpointer(folder, keep_last=2)
        for step in (1, 2):
            checkpoint.save(checkpointer, step, make(step), {"next": step})
        checkpoint.close(checkpointer)
        multihost_utils.sync_global_devices("saved")
        if process == 0:
            (pathlib.Path(folder) / "2" / "state" / "manifest.ocdbt").unlink()
        multihost_utils.sync_global_devices("damaged")
        checkpointer = checkpoint.open_checkpointer(folder, keep_last=2)
        restored = checkpoint.restore_latest(checkpointer, make(0))
        checkpoint.close(checkpointer)
        assert restored.step == 1 and len(restored.skipped) == 1, restored
        assert restored.data_state == {"next": 1}
        for shard in restored.state["params"]["a"].addressable_shards:
            np.testing.assert_array_equal(shard.data, host[shard.index] + 1)
    """
    with socket.socket() as taken:
        taken.bind(("localhost", 0))
        port = taken.getsockname()[1]
    with concurrent.futures.ThreadPoolExecutor() as pool:
        for done in [pool.submit(run_python, code, tmp_path, port, p) for p in (0, 1)]:
            done.result()
