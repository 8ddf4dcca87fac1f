"""Features that not every topology supports, for errors and the table of docs/topologies.md.

No torch.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatch

from finetune.config import Config
from finetune.engine.topology.launch import ParallelConfig


@dataclass(frozen=True)
class Feature:
    """A row of the table; `refused`: pattern of topologies -> why not, and what to take instead."""

    name: str
    setting: str
    used: Callable[[Config], bool]
    refused: dict[str, str]

    def reason(self, topology: str) -> str | None:
        """Return why a topology refuses the feature, or None."""
        reasons = (why for pattern, why in self.refused.items() if fnmatch(topology, pattern))
        return next(reasons, None)


def _optimizer(*kinds: str) -> Callable[[Config], bool]:
    return lambda config: config.optimizer.kind in kinds


def _quantized(*kinds: str) -> Callable[[Config], bool]:
    return lambda config: config.adapter.kind == "qlora" and config.adapter.quantization in kinds


def _trains_whole_modules(config: Config) -> bool:
    adapter = config.adapter
    return adapter.kind != "full" and bool(
        adapter.modules_to_save or adapter.train_norms or config.model.new_tokens
    )


FLAT = "ZeRO lays all weights end to end, and"
NO_SHARDS = "bitsandbytes cannot update shards of weights"
FP16 = "loss scaling with sharded gradients is untested; take bf16, or ddp.yaml"
FEATURES = [
    Feature("all weights", "adapter.kind: full", lambda c: c.adapter.kind == "full", {}),
    Feature(
        "all weights, some frozen", "adapter.freeze",
        lambda c: c.adapter.kind == "full" and bool(c.adapter.freeze),
        {"zero*": "DeepSpeed keeps no float32 copy of frozen weights; take fsdp2.yaml"},
    ),
    Feature(
        "all weights, in 16 bits", "model.dtype: bfloat16", lambda c: c.trains_in_16_bits,
        {"zero*": "DeepSpeed keeps float32 weights next to those of train.precision; take auto"},
    ),
    Feature("LoRA", "adapter.kind: lora", lambda c: c.adapter.kind == "lora", {}),
    Feature(
        "the same, with whole modules, norms or new tokens",
        "adapter.modules_to_save, adapter.train_norms, model.new_tokens", _trains_whole_modules, {},
    ),
    Feature(
        "the same, on a base set to 16 bits", "model.dtype: bfloat16",
        lambda c: _trains_whole_modules(c) and c.model.dtype == "bfloat16",
        {"zero*": "whole modules that DeepSpeed trains cannot be rounded to the base's dtype; "
         "take auto, or fsdp2.yaml"},
    ),
    Feature("QLoRA, 4 bits", "adapter.kind: qlora", _quantized("nf4", "fp4"), {}),
    Feature(
        "QLoRA, 8 bits", "adapter.quantization: int8", _quantized("int8"),
        {"fsdp2*": "bitsandbytes keeps scales on the unsharded weight, which sharding removes; "
         "take nf4, or ddp.yaml",
         "zero3*": "bitsandbytes keeps the whole weight next to each shard, so it saves no "
         "memory; take nf4, or zero2.yaml"},
    ),
    Feature("adamw", "optimizer.kind: adamw", _optimizer("adamw"), {}),
    Feature(
        "lion", "optimizer.kind: lion", _optimizer("lion"),
        {"fsdp2*": f"{NO_SHARDS}; take adamw, or zero2.yaml, or ddp.yaml"},
    ),
    Feature(
        "paged_adamw_32bit", "optimizer.kind: paged_adamw_32bit", _optimizer("paged_adamw_32bit"),
        {"fsdp2*": f"{NO_SHARDS}; take adamw, with fsdp2_offload.yaml if memory is short",
         "*_offload": "the optimizer state is already in host memory; take adamw"},
    ),
    Feature(
        "8-bit optimizers", "optimizer.kind",
        _optimizer("adamw_8bit", "paged_adamw_8bit", "lion_8bit"),
        {"fsdp2*": f"{NO_SHARDS}; take adamw: its state is already sharded",
         "zero*": f"{FLAT} would round embeddings to 8 bits with the rest; "
         "take adamw: its state is already sharded"},
    ),
    Feature(
        "adafactor", "optimizer.kind: adafactor", _optimizer("adafactor"),
        {"fsdp2*": "PyTorch's adafactor cannot update shards of weights; take adamw",
         "zero*": f"{FLAT} adafactor needs rows and columns; take adamw"},
    ),
    Feature(
        "muon", "optimizer.kind: muon", _optimizer("muon"),
        {"zero*": f"{FLAT} muon needs matrices; take adamw, or fsdp2.yaml"},
    ),
    Feature(
        "average of weights", "train.ema_decay", lambda c: c.train.ema_decay is not None,
        {"zero*": "DeepSpeed keeps its float32 weights to itself, so averages cannot replace "
         "them; take fsdp2.yaml"},
    ),
    Feature(
        "noise on embeddings", "train.neftune_alpha", lambda c: c.train.neftune_alpha is not None,
        {"*_context": "the noise depends on the length of documents, which several processes "
         "share; leave it out"},
    ),
    Feature(
        "gradient checkpointing", "train.gradient_checkpointing",
        lambda c: c.train.gradient_checkpointing not in (False, "auto"), {},
    ),
    Feature(
        "compiled layers", "train.compile", lambda c: c.train.compile is True,
        {"zero3*": "gathering weights inside the layers breaks the compiled graph; "
         "take fsdp2.yaml",
         "*_context": "processes exchange tokens inside the layers; untested, leave it out"},
    ),
    Feature(
        "float8 products", "train.float8", lambda c: bool(c.train.float8),
        {"zero3*": "it needs compiled layers; take fsdp2.yaml",
         "zero*": "DeepSpeed keeps all weights in 16 bits; untested, take ddp.yaml or fsdp2.yaml",
         "*_context": "it needs compiled layers; leave it out"},
    ),
    Feature(
        "largest micro-batch that fits", "train.micro_batch_size: auto",
        lambda c: c.train.micro_batch_size == "auto",
        {"zero*": "DeepSpeed counts trial passes as real micro-batches; "
         "take the number that `python -m finetune plan` finds"},
    ),
    Feature(
        "samples while training", "evaluation.sample_prompts",
        lambda c: bool(c.evaluation.sample_prompts), {},
    ),
    Feature(
        "fp16", "train.precision: fp16", lambda c: c.train.precision == "fp16",
        {"fsdp2*": FP16, "zero*": FP16},
    ),
]  # fmt: skip


def conflicts(config: Config, parallel: ParallelConfig) -> Iterator[str]:
    """Yield what the config asks for and the topology cannot do, and what to take instead."""
    for feature in FEATURES:
        if feature.used(config) and (why := feature.reason(parallel.name)):
            yield f"{feature.setting}: not with {parallel.name}: {why}"
