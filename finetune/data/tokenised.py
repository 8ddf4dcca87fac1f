"""Turn rows into the tokens of examples: rendered, tokenised, and cut to data.max_length."""

import operator
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune import own_code
from finetune.data import rows, tokens
from finetune.data.advice import SFT, Advice
from finetune.data.control_tokens import ControlTokens, uses_bos
from finetune.data.conversations import Conversation, Sample, turn_by_turn, without_thoughts
from finetune.data.places import Place, list_columns, some
from finetune.data.problems import ENDS, Problems, Skipping
from finetune.data.templates import Segment, Template
from finetune.data.tokens import Tokens
from finetune.errors import DataError, ModelError

ROWS_AT_ONCE = 1_000  # the tokenizer works on this many rows in parallel
# The tokenizer takes up to 300 bytes of memory for a character: 1 GB for this many at once, 15 GB
# for a row of 50 MB.
CHARACTERS_AT_ONCE = 1 << 21
TOO_LONG = "too long"  # a kind of `Problems`


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
    positions: int | None = None
    """How many tokens a sequence may have in the model; None: any number. For messages only."""
    repair_turns: bool = False
    skipping: Skipping = ENDS
    framed: bool = False
    """Whether rows have the tokenizer's own tokens around them, not a template (`frames`)."""
    special_tokens_in_text: str = "error"
    thinking: str = "keep"
    source_prefix: str = ""
    """Text before the input of an encoder-decoder."""
    labels: tuple[str, ...] = ()
    """Names of the labels in the order of their numbers; empty: those of the rows, sorted."""
    shape: rows.Shape | None = None
    """Of what a user's own function makes of each row, where a shard does not show the first."""
    advice: Advice = SFT
    """What errors about rows may advise."""

    @property
    def is_own(self) -> bool:
        """Whether a user's own function makes the rows."""
        return own_code.is_own(self.format)

    def samples(
        self, sources: Sequence[str], problems: Problems, unread: "Counter[str] | None" = None
    ) -> Iterator[Sample]:
        """Yield the rows of all sources as samples; see `rows.samples`."""
        return rows.samples(
            sources, self.format, self.columns, self.text_unit, self.system_prompt, problems,
            unread, repair_turns=self.repair_turns,
        )  # fmt: skip

    def deciding(self) -> dict[str, Any]:
        """Return what the tokens depend on, for the key of the cache.

        A user's own function counts by the content of its file, which may define several.
        """
        values = asdict(self)
        del values["advice"], values["positions"]
        del values["shape"]  # the rows and the function decide it
        # Caches may be older than these settings.
        if not self.repair_turns:
            del values["repair_turns"]
        if not self.skipping.skips:
            del values["skipping"]
        if not self.framed:
            del values["framed"]
        elif self.format == "token_labels":  # a word without tokens gave its label to another
            values["framed"] = 2
        if self.special_tokens_in_text == "error":
            del values["special_tokens_in_text"]
        if self.thinking == "keep":
            del values["thinking"]
        for name in ("labels", "source_prefix"):
            if not values[name]:
                del values[name]
        if self.is_own:
            code, name = own_code.get(self.format), self.format.rpartition(":")[2]
            values["format"] = f"{code.sha256}:{name}"
        return values


@dataclass
class Tokenised:
    """The examples of all rows, in order: their tokens, supervision and places."""

    ids: list[np.ndarray] = field(default_factory=list)
    """int32 [tokens] of each document."""
    supervised: list[np.ndarray] = field(default_factory=list)
    """bool [tokens] of each document."""
    weights: dict[int, np.ndarray] = field(default_factory=dict)
    """float32 [tokens] of documents whose rows have weights, by number."""
    target_ids: list[np.ndarray] = field(default_factory=list)
    """int32 of each document, where rows have another stream: labels of tokens, -1 for none."""
    columns: dict[str, list[float]] = field(default_factory=dict)
    """A number of each document, by name."""
    places: list[tuple[int, int, int]] = field(default_factory=list)
    """(number of the source, line, row) of each example."""
    example_ends: list[int] = field(default_factory=list)
    """Documents of all examples up to each."""
    counts: dict[str, Any] = field(default_factory=dict)
    """The fields of `Examples` that count rows."""
    rejects: list[dict[str, Any]] = field(default_factory=list)
    """Wrong rows that were skipped, each with its problem."""
    problems: Problems = field(default_factory=Problems)
    """Wrong rows, and what else was noted while reading."""
    lengths: list[int] = field(default_factory=list)
    """Tokens of each row that was tokenised, before it was cut."""
    most_documents: int = 1
    """Of a row."""
    fields: tuple[str, ...] | None = None
    """Of each row; None until one shows them."""

    def note(self, problems: Problems, unread: "Counter[str]") -> None:
        """Take over what was skipped, repaired and not read."""
        self.rejects = problems.rejects
        self.counts |= {
            "num_empty": problems.num_empty, "num_skipped": problems.num_skipped,
            "unread": unread, "repairs": problems.repairs, "bad": problems.kinds(),
        }  # fmt: skip

    def add(
        self, examples: list[list[Tokens]], sample: Sample, place: tuple[int, int, int]
    ) -> None:
        """Add the examples of a row. Raise DataError if it has other fields than those before."""
        if self.fields is None and self.ids:
            self.fields = tuple(self.columns)
        if self.fields is not None and sample.fields.keys() != set(self.fields):
            names, before = (list_columns(sorted(f)) for f in (sample.fields, self.fields))
            raise DataError(
                f"{sample.conversations[0].place}: data.format: the fields {names} differ from "
                f"those of the rows before, {before}; return the same for every row"
            )
        for documents in examples:
            for ids, supervised in documents:
                if supervised.dtype != bool:
                    self.weights[len(self.ids)] = supervised
                self.ids.append(ids)
                self.supervised.append(supervised.astype(bool, copy=False))
            for name, numbers in sample.fields.items():
                self.columns.setdefault(name, []).extend(numbers)
            self.places.append(place)
            self.example_ends.append(len(self.ids))


def first_that_fits(
    sources: Mapping[str, str], template: Template, options: Options
) -> Conversation | None:
    """Return the first row that the template takes; None for rows of text."""
    for sample in options.samples(list(sources), Problems(options.skipping)):
        for conversation in sample.conversations:
            if conversation.messages[0].role == "text":
                return None
            with suppress(DataError):
                template.stop_token(conversation)
                return conversation
    return None


def batched(stream: Iterator[Sample]) -> Iterator[list[Sample]]:
    """Yield as many samples as the tokenizer takes at once, by number and characters."""
    batch, characters = [], 0
    for sample in stream:
        batch.append(sample)
        characters += _characters(sample)
        if len(batch) == ROWS_AT_ONCE or characters >= CHARACTERS_AT_ONCE:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


def _characters(sample: Sample) -> int:
    count = 0
    for conversation in sample.conversations:
        for message in conversation.messages:
            count += len(message.content) + len(message.context)
            if message.parts:
                count += len(str(message.parts))
    return count


def tokenise(
    sources: Sequence[str], template: Template, tokenizer: Any, options: Options
) -> Tokenised:
    """Tokenise all rows of all sources. Raise DataError that names file and line."""
    made = tokenise_part(sources, template, tokenizer, options)
    raise_if_any(made.problems, made.lengths, options, made.most_documents)
    require_any(made, sources, options)
    return made


def tokenise_part(
    sources: Sequence[str], template: Template, tokenizer: Any, options: Options,
    quiet: bool = False,
) -> Tokenised:  # fmt: skip
    """Tokenise rows, and note in `problems` what is wrong with them. `quiet`: show no progress."""
    made = Tokenised(problems=Problems(options.skipping))
    made.fields = options.shape and options.shape[1]
    made.counts = dict.fromkeys(("num_rows", "num_truncated", "num_dropped"), 0)
    made.counts["learn_opening"] = template.learn_opening
    finish, unread = _Finisher(template, tokenizer), Counter[str]()
    index = {source: number for number, source in enumerate(sources)}
    stream = options.samples(sources, made.problems, unread)
    bar = tqdm(desc="tokenising", unit=" rows", disable=quiet or None, leave=False)
    try:
        with bar:
            rendered = _all_rendered(stream, template, tokenizer, options, made)
            for batch, encoded in _encoded(rendered, tokenizer):
                for sample, parts in batch:
                    plain = list(islice(encoded, len(parts)))
                    place = sample.conversations[0].place
                    with made.problems.noted(sample.row):
                        documents = [
                            finish(conversation, segments, *each)
                            for conversation, segments, each
                            in zip(sample.conversations, parts, plain)
                        ]  # fmt: skip
                        pieces = _all_pieces(documents, options, finish.bos_id, place, made)
                        made.add(pieces, sample, (index[place.source], place.line, place.row))
                        made.counts["num_rows"] += 1  # rows that are skipped are not among them
                bar.update(len(batch))
    except _OpensItself:
        again = replace(template, learn_opening=True)
        return tokenise_part(sources, again, tokenizer, options, quiet)
    made.note(made.problems, unread)
    return made


class _OpensItself(Exception):
    """An answer begins with its own text where `Template.opening` would stand."""


Rendered = tuple[Sample, list[list[Segment]]]
"""A row, and the segments of each of its documents."""


def _all_rendered(
    stream: Iterator[Sample], template: Template, tokenizer: Any, options: Options, made: Tokenised
) -> Iterator[list[Rendered]]:
    """Yield rows with their segments, as many as the tokenizer takes at once."""
    control, problems = ControlTokens(tokenizer, template.turn_ends), made.problems
    # A longer row always has more than max_length tokens, so it is not tokenised, which would take
    # a minute for 50 MB.
    most = max(tokens.WINDOW, options.max_length * max(map(len, tokenizer.get_vocab())))
    for batch in batched(stream):
        made.most_documents = max(made.most_documents, *(len(each.conversations) for each in batch))
        rendered = _rendered(batch, template, control, options, most, problems, made.counts)
        if problems.must_end and len(problems) > problems.count(TOO_LONG):
            continue  # read the rest only to count wrong rows
        texts = (segments for _, parts in rendered for segments in parts)
        if not template.learn_opening and any(map(template.opens_itself, texts)):
            raise _OpensItself
        yield rendered


def _encoded(
    stream: Iterator[list[Rendered]], tokenizer: Any
) -> Iterator[tuple[list[Rendered], Iterator[Tokens]]]:
    """Yield rows with the tokens of their documents, one after another.

    The tokenizer works on a thread of its own, in Rust, while the next rows are rendered.
    """
    with ThreadPoolExecutor(1) as thread:
        before: tuple[list[Rendered], Future[list[Tokens]]] | None = None
        for batch in stream:
            texts = [segments for _, parts in batch for segments in parts]
            now = batch, thread.submit(tokens.encode, texts, tokenizer)
            if before is not None:
                yield before[0], iter(before[1].result())
            before = now
        if before is not None:
            yield before[0], iter(before[1].result())


def _all_pieces(
    documents: list[Tokens], options: Options, bos_id: int | None, place: Place, made: Tokenised
) -> list[list[Tokens]]:
    """Return the examples of a row, and note its length; `each_turn` makes one of each document.

    A row that loses some of its examples counts as cut, and one that loses all as dropped.
    """
    pieces, is_long = list[list[Tokens]](), False
    for own in [[each] for each in documents] if options.loss_on == "each_turn" else [documents]:
        made.lengths.append(sum(len(ids) for ids, _ in own))
        is_long = is_long or made.lengths[-1] > options.max_length
        pieces += _pieces(own, options, bos_id, place, made.problems)
    made.counts["num_dropped"] += not pieces
    made.counts["num_truncated"] += bool(pieces) and is_long
    return pieces


def raise_if_any(
    problems: Problems, lengths: Sequence[int], options: Options, most_documents: int
) -> None:
    """Raise DataError for wrong rows; it sums up those that are too long.

    `lengths`: the tokens of each row that was tokenised; most_documents: of a row.
    """
    too_long = problems.count(TOO_LONG)
    problems.raise_if_any({TOO_LONG: _lengths(lengths, too_long, options, most_documents)})


def require_any(made: Tokenised, sources: Sequence[str], options: Options) -> None:
    """Raise DataError if no row is left to train on."""
    if not made.ids:
        raise none_left(made.counts, sources, options)


def none_left(counts: Mapping[str, Any], sources: Sequence[str], options: Options) -> DataError:
    """Return the error for rows of which none is left to train on."""
    if not counts["num_rows"]:
        return DataError(
            f"{some(list(sources), most=1)}: data.format skips all "
            f"{counts['num_skipped']:,} rows; correct the function"
        )
    return DataError(
        f"{some(list(sources), most=1)}: all {counts['num_rows']} rows are over "
        f"data.max_length {options.max_length} and dropped; raise it"
    )


def _rendered(
    batch: Sequence[Sample], template: Template, control: ControlTokens, options: Options,
    most: int, problems: Problems, counts: dict[str, int],
) -> list[Rendered]:  # fmt: skip
    """Return samples with their segments; drop or note rows over `most` characters."""
    rendered = []
    for sample in batch:
        characters = _characters(sample)
        if characters > most and options.truncation == "drop":
            counts["num_rows"] += 1
            counts["num_dropped"] += 1
            continue
        if characters > most and options.truncation == "error":
            size = f"{characters:,} characters"
            place, count = sample.conversations[0].place, len(sample.conversations)
            over = over_length(place, size, options, None, count)
            problems.note(over, TOO_LONG, ends=True)
            continue
        with problems.noted(sample.row):
            sample = _as_asked(sample, control, options)
            loss_on = "last_turn" if options.loss_on == "each_turn" else options.loss_on
            parts = [template.segments(each, loss_on) for each in sample.conversations]
            rendered.append((sample, parts))
    return rendered


def _as_asked(sample: Sample, control: ControlTokens, options: Options) -> Sample:
    """Return a sample with the conversations that are rendered. Raise DataError if it has none."""
    conversations = list(sample.conversations)
    if options.thinking == "drop":
        conversations = [without_thoughts(each) for each in conversations]
    checked = control.as_text if options.special_tokens_in_text == "text" else control.refuse
    conversations = [checked(each) for each in conversations]
    if options.loss_on == "each_turn" and conversations[0].messages[0].role != "text":
        if len(conversations) > 1:
            raise DataError(
                f"{conversations[0].place}: data.loss_on: each_turn parts a row into its answers, "
                "and a row of several documents stays whole; use data.loss_on: completion"
            )
        conversations = turn_by_turn(conversations[0])
    if all(map(operator.is_, conversations, sample.conversations)):
        return sample
    return replace(sample, conversations=tuple(conversations))


def _pieces(
    documents: list[Tokens], options: Options, bos_id: int | None, place: Place, problems: Problems,
) -> list[list[Tokens]]:  # fmt: skip
    """Cut the documents of a row to max_length: they give one example, several, or none.

    Several documents are learned whole or not at all. Raises DataError if a piece has no supervised
    token.
    """
    length, is_one = sum(len(ids) for ids, _ in documents), len(documents) == 1
    is_long = length > options.max_length
    if is_long and options.truncation != "drop" and (options.truncation == "error" or not is_one):
        size = f"{length} tokens" + ("" if is_one else f" in {len(documents)} documents")
        over = over_length(place, size, options, length, len(documents))
        problems.note(over, TOO_LONG, ends=True)
        return []
    pieces = [documents]
    if is_long:
        pieces = [[piece] for piece in _shorten(*documents[0], options, bos_id)] if is_one else []
    if not all(supervised[1:].any() for piece in pieces for _, supervised in piece):
        can_rise = options.positions is None or options.max_length < options.positions
        raise DataError(
            f"{place}: no supervised token is left in {length} tokens cut to "
            f"{options.max_length}; "
            + ("raise data.max_length, or set" if can_rise else "set")
            + " data.truncation to drop"
        )
    return pieces


class _Finisher:
    """Put one BOS before an example, and behind it the token that ends it."""

    def __init__(self, template: Template, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.bos_id = tokenizer.bos_token_id if uses_bos(tokenizer) else None
        self.eos_id = tokenizer.eos_token_id
        self.any_bos_id = tokenizer.bos_token_id
        self.template = template

    def __call__(
        self,
        conversation: Conversation,
        segments: Sequence[Segment],
        ids: np.ndarray,
        supervised: np.ndarray,
    ) -> tuple[np.ndarray, np.ndarray]:
        if self.bos_id is not None and (ids.size == 0 or ids[0] != self.bos_id):
            ids = np.concatenate(([np.int32(self.bos_id)], ids))
            supervised = np.concatenate((np.zeros(1, supervised.dtype), supervised))
        # Further BOS are the template's own: Llama 2's puts one before every question.
        is_text, bos_id = conversation.messages[0].role == "text", self.any_bos_id
        if not is_text and bos_id not in (None, self.eos_id) and ids.size and ids[0] == bos_id:
            self._require_one_bos(conversation, ids)
        if is_text or self.template.stop_of(segments) is None:
            if self.eos_id is None:
                raise ModelError(
                    "the tokenizer has no EOS token and the template does not end turns, so the "
                    "model cannot learn to stop; set eos_token"
                )
            weight = supervised[-1:] if supervised[-1:].any() else [True]  # that of the answer
            ids, supervised = np.append(ids, np.int32(self.eos_id)), np.append(supervised, weight)
        return ids, supervised

    def _require_one_bos(self, conversation: Conversation, ids: np.ndarray) -> None:
        """Raise DataError if nothing stands between the first BOS and another."""
        again = np.flatnonzero(ids[1:] == self.any_bos_id)
        if again.size and not self.tokenizer.decode(ids[1 : 1 + again[0]]).strip():
            raise DataError(
                f"{conversation.place}: data.template {self.template.name!r} begins with more than "
                f"one BOS {self.tokenizer.bos_token!r}; write it once, or leave it to the tokenizer"
            )


def answered(
    conversations: Sequence[Conversation], template: Template, tokenizer: Any
) -> list[Tokens]:
    """Return the tokens of conversations as a run learns them, with their last answers supervised.

    Special tokens in their text stay characters. Raises DataError for a row that the template
    cannot render.
    """
    finish, problems = _Finisher(template, tokenizer), Problems()
    control = ControlTokens(tokenizer, template.turn_ends)
    texts: list[list[Segment]] = []
    for each in conversations:
        problems.num_rows += 1
        with problems.noted():
            texts.append(template.segments(control.as_text(each), "last_turn"))
    problems.raise_if_any()
    encoded = tokens.encode(texts, tokenizer)
    return [
        finish(conversation, segments, *found)
        for conversation, segments, found in zip(conversations, texts, encoded)
    ]


def _cut(num_documents: int, advice: Advice) -> str:
    """Say which data.truncation takes a row that is too long."""
    if num_documents > 1:
        return "data.truncation to drop, as rows of several documents are not cut"
    return advice.cut


def over_length(
    place: Place, size: str, options: Options, length: int | None, num_documents: int
) -> str:
    """Say that a row is too long. `length`: its tokens; None if there are too many to count."""
    remedy = f"remove it, or set {_cut(num_documents, options.advice)}"
    if length is not None:
        limit, positions = options.max_length, options.positions
        remedy = fitting(length, limit, positions, options.advice, num_documents)
    return f"{place}: {size}, over data.max_length {options.max_length}; {remedy}"


def fitting(
    longest: int, limit: int, positions: int | None, advice: Advice, num_documents: int = 1
) -> str:
    """Say what to do about rows of up to `longest` tokens where data.max_length is `limit`.

    Never suggests a length that the model's positions do not allow.
    """
    if positions is not None and longest > positions:
        lower = f"data.max_length: {positions} and " if limit != positions else ""
        return (
            f"data.max_length can be at most {positions}, as the model has no more positions: set "
            f"{lower}{_cut(num_documents, advice)}"
        )
    enough = -(-longest // 64) * 64
    cut = _cut(num_documents, advice)
    return f"set data.max_length: {min(enough, positions or enough)}, or {cut}"


def _lengths(lengths: Sequence[int], too_long: int, options: Options, num_documents: int) -> str:
    """Say how many rows are too long, and which data.max_length would fit."""
    limit = options.max_length
    if not lengths:
        return f"{too_long:,} rows are longer than data.max_length {limit}"
    fit = sum(length <= limit for length in lengths)
    if len(lengths) < too_long + fit:  # some were not even tokenised
        return (
            f"{too_long:,} rows are longer than data.max_length {limit}, some by far: remove them, "
            f"or set {_cut(num_documents, options.advice)}"
        )
    longest, usual = max(lengths), int(np.percentile(lengths, 95, method="higher"))
    return (
        f"{too_long:,} of {len(lengths):,} rows are longer than data.max_length {limit}; the "
        f"longest has {longest:,} tokens, and 95% have at most {usual:,}: "
        f"{fitting(longest, limit, options.positions, options.advice, num_documents)}"
    )


def _shorten(
    ids: np.ndarray, supervised: np.ndarray, options: Options, bos_id: int | None
) -> list[Tokens]:
    """Return what data.truncation makes of a document of over max_length tokens."""
    limit, over = options.max_length, len(ids) - options.max_length
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
            if has_prompt:  # the rest of an answer without its prompt is read, but not learned
                rest = len(ids)
                if not supervised[head:].all():
                    rest = head + int(np.argmin(supervised[head:]))
                supervised[head:rest] = False
        return [(ids, supervised)]
    pieces = []
    # Without a BOS, a piece begins with the last token of the one before, so that each token is
    # predicted once.
    for start in range(head, len(ids) - (1 - head), limit - 1):
        piece = slice(start, start + limit - head)
        piece_ids = np.concatenate([ids[:head], ids[piece]])
        pieces.append((piece_ids, np.concatenate([supervised[:head], supervised[piece]])))
    return pieces
