"""Measure speed, memory and utilisation of training, and of TRL and LitGPT if they are installed.

Rounds alternate between the cases until the time is up, in the order of CASES, the most important
first. The table has medians and the number of rounds; `speed.svg` draws it. A case that runs out of
memory says so, and longer ones of its series are left out.

8B: eight layers of Llama-3.1-8B's shape (2.8B parameters), whose kernels do what they do in all 32;
8B-32: all of them. 1B: Llama-3.2-1B. Each case is a process of its own that makes random weights on
the device (one_run.py, random_model.py): ours and TRL's are the same, as are adapters and rows, so
losses after the last step must agree. The first third of the steps is left out of the speeds.
"""

import contextlib
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
from on_gpu.report import LEFT_OUT, MEASURED, NO_TURN, OUT_OF_MEMORY, WRONG, median
from on_gpu.runner import ROOT, Ended, Row, last_words, run

PART = "speed"
LLAMA = {**LAYER, "vocab_size": 128256, "rope_theta": 500000.0, "max_position_embeddings": 131072}
SHAPES = {
    "8B": {**LLAMA, "num_hidden_layers": 8},
    "8B-32": {**LLAMA, "num_hidden_layers": 32},
    "1B": {
        **LLAMA, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "tie_word_embeddings": True,
    },
}  # fmt: skip
PACKS = {"8B": (8192, 1), "8B-32": (8192, 1), "1B": (2048, 4)}  # tokens, sequences at once
STEPS, ROUNDS = 12, 3
LONG, LONG_STEPS = 16384, 6  # steps over more tokens than LONG take seconds
CASE_SECONDS = 120.0  # compiling takes 20, steps over 131,072 tokens 10 to 20 each
LORA = {"adapter.kind": "lora", "adapter.r": 16}
QLORA = {**LORA, "adapter.kind": "qlora"}
RECOMPUTED = {"train.gradient_checkpointing": True}
OFFLOADED = {**RECOMPUTED, "train.activation_offload": True}
COMPILE = {"train.compile": True}
BF16 = {"model.dtype": "bfloat16"}
FLOAT8 = {"train.float8": True}  # which compiles the layers
TRL, LITGPT = "trl", "litgpt"
# Settings of cases alone. WITHOUT: kernels to leave out (FINETUNE_WITHOUT_KERNELS); LENGTH: tokens
# of a sequence, AT_ONCE: sequences of a step; SHORT: documents of 60 to 600 tokens instead of one.
WITHOUT, LENGTH, AT_ONCE, SHORT = "without", "tokens", "at once", "short documents"
OWN_ATTENTION = {WITHOUT: "flash_attention_3,flash_attention_4,cudnn"}
SHORT_TOKENS = 330  # of short documents, on average
LENGTHS = tuple(2**power for power in range(11, 18))  # 2,048 to 131,072
# Losses that should be equal differ by rounding: by less than this share of the first loss.
LOSS_WITHIN, FLOAT8_WITHIN = 5e-3, 2e-2
Cases = dict[str, tuple[str | None, dict[str, Any]]]


def series() -> Cases:
    """Return the cases of growing length, until memory ends; TRL recomputes, which fits most."""
    methods = {"lora": LORA, "full in bf16": BF16}
    trainers: dict[str, tuple[str | None, dict[str, Any]]] = {
        "": (None, COMPILE),
        ", offload": (None, COMPILE | OFFLOADED),
        ", TRL": (TRL, RECOMPUTED),
    }
    return {
        f"8B {method}, {length:,} tokens{ending}": (by, settings | more | {LENGTH: length})
        for method, settings in methods.items()
        for length in LENGTHS
        for ending, (by, more) in trainers.items()
    }


# name -> (topology, or TRL, or None for `python train.py`; settings); the most important first.
CASES: Cases = {
    "8B lora r 16": (None, LORA | RECOMPUTED),
    "8B lora r 16, TRL": (TRL, LORA | RECOMPUTED),
    "8B full in bf16": (None, BF16 | RECOMPUTED),
    "8B full in bf16, TRL": (TRL, BF16 | RECOMPUTED),
    "8B lora r 16, best": (None, LORA | COMPILE),
    "8B lora r 16, best, TRL": (TRL, LORA),
    "8B full in bf16, best": (None, BF16 | COMPILE),
    "8B full in bf16, best, TRL": (TRL, BF16),
    "8B packs lora": (None, LORA | COMPILE | {SHORT: True}),
    "8B packs lora, TRL": (TRL, LORA | {SHORT: True}),
    "8B qlora nf4": (None, QLORA | RECOMPUTED),
    "8B qlora nf4, TRL": (TRL, QLORA | RECOMPUTED),
    "8B lora r 16, best, LitGPT": (LITGPT, LORA),
    "8B full in bf16, best, LitGPT": (LITGPT, BF16),
    "8B lora r 16, compiled": (None, LORA | RECOMPUTED | COMPILE),
    "8B full in bf16, compiled": (None, BF16 | RECOMPUTED | COMPILE),
    "8B full in bf16, float8": (None, BF16 | RECOMPUTED | FLOAT8),
    "8B lora r 16, float8": (None, LORA | RECOMPUTED | FLOAT8),
    "8B lora r 16, defaults": (None, LORA),
    "8B full in bf16, defaults": (None, BF16),
    "8B lora r 16, FlashAttention-2": (None, LORA | RECOMPUTED | OWN_ATTENTION),
    "8B lora r 16, peft's products": (None, LORA | RECOMPUTED | {WITHOUT: "lora_products"}),
    "8B lora r 16, inputs cast": (
        None,
        LORA | RECOMPUTED | {WITHOUT: "lora_products,adapter_casts"},
    ),
    "8B lora r 16, plain norms and gates": (None, LORA | RECOMPUTED | {WITHOUT: "rms_norm,swiglu"}),
    "8B full in bf16, float8 rowwise": (None, BF16 | RECOMPUTED | {"train.float8": "rowwise"}),
    "8B full in bf16, plain optimizer": (None, BF16 | RECOMPUTED | {WITHOUT: "adamw_kernel"}),
    "8B full in bf16, plain loss": (None, BF16 | RECOMPUTED | {WITHOUT: "cross_entropy_kernel"}),
    "8B lora r 16, offload": (None, LORA | OFFLOADED),
    "8B qlora nf4, compiled": (None, QLORA | RECOMPUTED | COMPILE),
    "8B-32 lora r 16": (None, LORA | COMPILE),
    "8B-32 lora r 16, TRL": (TRL, LORA),
    "8B-32 lora r 16 twice 4,096": (None, LORA | COMPILE | {LENGTH: 4096, AT_ONCE: 2}),
    "8B-32 full in bf16": (None, BF16 | COMPILE),
    "8B-32 full in bf16, TRL": (TRL, BF16 | RECOMPUTED),
    "1B full": (None, {}),
    "1B full, TRL": (TRL, {}),
    "1B full, recomputed": (None, RECOMPUTED),
    "1B full, adamw_8bit": (None, {"optimizer.kind": "adamw_8bit"}),
    "1B full, paged_adamw_32bit": (None, {"optimizer.kind": "paged_adamw_32bit"}),
    "1B full, muon": (None, {"optimizer.kind": "muon"}),
    "1B lora r 16": (None, LORA),
    "1B lora r 16, TRL": (TRL, LORA),
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
    **series(),
}


@dataclass
class Found:
    """What the rounds of one case have measured."""

    speeds: list[float] = field(default_factory=list)
    memory_gb: float = 0.0
    mfu: list[float] = field(default_factory=list)
    flops: float = 0.0
    """Of a token, with recomputed layers."""
    first_step: float = 0.0
    """Seconds of the first step, with all that is compiled."""
    losses: list[float] = field(default_factory=list)
    """Of the first and the last step."""
    seconds: float = 0.0
    """Of its longest round."""
    problem: str = ""
    is_out_of_memory: bool = False


@dataclass(frozen=True)
class Case:
    """One case with what its name and its own settings say."""

    name: str
    by: str | None
    settings: dict[str, Any]
    """Of the run config."""
    own: dict[str, Any]
    size: str
    length: int
    at_once: int

    @staticmethod
    def of(name: str, by: str | None, settings: dict[str, Any], is_tiny: bool = False) -> "Case":
        own = {key: settings[key] for key in (WITHOUT, LENGTH, AT_ONCE, SHORT) if key in settings}
        size = name.split()[0]
        length, at_once = PACKS[size]
        length, at_once = own.get(LENGTH, length), own.get(AT_ONCE, at_once)
        rest = {key: value for key, value in settings.items() if key not in own}
        return Case(
            name, by, rest, own, size, 256 if is_tiny else length, 1 if is_tiny else at_once
        )

    @property
    def num_steps(self) -> int:
        return STEPS if self.length <= LONG else LONG_STEPS

    @property
    def needs_saved_weights(self) -> bool:
        """Topologies share saved weights out."""
        return self.by not in (None, TRL, LITGPT)


def rows(lab: memory.Lab, only: str) -> Iterator[Row]:
    """Run round after round, as long as a case's last round fits what is left."""
    chosen = {
        name: Case.of(name, *case, lab.is_tiny)
        for name, case in CASES.items()
        if re.search(only, name)
    }
    found = {name: Found() for name in chosen}
    left_out = {name: missing(lab, case) for name, case in chosen.items()}
    for number in range(1 if lab.is_tiny else ROUNDS):
        for name, case in chosen.items():
            own = found[name]
            left_out[name] = left_out[name] or too_long(case, chosen, found)
            ended = own.problem or own.is_out_of_memory or left_out[name]
            if not ended and lab.clock.left() > own.seconds:
                started = time.monotonic()
                one_round(lab, case, own)
                own.seconds = max(own.seconds, time.monotonic() - started)
                if own.speeds:
                    lab.log(
                        f"round {number + 1}: {name}: {own.speeds[-1]:,.0f} tokens/s, at "
                        f"{lab.clock.used():.0f} s"
                    )
    # A token takes as much arithmetic by TRL: its utilisation follows from ours.
    for name, case in chosen.items():
        ours = found.get(name.removesuffix(", TRL").removesuffix(", LitGPT"))
        if case.by in (TRL, LITGPT) and ours and ours.mfu and ours.speeds:
            found[name].mfu = [speed * ours.mfu[0] / ours.speeds[0] for speed in found[name].speeds]
    for name, case in chosen.items():
        yield row_of(case, found, left_out[name])


def too_long(case: Case, chosen: dict[str, Case], found: dict[str, Found]) -> str:
    """Return why not to try a length: a shorter one of its series ran out of memory."""
    for name, shorter in chosen.items():
        is_shorter = shorter.own.get(LENGTH, 0) < case.own.get(LENGTH, 0)
        if is_shorter and found[name].is_out_of_memory and _series(name) == _series(case.name):
            return "shorter sequences ran out of memory"
    return ""


def _series(name: str) -> str:
    return re.sub(r"[\d,]+ tokens", "", name)


def row_of(case: Case, found: dict[str, Found], left_out: str) -> Row:
    """Return the row of a case. `left_out`: why it cannot run here, if so."""
    name, own = case.name, found[case.name]
    if own.is_out_of_memory:
        return Row(PART, name, OUT_OF_MEMORY, "", own.seconds)
    if left_out:
        return Row(PART, name, LEFT_OUT, left_out)
    if own.problem:
        return Row(PART, name, WRONG, own.problem, own.seconds)
    if not own.speeds:
        why = "the time of this part was up; ONLY= picks cases, MINUTES=15 gives more"
        return Row(PART, name, NO_TURN, why)
    speed, trl = median(own.speeds) or 0.0, found.get(f"{name}, TRL")
    values = {
        "tokens/s": speed, "rounds": len(own.speeds),
        "x TRL": round(speed / (median(trl.speeds) or 1.0), 2) if trl and trl.speeds else "",
        "memory, GB": round(own.memory_gb, 2),
        "mfu": f"{median(own.mfu):.1%}" if own.mfu else "",
        "TFLOP/s": float(f"{speed * own.flops / 1e12:.4g}") if own.flops else "",
        "first step, s": round(own.first_step, 1),
        "last loss": own.losses[-1] if own.losses else None,
    }  # fmt: skip
    why = unequal(case, found)
    return Row(PART, name, WRONG if why else MEASURED, why, own.seconds, values)


def unequal(case: Case, found: dict[str, Found]) -> str:
    """Return how the losses of a case differ from those that should equal them, or "".

    TRL's are compared with ours at the same settings, those of our parts switched on or off with
    the plain case's. Which documents share a pack differs by trainer, so packs are not compared.
    After the last step only where both keep as many bits of what trains: TRL rounds bfloat16
    weights to the nearest, and QLoRA's adapters to bfloat16.
    """
    name, is_trl = case.name, case.by == TRL
    reference = name.removesuffix(", TRL") if is_trl else name.split(", ")[0]
    own, other = found[name], found.get(reference)
    if case.by == LITGPT:  # which makes weights of its own
        return ""
    if other is None or other is own or SHORT in case.own or not (own.losses and other.losses):
        return ""
    rounds_alike = not is_trl or case.settings.get("adapter.kind") == "lora"
    within = FLOAT8_WITHIN if case.settings.get("train.float8") else LOSS_WITHIN
    for when, place in (("first", 0), ("last", -1))[: 2 if rounds_alike else 1]:
        difference = abs(own.losses[place] - other.losses[place])
        if not difference <= within * other.losses[0]:
            return (
                f"its {when} loss is {own.losses[place]:.4f}, that of {reference} "
                f"{other.losses[place]:.4f}"
            )
    return ""


def missing(lab: memory.Lab, case: Case) -> str:
    """Return why a case cannot run here; empty if it can."""
    if case.by == TRL and TRL in lab.facts["left_out"]:
        return "needs trl"
    if case.by == LITGPT and LITGPT in lab.facts["left_out"] and not lab.env.get("LITGPT"):
        return "needs litgpt (LITGPT=its/bin/python)"
    if (case.by or "").startswith("zero") and "deepspeed" in lab.facts["left_out"]:
        return "needs deepspeed"
    if case.settings.get("train.precision") == "fp16" and not lab.facts.get("gpu"):
        return "needs a GPU"
    if case.settings.get("train.float8") and not has_float8(lab.facts):
        return "needs a GPU of compute capability 8.9 (Ada) or newer"
    return lab.missing(case.settings)


def one_round(lab: memory.Lab, case: Case, own: Found) -> None:
    """Run a case once and add to `own`; a run that its time cuts off adds nothing."""
    try:
        base, texts = prepared(lab, case)
    except RuntimeError as exc:
        own.problem = f"the model was not made: {exc}" if lab.clock.left() > 0 else ""
        return
    if case.by in (TRL, LITGPT):
        round_of_other(lab, case, base, texts, own)
        return
    lab.env["FINETUNE_WITHOUT_KERNELS"] = case.own.get(WITHOUT, "")
    path = lab.config(re.sub(r"[^a-z0-9_]+", "-", case.name.lower()), config_of(case, base, texts))
    command = None
    if not case.needs_saved_weights:
        script = ROOT / "benchmarks/on_gpu/one_run.py"
        command = [sys.executable, str(script), "--config", str(path)]
    ended, metrics = lab.train(path, CASE_SECONDS, case.by, command)
    steps = case.num_steps
    if ended.was_out_of_turn and len(metrics) < steps:
        return
    if len(metrics) < steps or (ended.code != 0 and not ended.was_out_of_turn):
        fail(own, "it", ended)
        return
    timed = metrics[steps // 3 :]
    own.speeds.append(median([line["tokens_per_second"] for line in timed]) or 0.0)
    if value := median([line["mfu"] for line in timed if "mfu" in line]):
        own.mfu.append(value)
    own.memory_gb = max(own.memory_gb, metrics[-1]["memory_gb"])
    own.first_step = own.first_step or metrics[0]["seconds"]
    own.losses = [metrics[0]["loss"], metrics[-1]["loss"]]
    if not own.flops and case.by is None:
        length = SHORT_TOKENS if SHORT in case.own else case.length
        with contextlib.suppress(RuntimeError):  # a column less
            own.flops = lab.helper.ask("work", 60, config=str(lab.resolved(path)), length=length)


def fail(own: Found, what: str, ended: Ended) -> None:
    own.is_out_of_memory = "out of memory" in ended.output.lower()
    if not own.is_out_of_memory:
        own.problem = f"{what} ended with {ended.code}: {last_words(ended.output)}"


def learning_rate(case: Case) -> float:
    """Adapters start at zero, and should have moved after the last step."""
    return 1e-3 if "adapter.kind" in case.settings else 1e-5


def config_of(case: Case, base: Path, texts: Path) -> dict[str, Any]:
    return {
        "model.path": str(base), "objective.kind": "clm", "data.train": str(texts),
        "data.packing": True, "data.truncation": "right", "data.max_length": case.length,
        "train.global_batch_size": case.at_once, "train.micro_batch_size": case.at_once,
        "train.max_steps": case.num_steps, "train.precision": "bf16",
        "train.epochs": 2 * case.num_steps, "optimizer.lr": learning_rate(case),
        "schedule.kind": "constant", **case.settings,
    }  # fmt: skip


def prepared(lab: memory.Lab, case: Case) -> tuple[Path, Path]:
    """Return the model of a shape, and texts of its length, each made once."""
    shape = memory.TINY if lab.is_tiny else SHAPES[case.size]
    base, kind = lab.work / case.size, "short" if SHORT in case.own else "same"
    if case.needs_saved_weights:
        base = base.with_name(f"{case.size}-saved")
        if not base.exists():
            lab.helper.ask(
                "make_base", lab.clock.left(), folder=str(base), shape=shape, dtype="bfloat16"
            )
    elif not base.exists():
        lab.helper.ask("make_folder", 60, folder=str(base), shape=shape)
    texts = lab.work / f"rows-{kind}-{case.length}.jsonl"
    if not texts.exists():
        of_sequence = 1 if kind == "same" else max(2, case.length // 300)
        number = STEPS * case.at_once * of_sequence
        lab.helper.ask(
            "make_rows", 60, path=str(texts), number=number, kind=kind, length=case.length - 2
        )
    return base, texts


def round_of_other(
    lab: memory.Lab, case: Case, base: Path, texts: Path, own: Found
) -> None:  # fmt: skip
    """Do the same by TRL's SFTTrainer, with Liger's kernels where they are installed, or LitGPT."""
    out = lab.work / "other"
    shutil.rmtree(out, ignore_errors=True)
    python, script = sys.executable, "trl_run.py"
    if case.by == LITGPT:
        python, script = lab.env.get("LITGPT") or python, "on_gpu/litgpt_steps.py"
    asked = asked_of(case, base, texts, out, set(lab.facts["left_out"]), bool(lab.facts.get("gpu")))
    command = [python, str(ROOT / "benchmarks" / script), json.dumps(asked)]
    log = lab.logs / f"{case.by}.log"
    ended = run(command, env=lab.env, log=log, limit=CASE_SECONDS, clock=lab.clock)
    measured = out / "measured.json"
    if ended.was_out_of_turn:
        return
    if ended.code != 0 or not measured.exists():
        fail(own, case.by or "", ended)
        return
    answer = json.loads(measured.read_text())
    steps = answer["steps"]
    own.speeds.append(
        median([tokens / seconds for tokens, seconds in steps[len(steps) // 3 :]]) or 0.0
    )
    own.memory_gb = max(own.memory_gb, answer["gpu_gb"])
    own.first_step = own.first_step or steps[0][1]
    own.losses = [answer["first_loss"], answer["last_loss"]]


def asked_of(
    case: Case, base: Path, texts: Path, out: Path, left_out: set[str], on_gpu: bool
) -> dict[str, Any]:
    """Return what trl_run.py or litgpt_steps.py is asked for: the case at TRL's best settings.

    One document fills a sequence, so SDPA takes cuDNN's kernel. In packs TRL keeps documents apart
    by FlashAttention only, if the package is there; with SDPA they attend to each other.
    """
    has_flash, settings = "flash_attn.flash_attn_interface" not in left_out, case.settings
    more: dict[str, Any] = {}
    if SHORT in case.own:
        more = {"packing": True, "padding_free": True}
        more["attn_implementation"] = "flash_attention_2" if has_flash and on_gpu else "sdpa"
    is_adapted = "adapter.kind" in settings
    return {
        "model": str(base), "rows": str(texts), "out": str(out), "steps": case.num_steps,
        "max_length": case.length, "precision": "bf16", "saves": False, "random": True,
        "dtype": "bfloat16" if is_adapted else settings.get("model.dtype", "float32"),
        "lora": {"r": 16, "lora_alpha": 32} if is_adapted else None,
        "qlora": settings.get("adapter.kind") == "qlora", "lr": learning_rate(case),
        "at_once": case.at_once,
        "settings": {
            "per_device_train_batch_size": case.at_once, "gradient_accumulation_steps": 1,
            "gradient_checkpointing": settings.get("train.gradient_checkpointing") is True,
            "learning_rate": learning_rate(case),
            "use_liger_kernel": on_gpu and "liger_kernel" not in left_out, **more,
        },
    }  # fmt: skip
