"""python -m finetune plan: does it fit, how much is left, what is the most that does, and what to change. No weights are loaded."""

import argparse
import contextlib
import json
import math
import statistics
import sys
from pathlib import Path

import torch

from finetune import config as configs
from finetune import launcher
from finetune.config import Config
from finetune.engine.topology import launch, support
from finetune.engine.topology.launch import Wish
from finetune.errors import ConfigError, UserError
from finetune.models import parameters
from finetune.plan.choice import SLACK, Chooser, capacity
from finetune.plan.forecast import Forecast

ROOT = Path(__file__).parents[2]
GB = 1e9


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", required=True, metavar="FILE", help="run config")
    parser.add_argument(
        "--topology", metavar="FILE", help="one topology file, in detail; default: all of accelerate_configs/"
    )
    parser.add_argument("--num-processes", type=int, metavar="N", help="instead of what the topology files say")
    parser.add_argument(
        "--gpu-memory", type=float, metavar="GB",
        help="plan for GPUs of so many GB (10^9 bytes); default: those of this machine, or its memory if there are none",
    )  # fmt: skip
    parser.add_argument(
        "--measured", type=Path, metavar="RUN", help="a run on the same hardware: how fast this one will be"
    )


def main(arguments: argparse.Namespace) -> None:
    config, _ = configs.parse(["--config", arguments.config])
    memory, cuda = arguments.gpu_memory, torch.cuda.is_available()
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--gpu-memory {memory:g}: it must be a number of GB above 0")
    on_gpu, precision = memory is not None or cuda, config.train.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    files = [Path(arguments.topology)] if arguments.topology else sorted((ROOT / "accelerate_configs").glob("*.yaml"))
    asked = {file.stem: _wish(file, arguments.num_processes, required=len(files) == 1) for file in files}
    wishes = {name: wish for name, wish in asked.items() if wish}
    chooser = Chooser(config, precision=precision, on_gpu=on_gpu)
    print(_about(config, chooser), flush=True)
    heads = ["", "processes", "GPU GB" if on_gpu else "GB", "host GB", "left", "micro-batch", "longest"]
    rows = [[*heads, *(["tokens/s"] if arguments.measured else []), "to make it fit"]]
    for number, (name, wish) in enumerate(wishes.items(), 1):
        _progress(f"{number} of {len(wishes)}: {name}")
        limit = capacity(torch.device("cuda" if cuda else "cpu"), wish.num_processes)
        limit = limit if memory is None else memory * GB * (1 - SLACK)
        rows.append([name, str(wish.num_processes), *_row(chooser, wish, limit, arguments.measured)])
    _progress("")
    if arguments.topology:
        (wish,) = wishes.values()
        print("\n" + _parts(chooser.forecast(wish), on_gpu))
    print("\n" + _table(rows))
    print(
        f"\nGB are 10^9 bytes of one process; left: of {'a GPU' if on_gpu else 'its share of this machine'}, less {SLACK:.0%}.\n"
        "micro-batch, longest: the largest that fit, of those that divide train.global_batch_size, and with the micro-batch of the config."
    )


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<50}\r", end="", file=sys.stderr, flush=True)


def _wish(file: Path, num_processes: int | None, required: bool) -> Wish | None:
    """What the file asks for, by Accelerate's own reading; None, unless it is required, if it cannot have so many processes."""
    options = ["--config_file", str(file.resolve())]
    if num_processes and file.stem != "single":
        options += ["--num_processes", str(num_processes)]
    if "multinode" in file.stem:
        options += ["--main_process_ip", "127.0.0.1"]
    try:
        with contextlib.ExitStack() as held, contextlib.chdir(ROOT):
            environments, _ = launcher.plan([*options, "train.py"], held)
            return launch.read(environments[0])
    except UserError:
        if required:
            raise
        return None


def _row(chooser: Chooser, wish: Wish, limit: float, measured: Path | None) -> list[str]:
    config, data = chooser.config, wish.num_processes // wish.num_context
    nothing = [""] * (6 if measured else 5)
    auto, problems = "train.micro_batch_size: auto", list(support.conflicts(config, wish))
    if others := [problem for problem in problems if not problem.startswith(auto)]:
        return [*nothing, f"not with {wish.name}: {others[0].split(':')[0]}"]
    if config.train.global_batch_size % data:
        return [*nothing, f"train.global_batch_size: a multiple of {data}"]
    micro = chooser.largest_micro_batch(wish, limit)
    forecast = chooser.forecast(wish, micro if config.train.micro_batch_size == "auto" else None)
    longest = chooser.longest(wish, limit)
    speed = [f"{_speed(measured, chooser) * wish.num_processes:,.0f}"] if measured else []
    verdict = f"fits, with train.micro_batch_size: {micro} for auto" if problems else "fits"
    if forecast.peak > limit:
        verdict = chooser.cheapest_change(wish, limit) or "nothing that is known here"
    return [
        f"{forecast.peak / GB:.1f}", f"{forecast.host_peak / GB:.1f}" if forecast.host else "", f"{(limit - forecast.peak) / GB:+.1f}",
        f"{micro:,}" if micro else "none", f"{longest:,}" if longest else "none", *speed,
        verdict,
    ]  # fmt: skip


def _speed(run: Path, chooser: Chooser) -> float:
    """Tokens a second of one process, from the arithmetic a second that a run has reached."""
    try:
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        receipt = json.loads((run / "receipt.json").read_text())
        reached = statistics.median(line["tokens_per_second"] for line in lines[1:] or lines)
        known = receipt["parameters"]
        processes = receipt["num_processes"]
    except (OSError, ValueError, KeyError, statistics.StatisticsError) as exc:
        raise ConfigError(f"--measured {run}: no run with metrics and a receipt: {exc}") from exc
    weights = chooser.maker().weights
    then = parameters.flops_per_token(known["trainable"], known["total"])
    return reached / processes * then / parameters.flops_per_token(weights.num_trained, weights.num)


def _about(config: Config, chooser: Chooser) -> str:
    weights = chooser.maker().weights
    name = config.model.path or f"{chooser.model_config.model_type} from random weights"
    micro, train = config.train.micro_batch_size, config.train
    return "\n".join(
        [
            f"model  {name}: {weights.num:,} parameters, {weights.num_trained:,} of them train ({config.adapter.kind})",
            f"step   {train.global_batch_size} sequences of {config.data.max_length:,} tokens, {micro} at once in a process; {chooser.precision}, "
            f"attention {chooser.attention}, layers {'recomputed' if train.gradient_checkpointing else 'kept'}, {config.optimizer.kind}",
        ]
    )


def _parts(forecast: Forecast, on_gpu: bool) -> str:
    lines = [[f"one process, {'its GPU' if on_gpu else 'memory'}", "GB"]]
    lines += [[f"  {name}", f"{size / GB:.2f}"] for name, size in forecast.device.items() if size]
    lines += [["  at its peak, as not all is there at once", f"{forecast.peak / GB:.2f}"]]
    if forecast.host:
        lines += [["and of its host", ""]] + [
            [f"  {name}", f"{size / GB:.2f}"] for name, size in forecast.host.items() if size
        ]
    return _table(lines)


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if place in (0, len(row) - 1 if len(row) > 2 else -1) else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths))
        ).rstrip()
        for row in rows
    )
