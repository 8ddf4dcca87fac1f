"""Everything that can be known before weights are loaded: rows -> sequences in a plan, checked, and said in words."""

import contextlib
import sys
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from finetune import export
from finetune.config import Config, accumulation
from finetune.config import fields as config_fields
from finetune.data import batches, readers, rows, templates, tokens
from finetune.engine import trackers
from finetune.engine.topology import Topology
from finetune.errors import ConfigError, DataError
from finetune.models import adapters, attention, bases, head, layers, load, parameters
from finetune.objectives import OBJECTIVES

SHOWN_CHARACTERS = 600
SHOWN_NAMES = 10
MAX_EVAL_OVERLAP = 0.1  # part of the evaluation rows that may be training rows too; data sets in use have a few
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
    """What a resumption must find again: fingerprints, and the fields of `model_config` that change the model's function."""


def prepare(config: Config, topology: Topology, date: str | None = None) -> Data:
    """Rows -> sequences in a plan. Raises UserError for whatever is wrong with rows, template or tokenizer.

    `date`: of the run's first start, as 2026-11-26, for templates that write it; None: today's.
    """
    wanted, seed = config.data, config.run.seed
    topology.on_main(lambda: trackers.check(config.tracking.trackers, config.tracking.wandb_mode))
    # What is wrong with files and rows is said before anything is asked of the Hub.
    sources = readers.sources(wanted.train, wanted.eval)
    files = [*sources.train, *sources.eval]
    if wanted.text_unit != "line" and not any(map(readers.is_text, files)):
        raise ConfigError("data.text_unit: would be ignored: no source is a .txt file; remove it")
    format: str = wanted.format
    if format == "auto":
        format = rows.detect_format(files, wanted.text_unit, wanted.columns)
    topology.on_main(lambda: rows.check(files, wanted.format, wanted.columns, wanted.text_unit, wanted.system_prompt))
    tokenizer, model_config = load.load_tokenizer(config.model), load.load_config(config.model)
    architecture = bases.architecture(model_config)  # now: building completes a config, on some processes only
    kernel = attention.choose(
        config.model.attention, load.model_class(model_config), model_config, topology.device, topology.precision,
        topology.wish.num_context,
    )  # fmt: skip
    if wanted.packing and attention.pads(kernel):
        raise ConfigError(
            f"data.packing: {model_config.model_type} can only train padded batches ({kernel}); set it to false"
        )

    template = _template(wanted, format, tokenizer, date)
    train, evals, known = _examples(config, sources, template, tokenizer)
    template = replace(template, learn_opening=train.learn_opening)
    kept = template if config.objective.kind != "clm" else None
    base = export.Base(config.model.path, config.model.revision, config.model.trust_remote_code)
    topology.on_main(lambda: export.rehearse(tokenizer, model_config, base, kept, wanted.system_prompt))

    def batched(examples: Any, global_size: int, micro_size: int, group_by_length: bool) -> batches.Batches:
        return batches.Batches(
            batches.Sequences(examples, wanted.packing, wanted.max_length, seed), seed=seed,
            global_batch_size=global_size, micro_batch_size=micro_size, group_by_length=group_by_length,
            rank=topology.data_rank, num_processes=topology.num_data,
            padded=attention.pads(kernel), pad_id=tokenizer.pad_token_id or 0,
        )  # fmt: skip

    at_once = config.evaluation.micro_batch_size or config.micro_batch_size
    plan = batched(train, config.train.global_batch_size, config.micro_batch_size, wanted.group_by_length)
    eval_plan = batched(evals, at_once * topology.num_data, at_once, True) if evals else None
    num_steps = min(plan.steps_per_epoch * config.train.epochs, config.train.max_steps or sys.maxsize)
    check_lengths(train, config, model_config, num_steps)
    for prompt in config.evaluation.sample_prompts:
        if not tokens.encode_prompt(templates.sample_prompt(kept, prompt, wanted.system_prompt), tokenizer):
            raise ConfigError(f"evaluation.sample_prompts: {prompt!r} has no tokens; take it out")
    identity = {
        "training data": plan.fingerprint, "evaluation data": eval_plan.fingerprint if eval_plan else "none",
        "tokenizer": tokens.tokenizer_fingerprint(tokenizer), "template": template.fingerprint,
        "date in the template": template.date or "none", "model": architecture,
    }  # fmt: skip
    new_ids = tokenizer.convert_tokens_to_ids(config.model.new_tokens)
    return Data(
        tokenizer, template, model_config, kernel, plan, eval_plan, num_steps, new_ids, sources, known, identity
    )


def _template(wanted: config_fields.Data, format: str, tokenizer: Any, date: str | None) -> templates.Template:
    if format == "text" and (wanted.template != "auto" or wanted.system_prompt is not None):
        raise ConfigError(
            "data.template, data.system_prompt: would be ignored: rows of text have no turns; remove them"
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
    config: Config, sources: readers.Sources, template: templates.Template, tokenizer: Any
) -> tuple[Any, Any, int]:
    """What is trained on, what is held out (or None), and how much of that is trained on all the same."""
    wanted, seed = config.data, config.run.seed
    options = tokens.Options(
        wanted.format, wanted.columns, wanted.text_unit, wanted.system_prompt,
        OBJECTIVES[config.objective.kind].supervises(wanted.loss_on), wanted.max_length, wanted.truncation,
    )  # fmt: skip
    train = tokens.prepare(sources.train, template, tokenizer, options, wanted.cache_dir)
    asked = replace(template, learn_opening=train.learn_opening)
    evals = tokens.prepare(sources.eval, asked, tokenizer, options, wanted.cache_dir) if sources.eval else None
    if evals and evals.learn_opening != train.learn_opening:
        raise DataError(
            f"data.eval: some of its answers do not begin with {template.opening!r}, which the template puts before every answer "
            "of data.train; rows with thoughts measure nothing where none are trained on"
        )
    if wanted.max_rows is not None:
        train = tokens.draw(train, wanted.max_rows, seed)
    if wanted.eval_fraction:
        train, evals = tokens.hold_out(train, wanted.eval_fraction, seed)
    known = tokens.num_trained_on(evals, train) if evals else 0
    if evals and known > MAX_EVAL_OVERLAP * len(evals):
        raise DataError(
            f"data.eval: {known:,} of its {len(evals):,} examples are also trained on, so it would measure memory; "
            "take them out of one of the two"
        )
    return train, evals, known


def summary(config: Config, topology: Topology, data: Data) -> str:
    """The run in a dozen lines, and its first example with what is learned in [[brackets]].

    Raises ModelError if the architecture, its vocabulary or its adapters cannot be.
    """
    skeleton = load.skeleton(
        config.model, data.model_config, data.tokenizer, data.attention if attention.pads(data.attention) else attention.NAME
    )  # fmt: skip
    load.check_shapes(skeleton)
    layers.chosen(skeleton, config.train.gradient_checkpointing)
    adapted = adapters.apply(skeleton, config.adapter, config.model, new_token_ids=data.new_token_ids)
    trainable, total = parameters.count(adapted)
    _check_rates(config, skeleton, data.num_steps)
    train, examples = data.train.sequences, data.train.sequences.examples
    supervised = examples.num_supervised_tokens
    name = config.model.path or f"{data.model_config.model_type} from random weights"
    lines = [
        f"model       {name}: {total:,} parameters, {trainable:,} of them train ({trainable / total:.2%}, {config.adapter.kind})",
        f"topology    {topology.name}, {_counted(topology.num_processes, 'process')} on {topology.device.type}, {topology.precision}, attention {data.attention}",
        f"data        {examples.num_rows:,} rows -> {_counted(len(examples), 'example')} -> {_counted(len(train), 'sequence')} of at most {config.data.max_length} tokens"
        + (f"; {examples.num_truncated} cut" if examples.num_truncated else "")
        + (f"; {examples.num_dropped} dropped" if examples.num_dropped else ""),
        f"tokens      {examples.lengths.sum():,}, {supervised:,} of them learned; an example has {_quartiles(examples.lengths)}",
        f"template    {data.template.name}, objective {config.objective.kind}",
        f"steps       {_counted(data.num_steps, 'step')}, each of {config.train.global_batch_size} sequences "
        f"({config.micro_batch_size} at once x {accumulation(config, topology.num_data)} x {_counted(topology.num_data, 'process')})"
        + (f", each shared by {topology.wish.num_context}" if topology.wish.num_context > 1 else ""),
    ]
    lines += _methods(config)
    if config.data.packing:
        lines.append(f"packing     {train.lengths.sum() / (len(train) * config.data.max_length):.1%} full")
    if data.eval:
        lines.append(
            f"evaluation  {_counted(len(data.eval.sequences.examples), 'example')}"
            + (" held out" if config.data.eval_fraction else "")
            + (f"; {data.num_eval_known:,} of them are also trained on" if data.num_eval_known else "")
        )
    lines += [f"files       {_files(list(data.sources.train))}"]
    if data.sources.eval:
        lines.append(f"eval files  {_files(list(data.sources.eval))}")
    if examples.unread:
        listed = [
            f"{readers.short(name)} ({_counted(count, 'row')})" for name, count in sorted(examples.unread.items())
        ]
        more = f" and {len(listed) - SHOWN_NAMES} more" if len(listed) > SHOWN_NAMES else ""
        lines.append(f"not read    columns {', '.join(listed[:SHOWN_NAMES])}{more}")
    _, all_logits = head.probe(skeleton)
    if all_logits:
        lines.append(f"note        all logits are held at once: {all_logits}")
    lines += [f"note        {note}" for note in data.sources.notes]
    lines += _notes(config, data.num_steps) + _template_notes(config, data)
    lines += ["first example, what is learned in [[ ]]:", _marked(examples, data.tokenizer)]
    return "\n".join(lines)


def _check_rates(config: Config, skeleton: Any, num_steps: int) -> None:
    """Raise ConfigError for learning rates that nothing would have."""
    if config.optimizer.embedding_lr is not None and not adapters.trains_ends(skeleton):
        raise ConfigError("optimizer.embedding_lr: would be ignored: neither embedding nor head trains; remove it")
    fastest = num_steps**-0.5
    if config.optimizer.kind == "adafactor" and config.optimizer.lr > fastest:
        raise ConfigError(
            f"optimizer.lr: adafactor never steps by more than 1 / sqrt(step), so the schedule of {config.optimizer.lr:g} would be "
            f"overridden in a run of {num_steps} steps; take at most {fastest:.2g}"
        )


def _notes(config: Config, num_steps: int) -> list[str]:
    """What is allowed and may yet surprise."""
    notes = []
    if num_steps < FEW_STEPS:
        more = "raise train.max_steps" if num_steps == config.train.max_steps else "lower train.global_batch_size or raise train.epochs"  # fmt: skip
        unpacked = ", or set data.packing to false (a pack is one sequence)" if config.data.packing else ""
        notes.append(f"{_counted(num_steps, 'step')} will teach next to nothing; {more}{unpacked}")
    if config.adapter.bias != "none":
        notes.append(
            f"adapter.bias: {config.adapter.bias} changes biases of the base: with the adapter switched off, the model is not the base"
        )
    return [f"note        {note}" for note in notes]


def _template_notes(config: Config, data: Data) -> list[str]:
    """What the template does that its user may not know."""
    template, notes = data.template, []
    if config.objective.kind != "clm" and data.tokenizer.chat_template and template.name != "chat":
        with contextlib.suppress(DataError):  # the model's own need not be one that can be used
            own = templates.load(
                "chat", "messages", data.tokenizer.chat_template, template.special_tokens, {}, template.date
            )
            if own.prompt(own.probe) != template.prompt(own.probe):
                notes.append(
                    f"the model has a chat template of its own, which {template.name} replaces, here and in the export; "
                    "data.template: chat keeps it"
                )
    if template.date is not None:
        notes.append(
            f"the template writes the date: {template.date}, that of the first start, is kept for the whole run"
        )
    if template.opening and config.objective.kind != "clm":
        notes.append(
            f"the template puts {template.opening!r} before an answer; "
            + ("some rows begin otherwise, so the model learns to write it" if template.learn_opening else "it ends the prompt, and is not learned")
        )  # fmt: skip
    return [f"note        {note}" for note in notes]


def _methods(config: Config) -> list[str]:
    """How it is tuned, and what is done besides."""
    adapter, optimizer, train, evaluation = config.adapter, config.optimizer, config.train, config.evaluation
    how = []
    if adapter.kind == "qlora":
        how.append(
            adapter.quantization
            + (", doubly quantised" if adapter.double_quantization and adapter.quantization != "int8" else "")
        )
    if adapter.path:
        how.append(f"going on from {adapter.path}")
    elif adapter.kind != "full":
        how.append(f"r {adapter.r}, alpha {adapter.alpha:g}, starting by {adapter.init}")
    how.append(f"{optimizer.kind}, lr {optimizer.lr:g}, {config.schedule.kind}")
    besides = [
        f"averages of the weights ({train.ema_decay})" if train.ema_decay else "",
        f"noise on embeddings ({train.neftune_alpha:g})" if train.neftune_alpha else "",
        f"stops after {_counted(evaluation.patience, 'evaluation')} that are no better" if evaluation.patience else "",
        "the best evaluation is exported" if evaluation.export_best else "",
        f"{_counted(len(evaluation.sample_prompts), 'sample')}" if evaluation.sample_prompts else "",
        *config.tracking.trackers,
    ]
    lines = [f"method      {'; '.join(how)}"]
    return lines + ([f"besides     {'; '.join(filter(None, besides))}"] if any(besides) else [])


def check_lengths(examples: Any, config: Config, model_config: Any, num_steps: int) -> None:
    """Raise ConfigError if the model has too few positions, or the run too few steps for its warm-up."""
    longest = int(examples.lengths.max())
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and 0 < positions < longest:
        where = examples.place(int(examples.lengths.argmax()))
        raise ConfigError(
            f"data.max_length: {where} has {longest} tokens, but the model only {positions} positions "
            "(max_position_embeddings); lower data.max_length and choose a data.truncation"
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
    return f"{low} to {high} tokens, half of them at most {middle}" if low < high else f"{low} tokens"


def _marked(examples: Any, tokenizer: Any) -> str:
    """The first example decoded, its supervised runs in double brackets."""
    part = slice(examples.starts[0], examples.ends[0])
    ids, supervised = np.asarray(examples.input_ids[part]), np.asarray(examples.supervised[part])
    cuts = np.flatnonzero(np.diff(supervised)) + 1
    text = ""
    for run, learned in zip(np.split(ids, cuts), supervised[[0, *cuts]]):
        piece = tokenizer.decode(run.tolist(), clean_up_tokenization_spaces=False)
        text += f"[[{piece}]]" if learned else piece
    text = (
        text
        if len(text) <= SHOWN_CHARACTERS
        else f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    )
    return "\n".join(f"  | {line}" for line in text.splitlines())
