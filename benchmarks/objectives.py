"""What a step of each objective costs beside SFT on the same rows: time and peak memory.

    python benchmarks/objectives.py PAIRS.json --tokenizer FOLDER --out FOLDER

PAIRS.json: preference rows, as of LLaMA-Factory's dpo_en_demo. SFT learns both answers of each, so
all runs read the same tokens. Each run is a process of its own, and the kinds take turns. Seconds
are those of CPU, as other programs may use the machine: those of a run less those of one that ends
after a step, so the start is not in them, and the pass of a reference is.
"""

import argparse
import ast
import json
import multiprocessing
import os
import resource
import statistics
import sys
from pathlib import Path
from typing import Any

import yaml

os.environ["HF_HUB_OFFLINE"], os.environ["OMP_NUM_THREADS"] = "1", "1"
ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
SHORT, LONG = 1, 4  # steps
SHAPE = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 4, "max_position_embeddings": 1024,
}  # fmt: skip
KINDS = ("sft", "simpo", "dpo", "kto", "reward", "distill")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("pairs", type=Path)
    parser.add_argument("--tokenizer", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True, help="a new folder")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--characters", type=int, default=600, help="of a question or an answer")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True)
    write_rows(arguments)
    from finetune import loop  # noqa: F401  (imported once, for all processes)

    if not run(arguments, "sft", "teacher", SHORT):
        sys.exit("the teacher could not be trained")
    found: dict[str, list[tuple[float, float, int]]] = {kind: [] for kind in KINDS}
    for number in range(arguments.rounds):
        for kind in KINDS:
            few, many = (
                run(arguments, kind, f"{kind}-{number}-{steps}", steps) for steps in (SHORT, LONG)
            )
            if few and many:
                tokens = (many[2] - few[2]) / 1000
                found[kind].append(((many[0] - few[0]) / tokens, many[1], many[2]))
                print(kind, found[kind][-1], flush=True)
    base = [statistics.median(values) for values in zip(*found["sft"])]
    print(f"{'':<8}  CPU s per 1,000 tokens  beside sft  peak GB  beside sft")
    for kind, rounds in found.items():
        if rounds:
            seconds, memory, _ = (statistics.median(values) for values in zip(*rounds))
            print(
                f"{kind:<8}  {seconds:22.2f}  {seconds / base[0]:10.2f}  {memory:7.2f}  "
                f"{memory / base[1]:10.2f}"
            )


def write_rows(arguments: argparse.Namespace) -> None:
    """Write the pairs, and for SFT, KTO and distillation each answer as a row."""
    pairs, answers = [], []
    for row in json.loads(arguments.pairs.read_text()):
        given = {
            name: ast.literal_eval(each) if isinstance(each, str) else each
            for name, each in row.items()
        }
        prompt = given["conversations"][0]["value"]
        chosen, rejected = (given[name]["value"] for name in ("chosen", "rejected"))
        texts = [each[: arguments.characters].strip() for each in (prompt, chosen, rejected)]
        if len(set(texts)) < 3 or not all(texts):
            continue
        pairs.append(dict(zip(("prompt", "chosen", "rejected"), texts)))
        answers += [
            {"prompt": texts[0], "completion": text, "label": text == texts[1]}
            for text in texts[1:]
        ]
    unlabelled = [{name: row[name] for name in ("prompt", "completion")} for row in answers]
    for name, rows in (("pairs", pairs), ("judged", answers), ("answers", unlabelled)):
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (arguments.out / f"{name}.jsonl").write_text(text)


def run(
    arguments: argparse.Namespace, kind: str, name: str, steps: int
) -> tuple[float, float, int] | None:
    """Return (seconds of CPU, peak GB, tokens) of a run in a process of its own."""
    rows = {"kto": "judged", "sft": "answers", "distill": "answers"}.get(kind, "pairs")
    size = 4 if rows == "pairs" else 8  # as many answers
    objective = {"kind": kind}
    if kind == "distill":
        objective["teacher"] = str(arguments.out / "teacher" / "model")
    config: dict[str, Any] = {
        "run": {"name": name, "dir": str(arguments.out)},
        "model": {"init": "random", "tokenizer": str(arguments.tokenizer), "config": SHAPE},
        "data": {
            "train": str(arguments.out / f"{rows}.jsonl"), "truncation": "drop",
            "max_length": 1024 if rows == "pairs" else 512,
        },
        "objective": objective,
        "train": {
            "global_batch_size": size, "micro_batch_size": size, "max_steps": steps,
            "precision": "fp32",
        },
        "checkpoint": {"every_steps": 1000},
    }  # fmt: skip
    if kind == "reward":  # as phi-2's tokenizer pads with what ends answers
        config["model"]["new_tokens"] = ["<|pad|>"]
    path = arguments.out / f"{name}.yaml"
    path.write_text(yaml.safe_dump(config))
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    process = context.Process(target=_train, args=(path, results))
    process.start()
    process.join()
    if process.exitcode:
        return None
    lines = (arguments.out / name / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    return results.get(), last["memory_gb"], last["tokens"]


def _train(path: Path, results: Any) -> None:
    from finetune import config as configs
    from finetune import loop
    from finetune.survival.preemption import StopFlag

    config, check = configs.parse(["--config", str(path)])
    loop.run(config, check, StopFlag())
    used = resource.getrusage(resource.RUSAGE_SELF)
    results.put(used.ru_utime + used.ru_stime)


if __name__ == "__main__":
    main()
