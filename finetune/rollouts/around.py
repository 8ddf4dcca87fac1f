"""What rollouts need of a run."""

from collections.abc import Callable, Mapping, Sequence, Set
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from finetune.engine.checkpoint.storage import Storage
from finetune.engine.topology import Topology
from finetune.generation.completions import Completion
from finetune.models.policy import Policy
from finetune.rollouts.episodes import Environments
from finetune.rollouts.phases import Group
from finetune.rollouts.served import Served

if TYPE_CHECKING:
    from finetune.rollouts.rewards import Reward


class Rewards(Protocol):
    def __call__(self, completions: Sequence[Completion]) -> "list[Reward]": ...


@dataclass(frozen=True)
class Around:
    """What rollouts need of a run.

    policy: as it is at the moment. model: the same without what shares it, for generation. ends:
    tokens that end a completion. of: a hash of what completions depend on besides the weights.
    served: the server that samples; None: the model does. environments: what answers the model
    between its turns; None: a completion is one turn. save: writes the policy's weights to a
    folder, for the server; collective.
    reference: gives the policy as it was before the first step; None: it is not needed. teacher:
    says how likely it finds the tokens; None: it is not asked. opened: gets the number of each
    phase that steps are about to learn from, its groups, and facts for the logs. together: whether
    each sampled token is a pass of all processes; else each samples by itself, with whole weights.
    """

    run: Path
    topology: Topology
    policy: Callable[[], Policy]
    model: Callable[[], Any]
    tokenizer: Any
    ends: Set[int]
    objective: Any
    settings: Any
    rewards: Rewards
    of: str
    stop: Callable[[], bool]
    log: Callable[[str], None]
    storage: Storage | None = None
    served: Served | None = None
    environments: Environments | None = None
    save: Callable[[Path], None] = lambda folder: None
    reference: Callable[[], AbstractContextManager[Policy]] | None = None
    teacher: Policy | None = None
    opened: Callable[[int, Sequence[Group], Mapping[str, float]], None] = lambda *_: None
    together: bool = False

    def of_phase(self, phase: int) -> str:
        """Return what the file of a phase depends on."""
        return f"{self.of} {phase}"
