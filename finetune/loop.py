"""One run, from top to bottom: build, resume, loop, finish."""

from collections.abc import Iterator
from typing import Any

import torch

from finetune import config as configs
from finetune import places, preflight
from finetune import run as runs
from finetune.config import Config
from finetune.config.choices import ADAPTER_INITS
from finetune.engine import optim
from finetune.engine.checkpoint import contents, folder
from finetune.engine.checkpoint import resume as resumption
from finetune.engine.ema import Ema
from finetune.engine.state import TrainState
from finetune.engine.step import StepResult, evaluate, train_step, try_pass
from finetune.errors import ExportError, Preempted, TrainingDiverged
from finetune.export.verify import probe_logits
from finetune.models import adapters, attention_probe, base_identity, head, parameters
from finetune.models import build as models
from finetune.run import Run
from finetune.survival.preemption import StopFlag

EVA_STEPS = 8  # steps whose inputs adapter.init: eva looks at


def run(config: Config, check_only: bool, stop: StopFlag) -> None:
    """One attempt at a run. Until it opens its directory it writes nothing but the token cache."""
    stop.raises()
    with runs.opened(config, check_only, stop) as run:
        if not check_only and run.is_complete():
            return
        run.log(preflight.summary(run.config, run.topology, run.data))
        if check_only:
            run.directory.check(run.config)  # last: what is wrong with the data is of more use
            return
        build(run)
        untrained = parameters.fingerprints(run.topology.unwrap(run.state.model), run.topology.local_shard)
        run.lock()
        run.open_directory(resumed_from=resume(run))
        loop(run)
        finish(run, untrained)


# ---------------------------------------------------------------------------------------- build


def build(run: Run) -> None:
    """Load the model, share it between the processes with its optimizer, and check its attention and its head."""
    config, topology, data = run.config, run.topology, run.data

    def first_inputs() -> Iterator[dict[str, Any]]:
        for number in range(min(EVA_STEPS, data.num_steps)):
            yield from (batch.to(topology.device).inputs for batch in data.train.of_all().at(number))

    # One process reads the weights; `prepare` sends each of the others its part. Quantised ones cannot be sent.
    with_weights = topology.is_main or config.adapter.kind == "qlora"
    bare, base = topology.on_every(lambda: models.build(
        config, data.model_config, data.tokenizer, attention=data.attention, precision=topology.precision,
        new_token_ids=data.new_token_ids, device=topology.device, first_inputs=first_inputs, with_weights=with_weights,
    ))  # fmt: skip
    facts = topology.on_main(lambda: models.facts(bare, base))
    accumulation_steps = configs.accumulation_steps(config, topology.num_data)
    model, optimizer = topology.prepare(
        bare, lambda shared: optim.build(shared, config.optimizer, config.trains_in_16_bits, config.run.seed),
        max_norm=config.train.max_grad_norm, accumulation_steps=accumulation_steps, micro_batch_size=config.micro_batch_size,
    )  # fmt: skip
    attention_probe.check(model, base, data.attention, topology.device, topology.precision)
    if why := head.check(model, base, topology.device, topology.precision):
        run.log(f"note: all logits are held in memory at once, because {why}")
    if run.reserved is not None:
        try_pass(
            topology, run.policy(model), run.objective, config.objective, data.train.largest(),
            reserved=run.reserved, num_passes=min(2, accumulation_steps),
        )  # fmt: skip
    torch.manual_seed(config.run.seed + topology.rank)  # dropout differs between processes
    decay = config.train.ema_decay
    ema = None if decay is None else Ema(topology.unwrap(model), decay)
    run.state = TrainState(model, optimizer, facts, ema)


def resume(run: Run) -> int | None:
    """Restore the newest valid checkpoint of this run, if there is one; return its step."""
    root, topology, state = run.directory.checkpoints, run.topology, run.state
    topology.on_main(lambda: folder.sweep(root))
    found, damaged = topology.on_main(lambda: resumption.find(root, run.storage, run.data.num_steps))
    if found is None:
        topology.on_main(run.directory.require_no_model)
        if run.directory.outcome():
            run.log(f"no checkpoint in {root}: starting at step 1")
        return None
    resumption.require_same_run(found, run.config, run.identity(), base_identity.usual(run.data.model_config))
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
    """Step, log, evaluate, save; until the last step, or nothing improves, or the machine is taken away."""
    config, topology, stop, state, metrics, saver = (
        run.config, run.topology, run.stop, run.state, run.metrics, run.saver
    )  # fmt: skip
    progress, num_steps = state.progress, run.data.num_steps
    stop.only_note()
    must_stop = evaluate_if_due(run)  # the attempt before may have had no time for it
    best = run.best
    best.fetch(run.storage)
    best.update(progress.step)
    while progress.step < num_steps and not best.stalled and not must_stop:
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
            ends = is_last or must_stop or best.stalled or best.step == progress.step
            if ends or time_to_save or due(progress.step, config.checkpoint.every_steps):
                saver.save(state, best.step, seconds_left=stop.save_seconds() if must_stop else None)
                stop.wants_save = False
    if best.stalled:
        metrics.flush()
    must_stop = must_stop or evaluate_if_due(run, at_the_end=True)
    saver.settle()
    if topology.any(must_stop or stop.is_set):
        saver.require(progress.step)
        reason = stop.reason or "another process"
        raise Preempted(f"{reason} at step {progress.step}; saved, run the same command again")


def one_step(run: Run) -> StepResult:
    """Make the next step of the order and log it; name the rows of one that diverged."""
    config, topology, data, state = run.config, run.topology, run.data, run.state
    progress, stop, saver = state.progress, run.stop, run.saver
    step = progress.step + 1
    topology.watchdog.heartbeat(f"step {step}")
    lr = optim.lr_at(progress.step, data.num_steps, config.optimizer.lr, config.schedule)
    batches, totals = run.batches.at(progress.step)
    try:
        result = train_step(
            topology, run.policy(state.model), state.optimizer, run.objective, config.objective, batches, totals,
            lr=lr, max_grad_norm=config.train.max_grad_norm,
            requests=lambda: (stop.is_set, stop.wants_save or saver.is_time(), saver.has_ended()),
        )  # fmt: skip
        state.count_skips(result.skipped)
    except TrainingDiverged as exc:
        rows = ", ".join(data.train.places(progress.step))
        raise TrainingDiverged(
            f"step {step}: {exc}; lower optimizer.lr under another run.name, or look at its rows: {rows}"
        ) from exc
    progress.advance(len(data.train.of_step(progress.step)), result.tokens, result.supervised_tokens)
    progress.epoch = step // data.train.steps_per_epoch
    if state.ema and not result.skipped:
        state.ema.update(step)
    epoch = step / data.train.steps_per_epoch
    run.metrics.step(progress, result, lr=lr, epoch=epoch, memory_gb=topology.memory_gb())
    return result


def evaluate_if_due(run: Run, at_the_end: bool = False) -> bool:
    """Evaluate, and answer the sample prompts, where that is due after this step and not on record yet.

    Return whether a request to stop ended it early.
    """
    settings, directory, topology, data = run.config.evaluation, run.directory, run.topology, run.data
    step = run.state.progress.step
    wants_values = at_the_end or due(step, settings.every_steps)
    wants_samples = bool(settings.sample_prompts) and (at_the_end or due(step, settings.sample_every_steps))
    if wants_values and data.eval and step not in topology.on_main(directory.eval_losses):
        with run.state.averaged():
            values = evaluate(
                topology, run.policy(run.state.model), run.objective, run.config.objective,
                data.eval.epoch(), data.eval.all_totals(), lambda: run.stop.is_set,
            )  # fmt: skip
        if values is None:
            return True
        run.metrics.evaluation(step, values)
    if wants_samples and not topology.on_main(lambda: directory.has_samples(step)):
        if topology.any(run.stop.is_set):
            return True
        run.sample()
    return False


def due(step: int, every: int | None) -> bool:
    """Whether something that happens every N steps happens after this one."""
    return every is not None and step > 0 and step % every == 0


# --------------------------------------------------------------------------------------- finish


def finish(run: Run, untrained: dict[str, float | str]) -> None:
    """Export what was trained, open the export and compare, and only then call the run complete."""
    run.stop.at_once()
    run.topology.watchdog.pause("the export")
    config, topology, state, target = run.config, run.topology, run.state, run.directory.model
    step, num_steps = state.progress.step, run.data.num_steps
    exported = run.best.restore(state, run.log)
    if state.ema:
        state.ema.put_in()
    require_changed(run, untrained)
    bare, is_adapter = topology.unwrap(state.model), config.adapter.kind != "full"
    if is_adapter:
        adapters.round_to_base(bare)
    weights = topology.full_weights(state.model, trained_only=is_adapter)
    if is_adapter:
        weights = adapters.in_base_dtype(bare, weights)
    logits = topology.on_every(lambda: probe_logits(bare, topology.device))
    writing = run.export()
    topology.on_main(lambda: writing.save(
        bare, weights, logits, run.data.tokenizer,
        precision=topology.precision, device=topology.device, probe_dtype=topology.probe_dtype,
    ))  # fmt: skip
    bare = None
    state.release()
    topology.release()
    kind = "the weights of the best evaluation" if config.evaluation.export_best else "the last weights"
    if config.train.ema_decay is not None:
        kind = kind.replace("weights", "averaged weights")
    reason = f"{kind}, of step {exported}, exported and verified"
    if step < num_steps:
        reason = f"stopped early, of {num_steps} steps, because the evaluation loss stopped improving; {reason}"
    topology.on_main(lambda: run.complete(writing.publish, step, reason, exported))
    run.log(f"complete at step {step}: {reason}: {target}")
    if run.objective.has_turns:
        run.log(f"chat with it: {places.command()} chat --model {target}")


def require_changed(run: Run, untrained: dict[str, float | str]) -> None:
    """Raise ExportError if training has changed no weight; name those that it has not changed."""
    bare, step, adapter = run.topology.unwrap(run.state.model), run.state.progress.step, run.config.adapter
    now = parameters.fingerprints(bare, run.topology.local_shard)
    changed = run.topology.union({name for name in now if now[name] != untrained[name]})
    unchanged, num_trained = parameters.unchanged(bare, changed)
    if len(unchanged) == num_trained:
        raise ExportError(f"no weight changed in {step} steps; is optimizer.lr too small for model.dtype?")
    if step == 1 and adapter.kind != "full" and adapter.path is None and ADAPTER_INITS[adapter.init].leaves_model:
        # The other factor starts at 0, so that their first gradient is 0.
        unchanged = [name for name in unchanged if "lora_A" not in name and "lora_embedding_B" not in name]
    if unchanged:
        run.log(f"note: {len(unchanged)} of {num_trained} weight tensors did not change, such as {unchanged[0]}")
