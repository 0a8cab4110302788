"""What both pages share: how they are laid out, and written with their markdown and JSON twins."""

import json
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from etils import epath
from markupsafe import Markup

from mgsd_jax.evaluation.summary import Summary
from mgsd_jax.report import plots, tables
from mgsd_jax.report.boards import Pick, card
from mgsd_jax.report.inputs import PathLike
from mgsd_jax.report.markup import write

# Macro averages of the paper (arXiv 2606.06076), from the picture; other boards than ours.
PUBLISHED = (
    "Published macro averages, on other boards and models of other sizes: Qwen3-VL-4B "
    "11.2 → 30.5 %, Qwen3-VL-8B 17.2 → 35.6 %, GPT-5 41.3 %, Gemini-3-Flash 67.0 %."
)


class Section(NamedTuple):
    """A part of a page with its anchor; its contents stand one below the other."""

    id: str
    heading: str
    content: Sequence[Markup]


def write_page(
    out_path: PathLike,
    summary: Summary,
    sections: Sequence[Section],
    markdown: str,
    record: Mapping[str, object],
    *,
    key: str,
) -> epath.Path:
    """Write a page and its twins, and return its path.

    `record` is the JSON twin; the page begins with its title, order and the parts of its verdict.
    `key` says how to read the tiles below, the macro success of the models of `summary`. Raises
    ValueError for a path that does not end in .html.
    """
    path = epath.Path(out_path)
    if path.suffix != ".html":
        raise ValueError(f"report: got path {str(path)!r}, want one that ends in .html")
    models = list(summary["models"])
    tiles = [
        (
            plots.colour(model, models),
            plots.icon(model, mode, models),
            plots.who(model, mode),
            part["macro"],
        )
        for model, mode, part in plots.featured(summary, "picture", "text")
    ]
    words = (record["title"], record["order"], record.get("verdict", ()))
    html = write("page", *words, tiles, key, sections)
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
    return path


def missing(text: str) -> Markup:
    """Return a sentence on what is not there."""
    return write("paragraph", text, "missing")


def tables_html(made: Mapping[str, Sequence[tables.Table]]) -> dict[str, list[Markup]]:
    """Return the tables of each section as HTML; they scroll sideways on narrow screens."""
    return {name: [write("table", table) for table in some] for name, some in made.items()}


def gallery(picks: Sequence[Pick], intro: str, first: int = 0) -> list[Markup]:
    """Return boards with their routes, and how to read them; `first` numbers the first of them."""
    how = (
        f"{intro} A ring marks the start. A solid line is a plan that solves the board, a dashed "
        "one fails at its cross; P and D are pick and drop."
    )
    cards = [card(pick, number) for number, pick in enumerate(picks, first)]
    return [write("paragraph", how), write("cards", cards)]
