"""Show sequences as the model gets them: what becomes of every token of every row.

What is supervised, where documents end and what is padding come from the batches of training.
What was cut off comes from the same rows, tokenised by the same code without a limit.
"""

import os
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from finetune.data.batches import Batch, Batches
from finetune.data.examples import Examples

SUPERVISED, MASKED, CUT = "supervised", "masked", "cut"
TRAINED, HELD_OUT, DROPPED, LEFT_OUT = "trained", "held out", "dropped", "left out"
# Tokens that are decoded before a run of tokens: some tokenizers drop a space at the beginning of
# what they decode, and some tokens hold a part of a character.
BEFORE = 8

Key = tuple[int, int, int]
"""Where a row stands: number of its source, line, row."""


@dataclass(frozen=True)
class Span:
    """Neighbouring tokens with the same fate. `kind`: SUPERVISED, MASKED or CUT."""

    kind: str
    is_special: bool
    text: str
    num_tokens: int


@dataclass(frozen=True)
class ShownDocument:
    """One document; `row` counts the rows of data.train from 1, `place` is file:line."""

    row: int
    place: str
    spans: list[Span]
    num_tokens: int
    num_supervised: int
    cut: str = ""
    """What data.truncation did, such as "right": "12 tokens are cut on the right"."""
    padding: int = 0
    """Tokens behind it, up to the longest document of its micro-batch in the first epoch."""
    columns: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Item:
    """A sequence of the training or of the held-out rows; None: a row that is in neither."""

    fate: str
    sequence: int | None
    rows: tuple[int, ...]


@dataclass(frozen=True)
class ShownSequence:
    """What the model gets at once, or a row that it does not get. `step`: of the first epoch."""

    fate: str
    step: int | None
    documents: list[ShownDocument]


class Xray:
    """All rows of data.train, in their order, by the sequences that they are in.

    `whole`: all rows before max_length, max_rows and held-out rows; None if nothing was cut,
    dropped or left out. `held_out`: batches of the rows that data.eval_fraction keeps.
    """

    def __init__(
        self, train: Batches, held_out: Batches | None, whole: Examples | None, tokenizer: Any,
        max_length: int, truncation: str,
    ) -> None:  # fmt: skip
        self._batches = {TRAINED: train} | ({HELD_OUT: held_out} if held_out else {})
        self._tokenizer, self._max_length, self._truncation = tokenizer, max_length, truncation
        self._special = set(tokenizer.all_special_ids)
        added = getattr(tokenizer, "added_tokens_decoder", {})
        self._special |= {number for number, token in added.items() if token.special}
        self._whole = whole
        self._whole_of: dict[Key, list[int]] = {}
        for number, key in enumerate(_keys(whole) if whole else ()):
            self._whole_of.setdefault(key, []).append(number)
        self._keys = {
            fate: list(_keys(each.in_memory.examples)) for fate, each in self._batches.items()
        }
        self._rows = sorted(set(self._whole_of).union(*self._keys.values()))
        self._row = {key: number for number, key in enumerate(self._rows, 1)}
        self._parts = {fate: _parts(keys) for fate, keys in self._keys.items()}
        self._steps, self._widths = _first_epoch(train)
        self.items = sorted(self._items(), key=lambda item: item.rows)

    @property
    def num_rows(self) -> int:
        return len(self._rows)

    def row_at(self, place: str) -> int | None:
        """Return the number of the row at file:line, as messages write it; None if unknown.

        The end of a path will do, such as rows.jsonl:7.
        """
        for key, number in self._row.items():
            here = self._place(key)
            if here == place or here.endswith(f"/{place}"):
                return number
        return None

    def items_of(self, row: int) -> list[Item]:
        """Return the sequences that hold a row: several if it was split, or is in packs."""
        return [item for item in self.items if row in item.rows]

    def counts(self) -> Counter[str]:
        """Count the rows by fate."""
        rows: dict[int, str] = {row: item.fate for item in self.items for row in item.rows}
        return Counter(rows.values())

    def show(self, item: Item) -> ShownSequence:
        """Return a sequence as the model gets it."""
        if item.sequence is None:
            return ShownSequence(item.fate, None, [self._never_seen(item.rows[0], item.fate)])
        step = int(self._steps[item.sequence]) if item.fate == TRAINED else None
        return ShownSequence(item.fate, step, list(self._documents(item.fate, item.sequence)))

    def _items(self) -> Iterator[Item]:
        seen = set[Key]()
        for fate, batches in self._batches.items():
            keys = self._keys[fate]
            for number in range(len(batches.in_memory)):
                own = [keys[example] for example in batches.in_memory.members(number)]
                seen.update(own)
                yield Item(fate, number, tuple(sorted({self._row[key] for key in own})))
        for key, numbers in self._whole_of.items():
            if key not in seen:
                assert self._whole is not None
                is_long = self._whole.lengths[numbers].max() > self._max_length
                yield Item(DROPPED if is_long else LEFT_OUT, None, (self._row[key],))

    def _documents(self, fate: str, sequence: int) -> Iterator[ShownDocument]:
        batches = self._batches[fate]
        examples, members = batches.in_memory.examples, batches.in_memory.members(sequence)
        batch = batches.of_sequence(sequence)
        ids = batch.inputs["input_ids"].flatten().numpy()
        supervised = np.zeros(len(ids), bool)
        if not examples.view.predicts_documents and not examples.view.has_target:
            # In a causal model a place predicts the token behind it.
            supervised[batch.positions.numpy() + examples.view.shift] = True
        width = int(self._widths[sequence]) if fate == TRAINED else 0
        for number, (end, length) in enumerate(zip(batch.ends.tolist(), batch.lengths)):
            part = slice(end + 1 - length, end + 1)
            example = int(members[int(batch.example[number])])
            kinds = np.where(supervised[part], SUPERVISED, MASKED)
            all_ids, all_kinds, cut = self._with_cut(fate, example, ids[part], kinds)
            key = self._keys[fate][example]
            columns = {name: float(v[number]) for name, v in batch.columns.items() if v.dim() == 1}
            yield ShownDocument(
                self._row[key], examples.place(example), self._spans(all_ids, all_kinds), length,
                int(supervised[part].sum()), cut, max(0, width - length),
                columns | _weights(batch, number),
            )  # fmt: skip

    def _with_cut(
        self, fate: str, example: int, ids: np.ndarray, kinds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, str]:
        """Put back what was cut off a document, and say what happened to it."""
        key = self._keys[fate][example]
        part, num_parts = self._parts[fate][example]
        if num_parts > 1 and self._truncation == "split":
            return ids, kinds, f"part {part} of {num_parts} of its row"
        framed = not self._batches[fate].sequences.examples.view.shift
        # Nothing is cut, or some are dropped, or a frame stays around what is left.
        if len(self._whole_of.get(key, ())) != num_parts or framed:
            return ids, kinds, ""
        assert self._whole is not None
        documents = self._whole.documents(self._whole_of[key][part - 1])
        if len(documents) > 1:  # rows of several documents are never cut
            return ids, kinds, ""
        whole = np.asarray(self._whole.input.ids[self._whole.input.span(documents[0])])
        over = len(whole) - len(ids)
        if not over:
            return ids, kinds, ""
        at = len(ids)
        if self._truncation == "left":  # the cut lies behind the BOS, if there is one
            at = int(whole[0] == ids[0] and whole[over] != ids[0])
        assert np.array_equal(np.delete(whole, np.s_[at : at + over]), ids)
        lost = np.full(over, CUT)
        counted = "1 token is" if over == 1 else f"{over:,} tokens are"
        return (
            whole,
            np.insert(kinds, [at] * over, lost),
            f"{counted} cut on the {self._truncation}",
        )

    def _never_seen(self, row: int, fate: str) -> ShownDocument:
        """Return a row that the model never gets, with all its documents."""
        key = self._rows[row - 1]
        assert self._whole is not None
        documents = [n for each in self._whole_of[key] for n in self._whole.documents(each)]
        parts = [self._whole.input.span(n) for n in documents]
        ids = np.concatenate([np.asarray(self._whole.input.ids[part]) for part in parts])
        why = f"over data.max_length {self._max_length}: dropped"
        if fate == LEFT_OUT:
            why = "left out by data.max_rows, data.weights or data.token_budgets"
        spans = self._spans(ids, np.full(len(ids), CUT))
        return ShownDocument(row, self._place(key), spans, len(ids), 0, why)

    def _place(self, key: Key) -> str:
        batches = self._batches[TRAINED]
        return batches.in_memory.examples.place_of(*key)

    def _spans(self, ids: np.ndarray, kinds: np.ndarray) -> list[Span]:
        special = np.array([number in self._special for number in ids.tolist()], bool)
        changes = (kinds[1:] != kinds[:-1]) | (special[1:] != special[:-1])
        cuts = [0, *(np.flatnonzero(changes) + 1).tolist(), len(ids)]
        texts = decoded(ids, cuts, self._tokenizer)
        return [
            Span(str(kinds[start]), bool(special[start]), text, end - start)
            for start, end, text in zip(cuts, cuts[1:], texts)
        ]


def _weights(batch: Batch, document: int) -> dict[str, float]:
    """Return the weight of a document's answers, or the least and the largest of several."""
    if batch.weights is None or not (batch.document == document).any():
        return {}
    own = batch.weights[batch.document == document]
    least, most = float(own.min()), float(own.max())
    return {"weight": least} if least == most else {"least weight": least, "largest weight": most}


def _keys(examples: Examples) -> Iterator[Key]:
    return zip(examples.source.tolist(), examples.line.tolist(), examples.row.tolist())


def _parts(keys: list[Key]) -> list[tuple[int, int]]:
    """Return of each example which of how many examples of its row it is."""
    total, so_far, parts = Counter(keys), Counter[Key](), []
    for key in keys:
        so_far[key] += 1
        parts.append((so_far[key], total[key]))
    return parts


def _first_epoch(train: Batches) -> tuple[np.ndarray, np.ndarray]:
    """Return the step of each sequence, and the width of its micro-batch; 0 without padding."""
    steps, widths = np.zeros((2, len(train.in_memory)), np.int64)
    longest = train.in_memory.examples.most_tokens() if train.padded else None
    for step in range(train.steps_per_epoch):
        chosen = train.of_step(step)
        steps[chosen] = step + 1
        if longest is not None:
            for start in range(0, len(chosen), train.micro_batch_size):
                micro = chosen[start : start + train.micro_batch_size]
                widths[micro] = longest[micro].max()
    return steps, widths


def decoded(ids: np.ndarray, cuts: Sequence[int], tokenizer: Any) -> list[str]:
    """Return the text between neighbouring cuts of a document; joined, they are its text."""
    texts = []
    for start, end in zip(cuts, cuts[1:]):
        first = max(0, start - BEFORE)
        before, after = (
            tokenizer.decode(ids[first:stop].tolist(), clean_up_tokenization_spaces=False)
            for stop in (start, end)
        )
        same = os.path.commonprefix([before, after])  # noqa: RUF071
        texts.append(after[len(same) :])
    return texts
