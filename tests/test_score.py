"""The score stage: every row, every mismatch, the exit code."""

import json
import pathlib
from typing import Any

import numpy as np
import pytest

from mgsd_jax import score
from mgsd_jax.envs import ENVS

ROOT = pathlib.Path(__file__).parents[1]
SAMPLE = ROOT / "tests" / "data" / "scoring_sample.jsonl"
REFERENCE = ROOT.parent / "shared" / "reference" / "scoring"


def write(path: pathlib.Path, rows: list[Any]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def sample_rows() -> list[dict[str, Any]]:
    return [json.loads(line) for line in SAMPLE.read_text(encoding="utf-8").splitlines()]


def stdout(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return capsys.readouterr().out.splitlines()


def test_the_sample_has_no_mismatch(capsys: pytest.CaptureFixture[str]) -> None:
    assert score.run(str(SAMPLE)) == 0
    assert stdout(capsys) == ["50 rows, 0 mismatches"]


@pytest.mark.parametrize("name", ["upstream_reward", "upstream_eval"])
def test_reference_files_have_no_mismatch(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    path = REFERENCE / f"{name}.jsonl"
    if not path.is_file():
        pytest.skip(f"no {name}.jsonl beside the repository")
    count = len(path.read_text(encoding="utf-8").splitlines())
    assert score.run(str(path)) == 0
    assert stdout(capsys)[-1] == f"{count} rows, 0 mismatches"


def test_mismatches_are_shown_with_row_got_and_want(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sample_rows()[:4]
    key = next(iter(rows[1]["expected"]))
    rows[1]["expected"][key] = 7
    rows[3]["expected"]["unheard_of"] = None
    assert score.run(write(tmp_path / "rows.jsonl", rows)) == 1
    lines = stdout(capsys)
    assert len(lines) == 3
    assert lines[0].startswith("row 2: got {") and f'"{key}": 7' in lines[0].split("want")[1]
    assert lines[1].startswith("row 4: got {") and "unheard_of" in lines[1].split("want")[1]
    assert lines[-1] == "4 rows, 2 mismatches"


def test_some_keys_of_a_score_are_enough(tmp_path: pathlib.Path) -> None:
    rows = sample_rows()
    for row in rows:
        if "success" in row["expected"]:
            row["expected"] = {"success": row["expected"]["success"]}
    assert score.run(write(tmp_path / "rows.jsonl", rows)) == 0


def test_rows_without_expectation_are_scored(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = sample_rows()[:3]
    want = [row.pop("expected") for row in rows]
    rows[2]["expected"] = None
    output = tmp_path / "new" / "scored.jsonl"
    assert score.run(write(tmp_path / "rows.jsonl", rows), str(output)) == 0
    assert stdout(capsys) == ["3 rows, 0 mismatches"]
    scored = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["score"] for row in scored] == want
    assert [row["match"] for row in scored] == [None] * 3
    assert [row["response"] for row in scored] == [row["response"] for row in rows]
    assert [path.name for path in output.parent.iterdir()] == ["scored.jsonl"]


def test_an_expected_refusal_has_to_be_about_its_key(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in sample_rows() if "exception" in row["expected"])
    other = {**row, "expected": {"exception": "KeyError", "message": "'start_pos'"}}
    any_message = {**row, "expected": {"exception": "IndexError", "message": "out of range"}}
    scores = {**row, "expected": {"success": 1.0}}
    bare = {key: value for key, value in row.items() if key != "expected"}
    works = {**sample_rows()[0], "expected": row["expected"]}
    rows = [row, other, any_message, scores, bare, works]
    assert score.run(write(tmp_path / "rows.jsonl", rows), str(tmp_path / "out.jsonl")) == 1
    lines = stdout(capsys)
    assert [line.split(":")[0] for line in lines[:-1]] == ["row 2", "row 4", "row 5", "row 6"]
    assert "layout_json: got no such line" in lines[0]
    assert lines[2].endswith("want a score")
    assert lines[-1] == "6 rows, 4 mismatches"
    scored = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["match"] for row in scored] == [True, False, True, False, None, False]
    assert "layout_json" in scored[0]["error"]


def test_blank_lines_are_no_rows_but_count_as_lines(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "rows.jsonl"
    row = {**sample_rows()[0], "expected": {"success": 7}}
    path.write_text("\n" + json.dumps(row) + "\n\n", encoding="utf-8")
    assert score.run(str(path)) == 1
    lines = stdout(capsys)
    assert lines[0].startswith("row 2:") and lines[-1] == "1 rows, 1 mismatches"
    path.write_text("")
    assert score.run(str(path)) == 0
    assert stdout(capsys) == ["0 rows, 0 mismatches"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: got b'{', want JSON"),
        ("[]", "line 2: got .*want a JSON object"),
        ('{"task_text": "", "response": ""}', "line 2: rules: got keys .*want text"),
        ('{"rules": "standard", "response": ""}', "line 2: task_text: got keys"),
        ('{"rules": "standard", "task_text": "", "response": 3}', "line 2: response: got 3"),
        (
            '{"rules": "standard", "task_text": "", "response": "", "task": 1}',
            "line 2: task: got 1, want text or null",
        ),
        (
            '{"rules": "standard", "task_text": "", "response": "", "expected": 1}',
            "line 2: expected: got 1, want a JSON object",
        ),
        ('{"rules": "mine", "task_text": "", "response": ""}', "line 2: rules: got 'mine', want"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: pathlib.Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(sample_rows()[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        score.run(str(path))


def test_bad_utf8_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"rules": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: got .*want JSON"):
        score.run(str(tmp_path / "rows.jsonl"))


def test_an_absent_input_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: got no such file"):
        score.run(str(tmp_path / "none.jsonl"))


def test_rows_under_the_standard_rules_say_how_well_the_state_was_read(
    tmp_path: pathlib.Path,
) -> None:
    env = ENVS["frozenlake"]
    state = env.generate(np.random.default_rng(0), 4)
    text = env.to_text(state, split="test", index=0, seed=0)
    lines = [f"- **{line.replace(':', '**:', 1)}" for line in env.state_lines(state)]
    rows = [
        {"rules": "standard", "task": None, "task_text": text, "response": "\n".join(lines[:count])}
        for count in (4, 3)
    ]
    assert score.run(write(tmp_path / "rows.jsonl", rows), str(tmp_path / "scored.jsonl")) == 0
    scored = [json.loads(line) for line in (tmp_path / "scored.jsonl").read_text().splitlines()]
    assert scored[0]["score"]["state_f1"] == 1.0 and scored[0]["score"]["state_exact"]
    assert not scored[1]["score"]["state_exact"] and scored[1]["score"]["contradicted"] == []
