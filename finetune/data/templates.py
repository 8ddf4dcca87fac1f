"""Conversation -> text segments, each supervised or not.

Every template is a Jinja chat template, the built-in ones too, so that what is trained on is what
`tokenizer.apply_chat_template` renders from the exported model. Which text is supervised follows
from how the template was rendered: an answer starts where the prompt before it ends, and ends
where text appended to its content would appear. No answer is ever searched for by a string.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from finetune.data.rows import Conversation, Message, Place
from finetune.errors import DataError

_QUESTION_ANSWER = """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content }}

{% elif message.role == 'user' %}### Question:
{{ message.content }}

{% else %}### Answer:
{{ message.content }}{{ eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}### Answer:
{% endif %}"""

_ALPACA = """\
{% for message in messages %}\
{% if message.role == 'system' %}{{ message.content }}

{% elif message.role == 'user' %}\
{% if message.context %}Below is an instruction that describes a task, paired with an input that provides further context. \
Write a response that appropriately completes the request.

### Instruction:
{{ message.content }}

### Input:
{{ message.context }}

{% else %}{% if loop.index0 < 2 %}Below is an instruction that describes a task. \
Write a response that appropriately completes the request.

{% endif %}### Instruction:
{{ message.content }}

{% endif %}\
{% else %}### Response:
{{ message.content }}{{ eos_token }}{% if not loop.last %}{{ '\n\n' }}{% endif %}{% endif %}\
{% endfor %}\
{% if add_generation_prompt %}### Response:
{% endif %}"""

_LLAMA2 = """\
{% for message in messages %}\
{% if message.role == 'system' %}{% elif message.role == 'user' %}[INST] \
{% if loop.index0 == 1 and messages[0].role == 'system' %}<<SYS>>
{{ messages[0].content }}
<</SYS>>

{% endif %}{{ message.content }} [/INST]\
{% else %} {{ message.content }} {{ eos_token }}{% endif %}\
{% endfor %}"""

_CHATML = """\
{% for message in messages %}\
<|im_start|>{{ message.role }}
{{ message.content }}<|im_end|>
{% endfor %}\
{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""

_PLAIN = """\
{% for message in messages %}\
{{ message.content }}{% if message.role == 'assistant' %}{{ eos_token }}{% endif %}\
{% endfor %}"""

BUILT_IN = {
    "plain": _PLAIN,
    "question_answer": _QUESTION_ANSWER,
    "alpaca": _ALPACA,
    "llama2": _LLAMA2,
    "chatml": _CHATML,
}
# What `auto` takes for a tokenizer without a chat template of its own.
USUAL = {"question_answer": "question_answer", "instruction": "alpaca", "messages": "chatml"}

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\ufdd0"  # a Unicode noncharacter: no text contains it


PROMPT = Place("the prompt", 1)  # where a conversation stands that is in no file


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered text, and whether the model should learn it."""

    text: str
    supervised: bool


@dataclass(frozen=True)
class Template:
    """A Jinja chat template with the special tokens it is rendered with (name -> token)."""

    name: str
    source: str
    special_tokens: Mapping[str, str]
    turn_ends: Sequence[str] = field(default=())
    """Tokens of the vocabulary that can end a turn: all special ones, <|im_end|> and the like."""

    @property
    def fingerprint(self) -> str:
        parts = [self.source, *sorted(f"{k}={v}" for k, v in self.special_tokens.items()), *self.turn_ends]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def segments(self, conversation: Conversation, loss_on: str = "completion") -> list[Segment]:
        """Rendered text in pieces whose concatenation is exactly the rendered text.

        `loss_on`: completion (every assistant turn), last_turn, or all. Raises DataError when the
        template fails, drops an answer, or renders a prompt differently once the answer is known.
        """
        messages = conversation.messages
        if messages[0].role == "text":
            if loss_on != "all":
                raise DataError(
                    f"{conversation.place}: is plain text without an answer, but objective.kind: sft learns answers; "
                    "use objective.kind: clm, or rows with prompts and answers"
                )
            return [Segment(messages[0].content, True)]
        text = self._render(conversation)
        answers = [i for i, message in enumerate(messages) if message.supervised]
        if loss_on == "last_turn":
            answers = answers[-1:]
        spans = self._marked_spans(conversation, answers) or [self._span(conversation, text, i) for i in answers]
        for i, (start, end) in zip(answers, spans):
            if messages[i].content.strip() not in text[start:end]:
                raise DataError(
                    f"{conversation.place}: template {self.name!r} drops or rewrites the answer {_short(messages[i].content)}: "
                    f"it renders {_short(text[start:end])}; use another data.template, or data.loss_on: last_turn"
                )
        if loss_on == "all":
            return [Segment(text, True)]
        return _cut(text, spans)

    def prompt(self, messages: Sequence[Message], place: Place = PROMPT) -> str:
        """Text up to the point where the model should begin to answer."""
        return self._render(Conversation(tuple(messages), place), add_generation_prompt=True)

    def stop_token(self) -> str | None:
        """The token that ends an answer, or None if the template leaves that to the tokenizer's EOS."""
        probe = Conversation((Message("user", "a"), Message("assistant", "b", supervised=True)), PROMPT)
        answer = [s.text for s in self.segments(probe) if s.supervised][-1]
        return next((token for token in self.turn_ends if answer.rstrip().endswith(token)), None)

    def _span(self, conversation: Conversation, text: str, turn: int) -> tuple[int, int]:
        """Where answer `turn` begins and ends in the rendered text, its end-of-turn token included."""
        messages = conversation.messages
        prompt = self._prompt_of(conversation, text, turn)
        marked = Message("assistant", messages[turn].content.rstrip() + _MARK, supervised=True)
        moved = self._render(Conversation((*messages[:turn], marked, *messages[turn + 1 :]), conversation.place))
        end = moved.find(_MARK)
        if end < len(prompt):
            raise DataError(
                f"{conversation.place}: template {self.name!r} drops the answer in message {turn + 1} "
                f"({_short(messages[turn].content)}); use another data.template"
            )
        return len(prompt), self._with_turn_end(text, end)

    def _prompt_of(self, conversation: Conversation, text: str, turn: int) -> str:
        """What a model is asked before message `turn`. Raises DataError if the rendered text does not begin with it."""
        asked = Conversation(conversation.messages[:turn], conversation.place)
        prompt = self._render(asked, add_generation_prompt=True)
        if not text.startswith(prompt):
            raise DataError(
                f"{conversation.place}: template {self.name!r} renders the prompt of message {turn + 1} differently once the "
                "answer is there, so what is trained would not be what is asked; use data.loss_on: last_turn, or a template "
                "whose add_generation_prompt gives what stands before the answer"
            )
        return prompt

    def _with_turn_end(self, text: str, end: int) -> int:
        """Move the end of an answer past the token that ends its turn, if one follows and none is inside."""
        if text[:end].rstrip().endswith(tuple(self.turn_ends)):
            return end
        stop = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.turn_ends)) + ")") if self.turn_ends else None
        match = stop.match(text, end) if stop else None
        return match.end() if match else end

    def _marked_spans(self, conversation: Conversation, answers: list[int]) -> list[tuple[int, int]]:
        """The spans of {% generation %} blocks, for templates that have them."""
        if not _GENERATION.search(self.source):
            return []
        from transformers.utils.chat_template_utils import render_jinja_template

        kwargs = {**self.special_tokens, "chat_template": self.source, "return_assistant_tokens_mask": True}
        last = max(i for i, message in enumerate(conversation.messages) if message.supervised)
        self._prompt_of(conversation, self._render(conversation), last)
        texts, indices = render_jinja_template([self._plain(conversation)], **kwargs)
        spans = [(start, self._with_turn_end(texts[0], end)) for start, end in indices[0]]
        supervised = sum(message.supervised for message in conversation.messages)
        if len(spans) != supervised:
            raise DataError(
                f"{conversation.place}: template {self.name!r} marks {len(spans)} {{% generation %}} blocks "
                f"for {supervised} assistant messages; there should be one around each"
            )
        return spans[-len(answers) :]

    def _plain(self, conversation: Conversation) -> list[dict[str, str]]:
        """Messages as the template sees them; without a place of its own, an instruction's input joins it."""
        own = "message.context" in self.source
        plain = []
        for message in conversation.messages:
            turn = {"role": message.role, "content": message.content}
            if message.context and own:
                turn["context"] = message.context
            elif message.context:
                turn["content"] += "\n\n" + message.context
            plain.append(turn)
        return plain

    def _render(self, conversation: Conversation, add_generation_prompt: bool = False) -> str:
        from transformers.utils.chat_template_utils import render_jinja_template

        kwargs = {**self.special_tokens, "chat_template": self.source, "add_generation_prompt": add_generation_prompt}
        try:
            texts, _ = render_jinja_template([self._plain(conversation)], **kwargs)
        except Exception as exc:  # a template is a program: it can divide by zero, or never end
            raise DataError(f"{conversation.place}: template {self.name!r} fails: {type(exc).__name__}: {exc}") from exc
        return str(texts[0])


def load(
    name: str, format: str, chat_template: str | None, special_tokens: Mapping[str, str], vocabulary: Mapping[str, int]
) -> Template:
    """Find a template by its config name. Raises DataError if there is none, or the tokenizer cannot end its turns."""
    if name == "auto":
        if format == "prompt_completion" or format == "text":
            name = "plain"
        else:
            name = "chat" if chat_template else USUAL[format]
    turn_ends = tuple(dict.fromkeys([*special_tokens.values(), *(t for t in vocabulary if _looks_special(t))]))
    if name == "chat":
        if not chat_template:
            raise DataError(
                f"data.template: chat, but the tokenizer has no chat template; use one of {', '.join(BUILT_IN)}, or a .jinja file"
            )
        return Template(name, chat_template, special_tokens, turn_ends)
    if name in BUILT_IN:
        missing = [token for token in ("<|im_start|>", "<|im_end|>") if name == "chatml" and token not in vocabulary]
        if missing:
            raise DataError(
                f"data.template: chatml ends turns with the token <|im_end|>, but the tokenizer has no {' and '.join(missing)}; "
                f"add them with model.new_tokens: [{', '.join(missing)}], or use question_answer, alpaca or llama2"
            )
        return Template(name, BUILT_IN[name], special_tokens, turn_ends)
    if name.endswith(".jinja"):
        try:
            return Template(name, Path(name).read_text(encoding="utf-8"), special_tokens, turn_ends)
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"data.template: {name}: cannot be read: {exc}") from exc
    raise DataError(f"data.template: {name!r} is none of auto, chat, {', '.join(BUILT_IN)}, and no .jinja file")


def _looks_special(token: str) -> bool:
    return (token.startswith("<|") and token.endswith("|>")) or (token.startswith("<") and token.endswith("_of_turn>"))


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    """Text and supervised spans -> segments, none empty."""
    segments, at = [], 0
    for start, end in spans:
        segments += [Segment(text[at:start], False), Segment(text[start:end], True)]
        at = end
    segments.append(Segment(text[at:], False))
    return [segment for segment in segments if segment.text]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
