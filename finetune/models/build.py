"""Build the model that trains: base, adapters and their start, noise, recomputation."""

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass
from typing import Any

import torch

from finetune.config import Config
from finetune.errors import ModelError
from finetune.models import (
    adapter_init,
    adapters,
    base_identity,
    embeddings,
    families,
    float8,
    head,
    load,
    parameters,
    recompute,
    scalar_heads,
)


def build(
    config: Config, model_config: Any, tokenizer: Any, *, attention: str, precision: str,
    new_token_ids: list[int], device: torch.device,
    first_inputs: Callable[[], Iterable[dict[str, Any]]], with_weights: bool = True,
    heads: Collection[str] = (),
) -> tuple[Any, Any]:  # fmt: skip
    """Return (model, base inside it, which computes the loss), on the CPU. Raises ModelError.

    Without weights, both are on the meta device, for another process to send the weights.
    Weights that train are float32; frozen ones under adapters have the dtype of the arithmetic.
    `first_inputs`: the first inputs of training, for initialisations from the data. `heads`: what
    scalar heads should answer, of `scalar_heads.NAMES`.
    """
    dtype, family = _dtype(config, precision), families.of(config)
    torch.manual_seed(config.run.seed)  # random weights and fresh adapters are the same everywhere

    def load_base(quantization: dict[str, Any] | None) -> Any:
        return load.load_model(
            config.model, model_config, tokenizer, attention, dtype, quantization, family
        )

    if with_weights:
        base = load_base(adapters.quantization(config.adapter, dtype))
    else:
        base = load.skeleton(config.model, model_config, tokenizer, attention, dtype, family)
    model = adapters.apply(base, config.adapter, config.model, dtype, new_token_ids)
    init = config.adapter.init if with_weights and config.adapter.kind != "full" else None
    if init == "loftq":
        adapter_init.initialise_from_quantization(model, load_base(None))
    elif init == "eva":
        adapter_init.initialise_from_data(model.to(device), first_inputs())
    scalar_heads.attach(base, heads, dtype if config.trains_in_16_bits else torch.float32)
    families.shift_positions(base)
    head.install(base)
    if config.rollouts:
        _without_dropout(base)
    if config.train.neftune_alpha is not None:
        embeddings.add_noise(base, config.train.neftune_alpha)
    if config.train.float8:
        float8.convert(base, config.train.float8)
    num_recomputed = recompute.chosen(base, config.train.gradient_checkpointing)
    compiled = config.train.compile is True  # a run has replaced auto
    base.offload = None
    if compiled or num_recomputed:
        offloads = config.train.activation_offload
        base.offload = recompute.wrap(
            base, compiled=compiled, num_recomputed=num_recomputed, offloads=offloads
        )
    if with_weights and (broken := parameters.not_finite(model)):
        raise ModelError(
            f"model {config.model.path}: {len(broken)} of its weights hold NaN or infinity, such "
            f"as {broken[0]}"
        )
    return model, base


def _without_dropout(base: Any) -> None:
    """Switch off the dropout that a model's own config asks for; the config stays as it is.

    The policy that learns would be another one than the policy that sampled.
    """
    for module in base.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        for name, value in vars(module).items():  # probabilities that functions get
            if "dropout" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def frozen(config: Config) -> Config:
    """Return the config of the same model, to build it for passes without gradient alone."""
    return config.changed(
        "train", neftune_alpha=None, float8=False, compile=False, gradient_checkpointing=False,
        activation_offload=False,
    )  # fmt: skip


def _dtype(config: Config, precision: str) -> torch.dtype:
    """Return the dtype of the base: as model.dtype says, or what suits the method."""
    if config.model.dtype != "auto":
        dtype: torch.dtype = getattr(torch, config.model.dtype)
        return dtype
    return load.DTYPES[precision] if config.adapter.kind != "full" else torch.float32


@dataclass(frozen=True)
class Facts:
    """Describe a model before it is sharded and trained."""

    num_trainable: int
    num_parameters: int
    products: tuple[int, int]
    """(trained, frozen) parameters that a token is multiplied with."""
    frozen: str
    """Fingerprint of the weights that do not train."""
    start: str
    """Fingerprint of all weights before the first step."""
    code: str
    """Hash of the Python files that the model brought along."""


def facts(model: Any, base: Any) -> Facts:
    """Return the facts of `model` and the `base` inside it, which hold all their weights."""
    return Facts(
        *parameters.count(model),
        parameters.in_products(model),
        *base_identity.fingerprints(model),
        base_identity.code(base),
    )
