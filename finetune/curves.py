"""Draw loss, evaluation loss, learning rate, gradient norm and speed of runs in one picture."""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import extras
from finetune.config import paths
from finetune.errors import RunDirectoryError

PANELS = {  # keys of metrics.jsonl that are drawn below the losses -> titles
    "lr": "learning rate",
    "grad_norm": "gradient norm, before clipping",
    "tokens_per_second": "tokens / s",
}
SMOOTHED_FROM = 50  # points; shorter curves are drawn unsmoothed
MARKED_BELOW = 10  # points; a line through fewer may be too short to see


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("runs", nargs="+", type=_path, metavar="RUN", help="run directories, as runs/my_run")
    what = "picture to write; default: curves.png, of one run inside it"
    add("--output", type=_path, default=None, help=what)
    what = "logarithmic scales, for a loss whose first steps dwarf the rest"
    add("--log", action="store_true", help=what)


def _path(text: str) -> Path:
    return Path(paths.argument(text))


def main(arguments: argparse.Namespace) -> None:
    """Draw the runs, and print the name of the picture."""
    folder = arguments.runs[0] if len(arguments.runs) == 1 else Path()
    output = arguments.output or folder / "curves.png"
    if not output.suffix:
        output = output / "curves.png" if output.is_dir() else output.with_suffix(".png")
    draw(arguments.runs, output, arguments.log)
    print(output)


def draw(runs: Sequence[Path], output: Path, log: bool = False) -> None:
    """Draw one colour per run: losses, the exported step (dotted line), and PANELS below.

    Training loss is thin for each step and thick smoothed; evaluation losses are dots. Raises
    RunDirectoryError if a run has no metrics, or the picture cannot be written.
    """
    lines = {run: (read(run / "metrics.jsonl"), read(run / "eval.jsonl")) for run in runs}
    _require_lines(lines, output)
    extras.require("matplotlib", "curves")
    import matplotlib as mpl

    mpl.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplot_mosaic(
        [["loss"] * len(PANELS), list(PANELS)], figsize=(13, 8), height_ratios=[1.6, 1],
        layout="constrained", sharex=True,
    )  # fmt: skip
    marks: dict[str, Any] = {}
    for number, (run, (metrics, evals)) in enumerate(lines.items()):
        marks |= _draw_run(axes, run, name_of(run, runs), metrics, evals, f"C{number % 10}")
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


def _require_lines(lines: dict[Path, tuple[list[Any], list[Any]]], output: Path) -> None:
    """Raise RunDirectoryError for a run without metrics, or an output that is an input."""
    if empty := [run for run, (metrics, _) in lines.items() if not metrics]:
        raise RunDirectoryError(
            f"{empty[0]} is not a run directory with metrics (metrics.jsonl); give one, such as "
            "runs/my_run"
        )
    for name in (run / log for run in lines for log in ("metrics.jsonl", "eval.jsonl")):
        if output.exists() and name.exists() and output.samefile(name):
            raise RunDirectoryError(
                f"--output: {output} is {name}, which is an input; choose another path"
            )


def _draw_run(
    axes: Any, run: Path, name: str, metrics: list[Any], evals: list[Any], colour: str
) -> dict[str, Any]:
    """Draw the curves of one run; return the entries of the legend for the marks it has."""
    from matplotlib.lines import Line2D

    marks: dict[str, Any] = {}
    steps, loss = series(metrics, "loss")
    smooth, mark = smoothed(loss), "." if len(steps) < MARKED_BELOW else ""
    alpha, white = 0.3 if smooth is not loss else 1, "white"
    axes["loss"].plot(steps, loss, color=colour, alpha=alpha, linewidth=1)
    axes["loss"].plot(steps, smooth, color=colour, marker=mark, label=name)
    points = series(evals, "eval_loss")
    axes["loss"].plot(*points, "o--", color=colour, markersize=5, markeredgecolor=white)
    for key in PANELS:
        axes[key].plot(*series(metrics, key), color=colour, marker=mark, linewidth=1)
    if (exported := exported_step(run)) is not None:
        axes["loss"].axvline(exported, color=colour, linestyle=":", linewidth=1)
        marks["exported"] = Line2D([], [], color="grey", linestyle=":")
    if evals:
        dots: Any = {"marker": "o", "linestyle": "--", "markeredgecolor": white}
        marks["evaluation"] = Line2D([], [], color="grey", **dots)
    return marks


def exported_step(run: Path) -> int | None:
    """Return the step whose weights a complete run has exported; None if it is not on record."""
    try:
        step = json.loads((run / "outcome.json").read_text()).get("exported_step")
    except (OSError, ValueError, AttributeError, RecursionError):
        return None
    return step if isinstance(step, int) else None


def read(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a log, without a torn last line of a run that is still going."""
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
    """Return (steps, values) of one key; NaN, a gap in the curve, for a missing number."""
    numbers = (line.get(key) for line in lines)
    values = [number if isinstance(number, int | float) else math.nan for number in numbers]
    return [line["step"] for line in lines], values


def smoothed(values: list[float]) -> list[float]:
    """Return means over a window around each point, 1/50 of the curve; short curves unchanged."""
    if len(values) < SMOOTHED_FROM:
        return values
    reach = len(values) // 100 or 1
    around = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    windows = ([value for value in window if not math.isnan(value)] for window in around)
    return [sum(window) / len(window) if window else math.nan for window in windows]


def name_of(run: Path, runs: Sequence[Path]) -> str:
    """Return the name of the run's folder; the whole path where two runs have the same name."""
    name = run.resolve().name
    return str(run) if [other.resolve().name for other in runs].count(name) > 1 else name
