"""What a region did, to look at: a Chrome trace, heat maps per PE, a time line."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from vspdf.errors import UserError
from vspdf.simulator.fabric import EVENT_KINDS, MOST_EVENTS, OPERATIONS, Region

MOST_LINES = 32  # PEs on a time line
COLOURS = {
    "task switch": "#d9a441",
    "vector operation": "#3b6ea5",
    "streaming operation": "#5fa55a",
    "scalar instructions": "#b0b0b0",
}


def check_paths(trace: Path | None, plot: Path | None) -> None:
    """Before anything runs.

    Raises
    ------
    UserError
        For a name of another kind, a missing folder, or a plot without matplotlib.
    """
    for path, suffixes in ((trace, (".json",)), (plot, (".png", ".svg", ".pdf"))):
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise UserError(f"{path}: expected a file name ending in {' or '.join(suffixes)}.")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}.")
    if plot is not None and find_spec("matplotlib") is None:
        raise UserError("--plot needs matplotlib: pip install 'vspdf[plot]'.")


def _label(kind: int, number: int) -> str:
    return OPERATIONS[number] if kind in (1, 2) else f"task {number}"


def write_trace(region: Region, path: Path) -> None:
    """Chrome's trace-event format (also read by Perfetto): a process per row of PEs, a thread per PE, a cycle as 1 us.

    Micro-threads overlap the task beside them and each other: streams are asynchronous events.
    """
    events: list[dict[str, Any]] = []
    for y in range(region.height):
        events.append({"ph": "M", "name": "process_name", "pid": y, "args": {"name": f"row {y}"}})
        for x in range(region.width):
            events.append({"ph": "M", "name": "thread_name", "pid": y, "tid": x, "args": {"name": f"PE ({x}, {y})"}})
    noted = region.trace_events()
    for number, (pe, begin, end, kind, what) in enumerate(noted.tolist()):
        event = {"name": _label(kind, what), "cat": EVENT_KINDS[kind], "ts": begin, "pid": pe // region.width}
        event["tid"] = pe % region.width
        if kind == 2:
            events.append(event | {"ph": "b", "id": number})
            events.append(event | {"ph": "e", "id": number, "ts": end})
        else:
            events.append(event | {"ph": "X", "dur": end - begin})
    about = {"cycles": region.cycles, "events": len(noted), "complete": len(noted) < MOST_EVENTS}
    path.write_text(json.dumps({"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}))


def heat_maps(region: Region) -> dict[str, np.ndarray]:
    """[height, width] each, as fractions of the cycles; traffic in wavelets per cycle that a router passed on."""
    stats, cycles = region.stats, max(1, region.cycles)
    causes = {
        "busy": "busy", "bank conflicts": "bank_stall", "task switches": "task_switch", "waiting for data": "wait_data",
        "held up by the fabric": "back_pressure", "idle": "idle",
    }  # fmt: skip
    maps = {title: stats[name] / cycles for title, name in causes.items()}
    return maps | {"traffic": (stats["forwarded"] + stats["received"]) / cycles}


def plot(region: Region, path: Path, title: str) -> None:
    """Draws `heat_maps` and, below them, a time line of up to 32 PEs spread evenly over the region."""
    from matplotlib import pyplot as plt
    from matplotlib.patches import Patch

    maps = heat_maps(region)
    figure = plt.figure(figsize=(13, 8.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[1, 1.15])
    above, below = parts
    figure.suptitle(f"{title}: {region.cycles:,} cycles", x=0.01, ha="left")
    axes: Any = above.subplots(2, 4).ravel()
    for axis, (name, values) in zip(axes, maps.items(), strict=False):
        top = 1.0 if name != "traffic" else max(float(values.max()), 1e-9)
        image = axis.imshow(values, vmin=0, vmax=top, cmap="viridis", aspect="auto", interpolation="nearest")
        axis.set_title(
            f"{name}, mean {values.mean():.1%}" if name != "traffic" else "traffic, wavelets a cycle", fontsize=9
        )
        axis.tick_params(labelsize=7)
        for each in (axis.xaxis, axis.yaxis):
            each.get_major_locator().set_params(integer=True)
        above.colorbar(image, ax=axis, fraction=0.05).ax.tick_params(labelsize=7)
    axes[-1].axis("off")
    _time_line(region, below.subplots(), Patch)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _time_line(region: Region, axis: Any, patch: Any) -> None:
    events = region.trace_events()
    pes = region.width * region.height
    shown = np.unique(np.linspace(0, pes - 1, min(pes, MOST_LINES)).astype(int))
    for line, pe in enumerate(shown):
        mine = events[events[:, 0] == pe]
        for kind, name in enumerate(EVENT_KINDS):
            spans = mine[mine[:, 3] == kind]
            bars = np.stack([spans[:, 1], spans[:, 2] - spans[:, 1]], 1)
            # A stream lies below what its task does meanwhile.
            low, high = (line + 0.1, 0.3) if kind == 2 else (line + 0.4, 0.5)
            axis.broken_barh(bars, (low, high), facecolors=COLOURS[name], linewidth=0)
    axis.set_yticks(
        np.arange(len(shown)) + 0.5, [f"({pe % region.width}, {pe // region.width})" for pe in shown], fontsize=6
    )
    axis.invert_yaxis()
    axis.set_xlim(0, max(1, region.cycles))
    axis.set_xlabel("cycle")
    axis.set_ylabel("PE")
    axis.set_title(
        "time line" + ("" if len(events) < MOST_EVENTS else f": the first {MOST_EVENTS:,} events"), fontsize=9
    )
    handles = [patch(color=COLOURS[name], label=name) for name in EVENT_KINDS]
    axis.legend(handles=handles, fontsize=7, loc="upper right", ncols=4, bbox_to_anchor=(1, 1.09), frameon=False)
