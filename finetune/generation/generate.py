"""Generate answers to prompts, in batches."""

import argparse
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, TextStreamer

from finetune.data import chat_templates, templates
from finetune.data.control_tokens import ControlTokens
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.data.problems import Problems
from finetune.data.templates import Template
from finetune.data.tokens import encode_prompt, sample_prompt
from finetune.models import families
from finetune.models.attention_choice import own_attention

LINE_SECONDS = 10  # between two lines about progress without a terminal


def at_least(minimum: int) -> Callable[[str], int]:
    """Return a parser of whole numbers of at least `minimum`, for argparse."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if (value := int(text)) >= minimum:
                return value
        raise argparse.ArgumentTypeError(
            f"should be a whole number of at least {minimum}, got {text!r}"
        )

    return number


def log(message: str) -> None:
    """Print one line on stderr, above any progress bar."""
    tqdm.write(message, file=sys.stderr)


@dataclass(frozen=True)
class Answer:
    text: str
    is_cut: bool
    """Whether the limit on new tokens, or the end of the context, ended it, not the model."""


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int,
    temperature: float = 0.0, title: str = "generating", together: bool = False,
    log: Callable[[str], None] = log, streamer: TextStreamer | None = None,
) -> list[Answer]:  # fmt: skip
    """Return the model's answer to each prompt, without the token that ended it.

    Prompts are tokenised as in training, sorted by length and padded on the left. Where prompt and
    answer do not fit the model's context together, the prompt keeps at least half of it, BOS and
    end, and `log` gets a note.

    `temperature`: 0 is greedy. `together`: processes that share the weights call this at once, and
    none may stop before the others, as each pass gathers weights from all. `streamer`: of
    transformers; gets the tokens of a single prompt as they come.
    """
    is_pair = families.is_encoder_decoder(model.config)  # the encoder reads prompts as in training
    encoded = [
        tokenizer(prompt)["input_ids"] if is_pair else encode_prompt(prompt, tokenizer)
        for prompt in prompts
    ]
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    most = context if is_pair else max(context - max_new_tokens, context // 2)
    if long := sum(len(ids) > most for ids in encoded):
        log(
            f"note: {long} of {len(encoded)} prompts are over {most} tokens, what the model's "
            f"{context} positions leave next to answers of {max_new_tokens}; their beginnings are "
            "cut off"
        )
    encoded = [_cut(ids, most, tokenizer) for ids in encoded]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    results = [Answer("", True)] * len(encoded)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    stops = _configure(model, pad, temperature)
    quiet = True if streamer else None  # None: show the bar on a terminal only
    bar = tqdm(total=len(encoded), desc=title, unit=" answers", disable=quiet, leave=False)
    last_line = time.monotonic()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        device = next(model.parameters()).device
        inputs = _padded([encoded[i] for i in chosen], pad, device, on_right=is_pair)
        # A decoder begins with one token of its own.
        longest = 1 if is_pair else inputs["input_ids"].shape[1]
        limit = min(max_new_tokens, context - longest)
        with torch.no_grad():
            out = model.generate(
                **inputs, max_new_tokens=limit, synced_gpus=together, streamer=streamer
            )
        for i, row in zip(chosen, out[:, longest:], strict=True):
            results[i] = Answer(_decode(tokenizer, row), stops.isdisjoint(row.tolist()))
        bar.update(len(chosen))
        if bar.disable and not streamer and time.monotonic() - last_line > LINE_SECONDS:
            log(f"{title}: {start + len(chosen):,} of {len(encoded):,} answers")
            last_line = time.monotonic()
    bar.close()
    return results


def _configure(model: Any, pad: int, temperature: float) -> set[int]:
    """Prepare a model for generation; return the tokens that end its answers."""
    # Replace the model's own settings: with a repetition penalty or a sampling default, base and
    # tuned model would decode by different rules.
    before = model.generation_config
    ends = before.eos_token_id
    choice: dict[str, Any] = {"do_sample": False}
    if families.is_encoder_decoder(model.config):
        choice["decoder_start_token_id"] = before.decoder_start_token_id
    if temperature:
        choice |= {"do_sample": True, "temperature": temperature}
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, **choice)
    model.eval()
    return set(ends if isinstance(ends, list) else [ends])


def _padded(
    prompts: list[list[int]], pad: int, device: torch.device, on_right: bool = False
) -> dict[str, torch.Tensor]:
    """Pad prompts on the left: input_ids and attention_mask, both int64 [prompts, longest].

    `on_right`: where an encoder reads them, whose positions count from the left.
    """
    longest = max(map(len, prompts))
    fillers = [longest - len(prompt) for prompt in prompts]
    ids = [[pad] * n + prompt for n, prompt in zip(fillers, prompts)]
    mask = [[0] * n + [1] * len(prompt) for n, prompt in zip(fillers, prompts)]
    if on_right:
        ids = [prompt + [pad] * n for n, prompt in zip(fillers, prompts)]
        mask = [[1] * len(prompt) + [0] * n for n, prompt in zip(fillers, prompts)]
    return {
        "input_ids": torch.tensor(ids, device=device),
        "attention_mask": torch.tensor(mask, device=device),
    }


def _decode(tokenizer: Any, ids: Any) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def _cut(ids: list[int], most: int, tokenizer: Any) -> list[int]:
    """Return the end of a prompt, after its BOS if it has one."""
    if len(ids) <= most:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return head + ids[len(ids) - (most - len(head)) :]


def while_training(
    model: Any, tokenizer: Any, template: Template | None, prompts: Sequence[str], *,
    system_prompt: str | None, max_new_tokens: int, together: bool, log: Callable[[str], None],
) -> list[str]:  # fmt: skip
    """Return greedy answers of a model in training, as it will answer once exported.

    Leaves the model unchanged. `template` None: prompts are plain text to continue. `together`: as
    in `answers`.
    """
    texts = [sample_prompt(template, tokenizer, prompt, system_prompt) for prompt in prompts]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    was_training = model.training
    settings = [(each, each.generation_config) for each in (model, inner)]
    try:
        with own_attention(inner):
            found = answers(
                model, tokenizer, texts, max_new_tokens=max_new_tokens, batch_size=len(texts),
                together=together, log=log,
            )  # fmt: skip
        return [answer.text for answer in found]
    finally:
        for each, config in settings:
            each.generation_config = config
        model.train(was_training)


class Prompts:
    """Conversations up to the next answer, as the tokenizer's chat template renders them.

    Special tokens in their text stay characters, so that no message forges a turn.
    """

    def __init__(self, tokenizer: Any) -> None:
        own = _own_template(tokenizer, tokenizer.get_added_vocab())
        self._template = replace(own, learn_opening=True)
        self._control = ControlTokens(tokenizer, own.turn_ends)

    def of(self, conversation: Conversation) -> str:
        """Return the prompt of a conversation that ends before an answer. Raises DataError."""
        asked = self._control.as_text(conversation)
        return self._template.prompt(asked.messages, asked.place, asked.tools)


def chat_prompt(
    tokenizer: Any, messages: Sequence[Message], place: Place = templates.PROMPT,
    tools: tuple[Mapping[str, Any], ...] = (),
) -> str:  # fmt: skip
    """Return one such prompt."""
    return Prompts(tokenizer).of(Conversation(tuple(messages), place, tools))


def prompts_of(tokenizer: Any, conversations: Sequence[Conversation]) -> list[str]:
    """Return the prompts of conversations that end before an answer.

    Raises DataError for rows with special tokens in calls of tools, where they would forge turns.
    """
    prompts, problems, found = Prompts(tokenizer), Problems(), []
    for each in conversations:
        problems.num_rows += 1
        with problems.noted():
            found.append(prompts.of(each))
    problems.raise_if_any()
    return found


def without_opening(tokenizer: Any, answers: Sequence[str]) -> list[str]:
    """Remove from answers what the chat template itself writes before them.

    This may be an empty thinking block.
    """
    ids = tokenizer(_own_template(tokenizer).opening, add_special_tokens=False)["input_ids"]
    opening = _decode(tokenizer, ids).strip()
    return [answer.lstrip().removeprefix(opening) if opening else answer for answer in answers]


def _own_template(tokenizer: Any, vocabulary: Mapping[str, int] = MappingProxyType({})) -> Template:
    special = tokenizer.special_tokens_map
    return chat_templates.load("chat", "messages", tokenizer.chat_template, special, vocabulary)
