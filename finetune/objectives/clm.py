"""Causal language modelling: every next token of every row."""

from finetune.objectives.sft import Sft


class Clm(Sft):
    """Cross-entropy of all tokens."""

    has_turns = False

    def supervises(self, loss_on: str) -> str:
        """Supervise all of a row, whatever data.loss_on says."""
        return "all"
