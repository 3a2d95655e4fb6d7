"""Figures as SVG for papers and slides: lines and heat maps, on white, with axis titles. Nothing else is needed.

Colours are those of the page in daylight (assets/report.css).
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby
from typing import Any
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from moestro.report.tiles import format_count

WIDTH, HEIGHT = 760, 400
LEFT, RIGHT, TOP, BOTTOM = 72, 16, 36, 56  # margins of the plane
LEGEND_ROW, MOST_NAMED = 18, 24  # more lines, such as those of all experts, have no legend
INK, MUTED, FAINT, RULE = "#1d1f23", "#6a6d75", "#b4b4b2", "#e8e6e0"
COLORS = ("#1f6fb4", "#cc5a16", "#1b8a66", "#b05a94", "#b58900", "#47a3d6", "#7a6a58", "#5a4fb0")
LOW, MIDDLE, HIGH = (18, 80, 143), (243, 240, 232), (180, 80, 12)
SHADES = 16  # on either side of the middle of a heat map's scale

Record = dict[str, Any]
Point = tuple[float, float]


def draw_lines(chart: Record) -> str:
    """A chart of `report/lines.py`: its lines over tokens, or over what its `x` says."""
    lines, percent = chart["lines"], chart.get("percent", False)
    xs = _finite(value for line in lines for value in line["x"])
    ys = _finite(value for line in lines for key in ("y", "low", "high") for value in line.get(key, ()))
    (x_low, x_high), (y_low, y_high) = (min(xs), max(xs)), _range(ys)
    named = lines if len(lines) <= MOST_NAMED else []
    height = HEIGHT + LEGEND_ROW * math.ceil(len(named) / 3)

    def at(x: float, y: float) -> Point:
        across, down = (x - x_low) / ((x_high - x_low) or 1), (y_high - y) / (y_high - y_low)
        return LEFT + across * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    parts = [_text(LEFT, 22, chart["title"], size=15, weight=600)]
    for value in ticks(y_low, y_high, 6):
        y = at(x_low, value)[1]
        parts.append(f'<path d="M{LEFT} {y:.1f}H{WIDTH - RIGHT}" stroke="{RULE}"/>')
        parts.append(_text(LEFT - 8, y + 4, format_tick(value, percent=percent), anchor="end", fill=MUTED))
    for value in ticks(x_low, x_high, 7):
        parts.append(_text(at(value, y_low)[0], HEIGHT - BOTTOM + 18, format_tick(value), anchor="middle", fill=MUTED))
    parts += _axis_titles(chart.get("x", "tokens trained"), chart["unit"], HEIGHT - 16)
    for line in lines:
        parts += _draw_line(line, at)
    for index, line in enumerate(named):
        x, y = LEFT + index % 3 * 224, HEIGHT + index // 3 * LEGEND_ROW
        parts.append(f'<path d="M{x} {y}h18" stroke="{line_color(line)}" stroke-width="3"/>')
        parts.append(_text(x + 24, y + 4, shorten(line["label"], 28)))
    return _wrap(parts, WIDTH, height)


def draw_map(title: str, rows: Sequence[str], log2: NDArray[np.float64], axes: tuple[str, str]) -> str:
    """A heat map [rows, columns] of log2 ratios, from a quarter to four times the mean; NaN (no token) is black."""
    num_rows, num_columns = log2.shape
    cell, row = (WIDTH - 140 - RIGHT) / num_columns, 14
    bottom = TOP + row * num_rows
    parts = [_text(140, 22, title, size=15, weight=600)]
    for index, name in enumerate(rows):
        parts.append(_text(132, TOP + row * index + 11, shorten(name, 18), anchor="end", fill=MUTED))
    shades = np.rint(np.clip(log2 / 2, -1, 1) * SHADES)
    for shade in [*np.unique(shades[np.isfinite(shades)]).tolist(), math.nan]:
        where = np.argwhere(np.isnan(shades) if math.isnan(shade) else shades == shade).tolist()
        cells = "".join(
            f"M{140 + a * cell:.2f} {TOP + r * row}h{cell - 0.3:.2f}v{row - 1}h-{cell - 0.3:.2f}z" for r, a in where
        )
        parts += [f'<path d="{cells}" fill="{_shade(shade)}"/>'] if cells else []
    for value in ticks(0, num_columns - 1, 12):
        if value == int(value):
            parts.append(_text(140 + (value + 0.5) * cell, bottom + 16, f"{value:g}", anchor="middle", fill=MUTED))
    parts.append(_text((140 + WIDTH) / 2, bottom + 34, axes[0], anchor="middle"))
    parts.append(_text(16, (TOP + bottom) / 2, axes[1], anchor="middle", turn=True))
    for index, (name, shade) in enumerate((("¼ × mean", -16.0), ("mean", 0.0), ("4 × mean", 16.0), ("none", math.nan))):
        x = 140 + index * 110
        parts.append(f'<path d="M{x} {bottom + 46}h12v10h-12z" fill="{_shade(shade)}" stroke="{RULE}"/>')
        parts.append(_text(x + 18, bottom + 55, name, fill=MUTED))
    return _wrap(parts, WIDTH, bottom + 68)


def ticks(low: float, high: float, most: int) -> list[float]:
    """Round numbers from `low` to `high` at equal steps of 1, 2 or 5 times a power of ten, about `most` of them."""
    if not high > low:
        return [low]
    rough = (high - low) / most
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [float(f"{number * step:.12g}") for number in range(first, last + 1)]


def format_tick(value: float, *, percent: bool = False) -> str:
    """A number of an axis: 1.5K, 0.25, 3e−4, 12%."""
    if percent:
        return f"{value * 100:.4g}%"
    if abs(value) >= 1000:
        return re.sub(r"\.?0+(?=[A-Z])", "", count) if "." in (count := format_count(value)) else count
    text = f"{value:.4g}" if value == 0 or abs(value) >= 0.001 else f"{value:.2g}".replace("e-0", "e-")
    return text.replace("-", "−")


def line_color(line: Record) -> str:
    """The colour of a line by its role and number, as on the page."""
    if line["role"] == "cell":
        return INK if line["color"] == 0 else COLORS[(line["color"] - 1) % len(COLORS)]
    plain = {"total": INK, "final": INK, "train": FAINT}
    return plain.get(line["role"]) or COLORS[line["color"] % len(COLORS)]


def shorten(text: str, most: int) -> str:
    """At most so many characters, none of which XML forbids."""
    clean = "".join(character if character.isprintable() else "�" for character in text)
    return clean if len(clean) <= most else clean[: most - 1] + "…"


def _draw_line(line: Record, at: Callable[[float, float], Point]) -> list[str]:
    """Band, strokes between gaps, and dots where there are few points."""
    color, parts = line_color(line), []
    if "low" in line:
        low, high = (_points(line["x"], line[key], at) for key in ("low", "high"))
        area = " ".join(f"{x:.1f},{y:.1f}" for piece in (high, low[::-1]) for x, y in filter(None, piece))
        parts.append(f'<polygon points="{area}" fill="{color}" fill-opacity=".18"/>')
    points = _points(line["x"], line["y"], at)
    for is_gap, piece in groupby(points, key=lambda point: point is None):
        known = [] if is_gap else [point for point in piece if point is not None]
        if len(known) > 1 and not line.get("dots"):
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in known)
            parts.append(f'<polyline points="{path}" fill="none" stroke="{color}" stroke-width="1.75"/>')
    if len(points) < 40:
        parts += [f'<circle cx="{p[0]:.1f}" cy="{p[1]:.1f}" r="2.5" fill="{color}"/>' for p in points if p]
    return parts


def _points(x: Sequence[float], y: Sequence[float | None], at: Callable[[float, float], Point]) -> list[Point | None]:
    return [None if value is None else at(place, value) for place, value in zip(x, y, strict=True)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    room = (high - low) * 0.06 or abs(high) * 0.1 or 1.0
    return (0.0 if 0 <= low < (high - low) * 0.15 else low - room), high + room


def _finite(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None and math.isfinite(value)]


def _axis_titles(x: str, y: str, bottom: float) -> list[str]:
    middle = (TOP + HEIGHT - BOTTOM) / 2
    return [
        _text((LEFT + WIDTH - RIGHT) / 2, bottom, x, anchor="middle"),
        _text(16, middle, y, anchor="middle", turn=True),
    ]


def _shade(shade: float) -> str:
    """The colour of a step of the scale, mixed in sRGB; NaN is no token."""
    if math.isnan(shade):
        return INK
    share, end = abs(shade) / SHADES, LOW if shade < 0 else HIGH
    return "#" + "".join(f"{round(m + (e - m) * share):02x}" for m, e in zip(MIDDLE, end, strict=True))


def _text(
    x: float, y: float, text: str, *, size: int = 12, weight: int = 400, anchor: str = "start", fill: str = INK,
    turn: bool = False,
) -> str:  # fmt: skip
    place = f'transform="translate({x:.1f} {y:.1f}) rotate(-90)"' if turn else f'x="{x:.1f}" y="{y:.1f}"'
    style = f'font-size="{size}" font-weight="{weight}" text-anchor="{anchor}" fill="{fill}"'
    return f"<text {place} {style}>{escape(shorten(text, 80))}</text>"


def _wrap(parts: Sequence[str], width: int, height: float) -> str:
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height:g}" viewBox="0 0 {width} {height:g}"'
    )
    body = "".join(parts)
    return (
        f'{head} font-family="system-ui, sans-serif"><path d="M0 0h{width}v{height:g}H0z" fill="#fff"/>{body}</svg>\n'
    )
