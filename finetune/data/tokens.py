"""Segments + tokenizer -> Examples: token ids, and which of them are learned. Cached by content.

The rendered text is tokenised whole, as inference will tokenise it, and a token is supervised when
its characters lie in a supervised segment. The cache key is a hash of everything that decides the
tokens: bytes of the rows, tokenizer, template and options. An entry says the sha256 of what it holds,
and each process checks what it opens: hashing takes about 4 s for a billion tokens (5 bytes each, at
1.3 GB/s), and processes of a node hash side by side from the same page cache.
"""

import fcntl
import functools
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import repeat
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune import failures, files
from finetune.data import readers, rows
from finetune.data.rows import Conversation, Place, Problems
from finetune.data.templates import Segment, Template
from finetune.errors import DataError, ModelError, Outage

CACHE_VERSION = 5  # raise it when the same input should give other tokens than before
ROWS_AT_ONCE = 1_000  # the tokenizer works on this many rows in parallel
# The tokenizer takes up to 300 bytes of memory for a character: 1 GB for this many at once, 15 GB for a row of 50 MB.
CHARACTERS_AT_ONCE = 1 << 21
WINDOW = 1 << 20  # characters of a longer text that are tokenised together
OVERLAP = 1 << 14  # by which two windows overlap
AGREED = 32  # tokens that two windows must have in common where they are joined
TOO_LONG = "too long"  # a kind of problem
META = "meta.json"
ARRAYS = ("input_ids", "supervised", "ends", "places")
OLD_SECONDS = 24 * 3600  # what an earlier version left half built has no lock that says whether it is alive


@dataclass(frozen=True)
class Options:
    """What decides the tokens besides rows, tokenizer and template; `positions` are for messages only."""

    format: str
    columns: dict[str, str]
    text_unit: str
    system_prompt: str | None
    loss_on: str
    max_length: int
    truncation: str
    positions: int | None = None
    """Tokens that a sequence may have in the model; None: as many as it likes."""

    def deciding(self) -> dict[str, Any]:
        """What the tokens depend on, for the key of the cache."""
        return {name: value for name, value in asdict(self).items() if name != "positions"}


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in memory-mapped arrays.

    input_ids: int32 [all tokens]; supervised: bool [all tokens]; starts, ends: int64 [documents],
    where each document lies in them; source, line, row: int64 [examples], where the row of an example stands in the
    user's files. example_ends: int64 [examples], the number of documents of all examples up to each; None: each example
    is one document.
    """

    input_ids: np.ndarray
    supervised: np.ndarray
    starts: np.ndarray
    ends: np.ndarray
    source: np.ndarray
    line: np.ndarray
    row: np.ndarray
    sources: list[str]
    fingerprint: str
    num_rows: int
    num_truncated: int
    num_dropped: int
    unread: dict[str, int] = field(default_factory=dict)
    """Columns that are not read -> rows that have them."""
    num_empty: int = 0
    """Rows of tables without anything in them, which are skipped."""
    example_ends: np.ndarray | None = None
    learn_opening: bool = False
    """Whether `templates.Template.learn_opening` holds, as answers of some rows begin in their own way."""

    def __len__(self) -> int:
        return len(self.source)

    @property
    def num_distinct_rows(self) -> int:
        """Count the rows that these examples come from: a split row gives several."""
        return np.unique(np.stack([self.source, self.line, self.row]), axis=1).shape[1]

    def documents(self, example: int) -> range:
        """Numbers of the documents of an example."""
        if self.example_ends is None:
            return range(example, example + 1)
        return range(self.example_ends[example - 1] if example else 0, self.example_ends[example])

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return self._per_example(self.ends - self.starts)

    @functools.cached_property
    def num_supervised(self) -> np.ndarray:
        """Tokens of each example that are supervised and follow another token of their document, int64 [examples]."""
        counts = (np.count_nonzero(self.supervised[s + 1 : e]) for s, e in zip(self.starts, self.ends))
        return self._per_example(np.fromiter(counts, np.int64, len(self.starts)))

    @property
    def num_supervised_tokens(self) -> int:
        return int(self.num_supervised.sum())

    def counts(self, examples: np.ndarray) -> dict[str, int]:
        """How many supervised tokens, documents, examples and tokens at all these examples hold."""
        return {
            "tokens": int(self.num_supervised[examples].sum()), "documents": sum(len(self.documents(e)) for e in examples),
            "examples": len(examples), "input_tokens": int(self.lengths[examples].sum()),
        }  # fmt: skip

    def _per_example(self, of_documents: np.ndarray) -> np.ndarray:
        if self.example_ends is None:
            return of_documents
        return np.add.reduceat(of_documents, np.concatenate([[0], self.example_ends[:-1]]))

    def receipt(self) -> dict[str, Any]:
        """What a run's receipt keeps of its data."""
        return {
            "sources": self.sources, "fingerprint": self.fingerprint, "rows": self.num_rows, "examples": len(self),
            "truncated": self.num_truncated, "dropped": self.num_dropped, "tokens": int(self.lengths.sum()),
        }  # fmt: skip

    def place(self, example: int) -> str:
        """file:line of the row an example came from."""
        return str(Place(self.sources[self.source[example]], int(self.line[example]), int(self.row[example])))

    def digests(self) -> list[bytes]:
        """A hash of the token ids of each example, to compare examples by."""
        found = []
        for example in range(len(self)):
            digest = hashlib.blake2b(digest_size=16)
            for number in self.documents(example):
                digest.update(self.input_ids[self.starts[number] : self.ends[number]].tobytes())
            found.append(digest.digest())
        return found

    def subset(self, chosen: np.ndarray) -> "Examples":
        documents, ends = chosen, None
        if self.example_ends is not None:
            members = [self.documents(example) for example in chosen]
            documents, ends = np.concatenate(members), np.cumsum([len(each) for each in members])
        return replace(
            self, starts=self.starts[documents], ends=self.ends[documents], source=self.source[chosen],
            line=self.line[chosen], row=self.row[chosen], example_ends=ends,
        )  # fmt: skip


def prepare(
    sources: Mapping[str, str], template: Template, tokenizer: Any, options: Options, cache_dir: str
) -> Examples:
    """Tokenised rows of all sources (name -> hash of its content), from the cache if they are there.

    Every process may call this at once: the first builds, the others wait on a file lock, so no
    collective can time out. Raises DataError naming file and line.
    """
    names = list(sources)
    identity = {
        "version": CACHE_VERSION,
        "sources": list(sources.values()),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": template.fingerprint,
        "options": options.deciding(),
    }
    fingerprint = files.json_sha256(identity)[:32]
    with _writable(cache_dir):
        root = Path(cache_dir).expanduser() / "tokens"
    folder = root / fingerprint
    # First without a lock: a cache that may only be read cannot have one.
    if (found := _open(folder, names, fingerprint)) is None:
        with _writable(cache_dir):
            root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f"{fingerprint}.lock", cache_dir):
            if (found := _open(folder, names, fingerprint, note=True)) is None:
                found = _make(folder, sources, template, tokenizer, options, cache_dir)
    _sweep(root, cache_dir)
    return found


def _make(
    folder: Path, sources: Mapping[str, str], template: Template, tokenizer: Any, options: Options, cache_dir: str
) -> Examples:
    """Build an entry of the cache next to its place, and move it there once it is whole. Raises DataError, or Outage for a full disk."""
    names, root, fingerprint = list(sources), folder.parent, folder.name
    build = root / f".building-{fingerprint}-{secrets.token_hex(4)}"
    with _writable(cache_dir):
        build.mkdir()
    try:
        _build(build, names, template, tokenizer, options, cache_dir)
        if changed := [name for name in names if readers.fingerprint(name) != sources[name]]:
            raise DataError(f"{readers.printable(changed[0])}: changed while being read; start again once it is whole")
        with _writable(cache_dir):
            if os.path.lexists(folder):  # a rename does not replace a folder that holds something
                os.rename(folder, root / build.name.replace(".building-", ".removing-"))
            try:
                os.rename(build, folder)
            except OSError:
                if not folder.is_dir():  # without locks another process may have built the same
                    raise
            files.flush(root)
            made = _open(folder, names, fingerprint)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    if made is None:
        raise Outage(f"data.cache_dir: {folder}: data written there reads back differently; check the disk")
    return made


@contextmanager
def _locked(path: Path, cache_dir: str, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file, which the kernel releases when the process ends, however it ends.

    False, and no wait, on a file system without locks; where not `wait`, also while another process holds it.
    """
    with _writable(cache_dir):
        try:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        except PermissionError:
            if not path.exists():
                raise
            descriptor = os.open(path, os.O_RDONLY)  # another user's file, which can still be locked
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
    """Remove what killed runs left: replaced entries, and half built ones whose lock no process holds."""
    with suppress(OSError, DataError, Outage):
        for left in root.glob(".removing-*"):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() and not left.is_symlink() else left.unlink()
        for left in root.glob(".building-*"):
            lock = root / f"{left.name.split('-')[1]}.lock"
            if not lock.exists():  # of a version that named them otherwise, so that nothing says who builds it
                if time.time() - left.stat().st_mtime > OLD_SECONDS:
                    shutil.rmtree(left, ignore_errors=True)
                continue
            with _locked(lock, cache_dir, wait=False) as held:
                if held:
                    shutil.rmtree(left, ignore_errors=True)


@contextmanager
def _writable(cache_dir: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError, RuntimeError) as exc:  # a path with a NUL; ~ without a home directory
        failures.reraise(exc, f"data.cache_dir: {cache_dir}: cannot be written now")
        raise DataError(
            f"data.cache_dir: {cache_dir}: cannot be written: {exc}; choose another data.cache_dir"
        ) from exc


def first_that_fits(sources: Mapping[str, str], template: Template, options: Options) -> Conversation | None:
    """The first row that the template takes; None for rows of text."""
    for conversation in rows.conversations(
        list(sources), options.format, options.columns, options.text_unit, options.system_prompt, Problems()
    ):
        if conversation.messages[0].role == "text":
            return None
        with suppress(DataError):
            template.stop_token(conversation)
            return conversation
    return None


def hold_out(examples: Examples, fraction: float, seed: int) -> tuple[Examples, Examples]:
    """Split off a part for evaluation: (the rest, the part); the same for the same seed.

    Rows stay whole, also where they were split into several examples, and equal rows stay together:
    what is trained on must not be what is evaluated on.
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
        raise DataError(f"data.eval_fraction: {fraction} of {len(order)} different rows leaves nothing to train on")
    held = np.isin(group, order[:count])
    return examples.subset(np.flatnonzero(~held)), examples.subset(np.flatnonzero(held))


def draw(examples: Examples, max_rows: int, seed: int) -> Examples:
    """The examples of at most `max_rows` rows, drawn at random; the same for the same seed."""
    places = np.stack([examples.source, examples.line, examples.row])
    row = np.unique(places, axis=1, return_inverse=True)[1]
    chosen = np.random.default_rng([seed, 0xD4A]).permutation(row.max() + 1)[:max_rows]
    return examples.subset(np.flatnonzero(np.isin(row, chosen)))


def num_trained_on(evals: Examples, train: Examples) -> int:
    """How many examples of the evaluation are also in the training data."""
    known = set(train.digests())
    return sum(digest in known for digest in evals.digests())


def encode(texts: Sequence[Sequence[Segment]], tokenizer: Any) -> list[tuple[np.ndarray, np.ndarray]]:
    """Segments of several rows -> (input_ids int32 [T], supervised bool [T]) of each."""
    if not texts:
        return []
    whole = ["".join(segment.text for segment in segments) for segments in texts]
    bounds = [np.cumsum([0] + [len(segment.text) for segment in segments]) for segments in texts]
    answers = [[n for n, segment in enumerate(segments) if n and segment.supervised] for segments in texts]
    encoded = _tokenise(whole, tokenizer)
    asked = iter(_ids([text[: b[n]] for text, b, turns in zip(whole, bounds, answers) for n in turns], tokenizer))
    results = []
    for (ids, starts), bound, segments, turns in zip(encoded, bounds, texts, answers):
        owner = np.searchsorted(bound.astype(starts.dtype), starts, side="right")
        owner -= 1
        np.minimum(owner, len(segments) - 1, out=owner)
        if any(
            not np.array_equal(ids[: len(prompt)], prompt)
            or (owner[: len(prompt)] >= n).any()
            or (owner[len(prompt) :] < n).any()
            for n, prompt in zip(turns, [next(asked) for _ in turns])
        ):
            # At inference a prompt is tokenised alone, and here that gives other tokens than before its
            # answer: one would reach over the boundary. So the boundary is one of tokens in training too.
            parts = [
                _continue(segment.text, tokenizer) if n else _ids([segment.text], tokenizer)[0]
                for n, segment in enumerate(segments)
            ]
            ids, owner = np.concatenate(parts), np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        learned = np.array([segment.supervised for segment in segments], bool)
        results.append((ids, learned[owner]))
    return results


def _ids(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    return [ids for ids, _ in _tokenise(texts, tokenizer, offsets=False)]


def _tokenise(
    texts: list[str], tokenizer: Any, offsets: bool = True, most: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(ids int32 [T], first character of each token [T]) of each text; without `offsets` the ids alone are right."""
    most = most or WINDOW
    usual = [text for text in texts if len(text) <= most]
    encoded = (
        tokenizer(
            usual, add_special_tokens=False, return_offsets_mapping=offsets, return_attention_mask=False, verbose=False
        )
        if usual
        else {"input_ids": []}
    )
    ids = (np.array(ids, np.int32) for ids in encoded["input_ids"])
    starts = (np.array([start for start, _ in pairs], np.int64) for pairs in encoded.get("offset_mapping", repeat(())))
    short = zip(ids, starts)
    return [next(short) if len(text) <= most else _tokenise_long(text, tokenizer) for text in texts]


def _tokenise_long(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """The same for a text of any length, in windows that overlap, so that memory grows with a window and not with the text.

    Two windows are joined inside their overlap, where AGREED tokens in a row are the same in both: what is far away does not
    change a token. Where they do not agree, the first is made longer, in the end as long as the text.
    """

    def window(begin: int, size: int) -> tuple[np.ndarray, np.ndarray]:
        [(ids, starts)] = _tokenise([text[begin : begin + size]], tokenizer, most=size)
        return ids, (starts + begin).astype(np.int32 if len(text) < 2**31 else np.int64)

    parts, begin, size, joint = [], 0, WINDOW, 0
    ids, starts = window(begin, size)
    while begin + size < len(text):
        following = begin + size - OVERLAP
        next_ids, next_starts = window(following, WINDOW)
        found = _joint(ids, starts, next_ids, next_starts)
        if found is None:
            size *= 2
            ids, starts = window(begin, size)
            ids, starts = ids[starts >= joint], starts[starts >= joint]
        else:
            i, j = found
            parts.append((ids[:i], starts[:i]))
            ids, starts = next_ids[j:], next_starts[j:]
            begin, size, joint = following, WINDOW, int(starts[0])
    parts.append((ids, starts))
    return np.concatenate([ids for ids, _ in parts]), np.concatenate([starts for _, starts in parts])


def _joint(
    ids: np.ndarray, starts: np.ndarray, next_ids: np.ndarray, next_starts: np.ndarray
) -> tuple[int, int] | None:
    """A token of one window, and the same in the next, from which on AGREED tokens are equal; None if there are none."""
    for i in range(int(np.searchsorted(starts, next_starts[0])), len(ids) - AGREED + 1):
        j = int(np.searchsorted(next_starts, starts[i]))
        here, there = slice(i, i + AGREED), slice(j, j + AGREED)
        if np.array_equal(ids[here], next_ids[there]) and np.array_equal(starts[here], next_starts[there]):
            return i, j
    return None


def _continue(text: str, tokenizer: Any) -> np.ndarray:
    """Tokens of a text that goes on after another: Llama's tokenizer puts a space before what stands alone."""
    for before in ("\n", tokenizer.eos_token or "\n"):
        head, ids = _ids([before, before + text], tokenizer)
        if np.array_equal(ids[: len(head)], head):
            return ids[len(head) :]
    return _ids([text], tokenizer)[0]


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """A prompt as training saw it: one BOS if the tokenizer uses one."""
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    if uses_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return list(ids)


def uses_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a BOS before a text by itself."""
    return tokenizer.bos_token_id is not None and tokenizer("a")["input_ids"][:1] == [tokenizer.bos_token_id]


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of vocabulary, merges, normalisation and special tokens, and of what tokenizer_config.json changes at each call."""
    switches = [uses_bos(tokenizer), bool(getattr(tokenizer, "split_special_tokens", False))]
    parts = [tokenizer.backend_tokenizer.to_str(), json.dumps([tokenizer.special_tokens_map, switches], sort_keys=True)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def _batches(stream: Iterator[Conversation]) -> Iterator[list[Conversation]]:
    """As many as the tokenizer takes at once, by number and by characters."""
    batch, characters = [], 0
    for conversation in stream:
        batch.append(conversation)
        characters += _characters(conversation)
        if len(batch) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(conversation: Conversation) -> int:
    return sum(len(message.content) + len(message.context) for message in conversation.messages)


def _build(
    folder: Path, sources: Sequence[str], template: Template, tokenizer: Any, options: Options, cache_dir: str
) -> None:
    ids_parts, supervised_parts, places = [], [], []
    counts = {"num_rows": 0, "num_truncated": 0, "num_dropped": 0, "learn_opening": template.learn_opening}
    finish, control = _Finisher(template, tokenizer), ControlTokens(tokenizer, template.turn_ends)
    index = {source: number for number, source in enumerate(sources)}
    bar = tqdm(desc="tokenising", unit=" rows", disable=None, leave=False)
    problems, unread = Problems(), Counter[str]()
    lengths: list[int] = []
    stream = rows.conversations(
        sources, options.format, options.columns, options.text_unit, options.system_prompt, problems, unread
    )
    # A longer row always has more than max_length tokens, so it is not tokenised, which would take a minute for 50 MB.
    most = max(WINDOW, options.max_length * max(map(len, tokenizer.get_vocab())))
    for batch in _batches(stream):
        rendered = _rendered(batch, template, control, options, most, problems, counts)
        if len(problems) > problems.count(TOO_LONG):
            continue  # the rest is read to count what is wrong; tokens are of no use any more
        if not template.learn_opening and any(template.opens_itself(segments) for _, segments in rendered):
            bar.close()
            _build(folder, sources, replace(template, learn_opening=True), tokenizer, options, cache_dir)
            return
        encoded = encode([segments for _, segments in rendered], tokenizer)
        for (conversation, segments), (ids, supervised) in zip(rendered, encoded):
            place, pieces = conversation.place, []
            counts["num_rows"] += 1
            with problems.noted():
                ids, supervised = finish(conversation, segments, ids, supervised)
                lengths.append(len(ids))
                pieces = _pieces(ids, supervised, options, finish.bos_id, place, problems, counts)
            for piece_ids, piece_supervised in pieces:
                ids_parts.append(piece_ids)
                supervised_parts.append(piece_supervised)
                places.append((index[place.source], place.line, place.row))
        bar.update(len(batch))
    bar.close()
    problems.raise_if_any({TOO_LONG: _lengths(lengths, problems.count(TOO_LONG), options)})
    if not ids_parts:
        raise DataError(
            f"{readers.some(list(sources), most=1)}: all {counts['num_rows']} rows are over data.max_length {options.max_length} and dropped"
        )
    arrays = {
        "input_ids": np.concatenate(ids_parts),
        "supervised": np.concatenate(supervised_parts),
        "ends": np.cumsum([len(part) for part in ids_parts]),
        "places": np.array(places, np.int64),
    }
    with _writable(cache_dir):
        _store(folder, arrays, {**counts, "num_empty": problems.num_empty, "unread": unread})


def _rendered(
    batch: Sequence[Conversation], template: Template, control: "ControlTokens", options: Options, most: int, problems: Problems,
    counts: dict[str, int],
) -> list[tuple[Conversation, list[Segment]]]:  # fmt: skip
    """Conversations with their segments; rows over `most` characters are dropped or noted."""
    rendered = []
    for conversation in batch:
        if options.truncation in ("error", "drop") and (characters := _characters(conversation)) > most:
            if options.truncation == "drop":
                counts["num_rows"], counts["num_dropped"] = counts["num_rows"] + 1, counts["num_dropped"] + 1
            else:
                problems.note(_over(conversation.place, f"{characters:,} characters", options, None), TOO_LONG)
            continue
        with problems.noted():
            control.refuse(conversation)
            rendered.append((conversation, template.segments(conversation, options.loss_on)))
    return rendered


def _pieces(
    ids: np.ndarray, supervised: np.ndarray, options: Options, bos_id: int | None, place: Place, problems: Problems,
    counts: dict[str, int],
) -> list[tuple[np.ndarray, np.ndarray]]:  # fmt: skip
    """A row cut to max_length: one piece, several, or none. Raises DataError if a piece teaches nothing."""
    is_long = len(ids) > options.max_length
    if options.truncation == "error" and is_long:
        problems.note(_over(place, f"{len(ids)} tokens", options, len(ids)), TOO_LONG)
        return []
    pieces = _shorten(ids, supervised, options, bos_id, place)
    if not all(learned[1:].any() for _, learned in pieces):
        can_rise = options.positions is None or options.max_length < options.positions
        raise DataError(
            f"{place}: no supervised token is left in {len(ids)} tokens cut to {options.max_length}; "
            + ("raise data.max_length, or set" if can_rise else "set")
            + " data.truncation to drop"
        )
    counts["num_dropped"] += not pieces
    counts["num_truncated"] += bool(pieces) and is_long
    return pieces


def _store(folder: Path, arrays: dict[str, np.ndarray], counts: dict[str, Any]) -> None:
    """Write the arrays, and META with their hashes."""
    for name, array in arrays.items():
        _write(folder / f"{name}.npy", array)
    meta: dict[str, Any] = {"fingerprint": folder.name.split("-")[1], "counts": counts}
    meta |= {"arrays": {name: _described(array) for name, array in arrays.items()}}
    _write(folder / META, json.dumps({**meta, "sha256": files.json_sha256(meta)}).encode())
    files.flush(folder)


def _write(path: Path, content: np.ndarray | bytes) -> None:
    """All of it, on the disk. Not by np.save: where the disk is full, its OSError does not say so."""
    with path.open("wb") as file:
        if isinstance(content, np.ndarray):
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(content))
        file.write(content.data if isinstance(content, np.ndarray) else content)
        file.flush()
        os.fsync(file.fileno())


def _described(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": hashlib.sha256(array.data).hexdigest()}


def _open(folder: Path, sources: list[str], fingerprint: str, note: bool = False) -> Examples | None:
    """An entry of the cache that is, bit for bit, what was written; None if there is none. `note`: say what is wrong with it."""
    if not os.path.lexists(folder):
        return None
    try:
        meta = json.loads((folder / META).read_text())
        if meta.pop("sha256") != files.json_sha256(meta) or meta["fingerprint"] != fingerprint:
            raise ValueError(f"{META} has changed")
        counts, arrays = meta["counts"], {}
        for name in ARRAYS:
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if _described(arrays[name]) != meta["arrays"][name]:
                raise ValueError(f"{name}.npy has changed")
        ends, places = np.asarray(arrays["ends"]), np.asarray(arrays["places"])
        starts = np.concatenate([[0], ends[:-1]])
        return Examples(
            arrays["input_ids"], arrays["supervised"], starts, ends, places[:, 0], places[:, 1], places[:, 2], sources, fingerprint, **counts
        )  # fmt: skip
    except Exception as exc:  # any damage: it can be built again
        if note:
            tqdm.write(
                f"note: the token cache {folder} is damaged and will be built again: {type(exc).__name__}: {exc}",
                file=sys.stderr,
            )
        return None


class ControlTokens:
    """What no row may hold as text: BOS, EOS, what ends a turn, and other special tokens."""

    def __init__(self, tokenizer: Any, turn_ends: Sequence[str]) -> None:
        self._bos = tokenizer.bos_token
        bos, eos, unk, pad = (getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad"))
        ends = (set(turn_ends) | {eos, pad} | ({bos} if uses_bos(tokenizer) else set())) - {None, unk}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {unk}
        self._of_text, self._of_turns = _any_of(ends), _any_of(ends | special)

    def refuse(self, conversation: Conversation) -> None:
        """Raise DataError if a row's text would be tokenised to one of them."""
        for message in conversation.messages:
            # A text has no turns to forge, and code is full of what some vocabularies call special, as <filename>.
            control = self._of_text if message.role == "text" else self._of_turns
            if found := control.search(message.content + message.context):
                what = (
                    "a BOS that the tokenizer adds itself"
                    if found[0] == self._bos
                    else "a control token of the tokenizer"
                )
                raise DataError(f"{conversation.place}: the text contains {found[0]!r}, {what}; remove it from the row")


class _Finisher:
    """Puts one BOS before an example and the token that ends it behind."""

    def __init__(self, template: Template, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.bos_token_id if uses_bos(tokenizer) else None
        self.eos_id = tokenizer.eos_token_id
        self.template = template

    def __call__(
        self, conversation: Conversation, segments: Sequence[Segment], ids: np.ndarray, supervised: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.bos_id is not None and (ids.size == 0 or ids[0] != self.bos_id):
            ids, supervised = np.insert(ids, 0, self.bos_id), np.insert(supervised, 0, False)
        # Further on, it is the template's own: Llama 2's puts one before every question.
        is_text, bos_id = conversation.messages[0].role == "text", self.tokenizer.bos_token_id
        begins = not is_text and bos_id not in (None, self.eos_id) and ids.size and ids[0] == bos_id
        again = np.flatnonzero(ids[1:] == bos_id)
        if begins and again.size and not self.tokenizer.decode(ids[1 : 1 + again[0]]).strip():
            raise DataError(
                f"{conversation.place}: data.template {self.template.name!r} begins with more than one BOS "
                f"{self.tokenizer.bos_token!r}; write it once, or leave it to the tokenizer"
            )
        if is_text or self.template.stop_of(segments) is None:
            if self.eos_id is None:
                raise ModelError(
                    "the tokenizer has no EOS token and the template ends no turn, so stopping cannot be learned; set eos_token"
                )
            ids, supervised = np.append(ids, np.int32(self.eos_id)), np.append(supervised, True)
        return ids, supervised


CUT = "data.truncation to right, left, drop or (clm) split"


def _over(place: Place, size: str, options: Options, length: int | None) -> str:
    """That a row is too long. `length`: its tokens; None if there are too many to count."""
    fits = f"remove it, or set {CUT}" if length is None else fitting(length, options.max_length, options.positions)
    return f"{place}: {size}, over data.max_length {options.max_length}; {fits}"


def fitting(longest: int, limit: int, positions: int | None) -> str:
    """What to do about rows of up to `longest` tokens where data.max_length is `limit`: no length that the model cannot have."""
    if positions is not None and longest > positions:
        lower = f"data.max_length: {positions} and " if limit != positions else ""
        return f"data.max_length can be at most {positions}, as the model has no more positions: set {lower}{CUT}"
    enough = -(-longest // 64) * 64
    return f"set data.max_length: {enough if positions is None else min(enough, positions)}, or {CUT}"


def _lengths(lengths: list[int], too_long: int, options: Options) -> str:
    """How many rows are too long, and which data.max_length would do."""
    limit = options.max_length
    if not lengths:
        return f"{too_long:,} rows are longer than data.max_length {limit}"
    if len(lengths) < too_long + sum(length <= limit for length in lengths):  # some were not even tokenised
        return f"{too_long:,} rows are longer than data.max_length {limit}, some by far: remove them, or set {CUT}"
    longest, usual = max(lengths), int(np.percentile(lengths, 95, method="higher"))
    return (
        f"{too_long:,} rows are longer than data.max_length {limit}; of all {len(lengths):,} the longest has {longest:,} tokens and 95% "
        f"have at most {usual:,}: {fitting(longest, limit, options.positions)}"
    )


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens)) or r"(?!)")


def _shorten(
    ids: np.ndarray, supervised: np.ndarray, options: Options, bos_id: int | None, place: Place
) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most max_length tokens: the example itself, or what data.truncation makes of it."""
    limit, over = options.max_length, len(ids) - options.max_length
    if over <= 0:
        return [(ids, supervised)]
    if options.truncation == "drop":
        return []
    head = 0 if bos_id is None else 1  # every piece begins with the BOS
    if options.truncation in ("right", "left"):
        if options.truncation == "right":
            ids, supervised = ids[:limit], supervised[:limit]
        else:
            has_prompt = not supervised[head:].all()
            ids = np.concatenate([ids[:head], ids[head + over :]])
            supervised = np.concatenate([supervised[:head], supervised[head + over :]])
            if has_prompt:  # the rest of an answer whose prompt is gone is read, but not learned
                rest = len(ids) if supervised[head:].all() else head + int(np.argmin(supervised[head:]))
                supervised[head:rest] = False
        return [(ids, supervised)]
    pieces = []
    # Without a BOS to begin with, a piece begins with the last token of the one before, so that each is predicted once.
    for start in range(head, len(ids) - (1 - head), limit - 1):
        piece = slice(start, start + limit - head)
        pieces.append(
            (np.concatenate([ids[:head], ids[piece]]), np.concatenate([supervised[:head], supervised[piece]]))
        )
    return pieces
