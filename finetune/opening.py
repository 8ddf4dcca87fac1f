"""The opening of a run: its directory, topology and data; and how it ends when something fails."""

import contextlib
import functools
import os
import sys
import threading
from collections.abc import Iterator

import torch

from finetune import config as configs
from finetune import failures, places, preflight
from finetune.config import Config, base, differences
from finetune.config.engine_fields import ServerEngine
from finetune.engine import receipt
from finetune.engine.checkpoint import folder
from finetune.engine.checkpoint.storage import Storage
from finetune.engine.metrics import log
from finetune.engine.rundir import RunDirectory
from finetune.engine.topology import Topology
from finetune.errors import (
    EXIT_FAILED,
    CheckpointError,
    ConfigError,
    OutOfMemory,
    Preempted,
    RunDirectoryError,
    TopologyError,
)
from finetune.models import float8, load
from finetune.rollouts.served import require_server
from finetune.run import EXPORT, Run
from finetune.survival.preemption import StopFlag


@contextlib.contextmanager
def opened(config: Config, check_only: bool, stop: StopFlag) -> Iterator[Run]:
    """Open everything a run needs before its model; record any early end in outcome.json."""
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
        if config.train.float8 and not (check_only and topology.device.type == "cpu"):
            float8.require(topology.device)
        if config.rollouts and isinstance(engine := config.rollouts.engine, ServerEngine):
            # Before free memory is measured: a server may sleep from now on.
            asked = functools.partial(require_server, engine, config.rollouts.temperature)
            topology.on_main(asked)
        config, reserved = sized(config, topology)
        configs.accumulation_steps(config, topology.num_data)
        with watched(config, directory, topology, stop):
            try:
                storage = reach(config, directory, topology, check_only)
                date = topology.on_main(directory.template_date)
                data = preflight.prepare(
                    config, topology, date, may_start_early=not check_only and reserved is None
                )
                run = Run(config, directory, storage, topology, data, stop, reserved)
                yield run
            except (Exception, Preempted) as exc:
                error = _fail(run, exc) if run else explained(exc, config, topology)
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


def _fail(run: Run, exc: BaseException) -> BaseException:
    """Record, here and in the store, why the run ends early; return the error to raise."""
    directory, topology, step = run.directory, run.topology, run.step
    error = explained(exc, run.config, topology, step)
    directory.note_end(error, step, may_create=True)
    if topology.is_main and directory.is_open and run.storage:
        with contextlib.suppress(CheckpointError):  # earlier messages report the store's error
            run.storage.upload_notes(directory.path)
    # After a TopologyError or preemption a save may wait in vain for other processes.
    if run.saver and not isinstance(error, Preempted | TopologyError):
        run.saver.abandon()
    return error


def as_base_is(config: Config) -> Config:
    """Return the config with adapter.quantization of a quantised base on the Hub.

    For a base in a folder, reading the config has done this already.
    """
    path = config.model.path
    if config.adapter.kind != "qlora" or path is None or os.path.isdir(path):
        return config
    return base.settled(config, load.load_config(config.model, config.objective.kind).to_dict())[0]


def sized(config: Config, topology: Topology) -> tuple[Config, int | None]:
    """Replace what is auto for memory by numbers, and return the bytes that they reserve.

    These are train.micro_batch_size and train.gradient_checkpointing.
    """
    train, on_gpu = config.train, topology.device.type == "cuda"
    recomputes = train.gradient_checkpointing
    if recomputes == "auto" and not on_gpu:
        config = config.changed("train", gradient_checkpointing=False)
    if train.micro_batch_size != "auto" and not (on_gpu and recomputes == "auto"):
        return config, None
    if config.train.global_batch_size % topology.num_data:
        raise ConfigError(
            f"train.global_batch_size: {config.train.global_batch_size} sequences cannot be split "
            f"evenly over {topology.num_data} processes; take a multiple of {topology.num_data}"
        )
    from finetune.forecast import choice

    # The smallest capacity counts: other programs may use one of the GPUs.
    limit = min(topology.processes.gather(choice.capacity_here(topology.device)))
    about = topology.parallel, topology.device, topology.precision, limit
    size, number, reserved, messages = topology.on_main(lambda: choice.settle(config, *about))
    if topology.is_main:
        for message in messages:
            log(message)
    numbers = {"micro_batch_size": size, "gradient_checkpointing": number}
    return config.changed("train", **numbers), reserved


def explained(
    exc: BaseException, config: Config, topology: Topology, step: int | None = None
) -> BaseException:
    """Translate an exception: what failed, where the run was, what helps; else return it.

    `step`: the last finished one; None before the model is built.
    """
    error = exc if isinstance(exc, Preempted) else failures.translate(exc)
    if isinstance(error, OutOfMemory):
        hint = f"{places.command()} plan --config FILE says what fits"
        if topology.watchdog.at == EXPORT:  # training is over: its advice would not help
            hint = (
                f"the checkpoint of step {step} is kept, and the same command exports again; free "
                "memory first, or use a machine with more"
            )
            return OutOfMemory(f"out of memory at {EXPORT}: {error}\n  {hint}")
        with contextlib.suppress(Exception):  # the forecast may run out of memory, too
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
    """Inside, watch for cloud notices, deadlines, and processes that died or hang."""

    def end(problem: str) -> None:
        """End this process from a thread: the main thread, or a write to disk, may hang."""
        last = threading.Timer(5.0, os._exit, [EXIT_FAILED])
        last.daemon = True
        last.start()
        directory.note_end(TopologyError(problem), topology.watchdog.step, may_create=True)
        print(f"[process {topology.rank}] failed: {problem}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)

    settings, hang = config.checkpoint, config.train.hang_minutes
    grace_seconds = settings.grace_seconds
    cloud = settings.notices if topology.is_first_of_node else None
    stop.configure(
        grace_seconds=grace_seconds, max_minutes=settings.max_minutes, cloud=cloud, log=log
    )

    def hurries() -> bool:
        return stop.is_set and stop.seconds_left() < grace_seconds / 2

    topology.watchdog.start(None if hang is None else 60 * hang, end, hurries)
    try:
        yield
    finally:
        topology.watchdog.stop()


def reach(
    config: Config, directory: RunDirectory, topology: Topology, check_only: bool
) -> Storage | None:
    """Open the run's mirror in the object store; restore from it what this disk lacks.

    Checkpoints are fetched later, by `resume`.
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
        own = folder.run_id((here[0] / folder.MANIFEST).read_bytes()) if here else None
        if there and here and storage.run_id(there[0]) != own:
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
