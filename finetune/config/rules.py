"""Settings that exclude each other, or that another setting would ignore."""

import difflib
import json
import os
from collections.abc import Iterator

from finetune import own_code
from finetune.config import reinforcement_rules, rollout_rules
from finetune.config.choices import (
    CLASSIFIERS,
    DECODERS,
    FAMILIES,
    NEW_HEADS,
    OBJECTIVES,
    OPTIMIZERS,
    PADDED_FAMILIES,
    QUANTIZATIONS,
    RATED,
    REFERENCE,
    objective_kind,
)
from finetune.config.fields import COLUMNS, PADDED_ATTENTION, Config, Full, Lora, QLora
from finetune.config.objective_fields import (
    Distill,
    Dpo,
    Kto,
    PolicyGradient,
    Ppo,
    ProcessReward,
    Reward,
)
from finetune.config.own import OwnObjective

PLACES = (
    ("run", "dir"), ("model", "path"), ("model", "tokenizer"), ("adapter", "path"),
    ("data", "cache_dir"), ("data", "shards"), ("checkpoint", "storage"),
    ("objective", "teacher"),
)  # fmt: skip
# Defaults that ask for nothing, so that writing them out does no harm.
NOTHING: tuple[object, ...] = (None, False, 0, [], {}, "none", "auto", "default")
# Settings that the adapter in adapter.path decides.
# Losses of dpo that think some pairs swapped, and those that do not take the margin of a pair.
NOISY = ("robust", "exo_pair")
BY_ANSWER = ("nca_pair", "bco_pair", "sppo_hard", "apo_zero", "apo_down")
SHAPE = (
    "r", "alpha", "dropout", "target_modules", "rslora", "dora", "init", "modules_to_save",
)  # fmt: skip


def conflicts(config: Config) -> Iterator[str]:
    """List settings that cannot work together, or that this run would ignore."""
    yield from _blanks(config)
    yield from _model_conflicts(config)
    yield from _adapter_conflicts(config)
    yield from _optimizer_conflicts(config)
    yield from _objective_conflicts(config)
    yield from _family_conflicts(config)
    yield from _data_conflicts(config)
    yield from _schedule_conflicts(config)
    yield from _evaluation_conflicts(config)
    yield from _batch_conflicts(config)
    yield from _float8_conflicts(config)
    yield from _memory_conflicts(config)
    yield from _tracking_conflicts(config)


def _blanks(config: Config) -> Iterator[str]:
    """List blank paths: some would mean the current folder, others nothing."""
    for section, name in PLACES:
        value = getattr(getattr(config, section), name, None)
        if isinstance(value, str) and not value.strip():
            yield f"{section}.{name}: is empty; name a folder, or remove it"


def _model_conflicts(config: Config) -> Iterator[str]:
    model, adapter = config.model, config.adapter
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
        why = "nothing is loaded from the Hub"
        yield from _ignored(config, why, "model.revision", "model.trust_remote_code")
    if model.path is not None and os.path.isdir(model.path):
        yield from _ignored(config, "model.path is a folder", "model.revision")
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
    needs_heads = isinstance(objective, Ppo) or (
        isinstance(objective, OwnObjective) and set(objective.objective.needs) - {REFERENCE}
    )
    if not (needs_heads or objective_kind(objective.kind).family in NEW_HEADS):
        why = f"objective.kind: {name} has no value or score head in its `needs`"
        yield from _ignored(config, why, "optimizer.head_lr")
    if isinstance(objective, OwnObjective):
        has_turns = objective.objective.has_turns
        trains_on_all = objective.objective.supervises("completion") == "all"
    else:
        trains_on_all = objective.kind == "clm" or config.distills_text
        has_turns = not trains_on_all
    if isinstance(objective, PolicyGradient):
        yield from reinforcement_rules.conflicts(objective, config.adapter)
    if isinstance(objective, Distill):
        yield from _distill_conflicts(config, objective)
    if config.rollouts:
        yield from rollout_rules.conflicts(config, config.rollouts)
        return
    if data.format == "prompt":
        instead = "give rows with answers"
        if isinstance(objective, Distill):
            instead += ", or add objective.rollouts, to learn the model's own"
        yield (
            f"data.format: prompt has no answers that objective.kind: {name} could learn; {instead}"
        )
    if objective_kind(objective.kind).is_framed:
        yield from _conflicts_of_rows(config)
        return
    if objective_kind(objective.kind).rates:
        yield from _preference_conflicts(config)
        return
    if trains_on_all:
        of_text = " of rows of text" if config.distills_text else ""
        why = f"objective.kind: {name} trains on every token{of_text}"
        yield from _ignored(config, why, "data.loss_on")
    elif data.truncation == "split":
        why = "would cut answers from their prompts; use it with objective.kind: clm"
        yield f"data.truncation: split {why}"
    if data.format in RATED and not isinstance(objective, OwnObjective):
        yield (
            f"data.format: {data.format} gives answers that are rated, and objective.kind: {name} "
            "would learn bad ones as good; use an objective of your own (docs/objectives.md), or "
            "choose the good answers with data.columns, as {completion: chosen}"
        )
    if data.format == "text" and has_turns:
        why = "needs prompts and answers, but data.format is text; use clm, or distill"
        yield f"objective.kind: {name} {why}"


def _distill_conflicts(config: Config, objective: Distill) -> Iterator[str]:
    """List settings that do not fit where the teacher's distributions, or its tokens, come from."""
    if objective.rollouts is None and objective.rewards is not None:
        yield "objective.rewards: would be ignored without objective.rollouts; remove it"
    if objective.rollouts and objective.sft_weight:
        yield (
            "objective.sft_weight: the rows' own answers are not learned with objective.rollouts, "
            "and the model's would become likelier as they are; remove it"
        )
    if objective.rollouts and objective.teacher is None:
        yield (
            "objective.rollouts: the rows hold no distributions for new completions; name a model "
            "in objective.teacher"
        )
    if (
        objective.rollouts
        and not objective.rewards
        and (config.data.eval or config.data.eval_fraction)
    ):
        yield (
            "objective.rewards: an evaluation of completions needs what they are worth; add it, or "
            "remove data.eval and data.eval_fraction"
        )
    yield from _minillm_conflicts(objective)
    if objective.teacher is None:
        why = "the column teacher of the rows has what the teacher said"
        yield from _ignored(
            config,
            why,
            "objective.teacher_revision",
            "objective.teacher_dtype",
            "objective.teacher_quantization",
        )
        if config.data.streaming:
            yield (
                "data.streaming: distributions stored in rows have to be in memory; set it to "
                "false, or name a teacher"
            )
        return
    if os.path.isdir(objective.teacher):
        yield from _ignored(config, "objective.teacher is a folder", "objective.teacher_revision")


def _minillm_conflicts(objective: Distill) -> Iterator[str]:
    """List settings that do not fit the reverse KL of whole completions."""
    rollouts = objective.rollouts
    if objective.loss != "minillm":
        if not objective.length_normalization:
            yield (
                "objective.length_normalization: would be ignored: it is for objective.loss: "
                "minillm alone; remove it"
            )
        return
    if rollouts is None:
        yield (
            "objective.loss: minillm learns from completions of the model; add "
            "objective.rollouts, as {max_new_tokens: 512}"
        )
        return
    if objective.beta != 1.0:
        yield (
            f"objective.beta: {objective.beta:g}, but objective.loss: minillm minimises the "
            "reverse KL; set it to 1.0"
        )
    if objective.temperature != rollouts.temperature:
        yield (
            f"objective.temperature: {objective.temperature:g}, but completions are sampled at "
            f"{rollouts.temperature:g} (objective.rollouts.temperature), so objective.loss: "
            "minillm would follow the gradient of neither; make them equal"
        )


def _preference_conflicts(config: Config) -> Iterator[str]:
    """List settings that do not fit an objective of rated answers."""
    data, objective = config.data, config.objective
    row = objective_kind(objective.kind)
    if data.format not in ("auto", *row.formats) and not own_code.is_own(data.format):
        does = "compares" if row.compares else "judges"
        yield (
            f"data.format: {data.format}, but objective.kind: {objective.kind} {does} answers "
            f"and reads {' or '.join(row.formats)}; set it to auto"
        )
    if data.truncation == "split":
        yield "data.truncation: split would part answers from their prompts; use drop"
    if data.truncation in ("right", "left"):
        what = "pairs of answers differ in" if row.compares else "a label judges as a whole"
        yield f"data.truncation: {data.truncation} would cut what {what}; use drop"
    if isinstance(objective, Kto) and data.loss_on in ("each_turn", "all"):
        yield (
            f"data.loss_on: {data.loss_on}: a label judges answers; take completion, or last_turn "
            "for the last answer alone"
        )
    if isinstance(objective, ProcessReward):
        why = f"objective.kind: {objective.kind} scores answers as a whole"
        yield from _ignored(config, why, "data.loss_on")
    if row.compares and data.loss_on != "completion":
        yield (
            f"data.loss_on: would be ignored: objective.kind: {objective.kind} compares the turns "
            "in which the answers differ; remove it"
        )
    if data.thinking == "drop":
        yield (
            f"data.thinking: drop may remove what answers differ in; objective.kind: "
            f"{objective.kind} needs them whole; set it to keep"
        )
    if data.streaming:
        yield (
            f"data.streaming: objective.kind: {objective.kind} compares rows before the first "
            "step, for which they have to be in memory; set it to false"
        )
    why = "turns of rated answers stay as they are; correct the rows"
    yield from _ignored(config, why, "data.repair_turns")
    if "margin" in data.columns and not isinstance(objective, Reward):
        yield (
            f"data.columns: margin would be ignored: objective.kind: {objective.kind} takes none; "
            "remove it"
        )
    if row.family == "scores" and config.evaluation.sample_prompts:
        yield "evaluation.sample_prompts: a reward model does not write answers; remove it"
    if isinstance(objective, Dpo):
        yield from _pair_loss_conflicts(config, objective)


def _pair_loss_conflicts(config: Config, objective: Dpo) -> Iterator[str]:
    """List settings that the loss of a pair would ignore."""
    loss = objective.loss
    if loss in NOISY and not objective.swap_probability:
        yield (
            f"objective.swap_probability: objective.loss: {loss} needs a number above 0, such as "
            f"{'0.1' if loss == 'robust' else '0.001'}"
        )
    if loss not in NOISY:
        why = f"objective.loss: {loss} takes pairs as they are"
        yield from _ignored(config, why, "objective.swap_probability")
    if loss in BY_ANSWER:
        why = f"objective.loss: {loss} measures each answer by itself"
        yield from _ignored(config, why, "objective.divergence")
    if loss != "discopop":
        yield from _ignored(config, "only discopop has it", "objective.discopop_tau")
    if objective.divergence != "alpha_divergence":
        why = f"objective.divergence: {objective.divergence} has no order"
        yield from _ignored(config, why, "objective.divergence_alpha")


def _conflicts_of_rows(config: Config) -> Iterator[str]:
    """List settings of `data` that do not fit an objective with rows of its own."""
    data, kind = config.data, config.objective.kind
    row = OBJECTIVES[kind]
    is_text, listed = row.formats == ("text",), " or ".join(row.formats)
    is_own = own_code.is_own(data.format)
    if data.format not in ("auto", *row.formats) and not (is_own and is_text):
        name = own_code.without_folder(data.format)
        yield f"data.format: {name}, but objective.kind: {kind} reads {listed}; set it to auto"
    why = f"objective.kind: {kind} learns {row.learns}, without a template"
    names = ["loss_on", "template", "system_prompt", "thinking"]
    names += ["repair_turns"] if kind != "seq2seq" else []
    yield from _ignored(config, why, *(f"data.{name}" for name in names))
    if data.truncation == "split" and not is_text:
        why = f"would cut what objective.kind: {kind} learns together; use right or drop"
        yield f"data.truncation: split {why}"
    if data.packing and row.family in PADDED_FAMILIES:
        why = f"objective.kind: {kind} trains {FAMILIES[row.family]}, in padded batches"
        yield f"data.packing: {why}; set it to false, and data.group_by_length to true"
    if config.evaluation.sample_prompts and row.family != "seq2seq":
        yield f"evaluation.sample_prompts: {FAMILIES[row.family]} does not write answers; remove it"


def _family_conflicts(config: Config) -> Iterator[str]:
    """List settings that models of some families cannot have."""
    kind, adapter = config.objective.kind, config.adapter.kind
    family = objective_kind(kind).family
    if adapter == "qlora" and family in CLASSIFIERS:
        yield (
            f"adapter.kind: qlora would quantise the new head that objective.kind: {kind} trains; "
            "use lora"
        )
    if adapter != "full" and config.model.new_tokens and family not in DECODERS:
        yield (
            "model.new_tokens: cannot train beside adapters in a model whose parts share one "
            f"embedding, as objective.kind: {kind} trains; use adapter.kind: full"
        )
    labels = getattr(config.objective, "labels", None)
    if labels is not None and (len(labels) < 2 or len(set(labels)) < len(labels)):
        yield f"objective.labels: give two or more, each once, got {labels}"


def _data_conflicts(config: Config) -> Iterator[str]:
    data, model = config.data, config.model
    if data.on_bad_row == "error":
        yield from _ignored(config, "data.on_bad_row: error takes none", "data.max_bad_fraction")
    if data.format == "text" and not objective_kind(config.objective.kind).is_framed:
        why = "rows of text have no turns"
        yield from _ignored(
            config, why, "data.template", "data.template_arguments", "data.system_prompt"
        )
    try:
        json.dumps(data.template_arguments, allow_nan=False)
    except (TypeError, ValueError):
        yield (
            "data.template_arguments: holds a value that JSON has not, such as a date or .nan; use "
            "text in quotes, numbers, true, false, null, lists and mappings"
        )
    if own_code.is_own(data.format):
        name = own_code.without_folder(data.format)
        why = f"{name} reads the columns of the file itself; rename them there"
        yield from _ignored(config, why, "data.columns")
    for name in data.columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            listed = f"the columns are {', '.join(COLUMNS)}"
            hint = f"did you mean {near[0]}?" if near else listed
            yield f"data.columns: no format has a column {name!r}; {hint}"
    for key, names in (("weights", data.weights), ("token_budgets", data.token_budgets)):
        for name in names:
            if name not in _listed(data.train):
                listed = ", ".join(_listed(data.train))
                yield f"data.{key}: {name} is not a name of data.train, which has {listed}"
    for name in data.weights.keys() & data.token_budgets.keys():
        yield f"data.token_budgets: {name} has a weight in data.weights, too; remove one of them"
    sources = [*_listed(data.train), *_listed(data.eval)]
    if not any(_may_hold_text(source) for source in sources):
        yield from _ignored(config, "no source is a .txt or .md file", "data.text_unit")
    if data.eval is not None:
        yield from _ignored(config, "data.eval gives the evaluation rows", "data.eval_fraction")
    if data.packing and model.attention in PADDED_ATTENTION:
        why = "packed documents would see each other; use auto"
        yield f"data.packing: with model.attention: {model.attention} {why}"
    if data.streaming:
        yield from _streaming_conflicts(config)
    else:
        why = "data.streaming is false"
        yield from _ignored(config, why, "data.window_gb", "data.shards")
    if data.packing and data.group_by_length:
        yield "data.group_by_length: would be ignored: data.packing fills every sequence; remove it"


def _streaming_conflicts(config: Config) -> Iterator[str]:
    """List settings that would need all rows at once."""
    instead = {
        "weights": "mix the rows into one file first: finetune data mix",
        "token_budgets": "mix the rows into one file first: finetune data mix",
        "max_rows": "draw the rows into a file first: finetune data sample",
        "group_by_length": "remove it; data.packing leaves no padding",
    }
    for name, remedy in instead.items():
        if getattr(config.data, name):
            yield f"data.{name}: cannot be used with data.streaming; {remedy}"
    if config.data.shards is not None and "://" not in config.data.shards:
        yield (
            f"data.shards: {config.data.shards} has no protocol such as s3://; for a folder use "
            "data.cache_dir"
        )
    if config.data.shards is not None and config.data.eval_fraction:
        yield (
            "data.eval_fraction: each evaluation would fetch every shard of data.shards; give the "
            "evaluation rows in data.eval (finetune data split)"
        )


def _memory_conflicts(config: Config) -> Iterator[str]:
    if config.train.gradient_checkpointing is False:
        why = "train.gradient_checkpointing: false keeps no inputs to recompute from"
        yield from _ignored(config, why, "train.activation_offload")


def _schedule_conflicts(config: Config) -> Iterator[str]:
    schedule = config.schedule
    if schedule.kind in ("constant", "inverse_sqrt"):
        why = f"schedule.kind: {schedule.kind} has no final learning rate"
        yield from _ignored(config, why, "schedule.min_lr_fraction")
    if schedule.kind != "wsd":
        yield from _ignored(config, "it belongs to schedule.kind: wsd", "schedule.decay_fraction")
    if schedule.warmup_steps and schedule.warmup_ratio:
        yield "schedule.warmup_ratio: stands beside schedule.warmup_steps; remove one of them"
    if schedule.kind == "inverse_sqrt" and not (schedule.warmup_steps or schedule.warmup_ratio):
        why = "falls as sqrt(warmup_steps / step), so give at least 1"
        yield f"schedule.warmup_steps: inverse_sqrt {why}"


def _evaluation_conflicts(config: Config) -> Iterator[str]:
    evaluation = config.evaluation
    if not evaluation.sample_prompts:
        names = ("evaluation.sample_every_steps", "evaluation.sample_max_new_tokens")
        yield from _ignored(config, "evaluation.sample_prompts is empty", *names)
    if evaluation.every_steps is None:
        why = "needs evaluation.every_steps; there is only one evaluation, at the end"
        if evaluation.patience is not None:
            yield f"evaluation.patience: {why}"
        if evaluation.export_best:
            yield f"evaluation.export_best: {why}"
    if any(not prompt.strip() for prompt in evaluation.sample_prompts):
        yield "evaluation.sample_prompts: one is empty"
    if config.data.eval is None and config.data.eval_fraction == 0:
        needing_rows = ("every_steps", "micro_batch_size", "patience", "export_best")
        why = "the run has no evaluation rows (data.eval)"
        yield from _ignored(config, why, *(f"evaluation.{name}" for name in needing_rows))


def _batch_conflicts(config: Config) -> Iterator[str]:
    size, micro = config.train.global_batch_size, config.train.micro_batch_size
    if micro != "auto" and size % micro:
        what = f"is not a multiple of train.micro_batch_size {micro}"
        yield f"train.global_batch_size: {size} {what}"


def _float8_conflicts(config: Config) -> Iterator[str]:
    train = config.train
    if not train.float8:
        return
    if config.adapter.kind == "qlora":
        yield (
            "train.float8: qlora's frozen weights have 4 or 8 bits already; use adapter.kind: lora"
        )
    if train.compile is False:
        yield (
            "train.float8: only compiled layers are faster with it, as a compiler fuses its casts; "
            "remove train.compile: false"
        )
    if train.precision in ("fp32", "fp16"):
        yield f"train.float8: all else runs in bf16, and train.precision is {train.precision}"


def _tracking_conflicts(config: Config) -> Iterator[str]:
    tracking, trackers = config.tracking, config.tracking.trackers
    if not {"wandb", "trackio"} & set(trackers):
        yield from _ignored(config, "only wandb and trackio have projects", "tracking.project")
    if "wandb" not in trackers:
        yield from _ignored(config, "wandb is not among tracking.trackers", "tracking.wandb_mode")
    if len(set(trackers)) < len(trackers):
        yield "tracking.trackers: names one twice"
    if "wandb" in trackers and (bad := set(tracking.project) & set("/\\#?%:")):
        yield f"tracking.project: W&B takes no {' '.join(sorted(bad))} in the name of a project"


def _adapter_conflicts(config: Config) -> Iterator[str]:
    adapter = config.adapter
    if isinstance(adapter, Full):
        return
    has_eight_bits = isinstance(adapter, QLora) and QUANTIZATIONS[adapter.quantization].bits == 8
    if has_eight_bits:
        of_four = ("adapter.double_quantization", "adapter.compute_dtype")
        yield from _ignored(config, "it is for 4 bits", *of_four)
    if adapter.path is not None:
        why = "the adapter in adapter.path has its own shape"
        yield from _ignored(config, why, *(f"adapter.{name}" for name in SHAPE))
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
    kind, row = config.optimizer.kind, OPTIMIZERS[config.optimizer.kind]
    if config.trains_in_16_bits and kind != "adamw":
        yield (
            f"optimizer.kind: {kind} rounds weights in 16 bits to the nearest, which loses most "
            "updates; use adamw, which rounds them stochastically, or model.dtype: auto"
        )
    unused = (f"optimizer.{name}" for name in ("betas", "eps") if name not in row.takes)
    yield from _ignored(config, row.ignores, *unused)
    if config.adapter.kind != "full" and row.not_for_adapters:
        yield f"optimizer.kind: {row.not_for_adapters}"
    if config.adapter.kind == "full":
        why = "adapter.kind: full has no adapter"
        yield from _ignored(config, why, "optimizer.lora_plus_ratio")


def _may_hold_text(source: str) -> bool:
    """Return whether a source is text, or a folder or glob, which is read later."""
    is_many = os.path.isdir(source) or bool(set(source) & set("*?["))
    name = source.lower().removesuffix(".gz").removesuffix(".zst").removesuffix(".bz2")
    is_many = is_many or ("://" in source and "." not in os.path.basename(source))
    return is_many or name.removesuffix(".xz").endswith((".txt", ".text", ".md", ".markdown"))


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _ignored(config: Config, why: str, *keys: str) -> Iterator[str]:
    """List those of the settings that the user gave. `why`: the reason for ignoring them."""
    for key in keys:
        section, name = key.split(".")
        values = getattr(config, section)
        fields, given = type(values).model_fields, values.model_fields_set
        default = fields[name].default
        # A default that is written out counts too, except in a config.yaml of a run, which has all
        # settings of the section.
        meant = name in given and default not in NOTHING and len(given) < len(fields)
        if meant or getattr(values, name) != default:
            yield f"{key}: would be ignored: {why}; remove it"
