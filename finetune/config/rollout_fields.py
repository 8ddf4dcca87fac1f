"""Settings of rollouts: completions that the policy samples and then learns from. No torch."""

from typing import Annotated

from pydantic import Field

from finetune.config.kinds import PositiveNumber, Section

Positive = Annotated[int, Field(gt=0)]


class Rollouts(Section):
    """How completions are sampled, and how often they are learned from."""

    group_size: Positive = 8
    """Completions of each prompt; they are compared with each other."""
    max_new_tokens: Positive = 512
    """Maximum number of tokens in a completion."""
    temperature: PositiveNumber = 1.0
    """Divide the logits by it, in sampling and in training; nothing else alters sampling."""
    steps_per_phase: Positive = 1
    """Optimizer steps for which a phase samples completions."""
    passes: Positive = 1
    """How often a phase's completions are learned from."""
