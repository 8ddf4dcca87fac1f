"""What adapters start from, where that takes more than random numbers: the data, or what
quantisation lost.
"""

import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

if TYPE_CHECKING:
    from peft import PeftModel

QUANTIZED = ("Linear4bit", "Linear8bitLt")  # bitsandbytes' layers


def initialise_from_data(model: "PeftModel", batches: Iterable[dict[str, Any]]) -> None:
    """EVA (Paischer et al., 2024): A from the main directions of what each layer is given.
    `batches`: model inputs.

    Every layer keeps its rank (rho is 1): ranks that followed the data would change with the number
    of processes.
    """
    from peft import initialize_lora_eva_weights

    with warnings.catch_warnings():
        warnings.filterwarnings(
            "ignore", "input of type .* could not be moved"
        )  # lengths and switches, which are not tensors
        initialize_lora_eva_weights(
            model, list(batches), forward_fn=lambda inner, inputs: inner(**inputs), prepare_model_inputs_fn=None,
            prepare_layer_inputs_fn=None, show_progress_bar=False, gather_distributed_inputs=False,
        )  # fmt: skip


def initialise_from_quantization(model: "PeftModel", original: nn.Module) -> None:
    """LoftQ (Li et al., 2023), one iteration: B A = the best rank-r part of W - Q, of original and
    quantised weights.

    peft's own function needs a CUDA device and leaves the scale alpha / r out.
    """
    from peft.utils.integrations import dequantize_bnb_weight

    for name, layer in model.named_modules():
        if hasattr(layer, "lora_A"):
            quantized = layer.get_base_layer()
            if (
                type(quantized).__name__ not in QUANTIZED
            ):  # nothing was lost: it starts as every adapter does
                continue
            weight = original.get_submodule(name.removeprefix("base_model.model.")).weight
            lost = (
                weight.to(quantized.weight.device).float()
                - dequantize_bnb_weight(quantized.weight).float()
            )
            rank, scale = layer.r["default"], layer.scaling["default"]
            u, s, v = torch.svd_lowrank(lost, q=min(rank + 8, *lost.shape), niter=4)
            root = s[:rank].sqrt()
            layer.lora_A["default"].weight.data.copy_(root[:, None] * v[:, :rank].T)
            layer.lora_B["default"].weight.data.copy_(u[:, :rank] * root / scale)
