"""Run training steps of LitGPT's model on random weights, for speed.py.

    python benchmarks/on_gpu/litgpt_steps.py '{"rows": ..., "model": ...}'

The model, the loss in chunks, Fabric and the fused optimizer are those of LitGPT's fine-tuning on
one GPU in bf16-true, which neither recomputes nor compiles. Needs LitGPT's own environment.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import lightning
import torch
from litgpt.utils import chunked_cross_entropy

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from litgpt_run import config_of

END = 257  # of a text, after its bytes: as models.load.bytes_tokenizer


def main() -> None:
    asked = json.loads(sys.argv[1])
    shape = json.loads((Path(asked["model"]) / "config.json").read_text())
    on_gpu = torch.cuda.is_available()
    fabric = lightning.Fabric(
        accelerator="cuda" if on_gpu else "cpu", devices=1, precision="bf16-true"
    )
    model = fabric.setup_module(made(fabric, shape, asked))
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    optimizer = fabric.setup_optimizers(
        torch.optim.AdamW(trained, lr=asked["lr"], weight_decay=0.0, fused=True)
    )
    lines = Path(asked["rows"]).read_text().splitlines()
    rows = [[*json.loads(line)["text"].encode(), END][: asked["max_length"]] for line in lines]
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    steps, losses = [], []
    for number in range(asked["steps"]):
        start, count = time.perf_counter(), asked["at_once"]
        own = [rows[(number * count + each) % len(rows)] for each in range(count)]
        ids = torch.tensor(own, device=fabric.device)
        logits = model(ids, lm_head_chunk_size=128)
        logits[-1] = logits[-1][..., :-1, :]
        loss = chunked_cross_entropy(logits, ids[..., 1:])
        fabric.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())  # which waits for the GPU
        steps.append((ids.numel(), time.perf_counter() - start))
    measured = {
        "steps": steps, "gpu_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_loss": losses[0], "last_loss": losses[-1],
    }  # fmt: skip
    out = Path(asked["out"])
    out.mkdir(parents=True, exist_ok=True)
    (out / "measured.json").write_text(json.dumps(measured))


def made(fabric: Any, shape: dict[str, Any], asked: dict[str, Any]) -> Any:
    """Return a model of random weights on the device; with adapters on all linear layers of it."""
    torch.manual_seed(0)
    if not asked["lora"]:
        from litgpt.model import GPT, Config

        with fabric.init_module():
            model: Any = GPT(config_of(Config, shape))
    else:
        from litgpt.lora import GPT, Config, mark_only_lora_as_trainable

        parts = ("query", "key", "value", "projection", "mlp")
        of = {f"lora_{part}": True for part in parts}
        config = config_of(Config, shape, lora_r=16, lora_alpha=32, lora_dropout=0.0, **of)
        with fabric.init_module():
            model = GPT(config)
        mark_only_lora_as_trainable(model)
    model.max_seq_length = asked["max_length"]
    return model


if __name__ == "__main__":
    main()
