"""A small part of benchmarks/torture.py: what is killed, damaged or hostile ends right, and nothing grows."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="Linux's linker loads the shim")

PARTS = {
    "kills": "2:train",
    "faults": "1:generate",
    "power": "1:train",
    "damage": "1:resume/run/metrics,resume/run/tokenizer,report/run/metrics,convert/run/config,again/cache",
    "together": "1:resume",
    "hostile": "0:pickle,hf,e2e,jsonl,dart,xml,cerebras,summary",
    "fuzz": "2:webnlg,jsonl,hf-index,run-summary",
    "soak": "1000:masks",
}


@pytest.fixture(scope="module")
def found():
    """Verdicts by campaign, all of one process."""
    orders = [f"{name}:{part}" for name, part in PARTS.items()]
    command = [sys.executable, ROOT / "benchmarks" / "torture.py", *orders, "--json"]
    ended = subprocess.run(command, capture_output=True, text=True, timeout=500)
    assert ended.stdout, ended.stderr
    return {row["campaign"]: row for row in json.loads(ended.stdout)["campaigns"]}


@pytest.mark.parametrize("campaign", PARTS)
def test_nothing_goes_wrong(found, campaign):
    row = found[campaign]
    assert row["tried"] == row["equal"] + row["refused"] + row["wrong"] > 0
    assert not row["failures"], "\n".join(f"{f['id']}: {f['why']}\n  {f['repeat']}" for f in row["failures"])
