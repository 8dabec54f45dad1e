"""What verbs print comes out as it is, and who stops listening to a run does not end it."""

import json
import subprocess
import sys

import pytest
from rich.table import Table

from vspdf.cli import console
from vspdf.runs.folder import Run

TEXT = "x[0:100:2] :smile: [red]a[/b] [dim]"


def test_text_is_printed_as_it_is(capsys, vspdf, tmp_path):
    """No part of it is an emoji or a style, in lines, in tables and in errors."""
    table = Table(title=TEXT, title_justify="left")
    table.add_column(TEXT)
    table.add_row(TEXT)
    console.tell(TEXT)
    console.say(TEXT)
    console.murmur(TEXT)
    console.show(table)
    console.out.print(TEXT)
    captured = capsys.readouterr()
    assert captured.out.count(TEXT) == 5 and captured.err.count(TEXT) == 2
    assert "'a:100:b[dim]' not found" in vspdf("eval", "a:100:b[dim]")[2]


MAIN = "from vspdf.cli import main; main()"


@pytest.mark.parametrize("progress", ["head", "a full disk"])
def test_a_run_goes_on_when_nobody_reads_its_progress(tiny, tmp_path, progress):
    """Its checkpoint is written, the summary is printed."""
    command = [sys.executable, "-P", "-c", MAIN, "train", str(tiny), "--json"]
    if progress == "head":
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        while not process.stderr.readline().startswith("step "):
            assert process.poll() is None
        process.stderr.close()
    else:
        with open("/dev/full", "w") as full:
            process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=full, text=True)
    out = process.stdout.read()
    process.stdout.close()
    assert process.wait() == 0 and json.loads(out)["phases"]
    run = Run(tmp_path / "run")
    assert run.finished and run.state["step"] == run.total_steps == 28


def test_figures_that_nobody_reads_end_in_no_traceback():
    command = [sys.executable, "-P", "-c", MAIN, "info", "--json"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process.stdout.close()
    assert process.stderr.read() == "" and process.wait() == 1
    process.stderr.close()
