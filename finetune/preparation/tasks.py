"""Prompts that ask a model for new tasks like given ones, and the tasks in its answers."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from finetune.data.places import printable
from finetune.errors import DataError, UserError
from finetune.preparation.request import Slice

# Of a template that runs: what its expressions may raise.
FAILURES = (
    jinja2.TemplateError, ArithmeticError, AttributeError, LookupError, RecursionError, TypeError,
    ValueError,
)  # fmt: skip
TEMPLATE = Path(__file__).with_suffix(".jinja")
# A label begins a line; models put numbers, # and ** around it.
_LABEL = re.compile(
    r"^[\s#*>\-]*(?:(?:task|example)?[ #]*\d+[.):]?[ \t*]*)?[#*_]*(question|answer)[ \t]*\d*[*_]*:"
    r"[*_]*",
    re.IGNORECASE | re.MULTILINE,
)
# What announces the next task: a rule, "Task 3:" or "3."
_HEADING = (
    r"\n\s*(?:[-=#*_ ]+|[#* ]*(?:task|example)[ #]*\d+[.):]*[* ]*|[#* ]*{number}[.):]+[* ]*)$"
)


class Task(NamedTuple):
    question: str
    answer: str
    wrong: str = ""
    """A wrong answer, where one is known."""


class Prompts:
    """Write prompts by a Jinja template of the user's, or ours."""

    def __init__(self, path: str | None, count: int, with_answers: bool) -> None:
        self._count, self._with_answers = count, with_answers
        self._shown = printable(str(path or TEMPLATE))
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
        )
        try:
            self._template = environment.from_string(Path(path or TEMPLATE).read_text("utf-8"))
        except OSError as exc:
            raise UserError(f"--template: {self._shown}: {exc.strerror}; name a file") from exc
        except UnicodeDecodeError as exc:
            raise UserError(f"--template: {self._shown}: is not UTF-8") from exc
        except jinja2.TemplateSyntaxError as exc:
            raise UserError(f"--template: {self._shown}:{exc.lineno}: {exc.message}") from exc
        except RecursionError as exc:
            raise UserError(f"--template: {self._shown}: is nested too deeply") from exc

    def write(self, examples: Sequence[Task], slice: Slice | None) -> str:
        """Return a prompt. Raise UserError for a template that fails."""
        values = {"examples": examples, "count": self._count, "answers": self._with_answers}
        try:
            return self._template.render(**values, slice=slice).strip()
        except FAILURES as exc:
            known = ", ".join([*values, "slice"])
            raise UserError(f"--template: {self._shown}: {exc}; it gets {known}") from exc


def read(text: str, with_answers: bool, is_cut: bool) -> list[Task]:
    """Return the tasks of an answer, without the last one of an answer that was cut.

    Raises DataError for an answer without any.
    """
    labels = list(_LABEL.finditer(text))
    pieces, questions = [], 0
    for number, label in enumerate(labels):
        content = text[label.end() :]
        questions += label[1].lower() == "question"
        if number + 1 < len(labels):
            heading = _HEADING.format(number=questions + 1)
            content = text[label.end() : labels[number + 1].start()].rstrip()
            content = re.sub(heading, "", content, flags=re.IGNORECASE)
        pieces.append((label[1].lower(), content.strip()))
    if is_cut and pieces:
        pieces.pop()
    found = []
    for number, (kind, content) in enumerate(pieces):
        follows = pieces[number + 1] if number + 1 < len(pieces) else ("", "")
        if kind == "question" and not with_answers:
            found.append(Task(content, ""))
        elif kind == "question" and follows[0] == "answer":
            found.append(Task(content, follows[1]))
    if not found:
        raise DataError("holds no task")
    return found
