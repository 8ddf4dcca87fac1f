"""`finetune plan`: forecast whether a config fits, and what to change. Loads no weights."""

import argparse
import math
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import torch

from finetune import config as configs
from finetune.config import Config, base, paths
from finetune.config.engine_fields import ServerEngine
from finetune.engine.topology import launch, support
from finetune.engine.topology.launch import ParallelConfig
from finetune.errors import ConfigError, UserError
from finetune.forecast import measured, outlook
from finetune.forecast.choice import SLACK, Chooser, Settled, capacity, micro_batches
from finetune.forecast.memory import Forecast
from finetune.forecast.outlook import GB
from finetune.places import SHIPPED, TRAIN, found
from finetune.survival import launcher

ASLEEP = 0.6e9  # bytes of a GPU that a sleeping server keeps: CUDA's context


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    parser.usage = "%(prog)s CONFIG [options] [--section.field VALUE ...]"
    add("--config", metavar="FILE", help="run config; its path alone will do as well")
    what = "show one topology file in detail; default: all of accelerate_configs/"
    add("--topology", type=paths.argument, metavar="FILE", help=what)
    what = "number of processes; default: from the topology files"
    add("--num-processes", type=int, metavar="N", help=what)
    what = "memory of each GPU in GB (10^9 bytes); default: the GPUs of this machine, or its "
    add("--gpu-memory", type=float, metavar="GB", help=what + "main memory without GPUs")


def main(arguments: argparse.Namespace) -> None:
    named = ["--config", arguments.config] if arguments.config else []
    config, _ = configs.parse([*named, *arguments.settings], needs_weights=False)
    config = _with_tokenizer(config)
    memory, cuda = arguments.gpu_memory, torch.cuda.is_available()
    if memory is not None and not 0 < memory < math.inf:
        raise ConfigError(f"--gpu-memory {memory:g}: must be a number of GB above 0")
    on_gpu, precision = memory is not None or cuda, config.train.precision
    if precision == "auto":
        precision = "bf16" if on_gpu else "fp32"
    if arguments.num_processes is not None and arguments.num_processes < 1:
        raise ConfigError(
            f"--num-processes {arguments.num_processes}: must be a whole number from 1"
        )
    topologies = _topologies(arguments.topology, arguments.num_processes)
    chooser = Chooser(config, precision=precision, on_gpu=on_gpu)
    chooser.require_possible()
    print(_about(config, chooser), flush=True)
    sizes = ["fewest", "GPU GB"] if on_gpu else ["GB"]
    rows = [["", "processes", *sizes, "host GB", "left", "micro-batch", "to make it fit"]]
    for number, (name, parallel) in enumerate(topologies.items(), 1):
        _progress(f"{number} of {len(topologies)}: {name}")
        limit = capacity(torch.device("cuda" if cuda else "cpu"), parallel.num_processes)
        if memory is not None:
            limit = memory * GB * (1 - SLACK) - (ASLEEP if _shares_gpu(config) else 0.0)
        rows.append([name, str(parallel.num_processes), *_row(chooser, parallel, limit)])
    _progress("")
    if arguments.topology and micro_batches(config, parallel):
        settled = _settled(chooser, parallel, limit)
        print("\n" + _parts(settled.forecast, on_gpu, limit))
        if chooser.may_recompute:
            print("\n" + chooser.recomputation(settled, limit))
    print("\n" + _advice(rows, on_gpu))
    print("\n" + _table(rows))
    print("\n" + "\n".join(_legend(chooser)))
    if on_gpu and _shares_gpu(config):
        total = torch.cuda.mem_get_info()[1] if memory is None else memory * GB
        print("\n" + _server(chooser, parallel, total))
    if on_gpu:
        gpu = torch.cuda.get_device_name() if cuda and memory is None else None
        one = parallel if arguments.topology else ParallelConfig()
        print("\n" + "\n".join(_measured(chooser, one, gpu, bool(arguments.topology))))


def _shares_gpu(config: Config) -> bool:
    """Return whether a server samples on the run's GPU, and sleeps while it trains."""
    engine = config.rollouts.engine if config.rollouts else None
    return isinstance(engine, ServerEngine) and engine.sleep


def _server(chooser: Chooser, parallel: ParallelConfig, total: float) -> str:
    """Say what a server on the same GPU keeps asleep, and may take awake."""
    forecast, weights = chooser.forecast(parallel, 1), chooser.forecaster().weights
    most = max(0.0, math.floor(100 * (1 - (forecast.resting + ASLEEP) / total)) / 100)
    base = 2 * (weights.num - weights.num_trained)
    host = f" and {base / GB:.1f} GB of its host" if base else ""
    return (
        f"server    asleep it keeps about {ASLEEP / GB:.1f} GB of the GPU (usual, not measured)"
        f"{host}; awake it may take what the run leaves between steps: "
        f"vllm serve ... --gpu-memory-utilization {most:.2f}"
    )


def _with_tokenizer(config: Config) -> Config:
    """Let bytes stand for the tokenizer that a folder lacks: only new tokens change a forecast."""
    model, path = config.model, config.model.path
    if path is None or model.tokenizer or model.new_tokens or not os.path.isdir(path):
        return config
    has_one = base.has_tokenizer(Path(path))
    return config if has_one else config.changed("model", tokenizer="bytes")


def _simplest_first(file: Path) -> tuple[bool, int, str]:
    """Return the key to sort by: one node before several, then DDP before sharding."""
    kinds = ("single", "cpu_debug", "ddp", "zero1", "zero2", "fsdp2", "zero3")
    places = (place for place, name in enumerate(kinds) if file.stem.startswith(name))
    return "multinode" in file.stem, next(places, len(kinds)), file.stem


def _advice(rows: list[list[str]], on_gpu: bool) -> str:
    """Return the first topology that fits, and the change that the first one needs, in one line."""
    heads, *found = rows
    left = heads.index("left")
    possible = [row for row in found if row[left]]  # the others do not support this config
    if not possible:
        return f"advice  no topology supports this config: {found[0][0]}: {found[0][-1]}"
    fits = next((row for row in possible if row[-1].startswith("fits")), None)
    advice = []
    if possible[0] is not fits:
        name, processes, *_, change = possible[0]
        advice.append(f"on {_gpus(processes, on_gpu)} ({name}) it needs a change: {change}")
    if fits:
        name, processes, *_, verdict = fits
        how = verdict.removeprefix("fits").removeprefix(", ")
        unchanged = "as it is " if advice and not how else ""
        also = f" {how.replace('with ', 'and ', 1)}" if how else ""
        advice.append(
            f"{unchanged}it fits on {_gpus(processes, on_gpu)} with "
            f"accelerate_configs/{name}.yaml{also}; {fits[left].removeprefix('+')} GB are left"
        )
    return "advice  " + "; ".join(advice)


def _gpus(processes: str, on_gpu: bool) -> str:
    noun = "GPU" if on_gpu else "process"
    return f"1 {noun}" if processes == "1" else f"{processes} {noun}{'s' if on_gpu else 'es'}"


def _legend(chooser: Chooser) -> Iterator[str]:
    memory = "a GPU" if chooser.on_gpu else "its share of this machine"
    yield f"GB are 10^9 bytes of one process; left: of {memory}, less {SLACK:.0%}."
    if chooser.on_gpu:
        yield "fewest: the smallest number of GPUs that fits by memory and makes whole steps."
    is_auto = chooser.config.train.micro_batch_size == "auto"
    also = ", without recomputed layers if any does" if is_auto and chooser.may_recompute else ""
    yield f"micro-batch: the largest that fits and makes whole steps{also}."


def _measured(
    chooser: Chooser, parallel: ParallelConfig, gpu: str | None, in_detail: bool
) -> Iterator[str]:
    """Yield what `make gpu` measured on a GPU; None: on every kind that was measured."""
    known, config = measured.read(), chooser.config
    if gpu is None and not known:
        yield "measured  nothing yet: `make gpu` on a GPU writes benchmarks/measured.json"
    steps = config.train.max_steps
    length = config.data.max_length
    num_tokens = steps * config.train.global_batch_size * length if steps else None
    for name in known if gpu is None else [gpu]:
        found = known.get(name, [])
        yield f"measured  {outlook.accuracy(name, found)}"
        if in_detail and (cases := list(outlook.peaks(found))):
            cells = [[case, f"{expected:.2f}", f"{peak:.2f}"] for case, expected, peak in cases]
            yield _table([["", "forecast, GB", "measured, GB"], *cells])
        fast = outlook.speed_of(chooser, parallel, found, length, num_tokens)
        on = "1 GPU" if parallel.num_processes == 1 else f"{parallel.num_processes} GPUs"
        yield f"speed     on {on}: {fast or 'not measured (make gpu PART=speed)'}"


def _progress(text: str) -> None:
    if sys.stderr.isatty():
        print(f"\r{text:<50}\r", end="", file=sys.stderr, flush=True)


def _topologies(file: str | None, num_processes: int | None) -> dict[str, ParallelConfig]:
    """Return the topologies by name: of one file, or of all that allow this number of processes."""
    if file:
        files = [Path(found(file))]
    else:
        files = sorted((SHIPPED / "accelerate_configs").glob("*.yaml"), key=_simplest_first)
    read = {path.stem: _parallel(path, num_processes, required=len(files) == 1) for path in files}
    return {name: parallel for name, parallel in read.items() if parallel}


def _parallel(file: Path, num_processes: int | None, required: bool) -> ParallelConfig | None:
    """Return the topology of a file, as Accelerate reads it.

    If it does not allow that number of processes: raise UserError if `required`, or return None.
    """
    options = ["--config_file", str(file.resolve())]
    if num_processes and (required or file.stem != "single"):
        options += ["--num_processes", str(num_processes)]
    if "multinode" in file.stem:
        # As node 1: on node 0 Accelerate checks the port.
        options += ["--main_process_ip", "127.0.0.1", "--machine_rank", "1"]
    try:
        environments, _ = launcher.read([*options, str(TRAIN)])
        return launch.read(environments[0])
    except UserError:
        if required:
            raise
        return None


def _settled(chooser: Chooser, parallel: ParallelConfig, limit: float) -> Settled:
    """Return what the run takes for auto.

    With the config's micro-batch, or the largest below it that makes whole steps.
    """
    given = chooser.config.train.micro_batch_size
    if given == "auto":
        return chooser.settle(parallel, limit)
    sizes = micro_batches(chooser.config, parallel)
    return chooser.settle(parallel, limit, max(size for size in sizes if size <= given))


def _row(chooser: Chooser, parallel: ParallelConfig, limit: float) -> list[str]:
    config, data = chooser.config, parallel.num_processes // parallel.num_context
    nothing = [""] * (4 + chooser.on_gpu)
    auto, problems = "train.micro_batch_size: auto", list(support.conflicts(config, parallel))
    if others := [problem for problem in problems if not problem.startswith(auto)]:
        return [*nothing, others[0]]
    if config.train.global_batch_size % data:
        return [*nothing, f"train.global_batch_size: a multiple of {data}"]
    settled = _settled(chooser, parallel, limit)
    most, forecast = settled.micro_batch_size, settled.forecast
    micro = most or 1
    if config.train.micro_batch_size != "auto":
        most = chooser.largest_micro_batch(parallel, limit)
    verdict = "fits"
    if forecast.peak > limit:
        smaller = "more processes, another topology, or shorter sequences (data.max_length)"
        verdict = chooser.cheapest_change(parallel, limit) or smaller
    elif problems or config.train.micro_batch_size not in ("auto", micro):
        verdict = f"fits, with train.micro_batch_size: {micro}" + (" for auto" if problems else "")
    # On a CPU more processes only divide the same memory.
    fewest = [_number(chooser.fewest_processes(parallel, limit))] if chooser.on_gpu else []
    host = f"{forecast.host_peak / GB:.1f}" if forecast.host else ""
    left = f"{(limit - forecast.peak) / GB:+.1f}"
    return [*fewest, f"{forecast.peak / GB:.1f}", host, left, _number(most), verdict]


def _number(value: int | None) -> str:
    return "none" if value is None else f"{value:,}"


def _about(config: Config, chooser: Chooser) -> str:
    weights = chooser.forecaster().weights
    name = config.model.path or f"{chooser.model_config.model_type} from random weights"
    micro, train = config.train.micro_batch_size, config.train
    return (
        f"model  {name}: {weights.num:,} parameters, {weights.num_trained:,} of them train "
        f"({config.adapter.kind})\n"
        f"step   {train.global_batch_size} sequences of {config.data.max_length:,} tokens, "
        f"{micro} at once in a process; {chooser.precision}, "
        f"attention {chooser.attention}, layers {_kept(train.gradient_checkpointing)}, "
        f"{config.optimizer.kind}"
    )


def _kept(recomputed: bool | int | str) -> str:
    if recomputed == "auto":
        return "recomputed as far as they must"
    if isinstance(recomputed, bool):
        return "recomputed" if recomputed else "kept"
    return f"kept but for {recomputed}, recomputed"


def _parts(forecast: Forecast, on_gpu: bool, limit: float) -> str:
    def lines(parts: dict[str, float]) -> list[list[str]]:
        return [[f"  {name}", f"{size / GB:.2f}"] for name, size in parts.items() if size]

    rows = [[f"one process, {'its GPU' if on_gpu else 'memory'}", "GB"], *lines(forecast.device)]
    rows.append(["  at its peak, as not all is there at once", f"{forecast.peak / GB:.2f}"])
    if on_gpu:
        rows.append(
            ["  and kept free for fragmentation", f"{limit / (1 - SLACK) * SLACK / GB:.2f}"]
        )
    if forecast.host:
        rows += [["and of its host", ""], *lines(forecast.host)]
    return _table(rows)


def _table(rows: list[list[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows)]
    # The first column is text; so is the last one of more than two.
    left = {0} if len(widths) == 2 else {0, len(widths) - 1}

    def line(row: list[str]) -> str:
        cells = enumerate(zip(row, widths))
        return "  ".join(c.ljust(w) if place in left else c.rjust(w) for place, (c, w) in cells)

    return "\n".join(line(row).rstrip() for row in rows)
