"""The models of an evaluation: the base, the tuned one, and others beside them."""

import argparse
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from finetune.config import paths
from finetune.config.base import model_in, require_model
from finetune.errors import UserError
from finetune.evaluation import prompting
from finetune.evaluation.held_out import note
from finetune.evaluation.identity import identity_of
from finetune.evaluation.results import BASE, TUNED
from finetune.export.load import moved, require_base
from finetune.generation.completions import Prompt
from finetune.generation.remote import is_remote

_NAMED = re.compile(r"([\w .+-]{1,40})=(.+)", re.DOTALL)


@dataclass(frozen=True)
class Candidate:
    """A column of the table: a model, and how its prompts differ from those of the rows.

    name: as in tables and files. model: a folder, a Hub id, or MODEL@URL. base: of a moved adapter,
    where its base is now. option: which option named it. examples: put before every prompt.
    context: the column of text to put before the question. revision: of a Hub id.
    """

    name: str
    model: str
    base: str | None = None
    option: str = "--also"
    examples: tuple[Prompt, ...] = ()
    context: str | None = None
    revision: str | None = None

    @property
    def identity(self) -> str:
        return identity_of(self.model, self.base, self.revision)

    @property
    def keeps_template(self) -> bool:
        """Whether it is asked by a chat template of its own, if it has one."""
        return self.option == "--also"

    def change(self, prompts: Sequence[Prompt]) -> list[Prompt]:
        """Return the prompts of the rows as this candidate is asked them."""
        changed = list(prompts)
        if self.context is not None:
            changed = prompting.with_context(changed, self.context)
        if self.examples:
            changed = prompting.with_examples(changed, self.examples)
        return changed


def other_argument(text: str) -> tuple[str | None, str]:
    """Parse MODEL or NAME=MODEL of --also; a type for argparse."""
    found = _NAMED.fullmatch(text)
    if found and not os.path.exists(text):
        if found[1].strip() in ("", BASE, TUNED):
            raise argparse.ArgumentTypeError(f"{text!r}: base and tuned are taken; choose another")
        return found[1].strip(), model_in(paths.argument(found[2]))
    return None, model_in(paths.argument(text))


def candidates(
    base: str, tuned: str, others: Sequence[tuple[str | None, str]], revision: str | None = None
) -> list[Candidate]:
    """Return the models in the order of the table. Raise ModelError for one that cannot be read.

    revision: of a base on the Hub.
    """
    found = [
        Candidate(BASE, base, option="--base", revision=revision),
        Candidate(TUNED, tuned, option="--tuned"),
    ]
    for name, model in others:
        found.append(Candidate(name or _short_name(model), model))
    names = [each.name for each in found]
    if twice := [name for name in names if names.count(name) > 1]:
        raise UserError(
            f"--also: two models are called {twice[0]!r}; name one of them, as "
            f"--also other={found[-1].model}"
        )
    for each in found:
        if not is_remote(each.model):
            require_model(each.model, each.option)
    moved_base = moved(tuned, base)
    if same_model(base, tuned):
        note("--base and --tuned are the same model")
    elif moved_base:
        require_base(base)
        found[1] = Candidate(TUNED, tuned, moved_base, "--tuned")
    return found


def prompted(
    found: Sequence[Candidate], examples: Sequence[Prompt], context: str | None
) -> list[Candidate]:
    """Add the base with examples, and base and tuned model with context, to the candidates."""
    base, tuned = found[:2]
    added = list(found)
    if examples:
        name = f"base {len(examples)}-shot"
        added.append(replace(base, name=name, examples=tuple(examples)))
    if context is not None:
        added += [
            replace(each, name=f"{each.name} with context", context=context)
            for each in (base, tuned)
        ]
    return added


def same_model(one: str, other: str) -> bool:
    """Return whether two names are one model: the same folder, or one name on the Hub."""
    if os.path.exists(one) and os.path.exists(other):
        return os.path.samefile(one, other)
    return one == other


def _short_name(model: str) -> str:
    """Return the name of a run, of the folder or Hub id, or of a server's model."""
    if is_remote(model):
        return model.partition("@")[0].rpartition("/")[2]
    path = Path(model)
    return path.parent.name if path.name == "model" and path.parent.name else path.name
