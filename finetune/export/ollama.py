"""The Modelfile that Ollama reads: weights, chat template in Go's language, system prompt, stops.

Which built-in template a tokenizer has shows in what it renders, so a model that came with its own
copy of one is recognised, too. Ollama's language cannot strip white space, as llama3 and gemma do
around a message; apart from that the prompts are equal.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune import files
from finetune.data.built_in_templates import BUILT_IN
from finetune.errors import ModelError

FILE = "Modelfile"
EOS = "<EOS>"  # stands below for the token itself
_SYSTEM_FIRST = '(and (eq $i 1) (eq (index $.Messages 0).Role "system"))'
_SYSTEM = "(index $.Messages 0).Content"
_VICUNA = (
    "A chat between a curious user and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the user's questions."
)
_ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request."
)
# The templates of data/built_in_templates.py, for a conversation that ends with a question.
GO = {
    "plain": (
        '{{ range .Messages }}{{ .Content }}{{ if eq .Role "assistant" }}<EOS>{{ end }}{{ end }}'
    ),
    "question_answer": (
        '{{ range .Messages }}{{ if eq .Role "system" }}{{ .Content }}\n\n'
        '{{ else if eq .Role "user" }}### Question:\n{{ .Content }}\n\n'
        "{{ else }}### Answer:\n{{ .Content }}<EOS>\n\n{{ end }}{{ end }}### Answer:\n"
    ),
    "alpaca": (
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "system" }}{{ $m.Content }}\n\n'
        '{{ else if eq $m.Role "user" }}'
        f"{{{{ if lt $i 2 }}}}{_ALPACA}\n\n{{{{ end }}}}### Instruction:\n{{{{ $m.Content }}}}\n\n"
        "{{ else }}### Response:\n{{ $m.Content }}<EOS>\n\n{{ end }}{{ end }}### Response:\n"
    ),
    "llama2": (
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}[INST] '
        f"{{{{ if {_SYSTEM_FIRST} }}}}<<SYS>>\n{{{{ {_SYSTEM} }}}}\n<</SYS>>\n\n{{{{ end }}}}"
        '{{ $m.Content }} [/INST]{{ else if eq $m.Role "assistant" }} {{ $m.Content }} <EOS>'
        "{{ end }}{{ end }}"
    ),
    "chatml": (
        "{{ range .Messages }}<|im_start|>{{ .Role }}\n{{ .Content }}<|im_end|>\n{{ end }}"
        "<|im_start|>assistant\n"
    ),
    "vicuna": (
        f'{{{{ if eq (index .Messages 0).Role "system" }}}}{{{{ with {_SYSTEM} }}}}{{{{ . }}}} '
        f"{{{{ end }}}}{{{{ else }}}}{_VICUNA} {{{{ end }}}}"
        '{{ range .Messages }}{{ if eq .Role "user" }}USER: {{ .Content }} '
        '{{ else if eq .Role "assistant" }}ASSISTANT: {{ .Content }}<EOS>{{ end }}{{ end }}'
        "ASSISTANT:"
    ),
    "llama3": (
        "{{ range .Messages }}<|start_header_id|>{{ .Role }}<|end_header_id|>\n\n"
        "{{ .Content }}<|eot_id|>{{ end }}<|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "gemma": (
        '{{ range $i, $m := .Messages }}{{ if ne $m.Role "system" }}<start_of_turn>'
        '{{ if eq $m.Role "assistant" }}model{{ else }}{{ $m.Role }}{{ end }}\n'
        f"{{{{ if {_SYSTEM_FIRST} }}}}{{{{ {_SYSTEM} }}}}\n\n{{{{ end }}}}"
        "{{ $m.Content }}<end_of_turn>\n{{ end }}{{ end }}<start_of_turn>model\n"
    ),
    "phi3": (
        "{{ range .Messages }}<|{{ .Role }}|>\n{{ .Content }}<|end|>\n{{ end }}<|assistant|>\n"
    ),
    "mistral": (
        '{{ range $i, $m := .Messages }}{{ if eq $m.Role "user" }}[INST] '
        f"{{{{ if {_SYSTEM_FIRST} }}}}{{{{ {_SYSTEM} }}}}\n\n{{{{ end }}}}"
        '{{ $m.Content }}[/INST]{{ else if eq $m.Role "assistant" }} {{ $m.Content }}<EOS>'
        "{{ end }}{{ end }}"
    ),
}  # fmt: skip

_SYSTEM_MARK = "SYSTEM MARK"
_TALK = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]
_QUESTIONS = (_TALK[:1], [*_TALK, {"role": "user", "content": "three"}])


@dataclass(frozen=True)
class Known:
    """A built-in template. system: the message that it puts before conversations without one."""

    name: str
    system: str | None


def known_template(tokenizer: Any) -> Known | None:
    """Return the built-in template that renders as the tokenizer's own; None if none does."""
    for name, source in BUILT_IN.items():
        for system in (None, _own_system(tokenizer, source)):
            start = [{"role": "system", "content": system}] if system else []
            asked = [(list(each), [*start, *each]) for each in _QUESTIONS]
            if all(_own(tokenizer, own) == _rendered(tokenizer, one, source) for own, one in asked):
                return Known(name, system)
    return None


def _own_system(tokenizer: Any, source: str) -> str | None:
    """Return the system message that the tokenizer's template adds by itself, if it is as
    `source`."""
    marked = [{"role": "system", "content": _SYSTEM_MARK}, *_QUESTIONS[0]]
    before, mark, after = (_rendered(tokenizer, marked, source) or "").partition(_SYSTEM_MARK)
    found = _own(tokenizer, _QUESTIONS[0]) or ""
    if not mark or not (found.startswith(before) and found.endswith(after)):
        return None
    return found[len(before) : len(found) - len(after)] or None


def _own(tokenizer: Any, messages: Sequence[dict[str, str]]) -> str | None:
    return _rendered(tokenizer, messages, None)


def _rendered(tokenizer: Any, messages: Sequence[dict[str, str]], source: str | None) -> str | None:
    """Return a prompt without its BOS, which llama.cpp adds itself; None if the template fails."""
    try:
        text = tokenizer.apply_chat_template(
            list(messages), chat_template=source, tokenize=False, add_generation_prompt=True
        )
    except Exception:  # a template is a program
        return None
    return str(text).removeprefix(tokenizer.bos_token or "\0")


def modelfile(tokenizer: Any, weights: str, ends: Sequence[str], log: Any) -> str:
    """Return the Modelfile. weights: a file or folder beside it. ends: texts that end answers.

    Raises ModelError for a system prompt that the file cannot hold. `log` gets a note where the
    template is not a built-in one.
    """
    lines = [f"FROM {weights}"]
    known = known_template(tokenizer)
    if known is None:
        log(
            f"note: the chat template is none of the built-in ones, so {FILE} has no TEMPLATE: "
            "Ollama takes that of the GGUF file if it knows it; compare its prompts with yours, "
            "or write one: https://docs.ollama.com/template"
        )
    else:
        source = GO[known.name].replace(EOS, tokenizer.eos_token or "")
        lines.append(f'TEMPLATE """{source}"""')
        if known.system:
            if '"""' in known.system:
                raise ModelError(f'{FILE}: the system prompt holds """, which ends texts there')
            lines.append(f'SYSTEM """{known.system}"""')
    lines += [f'PARAMETER stop "{each}"' for each in dict.fromkeys(ends) if '"' not in each]
    return "\n".join(lines) + "\n"


def write(folder: Path, tokenizer: Any, weights: str, ends: Sequence[str], log: Any) -> None:
    """Write the Modelfile of an exported folder."""
    files.write_whole(folder / FILE, modelfile(tokenizer, weights, ends, log))
