"""Which settings errors about rows may advise: those that the objective of the run takes."""

from collections.abc import Sequence
from dataclasses import dataclass

from finetune.errors import either


@dataclass(frozen=True)
class Advice:
    """What the objective takes beside the defaults.

    loss_on: values of data.loss_on; truncation: of data.truncation; drops_thoughts: whether it
    takes data.thinking: drop. plain_text: what to do about rows without prompts.
    """

    loss_on: tuple[str, ...] = ("each_turn", "last_turn")
    truncation: tuple[str, ...] = ("right", "left", "drop")
    drops_thoughts: bool = True
    plain_text: str = "use objective.kind: clm"

    def use(self, loss_on: Sequence[str], otherwise: str) -> str:
        """Return "use data.loss_on: ..., or `otherwise`", with those of `loss_on` that it takes."""
        taken = [value for value in loss_on if value in self.loss_on]
        return f"use data.loss_on: {either(taken)}, or {otherwise}" if taken else f"use {otherwise}"

    @property
    def cut(self) -> str:
        """Return what may become of a row that is too long."""
        return f"data.truncation to {either(self.truncation)}"


SFT = Advice()
