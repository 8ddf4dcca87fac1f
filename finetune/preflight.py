"""Check all that can be checked before weights are loaded, and put the rows into order."""

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from finetune import extras, kernels, own_code, sequences
from finetune.config import Config, Distill, Quantized, base, code_identity
from finetune.config import fields as config_fields
from finetune.config.choices import OPTIMIZERS, objective_kind
from finetune.data import (
    batches,
    file_types,
    pairs,
    remote,
    rows,
    source_files,
    taught,
    templates,
    tokenised,
    tokens,
)
from finetune.data.advice import Advice
from finetune.data.chat_templates import load as load_template
from finetune.data.mismatched import mismatched
from finetune.data.places import list_columns
from finetune.data.problems import Skipping
from finetune.data.source_files import Sources
from finetune.engine import companion, optim, trackers
from finetune.engine.metrics import log
from finetune.engine.topology import Topology
from finetune.errors import ConfigError, ModelError
from finetune.export.publish import rehearse
from finetune.export.save import Base
from finetune.forecast import weights
from finetune.models import (
    adapters,
    attention_choice,
    base_identity,
    families,
    float8,
    head,
    load,
    parameters,
    recompute,
    scalar_heads,
    teacher,
)
from finetune.objectives import Encoding, Objective, Own, chosen
from finetune.objectives.base import with_blank_reference
from finetune.rollouts.asked import Asked
from finetune.rollouts.turns import Turns

if TYPE_CHECKING:
    from finetune.rollouts.rewards import Rewards

FLOAT32 = 4  # bytes


@dataclass(frozen=True)
class Data:
    """What a run trains on, in which order, and with which tokenizer, template and attention."""

    tokenizer: Any
    template: templates.Template
    model_config: Any
    attention: str
    train: batches.Batches
    eval: batches.Batches | None
    num_steps: int
    new_token_ids: list[int]
    sources: Sources
    num_eval_known: int
    """Evaluation examples that are also trained on."""
    identity: dict[str, Any]
    """What must not change on resume: fingerprints, and what decides the model's function."""
    format: str
    num_rows: int
    """All training rows; data.max_rows may select fewer."""
    options: tokenised.Options
    """What decides the tokens besides rows, tokenizer and template."""
    columns: str
    """Which columns are read, and from which names; empty for a format of the user's own."""
    teacher: teacher.Teacher | None
    """The model that the objective's `teacher` names."""
    start: Config | None
    """Of the weights before the first step, where a frozen copy of them answers beside the policy.
    """
    rewards: "Rewards | None" = None
    """What completions are worth, where the run samples some."""
    turns: Turns | None = None
    """What stands between the turns of a completion, where an environment answers them."""


@dataclass(frozen=True)
class ModelFacts:
    """What is known of the model without its weights."""

    num_parameters: int
    num_trainable: int
    why_all_logits: str | None
    """Why the head must hold all logits in memory at once; None if it need not."""
    checkpoint_bytes: float
    """What one checkpoint takes on the disk, about."""
    export_bytes: float
    """What the exported model takes."""


def prepare(
    config: Config, topology: Topology, date: str | None = None, may_start_early: bool = False
) -> Data:
    """Read, check, tokenise and order the rows. Raise UserError for wrong rows or settings.

    `date`: day of the run's first start, as 2026-11-26, for templates that write it; None: today.
    `may_start_early`: training may start before all shards of data.streaming are made.
    """
    _require_packages(config, topology)
    remote.keep_in(config.cache_dir)
    wanted, objective = _in_format(config), chosen(config)
    # Before anything is fetched from the Hub
    sources, format = _checked_rows(wanted, topology, config.rollouts is not None)
    model_config, tokenizer = _config_and_tokenizer(config)
    # Now, because building a model completes its config, and only some processes build one.
    architecture = base_identity.architecture(model_config)
    model_config = load.complete(model_config, config.model, tokenizer)
    kernel = _attention(config, model_config, topology)
    teaches = _teacher(config, model_config, tokenizer, kernel, topology)
    start = companion.start_of(config, objective)
    reader = _reader(config, objective, sources, format, model_config, tokenizer, date)
    early = topology.is_first_of_node if may_start_early and _starts_early(config) else None
    found = reader.streamed(early) if wanted.streaming else reader.in_memory()
    train, evals, known, num_rows = found
    # Not `if part`: the length of a stream is known when its last shard is made.
    both = [part for part in (train, evals) if part is not None]
    for part in both:
        _attach_taught(part, config, model_config)
    families.set_labels(model_config, train.examples.labels)
    if families.of(config) == families.SCORES:
        _part_padding(model_config, tokenizer, [part.examples for part in both])
    options = reader.options
    template = _with_example(reader.template, config, objective, train, sources, options)
    plays = config.rollouts and config.rollouts.environment
    turns = Turns(template, tokenizer, wanted.special_tokens_in_text) if plays else None
    _rehearse_export(config, topology, tokenizer, model_config, template)
    train_batches, eval_batches = _batched(
        config, topology, objective, train, evals, kernel, tokenizer
    )
    num_steps = min(natural_steps(config, train_batches), config.train.max_steps or sys.maxsize)
    parts = [part.examples for part in both]
    _check_lengths_for_all(parts, config, model_config, teaches)
    check_warmup(config, num_steps)
    topology.on_every(lambda: _rehearse_objective(config, objective, train_batches))
    rewards = topology.on_every(lambda: _rewards(config, topology, parts))
    for each in filter(None, (train_batches, eval_batches)):
        _require_rated(config, objective, each, each is eval_batches)
    identity = {
        **_identity(train_batches, eval_batches, tokenizer, template), "model": architecture,
        **code_identity(config), **(rewards.identity() if rewards else {}),
    }  # fmt: skip
    new_ids = tokenizer.convert_tokens_to_ids(config.model.new_tokens)
    return Data(
        tokenizer, template, model_config, kernel, train_batches, eval_batches, num_steps, new_ids,
        sources, known, identity, format, num_rows, options, _columns(wanted, sources, format),
        teaches, start, rewards, turns,
    )  # fmt: skip


def _reader(
    config: Config, objective: Objective, sources: Sources, format: str, model_config: Any,
    tokenizer: Any, date: str | None,
) -> sequences.Reader:  # fmt: skip
    """Return what makes tokens of the rows: options, template and view of the objective."""
    wanted = _in_format(config)
    options = _options(config, wanted, objective, model_config)
    if config.rollouts and not options.is_own:
        options = replace(options, format=format)
    template = _template(wanted, "text" if options.framed else format, tokenizer, date)
    template = replace(template, advice=options.advice)
    if objective.has_turns:
        template = tokens.with_bos(template, tokenizer)
    start_id = load.decoder_start(model_config, config.model, tokenizer)
    view = objective.view(config.objective, Encoding(tokenizer, config.run.seed, start_id))
    if wanted.streaming:  # a shard may not show the format
        options = _for_shards(options, sources, format)
    return sequences.Reader(config, sources, template, tokenizer, options, view)


def _with_example(
    template: templates.Template, config: Config, objective: Objective, train: Any,
    sources: Sources, options: tokenised.Options,
) -> templates.Template:  # fmt: skip
    """Return the template with what the rows have shown of it: an opening, a row that it takes."""
    template = replace(template, learn_opening=train.examples.learn_opening)
    if not objective.has_turns:
        return template
    example = (
        train.examples.answered() if config.rollouts
        else tokenised.first_that_fits(sources.train, template, options)
    )  # fmt: skip
    return replace(template, example=example)


def _require_rated(
    config: Config, objective: Objective, given: batches.Batches, evaluates: bool
) -> None:
    """Check answers that the objective compares or judges; give KTO its mismatched documents.

    `given`: of training or, where `evaluates`, of evaluation.
    """
    kind = objective_kind(config.objective.kind)
    if kind.rates:
        pairs.require(given.in_memory.examples, kind.compares)
    if kind.rates and not (kind.compares or evaluates):
        pairs.require_both(given.in_memory.examples, config.objective.kind)
    if objective.mismatches(config.objective):
        beside = mismatched(given.in_memory.examples, config.data.max_length, config.run.seed)
        given.mismatched = given.with_examples(beside)


def _identity(
    train: batches.Batches, evals: batches.Batches | None, tokenizer: Any,
    template: templates.Template,
) -> dict[str, Any]:  # fmt: skip
    """Return fingerprints of the data; a resuming run must find the same."""
    return {
        "training data": train.fingerprint,
        "evaluation data": evals.fingerprint if evals else "none",
        "tokenizer": tokens.tokenizer_fingerprint(tokenizer), "template": template.fingerprint,
        "date in the template": template.date or "none",
    }  # fmt: skip


def _known_labels(config: Config, model_config: Any) -> tuple[str, ...]:
    """Return the labels of objective.labels, or of a model that is such a classifier already."""
    family, given = families.of(config), getattr(config.objective, "labels", None)
    saved = families.labels_of(model_config) if config.model.init == "pretrained" else None
    if saved is None or families.of_saved(model_config) != family:
        return tuple(given or ())
    if given and len(given) != len(saved):
        raise ConfigError(
            f"objective.labels: names {len(given)} labels, but the model has {len(saved)}: "
            f"{list_columns(saved)}; give as many, or leave the setting out"
        )
    return tuple(given or saved)


def _in_format(config: Config) -> config_fields.Data:
    """Return the settings of the data with the format of an objective that reads only one."""
    wanted, kind = config.data, objective_kind(config.objective.kind)
    formats = kind.formats
    if wanted.format != "auto" or not (kind.rates or len(formats) == 1):
        return wanted
    return wanted.model_copy(update={"format": formats[0]})


def _options(
    config: Config, wanted: config_fields.Data, objective: Objective, model_config: Any
) -> tokenised.Options:
    return tokenised.Options(
        wanted.format, wanted.columns, wanted.text_unit, wanted.system_prompt,
        objective.supervises(wanted.loss_on), wanted.max_length, wanted.truncation,
        _positions(model_config), wanted.repair_turns, _skipping(wanted),
        framed=objective_kind(config.objective.kind).is_framed,
        special_tokens_in_text=wanted.special_tokens_in_text, thinking=wanted.thinking,
        labels=_known_labels(config, model_config),
        source_prefix=getattr(config.objective, "source_prefix", ""), advice=_advice(config),
    )  # fmt: skip


def _advice(config: Config) -> Advice:
    """Return what errors about rows may advise: what the objective takes."""
    kind = objective_kind("grpo" if config.rollouts else config.objective.kind)
    if not config.rollouts and chosen(config).supervises("completion") == "all":
        kind = objective_kind("clm")
    found = Advice(kind.loss_on, kind.truncation, not kind.rates)
    if isinstance(config.objective, Distill):
        return replace(found, plain_text="set data.format: text, to learn every token of it")
    return found


def _for_shards(options: tokenised.Options, sources: Sources, format: str) -> tokenised.Options:
    """Return the options with the format and the fields that the first row has."""
    if not options.is_own:
        return replace(options, format=format)
    names, skips = list(sources.train), options.skipping.skips
    shape = rows.own_shape(names, options.text_unit, options.columns, options.format, skips)
    return replace(options, shape=shape)


def _part_padding(model_config: Any, tokenizer: Any, parts: Sequence[Any]) -> None:
    """Take a pad token that ends no document: the class of a reward model reads the one before."""
    ends = {int(each) for p in parts for each in np.unique(p.input.ids[p.input.ends - 1])}
    load.part_padding(tokenizer, ends)
    model_config.get_text_config().pad_token_id = tokenizer.pad_token_id


def _columns(wanted: config_fields.Data, sources: Sources, format: str) -> str:
    """Return the columns that are read; a user's own function reads its own."""
    if own_code.is_own(wanted.format):
        return ""
    return rows.columns_read(next(iter(sources.train)), wanted.text_unit, wanted.columns, format)


def natural_steps(config: Config, train: batches.Batches) -> int:
    """Return the steps of train.epochs; a part of an epoch is rounded up to a step."""
    if train.starts_early:
        return config.train.max_steps or sys.maxsize
    return math.ceil(train.steps_per_epoch * config.train.epochs - 1e-9)


def _starts_early(config: Config) -> bool:
    """Return whether the run needs no more than the first window of its shards to start.

    The number of its steps has to be known, and so has what it logs and holds out of all rows.
    """
    data = config.data
    return bool(
        data.window_gb
        and config.train.max_steps
        and not data.eval_fraction
        and data.on_bad_row == "error"
    )


def _config_and_tokenizer(config: Config) -> tuple[Any, Any]:
    # The config first: transformers reads the tokenizer by it.
    model_config = load.load_config(config.model, config.objective.kind)
    tokenizer = load.load_tokenizer(config.model, families.of(config))
    load.check_config_vocabulary(model_config, tokenizer, config.model)
    return model_config, tokenizer


def _require_packages(config: Config, topology: Topology) -> None:
    """Raise ConfigError for a package that the config needs and this environment lacks."""
    kernels.require_known()
    if config.adapter.kind == "qlora":
        extras.require("bitsandbytes", "adapter.kind: qlora")
    if optim.needs_bitsandbytes(config.optimizer.kind):
        extras.require("bitsandbytes", f"optimizer.kind: {config.optimizer.kind}")
    topology.on_main(lambda: trackers.check(config.tracking.trackers, config.tracking.wandb_mode))


def _checked_rows(
    wanted: config_fields.Data, topology: Topology, asks: bool = False
) -> tuple[Sources, str]:
    """Return the files to read and the format of their rows. Raise UserError for wrong ones.

    `asks`: rows are prompts, whose answers are not learned.
    """
    sources = source_files.sources(wanted.train, wanted.eval)
    files = [*sources.train, *sources.eval]
    if wanted.text_unit != "line" and not any(map(file_types.is_text, files)):
        why = "no source is a .txt or .md file"
        raise ConfigError(f"data.text_unit: would be ignored: {why}; remove it")
    format: str = wanted.format
    if format == "auto" or own_code.is_own(format):
        format = rows.detect_format(
            files, wanted.text_unit, wanted.columns, not asks, format=format,
            skips=wanted.on_bad_row == "skip",
        )  # fmt: skip
    if asks and format == "text":
        raise ConfigError(
            f"{files[0]}: rows of text ask nothing, and the objective completes prompts; give rows "
            "with a column prompt (docs/reinforcement.md)"
        )
    if asks:  # `prompts.prepare` checks all of them
        return sources, format
    groups = [list(names) for names in (sources.train, sources.eval) if names]
    topology.on_main(
        lambda: rows.check(
            groups, wanted.format, wanted.columns, wanted.text_unit, wanted.system_prompt,
            skipping=_skipping(wanted), repair_turns=wanted.repair_turns,
        )
    )  # fmt: skip
    return sources, format


def _skipping(wanted: config_fields.Data) -> Skipping:
    return Skipping(wanted.on_bad_row == "skip", wanted.max_bad_fraction)


def _attention(config: Config, model_config: Any, topology: Topology) -> str:
    """Choose the attention kernel. Raise UserError for settings that do not fit the model."""
    # Only a base on the Hub can fail here: a folder's config was checked with the run's config.
    for problem in base.settled(config, model_config.to_dict())[1]:
        raise ModelError(problem)
    kernel = attention_choice.choose(
        config.model.attention, families.model_class(model_config, families.of(config)),
        model_config, topology.device, topology.precision, topology.parallel.num_context,
        families.of(config),
    )  # fmt: skip
    if config.data.packing and attention_choice.is_padded(kernel):
        raise ConfigError(
            f"data.packing: {model_config.model_type} can only train padded batches ({kernel}); "
            "set it to false"
        )
    return kernel


def _teacher(
    config: Config, model_config: Any, tokenizer: Any, kernel: str, topology: Topology
) -> teacher.Teacher | None:
    """Return the teacher that the objective names. Raise UserError if it does not fit the model."""
    if getattr(config.objective, "teacher", None) is None:
        return None
    found = teacher.prepare(
        config, tokenizer, kernel, topology.device, topology.precision,
        topology.parallel.num_context,
    )  # fmt: skip
    if isinstance(found.config.adapter, Quantized):
        extras.require("bitsandbytes", f"{teacher.KEY}: its weights in 4 or 8 bits")
    if config.rollouts:
        teacher.require_rows(model_config, found)
    return found


def _attach_taught(part: Any, config: Config, model_config: Any) -> None:
    """Give the examples of sequences what their rows hold of a teacher, if no model is one."""
    objective = config.objective
    if not isinstance(objective, Distill):
        return
    if objective.teacher is not None:
        if taught.COLUMN in part.examples.unread:
            raise ConfigError(
                f"objective.teacher: rows hold what a teacher said (column {taught.COLUMN}), which "
                "a model as the teacher would leave unread; set objective.teacher to null, or take "
                "rows without that column"
            )
        return
    size = model_config.get_text_config().vocab_size
    found = taught.columns(part.examples, config.data.text_unit, objective.temperature, size)
    unread = {name: n for name, n in part.examples.unread.items() if name != taught.COLUMN}
    part.examples = replace(part.examples, token_columns=found, unread=unread)


def _template(
    wanted: config_fields.Data, format: str, tokenizer: Any, date: str | None
) -> templates.Template:
    given = {
        "data.template": wanted.template != "auto",
        "data.template_arguments": bool(wanted.template_arguments),
        "data.system_prompt": wanted.system_prompt is not None,
    }
    if format == "text" and any(given.values()):
        names = ", ".join(name for name, is_given in given.items() if is_given)
        raise ConfigError(f"{names}: would be ignored: rows of text have no turns; remove it")
    return load_template(
        wanted.template, format, tokenizer.chat_template, tokenizer.special_tokens_map,
        tokenizer.get_added_vocab(), date, wanted.template_arguments,
    )  # fmt: skip


def _batched(
    config: Config, topology: Topology, objective: Objective, train: Any, evals: Any, kernel: str,
    tokenizer: Any,
) -> tuple[batches.Batches, batches.Batches | None]:  # fmt: skip
    """Return the batches of training and of evaluation."""
    seed = config.run.seed
    padded, pad_id = attention_choice.is_padded(kernel), tokenizer.pad_token_id or 0

    def batched(sequences: Any, size: int, micro_size: int, group: bool) -> batches.Batches:
        return batches.Batches(
            sequences, seed=seed, global_batch_size=size, micro_batch_size=micro_size,
            group_by_length=group, rank=topology.data_rank, num_processes=topology.num_data,
            padded=padded, pad_id=pad_id,
            shares_beginnings=objective.shares_beginnings and topology.parallel.num_context == 1,
        )  # fmt: skip

    size, micro_size = config.train.global_batch_size, config.micro_batch_size
    if config.rollouts:
        of_both = [
            Asked(
                each, objective, config.objective, seed=seed, global_batch_size=size,
                micro_batch_size=micro_size, rank=topology.data_rank,
                num_processes=topology.num_data, padded=padded, pad_id=pad_id,
            )
            for each in (train, evals) if each is not None
        ]  # fmt: skip
        return of_both[0], of_both[1] if evals is not None else None
    of_train = batched(train, size, micro_size, config.data.group_by_length)
    if evals is None:
        return of_train, None
    at_once = config.evaluation.micro_batch_size or config.micro_batch_size
    # What an objective prepares is of a step: the same however it is cut up and shared.
    of_step = size if objective.prepares else at_once * topology.num_data
    return of_train, batched(evals, of_step, at_once, True)


def _rehearse_export(
    config: Config, topology: Topology, tokenizer: Any, model_config: Any,
    template: templates.Template,
) -> None:  # fmt: skip
    """Raise UserError for what the export could not save, and for prompts without tokens."""
    model, kept = config.model, template if chosen(config).has_turns else None
    of_base = Base(model.path, model.revision, model.trust_remote_code)
    system_prompt = config.data.system_prompt
    topology.on_main(lambda: rehearse(tokenizer, model_config, of_base, kept, system_prompt))
    _check_sample_prompts(config, kept, tokenizer)


def _rewards(config: Config, topology: Topology, parts: Sequence[Any]) -> "Rewards | None":
    """Return the rewards of a run that samples. Raise UserError for what is wrong with them."""
    if not config.rollouts:
        return None
    from finetune.rollouts.rewards import Rewards  # which imports all scores

    settings: Any = config.objective
    made = Rewards(settings.rewards or (), log if topology.is_main else lambda text: None)
    made.check(prompt for part in parts for prompt in part.every_prompt())
    return made


def _rehearse_objective(config: Config, objective: Objective, train: batches.Batches) -> None:
    if isinstance(objective, Own):
        made = train.largest() if config.rollouts else train.of_all().at(0)[0]
        first, filler = (with_blank_reference(each) for each in (made, train.filler()))
        objective.rehearse(first, filler, config.objective, config.adapter.kind != "full")


def _positions(model_config: Any) -> int | None:
    """Return how many tokens a sequence may have; None for models without that limit.

    Such models have no `max_position_embeddings`, or -1.
    """
    if getattr(model_config, "axial_pos_embds", False):  # of Reformer, which then pads nothing
        shape = " x ".join(map(str, model_config.axial_pos_shape))
        raise ConfigError(
            f"model.config: {model_config.model_type} with axial_pos_embds trains only on "
            f"sequences of exactly {shape} tokens (axial_pos_shape), and rows have their own "
            "lengths; set axial_pos_embds: false for a new model, or use another model"
        )
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is None or positions <= 0:
        return None
    first = families.first_position(model_config)
    if positions <= first:
        raise ConfigError(
            f"model.config: {model_config.model_type} counts positions from its pad token, "
            f"{first - 1}, so max_position_embeddings must be more than {first}; it is {positions}"
        )
    return positions - first


def check_lengths(parts: Sequence[Any], config: Config, model_config: Any) -> None:
    """Raise ConfigError for too few positions in the model, also for rows of the evaluation."""
    positions = _positions(model_config)
    for part in parts:
        longest, where, num_documents = part.longest_document()
        if positions is not None and positions < longest:
            raise ConfigError(
                f"data.max_length: {where} has {longest} tokens, but the model has only "
                f"{positions} positions (max_position_embeddings); "
                + tokenised.fitting(
                    longest, config.data.max_length, positions, _advice(config), num_documents
                )
            )


def _check_lengths_for_all(
    parts: Sequence[Any], config: Config, model_config: Any, teaches: teacher.Teacher | None
) -> None:
    """Raise DataError for documents that are too long for the model, or for its teacher."""
    check_lengths(parts, config, model_config)
    if teaches is not None:
        with teacher.named():
            check_lengths(parts, config, teaches.model_config)


def check_warmup(config: Config, num_steps: int) -> None:
    """Raise ConfigError for a warm-up that takes all steps."""
    if (warmup := optim.warmup_steps(config.schedule, num_steps)) >= num_steps:
        key = "warmup_steps" if config.schedule.warmup_steps else "warmup_ratio"
        raise ConfigError(
            f"schedule.{key}: {warmup} of {num_steps} steps: "
            "the learning rate would never reach optimizer.lr; lower it"
        )


def _check_sample_prompts(
    config: Config, template: templates.Template | None, tokenizer: Any
) -> None:
    """Raise ConfigError for a prompt of evaluation.sample_prompts without tokens."""
    for prompt in config.evaluation.sample_prompts:
        text = tokens.sample_prompt(template, tokenizer, prompt, config.data.system_prompt)
        if not tokens.encode_prompt(text, tokenizer):
            raise ConfigError(f"evaluation.sample_prompts: {prompt!r} has no tokens; remove it")


def check_model(config: Config, data: Data) -> ModelFacts:
    """Build the model without memory for its weights, to check and count it.

    Raises ModelError if architecture, vocabulary and adapters do not fit each other, and
    ConfigError for learning rates that would have no effect.
    """
    family, kernel = families.of(config), data.attention
    if not attention_choice.is_padded(kernel):
        kernel = attention_choice.of_documents(family)
    skeleton = load.skeleton(config.model, data.model_config, data.tokenizer, kernel, family=family)
    load.check_shapes(skeleton)
    load.check_weights(skeleton, config.model)
    recompute.chosen(skeleton, config.train.gradient_checkpointing)
    if config.train.float8:
        float8.large_products(skeleton)
    new_ids = data.new_token_ids
    adapted = adapters.apply(skeleton, config.adapter, config.model, new_token_ids=new_ids)
    scalar_heads.attach(skeleton, chosen(config).heads)
    trainable, total = parameters.count(adapted)
    _check_rates(config, skeleton, data.num_steps)
    counted = weights.count(adapted, config, FLOAT32)
    half = 0.5 if config.trains_in_16_bits else 1.0  # the skeleton is in float32
    optimizer = counted.optimizer * (half if OPTIMIZERS[config.optimizer.kind].bits is None else 1)
    averages = FLOAT32 * trainable if config.train.ema_decay else 0
    return ModelFacts(
        total, trainable, head.probe(skeleton)[1], half * counted.trained + optimizer + averages,
        half * counted.stored if config.adapter.kind == "full" else counted.trained,
    )  # fmt: skip


def _check_rates(config: Config, skeleton: Any, num_steps: int) -> None:
    """Raise ConfigError for learning rates that would have no effect."""
    trains_both = adapters.trains_embedding_and_head(skeleton)
    if config.optimizer.embedding_lr is not None and not trains_both:
        raise ConfigError(
            "optimizer.embedding_lr: would be ignored: the embedding and the head are frozen; "
            "remove it"
        )
    fastest = num_steps**-0.5
    if config.optimizer.kind == "adafactor" and config.optimizer.lr > fastest:
        raise ConfigError(
            "optimizer.lr: adafactor never steps by more than 1 / sqrt(step), so the schedule of "
            f"{config.optimizer.lr:g} would be overridden in a run of {num_steps} steps; take at "
            f"most {fastest:.2g}"
        )
