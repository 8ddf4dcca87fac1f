"""Compare base and tuned model on the same held-out rows: finetune evaluate."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune import config as configs
from finetune import own_code, places
from finetune.config import paths
from finetune.config.base import model_argument
from finetune.config.own import own_format
from finetune.data.column_names import FORMATS
from finetune.errors import ConfigError, UserError
from finetune.evaluation import (
    held_out,
    judging,
    output,
    report_files,
    scores,
    suites,
    table,
    trained_rows,
    verdict,
)
from finetune.evaluation.candidates import Candidate, candidates, other_argument
from finetune.evaluation.held_out import Reading, note
from finetune.evaluation.judging import Judging
from finetune.evaluation.results import BASE, Results
from finetune.evaluation.suites import Suite
from finetune.evaluation.trained_rows import Trained
from finetune.evaluation.trained_run import TrainedRun
from finetune.export.load import (
    load,
    load_chat_tokenizer,
    load_tokenizer,
    other_base,
    trust_remote_code_argument,
)
from finetune.generation import generate
from finetune.generation.completions import Completion, Prompt, Scorer


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
    add("--max-new-tokens", type=at_least(1), default=256, help="longest answer")
    what = "number of answers to generate at once"
    add("--batch-size", type=at_least(1), default=64, help=what)
    add("--examples", type=at_least(0), default=5, help="rows printed in full")
    scores.add_arguments(parser)
    _add_statistics(parser)
    judging.add_arguments(parser)
    what = (
        "also write to this .jsonl file, for each row, what it was (row: file and line; prompt, "
        "wanted), the answers (base, tuned), whether --max-new-tokens cut them (base_cut, "
        "tuned_cut), and the scores (exact_match_base and so on, from 0 to 1)"
    )
    add("--output", default=None, type=paths.argument, help=what)
    report_files.add_arguments(parser)
    trust_remote_code_argument(parser)


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
    """What an evaluation compares, on which rows. run: the run that made the tuned model."""

    base: str
    tuned: str
    data: str | Sequence[str]
    reading: Reading
    run: TrainedRun | None = None

    @classmethod
    def of(cls, arguments: argparse.Namespace) -> "Request":
        """Read the run, if one is named; options replace what it says. Raises UserError."""
        reading = Reading()
        run = None
        base, tuned, data = arguments.base, arguments.tuned, arguments.data
        if data and arguments.suite:
            raise UserError("--data and --suite both name rows; remove one of them")
        data = data or arguments.suite
        if arguments.run is not None:
            if tuned is not None:
                what = f"the tuned model is that of {arguments.run}"
                raise UserError(f"--tuned: {what}; remove one of them")
            run = TrainedRun.open(arguments.run)
            base, tuned = base or run.base, run.model
            data, reading = data or run.held_out, run.reading
        missing = {"--base": base, "--tuned": tuned, "--data": data}
        if absent := [option for option, value in missing.items() if value is None]:
            raise UserError(
                f"name a run, as {places.command()} evaluate runs/my_run, or give also "
                f"{' and '.join(absent)}"
            )
        given = {"format": arguments.format, "columns": arguments.columns}
        given = {name: value for name, value in given.items() if value is not None}
        return cls(base, tuned, data, replace(reading, **given), run)


def main(arguments: argparse.Namespace) -> None:
    """Generate, score and print. All models get the same prompts, by the tuned chat template."""
    request = Request.of(arguments)
    if arguments.output:
        output.require(Path(arguments.output), request.data)
    report_files.require(arguments, request.run)
    with judging.opened(arguments, request.run) as judges:
        _compare(request, arguments, judges)


def _compare(request: Request, arguments: argparse.Namespace, judges: Judging) -> None:
    models = candidates(request.base, request.tuned, arguments.also)
    suite = suites.read(arguments.suite) if arguments.suite else None
    asked = scores.named(arguments.scores)
    if suite:
        prompts, trained = suite.prompts[: arguments.limit], dict[int, Trained]()
    else:
        prompts = held_out.read(request.data, request.reading, arguments.limit)
        trained = trained_in(prompts, request.run)
    if arguments.trained_rows == "refuse":
        prompts, trained = trained_rows.refuse(prompts, trained), {}
    clusters = held_out.grouped(prompts, arguments.group)
    answers = _answers(models, prompts, arguments)
    settings = settings_of(request, arguments)
    run_dir = str(request.run.path) if request.run else None
    scorers = [*scorers_of(suite, asked, prompts), *judges.scorers_of(answers)]
    results = clean = score(prompts, clusters, answers, scorers, settings, run_dir)
    print(table.text(results, arguments.examples, arguments.max_new_tokens))
    if more := scores.details(scorers, answers):
        print("\n" + "\n".join(more))
    if trained and len(trained) < len(prompts):
        listed = trained_rows.listing(prompts, trained)
        print(f"\nwithout {len(trained):,} rows that were trained on:{listed}")
        clean = results.subset([row for row in range(len(prompts)) if row not in trained])
        print(table.text(clean, 0, arguments.max_new_tokens))
    if lines := list(judges.report(clean)):
        print("", *lines, sep="\n")
    found = verdict.of(clean, smallest=arguments.smallest_effect)
    print(f"\nverdict: {found.sentence}")
    if arguments.output:
        output.write(Path(arguments.output), results)
    report_files.write(clean, found, arguments, request.run)


def settings_of(request: Request, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what was asked for, as results.json has it."""
    settings = {
        "base": request.base, "tuned": request.tuned, "data": request.data,
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


def trained_in(prompts: Sequence[Prompt], run: TrainedRun | None) -> dict[int, Trained]:
    """Return which prompts the run was trained on, or note that its rows cannot be read."""
    if run is None:
        return {}
    try:
        return trained_rows.find(prompts, run)
    except trained_rows.Unread as exc:
        note(f"the rows that {run.path} was trained on cannot be compared with these: {exc}")
        return {}


def score(
    prompts: Sequence[Prompt], clusters: Sequence[int], answers: dict[str, list[Completion]],
    scorers: Sequence[Scorer], settings: dict[str, Any], run_dir: str | None = None,
) -> Results:  # fmt: skip
    """Return the results: each answer of each model with each score."""
    by_name = {scorer.name: scorer for scorer in scorers}
    found = scores.of(scorers, answers)
    return Results(prompts, clusters, answers, found, by_name, settings, run_dir)


def _answers(
    models: Sequence[Candidate], prompts: Sequence[Prompt], arguments: argparse.Namespace
) -> dict[str, list[Completion]]:
    """Return the answers of each model."""
    [tuned] = [each for each in models if each.option == "--tuned"]
    template = load_chat_tokenizer(tuned.model, arguments.trust_remote_code).chat_template
    asked = []
    for each in models:  # before any weights load: a prompt may be wrong
        tokenizer = load_tokenizer(each.model, arguments.trust_remote_code)
        tokenizer.chat_template = template
        conversations = [prompt.conversation for prompt in prompts]
        asked.append((each, tokenizer, generate.prompts_of(tokenizer, conversations)))
    return {
        each.name: _answers_of(each, tuned.model, tokenizer, prompts, texts, arguments)
        for each, tokenizer, texts in asked
    }


def _answers_of(
    candidate: Candidate, tuned: str, tokenizer: Any, prompts: Sequence[Prompt], texts: list[str],
    arguments: argparse.Namespace,
) -> list[Completion]:  # fmt: skip
    trusted = arguments.trust_remote_code
    model = load(candidate.model, trust_remote_code=trusted, base=candidate.base)
    if candidate.name == BASE and (message := other_base(tuned, model)):
        note(message)
    answers = generate.answers(
        model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, texts,
        max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size,
        title=candidate.name,
    )  # fmt: skip
    found = generate.without_opening(tokenizer, [answer.text for answer in answers])
    return [
        Completion(prompt, text, "length" if answer.is_cut else "stop")
        for prompt, answer, text in zip(prompts, answers, found)
    ]


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
