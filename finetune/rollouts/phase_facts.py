"""What the logs say of groups: of a phase, and of completions of held-out prompts."""

from collections import Counter
from collections.abc import Sequence

import numpy as np

from finetune.config.rollout_fields import Rollouts as Settings
from finetune.rollouts.group_examples import has_signal
from finetune.rollouts.phases import Group


def of_phase(
    groups: Sequence[Group], chosen: Sequence[Group], settings: Settings
) -> dict[str, float]:
    """Return what the logs say of a phase. chosen: the groups that are learned from."""
    scored_groups = [each for each in groups if each.is_scored and not each.failed]
    rollouts = [rollout for group in scored_groups for rollout in group.rollouts]
    everyone = [rollout for group in groups for rollout in group.rollouts]
    names = list(dict.fromkeys(name for each in rollouts for name in each.parts))
    parts = {
        f"reward_{name}": _mean([r.parts[name] for r in rollouts if name in r.parts])
        for name in names
    }
    rewards = {
        "reward": _mean([each.reward for each in rollouts if each.reward is not None]),
        **(parts if len(parts) > 1 else {}),
    }
    compared = [each for each in scored_groups if len(each.rollouts) > 1]
    if compared:  # else a completion is alone in its group, as ppo has it
        rewards["no_signal_share"] = _mean([not has_signal(it, settings) for it in compared])
    return {
        **(rewards if parts or len(scored_groups) < len(groups) else {}),
        "completion_length": _mean([len(each.own_ids) for each in everyone]),
        "cut_share": _mean([each.is_cut for each in everyone]),
        "failed_groups": float(len(groups) - len(scored_groups)),
        "learned_groups": float(len(chosen)),
    }


def of_held_out(groups: Sequence[Group], settings: Settings) -> dict[str, float]:
    """Return what eval.jsonl says of completions of held-out prompts; eval_loss is -reward."""
    facts = of_phase(groups, groups, settings)
    kept = {
        name: value for name, value in facts.items()
        if name.startswith("reward") or name in ("completion_length", "cut_share", "failed_groups")
    }  # fmt: skip
    return {"eval_loss": -facts["reward"], **kept, "eval_prompts": len(groups)}


def left_out(groups: Sequence[Group]) -> str:
    """Return how many groups have no rewards, and why; "" if all have them."""
    reasons = Counter(each.failed for each in groups if each.failed)
    if not reasons:
        return ""
    [(first, _)] = reasons.most_common(1)
    more = f" (and {len(reasons) - 1:,} more reasons)" if len(reasons) > 1 else ""
    return f"{reasons.total():,} of {len(groups):,} groups are left out: {first}{more}"


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if len(values) else float("nan")
