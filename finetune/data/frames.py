"""Tokenise rows for encoders and encoder-decoders, with the tokenizer's own frame around a text.

BERT's frame is [CLS] ... [SEP], T5's ends with </s>. Causal models take templates, a BOS and an EOS
instead: `tokenised.tokenise`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune.data import tokenised, tokens
from finetune.data.control_tokens import ControlTokens
from finetune.data.conversations import Conversation, Label, Message, Sample, turn_by_turn
from finetune.data.places import Place, list_columns, short, some
from finetune.data.problems import Problems
from finetune.data.tokenised import TOO_LONG, Options, Tokenised
from finetune.errors import DataError, ModelError


@dataclass(frozen=True)
class Frame:
    """The tokens that a tokenizer puts around a text by itself, int32."""

    head: np.ndarray
    tail: np.ndarray

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)

    def around(self, values: np.ndarray, filler: Any = None) -> np.ndarray:
        """Return the frame around values of tokens; `filler` in place of the frame's tokens."""
        ends = [self.head, self.tail]
        if filler is not None:
            ends = [np.full(len(end), filler, values.dtype) for end in ends]
        return np.concatenate([ends[0], values, ends[1]])


def frame_of(tokenizer: Any) -> Frame:
    """Return the frame of a tokenizer, by what it puts around a letter."""
    [plain], framed = tokens._ids(["a"], tokenizer), tokenizer("a")["input_ids"]
    size = len(plain)
    starts = range(len(framed) - size + 1)
    at = next((n for n in starts if framed[n : n + size] == plain.tolist()), 0)
    return Frame(np.array(framed[:at], np.int32), np.array(framed[at + size :], np.int32))


def ended(frame: Frame, tokenizer: Any) -> Frame:
    """Return the frame of what a decoder writes, which ends with EOS. Raises ModelError."""
    eos_id = tokenizer.eos_token_id
    if eos_id is None:
        raise ModelError(
            "the tokenizer has no EOS token, so the decoder cannot learn to stop; set eos_token"
        )
    if eos_id in frame.tail:
        return frame
    return Frame(frame.head, np.append(frame.tail, np.int32(eos_id)))


def tokenise(sources: Sequence[str], tokenizer: Any, options: Options) -> Tokenised:
    """Tokenise all rows of all sources. Raise DataError that names file and line."""
    tokenising = _Tokenising(sources, tokenizer, options)
    made = tokenising.run(quiet=False)
    tokenised.raise_if_any(made.problems, made.lengths, options, made.most_documents)
    tokenised.require_any(made, sources, options)
    if tokenising.labels.numbers:
        made.counts["labels"] = tokenising.labels.settle(made, some(list(sources)))
    return made


def tokenise_part(
    sources: Sequence[str], tokenizer: Any, options: Options, quiet: bool = False
) -> Tokenised:
    """Tokenise rows, and note in `problems` what is wrong with them. `quiet`: show no progress."""
    return _Tokenising(sources, tokenizer, options).run(quiet)


class _Tokenising:
    """One pass over the rows."""

    def __init__(self, sources: Sequence[str], tokenizer: Any, options: Options) -> None:
        self.sources, self.tokenizer, self.options = sources, tokenizer, options
        self.frame, self.made = frame_of(tokenizer), Tokenised()
        self.made.counts = dict.fromkeys(("num_rows", "num_truncated", "num_dropped"), 0)
        own = (tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
        control = ControlTokens(tokenizer, [token for token in own if token])
        stay = options.special_tokens_in_text == "text"
        self.check = control.as_text if stay else control.refuse
        self.index = {source: number for number, source in enumerate(sources)}
        self.problems = self.made.problems = Problems(options.skipping)
        self.lengths = self.made.lengths
        self.labels = _Labels(options.labels)

    def run(self, quiet: bool) -> Tokenised:
        unread = Counter[str]()
        bar = tqdm(desc="tokenising", unit=" rows", disable=quiet or None, leave=False)
        for batch in tokenised.batched(self.options.samples(self.sources, self.problems, unread)):
            self._add(batch)
            bar.update(len(batch))
        bar.close()
        self.made.note(self.problems, unread)
        return self.made

    def _add(self, batch: Sequence[Sample]) -> None:
        checked = list[tuple[Sample, str]]()
        for sample in batch:
            with self.problems.noted(sample.row):
                conversation = self.check(self._only(sample))
                if conversation.messages[0].role == "text":
                    checked.append((sample, conversation.messages[0].content))
                else:
                    self._add_pairs(conversation, sample)
        texts = [text for _, text in checked]
        encoded = tokens._tokenise(texts, self.tokenizer) if texts else []
        for (sample, text), (ids, starts) in zip(checked, encoded):
            with self.problems.noted(sample.row):
                place = sample.conversations[0].place
                if not len(ids):
                    raise DataError(f"{place}: the text has no tokens; remove the row")
                self.lengths.append(len(ids) + len(self.frame))
                numbers = [self.labels.number(label, place) for label in sample.labels]
                if sample.words:
                    of_tokens = _of_tokens(text.split(" "), numbers, starts)
                    pieces = list(self._pieces(ids, place, of_tokens))
                else:
                    pieces = list(self._pieces(ids, place))
                    fields = {"label": (float(numbers[0]),)} if numbers else {}
                    sample = replace(sample, fields=fields)
                where = (self.index[place.source], place.line, place.row)
                self.made.add([[piece] for piece in pieces], sample, where)
                self.made.counts["num_rows"] += 1

    def _only(self, sample: Sample) -> Conversation:
        """Return what a row holds. Raise DataError where a user's own function gives more."""
        conversation, *others = sample.conversations
        if self.options.is_own:
            what = "several documents" if others else "fields" if sample.fields else ""
            if conversation.messages[0].role != "text":
                what = "prompts and answers"
            if what:
                raise DataError(
                    f"{conversation.place}: data.format returns {what}, but this objective learns "
                    'one text of each row; return {"text": ...}'
                )
        return conversation

    def _add_pairs(self, conversation: Conversation, sample: Sample) -> None:
        """Add an example for each answer of a conversation: what comes before it is the input."""
        place, made = conversation.place, self.made
        pieces, target_ids, is_cut = list[list[tokens.Tokens]](), list[np.ndarray](), False
        if conversation.tools or any(m.parts or m.weight != 1 for m in conversation.messages):
            raise DataError(
                f"{place}: has tools, calls of tools or weights, which objective.kind: seq2seq "
                "does not learn; remove them"
            )
        made.counts["num_rows"] += 1
        for turns in turn_by_turn(conversation):
            asked = "\n\n".join(map(_text_of, turns.messages[:-1]))
            texts = [self.options.source_prefix + asked, _text_of(turns.messages[-1])]
            plain = tokens._ids(texts, self.tokenizer)
            frames = (self.frame, ended(self.frame, self.tokenizer))
            parts = [self._one(ids, frame, place) for ids, frame in zip(plain, frames)]
            if parts[0] is None or parts[1] is None:
                made.counts["num_dropped"] += 1
                return
            sizes = (len(ids) + len(frame) for ids, frame in zip(plain, frames))
            is_cut = is_cut or max(sizes) > self.options.max_length
            pieces.append([(parts[0], np.zeros(len(parts[0]), bool))])
            target_ids.append(parts[1])
        made.counts["num_truncated"] += is_cut
        made.target_ids += target_ids
        made.add(pieces, sample, (self.index[place.source], place.line, place.row))

    def _one(self, ids: np.ndarray, frame: Frame, place: Place) -> np.ndarray | None:
        """Return one of a pair, framed and perhaps cut; None if its row is dropped or refused."""
        size, most = len(ids) + len(frame), self.options.max_length
        self.lengths.append(size)
        if size > most and self.options.truncation == "drop":
            return None
        if size > most and self.options.truncation == "error":
            over = tokenised.over_length(place, f"{size} tokens", self.options, size, 1)
            self.problems.note(over, TOO_LONG, ends=True)
            return None
        room = most - len(frame)
        return frame.around(ids[-room:] if self.options.truncation == "left" else ids[:room])

    def _pieces(
        self, ids: np.ndarray, place: Place, labels: np.ndarray | None = None
    ) -> Iterator[tokens.Tokens]:
        """Cut a text to max_length, and put the frame around each piece.

        `labels`: of its tokens, -1 for none; without them, all of the text is supervised.
        """
        options, counts, size = self.options, self.made.counts, len(ids) + len(self.frame)
        parts = [slice(0, len(ids))]
        if size > options.max_length:
            if options.truncation == "error":
                over = tokenised.over_length(place, f"{size} tokens", options, size, 1)
                self.problems.note(over, TOO_LONG, ends=True)
            parts = self._cut(len(ids), options.max_length - len(self.frame))
            counts["num_dropped"] += options.truncation == "drop"
            counts["num_truncated"] += bool(parts)
        for part in parts:
            supervised = np.ones(len(ids[part]), bool) if labels is None else labels[part] >= 0
            if not supervised.any():
                raise DataError(
                    f"{place}: no word with a label is left in {size} tokens cut to "
                    f"{options.max_length}; raise data.max_length, or set data.truncation to drop"
                )
            if labels is not None:
                self.made.target_ids.append(self.frame.around(labels[part], -1))
            yield self.frame.around(ids[part]), self.frame.around(supervised, False)

    def _cut(self, length: int, room: int) -> list[slice]:
        """Return the parts of a text that are kept."""
        kept = {
            "right": [slice(0, room)],
            "left": [slice(length - room, length)],
            "split": [slice(start, start + room) for start in range(0, length, room)],
        }
        return kept.get(self.options.truncation, [])


def _text_of(message: Message) -> str:
    return f"{message.content}\n{message.context}" if message.context else message.content


def _of_tokens(words: Sequence[str], numbers: Sequence[int], starts: np.ndarray) -> np.ndarray:
    """Return the label of each token, int32: that of a word at its first token, -1 elsewhere.

    words: the text between spaces. starts: the first character of each token; that of a word is the
    one that reaches over the word's first character, also where it has the space before it. A word
    of characters that the tokenizer drops has no token, and its label goes.
    """
    found = np.full(len(starts), -1, np.int32)
    lengths = np.array([len(word) for word in words])
    begins = np.cumsum(lengths + 1) - lengths - 1
    at = np.maximum(np.searchsorted(starts, begins, side="right") - 1, 0)
    at += starts[at] < begins - 1  # a token of the word before: this one's first character is gone
    own = at < len(starts)
    own[own] = starts[at[own]] < (begins + lengths)[own]
    # Several tokens may be parts of one character.
    at = np.searchsorted(starts, starts[at[own]], side="left")
    found[at] = np.array(numbers, np.int32)[own]
    return found


class _Labels:
    """The numbers of labels: those of given names, or of names in the order of the rows."""

    def __init__(self, given: Sequence[str]) -> None:
        self.given = list(given)
        self.numbers: dict[str, int] = {name: number for number, name in enumerate(given)}

    def number(self, label: Label | None, place: Place) -> int:
        """Return the number of a label, -1 for None. Raise DataError for one that is not given."""
        if label is None:
            return -1
        if not self.given:
            return self.numbers.setdefault(str(label), len(self.numbers))
        known = self.numbers.get(str(label))
        by_number = str(label).isdecimal() and not any(map(str.isdecimal, self.given))
        if known is None and by_number and int(label) < len(self.given):
            known = int(label)  # rows may have numbers in place of names that are none
        if known is None:
            raise DataError(
                f"{place}: label {short(str(label))!r} is not one of the {len(self.given)} known: "
                f"{list_columns(self.given)}; correct it, or name all in objective.labels"
            )
        return known

    def settle(self, made: Tokenised, where: str) -> list[str]:
        """Number the labels of rows in the order of their names; return the names."""
        if self.given:
            return self.given
        is_number = all(map(str.isdecimal, self.numbers))
        names = sorted(self.numbers, key=int) if is_number else sorted(self.numbers)
        if len(names) < 2:
            raise DataError(
                f"{where}: all rows have the label {short(names[0])!r}, so there is nothing to "
                "tell apart; add rows with other labels"
            )
        order = np.empty(len(names) + 1, np.int64)
        order[[self.numbers[name] for name in names]] = np.arange(len(names))
        order[-1] = -1  # the place of -1, too
        made.target_ids = [order[target].astype(np.int32) for target in made.target_ids]
        if "label" in made.columns:
            made.columns["label"] = order[np.array(made.columns["label"], np.int64)].tolist()
        return names
