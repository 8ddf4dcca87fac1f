"""The run config: typed, strict and documented. YAML file + command line -> one Config. No torch.

Every field has its default here and nowhere else, and the line of text under it is at once its
documentation, its `--help` and its description in the JSON schema.
"""

import argparse
import difflib
import math
import os
import re
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, cast, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from finetune.errors import ConfigError

Positive = Annotated[int, Field(gt=0)]
BatchSize = Annotated[int, Field(gt=0, le=1_000_000)]
# What a format can call a column; the formats themselves are in data/rows.py.
COLUMNS = ("text", "question", "answer", "prompt", "completion", "instruction", "input", "output", "messages")
PADDED_ATTENTION = ("sdpa", "eager")  # they train padded rectangles; the others take sequences end to end in one row
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Section(BaseModel):
    """Unknown keys are errors, types are not guessed, nothing changes after loading."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, use_attribute_docstrings=True)


class Run(Section):
    """Where the run lives."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its directory is run.dir/run.name."""
    dir: str = "runs"
    """Folder that holds run directories."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random: weights, order of data, dropout."""


class Model(Section):
    """Which model, and what it starts from."""

    path: str | None = None
    """Folder or Hub id of the model; with init: random only its config.json is used."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the saved weights, or from random ones."""
    config: dict[str, Any] | None = None
    """Architecture for init: random, as in config.json; needs model_type."""
    tokenizer: str | None = None
    """Folder or Hub id of the tokenizer, or "bytes" for a built-in one of 256 bytes; default: the model's own."""
    new_tokens: list[str] = []
    """Special tokens to add, such as [<|im_start|>, <|im_end|>]; their embeddings start from the mean and train."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; auto: float32 for what trains, the dtype of train.precision for what is frozen."""
    attention: Literal["auto", "documents", "flash_attention_2", "sdpa", "eager"] = "auto"
    """Attention; documents and flash_attention_2 keep documents apart without padding, sdpa and eager train padded batches."""
    trust_remote_code: bool = False
    """Run the Python code that a Hub model brings along."""


class Adapter(Section):
    """What trains: all weights, or low-rank adapters beside frozen ones."""

    kind: Literal["full", "lora", "qlora"] = "full"
    """full trains all weights; lora trains low-rank adapters; qlora the same beside weights quantised to 4 or 8 bits."""
    freeze: list[str] = []
    """full: regular expressions; weights whose name holds one of them do not train."""
    path: str | None = None
    """Adapter to go on from: folder or Hub id; it keeps its own shape."""
    r: Positive = 16
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32
    """LoRA scale: the update is (alpha / r) B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: names or suffixes, a regular expression, or all-linear (all but the head)."""
    layers: list[Annotated[int, Field(ge=0)]] | None = None
    """Only these layers, counted from 0, get adapters; null: all."""
    rank_pattern: dict[str, Positive] = {}
    """Other ranks for some modules, as {regular expression: r}."""
    alpha_pattern: dict[str, Annotated[float, Field(gt=0, allow_inf_nan=False)]] = {}
    """Other alphas for some modules, as {regular expression: alpha}."""
    rslora: bool = False
    """Scale by alpha / sqrt(r), which keeps updates alike at high ranks (Kalajdzievski, 2023)."""
    dora: bool = False
    """Learn the length of weights apart from their direction (Liu et al., 2024): better at low ranks, slower."""
    init: Literal["default", "gaussian", "pissa", "eva", "loftq", "random"] = "default"
    """What adapters start from. default, gaussian: no change at first; pissa: the weights' own main directions; eva: those of the data; loftq: what quantisation has lost; random: also B."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases that train too. Without its adapter the base is then no longer what it was."""
    train_norms: bool = False
    """Train the norms too, whole."""
    modules_to_save: list[str] = []
    """Modules that train whole beside the adapters and are saved with them."""
    quantization: Literal["nf4", "fp4", "int8"] = "nf4"
    """qlora: how frozen weights are stored."""
    double_quantization: bool = True
    """qlora, 4 bits: quantise the scales too; saves 0.4 bits a weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """qlora, 4 bits: what weights are unpacked to for each product; auto: train.precision."""


class Data(Section):
    """What is learned from, and how rows become sequences."""

    train: str | list[str]
    """Training rows: files (.jsonl .json .csv .parquet .txt), or Hub names as owner/name[:split]."""
    max_rows: Positive | None = None
    """Train on so many rows, drawn by run.seed; null: all."""
    eval: str | list[str] | None = None
    """Evaluation rows, as data.train."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of the training rows set aside for evaluation when data.eval is not given."""
    format: Literal["auto", "text", "prompt_completion", "question_answer", "instruction", "messages"] = "auto"
    """Shape of the rows; auto: from the columns of the first row."""
    columns: dict[str, str] = {}
    """Columns under other names, as {question: Patient, answer: Doctor}."""
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """What is one row of a .txt file; paragraphs are separated by blank lines."""
    system_prompt: str | None = None
    """System message put before every conversation that has none."""
    template: str = "auto"
    """plain, question_answer, alpaca, llama2, chatml, chat (the tokenizer's own), or a .jinja file; auto: chat if there is one, else the usual one of the format."""
    loss_on: Literal["completion", "all", "last_turn"] = "completion"
    """What is learned: every answer, every token, or the last answer only."""
    max_length: Annotated[int, Field(gt=1)] = 1024
    """Most tokens of a sequence."""
    truncation: Literal["error", "right", "left", "drop", "split"] = "error"
    """A row over max_length: stop with an error, cut its right or left end, drop it, or (clm) split it."""
    packing: bool = False
    """Put several examples into one sequence of at most max_length tokens; they never see each other."""
    group_by_length: bool = False
    """Put examples of similar length into the same step, so that little is padded."""
    cache_dir: str = "~/.cache/finetune"
    """Where tokenised data is kept, by content hash."""


class Objective(Section):
    """What is learned from the data."""

    kind: Literal["clm", "sft"] = "sft"
    """clm: every next token of every row; sft: the answers, given the prompts."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Part of each target that is spread over the whole vocabulary; not in evaluations."""


class Optimizer(Section):
    """How weights move."""

    kind: Literal[
        "adamw", "adamw_8bit", "paged_adamw_32bit", "paged_adamw_8bit", "lion", "lion_8bit", "adafactor", "muon"
    ] = "adamw"
    """adamw; 8-bit and paged ones keep its state small or in host memory; lion keeps half of it; adafactor next to none; muon for all weights."""
    lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 2e-5
    """Peak learning rate."""
    embedding_lr: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """Peak learning rate of embeddings and head; null: optimizer.lr."""
    lora_plus_ratio: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """LoRA+ (Hayou et al., 2024): B matrices learn so many times faster than A matrices; null: as fast."""
    betas: Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)] | None = None
    """Decay of the running averages; null: [0.9, 0.999], and [0.9, 0.99] for lion."""
    eps: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 1e-8
    """Added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay; never on norms and biases."""


class Schedule(Section):
    """The learning rate over the run."""

    kind: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "linear"
    """Shape after the warm-up; wsd (warmup-stable-decay): constant, then linear over the last part."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps over which the learning rate rises from 0."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """wsd: part of the run, at its end, over which the learning rate falls."""
    min_lr_fraction: Fraction = 0.0
    """Part of the peak that linear, cosine and wsd end at."""


class Train(Section):
    """How long, how much at once, and in what precision."""

    epochs: Positive = 1
    """Passes over the data."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, if that is sooner than train.epochs."""
    global_batch_size: BatchSize = 8
    """Sequences of one optimizer step, over all processes."""
    micro_batch_size: BatchSize = 1
    """Sequences that one process puts through the model at once."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the arithmetic; auto: bf16 on a GPU that can, else fp32."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    """Gradients are scaled down to this norm; null: not."""
    neftune_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """NEFTune: noise on the embeddings in training, of +-alpha / sqrt(tokens x width); null: none."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an average of the weights, and evaluate, sample and export it; null: the weights themselves."""
    gradient_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, about a third more time."""


class Checkpoint(Section):
    """What survives a machine that vanishes."""

    every_steps: Positive | None = None
    """Save every so many steps; null: not by steps."""
    every_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 15.0
    """Save when this many minutes have passed since the last save; null: not by time."""
    keep_last: Positive = 2
    """Checkpoints kept."""
    resume: Literal["auto", "never"] = "auto"
    """auto: go on from the newest valid checkpoint; never: refuse to start where there are checkpoints."""


class Evaluation(Section):
    """Loss on held-out rows."""

    every_steps: Positive | None = None
    """Evaluate every so many steps, and always at the end; null: at the end only."""
    micro_batch_size: BatchSize | None = None
    """Sequences that one process evaluates at once; null: train.micro_batch_size."""
    patience: Positive | None = None
    """Stop when so many evaluations in a row have not been the best; null: never."""
    export_best: bool = False
    """Export the weights of the best evaluation, not the last ones."""
    sample_prompts: list[str] = []
    """Messages that the model answers now and then, into samples.jsonl."""
    sample_every_steps: Positive | None = None
    """Answer evaluation.sample_prompts every so many steps, and always at the end; null: at the end only."""
    sample_max_new_tokens: Positive = 128
    """Longest answer to a sample prompt."""


class Tracking(Section):
    """What a run tells while it goes."""

    log_every_steps: Positive = 1
    """Write metrics every so many steps."""
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = []
    """Programs that get the metrics too: Weights & Biases, TensorBoard (into the run directory), Trackio."""
    project: str = "finetune"
    """Project of the run in wandb and trackio."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline: into the run directory, for `wandb sync`; disabled: nowhere; null: as WANDB_MODE says, else online."""


class Config(Section):
    """One run."""

    run: Run
    model: Model = Model()
    adapter: Adapter = Adapter()
    data: Data
    objective: Objective = Objective()
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name


# What may differ between a run and its resumption: it changes neither the data nor the arithmetic
# of a step (micro_batch_size and checkpointing only reorder the same float operations).
RESUME_MAY_CHANGE = (
    "run.dir", "data.cache_dir", "model.attention", "train.micro_batch_size", "train.gradient_checkpointing",
    "checkpoint.*", "evaluation.every_steps", "evaluation.micro_batch_size", "evaluation.patience", "evaluation.sample_*",
    "tracking.*",
)  # fmt: skip


def parse(argv: list[str]) -> tuple[Config, bool]:
    """Command line -> (config, whether --check was given). Raises ConfigError with all problems at once."""
    parser = argparse.ArgumentParser(
        prog="train.py",
        usage="%(prog)s --config FILE [--check] [--section.field VALUE ...]",
        description="Specialise a Hugging Face language model to a task. Every setting below can stand in the YAML file or on the command line.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        argument_default=argparse.SUPPRESS,
    )
    parser.add_argument("--config", metavar="FILE", help="YAML run config")
    parser.add_argument(
        "--check", action="store_true", help="preflight: everything that can be known without loading weights"
    )
    for section, model in _sections():
        group = parser.add_argument_group(section, model.__doc__)
        for name, field in model.model_fields.items():
            default = "required" if field.is_required() else f"default: {_yaml(field.default)}"
            text = f"{field.description} ({default})".replace("%", "%%")
            group.add_argument(f"--{section}.{name}", metavar=_type_name(field), help=text)
    if not argv:
        raise ConfigError(
            "nothing to do: give --config FILE, such as configs/quickstart.yaml; --help lists every setting"
        )
    known, unknown = parser.parse_known_args(argv)
    overrides = vars(known)
    path, check = overrides.pop("config", None), overrides.pop("check", False)
    problems = [_unknown_argument(word) for word in unknown if word.startswith("-")]
    problems += [f"{word!r}: stray word on the command line" for word in unknown[:1] if not word.startswith("-")]
    values = read_yaml(path) if path else {}
    for key, raw in overrides.items():
        section, name = key.split(".")
        if values.get(section) is None:
            values[section] = {}
        if isinstance(values[section], dict):  # if not, that is a problem of its own
            try:
                values[section][name] = _from_command_line(_field(key).annotation, raw)
            except yaml.YAMLError:
                problems.append(f"{key}: {raw!r} cannot be read; write lists as [a, b] and mappings as {{a: b}}")
    return from_dict(values, where=_where(path, bool(overrides or unknown)), problems=problems), check


def _where(path: str | None, overridden: bool) -> str:
    return " and ".join([*([path] if path else []), *(["the command line"] if overridden or not path else [])])


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; duplicate keys are errors, and 1e-4 is a number."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as exc:
        raise ConfigError(f"{path}: cannot read the config: {exc}") from exc
    try:
        values = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as exc:
        raise ConfigError(f"{path}: not valid YAML: {exc}") from exc
    if not isinstance(values, dict):
        raise ConfigError(f"{path}: expected sections such as run: and data:, got {type(values).__name__}")
    return values


def from_dict(values: dict[str, Any], where: str = "config", problems: list[str] | None = None) -> Config:
    """Validate a nested mapping. Raises ConfigError that lists every problem."""
    problems = list(problems or [])
    config = None
    try:
        config = Config.model_validate(values)
    except ValidationError as exc:
        errors = exc.errors()
        problems += dict.fromkeys(_describe(error) for error in errors)
        config = _without(values, errors)
    if config is not None:
        named = {problem.split(":")[0] for problem in problems}
        problems += [p for p in conflicts(config) if p.split(":")[0] not in named]
    if problems or config is None:
        count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
        raise ConfigError(f"{count} in {where}:\n" + "\n".join(f"  {problem}" for problem in problems))
    return config


def conflicts(config: Config) -> Iterator[str]:
    """Settings that cannot work together, or that this run would ignore."""
    model, adapter, data, train = config.model, config.adapter, config.data, config.train
    if (model.path is None) == (model.config is None):
        yield "model.path: give either model.path or model.config (an architecture for init: random)"
    if model.config is not None and model.init != "random":
        yield "model.config: only for model.init: random; saved weights bring their own config"
    if model.config is not None and model.tokenizer is None:
        yield 'model.tokenizer: needed with model.config: a folder, a Hub id or "bytes"'
    if model.config is not None and "model_type" not in model.config:
        yield "model.config: needs model_type, for example llama"
    if model.config is not None and model.tokenizer == "bytes":
        yield from _ignored(config.model, "model", ("revision", "trust_remote_code"), "nothing is loaded from the Hub")
    if model.path is not None and os.path.isdir(model.path):
        yield from _ignored(config.model, "model", ("revision",), "model.path is a folder")
    if model.init == "random" and adapter.kind != "full":
        yield f"adapter.kind: {adapter.kind} beside random weights cannot be loaded again, as they are not saved; use full"
    yield from _adapter_conflicts(adapter)
    yield from _optimizer_conflicts(config)
    if config.objective.kind == "clm":
        yield from _ignored(config.data, "data", ("loss_on",), "objective.kind: clm learns every token")
    elif data.truncation == "split":
        yield "data.truncation: split would cut answers from their prompts; it is for objective.kind: clm"
    if data.format == "text":
        yield from _ignored(config.data, "data", ("template", "system_prompt"), "rows of text have no turns")
        if config.objective.kind == "sft":
            yield "objective.kind: sft needs prompts and answers, but data.format is text; use clm"
    for name in data.columns:
        if name not in COLUMNS:
            near = difflib.get_close_matches(name, COLUMNS, n=1, cutoff=0.5)
            yield f"data.columns: no format has a column {name!r}; " + (
                f"did you mean {near[0]}?" if near else f"the columns are {', '.join(COLUMNS)}"
            )
    sources = [*_listed(data.train), *_listed(data.eval)]
    if not any(source.lower().endswith(".txt") for source in sources):
        yield from _ignored(config.data, "data", ("text_unit",), "no source is a .txt file")
    if data.eval is not None:
        yield from _ignored(config.data, "data", ("eval_fraction",), "data.eval gives the evaluation rows")
    if data.packing and model.attention in PADDED_ATTENTION:
        yield f"data.packing: with model.attention: {model.attention} packed documents would see each other; use auto"
    if data.packing and data.group_by_length:
        yield "data.group_by_length: ignored with data.packing, which fills every sequence"
    if config.schedule.kind in ("constant", "inverse_sqrt"):
        yield from _ignored(
            config.schedule, "schedule", ("min_lr_fraction",), f"schedule.kind: {config.schedule.kind} ends nowhere"
        )
    if config.schedule.kind != "wsd":
        yield from _ignored(config.schedule, "schedule", ("decay_fraction",), "it is for schedule.kind: wsd")
    if config.schedule.kind == "inverse_sqrt" and config.schedule.warmup_steps == 0:
        yield "schedule.warmup_steps: inverse_sqrt falls as sqrt(warmup_steps / step), so it needs some"
    if train.global_batch_size % train.micro_batch_size:
        yield (
            f"train.global_batch_size: {train.global_batch_size} is not a multiple of "
            f"train.micro_batch_size {train.micro_batch_size}"
        )
    if not config.evaluation.sample_prompts:
        names = ("sample_every_steps", "sample_max_new_tokens")
        yield from _ignored(config.evaluation, "evaluation", names, "there are no evaluation.sample_prompts")
    trackers = config.tracking.trackers
    if len(set(trackers)) < len(trackers):
        yield "tracking.trackers: names one twice"
    if "wandb" not in trackers:
        yield from _ignored(config.tracking, "tracking", ("wandb_mode",), "wandb is not among tracking.trackers")
        if "trackio" not in trackers:
            yield from _ignored(config.tracking, "tracking", ("project",), "it is for wandb and trackio")
    if config.evaluation.patience is not None and config.evaluation.every_steps is None:
        yield "evaluation.patience: needs evaluation.every_steps; there is only one evaluation, at the end"
    if data.eval is None and data.eval_fraction == 0:
        yield from _ignored(
            config.evaluation,
            "evaluation",
            ("every_steps", "micro_batch_size", "patience", "export_best"),
            "there are no evaluation rows (data.eval)",
        )


SHAPE = (
    "r", "alpha", "dropout", "target_modules", "layers", "rank_pattern", "alpha_pattern", "rslora", "dora", "init", "bias",
    "train_norms", "modules_to_save",
)  # fmt: skip
QUANTIZED = ("quantization", "double_quantization", "compute_dtype")


def _adapter_conflicts(adapter: Adapter) -> Iterator[str]:
    if adapter.kind == "full":
        yield from _ignored(adapter, "adapter", ("path", *SHAPE), "adapter.kind: full has no adapter")
    else:
        yield from _ignored(adapter, "adapter", ("freeze",), "beside adapters every other weight is frozen")
    if adapter.kind != "qlora":
        yield from _ignored(adapter, "adapter", QUANTIZED, "it is for adapter.kind: qlora")
    elif adapter.quantization == "int8":
        yield from _ignored(adapter, "adapter", QUANTIZED[1:], "it is for 4 bits")
    if adapter.path is not None:
        yield from _ignored(adapter, "adapter", SHAPE, "adapter.path brings its own shape")
        return
    if adapter.kind == "qlora" and adapter.init == "pissa":
        yield "adapter.init: pissa rewrites the base weights, which qlora has quantised before; use loftq, or kind: lora"
    if adapter.kind == "lora" and adapter.init == "loftq":
        yield "adapter.init: loftq makes up for quantisation, and nothing is quantised; use kind: qlora"
    if adapter.dora and adapter.init in ("pissa", "loftq", "eva"):
        yield f"adapter.dora: not beside adapter.init: {adapter.init}; use init: default"
    if adapter.kind == "qlora" and adapter.dora and adapter.quantization == "int8":
        yield "adapter.dora: unpacks weights at every step, which int8 does inexactly; use nf4"
    if adapter.bias != "none" and adapter.dora:
        yield "adapter.bias: not beside adapter.dora; use none"


def _optimizer_conflicts(config: Config) -> Iterator[str]:
    optimizer, kind = config.optimizer, config.optimizer.kind
    if kind == "adafactor":
        yield from _ignored(optimizer, "optimizer", ("betas", "eps"), "adafactor has its own")
    if kind.startswith("lion"):
        yield from _ignored(optimizer, "optimizer", ("eps",), "lion divides by nothing")
    if kind == "muon" and config.adapter.kind != "full":
        yield "optimizer.kind: muon turns the update of a whole matrix, which adapters have in two parts; use adamw"
    if config.adapter.kind == "full":
        yield from _ignored(optimizer, "optimizer", ("lora_plus_ratio",), "adapter.kind: full has no adapter")


def accumulation(config: Config, num_processes: int) -> int:
    """Micro-batches of one process in one step: global / (micro x processes). Raises ConfigError if not whole."""
    train = config.train
    at_once = train.micro_batch_size * num_processes
    if train.global_batch_size % at_once:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} cannot be split over {num_processes} processes of "
            f"train.micro_batch_size {train.micro_batch_size}; it must be a multiple of {at_once}, "
            f"for example {math.ceil(train.global_batch_size / at_once) * at_once}"
        )
    return train.global_batch_size // at_once


def to_yaml(config: Config) -> str:
    """The resolved config, every field written out; reads back as the same config."""
    return _yaml(config.model_dump(), flow=False)


def flatten(values: dict[str, Any]) -> dict[str, Any]:
    """{"run": {"name": "a"}} -> {"run.name": "a"}; two levels, as the config has."""
    return {f"{section}.{name}": value for section, fields in values.items() for name, value in fields.items()}


def differences(old: dict[str, Any], new: Config) -> list[str]:
    """What of a saved resolved config differs so that its checkpoints are not this run's."""
    before, now = flatten(old), flatten(new.model_dump())
    free = tuple(pattern.removesuffix("*") for pattern in RESUME_MAY_CHANGE)
    return [
        f"{key}: was {_yaml(before.get(key))}, now {_yaml(now.get(key))}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(free)
    ]


def json_schema() -> dict[str, Any]:
    """JSON schema of the run config, for editors."""
    return Config.model_json_schema() | {"title": "finetune run config"}


class _Loader(yaml.SafeLoader):
    """YAML with 1.2 numbers (PyYAML reads 1e-4 as a string) and without silent duplicate keys."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[Any] = set()
        for key_node, _ in node.value:
            if key_node.tag == "tag:yaml.org,2002:merge":
                continue
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.YAMLError(
                    f"line {key_node.start_mark.line + 1}: a key should be a word; quote {{{{ ... }}}}"
                )
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                raise yaml.YAMLError(f"line {key_node.start_mark.line + 1}: {key!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes the strings that _Loader would read as numbers."""


for _class in (_Loader, _Dumper):
    _class.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(r"^[-+]?(\d[\d_]*)?\.?\d+([eE][-+]?\d+)?$"),
        list("-+0123456789."),
    )


def _sections() -> list[tuple[str, type[Section]]]:
    return [(name, cast(type[Section], field.annotation)) for name, field in Config.model_fields.items()]


def _field(key: str) -> Any:
    section, name = key.split(".")
    return dict(_sections())[section].model_fields[name]


def _keys() -> list[str]:
    return [f"{section}.{name}" for section, model in _sections() for name in model.model_fields]


def _yaml(value: Any, flow: bool = True) -> str:
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=flow, sort_keys=False, allow_unicode=True, width=10_000)
    return text.removesuffix("\n").removesuffix("\n...") if flow else text


def _type_name(field: Any) -> str:
    options = get_args(field.annotation)
    if options and all(isinstance(option, str) for option in options):
        return "|".join(options)
    text = str(field.annotation)
    names = [n for n in ("bool", "int", "float", "list", "dict", "str") if n in text]
    return names[0].upper() if names else "VALUE"


def _from_command_line(annotation: Any, raw: str) -> Any:
    """A word of the command line is YAML, except that what can be a string stays one."""
    options = get_args(annotation) if get_origin(annotation) is UnionType else (annotation,)
    if str in options:
        try:
            parsed = yaml.load(raw, Loader=_Loader)
        except yaml.YAMLError:
            return raw
        as_list = isinstance(parsed, list) and any(get_origin(option) is list for option in options)
        return parsed if as_list or (parsed is None and type(None) in options) else raw
    return yaml.load(raw, Loader=_Loader)


# What other tools call a setting.
ELSEWHERE = {
    "learning_rate": "optimizer.lr", "optim": "optimizer.kind", "lr_scheduler_type": "schedule.kind", "warmup_ratio": "schedule.warmup_steps",
    "num_train_epochs": "train.epochs", "num_epochs": "train.epochs", "batch_size": "train.global_batch_size",
    "per_device_train_batch_size": "train.micro_batch_size", "gradient_accumulation_steps": "train.global_batch_size",
    "max_seq_length": "data.max_length", "sequence_len": "data.max_length", "cutoff_len": "data.max_length",
    "model_name_or_path": "model.path", "base_model": "model.path", "dataset": "data.train", "output_dir": "run.dir",
    "lora_r": "adapter.r", "lora_alpha": "adapter.alpha", "lora_dropout": "adapter.dropout", "load_in_4bit": "adapter.kind",
}  # fmt: skip


def _nearest(key: str) -> str:
    leaf = key.split(".")[-1]
    if leaf in ELSEWHERE:
        return f"did you mean {ELSEWHERE[leaf]}?"
    same_leaf = difflib.get_close_matches(key, [k for k in _keys() if k.split(".")[1] == leaf], n=1, cutoff=0)
    sections = difflib.get_close_matches(key, dict(_sections()), n=1) if "." not in key else []
    inside = [
        k for k in _keys() if len(min(leaf, own := k.split(".")[1], key=len)) > 3 and (leaf in own or own in leaf)
    ]
    near = same_leaf or sections or difflib.get_close_matches(key, inside, n=1, cutoff=0)
    near = near or difflib.get_close_matches(key, _keys(), n=1, cutoff=0.5)
    if not near:
        leaves = difflib.get_close_matches(leaf, [k.split(".")[1] for k in _keys()], n=1, cutoff=0.6)
        near = [k for k in _keys() if leaves and k.split(".")[1] == leaves[0]]
    if near:
        return f"did you mean {near[0]}?"
    section = key.split(".")[0]
    names = dict(_sections())
    if section in names:
        return f"{section} has {', '.join(names[section].model_fields)}"
    return f"the sections are {', '.join(names)}"


def _unknown_argument(word: str) -> str:
    key = word.lstrip("-").split("=")[0]
    return f"--{key}: unknown option; {_nearest(key)}"


def _describe(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"] if not str(part).startswith(("list[", "function")))
    kind, got = error["type"], error["input"]
    if kind == "extra_forbidden":
        return f"{key}: unknown key; {_nearest(key)}"
    if kind == "missing":
        return f"{key}: required and not given" + ("" if "." in key else f" (section {key}:)")
    if kind == "model_type":
        return f"{key}: a section with keys of its own, got {_yaml(got)}"
    key = ".".join(key.split(".")[:2])  # inside a union or a list the rest of the path names pydantic's branches
    options = get_args(_field(key).annotation) if key in _keys() else ()
    if kind.endswith("_type") and str in options:
        return f"{key}: should be {' or '.join(getattr(o, '__name__', str(o)) for o in options if o is not type(None))}, got {got!r}"
    if kind == "string_pattern_mismatch":
        return f"{key}: letters, digits, dots, dashes and underscores only, got {got!r}"
    message = error["msg"].removeprefix("Input ")
    return f"{key}: {message}, got {got!r}"


def _without(values: dict[str, Any], errors: Any) -> Config | None:
    """The config without its wrong keys, so that its other problems can be found too."""
    kept = {s: dict(v) if isinstance(v, dict) else v for s, v in values.items()}
    for error in errors:
        section, *rest = error["loc"]
        if not rest or not isinstance(kept.get(section), dict):
            kept.pop(section, None)
        else:
            kept[section].pop(rest[0], None)
    for section, name in (("run", "name"), ("data", "train")):  # required: any value lets the rest be checked
        if isinstance(kept.setdefault(section, {}), dict):
            kept[section].setdefault(name, "missing")
    try:
        return Config.model_validate(kept)
    except ValidationError:
        return None


def _listed(value: str | list[str] | None) -> list[str]:
    return [value] if isinstance(value, str) else value or []


def _ignored(values: Section, section: str, names: tuple[str, ...], why: str) -> Iterator[str]:
    for name in names:
        if getattr(values, name) != type(values).model_fields[name].default:
            yield f"{section}.{name}: would be ignored: {why}; remove it"
