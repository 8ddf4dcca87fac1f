"""Mix sources by weight or tokens: rows of each INPUT in its order, spread evenly over the output.

    finetune data mix chat.jsonl code.jsonl --weights 3,1 --output mixed.jsonl

takes three rows of the first for each row of the second, until one of them has no more. Of a source
that has more rows than needed, those that stay are drawn at random.

    finetune data mix chat.jsonl web.jsonl --token-budgets 1000000,250000 --tokenizer my-model ...

takes whole rows of each, up to that number of tokens: those of a row's text, without template and
special tokens.
"""

import argparse
import random
from collections.abc import Iterator, Sequence
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np

from finetune.config.base import model_argument
from finetune.data.places import Row
from finetune.errors import UserError
from finetune.preparation import frame as frames
from finetune.preparation.frame import Frame


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    what = "weight of each INPUT, as 3,1 (default: by its rows, so that all are taken)"
    add("--weights", type=_weights, metavar="WEIGHTS", help=what)
    what = "tokens of each INPUT at most, as 1000000,250000, in whole rows drawn at random"
    add("--token-budgets", type=_budgets, metavar="TOKENS", help=what)
    what = "model or tokenizer that counts them: a folder, a Hub id, or bytes"
    add("--tokenizer", type=model_argument, metavar="NAME", help=what)
    frames.add_columns(parser, "count the tokens of")
    what = "rows of the output (default: as many as are there without taking one twice)"
    add("--rows", type=frames.positive, metavar="N", help=what)
    what = "take rows several times where a source has too few for --rows"
    add("--repeat", action="store_true", help=what)
    what = "add this column, with the name of the file that a row is from"
    add("--source-column", metavar="NAME", help=what)
    add("--seed", type=int, default=0, help="another seed draws other rows")


def _weights(text: str) -> list[float]:
    try:
        weights = [float(weight) for weight in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(0 < weight < float("inf") for weight in weights):
        raise argparse.ArgumentTypeError(f"{text!r} should be numbers above 0, as 3,1")
    return weights


def _budgets(text: str) -> list[int]:
    return [frames.positive(each) for each in text.split(",")]


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    groups = frame.groups
    _require(arguments, len(groups))
    counts = [sum(1 for _ in frame.rows(group, "counting")) for group in groups]
    if arguments.token_budgets:
        drawn = _by_tokens(frame, counts, arguments)
    else:
        drawn = _by_weight(frame, counts, arguments)
    sizes = [each.size(count) for each, count in zip(drawn, counts)]
    streams = [_rows(frame, group, each) for group, each in zip(groups, drawn)]
    frame.read = sum(counts)
    with frame.writing() as write:
        for source in spread(sizes):
            row = next(streams[source])
            values = dict(row.values)
            if name := arguments.source_column:
                if name in values:
                    what = f"the row has a column {name!r} already; choose another name"
                    raise UserError(f"{row.place}: --source-column: {what}")
                values[name] = frame.shown(row.place.source)
            write(values, row.place)
            frame.changed[f"from {frame.shown(groups[source][0])}"] += 1


class _Drawn(NamedTuple):
    """Which rows of a source are taken: all of them `whole` times, and the chosen once more."""

    whole: int
    chosen: frozenset[int]

    def size(self, count: int) -> int:
        return self.whole * count + len(self.chosen)


def _require(arguments: argparse.Namespace, num_groups: int) -> None:
    """Raise UserError for options that do not go together."""
    for option in ("weights", "token_budgets"):
        given, name = getattr(arguments, option), f"--{option.replace('_', '-')}"
        if given and len(given) != num_groups:
            what = f"{len(given)} {option.partition('_')[2] or option} for {num_groups} inputs"
            raise UserError(f"{name}: {what}; give one for each")
    if arguments.token_budgets and (arguments.weights or arguments.rows):
        raise UserError("--token-budgets says how much to take; remove --weights and --rows")
    if bool(arguments.token_budgets) != bool(arguments.tokenizer):
        raise UserError("--token-budgets and --tokenizer need each other; give both, or neither")
    if arguments.columns and not arguments.token_budgets:
        raise UserError("--columns is for --token-budgets; add them, or remove --columns")


def _by_weight(frame: Frame, counts: Sequence[int], arguments: argparse.Namespace) -> list[_Drawn]:
    """Draw rows of each source by its weight."""
    weights = arguments.weights or [float(count) for count in counts]
    sizes = shares(weights, counts, arguments.rows)
    drawn = []
    for number, (group, size, count) in enumerate(zip(frame.groups, sizes, counts)):
        if size > count and not (arguments.repeat and count):
            what = f"{size:,} rows are wanted of {frame.shown(group[0])}, which has {count:,}"
            raise UserError(f"{what}; take fewer --rows, change --weights, or add --repeat")
        whole, rest = divmod(size, max(1, count))
        source = random.Random(f"{arguments.seed} {number}")
        drawn.append(_Drawn(whole, frozenset(source.sample(range(count), rest))))
    return drawn


def _by_tokens(frame: Frame, counts: Sequence[int], arguments: argparse.Namespace) -> list[_Drawn]:
    """Draw whole rows of each source up to its budget of tokens."""
    from finetune.preparation import token_counts

    drawn = []
    for number, (group, budget) in enumerate(zip(frame.groups, arguments.token_budgets)):
        shown = frame.shown(group[0])
        tokens = token_counts.of_rows(frame, group, arguments.tokenizer)
        total = int(tokens.sum())
        whole, rest = divmod(budget, max(1, total))
        if whole and not arguments.repeat:
            whole, rest = 1, 0
        order = random.Random(f"{arguments.seed} {number}").sample(range(len(tokens)), len(tokens))
        fits = np.searchsorted(np.cumsum(tokens[order]), rest, side="right") if rest else 0
        each = _Drawn(whole, frozenset(order[: int(fits)]))
        if not each.size(counts[number]):
            first = f"the first of its {len(tokens):,} rows to be drawn has {tokens[order[0]]:,}"
            what = f"{budget:,} tokens of {shown} are too few, as {first}"
            raise UserError(f"--token-budgets: {what}; raise it, or leave out the source")
        if total < budget and not arguments.repeat:
            frame.note(
                f"{shown} has {total:,} tokens, less than its budget: all its rows are taken"
            )
        frame.changed[f"tokens from {shown}"] = whole * total + int(tokens[list(each.chosen)].sum())
        drawn.append(each)
    return drawn


def shares(weights: Sequence[float], counts: Sequence[int], rows: int | None) -> list[int]:
    """Return how many rows each source gives: `rows` in all, or as many as none gives twice."""
    total = sum(weights)
    if rows is None:
        most = min(count / weight for count, weight in zip(counts, weights))
        return [round(weight * most) for weight in weights]
    exact = [rows * weight / total for weight in weights]
    sizes = [int(size) for size in exact]
    by_rest = sorted(range(len(sizes)), key=lambda source: sizes[source] - exact[source])
    for source in by_rest[: rows - sum(sizes)]:
        sizes[source] += 1
    return sizes


def spread(sizes: Sequence[int]) -> Iterator[int]:
    """Yield the number of a source for each row: at each place the one that is furthest behind."""
    total, given = sum(sizes), [0] * len(sizes)
    for place in range(1, total + 1):
        behind = [size * place - done * total for size, done in zip(sizes, given)]
        source = behind.index(max(behind))
        given[source] += 1
        yield source


def _rows(frame: Frame, group: list[str], drawn: _Drawn) -> Iterator[Row]:
    """Yield the rows that are drawn, in their order: all, as often as they are, then the others."""
    yield from chain.from_iterable(frame.rows(group, "mixing") for _ in repeat(None, drawn.whole))
    if drawn.chosen:
        for number, row in enumerate(frame.rows(group, "mixing")):
            if number in drawn.chosen:
                yield row
