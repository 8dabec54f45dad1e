"""A machine's benchmark as one HTML page that needs no network, and as the JSON file that tables are drawn from."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

from vspdf.draw import page
from vspdf.draw.svg import Series, line_chart
from vspdf.draw.words import listed
from vspdf.files import make_folder, write_whole
from vspdf.report import bench_tables
from vspdf.report.bench_tables import DRAWN, LABELS, curve, tables

__all__ = ["render", "tables", "write"]

TEMPLATE = Path(__file__).with_name("templates") / "bench.html"
NOTES = {
    "layers": "Speed-up over torch's dense GEMM in float32; packing of activations, transposes and the refresh of "
    "values counted. Medians of the ratios of interleaved rounds.",
    "peers": "Each result was held against float64 on that very mask before it was timed. Prepares: what is built once "
    "for a mask.",
    "masks": "Row spread: standard deviation of kept weights a row over their mean. Bandwidth: how far a kept weight "
    "lies from the line between the corners, at most. auto: what users get; it takes dense where that is faster.",
    "few_tokens": "Below about 64 tokens a product reads its weights more than it computes.",
    "steps": "GPT with 12 layers, d = 768, 512 tokens, batch 4, byte vocabulary; forward, backward, clipping and "
    "AdamW. bfloat16: under autocast.",
    "memory": "Weights, gradients, both moments of AdamW, and of the sparse layer its bits and plans; 768 -> 3072.",
    "plans": "Built once per mask for all three products; 768 -> 3072, and 48 such layers.",
    "roofline": "Multiply-adds from registers, and bytes read a second from each level, all threads together.",
}


def write(result: dict[str, Any], folder: Path) -> tuple[Path, Path]:
    """Writes MACHINE.json and MACHINE.html into a folder.

    Raises
    ------
    UserError
        If it cannot be written to.
    """
    make_folder(folder)
    files = (folder / f"{result['machine']['id']}.json", folder / f"{result['machine']['id']}.html")
    write_whole(files[0], bench_tables.dump(result))
    write_whole(files[1], render(result))
    return files


def render(result: dict[str, Any]) -> str:
    """The page."""
    sections = []
    for name, make in bench_tables.ALL.items():
        table = make(result)
        if table is not None:
            charts, legend = _charts(result, name)
            sections.append({"table": table, "note": NOTES[name], "charts": charts, "legend": legend})
    machine = result["machine"]
    facts = [(key, _told(value)) for key, value in {**machine, **result["versions"], "date": result.get("date")}.items()
             if value is not None]  # fmt: skip
    missing = {k: v for section in result["sections"].values() for k, v in section.get("missing", {}).items()}
    return page.render(
        TEMPLATE, title=f"{machine['name']}: vspdf bench suite", about=bench_tables.about(result), sections=sections,
        facts=facts, missing=sorted(missing.items()), tiny=bool(result.get("tiny")),
    )  # fmt: skip


def _charts(result: dict[str, Any], section: str) -> tuple[list[tuple[Element, str]], list[tuple[str, int]]]:
    """Pictures of a section, each with its caption, and a legend of their colours."""
    rows = result["sections"].get(section, {}).get("rows", [])
    if section in ("layers", "peers") and rows:
        names = [name for name in DRAWN if any(row["candidate"] == name for row in rows)]
        threads = sorted({row["threads"] for row in rows if row.get("threads")})
        charts = [(_speedups(rows, names, count), _counted(count)) for count in threads]
        return [each for each in charts if each[0] is not None], [(LABELS[name], i) for i, name in enumerate(names)]
    if section == "roofline":
        return _rooflines(result)
    return [], []


def _told(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key} {part:,} bytes" for key, part in value.items())
    return listed(value)


def _counted(threads: int | str) -> str:
    return f"{threads} thread{'s' * (str(threads) != '1')}"


def _speedups(rows: list[dict[str, Any]], names: list[str], threads: int) -> Element:
    """Speed-up of a layer over sparsity, doubling from tick to tick."""
    series, highest = [], 1.0
    for i, name in enumerate(names):
        _, points = curve([row for row in rows if row["threads"] == threads], name)
        known = [(100 * s, math.log2(ratio)) for s, ratio in points]
        if known:
            x, y = zip(*known, strict=True)
            highest = max(highest, *y)
            tips = [f"{LABELS[name]}: {2**b:.2f}x at {a:g} %" for a, b in known]
            series.append(Series(LABELS[name], x, y, i, dots=True, tips=tips))
    lowest = min((y for s in series for y in s.y), default=0.0)
    return line_chart(
        series, title=f"speed-up over dense by sparsity, {threads} threads", x_label="sparsity, %",
        y_label="times as fast as dense", y_limits=(min(0.0, math.floor(lowest)), math.ceil(highest)),
        y_format=lambda y: "" if y % 1 else f"{2**y:g}x" if y >= 0 else f"1/{2**-y:g}x",
    )  # fmt: skip


def _rooflines(result: dict[str, Any]) -> tuple[list[tuple[Element, str]], list[tuple[str, int]]]:
    """The ceilings by threads, and where the products of the layers lie below them."""
    charts, levels = [], []
    for threads, machine in result["sections"]["roofline"].items():
        speeds, peak = machine["gbytes_per_second"], machine["peak_gflops"]
        levels = list(speeds)
        xs = [10 ** (i / 10) for i in range(-10, 31)]
        series = [
            Series(level, [math.log10(x) for x in xs], [math.log10(min(peak, x * speeds[level])) for x in xs], i)
            for i, level in enumerate(levels)
        ]
        for row in result["sections"].get("layers", {}).get("rows", []):
            if (str(row["threads"]), row["candidate"]) != (threads, "vspdf") or row["product"] == "layer":
                continue
            kept = (1 - row["sparsity"]) * row["in_features"] * row["out_features"]
            nbytes = 4 * (row["tokens"] * (row["in_features"] + row["out_features"]) + kept)
            at = math.log10(2 * row["tokens"] * kept / nbytes)
            rate = row["gflops_useful"]
            tip = f"{row['product']}, {row['sparsity']:.0%}: {rate:.0f} GFLOP/s at {10**at:.0f} FLOP a byte"
            series.append(Series(row["product"], [at], [math.log10(rate)], len(levels), dots=True, tips=[tip]))
        whole = lambda v: f"{10**v:g}" if v % 1 == 0 else ""  # noqa: E731
        chart = line_chart(
            series, title=f"roofline, {threads} threads", x_label="useful FLOPs a byte of operands and result",
            y_label="GFLOP/s", y_limits=(0.0, math.ceil(math.log10(peak))), x_format=whole, y_format=whole,
        )  # fmt: skip
        charts.append((chart, f"{_counted(threads)}; dots: vspdf's products of the layers above"))
    return charts, [*((level, i) for i, level in enumerate(levels)), ("vspdf", len(levels))]
