"""What `finetune evaluate` asks of judges and of people: --judge, --pairwise, --votes-page."""

import argparse
import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from finetune import failures, page, places
from finetune.config import paths
from finetune.config.base import model_in
from finetune.endpoint import Client, Server
from finetune.errors import UserError
from finetune.evaluation import report_files, vote_command, votes, voting
from finetune.evaluation.held_out import note
from finetune.evaluation.judges import labels, rubrics
from finetune.evaluation.judges.g_eval import GEval
from finetune.evaluation.judges.labels import Label
from finetune.evaluation.judges.local import LocalJudge
from finetune.evaluation.judges.pairwise import Pairwise
from finetune.evaluation.judges.remote import RemoteJudge
from finetune.evaluation.judges.rubrics import Rubric
from finetune.evaluation.judges.weights import Judge, Kept
from finetune.evaluation.results import Results
from finetune.evaluation.trained_run import TrainedRun
from finetune.evaluation.votes import Vote
from finetune.generation.completions import Completion, Scorer

VOTES = "judge_votes.jsonl"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what = (
        "a model that judges the answers: a run directory, folder or Hub id, or the URL of an "
        "OpenAI-compatible server, which gets prompts, answers and references"
    )
    add("--judge", type=_judge, metavar="MODEL|URL", help=what)
    add("--judge-model", metavar="NAME", help="model of that server")
    what = "environment variable that holds the server's key"
    add("--judge-key", metavar="VARIABLE", help=what)
    what = (
        f"what to judge by: a YAML file, or one of {', '.join(rubrics.BUILT_IN)}; may be given "
        "several times (default: quality)"
    )
    add("--rubric", action="append", metavar="FILE|NAME", type=_rubric, help=what)
    what = "let the judge compare answers by pairs, in both orders, instead of scoring each"
    add("--pairwise", action="store_true", help=what)
    what = "the file of --output with scores of people in base_label, tuned_label of some lines"
    add("--labels", type=paths.argument, metavar="FILE", help=what)
    what = "write a page (.html) on which people vote for answers without knowing their models"
    add("--votes-page", type=paths.argument, metavar="FILE", help=what)


def _is_url(text: str) -> bool:
    return text.startswith(("http://", "https://"))


def _judge(text: str) -> str:
    return text if _is_url(text) else model_in(paths.argument(text))


def _rubric(text: str) -> str:
    return text if text in rubrics.BUILT_IN else paths.argument(text)


# Options that would be ignored without --judge.
NEED_JUDGE = {"judge_model": None, "judge_key": None, "rubric": None, "pairwise": False,
              "labels": None}  # fmt: skip


@dataclass
class Judging:
    """A judge's scorers, and what follows the table. page_path: of the page for people."""

    scorers: Sequence[GEval] = ()
    pairwise: Sequence[Pairwise] = ()
    folder: Path | None = None
    labels: Sequence[Label] = ()
    page_path: str | None = None

    @property
    def all_scorers(self) -> list[Scorer]:
        return [*self.scorers, *self.pairwise]

    def scorers_of(self, answers: Mapping[str, Sequence[Completion]]) -> list[Scorer]:
        """Return the scorers of a judge, after it has compared these answers by pairs."""
        for each in self.pairwise:
            each.compare(answers)
        return self.all_scorers

    def report(self, results: Results) -> Iterator[str]:
        """Yield lines on mass outside, flips, ratings and labels; write votes and page."""
        yield from (each.summary() for each in self.scorers)
        yield from (each.summary() for each in self.pairwise)
        if self.folder and self.pairwise:
            yield from self._ratings(results, self.folder / VOTES)
        if self.labels:
            for scorer in self.scorers:
                yield from labels.report(results, scorer.name, self.labels)
        if self.page_path:
            yield self._page(results, self.page_path)

    def _ratings(self, results: Results, path: Path) -> Iterator[str]:
        """Yield ratings by the judge's votes, and add these to the file of its votes."""
        shown = {prompt.place for prompt in results.prompts}
        given = [vote for each in self.pairwise for vote in each.votes if vote.row in shown]
        if not given:
            return
        yield ""
        yield from vote_command.report(given)
        known = _votes_in(path)
        votes.write(path, votes.latest([*known, *given]))
        yield f"{path}: the judge's votes, for {places.command()} votes"

    def _page(self, results: Results, path: str) -> str:
        count = voting.write(Path(path), results.answers, "--votes-page")
        if not count:
            return f"{path} is not written: the models give equal answers to all rows"
        return (
            f"{path}: {count:,} pairs to vote on; open it in a browser, save the votes, and rate "
            f"them with {places.command()} votes"
        )


def check(arguments: argparse.Namespace) -> list[Rubric]:
    """Return the rubrics. Raise UserError for options that do not fit, before models answer."""
    if arguments.votes_page:
        page.require_writable(Path(arguments.votes_page), "--votes-page")
    if not arguments.judge:
        for name, default in NEED_JUDGE.items():
            if getattr(arguments, name) != default:
                option = f"--{name.replace('_', '-')}"
                raise UserError(f"{option}: would be ignored without --judge; add one")
        return []
    if _is_url(arguments.judge) and not arguments.judge_model:
        raise UserError(f"--judge: {arguments.judge} has several models; add --judge-model NAME")
    if arguments.judge_model and not _is_url(arguments.judge):
        raise UserError("--judge-model: would be ignored, as --judge is not a server; remove it")
    if arguments.judge_key and not _is_url(arguments.judge):
        raise UserError("--judge-key: would be ignored, as --judge is not a server; remove it")
    if arguments.pairwise and arguments.labels:
        raise UserError("--labels: are of scores, and --pairwise gives none; remove one of them")
    found = [rubrics.read(name) for name in arguments.rubric or ["quality"]]
    if twice := {each.name for each in found if [r.name for r in found].count(each.name) > 1}:
        raise UserError(f"--rubric: two have the name {min(twice)!r}; rename one")
    return found


def folder_of(arguments: argparse.Namespace, run: TrainedRun | None) -> Path:
    """Return where what a judge says is kept: with the report, or else beside --output."""
    if folder := report_files.folder_of(arguments.report, run):
        return folder
    if arguments.output:
        return Path(arguments.output).absolute().parent
    what = "what it says is kept beside the results"
    raise UserError(f"--judge: {what}; add --report FOLDER, or evaluate a run directory")


@contextlib.contextmanager
def opened(arguments: argparse.Namespace, run: TrainedRun | None) -> Iterator[Judging]:
    """Open the judge that the options name; without one there is nothing to score.

    Raises UserError for options that do not fit, and for a judge that cannot be asked.
    """
    found = check(arguments)
    if not arguments.judge:
        yield Judging(page_path=arguments.votes_page)
        return
    folder = folder_of(arguments, run)
    given = labels.read(arguments.labels) if arguments.labels else []
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        failures.reraise(exc, f"{folder} cannot be made now")
        raise UserError(
            f"{folder} cannot be made: {exc.strerror}; choose another --report"
        ) from exc
    with contextlib.ExitStack() as stack:
        kept = stack.enter_context(Kept(_opened(arguments, stack), folder, note))
        if arguments.pairwise:
            _votes_in(folder / VOTES)  # raises for a file of something else
            pairwise = [Pairwise(kept, rubric, folder) for rubric in found]
            _ask_for_steps(pairwise)
            yield Judging([], pairwise, folder, [], arguments.votes_page)
        else:
            scorers = [GEval(kept, rubric, folder) for rubric in found]
            _ask_for_steps(scorers)
            yield Judging(scorers, [], folder, given, arguments.votes_page)


def _ask_for_steps(judges: Sequence[GEval | Pairwise]) -> None:
    """Have evaluation steps written before any model answers: a judge that cannot ends it here."""
    for each in judges:
        _ = each.steps


def _votes_in(path: Path) -> list[Vote]:
    return votes.read([str(path)]) if path.exists() else []


def _opened(arguments: argparse.Namespace, stack: contextlib.ExitStack) -> Judge:
    if not _is_url(arguments.judge):
        return LocalJudge(arguments.judge, arguments.trust_remote_code)
    server = Server(arguments.judge, arguments.judge_model, arguments.judge_key)
    return RemoteJudge(stack.enter_context(Client(server, note)))
