#!/usr/bin/env python
"""Measure the memory of data.streaming over the number of rows.

    python benchmarks/streaming.py --rows 100000,2000000

Rows are `{"text": "row 17"}`, tokenised byte by byte. For each number of rows a new process makes
the shards (or finds them in --folder), opens them, and reads 300 steps of 32 sequences from all
over the epoch. Peak memory is that of this process, and of the largest worker.
"""

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
STEPS, SIZE = 300, 32


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", default="100000,1000000", help="numbers of rows")
    parser.add_argument("--folder", type=Path, help="keep rows and shards for another measurement")
    parser.add_argument("--one", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        measure(arguments.folder, arguments.one)
        return
    print(
        "| rows | shards | making s | peak MB, worker MB | reading s | peak MB |\n"
        + "| --- " * 6
        + "|"
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for count in arguments.rows.split(","):
            command = [sys.executable, __file__, "--folder", str(folder), "--one", count]
            subprocess.run(command, check=True)


def measure(folder: Path, count: int) -> None:
    """Print the line of one number of rows."""
    from finetune.data import (
        chat_templates,
        layout,
        shards,
        source_files,
        stream,
        tokenised,
    )
    from finetune.data.batches import Batches
    from finetune.models.load import bytes_tokenizer

    folder.mkdir(parents=True, exist_ok=True)
    path, cache = folder / f"{count}.jsonl", str(folder / "cache")
    if not path.exists():
        with path.open("w") as file:
            file.writelines(f'{{"text": "row {number}"}}\n' for number in range(count))
    tokenizer, begun = bytes_tokenizer(), time.perf_counter()
    template = chat_templates.load("auto", "text", None, tokenizer.special_tokens_map, {})
    options = tokenised.Options("text", {}, "line", None, "all", 64, "error")
    recipe, laid_out = shards.prepare(shards.Recipe(
        shards.root(cache), source_files.sources(str(path), None).train, template, tokenizer,
        options, layout.Plan(False, 64, 0, 0.0), cache,
    ))  # fmt: skip
    made, peak = time.perf_counter() - begun, memory(resource.RUSAGE_SELF)
    begun = time.perf_counter()
    sequences, _ = stream.opened(recipe, laid_out)
    batches = Batches(sequences, seed=1, global_batch_size=SIZE, micro_batch_size=SIZE)
    batches.largest()
    sequences.examples.quartiles()
    for step in range(STEPS):
        batches.at(step * (batches.steps_per_epoch - 1) // STEPS)
        batches.totals(step)
    read, worker = time.perf_counter() - begun, memory(resource.RUSAGE_CHILDREN)
    print(
        f"| {count:,} | {len(sequences.laid_out.lines)} | {made:.0f} | {peak}, {worker} | "
        f"{read:.1f} | {memory(resource.RUSAGE_SELF)} |",
        flush=True,
    )


def memory(of: int) -> int:
    """Return the peak of resident memory, in MB."""
    kilobytes = resource.getrusage(of).ru_maxrss
    return kilobytes // 1000 if sys.platform != "darwin" else kilobytes // 1_000_000


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
