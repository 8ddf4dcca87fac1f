"""Describe a run before it starts: model, data, steps, settings without effect, first example."""

import contextlib
import json
import shutil
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from finetune import own_code, preflight
from finetune.config import (
    Config,
    Lora,
    QLora,
    Quantized,
    accumulation_steps,
    base,
    own_codes,
    quantized,
    usual_lr,
)
from finetune.config import fields as config_fields
from finetune.data import chat_templates, readers, repeats, templates, xray
from finetune.data.examples import Examples
from finetune.data.places import short
from finetune.data.stream import StreamedExamples
from finetune.engine.topology import Topology
from finetune.errors import ConfigError, DataError
from finetune.objectives import chosen
from finetune.preflight import Data, ModelFacts
from finetune.rollouts.asked import Asked

GB = 1e9
SHOWN_CHARACTERS = 600
SHOWN_NAMES = 10
ONE_ANSWER = ("question_answer", "instruction", "prompt_completion")
"""Formats whose rows have one answer each."""
FEW_STEPS = 20
WORTH_A_FORECAST = 10_000_000  # parameters; smaller models fit into any machine's main memory


def summary(
    config: Config, topology: Topology, data: Data, model: ModelFacts, notes: list[str],
    check_only: bool = False,
) -> str:  # fmt: skip
    """Describe the run in a dozen lines, its first example, and whether it fits, how fast it is.

    The example has [[ ]] around what is supervised. On a CPU only --check forecasts, and only where
    a model is large. `notes`: those of `notes`.
    """
    name = config.model.path or f"{data.model_config.model_type} from random weights"
    total, trainable = model.num_parameters, model.num_trainable
    lines = [
        f"model       {name}: {total:,} parameters, {trainable:,} of them train "
        f"({trainable / total:.2%}, {config.adapter.kind})",
        *_teacher_line(data),
        f"topology    {topology.name}, {_counted(topology.num_processes, 'process')} on "
        f"{topology.device.type}, {topology.precision}, attention {data.attention}",
        *_data_lines(config, topology, data),
        *_file_lines(config, data),
        *([_disk_line(config, data, model)] if check_only else []),
    ]
    lines += [f"note        {note}" for note in notes]
    train = data.train.sequences
    examples = train.examples
    shown = _marked(examples.first_ones(), data.tokenizer)
    what = "first prompt:" if config.rollouts else "first example, what is learned in [[ ]]:"
    lines += [what, shown]
    on_gpu = topology.device.type == "cuda"
    if topology.is_main and (on_gpu or (check_only and total >= WORTH_A_FORECAST)):
        from finetune.forecast import outlook

        num_sequences = data.num_steps * config.train.global_batch_size
        num_tokens = num_sequences * train.num_tokens / train.num_known
        lines += outlook.lines(
            config, topology.parallel, topology.device, topology.precision, num_tokens,
            examples.quartiles()[1],
        )  # fmt: skip
    return "\n".join(lines)


def _teacher_line(data: Data) -> list[str]:
    """Say which teacher a run learns from, if its config names one."""
    if (found := data.teacher) is None:
        return []
    model, stored = found.config.model, found.config.adapter
    bits = f"{_form(stored)}, " if isinstance(stored, Quantized) else ""
    return [
        f"teacher     {model.path}: {found.num_parameters:,} parameters, frozen ({bits}"
        f"{model.dtype}, attention {found.attention})"
    ]


def _form(stored: QLora | Quantized) -> str:
    """Name a quantisation."""
    twice = stored.double_quantization and stored.quantization != "int8"
    return stored.quantization + (", doubly quantised" if twice else "")


def notes(config: Config, data: Data, model: ModelFacts, check_only: bool = False) -> list[str]:
    """Return what is allowed and may surprise: errors of --check --strict.

    Only --check searches for rows that repeat or resemble evaluation rows, and for room on the
    disk.
    """
    found = [f"all logits are held in memory at once: {model.why_all_logits}"]
    found = found if model.why_all_logits else []
    if not data.train.sequences.is_whole:
        found.append(
            "data.window_gb, train.max_steps: training starts with the rows counted here; the "
            "others are tokenised meanwhile"
        )
    columns = data.train.sequences.examples.first_ones().columns
    found += chosen(config).notes(config.objective, columns)
    found += [*data.sources.notes, *_surprises(config, data), *_template_notes(config, data)]
    found += [*_stops_without_effect(config, data), *_data_without_effect(config, data)]
    if not check_only:
        return found
    train = data.train.sequences.examples.first_ones()
    of = f", of the first {len(train):,} examples" if config.data.streaming else ""
    found += [note + of for note in repeats.notes(train)]
    if data.eval:
        evals, files = data.eval.sequences.examples.first_ones(), list(data.sources.eval)
        found += [note + of for note in repeats.overlap_notes(train, evals, files, data.options)]
    needed, _, free, where = _disk(config, data, model)
    if needed > free:
        found.append(
            f"checkpoints and the model may take {needed / GB:,.3g} GB, and {where} has "
            f"{free / GB:,.3g} GB free; lower checkpoint.keep_last, or set run.dir"
        )
    return found


def refuse(notes: list[str]) -> None:
    """Raise ConfigError that lists the notes, if there are any: --strict."""
    if notes:
        listed = "".join(f"\n  {note}" for note in notes)
        raise ConfigError(f"--strict: {_counted(len(notes), 'note')}:{listed}")


def _disk(config: Config, data: Data, model: ModelFacts) -> tuple[float, int, int, str]:
    """Return (bytes that the run may take, checkpoints at once, free bytes, of which folder)."""
    saved, checkpoint = data.num_steps, config.checkpoint
    if checkpoint.every_minutes is None:  # else there may be one after any step
        saved = (
            1 if checkpoint.every_steps is None else -(-data.num_steps // checkpoint.every_steps)
        )
    # One more than is kept, while it is written; and the best one.
    count = min(saved, checkpoint.keep_last + 1 + config.evaluation.export_best)
    needed = count * model.checkpoint_bytes + model.export_bytes
    parents = (config.run_dir, *config.run_dir.absolute().parents)
    where = next(parent for parent in parents if parent.is_dir())
    return needed, count, shutil.disk_usage(where).free, str(where)


def _disk_line(config: Config, data: Data, model: ModelFacts) -> str:
    needed, count, free, where = _disk(config, data, model)
    return (
        f"disk        {needed / GB:,.3g} GB: {_counted(count, 'checkpoint')} at most at once, of "
        f"{model.checkpoint_bytes / GB:,.3g} GB, and the model; {free / GB:,.0f} GB are free in "
        f"{where}"
    )


def _arguments(template: templates.Template) -> str:
    """List the arguments of a template, if it has some."""
    listed = ", ".join(f"{name}: {json.dumps(v)}" for name, v in template.arguments.items())
    return f" with {{{listed}}}" if listed else ""


def _weights(examples: Examples | StreamedExamples) -> str:
    """Say which weights rows give to their answers, if they give any."""
    if (found := examples.weight_range) is None:
        return ""
    least, most = found
    return f" with weights from {least:g} to {most:g}"


def _data_lines(config: Config, topology: Topology, data: Data) -> list[str]:
    """Describe what is trained, in how many steps, and what is held out."""
    train, examples = data.train.sequences, data.train.sequences.examples
    num_context, natural = topology.parallel.num_context, _natural_steps(config, data)
    lines = [
        f"data        {_rows(config, data)} -> {_counted(len(examples), 'example')} -> "
        f"{_counted(train.num_known, 'sequence')} of at most {config.data.max_length} tokens"
        + _changed(config, examples),
        *(
            _phases(config, data)
            if config.rollouts
            else [
                f"tokens      {examples.num_tokens:,}, {examples.num_supervised_tokens:,} of them "
                f"learned{_weights(examples)}; an example has {_quartiles(*examples.quartiles())}",
            ]
        ),
        f"template    {data.template.name}{_arguments(data.template)}, objective "
        f"{own_code.without_folder(config.objective.kind)}",
        f"steps       {_counted(data.num_steps, 'step')}, each of {config.train.global_batch_size} "
        f"{'completions' if config.rollouts else 'sequences'} ({config.micro_batch_size} at once x "
        f"{accumulation_steps(config, topology.num_data)} x "
        f"{_counted(topology.num_data, 'process')})"
        + (f", each shared by {num_context}" if num_context > 1 else "")
        + (f"; {natural:,} without train.max_steps" if data.num_steps < natural else ""),
        *_methods(config, quantized.quantization(data.model_config.to_dict()) is not None),
    ]
    if config.data.packing:
        full = train.num_tokens / (train.num_known * config.data.max_length)
        lines.append(f"packing     {full:.1%} full")
    if data.eval:
        evals, known = data.eval.sequences.examples, data.num_eval_known
        lines.append(
            f"evaluation  {_counted(len(evals), 'example')}"
            + (" held out" if config.data.eval_fraction else "")
            + (f"; {known:,} of them are also trained on" if known else "")
            + (_of_eval_files(config, evals) if data.sources.eval else "")
        )
    return lines


def _phases(config: Config, data: Data) -> Iterator[str]:
    """Say what a phase of rollouts will be."""
    settings, asked = config.rollouts, data.train
    assert settings
    assert isinstance(asked, Asked)
    count, shortest_to_longest = asked.num_prompts(0), asked.prompts.quartiles()
    completions = count * settings.group_size
    last = asked.phase_of(data.num_steps - 1)[0] + 1
    further = f", and at most {int(settings.dynamic_sampling * count):,} further prompts"
    times = f" {settings.passes} times" if settings.passes > 1 else ""
    yield (
        f"prompts     {asked.prompts.num_tokens:,} tokens; a prompt has "
        f"{_quartiles(*shortest_to_longest)}"
    )
    yield (
        f"rollouts    {_counted(last, 'phase')}, each of {_counted(count, 'prompt')} x "
        f"{_counted(settings.group_size, 'completion')} = {completions:,} completions of at most "
        f"{settings.max_new_tokens} tokens ({completions * settings.max_new_tokens:,} together)"
        + (further if settings.dynamic_sampling else "")
        + f", learned{times} in {_counted(asked.passes_and_steps(0)[1], 'step')}; "
        f"temperature {settings.temperature:g}"
    )


def _rows(config: Config, data: Data) -> str:
    """Say what became of every training row; the numbers add up."""
    train, held = data.train.sequences.examples, 0
    if data.eval and config.data.eval_fraction:
        held = data.eval.sequences.examples.num_distinct_rows
    trained = train.num_distinct_rows
    if not data.train.sequences.is_whole:
        return f"{_counted(trained, 'row')} so far"
    left_out = data.num_rows - train.num_dropped - held - trained
    fates = (
        (train.num_dropped, "dropped"),
        (left_out, _left_out_by(config)),
        (held, "held out"),
        (trained, "trained on"),
    )
    parts = [f"{count:,} {fate}" for count, fate in fates if count]
    return _counted(data.num_rows, "row") + (f": {', '.join(parts)}" if len(parts) > 1 else "")


def _left_out_by(config: Config) -> str:
    data = config.data
    keys = [key for key in ("max_rows", "weights", "token_budgets") if getattr(data, key)]
    return "left out by " + " and ".join(f"data.{key}" for key in keys)


def _changed(config: Config, examples: Any) -> str:
    """Say how many rows were cut or split, and how many were skipped."""
    how = "split into several examples" if config.data.truncation == "split" else "cut"
    cut, empty, skipped = examples.num_truncated, examples.num_empty, examples.num_skipped
    return (
        (f"; {cut:,} {how}" if cut else "")
        + (f"; {_counted(empty, 'empty row')} skipped" if empty else "")
        + (f"; {_counted(skipped, 'row')} skipped by data.format" if skipped else "")
    )


def _of_eval_files(config: Config, examples: Any) -> str:
    dropped = f"; {examples.num_dropped:,} dropped" if examples.num_dropped else ""
    return dropped + _changed(config, examples)


def _file_lines(config: Config, data: Data) -> list[str]:
    """List the user's own code, the files, and their columns that only rewards read, if any do."""
    examples = data.train.sequences.examples
    lines = [
        f"own code    {code}, {key}, sha256 {code.sha256[:16]}"
        for key, code in own_codes(config).items()
    ]
    lines += [f"files       {_files(list(data.sources.train))}"]
    if config.data.weights or config.data.token_budgets:
        lines.append(f"mix         {_mix(data)}")
    if data.columns:
        how = " (detected)" if config.data.format == "auto" else ""
        lines.append(f"format      {data.format}{how}, columns {data.columns}")
    if data.sources.eval:
        lines.append(f"eval files  {_files(list(data.sources.eval))}")
    label = "to rewards  " if config.rollouts else "not read    "
    lines += [f"{label}{_unread(examples)}"] if examples.unread else []
    lines += _bad_rows(examples, "")
    if data.sources.eval and data.eval:
        lines += _bad_rows(data.eval.sequences.examples, "in data.eval: ")
    if data.sources.eval and (unread := data.eval and _unread(data.eval.sequences.examples)):
        lines.append(f"{label}in data.eval: {unread}")
    return lines


def _mix(data: Data) -> str:
    """List how much of an epoch comes from each file, by tokens."""
    examples, names = data.train.in_memory.examples, list(data.sources.train)
    tokens = np.bincount(examples.source, examples.lengths, len(names))
    listed = [f"{share:.1%} of the tokens from {short(name)}"
              for name, share in zip(names, tokens / tokens.sum())]  # fmt: skip
    more = f" and {len(listed) - SHOWN_NAMES} more" if len(listed) > SHOWN_NAMES else ""
    return ", ".join(listed[:SHOWN_NAMES]) + more


def _bad_rows(examples: Any, where: str) -> Iterator[str]:
    """List what was repaired in rows, and which wrong rows are skipped, by kind."""
    if examples.repairs:
        listed = ", ".join(
            f"{what} ({_counted(count, 'row')})" for what, count in examples.repairs.items()
        )
        yield f"repaired    {where}{listed}"
    if examples.bad:
        kinds = list(examples.bad.items())
        listed = "; ".join(
            f"{short(kind.partition('; ')[0], 120)} ({_counted(count, 'row')})"
            for kind, count in kinds[:SHOWN_NAMES]
        )
        more = f"; and {len(kinds) - SHOWN_NAMES} more kinds" if len(kinds) > SHOWN_NAMES else ""
        total = _counted(sum(examples.bad.values()), "row")
        yield f"bad rows    {where}{total} skipped: {listed}{more}"


def _unread(examples: Any) -> str:
    """List columns, and keys of messages, that are not read, and how many rows have them."""
    listed = [
        f"{short(name)} ({_counted(count, 'row')})"
        for name, count in sorted(examples.unread.items())
    ]
    more = f" and {len(listed) - SHOWN_NAMES} more" if len(listed) > SHOWN_NAMES else ""
    return f"columns {', '.join(listed[:SHOWN_NAMES])}{more}" if listed else ""


def _methods(config: Config, is_quantized: bool) -> list[str]:
    """Describe the method, and what else the run does."""
    adapter, optimizer, train = config.adapter, config.optimizer, config.train
    how = []
    if adapter.kind == "qlora":
        how.append(_form(adapter) + (" (the base is saved so)" if is_quantized else ""))
    if adapter.kind != "full" and adapter.path:
        how.append(f"going on from {adapter.path}")
    elif adapter.kind != "full":
        how.append(f"r {adapter.r}, alpha {adapter.alpha:g}, init {adapter.init}")
    usual = (
        " (usual)"
        if optimizer.lr == usual_lr(optimizer.kind, adapter.kind, config.objective.kind)
        else ""
    )
    how.append(f"{optimizer.kind}, lr {optimizer.lr:g}{usual}, {config.schedule.kind}")
    lines = [f"method      {'; '.join(how)}"]
    if others := [*filter(None, _others(config, train)), *config.tracking.trackers]:
        lines.append(f"besides     {'; '.join(others)}")
    if prompts := config.evaluation.sample_prompts:
        lines.append(f"samples     {_counted(len(prompts), 'prompt')}")
    return lines


def _others(config: Config, train: config_fields.Train) -> Iterator[str]:
    evaluation = config.evaluation
    if train.ema_decay:
        yield f"averages of the weights ({train.ema_decay})"
    if train.neftune_alpha:
        yield f"noise on embeddings ({train.neftune_alpha:g})"
    if evaluation.patience:
        yield f"stops after {_counted(evaluation.patience, 'evaluation')} without a new best"
    if evaluation.export_best:
        yield "exports the best evaluation"


# --------------------------------------------------------------------------------------- notes


def _surprises(config: Config, data: Data) -> Iterator[str]:
    """Note what is allowed and may surprise."""
    num_steps, adapter = data.num_steps, config.adapter
    if num_steps < FEW_STEPS:
        more = "lower train.global_batch_size or raise train.epochs"
        if num_steps == config.train.max_steps:
            more = "raise train.max_steps and train.epochs"
        if config.data.packing:
            more += ", or set data.packing to false (a pack is one sequence)"
        yield (
            f"{_counted(num_steps, 'step')} will change the model very little at usual learning "
            f"rates; {more}"
        )
    dropped, longest = data.train.sequences.examples.num_dropped, config.data.max_length
    if dropped > data.num_rows / 2:
        yield (
            f"{dropped:,} of {data.num_rows:,} rows are dropped, as they are longer than "
            f"data.max_length: {longest:,} tokens (data.truncation: drop); raise it, or take a "
            "model that reads more"
        )
    if forgotten := base.forgotten_losses(data.model_config.to_dict()):
        yield forgotten
    if isinstance(adapter, Lora) and adapter.bias != "none":
        yield (
            f"adapter.bias: {adapter.bias} changes biases of the base: with the adapter switched "
            "off, the model is not the base"
        )
    if torch.backends.mps.is_available() and not torch.cuda.is_available():
        yield "Apple GPUs (mps) are not supported yet; this run uses the CPU"


def _template_notes(config: Config, data: Data) -> Iterator[str]:
    """Note what the template does that its user may not expect."""
    template, has_turns = data.template, chosen(config).has_turns
    if has_turns and data.tokenizer.chat_template and template.name != "chat":
        # Suppress: the model's own template need not be usable.
        with contextlib.suppress(DataError, templates.BrokenTemplate):
            own = chat_templates.load(
                "chat", "messages", data.tokenizer.chat_template, template.special_tokens, {},
                template.date,
            )  # fmt: skip
            if own.prompt(own.probe) != template.prompt(own.probe):
                yield (
                    f"the model has a chat template of its own, which {template.name} replaces, "
                    "here and in the export; data.template: chat keeps it"
                )
    if template.date is not None:
        yield (
            f"the template writes the date: {template.date}, that of the first start, stays the "
            "same for the whole run"
        )
    if template.opening and has_turns:
        what = "it ends the prompt, and is not learned"
        if template.learn_opening:
            what = "some rows begin otherwise, so the model learns to write it"
        yield f"the template puts {template.opening!r} before an answer; {what}"


def _stops_without_effect(config: Config, data: Data) -> Iterator[str]:
    """Note settings of steps that have no effect, given how many steps the run turned out to have.

    Settings that can never have an effect are errors of the config.
    """
    train, checkpoint, evaluation = config.train, config.checkpoint, config.evaluation
    steps, natural = data.num_steps, _natural_steps(config, data)
    here = f"in a run of {_counted(steps, 'step')}"
    if train.max_steps is not None and train.max_steps > natural:
        yield (
            f"train.max_steps: {train.max_steps:,} has no effect: train.epochs: {train.epochs} "
            f"ends after {_counted(natural, 'step')}"
        )
    every, at_the_end = evaluation.every_steps, "the only evaluation is at the end"
    if every is not None and every >= steps:
        yield f"evaluation.every_steps: {every:,} {here}: {at_the_end}"
        if evaluation.export_best:
            yield (
                f"evaluation.export_best has no effect: {at_the_end}; lower evaluation.every_steps"
            )
    if every is not None and evaluation.patience is not None:
        first = (evaluation.patience + 1) * every
        if first >= steps:
            yield (
                f"evaluation.patience: {evaluation.patience:,} has no effect {here}: the first "
                f"stop would be after step {first:,}; lower it or evaluation.every_steps"
            )
    sampled = evaluation.sample_every_steps
    if sampled is not None and sampled >= steps:
        yield (
            f"evaluation.sample_every_steps: {sampled:,} {here}: sample_prompts are answered at "
            "the end only"
        )
    saved, keep_last = checkpoint.every_steps, checkpoint.keep_last
    if saved is not None and saved >= steps:
        yield f"checkpoint.every_steps: {saved:,} {here}: by steps, only the end is saved"
    num_saves = 1 if saved is None else -(-steps // saved)
    usual = config_fields.Checkpoint().keep_last
    if checkpoint.every_minutes is None and keep_last > max(num_saves, usual):
        count = _counted(num_saves, "checkpoint")
        yield f"checkpoint.keep_last: {keep_last:,} has no effect: there are {count}"
    if config.tracking.log_every_steps > steps:
        every = config.tracking.log_every_steps
        yield f"tracking.log_every_steps: {every:,} {here}: only the last step is logged"
    decay = config.schedule.decay_fraction if config.schedule.kind == "wsd" else None
    if decay is not None and decay * steps <= 1:
        yield f"schedule.decay_fraction: {decay:g} {here} is the last step alone"


def _data_without_effect(config: Config, data: Data) -> Iterator[str]:
    """Note settings of the data that have no effect, given the rows."""
    wanted, sequences, num_rows = config.data, data.train.sequences, data.num_rows
    if wanted.max_rows is not None and wanted.max_rows >= num_rows:
        count = _counted(num_rows, "row")
        yield f"data.max_rows: {wanted.max_rows:,} has no effect: there are {count}"
    if wanted.packing and sequences.num_known == len(sequences.examples):
        yield "data.packing packs nothing: no two examples fit into data.max_length together"
    if wanted.group_by_length and not data.train.padded:
        kernel = data.attention
        yield f"data.group_by_length saves nothing: with attention {kernel} nothing is padded"
    shortest, _, longest = sequences.examples.quartiles()
    if wanted.group_by_length and shortest == longest:
        yield "data.group_by_length has no effect: all examples have the same length"
    if wanted.loss_on in ("each_turn", "last_turn") and data.format in ONE_ANSWER:
        yield (
            f"data.loss_on: {wanted.loss_on} is the same as completion here: rows of format "
            f"{data.format} have one answer"
        )


# --------------------------------------------------------------------------------------- words


def _natural_steps(config: Config, data: Data) -> int:
    """Return the steps of all epochs, without train.max_steps."""
    return preflight.natural_steps(config, data.train)


def _files(names: list[str]) -> str:
    listed = ", ".join(readers.describe(name) for name in names[:SHOWN_NAMES])
    more = f" and {len(names) - SHOWN_NAMES:,} more" if len(names) > SHOWN_NAMES else ""
    return listed + more


def _counted(number: int, noun: str) -> str:
    plural = noun if number == 1 else noun + ("es" if noun.endswith("s") else "s")
    return f"{number:,} {plural}"


def _quartiles(*lengths: float) -> str:
    low, middle, high = map(int, lengths)
    if low == high:
        return f"{low} tokens"
    return f"{low} to {high} tokens, half of them at most {middle}"


def _marked(examples: Any, tokenizer: Any) -> str:
    """Decode the documents of the first example, with supervised runs in double brackets."""
    documents = examples.documents(0)
    shown = [_marked_document(examples, tokenizer, number) for number in documents]
    if len(documents) > 1:
        for number, text in zip(documents, shown):
            fields = "".join(f"  {name} {v[number]:g}" for name, v in examples.columns.items())
            shown[number] = f"  document {number + 1} of {len(documents)}{fields}\n{text}"
    return "\n".join(shown)


def _marked_document(examples: Any, tokenizer: Any, number: int) -> str:
    part = examples.input.span(number)
    ids, supervised = np.asarray(examples.input.ids[part]), np.asarray(examples.supervised[part])
    cuts = [0, *(np.flatnonzero(np.diff(supervised)) + 1), len(ids)]
    text = ""
    for start, piece in zip(cuts, xray.decoded(ids, cuts, tokenizer)):
        text += f"[[{piece}]]" if supervised[start] else piece
    if len(text) > SHOWN_CHARACTERS:
        text = f"{text[: SHOWN_CHARACTERS // 2]} ... {text[-SHOWN_CHARACTERS // 2 :]}"
    return "\n".join(f"  | {line}" for line in text.splitlines())
