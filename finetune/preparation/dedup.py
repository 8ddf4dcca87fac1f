"""Remove rows that are the same as another row, or nearly the same.

Exact duplicates have the same text, apart from spaces around it. Near-duplicates share at least
--threshold of all runs of three words that either has (Jaccard similarity), without case and
punctuation; rows that are connected by such pairs are one cluster, and one row of it stays.
"""

import argparse
import contextlib
from collections import Counter, deque
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from hashlib import blake2b

from finetune.data import clusters
from finetune.data.clusters import Fingerprints
from finetune.data.places import Place, Row, short
from finetune.errors import DataError
from finetune.preparation import frame as frames
from finetune.preparation import texts, workers
from finetune.preparation.frame import Frame

EXACT, NEAR = "exact duplicate", "near-duplicate"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    frames.add_inputs(parser)
    frames.add_output(parser)
    frames.add_rejects(parser)
    frames.add_columns(parser, "compare")
    what = "similarity from which two rows are near-duplicates"
    add("--threshold", type=frames.fraction, default=clusters.THRESHOLD, help=what)
    add("--exact", action="store_true", help="remove exact duplicates only")
    what = "which row of a cluster stays: its first, or the best by --by"
    add("--keep", choices=("first", "best"), default="first", help=what)
    what = "column of numbers: the highest is the best (default: the longest text)"
    add("--by", metavar="COLUMN", help=what)
    frames.add_workers(parser)


def main(frame: Frame, arguments: argparse.Namespace) -> None:
    seen = _Seen(arguments.keep == "best", arguments.by)
    found = seen.texts(frame)
    labels = exact = seen.firsts
    if arguments.exact:
        deque(found, maxlen=0)
    else:
        prints = fingerprints(found, arguments.threshold, arguments.workers)
        labels = clusters.clusters(prints, arguments.threshold).tolist() if prints else []
    merit = seen.merit if arguments.keep == "best" else None
    stays, stays_of_equal = _staying(labels, merit), _staying(exact, merit)
    frame.details["largest_clusters"] = _largest(labels)
    with frame.writing() as write:
        for number, row in enumerate(frame.rows(title="writing")):
            if stays[number] == number:
                write(row.values, row.place)
                continue
            reason = EXACT if stays_of_equal[number] != number else NEAR
            frame.drop(row, reason, kept=frame.shown(seen.places[stays[number]]))


class _Seen:
    """What a first reading of the rows notes of each."""

    def __init__(self, with_merit: bool, by: str | None) -> None:
        self.firsts: list[int] = []
        """The first row with the same text."""
        self.places: list[Place] = []
        self.merit: list[float] = []
        """How good a row is, if asked for."""
        self._with_merit, self._by = with_merit, by

    def texts(self, frame: Frame) -> Iterator[str]:
        """Yield the text of each row."""
        known: dict[bytes, int] = {}
        for number, row in enumerate(frame.rows(title="comparing")):
            text = texts.text_of(row.values, frame.columns)
            key = blake2b(text.strip().encode("utf-8", "surrogatepass"), digest_size=16).digest()
            self.firsts.append(known.setdefault(key, number))
            self.places.append(row.place)
            if self._with_merit:
                self.merit.append(_merit(row, text, self._by))
            yield text


def _merit(row: Row, text: str, column: str | None) -> float:
    if column is None:
        return len(text)
    value = row.values.get(column)
    with contextlib.suppress(TypeError, ValueError):
        return float(value)  # type: ignore[arg-type]
    what = f"--by: column {short(column)!r} should be a number, got {short(value)}"
    raise DataError(f"{row.place}: {what}; correct it, or leave out the row")


def fingerprints(found: Iterable[str], threshold: float, count: int) -> Fingerprints | None:
    """Fingerprint texts in `count` processes; None without texts."""
    make = partial(partial, clusters.fingerprint, threshold=threshold)
    parts = list(workers.mapped(make, workers.chunks(found), count))
    return Fingerprints.joined(parts) if parts else None


def _staying(labels: Sequence[int], merit: Sequence[float] | None) -> Sequence[int]:
    """Return the row that stays of each row's cluster: its first, or the first of its best."""
    if merit is None:
        return labels
    best: dict[int, int] = {}
    for number, label in enumerate(labels):
        if label not in best or merit[number] > merit[best[label]]:
            best[label] = number
    return [best[label] for label in labels]


def _largest(labels: Sequence[int], most: int = 10) -> list[int]:
    """Return the sizes of the largest clusters of at least two rows."""
    return [size for _, size in Counter(labels).most_common(most) if size > 1]
