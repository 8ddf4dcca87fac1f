"""Every setting of a run: its type, its default, its documentation."""
# ruff: noqa: RUF012, as pydantic copies mutable defaults

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, WithJsonSchema, model_validator

from finetune.config import paths
from finetune.config.choices import (
    ADAPTER_INITS,
    OPTIMIZERS,
    QUANTIZATIONS,
    LossOn,
    objective_kind,
)
from finetune.config.kinds import PositiveNumber, Section, by_kind
from finetune.config.objective_fields import (
    Clm,
    Cpo,
    Distill,
    Dpo,
    Grpo,
    Kto,
    MaskedLm,
    Orpo,
    Ppo,
    ProcessReward,
    Reward,
    Rloo,
    Seq2Seq,
    SequenceClassification,
    Sft,
    Simpo,
    SpanCorruption,
    TextInfilling,
    TokenClassification,
)
from finetune.config.own import OwnName, OwnObjective, own_objective
from finetune.config.paths import ExpandedPath, PathString
from finetune.config.rollout_fields import Rollouts
from finetune.errors import ConfigError

if TYPE_CHECKING:
    AdapterInit = str
    OptimizerKind = str
    Quantization = str
else:
    AdapterInit = Literal[tuple(ADAPTER_INITS)]
    OptimizerKind = Literal[tuple(OPTIMIZERS)]
    Quantization = Literal[tuple(QUANTIZATIONS)]
Positive = Annotated[int, Field(gt=0)]
BatchSize = Annotated[int, Field(gt=0, le=1_000_000)]
# The names that formats give to columns; the formats themselves are in data/rows.py.
COLUMNS = (
    "text", "question", "answer", "prompt", "completion", "instruction", "input", "output",
    "messages", "system", "tools", "history", "chosen", "rejected", "label", "choices", "gold",
    "margin", "steps", "tokens", "labels", "role", "content", "user", "assistant",
)  # fmt: skip
# These train padded rectangles; the others take sequences end to end in one row.
PADDED_ATTENTION = ("sdpa", "eager")
Fraction = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Run(Section):
    """Name, place and seed of the run."""

    # 128 is W&B's limit; file names have at most 255 bytes, and some programs add to them.
    name: Annotated[str, Field(max_length=128, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
    """Name of the run; its directory is run.dir/run.name."""
    dir: PathString = "runs"
    """Folder for run directories."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Seed for weights, order of data and dropout."""


class Model(Section):
    """The model, its tokenizer and its first weights."""

    path: Annotated[str | None, ExpandedPath] = None
    """Folder or Hub id of the model; init: random uses only its config.json."""
    revision: str | None = None
    """Revision on the Hub: a branch, tag or commit."""
    init: Literal["pretrained", "random"] = "pretrained"
    """Start from the saved weights or from random ones."""
    config: dict[str, Any] | None = None
    """Architecture for init: random, as in config.json; needs model_type."""
    tokenizer: Annotated[str | None, ExpandedPath] = None
    """Folder or Hub id of the tokenizer, or "bytes" for the built-in byte-level one.
    null: the model's own.
    """
    new_tokens: list[str] = []
    """Special tokens to add, such as [<|im_start|>, <|im_end|>].
    Their embeddings start from the mean and train.
    """
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Dtype of the weights.
    auto: float32 for trained weights and the dtype of train.precision for frozen ones.
    bfloat16 halves the memory of trained weights and rounds their updates stochastically.
    """
    attention: Literal[
        "auto", "documents", "flash_attention_2", "flash_attention_3", "flash_attention_4",
        "cudnn", "sdpa", "eager",
    ] = "auto"  # fmt: skip
    """Attention kernel.
    documents and flash_attention_2 need no padding, sdpa and eager train padded batches.
    """
    trust_remote_code: bool = False
    """Run Python code from the model's Hub repository."""


class Full(Section):
    """All weights train."""

    kind: Literal["full"] = "full"
    """Train all weights."""
    freeze: list[str] = []
    """Regular expressions; freeze the weights whose names match one of them."""


class Adapter(Section):
    """Low-rank adapters train, on top of frozen weights."""

    kind: str
    path: Annotated[str | None, ExpandedPath] = None
    """Folder or Hub id of an adapter to continue from; it keeps its own rank and modules."""
    r: Positive = 16
    """LoRA rank."""
    alpha: PositiveNumber = 32
    """LoRA scale: the update is (alpha / r) B A."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Dropout on the inputs of adapters."""
    target_modules: str | list[str] = "all-linear"
    """Modules that get an adapter.
    Names or suffixes, a regular expression, or all-linear (all but the head).
    """
    rslora: bool = False
    """Scale updates by alpha / sqrt(r), to keep their size at high ranks (Kalajdzievski, 2023)."""
    dora: bool = False
    """Learn the magnitude of weights separately from their direction (DoRA; Liu et al., 2024).
    Better at low ranks, slower.
    """
    init: AdapterInit = "default"
    """How to initialise adapters.
    default, gaussian: leave the model unchanged; random: make B random too, for tests;
    pissa: principal directions of the weights; eva: principal directions of the data;
    loftq: correct the error of 4-bit quantisation.
    """
    train_norms: bool = False
    """Train all weights of the norms."""
    modules_to_save: list[str] = []
    """Modules to train in full, and save with the adapter, such as [embed_tokens, lm_head]."""


class Lora(Adapter):
    """Low-rank adapters on top of frozen weights."""

    kind: Literal["lora"]
    """Train low-rank adapters."""
    bias: Literal["none", "all", "lora_only"] = "none"
    """Biases to train.
    This changes the base: switching the adapter off does not give the original model back.
    """


class QLora(Adapter):
    """Low-rank adapters on top of frozen, quantised weights."""

    kind: Literal["qlora"]
    """Train low-rank adapters on weights quantised to 4 or 8 bits."""
    quantization: Quantization = "nf4"
    """How to store frozen weights."""
    double_quantization: bool = True
    """4 bits: quantise the scales too; saves 0.4 bits per weight."""
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    """4 bits: dtype that weights are dequantised to for matrix products.
    auto: the dtype of the other base weights.
    """


class Quantized(Full):
    """All weights in 4 or 8 bits, none of which trains: a teacher's. Of no config file."""

    quantization: Quantization = "nf4"
    double_quantization: bool = True
    compute_dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"


class Data(Section):
    """The rows, and how they become sequences."""

    train: Annotated[str | list[str], ExpandedPath]
    """Training rows.
    Files (.jsonl .json .csv .tsv .parquet .arrow .xlsx .txt .md), folders, globs, URLs, or Hub
    names as owner/name[/subset][:split].
    """
    weights: Annotated[dict[str, PositiveNumber], ExpandedPath] = {}
    """How many times an epoch has the rows of a source, as {a.jsonl: 2, b.jsonl: 0.5}.
    A fraction is drawn at random with run.seed; names are those of data.train.
    """
    token_budgets: Annotated[dict[str, Positive], ExpandedPath] = {}
    """How many tokens an epoch has of a source, as {web.jsonl: 2000000}.
    Whole rows, drawn at random with run.seed and repeated where there are fewer.
    """
    max_rows: Positive | None = None
    """Train on this many rows, drawn at random with run.seed; null: all rows."""
    eval: Annotated[str | list[str] | None, ExpandedPath] = None
    """Evaluation rows, in the same forms as data.train."""
    eval_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Fraction of the training rows to hold out for evaluation, if data.eval is not given."""
    format: (
        Literal[
            "auto", "text", "prompt_completion", "question_answer", "instruction", "messages",
            "preference", "unpaired", "choices", "text_label", "token_labels", "prompt",
        ]
        | OwnName
    ) = "auto"  # fmt: skip
    """Format of the rows.
    auto: detect it from the columns of the first row; preference, unpaired, choices: rated answers
    (docs/preference.md); text_label, token_labels: for classification;
    prompt: for reinforcement, with a reference answer or without one;
    FILE.py:NAME: a function of your own (docs/data.md).
    """
    columns: dict[str, str] = {}
    """Map columns with other names, as {question: Patient, answer: Doctor}.
    role, content, user and assistant map names inside messages.
    """
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a wrong row.
    skip: leave it out, count it, and write it to rejects.jsonl in the run directory.
    """
    max_bad_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """skip: stop with an error if a larger fraction of the rows is wrong."""
    repair_turns: bool = False
    """Join turns of one role in a row; drop a first turn of the assistant, a last one of the user.
    The summary counts what changed.
    """
    special_tokens_in_text: Literal["error", "text"] = "error"
    """What to do with a row whose text holds a special token of the tokenizer, such as <s> in HTML.
    text: keep it as plain characters, in training, chat and evaluate.
    """
    text_unit: Literal["line", "paragraph", "file"] = "line"
    """Unit of a .txt or .md file that makes a row; blank lines separate paragraphs."""
    system_prompt: str | None = None
    """System message for every conversation that has none."""
    template: PathString = "auto"
    """chat (the tokenizer's own), plain, question_answer, alpaca, llama2, chatml, vicuna, llama3,
    gemma, phi3, mistral, or a .jinja file.
    auto: chat if the tokenizer has one, else the usual template of the format.
    """
    template_arguments: dict[str, Any] = {}
    """Further variables of the template, such as {enable_thinking: false}.
    The exported chat template has them as defaults.
    """
    loss_on: LossOn = "completion"
    """Train on every answer (completion), on every answer in an example of its own with the turns
    before it (each_turn), only on the last answer (last_turn), or on every token (all).
    """
    thinking: Literal["keep", "drop"] = "keep"
    """Whether to train on the thoughts in answers: <think> ... </think>, or reasoning_content."""
    max_length: Annotated[int, Field(gt=1)] = 1024
    """Maximum number of tokens in a sequence."""
    truncation: Literal["error", "right", "left", "drop", "split"] = "error"
    """What to do with a row longer than max_length.
    Stop with an error, cut its right or left end, drop it, or (clm) split it.
    """
    packing: bool = False
    """Pack several examples into one sequence of at most max_length tokens.
    Attention does not cross examples.
    """
    group_by_length: bool = False
    """Put examples of similar length into the same step, to reduce padding."""
    streaming: bool = False
    """Keep rows on the disk, in shards, for more rows than memory holds (docs/data.md).
    Memory does not grow with the number of rows; the order differs from that of false.
    """
    window_gb: PositiveNumber | None = None
    """Shuffle a streamed epoch in windows of shards of this size, one after another; null: whole.
    The windows of the first epoch come in the order of the files.
    """
    shards: Annotated[str | None, ExpandedPath] = None
    """Object store for the shards of data.streaming, as s3://bucket/folder.
    data.cache_dir then holds two windows of data.window_gb; null: it holds all shards.
    """
    cache_dir: str = paths.DEFAULT_CACHE
    """Folder for tokenised data, keyed by a hash of its content.
    run.dir/.cache if the home directory is not writable.
    """


class Optimizer(Section):
    """The optimizer and its learning rate."""

    kind: OptimizerKind = "adamw"
    """Optimizer.
    8-bit optimizers store their state in 8 bits, paged ones can move it to host memory;
    lion needs half the state of adamw, adafactor almost none;
    muon works with adapter.kind: full only.
    """
    # Config replaces null before this is checked.
    lr: Annotated[
        float,
        Field(gt=0, allow_inf_nan=False),
        WithJsonSchema({"anyOf": [{"type": "number", "exclusiveMinimum": 0}, {"type": "null"}]}),
    ] = Field(default=None)  # type: ignore[assignment]
    """Peak learning rate.
    null: 2e-5 for all weights, 2e-4 for adapters; dpo, simpo, cpo, kto, grpo, rloo, ppo: 1e-6,
    1e-5; orpo: 5e-6, 5e-5; reward, process_reward: 1e-5, 1e-4. With lion a fifth of these, with
    adafactor 50 times those of all weights.
    """
    embedding_lr: PositiveNumber | None = None
    """Peak learning rate of embeddings and head; null: optimizer.lr."""
    head_lr: PositiveNumber | None = None
    """Peak learning rate of value and score heads, and of the head of a classifier.
    null: optimizer.lr (docs/objectives.md).
    """
    lora_plus_ratio: PositiveNumber | None = None
    """LoRA+ (Hayou et al., 2024): learning rate of B divided by that of A matrices; null: 1."""
    betas: (
        Annotated[list[Annotated[float, Field(ge=0, lt=1)]], Field(min_length=2, max_length=2)]
        | None
    ) = None
    """Decay rates of the running averages; null: [0.9, 0.999], or [0.9, 0.99] for lion."""
    eps: PositiveNumber = 1e-8
    """Term added to Adam's denominator."""
    weight_decay: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 0.0
    """Decoupled weight decay; norms and biases are not decayed."""


class Schedule(Section):
    """How the learning rate changes during the run."""

    kind: Literal["constant", "linear", "cosine", "inverse_sqrt", "wsd"] = "linear"
    """Shape after the warm-up; wsd (warmup-stable-decay) stays constant and then falls linearly."""
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Steps to raise the learning rate from 0 to its peak."""
    warmup_ratio: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """The same as a fraction of all steps, rounded up, in place of warmup_steps."""
    decay_fraction: Annotated[float, Field(gt=0, le=1)] = 0.1
    """wsd: fraction of the run, at its end, in which the learning rate falls."""
    min_lr_fraction: Fraction = 0.0
    """Final learning rate of linear, cosine and wsd, as a fraction of the peak."""


class Train(Section):
    """Length, batch sizes and precision of the training."""

    epochs: Positive | PositiveNumber = 1
    """Passes over the data; 1.5 ends in the middle of the second."""
    max_steps: Positive | None = None
    """Stop after this many optimizer steps, if train.epochs has not ended before."""
    global_batch_size: BatchSize = 8
    """Sequences per optimizer step, summed over all processes."""
    micro_batch_size: BatchSize | Literal["auto"] = 1
    """Sequences per forward pass of one process.
    auto: forecast the largest size that fits, and try it before training.
    """
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Precision of the arithmetic; auto: bf16 on GPUs that support it, else fp32."""
    max_grad_norm: PositiveNumber | None = 1.0
    """Clip gradients to this norm; null: do not clip."""
    neftune_alpha: PositiveNumber | None = None
    """NEFTune: add noise of up to alpha / sqrt(tokens x width) to the embeddings during training.
    null: add none.
    """
    ema_decay: Annotated[float, Field(gt=0, lt=1)] | None = None
    """Decay rate of an exponential moving average of the weights.
    The run evaluates, samples and exports the average; null: keep no average.
    """
    gradient_checkpointing: Literal["auto"] | bool | Positive = "auto"
    """Recompute activations in the backward pass: less memory, about a third more time.
    A number: only in the first N layers.
    auto: on a GPU in as few layers as fit by forecast, on a CPU in none.
    """
    activation_offload: bool = False
    """Keep the inputs of recomputed layers in host memory, for longer sequences on one GPU.
    Copies run beside the arithmetic; on a CPU they are there already.
    """
    compile: Literal["auto"] | bool = "auto"
    """Compile the layers with torch.compile.
    Steps are faster after a first one of a minute or two; needs a C++ compiler.
    auto: on a GPU, if the run is long enough to earn it and nothing forbids it; on a CPU not, and
    not with rollouts, whose first ratio is 1 only if the same kernels score and learn.
    """
    float8: Literal["rowwise"] | bool = False
    """Multiply the large matrices of the layers in float8 while training; all else in bf16.
    true: a scale for each matrix; rowwise: a scale for each row, more exact and slower.
    Needs torchao, compiled layers, and a GPU of compute capability 8.9 (Ada, Hopper) or newer.
    """
    hang_minutes: PositiveNumber | None = 10.0
    """End all processes if one does not answer or finish a micro-batch in this many minutes.
    null: no limit.
    """


class Checkpoint(Section):
    """Checkpoints, and how the run responds when its machine is taken away."""

    every_steps: Positive | None = None
    """Save every N steps; null: do not save by steps."""
    every_minutes: PositiveNumber | None = 15.0
    """Save every N minutes; null: do not save by time."""
    keep_last: Positive = 2
    """Number of checkpoints to keep, besides the best one and the one this attempt resumed from."""
    asynchronous: bool = True
    """Write checkpoints in the background; training waits only for a copy to host memory.
    false: wait for the write, which saves that memory.
    """
    storage: Annotated[str | None, ExpandedPath] = None
    """Object store to copy checkpoints, logs and the model to, as s3://bucket/folder.
    A machine with an empty disk resumes from it.
    """
    grace_seconds: PositiveNumber = 30.0
    """Seconds between SIGTERM and SIGKILL on your cluster.
    The run warns if saves take longer, and waits this long at the start for another process that
    holds the run directory.
    """
    max_minutes: Annotated[float, Field(gt=0, le=1e6)] | None = None
    """Save and end with exit code 75 after this many minutes, for queues that kill at a deadline.
    Leave time for a step and a save.
    """
    notices: Literal["aws", "gcp", "azure"] | None = None
    """Poll this cloud for preemption notices; in Kubernetes rely on SIGTERM instead."""
    resume: Literal["auto", "never"] = "auto"
    """auto: resume from the newest valid checkpoint; never: refuse to start if there are any."""


class Evaluation(Section):
    """Loss on held-out rows."""

    every_steps: Positive | None = None
    """Evaluate every N steps and at the end; null: only at the end."""
    micro_batch_size: BatchSize | None = None
    """Sequences per forward pass of one process in evaluations; null: train.micro_batch_size."""
    patience: Positive | None = None
    """Stop after N evaluations in a row without a new best; null: never stop early."""
    export_best: bool = False
    """Export the weights of the best evaluation instead of the last weights."""
    sample_prompts: list[str] = []
    """Prompts to answer during the run; answers go to samples.jsonl."""
    sample_every_steps: Positive | None = None
    """Answer evaluation.sample_prompts every N steps and at the end; null: only at the end."""
    sample_max_new_tokens: Positive = 128
    """Maximum number of tokens in an answer to a sample prompt."""


class Tracking(Section):
    """Logs and trackers."""

    log_every_steps: Positive = 1
    """Write metrics every N steps."""
    trackers: list[Literal["wandb", "tensorboard", "trackio"]] = []
    """Also send metrics to Weights & Biases, TensorBoard (in the run directory) or Trackio."""
    project: str = "finetune"
    """Project name in wandb and trackio."""
    wandb_mode: Literal["online", "offline", "disabled"] | None = None
    """offline: write into the run directory, for `wandb sync`; disabled: send nothing.
    null: use WANDB_MODE, else online.
    """


class Config(Section):
    """One run."""

    run: Run
    model: Model = Model()
    adapter: Annotated[Full | Lora | QLora, by_kind(Full, Lora, QLora)] = Full()
    """What to train: all weights, or low-rank adapters on top of frozen weights."""
    data: Data
    objective: Annotated[
        SerializeAsAny[
            Clm | MaskedLm | SequenceClassification | TokenClassification | Seq2Seq
            | SpanCorruption | TextInfilling | Dpo | Orpo | Simpo | Cpo | Kto | Reward
            | ProcessReward | Grpo | Rloo | Ppo | Sft | Distill | OwnObjective
        ],
        by_kind(
            Sft, Clm, MaskedLm, SequenceClassification, TokenClassification, Seq2Seq,
            SpanCorruption, TextInfilling, Dpo, Orpo, Simpo, Cpo, Kto, Reward, Grpo, Rloo,
            Ppo, ProcessReward,
            Distill, own=own_objective,
        ),
    ] = Sft()  # fmt: skip
    """The loss."""
    optimizer: Optimizer = Optimizer()
    schedule: Schedule = Schedule()
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    evaluation: Evaluation = Evaluation()
    tracking: Tracking = Tracking()

    def changed(self, section: str, **values: Any) -> "Config":
        """Return a copy with other values in a section, which are not checked again."""
        part = getattr(self, section).model_copy(update=values)
        return self.model_copy(update={section: part})

    @model_validator(mode="before")
    @classmethod
    def _with_rate(cls, values: Any) -> Any:
        """Fill in optimizer.lr, so that code, config.yaml and receipt always have a number."""
        optimizer = values.get("optimizer", {}) if isinstance(values, dict) else None
        if not isinstance(optimizer, dict) or optimizer.get("lr") is not None:
            return values
        adapter = values.get("adapter")
        kind = adapter.get("kind", "full") if isinstance(adapter, dict) else "full"
        objective = values.get("objective")
        learns = objective.get("kind", "sft") if isinstance(objective, dict) else "sft"
        lr = usual_lr(optimizer.get("kind", "adamw"), kind, learns)
        return values | {"optimizer": optimizer | {"lr": lr}}

    @property
    def cache_dir(self) -> str:
        """Return data.cache_dir, or a folder in run.dir if the home directory is missing."""
        return paths.cache_dir(self.data.cache_dir, self.run.dir)

    @property
    def micro_batch_size(self) -> int:
        """Return train.micro_batch_size, after auto was replaced by a number."""
        size = self.train.micro_batch_size
        assert size != "auto"
        return size

    @property
    def rollouts(self) -> Rollouts | None:
        """Return how completions are sampled; None if the objective learns from rows alone."""
        found: Rollouts | None = getattr(self.objective, "rollouts", None)
        return found

    @property
    def distills_text(self) -> bool:
        """Return whether a teacher says what follows each token of plain text."""
        return isinstance(self.objective, Distill) and self.data.format == "text"

    @property
    def trains_in_16_bits(self) -> bool:
        """Return whether trained weights are bfloat16; adapters always train in float32."""
        return self.adapter.kind == "full" and self.model.dtype == "bfloat16"

    @property
    def run_dir(self) -> Path:
        return Path(self.run.dir) / self.run.name


def usual_lr(optimizer: Any, adapter: Any, objective: Any = "sft") -> float:
    """Return the default of optimizer.lr for three kinds that are not yet checked."""
    is_known = isinstance(optimizer, str) and optimizer in OPTIMIZERS
    of_optimizer = OPTIMIZERS[optimizer if is_known else "adamw"].lr
    own = objective_kind(objective).lr if isinstance(objective, str) else None
    which = 0 if adapter == "full" else 1
    if own is None:
        return of_optimizer[which]
    # As far from AdamW's as the optimizer's usual rate is.
    lr = own[which] * of_optimizer[which] / OPTIMIZERS["adamw"].lr[which]
    return float(f"{lr:.6g}")  # 5e-05, not 4.9999999999999996e-05


def accumulation_steps(config: Config, num_processes: int) -> int:
    """Return the micro-batches of one process in one step: global / (micro x processes).

    Raises ConfigError if that is not a whole number.
    """
    train = config.train
    at_once = config.micro_batch_size * num_processes
    if train.global_batch_size % at_once:
        example = math.ceil(train.global_batch_size / at_once) * at_once
        raise ConfigError(
            f"train.global_batch_size: {train.global_batch_size} cannot be split over "
            f"{num_processes} processes of train.micro_batch_size {train.micro_batch_size}; it "
            f"must be a multiple of {at_once}, for example {example}; for the same steps lower "
            "train.micro_batch_size"
        )
    return train.global_batch_size // at_once
