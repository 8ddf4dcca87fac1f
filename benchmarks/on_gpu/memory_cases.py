"""What `make gpu PART=memory` measures: methods, the notes' tables, and small cards.

The notes on fine-tuning that this project grew from list peaks of memory (Voigt Godoy, 2024), each
for attention as it is written down (eager), by SDPA, and by FlashAttention-2.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import product
from typing import Any

from on_gpu.correctness import TINY as TINY_LLAMA

LAYER = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336,
    "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 16384,
}  # fmt: skip
FALCON = {
    "model_type": "falcon", "hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65024,
    "alibi": False, "multi_query": True, "parallel_attn": True, "new_decoder_architecture": False,
    "bias": False,
}  # fmt: skip
FALCON_LAYERS = 32
SHAPES: dict[str, dict[str, Any]] = {
    # Few words, tied: embeddings of 128,256 would be most of two layers.
    "8B": {**LAYER, "num_hidden_layers": 2, "vocab_size": 32000, "tie_word_embeddings": True},
    "1B": {
        **LAYER, "hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16,
        "vocab_size": 128256, "tie_word_embeddings": True,
    },
    "OPT-350M": {
        "model_type": "opt", "hidden_size": 1024, "num_hidden_layers": 24, "ffn_dim": 4096,
        "num_attention_heads": 16, "word_embed_proj_dim": 512, "vocab_size": 50272,
        "do_layer_norm_before": False, "max_position_embeddings": 2048,
    },
    # Each layer takes as much as any other: two depths say what 32 layers take.
    "Falcon-7B, 4 layers": {**FALCON, "num_hidden_layers": 4},
    "Falcon-7B, 8 layers": {**FALCON, "num_hidden_layers": 8},
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "intermediate_size": 128, "ffn_dim": 128, "word_embed_proj_dim": 64,
    "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512,
}  # fmt: skip
TINY = {**TINY_LLAMA, "vocab_size": 512, "max_position_embeddings": 16384}
LORA = {"adapter.kind": "lora"}
QLORA = {"adapter.kind": "qlora"}
RECOMPUTED = {"train.gradient_checkpointing": True}
KEPT = {"train.gradient_checkpointing": False}
EIGHT_BITS = {"optimizer.kind": "adamw_8bit"}
BF16 = {"model.dtype": "bfloat16"}
PADDED = {"data.packing": False, "model.attention": "sdpa"}
ATTENTION: dict[str, dict[str, Any]] = {
    "eager": {"data.packing": False, "model.attention": "eager"},
    "SDPA": PADDED,
    "inside documents": {},  # FlashAttention-2, or what a run takes for it
}
METHODS: dict[str, dict[str, Any]] = {
    "full": KEPT,
    "full, recomputed": RECOMPUTED,
    "full, two micro-batches": {"train.global_batch_size": 2, **KEPT},
    "full, bf16 weights": {**BF16, **KEPT},
    "lora": LORA | KEPT,
    "lora, recomputed": LORA | RECOMPUTED,
    "lora, compiled": LORA | KEPT | {"train.compile": True},
    "lora, padded": LORA | KEPT | PADDED,
    "qlora": QLORA | KEPT,
    "qlora, recomputed": QLORA | RECOMPUTED,
    "full, 8-bit AdamW": EIGHT_BITS | KEPT,
}
# (recomputed, LoRA) -> MB with AdamW and one pass a step, and with 8-bit AdamW or accumulation:
# 16 bits, one sequence of 2,000 tokens; eager, SDPA, FlashAttention-2.
OPT_MB = {
    (False, False): ((15071, 3737, 3742), (15071, 2908, 2807)),
    (False, True): ((15266, 3109, 3108), (15266, 3109, 3108)),
    (True, False): ((3532, 3537, 3538), (2589, 1667, 1657)),
    (True, True): ((2059, 1603, 1595), (2059, 1603, 1595)),
}
# (tokens, recomputed) -> MB by SDPA in 16 bits and in mixed precision: base in 8 bits, LoRA, one
# sequence. Without recomputation 2,000 tokens ran out of memory.
FALCON_MB = {(500, False): "15,050 or 13,957", (500, True): "10,369", (2000, True): "12,280"}
OUT_OF_MEMORY = "out of memory"
# A card's GB -> what should fit by itself, with auto for micro-batch and recomputation.
CARDS: dict[int, tuple[str, dict[str, Any]]] = {
    8: ("1B lora", LORA),
    16: ("1B full in bf16", BF16),
    24: ("1B full", {}),
}
AUTO = {"train.micro_batch_size": "auto", "train.global_batch_size": 8}


@dataclass(frozen=True)
class Case:
    """One line of the result."""

    name: str
    settings: dict[str, Any]
    shapes: tuple[str, ...] = ("8B",)
    """Of the model; two of them differ in depth, and a deeper one follows from them."""
    length: int = 4096
    notes_mb: str = ""
    """The notes' figure."""
    card_gb: float | None = None
    """Run as on a card with this much memory."""
    at_depth: int = field(default=FALCON_LAYERS)


def cases() -> list[Case]:
    """Return all, the most important first: five minutes are enough for most."""
    opt = list(_opt())
    # Of each method and kernel the first; the others differ in what its peak does not contain.
    first = [case for case in opt if not case.settings.keys() & {"train.global_batch_size"}]
    first = [case for case in first if "optimizer.kind" not in case.settings]
    methods = [Case(name, settings) for name, settings in METHODS.items()]
    return [*methods, *_cards(), *first, *_falcon(), *(case for case in opt if case not in first)]


def tiny(shape: dict[str, Any]) -> dict[str, Any]:
    """Return a shape of the same architecture that a CPU trains in a moment."""
    small = {name: value for name, value in SMALL.items() if name in shape}
    return {**shape, **small, "num_hidden_layers": 2 if shape["num_hidden_layers"] > 4 else 1}


def deeper(found: tuple[float, float], depths: tuple[int, int], depth: int) -> float:
    """Return what a model of `depth` layers takes, from what two others take."""
    (less, more), (few, many) = found, depths
    return more + (depth - many) * (more - less) / (many - few)


def _cards() -> Iterator[Case]:
    for gigabytes, (what, settings) in CARDS.items():
        name = f"{what}, on a card of {gigabytes} GB"
        yield Case(name, {**settings, **AUTO}, ("1B",), 2048, card_gb=float(gigabytes))


def _opt() -> Iterator[Case]:
    for recomputed, lora, eight_bits, accumulates in product((False, True), repeat=4):
        parts = {
            "lora": lora, "full": not lora, "recomputed": recomputed, "8-bit AdamW": eight_bits,
            "accumulated": accumulates,
        }  # fmt: skip
        named = ", ".join(name for name, is_so in parts.items() if is_so)
        # Weights in 16 bits train by AdamW with stochastic rounding only; others are float32.
        dtype = {} if eight_bits and not lora else BF16
        settings = {
            **dtype, **(RECOMPUTED if recomputed else KEPT), **(EIGHT_BITS if eight_bits else {}),
            **({"train.global_batch_size": 2} if accumulates else {}),
        }  # fmt: skip
        if lora:
            targets = {"adapter.r": 8, "adapter.target_modules": ["q_proj", "v_proj"]}
            settings |= {**LORA, **targets}
        published = OPT_MB[recomputed, lora][eight_bits or accumulates]
        for (kernel, attention), megabytes in zip(ATTENTION.items(), published):
            yield Case(
                f"OPT-350M {named}, {kernel}", settings | attention, ("OPT-350M",), 2000,
                f"{megabytes:,}",
            )  # fmt: skip


def _falcon() -> Iterator[Case]:
    both = tuple(name for name in SHAPES if name.startswith("Falcon"))
    adapter = {
        **QLORA, "adapter.quantization": "int8", "adapter.r": 8,
        "adapter.target_modules": ["query_key_value"],
    }  # fmt: skip
    for tokens, recomputed in product((500, 2000), (False, True)):
        kept = RECOMPUTED if recomputed else KEPT
        named = f"Falcon-7B int8, {tokens:,} tokens{', recomputed' if recomputed else ''}"
        published = FALCON_MB.get((tokens, recomputed), OUT_OF_MEMORY)
        yield Case(named, adapter | kept | PADDED, both, tokens, published)
