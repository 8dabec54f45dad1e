"""What vspdf does when it is killed, its disk fails, its files are damaged or hostile, or it is used for long.

    python benchmarks/torture.py                          # every campaign with moderate counts: some minutes on one core
    python benchmarks/torture.py kills --points 0         # at every file operation of every command
    python benchmarks/torture.py fuzz --points 500 --seed 7
    python benchmarks/torture.py kills --only train/117   # one trial again

Every trial is a command of vspdf in a fork of this process, above a shim that sees its file operations
(campaigns/shim.c). It has one of three ends: results equal to the last bit, in the same files, to those of an undisturbed
run; an error in one line; or it went wrong: a traceback, a silent difference, a file left behind, a hang, too much memory.
All draws follow from the seed. The exit status is 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from campaigns import damage, disk, fuzz, soak  # noqa: E402
from campaigns.jobs import Bench  # noqa: E402
from campaigns.trial import WRONG, Campaign, preload  # noqa: E402

# Each yields (id, trial) pairs; beside it the points by default, and what --among chooses from.
CAMPAIGNS = {
    "kills": (disk.kills, 25),
    "signals": (disk.signals, 6),
    "faults": (disk.faults, 5),
    "power": (disk.power, 12),
    "damage": (damage.damage, 2),
    "together": (damage.together, 3),
    "hostile": (fuzz.hostile, 0),
    "fuzz": (fuzz.fuzz, 40),
    "soak": (soak.soak, 300),
}


def _campaign(name: str, bench: Bench, asked: argparse.Namespace) -> dict[str, Any]:
    """Runs the trials of one campaign; what went wrong is said at once."""
    trials, points = CAMPAIGNS[name]
    among = [word for word in asked.among.split(",") if word]
    campaign, start = Campaign(name), time.perf_counter()
    for id, trial in trials(bench, among, points if asked.points is None else asked.points, asked.seed):
        if asked.only and id != asked.only:
            continue
        result = trial()
        campaign.results.append(result)
        if result.verdict == WRONG:
            bench.say(f"{name} {id}: {result.why}")
    bench.say(f"{name}: {len(campaign.results)} trials in {time.perf_counter() - start:.0f} s")
    return campaign.to_json(lambda id: _repeat(name, id, asked))


def _repeat(name: str, id: str, asked: argparse.Namespace) -> str:
    points = "" if asked.points is None else f" --points {asked.points}"
    return f"python benchmarks/torture.py {name} --seed {asked.seed}{points} --only {shlex.quote(id)}"


def _print(rows: list[dict[str, Any]]) -> None:
    columns = ("campaign", "tried", "equal", "refused", "wrong")
    print("| " + " | ".join(columns) + " |")
    print("|---|" + "---:|" * (len(columns) - 1))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |")
    for row in rows:
        for failure in row["failures"]:
            print(f"\n{row['campaign']} {failure['id']}: {failure['why']}\n    {failure['repeat']}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("campaigns", nargs="*", help=f"of {', '.join(CAMPAIGNS)}; default: all")
    parser.add_argument("--points", type=int, help="per command, file or format; 0: all there are")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--among", default="", metavar="NAME,...", help="commands, files or formats; default: all")
    parser.add_argument("--only", metavar="ID", help="one trial of one campaign")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    asked = parser.parse_args()
    if unknown := [name for name in asked.campaigns if name not in CAMPAIGNS]:
        parser.error(f"no campaign '{unknown[0]}': expected {', '.join(CAMPAIGNS)}")
    preload()
    with tempfile.TemporaryDirectory(prefix="torture-") as folder:
        bench = Bench(Path(folder), lambda line: print(line, file=sys.stderr, flush=True))
        body = [_campaign(name, bench, asked) for name in asked.campaigns or CAMPAIGNS]
    if asked.json:
        print(json.dumps({"seed": asked.seed, "campaigns": body}, indent=1))
    else:
        _print(body)
    return int(any(row["wrong"] for row in body))


if __name__ == "__main__":
    sys.exit(main())
