"""Charts as SVG; eight of matplotlib's take 0.9 s, 0.8 s to import, 155 KB: a whole report takes 0.3 s and 86 KB here.

And matplotlib's colours do not follow a page into the dark, its text is laid out in a font of its own, its points have
no tooltips: all of that would have to be put into what it wrote.

Colours are CSS classes `c0` to `c7` (they set `color`), so that one picture serves light and dark. A chart is an
element: pages place it with the filter `svg`, and `sheet` puts several into one file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple
from xml.etree.ElementTree import Element, SubElement, tostring

from vspdf.draw.words import plain

COLOURS = 8
WIDTH, HEIGHT = 360, 250  # of the drawing; the page scales it, so text stays readable at 320 pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 40
_CHARACTER = 6.2  # width of one in a label, roughly
STYLE = Path(__file__).with_name("templates") / "chart.css"


@dataclass(frozen=True)
class Series:
    """One curve.

    Attributes
    ----------
    faint : bool
        Thin and pale, e.g. noisy training loss.
    dots : bool
        Its points are marked and carry their values as tooltips.
    steps : bool
        A histogram's outline: y[i] holds from x[i] to x[i + 1].
    spread : (low, high), optional
        Of each point; drawn as a pale area.
    tips : sequence of str, optional
        What pointing at each dot tells; default: its value, and where.
    """

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    faint: bool = False
    dots: bool = False
    steps: bool = False
    spread: tuple[Sequence[float], Sequence[float]] | None = None
    tips: Sequence[str] | None = None


@dataclass(frozen=True)
class Band:
    """A stretch of the x axis: shaded by `shade` (0 to 1); the whole height, or the `row`-th strip from below."""

    start: float
    end: float
    name: str
    shade: float
    colour: int
    row: int | None = None


@dataclass(frozen=True)
class Bar:
    """One horizontal bar of stacked parts (name, value, colour), with its figure in words and maybe a range."""

    name: str
    parts: Sequence[tuple[str, float, int]]
    figure: str
    span: tuple[float, float] | None = None


def colour(index: int) -> str:
    """The CSS class of a colour; after the last they begin again."""
    return f"c{index % COLOURS}"


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round values from `low` to `high`, about `count` of them: multiples of 1, 2 or 5 times a power of ten."""
    if not high > low:
        return [low]
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


# -- elements ---------------------------------------------------------------------------------------------------------


def add(parent: Element, tag: str, text: str | None = None, **attributes: str | float) -> Element:
    """Adds an element to another; `class_` and `fill_opacity` become ``class`` and ``fill-opacity``, floats are cut."""
    shown = {
        key.rstrip("_").replace("_", "-"): f"{value:.1f}".removesuffix(".0") if isinstance(value, float) else str(value)
        for key, value in attributes.items()
    }
    element = SubElement(parent, tag, shown)
    element.text = text
    return element


def drawing(title: str, height: float, width: float = WIDTH) -> Element:
    """An empty ``<svg>`` element that says what it shows to those who do not see it."""
    return Element("svg", {"viewBox": f"0 0 {width:g} {height:g}", "role": "img", "aria-label": title})


def markup(element: Element) -> str:
    """An element as text, whatever it holds escaped."""
    return tostring(element, encoding="unicode")


def _label(parent: Element, x: float, y: float, text: str, anchor: str = "middle", room: float = WIDTH) -> None:
    """A label at most `room` wide; what is cut off can be read by pointing at it."""
    most = max(4, int(room / _CHARACTER))
    element = add(
        parent, "text", text if len(text) <= most else text[: most - 1] + "…", class_="muted", x=x, y=y,
        text_anchor=anchor,
    )  # fmt: skip
    if len(text) > most:
        add(element, "title", text)


def _x_ticks(
    out: Element, values: Sequence[float], px: Callable[[float], float], y: float, form: Callable[[float], str]
) -> None:
    """Labels below an axis, none over the edge and none over its neighbour."""
    reached = 0.0
    for value in values:
        at, text = px(value), form(value)
        width = _CHARACTER * len(text)
        left = min(max(at - width / 2, 0.0), WIDTH - width)
        if text and left >= reached:
            add(out, "text", text, class_="muted", x=left + width / 2, y=y, text_anchor="middle")
            reached = left + width + _CHARACTER


# -- curves -----------------------------------------------------------------------------------------------------------


class _Frame(NamedTuple):
    """Where values lie on the drawing."""

    x0: float
    x1: float
    y0: float
    y1: float

    def px(self, x: float) -> float:
        return LEFT + (x - self.x0) / (self.x1 - self.x0) * (WIDTH - LEFT - RIGHT)

    def py(self, y: float) -> float:
        return HEIGHT - BOTTOM - (y - self.y0) / (self.y1 - self.y0) * (HEIGHT - TOP - BOTTOM)


def line_chart(
    series: Sequence[Series],
    bands: Sequence[Band] = (),
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float],
    x_format: Callable[[float], str] = plain,
    y_format: Callable[[float], str] = plain,
) -> Element:
    """Curves over shaded stretches of the x axis; a dashed line marks where each stretch but the first begins.

    Parameters
    ----------
    series : sequence of Series
    bands : sequence of Band
        In x order within a row.
    y_limits : (low, high)
        What of y to show, with a little room around it unless `low` is zero; curves are clipped there.

    Returns
    -------
    Element
        An ``<svg>``.
    """
    xs = [x for s in series for x in s.x] + [edge for b in bands for edge in (b.start, b.end)] or [0.0]
    x0, x1 = min(xs), max(xs)
    y0, y1 = y_limits
    margin = (y1 - y0) * 0.05 or 0.5
    frame = _Frame(x0, x1 if x1 > x0 else x0 + 1, y0 and y0 - margin, y1 + margin)  # bars and shares stand on zero
    bottom = HEIGHT - BOTTOM
    out = drawing(title, HEIGHT)
    for band in bands:
        _draw_band(out, frame, band)
    for y in ticks(frame.y0, frame.y1):
        if not y_format(y):
            continue
        add(out, "path", class_="grid", d=f"M{LEFT} {frame.py(y):.1f}H{WIDTH - RIGHT}")
        _label(out, LEFT - 5, frame.py(y) + 4, y_format(y), "end")
    _x_ticks(out, ticks(frame.x0, frame.x1, 6), frame.px, bottom + 16, x_format)
    add(out, "path", class_="axis", d=f"M{LEFT} {bottom}H{WIDTH - RIGHT}")
    _label(out, (LEFT + WIDTH - RIGHT) / 2, HEIGHT - 6, x_label)
    turned = f"translate(11 {(TOP + bottom) / 2}) rotate(-90)"
    add(out, "text", y_label, class_="muted", transform=turned, text_anchor="middle")
    x, width = LEFT - 4, WIDTH - LEFT - RIGHT + 8  # room for dots on the edge
    box = f"{x} {TOP} {width} {bottom - TOP}"
    inner = add(out, "svg", x=x, y=TOP, width=width, height=bottom - TOP, viewBox=box)  # clips what is inside
    for s in series:
        _draw_curve(inner, frame, s, x_format)
    return out


def _draw_band(out: Element, frame: _Frame, band: Band) -> None:
    bottom = HEIGHT - BOTTOM
    a, b = frame.px(band.start), frame.px(band.end)
    full = band.row is None
    kind, opacity = ("band", 0.17 * band.shade) if full else (colour(band.colour), 0.75 * band.shade)
    top, height = (TOP, bottom - TOP) if full else (bottom - 7 * (band.row or 0) - 7, 6)
    area = add(
        out, "rect", class_=kind, x=a, y=top, width=max(0.0, b - a), height=height, fill="currentColor",
        fill_opacity=f"{opacity + 0.02:.3f}",
    )  # fmt: skip
    add(area, "title", band.name)
    if band.start > frame.x0:
        add(out, "path", class_=f"{kind} switch", d=f"M{a:.1f} {TOP}V{bottom}")
    if full and len(band.name) * _CHARACTER < b - a:
        _label(out, (a + b) / 2, TOP + 13, band.name)


def _draw_curve(out: Element, frame: _Frame, s: Series, x_format: Callable[[float], str]) -> None:
    points = [(frame.px(x), frame.py(y)) for x, y in zip(s.x, s.y, strict=True)]
    if not points:
        return
    if s.spread:
        low, high = ([(frame.px(x), frame.py(y)) for x, y in zip(s.x, edge, strict=True)] for edge in s.spread)
        outline = " ".join(f"{x:.1f},{y:.1f}" for x, y in [*low, *reversed(high)])
        add(out, "polygon", class_=f"{colour(s.colour)} spread", points=outline)
    form = "H{0:.1f}V{1:.1f}" if s.steps else "L{0:.1f} {1:.1f}"
    path = f"M{points[0][0]:.1f} {points[0][1]:.1f}" + "".join(form.format(*p) for p in points[1:])
    add(out, "path", class_=f"{colour(s.colour)} {'faint' if s.faint else 'line'}", d=path)
    if s.dots:
        for i, ((a, b), x, y) in enumerate(zip(points, s.x, s.y, strict=True)):
            dot = add(out, "circle", class_=colour(s.colour), cx=a, cy=b, r=2.6, fill="currentColor")
            add(dot, "title", s.tips[i] if s.tips else f"{s.name}: {y:.4f} at {x_format(x)}")


# -- bars and intervals -----------------------------------------------------------------------------------------------


def bar_chart(bars: Sequence[Bar], *, title: str) -> Element:
    """Horizontal bars, each with its name above and its figure at the right; a `span` is drawn as a whisker.

    Returns
    -------
    Element
        An ``<svg>``.
    """
    row = 42
    longest = max((max(sum(v for _, v, _ in bar.parts), *(bar.span or (0,))) for bar in bars), default=0) or 1
    scale = (WIDTH - 4) / longest
    out = drawing(title, row * len(bars))
    for i, bar in enumerate(bars):
        y, x = i * row, 2.0
        most = max(4, int(WIDTH / _CHARACTER) - len(bar.figure) - 2)
        add(out, "text", bar.name if len(bar.name) <= most else bar.name[: most - 1] + "…", x=2, y=y + 13)
        add(out, "text", bar.figure, x=WIDTH - 2, y=y + 13, text_anchor="end")
        for name, value, index in bar.parts:
            width = value * scale
            part = add(
                out, "rect", class_=colour(index), x=x, y=y + 19, width=width, height=14, fill="currentColor"
            )  # fmt: skip
            add(part, "title", name)
            x += width
        if bar.span:
            a, b = (2 + edge * scale for edge in bar.span)
            whisker = f"M{a:.1f} {y + 22}v8M{a:.1f} {y + 26}H{b:.1f}M{b:.1f} {y + 22}v8"
            add(out, "path", class_="whisker", d=whisker)
    return out


def interval_chart(
    rows: Sequence[tuple[str, float, tuple[float, float] | None]], *, title: str, x_label: str
) -> Element:
    """Means with their intervals about a line at zero, a row each.

    Parameters
    ----------
    rows : sequence of (name, mean, interval)
        An interval that does not hold zero is drawn in the first colour, others are muted.

    Returns
    -------
    Element
        An ``<svg>``.
    """
    row, edges = 40, [0.0]
    for _, mean, span in rows:
        edges.extend((mean, *(span or ())))
    margin = (max(edges) - min(edges)) * 0.06 or 0.5
    x0, x1 = min(edges) - margin, max(edges) + margin

    def px(x: float) -> float:
        return 8 + (x - x0) / (x1 - x0) * (WIDTH - 16)

    bottom = row * len(rows) + 6
    out = drawing(title, bottom + BOTTOM)
    for i, (name, mean, span) in enumerate(rows):
        y = i * row + 28
        words = f"{mean:+.4g}" + (f" ({span[0]:+.4g} to {span[1]:+.4g})" if span else "")
        most = int(WIDTH / _CHARACTER)
        add(out, "text", name if len(name) <= most else name[: most - 1] + "…", x=2, y=y - 12)
        add(out, "path", class_="muted switch", d=f"M{px(0):.1f} {y - 7}v{row - 21}")  # none through the names
        group = add(out, "g", class_=colour(0) if span and not span[0] <= 0 <= span[1] else "muted")
        add(group, "title", f"{name}: {words}")
        if span:
            a, b = (px(edge) for edge in span)
            add(group, "path", class_="line", d=f"M{a:.1f} {y - 4}v8M{a:.1f} {y}H{b:.1f}M{b:.1f} {y - 4}v8")
        add(group, "circle", cx=px(mean), cy=y, r=3.6, fill="currentColor")
    add(out, "path", class_="axis", d=f"M8 {bottom}H{WIDTH - 8}")
    _x_ticks(out, ticks(x0, x1, 6), px, bottom + 16, plain)
    _label(out, WIDTH / 2, bottom + 34, x_label)
    return out


# -- a file of its own ------------------------------------------------------------------------------------------------


def sheet(title: str, entries: Sequence[tuple[str, int]], panels: Sequence[tuple[str, Element]]) -> str:
    """Charts in two columns under a title and a legend, as an SVG file.

    Parameters
    ----------
    entries : sequence of (name, colour)
        Of the legend.
    panels : sequence of (heading, chart)

    Returns
    -------
    str
        The file's text: its own style, on white.
    """
    gap, heading = 24, 22
    width, y = 2 * WIDTH + 3 * gap, 32.0
    out = Element("svg", {"xmlns": "http://www.w3.org/2000/svg", "role": "img", "aria-label": title})
    add(out, "style", STYLE.read_text(encoding="utf-8"))
    paper = add(out, "rect", width="100%", height="100%", fill="#fff")
    add(out, "text", title, x=gap, y=y, class_="heading")
    x, y = float(gap), y + 24
    for name, index in entries:
        size = 20 + _CHARACTER * len(name)
        if x > gap and x + size > width - gap:
            x, y = float(gap), y + 18
        add(out, "rect", class_=colour(index), x=x, y=y - 9, width=10, height=10, rx=3, fill="currentColor")
        add(out, "text", name, x=x + 15, y=y)
        x += size + 16
    y += 16
    for begin in range(0, len(panels), 2):
        row = panels[begin : begin + 2]
        heights = [float(chart.get("viewBox", "").split()[3]) for _, chart in row]
        for i, ((name, chart), height) in enumerate(zip(row, heights, strict=True)):
            at = gap + i * (WIDTH + gap)
            add(out, "text", name, x=at, y=y + 14, class_="name")
            chart.attrib.update({"x": f"{at}", "y": f"{y + heading:g}", "width": f"{WIDTH}", "height": f"{height:g}"})
            out.append(chart)
        y += heading + max(heights) + gap
    paper.set("height", f"{y:g}")
    out.attrib.update({"viewBox": f"0 0 {width} {y:g}", "width": f"{width}", "height": f"{y:g}"})
    return markup(out) + "\n"
