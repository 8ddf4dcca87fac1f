"""What fits: the largest micro-batch, and the cheapest change of a config that does not."""

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from finetune.config import Config, Full, Lora, QLora
from finetune.engine.topology import support
from finetune.engine.topology.launch import ParallelConfig
from finetune.errors import ConfigError
from finetune.forecast.memory import Forecast, Forecaster
from finetune.forecast.trace import Shape
from finetune.models import attention_choice, load

# Of a GPU: what its allocator rounds up and cannot join again. Of a machine: what else runs on it.
SLACK = 0.05


def capacity(device: torch.device, processes_here: int = 1) -> float:
    """Bytes that a process may use: of its GPU, or its share of this machine or of the container it
    is in.

    Of a GPU what is free now: others may be at work on it. What this process holds already counts
    as free.
    """
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return min(free + torch.cuda.memory_reserved(device), total * (1 - SLACK))
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for name in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(name).read_text()))
        except (OSError, ValueError):  # no such file, or "max"
            continue
    return min(limits) * (1 - SLACK) / processes_here


def capacity_here(device: torch.device) -> float:
    """As `capacity`, of a process that the launcher has started."""
    return capacity(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def shape(config: Config, micro_batch_size: int | None = None) -> Shape:
    """The largest micro-batch there can be: sequences of data.max_length, all of which is learned."""
    given, length = config.train.micro_batch_size, config.data.max_length
    return Shape(micro_batch_size or (1 if given == "auto" else given), length, length)


class Chooser:
    """Answers for one run config; forecasters, of it and of what it could be changed to, are made
    once.
    """

    def __init__(self, config: Config, *, precision: str, on_gpu: bool) -> None:
        """Raises ModelError for a model that cannot be."""
        self.config, self.precision, self.on_gpu = config, precision, on_gpu
        self.model_config, self.tokenizer = (
            load.load_config(config.model),
            load.load_tokenizer(config.model),
        )
        # Flash attention holds what attention over documents does, and is not to be had without a
        # GPU.
        wanted = (
            attention_choice.DOCUMENTS
            if config.model.attention == "flash_attention_2"
            else config.model.attention
        )
        kind = load.model_class(self.model_config)
        self.attention = attention_choice.choose(
            wanted, kind, self.model_config, torch.device("cpu"), precision
        )
        self.maker = functools.cache(self._maker)

    def _maker(self, change: str | None = None) -> Forecaster:
        return Forecaster(
            self.config if change is None else dict(self._changes())[change], self.model_config, self.tokenizer,
            attention=self.attention, precision=self.precision, on_gpu=self.on_gpu,
        )  # fmt: skip

    def forecast(self, parallel: ParallelConfig, micro_batch_size: int | None = None) -> Forecast:
        return self.maker().of(parallel, shape(self.config, micro_batch_size))

    def largest_micro_batch(
        self, parallel: ParallelConfig, limit: float, change: str | None = None
    ) -> int | None:
        """Of those that divide the sequences of a step, the largest that fits; None if none does."""
        sizes = micro_batches(self.config, parallel)

        def forecast(size: int) -> Forecast:
            return self.maker(change).of(parallel, shape(self.config, size))

        found = _largest(sizes, lambda size: forecast(size).peak <= limit)
        if (
            found is None and sizes
        ):  # all at once may need less than parts do, as no gradients wait next to a pass
            one, whole = forecast(1), sizes[-1]
            if one.peak - one.device["gradients"] <= limit and forecast(whole).peak <= limit:
                return whole
        return found

    def fewest_processes(self, parallel: ParallelConfig, limit: float) -> int | None:
        """Of those that make whole steps, the fewest whose memory it fits, at some micro-batch;
        None if none does.
        """
        groups = (
            [1] if parallel.kind == "single" else _divisors(self.config.train.global_batch_size)
        )
        for number in (
            group * parallel.num_context for group in groups if group % parallel.num_replicas == 0
        ):
            kind = "single" if parallel.kind == "ddp" and number == 1 else parallel.kind
            if self.largest_micro_batch(replace(parallel, kind=kind, num_processes=number), limit):
                return number
        return None

    def cheapest_change(self, parallel: ParallelConfig, limit: float) -> str | None:
        """Settings with which it fits, from what costs nothing to what learns less; None if there
        are none.
        """
        if size := self.largest_micro_batch(parallel, limit):
            return f"train.micro_batch_size: {size}"
        for name, config in self._changes():
            sized = _with(config, "train", micro_batch_size=1)  # auto is a number by then
            if not any(support.conflicts(sized, parallel)) and (
                size := self.largest_micro_batch(parallel, limit, name)
            ):
                return name + (
                    ""
                    if size == self.config.train.micro_batch_size
                    else f", train.micro_batch_size: {size}"
                )
        return None

    def _changes(self) -> Iterator[tuple[str, Config]]:
        """Each on top of recomputed layers, whose price is a quarter of the speed."""
        config, adapter, kind = self.config, self.config.adapter, self.config.adapter.kind
        recomputed = _with(config, "train", gradient_checkpointing=True)
        if config.train.gradient_checkpointing is not True:
            yield "train.gradient_checkpointing: true", recomputed
        before = (
            ""
            if config.train.gradient_checkpointing is True
            else "train.gradient_checkpointing: true, "
        )
        if kind == "full" and config.optimizer.kind == "adamw":
            yield (
                before + "optimizer.kind: adamw_8bit",
                _with(recomputed, "optimizer", kind="adamw_8bit"),
            )
            if config.model.dtype != "bfloat16":
                yield before + "model.dtype: bfloat16", _with(recomputed, "model", dtype="bfloat16")
        shape = {} if isinstance(adapter, Full) else adapter.model_dump(exclude={"kind"})
        for cls, other in (Lora, "lora"), (QLora, "qlora"):
            if config.model.init != "random" and kind not in (other, "qlora"):
                changed = cls.model_validate({"kind": other, **shape})
                yield (
                    before + f"adapter.kind: {other}",
                    recomputed.model_copy(update={"adapter": changed}),
                )


def micro_batches(config: Config, parallel: ParallelConfig) -> list[int]:
    """Those that make whole steps: the divisors of a process's share of one."""
    return _divisors(
        config.train.global_batch_size * parallel.num_context // parallel.num_processes
    )


def automatic(
    config: Config, parallel: ParallelConfig, device: torch.device, precision: str, limit: float
) -> tuple[int, int, str]:
    """(micro-batch, bytes of optimizer state and averages on the device, why), for processes that
    are running.

    `limit`: bytes that the process with the least may use. Raises ConfigError if none fits.
    """
    chooser = Chooser(config, precision=precision, on_gpu=device.type == "cuda")
    size = chooser.largest_micro_batch(parallel, limit)
    forecast = chooser.forecast(parallel, size or 1)
    said = f"{forecast.peak / 1e9:.1f} of {limit / 1e9:.1f} GB by forecast"
    if size is None:
        other = chooser.cheapest_change(parallel, limit)
        raise ConfigError(
            "train.micro_batch_size: auto found no size that fits: a single sequence of "
            f"{config.data.max_length:,} tokens needs {said}; "
            + (f"take {other}" if other else "take more processes, or shorter sequences") + "; see docs/performance.md"
        )  # fmt: skip
    beside = forecast.device.get("optimizer", 0.0) + forecast.device.get("average", 0.0)
    return size, int(beside), f"train.micro_batch_size: auto is {size}: {said}"


def advice(config: Config, parallel: ParallelConfig, device: torch.device, precision: str) -> str:
    """What was forecast for a process that ran out of memory, and the next setting to try."""
    chooser, limit = (
        Chooser(config, precision=precision, on_gpu=device.type == "cuda"),
        capacity_here(device),
    )
    size = config.micro_batch_size
    forecast = chooser.forecast(parallel)
    said = f"forecast: {forecast.peak / 1e9:.1f} of {limit / 1e9:.1f} GB"
    if forecast.peak <= limit and size > 1:  # something else takes memory, or the forecast is wrong
        smaller = max(other for other in micro_batches(config, parallel) if other < size)
        return f"{said}, which should fit: check what else uses the memory, or try train.micro_batch_size: {smaller}"
    other = chooser.cheapest_change(
        parallel, limit if forecast.peak > limit else 0.95 * forecast.peak
    )
    return (
        f"{said}; try {other}"
        if other
        else f"{said}; take more processes, or shorter sequences (data.max_length)"
    )


def _with(config: Config, section: str, **values: Any) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """The last of rising sizes that fits. From the smallest in leaps, then by halves: large ones
    take long to try.
    """
    low, high, leap = -1, len(sizes), 1
    place = 0
    while low < place < high:
        if fits(sizes[place]):
            low, place = place, place + leap
        else:
            high = place
        leap *= 2
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return None if low < 0 else sizes[low]
