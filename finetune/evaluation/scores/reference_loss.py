"""How surprised a model is by the references: the loss that training lowers, and its perplexity."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.data import chat_templates
from finetune.data.conversations import Conversation, Message
from finetune.data.tokenised import answered
from finetune.data.tokens import with_bos
from finetune.evaluation.continuations import Continuations, Request
from finetune.evaluation.scores.base import NO_REFERENCE
from finetune.generation.completions import Completion, Prompt, Score
from finetune.models import families

NOT_CAUSAL = Score(None, "only causal models give a loss of a reference")
NOT_FINITE = Score(None, "the model's log-probabilities are not finite")
NOT_ASKED = Score(None, "only a model that is loaded gives probabilities of the reference")


class ReferenceLoss:
    """The mean loss of a reference's tokens, in nats, as training computes it.

    It needs the model, not its answers: `read` scores the prompts under a model, into `by_model`. A
    call, which gets answers, finds gaps.
    """

    name, higher, is_share = "reference loss", False, False
    line = "loss of the reference in nats per token, as in training; with its perplexity"

    def __init__(self) -> None:
        self.by_model: dict[str, list[Score]] = {}
        self._totals: dict[str, tuple[float, int]] = {}

    def __call__(self, completions: Sequence[Completion]) -> list[Score]:
        return [NOT_ASKED] * len(completions)

    def read(self, name: str, model: Any, tokenizer: Any, prompts: Sequence[Prompt]) -> None:
        """Note the loss of each reference under a causal model, whose name tables show."""
        inner = model.get_base_model() if hasattr(model, "get_base_model") else model
        if families.of_model(inner) != families.CAUSAL:
            self.by_model[name] = [NOT_CAUSAL] * len(prompts)
            return
        scores = self.by_model[name] = [NO_REFERENCE] * len(prompts)
        numbers = [n for n, each in enumerate(prompts) if each.reference is not None]
        requests = requests_of(tokenizer, [prompts[n] for n in numbers])
        continuations, fitting = Continuations(model, tokenizer), {}
        for number, request in zip(numbers, requests):
            count, most = sum(map(len, request)), continuations.max_length + 1  # it predicts one
            scores[number] = Score(
                None, f"has {count:,} tokens, and the model positions for {most:,}"
            )
            if count <= most:
                fitting[number] = request
        nats, tokens = 0.0, 0
        for (number, request), each in zip(fitting.items(), continuations([*fitting.values()])):
            count = len(request.continuation)
            scores[number] = NOT_FINITE
            if math.isfinite(each.logprob):
                scores[number] = Score(-each.logprob / count, f"{count} tokens")
                nats, tokens = nats - each.logprob, tokens + count
        self._totals[name] = nats, tokens

    def details(self, completions: Sequence[Completion]) -> list[str]:
        """Return the perplexity of all references under each model."""
        return [
            f"perplexity under {name}: {_perplexity(nats / tokens)}, over {tokens:,} tokens"
            for name, (nats, tokens) in self._totals.items() if tokens
        ]  # fmt: skip


def _perplexity(loss: float) -> str:
    return f"{math.exp(loss):,.2f}" if loss < 50 else "over e^50"


def requests_of(tokenizer: Any, prompts: Sequence[Prompt]) -> list[Request]:
    """Return what each prompt is in tokens, and its reference with the token that ends it."""
    special, vocabulary = tokenizer.special_tokens_map, tokenizer.get_added_vocab()
    template = with_bos(
        chat_templates.load("chat", "messages", tokenizer.chat_template, special, vocabulary),
        tokenizer,
    )
    conversations = [_answered(each) for each in prompts]
    made = []
    for ids, supervised in answered(conversations, template, tokenizer):
        first = int(supervised.argmax())
        made.append(Request(tuple(ids[:first].tolist()), tuple(ids[supervised > 0].tolist())))
    return made


def _answered(prompt: Prompt) -> Conversation:
    answer = Message("assistant", prompt.reference or "", supervised=True)
    messages = (*(replace(each, supervised=False) for each in prompt.messages), answer)
    return replace(prompt.conversation, messages=messages)
