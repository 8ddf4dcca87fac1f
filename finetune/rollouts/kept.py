"""Scores that cost, kept on the disk by scorer, prompt and answer, so that none is computed twice.

    rewards/process-0/scores.jsonl      what this process has computed
    rewards/process-0/judge/            what a reward by the name `judge` keeps by itself

Each process writes a folder of its own, and reads those of all others: what one has computed, no
other computes, and a run that goes on with another number of processes knows all.
"""

import hashlib
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from finetune.generation.completions import Completion, Score
from finetune.lines_file import LinesFile, LinesOfOthers

FILE = "scores.jsonl"


@dataclass(frozen=True)
class Folders:
    """Folders of all processes in `root`. name: of one inside each."""

    root: Path
    rank: int = 0
    name: str = "."

    @property
    def own(self) -> Path:
        return self._of(self.rank)

    @property
    def first(self) -> Path:
        """Return that of the main process, with what all processes have to share."""
        return self._of(0)

    def others(self) -> Iterable[Path]:
        """Return those of all other processes, also of earlier attempts with more processes."""
        every = sorted(self.root.glob("process-*"))
        return [each / self.name for each in every if each.name != f"process-{self.rank}"]

    def of(self, name: str) -> "Folders":
        return replace(self, name=name)

    def _of(self, rank: int) -> Path:
        return self.root / f"process-{rank}" / self.name


class KeptScores:
    """Scores in the files of all processes."""

    def __init__(self, folders: Folders, log: Callable[[str], None]) -> None:
        holds, elsewhere = "score of an answer", "another run.name"
        folders.own.mkdir(parents=True, exist_ok=True)
        self._file = LinesFile(
            folders.own / FILE, holds, elsewhere, lambda text: log(f"note: {text}")
        )
        self._known = dict(each for _, each in self._file.read(_parsed))
        self._others = LinesOfOthers(
            lambda: [each / FILE for each in folders.others()], holds, _parsed
        )

    def scores(
        self, title: str, of: Sequence[str], scorer: Callable[[Sequence[Completion]], list[Score]],
        completions: Sequence[Completion],
    ) -> list[Score]:  # fmt: skip
        """Return scores, new ones by `scorer`. of: what they depend on beside prompt and answer."""
        for key, score in self._others.new():
            self._known.setdefault(key, score)
        keys = [_key(of, each) for each in completions]
        new = {key: each for key, each in zip(keys, completions) if key not in self._known}
        found = dict(zip(new, scorer(list(new.values())))) if new else {}
        for key, score in found.items():
            if score.value is not None:
                self._known[key] = score
                self._file.append(
                    {"key": key, "reward": title, "value": score.value, "reason": score.reason}
                )
        return [self._known.get(key) or found[key] for key in keys]

    def close(self) -> None:
        self._file.close()


def _key(of: Sequence[str], completion: Completion) -> str:
    prompt = completion.prompt
    content = [
        *of, [[m.role, m.content] for m in prompt.messages], prompt.reference, prompt.fields,
        completion.text, completion.finish_reason,
    ]  # fmt: skip
    text = json.dumps(content, default=str, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _parsed(line: Any) -> tuple[str, Score]:
    """Return key and score of a line. Raise what a wrong line raises."""
    if not isinstance(line["key"], str):
        raise TypeError
    return line["key"], Score(float(line["value"]), str(line["reason"]))
