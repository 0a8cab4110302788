"""The small study on one GPU: base, grounding, distillation and evaluation, sized for nine minutes.

    bash launch/gpu_study.sh WORKDIR [--budget 530] [--out docs/results/gpu_study_h100.json]
    bash launch/gpu_study.sh WORKDIR --size=toy   # rehearses it on a CPU, in minutes

Model and boards are those of configs/study/small.py:gpu, the rows those of the small study with one
seed (launch/study.sh WORKDIR --study=small). What one row needs of another is made first, in one
process. Then every row is trained and evaluated in a process of its own, all on the same GPU: most
of the time each of them waits for its boards to be drawn.

Run it again to continue where it was stopped, by --budget (seconds), SIGTERM or Ctrl-C. Prints the
time of each part and the tables of the study; --out (default: WORKDIR/gpu_study.json) gets both.
"""

import argparse
import contextlib
import dataclasses
import json
import math
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import study as studies
import study_tables
from absl import flags, logging
from jax import monitoring
from safetensors import safe_open
from study import ROOT, Study

from mgsd_jax import main as program
from mgsd_jax.command_line import load_config
from mgsd_jax.training.sessions import Stopped
from mgsd_jax.workdir import compiled, log, paths

Json = dict[str, Any]
FIRST = "first"  # the lane that all others wait for
STOPPED = 75  # exit code of a run that was stopped and goes on
GRACE = 15.0  # seconds that a lane gets to save what it has
_COMPILE = "/jax/core/compile/backend_compile_duration"


@dataclasses.dataclass(frozen=True)
class Part:
    """One run of a stage: its name in the tables, and its command."""

    name: str
    argv: Sequence[str]


def base_commands(size: str, model: pathlib.Path) -> list[Part]:
    """What launch/nano_base.sh runs to make the base of a size."""
    init = f"model.path={model}/init"
    student = f"grounding.student={model}/text/grounding"
    runs = (
        ("init", "sight", "init", model, ()),
        ("text", "text", "grounding", model / "text", (init,)),
        ("sight", "sight", "grounding", model / "sight", (init, student)),
        ("finish", "finish", "grounding", model, ()),
        ("export", "finish", "export", model, ()),
    )
    config = ROOT / "configs" / "nano_base.py"
    return [
        Part(
            f"base: {name}",
            [
                *(sys.executable, "-m", "mgsd_jax.main", f"--stage={stage}"),
                *(f"--config={config}:{run},{size}", f"--workdir={workdir}"),
                *(word for setting in settings for word in ("--set", setting)),
            ],
        )
        for name, run, stage, workdir, settings in runs
    ]


def lanes(of: Study, study: pathlib.Path) -> dict[str, list[Part]]:
    """The parts of each process: the first, then one a row; the base has the grounded row's too."""
    boards = [argv for argv in studies.prepare(of, study) if "--stage=generate" in argv]
    found = {FIRST: base_commands(of.base, study / "model")}
    found[FIRST] += [Part(f"boards {i}", argv) for i, argv in enumerate(boards)]
    needed = {row.needs for row in of.rows}
    for row in of.rows:
        argvs = studies.commands(of, row, 0, study)
        names = [row.stage] if row.stage else []
        names += ["evaluate", *(f"evaluate {name}" for name, _ in of.elsewhere)]
        parts = [Part(f"{row.name}: {n}", a) for n, a in zip(names, argvs, strict=True)]
        if row.name in needed:
            found[FIRST].append(parts.pop(0))
        lane = row.name if row.stage == "distillation" else "base"
        found.setdefault(lane, []).extend(parts)
    return found


# ---------------------------------------------------------------- in the process of a lane


def run_stage(argv: Sequence[str]) -> None:
    """What `python -m mgsd_jax.main` does with this command, in this process."""
    stage, config, workdir = (word.partition("=")[2] for word in argv[3:6])
    settings = [word for word in argv[6:] if word != "--set"]
    program.STAGES[stage](load_config(config, settings), workdir)


def work(parts: Sequence[Part], study: pathlib.Path) -> int:
    """Run the parts that are not done, noting the time of each; returns the exit code."""
    flags.FLAGS.mark_as_parsed()
    logging.use_absl_handler()
    logging.set_verbosity(logging.INFO)
    log.set_up()
    compiled.keep(None, study, os.environ)
    compiling = [0.0]

    def told(event: str, duration_secs: float, **_: Any) -> None:
        compiling[0] += duration_secs if event == _COMPILE else 0.0

    monitoring.register_event_duration_secs_listener(told)
    device = jax.devices()[0].device_kind
    done = {note["part"] for note in notes(study) if note["done"]}
    for part in parts:
        if part.name in done:
            continue
        logging.info("part %s", part.name)
        started, compiling[0], code = time.perf_counter(), 0.0, 0
        try:
            with log.compilations_told():
                run_stage(part.argv)
        except Stopped as stopped:
            logging.error("%s", stopped)
            code = stopped.exit_code
        seconds = time.perf_counter() - started
        note = {"part": part.name, "done": code == 0, "device": device}
        note |= {"seconds": seconds, "compiling": compiling[0]}
        with times_file(study).open("a") as file:  # a line at once: lanes write side by side
            file.write(json.dumps(note) + "\n")
        if code:
            return code
    return 0


def times_file(study: pathlib.Path) -> pathlib.Path:
    return study / "times.jsonl"


def notes(study: pathlib.Path) -> list[Json]:
    """What lanes have noted, in the order of time."""
    file = times_file(study)
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


# ---------------------------------------------------------------- in the process that starts them


def run_lanes(names: Sequence[str], args: argparse.Namespace, study: pathlib.Path) -> int:
    """Run lanes, `args.jobs` at a time, until `args.end`; 0, 1 where one failed, or STOPPED."""
    waiting, running = list(names), dict[str, subprocess.Popen[bytes]]()
    environment = {
        **os.environ,
        "JAX_COMPILATION_CACHE_DIR": str(study / "compiled"),
        "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{0.9 / min(args.jobs, len(names)):.2f}",
    }
    if args.size == "toy":  # compiling is all that it does
        environment["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"

    def alive() -> list[subprocess.Popen[bytes]]:
        return [process for process in running.values() if process.poll() is None]

    try:
        while time.perf_counter() < args.end and (waiting or alive()):
            if waiting and len(alive()) < args.jobs:
                name = waiting.pop(0)
                argv = [sys.executable, __file__, str(study), f"--size={args.size}"]
                with (study / f"{name}.log").open("a") as out:
                    # A session of its own: Ctrl-C is for this process, which asks the lanes once.
                    running[name] = subprocess.Popen(
                        [*argv, f"--lane={name}"],
                        stdout=out,
                        stderr=out,
                        env=environment,
                        start_new_session=True,
                    )
            time.sleep(0.1)
    except KeyboardInterrupt:
        waiting = waiting or [*running]
        print("asked to stop: the lanes finish their step and save", file=sys.stderr)
    late = alive()
    stop(late)
    failed = [n for n, p in running.items() if p not in late and p.returncode not in (0, STOPPED)]
    for name in failed:
        said = (study / f"{name}.log").read_text().splitlines()[-1:]
        print(f"{name}: got exit code {running[name].returncode}: {said}; see {name}.log")
    is_stopped = late or waiting or any(process.returncode for process in running.values())
    return 1 if failed else STOPPED if is_stopped else 0


def stop(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ask processes to save and stop, and end those that take longer than GRACE."""
    end = time.perf_counter() + GRACE
    for process in processes:
        process.terminate()
    try:
        for process in processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(max(end - time.perf_counter(), 0.0))
    finally:  # also where Ctrl-C is pressed again
        for process in processes:
            process.kill()
            process.wait()


def parameters(model: pathlib.Path) -> int:
    """The number of parameters of an exported model."""
    count = 0
    for file in model.glob("*.safetensors"):
        with safe_open(file, "np") as tensors:
            shapes = [tensors.get_slice(name).get_shape() for name in [*tensors.keys()]]
            count += sum(map(math.prod, shapes))
    return count


def times(found: Sequence[Json]) -> dict[str, Json]:
    """{part: seconds, those of them spent compiling, whether it is done}, summed over its runs."""
    result: dict[str, Json] = {}
    for note in found:
        before = result.setdefault(note["part"], {"seconds": 0.0, "compiling": 0.0})
        before |= {name: round(before[name] + note[name], 1) for name in ("seconds", "compiling")}
        before["done"] = note["done"]
    return result


def measured(of: Study, study: pathlib.Path) -> dict[str, Json]:
    """{row: {trained or held_out levels: {mode: macro success}}} of what is evaluated."""
    result: dict[str, Json] = {}
    for name, folder in (("trained", "evaluate"), ("held_out", "held_out")):
        for row, model in study_tables.read_study(study, of.rows, folder).items():
            asked = {answer["mode"] for answer in model.runs[0].rows}
            result.setdefault(row, {})[name] = {
                mode: round(study_tables.estimate(model, mode).value, 4)
                for mode in ("picture", "text")
                if mode in asked
            }
    return result


def result(of: Study, study: pathlib.Path, wall: Sequence[float]) -> Json:
    """All that is known so far, as JSON."""
    found, every = notes(study), lanes(of, study)
    spent = times(found)
    return {
        "study": of.base,
        "device": found[-1]["device"] if found else None,
        "jax": jax.__version__,
        "parameters": parameters(study / "model" / "export"),
        "wall_seconds": [round(seconds, 1) for seconds in wall],
        "parts": spent,
        "left": [
            part.name
            for parts in every.values()
            for part in parts
            if not spent.get(part.name, {}).get("done")
        ],
        "success": measured(of, study),
    }


def table(found: Json) -> Iterator[str]:
    """The times as lines of markdown."""
    wall = " + ".join(f"{seconds:.0f}" for seconds in found["wall_seconds"])
    yield f"{found['device']}, {found['parameters']:,} parameters, {wall} s in all\n"
    yield "| part | seconds | of them compiling |\n| --- | ---: | ---: |"
    for name, spent in found["parts"].items():
        late = "" if spent["done"] else " (not done)"
        yield f"| {name}{late} | {spent['seconds']:.1f} | {spent['compiling']:.1f} |"
    if found["left"]:
        yield f"\nleft: {', '.join(found['left'])}; the same command goes on"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("workdir", type=pathlib.Path)
    parser.add_argument("--size", choices=("gpu", "toy"), default="gpu")
    parser.add_argument("--budget", type=float, default=530.0, help="seconds in all (default: 530)")
    parser.add_argument("--jobs", type=int, help="rows at a time (default: all, of a toy 2)")
    parser.add_argument("--out", type=pathlib.Path, help="file for the JSON")
    parser.add_argument("--lane", help=argparse.SUPPRESS)  # run this lane, in this process
    args = parser.parse_args()
    begun = time.perf_counter()
    study, of = args.workdir.absolute(), studies.small_study(args.size)
    every = lanes(of, study)
    if args.lane:
        return work(every[args.lane], study)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    study.mkdir(parents=True, exist_ok=True)
    args.jobs = args.jobs or (len(every) if args.size == "gpu" else 2)
    args.end = begun + args.budget - GRACE
    code = run_lanes([FIRST], args, study)
    if code == 0:
        code = run_lanes([name for name in every if name != FIRST], args, study)
    walls = study / "walls.json"
    wall = json.loads(walls.read_text()) if walls.is_file() else []
    paths.write_whole(walls, json.dumps([*wall, time.perf_counter() - begun]))
    found = result(of, study, json.loads(walls.read_text()))
    paths.write_whole(args.out or study / "gpu_study.json", json.dumps(found, indent=1) + "\n")
    print("\n".join(table(found)))
    if found["success"].get("base", {}).get("trained"):
        names = [name for name, _ in of.elsewhere]
        print("\n" + study_tables.write_tables(study, of.rows, names))
    return code


if __name__ == "__main__":
    sys.exit(main())
