"""Multiple choice from local files, scored by the log-probability of each choice.

Prompt, delimiter, tokens and accuracies are those of lm-evaluation-harness; models read each
question once for all its choices (`continuations.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import jinja2
import jinja2.sandbox
import numpy as np

from finetune.data import clusters, formats, preferences, readers, source_files
from finetune.data.places import Row, list_columns, printable, short
from finetune.data.problems import Problems
from finetune.errors import DataError, ModelError, UserError
from finetune.evaluation import continuations
from finetune.evaluation.continuations import Continuations
from finetune.evaluation.measures import Measure
from finetune.generation import generate

DELIMITER = " "
"""Stands between a question and each choice."""
SHOTS = "\n\n"
"""Stands between solved examples and the question."""
CHOICES = frozenset(preferences.CHOICES)
# What models are asked, by the first of these columns that a row has.
PROMPTS = {
    "question": "Question: {}\nAnswer:", "query": "{}", "ctx": "{}", "prompt": "{}",
    "instruction": "{}",
}  # fmt: skip
_ASKS = re.compile(r"Question:.*[^:\s]\s*", re.DOTALL)
_MAPPED = re.compile(r"map it with data\.columns, \{(\w+): NAME\}")


@dataclass(frozen=True)
class Item:
    """A question as the model reads it, its choices, and the number of the right one.

    before: solved examples that stand before the question.
    """

    place: str
    context: str
    choices: tuple[str, ...]
    gold: int
    before: str = ""

    @property
    def solved(self) -> str:
        """Return the question with the right choice, as an example for others."""
        return f"{self.context}{DELIMITER}{self.choices[self.gold]}"


@dataclass(frozen=True)
class Benchmark:
    name: str
    items: Sequence[Item]

    def clusters(self) -> list[int]:
        """Return the cluster of near-duplicates of each item."""
        texts = (f"{item.context}\n{' '.join(item.choices)}" for item in self.items)
        return [int(each) for each in clusters.of_texts(texts)]

    @property
    def chance(self) -> float:
        """Return the accuracy of guessing."""
        return sum(1 / len(item.choices) for item in self.items) / len(self.items)


# ----------------------------------------------------------------------------------------- reading


def read(
    source: str, *, prompt: str | None = None, limit: int | None = None,
    shots: Sequence[Item] = (), option: str = "--benchmarks",
) -> Benchmark:  # fmt: skip
    """Return the items of a file, folder, glob or Hub name. Raise DataError that lists wrong rows.

    prompt: a Jinja template over the columns of a row, as doc_to_text of lm-evaluation-harness.
    shots: solved examples that stand before each question.
    """
    template = None if prompt is None else _template(prompt)
    before = "".join(item.solved + SHOTS for item in shots)
    problems, items = Problems(), list[Item]()
    for file in source_files.expand(source, option)[0]:
        for record in islice(readers.records(file), limit):
            problems.num_rows += 1
            if isinstance(record, DataError):
                problems.note(str(record))
            elif not readers.is_empty(record):
                with problems.noted(record):
                    items.append(_item(record, template, before))
    problems.raise_if_any()
    if not items:
        raise DataError(f"{option}: {printable(source)} holds no rows")
    name = re.sub(r"\.\w+$", "", Path(source.rstrip("/")).name) or source
    return Benchmark(name, items[:limit])


def _template(text: str) -> jinja2.Template:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True
    )
    try:
        return environment.from_string(text)
    except jinja2.TemplateSyntaxError as exc:
        raise UserError(
            f"--benchmark-prompt: {short(text)}: {exc.message}; write columns as "
            "'Question: {{question}}\\nAnswer:'"
        ) from exc


def _item(row: Row, template: jinja2.Template | None, before: str) -> Item:
    column = next((name for name in PROMPTS if name in row.values), None)
    try:
        choices, gold, _ = preferences.choices_of(row, {}, {column} if column else ())
    except DataError as exc:
        raise DataError(_MAPPED.sub(r"name the column that has it \1", str(exc))) from exc
    for number, choice in enumerate(choices, 1):
        formats.require_unicode(f"{row.place}: choice {number}", choice)
    if template is not None:
        context = _rendered(row, template)
    elif column is None:
        raise DataError(
            f"{row.place}: no question; this row has {list_columns(sorted(row.values))}; name its "
            f"column {', '.join(PROMPTS)}, or give --benchmark-prompt"
        )
    else:
        context = PROMPTS[column].format(formats.cell(row, column))
        if _ASKS.fullmatch(context):
            context = f"{context.rstrip()}\nAnswer:"
    return Item(str(row.place), context, tuple(choices), gold, before)


def _rendered(row: Row, template: jinja2.Template) -> str:
    try:
        text = template.render(**row.values)
    except Exception as exc:  # an expression of the user's
        raise DataError(
            f"{row.place}: --benchmark-prompt cannot be filled in: {exc}; this row has "
            f"{list_columns(sorted(row.values))}"
        ) from exc
    if not text.strip():
        raise DataError(f"{row.place}: --benchmark-prompt gives an empty question for this row")
    formats.require_unicode(f"{row.place}: --benchmark-prompt", text)
    return text


# ----------------------------------------------------------------------------------------- scoring


def logprobs(benchmark: Benchmark, scorer: Continuations, tokenizer: Any) -> list[np.ndarray]:
    """Return the log-probability of each choice of each item, in nats.

    Raises DataError for choices that are longer than what the model reads at once, and ModelError
    for a model whose logits are NaN.
    """
    pairs = [
        (item.before + item.context, DELIMITER + choice)
        for item in benchmark.items
        for choice in item.choices
    ]
    requests = continuations.encode(tokenizer, pairs)
    places = [item.place for item in benchmark.items for _ in item.choices]
    problems = Problems()
    for place, request, (_, choice) in zip(places, requests, pairs):
        if len(request.continuation) > scorer.max_length:
            problems.note(
                f"{place}: a choice has {len(request.continuation):,} tokens, and this model reads "
                f"{scorer.max_length:,} at once: {short(choice)}; shorten it or remove the row"
            )
        elif not request.continuation:
            problems.note(
                f"{place}: a choice has no tokens of its own in this model: {short(choice)}; "
                "change it or remove the row"
            )
    problems.num_rows = len(benchmark.items)
    problems.raise_if_any()
    sums = [each.logprob for each in scorer(requests, title=benchmark.name)]
    if np.isnan(sums).any():
        row = places[int(np.isnan(sums).argmax())]
        raise ModelError(f"{row}: {generate.NOT_FINITE}")
    found = iter(sums)
    return [np.array([next(found) for _ in item.choices]) for item in benchmark.items]


def accuracies(items: Sequence[Item], found: Sequence[np.ndarray]) -> dict[str, list[float]]:
    """Return for each accuracy whether each item is right, 1 or 0.

    acc: the likeliest choice; acc_norm: by log-probability per letter; acc_bytes: per byte of
    UTF-8, given where a choice has letters of several bytes. Of equal choices the first counts.
    """
    lengths = {
        "acc": lambda choice: 1.0, "acc_norm": lambda choice: float(len(choice)),
        "acc_bytes": lambda choice: float(len(choice.encode())),
    }  # fmt: skip
    if all(choice.isascii() for item in items for choice in item.choices):
        del lengths["acc_bytes"]
    return {
        name: [
            float(np.argmax(sums / np.array([length(c) for c in item.choices])) == item.gold)
            for item, sums in zip(items, found)
        ]
        for name, length in lengths.items()
    }


def measures(benchmark: Benchmark, found: Mapping[str, Sequence[np.ndarray]]) -> list[Measure]:
    """Return the accuracies of all models. `found`: model -> log-probabilities of the choices."""
    by_model = {model: accuracies(benchmark.items, each) for model, each in found.items()}
    groups, names = benchmark.clusters(), next(iter(by_model.values()))
    return [
        Measure(
            benchmark.name, name, {model: each[name] for model, each in by_model.items()}, groups,
            chance=benchmark.chance,
        )
        for name in names
    ]  # fmt: skip
