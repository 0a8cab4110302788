"""The score stage: every row, every mismatch, the exit code."""

import errno
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from mgsd_jax.envs import ENVS
from mgsd_jax.stages import score

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
        (
            '{"rules": "standard", "task_text": "", "response": [{"image": 1}]}',
            r"line 2: response: got \[",
        ),
        (
            '{"rules": "standard", "task_text":"", "response": "", "expected": {"exception": ""}}',
            "line 2: expected: got .*want a message",
        ),
        ("[" * 100_000, "line 2: got .*want JSON"),
        ("9" * 5_000, "line 2: got .*want JSON"),
        ('{"rules": "mine", "task_text": "", "response": ""}', "line 2: rules: got 'mine', want"),
    ],
)
def test_a_malformed_row_is_named(tmp_path: pathlib.Path, line: str, message: str) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(sample_rows()[0]) + "\n" + line + "\n")
    with pytest.raises(ValueError, match=f"rows.jsonl, {message}"):
        score.run(str(path))


@pytest.mark.parametrize("rules", ["standard", "upstream_reward", "upstream_eval"])
@pytest.mark.parametrize("response", [None, []])
def test_a_null_response_is_no_plan_and_counted(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str], rules: str, response: Any
) -> None:
    state = ENVS["maze"].generate(np.random.default_rng(0), 3)
    text = ENVS["maze"].to_text(state, split="test", index=0, seed=0)
    row = {"rules": rules, "task_text": text, "response": response}
    output = tmp_path / "out.jsonl"
    assert score.run(write(tmp_path / "rows.jsonl", [row, row]), str(output)) == 0
    null = response is None
    assert stdout(capsys) == [
        *(["2 rows have no response (null), which is no plan"] if null else []),
        "2 rows, 0 mismatches",
    ]
    for scored in map(json.loads, output.read_text().splitlines()):
        assert scored["score"]["success"] in (False, 0.0) and scored["response"] == response
        assert not any(scored["score"].get(key) for key in ("parsed", "parse_success", "legal"))


def test_parts_of_a_response_are_scored_as_one_text(
    tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = next(row for row in sample_rows() if "<answer>" in row["response"])
    text = row["response"]
    row["response"] = [{"type": "text", "text": text[:5]}, {"type": "text", "text": text[5:]}]
    assert score.run(write(tmp_path / "rows.jsonl", [row])) == 0
    assert stdout(capsys) == ["1 rows, 0 mismatches"]


def test_lone_surrogates_go_through(
    tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """JSON can hold half of a character; UTF-8 cannot, nor can a plain terminal an arrow."""
    row = sample_rows()[0]
    wrong = {"response": "\ud83d \u2192 <answer>", "expected": {"\udc00": "\u2192"}}
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({**row, **wrong}) + "\n" + json.dumps(row) + "\n")
    screen = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(score.sys, "stdout", screen)
    output = tmp_path / "out.jsonl"
    assert score.run(str(path), str(output)) == 1
    assert screen.buffer.getvalue().decode().splitlines()[-1] == "2 rows, 1 mismatches"
    first, second = (json.loads(line) for line in output.read_bytes().decode().splitlines())
    assert (first["response"], first["match"]) == (wrong["response"], False)
    assert (second["response"], second["match"]) == (row["response"], True)


def test_an_output_that_cannot_be_written_is_named(tmp_path: pathlib.Path) -> None:
    rows = write(tmp_path / "rows.jsonl", sample_rows()[:2])
    (tmp_path / "file").write_text("")
    for bad, why in (
        (tmp_path, "is a directory"),
        (tmp_path / "file" / "out.jsonl", "(file exists|not a directory)"),
        (tmp_path / ("x" * 300), "file name too long"),
        ("", "is a directory"),
    ):
        with pytest.raises(ValueError, match=rf"^--output .*: cannot be written \({why}\)"):
            score.run(rows, str(bad))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "rows.jsonl"]


def test_a_full_disk_is_named_and_a_device_stays_one(tmp_path: pathlib.Path) -> None:
    if not pathlib.Path("/dev/full").exists():
        pytest.skip("no /dev/full here")
    rows = write(tmp_path / "rows.jsonl", sample_rows()[:2])
    with pytest.raises(OSError, match="No space left on device: '/dev/full'") as raised:
        score.run(rows, "/dev/full")
    assert raised.value.errno == errno.ENOSPC
    assert score.run(rows, "/dev/null") == 0
    for device in ("/dev/full", "/dev/null"):
        assert pathlib.Path(device).is_char_device()


def test_bad_utf8_is_named(tmp_path: pathlib.Path) -> None:
    (tmp_path / "rows.jsonl").write_bytes(b'{"rules": "\xff"}\n')
    with pytest.raises(ValueError, match=r"rows\.jsonl, line 1: got .*want JSON"):
        score.run(str(tmp_path / "rows.jsonl"))


def test_an_absent_input_is_named(tmp_path: pathlib.Path) -> None:
    with pytest.raises(ValueError, match=r"none\.jsonl: cannot be read \(no such file"):
        score.run(str(tmp_path / "none.jsonl"))
    with pytest.raises(ValueError, match=r"cannot be read \(is a directory\), want JSON lines"):
        score.run(str(tmp_path))
    with pytest.raises(ValueError, match=r"\(file name too long\), want JSON lines"):
        score.run("x" * 300)


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
