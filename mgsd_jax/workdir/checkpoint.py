"""Checkpoints of a run: the train state and the position in the data, written by orbax.

A folder holds one sub-folder for each step with two items: `state` (arrays by path) and
`data_state` (JSON). A step appears under its name when it is complete; `checkpoint_files` finds
those that are not, or no longer. Every process has to make every call here, in the same order.
"""

import contextlib
import dataclasses
import errno
import functools
import logging as std_logging
import math
import shutil
from collections.abc import Callable, Generator, Mapping, Sequence
from typing import Literal, NamedTuple

import jax
import orbax.checkpoint as ocp
from absl import logging
from etils import epath
from orbax.checkpoint import checkpoint_managers as managers

from mgsd_jax import tree
from mgsd_jax.checks.fields import Json
from mgsd_jax.parallel import processes
from mgsd_jax.tree import Tree
from mgsd_jax.workdir import checkpoint_files as files
from mgsd_jax.workdir import checkpoint_state as states
from mgsd_jax.workdir import folders, paths
from mgsd_jax.workdir.checkpoint_state import PyTree


class Restored(NamedTuple):
    """What `restore_latest` found."""

    step: int
    state: PyTree  # like the abstract state
    data_state: Json
    skipped: tuple[str, ...]  # checkpoints that could not be used, each with the reason


@dataclasses.dataclass(frozen=True)
class Checkpointer:
    """An opened folder; see `open_checkpointer`."""

    folder: epath.Path
    manager: ocp.CheckpointManager
    metric: str | None
    best_mode: Literal["max", "min"]
    skipped: tuple[str, ...]  # half-written and damaged checkpoints found on opening
    pending: dict[str, int]  # step and bytes of the latest save, for its error message


def open_checkpointer(
    folder: epath.PathLike,
    *,
    keep_last: int,
    keep_best: int = 0,
    metric: str | None = None,
    best_mode: Literal["max", "min"] = "max",
) -> Checkpointer:
    """Return a Checkpointer that keeps the last `keep_last` and the best `keep_best` checkpoints.

    Best by `metric` in `best_mode`, ties to the later, NaN the worst. Half-written checkpoints of
    a killed run are deleted, damaged ones are moved to `unreadable/`; both are logged and noted in
    `skipped`. Raises ValueError, and touches nothing, where all checkpoints are damaged. Large
    files are compared by their size here, and whole by whoever reads them.
    """
    if keep_last < 1 or keep_best < 0:
        raise ValueError(f"got keep_last {keep_last}, keep_best {keep_best}, want >= 1 and >= 0")
    if keep_best and metric is None:
        raise ValueError(f"keep_best: got {keep_best} without a metric, want the metric's name")
    folder = paths.absolute(folder)
    found = _scan(folder)
    skipped = tuple(f"{name}: {problem}" for name, problem in found.items() if problem)
    damaged = [name for name, problem in found.items() if problem not in ("", files.HALF_WRITTEN)]
    if damaged and "" not in found.values():
        raise ValueError(f"{folder}: no checkpoint can be read: {'; '.join(skipped)}")
    for reason in skipped:
        logging.warning("%s: not using checkpoint %s", folder, reason)
    _clean(folder, damaged)
    policies: list[managers.PreservationPolicy] = [managers.LatestN(keep_last)]
    if keep_best:
        policies.append(
            managers.BestN(
                get_metric_fn=_score, n=keep_best, keep_checkpoints_without_metrics=False
            )
        )
    pending: dict[str, int] = {}
    # orbax calls this when the files are complete and before it renames: one commit has both.
    on_complete = functools.partial(_write_file_list, folder, pending)
    options = ocp.CheckpointManagerOptions(
        best_fn=_score if metric is not None else None,
        preservation_policy=managers.AnyPreservationPolicy(policies),
        async_options=ocp.AsyncOptions(post_finalization_callback=on_complete),
    )
    manager = ocp.CheckpointManager(folder, item_handlers=states.handlers(), options=options)
    return Checkpointer(folder, manager, metric, best_mode, skipped, pending)


def save(
    checkpointer: Checkpointer,
    step: int,
    state: PyTree,
    data_state: Mapping[str, object],
    score: float | None = None,
) -> None:
    """Save a checkpoint.

    Returns once the arrays are copied off the devices (they may be donated then) and writes in
    the background, after waiting for the save before. `state` has array leaves; `data_state` holds
    JSON values, the same ones on every process. `score` is the value of the checkpointer's metric;
    without it a checkpoint is never among the best. Raises ValueError for a step that is not after
    the last, and OSError, with folder and bytes, where no space is left for this save or was left
    for the one before.
    """
    wait(checkpointer)
    manager, metric = checkpointer.manager, checkpointer.metric
    latest = manager.latest_step()
    if latest is not None and step <= latest:
        raise ValueError(f"{checkpointer.folder}: got step {step}, want one after {latest}")
    leaves = states.named_arrays(state)
    items = ocp.args.Composite(
        state=ocp.args.PyTreeSave(tree.nest(leaves.items())),
        # A list, which once had an entry for every process.
        data_state=ocp.args.JsonSave({"processes": [folders.to_json(data_state, "data_state")]}),
    )
    # The name goes along for readers that know no config.
    rank = {"name": metric, "mode": checkpointer.best_mode, "value": score}
    is_ranked = metric is not None and score is not None
    num_bytes = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in leaves.values())
    checkpointer.pending.update(step=step, bytes=num_bytes)
    with _explain_failure(checkpointer):
        manager.save(step, args=items, metrics=rank if is_ranked else None, force=True)


def wait(checkpointer: Checkpointer) -> None:
    """Wait until the save under way is on disk; raises what went wrong with it, as `save` does."""
    with _explain_failure(checkpointer):
        checkpointer.manager.wait_until_finished()


def close(checkpointer: Checkpointer) -> None:
    """Wait for the save under way, and let go of the folder."""
    try:
        wait(checkpointer)
    finally:
        checkpointer.manager.close()


def restore_latest(checkpointer: Checkpointer, abstract_state: PyTree) -> Restored | None:
    """Return the newest readable checkpoint, bit for bit; None where there never was one.

    `abstract_state` has the tree, shapes and dtypes of the saved state, and the shardings that
    the result gets, whatever it was saved with; leaves without one come back as np.ndarray.
    A checkpoint that cannot be read is logged, noted in `skipped` and moved to `unreadable/`.
    Raises ValueError where none can be read, and one that lists every difference where the
    newest readable one has another tree, shape or dtype.
    """
    manager, folder = checkpointer.manager, checkpointer.folder
    wanted = states.named_arrays(abstract_state)
    skipped = checkpointer.skipped
    failed: list[str] = []
    for step in sorted(manager.all_steps(), reverse=True):
        try:
            _check_contents(folder, step)
            saved = dict(tree.named_leaves(states.saved_shapes(manager, step)))
            states.check_same(saved, wanted, f"{folder}, step {step}")
            state, data_state = states.restore(
                manager, step, tree.nest(wanted.items()), with_data_state=True
            )
        except states.Unreadable as error:
            failed.append(str(step))
            skipped = (*skipped, f"{step}: {error}")
            logging.warning("%s: not using checkpoint %d: %s", folder, step, error)
            continue
        if failed:
            _clean(folder, failed)
            manager.reload()
        arrays = dict(tree.named_leaves(state))
        structure = jax.tree.structure(abstract_state)
        state = jax.tree.unflatten(structure, [arrays[path] for path in wanted])
        return Restored(step, state, data_state["processes"][0], skipped)
    if failed:
        raise ValueError(f"{folder}: no checkpoint can be read: {'; '.join(skipped)}")
    return None


def load_params(
    folder: epath.PathLike,
    place: Callable[[Tree], Tree] = lambda shapes: shapes,
    *,
    which: Literal["last", "best"] = "last",
    metric: str | None = None,
) -> Tree:
    """Return the `params` of the saved state of the newest or the best readable checkpoint.

    Nothing else is read, and the folder is left as it is. `best` goes by the metric that ranked
    the checkpoints when they were saved, which has to be `metric` where one is given. `place` gives
    shardings to the saved shapes (nested dicts of jax.ShapeDtypeStruct); leaves without one come
    back as np.ndarray. Raises ValueError where nothing can be read.
    """
    folder = paths.absolute(folder)
    found = _scan(folder)
    skipped = [f"{name}: {problem}" for name, problem in found.items() if problem]
    steps = sorted(int(name) for name, problem in found.items() if not problem)
    with _open_to_read(folder) as manager:
        if which == "best":
            steps = _ranked(manager, steps, metric)
        for step in reversed(steps):
            try:
                _check_contents(folder, step)
                target = place(tree.get(states.saved_shapes(manager, step), "params"))
                state, _ = states.restore(manager, step, {"params": target})
            except states.Unreadable as error:
                skipped.append(f"{step}: {error}")
                continue
            for reason in skipped:
                logging.warning("%s: not using checkpoint %s", folder, reason)
            logging.info("%s: loaded the parameters of checkpoint %d (%s)", folder, step, which)
            return state["params"]
    reasons = "; ".join(skipped) or "none there"
    raise ValueError(f"{folder}: no checkpoint for {which!r} can be read: {reasons}")


def _open_to_read(folder: epath.Path) -> ocp.CheckpointManager:
    """A manager of the folder that changes nothing; orbax would warn of just that."""
    # Metrics are read one by one, later: a damaged one must not keep the folder from opening.
    options = ocp.CheckpointManagerOptions(
        read_only=True, create=False, save_interval_steps=0, lightweight_initialize=True
    )
    logger = logging.get_absl_logger()
    logger.addFilter(_is_no_remark)
    try:
        return ocp.CheckpointManager(folder, item_handlers=states.handlers(), options=options)
    finally:
        logger.removeFilter(_is_no_remark)


def _is_no_remark(record: std_logging.LogRecord) -> bool:
    return not record.getMessage().startswith("Given directory is read only")


def _scan(folder: epath.Path) -> dict[str, str]:
    """`files.scan` by process 0, sent to all, so that all restore the same checkpoint."""
    return processes.gather(files.scan(folder) if jax.process_index() == 0 else None)[0]


def _check_contents(folder: epath.Path, step: int) -> None:
    """Raises Unreadable, in all processes, where a file of the step is not what was written."""
    share = (jax.process_index(), jax.process_count())
    for problem in processes.gather(files.damage(folder / str(step), share=share)):
        if problem:
            raise states.Unreadable(problem)


def _clean(folder: epath.Path, damaged: Sequence[str]) -> None:
    if jax.process_index() == 0:
        for name in damaged:
            files.set_aside(folder, name)
        files.remove_half_written(folder)
    processes.gather(None)  # a barrier


def _write_file_list(folder: epath.Path, pending: Mapping[str, int]) -> None:
    if jax.process_index() == 0:
        files.write_file_list(folder, pending["step"])


@contextlib.contextmanager
def _explain_failure(checkpointer: Checkpointer) -> Generator[None]:
    """Says so where a save found no space, and deletes what it has written.

    After any other failure, and with several processes, orbax may still be writing there.
    """
    try:
        yield
    except (OSError, ValueError) as error:
        folder, pending = checkpointer.folder, checkpointer.pending
        # tensorstore raises ValueError with the system's words in it.
        if "No space left" not in str(error) and getattr(error, "errno", None) != errno.ENOSPC:
            raise
        if jax.process_count() == 1:
            files.remove_half_written(folder)
            checkpointer.manager.reload()
        free = "" if paths.is_remote(folder) else f", {shutil.disk_usage(folder).free} are free"
        message = (
            f"no space left for checkpoint {pending['step']}, which needs up to "
            f"{pending['bytes']} bytes{free}; earlier checkpoints are kept"
        )
        raise OSError(errno.ENOSPC, message, str(folder)) from error


def _score(rank: Json) -> float:
    value = rank["value"] if rank["mode"] == "max" else -rank["value"]
    return -math.inf if math.isnan(value) else value


def _ranked(manager: ocp.CheckpointManager, steps: list[int], metric: str | None) -> list[int]:
    """The steps that have a rank, the best last."""
    ranks = {step: rank for step in steps if (rank := manager.metrics(step))}
    names = {rank["name"] for rank in ranks.values()}
    if len(names) > 1 or (metric is not None and names - {metric}):
        want = "one metric" if metric is None else repr(metric)
        raise ValueError(f"{manager.directory}: got ranks by {sorted(names)}, want by {want}")
    return sorted(ranks, key=lambda step: (_score(ranks[step]), step))
