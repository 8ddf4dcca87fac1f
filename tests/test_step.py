"""What one optimizer step does, and what it does not."""

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from finetune import loop


class ScalarReads(TorchDispatchMode):
    """Counts what waits for a GPU: `item`, `float`, `if tensor`, and a list as the index of sums.

    PyTorch would send the list, and wait until it is there.
    """

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        is_indexed = func is torch.ops.aten.index_put_.default
        self.count += is_indexed and args[0].dtype == torch.float64
        return func(*args, **(kwargs or {}))


def test_host_waits_for_the_device_once_a_step(workshop, monkeypatch):
    """Sums, norm and requests travel in one tensor; attention on a CPU reads bounds in int32."""
    train_step, tolist, waits = loop.train_step, torch.Tensor.tolist, []

    def counted(tensor):
        if tensor.dtype != torch.int32:
            waits.append(tensor.shape)
        return tolist(tensor)

    def watched(*arguments, **keywords):
        waits.clear()
        with ScalarReads() as reads:
            result = train_step(*arguments, **keywords)
        assert len(waits) + reads.count == 1
        return result

    monkeypatch.setattr(torch.Tensor, "tolist", counted)
    monkeypatch.setattr(loop, "train_step", watched)
    workshop.train(data__packing=True, train__micro_batch_size=2, train__max_steps=2)
    assert waits
