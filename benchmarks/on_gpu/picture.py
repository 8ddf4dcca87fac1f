"""Draw tokens a second as SVG, without any package: bars by case, lines over growing lengths."""

import math
import re
import textwrap
from collections.abc import Sequence
from html import escape
from pathlib import Path

from on_gpu.report import MEASURED, WRONG
from on_gpu.runner import Row

OURS, OTHERS, GREY = "#1f6fb4", "#e08214", "#666"
LINES = (OURS, "#7fb3dd", OTHERS, "#35793b", "#8fc294", "#a3423c")
WIDTH, LABEL, BAR, ROW = 900, 300, 480, 22
CHART = 260  # height of the lines


def write(path: Path, rows: Sequence[Row], about: str) -> None:
    """Draw the rows that were measured; no file if there are none."""
    shown = [row for row in rows if row.status in (MEASURED, WRONG) and row.values]
    bars = [row for row in shown if not _length(row.name)]
    lines = textwrap.wrap(about, 170)
    parts, height = _bars(bars, 30 + 11 * len(lines))
    drawn, height = _lines([row for row in shown if _length(row.name)], height)
    if not shown:
        return
    head = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height + 10}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{height + 10}" fill="white"/>',
        _text(10, 20, "tokens a second, peak memory", bold=True),
        *(_text(10, 34 + 11 * n, line, colour=GREY, size=9) for n, line in enumerate(lines)),
    ]
    path.write_text("\n".join([*head, *parts, *drawn, "</svg>"]) + "\n")


def _bars(rows: Sequence[Row], top: int) -> tuple[list[str], int]:
    """Return bars, each as a share of the fastest of its model's size, and where they end."""
    most: dict[str, float] = {}
    for row in rows:
        size = row.name.split()[0]
        most[size] = max(most.get(size, 0.0), row.values["tokens/s"])
    parts = []
    for row in rows:
        speed = row.values["tokens/s"]
        width = BAR * speed / (most[row.name.split()[0]] or 1.0)
        colour = OTHERS if row.name.endswith(("TRL", "LitGPT")) else OURS
        parts += [
            _text(LABEL - 8, top + 15, row.name, anchor="end"),
            f'<rect x="{LABEL}" y="{top + 3}" width="{width:.1f}" height="{ROW - 6}" '
            f'fill="{colour}"/>',
            _text(LABEL + width + 6, top + 15, f"{speed:,.0f}, {row.values['memory, GB']} GB"),
        ]
        top += ROW
    return parts, top


def _lines(rows: Sequence[Row], top: int) -> tuple[list[str], int]:
    """Return a line for each series of growing length, and where they end."""
    series: dict[str, list[tuple[int, float]]] = {}
    for row in rows:
        name = re.sub(r", [\d,]+ tokens", "", row.name)
        series.setdefault(name, []).append((_length(row.name), row.values["tokens/s"]))
    if not series:
        return [], top
    lengths = sorted({length for points in series.values() for length, _ in points})
    most = max(speed for points in series.values() for _, speed in points) or 1.0
    low, high = math.log2(lengths[0]), math.log2(lengths[-1])
    bottom = top + 20 + CHART

    def at(length: int, speed: float) -> tuple[float, float]:
        share = (math.log2(length) - low) / ((high - low) or 1.0)
        return LABEL + BAR * share, bottom - CHART * speed / most

    parts = [
        f'<path d="M{LABEL} {bottom - CHART} V{bottom} H{LABEL + BAR}" fill="none" '
        f'stroke="{GREY}"/>',
        _text(LABEL - 8, bottom - CHART + 4, f"{most:,.0f}", anchor="end"),
    ]
    parts += [_text(at(n, 0)[0], bottom + 16, f"{n:,}", anchor="middle") for n in lengths]
    for number, (name, points) in enumerate(series.items()):
        colour = LINES[number % len(LINES)]
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in (at(*point) for point in sorted(points)))
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(_text(10, bottom - CHART + 20 + ROW * number, name, colour=colour))
    return parts, bottom + 24


def _length(name: str) -> int:
    found = re.search(r", ([\d,]+) tokens", name)
    return int(found[1].replace(",", "")) if found else 0


def _text(
    x: float, y: float, text: str, *, anchor: str = "start", colour: str = "black", size: int = 12,
    bold: bool = False,
) -> str:  # fmt: skip
    weight = ' font-weight="bold"' if bold else ""
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" fill="{colour}" '
        f'font-size="{size}"{weight}>{escape(text)}</text>'
    )
