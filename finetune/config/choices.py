"""Tables of the objectives, optimizers, quantisations and initialisations of adapters.

`objective.kind`, `optimizer.kind`, `adapter.quantization` and `adapter.init` take the names of the
rows; to add one, add a row. No torch here, so that a wrong config is reported at once.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

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
# A twentieth of the rates of SFT: the loss is unbounded in the margin, and answers decay first
# (Rafailov et al., 2023: 1e-6; Meng et al., 2024: 3e-7 to 1e-6). ORPO starts from a base.
PREFERENCE_LR = (1e-6, 1e-5)
# TRL's default for all weights; each step learns from few completions (Shao et al., 2024: 1e-6).
SAMPLED_LR = (1e-6, 1e-5)
# Ouyang et al., 2022, take 9e-6 for all weights; adapters ten times that.
REWARD_LR = (1e-5, 1e-4)
OBJECTIVES: Mapping[str, ObjectiveKind] = {
    "sft": ObjectiveKind(),
    "clm": ObjectiveKind(),
    "mlm": ObjectiveKind("masked", ("text",), "the tokens that masks hide"),
    "sequence_classification": ObjectiveKind("sequences", ("text_label",), "a label of each row"),
    "token_classification": ObjectiveKind("tokens", ("token_labels",), "a label of each word"),
    "seq2seq": ObjectiveKind("seq2seq", PAIRS, "the answer to each prompt"),
    "span_corruption": ObjectiveKind("seq2seq", ("text",), "the spans that sentinels hide"),
    "text_infilling": ObjectiveKind("seq2seq", ("text",), "text without its gaps"),
    "distill": ObjectiveKind(),
    "dpo": ObjectiveKind(formats=PREFERENCES, learns=PREFERS, lr=PREFERENCE_LR),
    "orpo": ObjectiveKind(formats=PREFERENCES, learns=PREFERS, lr=(5e-6, 5e-5)),
    "simpo": ObjectiveKind(formats=PREFERENCES, learns=PREFERS, lr=PREFERENCE_LR),
    "cpo": ObjectiveKind(formats=PREFERENCES, learns=PREFERS, lr=PREFERENCE_LR),
    "kto": ObjectiveKind(
        formats=("unpaired", "preference"), learns="which answers are good", lr=PREFERENCE_LR
    ),
    "reward": ObjectiveKind("scores", PREFERENCES, "scores of answers", REWARD_LR),
    "process_reward": ObjectiveKind(
        "scores", ("steps", "unpaired"), "which steps are right", REWARD_LR
    ),
    **dict.fromkeys(
        ("grpo", "rloo", "ppo"), ObjectiveKind(learns="which completions are good", lr=SAMPLED_LR)
    ),
}


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
    listed = " or ".join(filter(None, [", ".join(found[:-1]), found[-1]]))
    return f"take objective.kind: {listed}, or another model"


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
