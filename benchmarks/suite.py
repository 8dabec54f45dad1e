"""Benchmarks this machine, and draws README's and docs' tables and pictures from what came out: one command.

    python benchmarks/suite.py --name "AMD EPYC (Zen 5)"      # under 15 minutes on two cores, on a quiet machine

Writes `benchmarks/results/MACHINE.json`, a page beside it, and what `docs/make_figures.py performance` fills in.
`--tiny` shows that it works, in a folder of its own, and touches nothing else.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--name", default="", help="what to call the machine; default: its processor's name")
    parser.add_argument("--sections", default="", help="only these, with commas between")
    parser.add_argument("--tiny", action="store_true")
    arguments = parser.parse_args()
    output = Path(tempfile.mkdtemp()) if arguments.tiny else ROOT / "benchmarks" / "results"
    verb = [sys.executable, "-m", "vspdf", "bench", "suite", "--output", str(output)]
    verb += ["--name", arguments.name, "--sections", arguments.sections] + ["--tiny"] * arguments.tiny
    subprocess.run(verb, check=True)
    if not arguments.tiny:
        subprocess.run([sys.executable, str(ROOT / "docs" / "make_figures.py"), "performance"], check=True)


if __name__ == "__main__":
    main()
