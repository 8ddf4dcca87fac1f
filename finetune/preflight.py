"""What will be trained on what, in words, before the first step."""

from typing import Any

import numpy as np

from finetune.config import Config, accumulation
from finetune.errors import ConfigError

SHOWN_CHARACTERS = 600


def summary(config: Config, data: Any, topology: Any, trainable: int, total: int) -> str:
    """The run in a dozen lines, and its first example with what is learned in [brackets]."""
    train, examples = data.train.sequences, data.train.sequences.examples
    supervised = examples.num_supervised_tokens
    name = config.model.path or f"{data.model_config.model_type} from random weights"
    lines = [
        f"model       {name}: {total:,} parameters, {trainable:,} of them train ({trainable / total:.2%}, {config.adapter.kind})",
        f"topology    {topology.name}, {topology.num_processes} process(es) on {topology.device.type}, {topology.precision}, attention {data.attention}",
        f"data        {examples.num_rows:,} rows -> {len(examples):,} examples -> {len(train):,} sequences of at most {config.data.max_length} tokens"
        + (f"; {examples.num_truncated} cut" if examples.num_truncated else "")
        + (f"; {examples.num_dropped} dropped" if examples.num_dropped else ""),
        f"tokens      {examples.lengths.sum():,}, {supervised:,} of them learned; an example has {_quartiles(examples.lengths)}",
        f"template    {data.template.name}, objective {config.objective.kind}",
        f"steps       {data.num_steps:,} of {config.train.global_batch_size} sequences "
        f"({config.train.micro_batch_size} at once x {accumulation(config, topology.num_processes)} x {topology.num_processes} process(es))",
    ]
    if config.data.packing:
        lines.append(f"packing     {train.lengths.sum() / (len(train) * config.data.max_length):.1%} full")
    if data.eval:
        lines.append(f"evaluation  {len(data.eval.sequences.examples):,} examples")
    lines += ["first example, what is learned in [[ ]]:", _marked(examples, data.tokenizer)]
    return "\n".join(lines)


def check_lengths(examples: Any, config: Config, model_config: Any, num_steps: int) -> None:
    """Raise ConfigError if the model has too few positions, or the run too few steps for its warm-up."""
    longest = int(examples.lengths.max())
    positions = getattr(model_config.get_text_config(), "max_position_embeddings", None)
    if positions is not None and longest > positions:
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


def _quartiles(lengths: np.ndarray) -> str:
    low, middle, high = np.percentile(lengths, [0, 50, 100]).astype(int)
    return f"{low} to {high} tokens, half of them at most {middle}"


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
