"""Loss, evaluation loss, learning rate, gradient norm and speed of runs, in one picture."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import extras
from finetune.config import paths
from finetune.errors import RunDirectoryError

PANELS = {  # of a line of metrics.jsonl: what is drawn below the losses
    "lr": "learning rate", "grad_norm": "gradient norm, before clipping", "tokens_per_second": "tokens / s",
}  # fmt: skip
SMOOTHED_FROM = 50  # points; shorter curves are drawn as they are
MARKED_BELOW = 10  # points; a line through so few may be too short to see


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=_path, metavar="RUN", help="run directories, as runs/my_run"
    )
    parser.add_argument(
        "--output",
        type=_path,
        default=None,
        help="picture to write; default: curves.png, of one run inside it",
    )
    parser.add_argument(
        "--log",
        action="store_true",
        help="logarithmic scales, for a loss whose first steps dwarf the rest",
    )


def _path(text: str) -> Path:
    return Path(paths.argument(text))


def main(arguments: argparse.Namespace) -> None:
    output = (
        arguments.output
        or (arguments.runs[0] if len(arguments.runs) == 1 else Path()) / "curves.png"
    )
    if not output.suffix:
        output = output / "curves.png" if output.is_dir() else output.with_suffix(".png")
    draw(arguments.runs, output, arguments.log)
    print(output)


def draw(runs: Sequence[Path], output: Path, log: bool = False) -> None:
    """One colour per run: training loss (thin: each step; thick: smoothed), evaluation loss (dots),
    the exported step (dotted line), and the rest below.

    Raises RunDirectoryError if a run has no metrics, or the picture cannot be written.
    """
    lines = {run: (read(run / "metrics.jsonl"), read(run / "eval.jsonl")) for run in runs}
    if empty := [run for run, (metrics, _) in lines.items() if not metrics]:
        raise RunDirectoryError(
            f"{empty[0]} is not a run directory with metrics (metrics.jsonl); give one, such as "
            "runs/my_run"
        )
    for name in (run / log for run in runs for log in ("metrics.jsonl", "eval.jsonl")):
        if output.exists() and name.exists() and output.samefile(name):
            raise RunDirectoryError(
                f"--output: {output} is {name}, which is an input; choose another path"
            )
    extras.require("matplotlib", "curves")
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot
    from matplotlib.lines import Line2D

    figure, axes = pyplot.subplot_mosaic(
        [["loss"] * len(PANELS), list(PANELS)],
        figsize=(13, 8),
        height_ratios=[1.6, 1],
        layout="constrained",
        sharex=True,
    )
    marks: dict[str, Any] = {}
    for number, (run, (metrics, evals)) in enumerate(lines.items()):
        colour = f"C{number % 10}"
        steps, loss = series(metrics, "loss")
        smooth, mark = smoothed(loss), "." if len(steps) < MARKED_BELOW else ""
        axes["loss"].plot(
            steps, loss, color=colour, alpha=0.3 if smooth is not loss else 1, linewidth=1
        )
        axes["loss"].plot(steps, smooth, color=colour, marker=mark, label=name_of(run, runs))
        axes["loss"].plot(
            *series(evals, "eval_loss"), "o--", color=colour, markersize=5, markeredgecolor="white"
        )
        for key in PANELS:
            axes[key].plot(*series(metrics, key), color=colour, marker=mark, linewidth=1)
        if (exported := exported_step(run)) is not None:
            axes["loss"].axvline(exported, color=colour, linestyle=":", linewidth=1)
            marks["exported"] = Line2D([], [], color="grey", linestyle=":")
        if evals:
            marks["evaluation"] = Line2D(
                [], [], color="grey", marker="o", linestyle="--", markeredgecolor="white"
            )
    axes["loss"].set_xlabel("step")
    axes["loss"].set_title("loss, nats per learned token", loc="left")
    for key, title in PANELS.items():
        axes[key].set_title(title, loc="left")
        axes[key].set_xlabel("step")
        if not log:
            axes[key].set_ylim(bottom=0)
    handles, labels = axes["loss"].get_legend_handles_labels()
    axes["loss"].legend([*handles, *marks.values()], [*labels, *marks], frameon=False)
    axes["loss"].tick_params(labelbottom=True)
    for axis in axes.values():
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.2)
        if log:
            axis.set_yscale("log")
    try:
        figure.savefig(output, dpi=120)
    except (OSError, ValueError) as exc:  # ValueError: a format that matplotlib does not know
        raise RunDirectoryError(
            f"{output} cannot be written: {exc}; give --output another place"
        ) from exc
    finally:
        pyplot.close(figure)


def exported_step(run: Path) -> int | None:
    """The step whose weights a complete run has exported; None if there is none on record."""
    try:
        step = json.loads((run / "outcome.json").read_text()).get("exported_step")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def read(path: Path) -> list[dict[str, Any]]:
    """Lines of a log, also of a run that goes on: a torn last line is left out."""
    lines = []
    for text in path.read_text(errors="replace").split("\n") if path.is_file() else []:
        try:
            line = json.loads(text)
        except (ValueError, RecursionError):
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def series(lines: Sequence[dict[str, Any]], key: str) -> tuple[list[int], list[float]]:
    """(steps, values); NaN, a gap in the curve, for a missing number."""
    return [line["step"] for line in lines], [
        line[key] if isinstance(line.get(key), int | float) else math.nan for line in lines
    ]


def smoothed(values: list[float]) -> list[float]:
    """Means over a window of a fiftieth of the curve around each point; short curves as they are."""
    if len(values) < SMOOTHED_FROM:
        return values
    reach = len(values) // 100 or 1
    windows = (
        [v for v in values[max(0, i - reach) : i + reach + 1] if not math.isnan(v)]
        for i in range(len(values))
    )
    return [sum(window) / len(window) if window else math.nan for window in windows]


def name_of(run: Path, runs: Sequence[Path]) -> str:
    """The run's folder; with its parents where two have the same."""
    return (
        str(run)
        if [other.resolve().name for other in runs].count(run.resolve().name) > 1
        else run.resolve().name
    )
