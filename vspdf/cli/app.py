"""The command line: `vspdf VERB ...`. Figures go to stdout, progress to stderr; `--json` prints one JSON object."""

from __future__ import annotations

import errno
import logging
import os
import signal
import sys
import threading
from importlib.metadata import version
from typing import Annotated, Any

import typer
from rich.logging import RichHandler

from vspdf.cli import bench, plan, programs, runs, simulate, steps, tasks, train
from vspdf.cli.console import Verb, err, tell
from vspdf.errors import BackendUnavailable, Interrupted, UserError, did_you_mean

app = typer.Typer(
    name="vspdf",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)


def _version(asked: bool) -> None:
    if asked:
        tell(f"vspdf {version('vspdf')}")
        raise typer.Exit


@app.callback()
def vspdf(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and exit.")
    ] = False,
) -> None:
    """Variable Sparse Pre-training and Dense Fine-tuning of GPTs, with the masked FLOPs really skipped."""


def main() -> None:
    """Entry point: user errors end in one line and status 2, a stopped run in status 130."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", handlers=[RichHandler(console=err, show_path=False, show_time=False)]
    )
    first = os.environ.get("RANK", "0") == "0"  # of several processes, that which speaks
    logging.getLogger("vspdf").setLevel(logging.INFO if first else logging.ERROR)
    sys.unraisablehook = _insist
    try:
        sys.exit(app(standalone_mode=False))
    except (UserError, BackendUnavailable) as error:
        message = "" if getattr(error, "told", False) else str(error)
    except Interrupted as error:
        if not error.told:
            err.print(f"vspdf: {error}", markup=False, highlight=False, soft_wrap=True)
        sys.exit(130)
    except OSError as error:
        if error.filename is None or error.errno not in (errno.ENAMETOOLONG, errno.EACCES):  # of any path asked for
            raise
        long = f"'{str(error.filename)[:40]}...' is longer than the name of a file can be."
        message = long if error.errno == errno.ENAMETOOLONG else f"'{error.filename}': permission denied."
    except Exception as error:
        if not hasattr(error, "format_message"):  # typer's usage errors, whatever class they are in its version
            raise
        message = _usage_error(error)
    if message:
        err.print(f"vspdf: error: {message}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _insist(dropped: Any) -> None:
    """Ctrl-C that came where Python drops exceptions, in a finaliser or a callback of an import's lock, comes again."""
    if issubclass(dropped.exc_type, KeyboardInterrupt):
        thread = threading.main_thread().ident
        # After the callback: at once it would be dropped too.
        again = threading.Timer(0.05, signal.pthread_kill, (thread, signal.SIGINT))
        again.daemon = True
        again.start()
    else:
        sys.__unraisablehook__(dropped)


def _usage_error(error: Any) -> str:
    """What was wrong with the arguments, in one line; empty where help was asked for, and is printed already."""
    context, message = getattr(error, "ctx", None), error.format_message()
    if type(error).__name__ == "NoArgsIsHelpError":
        return ""
    if hasattr(error, "possibilities") and context is not None:
        known = [option for parameter in context.command.params for option in parameter.opts if option[0] == "-"]
        known.extend(context.help_option_names)
        message = f"no such option '{error.option_name}'.{did_you_mean(error.option_name, known)}"
    elif context is not None and "Did you mean" not in message:
        verbs = getattr(context.command, "commands", None)
        expected = f"Known: {', '.join(verbs)}." if verbs else context.get_usage()
        message = f"{message.rstrip('.')}. {expected}"
    return " ".join((message[:1].lower() + message[1:]).split())


for program in (*steps.STEPS, *programs.PROGRAMS):
    simulate.simulate.command(cls=Verb)(program)
for verb in (
    train.train,
    tasks.evaluate,
    runs.report,
    train.finetune,
    tasks.generate,
    tasks.bleu,
    runs.compare,
    programs.validate,
    runs.convert,
    plan.plan,
    runs.info,
):
    app.command(name="eval" if verb is tasks.evaluate else None, cls=Verb)(verb)
app.add_typer(simulate.simulate, name="simulate")
app.add_typer(bench.bench, name="bench")
