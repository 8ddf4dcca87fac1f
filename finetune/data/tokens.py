"""Turn text into token ids, and mark which of these are supervised.

The rendered text is tokenised whole, as at inference, and a token is supervised when its characters
lie in a supervised segment.
"""

import hashlib
import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import numpy as np

from finetune.data.control_tokens import CUT, ControlTokens, uses_bos
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.data.templates import Segment, Template
from finetune.errors import DataError

WINDOW = 1 << 20  # characters of a longer text that are tokenised together
OVERLAP = 1 << 14  # characters that two windows share
AGREED = 32  # equal tokens that join two windows


Tokens = tuple[np.ndarray, np.ndarray]
"""A document: input_ids int32 [T], and which are supervised: bool [T], or float32 [T] where the row
has weights, 0 for tokens that are not supervised."""


def encode(texts: Sequence[Sequence[Segment]], tokenizer: Any) -> list[Tokens]:
    """Encode the segments of several rows; return `Tokens` of each."""
    if not texts:
        return []
    whole = ["".join(segment.text for segment in segments) for segments in texts]
    bounds = [np.cumsum([0] + [len(segment.text) for segment in segments]) for segments in texts]
    answers = [
        [n for n, segment in enumerate(segments) if n and segment.supervised] for segments in texts
    ]
    encoded = _tokenise(whole, tokenizer)
    prompts = [text[: b[n]] for text, b, turns in zip(whole, bounds, answers) for n in turns]
    asked = iter(_ids(prompts, tokenizer))
    results = []
    for (ids, starts), bound, segments, turns in zip(encoded, bounds, texts, answers):
        owner = np.searchsorted(bound.astype(starts.dtype), starts, side="right")
        owner -= 1
        np.minimum(owner, len(segments) - 1, out=owner)
        prompts_alone = [(n, next(asked)) for n in turns]
        if not all(_begins_with(ids, owner, prompt, n) for n, prompt in prompts_alone):
            # Inference tokenises a prompt alone, and here that gives other tokens than before its
            # answer: one token would reach over the boundary. So training cuts there, too.
            parts = [
                (_continue if n else _alone)(segment.text, tokenizer)[0]
                for n, segment in enumerate(segments)
            ]
            ids = np.concatenate(parts)
            owner = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
        supervised = np.array([segment.supervised for segment in segments], bool)
        if any(segment.weight != 1 for segment in segments):
            weights = np.array([segment.weight for segment in segments], np.float32)
            supervised = np.where(supervised, weights, np.float32(0))
        results.append((ids, supervised[owner]))
    return results


def _begins_with(ids: np.ndarray, owner: np.ndarray, prompt: np.ndarray, turn: int) -> bool:
    """Return whether a row begins with the tokens of its prompt, and only those precede `turn`.

    owner: the segment of each token; turn: the segment behind the prompt.
    """
    length = len(prompt)
    is_apart = (owner[:length] < turn).all() and (owner[length:] >= turn).all()
    return bool(is_apart and np.array_equal(ids[:length], prompt))


def _ids(texts: list[str], tokenizer: Any) -> list[np.ndarray]:
    return [ids for ids, _ in _tokenise(texts, tokenizer, offsets=False)]


def _tokenise(
    texts: list[str], tokenizer: Any, offsets: bool = True, most: int | None = None
) -> list[tuple[np.ndarray, np.ndarray]]:
    """Return (ids int32 [T], first character of each token [T]) of each text.

    Without `offsets` the second is meaningless.
    """
    most = most or WINDOW
    # The backend at once, as `tokenizer(...)` takes as long again to make lists of what it returns.
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    backend.encode_special_tokens = tokenizer.split_special_tokens
    encode = backend.encode_batch if offsets else backend.encode_batch_fast
    usual = [text for text in texts if len(text) <= most and CUT not in text]
    short = iter(encode(usual, add_special_tokens=False))
    return [
        _tokenise_cut(text, tokenizer) if CUT in text
        else _arrays(next(short), offsets) if len(text) <= most
        else _tokenise_long(text, tokenizer)
        for text in texts
    ]  # fmt: skip


def _arrays(encoding: Any, offsets: bool) -> tuple[np.ndarray, np.ndarray]:
    starts = [start for start, _ in encoding.offsets] if offsets else []
    return np.array(encoding.ids, np.int32), np.array(starts, np.int64)


def _tokenise_cut(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise the pieces between cuts one by one; a cut has no token."""
    parts, at = [], 0
    for number, piece in enumerate(text.split(CUT)):
        ids, starts = (_continue if number else _alone)(piece, tokenizer)
        parts.append((ids, starts + at))
        at += len(piece) + len(CUT)
    all_ids, all_starts = zip(*parts)
    return np.concatenate(all_ids), np.concatenate(all_starts)


def _alone(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    return _tokenise([text], tokenizer)[0]


def _tokenise_long(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a text of any length in overlapping windows, so that memory does not grow with it.

    Two windows are joined inside their overlap, where AGREED tokens in a row are the same in both:
    distant text does not change a token. Where they do not agree, the first is made longer, at last
    as long as the text.
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
    all_ids, all_starts = zip(*parts)
    return np.concatenate(all_ids), np.concatenate(all_starts)


def _joint(
    ids: np.ndarray, starts: np.ndarray, next_ids: np.ndarray, next_starts: np.ndarray
) -> tuple[int, int] | None:
    """Return a token of one window and the same in the next, where AGREED equal tokens begin.

    None if there are none.
    """
    for i in range(int(np.searchsorted(starts, next_starts[0])), len(ids) - AGREED + 1):
        j = int(np.searchsorted(next_starts, starts[i]))
        here, there = slice(i, i + AGREED), slice(j, j + AGREED)
        same_ids = np.array_equal(ids[here], next_ids[there])
        if same_ids and np.array_equal(starts[here], next_starts[there]):
            return i, j
    return None


def _continue(text: str, tokenizer: Any) -> tuple[np.ndarray, np.ndarray]:
    """Tokenise a text that continues another: Llama's tokenizer puts a space before text alone."""
    for before in ("\n", tokenizer.eos_token or "\n"):
        (head, _), (ids, starts) = _tokenise([before, before + text], tokenizer)
        if np.array_equal(ids[: len(head)], head):
            return ids[len(head) :], starts[len(head) :] - len(before)
    return _alone(text, tokenizer)


def encode_prompt(text: str, tokenizer: Any) -> list[int]:
    """Encode a prompt as training saw it: with one BOS if the tokenizer uses one."""
    ids = _ids([text], tokenizer)[0].tolist()
    if uses_bos(tokenizer) and ids[:1] != [tokenizer.bos_token_id]:
        ids = [tokenizer.bos_token_id, *ids]
    return list(ids)


def sample_prompt(
    template: Template | None, tokenizer: Any, prompt: str, system_prompt: str | None
) -> str:
    """Render one of evaluation.sample_prompts as chat does; without a template return itself."""
    if template is None:
        return prompt
    messages = [Message("user", prompt)]
    if system_prompt is not None:
        messages.insert(0, Message("system", system_prompt, from_setting=True))
    asked = Conversation(tuple(messages), Place("evaluation.sample_prompts", 1))
    asked = ControlTokens(tokenizer, template.turn_ends).as_text(asked)
    return template.prompt(asked.messages, asked.place)


def with_bos(template: Template, tokenizer: Any) -> Template:
    """Return the template, writing the BOS itself where text has other tokens behind it than alone.

    Llama's tokenizer puts a space before a text alone, and none behind a BOS. The exported template
    writes the BOS, so training has to tokenise it with the text.
    """
    if not uses_bos(tokenizer):
        return template
    with suppress(DataError):  # reported with the first row
        prompt = template.prompt(template.probe)
        alone, behind = _ids([prompt, tokenizer.bos_token + prompt], tokenizer)
        if not (prompt.startswith(tokenizer.bos_token) or np.array_equal(behind[1:], alone)):
            return replace(template, source="{{ bos_token }}" + template.source)
    return template


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash a tokenizer: vocabulary, merges, normalisation, special tokens.

    Settings of tokenizer_config.json that apply at each call count, too. Truncation and padding of
    a tokenizer.json do not: they never apply here, and reading rows switches them off.
    """
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    switches = [uses_bos(tokenizer), bool(getattr(tokenizer, "split_special_tokens", False))]
    parts = [
        tokenizer.backend_tokenizer.to_str(),
        json.dumps([tokenizer.special_tokens_map, switches], sort_keys=True),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def predicting(supervised: np.ndarray) -> np.ndarray:
    """Return the places of a document whose next token is supervised, int64 [S].

    Its first token is never learned: no token before it predicts it.
    """
    return np.flatnonzero(supervised[1:])
