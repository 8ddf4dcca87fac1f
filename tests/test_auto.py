"""Settings that are auto for memory become numbers before a run builds its model."""

import functools
from types import SimpleNamespace

import pytest
import torch
from conftest import ROOT, TINY_LLAMA, short

from finetune import config as configs
from finetune import opening
from finetune.__main__ import main as command
from finetune.config.objective_fields import Ppo
from finetune.engine import gpu
from finetune.engine.topology.launch import ParallelConfig
from finetune.errors import ModelError
from finetune.forecast import choice, trace
from finetune.models import attention_choice, recompute

pytestmark = pytest.mark.slow

SINGLE = ParallelConfig("single", 1)
GPU = torch.device("cuda", 0)
SHAPE = {**TINY_LLAMA, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


def config_of(attention="auto", **train):
    return configs.from_dict({
        "run": {"name": "a"},
        "model": {
            "init": "random", "tokenizer": "bytes", "config": SHAPE, "attention": attention,
        },
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
    config, reserved = opening.sized(config_of(**train), topology)
    return config.train.micro_batch_size, config.train.gradient_checkpointing, reserved


def test_as_few_layers_are_recomputed_as_fit_with_room_to_spare(monkeypatch, capsys):
    peaks = [peak(number) for number in range(3)]
    assert peaks == sorted(peaks, reverse=True)
    for number in (1, 2):
        limit = peaks[number] / (1 - choice.ROOM) + 1
        assert sized(limit, monkeypatch, micro_batch_size=1) == (1, number, None)
    assert f"recomputes 2 of 2 layers: {peaks[2] / 1e9:.1f} of" in capsys.readouterr().out
    # What does not fit even so is tried all the same: a forecast may be wrong.
    assert sized(peaks[2] / 2, monkeypatch, micro_batch_size=1) == (1, 2, None)


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
    size, recomputed, _ = sized(peak(2) * 1.02, monkeypatch, micro_batch_size="auto")
    assert (size, recomputed) == (1, 2)


@pytest.mark.parametrize(
    ("limit", "given", "taken"),
    short(
        [
            (lambda: peak(0, size=2) / (1 - choice.ROOM) + 1e6, "auto", (2, False)),
            (lambda: peak(0, size=2) + 1e6, "auto", (2, 2)),
            (lambda: peak(0) + 1e6, "auto", (1, 2)),
            (lambda: peak(2) + 1e6, "auto", (1, 2)),
            GIVEN := (lambda: peak(1) / (1 - choice.ROOM) + 1e6, 1, (1, 1)),
        ],
        GIVEN,
    ),
    ids=["all kept", "some recomputed for room", "smaller", "smallest", "given"],
)
def test_plan_says_what_a_run_takes(monkeypatch, tmp_path, capsys, limit, given, taken):
    limit = limit()
    assert sized(limit, monkeypatch, micro_batch_size=given)[:2] == taken
    said = [line for line in capsys.readouterr().out.splitlines() if "recomputes" in line]
    file = tmp_path / "run.yaml"
    file.write_text(configs.to_yaml(config_of(micro_batch_size=given)))
    memory = str(limit / (1 - choice.SLACK) / 1e9)
    topology = str(ROOT / "accelerate_configs/single.yaml")
    assert command(["plan", str(file), "--topology", topology, "--gpu-memory", memory]) == 0
    output = capsys.readouterr().out.splitlines()
    assert [line for line in output if "recomputes" in line] == said
    (row,) = [line.split() for line in output if line.startswith("single ")]
    if given == "auto":  # else the column has the largest that fits
        assert row[6] == str(taken[0])
    assert float(row[3]) == pytest.approx(peak(int(taken[1]), size=taken[0]) / 1e9, abs=0.05)


@pytest.mark.parametrize("kernel", ["flash_attention_2", *attention_choice.BY_SETTING])
def test_a_kernel_that_only_a_gpu_has_is_forecast_as_ours(monkeypatch, kernel):
    found = sized(1e12, monkeypatch, micro_batch_size=1, attention=kernel)
    assert found == (1, False, None)
    chooser = choice.Chooser(config_of(attention=kernel), precision="bf16", on_gpu=True)
    assert chooser.attention == attention_choice.DOCUMENTS
    with pytest.raises(ModelError, match=f"{kernel} needs a CUDA device"):
        choice.Chooser(config_of(attention=kernel), precision="fp32", on_gpu=False)


def test_a_model_that_cannot_be_forecast_trains_without_recomputation(monkeypatch, capsys):
    def fails(*_):
        raise ValueError("no shapes")

    monkeypatch.setattr(trace.Rehearsal, "_loss", fails)
    assert sized(1e12, monkeypatch, micro_batch_size=1) == (1, False, None)
    said = "gradient_checkpointing: auto recomputes no layer: the memory of llama cannot be"
    assert said in capsys.readouterr().out
    with pytest.raises(ModelError, match="set train.micro_batch_size to a number"):
        sized(1e12, monkeypatch, micro_batch_size="auto")


@pytest.mark.parametrize("on_gpu", [True, False])
def test_a_forecast_of_auto_takes_what_it_may_come_to(on_gpu):
    chooser = choice.Chooser(config_of(micro_batch_size=1), precision="bf16", on_gpu=on_gpu)
    assert chooser.config.train.gradient_checkpointing is on_gpu


def compiled(
    monkeypatch, minutes, parallel=SINGLE, device=GPU, has_compiler=True, wanted="auto", **objective
):  # fmt: skip
    """Settle train.compile of a run that takes about so long on one H100."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(recompute, "has_compiler", lambda: has_compiler)
    topology = SimpleNamespace(
        device=device, parallel=parallel, num_processes=parallel.num_processes
    )
    tokens = minutes * 60 * gpu.SHARE_OF_PEAK * 989e12 / (6 * 8e9)
    config = config_of(micro_batch_size=1, compile=wanted)
    if objective:
        config = config.model_copy(update=objective)
    with torch._dynamo.config.patch(suppress_errors=False):
        config, line = gpu.with_compilation(config, topology, int(8e9), tokens)
        return config.train.compile, line, torch._dynamo.config.suppress_errors


def test_layers_of_a_long_run_on_a_gpu_are_compiled(monkeypatch):
    found, line, may_fail = compiled(monkeypatch, minutes=120)
    assert (found, may_fail) == (True, True)
    assert line == (
        "train.compile: auto compiles the layers, as the run takes about 120 minutes by arithmetic"
    )


@pytest.mark.parametrize(
    "case",
    [
        {"minutes": 1},
        {"minutes": 8, "parallel": ParallelConfig("ddp", 8)},
        {"minutes": 999, "device": torch.device("cpu")},
        {"minutes": 999, "has_compiler": False},
        {"minutes": 999, "parallel": ParallelConfig("zero3", 2)},
    ],
    ids=["short", "short for eight", "CPU", "no compiler", "topology"],
)
def test_layers_are_not_compiled_where_that_does_not_pay_or_cannot_be(monkeypatch, case):
    assert compiled(monkeypatch, **case) == (False, "", False)


def test_layers_that_score_what_they_learn_are_not_compiled(monkeypatch):
    """Only layers in training are, and compiled ones round otherwise: the ratio would not be 1."""
    ppo = Ppo(kind="ppo", rewards=[{"kind": "length", "most_tokens": 9, "grace_tokens": 3}])
    assert compiled(monkeypatch, minutes=999, objective=ppo) == (False, "", False)


@pytest.mark.parametrize("wanted", [True, False])
def test_a_given_compilation_stays_and_its_errors_end_the_run(monkeypatch, wanted):
    assert compiled(monkeypatch, minutes=120, wanted=wanted) == (wanted, "", False)


def test_inputs_of_layers_in_host_memory_are_forecast_there():
    """All but the newest leave the device; the host holds them in blocks of powers of two."""
    forecasts = []
    for offloads in (False, True):
        config = config_of(
            micro_batch_size=1, gradient_checkpointing=True, activation_offload=offloads
        )
        chooser = choice.Chooser(config, precision="bf16", on_gpu=True)
        forecasts.append(chooser.forecast(SINGLE))
    plain, moved = forecasts
    one = 4096 * SHAPE["hidden_size"] * 4  # float32: so are the weights, and what passes by
    saved = plain.device["activations"] - moved.device["activations"]
    assert saved == pytest.approx((SHAPE["num_hidden_layers"] - 1) * one, rel=0.01)
    assert moved.host["activations"] == SHAPE["num_hidden_layers"] * one
    assert "activations" not in plain.host
    on_cpu = choice.Chooser(config, precision="bf16", on_gpu=False).forecast(SINGLE)
    without = choice.Chooser(
        config_of(micro_batch_size=1, gradient_checkpointing=True), precision="bf16", on_gpu=False
    )
    assert on_cpu.peak == without.forecast(SINGLE).peak
