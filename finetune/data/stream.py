"""Sequences and examples of rows that do not fit into memory, by the faces of those that do.

An example's number is that of its shard and its own in the shard; shards are opened as steps come
to them, and the last few stay open.
"""

import math
import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from finetune import files
from finetune.data import examples as entries
from finetune.data import layout, shards, windows
from finetune.data.building import POLL_SECONDS, Building
from finetune.data.examples import Examples
from finetune.data.layout import MEMBERS, SEQUENCES, Layout
from finetune.data.order import Sequences
from finetune.data.places import Place
from finetune.data.shards import Recipe
from finetune.data.views import Document
from finetune.errors import DataError, Outage

MOST_OPEN = 64  # shards: of short rows 70 MB if all of them were read
SHARD = 32  # bits of an example's number below that of its shard
ATTEMPTS = 5  # to open a shard that other processes may remove as soon as it is fetched
SOME = 100_000  # examples that stand for all where only the shape of lengths counts


class OpenShards:
    """The shards of a stream by number; the last ones that were read stay open."""

    def __init__(self, recipe: Recipe, laid_out: Layout, building: Building | None = None) -> None:
        """`building`: who makes the shards that are not there yet; None: all are there."""
        self.recipe, self.laid_out, self.building = recipe, laid_out, building
        self._key, self._sources = recipe.key, list(recipe.sources)
        self._open: OrderedDict[int, Sequences] = OrderedDict()
        self._checked: set[int] = set()
        self._lock = threading.Lock()  # batches are made on a thread
        self.store = recipe.store(self._key)
        self._entered: set[int] = set()

    def __getitem__(self, number: int) -> Sequences:
        """Return the examples of a shard as sequences of one each. Raise Outage for damage."""
        with self._lock:
            found = self._open.pop(number, None)
            if found is None:
                found = Sequences(self._opened(number), packing=False, max_length=0, seed=0)
            self._open[number] = found
            while len(self._open) > MOST_OPEN:
                self._open.popitem(last=False)
            return found

    def grow(self) -> None:
        """Wait a moment for more shards. Raise what keeps them from being made."""
        assert self.building
        time.sleep(POLL_SECONDS)
        with self._lock:
            self.laid_out.refresh()
        self.building.check(self.laid_out)

    def enter(self, numbers: Sequence[int]) -> None:
        """Fetch these shards from the store in the background; others may go from this machine."""
        if self.store is None or self._entered.issuperset(numbers):
            return
        self._entered = set(numbers)
        lines = {self.folder(number).name: self.laid_out.lines[number] for number in numbers}
        self.store.trim({name: line["bytes"] for name, line in lines.items()})
        self.store.prefetch((name, line["meta"]) for name, line in lines.items())

    def folder(self, number: int) -> Path:
        """Return the folder of a shard's entry."""
        return self.recipe.root / self._key / shards.entry_name(self._key, number)

    def rejects(self, number: int) -> Path:
        """Return the file of a shard's wrong rows; a copy where the shard itself may go."""
        path = self.folder(number) / entries.REJECTS
        return self.store.fetch_file(path) if self.store else path

    def _opened(self, number: int) -> Examples:
        """Open a shard; this process checks the hashes of each once."""
        folder = self.folder(number)
        for _ in range(ATTEMPTS):
            if (found := self._found(number, folder)) is not None:
                self._checked.add(number)
                return replace(found, view=self.recipe.view)
            if self.store is None or folder.exists():
                break  # damaged; else another process has removed it to make room
        raise Outage(
            f"data.cache_dir: {folder} is damaged; remove it, and run the same command again: "
            "it will be made anew"
        )

    def _found(self, number: int, folder: Path) -> Examples | None:
        """Open a shard; None if it is damaged or gone."""
        meta, is_new = self.laid_out.lines[number]["meta"], number not in self._checked
        if self.store:
            self.store.fetch(folder.name, meta)
        try:
            if self.store:
                os.utime(folder)  # the least recently used goes first
            found = entries.opened(folder, self._sources, folder.name, note=True, check=is_new)
            if found is None or (is_new and files.sha256(folder / entries.META) != meta):
                return None
        except FileNotFoundError:
            return None
        if is_new:  # hashing has read all of it into the memory of this process
            found = entries.opened(folder, self._sources, folder.name, check=False)
        return found


class StreamedExamples:
    """The examples of one part of a stream: facts from the lines of its layout, and places."""

    token_columns: Mapping[str, np.ndarray] = MappingProxyType({})

    def __init__(self, opened: OpenShards, part: str) -> None:
        self.opened, self.part = opened, part
        self.laid_out, recipe = opened.laid_out, opened.recipe
        self.sources = list(recipe.sources)
        self.fingerprint = f"{recipe.fingerprint}:{part}"
        self.learn_opening = recipe.template.learn_opening
        self.view = recipe.view
        self.labels = list(recipe.options.labels)
        counts = [line["counts"] for line in self.laid_out.lines]
        for name in shards.COUNTED:
            setattr(self, name, sum(each[name] for each in counts))
        self.unread, self.repairs, self.bad = (
            dict(sum((Counter(each[name]) for each in counts), Counter[str]()))
            for name in ("unread", "repairs", "bad")
        )
        names: list[str] = next((each["columns"] for each in counts if each["columns"]), [])
        ranges = [line["weights"] for line in self.laid_out.lines if line["weights"]]
        if ranges and len(ranges) < len(counts):
            ranges.append([1.0, 1.0])  # of shards whose rows give none
        least, most = zip(*ranges) if ranges else ((), ())
        self.weight_range = (min(least), max(most)) if ranges else None
        self.columns = {name: np.zeros(0, np.float32) for name in names}

    def require_same_kind(self) -> None:
        """Raise DataError if rows that came later have what the first ones lack."""
        for line in self.laid_out.lines:
            names = line["counts"]["columns"]
            has_weights = bool(line["weights"]) and self.weight_range is None
            if has_weights or (names and names != list(self.columns)):
                what = "weights" if has_weights else f"fields {', '.join(names)}"
                raise DataError(
                    f"data.train: later rows have {what}, which the rows that training started "
                    "with lack; remove train.max_steps or data.window_gb, under another run.name"
                )

    num_rows: int
    num_truncated: int
    num_dropped: int
    num_empty: int
    num_skipped: int

    def __len__(self) -> int:
        return self.laid_out.count(self.part, "examples")

    @property
    def num_distinct_rows(self) -> int:
        """Return how many rows these examples come from."""
        return self.laid_out.count(self.part, "rows")

    @property
    def num_tokens(self) -> int:
        return self.laid_out.count(self.part, "input_tokens")

    @property
    def num_supervised_tokens(self) -> int:
        return self.laid_out.count(self.part, "tokens")

    @property
    def reject_files(self) -> list[Path]:
        """Return the files of wrong rows that were skipped."""
        bad = [number for number, line in enumerate(self.laid_out.lines) if line["counts"]["bad"]]
        return [self.opened.rejects(number) for number in bad]

    def receipt(self) -> dict[str, Any]:
        """Return what a run's receipt records of its data."""
        if self.opened.building:  # its counts depend on how many shards were ready at the start
            return {"sources": self.sources, "fingerprint": self.fingerprint}
        return {
            "sources": self.sources, "fingerprint": self.fingerprint, "rows": self.num_rows,
            "examples": len(self), "truncated": self.num_truncated, "dropped": self.num_dropped,
            "tokens": self.num_tokens, "shards": len(self.laid_out.lines),
        }  # fmt: skip

    def quartiles(self) -> tuple[float, float, float]:
        """Return the tokens of the shortest, the middle and the longest example."""
        counts = np.zeros(1, np.int64)
        for members in self.laid_out.all_records(self.part, MEMBERS):
            found = np.bincount(members["length"], minlength=len(counts))
            found[: len(counts)] += counts
            counts = found
        lengths = np.flatnonzero(counts)
        below = np.cumsum(counts[lengths])
        middle = lengths[np.searchsorted(below, [(below[-1] - 1) // 2, below[-1] // 2], "right")]
        return float(lengths[0]), float(middle.mean()), float(lengths[-1])

    def document_lengths(self) -> list[int]:
        """Return the tokens of documents, of examples at even distances."""
        every = max(1, len(self) // SOME)
        found: list[int] = []
        for members in self.laid_out.all_records(self.part, MEMBERS):
            found += members["length"][::every].tolist()
        return found

    def longest_document(self) -> tuple[int, str, int]:
        """Return the tokens of the longest document, its place, and its example's documents."""
        lines = [line[self.part].get("longest", [0]) for line in self.laid_out.lines]
        shard = max(range(len(lines)), key=lambda number: lines[number][0])
        tokens, place, num_documents = lines[shard]
        return tokens, self._place(*place), num_documents

    def first_ones(self) -> Examples:
        """Return the examples of the first shard that has some of this part, in their order."""
        number = next(n for n, line in enumerate(self.laid_out.lines)
                      if line[self.part]["examples"])  # fmt: skip
        return self._of_shard(number)

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Yield (source, line, row) of each example, as they stand in the sources."""
        for number, line in enumerate(self.laid_out.lines):
            if line[self.part]["examples"]:
                found = self._of_shard(number)
                yield from zip(found.source.tolist(), found.line.tolist(), found.row.tolist())

    def digests(self) -> Iterator[np.ndarray]:
        """Yield a hash of the tokens of each example, uint64, some at a time."""
        for members in self.laid_out.all_records(self.part, MEMBERS):
            yield members["digest"]

    def place(self, example: int) -> str:
        """Return file:line of the row that an example came from."""
        own = self.opened[int(example) >> SHARD].examples
        number = int(example) & ((1 << SHARD) - 1)
        return self._place(own.source[number], own.line[number], own.row[number])

    def _place(self, source: int, line: int, row: int) -> str:
        return str(Place(self.sources[source], int(line), int(row)))

    def _of_shard(self, number: int) -> Examples:
        """Return the examples of this part of a shard, in the order of the rows."""
        before = sum(line[self.part]["records"][MEMBERS] for line in self.laid_out.lines[:number])
        count = self.laid_out.lines[number][self.part]["records"][MEMBERS]
        members = self.laid_out.read(self.part, MEMBERS, before, count)
        own = np.sort(members["example"].astype(np.int64))
        return self.opened[number].examples.subset(own)


class StreamedSequences:
    """The sequences of one part of a stream: what its order orders and batch sizes count."""

    def __init__(self, opened: OpenShards, part: str) -> None:
        self.examples = StreamedExamples(opened, part)
        self.opened, self.laid_out, self.part = opened, opened.laid_out, part
        self.starts_early = opened.building is not None
        self._lock = threading.Lock()
        self._require: Callable[[int], None] = lambda count: None
        self._settle()

    def require_once_whole(self, check: Callable[[int], None]) -> None:
        """Call `check` with the number of sequences as soon as it is known."""
        self._require = check
        if self.is_whole:
            check(self.num_known)

    def _settle(self) -> None:
        """Group the shards that are there into windows; the last may still grow."""
        whole, lines = self.laid_out.is_whole, list(self.laid_out.lines)
        found = windows.spans([line["bytes"] for line in lines], self.opened.recipe.window)
        self.windows = found if whole else found[:-1]  # before their sizes: see `_wait`
        held = [line[self.part]["records"][SEQUENCES] for line in lines]
        self._sizes = [sum(held[begin:end]) for begin, end in self.windows]
        self.is_whole = whole
        if whole:
            self._require(self.num_known)

    def _wait(self, position: float) -> None:
        """Wait until a position of the first epoch is in a whole window, or all shards are made."""
        if self.is_whole or sum(self._sizes) > position:  # else another thread may hold the lock
            return
        with self._lock:  # batches are made on a thread
            while not self.is_whole and sum(self._sizes) <= position:
                self.opened.grow()
                self.examples.require_same_kind()
                self._settle()

    def __len__(self) -> int:
        """Wait for it, if shards are still made."""
        self._wait(math.inf)
        return self.num_known

    @property
    def num_known(self) -> int:
        """Return how many sequences are there."""
        return self.laid_out.num_records(self.part, SEQUENCES)

    def holds(self, position: int) -> bool:
        """Return whether an epoch reaches a position."""
        self._wait(position)
        return position < sum(self._sizes)

    def progress(self) -> float:
        """Return a number that changes as long as shards are made."""
        return self.opened.building.progress() if self.opened.building else 0.0

    @property
    def num_tokens(self) -> int:
        return self.examples.num_tokens

    def order(self, seed: int, epoch: int, *_: Any) -> "windows.WindowedOrder | GrowingOrder":
        """Return the order of an epoch, which is computed where it is read."""
        if not epoch and not self.is_whole:
            return GrowingOrder(self, seed)
        return self.order_of_known(seed, epoch)

    def order_of_known(self, seed: int, epoch: int) -> windows.WindowedOrder:
        """Return the order of the windows that are there."""

        def enter(found: list[int]) -> None:
            if len(found) == 1 and self.is_whole:  # the last one of this epoch
                found = [
                    *found,
                    int(windows.WindowedOrder(self._sizes, seed, epoch + 1).windows[0]),
                ]
            self._enter(found)

        return windows.WindowedOrder(self._sizes, seed, epoch, enter)

    def _enter(self, found: list[int]) -> None:
        self.opened.enter([n for window in found for n in range(*self.windows[window])])

    def members(self, sequence: int) -> np.ndarray:
        """Return the numbers of the examples of a sequence, int64."""
        [found] = self.laid_out.sequences(self.part, np.array([sequence]))
        shard = int(found["shard"]) << SHARD
        own = self.laid_out.members(self.part, found)["example"].astype(np.int64)
        return own | shard

    def documents(self, sequence: int, epoch: int = 0) -> list[Document]:
        """Return every document in a sequence, as the model gets it in an epoch."""
        found = []
        for example in self.members(sequence).tolist():
            shard, number = example >> SHARD, example & ((1 << SHARD) - 1)
            # What is drawn for a document depends on its number, which it has in its shard alone.
            own = self.opened[shard].documents(number, epoch + (shard << SHARD))
            found += [replace(document, example=example) for document in own]
        if self.examples.weight_range is None:
            return found
        return [  # a shard whose rows give no weights does not keep any
            replace(each, weights=np.ones(len(each.labels), np.float32))
            if each.weights is None
            else each
            for each in found
        ]

    def counts(self, sequences: np.ndarray) -> dict[str, int]:
        """Return the supervised tokens, documents, examples and input tokens of these sequences."""
        return _counted(self.laid_out.sequences(self.part, sequences))

    def all_counts(self) -> dict[str, int]:
        """Return the same of all sequences."""
        names = {"tokens": "tokens", "documents": "documents", "examples": "examples",
                 "input_tokens": "input_tokens"}  # fmt: skip
        return {ours: self.laid_out.count(self.part, name) for ours, name in names.items()}

    def largest(self, count: int, padded: bool) -> np.ndarray:
        """Return the largest sequences; `padded`: by rows as long as the longest document."""
        kept, sizes, begin = np.zeros(0, np.int64), np.zeros(0, np.int64), 0
        for records in self.laid_out.all_records(self.part, SEQUENCES):
            size = records["input_tokens"].astype(np.int64)
            if padded:
                size = records["longest"].astype(np.int64) * records["documents"]
            kept = np.concatenate([kept, np.arange(begin, begin + len(records))])
            sizes = np.concatenate([sizes, size])
            best = np.argsort(-sizes, kind="stable")[:count]
            kept, sizes, begin = kept[best], sizes[best], begin + len(records)
        return kept


class GrowingOrder:
    """The order of the first epoch while shards are made: it waits for the window that it needs."""

    def __init__(self, sequences: StreamedSequences, seed: int) -> None:
        self._sequences, self._seed = sequences, seed

    def __getitem__(self, part: slice) -> np.ndarray:
        """Return the sequences at these positions, int64."""
        self._sequences.holds(part.stop - 1)
        return self._sequences.order_of_known(self._seed, 0)[part]


def _counted(records: np.ndarray) -> dict[str, int]:
    sums = {
        name: int(records[name].sum(dtype=np.int64))
        for name in ("tokens", "documents", "members", "input_tokens")
    }
    sums["examples"] = sums.pop("members")
    return sums


def opened(
    recipe: Recipe, laid_out: Path, building: Building | None = None
) -> tuple[StreamedSequences, StreamedSequences | None]:
    """Open a stream that `shards.prepare` made: what is trained on, and what is held out of it.

    `building`: of one that `building.begin` began.
    """
    found = OpenShards(recipe, Layout(laid_out), building)
    train = StreamedSequences(found, layout.TRAIN)
    held_out = StreamedSequences(found, layout.EVAL) if recipe.plan.eval_fraction else None
    return train, held_out


def num_known(evals: Sequence[bytes] | Iterator[np.ndarray], train: StreamedExamples) -> int:
    """Return how many examples of the evaluation are also trained on, by a hash of their tokens."""
    parts = [
        part if isinstance(part, np.ndarray) else np.frombuffer(part[:8], "<u8") for part in evals
    ]
    wanted = np.concatenate(parts) if parts else np.zeros(0, np.uint64)
    known = np.zeros(len(wanted), bool)
    for digests in train.digests():
        known |= np.isin(wanted, digests)
    return int(known.sum())
