"""Render conversations as text segments, each supervised or not.

Every template is a Jinja chat template, the built-in ones too, so that training sees what
`tokenizer.apply_chat_template` renders from the exported model. An answer starts where the rendered
prompt before it ends, and ends where text appended to its content would appear. No answer is
searched for by a string.
"""

import contextlib
import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from pathlib import Path
from typing import Any

from finetune.data.rows import Conversation, Message, Place
from finetune.errors import ConfigError, DataError

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
{% if message.context %}Below is an instruction that describes a task, paired with an input that \
provides further context. Write a response that appropriately completes the request.

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
# What `auto` selects for a tokenizer without a chat template.
USUAL = {"question_answer": "question_answer", "instruction": "alpaca", "messages": "chatml"}

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
_MARK = "\ufdd0"  # a Unicode noncharacter: no text contains it

PROMPT = Place("the prompt", 1)  # the place of a conversation that is not in a file
QUESTION = (Message("user", "a"),)
_THINKING = re.compile(r"\s*</?think(?:ing)?>\s*")
_END_OF_THINKING = re.compile(r"</think(?:ing)?>")


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
    """Tokens of the vocabulary that can end a turn: the special ones, <|im_end|> and the like."""
    date: str | None = None
    """The day, as 2026-11-26, for templates that write it; None: today."""
    learn_opening: bool = False
    """Whether the model learns to write `opening`, because some answers begin otherwise."""
    example: Conversation | None = field(default=None, compare=False)
    """A row that the template takes, to see how answers end; None: the shortest conversation."""

    @property
    def fingerprint(self) -> str:
        parts = [
            self.source,
            *sorted(f"{k}={v}" for k, v in self.special_tokens.items()),
            *self.turn_ends,
        ]
        parts += [f"date={self.date}"] * self.writes_date + ["learn_opening"] * self.learn_opening
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    @property
    def writes_date(self) -> bool:
        return "strftime_now" in self.source

    @cached_property
    def probe(self) -> tuple[Message, ...]:
        """Return the shortest prompt that the template takes. Raise DataError if it takes none.

        Some templates demand a system message, others refuse it.
        """
        found: DataError | None = None
        tried = [QUESTION, (Message("system", "a"), *QUESTION)]
        if self.example is not None:
            tried.append(self.example.messages[:-1])
        for messages in tried:
            try:
                self._render(Conversation(messages, PROMPT), add_generation_prompt=True)
                self._render(
                    Conversation((*messages, Message("assistant", "b", supervised=True)), PROMPT)
                )
                return messages
            except DataError as exc:
                found = found or exc
        assert found
        raise found

    @cached_property
    def opening(self) -> str:
        """Return what the template writes between the generation prompt and an answer.

        This may be an empty thinking block. White space alone does not count, as tokenizers join it
        with the first word of the answer.
        """
        with contextlib.suppress(DataError):
            asked = self._render(Conversation(self.probe, PROMPT), add_generation_prompt=True)
            answer = Message("assistant", _MARK, supervised=True)
            answered = self._render(Conversation((*self.probe, answer), PROMPT))
            opening = answered[len(asked) : max(answered.find(_MARK), 0)]
            if answered.startswith(asked) and opening.strip():
                return opening
        return ""

    def segments(self, conversation: Conversation, loss_on: str = "completion") -> list[Segment]:
        """Return the rendered text in pieces whose concatenation is exactly that text.

        If no token of the template ends the last supervised answer, the text ends with that answer,
        so that the EOS comes right behind it. If text in between were not learned, the model would
        not reach the EOS; if it were, the model would repeat it in every answer.

        `loss_on`: completion (every assistant turn), last_turn, or all. Raises DataError if the
        template fails, drops or changes a message, renders a prompt differently once the answer is
        known, or an answer differently once later turns are there, and if an answer before the last
        one has no end.
        """
        messages = conversation.messages
        if messages[0].role == "text":
            if loss_on != "all":
                raise DataError(
                    f"{conversation.place}: the row is plain text without an answer, but "
                    "objective.kind: sft learns answers; use objective.kind: clm, or rows with "
                    "prompts and answers"
                )
            return [Segment(messages[0].content, True)]
        text = self._render(conversation)
        answers = [i for i, message in enumerate(messages) if message.supervised]
        if loss_on == "last_turn":
            answers = answers[-1:]
        marked = self._marked_spans(conversation, answers)
        spans = [
            self._span(conversation, text, turn, mark)
            for turn, mark in zip(answers, marked, strict=True)
        ]
        self._require_all(conversation, text)
        if loss_on == "all":
            return [Segment(text, True)]
        segments = _cut(text, spans)
        if self.stop_of(segments) is None:
            if len(spans) > 1:
                raise DataError(
                    f"{conversation.place}: data.template {self.name!r} ends answers without a "
                    f"token of the tokenizer, so only the last of {len(spans)} would teach the "
                    "model to stop; set data.loss_on: last_turn, or use a template that writes "
                    "{{ eos_token }} or another special token after each answer"
                )
            segments = _cut(text[: spans[-1][1]], spans)
        return segments

    def opens_itself(self, segments: Sequence[Segment]) -> bool:
        """Return whether an answer begins with its own text where `opening` would stand."""
        before = ""
        for segment in segments:
            if segment.supervised and not before.endswith(self.opening):
                return True
            before = segment.text
        return False

    def prompt(self, messages: Sequence[Message], place: Place = PROMPT) -> str:
        """Return the text up to the point where the model should begin to answer."""
        asked = self._render(Conversation(tuple(messages), place), add_generation_prompt=True)
        return asked if self.learn_opening or asked.endswith(self.opening) else asked + self.opening

    def stop_token(self, conversation: Conversation | None = None) -> str | None:
        """Return the token that ends an answer; None if the tokenizer's EOS must do that.

        `conversation`: a row that the template takes; by default `example`, or the shortest.
        """
        conversation = conversation or self.example
        if conversation is None:
            conversation = Conversation(
                (*self.probe, Message("assistant", "b", supervised=True)), PROMPT
            )
        return self.stop_of(self.segments(conversation, "last_turn"))

    def stop_of(self, segments: Sequence[Segment]) -> str | None:
        """Return the token that ends the last answer of these segments, or None."""
        answer = [segment.text for segment in segments if segment.supervised][-1]
        return next((token for token in self.turn_ends if answer.rstrip().endswith(token)), None)

    def _span(
        self, conversation: Conversation, text: str, turn: int, mark: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Return where answer `turn` begins and ends in the text, with its end-of-turn token.

        `mark`: the span of its {% generation %} block, in templates that have them.
        """
        messages, place = conversation.messages, conversation.place
        until = Conversation(messages[: turn + 1], place)
        alone = text if len(until.messages) == len(messages) else self._render(until)
        start = len(self._prompt_of(conversation, text, alone, turn))
        if mark is None:
            end = self._end(conversation, text, start, turn)
        else:
            self._end(conversation, text, start, turn)  # for the errors it raises
            start = mark[0] if text[start : mark[0]].strip() else start
            end = self._with_turn_end(text, mark[1])
        if not alone.startswith(text[:end]) or self._with_turn_end(alone, end) != end:
            raise self._differs(conversation, turn)
        if not _holds(text[start:end], messages[turn].content):
            raise DataError(
                f"{place}: data.template {self.name!r} drops or rewrites the answer "
                f"{_short(messages[turn].content)}: it renders {_short(text[start:end])}; use "
                "another data.template, or data.loss_on: last_turn"
            )
        return start, end

    def _prompt_of(self, conversation: Conversation, text: str, alone: str, turn: int) -> str:
        """Return the prompt of message `turn`. Raise DataError if the text does not begin with it.

        `alone`: the rendered text without the messages after `turn`.
        """
        asked = self._render(
            Conversation(conversation.messages[:turn], conversation.place),
            add_generation_prompt=True,
        )
        if not text.startswith(asked):
            raise DataError(
                f"{conversation.place}: data.template {self.name!r} renders the prompt of message "
                f"{turn + 1} differently once the answer is there, so what is trained would not be "
                "what is asked; use data.loss_on: last_turn, or a template whose "
                "add_generation_prompt gives what stands before the answer"
            )
        if self.learn_opening or asked.endswith(self.opening):
            return asked
        opened = asked + self.opening
        if text.startswith(opened):
            return opened
        if alone.startswith(opened):
            raise self._differs(conversation, turn)
        return asked

    def _differs(self, conversation: Conversation, turn: int) -> DataError:
        return DataError(
            f"{conversation.place}: data.template {self.name!r} renders the answer in message "
            f"{turn + 1} differently once later turns are there, so what is trained would not be "
            "what is asked; use data.loss_on: last_turn, or make a row of each answer with the "
            "turns before it"
        )

    def _end(self, conversation: Conversation, text: str, start: int, turn: int) -> int:
        messages = conversation.messages
        marked = Message("assistant", messages[turn].content.rstrip() + _MARK, supervised=True)
        moved = self._render(
            Conversation((*messages[:turn], marked, *messages[turn + 1 :]), conversation.place)
        )
        end = moved.find(_MARK)
        if end < start:
            raise DataError(
                f"{conversation.place}: data.template {self.name!r} drops the answer in message "
                f"{turn + 1} ({_short(messages[turn].content)}); use another data.template"
            )
        if moved.count(_MARK) > 1:
            raise DataError(
                f"{conversation.place}: data.template {self.name!r} writes the answer in message "
                f"{turn + 1} more than once ({_short(messages[turn].content)}); correct the "
                "template, or use another data.template"
            )
        return self._with_turn_end(text, end)

    def _with_turn_end(self, text: str, end: int) -> int:
        """Move the end of an answer past the token that ends its turn, if that follows."""
        if text[:end].rstrip().endswith(tuple(self.turn_ends)):
            return end
        if not self.turn_ends:
            return end
        stop = re.compile(r"\s*(?:" + "|".join(map(re.escape, self.turn_ends)) + ")")
        match = stop.match(text, end)
        return match.end() if match else end

    def _marked_spans(
        self, conversation: Conversation, answers: list[int]
    ) -> Sequence[tuple[int, int] | None]:
        """Return the span of each answer's {% generation %} block; None in templates without."""
        if not _GENERATION.search(self.source):
            return [None] * len(answers)
        spans: list[tuple[int, int]] = []
        self._render(conversation, spans=spans)
        assistants = [
            i for i, message in enumerate(conversation.messages) if message.role == "assistant"
        ]
        if len(spans) != len(assistants):
            raise DataError(
                f"{conversation.place}: data.template {self.name!r} marks {len(spans)} {{% "
                f"generation %}} blocks for {len(assistants)} assistant messages; there should be "
                "one around each"
            )
        return [spans[assistants.index(turn)] for turn in answers]

    @cached_property
    def _may_go(self) -> re.Pattern[str]:
        """Match what a template may drop from a message: spaces around thoughts, and /no_think.

        The latter are commands that the source of the template compares with.
        """
        commands = sorted(set(re.findall(r"['\"](/\w+)['\"]", self.source)), key=len, reverse=True)
        patterns = (rf"\s*{re.escape(command)}\s*" for command in commands)
        return re.compile("|".join([_THINKING.pattern, *patterns]))

    def _require_all(self, conversation: Conversation, text: str) -> None:
        """Raise DataError if the rendered text lacks a message. Earlier thoughts may go."""
        turns = zip(conversation.messages, self._plain(conversation))
        for number, (message, turn) in enumerate(turns, 1):
            content, context = turn["content"], turn.get("context", "")
            if message.supervised:  # `_span` checks that its thoughts are there, too
                content = _END_OF_THINKING.split(content)[-1]
            if all(_holds(text, part, self._may_go) for part in (content, context)):
                continue
            if message.from_setting:
                raise ConfigError(
                    f"data.system_prompt: would be ignored: data.template {self.name!r} drops or "
                    "changes system messages; remove the setting, or use another data.template"
                )
            raise DataError(
                f"{conversation.place}: data.template {self.name!r} drops or changes the "
                f"{message.role} message {number} ({_short(content)}); use another data.template"
            )

    def _plain(self, conversation: Conversation) -> list[dict[str, str]]:
        """Return messages as the template sees them.

        The input of an instruction row joins its content, unless the template has a place for it.
        """
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

    def _render(
        self,
        conversation: Conversation,
        add_generation_prompt: bool = False,
        spans: list[tuple[int, int]] | None = None,
    ) -> str:
        """Render as `apply_chat_template` does, except for the date.

        `spans` gets those of {% generation %} blocks. Raises DataError, or BrokenTemplate if no
        conversation can be rendered.
        """
        from jinja2 import TemplateSyntaxError

        try:
            text = self._jinja(conversation, add_generation_prompt, spans)
            text.encode()
            return text
        except UnicodeEncodeError as exc:
            raise DataError(
                f"{conversation.place}: data.template {self.name!r} writes "
                f"{exc.object[exc.start]!a}, half of a character, which no tokenizer can read; "
                "correct the template"
            ) from exc
        except Exception as exc:  # a template is a program: it can divide by zero, or never end
            why = f"{type(exc).__name__}: {exc}"
            fails = f"{conversation.place}: data.template {self.name!r} fails: {why}"
            if isinstance(exc, TemplateSyntaxError):
                raise BrokenTemplate(f"{fails} (line {exc.lineno} of the template)") from exc
            first, *others = conversation.messages
            if first.from_setting and self._takes(others, add_generation_prompt):
                raise ConfigError(
                    f"data.system_prompt: data.template {self.name!r} takes no system message: "
                    f"{type(exc).__name__}: {exc}; remove the setting, or use another data.template"
                ) from exc
            raise DataError(fails + self._remedy(conversation, add_generation_prompt)) from exc

    def _jinja(
        self,
        conversation: Conversation,
        add_generation_prompt: bool,
        spans: list[tuple[int, int]] | None = None,
    ) -> str:
        from transformers.utils import chat_template_utils

        given: dict[str, Any] = {
            **self.special_tokens,
            "messages": self._plain(conversation),
            "tools": None,
            "documents": None,
            "add_generation_prompt": add_generation_prompt,
        }
        if self.date is not None:  # as a variable, which hides transformers' function of that name
            given["strftime_now"] = datetime.fromisoformat(self.date).strftime
        compiled = chat_template_utils._compile_jinja_template(self.source)
        if spans is None:
            return str(compiled.render(given))
        text, found = chat_template_utils._render_with_assistant_indices(compiled, **given)
        spans += found
        return str(text)

    def _takes(self, messages: Sequence[Message], add_generation_prompt: bool) -> bool:
        try:
            self._jinja(Conversation(tuple(messages), PROMPT), add_generation_prompt)
        except Exception:
            return False
        return True

    def _remedy(self, conversation: Conversation, add_generation_prompt: bool) -> str:
        """Say what to do if a system message, or the lack of one, makes the template fail."""
        messages, is_row = conversation.messages, conversation.place != PROMPT
        if messages[0].role != "system":
            if self._takes([Message("system", "a"), *messages], add_generation_prompt):
                remedy = ": set data.system_prompt, or put one into the row" if is_row else ""
                return f"; it needs a system message{remedy}"
        elif len(messages) > 1 and self._takes(messages[1:], add_generation_prompt):
            remedy = ": take it out, or use another data.template" if is_row else ""
            return f"; it takes no system message{remedy}"
        return ""


class BrokenTemplate(ConfigError):
    """The template renders no conversation at all, so one row suffices to report it."""


def _is_text(source: str) -> bool:
    """Return whether a source can be encoded: half a character (a lone surrogate) cannot."""
    try:
        source.encode()
    except UnicodeEncodeError:
        return False
    return True


def load(
    name: str, format: str, chat_template: str | Mapping[str, str] | None,
    special_tokens: Mapping[str, str], vocabulary: Mapping[str, int], date: str | None = None,
) -> Template:  # fmt: skip
    """Find a template by its config name. Raise DataError if it is missing or unfit.

    `chat_template`: the tokenizer's own, or several by name, of which `default` is taken as
    transformers does. `date`: the day for templates that write it.
    """
    found = _find(name, format, chat_template, special_tokens, vocabulary)
    if not _is_text(found.source):
        raise DataError(
            f"data.template: {found.name}: holds half of a character; correct the template"
        )
    if _is_random(found):
        raise DataError(
            f"data.template: {found.name}: uses chance (random, lipsum), so each start would train "
            "other text; use another template"
        )
    if date is not None and _writes_time(found):
        raise DataError(
            f"data.template: {found.name}: writes the time, so each prompt would differ from those "
            "of training; take it out of the template (the date alone may stay)"
        )
    return replace(found, date=date if found.writes_date else None)


def _find(
    name: str, format: str, chat_template: str | Mapping[str, str] | None,
    special_tokens: Mapping[str, str], vocabulary: Mapping[str, int],
) -> Template:  # fmt: skip
    if name == "auto":
        if format == "prompt_completion" or format == "text":
            name = "plain"
        else:
            name = "chat" if chat_template else USUAL[format]
    turn_ends = tuple(
        dict.fromkeys([*special_tokens.values(), *(t for t in vocabulary if _looks_special(t))])
    )
    if name == "chat":
        if not chat_template:
            raise DataError(
                "data.template: chat, but the tokenizer has no chat template; use one of "
                f"{', '.join(BUILT_IN)}, or a .jinja file"
            )
        if not isinstance(chat_template, str):
            if "default" not in chat_template:
                raise DataError(
                    "data.template: the tokenizer has the chat templates "
                    f"{', '.join(chat_template)}, but none named default; write the one you want "
                    "into a .jinja file and give that"
                )
            chat_template = chat_template["default"]
        return Template(name, chat_template, special_tokens, turn_ends)
    if name in BUILT_IN:
        needed = ("<|im_start|>", "<|im_end|>") if name == "chatml" else ()
        missing = [token for token in needed if token not in vocabulary]
        if missing:
            raise DataError(
                "data.template: chatml ends turns with the token <|im_end|>, but the tokenizer has "
                f"no {' and '.join(missing)}; add them with model.new_tokens: "
                f"[{', '.join(missing)}], or use question_answer, alpaca or llama2"
            )
        return Template(name, BUILT_IN[name], special_tokens, turn_ends)
    if name.endswith(".jinja"):
        try:
            return Template(
                name, Path(name).read_text(encoding="utf-8-sig"), special_tokens, turn_ends
            )
        except (OSError, UnicodeDecodeError) as exc:
            raise DataError(f"data.template: {name}: cannot be read: {exc}") from exc
    raise DataError(
        f"data.template: {name!r} is not one of auto, chat, {', '.join(BUILT_IN)}, or a .jinja file"
    )


def sample_prompt(template: Template | None, prompt: str, system_prompt: str | None) -> str:
    """Render one of evaluation.sample_prompts; without a template return the prompt itself."""
    system = (
        [Message("system", system_prompt, from_setting=True)] if system_prompt is not None else []
    )
    place = Place("evaluation.sample_prompts", 1)
    return template.prompt([*system, Message("user", prompt)], place) if template else prompt


def _writes_time(template: Template) -> bool:
    """Return whether the template renders other text at another time of the same day."""
    if not template.writes_date:
        return False
    with contextlib.suppress(DataError):  # reported with the first row
        times = ("04:05:06.000007", "17:38:49.500000")
        clocks = [replace(template, date=f"2001-02-03T{time}") for time in times]
        early, late = (
            clock._render(Conversation(clock.probe, PROMPT), add_generation_prompt=True)
            for clock in clocks
        )
        return early != late
    return False


def _is_random(template: Template) -> bool:
    """Return whether the template uses Jinja's sources of chance."""
    if not re.search("random|lipsum", template.source):
        return False
    from jinja2 import TemplateSyntaxError, nodes
    from transformers.utils import chat_template_utils

    try:
        compiled = chat_template_utils._compile_jinja_template(template.source)
        parsed = compiled.environment.parse(template.source)
    except TemplateSyntaxError:
        return False  # reported with the first row
    filters, names = parsed.find_all(nodes.Filter), parsed.find_all(nodes.Name)
    is_random = any(each.name == "random" for each in filters)
    return is_random or any(each.name == "lipsum" for each in names)


def _looks_special(token: str) -> bool:
    in_bars = token.startswith("<|") and token.endswith("|>")
    return in_bars or (token.startswith("<") and token.endswith("_of_turn>"))


def _holds(rendered: str, message: str, may_go: re.Pattern[str] = _THINKING) -> bool:
    """Return whether rendered text holds a message, but for spaces at its ends and `may_go`."""
    at = 0
    for piece in may_go.split(message.strip()):
        at = rendered.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def _cut(text: str, spans: Sequence[tuple[int, int]]) -> list[Segment]:
    """Cut text at the supervised spans into segments, none of them empty."""
    segments, at = [], 0
    for start, end in spans:
        segments += [Segment(text[at:start], False), Segment(text[start:end], True)]
        at = end
    segments.append(Segment(text[at:], False))
    return [segment for segment in segments if segment.text]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
