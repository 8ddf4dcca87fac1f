"""What is learned: one module per objective, each with `supervises` and `loss`."""

from types import ModuleType

from finetune.objectives import clm, sft

OBJECTIVES: dict[str, ModuleType] = {"clm": clm, "sft": sft}
