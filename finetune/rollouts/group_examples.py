"""The groups of a phase -> the examples that its steps learn from. Pure functions."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from finetune.config.rollout_fields import Rollouts as Settings
from finetune.data.examples import Examples, Ragged
from finetune.errors import ConfigError, FinetuneError
from finetune.objectives.advantages import Scored
from finetune.rollouts.phases import Group, Rollout

OLD = "old_logprobs"


def kept(groups: Sequence[Group], settings: Settings, most: int) -> list[Group]:
    """Return the groups that are learned from, at most this many.

    Those with a failed reward are left out; with dynamic sampling those without signal, too, unless
    no others are there.
    """
    found = [each for each in groups if each.is_scored and not each.failed]
    if settings.dynamic_sampling:
        found = [each for each in found if has_signal(each, settings)] or found
    return found[:most]


def has_signal(group: Group, settings: Settings) -> bool:
    """Return whether rewards differ, so that one completion is better than another."""
    return len({_reward(each, settings) for each in group.rollouts}) > 1


def examples_of(
    groups: Sequence[Group], settings: Settings,
    columns: Mapping[str, np.ndarray] | None = None,
) -> Examples:  # fmt: skip
    """Return an example of each completion that is not masked.

    columns: [S] by name, numbers of their tokens, in the order of groups and completions.
    """
    parts, supervised = list[np.ndarray](), list[np.ndarray]()
    for group in groups:
        for rollout in group.rollouts:
            if not _is_masked(rollout, settings):
                parts.append(np.array([*group.prompt_ids, *rollout.ids], np.int32))
                supervised.append(np.append(np.zeros(len(group.prompt_ids), bool), rollout.is_own))
    is_supervised = np.concatenate([np.zeros(0, bool), *supervised])
    ends = np.cumsum([len(each) for each in parts], dtype=np.int64)
    number = np.arange(len(parts))
    spread = {}
    for name, values in (columns or {}).items():
        spread[name] = np.zeros(len(is_supervised), values.dtype)
        spread[name][is_supervised] = values
    ids = np.concatenate([np.zeros(0, np.int32), *parts])
    stream = Ragged(ids, np.concatenate([[0], ends])[:-1].astype(np.int64), ends)
    return Examples(
        {"input": stream}, is_supervised, number * 0, number + 1, number * 0, ["rollouts"], "",
        len(parts), 0, 0, token_columns=spread,
    )  # fmt: skip


def places_of(groups: Sequence[Group], settings: Settings) -> list[str]:
    """Return file:line of the prompt of each of these examples."""
    return [
        group.place for group in groups for rollout in group.rollouts
        if not _is_masked(rollout, settings)
    ]  # fmt: skip


def _is_masked(rollout: Rollout, settings: Settings) -> bool:
    return rollout.is_cut and settings.cut_answers == "mask"


def scored(groups: Sequence[Group], settings: Settings) -> Scored:
    """Return what an objective makes its columns of. A masked completion has no tokens."""
    rewards, numbers, lengths, cut = list[float](), list[int](), list[int](), list[bool]()
    arrays: dict[str, list[np.ndarray]] = {}
    for group in groups:
        for rollout in group.rollouts:
            is_learned = not _is_masked(rollout, settings)
            rewards.append(_reward(rollout, settings))
            numbers.append(group.number)
            lengths.append(int(rollout.is_own.sum()) if is_learned else 0)
            cut.append(rollout.is_cut)
            own = {"sampler_logprobs": rollout.sampler_logprobs, **rollout.values}
            for name, values in own.items() if is_learned else ():
                arrays.setdefault(name, []).append(values)
    flat = {name: np.concatenate(values) for name, values in arrays.items()}
    none = np.zeros(0, np.float32)
    unknown = None if flat else none  # where all are masked, whatever is asked for has 0 tokens
    return Scored(
        np.array(rewards, np.float64), np.array(numbers, np.int64),
        np.cumsum(lengths, dtype=np.int64), np.array(cut, bool), flat.get(OLD, none),
        flat.get("sampler_logprobs", none), flat.get("reference", unknown),
        flat.get("old_values", unknown), flat.get("teacher", unknown),
    )  # fmt: skip


def _reward(rollout: Rollout, settings: Settings) -> float:
    assert rollout.reward is not None
    penalty = settings.cut_penalty if settings.cut_answers == "penalise" and rollout.is_cut else 0.0
    return rollout.reward - penalty


def columns_of(
    groups: Sequence[Group], objective: Any, settings: Any
) -> tuple[dict[str, np.ndarray], dict[str, float]]:
    """Return (the columns of tokens that the loss reads, [S] by name; facts of the phase)."""
    found = scored(groups, settings.rollouts)
    made, facts = objective.columns(found, settings)
    known = {
        OLD: found.old_logprobs, "sampler_logprobs": found.sampler_logprobs,
        "reference": found.reference, "old_values": found.values,
    }  # fmt: skip
    count = found.lengths.sum()  # old_logprobs are empty where the objective does without
    columns = {
        name: values
        for name, values in known.items()
        if values is not None and len(values) == count
    }
    columns |= {name: np.asarray(values, np.float32) for name, values in made.items()}
    return columns, facts


def blank(prompts: Sequence[np.ndarray], objective: Any, settings: Any, pad_id: int) -> Examples:
    """Return completions of made-up tokens, as long as they may be, with all that a loss reads."""
    size, most = settings.rollouts.group_size, settings.rollouts.max_new_tokens
    zeros = np.zeros(most, np.float32)
    names = [OLD]
    names += ["old_values"] if "values" in objective.scored_by(settings) else []
    names += ["reference"] if objective.wants_reference(settings) else []
    names += ["teacher"] if objective.wants_teacher(settings) else []
    groups = [
        Group(
            number, "", tuple(ids.tolist()), tuple(
                Rollout(
                    (pad_id,) * most, zeros, "stop", reward=float(place % 2),
                    values=dict.fromkeys(names, zeros),
                )
                for place in range(size)
            ), True,
        )
        for number, ids in enumerate(prompts)
    ]  # fmt: skip
    columns, _ = columns_of(groups, objective, settings)
    return examples_of(groups, settings.rollouts, columns)


def with_values(
    groups: Sequence[Group], chosen: Sequence[Group], found: Mapping[str, np.ndarray],
    settings: Settings,
) -> list[Group]:  # fmt: skip
    """Return all groups, those that are chosen with their stretches of the arrays, [S] by name."""
    at, made = 0, dict[int, Group]()
    for group in chosen:
        rollouts = []
        for rollout in group.rollouts:
            if not _is_masked(rollout, settings):
                part = slice(at, at + int(rollout.is_own.sum()))
                values = {name: array[part] for name, array in found.items()}
                rollout, at = replace(rollout, values=values), part.stop
            rollouts.append(rollout)
        made[group.number] = replace(group, rollouts=tuple(rollouts))
    return [made.get(group.number, group) for group in groups]


def require_some(
    phase: int, groups: Sequence[Group], chosen: Sequence[Group], settings: Settings,
    compares: bool = True,
) -> None:  # fmt: skip
    """Raise an error if nothing can be learned from a phase; in the first one it is the user's.

    `compares`: whether rewards that are all equal teach nothing.
    """
    if not chosen:
        why = next(filter(None, (each.failed for each in groups)), "no reason")
        raise FinetuneError(
            f"phase {phase + 1}: every group lacks a reward: {why}; nothing is lost: mend what "
            "fails, and start the same command again: it asks for the missing rewards alone"
        )
    if phase:
        return
    rollouts = [each for group in chosen for each in group.rollouts]
    if all(_is_masked(each, settings) for each in rollouts):
        raise ConfigError(
            f"objective.rollouts.max_new_tokens: it cut all {len(rollouts)} completions of the "
            "first phase, and objective.rollouts.cut_answers: mask leaves nothing to learn; raise "
            "it, start from a model that ends its answers, or set cut_answers: learn, each under "
            "another run.name"
        )
    if compares and len({_reward(each, settings) for each in rollouts}) == 1:
        example = rollouts[0].text.strip()[:100]
        raise ConfigError(
            f"objective.rewards: all {len(rollouts)} completions of the first phase have the "
            f"reward {rollouts[0].reward:g}, so none is better than another; one is {example!r}; "
            "use a reward that tells them apart, easier prompts, or a larger "
            "train.global_batch_size, under another run.name"
        )
