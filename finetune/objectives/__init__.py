"""What is learned: one file for each objective."""

from finetune.config import Config, OwnObjective
from finetune.config.reward_fields import RewardList
from finetune.config.rollout_fields import Rollouts
from finetune.objectives.base import Encoding, Objective, Term
from finetune.objectives.classification import SequenceLabels, WordLabels
from finetune.objectives.clm import Clm
from finetune.objectives.distill import Distill, DistillText
from finetune.objectives.kto import Kto
from finetune.objectives.mlm import Mlm
from finetune.objectives.own import Own
from finetune.objectives.policy_gradient import Grpo, Ppo, Rloo
from finetune.objectives.preference import Cpo, Dpo, Orpo, Simpo
from finetune.objectives.reward import ProcessReward, Reward
from finetune.objectives.seq2seq import Answers, CorruptedSpans, Infilled
from finetune.objectives.sft import Sft

OBJECTIVES: dict[str, Objective] = {
    "clm": Clm(), "cpo": Cpo(), "dpo": Dpo(), "grpo": Grpo(), "kto": Kto(), "mlm": Mlm(),
    "orpo": Orpo(), "ppo": Ppo(), "process_reward": ProcessReward(), "reward": Reward(),
    "rloo": Rloo(), "seq2seq": Answers(),
    "sequence_classification": SequenceLabels(), "sft": Sft(), "simpo": Simpo(),
    "span_corruption": CorruptedSpans(), "text_infilling": Infilled(),
    "token_classification": WordLabels(),
    "distill": Distill(),
}  # fmt: skip

__all__ = [
    "OBJECTIVES", "Encoding", "Objective", "Own", "RewardList", "Rollouts", "Term", "chosen",
]  # fmt: skip


def chosen(config: Config) -> Objective:
    """Return the objective that a config asks for."""
    settings = config.objective
    if isinstance(settings, OwnObjective):
        return Own(settings)
    return DistillText() if config.distills_text else OBJECTIVES[settings.kind]
