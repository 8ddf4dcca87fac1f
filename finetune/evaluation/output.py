"""The file of --output: a line for each row, with what was asked, answered and scored."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from finetune import failures, files
from finetune.data import source_files
from finetune.errors import Outage, UserError
from finetune.evaluation.results import Results

# The beginning of a file of answers: --output replaces no other file.
ANSWERS = re.compile(rb'\{"row": "(?:[^"\\]|\\.)*", "(?:prompt": \[|wanted": ")')


def require(output: Path, data: str | Sequence[str]) -> None:
    """Raise UserError for an output that is an input, holds something else, or is not writable."""
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output: {output}: its folder does not exist; create it")
    if output.is_dir():
        raise UserError(
            f"--output: {output} is a folder; name a file, such as {output / 'answers.jsonl'}"
        )
    names = [data] if isinstance(data, str) else data
    sources = [Path(each) for name in names for each in source_files.expand(name, "--data")[0]]
    for source in sources:
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


def write(output: Path, results: Results) -> None:
    """Write a JSON object for each row. Raises Outage if the disk fails."""
    try:
        files.write_whole(output, lines(results))
    except OSError as exc:
        raise Outage(
            f"--output: {output}: cannot be written: {exc.strerror}; only the table was printed"
        ) from exc


def lines(results: Results) -> str:
    written = []
    for i, prompt in enumerate(results.prompts):
        turns = [{"role": m.role, "content": m.content} for m in prompt.messages]
        for turn, message in zip(turns, prompt.messages):
            turn |= {"context": message.context} if message.context else {}
        line: dict[str, Any] = {
            "row": prompt.place,
            "prompt": turns,
            "wanted": prompt.reference,
            **{name: answers[i].text for name, answers in results.answers.items()},
            **{f"{name}_cut": answers[i].is_cut for name, answers in results.answers.items()},
        }
        for score, by_model in results.scores.items():
            key = score.replace(" ", "_")
            line |= {f"{key}_{name}": given[i].value for name, given in by_model.items()}
        written.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(written)
