"""Settings that are auto for memory become numbers before a run builds its model."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY_LLAMA

from finetune import config as configs
from finetune import run as runs
from finetune.engine.topology.launch import ParallelConfig
from finetune.forecast import choice

SINGLE = ParallelConfig("single", 1)
GPU = torch.device("cuda", 0)
SHAPE = {**TINY_LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}


def config_of(**train):
    return configs.from_dict({
        "run": {"name": "a"},
        "model": {"init": "random", "tokenizer": "bytes", "config": SHAPE},
        "data": {"train": "rows.jsonl", "max_length": 4096},
        "train": {"global_batch_size": 2, "precision": "bf16", **train},
    })  # fmt: skip


@functools.cache
def peak(recomputed, size=1):
    config = config_of(micro_batch_size=size, gradient_checkpointing=recomputed or False)
    chooser = choice.Chooser(config, precision="bf16", on_gpu=True)
    return chooser.forecast(SINGLE).peak


def sized(limit, monkeypatch, device=GPU, **train):
    """Settle a config as a process does whose GPU has `limit` bytes."""
    monkeypatch.setattr(choice, "capacity_here", lambda device: limit)
    topology = SimpleNamespace(
        device=device, precision="bf16", parallel=SINGLE, num_data=1, is_main=True,
        on_main=lambda work: work(), processes=SimpleNamespace(gather=lambda value: [value]),
    )  # fmt: skip
    config, reserved = runs.sized(config_of(**train), topology)
    return config.train.micro_batch_size, config.train.gradient_checkpointing, reserved


def test_as_few_layers_are_recomputed_as_fit_with_room_to_spare(monkeypatch, capsys):
    peaks = [peak(number) for number in range(4)]
    assert peaks == sorted(peaks, reverse=True)
    for number in range(4):
        limit = peaks[number] / (1 - choice.ROOM) + 1
        assert sized(limit, monkeypatch, micro_batch_size=1) == (1, number, None)
    assert f"recomputes 3 of 3 layers: {peaks[3] / 1e9:.1f} of" in capsys.readouterr().out
    # What does not fit even so is tried all the same: a forecast may be wrong.
    assert sized(peaks[3] / 2, monkeypatch, micro_batch_size=1) == (1, 3, None)


def test_a_given_number_of_layers_stays(monkeypatch):
    for given in (True, False, 3):
        found = sized(1e12, monkeypatch, micro_batch_size=1, gradient_checkpointing=given)
        assert found == (1, given, None)


def test_a_cpu_recomputes_nothing_by_itself(monkeypatch):
    cpu = torch.device("cpu")
    assert sized(1.0, monkeypatch, device=cpu, micro_batch_size=1) == (1, False, None)


def test_a_micro_batch_without_recomputation_is_looked_for_first(monkeypatch):
    limit = peak(0, size=2) + 1
    size, recomputed, reserved = sized(limit, monkeypatch, micro_batch_size="auto")
    assert size == 2
    assert reserved > 0
    assert recomputed > 0, "for room to spare"
    size, recomputed, _ = sized(peak(3) * 1.02, monkeypatch, micro_batch_size="auto")
    assert (size, recomputed) == (1, 3)


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_forecast_of_auto_takes_what_it_may_come_to(on_gpu):
    chooser = choice.Chooser(config_of(micro_batch_size=1), precision="bf16", on_gpu=on_gpu)
    assert chooser.config.train.gradient_checkpointing is on_gpu
