"""Prompts with the answers of other rows: what KTO measures its drift from the reference by.

The partner of a document is fixed for the run, by its seed and rows alone: the same at any number
of processes and in every epoch, and never of a row with the same prompt.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from finetune.data.examples import Examples, Ragged
from finetune.errors import DataError

KEY = 0x6B70  # tells this permutation from others of the same seed


def mismatched(examples: Examples, max_length: int, seed: int) -> Examples:
    """Return as many documents, each a prompt of `examples` and the answer of its partner.

    A longer one than `max_length` is cut on the right. Raises DataError if all prompts are equal.
    """
    stream = examples.input
    begins = [
        span.start + int(np.argmax(examples.supervised[span]))
        for span in map(stream.span, range(len(stream.starts)))
    ]
    prompts = [stream.ids[start:begin] for start, begin in zip(stream.starts, begins)]
    if len(set(groups := _groups(prompts))) == 1:
        raise DataError(
            f"{examples.place(0)}: all {len(examples):,} examples have the same prompt, and "
            "objective.loss: kto compares prompts with the answers to others; add rows, or use "
            "objective.loss: apo_zero_unpaired"
        )
    parts, supervised = list[np.ndarray](), list[np.ndarray]()
    for prompt, partner in zip(prompts, partners(groups, seed)):
        answer = slice(begins[partner], stream.ends[partner])
        ids = np.concatenate([prompt, stream.ids[answer]])
        of_answer = [np.zeros(len(prompt), bool), examples.supervised[answer]]
        parts.append(ids[:max_length])
        supervised.append(np.concatenate(of_answer)[:max_length])
    ends = np.cumsum([len(each) for each in parts], dtype=np.int64)
    made = Ragged(np.concatenate(parts), np.concatenate([[0], ends[:-1]]), ends)
    return replace(
        examples, streams={"input": made}, supervised=np.concatenate(supervised), columns={},
        token_columns={}, weights=None,
    )  # fmt: skip


def _groups(prompts: Sequence[np.ndarray]) -> list[int]:
    """Return a number for each prompt, equal for equal ones."""
    known: dict[bytes, int] = {}
    digests = (hashlib.blake2b(each.tobytes(), digest_size=16).digest() for each in prompts)
    return [known.setdefault(digest, len(known)) for digest in digests]


def partners(groups: Sequence[int], seed: int) -> np.ndarray:
    """Return a document of another group for each, int64 [documents].

    Groups stand in random order on a circle; the documents of one take those that follow it, one
    each, as long as there are others. So no answer is taken often, unless one group is large.
    """
    number, size = np.asarray(groups), len(groups)
    rank = np.random.default_rng([seed, KEY]).permutation(number.max() + 1)[number]
    circle = np.argsort(rank, kind="stable")
    counts = np.bincount(rank)
    begin = np.repeat(np.cumsum(counts) - counts, counts)  # of its group, for each place
    length = np.repeat(counts, counts)
    following = begin + length + (np.arange(size) - begin) % (size - length)
    found = np.empty(size, np.int64)
    found[circle] = circle[following % size]
    return found
