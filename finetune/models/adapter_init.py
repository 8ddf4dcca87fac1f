"""Initialise adapters from the data (EVA) or from the quantisation error (LoftQ)."""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

QUANTIZED = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers


def initialise_from_data(model: "PeftModel", batches: Iterable[dict[str, Any]]) -> None:
    """Set each A to the principal directions of its layer's inputs: EVA (Paischer et al., 2024).

    `batches`: inputs of the model. Every layer keeps its rank (rho is 1): ranks chosen from the
    data would change with the number of processes.
    """
    from peft import initialize_lora_eva_weights

    with warnings.catch_warnings():
        # Lengths and switches are not tensors.
        warnings.filterwarnings("ignore", "input of type .* could not be moved")
        initialize_lora_eva_weights(
            model, list(batches), forward_fn=lambda inner, inputs: inner(**inputs),
            prepare_model_inputs_fn=None, prepare_layer_inputs_fn=None, show_progress_bar=False,
            gather_distributed_inputs=False,
        )  # fmt: skip


def initialise_from_quantization(model: "PeftModel", original: nn.Module) -> None:
    """Set B A to the best rank-r approximation of W - Q: LoftQ (Li et al., 2023), one iteration.

    W: weights of `original`; Q: the quantised ones. peft's own function needs a CUDA device and
    leaves out the scale alpha / r.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    for name, layer in model.named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        base = layer.get_base_layer()
        if type(base).__name__ not in QUANTIZED:  # no error to repair: keep the usual start
            continue
        weight = original.get_submodule(name.removeprefix("base_model.model.")).weight
        quantized = dequantize_bnb_weight(base.weight).float()
        error = weight.to(base.weight.device).float() - quantized
        rank, scale = layer.r["default"], layer.scaling["default"]
        u, s, v = torch.svd_lowrank(error, q=min(rank + 8, *error.shape), niter=4)
        root = s[:rank].sqrt()
        layer.lora_A["default"].weight.data.copy_(root[:, None] * v[:, :rank].T)
        layer.lora_B["default"].weight.data.copy_(u[:, :rank] * root / scale)
