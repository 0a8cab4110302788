"""Answers the test boards with models and scores the answers: planning, perception, diagnostics.

Every answer is one line of `rows.jsonl` (rows.py); `summary.json` is computed from the rows alone
(summary.py).
"""

import collections
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.checks.fields import Json
from mgsd_jax.config import Config, EvaluateConfig, Mode
from mgsd_jax.data import benchmarks, buckets, loaders
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.boards import Board, case_name
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.evaluation import rows as rows_lib
from mgsd_jax.evaluation import summary
from mgsd_jax.evaluation.scoring import Answer, score_row
from mgsd_jax.parallel import processes, sharding
from mgsd_jax.sampling import endpoint
from mgsd_jax.sampling.answers import BenchmarkEncoder, ask, make_answerer, show, shown_boards
from mgsd_jax.stages import loading
from mgsd_jax.workdir import contents, folders, paths, traces
from mgsd_jax.workdir.progress import Progress, mean_cost, open_progress

# Kinds of work beside the modes: a row of any mode, and a model to load.
ANY = "row"
LOADING = "loading"


@dataclasses.dataclass(frozen=True)
class Job:
    """What a model is still to be asked in one mode: one answer for each of some boards."""

    model: str
    mode: Mode
    attempt: int
    places: Sequence[int]  # of the boards, in the list of all


# Yields the answers of a job in batches, each with the place of its board, in any order.
Asker = Callable[[Job], Iterator[list[tuple[int, Answer]]]]


@dataclasses.dataclass(frozen=True)
class Model:
    """A model that answers: one at hand, or one behind an endpoint."""

    name: str
    identity: str | None  # of its weights; None behind an endpoint, where nobody knows
    load: Callable[[], Asker]


def run(config: Config, workdir: str) -> None:
    """Answers the test boards with every model; writes rows.jsonl and summary.json.

    Rows are on disk before the next batch is asked. A prompt that has an answer is not asked again,
    one whose request failed is. Raises ValueError for boards, models or an endpoint that cannot be
    used.
    """
    given, config = config, config_lib.resolve(config, workdir)
    boards, cases = _test_boards(config)
    models = _models(config, boards)
    sections = ("data", "evaluate", "checkpoint", "seed")
    with (
        folders.claimed(config.evaluate.folder, given, sections) as claim,
        traces.open_tracer(claim.folder, config.metrics.profile) as tracer,
    ):
        _answer(config.evaluate, claim, boards, cases, models, tracer)


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """An evaluation under way: what is asked, where rows go, and what is left."""

    claim: folders.Claim
    boards: Sequence[Board]
    tracer: traces.Tracer
    progress: Progress
    left: collections.Counter[str]  # rows by mode, and models
    unwritten: list[Mapping[str, object]]  # rows of process 0 that are not on disk yet


def _answer(
    settings: EvaluateConfig,
    claim: folders.Claim,
    boards: Sequence[Board],
    cases: Sequence[str],
    models: Sequence[Model],
    tracer: traces.Tracer,
) -> None:
    """Asks for the answers that are missing, and writes the summary."""
    is_main = jax.process_index() == 0
    jobs = _jobs(settings, boards, models, _begin(claim, boards, cases, models))
    total = len(jobs) * len(boards)
    left = collections.Counter({LOADING: len({job.model for job in jobs if job.places})})
    for job in jobs:
        left[job.mode] += len(job.places)
    done = total - sum(len(job.places) for job in jobs)
    with open_progress("evaluate", total, start=done, is_main=is_main, unit="row") as progress:
        evaluation = Evaluation(claim, boards, tracer, progress, left, [])
        for model in models:
            todo = [job for job in jobs if job.model == model.name and job.places]
            if todo:
                _ask(evaluation, model, todo)
    if is_main:
        _write(evaluation)
        _summarize(claim.folder)


def _begin(
    claim: folders.Claim, boards: Sequence[Board], cases: Sequence[str], models: Sequence[Model]
) -> set[rows_lib.Key]:
    """The questions that the folder has answers to.

    Raises ValueError where they are another evaluation's: of other boards, or of other weights.
    """
    folder = claim.folder
    is_main = jax.process_index() == 0
    if is_main:
        write_boards = functools.partial(rows_lib.write_boards, folder, boards, cases)
        if (folder / rows_lib.BOARDS_FILE).exists():
            write_boards()  # raises if they are those of another evaluation
        claim.notes.append(write_boards)
        rows_lib.drop_cut_line(folder)
    answered = {rows_lib.key_of(row) for row in rows_lib.read_rows(folder) if "error" not in row}
    if is_main:
        asked = {name for name, *_ in answered}
        identities = {m.name: m.identity for m in models if m.identity and m.name in asked}
        rows_lib.check_models(folder, identities)
    return answered


def _ask(evaluation: Evaluation, model: Model, jobs: Sequence[Job]) -> None:
    """Asks one model, and lets go of it: memory holds only one."""
    claim, progress = evaluation.claim, evaluation.progress
    started = time.perf_counter()
    asker = model.load()
    if model.identity:
        claim.notes.append(
            functools.partial(rows_lib.add_model, claim.folder, model.name, model.identity)
        )
    evaluation.left[LOADING] -= 1
    progress.spend(LOADING, time.perf_counter() - started - progress.take_compiled())
    for job in jobs:
        started, asked = time.perf_counter(), 0
        for answers in evaluation.tracer.each(asker(job)):
            if jax.process_index() == 0:
                _keep(evaluation, job, answers)
            asked += len(answers)
            seconds = time.perf_counter() - started
            _show(evaluation, job, len(answers), seconds, asked == len(job.places))
            started = time.perf_counter()


def _keep(evaluation: Evaluation, job: Job, answers: Sequence[tuple[int, Answer]]) -> None:
    """Scores answers and writes their rows.

    Failed requests are asked again anyway: they alone claim no folder, and wait for an answer.
    """
    evaluation.unwritten.extend(
        score_row(evaluation.boards[i], job.mode, answer, model=job.model, attempt=job.attempt)
        for i, answer in answers
    )
    if not evaluation.claim.notes or any("error" not in row for row in evaluation.unwritten):
        _write(evaluation)


def _write(evaluation: Evaluation) -> None:
    if evaluation.unwritten:
        evaluation.claim.record()
        rows_lib.append(evaluation.claim.folder, evaluation.unwritten)
        evaluation.unwritten.clear()


def _show(evaluation: Evaluation, job: Job, count: int, seconds: float, is_last: bool) -> None:
    """Shows that `count` answers of a job came in `seconds`."""
    progress, left = evaluation.progress, evaluation.left
    left[job.mode] -= count
    seconds -= progress.take_compiled()  # it does not come again
    for kind in (job.mode, ANY):
        progress.spend(kind, seconds, count)
    todo = collections.Counter[str]()
    for kind, number in left.items():
        # A mode that was not asked yet is taken to cost what the others do.
        todo[kind if kind in progress.spent else ANY] += number
    done = progress.total - sum(number for kind, number in left.items() if kind != LOADING)
    rate = 1 / max(mean_cost(progress.spent[job.mode]), 1e-9)
    told = [f"{job.model} {job.mode}", f"{rate:.3g} rows/s"]
    progress.update(done, todo, told, kept=is_last)


def _jobs(
    settings: EvaluateConfig,
    boards: Sequence[Board],
    models: Sequence[Model],
    answered: Collection[rows_lib.Key],
) -> list[Job]:
    """The jobs of all models, those with nothing left to ask too; equal in every process."""
    jobs = []
    for model in models:
        for mode in settings.modes:
            if mode in settings.reference_only and model.name != settings.reference:
                continue
            for attempt in range(settings.tries):
                keys = ((model.name, mode, (b.task, b.level, b.index), attempt) for b in boards)
                places = [i for i, key in enumerate(keys) if key not in answered]
                jobs.append(Job(model.name, mode, attempt, places))
    # The other processes may not see the files of the first one.
    places = processes.gather([job.places for job in jobs])[0]
    return [dataclasses.replace(job, places=p) for job, p in zip(jobs, places, strict=True)]


def _summarize(folder: epath.Path) -> None:
    rows = rows_lib.read_rows(folder)
    rows_lib.compact(folder, rows)
    result = summary.summarize(rows, source=str(folder / rows_lib.ROWS_FILE))
    paths.write_whole(folder / "summary.json", json.dumps(result, indent=2) + "\n")
    logging.info("%s", _table(result["models"]))
    for name, modes in result["models"].items():
        for mode in modes:
            asked = [row for row in rows_lib.plans(rows, mode) if row["model"] == name]
            cut = sum(row["truncated"] for row in asked)
            if cut:
                logging.warning(
                    "%s, %s: %d of %d answers were cut off at evaluate.sampling.max_new_tokens",
                    name,
                    mode,
                    cut,
                    len(asked),
                )
    failed = sum("error" in row for row in rows)
    if failed:
        logging.warning("%d requests failed and count as failures; run again to ask them", failed)


def _table(models: Mapping[str, Mapping[str, summary.Part]]) -> str:
    """The macro averages of a summary, a model a line and a mode a column."""
    modes = list(dict.fromkeys(mode for measures in models.values() for mode in measures))
    width = max(len(name) for name in ("model", *models))
    lines = [f"{'model':{width}}" + "".join(f"  {mode:>20}" for mode in modes)]
    for name, measures in models.items():
        cells = [_cell(measures[mode]["macro"]) if mode in measures else "" for mode in modes]
        lines.append(f"{name:{width}}" + "".join(f"  {cell:>20}" for cell in cells))
    title = "evaluate: macro averages over the tasks, in % (95 % interval)"
    return "\n".join([title, *lines])


def _cell(macro: Json) -> str:
    if macro["value"] is None:
        return "-"
    value, low, high = (f"{100 * macro[key]:.1f}" for key in ("value", "low", "high"))
    return f"{value} ({low}-{high})"


# ------------------------------------------------------------------------------ boards and models


def _test_boards(config: Config) -> tuple[list[Board], list[str]]:
    """The boards to ask about, and their names in their benchmark."""
    if config.evaluate.benchmarks:
        return benchmarks.read_testsets(config.evaluate.benchmarks)
    boards = list(loaders.load_boards(config, "test"))
    return boards, [case_name(board) for board in boards]


def _models(config: Config, boards: Sequence[Board]) -> list[Model]:
    """The models to ask. Warns of a model that was trained on boards of a benchmark."""
    settings = config.evaluate
    if settings.endpoint:
        return [
            Model(name, None, functools.partial(_endpoint_asker, name, config, boards))
            for name in endpoint.served_models(settings)
        ]
    if jax.process_index() == 0 and settings.benchmarks:
        for name, source in settings.models:
            benchmarks.warn_of_seen(name, source, boards)
    return [
        Model(
            name,
            contents.identity(source),
            functools.partial(_local_asker, source, config, boards),
        )
        for name, source in settings.models
    ]


def _local_asker(source: str, config: Config, boards: Sequence[Board]) -> Asker:
    settings = config.evaluate
    mesh = sharding.open_mesh(config.mesh)
    loaded = loading.load(source, config, mesh, is_frozen=True)
    base = load_encoder(config.data, loaded.processor)
    encoder = BenchmarkEncoder(base.processor, base.prompts, base.data)
    encoder = buckets.fitted(encoder, config, boards)
    model = loading.for_rollouts(loaded.model, config.mesh)
    answer = make_answerer(model, encoder, settings, config.seed)
    variables = sharding.make_layout(model.mesh, model.dtype)({"params": loaded.params})

    def asker(job: Job) -> Iterator[list[tuple[int, Answer]]]:
        shown = shown_boards(boards, job.mode)
        for start in range(0, len(job.places), settings.batch_size):
            places = job.places[start : start + settings.batch_size]
            answers = answer(
                variables,
                [boards[i] for i in places],
                job.mode,
                row_ids=places,
                shown=[shown[i] for i in places],
                attempt=job.attempt,
            )
            yield list(zip(places, answers, strict=True))

    return asker


def _endpoint_asker(name: str, config: Config, boards: Sequence[Board]) -> Asker:
    prompts = prompts_lib.load(config.data.prompts, config.data.state_text)

    def asker(job: Job) -> Iterator[list[tuple[int, Answer]]]:
        shown = shown_boards(boards, job.mode)

        def question(place: int) -> tuple[list[prompts_lib.Message], int]:
            # Every board and try has noise of its own, the same when it is asked again.
            seeds = np.random.SeedSequence([config.seed, place, job.attempt])
            messages = ask(prompts, functools.partial(show, config.data), shown[place], job.mode)
            return messages, int(seeds.generate_state(1)[0]) >> 1

        for place, answer in endpoint.answers(config.evaluate, name, job.places, question):
            yield [(place, answer)]

    return asker
