"""Tokenised examples in memory-mapped arrays, cached by content.

The cache key is a hash of everything that decides the tokens: bytes of the rows, tokenizer,
template and options. An entry records the sha256 of its arrays, and each process checks what it
opens: hashing takes about 4 s for a billion tokens (5 bytes each, at 1.3 GB/s), and processes of a
node hash in parallel from the same page cache.
"""

import fcntl
import functools
import hashlib
import json
import os
import secrets
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune import failures, files
from finetune.data import frames, source_files, tokenised, tokens
from finetune.data.places import Place, printable
from finetune.data.templates import Template
from finetune.data.tokenised import Options
from finetune.data.views import NEXT_TOKEN, View
from finetune.errors import DataError, Outage

CACHE_VERSION = 5  # increase it when the same input gives other tokens than before
META = "meta.json"
REJECTS = "rejects.jsonl"
ARRAYS = ("input_ids", "supervised", "ends", "places")
# Only where rows of several documents, with fields, or with weights have them.
EXAMPLE_ENDS, COLUMNS, WEIGHTS = "example_ends", "columns", "weights"


@dataclass(frozen=True)
class Ragged:
    """Token ids of documents: ids int32 [all tokens]; starts, ends int64 [documents] in them."""

    ids: np.ndarray
    starts: np.ndarray
    ends: np.ndarray

    @property
    def lengths(self) -> np.ndarray:
        return self.ends - self.starts

    def span(self, document: int) -> slice:
        return slice(self.starts[document], self.ends[document])


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in memory-mapped arrays.

    streams: what a model takes, by name; `input` is all of a causal model. `target` is of an
    encoder-decoder what it writes, or has a label for each token of the input, -1 for none.
    supervised: bool [all tokens of the input].
    source, line, row: int64 [examples], where the row of an example stands in the user's files.
    example_ends: int64 [examples], the number of documents of all examples up to each; None: each
    example is one document.
    columns: float32 [documents] by name, what is known of each and never tokenised.
    token_columns: [all tokens of the input] by name, what a run has computed of each.
    weights: float32 [all tokens of the input], factors of their losses; None: no row gives any.
    """

    streams: dict[str, Ragged]
    supervised: np.ndarray
    source: np.ndarray
    line: np.ndarray
    row: np.ndarray
    sources: list[str]
    fingerprint: str
    num_rows: int
    num_truncated: int
    num_dropped: int
    unread: dict[str, int] = field(default_factory=dict)
    """Columns that are not read -> how many rows have them."""
    num_empty: int = 0
    """Empty rows of tables, which are skipped."""
    num_skipped: int = 0
    """Rows that the user's own data.format skips; `num_rows` does not count them."""
    repairs: dict[str, int] = field(default_factory=dict)
    """What data.repair_turns changed -> in how many rows."""
    bad: dict[str, int] = field(default_factory=dict)
    """Kinds of wrong rows, which data.on_bad_row skips -> how many; `num_rows` leaves them out."""
    rejects: Path | None = None
    """A .jsonl file of these rows, each with its problem."""
    example_ends: np.ndarray | None = None
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    weights: np.ndarray | None = None
    learn_opening: bool = False
    """`templates.Template.learn_opening`: whether some answers begin in their own way."""
    labels: list[str] = field(default_factory=list)
    """Names of the labels that rows have, in the order of their numbers."""
    view: View = NEXT_TOKEN
    """What a model gets of each document in an epoch."""
    token_columns: Mapping[str, Any] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.source)

    @property
    def input(self) -> Ragged:
        return self.streams["input"]

    @property
    def num_distinct_rows(self) -> int:
        """Return how many rows these examples come from; a split row gives several examples."""
        return np.unique(np.stack([self.source, self.line, self.row]), axis=1).shape[1]

    def documents(self, example: int) -> range:
        """Return the numbers of the documents of an example."""
        if self.example_ends is None:
            return range(example, example + 1)
        return range(self.example_ends[example - 1] if example else 0, self.example_ends[example])

    def example_of(self, document: int) -> int:
        if self.example_ends is None:
            return document
        return int(np.searchsorted(self.example_ends, document, side="right"))

    @functools.cached_property
    def lengths(self) -> np.ndarray:
        """Return the tokens of each example, int64 [examples]."""
        return self._per_example(self.input.lengths)

    @functools.cached_property
    def num_documents(self) -> np.ndarray:
        """Return the documents of each example, int64 [examples]."""
        return self._per_example(np.ones(len(self.input.starts), np.int64))

    def most_tokens(self) -> np.ndarray:
        """Return the tokens of the longest document of each example, int64 [examples].

        The longer of what an encoder and its decoder get.
        """
        return self._per_example(self._longer(), np.maximum)

    def _longer(self) -> np.ndarray:
        lengths = [each.lengths for each in self.streams.values()]
        if self.view.has_target:
            lengths.append(self.view.num_labels(self))
        found: np.ndarray = np.max(lengths, axis=0)
        return found

    @functools.cached_property
    def num_supervised(self) -> np.ndarray:
        """Return the labels of each example, int64 [examples], the same in each epoch."""
        return self._per_example(self.view.num_labels(self))

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    @functools.cached_property
    def weight_range(self) -> tuple[float, float] | None:
        """Return the least and the largest weight of a supervised token, where rows give some."""
        if self.weights is None:
            return None
        given = self.weights[self.supervised]
        return float(given.min()), float(given.max())

    @property
    def reject_files(self) -> list[Path]:
        """Return the files of wrong rows that were skipped."""
        return [self.rejects] if self.rejects else []

    def quartiles(self) -> tuple[float, float, float]:
        """Return the tokens of the shortest, the middle and the longest example."""
        shortest, middle, longest = np.percentile(self.lengths, [0, 50, 100])
        return float(shortest), float(middle), float(longest)

    def document_lengths(self) -> list[int]:
        """Return the tokens of each document."""
        found: list[int] = self.input.lengths.tolist()
        return found

    def longest_document(self) -> tuple[int, str, int]:
        """Return the tokens of the longest document, its place, and its example's documents."""
        lengths = self._longer()
        document, longest = int(lengths.argmax()), int(lengths.max())
        example = self.example_of(document)
        return longest, self.place(example), len(self.documents(example))

    def first_ones(self) -> "Examples":
        """Return the first examples: as all are in memory, these."""
        return self

    def places(self) -> Iterator[tuple[int, int, int]]:
        """Yield (source, line, row) of each example."""
        return zip(self.source.tolist(), self.line.tolist(), self.row.tolist())

    @property
    def num_supervised_tokens(self) -> int:
        return int(self.num_supervised.sum())

    def counts(self, examples: np.ndarray) -> dict[str, int]:
        """Return the supervised tokens, documents, examples and input tokens of these examples."""
        return {
            "tokens": int(self.num_supervised[examples].sum()),
            "documents": int(self.num_documents[examples].sum()),
            "examples": len(examples),
            "input_tokens": int(self.lengths[examples].sum()),
        }

    def _per_example(self, of_documents: np.ndarray, join: np.ufunc = np.add) -> np.ndarray:
        if self.example_ends is None:
            return of_documents
        found: np.ndarray = join.reduceat(of_documents, np.r_[0, self.example_ends[:-1]])
        return found

    def receipt(self) -> dict[str, Any]:
        """Return what a run's receipt records of its data."""
        return {
            "sources": self.sources,
            "fingerprint": self.fingerprint,
            "rows": self.num_rows,
            "examples": len(self),
            "truncated": self.num_truncated,
            "dropped": self.num_dropped,
            "tokens": self.num_tokens,
        }

    def place(self, example: int) -> str:
        """Return file:line of the row that an example came from."""
        return self.place_of(self.source[example], self.line[example], self.row[example])

    def place_of(self, source: int, line: int, row: int) -> str:
        """Return file:line of a row; `source` counts the files."""
        return str(Place(self.sources[source], int(line), int(row)))

    def digests(self, examples: Iterable[int] | None = None) -> list[bytes]:
        """Return a hash of the token ids of all examples, or of some, to compare them by."""
        found = []
        for example in range(len(self)) if examples is None else examples:
            digest = hashlib.blake2b(digest_size=16)
            for number in self.documents(example):
                for stream in self.streams.values():
                    digest.update(stream.ids[stream.span(number)].tobytes())
            found.append(digest.digest())
        return found

    def subset(self, chosen: np.ndarray) -> "Examples":
        """Return these examples alone, in this order."""
        documents, ends = chosen, None
        if self.example_ends is not None:
            members = [self.documents(example) for example in chosen]
            documents, ends = np.concatenate(members), np.cumsum([len(each) for each in members])
        streams = {
            name: Ragged(each.ids, each.starts[documents], each.ends[documents])
            for name, each in self.streams.items()
        }
        return replace(
            self, streams=streams, source=self.source[chosen], line=self.line[chosen],
            row=self.row[chosen], example_ends=ends,
            columns={name: values[documents] for name, values in self.columns.items()},
        )  # fmt: skip


def prepare(
    sources: Mapping[str, str], template: Template, tokenizer: Any, options: Options, cache_dir: str
) -> Examples:
    """Return the tokenised rows of all sources (name -> hash of its content), cached.

    Every process may call this at once: the first builds and the others wait on a file lock, so
    that no collective can time out. Raises DataError that names file and line.
    """
    names = list(sources)
    identity = {
        "version": CACHE_VERSION,
        "sources": list(sources.values()),
        "tokenizer": tokens.tokenizer_fingerprint(tokenizer),
        "template": template.fingerprint,
        "options": options.deciding(),
    }
    fingerprint = files.json_sha256(identity)[:32]
    with writable(cache_dir):
        root = Path(cache_dir).expanduser() / "tokens"
    folder = root / fingerprint
    # First without a lock: a read-only cache cannot have one.
    if (found := opened(folder, names, fingerprint)) is None:
        with writable(cache_dir):
            root.mkdir(parents=True, exist_ok=True)
        with locked(root / f"{fingerprint}.lock", cache_dir):
            if (found := opened(folder, names, fingerprint, note=True)) is None:
                found = _make(folder, sources, template, tokenizer, options, cache_dir)
    _sweep(root, cache_dir)
    return found


def _make(
    folder: Path, sources: Mapping[str, str], template: Template, tokenizer: Any, options: Options,
    cache_dir: str,
) -> Examples:  # fmt: skip
    """Build an entry of the cache. Raise DataError, or Outage for a full disk."""

    def build(folder: Path) -> None:
        if options.framed:
            made = frames.tokenise(list(sources), tokenizer, options)
        else:
            made = tokenised.tokenise(list(sources), template, tokenizer, options)
        require_unchanged(sources)
        store(folder, made, cache_dir)

    return placed(folder, build, list(sources), cache_dir)


def require_unchanged(sources: Mapping[str, str]) -> None:
    """Raise DataError if a source (name -> hash) has changed while it was read."""
    if changed := [name for name in sources if source_files.fingerprint(name) != sources[name]]:
        raise DataError(
            f"{printable(changed[0])}: changed while being read; start again once it is whole"
        )


def placed(
    folder: Path, fill: Callable[[Path], None], sources: list[str], cache_dir: str
) -> Examples:
    """Let `fill` write an entry of the cache next to its place, and move it there once it is whole.

    Raises Outage for a full disk.
    """
    root, fingerprint = folder.parent, folder.name
    build = root / f".building-{fingerprint}-{secrets.token_hex(4)}"
    with writable(cache_dir):
        build.mkdir()
    try:
        fill(build)
        with writable(cache_dir):
            if os.path.lexists(folder):  # a rename does not replace a folder that is not empty
                os.rename(folder, root / build.name.replace(".building-", ".removing-"))
            try:
                os.rename(build, folder)
            except OSError:
                if not folder.is_dir():  # without locks another process may have built it, too
                    raise
            files.flush(root)
            made = opened(folder, sources, fingerprint)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    if made is None:
        raise Outage(
            f"data.cache_dir: {folder}: data written there reads back differently; check the disk"
        )
    return made


def remove(folder: Path) -> None:
    """Remove an entry: at once for those who would open it."""
    with suppress(FileNotFoundError):
        aside = folder.with_name(f".removing-{folder.name}-{secrets.token_hex(4)}")
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def locked(path: Path, cache_dir: str, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which the kernel releases when the process ends, however it ends.

    Yields whether the lock is held: False on a file system without locks, and, unless `wait`, while
    another process holds it.
    """
    with writable(cache_dir):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            # Another user's file, which can be locked all the same.
            descriptor = os.open(path, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            held = True
        except OSError:
            held = False
        yield held
    finally:
        os.close(descriptor)


def _sweep(root: Path, cache_dir: str) -> None:
    """Remove what killed runs left: replaced entries, and half-built ones that are not locked."""
    with suppress(OSError, DataError, Outage):
        for left in root.glob(".removing-*"):
            if left.is_dir() and not left.is_symlink():
                shutil.rmtree(left, ignore_errors=True)
            else:
                left.unlink()
        for left in root.glob(".building-*"):
            lock = root / f"{left.name.split('-')[1]}.lock"
            with locked(lock, cache_dir, wait=False) as held:
                if held:
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def writable(cache_dir: str) -> Iterator[None]:
    try:
        yield
    # ValueError: a path with a NUL. RuntimeError: ~ without a home directory.
    except (OSError, ValueError, RuntimeError) as exc:
        failures.reraise(exc, f"data.cache_dir: {cache_dir}: cannot be written now")
        raise DataError(
            f"data.cache_dir: {cache_dir}: cannot be written: {exc}; choose another data.cache_dir"
        ) from exc


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Split off a part for evaluation; return (the rest, the part), the same for the same seed.

    Rows stay whole, also where they were split into several examples, and equal rows stay together:
    no row that is evaluated may be trained on.
    """
    places = np.stack([examples.source, examples.line, examples.row])
    _, row = np.unique(places, axis=1, return_inverse=True)
    whole: dict[int, bytes] = {}
    for number, digest in zip(row.tolist(), examples.digests()):
        whole[number] = whole.get(number, b"") + digest
    numbers: dict[bytes, int] = {}
    group = np.array([numbers.setdefault(whole[number], len(numbers)) for number in row.tolist()])
    order = np.random.default_rng([seed, 0x5E1]).permutation(group.max() + 1)
    count = max(1, round(fraction * len(order)))
    if count >= len(order):
        raise DataError(
            f"data.eval_fraction: {fraction} of {len(order)} different rows leaves no rows to "
            "train on; lower it"
        )
    held = np.isin(group, order[:count])
    return examples.subset(np.flatnonzero(~held)), examples.subset(np.flatnonzero(held))


def draw(examples: Examples, max_rows: int, seed: int) -> Examples:
    """Draw the examples of at most `max_rows` rows at random, the same for the same seed."""
    places = np.stack([examples.source, examples.line, examples.row])
    row = np.unique(places, axis=1, return_inverse=True)[1]
    chosen = np.random.default_rng([seed, 0xD4A]).permutation(row.max() + 1)[:max_rows]
    return examples.subset(np.flatnonzero(np.isin(row, chosen)))


@dataclass(frozen=True)
class Share:
    """How much of the rows of some sources, by their numbers, an epoch has: one of the two."""

    name: str
    sources: Sequence[int]
    weight: float | None = None
    tokens: int | None = None


def mixed(examples: Examples, shares: Sequence[Share], seed: int) -> Examples:
    """Return the examples of whole rows in these shares; others stay once. Same for same seed.

    Raises DataError for a share of less than one row.
    """
    places = np.stack([examples.source, examples.line, examples.row])
    row = np.unique(places, axis=1, return_inverse=True)[1]
    tokens_of = np.bincount(row, examples.lengths).astype(np.int64)
    times = np.ones(row.max() + 1, np.int64)
    for number, share in enumerate(shares):
        own = np.unique(row[np.isin(examples.source, share.sources)])
        order = np.random.default_rng([seed, 0x317, number]).permutation(own)
        if share.tokens is None:
            whole, part = divmod(share.weight or 0, 1)
            drawn = order[: round(part * len(order))]
        else:
            whole, rest = divmod(share.tokens, max(1, int(tokens_of[own].sum())))
            drawn = order[: np.searchsorted(np.cumsum(tokens_of[order]), rest, side="right")]
        times[own] = int(whole)
        times[drawn] += 1
        if not times[own].any():
            key = "weights" if share.tokens is None else "token_budgets"
            raise DataError(
                f"data.{key}: {share.name}: {share.weight or share.tokens} is less than one of its "
                f"{len(own):,} rows; raise it, or leave the source out of data.train"
            )
    return examples.subset(np.repeat(np.arange(len(examples)), times[row]))


def num_trained_on(evals: Examples, train: Examples) -> int:
    """Return how many examples of the evaluation are also in the training data."""
    known = set(train.digests())
    return sum(digest in known for digest in evals.digests())


def store(
    folder: Path, made: tokenised.Tokenised, cache_dir: str, notes: Mapping[str, Any] | None = None
) -> None:
    """Write the examples of rows into a folder of the cache, and `notes` into its META."""
    arrays = {
        "input_ids": np.concatenate(made.ids or [np.zeros(0, np.int32)]),
        "supervised": np.concatenate(made.supervised or [np.zeros(0, bool)]),
        "ends": np.cumsum([len(part) for part in made.ids], dtype=np.int64),
        "places": np.array(made.places, np.int64).reshape(-1, 3),
    }
    if made.example_ends and made.example_ends[-1] > len(made.example_ends):
        arrays[EXAMPLE_ENDS] = np.array(made.example_ends, np.int64)
    if made.target_ids:
        arrays["target_ids"] = np.concatenate(made.target_ids)
        arrays["target_ends"] = np.cumsum([len(part) for part in made.target_ids])
    if made.columns:
        arrays[COLUMNS] = np.array(list(made.columns.values()), np.float32)
        made.counts["columns"] = list(made.columns)
    if made.weights:
        weights = (made.weights.get(n, np.ones(len(ids))) for n, ids in enumerate(made.ids))
        arrays[WEIGHTS] = np.concatenate([each.astype(np.float32) for each in weights])
    with writable(cache_dir):
        _store(folder, arrays, made.counts, made.rejects, notes or {})


def _store(
    folder: Path, arrays: dict[str, np.ndarray], counts: dict[str, Any],
    rejects: list[dict[str, Any]], notes: Mapping[str, Any],
) -> None:  # fmt: skip
    """Write the arrays and the rejected rows, and META with the hashes of the arrays."""
    if rejects:
        lines = (json.dumps(reject, default=str) + "\n" for reject in rejects)
        _write(folder / REJECTS, "".join(lines).encode())
    for name, array in arrays.items():
        _write(folder / f"{name}.npy", array)
    meta: dict[str, Any] = {"fingerprint": folder.name.split("-")[1], "counts": counts, **notes}
    meta |= {"arrays": {name: _described(array) for name, array in arrays.items()}}
    _write(folder / META, json.dumps({**meta, "sha256": files.json_sha256(meta)}).encode())
    files.flush(folder)


def _write(path: Path, content: np.ndarray | bytes) -> None:
    """Write and sync a file, without np.save: its OSError does not tell that the disk is full."""
    with path.open("wb") as file:
        if isinstance(content, np.ndarray):
            header = np.lib.format.header_data_from_array_1_0(content)
            np.lib.format.write_array_header_1_0(file, header)
        file.write(content.data if isinstance(content, np.ndarray) else content)
        file.flush()
        os.fsync(file.fileno())


def _described(array: np.ndarray) -> dict[str, Any]:
    return {
        "dtype": array.dtype.str,
        "shape": list(array.shape),
        "sha256": hashlib.sha256(array.data).hexdigest(),
    }


def _stream(ids: np.ndarray, ends: np.ndarray) -> Ragged:
    return Ragged(ids, np.concatenate([[0], ends[:-1]]), ends)


def opened(
    folder: Path, sources: list[str], fingerprint: str, note: bool = False, check: bool = True
) -> Examples | None:
    """Open an entry of the cache; None if it is missing, or is not bit for bit what was written.

    `note`: print what is wrong with a damaged entry. `check`: hash its arrays, which an entry that
    this process has checked before does not need.
    """
    if not os.path.lexists(folder):
        return None
    try:
        meta = json.loads((folder / META).read_text())
        if meta.pop("sha256") != files.json_sha256(meta) or meta["fingerprint"] != fingerprint:
            raise ValueError(f"{META} has changed")
        counts, arrays = meta["counts"], {}
        for name in {*ARRAYS, *meta["arrays"]}:
            mapped = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            arrays[name] = np.asarray(mapped)  # the same memory; slices of a memmap take 1 us more
            if check and _described(arrays[name]) != meta["arrays"][name]:
                raise ValueError(f"{name}.npy has changed")
        ends, places = np.asarray(arrays["ends"]), np.asarray(arrays["places"])
        streams = {"input": _stream(arrays["input_ids"], ends)}
        if "target_ids" in arrays:
            streams["target"] = _stream(arrays["target_ids"], np.asarray(arrays["target_ends"]))
        source, line, row = places.T
        rejects = folder / REJECTS if counts.get("bad") else None
        if rejects and not rejects.is_file():
            raise ValueError(f"{REJECTS} is missing")
        counts["columns"] = dict(zip(counts.get("columns", ()), arrays.get(COLUMNS, ())))
        return Examples(
            streams, arrays["supervised"], source, line, row, sources, fingerprint,
            example_ends=arrays.get(EXAMPLE_ENDS), weights=arrays.get(WEIGHTS), rejects=rejects,
            **counts,
        )  # fmt: skip
    except Exception as exc:  # any damage: the entry can be built again
        if note:
            tqdm.write(
                f"note: the token cache {folder} is damaged and will be built again: "
                f"{type(exc).__name__}: {exc}",
                file=sys.stderr,
            )
        return None
