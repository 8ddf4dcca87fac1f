"""How many tokens the text of a row has, without template and special tokens."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np

from finetune.export.load import load_tokenizer
from finetune.preparation import texts, workers
from finetune.preparation.frame import Frame

BYTES = "bytes"  # the tokenizer of model.tokenizer: bytes


def of_rows(frame: Frame, sources: Sequence[str], tokenizer: str) -> np.ndarray:
    """Return the number of tokens of each row: [rows] int64."""
    count = counter(tokenizer)
    found: Iterator[str] = (
        texts.text_of(row.values, frame.columns) for row in frame.rows(sources, "counting tokens")
    )
    parts = [np.array(count(part), np.int64) for part in workers.chunks(found)]
    return np.concatenate([np.zeros(0, np.int64), *parts])


def counter(name: str) -> Callable[[list[str]], list[int]]:
    """Return what counts the tokens of texts. Raise ModelError for an unknown tokenizer."""
    if name == BYTES:
        return lambda given: [len(text.encode("utf-8", "replace")) for text in given]
    tokenizer = load_tokenizer(name)

    def count(given: list[str]) -> list[int]:
        whole = [text.encode("utf-8", "replace").decode() for text in given]
        return list(map(len, tokenizer(whole, add_special_tokens=False, verbose=False).input_ids))

    return count
