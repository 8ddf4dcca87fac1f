"""Tables of the objectives, optimizers, quantisations and initialisations of adapters.

`objective.kind`, `optimizer.kind`, `adapter.quantization` and `adapter.init` take the names of the
rows; to add one, add a row. No torch here, so that a wrong config is reported at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from finetune.errors import either

LossOn = Literal["completion", "each_turn", "last_turn", "all"]
"""Which turns of a conversation to train on."""


RATED = ("preference", "unpaired", "choices", "steps")
"""Formats of answers that are rated."""
PREFERENCES = ("preference",)
REFERENCE = "reference"
"""What an objective needs that compares with the weights before the first step."""


@dataclass(frozen=True)
class ObjectiveKind:
    """Which models an objective trains, and which rows it reads."""

    family: str = "causal"
    """A name of FAMILIES."""
    formats: tuple[str, ...] = ()
    """Values of data.format that it reads; empty: every one that is not rated."""
    learns: str = ""
    """What it learns, in messages."""
    lr: tuple[float, float] | None = None
    """Default of optimizer.lr, for all weights and for adapters; None: the optimizer's."""
    loss_on: tuple[str, ...] = ("each_turn", "last_turn")
    """Values of data.loss_on that it takes, beside completion."""
    truncation: tuple[str, ...] = ("right", "left", "drop")
    """Values of data.truncation that it takes, beside error."""

    @property
    def compares(self) -> bool:
        """Whether it compares a chosen answer with rejected ones."""
        return self.formats == PREFERENCES

    @property
    def rates(self) -> bool:
        """Whether it learns from answers that are rated: compared, or good or bad."""
        return bool(self.formats) and set(self.formats) <= set(RATED)

    @property
    def is_framed(self) -> bool:
        """Whether rows have the tokenizer's own tokens around them, not a template."""
        return self.family not in DECODERS


DECODERS = ("causal", "scores")
FAMILIES: Mapping[str, str] = {
    "causal": "a model that continues text, such as Llama or Qwen",
    "scores": "a model that continues text, such as Llama or Qwen",
    "masked": "an encoder, such as BERT, RoBERTa or ModernBERT",
    "sequences": "an encoder, such as BERT, RoBERTa or ModernBERT",
    "tokens": "an encoder, such as BERT, RoBERTa or ModernBERT",
    "seq2seq": "an encoder-decoder, such as T5 or BART",
}
"""Families of models, and what they are, in messages."""
PADDED_FAMILIES = ("sequences", "seq2seq")
CLASSIFIERS = ("sequences", "tokens")
NEW_HEADS = (*CLASSIFIERS, "scores")
PAIRS = ("prompt_completion", "question_answer", "instruction", "messages")
PREFERS = "to prefer the chosen answer"
CUT = ("right", "left", "drop", "split")
# A twentieth of the rates of SFT: the loss is unbounded in the margin, and answers decay first
# (Rafailov et al., 2023: 1e-6; Meng et al., 2024: 3e-7 to 1e-6). ORPO starts from a base.
PREFERENCE_LR = (1e-6, 1e-5)
# TRL's default for all weights; each step learns from few completions (Shao et al., 2024: 1e-6).
SAMPLED_LR = (1e-6, 1e-5)
# Ouyang et al., 2022, take 9e-6 for all weights; adapters ten times that.
REWARD_LR = (1e-5, 1e-4)


def _rated(
    formats: tuple[str, ...], learns: str, lr: tuple[float, float], loss_on: tuple[str, ...] = (),
    family: str = "causal",
) -> ObjectiveKind:  # fmt: skip
    """Return the row of an objective that learns from rated answers, which are never cut."""
    return ObjectiveKind(family, formats, learns, lr, loss_on, ("drop",))


def _framed(
    family: str, formats: tuple[str, ...], learns: str,
    truncation: tuple[str, ...] = ("right", "left", "drop"),
) -> ObjectiveKind:  # fmt: skip
    return ObjectiveKind(family, formats, learns, None, (), truncation)


OBJECTIVES: Mapping[str, ObjectiveKind] = {
    "sft": ObjectiveKind(),
    "clm": ObjectiveKind(loss_on=(), truncation=CUT),
    "mlm": _framed("masked", ("text",), "the tokens that masks hide", CUT),
    "sequence_classification": _framed("sequences", ("text_label",), "a label of each row"),
    "token_classification": _framed("tokens", ("token_labels",), "a label of each word"),
    "seq2seq": _framed("seq2seq", PAIRS, "the answer to each prompt"),
    "span_corruption": _framed("seq2seq", ("text",), "the spans that sentinels hide", CUT),
    "text_infilling": _framed("seq2seq", ("text",), "text without its gaps", CUT),
    "distill": ObjectiveKind(),
    "dpo": _rated(PREFERENCES, PREFERS, PREFERENCE_LR),
    "orpo": _rated(PREFERENCES, PREFERS, (5e-6, 5e-5)),
    "simpo": _rated(PREFERENCES, PREFERS, PREFERENCE_LR),
    "cpo": _rated(PREFERENCES, PREFERS, PREFERENCE_LR),
    "kto": _rated(
        ("unpaired", "preference"), "which answers are good", PREFERENCE_LR, ("last_turn",)
    ),
    "reward": _rated(PREFERENCES, "scores of answers", REWARD_LR, family="scores"),
    "process_reward": _rated(
        ("steps", "unpaired"), "which steps are right", REWARD_LR, family="scores"
    ),
    **dict.fromkeys(
        ("grpo", "rloo", "ppo"),
        ObjectiveKind(
            learns="which completions are good", lr=SAMPLED_LR, loss_on=(),
            truncation=("left", "drop"),
        ),
    ),
}  # fmt: skip


def objective_kind(kind: str) -> ObjectiveKind:
    """Return the row of an objective; a user's own trains a causal model on rows of any format."""
    return OBJECTIVES.get(kind, ObjectiveKind())


def instead_of(objective: str, *families: str) -> str:
    """Return what to do about a model that an objective does not train, but one of `families`."""
    found = [
        kind for kind, each in OBJECTIVES.items() if each.family in families and kind != objective
    ]
    if not found:
        return "use another model"
    return f"take objective.kind: {either(found)}, or another model"


@dataclass(frozen=True)
class OptimizerKind:
    """How to make an optimizer, and what its state takes."""

    make: str
    """package.module:Class, a torch.optim.Optimizer; called with parameter groups."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Arguments besides the settings in `takes`."""
    takes: tuple[str, ...] = ("betas", "eps")
    """Settings that it uses, besides lr and weight_decay."""
    ignores: str = ""
    """Why it ignores the other settings."""
    lr: tuple[float, float] = (2e-5, 2e-4)
    """Default of optimizer.lr, for all weights and for adapters."""
    betas: tuple[float, float] = (0.9, 0.999)
    """Default of optimizer.betas."""
    moments: int | None = 2
    """Values of state for each weight; None: sums of rows and columns instead."""
    hidden_moments: int | None = None
    """The same for hidden matrices; None: as many."""
    bits: int | None = None
    """Bits of each value of state; None: those of the weight."""
    not_for_adapters: str | None = None
    """Why it cannot train adapters, and what to use."""


BNB_ADAMW, BNB_LION = "bitsandbytes.optim:AdamW", "bitsandbytes.optim:Lion"
# Chen et al., 2023: the sign of a running average. Steps have the size of the rate for any
# gradient, so the rate is a third to a tenth of AdamW's.
LION: dict[str, Any] = {
    "takes": ("betas",), "ignores": "lion does not divide", "lr": (4e-6, 4e-5),
    "betas": (0.9, 0.99), "moments": 1,
}  # fmt: skip
# Rates: 2e-5 for all weights (Llama-2, Alpaca, Tulu), ten times that for adapters (Hu et al., 2021;
# Dettmers et al., 2023).
OPTIMIZERS = {
    # Loshchilov and Hutter, 2019; one fused kernel over all parameters.
    "adamw": OptimizerKind("torch.optim:AdamW", {"fused": True}),
    # Dettmers et al., 2022: state in blocks of 256 values of 8 bits with a scale.
    "adamw_8bit": OptimizerKind(BNB_ADAMW, {"optim_bits": 8, "is_paged": False}, bits=8),
    "paged_adamw_32bit": OptimizerKind(BNB_ADAMW, {"optim_bits": 32, "is_paged": True}, bits=32),
    "paged_adamw_8bit": OptimizerKind(BNB_ADAMW, {"optim_bits": 8, "is_paged": True}, bits=8),
    "lion": OptimizerKind(BNB_LION, {"optim_bits": 32}, bits=32, **LION),
    "lion_8bit": OptimizerKind(BNB_LION, {"optim_bits": 8}, bits=8, **LION),
    # Shazeer and Stern, 2018: row and column sums in place of second moments. Its rate is relative
    # to the size of a weight: 1e-3 (Raffel et al., 2020).
    "adafactor": OptimizerKind(
        "torch.optim:Adafactor", takes=(), ignores="adafactor has its own", lr=(1e-3, 1e-3),
        moments=None,
        not_for_adapters="adafactor steps in proportion to the size of a weight, and half of an "
        "adapter starts at 0; use adamw_8bit",
    ),
    # Jordan et al., 2024. Its updates are scaled to the size of AdamW's (Liu et al., 2025), so it
    # takes AdamW's rate.
    "muon": OptimizerKind(
        "finetune.engine.optim:Muon", hidden_moments=1,
        not_for_adapters="muon turns the update of a whole matrix, which adapters split in two; "
        "use adamw",
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Quantization:
    """How bitsandbytes stores frozen weights."""

    bits: int
    scale_bits: float
    """Bits of the scales for each weight."""
    double_scale_bits: float
    """The same with adapter.double_quantization."""


# 4 bits: a float32 scale for 64 weights; doubly quantised: an 8-bit scale for 64 weights, and a
# float32 for 256 scales.
_FOUR = Quantization(4, 32 / 64, 8 / 64 + 32 / 64 / 256)
QUANTIZATIONS = {"nf4": _FOUR, "fp4": _FOUR, "int8": Quantization(8, 0, 0)}


@dataclass(frozen=True)
class AdapterInit:
    """How adapters are initialised."""

    peft: bool | str = True
    """init_lora_weights of peft's LoraConfig."""
    has_directions: bool = True
    """Whether it starts from directions of a linear layer, whose number limits the rank."""
    leaves_model: bool = False
    """Whether B starts at 0, so that the model at first equals its base."""
    rewrites_base: bool = False
    """Whether it changes the base weights."""


ADAPTER_INITS = {
    "default": AdapterInit(has_directions=False, leaves_model=True),
    "gaussian": AdapterInit("gaussian", has_directions=False, leaves_model=True),
    "random": AdapterInit(False, has_directions=False),  # B random too, to debug and to test
    "pissa": AdapterInit("pissa", rewrites_base=True),  # Meng et al., 2024
    "eva": AdapterInit("eva", leaves_model=True),  # Paischer et al., 2024
    "loftq": AdapterInit(),  # Li et al., 2023; by `models.adapter_init`, after peft
}
