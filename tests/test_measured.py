"""What a GPU has measured stands beside the forecast, and gives a run its speed."""

import json
import sys
from concurrent.futures import Future

import pytest
import torch
from conftest import ROOT, TINY_LLAMA

sys.path.append(str(ROOT / "benchmarks"))
from on_gpu import correctness, helper, memory, memory_cases, recording
from on_gpu.runner import Clock, Row

from finetune import config as configs
from finetune import summary
from finetune.__main__ import main as command
from finetune.engine.topology.launch import ParallelConfig
from finetune.errors import ConfigError, ModelError
from finetune.forecast import fused, measured, outlook, speed, trace
from finetune.forecast.choice import Chooser
from finetune.forecast.command import _measured
from finetune.forecast.fused import LeanGate, LeanNorm
from finetune.forecast.measured import Measurement, Peak, Rate
from finetune.kernels import WITHOUT
from finetune.models import liger

pytestmark = pytest.mark.slow
GPU, ONE = "NVIDIA H100 80GB HBM3", ParallelConfig()
LLAMA = {**TINY_LLAMA, "num_hidden_layers": 1}
# Products of its layer, and of its head over 261 words.
LAYER, HEAD = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64, 261 * 32


def measurement(peaks=None, rates=None, **changes):
    """Rates by name: (adapter, compiled, TFLOP/s)."""
    of_rates = {
        name: Rate(tokens_per_second=1.0, tflops=rate, adapter=adapter, compiled=compiled)
        for name, (adapter, compiled, rate) in (rates or {}).items()
    }
    of_peaks = {
        name: Peak(forecast_gb=forecast, measured_gb=found)
        for name, (forecast, found) in (peaks or {}).items()
    }
    about = {
        "date": "2026-12-01", "command": "make gpu", "versions": {"torch": "2.13.0"},
        "memory_gb": 85.0,
    }  # fmt: skip
    return Measurement(**{**about, "peaks": of_peaks, "rates": of_rates, **changes})


def config_of(model=LLAMA, **changes):
    values = {"run": {"name": "x"}, "data": {"train": "x", "max_length": 128}, **changes}
    values["model"] = {"config": model, "init": "random", "tokenizer": "bytes"}
    values["train"] = {"global_batch_size": 8, "micro_batch_size": 4, **changes.get("train", {})}
    return configs.Config.model_validate(values)


def chooser_of(model=LLAMA, precision="bf16", **changes):
    return Chooser(config_of(model, **changes), precision=precision, on_gpu=True)


@pytest.fixture
def file(tmp_path, monkeypatch):
    """An own benchmarks/measured.json, which is not there yet."""
    path = tmp_path / "measured.json"
    monkeypatch.setattr(measured, "PATH", path)
    return path


@pytest.fixture(autouse=True)
def as_if_large(monkeypatch):
    """No GPU could launch the kernels of these models as fast as it computes them."""
    monkeypatch.setattr(outlook, "LAUNCH_SECONDS", 1e-12)


# ------------------------------------------------------------------------------------- the file


def test_what_is_measured_again_replaces_the_old_and_the_newest_stands_first(file):
    assert measured.read() == {}
    old = measurement(peaks={"full": (1, 2), "lora": (3, 4)}, rates={"8B": ("full", False, 300)})
    measured.add(GPU, old)
    assert measured.read() == {GPU: [old]}
    measured.add("NVIDIA L40S", old)
    new = measurement(peaks={"full": (1, 1.5)}, date="2026-12-02")
    measured.add(GPU, new)
    first, second = measured.read()[GPU]
    assert first == new
    assert (list(second.peaks), list(second.rates)) == (["lora"], ["8B"])
    assert list(outlook.peaks([first, second])) == [("full", 1, 1.5), ("lora", 3, 4)]
    measured.add(GPU, measurement(peaks={"lora": (3, 3)}, rates={"8B": ("full", False, 400)}))
    assert len(measured.read()[GPU]) == 2, "a measurement of which nothing is left goes"
    assert measured.read()["NVIDIA L40S"] == [old]


ZERO = (
    '{"x": [{"date": "", "command": "", "versions": {}, "memory_gb": 80, '
    '"peaks": {"a": {"forecast_gb": 1, "measured_gb": 0}}}]}'
)


@pytest.mark.parametrize(
    "text",
    ["", "[]", '{"x": 1}', '{"x": [{"date": 1}]}', '{"x": [{"unknown": 1}]}', ZERO, "[" * 100_000],
    ids=["empty", "list", "number", "incomplete", "unknown key", "zero", "deep"],
)
def test_a_damaged_file_is_an_error_that_names_it(file, text):
    file.write_text(text)
    with pytest.raises(ConfigError, match=r"measured\.json: cannot be read: .*: remove it"):
        measured.read()


def test_the_file_of_this_repository_can_be_read():
    assert isinstance(measured.read(), dict)


# ------------------------------------------------------------------------------------ the speed


def test_work_counts_recomputed_layers_and_no_second_head():
    """6 N + 12 x attention for what trains, 4 N for what is frozen; a layer's forward is 2 N."""
    chooser = chooser_of()
    model, attention = chooser.forecaster().model, 32 * 5
    whole = speed.work_of(model, chooser.model_config, 10, 1.0)
    assert whole.model == 6 * (LAYER + HEAD) + 12 * attention
    assert whole.recomputed == 2 * LAYER + 4 * attention
    half = speed.work_of(model, chooser.model_config, 10, 0.5)
    assert half.total == whole.model + whole.recomputed / 2


@pytest.mark.parametrize(
    ("wanted", "share"), [(True, 1.0), (False, 0.0), ("auto", 0.0), (1, 0.5), (9, 1.0)]
)
def test_the_share_of_layers_that_are_recomputed(wanted, share):
    config = config_of(train={"gradient_checkpointing": wanted})
    assert speed.share_recomputed(config, 2) == share
    assert speed.share_recomputed(config, 0) == 0.0


def test_a_run_is_compared_with_the_newest_case_like_it():
    known = [
        measurement(rates={"new": ("full", True, 500), "lora": ("lora", False, 200)}),
        measurement(rates={"old": ("full", False, 400), "older": ("full", False, 300)}),
    ]

    def case(**train):
        return speed.closest(known, config_of(train=train))[0]

    assert case(compile=True) == "new"
    assert case(compile=False) == case(compile="auto") == "old"
    assert speed.closest(known[:1], config_of(train={"compile": False}))[0] == "new"
    assert speed.closest(known[:1], config_of(optimizer={"kind": "lion"}))[0] == "new"
    assert speed.closest([measurement()], config_of()) is None
    eight = Rate(tokens_per_second=1.0, tflops=600, adapter="full", compiled=True, float8=True)
    both = [measurement().model_copy(update={"rates": {"float8": eight}}), *known]
    assert speed.closest(both, config_of(train={"compile": True}))[0] == "new"
    in_float8 = config_of(train={"compile": True, "float8": True, "precision": "bf16"})
    assert speed.closest(both, in_float8)[0] == "float8"
    assert speed.closest(known, in_float8)[0] == "new"


def test_speed_and_hours_follow_from_the_rate_of_the_chip():
    known = [measurement(rates={"8B full": ("full", False, 400)})]
    chooser = chooser_of(train={"gradient_checkpointing": True})
    work = speed.work_of(chooser.forecaster().model, chooser.model_config, 100, 1.0).total
    output = outlook.speed_of(chooser, ParallelConfig("ddp", 2), known, 100, num_tokens=1e12)
    tokens = 2 * 400e12 / work
    assert output == (
        f"about {tokens:,.0f} tokens/s, {1e12 / tokens / 3600:.1f} hours, if as fast as "
        "'8B full', 400 TFLOP/s (make gpu, 2026-12-01, torch 2.13.0)"
    )
    sampled = {"kind": "grpo", "rewards": [{"kind": "number"}], "rollouts": {"max_new_tokens": 9}}
    fast = outlook.speed_of(chooser_of(objective=sampled), ONE, known, 100, None)
    assert "tokens/s in learning; sampling comes on top, if as fast as" in fast
    assert outlook.speed_of(chooser, ONE, [], 100, None) == ""
    assert outlook.speed_of(chooser_of(precision="fp32"), ONE, known, 100, None) == "", (
        "other kernels"
    )


def test_a_model_whose_kernels_take_longer_to_launch_than_to_run_gets_no_speed(monkeypatch):
    """7 products of a layer, one of the head, about twice as many for gradients: 5 us each; 4
    sequences of 128 tokens at once."""
    monkeypatch.setattr(outlook, "LAUNCH_SECONDS", 5e-6)
    known = [measurement(rates={"8B": ("full", False, 400)})]
    chooser = chooser_of(train={"gradient_checkpointing": False})
    products = chooser.forecast(ONE).products
    assert 2 * 8 < products < 4 * 8
    most = 4 * 128 / (5e-6 * products)
    assert outlook.speed_of(chooser, ONE, known, 100, 1e12) == (
        f"too small to forecast: under {most:,.0f} tokens/s, as each of its matrix products takes "
        "5 us to launch"
    )


# --------------------------------------------------------------------- what a run and plan say


def lines(monkeypatch, gigabytes, **changes):
    monkeypatch.setattr(outlook, "capacity_here", lambda device: gigabytes * 1e9)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: GPU)
    about = ONE, torch.device("cuda"), "bf16", 1e12, 100.0
    return list(outlook.lines(config_of(**changes), *about))


def test_a_summary_on_a_gpu_ends_with_memory_and_speed(file, monkeypatch):
    measured.add(GPU, measurement(rates={"8B": ("full", False, 400)}))
    memory, fast = lines(monkeypatch, 80)
    assert memory == "memory      fits: 0.6 of 80.0 GB by forecast, 79.4 GB to spare"
    assert fast.startswith("speed       about ")
    file.unlink()
    [_, fast] = lines(monkeypatch, 80)
    assert fast == f"speed       not measured on {GPU} (make gpu PART=speed)"


def test_what_does_not_fit_gets_the_cheapest_change():
    train = {"gradient_checkpointing": True}
    chooser, two = chooser_of(train=train), chooser_of(train={**train, "micro_batch_size": 2})
    limit = (chooser.forecast(ONE).peak + two.forecast(ONE).peak) / 2
    assert outlook.fits(two, ONE, limit).startswith("fits: 0.6 of 0.6 GB by forecast, 0.0 GB to")
    output = outlook.fits(chooser, ONE, limit)
    assert output.startswith("does not fit: ")
    assert output.endswith("the cheapest change that fits: train.micro_batch_size: 2")


def test_what_cannot_be_forecast_ends_no_run(file, monkeypatch):
    def fail(*_, **__):
        raise ModelError("cannot be forecast")

    monkeypatch.setattr(Chooser, "forecast", fail)
    assert lines(monkeypatch, 80) == ["memory      not forecast: cannot be forecast"]
    monkeypatch.undo()
    file.write_text("{")
    monkeypatch.setattr(measured, "PATH", file)
    assert "speed       unknown: " in lines(monkeypatch, 80)[1]


def test_check_of_a_large_model_ends_with_its_memory(workshop, capsys, monkeypatch):
    monkeypatch.setattr(summary, "WORTH_A_FORECAST", 0)
    workshop.check(model__config=LLAMA)
    assert capsys.readouterr().out.splitlines()[-1].startswith("memory      fits: ")


def plan(capsys, workshop, *more):
    path = workshop.write(workshop.config("plan", model__config=LLAMA))
    assert command(["plan", "--config", str(path), "--gpu-memory", "80", *more]) == 0
    return capsys.readouterr().out


def test_plan_shows_what_was_measured_beside_its_forecast(file, workshop, capsys):
    single = ["--topology", "accelerate_configs/single.yaml"]
    [nothing] = _measured(chooser_of(), ONE, None, True)
    assert nothing.startswith("measured  nothing yet: `make gpu` on a GPU")
    peaks = {"full": (9.1, 9.87), "lora": (23.3, 22.8)}
    measured.add(GPU, measurement(peaks, {"8B": ("full", False, 400)}))
    output = plan(capsys, workshop, *single)
    assert "train.gradient_checkpointing: auto recomputes no layer: 0.6 of 76.0 GB" in output
    assert "  and kept free for fragmentation           4.00" in output
    *_, accuracy, head, full, lora, fast = output.splitlines()
    assert accuracy == (
        f"measured  on {GPU} forecasts were 0.92 to 1.02 of 2 peaks "
        "(make gpu, 2026-12-01, torch 2.13.0)"
    )
    assert head.split() == ["forecast,", "GB", "measured,", "GB"]
    assert (full.split(), lora.split()) == (["full", "9.10", "9.87"], ["lora", "23.30", "22.80"])
    assert fast.startswith("speed     on 1 GPU: about ")
    assert "hours" in fast, "train.max_steps says how many tokens there are"


# ------------------------------------------------------------------- the parts of a GPU's memory


def test_attention_on_a_gpu_needs_room_for_gradients_of_queries_in_float32():
    query, key = torch.zeros(1, 8, 10, 16), torch.zeros(1, 2, 10, 16)
    numbers = 8 * 10 * 16
    half = query.bfloat16(), key.bfloat16()
    assert trace.attention_workspace(*half) == (4 + 2 * 2) * numbers
    assert trace.attention_workspace(half[0], half[0]) == 4 * numbers
    assert trace.attention_workspace(query, key) == 0


def test_a_pass_on_a_gpu_holds_that_room_while_it_runs():
    ledger = trace.Ledger(on_gpu=True)
    query = torch.zeros(1, 4, 512, 8, dtype=torch.bfloat16, requires_grad=True)
    with ledger:
        out = torch.nn.functional.scaled_dot_product_attention(query, query, query, is_causal=True)
        before = ledger.passing
        out.sum().backward()
    assert ledger.most_passing >= before + trace.attention_workspace(query, query)


def test_products_in_float8_hold_their_operands_twice():
    """Inputs, or gradients, and weights of the largest product; a layer keeps 16 bits."""
    wide = LLAMA | {"hidden_size": 2048, "intermediate_size": 8192}
    in_bf16 = {"precision": "bf16", "compile": True}
    found = chooser_of(wide, train={**in_bf16, "float8": True}).forecast(ONE).device
    plain = chooser_of(wide, train=in_bf16).forecast(ONE).device
    assert found["float8"] == 2 * (4 * 128 * (2048 + 8192) + 2048 * 8192)
    assert found["activations"] == plain["activations"]
    assert "float8" not in plain


class Nothing:
    """A kernel that is not run: what counts is what is allocated around it."""

    def __getitem__(self, grid):
        return lambda *_, **__: None


def held(part, *given):
    """Return the bytes that are kept after forward, and the most that backward adds."""
    inputs, ledger = [each * 1 if each.dim() > 1 else each for each in given], trace.Ledger()
    for each in inputs:
        ledger.ignore(each)
    with ledger:
        out = part.fused(*inputs)
        kept = ledger.passing
        out.backward(torch.ones_like(out))
    return kept, ledger.most_passing - kept


def test_stand_ins_hold_what_ligers_kernels_hold(monkeypatch):
    rms_norm = pytest.importorskip("liger_kernel.ops.rms_norm")
    swiglu = pytest.importorskip("liger_kernel.ops.swiglu")
    for module in (rms_norm, swiglu):
        for name in filter(lambda name: name.endswith("ward_kernel"), dir(module)):
            monkeypatch.setattr(module, name, Nothing())
    for dtype in (torch.float32, torch.bfloat16):
        states, other = (torch.randn(512, 1024, dtype=dtype).requires_grad_() for _ in range(2))
        weight = torch.ones(1024, dtype=dtype)
        norm, gate = (1024, 1e-5, 0.0, True), (1024, "SwiGLU")
        assert held(liger.Norm(*norm), states, weight) == held(LeanNorm(*norm), states, weight)
        assert held(liger.Gate(*gate), states, other) == held(LeanGate(*gate), states, other)
        assert held(liger.Gate(*gate), states) == held(LeanGate(*gate), states), "side by side"


def test_norms_and_gates_by_kernels_keep_less(monkeypatch):
    """T tokens, width H, gates of M, in bf16, of a layer whose weights train in float32.

    A norm keeps no float32 copies of its input and of what it divides, a gate not what silu gives.
    """
    shape = trace.Shape(1, 100, 100)

    def kept(**train):
        config = config_of(train={"precision": "bf16", "gradient_checkpointing": False, **train})
        made = Chooser(config, precision="bf16", on_gpu=True).forecaster()._rehearsal(False)
        return made.trace(shape).kept

    monkeypatch.setattr(fused, "has_package", lambda name: False)
    plain = kept()
    monkeypatch.setattr(fused, "has_package", lambda name: name == "liger-kernel")
    by_liger = kept()
    assert plain - by_liger >= 100 * (2 * 4 * 32 + 2 * 64)
    monkeypatch.setenv(WITHOUT, "rms_norm,swiglu")
    assert kept() == plain
    assert kept(compile=True) == by_liger, "a compiler fuses them itself"


def test_the_kernel_of_the_loss_holds_no_logits_in_float32(monkeypatch):
    """PyTorch's operations hold a chunk in float32 twice: its logits, and their probabilities."""
    made = chooser_of(LLAMA | {"vocab_size": 50_000}).forecaster()._rehearsal(False)
    shape = trace.Shape(1, 1_280, 1_280)
    with_kernel = made.trace(shape, backward=False).passing
    monkeypatch.setenv(WITHOUT, "cross_entropy_kernel")
    without = made.trace(shape, backward=False).passing
    assert without - with_kernel > 2 * 4 * 50_000 * 1_280 - 4 * trace.KERNEL_BLOCK_BYTES


# ------------------------------------------------------------------------ what make gpu measures


def test_every_case_of_memory_is_a_run_that_starts():
    cases = memory_cases.cases()
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        own = {"run.name": "x", "model.path": "base", "data.train": "rows.jsonl"}
        values = {**own, "data.max_length": case.length, **memory.BASE, **case.settings}
        configs.from_dict(correctness.sections(values))
        assert set(case.shapes) <= memory_cases.SHAPES.keys()


def test_the_notes_figures_stand_beside_what_was_measured():
    """The whole table of OPT-350M: 16 settings by three kinds of attention; and Falcon-7B."""
    notes = {case.name: case.notes_mb for case in memory_cases.cases() if case.notes_mb}
    assert notes["OPT-350M full, eager"] == "15,071"
    assert notes["OPT-350M full, SDPA"] == "3,737"
    assert notes["OPT-350M full, inside documents"] == "3,742"
    assert notes["OPT-350M full, accumulated, inside documents"] == "2,807"
    assert notes["OPT-350M lora, recomputed, 8-bit AdamW, accumulated, inside documents"] == "1,595"
    assert notes["Falcon-7B int8, 2,000 tokens, recomputed"] == "12,280"
    assert len([name for name in notes if name.startswith("OPT")]) == 48


def test_two_depths_say_what_a_deeper_model_takes():
    """1 GB, and 0.25 GB a layer."""
    assert memory_cases.deeper((2.0, 3.0), (4, 8), 32) == 9.0


class Answers:
    """A helper that has run the cases."""

    def __init__(self, *peaks):
        self.peaks, self.restarts, self.asked = list(peaks), 0, []

    def ask(self, what, limit, **arguments):
        self.asked.append((what, arguments.get("card_gb")))
        peak, held = self.peaks.pop(0)
        if what == "forecast":
            return {"peak": 1e9 * peak, "outside": 0.6e9}
        return {"memory_gb": peak, "reserved_gb": peak + 0.5, "held_gb": held}

    def restart(self):
        self.restarts += 1


def measured_row(case, answers, tmp_path, forecast=None):
    facts = {"left_out": {}, "compiler": True, "gpu": GPU, "free_gb": 80.0}
    lab = memory.Lab(tmp_path, tmp_path, {}, facts, answers, Clock(60), False, print)
    paths = [tmp_path / f"{place}.yaml" for place, _ in enumerate(case.shapes)]
    return memory.measure(case, paths, forecast, lab)


def test_falcon_is_measured_at_two_depths_and_a_leaking_helper_replaced(tmp_path):
    forecast = Future()
    forecast.set_result({"peak": 9.6e9, "outside": 0.6e9})
    case = next(case for case in memory_cases.cases() if case.name.startswith("Falcon"))
    answers = Answers((2.0, 0.0), (3.0, 0.2))
    row = measured_row(case, answers, tmp_path, forecast)
    assert (row.status, row.reason, answers.restarts) == ("right", "", 1)
    assert row.values == {
        "forecast, GB": 9.0, "measured, GB": 9.0, "forecast / measured": 1.0,
        "reserved, GB": 9.5, "notes, MB": "15,050 or 13,957",
    }  # fmt: skip


def test_a_small_card_is_forecast_with_the_numbers_that_auto_took(tmp_path):
    case = next(case for case in memory_cases.cases() if case.card_gb == 8)
    answers = Answers((7.0, 0.0), (7.6, 0.0))
    assert measured_row(case, answers, tmp_path).status == "right"
    assert answers.asked == [("train", 8.0), ("forecast", None)]
    row = measured_row(case, Answers((8.1, 0.0), (8.6, 0.0)), tmp_path)
    assert (row.status, row.reason) == ("wrong", "it took more than 8 GB")


def test_make_gpu_records_what_plan_reads(file, tmp_path):
    facts = {"gpu": GPU, "memory_gb": 85.0, "versions": {"torch": "2.13.0"}, "driver": "580"}
    fast = {"tokens/s": 20_000.0, "TFLOP/s": 400.0}
    peak = {"forecast, GB": 9.1, "measured, GB": 9.87}
    rows = [
        Row("memory", "full", "right", values=peak),
        Row("memory", "lora", "wrong", values=peak),
        Row("memory", "qlora", "no turn"),
        Row("speed", "8B lora r 16", "measured", values=fast),
        Row("speed", "8B lora r 16, TRL", "measured", values=fast),
        Row("speed", "8B full in bf16, plain loss", "measured", values=fast),
        Row("speed", "1B full, fp16", "measured", values=fast),
        Row("speed", "1B full", "measured", values={"tokens/s": 1.0, "TFLOP/s": ""}),
    ]
    lines, out = [], tmp_path / "out"
    out.mkdir()
    recording.record(rows, facts, "make gpu PART=memory", out, lines.append)
    [found] = measured.read()[GPU]
    assert found.peaks == {
        name: Peak(forecast_gb=9.1, measured_gb=9.87) for name in ("full", "lora")
    }
    assert list(found.rates) == ["8B lora r 16"]
    assert found.rates["8B lora r 16"].adapter == "lora"
    assert found.versions == {"torch": "2.13.0", "driver": "580"}
    assert json.loads((out / "measured.json").read_text()).keys() == {GPU}
    recording.record([rows[2]], facts, "make gpu", out, lines.append)
    file.write_text("{")
    recording.record(rows, facts, "make gpu", out, lines.append)
    assert [line.split(" for `finetune plan`")[0] for line in lines] == ["recorded", "not recorded"]


def test_the_helper_counts_the_work_of_a_token(workshop):
    path = workshop.write(workshop.config("x", model__config=LLAMA, train__precision="bf16"))
    attention = 32 * 5
    assert helper.work(str(path), 10.0) == 6 * (LAYER + HEAD) + 12 * attention
