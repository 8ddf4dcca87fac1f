"""What `finetune evaluate` leaves: results.json, report.html and report.md, beside the run."""

import argparse
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

from finetune import failures, files
from finetune.config import paths
from finetune.console import visible
from finetune.errors import UserError
from finetune.evaluation import (
    analysis,
    fail_under,
    nearest,
    next_data,
    report,
    results_file,
    rounds,
)
from finetune.evaluation.results import Results
from finetune.evaluation.results_file import ResultsFile
from finetune.evaluation.trained_run import TrainedRun
from finetune.evaluation.verdict import Verdict
from finetune.generation.completions import Scorer

FOLDER = "evaluation"  # of a run directory
NAMES = ("results.json", "report.html", "report.md")
EARLIER = "earlier"  # in the folder: one folder for each evaluation before
MOST_NAMED = 3  # slices and types of errors in the terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = (
        "write results.json, report.html and report.md into this folder; default: RUN/evaluation. "
        "Those of an evaluation before move to its folder earlier"
    )
    add("--report", type=_path, default=None, metavar="FOLDER", help=what)
    what = (
        "an answer is wrong if this score is below VALUE; default: as in --before, or one half, of "
        "the first score that is 0 or 1, or where right answers are long, with values between"
    )
    add("--wrong-below", type=fail_under.limit, metavar="[SCORE=]VALUE", help=what)
    what = "results.json of an earlier round: say what was fixed, was not, and is newly wrong"
    add("--before", type=_path, default=None, metavar="FILE", help=what)
    what = "write the request for rows like those that went wrong, for data generate --from-report"
    add("--next-data", type=_path, default=None, metavar="FILE", help=what)
    what = (
        "end with exit code 1 if the tuned model's mean is below VALUE, as 0.9 or 90%%; base: if "
        "the verdict is that it is worse than the base; may be given several times"
    )
    shown = "[SCORE=]VALUE|base"
    add(
        "--fail-under", type=fail_under.base_or_limit, action="append", default=[], metavar=shown,
        help=what,
    )  # fmt: skip


def _path(text: str) -> Path:
    return Path(paths.argument(text))


def folder_of(given: Path | None, run: TrainedRun | None) -> Path | None:
    """Return where the report goes; None without --report and a run."""
    return given if given is not None or run is None else run.path / FOLDER


def require_scores(arguments: argparse.Namespace, scorers: Sequence[Scorer]) -> None:
    """Raise UserError for a limit that none of these scores has, or another than --before had.

    Needs no answers.
    """
    for limit in arguments.fail_under:
        if limit is not None:
            fail_under.require("--fail-under", limit, scorers)
    if arguments.wrong_below:
        fail_under.require("--wrong-below", arguments.wrong_below, scorers)
    rule = _rule(arguments)
    if arguments.before and rule and rule[0]:
        rounds.require_score(arguments.before, rule[0], scorers)


def _rule(arguments: argparse.Namespace) -> tuple[str | None, float] | None:
    """Return by which score, below which value, an answer is wrong: as in --before if given.

    score None: the evaluation chooses. None: of the value as well. Raises UserError.
    """
    given = arguments.wrong_below
    score, below = (given.score, given.value) if given else (None, None)
    if arguments.before:
        decided = rounds.rule(arguments.before, score, below)
        return decided.score, decided.below
    return (score, below) if below is not None else None


def require(arguments: argparse.Namespace, run: TrainedRun | None) -> None:
    """Raise UserError or Outage, before any weights load, for what could not be written or read."""
    if folder := folder_of(arguments.report, run):
        option = "--report" if arguments.report else str(folder)
        _require_folder(folder, option)
    _rule(arguments)
    if request := arguments.next_data:
        if not request.absolute().parent.is_dir():
            raise UserError(f"--next-data: {request}: its folder does not exist; create it")
        if os.path.lexists(request):
            raise UserError(f"--next-data: {request} exists; choose another name, or remove it")
        _probe(request.absolute().parent, "--next-data")


def _require_folder(folder: Path, option: str) -> None:
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{option}: {folder} is a file; choose another folder with --report")
    there = folder.absolute()
    while not there.is_dir():
        there = there.parent
    _probe(there, option)


def _probe(folder: Path, option: str) -> None:
    try:
        files.probe_folder(folder)
    except OSError as exc:
        failures.reraise(exc, f"{option}: {folder}: cannot be written now")
        raise UserError(
            f"{option}: {folder}: cannot be written: {exc.strerror}; choose another place"
        ) from exc


def write(
    results: Results, verdict: Verdict, arguments: argparse.Namespace, run: TrainedRun | None
) -> None:
    """Analyse, print the main things, write the files. Raise ScoreTooLow for --fail-under."""
    decides = analysis.decides_of(results, _rule(arguments))
    found = analysis.of_results(
        results, verdict, decides, lambda: nearest.of_run(run) if run else [], arguments.before
    )
    for line in summary(found):
        print(visible(line))
    if folder := folder_of(arguments.report, run):
        save(folder, found)
        print(f"report: {folder / 'report.html'}")
    if arguments.next_data:
        asked = next_data.request_of(found)
        next_data.write(arguments.next_data, asked)
        wanted = sum(each.count for each in asked.slices)
        print(f"next data: {arguments.next_data} asks for {wanted:,} rows")
    fail_under.check(arguments.fail_under, found)


def summary(found: ResultsFile) -> Iterator[str]:
    """Yield what the terminal shows below the verdict."""
    if found.error_types:
        types = sorted(found.error_types, key=lambda each: -each.count)
        shown = ", ".join(f"{each.name} {each.count:,}" for each in types[:MOST_NAMED])
        others = f", and {len(types) - MOST_NAMED} more types" * (len(types) > MOST_NAMED)
        yield f"errors of {found.tuned}: {shown}{others}"
    weak = [each for each in found.slices if each.is_weak]
    if weak:
        shown = ", ".join(
            f"{each.name} ({each.failures:,} of {len(each.rows):,} wrong)"
            for each in weak[:MOST_NAMED]
        )
        yield f"weak: {shown}"
    if found.round:
        yield f"since {found.round.file}: {found.round.sentence}"


def save(folder: Path, found: ResultsFile) -> None:
    """Write the files of a report, each whole or not at all; earlier ones move aside."""
    contents = {"report.html": report.html(found), "report.md": report.markdown(found)}
    with failures.writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        _set_aside(folder, NAMES)
        results_file.write(folder / "results.json", found)
        for name, content in contents.items():
            files.write_whole(folder / name, content)


def _set_aside(folder: Path, names: Sequence[str]) -> None:
    """Move files of an evaluation before into earlier/1, earlier/2, ..."""
    there = [name for name in names if os.path.lexists(folder / name)]
    if not there:
        return
    number = 1
    while os.path.lexists(folder / EARLIER / str(number)):
        number += 1
    aside = folder / EARLIER / str(number)
    aside.mkdir(parents=True)
    for name in there:
        os.rename(folder / name, aside / name)
