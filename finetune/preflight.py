"""Everything that can be known before weights are loaded: rows -> sequences in a plan, checked, and
said in words.
"""

import contextlib
import sys
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from finetune import extras, own_code
from finetune.config import (
    Config,
    Lora,
    accumulation_steps,
    base,
    code_identity,
    own_codes,
    usual_lr,
)
from finetune.config import fields as config_fields
from finetune.data import batches, examples, order, readers, rows, templates, tokens
from finetune.engine import optim, trackers
from finetune.engine.topology import Topology
from finetune.errors import ConfigError, DataError, ModelError
from finetune.export.publish import rehearse
from finetune.export.save import Base
from finetune.models import (
    adapters,
    attention_choice,
    base_identity,
    head,
    load,
    parameters,
    recompute,
)
from finetune.objectives import Own, chosen

SHOWN_CHARACTERS = 600
SHOWN_NAMES = 10
MAX_EVAL_OVERLAP = (
    0.1  # part of the evaluation rows that may be training rows too; data sets in use have a few
)
FEW_STEPS = 20


@dataclass(frozen=True)
class Data:
    """What will be trained, and in which order."""

    tokenizer: Any
    template: templates.Template
    model_config: Any
    attention: str
    train: batches.Batches
    eval: batches.Batches | None
    num_steps: int
    new_token_ids: list[int]
    sources: readers.Sources
    num_eval_known: int
    """Evaluation examples that are also trained on."""
    identity: dict[str, Any]
    """What a resumption must find again: fingerprints, and the fields of `model_config` that change
    the model's function.
    """
    format: str
    num_rows: int
    """Training rows there are, of which data.max_rows may take a part."""


def prepare(config: Config, topology: Topology, date: str | None = None) -> Data:
    """Rows -> sequences in a plan. Raises UserError for errors in rows, template or tokenizer.

    `date`: of the run's first start, as 2026-11-26, for templates that write it; None: today's.
    """
    wanted, objective = config.data, chosen(config.objective)
    _require_packages(config)
    topology.on_main(lambda: trackers.check(config.tracking.trackers, config.tracking.wandb_mode))
    sources, format = _checked_rows(wanted, topology)  # before anything is fetched from the Hub
    model_config = load.load_config(
        config.model
    )  # first: transformers reads it for the tokenizer, too
    tokenizer = load.load_tokenizer(config.model)
    load.check_config_vocabulary(model_config, tokenizer, config.model)
    architecture = base_identity.architecture(
        model_config
    )  # now: building completes a config, on some processes only
    kernel = _attention(config, model_config, topology)
    template = _template(wanted, format, tokenizer, date)
    options = tokens.Options(
        wanted.format, wanted.columns, wanted.text_unit, wanted.system_prompt,
        objective.supervises(wanted.loss_on), wanted.max_length, wanted.truncation,
        _positions(model_config),
    )  # fmt: skip
    train, evals, known, num_rows = _examples(config, sources, template, tokenizer, options)
    template = replace(template, learn_opening=train.learn_opening)
    kept = None
    if objective.has_turns:
        kept = template = replace(
            template, example=tokens.first_that_fits(sources.train, template, options)
        )
    of_base = Base(config.model.path, config.model.revision, config.model.trust_remote_code)
    topology.on_main(lambda: rehearse(tokenizer, model_config, of_base, kept, wanted.system_prompt))

    plan, eval_plan = _planned(
        config,
        topology,
        train,
        evals,
        attention_choice.is_padded(kernel),
        tokenizer.pad_token_id or 0,
    )
    num_steps = min(
        plan.steps_per_epoch * config.train.epochs, config.train.max_steps or sys.maxsize
    )
    check_lengths(train, config, model_config, num_steps)
    if isinstance(objective, Own):
        objective.rehearse(
            plan.at(0)[0], config.objective, has_adapters=config.adapter.kind != "full"
        )
    for prompt in config.evaluation.sample_prompts:
        if not tokens.encode_prompt(
            templates.sample_prompt(kept, prompt, wanted.system_prompt), tokenizer
        ):
            raise ConfigError(f"evaluation.sample_prompts: {prompt!r} has no tokens; remove it")
    identity = {
        "training data": plan.fingerprint, "evaluation data": eval_plan.fingerprint if eval_plan else "none",
        "tokenizer": tokens.tokenizer_fingerprint(tokenizer), "template": template.fingerprint,
        "date in the template": template.date or "none", "model": architecture, **code_identity(config),
    }  # fmt: skip
    new_ids = tokenizer.convert_tokens_to_ids(config.model.new_tokens)
    return Data(
        tokenizer, template, model_config, kernel, plan, eval_plan, num_steps, new_ids, sources, known, identity, format, num_rows
    )  # fmt: skip


def _require_packages(config: Config) -> None:
    """Raise ConfigError for a package that the config needs and this environment lacks."""
    if config.adapter.kind == "qlora":
        extras.require("bitsandbytes", "adapter.kind: qlora")
    if optim.needs_bitsandbytes(config.optimizer.kind):
        extras.require("bitsandbytes", f"optimizer.kind: {config.optimizer.kind}")


def _checked_rows(wanted: config_fields.Data, topology: Topology) -> tuple[readers.Sources, str]:
    """The files to read, and the format of their rows. Raises UserError for files and rows that are
    wrong.
    """
    sources = readers.sources(wanted.train, wanted.eval)
    files = [*sources.train, *sources.eval]
    if wanted.text_unit != "line" and not any(map(readers.is_text, files)):
        raise ConfigError("data.text_unit: would be ignored: no source is a .txt file; remove it")
    format: str = wanted.format
    if format == "auto" or own_code.is_own(format):
        format = rows.detect_format(files, wanted.text_unit, wanted.columns, format=format)
    groups = [list(names) for names in (sources.train, sources.eval) if names]
    topology.on_main(
        lambda: rows.check(
            groups, wanted.format, wanted.columns, wanted.text_unit, wanted.system_prompt
        )
    )
    return sources, format


def _attention(config: Config, model_config: Any, topology: Topology) -> str:
    """The attention kernel. Raises UserError for settings that do not fit the model."""
    # Of a base on the Hub; a folder's own settings were checked with the config.
    for problem in base.settled(config, model_config.to_dict())[1]:
        raise ModelError(problem)
    kernel = attention_choice.choose(
        config.model.attention, load.model_class(model_config), model_config, topology.device, topology.precision,
        topology.parallel.num_context,
    )  # fmt: skip
    if config.data.packing and attention_choice.is_padded(kernel):
        raise ConfigError(
            f"data.packing: {model_config.model_type} can only train padded batches ({kernel}); "
            "set it to false"
        )
    return kernel


def _template(
    wanted: config_fields.Data, format: str, tokenizer: Any, date: str | None
) -> templates.Template:
    if format == "text" and (wanted.template != "auto" or wanted.system_prompt is not None):
        raise ConfigError(
            "data.template, data.system_prompt: would be ignored: rows of text have no turns; "
            "remove them"
        )
    return templates.load(
        wanted.template,
        format,
        tokenizer.chat_template,
        tokenizer.special_tokens_map,
        tokenizer.get_added_vocab(),
        date,
    )


def _examples(
    config: Config,
    sources: readers.Sources,
    template: templates.Template,
    tokenizer: Any,
    options: tokens.Options,
) -> tuple[Any, Any, int, int]:
    """What is trained on, what is held out (or None), how much of that is trained on all the same,
    and the rows there are.
    """
    wanted, seed = config.data, config.run.seed
    train = examples.prepare(sources.train, template, tokenizer, options, config.cache_dir)
    asked = replace(template, learn_opening=train.learn_opening)
    evals = (
        examples.prepare(sources.eval, asked, tokenizer, options, config.cache_dir)
        if sources.eval
        else None
    )
    if evals and evals.learn_opening != train.learn_opening:
        raise DataError(
            f"data.eval: some of its answers do not begin with {template.opening!r}, which the "
            "template puts before every answer "
            "of data.train; evaluation rows have thoughts that no training row has"
        )
    num_rows = train.num_rows
    if wanted.max_rows is not None:
        train = examples.draw(train, wanted.max_rows, seed)
    if wanted.eval_fraction:
        train, evals = examples.hold_out(train, wanted.eval_fraction, seed)
    known = examples.num_trained_on(evals, train) if evals else 0
    if evals and known > MAX_EVAL_OVERLAP * len(evals):
        raise DataError(
            f"data.eval: {known:,} of its {len(evals):,} examples are also trained on, so it would "
            "measure memorisation; "
            "remove them from one of the two"
        )
    return train, evals, known, num_rows


def _planned(
    config: Config, topology: Topology, train: Any, evals: Any, padded: bool, pad_id: int
) -> tuple[batches.Batches, batches.Batches | None]:
    """The batches of training and of evaluation."""
    wanted, seed = config.data, config.run.seed

    def batched(
        examples: Any, global_size: int, micro_size: int, group_by_length: bool
    ) -> batches.Batches:
        return batches.Batches(
            order.Sequences(examples, wanted.packing, wanted.max_length, seed), seed=seed,
            global_batch_size=global_size, micro_batch_size=micro_size, group_by_length=group_by_length,
            rank=topology.data_rank, num_processes=topology.num_data, padded=padded, pad_id=pad_id,
        )  # fmt: skip

    at_once = config.evaluation.micro_batch_size or config.micro_batch_size
    plan = batched(
        train, config.train.global_batch_size, config.micro_batch_size, wanted.group_by_length
    )
    return plan, batched(evals, at_once * topology.num_data, at_once, True) if evals else None


def summary(config: Config, topology: Topology, data: Data) -> str:
    """The run in a dozen lines, and its first example with what is learned in [[brackets]].

    Raises ModelError if the architecture, its vocabulary or its adapters cannot be.
    """
    skeleton = load.skeleton(
        config.model, data.model_config, data.tokenizer, data.attention if attention_choice.is_padded(data.attention) else attention_choice.DOCUMENTS
    )  # fmt: skip
    load.check_shapes(skeleton)
    load.check_weights(skeleton, config.model)
    recompute.chosen(skeleton, config.train.gradient_checkpointing)
    adapted = adapters.apply(
        skeleton, config.adapter, config.model, new_token_ids=data.new_token_ids
    )
    trainable, total = parameters.count(adapted)
    _check_rates(config, skeleton, data.num_steps)
    name = config.model.path or f"{data.model_config.model_type} from random weights"
    lines = [
        f"model       {name}: {total:,} parameters, {trainable:,} of them train "
        f"({trainable / total:.2%}, {config.adapter.kind})",
        f"topology    {topology.name}, {_counted(topology.num_processes, 'process')} on "
        f"{topology.device.type}, {topology.precision}, attention {data.attention}",
        *_data_lines(config, topology, data),
        *_file_lines(config, data),
    ]
    _, all_logits = head.probe(skeleton)
    if all_logits:
        lines.append(f"note        all logits are held in memory at once: {all_logits}")
    notes = (
        *data.sources.notes,
        *_surprises(config, data),
        *_template_notes(config, data),
        *_without_effect(config, data),
    )
    lines += [f"note        {note}" for note in notes]
    lines += [
        "first example, what is learned in [[ ]]:",
        _marked(data.train.sequences.examples, data.tokenizer),
    ]
    return "\n".join(lines)


def _data_lines(config: Config, topology: Topology, data: Data) -> list[str]:
    """What is trained, in how many steps, and what is held out."""
    train, examples = data.train.sequences, data.train.sequences.examples
    supervised = examples.num_supervised_tokens
    lines = [
        f"data        {_rows(config, data)} -> {_counted(len(examples), 'example')} -> "
        f"{_counted(len(train), 'sequence')} "
        f"of at most {config.data.max_length} tokens" + _changed(config, examples),
        f"tokens      {examples.lengths.sum():,}, {supervised:,} of them learned; an example has "
        f"{_quartiles(examples.lengths)}",
        f"template    {data.template.name}, objective "
        f"{own_code.without_folder(config.objective.kind)}",
        f"steps       {_counted(data.num_steps, 'step')}, each of {config.train.global_batch_size} "
        "sequences "
        f"({config.micro_batch_size} at once x {accumulation_steps(config, topology.num_data)} x "
        f"{_counted(topology.num_data, 'process')})"
        + (
            f", each shared by {topology.parallel.num_context}"
            if topology.parallel.num_context > 1
            else ""
        )
        + (
            f"; {data.train.steps_per_epoch * config.train.epochs:,} without train.max_steps"
            if _is_cut(config, data)
            else ""
        ),
    ]
    lines += _methods(config, base.quantization(data.model_config.to_dict()) is not None)
    if config.data.packing:
        lines.append(
            f"packing     {train.lengths.sum() / (len(train) * config.data.max_length):.1%} full"
        )
    if data.eval:
        lines.append(
            f"evaluation  {_counted(len(data.eval.sequences.examples), 'example')}"
            + (" held out" if config.data.eval_fraction else "")
            + (
                f"; {data.num_eval_known:,} of them are also trained on"
                if data.num_eval_known
                else ""
            )
            + (_of_eval_files(config, data.eval.sequences.examples) if data.sources.eval else "")
        )
    return lines


def _rows(config: Config, data: Data) -> str:
    """What became of every training row; the numbers add up."""
    train = data.train.sequences.examples
    held = (
        data.eval.sequences.examples.num_distinct_rows
        if data.eval and config.data.eval_fraction
        else 0
    )
    trained = train.num_distinct_rows
    left_out = data.num_rows - train.num_dropped - held - trained
    fates = (
        (train.num_dropped, "dropped"), (left_out, "left out by data.max_rows"), (held, "held out"), (trained, "trained on"),
    )  # fmt: skip
    told = [f"{count:,} {fate}" for count, fate in fates if count]
    return _counted(data.num_rows, "row") + (f": {', '.join(told)}" if len(told) > 1 else "")


def _changed(config: Config, examples: Any) -> str:
    """How many rows were cut or split, and how many empty ones were skipped."""
    how = "split into several examples" if config.data.truncation == "split" else "cut"
    return (
        (f"; {examples.num_truncated:,} {how}" if examples.num_truncated else "")
        + (f"; {_counted(examples.num_empty, 'empty row')} skipped" if examples.num_empty else "")
        + (
            f"; {_counted(examples.num_skipped, 'row')} skipped by data.format"
            if examples.num_skipped
            else ""
        )
    )


def _of_eval_files(config: Config, examples: Any) -> str:
    dropped = f"; {examples.num_dropped:,} dropped" if examples.num_dropped else ""
    return dropped + _changed(config, examples)


def _file_lines(config: Config, data: Data) -> list[str]:
    """The user's own code, the files, and their columns that are not read."""
    examples = data.train.sequences.examples
    lines = [
        f"own code    {code}, {key}, sha256 {code.sha256[:16]}"
        for key, code in own_codes(config).items()
    ]
    lines += [f"files       {_files(list(data.sources.train))}"]
    if data.sources.eval:
        lines.append(f"eval files  {_files(list(data.sources.eval))}")
    lines += [f"not read    {_unread(examples)}"] if examples.unread else []
    if data.sources.eval and (unread := data.eval and _unread(data.eval.sequences.examples)):
        lines.append(f"not read    in data.eval: {unread}")
    return lines


def _unread(examples: Any) -> str:
    """Columns, and keys of messages, that are not read, with the number of rows that have them."""
    listed = [
        f"{readers.short(name)} ({_counted(count, 'row')})"
        for name, count in sorted(examples.unread.items())
    ]
    more = f" and {len(listed) - SHOWN_NAMES} more" if len(listed) > SHOWN_NAMES else ""
    return f"columns {', '.join(listed[:SHOWN_NAMES])}{more}" if listed else ""


def _is_cut(config: Config, data: Data) -> bool:
    return data.num_steps < data.train.steps_per_epoch * config.train.epochs


def _check_rates(config: Config, skeleton: Any, num_steps: int) -> None:
    """Raise ConfigError for learning rates that nothing would have."""
    if config.optimizer.embedding_lr is not None and not adapters.trains_embedding_and_head(
        skeleton
    ):
        raise ConfigError(
            "optimizer.embedding_lr: would be ignored: the embedding and the head are frozen; "
            "remove it"
        )
    fastest = num_steps**-0.5
    if config.optimizer.kind == "adafactor" and config.optimizer.lr > fastest:
        raise ConfigError(
            "optimizer.lr: adafactor never steps by more than 1 / sqrt(step), so the schedule of "
            f"{config.optimizer.lr:g} would be "
            f"overridden in a run of {num_steps} steps; take at most {fastest:.2g}"
        )


def _surprises(config: Config, data: Data) -> Iterator[str]:
    """What is allowed and may yet surprise."""
    num_steps = data.num_steps
    if num_steps < FEW_STEPS:
        more = "raise train.max_steps" if num_steps == config.train.max_steps else "lower train.global_batch_size or raise train.epochs"  # fmt: skip
        unpacked = (
            ", or set data.packing to false (a pack is one sequence)" if config.data.packing else ""
        )
        yield f"{_counted(num_steps, 'step')} will change the model very little; {more}{unpacked}"
    if forgotten := base.forgotten_losses(data.model_config.to_dict()):
        yield forgotten
    adapter = config.adapter
    if isinstance(adapter, Lora) and adapter.bias != "none":
        yield f"adapter.bias: {adapter.bias} changes biases of the base: with the adapter switched off, the model is not the base"
    if torch.backends.mps.is_available() and not torch.cuda.is_available():
        yield "Apple GPUs (mps) are not supported yet; this run uses the CPU"


def _template_notes(config: Config, data: Data) -> Iterator[str]:
    """What the template does that its user may not know."""
    template = data.template
    if (
        chosen(config.objective).has_turns
        and data.tokenizer.chat_template
        and template.name != "chat"
    ):
        with contextlib.suppress(
            DataError, templates.BrokenTemplate
        ):  # the model's own need not be usable
            own = templates.load(
                "chat",
                "messages",
                data.tokenizer.chat_template,
                template.special_tokens,
                {},
                template.date,
            )
            if own.prompt(own.probe) != template.prompt(own.probe):
                yield (
                    f"the model has a chat template of its own, which {template.name} replaces, "
                    "here and in the export; "
                    "data.template: chat keeps it"
                )
    if template.date is not None:
        yield (
            f"the template writes the date: {template.date}, that of the first start, stays the "
            "same for the whole run"
        )
    if template.opening and chosen(config.objective).has_turns:
        yield (
            f"the template puts {template.opening!r} before an answer; "
            + ("some rows begin otherwise, so the model learns to write it" if template.learn_opening else "it ends the prompt, and is not learned")
        )  # fmt: skip


def _without_effect(config: Config, data: Data) -> Iterator[str]:
    """Settings that do nothing in this run, as the rows turned out; those that never could are
    errors of the config.
    """
    train, checkpoint, evaluation, wanted = (
        config.train,
        config.checkpoint,
        config.evaluation,
        config.data,
    )
    steps = data.num_steps
    here = f"of {_counted(steps, 'step')}"
    natural = data.train.steps_per_epoch * train.epochs
    if train.max_steps is not None and train.max_steps > natural:
        yield f"train.max_steps: {train.max_steps:,} has no effect: train.epochs: {train.epochs} ends after {_counted(natural, 'step')}"
    rows = data.num_rows
    if wanted.max_rows is not None and wanted.max_rows >= rows:
        yield f"data.max_rows: {wanted.max_rows:,} has no effect: there are {_counted(rows, 'row')}"
    if evaluation.every_steps is not None:
        every, at_the_end = evaluation.every_steps, "the only evaluation is at the end"
        if every >= steps:
            yield f"evaluation.every_steps: {every:,} {here}: {at_the_end}"
        if evaluation.export_best and every >= steps:
            yield f"evaluation.export_best has no effect: {at_the_end}; lower evaluation.every_steps"
        if evaluation.patience is not None and (evaluation.patience + 1) * every >= steps:
            yield (
                f"evaluation.patience: {evaluation.patience:,} can stop nothing {here}: the first "
                "time would be after step "
                f"{(evaluation.patience + 1) * every:,}; lower it or evaluation.every_steps"
            )
    sampled = evaluation.sample_every_steps
    if sampled is not None and sampled >= steps:
        yield f"evaluation.sample_every_steps: {sampled:,} {here}: sample_prompts are answered at the end only"
    saved = checkpoint.every_steps
    if saved is not None and saved >= steps:
        yield f"checkpoint.every_steps: {saved:,} {here}: by steps, only the end is saved"
    num_saves = 1 if saved is None else -(-steps // saved)
    if checkpoint.every_minutes is None and checkpoint.keep_last > max(
        num_saves, config_fields.Checkpoint().keep_last
    ):
        yield f"checkpoint.keep_last: {checkpoint.keep_last:,} has no effect: there are {_counted(num_saves, 'checkpoint')}"
    if config.tracking.log_every_steps > steps:
        yield f"tracking.log_every_steps: {config.tracking.log_every_steps:,} {here}: only the last step is logged"
    sequences = data.train.sequences
    if wanted.packing and len(sequences) == len(sequences.examples):
        yield "data.packing packs nothing: no two examples fit into data.max_length together"
    if wanted.group_by_length and not data.train.padded:
        yield f"data.group_by_length saves nothing: with attention {data.attention} nothing is padded"
    if wanted.group_by_length and sequences.lengths.min() == sequences.lengths.max():
        yield "data.group_by_length has no effect: all examples have the same length"
    if wanted.loss_on == "last_turn" and data.format != "messages":
        yield f"data.loss_on: last_turn is the same as completion here: rows of format {data.format} have one answer"
    if config.schedule.kind == "wsd" and config.schedule.decay_fraction * steps <= 1:
        yield f"schedule.decay_fraction: {config.schedule.decay_fraction:g} {here} is the last step alone"


def _methods(config: Config, is_quantized: bool) -> list[str]:
    """The method, and what else the run does."""
    adapter, optimizer, train, evaluation = (
        config.adapter,
        config.optimizer,
        config.train,
        config.evaluation,
    )
    how = []
    if adapter.kind == "qlora":
        how.append(
            adapter.quantization
            + (
                ", doubly quantised"
                if adapter.double_quantization and adapter.quantization != "int8"
                else ""
            )
            + (" (the base is saved so)" if is_quantized else "")
        )
    if adapter.kind != "full" and adapter.path:
        how.append(f"going on from {adapter.path}")
    elif adapter.kind != "full":
        how.append(f"r {adapter.r}, alpha {adapter.alpha:g}, starting by {adapter.init}")
    usual = " (usual)" if optimizer.lr == usual_lr(optimizer.kind, adapter.kind) else ""
    how.append(f"{optimizer.kind}, lr {optimizer.lr:g}{usual}, {config.schedule.kind}")
    besides = [
        f"averages of the weights ({train.ema_decay})" if train.ema_decay else "",
        f"noise on embeddings ({train.neftune_alpha:g})" if train.neftune_alpha else "",
        f"stops after {_counted(evaluation.patience, 'evaluation')} without a new best"
        if evaluation.patience
        else "",
        "exports the best evaluation" if evaluation.export_best else "",
        f"{_counted(len(evaluation.sample_prompts), 'sample')}"
        if evaluation.sample_prompts
        else "",
        *config.tracking.trackers,
    ]
    lines = [f"method      {'; '.join(how)}"]
    return lines + ([f"besides     {'; '.join(filter(None, besides))}"] if any(besides) else [])


def _positions(model_config: Any) -> int | None:
    """Tokens that a sequence may have; None: as many as it likes, as models without positions, or
    with -1 of them.
    """
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    return positions if positions is not None and positions > 0 else None


def check_lengths(examples: Any, config: Config, model_config: Any, num_steps: int) -> None:
    """Raise ConfigError if the model has too few positions, or the run too few steps for its
    warm-up.
    """
    longest = int(examples.lengths.max())
    positions = _positions(model_config)
    if positions is not None and positions < longest:
        where = examples.place(int(examples.lengths.argmax()))
        raise ConfigError(
            f"data.max_length: {where} has {longest} tokens, but the model only {positions} "
            "positions "
            "(max_position_embeddings); "
            f"{tokens.fitting(longest, config.data.max_length, positions)}"
        )
    if config.schedule.warmup_steps >= num_steps:
        raise ConfigError(
            f"schedule.warmup_steps: {config.schedule.warmup_steps} of {num_steps} steps: "
            "the learning rate would never reach optimizer.lr; lower it"
        )


def _files(names: list[str]) -> str:
    listed = ", ".join(readers.describe(name) for name in names[:SHOWN_NAMES])
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return listed + more


def _counted(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"


def _quartiles(lengths: np.ndarray) -> str:
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    return (
        f"{low} to {high} tokens, half of them at most {middle}" if low < high else f"{low} tokens"
    )


def _marked(examples: Any, tokenizer: Any) -> str:
    """The first example decoded, its supervised runs in double brackets."""
    part = slice(examples.starts[0], examples.ends[0])
    ids, supervised = np.asarray(examples.input_ids[part]), np.asarray(examples.supervised[part])
    cuts = [0, *(np.flatnonzero(np.diff(supervised)) + 1), len(ids)]
    # Not run by run: some tokenizers take a space from the beginning of what they decode.
    until = [
        tokenizer.decode(ids[:cut].tolist(), clean_up_tokenization_spaces=False) for cut in cuts
    ]
    text = ""
    for start, before, after in zip(cuts, until, until[1:]):
        piece = after[len(before) :]
        text += f"[[{piece}]]" if supervised[start] else piece
    text = (
        text
        if len(text) <= SHOWN_CHARACTERS
        else f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    )
    return "\n".join(f"  | {line}" for line in text.splitlines())
