"""Which kernels of a GPU a run takes; what a run on a GPU says of them."""

from collections.abc import Iterator
from typing import Any

import torch

from finetune.config import Config
from finetune.data.batches import Batches
from finetune.engine.chips import peak_rate
from finetune.engine.topology import Topology, support
from finetune.models import float8, liger, logits, recompute, varlen_choice, varlen_gpu
from finetune.models.attention_choice import BOTH_WAYS, BY_SETTING, DOCUMENTS

# What compiling takes at the first step on a GPU, and how much longer a run should be.
COLD_START, EARNED = 20.0, 15
# Floating-point operations a second of a run before it has run: two fifths of the chip's peak, or
# of an older GPU's.
SHARE_OF_PEAK, SLOW_GPU = 0.4, 100e12
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


def with_compilation(
    config: Config, topology: Topology, num_parameters: int, num_tokens: float
) -> tuple[Config, str]:
    """Replace train.compile: auto; where layers are compiled, return a line that says so."""
    if config.train.compile != "auto":
        return config, ""
    compiled = config.changed("train", compile=True)
    if topology.device.type == "cuda" and config.train.float8:
        return compiled, "train.compile: auto compiles the layers, as train.float8 needs it"
    # Only layers that learn are compiled: what scores completions before would round otherwise.
    can_compile = recompute.has_compiler() and not config.rollouts
    if topology.device.type == "cuda" and can_compile:
        peak = peak_rate(torch.cuda.get_device_name(topology.device)) or SLOW_GPU
        operations = 6 * num_parameters * num_tokens / topology.num_processes
        seconds = operations / (SHARE_OF_PEAK * peak)
        forbidden = any(support.conflicts(compiled, topology.parallel))
        if seconds > EARNED * COLD_START and not forbidden:
            # What the compiler fails at runs as it is, with a warning: auto must not end a run.
            torch._dynamo.config.suppress_errors = True
            return compiled, (
                f"train.compile: auto compiles the layers, as the run takes about "
                f"{seconds / 60:,.0f} minutes by arithmetic"
            )
    return config.changed("train", compile=False), ""


def take_kernels(
    config: Config, topology: Topology, base: Any, attention: str, train: Batches, optimizer: Any
) -> Iterator[str]:
    """Choose the kernels of attention, norms, gates and the loss; yield which, and why not some.

    `base`: the model inside its wrappers.

    The main process times them, and all take the same. Raises ModelError if the kernel that
    model.attention names cannot be used.
    """
    if topology.device.type != "cuda":
        return
    if config.train.float8:
        yield topology.on_main(lambda: float8.check(base, topology.device))
    if attention in (DOCUMENTS, BOTH_WAYS) and topology.precision in DTYPES:
        work = varlen_choice.work_of(
            base.config, DTYPES[topology.precision], train.largest().lengths,
            train.sequences.examples.document_lengths(), topology.parallel.num_context,
            causal=attention == DOCUMENTS,
        )  # fmt: skip
        named = config.model.attention if config.model.attention in BY_SETTING else None
        kernel, line = topology.on_main(lambda: varlen_choice.choose(work, topology.device, named))
        varlen_gpu.use(kernel)
        yield f"attention inside documents by {line}"
    yield from liger.install(
        base, on_main=topology.on_main, device=topology.device,
        dtypes=[torch.float32, *filter(None, [DTYPES.get(topology.precision)])],
        compiled=recompute.layers(base) if config.train.compile is True else (),
    )  # fmt: skip
    if why := logits.fused(topology.device)[1]:
        yield f"note: the loss takes several passes over the logits for two, because {why}"
    if why := getattr(optimizer, "note", ""):
        yield f"note: the optimizer takes some 15 passes over the weights for one, because {why}"
