"""Specialise a language model to a task. The run, top to bottom.

    accelerate launch --config_file accelerate_configs/ddp.yaml train.py --config configs/my_run.yaml
    python train.py --config configs/my_run.yaml            one process, CPU or one GPU
    python train.py --config configs/my_run.yaml --check    everything that can be known without loading weights

Heavy imports stand inside functions, so that --help and a wrong config answer at once.
"""

import contextlib
import functools
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from finetune import config as configs
from finetune.config import Config
from finetune.engine.preemption import StopFlag
from finetune.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_PREEMPTED,
    EXIT_USER_ERROR,
    CheckpointError,
    ExportError,
    Preempted,
    TopologyError,
    TrainingDiverged,
    UserError,
)

if TYPE_CHECKING:
    from finetune.engine.checkpoint.saver import Saver
    from finetune.engine.checkpoint.storage import Storage
    from finetune.engine.rundir import RunDirectory
    from finetune.engine.state import TrainState
    from finetune.engine.step import Loss, StepResult
    from finetune.engine.topology import Topology
    from finetune.engine.tracking import Tracker
    from finetune.preflight import Data

EVA_STEPS = 8  # steps whose inputs adapter.init: eva looks at
MOST_SKIPS = 25  # fp16 halves its scale at each overflow: 25 halvings from 2^16 leave nothing to scale

# ------------------------------------------------------------------------------------------ run


def main() -> int:
    """Run, and turn how it ended into the exit code of the contract."""
    rank = int(os.environ.get("RANK", "0"))
    who = f"[process {rank}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    stop = StopFlag()  # until the loop starts, a signal ends the run at once
    try:
        run(*configs.parse(sys.argv[1:]), stop)
        return EXIT_COMPLETE
    except UserError as exc:
        said = f"error: {exc}" if rank == 0 else f"[process {rank}] error: {str(exc).splitlines()[0]}"
        sys.stderr.write(said + "\n")  # in one piece, as others write, too
        return EXIT_USER_ERROR
    except Preempted as exc:
        print(f"{who}preempted: {exc}", file=sys.stderr)
        return EXIT_PREEMPTED
    except (TrainingDiverged, CheckpointError, ExportError, TopologyError) as exc:
        print(f"{who}failed: {exc}", file=sys.stderr)
        return EXIT_FAILED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    finally:
        stop.close()


@dataclass(frozen=True)
class Job:
    """What was asked, where it lives, here and in an object store, how it is shared, what it learns from, and whether it must stop."""

    config: Config
    directory: "RunDirectory"
    storage: "Storage | None"
    topology: "Topology"
    data: "Data"
    stop: StopFlag


def run(config: Config, check_only: bool, stop: StopFlag) -> None:
    """Check everything, build, loop, finish. Until it opens its directory, a run writes nothing but the token cache."""
    from finetune import preflight
    from finetune.engine.rundir import RunDirectory
    from finetune.engine.topology import Topology

    directory = RunDirectory(config)
    if not check_only and config.checkpoint.storage is None:
        directory.check(config)
    topology = Topology(config.train.precision, check_only)
    topology.require_same(configs.flatten(config.model_dump()))
    topology.check(config)
    configs.accumulation(config, topology.num_data)
    with watched(config, directory, topology, stop):
        storage = reach(config, directory, topology, check_only)
        job = Job(config, directory, storage, topology, preflight.prepare(config, topology), stop)
        if not check_only and directory.is_complete(job.data.train.fingerprint):
            tell(topology, f"{directory.path} is complete; its model is in {directory.model}")
            return
        tell(topology, preflight.summary(config, topology, job.data))
        if check_only:
            directory.check(config)  # last: what is wrong with the data is of more use
            return
        train(job)
    topology.close()


@contextlib.contextmanager
def watched(config: Config, directory: "RunDirectory", topology: "Topology", stop: StopFlag) -> Iterator[None]:
    """Inside, signals, clouds and deadlines are heeded, and processes that died or stand still end all others."""
    from finetune.engine.tracking import say

    def end(problem: str) -> None:
        """In a thread, as the main one may wait for ever."""
        if topology.is_main:
            directory.note_outcome("failed", topology.watchdog.step, problem)
        print(f"[process {topology.rank}] failed: {problem}", file=sys.stderr, flush=True)
        os._exit(EXIT_FAILED)

    cloud = config.checkpoint.notices if topology.is_first_of_node else None
    stop.configure(
        grace_seconds=config.checkpoint.grace_seconds, max_minutes=config.checkpoint.max_minutes, cloud=cloud, say=say
    )
    hang = config.train.hang_minutes
    topology.watchdog.start(None if hang is None else 60 * hang, end)
    try:
        yield
    except RuntimeError as exc:
        if lost := topology.lost(exc):
            raise lost from exc
        raise
    finally:
        topology.watchdog.stop()


def reach(config: Config, directory: "RunDirectory", topology: "Topology", check_only: bool) -> "Storage | None":
    """The run's twin in an object store, and from there what an empty disk does not have, but for checkpoints."""
    if config.checkpoint.storage is None:
        return None
    from finetune.engine.checkpoint.storage import Storage

    storage = Storage(config.checkpoint.storage, config.run.name)
    topology.on_main(storage.check)
    if not check_only:
        if topology.on_main(lambda: storage.restore(directory.path)):
            tell(topology, f"brought back from {storage.url}, as this disk has no {directory.path}")
        directory.check(config)
    return storage


def train(job: Job) -> None:
    """Build, loop, finish; however it ends, the outcome says so."""
    from finetune.models import parameters

    directory, topology, state, tracker = job.directory, job.topology, build(job), None
    untrained = parameters.fingerprints(topology.unwrap(state.model), topology.own_part)
    topology.on_main(directory.lock)
    try:
        if job.storage:
            topology.on_main(job.storage.claim)
        resumed_from = resume(job, state)
        open_directory(job, state)
        tracker = open_tracker(job, state)
        loop(job, state, tracker, open_saver(job, state, tracker, resumed_from))
        finish(job, state, untrained)
    except (Exception, Preempted) as exc:
        told = topology.lost(exc) or exc
        if topology.is_main:
            kind, name = ("preempted", "") if isinstance(exc, Preempted) else ("failed", f"{type(told).__name__}: ")
            directory.note_outcome(kind, state.progress.step, f"{name}{told}")
            if job.storage and directory.is_open:
                with contextlib.suppress(CheckpointError):  # what is wrong with the store was said before
                    job.storage.upload_notes(directory.path)
        if told is not exc:
            raise told from exc
        raise
    finally:
        if tracker:
            tracker.close()  # after the outcome: uploads may take longer than a machine that goes away has
        if topology.is_main:
            directory.unlock()


# ---------------------------------------------------------------------------------------- build


def build(job: Job) -> "TrainState":
    """Model and optimizer, on their devices and shared between processes."""
    import torch

    from finetune.engine import optim
    from finetune.engine.ema import Ema
    from finetune.engine.state import TrainState
    from finetune.models import attention, bases, parameters
    from finetune.models.build import build as build_model

    config, topology, data = job.config, job.topology, job.data

    def first_inputs() -> Iterator[dict[str, Any]]:
        for step in range(min(EVA_STEPS, data.num_steps)):
            yield from (batch.to(topology.device).model_inputs() for batch in data.train.of_all().at(step))

    # One process reads the weights; `prepare` sends each of the others its part. Quantised ones cannot be sent.
    with_weights = topology.is_main or config.adapter.kind == "qlora"
    bare, base = topology.on_every(lambda: build_model(
        config, data.model_config, data.tokenizer, attention=data.attention, precision=topology.precision,
        new_token_ids=data.new_token_ids, device=topology.device, first_inputs=first_inputs, with_weights=with_weights,
    ))  # fmt: skip
    (trainable, total), frozen, start = topology.on_main(
        lambda: (parameters.count(bare), bases.fingerprint(bare, only_frozen=True), bases.fingerprint(bare))
    )
    model, optimizer = topology.prepare(
        bare, lambda shared: optim.build(shared, config.optimizer), max_norm=config.train.max_grad_norm,
        accumulation=configs.accumulation(config, topology.num_data), micro_batch_size=config.train.micro_batch_size,
    )  # fmt: skip
    attention.check(model, base, data.attention, topology.device, topology.precision)
    torch.manual_seed(config.run.seed + topology.rank)  # dropout differs between processes
    decay = config.train.ema_decay
    ema = None if decay is None else Ema(topology.unwrap(model), decay)
    return TrainState(model, optimizer, trainable, total, frozen, start, ema)


def resume(job: Job, state: "TrainState") -> int | None:
    """Go on from the newest valid checkpoint of this run, if it has one; its step."""
    from finetune.engine.checkpoint import folder, resume, shards

    root, topology = job.directory.checkpoints, job.topology
    topology.on_main(lambda: folder.sweep(root))
    found, damaged = topology.on_main(lambda: resume.find(root, job.storage))
    if found is None:
        if job.directory.outcome():
            tell(topology, f"no checkpoint in {root}: starting again at step 1")
        return None
    resume.require_same_run(found, job.config, identity(job, state))
    resume.require_readable(found, topology)
    shards.read(found, topology, state)
    topology.on_main(lambda: folder.set_aside(list(damaged)))
    for path, problem in damaged.items():
        tell(topology, f"skipped a damaged checkpoint: {path}: {problem}")
    tell(topology, f"resumed from {found.path} at step {state.progress.step}")
    return state.progress.step


def identity(job: Job, state: "TrainState") -> dict[str, str]:
    """What the config only points at, and what auto became: a resumption must find the same."""
    return {
        "training data": job.data.train.fingerprint,
        "evaluation data": job.data.eval.fingerprint if job.data.eval else "none",
        "frozen weights": state.frozen,
        "train.precision": job.topology.precision,
    }


def open_directory(job: Job, state: "TrainState") -> None:
    """From here on the run directory is this run's."""
    from finetune.engine import receipt

    directory, topology, step = job.directory, job.topology, state.progress.step

    def write() -> None:
        made = receipt.compose(
            seed=job.config.run.seed, parameters={"trainable": state.num_trainable, "total": state.num_parameters},
            num_processes=topology.num_processes, topology=topology.name, precision=topology.precision,
            attention=job.data.attention, num_steps=job.data.num_steps, start_weights=state.start,
            train_data=job.data.train.sequences.examples.receipt(), template=job.data.template.fingerprint,
            eval_data=job.data.eval.sequences.examples.receipt() if job.data.eval else None, launch=topology.launched,
        )  # fmt: skip
        if job.config.run.replay_of is not None:
            directory.require_receipt(Path(job.config.run.replay_of), made)
        directory.create(job.config)
        directory.rewind(step)
        directory.write_outcome("running", step, "started, or started again")
        directory.write_receipt(made)
        if job.storage:
            job.storage.upload_notes(directory.path)

    topology.on_main(write)


# ----------------------------------------------------------------------------------------- loop


def loop(job: Job, state: "TrainState", tracker: "Tracker", saves: "Saver") -> None:
    """Step, log, evaluate, save; until the plan is done, nothing gets better, or the machine is taken away."""
    from finetune.engine import optim
    from finetune.engine.checkpoint import resume
    from finetune.objectives import OBJECTIVES

    config, directory, topology, data, progress = job.config, job.directory, job.topology, job.data, state.progress
    plain = OBJECTIVES[config.objective.kind].loss  # evaluations are without label smoothing
    loss = functools.partial(plain, label_smoothing=config.objective.label_smoothing)
    wanted, stop = config.evaluation, job.stop
    stop.only_note()

    def judge() -> tuple[int | None, bool]:
        best, stalled = topology.on_main(lambda: directory.judge(wanted.patience))
        return best if wanted.export_best else None, stalled

    def wishes() -> tuple[bool, ...]:
        return stop.is_set, stop.wants_save or saves.is_time(), saves.has_ended()

    must_stop = look(job, state, tracker, plain)  # the attempt before may have had no time for it
    best, stalled = judge()
    topology.on_main(lambda: resume.require_best(directory.checkpoints, best, job.storage))
    while progress.step < data.num_steps and not stalled and not must_stop:
        lr = optim.lr_at(progress.step, data.num_steps, config.optimizer.lr, config.schedule)
        result = one_step(job, state, loss, lr, wishes)
        must_stop, time_to_save, has_saved = result.wishes
        progress.advance(len(data.train.of_step(progress.step)), result.tokens, result.supervised_tokens)
        progress.epoch = progress.step // data.train.steps_per_epoch
        if state.ema and not result.skipped:
            state.ema.update(progress.step)
        epoch, last = progress.step / data.train.steps_per_epoch, progress.step == data.num_steps
        tracker.step(progress, result, lr=lr, epoch=epoch, memory_gb=topology.memory_gb())
        with tracker.pause():
            if has_saved:
                saves.settle()
            if not (must_stop or last):  # a machine that is going away has no time for it
                must_stop = look(job, state, tracker, plain)
                if due(progress.step, wanted.every_steps) and not must_stop:
                    best, stalled = judge()
            ends = last or must_stop or stalled or best == progress.step
            if ends or time_to_save or due(progress.step, config.checkpoint.every_steps):
                saves.save(state, best, seconds_left=stop.seconds_left() if must_stop else None)
                stop.wants_save = False
    if stalled:
        tracker.flush()
    must_stop = must_stop or look(job, state, tracker, plain, at_the_end=True)
    saves.settle()
    if must_stop:
        saves.require(progress.step)
        raise Preempted(
            f"{stop.reason or 'another process'} at step {progress.step}; saved, run the same command again"
        )


def look(job: Job, state: "TrainState", tracker: "Tracker", loss: "Loss", at_the_end: bool = False) -> bool:
    """Evaluate, and sample, where that is due after this step and not on record yet; whether it had to stop halfway."""
    from finetune.engine.step import evaluate

    wanted, directory, topology, step = job.config.evaluation, job.directory, job.topology, state.progress.step
    wants_values = at_the_end or due(step, wanted.every_steps)
    wants_samples = bool(wanted.sample_prompts) and (at_the_end or due(step, wanted.sample_every_steps))
    if wants_values and job.data.eval and step not in topology.on_main(directory.eval_losses):
        with state.averaged():
            values = evaluate(topology, state.model, loss, job.data.eval.epoch(), lambda: job.stop.is_set)
        if values is None:
            return True
        tracker.evaluation(step, values)
    if wants_samples and not topology.on_main(lambda: directory.has_samples(step)):
        if topology.any(job.stop.is_set):
            return True
        sample(job, state)
    return False


def one_step(
    job: Job, state: "TrainState", loss: "Loss", lr: float, wishes: Callable[[], tuple[bool, ...]]
) -> "StepResult":
    """The next step of the plan; what diverges is told with its rows."""
    from finetune.engine.step import train_step

    step, max_grad_norm = state.progress.step, job.config.train.max_grad_norm
    job.topology.watchdog.beat(f"step {step + 1}")
    try:
        result = train_step(
            job.topology, state.model, state.optimizer, loss, job.data.train.at(step),
            lr=lr, max_grad_norm=max_grad_norm, wishes=wishes,
        )  # fmt: skip
    except TrainingDiverged as exc:
        rows = ", ".join(job.data.train.places(step))
        raise TrainingDiverged(
            f"step {step + 1}: {exc}; lower optimizer.lr under another run.name, or look at its rows: {rows}"
        ) from exc
    state.num_skips = state.num_skips + 1 if result.skipped else 0
    if state.num_skips == MOST_SKIPS:
        raise TrainingDiverged(f"step {step + 1}: fp16 gradients overflowed {MOST_SKIPS} times in a row; use bf16")
    return result


def open_tracker(job: Job, state: "TrainState") -> "Tracker":
    """What tells the files, the terminal and the trackers how the run goes."""
    from finetune.engine.trackers import Trackers
    from finetune.engine.tracking import Tracker, say

    config, directory, topology, progress = job.config, job.directory, job.topology, state.progress
    wanted, flops_per_token = config.tracking, 2.0 * state.num_trainable + 4.0 * state.num_parameters
    trackers = None
    if topology.is_main and wanted.trackers:
        trackers = Trackers(
            wanted.trackers, project=wanted.project, run_name=config.run.name, run_id=progress.run_id,
            directory=directory.path, first_step=progress.step + 1, wandb_mode=wanted.wandb_mode,
            about={"config": config.model_dump(), "receipt": directory.receipt()}, history=directory.history(), say=say,
        )  # fmt: skip
    return Tracker(
        directory.metrics, directory.evals, directory.saves, num_steps=job.data.num_steps, start=progress.step, is_main=topology.is_main,
        num_processes=topology.num_processes, every=wanted.log_every_steps, flops_per_token=flops_per_token,
        trackers=trackers,
    )  # fmt: skip


def open_saver(job: Job, state: "TrainState", tracker: "Tracker", resumed_from: int | None) -> "Saver":
    """What writes checkpoints while training goes on."""
    from finetune.engine.checkpoint.saver import Saver

    wanted = job.config.checkpoint
    return Saver(
        job.directory.checkpoints, job.topology, job.storage,
        about={"config": job.config.model_dump(), "identity": identity(job, state)},
        every_minutes=wanted.every_minutes, keep_last=wanted.keep_last, asynchronous=wanted.asynchronous,
        resumed_from=resumed_from, say=lambda text: tell(job.topology, text), record=tracker.saved,
    )  # fmt: skip


def sample(job: Job, state: "TrainState") -> None:
    """Answers to the fixed prompts of the config; every process takes part, as each may hold a part of the model."""
    from finetune.evaluation import generation

    wanted, data = job.config.evaluation, job.data
    job.topology.watchdog.rest(f"the samples after step {state.progress.step}")
    template = data.template if job.config.objective.kind != "clm" else None
    with state.averaged(), job.topology.arithmetic():
        answers = generation.while_training(
            job.topology.unwrap(state.model), data.tokenizer, template, wanted.sample_prompts,
            system_prompt=job.config.data.system_prompt, max_new_tokens=wanted.sample_max_new_tokens,
        )  # fmt: skip
    step = state.progress.step
    job.topology.on_main(lambda: job.directory.write_samples(step, wanted.sample_prompts, answers))


# --------------------------------------------------------------------------------------- finish


def finish(job: Job, state: "TrainState", untrained: dict[str, float | str]) -> None:
    """Export what has moved, open what was exported, and only then call the run complete."""
    from finetune import export
    from finetune.engine.checkpoint import resume
    from finetune.models import adapters, parameters

    job.stop.at_once()
    job.topology.watchdog.rest("the export")
    config, topology, target, step = job.config, job.topology, job.directory.model, state.progress.step
    exported, what = step, "the last weights"
    if config.evaluation.export_best:
        exported, _ = topology.on_main(lambda: job.directory.judge(None))
        what = "the weights of the best evaluation"
        if exported != step:
            resume.put_back_best(job.directory.checkpoints, exported, topology, state)
    if state.ema:
        state.ema.put_in()
        what = what.replace("weights", "averaged weights")
    bare = topology.unwrap(state.model)
    now = parameters.fingerprints(bare, topology.own_part)
    still, num_trained = parameters.still(bare, topology.union({name for name in now if now[name] != untrained[name]}))
    if len(still) == num_trained:
        raise ExportError(f"not one weight has moved in {step} steps; is optimizer.lr too small for model.dtype?")
    if still:
        tell(topology, f"note: {len(still)} of {num_trained} weight tensors have not moved, such as {still[0]}")
    if config.adapter.kind != "full":
        adapters.round_to_base(bare)
    weights = topology.full_weights(state.model, trained_only=config.adapter.kind != "full")
    if config.adapter.kind != "full":
        weights = adapters.in_base_dtype(bare, weights)
    logits = topology.on_every(lambda: export.probe_logits(bare, topology.device))
    sft = config.objective.kind != "clm"  # plain text has no turns whose template there is to keep
    template, system_prompt = (job.data.template, config.data.system_prompt) if sft else (None, None)
    early = (
        ""
        if step == job.data.num_steps
        else f"stopped early, of {job.data.num_steps} steps, as evaluations got no better; "
    )
    reason = f"{early}{what}, of step {exported}, exported and verified"

    def save_and_verify() -> None:
        export.write(
            bare, weights, logits, job.data.tokenizer, template, target, system_prompt=system_prompt,
            precision=topology.precision, trust_remote_code=config.model.trust_remote_code,
        )  # fmt: skip
        if job.storage:
            job.storage.upload_model(target)
        job.directory.write_outcome("complete", step, reason, exported_step=exported)
        if job.storage:
            job.storage.upload_notes(job.directory.path)

    topology.on_main(save_and_verify)
    tell(topology, f"complete at step {step}: {reason}: {target}")
    if sft:
        tell(topology, f"chat with it: python -m finetune chat --model {target}")


def due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


def tell(topology: Any, message: str) -> None:
    if topology.is_main:
        from finetune.engine.tracking import say

        say(message)


if __name__ == "__main__":
    code = main()
    if code != EXIT_COMPLETE:  # threads may wait for processes that have gone
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
