"""How much better a completion or token was than expected: arithmetic on the arrays of a phase.

Pure functions in float64, of N completions in groups, and of their S supervised tokens.
"""

from dataclasses import dataclass

import numpy as np

# Added to standard deviations, so that rewards which differ by rounding alone teach nothing.
EPSILON = 1e-4


@dataclass(frozen=True)
class Scored:
    """The completions of a phase, in the order of their tokens; a masked one has none.

    rewards float64 [N]. groups int64 [N]: the prompt of each. ends int64 [N]: where the supervised
    tokens of each end among all S. cut bool [N]: whether max_new_tokens ended it. old_logprobs
    float32 [S]: by the weights that sampled, at the temperature, from the micro-batches of the
    update. sampler_logprobs float32 [S]: the sampler's own. reference float32 [S]: by the weights
    before the first step. values float32 [S]: of the value head. teacher float32 [S]: by a teacher.
    """

    rewards: np.ndarray
    groups: np.ndarray
    ends: np.ndarray
    cut: np.ndarray
    old_logprobs: np.ndarray
    sampler_logprobs: np.ndarray | None = None
    reference: np.ndarray | None = None
    values: np.ndarray | None = None
    teacher: np.ndarray | None = None

    @property
    def lengths(self) -> np.ndarray:
        """Return the supervised tokens of each completion, int64 [N]."""
        return np.diff(self.ends, prepend=0)

    @property
    def divergence(self) -> np.ndarray:
        """Return log(policy / reference) of each token, float64 [S]: its mean estimates the KL."""
        assert self.reference is not None
        return self.old_logprobs.astype(np.float64) - self.reference

    def sums(self, of_tokens: np.ndarray) -> np.ndarray:
        """Add up over the tokens of each completion, [N]."""
        number = np.repeat(np.arange(len(self.ends)), self.lengths)
        return np.bincount(number, of_tokens, len(self.ends))

    def of_tokens(self, of_completions: np.ndarray) -> np.ndarray:
        """Repeat a number of each completion for each of its tokens, [S]."""
        return np.repeat(of_completions, self.lengths)


def beside_group(rewards: np.ndarray, groups: np.ndarray, scale: str) -> np.ndarray:
    """Return each reward minus the mean of its group, [N] (Shao et al., 2024).

    `scale` says which standard deviation divides it: `group`, `batch` (of all rewards) or `none`.
    Equal rewards give 0 exactly, and a constant added to all changes nothing.
    """
    centred, number, count = _centred(rewards, groups)
    if scale == "group":
        variance = np.bincount(number, centred**2) / np.maximum(count - 1, 1)
        return centred / (np.sqrt(variance)[number] + EPSILON)
    if scale == "batch":
        return centred / (_std(rewards) + EPSILON)
    return centred


def beside_others(rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Return each reward minus the mean of the others of its group, [N] (Ahmadian et al., 2024).

    0 for a completion that is alone in its group.
    """
    centred, number, count = _centred(rewards, groups)
    return centred * (count / np.maximum(count - 1, 1))[number]


def _centred(rewards: np.ndarray, groups: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return (rewards minus the mean of their group, the number of each group, its size)."""
    _, first, number, count = np.unique(
        groups, return_index=True, return_inverse=True, return_counts=True
    )
    # From the first of the group: the mean of equal numbers may round to another number.
    rewards = rewards - rewards[first][number]
    return rewards - (np.bincount(number, rewards) / count)[number], number, count


def generalised(
    rewards: np.ndarray, values: np.ndarray, ends: np.ndarray, gamma: float, decay: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return (advantages, returns) of tokens, [S], by their rewards and values, [S].

    Generalised advantage estimation (Schulman et al., 2016) with lambda = `decay`; nothing follows
    the last token of a completion. A return is the advantage and the value.
    """
    values = values.astype(np.float64)
    lengths, advantages = np.diff(ends, prepend=0), np.zeros_like(values)
    next_advantage, next_value = np.zeros(len(ends)), np.zeros(len(ends))
    for back in range(1, lengths.max(initial=0) + 1):  # from the last tokens to the first
        there = lengths >= back
        at = ends[there] - back
        error = rewards[at] + gamma * next_value[there] - values[at]
        advantages[at] = error + gamma * decay * next_advantage[there]
        next_advantage[there], next_value[there] = advantages[at], values[at]
    return advantages, advantages + values


def of_later(rewards: np.ndarray, ends: np.ndarray, mean: bool) -> np.ndarray:
    """Return the sum of the rewards [S] of later tokens of the same completion, or their mean, [S].

    0 for the last token. `ends`: as those of `Scored`.
    """
    lengths = np.diff(ends, prepend=0)
    reached, last = np.cumsum(rewards, dtype=np.float64), np.repeat(ends, lengths) - 1
    sums = reached[last] - reached
    return sums / np.maximum(last - np.arange(len(last)), 1) if mean else sums


def whitened(values: np.ndarray) -> np.ndarray:
    """Return values with a mean of 0 and a standard deviation of 1."""
    return (values - values.mean()) / (_std(values) + EPSILON) if len(values) else values


def sampler_weights(scored: Scored, correction: str, cap: float) -> np.ndarray:
    """Return how much each token counts that another distribution than the policy's sampled, [S].

    `token`: its ratio of probabilities, at most `cap`. `sequence`: the ratio of the completion, 0
    beyond `cap`. All 1 if the sampler's log-probabilities are not known.
    """
    if scored.sampler_logprobs is None or correction == "none":
        return np.ones(len(scored.old_logprobs))
    ahead, limit = scored.old_logprobs.astype(np.float64) - scored.sampler_logprobs, np.log(cap)
    if correction == "token":
        return np.exp(np.minimum(ahead, limit))
    sums = scored.sums(ahead)
    return scored.of_tokens(np.where(sums > limit, 0.0, np.exp(np.minimum(sums, limit))))


def _std(values: np.ndarray) -> float:
    return float(values.std(ddof=1)) if len(values) > 1 else 0.0
