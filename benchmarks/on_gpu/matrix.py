"""The cases of `make gpu PART=correctness`: what runs, and what must agree. Needs no torch.

A case is one real run of train.py with at least two saves. `beside` names the case whose losses,
gradient norms, evaluations and exported model it must have, within a tolerance that comes with its
reason.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

STEPS = 8
# Steps of runs that a signal interrupts: a signal that comes at step 3 must find them running
LONG = 40


@dataclass(frozen=True)
class Tolerance:
    """Largest relative differences of losses (steps, evaluations, export) and gradient norms."""

    loss: float
    norm: float
    why: str


# Seen on an H200 over 8 steps: 1.5e-7 in float32, 8e-5 with LoRA, 4e-3 for all weights in bf16
# under ZeRO. Norms are compared because Adam divides a wrong factor out of the losses again; they
# differ about ten times as much as losses do.
FLOAT32 = Tolerance(
    1e-5,
    1e-3,
    "float32 adds up in another order: 1.5e-7 was seen, and Adam's division lets it grow",
)
ADAPTERS = Tolerance(
    1e-3,
    2e-2,
    "the base is the same bf16 numbers, only adapters move: 8e-5 was seen, under ZeRO as well",
)
BF16 = Tolerance(
    6e-3,
    5e-2,
    "bf16 keeps 8 bits (one rounding is 3.9e-3); CUDA adds up gradients of attention in no fixed "
    "order",
)
ZERO_BF16 = Tolerance(
    1.2e-2, 1e-1, "ZeRO starts from rounded weights and computes norms in bf16: 4e-3 was seen"
)
COMPILED = Tolerance(
    1.2e-2, 1e-1, "a fused kernel keeps float32 where single operators round to bf16"
)
COMPILED_ADAPTERS = Tolerance(4e-3, 5e-2, "as compiled, but only adapters move")
FLOAT8 = Tolerance(
    3e-2, 3e-1, "a product in float8 is 4 to 6 % off; a wrong scale, or a missing gradient, more"
)
LAYOUT = Tolerance(
    2e-2,
    1e-1,
    "another kernel, shape of the products or precision, so every rounding to bf16 differs",
)
HALF = Tolerance(
    1e-2, 1e-1, "fp16 keeps 11 bits, bf16 autocast has no part in it; compared with float32"
)
CPU = Tolerance(
    1e-3,
    2e-2,
    "float32 by other kernels: Adam and Lion divide small gradients by themselves, so that "
    "roundings become steps",
)
EIGHT_BITS = Tolerance(
    1e-2, 5e-2, "8-bit state: a last bit of a gradient moves a value to the next of 256 codes"
)
IN_BF16_BY_DESIGN = Tolerance(
    1e-2, 5e-2, "Muon's matrix products are in bf16 by design, on either device"
)
SAME_START = Tolerance(
    2e-2, 1.0, "this start changes nothing of the function: the first loss is that of the base"
)
NEAR_START = Tolerance(1e-1, 1.0, "quantisation moves the first loss, but little")


@dataclass(frozen=True)
class Case:
    """One run. `settings`: section.field -> value, on top of BASE."""

    name: str
    settings: dict[str, Any] = field(default_factory=dict)
    topology: str | None = None
    """A file of accelerate_configs/, started with one process; None: `python train.py`."""
    beside: str | None = None
    within: Tolerance | None = None
    only_first: bool = False
    """Only the first step is comparable: what is trained then differs by design."""
    is_interrupted: bool = False
    """SIGTERM after a few steps must end it with 75; the same command then goes on."""
    then: str | None = None
    """The topology that goes on, if it is another one."""
    on_cpu: bool = False
    """A reference, run without the GPU."""
    needs: frozenset[str] = frozenset()
    """Packages, or "gpu", "ada", "hopper", "compiler": left out where they are missing."""


# Files for several nodes are those for one with an address in front; with one process they are the
# same code.
LEFT_OUT = {
    "cpu_debug": "for CPU processes",
    "ddp_multinode": "needs several nodes; one process of it is ddp",
    "fsdp2_multinode": "needs several nodes; one process of it is fsdp2",
    "fsdp2_hybrid_multinode": "needs several nodes; one process of it is fsdp2_hybrid",
    "zero3_multinode": "needs several nodes; one process of it is zero3",
}
# With one process: what these files need besides --num_processes 1.
SIZES = {
    "fsdp2_hybrid": [
        "--parallelism_config_dp_replicate_size", "1", "--parallelism_config_dp_shard_size", "1",
    ],
    "fsdp2_context": [
        "--parallelism_config_cp_size", "1", "--parallelism_config_dp_shard_size", "1",
    ],
}  # fmt: skip
TOPOLOGIES = ("single", "ddp", "fsdp2", "fsdp2_offload", "zero1", "zero2", "zero3", "zero3_offload")

BASE = {
    "data.packing": True, "data.eval_fraction": 0.1, "optimizer.lr": 1e-3,
    "train.precision": "bf16", "train.epochs": 99, "train.global_batch_size": 4,
    "train.micro_batch_size": 2, "train.max_steps": STEPS,
    "evaluation.every_steps": 4, "checkpoint.every_steps": 3,
}  # fmt: skip
LORA = {"adapter.kind": "lora", "adapter.r": 8}
QLORA = {"adapter.kind": "qlora", "adapter.r": 8}
METHODS = {"full": {}, "lora": LORA, "qlora": QLORA}
FP32 = {"train.precision": "fp32"}
RECOMPUTED = {"train.gradient_checkpointing": True}
COMPILE = {"train.compile": True}
UNPACKED = {"data.packing": False}
# Learning rates at which each optimizer learns in eight steps and does not diverge.
OPTIMIZERS = {
    "adamw": 1e-3, "adamw_8bit": 1e-3, "paged_adamw_32bit": 1e-3, "paged_adamw_8bit": 1e-3,
    "lion": 1e-4, "lion_8bit": 1e-4, "adafactor": 1e-3, "muon": 1e-3,
}  # fmt: skip
# Starts of adapters: (settings, whether the first loss must be that of the base).
STARTS = {
    "default": ({}, SAME_START), "gaussian": (LORA, SAME_START), "pissa": (LORA, SAME_START),
    "eva": (LORA, SAME_START), "loftq": (QLORA, NEAR_START), "random": (LORA, None),
}  # fmt: skip
QUANTIZATIONS = {"nf4": SAME_START, "fp4": NEAR_START, "int8": NEAR_START}


# One of each topology, method and precision, compiled and resumed, and what these are compared
# with: about what four cores have time for. If one of these has no turn, the exit code is 1; others
# are left out where time is short.
FIRST = (
    "plain-full", "compiled-full", "plain-lora", "plain-qlora", "cpu-adamw", "optimizer-adamw",
    "fp16", "long-full", "resumed-single",
    "ddp-full", "fsdp2-full", "zero2-full", "zero3-full", "fsdp2-lora", "fsdp2-qlora",
)  # fmt: skip


def cases() -> list[Case]:
    """Return all, the most important first, each after what it is compared with."""
    groups = (
        _methods, _precisions, _resumed, _compiled, _optimizers, _adapters, _layouts, _float8,
        _extras,
    )  # fmt: skip
    by_name = {case.name: _with_needs(case) for group in groups for case in group()}
    ordered: dict[str, Case] = {}
    for name in (*FIRST, *by_name):
        if (beside := by_name[name].beside) and beside not in ordered:
            for each in filter(None, (by_name[beside].beside, beside)):
                ordered.setdefault(each, by_name[each])
        ordered.setdefault(name, by_name[name])
    return list(ordered.values())


def chosen(found: list[Case], pattern: str) -> list[Case]:
    """Return the cases whose names match, and all that they are compared with."""
    by_name = {case.name: case for case in found}
    wanted = {name for name in by_name if re.search(pattern, name)}
    while references := {beside for name in wanted if (beside := by_name[name].beside)} - wanted:
        wanted |= references
    return [case for case in found if case.name in wanted]


def _methods() -> Iterable[Case]:
    """Give every topology with one process and every method, beside `python train.py`."""
    for method, settings in METHODS.items():
        yield Case(f"plain-{method}", settings)
        for topology in TOPOLOGIES:
            full = ZERO_BF16 if topology.startswith("zero") else BF16
            within = full if method == "full" else ADAPTERS
            yield Case(f"{topology}-{method}", settings, topology, f"plain-{method}", within)
    for topology in TOPOLOGIES[1:]:
        yield Case(f"{topology}-fp32", FP32, topology, "optimizer-adamw", FLOAT32)
    for topology in SIZES:
        yield Case(f"{topology}-full", {}, topology, "plain-full", BF16)


def _compiled() -> Iterable[Case]:
    yield Case("compiled-full", COMPILE, None, "plain-full", COMPILED)
    yield Case("compiled-recomputed", COMPILE | RECOMPUTED, None, "plain-full", COMPILED)
    both = LORA | COMPILE | RECOMPUTED
    yield Case("compiled-lora-recomputed", both, None, "plain-lora", COMPILED_ADAPTERS)
    yield Case("compiled-qlora", QLORA | COMPILE, None, "plain-qlora", COMPILED_ADAPTERS)
    yield Case("compiled-ddp", COMPILE, "ddp", "plain-full", COMPILED)
    yield Case("compiled-fsdp2", COMPILE, "fsdp2", "plain-full", COMPILED)
    yield Case("compiled-zero2", COMPILE, "zero2", "plain-full", COMPILED)
    yield Case("recomputed", RECOMPUTED, None, "plain-full", BF16)
    one_layer = {"train.gradient_checkpointing": 1}
    yield Case("recomputed-one-layer", one_layer, None, "plain-full", BF16)
    yield Case("recomputed-lora", LORA | RECOMPUTED, None, "plain-lora", ADAPTERS)
    offloaded = RECOMPUTED | {"train.activation_offload": True}
    yield Case("offloaded", offloaded, None, "plain-full", BF16)
    yield Case("offloaded-lora-fsdp2", LORA | offloaded, "fsdp2", "plain-lora", ADAPTERS)
    yield Case("offloaded-lora-compiled", LORA | offloaded | COMPILE, None, "plain-lora",
               COMPILED_ADAPTERS)  # fmt: skip


def _precisions() -> Iterable[Case]:
    """bf16 is BASE; fp32 is `optimizer-adamw` and the topologies; fp16 here."""
    yield Case("bf16-beside-fp32", {}, None, "optimizer-adamw", LAYOUT)
    yield Case("fp16", {"train.precision": "fp16"}, None, "optimizer-adamw", HALF)
    yield Case("fp16-ddp", {"train.precision": "fp16"}, "ddp", "optimizer-adamw", HALF)
    yield Case("fp16-lora", LORA | {"train.precision": "fp16"}, None, "plain-lora", LAYOUT)
    yield Case("fp16-qlora", QLORA | {"train.precision": "fp16"}, None, "plain-qlora", LAYOUT)
    yield Case("bf16-weights", {"model.dtype": "bfloat16"}, None, "plain-full", LAYOUT)


def resumed() -> Tolerance:
    """Return what the project states of a resumption in float32 on a GPU.

    Imported late, as gpu.py first names packages that are missing.
    """
    from finetune.replay import NORM, TOLERANCE

    part = TOLERANCE["fp32"]
    why = "as docs/spot.md states; CUDA adds up in no fixed order, so not to the bit"
    return Tolerance(part, NORM * part, why)


def _resumed() -> Iterable[Case]:
    within = resumed()
    long = FP32 | {"train.max_steps": LONG, "evaluation.every_steps": 20}
    yield Case("long-full", long)
    for topology in ("single", "ddp", "fsdp2", "zero2", "zero3"):
        yield Case(f"resumed-{topology}", long, topology, "long-full", within, is_interrupted=True)
    yield Case(
        "resumed-elsewhere", long, "single", "long-full", within, is_interrupted=True, then="fsdp2"
    )
    yield Case("long-lora", LORA | long)
    yield Case("resumed-lora", LORA | long, None, "long-lora", within, is_interrupted=True)
    yield Case("long-qlora", QLORA | long)
    yield Case("resumed-qlora", QLORA | long, None, "long-qlora", within, is_interrupted=True)


def _optimizers() -> Iterable[Case]:
    """Give each in float32, beside the same on the CPU, where everything else was proved."""
    for kind, lr in OPTIMIZERS.items():
        settings = FP32 | {"optimizer.kind": kind, "optimizer.lr": lr}
        within = (
            EIGHT_BITS if kind.endswith("8bit") else IN_BF16_BY_DESIGN if kind == "muon" else CPU
        )
        yield Case(f"cpu-{kind}", settings, on_cpu=True)
        yield Case(f"optimizer-{kind}", settings, None, f"cpu-{kind}", within)


def _adapters() -> Iterable[Case]:
    """Give each start of adapters. It draws random numbers: only the first loss is compared."""
    for init, (method, within) in STARTS.items():
        if init != "default":  # that is plain-lora
            beside = "plain-lora" if within else None
            settings = method | {"adapter.init": init}
            yield Case(f"init-{init}", settings, None, beside, within, only_first=True)
    for kind, within in QUANTIZATIONS.items():
        if kind != "nf4":  # that is plain-qlora
            settings = QLORA | {"adapter.quantization": kind}
            yield Case(f"qlora-{kind}", settings, None, "plain-lora", within, only_first=True)
    dora = QLORA | {"adapter.dora": True}
    yield Case("qlora-dora", dora, None, "plain-qlora", SAME_START, only_first=True)
    for name, own in {
        "dora": {"adapter.dora": True},
        "rslora": {"adapter.rslora": True},
        "lora-whole-modules": {"adapter.train_norms": True, "adapter.modules_to_save": ["lm_head"]},
        "lora-new-tokens": {"model.new_tokens": ["<|a|>"]},
        "dropout": {"adapter.dropout": 0.1},
    }.items():
        yield Case(name, LORA | own, None, "plain-lora", SAME_START, only_first=True)


def _layouts() -> Iterable[Case]:
    """Give the same examples in the same steps, padded or end to end; packs hold others."""
    yield Case("unpacked", UNPACKED)
    yield Case("padded-sdpa", UNPACKED | {"model.attention": "sdpa"}, None, "unpacked", LAYOUT)
    yield Case("padded-eager", UNPACKED | {"model.attention": "eager"}, None, "unpacked", LAYOUT)
    grouped = {"data.group_by_length": True, "model.attention": "sdpa"}
    yield Case("grouped-by-length", UNPACKED | grouped)
    yield Case("one-at-a-time", {"train.micro_batch_size": 1}, None, "plain-full", BF16)
    yield Case("as-many-as-fit", {"train.micro_batch_size": "auto"}, None, "plain-full", BF16)
    # cudnn is for long documents; tests/test_gpu.py compares it with float32.
    kernels = {
        "documents": set(), "flash_attention_2": {"flash_attn.flash_attn_interface"},
        "flash_attention_3": {"flash_attn_interface", "hopper"},
        "flash_attention_4": {"flash_attn.cute", "hopper"},
    }  # fmt: skip
    for attention, own in kernels.items():
        name, settings = f"attention-{attention}", {"model.attention": attention}
        yield Case(name, settings, None, "plain-full", LAYOUT, needs=frozenset({"gpu", *own}))


def _float8() -> Iterable[Case]:
    """Give the loss curve of a model whose products are large enough, beside bf16's."""
    shape = {
        "model_type": "llama", "hidden_size": 2048, "intermediate_size": 4096,
        "num_hidden_layers": 2, "num_attention_heads": 16, "num_key_value_heads": 4,
        "max_position_embeddings": 1024,
    }  # fmt: skip
    wide = COMPILE | {
        "model.path": None, "model.init": "random", "model.tokenizer": "bytes",
        "model.config": shape, "optimizer.lr": 3e-4, "train.max_steps": 24,
    }  # fmt: skip
    needs = frozenset({"gpu", "ada"})
    yield Case("wide", wide, needs=needs)
    for name, kind in (("float8", True), ("float8-rowwise", "rowwise")):
        yield Case(name, wide | {"train.float8": kind}, None, "wide", FLOAT8, needs=needs)
    settings = wide | {"train.float8": True}
    yield Case("float8-fsdp2", settings, "fsdp2", "wide", FLOAT8, needs=needs)
    yield Case("float8-ddp", settings, "ddp", "wide", FLOAT8, needs=needs)


def _extras() -> Iterable[Case]:
    sampling = {
        "evaluation.sample_prompts": ["what is 3 times three"], "evaluation.sample_every_steps": 4,
        "evaluation.sample_max_new_tokens": 8,
    }  # fmt: skip
    yield Case("samples", sampling, None, "plain-full", BF16)
    yield Case("ema", {"train.ema_decay": 0.9}, None, "plain-full", BF16, only_first=True)
    yield Case("neftune", {"train.neftune_alpha": 5.0})
    yield Case("label-smoothing", {"objective.label_smoothing": 0.1})
    best = {"evaluation.export_best": True, "checkpoint.every_steps": 2}
    yield Case("export-best", best, None, "plain-full", BF16)
    waiting = {"checkpoint.asynchronous": False}
    yield Case("saves-in-the-foreground", waiting, None, "plain-full", BF16)


def _with_needs(case: Case) -> Case:
    found = set(case.needs) | needs(case.settings)
    if any((topology or "").startswith("zero") for topology in (case.topology, case.then)):
        found.add("deepspeed")
    return replace(case, needs=frozenset(found))


def needs(settings: Mapping[str, Any]) -> set[str]:
    """Return what a run with these settings needs besides what every run does."""
    found = set()
    quantizes = settings.get("adapter.kind") == "qlora" or settings.get("adapter.init") == "loftq"
    if quantizes or re.search("8bit|paged|lion", settings.get("optimizer.kind", "")):
        found.add("bitsandbytes")
    if settings.get("train.compile") or settings.get("train.float8"):
        found.add("compiler")
    if settings.get("train.float8"):
        found.add("torchao")
    if settings.get("train.precision") == "fp16":
        found.add("gpu")
    return found
