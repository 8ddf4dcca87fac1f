"""Phases of rollouts on disk: written before they are learned from, and kept as the record.

    rollouts/phase-00001.partial/shard-0000.jsonl   groups, appended as they are sampled and scored
    rollouts/phase-00001.jsonl                      the phase, sealed: whole or not at all

While a phase grows, each shard of prompts has a file (`shard_file`). The sealed file begins with a
header, has a line for each group, and ends with their number and a hash. Floats are written so that
the same float32 is read.
"""

import hashlib
import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from finetune import failures, files
from finetune.errors import RunDirectoryError
from finetune.generation.completions import FinishReason

FOLDER = "rollouts"


@dataclass(frozen=True)
class Rollout:
    """One completion, all that is known of it.

    ids: with the token that ended it, and of several turns with what the environment said between
    them. The arrays are float32 [ids that the model wrote]. text: of several turns the last.
    reward None: it failed.
    """

    ids: tuple[int, ...]
    sampler_logprobs: np.ndarray
    finish_reason: FinishReason
    text: str = ""
    reward: float | None = None
    parts: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""
    values: Mapping[str, np.ndarray] = field(default_factory=dict)
    """What the policy that is updated says of each token before the first step of the phase:
    `old_logprobs`; `reference`, `teacher` and `old_values` where the objective asks for them."""
    heard: tuple[tuple[int, int], ...] = ()
    """Stretches of the ids that the environment said."""
    given: float | None = None
    """The sum of the rewards that the environment gave; None without one."""

    @property
    def is_own(self) -> np.ndarray:
        """Return which ids the model wrote, bool [ids]."""
        own = np.ones(len(self.ids), bool)
        for start, end in self.heard:
            own[start:end] = False
        return own

    @property
    def own_ids(self) -> tuple[int, ...]:
        return tuple(token for token, own in zip(self.ids, self.is_own.tolist()) if own)

    @property
    def is_cut(self) -> bool:
        return self.finish_reason == "length"

    def to_json(self) -> dict[str, Any]:
        return {
            "ids": list(self.ids), "text": self.text, "finish_reason": self.finish_reason,
            "reward": self.reward, "parts": dict(self.parts),
            **({"reason": self.reason} if self.reason else {}),
            **({"heard": self.heard} if self.heard else {}),
            **({} if self.given is None else {"given": self.given}),
            "sampler_logprobs": _floats(self.sampler_logprobs),
            **{name: _floats(values) for name, values in self.values.items()},
        }  # fmt: skip

    @classmethod
    def from_json(cls, known: Mapping[str, Any]) -> "Rollout":
        others = known.keys() - {
            "ids", "text", "finish_reason", "reward", "parts", "reason", "sampler_logprobs",
            "heard", "given",
        }  # fmt: skip
        return cls(
            tuple(known["ids"]), np.array(known["sampler_logprobs"], np.float32),
            known["finish_reason"], known["text"], known["reward"], known["parts"],
            known.get("reason", ""),
            {name: np.array(known[name], np.float32) for name in sorted(others)},
            tuple((start, end) for start, end in known.get("heard", ())), known.get("given"),
        )  # fmt: skip


def _floats(values: np.ndarray) -> list[float]:
    """Return float32 numbers in the fewest digits that read back as the same."""
    return [float(str(value)) for value in values]


@dataclass(frozen=True)
class Group:
    """The completions of one prompt. number: of the prompt in its phase; place: its row."""

    number: int
    place: str
    prompt_ids: tuple[int, ...]
    rollouts: tuple[Rollout, ...]
    is_scored: bool = False

    @property
    def failed(self) -> str:
        """Return why a reward is missing; empty if all are there."""
        return next(
            (each.reason or "no reason" for each in self.rollouts if each.reward is None), ""
        )

    @property
    def unplayed(self) -> str:
        """Return why the environment of a group without rewards failed; empty if it did not."""
        return next((each.reason for each in self.rollouts if each.reason), "")

    def to_json(self) -> dict[str, Any]:
        rollouts = [each.to_json() for each in self.rollouts]
        return {
            "prompt": self.number, "place": self.place, "prompt_ids": list(self.prompt_ids),
            "rollouts": rollouts,
        }  # fmt: skip

    @classmethod
    def from_json(cls, known: Mapping[str, Any], is_scored: bool = True) -> "Group":
        rollouts = tuple(map(Rollout.from_json, known["rollouts"]))
        return cls(known["prompt"], known["place"], tuple(known["prompt_ids"]), rollouts, is_scored)

    def scored(self, rewards: Sequence[Mapping[str, Any]]) -> "Group":
        """Return the group with the rewards of its completions."""
        made = [
            replace(each, reward=r["reward"], parts=r["parts"], reason=r.get("reason", ""))
            for each, r in zip(self.rollouts, rewards, strict=True)
        ]
        return replace(self, rollouts=tuple(made), is_scored=True)


class PhaseFiles:
    """The phases of a run. Only the main process seals and reads; each writes its shards."""

    def __init__(self, run: Path) -> None:
        self.folder = run / FOLDER

    def name(self, phase: int) -> str:
        """Return the name of a sealed phase; phases count from 1 on the disk."""
        return f"phase-{phase + 1:05d}.jsonl"

    def path(self, phase: int) -> Path:
        return self.folder / self.name(phase)

    def partial(self, phase: int) -> Path:
        return self.folder / f"phase-{phase + 1:05d}.partial"

    def seal(self, phase: int, header: Mapping[str, Any], groups: Sequence[Group]) -> None:
        """Write a whole phase, and remove what it was collected in. Raises Outage."""
        lines = [json.dumps(line) for line in (dict(header), *(g.to_json() for g in groups))]
        text = "".join(line + "\n" for line in lines).encode()
        end = {"groups": len(groups), "sha256": hashlib.sha256(text).hexdigest()}
        with failures.writing(self.path(phase)):
            with files.replacing(self.path(phase)) as file:
                file.write(text + json.dumps(end).encode() + b"\n")
            files.flush(self.folder)
        self.sweep(phase)

    def read(self, phase: int, of: str) -> tuple[dict[str, Any], list[Group]] | None:
        """Return (header, groups) of a sealed phase; None if there is none.

        Raises RunDirectoryError if it is damaged, or not of this run.
        """
        path = self.path(phase)
        if not path.exists():
            return None
        content = path.read_bytes()
        body, _, last = content.rstrip(b"\n").rpartition(b"\n")
        body += b"\n"
        try:
            end, [header, *lines] = json.loads(last), map(json.loads, body.splitlines())
            is_whole = end["sha256"] == hashlib.sha256(body).hexdigest()
            groups = [Group.from_json(line) for line in lines]
            if not is_whole or len(groups) != end["groups"]:
                raise ValueError("another hash")
        except (ValueError, KeyError, TypeError, AttributeError) as exc:
            raise RunDirectoryError(
                f"{path} is damaged; put back a copy, or remove it and what was trained after it: "
                "the run samples it again from the checkpoint before"
            ) from exc
        if header.get("of") != of:
            raise RunDirectoryError(
                f"{path} holds rollouts of another run, or of other rows, settings or code; give "
                "this run another run.name, or move the folder away"
            )
        self.sweep(phase)
        return header, groups

    def sweep(self, phase: int) -> None:
        """Remove what a sealed phase was collected in, and temporary files of killed attempts."""
        shutil.rmtree(self.partial(phase), ignore_errors=True)
        for path in self.folder.glob(".writing-*"):
            path.unlink(missing_ok=True)

    def total_bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("phase-*.jsonl"))


def all_rollouts(groups: Iterable[Group]) -> Iterator[Rollout]:
    return (rollout for group in groups for rollout in group.rollouts)
