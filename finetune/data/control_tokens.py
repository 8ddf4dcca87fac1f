"""Special tokens in the text of rows and messages: refused, or kept as plain characters."""

import json
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from finetune.data.conversations import Conversation, Message
from finetune.data.templates import MARK
from finetune.errors import ConfigError, DataError

# A Unicode noncharacter, which no text may contain: no token joins what stands on its two sides.
CUT = "\ufdd1"
_MARKS = re.compile(f"[{MARK}{CUT}]")


def uses_bos(tokenizer: Any) -> bool:
    """Return whether the tokenizer itself puts a BOS before a text."""
    bos_id = tokenizer.bos_token_id
    return bos_id is not None and tokenizer("a")["input_ids"][:1] == [bos_id]


class ControlTokens:
    """Find text that contains BOS, EOS, ends of turns, or other special tokens.

    It would forge turns, so it is refused, or cut so that the tokenizer reads characters.
    """

    def __init__(self, tokenizer: Any, turn_ends: Sequence[str]) -> None:
        self._bos = tokenizer.bos_token
        added = tokenizer.added_tokens_decoder.values()
        special = {token.content for token in added if token.special}
        ends = {*turn_ends, tokenizer.eos_token, tokenizer.pad_token}
        if uses_bos(tokenizer):
            ends.add(tokenizer.bos_token)
        # GPT-2's unknown token is its EOS, too.
        allowed = {None, tokenizer.unk_token} - {tokenizer.eos_token, tokenizer.bos_token} | {None}
        self._of_text, self._of_turns = _any_of(ends - allowed), _any_of((ends | special) - allowed)
        # Two halves in neighbouring messages: one of them has at least half of the characters.
        long = [(t, n) for t in (ends | special) - allowed for n in range(1, len(t))]
        self._heads = {token[:n] for token, n in long if 2 * n >= len(token)}
        self._tails = {token[n:] for token, n in long if 2 * n <= len(token)}
        self._sizes = sorted({len(each) for each in self._heads | self._tails})

    def refuse(self, conversation: Conversation) -> Conversation:
        """Return the conversation. Raise DataError if its text would be read as one of them."""
        return self._checked(conversation, cuts=False)

    def as_text(self, conversation: Conversation) -> Conversation:
        """Return the conversation with a cut inside each of them, so that they stay characters.

        Raises DataError where no cut is possible: in calls and descriptions of tools, which
        templates write in ways of their own, and ConfigError for data.system_prompt, which the
        exported template holds.
        """
        return self._checked(conversation, cuts=True)

    def _checked(self, conversation: Conversation, cuts: bool) -> Conversation:
        messages = []
        for message in conversation.messages:
            # Text has no turns to forge, and code is full of tokens that some vocabularies call
            # special, such as <filename>.
            control = self._of_text if message.role == "text" else self._of_turns
            hidden = json.dumps(dict(message.parts), ensure_ascii=False) if message.parts else ""
            if mark := _MARKS.search(message.content + message.context + hidden):
                what = f"the text contains {mark[0]!a}, which Unicode reserves for programs"
                raise DataError(f"{conversation.place}: {what}; remove it from the row")
            can_stay = cuts and not message.from_setting
            if can_stay:
                content, context = (
                    self._with_cuts(text, control) for text in (message.content, message.context)
                )
                message = replace(message, content=content, context=context)
            if found := control.search(message.content + message.context + hidden):
                in_content = not can_stay and not control.search(hidden)
                raise self._error(conversation, message, found[0], in_content)
            messages.append(message)
        tools = json.dumps(conversation.tools, ensure_ascii=False) if conversation.tools else ""
        if found := self._of_turns.search(tools):
            raise self._error(conversation, None, found[0], False)
        return replace(conversation, messages=tuple(messages)) if cuts else conversation

    def _with_cuts(self, text: str, control: re.Pattern[str]) -> str:
        """Cut tokens in a text behind their first character, and at an end what may be half of one.

        Tokens of one character stay.
        """

        def cut(found: re.Match[str]) -> str:
            token = found[0]
            return token[0] + CUT + token[1:] if len(token) > 1 else token

        before = ""
        while text != before:
            before, text = text, control.sub(cut, text)
        inner = text.strip()
        if any(inner[:size] in self._tails for size in self._sizes):
            text = text.replace(inner, CUT + inner)
        if any(inner[-size:] in self._heads for size in self._sizes):
            text = text.replace(inner, inner + CUT)
        return text

    def _error(
        self, conversation: Conversation, message: Message | None, token: str, may_stay: bool
    ) -> DataError | ConfigError:
        what = "a control token of the tokenizer"
        if token == self._bos:
            what = "a BOS that the tokenizer adds itself"
        if message is not None and message.from_setting:
            return ConfigError(f"data.system_prompt: contains {token!r}, {what}; remove it")
        remedy = ", or set data.special_tokens_in_text: text" if may_stay else ""
        return DataError(
            f"{conversation.place}: the text contains {token!r}, {what}; remove it from the row"
            + remedy
        )


def _any_of(tokens: set[str]) -> re.Pattern[str]:
    return re.compile("|".join(re.escape(token) for token in sorted(tokens)) or r"(?!)")
