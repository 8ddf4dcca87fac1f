"""Rows -> prompts as tokens, with what is known of their answers."""

import hashlib
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from finetune.data import rows, tokenised, tokens
from finetune.data.control_tokens import ControlTokens
from finetune.data.conversations import Conversation, Message, Sample, without_thoughts
from finetune.data.examples import Examples, Ragged
from finetune.data.problems import Problems
from finetune.data.templates import Template
from finetune.data.tokenised import Options
from finetune.errors import ConfigError, DataError
from finetune.generation.completions import Prompt

Place = tuple[int, int, int]
"""Number of the source, line, row."""
TOO_LONG = tokenised.TOO_LONG


@dataclass(frozen=True)
class PromptExamples(Examples):
    """Prompts as tokens, none of them supervised, each with its `Prompt`."""

    prompts: Mapping[Place, Prompt] = field(default_factory=dict)

    def prompt(self, example: int) -> Prompt:
        return self.prompts[
            int(self.source[example]), int(self.line[example]), int(self.row[example])
        ]

    def every_prompt(self) -> Iterator[Prompt]:
        return (self.prompts[place] for place in self.places())

    def answered(self) -> Conversation:
        """Return the first prompt with an answer, to see how a template ends answers."""
        asked = self.prompt(0).conversation
        return asked.with_messages((*asked.messages, Message("assistant", "b", supervised=True)))

    def ids(self, example: int) -> np.ndarray:
        """Return the tokens of a prompt, int64 [T]."""
        return np.asarray(self.input.ids[self.input.span(example)], np.int64)


def prepare(
    sources: Mapping[str, str], template: Template, tokenizer: Any, options: Options,
    max_new_tokens: int,
) -> PromptExamples:  # fmt: skip
    """Return the prompts of all rows (source name -> hash of its content), in memory.

    An answer that a row has becomes the reference. A prompt and its completion have at most
    data.max_length tokens together. Raises DataError that names file and line.
    """
    names = list(sources)
    numbers = {name: number for number, name in enumerate(names)}
    problems, unread = Problems(options.skipping), Counter[str]()
    control = ControlTokens(tokenizer, template.turn_ends)
    room = min(options.max_length, options.positions or options.max_length)
    most = room - max_new_tokens
    if most < 1:
        raise ConfigError(
            f"objective.rollouts.max_new_tokens: the model has {room:,} positions for a prompt and "
            f"its completion of up to {max_new_tokens:,} tokens; lower it"
        )
    ids, places, prompts = list[np.ndarray](), list[Place](), dict[Place, Prompt]()
    num_rows, num_cut, num_dropped = 0, 0, 0
    for sample in _samples(names, options, problems, unread):
        with problems.noted(sample.row):
            asked, reference = _parted(_one(sample), options)
            own = _encoded(asked, template, tokenizer, control, options)
            num_rows += 1
            if len(own) > most:
                if options.truncation == "drop":
                    num_dropped += 1
                    continue
                if options.truncation == "error":
                    problems.note(_too_long(asked, len(own), options, max_new_tokens), TOO_LONG)
                    continue
                num_cut += 1
                own = _end_of(own, most, tokenizer)
            place = (numbers[asked.place.source], asked.place.line, asked.place.row)
            ids.append(np.array(own, np.int32))
            places.append(place)
            prompts[place] = Prompt(asked, reference, sample.row.values if sample.row else {})
    problems.raise_if_any()
    if not ids:
        how = "lower objective.rollouts.max_new_tokens"
        if room == options.max_length:
            how = "raise data.max_length"
        raise DataError(f"{names[0]}: no prompt is left; {how}, or check the rows")
    return _examples(ids, places, prompts, names, num_rows, num_cut, num_dropped, problems, unread)


def _samples(
    names: Sequence[str], options: Options, problems: Problems, unread: Counter[str]
) -> list[Sample]:
    found = rows.samples(
        names, options.format, options.columns, options.text_unit, options.system_prompt, problems,
        unread, for_training=False, repair_turns=options.repair_turns,
    )  # fmt: skip
    return list(found)


def _one(sample: Sample) -> Conversation:
    """Return the conversation of a row, of several the chosen one. Raise DataError."""
    conversations = sample.conversations
    if len(conversations) > 1 and "label" in sample.fields:
        return conversations[sample.fields["label"].index(1.0)]
    if len(conversations) > 1:
        raise DataError(
            f"{conversations[0].place}: gives several documents, and a completion continues one "
            "prompt; return one"
        )
    return conversations[0]


def _parted(conversation: Conversation, options: Options) -> tuple[Conversation, str | None]:
    """Return (the conversation up to its answer, the answer if the row has one)."""
    if conversation.messages[0].role == "text":
        raise DataError(
            f"{conversation.place}: is plain text, which asks nothing; give rows with prompts"
        )
    if conversation.messages[-1].role != "assistant":
        return conversation, None
    if options.thinking == "drop":
        conversation = without_thoughts(conversation)
    *asked, answer = conversation.messages
    if not asked:
        raise DataError(
            f"{conversation.place}: has an answer and no prompt; add a prompt, or remove it"
        )
    return replace(conversation, messages=tuple(asked)), answer.content


def _encoded(
    asked: Conversation, template: Template, tokenizer: Any, control: ControlTokens,
    options: Options,
) -> list[int]:  # fmt: skip
    """Return the tokens of a prompt, as evaluation and chat would ask it."""
    checked = control.as_text if options.special_tokens_in_text == "text" else control.refuse
    asked = checked(asked)
    ids = tokens.encode_prompt(template.prompt(asked.messages, asked.place, asked.tools), tokenizer)
    if not ids:
        raise DataError(f"{asked.place}: the prompt has no tokens; write one, or remove the row")
    return ids


def _end_of(ids: list[int], most: int, tokenizer: Any) -> list[int]:
    head = ids[:1] if ids[0] == tokenizer.bos_token_id else []
    return head + ids[len(ids) - (most - len(head)) :]


def _too_long(asked: Conversation, length: int, options: Options, max_new_tokens: int) -> str:
    if options.positions and length + max_new_tokens > options.positions:
        return (
            f"{asked.place}: {length} tokens and completions of {max_new_tokens} "
            f"(objective.rollouts.max_new_tokens) are over the model's {options.positions} "
            "positions; lower max_new_tokens, or set data.truncation to drop or left"
        )
    return (
        f"{asked.place}: {length} tokens and completions of {max_new_tokens} "
        f"(objective.rollouts.max_new_tokens) are over data.max_length {options.max_length}; set "
        f"data.max_length: {length + max_new_tokens}, or data.truncation to drop or left"
    )


def _examples(
    ids: list[np.ndarray], places: list[Place], prompts: Mapping[Place, Prompt], names: list[str],
    num_rows: int, num_cut: int, num_dropped: int, problems: Problems, unread: Counter[str],
) -> PromptExamples:  # fmt: skip
    ends = np.cumsum([len(each) for each in ids])
    flat = np.concatenate(ids)
    digest = hashlib.sha256(flat.tobytes() + ends.tobytes())
    for place in places:
        known = [prompts[place].reference, dict(prompts[place].fields)]
        digest.update(json.dumps(known, default=str, sort_keys=True).encode("utf-8", "replace"))
    source, line, row = np.array(places, np.int64).T
    return PromptExamples(
        {"input": Ragged(flat, np.concatenate([[0], ends[:-1]]), ends)}, np.zeros(len(flat), bool),
        source, line, row, names, digest.hexdigest()[:32], num_rows, num_cut, num_dropped,
        unread=dict(unread), num_empty=problems.num_empty, num_skipped=problems.num_skipped,
        repairs=dict(problems.repairs), bad=problems.kinds(), prompts=prompts,
    )  # fmt: skip
