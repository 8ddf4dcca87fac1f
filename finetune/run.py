"""What a run works with, opened and put together: its directories, its processes, its rows, what writes and what tells."""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from finetune import failures, places
from finetune.config import Config, base, differences
from finetune.engine import receipt
from finetune.engine.checkpoint import folder
from finetune.engine.checkpoint.saver import Saver
from finetune.engine.checkpoint.storage import Storage
from finetune.engine.metrics import Tracker, log
from finetune.engine.rundir import RunDirectory
from finetune.engine.state import TrainState
from finetune.engine.topology import Topology
from finetune.engine.trackers import Trackers
from finetune.errors import (
    EXIT_FAILED,
    CheckpointError,
    ConfigError,
    OutOfMemory,
    Preempted,
    RunDirectoryError,
    TopologyError,
)
from finetune.generation import generate
from finetune.models import load, parameters
from finetune.models.policy import Policy
from finetune.objectives import Objective, chosen
from finetune.preflight import Data
from finetune.survival.preemption import StopFlag


@dataclass(frozen=True)
class Job:
    """What was asked, where it lives, here and in an object store, how it is shared, what it learns from, and whether it must stop."""

    config: Config
    directory: RunDirectory
    storage: Storage | None
    topology: Topology
    data: Data
    stop: StopFlag
    to_try: int | None = None
    """Bytes of optimizer state next to which the largest micro-batch is tried first; None: its size was given."""

    def log(self, message: str) -> None:
        """One line, once."""
        if self.topology.is_main:
            log(message)

    def known_identity(self) -> dict[str, Any]:
        """What of `identity` is known before weights are loaded."""
        return {**self.data.identity, "train.precision": self.topology.precision}

    def identity(self, state: TrainState) -> dict[str, Any]:
        """What the config only points at, and what auto became: a resumption must find the same."""
        weights = {"frozen weights": state.frozen, "code of the model": state.code}
        # Fresh adapters are left out: some start from what a GPU computes, which is not the same twice.
        if self.config.adapter.kind == "full" or self.config.adapter.path:
            weights["weights before the first step"] = state.start
        return {**self.known_identity(), **weights}

    def open_directory(self, state: TrainState) -> None:
        """From here on the run directory is this run's. On the main process."""
        config, topology, data, step = self.config, self.topology, self.data, state.progress.step
        made = receipt.compose(
            seed=config.run.seed, parameters={
                "trainable": state.num_trainable, "total": state.num_parameters,
                "trained_in_products": state.products[0], "frozen_in_products": state.products[1],
            },
            num_processes=topology.num_processes, topology=topology.name, precision=topology.precision,
            device=topology.device.type, attention=data.attention, num_steps=data.num_steps, start_weights=state.start,
            template_date=data.template.date, identity=data.identity,
            train_data=data.train.sequences.examples.receipt(),
            eval_data=data.eval.sequences.examples.receipt() if data.eval else None, launch=topology.launched,
        )  # fmt: skip
        if config.run.replay_of is not None:
            self.directory.require_receipt(Path(config.run.replay_of), made)
        if self.directory.outcome().get("state") == "running":  # the lock is ours: no other process runs here
            self.log("note: the previous attempt left no outcome: it was killed, or its machine was lost")
        self.directory.create(config)
        wanted = config.evaluation.every_steps if data.eval else None
        for note in (
            *self.directory.rewind(step),
            *self.directory.missing(step, config.tracking.log_every_steps, wanted),
        ):
            self.log(note)
        self.directory.write_outcome("running", step, "started, or started again")
        if changed := self.directory.write_receipt(made, step):
            self.log(changed)
        if self.storage:
            self.storage.upload_notes(self.directory.path)

    def end(self, exc: BaseException, step: int | None) -> BaseException:
        """Note, here and in the store, that and why the run ends before its time; gives the error to raise: see `explained`.

        `step`: None before there is a model.
        """
        error = explained(exc, self.config, self.topology)
        self.directory.note_end(error, step, may_create=True)
        if self.topology.is_main and self.directory.is_open and self.storage:
            with contextlib.suppress(CheckpointError):  # what is wrong with the store was said before
                self.storage.upload_notes(self.directory.path)
        return error

    @property
    def objective(self) -> Objective:
        return chosen(self.config.objective)

    def policy(self, model: Any) -> Policy:
        """The model as objectives see it."""
        return Policy(model, self.topology.unwrap)

    def tracker(self, state: TrainState) -> Tracker:
        """What tells the files, the terminal and the trackers how the run goes."""
        config, directory, topology, progress = self.config, self.directory, self.topology, state.progress
        wanted = config.tracking
        trackers = None
        if topology.is_main and wanted.trackers:
            trackers = Trackers(
                wanted.trackers, project=wanted.project, run_name=config.run.name, run_id=progress.run_id,
                directory=directory.path, first_step=progress.step + 1, wandb_mode=wanted.wandb_mode,
                about={"config": config.model_dump(), "receipt": directory.receipt()}, history=directory.history(), log=log,
            )  # fmt: skip
        lengths = self.data.train.sequences.examples.lengths.tolist()
        attention = parameters.attention_per_token(self.data.model_config, lengths)
        return Tracker(
            directory, num_steps=self.data.num_steps, start=progress.step,
            is_main=topology.is_main, num_processes=topology.num_processes, every=wanted.log_every_steps,
            flops_per_token=parameters.flops_per_token(*state.products, attention), trackers=trackers,
        )  # fmt: skip

    def saver(self, state: TrainState, tracker: Tracker, resumed_from: int | None) -> Saver:
        """What writes checkpoints while training goes on."""
        wanted = self.config.checkpoint
        return Saver(
            self.directory.checkpoints, self.topology, self.storage,
            about={"config": self.config.model_dump(), "identity": self.identity(state)},
            every_minutes=wanted.every_minutes, keep_last=wanted.keep_last, asynchronous=wanted.asynchronous,
            grace_seconds=wanted.grace_seconds,
            resumed_from=resumed_from, log=self.log, record=tracker.saved, before=tracker.sync,
        )  # fmt: skip

    def sample(self, state: TrainState, tracker: Tracker) -> None:
        """Answers to the fixed prompts of the config; every process takes part, as each may hold a part of the model."""
        wanted, data, step = self.config.evaluation, self.data, state.progress.step
        self.topology.watchdog.pause(f"the samples after step {step}")
        template = data.template if self.objective.has_turns else None
        with state.averaged(), self.topology.arithmetic():
            answers = generate.while_training(
                self.topology.unwrap(state.model), data.tokenizer, template, wanted.sample_prompts,
                system_prompt=self.config.data.system_prompt, max_new_tokens=wanted.sample_max_new_tokens,
                together=self.topology.parallel.generates_together, log=self.log,
            )  # fmt: skip
        tracker.sampled(step, wanted.sample_prompts, answers)


def as_base_is(config: Config) -> Config:
    """adapter.quantization as a base on the Hub has it that is quantised already; folders were looked at with the config."""
    if config.adapter.kind != "qlora" or config.model.path is None or os.path.isdir(config.model.path):
        return config
    return base.settled(config, load.load_config(config.model).to_dict())[0]


def sized(config: Config, topology: Topology) -> tuple[Config, int | None]:
    """train.micro_batch_size: auto as a number, and the bytes of optimizer state for which it was chosen; None if it was one."""
    if config.train.micro_batch_size != "auto":
        return config, None
    if config.train.global_batch_size % topology.num_data:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} sequences cannot be split evenly over {topology.num_data} processes; "
            f"take a multiple of {topology.num_data}"
        )
    from finetune.forecast import choice

    limit = min(
        topology.processes.gather(choice.capacity_here(topology.device))
    )  # others may be at work on one of the GPUs
    size, reserved, why = topology.on_main(
        lambda: choice.automatic(config, topology.parallel, topology.device, topology.precision, limit)
    )
    if topology.is_main:
        log(why)
    return config.model_copy(update={"train": config.train.model_copy(update={"micro_batch_size": size})}), reserved


@contextlib.contextmanager
def watched(config: Config, directory: RunDirectory, topology: Topology, stop: StopFlag) -> Iterator[None]:
    """Inside, clouds and deadlines are heeded, and processes that died or stand still end all others."""

    def end(problem: str) -> None:
        """In a thread, because the main thread may wait without end, and so may a write to a disk."""
        last = threading.Timer(5.0, os._exit, [EXIT_FAILED])
        last.daemon = True
        last.start()
        directory.note_end(TopologyError(problem), topology.watchdog.step, may_create=True)
        print(f"[process {topology.rank}] failed: {problem}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)

    wanted, hang = config.checkpoint, config.train.hang_minutes
    cloud = wanted.notices if topology.is_first_of_node else None
    stop.configure(grace_seconds=wanted.grace_seconds, max_minutes=wanted.max_minutes, cloud=cloud, log=log)

    def hurries() -> bool:
        return stop.is_set and stop.seconds_left() < wanted.grace_seconds / 2

    topology.watchdog.start(None if hang is None else 60 * hang, end, hurries)
    try:
        yield
    except Exception as exc:
        if directory.has_ended:
            raise
        error = explained(exc, config, topology)
        directory.note_end(error, topology.watchdog.step, may_create=True)
        if error is exc:
            raise
        raise error from exc
    finally:
        topology.watchdog.stop()


def explained(exc: BaseException, config: Config, topology: Topology) -> BaseException:
    """What an exception really was, where the run stood, and what helps; itself if `failures` does not know it."""
    error = exc if isinstance(exc, Preempted) else failures.translate(exc)
    if isinstance(error, OutOfMemory):
        hint = f"{places.command()} plan --config FILE says what fits"
        with contextlib.suppress(Exception):  # there may be no memory left to think with
            from finetune.forecast import choice

            torch.cuda.empty_cache()
            hint = choice.advice(config, topology.parallel, topology.device, topology.precision)
        return OutOfMemory(f"out of memory at {topology.watchdog.at}: {error}\n  {hint}")
    if isinstance(error, TopologyError) and error is not exc:
        return TopologyError(f"{topology.lost()} at {topology.watchdog.at}; this process failed with: {error}")
    return error or exc


def reach(config: Config, directory: RunDirectory, topology: Topology, check_only: bool) -> Storage | None:
    """The run's twin in an object store, and from there what an empty disk does not have, but for checkpoints."""
    if config.checkpoint.storage is None:
        return None
    storage = Storage(config.checkpoint.storage, config.run.name)

    def bring_back() -> None:
        storage.check()
        if check_only:
            return
        there = storage.steps()
        if there and config.checkpoint.resume == "never":
            raise RunDirectoryError(
                f"{storage.url} has checkpoints, and checkpoint.resume is never; set it to auto, or choose another run.name"
            )
        known = storage.config()
        if known is not None and (different := differences(known, config)):
            instead = "give this run another run.name or checkpoint.storage, or go back to those values"
            raise receipt.refusal(f"{storage.url} holds another run", different, instead)
        here = [path for path in folder.steps(directory.checkpoints) if folder.looks_whole(path)]
        further = bool(there) and (not here or folder.step_name(there[0]) > here[0].name)
        if there and here and storage.run_id(there[0]) != folder.run_id((here[0] / folder.MANIFEST).read_bytes()):
            raise RunDirectoryError(
                f"{storage.url} and {directory.path} are two different runs with one name; give this one another run.name or checkpoint.storage"
            )
        if storage.restore(directory.path, over=further):
            log(f"restored from {storage.url}, which is ahead of this disk")
        directory.check(config)

    topology.on_main(bring_back)
    directory.announce()
    return storage
