"""What every verb prints with: figures to stdout, progress to stderr, `--json` one object on stdout."""

from __future__ import annotations

import json
import sys
from typing import Annotated, Any

import typer
from rich.console import Console

out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


def emit(body: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(body) + "\n")
