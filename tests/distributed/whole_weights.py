"""Sample with whole weights between two steps: other numbers of passes, and no bit has moved."""

import os

import torch
from conftest import TINY_LLAMA, forget_process_state

from finetune import config as configs
from finetune.engine import optim
from finetune.engine.topology import Topology
from finetune.models import build, load

CONFIG = configs.from_dict({
    "run": {"name": "whole"}, "data": {"train": "x"},
    # DeepSpeed never parts weights of fewer than 100,000 numbers.
    "model": {"init": "random", "tokenizer": "bytes", "config": TINY_LLAMA | {"hidden_size": 384}},
    "train": {"global_batch_size": 2, "micro_batch_size": 1},
})  # fmt: skip
IDS = torch.arange(24)[None]
ASKED = dict(os.environ)  # which a topology turns off for Accelerate


def main() -> None:
    wanted, found = (trained(samples) for samples in (False, True))
    assert all(torch.equal(found[name], wanted[name]) for name in wanted)


def trained(samples: bool) -> dict[str, torch.Tensor]:
    """Make two steps; return all weights, on the main process."""
    forget_process_state()
    os.environ.update(ASKED)
    topology = Topology("fp32")
    shape, tokenizer = load.load_config(CONFIG.model), load.load_tokenizer(CONFIG.model)
    whole, _ = build.build(
        CONFIG, shape, tokenizer, attention="sdpa", precision="fp32", new_token_ids=[],
        device=topology.device, first_inputs=list,
    )  # fmt: skip
    model, optimizer = topology.prepare(
        whole, lambda shared: optim.build(shared, CONFIG.optimizer, False, 0), CONFIG
    )
    step(topology, model, optimizer)
    if samples:
        sample(topology, model, optimizer)
    step(topology, model, optimizer)
    return topology.full_weights(model, trained_only=False)


def step(topology, model, optimizer) -> None:
    sharing = topology.sharing
    with sharing.accumulate(model, last=True):
        sharing.backward(model(input_ids=IDS + topology.rank, labels=IDS).loss)
    norm = sharing.clip(model, 1.0)
    sharing.step(model, optimizer, 0.0 if norm is None else float(norm))


@torch.no_grad()
def sample(topology, model, optimizer) -> None:
    bare = topology.unwrap(model)

    def held():
        parts = [topology.sharing.local_shard(each).clone() for each in bare.parameters()]
        hooks = [(list(m._forward_pre_hooks), list(m._forward_hooks)) for m in bare.modules()]
        return parts, hooks

    sizes, wanted, (parts, hooks) = shapes(bare), bare(input_ids=IDS).logits, held()
    with topology.whole_weights(model):
        assert [tuple(each.shape) for each in bare.parameters()] == sizes
        assert all(type(each) is torch.nn.Parameter for each in bare.parameters())
        for _ in range(1 + 2 * topology.rank):
            assert torch.equal(bare(input_ids=IDS).logits, wanted)
    after, hooks_after = held()
    assert hooks_after == hooks
    assert all(map(torch.equal, after, parts))


def shapes(bare) -> list[tuple[int, ...]]:
    return [tuple(getattr(each, "ds_shape", each.shape)) for each in bare.parameters()]


if __name__ == "__main__":
    main()
