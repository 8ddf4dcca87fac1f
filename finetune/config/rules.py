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
    Full,
    Lora,
    Model,
    OwnObjective,
    QLora,
    Schedule,
    Section,
)

PLACES = (
    ("run", "dir"), ("model", "path"), ("model", "tokenizer"), ("adapter", "path"), ("data", "cache_dir"),
    ("checkpoint", "storage"),
)  # fmt: skip
# Defaults that ask for nothing, so that writing them out does no harm.
NOTHING: tuple[object, ...] = (None, False, 0, [], {}, "none", "auto", "default")


def conflicts(config: Config) -> Iterator[str]:
    """Settings that cannot work together, or that this run would ignore."""
    yield from _blanks(config)
    yield from _model_conflicts(config.model, config.adapter)
    if not isinstance(config.adapter, Full):
        yield from _adapter_conflicts(config.adapter)
    yield from _optimizer_conflicts(config)
    yield from _data_conflicts(config)
    yield from _schedule_conflicts(config.schedule)
    yield from _evaluation_conflicts(config)
    train, project = config.train, config.tracking.project
    if train.micro_batch_size != "auto" and train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}"
        )
    trackers = config.tracking.trackers
    if not {"wandb", "trackio"} & set(trackers):
        yield from _ignored(
            config.tracking, "tracking", ("project",), "only wandb and trackio have projects"
        )
    if "wandb" not in trackers:
        yield from _ignored(
            config.tracking, "tracking", ("wandb_mode",), "wandb is not among tracking.trackers"
        )
    if len(set(trackers)) < len(trackers):
        yield "tracking.trackers: names one twice"
    if "wandb" in trackers and (bad := set(project) & set("/\\#?%:")):
        yield f"tracking.project: W&B takes no {' '.join(sorted(bad))} in the name of a project"


def _blanks(config: Config) -> Iterator[str]:
    """Paths without a letter: some would mean the current folder, others nothing."""
    for section, name in PLACES:
        value = getattr(getattr(config, section), name, None)
        if isinstance(value, str) and not value.strip():
            yield f"{section}.{name}: is empty; name a folder, or remove it"


def _model_conflicts(model: Model, adapter: Full | Adapter) -> Iterator[str]:
    if (model.path is None) == (model.config is None):
        yield "model.path: give either model.path or model.config (an architecture for init: random)"
    if model.config is not None and model.init != "random":
        yield "model.config: only for model.init: random; saved weights have their own config"
    if model.config is not None and model.tokenizer is None:
        yield 'model.tokenizer: needed with model.config: a folder, a Hub id or "bytes"'
    if model.config is not None and "model_type" not in model.config:
        yield "model.config: needs model_type, for example llama"
    if model.config is not None and model.tokenizer == "bytes":
        yield from _ignored(
            model, "model", ("revision", "trust_remote_code"), "nothing is loaded from the Hub"
        )
    if model.path is not None and os.path.isdir(model.path):
        yield from _ignored(model, "model", ("revision",), "model.path is a folder")
    if model.init == "random" and adapter.kind != "full":
        yield f"adapter.kind: {adapter.kind} on random weights cannot be loaded again, because those weights are not saved; use full"
    for token in model.new_tokens:
        if not token.strip() or model.new_tokens.count(token) > 1:
            yield f"model.new_tokens: {token!r} is empty or repeated"
            break


def _data_conflicts(config: Config) -> Iterator[str]:
    model, data, objective = config.model, config.data, config.objective
    own = objective.objective if isinstance(objective, OwnObjective) else None
    name, has_turns = (
        own_code.without_folder(objective.kind),
        own.has_turns if own else objective.kind == "sft",
    )
    if own.supervises("completion") == "all" if own else objective.kind == "clm":
        yield from _ignored(
            data, "data", ("loss_on",), f"objective.kind: {name} learns every token"
        )
    elif data.truncation == "split":
        yield "data.truncation: split would cut answers from their prompts; use it with objective.kind: clm"
    if data.format == "text":
        yield from _ignored(
            data, "data", ("template", "system_prompt"), "rows of text have no turns"
        )
        if has_turns:
            yield f"objective.kind: {name} needs prompts and answers, but data.format is text; use clm"
    if own_code.is_own(data.format):
        name = own_code.without_folder(data.format)
        why = f"{name} reads the columns of the file itself; rename them there"
        yield from _ignored(data, "data", ("columns",), why)
    for name in data.columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            yield f"data.columns: no format has a column {name!r}; " + (
                f"did you mean {near[0]}?" if near else f"the columns are {', '.join(COLUMNS)}"
            )
    sources = [*_listed(data.train), *_listed(data.eval)]
    if not any(_may_hold_text(source) for source in sources):
        yield from _ignored(data, "data", ("text_unit",), "no source is a .txt file")
    if data.eval is not None:
        yield from _ignored(data, "data", ("eval_fraction",), "data.eval gives the evaluation rows")
    if data.packing and model.attention in PADDED_ATTENTION:
        yield f"data.packing: with model.attention: {model.attention} packed documents would see each other; use auto"
    if data.packing and data.group_by_length:
        yield "data.group_by_length: would be ignored: data.packing fills every sequence; remove it"


def _schedule_conflicts(schedule: Schedule) -> Iterator[str]:
    if schedule.kind in ("constant", "inverse_sqrt"):
        yield from _ignored(
            schedule,
            "schedule",
            ("min_lr_fraction",),
            f"schedule.kind: {schedule.kind} ends nowhere",
        )
    if schedule.kind != "wsd":
        yield from _ignored(
            schedule, "schedule", ("decay_fraction",), "it belongs to schedule.kind: wsd"
        )
    if schedule.kind == "inverse_sqrt" and schedule.warmup_steps == 0:
        yield "schedule.warmup_steps: inverse_sqrt falls as sqrt(warmup_steps / step), so it needs some"


def _evaluation_conflicts(config: Config) -> Iterator[str]:
    wanted = config.evaluation
    if not wanted.sample_prompts:
        names = ("sample_every_steps", "sample_max_new_tokens")
        yield from _ignored(wanted, "evaluation", names, "evaluation.sample_prompts is empty")
    if wanted.patience is not None and wanted.every_steps is None:
        yield "evaluation.patience: needs evaluation.every_steps; there is only one evaluation, at the end"
    if wanted.export_best and wanted.every_steps is None:
        yield "evaluation.export_best: needs evaluation.every_steps; there is only one evaluation, at the end"
    if any(not prompt.strip() for prompt in wanted.sample_prompts):
        yield "evaluation.sample_prompts: one is empty"
    if config.data.eval is None and config.data.eval_fraction == 0:
        yield from _ignored(
            wanted,
            "evaluation",
            ("every_steps", "micro_batch_size", "patience", "export_best"),
            "the run has no evaluation rows (data.eval)",
        )


SHAPE = (
    "r", "alpha", "dropout", "target_modules", "rslora", "dora", "init", "modules_to_save",
)  # fmt: skip


def _adapter_conflicts(adapter: Adapter) -> Iterator[str]:
    has_eight_bits = isinstance(adapter, QLora) and QUANTIZATIONS[adapter.quantization].bits == 8
    if has_eight_bits:
        yield from _ignored(
            adapter, "adapter", ("double_quantization", "compute_dtype"), "it is for 4 bits"
        )
    if adapter.path is not None:
        yield from _ignored(
            adapter, "adapter", SHAPE, "the adapter in adapter.path has its own shape"
        )
        return
    if adapter.kind == "qlora" and adapter.init == "pissa":
        yield "adapter.init: pissa rewrites the base weights, which qlora has quantised before; use loftq, or kind: lora"
    if adapter.kind == "lora" and adapter.init == "loftq":
        yield "adapter.init: loftq corrects quantisation errors, and nothing is quantised; use kind: qlora"
    if has_eight_bits and adapter.init == "loftq":
        yield "adapter.init: loftq corrects the error of 4 bits, and int8 has next to none; use init: default"
    if adapter.dora and isinstance(adapter, Lora) and adapter.bias != "none":
        yield "adapter.bias: cannot be used with adapter.dora; use none"
    if adapter.dora and adapter.init != "default":
        yield f"adapter.dora: cannot be used with adapter.init: {adapter.init}; use init: default"
    if has_eight_bits and adapter.dora:
        yield "adapter.dora: unpacks weights at every step, which int8 does inexactly; use nf4"


def _optimizer_conflicts(config: Config) -> Iterator[str]:
    optimizer, kind = config.optimizer, config.optimizer.kind
    if config.trains_in_16_bits and kind != "adamw":
        yield f"optimizer.kind: {kind} rounds weights in 16 bits to the nearest, which loses most updates; use adamw, which rounds them stochastically, or model.dtype: auto"
    row = OPTIMIZERS[kind]
    ignored = tuple(name for name in ("betas", "eps") if name not in row.takes)
    yield from _ignored(optimizer, "optimizer", ignored, row.ignores)
    if config.adapter.kind != "full" and row.not_for_adapters:
        yield f"optimizer.kind: {row.not_for_adapters}"
    if config.adapter.kind == "full":
        yield from _ignored(
            optimizer, "optimizer", ("lora_plus_ratio",), "adapter.kind: full has no adapter"
        )


def _may_hold_text(source: str) -> bool:
    """A .txt file, or a folder or a glob, whose files are looked at later."""
    is_many = os.path.isdir(source) or set(source) & set("*?[")
    return bool(is_many) or source.lower().endswith((".txt", ".txt.gz"))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _ignored(values: Section, section: str, names: tuple[str, ...], why: str) -> Iterator[str]:
    fields, given = type(values).model_fields, values.model_fields_set
    for name in names:
        default = fields[name].default
        # A default that is written out means something, too, but in a config.yaml, where the
        # program writes all of them.
        meant = name in given and default not in NOTHING and len(given) < len(fields)
        if meant or getattr(values, name) != default:
            yield f"{section}.{name}: would be ignored: {why}; remove it"
