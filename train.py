"""Specialise a language model to a task. The run, top to bottom.

    accelerate launch --config_file accelerate_configs/ddp.yaml train.py --config configs/my_run.yaml
    python train.py --config configs/my_run.yaml            one process, CPU or one GPU
    python train.py --config configs/my_run.yaml --check    everything that can be known without loading weights

Heavy imports stand inside functions, so that --help and a wrong config answer at once.
"""

import os
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from finetune import config as configs
from finetune import failures, places
from finetune.config import Config, paths
from finetune.console import BrokenPipeProof
from finetune.errors import (
    EXIT_COMPLETE,
    EXIT_FAILED,
    EXIT_USER_ERROR,
    DeviceError,
    ExportError,
    Preempted,
    TopologyError,
    TrainingDiverged,
)
from finetune.survival.preemption import StopFlag

if TYPE_CHECKING:
    from finetune.engine.checkpoint.saver import Saver
    from finetune.engine.metrics import Tracker
    from finetune.engine.rundir import RunDirectory
    from finetune.engine.state import TrainState
    from finetune.engine.step import StepResult
    from finetune.run import Job

EVA_STEPS = 8  # steps whose inputs adapter.init: eva looks at
MOST_SKIPS = 25  # fp16 halves its scale at each overflow: 25 halvings from 2^16 leave nothing to scale

# ------------------------------------------------------------------------------------------ run


def main() -> int:
    """Run, and turn how it ended into the exit code of the contract."""
    sys.stdout, sys.stderr = BrokenPipeProof(sys.stdout), BrokenPipeProof(sys.stderr)
    rank = os.environ.get("RANK", "0")
    who = f"[process {rank}] " if os.environ.get("WORLD_SIZE", "1") != "1" else ""
    paths.give_home()
    stop = StopFlag()  # until the loop starts, a signal ends the run at once
    stop.follow_launcher()
    grow_segments()
    try:
        try:
            run(*configs.parse(sys.argv[1:]), stop)
        finally:
            stop.close()
        return EXIT_COMPLETE
    except (Exception, Preempted) as exc:
        error = exc if isinstance(exc, Preempted) else failures.translate(exc)
        if error is None or isinstance(error, DeviceError):  # where it happened tells a bug from a broken GPU
            traceback.print_exc()
        if error is None:
            return EXIT_FAILED
        said = f"{who}{error.label}: {error}"
        if error.exit_code == EXIT_USER_ERROR:  # the same on every process: one shows all of it
            said = f"{error.label}: {error}" if rank == "0" else said.partition("\n")[0]
        sys.stderr.write(said + "\n")  # in one piece, as others write, too
        return error.exit_code


def grow_segments() -> None:
    """Let the GPU's allocator grow its blocks: micro-batches differ in length, and blocks that fit none would pile up.

    PyTorch reads this when it is imported; a setting of the user's own, under any of its names, stays.
    """
    if not os.environ.keys() & {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF"}:
        os.environ["PYTORCH_ALLOC_CONF"] = "expandable_segments:True"


def run(config: Config, check_only: bool, stop: StopFlag) -> None:
    """One attempt at a run; however it ends before its time, outcome.json says so."""
    from finetune.engine.rundir import RunDirectory

    stop.raises()
    directory = RunDirectory(config, check_only)
    try:
        if config.adapter.kind == "qlora":
            from finetune import run as jobs

            config = jobs.as_base_is(config)
            directory = RunDirectory(config, check_only)
        attempt(config, check_only, stop, directory)
    except (Exception, Preempted) as exc:
        directory.note_end(exc, may_create=True)
        raise
    finally:
        directory.withdraw()


def attempt(config: Config, check_only: bool, stop: StopFlag, directory: "RunDirectory") -> None:
    """Check everything, build, loop, finish. Until it opens its directory, a run writes nothing but the token cache."""
    from finetune import preflight
    from finetune import run as jobs
    from finetune.engine.checkpoint import resume
    from finetune.engine.topology import Topology
    from finetune.models import base_identity

    if not check_only and config.checkpoint.storage is None:
        directory.check(config)
        directory.announce()
    topology = Topology(config.train.precision, check_only)
    topology.require_same({**configs.flatten(config.model_dump()), **configs.code_identity(config)})
    topology.check(config)
    config, to_try = jobs.sized(config, topology)
    configs.accumulation(config, topology.num_data)
    with jobs.watched(config, directory, topology, stop):
        storage = jobs.reach(config, directory, topology, check_only)
        date = topology.on_main(lambda: directory.template_date(config))
        data = preflight.prepare(config, topology, date)
        job = jobs.Job(config, directory, storage, topology, data, stop, to_try)
        if not check_only:
            usual = base_identity.usual(data.model_config)
            is_complete, note = topology.on_main(lambda: directory.completion(data.identity, usual))
            if is_complete:
                job.log(f"{directory.path} is complete; its model is in {directory.model}")
                return
            if note:
                job.log(note)
            topology.on_main(directory.require_writable)
        if not check_only and (last := topology.on_main(lambda: resume.newest(directory.checkpoints))):
            resume.require_same_run(last, config, job.known_identity(), usual)
        job.log(preflight.summary(config, topology, job.data))
        if check_only:
            directory.check(config)  # last: what is wrong with the data is of more use
            return
        train(job)
    topology.close()


def train(job: "Job") -> None:
    """Build, loop, finish; a failure leaves an outcome, even in a directory that is new."""
    from finetune.models import parameters

    directory, topology, state, tracker, saves = job.directory, job.topology, None, None, None
    try:
        state = build(job)
        untrained = parameters.fingerprints(topology.unwrap(state.model), topology.local_shard)
        topology.on_main(lambda: directory.lock(job.config.checkpoint.grace_seconds))
        if job.storage:
            topology.on_main(job.storage.claim)
        resumed_from = resume(job, state)
        topology.on_main(lambda: job.open_directory(state))
        tracker = job.tracker(state)
        saves = job.saver(state, tracker, resumed_from)
        loop(job, state, tracker, saves)
        finish(job, state, untrained)
    except (Exception, Preempted) as exc:
        error = job.end(exc, state.progress.step if state else None)
        if saves and not isinstance(error, Preempted | TopologyError):  # what waits for others would wait in vain
            saves.abandon()
        if error is exc:
            raise
        raise error from exc
    finally:
        if tracker:
            tracker.close()  # after the outcome: uploads may take longer than a machine that goes away has
        if topology.is_main:
            directory.unlock()


# ---------------------------------------------------------------------------------------- build


def build(job: "Job") -> "TrainState":
    """Model and optimizer, on their devices and shared between processes."""
    import torch

    from finetune.engine import optim, step
    from finetune.engine.ema import Ema
    from finetune.engine.state import TrainState
    from finetune.models import attention, base_identity, head, parameters
    from finetune.models.build import build as build_model

    config, topology, data = job.config, job.topology, job.data

    def first_inputs() -> Iterator[dict[str, Any]]:
        for number in range(min(EVA_STEPS, data.num_steps)):
            yield from (batch.to(topology.device).inputs for batch in data.train.of_all().at(number))

    # One process reads the weights; `prepare` sends each of the others its part. Quantised ones cannot be sent.
    with_weights = topology.is_main or config.adapter.kind == "qlora"
    bare, base = topology.on_every(lambda: build_model(
        config, data.model_config, data.tokenizer, attention=data.attention, precision=topology.precision,
        new_token_ids=data.new_token_ids, device=topology.device, first_inputs=first_inputs, with_weights=with_weights,
    ))  # fmt: skip
    (trainable, total), products, (frozen, start), code = topology.on_main(lambda: (
        parameters.count(bare), parameters.in_products(bare), base_identity.fingerprints(bare), base_identity.code(base),
    ))  # fmt: skip
    model, optimizer = topology.prepare(
        bare, lambda shared: optim.build(shared, config.optimizer, config.trains_in_16_bits, config.run.seed),
        max_norm=config.train.max_grad_norm,
        accumulation=configs.accumulation(config, topology.num_data), micro_batch_size=config.micro_batch_size,
    )  # fmt: skip
    attention.check(model, base, data.attention, topology.device, topology.precision)
    if why := head.check(model, base, topology.device, topology.precision):
        job.log(f"note: all logits are held in memory at once, because {why}")
    if job.to_try is not None:
        several = configs.accumulation(config, topology.num_data) > 1
        step.try_pass(
            topology, job.policy(model), job.objective, config.objective, data.train.largest(),
            reserved=job.to_try, num_passes=1 + several,
        )  # fmt: skip
    torch.manual_seed(config.run.seed + topology.rank)  # dropout differs between processes
    decay = config.train.ema_decay
    ema = None if decay is None else Ema(topology.unwrap(model), decay)
    return TrainState(model, optimizer, trainable, total, frozen, start, products, code, ema)


def resume(job: "Job", state: "TrainState") -> int | None:
    """Go on from the newest valid checkpoint of this run, if it has one; its step."""
    from finetune.engine.checkpoint import contents, folder, resume
    from finetune.models import base_identity

    root, topology = job.directory.checkpoints, job.topology
    topology.on_main(lambda: folder.sweep(root))
    found, damaged = topology.on_main(lambda: resume.find(root, job.storage, job.data.num_steps))
    if found is None:
        topology.on_main(job.directory.require_no_model)
        if job.directory.outcome():
            job.log(f"no checkpoint in {root}: starting at step 1")
        return None
    resume.require_same_run(found, job.config, job.identity(state), base_identity.usual(job.data.model_config))
    resume.require_readable(found, topology)
    contents.read(found, topology, state)
    kept = topology.on_main(lambda: folder.set_aside(list(damaged)))
    for path, problem in damaged.items():
        job.log(
            f"skipped a damaged checkpoint: {path}: {problem}" + (f"; kept as {kept[path]}" if path in kept else "")
        )
    job.log(f"resumed from {found.path} at step {state.progress.step}")
    return state.progress.step


# ----------------------------------------------------------------------------------------- loop


def loop(job: "Job", state: "TrainState", tracker: "Tracker", saves: "Saver") -> None:
    """Step, log, evaluate, save; until the plan is done, nothing gets better, or the machine is taken away."""
    from finetune.engine import optim
    from finetune.engine.checkpoint import resume

    config, directory, topology, data, progress = job.config, job.directory, job.topology, job.data, state.progress
    wanted, stop = config.evaluation, job.stop
    stop.only_note()

    def judge() -> tuple[int | None, bool]:
        def look_back() -> tuple[int | None, bool]:
            saved = resume.kept(directory.checkpoints) | saves.under_way | {progress.step}
            best, stalled = directory.judge(wanted.patience, saved)
            return best if wanted.export_best else None, stalled

        judged: tuple[int | None, bool] = topology.on_main(look_back)
        return judged

    def requests() -> tuple[bool, ...]:
        return stop.is_set, stop.wants_save or saves.is_time(), saves.has_ended()

    must_stop = look(job, state, tracker)  # the attempt before may have had no time for it
    if wanted.export_best:
        topology.on_main(lambda: resume.bring(directory.checkpoints, directory.judge(None)[0], job.storage))
    best, stalled = judge()
    while progress.step < data.num_steps and not stalled and not must_stop:
        lr = optim.lr_at(progress.step, data.num_steps, config.optimizer.lr, config.schedule)
        result = one_step(job, state, lr, requests)
        must_stop, time_to_save, has_saved = result.requests
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
                must_stop = look(job, state, tracker)
                if due(progress.step, wanted.every_steps) and not must_stop:
                    best, stalled = judge()
            ends = last or must_stop or stalled or best == progress.step
            if ends or time_to_save or due(progress.step, config.checkpoint.every_steps):
                saves.save(state, best, seconds_left=stop.save_seconds() if must_stop else None)
                stop.wants_save = False
    if stalled:
        tracker.flush()
    must_stop = must_stop or look(job, state, tracker, at_the_end=True)
    saves.settle()
    if topology.any(must_stop or stop.is_set):
        saves.require(progress.step)
        raise Preempted(
            f"{stop.reason or 'another process'} at step {progress.step}; saved, run the same command again"
        )


def look(job: "Job", state: "TrainState", tracker: "Tracker", at_the_end: bool = False) -> bool:
    """Evaluate, and sample, where that is due after this step and not on record yet; whether it had to stop halfway."""
    from finetune.engine.step import evaluate

    wanted, directory, topology, step = job.config.evaluation, job.directory, job.topology, state.progress.step
    wants_values = at_the_end or due(step, wanted.every_steps)
    wants_samples = bool(wanted.sample_prompts) and (at_the_end or due(step, wanted.sample_every_steps))
    if wants_values and job.data.eval and step not in topology.on_main(directory.eval_losses):
        with state.averaged():
            values = evaluate(
                topology, job.policy(state.model), job.objective, job.config.objective, job.data.eval.epoch(), job.data.eval.all_totals(),
                lambda: job.stop.is_set,
            )  # fmt: skip
        if values is None:
            return True
        tracker.evaluation(step, values)
    if wants_samples and not topology.on_main(lambda: directory.has_samples(step)):
        if topology.any(job.stop.is_set):
            return True
        job.sample(state, tracker)
    return False


def one_step(job: "Job", state: "TrainState", lr: float, requests: Callable[[], tuple[bool, ...]]) -> "StepResult":
    """The next step of the plan; a divergence is reported with its rows."""
    from finetune.engine.step import train_step

    step, max_grad_norm = state.progress.step, job.config.train.max_grad_norm
    job.topology.watchdog.heartbeat(f"step {step + 1}")
    try:
        result = train_step(
            job.topology, job.policy(state.model), state.optimizer, job.objective, job.config.objective,
            job.data.train.at(step), job.data.train.totals(step), lr=lr, max_grad_norm=max_grad_norm, requests=requests,
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


# --------------------------------------------------------------------------------------- finish


def finish(job: "Job", state: "TrainState", untrained: dict[str, float | str]) -> None:
    """Export what has moved, open what was exported, and only then call the run complete."""
    from finetune import export
    from finetune.models import adapters

    job.stop.at_once()
    job.topology.watchdog.pause("the export")
    config, topology, target, step = job.config, job.topology, job.directory.model, state.progress.step
    exported, what = put_in_best(job, state)
    bare = topology.unwrap(state.model)
    require_moved(job, state, untrained)
    beside_a_base = config.adapter.kind != "full"
    if beside_a_base:
        adapters.round_to_base(bare)
    weights = topology.full_weights(state.model, trained_only=beside_a_base)
    if beside_a_base:
        weights = adapters.in_base_dtype(bare, weights)
    logits = topology.on_every(lambda: export.probe_logits(bare, topology.device))
    sft = job.objective.has_turns  # plain text has no turns whose template there is to keep
    template, system_prompt = (job.data.template, config.data.system_prompt) if sft else (None, None)
    reason = f"{what}, of step {exported}, exported and verified"
    if step < job.data.num_steps:
        reason = (
            f"stopped early, of {job.data.num_steps} steps, because the evaluation loss stopped improving; {reason}"
        )

    base = export.Base(config.model.path, config.model.revision, config.model.trust_remote_code)
    writing = export.Writing(target, template, system_prompt, base)

    def verify_and_publish() -> None:
        names = writing.publish()
        if job.storage:
            job.storage.upload_model(target)
        job.stop.close()  # a signal from here on comes too late to make it anything but complete
        job.directory.write_outcome("complete", step, reason, names, exported_step=exported)
        if job.storage:
            job.storage.upload_notes(job.directory.path)

    topology.on_main(lambda: writing.save(
        bare, weights, logits, job.data.tokenizer,
        precision=topology.precision, device=topology.device, probe_dtype=topology.probe_dtype,
    ))  # fmt: skip
    bare = None
    state.release()
    topology.release()
    topology.on_main(verify_and_publish)
    job.log(f"complete at step {step}: {reason}: {target}")
    if sft:
        job.log(f"chat with it: {places.command()} chat --model {target}")


def put_in_best(job: "Job", state: "TrainState") -> tuple[int, str]:
    """Put the weights to export into the model: (their step, what they are)."""
    from finetune.engine.checkpoint import resume

    topology, step = job.topology, state.progress.step
    exported, what = step, "the last weights"
    if job.config.evaluation.export_best:
        exported, lowest = topology.on_main(lambda: best_saved(job.directory, step))
        what = "the weights of the best evaluation"
        if exported != lowest:
            job.log(f"note: the evaluation of step {lowest} was better, but its checkpoint was not kept")
        if exported != step:
            resume.put_back_best(job.directory.checkpoints, exported, topology, state)
    if state.ema:
        state.ema.put_in()
        what = what.replace("weights", "averaged weights")
    return exported, what


def require_moved(job: "Job", state: "TrainState", untrained: dict[str, float | str]) -> None:
    """Raise ExportError if training has changed no weight; note those that it has not changed."""
    from finetune.models import parameters

    topology, step = job.topology, state.progress.step
    bare = topology.unwrap(state.model)
    now = parameters.fingerprints(bare, topology.local_shard)
    still, num_trained = parameters.still(bare, topology.union({name for name in now if now[name] != untrained[name]}))
    if len(still) == num_trained:
        raise ExportError(f"no weight changed in {step} steps; is optimizer.lr too small for model.dtype?")
    adapter = job.config.adapter
    fresh = adapter.kind != "full" and adapter.path is None and adapter.init
    if step == 1 and fresh in ("default", "gaussian", "eva"):
        # The other factor starts at 0, so that their first gradient is 0.
        still = [name for name in still if "lora_A" not in name and "lora_embedding_B" not in name]
    if still:
        job.log(f"note: {len(still)} of {num_trained} weight tensors did not change, such as {still[0]}")


def best_saved(directory: "RunDirectory", step: int) -> tuple[int, int]:
    """(step of the best evaluation whose weights are there, step of the best one); `step` is where the run is."""
    from finetune.engine.checkpoint import resume

    saved, _ = directory.judge(None, resume.kept(directory.checkpoints) | {step})
    lowest, _ = directory.judge(None)
    return (step if saved is None else saved), (step if lowest is None else lowest)


def due(step: int, every: int | None) -> bool:
    return every is not None and step > 0 and step % every == 0


if __name__ == "__main__":
    code = main()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # threads may wait for processes that have gone, and streams for readers
