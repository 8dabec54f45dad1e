"""A whole HTML page that needs no network, from a template; whatever is put into one is escaped."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from vspdf.draw import svg

TEMPLATES = Path(__file__).with_name("templates")  # the frame of every page, and macros for its parts


def render(template: Path, **context: Any) -> str:
    """Fills a template with what it asks for.

    Parameters
    ----------
    template : Path
        It may extend ``page.html`` and import ``macros.html``, and takes templates from its own folder.
    **context
        Text is escaped. Charts are elements, placed by the filter ``svg``.

    Returns
    -------
    str
        The page.

    Raises
    ------
    jinja2.UndefinedError
        If the template asks for something that is not there.
    """
    return _environment(template.parent).get_template(template.name).render(context)


@cache
def _environment(folder: Path) -> Environment:
    environment = Environment(
        loader=FileSystemLoader([folder, TEMPLATES]), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["svg"] = lambda chart: Markup(svg.markup(chart))
    return environment
