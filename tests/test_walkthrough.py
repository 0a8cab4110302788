"""docs/walkthrough.ipynb runs, and says what it said when it was committed."""

import contextlib
import io
import json
import pathlib
import re
from typing import Any

import numpy as np
import pytest

from mgsd_jax.checks.fields import Json
from mgsd_jax.report import tokens

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "walkthrough.ipynb"
NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


def code_cells() -> list[Json]:
    cells = json.loads(PAGE.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


def printed(cell: Json) -> str:
    return "".join("".join(o["text"]) for o in cell["outputs"] if o["output_type"] == "stream")


def test_it_was_run_from_top_to_bottom_and_shows_pictures_and_colours() -> None:
    cells = code_cells()
    assert [cell["execution_count"] for cell in cells] == [*range(1, len(cells) + 1)]
    shown = [o for cell in cells for o in cell["outputs"] if o["output_type"] != "stream"]
    assert {o["output_type"] for o in shown} == {"execute_result"}
    kinds = [kind for output in shown for kind in output["data"]]
    assert kinds.count("image/png") == 2 and kinds.count("text/html") == 5
    assert PAGE.stat().st_size < 200_000


def test_it_is_a_valid_notebook() -> None:
    nbformat = pytest.importorskip("nbformat")
    nbformat.validate(nbformat.read(PAGE, 4))


def test_tokens_are_escaped_and_coloured_by_their_values() -> None:
    drawn = tokens.coloured(["<answer>", "U", "R"], [0.0, 0.5, 9.0], most=2.0)._repr_html_()
    assert "&lt;answer&gt;" in drawn and "<answer>" not in drawn
    assert re.findall(r"rgba\(220,50,47,([\d.]+)\)", drawn) == ["0.00", "0.50", "1.00"]
    assert re.findall(r'title="([\d.]+)"', drawn) == ["0.000", "0.500", "9.000"]


def test_readers_are_put_side_by_side_with_their_likeliest_tokens() -> None:
    likely = np.log(np.array([[0.25, 0.746, 0.004]], np.float32))
    readers = {"student": likely, "teacher": likely[:, ::-1]}
    words = ["up\n", "<down>", "left"]
    drawn = tokens.side_by_side(["up\n"], readers, words.__getitem__, values=[1.5], top=3)
    rows = drawn._repr_html_().split("<tr>")
    cells = re.findall(r"<td[^>]*>(.*?)</td>", rows[2])
    down, up, left = (f"<code>{word}</code>" for word in ("&lt;down&gt;", "up↵", "left"))
    assert cells == ["0", up, "1.500", f"{down} 75 % · {up} 25 %", f"{down} 75 % · {left} 25 %"]


@pytest.mark.slow
def test_its_cells_print_what_they_printed() -> None:
    """Words are the same; numbers may differ by one in their last digit, as rounding may."""
    names: dict[str, Any] = {}
    for cell in code_cells():
        said = io.StringIO()
        with contextlib.redirect_stdout(said):
            exec(compile("".join(cell["source"]), str(PAGE), "exec"), names)
        got, want = said.getvalue(), printed(cell)
        assert NUMBER.sub("#", got) == NUMBER.sub("#", want)
        for one, other in zip(NUMBER.findall(got), NUMBER.findall(want), strict=True):
            digits = len(other.partition(".")[2])
            allowed = 1.01 * 10**-digits if digits else 0
            assert abs(float(one) - float(other)) <= allowed, want
    assert names["everyone_after"] < names["everyone"]
