"""The picture of docs/fp8.md: a code, tiles and blocks, the sum.

python bench/fp8_figure.py [--out docs/figures/fp8.svg]
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

TEXT, QUIET, LINE, BLUE, RED, PAPER = "#1d2330", "#5b6475", "#c9cfda", "#3563c9", "#b3391f", "#f4f6fa"
WIDTH, HEIGHT = 760, 800


def text(
    x: float, y: float, words: str, *, size: int = 12, color: str = TEXT, anchor: str = "start", bold: bool = False
) -> str:
    """A line of text; y is its base line."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}"{weight}>{words}</text>'


def box(
    x: float, y: float, width: float, height: float, *, fill: str = PAPER, line: str = LINE, wide: float = 1
) -> str:
    """A rectangle."""
    place = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}"'
    return f'<rect {place} fill="{fill}" stroke="{line}" stroke-width="{wide:g}"/>'


def stroke(x: float, y: float, to_x: float, to_y: float, *, color: str = LINE, arrow: bool = False) -> str:
    """A line, with an arrow at its end or without."""
    end = ' marker-end="url(#arrow)"' if arrow else ""
    return f'<line x1="{x:g}" y1="{y:g}" x2="{to_x:g}" y2="{to_y:g}" stroke="{color}"{end}/>'


def draw_code(top: float) -> list[str]:
    """The eight bits of 3.25, and where the codes up to 8 lie."""
    parts = [text(24, top, "1. A code is one byte: E4M3", size=15, bold=True)]
    fields = (("0", RED, "sign"), ("1000", BLUE, "exponent: 8 − 7 = 1"), ("101", TEXT, "fraction: 5/8"))
    x = 24.0
    for bits, color, name in fields:
        for bit in bits:
            parts += [
                box(x, top + 16, 26, 26, fill="#ffffff", line=color),
                text(x + 13, top + 34, bit, size=14, anchor="middle"),
            ]
            x += 26
        middle = x - 13 * len(bits)
        parts.append(text(middle, top + 58, name, size=11, color=color, anchor="middle"))
        x += 34
    parts.append(text(x + 12, top + 34, "= + (1 + 5/8) · 2¹ = 3.25", size=14))
    parts.append(text(x + 12, top + 56, "largest 448, least 2⁻⁹; 0x7F and 0xFF are NaN", size=12, color=QUIET))
    codes = torch.arange(0x7F, dtype=torch.uint8).view(torch.float8_e4m3fn).float().tolist()
    left, scale, base = 40.0, 84.0, top + 116
    parts.append(stroke(left, base, left + 8.15 * scale, base, color=TEXT))
    for value in (value for value in codes if value <= 8):
        whole = value in (0, 1, 2, 4, 8)
        parts.append(stroke(left + value * scale, base, left + value * scale, base - (16 if whole else 8), color=BLUE))
        if whole:
            parts.append(text(left + value * scale, base + 18, f"{value:g}", anchor="middle"))
    at = left + 3.25 * scale
    parts += [
        stroke(at, base - 30, at, base - 10, color=RED, arrow=True),
        text(at, base - 34, "3.25", color=RED, anchor="middle"),
    ]
    words = (
        "The codes from 0 to 8. Between neighbouring powers of two there are always 8 steps, so rounding moves a value"
    )
    parts.append(text(24, base + 42, words, color=QUIET))
    parts.append(
        text(
            24,
            base + 58,
            "by at most 1/16 of itself, about 2% on average, as long as it is not among the smallest.",
            color=QUIET,
        )
    )
    return parts


def draw_blocks(top: float) -> list[str]:
    """Activations in tiles, weights in blocks, one result of their product."""
    parts = [text(24, top, "2. Codes share scales: value = code · scale", size=15, bold=True)]
    size, rows, deep, across = 62.0, 10, 3, 2
    y, x = top + 66, 40.0
    for row in range(rows):
        for tile in range(deep):
            chosen = row == 4
            fill, line = ("#dbe5fa", BLUE) if chosen else (PAPER, LINE)
            parts.append(box(x + tile * size, y + row * 14, size - 2, 12, fill=fill, line=line))
    parts += [
        text(x + deep * size / 2, y - 26, "activations", anchor="middle", bold=True),
        text(
            x + deep * size / 2, y - 10, "a scale for each token and 128 inputs", size=11, color=QUIET, anchor="middle"
        ),
        text(x - 6, y + 4 * 14 + 10, "token", size=11, color=BLUE, anchor="end"),
        text(x + deep * size + 22, y + 78, "×", size=20, anchor="middle"),
    ]
    x += deep * size + 46
    for row in range(deep):
        for column in range(across):
            fill, line = ("#dbe5fa", BLUE) if column == 0 else (PAPER, LINE)
            parts.append(box(x + column * size, y + row * size, size - 2, size - 2, fill=fill, line=line))
        parts.append(box(x + 26, y + row * size, 5, size - 2, fill=BLUE, line=BLUE))
    parts += [
        text(x + across * size / 2, y - 26, "weights", anchor="middle", bold=True),
        text(x + across * size / 2, y - 10, "a scale for each 128 × 128", size=11, color=QUIET, anchor="middle"),
        text(x + across * size + 12, y + 78, "=", size=20, anchor="middle"),
    ]
    x += across * size + 34
    parts += [
        box(x, y, across * size - 2, rows * 14 - 2),
        box(x + 26, y + 4 * 14, 5, 12, fill=RED, line=RED),
        text(x + across * size / 2, y - 26, "result", anchor="middle", bold=True),
        text(x + across * size / 2, y - 10, "bf16 or fp32", size=11, color=QUIET, anchor="middle"),
    ]
    x += across * size + 16
    told = "One number of the result|is a row times a column.|Along them, every 128|inputs have one scale on|"
    told += "each side, so the scales|are multiplied once for|128 products."
    for number, words in enumerate(told.split("|")):
        parts.append(text(x, y + 18 + number * 18, words, color=TEXT if number < 2 else QUIET))
    return parts


def draw_sum(top: float) -> list[str]:
    """Stretches of 128 products, each summed in few bits, scaled, and added in fp32."""
    parts = [text(24, top, "3. The sum stops every 128 products", size=15, bold=True)]
    y, size, gap = top + 24, 51.0, 24.0
    for stretch in range(3):
        x = 24 + stretch * (4 * size + gap)
        for step in range(4):
            parts.append(box(x + step * size, y, size - 3, 30, fill="#dbe5fa", line=BLUE))
            parts.append(text(x + step * size + size / 2 - 1, y + 19, "+ 32", anchor="middle"))
        middle = x + 2 * size - 1
        parts += [
            stroke(middle, y + 34, middle, y + 54, color=TEXT, arrow=True),
            box(middle - 88, y + 60, 176, 26, fill="#ffffff", line=BLUE),
            text(middle, y + 77, "14 bits, starts at 0", anchor="middle"),
            stroke(middle, y + 90, middle, y + 128, color=TEXT, arrow=True),
            text(middle + 10, y + 112, "· scale · scale", size=11, color=QUIET),
        ]
    parts += [
        box(24, y + 134, 3 * (4 * size + gap) - gap - 3, 28, fill="#fbe9e5", line=RED),
        text(24 + (3 * (4 * size + gap) - gap) / 2, y + 153, "sum in fp32, 24 bits", anchor="middle"),
        text(
            24,
            y + 188,
            "Hopper's tensor cores add 32 products at a time and keep 13 bits behind the point. The larger the sum",
            color=QUIET,
        ),
        text(
            24,
            y + 204,
            "is, the more of each new product is cut off. DeepSeek-V3 therefore moves it to fp32 every 128 products.",
            color=QUIET,
        ),
    ]
    return parts


def draw() -> str:
    """The whole picture as SVG."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="system-ui, sans-serif">'
    )
    marker = (
        '<defs><marker id="arrow" viewBox="0 0 8 8" refX="6" refY="4" markerWidth="8" markerHeight="8" orient="auto">'
        f'<path d="M0 0 8 4 0 8z" fill="{TEXT}"/></marker></defs>'
    )
    paper = f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#ffffff"/>'
    return "\n".join([head, marker, paper, *draw_code(36), *draw_blocks(256), *draw_sum(560), "</svg>"]) + "\n"


def main() -> None:
    """Write the picture."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent.parent / "docs" / "figures" / "fp8.svg")
    options = parser.parse_args()
    options.out.write_text(draw(), "utf-8")


if __name__ == "__main__":
    main()
