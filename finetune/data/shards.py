"""Tokenise rows that do not fit into memory: shard by shard, in several processes.

One process reads all rows as a stream and cuts it into shards of a fixed size; workers tokenise
each shard into an entry of the cache of its own. Everything follows from the rows, the tokenizer,
the template and the options, so a run that was killed goes on with the shards that it has, and what
it builds does not depend on the number of workers.
"""

import contextlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Generator, Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune import files, own_code, workers
from finetune.data import examples as entries
from finetune.data import frames, layout, readers, rows, shard_store, tokenised, tokens
from finetune.data.conversations import Sample
from finetune.data.examples import Examples
from finetune.data.layout import Laid, Layout
from finetune.data.places import Row, short
from finetune.data.problems import Problems
from finetune.data.shard_store import ShardStore
from finetune.data.templates import Template
from finetune.data.tokenised import TOO_LONG, Options
from finetune.data.views import NEXT_TOKEN, View
from finetune.errors import ConfigError, DataError, Outage

STREAM_VERSION = 2  # increase it when the same rows give other shards or sequences than before
# A shard ends with the row that reaches one of these: 16,384 rows of 20 tokens take 2 MB, and 32
# million characters some 40 MB, which an object store moves in a second.
SHARD_ROWS = 1 << 14
SHARD_CHARACTERS = 1 << 25

BEAT = "beat"  # a file in the folder of a stream that its builder touches at each shard
OPENING = "learn_opening"  # a file in the folder of a stream that `StartAgain` has left

Record = tuple[int, Row | DataError]
"""(number of the source, a row of it or what is wrong with it)."""


@dataclass(frozen=True)
class PartOptions(Options):
    """Options that read the rows of one shard instead of whole files."""

    records: tuple[tuple[str, tuple[Row | DataError, ...]], ...] = ()
    """(source, its rows in this shard)."""
    unseen: set[str] = field(default_factory=set)
    """Names in `columns` that no row of this shard has."""

    def samples(self, sources: Any, problems: Problems, unread: Any = None) -> Iterator[Sample]:
        """Yield the rows of this shard as samples."""
        held = dict(self.records)
        self.unseen.clear()
        return rows.samples(
            [source for source in sources if source in held], self.format, self.columns,
            self.text_unit, self.system_prompt, problems, unread, repair_turns=self.repair_turns,
            records=lambda source, _: iter(held[source]), unseen=self.unseen,
            own_format=self.shape[0] if self.shape else "auto",
        )  # fmt: skip


@dataclass(frozen=True)
class Recipe:
    """What decides the shards and their sequences: all that a worker needs beside the rows."""

    root: Path
    """Folder of all streams in the cache."""
    sources: Mapping[str, str]
    """Name -> hash of its content."""
    template: Template
    tokenizer: Any
    options: Options
    plan: layout.Plan
    cache_dir: str
    view: View = NEXT_TOKEN
    url: str | None = None
    """Where an object store has the shards; None: they stay in the cache."""
    window: int | None = None
    """Bytes of the shards that are shuffled together; None: all."""
    shard_rows: int = field(default_factory=lambda: SHARD_ROWS)

    @property
    def code(self) -> str:
        """Hash of the user's own code that makes the rows; empty: none does."""
        return own_code.get(self.options.format).sha256 if self.options.is_own else ""

    def store(self, key: str) -> ShardStore | None:
        """Return the object store of the shards, of which the cache holds two windows."""
        if self.url is None:
            return None
        most = None if self.window is None else 2 * self.window
        return ShardStore(self.url, self.root / key, most)

    @property
    def key(self) -> str:
        """Hash of everything that decides the tokens of the shards."""
        return files.json_sha256({
            "version": [STREAM_VERSION, entries.CACHE_VERSION, self.shard_rows, SHARD_CHARACTERS],
            "sources": list(self.sources.values()),
            "tokenizer": tokens.tokenizer_fingerprint(self.tokenizer),
            "template": self.template.fingerprint, "options": self.options.deciding(),
        })[:32]  # fmt: skip

    @property
    def fingerprint(self) -> str:
        """Hash of the sequences, too."""
        plan = {"stream": self.key, **vars(self.plan), "view": [type(self.view).__name__]}
        for name, value in vars(self.view).items():
            plan["view"].append([name, value.tolist() if isinstance(value, np.ndarray) else value])
        return files.json_sha256(plan)[:32]


@dataclass(frozen=True)
class Part:
    """The rows of one shard, for a worker."""

    number: int
    records: list[Record] | None
    """None: the shard is there, and only its sequences are wanted."""
    counts_only: bool = False
    """Whether only to count wrong rows, because other rows are wrong."""


@dataclass(frozen=True)
class Finished:
    """What a worker made of the rows of one shard."""

    number: int
    line: dict[str, Any] | None
    """None: rows are wrong, or it was not made."""
    laid: dict[str, Laid]
    problems: Problems
    lengths: np.ndarray
    """Tokens of its rows; only where some are too long."""
    most_documents: int
    was_damaged: bool
    """Whether its entry was there and damaged; it is gone now."""
    learn_opening: bool
    """Whether rows begin otherwise than the template; then all shards are made anew."""


class StartAgain(Exception):
    """Shards have to be made again: `template` is that of all rows."""

    def __init__(self, template: Template) -> None:
        super().__init__()
        self.template = template


def root(cache_dir: str) -> Path:
    """Return the folder of all streams in the cache."""
    with entries.writable(cache_dir):
        return Path(cache_dir).expanduser() / "shards"


def entry_name(key: str, number: int) -> str:
    return f"{key[:12]}.{number:06d}"


# ------------------------------------------------------------------------------------- a worker


class Maker:
    """Make shards, in a worker process."""

    def __init__(self, recipe: Recipe, key: str, code: str) -> None:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        if code:
            own_code.read_as(recipe.options.format, code)
        self.recipe, self.key = recipe, key
        self.folder, self.sources = recipe.root / key, list(recipe.sources)
        self.store = recipe.store(key)

    def __call__(self, part: Part) -> Finished:
        """Make one shard, or open the one that is there."""
        name = entry_name(self.key, part.number)
        problems = Problems(self.recipe.options.skipping)
        if part.records is None:
            found = self._there(name)
            if found is None:
                return self._without(part.number, problems, was_damaged=True)
            problems = _problems_of(found, problems)
            return self._finished(part.number, found, problems)
        options = self._options(part.records)
        if part.counts_only:
            for _ in options.samples(self.sources, problems):
                pass
            return self._without(part.number, problems)
        template, tokenizer = self.recipe.template, self.recipe.tokenizer
        if options.framed:
            made = frames.tokenise_part(self.sources, tokenizer, options, quiet=True)
        else:
            made = tokenised.tokenise_part(self.sources, template, tokenizer, options, quiet=True)
        begins = bool(made.counts.get("learn_opening")) and not template.learn_opening
        if made.problems.must_end or begins:
            return self._without(
                part.number,
                made.problems,
                made.lengths,
                made.most_documents,
                learn_opening=begins,
            )

        def fill(build: Path) -> None:
            notes = {"unseen": sorted(options.unseen)}
            entries.store(build, made, self.recipe.cache_dir, notes)

        found = entries.placed(self.folder / name, fill, self.sources, self.recipe.cache_dir)
        if self.store:
            self.store.put(name)
        return self._finished(part.number, found, made.problems)

    def _there(self, name: str) -> Examples | None:
        """Open an entry that is there; remove a damaged one. Raises Outage if the store's is."""
        copies = 1 if self.store is None else 2  # that of this machine, and that of the store
        for _ in range(copies):
            if self.store:
                self.store.fetch(name)
            found = entries.opened(self.folder / name, self.sources, name, note=True)
            if found is not None:
                return found
            entries.remove(self.folder / name)
            if not (self.store and self.store.holds(name)):
                return None
        assert self.store
        raise Outage(
            f"data.shards: {self.store.url}/{name} is damaged; remove it, and run the same command "
            "again"
        )

    def _options(self, records: list[Record]) -> PartOptions:
        held: dict[str, list[Row | DataError]] = {}
        for source, record in records:
            held.setdefault(self.sources[source], []).append(record)
        by_source = tuple((source, tuple(each)) for source, each in held.items())
        return PartOptions(**vars(self.recipe.options), records=by_source)

    def _finished(self, number: int, found: Examples, problems: Problems) -> Finished:
        meta = self.folder / entry_name(self.key, number) / entries.META
        found = replace(found, view=self.recipe.view)
        laid, facts = layout.lay_out(found, number, self.recipe.plan)
        line = {
            "meta": files.sha256(meta), "unseen": json.loads(meta.read_text())["unseen"],
            # Of the arrays: other files name paths, and a window must not depend on those.
            "bytes": sum(path.stat().st_size for path in meta.parent.glob("*.npy")),
            "counts": {
                **{name: getattr(found, name) for name in COUNTED},
                "unread": dict(found.unread), "repairs": dict(found.repairs),
                "bad": dict(found.bad), "columns": list(found.columns),
            },
            "weights": found.weight_range,
            **facts,
        }  # fmt: skip
        return Finished(number, line, laid, problems, np.zeros(0, np.int64), 1, False, False)

    def _without(
        self, number: int, problems: Problems, lengths: Any = (), most_documents: int = 1,
        was_damaged: bool = False, learn_opening: bool = False,
    ) -> Finished:  # fmt: skip
        of_rows = np.array(lengths, np.int64)
        return Finished(
            number, None, {}, problems, of_rows, most_documents, was_damaged, learn_opening
        )


COUNTED = ("num_rows", "num_truncated", "num_dropped", "num_empty", "num_skipped")


def _problems_of(found: Examples, problems: Problems) -> Problems:
    """Return what was noted when an entry was made, from the rows that it skipped."""
    problems.num_rows = found.num_rows + found.num_skipped
    if found.rejects:
        for line in found.rejects.read_text().splitlines():
            problems.num_rows += 1
            problems.note(json.loads(line)["problem"])
    return problems


# ------------------------------------------------------------------------------------ the stream


def records(sources: list[str], text_unit: str, problems: Problems) -> Iterator[Record]:
    """Yield the rows of all sources; note in `problems` files that cannot be read to their end."""
    for number, source in enumerate(sources):
        with problems.noted(ends=True):
            filled = False
            for record in readers.records(source, text_unit):
                filled = filled or isinstance(record, DataError) or not readers.is_empty(record)
                yield number, record
            if not filled:
                raise DataError(f"{source}: all its rows are empty; is it the right file?")


def cut(stream: Iterator[Record], most: int) -> Iterator[list[Record]]:
    """Cut a stream of rows into shards of at most `most` rows."""
    held: list[Record] = []
    characters = 0
    for record in stream:
        held.append(record)
        if isinstance(record[1], Row):
            characters += _characters(record[1].values)
        if len(held) == most or characters >= SHARD_CHARACTERS:
            yield held
            held, characters = [], 0
    if held:
        yield held


def _characters(value: Any) -> int:
    """Count the characters of all texts in a row."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    return sum(map(_characters, value)) if isinstance(value, (list, tuple)) else 0


class Builder:
    """Make the shards of a stream that are not there, and lay out their sequences."""

    def __init__(self, recipe: Recipe, num_workers: int | None = None, quiet: bool = False) -> None:
        self.quiet = quiet
        self.recipe, self.key = recipe, recipe.key
        self.folder, self.store = recipe.root / self.key, recipe.store(self.key)
        self.num_workers = num_workers or workers.cores()
        self.problems = Problems(recipe.options.skipping)
        self.lengths: list[np.ndarray] = []
        self.most_documents = 1

    @property
    def laid_out(self) -> Path:
        return self.folder / f"layout-{self.recipe.fingerprint}"

    @property
    def begins_otherwise(self) -> bool:
        """Whether an earlier start found rows that need a template with `learn_opening`."""
        return (self.folder / OPENING).exists()

    def is_done(self) -> bool:
        """Return whether nothing is left to make."""
        known = Layout(self.laid_out)
        names = [entry_name(self.key, number) for number in range(known.num_shards or 0)]
        away = [name for name in names if not self._is_here(name)]
        if not known.is_whole or (away and not (self.store and self.store.holds_all(away))):
            return False
        return known.check()

    def build(self) -> None:
        """Make what is left. Raise DataError for wrong rows, StartAgain for another template."""
        if self.store:
            self.store.check()
        with entries.writable(self.recipe.cache_dir):
            self.laid_out.mkdir(parents=True, exist_ok=True)
        for left in (*self.folder.glob(".building-*"), *self.folder.glob(".removing-*")):
            shutil.rmtree(left, ignore_errors=True)  # of a run that was killed: we hold the lock
        known = Layout(self.laid_out)
        if known.lines and not known.check():
            shutil.rmtree(self.laid_out)
            self.laid_out.mkdir()
            known = Layout(self.laid_out)
        for line in known.lines:
            self._recall(line)
        count = 0
        with (
            tqdm(desc="tokenising", unit=" rows", disable=self.quiet or None, leave=False) as bar,
            contextlib.closing(self._finished(known)) as results,
        ):
            for finished in results:
                count = finished.number + 1
                self._beat()
                bar.update(finished.problems.num_rows)
                self._take(finished, known)
                if self.store:
                    self.store.trim(self._under_way(finished.number))
        self._require_right(known)
        entries.require_unchanged(self.recipe.sources)
        if not known.is_whole:
            with entries.writable(self.recipe.cache_dir):
                known.finish(max(count, len(known.lines)))
        if self.store:
            self.store.put(self.laid_out.name, last=layout.INDEX)

    def _beat(self) -> None:
        """Note that something was done, for runs that wait for shards."""
        with entries.writable(self.recipe.cache_dir):
            (self.folder / BEAT).touch()

    def _under_way(self, number: int) -> dict[str, int]:
        """Return the entries here of later shards, which workers may be reading: none may go."""
        last = entry_name(self.key, number)
        names = (path.name for path in self.folder.glob(f"{self.key[:12]}.*"))
        return {name: 0 for name in names if name > last}

    def _has(self, number: int) -> bool:
        name = entry_name(self.key, number)
        return self._is_here(name) or bool(self.store and self.store.holds(name))

    def _is_here(self, name: str) -> bool:
        return (self.folder / name / entries.META).is_file()

    def _finished(self, known: Layout) -> Generator[Finished]:
        """Yield what workers made of each shard that is not laid out yet, in order."""
        yield from workers.mapped(
            Maker, self._parts(known), self.num_workers, self.recipe, self.key, self.recipe.code,
            ahead=self.num_workers + 1, fewer="fewer cores (taskset)",
        )  # fmt: skip

    def _parts(self, known: Layout) -> Iterator[Part]:
        done = len(known.lines)
        total = self._total()
        if total is not None and all(map(self._has, range(total))):
            yield from (Part(number, None) for number in range(done, total))
            return
        names, unit = list(self.recipe.sources), self.recipe.options.text_unit
        rows_of = records(names, unit, self.problems)
        for number, held in enumerate(cut(rows_of, self.recipe.shard_rows)):
            self._beat()  # shards that are there come without a result
            if not self._has(number):
                wrong = self.problems
                counts_only = wrong.must_end and len(wrong) > wrong.count(TOO_LONG)
                yield Part(number, held, counts_only)
            elif number >= done:
                yield Part(number, None)

    def _total(self) -> int | None:
        """Return how many shards the rows make, if any layout of them is whole."""
        known = (Layout(path).num_shards for path in self.folder.glob("layout-*"))
        return next((count for count in known if count is not None), None)

    def _take(self, finished: Finished, known: Layout) -> None:
        """Add a shard to the layout, or note what is wrong with its rows."""
        if finished.learn_opening:
            with entries.writable(self.recipe.cache_dir):
                (self.folder / OPENING).touch()
            raise StartAgain(replace(self.recipe.template, learn_opening=True))
        self.problems.add(finished.problems)
        self.lengths.append(finished.lengths)
        self.most_documents = max(self.most_documents, finished.most_documents)
        if finished.was_damaged:
            raise StartAgain(self.recipe.template)
        made_again = finished.number < len(known.lines)
        if finished.line and not made_again and not self.problems.must_end:
            with entries.writable(self.recipe.cache_dir):
                known.append(finished.line, finished.laid)

    def _recall(self, line: dict[str, Any]) -> None:
        """Count the rows of a shard that an earlier start has laid out."""
        counts = line["counts"]
        bad = [kind for kind, count in counts["bad"].items() for _ in range(count)]
        self.problems.num_rows += counts["num_rows"] + counts["num_skipped"] + len(bad)
        for kind in bad:
            self.problems.note(kind, kind)
        self.problems.rejects.clear()

    def _require_right(self, known: Layout) -> None:
        """Raise UserError for rows that are wrong, alone or together."""
        lengths = np.concatenate(self.lengths or [np.zeros(0, np.int64)])
        options = self.recipe.options
        tokenised.raise_if_any(self.problems, lengths.tolist(), options, self.most_documents)
        columns = options.columns
        unseen = [set(line["unseen"]) for line in known.lines]
        if missing := sorted(set.intersection(*unseen) if unseen else set()):
            raise ConfigError(
                f"data.columns: {missing[0]}: no row has a column {short(columns[missing[0]])!r}; "
                "correct the name, or remove it"
            )
        fields = Counter(tuple(line["counts"]["columns"]) for line in known.lines
                         if line[layout.TRAIN]["examples"])  # fmt: skip
        if len(fields) > 1:
            raise DataError(
                f"data.format: its rows have different fields: {' and '.join(map(str, fields))}; "
                "return the same for every row"
            )
        sums = {name: sum(line["counts"][name] for line in known.lines) for name in COUNTED}
        if not any(line[part]["examples"] for line in known.lines for part in layout.PARTS):
            raise tokenised.none_left(sums, list(self.recipe.sources), options)


def prepare(
    recipe: Recipe, num_workers: int | None = None, beside: bool = False
) -> tuple[Recipe, Path]:
    """Return the recipe of a stream that is whole on disk, and the folder of its layout.

    Every process may call this at once: the first builds and the others wait on a file lock, so
    that no collective can time out. Raises DataError that names file and line. `beside` a run:
    shows no progress, and raises StartAgain for another template.
    """
    while True:
        builder = Builder(recipe, num_workers, quiet=beside)
        if builder.begins_otherwise:
            recipe = replace(recipe, template=replace(recipe.template, learn_opening=True))
            continue
        if builder.is_done():
            return recipe, builder.laid_out
        with entries.writable(recipe.cache_dir):
            builder.folder.mkdir(parents=True, exist_ok=True)
        try:
            with entries.locked(recipe.root / f"{builder.key}.lock", recipe.cache_dir):
                if builder.store and not builder.is_done():
                    shard_store.fetch_layout(builder.store, builder.laid_out.name)
                if not builder.is_done():
                    builder.build()
            return recipe, builder.laid_out
        except StartAgain as again:
            if beside and again.template != recipe.template:
                raise
            recipe = replace(recipe, template=again.template)
