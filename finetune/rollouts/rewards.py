"""What answers are worth: a weighted sum of scores, each by its name in the logs.

    rewards = Rewards(config.objective.rewards, log)   # before weights load
    rewards.check(prompts)
    with rewards.opened(folder):
        [reward] = rewards([completion])

A part that has no value for an answer leaves the answer without a reward, and never counts as 0.
"""

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finetune.config.reward_fields import RewardPart
from finetune.data.problems import Problems
from finetune.errors import ConfigError
from finetune.generation.completions import Completion, Prompt, Score
from finetune.rollouts import parts
from finetune.rollouts.kept import Folders, KeptScores
from finetune.rollouts.parts import Part

LARGEST = 1e15
"""The largest reward: the sum of squares of larger ones may overflow in float32."""


@dataclass(frozen=True)
class Reward:
    """What an answer is worth. total None: a part has no value, for the `reason`.

    parts: name -> value before its weight, of those that have one.
    """

    total: float | None
    parts: Mapping[str, float]
    reason: str = ""

    def to_json(self) -> dict[str, Any]:
        return {"reward": self.total, "parts": dict(self.parts), "reason": self.reason}


class Rewards:
    """The rewards of a config. Raises ConfigError for what is wrong with one of them."""

    def __init__(
        self, settings: Sequence[RewardPart], log: Callable[[str], None] = lambda text: None
    ) -> None:
        self._parts = [
            parts.made(each, f"objective.rewards.{place} ({each.title})", log)
            for place, each in enumerate(settings)
        ]
        self._log = log
        self._kept: KeptScores | None = None

    def check(self, prompts: Iterable[Prompt]) -> None:
        """Raise DataError for rows without what a reward reads, ConfigError for a silent judge."""
        problems = Problems()
        for prompt in prompts:
            problems.num_rows += 1
            for part in self._parts:
                if what := part.problem(prompt):
                    problems.note(f"{prompt.place}: objective.rewards: {part.title}: {what}")
        problems.raise_if_any()
        for part in self._parts:
            try:
                part.require()
            except ConfigError as exc:
                raise ConfigError(f"objective.rewards: {part.title}: {exc}") from exc

    def identity(self) -> dict[str, str]:
        """Return what scores depend on outside the config; a resuming run must find the same."""
        return {
            f"reward {part.title}": hashlib.sha256(part.identity.encode()).hexdigest()
            for part in self._parts
            if part.identity
        }

    @contextmanager
    def opened(
        self, folder: Path, stop: Callable[[], bool] = lambda: False, rank: int = 0
    ) -> Iterator["Rewards"]:
        """Keep what costs in a folder inside the block; processes and connections end with it.

        stop: whether the run was asked to stop. Then an answer that was waited for has no reward.
        rank: of this process; what others have kept is known to it.
        """
        folders = Folders(folder, rank)
        self._kept = KeptScores(folders, self._log)
        try:
            for part in self._parts:
                part.open(folders.of(part.title), stop)
            yield self
        finally:
            for part in self._parts:
                part.close()
            self._kept.close()
            self._kept = None

    def prepare(self) -> None:
        """Make what the scores of all processes depend on; on the main process, before them."""
        for part in self._parts:
            part.prepare()

    def __call__(self, completions: Sequence[Completion]) -> list[Reward]:
        """Return the reward of each answer, in their order: 0 of no parts. Only inside `opened`."""
        assert self._kept is not None
        if not self._parts:
            return [Reward(0.0, {}) for _ in completions]
        scores = [self._scores(part, completions) for part in self._parts]
        return [self._sum(each) for each in zip(*scores)]

    def _scores(self, part: Part, completions: Sequence[Completion]) -> list[Score]:
        if not part.is_kept:
            return part.scorer(completions)
        assert self._kept is not None
        of = (part.settings.kind, part.identity)
        return self._kept.scores(part.title, of, part.scorer, completions)

    def _sum(self, scores: Sequence[Score]) -> Reward:
        found = {p.title: s.value for p, s in zip(self._parts, scores) if s.value is not None}
        weights = {part.title: part.settings.weight for part in self._parts}
        reasons = [
            f"{part.title}: {score.reason}"
            for part, score in zip(self._parts, scores)
            if score.value is None and part.settings.weight
        ]
        if reasons:
            return Reward(None, found, "; ".join(reasons))
        total = sum(weights[name] * value for name, value in found.items())
        if not abs(total) <= LARGEST:
            return Reward(None, found, f"the sum of its rewards is {total:g}, over {LARGEST:.2g}")
        return Reward(total, found)
