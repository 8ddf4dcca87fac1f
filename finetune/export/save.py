"""A trained model -> a folder: weights, tokenizer with its template, and what of the base belongs
beside them.
"""

import copy
import json
import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import cached_file

from finetune import files
from finetune.config.base import (
    is_model_or_adapter,
)
from finetune.data.rows import Message
from finetune.data.templates import QUESTION, Template
from finetune.data.tokens import uses_bos
from finetune.errors import ModelError
from finetune.models import adapters, base_identity


@dataclass(frozen=True)
class Base:
    """Where a model came from: what its folder holds in addition to the weights goes into the
    export.
    """

    path: str | None
    revision: str | None = None
    trust_remote_code: bool = False


def save(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, template: Template | None, folder: Path,
    system_prompt: str | None = None, base: Base | None = None,
) -> None:  # fmt: skip
    """Write model (`weights` whole, on the CPU) and tokenizer into a fresh `folder`. What it is
    given stays as it is.

    The tokenizer carries the template as its chat template, and the generation config every token
    that ends an answer. What else `base` has that a user of the model needs comes along.
    """
    shutil.rmtree(folder, ignore_errors=True)
    is_adapter = adapters.are_in(model)
    # Resized embeddings are saved because they train (modules_to_save), not because peft finds them
    # to be of another size.
    own = {"save_embedding_layers": False} if is_adapter else {}
    before, model.generation_config = (
        model.generation_config,
        generation(model, tokenizer, template),
    )
    try:
        model.save_pretrained(
            folder, state_dict=dict(weights), **own
        )  # a copy: transformers empties the mapping
        model.generation_config.save_pretrained(
            folder
        )  # peft leaves it out, and with it the token that ends an answer
    finally:
        model.generation_config = before
    if not is_adapter:
        config = copy.deepcopy(model.config)
        config.dtype = embedding_dtype(
            model, weights
        )  # an engine may have trained on 16-bit copies of what is saved
        if not _may_be_tied(model, weights):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        config.save_pretrained(folder)
    save_tokenizer(with_template(tokenizer, template, system_prompt), folder, base)
    if is_adapter:
        (folder / base_identity.FILE).write_text(json.dumps(model.base_record, indent=1))
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty form
    elif base is not None:
        _bring_along(base, folder)
    written = [path for path in folder.rglob("*") if path.is_file()]
    files.follow_umask(*written)
    for path in written:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


# What a base may have in addition to weights, config and tokenizer: how to prepare pictures and
# sounds, and on which terms it was given. Its README describes the base, not what it has become.
SETTINGS = re.compile(r"[^/]*processor_config\.json")
TERMS = re.compile(
    r"(^|.*[-_. ])((un)?licen[sc]es?|copying|copyright|(third[-_. ]?party[-_. ]?)?notices?|((acceptable|prohibited)[-_. ]?)?use[-_. ]?policy"
    r"|terms([-_. ]of[-_. ]use)?|patents)([-_. ].*|$)",
    re.IGNORECASE,
)
CODE = re.compile(r".*\.py|custom_generate/.*")  # what model.trust_remote_code allows
# Never terms, whatever they are called, and too large to be fetched by mistake.
NO_TERMS = re.compile(
    r".*\.(py|json|jsonl|csv|tsv|safetensors|bin|gguf|onnx|pth?|ckpt|h5|msgpack|parquet|zip|tar|gz)",
    re.IGNORECASE,
)
# As globs, for the Hub, which fetches a little more than comes along.
TO_FETCH = [
    "*processor_config.json", "*.py", "custom_generate/*",
    *("*" + "".join(f"[{c}{c.upper()}]" for c in word) + "*" for word in ("licen", "copy", "notice", "policy", "terms", "patents")),
]  # fmt: skip
NOT_TO_FETCH = [
    "*.safetensors",
    "*.bin",
    "*.gguf",
    "*.onnx",
    "*.pt",
    "*.pth",
    "*.h5",
    "*.msgpack",
    "*.parquet",
]


def _comes_along(name: str, trust_remote_code: bool) -> bool:
    """Whether a file of a base, by its path within the folder, belongs into an export. Hidden ones
    never do.
    """
    if re.search(r"(^|/)\.", name):
        return False
    if CODE.fullmatch(name):
        return trust_remote_code
    return bool(
        SETTINGS.fullmatch(name)
        or (TERMS.fullmatch(name.split("/")[0]) and not NO_TERMS.fullmatch(name))
    )


def _bring_along(base: Base, folder: Path) -> None:
    source = fetched_folder(base, local_files_only=True)
    if source is None:
        return
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        wanted = (
            _comes_along(name, base.trust_remote_code)
            and path.is_file()
            and not (folder / name).exists()
        )
        inner = [parent for parent in path.parents if source in parent.parents]
        if wanted and not any(
            is_model_or_adapter(parent) for parent in inner
        ):  # such as runs in the folder of their base
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def fetched_folder(base: Base, local_files_only: bool) -> Path | None:
    """The folder of a base; of one on the Hub the small files of it, fetched unless
    `local_files_only`. None where there is none.
    """
    if base.path is None or os.path.isdir(base.path):
        return Path(base.path) if base.path else None
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                base.path,
                revision=base.revision,
                allow_patterns=TO_FETCH,
                ignore_patterns=NOT_TO_FETCH,
                local_files_only=local_files_only,
            )
        )
    except (
        Exception
    ):  # a Hub that does not answer: weights and tokenizer, which are needed, say so by themselves
        return None


def save_tokenizer(tokenizer: Any, folder: Path | str, base: Base | None) -> None:
    """Save a tokenizer with every file of a vocabulary that its class names: classes of a base's
    own may not write all of theirs.
    """
    tokenizer.save_pretrained(folder)
    source = str(tokenizer.name_or_path or "")
    revision = base.revision if base and source == base.path else None
    for name in (
        sorted({name for name in type(tokenizer).vocab_files_names.values() if name})
        if source
        else ()
    ):
        target = Path(folder, name)
        if not target.exists() and (found := _held(source, name, revision)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)


def _held(source: str, name: str, revision: str | None) -> str | None:
    """The path of a file of a folder, or of a repository of the Hub that was read before; None
    where it has no such file.
    """
    try:
        found: str | None = cached_file(source, name, revision=revision, local_files_only=True)
    except OSError:
        return None
    return found


def _may_be_tied(model: Any, weights: dict[str, torch.Tensor]) -> bool:
    """Whether embedding and head hold the same values, so that what the config says of them can be
    true.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    found = [weights.get(names.get(id(getattr(end, "weight", None)), "")) for end in ends]
    return found[0] is None or found[1] is None or torch.equal(found[0], found[1])


def with_template(tokenizer: Any, template: Template | None, system_prompt: str | None) -> Any:
    """A copy of the tokenizer with the template as its chat template; others that it has by name
    stay.
    """
    exported = copy.deepcopy(tokenizer)
    if template is not None:
        source, named = chat_template(template, tokenizer, system_prompt), exported.chat_template
        exported.chat_template = {**named, "default": source} if isinstance(named, dict) else source
    return exported


def embedding_dtype(model: Any, weights: dict[str, torch.Tensor]) -> torch.dtype:
    """The dtype of the embedding in `weights`, which that of all others follows."""
    embedding = model.get_input_embeddings().weight
    return next(weights[name].dtype for name, p in model.named_parameters() if p is embedding)


def chat_template(template: Template, tokenizer: Any, system_prompt: str | None = None) -> str:
    """The Jinja source to save, which renders what training put before answers and the template
    does not.

    These are the BOS, the system prompt, and the opening of answers. Callers that pass
    `enable_thinking` get the opening that the template itself has for it.
    """
    source = template.source
    system = [Message("system", system_prompt)] if system_prompt is not None else []
    messages = [*system, *QUESTION] if system else template.probe
    if uses_bos(tokenizer) and not template.prompt(messages).startswith(tokenizer.bos_token):
        source = "{{ bos_token }}" + source
    if template.opening and not template.learn_opening:
        source = (
            "{% set own_opening = enable_thinking is defined %}{{ '' }}" + source.removesuffix("\n")
            + "{%+ if add_generation_prompt and not own_opening %}{{ " + json.dumps(template.opening) + " }}{% endif %}"
        )  # fmt: skip
    if system_prompt is not None:
        message = json.dumps({"role": "system", "content": system_prompt}, ensure_ascii=False)
        source = (
            "{% if messages and messages[0]['role'] != 'system' %}{% set messages = "
            "[" + message + "] + messages %}{% endif %}"
            + source
        )  # fmt: skip
    return source


def generation(model: Any, tokenizer: Any, template: Template | None) -> GenerationConfig:
    """The generation config to save: it stops at EOS and at the token that ends a turn, and pads
    with the pad token.
    """
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop = template.stop_token() if template is not None else None
    ends = [tokenizer.convert_tokens_to_ids(stop) if stop else None, tokenizer.eos_token_id, *known]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = tokenizer.pad_token_id
    _sample_if_it_says_how(config)
    return config


def require_generation_config(path: str, model_config: Any) -> None:
    """Raise ModelError for a generation config that cannot be saved again, or whose end tokens are
    not ids of the vocabulary.
    """
    try:
        config = GenerationConfig.from_pretrained(path)
        _sample_if_it_says_how(config)
        config.validate(strict=True)
        # Only those that end an answer: the pad token is replaced anyway.
        size, given = model_config.get_text_config().vocab_size, config.eos_token_id
        for token in given if isinstance(given, list) else [] if given is None else [given]:
            if type(token) is not int or not 0 <= token < size:
                raise ValueError(
                    f"eos_token_id is {given!r}, and ids are whole numbers from 0 to {size - 1}"
                )
    except (
        Exception
    ) as exc:  # any error here would otherwise stop the export, after all the training
        reason = " ".join(str(exc).split())[:200]
        raise ModelError(
            f"model {path!r}: its generation_config.json cannot be saved again: {reason}; correct "
            "it"
        ) from exc


def _sample_if_it_says_how(config: GenerationConfig) -> None:
    """Published models give a temperature and forget do_sample; transformers saves no such config
    that was changed.
    """
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
