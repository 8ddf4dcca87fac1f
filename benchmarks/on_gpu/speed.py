"""Measure tokens a second, memory and utilisation of train.py, and of TRL if it is installed.

Rounds alternate between the cases until the time is up, in the order of CASES: at 25 to 30 seconds
a case, five minutes are enough for about ten. The table has medians and the number of rounds.

8B: eight layers of Llama-3.1-8B's shape (2.8B parameters), documents of 8,192 tokens, one a step,
all layers recomputed: kernels do what they do in all 32 layers, and a run takes half a minute. 1B:
Llama-3.2-1B, packs of 2,048 tokens, four at once. Each process reads random weights and trains
STEPS steps, of which the first WARM are left out.
"""

import json
import re
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from on_gpu import memory
from on_gpu.correctness import has_float8
from on_gpu.memory import LAYER
from on_gpu.report import LEFT_OUT, MEASURED, NO_TURN, WRONG, median
from on_gpu.runner import ROOT, Row, last_words, run

PART = "speed"
SHAPES = {
    "8B": {**LAYER, "num_hidden_layers": 8, "vocab_size": 128256, "rope_theta": 500000.0},
    "1B": {
        **LAYER, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
}  # fmt: skip
PACKS = {"8B": (8192, 1), "1B": (2048, 4)}  # tokens, sequences at once
STEPS, WARM, ROUNDS = 12, 4, 3
CASE_SECONDS = 75.0
LORA = {"adapter.kind": "lora", "adapter.r": 16}
QLORA = {**LORA, "adapter.kind": "qlora"}
RECOMPUTED = {"train.gradient_checkpointing": True}
COMPILE = {"train.compile": True}
BF16 = {"model.dtype": "bfloat16"}
FLOAT8 = {"train.float8": True}  # which compiles the layers
TRL = "trl"
WITHOUT = "without"
"""A setting of cases alone: kernels to leave out (FINETUNE_WITHOUT_KERNELS)."""
OWN_ATTENTION = {WITHOUT: "flash_attention_3,flash_attention_4,cudnn"}
# name -> (topology, or TRL, or None for `python train.py`; settings); the most important first.
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "8B lora r 16": (None, LORA | RECOMPUTED),
    "8B lora r 16, TRL": (TRL, LORA | RECOMPUTED),
    "8B lora r 16, compiled": (None, LORA | RECOMPUTED | COMPILE),
    "8B full in bf16": (None, BF16 | RECOMPUTED),
    "8B full in bf16, TRL": (TRL, BF16 | RECOMPUTED),
    "8B full in bf16, compiled": (None, BF16 | RECOMPUTED | COMPILE),
    "8B full in bf16, float8": (None, BF16 | RECOMPUTED | FLOAT8),
    "8B lora r 16, float8": (None, LORA | RECOMPUTED | FLOAT8),
    "8B lora r 16, defaults": (None, LORA),
    "8B full in bf16, defaults": (None, BF16),
    "8B lora r 16, FlashAttention-2": (None, LORA | RECOMPUTED | OWN_ATTENTION),
    "8B lora r 16, inputs cast": (None, LORA | RECOMPUTED | {WITHOUT: "adapter_casts"}),
    "8B lora r 16, plain norms and gates": (None, LORA | RECOMPUTED | {WITHOUT: "rms_norm,swiglu"}),
    "8B full in bf16, float8 rowwise": (None, BF16 | RECOMPUTED | {"train.float8": "rowwise"}),
    "8B full in bf16, plain optimizer": (None, BF16 | RECOMPUTED | {WITHOUT: "adamw_kernel"}),
    "8B full in bf16, plain loss": (None, BF16 | RECOMPUTED | {WITHOUT: "cross_entropy_kernel"}),
    "8B qlora nf4": (None, QLORA | RECOMPUTED),
    "8B qlora nf4, compiled": (None, QLORA | RECOMPUTED | COMPILE),
    "1B full": (None, {}),
    "1B full, recomputed": (None, RECOMPUTED),
    "1B full, adamw_8bit": (None, {"optimizer.kind": "adamw_8bit"}),
    "1B full, paged_adamw_32bit": (None, {"optimizer.kind": "paged_adamw_32bit"}),
    "1B full, muon": (None, {"optimizer.kind": "muon"}),
    "1B lora r 16": (None, LORA),
    "1B qlora nf4": (None, QLORA),
    "1B qlora int8": (None, {**QLORA, "adapter.quantization": "int8"}),
    "1B full, fp16": (None, {"train.precision": "fp16"}),
    "1B full, sdpa, padded": (None, {"model.attention": "sdpa", "data.packing": False}),
    "1B full, fsdp2": ("fsdp2", {}),
    "1B full, fsdp2_offload": ("fsdp2_offload", {}),
    "1B qlora nf4, fsdp2": ("fsdp2", QLORA),
    "1B full, zero2": ("zero2", {}),
    "1B full, zero3": ("zero3", {}),
    "1B full, zero3_offload": ("zero3_offload", {}),
    "1B qlora nf4, zero3": ("zero3", QLORA),
}


@dataclass
class Found:
    """What the rounds of one case have measured."""

    speeds: list[float] = field(default_factory=list)
    memory_gb: float = 0.0
    mfu: list[float] = field(default_factory=list)
    last_loss: float | None = None
    seconds: float = 0.0
    """Of its longest round."""
    problem: str = ""


def rows(lab: memory.Lab, only: str) -> Iterator[Row]:
    """Run round after round, as long as a case's last round fits what is left."""
    chosen = {name: case for name, case in CASES.items() if re.search(only, name)}
    found = {name: Found() for name in chosen}
    left_out = {name: missing(lab, *case) for name, case in chosen.items()}
    for number in range(1 if lab.is_tiny else ROUNDS):
        for name, (topology, settings) in chosen.items():
            own = found[name]
            if not left_out[name] and not own.problem and lab.clock.left() > own.seconds:
                started = time.monotonic()
                one_round(lab, name, topology, settings, own)
                own.seconds = max(own.seconds, time.monotonic() - started)
                if own.speeds:
                    lab.log(
                        f"round {number + 1}: {name}: {own.speeds[-1]:,.0f} tokens/s, at "
                        f"{lab.clock.used():.0f} s"
                    )
    # What a token costs in arithmetic is alike for TRL: its utilisation follows from ours at the
    # same method.
    for name, (topology, _) in chosen.items():
        ours = found.get(name.removesuffix(", TRL"))
        if topology == TRL and ours and ours.mfu and ours.speeds:
            found[name].mfu = [speed * ours.mfu[0] / ours.speeds[0] for speed in found[name].speeds]
    for name in chosen:
        yield row_of(name, found[name], left_out[name])


def row_of(name: str, own: Found, left_out: str) -> Row:
    """Return the row of a case. `left_out`: why it cannot run here, if so."""
    if left_out:
        return Row(PART, name, LEFT_OUT, left_out)
    if own.problem:
        return Row(PART, name, WRONG, own.problem, own.seconds)
    if not own.speeds:
        why = "the time of this part was up; ONLY= picks cases, MINUTES=15 gives more"
        return Row(PART, name, NO_TURN, why)
    values = {
        "tokens/s": median(own.speeds), "rounds": len(own.speeds),
        "memory, GB": round(own.memory_gb, 2),
        "mfu": f"{median(own.mfu):.1%}" if own.mfu else "", "last loss": own.last_loss,
    }  # fmt: skip
    return Row(PART, name, MEASURED, "", own.seconds, values)


def missing(lab: memory.Lab, topology: str | None, settings: dict[str, Any]) -> str:
    """Return why a case cannot run here; empty if it can."""
    if topology == TRL:
        return "needs trl" if TRL in lab.facts["left_out"] else ""
    if (topology or "").startswith("zero") and "deepspeed" in lab.facts["left_out"]:
        return "needs deepspeed"
    if settings.get("train.precision") == "fp16" and not lab.facts.get("gpu"):
        return "needs a GPU"
    if settings.get("train.float8") and not has_float8(lab.facts):
        return "needs a GPU of compute capability 8.9 (Ada) or newer"
    return lab.missing(settings)


def one_round(
    lab: memory.Lab, name: str, topology: str | None, settings: dict[str, Any], own: Found
) -> None:
    """Run a case once and add to `own`; a run that its time cuts off adds nothing."""
    size = name.split()[0]
    length, at_once = (256, 1) if lab.is_tiny else PACKS[size]
    try:
        base, texts = prepared(lab, size, length)
    except RuntimeError as exc:
        own.problem = f"the model was not made: {exc}" if lab.clock.left() > 0 else ""
        return
    if topology == TRL:
        trl_round(lab, base, texts, length, at_once, settings, own)
        return
    settings = dict(settings)
    lab.env["FINETUNE_WITHOUT_KERNELS"] = settings.pop(WITHOUT, "")
    values = {
        "model.path": str(base), "objective.kind": "clm", "data.train": str(texts),
        "data.packing": True, "data.truncation": "right", "data.max_length": length,
        "train.global_batch_size": at_once, "train.micro_batch_size": at_once,
        "train.max_steps": STEPS, "train.precision": "bf16", "optimizer.lr": 1e-5, **settings,
    }  # fmt: skip
    ended, metrics = lab.train(
        lab.config(re.sub(r"[^a-z0-9_]+", "-", name.lower()), values), CASE_SECONDS, topology
    )
    if ended.was_out_of_turn and len(metrics) < STEPS:
        return
    if len(metrics) < STEPS or (ended.code != 0 and not ended.was_out_of_turn):
        own.problem = f"ended with {ended.code}: {last_words(ended.output)}"
        return
    own.speeds.append(median([line["tokens_per_second"] for line in metrics[WARM:]]) or 0.0)
    if value := median([line["mfu"] for line in metrics[WARM:] if "mfu" in line]):
        own.mfu.append(value)
    own.memory_gb, own.last_loss = max(own.memory_gb, metrics[-1]["memory_gb"]), metrics[-1]["loss"]


def prepared(lab: memory.Lab, size: str, length: int) -> tuple[Path, Path]:
    """Return the model of a shape, and texts of its length, made once."""
    base, texts = lab.work / size, lab.work / f"rows-{length}.jsonl"
    if not texts.exists():
        shape = memory.TINY if lab.is_tiny else SHAPES[size]
        lab.helper.ask(
            "make_base", lab.clock.left(), folder=str(base), shape=shape, dtype="bfloat16"
        )
        lab.helper.ask(
            "make_rows", 60, path=str(texts), number=5 * STEPS, kind="texts", length=length - 2
        )
    return base, texts


def trl_round(
    lab: memory.Lab,
    base: Path,
    texts: Path,
    length: int,
    at_once: int,
    settings: dict[str, Any],
    own: Found,
) -> None:
    """Do the same by TRL's SFTTrainer, with Liger's kernels where they are installed."""
    out = lab.work / "trl"
    has_liger = bool(lab.facts.get("gpu")) and "liger_kernel" not in lab.facts["left_out"]
    asked = {
        "model": str(base), "rows": str(texts), "out": str(out), "steps": STEPS,
        "max_length": length, "precision": "bf16", "dtype": "bfloat16", "saves": False,
        "lora": {"r": 16, "lora_alpha": 32} if settings.get("adapter.kind") == "lora" else None,
        "settings": {
            "per_device_train_batch_size": at_once, "gradient_accumulation_steps": 1,
            "gradient_checkpointing": True, "learning_rate": 1e-5, "use_liger_kernel": has_liger,
        },
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "benchmarks/trl_run.py"), json.dumps(asked)]
    ended = run(command, env=lab.env, log=lab.logs / "trl.log", limit=CASE_SECONDS, clock=lab.clock)
    measured = out / "measured.json"
    if ended.was_out_of_turn:
        return
    if ended.code != 0 or not measured.exists():
        own.problem = f"TRL ended with {ended.code}: {last_words(ended.output)}"
        return
    answer = json.loads(measured.read_text())
    own.speeds.append(
        median([tokens / seconds for tokens, seconds in answer["steps"][WARM:]]) or 0.0
    )
    own.memory_gb, own.last_loss = max(own.memory_gb, answer["gpu_gb"]), answer.get("last_loss")
    shutil.rmtree(out, ignore_errors=True)
