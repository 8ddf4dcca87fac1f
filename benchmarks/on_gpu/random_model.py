"""Make a model of random weights where it will be used, the same for each trainer that is measured.

Reading 16 GB takes longer than the steps that are timed. What training computes does not depend on
where the weights come from.
"""

from pathlib import Path
from typing import Any

import torch
from torch import nn

SEED = 0
# QLoRA's arguments of BitsAndBytesConfig; the dtype of the arithmetic comes on top.
NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def make(
    config: Any, dtype: torch.dtype, attention: str, quantization: dict[str, Any] | None = None
) -> Any:
    """Return a causal LM on the device; `quantization`: arguments of BitsAndBytesConfig.

    Seeds before and after, so that adapters made next start alike, too.
    """
    from transformers import AutoModelForCausalLM

    torch.manual_seed(SEED)
    with torch.device(device()):
        model = AutoModelForCausalLM.from_config(config, attn_implementation=attention, dtype=dtype)
    if quantization:
        _quantize(model, quantization)
    if torch.cuda.is_available():  # only training's memory counts
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    torch.manual_seed(SEED)
    return model


def _quantize(model: Any, quantization: dict[str, Any]) -> None:
    """Replace the layers' matrices by 4- or 8-bit ones, as transformers does while it reads."""
    from transformers import BitsAndBytesConfig
    from transformers.quantizers import AutoHfQuantizer

    config = BitsAndBytesConfig(**quantization)
    for name, module in list(model.named_modules()):
        # As transformers finds them: Falcon's are children of nn.Linear.
        if not isinstance(module, nn.Linear) or module is model.get_output_embeddings():
            continue
        made = _in_8_bits(module, config) if config.load_in_8bit else _in_4_bits(module, config)
        made.bias = module.bias
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, made.to(device()))  # which quantises
    model.is_loaded_in_4bit, model.is_loaded_in_8bit = config.load_in_4bit, config.load_in_8bit
    model.is_quantized = True
    model.config.quantization_config = config
    model.hf_quantizer = AutoHfQuantizer.from_config(config)  # Trainer asks it


def _in_4_bits(module: nn.Linear, config: Any) -> Any:
    from bitsandbytes.nn import Linear4bit, Params4bit

    with torch.device("meta"):
        made = Linear4bit(
            module.in_features, module.out_features, bias=False,
            compute_dtype=config.bnb_4bit_compute_dtype,
        )  # fmt: skip
    made.weight = Params4bit(
        module.weight.detach(), requires_grad=False, module=made,
        quant_type=config.bnb_4bit_quant_type,
        compress_statistics=config.bnb_4bit_use_double_quant,
    )  # fmt: skip
    return made


def _in_8_bits(module: nn.Linear, config: Any) -> Any:
    from bitsandbytes.nn import Int8Params, Linear8bitLt

    with torch.device("meta"):
        made = Linear8bitLt(
            module.in_features, module.out_features, bias=False, has_fp16_weights=False,
            threshold=config.llm_int8_threshold,
        )  # fmt: skip
    # Only what comes from the CPU is quantised on its way.
    weight = module.weight.detach().cpu()
    made.weight = Int8Params(weight, requires_grad=False, has_fp16_weights=False)
    return made


def write_folder(folder: Path, shape: dict[str, Any]) -> None:
    """Write config and tokenizer, and a file of weights that is only there to be found."""
    from safetensors.torch import save_file
    from transformers import AutoConfig

    from finetune.models.load import bytes_tokenizer

    tokenizer, values = bytes_tokenizer(), dict(shape)
    config = AutoConfig.for_model(
        values.pop("model_type"), **{"vocab_size": len(tokenizer), **values}
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    save_file({"none": torch.zeros(1)}, folder / "model.safetensors")
