"""`finetune compare RUN RUN...`: settings that differ, losses, scores, time and cost of runs."""

import argparse
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import curves, page
from finetune.config import paths
from finetune.console import visible
from finetune.data.places import short
from finetune.errors import RunDirectoryError
from finetune.evaluation import report, results_file, rounds, run_facts, statistics
from finetune.evaluation.results_file import ResultsFile, RowFacts, RunFacts, ScoreFacts
from finetune.preparation.card import Table

RESULTS = "evaluation/results.json"  # in a run directory
# Settings that name a run and its places, which always differ.
PLACES = ("run.", "data.cache_dir", "checkpoint.storage", "tracking.")
BLOCKS = "▁▂▃▄▅▆▇█"
POINTS = 24  # of a curve in the terminal
LONGEST = 40  # characters of a setting in the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=_path, metavar="RUN", help="run directories, as runs/my_run")
    what = "also write a page with a picture to this .html file"
    add("--html", type=_path, default=None, metavar="FILE", help=what)
    what = "price of an hour of one GPU, or of the machine of a run without any: adds the cost"
    add("--price", type=_price, default=None, metavar="MONEY", help=what)


def _path(text: str) -> Path:
    return Path(paths.argument(text))


def _price(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"should be a number of at least 0, got {text!r}")
    return value


@dataclass(frozen=True)
class Compared:
    """A run, and its evaluation if it has one."""

    name: str
    facts: RunFacts
    results: ResultsFile | None

    def cost(self, price: float) -> float | None:
        machines = (
            self.facts.facts.get("num_processes") if self.facts.facts.get("machine.gpus") else 1
        )
        if self.facts.seconds is None or not isinstance(machines, int):
            return None
        return self.facts.seconds / 3_600 * machines * price


def main(arguments: argparse.Namespace) -> None:
    """Print the table, and write the page."""
    if arguments.html:
        page.require_writable(arguments.html, "--html")
    runs = [opened(run, curves.name_of(run, arguments.runs)) for run in arguments.runs]
    print(visible(text(runs, arguments.price)))
    if arguments.html:
        page.write(arguments.html, html(runs, arguments.price), "--html")
        print(arguments.html)


def opened(run: Path, name: str) -> Compared:
    """Read a run directory. Raise RunDirectoryError for another folder."""
    if not (run / "config.yaml").is_file():
        raise RunDirectoryError(
            f"{run} is not a run directory (it has no config.yaml); give one, such as runs/my_run"
        )
    results = run / RESULTS
    found = results_file.read(results) if results.is_file() else None
    return Compared(name, run_facts.of_run(run), found)


# ------------------------------------------------------------------------------------ the table


def table(runs: Sequence[Compared], price: float | None) -> Table:
    """Return a line for each thing, and a column for each run."""
    lines = [("settings that differ", *[""] * len(runs)), *_settings(runs)]
    if len(lines) == 1:
        lines = [("settings", *["the same"] * len(runs))]
    lines += [(name, *values) for name, values in _numbers(runs, price) if any(values)]
    if any(run.results for run in runs):
        lines.append(("scores", *[""] * len(runs)))
        lines += _scores(runs)
    return Table(["", *(run.name for run in runs)], lines)


def _settings(runs: Sequence[Compared]) -> Iterator[tuple[str, ...]]:
    names = dict.fromkeys(name for run in runs for name in run.facts.settings)
    for name in names:
        values = [_written(run.facts.settings, name) for run in runs]
        if len(set(values)) > 1 and not name.startswith(PLACES):
            yield (f"  {name}", *values)
    rows = [_written(run.facts.facts, "identity.training data")[:8] for run in runs]
    if len(set(rows)) > 1:
        counts = [_written(run.facts.facts, "train_data.rows") for run in runs]
        yield ("  training rows (hash)", *(f"{n} ({h})" for n, h in zip(counts, rows)))


def _written(values: dict[str, object], name: str) -> str:
    value = values.get(name)
    return "-" if value is None else short(value, LONGEST)


def _numbers(runs: Sequence[Compared], price: float | None) -> Iterator[tuple[str, list[str]]]:
    yield "state", [run.facts.state for run in runs]
    yield "steps", [_last(run, "loss", 0, ",.0f") for run in runs]
    yield "last loss", [_last(run, "loss", 1, ".4f") for run in runs]
    yield "best evaluation loss", [_best(run) for run in runs]
    yield "tokens / s, median", [_median(run, "tokens per second") for run in runs]
    yield "time", [duration(run.facts.seconds) for run in runs]
    if price is not None:
        costs = [run.cost(price) for run in runs]
        yield "cost", ["" if cost is None else f"{cost:,.2f}" for cost in costs]
    yield "loss", [sparkline([y for _, y in run.facts.curves.get("loss", [])]) for run in runs]


def _last(run: Compared, curve: str, axis: int, form: str) -> str:
    points = run.facts.curves.get(curve)
    return f"{points[-1][axis]:{form}}" if points else ""


def _best(run: Compared) -> str:
    points = run.facts.curves.get("evaluation loss")
    if not points:
        return ""
    step, loss = min(points, key=lambda point: point[1])
    return f"{loss:.4f} (step {step:,})"


def _median(run: Compared, curve: str) -> str:
    values = sorted(y for _, y in run.facts.curves.get(curve, []))
    return f"{values[len(values) // 2]:,.0f}" if values else ""


def duration(seconds: float | None) -> str:
    """Write seconds as 1:02:03."""
    if seconds is None:
        return ""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float]) -> str:
    """Draw values in one line of text, each the mean of a stretch; the highest fills its block."""
    if not values:
        return ""
    count = min(POINTS, len(values))
    ends = [round(len(values) * n / count) for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in zip(ends, ends[1:])]
    low, high = min(means), max(means)
    scale = (len(BLOCKS) - 1) / ((high - low) or 1)
    return "".join(BLOCKS[round((mean - low) * scale)] for mean in means)


def _scores(runs: Sequence[Compared]) -> Iterator[tuple[str, ...]]:
    names = dict.fromkeys(s.name for run in runs if run.results for s in run.results.scores)
    for name in names:
        scores = [run.results.score(name) if run.results else None for run in runs]
        means = [
            report.with_interval(score.means.get(run.results.tuned), score.is_share)
            if score and run.results else "not evaluated"
            for run, score in zip(runs, scores)
        ]  # fmt: skip
        yield (f"  {name}", *means)
        first = runs[0]
        gains = [
            _gain(first, run, score) if score else "" for run, score in zip(runs[1:], scores[1:])
        ]
        if any(gains):
            yield (f"    less {first.name}", "", *gains)


def _gain(first: Compared, other: Compared, score: ScoreFacts) -> str:
    """Return the paired difference of two runs over the rows that both were asked."""
    if first.results is None or other.results is None:
        return ""
    rows = _by_question(other.results)
    before, after, groups = [], [], []
    for key, row in _by_question(first.results).items():
        same = rows.get(key)
        old = row.scores.get(score.name, {}).get(first.results.tuned)
        new = same.scores[score.name].get(other.results.tuned) if same else None
        if old is not None and new is not None:
            before.append(old)
            after.append(new)
            groups.append(row.cluster)
    if not before:
        return "no row in common"
    found = statistics.difference(before, after, groups)
    mean = report.shown(found.mean, score.is_share, True)
    if found.low is None or found.high is None:
        return f"{mean} (too few rows for an interval)"
    low, high = (report.shown(end, score.is_share, True) for end in (found.low, found.high))
    part = "" if len(before) == len(rows) == len(first.results.rows) else f", {len(before):,} rows"
    return f"{mean} ({low} to {high}{part})"


def _by_question(found: ResultsFile) -> dict[rounds.Key, RowFacts]:
    return dict(zip(rounds.keys([row.messages for row in found.rows]), found.rows))


def text(runs: Sequence[Compared], price: float | None) -> str:
    """Return the table for a terminal."""
    found = table(runs, price)
    lines = [list(map(str, row)) for row in [found.head, *found.rows]]
    widths = [max(len(line[n]) for line in lines) for n in range(len(found.head))]
    padded = ("  ".join(f"{cell:<{w}}" for cell, w in zip(line, widths)) for line in lines)
    return "\n".join(line.rstrip() for line in padded)


# ------------------------------------------------------------------------------------ the page


def html(runs: Sequence[Compared], price: float | None) -> str:
    """Return a page with the table, and the curves of all runs in the same plots."""
    found = table(runs, price)
    names = [run.name for run in runs]
    shown = [row for row in found.rows if row[0] != "loss"]
    parts = [page.table(found.head, shown), "<h2>Curves</h2>", page.legend(names)]
    parts.append('<div class="plots">')
    for curve in run_facts.CURVES:
        series = {run.name: _drawn(run, curve) for run in runs if curve in run.facts.curves}
        if series:
            # A run without this curve keeps its colour.
            parts.append(page.lines({name: series.get(name, []) for name in names}, curve))
    parts.append("</div>")
    for run in runs:
        if run.results:
            verdict = page.text(run.results.verdict.sentence)
            parts.append(f"<h2>{page.text(run.name)}</h2><p>{verdict}</p>")
    return page.page("Runs", "\n".join(parts), report.STYLE)


def _drawn(run: Compared, curve: str) -> list[tuple[int, float]]:
    """Return the points of a curve, the loss of a long run smoothed."""
    points = run.facts.curves[curve]
    if curve == "evaluation loss":
        return points
    return list(zip([x for x, _ in points], curves.smoothed([y for _, y in points])))
