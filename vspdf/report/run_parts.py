"""What a page says of one run: figures, FLOPs, time, speed-up, the wafer; each part as its template wants it."""

from __future__ import annotations

from typing import Any

from vspdf.config import loading
from vspdf.draw import words
from vspdf.draw.svg import Bar, bar_chart
from vspdf.errors import BackendUnavailable, UserError
from vspdf.report import weights
from vspdf.report.moving import moving
from vspdf.runs.folder import COLUMNS, Run
from vspdf.runs.record import sparsities

_PARTS = ("sparse products", "dense products", "attention", "vocabulary", "optimizer", "rest")


def parts(run: Run, drawn: bool = False) -> dict[str, Any]:
    """The parts of a run by name, None where there is nothing to say.

    Parameters
    ----------
    drawn : bool
        With what a simulated wafer does, event by event, which takes a moment.
    """
    return {
        "begun": bool(run.lines), "finished": bool(run.summary), "flops": _flops(run), "time": _time(run),
        "speed": _speed(run), "wafer": _wafer(run, drawn), "masks": weights.masks(run), "revived": weights.revived(run),
        "moving": moving(run),
        "facts": _facts(run), "settings": loading.to_yaml(run.config), "samples": run.summary.get("samples", []),
    }  # fmt: skip


def status(run: Run) -> dict[str, str]:
    """How far a run is, and what it is of."""
    if run.summary:
        state, kind = f"finished, {run.step:,} steps", "done"
    elif run.lines:
        state, kind = f"not finished: step {run.step:,} of {run.total_steps:,}", "open"
    else:
        state, kind = "not finished: no step was logged yet", "open"
    size, corpus = words.count(run.shape.parameters), run.manifest["corpus"]["name"]
    what = f"{size} parameters on {corpus}, seed {run.config.seed}"
    return {"label": run.label, "state": state, "kind": kind, "what": what}


def tiles(run: Run) -> list[tuple[str, str]]:
    """The figures that matter most, each with what it is; none before the first logged step."""
    if not run.lines:
        return []
    last, found = run.lines[-1], []
    if run.evaluations:
        value = run.evaluations[-1]
        found.append((f"{value['val_loss']:.4f}", "validation loss, nats a token"))
        found.append((f"{value['val_bits_per_byte']:.4f}", "validation bits a byte"))
    found.append((words.count(last["tokens"]), "tokens"))
    skipped = 1 - last["flops"]["executed"] / last["flops"]["dense"]
    found.append((f"{skipped:.1%}", "of all FLOPs really skipped"))
    found.append((words.duration(last["training_seconds"]), "in training steps"))
    found.extend((f"{p['speedup']['median']:.2f}x", f"step speed-up, {p['name']}") for p in _timed(run))
    return found


HEAD = (
    "run", "phase", "sparsity", "steps", "tokens", "training loss", "validation loss", "bits/byte", "FLOPs dense",
    "FLOPs useful", "FLOPs executed", "seconds", "s/step", "dense s/step", "speed-up",
)  # fmt: skip


def rows(run: Run) -> list[tuple[str, ...]]:
    """The run's rows of the table of figures by phase, below `HEAD`."""
    return [
        (
            run.label, p["name"], words.from_to(*sparsities(p)[:2]), str(p["steps"]), str(p["tokens"]),
            words.number(p["loss"]), words.number(p["val_loss"]), words.number(p["val_bits_per_byte"]),
            *(f"{p['flops'][column]:.4g}" for column in COLUMNS),
            f"{p['seconds']:.1f}", f"{p['step_seconds_median']:.4g}",
            f"{p['dense_step_seconds_median']:.4g}" if "speedup" in p else "",
            f"{p['speedup']['median']:.2f}" if "speedup" in p else "",
        )
        for p in run.phases
    ]  # fmt: skip


def _flops(run: Run) -> dict[str, Any] | None:
    if not run.phases:
        return None
    totals = {column: sum(phase["flops"][column] for phase in run.phases) for column in COLUMNS}
    bars = [
        Bar(
            "as if dense" if column == "dense" else column,
            [
                (f"{p['name']}: {words.flops(p['flops'][column])}", p["flops"][column], i)
                for i, p in enumerate(run.phases)
            ],
            f"{words.flops(totals[column])}, {totals[column] / totals['dense']:.1%}",
        )
        for column in COLUMNS
    ]
    saved = run.summary.get("flops_saved_fraction_by_convention") or {}
    return {
        "legend": [(p["name"], i) for i, p in enumerate(run.phases)], "chart": bar_chart(bars, title="FLOPs by phase"),
        "saved": [(name, f"{fraction:.1%}") for name, fraction in saved.items()],
    }  # fmt: skip


def _time(run: Run) -> dict[str, Any] | None:
    phases = [phase for phase in run.phases if phase["time_fractions"]]
    if not phases:
        return None
    names = [part for part in _PARTS if any(part in phase["time_fractions"] for phase in phases)]
    names += sorted({part for phase in phases for part in phase["time_fractions"]} - {*names})
    bars = [
        Bar(
            phase["name"],
            [
                (f"{part}: {phase['time_fractions'].get(part, 0):.0%}", phase["time_fractions"].get(part, 0), i)
                for i, part in enumerate(names)
            ],
            f"{phase['step_seconds_median']:.3g} s a step",
        )
        for phase in phases
    ]
    return {
        "chart": bar_chart(bars, title="Where a step's time goes"),
        "head": ["part", *(phase["name"] for phase in phases)],
        "rows": [(part, *(f"{p['time_fractions'].get(part, 0):.0%}" for p in phases)) for part in names],
    }


def _timed(run: Run) -> list[dict[str, Any]]:
    """The phases that were timed beside dense steps."""
    return [phase for phase in run.phases if "speedup" in phase]


def _speed(run: Run) -> list[tuple[Any, str]]:
    """A chart for each phase that was timed, with its caption."""
    charts = []
    for phase in _timed(run):
        measured, flops = phase["speedup"], phase["flops"]
        found = [
            ("measured", measured["median"], 0, (measured["low"], measured["high"])),
            ("if time followed executed FLOPs", flops["dense"] / flops["executed"], 7, None),
            ("if time followed useful FLOPs", flops["dense"] / flops["useful"], 7, None),
            ("sparse layers alone, 1/(1 − sparsity)", 1 / (1 - sparsities(phase)[2]), 7, None),
        ]
        for other in run.summary.get("comparison", ()):
            if other["phase"] == phase["name"]:
                wafer = other["cs2"]
                masks = "these masks" if other["mask"] == "real" else "masks by chance"
                found.insert(1, (f"CS-2, simulated, {masks}", wafer["central"], 2, (wafer["low"], wafer["high"])))
        bars = [Bar(name, [(name, value, colour)], f"{value:.2f}x", span) for name, value, colour, span in found]
        chart = bar_chart(bars, title=f"Step speed-up, {phase['name']}")
        charts.append((chart, f"{phase['name']}; a dense step takes {phase['dense_step_seconds_median']:.3g} s"))
    return charts


def _wafer(run: Run, drawn: bool) -> dict[str, Any] | None:
    """The finished run on a CS-2: its steps as estimated, and a corner of its first mask at work, event by event."""
    table = run.summary.get("comparison") or ()
    estimated = [
        (
            row["phase"], f"{row['sparsity']:.4g}", f"{row['cpu']['median']:.2f}x" if row["cpu"] else "–",
            f"{row['ideal']:.2f}x", f"{row['cs2']['central']:.2f}x",
            f"{row['cs2']['low']:.2f}x to {row['cs2']['high']:.2f}x",
            "this run's" if row["mask"] == "real" else "by chance", row["bound_by"],
        )
        for row in table
    ]  # fmt: skip
    at_work = _at_work(run) if drawn and run.summary and run.patterns else None
    if not (estimated or at_work):
        return None
    return {"rows": estimated, "central": table[0]["central"] if table else "", "at_work": at_work}


def _at_work(run: Run) -> dict[str, Any]:
    name, pattern = next(iter(run.patterns.items()))
    try:  # what follows needs the compiled core
        from vspdf.simulator import machine
        from vspdf.simulator.events import layer, pictures

        part = layer.corner(machine.load(), pattern.mask().numpy())
    except (UserError, BackendUnavailable) as error:
        return {"missing": str(error)}
    region = part.region
    said = (
        f"The first {part.outputs} outputs and {part.features} inputs of its mask ({part.density:.1%} kept), "
        f"streamed past {layer.LOCAL} tokens a PE on {region.width} x {region.height} PEs: {part.cycles:,} "
        f"cycles, {part.dense_cycles:,} with every weight kept, {part.dense_cycles / part.cycles:.2f}x."
    )
    return {"name": name, "said": said, "region": pictures.drawn(region)}


def _facts(run: Run) -> list[tuple[str, str]]:
    corpus, tokenizer = run.manifest["corpus"], run.manifest["tokenizer"]
    facts = {
        "corpus": f"{corpus['name']}, {corpus['documents']:,} documents, {words.count(corpus['bytes'])} bytes",
        "corpus sha256": corpus["sha256"],
        "tokenizer": f"{tokenizer['name']}, {tokenizer['vocab_size']:,} tokens",
        "data order": run.manifest["order"],
        **run.summary.get("hardware", {}),
        **run.summary.get("versions", {}),
    }
    return [(str(key), words.listed(value)) for key, value in facts.items()]
