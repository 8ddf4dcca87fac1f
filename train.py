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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
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


@dataclass(frozen=True)
class Job:
    """What was asked, where it lives, how it is shared, what it learns from, and whether it must stop."""

    config: Config
    directory: "RunDirectory"
    topology: "Topology"
    data: "Data"
    stop: StopFlag


def run(config: Config, check_only: bool, stop: StopFlag) -> None:
    """Check everything, build, loop, finish. Until it opens its directory, a run writes nothing but the token cache."""
    from finetune import preflight
    from finetune.engine.rundir import RunDirectory
    from finetune.engine.topology import Topology

    directory = RunDirectory(config)
    if not check_only:
        directory.check(config)
    topology = Topology(config.train.precision, check_only)
    topology.require_same(configs.flatten(config.model_dump()))
    topology.check(config)
    configs.accumulation(config, topology.num_data)
    job = Job(config, directory, topology, preflight.prepare(config, topology), stop)
    if not check_only and directory.is_complete(job.data.train.fingerprint):
        tell(topology, f"{directory.path} is complete; its model is in {directory.model}")
        return
    tell(topology, preflight.summary(config, topology, job.data))
    if check_only:
        directory.check(config)  # last: what is wrong with the data is of more use
        return
    train(job)
    topology.close()


def train(job: Job) -> None:
    """Build, loop, finish; however it ends, the outcome says so."""
    from finetune.models import parameters

    directory, topology, state, tracker = job.directory, job.topology, build(job), None
    untrained = parameters.fingerprints(topology.unwrap(state.model), topology.own_part)
    topology.on_main(directory.lock)
    try:
        resume(job, state)
        open_directory(job, state)
        tracker = open_tracker(job, state)
        loop(job, state, tracker)
        finish(job, state, untrained)
    except (Exception, Preempted) as exc:
        if topology.is_main and directory.outcome():
            ended, name = ("preempted", "") if isinstance(exc, Preempted) else ("failed", f"{type(exc).__name__}: ")
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                directory.write_outcome(ended, state.progress.step, f"{name}{exc}")
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
    (trainable, total), frozen = topology.on_main(lambda: (parameters.count(bare), bases.frozen_fingerprint(bare)))
    model, optimizer = topology.prepare(
        bare, lambda shared: optim.build(shared, config.optimizer), max_norm=config.train.max_grad_norm,
        accumulation=configs.accumulation(config, topology.num_data), micro_batch_size=config.train.micro_batch_size,
    )  # fmt: skip
    attention.check(model, base, data.attention, topology.device, topology.precision)
    torch.manual_seed(config.run.seed + topology.rank)  # dropout differs between processes
    decay = config.train.ema_decay
    ema = None if decay is None else Ema(topology.unwrap(model), decay)
    return TrainState(model, optimizer, trainable, total, frozen, ema)


def resume(job: Job, state: "TrainState") -> None:
    """Go on from the newest valid checkpoint of this run, if it has one."""
    from finetune.engine import checkpoint

    root = job.directory.checkpoints
    found, damaged = job.topology.on_main(lambda: checkpoint.find_newest(root))
    if found:
        checkpoint.require_same_run(found, job.config, identity(job, state))
        checkpoint.load(found, job.topology, state)
        job.topology.on_main(lambda: checkpoint.set_aside(list(damaged)))
        for path, problem in damaged.items():
            tell(job.topology, f"skipped a damaged checkpoint: {path}: {problem}")
        tell(job.topology, f"resumed from {found.path} at step {state.progress.step}")
    elif job.directory.outcome():
        tell(job.topology, f"no checkpoint in {root}: starting again at step 1")


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
    directory, topology, step = job.directory, job.topology, state.progress.step

    def write() -> None:
        directory.create(job.config)
        directory.rewind(step)
        directory.write_outcome("running", step, "started, or started again")
        directory.write_receipt(
            seed=job.config.run.seed, parameters={"trainable": state.num_trainable, "total": state.num_parameters},
            num_processes=topology.num_processes, topology=topology.name, precision=topology.precision,
            attention=job.data.attention, num_steps=job.data.num_steps,
            train_data=job.data.train.sequences.examples.receipt(), template=job.data.template.fingerprint,
            eval_data=job.data.eval.sequences.examples.receipt() if job.data.eval else None,
        )  # fmt: skip

    topology.on_main(write)


# ----------------------------------------------------------------------------------------- loop


def loop(job: Job, state: "TrainState", tracker: "Tracker") -> None:
    """Step, log, evaluate, save; until the plan is done, nothing gets better, or the machine is taken away."""
    from finetune.engine import checkpoint, optim
    from finetune.objectives import OBJECTIVES

    config, directory, topology, data, progress = job.config, job.directory, job.topology, job.data, state.progress
    plain = OBJECTIVES[config.objective.kind].loss  # evaluations are without label smoothing
    loss = functools.partial(plain, label_smoothing=config.objective.label_smoothing)
    job.stop.only_note()
    saves = checkpoint.Saver(
        directory.checkpoints, topology, about={"config": config.model_dump(), "identity": identity(job, state)},
        every_minutes=config.checkpoint.every_minutes, keep_last=config.checkpoint.keep_last,
    )  # fmt: skip
    wanted = config.evaluation

    def judge() -> tuple[int | None, bool]:
        best, stalled = topology.on_main(lambda: directory.judge(wanted.patience))
        return best if wanted.export_best else None, stalled

    look(job, state, tracker, plain)  # the attempt before may have had no time for it
    best, stalled = judge()
    topology.on_main(lambda: checkpoint.require(directory.checkpoints, best))
    while progress.step < data.num_steps and not stalled:
        lr = optim.lr_at(progress.step, data.num_steps, config.optimizer.lr, config.schedule)
        result = one_step(job, state, loss, lr, wishes=lambda: (job.stop.is_set, saves.is_time()))
        must_stop, time_to_save = result.wishes
        progress.advance(len(data.train.of_step(progress.step)), result.tokens, result.supervised_tokens)
        progress.epoch = progress.step // data.train.steps_per_epoch
        if state.ema and not result.skipped:
            state.ema.update(progress.step)
        epoch, last = progress.step / data.train.steps_per_epoch, progress.step == data.num_steps
        tracker.step(progress, result, lr=lr, epoch=epoch, memory_gb=topology.memory_gb())
        with tracker.pause():
            if not (must_stop or last):  # a machine that is going away has no time for it
                look(job, state, tracker, plain)
                if due(progress.step, wanted.every_steps):
                    best, stalled = judge()
            ends = last or must_stop or stalled or best == progress.step
            if ends or time_to_save or due(progress.step, config.checkpoint.every_steps):
                saves.save(state, best)
        if must_stop:
            why = job.stop.reason or "another process"
            raise Preempted(f"{why} at step {progress.step}; saved, run the same command again")
    if stalled:
        tracker.flush()
    look(job, state, tracker, plain, at_the_end=True)


def look(job: Job, state: "TrainState", tracker: "Tracker", loss: "Loss", at_the_end: bool = False) -> None:
    """Evaluate, and sample, where that is due after this step and not on record yet."""
    from finetune.engine.step import evaluate

    wanted, directory, topology, step = job.config.evaluation, job.directory, job.topology, state.progress.step
    wants_values = at_the_end or due(step, wanted.every_steps)
    wants_samples = bool(wanted.sample_prompts) and (at_the_end or due(step, wanted.sample_every_steps))
    if wants_values and job.data.eval and step not in topology.on_main(directory.eval_losses):
        with state.averaged():
            values = evaluate(topology, state.model, loss, job.data.eval.epoch())
        tracker.evaluation(step, values)
    if wants_samples and not topology.on_main(lambda: directory.has_samples(step)):
        sample(job, state)


def one_step(
    job: Job, state: "TrainState", loss: "Loss", lr: float, wishes: Callable[[], tuple[bool, ...]]
) -> "StepResult":
    """The next step of the plan; what diverges is told with its rows."""
    from finetune.engine.step import train_step

    step, max_grad_norm = state.progress.step, job.config.train.max_grad_norm
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
        directory.metrics, directory.evals, num_steps=job.data.num_steps, start=progress.step, is_main=topology.is_main,
        num_processes=topology.num_processes, every=wanted.log_every_steps, flops_per_token=flops_per_token,
        trackers=trackers,
    )  # fmt: skip


def sample(job: Job, state: "TrainState") -> None:
    """Answers to the fixed prompts of the config; every process takes part, as each may hold a part of the model."""
    from finetune.evaluation import generation

    wanted, data = job.config.evaluation, job.data
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
    from finetune.engine import checkpoint
    from finetune.models import adapters, parameters

    config, topology, target, step = job.config, job.topology, job.directory.model, state.progress.step
    exported, what = step, "the last weights"
    if config.evaluation.export_best:
        exported, _ = topology.on_main(lambda: job.directory.judge(None))
        what = "the weights of the best evaluation"
        if exported != step:
            checkpoint.load_weights(job.directory.checkpoints, exported, topology, state)
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
        job.directory.write_outcome("complete", step, reason, exported_step=exported)

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
    sys.exit(main())
