"""Trained weights -> a folder that transformers or peft opens, verified by opening it."""

import argparse
import os
import shutil
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

from finetune.data.templates import Template
from finetune.data.tokens import tokenizer_fingerprint, uses_bos
from finetune.errors import ExportError, ModelError
from finetune.models import adapters

PROBE_TOKENS = 16
# Largest difference of logits between the trained and the reloaded model, as a part of the largest
# logit. float32: the two attention kernels add in another order. Half precision: bf16 keeps 8 bits
# (a relative error of 2^-9 each operation), and training may have run under autocast.
TOLERANCE = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 1e-2}


def save(model: Any, weights: dict[str, torch.Tensor], tokenizer: Any, template: Template | None, target: Path) -> None:
    """Write model (`weights` whole, on the CPU) and tokenizer into `target`, at once or not at all.

    The tokenizer carries the template as its chat template, and the generation config every token
    that ends an answer. An older folder at `target` is replaced only by a complete new one.
    """
    writing, old = target.with_name(f".writing-{target.name}"), target.with_name(f".old-{target.name}")
    shutil.rmtree(writing, ignore_errors=True)
    shutil.rmtree(old, ignore_errors=True)
    if template is not None:
        tokenizer.chat_template = chat_template(template, tokenizer)
    _set_generation(model, tokenizer, template)
    model.save_pretrained(writing, state_dict=dict(weights))  # a copy: transformers empties the mapping it is given
    tokenizer.save_pretrained(writing)
    if target.exists():
        os.rename(target, old)
    os.rename(writing, target)
    shutil.rmtree(old, ignore_errors=True)


def verify(
    target: Path, trained: Any, weights: dict[str, torch.Tensor], tokenizer: Any, precision: str
) -> None:  # fmt: skip
    """Open `target` as a user would and compare it with what was trained. Raises ExportError.

    Every tensor must be there bit for bit, no adapter may be zero, the logits of `probe_ids` must
    agree, and the tokenizer must give the same ids and the same chat.
    """
    reloaded = load(target, trained.get_input_embeddings().weight.dtype)
    if isinstance(trained, PeftModel) and (dead := adapters.dead_adapters(reloaded)):
        raise ExportError(f"{target}: {len(dead)} adapters are zero, such as {dead[0]}: they were never trained")
    state = reloaded.state_dict()
    for name, tensor in weights.items():
        if name not in state or not torch.equal(state[name].cpu(), tensor):
            raise ExportError(
                f"{target}: weight {name} is {'other than trained' if name in state else 'missing'} after reloading"
            )
    logits, wanted = probe_logits(reloaded), probe_logits(trained)
    difference, scale = (logits - wanted).abs().max().item(), wanted.abs().max().item()
    if not difference <= TOLERANCE[precision] * scale:
        raise ExportError(f"{target}: logits differ by {difference:.3g} (largest logit {scale:.3g}) after reloading")
    again = AutoTokenizer.from_pretrained(target)
    if (
        tokenizer_fingerprint(again) != tokenizer_fingerprint(tokenizer)
        or again.chat_template != tokenizer.chat_template
    ):
        raise ExportError(f"{target}: the tokenizer differs after reloading")


def load(path: str | Path, dtype: torch.dtype | str = "auto") -> Any:
    """Full weights, or an adapter on its base. Raises ModelError."""
    folder = Path(path)
    try:
        if (folder / "adapter_config.json").exists():
            from peft import PeftConfig

            base = AutoModelForCausalLM.from_pretrained(
                str(PeftConfig.from_pretrained(str(folder)).base_model_name_or_path), dtype=dtype
            )
            return PeftModel.from_pretrained(base, str(folder))
        return AutoModelForCausalLM.from_pretrained(str(path), dtype=dtype)
    except (OSError, ValueError, KeyError, RuntimeError) as exc:
        raise ModelError(f"{path}: cannot be opened as a model: {str(exc).strip().splitlines()[0]}") from exc


def load_tokenizer(path: str | Path) -> Any:
    """The tokenizer of an exported model. Raises ModelError."""
    try:
        return AutoTokenizer.from_pretrained(str(path))
    except (OSError, ValueError, KeyError) as exc:
        raise ModelError(f"{path}: has no tokenizer: {str(exc).strip().splitlines()[0]}") from exc


def probe_logits(model: Any) -> torch.Tensor:
    """Logits of the trained model for `probe_ids`, float32 [1, PROBE_TOKENS, V] on the CPU."""
    was_training, device = model.training, model.get_input_embeddings().weight.device
    ids = probe_ids(model.get_input_embeddings().weight.shape[0]).to(device)
    bounds = torch.tensor([0, PROBE_TOKENS], dtype=torch.int32, device=device)
    apart = model.config._attn_implementation not in ("sdpa", "eager")
    one_document = {
        "cu_seq_lens_q": bounds,
        "cu_seq_lens_k": bounds,
        "max_length_q": PROBE_TOKENS,
        "max_length_k": PROBE_TOKENS,
    }
    model.eval()
    with torch.no_grad():
        logits = model(input_ids=ids, use_cache=False, **(one_document if apart else {})).logits.float().cpu()
    model.train(was_training)
    return logits


def probe_ids(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (1, PROBE_TOKENS), generator=torch.Generator().manual_seed(1))


def merge(source: Path, target: Path, dtype: str) -> float:
    """Add an adapter into its base, save full weights, and return the largest difference of logits this made.

    Raises ModelError if `source` is no adapter or `target` exists.
    """
    if not (source / "adapter_config.json").exists():
        raise ModelError(f"{source}: no adapter_config.json, so there is nothing to merge; give model/ of a LoRA run")
    if target.exists():
        raise ModelError(f"{target} exists; choose another --output")
    model, tokenizer = load(source, dtype), load_tokenizer(source)
    before = probe_logits(model)
    merged = adapters.merge(model)
    weights = {name: tensor.detach().cpu() for name, tensor in merged.state_dict().items()}
    save(merged, weights, tokenizer, None, target)
    return float((probe_logits(load(target)) - before).abs().max())


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--merge", action="store_true", required=True, help="add the adapter into its base")
    parser.add_argument("--model", required=True, type=Path, help="folder of the adapter, as in runs/<name>/model")
    parser.add_argument("--output", required=True, type=Path, help="folder to write")
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "float32", "bfloat16", "float16"],
        help="of the weights; auto: the base's own",
    )


def main(arguments: argparse.Namespace) -> None:
    difference = merge(arguments.model, arguments.output, arguments.dtype)
    print(f"{arguments.output}: merged; logits differ by at most {difference:.3g} from base plus adapter")


def chat_template(template: Template, tokenizer: Any) -> str:
    """The Jinja source to save: with the BOS in front that training put there, if the template has none."""
    if uses_bos(tokenizer) and "bos_token" not in template.source:
        return "{{ bos_token }}" + template.source
    return template.source


def _set_generation(model: Any, tokenizer: Any, template: Template | None) -> None:
    """Generation stops at EOS and at the token that ends a turn, and pads with the pad token."""
    config = model.generation_config
    known = config.eos_token_id if isinstance(config.eos_token_id, list) else [config.eos_token_id]
    stop = template.stop_token() if template is not None else None
    ends = [tokenizer.convert_tokens_to_ids(stop) if stop else None, tokenizer.eos_token_id, *known]
    ends = list(dict.fromkeys(token for token in ends if token is not None))
    config.eos_token_id = ends[0] if len(ends) == 1 else ends
    config.pad_token_id = tokenizer.pad_token_id
