"""What `make gpu` needs torch for, in a process of its own: one request in JSON a line, one answer
a line.

An answer is [problem or null, result]. Whatever libraries print goes to standard error.
"""

import contextlib
import importlib
import importlib.metadata
import json
import os
import platform
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What train.py imports, by the name of the module; pip's name where it is another.
REQUIRED = {
    "torch": "torch", "transformers": "transformers", "accelerate": "accelerate", "peft": "peft",
    "datasets": "datasets", "tokenizers": "tokenizers", "safetensors": "safetensors",
    "numpy": "numpy", "pydantic": "pydantic", "yaml": "PyYAML", "jinja2": "Jinja2",
    "filelock": "filelock", "tqdm": "tqdm",
}  # fmt: skip
OPTIONAL = {
    "bitsandbytes": "QLoRA, 8-bit and paged optimizers, Lion",
    "deepspeed": "ZeRO-1, 2 and 3",
    "pytest": "tests/test_gpu.py",
    "trl": "the comparison with TRL",
    "liger_kernel": "norms and gates as one kernel each, and TRL with Liger",
    "litgpt": "the comparison with LitGPT",
    "flash_attn.flash_attn_interface": "FlashAttention-2",
    "flash_attn_interface": "FlashAttention-3",
    "flash_attn.cute": "FlashAttention-4",
    "torchao": "train.float8",
}
# Where the name of the package is not that of the module.
PACKAGES = {
    "flash_attn.flash_attn_interface": "flash-attn", "flash_attn_interface": "flash-attn-3",
    "flash_attn.cute": "flash-attn-4",
}  # fmt: skip
OLDEST_TORCH = (2, 11)


def facts() -> dict[str, Any]:
    """Import what runs need; return versions, what is missing and why, and the GPU."""
    versions, missing, left_out = {"python": platform.python_version()}, {}, {}
    for module, name in REQUIRED.items():
        try:
            importlib.import_module(module)
            versions[name] = _version(name)
        except Exception as exc:  # a package that is half there fails in any way
            missing[name] = f"{type(exc).__name__}: {exc}"
    if not missing:
        sys.path.insert(0, str(ROOT))
        try:
            for module in ("train", "finetune.loop"):
                importlib.import_module(module)
        except Exception as exc:
            missing["finetune"] = f"{type(exc).__name__}: {exc}"
    if "torch" not in missing and tuple(map(int, versions["torch"].split(".")[:2])) < OLDEST_TORCH:
        missing["torch"] = f"{versions['torch']} is older than {'.'.join(map(str, OLDEST_TORCH))}"
    for module, use in OPTIONAL.items() if not missing else ():
        try:
            # The others are heavy, and only used in processes of their own.
            if module not in ("trl", "liger_kernel", "litgpt", "pytest"):
                importlib.import_module(module)
            versions[module] = _version(module)
        except Exception as exc:
            left_out[module] = (
                f"{module}, for {use} ({type(exc).__name__}: "
                f"{(str(exc).splitlines() or [''])[0][:120]})"
            )
    return {
        "versions": versions,
        "missing": missing,
        "left_out": left_out,
        **({} if "torch" in missing else _machine()),
    }


def _version(name: str) -> str:
    import importlib.util

    try:
        return importlib.metadata.version(PACKAGES.get(name, name.replace("_", "-")))
    except importlib.metadata.PackageNotFoundError:
        if importlib.util.find_spec(name) is None:
            raise
        return "unknown"


def _machine() -> dict[str, Any]:
    import torch

    compiler = shutil.which(os.environ.get("CXX", "g++"))
    found: dict[str, Any] = {"compiler": compiler is not None, "gpu": None}
    if torch.cuda.is_available():
        free, total = torch.cuda.mem_get_info(0)
        found |= {
            "gpu": torch.cuda.get_device_name(0), "memory_gb": total / 1e9, "free_gb": free / 1e9,
            "driver": _driver(), "cuda": torch.version.cuda,
            "capability": ".".join(map(str, torch.cuda.get_device_capability(0))),
        }  # fmt: skip
    return found


def _driver() -> str:
    try:
        command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=20, check=True
        ).stdout.splitlines()[0]
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def make_base(folder: str, shape: dict[str, Any], dtype: str, factor: float = 1.0) -> int:
    """Save a model of random weights with the tokenizer of bytes; return its parameters.

    factor: of its matrices; at 1 it finds all tokens about equally likely.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from finetune.models.load import bytes_tokenizer

    tokenizer, values = bytes_tokenizer(), dict(shape)
    config = AutoConfig.for_model(
        values.pop("model_type"), **{"vocab_size": len(tokenizer), **values}
    )
    torch.manual_seed(0)
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(factor if weight.ndim > 1 else 1.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    number = sum(p.numel() for p in model.parameters())
    del model
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return number


def make_folder(folder: str, shape: dict[str, Any]) -> None:
    """Write what a model of random weights needs besides them."""
    sys.path.append(str(ROOT / "benchmarks"))
    from on_gpu import random_model

    random_model.write_folder(Path(folder), shape)


def make_rows(path: str, number: int, kind: str, length: int) -> None:
    """Write rows by kind, of which tokens are bytes.

    questions: their answers differ in length; texts: of `length` tokens; same: one such text again
    and again, so that no trainer's order of rows matters; short: of 60 to 600 tokens; else as
    ROWS_OF has them.
    """
    draw = random.Random(0)
    rows: list[dict[str, Any]] = []
    letters = "abcdefghij klmnopq rstuvwxyz"
    if kind == "same":
        rows = [{"text": "".join(draw.choices(letters, k=length))}] * number
        number = 0
    if kind in ROWS_OF:
        rows, number = [ROWS_OF[kind](i) for i in range(number)], 0
    for i in range(number):
        if kind == "questions":
            rows.append(
                {
                    "question": f"what is {i} times three and why",
                    "answer": f"{'so ' * (i * 7 % 37)}it is {3 * i}",
                }
            )
        else:
            size = draw.randint(60, min(600, length)) if kind == "short" else length
            rows.append({"text": "".join(draw.choices(letters, k=size))})
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def _pair(i: int) -> dict[str, Any]:
    answer = "so " * (i * 7 % 9) + str(3 * i)
    return {"prompt": f"what is {i} times three", "chosen": answer, "rejected": f"no {answer}?"}


def _judged(i: int) -> dict[str, Any]:
    row, is_good = _pair(i), i % 3 > 0
    answer = row["chosen" if is_good else "rejected"]
    return {"prompt": row["prompt"], "completion": answer, "label": is_good}


def _steps(i: int) -> dict[str, Any]:
    """One to three additions, some of them wrong, and all behind those."""
    texts = [f"{i}+{n}={i + n + (i % 3 == n)}" for n in range(1 + i % 3)]
    return {"prompt": str(i), "steps": texts, "labels": [i % 3 > n for n in range(len(texts))]}


def _prompt(i: int) -> dict[str, Any]:
    return {"prompt": f"count from {i}" + " on" * (i % 4), "answer": str(i)}


ROWS_OF: dict[str, Callable[[int], dict[str, Any]]] = {
    "pairs": _pair, "judged": _judged, "steps": _steps, "prompts": _prompt,
}  # fmt: skip


def teach(rows: str, config: str, teacher: str, output: str) -> None:
    """Write a teacher's likeliest tokens into rows, as `finetune data teach` does."""
    from accelerate.state import AcceleratorState

    from finetune.__main__ import main

    AcceleratorState._reset_state(reset_partial_state=True)
    words = ["--config", config, "--model", teacher, "--top", "16", "--output", output]
    if code := main(["data", "teach", rows, *words]):
        raise RuntimeError(f"finetune data teach ended with {code}")


def open_export(folder: str) -> float:
    """Return the loss of one text by an export, opened in float32 by transformers or peft."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    device = "cuda" if torch.cuda.is_available() else "cpu"
    if (Path(folder) / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        model = AutoPeftModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = AutoTokenizer.from_pretrained(folder)(
        "what is 7 times three and why? so it is 21", return_tensors="pt"
    ).input_ids
    with torch.no_grad():
        return float(model.to(device).eval()(input_ids=ids.to(device), labels=ids.to(device)).loss)


def forecast(config: str, on_gpu: bool) -> dict[str, float]:
    """Return the bytes that `plan` forecasts, and those that PyTorch's allocator does not count."""
    from finetune import config as configs
    from finetune.engine.topology.launch import ParallelConfig
    from finetune.forecast.choice import Chooser

    parsed, _ = configs.parse(["--config", config])
    found = Chooser(parsed, precision=parsed.train.precision, on_gpu=on_gpu).forecast(
        ParallelConfig("single", 1)
    )
    return {"peak": found.peak, "outside": found.device.get("CUDA", 0.0)}


def work(config: str, length: float) -> float:
    """Return the FLOPs of a token in documents of `length` tokens, with recomputed layers."""
    from finetune import config as configs
    from finetune.forecast import speed
    from finetune.forecast.choice import Chooser

    parsed, _ = configs.parse(["--config", config])
    chooser = Chooser(parsed, precision=parsed.train.precision, on_gpu=False)
    made = chooser.forecaster()
    share = speed.share_recomputed(parsed, made.num_layers)
    return speed.work_of(made.model, chooser.model_config, length, share).total


def train(config: str, card_gb: float | None = None) -> dict[str, float]:
    """Run a config in this process, with little around its steps; return its peaks in GB.

    memory_gb: of PyTorch's allocator, or of this process on a CPU; reserved_gb: what the allocator
    took from the GPU for it; held_gb: what is left of the run. `card_gb`: act as a smaller card.
    """
    import gc

    import torch
    from accelerate.state import AcceleratorState

    from finetune import config as configs
    from finetune import loop
    from finetune.survival.preemption import StopFlag

    sys.path.append(str(ROOT / "benchmarks"))
    from on_gpu import one_run

    one_run.leave_out()
    AcceleratorState._reset_state(reset_partial_state=True)
    parsed, _ = configs.parse(["--config", config])
    has_gpu = torch.cuda.is_available()
    if has_gpu:
        torch.cuda.reset_peak_memory_stats()
    try:
        with _card(card_gb):
            loop.run(parsed, False, StopFlag())
        lines = Path(parsed.run.dir, parsed.run.name, "metrics.jsonl").read_text().splitlines()
        peak = json.loads(lines[-1])["memory_gb"]
        reserved = torch.cuda.max_memory_reserved() / 1e9 if has_gpu else peak
    finally:
        gc.collect()
        if has_gpu:
            torch._C._cuda_clearCublasWorkspaces()  # else they would count as held
            torch.cuda.empty_cache()
    held = torch.cuda.memory_allocated() / 1e9 if has_gpu else 0.0
    return {"memory_gb": peak, "reserved_gb": reserved, "held_gb": held}


@contextlib.contextmanager
def _card(gigabytes: float | None) -> Iterator[None]:
    """Act, inside, as a card with less memory: PyTorch gets no more, and says so when asked."""
    import torch

    if gigabytes is None or not torch.cuda.is_available():
        yield
        return
    from finetune.forecast.memory import CONTEXT

    ask, total = torch.cuda.mem_get_info, torch.cuda.mem_get_info()[1]
    most = 1e9 * gigabytes - CONTEXT

    def smaller(device: Any = None) -> tuple[int, int]:
        return int(most - torch.cuda.memory_reserved(device)), int(1e9 * gigabytes)

    torch.cuda.set_per_process_memory_fraction(most / total)
    torch.cuda.mem_get_info = smaller
    try:
        yield
    finally:
        torch.cuda.mem_get_info = ask
        torch.cuda.set_per_process_memory_fraction(1.0)


REQUESTS = {
    each.__name__: each
    for each in (
        facts,
        make_base,
        make_folder,
        make_rows,
        teach,
        open_export,
        forecast,
        work,
        train,
    )
}


def main() -> None:
    sys.path.insert(0, str(ROOT))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        name, arguments = json.loads(line)
        try:
            answer = [None, REQUESTS[name](**arguments)]
        except Exception as exc:
            answer = [f"{type(exc).__name__}: {(str(exc).splitlines() or [''])[0][:300]}", None]
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
