"""What every verb prints with: figures to stdout, progress to stderr, `--json` one object on stdout."""

from __future__ import annotations

import json
import sys
import time
from typing import Annotated, Any

import typer
from rich.console import Console

from vspdf.draw import words

out = Console()
err = Console(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]


def emit(body: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(body) + "\n")


def _say(line: str) -> None:
    err.print(line, markup=False, highlight=False, soft_wrap=True)


class _Progress:
    """A line now and then: how much is done, and how long the rest will take at the present speed."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.started = self.said = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self.said > 3 or done == self.total:
            self.said = now
            rate = done / (now - self.started)
            speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}"
            _say(f"{done:,}/{self.total:,} {self.what}  {speed}/s  {words.eta((self.total - done) / rate)}")
