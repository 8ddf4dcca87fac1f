"""A companion: a frozen second model that answers beside the policy, by the same questions.

A teacher, or the weights before the first step where no column can keep their answers. It is shared
by the topology like the policy (a copy for each process, or shards), without an optimizer; of
quantised weights, which cannot be sent, each process loads a copy. Its
passes have neither gradient nor dropout.

A policy that compares its distributions with a companion's needs the companion's logits inside its
own pass, and again in its backward pass, when the companion's weights are shards. So each process
keeps the whole output projection of a sharded companion beside its shards: V x H numbers, 1 GB for
128,256 tokens and 4,096 hidden states in 16 bits.
"""

import copy
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from finetune.config import Config, Full, Quantized
from finetune.data.batches import Batch
from finetune.engine.topology import Topology, meta
from finetune.errors import ConfigError, ModelError
from finetune.models import adapters, attention_probe, base_identity, build, head
from finetune.models.distributions import Distribution, Project
from finetune.models.policy import Answers, Policy
from finetune.objectives.base import Objective


@dataclass(frozen=True)
class Companion:
    """policy: the frozen model. sha256: fingerprint of its weights, the same on every process.

    why_all_logits: why it holds a row of logits for each token that it is asked about; None if it
    need not.
    """

    policy: Policy
    sha256: str
    why_all_logits: str | None
    _logits: Project

    def __call__(self, batch: Batch, want: Iterable[str], **keywords: Any) -> Answers:
        """Run one pass; `want` and `keywords` as those of `Policy`. Collective.

        A distribution may be the `reference` of any later pass over the same batch.
        """
        with torch.no_grad():
            found = self.policy(batch, want, **keywords)
        if found.distribution is None or self.why_all_logits:
            return found
        return replace(found, distribution=Distribution(found.distribution.states, self._logits))


def start_of(config: Config, objective: Objective) -> Config | None:
    """Return the config of a run that would start from the weights before the first step.

    None: the objective compares with no such weights, or the model without its adapters has them.
    Raises ConfigError for adapters whose start nothing keeps.
    """
    adapter = config.adapter
    if not objective.wants_reference(config.objective) or adapters.leaves_base(adapter):
        return None
    if isinstance(adapter, Full) or adapter.path:
        return config
    if not adapters.starts_at_zero(adapter):
        raise ConfigError(
            f"adapter.init: {adapter.init} starts from other weights than the base's, which "
            "nothing keeps to compare with; use adapter.init: default, adapter.kind: full, or an "
            "objective that compares with no weights before the first step (wants_reference)"
        )
    return config.changed("adapter", init="default")  # fresh ones add 0, however they are drawn


def load(
    config: Config, topology: Topology, *, model_config: Any, tokenizer: Any, attention: str,
    new_token_ids: Iterable[int] = (),
) -> Companion:  # fmt: skip
    """Load the model that a run of `config` would start from, as a companion. Collective.

    The config's sections model and adapter say which; adapters have a path, or add 0 at first.
    `attention`: has to take the batches of the run. Raises ModelError.
    """
    config = build.frozen(config)
    is_quantized = isinstance(config.adapter, Quantized)
    with_weights = topology.is_main or is_quantized or config.adapter.kind == "qlora"
    whole, base = topology.on_every(lambda: build.build(
        config, model_config, tokenizer, attention=attention, precision=topology.precision,
        new_token_ids=list(new_token_ids), device=topology.device, first_inputs=list,
        with_weights=with_weights,
    ))  # fmt: skip
    whole.requires_grad_(False).eval()
    sha256 = _fingerprint(topology, whole, is_quantized)
    finish, why = head.probe(base)
    projection = base.get_output_embeddings()
    shards = topology.sharing.shards_frozen and finish is not None and not is_quantized
    kept = copy.deepcopy(projection) if shards else projection
    share = topology.sharing.copy_frozen if is_quantized else topology.sharing.share_frozen
    model = share(whole)
    if shards:
        _make_whole(kept, projection, topology)
    attention_probe.check(model, base, attention, topology.device, topology.precision)
    why = head.check(model, base, topology.device, topology.precision) or why

    def logits(states_CH: torch.Tensor) -> torch.Tensor:
        assert finish is not None
        with topology.arithmetic():
            return finish(kept(states_CH).float())

    return Companion(Policy(model), sha256, why, logits)


def _fingerprint(topology: Topology, whole: nn.Module, is_quantized: bool) -> str:
    """Return that of all weights. Raises ModelError if processes have loaded other ones."""

    def own() -> str:
        return base_identity.fingerprints(whole)[1]

    if not is_quantized:
        return topology.on_main(own)
    found = topology.processes.gather(topology.on_every(own))
    if len(set(found)) > 1:
        raise ModelError(
            f"objective.teacher: process {topology.rank} has other weights than others, and each "
            "loads a quantised teacher itself; put the same files on every machine"
        )
    return str(found[0])


def _make_whole(kept: nn.Module, shared: nn.Module, topology: Topology) -> None:
    """Give the copy of a module, which may be without weights, those of its shards."""
    if meta.is_empty(kept):
        meta.move(kept, topology.device)
    kept.to(topology.device)
    for name, weight in topology.sharing.full(list(shared.named_parameters())):
        kept.get_parameter(name).copy_(weight)
