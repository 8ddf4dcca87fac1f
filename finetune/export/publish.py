"""Save, verify, and only then replace what was there; and the rehearsal of it before training."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finetune import failures
from finetune.config.base import (
    decides_what_opens,
)
from finetune.data.templates import Template
from finetune.data.tokens import tokenizer_fingerprint
from finetune.errors import ExportError, ModelError, Outage
from finetune.export.load import load_tokenizer
from finetune.export.save import (
    Base,
    fetched_folder,
    require_generation_config,
    save,
    save_tokenizer,
    with_template,
)
from finetune.export.verify import trained, verify, verify_prompt


class Writing:
    """A model on its way to `target`: saved next to it, verified, and only then put there; what was
    there before stays until then.

    Two calls, so that between them the model that was trained, its optimizer and its gradients can
    go: opening the export takes their room, on a GPU too, where a quantised base is opened.
    """

    def __init__(
        self, target: Path, template: Template | None, system_prompt: str | None, base: Base
    ) -> None:
        self.target, self.template, self.system_prompt, self.base = (
            target,
            template,
            system_prompt,
            base,
        )
        self.folder = target.with_name(f".writing-{target.name}")

    def save(
        self, model: Any, weights: dict[str, torch.Tensor], logits: torch.Tensor, tokenizer: Any, *,
        precision: str, device: torch.device, probe_dtype: torch.dtype | None,
    ) -> None:  # fmt: skip
        with self._writing():
            save(
                model, weights, tokenizer, self.template, self.folder, self.system_prompt, self.base
            )
        self._was = trained(
            model, weights, logits, tokenizer, self.template, system_prompt=self.system_prompt,
            precision=precision, device=device, probe_dtype=probe_dtype,
        )  # fmt: skip

    def publish(self) -> list[str]:
        """The files of the export, verified and in their place. Raises ExportError; what was saved
        then stays next to the target.
        """
        with self._writing():
            verify(
                self.folder, self._was, self.template,
                trust_remote_code=self.base.trust_remote_code, system_prompt=self.system_prompt,
            )  # fmt: skip
            names = sorted(
                p.relative_to(self.folder).as_posix() for p in self.folder.rglob("*") if p.is_file()
            )
            publish(self.folder, self.target)
        return names

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Give back the space of what is half written: outcome.json needs some to tell of it.
        Raises Outage.
        """
        try:
            with failures.writing(self.target):
                yield
        except Outage:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise


def publish(folder: Path, target: Path) -> None:
    """Put a verified folder in its place, at once; what was there is replaced only now, but for
    what a user had added.
    """
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        _move_additions(old, target)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(folder, target)
    _move_additions(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _move_additions(old: Path, new: Path) -> None:
    """Move the files of one folder into another that has none of their names; those that would
    change what opens stay.
    """
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        if (
            not decides_what_opens(name)
            and (path.is_file() or path.is_symlink())
            and not os.path.lexists(new / name)
        ):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, new / name)


def rehearse(
    tokenizer: Any,
    model_config: Any,
    base: Base,
    template: Template | None,
    system_prompt: str | None,
) -> None:
    """Raise ModelError for what would let the export fail after all the training: tokenizer,
    template or generation config.

    What a base on the Hub has in addition to its weights is fetched now: in days the Hub may not
    answer.
    """
    fetched_folder(base, local_files_only=False)
    with tempfile.TemporaryDirectory() as name:
        model_config.save_pretrained(name)  # its model_type decides which class opens the tokenizer
        save_tokenizer(with_template(tokenizer, template, system_prompt), name, base)
        again = load_tokenizer(name, base.trust_remote_code)
        if template is not None:
            template.stop_token()
            try:
                verify_prompt(Path("data.template"), again, template, system_prompt)
            except ExportError as exc:
                raise ModelError(str(exc)) from exc
        if tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer):
            raise ModelError(
                f"model.tokenizer: saved with a model of type {model_config.model_type} it opens "
                f"as {type(again).__name__}, "
                "which gives other tokens; take the tokenizer of a model of this type, or another "
                "model_type"
            )
    if base.path and os.path.lexists(os.path.join(base.path, "generation_config.json")):
        require_generation_config(base.path, model_config)
