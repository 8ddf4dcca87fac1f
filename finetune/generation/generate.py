"""Answers of a model to prompts, in batches."""

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from tqdm import tqdm
from transformers import GenerationConfig, TextStreamer

from finetune.data import templates
from finetune.data.rows import Conversation, Message, Place, Problems
from finetune.data.templates import Template
from finetune.data.tokens import ControlTokens, encode_prompt

LINE_SECONDS = 10  # between two lines about progress where there is no terminal


def at_least(minimum: int) -> Callable[[str], int]:
    """A whole number on the command line that is not too small, for argparse."""

    def number(text: str) -> int:
        with suppress(ValueError):
            if (value := int(text)) >= minimum:
                return value
        raise argparse.ArgumentTypeError(
            f"should be a whole number of at least {minimum}, got {text!r}"
        )

    return number


def log(message: str) -> None:
    """One line for a person, past any progress bar."""
    tqdm.write(message, file=sys.stderr)


@dataclass(frozen=True)
class Answer:
    text: str
    is_cut: bool
    """Whether it was not ended by the model, but by the limit on new tokens, or the end of its
    context.
    """


def answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    *,
    max_new_tokens: int,
    batch_size: int,
    temperature: float = 0.0,
    title: str = "generating",
    together: bool = False,
    log: Callable[[str], None] = log,
    streamer: TextStreamer | None = None,
) -> list[Answer]:
    """The model's answer to each prompt, without the token that ended it; temperature 0 is greedy.

    Prompts are tokenised as in training, sorted by length and padded on the left. Where prompt and
    answer do not fit the model's context together, the prompt keeps at least half of it, BOS and
    end, and `say` says so. `together`: processes that share the weights call this at once, and none
    may stop before the others, as each pass gathers weights from all. `streamer`: of transformers;
    gets the tokens of a single prompt as they come.
    """
    encoded = [encode_prompt(prompt, tokenizer) for prompt in prompts]
    context = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    most = max(context - max_new_tokens, context // 2)
    if long := sum(len(ids) > most for ids in encoded):
        log(
            f"note: {long} of {len(encoded)} prompts are over {most} tokens, what the model's "
            f"{context} positions leave next to answers of {max_new_tokens}; their beginnings are "
            "cut off"
        )
    encoded = [_cut(ids, most, tokenizer) for ids in encoded]
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    results = [Answer("", True)] * len(encoded)
    choice = (
        {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    )
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    # Not the model's own: a repetition penalty or a sampling default in it would decode base and
    # tuned by other rules.
    ends = model.generation_config.eos_token_id
    stops = set(ends if isinstance(ends, list) else [ends])
    model.generation_config = GenerationConfig(eos_token_id=ends, pad_token_id=pad, **choice)
    model.eval()
    device = next(model.parameters()).device
    quiet = True if streamer else None  # None: show the bar on a terminal only
    bar = tqdm(total=len(encoded), desc=title, unit=" answers", disable=quiet, leave=False)
    last_line = time.monotonic()
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        longest = max(len(encoded[i]) for i in chosen)
        ids = torch.tensor(
            [[pad] * (longest - len(encoded[i])) + encoded[i] for i in chosen], device=device
        )
        mask = torch.tensor(
            [[0] * (longest - len(encoded[i])) + [1] * len(encoded[i]) for i in chosen],
            device=device,
        )
        with torch.no_grad():
            out = model.generate(
                input_ids=ids,
                attention_mask=mask,
                max_new_tokens=min(max_new_tokens, context - longest),
                synced_gpus=together,
                streamer=streamer,
            )
        for i, row in zip(chosen, out[:, longest:], strict=True):
            text = tokenizer.decode(
                row, skip_special_tokens=True, clean_up_tokenization_spaces=False
            )
            results[i] = Answer(text, is_cut=stops.isdisjoint(row.tolist()))
        bar.update(len(chosen))
        if bar.disable and not streamer and time.monotonic() - last_line > LINE_SECONDS:
            log(f"{title}: {start + len(chosen):,} of {len(encoded):,} answers")
            last_line = time.monotonic()
    bar.close()
    return results


def _cut(ids: list[int], most: int, tokenizer: Any) -> list[int]:
    """The end of a prompt, after its BOS if it has one."""
    if len(ids) <= most:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return head + ids[len(ids) - (most - len(head)) :]


def while_training(
    model: Any, tokenizer: Any, template: Template | None, prompts: Sequence[str], *, system_prompt: str | None,
    max_new_tokens: int, together: bool, log: Callable[[str], None],
) -> list[str]:  # fmt: skip
    """Greedy answers of a model in training, as it will answer once exported; afterwards all is as
    it was.

    `template` None: prompts are plain text to go on from. `together`: as in `answers`.
    """
    texts = [templates.sample_prompt(template, prompt, system_prompt) for prompt in prompts]
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    attention, was_training = inner.config._attn_implementation, model.training
    settings = [(each, each.generation_config) for each in (model, inner)]
    inner.set_attn_implementation("sdpa" if getattr(inner, "_supports_sdpa", False) else "eager")
    try:
        found = answers(
            model,
            tokenizer,
            texts,
            max_new_tokens=max_new_tokens,
            batch_size=len(texts),
            together=together,
            log=log,
        )
        return [answer.text for answer in found]
    finally:
        inner.set_attn_implementation(attention)
        for each, config in settings:
            each.generation_config = config
        model.train(was_training)


def chat_prompt(
    tokenizer: Any, messages: Sequence[Message], place: Place = templates.PROMPT
) -> str:
    """The text of a conversation up to the next answer, as the tokenizer's chat template gives it
    to every caller.
    """
    return replace(_own_template(tokenizer), learn_opening=True).prompt(messages, place)


def refuse_control_tokens(tokenizer: Any, conversations: Sequence[Conversation]) -> None:
    """Raise DataError for rows whose text holds tokens that training refuses: they would forge
    turns in a prompt.
    """
    template = templates.load(
        "chat",
        "messages",
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.get_vocab(),
    )
    control, problems = ControlTokens(tokenizer, template.turn_ends), Problems()
    for conversation in conversations:
        problems.num_rows += 1
        with problems.noted():
            control.refuse(conversation)
    problems.raise_if_any()


def without_opening(tokenizer: Any, answers: Sequence[str]) -> list[str]:
    """Answers without what the chat template itself would write before them, such as an empty
    thinking block.
    """
    ids = tokenizer(_own_template(tokenizer).opening, add_special_tokens=False)["input_ids"]
    opening = tokenizer.decode(
        ids, skip_special_tokens=True, clean_up_tokenization_spaces=False
    ).strip()
    return [answer.lstrip().removeprefix(opening) if opening else answer for answer in answers]


def _own_template(tokenizer: Any) -> Template:
    return templates.load(
        "chat", "messages", tokenizer.chat_template, tokenizer.special_tokens_map, {}
    )
