"""What vspdf does when it is killed, its disk fails, its files are damaged or hostile, or it is used for long.

    python benchmarks/torture.py                          # every campaign, moderate counts: minutes on one core
    python benchmarks/torture.py kills:0 fuzz:500         # NAME:POINTS per command, file or format; 0: all there are
    python benchmarks/torture.py damage:6:metrics,config  # NAME:POINTS:AMONG, only what has these in its name
    python benchmarks/torture.py kills --only train/117   # one trial again

Every trial is a command of vspdf in a fork of this process, above a shim that sees its file operations
(campaigns/shim.c). It ends in one of three ways. Equal: results, to the last bit, and files of an undisturbed run; a
bent file was taken. Refused: an error in one line, and nothing lost. Wrong: a traceback, a silent difference, a file
left behind, a hang, too much memory. All draws follow from the seed. Status 1 where anything went wrong.
"""

from __future__ import annotations

import argparse
import json
import re
import shlex
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

from campaigns import damage, disk, fuzz, hostile, soak
from campaigns.jobs import Bench
from campaigns.trial import WRONG, Campaign, preload

# Each yields (id, trial) pairs; beside it the points by default.
CAMPAIGNS = {
    "kills": (disk.kills, 25),
    "signals": (disk.signals, 6),
    "faults": (disk.faults, 5),
    "power": (disk.power, 12),
    "damage": (damage.damage, 2),
    "together": (damage.together, 3),
    "hostile": (hostile.hostile, 0),
    "fuzz": (fuzz.fuzz, 40),
    "soak": (soak.soak, 2000),
}


ORDER = re.compile(rf"({'|'.join(CAMPAIGNS)})(:\d+(:[^:]+)?)?")


def _campaign(order: str, bench: Bench, asked: argparse.Namespace) -> dict[str, Any]:
    """Runs the trials of one campaign, ordered as NAME:POINTS:AMONG; what went wrong is said at once."""
    name, points, among = (order + "::").split(":")[:3]
    trials, usual = CAMPAIGNS[name]
    campaign, start = Campaign(name), time.perf_counter()
    for id, trial in trials(bench, among.split(",") if among else [], int(points or usual), asked.seed):
        if asked.only and id != asked.only:
            continue
        result = trial()
        campaign.results.append(result)
        if result.verdict == WRONG or asked.every:
            bench.say(f"{name} {id}: {result.verdict}. {result.why}")
    bench.say(f"{name}: {len(campaign.results)} trials in {time.perf_counter() - start:.0f} s")
    again = f"python benchmarks/torture.py {order} --seed {asked.seed} --only "
    return campaign.to_json(lambda id: again + shlex.quote(id))


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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="ID", help="one trial of one campaign")
    parser.add_argument("--every", action="store_true", help="say on stderr how every trial ended")
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout, all else on stderr")
    asked = parser.parse_args()
    if wrong := [order for order in asked.campaigns if not ORDER.fullmatch(order)]:
        parser.error(f"'{wrong[0]}': expected NAME, NAME:POINTS or NAME:POINTS:AMONG; names: {', '.join(CAMPAIGNS)}")
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
