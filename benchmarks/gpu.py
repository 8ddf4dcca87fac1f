"""Methods and topologies on one GPU: speed, memory and utilisation of train.py on Llamas of random weights.

    python benchmarks/gpu.py                       # all of it, as a table for docs/performance.md
    python benchmarks/gpu.py --only "8B|qlora"     # a regular expression
    python benchmarks/gpu.py --tiny                # anywhere, to see that it works

1B: Llama-3.2-1B's shape, packs of 2,048 tokens, four at once. 8B: Llama-3.1-8B's, packs of 8,192, one at once, layers
recomputed; all weights in bf16, as float32 ones need 128 GB with AdamW. FSDP2 and ZeRO run with one
process: what they cost where there is nothing to share. Medians of all steps but the first four. Needs torch,
transformers, accelerate and peft, and for some rows bitsandbytes and deepspeed; what fails says why.
"""

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import ROOT, measure

SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256},
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
STEPS, WARM = 12, 4
LORA = {"adapter.kind": "lora", "adapter.r": 16}
CHECKPOINTED = {"train.gradient_checkpointing": True}
BF16 = {"model.dtype": "bfloat16"}
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
    "8B lora r 16": (None, LORA | CHECKPOINTED),
    "8B lora r 16, compiled": (None, LORA | CHECKPOINTED | {"train.compile": True}),
    "8B full in bf16": (None, BF16 | CHECKPOINTED),
    "8B full in bf16, compiled": (None, BF16 | CHECKPOINTED | {"train.compile": True}),
    "8B qlora nf4, compiled": (None, LORA | CHECKPOINTED | {"adapter.kind": "qlora", "train.compile": True}),
    "8B qlora nf4": (None, LORA | CHECKPOINTED | {"adapter.kind": "qlora"}),
    "full": (None, {}),
    "full, gradient checkpointing": (None, CHECKPOINTED),
    "full, adamw_8bit": (None, {"optimizer.kind": "adamw_8bit"}),
    "full, paged_adamw_32bit": (None, {"optimizer.kind": "paged_adamw_32bit"}),
    "full, muon": (None, {"optimizer.kind": "muon"}),
    "lora r 16": (None, LORA),
    "qlora nf4": (None, {**LORA, "adapter.kind": "qlora"}),
    "qlora int8": (None, {**LORA, "adapter.kind": "qlora", "adapter.quantization": "int8"}),
    "full, fp16": (None, {"train.precision": "fp16"}),
    "full, sdpa, padded": (None, {"model.attention": "sdpa", "data.packing": False}),
    "full, fsdp2, 1 process": ("fsdp2", {}),
    "full, fsdp2_offload, 1 process": ("fsdp2_offload", {}),
    "qlora nf4, fsdp2, 1 process": ("fsdp2", {**LORA, "adapter.kind": "qlora"}),
    "full, zero2, 1 process": ("zero2", {}),
    "full, zero3, 1 process": ("zero3", {}),
    "full, zero3_offload, 1 process": ("zero3_offload", {}),
    "qlora nf4, zero3, 1 process": ("zero3", {**LORA, "adapter.kind": "qlora"}),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="regular expression: these cases")
    parser.add_argument("--tiny", action="store_true", help="models of two layers, packs of 256 tokens")
    arguments = parser.parse_args()
    print(hardware())
    print("| case | tokens/s | memory | mfu | last loss |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for case, (topology, settings) in CASES.items():
            if re.search(arguments.only, case):
                print(f"| {case} | {cells(Path(name), case, topology, settings, arguments.tiny)} |", flush=True)


def hardware() -> str:
    import accelerate
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"


def cells(folder: Path, case: str, topology: str | None, settings: dict[str, Any], tiny: bool) -> str:
    """Of a row: speed, memory, utilisation and loss; or what went wrong."""
    size = "8B" if case.startswith("8B") else "1B"
    length, at_once = (8192, 1) if size == "8B" else (2048, 4)
    values: dict[str, Any] = {
        "model.path": str(model(folder, "tiny" if tiny else size)), "objective.kind": "clm", "data.train": str(rows(folder)),
        "data.packing": True, "data.max_length": 256 if tiny else length, "train.global_batch_size": at_once,
        "train.micro_batch_size": at_once, "train.max_steps": STEPS, "optimizer.lr": 1e-5, **settings,
    }  # fmt: skip
    try:
        found = measure(folder, values, warm=WARM, topology=topology or "single")
    except RuntimeError as exc:
        return f"failed: {exc} | | |"
    mfu = "-" if found.mfu is None else f"{found.mfu:.1%}"
    return f"{found.tokens_per_second:,.0f} | {found.memory_gb:.2f} GB | {mfu} | {found.last_loss:.4f}"


def model(folder: Path, size: str) -> Path:
    """Random weights, saved once; the tokenizer of bytes."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    if not (folder / size).exists():
        sys.path.insert(0, str(ROOT))
        from finetune.models.load import bytes_tokenizer

        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):  # eight billion random numbers
            torch.set_default_dtype(torch.bfloat16)
            made = LlamaForCausalLM(LlamaConfig(max_position_embeddings=8192, **SHAPES[size]))
            torch.set_default_dtype(torch.float32)
        made.save_pretrained(folder / size)
        bytes_tokenizer().save_pretrained(folder / size)
        del made
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return folder / size


def rows(folder: Path) -> Path:
    """Sentences of the quickstart's vocabulary, enough for every step."""
    path = folder / "pig_latin/sentences.txt"
    if not path.exists():
        command = [sys.executable, "data_scripts/pig_latin.py", "--output", str(path.parent)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return path


if __name__ == "__main__":
    main()
