"""mkdocs: no page is lost, and links out of docs/ lead to files of the repository that exist."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from mkdocs.exceptions import PluginError

LINK = re.compile(r"\[([^\]]+)\]\((\.\./[^)\s#]+)(#[^)\s]*)?\)")


def on_config(config: Any) -> Any:
    """A page that mkdocs.yml does not name yet comes last, under More."""
    named = set(re.findall(r"[\w-]+\.md", repr(config.nav)))
    if more := sorted(path.name for path in Path(config.docs_dir).glob("*.md") if path.name not in named):
        config.nav.append({"More": more})
    return config


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    """The site does not have the repository's other files: a link to one becomes its path."""
    folder = Path(page.file.abs_src_path).parent
    root = Path(config.docs_dir).parent

    def name(match: re.Match[str]) -> str:
        text, target = match[1], (folder / match[2]).resolve()
        if not target.exists():
            raise PluginError(f"{page.file.src_uri}: there is no '{match[2]}' in the repository.")
        path = target.relative_to(root).as_posix()
        return f"`{path}`" if path.startswith(text.strip("`").rstrip("/")) else f"{text} (`{path}` in the repository)"

    return LINK.sub(name, markdown)
