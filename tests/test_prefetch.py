"""A thread makes the batches of the next step while the current step trains."""

import errno
import threading

import pytest
import torch
from test_batches import batches_of

from finetune.data.batches import Batches
from finetune.data.prefetch import Prefetch
from finetune.errors import EXIT_FAILED, Outage


def ids(batches) -> list[list[int]]:
    return [batch.inputs["input_ids"].flatten().tolist() for batch in batches]


@pytest.mark.parametrize("packing", [False, True])
def test_steps_are_those_of_the_order_from_any_first_step(packing):
    """Two epochs and a part of a third: the thread is in the next epoch before the loop is."""
    plain = batches_of(packing=packing)
    num_steps = 2 * plain.steps_per_epoch + 2
    for first in (0, plain.steps_per_epoch - 1):
        ahead = Prefetch(batches_of(packing=packing), num_steps)
        for step in range(first, num_steps):
            made, totals = ahead.at(step)
            assert ids(made) == ids(plain.at(step))
            assert totals == plain.totals(step)
            assert ahead.batches.places(step) == plain.places(step)
        ahead.close()


def test_the_next_step_is_prepared_while_this_one_trains(monkeypatch):
    batches = batches_of()
    made, whole = [], batches.at
    monkeypatch.setattr(
        batches,
        "at",
        lambda step: (made.append((step, threading.current_thread())), whole(step))[1],
    )
    ahead = Prefetch(batches, num_steps=3)
    ahead.at(0)
    ahead._next[1].result()
    assert [step for step, _ in made] == [0, 1]
    ahead.at(1), ahead.at(2)
    assert [step for step, _ in made] == [0, 1, 2], "each step once, and none after the last"
    assert threading.main_thread() not in {thread for _, thread in made}


def test_an_error_belongs_to_its_step(monkeypatch):
    batches = batches_of()

    def at(step):
        if step == 1:
            raise OSError("the disk has gone")
        return []

    monkeypatch.setattr(batches, "at", at)
    ahead = Prefetch(batches, num_steps=3)
    ahead.at(0)
    with pytest.raises(OSError, match="the disk has gone"):
        ahead.at(1)


def test_an_error_in_the_thread_ends_the_run_with_its_message(workshop, monkeypatch):
    whole = Batches.totals

    def totals(batches, step):
        if step == 1:
            assert threading.current_thread() is not threading.main_thread()
            raise OSError(errno.EIO, "Input/output error", "rows.bin")
        return whole(batches, step)

    monkeypatch.setattr(Batches, "totals", totals)
    before = set(threading.enumerate())
    with pytest.raises(Outage, match=r"Input/output error: 'rows\.bin'") as caught:
        workshop.train(train__max_steps=3)
    assert caught.value.exit_code == EXIT_FAILED
    assert workshop.outcome()["state"] == "failed"
    assert workshop.outcome()["step"] == 1
    # One that goes on would keep the process from ending; other tests may have left some.
    for thread in set(threading.enumerate()) - before:
        if thread.name.startswith("prefetch"):
            thread.join(10)
            assert not thread.is_alive()


def test_a_gpu_gets_pinned_copies_of_this_processs_part(monkeypatch):
    pinned = []
    monkeypatch.setattr(
        torch.Tensor, "pin_memory", lambda tensor: pinned.append(tensor) or tensor.clone()
    )
    devices, parts = [], []
    monkeypatch.setattr(torch.cuda, "set_device", devices.append)
    ahead = Prefetch(
        batches_of(),
        1,
        part=lambda batch: parts.append(batch) or batch,
        device=torch.device("cuda"),
    )
    made, _ = ahead.at(0)
    tensors = {
        id(value)
        for batch in parts
        for value in [*vars(batch).values(), *batch.inputs.values()]
        if isinstance(value, torch.Tensor)
    }
    assert {id(tensor) for tensor in pinned} == tensors
    assert len(pinned) == len(tensors), "a tensor under two names is copied once"
    assert ids(made) == ids(parts)
    assert devices == [torch.device("cuda")], "the thread copies for the process's own GPU"


def test_padded_batches_are_pinned_too(monkeypatch):
    """Their positions are one row, expanded; PyTorch copies into the same strides and refuses."""

    def pin(tensor):
        return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype).copy_(tensor)

    batch = batches_of(padded=True).at(0)[0]
    with pytest.raises(RuntimeError, match="single memory location"):
        pin(batch.inputs["position_ids"])
    monkeypatch.setattr(torch.Tensor, "pin_memory", pin)
    positions = batch.pinned().inputs["position_ids"]
    assert positions.is_contiguous()
    assert torch.equal(positions, batch.inputs["position_ids"])
