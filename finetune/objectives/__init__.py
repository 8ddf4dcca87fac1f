"""What is learned: one file for each objective."""

from finetune.objectives.base import Objective, Term
from finetune.objectives.clm import Clm
from finetune.objectives.sft import Sft

OBJECTIVES: dict[str, Objective] = {"clm": Clm(), "sft": Sft()}

__all__ = ["OBJECTIVES", "Objective", "Term"]
