"""A run whose workdir is a bucket: every file of it goes through etils, none beside it.

No bucket is to be had in a test. `gs://` is given a file system of its own, that of a local folder
which refuses to append as buckets do; tensorstore, which has its own way to a bucket, is sent to
the same folder. Orbax and all of our code take the way that they take for a bucket.
"""

import collections
import pathlib
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from absl import logging
from etils import epath
from etils.epath import backend
from fsspec.implementations.dirfs import DirFileSystem
from fsspec.implementations.local import LocalFileSystem
from helpers_tiny import tiny_config
from jax.experimental.compilation_cache import compilation_cache
from orbax.checkpoint._src.path import gcs_utils

from mgsd_jax.config import override
from mgsd_jax.data import boards
from mgsd_jax.data.boards import read_split
from mgsd_jax.stages import generate, init, loading
from mgsd_jax.training import optimizer, sessions
from mgsd_jax.workdir import checkpoint, compiled, folders, locks, metrics, paths, stage_folder

CACHE_SETTINGS = (
    "jax_compilation_cache_dir",
    "jax_persistent_cache_min_compile_time_secs",
    "jax_persistent_cache_enable_xla_caches",
)


def bucket_system(folder: pathlib.Path) -> type[DirFileSystem]:
    """A file system in which gs://a/b is {folder}/a/b."""

    class Bucket(DirFileSystem):
        cachable = False

        def __init__(self, **options: Any) -> None:
            super().__init__(path=str(folder), fs=LocalFileSystem())

        def _join(self, path: Any) -> Any:
            strip = lambda p: p.removeprefix("gs://").removeprefix("gcs://")  # noqa: E731
            return super()._join(strip(path) if isinstance(path, str) else [*map(strip, path)])

        def open(self, path: str, mode: str = "rb", **options: Any) -> Any:
            assert "a" not in mode and "+" not in mode, f"{path}: a bucket cannot append"
            return super().open(path, mode, **options)

    return Bucket


@pytest.fixture
def bucket(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[pathlib.Path]:
    logging.set_verbosity(logging.WARNING)
    folder = tmp_path / "bucket"
    system = bucket_system(folder)()
    (folder / "b").mkdir(parents=True)
    monkeypatch.setattr(
        type(backend.fsspec_backend), "_get_filesystem", lambda self, name: system, raising=True
    )

    def to_folder(path: str) -> dict[str, Any]:
        return {"driver": "file", "path": str(folder / path.removeprefix("gs://"))}

    monkeypatch.setattr(gcs_utils, "get_kvstore_for_gcs", to_folder)
    monkeypatch.setattr(gcs_utils, "is_hierarchical_namespace_enabled", lambda path: False)
    monkeypatch.chdir(tmp_path)
    yield folder
    assert not (tmp_path / "gs:").exists(), "something took a URL for a local path"


def test_a_file_is_replaced_whole_here_and_there(
    bucket: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    for path, real in ((tmp_path / "a", tmp_path / "a"), ("gs://b/a", bucket / "b" / "a")):
        for text in ("one", "two"):
            paths.write_whole(path, text)
            assert real.read_text() == text
    assert [p.name for p in tmp_path.iterdir() if p.is_file()] == ["a"]
    assert str(paths.absolute("gs://b/a")) == "gs://b/a"
    assert str(paths.absolute("a")) == str(tmp_path / "a")
    with paths.local_files("gs://b") as local:
        assert (local / "a").read_text() == "two"
    assert not local.exists()


class Batches:
    def get_state(self) -> dict[str, int]:
        return {"next": 3}

    def set_state(self, state: dict[str, int]) -> None:
        assert state == {"next": 3}


def test_a_stage_keeps_everything_in_the_bucket_and_goes_on_from_there(
    bucket: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Config, metrics, events and checkpoints; a second session starts after the last save."""
    config = override(tiny_config(tmp_path), ["checkpoint.keep_last=1"])
    folder = epath.Path("gs://b/run/grounding")
    monkeypatch.setattr(locks, "SETTLE", 0.01)
    with folders.claimed(folder, config, ("grounding",)) as claim:
        claim.record()
    with pytest.raises(ValueError, match=r"/grounding/config.json: grounding.optim.lr: got 5.0"):
        other = override(config, ["grounding.optim.lr=5.0"])
        with folders.claimed(folder, other, ("grounding",)):
            pass
    tx = optax.sgd(1.0)
    state = optimizer.init({"a": jnp.zeros(2)}, tx)
    loader: Any = Batches()
    for start, stop in ((0, 3), (2, 4)):
        opened = sessions.open_session(
            claim, config, state, loader, metric="m", best_mode="max", steps=4
        )
        with opened as session:
            assert session.start == start
            here = session.state
            for step in range(start + 1, stop + 1):
                here, norms = optimizer.update(here, {"a": jnp.ones(2)}, tx)
                session.finish_step(step, here, {"loss": jnp.float32(step), **norms})
    real = bucket / "b" / "run" / "grounding"
    assert [row["step"] for row in metrics.read_metrics(f"{folder}/metrics.jsonl")] == [1, 2, 3, 4]
    np.testing.assert_array_equal(checkpoint.load_params(folder / "checkpoints")["a"], [-4, -4])
    damaged = next((real / "checkpoints" / "4" / "state" / "d").iterdir())
    damaged.write_bytes(bytes([damaged.read_bytes()[0] ^ 1]) + damaged.read_bytes()[1:])
    with pytest.raises(ValueError, match=f"4: state/d/{damaged.name} has other contents"):
        checkpoint.load_params(folder / "checkpoints")
    assert len((real / "runs.jsonl").read_text().splitlines()) == 1
    assert list((real / "tensorboard").iterdir()) and (real / "config.json").is_file()


def test_boards_and_side_files_come_from_the_bucket(
    bucket: pathlib.Path, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = override(tiny_config(tmp_path), ["data.folder=" + str(tmp_path / "data")])
    init.run(config, str(tmp_path))
    generate.run(config, str(tmp_path))
    (tmp_path / "data").rename(bucket / "b" / "data")
    whole = read_split("gs://b/data", "train")
    assert len(whole) == 24
    read_board, read = boards._read_board, []

    def noted(*place: Any) -> boards.Board:
        read.append(place[2])
        return read_board(*place)

    monkeypatch.setattr(boards, "_read_board", noted)
    part = read_split("gs://b/data", "train", (1, 4))
    assert len(read) == 6, "a quarter of the boards"
    assert list(part) == list(whole) and part[3:5] == [whole[3], whole[4]]

    # A stage folder in the bucket: side files copied there, weights from the local base.
    loaded = loading.load(config.model.path, config)
    source = stage_folder.Source(config.model.path, config.grounding.lora, True, metric="m")
    stage_folder.write_source(epath.Path("gs://b/run/grounding"), source, loaded.folder)
    saver = checkpoint.open_checkpointer("gs://b/run/grounding/checkpoints", keep_last=1)
    checkpoint.save(saver, 1, {"params": {"params": loaded.params}}, {})
    checkpoint.close(saver)
    again = loading.load("gs://b/run/grounding", config)
    assert again.processor.eos_ids == loaded.processor.eos_ids
    assert again.model.config == loaded.model.config
    with pytest.raises(ValueError, match=r"gs://b/base: got a remote folder of weights, want a lo"):
        (tmp_path / "init").rename(bucket / "b" / "base")
        loading.load("gs://b/base", config)


def test_programs_are_kept_in_the_bucket_and_a_second_start_compiles_none(
    bucket: pathlib.Path, caplog: pytest.LogCaptureFixture
) -> None:
    before = {name: jax.config.values[name] for name in CACHE_SETTINGS}
    counts: collections.Counter[str] = collections.Counter()

    def count(event: str, **_: str | int) -> None:
        counts[event.split("/")[-1]] += 1

    jax.monitoring.register_event_listener(count)
    found = []
    try:
        for _ in range(2):
            jax.clear_caches()
            compilation_cache.reset_cache()
            counts.clear()
            compiled.keep("gs://b/compiled", "runs/a", {})
            assert jax.jit(lambda x: x * 3.5 + 1)(jnp.float32(2)) == 8
            found.append((counts["compile_requests_use_cache"], counts["cache_hits"]))
    finally:
        for name, value in before.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
    (first, _), (second, hits) = found
    assert first == second == hits > 0
    kept = [file.name for file in (bucket / "b" / "compiled").iterdir()]
    assert any(name.startswith("jit__lambda-") and name.endswith("-cache") for name in kept)
    assert not any(name.endswith(".probe") for name in kept) and not caplog.messages
