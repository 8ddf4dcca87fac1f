"""Segments + tokenizer -> Examples: token ids, and which of them are learned. Cached by content.

The rendered text is tokenised whole, as inference will tokenise it, and a token is supervised when
its characters lie in a supervised segment. The cache key is a hash of everything that decides the
tokens: bytes of the rows, tokenizer, template and options. An entry says the sha256 of what it holds,
and each process checks what it opens: hashing takes about 4 s for a billion tokens (5 bytes each, at
1.3 GB/s), and processes of a node hash side by side from the same page cache.
"""

import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune import failures
from finetune.data import rows
from finetune.data.rows import Conversation, Place
from finetune.data.templates import BrokenTemplate, Segment, Template
from finetune.errors import DataError, ModelError, Outage

CACHE_VERSION = 3  # raise it when the same input should give other tokens than before
ROWS_AT_ONCE = 1_000  # the tokenizer works on this many rows in parallel
MOST_PROBLEMS = 10  # told at once
META = "meta.json"
ARRAYS = ("input_ids", "supervised", "ends", "places")
OLD_SECONDS = 24 * 3600  # what an earlier version left half built has no lock that says whether it is alive


@dataclass(frozen=True)
class Options:
    """What decides the tokens besides rows, tokenizer and template."""

    format: str
    columns: dict[str, str]
    text_unit: str
    system_prompt: str | None
    loss_on: str
    max_length: int
    truncation: str


@dataclass(frozen=True)
class Examples:
    """Tokenised rows in memory-mapped arrays.

    input_ids: int32 [all tokens]; supervised: bool [all tokens]; starts, ends: int64 [examples],
    where each example lies in them; source, line, row: where its row stands in the user's files.
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
    learn_opening: bool = False
    """Whether `templates.Template.learn_opening` holds, as answers of some rows begin in their own way."""

    def __len__(self) -> int:
        return len(self.starts)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each example, int64 [examples]."""
        return self.ends - self.starts

    @property
    def num_supervised_tokens(self) -> int:
        return int(sum(self.supervised[s + 1 : e].sum() for s, e in zip(self.starts, self.ends)))

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
        parts = (self.input_ids[start:end].tobytes() for start, end in zip(self.starts, self.ends))
        return [hashlib.blake2b(part, digest_size=16).digest() for part in parts]

    def subset(self, chosen: np.ndarray) -> "Examples":
        per_example = {name: getattr(self, name)[chosen] for name in ("starts", "ends", "source", "line", "row")}
        return Examples(**{**self.__dict__, **per_example})


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
        "options": asdict(options),
    }
    fingerprint = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:32]
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
    """Build an entry of the cache beside its place, and move it there whole. Raises DataError, or Outage for a full disk."""
    names, root, fingerprint = list(sources), folder.parent, folder.name
    build = root / f".building-{fingerprint}-{secrets.token_hex(4)}"
    with _writable(cache_dir):
        build.mkdir()
    try:
        _build(build, names, template, tokenizer, options, cache_dir)
        if any(rows.fingerprint(name) != content for name, content in sources.items()):
            raise DataError(f"{', '.join(names)}: changed while being read; start again once they are whole")
        with _writable(cache_dir):
            if os.path.lexists(folder):  # a rename does not replace a folder that holds something
                os.rename(folder, root / build.name.replace(".building-", ".removing-"))
            try:
                os.rename(build, folder)
            except OSError:
                if not folder.is_dir():  # without locks another process may have built the same
                    raise
            _flush(root)
            made = _open(folder, names, fingerprint)
    finally:
        shutil.rmtree(build, ignore_errors=True)
    if made is None:
        raise Outage(f"data.cache_dir: {folder}: what was just written there reads back differently; check the disk")
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
        raise DataError(f"data.cache_dir: {cache_dir}: cannot be written: {exc}") from exc


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
    encoded = tokenizer(
        whole, add_special_tokens=False, return_offsets_mapping=True, return_attention_mask=False, verbose=False
    )
    asked = iter(_ids([text[: b[n]] for text, b, turns in zip(whole, bounds, answers) for n in turns], tokenizer))
    results = []
    for number, segments in enumerate(texts):
        ids, starts = (
            encoded["input_ids"][number],
            np.array(encoded["offset_mapping"][number], np.int64).reshape(-1, 2)[:, 0],
        )
        owner = np.minimum(np.searchsorted(bounds[number], starts, side="right") - 1, len(segments) - 1)
        prompts = [next(asked) for _ in answers[number]]
        if any(
            ids[: len(prompt)] != prompt or (owner[: len(prompt)] >= n).any() or (owner[len(prompt) :] < n).any()
            for n, prompt in zip(answers[number], prompts)
        ):
            # At inference a prompt is tokenised alone, and here that gives other tokens than before its
            # answer: one would reach over the boundary. So the boundary is one of tokens in training too.
            parts = [
                _continue(segment.text, tokenizer) if n else _ids([segment.text], tokenizer)[0]
                for n, segment in enumerate(segments)
            ]
            ids = [token for part in parts for token in part]
            owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        learned = np.array([segment.supervised for segment in segments], bool)
        results.append((np.asarray(ids, np.int32), learned[owner]))
    return results


def _ids(texts: list[str], tokenizer: Any) -> list[list[int]]:
    if not texts:
        return []
    return tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


def _continue(text: str, tokenizer: Any) -> list[int]:
    """Tokens of a text that goes on after another: Llama's tokenizer puts a space before what stands alone."""
    for before in ("\n", tokenizer.eos_token or "\n"):
        head, ids = _ids([before, before + text], tokenizer)
        if ids[: len(head)] == head:
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
    """Hash of vocabulary, merges, normalisation and special tokens."""
    parts = [tokenizer.backend_tokenizer.to_str(), json.dumps(tokenizer.special_tokens_map, sort_keys=True)]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


class _Problems:
    """What is wrong with rows, several of them at once, so that nobody mends a file by one start for each."""

    def __init__(self) -> None:
        self.found: list[DataError] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        try:
            yield
        except BrokenTemplate:
            raise  # every row would say the same
        except DataError as exc:
            if len(self.found) == MOST_PROBLEMS:
                raise  # has been told, and is on its way out
            self.found.append(exc)
            if len(self.found) == MOST_PROBLEMS:
                self.tell("at least ")

    def tell(self, at_least: str = "") -> None:
        """Raise DataError if there is anything to tell."""
        if len(self.found) == 1:
            raise self.found[0]
        if self.found:
            listed = "\n".join(f"  {problem}" for problem in self.found)
            raise DataError(f"{at_least}{len(self.found)} rows are wrong:\n{listed}")


def _conversations(sources: Sequence[str], options: Options, problems: _Problems) -> Iterator[Conversation]:
    """Rows of all sources as conversations; `options.format` may be auto."""
    for source in sources:
        format = options.format
        with problems.noted():  # a file that is broken is read no further
            for row in rows.read(source, options.text_unit):
                if format == "auto":
                    format = rows.detect(row, options.columns)
                conversation = None
                with problems.noted():
                    conversation = rows.to_conversation(row, format, options.columns, options.system_prompt)
                if conversation:
                    yield conversation


def _build(
    folder: Path, sources: Sequence[str], template: Template, tokenizer: Any, options: Options, cache_dir: str
) -> None:
    ids_parts, supervised_parts, places = [], [], []
    counts = {"num_rows": 0, "num_truncated": 0, "num_dropped": 0, "learn_opening": template.learn_opening}
    finish = _Finisher(template, tokenizer, options)
    index = {source: number for number, source in enumerate(sources)}
    bar = tqdm(desc="tokenising", unit=" rows", disable=None, leave=False)
    problems = _Problems()
    stream = _conversations(sources, options, problems)
    while batch := list(islice(stream, ROWS_AT_ONCE)):
        rendered = []
        for conversation in batch:
            with problems.noted():
                finish.refuse_control_tokens(conversation)
                rendered.append((conversation, template.segments(conversation, options.loss_on)))
        if not template.learn_opening and any(template.opens_itself(segments) for _, segments in rendered):
            bar.close()
            _build(folder, sources, replace(template, learn_opening=True), tokenizer, options, cache_dir)
            return
        encoded = encode([segments for _, segments in rendered], tokenizer)
        for (conversation, _), (ids, supervised) in zip(rendered, encoded):
            place, pieces = conversation.place, []
            counts["num_rows"] += 1
            with problems.noted():
                ids, supervised = finish(conversation, ids, supervised)
                pieces = _shorten(ids, supervised, options, finish.bos_id, place)
                if not all(learned[1:].any() for _, learned in pieces):
                    raise DataError(
                        f"{place}: no supervised token is left in {len(ids)} tokens cut to {options.max_length}; "
                        "raise data.max_length, or set data.truncation to drop"
                    )
                counts["num_dropped"] += not pieces
                counts["num_truncated"] += bool(pieces) and len(ids) > options.max_length
            for piece_ids, piece_supervised in pieces:
                ids_parts.append(piece_ids)
                supervised_parts.append(piece_supervised)
                places.append((index[place.source], place.line, place.row))
        bar.update(len(batch))
    bar.close()
    problems.tell()
    if not ids_parts:
        raise DataError(
            f"{', '.join(sources)}: all {counts['num_rows']} rows are over data.max_length {options.max_length} and dropped"
        )
    arrays = {
        "input_ids": np.concatenate(ids_parts),
        "supervised": np.concatenate(supervised_parts),
        "ends": np.cumsum([len(part) for part in ids_parts]),
        "places": np.array(places, np.int64),
    }
    with _writable(cache_dir):
        for name, array in arrays.items():
            _write(folder / f"{name}.npy", array)
        meta: dict[str, Any] = {"fingerprint": folder.name.split("-")[1], "counts": counts}
        meta |= {"arrays": {name: _described(array) for name, array in arrays.items()}}
        _write(folder / META, json.dumps({**meta, "sha256": _sha256(meta)}).encode())
        _flush(folder)


def _write(path: Path, content: np.ndarray | bytes) -> None:
    """All of it, on the disk. Not by np.save: where the disk is full, its OSError does not say so."""
    with path.open("wb") as file:
        if isinstance(content, np.ndarray):
            np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(content))
        file.write(content.data if isinstance(content, np.ndarray) else content)
        file.flush()
        os.fsync(file.fileno())


def _flush(folder: Path) -> None:
    """The names in a folder, to the disk."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _described(array: np.ndarray) -> dict[str, Any]:
    return {"dtype": array.dtype.str, "shape": list(array.shape), "sha256": hashlib.sha256(array.data).hexdigest()}


def _sha256(meta: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(meta, sort_keys=True).encode()).hexdigest()


def _open(folder: Path, sources: list[str], fingerprint: str, note: bool = False) -> Examples | None:
    """An entry of the cache that is, bit for bit, what was written; None if there is none. `note`: say what is wrong with it."""
    if not os.path.lexists(folder):
        return None
    try:
        meta = json.loads((folder / META).read_text())
        if meta.pop("sha256") != _sha256(meta) or meta["fingerprint"] != fingerprint:
            raise ValueError(f"{META} has changed")
        counts, arrays = meta["counts"], {}
        for name in ARRAYS:
            arrays[name] = np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            if _described(arrays[name]) != meta["arrays"][name]:
                raise ValueError(f"{name}.npy has changed")
    except Exception as exc:  # whatever is wrong with it, it can be built anew
        if note:
            tqdm.write(
                f"note: the token cache {folder} is damaged and is built anew: {type(exc).__name__}: {exc}",
                file=sys.stderr,
            )
        return None
    ends, places = np.asarray(arrays["ends"]), np.asarray(arrays["places"])
    starts = np.concatenate([[0], ends[:-1]])
    return Examples(
        arrays["input_ids"], arrays["supervised"], starts, ends, places[:, 0], places[:, 1], places[:, 2], sources, fingerprint, **counts
    )  # fmt: skip


class _Finisher:
    """Puts one BOS before an example and the token that ends it behind, and refuses rows that bring their own."""

    def __init__(self, template: Template, tokenizer: Any, options: Options) -> None:
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.bos_token_id if uses_bos(tokenizer) else None
        self.eos_id = tokenizer.eos_token_id
        self.template = template
        self._template_stops: bool | None = None
        bos, eos, unk, pad = (getattr(tokenizer, f"{name}_token") for name in ("bos", "eos", "unk", "pad"))
        ends = (set(template.turn_ends) | {eos, pad} | ({bos} if self.bos_id is not None else set())) - {None, unk}
        special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special} - {unk}
        self._control_of_text, self._control = _any_of(ends), _any_of(ends | special)

    def refuse_control_tokens(self, conversation: Conversation) -> None:
        """Raise DataError if a row's text would be tokenised to BOS, EOS, the end of a turn or another special token."""
        for message in conversation.messages:
            # A text has no turns to forge, and code is full of what some vocabularies call special, as <filename>.
            control = self._control_of_text if message.role == "text" else self._control
            found = control.search(message.content + message.context)
            if found:
                what = (
                    "a BOS that the tokenizer adds itself"
                    if found[0] == self.tokenizer.bos_token
                    else "a control token of the tokenizer"
                )
                raise DataError(f"{conversation.place}: the text contains {found[0]!r}, {what}; remove it from the row")

    def __call__(
        self, conversation: Conversation, ids: np.ndarray, supervised: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.bos_id is not None and (ids.size == 0 or ids[0] != self.bos_id):
            ids, supervised = np.insert(ids, 0, self.bos_id), np.insert(supervised, 0, False)
        # Further on, it is the template's own: Llama 2's puts one before every question.
        own = self.bos_id not in (None, self.eos_id)
        again = np.flatnonzero(ids[1:] == self.bos_id)
        if own and again.size and not self.tokenizer.decode(ids[1 : 1 + again[0]]).strip():
            raise DataError(
                f"{conversation.place}: data.template {self.template.name!r} begins with more than one BOS "
                f"{self.tokenizer.bos_token!r}; write it once, or leave it to the tokenizer"
            )
        if not self._stops(conversation):
            if self.eos_id is None:
                raise ModelError(
                    "the tokenizer has no EOS token and the template ends no turn, so stopping cannot be learned; set eos_token"
                )
            ids, supervised = np.append(ids, np.int32(self.eos_id)), np.append(supervised, True)
        return ids, supervised

    def _stops(self, conversation: Conversation) -> bool:
        if conversation.messages[0].role == "text":
            return False
        if self._template_stops is None:
            self._template_stops = self.template.stop_token(conversation) is not None
        return self._template_stops


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens)) or r"(?!)")


def _shorten(
    ids: np.ndarray, supervised: np.ndarray, options: Options, bos_id: int | None, place: Place
) -> list[tuple[np.ndarray, np.ndarray]]:
    """At most max_length tokens: the example itself, or what data.truncation makes of it."""
    limit, over = options.max_length, len(ids) - options.max_length
    if over <= 0:
        return [(ids, supervised)]
    if options.truncation == "error":
        raise DataError(
            f"{place}: {len(ids)} tokens, over data.max_length {limit}; raise it, or set data.truncation to right, left, drop or (clm) split"
        )
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
