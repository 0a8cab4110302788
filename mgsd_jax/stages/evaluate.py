"""Answers boards with a model and scores the answers: planning, perception, diagnostics.

A row is one answered prompt, JSON on one line of `rows.jsonl`; `summary.json` is computed from the
rows alone (summary.py). Axes: B batch, R response tokens.
"""

import asyncio
import functools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

import jax
import numpy as np
from absl import logging
from etils import epath

from mgsd_jax import config as config_lib
from mgsd_jax.config import Config, Mode
from mgsd_jax.data import loaders, testsets
from mgsd_jax.data import prompts as prompts_lib
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.evaluation import rows as rows_lib
from mgsd_jax.evaluation import summary
from mgsd_jax.evaluation.scoring import Row, score_row
from mgsd_jax.parallel import processes, sharding
from mgsd_jax.sampling import endpoint
from mgsd_jax.sampling.answers import BenchmarkEncoder, ask, make_answerer, show, shown_boards
from mgsd_jax.stages import loading
from mgsd_jax.workdir import folders, metrics, paths

# (mode, attempt, places in the list of boards) -> batches of rows without a model name
Asker = Callable[[Mode, int, Sequence[int]], Iterator[list[Row]]]
_PATIENCE = 16  # failed requests in a row after which an endpoint is taken to be down


def run(config: Config, workdir: str) -> None:
    """Answers the test boards with every model; writes rows.jsonl and summary.json.

    Rows are on disk before the next batch is asked. What is answered already is not asked again;
    failed requests are. Raises ValueError for boards, models or an endpoint that cannot be used.
    """
    given, config = config, config_lib.resolve(config, workdir)
    boards, cases = _test_boards(config)
    models, make_asker = _askers(config, boards)
    if jax.process_index() == 0 and config.evaluate.benchmarks and not config.evaluate.endpoint:
        for name, source in models:
            testsets.warn_of_seen(name, source, boards)
    identities: dict[str, str] = {}
    if not config.evaluate.endpoint:
        identities = {name: loading.identity(path) for name, path in models}
    sections = ("data", "evaluate", "checkpoint", "seed")
    with folders.claimed(config.evaluate.folder, given, sections) as claim:
        _answer(config, claim, boards, cases, models, identities, make_asker)


def _answer(
    config: Config,
    claim: folders.Claim,
    boards: Sequence[Board],
    cases: Sequence[str],
    models: Sequence[tuple[str, str]],
    identities: Mapping[str, str],
    make_asker: Callable[[str], Asker],
) -> None:
    """Asks what is not answered yet, and sums up."""
    settings, folder = config.evaluate, claim.folder
    is_main = jax.process_index() == 0
    if is_main:
        write_boards = functools.partial(rows_lib.write_boards, folder, boards, cases)
        if (folder / rows_lib.BOARDS_FILE).exists():
            write_boards()  # refuses those of another evaluation
        claim.notes.append(write_boards)
        rows_lib.mend(folder)
    there = rows_lib.read_rows(folder)
    answered = {rows_lib.key_of(row) for row in there if "error" not in row}
    if is_main:
        asked = {name for name, *_ in answered}
        rows_lib.check_models(folder, {n: i for n, i in identities.items() if n in asked})
    jobs = [
        (
            name,
            mode,
            attempt,
            [i for i, b in enumerate(boards) if _key(name, mode, b, attempt) not in answered],
        )
        for name, _ in models
        for mode in settings.modes
        for attempt in range(settings.tries)
        if name == settings.reference or mode not in settings.reference_only
    ]
    # The other processes may not see the files of the first one.
    jobs = processes.gather(jobs)[0]
    total = len(jobs) * len(boards)
    done = total - sum(len(places) for *_, places in jobs)
    progress = metrics.open_progress(total, is_main=is_main, every=1, unit="row")
    new: list[Row] = []
    for name, source in models:
        todo = [job[1:] for job in jobs if job[0] == name and job[-1]]
        if not todo:
            continue
        asker = None  # lets go of the model before this one: memory holds one at a time
        asker = make_asker(source)
        if name in identities:
            write = functools.partial(rows_lib.add_model, folder, name, identities[name])
            claim.notes.append(write)
        for mode, attempt, places in todo:
            started = time.perf_counter()
            for rows in asker(mode, attempt, places):
                if is_main:
                    new += [{"model": name, "attempt": attempt, **row} for row in rows]
                    # Failed requests alone are asked again anyway, and make no claim.
                    if not claim.notes or any("error" not in row for row in new):
                        claim.record()
                        rows_lib.append(folder, new)
                        new = []
                done += len(rows)
                progress.update(done, (time.perf_counter() - started) / len(rows))
                started = time.perf_counter()
    progress.close()
    if is_main:
        if new:
            claim.record()
            rows_lib.append(folder, new)
        _summarize(folder)


def _key(name: str, mode: Mode, board: Board, attempt: int) -> rows_lib.Key:
    return (name, mode, board.task, board.level, board.index, attempt)


def _test_boards(config: Config) -> tuple[list[Board], list[str]]:
    if config.evaluate.benchmarks:
        return testsets.read_testsets(config.evaluate.benchmarks)
    boards = list(loaders.load_boards(config, "test"))
    return boards, [testsets.case_name(board) for board in boards]


def _askers(
    config: Config, boards: Sequence[Board]
) -> tuple[Sequence[tuple[str, str]], Callable[[str], Asker]]:
    """The (name, source) of who answers, and how to make one of them ready to be asked."""
    settings = config.evaluate
    if not settings.endpoint:
        return settings.models, lambda source: _local_asker(source, config, boards)
    models = [(name, name) for name in endpoint.served_models(settings)]
    return models, lambda name: _endpoint_asker(name, config, boards)


def _local_asker(source: str, config: Config, boards: Sequence[Board]) -> Asker:
    settings = config.evaluate
    mesh = sharding.open_mesh(config.mesh)
    loaded = loading.load(source, config, mesh, is_frozen=True)
    base = load_encoder(config.data, loaded.processor)
    encoder = BenchmarkEncoder(base.processor, base.prompts, base.data)
    answer = make_answerer(loaded.model, encoder, settings, config.seed)
    variables = sharding.make_layout(mesh, loaded.model.dtype)({"params": loaded.params})

    def asker(mode: Mode, attempt: int, places: Sequence[int]) -> Iterator[list[Row]]:
        shown = shown_boards(boards, mode)
        for start in range(0, len(places), settings.batch_size):
            chosen = places[start : start + settings.batch_size]
            yield answer(
                variables,
                [boards[i] for i in chosen],
                mode,
                row_ids=chosen,
                shown=[shown[i] for i in chosen],
                attempt=attempt,
            )

    return asker


def _endpoint_asker(name: str, config: Config, boards: Sequence[Board]) -> Asker:
    settings = config.evaluate
    prompts = prompts_lib.load(config.data.prompts)

    def asker(mode: Mode, attempt: int, places: Sequence[int]) -> Iterator[list[Row]]:
        shown = shown_boards(boards, mode)
        client = endpoint.connect(settings)
        slots = asyncio.Semaphore(settings.endpoint_workers)
        answered: asyncio.Queue[asyncio.Task[Row]] = asyncio.Queue()

        async def answer(place: int) -> Row:
            # Every row and try has its own noise, the same when it is asked again.
            seed = int(np.random.SeedSequence([config.seed, place, attempt]).generate_state(1)[0])
            async with slots:
                messages = ask(prompts, lambda b: show(config.data, b), shown[place], mode)
                got = await endpoint.ask(client, settings, name, messages, seed >> 1)
            row = score_row(boards[place], mode, got.text)
            row |= {"truncated": got.truncated, "response_tokens": got.tokens}
            return row if got.error is None else row | {"error": got.error}

        async def close() -> None:
            await asyncio.gather(*waiting, return_exceptions=True)
            await client.close()

        failed = 0
        with asyncio.Runner() as runner:
            waiting = [runner.get_loop().create_task(answer(place)) for place in places]
            for task in waiting:
                task.add_done_callback(answered.put_nowait)
            try:
                for _ in waiting:
                    row = runner.run(answered.get()).result()
                    yield [row]
                    failed = failed + 1 if "error" in row else 0
                    if failed >= _PATIENCE:
                        raise ValueError(
                            f"{settings.endpoint}: got {failed} failed requests in a row (the "
                            f"last: {row['error']}), want answers; once that is mended, run again "
                            "to go on from here"
                        )
            finally:
                for task in waiting:
                    task.cancel()
                runner.run(close())

    return asker


def _summarize(folder: epath.Path) -> None:
    rows = rows_lib.read_rows(folder)
    rows_lib.compact(folder, rows)
    result = summary.summarize(rows, source=str(folder / rows_lib.ROWS_FILE))
    paths.write_whole(folder / "summary.json", json.dumps(result, indent=2) + "\n")
    for name, modes in result["models"].items():
        for mode, measures in modes.items():
            logging.info("%-10s %-10s %s", name, mode, measures.get("macro"))
    failed = sum("error" in row for row in rows)
    if failed:
        logging.warning("%d requests failed and count as failures; run again to ask them", failed)
