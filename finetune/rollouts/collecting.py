"""Groups of completions: sampled by the policy, and rewarded."""

from collections.abc import Sequence
from functools import cached_property
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np

from finetune.generation import generate
from finetune.generation.completions import Completion
from finetune.rollouts.around import Around
from finetune.rollouts.episodes import Environments, Episode
from finetune.rollouts.phases import Group, Rollout
from finetune.rollouts.prompts import PromptExamples
from finetune.rollouts.sampling import Drawn, Stopped, draw, numbers_of, seed_of
from finetune.rollouts.served import Served

if TYPE_CHECKING:
    from finetune.rollouts.rewards import Reward

Members = Sequence[tuple[int, int]]
"""(number of a prompt among those that are asked, its example) of each prompt of a shard."""
Shard = tuple[int, Members]
"""Its number, and its prompts."""


def shards_of(members: Members, size: int) -> list[Shard]:
    """Part prompts into shards, by their numbers alone: each has its shard, whatever is asked."""
    parts = groupby(members, lambda member: member[0] // size)
    return [(number, list(part)) for number, part in parts]


class Collector:
    """Samples and rewards groups for one process.

    `together`: each token is a pass of all processes, as they share the weights.
    """

    def __init__(self, around: Around, prompts: PromptExamples, seed: int, group_size: int) -> None:
        self.around, self.prompts, self.seed = around, prompts, seed
        self.settings, self.group_size = around.settings.rollouts, group_size
        self.together = around.together

    def drawn(self, of: Sequence[int], members: Members) -> list[Group]:
        """Sample a group of completions of each prompt. Raises Stopped at a request to stop.

        `of`: numbers that seed the sampling, beside those of the prompts. No members: take part in
        the passes of the others.
        """
        if self.around.served is not None:
            return self._at_server(self.around.served, of, members)
        size, most = self.group_size, self.settings.max_new_tokens
        numbers = [
            numbers_of(self.seed, *of, number, count=size, places=most) for number, _ in members
        ]
        if self.around.environments is not None:
            return self._played(self.around.environments, members, numbers)
        prompts = [self.prompts.ids(each).tolist() for _, each in members for _ in range(size)]
        found = self._draw(prompts, np.concatenate(numbers) if numbers else np.zeros((0, 1)))
        return [
            self._group(number, example, found[place * size : (place + 1) * size])
            for place, (number, example) in enumerate(members)
        ]

    def _draw(self, prompts: list[list[int]], numbers: np.ndarray) -> list[Drawn]:
        """Continue prompts by the policy. None: take part in the passes of the others."""
        around, pad = self.around, generate.pad_of(self.around.tokenizer)
        with around.topology.arithmetic():
            found = draw(
                around.model(), prompts or [[pad]], numbers if prompts else np.zeros((1, 1)),
                temperature=self.settings.temperature, ends=around.ends, pad=pad,
                together=self.together, beat=self._beat, anyone=self._anyone,
            )  # fmt: skip
        return found[: len(prompts)]

    def _played(
        self, environments: Environments, members: Members, numbers: Sequence[np.ndarray]
    ) -> list[Group]:
        """Sample a group of completions of several turns for each prompt."""
        groups = [
            [Episode(self.prompts.ids(example).tolist(), row) for row in rows]
            for (_, example), rows in zip(members, numbers)
        ]
        prompts = [self.prompts.prompt(example) for _, example in members]
        self.around.topology.watchdog.pause("the environments")
        failed = environments.play(
            groups, prompts, self._draw, self._text, self._anyone, self._beat
        )
        return [
            Group(
                number, prompt.place, tuple(self.prompts.ids(example).tolist()),
                tuple(episode.rollout(why) for episode in episodes),
            )
            for (number, example), prompt, episodes, why in zip(members, prompts, groups, failed)
        ]  # fmt: skip

    def _at_server(self, served: Served, of: Sequence[int], members: Members) -> list[Group]:
        """Let a server sample a group of completions of each prompt, by a seed for each."""
        prompts = [self.prompts.ids(example).tolist() for _, example in members]
        seeds = [seed_of(self.seed, *of, number) for number, _ in members]
        found = served.draw(
            prompts, seeds, self.group_size, self.settings.max_new_tokens, self._beat
        )
        return [
            self._group(number, example, drawn) for (number, example), drawn in zip(members, found)
        ]

    def rewards(self, group: Group, example: int) -> "list[Reward]":
        """Return the rewards of the completions of a group."""
        if why := group.unplayed:
            from finetune.rollouts.rewards import Reward  # which imports all scores

            return [Reward(None, {}, why) for _ in group.rollouts]
        watchdog, prompt = self.around.topology.watchdog, self.prompts.prompt(example)
        watchdog.pause(f"the rewards of {group.place}")
        found = self.around.rewards(
            [
                Completion(
                    prompt, each.text, each.finish_reason, each.own_ids, environment=each.given
                )
                for each in group.rollouts
            ]
        )
        watchdog.heartbeat()
        return found

    def _anyone(self, has_more: bool) -> bool:
        """Tell whether any of the processes that sample together has more to do."""
        return self.around.topology.any(has_more) if self.together else has_more

    def _beat(self) -> None:
        self.around.topology.watchdog.heartbeat()
        if not self.together and self.around.stop():
            raise Stopped

    def _group(self, number: int, example: int, drawn: Sequence[Drawn]) -> Group:
        made = tuple(
            Rollout(each.ids, each.logprobs, each.finish_reason, self._text(each)) for each in drawn
        )
        ids = tuple(self.prompts.ids(example).tolist())
        return Group(number, self.prompts.prompt(example).place, ids, made)

    def _text(self, drawn: Drawn) -> str:
        kept = drawn.ids[:-1] if drawn.finish_reason == "stop" else drawn.ids
        text = generate.decode(self.around.tokenizer, list(kept))
        return generate.without_opening(text, self._opening)

    @cached_property
    def _opening(self) -> str:
        return generate.opening_of(self.around.tokenizer)
