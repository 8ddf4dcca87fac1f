"""Every setting of a run: its type, its one default, its one line of documentation."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, WithJsonSchema, model_validator

from finetune.config import paths
from finetune.config.paths import ExpandedPath, PathString
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
    dir: PathString = "runs"
    """Folder that holds run directories."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed of everything random: weights, order of data, dropout."""
    replay_of: Annotated[str | None, ExpandedPath] = None
    """Run directory whose receipt this run must meet: it does not start if data, code, versions or template have changed."""


class Model(Section):
    """Which model, and what it starts from."""

    path: Annotated[str | None, ExpandedPath] = None
    """Folder or Hub id of the model; with init: random only its config.json is used."""
    revision: str | None = None
    """Hub revision: branch, tag or commit."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the saved weights, or from random ones."""
    config: dict[str, Any] | None = None
    """Architecture for init: random, as in config.json; needs model_type."""
    tokenizer: Annotated[str | None, ExpandedPath] = None
    """Folder or Hub id of the tokenizer, or "bytes" for a built-in one of 256 bytes; default: the model's own."""
    new_tokens: list[str] = []
    """Special tokens to add, such as [<|im_start|>, <|im_end|>]; their embeddings start from the mean and train."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights; auto: float32 for what trains, the dtype of train.precision for what is frozen. bfloat16: also what trains, at half the memory, rounded stochastically."""
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
    path: Annotated[str | None, ExpandedPath] = None
    """Adapter to go on from: folder or Hub id; it keeps its own shape."""
    r: Positive = 16
    """LoRA rank."""
    alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 32
    """LoRA scale: the update is (alpha / r) B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the input of the adapters."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter: names or suffixes, a regular expression, or all-linear (all but the head)."""
    layers: Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)] | None = None
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
    """qlora, 4 bits: what weights are unpacked to for each product; auto: the dtype of the rest of the base."""


class Data(Section):
    """What is learned from, and how rows become sequences."""

    train: Annotated[str | list[str], ExpandedPath]
    """Training rows: files (.jsonl .json .csv .tsv .parquet .txt), folders, globs, or Hub names as owner/name[:split]."""
    max_rows: Positive | None = None
    """Train on so many rows, drawn by run.seed; null: all."""
    eval: Annotated[str | list[str] | None, ExpandedPath] = None
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
    template: PathString = "auto"
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
    cache_dir: str = paths.DEFAULT_CACHE
    """Where tokenised data is kept, by content hash; without a home directory to write into: run.dir/.cache."""


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
    lr: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False),
        WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}),
    ] = Field(default=None)  # type: ignore[assignment]  # Config makes it a number before it is checked
    """Peak learning rate; null: 2e-4 for adapters and 2e-5 for all weights, a fifth of that for lion, 1e-3 for adafactor."""
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
    micro_batch_size: BatchSize | Literal["auto"] = 1
    """Sequences that one process puts through the model at once; auto: the most that fit, by forecast, and then tried."""
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the arithmetic; auto: bf16 on a GPU that can, else fp32."""
    max_grad_norm: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 1.0
    """Gradients are scaled down to this norm; null: not."""
    neftune_alpha: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    """NEFTune: noise on the embeddings in training, of +-alpha / sqrt(tokens x width); null: none."""
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Keep an average of the weights, and evaluate, sample and export it; null: the weights themselves."""
    gradient_checkpointing: bool | Positive = False
    """Recompute activations in the backward pass: less memory, about a third more time; a number: of so many layers only."""
    compile: bool = False
    """Compile the layers (torch.compile): faster steps, after a first one that takes a minute or two; needs a C++ compiler."""
    hang_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 10.0
    """End all processes when one has not answered, or a micro-batch has not ended, for so long; null: wait for ever."""


class Checkpoint(Section):
    """What survives a machine that vanishes."""

    every_steps: Positive | None = None
    """Save every so many steps; null: not by steps."""
    every_minutes: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = 15.0
    """Save when this many minutes have passed since the last save; null: not by time."""
    keep_last: Positive = 2
    """Checkpoints kept, besides the best and the one that this attempt went on from."""
    asynchronous: bool = True
    """Write in the background; training waits only for a copy in host memory. false: wait, and need no such memory."""
    storage: Annotated[str | None, ExpandedPath] = None
    """Object store that checkpoints, logs and the model are copied to, as s3://bucket/folder; a machine with an empty disk goes on from there."""
    grace_seconds: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 30.0
    """Seconds that your cluster gives from SIGTERM to the kill, of which the run warns if saves take longer; a start waits as long for a process that still holds the run directory."""
    max_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Stop, saved, with exit code 75, when a process is so old: for queues that kill at a deadline; leave room for a step and a save."""
    notices: Literal["aws", "gcp", "azure"] | None = None
    """Cloud whose notices of preemption to ask for; in Kubernetes rely on SIGTERM instead."""
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

    @model_validator(mode="before")
    @classmethod
    def _with_rate(cls, values: Any) -> Any:
        """optimizer.lr as a number, whatever was left out: code, config.yaml and receipt know no other."""
        optimizer = values.get("optimizer", {}) if isinstance(values, dict) else None
        if not isinstance(optimizer, dict) or optimizer.get("lr") is not None:
            return values
        adapter = values.get("adapter")
        kind = adapter.get("kind", "full") if isinstance(adapter, dict) else "full"
        return values | {"optimizer": optimizer | {"lr": usual_lr(optimizer.get("kind", "adamw"), kind)}}

    @property
    def cache_dir(self) -> str:
        """data.cache_dir, or its stand-in where there is no home directory."""
        return paths.cache_dir(self.data.cache_dir, self.run.dir)

    @property
    def micro_batch_size(self) -> int:
        """train.micro_batch_size, once auto has become a number."""
        size = self.train.micro_batch_size
        assert size != "auto"
        return size

    @property
    def trains_in_16_bits(self) -> bool:
        """Whether the weights that train are bfloat16 themselves; beside adapters what trains is float32."""
        return self.adapter.kind == "full" and self.model.dtype == "bfloat16"

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name


def usual_lr(optimizer: Any, adapter: Any) -> float:
    """optimizer.lr where none is given.

    All weights: 2e-5 (Llama-2, Alpaca, Tulu). Adapters: 2e-4, ten times that (Dettmers et al., 2023; Hu et al., 2021). Lion's
    steps have the size of its rate whatever the gradient: a third to a tenth of AdamW's (Chen et al., 2023). Adafactor's
    rate is relative to the size of a weight: 1e-3 (Raffel et al., 2020). Muon's updates are scaled to the size of AdamW's
    (Liu et al., 2025), so its rate is AdamW's.
    """
    if optimizer == "adafactor":
        return 1e-3
    all_weights, adapters = (4e-6, 4e-5) if str(optimizer).startswith("lion") else (2e-5, 2e-4)
    return all_weights if adapter == "full" else adapters


def accumulation(config: Config, num_processes: int) -> int:
    """Micro-batches of one process in one step: global / (micro x processes). Raises ConfigError if not whole."""
    train = config.train
    at_once = config.micro_batch_size * num_processes
    if train.global_batch_size % at_once:
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} cannot be split over {num_processes} processes of "
            f"train.micro_batch_size {train.micro_batch_size}; it must be a multiple of {at_once}, "
            f"for example {math.ceil(train.global_batch_size / at_once) * at_once}; for the same steps lower train.micro_batch_size"
        )
    return train.global_batch_size // at_once
