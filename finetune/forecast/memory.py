"""Bytes that one process will need, of its device and of its host, under any topology.

What a pass holds is traced; weights, gradients and optimizer state are counted; what processes
share is divided, and what they gather to compute with is added.
"""

from dataclasses import dataclass, field, replace
from typing import Any

import torch

from finetune.config import Config
from finetune.engine.topology.launch import ParallelConfig
from finetune.forecast.trace import Rehearsal, Shape, Trace
from finetune.forecast.weights import count
from finetune.models.attention_choice import is_padded

# A process of train.py with all its libraries and no model: measured with torch 2.13 for CPUs on
# Linux. Builds for GPUs, which pip installs by default, touch 0.2 GB more (2.11.0+cu130, on a CPU).
PROCESS = 525e6 if torch.version.cuda is None and torch.version.hip is None else 725e6
# CUDA's own context, and NCCL's buffers where there are several: what is usual; no GPU was there to
# measure it.
CONTEXT, CHANNELS = 0.6e9, 0.4e9
WHOLE = "whole model, at the start and the end"


@dataclass(frozen=True)
class Forecast:
    """Bytes of one process at its peak; parts are named for what they are, and need not be there at
    once.
    """

    device: dict[str, float]
    peak: float
    host: dict[str, float] = field(default_factory=dict)

    @property
    def host_peak(self) -> float:
        """While it trains, or, of the first process, while the whole model is read and exported."""
        training = {name: size for name, size in self.host.items() if name != WHOLE}
        return max(sum(training.values()), PROCESS + self.host.get(WHOLE, 0.0))


@dataclass
class _Held:
    """What one kind of sharing makes a process hold, besides what a pass was traced to hold."""

    staying: dict[str, float]
    """The whole step long."""
    gradients: float
    """From the end of a pass to the next."""
    passing: dict[str, float] = field(default_factory=dict)
    """While a pass goes on."""
    at_end: float = 0.0
    """When it is over, or the optimizer steps, and its activations are gone."""
    waiting: dict[str, float] = field(default_factory=dict)
    """In host memory."""


class Forecaster:
    """For one run config, any topology, any micro-batch: the model is built, and each kind of pass
    traced, once.
    """

    def __init__(
        self, config: Config, model_config: Any, tokenizer: Any, *, attention: str, precision: str, on_gpu: bool
    ) -> None:  # fmt: skip
        self.config, self.precision, self.on_gpu = config, precision, on_gpu
        self._about = (model_config, tokenizer, attention)
        self._rehearsals: dict[bool, Rehearsal] = {}
        self._traces: dict[tuple[bool, Shape, bool], Trace] = {}
        self._half = 4 if precision == "fp32" else 2  # bytes of a number that is calculated with
        self.weights = count(self._rehearsal(False).model, config, self._half)

    def of(self, parallel: ParallelConfig, shape: Shape) -> Forecast:
        """Of a whole step in micro-batches of `shape`, as many as global_batch_size asks for."""
        held, traced = self._held(parallel), self._trace(parallel, shape)
        at_once = shape.num_sequences * parallel.num_processes // parallel.num_context
        accumulates = self.config.train.global_batch_size > at_once
        if (
            parallel.kind == "ddp"
        ):  # its buckets are there from the start; in the first step what accumulates lies next to them
            held.staying["buckets"] = self.weights.trained
            held.gradients = held.gradients if accumulates else 0.0
        pass_itself = traced.passing + (held.gradients if accumulates else 0.0)
        if parallel.kind == "single" and not accumulates:
            pass_itself = traced.both  # gradients grow while activations go
        moving = max(sum(held.passing.values()) + pass_itself, held.gradients + held.at_end)
        looking = self._looking(parallel, shape) if self.config.evaluation.micro_batch_size else 0.0
        peak = sum(held.staying.values()) + max(moving, sum(held.passing.values()) + looking)
        device = {
            **held.staying, "gradients": held.gradients, **held.passing,
            "activations": traced.kept, "work": traced.passing - traced.kept, **({"step": held.at_end} if held.at_end else {}),
        }  # fmt: skip
        copied = {"checkpoint": self._copied(held, parallel)}
        if self.on_gpu:
            # All weights are read by one process, and exported from a copy that is opened next to
            # it
            w = self.weights
            whole = 2 * w.stored if w.num == w.num_trained else w.stored
            host = {"process": PROCESS, **held.waiting, **copied, WHOLE: whole}
            device["CUDA"] = CONTEXT + (CHANNELS if parallel.num_processes > 1 else 0.0)
            return Forecast(device, peak + device["CUDA"], host)
        peak += sum(held.waiting.values()) + copied["checkpoint"]
        return Forecast({**device, **held.waiting, **copied, "process": PROCESS}, peak + PROCESS)

    def _looking(self, parallel: ParallelConfig, shape: Shape) -> float:
        """Bytes of an evaluation's pass, at its own micro-batch."""
        size = self.config.evaluation.micro_batch_size
        assert size is not None
        return self._trace(parallel, replace(shape, num_sequences=size), learns=False).passing

    def _trace(self, parallel: ParallelConfig, shape: Shape, learns: bool = True) -> Trace:
        halved = parallel.is_sharded and self.precision != "fp32"
        part = replace(
            shape,
            length=-(-shape.length // parallel.num_context),
            learned=-(-shape.learned // parallel.num_context),
        )
        if not is_padded(self._about[2]):  # sequences lie end to end: only their tokens count
            part = Shape(1, part.num_sequences * part.length, part.num_sequences * part.learned)
        key = halved, part, learns
        if key not in self._traces:
            self._traces[key] = self._rehearsal(halved).trace(part, learns)
        return self._traces[key]

    def _rehearsal(self, halved: bool) -> Rehearsal:
        if halved not in self._rehearsals:
            model_config, tokenizer, attention = self._about
            self._rehearsals[halved] = Rehearsal(
                self.config, model_config, tokenizer, attention=attention, precision=self.precision,
                halved=halved, on_gpu=self.on_gpu,
            )  # fmt: skip
        return self._rehearsals[halved]

    def _held(self, parallel: ParallelConfig) -> _Held:
        held = (
            self._in_parts(parallel)
            if parallel.kind == "fsdp2"
            else self._by_deepspeed(parallel)
            if parallel.is_zero
            else self._whole(parallel)
        )
        if self.weights.unpacked:
            held.passing["unpacked"] = self.weights.unpacked
        if parallel.offload:
            stays = (
                parallel.is_zero and "offload_param" not in parallel.deepspeed["zero_optimization"]
            )
            names = [name for name in held.staying if name != "weights" or not stays]
            held.waiting = {name: held.staying.pop(name) for name in names} | {
                "gradients": held.gradients
            }
            held.gradients = 0.0
        return held

    def _whole(self, parallel: ParallelConfig) -> _Held:
        w = self.weights
        # On a GPU PyTorch's adafactor makes the updates of all weights at once.
        updates = w.trained if self.on_gpu and self.config.optimizer.kind == "adafactor" else 0.0
        staying = {"weights": w.stored, "optimizer": w.optimizer, **self._average()}
        return _Held(staying, w.trained, at_end=updates)

    def _in_parts(self, parallel: ParallelConfig) -> _Held:
        w, half, parts = self.weights, self._half, parallel.num_processes // parallel.num_replicas
        staying = {"weights": w.stored, "optimizer": w.optimizer, **self._average()}
        return _Held(
            {name: value / parts for name, value in staying.items()},
            w.trained / parts,
            {
                # The layer at work and the next one; embedding, last norm and head as they are
                # stored: of an untied head in 16 bits it is half, but its memory is not there for
                # others at once (measured).
                "gathered": 2 * w.layer + w.ends_stored,
                # Gradients of a layer, and in float32 on their way; those around the layers wait
                # for the end.
                "reduced": (half + 4) * w.layer_trained + 2 * w.ends_trained,
            },
        )

    def _by_deepspeed(self, parallel: ParallelConfig) -> _Held:
        w, half, parts = self.weights, self._half, parallel.num_processes
        shares_weights, shares_gradients = parallel.kind == "zero3", parallel.kind != "zero1"
        bucket = min(
            float(parallel.deepspeed["zero_optimization"].get("reduce_bucket_size", 5e8)),
            w.num_trained,
        )
        # Gradients as they are made, laid end to end, and in float32 on their way.
        reduced = (half + 4 + (half if shares_gradients else 0)) * bucket
        return _Held(
            {
                "weights": w.used / (parts if shares_weights else 1),
                "float32": 4.0 * w.num_trained / parts,
                "optimizer": w.optimizer / parts,
            },
            half * w.num_trained / (parts if shares_gradients else 1),
            {"reduced": reduced, "gathered": 2 * w.layer + w.ends} if shares_weights else {},
            at_end=max(0.0 if shares_weights else reduced, 4.0 * w.num_trained / parts),
        )

    def _average(self) -> dict[str, float]:
        return (
            {}
            if self.config.train.ema_decay is None
            else {"average": 4.0 * self.weights.num_trained}
        )

    def _copied(self, held: _Held, parallel: ParallelConfig) -> float:
        """What a checkpoint copies before it is written while the next steps run: of equal weights
        each process its share.
        """
        if not self.config.checkpoint.asynchronous:
            return 0.0
        everything = held.staying | held.waiting
        weights = everything.get("float32", min(everything["weights"], self.weights.trained))
        shared_by = parallel.num_processes if not parallel.is_sharded else parallel.num_replicas
        return (everything["optimizer"] + weights + everything.get("average", 0.0)) / shared_by
