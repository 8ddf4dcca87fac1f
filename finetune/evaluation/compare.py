"""Compare base and tuned model on the same held-out rows."""

import argparse
import json
import os
import re
import sys
from collections import Counter
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
import yaml

from finetune import config as configs
from finetune import failures, files, own_code
from finetune.config import paths
from finetune.config.base import model_argument, require_model
from finetune.config.own import own_format
from finetune.data import clusters, rows, source_files
from finetune.data.column_names import FORMATS
from finetune.data.conversations import Conversation
from finetune.data.places import list_columns
from finetune.data.problems import Problems
from finetune.errors import ConfigError, DataError, Outage, UserError
from finetune.evaluation import scores, statistics
from finetune.export.load import (
    load,
    load_chat_tokenizer,
    load_tokenizer,
    moved,
    other_base,
    require_base,
    trust_remote_code_argument,
)
from finetune.generation import generate
from finetune.generation.generate import Answer

# The beginning of a file of answers: --output replaces no other file.
ANSWERS = re.compile(rb'\{"row": "(?:[^"\\]|\\.)*", "(?:prompt": \[|wanted": ")')


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, at_least = parser.add_argument, generate.at_least
    what = "folder or Hub id of the model before tuning"
    add("--base", required=True, type=model_argument, help=what)
    what = "the model after tuning, as runs/<name> or runs/<name>/model"
    add("--tuned", required=True, type=model_argument, help=what)
    what = "held-out rows, in any format that training reads"
    add("--data", required=True, type=paths.argument, help=what)
    what = (
        "format of the rows; auto: from the columns of the first; FILE.py:NAME: a function of your "
        "own, as data.format"
    )
    shown = "|".join(["auto", *FORMATS, own_code.EXPECTED])
    add("--format", default="auto", type=_format, metavar=shown, help=what)
    what = "map columns with other names, as data.columns does"
    add("--columns", type=_mapping, default={}, help=what)
    add("--limit", type=at_least(1), default=None, help="use only the first N rows")
    add("--max-new-tokens", type=at_least(1), default=256, help="longest answer")
    what = "number of answers to generate at once"
    add("--batch-size", type=at_least(1), default=64, help=what)
    add("--examples", type=at_least(0), default=5, help="rows printed in full")
    what = (
        "also write to this .jsonl file, for each row, what it was (row: file and line; prompt, "
        "wanted), the answers (base, tuned), whether --max-new-tokens cut them (base_cut, "
        "tuned_cut), and the scores (exact_match_base and so on, from 0 to 1)"
    )
    add("--output", default=None, type=paths.argument, help=what)
    trust_remote_code_argument(parser)


def main(arguments: argparse.Namespace) -> None:
    """Generate, score and print. Both models get the same prompts, by the tuned chat template."""
    if arguments.output:
        require_output(Path(arguments.output), arguments.data)
    for option in ("base", "tuned"):
        require_model(getattr(arguments, option), f"--{option}")
    moved_base = moved(arguments.tuned, arguments.base)
    if same_model(arguments.base, arguments.tuned):
        _note("--base and --tuned are the same model")
    elif moved_base:
        require_base(arguments.base)
    conversations = read(arguments.data, arguments.format, arguments.columns, arguments.limit)
    tokenizer = load_chat_tokenizer(arguments.tuned, arguments.trust_remote_code)
    wanted = [conversation.messages[-1].content for conversation in conversations]
    of_base = load_tokenizer(arguments.base, arguments.trust_remote_code)
    of_base.chat_template = tokenizer.chat_template
    asked, by_base = (generate.prompts_of(each, conversations) for each in (tokenizer, of_base))
    given = {
        "base": _answers("base", of_base, by_base, arguments),
        "tuned": _answers("tuned", tokenizer, asked, arguments, moved_base),
    }
    results = {
        score: {
            name: [rule(a.text, w) for a, w in zip(answers, wanted)]
            for name, answers in given.items()
        }
        for score, rule in scores.SCORES.items()
    }
    shown, max_new_tokens = arguments.examples, arguments.max_new_tokens
    print(report(conversations, wanted, given, results, shown, max_new_tokens))
    if arguments.output:
        lines = as_lines(conversations, wanted, given, results)
        try:
            files.write_whole(Path(arguments.output), lines)
        except OSError as exc:
            raise Outage(
                f"--output: {arguments.output}: cannot be written: {exc.strerror}; only the table "
                "was printed"
            ) from exc


def _answers(
    name: str, tokenizer: Any, prompts: list[str], arguments: argparse.Namespace,
    moved_base: str | None = None,
) -> list[Answer]:  # fmt: skip
    """Return the answers of one of the two models, --base or --tuned."""
    trusted = arguments.trust_remote_code
    model = load(getattr(arguments, name), trust_remote_code=trusted, base=moved_base)
    if name == "base" and (note := other_base(arguments.tuned, model)):
        _note(note)
    answers = generate.answers(
        model.to("cuda" if torch.cuda.is_available() else "cpu"), tokenizer, prompts,
        max_new_tokens=arguments.max_new_tokens, batch_size=arguments.batch_size, title=name,
    )  # fmt: skip
    texts = generate.without_opening(tokenizer, [answer.text for answer in answers])
    return [replace(answer, text=text) for answer, text in zip(answers, texts)]


def require_output(output: Path, data: str) -> None:
    """Raise UserError for an output that is an input, holds something else, or is not writable."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: {output}: its folder does not exist; create it")
    if output.is_dir():
        raise UserError(
            f"--output: {output} is a folder; name a file, such as {output / 'answers.jsonl'}"
        )
    for source in map(Path, source_files.expand(data, "--data")[0]):
        is_same = output.exists() and source.exists() and output.samefile(source)
        if is_same or (source.is_dir() and source.resolve() in output.resolve().parents):
            raise UserError(
                f"--output: {output} is a part of --data, which it would overwrite; choose another "
                "name"
            )
    try:
        files.require_writable(output)
        start = b""
        if output.is_file():
            with output.open("rb") as file:
                start = file.read(1 << 16)
    except OSError as exc:
        failures.reraise(exc, f"--output: {output}: cannot be written now")
        raise UserError(
            f"--output: {output}: cannot be written: {exc.strerror}; choose another place"
        ) from exc
    if start and not ANSWERS.match(start):
        raise UserError(
            f"--output: {output} exists, and evaluate did not write it, so it is not replaced; "
            "choose another name, or remove it"
        )


def same_model(one: str, other: str) -> bool:
    """Return whether two names are one model: the same folder, or one name on the Hub."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return one == other


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


def read(
    source: str, format: str, columns: dict[str, str], limit: int | None
) -> list[Conversation]:
    """Return the rows of a file, folder, glob or Hub name. Raise DataError that lists wrong ones.

    Each row ends with an answer.
    """
    found, notes = source_files.expand(source, "--data")
    for note in notes:
        _note(note)
    problems, unread = Problems(), Counter[str]()
    if columns and own_code.is_own(format):
        raise UserError(
            "--columns: would be ignored: the function of --format reads the columns itself; "
            "remove it"
        )
    try:
        if format == "auto":
            format = rows.detect_format(found, "line", columns, for_training=False)
        stream = rows.samples(
            found, format, columns, "line", None, problems, unread, for_training=False
        )
        samples = list(islice(stream, limit))
        problems.raise_if_any()
    except UserError as exc:  # its message names settings of the run config
        message = str(exc).replace("data.columns", "--columns").replace("data.format", "--format")
        raise type(exc)(message) from exc
    if problems.num_empty:
        skipped = "1 empty row" if problems.num_empty == 1 else f"{problems.num_empty:,} empty rows"
        _note(f"{skipped} skipped")
    if problems.num_skipped:
        _note(f"--format skips {problems.num_skipped:,} of {problems.num_rows:,} rows")
    if unread:
        listed = list_columns(sorted(unread))
        _note(f"not read: columns {listed}; every answer counts as correct")
    read = [conversation for sample in samples for conversation in sample.conversations]
    if len(read) > len(samples):
        several = next(each.conversations[0] for each in samples if len(each.conversations) > 1)
        raise DataError(
            f"{several.place}: --format gives several documents, of which evaluate cannot compare "
            "one answer; write a function for it that returns the one to compare with"
        )
    if without := next((c for c in read if c.messages[-1].role != "assistant"), None):
        raise DataError(f"{without.place}: has no answer to compare with")
    if calling := next((c for c in read if c.messages[-1].has_calls), None):
        raise DataError(
            f"{calling.place}: ends with tool calls, and evaluate compares the text of answers; "
            "leave out rows that end so"
        )
    return read


def report(
    conversations: list[Conversation], wanted: list[str], given: dict[str, list[Answer]],
    results: dict[str, Any], shown: int, max_new_tokens: int,
) -> str:  # fmt: skip
    """Return the table and the first examples, as text."""
    groups = clusters.of_texts(map(_text, conversations)).tolist()
    alike = f", in {len(set(groups))} clusters of near-duplicates"
    lines = [
        f"{len(wanted)} held-out {'row' if len(wanted) == 1 else 'rows'}"
        + alike * (len(set(groups)) < len(groups)),
        f"{'':<16}{'base':>8}{'tuned':>8}   gain, 95% interval over the rows",
    ]
    for score, by_model in results.items():
        base, tuned = (100 * sum(by_model[name]) / len(wanted) for name in ("base", "tuned"))
        found = statistics.difference(by_model["base"], by_model["tuned"], groups)
        within = "too few rows for an interval"
        if found.low is not None and found.high is not None:
            within = f"{100 * found.low:+.1f} to {100 * found.high:+.1f}"
        lines.append(f"{score:<16}{base:>7.1f}%{tuned:>7.1f}%   {tuned - base:+.1f} ({within})")
    cut = {name: sum(answer.is_cut for answer in answers) for name, answers in given.items()}
    if any(cut.values()):
        lines.append(
            f"{'cut':<16}{cut['base']:>8}{cut['tuned']:>8}   answers not ended after "
            f"{max_new_tokens} tokens, and scored as they are; raise --max-new-tokens"
        )
    shown_rows = zip(conversations, wanted, given["base"], given["tuned"])
    for conversation, right, base, tuned in islice(shown_rows, shown):
        lines += [
            "",
            f"prompt  {_line(conversation.messages[-2].content)}",
            f"wanted  {_line(right)}",
            f"base    {_line(base.text)}" + (" [cut]" if base.is_cut else ""),
            f"tuned   {_line(tuned.text)}" + (" [cut]" if tuned.is_cut else ""),
        ]
    return "\n".join(lines)


def as_lines(
    conversations: list[Conversation],
    wanted: list[str],
    given: dict[str, list[Answer]],
    results: dict[str, Any],
) -> str:
    """Return the content of --output: a JSON object for each row."""
    written = []
    for i, conversation in enumerate(conversations):
        prompt = [{"role": m.role, "content": m.content} for m in conversation.messages[:-1]]
        for turn, message in zip(prompt, conversation.messages):
            turn |= {"context": message.context} if message.context else {}
        line = {
            "row": str(conversation.place),
            "prompt": prompt,
            "wanted": wanted[i],
            **{name: answers[i].text for name, answers in given.items()},
            **{f"{name}_cut": answers[i].is_cut for name, answers in given.items()},
        }
        for score, by_model in results.items():
            line |= {f"{score.replace(' ', '_')}_{name}": by_model[name][i] for name in given}
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(written)


def _text(conversation: Conversation) -> str:
    return "\n".join(f"{m.content}\n{m.context}" for m in conversation.messages)


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr)


def _line(text: str, width: int = 100) -> str:
    text = text.strip().replace("\n", "\\n")
    return text if len(text) <= width else text[:width] + "..."
