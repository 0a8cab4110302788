"""Runs a study: trains and evaluates its rows of configs/study/rows.py, prints the tables.

    bash launch/study.sh WORKDIR [--study=small] [--jobs 2] [--rows method,jsd]
                         [--dry-run | --table]

The nano study starts from the model that ships, the small study makes its base first. Rows that
others need are run before them. Runs that are done are left alone and those that were stopped
continue, so the command can be given again. Each of the --jobs parallel runs gets a core of its
own. Logs: WORKDIR/ROW/SEED.log.
"""

import argparse
import concurrent.futures
import dataclasses
import os
import pathlib
import runpy
import shlex
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence

import study_tables
import tqdm
from etils import epath
from study_tables import StudyRow

from mgsd_jax.workdir import stage_folder

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = ROOT / "configs" / "study"
ROWS: tuple[StudyRow, ...] = runpy.run_path(str(CONFIGS / "rows.py"))["ROWS"]
SMALL = runpy.run_path(str(CONFIGS / "small.py"))
Settings = tuple[str, ...]  # as after --set
COLOURS = ("colours", ("data.channels=(2,1,0)",))
SPRITES = ("sprites", ("data.sprites=other",))
# Boards on which no row was looked at before the quickstart's recipe was chosen: new ones, and
# colours in other orders than `COLOURS`. FrozenLake 3 has none left.
UNSEEN = (
    "data.folder={study}/unseen",
    "data.boards=({'task':'frozenlake','levels':(4,),'train':0,'val':0,'test':300},"
    "{'task':'maze','levels':(3,),'train':0,'val':0,'test':400},"
    "{'task':'minibehaviour','levels':(5,),'train':0,'val':0,'test':400})",
)


@dataclasses.dataclass(frozen=True)
class Study:
    """Some rows of configs/study/rows.py with one config, and the boards that they are asked about.

    Boards elsewhere are of kinds that no row has trained on, unseen ones had no part in the choice
    of a recipe: (name, settings).
    """

    config: str  # as after --config
    rows: tuple[StudyRow, ...]
    elsewhere: tuple[tuple[str, Settings], ...]
    elsewhere_rows: tuple[str, ...]  # rows asked about them, beside those of two groups
    unseen: tuple[tuple[str, Settings], ...] = ()
    unseen_rows: tuple[str, ...] = ()
    training: Settings = ()  # of every stage that trains
    base: str = ""  # what launch/nano_base.sh makes in {study}/model; '': the model that ships


def nano_study() -> Study:
    larger = (
        "data.folder={study}/larger",
        "data.boards=({'task':'frozenlake','levels':(5,6),'train':0,'val':0,'test':100},"
        "{'task':'maze','levels':(4,),'train':0,'val':0,'test':200},"
        "{'task':'minibehaviour','levels':(6,),'train':0,'val':0,'test':200})",
        "data.prompt_buckets=(64,)",
        "data.teacher_buckets=(96,)",
        "data.patch_buckets=(144,)",
        "evaluate.sampling.max_new_tokens=110",
    )
    asked = ("base", "sft", "grounding_only", "distillation_only", "method", "jsd", "jsd_only")
    elsewhere = (COLOURS, SPRITES, ("larger", larger))
    unseen = (
        ("unseen", UNSEEN),
        ("unseen_gbr", (*UNSEEN, "data.channels=(1,2,0)")),
        ("unseen_grb", (*UNSEEN, "data.channels=(1,0,2)")),
    )
    chosen = ("base", "jsd", "best", "best_60", "verifier_50", "best_60_verified")
    return Study(str(CONFIGS / "nano.py"), ROWS, elsewhere, asked, unseen, chosen)


def small_study(size: str = "small") -> Study:
    """Grounding, and what distillation is with and without it; the quickstart's recipe.

    What is asked of the pair has five seeds, as three of distillation alone lay ten points apart.
    On a GPU the published divergence, too.
    """
    published = () if size == "small" else ("method",)
    names = ("base", "grounded", *published, "jsd_only", "jsd", "best_60")
    there = SMALL["SIZES"][size]
    both = f"distillation.steps={sum(there.steps)}"  # the updates of both stages
    half = f"distillation.steps={there.steps[1] // 2}"
    steps = {"jsd_only": both, "best_60": half}
    titles = {"best_60": f"The quickstart's recipe, {there.steps[1] // 2} updates"}

    def sized(row: StudyRow) -> StudyRow:
        settings = [s for s in row.settings if not s.startswith("distillation.steps=")]
        settings += [steps[row.name]] if row.name in steps else []
        title = titles.get(row.name, row.title)
        seeds = tuple(range(5)) if row.name in ("grounded", "jsd_only", "jsd") else row.seeds
        return dataclasses.replace(
            row, group="main", title=title, settings=tuple(settings), seeds=seeds
        )

    found = {row.name: row for row in ROWS}
    rows = tuple(sized(found[name]) for name in names)
    boards = SMALL["level_sets"](there.held_out, test=there.test)
    held_out = (
        "data.folder={study}/held_out",
        f"data.boards={tuple(map(dataclasses.asdict, boards))}",
    )
    elsewhere = (("held_out", held_out), *((COLOURS, SPRITES) if size == "small" else ()))
    training = () if there.train else ("data.source=stream",)
    config = f"{CONFIGS / 'small.py'}:{size}"
    return Study(config, rows, elsewhere, names, training=training, base=size)


STUDIES = {"nano": nano_study, "small": small_study}
Task = tuple[StudyRow, int]  # and a seed


def filled(settings: tuple[str, ...], study: pathlib.Path, seed: int) -> list[str]:
    """The settings as arguments of the program."""
    named = [s.replace("{study}", str(study)).replace("{seed}", str(seed)) for s in settings]
    return [part for setting in named for part in ("--set", setting)]


def command(
    of: Study, stage: str, workdir: pathlib.Path, study: pathlib.Path, *settings: str
) -> list[str]:
    """One run of the program; the seed is the name of its folder."""
    seed = int(workdir.name)
    program = [sys.executable, "-m", "mgsd_jax.main", f"--stage={stage}", f"--config={of.config}"]
    model = ("model.path={study}/model/export",) if of.base else ()
    shared = ("data.folder={study}/data", f"seed={seed}", *model)
    return [*program, f"--workdir={workdir}", *filled((*shared, *settings), study, seed)]


def commands(of: Study, row: StudyRow, seed: int, study: pathlib.Path) -> list[list[str]]:
    """Training and evaluation of one row with one seed, in order."""
    workdir = study / row.name / str(seed)
    training = (
        [command(of, row.stage, workdir, study, *of.training, *row.settings)] if row.stage else []
    )
    names = {"": ("base", "{model}"), "grounding": ("grounded", "{workdir}/grounding")}
    model = names.get(row.stage, ("distilled", "{workdir}/distillation"))
    base = [setting for setting in row.settings if setting.startswith("model.")]
    boards: list[tuple[str, ...]] = [()]
    if row.name in of.elsewhere_rows or row.group in ("options", "plans"):
        # What the base says to a text stands for all of them.
        asked = () if row.name == "base" else ("evaluate.modes=picture,perception",)
        boards += [
            (*some, *asked, f"evaluate.folder={{workdir}}/{name}") for name, some in of.elsewhere
        ]
    if row.name in of.unseen_rows:
        boards += [
            (*some, "evaluate.modes=picture", f"evaluate.folder={{workdir}}/{name}")
            for name, some in of.unseen
        ]
    making = nano_base(study / row.base, row.base) if row.base else []
    asking = [
        command(of, "evaluate", workdir, study, f"evaluate.models=({model!r},)", *base, *settings)
        for settings in boards
    ]
    return making + training + asking


def nano_base(folder: pathlib.Path, variant: str) -> list[list[str]]:
    """The command that makes a base in the folder; none where it is there."""
    if (folder / "export" / "config.json").is_file():
        return []
    return [["bash", str(ROOT / "launch" / "nano_base.sh"), str(folder), variant]]


def prepare(of: Study, study: pathlib.Path) -> list[list[str]]:
    """The commands that draw the boards, and make the base where the study has one of its own."""
    workdir = study / "boards" / "0"
    others = [some for _, some in of.elsewhere if some[0].startswith("data.folder=")]
    others += [some for _, some in of.unseen[:1]]
    drawn = [command(of, "generate", workdir, study, *some) for some in ((), *others)]
    return drawn + (nano_base(study / "model", of.base) if of.base else [])


def run(argv: list[str], log: pathlib.Path, core: int | None, study: pathlib.Path) -> None:
    """Run one program to its end on one core. Raises RuntimeError with its last words."""
    environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(study / "compiled")}
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as out:
        pin = None if core is None else lambda: os.sched_setaffinity(0, {core})
        done = subprocess.run(argv, stdout=out, stderr=out, env=environment, preexec_fn=pin)
    if done.returncode:
        said = log.read_text(errors="replace").split("\n")
        last = next((line for line in reversed(said) if line.strip()), "nothing")
        raise RuntimeError(f"{log}: got exit code {done.returncode}, want 0; it said: {last}")


def run_all(of: Study, tasks: Sequence[Task], study: pathlib.Path, jobs: int) -> int:
    """Run the tasks in order, each after the one that it needs, and return how many failed.

    Ctrl-C reaches the programs too: they save and stop, and no other is started.
    """
    there = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else []
    cores = [there[job] if job < len(there) else None for job in range(jobs)]
    waiting, failures = list(tasks), 0
    known = {row.name: row for row, _ in tasks}
    is_stopped = threading.Event()

    def work(row: StudyRow, seed: int, core: int | None) -> None:
        for argv in commands(of, row, seed, study):
            if is_stopped.is_set():
                return
            run(argv, study / row.name / f"{seed}.log", core, study)

    with (
        concurrent.futures.ThreadPoolExecutor(jobs) as pool,
        tqdm.tqdm(total=len(tasks), unit="run") as progress,
    ):
        running: dict[concurrent.futures.Future[None], tuple[Task, int | None]] = {}
        try:
            while waiting or running:
                unfinished = {*waiting, *(task for task, _ in running.values())}
                ready = [task for task in waiting if start_of(task, known) not in unfinished]
                for task, core in zip(ready, list(cores), strict=False):
                    waiting.remove(task)
                    cores.remove(core)
                    running[pool.submit(work, *task, core)] = task, core
                done, _ = concurrent.futures.wait(running, return_when="FIRST_COMPLETED")
                for future in done:
                    _, core = running.pop(future)
                    cores.append(core)
                    progress.update()
                    if future.exception():
                        failures += 1
                        print(future.exception(), file=sys.stderr)
        except KeyboardInterrupt:
            is_stopped.set()
            raise
    return failures


def show(of: Study, study: pathlib.Path) -> None:
    """Print the tables of what has been run, and draw WORKDIR/curves.svg."""
    names = [[name for name, _ in some] for some in (of.elsewhere, of.unseen)]
    print(study_tables.write_tables(study, of.rows, *names))
    models = study_tables.read_study(study, of.rows)
    curves = study_tables.curves_svg(models[name] for name in models if name in study_tables.CURVES)
    (study / "curves.svg").write_text(curves)


def choose(names: str, known: Mapping[str, StudyRow], study: pathlib.Path) -> list[Task]:
    """Every seed of the rows with these names, '' for all, after what they need and is not there.

    Raises ValueError for an unknown name.
    """
    chosen = names.split(",") if names else list(known)
    if strange := sorted(set(chosen) - set(known)):
        raise ValueError(f"--rows: got {strange}, want some of {list(known)}")
    tasks: list[Task] = []
    for row in (known[name] for name in chosen):
        asked = [(row, seed) for seed in row.seeds]
        starts = [start for task in asked if (start := start_of(task, known))]
        tasks += [start for start in starts if not is_made(*start, study)] + asked
    return list(dict.fromkeys(tasks))


def start_of(task: Task, known: Mapping[str, StudyRow]) -> Task | None:
    """The row and seed that this one starts from, None where that is not among the known rows."""
    row, seed = task
    needed = known.get(row.needs)
    return (needed, needed.seeds[0] if needed.base else seed) if needed else None


def is_made(row: StudyRow, seed: int, study: pathlib.Path) -> bool:
    """Whether other rows can start from what this one makes."""
    if row.base:
        return not nano_base(study / row.base, row.base)
    return not stage_folder.unfinished(epath.Path(study / row.name / str(seed) / row.stage))


def at_least_one(text: str) -> int:
    """A number of runs, for argparse."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number of 1 or more")
    return int(text)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--study", choices=[*STUDIES], default="nano", help="default: nano")
    parser.add_argument("--jobs", type=at_least_one, default=2, help="runs at a time (default: 2)")
    parser.add_argument("--rows", default="", help="names with commas between them (default: all)")
    parser.add_argument("--dry-run", action="store_true", help="print the commands alone")
    parser.add_argument("--table", action="store_true", help="tables and curves of what is there")
    args = parser.parse_args()
    study, of = args.workdir.absolute(), STUDIES[args.study]()
    try:
        failures = work_on(of, study, args)
    except (OSError, RuntimeError, ValueError) as error:
        raise SystemExit(str(error)) from None
    except KeyboardInterrupt:
        print("stopped by Ctrl-C; run the same command again to continue", file=sys.stderr)
        sys.exit(130)
    if failures:
        raise SystemExit(f"runs that failed: got {failures}, want 0; their errors are above")


def work_on(of: Study, study: pathlib.Path, args: argparse.Namespace) -> int:
    """Do what is asked for, and return how many runs failed."""
    tasks = choose(args.rows, {row.name: row for row in of.rows}, study)
    if args.dry_run and not args.table:
        for argv in [*prepare(of, study), *(c for t in tasks for c in commands(of, *t, study))]:
            print(shlex.join(argv))
        return 0
    failures = 0
    if not args.table:
        for argv in prepare(of, study):
            run(argv, study / "prepare.log", None, study)
        failures = run_all(of, tasks, study, args.jobs)
    show(of, study)
    return failures


if __name__ == "__main__":
    main()
