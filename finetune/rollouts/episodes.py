"""Episodes: turns of the policy, with what an environment of the user's own says between them."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from finetune.errors import DataError, FinetuneError
from finetune.generation.completions import FinishReason, Prompt
from finetune.own_code import OwnCode
from finetune.rollouts.apart import Apart
from finetune.rollouts.own_environments import Move, Reply, made, no_answer
from finetune.rollouts.phases import Rollout
from finetune.rollouts.sampling import Drawn
from finetune.rollouts.turns import Turns

Draw = Callable[[list[list[int]], np.ndarray], list[Drawn]]


@dataclass
class Episode:
    """A completion of several turns that grows.

    numbers: what its tokens are drawn by, float64 [most tokens], each at its place, whichever turn
    that falls in. The ids of earlier turns stay as they were drawn.
    """

    prompt: list[int]
    numbers: np.ndarray
    ids: list[int] = field(default_factory=list)
    heard: list[tuple[int, int]] = field(default_factory=list)
    logprobs: list[np.ndarray] = field(default_factory=list)
    text: str = ""
    given: float = 0.0
    finish_reason: FinishReason = "stop"
    is_open: bool = True

    @property
    def left(self) -> int:
        """Return how many tokens it may still have."""
        return len(self.numbers) - len(self.ids)

    def write(self, drawn: Drawn, text: Callable[[Drawn], str]) -> None:
        """Append a turn of the model, up to the limit of all turns."""
        if len(drawn.ids) > self.left:
            drawn = Drawn(drawn.ids[: self.left], drawn.logprobs[: self.left], "length")
        self.ids += drawn.ids
        self.logprobs.append(drawn.logprobs)
        self.text = text(drawn)
        if drawn.finish_reason != "stop":
            self.end("length")

    def hear(self, ids: list[int]) -> None:
        """Append what the environment said, if that leaves room for an answer."""
        if len(ids) >= self.left:
            self.end("length")
            return
        self.heard.append((len(self.ids), len(self.ids) + len(ids)))
        self.ids += ids

    def end(self, reason: FinishReason) -> None:
        self.finish_reason, self.is_open = reason, False

    def rollout(self, failed: str) -> Rollout:
        """Return what is kept. failed: why its group has no reward; "" if it has."""
        logprobs = np.concatenate([np.zeros(0, np.float32), *self.logprobs])
        given = None if failed else self.given
        return Rollout(
            tuple(self.ids), logprobs, self.finish_reason, self.text, reason=failed,
            heard=tuple(self.heard), given=given,
        )  # fmt: skip


class Environments:
    """Plays groups of episodes with a class of the user's own.

    Each group of a call has a process, so that one which hangs or dies costs only that group its
    rewards. `seconds`: for a call of the class. The processes end with the block.
    """

    def __init__(
        self, code: OwnCode, turns: Turns, max_turns: int, seconds: float,
        stop: Callable[[], bool],
    ) -> None:  # fmt: skip
        self.turns, self.max_turns = turns, max_turns
        self._code, self._seconds, self._stop = code, seconds, stop
        self._processes: list[Apart[Move, Reply]] = []

    def __enter__(self) -> "Environments":
        return self

    def __exit__(self, *exc: object) -> None:
        for each in self._processes:
            each.close()

    def play(
        self, groups: Sequence[Sequence[Episode]], prompts: Sequence[Prompt], draw: Draw,
        text: Callable[[Drawn], str], anyone: Callable[[bool], bool], beat: Callable[[], None],
    ) -> list[str]:  # fmt: skip
        """Play all episodes to their ends. Return why each group failed; "" if it did not.

        draw: continues prompts by numbers, all turns of a round together. anyone: whether any
        process has a turn left; those that share the weights draw together. beat: is called before
        each call of an environment, and may raise.
        """
        failed = [""] * len(groups)
        for place, (episodes, prompt) in enumerate(zip(groups, prompts)):
            moves = [Move(number, prompt.fields) for number in range(len(episodes))]
            _, failed[place] = self._answers(place, moves, beat)
        for turn in range(self.max_turns):
            playing = [
                each for group, why in zip(groups, failed) for each in group
                if each.is_open and not why
            ]  # fmt: skip
            if not anyone(bool(playing)):
                break
            asked = [[*each.prompt, *each.ids] for each in playing]
            for each, drawn in zip(playing, draw(asked, _numbers(playing))):
                each.write(drawn, text)
            is_last = turn + 1 == self.max_turns
            for place, episodes in enumerate(groups):
                failed[place] = failed[place] or self._turn(place, episodes, is_last, beat)
        return failed

    def _turn(
        self, place: int, episodes: Sequence[Episode], is_last: bool, beat: Callable[[], None]
    ) -> str:
        """Let the environments of a group answer; return why one failed, or ""."""
        moves = [Move(n, None, each.text) for n, each in enumerate(episodes) if each.is_open]
        answers, failed = self._answers(place, moves, beat)
        for move, reply in zip(moves, answers):
            episode = episodes[move.place]
            episode.given += reply.reward or 0.0
            if reply.done or is_last:
                episode.end("stop" if reply.done else "length")
                continue
            try:
                episode.hear(self.turns.between(reply.messages))
            except DataError as exc:
                failed = failed or f"environment: {self._code}: {exc}"
        return failed

    def _answers(
        self, place: int, moves: Sequence[Move], beat: Callable[[], None]
    ) -> tuple[list[Reply], str]:
        """Call the environments of a group, up to the first that fails."""
        while len(self._processes) <= place:
            process = Apart[Move, Reply](
                made, (self._code.name, self._code.sha256), partial(no_answer, str(self._code)),
                seconds=self._seconds, call_seconds=math.inf,
            )  # fmt: skip
            process.open(self._stop)
            self._processes.append(process)
        answers = list[Reply]()
        for move in moves:
            beat()
            try:
                [reply] = self._processes[place]([move])
            except FinetuneError as exc:
                reply = no_answer(str(self._code), str(exc))
            if reply.failed:
                beat()  # raises, where a request to stop is why
                return answers, f"environment: {reply.failed}"
            answers.append(reply)
        return answers, ""


def _numbers(playing: Sequence[Episode]) -> np.ndarray:
    """Return what the next turns are drawn by, float64 [episodes, tokens]; NaN beyond a limit."""
    found = np.full((len(playing), max((each.left for each in playing), default=1)), np.nan)
    for row, each in zip(found, playing):
        row[: each.left] = each.numbers[len(each.ids) :]
    return found
