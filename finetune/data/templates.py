"""Render conversations as text segments, each supervised or not.

Every template is a Jinja chat template, so that training sees what `tokenizer.apply_chat_template`
renders from the exported model. An answer starts where the rendered prompt before it ends, and ends
where text appended to its content would appear. No answer is searched for by a string.
"""

import contextlib
import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from finetune.data import fixed_text
from finetune.data.advice import SFT, Advice
from finetune.data.conversations import Conversation, Message
from finetune.data.fixed_text import FixedText, marked
from finetune.data.places import Place
from finetune.errors import ConfigError, DataError

_GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")
MARK = "\ufdd0"  # a Unicode noncharacter: no text contains it

JOINT = "\n\n"  # between a content and the context that a template has no place for
MOST_TEXTS = 1_000  # 20 turns more make 20 texts more
PROMPT = Place("the prompt", 1)  # the place of a conversation that is not in a file
QUESTION = (Message("user", "a"),)
ENDING = "a template that writes {{ eos_token }} or another special token after each answer"
_THINKING = re.compile(r"\s*</?think(?:ing)?>\s*")
_END_OF_THINKING = re.compile(r"</think(?:ing)?>")


@dataclass(frozen=True)
class Segment:
    """A piece of the rendered text, whether the model should learn it, and with which weight."""

    text: str
    supervised: bool
    weight: float = 1.0


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
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """data.template_arguments: further variables of the template, of types that JSON has."""
    advice: Advice = field(default=SFT, compare=False)
    """What errors about rows may advise."""

    @property
    def fingerprint(self) -> str:
        tokens = sorted(f"{name}={token}" for name, token in self.special_tokens.items())
        parts = [self.source, *tokens, *self.turn_ends]
        parts += [f"date={self.date}"] * self.writes_date + ["learn_opening"] * self.learn_opening
        if self.arguments:
            parts.append(f"arguments={json.dumps(self.arguments, sort_keys=True)}")
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
                self._render(_answered(messages, "b"))
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
            answered = self._render(_answered(self.probe, MARK))
            opening = answered[len(asked) : max(answered.find(MARK), 0)]
            if answered.startswith(asked) and opening.strip():
                return opening
        return ""

    def segments(self, conversation: Conversation, loss_on: str = "completion") -> list[Segment]:
        """Return the rendered text in pieces whose concatenation is exactly that text.

        If no token of the template ends the last supervised answer, the text ends with that answer,
        so that the EOS comes right behind it. If text in between were not learned, the model would
        not reach the EOS; if it were, the model would repeat it in every answer.

        `loss_on`: completion (every assistant turn), last_turn, or all; for each_turn call this for
        each answer, with last_turn. Raises DataError if the
        template fails, drops or changes a message, renders a prompt differently once the answer is
        known, or an answer differently once later turns are there, and if an answer before the last
        one has no end.
        """
        messages = conversation.messages
        if messages[0].role == "text":
            if loss_on != "all":
                why = "but the objective learns answers"
                remedy = f"{self.advice.plain_text}, or rows with prompts and answers"
                what = f"the row is plain text without an answer, {why}; {remedy}"
                raise DataError(f"{conversation.place}: {what}")
            return [Segment(messages[0].content, True)]
        text = self._render(conversation)
        self._require_tools(conversation, text)
        self._require_calls(conversation)
        self._require_roles(conversation, text)
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
            _require_all_supervised(conversation)
            return [Segment(text, True)]
        weights = [messages[turn].weight for turn in answers]
        segments = _cut(text, spans, weights)
        if self.stop_of(segments) is None:
            if len(spans) > 1:
                raise self._wrong(
                    conversation,
                    "ends answers without a token of the tokenizer, so only the last of "
                    f"{len(spans)} would teach the model to stop; "
                    + self.advice.use(("each_turn", "last_turn"), ENDING),
                )
            segments = _cut(text[: spans[-1][1]], spans, weights)
        return segments

    def opens_itself(self, segments: Sequence[Segment]) -> bool:
        """Return whether an answer begins with its own text where `opening` would stand."""
        before = ""
        for segment in segments:
            if segment.supervised and not before.endswith(self.opening):
                return True
            before = segment.text
        return False

    def prompt(
        self, messages: Sequence[Message], place: Place = PROMPT,
        tools: tuple[Mapping[str, Any], ...] = (),
    ) -> str:  # fmt: skip
        """Return the text up to the point where the model should begin to answer.

        Raises DataError if the template fails, or drops or changes what was said.
        """
        asking = Conversation(tuple(messages), place, tools)
        asked = self._render(asking, add_generation_prompt=True)
        self._require_calls(asking)
        self._require_roles(asking, asked, add_generation_prompt=True)
        self._require_all(asking, asked)
        return self._opened(asked)

    def _opened(self, asked: str) -> str:
        """Return a prompt with what the template writes before every answer."""
        return asked if self.learn_opening or asked.endswith(self.opening) else asked + self.opening

    def after_answer(self, messages: Sequence[Message], place: Place) -> tuple[str, str]:
        """Return (the token that ends an answer, what stands from there up to the next answer).

        `messages`: those between the two. Raises DataError if no token of the tokenizer ends the
        answer, or if the template fails or leaves out a message.
        """
        conversation = Conversation((*self.probe, Message("assistant", MARK), *messages), place)
        asked = self._render(conversation, add_generation_prompt=True)
        text = self._opened(asked)
        end = text.find(MARK) + len(MARK)
        found = self._end_of_turn.match(text, end) if self.turn_ends else None
        if text.count(MARK) != 1 or found is None:
            raise self._wrong(
                conversation,
                "ends answers without a token of the tokenizer, so nothing can follow them; use "
                + ENDING,
            )
        after = text[found.end() :]
        for message in messages:
            if not _holds(after, message.content):
                what = f"leaves out {_short(message.content)} of the role {message.role}"
                raise self._wrong(conversation, f"{what}; give it another role")
            as_answer = self._in_role(conversation, message.role, "assistant", True)
            if message.role != "user" and asked == as_answer:
                what = f"writes the role {message.role} as an answer of the model"
                raise self._wrong(conversation, f"{what}; give it another role")
        return found[0].strip(), after

    def _require_roles(
        self, conversation: Conversation, text: str, add_generation_prompt: bool = False
    ) -> None:
        """Raise DataError if the template writes the result of a tool, or the system, as an answer.

        `text`: the conversation rendered. Conversations of the same roles are checked once.
        """
        roles = tuple(message.role for message in conversation.messages)
        if roles in self._checked_roles:
            return
        for role in set(roles) - {"user", "assistant", "text"}:
            as_answer, as_question = (
                self._in_role(conversation, role, other, add_generation_prompt)
                for other in ("assistant", "user")
            )
            if as_answer == text != as_question:  # both equal: the template shows no roles
                if role == "system" and conversation.messages[0].from_setting:
                    raise ConfigError(
                        f"data.system_prompt: data.template {self.name!r} writes system messages "
                        "as answers of the model; remove the setting, or use another data.template"
                    )
                raise self._wrong(
                    conversation,
                    f"writes messages of the role {role} as answers of the model; use the model's "
                    "own template (data.template: chat) or another one, or take them out of the "
                    "rows",
                )
        self._checked_roles.add(roles)

    @cached_property
    def _checked_roles(self) -> set[tuple[str, ...]]:
        return set()

    def _in_role(
        self, conversation: Conversation, role: str, other: str, add_generation_prompt: bool
    ) -> str | None:
        """Render a conversation with another role in place of one; None if that cannot be."""
        messages = tuple(
            replace(each, role=other) if each.role == role else each
            for each in conversation.messages
        )
        try:
            return self._render(conversation.with_messages(messages), add_generation_prompt)
        except DataError:
            return None

    def stop_token(self, conversation: Conversation | None = None) -> str | None:
        """Return the token that ends an answer; None if the tokenizer's EOS must do that.

        `conversation`: a row that the template takes; by default `example`, or the shortest.
        """
        conversation = conversation or self.example or _answered(self.probe, "b")
        return self.stop_of(self.segments(conversation, "last_turn"))

    def stop_of(self, segments: Sequence[Segment]) -> str | None:
        """Return the token that ends the last answer of these segments, or None."""
        answer = [segment.text for segment in segments if segment.supervised][-1].rstrip()
        if not answer.endswith(self._ends):
            return None
        return next(token for token in self.turn_ends if answer.endswith(token))

    def _span(
        self, conversation: Conversation, text: str, turn: int, mark: tuple[int, int] | None
    ) -> tuple[int, int]:
        """Return where answer `turn` begins and ends in the text, with its end-of-turn token.

        `mark`: the span of its {% generation %} block, in templates that have them.
        """
        messages = conversation.messages
        alone = text
        if turn + 1 < len(messages):
            alone = self._render(conversation.with_messages(messages[: turn + 1]))
        start = len(self._prompt_of(conversation, text, alone, turn))
        if messages[turn].has_calls:
            end = self._end_of_calls(alone, start)
        else:
            end = self._end(conversation, text, start, turn)  # raises errors in any case
        if mark is not None:
            start = mark[0] if text[start : mark[0]].strip() else start
            end = self._with_turn_end(text, mark[1])
        if not alone.startswith(text[:end]) or self._with_turn_end(alone, end) != end:
            raise self._differs(conversation, turn)
        if not _holds(text[start:end], messages[turn].content):
            what = f"drops or rewrites the answer {_short(messages[turn].content)}"
            renders = f"it renders {_short(text[start:end])}"
            is_last = not any(later.supervised for later in messages[turn + 1 :])
            remedy = self.advice.use(() if is_last else ("last_turn",), "another data.template")
            remedy += self._of_thoughts(messages[turn])
            raise self._wrong(conversation, f"{what}: {renders}; {remedy}")
        if not _holds(text[start:end], messages[turn].thoughts):
            remedy = "write them into the content"
            if self.advice.drops_thoughts:
                remedy = f"set data.thinking: drop, or {remedy}"
            what = f"leaves out the thoughts of message {turn + 1}"
            raise self._wrong(conversation, f"{what} ({_short(messages[turn].thoughts)}); {remedy}")
        return start, end

    def _prompt_of(self, conversation: Conversation, text: str, alone: str, turn: int) -> str:
        """Return the prompt of message `turn`. Raise DataError if the text does not begin with it.

        `alone`: the rendered text without the messages after `turn`.
        """
        before = conversation.with_messages(conversation.messages[:turn])
        asked = self._render(before, add_generation_prompt=True)
        if not text.startswith(asked):
            is_last = not any(each.supervised for each in conversation.messages[turn + 1 :])
            helps = ("each_turn",) * alone.startswith(asked) + ("last_turn",) * (not is_last)
            raise self._wrong(
                conversation,
                f"renders the prompt of message {turn + 1} differently once the answer is there, "
                "so what is trained would not be what is asked; "
                + self.advice.use(
                    helps, "a template whose add_generation_prompt gives what stands before the "
                    "answer",
                ) + self._of_thoughts(conversation.messages[turn]),
            )  # fmt: skip
        if self.learn_opening or asked.endswith(self.opening):
            return asked
        opened = asked + self.opening
        if text.startswith(opened):
            return opened
        if alone.startswith(opened):
            raise self._differs(conversation, turn)
        return asked

    def _of_thoughts(self, message: Message) -> str:
        """Say what to do where the thoughts of an answer may be the reason."""
        has_thoughts = message.thoughts or _END_OF_THINKING.search(message.content)
        if has_thoughts and self.advice.drops_thoughts:
            return "; this answer has thoughts, which data.thinking: drop removes"
        return ""

    def _differs(self, conversation: Conversation, turn: int) -> DataError:
        return self._wrong(
            conversation,
            f"renders the answer in message {turn + 1} differently once later turns are there, so "
            "what is trained would not be what is asked; "
            + self.advice.use(("each_turn", "last_turn"), "another data.template"),
        )

    def _wrong(self, conversation: Conversation, what: str) -> DataError:
        return DataError(f"{conversation.place}: data.template {self.name!r} {what}")

    def _end(self, conversation: Conversation, text: str, start: int, turn: int) -> int:
        messages = conversation.messages
        marked = messages[turn].with_content(messages[turn].content.rstrip() + MARK)
        with_mark = (*messages[:turn], marked, *messages[turn + 1 :])
        moved = self._render(conversation.with_messages(with_mark))
        end, shown = moved.find(MARK), f"({_short(messages[turn].content)})"
        if end < start:
            what = f"drops the answer in message {turn + 1} {shown}; use another data.template"
            raise self._wrong(conversation, what)
        if moved.count(MARK) > 1:
            what = f"writes the answer in message {turn + 1} more than once {shown}"
            remedy = "correct the template, or use another data.template"
            raise self._wrong(conversation, f"{what}; {remedy}")
        return self._with_turn_end(text, end)

    def _end_of_calls(self, alone: str, start: int) -> int:
        """Return where tool calls end: behind the token that ends the turn, if there is one.

        `alone`: the rendered text up to this turn.
        """
        found = [(alone.rfind(token, start), token) for token in self.turn_ends]
        ends = [at + len(token) for at, token in found if at >= 0]
        return max(ends) if ends else start + len(alone[start:].rstrip())

    def _require_calls(self, conversation: Conversation) -> None:
        """Raise DataError if the template leaves out a tool call or its arguments."""
        if not any(message.parts for message in conversation.messages):
            return
        marks: dict[str, str] = {}

        def marked(call: Mapping[str, Any], what: str) -> dict[str, Any]:
            name, arguments = (f"{MARK}{len(marks) + n}{MARK}" for n in (0, 1))
            marks[name], marks[arguments] = f"the name of {what}", f"the arguments of {what}"
            function = call["function"]
            return {**call, "function": {
                "name": function["name"] + name, "arguments": {arguments: arguments},
            }}  # fmt: skip

        turns = []
        for number, message in enumerate(conversation.messages, 1):
            if message.has_calls:
                where = f"in message {number}"
                calls = [
                    marked(call, f"tool call {n} {where}")
                    for n, call in enumerate(message.parts["tool_calls"], 1)
                ]
                message = replace(message, parts={**message.parts, "tool_calls": calls})
            turns.append(message)
        if not marks:
            return
        text = self._render(replace(conversation, messages=tuple(turns)))
        for mark, what in marks.items():
            if mark not in text:
                remedy = "use the model's own template (data.template: chat), or another model"
                raise self._wrong(conversation, f"drops {what}; {remedy}")

    def _require_tools(self, conversation: Conversation, text: str) -> None:
        """Raise DataError if the template ignores the descriptions of tools."""
        if conversation.tools and self._render(replace(conversation, tools=())) == text:
            raise self._wrong(
                conversation,
                "ignores the descriptions of tools, so the model would not see them; use the "
                "model's own template (data.template: chat), or remove the column",
            )

    def _with_turn_end(self, text: str, end: int) -> int:
        """Move the end of an answer past the token that ends its turn, if that follows."""
        if not self.turn_ends or text[:end].rstrip().endswith(self._ends):
            return end
        match = self._end_of_turn.match(text, end)
        return match.end() if match else end

    @cached_property
    def _ends(self) -> tuple[str, ...]:
        return tuple(self.turn_ends)

    @cached_property
    def _end_of_turn(self) -> re.Pattern[str]:
        return re.compile(r"\s*(?:" + "|".join(map(re.escape, self.turn_ends)) + ")")

    @cached_property
    def _has_generation(self) -> bool:
        return _GENERATION.search(self.source) is not None

    def _marked_spans(
        self, conversation: Conversation, answers: list[int]
    ) -> Sequence[tuple[int, int] | None]:
        """Return the span of each answer's {% generation %} block; None in templates without."""
        if not self._has_generation:
            return [None] * len(answers)
        spans: list[tuple[int, int]] = []
        self._render(conversation, spans=spans)
        roles = [message.role for message in conversation.messages]
        assistants = [turn for turn, role in enumerate(roles) if role == "assistant"]
        if len(spans) != len(assistants):
            what = f"marks {len(spans)} {{% generation %}} blocks"
            of = f"for {len(assistants)} assistant messages; there should be one around each"
            raise self._wrong(conversation, f"{what} {of}")
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
            if message.role == "assistant":  # `_span` checks that its thoughts are there, too
                content = _END_OF_THINKING.split(content)[-1]
            if all(_holds(text, part, self._may_go) for part in (content, context)):
                continue
            if message.from_setting:
                raise ConfigError(
                    f"data.system_prompt: would be ignored: data.template {self.name!r} drops or "
                    "changes system messages; remove the setting, or use another data.template"
                )
            what = f"drops or changes the {message.role} message {number} ({_short(content)})"
            raise self._wrong(conversation, f"{what}; use another data.template")

    @cached_property
    def _has_context(self) -> bool:
        """Return whether the template has a place for the input of an instruction row."""
        return "message.context" in self.source

    def _plain(self, conversation: Conversation) -> list[dict[str, Any]]:
        """Return messages as the template sees them.

        The input of an instruction row joins its content, unless the template has a place for it.
        """
        own = self._has_context
        plain = []
        for message in conversation.messages:
            turn = {"role": message.role, "content": message.content, **message.parts}
            if message.thoughts:
                turn["thinking"] = message.thoughts  # transformers hands both names to a template
            if message.context and own:
                turn["context"] = message.context
            elif message.context:
                turn["content"] += JOINT + message.context
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
            what = f"writes {exc.object[exc.start]!a}, half of a character"
            remedy = "which no tokenizer can read; correct the template"
            raise self._wrong(conversation, f"{what}, {remedy}") from exc
        except Exception as exc:  # a template is a program: it can divide by zero, or never end
            why = f"{type(exc).__name__}: {exc}"
            fails = self._wrong(conversation, f"fails: {why}")
            if isinstance(exc, TemplateSyntaxError):
                raise BrokenTemplate(f"{fails} (line {exc.lineno} of the template)") from exc
            first, *others = conversation.messages
            if first.from_setting and self._takes(others, add_generation_prompt):
                raise ConfigError(
                    f"data.system_prompt: data.template {self.name!r} takes no system message: "
                    f"{why}; remove the setting, or use another data.template"
                ) from exc
            remedy = self._remedy(conversation, add_generation_prompt)
            raise DataError(f"{fails}{remedy}") from exc

    def _jinja(
        self,
        conversation: Conversation,
        add_generation_prompt: bool,
        spans: list[tuple[int, int]] | None = None,
    ) -> str:
        if spans is None and self._copies_contents and not conversation.tools:
            text = self._around_contents(conversation, add_generation_prompt)
            if text is not None:
                return text
        return self._run(conversation, add_generation_prompt, spans)

    @cached_property
    def _copies_contents(self) -> bool:
        """Return whether what the template writes around contents does not depend on them."""
        from transformers.utils import chat_template_utils

        if self.writes_date and self.date is None:  # the next row may be rendered tomorrow
            return False
        try:
            compiled = chat_template_utils._compile_jinja_template(self.source)
            return fixed_text.copies_contents(compiled.environment.parse(self.source))
        except Exception:  # `_run` reports it
            return False

    @cached_property
    def _texts(self) -> dict[Any, FixedText | None]:
        """Return the texts around contents that are known, by the roles of the messages."""
        return {}

    def _around_contents(
        self, conversation: Conversation, add_generation_prompt: bool
    ) -> str | None:
        """Return what `_run` would; None where the template has to run."""
        shape, contents, own = [], [], self._has_context
        for message in conversation.messages:
            if message.parts:
                return None
            content, has_own = message.content, own and bool(message.context)
            if message.context and not own:
                content += JOINT + message.context
            contents.append(content)
            if has_own:
                contents.append(message.context)
            shape.append((message.role, has_own))
        key = add_generation_prompt, tuple(shape)
        if key not in self._texts:
            if len(self._texts) >= MOST_TEXTS:
                return None
            self._texts[key] = self._text_around(shape, add_generation_prompt)
        text = self._texts[key]
        return None if text is None else text.around(contents)

    def _text_around(
        self, shape: Sequence[tuple[str, bool]], add_generation_prompt: bool
    ) -> FixedText | None:
        """Return the text around the contents of messages of these roles, some with a context."""
        numbers = itertools.count()
        messages = tuple(
            Message(role, marked(next(numbers)), context=marked(next(numbers)) if has else "")
            for role, has in shape
        )
        try:
            text = self._run(Conversation(messages, PROMPT), add_generation_prompt)
        except Exception:  # the row is reported by the text that it has
            return None
        return fixed_text.split(text)

    def _run(
        self,
        conversation: Conversation,
        add_generation_prompt: bool,
        spans: list[tuple[int, int]] | None = None,
    ) -> str:
        """Run the template."""
        from transformers.utils import chat_template_utils

        given: dict[str, Any] = {
            **self.special_tokens,
            **self.arguments,
            "messages": self._plain(conversation),
            "tools": list(conversation.tools) or None,
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


def _answered(prompt: Sequence[Message], answer: str) -> Conversation:
    """Return a conversation that is not in a file, which ends with this answer."""
    return Conversation((*prompt, Message("assistant", answer, supervised=True)), PROMPT)


def _require_all_supervised(conversation: Conversation) -> None:
    """Raise DataError for a row that says how to train on an answer."""
    answers = [message for message in conversation.messages if message.role == "assistant"]
    says = ""
    if not all(message.supervised for message in answers):
        says = "says of an answer not to train on it"
    elif any(message.weight != 1 for message in answers):
        says = "gives an answer a weight"
    if says:
        raise DataError(
            f"{conversation.place}: {says}, which would be ignored where every token is "
            "supervised; remove that, or use objective.kind: sft with data.loss_on: completion"
        )


def _holds(rendered: str, message: str, may_go: re.Pattern[str] = _THINKING) -> bool:
    """Return whether rendered text holds a message, but for spaces at its ends and `may_go`."""
    message, at = message.strip(), 0
    if message in rendered:
        return True
    for piece in may_go.split(message):
        at = rendered.find(piece, at)
        if at < 0:
            return False
        at += len(piece)
    return True


def _cut(text: str, spans: Sequence[tuple[int, int]], weights: Sequence[float]) -> list[Segment]:
    """Cut text at the supervised spans into segments, none of them empty."""
    segments, at = [], 0
    for (start, end), weight in zip(spans, weights, strict=True):
        segments += [Segment(text[at:start], False), Segment(text[start:end], True, weight)]
        at = end
    segments.append(Segment(text[at:], False))
    return [segment for segment in segments if segment.text]


def _short(text: str) -> str:
    return repr(text if len(text) <= 60 else text[:60] + "...")
