"""Compare our scorer of multiple choice with lm-evaluation-harness on the same items.

    python benchmarks/multiple_choice.py --rows arc_easy.jsonl --model FOLDER
    python benchmarks/multiple_choice.py --rows arc_easy.jsonl --tokenizer FOLDER --dtype bfloat16

With --tokenizer, the model is a Llama of six layers with random weights. Both start from the loaded
model and end with accuracies: ours reads the file, the harness its task, with batch_size=auto. They
alternate in one process. Needs `pip install 'finetune[harness]'`.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = os.environ["TQDM_DISABLE"] = "1"
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from finetune.evaluation import benchmarks
from finetune.evaluation.continuations import Continuations

PROMPT = "{{query}}\nAnswer:"
WIDTH, LAYERS = 384, 6


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", required=True, help="rows with query, choices and gold")
    parser.add_argument("--model")
    parser.add_argument("--tokenizer")
    parser.add_argument("--limit", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--dtype", default="float32")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = opened(arguments)
    print(
        f"{sum(p.numel() for p in model.parameters()) / 1e6:.1f}M parameters, {model.dtype}, "
        f"vocabulary {len(tokenizer):,}, {arguments.limit:,} items, {arguments.threads} threads"
    )
    ways: dict[str, Callable[[], list[Any]]] = {
        "ours": lambda: ours(model, tokenizer, arguments),
        "harness": lambda: by_harness(model, tokenizer, arguments),
    }
    seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    found = {}
    for _ in range(arguments.rounds):
        for name, way in ways.items():
            wall, cpu = time.perf_counter(), time.process_time()
            found[name] = way()
            seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    for number, kind in enumerate(("wall", "CPU")):
        middle = {
            name: statistics.median(each[number] for each in taken)
            for name, taken in seconds.items()
        }
        ratio = middle["harness"] / middle["ours"]
        print(
            f"{kind}: ours {middle['ours']:.1f} s, harness {middle['harness']:.1f} s, {ratio:.1f}x"
        )
    pairs = [pair for one, other in zip(*found.values()) for pair in zip(one, other)]
    print(f"sums differ by at most {max(abs(float(a) - float(b)) for a, b in pairs):.2g} nats")


def opened(arguments: argparse.Namespace) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    dtype = getattr(torch, arguments.dtype)
    tokenizer = AutoTokenizer.from_pretrained(arguments.model or arguments.tokenizer)
    if arguments.model:
        return AutoModelForCausalLM.from_pretrained(arguments.model, dtype=dtype), tokenizer
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "llama", vocab_size=len(tokenizer), hidden_size=WIDTH, intermediate_size=1024,
        num_hidden_layers=LAYERS, num_attention_heads=6, num_key_value_heads=6,
        tie_word_embeddings=True, max_position_embeddings=2048,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).to(dtype), tokenizer


def ours(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[Any]:
    given = benchmarks.read(arguments.rows, prompt=PROMPT, limit=arguments.limit)
    found = benchmarks.logprobs(given, Continuations(model, tokenizer), tokenizer)
    benchmarks.accuracies(given.items, found)
    return found


def by_harness(model: Any, tokenizer: Any, arguments: argparse.Namespace) -> list[Any]:
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    task = {
        "task": "local", "dataset_path": "json", "test_split": "train",
        "dataset_kwargs": {"data_files": arguments.rows}, "output_type": "multiple_choice",
        "doc_to_text": PROMPT, "doc_to_choice": "{{choices}}", "doc_to_target": "gold",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
    }  # fmt: skip
    found = lm_eval.simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size="auto"), tasks=[task],
        task_manager=TaskManager(include_defaults=False), limit=arguments.limit,
        log_samples=True, bootstrap_iters=0,
    )  # fmt: skip
    samples = sorted(found["samples"]["local"], key=lambda sample: sample["doc_id"])
    return [[each[0] for each in sample["filtered_resps"]] for sample in samples]


if __name__ == "__main__":
    main()
