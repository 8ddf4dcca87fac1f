"""Everything one run needs: config, directories, topology, data, stop flag; and, once built, state,
metrics and saver.
"""

import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch

from finetune import config as configs
from finetune import failures, places, preflight
from finetune.config import Config, base, differences
from finetune.data.prefetch import Prefetch
from finetune.engine import receipt
from finetune.engine.best import BestCheckpoint
from finetune.engine.checkpoint import folder, resume
from finetune.engine.checkpoint.saver import Saver
from finetune.engine.checkpoint.storage import Storage
from finetune.engine.metrics import Metrics, log
from finetune.engine.rundir import RunDirectory
from finetune.engine.state import TrainState
from finetune.engine.topology import Topology
from finetune.engine.trackers import Trackers
from finetune.errors import (
    EXIT_FAILED,
    CheckpointError,
    ConfigError,
    ExportError,
    OutOfMemory,
    Preempted,
    RunDirectoryError,
    TopologyError,
)
from finetune.export.publish import Writing
from finetune.export.save import Base
from finetune.export.verify import probe_logits
from finetune.generation import generate
from finetune.models import adapters, base_identity, load, parameters
from finetune.models.policy import Policy
from finetune.objectives import Objective, chosen
from finetune.preflight import Data
from finetune.survival.preemption import StopFlag


@dataclass
class Run:
    """What one run works with; `loop` fills in the rest as it builds it."""

    config: Config
    directory: RunDirectory
    storage: Storage | None
    """The run directory's twin in an object store."""
    topology: Topology
    data: Data
    stop: StopFlag
    reserved: int | None = None
    """Bytes of optimizer state next to which the largest micro-batch is tried first; None: its size
    was given.
    """
    state: TrainState = field(init=False)
    metrics: Metrics = field(init=False)
    saver: Saver = field(init=False)
    best: BestCheckpoint = field(init=False)
    batches: Prefetch = field(init=False)

    def log(self, message: str) -> None:
        """Write one line, once."""
        if self.topology.is_main:
            log(message)

    @property
    def accumulation_steps(self) -> int:
        """Micro-batches of one process in one step."""
        return configs.accumulation_steps(self.config, self.topology.num_data)

    @property
    def step(self) -> int | None:
        """The last step that is done; None before there is a model."""
        return self.state.progress.step if hasattr(self, "state") else None

    def is_complete(self) -> bool:
        """Whether the run has ended before, with a model that is still what was verified then; says
        so.

        Raises RunDirectoryError if the directory holds another run, or what would be overwritten.
        """
        directory, topology, usual = (
            self.directory,
            self.topology,
            base_identity.usual(self.data.model_config),
        )
        is_complete, note = topology.on_main(
            lambda: directory.completion(self.data.identity, usual)
        )
        if is_complete:
            self.log(f"{directory.path} is complete; its model is in {directory.model}")
            return True
        if note:
            self.log(note)
        topology.on_main(directory.require_writable)
        if last := topology.on_main(lambda: resume.newest(directory.checkpoints)):
            resume.require_same_run(last, self.config, self.known_identity(), usual)
        return False

    def known_identity(self) -> dict[str, Any]:
        """What of `identity` is known before weights are loaded."""
        return {**self.data.identity, "train.precision": self.topology.precision}

    def identity(self) -> dict[str, Any]:
        """What the config only points at, and what auto became: a resumption must find the same."""
        facts = self.state.facts
        weights = {"frozen weights": facts.frozen, "code of the model": facts.code}
        # Fresh adapters are left out: some start from what a GPU computes, which is not the same
        # twice.
        if self.config.adapter.kind == "full" or self.config.adapter.path:
            weights["weights before the first step"] = facts.start
        return {**self.known_identity(), **weights}

    def lock(self) -> None:
        """Keep other processes from running in the directory, and other machines from its store."""
        self.topology.on_main(lambda: self.directory.lock(self.config.checkpoint.grace_seconds))
        if self.storage:
            self.topology.on_main(self.storage.claim)

    def open_directory(self, resumed_from: int | None) -> None:
        """From here on the run directory is this run's: write config and receipt, and open logs and
        saver.
        """
        self.topology.on_main(self._begin)
        self.metrics = self._metrics()
        self.saver = self._saver(resumed_from)
        self.batches = Prefetch(
            self.data.train,
            self.data.num_steps,
            part=self.topology.part,
            pin=self.topology.device.type == "cuda",
        )
        self.best = BestCheckpoint(
            self.config.evaluation, self.directory, self.topology, lambda: self.saver.under_way
        )

    def _begin(self) -> None:
        config, topology, data, facts, step = (
            self.config, self.topology, self.data, self.state.facts, self.state.progress.step
        )  # fmt: skip
        made = receipt.compose(
            seed=config.run.seed, parameters={
                "trainable": facts.num_trainable, "total": facts.num_parameters,
                "trained_in_products": facts.products[0], "frozen_in_products": facts.products[1],
            },
            num_processes=topology.num_processes, topology=topology.name, precision=topology.precision,
            device=topology.device.type, attention=data.attention, num_steps=data.num_steps, start_weights=facts.start,
            template_date=data.template.date, identity=data.identity,
            train_data=data.train.sequences.examples.receipt(),
            eval_data=data.eval.sequences.examples.receipt() if data.eval else None, launch=topology.launched,
        )  # fmt: skip
        self.directory.require_same_receipt(made)
        if self.directory.outcome().get("state") == "running":  # the lock is ours: none runs here
            self.log(
                "note: the previous attempt left no outcome: it was killed, or its machine was lost"
            )
        self.directory.create(config)
        wanted = config.evaluation.every_steps if data.eval else None
        for note in (
            *self.directory.logs.rewind(step),
            *self.directory.logs.missing(step, config.tracking.log_every_steps, wanted),
        ):
            self.log(note)
        self.directory.write_outcome("running", step, "started, or started again")
        if changed := self.directory.write_receipt(made, step):
            self.log(changed)
        if self.storage:
            self.storage.upload_notes(self.directory.path)

    def fail(self, exc: BaseException) -> BaseException:
        """Note, here and in the store, that and why the run ends before its time; return the error
        to raise: see `explained`.
        """
        error = explained(exc, self.config, self.topology)
        self.directory.note_end(error, self.step, may_create=True)
        if self.topology.is_main and self.directory.is_open and self.storage:
            with contextlib.suppress(
                CheckpointError
            ):  # what is wrong with the store was said before
                self.storage.upload_notes(self.directory.path)
        # What waits for other processes would wait in vain.
        if hasattr(self, "saver") and not isinstance(error, Preempted | TopologyError):
            self.saver.abandon()
        return error

    def close(self) -> None:
        """Let the directory go, after the outcome: uploads of trackers may take longer than a
        machine that goes away has.
        """
        if hasattr(self, "batches"):
            self.batches.close()
        if hasattr(self, "metrics"):
            self.metrics.close()
        if self.topology.is_main:
            self.directory.unlock()

    @property
    def objective(self) -> Objective:
        return chosen(self.config.objective)

    def policy(self, model: Any) -> Policy:
        """The model as objectives see it."""
        return Policy(model, self.topology.unwrap)

    def require_changed(self, untrained: dict[str, float | str]) -> None:
        """Raise ExportError if training has changed no weight; name those that it left alone.

        `untrained`: fingerprints of the weights before the first step.
        """
        model = self.topology.unwrap(self.state.model)
        step, adapter = self.state.progress.step, self.config.adapter
        now = parameters.fingerprints(model, self.topology.local_shard)
        changed = self.topology.union({name for name in now if now[name] != untrained[name]})
        unchanged, num_trained = parameters.unchanged(model, changed)
        if len(unchanged) == num_trained:
            raise ExportError(
                f"no weight changed in {step} steps; is optimizer.lr too small for model.dtype?"
            )
        if step == 1 and adapter.kind != "full" and adapters.starts_at_zero(adapter):
            unchanged = [name for name in unchanged if not adapters.waits_for_other_factor(name)]
        if unchanged:
            self.log(
                f"note: {len(unchanged)} of {num_trained} weight tensors did not change, "
                f"such as {unchanged[0]}"
            )

    def save_export(self) -> Writing:
        """Save the model beside its place in the run directory. Collective."""
        config, topology, template = self.config, self.topology, self.data.template
        model, is_adapter = topology.unwrap(self.state.model), config.adapter.kind != "full"
        if is_adapter:
            adapters.round_to_base(model)
        weights = topology.full_weights(self.state.model, trained_only=is_adapter)
        if is_adapter:
            weights = adapters.in_base_dtype(model, weights)
        logits = topology.on_every(lambda: probe_logits(model, topology.device))
        has_turns = self.objective.has_turns  # rows of plain text have no turns, so no template
        writing = Writing(
            self.directory.model, template if has_turns else None,
            config.data.system_prompt if has_turns else None,
            Base(config.model.path, config.model.revision, config.model.trust_remote_code),
        )  # fmt: skip
        topology.on_main(lambda: writing.save(
            model, weights, logits, self.data.tokenizer, precision=topology.precision,
            device=topology.device, probe_dtype=topology.probe_dtype,
        ))  # fmt: skip
        return writing

    def complete(self, export: Writing, step: int, reason: str, exported: int) -> None:
        """Verify and publish the model, here and in the store, and record that the run is complete.

        `exported`: the step of its weights.
        """

        def publish() -> None:
            names = export.publish()
            if self.storage:
                self.storage.upload_model(self.directory.model)
            self.stop.close()  # from here on a signal comes too late
            self.directory.write_outcome("complete", step, reason, names, exported_step=exported)
            if self.storage:
                self.storage.upload_notes(self.directory.path)

        self.topology.on_main(publish)
        self.log(f"complete at step {step}: {reason}: {self.directory.model}")
        self.log(f"next:\n{self.what_next()}")

    def what_next(self) -> str:
        """The commands that use the exported model, one a line."""
        command, path, base = places.command(), self.directory.path, self.config.model.path
        lines = [f"  draw        {command} curves {path}"]
        if self.objective.has_turns and base is not None:
            evaluate = f"{command} evaluate --base {base} --tuned {path} --data HELD_OUT_ROWS"
            lines.insert(0, f"  compare     {evaluate}")
        if self.objective.has_turns:
            lines.insert(0, f"  chat        {command} chat {path}")
        if self.config.adapter.kind != "full":
            lines.append(f"  merge       {command} merge {path} --output {path}/merged")
        return "\n".join(lines)

    def _metrics(self) -> Metrics:
        config, directory, topology, progress = (
            self.config,
            self.directory,
            self.topology,
            self.state.progress,
        )
        wanted = config.tracking
        trackers = None
        if topology.is_main and wanted.trackers:
            trackers = Trackers(
                wanted.trackers, project=wanted.project, run_name=config.run.name, run_id=progress.run_id,
                directory=directory.path, first_step=progress.step + 1, wandb_mode=wanted.wandb_mode,
                about={"config": config.model_dump(), "receipt": directory.receipt()}, history=directory.logs.history(), log=log,
            )  # fmt: skip
        lengths = self.data.train.sequences.examples.lengths.tolist()
        attention = parameters.attention_per_token(self.data.model_config, lengths)
        return Metrics(
            directory, num_steps=self.data.num_steps, start=progress.step,
            is_main=topology.is_main, num_processes=topology.num_processes, every=wanted.log_every_steps,
            flops_per_token=parameters.flops_per_token(*self.state.facts.products, attention), trackers=trackers,
        )  # fmt: skip

    def _saver(self, resumed_from: int | None) -> Saver:
        wanted = self.config.checkpoint
        return Saver(
            self.directory.checkpoints, self.topology, self.storage,
            about={"config": self.config.model_dump(), "identity": self.identity()},
            every_minutes=wanted.every_minutes, keep_last=wanted.keep_last, asynchronous=wanted.asynchronous,
            grace_seconds=wanted.grace_seconds,
            resumed_from=resumed_from, log=self.log, record=self.metrics.saved, before=self.metrics.sync,
        )  # fmt: skip

    def sample(self) -> None:
        """Answers to the fixed prompts of the config; every process takes part, as each may hold a
        part of the model.
        """
        wanted, data, step = self.config.evaluation, self.data, self.state.progress.step
        self.topology.watchdog.pause(f"the samples after step {step}")
        template = data.template if self.objective.has_turns else None
        with self.state.averaged(), self.topology.arithmetic():
            answers = generate.while_training(
                self.topology.unwrap(self.state.model), data.tokenizer, template, wanted.sample_prompts,
                system_prompt=self.config.data.system_prompt, max_new_tokens=wanted.sample_max_new_tokens,
                together=self.topology.parallel.generates_together, log=self.log,
            )  # fmt: skip
        self.metrics.sampled(step, wanted.sample_prompts, answers)


@contextlib.contextmanager
def opened(config: Config, check_only: bool, stop: StopFlag) -> Iterator[Run]:
    """Open everything a run needs before its model; however it ends before its time, outcome.json
    says so.
    """
    directory, run = RunDirectory(config, check_only), None
    try:
        if config.adapter.kind == "qlora":
            config = as_base_is(config)
            directory = RunDirectory(config, check_only)
        if not check_only and config.checkpoint.storage is None:
            directory.check(config)
            directory.announce()
        topology = Topology(config.train.precision, check_only)
        topology.require_same(
            {**configs.flatten(config.model_dump()), **configs.code_identity(config)}
        )
        topology.check(config)
        config, reserved = sized(config, topology)
        configs.accumulation_steps(config, topology.num_data)
        with watched(config, directory, topology, stop):
            try:
                storage = reach(config, directory, topology, check_only)
                date = topology.on_main(directory.template_date)
                data = preflight.prepare(config, topology, date)
                run = Run(config, directory, storage, topology, data, stop, reserved)
                yield run
            except (Exception, Preempted) as exc:
                error = run.fail(exc) if run else explained(exc, config, topology)
                directory.note_end(error, may_create=True)
                if error is exc:
                    raise
                raise error from exc
            finally:
                if run:
                    run.close()
        topology.close()
    except (Exception, Preempted) as exc:
        directory.note_end(exc, may_create=True)
        raise
    finally:
        directory.withdraw()


def as_base_is(config: Config) -> Config:
    """adapter.quantization as a base on the Hub has it that is quantised already; folders were
    looked at with the config.
    """
    if (
        config.adapter.kind != "qlora"
        or config.model.path is None
        or os.path.isdir(config.model.path)
    ):
        return config
    return base.settled(config, load.load_config(config.model).to_dict())[0]


def sized(config: Config, topology: Topology) -> tuple[Config, int | None]:
    """train.micro_batch_size: auto as a number, and the bytes of optimizer state for which it was
    chosen; None if it was one.
    """
    if config.train.micro_batch_size != "auto":
        return config, None
    if config.train.global_batch_size % topology.num_data:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} sequences cannot be split "
            f"evenly over {topology.num_data} processes; take a multiple of {topology.num_data}"
        )
    from finetune.forecast import choice

    limit = min(
        topology.processes.gather(choice.capacity_here(topology.device))
    )  # others may be at work on one of the GPUs
    size, reserved, why = topology.on_main(
        lambda: choice.automatic(
            config, topology.parallel, topology.device, topology.precision, limit
        )
    )
    if topology.is_main:
        log(why)
    return config.model_copy(
        update={"train": config.train.model_copy(update={"micro_batch_size": size})}
    ), reserved


def explained(exc: BaseException, config: Config, topology: Topology) -> BaseException:
    """What an exception really was, where the run stood, and what helps; itself if `failures` does
    not know it.
    """
    error = exc if isinstance(exc, Preempted) else failures.translate(exc)
    if isinstance(error, OutOfMemory):
        hint = f"{places.command()} plan --config FILE says what fits"
        with contextlib.suppress(Exception):  # there may be no memory left to think with
            from finetune.forecast import choice

            torch.cuda.empty_cache()
            hint = choice.advice(config, topology.parallel, topology.device, topology.precision)
        return OutOfMemory(f"out of memory at {topology.watchdog.at}: {error}\n  {hint}")
    if isinstance(error, TopologyError) and error is not exc:
        return TopologyError(
            f"{topology.lost()} at {topology.watchdog.at}; this process failed with: {error}"
        )
    return error or exc


@contextlib.contextmanager
def watched(
    config: Config, directory: RunDirectory, topology: Topology, stop: StopFlag
) -> Iterator[None]:
    """Inside, clouds and deadlines are heeded, and processes that died or stand still end all
    others.
    """

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
    stop.configure(
        grace_seconds=wanted.grace_seconds, max_minutes=wanted.max_minutes, cloud=cloud, log=log
    )

    def hurries() -> bool:
        return stop.is_set and stop.seconds_left() < wanted.grace_seconds / 2

    topology.watchdog.start(None if hang is None else 60 * hang, end, hurries)
    try:
        yield
    finally:
        topology.watchdog.stop()


def reach(
    config: Config, directory: RunDirectory, topology: Topology, check_only: bool
) -> Storage | None:
    """The run's twin in an object store, and from there what an empty disk does not have, but for
    checkpoints.
    """
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
                f"{storage.url} has checkpoints, and checkpoint.resume is never; "
                "set it to auto, or choose another run.name"
            )
        known = storage.config()
        if known is not None and (different := differences(known, config)):
            instead = (
                "give this run another run.name or checkpoint.storage, or go back to those values"
            )
            raise receipt.refusal(f"{storage.url} holds another run", different, instead)
        here = [path for path in folder.steps(directory.checkpoints) if folder.looks_whole(path)]
        further = bool(there) and (not here or folder.step_name(there[0]) > here[0].name)
        if (
            there
            and here
            and storage.run_id(there[0]) != folder.run_id((here[0] / folder.MANIFEST).read_bytes())
        ):
            raise RunDirectoryError(
                f"{storage.url} and {directory.path} are two different runs with one name; "
                "give this one another run.name or checkpoint.storage"
            )
        if storage.restore(directory.path, over=further):
            log(f"restored from {storage.url}, which is ahead of this disk")
        directory.check(config)

    topology.on_main(bring_back)
    directory.announce()
    return storage
