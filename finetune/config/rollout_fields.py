"""Settings of rollouts: completions that the policy samples and then learns from. No torch."""

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from finetune.config.engine_fields import Engine, LocalEngine
from finetune.config.kinds import PositiveNumber, Section, Temperature
from finetune.config.own import OwnName

Positive = Annotated[int, Field(gt=0)]
# What other tools let alter sampling -> how to do without it.
TRUNCATES = (
    "learning divides by the probability that a token had, and a cut distribution has another one; "
    "remove it"
)
NOT_HERE = {
    "top_p": TRUNCATES, "top_k": TRUNCATES, "min_p": TRUNCATES,
    "repetition_penalty": "learning would take the penalised choice for the policy's; remove it",
    "num_generations": "it is called objective.rollouts.group_size here",
    "max_completion_length": "it is called objective.rollouts.max_new_tokens here",
    "num_iterations": "it is called objective.rollouts.passes here",
}  # fmt: skip


class Rollouts(Section):
    """How completions are sampled, and how often they are learned from."""

    group_size: Positive = 8
    """Completions of each prompt; they are compared with each other. ppo and distill: 1."""
    max_new_tokens: Positive = 512
    """Maximum number of tokens in a completion; with an environment, of all its turns together,
    what the environment says included.
    """
    temperature: Temperature = 1.0
    """Divide the logits by it, in sampling and in training; nothing else alters sampling."""
    steps_per_phase: Positive = 1
    """Optimizer steps for which a phase samples completions."""
    passes: Positive = 1
    """How often a phase's completions are learned from."""
    shard_size: Positive = 8
    """Prompts whose completions are sampled together, and by one process."""
    dynamic_sampling: Annotated[float, Field(ge=0, le=100)] = 0.0
    """Ask further prompts in place of groups whose rewards are all equal (Yu et al., 2025).
    At most this many times as many as a phase has; 0: none.
    """
    cut_answers: Literal["mask", "learn", "penalise"] = "mask"
    """What becomes of completions that max_new_tokens cuts.
    mask: their tokens are not learned; learn: as if they had ended there;
    penalise: learn, with cut_penalty subtracted from their reward.
    """
    cut_penalty: PositiveNumber = 1.0
    """What cut_answers: penalise subtracts."""
    engine: Engine = LocalEngine()
    """What samples: {kind: local}, the processes of the run, or {kind: server}, a vLLM server."""
    environment: OwnName | None = None
    """A class of your own that answers the model between its turns, as a tool or a game does
    (docs/reinforcement.md). null: a completion is one turn.
    """
    max_turns: Positive = 8
    """With an environment: turns of the model after which a completion is cut."""
    turn_seconds: Annotated[float, Field(gt=0, le=86_400)] = 10.0
    """With an environment: time limit for one call of it, in seconds."""

    @model_validator(mode="before")
    @classmethod
    def _without_other_ways_to_sample(cls, values: Any) -> Any:
        for name in values if isinstance(values, dict) else ():
            if name in NOT_HERE:
                raise ValueError(f"{name}: {NOT_HERE[name]}")
        return values
