"""How far a run has come. No torch."""

from dataclasses import asdict, dataclass, fields


@dataclass
class Progress:
    """Everything that places a run in its plan.

    `step` is the number of optimizer steps done; `epoch` and `sequences` count what those
    steps consumed; `tokens` and `supervised_tokens` are totals over all processes.
    """

    step: int = 0
    epoch: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised_tokens: int = 0

    def to_dict(self) -> dict[str, int]:
        return asdict(self)

    def advance(self, sequences: int, tokens: int, supervised_tokens: int) -> None:
        """One more step is done, and this is what it consumed."""
        self.step += 1
        self.sequences += sequences
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens

    def restore(self, values: dict[str, int]) -> None:
        """Take over what `to_dict` gave."""
        for field in fields(self):
            setattr(self, field.name, values[field.name])
