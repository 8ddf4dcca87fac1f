"""The settings of each objective, a class for each `objective.kind`."""

from typing import Annotated, Literal

from pydantic import Field

from finetune.config.kinds import Kind, PositiveNumber, Section, Temperature
from finetune.config.paths import ExpandedPath
from finetune.config.reward_fields import RewardList
from finetune.config.rollout_fields import Rollouts

Factor = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Share = Annotated[float, Field(ge=0, le=1)]


class CrossEntropy(Section):
    """Settings of a cross-entropy."""

    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of each label to spread over the vocabulary; evaluation does not use it."""


class MaskedLm(CrossEntropy, Kind):
    """Masked language modelling, for encoders."""

    kind: Literal["mlm"]
    """Train encoders on the tokens that masks hide, drawn anew in each epoch."""
    mlm_probability: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of each document's tokens to predict, to the nearest whole number, at least one.
    80% of them become the mask token, 10% another token, and 10% stay (Devlin et al., 2019).
    """


class SequenceClassification(CrossEntropy, Kind):
    """A label for each row."""

    kind: Literal["sequence_classification"]
    """Train encoders on the label of each row."""
    labels: list[str] | None = None
    """Names of the labels, in the order of their numbers.
    null: those of the model if it is such a classifier, else those of the rows, sorted.
    """


class TokenClassification(CrossEntropy, Kind):
    """A label for each word."""

    kind: Literal["token_classification"]
    """Train encoders on the label of each word, at its first token."""
    labels: list[str] | None = None
    """Names of the labels, in the order of their numbers.
    null: those of the model if it is such a classifier, else those of the rows, sorted.
    """


class Seq2Seq(CrossEntropy, Kind):
    """Answers of an encoder-decoder to prompts."""

    kind: Literal["seq2seq"]
    """Train encoder-decoders on answers; the encoder reads the prompt."""
    source_prefix: str = ""
    """Text before every prompt, such as "summarize: " for T5."""


class SpanCorruption(CrossEntropy, Kind):
    """Filling of spans by an encoder-decoder, as T5 is pretrained."""

    kind: Literal["span_corruption"]
    """Train encoder-decoders on spans that sentinel tokens replace, drawn anew in each epoch."""
    noise_density: Annotated[float, Field(gt=0, lt=1)] = 0.15
    """Fraction of each document's tokens to hide, to the nearest whole number."""
    mean_noise_span_length: Annotated[float, Field(ge=1)] = 3.0
    """Mean number of tokens in a hidden span (Raffel et al., 2020)."""


class TextInfilling(CrossEntropy, Kind):
    """Restoring of text by an encoder-decoder, as BART is pretrained."""

    kind: Literal["text_infilling"]
    """Train encoder-decoders to restore text whose spans one mask each replaces, drawn anew."""
    mask_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.3
    """Fraction of each document's tokens to hide, to the nearest whole number."""
    poisson_lambda: Annotated[float, Field(ge=0.5)] = 3.0
    """Mean number of tokens in a hidden span; one of none inserts a mask (Lewis et al., 2020)."""


class Clm(CrossEntropy, Kind):
    """Causal language modelling."""

    kind: Literal["clm"]
    """Train on every token of every row."""


class Sft(CrossEntropy, Kind):
    """Supervised fine-tuning."""

    kind: Literal["sft"] = "sft"
    """Train on answers, given their prompts."""


class Preference(Section):
    """Settings of all objectives that compare a chosen answer with rejected ones."""

    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy of the chosen answer's tokens, which keeps it likely."""


class Dpo(Preference, Kind):
    """Direct preference optimisation, and its relatives."""

    kind: Literal["dpo"]
    """Train on chosen and rejected answers, beside the model as it was before the first step."""
    loss: Literal[
        "sigmoid", "hinge", "ipo", "robust", "sigmoid_norm", "exo_pair", "nca_pair", "bco_pair",
        "sppo_hard", "apo_zero", "apo_down", "discopop",
    ] = "sigmoid"  # fmt: skip
    """Loss of a pair, or in kto of an answer (docs/preference.md has the formulas)."""
    beta: PositiveNumber = 0.1
    """Factor of what is compared; beside a reference, a smaller one lets answers move further."""
    swap_probability: Annotated[float, Field(ge=0, lt=0.5)] = 0.0
    """Probability that the answers of a pair are swapped, in robust and exo_pair."""
    divergence: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"] = (
        "reverse_kl"
    )
    """Divergence from the reference that the margin is measured by (Wang et al., 2023)."""
    divergence_alpha: PositiveNumber = 0.5
    """Order of alpha_divergence; 1 is reverse_kl."""
    discopop_tau: PositiveNumber = 0.05
    """Temperature of the blend in discopop."""
    ld_alpha: Annotated[float, Field(ge=0, le=1)] | None = None
    """Weight of the tokens beyond the length that both answers have (Liu et al., 2024).
    null: 1, all tokens count.
    """


class Cpo(Preference, Kind):
    """Contrastive preference optimisation."""

    kind: Literal["cpo"]
    """Train on chosen and rejected answers, without a reference (Xu et al., 2024)."""
    beta: PositiveNumber = 0.1
    """Factor of what is compared; beside a reference, a smaller one lets answers move further."""
    sft_weight: Annotated[float, Field(ge=0)] = 1.0
    """Weight of the cross-entropy of the chosen answer's tokens, which keeps it likely."""


class Simpo(Preference, Kind):
    """Simple preference optimisation."""

    kind: Literal["simpo"]
    """Train on chosen and rejected answers by their log-probability per token, no reference."""
    beta: PositiveNumber = 2.0
    """Factor of what is compared; beside a reference, a smaller one lets answers move further."""
    gamma: Annotated[float, Field(ge=0)] = 1.0
    """How far the chosen answer should lead, after the factor."""


class Kto(Kind):
    """Kahneman-Tversky optimisation."""

    kind: Literal["kto"]
    """Train on answers that are good or bad, each by itself, beside the model as it was before."""
    loss: Literal["kto", "apo_zero_unpaired"] = "kto"
    """Loss of a pair, or in kto of an answer (docs/preference.md has the formulas)."""
    beta: PositiveNumber = 0.1
    """Factor of what is compared; beside a reference, a smaller one lets answers move further."""
    desirable_weight: PositiveNumber = 1.0
    """Weight of good answers."""
    undesirable_weight: PositiveNumber = 1.0
    """Weight of bad answers."""


class ProcessReward(Kind):
    """Process reward models."""

    kind: Literal["process_reward"]
    """Train a model that scores answers up to each step, on steps that are right or wrong
    (Lightman et al., 2023).
    """


class Reward(Kind):
    """Reward models."""

    kind: Literal["reward"]
    """Train a model that scores answers on chosen and rejected ones (Ouyang et al., 2022)."""
    center_rewards_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Factor of the square of the sum of a pair's scores, which keeps scores around 0, such as
    0.01 (Eisenstein et al., 2023).
    """


class Orpo(Kind):
    """Odds ratio preference optimisation."""

    kind: Literal["orpo"]
    """Train a base model on chosen answers, and away from rejected ones (Hong et al., 2024)."""
    beta: PositiveNumber = 0.1
    """Factor of what is compared; beside a reference, a smaller one lets answers move further."""


class PolicyGradient(Section):
    """Settings of all objectives that learn from rewards of their own completions."""

    rewards: RewardList
    """What a completion is worth: the sum of weight x value (docs/reinforcement.md)."""
    rollouts: Rollouts = Rollouts()
    """How completions are sampled."""
    beta: Factor = 0.05
    """Weight of the divergence from the weights before the first step; 0: none is computed."""
    entropy_bonus: Factor = 0.0
    """Weight of the entropy, which the loss raises; 0: it is only logged."""
    clip_low: Share = 0.2
    """How far below 1 the ratio of probabilities still teaches where the advantage is negative."""
    clip_high: Factor = 0.2
    """How far above 1 the ratio of probabilities still teaches where the advantage is positive."""
    dual_clip: Annotated[float, Field(gt=1, allow_inf_nan=False)] | None = None
    """Largest ratio that counts where the advantage is negative; null: any (Ye et al., 2020)."""
    sampler_correction: Literal["token", "sequence", "none"] = "token"
    """How to weight completions of a sampler whose log-probabilities differ from the policy's.
    token: each token by its own ratio, at most sampler_cap;
    sequence: by the ratio of the whole completion, 0 beyond sampler_cap. In 16 bits roundings add
    up over a completion, and of long ones only few would count.
    """
    sampler_cap: Annotated[float, Field(ge=1, allow_inf_nan=False)] = 3.0
    """Largest weight that sampler_correction gives."""
    stop_kl: PositiveNumber | None = None
    """End the run after a step whose `kl` is larger; null: never."""
    stop_entropy: (
        Annotated[list[Annotated[float, Field(ge=0)]], Field(min_length=2, max_length=2)] | None
    ) = None
    """End the run after a step whose `entropy` is outside, as [0.01, 4.0]; null: never."""


class Grpo(PolicyGradient, Kind):
    """Group relative policy optimisation, and its relatives."""

    kind: Literal["grpo"]
    """Train on completions of the policy, by how much better each is than others of its prompt."""
    loss: Literal["grpo", "dr_grpo", "bnpo", "dapo", "gspo", "cispo"] = "dapo"
    """What is clipped, and by what the loss is divided (docs/reinforcement.md has the formulas)."""
    clip_low: Share | None = None  # type: ignore[assignment]
    """How far below 1 the ratio of probabilities still teaches where the advantage is negative.
    null: as the paper of the loss.
    """
    clip_high: Factor | None = None  # type: ignore[assignment]
    """How far above 1 the ratio of probabilities still teaches where the advantage is positive.
    null: as the paper of the loss.
    """
    scale_advantages: Literal["group", "none", "batch"] | None = None
    """Standard deviation that divides advantages: that of each group, or of the whole phase.
    null: none for dr_grpo, else group.
    """
    beta: Factor = 0.0
    """Weight of the divergence from the weights before the first step; 0: none is computed."""
    kl: Literal["in_loss", "in_reward"] = "in_loss"
    """Where the divergence stands: in the loss, or in the reward of each completion."""


class Rloo(PolicyGradient, Kind):
    """REINFORCE with the mean of the other completions as its baseline."""

    kind: Literal["rloo"]
    """Train on completions of the policy, each beside the mean of the others of its prompt."""


class OneCompletion(Rollouts):
    """Rollouts that need no second completion of a prompt."""

    group_size: Annotated[int, Field(gt=0)] = 1
    """Completions of each prompt."""


class Ppo(PolicyGradient, Kind):
    """Proximal policy optimisation with a value head."""

    kind: Literal["ppo"]
    """Train on completions of the policy, beside what a value head expected of each token."""
    rollouts: OneCompletion = OneCompletion()
    """How completions are sampled."""
    gamma: Share = 1.0
    """Discount of what comes a token later."""
    gae_lambda: Share = 0.95
    """How far ahead advantages look.
    0: one token, trusting the values; 1: to the end, trusting only the rewards.
    """
    value_clip: PositiveNumber = 0.2
    """How far values may move from those of the phase in one phase."""
    value_weight: PositiveNumber = 0.1
    """Weight of the error of values in the loss."""


class Distill(Kind):
    """Distillation: the distributions of a teacher, token by token."""

    kind: Literal["distill"]
    """Train on what a teacher expects at each token of answers, not on the token alone."""
    teacher: Annotated[str | None, ExpandedPath] = None
    """Folder or Hub id of the teacher, a model with the same tokenizer.
    null: rows have a column teacher, written by `finetune data teach`.
    """
    teacher_revision: str | None = None
    """Revision of the teacher on the Hub: a branch, tag or commit."""
    teacher_dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the teacher's weights. auto: that of train.precision."""
    teacher_quantization: Literal["nf4", "fp4", "int8"] | None = None
    """Bits of the teacher's weights: quantise them when they are loaded, as adapter.quantization.
    null: as they are saved, which may be quantised by bitsandbytes.
    """
    beta: Annotated[float, Field(ge=0, le=1)] = 0.0
    """Which divergence of student s from teacher t is minimised.
    0: the forward KL(t || s); 1: the reverse KL(s || t); between them, with m = (1 - beta) s +
    beta t, beta KL(t || m) + (1 - beta) KL(s || m) (generalised Jensen-Shannon; Agarwal et al.,
    2024).
    """
    loss: Literal["gkd", "minillm"] = "gkd"
    """What is learned from completions of the policy.
    gkd: the divergence at each token alone; minillm: the reverse KL of whole completions, so also
    what a token changes for later ones (Gu et al., 2024).
    """
    length_normalization: bool = True
    """In minillm: divide what a token changes for later ones by their number, so that long
    completions do not outweigh short ones; false: the gradient of the reverse KL itself.
    """
    temperature: Temperature = 1.0
    """What divides the logits of both in the divergence; above 1, unlikely tokens count more."""
    sft_weight: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the cross-entropy of the rows' own tokens, beside the divergence."""
    rollouts: OneCompletion | None = None
    """Train on completions of the policy itself (on-policy; Agarwal et al., 2024), and how they are
    sampled. null: train on the rows' own answers.
    """
    rewards: RewardList | None = None
    """With rollouts: what a completion is worth, to log and to evaluate; nothing is learned from
    it (docs/reinforcement.md).
    """
