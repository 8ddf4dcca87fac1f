"""Generate one answer token by token, with stop texts, a seed and probabilities."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.generation.streamers import BaseStreamer

from finetune.generation import generate
from finetune.generation.completions import FinishReason
from finetune.generation.generate import positions, room_of_prompt
from finetune.models import families

UNKNOWN_BYTES = "\ufffd"  # what bytes of a character decode to before its last one has come


@dataclass(frozen=True)
class Sampling:
    """How an answer is drawn.

    temperature 0: always the likeliest token. seed None: as PyTorch's generator stands. stop: texts
    that end the answer and are left out of it. top_logprobs: how many likeliest tokens to note at
    each place; None: no probabilities at all.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    top_logprobs: int | None = None


@dataclass(frozen=True)
class Token:
    """A token of an answer. logprob and top: of the model itself, before temperature and top_p."""

    id: int
    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True)
class Streamed:
    """A whole answer. tokens: empty unless probabilities were asked for. is_refused: moderation put
    its refusal in the place of the answer."""

    text: str
    finish_reason: FinishReason
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[Token, ...] = ()
    is_refused: bool = False


Listener = Callable[[str, Sequence[Token]], None]
"""Gets text as it becomes final, with the tokens that it came from."""


def fitted(
    model: Any, tokenizer: Any, prompt: str, max_new_tokens: int
) -> tuple[list[int], str | None]:
    """Return the ids of a prompt, cut to leave room for the answer, and a note if they are cut.

    A prompt keeps its BOS and its end, and at least half of the model's positions.
    """
    ids, most = generate.encode(model, tokenizer, prompt), room_of_prompt(model, max_new_tokens)
    if len(ids) <= most:
        return ids, None
    note = (
        f"note: the conversation has {len(ids)} tokens, over the {most} that the model's "
        f"{positions(model)} positions leave next to answers of {max_new_tokens}; its beginning is "
        "cut off"
    )
    return generate.cut(ids, most, tokenizer), note


def stream(
    model: Any, tokenizer: Any, ids: Sequence[int], sampling: Sampling, ends: Collection[int],
    listen: Listener = lambda text, tokens: None,
) -> Streamed:  # fmt: skip
    """Generate an answer to a prompt; `listen` gets it piece by piece, and ends it by raising.

    `ids`: of the prompt, which must leave a position for the answer. `ends`: tokens that end it.
    PyTorch's generators are put back after a seed.
    """
    is_pair = families.is_encoder_decoder(model.config)
    room = positions(model) - (1 if is_pair else len(ids))
    device = next(model.parameters()).device
    inputs = torch.tensor([list(ids)], device=device)
    writer = _Writer(tokenizer, sampling, frozenset(ends), listen)
    before = model.generation_config
    model.generation_config = _config(before, tokenizer, sampling, ends, is_pair)
    try:
        gpus = [device] if device.type == "cuda" else []
        with torch.no_grad(), torch.random.fork_rng(gpus, enabled=sampling.seed is not None):
            if sampling.seed is not None:
                torch.manual_seed(sampling.seed)
            model.generate(
                input_ids=inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=min(sampling.max_new_tokens, room),
                streamer=writer,
                logits_processor=LogitsProcessorList([writer.probabilities]),
                stopping_criteria=StoppingCriteriaList([writer.stopped]),
            )
    finally:
        model.generation_config = before
    return writer.whole(len(ids))


def _config(
    before: Any, tokenizer: Any, sampling: Sampling, ends: Collection[int], is_pair: bool
) -> GenerationConfig:
    """Return settings that replace the model's own, such as a repetition penalty, for all alike."""
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    choice: dict[str, Any] = {"do_sample": False}
    if sampling.temperature:
        choice = {
            "do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p,
            "top_k": 0,
        }  # fmt: skip
    if is_pair:
        choice["decoder_start_token_id"] = before.decoder_start_token_id
    return GenerationConfig(eos_token_id=sorted(ends) or None, pad_token_id=pad, **choice)


@dataclass
class _Probabilities(LogitsProcessor):
    """Notes the logits of the next token and leaves them unchanged. Warpers come after it."""

    is_needed: bool
    logits: torch.Tensor | None = None

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if self.is_needed:
            self.logits = scores[0].detach().float()
        return scores


@dataclass
class _Stopped(StoppingCriteria):
    is_met: bool = False

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((input_ids.shape[0],), self.is_met, device=input_ids.device)


@dataclass
class _Writer(BaseStreamer):
    """Turns tokens into text that is final: whole characters, and no beginning of a stop text."""

    tokenizer: Any
    sampling: Sampling
    ends: frozenset[int]
    listen: Listener
    ids: list[int] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    text: str = ""
    sent: int = 0
    """How much of the text has been passed on; of `tokens` all before `sent_tokens`."""
    sent_tokens: int = 0
    is_ended: bool = False

    def __post_init__(self) -> None:
        self.probabilities = _Probabilities(self.sampling.top_logprobs is not None)
        self.stopped = _Stopped()
        self._has_begun = False
        self._behind = self._decoded = 0  # of `ids`: what comes before `_decoded` is text for good

    def put(self, value: torch.Tensor) -> None:
        """Take the next token. The first call brings the prompt, which is left out."""
        if not self._has_begun:
            self._has_begun = True
            return
        token = int(value.reshape(-1)[0])
        if token in self.ends:
            self.is_ended = True
            return
        self.ids.append(token)
        if self.probabilities.logits is not None:
            self.tokens.append(self._noted(token, self.probabilities.logits))
        self._add_text()
        if (at := _first(self.text, self.sampling.stop, self.sent)) is not None:
            self.text, self.stopped.is_met = self.text[:at], True
        self._pass_on(len(self.text) if self.stopped.is_met else self._final())

    def end(self) -> None:
        """Pass on what was held back."""
        if self.ids and not self.stopped.is_met:
            self._add_text(is_last=True)
            if (at := _first(self.text, self.sampling.stop, self.sent)) is not None:
                self.text, self.stopped.is_met = self.text[:at], True
        self._pass_on(len(self.text), is_last=True)

    def whole(self, prompt_tokens: int) -> Streamed:
        reason: FinishReason = "stop" if self.is_ended or self.stopped.is_met else "length"
        tokens = tuple(self.tokens)
        return Streamed(self.text, reason, prompt_tokens, len(self.ids) + self.is_ended, tokens)

    def _add_text(self, is_last: bool = False) -> None:
        """Decode tokens behind the piece of text before them, which begins with a whole character.

        A tokenizer may drop a space at the start, and reads bytes only from where a character
        begins.
        """
        known = self._decode(self.ids[self._behind : self._decoded])
        new = self._decode(self.ids[self._behind :])
        if not new.startswith(known):  # what came before changes with what follows
            known, new = self.text, self._decode(self.ids)
        if is_last or not new.endswith(UNKNOWN_BYTES):
            self.text += new[len(known) :]
            self._behind, self._decoded = self._decoded, len(self.ids)

    def _decode(self, ids: Sequence[int]) -> str:
        options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
        return str(self.tokenizer.decode(ids, **options))

    def _final(self) -> int:
        """Return the length of the text that no stop text can still begin in."""
        held = (
            size
            for stop in self.sampling.stop
            for size in range(1, len(stop))
            if self.text.endswith(stop[:size])
        )
        return len(self.text) - max(held, default=0)

    def _pass_on(self, end: int, is_last: bool = False) -> None:
        new = self.text[self.sent : max(end, self.sent)]
        is_whole = end == len(self.text) and self._decoded == len(self.ids)
        tokens = self.tokens[self.sent_tokens :] if is_whole or is_last else []
        if new or tokens:
            self.sent, self.sent_tokens = self.sent + len(new), self.sent_tokens + len(tokens)
            self.listen(new, tokens)

    def _noted(self, token: int, logits: torch.Tensor) -> Token:
        logprobs = torch.log_softmax(logits, -1)
        most = min(self.sampling.top_logprobs or 0, logprobs.numel())
        values, ids = logprobs.topk(most)
        top = [(self._shown(i), float(value)) for i, value in zip(ids.tolist(), values.tolist())]
        return Token(token, self._shown(token), float(logprobs[token]), tuple(top))

    def _shown(self, token: int) -> str:
        """Return the text of one token, special ones too."""
        return str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))


def _first(text: str, stops: Sequence[str], start: int) -> int | None:
    """Return where the first of some texts begins, from `start` on; None if none does."""
    found = [at for stop in stops if (at := text.find(stop, start)) >= 0]
    return min(found, default=None)
