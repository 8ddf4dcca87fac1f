"""A teacher before its weights are loaded: whether it fits the model, its tokens and batches."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from finetune.config import Config, Full, Model, Quantized, base, quantized
from finetune.errors import ConfigError, ModelError
from finetune.models import attention_choice, families, load, parameters

KEY = "objective.teacher"


@dataclass(frozen=True)
class Teacher:
    """config: of a run that would start from the teacher's weights, which may be quantised."""

    config: Config
    model_config: Any
    tokenizer: Any
    attention: str
    num_parameters: int


def prepare(
    config: Config, tokenizer: Any, attention: str, device: torch.device, precision: str,
    num_context: int = 1, name: str = KEY,
) -> Teacher:  # fmt: skip
    """Return the teacher of a config, without weights. Raises ModelError, ConfigError.

    `tokenizer`, `attention`: of the model that learns. `num_context`: processes that share a
    sequence. `name`: of what names the teacher, in messages.
    """
    wanted: Any = config.objective
    model = _section(wanted, precision)
    with named(name):
        if problem := base.name_problem(model.path) or _folder_problem(str(model.path)):
            raise ModelError(problem)
        about = load.load_config(model, config.objective.kind)
        adapter = _quantization(model.path, quantized.quantization(about.to_dict()), wanted)
        own = load.load_tokenizer(model)
        require_same_tokens(tokenizer, own)
        load.check_config_vocabulary(about, own, model)
        kernel = _attention(config, about, attention, device, precision, num_context)
        of_documents = attention_choice.is_padded(kernel)
        skeleton = load.skeleton(model, about, own, kernel if of_documents else "documents")
        load.check_shapes(skeleton)
        load.check_weights(skeleton, model)
    changed = config.model_copy(update={"model": model, "adapter": adapter})
    return Teacher(changed, about, own, kernel, parameters.count(skeleton)[1])


def _section(wanted: Any, precision: str) -> Model:
    """Return the section `model` of a run that starts from the teacher."""
    half = "bfloat16" if precision == "bf16" else "float32"  # torch has no fp16 in model.dtype
    dtype: Any = half if wanted.teacher_dtype == "auto" else wanted.teacher_dtype
    return Model(path=wanted.teacher, revision=wanted.teacher_revision, dtype=dtype)


def _quantization(name: str | None, saved: dict[str, Any] | None, wanted: Any) -> Full | Quantized:
    """Return how the weights are stored: as they are saved, or as objective.teacher_quantization.

    Raises ModelError, ConfigError.
    """
    given = wanted.teacher_quantization
    if saved is None:
        return Full() if given is None else Quantized(quantization=given)
    what = f"{name} is quantised already ({quantized.name_of(saved)})"
    if (form := quantized.form_of(saved)) is None:
        raise ModelError(
            f"{what}, and only quantisations of bitsandbytes can be loaded; give the teacher in 16 "
            "or 32 bits"
        )
    if given is not None:
        raise ConfigError(f"{KEY}_quantization: {given} would be ignored: {what}; remove it")
    return Quantized(**form)


def _folder_problem(path: str) -> str | None:
    return base.folder_problem(path, needs_weights=True) if os.path.exists(path) else None


@contextmanager
def named(key: str = KEY) -> Iterator[None]:
    """Name the teacher's setting in errors of what else loads the model that learns."""
    try:
        yield
    except (ModelError, ConfigError) as exc:
        what = str(exc).removeprefix("model.path: ")
        raise type(exc)(what if what.startswith(key) else f"{key}: {what}") from exc


def _attention(
    config: Config, about: Any, attention: str, device: torch.device, precision: str,
    num_context: int,
) -> str:  # fmt: skip
    """Choose the teacher's kernel, for the batches of the model that learns."""
    wanted = attention if attention_choice.is_padded(attention) else config.model.attention
    kernel = attention_choice.choose(
        wanted, families.model_class(about), about, device, precision, num_context
    )
    if attention_choice.is_padded(kernel) != attention_choice.is_padded(attention):
        raise ConfigError(
            f"{about.model_type} can only read padded batches ({kernel}), which the model that "
            f"learns has not ({attention}); set model.attention to {kernel}"
        )
    return kernel


def require_rows(model_config: Any, teacher: Teacher) -> None:
    """Raise ModelError if a model could sample ids that its teacher has no embedding of."""
    mine, its = (each.get_text_config().vocab_size for each in (model_config, teacher.model_config))
    if its < mine:
        raise ModelError(
            f"{KEY}: {teacher.config.model.path} has {its:,} rows for tokens, but the model that "
            f"learns has {mine:,}, and could sample a token that the teacher cannot read; take a "
            "teacher with as many, or leave out objective.rollouts"
        )


def require_same_tokens(tokenizer: Any, teachers: Any) -> None:
    """Raise ModelError unless every token has the same id in both tokenizers."""
    mine, other = tokenizer.get_vocab(), teachers.get_vocab()
    if mine == other:
        return
    words = sorted(
        (word for word in mine.keys() | other.keys() if mine.get(word) != other.get(word)),
        key=lambda word: (mine.get(word, other.get(word)), word),
    )
    first = words[0]
    here, there = (
        "no such token" if first not in known else f"id {known[first]}" for known in (mine, other)
    )
    raise ModelError(
        f"its tokenizer is another: {len(words):,} of {len(mine.keys() | other.keys()):,} tokens "
        f"differ, such as {first!r} (the model that learns: {here}; the teacher: {there}); its "
        "distributions are over other tokens, so take a teacher of the same family, or train on "
        "the answers that it writes (docs/distillation.md)"
    )
