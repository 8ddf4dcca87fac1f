"""Settings that do not fit an objective which samples what it learns from."""

from collections.abc import Iterator

from finetune import own_code
from finetune.config.fields import Config, Full
from finetune.config.rollout_fields import Rollouts


def conflicts(config: Config, rollouts: Rollouts) -> Iterator[str]:
    """List settings that rollouts cannot work with, or that they would ignore."""
    data, train, kind = config.data, config.train, own_code.without_folder(config.objective.kind)
    if train.global_batch_size % rollouts.group_size:
        yield (
            f"train.global_batch_size: {train.global_batch_size} completions cannot be "
            f"parted into groups of {rollouts.group_size} (objective.rollouts.group_size)"
        )
    if data.max_length <= rollouts.max_new_tokens:
        yield (
            f"data.max_length: {data.max_length} tokens hold a prompt and its completion of up to "
            f"{rollouts.max_new_tokens} (objective.rollouts.max_new_tokens); raise it"
        )
    if data.loss_on != "completion":
        yield f"data.loss_on: would be ignored: objective.kind: {kind} learns its own completions"
    if data.packing or data.group_by_length:
        name = "packing" if data.packing else "group_by_length"
        yield f"data.{name}: would be ignored: completions are laid end to end anyway; remove it"
    if data.streaming:
        yield f"data.streaming: objective.kind: {kind} keeps its prompts in memory; set it to false"
    if data.truncation in ("right", "split"):
        yield (
            f"data.truncation: {data.truncation} would cut the end of a prompt, which asks; use "
            "left, drop or error"
        )
    if data.format in ("text", "unpaired", "text_label", "token_labels"):
        yield f"data.format: {data.format} has no prompts; use prompt, or rows with answers"
    if not isinstance(config.adapter, Full) and config.adapter.dropout:
        yield "adapter.dropout: " + _CHANCE
    if train.neftune_alpha is not None:
        yield "train.neftune_alpha: " + _CHANCE
    if rollouts.cut_answers != "penalise" and rollouts.cut_penalty != 1.0:
        yield "objective.rollouts: cut_penalty is only for cut_answers: penalise; remove it"


_CHANCE = (
    "would make the policy that learns another one than the policy that sampled, so the first "
    "ratio of their probabilities would not be 1; remove it"
)
