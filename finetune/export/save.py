"""Save a trained model: weights, tokenizer with its template, and files of the base."""

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig
from transformers.utils import cached_file

from finetune import files
from finetune.config.base import is_model_or_adapter
from finetune.data.control_tokens import uses_bos
from finetune.data.conversations import Message
from finetune.data.templates import QUESTION, Template
from finetune.errors import ModelError
from finetune.models import adapters, base_identity
from finetune.models.embeddings import embedding_and_head


@dataclass(frozen=True)
class Base:
    """Where a model was loaded from, whose further files go into the export."""

    path: str | None
    revision: str | None = None
    trust_remote_code: bool = False


def save(
    model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, template: Template | None,
    folder: Path, system_prompt: str | None = None, base: Base | None = None,
    max_shard_size: str | None = None,
) -> None:  # fmt: skip
    """Write model and tokenizer into a fresh `folder`, without changing the arguments.

    `weights`: whole, on the CPU. The template becomes the tokenizer's chat template, and the
    generation config gets every token that ends an answer. Copies what a user needs of `base`.
    `max_shard_size`: of a file of weights, such as 2GB; None: what transformers takes.
    """
    shutil.rmtree(folder, ignore_errors=True)
    is_adapter = adapters.are_in(model)
    # Extended embeddings are in modules_to_save; peft would save them a second time for their size.
    own: dict[str, Any] = {"save_embedding_layers": False} if is_adapter else {}
    own |= {"max_shard_size": max_shard_size} if max_shard_size else {}
    with _generating(model, generation(model, tokenizer, template), folder):
        # A copy of the dict, which transformers empties.
        model.save_pretrained(folder, state_dict=dict(weights), **own)
    if not is_adapter:
        config = copy.deepcopy(model.config)
        config.dtype = embedding_dtype(model, weights)  # the model may hold 16-bit copies
        if not _may_be_tied(model, weights):
            for part in (config, config.get_text_config()):
                part.tie_word_embeddings = False
        config.save_pretrained(folder)
    save_tokenizer(with_template(tokenizer, template, system_prompt), folder, base)
    if is_adapter:
        (folder / base_identity.FILE).write_text(json.dumps(model.base_record, indent=1))
        (folder / "README.md").unlink(missing_ok=True)  # peft's empty template
    elif base is not None:
        _copy_files_of(base, folder)
    written = [path for path in folder.rglob("*") if path.is_file()]
    files.follow_umask(*written)
    for path in written:
        with path.open("rb") as handle:
            os.fsync(handle.fileno())


# Files copied from a base besides weights, config and tokenizer: settings for images and audio, and
# the terms of use. Its README describes the base and not the tuned model.
SETTINGS = re.compile(r"[^/]*processor_config\.json")
TERMS = re.compile(
    r"(^|.*[-_. ])((un)?licen[sc]es?|copying|copyright|(third[-_. ]?party[-_. ]?)?notices?"
    r"|((acceptable|prohibited)[-_. ]?)?use[-_. ]?policy|terms([-_. ]of[-_. ]use)?|patents)"
    r"([-_. ].*|$)",
    re.IGNORECASE,
)
CODE = re.compile(r".*\.py|custom_generate/.*")  # copied only with model.trust_remote_code
# Never terms of use, whatever their name, and too large to download by mistake.
NO_TERMS = re.compile(
    r".*\.(py|json|jsonl|csv|tsv|safetensors|bin|gguf|onnx|pth?|ckpt|h5|msgpack|parquet"
    r"|zip|tar|gz)",
    re.IGNORECASE,
)
# The same as globs, for downloads from the Hub, which match a few more files.
_WORDS = ("licen", "copy", "notice", "policy", "terms", "patents")
TO_FETCH = ["*processor_config.json", "*.py", "custom_generate/*"]
TO_FETCH += ["*" + "".join(f"[{c}{c.upper()}]" for c in word) + "*" for word in _WORDS]
_LARGE = ("safetensors", "bin", "gguf", "onnx", "pt", "pth", "h5", "msgpack", "parquet")
NOT_TO_FETCH = [f"*.{ending}" for ending in _LARGE]


def _is_copied(name: str, trust_remote_code: bool) -> bool:
    """Return whether a file of a base, by its path in the folder, is copied into an export."""
    if re.search(r"(^|/)\.", name):  # hidden
        return False
    if CODE.fullmatch(name):
        return trust_remote_code
    has_terms = TERMS.fullmatch(name.split("/")[0]) and not NO_TERMS.fullmatch(name)
    return bool(SETTINGS.fullmatch(name) or has_terms)


def _copy_files_of(base: Base, folder: Path) -> None:
    source = fetched_folder(base, local_files_only=True)
    if source is None:
        return
    for path in sorted(source.rglob("*")):
        name = path.relative_to(source).as_posix()
        if not _is_copied(name, base.trust_remote_code) or not path.is_file():
            continue
        inner = [parent for parent in path.parents if source in parent.parents]
        is_of_another = any(is_model_or_adapter(parent) for parent in inner)  # a run in its base
        if not is_of_another and not (folder / name).exists():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, folder / name)


def fetched_folder(base: Base, local_files_only: bool) -> Path | None:
    """Return the folder of a base; of one on the Hub a folder of its small files, or None.

    Downloads them unless `local_files_only`.
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
    except Exception:  # without the Hub; loading weights and tokenizer reports that
        return None


def save_tokenizer(tokenizer: Any, folder: Path | str, base: Base | None) -> None:
    """Save a tokenizer with all vocabulary files that its class names.

    Classes with code from the Hub may not write all of theirs.
    """
    tokenizer.save_pretrained(folder)
    source = str(tokenizer.name_or_path or "")
    if not source:
        return
    revision = base.revision if base and source == base.path else None
    for name in sorted({name for name in type(tokenizer).vocab_files_names.values() if name}):
        target = Path(folder, name)
        if not target.exists() and (found := _local(source, name, revision)):
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(found, target)


def _local(source: str, name: str, revision: str | None) -> str | None:
    """Return the path of a file in a folder or in the Hub's cache; None if it is missing."""
    try:
        found: str | None = cached_file(source, name, revision=revision, local_files_only=True)
    except OSError:
        return None
    return found


def _may_be_tied(model: Any, weights: dict[str, torch.Tensor]) -> bool:
    """Return whether embedding and head hold the same values, as a config that ties them says.

    Also where that would tie other weights alone, as LUKE's of entities, which are saved once.
    """
    names = {id(p): name for name, p in model.named_parameters(remove_duplicate=False)}
    own = [names.get(id(module.weight), "") for module in embedding_and_head(model)]
    tied = getattr(model, "all_tied_weights_keys", None)
    if own and tied and own[-1] not in {*tied, *tied.values()}:
        return True
    held = [weight for name in own if (weight := weights.get(name)) is not None]
    return len(held) < 2 or torch.equal(held[0], held[1])


def with_template(tokenizer: Any, template: Template | None, system_prompt: str | None) -> Any:
    """Return a copy of the tokenizer with the template as its chat template; named ones stay."""
    exported = copy.deepcopy(tokenizer)
    if template is not None:
        source, named = chat_template(template, tokenizer, system_prompt), exported.chat_template
        exported.chat_template = {**named, "default": source} if isinstance(named, dict) else source
    return exported


def stop_tokens(config: GenerationConfig | None) -> int | list[int] | None:
    """Return the tokens that end an answer, as a generation config names them."""
    return None if config is None else config.eos_token_id


def embedding_dtype(model: Any, weights: dict[str, torch.Tensor]) -> torch.dtype:
    """Return the dtype of the embedding in `weights`, which stands for that of all weights."""
    embedding = model.get_input_embeddings().weight
    return next(weights[name].dtype for name, p in model.named_parameters() if p is embedding)


def chat_template(template: Template, tokenizer: Any, system_prompt: str | None = None) -> str:
    """Return the Jinja source to save: the template and all that training put before answers.

    It adds BOS, the system prompt, the template's arguments as defaults, and the opening of
    answers. Callers that pass `enable_thinking` get the template's own opening instead.
    """
    source = template.source
    system = [Message("system", system_prompt)] if system_prompt is not None else []
    messages = [*system, *QUESTION] if system else template.probe
    if uses_bos(tokenizer) and not template.prompt(messages).startswith(tokenizer.bos_token):
        source = "{{ bos_token }}" + source
    for name, value in template.arguments.items():
        default = f"{{% if {name} is not defined %}}{{% set {name} = {_literal(value)} %}}"
        source = default + "{% endif %}{{ '' }}" + source
    if template.opening and not template.learn_opening:
        source = (
            "{% set own_opening = enable_thinking is defined %}{{ '' }}"
            + source.removesuffix("\n")
            + "{%+ if add_generation_prompt and not own_opening %}{{ "
            + json.dumps(template.opening)
            + " }}{% endif %}"
        )
    if system_prompt is not None:
        message = json.dumps({"role": "system", "content": system_prompt}, ensure_ascii=False)
        source = (
            "{% if messages and messages[0]['role'] != 'system' %}{% set messages = "
            "[" + message + "] + messages %}{% endif %}" + source
        )
    return source


def _literal(value: Any) -> str:
    """Return a value of a type that JSON has as an expression of Jinja, which has no null."""
    if value is None:
        return "none"
    if isinstance(value, dict):
        entries = (f"{_literal(key)}: {_literal(each)}" for key, each in value.items())
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    return json.dumps(value, ensure_ascii=False)


@contextmanager
def _generating(model: Any, config: GenerationConfig | None, folder: Path) -> Iterator[None]:
    """Give a model this generation config inside the block, and save it behind it."""
    if config is None:
        yield
        return
    before, model.generation_config = model.generation_config, config
    try:
        yield
        config.save_pretrained(folder)  # peft omits it, and with it the token that ends an answer
    finally:
        model.generation_config = before


def generation(model: Any, tokenizer: Any, template: Template | None) -> GenerationConfig | None:
    """Return the generation config to save: it stops at EOS and at the token that ends a turn.

    None for encoders, which do not generate.
    """
    if not hasattr(model, "generation_config"):
        return None
    config: GenerationConfig = copy.deepcopy(model.generation_config)
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop = template.stop_token() if template is not None else None
    ends = [tokenizer.convert_tokens_to_ids(stop) if stop else None, tokenizer.eos_token_id, *known]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = tokenizer.pad_token_id
    _enable_sampling_if_needed(config)
    return config


def require_generation_config(path: str, model_config: Any) -> None:
    """Raise ModelError if a generation config cannot be saved again, or EOS is not an id."""
    try:
        config = GenerationConfig.from_pretrained(path)
        _enable_sampling_if_needed(config)
        config.validate(strict=True)
        # Only the tokens that end an answer: the pad token is replaced anyway.
        size, given = model_config.get_text_config().vocab_size, config.eos_token_id
        for token in given if isinstance(given, list) else [] if given is None else [given]:
            if type(token) is not int or not 0 <= token < size:
                raise ValueError(
                    f"eos_token_id is {given!r}, and ids are whole numbers from 0 to {size - 1}"
                )
    except Exception as exc:  # any error would otherwise stop the export, after training
        reason = " ".join(str(exc).split())[:200]
        raise ModelError(
            f"model {path!r}: its generation_config.json cannot be saved again: {reason}; correct "
            "that file"
        ) from exc


def _enable_sampling_if_needed(config: GenerationConfig) -> None:
    """Set do_sample where a temperature lacks it: transformers refuses to save such configs."""
    try:
        config.validate(strict=True)
    except ValueError:
        config.do_sample = True
