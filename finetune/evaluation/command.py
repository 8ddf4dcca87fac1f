"""Compare base and tuned model on the same held-out rows: finetune evaluate."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from finetune import config as configs
from finetune import own_code, places
from finetune.config import paths
from finetune.config.base import model_argument
from finetune.config.kinds import temperature_argument
from finetune.config.own import own_format
from finetune.console import visible
from finetune.data.column_names import FORMATS
from finetune.errors import ConfigError, UserError
from finetune.evaluation import (
    benchmark_options,
    corpus,
    held_out,
    judging,
    output,
    prompting,
    report_files,
    reward_runs,
    scores,
    suites,
    table,
    trained_rows,
    verdict,
)
from finetune.evaluation.answering import Asking, ask, score_references
from finetune.evaluation.benchmark_options import Benches
from finetune.evaluation.candidates import Candidate, candidates, other_argument, prompted
from finetune.evaluation.held_out import Reading
from finetune.evaluation.judging import Judging
from finetune.evaluation.results import BASE, TUNED, Beside, Results
from finetune.evaluation.suites import Suite
from finetune.evaluation.trained_rows import Trained
from finetune.evaluation.trained_run import TrainedRun
from finetune.evaluation.verdict import Verdict
from finetune.export.load import trust_remote_code_argument
from finetune.generation import answers as saved_answers
from finetune.generation import generate
from finetune.generation.answers import Answers
from finetune.generation.completions import Completion, Prompt, Scorer
from finetune.generation.engines import Decoding

ANSWERS = "answers.jsonl"  # in the folder of the report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, at_least = parser.add_argument, generate.at_least
    what = "run directory: compare its model with its base, on rows that it was not trained on"
    add("run", nargs="?", type=paths.argument, metavar="RUN", help=what)
    what = "folder or Hub id of the model before tuning; default: what RUN began with"
    add("--base", type=model_argument, help=what)
    what = "the model after tuning, as runs/<name> or runs/<name>/model; default: that of RUN"
    add("--tuned", type=model_argument, help=what)
    what = "another model on the same rows, as MODEL or NAME=MODEL; may be given several times"
    add("--also", type=other_argument, action="append", metavar="MODEL", default=[], help=what)
    what = "rows to compare on, in any format that training reads; default: those RUN held out"
    add("--data", type=paths.argument, help=what)
    suites.add_arguments(parser)
    what = (
        "format of the rows; auto: from the columns of the first; FILE.py:NAME: a function of your "
        "own, as data.format; default: as RUN read them, or auto"
    )
    shown = "|".join(["auto", *FORMATS, own_code.EXPECTED])
    add("--format", default=None, type=_format, metavar=shown, help=what)
    what = "map columns with other names, as data.columns does"
    add("--columns", type=_mapping, default=None, help=what)
    what = (
        "rows of --data that RUN was trained on, exactly or nearly: leave them out (refuse), or "
        "score with and without them"
    )
    add("--trained-rows", choices=["refuse", "score"], default="refuse", help=what)
    add("--limit", type=at_least(1), default=None, help="use only the first N rows")
    add("--examples", type=at_least(0), default=5, help="rows printed in full")
    scores.add_arguments(parser)
    _add_generation(parser)
    _add_statistics(parser)
    judging.add_arguments(parser)
    benchmark_options.add_arguments(parser)
    what = (
        "also write to this .jsonl file, for each row, what it was (row: file and line; prompt, "
        "wanted), the answers (base, tuned), whether --max-new-tokens cut them (base_cut, "
        "tuned_cut), and the scores (exact_match_base and so on, from 0 to 1)"
    )
    add("--output", default=None, type=paths.argument, help=what)
    report_files.add_arguments(parser)
    trust_remote_code_argument(parser)


def _add_generation(parser: argparse.ArgumentParser) -> None:
    add, at_least = parser.add_argument, generate.at_least
    add("--max-new-tokens", type=at_least(1), default=256, help="longest answer")
    what = "number of answers to generate at once"
    add("--batch-size", type=at_least(1), default=64, help=what)
    what = "sampling temperature; 0: always take the likeliest token"
    add("--temperature", type=temperature_argument, default=0.0, metavar="T", help=what)
    what = "of answers drawn by --temperature, and of the examples of --few-shot"
    add("--seed", type=at_least(0), default=0, help=what)
    what = "ask the base also with N training rows of RUN before each prompt: did it need tuning?"
    add("--few-shot", type=at_least(1), metavar="N", default=None, help=what)
    what = "ask base and tuned model also with the text of this column, such as retrieved passages"
    add("--context", metavar="COLUMN", default=None, help=what)
    what = "score the answers of this answers.jsonl again; asks no model"
    add("--answers", type=paths.argument, metavar="FILE", default=None, help=what)
    what = (
        "environment variable with the key of a server, for a model given as MODEL@URL (default: "
        "OPENAI_API_KEY for OpenAI's own server, none for any other)"
    )
    add("--key", metavar="VARIABLE", default=None, help=what)


def _add_statistics(parser: argparse.ArgumentParser) -> None:
    what = (
        "rows with one value of this column count as one cluster, whose rows say less than as many "
        "others; default: near-duplicates are clusters"
    )
    parser.add_argument("--group", metavar="COLUMN", default=None, help=what)
    what = (
        "the smallest difference that matters to you, in percent: points of scores in percent, of "
        "the base's mean for others; decides when rows are too few to tell"
    )
    parser.add_argument(
        "--smallest-effect", type=_percent, default=verdict.SMALLEST, metavar="PERCENT", help=what
    )


@dataclass(frozen=True)
class Request:
    """What an evaluation compares, on which rows. run: the run that made the tuned model.

    data: None where --benchmarks or --forgetting name all that models are compared on. revision: of
    a base on the Hub.
    """

    base: str
    tuned: str
    data: str | Sequence[str] | None
    reading: Reading
    run: TrainedRun | None = None
    revision: str | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Request":
        """Read the run, if one is named; options replace what it says. Raises UserError."""
        reading, run, revision = Reading(), None, None
        base, tuned, data = arguments.base, arguments.tuned, arguments.data
        if data and arguments.suite:
            raise UserError("--data and --suite both name rows; remove one of them")
        data = data or arguments.suite
        needs_rows = not benchmark_options.are_given(arguments)
        if arguments.run is not None:
            if tuned is not None:
                what = f"the tuned model is that of {arguments.run}"
                raise UserError(f"--tuned: {what}; remove one of them")
            run = TrainedRun.open(arguments.run)
            if base is None:
                base, revision = run.base, run.revision
            tuned = run.model
            if data is None and (needs_rows or run.has_held_out):
                data = run.held_out
            reading = run.reading
        missing = {"--base": base, "--tuned": tuned, **({"--data": data} if needs_rows else {})}
        if absent := [option for option, value in missing.items() if value is None]:
            raise UserError(
                f"name a run, as {places.command()} evaluate runs/my_run, or give also "
                f"{' and '.join(absent)}"
            )
        given = {"format": arguments.format, "columns": arguments.columns}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(base, tuned, data, replace(reading, **given), run, revision)


def main(arguments: argparse.Namespace) -> None:
    """Compare the models on benchmarks, on rows, or on both."""
    if arguments.answers is not None:
        _rescore(arguments)
        return
    if (run := _of_rewards(arguments)) is not None:
        reward_runs.main(run, arguments, _defaults())
        return
    request = Request.of(arguments)
    if request.data is None:
        _require_no_rows_needed(arguments)
    elif arguments.output:
        output.require(Path(arguments.output), request.data)
    report_files.require(arguments, request.run)
    with judging.opened(arguments, request.run) as judges:
        _compare(request, arguments, judges)


def _of_rewards(arguments: argparse.Namespace) -> TrainedRun | None:
    """Return the run to evaluate if its model gives scores, not answers."""
    run = TrainedRun.open(arguments.run) if arguments.run is not None else None
    return run if run is not None and run.gives_scores else None


def _defaults() -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    return parser.parse_args([])


def _compare(request: Request, arguments: argparse.Namespace, judges: Judging) -> None:
    models = candidates(request.base, request.tuned, arguments.also, request.revision)
    benches = Benches.of(arguments)
    rows = _read(request.data, request, arguments) if request.data is not None else None
    compared, beside = None, Beside()
    if benches is not None and saved_answers.share_of_process()[0] == 0:
        compared = benches.compare(models, arguments.trust_remote_code)
        print(visible(compared.text()) + "\n")
        beside = compared.facts
    if rows is not None:
        _compare_on_rows(rows, request, models, arguments, judges, beside)
    elif report_files.folder_of(arguments.report, request.run) and compared is not None:
        settings, run_dir = settings_of(request, arguments), _folder_of(request.run)
        nothing: dict[str, list[Completion]] = {model.name: [] for model in models}
        results = Results([], [], nothing, {}, {}, settings, run_dir, beside)
        found = Verdict("no scores", "only benchmarks were compared, no rows")
        report_files.write(results, found, arguments, request.run)


def _folder_of(run: TrainedRun | None) -> str | None:
    return str(run.path) if run else None


def _require_no_rows_needed(arguments: argparse.Namespace) -> None:
    """Raise UserError for an option about answers, where only benchmarks are asked for."""
    names = "output before next_data fail_under wrong_below scores judge pairwise votes_page"
    for name in names.split():
        if getattr(arguments, name):
            option = "--" + name.replace("_", "-")
            raise UserError(f"{option}: is about answers to rows; give --data, or remove it")


class Rows(NamedTuple):
    """Rows to compare on, which of them were trained on, and what scores the answers."""

    prompts: Sequence[Prompt]
    trained: dict[int, Trained]
    scorers: Sequence[Scorer]


def _read(data: str | Sequence[str], request: Request, arguments: argparse.Namespace) -> Rows:
    suite = suites.read(arguments.suite) if arguments.suite else None
    asked = scores.named(arguments.scores)
    if suite:
        prompts, trained = suite.prompts[: arguments.limit], dict[int, Trained]()
    else:
        prompts = held_out.read(data, request.reading, arguments.limit)
        trained = trained_rows.known(prompts, request.run)
    if arguments.trained_rows == "refuse":
        prompts, trained = trained_rows.refuse(prompts, trained), {}
    return Rows(prompts, trained, scorers_of(suite, asked, prompts))


def _compare_on_rows(
    rows: Rows, request: Request, models: Sequence[Candidate], arguments: argparse.Namespace,
    judges: Judging, beside: Beside,
) -> None:  # fmt: skip
    """Generate, score and print. All models get the same prompts, by the tuned chat template."""
    prompts, trained, _ = rows
    clusters = held_out.grouped(prompts, arguments.group)
    models = prompted(models, _examples(arguments, request), arguments.context)
    report_files.require_scores(arguments, [*rows.scorers, *judges.all_scorers])
    asking = _asking(arguments, request)
    answers = ask(models, prompts, asking)
    if answers is None:  # another process prints
        return
    settings = settings_of(request, arguments)
    run_dir = _folder_of(request.run)
    scorers = [*rows.scorers, *judges.scorers_of(answers)]
    score_references(scorers, models, prompts, asking)
    results = score(prompts, clusters, answers, scorers, settings, run_dir)
    _show(replace(results, beside=beside), trained, request.run, arguments, judges)


def _rescore(arguments: argparse.Namespace) -> None:
    """Score the answers of --answers."""
    given = {"RUN": arguments.run, "--data": arguments.data, "--base": arguments.base,
             "--tuned": arguments.tuned, "--also": arguments.also or None,
             "--suite": arguments.suite, "--benchmarks": arguments.benchmarks or None,
             "--forgetting": arguments.forgetting or None}  # fmt: skip
    if unused := [name for name, value in given.items() if value is not None]:
        raise UserError(f"--answers: {unused[0]} would be ignored; remove one of them")
    if arguments.output:
        output.require(Path(arguments.output), arguments.answers)
    report_files.require(arguments, None)
    asked = scores.named(arguments.scores)
    answers = saved_answers.read(arguments.answers, generate.log)
    prompts = [each.prompt for each in next(iter(answers.values()))][: arguments.limit]
    answers = {name: given[: arguments.limit] for name, given in answers.items()}
    clusters = held_out.grouped(prompts, arguments.group)
    settings = {"answers": arguments.answers} | (
        {"group": arguments.group} if arguments.group else {}
    )
    with judging.opened(arguments, None) as judges:
        scorers = scorers_of(None, asked, prompts)
        report_files.require_scores(arguments, [*scorers, *judges.all_scorers])
        scorers += judges.scorers_of(answers)
        results = score(prompts, clusters, answers, scorers, settings)
        _show(results, {}, None, arguments, judges)


def _show(
    results: Results, trained: dict[int, Trained], run: TrainedRun | None,
    arguments: argparse.Namespace, judges: Judging,
) -> None:  # fmt: skip
    """Print the table and the verdict; write --output and the report."""
    count, clean = len(results.prompts), results
    print(visible(table.text(results, arguments.examples, arguments.max_new_tokens)))
    if more := scores.details(list(results.scorers.values()), results.answers):
        print(visible("\n" + "\n".join(more)))
    if trained and len(trained) < count:
        listed = trained_rows.listing(results.prompts, trained)
        print(visible(f"\nwithout {len(trained):,} rows that were trained on:{listed}"))
        clean = results.subset([row for row in range(count) if row not in trained])
        print(visible(table.text(clean, 0, arguments.max_new_tokens)))
    if of_corpus := corpus.of_results(clean):
        print("", *map(table.of_corpus, of_corpus), sep="\n")
        clean = replace(clean, beside=replace(clean.beside, corpus_scores=of_corpus))
    if lines := list(judges.report(clean)):
        print("", *map(visible, lines), sep="\n")
    if arguments.output:
        output.write(Path(arguments.output), results)
    if BASE in results.models and TUNED in results.models:
        found = verdict.of(clean, smallest=arguments.smallest_effect)
        print(visible(f"\nverdict: {found.sentence}"))
        report_files.write(clean, found, arguments, run)


def settings_of(request: Request, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for, as results.json has it."""
    settings = {
        "base": request.base, "base_revision": request.revision, "tuned": request.tuned,
        "data": request.data,
        "limit": arguments.limit, "max_new_tokens": arguments.max_new_tokens,
        "batch_size": arguments.batch_size, "group": arguments.group,
        "smallest_effect": arguments.smallest_effect, "trained_rows": arguments.trained_rows,
        "scores": arguments.scores, "suite": arguments.suite,
        "judge": arguments.judge, "rubric": arguments.rubric,
        "pairwise": arguments.pairwise or None,
    }  # fmt: skip
    return {name: value for name, value in settings.items() if value is not None}


def scorers_of(
    suite: Suite | None, asked: list[Scorer] | None, prompts: Sequence[Prompt]
) -> list[Scorer]:
    """Return what scores the answers: rules of a suite, and --scores or what fits the rows."""
    if suite:
        return [suite.scorer, *(asked or [])]
    return scores.fitting(prompts) if asked is None else asked


def _asking(arguments: argparse.Namespace, request: Request) -> Asking:
    """Return how models are asked. Raise UserError for processes without a common folder."""
    share = saved_answers.share_of_process()
    folder = report_files.folder_of(arguments.report, request.run)
    if folder is None and share[1] > 1:
        raise UserError(
            f"{share[1]} processes share their answers in a folder; name one with --report"
        )
    saved = Answers(folder / ANSWERS if folder is not None else None, generate.log)
    decoding = Decoding(arguments.max_new_tokens, arguments.temperature, arguments.seed)
    prefix, system = "", None
    if request.run is not None:
        prefix, system = request.run.source_prefix, request.run.system_prompt
    return Asking(
        decoding, arguments.batch_size, arguments.trust_remote_code, system, prefix,
        arguments.key, saved, share,
    )  # fmt: skip


def _examples(arguments: argparse.Namespace, request: Request) -> list[Prompt]:
    """Return the examples of --few-shot, from the rows of the training."""
    if arguments.few_shot is None:
        return []
    if request.run is None:
        raise UserError("--few-shot: the examples are rows that a run was trained on; name the run")
    rows = trained_rows.prompts_of(request.run)
    return prompting.drawn(rows, arguments.few_shot, arguments.seed)


def score(
    prompts: Sequence[Prompt], clusters: Sequence[int], answers: dict[str, list[Completion]],
    scorers: Sequence[Scorer], settings: dict[str, Any], run_dir: str | None = None,
) -> Results:  # fmt: skip
    """Return the results: each answer of each model with each score."""
    by_name = {scorer.name: scorer for scorer in scorers}
    found = scores.of(scorers, answers)
    return Results(prompts, clusters, answers, found, by_name, settings, run_dir)


def _percent(text: str) -> float:
    if re.fullmatch(r"\d+(\.\d+)?", text) and float(text) > 0:
        return float(text)
    raise argparse.ArgumentTypeError(f"should be a number above 0, as 5, got {text!r}")


def _mapping(text: str) -> dict[str, str]:
    """Parse {question: Patient} of the command line."""
    try:
        values = configs.from_yaml(text)
    except yaml.YAMLError as exc:
        raise argparse.ArgumentTypeError(f"cannot be read: {text!r}: {exc}") from exc
    if not isinstance(values, dict):
        raise argparse.ArgumentTypeError(
            f"should be like '{{question: Patient, answer: Doctor}}', got {text!r}"
        )
    return values


def _format(text: str) -> str:
    """Parse a format of rows, or load a function of the user's own."""
    known = ("auto", *FORMATS)
    if text in known:
        return text
    if not own_code.is_own(text):
        raise argparse.ArgumentTypeError(
            f"should be {', '.join(known)} or {own_code.EXPECTED}, got {text!r}"
        )
    try:
        return own_format(own_code.find(text)).name
    except ConfigError as exc:
        raise argparse.ArgumentTypeError(str(exc)) from exc
