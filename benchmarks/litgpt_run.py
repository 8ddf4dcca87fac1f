"""Run LitGPT's full fine-tuning once, for benchmarks/peers.py.

    python benchmarks/litgpt_run.py '{"rows": ..., "model": ...}'

LitGPT needs older packages than ours, in its own environment. It trains untied embeddings here.
"""

import csv
import json
import sys
from pathlib import Path
from typing import Any

import torch
from litgpt.args import EvalArgs, TrainArgs
from litgpt.config import Config
from litgpt.data import JSON
from litgpt.finetune import full
from litgpt.prompts import Default
from litgpt.scripts.convert_hf_checkpoint import copy_weights_hf_llama
from litgpt.scripts.convert_lit_checkpoint import convert_lit_checkpoint
from litgpt.utils import save_config
from safetensors.torch import load_file, save_file


def main() -> None:
    asked = json.loads(sys.argv[1])
    out, base = Path(asked["out"]), Path(asked["out"]).parent / "base"
    shape = json.loads((Path(asked["model"]) / "config.json").read_text())
    convert(Path(asked["model"]), base, shape)
    write_rows(Path(asked["rows"]), base)
    supervised = count_supervised()
    tune(asked, base, out.parent / "lit")
    export(out.parent / "lit/final", out, shape)
    measured = {
        "steps": steps_of(out.parent / "lit"),
        "supervised": sum(supervised),
        "gpu_gb": torch.cuda.max_memory_allocated() / 1e9,
    }
    (out / "measured.json").write_text(json.dumps(measured))


def write_rows(rows: Path, base: Path) -> None:
    """Write the rows as LitGPT reads them, next to the converted base."""
    read = [json.loads(line) for line in rows.read_text().splitlines()]
    samples = [{"instruction": row["prompt"], "output": row["completion"]} for row in read]
    (base / "train.json").write_text(json.dumps(samples))
    (base / "val.json").write_text(json.dumps(samples[:2]))


def count_supervised() -> list[int]:
    """Return a list that gets the number of supervised tokens of each training pass."""
    counts: list[int] = []
    loss = full.chunked_cross_entropy

    def counted(logits: Any, labels: torch.Tensor, *arguments: Any, **keywords: Any) -> Any:
        if torch.is_grad_enabled():
            counts.append(int((labels != -100).sum()))
        return loss(logits, labels, *arguments, **keywords)

    full.chunked_cross_entropy = counted
    return counts


def tune(asked: dict[str, Any], base: Path, out: Path) -> None:
    """Run LitGPT's full fine-tuning with the settings of the other contenders."""
    # A constant learning rate, as in the other runs; LitGPT always warms up and decays.
    full.get_lr_scheduler = lambda optimizer, **_: torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda _: 1.0
    )
    full.save_hyperparameters = lambda *_: None  # it would parse the command line
    size = asked["settings"]["batch_size"]
    adamw = {"lr": 1e-3, "weight_decay": 0.0, "fused": True}
    full.setup(
        base,
        out_dir=out,
        precision="bf16-mixed" if asked["precision"] == "bf16" else "32-true",
        data=JSON(base, mask_prompt=True, prompt_style=Default(), num_workers=0),
        train=TrainArgs(
            global_batch_size=size,
            micro_batch_size=size,
            max_steps=asked["steps"],
            epochs=9,
            max_seq_length=asked["max_length"],
            lr_warmup_steps=1,
        ),
        eval=EvalArgs(interval=10**6, max_new_tokens=1, final_validation=False),
        optimizer={"class_path": "torch.optim.AdamW", "init_args": adamw},
    )


def steps_of(folder: Path) -> list[tuple[int, float]]:
    """Return (tokens, seconds) of each step that LitGPT logged."""
    steps, before = [], 0
    with next(folder.rglob("metrics.csv")).open() as lines:
        for line in csv.DictReader(lines):
            tokens = int(float(line["tokens"]))
            steps.append((tokens - before, float(line["iter_time"])))
            before = tokens
    return steps


def export(trained: Path, out: Path, shape: dict[str, Any]) -> None:
    """Save the trained model as transformers opens it."""
    convert_lit_checkpoint(trained, out)
    weights = torch.load(out / "model.pth", mmap=True)
    whole = {name: weight.clone() for name, weight in weights.items()}
    save_file(whole, out / "model.safetensors", {"format": "pt"})
    (out / "config.json").write_text(json.dumps(shape | {"tie_word_embeddings": False}))


def config_of(kind: Any, shape: dict[str, Any], **more: Any) -> Any:
    """Return LitGPT's config, of one of its classes, for the config.json of a Llama."""
    return kind(
        name="Llama",
        block_size=shape["max_position_embeddings"],
        vocab_size=shape["vocab_size"],
        padded_vocab_size=shape["vocab_size"],
        n_layer=shape["num_hidden_layers"],
        n_head=shape["num_attention_heads"],
        n_embd=shape["hidden_size"],
        n_query_groups=shape["num_key_value_heads"],
        rotary_percentage=1.0,
        parallel_residual=False,
        bias=False,
        norm_class_name="RMSNorm",
        norm_eps=shape["rms_norm_eps"],
        mlp_class_name="LLaMAMLP",
        intermediate_size=shape["intermediate_size"],
        rope_base=shape["rope_parameters"]["rope_theta"],
        **more,
    )


def convert(model: Path, base: Path, shape: dict[str, Any]) -> None:
    """Convert a Llama from the format of transformers to that of LitGPT."""
    base.mkdir()
    config = config_of(Config, shape)
    save_config(config, base)
    weights: dict[str, torch.Tensor] = {}
    copy_weights_hf_llama(config, {}, weights, load_file(model / "model.safetensors"))
    torch.save(weights, base / "lit_model.pth")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).write_bytes((model / name).read_bytes())


if __name__ == "__main__":
    main()
