"""Talk to a model in the terminal."""

import argparse
import sys
from contextlib import suppress
from typing import Any

import torch

from finetune import places
from finetune.config.base import is_adapter, model_argument, require_model
from finetune.data.conversations import Message
from finetune.data.templates import PROMPT, QUESTION
from finetune.errors import DataError, ModelError
from finetune.export.load import (
    base_argument,
    load,
    load_chat_tokenizer,
    require_base,
    trust_remote_code_argument,
)
from finetune.generation import generate


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    what, none = "run directory, folder or Hub id, full weights or adapter", argparse.SUPPRESS
    add("model", nargs="?", type=model_argument, metavar="MODEL", default=none, help=what)
    add("--model", type=model_argument, help="the same, as an option")
    add("--prompt", default=None, help="answer this one message and end")
    add("--system", default=None, help="system message")
    add("--max-new-tokens", type=generate.at_least(1), default=256, help="longest answer")
    what = "sampling temperature; 0: always take the likeliest token"
    add("--temperature", type=_temperature, default=0.0, help=what)
    add("--one-turn", action="store_true", help="forget each message before the next")
    base_argument(parser)
    trust_remote_code_argument(parser)


def _temperature(text: str) -> float:
    with suppress(ValueError):
        if 0 <= float(text) < float("inf"):
            return float(text)
    raise argparse.ArgumentTypeError(f"should be a number of at least 0, got {text!r}")


def require_system(tokenizer: Any, start: list[Message]) -> None:
    """Raise ModelError if the chat template takes no system message, or needs one."""
    try:
        generate.chat_prompt(tokenizer, [*start, *QUESTION])
    except DataError as exc:
        other = [] if start else [Message("system", "a")]
        try:
            generate.chat_prompt(tokenizer, [*other, *QUESTION])
        except DataError:
            raise exc from None  # the system message is not the reason
        takes, remedy = ("takes no", "remove it") if start else ("needs a", "give one")
        reason = str(exc).removeprefix(f"{PROMPT}: ")
        raise ModelError(
            f"--system: the model's chat template {takes} system message ({reason}); {remedy}"
        ) from exc


def main(arguments: argparse.Namespace) -> None:
    """Answer --prompt, or the lines that the user types."""
    if arguments.model is None:
        raise ModelError(
            f"name a model: {places.command()} chat runs/my_run, or a folder, or a Hub id"
        )
    require_model(arguments.model, "--model")
    if arguments.base is not None and not is_adapter(arguments.model):
        raise ModelError(
            f"--base: {arguments.model} is not the folder of an adapter, so --base would be "
            "ignored; remove --base"
        )
    require_base(arguments.base)
    tokenizer = load_chat_tokenizer(arguments.model, arguments.trust_remote_code)
    start = [Message("system", arguments.system)] if arguments.system is not None else []
    require_system(tokenizer, start)
    trusted = arguments.trust_remote_code
    model = load(arguments.model, trust_remote_code=trusted, base=arguments.base)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")

    def answer(messages: list[Message]) -> str:
        return _answer(model, tokenizer, messages, arguments)

    if arguments.prompt is not None:
        answer([*start, Message("user", arguments.prompt)])
        return
    print("An empty line starts a new conversation, Ctrl-D ends.", file=sys.stderr)
    messages = list(start)
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            return
        if not text or arguments.one_turn:
            messages = list(start)
        if text:
            messages.append(Message("user", text))
            messages.append(Message("assistant", answer(messages)))


def _answer(
    model: Any, tokenizer: Any, messages: list[Message], arguments: argparse.Namespace
) -> str:
    """Return the answer, printed as it is written."""
    prompt, limit = generate.chat_prompt(tokenizer, messages), arguments.max_new_tokens
    streamer = generate.TextStreamer(
        tokenizer, skip_prompt=True, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    [given] = generate.answers(
        model, tokenizer, [prompt], max_new_tokens=limit, batch_size=1,
        temperature=arguments.temperature, streamer=streamer,
    )  # fmt: skip
    if given.is_cut:
        note = f"note: the answer was cut after {limit} tokens; see --max-new-tokens"
        print(note, file=sys.stderr)
    return given.text
