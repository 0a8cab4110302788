"""The report of fabricated rows: what it says, shows and refuses."""

import base64
import dataclasses
import html
import html.parser
import io
import itertools
import json
import math
import pathlib
import re
import shutil
import tomllib
from collections.abc import Sequence
from typing import Any, cast

import numpy as np
import pytest
from PIL import Image

from mgsd_jax.data.prompts import BUILT_IN
from mgsd_jax.envs import ENVS, frozenlake
from mgsd_jax.envs.base import REASONS
from mgsd_jax.evaluation.measures import Measure
from mgsd_jax.evaluation.rows import PlanRow, Row
from mgsd_jax.evaluation.rules import judge
from mgsd_jax.evaluation.summary import ERRORS, summarize
from mgsd_jax.report import (
    boards,
    curves,
    evaluation_page,
    findings,
    inputs,
    making,
    markup,
    tables,
    words,
)
from mgsd_jax.report.evaluation_page import build_report
from mgsd_jax.workdir import folders, metrics

LEVELS = {"frozenlake": (3, 4), "maze": (3,), "minibehaviour": (5,)}
BOARDS = 6  # a task and level
# How many of the BOARDS of each level are solved.
SOLVED = {
    ("base", "picture"): 1,
    ("grounded", "picture"): 3,
    ("distilled", "picture"): 5,
    ("base", "text"): 6,
    ("base", "blind"): 0,
}
LETTERS = {"up": "U", "down": "D", "left": "L", "right": "R", "pick": "PICK", "drop": "DROP"}


def make_rows() -> list[Any]:
    """Rows with real boards: the first plans are shortest ones, the rest stop one action short."""
    rng = np.random.default_rng(0)
    rows: list[Any] = []
    for task, levels in LEVELS.items():
        env = ENVS[task]
        for level, index in itertools.product(levels, range(BOARDS)):
            state = env.generate(rng, level)
            text = env.to_text(state, split="test", index=index, seed=0)
            board = {"task": task, "level": level, "index": index, "task_text": text, "attempt": 0}
            for (model, mode), solved in SOLVED.items():
                plan = env.shortest_plan(state)
                plan = plan if index < solved else plan[:-1]
                response = f"<b>&</b> <answer>{' '.join(LETTERS[a] for a in plan)}</answer>"
                rows.append(
                    {"id": f"{model}-{mode}-{task}-{level}-{index}", "model": model, "mode": mode}
                    | board
                    | {
                        "response": response,
                        "outcome": dataclasses.asdict(judge(state, task, response)),
                        "plan": list(plan),
                        "truncated": False,
                        "response_tokens": len(plan),
                        "state_f1": 1.0,
                        "state_exact": True,
                        "state_f1_by_kind": {fact[0]: 0.5 for fact in env.facts(state)},
                        "plan_given_own_state": None,
                    }
                )
            answers = {question.name: index % 2 == 0 for question in env.questions(state)}
            asked = {"id": f"asked-{task}-{level}-{index}", "model": "base", "mode": "perception"}
            rows.append(asked | board | {"response": "", "perception": answers})
    return rows


START: dict[str, Any] = {
    "time": 100.0,
    "command": ["/venv/bin/python", "-m", "mgsd_jax.main", "--stage", "evaluate", "<config>"],
    "commit": "0123456789ab" + 28 * "0",
    "is_dirty": True,
    "python": "3.11.7",
    "cores": 2,
    "devices": {"platform": "cpu", "kind": "cpu", "count": 1, "processes": 1},
    "versions": {"jax": "0.10.2", "grain": None},
}


def write_starts(folder: pathlib.Path, starts: Sequence[Any], *ends: Any) -> None:
    for name, records in ((folders.RUNS_FILE, starts), (folders.ENDS_FILE, ends)):
        (folder / name).write_text("".join(json.dumps(record) + "\n" for record in records))


def write_folder(folder: pathlib.Path, rows: Sequence[Row], start: Any = START) -> pathlib.Path:
    """Write an evaluation folder and the curves of a grounding run in it."""
    folder.mkdir()
    write_starts(folder, [start], {"time": 161.0, "seconds": 61.0, "core_seconds": 90.0})
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "summary.json").write_text(json.dumps(summarize(rows)))
    with metrics.open_writer(folder / "grounding") as writer:
        for step in range(1, 401):
            loss = math.nan if step == 7 else 1 / step
            writer.write(step, {"loss": loss, "grad_norm": 1.0, "kl/state": 0.1 * step})
    return folder


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """An evaluation folder, for tests that copy it."""
    return write_folder(tmp_path_factory.mktemp("sound") / "evaluation", make_rows())


@pytest.fixture(scope="module")
def folder(sound: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("report") / "evaluation"
    return shutil.copytree(sound, path)


@pytest.fixture(scope="module")
def report(folder: pathlib.Path) -> Any:
    runs = {"grounding": folder / "grounding", "distillation": folder / "distillation"}
    return build_report(folder, runs, folder / "out" / "r.html", title="A & B")


class Tags(html.parser.HTMLParser):
    """Collects tags with their attributes, and holds that every tag is closed in order."""

    VOID = frozenset({"meta", "line", "circle", "rect", "path", "polyline", "polygon"})

    def __init__(self, text: str) -> None:
        super().__init__()
        self.stack: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in self.VOID:
            self.stack.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.stack.pop() == tag

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


def test_the_page_is_one_sound_file_that_loads_nothing(report: pathlib.Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert len(text) < 2_000_000
    tags = Tags(text)
    assert tags.stack == []
    assert not tags.of("link") and not tags.of("img") and not tags.of("iframe")
    for tag, attrs in tags.tags:
        assert "src" not in attrs
        assert (attrs.get("href") or "#").startswith(("#", "data:image/png;base64,")), tag
    assert not re.findall(r"https?://|@import|url\(", text)
    ids = {attrs["id"] for _, attrs in tags.tags if "id" in attrs}
    assert {str(attrs["href"])[1:] for attrs in tags.of("a") + tags.of("use")} <= ids


def test_every_picture_has_words_and_nothing_unescaped_comes_in(report: pathlib.Path) -> None:
    text = report.read_text(encoding="utf-8")
    tags = Tags(text)
    drawings = [attrs for attrs in tags.of("svg") if attrs.get("role") == "img"]
    assert len(drawings) > 50 and all(attrs["aria-label"] for attrs in drawings)
    for attrs in tags.of("svg"):
        assert "role" in attrs or "aria-hidden" in attrs or "x" in attrs
    assert "<title>A &amp; B</title>" in text and "&lt;config&gt;" in text
    assert "&lt;b&gt;&amp;&lt;/b&gt;" in text and "<b>&</b>" not in text
    assert "nan" not in re.sub(r"base64,[^\"]*|var\(--[a-z]+\)", "", text).lower().split()


def test_what_a_model_or_a_user_wrote_stays_text(tmp_path: pathlib.Path) -> None:
    """Names, responses, reasons, questions, titles and commands: none becomes an element."""
    hostile = "</pre></style><script>alert(1)</script><img src=x onerror=\"alert('&lt;')\">"
    rows = make_rows()
    for row in rows:
        if row["mode"] == "picture" and row["model"] == "grounded":
            row |= {"model": hostile, "response": hostile, "id": hostile + row["id"]}
            row["outcome"] |= {"success": False, "optimal": False, "reason": hostile}
        elif row["mode"] == "perception":
            row["perception"] = {hostile: True}
    start = START | {"command": ["python", "--set", hostile], "versions": {hostile: hostile}}
    folder = write_folder(tmp_path / "evaluation", rows, start)
    runs = {hostile: folder / "grounding"}
    path = build_report(folder, runs, tmp_path / "r.html", title=hostile)
    tags = Tags(path.read_text(encoding="utf-8"))
    assert tags.stack == [] and not tags.of("img")
    assert len(tags.of("script")) == len(tags.of("style")) == 1
    assert not [name for _, attrs in tags.tags for name in attrs if name.startswith("on")]
    labels = [str(attrs.get("aria-label")) for attrs in tags.of("svg")]
    assert sum(hostile in label for label in labels) > 10


def test_the_template_and_the_style_sheet_are_in_a_wheel() -> None:
    package = pathlib.Path(markup.__file__).parents[1]
    project = tomllib.loads((package.parent / "pyproject.toml").read_text())
    patterns = project["tool"]["setuptools"]["package-data"]["mgsd_jax"]
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert {package / "report" / "page.html", package / "report" / "report.css"} <= shipped


def test_headline_is_computed(report: pathlib.Path) -> None:
    record = json.loads(report.with_suffix(".json").read_text())
    assert record["order"] == "Distilled > grounded > base"
    verdict, against = record["verdict"]
    assert against == "No task became clearly worse.", "the base alone was asked questions"
    assert verdict.startswith("From the picture alone, the distilled model solves 83.3 %")
    assert "33.3 points more than grounded at 50.0 %" in verdict
    assert "80 %" in verdict and "gap to text input (83.3 points) is closed" in verdict
    text = report.read_text(encoding="utf-8")
    assert verdict in html.unescape(text) and against in text
    assert verdict in report.with_suffix(".md").read_text()


def test_every_level_has_its_number_and_interval_on_the_page(
    folder: pathlib.Path, report: pathlib.Path
) -> None:
    summary = json.loads((folder / "summary.json").read_text())
    page_text = report.read_text(encoding="utf-8")
    markdown = report.with_suffix(".md").read_text()
    for model, mode in SOLVED:
        for task, part in summary["models"][model][mode]["tasks"].items():
            for level in part["levels"].values():
                measure = level["success"]
                number, limits = words.percent(measure["value"]), words.interval(measure)
                assert f"{number}<small>{limits}" in page_text
                assert f"| {number} ({limits}) |" in markdown
            assert words.TASKS[task] in page_text


def test_f1_is_told_by_kind_of_fact_beside_what_guessing_and_text_reach(
    report: pathlib.Path,
) -> None:
    """In the words of the task; boards without such facts are not counted; unknown kinds last."""
    rows = make_rows()
    for row in rows:
        if row["model"] == "base" and row["mode"] == "blind":
            row["state_f1_by_kind"] = {"goal": 0.25, "lava": 1.0}
    (table,) = tables.facts_by_kind(summarize(rows))
    found = {(line[0].text, line[1].text): line[2:] for line in table.rows}
    models = ["base", "grounded", "distilled"]
    assert [cell.text for cell in table.head] == ["task", "facts", *models]
    assert found.keys() >= {("FrozenLake", "holes"), ("Maze", "open sides")}
    assert {cell.text for line in found.values() for cell in line} == {"50.0 %"}
    holes = {cell.detail.rpartition("n ")[2] for cell in found["FrozenLake", "holes"]}
    lakes = [row for row in rows if (row["model"], row["mode"]) == ("grounded", "picture")]
    assert holes == {str(sum("H" in row["task_text"].partition("map:")[2] for row in lakes))}
    # Wrong pictures and text stand beside the last model: of the base alone, beside the base.
    (alone,) = tables.facts_by_kind(summarize([row for row in rows if row["model"] == "base"]))
    assert [cell.text for cell in alone.head[2:]] == ["base", "base, wrong picture", "base, text"]
    assert [cell.text for cell in alone.rows[-1][:2]] == ["MiniBehaviour", "lava"]
    for row in rows:
        row["state_f1_by_kind"] = None
    assert tables.facts_by_kind(summarize(rows)) == []
    page = report.read_text()
    before, after = (page.rindex(evaluation_page.HEADINGS[n]) for n in ("diagnostics", "errors"))
    assert before < page.rindex(table.title) < after
    assert f"### {table.title}" in report.with_suffix(".md").read_text()


def test_a_missing_curve_is_stated_and_values_that_are_not_finite_are_counted(
    report: pathlib.Path,
) -> None:
    text = report.read_text(encoding="utf-8")
    assert "No learning curve: distillation/metrics.jsonl of the distillation run was not" in text
    assert "; 1 not finite<" in text
    assert "distillation/metrics.jsonl" in report.with_suffix(".md").read_text()
    stages = json.loads(report.with_suffix(".json").read_text())["stages"]
    assert stages["distillation"]["missing"] and stages["grounding"]["missing"] is None
    assert stages["grounding"]["curves"]["loss"]["not_finite"] == 1
    assert len(stages["grounding"]["curves"]["loss"]["steps"]) <= 150


def test_a_stage_without_a_run_is_stated(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    path = build_report(folder, {}, tmp_path / "r.html", title="t")
    text = path.read_text(encoding="utf-8")
    for stage in inputs.STAGES:
        assert f"No learning curve: no {stage} run was given to this report." in text


def test_the_same_input_gives_the_same_bytes(
    folder: pathlib.Path, report: pathlib.Path, tmp_path: pathlib.Path
) -> None:
    rows = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    other = write_folder(tmp_path / "evaluation", [json.loads(row) for row in reversed(rows)])
    runs = {"grounding": other / "grounding", "distillation": other / "distillation"}
    path = build_report(other, runs, other / "r.html", title="A & B")
    assert path.read_bytes() == report.read_bytes()


def test_the_gallery_takes_each_kind_from_each_task_and_draws_every_model() -> None:
    rows = make_rows()
    picks = boards.choose(rows)
    kinds = [(pick.board[0], pick.kind) for pick in picks]
    for task in LEVELS:
        assert kinds.count((task, "fixed")) == boards.QUOTA["fixed"]
        assert kinds.count((task, "failed")) == boards.QUOTA["failed"]
        assert kinds.count((task, "solved")) == boards.QUOTA["solved"]
    for pick in picks:
        assert list(pick.rows) == ["base", "grounded", "distilled"]
        before, after = (pick.rows[name]["outcome"]["success"] for name in ("base", "distilled"))
        assert (pick.kind in ("solved", "broken")) == before
        assert (pick.kind in ("solved", "fixed")) == after
    text = boards.card(picks[0], 3)
    assert text.count('href="#board3"') == 3 and text.count('id="board3"') == 1
    assert "base fails, distilled solves it" in text
    assert text.count('class="route good"') + text.count('class="route bad"') == 3


def test_the_picture_in_the_page_is_the_board() -> None:
    state = ENVS["maze"].generate(np.random.default_rng(0), 4)
    picture = ENVS["maze"].render(state, boards.SIDE)
    data = boards.png_uri(picture).removeprefix("data:image/png;base64,")
    read = Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")
    assert np.array_equal(np.asarray(read), picture)


def test_lanes_keep_right_cut_no_corner_and_cross_over_to_turn_back() -> None:
    # Down and back up: two lanes, 2 apart; then a left turn and a right turn, one corner each.
    assert boards._lane((5, 5), [("down", (5, 15)), ("up", (5, 5))], 1) == [
        *((4, 5), (4, 15), (6, 15), (6, 5)),
    ]
    assert boards._lane((5, 5), [("down", (5, 15)), ("right", (15, 15))], 1) == [
        *((4, 5), (4, 16), (15, 16)),
    ]
    assert boards._lane((5, 5), [("down", (5, 15)), ("left", (-5, 15))], 1) == [
        *((4, 5), (4, 14), (-5, 14)),
    ]
    assert boards._lane((5, 5), [], 1) == [(5, 5)]


@pytest.mark.parametrize(
    ("task", "text", "plan", "want"),
    [
        ("frozenlake", "SFF\nFHF\nFFG", "right down", "fell into a hole at action 2 of 2"),
        ("frozenlake", "SFF\nFHF\nFFG", "down", "stopped short of the goal after 1 action"),
        ("frozenlake", "SFF\nFHF\nFFG", "down down right right", "solved in 4 actions, the sh"),
        ("frozenlake", "SFF\nFHF\nFFG", "up down down right right", "solved in 5 actions, not"),
        ("frozenlake", "SFF\nFHF\nFFG", "jump", "a word that is no action"),
    ],
)
def test_what_came_of_a_plan_in_words(task: str, text: str, plan: str, want: str) -> None:
    state = frozenlake.FrozenLakeState(tuple(text.split()))
    response = f"<answer>{plan}</answer>"
    outcome = dataclasses.asdict(judge(state, task, response))
    row = {"outcome": outcome, "plan": plan.split(), "truncated": False}
    assert boards.outcome_words(cast(PlanRow, row)).startswith(want)


def test_every_reason_and_error_has_words() -> None:
    for reasons in (REASONS, *(env.reasons for env in ENVS.values())):
        assert words.REASONS.items() >= reasons.items()
    assert set(words.ERRORS) == set(ERRORS)
    assert set(words.TASKS) == set(ENVS)


def verdict_of(solved: dict[tuple[str, str], int], n: int = 40) -> tuple[str, str]:
    """(order, verdict) of an evaluation where the first so many of n boards are solved."""
    rows = []
    for (model, mode), count in solved.items():
        for row in make_rows()[:1] * n:
            index = sum(r["model"] == model and r["mode"] == mode for r in rows)
            outcome = row["outcome"] | {"success": index < count}
            rows.append(row | {"model": model, "mode": mode, "index": index, "outcome": outcome})
    summary = summarize(rows)
    return words.order(summary), words.verdict(summary)


def test_the_verdict_says_when_nothing_is_clear_worse_or_unmeasured() -> None:
    order, verdict = verdict_of({("base", "picture"): 20, ("distilled", "picture"): 21})
    assert order == "Distilled ≈ base" and "not clearly different from base" in verdict
    assert "the gap to text input was not measured" in verdict
    order, verdict = verdict_of({("base", "picture"): 30, ("grounded", "picture"): 10})
    assert order == "Grounded < base" and "50.0 points fewer than base" in verdict
    assert "their own intervals do not overlap" in verdict
    gap = {("base", "picture"): 20, ("base", "text"): 10, ("distilled", "picture"): 30}
    assert "there is no gap to close" in verdict_of(gap)[1]
    order, verdict = verdict_of({("base", "text"): 10})
    assert "nothing to compare" in verdict


def test_a_limit_close_to_zero_is_told_from_zero() -> None:
    found = [words.points(x / 100) for x in (-0.03, 0.04, 0.06, -1.23, 0.0, -1e-15, -0.004)]
    assert found == ["−0.03", "+0.04", "+0.1", "−1.2", "+0.0", "+0.0", "+0.0"]


def test_ticks_are_round_inside_and_read_differently() -> None:
    ends = (*((0.0, 1.0), (-3.2, 8.9), (1e-7, 3e-7), (1000.0, 1001.0), (-5e6, 9e6)),)
    for low, high in (*ends, (145.1395, 145.1413), (0.99991, 0.99999), (2e6, 2e6 + 9)):
        ticks = curves.nice_ticks(low, high)
        labels = curves.tick_labels(ticks)
        assert len(set(labels)) == len(labels)
        assert [float(label) for label in labels] == pytest.approx(
            ticks, rel=0, abs=(high - low) / 1e3
        )
        assert 2 <= len(ticks) <= 6
        assert all(low - 1e-9 * abs(low) <= tick <= high + 1e-9 * abs(high) for tick in ticks)


def test_every_metric_of_training_has_words_and_a_unit() -> None:
    """Those that the stages write: on the page none is called by its name in the code."""
    sources = [
        path.read_text()
        for folder in ("training", "stages")
        for path in (pathlib.Path(markup.__file__).parents[1] / folder).glob("*.py")
    ]
    written = {name for text in sources for name in re.findall(r'"((?:val|rollout)/\w+)"', text)}
    assert {"val/success", "rollout/length"} <= written
    for name in written | {
        "loss",
        "kl/plan",
        "questions/loss",
        "agree_pos/0-3",
        "seconds",
        "tokens_per_s/update",
    }:
        title, unit, _ = words.metric(name)
        assert unit != "value", name
        assert title != name and "_" not in title and "/" not in title
    assert words.metric("val/success/maze")[:2] == ("Solved boards, validation, Maze", "share")
    assert words.metric("new_thing/x") == ("New thing, x", "value", len(words.METRICS))


def test_a_curve_without_a_value_shows_none_and_one_of_a_single_step_has_one_label() -> None:
    none = curves.curve_plot(inputs.Curve("loss", (), (), 2))
    assert "no value; 2 not finite" in none and "<svg" not in none
    one = curves.curve_plot(inputs.Curve("loss", (7,), (0.5,), 0))
    assert one.count(">7</text>") == 1 and ">nats a token</text>" in one
    two = curves.curve_plot(inputs.Curve("loss", (7, 9), (0.5, 0.5), 0))
    assert ">step</text>" in two and ">7</text>" in two and ">9</text>" in two
    share = curves.curve_plot(inputs.Curve("val/success", (7, 9), (1.0, 1.0), 0))
    assert ">1.0</text>" in share and ">1.2" not in share  # no axis goes beyond what there can be


# What speaks against the headline


def asked_rows(rights: dict[tuple[str, str], int], n: int = 60) -> list[Any]:
    """Answers of models to MiniBehaviour's questions; the first so many of n are right."""
    (row,) = (r for r in make_rows() if r["mode"] == "perception" and r["id"] == "asked-maze-3-0")
    return [
        row
        | {"model": model, "id": f"{model}-{i}", "index": i}
        | {"perception": {q: i < k for (m, q), k in rights.items() if m == model}}
        for model in dict.fromkeys(model for model, _ in rights)
        for i in range(n)
    ]


def test_a_fall_in_any_question_is_found_and_said() -> None:
    rights = {("grounded", "printer"): 20, ("distilled", "printer"): 6, ("base", "printer"): 3}
    rights |= {("grounded", "goal"): 20, ("distilled", "goal"): 19}  # by chance
    (fall,) = findings.falls(asked_rows(rights))
    assert (fall.earlier, fall.last) == ("grounded", "distilled")
    assert (fall.before, fall.after) == (pytest.approx(1 / 3), pytest.approx(0.1))
    assert fall.difference["high"] < 0
    said = findings.sentence([fall], were_asked=True)
    assert said.startswith("What became worse: Maze's question “printer” at 10.0 %, where grounded")
    assert "reaches 33.3 % (paired −" in said
    assert "4 more" not in said and "1 more, listed below" in findings.sentence(
        [fall] * 4, were_asked=True
    )
    assert findings.sentence([], were_asked=True).startswith("No task and no question became")
    assert "33.3 %" in tables.to_markdown(findings.table([fall]))
    assert findings.falls(asked_rows(rights)[:60]) == [], "one model has nothing to fall from"


def test_a_fall_in_planning_is_found_too(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    rows = [
        row | {"model": {"base": "distilled", "distilled": "base"}.get(row["model"], row["model"])}
        for row in make_rows()
        if row["mode"] == "picture"
    ]
    rows = [row | {"id": f"{row['model']}-{row['id']}"} for row in rows]
    found = findings.falls(rows)
    assert [fall.what for fall in found][:1] == ["planning FrozenLake from the picture"]
    path = build_report(write_folder(tmp_path / "e", rows), {}, tmp_path / "r.html", title="t")
    assert "What became worse: planning" in path.read_text(encoding="utf-8")
    assert "## What became worse" in path.with_suffix(".md").read_text()


# How it was made


def test_commands_are_told_as_typed() -> None:
    for argv, want in (
        (
            ["/venv/bin/python3", "-m", "mgsd_jax.main", "--x=a b"],
            "python3 -m mgsd_jax.main '--x=a b'",
        ),
        (["/venv/bin/python", "/venv/bin/mgsd_jax", "--stage=ask"], "mgsd_jax --stage=ask"),
        (["python", "mgsd_jax/main.py", "-v"], "python mgsd_jax/main.py -v"),
        (["mgsd_jax"], "mgsd_jax"),
    ):
        assert making.command_line(argv) == want


def test_what_was_set_apart_from_the_recipe_is_told_once(tmp_path: pathlib.Path) -> None:
    flags = ["--config", "configs/nano.py", "--set=a.lr=1e-3", "--set", "b.steps=7"]
    flags += ["--set", "model.path=/home/me", "--workdir=x"]
    write_starts(tmp_path, [START | {"command": ["python", "-m", "p", *flags]}] * 2)
    made = [making.read_made("grounding", tmp_path)]
    assert making.recipe(made) == ("configs/nano.py", ["a.lr=1e-3", "b.steps=7"])
    assert making.facts(made)[0] == "Recipe: configs/nano.py, with a.lr=1e-3, b.steps=7"
    assert "Code: commit 0123456789ab with changes that are in no commit" in making.facts(made)
    assert making.recipe([making.read_made("x", tmp_path / "absent")]) == ("", [])


def test_costs_are_those_of_the_starts_that_ended(tmp_path: pathlib.Path) -> None:
    chips = {"platform": "tpu", "kind": "TPU v5e", "count": 16, "processes": 4}
    starts = [START | {"time": t, "devices": chips} for t in (0.0, 10.0, 20.0)]
    ends = [{"time": t, "seconds": 3600.0, "core_seconds": 9e9} for t in (5.0, 25.0)]
    for name, some, ended in (("tpu", starts, ends), ("cpu", [START], [])):
        (tmp_path / name).mkdir()
        write_starts(tmp_path / name, some, *ended)
    made = [making.read_made(name, tmp_path / name) for name in ("tpu", "cpu", "old")]
    lines = tables.grid(making.costs(made))
    assert (
        "| tpu | 16 × TPU v5e, 4 processes | – | – | 2 h 0 min | 32 chip hours | 3 (1 killed) |"
        in lines
    )
    assert "| cpu | 2 CPU cores | – | – | – | – | 1 |" in lines
    assert "| old | – | – | – | – | – | 0 |" in lines
    assert [making.duration(s) for s in (None, 37, 151.4, 3700)] == [
        *("–", "37 s", "2 min 31 s", "1 h 1 min"),
    ]


def test_tokens_of_rollouts_are_counted(tmp_path: pathlib.Path) -> None:
    """Four steps of (8 - 2) prompts, the share of questions left out, with 3 rollouts each."""
    settings = {"distillation": {"batch_size": 8, "rollouts": 3, "grounding_share": 0.25}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    curve = inputs.Curve("rollout/length", (1, 2, 3, 4), (10.0, 20.0, 30.0, 40.5), 0)
    stage = inputs.Stage("distillation", (curve,), None)
    made = making.read_made("distillation", tmp_path, stage)
    assert (made.steps, made.tokens) == (4, 100.5 * 6 * 3)
    (tmp_path / "config.json").unlink()
    assert making.read_made("distillation", tmp_path, stage).tokens is None


def test_the_page_tells_its_commands_prompt_and_answers(report: pathlib.Path) -> None:
    text, markdown = html.unescape(report.read_text("utf-8")), report.with_suffix(".md").read_text()
    for page in (text, markdown):
        assert "python -m mgsd_jax.main --stage evaluate '<config>'" in page
        assert "Versions: Python 3.11.7, jax 0.10.2" in page
        assert "1 min 1 s" in page and "0.025 core hours" in page
    assert BUILT_IN.template("frozenlake", "student") in text
    examples, exchange = (
        re.findall(f'<section id="{name}">(.*?)</section>', text, re.DOTALL)[0]
        for name in ("examples", "exchange")
    )
    assert examples.count('<article class="card">') == len(LEVELS)
    assert exchange.count("<b>&</b> <answer>") == 3
    drawn = re.findall(r'id="(board\d+)"', text)
    assert len(drawn) == len(set(drawn)) == text.count('<article class="card">')


def test_bins_keep_mean_and_extremes() -> None:
    values = tuple(np.random.default_rng(0).normal(size=1000))
    bins = curves.bin_curve(inputs.Curve("x", tuple(range(1000)), values, 0), 100)
    assert len(bins) == 100
    assert np.mean([mean for _, mean, _, _ in bins]) == pytest.approx(np.mean(values))
    assert min(low for _, _, low, _ in bins) == min(values)
    assert max(high for _, _, _, high in bins) == max(values)


def test_curves_come_in_the_order_of_a_reader() -> None:
    names = ("seconds/rollout", "lr", "grad_norm", "val/success", "kl/state", "val/kl", "loss")
    given = [inputs.Curve(name, (1,), (1.0,), 0) for name in names]
    found = [curve.name for curve in evaluation_page.sort_curves(given)]
    assert found[:4] == ["loss", "val/kl", "val/success", "kl/state"]
    assert found[4:] == ["grad_norm", "seconds/rollout", "lr"]


def spoil_model(folder: pathlib.Path) -> None:
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    rows[0]["model"] = "mystery"
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def spoil_count(folder: pathlib.Path) -> None:
    lines = (folder / "rows.jsonl").read_text().splitlines(keepends=True)
    (folder / "rows.jsonl").write_text("".join(lines[:-1]))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda f: (f / "rows.jsonl").unlink(), r"rows\.jsonl: not found, want an eval"),
        (lambda f: (f / "summary.json").unlink(), r"summary\.json: not found, want"),
        (lambda f: (f / "rows.jsonl").write_text("\n"), r"rows\.jsonl: got no rows, want"),
        (lambda f: (f / "rows.jsonl").write_text("{]\n"), r"rows\.jsonl, line 1: got .*JSON"),
        (lambda f: (f / "summary.json").write_text("{}"), r"summary\.json: got keys \[\], want"),
        (
            lambda f: (f / "summary.json").write_text(
                json.dumps(summarize(make_rows()) | {"differences": None})
            ),
            r"summary\.json: differences: got None, want dict",
        ),
        (spoil_model, r"rows\.jsonl: got model 'mystery' .* want one of \['base', 'dist"),
        (spoil_count, r"summary\.json: got rows by model and mode"),
        (
            lambda f: (f / "grounding" / "metrics.jsonl").write_text('{"loss": 1}\n'),
            r"metrics\.jsonl, line 1: got",
        ),
    ],
)
def test_what_is_missing_or_wrong_is_one_clear_error(
    sound: pathlib.Path, tmp_path: pathlib.Path, spoil: Any, message: str
) -> None:
    folder = tmp_path / "evaluation"
    shutil.copytree(sound, folder)
    spoil(folder)
    with pytest.raises(ValueError, match=message):
        build_report(folder, {"grounding": folder / "grounding"}, tmp_path / "r.html", title="t")
    assert not (tmp_path / "r.html").exists()


def test_a_path_that_is_no_html_is_refused(folder: pathlib.Path, tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"got path .*report\.md'.* want one that ends in"):
        build_report(folder, {}, tmp_path / "report.md", title="t")


def test_an_evaluation_of_questions_alone_has_a_page_too(tmp_path: pathlib.Path) -> None:
    rows = [row for row in make_rows() if row["mode"] == "perception"]
    folder = write_folder(tmp_path / "evaluation", rows)
    path = build_report(folder, {}, tmp_path / "r.html", title="t")
    text = path.read_text(encoding="utf-8")
    assert "No model was asked for a plan in this evaluation." in text
    assert "No board was answered from the picture by every model." in text
    assert "map size" in text and Tags(text).stack == []


def test_sections_of_the_page_are_the_sections_of_its_twin(report: pathlib.Path) -> None:
    markdown = report.with_suffix(".md").read_text()
    tags = Tags(report.read_text(encoding="utf-8"))
    assert [attrs["id"] for attrs in tags.of("section")] == list(evaluation_page.HEADINGS)
    found = re.findall(r"^## (.*)$", markdown, re.M)
    left_out = {"examples", "exchange", "boards", "worse"}  # nothing became worse
    assert found == [
        heading for name, heading in evaluation_page.HEADINGS.items() if name not in left_out
    ]


def test_names_that_read_alike_keep_a_column_each() -> None:
    """'a_b' and 'a b' are two models, though both are written 'a b'."""
    rows = [row for row in make_rows() if row["mode"] == "perception"]
    rows = [
        row | {"model": model, "id": model + row["id"]} for row in rows for model in ("a b", "a_b")
    ]
    table = tables.perception(summarize(rows), "maze")
    assert [cell.text for cell in table.head] == ["question", "a b", "a b"]


def measure_of(low: float | None, high: float | None) -> Measure:
    return {"value": 0.4, "low": low, "high": high, "n": 9}


def test_numbers_read_well() -> None:
    assert words.spelled(measure_of(0.25, 0.551)) == "40.0 % (25.0–55.1)"
    assert words.interval(measure_of(-0.1, 0.551)) == "−10.0 to 55.1"
    assert words.signed(measure_of(-0.1, 0.551)) == "−10.0 to +55.1"
    assert words.spelled(measure_of(None, None)) == "40.0 %"
    assert words.spelled(None) == words.DASH
    assert [curves.short(x) for x in (0.41234, 1.4e-6, 12345.0, 999.9, 0.0)] == [
        *("0.412", "1.4e-6", "12.3k", "1000", "0"),
    ]
