"""Objectives as users would write them, each with a feature that cross-entropy lacks."""

import torch
from torch.nn.functional import logsigmoid

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
    """The first document of an example should be likelier than the second, by a margin."""

    def loss(self, policy, batch, settings, prepared):
        sums = policy.per_document(policy(batch, {"logprobs"}).logprobs, batch)
        assert torch.equal(batch.example[::2], batch.example[1::2])
        margin = 0.05 * (sums[::2] - sums[1::2]) - batch.columns["margin"][::2]
        return [
            Term("loss", -logsigmoid(margin).sum(), per="examples"),
            Term("margin", margin.detach().sum(), per="examples", weight=0.0),
        ]


class Scored(Objective):
    """A reward model (Bradley and Terry, 1952) whose tokens learn a value: two heads at once."""

    needs = frozenset({"scores", "values"})

    def loss(self, policy, batch, settings, prepared):
        answers = policy(batch, {"scores", "values", "entropy"})
        ahead = answers.scores[::2] - answers.scores[1::2]
        return [
            Term("loss", -logsigmoid(ahead).sum(), per="examples"),
            Term("ahead", ahead.detach().sum(), per="examples", weight=0.0),
            Term("value", (answers.values - 1).square().sum(), per="tokens", weight=0.1),
            # Only logged: nothing gives the output projection a gradient.
            Term("entropy", answers.entropy.detach().sum(), per="tokens", weight=0.0),
        ]


class Near(Objective):
    """Learns answers, but stays near the base: its divergence from it is of whole distributions."""

    def loss(self, policy, batch, settings, prepared):
        with torch.no_grad(), policy.without_adapters():
            base = policy(batch, {"distribution"}).distribution
        answers = policy(batch, {"nll", "divergence"}, reference=base, beta=0.5)
        return [
            Term("loss", answers.nll, per="tokens"),
            Term("divergence", answers.divergence.sum(), per="tokens", weight=0.5),
        ]


SURE = -5.0  # tiny models know little
SETTINGS = {
    name: {"objective__kind": f"{__file__}:{name}"}
    for name in ("Dft", "Unlikelihood", "Pairwise", "Scored")
}
for name in ("Pairwise", "Scored"):
    SETTINGS[name]["data__format"] = f"{__file__}:pairs"
SETTINGS["Near"] = {"objective__kind": f"{__file__}:Near", "adapter__kind": "lora"}


def pairs(row):
    """An answer and one that ends wrong, with a margin from the row."""
    good = {"question": row["question"], "answer": row["answer"]}
    bad = {**good, "answer": row["answer"].replace("so", "no") + " not"}
    return {"documents": [good, bad], "fields": {"margin": len(row["answer"]) / 100}}
