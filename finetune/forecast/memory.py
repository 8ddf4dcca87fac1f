"""Forecast the bytes that one process needs, of its device and its host, under any topology.

Traces what a pass holds; counts weights, gradients and optimizer state; divides what is sharded,
and adds what is gathered to compute with.
"""

import functools
from dataclasses import dataclass, field, replace
from typing import Any

import torch

from finetune.config import Config, Quantized
from finetune.config import objective_fields as settings
from finetune.config.engine_fields import LocalEngine
from finetune.engine.companion import start_of
from finetune.engine.topology.launch import ParallelConfig
from finetune.forecast import sampler
from finetune.forecast.sampler import Shard
from finetune.forecast.trace import NLL, Beside, Rehearsal, Shape, Trace
from finetune.forecast.weights import count
from finetune.models import float8, recompute
from finetune.models.attention_choice import is_padded
from finetune.models.build import frozen
from finetune.models.teacher import Teacher
from finetune.objectives import Objective, chosen
from finetune.objectives.distill import Distill
from finetune.rollouts.sampling import HELD_OUT

# A process of train.py with all its libraries but no model: measured with torch 2.13 for CPUs on
# Linux. Builds for GPUs, pip's default, need 0.2 GB more (2.11.0+cu130, on a CPU).
PROCESS = 525e6 if torch.version.cuda is None and torch.version.hip is None else 725e6
# CUDA's context, and NCCL's buffers with several processes: usual values, not measured here.
CONTEXT, CHANNELS = 0.6e9, 0.4e9
# cuBLAS's, from PyTorch's allocator: 8 blocks of 4 MiB on Hopper, a quarter of that before.
WORKSPACE = 32 * 2**20
LOGPROBS, COMPARED = frozenset({"logprobs"}), frozenset({"divergence", "distribution"})
WHOLE = "whole model, at the start and the end"


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process: parts by name, which need not exist at once, and the peak."""

    device: dict[str, float]
    peak: float
    host: dict[str, float] = field(default_factory=dict)
    resting: float = 0.0
    """Of the device, between steps."""
    products: int = 0
    """Matrix products of a micro-batch."""

    @property
    def host_peak(self) -> float:
        """The larger of training and of reading or exporting the whole model, in one process."""
        training = {name: size for name, size in self.host.items() if name != WHOLE}
        return max(sum(training.values()), PROCESS + self.host.get(WHOLE, 0.0))


@dataclass
class _Held:
    """Bytes that a process holds under one kind of sharding, besides what a pass was traced for."""

    staying: dict[str, float]
    """During the whole step."""
    gradients: float
    """From one pass to the next."""
    passing: dict[str, float] = field(default_factory=dict)
    """During a pass."""
    at_end: float = 0.0
    """After a pass or in the optimizer's step, when activations are freed."""
    waiting: dict[str, float] = field(default_factory=dict)
    """In host memory."""


def _asked(objective: Objective, config: Config) -> frozenset[str]:
    """Return what a pass is asked; of a user's own without what compares two passes."""
    asked = objective.asks | objective.heads
    if config.rollouts:
        asked |= objective.scored_by(config.objective)
    return asked if isinstance(objective, Distill) else asked - COMPARED or NLL


class Forecaster:
    """Forecast one run config for any topology and micro-batch.

    Builds the model, and traces each kind of pass, once.
    """

    def __init__(
        self, config: Config, model_config: Any, tokenizer: Any, *, attention: str, precision: str,
        on_gpu: bool, teacher: Teacher | None = None, is_frozen: bool = False,
    ) -> None:  # fmt: skip
        """`teacher`: the model that the objective names. `is_frozen`: it is itself a companion."""
        objective = chosen(config)
        self._asks = LOGPROBS if is_frozen else _asked(objective, config)
        self.companion: Forecaster | None = None
        """The frozen model beside it: the teacher, or a copy of the weights at the start."""
        start = None if is_frozen else start_of(config, objective)
        if teacher is not None:
            self.companion = Forecaster(
                frozen(teacher.config), teacher.model_config, teacher.tokenizer,
                attention=teacher.attention, precision=precision, on_gpu=on_gpu, is_frozen=True,
            )  # fmt: skip
        elif start is not None:
            self.companion = Forecaster(
                frozen(start), model_config, tokenizer, attention=attention, precision=precision,
                on_gpu=on_gpu, is_frozen=True,
            )  # fmt: skip
        self._name = "frozen copy" if teacher is None else "teacher"
        self._is_frozen = is_frozen
        self._beside = None if is_frozen else self._compared(config)
        self.config, self.precision, self.on_gpu = config, precision, on_gpu
        self._about = (model_config, tokenizer, attention)
        self._rehearsal = functools.cache(self._rehearse)
        self._traced = functools.cache(
            lambda halved, part, backward: self._rehearsal(halved).trace(part, backward)
        )
        self._sampled = functools.cache(
            lambda halved, shard: sampler.trace(self._rehearsal(halved), shard)
        )
        self._half = 4 if precision == "fp32" else 2  # bytes of a number in the arithmetic
        self.weights = count(self.model, config, self._half)

    @property
    def model(self) -> Any:
        """The model, without memory."""
        return self._rehearsal(False).model

    @property
    def num_layers(self) -> int:
        return recompute.count_layers(self.model)

    def of(self, parallel: ParallelConfig, shape: Shape) -> Forecast:
        """Return the forecast of a whole step in micro-batches of `shape`."""
        held, traced = self._held(parallel), self._trace(parallel, shape)
        teaching = self._teaching(parallel, shape, held)
        at_once = shape.num_sequences * parallel.num_processes // parallel.num_context
        if self.config.train.float8:
            tokens = shape.num_sequences * shape.length / parallel.num_context
            held.passing["float8"] = self._in_float8(tokens)
        accumulates = self.config.train.global_batch_size > at_once
        if parallel.kind == "ddp":
            # Buckets exist from the start; in the first step gradients accumulate next to them.
            held.staying["buckets"] = self.weights.trained
            held.gradients = held.gradients if accumulates else 0.0
        pass_itself = traced.passing + (held.gradients if accumulates else 0.0)
        if parallel.kind == "single" and not accumulates:
            pass_itself = traced.both  # gradients grow while activations go
        moving = max(
            sum(held.passing.values()) + pass_itself,
            held.gradients + held.at_end,
            held.gradients + teaching,
        )
        evaluating = 0.0
        if self.config.evaluation.micro_batch_size:
            evaluating = self._evaluation(parallel, shape)
        sampling = self._of_shard(parallel)
        beside = max(evaluating, sampling.passing)
        peak = sum(held.staying.values()) + max(moving, sum(held.passing.values()) + beside)
        device = {**held.staying, "gradients": held.gradients, **held.passing}
        device |= {"activations": traced.kept, "work": traced.passing - traced.kept}
        device |= {"keys and values": sampling.kept, "sampling": sampling.passing - sampling.kept}
        if held.at_end:
            device["step"] = held.at_end
        copied = {"checkpoint": self._copied(held, parallel)}
        if self.on_gpu:
            # One process reads all weights, and opens the export next to its own copy.
            w = self.weights
            whole = 2 * w.stored if w.num == w.num_trained else w.stored
            whole = max(whole, self.companion.weights.stored if self.companion else 0.0)
            moved = {"activations": traced.moved} if traced.moved else {}
            host = {"process": PROCESS, **held.waiting, **moved, **copied, WHOLE: whole}
            device["cuBLAS"] = float(WORKSPACE)
            device["CUDA"] = CONTEXT + (CHANNELS if parallel.num_processes > 1 else 0.0)
            always = device["cuBLAS"] + device["CUDA"]
            resting = sum(held.staying.values()) + always
            return Forecast(device, peak + always, host, resting, traced.products)
        peak += sum(held.waiting.values()) + copied["checkpoint"]
        return Forecast({**device, **held.waiting, **copied, "process": PROCESS}, peak + PROCESS)

    def sampling(self, parallel: ParallelConfig, has_moved: bool) -> float:
        """Return the bytes that a process of FSDP2 or ZeRO-3 takes to sample with whole weights.

        Beside what it holds between two steps; `has_moved`: with the state of the optimizer.
        """
        w = self.weights
        # Embedding and last norm are gathered as stored, as in a pass; so counts the head, which
        # may take half.
        whole = w.used if parallel.is_zero else w.used - w.outside + w.outside_stored
        # A unit on its way, or what sampling itself holds.
        beside = max(w.layer, w.outside_stored, self._of_shard(parallel).passing)
        to_come = 0.0
        if parallel.kind == "fsdp2" and not (has_moved or parallel.offload):
            to_come = w.optimizer * parallel.num_replicas / parallel.num_processes
        return whole + beside + to_come

    def _compared(self, config: Config) -> Beside | None:
        """Return what the loss compares distributions with, if it does."""
        if not isinstance(config.objective, settings.Distill):
            return None
        with_nll = config.objective.sft_weight > 0
        if self.companion is None:
            return Beside(None, with_nll)
        projection = self.companion.model.get_output_embeddings().weight
        return Beside((projection.shape[0], projection.shape[1]), with_nll)

    def _teaching(self, parallel: ParallelConfig, shape: Shape, held: _Held) -> float:
        """Return the bytes of a pass of the companion; add to `held` what stays of it."""
        if self.companion is None:
            return 0.0
        w, name = self.companion.weights, self._name
        passing = self.companion._trace(parallel, shape, False).passing + w.unpacked
        is_copied = isinstance(self.companion.config.adapter, Quantized)
        if parallel.kind != "fsdp2" or is_copied:
            held.staying[name] = w.used if parallel.is_zero else w.stored
            return passing
        # Shards, and a whole projection beside them; a pass gathers a layer and the next.
        shards = w.stored / (parallel.num_processes // parallel.num_replicas)
        projection = self.companion.model.get_output_embeddings().weight
        held.staying[name] = float(projection.numel() * projection.element_size())
        where = held.waiting if parallel.offload else held.staying
        where[name] = where.get(name, 0.0) + shards
        return passing + 2 * w.layer + w.outside_stored

    def _of_shard(self, parallel: ParallelConfig) -> Trace:
        """Return what sampling holds of the completions of a shard, as long as they may be."""
        config, rollouts = self.config, self.config.rollouts
        if self._is_frozen or rollouts is None or not isinstance(rollouts.engine, LocalEngine):
            return Trace(0, 0, 0, 0)
        count, evaluates = rollouts.group_size, config.data.eval or config.data.eval_fraction
        if evaluates and rollouts.environment is None:
            count = max(count, HELD_OUT)
        prompt = config.data.max_length - rollouts.max_new_tokens
        shard = Shard(rollouts.shard_size * count, prompt, config.data.max_length)
        return self._sampled(parallel.is_sharded and self.precision != "fp32", shard)

    def _evaluation(self, parallel: ParallelConfig, shape: Shape) -> float:
        """Return the bytes of an evaluation's pass, at its own micro-batch."""
        size = self.config.evaluation.micro_batch_size
        assert size is not None
        return self._trace(parallel, replace(shape, num_sequences=size), backward=False).passing

    def _in_float8(self, tokens: float) -> float:
        """Return the bytes of a product's operands in float8, each also transposed.

        What a layer keeps for its backward pass stays in 16 bits.
        """
        inside = (module for layer in recompute.layers(self.model) for module in layer.modules())
        sizes = [(m.in_features, m.out_features) for m in inside if float8.is_worth_it(m)]
        operands = [tokens * (ins + outs) + ins * outs for ins, outs in sizes]
        return 2 * max(operands, default=0.0)

    def _trace(self, parallel: ParallelConfig, shape: Shape, backward: bool = True) -> Trace:
        halved = parallel.is_sharded and self.precision != "fp32"
        part = replace(
            shape,
            length=-(-shape.length // parallel.num_context),
            supervised=-(-shape.supervised // parallel.num_context),
        )
        if not is_padded(self._about[2]):  # without padding only the number of tokens counts
            number = part.num_sequences
            part = Shape(1, number * part.length, number * part.supervised)
        return self._traced(halved, part, backward)

    def _rehearse(self, halved: bool) -> Rehearsal:
        model_config, tokenizer, attention = self._about
        return Rehearsal(
            self.config, model_config, tokenizer, attention=attention, precision=self.precision,
            halved=halved, on_gpu=self.on_gpu, asks=self._asks, beside=self._beside,
        )  # fmt: skip

    def _held(self, parallel: ParallelConfig) -> _Held:
        if parallel.kind == "fsdp2":
            held = self._fsdp2(parallel)
        elif parallel.is_zero:
            held = self._deepspeed(parallel)
        elif parallel.kind in ("single", "ddp"):
            held = self._unsharded()
        else:
            raise ValueError(f"no forecast knows what a process holds under {parallel.kind!r}")
        if self.weights.unpacked:
            held.passing["unpacked"] = self.weights.unpacked
        if parallel.offload:
            zero = parallel.deepspeed["zero_optimization"] if parallel.is_zero else None
            kept = {"weights"} if zero is not None and "offload_param" not in zero else set()
            names = [name for name in held.staying if name not in kept]
            held.waiting = {name: held.staying.pop(name) for name in names}
            held.waiting["gradients"] = held.gradients
            held.gradients = 0.0
        return held

    def _unsharded(self) -> _Held:
        w = self.weights
        # On a GPU PyTorch's adafactor computes the updates of all weights at once.
        updates = w.trained if self.on_gpu and self.config.optimizer.kind == "adafactor" else 0.0
        staying = {"weights": w.stored, "optimizer": w.optimizer, **self._average()}
        return _Held(staying, w.trained, at_end=updates)

    def _fsdp2(self, parallel: ParallelConfig) -> _Held:
        w, half, parts = self.weights, self._half, parallel.num_processes // parallel.num_replicas
        staying = {"weights": w.stored, "optimizer": w.optimizer, **self._average()}
        layers = 2 * w.layer if parallel.reshards else w.used - w.outside
        return _Held(
            {name: value / parts for name, value in staying.items()},
            w.trained / parts,
            {
                # The current layer and the next one, or all; embedding, last norm and head as
                # stored. An untied head in 16 bits takes half, but frees its memory late
                # (measured).
                "gathered": layers + w.outside_stored,
                # Gradients of a layer, and their float32 copies to reduce; those outside the layers
                # wait for the end.
                "reduced": (half + 4) * w.layer_trained + 2 * w.outside_trained,
            },
        )

    def _deepspeed(self, parallel: ParallelConfig) -> _Held:
        w, half, parts = self.weights, self._half, parallel.num_processes
        shares_weights, shares_gradients = parallel.kind == "zero3", parallel.kind != "zero1"
        bucket = min(
            float(parallel.deepspeed["zero_optimization"].get("reduce_bucket_size", 5e8)),
            w.num_trained,
        )
        # Gradients as computed, concatenated, and as float32 copies to reduce.
        reduced = (half + 4 + (half if shares_gradients else 0)) * bucket
        return _Held(
            {
                "weights": w.used / (parts if shares_weights else 1),
                "float32": 4.0 * w.num_trained / parts,
                "optimizer": w.optimizer / parts,
            },
            half * w.num_trained / (parts if shares_gradients else 1),
            {"reduced": reduced, "gathered": 2 * w.layer + w.outside} if shares_weights else {},
            at_end=max(0.0 if shares_weights else reduced, 4.0 * w.num_trained / parts),
        )

    def _average(self) -> dict[str, float]:
        if self.config.train.ema_decay is None:
            return {}
        return {"average": 4.0 * self.weights.num_trained}

    def _copied(self, held: _Held, parallel: ParallelConfig) -> float:
        """Return the bytes that an asynchronous checkpoint copies; of replicas each its share."""
        if not self.config.checkpoint.asynchronous:
            return 0.0
        everything = held.staying | held.waiting
        weights = everything.get("float32", min(everything["weights"], self.weights.trained))
        shared_by = parallel.num_processes if not parallel.is_sharded else parallel.num_replicas
        return (everything["optimizer"] + weights + everything.get("average", 0.0)) / shared_by
