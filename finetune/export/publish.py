"""Save and verify an export, then put it in place; rehearse this before training."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from finetune import failures
from finetune.config.base import decides_what_opens
from finetune.data.templates import Template
from finetune.data.tokens import tokenizer_fingerprint
from finetune.errors import ExportError, ModelError, Outage
from finetune.export.load import load_tokenizer
from finetune.export.save import (
    Base,
    embedding_dtype,
    fetched_folder,
    generation,
    require_generation_config,
    save,
    save_tokenizer,
    stop_tokens,
    with_template,
)
from finetune.export.verify import Trained, verify, verify_prompt
from finetune.models import adapters
from finetune.models.document_scores import Scored


@contextmanager
def staged(target: Path) -> Iterator[Path]:
    """Give a folder next to `target`, which takes its place once the block has ended well."""
    folder = target.with_name(f".writing-{target.name}")
    shutil.rmtree(folder, ignore_errors=True)
    try:
        yield folder
        publish(folder, target)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # `publish` has moved it, if it succeeded


class Writing:
    """Save a model next to `target`, then verify it and replace `target`.

    `save` and `publish` are two calls, so that the caller frees the trained model, its optimizer
    and its gradients in between: opening the export needs their memory, also on a GPU if the base
    is quantised.
    """

    def __init__(
        self, target: Path, template: Template | None, system_prompt: str | None, base: Base
    ) -> None:
        self.target, self.template = target, template
        self.system_prompt, self.base = system_prompt, base
        self.folder = target.with_name(f".writing-{target.name}")

    def save(
        self, model: Any, weights: dict[str, torch.Tensor], logits: torch.Tensor, tokenizer: Any, *,
        precision: str, device: torch.device, probe_dtype: torch.dtype | None,
        scored: Scored | None = None,
    ) -> None:  # fmt: skip
        """Save the model, whose weights may be sharded, with whole `weights`.

        The rest is what `publish` compares with: see `Trained`.
        """
        template, system_prompt = self.template, self.system_prompt
        with self._writing():
            save(model, weights, tokenizer, template, self.folder, system_prompt, self.base)
        is_adapter = adapters.are_in(model)
        self._trained = Trained(
            weights, logits, device,
            getattr(torch, model.base_record["dtype"])
            if is_adapter else embedding_dtype(model, weights),
            probe_dtype, precision, is_adapter,
            stop_tokens(generation(model, tokenizer, template)),
            with_template(tokenizer, template, system_prompt), scored,
        )  # fmt: skip

    def publish(self) -> list[str]:
        """Verify the export, put it in place and return its files.

        Raises ExportError; the saved folder then stays next to the target.
        """
        with self._writing():
            verify(
                self.folder,
                self._trained,
                self.template,
                trust_remote_code=self.base.trust_remote_code,
                system_prompt=self.system_prompt,
            )
            saved = [path for path in self.folder.rglob("*") if path.is_file()]
            names = sorted(path.relative_to(self.folder).as_posix() for path in saved)
            publish(self.folder, self.target)
        return names

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """On an Outage, delete what is half written: outcome.json needs the space."""
        try:
            with failures.writing(self.target):
                yield
        except Outage:
            shutil.rmtree(self.folder, ignore_errors=True)
            raise


def publish(folder: Path, target: Path) -> None:
    """Rename a verified folder to `target`, and keep the files that a user had added there."""
    old = target.with_name(f".old-{target.name}")
    if target.exists():
        _move_additions(old, target)
        shutil.rmtree(old, ignore_errors=True)
        os.rename(target, old)
    os.rename(folder, target)
    _move_additions(old, target)
    shutil.rmtree(old, ignore_errors=True)


def _move_additions(old: Path, new: Path) -> None:
    """Move the files that `new` lacks from `old`, except those that would change what opens."""
    for path in sorted(old.rglob("*")):
        name = path.relative_to(old).as_posix()
        is_addition = not decides_what_opens(name) and not os.path.lexists(new / name)
        if is_addition and (path.is_file() or path.is_symlink()):
            (new / name).parent.mkdir(parents=True, exist_ok=True)
            os.rename(path, new / name)


def rehearse(
    tokenizer: Any,
    model_config: Any,
    base: Base,
    template: Template | None,
    system_prompt: str | None,
) -> None:
    """Raise ModelError if tokenizer, template or generation config would make the export fail.

    Downloads now what the export copies from a base on the Hub, which may not answer days later.
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
                f"as {type(again).__name__}, which gives other tokens; take the tokenizer of a "
                "model of this type, or another model_type"
            )
    if base.path and os.path.lexists(os.path.join(base.path, "generation_config.json")):
        require_generation_config(base.path, model_config)
