"""One self-contained HTML page: styles, tables, plots as inline SVG, a script of its own.

The page asks no network for anything, which its content security policy enforces, follows the
reader's light or dark mode, and fits a narrow screen.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from finetune import console, failures, files
from finetune.errors import UserError

# Begins every page: `write` replaces no other file.
MARK = '<!doctype html>\n<html lang="en"><head><meta name="generator" content="finetune">'
POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
# What JSON leaves as it is and a page must not hold; "<" could end a script before its time.
ESCAPED = {
    code: f"\\u{code:04x}" for code in (ord("<"), *range(0x7F, 0xA0), *range(0xD800, 0xE000))
}

STYLE = """
:root { color-scheme: light dark; --ink: #1c1c1e; --paper: #fff; --soft: #6b6b70; --line: #d8d8dc;
  --panel: #f5f5f7; --good: #0a6b2d; --goodback: #d9f5e1; --bad: #b3261e; --badback: #fbe3e1;
  --special: #8a2be2; --plot: #3b6fd4; --plot2: #d4873b; --plot3: #2a9d8f; --plot4: #b5468f; }
@media (prefers-color-scheme: dark) { :root { --ink: #e8e8ea; --paper: #161618; --soft: #9a9aa0;
  --line: #3a3a3e; --panel: #212124; --good: #7fe0a0; --goodback: #12361f; --bad: #ff9a92;
  --badback: #45191a; --special: #c79bff; --plot: #7ea6f5; --plot2: #f0b070; --plot3: #5fd0c2;
  --plot4: #e58cc4; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 75rem; padding: 1rem; color: var(--ink);
  background: var(--paper); font: 16px/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; } h2 { font-size: 1.2rem; margin-top: 2rem; }
small, .soft { color: var(--soft); }
code, pre { font: 0.9rem/1.5 ui-monospace, monospace; }
pre { white-space: pre-wrap; margin: 0.3rem 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; margin: 0.8rem 0; overflow-wrap: break-word; }
th, td { padding: 0.2rem 0.8rem 0.2rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }
td.number, th.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { max-width: 100%; height: auto; } svg text { fill: var(--soft); font-size: 12px; }
svg .bar { fill: var(--plot); } svg .other { fill: var(--plot2); }
svg .mark { stroke: var(--bad); stroke-dasharray: 4 3; } svg .axis { stroke: var(--line); }
input, select, button { font: inherit; color: inherit; background: var(--panel);
  border: 1px solid var(--line); border-radius: 4px; padding: 0.3rem 0.5rem; max-width: 100%; }
"""


def page(title: str, body: str, style: str = "", script: str = "", policy: str = POLICY) -> str:
    """Return a whole page. `body`, `style` and `script` are used as they are."""
    parts = [
        MARK,
        f'<meta charset="utf-8"><meta http-equiv="Content-Security-Policy" content="{policy}">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f'<link rel="icon" href="data:,"><title>{text(title)}</title>',
        f"<style>{STYLE}{style}</style></head><body>",
        f"<h1>{text(title)}</h1>",
        body,
        f"<script>{script}</script>" if script else "",
        "</body></html>\n",
    ]
    return "\n".join(parts)


def text(content: object) -> str:
    """Return text as HTML shows it, with symbols in place of control characters."""
    return escape(plain(str(content)))


def plain(content: str) -> str:
    """Return text as a page and a terminal show it: HTML forbids control characters."""
    return console.visible(content)


def data(values: Any) -> str:
    """Return values as JSON that a script on a page may hold."""
    return json.dumps(values, ensure_ascii=False, separators=(",", ":")).translate(ESCAPED)


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return a table; numbers are right-aligned, and columns of numbers with them."""
    listed = [list(row) for row in rows]
    numeric = [
        all(isinstance(row[n], int | float) for row in listed) and bool(listed)
        for n in range(len(head))
    ]

    def cell(tag: str, number: int, value: object) -> str:
        shown = f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else value
        shown = f"{value:,.4g}" if isinstance(value, float) else shown
        return f"<{tag}{' class=number' if numeric[number] else ''}>{text(shown)}</{tag}>"

    lines = ["".join(cell("th", n, name) for n, name in enumerate(head))]
    lines += ["".join(cell("td", n, value) for n, value in enumerate(row)) for row in listed]
    return f'<div class="wide"><table>{"".join(f"<tr>{line}</tr>" for line in lines)}</table></div>'


def histogram(
    values: Sequence[float],
    label: str,
    marks: Mapping[str, float] | None = None,
    num_bins: int = 40,
    size: tuple[int, int] = (640, 180),
) -> str:
    """Return a plot of how often values occur. `marks`: dashed lines, by name.

    The last bin holds everything over the 99.5th percentile, so that one outlier does not squeeze
    the others into a single bin.
    """
    ordered, marks = sorted(values), marks or {}
    if not ordered:
        return f"<p class=soft>{text(label)}: no values</p>"
    high = ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))]
    low, high = min(ordered[0], *marks.values(), high), max(high, *marks.values(), ordered[0])
    step = (high - low) / num_bins or 1.0
    if all(isinstance(value, int) for value in ordered):  # bins of whole numbers
        step = math.ceil((high - low + 1) / num_bins)
    counts = Counter(int((min(max(value, low), high) - low) / step) for value in ordered)
    num_bins = max(counts) + 1
    width, height = size
    bottom, tallest, wide = height - 20, max(counts.values()), width / num_bins
    parts = []
    for number, count in sorted(counts.items()):
        tall = count / tallest * (bottom - 20)
        begin, end = low + number * step, low + (number + 1) * step
        what = f"{begin:,.4g} to {end:,.4g}: {count:,}"
        parts.append(
            f'<rect class="bar" x="{number * wide:.1f}" y="{bottom - tall:.1f}" '
            f'width="{max(1, wide - 1):.1f}" height="{tall:.1f}"><title>{text(what)}</title></rect>'
        )
    for name, value in marks.items():
        at = min(width, (value - low) / (step * num_bins) * width)
        anchor = "end" if at > width / 2 else "start"
        parts.append(
            f'<line class="mark" x1="{at:.1f}" x2="{at:.1f}" y1="14" y2="{bottom}"/>'
            f'<text x="{at:.1f}" y="11" text-anchor="{anchor}">{text(name)} {value:,.4g}</text>'
        )
    parts.append(f'<line class="axis" x1="0" x2="{width}" y1="{bottom}" y2="{bottom}"/>')
    parts.append(f'<text x="0" y="{height - 5}">{low:,.4g}</text>')
    parts.append(
        f'<text x="{width / 2}" y="{height - 5}" text-anchor="middle">{text(label)}</text>'
    )
    parts.append(f'<text x="{width}" y="{height - 5}" text-anchor="end">{high:,.4g}</text>')
    return _svg(width, height, label, parts)


def bars(counts: Mapping[str, float], label: str, width: int = 640) -> str:
    """Return one horizontal bar for each name."""
    if not counts:
        return f"<p class=soft>{text(label)}: none</p>"
    most, parts = max(counts.values()) or 1, []
    for number, (name, count) in enumerate(counts.items()):
        y = 22 * number
        shown = name if len(name) <= 28 else name[:27] + "…"
        long = count / most * (width - 320)
        parts.append(
            f'<text x="0" y="{y + 14}">{text(shown)}<title>{text(name)}</title></text>'
            f'<rect class="bar" x="220" y="{y + 3}" width="{long:.1f}" height="14"/>'
            f'<text x="{226 + long:.1f}" y="{y + 14}">{count:,.6g}</text>'
        )
    return _svg(width, 22 * len(counts) + 4, label, parts)


COLOURS = ("var(--plot)", "var(--plot2)", "var(--plot3)", "var(--plot4)")
Points = Sequence[tuple[float, float]]


def legend(names: Iterable[str]) -> str:
    """Return the names of series, each with its colour in `lines` and `distributions`."""
    entries = (
        f'<span style="white-space:nowrap"><span style="color:{COLOURS[n % len(COLOURS)]}">'
        f"&#9632;</span> {text(name)}</span>"
        for n, name in enumerate(names)
    )
    return f'<p class="soft legend">{" &nbsp; ".join(entries)}</p>'


def lines(series: Mapping[str, Points], label: str, size: tuple[int, int] = (420, 210)) -> str:
    """Return a plot of a line for each name, with the ends of both axes; a lone point is a dot."""
    points = [point for each in series.values() for point in each]
    if not points:
        return f"<p class=soft>{text(label)}: no values</p>"
    (x_low, x_high), (y_low, y_high) = ((min(axis), max(axis)) for axis in zip(*points))
    width, height = size
    left, top, bottom = 6, 26, height - 22
    across = (width - 2 * left) / ((x_high - x_low) or 1)
    up = (bottom - top) / ((y_high - y_low) or 1)
    parts = [
        f'<text x="0" y="12">{text(label)}</text>',
        f'<line class="axis" x1="0" x2="{width}" y1="{bottom}" y2="{bottom}"/>',
        f'<text x="{width}" y="12" text-anchor="end">{y_low:,.4g} to {y_high:,.4g}</text>',
        f'<text x="0" y="{height - 6}">{x_low:,.6g}</text>',
        f'<text x="{width}" y="{height - 6}" text-anchor="end">{x_high:,.6g}</text>',
    ]
    for number, (name, given) in enumerate(series.items()):
        places = [(left + (x - x_low) * across, bottom - (y - y_low) * up) for x, y in given]
        colour = COLOURS[number % len(COLOURS)]
        if len(places) < 2:
            parts += [
                f'<circle cx="{x:.1f}" cy="{y:.1f}" r="3" fill="{colour}"/>' for x, y in places
            ]
            continue
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        parts.append(
            f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6">'
            f"<title>{text(name)}</title></polyline>"
        )
    return _svg(width, height, label, parts)


def distributions(
    values: Mapping[str, Sequence[float]], label: str, num_bins: int = 16,
    size: tuple[int, int] = (420, 190),
) -> str:  # fmt: skip
    """Return how often values of several series occur, as shares of each, in the same bins.

    The last bin holds everything over the 99.5th percentile.
    """
    ordered = sorted(value for each in values.values() for value in each)
    if not ordered:
        return f"<p class=soft>{text(label)}: no values</p>"
    low, high = ordered[0], ordered[min(len(ordered) - 1, math.ceil(0.995 * len(ordered)))]
    step = (high - low) / num_bins or 1.0
    if all(float(value).is_integer() for value in ordered):  # bins of whole numbers
        step = math.ceil((high - low + 1) / num_bins)
    shares = []
    for each in values.values():
        counts = Counter(int((min(value, high) - low) / step) for value in each)
        shares.append({place: count / len(each) for place, count in counts.items()})
    num_bins = max(place for each in shares for place in each) + 1
    most = max(share for each in shares for share in each.values())
    width, height = size
    top, bottom, wide = 26, height - 22, width / num_bins
    thick = wide * 0.9 / len(shares)
    parts = [f'<text x="0" y="12">{text(label)}</text>']
    for number, (name, own) in enumerate(zip(values, shares)):
        for place, share in sorted(own.items()):
            tall = share / most * (bottom - top)
            begin, end = low + place * step, low + (place + 1) * step
            what = f"{name}, {begin:,.4g} to {end:,.4g}: {share:.1%}"
            parts.append(
                f'<rect x="{place * wide + number * thick:.1f}" y="{bottom - tall:.1f}" '
                f'width="{thick:.1f}" height="{tall:.1f}" fill="{COLOURS[number % len(COLOURS)]}">'
                f"<title>{text(what)}</title></rect>"
            )
    parts += [
        f'<line class="axis" x1="0" x2="{width}" y1="{bottom}" y2="{bottom}"/>',
        f'<text x="0" y="{height - 6}">{low:,.4g}</text>',
        f'<text x="{width}" y="{height - 6}" text-anchor="end">{high:,.4g}</text>',
        f'<text x="{width}" y="{top - 2}" text-anchor="end">{most:.0%}</text>',
    ]
    return _svg(width, height, label, parts)


def _svg(width: int, height: int, label: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img" '
        f'aria-label="{text(label)}">{"".join(parts)}</svg>'
    )


def require_writable(path: Path, option: str) -> None:
    """Raise UserError if `write` could not write here, or would replace another file."""
    if not path.absolute().parent.is_dir():
        raise UserError(f"{option}: {path}: its folder does not exist; create it")
    if path.is_dir():
        raise UserError(f"{option}: {path} is a folder; name a file, such as {path / 'page.html'}")
    try:
        files.require_writable(path)
        start = b""
        if path.is_file():
            with path.open("rb") as file:
                start = file.read(len(MARK))
    except OSError as exc:
        failures.reraise(exc, f"{option}: {path}: cannot be written now")
        raise UserError(
            f"{option}: {path}: cannot be written: {exc.strerror}; choose another place"
        ) from exc
    if start and start != MARK.encode():
        raise UserError(
            f"{option}: {path} exists, and this program did not write it, so it is not replaced; "
            "choose another name, or remove it"
        )


def write(path: Path, content: str, option: str) -> None:
    """Write a page, whole or not at all. Raise UserError, or Outage for a full disk."""
    require_writable(path, option)
    try:
        files.write_whole(path, content)
    except OSError as exc:
        failures.reraise(exc, f"{option}: {path}: cannot be written now")
        raise UserError(
            f"{option}: {path}: cannot be written: {exc.strerror}; choose another place"
        ) from exc
