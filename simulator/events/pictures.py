"""What a region did, to look at: a Chrome trace; heat maps per PE and a time line, as a picture or on a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree.ElementTree import Element

import numpy as np

from vspdf.draw import page
from vspdf.draw.png import rgba_png
from vspdf.draw.svg import add, drawing, ticks
from vspdf.errors import UserError
from vspdf.files import write_whole
from vspdf.simulator.events.fabric import EVENT_KINDS, MOST_EVENTS, OPERATIONS, Region

TEMPLATE = Path(__file__).with_name("region.html")
MOST_LINES = 32  # PEs on a time line
MOST_BINS = 1000  # stretches of time on it
COLOURS = {
    "task switch": (217, 164, 65),
    "vector operation": (59, 110, 165),
    "streaming operation": (95, 165, 90),
    "scalar instructions": (160, 160, 160),
}
RAMP = ((251, 247, 230), (143, 208, 181), (61, 151, 184), (59, 91, 165), (43, 29, 90))  # of heat maps: none to most
STREAMING = 2  # among EVENT_KINDS: goes on beside what the task does


def check_paths(trace: Path | None, plot: Path | None) -> None:
    """Before anything runs.

    Raises
    ------
    UserError
        For a name of another kind, a missing folder, or a picture without matplotlib; a page needs none.
    """
    for path, suffixes in ((trace, (".json",)), (plot, (".html", ".png", ".svg", ".pdf"))):
        if path is None:
            continue
        if path.suffix not in suffixes:
            raise UserError(f"{path}: expected a file name ending in {' or '.join(suffixes)}.")
        if not path.parent.is_dir():
            raise UserError(f"{path}: there is no folder {path.parent}.")
    if plot is not None and plot.suffix != ".html" and find_spec("matplotlib") is None:
        raise UserError("`plot` needs matplotlib: pip install 'vspdf[plot]'; a page (.html) does not.")


# -- trace -------------------------------------------------------------------------------------------------------------


def _label(kind: int, number: int) -> str:
    return OPERATIONS[number] if kind in (1, STREAMING) else f"task {number}"


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
        if kind == STREAMING:
            events.append(event | {"ph": "b", "id": number})
            events.append(event | {"ph": "e", "id": number, "ts": end})
        else:
            events.append(event | {"ph": "X", "dur": end - begin})
    about = {"cycles": region.cycles, "events": len(noted), "complete": len(noted) < MOST_EVENTS}
    write_whole(path, json.dumps({"traceEvents": events, "displayTimeUnit": "ns", "otherData": about}))


# -- what is drawn -----------------------------------------------------------------------------------------------------


def heat_maps(region: Region) -> dict[str, np.ndarray]:
    """[height, width] each, as fractions of the cycles; traffic in wavelets per cycle that a router passed on."""
    stats, cycles = region.stats, max(1, region.cycles)
    causes = {
        "busy": "busy", "bank conflicts": "bank_stall", "task switches": "task_switch", "waiting for data": "wait_data",
        "held up by the fabric": "back_pressure", "idle": "idle",
    }  # fmt: skip
    maps = {title: stats[name] / cycles for title, name in causes.items()}
    return maps | {"traffic": (stats["forwarded"] + stats["received"]) / cycles}


def _scale(name: str, values: np.ndarray) -> tuple[float, str]:
    """What the darkest colour stands for, and the map's caption."""
    if name == "traffic":
        return max(float(values.max()), 1e-9), f"traffic, up to {values.max():.2g} wavelets a cycle"
    return 1.0, f"{name}, mean {values.mean():.1%}"


def time_line(region: Region) -> tuple[list[str], np.ndarray]:
    """Up to 32 PEs spread evenly over the region, and what they did, in colours.

    Returns
    -------
    labels : list of str
        "(x, y)" of the PEs.
    pixels : uint8 array [4 x PEs, stretch of time, (red, green, blue, alpha)]
        Of each PE four lines: its micro-threads' streams, twice its task, a gap. Alpha is the part of a stretch in
        which there was something to do.
    """
    events = region.trace_events()
    events = events[np.argsort(events[:, 0], kind="stable")]
    pes = region.width * region.height
    shown = np.unique(np.linspace(0, pes - 1, min(pes, MOST_LINES)).astype(int))
    end = shown_cycles(region)
    edges = np.linspace(0, end, min(end, MOST_BINS) + 1)
    pixels = np.zeros((4 * len(shown), len(edges) - 1, 4), np.uint8)
    first, last = (np.searchsorted(events[:, 0], shown, side) for side in ("left", "right"))
    for line, (begin, end) in enumerate(zip(first, last, strict=True)):
        covered = [_covered(events[begin:end], kind, edges) for kind in range(len(EVENT_KINDS))]
        pixels[4 * line] = _mixed(covered, [STREAMING])
        pixels[4 * line + 1 : 4 * line + 3] = _mixed(covered, [k for k in range(len(EVENT_KINDS)) if k != STREAMING])
    return [f"({pe % region.width}, {pe // region.width})" for pe in shown], pixels


def _covered(events: np.ndarray, kind: int, edges: np.ndarray) -> np.ndarray:
    """Which part of each stretch between edges events of a kind fill."""
    total = np.zeros(len(edges))
    for column, sign in ((1, 1), (2, -1)):
        times = np.sort(events[events[:, 3] == kind, column])
        sums = np.concatenate([[0], np.cumsum(times)])
        before = np.searchsorted(times, edges)
        total += sign * (before * edges - sums[before])  # time since each begin, less time since each end
    return np.clip(np.diff(total) / np.diff(edges), 0, 1)


def _mixed(covered: Sequence[np.ndarray], kinds: Sequence[int]) -> np.ndarray:
    """uint8 [stretch, 4]: the kinds' colours by their parts of it."""
    parts = np.stack([covered[kind] for kind in kinds], 1)
    filled = parts.sum(1, keepdims=True)
    colours = np.array([COLOURS[EVENT_KINDS[kind]] for kind in kinds], float)
    mean = parts @ colours / np.maximum(filled, 1e-12)
    return np.concatenate([mean, 255 * np.clip(filled, 0, 1)], 1).round().astype(np.uint8)


def shown_cycles(region: Region) -> int:
    """The last cycle on the time line: to the end, or as far as events were noted."""
    events = region.trace_events()
    return max(1, region.cycles if len(events) < MOST_EVENTS else int(events[-1, 1]))


def _cut(region: Region) -> str:
    if shown_cycles(region) >= region.cycles:
        return ""
    return f", as far as the first {MOST_EVENTS:,} events go, of {region.cycles:,}"


def plot(region: Region, path: Path, title: str) -> None:
    """Draws `heat_maps` and `time_line` of a region: on a page (.html) or as a picture (.png, .svg, .pdf).

    Raises
    ------
    UserError
        If the file cannot be written.
    """
    title = f"{title}: {region.cycles:,} cycles"
    if path.suffix == ".html":
        write_whole(path, page.render(TEMPLATE, title=title, region=drawn(region)))
        return
    try:
        _picture(region, path, title)
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror}.") from None


# -- on a page ---------------------------------------------------------------------------------------------------------


MAPS_NOTE = (
    "A square is a PE, x to the right, y downwards. Busy, waiting for data, held up by the fabric and idle add up to "
    "all cycles; bank conflicts and task switches are part of busy. Traffic: wavelets that a router passed on or "
    "delivered."
)
TIME_NOTE = (
    "A line is a PE, (x, y), up to 32 of them. The thin upper stripe: operations that stream to or from the fabric as "
    "micro-threads; below, what the task does meanwhile. Empty: nothing to do, or waiting."
)


def drawn(region: Region) -> dict[str, Any]:
    """Heat maps and time line as the macros `heat_maps` and `time_line` of pages want them, with what explains them."""
    size = f"{region.width} x {region.height} PEs"
    maps = []
    for name, values in heat_maps(region).items():
        top, caption = _scale(name, values)
        maps.append({
            "source": rgba_png(_ramp(values / top)), "caption": caption,
            "alt": f"heat map of {name} over {size}: {values.min():.2g} to {values.max():.2g}",
        })  # fmt: skip
    return {
        "maps": maps, "ratio": f"{min(8.0, max(0.5, region.width / region.height)):.3g}",
        "ramp": rgba_png(_ramp(np.linspace(0, 1, 128)[None])), "maps_note": MAPS_NOTE,
        "time_line": time_line_chart(region), "time_note": TIME_NOTE,
        "colours": [(name, f"rgb{colour}") for name, colour in COLOURS.items()],
    }  # fmt: skip


def _ramp(values: np.ndarray) -> np.ndarray:
    places = np.linspace(0, 1, len(RAMP))
    channels = [np.interp(values, places, [colour[c] for colour in RAMP]) for c in range(3)]
    return np.stack([*channels, np.full(values.shape, 255)], -1).round().astype(np.uint8)


WIDTH, LEFT, LINE = 760, 54, 12  # of the time line's drawing, of its labels, of a PE


def time_line_chart(region: Region) -> Element:
    """The time line with its axes, as an ``<svg>``."""
    labels, pixels = time_line(region)
    bottom, right = LINE * len(labels), WIDTH - 10
    end = shown_cycles(region)
    out = drawing(f"time line of {len(labels)} PEs over {end:,} cycles", bottom + 40, WIDTH)
    out.set("class", "wide")
    for x in ticks(0, end, 6):
        at = LEFT + x / end * (right - LEFT)
        add(out, "path", class_="grid", d=f"M{at:.1f} 0V{bottom}")
        add(out, "text", f"{x:,.6g}", class_="muted", x=at, y=bottom + 15, text_anchor="middle")
    add(
        out, "image", x=LEFT, y=0, width=right - LEFT, height=bottom, preserveAspectRatio="none",
        style="image-rendering:pixelated", href=rgba_png(pixels),
    )  # fmt: skip
    for line, label in enumerate(labels):
        add(out, "text", label, class_="muted", font_size=10, x=LEFT - 5, y=LINE * line + 8, text_anchor="end")
    add(out, "path", class_="axis", d=f"M{LEFT} {bottom}H{right}")
    below = f"cycle{_cut(region)}"
    add(out, "text", below, class_="muted", x=(LEFT + right) / 2, y=bottom + 33, text_anchor="middle")
    return out


# -- as a picture ------------------------------------------------------------------------------------------------------


def _picture(region: Region, path: Path, title: str) -> None:
    from matplotlib.colors import LinearSegmentedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    maps = heat_maps(region)
    whole = Figure(figsize=(13, 8.5), layout="constrained")
    parts: Any = whole.subfigures(2, 1, height_ratios=[1, 1.15])
    above, below = parts
    whole.suptitle(title, x=0.01, ha="left")
    colours = LinearSegmentedColormap.from_list("ramp", np.array(RAMP) / 255)
    axes: Any = above.subplots(2, 4).ravel()
    for axis, (name, values) in zip(axes, maps.items(), strict=False):
        top, caption = _scale(name, values)
        image = axis.imshow(values, vmin=0, vmax=top, cmap=colours, aspect="auto", interpolation="nearest")
        axis.set_title(caption, fontsize=9)
        axis.tick_params(labelsize=7)
        for each in (axis.xaxis, axis.yaxis):
            each.get_major_locator().set_params(integer=True)
        above.colorbar(image, ax=axis, fraction=0.05).ax.tick_params(labelsize=7)
    axes[-1].axis("off")
    axis = below.subplots()
    labels, pixels = time_line(region)
    axis.imshow(pixels, extent=(0, shown_cycles(region), len(labels), 0), aspect="auto", interpolation="nearest")
    axis.set_yticks(np.arange(len(labels)) + 0.4, labels, fontsize=6)
    axis.set_xlabel(f"cycle{_cut(region)}")
    axis.set_ylabel("PE")
    axis.set_title("time line", fontsize=9)
    handles = [Patch(color="#" + bytes(colour).hex(), label=name) for name, colour in COLOURS.items()]
    axis.legend(handles=handles, fontsize=7, loc="upper right", ncols=4, bbox_to_anchor=(1, 1.09), frameon=False)
    whole.savefig(path, dpi=110)
