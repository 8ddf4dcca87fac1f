"""Tokenise rows for encoders and encoder-decoders, with the tokenizer's own frame around a text.

BERT's frame is [CLS] ... [SEP], T5's ends with </s>. Causal models take templates, a BOS and an EOS
instead: `tokens.tokenise`.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from tqdm import tqdm

from finetune.data import tokens
from finetune.data.conversations import Sample
from finetune.data.problems import Problems
from finetune.data.tokens import TOO_LONG, ControlTokens, Options, Tokenised
from finetune.errors import DataError


@dataclass(frozen=True)
class Frame:
    """The tokens that a tokenizer puts around a text by itself, int32."""

    head: np.ndarray
    tail: np.ndarray

    def __len__(self) -> int:
        return len(self.head) + len(self.tail)

    def around(self, ids: np.ndarray) -> np.ndarray:
        return np.concatenate([self.head, ids, self.tail])


def frame_of(tokenizer: Any) -> Frame:
    """Return the frame of a tokenizer, by what it puts around a letter."""
    [plain], framed = tokens._ids(["a"], tokenizer), tokenizer("a")["input_ids"]
    size = len(plain)
    starts = range(len(framed) - size + 1)
    at = next((n for n in starts if framed[n : n + size] == plain.tolist()), 0)
    return Frame(np.array(framed[:at], np.int32), np.array(framed[at + size :], np.int32))


def tokenise(sources: Sequence[str], tokenizer: Any, options: Options) -> Tokenised:
    """Tokenise all rows of all sources. Raise DataError that names file and line."""
    return _Tokenising(sources, tokenizer, options).run()


class _Tokenising:
    """One pass over the rows."""

    def __init__(self, sources: Sequence[str], tokenizer: Any, options: Options) -> None:
        self.sources, self.tokenizer, self.options = sources, tokenizer, options
        self.frame, self.made = frame_of(tokenizer), Tokenised()
        self.made.counts = dict.fromkeys(("num_rows", "num_truncated", "num_dropped"), 0)
        own = (tokenizer.cls_token, tokenizer.sep_token, tokenizer.mask_token)
        self.control = ControlTokens(tokenizer, [token for token in own if token])
        self.index = {source: number for number, source in enumerate(sources)}
        self.problems, self.lengths = Problems(options.skipping), list[int]()

    def run(self) -> Tokenised:
        unread = Counter[str]()
        bar = tqdm(desc="tokenising", unit=" rows", disable=None, leave=False)
        for batch in tokens._batches(self.options.samples(self.sources, self.problems, unread)):
            self._add(batch)
            bar.update(len(batch))
        bar.close()
        too_long = self.problems.count(TOO_LONG)
        self.problems.raise_if_any({TOO_LONG: tokens._lengths(
            self.lengths, too_long, self.options, 1
        )})  # fmt: skip
        self.made.note(self.problems, unread)
        tokens._require_any(self.made, self.sources, self.options)
        return self.made

    def _add(self, batch: Sequence[Sample]) -> None:
        texts = [sample.conversations[0].messages[0].content for sample in batch]
        # A longer one has more than max_length tokens in any case, as in `tokens.tokenise`.
        for sample, (ids, _) in zip(batch, tokens._tokenise(texts, self.tokenizer)):
            self.made.counts["num_rows"] += 1
            with self.problems.noted(sample.row):
                self.control.refuse(sample.conversations[0])
                place = sample.conversations[0].place
                if not len(ids):
                    raise DataError(f"{place}: the text has no tokens; remove the row")
                self.lengths.append(len(ids) + len(self.frame))
                pieces = list(self._pieces(ids, sample))
                self.made.add(pieces, sample, (self.index[place.source], place.line, place.row))

    def _pieces(self, ids: np.ndarray, sample: Sample) -> Iterator[list[tokens.Tokens]]:
        """Cut a text to max_length, and put the frame around each piece."""
        options, counts, place = self.options, self.made.counts, sample.conversations[0].place
        room = options.max_length - len(self.frame)
        if len(ids) > room and options.truncation == "error":
            length = len(ids) + len(self.frame)
            over = tokens._over(place, f"{length} tokens", options, length, 1)
            self.problems.note(over, TOO_LONG, ends=True)
            return
        if len(ids) > room and options.truncation == "drop":
            counts["num_dropped"] += 1
            return
        counts["num_truncated"] += len(ids) > room
        parts = [ids]
        if len(ids) > room:
            kept = {"right": slice(0, room), "left": slice(len(ids) - room, None)}
            if options.truncation in kept:
                parts = [ids[kept[options.truncation]]]
            else:
                parts = [ids[start : start + room] for start in range(0, len(ids), room)]
        for part in parts:
            framed = self.frame.around(part)
            supervised = np.zeros(len(framed), bool)
            supervised[len(self.frame.head) : len(self.frame.head) + len(part)] = True
            yield [(framed, supervised)]
