"""Find the largest micro-batch that fits, and the cheapest change of a config that does not."""

import math
import os
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from finetune import kernels
from finetune.config import Config, Full, Lora, QLora
from finetune.config.engine_fields import LocalEngine
from finetune.engine.topology import support
from finetune.engine.topology.launch import ParallelConfig
from finetune.errors import ConfigError, ModelError
from finetune.forecast.memory import Forecast, Forecaster
from finetune.forecast.trace import Shape
from finetune.models import attention_choice, families, float8, load, teacher

# Share of memory to leave free: on a GPU for fragmentation, on a machine for other processes.
SLACK = 0.05
# For what a forecast misses, until more is measured: the one of the first GPU that still counts was
# 2% too high (docs/performance.md).
ROOM = 0.15
SMALLER = "more processes, or shorter sequences (data.max_length)"


def capacity(device: torch.device, processes_here: int = 1) -> float:
    """Return the bytes that a process may use: of its GPU, or its share of machine or container.

    On a GPU only what is free now, as others may use it; what this process holds counts as free.
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
    """Return `capacity` for a process that the launcher has started."""
    return capacity(device, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def room_here(device: torch.device) -> float:
    """Return the bytes that this process may still take."""
    if device.type == "cuda":
        used = float(torch.cuda.memory_allocated(device))
    else:
        used = 0.0
        with suppress(OSError):  # only Linux says what a process holds
            pages = Path("/proc/self/statm").read_text().split()[1]
            used = float(pages) * os.sysconf("SC_PAGE_SIZE")
    return capacity_here(device) - used


def shape(config: Config, micro_batch_size: int | None = None) -> Shape:
    """Return the worst case: sequences of data.max_length in which all tokens are supervised.

    Of completions, as many as are sampled.
    """
    given, length = config.train.micro_batch_size, config.data.max_length
    most = config.rollouts.max_new_tokens if config.rollouts else length
    return Shape(micro_batch_size or (1 if given == "auto" else given), length, most)


@dataclass(frozen=True)
class Settled:
    """What a run takes where the config says auto, on one topology and within one limit."""

    micro_batch_size: int | None
    """None if no micro-batch fits that makes whole steps."""
    gradient_checkpointing: bool | int
    found: Forecast
    """With the micro-batch, before layers are recomputed for room to spare."""
    forecast: Forecast
    """Of the run."""


class Chooser:
    """Answer for one run config. Makes each forecaster, of it and of its changes, once."""

    def __init__(self, config: Config, *, precision: str, on_gpu: bool) -> None:
        """Raises ModelError if the model cannot be built.

        train.gradient_checkpointing: auto counts as what it may come to: on a GPU all layers, or
        none where transformers does not name them.
        """
        self._given = config
        if config.train.gradient_checkpointing == "auto":
            config = config.changed("train", gradient_checkpointing=on_gpu)
        self.config, self.precision, self.on_gpu = config, precision, on_gpu
        family = families.of(config)
        self.model_config = load.load_config(config.model, config.objective.kind)
        self.tokenizer = load.load_tokenizer(config.model, family)
        wanted, kind = config.model.attention, families.model_class(self.model_config, family)
        if wanted == attention_choice.FLASH_2 and on_gpu:
            # Holds as much, also for models that ours does not support; its package may be missing.
            self.attention = attention_choice.of_documents(family)
        else:
            device = torch.device("cuda" if on_gpu else "cpu")
            self.attention = attention_choice.choose(
                wanted, kind, self.model_config, device, precision, family=family
            )
        self._teacher = self._prepared_teacher()
        self._forecasters: dict[str, Forecaster] = {}
        if self.may_recompute and not self.num_layers:
            self._given = self.config = self._not_recomputed

    def _prepared_teacher(self) -> teacher.Teacher | None:
        """Return the model that the objective's `teacher` names, without weights."""
        if getattr(self.config.objective, "teacher", None) is None:
            return None
        device = torch.device("cuda" if self.on_gpu else "cpu")
        # Other kernels hold as much, and their packages may be missing here.
        config = self.config.changed("model", attention="auto")
        return teacher.prepare(config, self.tokenizer, self.attention, device, self.precision)

    def require_possible(self) -> None:
        """Raise UserError for what every run would refuse, and a forecast would not."""
        kernels.require_known()
        if not self.config.train.float8:
            return
        if not self.on_gpu:
            raise ConfigError(
                "train.float8: needs a GPU, and this plan is for a CPU; give --gpu-memory, or "
                "remove it"
            )
        float8.large_products(self.forecaster().model)

    def forecaster(self, config: Config | None = None) -> Forecaster:
        """Return the forecaster of the config, or of another of the same model and attention.

        Its micro-batch does not count: forecasts are asked for with one.
        """
        config = (config or self.config).changed("train", micro_batch_size="auto")
        key = repr(config)
        if key not in self._forecasters:
            self._forecasters[key] = Forecaster(
                config, self.model_config, self.tokenizer, attention=self.attention,
                precision=self.precision, on_gpu=self.on_gpu, teacher=self._teacher,
            )  # fmt: skip
        return self._forecasters[key]

    @property
    def may_recompute(self) -> bool:
        """Whether the run itself chooses how many layers to recompute: auto, on a GPU."""
        return self.on_gpu and self._given.train.gradient_checkpointing == "auto"

    @property
    def _not_recomputed(self) -> Config:
        return self._given.changed("train", gradient_checkpointing=False)

    @property
    def num_layers(self) -> int:
        """Return how many layers can be recomputed; 0 if transformers does not name them."""
        return self.forecaster(self._not_recomputed).num_layers

    def forecast(self, parallel: ParallelConfig, micro_batch_size: int | None = None) -> Forecast:
        return self.forecaster().of(parallel, shape(self.config, micro_batch_size))

    def settle(
        self, parallel: ParallelConfig, limit: float, micro_batch_size: int | None = None
    ) -> Settled:
        """Return what a run takes where its config says auto; `limit`: bytes that it may use.

        A micro-batch without recomputation is looked for first: recomputing costs time, larger ones
        save little. Then layers are recomputed until ROOM is left; with one sequence if no
        micro-batch fits. `micro_batch_size`: default the config's.
        """
        config = self._not_recomputed if self.may_recompute else self.config
        size: Any = micro_batch_size or config.train.micro_batch_size
        if size == "auto":
            size = self.largest_micro_batch(parallel, limit, config)
            if size is None and self.may_recompute:
                config = self.config  # with all layers recomputed
                size = self.largest_micro_batch(parallel, limit, config)
        part = shape(config, size or 1)
        found = forecast = self.forecaster(config).of(parallel, part)
        number: Any = config.train.gradient_checkpointing
        if self.may_recompute:
            number, forecast = self._fewest_recomputed(parallel, part, limit * (1 - ROOM))
        return Settled(size, number or False, found, forecast)

    def _fewest_recomputed(
        self, parallel: ParallelConfig, part: Shape, most: float
    ) -> tuple[int, Forecast]:
        """Return (the fewest layers to recompute for a step in `most` bytes, its forecast).

        All layers, if no number does. Each layer that is kept holds about as much as any other, so
        two forecasts tell where to look.
        """
        count = self.num_layers

        def forecast(number: int) -> Forecast:
            wanted = True if number == count and count else number or False
            changed = self.config.changed("train", gradient_checkpointing=wanted)
            return self.forecaster(changed).of(parallel, part)

        number, found = 0, forecast(0)
        if found.peak > most and count:
            per_layer = (found.peak - forecast(count).peak) / count
            estimate = (found.peak - most) / per_layer if per_layer > 0 else count
            number = min(count, max(1, math.floor(estimate) - 1))
            while (found := forecast(number)).peak > most and number < count:
                number += 1
        return number, found

    def recomputation(self, settled: Settled, limit: float) -> str:
        """Say how many layers train.gradient_checkpointing: auto recomputes, and why."""
        number = settled.gradient_checkpointing
        layers = f"{number} of {self.num_layers} layers" if number else "no layer"
        return (
            f"train.gradient_checkpointing: auto recomputes {layers}: "
            f"{settled.forecast.peak / 1e9:.1f} of {limit / 1e9:.1f} GB by forecast"
        )

    def largest_micro_batch(
        self, parallel: ParallelConfig, limit: float, config: Config | None = None
    ) -> int | None:
        """Return the largest micro-batch that fits and makes whole steps; None if none does.

        `config`: another than the run's.
        """
        sizes = micro_batches(self.config, parallel)

        def forecast(size: int) -> Forecast:
            return self.forecaster(config).of(parallel, shape(self.config, size))

        found = _largest(sizes, lambda size: forecast(size).peak <= limit)
        if found is None and sizes:
            # A single micro-batch may need less, as no gradients accumulate during its pass.
            one, whole = forecast(1), sizes[-1]
            if one.peak - one.device["gradients"] <= limit and forecast(whole).peak <= limit:
                return whole
        return found

    def fewest_processes(self, parallel: ParallelConfig, limit: float) -> int | None:
        """Return the fewest processes that fit and make whole steps; None if none do."""
        is_single = parallel.kind == "single"
        for group in [1] if is_single else _divisors(self.config.train.global_batch_size):
            if group % parallel.num_replicas:
                continue
            number = group * parallel.num_context
            kind = "single" if parallel.kind == "ddp" and number == 1 else parallel.kind
            if self.largest_micro_batch(replace(parallel, kind=kind, num_processes=number), limit):
                return number
        return None

    def cheapest_change(self, parallel: ParallelConfig, limit: float) -> str | None:
        """Return the cheapest settings with which it fits; None if there are none.

        First changes that keep the result, then those that train less.
        """
        if size := self.largest_micro_batch(parallel, limit):
            return f"train.micro_batch_size: {size}"
        for name, config in self._changes():
            sized = config.changed("train", micro_batch_size=1)  # auto is a number by then
            if any(support.conflicts(sized, parallel)):
                continue
            if size := self.largest_micro_batch(parallel, limit, config):
                is_given = size == self.config.train.micro_batch_size
                return name if is_given else f"{name}, train.micro_batch_size: {size}"
        return None

    def _changes(self) -> Iterator[tuple[str, Config]]:
        """Yield changes, each on top of recomputed layers, which cost a quarter of the speed."""
        config, adapter, kind = self.config, self.config.adapter, self.config.adapter.kind
        if config.rollouts and isinstance(config.rollouts.engine, LocalEngine):
            size = config.rollouts.shard_size
            while (size := size // 2) >= 1:  # completions stay the same
                rollouts = config.rollouts.model_copy(update={"shard_size": size})
                smaller = config.changed("objective", rollouts=rollouts)
                yield f"objective.rollouts.shard_size: {size}", smaller
        recomputed, before = config.changed("train", gradient_checkpointing=True), ""
        if config.train.gradient_checkpointing is not True:
            yield "train.gradient_checkpointing: true", recomputed
            before = "train.gradient_checkpointing: true, "
        if self.on_gpu and not config.train.activation_offload:
            offloaded = recomputed.changed("train", activation_offload=True)
            yield f"{before}train.activation_offload: true", offloaded
        if kind == "full" and config.optimizer.kind == "adamw":
            eight_bit = recomputed.changed("optimizer", kind="adamw_8bit")
            yield f"{before}optimizer.kind: adamw_8bit", eight_bit
            if config.model.dtype != "bfloat16":
                halved = recomputed.changed("model", dtype="bfloat16")
                yield f"{before}model.dtype: bfloat16", halved
        if config.model.init == "random":
            return
        settings = {} if isinstance(adapter, Full) else adapter.model_dump(exclude={"kind"})
        for cls, other in (Lora, "lora"), (QLora, "qlora"):
            if kind not in (other, "qlora"):
                own = {name: settings[name] for name in settings if name in cls.model_fields}
                changed = cls.model_validate({"kind": other, **own})
                with_adapter = recomputed.model_copy(update={"adapter": changed})
                yield f"{before}adapter.kind: {other}", with_adapter


def micro_batches(config: Config, parallel: ParallelConfig) -> list[int]:
    """Return the sizes that make whole steps: the divisors of a process's share of one."""
    num_groups = parallel.num_processes // parallel.num_context
    return _divisors(config.train.global_batch_size // num_groups)


def settle(
    config: Config, parallel: ParallelConfig, device: torch.device, precision: str, limit: float
) -> tuple[int, bool | int, int | None, list[str]]:
    """Return what a running process takes for auto (`Chooser.settle`): (micro-batch,
    gradient_checkpointing, bytes of optimizer state and averages on the device, messages).

    `limit`: bytes that the process with the least memory may use. The bytes are None if the
    micro-batch was given. Raises ConfigError if auto finds none that fits.
    """
    size = config.train.micro_batch_size
    try:
        chooser = Chooser(config, precision=precision, on_gpu=device.type == "cuda")
        settled, reserved, messages = chooser.settle(parallel, limit), None, []
    except ModelError as exc:  # a run without auto would not ask for a forecast
        if size == "auto":
            raise
        no_layer = f"note: train.gradient_checkpointing: auto recomputes no layer: {exc}"
        return size, False, None, [no_layer]
    if config.train.micro_batch_size == "auto":
        found = settled.found
        needs = f"{found.peak / 1e9:.1f} of {limit / 1e9:.1f} GB by forecast"
        if settled.micro_batch_size is None:
            other = chooser.cheapest_change(parallel, limit) or SMALLER
            raise ConfigError(
                "train.micro_batch_size: auto found no size that fits: a single sequence of "
                f"{config.data.max_length:,} tokens needs {needs}; use {other}; see "
                "docs/performance.md"
            )
        reserved = int(found.device.get("optimizer", 0.0) + found.device.get("average", 0.0))
        messages.append(f"train.micro_batch_size: auto is {settled.micro_batch_size}: {needs}")
    if chooser.may_recompute:
        messages.append(chooser.recomputation(settled, limit))
    assert settled.micro_batch_size is not None
    return settled.micro_batch_size, settled.gradient_checkpointing, reserved, messages


def samples_whole(
    config: Config, parallel: ParallelConfig, device: torch.device, precision: str, room: float, *,
    has_moved: bool,
) -> tuple[bool, str]:  # fmt: skip
    """Return whether a process may sample with whole weights (`Topology.whole_weights`), and why.

    `room`: bytes that the process with the least of them may still take. `has_moved`: the optimizer
    has made a step, so that its state is there.
    """
    slowly = "note: all processes gather the weights for each sampled token, which is slow, as"
    try:
        chooser = Chooser(config, precision=precision, on_gpu=device.type == "cuda")
        needed = chooser.forecaster().sampling(parallel, has_moved)
    except ModelError as exc:
        return False, f"{slowly} it is not known whether whole weights fit: {exc}"
    numbers = f"{needed / 1e9:.3g} GB by forecast, of {room / 1e9:.3g} GB that are free"
    if needed <= room * (1 - ROOM):
        return True, f"each process samples by itself, with whole weights: {numbers}"
    return False, (
        f"{slowly} whole weights do not fit: {numbers}; lower objective.rollouts.shard_size, or "
        "let a server sample (objective.rollouts.engine)"
    )


def advice(config: Config, parallel: ParallelConfig, device: torch.device, precision: str) -> str:
    """Return the forecast for a process that ran out of memory, and the next setting to try."""
    chooser = Chooser(config, precision=precision, on_gpu=device.type == "cuda")
    limit, size = capacity_here(device), config.micro_batch_size
    peak = chooser.forecast(parallel).peak
    forecast = f"forecast: {peak / 1e9:.1f} of {limit / 1e9:.1f} GB"
    if peak <= limit and size > 1:  # something else takes memory, or the forecast is wrong
        smaller = max(other for other in micro_batches(config, parallel) if other < size)
        return (
            f"{forecast}, which should fit: check what else uses the memory, or try "
            f"train.micro_batch_size: {smaller}"
        )
    other = chooser.cheapest_change(parallel, limit if peak > limit else 0.95 * peak) or SMALLER
    return f"{forecast}; try {other}"


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def _largest(sizes: list[int], fits: Callable[[int], bool]) -> int | None:
    """Return the last of rising sizes that fits, None if none does.

    Doubles the place from the smallest, then bisects: large sizes take long to try.
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
