"""What every verb takes and prints with: figures to stdout, progress to stderr, `--json` one object on stdout."""

from __future__ import annotations

import json
import os
import re
import sys
import time
from contextlib import suppress
from typing import Annotated, Any

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from typer.core import TyperCommand

from vspdf.draw import words
from vspdf.errors import Interrupted, UserError, percent_meant


class Plain(Console):
    """A console that prints text as it is, no ``:name:`` for an emoji and no ``[name]`` for a style.

    Where nobody takes in what it says on stderr (a `head` that has ended, a full disk), it says no more: the work goes
    on, which is worth more than its lines of progress.
    """

    def __init__(self, **options: Any) -> None:
        super().__init__(emoji=False, markup=False, **options)

    def print(self, *objects: Any, **options: Any) -> None:
        """As rich has it."""
        try:
            super().print(*objects, **options)
        except OSError:
            if not self.stderr:
                raise
            self._fall_silent()

    def on_broken_pipe(self) -> None:
        """What rich does with this end of the program: figures that nobody reads end it, progress does not."""
        if not self.stderr:
            super().on_broken_pipe()
        self._fall_silent()

    def _fall_silent(self) -> None:
        self.quiet = True
        with suppress(OSError):  # what is left in the stream's buffer must not fail when it is closed
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, sys.stderr.fileno())
            os.close(nowhere)


out = Plain()
err = Plain(stderr=True)

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object to stdout.")]
MachineName = Annotated[str, typer.Option("--machine", help="A machine by name, or a YAML file of your own.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a machine parameter; repeatable.")
]


class Verb(TyperCommand):
    """A command whose errors name its options: the library says `` `grid` ``, the command line ``--grid``."""

    def invoke(self, context: Any) -> Any:
        """Runs the verb; in errors, arguments in backticks become the flags that it has for them."""
        flags = {parameter.name: parameter.opts[0] for parameter in self.params if parameter.opts[0][:2] == "--"}
        try:
            return super().invoke(context)
        except KeyboardInterrupt:
            raise Interrupted("stopped.") from None
        except (UserError, Interrupted) as error:
            error.args = (re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), str(error)),)
            raise


def number(text: str | float) -> float:
    """A number as an option takes it; where a percentage was given, the message says it as a fraction."""
    try:
        return float(text)
    except ValueError:
        raise typer.BadParameter(f"'{text}' is not a number.{percent_meant(str(text))}") from None


def percentage(text: str | float) -> float:
    """A number of percent as an option takes it, with or without the sign."""
    return number(text.strip().removesuffix("%") if isinstance(text, str) else text)


def only(ok: bool, where: str, context: typer.Context, *names: str) -> None:
    """Refuses options that were given where they would change nothing; `where` is what they are for."""
    for name in names if not ok else ():
        source = context.get_parameter_source(name)
        if source is not None and source.name == "COMMANDLINE":
            raise UserError(f"`{name}` {where}.")


def emit(body: dict[str, Any]) -> None:
    """Prints one JSON object to stdout."""
    try:
        sys.stdout.write(json.dumps(body) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        out.on_broken_pipe()


def say(line: str) -> None:
    """Prints a line of progress to stderr, as it is."""
    err.print(line, markup=False, highlight=False, soft_wrap=True)


def murmur(line: str) -> None:
    """Prints a line of progress to stderr, dimmed: what goes by while something is measured."""
    err.print(line, style="dim", markup=False, highlight=False)


def tell(*lines: str) -> None:
    """Prints lines of text to stdout as they are, however wide the terminal is."""
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)


def show(table: Table) -> None:
    """Prints a table to stdout: close together where the terminal is narrow, and wider than it before a word is cut."""
    widest = out.options.update(max_width=10_000)
    if Measurement.get(out, widest, table).maximum > out.width:
        table.box, table.pad_edge, table.show_edge = SIMPLE_HEAD, False, False
    Plain(width=max(out.width, Measurement.get(out, widest, table).maximum)).print(table)


class Progress:
    """A line now and then: how much is done, and how long the rest will take at the present speed."""

    def __init__(self, total: int, what: str) -> None:
        self.total, self.what = total, what
        self.started = self.said = time.perf_counter()

    def __call__(self, done: int) -> None:
        now = time.perf_counter()
        if now - self.said > 3 or done == self.total:
            self.said = now
            rate = done / max(now - self.started, 1e-9)  # a clock may stand still
            speed = f"{rate:,.0f}" if rate >= 100 else f"{rate:.2f}"
            say(f"{done:,}/{self.total:,} {self.what}  {speed}/s  {words.eta((self.total - done) / rate)}")
