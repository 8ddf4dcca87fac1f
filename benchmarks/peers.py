"""Compare ours, TRL and LitGPT on the same rows, model, tokens and precision: `make bench`.

    python benchmarks/peers.py                                   a Llama of 25M, invented rows
    python benchmarks/peers.py --rows my.jsonl --model my_model  rows with prompt and completion
    python benchmarks/peers.py --only "trl packed|ours"          a regular expression
    python benchmarks/peers.py --preload libtcmalloc_minimal.so.4    another allocator, for all

Each trains N steps in its own process with its own trainer, at its fastest settings on this
machine; rounds alternate. Tokens a second exclude padding, and are medians over the steps after the
first ones; memory is the peak of the process, or of its GPU. Useful arithmetic is 6 operations for
each weight that a token needs, in the output projection only for supervised tokens; it is compared
with the rate of matrix products of 2,048 x 2,048 x 2,048, measured between the runs. All saved
models are evaluated alike: by their loss on held-out rows. TRL: pip install trl==1.16.0. LitGPT
needs older packages, and so its own environment: --litgpt its/bin/python, with litgpt==0.5.13
"""

import argparse
import json
import os
import random
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
MODEL = {
    "hidden_size": 384, "intermediate_size": 1024, "num_hidden_layers": 8,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": 2048,
    "tie_word_embeddings": True, "vocab_size": 32000,
}  # fmt: skip
MAX_LENGTH, WARM = 512, 5
TOKENS = 2048  # per step, about
HELD_OUT = 100


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--rows", type=Path, help="JSON Lines with prompt and completion, or question and answer"
    )
    parser.add_argument("--model", type=Path, help="folder of a model with its tokenizer")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer for the invented model"
    )
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--precision", choices=["bf16", "fp32"], default="bf16")
    parser.add_argument("--only", default="", help="regular expression: these contenders")
    parser.add_argument(
        "--litgpt",
        type=Path,
        help="Python of an environment with LitGPT; without it, LitGPT is left out",
    )
    parser.add_argument("--preload", help="library to preload, such as another allocator")
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        work = Work(Path(name), arguments)
        results: dict[str, list[dict[str, Any]]] = {}
        rates = []
        for _ in range(arguments.rounds):
            for contender, run in CONTENDERS.items():
                if re.search(arguments.only, contender) and (
                    contender != "litgpt padded" or work.litgpt
                ):
                    rates.append(product_rate(work.precision))
                    results.setdefault(contender, []).append(run(work))
                    last = results[contender][-1]
                    print(
                        f"{contender}: {last['speed']:,.0f} tokens/s, {last['memory']:.2f} GB",
                        file=sys.stderr,
                    )
        table(work, results, statistics.median(rates))
        if arguments.plot:
            plot(results, arguments.plot)


class Work:
    """The model, the rows and the settings, the same for all."""

    def __init__(self, folder: Path, arguments: argparse.Namespace) -> None:
        self.folder, self.steps, self.precision = folder, arguments.steps, arguments.precision
        self.litgpt, self.preload = arguments.litgpt, arguments.preload
        rows = read_rows(arguments.rows) if arguments.rows else invent_rows()
        self.model = arguments.model or make_model(folder / "model", rows, arguments.tokenizer)
        rows = short(rows, self.model)
        self.held_out, trained = rows[:HELD_OUT], rows[HELD_OUT:]
        self.rows = folder / "rows.jsonl"
        self.rows.write_text("".join(json.dumps(row) + "\n" for row in trained))
        self.runs = 0
        self.layers, self.head = weights_of(self.model)

    def operations(self, tokens: int, supervised: int) -> int:
        """Return the operations of forward and backward: 2 and 4 for each weight and token.

        Without those of attention's scores.
        """
        return 6 * (self.layers * tokens + self.head * supervised)

    def fresh(self) -> Path:
        self.runs += 1
        return self.folder / f"run{self.runs}"


def read_rows(path: Path) -> list[dict[str, str]]:
    names = [("prompt", "completion"), ("question", "answer")]
    rows = []
    for line in path.read_text().splitlines():
        row = json.loads(line)
        ask, reply = next(pair for pair in names if pair[0] in row)
        rows.append({"prompt": row[ask] + "\n", "completion": row[reply]})
    return rows[: 2000 + HELD_OUT]


def short(rows: list[dict[str, str]], model: Path) -> list[dict[str, str]]:
    """Return the rows that fit a pack, as trainers truncate others differently."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    return [
        row
        for row in rows
        if len(tokenizer(row["prompt"] + row["completion"]).input_ids) < MAX_LENGTH - 4
    ]


def invent_rows() -> list[dict[str, str]]:
    """Return rows as long as school maths problems: 30 to 90 words asked, 40 to 200 answered."""
    dice = random.Random(0)
    syllables = "ba con de fi ga ho in ju ka lo mer no per ra so tu ver wi".split()
    words = ["".join(dice.choices(syllables, k=dice.randint(1, 4))) for _ in range(6000)]

    def text(low: int, high: int) -> str:
        return " ".join(
            dice.choices(words, k=int(dice.triangular(low, high, low + (high - low) / 4)))
        )

    return [
        {"prompt": text(30, 90) + "\n", "completion": text(40, 200)} for _ in range(2000 + HELD_OUT)
    ]


def make_model(folder: Path, rows: list[dict[str, str]], tokenizer: Path | None) -> Path:
    """Save random weights with a tokenizer, or with one trained on the rows; return the folder."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    if tokenizer:
        tokens: Any = AutoTokenizer.from_pretrained(tokenizer)
    else:
        bpe = Tokenizer(models.BPE())
        bpe.pre_tokenizer, bpe.decoder = (
            pre_tokenizers.ByteLevel(add_prefix_space=False),
            decoders.ByteLevel(),
        )
        special = ["<|bos|>", "<|eos|>", "<|pad|>"]
        trainer = trainers.BpeTrainer(
            vocab_size=8000,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        )
        bpe.train_from_iterator((row[key] for row in rows for key in row), trainer)
        tokens = PreTrainedTokenizerFast(
            tokenizer_object=bpe, bos_token=special[0], eos_token=special[1], pad_token=special[2]
        )
    torch.manual_seed(0)
    ids = {name: getattr(tokens, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    shape = MODEL | {"vocab_size": max(MODEL["vocab_size"], len(tokens))}
    LlamaForCausalLM(LlamaConfig(**shape, **ids)).save_pretrained(folder)
    tokens.save_pretrained(folder)
    return folder


# --------------------------------------------------------------------------------- contenders


def ours(work: Work, **changes: Any) -> dict[str, Any]:
    folder = work.fresh()
    sections: dict[str, dict[str, Any]] = {
        "run": {"name": "run", "dir": str(folder)}, "model": {"path": str(work.model)},
        "data": {"train": str(work.rows), "template": "plain", "packing": True,
                 "max_length": MAX_LENGTH, "cache_dir": str(work.folder / "cache")},
        "optimizer": {"lr": 1e-3}, "schedule": {"kind": "constant"},
        "train": {"global_batch_size": TOKENS // MAX_LENGTH,
                  "micro_batch_size": TOKENS // MAX_LENGTH, "max_steps": work.steps,
                  "precision": work.precision, "epochs": 9},
    }  # fmt: skip
    for key, value in changes.items():
        section, field = key.split("__")
        sections[section][field] = value
    folder.mkdir()
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    memory = peak(work, [sys.executable, "train.py", "--config", str(folder / "config.yaml")])
    lines = [json.loads(line) for line in (folder / "run/metrics.jsonl").read_text().splitlines()]
    totals = [0, *(line["tokens"] for line in lines)]
    measured = [
        (after - before, line["seconds"]) for before, after, line in zip(totals, totals[1:], lines)
    ]
    on_gpu = lines[-1]["memory_gb"] if "mfu" in lines[-1] else None
    supervised = lines[-1]["supervised_tokens"]
    return result(work, folder / "run/model", measured, on_gpu or memory, supervised)


def peer(work: Work, python: Path | str, script: str, **settings: Any) -> dict[str, Any]:
    """Run a script next to this one, which writes a model and measured.json."""
    folder = work.fresh()
    folder.mkdir()
    wanted = {
        "rows": str(work.rows), "model": str(work.model), "steps": work.steps,
        "precision": work.precision, "max_length": MAX_LENGTH, "out": str(folder / "model"),
        "settings": settings,
    }  # fmt: skip
    memory = peak(work, [str(python), f"benchmarks/{script}", json.dumps(wanted)])
    done = json.loads((folder / "model/measured.json").read_text())
    memory = done["gpu_gb"] or memory
    return result(work, folder / "model", done["steps"], memory, done["supervised"])


def trl(work: Work, **settings: Any) -> dict[str, Any]:
    return peer(work, sys.executable, "trl_run.py", **settings)


CONTENDERS: dict[str, Callable[[Work], dict[str, Any]]] = {
    "ours": ours,
    "ours, compiled": lambda work: ours(work, train__compile=True),
    "trl padded": lambda work: trl(work, per_device_train_batch_size=8),
    "trl padded, compiled": lambda work: trl(
        work, per_device_train_batch_size=8, torch_compile=True
    ),
    "trl packed": lambda work: trl(
        work, per_device_train_batch_size=TOKENS // MAX_LENGTH, packing=True
    ),
    "trl packed, compiled": lambda work: trl(
        work, per_device_train_batch_size=TOKENS // MAX_LENGTH, packing=True, torch_compile=True
    ),
    "litgpt padded": lambda work: peer(work, work.litgpt, "litgpt_run.py", batch_size=8),
}


def peak(work: Work, command: list[str]) -> float:
    """Run a command and return its peak memory in GB. Raises RuntimeError with its last output."""
    env = os.environ | {"HF_HUB_OFFLINE": "1"}
    if work.preload:
        env["LD_PRELOAD"] = work.preload
    with tempfile.TemporaryFile() as output:
        process = subprocess.Popen(command, cwd=ROOT, stdout=output, stderr=output, env=env)
        _, status, used = os.wait4(process.pid, 0)
        output.seek(0)
        if status:
            raise RuntimeError(f"{command[1]} failed:\n{output.read().decode()[-3000:]}")
    return used.ru_maxrss * 1024 / 1e9


def result(
    work: Work, model: Path, steps: list[tuple[int, float]], memory: float, supervised: int
) -> dict[str, Any]:
    speed = statistics.median(tokens / seconds for tokens, seconds in steps[WARM:])
    tokens = sum(tokens for tokens, _ in steps)
    return {
        "speed": speed, "memory": memory, "loss": held_out_loss(work, model), "tokens": tokens,
        "operations": work.operations(tokens, supervised) / tokens * speed,
    }  # fmt: skip


def weights_of(model: Path) -> tuple[int, int]:
    """Return the numbers of weights (in the layers' matrices, in the output projection)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        bare = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model))
    head, embeddings = bare.get_output_embeddings().weight, bare.get_input_embeddings().weight
    matrices = [
        weight
        for weight in bare.parameters()
        if weight.ndim == 2 and weight is not head and weight is not embeddings
    ]
    return sum(weight.numel() for weight in matrices), head.numel()


def product_rate(precision: str) -> float:
    """Return the operations a second that matrix products reach on this machine now."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    left, right = torch.randn(
        2, 2048, 2048, device=device, dtype=torch.bfloat16 if precision == "bf16" else torch.float32
    )
    seconds = []
    for _ in range(20):
        began = time.perf_counter()
        float((left @ right)[0, 0])
        seconds.append(time.perf_counter() - began)
    return 2 * 2048**3 / statistics.median(seconds)


def held_out_loss(work: Work, model: Path) -> float:
    """Return nats per answer token, computed with transformers only."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(work.model)
    loaded = AutoModelForCausalLM.from_pretrained(model).eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for row in work.held_out:
            asked = tokenizer(row["prompt"]).input_ids
            answer = tokenizer(row["completion"], add_special_tokens=False).input_ids
            ids = torch.tensor((asked + answer)[:MAX_LENGTH])
            logits = loaded(ids[None]).logits[0, len(asked) - 1 : -1].float()
            labels = ids[len(asked) :]
            total += torch.nn.functional.cross_entropy(logits, labels, reduction="sum").item()
            count += len(ids) - len(asked)
    return total / count


# ------------------------------------------------------------------------------------ results


def table(work: Work, results: dict[str, list[dict[str, Any]]], rate: float) -> None:
    import torch
    import transformers

    print(
        f"{os.cpu_count()} cores; torch {torch.__version__}, transformers "
        f"{transformers.__version__}; {work.steps} steps, {work.precision}; "
        f"matrix products at {rate / 1e9:,.0f} billion operations a second\n"
    )
    print(
        "| | tokens/s | our fastest by | useful arithmetic, of the products' rate | peak memory | "
        "our fastest needs | tokens trained | loss on held-out rows |\n" + "| --- " * 8 + "|"
    )
    medians = {
        name: {key: statistics.median(run[key] for run in runs) for key in runs[0]}
        for name, runs in results.items()
    }
    own = [found for name, found in medians.items() if name.startswith("ours")] or list(
        medians.values()
    )
    first = max(own, key=lambda found: found["speed"])
    for name, found in medians.items():
        print(
            f"| {name} | {found['speed']:,.0f} | {first['speed'] / found['speed']:.2f}x | "
            f"{found['operations'] / rate:.0%} | {found['memory']:.2f} GB | "
            f"{first['memory'] / found['memory']:.0%} | {found['tokens']:,.0f} | "
            f"{found['loss']:.3f} |"
        )


def plot(results: dict[str, list[dict[str, Any]]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.6 * len(results) + 1.5), sharey=True)
    names = list(results)[::-1]
    for axis, key, title in zip(axes, ("speed", "memory"), ("tokens a second", "peak memory, GB")):
        axis.barh(
            names,
            [statistics.median(run[key] for run in results[name]) for name in names],
            color="#4c72b0",
        )
        axis.set_title(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
