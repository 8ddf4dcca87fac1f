"""Generate answers to prompts, in batches."""

import argparse
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from tqdm import tqdm
from transformers import GenerationConfig

from finetune.console import visible
from finetune.data import chat_templates, templates
from finetune.data.control_tokens import ControlTokens
from finetune.data.conversations import Conversation, Message
from finetune.data.places import Place
from finetune.data.problems import Problems
from finetune.data.templates import Template
from finetune.data.tokens import encode_prompt, sample_prompt
from finetune.errors import ModelError
from finetune.models import families
from finetune.models.attention_choice import own_attention

Asked = TypeVar("Asked")
NOT_FINITE = (
    "the model's logits are NaN, so its answers say nothing: its weights are damaged, or numbers "
    "overflow in 16 bits; set `dtype` in its config.json to bfloat16 or float32"
)
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
    tqdm.write(visible(message), file=sys.stderr)


@dataclass(frozen=True)
class Answer:
    text: str
    is_cut: bool
    """Whether the limit on new tokens, or the end of the context, ended it, not the model."""


def answers(
    model: Any, tokenizer: Any, prompts: Sequence[str], *, max_new_tokens: int, batch_size: int,
    temperature: float = 0.0, title: str = "generating", together: bool = False,
    log: Callable[[str], None] = log,
) -> list[Answer]:  # fmt: skip
    """Return the model's answer to each prompt, without the token that ended it.

    Prompts are tokenised as in training, sorted by length and padded on the left. Where prompt and
    answer do not fit the model's context together, the prompt keeps at least half of it, BOS and
    end, and `log` gets a note.

    `temperature`: 0 is greedy. `together`: processes that share the weights call this at once, and
    none may stop before the others, as each pass gathers weights from all.
    """
    ids, context = encoded(model, tokenizer, prompts, max_new_tokens, log)
    results = [Answer("", True)] * len(ids)
    pad, ends = pad_of(tokenizer), ends_of(model)
    with progress(title, len(ids), log) as note:
        for batch in padded(
            model, ids, context=context, pad=pad, ends=ends, max_new_tokens=max_new_tokens,
            batch_size=batch_size, temperature=temperature, together=together,
        ):  # fmt: skip
            for i, row in batch:
                results[i] = Answer(decode(tokenizer, row), ends.isdisjoint(row))
            note(len(batch))
    return results


def encoded(
    model: Any, tokenizer: Any, prompts: Sequence[str], max_new_tokens: int,
    log: Callable[[str], None] = log,
) -> tuple[list[list[int]], int]:  # fmt: skip
    """Return (the tokens of prompts, cut as in `answers`; the positions of the model)."""
    ids = [encode(model, tokenizer, prompt) for prompt in prompts]
    context, most = positions(model), room_of_prompt(model, max_new_tokens)
    if long := sum(len(each) > most for each in ids):
        log(
            f"note: {long} of {len(ids)} prompts are over {most} tokens, what the model's "
            f"{context} positions leave next to answers of {max_new_tokens}; their beginnings are "
            "cut off"
        )
    return [cut(each, most, tokenizer) for each in ids], context


def encode(model: Any, tokenizer: Any, prompt: str) -> list[int]:
    """Return the tokens of a prompt, as training saw them."""
    if families.is_encoder_decoder(model.config):
        return list(tokenizer(prompt)["input_ids"])
    return encode_prompt(prompt, tokenizer)


def num_tokens(prompt: str, tokenizer: Any) -> int:
    """Return the number of tokens of a decoder's prompt."""
    return len(encode_prompt(prompt, tokenizer))


def positions(model: Any) -> int:
    """Return how many tokens the model has positions for; huge where its config does not say."""
    return int(getattr(model.config, "max_position_embeddings", None) or 1 << 30)


def room_of_prompt(model: Any, max_new_tokens: int) -> int:
    """Return how many tokens a prompt may have next to an answer: at least half of the context."""
    context = positions(model)
    if families.is_encoder_decoder(model.config):  # the answer has positions of its own
        return context
    return room_of(context, max_new_tokens)


def room_of(context: int, max_new_tokens: int) -> int:
    """Return the same of a decoder, by its number of positions."""
    return max(context - max_new_tokens, context // 2)


def padded(
    model: Any, encoded: Sequence[list[int]], *, context: int, pad: int, ends: Set[int],
    max_new_tokens: int, batch_size: int, temperature: float = 0.0, together: bool = False,
) -> Iterator[list[tuple[int, list[int]]]]:  # fmt: skip
    """Yield batches of (number of the prompt, its tokens), the shortest prompts first.

    The tokens hold the one that ended the answer, and padding after it. The rest as in `answers`.
    """
    is_pair = families.is_encoder_decoder(model.config)
    order = sorted(range(len(encoded)), key=lambda i: len(encoded[i]))
    _configure(model, pad, ends, temperature)
    for start in range(0, len(order), batch_size):
        chosen = order[start : start + batch_size]
        device = next(model.parameters()).device
        inputs = _padded([encoded[i] for i in chosen], pad, device, on_right=is_pair)
        # A decoder begins with one token of its own.
        longest = 1 if is_pair else inputs["input_ids"].shape[1]
        limit = min(max_new_tokens, context - longest)
        with torch.no_grad():
            out = model.generate(**inputs, max_new_tokens=limit, synced_gpus=together)
        yield list(zip(chosen, out[:, longest:].tolist(), strict=True))


def require_finite(model: Any, ids: Sequence[int], title: str) -> None:
    """Raise ModelError for a model whose next token after a prompt has no probabilities.

    The likeliest of them would be the first of the vocabulary, without any error.
    """
    device = next(model.parameters()).device
    inputs = {"input_ids": torch.tensor([list(ids)], device=device)}
    if families.is_encoder_decoder(model.config):
        start = model.generation_config.decoder_start_token_id
        inputs["decoder_input_ids"] = torch.tensor([[start]], device=device)
    was_training = model.training
    model.eval()
    with torch.no_grad():
        logits = model(**inputs).logits[0, -1]
    model.train(was_training)
    if logits.isnan().any():
        raise ModelError(f"{title}: {NOT_FINITE}")


@contextmanager
def progress(
    title: str, total: int, log: Callable[[str], None] = log
) -> Iterator[Callable[[int], None]]:
    """Give a function that counts answers: on a bar, or without a terminal in lines."""
    # None: show the bar on a terminal only.
    bar = tqdm(total=total, desc=title, unit=" answers", disable=None, leave=False)
    done, last_line = 0, time.monotonic()

    def note(count: int = 1) -> None:
        nonlocal done, last_line
        done += count
        bar.update(count)
        if bar.disable and time.monotonic() - last_line > LINE_SECONDS:
            log(f"{title}: {done:,} of {total:,} answers")
            last_line = time.monotonic()

    try:
        yield note
    finally:
        bar.close()


def ends_of(model: Any) -> set[int]:
    """Return the tokens that end a model's answers."""
    ends = model.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends]) - {None}


def pad_of(tokenizer: Any) -> int:
    pad = tokenizer.pad_token_id
    return int(pad if pad is not None else tokenizer.eos_token_id)


def _configure(model: Any, pad: int, ends: Set[int], temperature: float) -> None:
    """Prepare a model for generation."""
    # Replace the model's own settings: with a repetition penalty or a sampling default, base and
    # tuned model would decode by different rules.
    choice: dict[str, Any] = {"do_sample": False}
    if families.is_encoder_decoder(model.config):
        choice["decoder_start_token_id"] = model.generation_config.decoder_start_token_id
    if temperature:
        choice |= {"do_sample": True, "temperature": temperature}
    stops = sorted(ends) or None
    model.generation_config = GenerationConfig(eos_token_id=stops, pad_token_id=pad, **choice)
    model.eval()


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


def decode(tokenizer: Any, ids: Any) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    return str(text)


def cut(ids: list[int], most: int, tokenizer: Any) -> list[int]:
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
    return texts_of(Prompts(tokenizer).of, conversations)


def texts_of(of: Callable[[Asked], str], asked: Sequence[Asked]) -> list[str]:
    """Return the text of each. Raise DataError that lists those that cannot be asked."""
    problems, found = Problems(), []
    for each in asked:
        problems.num_rows += 1
        with problems.noted():
            found.append(of(each))
    problems.raise_if_any()
    return found


def opening_of(tokenizer: Any) -> str:
    """Return what the chat template itself writes before answers, as an empty thinking block."""
    if not tokenizer.chat_template:
        return ""
    ids = tokenizer(_own_template(tokenizer).opening, add_special_tokens=False)["input_ids"]
    return decode(tokenizer, ids).strip()


def without_opening(answer: str, opening: str) -> str:
    """Return an answer without what `opening_of` returns."""
    return answer.lstrip().removeprefix(opening) if opening else answer


def _own_template(tokenizer: Any, vocabulary: Mapping[str, int] = MappingProxyType({})) -> Template:
    special = tokenizer.special_tokens_map
    return chat_templates.load("chat", "messages", tokenizer.chat_template, special, vocabulary)
