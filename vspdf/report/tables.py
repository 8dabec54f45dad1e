"""Tables of a study: losses, scores, tuning, in Markdown, HTML and CSV."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Sequence
from itertools import groupby
from typing import Any, NamedTuple

from vspdf import ledger
from vspdf.draw import words
from vspdf.draw.words import between, number
from vspdf.report.comparison import CPU, EXECUTED, TOKENS, WALL, Axis, timed, whole
from vspdf.runs.folder import COLUMNS


def time_axis(arms: Sequence[dict[str, Any]]) -> Axis:
    """The clock that a study goes by: CPU time where every run had one thread on the CPU and counted it, else wall."""
    runs = whole(run for arm in arms for run in arm["runs"])
    counted = all(run.get("threads") == 1 and run.get("cpu_seconds") is not None for run in runs)
    return CPU if runs and counted else WALL


def undisturbed(results: dict[str, Any]) -> bool:
    """Whether times may be quoted: CPU time, or wall-clock time of one machine with no more to do than it has cores."""
    runs = [run for arm in results["arms"] for run in arm["runs"]]
    loads = [run["load_average"] for run in timed(runs) if run["load_average"] is not None]
    quiet = not loads or max(loads) <= (results["hardware"]["cores"] or 1) + 0.5
    one_machine = results["same_machine"] or any("added" in run for run in runs)
    return one_machine and (quiet or time_axis(results["arms"]) is CPU)


def main_axes(arms: Sequence[dict[str, Any]]) -> tuple[Axis, ...]:
    """What the losses of a study are drawn and compared against."""
    return TOKENS, EXECUTED, time_axis(arms)


LOSSES = ("val_loss", "val_bits_per_byte", "test_loss", "test_bits_per_byte")


def table(results: dict[str, Any]) -> str:
    """A line of CSV for each run."""
    rows: list[dict[str, Any]] = []
    for arm in results["arms"]:
        for run in arm["runs"]:
            rows.append({
                "study": results["study"], "arm": arm["name"],
                "tuned": " ".join(f"{key}={value}" for key, value in (arm["tuned"] or {}).items()),
                **{key: run[key] for key in ("seed", *LOSSES, "tokens", "seconds", "cpu_seconds", "load_average")},
                **{f"flops_{column}": run["flops"][column] for column in COLUMNS},
                **{f"flops_{name}": (run["flops_by_convention"] or {}).get(name) for name in ledger.CONVENTIONS},
                "order": run["order"][:16], "jobs": results["jobs"], "cpu": results["hardware"]["cpu"],
                **results["versions"],
            })  # fmt: skip
    return _csv(rows)


def task_table(results: dict[str, Any]) -> str:
    """A line of CSV for each fine-tuning; empty where there is none."""
    keys = (
        "seed", "bleu", "brevity_penalty", "test_loss", "val_loss", "steps", "tokens", "seconds", "cpu_seconds",
    )  # fmt: skip
    rows = [
        {
            "study": results["study"], "task": task["name"], "protocol": task["protocol"], "arm": arm["name"],
            "tuned": " ".join(f"{key}={value}" for key, value in (arm["tuned"] or {}).items()),
            **{key: run.get(key) for key in keys}, "cpu": results["hardware"]["cpu"], **results["versions"],
        }
        for task in results.get("tasks", []) for arm in task["arms"] for run in arm["runs"]
    ]  # fmt: skip
    return _csv(rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    stream = io.StringIO()
    if rows:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return stream.getvalue()


def notes(results: dict[str, Any]) -> list[str]:
    """What a reader must know beside the figures."""
    said = []
    tasks = results.get("tasks", [])
    every = [results["arms"], *(task["arms"] for task in tasks)]
    if not results["complete"]:
        done, wanted = sum(len(arm["runs"]) for some in every for arm in some), sum(map(len, every))
        said.append(
            f"Not complete: {done} of {wanted * len(results['seeds'])} runs are done; means are over the seeds that "
            "are."
        )
    if scored := [task for task in tasks if task["sizes"]]:
        parts = (f"{t['name']} by {t['protocol']} on {t['sizes']['test']['documents']} contexts" for t in scored)
        said.append(
            f"BLEU: {', '.join(parts)} held out. Settings of fine-tuning were chosen for each arm by the loss on other "
            "contexts. Not comparable with published scores."
        )
    both = sorted({*results["seeds"]} & {*results["tuning_seeds"]})
    if both and any(arm["tuned"] for some in every for arm in some):
        said.append(
            f"Seed {', '.join(map(str, both))} was tuned on: the run that tuning chose is the one reported. Its test "
            "part was read after the choice; its validation loss took part in it."
        )
    said.append(
        "Weight-FLOPs and executed FLOPs are relative to the first arm. Intervals: Student's t over seeds; of a "
        "difference, over the differences of runs that read the same tokens in the same order. Each interval stands "
        "for itself: of twenty, one is expected to miss."
    )
    titled = [(arm["name"], arm) for arm in results["arms"]]
    titled += [(f"{arm['name']} on {task['name']}", arm) for task in tasks for arm in task["arms"]]
    edges = [f"{title} ({', '.join(arm['at_the_edge'])})" for title, arm in titled if arm["at_the_edge"]]
    if edges:
        said.append(f"Best at the least or greatest value tried, so a better one may lie outside: {'; '.join(edges)}.")
    for title, arm in titled:
        said.extend(f"{title}, seed {run['seed']}: {run['diverged']}" for run in arm["runs"] if "diverged" in run)
    added = [run for arm in results["arms"] for run in arm["runs"] if "added" in run]
    if added:
        seeds = ", ".join(map(str, sorted({run["seed"] for run in added})))
        cpus = ", ".join(sorted({(run["added"]["hardware"] or {}).get("cpu", "?") for run in added}))
        said.append(
            f"{len(added)} runs (seed {seeds}) were added later, in as many steps, on {cpus}: they count as losses, "
            "not as times."
        )
    elif not results["same_machine"]:
        said.append("The runs were made on different machines or with different versions: seconds do not compare.")
    if time_axis(results["arms"]) is CPU:
        said.append(
            "Time is CPU time of a run's one thread in training steps, which is what they take on a quiet core but for "
            "memory and caches shared with what ran beside; wall-clock seconds are in the results too."
        )
    elif not undisturbed(results):
        busiest = max(run["load_average"] or 0.0 for arm in results["arms"] for run in arm["runs"])
        said.append(
            f"The machine was busy with other work (load up to {busiest:.1f} on {results['hardware']['cores']} cores): "
            "losses do not depend on it, seconds do, and are not shown in the tables."
        )
    return said


# -- tables -----------------------------------------------------------------------------------------------------------


_WORDS = ("a is", "setting", "value: loss")  # columns beside the first that are no figures


class Table(NamedTuple):
    """A table of text; the first column names the rows."""

    title: str
    head: tuple[str, ...]
    rows: Sequence[tuple[str, ...]]

    def is_words(self, column: int) -> bool:
        """Whether a column holds words, so that it is set to the left."""
        return not column or self.head[column] in _WORDS

    def markdown(self) -> str:
        """The table in Markdown."""
        lines = [self.head, tuple("---" if self.is_words(i) else "---:" for i in range(len(self.head))), *self.rows]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def tables(results: dict[str, Any]) -> list[Table]:
    """The tables of a study: scores of tasks first, where there are any, losses of pre-training, what was tuned."""
    found = [*task_tables(results), *_loss_tables(results), multiplier_table(results), tuning_table(results)]
    return [table for table in found if table.rows]


def _loss_tables(results: dict[str, Any]) -> list[Table]:
    title, key = clocks(results)[0]
    clock = time_axis(results["arms"]).name
    quotable = undisturbed(results)
    sized = any(arm.get("stored_bytes") for arm in results["arms"])  # results of before do not say
    rows: list[tuple[str, ...]] = []
    for arm in results["arms"]:
        loss, runs = arm["test_loss"], whole(arm["runs"])
        relative = arm["relative_flops"] or {}
        rows.append((
            arm["name"], number(loss["mean"]), number(None if loss["low"] is None else loss["high"] - loss["mean"]),
            f"{len(runs)}/{len(results['seeds'])}", f"{runs[0]['tokens']:,}" if runs else "–",
            *(number(relative.get(name), ".1%") for name in ("linear", "executed")),
            *([words.size(arm["stored_bytes"])] if arm.get("stored_bytes") else ["–"] if sized else []),
            *([number(mean(arm, key), ".0f")] if quotable else []),
        ))  # fmt: skip
    head = (
        "test loss", "± 95 %", "seeds", "tokens", "weight-FLOPs", "executed", *(["stored"] if sized else []),
        *([title] if quotable else []),
    )  # fmt: skip
    found = [Table("test loss, nats a token", ("arm", *head), rows)]
    if results["paired"]:
        reach = quotable and any("reach" in pair for pair in results["paired"])
        rows = [
            (
                f"{pair['a']} − {pair['b']}", number(pair["mean"], "+.4f"), between(pair, "+.4f"),
                str(len(pair["seeds"])), pair["verdict"],
                *([number(pair["at_equal"].get(clock, {}).get("mean"), "+.4f")] if quotable else []),
                *([number(pair["reach"].get(clock, {}).get("share"), ".0%")] if reach else []),
            )
            for pair in results["paired"]
        ]  # fmt: skip
        pair_head = (
            "a − b", "mean", "95 % interval", "seeds", "a is", *(["at equal time"] if quotable else []),
            *(["time to b's loss"] if reach else []),
        )  # fmt: skip
        found.append(Table("paired differences of test losses", pair_head, rows))
    return found


def task_tables(results: dict[str, Any]) -> list[Table]:
    """What arms score on tasks after fine-tuning, and the paired differences of it; none of a study without tasks."""
    tasks = results.get("tasks", [])
    if not tasks:
        return []
    spread = lambda body: f"{number(body['mean'], '.2f')} ± {number(body['std'], '.2f')}"  # noqa: E731
    names = [arm["name"] for arm in tasks[0]["arms"]]
    rows = [
        (
            name, *(spread(task["arms"][i]["bleu"]) for task in tasks),
            *(number(task["arms"][i]["test_loss"]["mean"], ".3f") for task in tasks),
            f"{min(len(whole(task['arms'][i]['runs'])) for task in tasks)}/{len(results['seeds'])}",
        )
        for i, name in enumerate(names)
    ]  # fmt: skip
    blank = [""] * (len(tasks) + 1)
    rows.append(("contexts as they are", *(number(task["bleu_of_contexts"], ".2f") for task in tasks), *blank))
    head = [f"{task['name']} BLEU" for task in tasks] + [f"{task['name']} loss" for task in tasks]
    found = [Table("BLEU after fine-tuning, mean ± standard deviation", ("arm", *head, "seeds"), rows)]
    rows = [
        (
            f"{task['name']}: {pair['a']} − {pair['b']}", number(pair["mean"], "+.2f"), between(pair, "+.2f"),
            str(len(pair["seeds"])), pair["verdict"],
        )
        for task in tasks
        for pair in task["paired"]
    ]  # fmt: skip
    if rows:
        found.append(Table("paired differences of BLEU", ("a − b", "mean", "95 % interval", "seeds", "a is"), rows))
    return found


def multiplier_table(results: dict[str, Any]) -> Table:
    """What kept weights are worth, by arm; empty where a study does not ask."""
    rows: list[tuple[str, ...]] = [
        (
            each["method"] + (" (beyond the dense arms)" if each["extrapolated"] else ""), number(each["m"], ".2f"),
            between({"low": each["low"], "high": each["high"]}, ".2f"), str(len(each["seeds"])),
            f"{each['kept']:,.0f}", number(each["break_even"], ".2f"),
            number(each["at_equal_time"]["mean"], "+.4f"), between(each["at_equal_time"], "+.4f"),
        )
        for each in results.get("multipliers", [])
    ]  # fmt: skip
    head = (
        "arm", "M", "95 % interval", "seeds", "kept, on average", "break-even here",
        "loss at equal step time", "95 % interval",
    )  # fmt: skip
    return Table("dense weights that a kept weight is worth", head, rows)


def tuning_table(results: dict[str, Any]) -> Table:
    """The settings that were tried for each arm, with their losses and the choice."""
    titled = [(arm["name"], arm) for arm in results["arms"]]
    titled += [(f"{arm['name']} on {task['name']}", arm) for task in results.get("tasks", []) for arm in task["arms"]]
    rows: list[tuple[str, ...]] = []
    for title, arm in titled:
        for keys, trials in groupby(arm["trials"], lambda trial: tuple(trial["values"])):
            tried = []
            for trial in trials:
                chosen = arm["tuned"] is not None and all(arm["tuned"][k] == v for k, v in trial["values"].items())
                values = ", ".join(map(str, trial["values"].values()))
                losses = ", ".join(number(loss) for loss in trial["val_loss"])
                tried.append(f"{values}: {losses}{' (chosen)' if chosen else ''}")
            rows.append((title, ", ".join(keys), "; ".join(tried)))
    return Table("tuning, by loss on validation text", ("arm", "setting", "value: loss"), rows)


def markdown(results: dict[str, Any]) -> str:
    """A part of a document: the tables, what they depend on, and what a reader must know beside them."""
    hardware, versions = results["hardware"], results["versions"]
    made = (
        f"`{results['command']}`, {results['jobs']} at a time; {hardware['gpu'] or hardware['cpu']}, "
        f"{hardware['cores']} cores; {', '.join(f'{name} {version}' for name, version in versions.items())}."
    )
    drawn = [f"{table.title[0].upper()}{table.title[1:]}:\n\n{table.markdown()}" for table in tables(results)]
    return "\n\n".join([*drawn, made, "\n".join(f"- {note}" for note in notes(results))]) + "\n"


def clocks(results: dict[str, Any]) -> list[tuple[str, str]]:
    """Columns of seconds and their keys: the clock that the study goes by first."""
    wall = ("seconds", "seconds")
    return [("CPU seconds", "cpu_seconds"), wall] if time_axis(results["arms"]) is CPU else [wall]


def mean(arm: dict[str, Any], key: str) -> float | None:
    """The mean over an arm's runs of a figure, of those that have it, and whose times count."""
    runs = timed(arm["runs"]) if key in ("seconds", "cpu_seconds") else arm["runs"]
    known = [run[key] for run in runs if run[key] is not None]
    return statistics.fmean(known) if known else None
