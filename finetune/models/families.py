"""Families of models: which class of transformers opens one, how it attends, what it answers.

The objective names its family. All that differs between a causal model, an encoder with a head, and
an encoder-decoder, besides rows and batches, is decided by the fields of `Family`.
"""

import inspect
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import nn

from finetune.config import Config
from finetune.config.base import BOTH_WAYS, WHAT_IT_IS
from finetune.config.choices import FAMILIES, PADDED_FAMILIES, instead_of, objective_kind
from finetune.errors import ModelError


@dataclass(frozen=True)
class Family:
    """name: of `choices.FAMILIES`. auto: the class of transformers that opens its models.

    task: peft's name of it, None where peft has none. endings: of its architectures in config.json.
    causal: whether no token sees those after it.
    has_vocabulary: whether it predicts tokens, through an output projection. has_new_head: whether
    its head may be new, as a model that was pretrained has no head for the labels of these rows.
    """

    name: str
    auto: Any
    task: str | None
    endings: tuple[str, ...]
    causal: bool = False
    has_vocabulary: bool = True
    has_new_head: bool = False

    @property
    def pads(self) -> bool:
        """Whether its batches are padded in any case."""
        return self.name in PADDED_FAMILIES


CAUSAL = Family(
    "causal", transformers.AutoModelForCausalLM, "CAUSAL_LM", ("ForCausalLM", "LMHeadModel"),
    causal=True,
)  # fmt: skip
MASKED = Family("masked", transformers.AutoModelForMaskedLM, None, ("ForMaskedLM",))
# A row of the batch for each document: the head reads the first token of a row, or all of them.
SEQUENCES = Family(
    "sequences", transformers.AutoModelForSequenceClassification, "SEQ_CLS",
    ("ForSequenceClassification",), has_vocabulary=False, has_new_head=True,
)  # fmt: skip
# The head reads the last token of a document; a pack has several.
SCORES = Family(
    "scores",
    transformers.AutoModelForSequenceClassification,
    "SEQ_CLS",
    (),
    causal=True,
    has_vocabulary=False,
    has_new_head=True,
)
TOKENS = Family(
    "tokens", transformers.AutoModelForTokenClassification, "TOKEN_CLS",
    ("ForTokenClassification",), has_vocabulary=False, has_new_head=True,
)  # fmt: skip
# T5's bias of positions and BART's own positions do not pack.
SEQ2SEQ = Family(
    "seq2seq", transformers.AutoModelForSeq2SeqLM, "SEQ_2_SEQ_LM", ("ForConditionalGeneration",),
)  # fmt: skip
ALL = {family.name: family for family in (CAUSAL, MASKED, SEQUENCES, SCORES, TOKENS, SEQ2SEQ)}


def of(config: Config) -> Family:
    """Return the family that the objective of a run trains."""
    return ALL[objective_kind(config.objective.kind).family]


def of_model(model: Any) -> Family:
    """Return the family of a model of transformers, by its class; causal for unknown ones."""
    return _by_ending(type(model).__name__, model.config)


def of_saved(config: Any) -> Family:
    """Return the family of a saved model, by the architecture that its config names."""
    return _by_ending((config.architectures or [""])[0], config)


def _by_ending(name: str, config: Any) -> Family:
    if name.endswith(BOTH_WAYS):
        return CAUSAL if _is_decoder(config) else MASKED
    for family in (MASKED, SEQUENCES, TOKENS):
        if name.endswith(family.endings):
            return SCORES if family is SEQUENCES and _scores(config) else family
    return SEQ2SEQ if is_encoder_decoder(config) else CAUSAL


def _scores(config: Any) -> bool:
    """Return whether a classifier is a causal model that gives one number."""
    return int(config.num_labels) == 1 and _found(config) == "causal"


def of_adapter(adapter: Any) -> Family:
    """Return the family of the base of an adapter, by the config of peft."""
    named = (adapter.auto_mapping or {}).get("base_model_class", "")
    of_task = (family for family in ALL.values() if family.task == (adapter.task_type or ""))
    return MASKED if named.endswith(MASKED.endings) else next(of_task, CAUSAL)


def model_class(config: Any, family: Family = CAUSAL) -> Any:
    """Return the class of an architecture; None if the repository brings its own code.

    Raises ModelError if transformers has no such class.
    """
    try:
        return family.auto._model_mapping[type(config)]
    except KeyError:
        own = getattr(config, "auto_map", None) or {}
        if family.auto.__name__ in own or (own and family == CAUSAL):
            return None
        raise ModelError(
            f"model_type {config.model_type!r} has no {TITLES[family.name]} in transformers "
            f"{transformers.__version__}"
            + "; take another, such as llama or qwen2"
            * (family == SCORES)
        ) from None


TITLES = {
    "causal": "causal language model", "masked": "masked language model",
    "sequences": "classifier of rows", "tokens": "classifier of words",
    "scores": "class for sequence classification, as which reward models are exported,",
    "seq2seq": "encoder-decoder",
}  # fmt: skip


def is_encoder_decoder(config: Any) -> bool:
    return bool(getattr(config, "is_encoder_decoder", False))


WANTED = {"causal": "causal", "scores": "causal", "seq2seq": "seq2seq"}


def require_fits(config: Any, objective: str) -> None:
    """Raise ModelError if an objective cannot train an architecture."""
    family, found = ALL[objective_kind(objective).family], _found(config)
    wanted = WANTED.get(family.name, "encoder")
    if found not in (wanted, None) and not getattr(config, "auto_map", None):
        raise ModelError(
            f"model_type {config.model_type!r} is {WHAT_IT_IS[found]}, and objective.kind: "
            f"{objective} trains {FAMILIES[family.name]}; {_instead(config, objective)}"
        )
    model_class(config, family)


def _found(config: Any) -> str | None:
    """Return a key of WHAT_IT_IS; None for an architecture that is none of these."""
    if is_encoder_decoder(config):
        return "seq2seq"
    return "encoder" if _is_encoder(config) else "causal" if _has(config, CAUSAL) else None


def _has(config: Any, family: Family) -> bool:
    return type(config) in family.auto._model_mapping


def _instead(config: Any, objective: str) -> str:
    """Say which objectives could train an architecture."""
    fitting = [SEQ2SEQ] if is_encoder_decoder(config) else [CAUSAL]
    if _is_encoder(config):
        fitting = [MASKED, SEQUENCES, TOKENS]
    return instead_of(objective, *(each.name for each in fitting if _has(config, each)))


def _is_encoder(config: Any) -> bool:
    """Return whether an architecture is an encoder; one that can be both says which it is."""
    return _has(config, MASKED) and not is_encoder_decoder(config) and not _is_decoder(config)


def _is_decoder(config: Any) -> bool:
    """Return whether a model that can be both is a decoder; XLM and Flaubert say it by `causal`."""
    return bool(getattr(config, "is_decoder", False) or getattr(config, "causal", False))


def score_head(model: Any) -> Any:
    """Return the linear layer that scores, under adapters the one that trains."""
    [name] = new_head(model)
    head = model.get_submodule(name)
    saved = getattr(head, "modules_to_save", None)
    return head if saved is None else saved["default"]


def set_labels(config: Any, labels: Sequence[str] | None) -> None:
    """Name the labels of a classifier in the config of its model, in the order of their numbers."""
    if labels:
        config.id2label = dict(enumerate(labels))
        config.label2id = {name: number for number, name in enumerate(labels)}


def labels_of(config: Any) -> list[str] | None:
    """Return the labels of a model that was saved as a classifier; None for any other."""
    return _names(config) if of_saved(config).has_new_head else None


def _names(config: Any) -> list[str]:
    return [str(name) for _, name in sorted(config.id2label.items())]


def labels_of_model(model: Any) -> list[str]:
    """Return the labels of a classifier; none of any other model."""
    return _names(model.config) if of_model(model).has_new_head else []


def new_weights(model: Any) -> set[str]:
    """Return the names of the weights that may be new: of the head of a classifier."""
    if not hasattr(model, "base_model_prefix") or not of_model(model).has_new_head:
        return set()
    return {name for name, _ in model.named_parameters() if is_of_new_head(name, model)}


def body(model: Any) -> Any:
    """Return the part of a model that adapters go into: the layers, without its head."""
    if of_model(model) == CAUSAL:
        return model.get_decoder() if hasattr(model, "get_decoder") else model
    return getattr(model, model.base_model_prefix, model)


def is_of_new_head(name: str, model: Any) -> bool:
    """Return whether a weight of a classifier may be new: it is outside the encoder, or its pooler.

    A pooler is not pretrained by masked language modelling alone.
    """
    prefix = f"{model.base_model_prefix}."
    return not name.startswith(prefix) or ".pooler." in name


def new_head(model: Any) -> list[str]:
    """Return the names of the modules of a classifier that may be new, without their children."""
    if not of_model(model).has_new_head:
        return []
    layers = body(model)
    found = [name for name, each in model.named_children() if each is not layers]
    if getattr(layers, "pooler", None) is not None:
        found.append(f"{model.base_model_prefix}.pooler")
    return [name for name in found if any(True for _ in model.get_submodule(name).parameters())]


def first_position(config: Any) -> int:
    """Return the number of a document's first position: RoBERTa's follow that of the pad token.

    MPNet's follow a number that is fixed.
    """
    module = inspect.getmodule(model_class(config, MASKED)) if _has(config, MASKED) else None
    source = inspect.getsource(module) if module else ""
    if "create_position_ids_from_input_ids" not in source:
        return 0
    fixed = re.search(r"self\.padding_idx = (\d+)", source)
    pad = int(fixed[1]) if fixed else config.pad_token_id
    if pad is None:
        raise ModelError(
            f"model.config: {config.model_type} counts positions from its pad token; set "
            "pad_token_id"
        )
    first: int = pad + 1
    return first


def shift_positions(model: Any) -> None:
    """Let a model whose positions do not begin with 0 take positions that do."""
    for module in model.modules():
        positions = getattr(module, "position_embeddings", None)
        first = getattr(positions, "padding_idx", None)
        if isinstance(positions, nn.Embedding) and first is not None:
            module.register_forward_pre_hook(_Shift(first + 1), with_kwargs=True)


class _Shift:
    """Add the number of the first position to positions that a forward pass is given."""

    def __init__(self, first: int) -> None:
        self.first = first

    def __call__(self, module: Any, arguments: Any, given: dict[str, Any]) -> Any:
        if given.get("position_ids") is not None:
            given = given | {"position_ids": given["position_ids"] + self.first}
        return arguments, given


def inputs_of(ids: torch.Tensor, model: Any) -> dict[str, Any]:
    """Return the inputs of a plain forward pass: tokens int64 [B, T], the decoder's, too."""
    inputs: dict[str, Any] = {"input_ids": ids}
    if is_encoder_decoder(model.config):
        inputs["decoder_input_ids"] = ids
    is_encoder = of_model(model) in (MASKED, SEQUENCES, TOKENS)
    return inputs if is_encoder else {**inputs, "use_cache": False}
