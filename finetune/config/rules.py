"""Settings that exclude each other, or that another setting would ignore."""

import difflib
import os
from collections.abc import Iterator

from finetune import own_code
from finetune.config.choices import OPTIMIZERS, QUANTIZATIONS
from finetune.config.fields import (
    COLUMNS,
    PADDED_ATTENTION,
    Adapter,
    Config,
    Data,
    Full,
    Lora,
    Model,
    OwnObjective,
    QLora,
    Schedule,
    Section,
    Tracking,
    Train,
)

PLACES = (
    ("run", "dir"), ("model", "path"), ("model", "tokenizer"), ("adapter", "path"),
    ("data", "cache_dir"), ("checkpoint", "storage"),
)  # fmt: skip
# Defaults that ask for nothing, so that writing them out does no harm.
NOTHING: tuple[object, ...] = (None, False, 0, [], {}, "none", "auto", "default")
# Settings that the adapter in adapter.path decides.
SHAPE = (
    "r", "alpha", "dropout", "target_modules", "rslora", "dora", "init", "modules_to_save",
)  # fmt: skip


def conflicts(config: Config) -> Iterator[str]:
    """List settings that cannot work together, or that this run would ignore."""
    yield from _blanks(config)
    yield from _model_conflicts(config.model, config.adapter)
    if not isinstance(config.adapter, Full):
        yield from _adapter_conflicts(config.adapter)
    yield from _optimizer_conflicts(config)
    yield from _objective_conflicts(config)
    yield from _data_conflicts(config.data, config.model)
    yield from _schedule_conflicts(config.schedule)
    yield from _evaluation_conflicts(config)
    yield from _batch_conflicts(config.train)
    yield from _tracking_conflicts(config.tracking)


def _blanks(config: Config) -> Iterator[str]:
    """List blank paths: some would mean the current folder, others nothing."""
    for section, name in PLACES:
        value = getattr(getattr(config, section), name, None)
        if isinstance(value, str) and not value.strip():
            yield f"{section}.{name}: is empty; name a folder, or remove it"


def _model_conflicts(model: Model, adapter: Full | Adapter) -> Iterator[str]:
    if (model.path is None) == (model.config is None):
        what = "give either model.path or model.config (an architecture for init: random)"
        yield f"model.path: {what}"
    if model.config is not None and model.init != "random":
        yield "model.config: only for model.init: random; saved weights have their own config"
    if model.config is not None and model.tokenizer is None:
        yield 'model.tokenizer: needed with model.config: a folder, a Hub id or "bytes"'
    if model.config is not None and "model_type" not in model.config:
        yield "model.config: needs model_type, for example llama"
    if model.config is not None and model.tokenizer == "bytes":
        names = ("revision", "trust_remote_code")
        yield from _ignored(model, "model", names, "nothing is loaded from the Hub")
    if model.path is not None and os.path.isdir(model.path):
        yield from _ignored(model, "model", ("revision",), "model.path is a folder")
    if model.init == "random" and adapter.kind != "full":
        why = "cannot be loaded again, because those weights are not saved; use full"
        yield f"adapter.kind: {adapter.kind} on random weights {why}"
    for token in model.new_tokens:
        if not token.strip() or model.new_tokens.count(token) > 1:
            yield f"model.new_tokens: {token!r} is empty or repeated"
            break


def _objective_conflicts(config: Config) -> Iterator[str]:
    """List settings of `data` that do not fit the objective."""
    data, objective = config.data, config.objective
    name = own_code.without_folder(objective.kind)
    if isinstance(objective, OwnObjective):
        has_turns = objective.objective.has_turns
        trains_on_all = objective.objective.supervises("completion") == "all"
    else:
        trains_on_all = objective.kind == "clm"
        has_turns = not trains_on_all
    if trains_on_all:
        why = f"objective.kind: {name} trains on every token"
        yield from _ignored(data, "data", ("loss_on",), why)
    elif data.truncation == "split":
        why = "would cut answers from their prompts; use it with objective.kind: clm"
        yield f"data.truncation: split {why}"
    if data.format == "text" and has_turns:
        why = "needs prompts and answers, but data.format is text; use clm"
        yield f"objective.kind: {name} {why}"


def _data_conflicts(data: Data, model: Model) -> Iterator[str]:
    if data.format == "text":
        names = ("template", "system_prompt")
        yield from _ignored(data, "data", names, "rows of text have no turns")
    if own_code.is_own(data.format):
        name = own_code.without_folder(data.format)
        why = f"{name} reads the columns of the file itself; rename them there"
        yield from _ignored(data, "data", ("columns",), why)
    for name in data.columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            listed = f"the columns are {', '.join(COLUMNS)}"
            hint = f"did you mean {near[0]}?" if near else listed
            yield f"data.columns: no format has a column {name!r}; {hint}"
    sources = [*_listed(data.train), *_listed(data.eval)]
    if not any(_may_hold_text(source) for source in sources):
        yield from _ignored(data, "data", ("text_unit",), "no source is a .txt file")
    if data.eval is not None:
        yield from _ignored(data, "data", ("eval_fraction",), "data.eval gives the evaluation rows")
    if data.packing and model.attention in PADDED_ATTENTION:
        why = "packed documents would see each other; use auto"
        yield f"data.packing: with model.attention: {model.attention} {why}"
    if data.packing and data.group_by_length:
        yield "data.group_by_length: would be ignored: data.packing fills every sequence; remove it"


def _schedule_conflicts(schedule: Schedule) -> Iterator[str]:
    if schedule.kind in ("constant", "inverse_sqrt"):
        why = f"schedule.kind: {schedule.kind} has no final learning rate"
        yield from _ignored(schedule, "schedule", ("min_lr_fraction",), why)
    if schedule.kind != "wsd":
        why = "it belongs to schedule.kind: wsd"
        yield from _ignored(schedule, "schedule", ("decay_fraction",), why)
    if schedule.kind == "inverse_sqrt" and schedule.warmup_steps == 0:
        why = "falls as sqrt(warmup_steps / step), so give at least 1"
        yield f"schedule.warmup_steps: inverse_sqrt {why}"


def _evaluation_conflicts(config: Config) -> Iterator[str]:
    evaluation = config.evaluation
    if not evaluation.sample_prompts:
        names: tuple[str, ...] = ("sample_every_steps", "sample_max_new_tokens")
        yield from _ignored(evaluation, "evaluation", names, "evaluation.sample_prompts is empty")
    if evaluation.every_steps is None:
        why = "needs evaluation.every_steps; there is only one evaluation, at the end"
        if evaluation.patience is not None:
            yield f"evaluation.patience: {why}"
        if evaluation.export_best:
            yield f"evaluation.export_best: {why}"
    if any(not prompt.strip() for prompt in evaluation.sample_prompts):
        yield "evaluation.sample_prompts: one is empty"
    if config.data.eval is None and config.data.eval_fraction == 0:
        names = ("every_steps", "micro_batch_size", "patience", "export_best")
        why = "the run has no evaluation rows (data.eval)"
        yield from _ignored(evaluation, "evaluation", names, why)


def _batch_conflicts(train: Train) -> Iterator[str]:
    size, micro = train.global_batch_size, train.micro_batch_size
    if micro != "auto" and size % micro:
        yield (
            f"train.global_batch_size: {size} is not a multiple of train.micro_batch_size {micro}"
        )


def _tracking_conflicts(tracking: Tracking) -> Iterator[str]:
    trackers = tracking.trackers
    if not {"wandb", "trackio"} & set(trackers):
        why = "only wandb and trackio have projects"
        yield from _ignored(tracking, "tracking", ("project",), why)
    if "wandb" not in trackers:
        why = "wandb is not among tracking.trackers"
        yield from _ignored(tracking, "tracking", ("wandb_mode",), why)
    if len(set(trackers)) < len(trackers):
        yield "tracking.trackers: names one twice"
    if "wandb" in trackers and (bad := set(tracking.project) & set("/\\#?%:")):
        yield f"tracking.project: W&B takes no {' '.join(sorted(bad))} in the name of a project"


def _adapter_conflicts(adapter: Adapter) -> Iterator[str]:
    has_eight_bits = isinstance(adapter, QLora) and QUANTIZATIONS[adapter.quantization].bits == 8
    if has_eight_bits:
        names = ("double_quantization", "compute_dtype")
        yield from _ignored(adapter, "adapter", names, "it is for 4 bits")
    if adapter.path is not None:
        why = "the adapter in adapter.path has its own shape"
        yield from _ignored(adapter, "adapter", SHAPE, why)
        return
    init = adapter.init
    if adapter.kind == "qlora" and init == "pissa":
        why = "rewrites the base weights, which qlora has quantised before"
        yield f"adapter.init: pissa {why}; use loftq, or kind: lora"
    if adapter.kind == "lora" and init == "loftq":
        why = "corrects quantisation errors, and nothing is quantised"
        yield f"adapter.init: loftq {why}; use kind: qlora"
    if has_eight_bits and init == "loftq":
        why = "corrects the error of 4 bits, and int8 has next to none"
        yield f"adapter.init: loftq {why}; use init: default"
    if adapter.dora and isinstance(adapter, Lora) and adapter.bias != "none":
        yield "adapter.bias: cannot be used with adapter.dora; use none"
    if adapter.dora and init != "default":
        yield f"adapter.dora: cannot be used with adapter.init: {init}; use init: default"
    if has_eight_bits and adapter.dora:
        yield "adapter.dora: unpacks weights at every step, which int8 does inexactly; use nf4"


def _optimizer_conflicts(config: Config) -> Iterator[str]:
    optimizer, kind = config.optimizer, config.optimizer.kind
    row = OPTIMIZERS[kind]
    if config.trains_in_16_bits and kind != "adamw":
        yield (
            f"optimizer.kind: {kind} rounds weights in 16 bits to the nearest, which loses most "
            "updates; use adamw, which rounds them stochastically, or model.dtype: auto"
        )
    names = tuple(name for name in ("betas", "eps") if name not in row.takes)
    yield from _ignored(optimizer, "optimizer", names, row.ignores)
    if config.adapter.kind != "full" and row.not_for_adapters:
        yield f"optimizer.kind: {row.not_for_adapters}"
    if config.adapter.kind == "full":
        why = "adapter.kind: full has no adapter"
        yield from _ignored(optimizer, "optimizer", ("lora_plus_ratio",), why)


def _may_hold_text(source: str) -> bool:
    """Return whether a source is a .txt file, or a folder or glob, which is read later."""
    is_many = os.path.isdir(source) or set(source) & set("*?[")
    return bool(is_many) or source.lower().endswith((".txt", ".txt.gz"))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _ignored(values: Section, section: str, names: tuple[str, ...], why: str) -> Iterator[str]:
    """List those of the settings that the user gave. `why`: the reason for ignoring them."""
    fields, given = type(values).model_fields, values.model_fields_set
    for name in names:
        default = fields[name].default
        # A default that is written out counts too, except in a config.yaml of a run, which has all
        # settings of the section.
        meant = name in given and default not in NOTHING and len(given) < len(fields)
        if meant or getattr(values, name) != default:
            yield f"{section}.{name}: would be ignored: {why}; remove it"
