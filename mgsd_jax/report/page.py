"""What both pages share: their skeleton, their parts, and how they are written with their twins."""

import dataclasses
import json
from collections.abc import Iterable, Mapping, Sequence

from etils import epath
from markupsafe import Markup

from mgsd_jax.report import plots, tables
from mgsd_jax.report.inputs import PathLike, Summary
from mgsd_jax.report.markup import write
from mgsd_jax.report.words import interval, percent

# Macro averages of the paper (arXiv 2606.06076), from the picture; other boards than ours.
PUBLISHED = (
    "Published macro averages, on other boards and models of other sizes: Qwen3-VL-4B "
    "11.2 → 30.5 %, Qwen3-VL-8B 17.2 → 35.6 %, GPT-5 41.3 %, Gemini-3-Flash 67.0 %."
)
HOW_TO_READ_ROUTES = (
    "A ring marks the start. A solid line is a plan that solves the board, a dashed one fails at "
    "its cross; P and D are pick and drop."
)


@dataclasses.dataclass(frozen=True)
class Section:
    """A part of a page with its anchor; what is in it comes one below the other."""

    id: str
    heading: str
    content: Sequence[Markup]


@dataclasses.dataclass(frozen=True)
class Page:
    """A page: its headline, what it says in short, and its sections."""

    title: str
    order: str
    verdict: str
    tiles: Sequence[Mapping[str, str]]
    key: str  # how to read the tiles
    sections: Sequence[Section]


def tile(model: str, mode: str, who: str, summary: Summary, models: Sequence[str]) -> dict:
    """Return the macro success of a model and mode, to stand at the top of a page."""
    macro = summary["models"][model][mode]["macro"]
    return {
        "colour": plots.colour(model, models),
        "icon": plots.icon(model, mode, models),
        "who": who,
        "number": percent(macro["value"]),
        "interval": interval(macro),
    }


def paragraph(text: str, style: str = "") -> Markup:
    return write("paragraph", text, style)


def missing(text: str) -> Markup:
    """Return a sentence on what is not there."""
    return write("paragraph", text, "missing")


def html(made: Iterable[tables.Table]) -> list[Markup]:
    return [write("table", table) for table in made]


def check_path(path: PathLike) -> epath.Path:
    """Return where a page is to be written. Raises ValueError unless the path ends in .html."""
    out = epath.Path(path)
    if out.suffix != ".html":
        raise ValueError(f"report: got path {str(out)!r}, want one that ends in .html")
    return out


def write_page(path: epath.Path, page: Page, markdown: str, record: Mapping[str, object]) -> None:
    """Write a page, and its markdown and JSON twins beside it."""
    text = json.dumps(record, indent=1, ensure_ascii=False, allow_nan=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(write("page", page), encoding="utf-8")
    path.with_suffix(".md").write_text(markdown, encoding="utf-8")
    path.with_suffix(".json").write_text(text + "\n", encoding="utf-8")
