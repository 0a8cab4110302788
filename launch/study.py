"""Runs the nano study: every row of configs/study/rows.py is trained and evaluated, then a table.

    bash launch/study.sh WORKDIR [--jobs 2] [--rows method,sampled] [--dry-run | --table]

A run that is done is left alone and one that was stopped goes on: the same command continues. Each
of the --jobs runs at a time gets a core of its own. Logs: WORKDIR/ROW/SEED.log.
"""

import argparse
import concurrent.futures
import os
import pathlib
import queue
import runpy
import subprocess
import sys
import threading
from typing import Any

import tqdm

from mgsd_jax.report import study as study_tables

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = ROOT / "configs" / "study" / "nano.py"
# Boards never trained on, and what the larger ones need: (name, settings).
ELSEWHERE = (
    ("colours", ("data.channels=(2,1,0)",)),
    ("sprites", ("data.sprites=other",)),
    (
        "larger",
        (
            "data.folder={study}/larger",
            "data.boards=({'task':'frozenlake','levels':(5,6),'train':0,'val':0,'test':100},"
            "{'task':'maze','levels':(4,),'train':0,'val':0,'test':200},"
            "{'task':'minibehaviour','levels':(6,),'train':0,'val':0,'test':200})",
            "data.prompt_buckets=(64,)",
            "data.teacher_buckets=(96,)",
            "data.patch_buckets=(144,)",
            "evaluate.sampling.max_new_tokens=110",
        ),
    ),
)
CURVES = ("distillation_only", "method", "sampled", "forward", "other_board")
ELSEWHERE_ROWS = ("base", "sft", "grounding_only", "distillation_only", "method")


def filled(settings: tuple[str, ...], study: pathlib.Path, seed: int) -> list[str]:
    """The settings as arguments of the program."""
    named = [s.replace("{study}", str(study)).replace("{seed}", str(seed)) for s in settings]
    return [part for setting in named for part in ("--set", setting)]


def command(stage: str, workdir: pathlib.Path, study: pathlib.Path, *settings: str) -> list[str]:
    """One run of the program; the seed is the name of its folder."""
    seed = int(workdir.name)
    program = [sys.executable, "-m", "mgsd_jax.main", f"--stage={stage}", f"--config={CONFIG}"]
    shared = ("data.folder={study}/data", f"seed={seed}")
    return [*program, f"--workdir={workdir}", *filled((*shared, *settings), study, seed)]


def commands(row: Any, seed: int, study: pathlib.Path) -> list[list[str]]:
    """Training and evaluation of one row with one seed, in order."""
    workdir = study / row.name / str(seed)
    training = [command(row.stage, workdir, study, *row.settings)] if row.stage else []
    names = {"": ("base", "{model}"), "grounding": ("grounded", "{workdir}/grounding")}
    model = names.get(row.stage, ("distilled", "{workdir}/distillation"))
    evaluations = [
        command("evaluate", workdir, study, f"evaluate.models=({model!r},)", *settings)
        for settings in (
            (),
            *(
                (*extra, f"evaluate.folder={{workdir}}/{name}")
                for name, extra in ELSEWHERE
                if row.name in ELSEWHERE_ROWS
            ),
        )
    ]
    return training + evaluations


def boards(study: pathlib.Path) -> list[list[str]]:
    """The commands that draw the boards of the study."""
    return [
        command("generate", study / "boards" / "0", study),
        command("generate", study / "boards" / "0", study, *dict(ELSEWHERE)["larger"]),
    ]


def run(argv: list[str], log: pathlib.Path, core: int | None, study: pathlib.Path) -> None:
    """One program to its end on one core; raises RuntimeError with the log where it fails."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(study / "compiled")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
        done = subprocess.run(argv, stdout=out, stderr=out, env=environment, preexec_fn=pin)
    if done.returncode:
        raise RuntimeError(f"{log}: got exit code {done.returncode} from {' '.join(argv)}, want 0")


def main() -> None:
    rows = runpy.run_path(str(ROOT / "configs" / "study" / "rows.py"))["ROWS"]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--rows", default="", help="names with commas between them (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    parser.add_argument("--table", action="store_true", help="tables and curves of what is there")
    args = parser.parse_args()
    study = args.workdir.absolute()
    known = {row.name: row for row in rows}
    names = args.rows.split(",") if args.rows else list(known)
    if set(names) - set(known):
        raise SystemExit(
            f"--rows: got {sorted(set(names) - set(known))}, want some of {list(known)}"
        )
    tasks = [(known[name], seed) for name in names for seed in known[name].seeds]
    if args.table:
        show(study, rows)
        return
    if args.dry_run:
        for argv in [*boards(study), *(c for task in tasks for c in commands(*task, study))]:
            print(" ".join(argv))
        return
    for argv in boards(study):
        run(argv, study / "boards.log", None, study)
    cores: queue.Queue[int | None] = queue.Queue()
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    for job in range(args.jobs):
        cores.put(there[job] if job < len(there) else None)
    finished = {task_key(row, seed): threading.Event() for row, seed in tasks}
    failures = []
    is_stopped = threading.Event()

    def work(row: Any, seed: int) -> None:
        if row.needs:
            waited = finished.get(f"{row.needs}/{seed}")
            if waited is not None:
                waited.wait()
        core = cores.get()
        try:
            for argv in commands(row, seed, study):
                if is_stopped.is_set():
                    return
                run(argv, study / row.name / f"{seed}.log", core, study)
        finally:
            cores.put(core)
            finished[task_key(row, seed)].set()

    with (
        concurrent.futures.ThreadPoolExecutor(len(tasks)) as pool,
        tqdm.tqdm(total=len(tasks), unit="run") as progress,
    ):
        waiting = [pool.submit(work, row, seed) for row, seed in tasks]
        try:
            for future in concurrent.futures.as_completed(waiting):
                progress.update()
                if future.exception():
                    failures.append(str(future.exception()))
                    print(failures[-1], file=sys.stderr)
        except KeyboardInterrupt:  # the programs under way got it, too: they save and leave
            is_stopped.set()
            print("stopped by Ctrl-C; the same command goes on from here", file=sys.stderr)
            sys.exit(130)
    if failures:
        raise SystemExit(f"{len(failures)} runs failed")
    show(study, rows)


def show(study: pathlib.Path, rows: Any) -> None:
    """Prints the tables of what has been run, and draws WORKDIR/curves.svg."""
    print(study_tables.write_tables(study, rows, [name for name, _ in ELSEWHERE]))
    models = study_tables.read_study(study, rows)
    (study / "curves.svg").write_text(
        study_tables.curves_svg(m for m in models.values() if m.name in CURVES)
    )


def task_key(row: Any, seed: int) -> str:
    return f"{row.name}/{seed}"


if __name__ == "__main__":
    main()
