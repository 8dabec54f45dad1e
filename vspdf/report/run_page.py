"""What a run did, or several side by side, as one HTML file that needs no network.

Everything comes from the files of the run directories, so a report can be drawn at any time: of a run that is going on,
one that was stopped, or one that is done.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open

from vspdf.config import loading
from vspdf.draw.page import figure as figure
from vspdf.draw.page import page as page
from vspdf.draw.page import section as section
from vspdf.draw.svg import Band, Bar, Series, bar_chart, legend, line_chart, mask_png
from vspdf.draw.words import count, duration, flops, listed, number, power, scale
from vspdf.errors import BackendUnavailable, UserError
from vspdf.files import write_whole
from vspdf.pattern import Pattern
from vspdf.report.comparison import AXES, Arm, Axis, _arms, _comparison, _measure
from vspdf.runs.checkpoint import MODEL
from vspdf.runs.folder import COLUMNS, REPORT, Run, read

log = logging.getLogger("vspdf")

POINTS = 120  # of a training curve: more lines than that are averaged
SAMPLED = 100_000  # weights of a layer that are looked at, in slices spread over its rows
CROP = 96  # rows and columns of a mask that are drawn
_PARTS = ("sparse products", "dense products", "attention", "vocabulary", "optimizer", "rest")


# -- writing ----------------------------------------------------------------------------------------------------------


def write(folders: Sequence[Path], output: Path | None = None) -> Path:
    """Writes a report.

    Parameters
    ----------
    folders : sequence of Path
        Run directories; several are compared.
    output : Path, optional
        Default: `report.html`, of one run in its directory, of several in the current one.

    Returns
    -------
    Path
        Of the file.

    Raises
    ------
    UserError
        As `read`, or if the file cannot be written.
    """
    text = render(read(folders))
    output = output or (folders[0] if len(folders) == 1 else Path()) / REPORT
    write_whole(output, text)
    return output


def refresh(folder: Path) -> None:
    """Draws a run's report anew while it trains; what goes wrong is a warning, for the run must go on."""
    try:
        write([folder])
    except Exception as error:
        log.warning("%s was not drawn: %s", REPORT, " ".join(str(error).split()) or type(error).__name__)


def render(runs: Sequence[Run]) -> str:
    """The page."""
    arms = _arms(runs)
    title = runs[0].config.name if len(runs) == 1 else f"{len(runs)} runs"
    body = [f"<header><h1>{escape(title)}</h1>{''.join(_status(run) for run in runs)}</header>"]
    if len(runs) == 1:
        body.append(_tiles(runs[0]))
    body.append(_losses(arms))
    if len(runs) > 1:
        body.append(_comparison(arms))
    body.append(_table(runs))
    if len(runs) == 1:
        body.extend(_parts_of(runs[0], drawn=True))
    else:
        for run in runs:
            inside = "".join(_parts_of(run))
            body.append(f'<details class="run"><summary><h2>{escape(run.label)}</h2></summary>{inside}</details>')
    return page(title, body)


def _parts_of(run: Run, drawn: bool = False) -> list[str]:
    """`drawn`: with what a simulated wafer does, which takes a moment."""
    return [_flops(run), _time(run), _speed(run), _wafer(run, drawn), _masks(run), _revived(run), _facts(run)]


# -- sections ---------------------------------------------------------------------------------------------------------


def _status(run: Run) -> str:
    if run.summary:
        state, kind = f"finished, {run.step:,} steps", "done"
    elif run.lines:
        state, kind = f"not finished: step {run.step:,} of {run.total_steps:,}", "open"
    else:
        state, kind = "not finished: no step was logged yet", "open"
    what = f"{count(run.shape.parameters)} parameters on {run.manifest['corpus']['name']}, seed {run.config.seed}"
    return f'<p><b>{escape(run.label)}</b> <span class="badge {kind}">{state}</span> {escape(what)}</p>'


def _tiles(run: Run) -> str:
    if not run.lines:
        return ""
    last, tiles = run.lines[-1], []
    if run.evaluations:
        value = run.evaluations[-1]
        tiles.append((f"{value['val_loss']:.4f}", "validation loss, nats a token"))
        tiles.append((f"{value['val_bits_per_byte']:.4f}", "validation bits a byte"))
    tiles.append((count(last["tokens"]), "tokens"))
    skipped = 1 - last["flops"]["executed"] / last["flops"]["dense"]
    tiles.append((f"{skipped:.1%}", "of all FLOPs really skipped"))
    tiles.append((duration(last["training_seconds"]), "in training steps"))
    tiles.extend((f"{p['speedup']['median']:.2f}x", f"step speed-up, {p['name']}") for p in _timed(run))
    cells = "".join(f"<div><b>{escape(value)}</b>{escape(name)}</div>" for value, name in tiles)
    return f'<section class="tiles">{cells}</section>'


def _losses(arms: Sequence[Arm]) -> str:
    runs = [run for arm in arms for run in arm.runs]
    if not any(run.lines for run in runs):
        return section("Loss", "<p>No step was logged yet.</p>")
    key, name = _measure(runs)
    charts = "".join(figure(_loss_chart(arms, axis, key, name)) for axis in AXES)
    entries = [(arm.name, i) for i, arm in enumerate(arms)]
    averaged = max(-(-len(run.lines) // POINTS) for run in runs)
    pale = f"mean of {averaged} logged steps each" if averaged > 1 else "each logged step"
    notes = ["Dots: validation." + (f" Pale: training, {pale}." if key == "val_loss" else "")]
    if any(len(run.config.phases) > 1 for run in runs):
        notes.append("Dashed: a switch to the next phase. Shaded: the sparser a phase, the darker.")
    notes.append("Training time is that of the steps alone, without evaluations and dense steps measured beside them.")
    head = legend(entries) if len(arms) > 1 else ""
    return section("Loss", f'{head}<div class="grid3">{charts}</div>', " ".join(notes))


def _loss_chart(arms: Sequence[Arm], axis: Axis, key: str, name: str) -> str:
    what, unit, value = axis
    divisor, prefix = scale(max(value(run.lines[-1]) for arm in arms for run in arm.runs if run.lines), unit)
    series: list[Series] = []
    bands: list[Band] = []
    shown: list[float] = []
    for i, arm in enumerate(arms):
        for run in arm.runs:
            x = [value(line) / divisor for line in run.lines]
            points = [(value(line) / divisor, line[key]) for line in run.evaluations]
            if key == "val_loss":
                xs, ys = _thinned(x), _thinned([line["loss"] for line in run.lines])
                series.append(Series(run.label, xs, ys, i, faint=True))
                start = points[0][0] if points else xs[len(xs) // 20] if xs else 0.0
                shown.extend(y for x, y in zip(xs, ys, strict=True) if x >= start)  # the first fall would flatten it
            series.append(Series(run.label, [a for a, _ in points], [b for _, b in points], i, dots=True))
            shown.extend(b for _, b in points)
        if arm.runs[0].lines:
            bands.extend(_bands(arm.runs[0], axis, divisor, i, row=None if len(arms) == 1 else len(arms) - 1 - i))
    limits = (min(shown), max(shown)) if shown else (0.0, 1.0)
    series.sort(key=lambda s: not s.faint)  # validation on top
    return line_chart(
        series, bands, title=f"{name} against {what}", x_label=f"{what} ({prefix})", y_label=name, y_limits=limits
    )


def _bands(run: Run, axis: Axis, divisor: float, index: int, row: int | None) -> list[Band]:
    """Where the phases of a run were on an axis, as far as it got."""
    bands, start, end_step = [], 0.0, 0
    for phase in run.config.phases:
        end_step += phase.steps
        until = [line for line in run.lines if line["step"] <= end_step]
        end = axis[2](until[-1]) / divisor if until else start
        if end > start:
            bands.append(Band(start, end, phase.name, phase.sparsity, index, row))
        start = end
    return bands


def _thinned(values: Sequence[float]) -> list[float]:
    """At most `POINTS` values: means of equal stretches."""
    return [float(np.mean(part)) for part in np.array_split(values, min(len(values), POINTS))] if values else []


def _flops(run: Run) -> str:
    if not run.phases:
        return ""
    totals = {column: sum(phase["flops"][column] for phase in run.phases) for column in COLUMNS}
    bars = [
        Bar(
            "as if dense" if column == "dense" else column,
            [(f"{p['name']}: {flops(p['flops'][column])}", p["flops"][column], i) for i, p in enumerate(run.phases)],
            f"{flops(totals[column])}, {totals[column] / totals['dense']:.1%}",
        )
        for column in COLUMNS
    ]  # fmt: skip
    chart = legend([(p["name"], i) for i, p in enumerate(run.phases)]) + bar_chart(bars, title="FLOPs by phase")
    saved = run.summary.get("flops_saved_fraction_by_convention") or {}
    rows = "".join(f"<tr><td>{escape(name)}</td><td>{fraction:.1%}</td></tr>" for name, fraction in saved.items())
    table = f"<table><tr><th>counted by convention</th><th>saved</th></tr>{rows}</table>" if rows else ""
    return section(
        "FLOPs", f'<div class="grid2">{figure(chart)}<div>{table}</div></div>',
        "Dense: as if no weight were masked. Useful: kept weights only. Executed: what the kernels really multiplied, "
        "padding included; a product that ran dense counts dense. Conventions are arithmetic over the planned phases.",
    )  # fmt: skip


def _time(run: Run) -> str:
    phases = [phase for phase in run.phases if phase["time_fractions"]]
    if not phases:
        return section("Where a step's time goes", "<p>Not known before the first checkpoint.</p>") if run.lines else ""
    parts = [part for part in _PARTS if any(part in phase["time_fractions"] for phase in phases)]
    parts += sorted({part for phase in phases for part in phase["time_fractions"]} - {*parts})
    bars = [
        Bar(
            phase["name"],
            [(f"{part}: {phase['time_fractions'].get(part, 0):.0%}", phase["time_fractions"].get(part, 0), i)
             for i, part in enumerate(parts)],
            f"{phase['step_seconds_median']:.3g} s a step",
        )
        for phase in phases
    ]  # fmt: skip
    head = "".join(f"<th>{escape(phase['name'])}</th>" for phase in phases)
    rows = "".join(
        f'<tr><td><i class="c{i}"></i> {escape(part)}</td>'
        + "".join(f"<td>{phase['time_fractions'].get(part, 0):.0%}</td>" for phase in phases)
        + "</tr>"
        for i, part in enumerate(parts)
    )
    table = f"<table><tr><th>part</th>{head}</tr>{rows}</table>"
    chart = figure(bar_chart(bars, title="Where a step's time goes"))
    return section(
        "Where a step's time goes", f'<div class="grid2">{chart}<div>{table}</div></div>',
        "The second step of each phase, under the profiler: operators' own time on all threads.",
    )  # fmt: skip


def _timed(run: Run) -> list[dict[str, Any]]:
    return [phase for phase in run.phases if "speedup" in phase]


def _speed(run: Run) -> str:
    phases = _timed(run)
    if not phases:
        return section(
            "Step speed-up", "<p>Not measured: there was no sparse phase with dense steps timed beside it "
            "(train.measure_dense).</p>",
        ) if run.lines else ""  # fmt: skip
    charts = []
    for phase in phases:
        measured, flops = phase["speedup"], phase["flops"]
        rows = [
            ("measured", measured["median"], 0, (measured["low"], measured["high"])),
            ("if time followed executed FLOPs", flops["dense"] / flops["executed"], 7, None),
            ("if time followed useful FLOPs", flops["dense"] / flops["useful"], 7, None),
            ("sparse layers alone, 1/(1 − sparsity)", 1 / (1 - phase["sparsity"]), 7, None),
        ]
        for other in run.summary.get("comparison", ()):
            if other["phase"] == phase["name"]:
                wafer = other["cs2"]
                masks = "these masks" if other["mask"] == "real" else "masks by chance"
                rows.insert(1, (f"CS-2, simulated, {masks}", wafer["central"], 2, (wafer["low"], wafer["high"])))
        bars = [Bar(name, [(name, value, colour)], f"{value:.2f}x", span) for name, value, colour, span in rows]
        seconds = f"{phase['dense_step_seconds_median']:.3g} s"
        chart = bar_chart(bars, title=f"Step speed-up, {phase['name']}")
        charts.append(figure(chart, f"{escape(phase['name'])}; a dense step takes {seconds}"))
    return section(
        "Step speed-up", f'<div class="grid2">{"".join(charts)}</div>',
        "Measured beside a dense step on the same batch, at its best thread count; the whisker spans all pairs.",
    )  # fmt: skip


def _wafer(run: Run, drawn: bool) -> str:
    """The finished run on a CS-2: its steps as estimated, and a corner of its first mask at work, event by event."""
    table = run.summary.get("comparison") or ()
    content, notes = "", []
    if table:
        head = ("phase", "sparsity", "CPU, measured", "ideal", "CS-2, simulated", "band", "positions", "bound by")
        rows = [
            (
                row["phase"], f"{row['sparsity']:.4g}", f"{row['cpu']['median']:.2f}x" if row["cpu"] else "–",
                f"{row['ideal']:.2f}x", f"{row['cs2']['central']:.2f}x",
                f"{row['cs2']['low']:.2f}x to {row['cs2']['high']:.2f}x",
                "this run's" if row["mask"] == "real" else "by chance", row["bound_by"],
            )
            for row in table
        ]  # fmt: skip
        body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
        heads = "".join(f"<th>{name}</th>" for name in head)
        content = f'<div class="scroll"><table><tr>{heads}</tr>{body}</table></div>'
        notes.append(
            f"A step on a whole wafer, sparse against dense; central case {escape(table[0]['central'])}, the band "
            "spans what is not known of the machine. docs/simulator.md says how far to trust it."
        )
    if drawn and run.summary and run.patterns:
        content += _at_work(run, notes)
    return section("On a CS-2", content, " ".join(notes)) if content else ""


def _at_work(run: Run, notes: list[str]) -> str:
    name, pattern = next(iter(run.patterns.items()))
    try:  # what follows needs the compiled core
        from vspdf.simulator import machine
        from vspdf.simulator.events import layer, pictures

        part = layer.corner(machine.load(), pattern.mask().numpy())
    except (UserError, BackendUnavailable) as error:
        return f"<p>Not drawn at work: {escape(str(error))}</p>"
    region = part.region
    notes.extend((pictures.MAPS_NOTE, pictures.TIME_NOTE))
    return (
        f"<h3>{escape(name)} at work, event by event</h3>"
        f"<p>The first {part.outputs} outputs and {part.features} inputs of its mask ({part.density:.1%} kept), "
        f"streamed past {layer.LOCAL} tokens a PE on {region.width} x {region.height} PEs: {part.cycles:,} "
        f"cycles, {part.dense_cycles:,} with every weight kept, {part.dense_cycles / part.cycles:.2f}x.</p>"
        + pictures.maps_html(region)
        + pictures.time_line_html(region)
    )


def _masks(run: Run) -> str:
    if not run.patterns:
        return section("Masks", "<p>No layer was sparse: every weight was trained from the first step.</p>")
    rows: dict[str, dict[str, Pattern]] = {}
    for name, pattern in run.patterns.items():
        block = re.fullmatch(r"(.*?\.\d+)\.(.+)", name)
        row, column = block.groups() if block else (name, "")
        rows.setdefault(row, {})[column] = pattern
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    head = "".join(f"<th>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr><td>{escape(row)}</td>" + "".join(_sparsity_cell(cells.get(column)) for column in columns) + "</tr>"
        for row, cells in rows.items()
    )
    table = f'<div class="scroll tall"><table><tr><th>layer</th>{head}</tr>{body}</table></div>'
    pictures = []
    for name, pattern in list(next(iter(rows.values())).items())[:4]:
        crop = pattern.mask().numpy()[:CROP, :CROP]
        source = mask_png(crop, (0x2A, 0x7F, 0xC9))
        full = f"{next(iter(rows))}.{name}".rstrip(".")
        caption = f"{escape(full)}: first {crop.shape[0]} outputs, {crop.shape[1]} inputs; {crop.mean():.1%} kept"
        alt = f"mask of {escape(full)}"
        pictures.append(figure(f'<img class="mask" src="{source}" alt="{alt}">', caption))
    kept = sum(pattern.nnz for pattern in run.patterns.values())
    numel = sum(pattern.numel for pattern in run.patterns.values())
    return section(
        "Masks", f'<div class="masks">{"".join(pictures)}</div>{table}',
        f"Sparsity by layer and masks as drawn at the first step: {kept:,} of {numel:,} weights are kept. In the "
        "pictures a dot is a kept weight.",
    )  # fmt: skip


def _sparsity_cell(pattern: Pattern | None) -> str:
    if pattern is None:
        return "<td></td>"
    hint = f"{pattern.nnz:,} of {pattern.numel:,} weights"
    shade = f"background:rgba(42,127,201,{pattern.sparsity * 0.35:.2f})"
    return f'<td style="{shade}" title="{hint}">{pattern.sparsity:.2%}</td>'


def _revived(run: Run) -> str:
    title = "Revived weights"
    if not run.patterns:
        return ""
    if len(run.config.phases) == 1:
        return section(title, "<p>None: the run has one phase, so no masked weight was ever trained.</p>")
    if run.checkpoint is None:
        return section(title, "<p>Not known before the first checkpoint.</p>")
    if run.state["phase"] == 0:
        return section(
            title, f"<p>None at the last checkpoint (step {run.state['step']:,}): the first phase was not over.</p>"
        )
    kept, revived = _magnitudes(run.checkpoint / MODEL, run.patterns)
    moved = revived[revived > 0]
    if not (moved.size and kept.any()):
        return section(
            title, f"<p>There is nothing to compare at the last checkpoint (step {run.state['step']:,}).</p>"
        )
    logs = [np.log10(values[values > 0]) for values in (kept, moved)]
    low, high = min(np.quantile(v, 0.001) for v in logs), max(float(v.max()) for v in logs)
    edges = np.linspace(low, high, 61)
    series = []
    for i, (name, values) in enumerate(zip(("kept from the start", "revived"), logs, strict=True)):
        share = np.histogram(values, edges)[0] / len(values) * 100
        series.append(Series(name, list(edges), [*share, share[-1]], i, steps=True))
    chart = line_chart(
        series, title="Magnitudes of weights", x_label="magnitude of a weight", y_label="% of weights",
        x_format=power, y_limits=(0.0, max(max(s.y) for s in series)),
    )  # fmt: skip
    rows = [
        ("median", np.median(kept), np.median(revived)),
        ("RMS", np.sqrt(np.mean(kept**2)), np.sqrt(np.mean(revived**2))),
        ("largest", kept.max(), revived.max()),
    ]
    body = "".join(
        f"<tr><td>{name}</td><td>{a:.2e}</td><td>{b:.2e}</td><td>{b / a:.0%}</td></tr>" for name, a, b in rows
    )
    table = f"<table><tr><th></th><th>kept</th><th>revived</th><th>ratio</th></tr>{body}</table>"
    zero = f"{1 - moved.size / revived.size:.1%} of the revived are zero still. " if moved.size < revived.size else ""
    head = legend([(s.name, s.colour) for s in series])
    return section(
        title, f'{head}<div class="grid2">{figure(chart)}<div>{table}</div></div>',
        f"Magnitudes at step {run.state['step']:,}. A revived weight starts at zero when its phase begins, so its "
        f"magnitude is how far it moved. {zero}{revived.size:,} revived and {kept.size:,} kept weights were looked at.",
    )  # fmt: skip


def _magnitudes(path: Path, first: dict[str, Pattern]) -> tuple[np.ndarray, np.ndarray]:
    """Magnitudes of weights that were kept from the start, and of those added since; large layers are sampled."""
    kept, revived = [], []
    try:
        with safe_open(path, framework="pt") as tensors:
            stored = set(tensors.keys())
            for name, pattern in first.items():
                mask = pattern.mask().numpy()
                if f"{name}.weight" in stored:
                    weight = tensors.get_slice(f"{name}.weight")
                    for rows in _slices(*pattern.shape):
                        part = np.abs(weight[rows].float().numpy())
                        kept.append(part[mask[rows]])
                        revived.append(part[~mask[rows]])
                elif f"{name}.values" in stored:  # sparser than the first phase, but sparse still
                    now = Pattern(pattern.shape, tensors.get_tensor(f"{name}.pattern").numpy())
                    was = mask[now.mask().numpy()]
                    values = np.abs(tensors.get_tensor(f"{name}.values").float().numpy())
                    kept.append(values[was])
                    revived.append(values[~was])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    return np.concatenate(kept), np.concatenate(revived)


def _slices(rows: int, columns: int) -> Iterator[slice]:
    """Up to eight stretches of rows, spread evenly, with about `SAMPLED` weights together."""
    wanted = max(8, SAMPLED // columns)
    if wanted >= rows:
        yield slice(0, rows)
        return
    for start in np.linspace(0, rows - wanted // 8, 8).astype(int):
        yield slice(int(start), int(start) + wanted // 8)


def _facts(run: Run) -> str:
    corpus, tokenizer = run.manifest["corpus"], run.manifest["tokenizer"]
    facts = {
        "corpus": f"{corpus['name']}, {corpus['documents']:,} documents, {count(corpus['bytes'])} bytes",
        "corpus sha256": corpus["sha256"],
        "tokenizer": f"{tokenizer['name']}, {tokenizer['vocab_size']:,} tokens",
        "data order": run.manifest["order"],
        **run.summary.get("hardware", {}),
        **run.summary.get("versions", {}),
    }
    rows = "".join(f"<tr><td>{escape(str(k))}</td><td>{escape(listed(v))}</td></tr>" for k, v in facts.items())
    blocks = [("Corpus, hardware, versions", f'<div class="scroll"><table class="facts">{rows}</table></div>')]
    blocks.append(("Configuration", f"<pre>{escape(loading.to_yaml(run.config))}</pre>"))
    for sample in run.summary.get("samples", []):
        blocks.append((f"Text it wrote after '{sample['phase']}'", f"<pre>{escape(sample['text'])}</pre>"))
    inside = "".join(f"<details><summary>{escape(t)}</summary>{content}</details>" for t, content in blocks)
    return section("Details", inside, "" if run.summary else "Hardware and versions are noted when the run finishes.")


def _table(runs: Sequence[Run]) -> str:
    head = (
        "run", "phase", "sparsity", "steps", "tokens", "training loss", "validation loss", "bits/byte", "FLOPs dense",
        "FLOPs useful", "FLOPs executed", "seconds", "s/step", "dense s/step", "speed-up",
    )  # fmt: skip
    rows = []
    for run in runs:
        for p in run.phases:
            rows.append((
                run.label, p["name"], f"{p['sparsity']:.4g}", str(p["steps"]), str(p["tokens"]), number(p["loss"]),
                number(p["val_loss"]), number(p["val_bits_per_byte"]), *(f"{p['flops'][c]:.4g}" for c in COLUMNS),
                f"{p['seconds']:.1f}", f"{p['step_seconds_median']:.4g}",
                f"{p['dense_step_seconds_median']:.4g}" if "speedup" in p else "",
                f"{p['speedup']['median']:.2f}" if "speedup" in p else "",
            ))  # fmt: skip
    if not rows:
        return ""
    body = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    heads = "".join(f"<th>{cell}</th>" for cell in head)
    table = f'<div class="scroll"><table id="figures"><tr>{heads}</tr>{body}</table></div>'
    return section("Figures by phase", f'{table}<button id="copy" type="button">Copy table</button>')
