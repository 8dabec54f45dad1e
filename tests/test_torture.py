"""A small part of benchmarks/torture.py: what is killed, damaged or hostile ends right, and nothing grows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the shim is loaded by Linux's linker")

# One fresh process for all: campaign -> points, and the names it keeps to.
PARTS = {
    "kills": "--points 3",
    "signals": "--points 1 --among train,convert",
    "faults": "--points 1 --among train,generate",
    "power": "--points 2 --among train,plan",
    "damage": "--points 1 --among metrics,tokenizer,model,tokens",
    "together": "--points 1",
    "hostile": "--among pickle,hf,jsonl,e2e,xml,config",
    "fuzz": "--points 2",
    "soak": "--points 600 --among switches",
}


@pytest.mark.parametrize("campaign", PARTS)
def test_nothing_goes_wrong(campaign):
    command = [sys.executable, ROOT / "benchmarks" / "torture.py", campaign, *PARTS[campaign].split(), "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert ended.stdout, ended.stderr
    (found,) = json.loads(ended.stdout)["campaigns"]
    assert found["tried"] == found["equal"] + found["refused"] + found["wrong"] > 0
    assert not found["failures"], "\n".join(f"{f['id']}: {f['why']}\n  {f['repeat']}" for f in found["failures"])
