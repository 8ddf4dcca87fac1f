"""Write rows as a table in markdown and as JSON, and give the exit code. Needs no torch."""

import json
import statistics
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from on_gpu.runner import Row

RIGHT, WRONG, LEFT_OUT, NO_TURN = "right", "wrong", "left out", "no turn"
MEASURED, KNOWN, OUT_OF_MEMORY = "measured", "known failure", "out of memory"
"""It ran, and there is nothing to compare it with; a test that is expected to fail, and did; where
a series of growing lengths ends.
"""


class Log:
    """Print lines on the terminal and into a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        path.write_text("")

    def __call__(self, line: str) -> None:
        print(line, flush=True)
        with self._path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")


def exit_code(rows: Sequence[Row]) -> int:
    """Return 1 if anything is wrong, nothing ran, or a part that proves was cut short; else 0."""
    proves = ("correctness", "objectives")
    cut_short = any(row.part in proves and row.status == NO_TURN for row in rows)
    is_wrong = any(row.status == WRONG for row in rows) or not any(
        row.status in (RIGHT, MEASURED, OUT_OF_MEMORY) for row in rows
    )
    return int(is_wrong or cut_short)


def about(facts: dict[str, Any]) -> str:
    """Return hardware and versions in one line."""
    gpu = (
        f"{facts['gpu']}, {facts['memory_gb']:.0f} GB, driver {facts['driver']}"
        if facts.get("gpu")
        else "no GPU"
    )
    return f"{gpu}; " + ", ".join(
        f"{name} {version}" for name, version in facts["versions"].items()
    )


def table(rows: Sequence[Row], facts: dict[str, Any]) -> str:
    """Return markdown for the docs: what ran, then what did not, and why."""
    ran = [row for row in rows if row.status in (RIGHT, MEASURED, WRONG, OUT_OF_MEMORY)]
    columns = list(dict.fromkeys(key for row in ran for key in row.values))
    lines = [about(facts), ""]
    if ran:
        head = ["", "result", *columns, "s"]
        lines += [_line(head), _line(["---"] * len(head))]
        for row in ran:
            status = row.status if row.status != WRONG else f"**{row.status}**: {row.reason}"
            cells = [shown(row.values.get(key)) for key in columns]
            lines.append(_line([row.name, status, *cells, f"{row.seconds:.0f}"]))
    for status in (KNOWN, LEFT_OUT, NO_TURN):
        reasons: dict[str, list[str]] = {}
        for row in rows:
            if row.status == status:
                reasons.setdefault(row.reason, []).append(row.name)
        lines += [""] if reasons else []
        lines += [f"- {status}: {', '.join(names)}: {why}" for why, names in reasons.items()]
    counts = Counter(row.status for row in rows)
    shown_always = (RIGHT, WRONG, LEFT_OUT, NO_TURN)
    listed = [
        status
        for status in (RIGHT, MEASURED, OUT_OF_MEMORY, WRONG, KNOWN, LEFT_OUT, NO_TURN)
        if status in shown_always or counts[status]
    ]
    return "\n".join([*lines, "", ", ".join(f"{counts[status]} {status}" for status in listed)])


def _line(cells: Sequence[str]) -> str:
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def shown(value: Any) -> str:
    """Return a cell: small numbers with two digits, large ones whole."""
    if value is None:
        return ""
    if not isinstance(value, float):
        return str(value)
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.4g}" if abs(value) >= 1e-2 or value == 0 else f"{value:.1e}"


def write(
    folder: Path, part: str, rows: Sequence[Row], facts: dict[str, Any], seconds: float
) -> str:
    """Write `part`.md and `part`.json, and return the table."""
    text = table(rows, facts)
    (folder / f"{part}.md").write_text(text + "\n")
    whole = {
        "part": part,
        "seconds": round(seconds, 1),
        "machine": facts,
        "rows": [asdict(row) for row in rows],
    }
    (folder / f"{part}.json").write_text(json.dumps(whole, indent=1) + "\n")
    return text


def median(values: Sequence[float]) -> float | None:
    return statistics.median(values) if values else None
