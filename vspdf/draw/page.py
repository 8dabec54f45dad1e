"""A whole HTML page that needs no network: the frame around what reports and programs draw."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from string import Template


def page(title: str, body: Sequence[str]) -> str:
    """A whole page, styles and all, around the HTML of its sections."""
    template = Template(Path(__file__).with_name("page.html").read_text(encoding="utf-8"))
    return template.substitute(title=escape(title), body="\n".join(body))


def section(title: str, content: str, note: str = "") -> str:
    """A part of a page: heading, HTML, and a note in small print."""
    note = f'<p class="note">{note}</p>' if note else ""
    return f"<section><h2>{escape(title)}</h2>{content}{note}</section>"


def figure(drawing: str, caption: str = "") -> str:
    """A chart with its caption."""
    return f"<figure>{drawing}{f'<figcaption>{caption}</figcaption>' if caption else ''}</figure>"
