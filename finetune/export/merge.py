"""Merge adapters into their base and save full weights: `finetune merge`."""

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers.utils import chat_template_utils

from finetune import failures, files
from finetune.config import paths
from finetune.config.base import is_adapter, model_argument, require_model
from finetune.errors import ExportError, ModelError
from finetune.export.load import (
    base_argument,
    base_of,
    load,
    load_tokenizer,
    require_adapter,
    require_base,
    trust_remote_code_argument,
)
from finetune.export.publish import staged
from finetune.export.save import Base, save
from finetune.export.verify import TOLERANCE, disagreement, opened, probe_logits, require_weights
from finetune.models import adapters, attention_probe, base_identity


@dataclass(frozen=True)
class Merged:
    """The largest difference of logits after merging, relative to the largest logit."""

    rounding: float
    """From the adapters on the same base."""
    quantization: float | None
    """From the adapters on the quantised base of training; None if there was none."""


def merge(
    sources: Sequence[Path],
    target: Path,
    dtype: str = "auto",
    trust_remote_code: bool = False,
    base: str | None = None,
    max_shard_size: str | None = None,
) -> Merged:
    """Save W + sum of (alpha / r) B A, of one or several adapters of the same base.

    Uses the unquantised weights of a base that was quantised for training; with LoftQ, whose
    adapters make up for the quantisation, the dequantised ones. `base`: see `load`. Raises
    ModelError if a source is not an adapter or `target` exists, ExportError if logits differ by
    more than rounding; then nothing is left at `target` or next to it.
    """
    require_adapters(sources)
    require_output(sources, target)
    require_mergeable(sources)
    first = sources[0]
    tokenizer = load_tokenizer(first, trust_remote_code)
    _require_template(first, tokenizer)
    model, names = with_adapters(sources, dtype, trust_remote_code, base)
    trained = _beside_quantized_base(first, model, trust_remote_code, base)
    model.base_model.set_adapter(names)
    before = probe_logits(model)
    origin = Base(*base_of(first, model.peft_config["default"], base), trust_remote_code)
    merged = adapters.merge(model, names)
    del model
    if dtype == "float16":
        merged = merged.half()
    weights = {name: tensor.detach().cpu() for name, tensor in merged.state_dict().items()}
    with staged(target) as folder:
        with failures.writing(target):
            save(merged, weights, tokenizer, None, folder, None, origin, max_shard_size)
        names_of = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}
        tolerance = TOLERANCE[names_of[merged.dtype]]
        del merged
        reloaded = opened(lambda: load(folder, "auto", trust_remote_code))
        require_weights(folder, reloaded, weights)
        after = probe_logits(reloaded)
        if why := disagreement(after, before, tolerance, attention_probe.has_experts(reloaded)):
            raise ExportError(f"{target}: {why} after merging; nothing was written")
    is_comparable = trained is not None and len(sources) == 1
    return Merged(
        rounding=_relative_difference(after, before),
        quantization=_relative_difference(after, trained) if is_comparable else None,
    )


def with_adapters(
    sources: Sequence[Path], dtype: str, trust_remote_code: bool, base: str | None
) -> tuple[Any, list[str]]:
    """Return the base with all adapters, unquantised, and the names of these in it."""
    # float16 has a smaller range than the others: add in float32 and round last.
    adding = {"float16": "float32"}.get(dtype, dtype)
    wanted = adding if adding == "auto" else getattr(torch, adding)
    model = load(sources[0], wanted, trust_remote_code, quantized=False, base=base)
    names = ["default", *(f"adapter_{number}" for number in range(1, len(sources)))]
    for name, source in zip(names[1:], sources[1:]):
        model.load_adapter(str(source), name)
        adapters.require_whole(model, str(source), name)
    return model, names


def _require_template(source: Path, tokenizer: Any) -> None:
    """Raise ModelError if the chat template, which the merged model copies, has a syntax error."""
    own = tokenizer.chat_template or {}
    for template in own.values() if isinstance(own, dict) else [own]:
        try:
            chat_template_utils._compile_jinja_template(template)
        except Exception as exc:  # a template is a program
            raise ModelError(
                f"{source}: the chat template of its tokenizer (chat_template.jinja) cannot be "
                f"used: {exc}; correct it, or remove the file"
            ) from exc


def _beside_quantized_base(
    source: Path, whole: Any, trust_remote_code: bool, base: str | None
) -> torch.Tensor | None:
    """Return `probe_logits` of an adapter on the quantised base of training; None without one.

    For LoftQ, sets the weights of `whole`, the unquantised base, to the dequantised ones.
    """
    record = base_identity.read(source)
    if not record.get("quantization"):
        return None
    quantized = load(source, trust_remote_code=trust_remote_code, base=base)
    if record.get("loftq"):
        adapters.copy_dequantized(quantized, whole)
    return probe_logits(quantized)


def require_adapters(sources: Sequence[Path]) -> None:
    """Raise ModelError if a source is not an adapter."""
    for source in sources:
        if not source.exists():
            raise ModelError(f"{source}: no such folder; give the run of an adapter")
        if not is_adapter(source):
            raise ModelError(
                f"{source}: no adapter_config.json, so there is nothing to merge; give the model "
                "folder of a LoRA run"
            )
        require_adapter(source)


def require_output(sources: Sequence[Path], target: Path) -> None:
    """Raise ModelError if `target` exists, cannot be created, or lies inside a source."""
    if os.path.lexists(target):
        raise ModelError(f"{target} exists; choose another --output")
    if problem := _problem_of_parent(target):
        raise ModelError(f"--output: {target}: {problem}")
    if any(source.resolve() in target.resolve().parents for source in sources):
        raise ModelError(f"{target} lies inside an adapter; choose another --output")


def _problem_of_parent(target: Path) -> str | None:
    """Return why the folder cannot be created, before models are loaded; None if it can."""
    above = next(folder for folder in target.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        return f"{above} is not a folder"
    try:
        files.probe_folder(above)
    except OSError as exc:
        failures.reraise(exc, f"--output: {target} cannot be written now")
        return f"{above} cannot be written ({exc.strerror or exc})"
    return None


def require_mergeable(sources: Sequence[Path]) -> None:
    """Raise ModelError if several adapters cannot be added to one base."""
    if len(sources) == 1:
        return
    from peft import PeftConfig

    configs = [PeftConfig.from_pretrained(str(source)) for source in sources]
    records = [base_identity.read(source) for source in sources]
    bases = [
        (str(config.base_model_name_or_path), {**record, "dtype": None})
        for config, record in zip(configs, records)
    ]
    for source, config, record, base in zip(sources, configs, records, bases):
        if base != bases[0]:
            raise ModelError(
                f"{source} and {sources[0]} are adapters of different bases: they cannot be merged "
                "together"
            )
        if config.init_lora_weights in ("pissa", "olora", "corda") or record.get("loftq"):
            raise ModelError(
                f"{source} was initialised from the weights of its base, which adapter.init "
                "changed; merge it alone"
            )
        if config.modules_to_save or config.bias != "none":
            raise ModelError(
                f"{source} holds whole modules or biases, which cannot be added to those of "
                "another adapter; merge it alone"
            )


def add_arguments(parser: argparse.ArgumentParser, needs_output: bool = True) -> None:
    add, none = parser.add_argument, argparse.SUPPRESS
    what = "adapter, as runs/<name> or runs/<name>/model, or several of one base"
    add("model", nargs="*", type=model_argument, metavar="RUN", default=none, help=what)
    what = "the same, as an option"
    add("--model", type=model_argument, nargs="+", metavar="RUN", help=what)
    add("--output", required=needs_output, type=paths.argument, help="folder to write")
    dtypes = ["auto", "float32", "bfloat16", "float16"]
    what = "dtype of the weights; auto: that of the base"
    add("--dtype", default="auto", choices=dtypes, help=what)
    base_argument(parser)
    trust_remote_code_argument(parser)


def main(arguments: argparse.Namespace, max_shard_size: str | None = None) -> None:
    if not arguments.model:
        raise ModelError("name an adapter, such as runs/my_run")
    for name in arguments.model:
        require_model(name, "--model")
    require_base(arguments.base)
    sources, target = list(map(Path, arguments.model)), Path(arguments.output)
    merged = merge(
        sources, target, arguments.dtype, arguments.trust_remote_code, arguments.base,
        max_shard_size,
    )  # fmt: skip
    print(
        f"{arguments.output}: merged; logits differ from base plus adapter by at most "
        f"{merged.rounding:.2g} of the largest one"
    )
    if merged.quantization is not None:
        print(f"and by {merged.quantization:.2g} from the quantised base plus adapter, as trained")


def _relative_difference(logits: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((logits - wanted).abs().max() / wanted.abs().max())
