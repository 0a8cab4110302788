"""The study: its rows are valid runs of the program, and its tables say what the rows hold."""

import collections
import itertools
import json
import pathlib
import runpy
import sys
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest
import study_tables as tables

from mgsd_jax import config as config_lib
from mgsd_jax.command_line import load_config
from mgsd_jax.config import Config
from mgsd_jax.data.boards import Board
from mgsd_jax.data.encoder import load_encoder
from mgsd_jax.data.nano_tokenizer import write_tokenizer
from mgsd_jax.data.processor import load_processor
from mgsd_jax.envs import ENVS
from mgsd_jax.envs.maze import WALLS, MazeState
from mgsd_jax.stages import init

ROOT = pathlib.Path(__file__).parents[1]
RUNNER = runpy.run_path(str(ROOT / "launch" / "study.py"))
ROWS = RUNNER["ROWS"]
NANO, SMALL = (RUNNER["STUDIES"][name]() for name in ("nano", "small"))
STUDY = pathlib.Path("/study")


def config_of(argv: list[str]) -> Config:
    """The config of a command of the program."""
    settings = [argv[i + 1] for i, part in enumerate(argv) if part == "--set"]
    return load_config(argv[4].removeprefix("--config="), settings)


@pytest.mark.parametrize("of", [NANO, SMALL], ids=["nano", "small"])
def test_every_row_is_a_valid_config_and_needs_rows_that_exist(of: Any) -> None:
    names = [row.name for row in of.rows]
    assert len(set(names)) == len(names)
    for row in of.rows:
        assert not row.needs or row.needs in names[: names.index(row.name)]
        argvs = RUNNER["commands"](of, row, row.seeds[0], STUDY)
        for number, argv in enumerate(argvs[1:] if row.base else argvs):
            config = config_of(argv)
            assert config.seed == row.seeds[0]
            assert config.data.folder.startswith("/study/")
            if row.needs and number == 0:
                needed = next(one for one in of.rows if one.name == row.needs)
                start = config.model.path if needed.base else config.distillation.student
                assert f"/study/{needed.base or needed.name}/" in start
        changed = {setting.partition("=")[0] for setting in row.settings}
        changed = {s for s in changed if not s.startswith(("data.", "model."))}
        assert all(row.stage == s.partition(".")[0] for s in changed)


def test_every_row_differs_from_every_other() -> None:
    kinds = {(row.stage, row.settings) for row in ROWS}
    assert len(kinds) == len(ROWS)


def test_a_dry_run_prints_the_commands_of_the_rows_asked_for(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    argv = ["study.py", str(tmp_path), "--rows", "base,method", "--dry-run"]
    monkeypatch.setattr(sys, "argv", argv)
    runpy.run_path(str(ROOT / "launch" / "study.py"), run_name="__main__")
    lines = capsys.readouterr().out.splitlines()
    stages = [line.split("--stage=")[1].split()[0] for line in lines]
    assert stages.count("generate") == 3  # boards, larger ones, unseen ones
    # What a row needs is run before it.
    assert stages[3 + 7 :][:2] == ["grounding", "evaluate"]
    assert stages.count("grounding") == stages.count("distillation") == 3
    # Own boards and three other kinds; grounding on its own; the base on unseen ones, too.
    assert stages.count("evaluate") == 4 * 4 + 3 + 3
    assert not list(tmp_path.iterdir())


def test_the_small_study_makes_its_base_and_holds_levels_out(tmp_path: pathlib.Path) -> None:
    """Rows train on some levels, are asked about all, and start from the base that was made."""
    *draws, base = RUNNER["prepare"](SMALL, tmp_path)
    assert base[1:] == [str(ROOT / "launch" / "nano_base.sh"), str(tmp_path / "model"), "small"]
    levels = [
        {(some.task, level) for some in config_of(argv).data.boards for level in some.levels}
        for argv in draws
    ]
    trained, held_out = levels
    assert not trained & held_out and {task for task, _ in trained} == {t for t, _ in held_out}
    folders = [config_of(argv).data.folder for argv in draws]
    assert folders == [str(tmp_path / "data"), str(tmp_path / "held_out")]
    for row in SMALL.rows:
        *training, own, held, _, _ = RUNNER["commands"](SMALL, row, 0, tmp_path)
        assert [config_of(argv).data.folder for argv in (own, held)] == folders
        assert len(training) == bool(row.stage)
        for argv in (*training, own, held):
            config = config_of(argv)
            assert config.model.path == f"{tmp_path}/model/export"
            assert {config_lib.picture_size(config.data, level) for level in (3, 6)} == {256}
    (tmp_path / "model" / "export").mkdir(parents=True)
    (tmp_path / "model" / "export" / "config.json").touch()
    assert RUNNER["prepare"](SMALL, tmp_path) == draws


def snake(size: int) -> MazeState:
    """The maze with the longest way: from corner to corner through every cell."""
    order = [(r, c if r % 2 == 0 else size - 1 - c) for r in range(size) for c in range(size)]
    sides = {(-1, 0): "up", (1, 0): "down", (0, -1): "left", (0, 1): "right"}
    walls = [[sum(WALLS.values())] * size for _ in range(size)]
    for here, there in itertools.pairwise(order):
        for (r, c), (other_r, other_c) in ((here, there), (there, here)):
            walls[r][c] -= WALLS[sides[other_r - r, other_c - c]]
    return MazeState(tuple(map(tuple, walls)), order[0], order[-1])


def long_boards(task: str, level: int) -> list[Board]:
    """The longest of 500 boards, by plan and by text, and the longest maze that there is."""
    env, rng = ENVS[task], np.random.default_rng(0)
    states = [env.generate(rng, level) for _ in range(500)]
    found = [max(states, key=lambda s: len(env.describe(s)))]
    found.append(max(states, key=lambda s: len(env.shortest_plan(s))))
    found += [snake(level)] if task == "maze" else []
    return [Board(task, level, 0, state, None) for state in found]


@pytest.mark.parametrize("size", [*RUNNER["SMALL"]["SIZES"]])
def test_every_record_and_response_of_a_size_fits_its_buckets(
    size: str, tmp_path: pathlib.Path
) -> None:
    there = RUNNER["SMALL"]["SIZES"][size]
    config = load_config(f"{ROOT / 'configs' / 'study' / 'small.py'}:{size}", [])
    tokenizer = write_tokenizer(tmp_path, there.shape, [*there.trained])
    (tmp_path / "config.json").write_text(json.dumps(init.hf_config(there.shape, tokenizer)))
    encoder = load_encoder(config.data, load_processor(tmp_path))
    rng = np.random.default_rng(0)
    lengths: dict[str, int] = collections.defaultdict(int)
    for levels, longest in zip((there.trained, there.held_out), there.responses, strict=True):
        for task, level in [(name, one) for name in levels for one in set(levels[name])]:
            for board in long_boards(task, level):
                student = encoder.student(board)
                assert len(encoder.reference(board, rng)) <= longest
                assert len(student.pictures[0].patches) == 256
                assert len(student.tokens) <= max(config_lib.sizes(config.data.prompt_buckets))
                assert len(encoder.teacher(board, "state").tokens) <= there.teacher[-1]
                for kind in ("questions", "cells", "plan_from_text", "plan_from_picture"):
                    tokens = len(encoder.record(board, kind, rng)[0].tokens)
                    lengths[kind] = max(lengths[kind], tokens)
    assert lengths.pop("plan_from_text") <= there.text[-1]
    assert max(lengths.values()) <= there.pictures[-1]


def test_rows_run_in_order_each_after_the_one_that_it_needs(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {row.name: row for row in ROWS}
    tasks = [(rows[name], seed) for name in ("method", "grounded", "jsd", "base") for seed in (0,)]
    began: list[str] = []

    def run(argv: list[str], log: pathlib.Path, core: int | None, study: pathlib.Path) -> None:
        began.append(log.parent.name)
        if log.parent.name == "jsd":
            raise RuntimeError("jsd: got exit code 1")

    RUNNER["run_all"].__globals__["run"], kept = run, RUNNER["run"]
    try:
        assert RUNNER["run_all"](NANO, tasks, tmp_path, 1) == 1
    finally:
        RUNNER["run_all"].__globals__["run"] = kept
    assert list(dict.fromkeys(began)) == ["grounded", "method", "jsd", "base"]
    assert "jsd: got exit code 1" in capsys.readouterr().err


def row(index: int, mode: str, is_right: bool) -> dict[str, Any]:
    common = {"model": "m", "attempt": 0, "task": "maze", "level": 3, "index": index, "mode": mode}
    common |= {"id": f"maze/3/{index}/{mode}", "response": "", "truncated": False}
    common |= {"response_tokens": 1}
    if mode == "perception":
        return {**common, "perception": {"map_size": True, "player": is_right}}
    outcome = dict.fromkeys(("success", "optimal", "parsed", "legal"), is_right)
    outcome |= {"reason": "success", "steps": 1, "progress": 1.0}
    extra = {"plan": [], "state_f1": 0.5, "state_exact": is_right, "plan_given_own_state": True}
    kinds = {"size": 1.0, "goal": float(is_right), **({"player": 1.0} if index else {})}
    return {**common, "outcome": outcome, **extra, "state_f1_by_kind": kinds}


def write_run(
    study: pathlib.Path,
    name: str,
    seed: int,
    right: int,
    boards: int = 20,
    evaluation: str = "evaluate",
) -> None:
    """An evaluation with `right` of 20 boards solved from pictures, all from text, none blind."""
    folder = study / name / str(seed) / evaluation
    folder.mkdir(parents=True)
    rows = []
    for i in range(boards):
        for mode, is_right in (("picture", i < right), ("text", True), ("blind", False)):
            rows.append(row(i, mode, is_right))
        rows.append(row(i, "perception", i < right))
    (folder / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    texts = [
        {"task": "maze", "level": 3, "index": i, "task_text": f"board {i}", "case": str(i)}
        for i in range(boards)
    ]
    (folder / "boards.jsonl").write_text("".join(json.dumps(t) + "\n" for t in texts))
    (folder / "summary.json").write_text("{}")
    times = {"rollout": 1.0, "update": 2.0}
    curve = [
        {"step": s, **times, "val/success": s / 40, "val/success/maze": s / 40} for s in (10, 20)
    ]
    (folder.parent / "distillation").mkdir(exist_ok=True)
    lines = "".join(json.dumps(m) + "\n" for m in curve)
    (folder.parent / "distillation" / "metrics.jsonl").write_text(lines)


def study_of(path: pathlib.Path) -> pathlib.Path:
    for name, rights in (("base", [4]), ("method", [14, 16, 18]), ("sampled", [10])):
        for seed, right in enumerate(rights):
            write_run(path, name, seed, right)
    return path


def test_tables_hold_the_means_over_seeds(tmp_path: pathlib.Path) -> None:
    study = study_of(tmp_path)
    models = tables.read_study(study, ROWS)
    assert list(models) == ["base", "method", "sampled"]
    found = tables.estimate(models["method"], "picture")
    assert found.value == pytest.approx(0.8)
    assert found.low < 0.7 < 0.9 < found.high
    assert tables.gap_share(models["method"], models["base"]) == pytest.approx(0.75)
    against = tables.difference(models["sampled"], models["method"])
    assert against.value == pytest.approx(-0.2)  # of seed 0 alone
    assert tables.updates_to(models["method"].runs[0], 0.5) == 20
    assert tables.seconds_an_update(models["method"].runs[0]) == 3.0
    text = tables.write_tables(study, ROWS, ["larger"])
    (line,) = [line for line in text.splitlines() if line.startswith("| Grounding, then distill")][
        :1
    ]
    assert "| 3 | 80.0 %" in line
    assert "| 75.0 % | 50.0 %" in line  # share of the gap, State F1
    assert "| 90.0 % | 100.0 % | 0.0 % |" in line  # questions, text, blind
    assert "larger" not in text
    drawing = ElementTree.fromstring(tables.curves_svg(models.values()))
    words = [part.text for part in drawing.iter() if part.tag.endswith("text")]
    assert models["method"].title in words
    lines = [part for part in drawing.iter() if part.tag.endswith("polyline")]
    assert len(lines) == (1 + 3 + 1) + 3  # a line a run, a mean a model
    assert sum(part.tag.endswith("line") for part in drawing.iter()) == len(lines) + 6  # the grid


def test_a_difference_to_the_base_is_over_every_seed(tmp_path: pathlib.Path) -> None:
    """Whichever rows have been run: the base has one run, and stands beside each of theirs."""
    for name, rights in (("base", [4]), ("jsd", [14, 16, 18])):
        for seed, right in enumerate(rights):
            write_run(tmp_path, name, seed, right)
    text = tables.write_tables(tmp_path, ROWS, [])
    (line,) = [line for line in text.splitlines() if "Jensen-Shannon − Base" in line]
    assert "| +60.0 (" in line


def test_differences_elsewhere_are_of_the_same_pairs(tmp_path: pathlib.Path) -> None:
    for name, right in (("base", 4), ("jsd", 14), ("jsd_only", 12)):
        for evaluation in ("evaluate", "larger"):
            write_run(tmp_path, name, 0, right, evaluation=evaluation)
    there = tables.write_tables(tmp_path, ROWS, ["larger"]).split("## Elsewhere: larger")[1]
    base, alone = [line for line in there.splitlines() if " − " in line]
    assert base.startswith("| Grounding, then distillation, Jensen-Shannon − Base | +50.0 (")
    start = "| Grounding, then distillation, Jensen-Shannon − Distillation alone"
    assert alone.startswith(start) and "| +10.0 (" in alone


def test_an_ablation_of_several_seeds_stands_beside_the_method_with_all_of_its_own(
    tmp_path: pathlib.Path,
) -> None:
    def lines() -> list[str]:
        models = tables.read_study(study, ROWS)
        return tables.ablation_table([models["sampled"]], models["method"]).splitlines()[2:]

    study = study_of(tmp_path)
    alone, sampled = lines()
    assert "| 1 | 70.0 %" in alone and "| 1 | 50.0 %" in sampled and "| -20.0 (" in sampled
    write_run(study, "sampled", 1, 6)
    alone, together, sampled = lines()
    assert "| 1 | 70.0 %" in alone and "| 3 | 80.0 %" in together
    assert "| 2 | 40.0 %" in sampled and "| -35.0 (" in sampled  # of seeds 0 and 1


def test_options_are_compared_with_their_recipe_on_every_kind_of_boards(
    tmp_path: pathlib.Path,
) -> None:
    study = study_of(tmp_path)
    write_run(study, "base", 0, 3, evaluation="colours")
    for name, rights in (("jsd", [12, 14]), ("gate", [15, 17])):
        for seed, right in enumerate(rights):
            write_run(study, name, seed, right)
            write_run(study, name, seed, right // 2, evaluation="colours")
    text = tables.write_tables(study, ROWS, ["colours"])
    head, _, recipe, option = text.split("## Options")[1].strip().splitlines()[:4]
    assert [cell.strip() for cell in head.split("|")[2:-1]] == [
        *("seeds", "validation", "test", "colours", "questions", "text")
    ]
    assert "| 2 | 50.0 % | 65.0 % | 32.5 % | 82.5 % | 100.0 % |" in recipe
    assert "| 2 | 50.0 % | 80.0 % +15.0 (" in option and "| 37.5 % +5.0 (" in option


def test_boards_of_the_main_rows_have_no_part_in_those_that_no_choice_has_seen(
    tmp_path: pathlib.Path,
) -> None:
    study = study_of(tmp_path)
    for name, right in (("jsd", 14), ("best_60", 18)):
        for seed in (0, 1):
            write_run(study, name, seed, right)
            # The first 20 boards are the main rows'; of 20 new ones 10 and 16 are solved.
            write_run(study, name, seed, right + 16, boards=40, evaluation="unseen")
    text = tables.write_tables(study, ROWS, [], ["unseen", "unseen_gbr"])
    recipe, option = text.split("choice: unseen")[1].strip().splitlines()[2:]
    assert "| 2 | 50.0 %" in recipe and recipe.endswith("| – |")
    assert "| 2 | 70.0 %" in option and "| +20.0 (" in option
    assert "unseen_gbr" not in text


def test_a_base_without_a_gap_has_a_dash_for_its_share(tmp_path: pathlib.Path) -> None:
    write_run(tmp_path, "base", 0, right=20)  # of 20 from pictures, and all from text
    base = tables.read_study(tmp_path, ROWS)["base"]
    assert tables.gap_share(base, base) is None
    assert "| – |" in tables.main_table([base], base)


def test_an_empty_study_and_other_boards_are_refused(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"evaluate/summary\.json not found; run some rows first"):
        tables.write_tables(tmp_path, ROWS, [])
    study_of(tmp_path)
    write_run(tmp_path, "forward", 0, 3, boards=5)
    with pytest.raises(ValueError, match="got 2 different sets of boards"):
        tables.read_study(tmp_path, ROWS)


def test_tables_are_of_what_is_there(tmp_path: pathlib.Path) -> None:
    """Neither base nor recipe need be there; what cannot be read is told, and not left out."""
    write_run(tmp_path, "gate", 0, 10)
    assert "## Main rows" not in tables.write_tables(tmp_path, ROWS, [])
    write_run(tmp_path, "jsd", 0, 12)
    write_run(tmp_path, "jsd", 0, 12, evaluation="colours")
    text = tables.write_tables(tmp_path, ROWS, ["colours"])
    (line,) = [line for line in text.split("## Elsewhere")[0].splitlines() if "Shannon |" in line][
        :1
    ]
    assert "| 1 | 60.0 %" in line and "| 60.0 % | – |" in line  # no gap without a base
    assert "base, from text" not in text and "| Maze |" in text
    with (tmp_path / "jsd" / "0" / "colours" / "rows.jsonl").open("a") as file:
        file.write("{broken\n{}\n")
    with pytest.raises(ValueError, match=r"colours/rows\.jsonl, line 81"):
        tables.write_tables(tmp_path, ROWS, ["colours"])
    (tmp_path / "jsd" / "0" / "evaluate" / "rows.jsonl").write_text("")
    with pytest.raises(ValueError, match=r"evaluate/rows\.jsonl: got no answers, want one or more"):
        tables.write_tables(tmp_path, ROWS, [])


def test_what_a_row_needs_is_run_before_it_unless_it_is_there(tmp_path: pathlib.Path) -> None:
    known = {row.name: row for row in ROWS}

    def chosen(names: str) -> list[tuple[str, int]]:
        return [(row.name, seed) for row, seed in RUNNER["choose"](names, known, tmp_path)]

    assert chosen("one_plan,one_plan,base") == [("grounded", 0), ("one_plan", 0), ("base", 0)]
    assert chosen("plans_one")[:2] == [("plans_base", 0), ("plans_one", 0)]
    making = RUNNER["commands"](NANO, known["plans_base"], 0, tmp_path)[0]
    assert making[1:] == [
        *(str(ROOT / "launch" / "nano_base.sh"), str(tmp_path / "plans"), "plans")
    ]
    for folder in ("grounded/0/grounding", "plans/export"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "model.safetensors").touch()
        (tmp_path / folder / "config.json").touch()
    assert chosen("plans_one")[0] == ("plans_one", 0)
    assert RUNNER["commands"](NANO, known["plans_base"], 0, tmp_path)[0] != making
    with pytest.raises(ValueError, match=r"--rows: got \['gone'\], want some of \['base'"):
        chosen("gone")


def test_a_program_that_fails_is_told_in_one_line(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    script = "print('step 1'); raise SystemExit('data.folder: not found\\n')"
    with pytest.raises(RuntimeError) as failed:
        RUNNER["run"]([sys.executable, "-c", script], tmp_path / "0.log", None, tmp_path)
    want = f"{tmp_path}/0.log: got exit code 1, want 0; it said: data.folder: not found"
    assert str(failed.value) == want
    for argv, wanted in (
        (["--table"], r"evaluate/summary\.json not found; run some rows first"),
        (["--rows", "gone"], r"^--rows: got \['gone'\]"),
    ):
        monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path), *argv])
        with pytest.raises(SystemExit, match=wanted):
            RUNNER["main"]()
    monkeypatch.setattr(sys, "argv", ["study.py", str(tmp_path), "--jobs", "0"])
    with pytest.raises(SystemExit):
        RUNNER["main"]()
    assert "--jobs: got '0', want a number of 1 or more" in capsys.readouterr().err


def test_validations_are_printed_by_update_and_seed(tmp_path: pathlib.Path) -> None:
    study = study_of(tmp_path)
    text = tables.write_tables(study, ROWS, []).split("## Validation boards by update")[1]
    head, _, line = text.strip().splitlines()[:3]
    assert [cell.strip() for cell in head.split("|")[2:-1]] == ["seeds", "10", "20"]
    assert line.endswith("| 0, 1, 2 | 25 / 25 / 25 | 50 / 50 / 50 |")
    assert len(text.split("## ")[0].strip().splitlines()) == 3  # rows with a curve of their own


def test_f1_stands_by_kind_of_fact(tmp_path: pathlib.Path) -> None:
    """At home and elsewhere, over all seeds; kinds that no board has have no column."""
    for name, rights in (("base", [4]), ("jsd", [14, 16])):
        for seed, right in enumerate(rights):
            write_run(tmp_path, name, seed, right)
            write_run(tmp_path, name, seed, right - 2, evaluation="colours")
    home, there = tables.write_tables(tmp_path, ROWS, ["colours"]).split("## Elsewhere: colours")
    home = home.split("## State F1 by kind of fact")[1].split("## ")[0]
    for text, shares in ((home, ("20.0 %", "75.0 %")), (there, ("10.0 %", "65.0 %"))):
        (head,) = [line for line in text.splitlines() if "Maze: player" in line]
        kinds = ["Maze: size", "Maze: player", "Maze: goal"]
        assert [cell.strip() for cell in head.split("|")[2:-1]] == kinds
        for share in shares:
            assert f"| 100.0 % | 100.0 % | {share} |" in text


def test_what_is_left_to_answers_from_text_is_over_every_seed(tmp_path: pathlib.Path) -> None:
    text = tables.write_tables(study_of(tmp_path), ROWS, [])
    (line,) = [line for line in text.splitlines() if " − base, from text" in line]
    assert line.startswith("| Grounding, then distillation − ") and "| -20.0 (" in line


def test_plans_stand_beside_the_base_that_has_seen_them(tmp_path: pathlib.Path) -> None:
    study = study_of(tmp_path)
    for name, rights in (("plans_base", [8]), ("plans_state", [14, 16]), ("plans_one", [10, 12])):
        for seed, right in enumerate(rights):
            write_run(study, name, seed, right)
            write_run(study, name, seed, right, evaluation="larger")
    write_run(study, "base", 0, 2, evaluation="larger")
    text = tables.write_tables(study, ROWS, ["larger"]).split("## Plans")[1]
    text, there = text.split("## Elsewhere: larger")
    _, of_plans = there.strip().rsplit("\n\n\n", 1)
    assert " – |" in of_plans and "Base that has" in of_plans and "| Base |" not in of_plans
    lines = {line.split("|")[1].strip(): line for line in text.splitlines() if "|" in line}
    base, state, one = (row.title for row in ROWS if row.group == "plans")
    assert "| 50.0 %" in lines[one] and "| 25.0 % |" in lines[one]  # its share of their gap
    assert "| -20.0 (" in lines[f"{one} − {state}"]
    assert "| +35.0 (" in lines[f"{state} − {base}"]
