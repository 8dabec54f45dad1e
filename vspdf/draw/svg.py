"""Charts as inline SVG, masks and maps as tiny PNGs: what a report draws with, so that it needs no plotting library.

Colours are CSS classes `c0` to `c7` of the page (they set `color`), so that one picture serves light and dark.
"""

from __future__ import annotations

import base64
import math
import struct
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

import numpy as np

from vspdf.draw.words import plain

COLOURS = 8
WIDTH, HEIGHT = 360, 250  # of the drawing; the page scales it, so text stays readable at 320 pixels
LEFT, RIGHT, TOP, BOTTOM = 44, 12, 12, 40
_CHARACTER = 6.2  # width of one in a label, roughly


@dataclass(frozen=True)
class Series:
    """One curve. `faint`: thin and pale, e.g. noisy training loss; `dots` carry the points' values as tooltips."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int
    faint: bool = False
    dots: bool = False
    steps: bool = False  # a histogram's outline: y[i] holds from x[i] to x[i + 1]


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
    """CSS class of a colour."""
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


def line_chart(
    series: Sequence[Series],
    bands: Sequence[Band] = (),
    *,
    title: str,
    x_label: str,
    y_label: str,
    y_limits: tuple[float, float],
    x_format: Callable[[float], str] = plain,
) -> str:
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
    str
        An ``<svg>`` element.
    """
    xs = [x for s in series for x in s.x] + [edge for b in bands for edge in (b.start, b.end)] or [0.0]
    x0, x1 = min(xs), max(xs)
    x1 = x1 if x1 > x0 else x0 + 1
    y0, y1 = y_limits
    margin = (y1 - y0) * 0.05 or 0.5
    y0, y1 = y0 and y0 - margin, y1 + margin  # bars and shares stand on zero

    def px(x: float) -> float:
        return LEFT + (x - x0) / (x1 - x0) * (WIDTH - LEFT - RIGHT)

    def py(y: float) -> float:
        return HEIGHT - BOTTOM - (y - y0) / (y1 - y0) * (HEIGHT - TOP - BOTTOM)

    bottom = HEIGHT - BOTTOM
    out = [_opening(title, HEIGHT)]
    for band in bands:
        a, b = px(band.start), px(band.end)
        full = band.row is None
        kind, opacity = ("band", 0.17 * band.shade) if full else (colour(band.colour), 0.75 * band.shade)
        top, height = (TOP, bottom - TOP) if full else (bottom - 7 * (band.row or 0) - 7, 6)
        out.append(
            f'<rect class="{kind}" x="{a:.1f}" y="{top}" width="{max(0, b - a):.1f}" height="{height}" '
            f'fill="currentColor" fill-opacity="{opacity + 0.02:.3f}"><title>{escape(band.name)}</title></rect>'
        )
        if band.start > x0:
            out.append(f'<path class="{kind} switch" d="M{a:.1f} {TOP}V{bottom}"/>')
        if full and len(band.name) * _CHARACTER < b - a:
            out.append(f'<text class="muted" x="{(a + b) / 2:.1f}" y="{TOP + 13}" {_MIDDLE}>{escape(band.name)}</text>')
    for y in ticks(y0, y1):
        out.append(f'<path class="grid" d="M{LEFT} {py(y):.1f}H{WIDTH - RIGHT}"/>')
        out.append(f'<text class="muted" x="{LEFT - 5}" y="{py(y) + 4:.1f}" text-anchor="end">{plain(y)}</text>')
    for x in ticks(x0, x1, 6):
        anchor = 'text-anchor="end"' if px(x) > WIDTH - 24 else _MIDDLE
        out.append(f'<text class="muted" x="{px(x):.1f}" y="{bottom + 16}" {anchor}>{escape(x_format(x))}</text>')
    out.append(f'<path class="axis" d="M{LEFT} {bottom}H{WIDTH - RIGHT}"/>')
    out.append(
        f'<text class="muted" x="{(LEFT + WIDTH - RIGHT) / 2}" y="{HEIGHT - 6}" {_MIDDLE}>{escape(x_label)}</text>'
    )
    turned = f'transform="translate(11 {(TOP + bottom) / 2}) rotate(-90)"'
    out.append(f'<text class="muted" {turned} {_MIDDLE}>{escape(y_label)}</text>')
    x, width = LEFT - 4, WIDTH - LEFT - RIGHT + 8  # room for dots on the edge
    box = f'x="{x}" y="{TOP}" width="{width}" height="{bottom - TOP}"'
    out.append(f'<svg {box} viewBox="{x} {TOP} {width} {bottom - TOP}">')  # clips what is inside
    for s in series:
        points = [(px(x), py(y)) for x, y in zip(s.x, s.y, strict=True)]
        if not points:
            continue
        form = "H{0:.1f}V{1:.1f}" if s.steps else "L{0:.1f} {1:.1f}"
        path = f"M{points[0][0]:.1f} {points[0][1]:.1f}" + "".join(form.format(*p) for p in points[1:])
        out.append(f'<path class="{colour(s.colour)} {"faint" if s.faint else "line"}" d="{path}"/>')
        if s.dots:
            out.extend(
                f'<circle class="{colour(s.colour)}" cx="{a:.1f}" cy="{b:.1f}" r="2.6" fill="currentColor">'
                f"<title>{escape(f'{s.name}: {y:.4f} at {x_format(x)}')}</title></circle>"
                for (a, b), x, y in zip(points, s.x, s.y, strict=True)
            )
    return "".join(out) + "</svg></svg>"


def bar_chart(bars: Sequence[Bar], *, title: str) -> str:
    """Horizontal bars, each with its name above and its figure at the right; a `span` is drawn as a whisker.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    row = 42
    longest = max((max(sum(v for _, v, _ in bar.parts), *(bar.span or (0,))) for bar in bars), default=0) or 1
    scale = (WIDTH - 4) / longest
    out = [_opening(title, row * len(bars))]
    for i, bar in enumerate(bars):
        y, x = i * row, 2.0
        out.append(f'<text x="2" y="{y + 13}">{escape(bar.name)}</text>')
        out.append(f'<text x="{WIDTH - 2}" y="{y + 13}" text-anchor="end">{escape(bar.figure)}</text>')
        for name, value, index in bar.parts:
            width = value * scale
            out.append(
                f'<rect class="{colour(index)}" x="{x:.1f}" y="{y + 19}" width="{width:.1f}" height="14" '
                f'fill="currentColor"><title>{escape(name)}</title></rect>'
            )
            x += width
        if bar.span:
            a, b = (2 + edge * scale for edge in bar.span)
            out.append(f'<path class="whisker" d="M{a:.1f} {y + 22}v8M{a:.1f} {y + 26}H{b:.1f}M{b:.1f} {y + 22}v8"/>')
    return "".join(out) + "</svg>"


def interval_chart(rows: Sequence[tuple[str, float, tuple[float, float] | None]], *, title: str, x_label: str) -> str:
    """Means with their intervals about a line at zero, a row each.

    Parameters
    ----------
    rows : sequence of (name, mean, interval)
        An interval that does not hold zero is drawn in the first colour, others are muted.

    Returns
    -------
    str
        An ``<svg>`` element.
    """
    row, edges = 40, [0.0]
    for _, mean, span in rows:
        edges.extend((mean, *(span or ())))
    margin = (max(edges) - min(edges)) * 0.06 or 0.5
    x0, x1 = min(edges) - margin, max(edges) + margin

    def px(x: float) -> float:
        return 8 + (x - x0) / (x1 - x0) * (WIDTH - 16)

    bottom = row * len(rows) + 6
    out = [_opening(title, bottom + BOTTOM), f'<path class="muted switch" d="M{px(0):.1f} 0V{bottom}"/>']
    for i, (name, mean, span) in enumerate(rows):
        y = i * row + 28
        tone = colour(0) if span and not span[0] <= 0 <= span[1] else "muted"
        words = f"{mean:+.4f}" + (f" ({span[0]:+.4f} to {span[1]:+.4f})" if span else "")
        out.append(f'<text x="2" y="{y - 12}">{escape(name)}</text>')
        out.append(f'<g class="{tone}"><title>{escape(f"{name}: {words}")}</title>')
        if span:
            a, b = (px(edge) for edge in span)
            out.append(f'<path class="line" d="M{a:.1f} {y - 4}v8M{a:.1f} {y}H{b:.1f}M{b:.1f} {y - 4}v8"/>')
        out.append(f'<circle cx="{px(mean):.1f}" cy="{y}" r="3.6" fill="currentColor"/></g>')
    out.append(f'<path class="axis" d="M8 {bottom}H{WIDTH - 8}"/>')
    for x in ticks(x0, x1, 4):
        out.append(f'<text class="muted" x="{px(x):.1f}" y="{bottom + 16}" {_MIDDLE}>{plain(x)}</text>')
    out.append(f'<text class="muted" x="{WIDTH / 2}" y="{bottom + 34}" {_MIDDLE}>{escape(x_label)}</text>')
    return "".join(out) + "</svg>"


def legend(entries: Sequence[tuple[str, int]]) -> str:
    """Coloured names, as HTML that wraps."""
    items = (f'<span class="key"><i class="{colour(index)}"></i>{escape(name)}</span>' for name, index in entries)
    return f'<p class="legend">{"".join(items)}</p>'


def mask_png(mask: np.ndarray, rgb: tuple[int, int, int]) -> str:
    """A boolean matrix as a ``data:`` URI of a PNG: `rgb` where true, transparent elsewhere; one bit a pixel."""
    rows, columns = mask.shape
    packed = np.packbits(mask, axis=1)  # PNG has the first pixel in the highest bit
    palette = ((b"PLTE", bytes((0, 0, 0, *rgb))), (b"tRNS", bytes((0, 255))))
    return _png(columns, rows, depth=1, kind=3, lines=packed, before=palette)


def rgba_png(pixels: np.ndarray) -> str:
    """Colours uint8 [row, column, (red, green, blue, alpha)] as a ``data:`` URI of a PNG."""
    rows, columns, _ = pixels.shape
    return _png(columns, rows, depth=8, kind=6, lines=pixels)


def _png(
    columns: int, rows: int, *, depth: int, kind: int, lines: np.ndarray, before: Sequence[tuple[bytes, bytes]] = ()
) -> str:
    content = b"".join(b"\0" + line.tobytes() for line in lines)
    chunks = (
        (b"IHDR", struct.pack(">IIBBBBB", columns, rows, depth, kind, 0, 0, 0)),
        *before,
        (b"IDAT", zlib.compress(content, 9)),
        (b"IEND", b""),
    )
    body = b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )
    return "data:image/png;base64," + base64.b64encode(body).decode()


_MIDDLE = 'text-anchor="middle"'


def _opening(title: str, height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">'
