"""Three objectives as users would write them, each with a feature that cross-entropy lacks."""

from dataclasses import replace

import numpy as np
import torch
from torch.nn.functional import logsigmoid

from finetune.data.examples import Examples
from finetune.objectives import Objective, Term


class Dft(Objective):
    """Dynamic fine-tuning (Wu et al., 2025): cross-entropy weighted by its own probabilities."""

    def loss(self, policy, batch, settings, prepared):
        logprobs = policy(batch, {"logprobs"}).logprobs
        return [Term("loss", -(logprobs.exp().detach() * logprobs).sum(), per="tokens")]


class Unlikelihood(Objective):
    """Lowers confident predictions; divides by their number, which only a whole step knows."""

    def prepare(self, policy, batches, settings):
        sure = [(policy(batch, {"logprobs"}).logprobs > SURE).sum() for batch in batches]
        return {"sure": torch.stack(sure).sum()}

    def loss(self, policy, batch, settings, prepared):
        answers = policy(batch, {"nll", "logprobs"})
        is_sure = answers.logprobs > SURE
        against = -torch.log1p(-answers.logprobs.exp().clamp(max=1 - 1e-6))
        return [
            Term("loss", answers.nll, per="tokens"),
            Term("unlikelihood", (against * is_sure).sum(), per="sure", weight=0.1),
        ]


class Pairwise(Objective):
    """The first document of an example should be likelier than the second."""

    def loss(self, policy, batch, settings, prepared):
        sums = policy.per_document(policy(batch, {"logprobs"}).logprobs, batch)
        assert torch.equal(batch.example[::2], batch.example[1::2])
        margin = 0.05 * (sums[::2] - sums[1::2])
        return [
            Term("loss", -logsigmoid(margin).sum(), per="examples"),
            Term("margin", margin.detach().sum(), per="examples", weight=0.0),
        ]


SURE = -5.0  # tiny models know little
OBJECTIVES = {name: f"{__file__}:{name}" for name in ("Dft", "Unlikelihood", "Pairwise")}


def paired(examples: Examples) -> Examples:
    """Two rows an example, as rows of preferences will be."""
    count = len(examples) // 2
    return replace(
        examples.subset(np.arange(2 * count)), source=examples.source[:count],
        line=examples.line[:count], row=examples.row[:count],
        example_ends=2 * np.arange(1, count + 1),
    )  # fmt: skip


def pair():
    """Make pairs of the rows of every run from here on; returns what ends that."""
    from finetune import preflight

    prepare = preflight.examples.prepare
    preflight.examples.prepare = lambda *arguments, **keywords: paired(
        prepare(*arguments, **keywords)
    )

    def restore() -> None:
        preflight.examples.prepare = prepare

    return restore
