"""Count how far a run has come. No torch."""

import secrets
from dataclasses import asdict, dataclass, field, fields
from typing import Any


@dataclass
class Progress:
    """A run's position in its order.

    `step` is the number of optimizer steps done; `epoch` and `sequences` count what these steps
    consumed; `tokens` and `supervised_tokens` are totals over all processes. Trackers know all
    attempts of a run by `run_id`.
    """

    step: int = 0
    epoch: int = 0
    sequences: int = 0
    tokens: int = 0
    supervised_tokens: int = 0
    run_id: str = field(default_factory=lambda: secrets.token_hex(4))

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def advance(self, sequences: int, tokens: int, supervised_tokens: int) -> None:
        """Count one more step and what it consumed."""
        self.step += 1
        self.sequences += sequences
        self.tokens += tokens
        self.supervised_tokens += supervised_tokens

    def restore(self, values: dict[str, Any]) -> None:
        """Restore what `to_dict` returned."""
        for each in fields(self):
            setattr(self, each.name, values[each.name])
