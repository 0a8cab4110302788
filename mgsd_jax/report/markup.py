"""HTML by the macros of page.html, and SVG elements. All text is escaped on its way in."""

import functools

import jinja2
from markupsafe import Markup

from mgsd_jax.report import words


@functools.cache
def _macros() -> jinja2.environment.TemplateModule:
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("mgsd_jax.report", ""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"percent": words.percent, "interval": words.interval}
    return environment.get_template("page.html").make_module()


def write(macro: str, *arguments: object) -> Markup:
    """Return what a macro of page.html makes of its arguments."""
    return getattr(_macros(), macro)(*arguments)


def tag(name: str, *children: str, **attributes: object) -> Markup:
    """Return an SVG element; numbers of type float get one decimal.

    A name such as `class_` or `stroke_width` stands for `class` or `stroke-width`.
    """
    start = Markup("<" + name)
    for key, value in attributes.items():
        text = f"{value:.1f}" if isinstance(value, float) else value
        start += Markup(' {}="{}"').format(key.rstrip("_").replace("_", "-"), text)
    if not children:
        return start + Markup("/>")
    return start + Markup(">") + Markup("").join(children) + Markup(f"</{name}>")
