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
from finetune.models.logits import LogitTransform, divergence, logprobs_and_entropy

Project = Callable[[torch.Tensor], torch.Tensor]
"""The forward of an output projection: hidden [C, H] -> raw logits [C, V]."""


@dataclass(frozen=True)
class Distribution:
    """The distributions of a pass, without their logits; another pass may be compared with them.

    states [S, H]: what they are computed from, without gradient; logits: how, as float32 [C, V].
    Only good inside a pass of the same model, where its weights are whole.
    """

    states: torch.Tensor
    logits: Project

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
    reference: Distribution, beta: float,
) -> torch.Tensor:  # fmt: skip
    """Return the divergence of hidden [S, H] from a reference at the same tokens.

    Float32 [S], in nats; `beta` as in `logits.divergence`.
    """

    def of(states_CH: torch.Tensor, others_CH: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            others_CV = reference.logits(others_CH)
        return divergence(finish(project(states_CH).float()), others_CV, beta)

    # Two rows of logits for a token.
    parts = cross_entropy.chunks(len(hidden), vocab_size * 8, cross_entropy.CHUNK_BYTES)
    return torch.cat(
        [
            checkpoint(of, hidden[part], reference.states[part], use_reentrant=False)
            for part in parts
        ]
    )


@torch.no_grad()
def predictions_in_chunks(
    project: Project, hidden: torch.Tensor, vocab_size: int, finish: LogitTransform
) -> torch.Tensor:
    """Return the likeliest token of each of hidden [S, H], int64 [S]."""
    parts = cross_entropy.chunks(len(hidden), vocab_size * 4, cross_entropy.CHUNK_BYTES)
    return torch.cat([finish(project(hidden[part]).float()).argmax(-1) for part in parts])
