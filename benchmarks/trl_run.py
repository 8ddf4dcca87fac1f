"""Run TRL's SFTTrainer once, for benchmarks/peers.py and gpu.py.

python benchmarks/trl_run.py '{"rows": ..., "model": ...}'

"random": true makes the weights on the device; "qlora": true also quantises them.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from datasets import load_dataset
from transformers import TrainerCallback
from trl import SFTConfig, SFTTrainer


class Clock(TrainerCallback):
    """Record (tokens without padding, seconds) of every step."""

    def __init__(self) -> None:
        self.steps: list[tuple[int, float]] = []
        self.tokens, self.supervised = 0, 0
        self.began = 0.0

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self.began, self.tokens = now(), 0

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.steps.append((self.tokens, now() - self.began))


def now() -> float:
    """Return the time in seconds, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def config_of(wanted: dict[str, Any], out: Path) -> SFTConfig:
    settings = {"gradient_checkpointing": False, "attn_implementation": "sdpa"} | wanted["settings"]
    model = {
        "attn_implementation": settings.pop("attn_implementation"),
        "dtype": wanted.get("dtype", "float32"),
    }
    if wanted.get("random"):
        model = None  # it is made already
    return SFTConfig(
        output_dir=str(out),
        max_steps=wanted["steps"],
        max_length=wanted["max_length"],
        bf16=wanted["precision"] == "bf16",
        use_cpu=not torch.cuda.is_available(),
        learning_rate=settings.pop("learning_rate", 1e-3),
        lr_scheduler_type="constant",
        report_to=[],
        save_strategy="no",
        logging_steps=1,
        disable_tqdm=True,
        dataloader_pin_memory=False,
        model_init_kwargs=model,
        **settings,
    )


def model_of(wanted: dict[str, Any]) -> dict[str, Any]:
    """Return SFTTrainer's arguments that say what trains."""
    adapter = None
    if wanted.get("lora"):
        from peft import LoraConfig

        adapter = LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM", **wanted["lora"])
    if not wanted.get("random"):
        return {"model": wanted["model"]} | ({"peft_config": adapter} if adapter else {})
    sys.path[:0] = [str(Path(__file__).resolve().parents[number]) for number in (1, 0)]
    from on_gpu import random_model
    from transformers import AutoConfig, AutoTokenizer

    attention = wanted["settings"].get("attn_implementation", "sdpa")
    quantization = None
    if wanted.get("qlora"):
        quantization = random_model.NF4 | {"bnb_4bit_compute_dtype": wanted["dtype"]}
    config = AutoConfig.from_pretrained(wanted["model"])
    model = random_model.make(config, getattr(torch, wanted["dtype"]), attention, quantization)
    if adapter:  # before TRL draws any random number, so that it starts as others do
        from peft import get_peft_model

        model = get_peft_model(model, adapter)
    return {"model": model, "processing_class": AutoTokenizer.from_pretrained(wanted["model"])}


def main() -> None:
    wanted = json.loads(sys.argv[1])
    out = Path(wanted["out"])
    config = config_of(wanted, out)
    clock = Clock()
    rows = load_dataset(
        "json", data_files=wanted["rows"], split="train", cache_dir=str(out.parent / "cache")
    )
    trainer = SFTTrainer(args=config, train_dataset=rows, callbacks=[clock], **model_of(wanted))
    compute = trainer.compute_loss

    def counted(model: Any, inputs: Any, *arguments: Any, **keywords: Any) -> Any:
        mask = inputs.get("attention_mask")
        clock.tokens += int(inputs["input_ids"].numel() if mask is None else mask.sum())
        clock.supervised += int((inputs["labels"] != -100).sum())
        return compute(model, inputs, *arguments, **keywords)

    trainer.compute_loss = counted
    trainer.train()
    if wanted.get("saves", True):
        trainer.save_model(str(out))
    out.mkdir(parents=True, exist_ok=True)
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    measured = {
        "steps": clock.steps,
        "supervised": clock.supervised,
        "gpu_gb": torch.cuda.max_memory_allocated() / 1e9,
        "first_loss": losses[0] if losses else None,
        "last_loss": losses[-1] if losses else None,
    }
    (out / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    main()
