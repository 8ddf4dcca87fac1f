"""Which sequences the shards of a stream make: small records on disk that are never held whole.

Two files for each part of the rows, `train` and `eval`, grow as shards are finished, and a line of
`index.jsonl` closes each shard with their hashes; a last line says that it was the last shard. What
stands behind the last whole line was cut off by a kill, and is written again.
"""

import hashlib
import json
import os
import weakref
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from finetune.data.examples import Examples
from finetune.data.packing import pack
from finetune.errors import Outage

INDEX = "index.jsonl"
TRAIN, EVAL = "train", "eval"
PARTS = (TRAIN, EVAL)
SEQUENCES, MEMBERS = "sequences", "members"
# A sequence: its shard, its members (of the file of members: the first, and how many), and counts.
SEQUENCE = np.dtype([
    ("first", "<i8"), ("shard", "<i4"), ("members", "<i4"), ("tokens", "<i4"),
    ("documents", "<i4"), ("input_tokens", "<i4"), ("longest", "<i4"),
])  # fmt: skip
# An example of a sequence: its number in the shard, its tokens, and a hash of them.
MEMBER = np.dtype([("example", "<i4"), ("length", "<i4"), ("digest", "<u8")])
TYPES = {SEQUENCES: SEQUENCE, MEMBERS: MEMBER}
AT_ONCE = 1 << 16  # records that a pass over a file holds


class Laid(NamedTuple):
    """The records of one part of one shard."""

    sequences: np.ndarray
    members: np.ndarray


@dataclass(frozen=True)
class Plan:
    """What decides the sequences beside the tokens."""

    packing: bool
    max_length: int
    seed: int
    eval_fraction: float


def lay_out(examples: Examples, number: int, plan: Plan) -> tuple[dict[str, Laid], dict[str, Any]]:
    """Return the records of a shard by part, and what its line says of each part."""
    digests = examples.digests()
    held = (
        _held_out(examples, digests, plan) if plan.eval_fraction else np.zeros(len(digests), bool)
    )
    short = np.frombuffer(b"".join(digest[:8] for digest in digests), "<u8")
    laid, facts = {}, {}
    for part, chosen in ((TRAIN, np.flatnonzero(~held)), (EVAL, np.flatnonzero(held))):
        laid[part] = _records(examples, chosen, short, number, plan)
        facts[part] = _facts(examples, chosen, laid[part])
    return laid, facts


def _held_out(examples: Examples, digests: list[bytes], plan: Plan) -> np.ndarray:
    """Return which examples are held out, bool: by a keyed hash of all tokens of their row.

    So equal rows stay together, wherever they stand, and the pieces of a row as well.
    """
    places = np.stack([examples.source, examples.line, examples.row])
    row = np.unique(places, axis=1, return_inverse=True)[1].ravel()
    rows = [
        hashlib.blake2b(digest_size=8, key=str(plan.seed).encode()) for _ in range(len(digests))
    ]
    for number, digest in zip(row.tolist(), digests):
        rows[number].update(digest)
    drawn = np.array([int.from_bytes(each.digest(), "little") for each in rows], np.uint64)
    return drawn[row] < np.uint64(plan.eval_fraction * 2.0**64)


def _records(
    examples: Examples, chosen: np.ndarray, digests: np.ndarray, number: int, plan: Plan
) -> Laid:
    """Return the records of these examples, each alone, or packed with others of the shard."""
    lengths = examples.lengths
    groups = [np.array([place]) for place in range(len(chosen))]
    if plan.packing and len(chosen):
        groups = pack(lengths[chosen], plan.max_length, (plan.seed << 32) + number)
    sequences = np.zeros(len(groups), SEQUENCE)
    members = np.zeros(len(chosen), MEMBER)
    if not len(chosen):
        return Laid(sequences, members)
    order = chosen[np.concatenate(groups)]
    members["example"], members["length"] = order, lengths[order]
    members["digest"] = digests[order]
    sizes = np.array([len(group) for group in groups])
    first = np.cumsum(sizes) - sizes
    sequences["first"], sequences["members"], sequences["shard"] = first, sizes, number
    counted = {
        "tokens": examples.num_supervised, "documents": examples.num_documents,
        "input_tokens": lengths,
    }  # fmt: skip
    for name, values in counted.items():
        sequences[name] = np.add.reduceat(values[order], first)
    sequences["longest"] = np.maximum.reduceat(examples.most_tokens()[order], first)
    return Laid(sequences, members)


def _facts(examples: Examples, chosen: np.ndarray, laid: Laid) -> dict[str, Any]:
    places = np.stack([examples.source[chosen], examples.line[chosen], examples.row[chosen]])
    rows = np.unique(places, axis=1).shape[1] if len(chosen) else 0
    facts: dict[str, Any] = {"examples": len(chosen), "rows": rows}
    for name in ("tokens", "documents", "input_tokens"):
        facts[name] = int(laid.sequences[name].sum(dtype=np.int64))
    if len(chosen):
        example = int(chosen[examples.most_tokens()[chosen].argmax()])
        longest = int(examples.most_tokens()[example])
        place = [int(each[example]) for each in (examples.source, examples.line, examples.row)]
        facts["longest"] = [longest, place, len(examples.documents(example))]
    return facts


class Layout:
    """The records of a stream on disk, and the lines of its shards."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.lines: list[dict[str, Any]] = []
        """One for each finished shard: facts, and what closes its records."""
        self.num_shards: int | None = None
        """Known once the last shard is finished."""
        self._read = 0  # bytes of the index
        self._files: dict[tuple[str, str], int] = {}
        weakref.finalize(self, _close, self._files)
        self._counts: Counter[tuple[str, str]] = Counter()
        self.refresh()

    def refresh(self) -> None:
        """Read the lines that were added since."""
        try:
            with (self.folder / INDEX).open("rb") as file:
                file.seek(self._read)
                added = file.read()
        except FileNotFoundError:
            return
        for line in added.splitlines(keepends=True):
            if not line.endswith(b"\n"):
                break
            values = json.loads(line)
            self._read += len(line)
            if "shards" in values:
                self.num_shards = values["shards"]
            else:
                self.lines.append(values)
                for part in PARTS:
                    for kind, count in values[part]["records"].items():
                        self._counts[part, kind] += count

    @property
    def is_whole(self) -> bool:
        return self.num_shards is not None

    def count(self, part: str, name: str) -> int:
        """Return a sum over the shards: of examples, rows, tokens and so on."""
        return sum(line[part][name] for line in self.lines)

    def num_records(self, part: str, kind: str) -> int:
        return self._counts[part, kind]

    def append(self, line: dict[str, Any], laid: dict[str, Laid]) -> None:
        """Add a shard: its records, and then, once they are on the disk, its line."""
        line = dict(line)
        for part, records in laid.items():
            records.sequences["first"] += self.num_records(part, MEMBERS)
            found = {SEQUENCES: records.sequences, MEMBERS: records.members}
            line[part] = {
                **line[part], "records": {kind: len(each) for kind, each in found.items()},
                "sha256": {kind: _sha256(each) for kind, each in found.items()},
            }  # fmt: skip
            for kind, each in found.items():
                where = self.num_records(part, kind) * TYPES[kind].itemsize
                _write(self.folder / f"{part}.{kind}", where, each.tobytes())
        self._write_line(line)

    def finish(self, num_shards: int) -> None:
        """Say that the last shard is finished."""
        self._write_line({"shards": num_shards})

    def _write_line(self, line: dict[str, Any]) -> None:
        _write(self.folder / INDEX, self._read, (json.dumps(line) + "\n").encode())
        self.refresh()

    def check(self) -> bool:
        """Return whether the records are those that were written."""
        try:
            return self._is_unchanged()
        except (OSError, Outage):
            return False

    def _is_unchanged(self) -> bool:
        for part in PARTS:
            for kind in TYPES:
                begin = 0
                for line in self.lines:
                    count, digest = line[part]["records"][kind], hashlib.sha256()
                    for records in self._chunks(part, kind, begin, begin + count):
                        digest.update(records.tobytes())
                    if digest.hexdigest() != line[part]["sha256"][kind]:
                        return False
                    begin += count
        return True

    def sequences(self, part: str, numbers: np.ndarray) -> np.ndarray:
        """Return the records of these sequences, SEQUENCE [numbers]."""
        found = [self.read(part, SEQUENCES, int(number), 1) for number in numbers]
        return np.concatenate(found) if found else np.zeros(0, SEQUENCE)

    def members(self, part: str, sequence: np.void) -> np.ndarray:
        """Return the records of the examples of a sequence, MEMBER [members]."""
        return self.read(part, MEMBERS, int(sequence["first"]), int(sequence["members"]))

    def all_records(self, part: str, kind: str) -> Iterator[np.ndarray]:
        """Yield all records of a file, some at a time."""
        return self._chunks(part, kind, 0, self.num_records(part, kind))

    def _chunks(self, part: str, kind: str, begin: int, end: int) -> Iterator[np.ndarray]:
        for start in range(begin, end, AT_ONCE):
            yield self.read(part, kind, start, min(AT_ONCE, end - start))

    def read(self, part: str, kind: str, start: int, count: int) -> np.ndarray:
        """Read records: at a place of the file, so that threads do not disturb each other.

        A file that was mapped into memory would count as memory of this process.
        """
        if (part, kind) not in self._files:
            path = self.folder / f"{part}.{kind}"
            self._files[part, kind] = os.open(path, os.O_RDONLY)
        size = TYPES[kind].itemsize
        read = os.pread(self._files[part, kind], count * size, start * size)
        if len(read) < count * size:
            raise Outage(
                f"data.cache_dir: {self.folder}: {part}.{kind} is too short; remove the folder, "
                "and run the same command again"
            )
        return np.frombuffer(read, TYPES[kind])


def _close(descriptors: dict[tuple[str, str], int]) -> None:
    for each in descriptors.values():
        os.close(each)


def _sha256(records: np.ndarray) -> str:
    return hashlib.sha256(records.tobytes()).hexdigest()


def _write(path: Path, where: int, content: bytes) -> None:
    """Write at a place of a file and sync it; what a kill left behind that place goes."""
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        os.ftruncate(descriptor, where)
        os.lseek(descriptor, where, os.SEEK_SET)
        written = 0
        while written < len(content):
            written += os.write(descriptor, content[written:])
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
