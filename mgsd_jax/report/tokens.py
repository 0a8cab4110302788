"""A response token by token, as HTML that a notebook shows: a number of each as its colour, and
what several readers expected in its place.

Axes: R response tokens, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from markupsafe import Markup

from mgsd_jax.report.markup import tag

_FONT = "font-family:monospace;white-space:pre-wrap;line-height:1.9;color:#222;background:#fff"


@dataclasses.dataclass(frozen=True)
class Html:
    """A piece of a page, shown as such by a notebook."""

    markup: Markup

    def _repr_html_(self) -> str:
        return str(self.markup)


def coloured(tokens: Sequence[str], values: Sequence[float], *, most: float) -> Html:
    """The tokens, each on a ground from white (0) to red (`most` and above), the value on hover.

    The square root of a value colours, so that small ones are told apart too.
    """
    parts = []
    for token, value in zip(tokens, values, strict=True):
        share = min(max(value / most, 0.0), 1.0) ** 0.5
        ground = f"background:rgba(220,50,47,{share:.2f});padding:2px 0;border-right:1px solid #ddd"
        parts.append(tag("span", Markup.escape(token), style=ground, title=f"{value:.3f}"))
    return Html(tag("div", *parts, style=_FONT))


def side_by_side(
    tokens: Sequence[str],
    readers: Mapping[str, np.ndarray],
    spell: Callable[[int], str],
    *,
    values: Sequence[float],
    top: int = 3,
) -> Html:
    """A table of a row for each token: the token, its value, and what each reader expected there.

    `readers` are {name: logprobs [R, V]}; of each the `top` likeliest tokens are shown, as far as
    they have a percent.
    """
    left = {"style": "text-align:left"}
    names = ("", "token", "KL", *readers)
    rows = [tag("tr", *(tag("th", Markup.escape(name), **left) for name in names))]
    for i, (token, value) in enumerate(zip(tokens, values, strict=True)):
        cells = [str(i), tag("code", _visible(token)), f"{value:.3f}"]
        for logprobs in readers.values():
            best = np.argsort(-logprobs[i], kind="stable")[:top]
            shown = [
                tag("code", _visible(spell(int(k)))) + f" {100 * np.exp(logprobs[i, k]):.0f} %"
                for k in best
                if np.exp(logprobs[i, k]) >= 0.01
            ]
            cells.append(Markup(" · ").join(shown))
        rows.append(tag("tr", *(tag("td", cell, **left) for cell in cells)))
    return Html(tag("table", *rows))


def _visible(token: str) -> Markup:
    """A token with its line ends to be seen; a long one is cut."""
    text = token.strip(" ").replace("\n", "↵")
    return Markup.escape(f"{text[:24]}…" if len(text) > 25 else text or "(end)")
