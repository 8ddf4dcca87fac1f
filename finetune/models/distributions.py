"""Answers that depend on whole distributions over the vocabulary, in chunks of tokens.

What becomes of these answers decides their gradient, which so cannot be made along with them: the
backward pass computes the logits of a chunk again. `project` must find whole weights then, too.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from finetune.models import cross_entropy
from finetune.models.logits import (
    LogitTransform,
    divergence,
    divergence_from_top,
    logprobs_and_entropy,
)

Project = Callable[[torch.Tensor], torch.Tensor]
"""The forward of an output projection: hidden [C, H] -> raw logits [C, V]."""


@dataclass(frozen=True)
class Distribution:
    """The distributions of a pass, without their logits; another pass may be compared with them.

    states [S, H]: what they are computed from, without gradient; logits: how, as float32 [C, V].
    Those of the policy itself are only good inside another pass of it, where its weights are whole;
    those of a companion anywhere.
    """

    states: torch.Tensor
    logits: Project

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        """What a chunk of tokens has a part of."""
        return (self.states,)

    def divergence(
        self, logits_CV: torch.Tensor, parts: tuple[torch.Tensor, ...], beta: float,
        temperature: float,
    ) -> torch.Tensor:  # fmt: skip
        """Return the divergence of logits from these, float32 [C]. `parts`: of `tensors`."""
        with torch.no_grad():
            others_CU = self.logits(*parts)
        return divergence(logits_CV, others_CU, beta, temperature)

    @staticmethod
    def of(
        head: nn.Module, project: Project, hidden: torch.Tensor, finish: LogitTransform
    ) -> "Distribution":
        """Keep what `head` sees now. If its adapters are off, they stay off for this.

        Raises ValueError, when it is used, if they are on now and off then.
        """
        wrapper: Any = head  # peft's, if it has adapters
        were_off = getattr(wrapper, "disable_adapters", False)
        if were_off:  # a LoRA layer wraps the projection, a trained copy stands next to it
            project = getattr(wrapper, "original_module", None) or wrapper.get_base_layer()

        def logits(states_CH: torch.Tensor) -> torch.Tensor:
            if not were_off and getattr(wrapper, "disable_adapters", False):
                raise ValueError("the reference has adapters on the head, which are off here")
            return finish(project(states_CH).float())

        return Distribution(hidden.detach(), logits)


@dataclass(frozen=True)
class TopK:
    """The likeliest tokens of other distributions. ids int64 [S, K], logprobs float32 [S, K]."""

    ids: torch.Tensor
    logprobs: torch.Tensor

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return self.ids, self.logprobs

    def divergence(
        self, logits_CV: torch.Tensor, parts: tuple[torch.Tensor, ...], beta: float,
        temperature: float,
    ) -> torch.Tensor:  # fmt: skip
        ids_CK, logprobs_CK = parts
        return divergence_from_top(logits_CV, ids_CK, logprobs_CK, beta, temperature)


Reference = Distribution | TopK
"""What a policy's distributions may be compared with."""


def logprobs_in_chunks(
    project: Project, hidden: torch.Tensor, labels: torch.Tensor, vocab_size: int,
    finish: LogitTransform, with_entropy: bool, temperature: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Return log-probabilities and entropies (or nothing) of hidden [S, H], labels int64 [S].

    Float32 [S], in nats; `temperature` divides the logits.
    """

    def of(states_CH: torch.Tensor, labels_C: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits_CV = finish(project(states_CH).float())
        return logprobs_and_entropy(logits_CV, labels_C, with_entropy, temperature)

    parts = cross_entropy.chunks(len(hidden), vocab_size * 4, cross_entropy.CHUNK_BYTES)
    logprobs, entropies = zip(
        *(checkpoint(of, hidden[part], labels[part], use_reentrant=False) for part in parts)
    )
    return torch.cat(logprobs), torch.cat(entropies)


def divergence_in_chunks(
    project: Project, hidden: torch.Tensor, vocab_size: int, finish: LogitTransform,
    reference: Reference, beta: float, temperature: float = 1.0,
) -> torch.Tensor:  # fmt: skip
    """Return the divergence of hidden [S, H] from a reference at the same tokens.

    Float32 [S], in nats; `beta` and `temperature` as in `logits.divergence`.
    """

    def of(states_CH: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        logits_CV = finish(project(states_CH).float())
        return reference.divergence(logits_CV, others, beta, temperature)

    # Two rows of logits for a token.
    parts = cross_entropy.chunks(len(hidden), vocab_size * 8, cross_entropy.CHUNK_BYTES)
    found = []
    for part in parts:
        others = (each[part] for each in reference.tensors)
        found.append(checkpoint(of, hidden[part], *others, use_reentrant=False))
    return torch.cat(found)


@torch.no_grad()
def predictions_in_chunks(
    project: Project, hidden: torch.Tensor, vocab_size: int, finish: LogitTransform
) -> torch.Tensor:
    """Return the likeliest token of each of hidden [S, H], int64 [S]."""
    parts = cross_entropy.chunks(len(hidden), vocab_size * 4, cross_entropy.CHUNK_BYTES)
    return torch.cat([finish(project(hidden[part]).float()).argmax(-1) for part in parts])
