"""Talk to a model in the terminal."""

import argparse
import re
import sys

import torch

from finetune import export
from finetune.config.base import model_argument, require_model
from finetune.data import templates
from finetune.data.rows import Message
from finetune.errors import DataError, ModelError
from finetune.evaluation import generation


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model", required=True, type=model_argument, help="run directory, folder or Hub id, full weights or adapter"
    )
    parser.add_argument("--prompt", default=None, help="answer this one message and end")
    parser.add_argument("--system", default=None, help="system message")
    parser.add_argument("--max-new-tokens", type=generation.at_least(1), default=256, help="longest answer")
    parser.add_argument("--temperature", type=_temperature, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--one-turn", action="store_true", help="forget each message before the next")
    export.base_argument(parser)
    export.trust_remote_code_argument(parser)


def _temperature(text: str) -> float:
    if not 0 <= float(text) < float("inf"):
        raise ValueError
    return float(text)


def main(arguments: argparse.Namespace) -> None:
    require_model(arguments.model, "--model")
    tokenizer = export.load_tokenizer(arguments.model, arguments.trust_remote_code)
    if not tokenizer.chat_template:
        raise ModelError(
            f"{arguments.model}: its tokenizer has no chat template; models tuned with objective.kind: sft have one"
        )
    model = export.load(arguments.model, trust_remote_code=arguments.trust_remote_code, base=arguments.base)
    model = model.to("cuda" if torch.cuda.is_available() else "cpu")
    start = [Message("system", arguments.system)] if arguments.system else []

    def answer(messages: list[Message]) -> str:
        try:
            prompt = generation.chat_prompt(tokenizer, messages)
        except DataError as exc:
            about = str(exc).removeprefix(f"{templates.PROMPT}: ")
            if found := re.search("; it (needs a|takes no) system message$", about):
                about = (
                    f"--system: {arguments.model}'s chat template {found[1]} system message: {about[: found.start()]}"
                )
            raise ModelError(about) from exc
        return generation.answers(
            model,
            tokenizer,
            [prompt],
            max_new_tokens=arguments.max_new_tokens,
            batch_size=1,
            temperature=arguments.temperature,
        )[0].text

    if arguments.prompt is not None:
        print(answer([*start, Message("user", arguments.prompt)]))
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
            print(messages[-1].content)
