"""Methods and topologies on one GPU: speed and memory of train.py on a Llama of 1.2B parameters, random weights.

    python benchmarks/gpu.py                       # all of it, as a table for docs/performance.md
    python benchmarks/gpu.py --only qlora          # a regular expression
    python benchmarks/gpu.py --shape tiny          # anywhere, to see that it works

FSDP2 and ZeRO run with one process: what they cost where there is nothing to share. Twelve steps of
packs of 2,048 tokens; the median of all but the first four.
"""

import argparse
import json
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": True},
    "tiny": {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 512},
}  # fmt: skip
STEPS, WARM = 12, 4
LORA = {"adapter.kind": "lora", "adapter.r": 16}
CHECKPOINTED = {"train.gradient_checkpointing": True}
CASES: dict[str, tuple[str | None, dict[str, Any]]] = {
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
    parser.add_argument("--shape", choices=SHAPES, default="1B")
    parser.add_argument("--micro-batch-size", type=int, default=4)
    arguments = parser.parse_args()
    print(hardware())
    print("| case | tokens/s | memory | mfu | last loss |\n| --- | --- | --- | --- | --- |", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_model(folder / "model", SHAPES[arguments.shape])
        make_rows(folder / "rows.txt")
        for case, (topology, settings) in CASES.items():
            if re.search(arguments.only, case):
                print(
                    f"| {case} | {measure(folder, case, topology, settings, arguments.micro_batch_size)} |", flush=True
                )


def hardware() -> str:
    import accelerate
    import torch
    import transformers

    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
    return f"{device}; torch {torch.__version__}, transformers {transformers.__version__}, accelerate {accelerate.__version__}"


def make_model(folder: Path, shape: dict[str, Any]) -> None:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT))
    from finetune.models.load import bytes_tokenizer

    model = LlamaForCausalLM(LlamaConfig(max_position_embeddings=4096, **shape)).to(torch.bfloat16)
    model.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)


def make_rows(path: Path) -> None:
    """Sentences of the quickstart's vocabulary, enough for every step."""
    command = [sys.executable, "data_scripts/pig_latin.py", "--output", str(path.parent / "pig_latin")]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    path.write_text((path.parent / "pig_latin/sentences.txt").read_text())


def measure(folder: Path, case: str, topology: str | None, settings: dict[str, Any], micro: int) -> str:
    """Cells of a row: speed, memory, utilisation and loss; or the first line of what went wrong."""
    name = re.sub(r"[^a-z0-9]+", "_", case)
    values: dict[str, Any] = {
        "run.name": name, "run.dir": str(folder / "runs"), "model.path": str(folder / "model"), "objective.kind": "clm",
        "data.train": str(folder / "rows.txt"), "data.packing": True, "data.max_length": 2048, "data.cache_dir": str(folder / "cache"),
        "train.global_batch_size": micro, "train.micro_batch_size": micro, "train.max_steps": STEPS, "optimizer.lr": 1e-5, **settings,
    }  # fmt: skip
    sections: dict[str, dict[str, Any]] = {}
    for key, value in values.items():
        section, field = key.split(".")
        sections.setdefault(section, {})[field] = value
    config = folder / f"{name}.yaml"
    config.write_text(yaml.safe_dump(sections))
    command = [sys.executable, "train.py", "--config", str(config)]
    if topology:
        launcher = ["-m", "accelerate.commands.launch", "--config_file", f"accelerate_configs/{topology}.yaml"]
        command = [sys.executable, *launcher, "--num_processes", "1", *command[1:]]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        wrong = [line for line in done.stderr.splitlines() if re.search(r"[Ee]rror\b.*:|out of memory", line)]
        return f"failed: {(wrong or ['?'])[0][:200]} | | |"
    lines = [json.loads(line) for line in (folder / "runs" / name / "metrics.jsonl").read_text().splitlines()]
    warm = lines[WARM:]
    speed, last = statistics.median(line["tokens_per_second"] for line in warm), lines[-1]
    mfu = f"{statistics.median(line['mfu'] for line in warm):.1%}" if "mfu" in last else "-"
    return f"{speed:,.0f} | {last['memory_gb']:.2f} GB | {mfu} | {last['loss']:.4f}"


if __name__ == "__main__":
    main()
