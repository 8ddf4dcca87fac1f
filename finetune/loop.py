"""One run, from top to bottom: build, resume, loop, finish."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from finetune import opening, preflight, run_rollouts
from finetune import summary as summaries
from finetune.config import Check, Config
from finetune.engine import optim
from finetune.engine.checkpoint import contents, folder
from finetune.engine.checkpoint import resume as resumption
from finetune.engine.ema import Ema
from finetune.engine.gpu import take_kernels
from finetune.engine.passes import try_pass
from finetune.engine.state import TrainState
from finetune.engine.step import StepResult, train_step
from finetune.errors import Preempted, TrainingDiverged
from finetune.models import attention_probe, base_identity, head
from finetune.models import build as models
from finetune.run import EXPORT, Run
from finetune.survival.preemption import StopFlag

EVA_STEPS = 8  # steps whose inputs adapter.init: eva looks at


def run(config: Config, check: Check, stop: StopFlag) -> None:
    """Make one attempt at a run. Until it opens its directory it writes only the token cache."""
    check_only = bool(check)
    stop.raises()
    with opening.opened(config, check_only, stop) as run:
        if not check_only and run.is_complete():
            return
        facts = preflight.check_model(run.config, run.data)
        run.settle_compilation(facts.num_parameters)
        notes = summaries.notes(run.config, run.data, facts, check_only)
        run.log(summaries.summary(run.config, run.topology, run.data, facts, notes, check_only))
        if check_only:
            run.directory.check(run.config)  # last: what is wrong with the data is of more use
            if check == "strict":
                summaries.refuse(notes)
            return
        build(run)
        untrained = run.fingerprints()
        run.lock()
        run.take_reference()
        resumed_from = resume(run)
        run.open_directory(resumed_from)
        run.batches = run_rollouts.opened(run) if run.config.rollouts else run.prefetch()
        loop(run)
        finish(run, untrained)


# ---------------------------------------------------------------------------------------- build


def build(run: Run) -> None:
    """Load the model, share it and its optimizer between the processes, check its attention."""
    config, topology, data = run.config, run.topology, run.data

    def first_inputs() -> Iterator[dict[str, Any]]:
        for number in range(min(EVA_STEPS, data.num_steps)):
            yield from (b.to(topology.device).inputs for b in data.train.of_all().at(number))

    def make_optimizer(shared: nn.Module) -> torch.optim.Optimizer:
        return optim.build(shared, config.optimizer, config.trains_in_16_bits, config.run.seed)

    # One process reads the weights; `prepare` sends each of the others its part. Quantised
    # weights cannot be sent.
    with_weights = topology.is_main or config.adapter.kind == "qlora"
    whole, base = topology.on_every(lambda: models.build(
        config, data.model_config, data.tokenizer, attention=data.attention,
        precision=topology.precision, new_token_ids=data.new_token_ids, device=topology.device,
        first_inputs=first_inputs, with_weights=with_weights, heads=run.objective.heads,
    ))  # fmt: skip
    facts = topology.on_main(lambda: models.facts(whole, base))
    model, optimizer = topology.prepare(whole, make_optimizer, config)
    for line in take_kernels(config, topology, base, data.attention, data.train, optimizer):
        run.log(line)
    attention_probe.check(model, base, data.attention, topology.device, topology.precision)
    if why := head.check(model, base, topology.device, topology.precision):
        run.log(f"note: all logits are held in memory at once, because {why}")
    run.load_companions()
    policy = run.policy(model)
    if run.reserved is not None:
        largest, num_passes = data.train.largest(), min(2, run.accumulation_steps)
        try_pass(
            topology, policy, run.objective, config.objective, largest, run.reserved, num_passes
        )
    torch.manual_seed(config.run.seed + topology.rank)  # dropout differs between processes
    decay = config.train.ema_decay
    ema = None if decay is None else Ema(topology.unwrap(model), decay)
    run.state = TrainState(model, optimizer, facts, ema)


def resume(run: Run) -> int | None:
    """Restore the newest valid checkpoint of this run, if there is one; return its step."""
    root, topology, state = run.directory.checkpoints, run.topology, run.state
    topology.on_main(lambda: folder.sweep(root))
    found, damaged = topology.on_main(
        lambda: resumption.find(root, run.storage, run.data.num_steps)
    )
    if found is None:
        topology.on_main(run.directory.require_no_model)
        if run.directory.outcome():
            run.log(f"no checkpoint in {root}: starting at step 1")
        return None
    usual = base_identity.usual(run.data.model_config)
    resumption.require_same_run(found, run.config, run.identity(), usual)
    resumption.require_readable(found, topology)
    contents.read(found, topology, state)
    kept = topology.on_main(lambda: folder.set_aside(list(damaged)))
    for path, problem in damaged.items():
        beside = f"; kept as {kept[path]}" if path in kept else ""
        run.log(f"skipped a damaged checkpoint: {path}: {problem}{beside}")
    run.log(f"resumed from {found.path} at step {state.progress.step}")
    return state.progress.step


# ----------------------------------------------------------------------------------------- loop


def loop(run: Run) -> None:
    """Step, evaluate, save; until the last step, no improvement, or the machine must go."""
    config, stop, metrics, saver, best = run.config, run.stop, run.metrics, run.saver, run.best
    progress, num_steps = run.state.progress, run.data.num_steps
    stop.only_note()
    must_stop = evaluate_if_due(run)  # the attempt before may have had no time for it
    best.fetch(run.storage)
    best.update(progress.step)
    while progress.step < num_steps and not best.stalled and not must_stop:
        with metrics.pause():
            must_stop = not run.batches.ready(progress.step)
            if must_stop:  # while it sampled what this step learns from
                run.save_unless_saved()
                break
        result = one_step(run)
        must_stop, time_to_save, has_saved = result.requests
        with metrics.pause():
            if has_saved:
                saver.settle()
            is_last = progress.step == num_steps
            if not (must_stop or is_last):  # a machine that is going away has no time for it
                must_stop = evaluate_if_due(run)
                if due(progress.step, config.evaluation.every_steps) and not must_stop:
                    best.update(progress.step)
            best.watch(result.terms)
            if best.stalled:
                metrics.flush()  # a resume has to find out the same
            ends = is_last or must_stop or best.stalled or best.step == progress.step
            if ends or time_to_save or due(progress.step, config.checkpoint.every_steps):
                seconds_left = stop.save_seconds() if must_stop else None
                saver.save(run.state, best.step, seconds_left)
                stop.wants_save = False
    must_stop = must_stop or evaluate_if_due(run, at_the_end=True)
    metrics.close_bar()
    saver.settle()
    if run.topology.any(must_stop or stop.is_set):
        saver.require(progress.step)
        reason = stop.reason or "another process"
        saved = "saved" if progress.step else "nothing to save yet"
        raise Preempted(f"{reason} at step {progress.step}; {saved}, run the same command again")


def one_step(run: Run) -> StepResult:
    """Make the next step of the order and log it; name the rows of one that diverged."""
    config, topology, order, state = run.config, run.topology, run.data.train, run.state
    progress, stop, saver = state.progress, run.stop, run.saver
    step = progress.step + 1
    topology.watchdog.heartbeat(f"step {step}")
    lr = optim.lr_at(progress.step, run.data.num_steps, config.optimizer.lr, config.schedule)
    batches, totals = run.batches.at(progress.step)
    try:
        result = train_step(
            topology, run.policy(state.model), state.optimizer, run.objective, config.objective,
            batches, totals, lr=lr, max_grad_norm=config.train.max_grad_norm,
            requests=lambda: (stop.is_set, stop.wants_save or saver.is_time(), saver.has_ended()),
        )  # fmt: skip
    except TrainingDiverged as exc:
        advice = "lower optimizer.lr under another run.name, or look at its rows"
        rows = ", ".join(run.batches.places(progress.step))
        raise TrainingDiverged(f"step {step}: {exc}; {advice}: {rows}") from exc
    state.count_skips(result.skipped)
    num_sequences = order.size_of(progress.step)
    progress.advance(num_sequences, result.tokens, result.supervised_tokens)
    epoch = order.num_epochs(step)
    progress.epoch = int(epoch)
    if state.ema and not result.skipped:
        state.ema.update(step)
    run.metrics.step(
        progress, result, lr=lr, epoch=epoch, memory_gb=topology.memory_gb(),
        facts=run.batches.facts,
    )  # fmt: skip
    return result


def evaluate_if_due(run: Run, at_the_end: bool = False) -> bool:
    """Evaluate, and answer the sample prompts, if due after this step and not on record yet.

    Return whether a request to stop ended it early.
    """
    settings, directory, topology = run.config.evaluation, run.directory, run.topology
    step, rows = run.state.progress.step, run.data.eval
    evaluates = at_the_end or due(step, settings.every_steps)
    samples = at_the_end or due(step, settings.sample_every_steps)
    if evaluates and rows and step not in topology.on_main(directory.logs.eval_losses):
        with run.state.averaged():
            values = run.evaluate()
        if values is None:
            return True
        run.metrics.evaluation(step, values)
    samples = samples and bool(settings.sample_prompts)
    if samples and not topology.on_main(lambda: directory.logs.has_samples(step)):
        if topology.any(run.stop.is_set):
            return True
        run.sample()
    return False


def due(step: int, every: int | None) -> bool:
    """Tell whether something that happens every N steps happens after this one."""
    return every is not None and step > 0 and step % every == 0


# --------------------------------------------------------------------------------------- finish


def finish(run: Run, untrained: dict[str, float | str]) -> None:
    """Export the model, open the export and compare, and only then call the run complete."""
    run.stop.at_once()
    run.topology.watchdog.pause(EXPORT)
    state, step = run.state, run.state.progress.step
    exported, kind = run.best.restore(state, run.log)
    if state.ema:
        state.ema.put_in()
        kind = kind.replace("weights", "averaged weights")
    run.require_changed(untrained)
    export = run.save_export()
    state.release()  # opening the export takes the memory of model and optimizer
    run.topology.release()
    reason = f"the {kind}, of step {exported}, exported and verified"
    if step < run.data.num_steps:
        why = run.best.stalled
        reason = f"stopped early, of {run.data.num_steps} steps, because {why}; {reason}"
    run.complete(export, step, reason, exported)
