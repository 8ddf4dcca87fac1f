"""Read what a run left behind, for reports: settings, curves, receipt, card of its rows."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finetune import config as configs
from finetune import curves, files
from finetune.data.places import printable
from finetune.evaluation.results_file import RunFacts

CURVES = {  # name -> (log, key)
    "loss": ("metrics.jsonl", "loss"),
    "evaluation loss": ("eval.jsonl", "eval_loss"),
    "learning rate": ("metrics.jsonl", "lr"),
    "gradient norm": ("metrics.jsonl", "grad_norm"),
    "tokens per second": ("metrics.jsonl", "tokens_per_second"),
}
MOST_POINTS = 600  # of a curve, at even distances
CARD, BESIDE = "README.md", "croissant.json"  # `finetune data report` writes both
LONGEST_CARD = 200_000  # characters


def of_run(directory: Path) -> RunFacts:
    """Return the facts of a run; what is missing or damaged is left out."""
    settings = flat(configs.read_resolved(directory / "config.yaml"))
    outcome = files.read_note(directory / "outcome.json")[0]
    return RunFacts(
        directory=printable(str(directory)), state=str(outcome.get("state", "unknown")),
        seconds=_seconds(directory),
        settings=plain(settings), curves=_curves(directory),
        facts=plain(flat(files.read_note(directory / "receipt.json")[0])),
        data_card=card_beside(settings.get("data.train")),
    )  # fmt: skip


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return {a: {b: 1}} as {"a.b": 1}."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        key = f"{prefix}{name}"
        found |= flat(value, f"{key}.") if isinstance(value, Mapping) and value else {key: value}
    return found


def plain(value: Any) -> Any:
    """Return a value as JSON has it: halves of characters escaped, numbers finite, others text."""
    if isinstance(value, Mapping):
        return {printable(str(key)): plain(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    if isinstance(value, bool | int | None):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else str(value)
    return printable(str(value))


def _seconds(directory: Path) -> float | None:
    """Return how long the steps took; None without a log. Evaluations and saves do not count."""
    seconds, before = 0.0, 0
    lines = curves.read(directory / "metrics.jsonl")
    for line in lines:
        tokens, rate = line.get("tokens"), line.get("tokens_per_second")
        if isinstance(tokens, int) and isinstance(rate, int | float) and rate > 0:
            seconds += max(0, tokens - before) / rate
            before = tokens
    return seconds if lines else None


def _curves(directory: Path) -> dict[str, list[tuple[int, float]]]:
    logs = {log: curves.read(directory / log) for log, _ in CURVES.values()}
    found = {}
    for name, (log, key) in CURVES.items():
        points = [pair for pair in zip(*curves.series(logs[log], key)) if math.isfinite(pair[1])]
        if points:
            found[name] = thinned(points)
    return found


def thinned(points: list[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return at most MOST_POINTS points, the last one among them."""
    step = math.ceil(len(points) / MOST_POINTS)
    return points[::-step][::-1] if step > 1 else points


def card_beside(train: Any) -> str | None:
    """Return the card that lies beside the rows of data.train."""
    names = [train] if isinstance(train, str) else list(train or [])
    for name in names:
        folder = Path(str(name)).parent
        if (folder / CARD).is_file() and (folder / BESIDE).is_file():
            return printable((folder / CARD).read_text(errors="replace")[:LONGEST_CARD])
    return None
