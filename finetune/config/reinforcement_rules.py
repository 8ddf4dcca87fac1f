"""Settings of reinforcement that exclude each other, or that its loss would ignore."""

from collections.abc import Iterator

from finetune.config.choices import ADAPTER_INITS
from finetune.config.fields import Adapter, Full
from finetune.config.objective_fields import Grpo, PolicyGradient, Ppo


def conflicts(objective: PolicyGradient, adapter: Adapter | Full) -> Iterator[str]:
    """List the problems of an objective that learns from rewards."""
    compares = objective.beta > 0 or objective.stop_kl is not None
    if (
        compares and not isinstance(adapter, Full) and adapter.path is None
        and not ADAPTER_INITS[adapter.init].leaves_model
    ):  # fmt: skip
        yield (
            f"adapter.init: {adapter.init} starts from other weights than the base's, which "
            "nothing keeps to compare with; use default, or set objective.beta to 0 and remove "
            "objective.stop_kl"
        )
    if objective.rollouts.group_size == 1 and not isinstance(objective, Ppo):
        yield (
            "objective.rollouts.group_size: 1 completion has no others of its prompt to be "
            "compared with; take 2 or more, or objective.kind: ppo"
        )
    if objective.sampler_correction == "none" and objective.sampler_cap != 3.0:
        yield (
            "objective.sampler_cap: would be ignored: objective.sampler_correction is none; remove "
            "it"
        )
    if isinstance(objective, Grpo) and not objective.beta and objective.kl != "in_loss":
        yield "objective.kl: would be ignored: objective.beta is 0; remove it, or raise beta"
    if isinstance(objective, Grpo) and objective.loss == "cispo" and objective.dual_clip:
        yield "objective.dual_clip: would be ignored: cispo caps every ratio; set clip_high"
    limits = objective.stop_entropy
    if limits is not None and not limits[0] < limits[1]:
        yield f"objective.stop_entropy: give the lower limit first, got {limits}"
