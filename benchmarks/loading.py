"""Measure host memory while a model is loaded and sharded: the table of docs/topologies.md.

    python benchmarks/loading.py --layers 24 --width 1024    # a Llama of 0.4B parameters, 1.6 GB

Launches each topology with two processes on a CPU; each records its peak memory (ru_maxrss) before
the model is loaded and after it is sharded. Without a GPU, shards and what ZeRO keeps next to them
are in host memory. The main process's peak includes the file it reads, which the system can drop.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TOPOLOGIES = ["ddp", "fsdp2", "zero2", "zero3"]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--processes", type=int, default=2)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        total = make_model(folder / "model", arguments.layers, arguments.width)
        print(f"weights: {total / 1e9:.2f} GB in float32")
        print(
            "| topology | " + " | ".join(f"process {n}" for n in range(arguments.processes)) + " |"
        )
        for topology in TOPOLOGIES:
            peaks = measure(topology, arguments.processes, folder)
            print(
                f"| {topology} | " + " | ".join(f"{peak / 1e9:.2f} GB" for peak in peaks) + " |",
                flush=True,
            )


def make_model(folder: Path, layers: int, width: int) -> int:
    """Save a Llama of random weights with the tokenizer of bytes; return its size in bytes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sys.path.insert(0, str(ROOT))
    from finetune.models.load import bytes_tokenizer

    shape = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    model = LlamaForCausalLM(LlamaConfig(**shape, num_attention_heads=16, vocab_size=32000))
    model.save_pretrained(folder)
    bytes_tokenizer().save_pretrained(folder)
    return sum(p.numel() * p.element_size() for p in model.parameters())


def measure(topology: str, processes: int, folder: Path) -> list[int]:
    """Return by how many bytes loading and sharding raise each process's peak memory."""
    rows = folder / "rows.jsonl"
    rows.write_text(
        "".join(json.dumps({"question": f"{i}", "answer": f"{i}"}) + "\n" for i in range(8))
    )
    command = [
        sys.executable, "-m", "accelerate.commands.launch",
        "--config_file", str(ROOT / f"accelerate_configs/{topology}.yaml"),
        "--num_processes", str(processes), "--main_process_port", "0", str(Path(__file__)),
    ]  # fmt: skip
    environment = {**os.environ, "LOADING_FOLDER": str(folder), "PYTHONPATH": str(ROOT)}
    # Freed blocks return to the system, and do not count twice.
    environment["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(processes)]


def build_and_note(folder: Path) -> None:
    """Build the model as a run does, in one process, and record its memory before and after."""
    from finetune import config as configs
    from finetune import loop, preflight
    from finetune.engine.rundir import RunDirectory
    from finetune.engine.topology import Topology
    from finetune.models import attention_probe, head
    from finetune.run import Run
    from finetune.survival.preemption import StopFlag

    # The first pass through the model gathers layers, which does not belong to loading.
    attention_probe.check = head.check = lambda *_: None
    config = configs.from_dict({
        "run": {"name": "loading", "dir": str(folder / "runs")},
        "model": {"path": str(folder / "model")},
        "data": {"train": str(folder / "rows.jsonl"), "cache_dir": str(folder / "cache")},
        "train": {"global_batch_size": 8, "micro_batch_size": 1},
    })  # fmt: skip
    topology = Topology("fp32")
    topology.require_same({})
    run = Run(
        config,
        RunDirectory(config),
        None,
        topology,
        preflight.prepare(config, topology),
        StopFlag(),
    )
    topology.sum([0.0])  # allocates what communication needs, before measuring
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    loop.build(run)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    (folder / f"{topology.rank}.json").write_text(json.dumps(1024 * grown))
    del run
    topology.close()


if __name__ == "__main__":
    if "LOADING_FOLDER" in os.environ:
        build_and_note(Path(os.environ["LOADING_FOLDER"]))
    else:
        main()
