"""Measure speed and memory over length, pack, vocabulary, rank, size and processes.

    python benchmarks/growth.py --plot docs/growth.png    the table of docs/performance.md, on a CPU
    python benchmarks/growth.py --only vocabulary         a regular expression

Changes one thing at a time from a Llama of 16M parameters: full weights, bf16, packs of 512 tokens,
2,048 tokens a step, all supervised. Rounds alternate over all cases; prints their medians.
"""

import argparse
import re
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from runs import ROOT, Measured, measure

TOKENS, STEPS, WARM = 2048, 8, 2
SHAPE = {
    "model_type": "llama", "hidden_size": 384, "intermediate_size": 1024,
    "num_hidden_layers": 6, "num_attention_heads": 6, "num_key_value_heads": 2,
    "vocab_size": 8000, "max_position_embeddings": 4096,
}  # fmt: skip
LORA = {"model.init": "pretrained", "adapter.kind": "lora"}


def shape(**changes: Any) -> dict[str, Any]:
    return {"model.config": SHAPE | changes}


def packed(length: int, document: int) -> dict[str, Any]:
    return {"data.max_length": length, "document": document}


def wide(factor: int) -> dict[str, Any]:
    return shape(
        hidden_size=192 * factor,
        intermediate_size=512 * factor,
        num_attention_heads=3 * factor,
        num_key_value_heads=1,
    )


# What grows -> its value -> settings that differ from the others.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "length of documents": {
        str(n): packed(max(n, 512), n) for n in (64, 128, 256, 512, 1024, 2048)
    },
    "pack, of documents of 128": {str(n): packed(n, 128) for n in (128, 512, 2048)},
    "vocabulary": {f"{n:,}": shape(vocab_size=n) for n in (1000, 8000, 32000, 128000)},
    "rank of LoRA": {
        str(r): {**LORA, "adapter.r": r, "adapter.alpha": 2 * r} for r in (4, 16, 64, 256)
    },
    "width": {str(192 * factor): wide(factor) for factor in (1, 2, 4)},
    "layers recomputed, of 6": {
        str(n): {"train.gradient_checkpointing": n or False} for n in (0, 3, 6)
    },
    "layers": {str(n): shape(num_hidden_layers=n) for n in (2, 6, 12)},
    "processes, ddp": {"1": {}, "2": {"processes": 2, "topology": "ddp"}},
    "processes, fsdp2": {"1": {}, "2": {"processes": 2, "topology": "fsdp2"}},
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="", help="regular expression: what grows")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--plot", type=Path, help="PNG to draw")
    arguments = parser.parse_args()
    found: dict[tuple[str, str], list[Measured]] = {}
    chosen = [
        (what, value) for what in CASES if re.search(arguments.only, what) for value in CASES[what]
    ]
    with tempfile.TemporaryDirectory() as folder:
        for turn in range(arguments.rounds):
            for number, (what, value) in enumerate(chosen, 1):
                print(
                    f"round {turn + 1}, {number} of {len(chosen)}: {what} {value}", file=sys.stderr
                )
                found.setdefault((what, value), []).append(one(Path(folder), CASES[what][value]))
    print("| what grows | | tokens/s | memory |\n| --- | --- | --- | --- |")
    medians = {key: middle(runs) for key, runs in found.items()}
    for (what, value), (speed, memory) in medians.items():
        print(f"| {what} | {value} | {speed:,.0f} | {memory:.2f} GB |")
    if arguments.plot:
        plot(medians, arguments.plot)


def one(folder: Path, changes: dict[str, Any]) -> Measured:
    changes = dict(changes)
    document, processes = changes.pop("document", 512), changes.pop("processes", 1)
    topology = changes.pop("topology", "single")
    rows = folder / f"rows{document}.txt"
    if not rows.exists():  # a byte is a token; BOS and EOS are two more
        numbers = range(20000 // (document // 64))
        texts = (f"{i:06} ".ljust(document - 2, "abcdefgh"[i % 8]) for i in numbers)
        rows.write_text("".join(f"{text}\n" for text in texts))
    length = changes.get("data.max_length", 512)
    at_once = TOKENS // length
    settings = {
        "model.init": "random", "model.tokenizer": "bytes", "model.config": SHAPE,
        "objective.kind": "clm", "data.train": str(rows), "data.packing": True,
        "data.max_length": length, "optimizer.lr": 1e-4, "checkpoint.asynchronous": False,
        "train.precision": "bf16", "train.global_batch_size": at_once,
        "train.micro_batch_size": at_once // processes, "train.max_steps": STEPS, **changes,
    }  # fmt: skip
    if settings["model.init"] == "pretrained":
        del settings["model.tokenizer"], settings["model.config"]
        settings["model.path"] = str(saved(folder / "base"))
    return measure(folder, settings, warm=WARM, topology=topology, processes=processes)


def saved(folder: Path) -> Path:
    """Save the model of random weights, once, as a base for adapters; return its folder."""
    if not folder.exists():
        sys.path.insert(0, str(ROOT))
        from transformers import AutoConfig, AutoModelForCausalLM

        from finetune.models.load import bytes_tokenizer

        values = dict(SHAPE)
        AutoModelForCausalLM.from_config(
            AutoConfig.for_model(values.pop("model_type"), **values)
        ).save_pretrained(folder)
        bytes_tokenizer().save_pretrained(folder)
    return folder


def middle(runs: list[Measured]) -> tuple[float, float]:
    speeds, memories = zip(*((run.tokens_per_second, run.memory_gb) for run in runs))
    return statistics.median(speeds), statistics.median(memories)


def plot(medians: dict[tuple[str, str], tuple[float, float]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    names = list(dict.fromkeys(what for what, _ in medians))
    figure, axes = pyplot.subplots(
        2, -(-len(names) // 2), figsize=(3.2 * -(-len(names) // 2), 5.6), squeeze=False
    )
    for axis, name in zip(axes.flat, names):
        values = {value: pair for (what, value), pair in medians.items() if what == name}
        axis.plot(
            list(values), [speed for speed, _ in values.values()], marker="o", color="tab:blue"
        )
        axis.set_ylim(bottom=0)
        axis.set_title(name, fontsize=9)
        axis.tick_params(labelsize=7)
        other = axis.twinx()
        other.plot(
            list(values),
            [memory for _, memory in values.values()],
            marker="s",
            color="tab:orange",
            alpha=0.7,
        )
        other.set_ylim(bottom=0)
        other.tick_params(labelsize=7)
    for axis in axes.flat[len(names) :]:
        axis.set_visible(False)
    figure.suptitle(
        "tokens a second (blue, left), GB of the first process (orange, right)", fontsize=9
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
