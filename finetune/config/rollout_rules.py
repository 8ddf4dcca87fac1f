"""Settings that do not fit an objective which samples what it learns from."""

from collections.abc import Iterator

from finetune import own_code
from finetune.config.choices import ADAPTER_INITS
from finetune.config.engine_fields import ServerEngine
from finetune.config.fields import Config, Full
from finetune.config.objective_fields import Distill
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
            f"data.max_length: {data.max_length} tokens have to hold a prompt and a completion of "
            f"up to {rollouts.max_new_tokens} (objective.rollouts.max_new_tokens); raise it, or "
            "lower max_new_tokens"
        )
    if data.loss_on != "completion":
        yield (
            f"data.loss_on: would be ignored: objective.kind: {kind} learns its own completions; "
            "remove it"
        )
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
    if isinstance(rollouts.engine, ServerEngine):
        yield from _server_conflicts(config)
    if rollouts.dynamic_sampling and isinstance(config.objective, Distill):
        yield (
            f"objective.rollouts.dynamic_sampling: would be ignored: {kind} learns no rewards; "
            "remove it"
        )
    elif rollouts.dynamic_sampling and rollouts.group_size == 1:
        yield (
            "objective.rollouts.dynamic_sampling: a group of 1 completion has nothing to differ "
            "from, so every prompt would be replaced; remove it, or raise group_size"
        )
    yield from _turn_conflicts(config, rollouts)
    if rollouts.cut_answers != "penalise" and rollouts.cut_penalty != 1.0:
        yield "objective.rollouts: cut_penalty is only for cut_answers: penalise; remove it"


def _turn_conflicts(config: Config, rollouts: Rollouts) -> Iterator[str]:
    """List settings of several turns that do not fit."""
    rewards = [each.kind for each in getattr(config.objective, "rewards", None) or ()]
    if rollouts.environment is None:
        if "environment" in rewards:
            yield (
                "objective.rewards: kind: environment gives what objective.rollouts.environment "
                "gave, and there is none; name one, or remove the reward"
            )
        for name in ("max_turns", "turn_seconds"):
            if getattr(rollouts, name) != type(rollouts).model_fields[name].default:
                yield f"objective.rollouts.{name}: would be ignored without environment; remove it"
        return
    if isinstance(rollouts.engine, ServerEngine):
        yield (
            "objective.rollouts.environment: a server continues one prompt a request, and the next "
            "turn continues tokens that only this run has; sample with engine: {kind: local}"
        )


def _server_conflicts(config: Config) -> Iterator[str]:
    """List adapters that vLLM does not serve."""
    adapter, instead = config.adapter, "; change it, or sample with engine: {kind: local}"
    if isinstance(adapter, Full):
        return
    if adapter.dora:
        yield f"adapter.dora: a vLLM server has no DoRA{instead}"
    if adapter.modules_to_save or config.model.new_tokens:
        name = "adapter.modules_to_save" if adapter.modules_to_save else "model.new_tokens"
        yield f"{name}: a vLLM server loads adapters alone, no whole modules beside them{instead}"
    if getattr(adapter, "bias", "none") != "none":
        yield f"adapter.bias: a vLLM server loads no biases with adapters{instead}"
    if ADAPTER_INITS[adapter.init].rewrites_base or adapter.init == "loftq":
        yield f"adapter.init: {adapter.init} changes the base, which the server keeps{instead}"


_CHANCE = (
    "would change the policy at random between sampling and learning, so the ratio of their "
    "probabilities would not start at 1; remove it"
)
